package raft

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// Decision 15: a cluster in which one node runs an older release is founded at what that one knows, does nothing that
// it does not know, and rises by an entry once all members have said that they know more; then the older release is
// neither started nor admitted any more. The older release is played by a node that claims to know nothing yet.
func TestFeatureLevel(t *testing.T) {
	var old atomic.Bool
	old.Store(true)
	none := uint32(0)
	c := newCluster(t, func(cfg *Config) {
		if cfg.Name == "n3" && old.Load() {
			cfg.test.levelMax = &none
		}
	})
	c.start(founders...)
	c.inSync(3)
	c.leader()
	for _, n := range c.all() {
		if got := n.Status().Level; got != 0 {
			t.Fatalf("%s: founded at level %d", n.cfg.Name, got)
		}
		_, err := n.Propose(testContext(t), Proposal{Command: publishCommand("t", "x")})
		if e := errs.From(err); err == nil || e.Code != errs.Unsupported || e.Outcome() != errs.None {
			t.Fatalf("%s: a command above the level: %v", n.cfg.Name, err)
		}
		// There is nothing to rise to.
		if err := n.Finalize(testContext(t)); err != nil || n.Status().Level != 0 {
			t.Fatalf("%s: %v, level %d", n.cfg.Name, err, n.Status().Level)
		}
	}
	// While a node is away nobody knows what it will come back as.
	c.stop("n3")
	stay := c.node("n1")
	c.eventually("the member's word to be too old", func() bool {
		err := stay.Finalize(testContext(t))
		return errs.CodeOf(err) == errs.Precondition
	})
	old.Store(false)
	c.start("n3")
	c.inSync(3)
	c.leader()
	c.eventually("the level to rise", func() bool {
		err := stay.Finalize(testContext(t))
		if err != nil && errs.CodeOf(err) != errs.Precondition {
			t.Fatal(err)
		}
		for _, n := range c.all() {
			if n.Status().Level != engine.LevelMax() {
				return false
			}
		}
		return true
	})
	for _, n := range c.all() {
		must(t, n, Proposal{Command: publishCommand("t", "x")})
	}
	c.agree()
	// Back to the older release: refused, with the way out.
	c.stop("n3")
	old.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	_, err := Start(ctx, c.configOf("n3"))
	var refusal *StartError
	if !errors.As(err, &refusal) || !errors.Is(err, ErrForeign) || refusal.Remedy == "" {
		t.Fatalf("an older release started on newer state: %v", err)
	}
	cfg := c.configOf("n3")
	cfg.Name, cfg.Dir, cfg.PeerAddr, cfg.Peers, cfg.Join = "n4", t.TempDir(), freeAddr(t), nil, []string{c.addrs["n1"], c.addrs["n2"]}
	if err := stay.AddMember(ctx, "n4"); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(ctx, cfg); !errors.Is(err, ErrRefused) {
		t.Fatalf("an older release joined: %v", err)
	}
}
