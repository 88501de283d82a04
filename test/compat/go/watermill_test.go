package clients

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill-redisstream/pkg/redisstream"
	"github.com/ThreeDotsLabs/watermill/message"
	goredis "github.com/redis/go-redis/v9"
)

// TestWatermill is a Go service on watermill: messages are published while the leader is killed, two subscribers of one
// group share them, some are refused once, one subscriber goes away with messages that it never acknowledged, and the
// other one claims them. Fan-out subscribers without a group are given everything.
func TestWatermill(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	const n = 100
	topic := fmt.Sprintf("{watermill-%d}", time.Now().UnixNano())
	dial := func() goredis.UniversalClient {
		o := goRedisOption(nodes(t)[1])
		if inCluster {
			return goredis.NewClusterClient(o.Cluster())
		}
		return goredis.NewClient(o.Simple())
	}
	var mu sync.Mutex
	refused, got, fanned := map[string]bool{}, map[string]int{}, map[string]bool{}
	var running sync.WaitGroup
	subscribe := func(consumer, group string, handle func(m *message.Message)) (leave func()) {
		c := dial()
		s, err := redisstream.NewSubscriber(redisstream.SubscriberConfig{
			Client: c, Consumer: consumer, ConsumerGroup: group, OldestId: "0", FanOutOldestId: "0", NackResendSleep: time.Millisecond,
			BlockTime: 100 * time.Millisecond, ClaimInterval: 100 * time.Millisecond, MaxIdleTime: 500 * time.Millisecond, DisableIndefiniteInitialBlock: true,
		}, watermill.NopLogger{})
		if err != nil {
			t.Fatal(err)
		}
		messages, err := s.Subscribe(ctx, topic)
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() {
			for m := range messages {
				handle(m)
			}
		})
		return func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			c.Close()
		}
	}
	one := subscribe("one", "workers", func(m *message.Message) {
		mu.Lock()
		defer mu.Unlock()
		if id := m.UUID; !refused[id] {
			refused[id] = true
			m.Nack()
			return
		}
		got[string(m.Payload)]++
		m.Ack()
	})
	// The second takes one message and never says anything about it.
	taken := make(chan string, n)
	two := subscribe("two", "workers", func(m *message.Message) { taken <- string(m.Payload) })
	fan := subscribe("", "", func(m *message.Message) {
		mu.Lock()
		defer mu.Unlock()
		fanned[string(m.Payload)] = true
		m.Ack()
	})

	c := dial()
	defer c.Close()
	p, err := redisstream.NewPublisher(redisstream.PublisherConfig{Client: c, DefaultMaxlen: 10000}, watermill.NopLogger{})
	if err != nil {
		t.Fatal(err)
	}
	publish := func(i int) {
		until(t, "a publish", func() bool {
			return p.Publish(topic, message.NewMessage(watermill.NewUUID(), fmt.Appendf(nil, "%d", i))) == nil
		})
	}
	for i := range n / 2 {
		publish(i)
	}
	var lost string
	select {
	case lost = <-taken:
	case <-ctx.Done():
		t.Fatal("the second subscriber was given nothing")
	}
	killLeader(t)
	for i := n / 2; i < n; i++ {
		publish(i)
	}
	two()
	until(t, "all messages", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(got) == n && len(fanned) == n
	})
	mu.Lock()
	if got[lost] == 0 {
		t.Errorf("%s was never claimed from the subscriber that had gone", lost)
	}
	mu.Unlock()
	until(t, "nothing to be pending", func() bool {
		pending, err := c.XPending(ctx, topic, "workers").Result()
		return err == nil && pending.Count == 0
	})
	one()
	fan()
	running.Wait()
}
