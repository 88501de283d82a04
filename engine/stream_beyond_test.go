package engine

import (
	"fmt"
	"testing"
	"time"

	"tercet.dev/tercet/internal/errs"
)

// TestStreamTokens: a repeated token answers the first entry's ID and adds nothing.
func TestStreamTokens(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		add := func(token, v string) Result {
			return l.do(&StreamAdd{Key: "s", Token: token, Trim: Trim{By: TrimMaxLen, MaxLen: 2}, Fields: fieldsOf("v", v)})
		}
		first := add("p 1", "a").Published.Stream
		again()
		l.pass(time.Second)
		r := add("p 1", "b")
		want(t, "the first one's ID", r.Published.Stream, first)
		want(t, "kind", r.Published.Kinds[0], KindDuplicate)
		want(t, "other token", add("p 2", "c").Published.Stream != first, true)
		again()
		want(t, "all", l.all("s"), fmt.Sprintf("%s[v a] %s[v c]", refID(first), refID(StreamID{Ms: uint64(l.now.Wall)})))
		l.do(&StreamDelete{Key: "s", IDs: []StreamID{first}})
		want(t, "with an ID of one's own", l.do(&StreamAdd{Key: "s", By: AddExplicit, ID: sid(1, 1), Token: "x", Fields: fieldsOf()}).Code, errs.BadRequest)
	})
}

// TestStreamDelay: a delayed entry gets its ID when it becomes visible.
func TestStreamDelay(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		r := l.do(&StreamAdd{Key: "s", Delay: 10 * time.Second, Fields: fieldsOf("v", "late")})
		want(t, "kind", r.Published.Kinds[0], KindDelayed)
		l.do(&StreamAdd{Key: "s", Fields: fieldsOf("v", "soon")})
		l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"})
		again()
		soon := refID(StreamID{Ms: uint64(l.now.Wall)})
		want(t, "before", l.readGroup("s", "g", "c", 0), "s: "+soon+"[v soon]")
		l.pass(10 * time.Second)
		again()
		late := refID(StreamID{Ms: uint64(l.now.Wall)})
		want(t, "after", l.readGroup("s", "g", "c", 0), "s: "+late+"[v late]")
		want(t, "all", l.all("s"), soon+"[v soon] "+late+"[v late]")
		want(t, "added", l.ask(Query{Kind: QueryStreamInfo, Topic: "s"}).Info.EntriesAdded, 2)
	})
}

// TestStreamVisibility: a group with a time-out for pending entries gives them again, behind new ones, and parks
// them after the last delivery.
func TestStreamVisibility(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		l.add("s", sid(1, 0), "v", "1")
		l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"})
		want(t, "settings", l.do(&GroupSet{Topic: "s", Group: "g", Settings: &GroupSettings{Visibility: 30 * time.Second, MaxDeliveries: 2, Park: true}}).Code, errs.OK)
		want(t, "first", l.readGroup("s", "g", "a", 0), "s: 1-0[v 1]")
		again()
		l.pass(29 * time.Second)
		want(t, "pending", l.readGroup("s", "g", "b", 0), "nil")
		l.add("s", sid(2, 0), "v", "2")
		l.pass(time.Second)
		again()
		want(t, "due, behind the new one", l.readGroup("s", "g", "b", 0), "s: 2-0[v 2] 1-0[v 1]")
		want(t, "pending", l.pendings("s", "g"), "1-0 b 0 2; 2-0 b 0 1")
		l.pass(30 * time.Second)
		want(t, "given up", l.pendings("s", "g"), "2-0 b 30000 1")
		again()
		want(t, "the other one", l.readGroup("s", "g", "a", 0), "s: 2-0[v 2]")
		p := l.ask(Query{Kind: QueryPending, Topic: "s", Group: "g"}).Pending
		want(t, "summary", fmt.Sprint(p.Total, len(p.Consumers)), "1 1")
	})
}

// TestStreamNewer: XDELEX, XACKDEL, XNACK and XREADGROUP CLAIM.
func TestStreamNewer(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		for i := range uint64(6) {
			l.add("s", sid(i+1, 0), "v", fmt.Sprint(i+1))
		}
		l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"})
		l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "h"})
		l.readGroup("s", "g", "a", 4)
		l.readGroup("s", "h", "a", 2)
		again()
		statuses := func(c Command) string { return fmt.Sprint(l.do(c).Stream.Statuses) }
		want(t, "XACKDEL ACKED", statuses(&StreamAck{Key: "s", Group: "g", IDs: []StreamID{sid(1, 0), sid(6, 0), sid(9, 0)}, Delete: true, Refs: Acked}), "[2 -1 -1]")
		want(t, "XACKDEL ACKED of the last group", statuses(&StreamAck{Key: "s", Group: "h", IDs: []StreamID{sid(1, 0)}, Delete: true, Refs: Acked}), "[1]")
		again()
		want(t, "XDELEX ACKED", statuses(&StreamDelete{Key: "s", IDs: []StreamID{sid(2, 0), sid(1, 0)}, Each: true, Refs: Acked}), "[2 -1]")
		want(t, "XDELEX DELREF", statuses(&StreamDelete{Key: "s", IDs: []StreamID{sid(2, 0)}, Each: true, Refs: DelRef}), "[1]")
		want(t, "XDELEX", statuses(&StreamDelete{Key: "s", IDs: []StreamID{sid(3, 0)}, Each: true}), "[1]")
		want(t, "left pending", l.pendings("s", "g"), "3-0 a 0 1; 4-0 a 0 1")
		again()
		l.pass(time.Minute)
		r := l.do(&StreamReadGroup{Group: "g", Consumer: "b", Count: 2, Streams: []StreamPosition{{Key: "s", New: true}}, Claim: true, ClaimIdle: 1000})
		want(t, "CLAIM", showReads(r.Stream.Reads), "s: 4-0[v 4](60000,1) 5-0[v 5]")
		want(t, "XNACK", l.do(&StreamNack{Key: "s", Group: "g", Mode: NackSilent, IDs: []StreamID{sid(5, 0), sid(6, 0)}, RetryCount: -1}).Count, 1)
		again()
		want(t, "given back", l.readGroup("s", "g", "c", 0), "s: 6-0[v 6] 5-0[v 5]")
		want(t, "XNACK FATAL", l.do(&StreamNack{Key: "s", Group: "g", Mode: NackFatal, IDs: []StreamID{sid(6, 0)}, RetryCount: -1}).Count, 1)
		want(t, "pending", l.pendings("s", "g"), "3-0 a 60000 1; 4-0 b 0 2; 5-0 c 0 1; 6-0 tercet:http 0 4294967295")
	})
}

// TestStreamGivenUp: what was delivered as often as a group allows is parked by the next claim as well, and by XNACK;
// it is found, redriven and dropped by its stream ID, and the counts start anew where a client sets them back.
func TestStreamGivenUp(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		for i := range uint64(4) {
			l.add("s", sid(i+1, 0), "v", fmt.Sprint(i+1))
		}
		l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"})
		l.do(&GroupSet{Topic: "s", Group: "g", Settings: &GroupSettings{Park: true, MaxDeliveries: 9}})
		l.do(&GroupSet{Topic: "s", Group: "g", Settings: &GroupSettings{MaxDeliveries: 2}, Only: OnlyMaxDeliveries})
		parked := func() string {
			t.Helper()
			a := l.ask(Query{Kind: QueryStreamParked, Topic: "s", Group: "g", Stream: &StreamQuery{Count: 10}})
			s := ""
			for _, p := range a.Parked {
				s += fmt.Sprintf("%s %d %d;", showEntries([]StreamEntry{{ID: p.Entry.ID, Fields: p.Entry.Fields}}), p.Entry.Count, p.Entry.Idle)
			}
			return s
		}
		claim := func() string {
			return showEntries(l.do(&StreamAutoClaim{Key: "s", Group: "g", Consumer: "b", Count: 10}).Stream.Entries)
		}
		l.readGroup("s", "g", "a", 0)
		want(t, "second delivery", claim(), "1-0[v 1] 2-0[v 2] 3-0[v 3] 4-0[v 4]")
		again()
		l.do(&StreamAck{Key: "s", Group: "g", IDs: []StreamID{sid(4, 0)}})
		want(t, "XNACK", l.do(&StreamNack{Key: "s", Group: "g", Mode: NackFail, IDs: []StreamID{sid(2, 0)}, RetryCount: -1}).Count, 1)
		want(t, "parked by XNACK", parked(), "2-0[v 2] 2 0;")
		want(t, "third", claim(), "")
		want(t, "pending", l.pendings("s", "g"), "")
		again()
		l.pass(time.Second)
		want(t, "parked", parked(), "1-0[v 1] 2 1000;2-0[v 2] 2 1000;3-0[v 3] 2 1000;")
		again()
		redrive := func(op ParkedOp, ids ...StreamID) int64 {
			return l.do(&Parked{Topic: "s", Group: "g", Op: op, Max: 10, Filter: ParkedFilter{Streams: ids}}).Count
		}
		want(t, "redriven", redrive(Redrive, sid(3, 0), sid(4, 0), sid(3, 0)), 1)
		want(t, "dropped", redrive(Drop, sid(1, 0)), 1)
		again()
		want(t, "left", parked(), "2-0[v 2] 2 1000;")
		want(t, "given again", l.readGroup("s", "g", "a", 0), "s: 3-0[v 3]")
		// A count that is set back does not make the deliveries before the redrive count backwards.
		l.do(&StreamClaim{Key: "s", Group: "g", Consumer: "a", IDs: []StreamID{sid(3, 0)}, Idle: -1, Time: -1, RetryCount: 0})
		again()
		want(t, "claimed twice more", claim()+claim()+claim(), "3-0[v 3]3-0[v 3]")
		want(t, "and parked", parked(), "2-0[v 2] 2 1000;3-0[v 3] 2 0;")
		want(t, "pause alone", l.do(&GroupSet{Topic: "s", Group: "g", Settings: &GroupSettings{Paused: true}, Only: OnlyPaused}).Code, errs.OK)
		l.add("s", sid(9, 0), "v", "9")
		want(t, "paused", l.readGroup("s", "g", "a", 0), "nil")
	})
}

// TestStreamRetention: a topic's retention holds for entries that XADD gave none.
func TestStreamRetention(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		l.add("s", sid(1, 0), "v", "1")
		l.do(&TopicSet{Topic: "s", Settings: &TopicSettings{RetentionDefault: time.Minute}, Only: OnlyRetentionDefault})
		l.add("s", sid(2, 0), "v", "2")
		l.do(&StreamAdd{Key: "s", By: AddExplicit, ID: sid(3, 0), Retention: time.Hour, Fields: fieldsOf("v", "3")})
		again()
		l.pass(time.Minute)
		again()
		want(t, "after a minute", l.all("s"), "1-0[v 1] 3-0[v 3]")
		want(t, "too long a default", l.do(&TopicSet{Topic: "s", Settings: &TopicSettings{RetentionMax: time.Second}, Only: OnlyRetentionMax}).Code, errs.BadRequest)
	})
}

// TestStreamTrimRefs: DELREF takes what is trimmed out of the pending lists, ACKED leaves what a group still needs.
func TestStreamTrimRefs(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		fill := func() {
			l.do(&KeyDelete{Keys: []string{"s"}})
			for i := range uint64(6) {
				l.add("s", sid(i+1, 0), "v", fmt.Sprint(i+1))
			}
			l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"})
			l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "h"})
			l.readGroup("s", "g", "a", 5)
			l.readGroup("s", "h", "a", 4)
			l.do(&StreamAck{Key: "s", Group: "h", IDs: []StreamID{sid(1, 0), sid(2, 0), sid(3, 0), sid(4, 0)}})
			l.do(&StreamAck{Key: "s", Group: "g", IDs: []StreamID{sid(2, 0), sid(4, 0), sid(5, 0)}})
			again()
		}
		trim := func(refs RefPolicy, keep uint64) int64 {
			return l.do(&StreamTrim{Key: "s", Trim: Trim{By: TrimMaxLen, MaxLen: keep, Refs: refs}}).Count
		}
		fill()
		want(t, "KEEPREF", trim(KeepRef, 2), 4)
		want(t, "pending", l.pendings("s", "g"), "1-0 a 0 1; 3-0 a 0 1")
		fill()
		want(t, "DELREF", trim(DelRef, 4), 2)
		want(t, "pending", l.pendings("s", "g"), "3-0 a 0 1")
		again()
		fill()
		// 1 and 3 are pending in g, 5 and 6 were not given to h.
		want(t, "ACKED", trim(Acked, 0), 2)
		want(t, "left", l.all("s"), "1-0[v 1] 3-0[v 3] 5-0[v 5] 6-0[v 6]")
		want(t, "the greatest deleted ID", l.ask(Query{Kind: QueryStreamInfo, Topic: "s"}).Info.MaxDeleted, StreamID{})
		again()
		r := l.do(&StreamAdd{Key: "s", By: AddExplicit, ID: sid(7, 0), Fields: fieldsOf("v", "7"), Trim: Trim{By: TrimMinID, MinID: sid(4, 0), Refs: DelRef}})
		want(t, "XADD", r.Code, errs.OK)
		want(t, "left", l.all("s"), "5-0[v 5] 6-0[v 6] 7-0[v 7]")
		want(t, "pending", l.pendings("s", "g"), "")
	})
}

// TestStreamReadBounds: MAXCOUNT and MAXSIZE bound a read over all its streams.
func TestStreamReadBounds(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	for _, k := range []string{"s", "t"} {
		for i := range uint64(3) {
			l.add(k, sid(i+1, 0), "v", "0123456789")
		}
		l.group(&StreamGroup{Op: GroupCreate, Key: k, Group: "g"})
	}
	ids := func(reads []StreamRead) string {
		s := ""
		for _, r := range reads {
			s += r.Key
			for _, e := range r.Entries {
				s += fmt.Sprint(e.ID.Ms)
			}
		}
		return s
	}
	read := func(total, size uint64) string {
		return ids(l.ask(Query{Kind: QueryStreamRead, Stream: &StreamQuery{Total: total, Size: size, Streams: []StreamPosition{{Key: "s"}, {Key: "t"}}}}).Reads)
	}
	group := func(total, size uint64) string {
		r := l.do(&StreamReadGroup{Group: "g", Consumer: "c", Total: total, Size: size, Streams: []StreamPosition{{Key: "s", New: true}, {Key: "t", New: true}}})
		return ids(r.Stream.Reads)
	}
	want(t, "all", read(0, 0), "s123t123")
	want(t, "four", read(4, 0), "s123t1")
	want(t, "three", read(3, 0), "s123t")
	want(t, "one whatever its size", read(0, 1), "s1t")
	want(t, "two by group", group(2, 0), "s12")
	want(t, "two more", group(2, 0), "s3t1")
	want(t, "one by size", group(0, 1), "t2")
	h := l.do(&StreamReadGroup{Group: "g", Consumer: "c", Total: 4, Streams: []StreamPosition{{Key: "s"}, {Key: "t"}}})
	want(t, "history", ids(h.Stream.Reads), "s123t1")
}

// TestStreamGoneBeforeLoad: entries whose rows a checkpoint removes between a read and its reply are left out of it, but
// for a consumer's own pending ones.
func TestStreamGoneBeforeLoad(t *testing.T) {
	l := openTest(t, Options{RecentBytes: -1})
	defer l.close()
	for i := range uint64(2) {
		l.add("s", sid(i+1, 0), "v", "x")
	}
	l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"})
	at := func(new bool) *StreamReadGroup {
		return &StreamReadGroup{Group: "g", Consumer: "c", Count: 2, Streams: []StreamPosition{{Key: "s", New: new}}}
	}
	fresh := l.apply(at(true))[0]
	claimed := l.apply(&StreamAutoClaim{Key: "s", Group: "g", Consumer: "c", Count: 10})[0]
	own := l.apply(at(false))[0]
	l.do(&StreamDelete{Key: "s", IDs: []StreamID{sid(1, 0)}})
	l.checkpoint()
	for _, r := range []*Result{&fresh, &claimed, &own} {
		if err := l.e.LoadResult(r); err != nil {
			t.Fatal(err)
		}
	}
	want(t, ">", showReads(fresh.Stream.Reads), "s: 2-0[v x]")
	want(t, "XAUTOCLAIM", showEntries(claimed.Stream.Entries), "2-0[v x]")
	want(t, "history", showReads(own.Stream.Reads), "s: 1-0! 2-0[v x]")
}

// TestStreamPark: a blocked XREADGROUP is parked as a receive is, woken by what it waits for, and told when its group
// or key goes.
func TestStreamPark(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g", Create: true})
	c := &StreamReadGroup{Group: "g", Consumer: "c", Park: true, Streams: []StreamPosition{{Key: "s", New: true}}}
	probe := ParkProbe(c.AppendTo(nil))
	if parked, err := l.e.Park(probe, l.now, nil); parked || err != nil {
		t.Fatalf("parked before its consumer was there: %v", err)
	}
	if r := l.do(c); !r.Parked || r.Stream != nil {
		t.Fatalf("%+v", r)
	}
	park := func() {
		t.Helper()
		n := 0
		if parked, err := l.e.Park(probe, l.now, func() { n++ }); !parked || err != nil || n != 1 {
			t.Fatalf("parked %v %d times: %v", parked, n, err)
		}
	}
	woken := func() string { return fmt.Sprint(len(l.fx.Deliverable)) }
	park()
	l.add("s", sid(1, 0), "v", "1")
	want(t, "woken", woken(), "1")
	want(t, "appended", fmt.Sprint(l.fx.Appended), "[s]")
	if parked, _ := l.e.Park(probe, l.now, nil); parked {
		t.Error("parked though there is something")
	}
	want(t, "given", len(l.do(c).Stream.Reads), 1)
	park()
	l.do(&Tick{})
	want(t, "not woken", woken(), "0")
	for _, gone := range []Command{&StreamGroup{Op: GroupDestroy, Key: "s", Group: "g"}, &KeyDelete{Keys: []string{"s"}}, &KeyRename{From: "s", To: "t"}} {
		l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g", Create: true})
		l.do(c)
		park()
		l.do(gone)
		want(t, fmt.Sprintf("woken by %T", gone), woken(), "1")
		want(t, "told", fmt.Sprint(l.do(c).Code == errs.GroupNotFound), "true")
	}
}
