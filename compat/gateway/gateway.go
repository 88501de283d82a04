package gateway

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/fnv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/valkey-io/valkey-go"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
)

// Options are what a Gateway is opened with. Target is required; the zero value of everything else means its default.
type Options struct {
	Target Target
	// Worth is what publishes wait for besides the primary's memory.
	Worth Worth
	// Require refuses to open when the upstream cannot give this much.
	Require Level
	// Reading says where looks may be answered from; the zero value is the primary.
	Reading Reading
	// Consumer is the name under which the gateway's leases stand in the streams' pending entries lists (default "tercet").
	Consumer string
	// MaxDeliveries ends a message's deliveries to a group; 0 is no limit. With Park it is kept as a dead letter.
	MaxDeliveries int
	Park          bool
	// Version is shown by /v1/node.
	Version string
	// Logger receives the gateway's log; the default discards it.
	Logger hclog.Logger
	// Registerer receives the gateway's metrics; the default is none.
	Registerer prometheus.Registerer
}

// Gateway is a server.Backend over an upstream. It is safe for concurrent use.
type Gateway struct {
	o        Options
	log      hclog.Logger
	up       *Upstream
	reader   *reader // nil for none
	found    Report
	secret   []byte
	waits    waits
	lanes    lanes
	metrics  *metrics
	draining atomic.Bool

	stop   context.CancelFunc
	ctx    context.Context
	group  sync.WaitGroup
	topics sync.Map // name → time of the last use, in Unix seconds: what is swept
}

// Open connects to the upstream, looks at what it is, and refuses if it promises less than Options.Require.
func Open(ctx context.Context, o Options) (*Gateway, error) {
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	if o.Consumer == "" {
		o.Consumer = "tercet"
	}
	if o.Worth.Timeout <= 0 {
		o.Worth.Timeout = 5 * time.Second
	}
	up, err := Connect(o.Target, o.Logger)
	if err != nil {
		return nil, err
	}
	g := &Gateway{o: o, log: o.Logger, up: up}
	g.ctx, g.stop = context.WithCancel(context.Background())
	if g.metrics, err = newMetrics(o.Registerer, g); err != nil {
		up.Close()
		return nil, err
	}
	g.found, err = probe(ctx, up.current.Load().Client, o.Target, o.Worth)
	if err == nil {
		if o.Reading.wanted() {
			g.found.probeReaders(ctx, o.Target, o.Reading)
			g.reader = newReader(o.Target, g.found.Mode, o.Reading, o.Logger)
		}
		err = g.found.Allows(o.Require)
	}
	if err == nil {
		g.secret, err = g.sharedSecret(ctx)
	}
	if err != nil {
		g.stop()
		up.Close()
		return nil, err
	}
	g.waits.init(g)
	g.lanes.init(g)
	g.group.Add(1)
	go func() {
		defer g.group.Done()
		g.sweep()
	}()
	return g, nil
}

// Report is what Open found.
func (g *Gateway) Report() Report { return g.found }

// Drain makes the gateway not ready; requests are served as before.
func (g *Gateway) Drain() { g.draining.Store(true) }

// Close ends waits and connections. Requests that run fail.
func (g *Gateway) Close() error {
	g.Drain()
	g.stop()
	g.waits.close()
	g.lanes.close()
	g.group.Wait()
	g.reader.close()
	g.up.Close()
	return nil
}

// secretKey holds what keys receipts and message IDs, the same for all gateways of one upstream.
const secretKey = "tercet:gateway:secret"

func (g *Gateway) sharedSecret(ctx context.Context) ([]byte, error) {
	fresh := make([]byte, 32)
	rand.Read(fresh)
	var secret string
	err := g.up.call(ctx, true, func(c valkey.Client) error {
		if err := c.Do(ctx, c.B().Set().Key(secretKey).Value(valkey.BinaryString(fresh)).Nx().Build()).Error(); err != nil && !valkey.IsValkeyNil(err) {
			return err
		}
		var err error
		secret, err = c.Do(ctx, c.B().Get().Key(secretKey).Build()).ToString()
		return err
	})
	switch {
	case err != nil:
		return nil, fmt.Errorf("cannot share the secret of receipts under key %s: %w", secretKey, err)
	case len(secret) != len(fresh):
		return nil, fmt.Errorf("key %s of the upstream does not hold a gateway's secret of %d bytes", secretKey, len(fresh))
	}
	return []byte(secret), nil
}

// Secret implements server.Backend.
func (g *Gateway) Secret() []byte { return g.secret }

// Ready implements server.Backend: requests can be expected to succeed while the upstream answers.
func (g *Gateway) Ready() error {
	if g.draining.Load() {
		return errs.Of(errs.Draining)
	}
	ctx, cancel := context.WithTimeout(g.ctx, 2*time.Second)
	defer cancel()
	err := g.up.current.Load().use(func(c valkey.Client) error { return c.Do(ctx, c.B().Ping().Build()).Error() })
	if err != nil {
		return errs.New(errs.NoLeader, "the upstream does not answer: %v", err)
	}
	return nil
}

// Live implements server.Backend: a gateway has no state that a restart would mend.
func (g *Gateway) Live() error { return nil }

// Status implements server.Backend.
func (g *Gateway) Status() raft.Status {
	return raft.Status{
		ID: "gateway", Zone: "-", Incarnation: "-", Version: g.o.Version, Role: raft.Leader, Leader: "gateway",
		ClusterID: g.o.Target.String(), Draining: g.draining.Load(),
	}
}

// noCluster is the answer to what only a cluster has.
func noCluster() error {
	return errs.New(errs.Unsupported, "a gateway has no cluster of its own: its state is in the upstream")
}

// AddMember implements server.Backend.
func (g *Gateway) AddMember(context.Context, string) error { return noCluster() }

// RemoveMember implements server.Backend.
func (g *Gateway) RemoveMember(context.Context, string) error { return noCluster() }

// ReplaceMember implements server.Backend.
func (g *Gateway) ReplaceMember(context.Context, string) error { return noCluster() }

// TransferLeadership implements server.Backend.
func (g *Gateway) TransferLeadership(context.Context, string) error { return noCluster() }

// Propose implements server.Backend.
func (g *Gateway) Propose(ctx context.Context, p raft.Proposal) (raft.Reply, error) {
	cmd, err := engine.DecodeCommand(p.Command)
	if err != nil {
		return raft.Reply{}, err
	}
	start := time.Now()
	var reply raft.Reply
	switch c := cmd.(type) {
	case *engine.Publish:
		g.touch(c.Topic)
		reply, err = g.publish(ctx, c, p.Require)
		g.metrics.observe("publish", start, err)
	case *engine.Receive:
		g.touch(c.Topic)
		reply, err = g.receive(ctx, c, p.Wait)
		g.metrics.observe("receive", start, err)
	case *engine.ReceiveID:
		reply, err = g.receiveID(ctx, c)
		g.metrics.observe("receive_id", start, err)
	case *engine.Settle:
		reply, err = g.settle(ctx, c)
		g.metrics.observe("settle", start, err)
	case *engine.Parked:
		reply, err = g.changeParked(ctx, c)
		g.metrics.observe("parked", start, err)
	case *engine.UploadOpen:
		return raft.Reply{}, errs.New(errs.MessageTooLarge, "the gateway takes messages of %d bytes at most; a Tercet cluster takes larger ones", limits.MessageBytesMax)
	default:
		return raft.Reply{}, errs.New(errs.Unsupported, "the gateway does not support this; a Tercet cluster does")
	}
	if err != nil {
		return raft.Reply{}, asError(err)
	}
	return reply, nil
}

// asError makes every error one of the catalogue.
func asError(err error) error {
	if e, ok := errors.AsType[*errs.Error](err); ok {
		return e
	}
	return errs.New(errs.Internal, "%v", err)
}

// Query implements server.Backend.
func (g *Gateway) Query(ctx context.Context, q engine.Query) (engine.Answer, error) {
	var a engine.Answer
	var err error
	switch q.Kind {
	case engine.QueryPeek:
		a.Messages, err = g.peek(ctx, q)
	case engine.QueryMessage:
		a.Messages, err = g.message(ctx, q)
	case engine.QueryParked:
		_, a.Next, a.Parked, err = g.parked(ctx, &engine.Parked{Topic: q.Topic, Group: q.Group, Filter: q.Parked, Max: q.Max, From: q.From}, "list", q.Deployment)
	default:
		return a, errs.New(errs.Unsupported, "the gateway does not support this; look at the streams with a Valkey client")
	}
	if err != nil {
		return engine.Answer{}, asError(err)
	}
	return a, nil
}

// touch notes that a topic is in use, so that it is swept.
func (g *Gateway) touch(topic string) {
	if v, ok := g.topics.Load(topic); ok {
		v.(*atomic.Int64).Store(time.Now().Unix())
		return
	}
	v := new(atomic.Int64)
	v.Store(time.Now().Unix())
	g.topics.LoadOrStore(topic, v)
}

// How often expired messages are removed, how many in one script, and how long after its last use a topic is left to
// whoever uses it next.
const (
	sweepEvery  = 10 * time.Second
	sweepMost   = 500
	sweepForget = time.Hour
)

// sweep removes what has expired from the topics in use until the gateway is closed.
func (g *Gateway) sweep() {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for {
		select {
		case <-g.ctx.Done():
			return
		case <-ticker.C:
		}
		g.topics.Range(func(k, v any) bool {
			topic := k.(string)
			if time.Since(time.Unix(v.(*atomic.Int64).Load(), 0)) > sweepForget {
				g.topics.Delete(topic)
			}
			if err := g.sweepTopic(g.ctx, topic); err != nil && g.ctx.Err() == nil {
				g.log.Warn("cannot remove expired messages", "topic", topic, "error", err)
			}
			return g.ctx.Err() == nil
		})
	}
}

func (g *Gateway) sweepTopic(ctx context.Context, topic string) error {
	for ctx.Err() == nil {
		var n int64
		err := g.up.call(ctx, true, func(c valkey.Client) error {
			var err error
			n, err = scriptSweep.Exec(ctx, c, keysOf(topic, ""), []string{itoa(sweepMost)}).ToInt64()
			return err
		})
		if err != nil || n < sweepMost {
			return err
		}
	}
	return ctx.Err()
}

// groupHash and topicHash stand in receipts for the incarnation numbers that a cluster would have there.
func groupHash(topic, group string) uint64 {
	h := fnv.New64a()
	h.Write([]byte(topic))
	h.Write([]byte{0})
	h.Write([]byte(group))
	return h.Sum64()
}
