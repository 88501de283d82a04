package raft

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// fakeCluster stands for everything behind an intake: nodes of which one leads, whose replies may be lost, late, or
// given by several. Like the engine it applies each number once and refuses those below the lowest.
type fakeCluster struct {
	t  *testing.T
	in *intake

	mu      sync.Mutex
	rnd     *rand.Rand
	leader  engine.NodeID
	applied map[uint64]engine.MessageID // number → what it made
	lowest  uint64
	next    uint64
	late    []func()
	dropped int
}

func (f *fakeCluster) send(to engine.NodeID, ops []*op) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.rnd.IntN(10) == 0 {
		return false
	}
	for _, o := range ops {
		f.late = append(f.late, func() { f.handle(to, o) })
	}
	return true
}

func (f *fakeCluster) withdraw(engine.NodeID, *op) {}

// handle is what happens to an op at a node, some time after it was sent.
func (f *fakeCluster) handle(to engine.NodeID, o *op) {
	if o.phase.Load() == phaseWithdrawn {
		return
	}
	f.mu.Lock()
	if to != f.leader && f.rnd.IntN(4) > 0 {
		f.mu.Unlock()
		o.endAgain(false)
		return
	}
	// Proposed. A deposed leader's entry may be applied as well: it then came before the new leader's.
	o.phase.CompareAndSwap(phaseQueued, phaseProposed)
	if o.lowest > f.lowest {
		f.lowest = o.lowest
		for n := range f.applied {
			if n < f.lowest {
				delete(f.applied, n)
			}
		}
	}
	if o.number < f.lowest {
		o.reply.Result.Code = errs.IntakeClosed
	} else {
		id, again := f.applied[o.number]
		if !again {
			f.next++
			id = engine.MessageID{Index: f.next}
			f.applied[o.number] = id
		}
		o.reply.Result = engine.Result{Repeat: again, Original: id}
	}
	lost := f.rnd.IntN(5) == 0
	f.dropped++
	f.mu.Unlock()
	if lost {
		o.endAgain(true)
		return
	}
	o.end(outcome{kind: replied})
}

// step lets something happen.
func (f *fakeCluster) step() {
	f.mu.Lock()
	var do func()
	if n := len(f.late); n > 0 {
		i := f.rnd.IntN(n)
		do = f.late[i]
		f.late[i] = f.late[n-1]
		f.late = f.late[:n-1]
	}
	change := f.rnd.IntN(30) == 0
	var r route
	if change {
		f.leader = []engine.NodeID{"self", "b", "c"}[f.rnd.IntN(3)]
		r = route{node: f.leader, term: uint64(f.rnd.IntN(1000))}
	}
	f.mu.Unlock()
	if change {
		f.in.setRoute(r)
	}
	if do != nil {
		do()
	}
	f.in.flush()
}

// Whatever becomes of routes and replies: each command takes effect once, its caller gets that effect's result, and
// the lowest number never passes one whose outcome is awaited.
func TestIntakeDoesEachCommandOnce(t *testing.T) {
	seed := testSeed(t)
	f := &fakeCluster{t: t, rnd: rand.New(rand.NewPCG(seed, 3)), applied: make(map[uint64]engine.MessageID)}
	var clock sync.Mutex
	now := time.Unix(0, 0)
	f.in = newIntake("self", f, func() time.Time {
		clock.Lock()
		defer clock.Unlock()
		now = now.Add(time.Millisecond)
		return now
	}, 1<<30)
	f.in.opened(1)
	const callers, each = 20, 100
	var wg sync.WaitGroup
	var mu sync.Mutex
	effects := make(map[engine.MessageID]string)
	for k := range callers {
		wg.Go(func() {
			for i := range each {
				c := &call{first: op{request: request{cmd: []byte("x"), kind: engine.CmdPublish}}}
				r, err := f.in.do(context.Background(), c)
				if err != nil {
					t.Errorf("caller %d, command %d: %v", k, i, err)
					return
				}
				mu.Lock()
				who := fmt.Sprint(k, "/", i)
				if other, taken := effects[r.Original]; taken {
					t.Errorf("%s and %s got the same effect", who, other)
				}
				effects[r.Original] = who
				mu.Unlock()
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for {
		select {
		case <-done:
			if int(f.next) != callers*each || len(effects) != callers*each {
				t.Fatalf("%d commands had %d effects", callers*each, f.next)
			}
			if n := f.in.outstanding(); n != 0 {
				t.Fatalf("%d calls are left", n)
			}
			return
		default:
			f.step()
		}
	}
}

// quietSender takes everything and says nothing.
type quietSender struct {
	mu        sync.Mutex
	ops       []*op
	withdrawn []*op
}

func (s *quietSender) send(_ engine.NodeID, ops []*op) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ops = append(s.ops, ops...)
	return true
}

func (s *quietSender) withdraw(_ engine.NodeID, o *op) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.withdrawn = append(s.withdrawn, o)
}

func (s *quietSender) sent() []*op {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*op(nil), s.ops...)
}

// What a caller is told at its deadline depends on whether the command may have been proposed.
func TestIntakeOutcomeAtTheDeadline(t *testing.T) {
	over, cancel := context.WithCancel(context.Background())
	cancel()
	for _, c := range []struct {
		name string
		prep func(in *intake)
		want errs.Code
	}{
		{"no leader", func(in *intake) { in.opened(1) }, errs.NoLeader},
		{"intake not open", func(in *intake) { in.setRoute(route{node: "self"}) }, errs.NotLeader},
		{"queued here", func(in *intake) { in.opened(1); in.setRoute(route{node: "self"}) }, errs.NotLeader},
		{"sent to another node", func(in *intake) { in.opened(1); in.setRoute(route{node: "b"}) }, errs.OutcomeUnknown},
	} {
		t.Run(c.name, func(t *testing.T) {
			in := newIntake("self", &quietSender{}, time.Now, 1<<20)
			c.prep(in)
			_, err := in.do(over, &call{first: op{request: request{cmd: []byte("x"), kind: engine.CmdPublish}}})
			if err == nil || err.Code != c.want {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if n := in.outstanding(); n != 0 {
				t.Fatalf("%d calls are left", n)
			}
		})
	}
}

// An abandoned receive keeps its number until it is known what it was given; that is released.
func TestIntakeReleasesWhatAnAbandonedReceiveWasGiven(t *testing.T) {
	s := &quietSender{}
	in := newIntake("self", s, time.Now, 1<<20)
	var released []engine.Delivery
	in.release = func(_ *call, ds []engine.Delivery) { released = append(released, ds...) }
	in.opened(1)
	in.setRoute(route{node: "b"})
	over, cancel := context.WithCancel(context.Background())
	cancel()
	c := &call{first: op{request: request{cmd: []byte("x"), kind: engine.CmdReceive, since: time.Now()}}, waitUntil: time.Now().Add(time.Hour)}
	if _, err := in.do(over, c); err == nil || err.Code != errs.OutcomeUnknown {
		t.Fatalf("got %v", err)
	}
	o := s.sent()[0]
	if len(s.withdrawn) != 1 || s.withdrawn[0] != o || in.outstanding() != 1 {
		t.Fatalf("withdrawn %v, outstanding %d", s.withdrawn, in.outstanding())
	}
	o.reply.Result.Deliveries = []engine.Delivery{{Count: 1}}
	o.end(outcome{kind: replied})
	if len(released) != 1 || in.outstanding() != 0 {
		t.Fatalf("released %v, outstanding %d", released, in.outstanding())
	}
}

// Waiting that is stopped has an outcome: what the receive was given in the last moment, or nothing.
func TestIntakeStopsWaiting(t *testing.T) {
	for _, c := range []struct {
		name string
		prep func(in *intake)
		end  func(o *op)
		want int
	}{
		{"held", func(*intake) {}, nil, 0},
		{"nothing given", func(in *intake) { in.setRoute(route{node: "b"}) }, func(o *op) { o.end(outcome{kind: stillWaiting}) }, 0},
		{"given", func(in *intake) { in.setRoute(route{node: "b"}) }, func(o *op) {
			o.reply.Result.Deliveries = []engine.Delivery{{Count: 1}}
			o.end(outcome{kind: replied})
		}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &quietSender{}
			in := newIntake("self", s, time.Now, 1<<20)
			in.release = func(*call, []engine.Delivery) { t.Error("released what the caller was given") }
			in.opened(1)
			c.prep(in)
			stop := make(chan struct{})
			type answer struct {
				r   Reply
				err *errs.Error
			}
			got := make(chan answer, 1)
			go func() {
				r, err := in.do(context.Background(), &call{first: op{request: request{cmd: []byte("x"), kind: engine.CmdReceive, since: time.Now()}}, stop: stop,
					waitUntil: time.Now().Add(time.Hour)})
				got <- answer{r, err}
			}()
			poll(t, "the call", func() bool { return in.outstanding() == 1 })
			if c.end != nil {
				poll(t, "the op", func() bool { return len(s.sent()) == 1 })
			}
			close(stop)
			if c.end != nil {
				poll(t, "the withdrawal", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(s.withdrawn) == 1 })
				c.end(s.sent()[0])
			}
			if a := <-got; a.err != nil || len(a.r.Deliveries) != c.want {
				t.Fatalf("%+v, %v", a.r, a.err)
			}
			if n := in.outstanding(); n != 0 {
				t.Fatalf("%d calls are left", n)
			}
		})
	}
}

// A receive that waits gets a new number with each slice, so that the lowest one rises, and keeps its place.
func TestIntakeRenewsTheNumberOfAWaitingReceive(t *testing.T) {
	s := &quietSender{}
	now := time.Unix(100, 0)
	in := newIntake("self", s, func() time.Time { return now }, 1<<20)
	in.opened(1)
	in.setRoute(route{node: "b"})
	c := &call{first: op{request: request{cmd: []byte("x"), kind: engine.CmdReceive, since: now}}, waitUntil: now.Add(2500 * time.Millisecond)}
	done := make(chan *errs.Error)
	go func() {
		_, err := in.do(context.Background(), c)
		done <- err
	}()
	var seen []*op
	for len(seen) < 3 {
		poll(t, "the next slice", func() bool { return len(s.sent()) > len(seen) })
		seen = s.sent()
		o := seen[len(seen)-1]
		if !o.since.Equal(c.first.since) || o.number != uint64(len(seen)) || o.parkUntil.Sub(now) > parkSliceMax {
			t.Fatalf("slice %d: %+v", len(seen), o)
		}
		now = o.parkUntil
		o.end(outcome{kind: stillWaiting})
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if in.lowest != 4 {
		t.Fatalf("lowest %d", in.lowest)
	}
}

// The bounds hold, and full means: nothing happened.
func TestIntakeBounds(t *testing.T) {
	in := newIntake("self", &quietSender{}, time.Now, 100)
	in.opened(1)
	go func() { _, _ = in.do(context.Background(), &call{first: op{request: request{cmd: make([]byte, 90)}}}) }()
	poll(t, "the first call", func() bool { return in.outstanding() == 1 })
	_, err := in.do(context.Background(), &call{first: op{request: request{cmd: make([]byte, 20)}}})
	if err == nil || err.Code != errs.Overloaded || err.RetryAfter <= 0 {
		t.Fatalf("got %v", err)
	}
	in.close(errs.Of(errs.Draining))
	if _, err := in.do(context.Background(), &call{first: op{request: request{cmd: []byte("x")}}}); err == nil || err.Code != errs.Draining {
		t.Fatalf("got %v", err)
	}
}

// A command whose intake the cluster has closed is brought in again if it was certainly not applied, and is unknown
// if it may have been applied before.
func TestIntakeClosedByTheCluster(t *testing.T) {
	s := &quietSender{}
	in := newIntake("self", s, time.Now, 1<<20)
	in.opened(1)
	in.setRoute(route{node: "b", term: 1})
	first, second := make(chan *errs.Error, 1), make(chan *errs.Error, 1)
	go func() {
		_, err := in.do(context.Background(), &call{first: op{request: request{cmd: []byte("x")}}})
		first <- err
	}()
	poll(t, "the first call", func() bool { return len(s.sent()) == 1 })
	in.setRoute(route{node: "c", term: 2}) // the first may have been proposed by b
	in.flush()
	go func() {
		_, err := in.do(context.Background(), &call{first: op{request: request{cmd: []byte("y")}}})
		second <- err
	}()
	poll(t, "the second call", func() bool { return len(s.sent()) == 3 })
	for _, o := range s.sent()[1:] {
		o.reply.Result.Code = errs.IntakeClosed
		o.end(outcome{kind: replied})
	}
	if err := <-first; err == nil || err.Code != errs.OutcomeUnknown {
		t.Fatalf("first: %v", err)
	}
	if in.isOpen() {
		t.Fatal("the closed intake is still used")
	}
	in.opened(2)
	in.flush()
	ops := s.sent()
	if len(ops) != 4 || ops[3].intake != 2 || string(ops[3].cmd) != "y" {
		t.Fatalf("sent %d ops", len(ops))
	}
	ops[3].end(outcome{kind: replied})
	if err := <-second; err != nil {
		t.Fatal(err)
	}
}
