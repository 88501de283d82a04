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
	// Window is the number of requests that a publisher has under way at once, on one connection. 0 and 1: it
	// waits for each answer before it sends the next request.
	Window int `json:"window,omitempty"`
	// Size is the body's length in bytes, Batch the number of messages of a request.
	Size  int `json:"size"`
	Batch int `json:"batch"`
	// Sizes are the lengths of bodies that take turns, request by request, instead of Size.
	Sizes []int `json:"sizes,omitempty"`
	// Topics is the number of topics that requests take turns at; 0 and 1: there is one, named Topic. Otherwise
	// they are named by TopicName.
	Topics int `json:"topics,omitempty"`
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
	// Keyed gives each message an idempotency key of its own, and Delay keeps it from consumers for so long: a Timed message
	// is due after that. Both with a NodeDriver only. Runs on one cluster need different seeds to have different keys.
	Keyed bool          `json:"keyed,omitempty"`
	Delay time.Duration `json:"delay,omitempty"`

	// Consumers receive up to ReceiveMax messages at a time for a group, acknowledge them, and begin anew. They are
	// spread over the topics first and then over the groups.
	Consumers  int    `json:"consumers,omitempty"`
	Group      string `json:"group,omitempty"`
	ReceiveMax int    `json:"receiveMax,omitempty"`
	// Groups is the number of groups that each receive every message; 0 and 1: there is one, named Group.
	// Otherwise they are named by GroupName.
	Groups int `json:"groups,omitempty"`

	// Stamped makes the beginning of each body name its publisher and number (see Stamp).
	Stamped bool `json:"stamped,omitempty"`
	// Timed makes each body carry the moment at which it was due, so that consumers can tell how long it took to
	// reach them. Publishers and consumers are in one process then.
	Timed bool `json:"timed,omitempty"`
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
	check(w.Window >= 0 && w.Window <= 1<<16, "the window must be 1 to 65536 requests")
	check(w.Window <= 1 || w.Rate == 0, "a fixed rate needs publishers that wait for each answer: leave out the window")
	for _, size := range w.sizes() {
		check(size >= 0 && size <= limits.MessageBytesMax, "the size must be 0 to %d bytes", limits.MessageBytesMax)
		check((size+128)*w.Batch <= limits.BatchBytesMax || w.Batch == 1, "a batch may have %d bytes", limits.BatchBytesMax)
		check(!w.Timed || size >= timeMarkSize, "timed messages need %d bytes", timeMarkSize)
	}
	check(w.Topics >= 0 && w.Topics <= topicsMax, "the number of topics must be 1 to %d", topicsMax)
	check(w.Groups >= 0 && w.Groups <= 1<<10, "the number of groups must be 1 to 1024")
	check(w.Batch >= 1 && w.Batch <= limits.BatchMessagesMax, "a batch has 1 to %d messages", limits.BatchMessagesMax)
	check(w.Rate >= 0, "the rate must not be negative")
	check(w.Delay >= 0 && w.Delay%time.Second == 0 && (w.Delay == 0 || w.Delay < w.Retention), "the delay must be whole seconds, and shorter than the retention")
	check(w.Warmup >= 0 && (w.Duration > 0 || w.Messages > 0), "the duration must be positive")
	check(w.Retention >= limits.RetentionMin && w.Retention <= limits.RetentionMax && w.Retention%time.Second == 0,
		"the retention must be %s to %s, in whole seconds", limits.RetentionMin, limits.RetentionMax)
	if w.Consumers > 0 {
		check(w.Group != "", "no consumer group")
		check(w.ReceiveMax >= 1 && w.ReceiveMax <= receiveMax, "a receive takes 1 to %d messages", receiveMax)
		check(w.Consumers >= w.topics()*w.groups(), "%d topics and %d groups need a consumer each", w.topics(), w.groups())
	}
	if w.Stamped {
		check(w.Batch == 1 && w.Window <= 1 && len(w.Sizes) == 0 && w.topics() == 1 && !w.Timed && w.Size >= StampSize,
			"stamped messages need %d bytes, and neither batches, windows, mixed sizes, several topics, nor times", StampSize)
	}
	return errors.Join(problems...)
}

// topicsMax bounds the number of topics of a workload: each has a prepared request at least.
const topicsMax = 1 << 14

// receiveMax bounds what a receive of any protocol takes; drivers ask for as much of it as theirs allows.
const receiveMax = 1000

func (w *Workload) topics() int { return max(1, w.Topics) }
func (w *Workload) groups() int { return max(1, w.Groups) }
func (w *Workload) window() int { return max(1, w.Window) }

// sizes are the lengths of bodies that take turns.
func (w *Workload) sizes() []int {
	if len(w.Sizes) == 0 {
		return []int{w.Size}
	}
	return w.Sizes
}

// MeanSize is the mean length of a body.
func (w *Workload) MeanSize() float64 {
	sum := 0
	for _, size := range w.sizes() {
		sum += size
	}
	return float64(sum) / float64(len(w.sizes()))
}

// TopicName names topic i.
func (w *Workload) TopicName(i int) string {
	if w.topics() == 1 {
		return w.Topic
	}
	return fmt.Sprintf("%s-%d", w.Topic, i%w.topics())
}

// GroupName names group i.
func (w *Workload) GroupName(i int) string {
	if w.groups() == 1 {
		return w.Group
	}
	return fmt.Sprintf("%s-%d", w.Group, i%w.groups())
}

// Consumes returns what consumer i receives.
func (w *Workload) Consumes(i int) (topic, group string) {
	return w.TopicName(i % w.topics()), w.GroupName(i / w.topics())
}

// A Publisher publishes, one request at a time. Only one goroutine calls it.
type Publisher interface {
	// Publish sends the next request and waits for its answer. due is what a Timed body carries. An Ack without a
	// Stamp in a Stamped workload is of no use.
	Publish(ctx context.Context, due time.Time) (Ack, error)
	Close() error
}

// A Pipeline is a Publisher that can have several requests under way. A workload with a Window needs one.
type Pipeline interface {
	Publisher
	// Send hands the next request over without waiting for its answer, and may wait for room to do so. done is
	// called once with the outcome, from any goroutine. After an error done is not called. Requests that are under
	// way when the context ends may be given up.
	Send(ctx context.Context, due time.Time, done func(Ack, error)) error
}

// Ack is the acknowledgement of one request.
type Ack struct {
	// Messages is the number of messages it stored, Bytes the length of their bodies, Zones the number of zones
	// that hold them, -1 if that was not told.
	Messages int
	Bytes    int
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

// An Overlapper is a Consumer that acknowledges while it receives more, as applications do whose handlers run beside
// their receiving loop.
type Overlapper interface {
	Consumer
	// Overlap takes over what the last Receive leased. The function it returns does what Settle would, and may run on
	// another goroutine during the next Receive, but not beside another of its kind.
	Overlap() func(ctx context.Context) (int, error)
}

// A Driver makes the publishers and consumers of a workload.
type Driver interface {
	Publisher(i int) (Publisher, error)
	// Consumer makes consumer i, which receives what Workload.Consumes says and calls found, unless it is nil,
	// with each body, which is valid until found returns.
	Consumer(i int, found func(body []byte)) (Consumer, error)
}

// Result is what came of a workload. Counts and times are those of the part that counts.
type Result struct {
	Elapsed time.Duration `json:"elapsed"`
	// Messages with so many Bytes of bodies were acknowledged to their publishers, by Requests requests.
	Messages int64 `json:"messages"`
	Bytes    int64 `json:"bytes"`
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
	// EndToEnd is the time from the moment a message was due until a consumer had it, in a Timed workload.
	EndToEnd *Histogram `json:"endToEnd,omitempty"`
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
	// Published is called for each finished request of publisher i, by that publisher's goroutine. Not with a Window.
	Published func(i int, ack Ack, err error)
	// Received is called with the body of each message that consumer i received, by that consumer's goroutine. The
	// body is valid until it returns.
	Received func(i int, body []byte)
}

// Run carries out the workload. It returns early with the context's error, or with the first error of a publisher
// or consumer that could not be made; requests that fail are counted and the run goes on.
func Run(ctx context.Context, w Workload, d Driver, hooks Hooks) (*Result, error) {
	if err := w.Validate(); err != nil {
		return nil, err
	}
	r := &run{w: w, hooks: hooks, result: &Result{
		Failed: map[string]int64{}, Zones: map[int]int64{},
		Publish: NewHistogram(), Receive: NewHistogram(), Acknowledge: NewHistogram(), EndToEnd: NewHistogram(),
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
		loop := func(ctx context.Context) { r.publish(ctx, i, p) }
		if r.w.window() > 1 {
			pipeline, ok := p.(Pipeline)
			if !ok {
				return all, errors.Join(errors.New("this way of publishing has one request under way at a time: leave out the window"), p.Close())
			}
			loop = func(ctx context.Context) { r.pipeline(ctx, pipeline) }
		}
		all = append(all, worker{loop, p.Close})
	}
	for i := range r.w.Consumers {
		arrivals := recorder{to: r.result.EndToEnd}
		c, err := d.Consumer(i, r.found(i, &arrivals))
		if err != nil {
			return all, err
		}
		all = append(all, worker{func(ctx context.Context) { defer arrivals.flush(); r.consume(ctx, c) }, c.Close})
	}
	return all, nil
}

// found returns what consumer i calls with each body, or nil if nobody wants to know.
func (r *run) found(i int, arrivals *recorder) func(body []byte) {
	if !r.w.Timed && r.hooks.Received == nil {
		return nil
	}
	return func(body []byte) {
		if r.hooks.Received != nil {
			r.hooks.Received(i, body)
		}
		if !r.w.Timed || r.phase.Load() != counting {
			return
		}
		if due, ok := readTimeMark(body); ok && !due.Before(r.start) {
			arrivals.record(time.Since(due))
		}
	}
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
	groups := int64(r.w.groups())
	return r.publishing.Load() == 0 && r.acknowledged.Load()/groups >= max(r.w.Messages, r.published.Load())
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
		ack, err := p.Publish(ctx, due)
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
			local.count(ack)
		}
	}
}

// count adds an acknowledged request.
func (r *Result) count(ack Ack) {
	r.Messages += int64(ack.Messages)
	r.Bytes += int64(ack.Bytes)
	r.Requests++
	r.Zones[ack.Zones]++
}

// pipeline is the loop of one publisher with several requests under way.
func (r *run) pipeline(ctx context.Context, p Pipeline) {
	defer r.publishing.Add(-1)
	var (
		mu    sync.Mutex
		over  bool // what comes now comes too late
		bad   atomic.Bool
		rec   = recorder{to: r.result.Publish}
		local = Result{Failed: map[string]int64{}, Zones: map[int]int64{}}
	)
	defer func() {
		mu.Lock()
		defer mu.Unlock()
		over = true
		rec.flush()
		r.add(&local)
	}()
	slots := make(chan struct{}, r.w.window())
	fill := func() bool {
		select {
		case slots <- struct{}{}:
			return true
		case <-ctx.Done():
			return false
		}
	}
	for !r.publishedAll() && fill() {
		due := time.Now()
		done := func(ack Ack, err error) {
			now := time.Now()
			mu.Lock()
			defer mu.Unlock()
			defer func() { <-slots }()
			switch {
			case over || err != nil && ctx.Err() != nil:
			case err != nil:
				local.Failed[codeName(err)]++
				bad.Store(true)
			default:
				r.published.Add(int64(ack.Messages))
				if r.phase.Load() == counting {
					rec.record(now.Sub(due))
					local.count(ack)
				}
			}
		}
		if err := p.Send(ctx, due, done); err != nil {
			done(Ack{}, err)
		}
		if bad.Swap(false) {
			pause(ctx, failurePause)
		}
	}
	for range r.w.window() { // what is under way is waited for, unless the run is over
		if !fill() {
			return
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
	over, _ := c.(Overlapper)
	type settled struct {
		n    int
		took time.Duration
		err  error
	}
	under := make(chan settled, 1) // of the one settlement under way
	busy := false
	finish := func() {
		if !busy {
			return
		}
		busy = false
		s := <-under
		if s.err != nil && ctx.Err() == nil {
			local.Failed[codeName(s.err)]++
			pause(ctx, failurePause)
		}
		if s.n > 0 && r.phase.Load() == counting {
			acknowledge.record(s.took)
			local.Acknowledged += int64(s.n)
		}
	}
	defer finish()
	settle := func(f func(context.Context) (int, error)) {
		began := time.Now()
		n, err := f(ctx)
		r.acknowledged.Add(int64(n))
		if r.done() {
			r.cancel() // nobody has anything to wait for
		}
		under <- settled{n, time.Since(began), err}
	}
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
		finish()
		busy = true
		if over == nil {
			settle(c.Settle)
			finish()
			continue
		}
		f := over.Overlap()
		go settle(f)
	}
}

// add adds one worker's counts.
func (r *run) add(local *Result) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.result.Messages += local.Messages
	r.result.Bytes += local.Bytes
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
