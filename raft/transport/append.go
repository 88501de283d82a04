package transport

import (
	"context"
	"errors"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/raft/peer"
	"tercet.dev/tercet/wal"
)

// retryMin and retryMax bound the pause before an append is repeated to a node that is there and does not serve it.
const (
	retryMin = 10 * time.Millisecond
	retryMax = 200 * time.Millisecond
)

// AppendEntries implements hraft.Transport. A heartbeat fails after Options.CallTimeout. Anything else waits as long as
// it takes to reach the follower: until it is connected (again), the term has passed, or the transport is closed. An
// error would make raft back off for up to ten seconds, and a returned node would not be served for as long (decision
// 9). Repeating an append is harmless: within a term, raft's log matching makes it do nothing twice.
func (t *Transport) AppendEntries(id hraft.ServerID, _ hraft.ServerAddress, args *hraft.AppendEntriesRequest, resp *hraft.AppendEntriesResponse) error {
	if isHeartbeat(args) {
		return t.sendHeartbeat(id, args, resp)
	}
	n, err := t.enter(args.Term)
	if err != nil {
		return err
	}
	defer t.leave(n)
	parts, err := encodeAppend(args, t.frameLimit)
	if err != nil {
		return err
	}
	link, err := t.o.Mesh.Link(peer.ID(id), peer.Data)
	if err != nil {
		return err
	}
	t.marks.Lead(args.Term)
	gate := t.o.Log.Position(covers(args))
	for i := range parts {
		r, err := t.appendPart(n, link, id, args.Term, &parts[i])
		if err != nil {
			return err
		}
		*resp = r
		if !r.Success {
			return nil
		}
	}
	return t.leaderGate(gate, n.ctx.Done(), func() error { return context.Cause(n.ctx) })
}

// appendPart sends one frame of an append until it is answered.
func (t *Transport) appendPart(n *tenure, link *peer.Link, id hraft.ServerID, term uint64, p *part) (hraft.AppendEntriesResponse, error) {
	pause := retryMin
	for {
		if err := t.waitUnstalled(n.ctx); err != nil {
			return hraft.AppendEntriesResponse{}, err
		}
		conn, err := link.Conn(n.ctx)
		if err != nil {
			if cause := context.Cause(n.ctx); cause != nil {
				err = cause
			}
			return hraft.AppendEntriesResponse{}, err
		}
		sent := time.Now()
		reply, err := conn.Call(n.ctx, kindAppend, t.o.Shard, p.body...)
		var remote *peer.RemoteError
		switch {
		case err == nil:
			r, err := decodeAppendResponse(peer.ID(id), reply)
			if err == nil {
				t.note(id, term, p.last, sent, &r)
			}
			return r, err
		case n.ctx.Err() != nil:
			return hraft.AppendEntriesResponse{}, context.Cause(n.ctx)
		case errors.As(err, &remote) && remote.Code == peer.CodeFailed:
			return hraft.AppendEntriesResponse{}, err
		case errors.As(err, &remote):
			// It is there and cannot take it now: starting, or busy.
			select {
			case <-time.After(pause):
			case <-n.ctx.Done():
				return hraft.AppendEntriesResponse{}, context.Cause(n.ctx)
			}
			pause = min(pause*2, retryMax)
		}
		// Else the connection was lost: the link waits for the next one.
	}
}

// note enters what an answer proves into the watermark. It does not wait for the own disk: what it notes is about the
// follower's, and this node's own row stands beside it.
func (t *Transport) note(id hraft.ServerID, term, last uint64, sent time.Time, r *hraft.AppendEntriesResponse) {
	if r.Term != term {
		return
	}
	now := time.Now()
	t.marks.exchanged(id, term, sent, now)
	if r.Success {
		t.marks.matched(id, term, last, now)
	}
}

// leaderGate waits until this node's own disk holds what a request carried, so that raft, which counts the leader's
// own copy as soon as it is buffered, commits nothing on the strength of it.
func (t *Transport) leaderGate(at wal.LSN, cancel <-chan struct{}, cause func() error) error {
	if at == 0 || t.faults.openLeaderGate {
		return nil
	}
	began := time.Now()
	err := t.o.WAL.WaitDurable(at, cancel)
	if t.o.ObserveGate != nil {
		t.o.ObserveGate(true, time.Since(began))
	}
	if err != nil {
		if c := cause(); c != nil {
			return c
		}
	}
	return err
}

// AppendEntriesPipeline implements hraft.Transport.
func (t *Transport) AppendEntriesPipeline(id hraft.ServerID, _ hraft.ServerAddress) (hraft.AppendPipeline, error) {
	link, err := t.o.Mesh.Link(peer.ID(id), peer.Data)
	if err != nil {
		return nil, err
	}
	p := &pipeline{t: t, id: id, link: link, out: make(chan hraft.AppendFuture, t.o.InFlightMax), closed: make(chan struct{})}
	p.mu.cond = sync.NewCond(&p.mu)
	p.ctx, p.cancel = context.WithCancel(t.ctx)
	p.wg.Add(2)
	go p.connect()
	go p.deliver()
	return p, nil
}

// pipeline sends appends of one term to one follower without waiting for the answers, and hands the answers to raft in
// order. It outlives connections: what is unanswered when one ends is sent again, in order, on the next. It ends
// with the term, with Close, or with the first answer that is not a success, which is the last it delivers.
type pipeline struct {
	t    *Transport
	id   hraft.ServerID
	link *peer.Link

	ctx    context.Context // ends with the transport or the pipeline
	cancel context.CancelFunc
	closed chan struct{}
	wg     sync.WaitGroup
	out    chan hraft.AppendFuture

	mu struct {
		sync.Mutex
		cond    *sync.Cond // window, broken or an answer has changed
		tenure  *tenure
		stop    func() bool // undoes the watch on the tenure
		conn    *peer.Conn  // nil between connections
		window  []*inflight // sent and not delivered, in order
		bytes   int
		futures []*appendFuture // not delivered, in order
		broken  error
	}
}

// inflight is one frame of one append.
type inflight struct {
	part
	future   *appendFuture
	final    bool // the last frame of its append
	sent     time.Time
	answered bool
	resp     hraft.AppendEntriesResponse
}

// appendFuture implements hraft.AppendFuture.
type appendFuture struct {
	start time.Time
	args  *hraft.AppendEntriesRequest
	resp  *hraft.AppendEntriesResponse
	gate  wal.LSN
	done  chan struct{}
	err   error
}

// Error implements hraft.Future.
func (f *appendFuture) Error() error { <-f.done; return f.err }

// Start implements hraft.AppendFuture.
func (f *appendFuture) Start() time.Time { return f.start }

// Request implements hraft.AppendFuture.
func (f *appendFuture) Request() *hraft.AppendEntriesRequest { return f.args }

// Response implements hraft.AppendFuture.
func (f *appendFuture) Response() *hraft.AppendEntriesResponse { return f.resp }

// AppendEntries implements hraft.AppendPipeline. It blocks while the window is full, or the disk stalled.
func (p *pipeline) AppendEntries(args *hraft.AppendEntriesRequest, resp *hraft.AppendEntriesResponse) (hraft.AppendFuture, error) {
	t := p.t
	if err := p.begin(args.Term); err != nil {
		return nil, err
	}
	if err := t.waitUnstalled(p.ctx); err != nil {
		return nil, p.whyBroken(err)
	}
	parts, err := encodeAppend(args, t.frameLimit)
	if err != nil {
		return nil, err
	}
	f := &appendFuture{start: time.Now(), args: args, resp: resp, gate: t.o.Log.Position(covers(args)), done: make(chan struct{})}
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.mu.broken == nil && len(p.mu.window) > 0 && (len(p.mu.window) >= t.o.InFlightMax || p.mu.bytes >= t.o.InFlightBytesMax) {
		p.mu.cond.Wait()
	}
	if p.mu.broken != nil {
		return nil, p.mu.broken
	}
	p.mu.futures = append(p.mu.futures, f)
	for i := range parts {
		in := &inflight{part: parts[i], future: f, final: i == len(parts)-1, sent: time.Now()}
		p.mu.window = append(p.mu.window, in)
		p.mu.bytes += in.bytes
		if p.mu.conn != nil {
			p.send(in)
		}
	}
	return f, nil
}

// begin binds the pipeline to the term of its first append.
func (p *pipeline) begin(term uint64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.broken != nil {
		return p.mu.broken
	}
	if p.mu.tenure != nil {
		return nil
	}
	n, err := p.t.enter(term)
	if err != nil {
		return err
	}
	p.t.marks.Lead(term)
	p.mu.tenure = n
	p.mu.stop = context.AfterFunc(n.ctx, func() { p.fail(context.Cause(n.ctx)) })
	return nil
}

func (p *pipeline) whyBroken(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mu.broken != nil {
		return p.mu.broken
	}
	return err
}

// send puts a frame on the present connection. p.mu is held; the answer comes on the connection's goroutine.
func (p *pipeline) send(in *inflight) {
	conn := p.mu.conn
	conn.Go(kindAppend, p.t.o.Shard, in.body, func(reply []byte, err error) {
		var remote *peer.RemoteError
		switch {
		case err == nil:
			r, err := decodeAppendResponse(peer.ID(p.id), reply)
			if err != nil {
				conn.Close()
				p.fail(err)
				return
			}
			p.t.note(p.id, in.future.args.Term, in.last, in.sent, &r)
			p.mu.Lock()
			in.resp, in.answered = r, true
			p.mu.cond.Broadcast()
			p.mu.Unlock()
		case errors.As(err, &remote):
			// Not handed over there. What follows it may have been, and was then rejected for lack of it: the
			// order is lost, and raft finds the follower's end again by itself.
			p.fail(ErrPipelineAborted)
		}
		// Else the connection was lost: connect sends everything again.
	})
}

// connect keeps the pipeline on a connection, and repeats what is unanswered when that changes.
func (p *pipeline) connect() {
	defer p.wg.Done()
	for {
		conn, err := p.link.Conn(p.ctx)
		if err != nil {
			p.fail(err)
			return
		}
		if err := p.t.waitUnstalled(p.ctx); err != nil {
			p.fail(err)
			return
		}
		p.mu.Lock()
		if p.mu.broken != nil {
			p.mu.Unlock()
			return
		}
		p.mu.conn = conn
		for _, in := range p.mu.window {
			if !in.answered {
				p.send(in)
			}
		}
		p.mu.Unlock()
		select {
		case <-conn.Done():
		case <-p.ctx.Done():
		}
		p.mu.Lock()
		p.mu.conn = nil
		p.mu.Unlock()
	}
}

// deliver hands answers to raft, in order and behind the leader's side of the gate.
func (p *pipeline) deliver() {
	defer p.wg.Done()
	for {
		p.mu.Lock()
		for p.mu.broken == nil && (len(p.mu.window) == 0 || !p.mu.window[0].answered) {
			p.mu.cond.Wait()
		}
		if p.mu.broken != nil {
			p.mu.Unlock()
			return
		}
		in := p.mu.window[0]
		p.mu.window = p.mu.window[1:]
		p.mu.bytes -= in.bytes
		p.mu.cond.Broadcast()
		p.mu.Unlock()

		f := in.future
		if in.resp.Success && !in.final {
			continue
		}
		if in.resp.Success {
			if err := p.t.leaderGate(f.gate, p.ctx.Done(), func() error { return nil }); err != nil {
				p.fail(err)
				return
			}
		}
		*f.resp = in.resp
		p.mu.Lock()
		if p.mu.broken != nil {
			p.mu.Unlock()
			return
		}
		p.mu.futures = p.mu.futures[1:]
		p.mu.Unlock()
		close(f.done)
		select {
		case p.out <- f:
		case <-p.closed:
			return
		}
		if !in.resp.Success {
			// Raft reads no further, so nothing further may wait for it to.
			p.fail(ErrPipelineAborted)
			return
		}
	}
}

// fail ends the pipeline: nothing more is sent, repeated or delivered.
func (p *pipeline) fail(err error) {
	p.mu.Lock()
	if p.mu.broken != nil {
		p.mu.Unlock()
		return
	}
	p.mu.broken = err
	futures := p.mu.futures
	p.mu.futures, p.mu.window, p.mu.bytes = nil, nil, 0
	n, stop := p.mu.tenure, p.mu.stop
	p.mu.cond.Broadcast()
	p.mu.Unlock()
	p.cancel()
	if n != nil {
		stop()
		p.t.leave(n)
	}
	for _, f := range futures {
		f.err = err
		close(f.done)
	}
}

// Consumer implements hraft.AppendPipeline.
func (p *pipeline) Consumer() <-chan hraft.AppendFuture { return p.out }

// Close implements hraft.AppendPipeline. It returns when the pipeline's goroutines have ended.
func (p *pipeline) Close() error {
	p.fail(hraft.ErrPipelineShutdown)
	p.mu.Lock()
	select {
	case <-p.closed:
	default:
		close(p.closed)
	}
	p.mu.Unlock()
	p.wg.Wait()
	return nil
}
