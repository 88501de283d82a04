package raft

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// unruly stands for the nodes behind an intake and the network between: ops arrive late, connections break with what
// they carry, replies get lost, leaders change, and each leader accepts by its coalescer's rule of order. What is
// accepted is applied in the order of acceptance, once.
type unruly struct {
	in  *intake
	rnd *rand.Rand

	mu     sync.Mutex
	leader engine.NodeID
	// order judges for the leader of the moment.
	order *coalescer
	// inOrder off is the negative control.
	inOrder bool
	// conns are what is on its way, by connection; ops of one connection arrive in order.
	conns   [][]*op
	applied map[uint64]uint64 // number → place
	places  []uint64          // numbers by place
	refused map[uint64]bool
	sendNo  int
}

func (u *unruly) send(to engine.NodeID, ops []*op) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.rnd.IntN(20) == 0 {
		return false
	}
	if len(u.conns) == 0 || u.rnd.IntN(4) == 0 {
		u.conns = append(u.conns, nil) // a new connection beside the old ones
	}
	last := len(u.conns) - 1
	u.conns[last] = append(u.conns[last], ops...)
	u.sendNo++
	return true
}

func (u *unruly) withdraw(engine.NodeID, *op) {}

// handle is an op's arrival at the leader of the moment.
func (u *unruly) handle(o *op) {
	u.mu.Lock()
	if u.inOrder {
		u.order.mu.Lock()
		l := u.order.laneLocked(o.intake)
		ok := l.inOrder(o)
		refuse := ok && !o.repeat && u.rnd.IntN(20) == 0
		switch {
		case refuse:
			l.leaveOut(o)
		case ok:
			l.accept(o)
		}
		u.order.mu.Unlock()
		if !ok {
			u.mu.Unlock()
			o.endAgain(false)
			return
		}
		if refuse {
			lost := u.rnd.IntN(3) == 0
			if !lost {
				u.refused[o.number] = true
			}
			u.mu.Unlock()
			if lost {
				o.endAgain(true) // the refusal got lost
			} else {
				o.end(outcome{kind: refused, err: errs.Of(errs.Overloaded)})
			}
			return
		}
	}
	place, again := u.applied[o.number]
	if !again {
		place = uint64(len(u.places))
		u.applied[o.number] = place
		u.places = append(u.places, o.number)
	}
	o.reply.Result = engine.Result{Repeat: again, Original: engine.MessageID{Index: place}}
	lost := u.rnd.IntN(6) == 0
	u.mu.Unlock()
	if lost {
		o.endAgain(true)
		return
	}
	o.end(outcome{kind: replied})
}

// step lets something happen.
func (u *unruly) step() {
	u.mu.Lock()
	var do []func()
	if n := len(u.conns); n > 0 {
		i := u.rnd.IntN(n)
		switch ops := u.conns[i]; {
		case len(ops) == 0:
			u.conns = slices.Delete(u.conns, i, i+1)
		case u.rnd.IntN(12) == 0:
			for _, o := range ops {
				do = append(do, func() { o.endAgain(true) })
			}
			u.conns = slices.Delete(u.conns, i, i+1)
		default:
			o := ops[0]
			u.conns[i] = ops[1:]
			do = append(do, func() { u.handle(o) })
		}
	}
	var r route
	change := u.rnd.IntN(60) == 0
	if change {
		// The order begins anew with each leader. What still flies to the old one is lost to it.
		u.leader = []engine.NodeID{"b", "c", "d"}[u.rnd.IntN(3)]
		u.order = &coalescer{}
		for _, ops := range u.conns {
			for _, o := range ops {
				do = append(do, func() { o.endAgain(true) })
			}
		}
		u.conns = nil
		r = route{node: u.leader, term: uint64(u.rnd.IntN(1000))}
	}
	u.mu.Unlock()
	if change {
		u.in.setRoute(r)
	}
	for _, f := range do {
		f()
	}
	u.in.flush()
}

// pipeline submits commands through an unruly network and returns how many of the applied ones are out of order.
func pipeline(t *testing.T, seed uint64, inOrder bool) (violations int) {
	u := &unruly{rnd: rand.New(rand.NewPCG(seed, 5)), inOrder: inOrder, order: &coalescer{},
		applied: make(map[uint64]uint64), refused: make(map[uint64]bool)}
	var now atomic.Int64
	u.in = newIntake("self", u, func() time.Time { return time.Unix(0, now.Add(int64(time.Millisecond))) }, 1<<30)
	u.in.opened(1)
	const commands = 400
	var told atomic.Int64
	for i := range commands {
		c := &call{first: op{request: request{cmd: fmt.Append(nil, i), kind: engine.CmdTick}}, ordered: true}
		var times atomic.Int32
		c.notify = func(c *call) {
			if times.Add(1) > 1 {
				t.Errorf("command %d: told twice", i)
			}
			if c.err != nil && c.err.Code != errs.Overloaded {
				t.Errorf("command %d: %v", i, c.err)
			}
			told.Add(1)
		}
		u.in.submit(c)
		for range u.rnd.IntN(3) {
			u.step()
		}
	}
	for told.Load() < commands {
		u.step()
	}
	if n := u.in.outstanding(); n != 0 || u.in.orderedFirst != nil || u.in.orderedLast != nil || u.in.orderedHeld != 0 {
		t.Errorf("seed %d: %d calls are left, %d of them held, list %v to %v", seed, n, u.in.orderedHeld, u.in.orderedFirst, u.in.orderedLast)
	}
	highest := uint64(0)
	for _, number := range u.places {
		if number < highest {
			violations++
		}
		highest = max(highest, number)
	}
	if got := len(u.places) + len(u.refused); got != commands {
		t.Errorf("seed %d: %d commands applied and %d refused, of %d", seed, len(u.places), len(u.refused), commands)
	}
	return violations
}

// R12: whatever becomes of connections, replies and leaders, submitted commands are applied in their order and once.
// Without the leader's rule they are not: the test sees the difference.
func TestSubmittedCommandsStayInOrder(t *testing.T) {
	seed := testSeed(t)
	rounds := uint64(30)
	if campaign() {
		rounds = 3000
	}
	without := 0
	for i := range rounds {
		if n := pipeline(t, seed+i, true); n > 0 {
			t.Fatalf("seed %d: %d commands were applied after later ones", seed+i, n)
		}
		without += pipeline(t, seed+i, false)
	}
	if without == 0 {
		t.Error("the negative control kept the order too")
	}
}

// A submitted command that has a deadline ends by it, once, and says whether it may have been proposed.
func TestSubmitDeadline(t *testing.T) {
	var now atomic.Int64
	s := &quietSender{}
	in := newIntake("self", s, func() time.Time { return time.Unix(0, now.Load()) }, 1<<20)
	in.opened(1)
	codes := make(chan errs.Code, 2)
	submit := func() {
		in.submit(&call{first: op{request: request{cmd: []byte("x"), kind: engine.CmdTick}}, ordered: true, deadline: time.Unix(0, now.Load()).Add(time.Second),
			notify: func(c *call) { codes <- errs.CodeOf(c.err) }})
	}
	submit() // nobody leads: held
	in.flush()
	select {
	case code := <-codes:
		t.Fatalf("told %v before the deadline", code)
	default:
	}
	now.Add(int64(2 * time.Second))
	in.flush()
	if code := <-codes; code != errs.NoLeader {
		t.Fatalf("held: %v", code)
	}
	in.setRoute(route{node: "b", term: 1})
	submit()
	now.Add(int64(2 * time.Second))
	in.flush()
	if code := <-codes; code != errs.OutcomeUnknown {
		t.Fatalf("sent: %v", code)
	}
	if n := in.outstanding(); n != 0 || in.timed != 0 || in.orderedFirst != nil {
		t.Fatalf("%d calls are left, %d with a deadline", n, in.timed)
	}
	s.sent()[0].end(outcome{kind: replied}) // too late: told already
	select {
	case code := <-codes:
		t.Fatalf("told again: %v", code)
	default:
	}
}

// submitted collects the outcomes of one pipeline.
type submitted struct {
	mu      sync.Mutex
	replies []Reply
	errs    []error
	times   []int
	left    sync.WaitGroup
}

func (s *submitted) add(n *Node, p Proposal) {
	s.mu.Lock()
	i := len(s.replies)
	s.replies, s.errs, s.times = append(s.replies, Reply{}), append(s.errs, nil), append(s.times, 0)
	s.mu.Unlock()
	s.left.Add(1)
	n.Submit(p, func(r Reply, err error) {
		s.mu.Lock()
		s.replies[i], s.errs[i] = r, err
		s.times[i]++
		once := s.times[i] == 1
		s.mu.Unlock()
		if once {
			s.left.Done()
		}
	})
}

// inOrder waits for the outcomes and checks that the publishes among them lie in the topic in the order of their calls.
func (s *submitted) inOrder(t *testing.T) (entries int) {
	t.Helper()
	s.left.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	var last uint64
	seen := make(map[uint64]bool)
	for i, r := range s.replies {
		if s.errs[i] != nil || r.Code != errs.OK || s.times[i] != 1 {
			t.Fatalf("command %d: %v, %v, told %d times", i, r.Code, s.errs[i], s.times[i])
		}
		if i > 0 && r.Published.Offset <= last {
			t.Fatalf("command %d lies at %d, the one before it at %d", i, r.Published.Offset, last)
		}
		last = r.Published.Offset
		seen[r.Published.Index] = true
	}
	return len(seen)
}

// Pipelines through the leader and through a follower keep their order and share entries, and a poll in a pipeline
// sees what was submitted before it.
func TestSubmitPipelines(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	for _, name := range []string{c.leader(), c.follower()} {
		var s submitted
		const commands = 500
		for i := range commands {
			s.add(c.node(name), Proposal{Command: publishCommand("t-"+name, fmt.Sprint(i))})
		}
		if entries := s.inOrder(t); entries > commands/2 {
			t.Errorf("through %s: %d commands in %d entries", name, commands, entries)
		}
		for i := range 50 {
			topic := fmt.Sprint("poll-", name, i)
			got := make(chan Reply, 2)
			c.node(name).Submit(Proposal{Command: publishCommand(topic, "x")}, func(Reply, error) {})
			c.node(name).Submit(Proposal{Command: receiveCommand(topic, "g", 1)}, func(r Reply, err error) {
				if err != nil {
					t.Error(err)
				}
				got <- r
			})
			if r := <-got; r.Code != errs.OK || len(r.Deliveries) != 1 || string(r.Deliveries[0].Body) != "x" {
				t.Fatalf("poll behind a publish through %s: %v, %+v", name, r.Code, r.Deliveries)
			}
		}
	}
}

// Leaders die and hand over while pipelines run through the surviving node: order, and once.
func TestSubmitThroughElections(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	stay := c.follower()
	const lanes = 3
	var pipelines [lanes]submitted
	var sent atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	// One goroutine for all of them: the order is the node's.
	wg.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(200 * time.Microsecond):
			}
			for k := range pipelines {
				pipelines[k].add(c.node(stay), Proposal{Command: publishCommand(fmt.Sprint("t", k), fmt.Sprint(i))})
			}
			sent.Add(1)
		}
	})
	waitSent := func(more int64) {
		from := sent.Load()
		c.eventually("more to be submitted", func() bool { return sent.Load() >= from+more })
	}
	waitSent(200)
	lead := c.leader()
	c.stop(lead)
	waitSent(200)
	c.leader()
	c.start(lead)
	c.inSync(3)
	if err := c.node(stay).TransferLeadership(testContext(t), ""); err != nil {
		t.Logf("transfer: %v", err)
	}
	waitSent(200)
	close(stop)
	wg.Wait()
	for k := range pipelines {
		pipelines[k].inOrder(t)
	}
	c.agree()
}

// Close ends what is submitted, and refuses what comes after.
func TestSubmitEndsWithTheNode(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.leader()
	n := c.node("n1")
	c.stop("n2")
	c.stop("n3") // no majority any more
	got := make(chan error, 2)
	n.Submit(Proposal{Command: publishCommand("t", "x")}, func(_ Reply, err error) { got <- err })
	c.stop("n1")
	n.Submit(Proposal{Command: publishCommand("t", "y")}, func(_ Reply, err error) { got <- err })
	for range 2 {
		var e *errs.Error
		if err := <-got; !errors.As(err, &e) {
			t.Fatalf("got %v", err)
		}
	}
}

// Watches are signalled on every node, for what they watch and nothing else, and cost nothing once they ended.
func TestWatch(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	lead := c.leader()
	type watcher struct {
		topic, other, topics <-chan struct{}
	}
	watchers := make(map[string]watcher)
	for _, name := range founders {
		var w watcher
		var cancels [3]func()
		n := c.node(name)
		w.topic, cancels[0] = n.Watch(WatchTopic, "watched")
		w.other, cancels[1] = n.Watch(WatchTopic, "other")
		w.topics, cancels[2] = n.Watch(WatchTopics, "")
		watchers[name] = w
		defer func() {
			for _, cancel := range cancels {
				cancel()
				cancel() // harmless
			}
			if count := n.watches.count.Load(); count != 0 {
				t.Errorf("%s: %d watches are left", name, count)
			}
		}()
	}
	must(t, c.node(lead), Proposal{Command: publishCommand("watched", "x")})
	for name, w := range watchers {
		<-w.topic
		<-w.topics
		select {
		case <-w.other:
			t.Errorf("%s: another topic's watch was signalled", name)
		default:
		}
		// The signal comes after the apply: the state holds the entry.
		a, err := c.node(name).StaleQuery(engine.Query{Kind: engine.QueryBrowse, Topic: "watched", Max: 10})
		if err != nil || len(a.Messages) != 1 {
			t.Errorf("%s: %v, %d messages", name, err, len(a.Messages))
		}
	}
	follower := c.follower()
	changed, cancel := c.node(follower).Watch(WatchLeader, "")
	defer cancel()
	if term, ok := c.node(lead).Leading(); !ok || term == 0 {
		t.Errorf("the leader says %d, %v", term, ok)
	}
	if _, ok := c.node(follower).Leading(); ok {
		t.Error("a follower says it leads")
	}
	c.stop(lead)
	c.eventually("another leader to be seen", func() bool {
		<-changed
		leader := c.node(follower).Status().Leader
		return leader != "" && leader != lead
	})
}

// What comes behind a refused command is not accepted until its origin knows of the refusal: the refusal may get lost,
// and the command come again. Behind one that was never accepted nothing is.
func TestCoalescerOrder(t *testing.T) {
	f := &fakeLeader{refusal: &errs.Error{Code: errs.DiskFull, RetryAfter: time.Second}}
	env := f.env(t)
	env.refuse = func(o *op) *errs.Error {
		if o.kind == engine.CmdPublish {
			return f.refusal
		}
		return nil
	}
	c := newCoalescer(env, 64<<20)
	ordered := func(o *op, after, floor uint64) *op {
		o.ordered, o.after, o.floor = true, after, floor
		return o
	}
	tick := func(number uint64, to origin) *op {
		cmd := (&engine.Tick{}).AppendTo(nil)
		return &op{intake: 1, number: number, lowest: 1, request: request{cmd: cmd, kind: engine.CmdTick}, from: to}
	}
	var out outcomes
	expect := func(number uint64, want outcomeKind) {
		t.Helper()
		got, ok := out.of(number)
		if !ok || got.kind != want || got.proposed {
			t.Fatalf("op %d: %+v, %v", number, got, ok)
		}
	}
	c.setMode(gathering)
	c.enqueue(ordered(tick(4, &out), 3, 1))
	expect(4, again)
	c.enqueue(ordered(publishOp(1, 10, &out), 0, 1))
	c.enqueue(ordered(tick(2, &out), 1, 1))
	c.setMode(open)
	if b, _ := c.next(); b != nil {
		t.Fatalf("proposed %d ops", len(b.ops))
	}
	expect(1, refused)
	expect(2, again)
	c.enqueue(ordered(tick(3, &out), 2, 2)) // the origin knows of 1, not yet of 2
	expect(3, again)
	again2, again3 := ordered(tick(2, &out), 0, 2), ordered(tick(3, &out), 2, 2)
	c.enqueue(again2)
	c.enqueue(again3)
	b, _ := c.next()
	if b == nil || len(b.ops) != 2 || b.ops[0] != again2 || b.ops[1] != again3 {
		t.Fatalf("proposed %+v", b)
	}
}

// A read that was passed to a leader which dies is answered by the next one.
func TestQueryThroughAnElection(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	lead, via := c.leader(), c.node(c.follower())
	must(t, via, Proposal{Command: publishCommand("t", "x")})
	c.stop(lead)
	for {
		// Until the others know, and through the time in which nobody leads.
		a, err := via.Query(testContext(t), engine.Query{Kind: engine.QueryBrowse, Topic: "t", Max: 10})
		if err != nil || len(a.Messages) != 1 {
			t.Fatalf("%v, %d messages", err, len(a.Messages))
		}
		if now := via.Status().Leader; now != "" && now != lead {
			return
		}
	}
}
