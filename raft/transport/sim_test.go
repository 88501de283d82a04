package transport

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime/pprof"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/wal/disk/sim"
)

// The crash simulation: publishers write through whoever leads, power fails on one, two or all nodes, and at the end
// every message that was acknowledged is on every node, and all nodes applied the same.

// campaign tells whether the long form was asked for.
func campaign() bool {
	return os.Getenv("TERCET_CAMPAIGN") != "" || os.Getenv("TERCET_TEST_ALL") == "1"
}

// plan says what one run does.
type plan struct {
	seed       uint64
	nodes      int
	losses     int  // power failures to inject, a node each
	all        bool // an acknowledgement waits for all voters, else for the commit alone
	membership bool // voters come and go: 1→2→3→2→1 …, with non-voters between
	keep       sim.Keep
	faults     func(*Transport)
	lyingLog   bool
	eager      bool // apply before the own disk has synced: the gate alone has to do
	weather    weather
	publishers int
}

// weather is what a run does to make one broken rule show: everybody loses power each time, and the disks of all but one
// node are slow. The fast one comes back late, when the others have elected somebody among themselves.
type weather uint8

const (
	mild         weather = iota // one, the leader, two or all lose power, on disks of any speed
	fastLeader                  // shows who answered before its disk had it
	fastFollower                // shows who committed before its disk had it
)

// outcome is what a run has shown.
type outcome struct {
	acked, unknown int
	losses, steps  int
	leaders        int
	violation      error
}

// run is one run under way.
type run struct {
	plan
	t     *testing.T
	w     *world
	rng   *rand.Rand // of the driver
	lives []*life    // the present or last life of each node
	disks []*sim.Disk
	fast  int // whose disk is fast in a storm
	// graveyard waits for the lives that have ended.
	graveyard sync.WaitGroup

	mu    sync.Mutex
	acked map[string]uint64 // message to index
	leads map[string]bool   // lives that acknowledged something
	count atomic.Int64      // of acknowledgements
	lost  atomic.Int64      // messages without a known outcome
}

// simulate does one run.
func simulate(t *testing.T, p plan) outcome {
	t.Helper()
	if p.publishers == 0 {
		p.publishers = 24
	}
	r := &run{plan: p, t: t, w: newWorld(t), rng: rand.New(rand.NewPCG(p.seed, 1)), acked: make(map[string]uint64), leads: make(map[string]bool)}
	first := servers(nodeName(0))
	if !p.membership {
		var names []string
		for i := range p.nodes {
			names = append(names, nodeName(i))
		}
		first = servers(names...)
	}
	for i := range p.nodes {
		d := sim.New(p.seed+uint64(i), sim.Options{Keep: p.keep, Hang: true})
		r.disks = append(r.disks, d)
		r.lives = append(r.lives, nil)
		if !p.membership || i == 0 {
			r.birth(i, &first)
		} else {
			r.birth(i, nil)
		}
	}
	ctx, stop := context.WithTimeout(context.Background(), 12*time.Minute)
	defer stop()
	publishing, enough := context.WithCancel(ctx)
	defer enough()
	var publishers sync.WaitGroup
	for i := range p.publishers {
		publishers.Go(func() { r.publish(publishing, i) })
	}
	var o outcome
	o.violation = r.drive(ctx, &o)
	enough()
	publishers.Wait()
	if o.violation == nil {
		o.violation = r.judge(ctx)
	}
	if o.violation != nil && os.Getenv("TERCET_TEST_DUMP") != "" {
		r.dump()
	}
	r.mu.Lock()
	o.acked, o.leaders = len(r.acked), len(r.leads)
	r.mu.Unlock()
	o.unknown = int(r.lost.Load())
	for _, l := range r.lives {
		r.bury(l)
	}
	r.graveyard.Wait()
	return o
}

// dump writes what the nodes know of themselves, and all goroutines, for a closer look at a violation.
func (r *run) dump() {
	for _, l := range r.lives {
		index, c := l.store.Configuration()
		first, _ := l.store.FirstIndex()
		last, _ := l.store.LastIndex()
		bytes, oldest := l.wal.Unsynced()
		fmt.Fprintf(os.Stderr, "%s dead=%t configuration %d %+v log %d..%d durable %d unsynced %d %s stats %v peers %v\n", l.name, l.isDead(), index, c, first, last,
			l.store.Durable(), bytes, oldest, l.raft.Stats(), l.mesh.Peers())
	}
	_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
}

// birth starts a node on its disk.
func (r *run) birth(i int, bootstrap *hraft.Configuration) {
	latency := rand.New(rand.NewPCG(r.seed, r.rng.Uint64()))
	slow := time.Duration([]int{2, 30, 30, 120}[latency.IntN(4)]) * time.Millisecond // a laggard now and then
	if r.weather != mild {
		slow = 20 * time.Millisecond // until the first round sets it
	}
	var mu sync.Mutex
	r.disks[i].SetSyncLatency(func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(latency.Int64N(int64(slow)))
	})
	r.lives[i] = r.w.start(nodeName(i), r.disks[i], nodeOptions{bootstrap: bootstrap, faults: r.faults, lyingLog: r.lyingLog, eager: r.eager})
}

// bury removes what is left of a life, beside the run.
func (r *run) bury(l *life) {
	r.graveyard.Add(1)
	go func() {
		defer r.graveyard.Done()
		l.stop()
	}()
}

// publish is one publisher: it sends message after message to whoever leads, one at a time.
func (r *run) publish(ctx context.Context, publisher int) {
	for n := 0; ctx.Err() == nil; n++ {
		l := r.w.leader()
		if l == nil {
			_ = pause(ctx, 5*time.Millisecond)
			continue
		}
		message := fmt.Sprintf("p%d-%d", publisher, n)
		index, err := r.publishOne(ctx, l, message)
		if err != nil {
			r.lost.Add(1)
			_ = pause(ctx, 5*time.Millisecond)
			continue
		}
		r.mu.Lock()
		r.acked[message] = index
		r.leads[l.name] = true
		r.mu.Unlock()
		r.count.Add(1)
		// A single voter on a fast disk would otherwise write a log that a slow newcomer takes minutes to fetch:
		// raft brings a follower up to date by 16 entries a request, and each answer waits for a sync.
		_ = pause(ctx, 2*time.Millisecond)
	}
}

var errNoAnswer = errors.New("no answer")

// publishOne publishes as the node does: raft's commit, and for "all" the watermark in the term of the entry.
func (r *run) publishOne(ctx context.Context, l *life, message string) (uint64, error) {
	applied := l.fsm.await(message)
	l.raft.Apply([]byte(message), time.Second)
	var index uint64
	timeout := time.NewTimer(2 * time.Second)
	defer timeout.Stop()
	poll := time.NewTicker(50 * time.Millisecond)
	defer poll.Stop()
	for index == 0 {
		select {
		case index = <-applied:
		case <-poll.C:
			if l.raft.State() != hraft.Leader {
				return 0, errNoAnswer
			}
		case <-l.dead:
			return 0, errNoAnswer // the client of a dead node hears nothing
		case <-timeout.C:
			return 0, errNoAnswer
		case <-ctx.Done():
			return 0, errNoAnswer
		}
	}
	if r.all {
		var e hraft.Log
		if err := l.store.GetLog(index, &e); err != nil {
			return 0, err
		}
		l.trans.Load().Watermark().Lead(e.Term)
		if err := l.awaitAll(ctx, e.Term, index); err != nil {
			return 0, err
		}
		if l.raft.State() != hraft.Leader {
			return 0, errNoAnswer
		}
	}
	if l.isDead() {
		return 0, errNoAnswer
	}
	return index, nil
}

// awaitAll waits until every voter holds an entry of a term.
func (l *life) awaitAll(ctx context.Context, term, index uint64) error {
	timeout := time.After(3 * time.Second)
	for {
		l.level.mu.Lock()
		changed := l.level.changed
		l.level.mu.Unlock()
		a := l.trans.Load().Watermark().Level()
		switch {
		case a.Term != term:
			return ErrTermPassed
		case a.All >= index:
			return nil
		}
		select {
		case <-changed:
		case <-l.dead:
			return errNoAnswer
		case <-ctx.Done():
			return ctx.Err()
		case <-timeout:
			return errNoAnswer
		}
	}
}

// drive injects the faults.
func (r *run) drive(ctx context.Context, o *outcome) error {
	step := 0
	for o.losses < r.losses || r.membership && o.steps == 0 {
		if r.weather != mild {
			if err := r.storm(ctx); err != nil {
				return err
			}
		}
		// Let something be acknowledged first: faults on an idle cluster show nothing.
		before := r.count.Load()
		quota := int64(20 + r.rng.IntN(120))
		deadline := time.Now().Add(3 * time.Minute)
		for r.count.Load() < before+quota {
			if err := pause(ctx, 5*time.Millisecond); err != nil {
				return err
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("nothing was acknowledged for three minutes, after %d losses", o.losses)
			}
		}
		var stepping chan error
		if r.membership {
			stepping = make(chan error, 1)
			go func(step int) { stepping <- r.step(ctx, step) }(step)
			_ = pause(ctx, time.Duration(r.rng.IntN(120))*time.Millisecond) // the power fails somewhere in it
		}
		leader := r.w.leader()
		victims := r.victims()
		var down []int
		for _, i := range victims {
			if r.lives[i].isDead() {
				continue
			}
			r.disks[i] = r.lives[i].cutPower(r.rng.IntN(2) == 0)
			r.bury(r.lives[i])
			down = append(down, i)
			o.losses++
		}
		r.restart(ctx, down, leader)
		if stepping != nil {
			err := <-stepping
			if err != nil {
				err = r.step(ctx, step) // again, in peace: the next fault is to meet the next step
			}
			if err == nil {
				step++
				o.steps++
			}
		}
	}
	return nil
}

// storm makes all disks slow but one.
func (r *run) storm(ctx context.Context) error {
	leader, err := r.w.awaitLeader(ctx)
	if err != nil {
		return err
	}
	r.fast = slices.Index(r.lives, leader)
	if r.weather == fastFollower {
		r.fast = (r.fast + 1 + r.rng.IntN(r.nodes-1)) % r.nodes
	}
	for i, d := range r.disks {
		latency := 150 * time.Millisecond
		if i == r.fast {
			latency = time.Millisecond
		}
		d.SetSyncLatency(func() time.Duration { return latency })
	}
	return nil
}

// restart brings the nodes back: at once, after a while, or so that those without the former leader's disk have the time
// to elect somebody among themselves. The last is what shows whether the others really hold what was acknowledged.
func (r *run) restart(ctx context.Context, down []int, leader *life) {
	how := r.rng.IntN(4)
	if r.weather != mild {
		how, leader = 2, r.lives[r.fast]
	}
	if how == 1 {
		_ = pause(ctx, time.Duration(r.rng.IntN(500))*time.Millisecond)
	}
	late := -1
	for _, i := range down {
		if how >= 2 && leader != nil && r.lives[i] == leader && r.nodes > 1 {
			late = i
			continue
		}
		r.birth(i, nil)
	}
	if late < 0 {
		return
	}
	deadline := time.Now().Add(2 * time.Second)
	for r.w.leader() == nil && time.Now().Before(deadline) {
		if pause(ctx, 5*time.Millisecond) != nil {
			break
		}
	}
	r.birth(late, nil)
}

// victims chooses whose power fails: one, the leader, two, or all.
func (r *run) victims() []int {
	order := r.rng.Perm(r.nodes)
	if r.weather != mild {
		return order
	}
	switch r.rng.IntN(5) {
	case 0:
		return order[:1]
	case 1:
		if l := r.w.leader(); l != nil {
			for i, other := range r.lives {
				if other == l {
					return []int{i}
				}
			}
		}
		return order[:1]
	case 2:
		return order[:min(2, r.nodes)]
	default:
		return order
	}
}

// step makes the next change of the voters: 1→2→3→2→1, each new one first as a non-voter.
func (r *run) step(ctx context.Context, step int) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	l, err := r.w.awaitLeader(ctx)
	if err != nil {
		return err
	}
	second, third := nodeName(1), nodeName(2)
	id := nodeID
	addr := func(n string) hraft.ServerAddress { return hraft.ServerAddress(logicalAddress(n)) }
	changes := []func() hraft.IndexFuture{
		func() hraft.IndexFuture { return l.raft.AddNonvoter(id(second), addr(second), 0, time.Second) },
		func() hraft.IndexFuture { return l.raft.AddVoter(id(second), addr(second), 0, time.Second) },
		func() hraft.IndexFuture { return l.raft.AddNonvoter(id(third), addr(third), 0, time.Second) },
		func() hraft.IndexFuture { return l.raft.AddVoter(id(third), addr(third), 0, time.Second) },
		func() hraft.IndexFuture { return l.raft.DemoteVoter(id(third), 0, time.Second) },
		func() hraft.IndexFuture { return l.raft.RemoveServer(id(third), 0, time.Second) },
		func() hraft.IndexFuture { return l.raft.DemoteVoter(id(second), 0, time.Second) },
		func() hraft.IndexFuture { return l.raft.RemoveServer(id(second), 0, time.Second) },
	}
	// The node that stays is the first one; when another leads, it hands over before it is demoted.
	if l.name != nodeName(0) && step%len(changes) >= 4 {
		l.raft.LeadershipTransferToServer(id(nodeName(0)), addr(nodeName(0)))
		return errNoAnswer
	}
	before, _ := l.store.Configuration()
	changes[step%len(changes)]()
	for {
		if now, _ := l.store.Configuration(); now != before && l.fsm.reach(ctx, now) == nil {
			return nil
		}
		if l.isDead() {
			return errNoAnswer
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return err
		}
	}
}

// judge lets everything come to rest and compares: every acknowledged message on every node, all nodes the same.
func (r *run) judge(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	for i := range r.nodes {
		want := i
		for r.membership && want > 0 { // bring everybody (back) in
			l, err := r.w.awaitLeader(ctx)
			if err != nil {
				return err
			}
			name := nodeName(want)
			if l.raft.AddVoter(nodeID(name), hraft.ServerAddress(logicalAddress(name)), 0, time.Second).Error() == nil {
				break
			}
		}
	}
	leader, err := r.w.awaitLeader(ctx)
	if err != nil {
		return err
	}
	index := leader.raft.AppliedIndex()
	// Barriers and no-ops do not reach the state machine: compare by what the leader's has applied.
	leader.fsm.mu.Lock()
	index = min(index, leader.fsm.applied)
	leader.fsm.mu.Unlock()
	var sequences [][]string
	for _, l := range r.lives {
		if err := l.fsm.reach(ctx, index); err != nil {
			return fmt.Errorf("%s does not catch up: %w", l.name, err)
		}
		sequences = append(sequences, l.fsm.sequence())
	}
	reference := sequences[slices.Index(r.lives, leader)]
	for i, seq := range sequences {
		n := min(len(seq), len(reference))
		if !slices.Equal(seq[:n], reference[:n]) {
			return fmt.Errorf("%s and %s applied different sequences:\n%s\n%s", r.lives[i].name, leader.name, lines(seq[:n]), lines(reference[:n]))
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, seq := range sequences {
		have := make(map[string]bool, len(seq))
		for _, s := range seq {
			have[s] = true
		}
		missing := 0
		example := ""
		for message, at := range r.acked {
			if s := fmt.Sprintf("%d:%s", at, message); !have[s] {
				missing++
				example = s
			}
		}
		if missing > 0 {
			return fmt.Errorf("%d of %d acknowledged messages are not on %s, for instance %s", missing, len(r.acked), r.lives[i].name, example)
		}
	}
	return nil
}

// TestCrashSimulation: with the gate, no acknowledged message is lost, however many nodes lose power at once.
func TestCrashSimulation(t *testing.T) {
	losses, runs := 6, 1
	if campaign() {
		losses, runs = 60, 4
	}
	for name, p := range map[string]plan{
		"ack all":                {nodes: 3, all: true},
		"ack majority":           {nodes: 3},
		"membership, ack all":    {nodes: 3, all: true, membership: true},
		"membership, ack commit": {nodes: 3, membership: true},
	} {
		t.Run(name, func(t *testing.T) {
			total := outcome{}
			for range runs {
				p.seed, p.losses = rand.Uint64(), losses
				if p.membership && !campaign() {
					p.losses = losses / 2
				}
				p.keep = []sim.Keep{sim.KeepNone, sim.KeepRandom}[p.seed%2]
				o := simulate(t, p)
				t.Logf("seed %d: %+v", p.seed, o)
				if o.violation != nil {
					t.Fatalf("seed %d: %v", p.seed, o.violation)
				}
				total.acked += o.acked
				total.steps += o.steps
			}
			if total.acked < 20*runs { // before each run's first loss alone
				t.Errorf("only %d messages were acknowledged: this shows nothing", total.acked)
			}
			if p.membership && total.steps == 0 {
				t.Error("the voters never changed")
			}
		})
	}
}

// TestCrashSimulationFindsTheOpenGate is the negative control: without the gate, the simulation must find a loss. Each
// control breaks one rule, and the same weather with no rule broken shows that it is not the weather.
func TestCrashSimulationFindsTheOpenGate(t *testing.T) {
	const runs = 30 // of each; one or two do, where the machine is not busy
	early := func(t *Transport) { t.faults.openFollowerGate = true }
	believes := func(t *Transport) { t.faults.openLeaderGate = true }
	for name, p := range map[string]plan{
		"follower answers early": {nodes: 3, weather: fastLeader, eager: true, faults: early},
		"leader believes early":  {nodes: 3, weather: fastFollower, eager: true, faults: believes},
		"both, ack all": {nodes: 3, weather: fastLeader, all: true, faults: func(t *Transport) {
			early(t)
			believes(t)
			t.faults.skipOwnRow = true
		}},
		"single voter does not wait":    {nodes: 1, weather: fastLeader, lyingLog: true},
		"nothing broken, fast leader":   {nodes: 3, weather: fastLeader, eager: true},
		"nothing broken, fast follower": {nodes: 3, weather: fastFollower, eager: true},
	} {
		t.Run(name, func(t *testing.T) {
			broken := p.faults != nil || p.lyingLog
			for range runs {
				p.seed, p.losses, p.keep = rand.Uint64(), 3*p.nodes, sim.KeepNone
				o := simulate(t, p)
				t.Logf("seed %d: %+v", p.seed, o)
				if !broken && o.violation != nil {
					t.Fatalf("seed %d: %v", p.seed, o.violation)
				}
				if !broken || o.violation != nil {
					return
				}
			}
			t.Errorf("%d runs found nothing: the simulation is blind", runs)
		})
	}
}
