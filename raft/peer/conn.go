package peer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
)

// Conn is one established connection that this node dialled. It asks; the other end answers in any order.
type Conn struct {
	*wire
	remote  Remote
	purpose Purpose
	last    atomic.Uint64 // number of the newest request

	pending struct {
		sync.Mutex
		calls map[uint64]func([]byte, error)
		ended bool
	}
}

// Remote returns who is at the other end.
func (c *Conn) Remote() Remote { return c.remote }

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err returns why the connection ended; it is meaningful once Done is closed.
func (c *Conn) Err() error { return c.reason() }

// Close ends the connection. Requests without an answer fail with a *ConnError.
func (c *Conn) Close() { c.end(errLinger) }

// Go sends a request and calls done with the answer, exactly once and from the connection's own goroutine: done
// must not block. An error is a *RemoteError when the other node answered with one, else a *ConnError. The body
// must not be changed until done was called.
//
// Go itself never blocks: its caller bounds what it has unanswered. Requests of one caller arrive in the order
// of their calls.
func (c *Conn) Go(kind Kind, shard uint16, body [][]byte, done func(reply []byte, err error)) {
	_ = c.request(kind, shard, body, done)
}

func (c *Conn) request(kind Kind, shard uint16, body [][]byte, done func([]byte, error)) uint64 {
	id := c.last.Add(1)
	c.pending.Lock()
	if c.pending.ended {
		c.pending.Unlock()
		done(nil, &ConnError{Peer: c.remote.ID, Cause: c.reason()})
		return id
	}
	c.pending.calls[id] = done
	c.pending.Unlock()
	if err := c.send(kind, 0, shard, id, body); err != nil {
		if done := c.take(id); done != nil {
			done(nil, &ConnError{Peer: c.remote.ID, Cause: err})
		}
	}
	return id
}

// take removes a pending request and returns what to call for it, nil if that has been done.
func (c *Conn) take(id uint64) func([]byte, error) {
	c.pending.Lock()
	defer c.pending.Unlock()
	done := c.pending.calls[id]
	delete(c.pending.calls, id)
	return done
}

// Call sends a request and waits for its answer. When ctx ends first, the other node is told that nobody waits.
func (c *Conn) Call(ctx context.Context, kind Kind, shard uint16, body ...[]byte) ([]byte, error) {
	type answer struct {
		reply []byte
		err   error
	}
	got := make(chan answer, 1)
	id := c.request(kind, shard, body, func(reply []byte, err error) { got <- answer{reply, err} })
	select {
	case a := <-got:
		return a.reply, a.err
	case <-ctx.Done():
		if c.take(id) == nil {
			// The answer won the race.
			a := <-got
			return a.reply, a.err
		}
		_ = c.send(kindCancel, 0, shard, id, nil) // a broken connection cancels as well
		return nil, &ConnError{Peer: c.remote.ID, Sent: true, Cause: context.Cause(ctx)}
	}
}

// Stream sends frames that belong to the request of the given number, waiting while more than room bytes are
// queued. It is how the parts of a snapshot travel: no frame of them is answered.
func (c *Conn) Stream(kind Kind, shard uint16, request uint64, body [][]byte, room int) error {
	if err := c.sendWait(kind, 0, shard, request, body, room); err != nil {
		return &ConnError{Peer: c.remote.ID, Sent: true, Cause: err}
	}
	return nil
}

// Begin is Go that also returns the request's number, for Stream.
func (c *Conn) Begin(kind Kind, shard uint16, body [][]byte, done func(reply []byte, err error)) uint64 {
	return c.request(kind, shard, body, done)
}

// readLoop hands answers to those who wait for them until the connection ends.
func (c *Conn) readLoop() {
	for {
		f, err := readFrame(c.br, bodyMax)
		if err == nil {
			err = c.dispatch(f)
		}
		if err != nil {
			c.end(err)
			break
		}
	}
	c.pending.Lock()
	calls := c.pending.calls
	c.pending.calls = nil
	c.pending.ended = true
	c.pending.Unlock()
	cause := c.reason()
	for _, done := range calls {
		done(nil, &ConnError{Peer: c.remote.ID, Sent: true, Cause: cause})
	}
}

func (c *Conn) dispatch(f frame) error {
	switch {
	case f.kind == kindPong:
		return nil
	case f.kind == kindRefuse:
		if e, ok := decodeRefusal(f.body); ok {
			return e
		}
		return &FrameError{Reason: "refusal cut short"}
	case f.flags&flagReply == 0:
		return &FrameError{Reason: fmt.Sprintf("request of kind %d on a connection this node dialled", f.kind)}
	}
	done := c.take(f.request)
	if done == nil {
		return nil // its caller no longer waits
	}
	if f.flags&flagError != 0 {
		done(nil, decodeRemoteError(f.body))
		return nil
	}
	done(f.body, nil)
	return nil
}

// quiet tells whether an ended connection is an ordinary event: the other process went away.
func quiet(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, errLinger) || errors.Is(err, ErrClosed) || errors.Is(err, ErrRemoved)
}
