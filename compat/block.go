package compat

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// Blocking reads. A client that finds nothing waits at its own node for changes that this node applies, and asks again, so
// a change of leader is nothing it has to know of. XREAD is a query and asks as soon as anything happened. XREADGROUP is a
// command: its waiters stand in line, one line for each group, and the first of a line asks when something happened; when it
// was served, or leaves, the next one asks.

// waitHall knows who waits for which stream on this node.
type waitHall struct {
	s      *Server
	mu     sync.Mutex
	topics map[string]*waitTopic
}

// waitTopic is one watched stream.
type waitTopic struct {
	name string
	end  chan struct{}
	// readers wait in XREAD, lines in XREADGROUP by group.
	readers map[*waiter]struct{}
	lines   map[string][]*waiter
}

// waiter is one blocked client.
type waiter struct {
	// wake is signalled when the waiter should ask again.
	wake  chan struct{}
	keys  []string
	group string
	// isGroup is set for XREADGROUP.
	isGroup bool
}

func (h *waitHall) init(s *Server) {
	h.s = s
	h.topics = map[string]*waitTopic{}
}

// enter makes w wait for its keys.
func (h *waitHall) enter(w *waiter) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, key := range w.keys {
		t := h.topics[key]
		if t == nil {
			t = &waitTopic{name: key, end: make(chan struct{}), readers: map[*waiter]struct{}{}, lines: map[string][]*waiter{}}
			h.topics[key] = t
			appended, endAppended := h.s.backend.Watch(raft.WatchTopic, key)
			changed, endChanged := h.s.backend.Watch(raft.WatchTopics, "")
			go func() {
				defer endAppended()
				defer endChanged()
				for {
					select {
					case <-appended:
						h.notify(t, false)
					case <-changed:
						h.notify(t, true)
					case <-t.end:
						return
					}
				}
			}()
		}
		if !w.isGroup {
			t.readers[w] = struct{}{}
			continue
		}
		line := t.lines[w.group]
		known := false
		for _, x := range line {
			known = known || x == w
		}
		if !known {
			t.lines[w.group] = append(line, w)
		}
	}
}

// leave ends w's waiting. Whoever stands behind it in a line takes its turn: w may have been woken for something it did
// not take.
func (h *waitHall) leave(w *waiter) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, key := range w.keys {
		t := h.topics[key]
		if t == nil {
			continue
		}
		delete(t.readers, w)
		if line := t.lines[w.group]; w.isGroup {
			for i, x := range line {
				if x != w {
					continue
				}
				line = append(line[:i:i], line[i+1:]...)
				if len(line) == 0 {
					delete(t.lines, w.group)
				} else {
					t.lines[w.group] = line
					if i == 0 {
						signal(line[0].wake)
					}
				}
				break
			}
		}
		if len(t.readers) == 0 && len(t.lines) == 0 {
			close(t.end)
			delete(h.topics, key)
		}
	}
}

// notify wakes those who may find something: all of XREAD, the first of each line, and everybody when keys came or went,
// since a group that is gone ends all of its waits.
func (h *waitHall) notify(t *waitTopic, all bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for w := range t.readers {
		signal(w.wake)
	}
	for _, line := range t.lines {
		if !all {
			line = line[:1]
		}
		for _, w := range line {
			signal(w.wake)
		}
	}
}

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

// wait blocks the client until its waiter is woken, time is over, or it is released from outside. While it waits the
// connection is watched: a client that has gone must not be given anything.
type wait struct {
	c     *conn
	w     *waiter
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
func (c *conn) block(w *waiter, timeout time.Duration) *wait {
	b := &wait{c: c, w: w, from: make(chan unblock, 1), gone: make(chan struct{}), peeked: make(chan struct{})}
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
	case <-b.w.wake:
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

// retryPause is how long a blocked read pauses after a failure that is the node's and not its own.
const retryPause = 100 * time.Millisecond

// readBlocking answers XREAD BLOCK.
func (c *conn) readBlocking(op *operation) {
	defer c.emit()
	q := op.query
	w := &waiter{wake: make(chan struct{}, 1)}
	for i := range q.Stream.Streams {
		w.keys = append(w.keys, q.Stream.Streams[i].Key)
	}
	c.s.waits.enter(w)
	defer c.s.waits.leave(w)
	var b *wait
	started := time.Now()
	for {
		a, err := c.read(q)
		if err != nil || hasEntries(a.Stream.Reads) {
			// Once it waits, a client does not hear of elections.
			if err == nil || b == nil || isRefusal(errs.CodeOf(err)) {
				if b != nil {
					b.end()
				}
				c.wordRead(&a, err, op)
				return
			}
			time.AfterFunc(retryPause, func() { signal(w.wake) })
		} else {
			// What "$" and "+" meant when the call was made is what they mean while it waits.
			for i := range a.Stream.Reads {
				p := &q.Stream.Streams[i]
				if p.New || p.Tail {
					p.ID, p.New, p.Tail = a.Stream.Reads[i].From, false, false
				}
			}
		}
		if b == nil {
			left := op.block
			if left > 0 {
				left = max(left-time.Since(started), time.Millisecond)
			}
			b = c.block(w, left)
		}
		if e := b.next(); e != woken {
			b.end()
			c.finishWait(e)
			return
		}
	}
}

// waitSlice is how long a read of one stream waits at the leader before it is asked for anew.
const waitSlice = 10 * time.Minute

// atOnce is how long an answer may take before the client counts as waiting.
const atOnce = 3 * time.Millisecond

// readGroup answers XREADGROUP BLOCK with new entries.
func (c *conn) readGroup(op *operation) {
	defer c.emit()
	if !c.settle() {
		return
	}
	if len(op.group.Streams) == 1 {
		c.readParked(op)
		return
	}
	c.readLines(op)
}

// readParked waits for new entries of one stream at the leader, where the read rides in the entry that carries them.
func (c *conn) readParked(op *operation) {
	cmd := encode(op)
	type outcome struct {
		reply raft.Reply
		err   error
	}
	started := time.Now()
	var b *wait
	defer func() {
		if b != nil {
			b.end()
		}
	}()
	for {
		slice := waitSlice
		if op.block > 0 {
			slice = min(slice, max(op.block-time.Since(started), time.Millisecond))
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan outcome, 1)
		go func() {
			reply, err := c.s.backend.Propose(ctx, raft.Proposal{Command: cmd, Wait: slice})
			done <- outcome{reply, err}
		}()
		ended := woken
		var out outcome
		if b == nil {
			soon := time.NewTimer(atOnce)
			select {
			case out = <-done:
				soon.Stop()
				done = nil
			case <-soon.C:
				left := op.block
				if left > 0 {
					// The leader's clock ends the wait; this one is for when there is none.
					left = max(left-time.Since(started), 0) + 100*time.Millisecond
				}
				b = c.block(&waiter{wake: make(chan struct{}, 1)}, left)
			}
		}
		if done != nil {
			received := make(chan struct{})
			go func() {
				out = <-done
				close(received)
				signal(b.w.wake)
			}()
			if ended = b.next(); ended != woken {
				cancel()
			}
			<-received
		}
		cancel()
		got := out.err == nil && (out.reply.Code != errs.OK || out.reply.Stream != nil && hasEntries(out.reply.Stream.Reads))
		switch {
		case got:
			// What was given is delivered even if the wait was ended at the same moment.
			if out.reply.Parked {
				c.w.NullArray()
				return
			}
			wordOutcome(&c.w, op.word, &out.reply.Result, nil)
			return
		case ended != woken:
			c.finishWait(ended)
			return
		case out.err != nil:
			wordOutcome(&c.w, op.word, nil, out.err)
			return
		case op.block > 0 && time.Since(started) >= op.block:
			c.w.NullArray()
			return
		}
	}
}

// readLines waits for new entries of several streams.
func (c *conn) readLines(op *operation) {
	w := &waiter{wake: make(chan struct{}, 1), isGroup: true, group: op.group.Group}
	for i := range op.group.Streams {
		w.keys = append(w.keys, op.group.Streams[i].Key)
	}
	c.s.waits.enter(w)
	defer c.s.waits.leave(w)
	cmd := encode(op)
	var b *wait
	started := time.Now()
	for {
		ctx, cancel := context.WithTimeout(context.Background(), c.s.limits.RequestTimeout)
		reply, err := c.s.backend.Propose(ctx, raft.Proposal{Command: cmd})
		cancel()
		switch {
		case err != nil && (b == nil || isRefusal(errs.CodeOf(err))),
			err == nil && (reply.Code != errs.OK || reply.Stream != nil && hasEntries(reply.Stream.Reads)):
			if b != nil {
				b.end()
			}
			wordOutcome(&c.w, op.word, &reply.Result, err)
			return
		case err != nil:
			time.AfterFunc(retryPause, func() { signal(w.wake) })
		}
		if b == nil {
			left := op.block
			if left > 0 {
				left = max(left-time.Since(started), time.Millisecond)
			}
			b = c.block(w, left)
		}
		if e := b.next(); e != woken {
			b.end()
			c.finishWait(e)
			return
		}
	}
}
