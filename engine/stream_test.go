package engine

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

func sid(ms, seq uint64) StreamID { return StreamID{Ms: ms, Seq: seq} }

// do applies one command as an entry of its own.
func (l *testLog) do(c Command) Result {
	l.t.Helper()
	r := l.apply(c)[0]
	if err := l.e.LoadResult(&r); err != nil {
		l.t.Fatal(err)
	}
	return r
}

// add is XADD key ms-seq fields….
func (l *testLog) add(key string, id StreamID, fields ...string) {
	l.t.Helper()
	if r := l.do(&StreamAdd{Key: key, By: AddExplicit, ID: id, Fields: fieldsOf(fields...)}); r.Code != errs.OK || r.Published.Stream != id {
		l.t.Fatalf("XADD %s %v: %v, %v", key, id, r.Code, r.Published.Stream)
	}
}

func (l *testLog) ask(q Query) *StreamAnswer {
	l.t.Helper()
	q.Now = l.now.Cluster
	a, err := l.e.Query(q)
	if err != nil {
		l.t.Fatal(err)
	}
	return a.Stream
}

func showEntries(list []StreamEntry) string {
	var b strings.Builder
	for i, s := range list {
		if i > 0 {
			b.WriteByte(' ')
		}
		fmt.Fprintf(&b, "%d-%d", s.ID.Ms, s.ID.Seq)
		if s.Deleted {
			b.WriteString("!")
		}
		if s.Fields != nil {
			fmt.Fprintf(&b, "%s", s.Fields)
		}
		if s.Claimed {
			fmt.Fprintf(&b, "(%d,%d)", s.Idle, s.Count)
		}
	}
	return b.String()
}

func showReads(list []StreamRead) string {
	var parts []string
	for _, r := range list {
		parts = append(parts, r.Key+": "+showEntries(r.Entries))
	}
	return strings.Join(parts, "; ")
}

func (l *testLog) rng(key string, start, end StreamID, count uint64, reverse bool) string {
	l.t.Helper()
	return showEntries(l.ask(Query{Kind: QueryStreamRange, Topic: key, Stream: &StreamQuery{Start: start, End: end, Count: count, Reverse: reverse}}).Reads[0].Entries)
}

func (l *testLog) all(key string) string { return l.rng(key, StreamIDMin, StreamIDMax, 0, false) }

func (l *testLog) readGroup(key, group, consumer string, count uint64, from ...StreamID) string {
	l.t.Helper()
	p := StreamPosition{Key: key, New: len(from) == 0}
	if len(from) > 0 {
		p.ID = from[0]
	}
	r := l.do(&StreamReadGroup{Group: group, Consumer: consumer, Streams: []StreamPosition{p}, Count: count})
	if r.Code != errs.OK {
		return r.Code.String()
	}
	if r.Stream == nil {
		return "nil"
	}
	return showReads(r.Stream.Reads)
}

func (l *testLog) pendings(key, group string) string {
	l.t.Helper()
	var parts []string
	p := l.ask(Query{Kind: QueryPendingRange, Topic: key, Group: group, Stream: &StreamQuery{End: StreamIDMax, Count: 1000}}).Pending
	for _, e := range p.Entries {
		parts = append(parts, fmt.Sprintf("%d-%d %s %d %d", e.ID.Ms, e.ID.Seq, e.Consumer, e.Idle, e.Count))
	}
	return strings.Join(parts, "; ")
}

func (l *testLog) group(c *StreamGroup) Result {
	l.t.Helper()
	if c.EntriesRead == 0 {
		c.EntriesRead = -1
	}
	return l.do(c)
}

func want[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s:\n got %v\nwant %v", what, got, want)
	}
}

// restarts runs a test as it is, and with the memory lost behind every entry: from a checkpoint, and with a replay.
func restarts(t *testing.T, f func(t *testing.T, l *testLog, again func())) {
	for _, mode := range []string{"kept", "checkpoint", "replay"} {
		t.Run(mode, func(t *testing.T) {
			l := openTest(t, Options{RecentBytes: map[bool]int64{true: -1}[mode == "checkpoint"]})
			defer func() { l.close() }()
			again := func() {}
			if mode != "kept" {
				again = func() {
					before := l.fullHash()
					if mode == "checkpoint" {
						l.checkpoint()
					}
					l.close()
					l.open()
					if h := l.fullHash(); h != before {
						t.Fatalf("state %x after a restart, was %x", h, before)
					}
				}
			}
			f(t, l, again)
		})
	}
}

func TestStreamAddRange(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		l.add("s", sid(5, 1), "a", "1")
		l.add("s", sid(5, 7), "b", "2", "b", "3")
		again()
		l.add("s", sid(9, 0), "c", "")
		for _, c := range []struct {
			by   AddID
			id   StreamID
			code errs.Code
		}{{AddExplicit, sid(9, 0), errs.StreamIDTooLow}, {AddExplicit, sid(0, 0), errs.StreamIDZero}, {AddAutoSeq, sid(8, 0), errs.StreamIDTooLow}, {AddExplicit, sid(3, 3), errs.StreamIDTooLow}} {
			want(t, fmt.Sprint(c), l.do(&StreamAdd{Key: "s", By: c.by, ID: c.id, Fields: fieldsOf("x", "y")}).Code, c.code)
		}
		want(t, "ms-*", l.do(&StreamAdd{Key: "s", By: AddAutoSeq, ID: sid(9, 0), Fields: fieldsOf("d", "4")}).Published.Stream, sid(9, 1))
		again()
		want(t, "*", l.do(&StreamAdd{Key: "s", Fields: fieldsOf("e", "5")}).Published.Stream, StreamID{Ms: uint64(l.now.Wall)})
		want(t, "NOMKSTREAM", l.do(&StreamAdd{Key: "none", NoCreate: true, Fields: fieldsOf("e", "5")}).Code, errs.TopicNotFound)
		again()
		want(t, "all", l.all("s"), fmt.Sprintf("5-1[a 1] 5-7[b 2 b 3] 9-0[c ] 9-1[d 4] %d-0[e 5]", l.now.Wall))
		want(t, "range", l.rng("s", sid(5, 2), sid(9, 0), 0, false), "5-7[b 2 b 3] 9-0[c ]")
		want(t, "count", l.rng("s", sid(5, 0), StreamIDMax, 2, false), "5-1[a 1] 5-7[b 2 b 3]")
		want(t, "reverse", l.rng("s", StreamIDMin, sid(9, 0), 2, true), "9-0[c ] 5-7[b 2 b 3]")
		want(t, "reverse all", l.rng("s", sid(5, 7), StreamIDMax, 0, true), fmt.Sprintf("%d-0[e 5] 9-1[d 4] 9-0[c ] 5-7[b 2 b 3]", l.now.Wall))
		want(t, "XLEN", l.ask(Query{Kind: QueryStreamLen, Topic: "s"}).Count, 5)
		want(t, "XLEN of nothing", l.ask(Query{Kind: QueryStreamLen, Topic: "none"}).Count, 0)
		r := l.ask(Query{Kind: QueryStreamRead, Stream: &StreamQuery{Streams: []StreamPosition{{Key: "s", ID: sid(9, 0)}, {Key: "s", New: true}, {Key: "s", Tail: true}, {Key: "none", New: true}}}})
		want(t, "XREAD", showReads(r.Reads), fmt.Sprintf("s: 9-1[d 4] %d-0[e 5]; s: ; s: %d-0[e 5]; none: ", l.now.Wall, l.now.Wall))
		want(t, "$", r.Reads[1].From, StreamID{Ms: uint64(l.now.Wall)})
		l.add("s", StreamIDMax, "z", "z")
		want(t, "exhausted", l.do(&StreamAdd{Key: "s", Fields: fieldsOf("x", "y")}).Code, errs.StreamExhausted)
		want(t, "exhausted publish", l.do(&Publish{Topic: "s", Messages: messages(0, "x")}).Code, errs.StreamExhausted)
	})
}

// TestStreamOneBlock: a pipeline of XADDs is one block, whatever its IDs are.
func TestStreamOneBlock(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		l.apply(&StreamAdd{Key: "s", By: AddExplicit, ID: sid(1, 1), Fields: fieldsOf("a", "1")}, &StreamAdd{Key: "s", By: AddExplicit, ID: sid(1, 2), Fields: fieldsOf("a", "2")},
			&StreamAdd{Key: "other", Fields: fieldsOf("a", "x")}, &StreamAdd{Key: "s", By: AddExplicit, ID: sid(7, 0), Fields: fieldsOf("a", "3")},
			&Publish{Topic: "s", Messages: messages(0, "b")})
		again()
		rows := 0
		if err := l.e.scan(rowBlock, func(_, _ []byte) error { rows++; return nil }); err != nil {
			t.Fatal(err)
		}
		want(t, "blocks", rows, 2)
		want(t, "all", l.all("s"), fmt.Sprintf("1-1[a 1] 1-2[a 2] 7-0[a 3] %d-0[body b content-type text/plain]", l.now.Wall))
		want(t, "one", l.rng("s", sid(7, 0), sid(7, 0), 0, false), "7-0[a 3]")
	})
}

func TestStreamDeleteTrim(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		for i := range uint64(10) {
			l.add("s", sid(i+1, 0), "n", fmt.Sprint(i+1))
		}
		want(t, "XDEL", l.do(&StreamDelete{Key: "s", IDs: []StreamID{sid(3, 0), sid(3, 0), sid(99, 0), sid(1, 0)}}).Count, 2)
		again()
		want(t, "XLEN", l.ask(Query{Kind: QueryStreamLen, Topic: "s"}).Count, 8)
		want(t, "left", l.rng("s", StreamIDMin, sid(4, 0), 0, false), "2-0[n 2] 4-0[n 4]")
		want(t, "left in reverse", l.rng("s", StreamIDMin, sid(4, 0), 0, true), "4-0[n 4] 2-0[n 2]")
		want(t, "XTRIM", l.do(&StreamTrim{Key: "s", Trim: Trim{By: TrimMaxLen, MaxLen: 6}}).Count, 2)
		again()
		want(t, "left", l.rng("s", StreamIDMin, sid(6, 0), 0, false), "5-0[n 5] 6-0[n 6]")
		want(t, "XTRIM ~", l.do(&StreamTrim{Key: "s", Trim: Trim{By: TrimMaxLen, MaxLen: 1, Approx: true}}).Count, 0)
		want(t, "XTRIM MINID", l.do(&StreamTrim{Key: "s", Trim: Trim{By: TrimMinID, MinID: sid(8, 1)}}).Count, 4)
		again()
		want(t, "left", l.all("s"), "9-0[n 9] 10-0[n 10]")
		i := l.ask(Query{Kind: QueryStreamInfo, Topic: "s"}).Info
		want(t, "info", fmt.Sprint(i.Length, i.Last, i.MaxDeleted, i.EntriesAdded, i.FirstID), "2 {10 0} {3 0} 10 {9 0}")
		want(t, "ends", showEntries([]StreamEntry{*i.First, *i.Final}), "9-0[n 9] 10-0[n 10]")
		l.do(&StreamAdd{Key: "s", By: AddExplicit, ID: sid(11, 0), Trim: Trim{By: TrimMaxLen}, Fields: fieldsOf("a", "b")})
		want(t, "left", l.all("s"), "")
		again()
		want(t, "exists", l.ask(Query{Kind: QueryKeys, Stream: &StreamQuery{Keys: []string{"s"}}}).Keys[0].Type, KeyStream)
		// The ID may go back behind what was trimmed, and the same IDs come again.
		want(t, "XSETID", l.do(&StreamSetID{Key: "s", ID: sid(2, 0), EntriesAdded: -1}).Code, errs.StreamIDDeleted)
		want(t, "XSETID", l.do(&StreamSetID{Key: "s", ID: sid(5, 0), EntriesAdded: 50, MaxDeleted: sid(5, 0)}).Code, errs.OK)
		l.add("s", sid(6, 0), "n", "six")
		again()
		l.add("s", sid(9, 0), "n", "nine")
		again()
		want(t, "again", l.all("s"), "6-0[n six] 9-0[n nine]")
		want(t, "again from the middle", l.rng("s", sid(7, 0), StreamIDMax, 0, false), "9-0[n nine]")
		want(t, "XDEL", l.do(&StreamDelete{Key: "s", IDs: []StreamID{sid(9, 0)}}).Count, 1)
		want(t, "XDEL again", l.do(&StreamDelete{Key: "s", IDs: []StreamID{sid(9, 0)}}).Count, 0)
		again()
		want(t, "left", l.all("s"), "6-0[n six]")
		want(t, "added", l.ask(Query{Kind: QueryStreamInfo, Topic: "s"}).Info.EntriesAdded, 52)
	})
}

func TestStreamGroups(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		for i := range uint64(5) {
			l.add("s", sid(i+1, 0), "n", fmt.Sprint(i+1))
		}
		want(t, "no key", l.group(&StreamGroup{Op: GroupCreate, Key: "none", Group: "g"}).Code, errs.TopicNotFound)
		want(t, "create", l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"}).Code, errs.OK)
		want(t, "busy", l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g", ID: sid(9, 9)}).Code, errs.GroupExists)
		want(t, "create $", l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "end", Last: true}).Code, errs.OK)
		again()
		want(t, "no group", l.readGroup("s", "none", "c", 0), "group_not_found")
		want(t, ">", l.readGroup("s", "g", "alice", 2), "s: 1-0[n 1] 2-0[n 2]")
		l.pass(time.Second)
		again()
		want(t, ">", l.readGroup("s", "g", "bob", 2), "s: 3-0[n 3] 4-0[n 4]")
		want(t, "at the end", l.readGroup("s", "end", "c", 0), "nil")
		want(t, "pending", l.pendings("s", "g"), "1-0 alice 1000 1; 2-0 alice 1000 1; 3-0 bob 0 1; 4-0 bob 0 1")
		again()
		want(t, "history", l.readGroup("s", "g", "alice", 0, sid(1, 0)), "s: 2-0[n 2]")
		want(t, "empty history", l.readGroup("s", "g", "carol", 0, sid(0, 0)), "s: ")
		want(t, "XACK", l.do(&StreamAck{Key: "s", Group: "g", IDs: []StreamID{sid(1, 0), sid(1, 0), sid(5, 0)}}).Count, 1)
		l.do(&StreamDelete{Key: "s", IDs: []StreamID{sid(4, 0)}})
		again()
		want(t, "deleted in history", l.readGroup("s", "g", "bob", 0, sid(0, 0)), "s: 3-0[n 3] 4-0!")
		want(t, "pending", l.pendings("s", "g"), "2-0 alice 0 2; 3-0 bob 0 2; 4-0 bob 0 1")
		l.pass(5 * time.Second)
		r := l.do(&StreamClaim{Key: "s", Group: "g", Consumer: "carol", MinIdle: 3000, IDs: []StreamID{sid(2, 0), sid(4, 0), sid(5, 0)}, Idle: -1, Time: -1, RetryCount: -1})
		want(t, "XCLAIM", showEntries(r.Stream.Entries), "2-0[n 2]")
		want(t, "pending", l.pendings("s", "g"), "2-0 carol 0 3; 3-0 bob 5000 2")
		again()
		r = l.do(&StreamClaim{Key: "s", Group: "g", Consumer: "carol", IDs: []StreamID{sid(5, 0)}, Idle: 7000, Time: -1, RetryCount: -1, Force: true, JustID: true})
		want(t, "XCLAIM FORCE JUSTID", showEntries(r.Stream.Entries), "5-0")
		want(t, "pending", l.pendings("s", "g"), "2-0 carol 0 3; 3-0 bob 5000 2; 5-0 carol 7000 1")
		again()
		want(t, "> moves what is pending", l.readGroup("s", "g", "bob", 0), "s: 5-0[n 5]")
		l.do(&StreamDelete{Key: "s", IDs: []StreamID{sid(2, 0)}})
		l.pass(time.Second)
		r = l.do(&StreamAutoClaim{Key: "s", Group: "g", Consumer: "dave", MinIdle: 1, Count: 2})
		want(t, "XAUTOCLAIM", fmt.Sprintf("%s %v %v", showEntries(r.Stream.Entries), r.Stream.Deleted, r.Stream.Next), "3-0[n 3] [{2 0}] {5 0}")
		again()
		p := l.ask(Query{Kind: QueryPending, Topic: "s", Group: "g"}).Pending
		want(t, "summary", fmt.Sprintf("%d %v %v %d %s %s", p.Total, p.Min, p.Max, len(p.Consumers), p.Consumers[0].Name, p.Consumers[1].Name), "2 {3 0} {5 0} 2 bob dave")
		want(t, "DELCONSUMER", l.group(&StreamGroup{Op: GroupDelConsumer, Key: "s", Group: "g", Consumer: "dave"}).Count, 1)
		again()
		want(t, "pending", l.pendings("s", "g"), "5-0 bob 1000 1")
		want(t, "CREATECONSUMER", l.group(&StreamGroup{Op: GroupAddConsumer, Key: "s", Group: "g", Consumer: "dave"}).Count, 1)
		want(t, "reserved", l.readGroup("s", "g", HTTPConsumer, 1), "reserved_consumer")
		again()
		want(t, "SETID", l.group(&StreamGroup{Op: GroupSetID, Key: "s", Group: "g", ID: sid(1, 0)}).Code, errs.OK)
		want(t, "acked and given again", l.do(&StreamAck{Key: "s", Group: "g", IDs: []StreamID{sid(5, 0)}}).Count, 1)
		again()
		want(t, "once more", l.readGroup("s", "g", "erin", 0), "s: 3-0[n 3] 5-0[n 5]")
		want(t, "SETID ahead", l.group(&StreamGroup{Op: GroupSetID, Key: "s", Group: "g", ID: sid(7, 0)}).Code, errs.OK)
		l.add("s", sid(6, 0), "n", "6")
		l.add("s", sid(7, 0), "n", "7")
		again()
		l.add("s", sid(8, 0), "n", "8")
		want(t, "behind the position", l.readGroup("s", "g", "erin", 0), "s: 8-0[n 8]")
		want(t, "DESTROY", l.group(&StreamGroup{Op: GroupDestroy, Key: "s", Group: "g"}).Count, 1)
		again()
		want(t, "DESTROY", l.group(&StreamGroup{Op: GroupDestroy, Key: "s", Group: "g"}).Count, 0)
		want(t, "gone", l.readGroup("s", "g", "erin", 0), "group_not_found")
	})
}

func TestKeyspace(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		types := func(names ...string) string {
			var out []string
			for _, k := range l.ask(Query{Kind: QueryKeys, Stream: &StreamQuery{Keys: names}}).Keys {
				out = append(out, fmt.Sprintf("%s %v %d", k.Name, k.Type, k.TTL))
			}
			return strings.Join(out, "; ")
		}
		l.add("s", sid(1, 0), "a", "1")
		l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"})
		l.readGroup("s", "g", "c", 0)
		want(t, "SET NX", l.do(&StringSet{Key: "k", Value: []byte("v"), When: IfAbsent, By: Deadline{Set: true, Ms: 5000}}).Count, 1)
		want(t, "SET NX again", l.do(&StringSet{Key: "k", Value: []byte("w"), When: IfAbsent}).Count, 0)
		again()
		want(t, "types", types("s", "k", "none"), "s stream -1; k string 5000; none none -1")
		want(t, "GET", string(l.ask(Query{Kind: QueryString, Topic: "k"}).Value), "v")
		want(t, "wrong type", l.do(&StreamAdd{Key: "k", Fields: fieldsOf("a", "b")}).Code, errs.WrongType)
		want(t, "wrong type", l.do(&Publish{Topic: "k", Messages: messages(0, "x")}).Code, errs.WrongType)
		want(t, "wrong type", l.do(&StringGetDel{Key: "s"}).Code, errs.WrongType)
		want(t, "RENAME", l.do(&KeyRename{From: "s", To: "t"}).Count, 1)
		again()
		want(t, "renamed", l.all("t")+l.all("s"), "1-0[a 1]")
		want(t, "pending", l.pendings("t", "g"), "1-0 c 0 1")
		want(t, "RENAMENX", l.do(&KeyRename{From: "t", To: "k", KeepTarget: true}).Count, 0)
		want(t, "EXPIRE", l.do(&KeyExpire{Key: "t", By: Deadline{Set: true, Absolute: true, Ms: l.now.Wall + 3000}}).Count, 1)
		want(t, "EXPIRE GT", l.do(&KeyExpire{Key: "t", By: Deadline{Set: true, Ms: 2000}, When: IfGreater}).Count, 0)
		l.pass(2999 * time.Millisecond)
		again()
		want(t, "types", types("t", "k"), "t stream 1; k string 2001")
		l.pass(time.Millisecond)
		want(t, "expired for a reader", types("t", "k"), "t none -1; k string 2000")
		want(t, "DBSIZE", l.ask(Query{Kind: QueryDBSize}).Count, 1)
		l.do(&Tick{})
		again()
		want(t, "topics", len(l.e.topics), 0)
		want(t, "PERSIST", l.do(&KeyExpire{Key: "k"}).Count, 1)
		want(t, "PERSIST again", l.do(&KeyExpire{Key: "k"}).Count, 0)
		l.add("t", sid(1, 0), "a", "new")
		l.add("u", sid(1, 0), "a", "u")
		l.do(&StreamAdd{Key: "s[1]", Fields: fieldsOf("a", "b")})
		again()
		var names []string
		for next, first := uint64(0), true; first || next != 0; first = false {
			a := l.ask(Query{Kind: QueryScan, Stream: &StreamQuery{Cursor: next, Count: 1}})
			for _, k := range a.Keys {
				names = append(names, k.Name)
			}
			next = a.Next
		}
		want(t, "SCAN", strings.Join(names, " "), "k t u s[1]")
		want(t, "KEYS", len(l.ask(Query{Kind: QueryScan, Stream: &StreamQuery{Match: "[^k]"}}).Keys), 2)
		want(t, "SCAN TYPE", l.ask(Query{Kind: QueryScan, Stream: &StreamQuery{Type: "string"}}).Keys[0].Name, "k")
		want(t, "DEL", l.do(&KeyDelete{Keys: []string{"t", "t", "k", "none"}}).Count, 2)
		want(t, "deleted", l.all("t"), "")
		again()
		r := l.do(&StringSet{Key: "u", Value: []byte("x"), Get: true})
		want(t, "SET GET of a stream", r.Code, errs.WrongType)
		l.do(&StringSet{Key: "u", Value: []byte("x")})
		want(t, "GETDEL", string(l.do(&StringGetDel{Key: "u"}).Stream.Value), "x")
		l.do(&Flush{})
		again()
		want(t, "FLUSHALL", l.ask(Query{Kind: QueryDBSize}).Count, 0)
		l.checkpoint()
		for _, kind := range append([]byte{rowString, rowExpiry}, topicRows...) {
			if err := l.e.scan(kind, func(key, _ []byte) error { return fmt.Errorf("left behind: %c %x", kind, key) }); err != nil && (kind != rowFloor || !strings.Contains(err.Error(), "0000000000000000")) {
				t.Error(err)
			}
		}
	})
}

func TestExec(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		l.fx.Answer = true
		l.add("s", sid(1, 0), "a", "1")
		v := l.ask(Query{Kind: QueryKeys, Stream: &StreamQuery{Keys: []string{"s", "none"}}}).Keys
		x := &Exec{Watches: []Watch{{"s", v[0].Version}, {"none", v[1].Version}}, Ops: []ExecOp{
			{Command: &StreamAdd{Key: "s", By: AddExplicit, ID: sid(2, 0), Fields: fieldsOf("b", "2")}},
			{Query: &Query{Kind: QueryStreamLen, Topic: "s"}},
			{Command: &StreamAdd{Key: "s", By: AddExplicit, ID: sid(1, 0), Fields: fieldsOf("c", "3")}},
			{Query: &Query{Kind: QueryStreamRange, Topic: "s", Stream: &StreamQuery{End: StreamIDMax}}},
			{Command: &StreamGroup{Op: GroupCreate, Key: "s", Group: "g", EntriesRead: -1}},
			{Command: &StreamReadGroup{Group: "g", Consumer: "c", Streams: []StreamPosition{{Key: "s", New: true}}}},
			{Command: &KeyDelete{Keys: []string{"s"}}},
			{Query: &Query{Kind: QueryStreamInfo, Topic: "s"}},
		}}
		again()
		r := l.do(x)
		got := r.Stream.Exec
		want(t, "first", got[0].Result.Published.Stream, sid(2, 0))
		want(t, "XLEN inside", got[1].Answer.Stream.Count, 2)
		want(t, "refused alone", got[2].Result.Code, errs.StreamIDTooLow)
		want(t, "XRANGE inside", showEntries(got[3].Answer.Stream.Reads[0].Entries), "1-0[a 1] 2-0[b 2]")
		want(t, "read at its place", len(got[5].Result.Stream.Reads[0].Entries), 2)
		want(t, "deleted", got[7].Result.Code, errs.TopicNotFound)
		again()
		want(t, "the watched key changed", l.do(x).Code, errs.KeyChanged)
		want(t, "nothing was done", l.all("s"), "")
		got[5].Result.Stream.Reads[0].fresh = false // matters to who loads it, which comes before it is sent
		if b, err := DecodeResult(AppendResult(nil, &r)); err != nil || !reflect.DeepEqual(b, r) {
			t.Errorf("%+v, %v", b, err)
		}
	})
}

// TestStreamIncarnations is decision 19 for streams: a key that is deleted and made again within one checkpoint interval is
// another stream, a group may stand at an ID that is still to come, and what is trimmed below a pending list stays pending.
func TestStreamIncarnations(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		l.add("s", sid(1, 0), "n", "old")
		l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"})
		want(t, ">", l.readGroup("s", "g", "alice", 0), "s: 1-0[n old]")
		l.add("s", sid(2, 0), "n", "old")
		lease := l.do(&Receive{Topic: "s", Group: "g", Max: 1, Visibility: time.Minute}).Deliveries
		want(t, "receive", len(lease), 1)
		again()
		want(t, "DEL", l.do(&KeyDelete{Keys: []string{"s"}}).Count, 1)
		l.add("s", sid(1, 0), "n", "new") // the ID is free again, and the name leads elsewhere
		again()
		want(t, "the group went with it", l.readGroup("s", "g", "alice", 0), "group_not_found")
		l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"})
		again()
		if code := l.do(&Settle{Topic: "s", Group: "g", Op: Acknowledge, Receipts: []Receipt{lease[0].Receipt}}).Codes[0]; code == errs.OK {
			t.Error("a receipt of the stream that was deleted acknowledges something in the new one")
		}
		want(t, "nothing is pending", l.pendings("s", "g"), "")
		want(t, "only the new one", l.readGroup("s", "g", "alice", 0), "s: 1-0[n new]")
		want(t, "pending", l.pendings("s", "g"), "1-0 alice 0 1")

		want(t, "ahead", l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "later", ID: sid(5, 0)}).Code, errs.OK)
		l.add("s", sid(2, 0), "n", "2")
		again()
		l.add("s", sid(5, 0), "n", "5")
		want(t, "up to the position", l.readGroup("s", "later", "bob", 0), "nil")
		l.add("s", sid(5, 1), "n", "5-1")
		again()
		want(t, "behind it", l.readGroup("s", "later", "bob", 0), "s: 5-1[n 5-1]")

		want(t, "XTRIM", l.do(&StreamTrim{Key: "s", Trim: Trim{By: TrimMaxLen}}).Count, 4)
		again()
		want(t, "still pending", l.pendings("s", "g"), "1-0 alice 0 1")
		want(t, "history", l.readGroup("s", "g", "alice", 0, sid(0, 0)), "s: 1-0!")
		want(t, "XACK", l.do(&StreamAck{Key: "s", Group: "g", IDs: []StreamID{sid(1, 0)}}).Count, 1)
		again()
		want(t, "not any more", l.pendings("s", "g"), "")
	})
}

// TestLargeEntries: an entry of XADD may have 3 MiB; an answer holds as many as fit, told by their own sizes and not by the average of
// their blocks, also when those are read back.
func TestLargeEntries(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		value := strings.Repeat("v", limits.FieldsBytesMax-10)
		add := func(n uint64, value string) *StreamAdd {
			return &StreamAdd{Key: "s", By: AddExplicit, ID: sid(n, 0), Fields: fieldsOf("f", value)}
		}
		for n := range uint64(4) {
			cmds := []Command{add(n*100+1, value)}
			for k := range uint64(50) {
				cmds = append(cmds, add(n*100+k+2, "small"))
			}
			l.apply(cmds...)
		}
		want(t, "above the limit", l.do(add(1000, value+"0123456789")).Code, errs.MessageTooLarge)
		again()
		l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"})
		l.readGroup("s", "g", "c", 0) // as much as fits
		for range 4 {
			l.readGroup("s", "g", "c", 0)
		}
		again()
		large := []StreamID{sid(1, 0), sid(101, 0), sid(201, 0), sid(301, 0)}
		r := l.do(&StreamClaim{Key: "s", Group: "g", Consumer: "d", IDs: large, Idle: -1, Time: -1, RetryCount: -1})
		if n := len(r.Stream.Entries); n != 2 {
			t.Errorf("%d entries of 3 MiB were claimed at once, want those up to the bound of 4 MiB: 2", n)
		}
		for _, e := range r.Stream.Entries {
			if len(e.Fields) != 2 || string(e.Fields[1]) != value {
				t.Errorf("entry %v came back with %d fields", e.ID, len(e.Fields))
			}
		}
		a := l.ask(Query{Kind: QueryStreamRange, Topic: "s", Stream: &StreamQuery{End: StreamIDMax}}).Reads[0]
		if n := len(a.Entries); !a.Cut || n <= 50 || n >= 102 {
			t.Errorf("%d entries in one answer, cut %v: want the first 3 MiB and what is small", n, a.Cut)
		}
	})
}
