package raft

import (
	"context"
	"errors"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// One zone away: in-sync goes on with two, all is refused with nothing stored; back, it is three again.
func TestZoneAwayAndBack(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	away := c.follower()
	lead := c.leader()
	if r := must(t, c.node(lead), Proposal{Command: publishCommand("a", "three")}); r.Zones != 3 {
		t.Fatalf("zones %d", r.Zones)
	}
	if r := must(t, c.node(lead), Proposal{Command: publishCommand("a", "three"), Require: AllZones}); r.Zones != 3 {
		t.Fatalf("zones %d", r.Zones)
	}
	c.stop(away)
	// The publish that runs into the gap is acknowledged as soon as the set has shrunk: the port refuses.
	if r := must(t, c.node(lead), Proposal{Command: publishCommand("a", "two")}); r.Zones != 2 {
		t.Fatalf("zones %d", r.Zones)
	}
	c.inSync(2)
	before := c.node(lead).Status().AppliedIndex
	for _, name := range founders {
		if name == away {
			continue
		}
		_, err := c.node(name).Propose(testContext(t), Proposal{Command: publishCommand("b", "refused"), Require: AllZones})
		e, ok := errors.AsType[*errs.Error](err)
		if !ok || e.Code != errs.ZonesUnavailable || e.Outcome() != errs.None || e.RetryAfter <= 0 {
			t.Fatalf("all with a zone away, through %s: %v", name, err)
		}
	}
	if after := c.node(lead).Status().AppliedIndex; after != before {
		t.Fatalf("a refused publish left entries: %d to %d", before, after)
	}
	c.start(away)
	c.inSync(3)
	if r := must(t, c.node(away), Proposal{Command: publishCommand("a", "three again"), Require: AllZones}); r.Zones != 3 {
		t.Fatalf("zones %d", r.Zones)
	}
	c.agree()
}

// The other side of the race: the zone goes after the publish was proposed. It cannot be called failed.
func TestAllWithAZoneLostAfterProposing(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.ZoneTimeout = time.Hour })
	c.start(founders...)
	c.inSync(3)
	lead, away := c.leader(), c.follower()
	n := c.node(lead)
	// The set is kept complete by hand: nobody proposes the shrink.
	n.policyMu.Lock()
	n.policy.follow()
	n.policyMu.Unlock()
	c.stop(away)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	result := make(chan error, 1)
	go func() {
		_, err := n.Propose(ctx, Proposal{Command: publishCommand("a", "x"), Require: AllZones})
		result <- err
	}()
	c.eventually("the publish to be applied", func() bool {
		a, err := n.Query(testContext(t), engine.Query{Kind: engine.QueryTopic, Topic: "a"})
		return err == nil && len(a.Topics) == 1 && a.Topics[0].Next == 1
	})
	cancel() // its time is over
	err := <-result
	e, ok := errors.AsType[*errs.Error](err)
	if !ok || e.Code != errs.OutcomeUnknown || e.Outcome() != errs.Unknown {
		t.Fatalf("got %v", err)
	}
	// It was committed all the same.
	got := must(t, n, Proposal{Command: receiveCommand("a", "g", 1)})
	if len(got.Deliveries) != 1 {
		t.Fatalf("%+v", got)
	}
	c.eventually("nothing waiting for the lost zone", func() bool { n.acks.advance(); return n.intake.outstanding() == 0 })
}

// Durability all as the node's default.
func TestDurabilityAll(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.Durability = All })
	c.start(founders...)
	c.inSync(3)
	lead, away := c.leader(), c.follower()
	if r := must(t, c.node(lead), Proposal{Command: publishCommand("a", "x")}); r.Zones != 3 {
		t.Fatalf("zones %d", r.Zones)
	}
	c.stop(away)
	c.inSync(2)
	_, err := c.node(lead).Propose(testContext(t), Proposal{Command: publishCommand("a", "y")})
	if errs.CodeOf(err) != errs.ZonesUnavailable {
		t.Fatalf("got %v", err)
	}
	// Leases and acknowledgements wait for a majority only.
	got := must(t, c.node(lead), Proposal{Command: receiveCommand("a", "g", 10)})
	if len(got.Deliveries) != 1 {
		t.Fatalf("%+v", got)
	}
	must(t, c.node(lead), Proposal{Command: ackCommand("a", "g", got.Deliveries...)})
}

// OnlyMajority does not wait for the third zone, even while it counts as in sync. Whoever asks for all still gets it.
func TestOnlyMajority(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.Durability, cfg.ZoneTimeout = OnlyMajority, time.Hour })
	c.start(founders...)
	c.inSync(3)
	if r := must(t, c.node(c.leader()), Proposal{Command: publishCommand("a", "x"), Require: AllZones}); r.Zones != 3 {
		t.Fatalf("zones %d", r.Zones)
	}
	lead, away := c.leader(), c.follower()
	n := c.node(lead)
	// As above: nobody proposes the shrink.
	n.policyMu.Lock()
	n.policy.follow()
	n.policyMu.Unlock()
	c.stop(away)
	// What is counted in the reply is known for certain, which may be less than what the commit implies.
	if r := must(t, n, Proposal{Command: publishCommand("a", "y")}); r.Zones < 1 || r.Zones > 2 {
		t.Fatalf("zones %d", r.Zones)
	}
	if set := n.Status().InSync; len(set) != 3 {
		t.Fatalf("in sync: %v", set)
	}
}
