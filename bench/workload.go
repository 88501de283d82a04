package bench

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// Workload is what is asked of a cluster. It travels as JSON to the process that carries it out.
type Workload struct {
	Topic string `json:"topic"`
	// Publishers is the number of requests in flight; each publishes one request after the other.
	Publishers int `json:"publishers"`
	// Size is the body's length in bytes, Batch the number of messages of a request.
	Size  int `json:"size"`
	Batch int `json:"batch"`
	// Rate is the number of messages a second that become due, spread evenly over the publishers. Zero is a
	// closed loop: as fast as the answers come.
	Rate float64 `json:"rate,omitempty"`
	// Warmup comes before the Duration that counts.
	Warmup   time.Duration `json:"warmup"`
	Duration time.Duration `json:"duration"`
	// Messages ends the run after so many instead: published, without publishers acknowledged, with both published
	// and acknowledged. Everything counts then.
	Messages int64 `json:"messages,omitempty"`
	// Retention is that of the messages.
	Retention time.Duration `json:"retention"`
	// AllZones asks for durability all with each publish.
	AllZones bool `json:"allZones,omitempty"`

	// Consumers receive up to ReceiveMax messages at a time for Group, acknowledge them, and begin anew.
	Consumers  int    `json:"consumers,omitempty"`
	Group      string `json:"group,omitempty"`
	ReceiveMax int    `json:"receiveMax,omitempty"`

	// Stamped makes the beginning of each body name its publisher and number (see Stamp).
	Stamped bool `json:"stamped,omitempty"`
	// Seed makes the bodies.
	Seed uint64 `json:"seed"`
}

// Validate checks the workload against the limits of the protocol and of good sense.
func (w *Workload) Validate() error {
	var problems []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			problems = append(problems, fmt.Errorf(format, args...))
		}
	}
	check(w.Topic != "", "no topic")
	check(w.Publishers >= 0 && w.Consumers >= 0 && w.Publishers+w.Consumers > 0, "neither publishers nor consumers")
	check(w.Publishers <= 1<<16 && w.Consumers <= 1<<16, "more than 65536 publishers or consumers")
	check(w.Size >= 0 && w.Size <= limits.MessageBytesMax, "the size must be 0 to %d bytes", limits.MessageBytesMax)
	check(w.Batch >= 1 && w.Batch <= limits.BatchMessagesMax, "a batch has 1 to %d messages", limits.BatchMessagesMax)
	check((w.Size+128)*w.Batch <= limits.BatchBytesMax || w.Batch == 1, "a batch may have %d bytes", limits.BatchBytesMax)
	check(w.Rate >= 0, "the rate must not be negative")
	check(w.Warmup >= 0 && (w.Duration > 0 || w.Messages > 0), "the duration must be positive")
	check(w.Retention >= limits.RetentionMin && w.Retention <= limits.RetentionMax && w.Retention%time.Second == 0,
		"the retention must be %s to %s, in whole seconds", limits.RetentionMin, limits.RetentionMax)
	if w.Consumers > 0 {
		check(w.Group != "", "no consumer group")
		check(w.ReceiveMax >= 1 && w.ReceiveMax <= limits.ReceiveMessagesMax, "a receive takes 1 to %d messages", limits.ReceiveMessagesMax)
	}
	if w.Stamped {
		check(w.Batch == 1 && w.Size >= StampSize, "stamped messages need %d bytes and no batches", StampSize)
	}
	return errors.Join(problems...)
}

// A Publisher publishes, one request at a time. Only one goroutine calls it.
type Publisher interface {
	// Publish sends the next request and waits for its answer. An Ack without a Stamp in a Stamped workload is
	// of no use.
	Publish(ctx context.Context) (Ack, error)
	Close() error
}

// Ack is the acknowledgement of one request.
type Ack struct {
	// Messages is the number of messages it stored, Zones the number of zones that hold them.
	Messages int
	Zones    int
	// Stamp is the last message's, in a Stamped workload.
	Stamp Stamp
}

// A Consumer receives and acknowledges. Only one goroutine calls it.
type Consumer interface {
	// Receive leases some messages, waiting a while for the first one, and returns their number.
	Receive(ctx context.Context) (int, error)
	// Settle acknowledges what the last Receive leased and returns how many it got done.
	Settle(ctx context.Context) (int, error)
	Close() error
}

// A Driver makes the publishers and consumers of a workload.
type Driver interface {
	Publisher(i int) (Publisher, error)
	Consumer(i int) (Consumer, error)
}

// Result is what came of a workload. Counts and times are those of the part that counts.
type Result struct {
	Elapsed time.Duration `json:"elapsed"`
	// Messages were acknowledged to their publishers, by Requests requests.
	Messages int64 `json:"messages"`
	Requests int64 `json:"requests"`
	// Failed requests, by the stable code of their error, over the whole run.
	Failed map[string]int64 `json:"failed,omitempty"`
	// Zones counts requests by the number of zones that held their messages.
	Zones map[int]int64 `json:"zones,omitempty"`
	// Publish is the time of a request.
	Publish *Histogram `json:"publish"`
	// Received and Acknowledged count messages, Receive and Acknowledge are the times of a request. A receive
	// that found nothing is not counted.
	Received     int64      `json:"received,omitempty"`
	Acknowledged int64      `json:"acknowledged,omitempty"`
	Receive      *Histogram `json:"receive,omitempty"`
	Acknowledge  *Histogram `json:"acknowledge,omitempty"`
}

// MessagesPerSecond is the rate at which messages were acknowledged to their publishers.
func (r *Result) MessagesPerSecond() float64 { return perSecond(r.Messages, r.Elapsed) }

func perSecond(n int64, d time.Duration) float64 {
	if d <= 0 {
		return 0
	}
	return float64(n) / d.Seconds()
}

// Hooks are called while a workload runs. All are optional.
type Hooks struct {
	// Begin is called when the part that counts begins, End when it has ended, on one goroutine.
	Begin, End func()
	// Progress is called about once a second with what was published and acknowledged so far.
	Progress func(published, acknowledged int64)
	// Published is called for each finished request of publisher i, by that publisher's goroutine.
	Published func(i int, ack Ack, err error)
}

// Run carries out the workload. It returns early with the context's error, or with the first error of a publisher
// or consumer that could not be made; requests that fail are counted and the run goes on.
func Run(ctx context.Context, w Workload, d Driver, hooks Hooks) (*Result, error) {
	if err := w.Validate(); err != nil {
		return nil, err
	}
	r := &run{w: w, hooks: hooks, result: &Result{
		Failed: map[string]int64{}, Zones: map[int]int64{},
		Publish: NewHistogram(), Receive: NewHistogram(), Acknowledge: NewHistogram(),
	}}
	workers, err := r.workers(d)
	defer func() {
		for _, w := range workers {
			_ = w.close() // what was to be said has been said
		}
	}()
	if err != nil {
		return nil, err
	}
	err = r.all(ctx, workers)
	return r.result, err
}

// The phases of a run.
const (
	warming int32 = iota
	counting
	over
)

// failurePause is how long a publisher or consumer waits after an error, so that a cluster that refuses everything
// is not asked a million times a second.
const failurePause = 5 * time.Millisecond

type run struct {
	w     Workload
	hooks Hooks

	phase atomic.Int32
	start time.Time // of the whole run: requests become due from here
	// published and acknowledged count messages over the whole run.
	published, acknowledged atomic.Int64
	publishing              atomic.Int64 // publishers that have not ended
	cancel                  context.CancelFunc

	mu     sync.Mutex
	result *Result
}

// worker is one publisher's or consumer's goroutine.
type worker struct {
	loop  func(ctx context.Context)
	close func() error
}

func (r *run) workers(d Driver) ([]worker, error) {
	var all []worker
	for i := range r.w.Publishers {
		p, err := d.Publisher(i)
		if err != nil {
			return all, err
		}
		all = append(all, worker{func(ctx context.Context) { r.publish(ctx, i, p) }, p.Close})
	}
	for i := range r.w.Consumers {
		c, err := d.Consumer(i)
		if err != nil {
			return all, err
		}
		all = append(all, worker{func(ctx context.Context) { r.consume(ctx, c) }, c.Close})
	}
	return all, nil
}

// all runs the workers to the end of the run and sets the result's elapsed time.
func (r *run) all(parent context.Context, workers []worker) error {
	ctx, cancel := context.WithCancel(parent)
	defer cancel()
	r.cancel = cancel
	r.publishing.Store(int64(r.w.Publishers))
	r.start = time.Now()
	if r.w.Messages > 0 {
		r.begin()
	}
	began := time.Now()
	var group sync.WaitGroup
	for _, w := range workers {
		group.Go(func() { w.loop(ctx) })
	}
	stopped := make(chan struct{})
	go func() { group.Wait(); close(stopped) }()

	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var next <-chan time.Time
	complete := false
	if r.w.Messages == 0 {
		next = time.After(r.w.Warmup)
	}
	for {
		select {
		case <-tick.C:
			if r.hooks.Progress != nil {
				r.hooks.Progress(r.published.Load(), r.acknowledged.Load())
			}
		case <-next:
			if r.phase.Load() == warming {
				r.begin()
				began = time.Now()
				next = time.After(r.w.Duration)
				continue
			}
			r.finish(began)
			complete, next = true, nil
			cancel()
		case <-stopped:
			if r.phase.Load() == counting {
				r.finish(began)
			}
			if complete || r.done() {
				return nil
			}
			return parent.Err()
		}
	}
}

func (r *run) begin() {
	if r.hooks.Begin != nil {
		r.hooks.Begin()
	}
	r.phase.Store(counting)
}

func (r *run) finish(began time.Time) {
	r.phase.Store(over)
	r.result.Elapsed = time.Since(began)
	if r.hooks.End != nil {
		r.hooks.End()
	}
}

// publishedAll reports whether a run of a number of messages has published them all.
func (r *run) publishedAll() bool { return r.w.Messages > 0 && r.published.Load() >= r.w.Messages }

// done reports whether a run of a number of messages is complete.
func (r *run) done() bool {
	switch {
	case r.w.Messages == 0 || r.w.Publishers > 0 && !r.publishedAll():
		return false
	case r.w.Consumers == 0:
		return true
	}
	// A few requests may have been under way when enough was published; they are waited for.
	return r.publishing.Load() == 0 && r.acknowledged.Load() >= max(r.w.Messages, r.published.Load())
}

// publish is one publisher's loop.
func (r *run) publish(ctx context.Context, i int, p Publisher) {
	rec := recorder{to: r.result.Publish}
	defer rec.flush()
	local := Result{Failed: map[string]int64{}, Zones: map[int]int64{}}
	defer r.add(&local)
	defer r.publishing.Add(-1)
	schedule := newSchedule(r.start, r.w, i)
	for n := int64(0); ctx.Err() == nil; n++ {
		if r.publishedAll() {
			return
		}
		due, ok := schedule.wait(ctx, n)
		if !ok {
			return
		}
		ack, err := p.Publish(ctx)
		now := time.Now()
		if ctx.Err() != nil && err != nil {
			return // the run's end interrupted it
		}
		if r.hooks.Published != nil {
			r.hooks.Published(i, ack, err)
		}
		if err != nil {
			local.Failed[codeName(err)]++
			pause(ctx, failurePause)
			continue
		}
		r.published.Add(int64(ack.Messages))
		if r.phase.Load() == counting {
			rec.record(now.Sub(due))
			local.Messages += int64(ack.Messages)
			local.Requests++
			local.Zones[ack.Zones]++
		}
	}
}

// consume is one consumer's loop.
func (r *run) consume(ctx context.Context, c Consumer) {
	receive, acknowledge := recorder{to: r.result.Receive}, recorder{to: r.result.Acknowledge}
	defer receive.flush()
	defer acknowledge.flush()
	local := Result{Failed: map[string]int64{}}
	defer r.add(&local)
	for ctx.Err() == nil {
		if r.done() {
			r.cancel() // the others wait for nothing
			return
		}
		began := time.Now()
		n, err := c.Receive(ctx)
		received := time.Now()
		if err != nil || n == 0 {
			if err != nil && ctx.Err() == nil {
				local.Failed[codeName(err)]++
				pause(ctx, failurePause)
			}
			continue
		}
		if r.phase.Load() == counting {
			receive.record(received.Sub(began))
			local.Received += int64(n)
		}
		n, err = c.Settle(ctx)
		if err != nil && ctx.Err() == nil {
			local.Failed[codeName(err)]++
			pause(ctx, failurePause)
		}
		r.acknowledged.Add(int64(n))
		if n > 0 && r.phase.Load() == counting {
			acknowledge.record(time.Since(received))
			local.Acknowledged += int64(n)
		}
	}
}

// add adds one worker's counts.
func (r *run) add(local *Result) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.result.Messages += local.Messages
	r.result.Requests += local.Requests
	r.result.Received += local.Received
	r.result.Acknowledged += local.Acknowledged
	for code, n := range local.Failed {
		r.result.Failed[code] += n
	}
	for zones, n := range local.Zones {
		r.result.Zones[zones] += n
	}
}

// codeName is the stable name of an error.
func codeName(err error) string { return errs.CodeOf(err).String() }

// pause waits without holding up the run's end.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// schedule says when the requests of one publisher are due. In an open loop that does not depend on the answers.
type schedule struct {
	start    time.Time
	interval time.Duration // between two requests of this publisher; 0 in a closed loop
	timer    *time.Timer
}

func newSchedule(start time.Time, w Workload, i int) *schedule {
	if w.Rate <= 0 {
		return &schedule{}
	}
	// All publishers together have Rate/Batch requests a second; publisher i starts i/Publishers of an interval
	// late, so that they do not march in step.
	interval := float64(w.Publishers) * float64(w.Batch) / w.Rate * float64(time.Second)
	return &schedule{
		start:    start.Add(time.Duration(interval * float64(i) / float64(w.Publishers))),
		interval: time.Duration(interval),
	}
}

// wait returns when request n is due, which may be long past. False: the run ended before.
func (s *schedule) wait(ctx context.Context, n int64) (due time.Time, ok bool) {
	if s.interval == 0 {
		return time.Now(), true
	}
	due = s.start.Add(time.Duration(n) * s.interval)
	left := time.Until(due)
	if left <= 0 {
		return due, true
	}
	if s.timer == nil {
		s.timer = time.NewTimer(left)
	} else {
		s.timer.Reset(left)
	}
	select {
	case <-s.timer.C:
		return due, true
	case <-ctx.Done():
		return due, false
	}
}
