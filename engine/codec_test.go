package engine

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"tercet.dev/tercet/internal/errs"
)

var updateGolden = flag.Bool("golden", false, "write testdata/golden.txt anew: only together with a new version byte or a new kind")

func sampleCommands() map[string]Command {
	out := sampleStreamCommands()
	maps.Copy(out, sampleQueueCommands())
	return out
}

func sampleQueueCommands() map[string]Command {
	return map[string]Command{
		"init":        &Init{ClusterID: "c-1", Secret: []byte{1, 2, 3}, Level: 1},
		"init again":  &Init{ClusterID: "c-2", Secret: nil, Level: 1, Refound: true},
		"open intake": &OpenIntake{Node: "n1.5f3a", Nonce: 1 << 40},
		"tick":        &Tick{},
		"publish": &Publish{Topic: "orders", Messages: []NewMessage{
			{ContentType: "text/plain", Retention: 86400 * time.Second, Body: []byte("hello")},
			{ContentType: "application/json", Headers: []Header{{"a", "b"}, {"traceparent", "00-1"}}, Retention: 60 * time.Second, Delay: 5 * time.Second, Key: "k", Deployment: "dpl_1", Body: []byte("{}")},
			{},
		}},
		"receive":    &Receive{Topic: "orders", Group: "billing", Max: 10, Visibility: 300 * time.Second, MaxConcurrency: 7, Deployment: "dpl_1", Latest: true, Park: true},
		"receive id": &ReceiveID{Topic: "orders", Group: "billing", ID: MessageID{Shard: 3, Index: 1000, Pos: 5, Kind: KindDelayed}, Visibility: time.Minute, MaxConcurrency: 1, Deployment: "d"},
		"acknowledge": &Settle{Topic: "orders", Group: "billing", Op: Acknowledge, Receipts: []Receipt{{Shard: 1, Topic: 2, Group: 3, Offset: 1 << 33, Epoch: 5},
			{Topic: 2, Group: 3, Offset: 4, Epoch: 6}}},
		"extend":  &Settle{Topic: "t", Group: "g", Op: Extend, Visibility: time.Hour, Deployment: "d", Receipts: []Receipt{{Epoch: 1}}},
		"shrink":  &Shrink{Node: "n2.aa", Epoch: 9},
		"expand":  &Expand{Node: "n2.aa", Epoch: 10},
		"advance": &Advance{By: 90 * time.Minute},
		"level":   &Level{Level: 1},

		"document":         &Document{Table: "tokens", Key: "k", Value: []byte("v"), IfRevision: 300},
		"document absent":  &Document{Table: "tokens", Key: "k", Value: []byte("v"), IfAbsent: true},
		"document delete":  &Document{Table: "tokens", Key: "k", Delete: true},
		"topic set":        &TopicSet{Topic: "orders", Create: true, Settings: &TopicSettings{Paused: true, RetentionDefault: time.Hour, RetentionMax: 48 * time.Hour, MessageBytesMax: 1000, DepthMax: 5, DropAcknowledged: true}},
		"topic set one":    &TopicSet{Topic: "orders", Settings: &TopicSettings{DepthMax: 5}, Only: OnlyDepthMax},
		"topic set bare":   &TopicSet{Topic: "orders"},
		"topic delete":     &TopicDelete{Topic: "orders"},
		"purge":            &Purge{Topic: "orders"},
		"group set":        &GroupSet{Topic: "orders", Group: "billing", Create: true, Start: Start{Kind: StartTime, Time: 1_700_000_000_000}},
		"group seek":       &GroupSet{Topic: "orders", Group: "billing", Seek: true, Start: Start{Kind: StartID, ID: StreamID{5, 6}}},
		"group settings":   &GroupSet{Topic: "orders", Group: "billing", Settings: &GroupSettings{Paused: true, MaxDeliveries: 3, Park: true, ParkedRetention: 24 * time.Hour, RetryAfter: time.Minute, InitialDelay: time.Second, StartDelay: 2 * time.Second, NotBefore: 77, MaxConcurrency: 4, Visibility: 5 * time.Second, Deployment: "d", ExcludeDeployments: []string{"e", "f"}}},
		"group delete":     &GroupDelete{Topic: "orders", Group: "billing"},
		"group set one":    &GroupSet{Topic: "orders", Group: "billing", Settings: &GroupSettings{Park: true}, Only: OnlyPark | OnlyVisibility},
		"parked redrive":   &Parked{Topic: "orders", Group: "billing", Op: Redrive, Filter: ParkedFilter{IDs: []MessageID{{Index: 1, Pos: 2, Kind: KindPlain}}, Streams: []StreamID{{5, 6}}, Error: "x", Since: 1, Until: 2}, Max: 100, From: 7, DryRun: true},
		"parked drop":      &Parked{Topic: "orders", Group: "billing", Op: Drop, Max: 1},
		"delayed cancel":   &Delayed{Topic: "orders", ID: MessageID{Index: 9, Pos: 1, Kind: KindDelayed}, Cancel: true},
		"delayed move":     &Delayed{Topic: "orders", ID: MessageID{Index: 9, Pos: 1, Kind: KindDelayed}, Delay: time.Hour},
		"upload open":      &UploadOpen{Topic: "orders", Key: "k", Deployment: "d"},
		"upload part":      &UploadPart{Upload: 7, Number: 3, Data: []byte("abc")},
		"upload commit":    &UploadCommit{Upload: 7, Message: NewMessage{ContentType: "video/mp4", Retention: time.Hour, Key: "k"}, Parts: 4, Bytes: 1 << 20, CRC: 0xdeadbeef},
		"upload abort":     &UploadAbort{Upload: 7},
		"release":          &Settle{Topic: "t", Group: "g", Op: Release, Visibility: time.Minute, Reason: "no luck", Receipts: []Receipt{{Epoch: 1}}},
		"publish defaults": &Publish{Topic: "t", Messages: []NewMessage{{RetentionDefault: true, Body: []byte("x")}}},
	}
}

func sampleResults() map[string]Result {
	return map[string]Result{
		"nothing":   {},
		"refused":   {Code: errs.ConcurrencyLimit, Inflight: 3, RetryAfter: 1500 * time.Millisecond, Parked: true},
		"intake":    {Intake: 7, Repeat: true},
		"published": {Published: Published{Shard: 1, Index: 2, Pos: 3, Count: 4, Offset: 5, Stream: StreamID{6, 7}}},
		"settled":   {Codes: []errs.Code{errs.OK, errs.NotHolder}, ExpiresAt: 1_700_000_000_000},
		"kinds": {Published: Published{Shard: 1, Index: 2, Pos: 3, Count: 3, Kinds: []MessageKind{KindPlain, KindDuplicate, KindDelayed},
			Originals: []MessageID{{Index: 1, Pos: 1, Kind: KindPlain}}}},
		"document":  {Revision: 300},
		"several":   {Count: 7, Next: 300, Upload: 5},
		"duplicate": {Code: errs.Duplicate, Original: MessageID{Shard: 1, Index: 2, Pos: 3, Kind: KindPlain}},
		"delivered": {Deliveries: []Delivery{{ID: MessageID{Index: 9, Pos: 1, Kind: KindPlain}, Receipt: Receipt{Topic: 1, Group: 2, Offset: 3, Epoch: 4}, Stream: StreamID{5, 6}, Count: 7,
			PublishedAt: 8, ExpiresAt: 9, LeaseUntil: -10, ContentType: "text/plain", Headers: []Header{{"a", "b"}}, Deployment: "d", Body: []byte("x")}, {Gone: true}, {Large: &Large{Topic: 1, Upload: 2, Parts: 3, Bytes: 4, CRC: 5}}}},
	}
}

// goldenVectors are the encodings that stand in logs and on disks.
func goldenVectors(t testing.TB) map[string][]byte {
	out := map[string][]byte{}
	for name, c := range sampleCommands() {
		out["command "+name] = c.AppendTo(nil)
	}
	for name, r := range sampleResults() {
		out["result "+name] = AppendResult(nil, &r)
	}
	var eb EntryBuilder
	eb.Reset(1, Stamp{Cluster: 5, Wall: 1_700_000_000_000}, 0)
	eb.Add(0, 0, 0, (&Tick{}).AppendTo(nil))
	eb.Add(7, 300, 299, (&Tick{}).AppendTo(nil))
	eb.Add(7, 301, 299, (&Tick{}).AppendTo(nil))
	out["entry"] = eb.Bytes()
	q := Query{Kind: QueryMessage, Topic: "t", Group: "g", Max: 3, From: 4, After: "a", ID: MessageID{Index: 1, Kind: KindDuplicate, OriginalIndex: 2, OriginalPos: 3, OriginalKind: KindDelayed}, Deployment: "d", Now: 9,
		Table: "tokens", Key: "k", Filter: MessageFilter{State: StateLeased, Since: 1, Until: 2, Header: "h", Value: "v"}, Parked: ParkedFilter{Error: "x"}, DrainRate: 5}
	out["query"] = AppendQuery(nil, &q)
	q.Stream = sampleStreamQuery()
	out["query stream"] = AppendQuery(nil, &q)
	a := Answer{Messages: sampleResults()["delivered"].Deliveries, Topics: []TopicInfo{{Name: "t", Incarnation: 1, First: 2, Next: 3, Last: StreamID{4, 5}, Published: 6, Bytes: 7, Groups: 8, OldestAt: 9, Delayed: 10, Settings: TopicSettings{Paused: true}}},
		Groups: []GroupInfo{{Topic: "t", Name: "g", Incarnation: 1, Position: StreamID{2, 3}, Offset: 4, Ready: 5, Unsettled: 6, Inflight: 7, Delivered: 8, Redelivered: 9, Acknowledged: 10, OldestAt: 11, Parked: 12, Expiring: 13, Settings: GroupSettings{Park: true, MaxDeliveries: 3}}},
		Next:   12, More: true, Documents: []StoredDocument{{Table: "t", Key: "k", Value: []byte("v"), Revision: 3}},
		Parked: []ParkedMessage{{Delivery: Delivery{ContentType: "a"}, ParkedAt: 4, Error: "e"}},
		Story: &Story{Message: Delivery{ContentType: "a"}, State: StateReady, VisibleAt: 5, Bytes: 6, CRC: 7,
			Groups: []GroupStory{{Group: "g", State: StateParked, Count: 3, LeasedAt: 1, LeasedUntil: 2, NextAt: 3, ParkedAt: 4, Error: "x", Consumer: "y"}}},
		Last: "after"}
	out["answer"] = AppendAnswer(nil, &a)
	out["answer stream"] = AppendAnswer(nil, &Answer{Stream: sampleStreamAnswer()})
	for name, r := range sampleStreamResults() {
		out["result "+name] = AppendResult(nil, &r)
	}
	s := NewSealer([]byte("secret"))
	out["message id"] = []byte(s.MessageID(MessageID{Shard: 1, Index: 123456, Pos: 7, Kind: KindPlain}))
	out["message id of a duplicate"] = []byte(s.MessageID(MessageID{Shard: 1, Index: 123456, Pos: 7, Kind: KindDuplicate, OriginalIndex: 99, OriginalPos: 2, OriginalKind: KindDelayed}))
	out["receipt"] = []byte(s.Receipt(Receipt{Shard: 1, Topic: 2, Group: 3, Offset: 4, Epoch: 5}))

	l := openTest(t, Options{RecentBytes: -1})
	l.apply(&Init{ClusterID: "c", Secret: []byte("s"), Level: 1}, &OpenIntake{Node: "n1", Nonce: 2}, &Document{Table: "tokens", Key: "k", Value: []byte("v")})
	l.append(logEntry{members: []Member{{"n1", true}, {"n2", false}}})
	p := &Publish{Topic: "t", Messages: messages(time.Hour, "a", "b", "c")}
	p.Messages[2].Retention = 0
	eb.Reset(1, l.now, 0)
	eb.Add(1, 5, 5, p.AppendTo(nil))
	eb.Add(1, 6, 5, (&Publish{Topic: "u", Messages: messages(time.Minute, "x")}).AppendTo(nil))
	eb.Add(1, 7, 5, (&Publish{Topic: "t", Messages: messages(time.Hour, "d")}).AppendTo(nil))
	eb.Add(1, 9, 5, (&Receive{Topic: "t", Group: "g", Max: 3, Visibility: time.Minute}).AppendTo(nil))
	l.append(logEntry{data: eb.Bytes()})
	l.pass(time.Second)
	l.apply(&Settle{Topic: "t", Group: "g", Op: Extend, Receipts: []Receipt{{Topic: 2, Group: 4, Offset: 1, Epoch: 2}}},
		&ReceiveID{Topic: "t", Group: "g", ID: MessageID{Index: 3, Pos: 4, Kind: KindPlain}, Visibility: time.Minute},
		&Settle{Topic: "t", Group: "g", Op: Acknowledge, Receipts: []Receipt{{Topic: 2, Group: 4, Offset: 3, Epoch: 4}}})
	l.checkpoint()
	l.pass(2 * time.Minute)
	l.apply(&Tick{})
	l.checkpoint()
	l.apply(&Publish{Topic: "d", Messages: []NewMessage{{Retention: time.Hour, Delay: 5 * time.Second, Key: "k", Body: []byte("x")}, {Delay: 9 * time.Second, Body: []byte("y")}}},
		&TopicSet{Topic: "d", Settings: &TopicSettings{DepthMax: 9}}, &GroupSet{Topic: "d", Group: "g", Create: true, Settings: &GroupSettings{MaxDeliveries: 1, Park: true, ParkedRetention: time.Hour}})
	l.apply(&Delayed{Topic: "d", ID: MessageID{Index: l.next() - 1, Pos: 1, Kind: KindDelayed}, Delay: time.Minute})
	l.pass(5 * time.Second)
	r := l.apply(&Receive{Topic: "d", Group: "g", Max: 1, Visibility: time.Minute})
	l.apply(&Settle{Topic: "d", Group: "g", Op: Release, Reason: "no", Receipts: []Receipt{r[0].Deliveries[0].Receipt}})
	for _, kind := range []byte{rowDue} { // a checkpoint removes it
		if err := l.e.scan(kind, func(key, v []byte) error {
			out[fmt.Sprintf("row %c %x", kind, key[1:])] = slices.Clone(v)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	l.checkpoint()
	for _, kind := range []byte{rowBlock, rowByIndex, rowByStream, rowExpiry, rowTopic, rowGroup, rowChunk, rowIntake, rowState, rowFloor, rowDocument,
		rowKey, rowStaged, rowStagedIndex, rowStagedExpiry, rowPlace, rowChange, rowPack} {
		if err := l.e.scan(kind, func(key, v []byte) error {
			out[fmt.Sprintf("row %c %x", kind, key[1:])] = slices.Clone(v)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	f, err := l.o.FS.Open(l.e.packs.path(1))
	if err != nil {
		t.Fatal(err)
	}
	packed, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	if len(packed)%packBlock != 0 {
		t.Fatalf("the pack has %d bytes", len(packed))
	}
	out["pack"] = bytes.TrimRight(packed, "\x00") // what a chunk ends with
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	l.close()
	return out
}

// TestGolden: what this release writes is, byte for byte, what it wrote when the formats were fixed, and it
// still reads it.
func TestGolden(t *testing.T) {
	const file = "testdata/golden.txt"
	got := goldenVectors(t)
	if *updateGolden {
		var out strings.Builder
		for _, name := range slices.Sorted(maps.Keys(got)) {
			fmt.Fprintf(&out, "%s = %s\n", name, hex.EncodeToString(got[name]))
		}
		if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]byte{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " = ")
		if want[name], err = hex.DecodeString(value); err != nil {
			t.Fatal(err)
		}
	}
	for name, w := range want {
		if g, ok := got[name]; !ok || !bytes.Equal(g, w) {
			t.Errorf("%s is\n%x, was\n%x", name, g, w)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d vectors, %d are written down", len(got), len(want))
	}
	for name, c := range sampleCommands() {
		back, err := DecodeCommand(want["command "+name])
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !bytes.Equal(back.AppendTo(nil), c.AppendTo(nil)) || back.Kind() != c.Kind() {
			t.Errorf("%s came back as %+v", name, back)
		}
		info, err := Inspect(want["command "+name])
		if err != nil || info.Kind != c.Kind() {
			t.Errorf("%s: inspected as %+v, %v", name, info, err)
		}
	}
	for name, r := range sampleResults() {
		back, err := DecodeResult(want["result "+name])
		if err != nil || !reflect.DeepEqual(back, r) {
			t.Errorf("%s came back as %+v: %v", name, back, err)
		}
	}
}

func TestInspect(t *testing.T) {
	c := sampleCommands()
	for _, test := range []struct {
		name string
		want CommandInfo
	}{
		{"publish", CommandInfo{Kind: CmdPublish, Topic: []byte("orders"), Messages: 3}},
		{"receive", CommandInfo{Kind: CmdReceive, Topic: []byte("orders"), Group: []byte("billing"), Max: 10, Park: true}},
		{"acknowledge", CommandInfo{Kind: CmdSettle, Topic: []byte("orders"), Group: []byte("billing")}},
		{"receive id", CommandInfo{Kind: CmdReceiveID, Topic: []byte("orders"), Group: []byte("billing")}},
	} {
		got, err := Inspect(c[test.name].AppendTo(nil))
		if err != nil || fmt.Sprint(got) != fmt.Sprint(test.want) {
			t.Errorf("%s: %+v, %v", test.name, got, err)
		}
	}
	raw := c["receive"].AppendTo(nil)
	still, err := WithPark(raw, false)
	if err != nil {
		t.Fatal(err)
	}
	back, err := DecodeCommand(still)
	if err != nil || back.(*Receive).Park || !back.(*Receive).Latest {
		t.Errorf("without park it is %+v, %v", back, err)
	}
	if again, err := WithPark(still, true); err != nil || !bytes.Equal(again, raw) {
		t.Errorf("parked again it is %x, %v", again, err)
	}
	if _, err := WithPark(c["publish"].AppendTo(nil), true); err == nil {
		t.Error("a publish was parked")
	}
	if n := testing.AllocsPerRun(100, func() { _, _ = Inspect(raw) }); n != 0 {
		t.Errorf("Inspect allocates %v times", n)
	}
}

// TestUnknown: what a newer release writes halts the node with an UnknownError, in Inspect and in Apply.
func TestUnknown(t *testing.T) {
	entry := func(level uint32, cmd []byte) []byte {
		var eb EntryBuilder
		eb.Reset(level, testStart, 0)
		eb.Add(0, 0, 0, cmd)
		return eb.Bytes()
	}
	tick := (&Tick{}).AppendTo(nil)
	newer := entry(1, tick)
	newer[0] = 2
	for name, e := range map[string][]byte{
		"kind": entry(1, []byte{99, 1}), "kind zero": entry(1, []byte{0, 1}), "version": entry(1, []byte{byte(CmdTick), 2}), "level": entry(2, tick), "entry version": newer,
		"init level": entry(1, (&Init{ClusterID: "c", Level: 2}).AppendTo(nil)),
	} {
		l := openTest(t, Options{})
		_, err := l.e.Apply(1, 1, e, nil, nil)
		var u *UnknownError
		if !errors.As(err, &u) || !strings.Contains(err.Error(), "install the release") {
			t.Errorf("%s: %v", name, err)
		}
		if _, again := l.e.Apply(2, 1, entry(1, tick), nil, nil); !errors.Is(again, err) {
			t.Errorf("%s: applied on after %v: %v", name, err, again)
		}
		if _, err := l.e.Checkpoint(); err == nil {
			t.Errorf("%s: a checkpoint was made of half an entry", name)
		}
		l.close()
	}
}

// allocated returns the bytes f allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// TestClaimedLengths: nothing is allocated because a number says so.
func TestClaimedLengths(t *testing.T) {
	huge := []byte{0xff, 0xff, 0xff, 0xff, 0x0f} // 2^32-1
	decoders := map[string]func([]byte) error{
		"command": func(b []byte) error { _, err := DecodeCommand(b); return err },
		"result":  func(b []byte) error { _, err := DecodeResult(b); return err },
		"answer":  func(b []byte) error { _, err := DecodeAnswer(b); return err },
		"query":   func(b []byte) error { _, err := DecodeQuery(b); return err },
		"entry":   func(b []byte) error { _, err := InspectEntry(b); return err },
		"block":   func(b []byte) error { _, err := parseBlock(1, 1, b); return err },
		"chunk":   func(b []byte) error { _, err := parseChunk(newGroup(newTopic("t", 1), "g", 1), 0, b); return err },
		"intake":  func(b []byte) error { _, err := parseIntake(1, b); return err },
		"topic":   func(b []byte) error { _, err := parseTopic(1, b); return err },
		"group":   func(b []byte) error { _, err := parseGroup(newTopic("t", 1), 1, b); return err },
		"state":   func(b []byte) error { _, err := parseState(b); return err },
		"floor":   func(b []byte) error { _, err := parseFloor(b); return err },
	}
	refused := 0
	for name, v := range goldenVectors(t) {
		for at := range len(v) {
			bad := slices.Concat(v[:at], huge, v[at:])
			for kind, decode := range decoders {
				if n := allocated(func() {
					if decode(bad) != nil {
						refused++
					}
				}); n > uint64(4*len(bad)+64<<10) {
					t.Fatalf("decoding %s with a huge number at %d as %s allocates %d bytes", name, at, kind, n)
				}
			}
		}
	}
	if refused == 0 {
		t.Error("nothing was refused")
	}
}

func TestSealer(t *testing.T) {
	s, other := NewSealer([]byte("one")), NewSealer([]byte("two"))
	id := MessageID{Shard: 513, Index: 1 << 40, Pos: 1 << 20, Kind: KindDuplicate}
	rc := Receipt{Shard: 3, Topic: 1 << 50, Group: 77, Offset: 1<<64 - 1, Epoch: 1 << 63}
	text, handle := s.MessageID(id), s.Receipt(rc)
	if got, err := s.ParseMessageID(text); err != nil || got != id {
		t.Errorf("%q is %v, %v", text, got, err)
	}
	if got, err := s.ParseReceipt(handle); err != nil || got != rc {
		t.Errorf("%q is %v, %v", handle, got, err)
	}
	if _, err := other.ParseMessageID(text); errs.CodeOf(err) != errs.MessageNotFound {
		t.Errorf("another cluster's ID was taken: %v", err)
	}
	if _, err := other.ParseReceipt(handle); errs.CodeOf(err) != errs.InvalidReceipt {
		t.Errorf("another cluster's receipt was taken: %v", err)
	}
	for _, text := range []string{text, handle} {
		for _, r := range text {
			if !strings.ContainsRune("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_", r) {
				t.Errorf("%q does not go into a path", text)
			}
		}
		if text[0] == '-' || text[0] == '_' {
			t.Errorf("%q looks like a flag", text)
		}
	}
	for i := range len(text) {
		for _, c := range []byte("0aA-%\n") {
			bad := []byte(text)
			if bad[i] == c {
				continue
			}
			bad[i] = c
			if _, err := s.ParseMessageID(string(bad)); err == nil {
				t.Errorf("%q was taken for %q", bad, text)
			}
		}
	}
	for i := range len(handle) {
		for _, c := range []byte("0aA-%\n=") {
			bad := []byte(handle)
			if bad[i] == c {
				continue
			}
			bad[i] = c
			if _, err := s.ParseReceipt(string(bad)); err == nil {
				t.Errorf("%q was taken for %q", bad, handle)
			}
		}
	}
	for _, bad := range []string{"", "0", text + "0", text + text, strings.ToUpper(text), text[1:], strings.Repeat("0", 1<<20)} {
		if _, err := s.ParseMessageID(bad); errs.CodeOf(err) != errs.MessageNotFound {
			t.Errorf("ID %.40q: %v", bad, err)
		}
	}
	for _, bad := range []string{"", "A", handle + "A", handle + "=", handle + "\n", handle[1:], strings.Repeat("A", 1<<20)} {
		if _, err := s.ParseReceipt(bad); errs.CodeOf(err) != errs.InvalidReceipt {
			t.Errorf("receipt %.40q: %v", bad, err)
		}
	}
}

func FuzzCommand(f *testing.F) {
	for _, c := range sampleCommands() {
		f.Add(c.AppendTo(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := DecodeCommand(b)
		info, ierr := Inspect(b)
		if (err == nil) != (ierr == nil) {
			t.Fatalf("decoded %v, inspected %v", err, ierr)
		}
		if err != nil {
			return
		}
		if info.Kind != c.Kind() {
			t.Fatalf("kind %d and %d", info.Kind, c.Kind())
		}
		again, err := DecodeCommand(c.AppendTo(nil))
		if err != nil || !reflect.DeepEqual(again, c) {
			t.Fatalf("%+v came back as %+v: %v", c, again, err)
		}
	})
}

func FuzzResult(f *testing.F) {
	for _, r := range sampleResults() {
		f.Add(AppendResult(nil, &r))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeResult(b)
		if err != nil {
			return
		}
		again, err := DecodeResult(AppendResult(nil, &r))
		if err != nil || !reflect.DeepEqual(again, r) {
			t.Fatalf("%+v came back as %+v: %v", r, again, err)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	v := goldenVectors(f)
	f.Add(v["answer"])
	f.Add(v["query"])
	f.Fuzz(func(t *testing.T, b []byte) {
		if a, err := DecodeAnswer(b); err == nil {
			if again, err := DecodeAnswer(AppendAnswer(nil, &a)); err != nil || !reflect.DeepEqual(again, a) {
				t.Fatalf("%+v came back as %+v: %v", a, again, err)
			}
		}
		if q, err := DecodeQuery(b); err == nil {
			if again, err := DecodeQuery(AppendQuery(nil, &q)); err != nil || !reflect.DeepEqual(again, q) {
				t.Fatalf("%+v came back as %+v: %v", q, again, err)
			}
		}
	})
}

func FuzzRows(f *testing.F) {
	for name, v := range goldenVectors(f) {
		if strings.HasPrefix(name, "row") {
			f.Add(v)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if x, err := parseBlock(1, 2, b); err == nil {
			again, err := parseBlock(1, 2, x.appendRow(nil))
			if err != nil || !reflect.DeepEqual(again, x) {
				t.Fatalf("block %+v came back as %+v: %v", x, again, err)
			}
			for i := range min(x.count, 1<<10) {
				if j, ok := x.byPos(x.posOf(i)); ok && j > i {
					t.Fatalf("message %d has position %d of message %d", i, x.posOf(i), j)
				}
			}
		}
		g := newGroup(newTopic("t", 1), "g", 2)
		if x, err := parseChunk(g, 3, b); err == nil {
			row := x.appendRow(nil, g, 3, -1<<63)
			if again, err := parseChunk(g, 3, row); row != nil && (err != nil || !reflect.DeepEqual(again, x)) {
				t.Fatalf("chunk %+v came back as %+v: %v", x, again, err)
			}
		}
		if x, err := parseIntake(1, b); err == nil {
			if again, err := parseIntake(1, x.appendRow(nil)); err != nil || !bytes.Equal(again.appendRow(nil), x.appendRow(nil)) {
				t.Fatalf("intake came back differently: %v", err)
			}
		}
		if x, err := parseState(b); err == nil {
			if again, err := parseState(x.appendRow(nil)); err != nil || !reflect.DeepEqual(again, x) {
				t.Fatalf("state %+v came back as %+v: %v", x, again, err)
			}
		}
		if x, err := parseRuns(rowDue, 1, b); err == nil && len(x) > 0 {
			if again, err := parseRuns(rowDue, 1, appendRuns(nil, x[0].cluster, x[0].wall, x)); err != nil || !reflect.DeepEqual(again, x) {
				t.Fatalf("runs %+v came back as %+v: %v", x, again, err)
			}
		}
		if x, err := parseChange(delayKey{1, 2, 3}, b); err == nil {
			if again, err := parseChange(delayKey{1, 2, 3}, x.appendRow(nil)); err != nil || !reflect.DeepEqual(again, x) {
				t.Fatalf("change %+v came back as %+v: %v", x, again, err)
			}
		}
		_, _ = parseKey(0, b)
		_, _ = parseDocument(b)
		_, _ = parseTopic(1, b)
		_, _ = parseGroup(newTopic("t", 1), 1, b)
		_, _ = parseFloor(b)
	})
}

// FuzzEntry applies arbitrary bytes behind a log that gives them something to refer to, on two engines that
// differ in what they keep in memory: they must agree, and go on agreeing after a restart.
func FuzzEntry(f *testing.F) {
	f.Add(goldenVectors(f)["entry"])
	for _, c := range sampleCommands() {
		var eb EntryBuilder
		eb.Reset(1, testStart, 0)
		eb.Add(1, 1, 1, c.AppendTo(nil))
		f.Add(eb.Bytes())
	}
	f.Fuzz(func(t *testing.T, entry []byte) {
		run := func(o Options) (string, uint64) {
			o.FS, o.MemTableBytes, o.CacheBytes = vfs.NewMem(), 64<<10, 64<<10
			l := openTest(t, o)
			l.apply(&OpenIntake{Node: "n", Nonce: 1}, &Publish{Topic: "t", Messages: messages(time.Minute, "a", "b", "c")},
				&Receive{Topic: "t", Group: "g", Max: 2, Visibility: time.Minute})
			en := logEntry{index: l.next(), data: entry}
			res, err := en.applyTo(l.e, nil)
			if err != nil {
				_ = l.e.Close()
				return err.Error(), 0
			}
			l.entries = append(l.entries, en)
			h := l.fullHash()
			l.checkpoint()
			l.close()
			l.open()
			if got := l.fullHash(); got != h {
				t.Fatalf("hash is %x after a restart, was %x", got, h)
			}
			l.close()
			var all []byte
			for i := range res {
				all = AppendResult(all, &res[i])
			}
			return fmt.Sprintf("%x", all), h
		}
		if len(entry) == 0 {
			return // a log entry of no bytes is an empty one
		}
		a, ah := run(Options{})
		b, bh := run(Options{RecentBytes: -1})
		if a != b || ah != bh {
			t.Fatalf("two engines differ: %x %s\n%x %s", ah, a, bh, b)
		}
	})
}

func FuzzTexts(f *testing.F) {
	s := NewSealer([]byte("secret"))
	f.Add(s.MessageID(MessageID{Shard: 1, Index: 2, Pos: 3, Kind: KindPlain}))
	f.Add(s.Receipt(Receipt{Shard: 1, Topic: 2, Group: 3, Offset: 4, Epoch: 5}))
	f.Fuzz(func(t *testing.T, text string) {
		if id, err := s.ParseMessageID(text); err == nil && s.MessageID(id) != text {
			t.Fatalf("%q is another name of %q", text, s.MessageID(id))
		}
		if rc, err := s.ParseReceipt(text); err == nil && s.Receipt(rc) != text {
			t.Fatalf("%q is another name of %q", text, s.Receipt(rc))
		}
	})
}
