package raft

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// Decision 12: leaders die while clients sit on followers. No publish is doubled or lost, no receipt within its
// lease is refused, and no message is leased without anybody holding it.
func TestLeaderKilledWhileClientsSitOnFollowers(t *testing.T) {
	// A zone that falls again and again is kept out of the in-sync set for longer and longer: each round has a
	// cluster of its own.
	rounds := 1
	if campaign() {
		rounds = 20
	}
	for i := range rounds {
		t.Run(fmt.Sprint(i), leaderKilled)
	}
}

func leaderKilled(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	const topic, group = "orders", "workers"
	ctx, stopLoad := context.WithCancel(context.Background())
	defer stopLoad()
	var (
		wg        sync.WaitGroup
		mu        sync.Mutex
		published = make(map[string]bool)
		acked     = make(map[string]int)
		sequence  atomic.Int64
		progress  atomic.Int64
	)
	stay := c.follower() // survives all kills
	client := func(name string) *Node { return c.node(name) }
	for range 6 {
		wg.Go(func() {
			for ctx.Err() == nil {
				body := fmt.Sprint("m", sequence.Add(1))
				r, err := client(stay).Propose(testContext(t), Proposal{Command: publishCommand(topic, body)})
				if err != nil || r.Code != errs.OK {
					t.Errorf("publish %s: %v, %v", body, r.Code, err)
					return
				}
				mu.Lock()
				published[body] = true
				mu.Unlock()
				progress.Add(1)
			}
		})
	}
	consume := func(wait time.Duration, done func() bool) {
		for !done() {
			cmd := &engine.Receive{Topic: topic, Group: group, Max: 4, Visibility: 10 * time.Minute}
			r, err := client(stay).Propose(testContext(t), Proposal{Command: cmd.AppendTo(nil), Wait: wait})
			if err != nil {
				t.Errorf("receive: %v", err)
				return
			}
			if r.Code == errs.TopicNotFound || r.Code == errs.GroupNotFound || len(r.Deliveries) == 0 {
				continue
			}
			s, err := client(stay).Propose(testContext(t), Proposal{Command: ackCommand(topic, group, r.Deliveries...)})
			if err != nil {
				t.Errorf("acknowledge: %v", err)
				return
			}
			for i, code := range s.Codes {
				if code != errs.OK {
					t.Errorf("receipt %+v within its lease refused: %v", r.Deliveries[i].Receipt, code)
				}
			}
			mu.Lock()
			for _, d := range r.Deliveries {
				acked[string(d.Body)]++
				if d.Count != 1 {
					t.Errorf("message %s was delivered %d times", d.Body, d.Count)
				}
			}
			mu.Unlock()
		}
	}
	for range 4 {
		wg.Go(func() { consume(200*time.Millisecond, func() bool { return ctx.Err() != nil }) })
	}
	const kills = 2
	for k := range kills {
		from := progress.Load()
		c.eventually("progress before a kill", func() bool { return progress.Load() >= from+100 })
		lead := c.leader()
		if lead == stay {
			if err := c.node(stay).TransferLeadership(testContext(t), ""); err != nil {
				t.Fatalf("transfer: %v", err)
			}
			lead = c.leader()
			c.eventually("another leader", func() bool { lead = c.leader(); return lead != stay })
		}
		t.Logf("kill %d: %s", k, lead)
		c.stop(lead)
		from = progress.Load()
		c.eventually("progress after a kill", func() bool { return progress.Load() >= from+50 })
		c.start(lead)
		c.inSync(3)
	}
	stopLoad()
	wg.Wait()
	// What is left is consumed. Every message is leased for ten minutes: one leased to nobody would not show up.
	deadline := time.Now().Add(testTimeout)
	consume(0, func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(acked) >= len(published) || t.Failed() || time.Now().After(deadline)
	})
	for body := range published {
		if acked[body] == 0 {
			t.Errorf("message %s is leased to nobody, or lost", body)
		}
	}
	for body, n := range acked {
		if n != 1 || !published[body] {
			t.Errorf("message %s: acknowledged %d times, published %v", body, n, published[body])
		}
	}
	last, err := c.node(stay).Propose(testContext(t), Proposal{Command: receiveCommand(topic, group, 1)})
	if err != nil || len(last.Deliveries) != 0 {
		t.Errorf("a message was doubled: %+v, %v", last.Deliveries, err)
	}
	t.Logf("%d messages over %d leaders", len(published), kills+1)
	c.agree()
}

// A receive that an earlier leader may have proposed is proposed again though nothing is deliverable: what it was
// given then is found under its number. Answering it from the applied state would leave the message leased to nobody.
func TestRepeatedReceiveGetsWhatItWasGiven(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.Peers = nil })
	c.start("n1")
	n := c.node(c.leader())
	must(t, n, Proposal{Command: publishCommand("t", "x")})
	for name, wait := range map[string]time.Duration{"poll": 0, "waiting": time.Minute} {
		group := "g-" + name
		cmd, err := engine.WithPark(receiveCommand("t", group, 1), wait > 0)
		if err != nil {
			t.Fatal(err)
		}
		give := func(repeat bool) *op {
			o := &op{intake: n.intake.id, number: 1 << 10, lowest: 1, request: request{cmd: cmd}, repeat: repeat}
			if err := o.inspect(); err != nil {
				t.Fatal(err)
			}
			if name == "waiting" {
				o.number++
				o.since, o.parkUntil = time.Now(), time.Now().Add(wait)
			}
			done := make(chan outcome, 1)
			o.from = originFunc(func(_ *op, out outcome) { done <- out })
			n.accept(o)
			select {
			case out := <-done:
				if out.kind != replied {
					t.Fatalf("%s: outcome %+v", name, out)
				}
			case <-testContext(t).Done():
				t.Fatalf("%s: no outcome", name)
			}
			return o
		}
		first, again := give(false), give(true)
		if len(first.reply.Result.Deliveries) != 1 || len(again.reply.Result.Deliveries) != 1 || !again.reply.Result.Repeat ||
			first.reply.Result.Deliveries[0].Receipt != again.reply.Result.Deliveries[0].Receipt {
			t.Fatalf("%s: first %+v, again %+v", name, first.reply.Result, again.reply.Result)
		}
	}
}

// A request that no leader takes until its deadline says so, and says that nothing happened.
func TestNoMajority(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	stay := c.follower()
	for _, name := range founders {
		if name != stay {
			c.stop(name)
		}
	}
	c.eventually("the loss of the leader", func() bool { return c.node(stay).Ready() != nil })
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, err := c.node(stay).Propose(ctx, Proposal{Command: publishCommand("a", "x")})
	e, ok := errors.AsType[*errs.Error](err)
	if !ok || e.Outcome() != errs.None || e.Code != errs.NoLeader && e.Code != errs.NotLeader {
		t.Fatalf("got %v", err)
	}
	if _, err := c.node(stay).Query(ctx, engine.Query{Kind: engine.QueryTopics}); errs.CodeOf(err) != errs.NoLeader {
		t.Fatalf("query without a leader: %v", err)
	}
	if err := c.node(stay).Live(); err != nil {
		t.Fatalf("liveness depends on a quorum: %v", err)
	}
}
