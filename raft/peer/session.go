package peer

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// Handler serves the requests of one shard on control, data and snapshot connections.
type Handler interface {
	// HandleRequest is called for each request, in the order of arrival on its connection and on that
	// connection's goroutine: it must not block, except on a snapshot connection, where blocking holds the
	// sender back. It keeps r and answers it whenever it likes.
	HandleRequest(r *Request)
}

// ForwardHandler serves forwarded requests, each on its own goroutine. ctx ends when the asking node no longer
// waits, its connection is gone, or the mesh closes. An error reaches the asker as *RemoteError with its text.
type ForwardHandler func(ctx context.Context, from Remote, kind Kind, body []byte) (reply []byte, err error)

// IntroduceHandler answers a node that may belong to no cluster yet, or to another one.
type IntroduceHandler func(ctx context.Context, from Remote, body []byte) (reply []byte, err error)

// Session is one connection that another node dialled.
type Session struct {
	*wire
	mesh    *Mesh
	remote  Remote
	purpose Purpose
	ctx     context.Context // ends with the connection
	cancel  context.CancelFunc

	mu struct {
		sync.Mutex
		forwarded map[uint64]context.CancelFunc
	}
}

// Remote returns who dialled.
func (s *Session) Remote() Remote { return s.remote }

// Purpose returns what the connection is for.
func (s *Session) Purpose() Purpose { return s.purpose }

// Done is closed when the connection has ended: nobody waits for answers any more.
func (s *Session) Done() <-chan struct{} { return s.done }

// Context ends with the connection.
func (s *Session) Context() context.Context { return s.ctx }

// Close ends the connection and says why in the log: what arrived on it cannot be trusted.
func (s *Session) Close(reason error) { s.end(reason) }

// Request is one request as it arrived.
type Request struct {
	// Session is the connection it came on.
	Session *Session
	// Kind, Shard and Number are the frame's. Number is unique on the connection while unanswered.
	Kind   Kind
	Shard  uint16
	Number uint64
	// Body is freshly allocated and belongs to the handler.
	Body []byte

	answered atomic.Bool
	// counted is set while the request is among the forwarded ones in hand.
	counted bool
}

// answer reports whether this is the first answer.
func (r *Request) answer() bool {
	if !r.answered.CompareAndSwap(false, true) {
		return false
	}
	if r.counted {
		r.Session.mesh.forwarding.Add(-1)
		r.Session.mesh.forwardBytes.Add(-int64(len(r.Body)))
	}
	return true
}

// Reply answers the request. It never blocks and may be called from any goroutine; only the first answer counts.
func (r *Request) Reply(body ...[]byte) {
	if r.answer() {
		if err := r.Session.send(r.Kind, flagReply, r.Shard, r.Number, body); err != nil {
			if _, tooLarge := errors.AsType[*FrameError](err); tooLarge {
				_ = r.Session.send(r.Kind, flagReply|flagError, r.Shard, r.Number,
					[][]byte{encodeRemoteError(CodeFailed, err.Error())})
			}
		}
	}
}

// Fail answers the request with a *RemoteError.
func (r *Request) Fail(code Code, text string) {
	if r.answer() {
		_ = r.Session.send(r.Kind, flagReply|flagError, r.Shard, r.Number, [][]byte{encodeRemoteError(code, text)})
	}
}

// readLoop takes requests until the connection ends.
func (s *Session) readLoop() {
	limit := bodyMax
	if s.purpose == Introduction {
		limit = introduceMax
	}
	for {
		f, err := readFrame(s.br, limit)
		if err == nil {
			err = s.dispatch(f)
		}
		if err != nil {
			s.end(err)
			return
		}
	}
}

func (s *Session) dispatch(f frame) error {
	switch {
	case f.kind == kindPing:
		return s.send(kindPong, flagReply, 0, f.request, nil)
	case f.kind == kindCancel:
		s.abandon(f.request)
		return nil
	case f.kind == kindRefuse:
		if e, ok := decodeRefusal(f.body); ok {
			return e
		}
		return &FrameError{Reason: "refusal cut short"}
	case f.flags != 0 || f.kind < KindUser:
		return &FrameError{Reason: fmt.Sprintf("kind %d with flags %#x on a connection this node accepted", f.kind, f.flags)}
	}
	r := &Request{Session: s, Kind: f.kind, Shard: f.shard, Number: f.request, Body: f.body}
	switch s.purpose {
	case Forward:
		s.forward(r)
	case Introduction:
		s.introduce(r)
	default:
		h := s.mesh.handler(f.shard)
		if h == nil {
			r.Fail(CodeUnbound, fmt.Sprintf("shard %d", f.shard))
			return nil
		}
		h.HandleRequest(r)
	}
	return nil
}

// forward starts a handler for a forwarded request if the node has room for it.
func (s *Session) forward(r *Request) {
	m := s.mesh
	if m.o.Forward == nil {
		r.Fail(CodeUnbound, "this node takes no forwarded requests")
		return
	}
	r.counted = true
	count, bytes := m.forwarding.Add(1), m.forwardBytes.Add(int64(len(r.Body)))
	if count > int64(m.o.ForwardMax) || bytes > m.o.ForwardBytesMax {
		r.Fail(CodeBusy, "too many forwarded requests")
		return
	}
	if m.o.Take != nil && m.o.Take(r) {
		return
	}
	ctx, cancel := context.WithCancel(s.ctx)
	s.mu.Lock()
	if s.mu.forwarded == nil {
		s.mu.forwarded = make(map[uint64]context.CancelFunc)
	}
	_, twice := s.mu.forwarded[r.Number]
	if !twice {
		s.mu.forwarded[r.Number] = cancel
	}
	s.mu.Unlock()
	if twice {
		cancel()
		r.Fail(CodeFailed, "sent twice")
		s.end(&FrameError{Reason: fmt.Sprintf("request %d was sent twice", r.Number)})
		return
	}
	m.wg.Add(1)
	go func() {
		defer m.wg.Done()
		reply, err := m.o.Forward(ctx, s.remote, r.Kind, r.Body)
		s.mu.Lock()
		delete(s.mu.forwarded, r.Number)
		s.mu.Unlock()
		cancel()
		if err != nil {
			r.Fail(CodeFailed, err.Error())
			return
		}
		r.Reply(reply)
	}()
}

// abandon ends the context of a forwarded request whose asker no longer waits.
func (s *Session) abandon(number uint64) {
	s.mu.Lock()
	cancel := s.mu.forwarded[number]
	s.mu.Unlock()
	if cancel != nil {
		cancel()
	}
}

// introduce answers the one request of an introduction and ends the connection behind the answer.
func (s *Session) introduce(r *Request) {
	m := s.mesh
	if m.o.Introduce == nil {
		r.Fail(CodeUnbound, "this node introduces nobody")
		s.endAfter(errLinger)
		return
	}
	m.wg.Add(1)
	go func() {
		defer m.wg.Done()
		ctx, cancel := context.WithTimeout(m.ctx, m.o.HandshakeTimeout)
		defer cancel()
		stop := context.AfterFunc(ctx, func() { s.end(errSilent) })
		defer stop()
		reply, err := m.o.Introduce(ctx, s.remote, r.Body)
		if err != nil {
			r.Fail(CodeFailed, err.Error())
		} else {
			r.Reply(reply)
		}
		s.endAfter(errLinger)
	}()
}
