package raft

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// load publishes through the given node until stop is called, and returns what was acknowledged.
type load struct {
	t        *testing.T
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	mu       sync.Mutex
	acked    map[string]int // body → zones
	unknown  atomic.Int64
	progress atomic.Int64
	paused   atomic.Bool
}

func startLoad(t *testing.T, publishers int, via func() *Node) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{t: t, cancel: cancel, acked: make(map[string]int)}
	body := strings.Repeat("x", 1<<10)
	for p := range publishers {
		l.wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				n := via()
				if n == nil || l.paused.Load() {
					<-time.After(time.Millisecond) // the node is being restarted
					continue
				}
				id := fmt.Sprintf("%d-%d", p, i)
				r, err := n.Propose(testContext(t), Proposal{Command: publishCommand("load", id+body)})
				if err != nil {
					if errs.From(err).Outcome() == errs.Unknown {
						l.unknown.Add(1)
					}
					continue
				}
				if r.Code == errs.OK {
					l.mu.Lock()
					l.acked[id] = r.Zones
					l.mu.Unlock()
					l.progress.Add(1)
				}
			}
		})
	}
	t.Cleanup(func() { l.cancel(); l.wg.Wait() })
	return l
}

// more waits until n more publishes were acknowledged.
func (l *load) more(c *cluster, n int64) {
	l.t.Helper()
	from := l.progress.Load()
	c.eventually(fmt.Sprintf("%d more publishes", n), func() bool { return l.progress.Load() >= from+n })
}

// stop ends the load and returns the acknowledged bodies' ids.
func (l *load) stop() map[string]int {
	l.cancel()
	l.wg.Wait()
	return l.acked
}

// check browses a node's state for everything that was acknowledged.
func (l *load) check(c *cluster, n *Node) {
	l.t.Helper()
	stored := make(map[string]int)
	for from := uint64(0); ; {
		a, err := n.Query(testContext(l.t), engine.Query{Kind: engine.QueryBrowse, Topic: "load", From: from, Max: 500})
		if err != nil {
			l.t.Fatalf("browsing: %v", err)
		}
		for _, m := range a.Messages {
			id, _, _ := strings.Cut(string(m.Body), "x")
			stored[id]++
		}
		if a.Next == 0 {
			break
		}
		from = a.Next
	}
	for id := range l.acked {
		if stored[id] != 1 {
			l.t.Errorf("acknowledged message %s is stored %d times", id, stored[id])
		}
	}
}

// Draining the leader under load: no unknown outcome, and the others go on.
func TestDrainOfTheLeader(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	rounds := 2
	if campaign() {
		rounds = 4
	}
	for round := range rounds {
		lead := c.leader()
		stay := c.follower()
		l := startLoad(t, 8, func() *Node { return c.node(stay) })
		own := startLoad(t, 4, func() *Node {
			if n := c.node(lead); n != nil && n.Ready() == nil {
				return n
			}
			return c.node(stay)
		})
		l.more(c, 50)
		n := c.node(lead)
		if err := n.Drain(testContext(t)); err != nil {
			t.Fatalf("round %d: drain: %v", round, err)
		}
		if s := n.Status(); s.Leader == lead || !s.Draining {
			t.Fatalf("round %d: after the drain %s leads, draining %v", round, s.Leader, s.Draining)
		}
		c.stop(lead)
		c.inSync(2)
		l.more(c, 50)
		c.start(lead)
		c.inSync(3)
		l.stop()
		own.stop()
		if u := l.unknown.Load() + own.unknown.Load(); u != 0 {
			t.Fatalf("round %d: %d unknown outcomes", round, u)
		}
	}
	c.agree()
}

// A drained follower leaves the in-sync set before it stops.
func TestDrainOfAFollower(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	leaver := c.follower()
	if err := c.node(leaver).Drain(testContext(t)); err != nil {
		t.Fatal(err)
	}
	c.inSync(2)
	_, err := c.node(leaver).Propose(testContext(t), Proposal{Command: publishCommand("a", "x")})
	if errs.CodeOf(err) != errs.Draining {
		t.Fatalf("a drained node took a publish: %v", err)
	}
	c.stop(leaver)
	if r := must(t, c.node(c.leader()), Proposal{Command: publishCommand("a", "x")}); r.Zones != 2 {
		t.Fatalf("zones %d", r.Zones)
	}
}

// A node whose directory was emptied is refused under its old identity, with the remedy; the remedy works, under
// load, with a snapshot, and all states agree afterwards.
func TestReplaceAWipedNodeUnderLoad(t *testing.T) {
	small := func(cfg *Config) {
		cfg.WALSegmentSize = 1 << 20
		cfg.test.checkpointLogBytes = 2 << 20
		cfg.test.keepLogBytes = 1 << 20
	}
	c := newCluster(t, small)
	c.start(founders...)
	c.inSync(3)
	victim := c.follower()
	lead := c.leader()
	l := startLoad(t, 8, func() *Node { return c.node(lead) })
	l.more(c, 4000) // more log than is kept: the newcomer needs a snapshot
	old := c.node(victim).Status().Incarnation
	c.stop(victim)
	if err := os.RemoveAll(c.dirs[victim]); err != nil {
		t.Fatal(err)
	}
	err := c.startWith(c.configOf(victim))
	if !errors.Is(err, ErrWiped) || !strings.Contains(err.Error(), "tercet cluster replace "+victim) {
		t.Fatalf("the wiped node under its old identity: %v", err)
	}
	joining := c.configOf(victim)
	joining.Peers = nil
	joining.Join = []string{c.addrs[c.follower()]}
	if err := c.startWith(joining); !errors.Is(err, ErrWiped) {
		t.Fatalf("joining before being replaced: %v", err)
	}
	if err := c.node(lead).ReplaceMember(testContext(t), victim); err != nil {
		t.Fatalf("replace: %v", err)
	}
	if err := c.startWith(joining); err != nil {
		t.Fatalf("joining: %v", err)
	}
	c.inSync(3)
	l.more(c, 200)
	l.stop()
	s := c.node(victim).Status()
	if s.Incarnation == old || s.Role != Follower {
		t.Fatalf("after the replacement: %+v", s)
	}
	if first := c.node(victim).logs.shard.First(); first == 1 {
		t.Fatal("the newcomer got the whole log: no snapshot was installed")
	}
	c.agree()
	l.check(c, c.node(victim))
	// It also starts again from what it was sent.
	c.tweak = func(cfg *Config) { small(cfg); cfg.Peers = nil }
	c.stop(victim)
	c.start(victim)
	c.inSync(3)
	c.agree()
}

// A fourth node comes in as a non-voter, becomes a voter, and can be removed again.
func TestAddAndRemoveAMember(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	via := c.node(c.follower())
	c.addrs["n4"] = freeAddr(t)
	c.dirs["n4"] = filepath.Join(t.TempDir(), "n4")
	cfg := c.configOf("n4")
	cfg.Peers, cfg.Join = nil, []string{c.addrs["n1"]}
	ctx, cancel := context.WithTimeout(context.Background(), 1500*time.Millisecond)
	defer cancel()
	if n, err := Start(ctx, cfg); err == nil {
		_ = n.Close()
		t.Fatal("a node joined that nobody invited")
	}
	if err := via.AddMember(testContext(t), "n4"); err != nil {
		t.Fatal(err)
	}
	if err := via.AddMember(testContext(t), "n1"); errs.CodeOf(err) != errs.Conflict {
		t.Fatalf("adding a member: %v", err)
	}
	if err := c.startWith(cfg); err != nil {
		t.Fatal(err)
	}
	c.inSync(4)
	if r := must(t, c.node("n4"), Proposal{Command: publishCommand("a", "x")}); r.Zones != 4 {
		t.Fatalf("zones %d", r.Zones)
	}
	c.agree()
	if err := via.RemoveMember(testContext(t), "n4"); err != nil {
		t.Fatal(err)
	}
	c.stop("n4")
	c.inSync(3)
	if r := must(t, via, Proposal{Command: publishCommand("a", "x"), Require: AllZones}); r.Zones != 3 {
		t.Fatalf("zones %d", r.Zones)
	}
	if err := via.RemoveMember(testContext(t), "n9"); errs.CodeOf(err) != errs.NotFound {
		t.Fatalf("removing a stranger: %v", err)
	}
}

// A zone that has a voter gets no second one: the newcomer stays a non-voter until the first is gone.
func TestOneVoterInAZone(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	via := c.node(c.leader())
	c.addrs["n4"] = freeAddr(t)
	c.dirs["n4"] = filepath.Join(t.TempDir(), "n4")
	taken := c.follower()
	cfg := c.configOf("n4")
	cfg.Zone = "zone-" + taken
	cfg.Peers, cfg.Join = nil, []string{c.addrs["n1"]}
	if err := via.AddMember(testContext(t), "n4"); err != nil {
		t.Fatal(err)
	}
	if err := c.startWith(cfg); err != nil {
		t.Fatal(err)
	}
	role := func() Role {
		for _, m := range via.Status().Nodes {
			if m.ID == "n4" {
				return m.Role
			}
		}
		return Outsider
	}
	c.eventually("the newcomer to catch up", func() bool {
		id, ok := via.memberID("n4")
		return ok && via.match(id) > 0 && via.match(id) == via.logs.Last()
	})
	if r := role(); r != NonVoter {
		t.Fatalf("n4 is a %s", r)
	}
	c.stop(taken)
	if err := via.RemoveMember(testContext(t), taken); err != nil {
		t.Fatal(err)
	}
	c.eventually("the newcomer to vote", func() bool { return role() == Follower })
	c.inSync(3)
}

// Leadership goes where it is sent.
func TestTransferLeadership(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	l := startLoad(t, 4, func() *Node { return c.node("n1") })
	for _, name := range []string{"n1", "n2", "n3", "n1"} {
		l.more(c, 20)
		if err := c.node("n2").TransferLeadership(testContext(t), name); err != nil {
			t.Fatalf("to %s: %v", name, err)
		}
		c.eventually(name+" to lead", func() bool { return c.leader() == name })
	}
	l.stop()
	if u := l.unknown.Load(); u != 0 {
		t.Fatalf("%d unknown outcomes", u)
	}
	l.check(c, c.node("n3"))
}

// All nodes are stopped at the same time, as an operator does who stops the cluster: none waits for a majority that will
// not be there, and each stops as soon as its own requests are done.
func TestDrainOfAllNodesAtOnce(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	must(t, c.node("n1"), Proposal{Command: publishCommand("t", "x")})
	ctx := testContext(t)
	var wg sync.WaitGroup
	for _, name := range founders {
		n := c.node(name)
		wg.Go(func() {
			if err := n.Drain(ctx); err != nil && ctx.Err() != nil {
				t.Errorf("draining %s: %v", name, err)
			}
			c.stop(name)
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		t.Error("a node waited for the others")
	}
	c.start(founders...)
	c.inSync(3)
	if a := must(t, c.node(c.leader()), Proposal{Command: receiveCommand("t", "g", 1)}); len(a.Deliveries) != 1 {
		t.Errorf("after the restart: %+v", a)
	}
}

// The last node that runs stops although it can hand over to nobody, with a request that nobody will decide.
func TestDrainOfTheLastNode(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	lead := c.leader()
	var last *Node
	for _, name := range founders {
		switch {
		case name == lead || last != nil:
			c.stop(name)
		default:
			last = c.node(name)
		}
	}
	got := make(chan error, 1)
	last.Submit(Proposal{Command: publishCommand("t", "x")}, func(_ Reply, err error) { got <- err })
	ctx := testContext(t)
	if err := last.Drain(ctx); err == nil || ctx.Err() != nil {
		t.Errorf("drained with %v", err)
	}
	if err := last.Close(); err != nil {
		t.Error(err)
	}
	if err := <-got; err == nil {
		t.Error("a request was done without a majority")
	}
}
