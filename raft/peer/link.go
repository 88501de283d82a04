package peer

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"time"
)

// EventKind says what a link has found out about the node at its other end.
type EventKind uint8

// What a link can find out.
const (
	// Up: a connection is established and both ends agreed.
	Up EventKind = 1 + iota
	// Lost: an established connection ended. The link redials at once; what that shows is the next event.
	Lost
	// PortRefused: dialling found a machine on which nothing listens. The process is gone: this is the evidence on
	// which a zone is dropped at once.
	PortRefused
	// TimedOut: dialling or the handshake got no answer: the machine, the network or the process hangs.
	TimedOut
	// Rejected: the other end is there and will not have this node, or is not who it should be.
	Rejected
	// Failed: anything else.
	Failed
)

// String returns the event's name as logs show it.
func (k EventKind) String() string {
	switch k {
	case Up:
		return "up"
	case Lost:
		return "lost"
	case PortRefused:
		return "port refused"
	case TimedOut:
		return "timed out"
	case Rejected:
		return "rejected"
	case Failed:
		return "failed"
	default:
		return "unknown"
	}
}

// Event is one piece of evidence about a node.
type Event struct {
	// Peer and Address are who was dialled and where.
	Peer    ID
	Address string
	// Purpose is which connection it is about.
	Purpose Purpose
	// Kind says what happened, Err in more words (nil for Up).
	Kind EventKind
	Err  error
	// Redial tells whether this link had a connection to that node before.
	Redial bool
	// At is when.
	At time.Time
}

// classify tells what a failed dial or handshake is evidence of.
func classify(err error) EventKind {
	var refused *RefusedError
	if errors.As(err, &refused) {
		return Rejected
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return PortRefused
	}
	var ne net.Error
	if errors.Is(err, context.DeadlineExceeded) || errors.As(err, &ne) && ne.Timeout() {
		return TimedOut
	}
	return Failed
}

// Link keeps one connection of one purpose to one node up: it dials, redials when the connection ends, and hands
// the present connection to whoever needs it.
type Link struct {
	mesh    *Mesh
	peer    ID
	purpose Purpose
	kick    chan struct{} // cap 1: dial now instead of after the backoff

	mu struct {
		sync.Mutex
		address string
		conn    *Conn
		changed chan struct{} // closed and replaced when conn or gone changes
		gone    error         // why the link ended for good
		lastErr error         // of the last dial
		linger  *time.Timer   // set while the node is out of the table and the link lives on for a moment
	}
	cancel context.CancelFunc
}

func newLink(m *Mesh, peer ID, address string, purpose Purpose) *Link {
	l := &Link{mesh: m, peer: peer, purpose: purpose, kick: make(chan struct{}, 1)}
	l.mu.address = address
	l.mu.changed = make(chan struct{})
	ctx, cancel := context.WithCancel(m.ctx)
	l.cancel = cancel
	m.wg.Add(1)
	go func() {
		defer m.wg.Done()
		l.run(ctx)
	}()
	return l
}

// Peer returns who is at the other end.
func (l *Link) Peer() ID { return l.peer }

// Current returns the established connection, nil if there is none.
func (l *Link) Current() *Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.conn != nil && l.mu.conn.ended() {
		return nil // the link has not noticed yet
	}
	return l.mu.conn
}

// Conn returns an established connection, waiting for one as long as ctx allows. The error is ErrClosed,
// ErrRemoved, or a *ConnError that says why there is no connection.
func (l *Link) Conn(ctx context.Context) (*Conn, error) {
	for {
		l.mu.Lock()
		conn, changed, gone, last := l.mu.conn, l.mu.changed, l.mu.gone, l.mu.lastErr
		l.mu.Unlock()
		if gone != nil {
			return nil, gone
		}
		if conn != nil && !conn.ended() {
			return conn, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			cause := context.Cause(ctx)
			if last != nil {
				cause = fmt.Errorf("%w; last attempt: %w", cause, last)
			}
			return nil, &ConnError{Peer: l.peer, Cause: cause}
		}
	}
}

// set publishes a change to those who wait in Conn.
func (l *Link) set(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
	close(l.mu.changed)
	l.mu.changed = make(chan struct{})
}

// wake dials now if the link waits between two attempts: the other node has just been heard.
func (l *Link) wake() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// run dials and redials until the link ends.
func (l *Link) run(ctx context.Context) {
	m := l.mesh
	log := m.log.With("peer", string(l.peer), "purpose", l.purpose.String())
	backoff := m.o.RedialMin
	redial := false
	quietly := EventKind(0) // the kind of failure that has been logged of this link
	for ctx.Err() == nil {
		l.mu.Lock()
		address := l.mu.address
		l.mu.Unlock()
		conn, err := m.dial(ctx, l.peer, address, l.purpose)
		if err != nil {
			if ctx.Err() != nil {
				break
			}
			kind := classify(err)
			l.set(func() { l.mu.lastErr = err })
			if kind != quietly {
				quietly = kind
				log.Log(m.outageLevel(l.peer, err), "cannot connect", "address", address, "evidence", kind.String(), "error", err)
			}
			m.observe(Event{Peer: l.peer, Address: address, Purpose: l.purpose, Kind: kind, Err: err, Redial: redial})
			if !l.pause(ctx, backoff) {
				continue // woken: whoever knocked is there now
			}
			backoff = min(backoff*2, m.o.RedialMax)
			continue
		}
		established := time.Now()
		quietly = 0
		m.outageOver(l.peer)
		l.set(func() { l.mu.conn, l.mu.lastErr = conn, nil })
		log.Info("connected", "address", address)
		m.observe(Event{Peer: l.peer, Address: address, Purpose: l.purpose, Kind: Up, Redial: redial})
		redial = true
		select {
		case <-conn.Done():
		case <-ctx.Done():
			conn.end(ErrClosed)
		}
		err = conn.Err()
		l.set(func() { l.mu.conn, l.mu.lastErr = nil, err })
		if ctx.Err() != nil {
			break
		}
		if quiet(err) {
			log.Info("connection ended", "error", err)
		} else {
			log.Warn("connection lost", "error", err)
		}
		m.observe(Event{Peer: l.peer, Address: address, Purpose: l.purpose, Kind: Lost, Err: err, Redial: true})
		// The first redial comes at once: whether it is refused is the evidence everybody waits for. A node that
		// accepts and closes at once must not be dialled in a loop, though.
		if time.Since(established) > m.o.RedialMax {
			backoff = m.o.RedialMin
		} else {
			if l.pause(ctx, backoff) {
				backoff = min(backoff*2, m.o.RedialMax)
			}
		}
	}
	l.set(func() {
		if l.mu.gone == nil {
			l.mu.gone = ErrClosed
		}
	})
}

// pause waits for d, spread by a quarter either way, and reports false if the link was woken before.
func (l *Link) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d*3/4 + rand.N(d/2+1))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	case <-l.kick:
		return false
	}
	return true
}

// retire ends the link after a moment, in which what is on its way may still arrive: a node that is being removed
// should learn so. stay undoes it.
func (l *Link) retire(after time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.linger == nil {
		l.mu.linger = time.AfterFunc(after, func() {
			l.set(func() { l.mu.gone = ErrRemoved })
			l.cancel()
		})
	}
}

// stay keeps a link whose node is (again) in the table, and reports false if it has ended already.
func (l *Link) stay(address string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mu.gone != nil {
		return false
	}
	l.mu.address = address
	if l.mu.linger != nil {
		if !l.mu.linger.Stop() {
			return false
		}
		l.mu.linger = nil
	}
	return true
}
