package server

import (
	"context"
	"errors"
	"net"
	"net/http"
	"time"
)

const (
	// stopPoll is the pace at which a stop looks whether connections are left.
	stopPoll = 2 * time.Millisecond
	// newConnGrace is how long a stop waits for the first request of a connection that it has only just accepted: a
	// client that dials has something to say, unless it keeps spare connections.
	newConnGrace = 250 * time.Millisecond
)

// Drain makes /readyz fail and ends waiting receives with an answer that tells clients to try another node.
// Other requests are served as before; each answer closes its connection.
func (s *Server) Drain() { s.drain(errDraining) }

// Draining reports whether Drain was called.
func (s *Server) Draining() bool { return s.drained.Err() != nil }

// Linger goes on serving while a connection is open, until ctx ends at the latest. It implies Drain, so a client that
// uses its connection at all learns that it is to open another one, elsewhere if it can. Closing an idle connection
// without that is what a client cannot tell from a lost request: its next one may be on the way.
func (s *Server) Linger(ctx context.Context) {
	s.Drain()
	poll(ctx, func() bool { return s.load.connections.count() == 0 })
}

// Shutdown stops taking connections and waits until the requests in flight are answered, or ctx ends; then it closes
// what is left. What has dialled by now, and what of it is on the way, is still served. It implies Drain, and closes
// idle connections at once: Linger comes first.
func (s *Server) Shutdown(ctx context.Context) error {
	s.Drain()
	s.mu.Lock()
	s.stopping = true
	listeners := s.listeners
	s.mu.Unlock()
	for _, l := range listeners {
		if l.refuse() {
			select {
			case <-l.drained: // whoever was let in is counted
			case <-ctx.Done():
			}
		}
	}
	// Only then: net/http drops a request whose head it has read after the beginning of its own Shutdown.
	poll(ctx, func() bool { return s.load.connections.settle(time.Now().Add(-newConnGrace)) })
	if err := s.http.Shutdown(ctx); err != nil {
		return errors.Join(err, s.http.Close())
	}
	return nil
}

// Close stops at once.
func (s *Server) Close() error {
	s.Drain()
	return s.http.Close()
}

// poll waits until done reports true or ctx ends.
func poll(ctx context.Context, done func() bool) {
	tick := time.NewTicker(stopPoll)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// listen makes l known to Shutdown, unless that has begun.
func (s *Server) listen(l net.Listener) (*listener, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping {
		return nil, http.ErrServerClosed
	}
	bound := &listener{Listener: l, s: s, closed: make(chan struct{}), drained: make(chan struct{})}
	s.listeners = append(s.listeners, bound)
	return bound, nil
}

// refuse ends the listening so that nobody who was let in is lost: what waits in the kernel's queue is accepted, and
// what dials after that is refused, which tells the client that nothing happened. It reports whether that is possible
// here.
func (l *listener) refuse() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.refusing {
		l.late, l.refusing = acceptRest(l.Listener)
	}
	return l.refusing
}

// nextLate returns a connection that refuse accepted. After the last it waits for Close, as net/http takes any other
// end of a listener for a failure.
func (l *listener) nextLate(err error) (net.Conn, error) {
	l.mu.Lock()
	refusing := l.refusing
	if len(l.late) > 0 {
		c := l.late[0]
		l.late = l.late[1:]
		l.mu.Unlock()
		return c, nil
	}
	l.mu.Unlock()
	if refusing {
		close(l.drained)
		<-l.closed
	}
	return nil, err
}

// Close implements net.Listener.
func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// The states of a connection.
const (
	connSilent int32 = iota // nothing has come on it yet
	connBusy                // a request comes, is carried out, or is answered
	connIdle                // its last request was answered
)

// settle reports whether no connection is busy. It closes those that were accepted before the given time and that
// nothing has come on; younger ones count as busy.
func (k *connections) settle(before time.Time) bool {
	settled := true
	var silent []*headConn
	k.mu.Lock()
	for c := range k.open {
		switch c.state.Load() {
		case connBusy:
			settled = false
		case connSilent:
			if c.accepted.Before(before) {
				silent = append(silent, c)
			} else {
				settled = false
			}
		}
	}
	k.mu.Unlock()
	for _, c := range silent {
		c.Close()
	}
	return settled
}

// count is the number of open connections.
func (k *connections) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.open)
}
