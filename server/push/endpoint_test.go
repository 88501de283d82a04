package push

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func testEndpoint(s Subscription) *endpoint {
	if s.Topic == "" {
		s.Topic = "orders"
	}
	if s.RetryAfter == 0 {
		s.RetryAfter = 60
	}
	return newEndpoint(&s, &pool{free: poolMax})
}

// acquire waits for a place and gives up the position when ctx ends first.
func (e *endpoint) acquire(ctx context.Context, probe bool) error {
	t := e.enter(probe)
	err := t.wait(ctx)
	if err != nil {
		t.leave()
	}
	return err
}

// fail makes requests that end with an overload.
func fail(t *testing.T, e *endpoint, n int) {
	t.Helper()
	for range n {
		if err := e.acquire(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		e.release(overloaded, "HTTP 503", 0)
	}
}

// serve makes requests that are answered, all at the same time.
func serve(t *testing.T, e *endpoint, n int) {
	t.Helper()
	for range n {
		if err := e.acquire(t.Context(), false); err != nil {
			t.Fatal(err)
		}
	}
	for range n {
		e.release(served, "", 0)
	}
}

// The breaker opens when requests fail in a row, probes come after 1, 2, 4… seconds and at least every
// retryAfterSeconds, and the first answer closes it.
func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := testEndpoint(Subscription{RetryAfter: 5})
		fail(t, e, breakerFailures-1)
		serve(t, e, 1)
		fail(t, e, breakerFailures-1)
		if s := e.snapshot(); s.breaker != "closed" {
			t.Fatalf("with an answer between the failures the breaker is %s", s.breaker)
		}
		now, err := e.await(t.Context(), time.Time{})
		if err != nil || now.probe || now.broken.Err() != nil {
			t.Fatalf("await: %+v, %v", now, err)
		}
		fail(t, e, 1)
		if s := e.snapshot(); s.breaker != "open" || s.state != "failing" {
			t.Fatalf("after %d failures the breaker is %s", breakerFailures, s.breaker)
		}
		if now.broken.Err() == nil {
			t.Error("who waits for messages is not told that the breaker opened")
		}
		for _, gap := range []time.Duration{1, 2, 4, 5, 5} {
			begun := time.Now()
			probe, err := e.await(t.Context(), time.Time{})
			if err != nil || !probe.probe {
				t.Fatalf("await: %+v, %v", probe, err)
			}
			if got := time.Since(begun); got != gap*time.Second {
				t.Errorf("a probe after %v, want %v", got, gap*time.Second)
			}
			if s := e.snapshot(); s.breaker != "probing" {
				t.Errorf("the breaker is %s", s.breaker)
			}
			if err := e.acquire(t.Context(), true); err != nil {
				t.Fatal(err)
			}
			e.release(overloaded, "no answer in time", 0)
		}
		probe, err := e.await(t.Context(), time.Time{})
		if err != nil || !probe.probe {
			t.Fatal(probe, err)
		}
		_ = e.acquire(t.Context(), true)
		// A handler's error is an answer like any other.
		e.release(served, "HTTP 500: Failed to process queue message", 0)
		if s := e.snapshot(); s.breaker != "closed" || s.state != "active" || s.inflight != 0 || s.limit != 1 {
			t.Errorf("after an answer: %s", s)
		}
	})
}

// A lane that finds no message gives the right to probe to the next one, and rests.
func TestProbeGoesRound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := testEndpoint(Subscription{})
		fail(t, e, breakerFailures)
		first, err := e.await(t.Context(), time.Time{})
		if err != nil || !first.probe {
			t.Fatal(first, err)
		}
		second := make(chan turn)
		go func() {
			t, _ := e.await(t.Context(), time.Time{})
			second <- t
		}()
		synctest.Wait()
		select {
		case <-second:
			t.Fatal("two lanes probe at the same time")
		default:
		}
		e.unprobed()
		if got := <-second; !got.probe {
			t.Errorf("the next lane got %+v", got)
		}
		e.unprobed()
		begun := time.Now()
		if again, err := e.await(t.Context(), begun.Add(probeRest)); err != nil || !again.probe || time.Since(begun) != probeRest {
			t.Errorf("a resting lane got %+v, %v after %v", again, err, time.Since(begun))
		}
	})
}

// The limit grows while it is used and answers come, halves with each overload, and is never below one.
func TestLimit(t *testing.T) {
	e := testEndpoint(Subscription{})
	limit := func() int { return e.snapshot().limit }
	if limit() != startLimit {
		t.Fatalf("the limit begins with %d", limit())
	}
	serve(t, e, 1)
	if limit() != startLimit {
		t.Errorf("one request at a time raised the limit to %d", limit())
	}
	serve(t, e, startLimit)
	if limit() <= startLimit {
		t.Errorf("the limit did not rise under load: %d", limit())
	}
	for range 20 {
		serve(t, e, limit())
	}
	if limit() < 30 {
		t.Errorf("the limit is only %d after 20 rounds of full load", limit())
	}
	before := limit()
	fail(t, e, 1)
	if limit() != before/2 {
		t.Errorf("an overload at %d makes the limit %d", before, limit())
	}
	fail(t, e, breakerFailures-2)
	for range 10 {
		serve(t, e, 1)
		fail(t, e, breakerFailures-1)
	}
	if limit() != 1 {
		t.Errorf("after many overloads the limit is %d", limit())
	}
	if e = testEndpoint(Subscription{MaxConcurrency: 3}); e.snapshot().limit != 3 {
		t.Errorf("maxConcurrency 3 begins with %d", e.snapshot().limit)
	}
	for range 5 {
		serve(t, e, 3)
	}
	if e.snapshot().limit != 3 {
		t.Errorf("maxConcurrency 3 grew to %d", e.snapshot().limit)
	}
}

// No more requests run than the limit says, and those that wait go in order.
func TestPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := testEndpoint(Subscription{MaxConcurrency: 2})
		for range 2 {
			if err := e.acquire(t.Context(), false); err != nil {
				t.Fatal(err)
			}
		}
		order := make(chan int, 3)
		for i := range 3 {
			go func() {
				if e.acquire(t.Context(), false) == nil {
					order <- i
				}
			}()
			synctest.Wait()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := e.await(ctx, time.Time{}); err == nil {
			t.Error("messages are asked for although there is no place")
		}
		if err := e.acquire(ctx, false); err == nil {
			t.Error("a third request got a place")
		}
		for want := range 3 {
			e.release(served, "", 0)
			if got := <-order; got != want {
				t.Errorf("request %d went before %d", got, want)
			}
		}
		e.release(served, "", 0)
		e.release(served, "", 0)
		if s := e.snapshot(); s.inflight != 0 || len(e.waiters) != 0 {
			t.Errorf("%s, %d wait", s, len(e.waiters))
		}
	})
}

// Retry-After holds everything back, the breaker open or not.
func TestRetryAfterHoldsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := testEndpoint(Subscription{})
		if err := e.acquire(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		e.release(overloaded, "HTTP 429", 7*time.Second)
		if s := e.snapshot(); s.state != "throttled" {
			t.Errorf("state %s", s.state)
		}
		begun := time.Now()
		if got, err := e.await(t.Context(), time.Time{}); err != nil || got.probe || time.Since(begun) != 7*time.Second {
			t.Errorf("await: %+v, %v after %v", got, err, time.Since(begun))
		}
		for range breakerFailures {
			_ = e.acquire(t.Context(), false)
			e.release(overloaded, "HTTP 429", 9*time.Second)
		}
		begun = time.Now()
		if got, err := e.await(t.Context(), time.Time{}); err != nil || !got.probe || time.Since(begun) != 9*time.Second {
			t.Errorf("await: %+v, %v after %v", got, err, time.Since(begun))
		}
		e.unprobed()
		_ = e.acquire(t.Context(), true)
		e.release(overloaded, "HTTP 429", 1000*time.Hour)
		if at := e.snapshot().nextProbe; at.After(time.Now().Add(retryAfterHeaderMax)) {
			t.Errorf("an endpoint stops its pushes until %v", at)
		}
	})
}

// All subscriptions together keep to one bound, and each has a few requests of its own beside it.
func TestPool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &pool{free: 3}
		greedy, modest := newEndpoint(&Subscription{Topic: "a", RetryAfter: 1}, p), newEndpoint(&Subscription{Topic: "b", RetryAfter: 1}, p)
		var waiting atomic.Int32
		for range startLimit {
			go func() {
				if greedy.acquire(t.Context(), false) == nil {
					waiting.Add(-1)
				}
			}()
			waiting.Add(1)
		}
		synctest.Wait()
		if s := greedy.snapshot(); s.inflight != requestsFree+3 {
			t.Errorf("%d requests of one subscription run, want %d", s.inflight, requestsFree+3)
		}
		for range requestsFree {
			if err := modest.acquire(t.Context(), false); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if modest.acquire(ctx, false) == nil {
			t.Error("the pool has more places than it should")
		}
		late := make(chan error)
		go func() { late <- modest.acquire(t.Context(), false) }()
		synctest.Wait()
		for waiting.Load() > 0 {
			greedy.release(served, "", 0)
			synctest.Wait()
		}
		if err := <-late; err != nil {
			t.Error(err)
		}
		for range requestsFree + 3 {
			greedy.release(served, "", 0)
		}
		for range requestsFree + 1 {
			modest.release(served, "", 0)
		}
		if p.free != 3 || greedy.pooled != 0 || modest.pooled != 0 {
			t.Errorf("%d places left of 3; %d and %d are held", p.free, greedy.pooled, modest.pooled)
		}
	})
}
