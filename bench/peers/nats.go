package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"tercet.dev/tercet/bench"
)

// jetStream is NATS with streams of three replicas in files, built from the version that this module's go.mod pins.
type jetStream struct {
	as, binary string
	// sync is sync_interval; empty for the server's default.
	sync string
	says string
}

func (s jetStream) name() string    { return s.as }
func (s jetStream) promise() string { return s.says }

func (s jetStream) missing() string {
	if _, err := which(s.binary); err != nil {
		return "make bench-build"
	}
	return ""
}

type jetStreamCluster struct {
	s         jetStream
	processes []*process
	urls      map[string]string // by server name
	text      string
}

func (s jetStream) start(ctx context.Context, h *host, dir string) (cluster, error) {
	binary, err := which(s.binary)
	if err != nil {
		return nil, err
	}
	ports, err := freePorts(2 * 3)
	if err != nil {
		return nil, err
	}
	c := &jetStreamCluster{s: s, urls: map[string]string{}, text: commandVersion(ctx, binary, "--version")}
	routes := ""
	for i := range 3 {
		routes += fmt.Sprintf("%q, ", "nats-route://"+loopback(ports[2*i+1]))
	}
	interval := ""
	if s.sync != "" {
		interval = "sync_interval: " + s.sync
	}
	for i := range 3 {
		name := fmt.Sprintf("nats%d", i+1)
		config := fmt.Sprintf(`
server_name: %s
listen: "%s"
max_payload: 8MB
max_connections: 4096
jetstream { store_dir: %q, max_file_store: 100GB, max_memory_store: 1GB, %s }
cluster { name: bench, listen: "%s", routes: [%s] }
`, name, loopback(ports[2*i]), filepath.Join(dir, name), interval, loopback(ports[2*i+1]), routes)
		file := filepath.Join(dir, name+".conf")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			return nil, err
		}
		p, err := h.start(dir, name, nil, binary, "-c", file)
		if err != nil {
			c.stop()
			return nil, err
		}
		c.processes, c.urls[name] = append(c.processes, p), "nats://"+loopback(ports[2*i])
	}
	// A stream of three replicas can be made when the servers have found each other and elected a leader.
	err = c.processes[0].await(ctx, "a stream with three replicas could be made", func() error {
		return c.connected(c.urls["nats1"], func(_ *natsgo.Conn, js jetstream.JetStream) error {
			ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			config := streamConfig("probe")
			if _, err := js.CreateStream(ctx, config); err != nil {
				return err
			}
			return js.DeleteStream(ctx, "probe")
		})
	})
	if err != nil {
		c.stop()
		return nil, err
	}
	return c, nil
}

func streamConfig(name string) jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: name, Subjects: []string{name}, Storage: jetstream.FileStorage, Replicas: 3, MaxAge: time.Minute,
	}
}

// connect connects a client with room for many publishes under way.
func (c *jetStreamCluster) connect(url string) (*natsgo.Conn, jetstream.JetStream, error) {
	nc, err := natsgo.Connect(url, natsgo.NoReconnect(), natsgo.Timeout(2*time.Second))
	if err != nil {
		return nil, nil, err
	}
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(1<<16))
	if err != nil {
		nc.Close()
		return nil, nil, err
	}
	return nc, js, nil
}

func (c *jetStreamCluster) connected(url string, f func(*natsgo.Conn, jetstream.JetStream) error) error {
	nc, js, err := c.connect(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	return f(nc, js)
}

func (c *jetStreamCluster) version() string      { return c.text }
func (c *jetStreamCluster) pids() map[string]int { return pidsOf(c.processes) }
func (c *jetStreamCluster) stop()                { stopAll(0, c.processes...) }

func (c *jetStreamCluster) run(ctx context.Context, w bench.Workload, _ string, hooks bench.Hooks) (*bench.Result, error) {
	d := &jetStreamDriver{c: c, w: w}
	err := c.connected(c.urls["nats1"], func(_ *natsgo.Conn, js jetstream.JetStream) error {
		for _, topic := range topicsOf(w) {
			stream, err := js.CreateStream(ctx, streamConfig(topic))
			if err != nil {
				return err
			}
			// Clients connect to the server that leads the stream, as they do to Tercet's leader.
			info := stream.CachedInfo()
			if info.Cluster == nil || c.urls[info.Cluster.Leader] == "" {
				return fmt.Errorf("stream %s has no leader", topic)
			}
			d.urls = append(d.urls, c.urls[info.Cluster.Leader])
			for _, group := range groupsOf(w) {
				if _, err := stream.CreateConsumer(ctx, jetstream.ConsumerConfig{
					Durable: group, AckPolicy: jetstream.AckExplicitPolicy, AckWait: time.Minute, MaxAckPending: 100_000,
				}); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return bench.Run(ctx, w, d, hooks)
}

func (c *jetStreamCluster) clean(ctx context.Context, w bench.Workload) error {
	return c.connected(c.urls["nats1"], func(_ *natsgo.Conn, js jetstream.JetStream) error {
		var failed error
		for _, topic := range topicsOf(w) {
			failed = errors.Join(failed, js.DeleteStream(ctx, topic))
		}
		return failed
	})
}

type jetStreamDriver struct {
	c    *jetStreamCluster
	w    bench.Workload
	urls []string // by topic
}

// Publisher implements bench.Driver.
func (d *jetStreamDriver) Publisher(i int) (bench.Publisher, error) {
	nc, js, err := d.c.connect(d.urls[i%len(d.urls)])
	if err != nil {
		return nil, err
	}
	return &jetStreamPublisher{nc: nc, js: js, feed: bench.NewBodies(d.w, i)}, nil
}

type jetStreamPublisher struct {
	nc   *natsgo.Conn
	js   jetstream.JetStream
	feed *bench.Bodies
	wait *inOrder[jetstream.PubAckFuture]
}

// Publish implements bench.Publisher. All messages of a request are under way at once.
func (p *jetStreamPublisher) Publish(ctx context.Context, due time.Time) (bench.Ack, error) {
	topic, bodies := p.feed.Next(due)
	if len(bodies) == 1 {
		if _, err := p.js.Publish(ctx, topic, bodies[0]); err != nil {
			return bench.Ack{}, err
		}
		return p.feed.Ack(2), nil
	}
	futures := make([]jetstream.PubAckFuture, len(bodies))
	for i, body := range bodies {
		var err error
		if futures[i], err = p.js.PublishAsync(topic, body); err != nil {
			return bench.Ack{}, err
		}
	}
	for _, f := range futures {
		if err := awaitPubAck(ctx, f); err != nil {
			return bench.Ack{}, err
		}
	}
	return p.feed.Ack(2), nil
}

func awaitPubAck(ctx context.Context, f jetstream.PubAckFuture) error {
	select {
	case <-f.Ok():
		return nil
	case err := <-f.Err():
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Send implements bench.Pipeline.
func (p *jetStreamPublisher) Send(ctx context.Context, due time.Time, done func(bench.Ack, error)) error {
	if p.wait == nil {
		p.wait = newInOrder(ctx, awaitPubAck)
	}
	topic, bodies := p.feed.Next(due)
	futures := make([]jetstream.PubAckFuture, len(bodies))
	for i, body := range bodies {
		var err error
		if futures[i], err = p.js.PublishAsync(topic, body); err != nil {
			return err
		}
	}
	p.wait.add(futures, p.feed.Ack(2), done)
	return nil
}

// Close implements bench.Publisher.
func (p *jetStreamPublisher) Close() error {
	if p.wait != nil {
		p.wait.close()
	}
	p.nc.Close()
	return nil
}

// The number of messages a consumer of a peer is sent ahead, and that it acknowledges at once.
const (
	prefetch = 1000
	settleAt = 100
	// firstMessageWait is how long a receive waits for its first message.
	firstMessageWait = 2 * time.Second
)

// Consumer implements bench.Driver.
func (d *jetStreamDriver) Consumer(i int, found func(body []byte)) (bench.Consumer, error) {
	topic, group := d.w.Consumes(i)
	nc, js, err := d.c.connect(d.urls[i%len(d.urls)])
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	consumer, err := js.Consumer(ctx, topic, group)
	if err != nil {
		nc.Close()
		return nil, err
	}
	c := &jetStreamConsumer{nc: nc, inbox: nc.NewRespInbox(), arrived: make(chan jetstream.Msg, 2*prefetch), found: found}
	if c.acks, err = nc.SubscribeSync(c.inbox); err != nil {
		nc.Close()
		return nil, err
	}
	c.consume, err = consumer.Consume(func(m jetstream.Msg) { c.arrived <- m }, jetstream.PullMaxMessages(prefetch))
	if err != nil {
		nc.Close()
		return nil, err
	}
	return c, nil
}

type jetStreamConsumer struct {
	nc      *natsgo.Conn
	consume jetstream.ConsumeContext
	arrived chan jetstream.Msg
	inbox   string
	acks    *natsgo.Subscription
	found   func(body []byte)
	leased  []jetstream.Msg
}

// Receive implements bench.Consumer.
func (c *jetStreamConsumer) Receive(ctx context.Context) (int, error) {
	c.leased = gather(ctx, c.arrived, c.leased[:0])
	for _, m := range c.leased {
		if c.found != nil {
			c.found(m.Data())
		}
	}
	return len(c.leased), nil
}

// Settle implements bench.Consumer. Each acknowledgement is a request whose answer is waited for, all at once: the
// server gives it when the consumer's replicas have it.
func (c *jetStreamConsumer) Settle(ctx context.Context) (int, error) { return c.Overlap()(ctx) }

// Overlap implements bench.Overlapper.
func (c *jetStreamConsumer) Overlap() func(ctx context.Context) (int, error) {
	leased := c.leased
	c.leased = nil
	return func(ctx context.Context) (int, error) { return c.settle(ctx, leased) }
}

func (c *jetStreamConsumer) settle(ctx context.Context, leased []jetstream.Msg) (int, error) {
	for _, m := range leased {
		if err := c.nc.PublishRequest(m.Reply(), c.inbox, []byte("+ACK")); err != nil {
			return 0, err
		}
	}
	for i := range leased {
		if _, err := c.acks.NextMsgWithContext(ctx); err != nil {
			return i, err
		}
	}
	return len(leased), nil
}

// Close implements bench.Consumer.
func (c *jetStreamConsumer) Close() error {
	c.consume.Stop()
	c.nc.Close()
	return nil
}
