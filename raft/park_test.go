package raft

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// parkedCommand is a receive that may wait.
func parkedCommand(topic, group string, limit int) []byte {
	return receiveCommand(topic, group, limit)
}

// From publish to delivery costs one commit: the waiting receive rides in the publish's entry.
func TestParkedReceiveRidesBehindThePublish(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	lead := c.leader()
	for i, via := range founders {
		topic := fmt.Sprint("t", i)
		must(t, c.node(lead), Proposal{Command: publishCommand(topic, "first")})
		first := must(t, c.node(lead), Proposal{Command: receiveCommand(topic, "g", 1)})
		must(t, c.node(lead), Proposal{Command: ackCommand(topic, "g", first.Deliveries...)})
		type result struct {
			r   Reply
			err error
		}
		got := make(chan result, 1)
		go func() {
			r, err := c.node(via).Propose(testContext(t), Proposal{Command: parkedCommand(topic, "g", 1), Wait: time.Minute})
			got <- result{r, err}
		}()
		c.eventually("a parked receive", func() bool { return c.node(lead).coal.lot.len() == 1 })
		p := must(t, c.node(lead), Proposal{Command: publishCommand(topic, "second")})
		r := <-got
		if r.err != nil || len(r.r.Deliveries) != 1 || string(r.r.Deliveries[0].Body) != "second" {
			t.Fatalf("through %s: %+v, %v", via, r.r, r.err)
		}
		if r.r.Index != p.Index {
			t.Fatalf("through %s: published in entry %d, delivered in entry %d", via, p.Index, r.r.Index)
		}
	}
	c.agree()
}

// An idle consumer costs no entry, and is answered when its time is over.
func TestParkedReceiveCostsNoEntry(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	lead, via := c.leader(), c.follower()
	must(t, c.node(lead), Proposal{Command: publishCommand("t", "x")})
	first := must(t, c.node(lead), Proposal{Command: receiveCommand("t", "g", 1)})
	must(t, c.node(lead), Proposal{Command: ackCommand("t", "g", first.Deliveries...)})
	before := c.node(lead).Status().AppliedIndex
	for range 20 {
		r := must(t, c.node(via), Proposal{Command: receiveCommand("t", "g", 1)})
		if len(r.Deliveries) != 0 || r.Index != 0 {
			t.Fatalf("%+v", r)
		}
	}
	r := must(t, c.node(via), Proposal{Command: parkedCommand("t", "g", 1), Wait: 2*parkSliceMax + 10*time.Millisecond})
	if len(r.Deliveries) != 0 {
		t.Fatalf("%+v", r)
	}
	if after := c.node(lead).Status().AppliedIndex; after != before {
		t.Fatalf("waiting for nothing made %d entries", after-before)
	}
	if n := c.node(lead).coal.lot.len(); n != 0 {
		t.Fatalf("%d receives are still parked", n)
	}
}

// A lease that runs out wakes a parked receive though nothing else happens.
func TestParkedReceiveWakesByTime(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	n := c.node(c.follower())
	must(t, n, Proposal{Command: publishCommand("t", "x")})
	short := &engine.Receive{Topic: "t", Group: "g", Max: 1, Visibility: time.Second}
	first := must(t, n, Proposal{Command: short.AppendTo(nil)})
	if len(first.Deliveries) != 1 {
		t.Fatalf("%+v", first)
	}
	again := must(t, n, Proposal{Command: parkedCommand("t", "g", 1), Wait: time.Minute})
	if len(again.Deliveries) != 1 || again.Deliveries[0].Count != 2 {
		t.Fatalf("%+v", again)
	}
}

// A client that goes away while it waits leaves nothing leased to nobody.
func TestAbandonedReceive(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	lead := c.leader()
	must(t, c.node(lead), Proposal{Command: publishCommand("t", "seed")})
	first := must(t, c.node(lead), Proposal{Command: receiveCommand("t", "g", 1)})
	must(t, c.node(lead), Proposal{Command: ackCommand("t", "g", first.Deliveries...)})
	const clients = 30
	var wg sync.WaitGroup
	cancels := make([]context.CancelFunc, clients)
	got := make(chan engine.Delivery, clients)
	for i := range clients {
		ctx, cancel := context.WithCancel(context.Background())
		cancels[i] = cancel
		via := c.node(founders[i%3])
		wg.Go(func() {
			long := &engine.Receive{Topic: "t", Group: "g", Max: 1, Visibility: time.Hour}
			r, err := via.Propose(ctx, Proposal{Command: long.AppendTo(nil), Wait: time.Minute})
			if err != nil && ctx.Err() == nil {
				t.Errorf("receive: %v", err)
			}
			for _, d := range r.Deliveries {
				got <- d
			}
		})
	}
	c.eventually("parked receives", func() bool { return c.node(lead).coal.lot.len() == clients })
	// Half of them go while messages for all come in.
	for i := range clients {
		if i%2 == 0 {
			go cancels[i]()
		}
		must(t, c.node(founders[i%3]), Proposal{Command: publishCommand("t", fmt.Sprint("m", i))})
	}
	for i := range clients {
		if i%2 == 1 {
			continue
		}
		cancels[i]()
	}
	seen := make(map[string]bool)
	deadline := time.Now().Add(testTimeout)
	for len(seen) < clients {
		select {
		case d := <-got:
			seen[string(d.Body)] = true
			continue
		default:
		}
		r := must(t, c.node(lead), Proposal{Command: parkedCommand("t", "g", 1), Wait: 50 * time.Millisecond})
		for _, d := range r.Deliveries {
			seen[string(d.Body)] = true
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d messages can be had; the others are leased for an hour to clients that are gone", len(seen), clients)
		}
	}
	for _, cancel := range cancels {
		cancel()
	}
	wg.Wait()
}

// No wake-up is lost (decision 24): every group of a topic gets every message though nothing but wake-ups can bring
// it to the receives that wait. They wait under one number for an hour, so that no renewal hides a loss; messages
// become deliverable by publish, by release, by expired leases and by acknowledgements that free concurrency.
func TestNoWakeUpIsLost(t *testing.T) {
	seed := testSeed(t)
	messages := 400
	if campaign() {
		messages = 10_000
	}
	c := newCluster(t, func(cfg *Config) { cfg.test.parkSlice = time.Hour })
	c.start(founders...)
	c.inSync(3)
	groups := []string{"g0", "g1", "g2"}
	for _, g := range groups {
		must(t, c.node("n1"), Proposal{Command: receiveCommand("t", g, 1)}) // creates topic and group, or neither
	}
	must(t, c.node("n1"), Proposal{Command: publishCommand("t", "seed")})
	var wg sync.WaitGroup
	var left sync.Map // group → how many messages it still has to acknowledge
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for gi, g := range groups {
		remaining := new(atomic.Int64)
		remaining.Store(int64(messages) + 1)
		left.Store(g, remaining)
		for k := range 5 {
			rnd := rand.New(rand.NewPCG(seed, uint64(gi*100+k)))
			via := c.node(founders[(gi+k)%3])
			wg.Go(func() {
				for ctx.Err() == nil {
					r := &engine.Receive{Topic: "t", Group: g, Max: 1 + rnd.IntN(3), Visibility: time.Duration(1+rnd.IntN(2)) * time.Second}
					if gi == 2 {
						r.MaxConcurrency = 4
					}
					got, err := via.Propose(ctx, Proposal{Command: r.AppendTo(nil), Wait: time.Hour})
					if err != nil {
						if ctx.Err() == nil {
							t.Errorf("receive: %v", err)
						}
						return
					}
					for _, d := range got.Deliveries {
						s := &engine.Settle{Topic: "t", Group: g, Op: engine.Acknowledge, Receipts: []engine.Receipt{d.Receipt}}
						// About twenty of each, however many messages: an abandoned lease takes its time.
						switch rnd.IntN(messages / 20) {
						case 0:
							continue // the lease runs out
						case 1:
							s.Op = engine.Extend // released at once
						}
						a, err := via.Propose(ctx, Proposal{Command: s.AppendTo(nil)})
						if err == nil && s.Op == engine.Acknowledge && a.Codes[0] == errs.OK && remaining.Add(-1) == 0 {
							return
						}
					}
				}
			})
		}
	}
	rnd := rand.New(rand.NewPCG(seed, 999))
	for i := 0; i < messages; {
		n := min(1+rnd.IntN(4), messages-i)
		bodies := make([]string, n)
		must(t, c.node(founders[rnd.IntN(3)]), Proposal{Command: publishCommand("t", bodies...)})
		i += n
	}
	c.eventually("all groups to have everything", func() bool {
		done := true
		left.Range(func(_, v any) bool { done = done && v.(*atomic.Int64).Load() <= 0; return done })
		return done
	})
	cancel()
	wg.Wait()
	c.eventually("an empty lot", func() bool { return c.node(c.leader()).coal.lot.len() == 0 })
}

// Each cause that makes a message deliverable wakes a receive that waits, though nothing else happens.
func TestEachCauseWakes(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.test.parkSlice = time.Hour })
	c.start(founders...)
	c.inSync(3)
	lead := c.node(c.leader())
	for cause, wake := range map[string]func(topic string, held engine.Delivery) []byte{
		"release": func(topic string, held engine.Delivery) []byte {
			s := &engine.Settle{Topic: topic, Group: "g", Op: engine.Extend, Receipts: []engine.Receipt{held.Receipt}}
			return s.AppendTo(nil)
		},
		"freed concurrency": func(topic string, held engine.Delivery) []byte { return ackCommand(topic, "g", held) },
		"shorter lease": func(topic string, held engine.Delivery) []byte {
			s := &engine.Settle{Topic: topic, Group: "g", Op: engine.Extend, Visibility: time.Second, Receipts: []engine.Receipt{held.Receipt}}
			return s.AppendTo(nil)
		},
	} {
		t.Run(cause, func(t *testing.T) {
			topic := "t-" + cause[:3]
			r := &engine.Receive{Topic: topic, Group: "g", Max: 1, Visibility: time.Hour}
			bodies := []string{"first"}
			if cause == "freed concurrency" {
				r.MaxConcurrency = 1
				bodies = append(bodies, "second")
			}
			must(t, lead, Proposal{Command: publishCommand(topic, bodies...)})
			held := must(t, lead, Proposal{Command: r.AppendTo(nil)})
			if len(held.Deliveries) != 1 {
				t.Fatalf("%+v", held)
			}
			got := make(chan Reply, 1)
			go func() {
				reply, err := c.node(c.follower()).Propose(testContext(t), Proposal{Command: r.AppendTo(nil), Wait: time.Hour})
				if err != nil {
					t.Errorf("receive: %v", err)
				}
				got <- reply
			}()
			c.eventually("a parked receive", func() bool { return lead.coal.lot.len() == 1 })
			must(t, lead, Proposal{Command: wake(topic, held.Deliveries[0])})
			if reply := <-got; len(reply.Deliveries) != 1 {
				t.Fatalf("%+v", reply)
			}
		})
	}
}

// A poll of a group that is at a limit is told so, whoever set the limit, and does not look as if nothing were there.
func TestPollAtALimitSaysSo(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	for _, name := range []string{c.leader(), c.follower()} {
		n := c.node(name)
		topic := "limit-" + name
		must(t, n, Proposal{Command: publishCommand(topic, "x", "y", "z")})
		set := &engine.GroupSet{Topic: topic, Group: "g", Create: true, Settings: &engine.GroupSettings{MaxConcurrency: 1}}
		must(t, n, Proposal{Command: set.AppendTo(nil)})
		for _, group := range []string{"g", "h"} {
			r := &engine.Receive{Topic: topic, Group: group, Max: 1, Visibility: time.Minute}
			if group == "h" {
				r.MaxConcurrency = 1
			}
			if got := must(t, n, Proposal{Command: r.AppendTo(nil)}); len(got.Deliveries) != 1 {
				t.Fatalf("%s through %s: %+v", group, name, got)
			}
			got, err := n.Propose(testContext(t), Proposal{Command: r.AppendTo(nil)})
			if err != nil || got.Code != errs.ConcurrencyLimit || got.Inflight != 1 {
				t.Errorf("%s through %s, at the limit: %v, %v, %d in flight", group, name, got.Code, err, got.Inflight)
			}
		}
	}
}

// Waits are stopped while messages arrive for them: each message is delivered once, to the wait that returns it or to
// the next receive.
func TestStoppedWaitsLoseNothing(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	for _, name := range []string{c.leader(), c.follower()} {
		n := c.node(name)
		given := 0
		for i := range 60 {
			topic := fmt.Sprint("stop-", name, i)
			must(t, n, Proposal{Command: publishCommand(topic, "first")})
			must(t, n, Proposal{Command: receiveCommand(topic, "g", 1)})
			stop := make(chan struct{})
			got := make(chan Reply, 1)
			go func() {
				r, err := n.Propose(testContext(t), Proposal{Command: parkedCommand(topic, "g", 1), Wait: time.Hour, Stop: stop})
				if err != nil {
					t.Error(err)
				}
				got <- r
			}()
			lead := c.node(c.leader())
			c.eventually("the receive to park", func() bool { return lead.coal.lot.len() == 1 })
			published := make(chan struct{})
			go func() {
				must(t, n, Proposal{Command: publishCommand(topic, "second")})
				close(published)
			}()
			close(stop)
			r := <-got
			<-published
			given += len(r.Deliveries)
			if len(r.Deliveries) == 0 {
				r = must(t, n, Proposal{Command: receiveCommand(topic, "g", 1)})
			}
			if len(r.Deliveries) != 1 || r.Deliveries[0].Count != 1 || string(r.Deliveries[0].Body) != "second" {
				t.Fatalf("round %d through %s: %+v", i, name, r.Deliveries)
			}
		}
		t.Logf("through %s: %d of 60 waits were given the message", name, given)
	}
}
