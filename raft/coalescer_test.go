package raft

import (
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// fakeLeader is what a coalescer needs of a node.
type fakeLeader struct {
	mu      sync.Mutex
	entries [][]byte
	press   bool
	asked   int // how often the coalescer has looked whether the disk is behind
	refusal *errs.Error
}

func (f *fakeLeader) env(t *testing.T) coalescerEnv {
	return coalescerEnv{
		stamp: func() engine.Stamp { return engine.Stamp{Cluster: 1, Wall: 1} },
		level: func() uint32 { return 1 },
		propose: func(entry []byte) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.entries = append(f.entries, entry)
		},
		pressed: func() bool { f.mu.Lock(); defer f.mu.Unlock(); f.asked++; return f.press },
		refuse:  func(*op) *errs.Error { f.mu.Lock(); defer f.mu.Unlock(); return f.refusal },
		fatal:   func(err error) { t.Error(err) },
	}
}

func (f *fakeLeader) proposed() [][]byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([][]byte(nil), f.entries...)
}

func (f *fakeLeader) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// startCoalescer runs a coalescer until the end of the test.
func startCoalescer(t *testing.T, f *fakeLeader, bytesMax int64) *coalescer {
	c := newCoalescer(f.env(t), bytesMax)
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() { c.run(stop); close(done) }()
	t.Cleanup(func() { close(stop); <-done })
	return c
}

// outcomes collects what becomes of ops.
type outcomes struct {
	mu  sync.Mutex
	got map[uint64]outcome
}

func (o *outcomes) finish(p *op, out outcome) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.got == nil {
		o.got = make(map[uint64]outcome)
	}
	o.got[p.number] = out
}

func (o *outcomes) of(number uint64) (outcome, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	out, ok := o.got[number]
	return out, ok
}

func publishOp(number uint64, size int, to origin) *op {
	o := &op{intake: 1, number: number, lowest: 1, request: request{cmd: publishCommand("t", string(make([]byte, size)))}, from: to}
	if err := o.inspect(); err != nil {
		panic(err)
	}
	return o
}

// While there is room each op is an entry of its own; without room they gather, up to the target size.
func TestCoalescerBatches(t *testing.T) {
	f := &fakeLeader{}
	c := startCoalescer(t, f, 64<<20)
	var out outcomes
	c.setMode(open)
	for i := range uint64(entriesInFlight) {
		c.enqueue(publishOp(i, 10, &out))
		poll(t, "an entry for each", func() bool { return len(f.proposed()) == int(i)+1 })
	}
	const more = 600
	for i := range uint64(more) {
		c.enqueue(publishOp(100+i, 1<<10, &out))
	}
	if n := len(f.proposed()); n != entriesInFlight {
		t.Fatalf("%d entries in flight", n)
	}
	total := 0
	for total < more {
		n := len(f.proposed())
		b := c.take(f.proposed()[n-entriesInFlight])
		if b == nil {
			t.Fatal("an entry in flight is not known")
		}
		poll(t, "the next entry", func() bool { return len(f.proposed()) == n+1 })
		entry := f.proposed()[n]
		info, err := engine.InspectEntry(entry)
		if err != nil {
			t.Fatal(err)
		}
		if len(entry) > limits.EntryBytesTarget+2<<10 {
			t.Fatalf("an entry of %d bytes", len(entry))
		}
		total += info.Commands
	}
	if total != more {
		t.Fatalf("%d commands in the entries, want %d", total, more)
	}
}

// A command larger than the target still goes, alone.
func TestCoalescerLargeCommand(t *testing.T) {
	f := &fakeLeader{}
	c := startCoalescer(t, f, 64<<20)
	var out outcomes
	c.setMode(gathering)
	c.enqueue(publishOp(1, 1<<20, &out))
	c.enqueue(publishOp(2, 10, &out))
	if n := len(f.proposed()); n != 0 {
		t.Fatalf("%d entries before the service is open", n)
	}
	c.setMode(open)
	poll(t, "two entries", func() bool { return len(f.proposed()) == 2 })
}

// Back-pressure and full queues refuse with nothing proposed; what may have been proposed before is kept.
func TestCoalescerRefusals(t *testing.T) {
	f := &fakeLeader{press: true}
	c := startCoalescer(t, f, 10<<10)
	var out outcomes
	c.setMode(open)
	poll(t, "the pressure to be seen", func() bool { return c.isPressed() })
	expect := func(number uint64, code errs.Code) {
		t.Helper()
		got, ok := out.of(number)
		if !ok || got.kind != refused || got.err.Code != code || got.err.RetryAfter <= 0 {
			t.Fatalf("op %d: %+v, %v", number, got, ok)
		}
	}
	// What comes while the disk is behind waits for it, as far as the queue reaches.
	c.enqueue(publishOp(1, 6<<10, &out))
	c.enqueue(publishOp(2, 6<<10, &out))
	looked := func() (n int) { f.set(func() { n = f.asked }); return n }
	before := looked()
	poll(t, "the coalescer to look twice", func() bool { return looked() >= before+2 })
	if got, ok := out.of(1); ok || len(f.proposed()) != 0 {
		t.Fatalf("the first op is not waiting: %+v", got)
	}
	expect(2, errs.Overloaded)
	repeat := publishOp(5, 6<<10, &out)
	repeat.repeat = true
	c.enqueue(repeat)
	if got, ok := out.of(5); ok {
		t.Fatalf("a repeat was refused: %+v", got)
	}
	f.set(func() { f.press = false })
	poll(t, "what waits to be proposed", func() bool { return len(f.proposed()) == 1 })
	poll(t, "the pressure to end", func() bool { return !c.isPressed() })

	f.set(func() { f.refusal = &errs.Error{Code: errs.DiskFull, RetryAfter: time.Second} })
	c.enqueue(publishOp(3, 10, &out))
	poll(t, "the refusal", func() bool { _, ok := out.of(3); return ok })
	expect(3, errs.DiskFull)
	repeat = publishOp(4, 10, &out)
	repeat.repeat = true
	c.enqueue(repeat)
	poll(t, "the repeat to be proposed", func() bool { return len(f.proposed()) == 2 })

	c.setMode(gathering)
	for i := range uint64(4) {
		c.enqueue(publishOp(10+i, 4<<10, &out))
	}
	expect(12, errs.Overloaded)
}

// Closing sends everything back, and says of each op whether it may have been proposed.
func TestCoalescerClose(t *testing.T) {
	f := &fakeLeader{}
	c := startCoalescer(t, f, 64<<20)
	var out outcomes
	c.setMode(open)
	c.enqueue(publishOp(1, 10, &out))
	poll(t, "an entry", func() bool { return len(f.proposed()) == 1 })
	c.setMode(gathering)
	c.enqueue(publishOp(2, 10, &out))
	withdrawn := publishOp(3, 10, &out)
	c.enqueue(withdrawn)
	if !withdrawn.withdraw() {
		t.Fatal("a queued op cannot be taken back")
	}
	c.setMode(closed)
	c.enqueue(publishOp(4, 10, &out))
	for number, proposed := range map[uint64]bool{1: true, 2: false, 3: false, 4: false} {
		if got, ok := out.of(number); !ok || got.kind != again || got.proposed != proposed {
			t.Errorf("op %d: %+v, %v", number, got, ok)
		}
	}
	if c.take(f.proposed()[0]) != nil {
		t.Error("an entry is still known after closing")
	}
	select {
	case <-c.whenDrained():
	default:
		t.Error("something is in flight after closing")
	}
}

// The publishes that wait are answered in order, each at its own requirement.
func TestAcks(t *testing.T) {
	var inSync, all uint64
	a := &acks{watermark: func() (uint64, uint64) { return inSync, all }, zones: func(index uint64) int {
		if index <= all {
			return 3
		}
		return 2
	}}
	var out outcomes
	add := func(number, index uint64, r Require) {
		o := publishOp(number, 1, &out)
		o.reply.Index, o.require = index, r
		a.add(o, InSync)
	}
	add(1, 10, Default)
	add(2, 11, AllZones)
	add(3, 12, Default)
	check := func(want map[uint64]int) {
		t.Helper()
		a.advance()
		for number := uint64(1); number <= 3; number++ {
			got, ok := out.of(number)
			zones, done := want[number]
			if ok != done || ok && (got.kind != replied || got.zones != zones) {
				t.Errorf("marks %d and %d: publish %d: %+v, %v", inSync, all, number, got, ok)
			}
		}
	}
	check(nil)
	inSync = 10
	check(map[uint64]int{1: 2})
	inSync, all = 12, 10
	check(map[uint64]int{1: 2, 3: 2})
	all = 11
	check(map[uint64]int{1: 2, 2: 3, 3: 2})
	if a.waiting() != 0 {
		t.Error("something waits")
	}
	add(4, 20, Default)
	a.setClosed(true)
	add(5, 21, Default)
	for _, number := range []uint64{4, 5} {
		if got, ok := out.of(number); !ok || got.kind != again || !got.proposed {
			t.Errorf("publish %d after closing: %+v, %v", number, got, ok)
		}
	}
}
