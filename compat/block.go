package compat

import (
	"context"
	"errors"
	"io"
	"os"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// Blocking reads. They wait on the node that leads, whichever node the client talks to: XREADGROUP is a command that stands
// in the lines of its groups there and rides in the entry that brings what it waits for, XREAD is a query that is answered
// when the leader has applied something. When another node leads they wait there, and the client does not notice.

func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// ending is how a wait ended.
type ending uint8

const (
	woken ending = iota
	timedOut
	unblockedNull
	unblockedError
	clientGone
)

// wait blocks the client until it is woken, time is over, or it is released from outside. While it waits the
// connection is watched: a client that has gone must not be given anything.
type wait struct {
	c *conn
	// wake is signalled when there is an outcome.
	wake  chan struct{}
	timer *time.Timer
	time  <-chan time.Time
	from  chan unblock
	// gone is closed when the client has disconnected; peek ends the watching.
	gone     chan struct{}
	peeked   chan struct{}
	peekByte [1]byte
	peekN    int
	peekErr  error
}

// block makes the client wait. The caller must have settled everything before.
func (c *conn) block(timeout time.Duration) *wait {
	b := &wait{c: c, wake: make(chan struct{}, 1), from: make(chan unblock, 1), gone: make(chan struct{}), peeked: make(chan struct{})}
	if timeout > 0 {
		b.timer = time.NewTimer(timeout)
		b.time = b.timer.C
	}
	c.s.blocked.Add(1)
	c.mu.Lock()
	c.blocked = b.from
	if !c.finishing && !c.dead {
		c.nc.SetReadDeadline(time.Time{})
		c.hasDeadline = false
	}
	c.mu.Unlock()
	go b.peek()
	return b
}

// peek reads one byte ahead: it finds out when the client goes.
func (b *wait) peek() {
	defer close(b.peeked)
	b.peekN, b.peekErr = b.c.nc.Read(b.peekByte[:])
	if b.peekErr != nil && !errors.Is(b.peekErr, os.ErrDeadlineExceeded) {
		close(b.gone)
	}
}

// end ends the waiting and gives the reader back what was read ahead.
func (b *wait) end() {
	c := b.c
	if b.timer != nil {
		b.timer.Stop()
	}
	c.nc.SetReadDeadline(time.Unix(1, 0))
	<-b.peeked
	c.mu.Lock()
	c.blocked = nil
	if !c.finishing && !c.dead {
		c.nc.SetReadDeadline(time.Time{})
		c.hasDeadline = false
	}
	c.mu.Unlock()
	c.s.blocked.Add(-1)
	if b.peekN > 0 {
		if err := c.r.Unread(b.peekByte[:b.peekN]); err != nil {
			c.kill("memory")
		}
	}
}

// next waits for the next thing that happens.
func (b *wait) next() ending {
	select {
	case <-b.wake:
		return woken
	case <-b.time:
		return timedOut
	case u := <-b.from:
		if u.withError {
			return unblockedError
		}
		return unblockedNull
	case <-b.gone:
		if errors.Is(b.peekErr, io.EOF) {
			b.c.finish("")
		}
		return clientGone
	case <-b.c.done:
		return clientGone
	case <-b.c.s.draining:
		return timedOut
	}
}

const errUnblocked = "UNBLOCKED client unblocked via CLIENT UNBLOCK"

// finishWait writes the reply of a wait that ended without a result.
func (c *conn) finishWait(e ending) {
	switch e {
	case unblockedError:
		c.w.Error(errUnblocked)
	case clientGone:
		return
	default:
		c.w.NullArray()
	}
}

// waitSlice is how long a read waits at the leader before it is asked for anew.
const waitSlice = 10 * time.Minute

// atOnce is how long an answer may take before the client counts as waiting.
const atOnce = 3 * time.Millisecond

// outcome is what one question of a waiting read came to.
type outcome struct {
	reply  raft.Reply
	answer engine.Answer
	err    error
}

// await asks until there is an outcome to be told, time is over, or the wait is ended from outside. ask waits for slice at
// most; tell words an outcome, or reports false for one that is nothing. What was given is told even if the wait was ended at
// the same moment.
func (c *conn) await(block, slice time.Duration, ask func(ctx context.Context, slice time.Duration) outcome, tell func(o *outcome) bool) {
	started := time.Now()
	left := func() time.Duration { return max(block-time.Since(started), 0) }
	var b *wait
	defer func() {
		if b != nil {
			b.end()
		}
	}()
	for {
		most := slice
		if block > 0 {
			most = min(most, max(left(), time.Millisecond))
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan outcome, 1)
		go func() { done <- ask(ctx, most) }()
		var out outcome
		waits := b != nil
		if !waits {
			soon := time.NewTimer(atOnce)
			select {
			case out = <-done:
			case <-soon.C:
				timeout := block
				if block > 0 {
					// The leader's clock ends the wait; this one is for when there is none.
					timeout = left() + 100*time.Millisecond
				}
				b, waits = c.block(timeout), true
			}
			soon.Stop()
		}
		ended := woken
		if waits {
			received := make(chan struct{})
			go func() {
				out = <-done
				close(received)
				signal(b.wake)
			}()
			if ended = b.next(); ended != woken {
				cancel()
			}
			<-received
		}
		cancel()
		switch {
		case out.err == nil && tell(&out):
			return
		case ended != woken:
			c.finishWait(ended)
			return
		case out.err != nil:
			tell(&out)
			return
		case block > 0 && left() == 0:
			c.w.NullArray()
			return
		}
	}
}

// readBlocking answers XREAD BLOCK.
func (c *conn) readBlocking(op *operation) {
	defer c.emit()
	q := *op.query
	a, err := c.read(&q)
	if err != nil || a.Stream.HasEntries() {
		c.wordRead(&a, err, op)
		return
	}
	// What "$" and "+" meant when the call was made is what they mean while it waits.
	for i := range a.Stream.Reads {
		p := &q.Stream.Streams[i]
		if p.New || p.Tail {
			p.ID, p.New, p.Tail = a.Stream.Reads[i].From, false, false
		}
	}
	c.await(op.block, waitSlice, func(ctx context.Context, slice time.Duration) (o outcome) {
		q := q
		q.Wait = slice
		o.answer, o.err = c.s.backend.Query(ctx, q)
		return o
	}, func(o *outcome) bool {
		if o.err == nil && !o.answer.Stream.HasEntries() {
			return false
		}
		c.wordRead(&o.answer, o.err, op)
		return true
	})
}

// readGroup answers XREADGROUP BLOCK with new entries.
func (c *conn) readGroup(op *operation) {
	defer c.emit()
	if !c.settle() {
		return
	}
	slice := waitSlice
	cmd := encode(op)
	var claim []byte
	if op.group.Claim {
		// Nothing tells when an entry has been idle for long enough: that is looked at now and then.
		claim = cmd
		plain := *op.group
		plain.Claim, plain.ClaimIdle = false, 0
		cmd = plain.AppendTo(nil)
		slice = min(max(time.Duration(op.group.ClaimIdle)*time.Millisecond, claimEveryMin), claimEveryMax)
	}
	gave := func(r *raft.Reply) bool {
		return r.Code != errs.OK || r.Stream != nil && hasEntries(r.Stream.Reads)
	}
	c.await(op.block, slice, func(ctx context.Context, slice time.Duration) (o outcome) {
		if claim != nil {
			if o.reply, o.err = c.s.backend.Propose(ctx, raft.Proposal{Command: claim}); o.err != nil || gave(&o.reply) {
				return o
			}
		}
		o.reply, o.err = c.s.backend.Propose(ctx, raft.Proposal{Command: cmd, Wait: slice})
		return o
	}, func(o *outcome) bool {
		if o.err == nil && !gave(&o.reply) {
			return false
		}
		if o.err == nil && o.reply.Parked {
			c.w.NullArray()
			return true
		}
		wordOutcome(&c.w, op.word, &o.reply.Result, o.err)
		return true
	})
}

// claimEveryMin and claimEveryMax bound how often XREADGROUP CLAIM BLOCK looks for entries that have been idle.
const (
	claimEveryMin = 50 * time.Millisecond
	claimEveryMax = time.Second
)
