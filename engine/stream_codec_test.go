package engine

import (
	"reflect"
	"testing"
	"time"

	"tercet.dev/tercet/internal/errs"
)

func fieldsOf(words ...string) [][]byte {
	out := [][]byte{}
	for _, w := range words {
		out = append(out, []byte(w))
	}
	return out
}

func sampleStreamCommands() map[string]Command {
	id := func(ms, seq uint64) StreamID { return StreamID{Ms: ms, Seq: seq} }
	return map[string]Command{
		"xadd": &StreamAdd{Key: "s", Fields: fieldsOf("name", "v", "name", "")},
		"xadd everything": &StreamAdd{Key: "s", By: AddExplicit, ID: id(1<<60, 2), NoCreate: true, Trim: Trim{By: TrimMaxLen, MaxLen: 10000, Approx: true, Limit: 100, Refs: Acked},
			Token: "p i", Delay: time.Minute, Retention: time.Hour, Fields: fieldsOf()},
		"xadd seq":     &StreamAdd{Key: "s", By: AddAutoSeq, ID: id(7, 0), Trim: Trim{By: TrimMinID, MinID: id(3, 4)}, Fields: fieldsOf("a", "\x00\xff")},
		"xdel":         &StreamDelete{Key: "s", IDs: []StreamID{id(1, 2), id(3, 4)}},
		"xdelex":       &StreamDelete{Key: "s", IDs: []StreamID{id(1, 2)}, Each: true, Refs: DelRef},
		"xtrim":        &StreamTrim{Key: "s", Trim: Trim{By: TrimMaxLen}},
		"xsetid":       &StreamSetID{Key: "s", ID: id(9, 9), EntriesAdded: -1, MaxDeleted: id(8, 8)},
		"xgroup":       &StreamGroup{Op: GroupCreate, Key: "s", Group: "g", ID: id(1, 0), Last: true, Create: true, EntriesRead: 5},
		"delconsumer":  &StreamGroup{Op: GroupDelConsumer, Key: "s", Group: "g", Consumer: "c", EntriesRead: -1},
		"xreadgroup":   &StreamReadGroup{Group: "g", Consumer: "c", Streams: []StreamPosition{{Key: "s", New: true}, {Key: "t", ID: id(5, 6)}}, Count: 10, Total: 20, Size: 1 << 20, NoAck: true, Claim: true, ClaimIdle: 60000},
		"xreadgroup >": &StreamReadGroup{Group: "g", Consumer: "c", Streams: []StreamPosition{{Key: "s", New: true}}, Park: true},
		"xack":         &StreamAck{Key: "s", Group: "g", IDs: []StreamID{id(1, 1)}},
		"xackdel":      &StreamAck{Key: "s", Group: "g", IDs: []StreamID{id(1, 1)}, Delete: true, Refs: Acked},
		"xclaim": &StreamClaim{Key: "s", Group: "g", Consumer: "c", MinIdle: 5000, IDs: []StreamID{id(1, 1), id(2, 2)}, Idle: -1, Time: 1_700_000_000_000, RetryCount: -1,
			Force: true, JustID: true, LastID: id(4, 4)},
		"xautoclaim": &StreamAutoClaim{Key: "s", Group: "g", Consumer: "c", MinIdle: 60000, Start: id(1, 0), Count: 100, JustID: true},
		"xnack":      &StreamNack{Key: "s", Group: "g", Mode: NackFatal, IDs: []StreamID{id(1, 1)}, RetryCount: 3, Force: true},
		"del":        &KeyDelete{Keys: []string{"a", "b"}},
		"rename":     &KeyRename{From: "a", To: "b", KeepTarget: true},
		"copy":       &KeyCopy{From: "a", To: "b", Replace: true},
		"expire":     &KeyExpire{Key: "a", By: Deadline{Set: true, Absolute: true, Ms: -5}, When: IfLess},
		"persist":    &KeyExpire{Key: "a"},
		"set":        &StringSet{Key: "k", Value: []byte("v"), By: Deadline{Set: true, Ms: 1000}, KeepTTL: true, When: IfPresent, Get: true},
		"getdel":     &StringGetDel{Key: "k"},
		"flush":      &Flush{},
		"exec": &Exec{Watches: []Watch{{"k", 9}}, Ops: []ExecOp{{Command: &StreamAdd{Key: "s", Fields: fieldsOf("a", "b")}},
			{Query: &Query{Kind: QueryStreamLen, Topic: "s"}}, {Command: &StreamAck{Key: "s", Group: "g", IDs: []StreamID{id(1, 1)}}}}},
	}
}

func sampleStreamResults() map[string]Result {
	e := StreamEntry{ID: StreamID{1, 2}, Fields: fieldsOf("a", "b"), Claimed: true, Idle: 5, Count: 6, topic: 7, offset: 8, loaded: true}
	return map[string]Result{
		"count": {Count: -1},
		"stream": {Count: 3, Stream: &StreamResult{Reads: []StreamRead{{Key: "s", From: StreamID{3, 4}, Cut: true, Entries: []StreamEntry{e, {ID: StreamID{9, 9}, Deleted: true}}}},
			Entries: []StreamEntry{e}, Deleted: []StreamID{{5, 6}}, Next: StreamID{7, 8}, Statuses: []int8{-1, 2}, Value: []byte{}}},
		"exec": {Stream: &StreamResult{Exec: []ExecResult{{Result: Result{Code: errs.WrongType}}, {read: true, Answer: &Answer{Stream: &StreamAnswer{Count: 4}}},
			{Result: Result{Stream: &StreamResult{Value: []byte("v")}}}}}},
	}
}

func sampleStreamQuery() *StreamQuery {
	return &StreamQuery{Consumer: "c", Start: StreamID{1, 2}, End: StreamIDMax, Reverse: true, Count: 3, Total: 9, Size: 10, MinIdle: 4, Full: true,
		Streams: []StreamPosition{{Key: "s", Tail: true}, {Key: "t", ID: StreamID{5, 6}}}, Keys: []string{"a"}, Cursor: 7, Match: "a*", Type: "stream"}
}

func sampleStreamAnswer() *StreamAnswer {
	p := []PendingEntry{{ID: StreamID{1, 2}, Consumer: "c", Idle: 3, DeliveredAt: 4, Count: 5}}
	cs := []ConsumerInfo{{Name: "c", Pending: 1, SeenAt: 2, ActiveAt: -1, Idle: 3, Inactive: -1, Entries: p}}
	return &StreamAnswer{
		Reads: []StreamRead{{Key: "s", From: StreamID{1, 1}}}, Count: 2,
		Info: &StreamInfo{Length: 1, Last: StreamID{2, 3}, MaxDeleted: StreamID{4, 5}, EntriesAdded: 6, FirstID: StreamID{7, 8}, GroupCount: 9, First: &StreamEntry{ID: StreamID{1, 1}}, Final: &StreamEntry{ID: StreamID{2, 2}},
			Entries: []StreamEntry{{ID: StreamID{3, 3}}}, RadixKeys: 1, RadixNodes: 2,
			Groups: []StreamGroupInfo{{Name: "g", LastDelivered: StreamID{1, 2}, EntriesRead: -1, Lag: 3, Pending: 4, ConsumerCount: 1, Entries: p, Consumers: cs}}},
		Pending: &PendingInfo{Total: 1, Min: StreamID{1, 2}, Max: StreamID{3, 4}, Consumers: cs, Entries: p},
		Keys:    []KeyInfo{{Name: "k", Type: KeyString, TTL: -1, ExpiresAt: 5, Version: 6}}, Next: 7, Value: []byte("v"),
		Parked: []ParkedEntry{{Entry: StreamEntry{ID: StreamID{1, 1}, Claimed: true, Idle: 2, Count: 3}, Error: "x"}},
	}
}

// TestStreamCodec: what is written is read back, and no shorter form of it is taken for something else.
func TestStreamCodec(t *testing.T) {
	for name, r := range sampleStreamResults() {
		b := AppendResult(nil, &r)
		got, err := DecodeResult(b)
		if err != nil || !reflect.DeepEqual(got, r) {
			t.Errorf("result %s is %+v (%v), was %+v", name, got, err, r)
		}
		for n := range b {
			if _, err := DecodeResult(b[:n]); err == nil {
				t.Errorf("result %s: %d bytes of %d are taken for a result", name, n, len(b))
			}
		}
	}
	q := Query{Kind: QueryPendingRange, Topic: "t", Group: "g", Stream: sampleStreamQuery()}
	if got, err := DecodeQuery(AppendQuery(nil, &q)); err != nil || !reflect.DeepEqual(got, q) {
		t.Errorf("query is %+v (%v), was %+v", got, err, q)
	}
	a := Answer{Stream: sampleStreamAnswer()}
	b := AppendAnswer(nil, &a)
	if got, err := DecodeAnswer(b); err != nil || !reflect.DeepEqual(got, a) {
		t.Errorf("answer is %+v (%v), was %+v", got.Stream, err, a.Stream)
	}
	for n := range b {
		if _, err := DecodeAnswer(b[:n]); err == nil {
			t.Errorf("%d bytes of %d are taken for an answer", n, len(b))
		}
	}
	for _, c := range []Command{
		&Exec{Ops: []ExecOp{{Command: &Exec{}}}},
		&Exec{Ops: []ExecOp{{Command: &Tick{}}}},
		&GroupSet{Settings: &GroupSettings{}, Only: 1 << settingMasks},
		&Exec{Ops: []ExecOp{{Command: &StreamReadGroup{Streams: []StreamPosition{{New: true}}, Park: true}}}},
		&StreamReadGroup{Streams: []StreamPosition{{New: true}, {}}, Park: true},
		&StreamReadGroup{Streams: []StreamPosition{{New: true}}, Claim: true, Park: true},
		&StreamReadGroup{Streams: []StreamPosition{{}}, Park: true},
		&StreamReadGroup{},
		&StreamAdd{By: 3, Fields: fieldsOf()},
		&StreamAdd{Fields: fieldsOf("odd")},
		&StreamTrim{Trim: Trim{By: 3}},
		&StreamDelete{Refs: 3},
		&StreamGroup{Op: 6},
		&StreamNack{Mode: 3},
		&KeyExpire{When: 6},
		&StringSet{When: IfGreater},
	} {
		if _, err := Inspect(c.AppendTo(nil)); err == nil {
			t.Errorf("%+v is taken for a command", c)
		}
	}
}

// TestWithParkStream: the flag is set and cleared in place, and only where a read can wait.
func TestWithParkStream(t *testing.T) {
	c := &StreamReadGroup{Group: "g", Consumer: "c", Streams: []StreamPosition{{Key: "s", New: true}}, NoAck: true, Count: 3}
	b, err := WithPark(c.AppendTo(nil), true)
	if err != nil {
		t.Fatal(err)
	}
	info, err := Inspect(b)
	if err != nil || !info.Park || info.Max != 3 || string(info.Topic) != "s" || string(info.Group) != "g" {
		t.Fatalf("%+v, %v", info, err)
	}
	if p := ParkProbe(b); p == nil || p.Topic != "s" || p.Group != "g" || !p.Park {
		t.Errorf("probe %+v", p)
	}
	if b, err = WithPark(b, false); err != nil || !reflect.DeepEqual(b, c.AppendTo(nil)) {
		t.Errorf("cleared: %x, %v", b, err)
	}
	c.Streams = append(c.Streams, StreamPosition{Key: "t", New: true}, StreamPosition{Key: "s", New: true})
	if b, err = WithPark(c.AppendTo(nil), true); err != nil {
		t.Fatal(err)
	}
	if refs := ParkProbe(b).Refs(); !reflect.DeepEqual(refs, []GroupRef{{Topic: "s", Group: "g"}, {Topic: "t", Group: "g"}}) {
		t.Errorf("waits for %v", refs)
	}
	c.Streams[2].New = false
	if _, err := WithPark(c.AppendTo(nil), true); err == nil || ParkProbe(c.AppendTo(nil)) != nil {
		t.Error("a read of a consumer's own entries parks")
	}
}
