package gateway

import (
	"context"
	"sync"
	"time"

	"github.com/valkey-io/valkey-go"
)

const (
	// watchBlock bounds one blocking read of a watcher: login refreshes and failovers wait for its end.
	watchBlock = 5 * time.Second
	// lookEvery bounds the sleep of a waiting receive: what another gateway released or scheduled wakes nobody here.
	lookEvery = time.Second
)

// waits wakes receives that wait. Each topic somebody waits for has one watcher, a blocking read behind the newest
// entry, whatever the number of waiting receives.
type waits struct {
	g       *Gateway
	mu      sync.Mutex
	byTopic map[string]*watcher
	closed  bool
	running sync.WaitGroup
}

// watcher follows one topic.
type watcher struct {
	stop    context.CancelFunc
	ready   chan struct{} // closed once the place is known
	waiting map[*waiter]struct{}
}

// waiter is one waiting receive.
type waiter struct {
	w     *waits
	topic string
	of    *watcher
	woken chan struct{}
}

func (w *waits) init(g *Gateway) { w.g, w.byTopic = g, make(map[string]*watcher) }

func (w *waits) close() {
	w.mu.Lock()
	w.closed = true
	for _, a := range w.byTopic {
		a.stop()
	}
	w.mu.Unlock()
	w.running.Wait()
}

// join registers a waiting receive; leave undoes it.
func (w *waits) join(topic string) *waiter {
	w.mu.Lock()
	defer w.mu.Unlock()
	a := w.byTopic[topic]
	if a == nil {
		ctx, stop := context.WithCancel(w.g.ctx)
		a = &watcher{stop: stop, ready: make(chan struct{}), waiting: make(map[*waiter]struct{})}
		w.byTopic[topic] = a
		if w.closed {
			stop()
		}
		w.running.Add(1)
		go func() {
			defer w.running.Done()
			w.watch(ctx, topic, a)
		}()
	}
	m := &waiter{w: w, topic: topic, of: a, woken: make(chan struct{}, 1)}
	a.waiting[m] = struct{}{}
	return m
}

func (m *waiter) leave() {
	m.w.mu.Lock()
	defer m.w.mu.Unlock()
	delete(m.of.waiting, m)
	if len(m.of.waiting) == 0 && m.w.byTopic[m.topic] == m.of {
		delete(m.w.byTopic, m.topic)
		m.of.stop()
	}
}

// armed waits until the watcher knows its place, or ctx ends.
func (m *waiter) armed(ctx context.Context) {
	select {
	case <-m.of.ready:
	case <-ctx.Done():
	}
}

// wait returns true when it is worth another look, false when ctx has ended. due is when something may become due,
// negative for never.
func (m *waiter) wait(ctx context.Context, due time.Duration) bool {
	sleep := lookEvery
	if due >= 0 && due < sleep {
		sleep = due + time.Millisecond
	}
	timer := time.NewTimer(sleep)
	defer timer.Stop()
	select {
	case <-m.woken:
	case <-timer.C:
	case <-ctx.Done():
		return false
	case <-m.w.g.ctx.Done():
		return false
	}
	return true
}

// wake wakes who waits for a topic.
func (w *waits) wake(topic string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if a := w.byTopic[topic]; a != nil {
		w.rouse(a)
	}
}

func (w *waits) rouse(a *watcher) {
	for m := range a.waiting {
		select {
		case m.woken <- struct{}{}:
		default:
		}
	}
}

// watch follows a topic until nobody waits for it.
func (w *waits) watch(ctx context.Context, topic string, a *watcher) {
	defer a.stop()
	place := ""
	armed := false
	for ctx.Err() == nil {
		err := w.g.up.call(ctx, true, func(c valkey.Client) error {
			if place == "" {
				last, err := c.Do(ctx, c.B().Xrevrange().Key(topic).End("+").Start("-").Count(1).Build()).AsXRange()
				if err != nil {
					return err
				}
				if place = "0-0"; len(last) > 0 {
					place = last[0].ID
				}
				return nil
			}
			got, err := c.Do(ctx, c.B().Xread().Count(1000).Block(watchBlock.Milliseconds()).Streams().Key(topic).Id(place).Build()).AsXRead()
			if valkey.IsValkeyNil(err) {
				return nil
			}
			if err == nil && len(got[topic]) > 0 {
				place = got[topic][len(got[topic])-1].ID
			}
			return err
		})
		if err != nil {
			place = "" // behind a failover the newest entry may be an older one
		}
		if err == nil && !armed {
			armed = true
			close(a.ready)
		}
		w.mu.Lock()
		w.rouse(a)
		w.mu.Unlock()
		if err != nil && ctx.Err() == nil {
			timer := time.NewTimer(lookEvery)
			select {
			case <-ctx.Done():
			case <-timer.C:
			}
			timer.Stop()
		}
	}
	if !armed {
		close(a.ready)
	}
}
