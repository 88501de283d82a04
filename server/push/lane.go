package push

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"sync/atomic"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

const (
	// laneWait is how long one receive is parked.
	laneWait = time.Minute
	// laneTimeout bounds what is done beside waiting: a receive that does not wait, a settle.
	laneTimeout = 30 * time.Second
	// laneRetry is how long a lane rests after an error; the pause doubles up to laneRetryMax.
	laneRetry    = 100 * time.Millisecond
	laneRetryMax = 5 * time.Second
	// probeRest is how long a lane that had no message to probe with lets others try.
	probeRest = time.Second
)

// A lane brings the messages of one topic to one subscription. It asks for messages and starts their requests; it
// waits for none of them.
type lane struct {
	d        *Dispatcher
	feed     *feed
	topic    string
	settings atomic.Pointer[groupSettings]
	ctx      context.Context
	cancel   context.CancelFunc

	// Of run alone.
	ensured *groupSettings
	want    int
	resting time.Time
	pause   time.Duration
}

// run asks for messages until the lane is cancelled.
func (l *lane) run() {
	l.want = 1
	for l.ctx.Err() == nil {
		err := l.step()
		if err == nil {
			l.pause = 0
			continue
		}
		if l.ctx.Err() != nil {
			return
		}
		l.pause = min(max(2*l.pause, laneRetry), laneRetryMax)
		wait := l.pause
		if e, ok := errors.AsType[*errs.Error](err); ok {
			wait = max(wait, min(e.RetryAfter, laneRetryMax))
		}
		if l.pause >= laneRetryMax {
			l.d.log.Warn("cannot receive what is to be pushed", "subscription", l.feed.sub.ID, "error", err)
		}
		if waitUntil(l.ctx, nil, time.Now().Add(wait)) != nil {
			return
		}
	}
}

// step makes one receive and starts the requests for what it was given.
func (l *lane) step() error {
	if s := l.settings.Load(); l.ensured == nil || !l.ensured.equal(s) {
		ctx, cancel := context.WithTimeout(l.ctx, laneTimeout)
		err := s.ensure(ctx, l.d.backend, l.topic, l.feed.sub.Group, false, nil)
		cancel()
		if err != nil {
			return err
		}
		l.ensured = s
	}
	t, err := l.feed.ep.await(l.ctx, l.resting)
	if err != nil {
		return err
	}
	reply, err := l.receive(t)
	ds := reply.Deliveries
	if t.probe {
		if len(ds) == 0 {
			l.resting = time.Now().Add(probeRest)
			l.feed.ep.unprobed()
			return err
		}
		// Its place is taken before anything else may look at the breaker.
		l.start(ds[0], reply.Bare, true)
		return nil
	}
	if err != nil {
		if t.broken.Err() != nil {
			return nil // not an error: the breaker opened meanwhile
		}
		return err
	}
	// Many messages at a time only where there are many: what is asked for while nothing is there should not take
	// more than a place or two from other topics of the subscription.
	if len(ds) == l.want {
		l.want = min(4*l.want, limits.ReceiveMessagesMax)
	} else {
		l.want = 1
	}
	for i := range ds {
		l.start(ds[i], reply.Bare, false)
	}
	return nil
}

// receive asks for messages; parked, unless it is to find a message to probe with.
func (l *lane) receive(t turn) (raft.Reply, error) {
	s := l.feed.sub
	l.want = min(l.want, t.places)
	r := engine.Receive{Topic: l.topic, Group: s.Group, Max: l.want, Visibility: time.Duration(s.Lease) * time.Second, Deployment: s.Deployment,
		MaxConcurrency: int(l.settings.Load().maxConcurrency)}
	p := raft.Proposal{Bare: true}
	timeout := laneTimeout
	if t.probe {
		r.Max = 1
	} else {
		p.Wait = laneWait
		timeout += laneWait
	}
	p.Command = r.AppendTo(nil)
	ctx, cancel := context.WithTimeout(l.ctx, timeout)
	defer cancel()
	if t.broken != nil {
		// What the receive may have been given in its last moment, the node gives back.
		stop := context.AfterFunc(t.broken, cancel)
		defer stop()
	}
	reply, err := l.d.backend.Propose(ctx, p)
	if err == nil && reply.Code != errs.OK && len(reply.Deliveries) == 0 {
		e := errs.Of(reply.Code)
		e.RetryAfter = reply.RetryAfter
		return reply, e
	}
	return reply, err
}

// start begins the push of one message. From here on it is attempted, whatever becomes of the lane.
func (l *lane) start(delivery engine.Delivery, bare, probe bool) {
	if !l.d.begin() {
		if probe {
			l.feed.ep.unprobed()
		}
		l.d.release(l.topic, l.feed.sub, delivery.Receipt, 0, "")
		return
	}
	// The position is taken here and not on the push's own goroutine: what the lane asks for next depends on it.
	p := &push{d: l.d, feed: l.feed, topic: l.topic, delivery: delivery, bare: bare, probe: probe, ticket: l.feed.ep.enter(probe)}
	go func() {
		defer l.d.pushes.Done()
		p.run()
		if l.d.underway.Add(-1) == 0 {
			l.d.rests.Add(1)
		}
	}()
}

// A push is one message on its way to its endpoint. The message is under a lease from before it starts.
type push struct {
	d        *Dispatcher
	feed     *feed
	topic    string
	delivery engine.Delivery
	bare     bool
	probe    bool
	ticket   *ticket
	// routing: the message does not travel with the request, and the lease is one that a receive by id takes over.
	routing bool
	// held is what of the budget for bodies this push has.
	held int64
}

// lease is how long each lease is that the push holds.
func (p *push) lease() time.Duration { return time.Duration(p.feed.sub.Lease) * time.Second }

// run makes the request and settles what the endpoint did not.
func (p *push) run() {
	if !p.place() {
		p.ticket.leave()
		return
	}
	defer p.letGo()
	sub, ep := p.feed.sub, p.feed.ep
	if sub.MaxDeliveries > 0 && int64(p.delivery.Count) > sub.MaxDeliveries {
		// Another deployment's subscription of the group allows more; this one does not.
		ep.cancelled(p.probe)
		p.settle(engine.Settle{Op: engine.Acknowledge})
		return
	}
	ready := p.load()
	if !ready {
		ep.cancelled(p.probe)
		return
	}
	a := p.send()
	p.d.metrics.observe(a)
	ep.release(a.verdict, a.reason, a.pause)
	if a.reason == "" && !p.routing {
		return // answered: what the answer meant, the SDK has said to the queue itself
	}
	// For a routing-only push the SDK has taken the lease over if it got as far as asking for the message. Whether it
	// did, the engine knows: the receipt is then not the current one.
	if a.reason == "" {
		a.reason = "answered without asking for the message"
	}
	delay := max(time.Duration(sub.RetryAfter)*time.Second, a.pause)
	p.d.release(p.topic, sub, p.delivery.Receipt, min(delay, limits.DelayMax), a.reason)
}

// place waits for a place among the endpoint's requests. The lease is kept meanwhile.
func (p *push) place() bool {
	for {
		ctx, cancel := context.WithTimeout(p.d.life, p.lease()/3)
		err := p.ticket.wait(ctx)
		cancel()
		if err == nil {
			return true
		}
		if p.d.life.Err() != nil || !p.settle(engine.Settle{Op: engine.Extend, Visibility: p.lease()}) {
			return false
		}
	}
}

// load reads the message, and decides whether it travels with the request.
func (p *push) load() bool {
	d, sub := p.d, p.feed.sub
	if p.bare {
		if err := d.loads.Acquire(d.life, 1); err != nil {
			return false
		}
		one := []engine.Delivery{p.delivery}
		err := d.backend.Load(one)
		d.loads.Release(1)
		if p.delivery = one[0]; err != nil || p.delivery.Gone {
			// Expired meanwhile; or the node is on its way out, and the lease runs out.
			return false
		}
	}
	size := int64(len(p.delivery.Body))
	// An empty body may look like none to a framework, and the SDK refuses an inline push without one.
	if sub.Type == wire.PushV2Beta && p.delivery.Large == nil && size > 0 && size <= sub.InlineMax && p.hold(size) {
		return true
	}
	p.routing = true
	p.delivery.Body = nil
	return p.settle(engine.Settle{Op: engine.Route})
}

// hold takes a body's size from the budget. Where it does not fit, the message goes routing only, which holds
// nothing: an endpoint that is slow to take bodies costs no other endpoint its own.
func (p *push) hold(size int64) bool {
	if size <= bodyFree {
		return true
	}
	if p.feed.http.bytes.Add(size) > p.d.share {
		p.feed.http.bytes.Add(-size)
		return false
	}
	if !p.d.bodies.TryAcquire(size) {
		p.feed.http.bytes.Add(-size)
		return false
	}
	p.held = size
	return true
}

func (p *push) letGo() {
	if p.held > 0 {
		p.feed.http.bytes.Add(-p.held)
		p.d.bodies.Release(p.held)
	}
}

// send makes the request.
func (p *push) send() answer {
	d, sub := p.d, p.feed.sub
	if p.feed.http.err != nil {
		return answer{verdict: overloaded, kind: "blocked", reason: p.feed.http.err.Error()}
	}
	ctx, cancel := context.WithTimeout(d.life, time.Duration(sub.Timeout)*time.Second)
	defer cancel()
	sealer := d.sealer.Load()
	now := time.Now()
	e := event{sub: sub, url: p.feed.http.url, topic: p.topic, region: d.region, agent: d.agent, id: sealer.MessageID(p.delivery.ID), delivery: &p.delivery, now: now}
	if p.routing {
		// The lease is for this node alone, to know that nobody else pushes the message meanwhile.
		stop := p.keep(ctx)
		defer stop()
	} else {
		e.receipt = sealer.Receipt(p.delivery.Receipt)
	}
	req, err := e.request(ctx)
	if err != nil {
		return judgeError(err)
	}
	d.metrics.inflight.Inc()
	defer d.metrics.inflight.Dec()
	res, err := p.feed.http.client.Do(req)
	a := judge(res, err, now)
	d.metrics.duration.Observe(time.Since(now).Seconds())
	return a
}

// keep holds the lease of a routing-only push until it is stopped, or was taken over.
func (p *push) keep(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for waitUntil(ctx, nil, time.Now().Add(p.lease()/3)) == nil {
			if !p.settle(engine.Settle{Op: engine.Extend, Visibility: p.lease()}) {
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}

// settle changes the push's own lease, and reports whether it was still its own. A change of unknown outcome counts
// as made: the lease shows the next time.
func (p *push) settle(s engine.Settle) bool {
	return p.d.settle(p.topic, p.feed.sub, p.delivery.Receipt, s)
}

func (d *Dispatcher) settle(topic string, sub *Subscription, receipt engine.Receipt, s engine.Settle) bool {
	s.Topic, s.Group, s.Deployment, s.Receipts = topic, sub.Group, sub.Deployment, []engine.Receipt{receipt}
	// Not the dispatcher's life: what is left to say is said while the node stops, too.
	ctx, cancel := context.WithTimeout(context.Background(), laneTimeout)
	defer cancel()
	r, err := d.backend.Propose(ctx, raft.Proposal{Command: s.AppendTo(nil)})
	if err != nil {
		d.log.Debug("a lease could not be changed and runs out instead", "subscription", sub.ID, "error", err)
		return s.Op == engine.Extend
	}
	code := r.Code
	if code == errs.OK && len(r.Codes) > 0 {
		code = r.Codes[0]
	}
	// A lease that cannot be made longer than its message lives is still this one's.
	return code == errs.OK || code == errs.ExtendPastExpiry
}

// release makes a message deliverable again after a delay, if the lease is still the one of this delivery.
func (d *Dispatcher) release(topic string, sub *Subscription, receipt engine.Receipt, delay time.Duration, reason string) {
	if len(reason) > limits.ReasonBytesMax {
		reason = reason[:limits.ReasonBytesMax]
	}
	d.settle(topic, sub, receipt, engine.Settle{Op: engine.Release, Visibility: delay, Reason: reason})
}

// requester is what carries a subscription's requests.
type requester struct {
	client *http.Client
	url    *url.URL
	// err is why there is none.
	err error
	// bytes counts the bodies of requests in progress.
	bytes atomic.Int64
}

func newRequester(s *Subscription, guard *Guard, connections int) *requester {
	r := new(requester)
	r.client, r.url, r.err = s.client(guard, connections)
	return r
}

// retire closes connections that nothing uses.
func (r *requester) retire() {
	if r.client != nil {
		r.client.CloseIdleConnections()
	}
}
