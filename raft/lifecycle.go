package raft

import (
	"context"
	"errors"
	"slices"
	"time"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// drainPoll is how often Drain looks whether what it waits for has come.
const drainPoll = 2 * time.Millisecond

// Leave is the first half of a stop: nothing depends on the node any more, and it goes on serving.
//
//  1. The coalescer is paused: what arrives goes back to its origin and waits there for the next leader.
//  2. What is in flight is applied, and the watermark reaches what waits for it.
//  3. The node leaves the in-sync set, so that nobody waits for it once it is gone.
//  4. Leadership goes to the in-sync voter whose disk has most.
//
// Requests of the node's own clients go to the new leader. A node that cannot hand over (it is the only voter, or no
// other is in sync) stays what it is. When so many others have gone, or are about to, that no majority can take over,
// there is nothing to wait for.
func (n *Node) Leave(ctx context.Context) error {
	if n.draining.CompareAndSwap(false, true) {
		n.log.Info("draining")
		n.exchangeNow()
	}
	if len(n.voters()) <= 1 || !n.isVoter(n.id) {
		return nil
	}
	ctx, stop := n.whileMajority(ctx, n.stays)
	defer stop()
	err := n.handOver(ctx)
	switch {
	case err == nil:
	case errors.Is(context.Cause(ctx), errNoMajority):
		n.log.Info("not handing over", "reason", errNoMajority)
		return nil
	default:
		n.log.Warn("leaving without having handed over", "error", err)
	}
	return err
}

// errNoMajority ends what only a majority could bring about.
var errNoMajority = errors.New("a majority of the voters has gone or is stopping")

// whileMajority derives a context that ends when so many voters are gone that no majority is left, this node included.
func (n *Node) whileMajority(ctx context.Context, there func(engine.NodeID) bool) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	missing := func() bool {
		voters, left := n.voters(), 0
		for _, id := range voters {
			if id == n.id || there(id) {
				left++
			}
		}
		return left <= len(voters)/2
	}
	if missing() {
		cancel(errNoMajority)
		return ctx, func() {}
	}
	if !n.spawn(func() {
		t := time.NewTicker(policyEvery)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-n.stop:
				return
			case <-t.C:
				if missing() {
					cancel(errNoMajority)
				}
			}
		}
	}) {
		cancel(ErrClosed)
	}
	return ctx, func() { cancel(nil) }
}

// runs reports whether a node's port is not known to be closed, stays whether it is not stopping either.
func (n *Node) runs(id engine.NodeID) bool { return !n.refusing(id) }

func (n *Node) stays(id engine.NodeID) bool {
	c, at := n.directory.get(id)
	return n.runs(id) && !(c.Draining && n.now().Sub(at) < leaderNewsMax)
}

// Drain takes the node out of service without an unknown outcome (decision 28): it does what Leave does, refuses new
// requests, and waits until what was taken is done. Messages of other nodes are passed on until Close.
func (n *Node) Drain(ctx context.Context) error {
	if n.drained.Swap(true) {
		return nil
	}
	// Again after a Leave: a node that stayed long enough may have been taken into the in-sync set once more.
	err := n.Leave(ctx)
	// From here on new requests are refused and waiting receives are answered; what else was taken finishes at
	// the leader.
	n.intake.refuse(errs.Of(errs.Draining))
	if len(n.voters()) > 1 {
		var stop context.CancelFunc
		ctx, stop = n.whileMajority(ctx, n.runs)
		defer stop()
	}
	for n.intake.outstanding() > 0 {
		if perr := n.pause(ctx); perr != nil {
			return errors.Join(err, perr)
		}
	}
	return err
}

// handOver takes the node out of the in-sync set, and out of the lead.
func (n *Node) handOver(ctx context.Context) error {
	for {
		set := n.inSync.Load()
		in := set != nil && slices.Contains(set.Nodes, n.id)
		leads := n.raft.State() == hraft.Leader
		switch {
		case !leads && !in:
			return nil
		case !leads:
			// The leader proposes the shrink; a follower asks it to.
			if err := n.leaveSet(ctx); err != nil {
				return err
			}
		default:
			if err := n.stepDown(ctx, in); err != nil {
				return err
			}
		}
		if err := n.pause(ctx); err != nil {
			return err
		}
	}
}

// leaveSet proposes this node's own shrink through the leader.
func (n *Node) leaveSet(ctx context.Context) error {
	set := n.inSync.Load()
	if len(set.Nodes) == 1 {
		return nil
	}
	cmd := &engine.Shrink{Node: n.id, Epoch: set.Epoch}
	c := &call{first: op{request: request{cmd: cmd.AppendTo(nil), kind: cmd.Kind(), require: Majority}}}
	if _, err := n.intake.do(ctx, c); err != nil {
		return err
	}
	return nil
}

// stepDown does what a leader does before it leaves.
func (n *Node) stepDown(ctx context.Context, in bool) error {
	if _, err := n.successor(""); err != nil {
		return err
	}
	n.coal.setMode(paused)
	for n.acks.waiting() > 0 {
		if err := n.pause(ctx); err != nil {
			return err
		}
	}
	if in {
		set := n.inSync.Load()
		done := make(chan outcome, 1)
		cmd := &engine.Shrink{Node: n.id, Epoch: set.Epoch}
		n.coal.enqueue(&op{request: request{cmd: cmd.AppendTo(nil), kind: cmd.Kind(), require: Majority}, urgent: true,
			from: originFunc(func(_ *op, out outcome) { done <- out })})
		select {
		case <-done:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-n.stop:
			return ErrClosed
		}
	}
	err := n.transfer(ctx, "")
	if err != nil && n.raft.State() != hraft.Leader {
		return nil
	}
	return err
}

// pause waits a moment.
func (n *Node) pause(ctx context.Context) error {
	select {
	case <-time.After(drainPoll):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-n.stop:
		return ErrClosed
	}
}

// Close stops the node. It does not wait for other nodes; call Drain first for a stop without consequences.
//
// The order: requests end (with an unknown outcome where they may have been proposed); the service closes; the
// node's own goroutines; raft, with its transport, since its replication goroutines wait in there; the mesh, whose
// handlers may still read the store; the store; the log; the directory's lock.
func (n *Node) Close() error {
	n.setErr(ErrClosed)
	n.closeOnce.Do(func() {
		n.spawnMu.Lock()
		n.closing.Store(true)
		n.spawnMu.Unlock()
		n.closeErr = n.close()
		close(n.done)
	})
	<-n.done
	return n.closeErr
}

func (n *Node) close() error {
	var errList []error
	if n.intake != nil {
		n.intake.close(errs.Of(errs.Draining))
	}
	if n.coal != nil {
		n.serviceMu.Lock()
		n.closeService()
		n.serviceMu.Unlock()
	}
	close(n.stop)
	n.wg.Wait()
	if n.raft != nil {
		down := n.raft.Shutdown()
		_ = n.trans.Load().Close() // returns nil
		errList = append(errList, down.Error())
	} else if t := n.trans.Load(); t != nil {
		_ = t.Close() // returns nil
	}
	if n.mesh != nil {
		errList = append(errList, n.mesh.Close())
	}
	if n.logs != nil {
		errList = append(errList, n.logs.Close())
	}
	if n.eng != nil {
		errList = append(errList, n.eng.Close())
	}
	if n.wal != nil {
		if err := n.wal.Close(); err != nil && n.wal.Err() == nil {
			errList = append(errList, err)
		}
	}
	if n.dir != nil {
		errList = append(errList, n.dir.close())
	}
	n.metrics.unregister()
	return errors.Join(errList...)
}
