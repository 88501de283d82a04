package raft

import (
	"context"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// A node that has brought nothing in while the virtual clock went on for longer than an intake may be silent is served
// as always, and so is a receive that waited meanwhile.
func TestAdvanceIsNotSilence(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.VirtualClock = true })
	c.start(founders...)
	c.inSync(3)
	lead := c.leader()
	type waiter struct {
		name  string
		reply chan Reply
	}
	var waiters []waiter
	for _, name := range founders {
		must(t, c.node(name), Proposal{Command: publishCommand("wait-"+name, "x")})
		must(t, c.node(name), Proposal{Command: receiveCommand("wait-"+name, "g", 1)})
		w := waiter{name, make(chan Reply, 1)}
		waiters = append(waiters, w)
		parked := c.node(lead).coal.lot.len()
		go func() {
			r, err := c.node(name).Propose(testContext(t), Proposal{Command: receiveCommand("wait-"+name, "g", 1), Wait: testTimeout})
			if err != nil {
				t.Errorf("waiting through %s: %v", name, err)
			}
			w.reply <- r
		}()
		c.eventually("the receive to park", func() bool { return c.node(lead).coal.lot.len() > parked })
	}
	ids := make(map[string]engine.IntakeID)
	for _, name := range founders {
		ids[name] = c.node(name).intake.id
	}
	advance := &engine.Advance{By: 700 * time.Second}
	must(t, c.node(lead), Proposal{Command: advance.AppendTo(nil)})
	// The leases of a minute are over.
	for _, w := range waiters {
		if r := <-w.reply; len(r.Deliveries) != 1 || r.Deliveries[0].Count != 2 {
			t.Errorf("waiting through %s: %+v", w.name, r)
		}
	}
	for _, name := range founders {
		must(t, c.node(name), Proposal{Command: publishCommand("after", name)})
		if id := c.node(name).intake.id; id != ids[name] {
			t.Errorf("%s has another intake, %d after %d", name, id, ids[name])
		}
	}
	c.agree()
}

// A node whose intake the cluster has closed opens another one and brings its next command in there.
func TestClosedIntakeIsOpenedAnew(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	for _, name := range []string{c.leader(), c.follower()} {
		n := c.node(name)
		must(t, n, Proposal{Command: publishCommand("before", name)})
		// What closes an intake: another opening of its node, or silence.
		opening := &engine.OpenIntake{Node: n.id, Nonce: 4711}
		closed := make(chan outcome, 1)
		c.node(c.leader()).coal.enqueue(&op{request: request{cmd: opening.AppendTo(nil), kind: opening.Kind(), require: Majority},
			from: originFunc(func(_ *op, out outcome) { closed <- out })})
		if out := <-closed; out.kind != replied {
			t.Fatalf("%+v", out)
		}
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout/2)
		r, err := n.Propose(ctx, Proposal{Command: publishCommand("after", name)})
		cancel()
		if err != nil || r.Code != errs.OK {
			t.Fatalf("through %s: %v, %v", name, r.Code, err)
		}
	}
	c.agree()
}

// An idle node keeps its intake alive.
func TestIdleIntakeIsKeptAlive(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.test.keepIntake = 20 * time.Millisecond })
	c.start(founders...)
	c.inSync(3)
	for _, name := range founders {
		n := c.node(name)
		from := n.intake.lowestNumber()
		c.eventually(name+" to keep its intake alive", func() bool { return n.intake.lowestNumber() >= from+3 })
	}
}
