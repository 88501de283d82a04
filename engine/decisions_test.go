package engine

import (
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// Tests that the project's decisions name and that belong to no other file: docs/testing.md lists them.

// heapNow returns what is in use on the heap after a collection.
func heapNow() int64 {
	runtime.GC()
	runtime.GC() // what finalizers let go
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// Decision 17: a consumer that never acknowledges works its way through a backlog that is much larger than what may be
// unsettled. From the limit on it is given retried messages and nothing else, the set does not grow, nor does memory.
func TestConsumerThatNeverAcknowledges(t *testing.T) {
	limit, total := 20_000, 120_000
	if campaign() {
		limit, total = limits.UnsettledPerGroupMax, 10_000_000
	}
	o := Options{Dir: t.TempDir(), FS: vfs.Default, RecentBytes: -1, MemTableBytes: 1 << 20, CacheBytes: 1 << 20}
	e, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	e.unsettledMax = limit
	now, index := testStart, uint64(0)
	// Entries are not kept, as a testLog does: memory is what this is about.
	apply := func(cmds ...Command) []Result {
		t.Helper()
		var eb EntryBuilder
		eb.Reset(1, now, 0)
		for _, c := range cmds {
			eb.Add(0, 0, 0, c.AppendTo(nil))
		}
		index++
		results, err := e.Apply(index, 1, eb.Bytes(), nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		if index%500 == 0 {
			if _, err := e.Checkpoint(); err != nil {
				t.Fatal(err)
			}
		}
		return results
	}
	const batch = 100
	body := strings.Repeat("x", 100)
	publish := &Publish{Topic: "t", Messages: messages(24*time.Hour, slices.Repeat([]string{body}, batch)...)}
	const every = 50 * time.Millisecond
	// Longer than it takes to give out everything once, so that some polls find everything under a lease.
	visibility := time.Duration(limit/batch) * every * 6 / 5
	receive := &Receive{Topic: "t", Group: "g", Max: 10, Visibility: visibility}
	received := []Command{publish}
	for range batch / receive.Max {
		received = append(received, receive)
	}
	var atLimit int64
	counts := map[uint32]int{} // deliveries by their count, once the set is full
	offsets := map[uint64]bool{}
	refused := 0
	for published := 0; published < total; published += batch {
		now.Cluster += every.Milliseconds()
		now.Wall += every.Milliseconds()
		for _, r := range apply(received...)[1:] {
			full := len(offsets) >= limit
			switch {
			case r.Code == errs.UnsettledLimit && full:
				refused++
			case r.Code != errs.OK:
				t.Fatalf("after %d messages: %v", published, r.Code)
			}
			for _, d := range r.Deliveries {
				if full {
					counts[d.Count]++
				}
				offsets[d.Receipt.Offset] = true
			}
		}
		if atLimit == 0 && len(offsets) >= limit {
			atLimit = heapNow()
			t.Logf("the limit is reached after %d messages, heap %d MiB", published, atLimit>>20)
		}
	}
	end := heapNow()
	t.Logf("%d messages published, heap %d MiB; at the limit: %d polls refused, deliveries by count %v", total, end>>20, refused, counts)
	if len(offsets) != limit {
		t.Errorf("the group has been given %d messages, want the limit of %d", len(offsets), limit)
	}
	if counts[1] > 0 || counts[2] == 0 || counts[3] == 0 {
		t.Errorf("deliveries at the limit by their count: %v, want retries alone, and of more than one round", counts)
	}
	if refused == 0 {
		t.Error("no poll found everything under a lease: this shows nothing of the refusal")
	}
	if grown := end - atLimit; grown > 16<<20 {
		t.Errorf("memory grew by %d MiB while nothing was acknowledged", grown>>20)
	}
	a, err := e.Query(Query{Kind: QueryGroup, Topic: "t", Group: "g", Now: now.Cluster})
	if err != nil || len(a.Groups) != 1 || a.Groups[0].Unsettled != limit {
		t.Errorf("%+v, %v", a.Groups, err)
	}
	// It is not lost for good: what is acknowledged makes room for new messages.
	now.Cluster += visibility.Milliseconds()
	now.Wall += visibility.Milliseconds()
	ds := apply(receive)[0].Deliveries
	settle := &Settle{Topic: "t", Group: "g", Op: Acknowledge}
	for _, d := range ds {
		settle.Receipts = append(settle.Receipts, d.Receipt)
	}
	results := apply(settle, receive)
	if got := results[1].Deliveries; len(got) != len(ds) || got[0].Count != 1 || got[0].Receipt.Offset != uint64(limit) {
		t.Errorf("after %d acknowledgements: %+v", len(ds), results[1])
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
}

// outcomes renders results for a comparison.
func outcomes(results []Result) string {
	var b strings.Builder
	for _, r := range results {
		fmt.Fprintf(&b, "%v %v %v", r.Code, r.Codes, r.Published)
		for _, d := range r.Deliveries {
			fmt.Fprintf(&b, " %d@%d %v", d.Receipt.Offset, d.Count, d.ID)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// everyCrash plays a log again, crashes after each of its entries with all rows flushed, checkpoints only where at says,
// and compares what the node then makes of the rest with what was found without a crash.
func everyCrash(t *testing.T, l *testLog, at uint64, want []string, hash uint64) {
	t.Helper()
	for crash := uint64(1); crash <= uint64(len(l.entries)); crash++ {
		if err := crashAfter(l, crash, at, want, hash, breakRules{}); err != nil {
			t.Fatalf("crash after entry %d: %v", crash, err)
		}
	}
}

// everyRule breaks each rule of decision 16 in turn: some crash of everyCrash's has to show it.
func everyRule(t *testing.T, l *testLog, at uint64, want []string, hash uint64) {
	t.Helper()
	for name, broken := range map[string]breakRules{"16a": {visibility: true}, "16b": {mutable: true}, "16c": {removal: true}} {
		var noticed error
		for crash := uint64(1); crash <= uint64(len(l.entries)) && noticed == nil; crash++ {
			if noticed = crashAfter(l, crash, at, want, hash, broken); noticed != nil {
				t.Logf("without rule %s a crash after entry %d shows: %.200v", name, crash, noticed)
			}
		}
		if noticed == nil {
			t.Errorf("rule %s is broken, and no crash shows it", name)
		}
	}
}

func crashAfter(l *testLog, crash, at uint64, want []string, hash uint64, broken breakRules) error {
	fs := vfs.NewCrashableMem()
	o := Options{FS: fs, Dir: "engine", RecentBytes: -1}
	e, err := Open(o)
	if err != nil {
		return err
	}
	broken.set(e)
	for i, en := range l.entries[:crash] {
		if _, err := en.applyTo(e, nil); err != nil {
			return closing(e, err)
		}
		if err := e.db.Flush(); err != nil {
			return closing(e, err)
		}
		if uint64(i)+1 == at {
			if _, err := e.Checkpoint(); err != nil {
				return closing(e, err)
			}
		}
	}
	o.FS = fs.CrashClone(vfs.CrashCloneCfg{})
	if err := e.Close(); err != nil {
		return err
	}
	if e, err = Open(o); err != nil {
		return err
	}
	broken.set(e)
	applied, _ := e.Applied()
	for _, en := range l.entries[applied:] {
		got, err := en.applyTo(e, nil)
		if err != nil {
			return closing(e, err)
		}
		if s := outcomes(got); s != want[en.index-1] {
			return closing(e, fmt.Errorf("entry %d gave\n%sinstead of\n%s", en.index, s, want[en.index-1]))
		}
	}
	_, got, err := e.FullHash()
	if err == nil && got != hash {
		err = fmt.Errorf("hash %x instead of %x", got, hash)
	}
	if err != nil {
		return closing(e, err)
	}
	return e.Close()
}

// Decision 19: a topic that is deleted and made anew, twice, between two checkpoints is another one each time. Receipts of
// the former ones are of no use, nothing of theirs is delivered, and a crash at any entry changes none of that, although
// rows of all three are on the disk. With any rule of decision 16 broken, a crash does change it.
func TestTopicMadeAnewBetweenCheckpoints(t *testing.T) {
	l := openTest(t, Options{RecentBytes: -1})
	var want []string
	apply := func(cmds ...Command) []Result {
		t.Helper()
		l.pass(time.Second)
		r := l.apply(cmds...)
		want = append(want, outcomes(r))
		return r
	}
	bodies := func(ds []Delivery) []string {
		t.Helper()
		if err := l.e.Load(ds); err != nil {
			t.Fatal(err)
		}
		var all []string
		for _, d := range ds {
			all = append(all, string(d.Body))
		}
		return all
	}
	receive := &Receive{Topic: "t", Group: "g", Max: 10, Visibility: time.Minute}
	keyed := func(life string) *Publish {
		p := &Publish{Topic: "t", Messages: messages(time.Hour, life+"-0", life+"-1", life+"-2")}
		for i := range p.Messages {
			p.Messages[i].Key = fmt.Sprint("key ", i) // the same in each life
		}
		return p
	}
	apply(&Publish{Topic: "short", Messages: messages(time.Minute, "soon gone")})
	apply(&Publish{Topic: "short", Messages: messages(time.Hour, "stays")})
	apply(keyed("old"))
	old := apply(receive)[0].Deliveries
	l.checkpoint()
	checkpoint := uint64(len(l.entries))
	// What replay needs is not to be taken away by what comes later: a block that expires before the crash, and a group
	// that has changed.
	if ds := apply(&Receive{Topic: "short", Group: "g", Max: 10, Visibility: time.Minute})[0].Deliveries; len(ds) != 2 {
		t.Fatalf("%+v", ds)
	}
	if r := apply(&Settle{Topic: "t", Group: "g", Op: Acknowledge, Receipts: []Receipt{old[2].Receipt}}); r[0].Codes[0] != errs.OK {
		t.Fatal(r[0].Codes)
	}
	l.pass(2 * time.Minute)
	apply(&Publish{Topic: "short", Messages: messages(time.Hour, "stays, too")})
	if ds := apply(receive)[0].Deliveries; len(ds) != 2 || ds[0].Count != 2 {
		t.Fatalf("%+v", ds)
	}
	incarnations := map[uint64]bool{}
	incarnation := func() {
		t.Helper()
		a, err := l.e.Query(Query{Kind: QueryGroup, Topic: "t", Group: "g", Now: l.now.Cluster})
		if err != nil || len(a.Groups) != 1 {
			t.Fatalf("%+v, %v", a, err)
		}
		incarnations[a.Groups[0].Incarnation] = true
	}
	incarnation()
	for _, life := range []string{"second", "third"} {
		apply(&TopicDelete{Topic: "t"})
		if r := apply(&Settle{Topic: "t", Group: "g", Op: Acknowledge, Receipts: []Receipt{old[0].Receipt}}); r[0].Code == errs.OK && r[0].Codes[0] == errs.OK {
			t.Fatalf("a receipt of a deleted topic was taken: %+v", r[0])
		}
		if r := apply(keyed(life)); r[0].Code != errs.OK {
			t.Fatal(r[0].Code)
		}
		ds := apply(receive)[0].Deliveries
		if got := bodies(ds); !slices.Equal(got, []string{life + "-0", life + "-1", life + "-2"}) {
			t.Fatalf("the %s topic delivers %q", life, got)
		}
		incarnation()
		// Offset and grant of an old receipt may well be those of a new one: the incarnation tells them apart.
		for _, op := range []SettleOp{Acknowledge, Extend} {
			r := apply(&Settle{Topic: "t", Group: "g", Op: op, Visibility: time.Minute, Receipts: []Receipt{old[0].Receipt, old[1].Receipt}})
			if r[0].Codes[0] != errs.MessageNotFound || r[0].Codes[1] != errs.MessageNotFound {
				t.Fatalf("receipts of the topic before the %s: %v", life, r[0].Codes)
			}
		}
		r := apply(&Settle{Topic: "t", Group: "g", Op: Acknowledge, Receipts: []Receipt{ds[0].Receipt}})
		if r[0].Codes[0] != errs.OK {
			t.Fatalf("a receipt of the %s topic: %v", life, r[0].Codes)
		}
		if r := apply(&ReceiveID{Topic: "t", Group: "h", ID: old[0].ID, Visibility: time.Minute}); r[0].Code != errs.MessageNotFound {
			t.Fatalf("a message of the topic before the %s: %v", life, r[0].Code)
		}
		old = ds
	}
	if len(incarnations) != 3 {
		t.Errorf("the groups of three topics have the incarnations %v", slices.Collect(maps.Keys(incarnations)))
	}
	everyCrash(t, l, checkpoint, want, l.fullHash())
	everyRule(t, l, checkpoint, want, l.fullHash())
	l.checkpoint()
	l.close()
}

// Decision 19: a group may begin behind an ID that lies in the future. It is given nothing until messages have IDs above
// it, and then those, also by a node that crashed in between.
func TestGroupAtAFutureID(t *testing.T) {
	l := openTest(t, Options{RecentBytes: -1})
	var want []string
	apply := func(cmds ...Command) []Result {
		t.Helper()
		r := l.apply(cmds...)
		want = append(want, outcomes(r))
		return r
	}
	future := StreamID{Ms: uint64(testStart.Wall + time.Hour.Milliseconds()), Seq: 0}
	apply(&Publish{Topic: "t", Messages: messages(24*time.Hour, "before")})
	if r := apply(&GroupSet{Topic: "t", Group: "g", Create: true, Start: Start{Kind: StartID, ID: future}}); r[0].Code != errs.OK {
		t.Fatal(r[0].Code)
	}
	l.checkpoint()
	checkpoint := uint64(len(l.entries))
	receive := &Receive{Topic: "t", Group: "g", Max: 10, Visibility: time.Minute}
	for range 3 {
		l.pass(10 * time.Minute)
		apply(&Publish{Topic: "t", Messages: messages(24*time.Hour, "too early", "too early")})
		if ds := apply(receive)[0].Deliveries; len(ds) != 0 {
			t.Fatalf("%d messages were delivered that lie before the group's position", len(ds))
		}
	}
	l.pass(40 * time.Minute)
	apply(&Publish{Topic: "t", Messages: messages(24*time.Hour, "behind", "it")})
	ds := apply(receive)[0].Deliveries
	if err := l.e.Load(ds); err != nil || len(ds) != 2 || string(ds[0].Body) != "behind" {
		t.Fatalf("%+v, %v", ds, err)
	}
	// Another group of the same topic has everything.
	if ds := apply(&Receive{Topic: "t", Group: "h", Max: 10, Visibility: time.Minute})[0].Deliveries; len(ds) != 9 {
		t.Fatalf("another group was given %d messages, want 9", len(ds))
	}
	everyCrash(t, l, checkpoint, want, l.fullHash())
	l.close()
}
