package raft

import (
	"context"
	"encoding/binary"
	"sync"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft/peer"
)

// readTimeout bounds one round of evidence. A leader without a majority loses its lease long before.
const readTimeout = 2 * time.Second

// readRounds makes reads linearizable (R7, decision 13): a majority answered a request that was sent after the
// read arrived, in the present term. Reads that arrive while a round is under way wait for the next one, together.
type readRounds struct {
	// evidence waits until a majority of voters is known to have answered something sent at or after the given
	// time, in the term this node leads.
	evidence func(ctx context.Context, since time.Time) error
	now      func() time.Time

	wake chan struct{}

	mu      sync.Mutex
	ctx     context.Context // ends with run
	closed  bool
	waiting []func(error)
}

func newReadRounds(now func() time.Time, evidence func(context.Context, time.Time) error) *readRounds {
	return &readRounds{now: now, evidence: evidence, wake: make(chan struct{}, 1)}
}

// confirm calls done once this node is known to have led after the call, or with why that is not known. done must
// not block.
func (r *readRounds) confirm(done func(error)) {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		done(context.Canceled)
		return
	}
	r.waiting = append(r.waiting, done)
	first := len(r.waiting) == 1
	r.mu.Unlock()
	if first {
		select {
		case r.wake <- struct{}{}:
		default:
		}
	}
}

// run holds the rounds until stop is closed.
func (r *readRounds) run(stop <-chan struct{}) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	r.mu.Lock()
	r.ctx = ctx
	r.mu.Unlock()
	go func() {
		select {
		case <-stop:
			cancel()
		case <-ctx.Done():
		}
	}()
	for {
		select {
		case <-r.wake:
			r.round(nil)
		case <-stop:
			r.mu.Lock()
			r.closed = true
			r.mu.Unlock()
			r.round(context.Canceled)
			return
		}
	}
}

func (r *readRounds) round(err error) {
	r.mu.Lock()
	waiting := r.waiting
	r.waiting = nil
	r.mu.Unlock()
	if len(waiting) == 0 {
		return
	}
	if err == nil {
		ctx, cancel := context.WithTimeout(r.ctx, readTimeout)
		err = r.evidence(ctx, r.now())
		cancel()
	}
	for _, done := range waiting {
		done(err)
	}
}

// Query reads the applied state. The answer is linearizable: it holds everything that was acknowledged before
// the call.
func (n *Node) Query(ctx context.Context, q engine.Query) (engine.Answer, error) {
	for {
		answer, err := n.tryQuery(ctx, &q)
		if err == nil {
			return answer, nil
		}
		switch errs.CodeOf(err) {
		case errs.NotLeader, errs.NoLeader:
		default:
			return engine.Answer{}, err
		}
		if n.closing.Load() {
			return engine.Answer{}, errs.Of(errs.Draining)
		}
		select {
		case <-ctx.Done():
			e := errs.From(err)
			e.RetryAfter = time.Second
			return engine.Answer{}, e
		case <-time.After(againDelay):
		case <-n.stop:
			return engine.Answer{}, errs.Of(errs.Draining)
		}
	}
}

// toLeader returns the connection to the leader. It does not wait for one: a leader that cannot be reached is soon
// another one.
func (n *Node) toLeader(leader engine.NodeID) (*peer.Conn, error) {
	link, err := n.mesh.Link(peerID(leader), peer.Forward)
	if err != nil {
		return nil, err
	}
	conn := link.Current()
	if conn == nil {
		return nil, &peer.ConnError{Peer: peerID(leader), Cause: errs.Of(errs.NoLeader)}
	}
	return conn, nil
}

// askLeader passes a read on, for as long as the leader is the one.
func (n *Node) askLeader(ctx context.Context, leader engine.NodeID, body []byte) ([]byte, error) {
	reign := *n.reign.Load()
	conn, err := n.toLeader(leader)
	if err != nil {
		return nil, err
	}
	if n.leaderNow() != leader {
		return nil, errs.Of(errs.NotLeader) // reign may be the next one's
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(reign, cancel)()
	return conn.Call(ctx, kindQuery, 0, body)
}

// StaleQuery reads what this node has applied, which may be behind what was acknowledged.
func (n *Node) StaleQuery(q engine.Query) (engine.Answer, error) {
	if q.Now == 0 {
		q.Now = n.clock.now().Cluster
	}
	a, err := n.eng.Query(q)
	if err != nil {
		return engine.Answer{}, errs.From(err)
	}
	return a, nil
}

// LoadPart returns one part of a large message that was delivered or browsed (engine.Engine.LoadPart), from this
// node's own store. A node that is behind waits until it has applied the message's entry.
func (n *Node) LoadPart(ctx context.Context, d *engine.Delivery, number uint32) ([]byte, error) {
	if d.Large == nil {
		return nil, errs.New(errs.BadRequest, "the message is not in parts")
	}
	for {
		changed := n.appliedSignal.next()
		if index, _ := n.eng.Applied(); index >= d.ID.Index {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, errs.Of(errs.RequestTimeout).With(ctx.Err())
		case <-n.stop:
			return nil, errs.Of(errs.Draining)
		}
	}
	data, err := n.eng.LoadPart(*d.Large, number)
	if err != nil {
		return nil, errs.From(err)
	}
	return data, nil
}

// tryQuery asks the leader of the moment once.
func (n *Node) tryQuery(ctx context.Context, q *engine.Query) (engine.Answer, error) {
	leader := n.leaderNow()
	switch leader {
	case "":
		return engine.Answer{}, errs.Of(errs.NoLeader)
	case n.id:
		return n.readLocal(ctx, q)
	}
	reply, err := n.askLeader(ctx, leader, engine.AppendQuery(nil, q))
	if err != nil {
		return engine.Answer{}, errs.Of(errs.NotLeader).With(err)
	}
	return readAnswer(reply)
}

// QueryMember reads what a member of the cluster has applied and holds on its own disk, which may be behind what was
// acknowledged. It is for looking at each replica by itself.
func (n *Node) QueryMember(ctx context.Context, name string, q engine.Query) (engine.Answer, error) {
	id, ok := n.memberID(name)
	switch {
	case !ok:
		return engine.Answer{}, errs.New(errs.NotFound, "there is no member %q", name)
	case id == n.id:
		return n.StaleQuery(q)
	}
	reply, err := n.mesh.Call(ctx, peerID(id), kindQueryHere, engine.AppendQuery(nil, &q))
	if err != nil {
		return engine.Answer{}, errs.New(errs.Overloaded, "node %s does not answer", name).With(err)
	}
	return readAnswer(reply)
}

// readAnswer reads what answerOf wrote.
func readAnswer(reply []byte) (engine.Answer, error) {
	r := wireReader{b: reply}
	code := errs.Code(r.uvarint())
	if r.bad {
		return engine.Answer{}, errs.Of(errs.NotLeader).With(errMalformed)
	}
	if code != errs.OK {
		return engine.Answer{}, &errs.Error{Code: code, Message: string(r.b)}
	}
	a, err := engine.DecodeAnswer(r.b)
	if err != nil {
		return engine.Answer{}, errs.Of(errs.Internal).With(err)
	}
	return a, nil
}

// readLocal reads on the node that leads.
func (n *Node) readLocal(ctx context.Context, q *engine.Query) (engine.Answer, error) {
	if n.openTerm.Load() == 0 {
		return engine.Answer{}, errs.Of(errs.NotLeader)
	}
	confirmed := make(chan error, 1)
	n.reads.confirm(func(err error) { confirmed <- err })
	select {
	case err := <-confirmed:
		if err != nil {
			return engine.Answer{}, errs.Of(errs.NotLeader).With(err)
		}
	case <-ctx.Done():
		return engine.Answer{}, errs.Of(errs.NotLeader).With(ctx.Err())
	}
	if q.Wait > 0 && q.Kind == engine.QueryStreamRead && q.Stream != nil {
		return n.readWaiting(ctx, q)
	}
	query := *q
	if query.Now == 0 {
		query.Now = n.clock.now().Cluster
	}
	a, err := n.eng.Query(query)
	if err != nil {
		return engine.Answer{}, errs.From(err)
	}
	return a, nil
}

// readWaiting reads streams on the node that leads, and waits there for something to come: whoever asks from another
// node learns of it with the apply of the leader, and not when its own node has learned of the commit. What it is given
// was committed when it is given, so no further evidence of leading is needed; while the node waits, it may lose the
// lead, and whoever asks goes to the next leader.
func (n *Node) readWaiting(ctx context.Context, q *engine.Query) (engine.Answer, error) {
	woken := make(chan struct{}, 1)
	ended, end := n.watches.addChannel(watchKey{WatchLeader, ""}, make(chan struct{}, 1))
	defer end()
	for i := range q.Stream.Streams {
		_, end := n.watches.addChannel(watchKey{WatchTopic, q.Stream.Streams[i].Key}, woken)
		defer end()
	}
	n.waitingReads.Add(1)
	defer n.waitingReads.Add(-1)
	over := time.NewTimer(q.Wait)
	defer over.Stop()
	for {
		if n.openTerm.Load() == 0 {
			return engine.Answer{}, errs.Of(errs.NotLeader)
		}
		query := *q
		if query.Now == 0 {
			query.Now = n.clock.now().Cluster
		}
		a, err := n.eng.Query(query)
		switch {
		case err == nil && a.Stream.HasEntries():
			return a, nil
		case err != nil && errs.CodeOf(err) != errs.WrongType:
			return engine.Answer{}, errs.From(err)
		}
		select {
		case <-woken:
		case <-ended:
		case <-over.C:
			return engine.Answer{Stream: &engine.StreamAnswer{}}, nil
		case <-ctx.Done():
			return engine.Answer{}, errs.Of(errs.NotLeader).With(ctx.Err())
		case <-n.stop:
			return engine.Answer{}, errs.Of(errs.NotLeader)
		}
	}
}

// serveQuery answers another node.
func (n *Node) serveQuery(ctx context.Context, body []byte) ([]byte, error) {
	q, err := engine.DecodeQuery(body)
	if err != nil {
		return nil, err
	}
	return answerOf(n.readLocal(ctx, &q)), nil
}

// serveQueryHere answers another node from this one's own state.
func (n *Node) serveQueryHere(body []byte) ([]byte, error) {
	q, err := engine.DecodeQuery(body)
	if err != nil {
		return nil, err
	}
	return answerOf(n.StaleQuery(q)), nil
}

// answerOf writes the outcome of a query.
func answerOf(a engine.Answer, err error) []byte {
	if err != nil {
		e := errs.From(err)
		return append(binary.AppendUvarint(nil, uint64(e.Code)), e.Text()...)
	}
	return engine.AppendAnswer(binary.AppendUvarint(nil, uint64(errs.OK)), &a)
}

// Totals returns this node's figures of all topics and groups together (engine.Engine.Totals).
func (n *Node) Totals() engine.Totals { return n.eng.Totals() }
