// Package workload drives a cluster with publishers and consumers the way applications would, only worse: some
// consumers give messages back, extend, dawdle past the end of their lease, forget messages, acknowledge twice,
// and come back with receipts that are long over. Everything is recorded in a [history.Recorder] and checked when
// the load ends.
package workload

import (
	"bytes"
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
	"tercet.dev/tercet/test/history"
)

// Options say how much load there is. The zero value of a field means its default.
type Options struct {
	// Topic must be unused (default "load").
	Topic string
	// Groups are the consumer groups (default g1 and g2).
	Groups []string
	// Publishers is the number of publishers (default 6), Consumers that of each group (default 3). They spread
	// over the nodes and go to the next one when a node does not serve them.
	Publishers, Consumers int
	// Pace is the time between two messages of one publisher (default 20 ms).
	Pace time.Duration
	// Timeout is how long a client waits for an answer (default 5 s).
	Timeout time.Duration
	// Seed decides sizes, leases and what consumers do.
	Seed uint64
	// Nodes are the indices of the nodes that clients talk to (default all).
	Nodes []int
	// Faithful makes every consumer acknowledge all it gets, in time.
	Faithful bool
	// Header goes on every publish.
	Header map[string]string
}

// leases are the visibility timeouts that consumers choose from; the last is the longest.
var leases = []time.Duration{2 * time.Second, 2 * time.Second, 3 * time.Second}

// A Load is running publishers and consumers.
type Load struct {
	Recorder *history.Recorder
	Topic    string

	tb         testing.TB
	c          *harness.Cluster
	opts       Options
	hashes     *harness.HashWatch
	publishing atomic.Bool
	draining   atomic.Bool
	deadline   atomic.Pointer[time.Time]
	publishers sync.WaitGroup
	consumers  sync.WaitGroup
	cancel     context.CancelFunc
	undrained  atomic.Int32
	finished   bool
}

// Start begins the load. Finish ends it.
func Start(tb testing.TB, c *harness.Cluster, o Options) *Load {
	tb.Helper()
	if o.Topic == "" {
		o.Topic = "load"
	}
	if o.Groups == nil {
		o.Groups = []string{"g1", "g2"}
	}
	if o.Publishers == 0 {
		o.Publishers = 6
	}
	if o.Consumers == 0 {
		o.Consumers = 3
	}
	if o.Pace == 0 {
		o.Pace = 20 * time.Millisecond
	}
	if o.Timeout == 0 {
		o.Timeout = 5 * time.Second
	}
	if o.Nodes == nil {
		for i := range c.Nodes {
			o.Nodes = append(o.Nodes, i)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	l := &Load{Recorder: history.NewRecorder(o.Groups...), Topic: o.Topic, tb: tb, c: c, opts: o, cancel: cancel, hashes: c.WatchHashes()}
	l.publishing.Store(true)
	for i := range o.Publishers {
		p := &publisher{load: l, name: fmt.Sprintf("%s-p%d", o.Topic, i)}
		p.clients.start(l, i)
		l.publishers.Add(1)
		go func() {
			defer l.publishers.Done()
			defer p.clients.close()
			p.run(ctx)
		}()
	}
	for _, group := range o.Groups {
		for i := range o.Consumers {
			w := &consumer{load: l, group: group, rng: harness.Rand(o.Seed, fmt.Sprintf("%s/%s/%d", o.Topic, group, i))}
			w.clients.start(l, i)
			l.consumers.Add(1)
			go func() {
				defer l.consumers.Done()
				defer w.clients.close()
				w.run(ctx)
			}()
		}
	}
	tb.Cleanup(func() {
		if !l.finished { // the test gave up
			l.publishing.Store(false)
			cancel()
			l.publishers.Wait()
			l.consumers.Wait()
		}
	})
	return l
}

// WaitPublished waits until n more publishes have succeeded: proof that the cluster takes them.
func (l *Load) WaitPublished(n int) {
	l.tb.Helper()
	from := l.Recorder.PublishedOK()
	harness.Until(l.tb, 30*time.Second, fmt.Sprintf("%d more publishes", n), func() error {
		if got := l.Recorder.PublishedOK() - from; got < n {
			return fmt.Errorf("%d so far", got)
		}
		return nil
	})
}

// Run lets the load go on for this long. It is the length of an experiment and waits for nothing.
func (l *Load) Run(d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	<-timer.C
}

// Finish stops publishing, has each group receive until nothing is left, and checks what was recorded. The cluster
// must be whole again.
func (l *Load) Finish() (*history.History, *history.Report) {
	l.tb.Helper()
	l.publishing.Store(false)
	l.publishers.Wait()
	limit := time.Now().Add(5 * time.Minute)
	l.deadline.Store(&limit)
	l.Recorder.Mark("drain")
	l.draining.Store(true)
	l.consumers.Wait()
	l.cancel()
	l.finished = true
	l.hashes.Stop(l.tb)
	if n := l.undrained.Load(); n > 0 {
		l.tb.Errorf("%d consumers could not drain their group in five minutes", n)
	}
	h := l.Recorder.History()
	r := history.Check(h)
	l.tb.Logf("%s: %v", l.Topic, r)
	report(l.tb, r.Violations)
	checked, bad := history.Linearizable(h, 30*time.Second)
	l.tb.Logf("porcupine explained %d of %d messages with several leases or acknowledgements", checked-len(bad), checked)
	report(l.tb, bad)
	return h, r
}

func report(tb testing.TB, violations []string) {
	tb.Helper()
	for i, v := range violations {
		if i == 15 {
			tb.Errorf("… and %d more violations", len(violations)-i)
			return
		}
		tb.Error(v)
	}
}

// Body returns the body of the message with this key: the key, a line end, and bytes that follow from the key.
func Body(key string, size int) []byte {
	b := append(make([]byte, 0, size+len(key)+1), key...)
	b = append(b, '\n')
	h := fnv.New64a()
	h.Write([]byte(key))
	state := h.Sum64()
	for len(b) < size {
		state = state*6364136223846793005 + 1442695040888963407
		b = append(b, byte(state>>56))
	}
	return b
}

// KeyOf returns the key of a body, and whether the body is the one that Body made.
func KeyOf(body []byte) (key string, intact bool) {
	k, _, ok := bytes.Cut(body, []byte{'\n'})
	if !ok {
		return "", false
	}
	return string(k), bytes.Equal(body, Body(string(k), len(body)))
}

// clients are one client's connections to the nodes, of which it uses one at a time.
type clients struct {
	all     []*harness.Client
	names   []string
	current int
}

func (cs *clients) start(l *Load, first int) {
	for _, i := range l.opts.Nodes {
		c := l.c.Nodes[i].NewClient()
		c.Timeout = l.opts.Timeout
		cs.all = append(cs.all, c)
		cs.names = append(cs.names, l.c.Nodes[i].ID)
	}
	cs.current = first % len(cs.all)
}

func (cs *clients) close() {
	for _, c := range cs.all {
		c.Close()
	}
}

func (cs *clients) get() (*harness.Client, string) { return cs.all[cs.current], cs.names[cs.current] }

// next goes to another node.
func (cs *clients) next() { cs.current = (cs.current + 1) % len(cs.all) }

// pause waits, unless ctx ends.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

type publisher struct {
	load    *Load
	name    string
	clients clients
}

// retryPause is how long a client waits before it goes to the next node. Shorter than what the server advises
// (whole seconds), so that gaps are measured and not made.
const retryPause = 10 * time.Millisecond

func (p *publisher) run(ctx context.Context) {
	l := p.load
	rng := harness.Rand(l.opts.Seed, p.name)
	for seq := 0; l.publishing.Load() && ctx.Err() == nil; seq++ {
		size := 64 + rng.IntN(1024)
		if rng.IntN(50) == 0 {
			size = 30 << 10
		}
		// The same message again after a refusal, under a key of its own, until it is in or may be.
		for attempt := 0; ctx.Err() == nil; attempt++ {
			key := fmt.Sprintf("%s-%d", p.name, seq)
			if attempt > 0 {
				key = fmt.Sprintf("%s.%d", key, attempt)
			}
			c, via := p.clients.get()
			rec := history.Publish{Key: key, Via: via}
			rec.Start = l.Recorder.Now()
			a := c.Publish(ctx, l.Topic, Body(key, size), l.opts.Header)
			rec.Outcome, rec.ID, rec.Zones = a.Outcome, a.ID, a.Zones
			if a.Outcome != harness.OK {
				rec.What = a.String()
			}
			l.Recorder.Publish(rec)
			if a.Outcome == harness.OK {
				break
			}
			p.clients.next()
			if a.Outcome == harness.Unknown || !l.publishing.Load() {
				break
			}
			pause(ctx, retryPause)
		}
		pause(ctx, l.opts.Pace)
	}
}

// task is something a consumer does with a delivery later.
type task struct {
	due      time.Time
	delivery harness.Delivery
	key      string
}

type consumer struct {
	load    *Load
	group   string
	rng     *rand.Rand
	clients clients
	tasks   []task
}

func (w *consumer) run(ctx context.Context) {
	l := w.load
	for ctx.Err() == nil {
		final := l.draining.Load()
		w.runTasks(ctx, final)
		lease := leases[w.rng.IntN(len(leases))]
		if w.load.opts.Faithful {
			lease = 10 * time.Minute // none runs out, however slow the machine is
		}
		wait := time.Second
		if final {
			// Long enough for each lease that somebody may still hold to end meanwhile.
			wait = leases[len(leases)-1] + time.Second
		}
		ds, outcome := w.receive(ctx, lease, wait)
		switch {
		case outcome != harness.OK:
			w.clients.next()
			pause(ctx, 5*retryPause)
		case final && len(ds) == 0 && len(w.tasks) == 0:
			return
		}
		for _, d := range ds {
			w.handle(ctx, d, lease, final)
		}
		if limit := l.deadline.Load(); limit != nil && time.Now().After(*limit) {
			l.undrained.Add(1)
			return
		}
	}
}

// received is a delivery whose body was understood.
type received struct {
	harness.Delivery
	key string
}

func (w *consumer) receive(ctx context.Context, lease, wait time.Duration) ([]received, harness.Outcome) {
	l := w.load
	c, via := w.clients.get()
	rec := history.Receive{Group: w.group, Via: via}
	rec.Start = l.Recorder.Now()
	ds, a := c.Receive(ctx, harness.Receive{
		Topic: l.Topic, Group: w.group, Max: 1 + w.rng.IntN(10), Visibility: lease, Wait: wait, Multipart: w.rng.IntN(2) == 0,
	})
	rec.Outcome, rec.Waited = a.Outcome, len(ds) == 0
	if a.Outcome != harness.OK {
		rec.What = a.String()
	}
	var (
		out    []received
		grants []history.Grant
	)
	for _, d := range ds {
		key, intact := KeyOf(d.Body)
		if !intact || d.ContentType != "application/octet-stream" {
			l.Recorder.Broken("group %s got message %s via %s with content type %q and a body of %d bytes that nobody sent: %.60q", w.group, d.ID, via, d.ContentType, len(d.Body), d.Body)
			continue
		}
		out = append(out, received{d, key})
		grants = append(grants, history.Grant{Key: key, ID: d.ID, Receipt: d.Receipt, Count: d.Count, Visibility: lease})
	}
	l.Recorder.Receive(rec, grants)
	return out, a.Outcome
}

// handle does what this consumer does with the message.
func (w *consumer) handle(ctx context.Context, d received, lease time.Duration, final bool) {
	later := func(after time.Duration) {
		w.tasks = append(w.tasks, task{time.Now().Add(after), d.Delivery, d.key})
	}
	choice := w.rng.IntN(100)
	if final || w.load.opts.Faithful {
		choice = 100
	}
	switch {
	case choice < 5: // give it back, and try the receipt that is over
		w.extend(ctx, d.Delivery, d.key, 0)
		later(lease)
	case choice < 10: // forget it; come back when somebody else has it
		later(lease + time.Duration(w.rng.IntN(2000))*time.Millisecond)
	case choice < 14: // dawdle, and acknowledge just in time, or just not
		later(lease - time.Duration(w.rng.IntN(600)-200)*time.Millisecond)
	case choice < 22: // take longer, and say so
		if w.extend(ctx, d.Delivery, d.key, leases[w.rng.IntN(len(leases))]) == harness.OK {
			later(lease * 3 / 4)
			return
		}
		w.ack(ctx, d.Delivery, d.key)
	case choice < 25: // acknowledge twice
		w.ack(ctx, d.Delivery, d.key)
		w.ack(ctx, d.Delivery, d.key)
	default:
		w.ack(ctx, d.Delivery, d.key)
	}
}

// runTasks acknowledges what is due, or everything.
func (w *consumer) runTasks(ctx context.Context, all bool) {
	now := time.Now()
	var due []task
	w.tasks = slices.DeleteFunc(w.tasks, func(t task) bool {
		if all || !now.Before(t.due) {
			due = append(due, t)
			return true
		}
		return false
	})
	for _, t := range due {
		w.ack(ctx, t.delivery, t.key)
	}
}

func (w *consumer) ack(ctx context.Context, d harness.Delivery, key string) {
	// What was not served says nothing of the receipt: another node may serve it.
	for range 20 {
		if !w.settle(ctx, d, key, true, 0).notServed {
			return
		}
		pause(ctx, 5*retryPause)
	}
}

func (w *consumer) extend(ctx context.Context, d harness.Delivery, key string, by time.Duration) harness.Outcome {
	return w.settle(ctx, d, key, false, by).outcome
}

type settled struct {
	outcome   harness.Outcome
	notServed bool
}

func (w *consumer) settle(ctx context.Context, d harness.Delivery, key string, ack bool, by time.Duration) settled {
	l := w.load
	c, via := w.clients.get()
	rec := history.Settle{Group: w.group, Receipt: d.Receipt, Ack: ack, Visibility: by, Via: via}
	rec.Start = l.Recorder.Now()
	var a harness.Answer
	if ack {
		a = c.Ack(ctx, l.Topic, w.group, d.Receipt)
	} else {
		a = c.Extend(ctx, l.Topic, w.group, d.Receipt, by)
	}
	rec.Outcome, rec.Status, rec.Code = a.Outcome, a.Status, a.Code
	if a.Outcome != harness.OK {
		rec.What = a.String()
	}
	l.Recorder.Settle(rec, key)
	notServed := a.Outcome == harness.No && (a.Status == 0 || a.Status == http.StatusTooManyRequests || a.Status == http.StatusServiceUnavailable)
	if a.Outcome == harness.Unknown || notServed {
		w.clients.next()
	}
	return settled{a.Outcome, notServed}
}
