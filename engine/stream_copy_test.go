package engine

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

func (l *testLog) copyKey(from, to string, replace bool) Result {
	l.t.Helper()
	return l.do(&KeyCopy{From: from, To: to, Replace: replace})
}

// TestCopyStream: a copy has the entries, counters, groups and pending lists of the original, those of entries that are gone
// included, and goes its own way from there; with the memory lost in between, and with a replay of the copying itself.
func TestCopyStream(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		for n := range 8 {
			l.add("s", sid(uint64(n+1), 0), "n", fmt.Sprint(n))
		}
		l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"})
		l.readGroup("s", "g", "c", 4)
		l.pass(3 * time.Second)
		l.readGroup("s", "g", "d", 2)
		l.do(&StreamDelete{Key: "s", IDs: []StreamID{sid(2, 0), sid(7, 0)}}) // one pending, one not
		l.do(&StreamAck{Key: "s", Group: "g", IDs: []StreamID{sid(3, 0)}})
		l.do(&KeyExpire{Key: "s", By: Deadline{Set: true, Ms: 600_000}})
		again()
		l.add("t", sid(1, 1), "old", "one")
		want(t, "a target that is there", l.copyKey("s", "t", false).Count, 0)
		want(t, "replaced", l.copyKey("s", "t", true).Count, 1)
		again()
		views := strings.Split(l.view([]string{"s", "t"}), "\nt ")
		want(t, "the copy", views[1], strings.TrimPrefix(views[0], "s ")+"\n")
		key := l.ask(Query{Kind: QueryKeys, Stream: &StreamQuery{Keys: []string{"t"}}}).Keys[0]
		want(t, "its expiry", key.TTL, 600_000)

		// What happens to the one does not happen to the other.
		l.do(&StreamDelete{Key: "s", IDs: []StreamID{sid(5, 0)}})
		want(t, "acknowledged", l.do(&StreamAck{Key: "t", Group: "g", IDs: []StreamID{sid(1, 0), sid(2, 0)}}).Count, 2)
		again()
		want(t, "pending in the original", l.pendings("s", "g"), "1-0 c 3000 1; 2-0 c 3000 1; 4-0 c 3000 1; 5-0 d 0 1; 6-0 d 0 1")
		want(t, "pending in the copy", l.pendings("t", "g"), "4-0 c 3000 1; 5-0 d 0 1; 6-0 d 0 1")
		want(t, "read on", l.readGroup("t", "g", "c", 0), "t: 8-0[n 7]")
		l.add("t", sid(9, 0), "n", "new")
		again()
		want(t, "entries of the copy", l.all("t"), "1-0[n 0] 3-0[n 2] 4-0[n 3] 5-0[n 4] 6-0[n 5] 8-0[n 7] 9-0[n new]")
		want(t, "entries of the original", l.all("s"), "1-0[n 0] 3-0[n 2] 4-0[n 3] 6-0[n 5] 8-0[n 7]")
		want(t, "a copy that claims", showEntries(l.do(&StreamAutoClaim{Key: "t", Group: "g", Consumer: "d", Count: 10, MinIdle: 1000}).Stream.Entries), "4-0[n 3]")
		l.do(&KeyDelete{Keys: []string{"s"}})
		again()
		want(t, "the copy of what is gone", l.rng("t", sid(1, 0), sid(3, 0), 0, false), "1-0[n 0] 3-0[n 2]")
	})
}

// TestCopyWithinAnEntry: what stands before a COPY in the same entry of the log is copied, and what stands behind it goes
// into the copy.
func TestCopyWithinAnEntry(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		add := func(key string, n uint64) *StreamAdd {
			return &StreamAdd{Key: key, By: AddExplicit, ID: sid(n, 0), Fields: fieldsOf("n", fmt.Sprint(n))}
		}
		l.do(add("s", 1))
		again()
		l.apply(add("s", 2), &KeyCopy{From: "s", To: "t"}, add("t", 3), add("s", 4), &KeyCopy{From: "t", To: "u"}, add("u", 5), add("t", 6))
		again()
		want(t, "the original", l.all("s"), "1-0[n 1] 2-0[n 2] 4-0[n 4]")
		want(t, "the copy", l.all("t"), "1-0[n 1] 2-0[n 2] 3-0[n 3] 6-0[n 6]")
		want(t, "the copy's copy", l.all("u"), "1-0[n 1] 2-0[n 2] 3-0[n 3] 5-0[n 5]")
		l.apply(&KeyCopy{From: "t", To: "v"}, &KeyDelete{Keys: []string{"v"}}, &KeyCopy{From: "s", To: "v"})
		again()
		want(t, "copied, deleted, copied", l.all("v"), "1-0[n 1] 2-0[n 2] 4-0[n 4]")
	})
}

// TestCopyOfMessages: messages of the queue protocol are copied with what they have: headers, deployments, parts of large
// ones, leases, what is parked, and the rest of their retention.
func TestCopyOfMessages(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		body := largeBody(3*limits.PartBytes-5, 9)
		l.do(&GroupSet{Topic: "s", Group: "g", Create: true, Settings: &GroupSettings{MaxDeliveries: 1, Park: true, ParkedRetention: time.Hour}})
		l.do(&Publish{Topic: "s", Messages: []NewMessage{
			{ContentType: "text/plain", Body: []byte("parked"), Retention: time.Minute, Headers: []Header{{"a", "b"}}},
			{ContentType: "text/plain", Body: []byte("leased"), Retention: time.Hour, Key: "k"},
			{ContentType: "text/plain", Body: []byte("delayed"), Retention: time.Hour, Delay: 2 * time.Second},
		}})
		up := l.do(&UploadOpen{Topic: "s"}).Upload
		for n, p := range parts(body) {
			l.do(&UploadPart{Upload: up, Number: uint32(n), Data: p})
		}
		l.do(commitOf(up, body, NewMessage{ContentType: "image/png", Retention: 90 * time.Second}))
		l.do(&Receive{Topic: "s", Group: "g", Max: 1, Visibility: time.Second})
		l.pass(3 * time.Second)
		l.do(&Receive{Topic: "s", Group: "g", Max: 1, Visibility: 20 * time.Second}) // the first is parked by now
		again()
		want(t, "copied", l.copyKey("s", "t", false).Count, 1)
		l.do(&KeyDelete{Keys: []string{"s"}})
		again()
		l.do(&Receive{Topic: "t", Group: "other", Max: 2, Visibility: time.Minute})
		if d := checkLarge(t, l, "other", body); d.ContentType != "image/png" {
			t.Errorf("the large message came as %q", d.ContentType)
		}
		got := ""
		for range 4 {
			r := l.do(&Receive{Topic: "t", Group: "g", Max: 1, Visibility: time.Minute})
			if err := l.e.Load(r.Deliveries); err != nil {
				t.Fatal(err)
			}
			for _, d := range r.Deliveries {
				got += fmt.Sprintf("%s %d;", d.Body[:min(len(d.Body), 9)], d.Count)
			}
		}
		want(t, "given by the copy", got, " 1;delayed 1;")
		parked := func() string {
			a, err := l.e.Query(Query{Kind: QueryParked, Topic: "t", Group: "g", Max: 10, Now: l.now.Cluster})
			if err != nil {
				t.Fatal(err)
			}
			s := ""
			for _, m := range a.Parked {
				s += fmt.Sprintf("%s %d;", m.Delivery.Body[:min(9, len(m.Delivery.Body))], m.Delivery.Count)
			}
			return s
		}
		want(t, "parked in the copy", parked(), "parked 1;")
		l.checkpoint()
		l.pass(61 * time.Second) // the parked message's own retention is over
		again()
		want(t, "parked beyond the retention", parked(), "parked 1;leased 1; 1;delayed 1;")
		l.do(&KeyDelete{Keys: []string{"t"}})
		l.checkpoint()
		want(t, "parts that are left of both", rowCount(t, l.e, rowPart), 0)
	})
}

// TestCopyLimits: what is too large is refused, and nothing has changed; what one entry of the log copies is bounded too.
func TestCopyLimits(t *testing.T) {
	l := openTest(t, Options{})
	defer func() { l.close() }()
	value := strings.Repeat("x", 1<<20-100)
	for n := range limits.CopyBytesMax>>20 - 1 {
		l.add("s", sid(uint64(n+1), 0), "v", value)
	}
	l.add("old", sid(1, 0), "a", "b")
	want(t, "what fits", l.copyKey("s", "old", true).Count, 1)
	l.add("s", sid(100, 0), "v", value)
	l.add("s", sid(101, 0), "v", value)
	r := l.copyKey("s", "old", true)
	want(t, "too large", r.Code, errs.CopyTooLarge)
	want(t, "the target has stayed", l.ask(Query{Kind: QueryStreamLen, Topic: "old"}).Count, limits.CopyBytesMax>>20-1)

	l.do(&StreamTrim{Key: "s", Trim: Trim{By: TrimMaxLen, MaxLen: 9}})
	both := l.apply(&KeyCopy{From: "s", To: "a"}, &KeyCopy{From: "s", To: "b"})
	want(t, "the first of an entry", both[0].Count, 1)
	want(t, "the second, which would be too much", both[1].Code, errs.Overloaded)
	want(t, "by itself", l.copyKey("s", "b", false).Count, 1)

	for range limits.CopyEntriesMax/1000 + 1 {
		add := &Publish{Topic: "many"}
		for range 1000 {
			add.Messages = append(add.Messages, NewMessage{Body: []byte("x"), Retention: time.Hour})
		}
		l.apply(add)
	}
	want(t, "too many", l.copyKey("many", "c", false).Code, errs.CopyTooLarge)
	l.do(&StreamTrim{Key: "many", Trim: Trim{By: TrimMaxLen, MaxLen: limits.CopyEntriesMax}})
	l.group(&StreamGroup{Op: GroupCreate, Key: "many", Group: "g"})
	l.readGroup("many", "g", "c", 0)
	want(t, "as many as may be, all pending", l.copyKey("many", "c", false).Code, errs.CopyTooLarge)
	l.do(&StreamTrim{Key: "many", Trim: Trim{By: TrimMaxLen, MaxLen: limits.CopyEntriesMax - 2}})
	want(t, "and two less", l.copyKey("many", "c", false).Count, 1)
	if got := l.ask(Query{Kind: QueryStreamGroups, Topic: "c", Stream: &StreamQuery{}}).Info.Groups[0].Pending; got != limits.CopyEntriesMax {
		t.Errorf("%d pending in the copy, two of them gone, want %d", got, limits.CopyEntriesMax)
	}
}
