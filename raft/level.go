package raft

import (
	"context"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// How releases mix (decision 15). The replicated state holds a feature level. Each node tells the others the highest one
// that its release knows: when it is founded or joins, and with every card. A cluster is founded at the lowest level of
// its founders; a leader proposes only commands of the level; and the level rises by an entry, at an operator's wish,
// once every member has said lately that it knows the new one. A node whose release knows less than the cluster's level
// is neither admitted nor started.

// levelNewsMax is how old a member's word about the level it knows may be.
const levelNewsMax = 3 * time.Second

// sameRelease is the way out for a node whose release is too old.
const sameRelease = "run the release that the other nodes run"

// levelMax is the highest feature level this node knows.
func (n *Node) levelMax() uint32 {
	if n.cfg.test.levelMax != nil {
		return *n.cfg.test.levelMax
	}
	return engine.LevelMax()
}

// foundingLevel is the level a cluster begins with.
func (n *Node) foundingLevel() uint32 {
	level := n.levelMax()
	for _, s := range n.configuration().Servers {
		if id := engine.NodeID(s.ID); id != n.id {
			// The founders have told it when they came to know each other; one that was restarted since has its card.
			if c, _ := n.directory.get(id); c.levelKnown() {
				level = min(level, *c.Level)
			}
		}
	}
	return level
}

// levelOfAll is the highest level that every member has lately said it knows.
func (n *Node) levelOfAll() (uint32, error) {
	level := n.levelMax()
	now := n.now()
	for _, s := range n.configuration().Servers {
		id := engine.NodeID(s.ID)
		if id == n.id {
			continue
		}
		c, at := n.directory.get(id)
		if !c.levelKnown() || at.IsZero() || now.Sub(at) > levelNewsMax {
			return 0, errs.New(errs.Precondition, "node %s is away: which feature level its release knows is not certain", nameOf(id))
		}
		level = min(level, *c.Level)
	}
	return level, nil
}

// finalize raises the feature level to what every member knows.
func (n *Node) finalize(ctx context.Context) error {
	level, err := n.levelOfAll()
	if err != nil {
		return err
	}
	if level <= n.eng.Level() {
		return nil
	}
	done := make(chan outcome, 1)
	cmd := &engine.Level{Level: level}
	n.coal.enqueue(&op{request: request{cmd: cmd.AppendTo(nil), kind: cmd.Kind(), require: Majority}, urgent: true,
		from: originFunc(func(_ *op, out outcome) { done <- out })})
	select {
	case out := <-done:
		if out.kind != replied {
			return errs.Of(errs.OutcomeUnknown)
		}
	case <-ctx.Done():
		return errs.Of(errs.OutcomeUnknown).With(context.Cause(ctx))
	case <-n.stop:
		return errs.Of(errs.Draining)
	}
	n.log.Info("the feature level has risen", "level", level)
	return nil
}

// Finalize raises the cluster's feature level to the highest that every member knows: what newer releases can do is in
// use from then on, and no older one can take part any more. It refuses while a member is away, and does nothing when
// the level is reached.
func (n *Node) Finalize(ctx context.Context) error {
	return n.admin(ctx, adminRequest{Do: "finalize"})
}

// belowLevel refuses a command that the cluster's level does not have.
func (n *Node) belowLevel(o *op) *errs.Error {
	if need, have := o.kind.Level(), n.eng.Level(); need > have {
		return errs.New(errs.Unsupported, "the cluster is at feature level %d, and this needs %d: upgrade all nodes, then tercet cluster finalize", have, need)
	}
	return nil
}

// tooOld reports whether a node that knows that level cannot be a member.
func (n *Node) tooOld(level uint32) bool { return level < n.eng.Level() }
