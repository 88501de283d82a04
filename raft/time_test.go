package raft

import (
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// lease publishes one message and leases it for a minute.
func lease(t *testing.T, n *Node, topic string) engine.Delivery {
	t.Helper()
	must(t, n, Proposal{Command: publishCommand(topic, "x")})
	r := must(t, n, Proposal{Command: receiveCommand(topic, "g", 1)})
	if len(r.Deliveries) != 1 {
		t.Fatalf("%+v", r)
	}
	return r.Deliveries[0]
}

// Decision 14: the wall clock may step by an hour on any node, at any moment and before a start; no lease ends early
// for it, and none lasts longer.
func TestWallClockSteps(t *testing.T) {
	steps := map[string]time.Duration{"n1": 0, "n2": time.Hour, "n3": -time.Hour}
	c := newCluster(t, func(cfg *Config) {
		step := steps[cfg.Name]
		cfg.test.wall = func() time.Time { return time.Now().Add(step) }
	})
	c.start(founders...)
	c.inSync(3)
	var last int64
	for _, name := range founders {
		if err := c.node(name).TransferLeadership(testContext(t), name); err != nil {
			t.Fatal(err)
		}
		c.eventually(name+" to lead", func() bool { return c.leader() == name })
		d := lease(t, c.node(name), "t-"+name)
		if d.PublishedAt < last {
			t.Errorf("under %s the wall stamps fell from %d to %d", name, last, d.PublishedAt)
		}
		last = d.PublishedAt
		for _, other := range founders {
			r := must(t, c.node(other), Proposal{Command: receiveCommand("t-"+name, "g", 1)})
			if len(r.Deliveries) != 0 {
				t.Errorf("leased under %s, given again through %s", name, other)
			}
		}
	}
	// All nodes down, and an hour passes by the wall clock of all.
	d := lease(t, c.node("n1"), "down")
	for _, name := range founders {
		c.stop(name)
		steps[name] += time.Hour
	}
	c.start(founders...)
	c.inSync(3)
	n := c.node(c.leader())
	if r := must(t, n, Proposal{Command: receiveCommand("down", "g", 1)}); len(r.Deliveries) != 0 {
		t.Error("a lease ended while no node ran")
	}
	a := must(t, n, Proposal{Command: ackCommand("down", "g", d)})
	if a.Codes[0] != errs.OK {
		t.Errorf("a receipt within its lease was refused: %v", a.Codes[0])
	}
	c.agree()
}

// The virtual clock advances both clocks through the log, on all nodes alike, and only where it was asked for.
func TestVirtualClock(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.VirtualClock = true })
	c.start(founders...)
	c.inSync(3)
	n := c.node(c.follower())
	first := lease(t, n, "t")
	advance := &engine.Advance{By: 2 * time.Minute}
	must(t, n, Proposal{Command: advance.AppendTo(nil)})
	again := must(t, n, Proposal{Command: receiveCommand("t", "g", 1)})
	if len(again.Deliveries) != 1 || again.Deliveries[0].Count != 2 {
		t.Fatalf("two minutes later a lease of one minute stands: %+v", again)
	}
	stale := must(t, n, Proposal{Command: ackCommand("t", "g", first)})
	if stale.Codes[0] == errs.OK {
		t.Fatal("the stale receipt was accepted")
	}
	// Another leader goes on from there.
	if err := n.TransferLeadership(testContext(t), n.cfg.Name); err != nil {
		t.Fatal(err)
	}
	c.eventually("the new leader", func() bool { return c.leader() == n.cfg.Name })
	second := lease(t, n, "u")
	if second.PublishedAt < first.PublishedAt+2*time.Minute.Milliseconds() {
		t.Fatalf("wall time went back: %d, then %d", first.PublishedAt, second.PublishedAt)
	}
	c.agree()
}

// A clock that is not virtual is not advanced.
func TestRealClockIsNotAdvanced(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.Peers = nil })
	c.start("n1")
	c.leader()
	advance := &engine.Advance{By: 2 * time.Minute}
	_, err := c.node("n1").Propose(testContext(t), Proposal{Command: advance.AppendTo(nil)})
	if errs.CodeOf(err) != errs.Unsupported {
		t.Fatalf("got %v", err)
	}
}

// Commands that are not for clients are refused before anything happens.
func TestCommandsThatAreNotForClients(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.Peers = nil })
	c.start("n1")
	n := c.node(c.leader())
	before := n.Status().AppliedIndex
	for _, cmd := range []engine.Command{
		&engine.Init{ClusterID: "x"}, &engine.OpenIntake{Node: "n1.x"}, &engine.Shrink{Node: n.id}, &engine.Expand{Node: n.id},
	} {
		_, err := n.Propose(testContext(t), Proposal{Command: cmd.AppendTo(nil)})
		if e := errs.From(err); err == nil || e.Code != errs.BadRequest {
			t.Errorf("%T: %v", cmd, err)
		}
	}
	for _, cmd := range [][]byte{nil, {0}, {255, 255}, {4, 1, 2}} {
		if _, err := n.Propose(testContext(t), Proposal{Command: cmd}); errs.CodeOf(err) != errs.BadRequest {
			t.Errorf("% x: %v", cmd, err)
		}
	}
	if after := n.Status().AppliedIndex; after != before {
		t.Errorf("they left entries: %d to %d", before, after)
	}
}
