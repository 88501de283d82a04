package bench

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tercet.dev/tercet/internal/errs"
)

// fakeDriver makes publishers and consumers out of functions.
type fakeDriver struct {
	publish func(ctx context.Context, i, n int) (Ack, error)
	receive func(ctx context.Context) (int, error)
	closed  atomic.Int64
}

func (d *fakeDriver) Publisher(i int) (Publisher, error) { return &fakeWorker{d: d, i: i}, nil }
func (d *fakeDriver) Consumer(i int, _ func([]byte)) (Consumer, error) {
	return &fakeWorker{d: d, i: i}, nil
}

type fakeWorker struct {
	d    *fakeDriver
	i, n int
	got  int
}

func (w *fakeWorker) Publish(ctx context.Context, _ time.Time) (Ack, error) {
	w.n++
	return w.d.publish(ctx, w.i, w.n)
}

func (w *fakeWorker) Receive(ctx context.Context) (int, error) {
	n, err := w.d.receive(ctx)
	w.got = n
	return n, err
}

func (w *fakeWorker) Settle(context.Context) (int, error) { return w.got, nil }

func (w *fakeWorker) Close() error { w.d.closed.Add(1); return nil }

// sleep is a request that takes a time; the run's end interrupts it.
func sleep(ctx context.Context, d time.Duration) error {
	pause(ctx, d)
	return ctx.Err()
}

func workload() Workload {
	return Workload{
		Topic: "t", Publishers: 4, Size: 100, Batch: 1, Warmup: time.Second, Duration: 10 * time.Second, Retention: time.Minute,
	}
}

func TestClosedLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &fakeDriver{publish: func(ctx context.Context, _, _ int) (Ack, error) {
			return Ack{Messages: 3, Zones: 3}, sleep(ctx, 10*time.Millisecond)
		}}
		w := workload()
		w.Batch = 3
		var phases []string
		r, err := Run(t.Context(), w, d, Hooks{
			Begin: func() { phases = append(phases, "begin") },
			End:   func() { phases = append(phases, "end") },
		})
		if err != nil {
			t.Fatal(err)
		}
		// 4 publishers, 100 requests a second each, for 10 s; the one in flight at either end may fall on either side.
		if r.Requests < 3990 || r.Requests > 4004 || r.Messages != 3*r.Requests {
			t.Errorf("%d requests, %d messages", r.Requests, r.Messages)
		}
		if r.Elapsed != 10*time.Second || r.Zones[3] != r.Requests || r.Publish.Count() != r.Requests {
			t.Errorf("elapsed %s, zones %v, %d latencies", r.Elapsed, r.Zones, r.Publish.Count())
		}
		if p := r.Publish.Percentiles(); p.P50 < 10_000 || p.Max > 10_010 { // three digits
			t.Errorf("latencies %+v", p)
		}
		if strings.Join(phases, " ") != "begin end" || d.closed.Load() != 4 {
			t.Errorf("phases %v, %d closed", phases, d.closed.Load())
		}
	})
}

// TestNoCoordinatedOmission stops the server for a second. At a fixed rate all messages that became due meanwhile have
// to show it, not the one that was in flight.
func TestNoCoordinatedOmission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stalled := time.Now().Add(5 * time.Second)
		d := &fakeDriver{publish: func(ctx context.Context, _, _ int) (Ack, error) {
			if now := time.Now(); now.After(stalled) && now.Before(stalled.Add(time.Second)) {
				return Ack{Messages: 1, Zones: 3}, sleep(ctx, time.Until(stalled.Add(time.Second)))
			}
			return Ack{Messages: 1, Zones: 3}, sleep(ctx, time.Millisecond)
		}}
		w := workload()
		w.Rate = 400
		r, err := Run(t.Context(), w, d, Hooks{})
		if err != nil {
			t.Fatal(err)
		}
		if r.Messages < 3990 || r.Messages > 4010 {
			t.Errorf("%d messages at 400 a second in 10 s", r.Messages)
		}
		// 400 of 4000 messages became due in the second without answers, and half of those waited more than half of it
		// (and the queue behind it a little longer).
		over := func(limit time.Duration) (percent float64) {
			for q := 0.0; q <= 100; q += 0.5 {
				if r.Publish.Quantile(q) <= limit {
					percent = q
				}
			}
			return 100 - percent
		}
		if got := over(500 * time.Millisecond); got < 4 || got > 7 {
			t.Errorf("%.1f %% of the messages show more than half a second, want about 5; %+v", got, r.Publish.Percentiles())
		}
		if got := r.Publish.Max(); got < 990*time.Millisecond || got > 1100*time.Millisecond {
			t.Errorf("the longest wait was %s", got)
		}
	})
}

func TestScheduleSpreadsPublishers(t *testing.T) {
	w := workload()
	w.Rate, w.Batch = 400, 2 // 200 requests a second by 4 publishers: one each 20 ms
	start := time.Now()
	var firsts []time.Duration
	for i := range w.Publishers {
		s := newSchedule(start, w, i)
		if s.interval != 20*time.Millisecond {
			t.Errorf("publisher %d has an interval of %s", i, s.interval)
		}
		firsts = append(firsts, s.start.Sub(start))
	}
	if got := fmt.Sprint(firsts); got != "[0s 5ms 10ms 15ms]" {
		t.Errorf("they start at %s", got)
	}
}

func TestRunOfMessages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var published atomic.Int64
		d := &fakeDriver{publish: func(ctx context.Context, _, _ int) (Ack, error) {
			err := sleep(ctx, time.Millisecond)
			if err == nil {
				published.Add(100)
			}
			return Ack{Messages: 100, Zones: 3}, err
		}}
		w := workload()
		w.Batch, w.Duration, w.Messages = 100, 0, 10_000
		r, err := Run(t.Context(), w, d, Hooks{})
		if err != nil {
			t.Fatal(err)
		}
		// What the other publishers had in flight when the last message was there counts if it was answered.
		if r.Messages < 10_000 || r.Messages > published.Load() || published.Load() > 10_400 {
			t.Errorf("%d of %d", r.Messages, published.Load())
		}
	})
}

func TestConsumers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		left := atomic.Int64{}
		left.Store(1000)
		d := &fakeDriver{receive: func(ctx context.Context) (int, error) {
			if err := sleep(ctx, time.Millisecond); err != nil {
				return 0, err
			}
			if left.Add(-10) < 0 {
				return 0, sleep(ctx, time.Second)
			}
			return 10, nil
		}}
		w := workload()
		w.Publishers, w.Consumers, w.Group, w.ReceiveMax = 0, 3, "g", 10
		w.Duration, w.Messages = 0, 1000
		r, err := Run(t.Context(), w, d, Hooks{})
		if err != nil {
			t.Fatal(err)
		}
		if r.Received != 1000 || r.Acknowledged != 1000 || r.Receive.Count() != 100 || r.Acknowledge.Count() != 100 {
			t.Errorf("%d received, %d acknowledged by %d and %d requests", r.Received, r.Acknowledged, r.Receive.Count(), r.Acknowledge.Count())
		}
		if p := r.Receive.Percentiles(); p.P50 != 1000 {
			t.Errorf("receives %+v", p)
		}
	})
}

// pipelineWorker answers requests after a time, each on a goroutine of its own.
type pipelineWorker struct {
	fakeWorker
	under, most atomic.Int64
	answered    sync.WaitGroup
}

func (w *pipelineWorker) Send(ctx context.Context, _ time.Time, done func(Ack, error)) error {
	w.n++
	n := w.n
	if n%10 == 0 {
		return errs.Of(errs.NotLeader)
	}
	now := w.under.Add(1)
	for most := w.most.Load(); now > most && !w.most.CompareAndSwap(most, now); most = w.most.Load() {
	}
	w.answered.Go(func() {
		err := sleep(ctx, 10*time.Millisecond)
		w.under.Add(-1)
		if n%10 == 1 {
			err = errs.Of(errs.Overloaded)
		}
		done(Ack{Messages: 2, Bytes: 50, Zones: 3}, err)
	})
	return nil
}

func (w *pipelineWorker) Close() error { w.answered.Wait(); return nil }

type pipelineDriver struct {
	fakeDriver
	worker pipelineWorker
}

func (d *pipelineDriver) Publisher(int) (Publisher, error) { return &d.worker, nil }

func TestPipeline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := workload()
		w.Publishers, w.Window, w.Batch, w.Warmup, w.Duration, w.Messages = 1, 16, 2, 0, 0, 2000
		d := &pipelineDriver{}
		r, err := Run(t.Context(), w, d, Hooks{})
		if err != nil {
			t.Fatal(err)
		}
		if most := d.worker.most.Load(); most != 16 {
			t.Errorf("%d requests were under way at once, want 16", most)
		}
		// What is under way when the last message is acknowledged is waited for and counts.
		if r.Messages < 2000 || r.Messages > 2032 || r.Bytes != 25*r.Messages || r.Messages != 2*r.Requests || r.Publish.Count() != r.Requests {
			t.Errorf("%d messages, %d bytes, %d requests, %d latencies", r.Messages, r.Bytes, r.Requests, r.Publish.Count())
		}
		if r.Failed["not_leader"] < 100 || r.Failed["overloaded"] < 100 {
			t.Errorf("failed %v", r.Failed)
		}
		if p := r.Publish.Percentiles(); p.P50 < 10_000 || p.P50 > 10_010 {
			t.Errorf("latencies %+v", p)
		}
		if _, err := Run(t.Context(), w, &fakeDriver{}, Hooks{}); err == nil || !strings.Contains(err.Error(), "window") {
			t.Errorf("a publisher without a pipeline: %v", err)
		}
	})
}

// TestConsumersAreSpread: each topic and group has its share of the consumers, and a run of a number of messages ends
// when every group has had them all.
func TestConsumersAreSpread(t *testing.T) {
	w := workload()
	w.Topics, w.Groups, w.Group, w.Consumers, w.ReceiveMax = 2, 3, "g", 12, 10
	got := map[string]int{}
	for i := range w.Consumers {
		topic, group := w.Consumes(i)
		got[topic+"/"+group]++
	}
	if len(got) != 6 {
		t.Errorf("%v", got)
	}
	for pair, n := range got {
		if n != 2 {
			t.Errorf("%s has %d consumers", pair, n)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		var left atomic.Int64
		left.Store(3000)
		d := &fakeDriver{receive: func(ctx context.Context) (int, error) {
			if err := sleep(ctx, time.Millisecond); err != nil {
				return 0, err
			}
			if left.Add(-10) < 0 {
				return 0, sleep(ctx, time.Second)
			}
			return 10, nil
		}}
		w := workload()
		w.Publishers, w.Consumers, w.Group, w.Groups, w.ReceiveMax = 0, 3, "g", 3, 10
		w.Duration, w.Messages = 0, 1000
		r, err := Run(t.Context(), w, d, Hooks{})
		if err != nil || r.Acknowledged != 3000 {
			t.Errorf("%d acknowledged, %v", r.Acknowledged, err)
		}
	})
}

func TestFailuresAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &fakeDriver{publish: func(ctx context.Context, _, n int) (Ack, error) {
			if err := sleep(ctx, time.Millisecond); err != nil {
				return Ack{}, err
			}
			switch n % 3 {
			case 0:
				return Ack{}, errs.Of(errs.Overloaded)
			case 1:
				return Ack{}, errors.New("no error of the catalogue")
			}
			return Ack{Messages: 1, Zones: 2}, nil
		}}
		var mu sync.Mutex
		var seen, seenFailed int64
		r, err := Run(t.Context(), workload(), d, Hooks{Published: func(_ int, _ Ack, err error) {
			mu.Lock()
			defer mu.Unlock()
			seen++
			if err != nil {
				seenFailed++
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		failed := r.Failed["overloaded"] + r.Failed["internal"]
		if r.Failed["overloaded"] == 0 || r.Failed["internal"] == 0 || failed != seenFailed || len(r.Failed) != 2 {
			t.Errorf("counted %v, the hook saw %d", r.Failed, seenFailed)
		}
		if seen <= seenFailed || r.Messages == 0 || r.Zones[2] != r.Requests {
			t.Errorf("%d answers, %d of them failures, %+v", seen, seenFailed, r)
		}
	})
}

func TestRunEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		d := &fakeDriver{publish: func(ctx context.Context, _, _ int) (Ack, error) {
			<-ctx.Done()
			return Ack{}, ctx.Err()
		}}
		_, err := Run(ctx, workload(), d, Hooks{})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("ended with %v", err)
		}
	})
}

func TestValidate(t *testing.T) {
	good := workload()
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(w *Workload){
		"no topic":                func(w *Workload) { w.Topic = "" },
		"neither publishers":      func(w *Workload) { w.Publishers = 0 },
		"the size must be":        func(w *Workload) { w.Size = 2 << 20 },
		"a batch has 1 to":        func(w *Workload) { w.Batch = 101 },
		"a batch may have":        func(w *Workload) { w.Batch, w.Size = 100, 64<<10 },
		"the rate must":           func(w *Workload) { w.Rate = -1 },
		"the duration must":       func(w *Workload) { w.Duration = 0 },
		"the retention must":      func(w *Workload) { w.Retention = 90500 * time.Millisecond },
		"no consumer group":       func(w *Workload) { w.Consumers, w.ReceiveMax = 1, 1 },
		"a receive takes":         func(w *Workload) { w.Consumers, w.Group = 1, "g" },
		"the window must":         func(w *Workload) { w.Window = -1 },
		"a fixed rate needs":      func(w *Workload) { w.Window, w.Rate = 2, 100 },
		"the number of topics":    func(w *Workload) { w.Topics = topicsMax + 1 },
		"the number of groups":    func(w *Workload) { w.Groups = 1025 },
		"need a consumer each":    func(w *Workload) { w.Consumers, w.Group, w.ReceiveMax, w.Topics, w.Groups = 5, "g", 1, 2, 3 },
		"timed messages need":     func(w *Workload) { w.Timed, w.Sizes = true, []int{100, timeMarkSize - 1} },
		"and neither batches":     func(w *Workload) { w.Stamped, w.Topics = true, 2 },
		"stamped messages need":   func(w *Workload) { w.Stamped, w.Size = true, StampSize-1 },
		"more than 65536 publish": func(w *Workload) { w.Publishers = 70_000 },
	} {
		w := good
		change(&w)
		if err := w.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v", want, err)
		}
	}
}
