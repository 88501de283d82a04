package transport

import (
	"context"
	"errors"
	"fmt"
	"time"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/raft/peer"
	"tercet.dev/tercet/wal"
)

// HandleRequest implements peer.Handler. It never blocks, except on a snapshot's own connection.
func (t *Transport) HandleRequest(r *peer.Request) {
	var err error
	switch purpose := r.Session.Purpose(); {
	case purpose == peer.Control && r.Kind == kindHeartbeat:
		err = t.takeHeartbeat(r)
	case purpose == peer.Control && r.Kind == kindVote:
		err = take(t, r, decodeVote, func(v *hraft.RequestVoteResponse) []byte { return encodeVerdict(v.Term, v.Granted) })
	case purpose == peer.Control && r.Kind == kindPreVote:
		err = take(t, r, decodePreVote, func(v *hraft.RequestPreVoteResponse) []byte { return encodeVerdict(v.Term, v.Granted) })
	case purpose == peer.Control && r.Kind == kindTimeoutNow:
		if t.stalled() {
			// Elected, this node could not commit: better that the leader looks for another successor.
			r.Fail(peer.CodeFailed, ErrStalled.Error())
			return
		}
		err = take(t, r, decodeTimeoutNow, func(*hraft.TimeoutNowResponse) []byte { return nil })
	case purpose == peer.Data && r.Kind == kindAppend:
		err = t.takeAppend(r)
	case purpose == peer.Snapshot:
		err = t.takeSnapshot(r)
	default:
		err = fmt.Errorf("kind %d on a %s connection", r.Kind, purpose)
	}
	if err != nil {
		r.Session.Close(&peer.FrameError{Reason: err.Error()})
	}
}

// handOver gives a request to raft, or reports that raft has too many.
func (t *Transport) handOver(rpc hraft.RPC) bool {
	select {
	case t.consumer <- rpc:
		return true
	default:
		return false
	}
}

// take hands a small request over and answers it when raft has. Votes need no gate: what a granted vote promises is
// the term and the vote, which the stable store has synced before raft answers, and with them everything that was
// in the log before (it is one stream).
func take[Req, Resp any](t *Transport, r *peer.Request, decode func(peer.ID, []byte) (*Req, error), encode func(*Resp) []byte) error {
	req, err := decode(r.Session.Remote().ID, r.Body)
	if err != nil {
		return err
	}
	answer := make(chan hraft.RPCResponse, 1)
	if !t.handOver(hraft.RPC{Command: req, RespChan: answer}) {
		r.Fail(peer.CodeBusy, "raft has too many requests")
		return nil
	}
	return t.spawn(func() {
		select {
		case a := <-answer:
			resp, ok := a.Response.(*Resp)
			switch {
			case a.Error != nil:
				r.Fail(peer.CodeFailed, a.Error.Error())
			case !ok:
				r.Fail(peer.CodeFailed, "raft gave no answer")
			default:
				r.Reply(encode(resp))
			}
		case <-r.Session.Done():
		case <-t.ctx.Done():
		}
	})
}

// spawn runs f on a goroutine that Close waits for.
func (t *Transport) spawn(f func()) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.mu.closed {
		return hraft.ErrTransportShutdown
	}
	t.wg.Add(1)
	go func() {
		defer t.wg.Done()
		f()
	}()
	return nil
}

// beat is a heartbeat on its way to raft.
type beat struct {
	r   *peer.Request
	req *hraft.AppendEntriesRequest
}

func (t *Transport) takeHeartbeat(r *peer.Request) error {
	req, err := decodeHeartbeat(r.Session.Remote().ID, r.Body)
	if err != nil {
		return err
	}
	select {
	case t.beats <- &beat{r, req}:
	default:
		r.Fail(peer.CodeBusy, "heartbeats are not taken")
	}
	return nil
}

// serveHeartbeats hands heartbeats to raft beside everything else, so that a leader does not seem dead because the
// follower is busy. Raft may have to store a new term for one, which waits for the disk: hence a goroutine of its
// own, and not the connection's.
//
// A follower answers whatever its disk does. The answer is true: it says which term the follower is in, and a
// stalled disk does not make that false. Withholding it would take a healthy leader's lease and confirmed reads away
// and would bring nobody closer to a commit.
func (t *Transport) serveHeartbeats() {
	defer t.wg.Done()
	for {
		var b *beat
		select {
		case b = <-t.beats:
		case <-t.ctx.Done():
			return
		}
		handler := t.heartbeat.Load()
		if handler == nil {
			b.r.Fail(peer.CodeUnbound, "raft has not started")
			continue
		}
		answer := make(chan hraft.RPCResponse, 1)
		(*handler)(hraft.RPC{Command: b.req, RespChan: answer})
		select {
		case a := <-answer:
			if resp, ok := a.Response.(*hraft.AppendEntriesResponse); ok && a.Error == nil {
				b.r.Reply(encodeAppendResponse(resp))
			} else {
				b.r.Fail(peer.CodeFailed, "raft gave no answer")
			}
		default:
			// Raft is stopping and answers no more.
			b.r.Fail(peer.CodeUnbound, "raft has stopped")
		}
	}
}

// answerer sends the answers to the appends of one connection: in their order, each when the disk holds what it
// claims.
type answerer struct {
	t       *Transport
	session *peer.Session
	queue   chan *handed
	ctx     context.Context // ends with the connection or the transport
}

// handed is an append that raft has got.
type handed struct {
	r      *peer.Request
	answer chan hraft.RPCResponse
	covers uint64
	bytes  int64
}

func (t *Transport) takeAppend(r *peer.Request) error {
	req, err := decodeAppend(r.Session.Remote().ID, r.Body)
	if err != nil {
		return err
	}
	if !t.faults.skipClamp {
		clampCommit(req)
	}
	t.supersede(req.Term)
	a, err := t.answererOf(r.Session)
	if err != nil {
		r.Fail(peer.CodeUnbound, err.Error())
		return nil
	}
	h := &handed{r: r, answer: make(chan hraft.RPCResponse, 1), covers: covers(req), bytes: int64(len(r.Body))}
	if t.inboxBytes.Add(h.bytes) > inboxBytesMax && t.inboxBytes.Load() > h.bytes {
		t.inboxBytes.Add(-h.bytes)
		r.Fail(peer.CodeBusy, "too many bytes are waiting for raft")
		return nil
	}
	// First the place among the answers, then raft: the answers then stand in the order in which raft got the
	// requests. This connection's goroutine is the only one that adds to its queue.
	if len(a.queue) == cap(a.queue) {
		t.inboxBytes.Add(-h.bytes)
		r.Fail(peer.CodeBusy, "too many requests of one connection are waiting for raft")
		return nil
	}
	if !t.handOver(hraft.RPC{Command: req, RespChan: h.answer}) {
		t.inboxBytes.Add(-h.bytes)
		r.Fail(peer.CodeBusy, "raft has too many requests")
		return nil
	}
	a.queue <- h
	if a.ctx.Err() != nil {
		a.finish() // the answerer may have finished before this was added
	}
	return nil
}

// answererOf returns the answerer of a connection, made with its first append.
func (t *Transport) answererOf(s *peer.Session) (*answerer, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if a := t.mu.answers[s]; a != nil {
		return a, nil
	}
	if t.mu.closed {
		return nil, hraft.ErrTransportShutdown
	}
	ctx, cancel := context.WithCancel(s.Context())
	a := &answerer{t: t, session: s, queue: make(chan *handed, inboxMax), ctx: ctx}
	t.mu.answers[s] = a
	stop := context.AfterFunc(t.ctx, cancel)
	t.wg.Add(1)
	go func() {
		defer t.wg.Done()
		defer stop()
		a.run(ctx)
		cancel()
		t.mu.Lock()
		delete(t.mu.answers, s)
		t.mu.Unlock()
		a.finish()
	}()
	return a, nil
}

// finish settles the accounts of what will not be answered.
func (a *answerer) finish() {
	for {
		select {
		case h := <-a.queue:
			a.t.inboxBytes.Add(-h.bytes)
		default:
			return
		}
	}
}

func (a *answerer) run(ctx context.Context) {
	t := a.t
	for {
		var h *handed
		select {
		case h = <-a.queue:
		case <-ctx.Done():
			return
		}
		var answer hraft.RPCResponse
		select {
		case answer = <-h.answer:
		case <-ctx.Done():
			t.inboxBytes.Add(-h.bytes)
			return
		}
		t.inboxBytes.Add(-h.bytes)
		resp, ok := answer.Response.(*hraft.AppendEntriesResponse)
		if !ok || answer.Error != nil {
			text := "raft gave no answer"
			if answer.Error != nil {
				text = answer.Error.Error()
			}
			h.r.Fail(peer.CodeFailed, text)
			continue
		}
		if resp.Success && !t.faults.openFollowerGate {
			if err := t.followerGate(ctx, t.o.Log.Position(h.covers)); err != nil {
				// The disk will not hold it, or nobody waits: no answer, ever.
				if errors.Is(err, wal.ErrCanceled) {
					err = peer.ErrClosed
				}
				a.session.Close(err)
				return
			}
		}
		h.r.Reply(encodeAppendResponse(resp))
	}
}

// followerGate waits until this node's disk holds what an answer claims.
func (t *Transport) followerGate(ctx context.Context, at wal.LSN) error {
	if at == 0 {
		return nil
	}
	began := time.Now()
	err := t.o.WAL.WaitDurable(at, ctx.Done())
	if t.o.ObserveGate != nil {
		t.o.ObserveGate(false, time.Since(began))
	}
	return err
}
