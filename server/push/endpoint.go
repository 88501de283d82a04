package push

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Bounds of requests. A subscription begins with startLimit requests at a time, and gets more while its endpoint
// answers and less when it does not.
const (
	startLimit = 16
	// requestsMax bounds the requests of one subscription.
	requestsMax = 1024
	// requestsFree is how many requests every subscription may have whatever the others do; all beyond that come
	// out of one pool.
	requestsFree = 4
	// poolMax is the size of that pool.
	poolMax = 4096
)

// Breaker.
const (
	// breakerFailures is how many requests in a row have to fail for the breaker to open.
	breakerFailures = 5
	// probeMin is the first pause before a probe; pauses double up to the subscription's retryAfterSeconds.
	probeMin = time.Second
	// retryAfterHeaderMax bounds what a Retry-After can ask for.
	retryAfterHeaderMax = time.Hour
)

// verdict is what an answer, or the lack of one, says of the endpoint.
type verdict uint8

const (
	// served: the endpoint answered, whatever it made of the message. A handler's error is one of these.
	served verdict = iota
	// overloaded: it could not be reached, did not answer in time, or answered 429 or 502 to 504.
	overloaded
)

// breakerState is where a breaker is.
type breakerState uint8

const (
	// breakerClosed lets everything through.
	breakerClosed breakerState = iota
	// breakerOpen lets nothing through until the next probe is due.
	breakerOpen
	// breakerProbing waits for the answer to a probe.
	breakerProbing
)

func (b breakerState) String() string {
	return [...]string{"closed", "open", "probing"}[b]
}

// pool is what the requests beyond each subscription's own few have in common.
type pool struct {
	mu      sync.Mutex
	free    int
	waiting []*endpoint
}

// take takes a place, or promises to wake the endpoint when one is free.
func (p *pool) take(e *endpoint) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.free > 0 {
		p.free--
		return true
	}
	if !e.inPool {
		e.inPool = true
		p.waiting = append(p.waiting, e)
	}
	return false
}

// give gives a place back. If somebody waits for one, the place is theirs, and they are to be told (awake) with no lock
// held: whoever gives one back must not be able to take it again before those who have waited longer.
func (p *pool) give() *endpoint {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.waiting) == 0 {
		p.free++
		return nil
	}
	e := p.waiting[0]
	p.waiting = p.waiting[1:]
	e.inPool = false
	return e
}

// An endpoint is how one subscription's URL fares: how many requests it may have at a time, whether it is worth
// asking at all, and what became of the requests so far. Two subscriptions with one URL are two endpoints: what one
// of them meets says nothing of the other's route.
type endpoint struct {
	pool *pool
	// probeMax is the longest pause between two probes.
	probeMax time.Duration
	most     int
	paused   bool

	// inPool is guarded by the pool.
	inPool bool

	mu       sync.Mutex
	limit    float64
	inflight int
	// pooled of them have a place of the pool; offered is one that is about to be taken.
	pooled, offered int
	// slow is set once the endpoint has been overloaded: from then on the limit grows by one a round.
	slow    bool
	waiters []*ticket
	// changed is closed and made anew when the breaker, or the number of places, changes.
	changed chan struct{}
	// opened ends when the breaker opens, and when the endpoint asks for a pause.
	opened context.Context
	open   context.CancelFunc

	breaker   breakerState
	failures  int
	openSince time.Time
	probeAt   time.Time
	probeGap  time.Duration
	notBefore time.Time

	requests, succeeded, failed uint64
	lastError                   string
	lastErrorAt, lastPushAt     time.Time
}

func newEndpoint(s *Subscription, p *pool) *endpoint {
	e := &endpoint{pool: p, probeMax: max(probeMin, time.Duration(s.RetryAfter)*time.Second), most: requestsMax, paused: s.Paused, changed: make(chan struct{})}
	if s.MaxConcurrency > 0 && s.Topic[len(s.Topic)-1] != '*' {
		e.most = int(min(int64(e.most), s.MaxConcurrency))
	}
	e.limit = float64(min(startLimit, e.most))
	e.opened, e.open = context.WithCancel(context.Background())
	return e
}

// change wakes whoever waits for a change of state.
func (e *endpoint) changeLocked() {
	close(e.changed)
	e.changed = make(chan struct{})
}

// turn is what a lane may ask for.
type turn struct {
	// places is how many messages at most; 0 when the wait was given up.
	places int
	// probe: the breaker is open and this is the one that may try. It ends with probed.
	probe bool
	// broken is done when the breaker opens or the endpoint asks for a pause: what is waited for then should not be
	// waited for any more.
	broken context.Context
}

// await waits until it makes sense to ask for messages: the breaker is closed and a place is free, or a probe is
// due. A lane that has just looked for a message to probe with and found none passes notBefore.
func (e *endpoint) await(ctx context.Context, notBefore time.Time) (turn, error) {
	for {
		e.mu.Lock()
		now := time.Now()
		var until time.Time
		switch {
		case e.paused:
		case now.Before(e.notBefore):
			until = e.notBefore
		case e.breaker == breakerClosed:
			if room := int(e.limit) - e.inflight - len(e.waiters); room > 0 {
				t := turn{places: room, broken: e.opened}
				e.mu.Unlock()
				return t, nil
			}
		case e.breaker == breakerOpen && !now.Before(e.probeAt) && !now.Before(notBefore):
			e.breaker = breakerProbing
			e.mu.Unlock()
			return turn{places: 1, probe: true}, nil
		case e.breaker == breakerOpen:
			until = e.probeAt
			if notBefore.After(until) {
				until = notBefore
			}
		}
		changed := e.changed
		e.mu.Unlock()
		if err := waitUntil(ctx, changed, until); err != nil {
			return turn{}, err
		}
	}
}

// waitUntil waits for a signal, a time (zero: none), or the end of ctx.
func waitUntil(ctx context.Context, signal <-chan struct{}, until time.Time) error {
	var timer <-chan time.Time
	if !until.IsZero() {
		t := time.NewTimer(time.Until(until))
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-signal:
	case <-timer:
	}
	return nil
}

// unprobed gives the right to probe back: there was no message to probe with.
func (e *endpoint) unprobed() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.breaker == breakerProbing {
		e.breaker = breakerOpen
		e.changeLocked()
	}
}

// ticket is a request's place, or its position among those who wait for one.
type ticket struct {
	e *endpoint
	// ready is closed once there is a place; nil for one that there was at once.
	ready chan struct{}
}

// enter takes a place for one request, or the last position among those who wait. A probe always has a place.
func (e *endpoint) enter(probe bool) *ticket {
	e.mu.Lock()
	defer e.mu.Unlock()
	t := &ticket{e: e}
	switch {
	case probe:
		e.inflight++
	case len(e.waiters) == 0 && e.admitLocked():
	default:
		t.ready = make(chan struct{})
		e.waiters = append(e.waiters, t)
		return t
	}
	e.lastPushAt = time.Now()
	return t
}

// wait returns once the place is there, or with an error when ctx ends first; the position is kept.
func (t *ticket) wait(ctx context.Context) error {
	if t.ready == nil {
		return nil
	}
	select {
	case <-t.ready:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// leave gives up the position, or the place that was given in the same moment.
func (t *ticket) leave() {
	t.e.mu.Lock()
	for i, w := range t.e.waiters {
		if w == t {
			t.e.waiters = append(t.e.waiters[:i], t.e.waiters[i+1:]...)
			t.e.changeLocked()
			t.e.mu.Unlock()
			return
		}
	}
	t.e.mu.Unlock()
	t.e.cancelled(false)
}

// admitLocked takes a place if there is one.
func (e *endpoint) admitLocked() bool {
	if e.inflight >= max(int(e.limit), 1) || time.Now().Before(e.notBefore) {
		return false
	}
	if e.inflight-e.pooled >= requestsFree {
		switch {
		case e.offered > 0:
			e.offered--
		case !e.pool.take(e):
			return false
		}
		e.pooled++
	}
	e.inflight++
	return true
}

// pumpLocked gives free places to those who wait for them.
func (e *endpoint) pumpLocked() {
	for len(e.waiters) > 0 && e.admitLocked() {
		close(e.waiters[0].ready)
		e.waiters = e.waiters[1:]
		e.lastPushAt = time.Now()
	}
}

// release gives a place back with what the request said. reason is empty for a 2xx; pause is what the endpoint asked
// for, 0 for nothing.
func (e *endpoint) release(v verdict, reason string, pause time.Duration) {
	now := time.Now()
	e.mu.Lock()
	full := e.inflight >= int(e.limit)
	e.inflight--
	var wake *endpoint
	if e.pooled > max(e.inflight-requestsFree, 0) {
		e.pooled--
		wake = e.pool.give()
	}
	e.requests++
	if reason == "" {
		e.succeeded++
	} else {
		e.failed++
		e.lastError, e.lastErrorAt = reason, now
	}
	if v == served {
		e.servedLocked(full)
	} else {
		e.overloadedLocked(now, pause)
	}
	e.pumpLocked()
	e.changeLocked()
	e.mu.Unlock()
	wake.awake()
}

// cancelled gives a place back that no request was made with.
func (e *endpoint) cancelled(probe bool) {
	e.mu.Lock()
	e.inflight--
	var wake *endpoint
	if e.pooled > max(e.inflight-requestsFree, 0) {
		e.pooled--
		wake = e.pool.give()
	}
	if probe && e.breaker == breakerProbing {
		e.breaker = breakerOpen
	}
	e.pumpLocked()
	e.changeLocked()
	e.mu.Unlock()
	wake.awake()
}

// awake takes a place of the pool for those who wait, or passes it on.
func (e *endpoint) awake() {
	for e != nil {
		e.mu.Lock()
		e.offered++
		e.pumpLocked()
		var next *endpoint
		if e.offered > 0 {
			e.offered--
			next = e.pool.give()
		}
		e.changeLocked()
		e.mu.Unlock()
		e = next
	}
}

func (e *endpoint) servedLocked(full bool) {
	e.failures = 0
	if e.breaker != breakerClosed {
		e.breaker, e.probeGap = breakerClosed, 0
		e.opened, e.open = context.WithCancel(context.Background())
		return
	}
	switch {
	case !full:
		// More places would not have been used.
	case e.slow:
		e.limit += 1 / e.limit
	default:
		e.limit++
	}
	e.limit = min(e.limit, float64(e.most))
}

func (e *endpoint) overloadedLocked(now time.Time, pause time.Duration) {
	e.slow = true
	e.limit = max(e.limit/2, 1)
	e.failures++
	if pause > 0 {
		if at := now.Add(min(pause, retryAfterHeaderMax)); at.After(e.notBefore) {
			e.notBefore = at
			// What was granted already waits for the end of it; what is parked asks anew then.
			time.AfterFunc(at.Sub(now), func() {
				e.mu.Lock()
				defer e.mu.Unlock()
				e.pumpLocked()
				e.changeLocked()
			})
			if e.breaker == breakerClosed {
				e.open()
				e.opened, e.open = context.WithCancel(context.Background())
			}
		}
	}
	switch {
	case e.breaker == breakerClosed && e.failures < breakerFailures:
		return
	case e.breaker == breakerClosed:
		e.openSince, e.probeGap = now, 0
		e.open()
	case e.breaker == breakerOpen:
		// A request from before it opened.
		return
	}
	e.breaker = breakerOpen
	e.limit = 1
	e.probeGap = min(max(2*e.probeGap, probeMin), e.probeMax)
	e.probeAt = now.Add(e.probeGap)
}

// snapshot describes the endpoint as of now.
type snapshot struct {
	state, breaker              string
	openSince, nextProbe        time.Time
	inflight, limit             int
	requests, succeeded, failed uint64
	lastError                   string
	lastErrorAt, lastPushAt     time.Time
}

func (e *endpoint) snapshot() snapshot {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := snapshot{
		state: "active", breaker: e.breaker.String(), inflight: e.inflight, limit: max(int(e.limit), 1), requests: e.requests, succeeded: e.succeeded,
		failed: e.failed, lastError: e.lastError, lastErrorAt: e.lastErrorAt, lastPushAt: e.lastPushAt,
	}
	switch {
	case e.paused:
		s.state = "paused"
	case e.breaker != breakerClosed:
		s.state, s.openSince, s.nextProbe = "failing", e.openSince, e.probeAt
	case time.Now().Before(e.notBefore):
		s.state = "throttled"
	}
	if e.notBefore.After(s.nextProbe) && s.state == "failing" {
		s.nextProbe = e.notBefore
	}
	return s
}

// String is for logs.
func (s snapshot) String() string {
	return fmt.Sprintf("%s, breaker %s, %d of %d in flight", s.state, s.breaker, s.inflight, s.limit)
}
