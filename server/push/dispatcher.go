package push

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft"
)

// Backend is what the dispatcher needs of a node. *raft.Node is one.
type Backend interface {
	Propose(ctx context.Context, p raft.Proposal) (raft.Reply, error)
	Query(ctx context.Context, q engine.Query) (engine.Answer, error)
	// Load fills deliveries that came without their contents (raft.Proposal.Bare).
	Load(ds []engine.Delivery) error
	// Leading reports whether this node leads and is open for service, and since which term.
	Leading() (term uint64, ok bool)
	// Watch signals changes after they were applied.
	Watch(kind raft.WatchKind, name string) (<-chan struct{}, func())
	// OnAsk and AskLeader carry questions to the dispatcher that pushes.
	OnAsk(subject string, answer func(question []byte) ([]byte, error))
	AskLeader(ctx context.Context, subject string, question []byte) ([]byte, error)
	Status() raft.Status
	Secret() []byte
}

var _ Backend = (*raft.Node)(nil)

// Options are what a Dispatcher is made with.
type Options struct {
	Backend Backend
	// Region is the ce-vqsregion of pushes (default iad1).
	Region string
	// Allow lists networks that are not public and that pushes may go to all the same, also without TLS.
	Allow []netip.Prefix
	// Version is shown in the User-Agent.
	Version string
	// Logger receives the log; the default discards it.
	Logger hclog.Logger
	// Registerer receives the metrics; the default is none.
	Registerer prometheus.Registerer
	// BodyBytes bounds the messages that are held for requests in progress (default 64 MiB).
	BodyBytes int64
}

const (
	regionDefault    = "iad1"
	bodyBytesDefault = 64 << 20
	// bodyShare is what part of BodyBytes one subscription may have.
	bodyShare = 8
	// bodyFree is the size up to which a message is not counted: its request costs more.
	bodyFree = 4 << 10
	// loadsMax bounds messages that are being read from the store.
	loadsMax = 32
	// lanesMax bounds the topics of all subscriptions together.
	lanesMax = 20_000
)

// A Dispatcher pushes messages to the subscriptions' endpoints while its node leads. All it knows beyond the moment
// is in the replicated state: the subscriptions are documents, and what is in flight is under leases. It starts
// with Start and ends with Close.
type Dispatcher struct {
	backend Backend
	guard   *Guard
	log     hclog.Logger
	region  string
	agent   string
	metrics *metrics
	pool    pool
	loads   *semaphore.Weighted
	bodies  *semaphore.Weighted
	share   int64
	sealer  atomic.Pointer[engine.Sealer]

	// life ends with Close: then requests in progress are cut off.
	life   context.Context
	end    context.CancelFunc
	stop   context.CancelFunc
	loop   sync.WaitGroup
	pushes sync.WaitGroup
	// underway counts them for those who may not wait while others add, rests how often there were none any more.
	underway, rests atomic.Int64
	// stopped is set once no push may begin any more; guarded by mu.
	stopped bool

	mu sync.Mutex
	// term is the one in which feeds run, 0 while this node does not lead.
	term  uint64
	feeds map[string]*feed
	lanes int
}

// feed is one subscription at work.
type feed struct {
	sub    *Subscription
	ep     *endpoint
	http   *requester
	lanes  map[string]*lane
	ctx    context.Context
	cancel context.CancelFunc
}

// New makes a Dispatcher.
func New(o Options) (*Dispatcher, error) {
	if o.Backend == nil {
		return nil, errors.New("push: no backend")
	}
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	if o.Region == "" {
		o.Region = regionDefault
	}
	if o.BodyBytes <= 0 {
		o.BodyBytes = bodyBytesDefault
	}
	d := &Dispatcher{
		backend: o.Backend, log: o.Logger, region: o.Region, agent: "tercet/" + o.Version, pool: pool{free: poolMax},
		loads: semaphore.NewWeighted(loadsMax), bodies: semaphore.NewWeighted(o.BodyBytes), share: o.BodyBytes / bodyShare,
		feeds: make(map[string]*feed),
	}
	d.guard = &Guard{Allow: o.Allow, Own: d.own}
	d.life, d.end = context.WithCancel(context.Background())
	var err error
	if d.metrics, err = newMetrics(o.Registerer, d); err != nil {
		return nil, fmt.Errorf("push: %w", err)
	}
	d.backend.OnAsk(stateSubject, d.answerStates)
	return d, nil
}

// own lists the addresses of the cluster's nodes that are known as such.
func (d *Dispatcher) own() []netip.AddrPort {
	var out []netip.AddrPort
	for _, n := range d.backend.Status().Nodes {
		for _, text := range []string{n.HTTP, n.Peer, n.Valkey} {
			text = strings.TrimPrefix(strings.TrimPrefix(text, "http://"), "https://")
			if addr, err := netip.ParseAddrPort(text); err == nil {
				out = append(out, netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port()))
			}
		}
	}
	return out
}

// Start begins to push whenever the node leads.
func (d *Dispatcher) Start() {
	ctx, cancel := context.WithCancel(d.life)
	d.stop = cancel
	d.loop.Add(1)
	go func() {
		defer d.loop.Done()
		d.run(ctx)
	}()
}

// Drain stops asking for messages and waits for the requests in progress until ctx ends. Those that remain are
// decided by their leases.
func (d *Dispatcher) Drain(ctx context.Context) {
	if d.stop != nil {
		d.stop()
	}
	d.loop.Wait()
	d.mu.Lock()
	d.stopped = true
	d.mu.Unlock()
	done := make(chan struct{})
	go func() { d.pushes.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
		d.end()
		<-done
	}
}

// Close stops and cuts off the requests in progress.
func (d *Dispatcher) Close() {
	d.end()
	d.Drain(d.life)
}

// reconcileMin is the least time between two looks at topics and subscriptions, so that a burst of new topics costs
// a few of them.
const reconcileMin = 20 * time.Millisecond

// run follows leadership, the subscriptions and the topics.
func (d *Dispatcher) run(ctx context.Context) {
	leader, stopLeader := d.backend.Watch(raft.WatchLeader, "")
	defer stopLeader()
	documents, stopDocuments := d.backend.Watch(raft.WatchDocuments, Table)
	defer stopDocuments()
	topics, stopTopics := d.backend.Watch(raft.WatchTopics, "")
	defer stopTopics()
	defer d.follow()
	for {
		var again <-chan time.Time
		pause := reconcileMin
		if term, ok := d.backend.Leading(); ok {
			begun := time.Now()
			if err := d.reconcile(ctx, term); err != nil && ctx.Err() == nil {
				d.log.Warn("cannot read the subscriptions", "error", err)
				again = time.After(250 * time.Millisecond)
			}
			pause = max(pause, 4*time.Since(begun))
		} else {
			d.follow()
		}
		select {
		case <-ctx.Done():
			return
		case <-leader:
			continue
		case <-documents:
		case <-topics:
			// New topics come in bursts; the first of one is not waited with.
			if waitUntil(ctx, leader, time.Now().Add(pause)) != nil {
				return
			}
		case <-again:
		}
	}
}

// follow ends all feeds: another node pushes from now on. Requests in progress go on; what they end with is
// brought to the new leader.
func (d *Dispatcher) follow() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, f := range d.feeds {
		f.stop()
		delete(d.feeds, id)
	}
	d.term, d.lanes = 0, 0
}

func (f *feed) stop() {
	f.cancel()
	f.http.retire()
}

// reconcile makes the feeds fit the subscriptions, and their lanes the topics.
func (d *Dispatcher) reconcile(ctx context.Context, term uint64) error {
	subs, err := list(ctx, d.backend)
	if err != nil {
		return err
	}
	known := make(map[string][]string)
	for _, s := range subs {
		if prefix, wild := strings.CutSuffix(s.Topic, "*"); wild && known[prefix] == nil {
			if known[prefix], err = topics(ctx, d.backend, prefix); err != nil {
				return err
			}
		}
	}
	plan := makePlan(subs, known)
	secret := d.backend.Secret()
	d.mu.Lock()
	defer d.mu.Unlock()
	if now, ok := d.backend.Leading(); !ok || now != term || d.stopped {
		return nil
	}
	if d.term != term {
		for id, f := range d.feeds {
			f.stop()
			delete(d.feeds, id)
		}
		d.lanes = 0
		d.sealer.Store(engine.NewSealer(secret))
		d.term = term
		d.log.Info("pushing", "term", term, "subscriptions", len(subs))
	}
	for id, f := range d.feeds {
		if i := slices.IndexFunc(subs, func(s *Subscription) bool { return s.ID == id }); i < 0 || subs[i].Revision != f.sub.Revision {
			d.lanes -= len(f.lanes)
			f.stop()
			delete(d.feeds, id)
		}
	}
	for _, s := range subs {
		f := d.feeds[s.ID]
		if f == nil {
			f = d.newFeed(s)
			d.feeds[s.ID] = f
		}
		d.setLanes(f, plan)
	}
	return nil
}

func (d *Dispatcher) newFeed(s *Subscription) *feed {
	f := &feed{sub: s, ep: newEndpoint(s, &d.pool), lanes: make(map[string]*lane)}
	f.http = newRequester(s, d.guard, f.ep.most)
	f.ctx, f.cancel = context.WithCancel(d.life)
	return f
}

// setLanes starts a lane for each topic that is new, ends those of topics that are not the feed's any more, and tells
// the others what has become of their groups.
func (d *Dispatcher) setLanes(f *feed, p *plan) {
	want := p.topics[f.sub.ID]
	for topic, l := range f.lanes {
		if !slices.Contains(want, topic) {
			l.cancel()
			delete(f.lanes, topic)
			d.lanes--
		}
	}
	for _, topic := range want {
		settings := p.settings[groupKey{topic, f.sub.Group}]
		if l := f.lanes[topic]; l != nil {
			l.settings.Store(settings)
			continue
		}
		if d.lanes >= lanesMax {
			d.log.Error("more topics are subscribed to than a node can serve", "max", lanesMax, "subscription", f.sub.ID)
			return
		}
		l := &lane{d: d, feed: f, topic: topic}
		l.settings.Store(settings)
		l.ctx, l.cancel = context.WithCancel(f.ctx)
		f.lanes[topic] = l
		d.lanes++
		d.loop.Add(1)
		go func() {
			defer d.loop.Done()
			l.run()
		}()
	}
}

// begin counts a push in, unless the dispatcher is stopping.
func (d *Dispatcher) begin() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		return false
	}
	d.pushes.Add(1)
	d.underway.Add(1)
	return true
}

// plan says which subscription pushes which topics, and how the groups have to be set for that.
type plan struct {
	topics   map[string][]string
	settings map[groupKey]*groupSettings
}

// groupSettings are what all subscriptions of one group in one topic ask for together.
type groupSettings struct {
	maxDeliveries, maxConcurrency int64
	initialDelay                  int64
	// anyDeliveries and anyConcurrency: one of them asks for no bound.
	anyDeliveries, anyConcurrency bool
	// claimed are the deployments that subscriptions name, in order. rest: there is a subscription that names none beside
	// them, or alone. It gets what no other claims.
	claimed []string
	rest    bool
}

// excluded are the deployments that receives without one are to leave alone.
func (g *groupSettings) excluded() []string {
	if !g.rest {
		return nil
	}
	return g.claimed
}

func (g *groupSettings) equal(h *groupSettings) bool {
	return g.maxDeliveries == h.maxDeliveries && g.maxConcurrency == h.maxConcurrency && g.initialDelay == h.initialDelay &&
		slices.Equal(g.excluded(), h.excluded())
}

// makePlan distributes the topics. Of several subscriptions that fit one topic, group and deployment, the one with the
// longest pattern has it, so that a name comes before a prefix.
func makePlan(subs []*Subscription, known map[string][]string) *plan {
	type place struct {
		groupKey
		deployment string
	}
	owner := make(map[place]*Subscription)
	for _, s := range subs {
		names := []string{s.Topic}
		if prefix, wild := strings.CutSuffix(s.Topic, "*"); wild {
			names = known[prefix]
		}
		for _, topic := range names {
			at := place{groupKey{topic, s.Group}, s.Deployment}
			if o := owner[at]; o == nil || narrower(s.Topic, o.Topic) {
				owner[at] = s
			}
		}
	}
	p := &plan{topics: make(map[string][]string), settings: make(map[groupKey]*groupSettings)}
	for at, s := range owner {
		p.topics[s.ID] = append(p.topics[s.ID], at.topic)
		g := p.settings[at.groupKey]
		if g == nil {
			g = new(groupSettings)
			p.settings[at.groupKey] = g
		}
		// One group has one bound. What each deployment's subscription asks for is held by its lane; the group's is as
		// wide as they need together.
		g.maxDeliveries = max(g.maxDeliveries, s.MaxDeliveries)
		g.maxConcurrency += s.MaxConcurrency
		if s.MaxDeliveries == 0 {
			g.anyDeliveries = true
		}
		if s.MaxConcurrency == 0 {
			g.anyConcurrency = true
		}
		g.initialDelay = max(g.initialDelay, s.InitialDelay)
		if at.deployment == "" {
			g.rest = true
		} else {
			g.claimed = append(g.claimed, at.deployment)
		}
	}
	for _, g := range p.settings {
		slices.Sort(g.claimed)
		if g.anyDeliveries {
			g.maxDeliveries = 0
		}
		if g.anyConcurrency {
			g.maxConcurrency = 0
		}
	}
	for _, t := range p.topics {
		slices.Sort(t)
	}
	return p
}

// narrower reports whether pattern a is more particular than b, both of which fit one topic.
func narrower(a, b string) bool {
	wildA, wildB := strings.HasSuffix(a, "*"), strings.HasSuffix(b, "*")
	if wildA != wildB {
		return wildB
	}
	return len(a) > len(b)
}
