package raft

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/wal"
	"tercet.dev/tercet/wal/disk/sim"
)

// campaign reports whether the long form of a randomised test was asked for.
func campaign() bool {
	return os.Getenv("TERCET_CAMPAIGN") != "" || os.Getenv("TERCET_TEST_ALL") == "1"
}

// testSeed returns a seed, and prints it.
func testSeed(t *testing.T) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("TERCET_SEED"); s != "" {
		if _, err := fmt.Sscan(s, &seed); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("TERCET_SEED=%d", seed)
	return seed
}

// machines are the simulated disks under a cluster: one for the log, one for the store, per node.
type machines struct {
	mu    sync.Mutex
	logs  map[string]*sim.Disk
	store map[string]*vfs.MemFS
	rnd   *rand.Rand
}

func newMachines(seed uint64) *machines {
	m := &machines{logs: make(map[string]*sim.Disk), store: make(map[string]*vfs.MemFS), rnd: rand.New(rand.NewPCG(seed, 7))}
	for i, name := range founders {
		m.logs[name] = sim.New(seed+uint64(i), sim.Options{Hang: true})
		m.store[name] = vfs.NewCrashableMem()
	}
	return m
}

// use puts a node on its disks.
func (m *machines) use(cfg *Config) {
	m.mu.Lock()
	defer m.mu.Unlock()
	cfg.Dir = "/" + cfg.Name
	cfg.test.disk, cfg.test.fs, cfg.test.direct = m.logs[cfg.Name], m.store[cfg.Name], wal.Off
	cfg.test.checkpointLogBytes = 1 << 20
	cfg.test.keepLogBytes = 1 << 20
	cfg.test.installGrace = time.Millisecond
	cfg.WALSegmentSize = 256 << 10
}

// powerLoss takes the power from a node: what its disks had not synced is gone, wholly or in part.
func (m *machines) powerLoss(c *cluster, names ...string) {
	m.mu.Lock()
	old := make([]*sim.Disk, 0, len(names))
	// All at once: no node may do anything after another has lost power that it could not have done before.
	for _, name := range names {
		d := m.logs[name]
		old = append(old, d)
		m.logs[name] = d.Crash()
	}
	for _, name := range names {
		// The log first: what the store holds was in the log's synced part when it was applied.
		m.store[name] = m.store[name].CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: m.rnd.IntN(3) * 50, RNG: m.rnd})
	}
	m.mu.Unlock()
	for i, name := range names {
		c.mu.Lock()
		n := c.nodes[name]
		delete(c.nodes, name)
		c.mu.Unlock()
		old[i].Release()
		if n != nil {
			_ = n.Close() // it died of its disk
		}
	}
}

// losePower takes the power from one, two or all founders, so many times, and has load do something before each.
func (m *machines) losePower(c *cluster, rnd *rand.Rand, times int, load func()) {
	for i := range times {
		load()
		names := slices.Clone(founders)
		rnd.Shuffle(3, func(i, j int) { names[i], names[j] = names[j], names[i] })
		names = names[:1+rnd.IntN(3)]
		c.t.Logf("loss %d: %v", i, names)
		m.powerLoss(c, names...)
		c.start(names...)
		c.leader()
	}
	c.inSync(3)
}

// Power losses of one, two and all three nodes under load: nothing acknowledged is lost, nothing that was
// acknowledged by a consumer comes back, and all states agree.
func TestPowerLosses(t *testing.T) {
	seed := testSeed(t)
	losses := 6
	if campaign() {
		losses = 200
	}
	rnd := rand.New(rand.NewPCG(seed, 1))
	m := newMachines(seed)
	c := newCluster(t, m.use)
	c.start(founders...)
	c.inSync(3)
	c.tweak = func(cfg *Config) { m.use(cfg); cfg.Peers = nil }
	var turn atomic.Int64
	any := func() *Node { return c.node(founders[turn.Add(1)%3]) }
	l := startLoad(t, 6, any)
	consumed := startConsumers(t, 3, any)
	load := func() { l.more(c, 60) }
	m.losePower(c, rnd, losses, load)
	load()
	l.stop()
	consumed.stop()
	c.agree()
	l.check(c, c.node(c.follower()))
	consumed.check(c)
	t.Logf("%d publishes acknowledged, %d unknown; %d acknowledged by consumers", len(l.acked), l.unknown.Load(), len(consumed.done))
}

// Decision 2: the power fails at some moment of a snapshot's installation, again and again. Whatever the disk kept, the
// node starts, catches up, and has the others' state.
func TestPowerLossDuringInstall(t *testing.T) {
	seed := testSeed(t)
	losses := 4
	if campaign() {
		losses = 100
	}
	rnd := rand.New(rand.NewPCG(seed, 5))
	m := newMachines(seed)
	c := newCluster(t, m.use)
	c.start(founders...)
	c.inSync(3)
	c.tweak = func(cfg *Config) { m.use(cfg); cfg.Peers = nil }
	victim, lead := c.follower(), c.leader()
	l := startLoad(t, 4, func() *Node { return c.node(lead) })
	installs := 0
	for range losses {
		last := c.node(victim).logs.Last()
		m.powerLoss(c, victim)
		l.paused.Store(false)
		// More than is kept of the log: only a snapshot brings the node back.
		c.eventually("the log to be cut beyond the victim", func() bool { return c.node(lead).logs.shard.First() > last })
		l.paused.Store(true) // the state should not outgrow the test
		m.mu.Lock()
		d := m.logs[victim]
		m.mu.Unlock()
		c.start(victim)
		installing := false
		if rnd.IntN(4) > 0 {
			d.CrashAt(1 + rnd.IntN(20))
			c.eventually("the power to fail", func() bool {
				// The log of a node that only catches up is quiet soon: something has to be written.
				_, _ = c.node(lead).Propose(testContext(t), Proposal{Command: (&engine.Tick{}).AppendTo(nil)})
				installing = installing || c.node(victim).eng.Durable().Index > last
				return d.Crashed()
			})
		} else {
			c.eventually("the snapshot to be installed", func() bool { return c.node(victim).eng.Durable().Index > last })
			installing = true
		}
		if installing {
			installs++
		}
	}
	m.powerLoss(c, victim)
	c.start(victim)
	l.paused.Store(false)
	c.inSync(3)
	l.stop()
	c.agree()
	l.check(c, c.node(victim))
	t.Logf("%d losses, %d of them after the installation", losses, installs)
}

// consumers receive and acknowledge what a load publishes.
type consumers struct {
	t    *testing.T
	quit atomic.Bool
	wg   sync.WaitGroup
	mu   sync.Mutex
	// done holds the messages whose acknowledgement was confirmed.
	done map[engine.MessageID]bool
}

func startConsumers(t *testing.T, count int, via func() *Node) *consumers {
	s := &consumers{t: t, done: make(map[engine.MessageID]bool)}
	for range count {
		s.wg.Go(func() {
			for !s.quit.Load() {
				n := via()
				if n == nil {
					<-time.After(time.Millisecond) // the node is being restarted
					continue
				}
				r, err := n.Propose(testContext(t), Proposal{Command: receiveCommand("load", "g", 4), Wait: 100 * time.Millisecond})
				if err != nil || len(r.Deliveries) == 0 {
					continue
				}
				s.mu.Lock()
				for _, d := range r.Deliveries {
					if s.done[d.ID] {
						t.Errorf("message %+v was delivered after its acknowledgement was confirmed", d.ID)
					}
				}
				s.mu.Unlock()
				a, err := n.Propose(testContext(t), Proposal{Command: ackCommand("load", "g", r.Deliveries...)})
				if err != nil {
					continue
				}
				s.mu.Lock()
				for i, code := range a.Codes {
					if code == errs.OK {
						s.done[r.Deliveries[i].ID] = true
					}
				}
				s.mu.Unlock()
			}
		})
	}
	t.Cleanup(s.stop)
	return s
}

func (s *consumers) stop() {
	s.quit.Store(true)
	s.wg.Wait()
}

// check compares with what the group counted.
func (s *consumers) check(c *cluster) {
	s.t.Helper()
	a, err := c.node(c.leader()).Query(testContext(s.t), engine.Query{Kind: engine.QueryGroup, Topic: "load", Group: "g"})
	if err != nil || len(a.Groups) != 1 {
		s.t.Fatalf("%+v, %v", a, err)
	}
	if a.Groups[0].Acknowledged < uint64(len(s.done)) {
		s.t.Errorf("%d acknowledgements were confirmed, the group counts %d", len(s.done), a.Groups[0].Acknowledged)
	}
}

// Decision 5: the leader's disk freezes. Another node leads, requests that clients hold on any node are done there,
// and after the thaw the old leader follows with an equal state. Silence would drop no zone here: that the frozen node
// says what is the matter has to be enough.
func TestFrozenDiskOfTheLeader(t *testing.T) {
	seed := testSeed(t)
	m := newMachines(seed)
	c := newCluster(t, func(cfg *Config) { m.use(cfg); cfg.ZoneTimeout = time.Hour })
	c.start(founders...)
	c.inSync(3)
	lead := c.leader()
	l := startLoad(t, 6, func() *Node { return c.node(founders[rand.IntN(3)]) })
	l.more(c, 100)
	frozen := m.logs[lead]
	frozen.Freeze()
	thaw := sync.OnceFunc(frozen.Thaw)
	t.Cleanup(thaw)
	c.eventually("another leader that is open", func() bool {
		for _, name := range founders {
			if name != lead && c.node(name).openTerm.Load() != 0 {
				return true
			}
		}
		return false
	})
	l.more(c, 300)
	if c.node(lead).openTerm.Load() != 0 {
		t.Error("the node with the frozen disk is still open for service")
	}
	thaw()
	c.inSync(3)
	l.more(c, 100)
	l.stop()
	if u := l.unknown.Load(); u != 0 {
		t.Errorf("%d unknown outcomes, though every client's node lived", u)
	}
	c.agree()
	l.check(c, c.node(lead))
}

// A disk below its reserve, on any node of the in-sync set: publishes are refused with nothing stored, while
// acknowledgements and reads go on; when there is room again, so do publishes.
func TestDiskReserve(t *testing.T) {
	seed := testSeed(t)
	m := newMachines(seed)
	c := newCluster(t, func(cfg *Config) { m.use(cfg); cfg.DiskReserve = 8 << 20 })
	c.start(founders...)
	c.inSync(3)
	full := c.follower()
	via := c.node(c.leader())
	must(t, via, Proposal{Command: publishCommand("a", "x")})
	m.logs[full].SetCapacity(4 << 20)
	var refusal *errs.Error
	c.eventually("publishes to be refused", func() bool {
		_, err := via.Propose(testContext(t), Proposal{Command: publishCommand("b", "y")})
		refusal = errs.From(err)
		return err != nil
	})
	if refusal.Code != errs.DiskFull || refusal.Outcome() != errs.None || refusal.RetryAfter <= 0 {
		t.Fatalf("refused with %+v", refusal)
	}
	got := must(t, via, Proposal{Command: receiveCommand("a", "g", 1)})
	must(t, via, Proposal{Command: ackCommand("a", "g", got.Deliveries...)})
	if _, err := via.Query(testContext(t), engine.Query{Kind: engine.QueryTopic, Topic: "a"}); err != nil {
		t.Fatal(err)
	}
	m.logs[full].SetCapacity(0)
	c.eventually("publishes to be taken again", func() bool {
		_, err := via.Propose(testContext(t), Proposal{Command: publishCommand("b", "z")})
		return err == nil
	})
	c.agree()
}
