package raft

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft/peer"
)

// Kinds of the requests that nodes pass to each other, on forward connections. One command is one request; many
// travel in one write, since a connection sends everything queued at once.
const (
	// kindCommand carries an op to the leader, and its outcome back.
	kindCommand = peer.KindUser + 32 + iota
	// kindWithdraw says that nobody waits for a command any more.
	kindWithdraw
	// kindQuery carries a read to the leader, and its answer back.
	kindQuery
	// kindCard exchanges what nodes tell each other about themselves.
	kindCard
	// kindAdmin carries an operator's wish to the leader.
	kindAdmin
	// kindQueryHere carries a read of what the asked node itself has applied.
	kindQueryHere
)

// The body of kindCommand:
//
//	version u8 | flags u8 | intake u64 | number, lowest uvarint | waited, wait ms uvarint | if ordered: after, floor uvarint | command
//
// and of its answer:
//
//	version u8 | outcome u8 | by outcome: replied  index, term, zones uvarint | result (length-prefixed)
//	                                      refused  code uvarint | message | retry after ms uvarint
//	                                      again    flags u8
//	                                      stillWaiting  code uvarint
const (
	forwardVersion = 1

	commandRequireMask = 3
	commandRepeat      = 4
	commandParks       = 8
	commandOrdered     = 16

	againProposed = 1
)

var errMalformed = errors.New("malformed request between nodes")

func appendCommand(b []byte, o *op, now time.Time) []byte {
	flags := byte(o.require) & commandRequireMask
	if o.repeat {
		flags |= commandRepeat
	}
	var waited, wait int64
	if !o.parkUntil.IsZero() {
		flags |= commandParks
		waited = max(now.Sub(o.since).Milliseconds(), 0)
		wait = max(o.parkUntil.Sub(now).Milliseconds(), 0)
	}
	if o.ordered {
		flags |= commandOrdered
	}
	b = append(b, forwardVersion, flags)
	b = binary.LittleEndian.AppendUint64(b, uint64(o.intake))
	b = binary.AppendUvarint(b, o.number)
	b = binary.AppendUvarint(b, o.lowest)
	b = binary.AppendUvarint(b, uint64(waited))
	b = binary.AppendUvarint(b, uint64(wait))
	if o.ordered {
		b = binary.AppendUvarint(b, o.after)
		b = binary.AppendUvarint(b, o.floor)
	}
	return b // the command follows as a part of its own, uncopied
}

// waitMaxMs bounds the waiting times that another node may ask for.
const waitMaxMs = uint64(time.Hour / time.Millisecond)

func decodeForwarded(b []byte, now time.Time) (*op, error) {
	r := wireReader{b: b}
	if r.u8() != forwardVersion {
		return nil, errMalformed
	}
	flags := r.u8()
	if len(r.b) < 8 {
		return nil, errMalformed
	}
	o := &op{intake: engine.IntakeID(binary.LittleEndian.Uint64(r.b))}
	r.b = r.b[8:]
	o.number, o.lowest = r.uvarint(), r.uvarint()
	waited, wait := r.uvarint(), r.uvarint()
	if o.ordered = flags&commandOrdered != 0; o.ordered {
		o.after, o.floor = r.uvarint(), r.uvarint()
	}
	if r.bad || o.ordered && (o.after >= o.number || o.floor > o.number) || waited > waitMaxMs || wait > waitMaxMs || flags&commandRequireMask > byte(AllZones) {
		return nil, errMalformed
	}
	o.require = Require(flags & commandRequireMask)
	o.repeat = flags&commandRepeat != 0
	o.cmd = r.b
	if err := o.inspect(); err != nil {
		return nil, err
	}
	if flags&commandParks != 0 {
		o.since = now.Add(-time.Duration(waited) * time.Millisecond)
		o.parkUntil = now.Add(time.Duration(wait) * time.Millisecond)
	}
	return o, nil
}

// inspect fills what the leader needs to know of a command from its bytes.
func (o *op) inspect() error {
	info, err := engine.Inspect(o.cmd)
	if err != nil {
		return err
	}
	o.kind = info.Kind
	switch info.Kind {
	case engine.CmdPublish, engine.CmdStreamAdd:
		o.topic, o.count = info.Topic, info.Messages
	case engine.CmdStreamReadGroup:
		if o.receive = engine.ParkProbe(o.cmd); o.receive != nil {
			o.refs = o.receive.Refs()
			o.count = info.Max
		}
	case engine.CmdReceive:
		c, err := engine.DecodeCommand(o.cmd)
		if err != nil {
			return err
		}
		o.receive = c.(*engine.Receive)
		o.refs = o.receive.Refs()
		o.count = info.Max
	}
	return nil
}

func appendOutcome(b []byte, o *op, out outcome) []byte {
	b = append(b, forwardVersion, byte(out.kind))
	switch out.kind {
	case replied:
		b = binary.AppendUvarint(b, o.reply.Index)
		b = binary.AppendUvarint(b, o.reply.Term)
		b = binary.AppendUvarint(b, uint64(out.zones))
		b = engine.AppendResult(b, &o.reply.Result)
	case refused:
		b = binary.AppendUvarint(b, uint64(out.err.Code))
		b = appendBytes(b, out.err.Message)
		b = binary.AppendUvarint(b, uint64(max(out.err.RetryAfter.Milliseconds(), 0)))
	case again:
		var flags byte
		if out.proposed {
			flags = againProposed
		}
		b = append(b, flags)
	case stillWaiting:
		b = binary.AppendUvarint(b, uint64(o.reply.Result.Code))
	}
	return b
}

// decodeOutcome reads an outcome into o.
func decodeOutcome(b []byte, o *op) (outcome, error) {
	r := wireReader{b: b}
	if r.u8() != forwardVersion {
		return outcome{}, errMalformed
	}
	out := outcome{kind: outcomeKind(r.u8())}
	switch out.kind {
	case replied:
		o.reply.Index, o.reply.Term = r.uvarint(), r.uvarint()
		out.zones = int(r.uvarint())
		if r.bad {
			return outcome{}, errMalformed
		}
		var err error
		if o.reply.Result, err = engine.DecodeResult(r.b); err != nil {
			return outcome{}, err
		}
		r.b = nil
	case refused:
		code := r.uvarint()
		message := string(r.bytes())
		retry := r.uvarint()
		if code > 1<<16-1 || retry > waitMaxMs {
			return outcome{}, errMalformed
		}
		out.err = &errs.Error{Code: errs.Code(code), Message: message, RetryAfter: time.Duration(retry) * time.Millisecond}
	case again:
		out.proposed = r.u8()&againProposed != 0
	case stillWaiting:
		code := r.uvarint()
		if code > 1<<16-1 {
			return outcome{}, errMalformed
		}
		o.reply.Result = engine.Result{Code: errs.Code(code)}
	default:
		return outcome{}, errMalformed
	}
	if r.bad || len(r.b) > 0 {
		return outcome{}, errMalformed
	}
	return out, nil
}

// outbox implements sender: it brings this process's ops to the leader.
type outbox struct {
	self engine.NodeID
	mesh *peer.Mesh
	now  func() time.Time
	// local takes ops when this node leads, dropLocal takes one back.
	local, dropLocal func(o *op)
}

func (b *outbox) send(to engine.NodeID, ops []*op) bool {
	if to == b.self {
		for _, o := range ops {
			b.local(o)
		}
		return true
	}
	link, err := b.mesh.Link(peer.ID(to), peer.Forward)
	if err != nil {
		return false
	}
	conn := link.Current()
	if conn == nil {
		return false
	}
	now := b.now()
	for _, o := range ops {
		head := appendCommand(make([]byte, 0, 64), o, now)
		conn.Go(kindCommand, 0, [][]byte{head, o.cmd}, func(reply []byte, err error) {
			out := outcome{kind: again, proposed: o.repeat}
			if err == nil {
				if out, err = decodeOutcome(reply, o); err != nil {
					out = outcome{kind: again, proposed: true}
				}
			} else {
				out.proposed = out.proposed || reachedPeer(err)
			}
			o.end(out)
		})
	}
	return true
}

// reachedPeer tells whether a request that failed may have been carried out.
func reachedPeer(err error) bool {
	if remote, ok := errors.AsType[*peer.RemoteError](err); ok {
		return remote.Code == peer.CodeFailed
	}
	if conn, ok := errors.AsType[*peer.ConnError](err); ok {
		return conn.Sent
	}
	return false
}

func (b *outbox) withdraw(to engine.NodeID, o *op) {
	if to == b.self {
		b.dropLocal(o)
		return
	}
	if o.parkUntil.IsZero() {
		return // it is answered soon, and nobody listens
	}
	link, err := b.mesh.Link(peer.ID(to), peer.Forward)
	if err != nil {
		return
	}
	if conn := link.Current(); conn != nil {
		body := binary.LittleEndian.AppendUint64(nil, uint64(o.intake))
		body = binary.AppendUvarint(body, o.number)
		conn.Go(kindWithdraw, 0, [][]byte{body}, func([]byte, error) {})
	}
}

// inbox is the leader's side: forwarded ops that wait for an outcome.
type inbox struct {
	mu  sync.Mutex
	ops map[forwardKey]*op
}

type forwardKey struct {
	intake engine.IntakeID
	number uint64
}

// forwarded is the origin of a forwarded op.
type forwarded struct{ out chan outcome }

func (f *forwarded) finish(_ *op, out outcome) { f.out <- out } // buffered: one outcome per op

// forwardedRequest is the origin of a forwarded op that no goroutine waits for.
type forwardedRequest struct {
	n *Node
	r *peer.Request
}

func (f *forwardedRequest) finish(o *op, out outcome) {
	if out.kind != replied || !o.reply.Result.HasContents() {
		f.r.Reply(appendOutcome(make([]byte, 0, 64), o, out))
		return
	}
	f.n.spawn(func() { // unless the node stops: then the connection's end is the answer
		if err := f.n.load(&o.reply.Result); err != nil {
			f.r.Fail(peer.CodeFailed, err.Error())
			return
		}
		f.r.Reply(appendOutcome(make([]byte, 0, 64), o, out))
	})
}

// take accepts forwarded commands in the order in which they arrive. Receives that are not part of an order are left
// to goroutines of their own: what they ask the engine waits for an apply.
func (n *Node) take(r *peer.Request) bool {
	if r.Kind != kindCommand || !n.running() {
		return false
	}
	if len(r.Body) < 2 || r.Body[1]&commandParks != 0 {
		return false
	}
	o, err := decodeForwarded(r.Body, n.now())
	if err != nil {
		r.Fail(peer.CodeFailed, err.Error())
		return true
	}
	if o.receive != nil && !o.ordered {
		return false
	}
	// A connection that ends takes nothing back: the origin repeats what it got no answer to, and what was accepted
	// keeps its place in the order.
	o.from = &forwardedRequest{n, r}
	n.accept(o)
	return true
}

// serveCommand handles a forwarded command on its own goroutine.
func (n *Node) serveCommand(ctx context.Context, body []byte) ([]byte, error) {
	o, err := decodeForwarded(body, n.now())
	if err != nil {
		return nil, err
	}
	f := &forwarded{out: make(chan outcome, 1)}
	o.from = f
	key := forwardKey{o.intake, o.number}
	parks := !o.parkUntil.IsZero()
	if parks {
		n.inbox.mu.Lock()
		n.inbox.ops[key] = o
		n.inbox.mu.Unlock()
		defer func() {
			n.inbox.mu.Lock()
			if n.inbox.ops[key] == o {
				delete(n.inbox.ops, key)
			}
			n.inbox.mu.Unlock()
		}()
	}
	n.accept(o)
	var out outcome
	select {
	case out = <-f.out:
	case <-ctx.Done():
		// The asking node is gone, or this one stops: nobody is left to answer.
		n.dropOp(o)
		return nil, context.Cause(ctx)
	}
	if out.kind == replied && o.reply.Result.HasContents() {
		if err := n.load(&o.reply.Result); err != nil {
			return nil, err
		}
	}
	return appendOutcome(make([]byte, 0, 64), o, out), nil
}

// dropOp takes an op back for which nobody waits.
func (n *Node) dropOp(o *op) {
	o.withdraw()
	if !o.parkUntil.IsZero() {
		n.coal.lot.expire(o)
	}
}

func (n *Node) serveWithdraw(body []byte) ([]byte, error) {
	r := wireReader{b: body}
	if len(r.b) < 8 {
		return nil, errMalformed
	}
	key := forwardKey{intake: engine.IntakeID(binary.LittleEndian.Uint64(r.b))}
	r.b = r.b[8:]
	key.number = r.uvarint()
	if r.bad {
		return nil, errMalformed
	}
	n.inbox.mu.Lock()
	o := n.inbox.ops[key]
	n.inbox.mu.Unlock()
	if o != nil {
		n.coal.lot.expire(o)
	}
	return nil, nil
}

// forward serves what other nodes pass on.
func (n *Node) forward(ctx context.Context, from peer.Remote, kind peer.Kind, body []byte) ([]byte, error) {
	if !n.running() {
		return nil, errors.New("the node is starting or stopping")
	}
	switch kind {
	case kindCommand:
		return n.serveCommand(ctx, body)
	case kindWithdraw:
		return n.serveWithdraw(body)
	case kindQuery:
		return n.serveQuery(ctx, body)
	case kindQueryHere:
		return n.serveQueryHere(body)
	case kindCard:
		return n.serveCard(engine.NodeID(from.ID), body)
	case kindBroadcast:
		return n.serveBroadcast(body)
	case kindAsk:
		return n.serveAsk(body)
	case kindAdmin:
		var a adminRequest
		if err := json.Unmarshal(body, &a); err != nil {
			return nil, errMalformed
		}
		return json.Marshal(adminReplyOf(n.administer(ctx, a)))
	default:
		return nil, fmt.Errorf("kind %d is not served", kind)
	}
}
