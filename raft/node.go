package raft

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"
	"github.com/prometheus/client_golang/prometheus"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft/logstore"
	"tercet.dev/tercet/raft/peer"
	"tercet.dev/tercet/raft/transport"
	"tercet.dev/tercet/wal"
	"tercet.dev/tercet/wal/disk"
)

// shard is the one shard of this release. Log records, frames and message IDs carry its number.
const shard uint16 = 0

// Timing of the raft library. An election starts after half a second without a heartbeat; a leader that reaches no
// majority steps down before that.
const (
	heartbeatTimeout = 500 * time.Millisecond
	leaseTimeout     = 400 * time.Millisecond
	commitTimeout    = 250 * time.Millisecond
	// maxAppendEntries bounds a request by count; entries are bounded in bytes.
	maxAppendEntries = 16
	// never is longer than any process lives, and doubles without overflow.
	never = 50 * 365 * 24 * time.Hour
)

// testHooks are what tests replace in a Config.
type testHooks struct {
	disk disk.FS
	fs   vfs.FS
	dial func(ctx context.Context, address string) (net.Conn, error)
	wall func() time.Time
	// checkpointLogBytes overrides the engine's.
	checkpointLogBytes int64
	// keepLogBytes overrides keepLogBytes, when not zero.
	keepLogBytes int64
	direct       wal.DirectMode
	// installGrace overrides installGrace, when not zero.
	installGrace time.Duration
	// parkSlice overrides parkSliceMax, when not zero.
	parkSlice time.Duration
	// levelMax, when not nil, is the highest feature level the node claims to know: an older release.
	levelMax *uint32
	// keepIntake overrides keepIntakeEvery, when not zero.
	keepIntake time.Duration
}

// A Node is one member of the cluster. Its methods may be called from any goroutine.
type Node struct {
	cfg Config
	log hclog.Logger
	id  engine.NodeID
	// incarnation is the part of id that was drawn with the data directory.
	incarnation string

	dir       *dataDir
	wal       *wal.WAL
	eng       *engine.Engine
	logs      *logs
	mesh      *peer.Mesh
	trans     atomic.Pointer[transport.Transport]
	raft      *hraft.Raft
	notify    chan bool
	machine   *machine
	snaps     *snapshots
	directory *directory
	metrics   *metrics

	clock  *clusterClock
	coal   *coalescer
	acks   *acks
	intake *intake
	outbox *outbox
	inbox  inbox
	reads  *readRounds
	meter  logMeter

	watches watches
	// reign ends when this node learns of another leader, or that there is none.
	reign    atomic.Pointer[context.Context]
	endReign context.CancelFunc // of tick alone

	// serviceMu orders the openings and closings of the service.
	serviceMu sync.Mutex
	// leadAt is when the service last began to open.
	leadAt time.Time
	// openTerm is the term in which this node is open for service as leader, 0 while it is not.
	openTerm atomic.Uint64
	stalled  atomic.Bool
	// draining is set by Leave, drained by Drain.
	draining, drained atomic.Bool
	closing           atomic.Bool
	ready             atomic.Bool // hraft runs
	changing          atomic.Bool // a membership change is under way

	policyMu sync.Mutex
	policy   *zonePolicy
	inSync   atomic.Pointer[engine.InSync]
	// fullDisk names a node of the in-sync set that has reached its disk reserve.
	fullDisk  atomic.Pointer[string]
	clusterID atomic.Pointer[string]
	config    atomic.Pointer[hraft.Configuration]

	// evidence wakes tick when a link reports something.
	evidence chan struct{}
	refused  sync.Map // engine.NodeID → time.Time of the refusal

	exchangeKick chan struct{}

	// lastLeader and former are the leader this node knew last and the one before; guarded by policyMu.
	lastLeader, former engine.NodeID
	// Of tick alone.
	membersNext time.Time
	shownLeader engine.NodeID
	opening     struct {
		number uint64
		route  route
		next   time.Time
	}

	// broadcast answers the messages that front ends of other nodes send to all.
	broadcast atomic.Pointer[func([]byte) []byte]
	// asked answers the questions that other nodes' front ends put to the leader's, by subject.
	asked sync.Map // string → func([]byte) ([]byte, error)

	strangersMu sync.Mutex
	strangers   map[engine.NodeID]stranger

	foundingPtr   atomic.Pointer[founding]
	appliedSignal signal
	quiet         sync.Map // string → time.Time of the last such line

	stop    chan struct{}
	spawnMu sync.Mutex // orders spawn with the end of it
	wg      sync.WaitGroup
	// waitingReads counts the reads of streams that wait here for something to come.
	waitingReads atomic.Int64
	done         chan struct{}

	errMu     sync.Mutex
	err       error
	closeOnce sync.Once
	closeErr  error
}

// logs is this node's log, with what the node asks of it.
type logs struct {
	*logstore.Store
	shard *wal.Shard
	node  *Node
}

// Last returns the last index of the log.
func (l *logs) Last() uint64 { return l.shard.Last() }

// GetLog implements hraft.LogStore. Raft panics when it cannot read an entry that it has to apply; like a term that cannot
// be saved, that ends raft's goroutine here, and the process in order.
func (l *logs) GetLog(index uint64, e *hraft.Log) error {
	err := l.Store.GetLog(index, e)
	if err != nil && !errors.Is(err, hraft.ErrLogNotFound) && l.node.ready.Load() {
		l.node.fatal(fmt.Errorf("reading entry %d: %w", index, err))
		runtime.Goexit()
	}
	return err
}

// StoreLogs implements hraft.LogStore. The clock hears of an entry as early as the log: a node that is elected may hold
// entries that it has not applied.
func (l *logs) StoreLogs(entries []*hraft.Log) error {
	if err := l.Store.StoreLogs(entries); err != nil {
		return err
	}
	for _, e := range entries {
		if e.Type != hraft.LogCommand {
			continue
		}
		if s, err := engine.EntryStamp(e.Data); err == nil { // else applying it will tell
			l.node.clock.follow(e.Term, s)
		}
	}
	return nil
}

// StoreLog implements hraft.LogStore.
func (l *logs) StoreLog(e *hraft.Log) error { return l.StoreLogs([]*hraft.Log{e}) }

// SetUint64 implements hraft.StableStore. When its term cannot be saved, raft panics on its main goroutine. The disk
// that refused has stopped the node already (wal.Options.OnFatal), so the goroutine ends here instead, and the
// process by an orderly exit that says why.
func (l *logs) SetUint64(key []byte, v uint64) error {
	err := l.Store.SetUint64(key, v)
	if err != nil && l.node.ready.Load() {
		l.node.fatal(fmt.Errorf("saving raft's term: %w", err))
		runtime.Goexit()
	}
	return err
}

// fill checks a Config and fills the defaults.
func (c *Config) fill() error {
	switch {
	case !validName(c.Name):
		return fmt.Errorf("node id %q: use 1 to 64 letters, digits, - and _", c.Name)
	case c.Dir == "":
		return errors.New("no data directory given")
	case c.PeerAddr == "":
		return errors.New("no peer address given")
	case len(c.Peers) > 0 && len(c.Join) > 0:
		return errors.New("give either founding peers or nodes to join, not both")
	}
	if len(c.Peers) > 0 {
		names := make(map[string]bool)
		addrs := make(map[string]bool)
		for _, p := range c.Peers {
			switch {
			case !validName(p.Name) || p.Addr == "":
				return fmt.Errorf("founding peer %q=%q is not a node id and an address", p.Name, p.Addr)
			case names[p.Name] || addrs[p.Addr]:
				return fmt.Errorf("founding peer %s or its address %s is listed twice", p.Name, p.Addr)
			}
			names[p.Name], addrs[p.Addr] = true, true
		}
		if !names[c.Name] {
			return fmt.Errorf("the founding peers do not list this node, %s", c.Name)
		}
	}
	if c.Zone == "" {
		c.Zone = c.Name
	}
	if c.ZoneTimeout <= 0 {
		c.ZoneTimeout = zoneTimeoutDefault
	}
	if c.WALSegmentSize == 0 {
		c.WALSegmentSize = wal.SegmentSizeDefault
	}
	if c.MemoryBudget <= 0 {
		c.MemoryBudget = defaultMemoryBudget()
	}
	if c.Logger == nil {
		c.Logger = hclog.NewNullLogger()
	}
	if c.test.disk == nil {
		c.test.disk = disk.OS()
	}
	if c.SyncDelay > 0 {
		c.test.disk = disk.WithSyncDelay(c.test.disk, c.SyncDelay)
	}
	if c.test.fs == nil {
		c.test.fs = vfs.Default
	}
	if c.test.wall == nil {
		c.test.wall = time.Now
	}
	return nil
}

// Start opens the data directory, rebuilds the state, and takes part in the cluster. It returns once the node
// runs, which may be before a leader is known (see Ready); with empty directories it waits, until ctx ends, for
// the founding members or for admission.
func Start(ctx context.Context, cfg Config) (*Node, error) {
	if err := cfg.fill(); err != nil {
		closeAll(cfg.PeerListeners)
		return nil, err
	}
	n := &Node{
		cfg: cfg, log: cfg.Logger.Named("raft").With("node", cfg.Name),
		notify: make(chan bool, 64), evidence: make(chan struct{}, 1), exchangeKick: make(chan struct{}, 1),
		strangers: make(map[engine.NodeID]stranger), stop: make(chan struct{}), done: make(chan struct{}),
		policy: newZonePolicy(cfg.ZoneTimeout),
	}
	n.beginReign()
	n.inbox.ops = make(map[forwardKey]*op)
	n.machine = &machine{n: n}
	n.appliedSignal.init()
	n.config.Store(&hraft.Configuration{})
	if err := n.start(ctx); err != nil {
		n.setErr(err)
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// start brings the parts up, from the disk to the network. What it leaves in the Node is what Close takes down.
func (n *Node) start(ctx context.Context) error {
	cfg := &n.cfg
	var err error
	n.metrics = newMetrics(n)
	if n.dir, err = openDataDir(cfg.test.disk, cfg.Dir, cfg.Name); err != nil {
		closeAll(cfg.PeerListeners)
		return err
	}
	n.id, n.incarnation = n.dir.id.id(), n.dir.id.Incarnation
	n.log = n.log.With("incarnation", n.incarnation)
	n.directory = openDirectory(n.dir)
	listener, err := listen(cfg.PeerAddr, cfg.PeerListeners)
	if err != nil {
		return err
	}
	n.mesh = peer.New(peer.Options{ID: peerID(n.id), Zone: cfg.Zone, Cluster: n.dir.id.Cluster, Listener: listener,
		TLS: cfg.PeerTLS, Enrol: cfg.Enrol, Admit: admitPeer, Dial: cfg.test.dial, Logger: n.log, Observe: n.observe, Take: n.take, Forward: n.forward, Introduce: n.introduce})
	if err := n.openStorage(); err != nil {
		return err
	}
	if err := n.recoverState(); err != nil {
		return err
	}
	n.buildService()
	n.mesh.Start()
	if err := n.takePart(ctx); err != nil {
		return err
	}
	if n.raft, err = hraft.NewRaft(n.raftConfig(), n.machine, n.logs, n.logs, n.snaps, n.trans.Load()); err != nil {
		return fmt.Errorf("starting raft: %w", err)
	}
	n.ready.Store(true)
	n.spawn(n.leadership)
	n.spawn(n.tick)
	n.spawn(n.exchange)
	n.spawn(n.checkpoints)
	n.spawn(func() { n.coal.run(n.stop) })
	n.spawn(func() { n.intake.run(n.stop) })
	n.spawn(func() {
		n.reads.run(n.stop)
	})
	return nil
}

// openStorage opens the log and the store.
func (n *Node) openStorage() error {
	cfg := &n.cfg
	budget := cfg.MemoryBudget
	memTable := min(max(budget/16, 4<<20), 32<<20)
	reserve := cfg.DiskReserve
	if reserve == 0 {
		reserve = max(defaultDiskReserve(cfg.Dir), 2*memTable)
	}
	cfg.DiskReserve = max(reserve, memTable)
	var err error
	n.wal, err = wal.Open(wal.Options{Dir: n.dir.join(walDirName), FS: cfg.test.disk, SegmentSize: cfg.WALSegmentSize,
		RingBytes: max(budget/8, 8<<20), Reserve: cfg.DiskReserve, Logger: n.log, Direct: cfg.test.direct,
		OnFatal: func(err error) { n.fatal(fmt.Errorf("write-ahead log: %w", err)) },
		ObserveSync: func(d time.Duration, bytes int) {
			n.metrics.fsync.Observe(d.Seconds())
			n.metrics.synced.Add(float64(bytes))
		}})
	if err != nil {
		if errors.Is(err, wal.ErrCorrupt) {
			return &StartError{Kind: ErrDamaged, Message: "the write-ahead log is damaged", Remedy: replaceRemedy(cfg.Name), Cause: err}
		}
		return err
	}
	n.eng, err = engine.Open(engine.Options{Dir: n.dir.join(storeDirName), FS: cfg.test.fs, Shard: shard,
		CacheBytes: max(budget/4, 8<<20), MemTableBytes: memTable, RecentBytes: max(budget/8, 4<<20),
		CheckpointLogBytes: cfg.test.checkpointLogBytes, Logger: n.log, Spawn: func(f func()) { go f() },
		OnFatal: func(err error) { n.fatal(fmt.Errorf("store: %w", err)) }})
	if err != nil {
		if _, damaged := errors.AsType[*engine.CorruptError](err); damaged {
			return &StartError{Kind: ErrDamaged, Message: "the store is damaged", Remedy: replaceRemedy(cfg.Name), Cause: err}
		}
		return err
	}
	n.snaps = newSnapshots(n.eng, func() (int64, error) {
		s, err := n.wal.Space()
		return s.Free - s.Reserve, err
	}, n.log)
	if cfg.test.installGrace != 0 {
		n.snaps.grace = cfg.test.installGrace
	}
	return nil
}

// recoverState opens the log as raft sees it and rebuilds the state from it (decision 1).
func (n *Node) recoverState() error {
	durable := n.eng.Durable()
	var base hraft.Configuration
	if len(durable.Configuration) > 0 {
		base = hraft.DecodeConfiguration(durable.Configuration)
	}
	s := n.wal.Shard(shard)
	store, err := logstore.Open(logstore.Options{WAL: n.wal, Shard: s, Base: base, BaseIndex: durable.ConfigurationIndex,
		OnConfiguration: n.configured,
		OnTerm: func(term uint64) {
			if t := n.trans.Load(); t != nil {
				t.ObserveTerm(term)
			}
		},
		OnDurable: func() {
			if t := n.trans.Load(); t != nil {
				t.LogDurable()
			}
		},
		RetainFrom: n.retainFrom, Logger: n.log})
	if err != nil {
		return damaged(n.cfg.Name, err)
	}
	n.logs = &logs{Store: store, shard: s, node: n}
	if _, err := store.Reconcile(durable.Index, durable.Term); err != nil {
		return damaged(n.cfg.Name, err)
	}
	n.trans.Store(transport.New(transport.Options{Mesh: n.mesh, Shard: shard, Address: hraft.ServerAddress(n.cfg.PeerAddr),
		Log: store, WAL: n.wal, OnAdvance: func(transport.Advance) { n.acks.advance() }, Logger: n.log}))
	// What the marks hold was told to the store's callbacks before there was a transport.
	index, config := store.Configuration()
	n.configured(index, config)

	n.clock = n.recoveredClock()
	n.acks = &acks{watermark: n.watermark, zones: n.holding, closed: true}
	n.coal = newCoalescer(coalescerEnv{
		stamp: n.clock.stamp, level: n.eng.Level,
		propose: func(entry []byte) { n.raft.ApplyLog(hraft.Log{Data: entry}, 0) },
		pressed: n.pressed, refuse: n.refuse, eng: n.eng, fatal: n.fatal,
	}, max(n.cfg.MemoryBudget/8, 16<<20))
	n.coal.lot.expired = n.foundNothing
	set := n.eng.InSync()
	n.inSync.Store(&set)
	n.policy.observe(n.now(), set)
	first, _ := n.eng.Applied()
	through, err := store.ReplayCommitted(first, n.machine.apply)
	if err != nil {
		if _, corrupt := errors.AsType[*wal.CorruptionError](err); corrupt {
			return damaged(n.cfg.Name, err)
		}
		if _, newer := errors.AsType[*engine.UnknownError](err); newer {
			return &StartError{Kind: ErrForeign, Message: fmt.Sprintf("%s holds what a newer release wrote", n.cfg.Dir), Remedy: sameRelease, Cause: err}
		}
		return fmt.Errorf("replaying the log: %w", err)
	}
	if have := n.eng.Level(); have > n.levelMax() {
		return &StartError{Kind: ErrForeign, Message: fmt.Sprintf("%s is at feature level %d, and this release knows %d", n.cfg.Dir, have, n.levelMax()),
			Remedy: sameRelease}
	}
	if through > first {
		n.log.Info("replayed the log", "from", first+1, "through", through)
	}
	n.sinceSync()
	if have := n.eng.ClusterID(); have != "" && have != n.dir.id.Previous {
		if known := n.dir.id.Cluster; known != "" && known != have {
			return &StartError{Kind: ErrForeign, Message: fmt.Sprintf("%s holds the state of cluster %s and the identity of cluster %s", n.cfg.Dir, have, known),
				Remedy: replaceRemedy(n.cfg.Name)}
		}
		n.foundedAs(have)
	}
	return nil
}

// recoveredClock makes a clock that goes on from what this node has: what it holds was received when its process
// began, as far as clocks go.
func (n *Node) recoveredClock() *clusterClock {
	_, term := n.eng.Applied()
	c := newClusterClock(time.Now, n.cfg.test.wall, n.cfg.VirtualClock, term, n.eng.Stamp())
	applied, _ := n.eng.Applied()
	var l hraft.Log
	for index := n.logs.Last(); index > applied; index-- {
		if err := n.logs.Store.GetLog(index, &l); err != nil {
			break // what cannot be read is found when it has to be applied
		}
		c.term = max(c.term, l.Term)
		if l.Type == hraft.LogCommand {
			if s, err := engine.EntryStamp(l.Data); err == nil {
				c.follow(l.Term, s)
			}
			break
		}
	}
	return c
}

// damaged makes an error about log and store a refusal to start.
func damaged(name string, err error) error {
	return &StartError{Kind: ErrDamaged, Message: "log and store do not fit together", Remedy: replaceRemedy(name), Cause: err}
}

// sinceSync publishes the set as recovered.
func (n *Node) sinceSync() {
	set := n.eng.InSync()
	n.inSync.Store(&set)
	n.metrics.inSync.Set(float64(len(set.Nodes)))
	n.requireSet(set)
}

// requireSet tells the watermark whom acknowledgements wait for.
func (n *Node) requireSet(set engine.InSync) {
	t := n.trans.Load()
	if t == nil {
		return
	}
	ids := make([]hraft.ServerID, len(set.Nodes))
	for i, id := range set.Nodes {
		ids[i] = hraft.ServerID(id)
	}
	t.Watermark().SetRequired(ids...)
}

// buildService makes what serves commands and reads.
func (n *Node) buildService() {
	n.outbox = &outbox{self: n.id, mesh: n.mesh, now: n.now, local: n.accept, dropLocal: n.dropOp}
	n.intake = newIntake(n.id, n.outbox, n.now, max(n.cfg.MemoryBudget/8, 16<<20))
	n.intake.release = n.release
	if n.cfg.test.parkSlice != 0 {
		n.intake.slice = n.cfg.test.parkSlice
	}
	if n.cfg.test.keepIntake == 0 {
		n.cfg.test.keepIntake = keepIntakeEvery
	}
	n.reads = newReadRounds(n.now, n.evidenceSince)
}

func (n *Node) raftConfig() *hraft.Config {
	c := hraft.DefaultConfig()
	c.LocalID = hraft.ServerID(n.id)
	c.HeartbeatTimeout, c.ElectionTimeout = heartbeatTimeout, heartbeatTimeout
	c.LeaderLeaseTimeout, c.CommitTimeout = leaseTimeout, commitTimeout
	c.MaxAppendEntries = maxAppendEntries
	c.ShutdownOnRemove = false
	c.NoSnapshotRestoreOnStart = true
	c.SnapshotInterval, c.SnapshotThreshold, c.TrailingLogs = never, math.MaxUint64, 0
	c.NoLegacyTelemetry = true
	c.NotifyCh = n.notify
	c.Logger = raftLogger{n.log.Named("hraft"), n}
	return c
}

// raftLogger is what hraft logs to. That a cluster holds its first election is no reason to warn.
type raftLogger struct {
	hclog.Logger
	n *Node
}

// Warn implements hclog.Logger.
func (l raftLogger) Warn(msg string, args ...any) {
	if l.n.clusterID.Load() == nil {
		l.Info(msg, args...)
		return
	}
	l.Logger.Warn(msg, args...)
}

// configured is told the latest configuration whenever it changes, committed or not.
func (n *Node) configured(_ uint64, c hraft.Configuration) {
	c = c.Clone()
	n.config.Store(&c)
	n.syncPeers()
	if t := n.trans.Load(); t != nil {
		t.SetConfiguration(0, c)
	}
}

// syncPeers makes the table of nodes fit the configuration.
func (n *Node) syncPeers() {
	peers := transport.Peers(n.configuration())
	if len(peers) == 0 {
		return // a node that is joining keeps the table it was given
	}
	n.mesh.SetPeers(peers)
}

// configuration returns the latest configuration.
func (n *Node) configuration() hraft.Configuration { return *n.config.Load() }

// match returns the index up to which a node's disk holds the log, as far as this leader knows.
func (n *Node) match(id engine.NodeID) uint64 {
	return n.trans.Load().Watermark().Match(hraft.ServerID(id))
}

// waitDurable waits until this node's disk holds the log up to index.
func (n *Node) waitDurable(index uint64) error { return n.logs.WaitDurable(index, n.stop) }

// evidenceSince waits until a majority answered something sent at or after since (decision 13).
func (n *Node) evidenceSince(ctx context.Context, since time.Time) error {
	term := n.openTerm.Load()
	if term == 0 {
		return hraft.ErrNotLeader
	}
	// Only to have heartbeats sent at once; what it says is not evidence, since it also counts answers to
	// requests that were sent before.
	n.raft.VerifyLeader()
	return n.trans.Load().Watermark().WaitConfirmed(ctx, term, since)
}

// observe takes what a link found out.
func (n *Node) observe(e peer.Event) {
	id := engine.NodeID(e.Peer)
	switch e.Kind {
	case peer.PortRefused:
		if e.Redial {
			n.refused.Store(id, e.At)
		}
	case peer.Up:
		n.refused.Delete(id)
	default:
		return
	}
	select {
	case n.evidence <- struct{}{}:
	default:
	}
}

// refusing reports that a node's port refused the last redial.
func (n *Node) refusing(id engine.NodeID) bool {
	_, ok := n.refused.Load(id)
	return ok
}

// lastHeard returns when anything last came from a node.
func (n *Node) lastHeard(id engine.NodeID) time.Time { return n.mesh.LastHeard(peerID(id)) }

// formerLeader returns who led before this node.
func (n *Node) formerLeader() engine.NodeID {
	n.policyMu.Lock()
	defer n.policyMu.Unlock()
	return n.former
}

// pressed reports that the log has more unsynced data than it should (decision 5).
func (n *Node) pressed() bool {
	bytes, oldest := n.wal.Unsynced()
	return bytes > unsyncedBytesMax || oldest > unsyncedAgeMax
}

// load fills the contents of what a command gave.
func (n *Node) load(r *engine.Result) error {
	if err := n.eng.LoadResult(r); err != nil {
		return errs.Of(errs.OutcomeUnknown).With(err)
	}
	return nil
}

// Load fills the contents of deliveries that were asked for without them. An error is errs.MessageNotFound when one of
// them has expired meanwhile (Delivery.Gone).
func (n *Node) Load(ds []engine.Delivery) error { return n.eng.Load(ds) }

// foundedAs notes the cluster's id, once it is known from the replicated state.
func (n *Node) foundedAs(id string) {
	n.clusterID.Store(&id)
	n.mesh.SetCluster(id)
	if n.dir.id.Cluster == id && n.dir.id.Previous == "" {
		return
	}
	ident := n.dir.id
	ident.Cluster, ident.Previous = id, ""
	if err := n.dir.setIdentity(ident); err != nil {
		n.fatal(fmt.Errorf("writing %s: %w", identityName, err))
	}
}

func (n *Node) now() time.Time { return time.Now() }

// running reports whether requests of other nodes can be served.
func (n *Node) running() bool { return n.ready.Load() && !n.closing.Load() }

// spawn runs f on a goroutine that Close waits for, unless the node is closing: then it reports false.
func (n *Node) spawn(f func()) bool {
	n.spawnMu.Lock()
	defer n.spawnMu.Unlock()
	if n.closing.Load() {
		return false
	}
	n.wg.Add(1)
	go func() {
		defer n.wg.Done()
		f()
	}()
	return true
}

// logEvery logs a warning, at most once in ten seconds for each key.
func (n *Node) logEvery(key, msg string, args ...any) {
	now := time.Now()
	if last, ok := n.quiet.Load(key); ok && now.Sub(last.(time.Time)) < 10*time.Second {
		return
	}
	n.quiet.Store(key, now)
	n.log.Warn(msg, args...)
}

// Propose has a command applied and returns its result. Any node takes it; a follower passes it to the leader.
// Through an election it is held, and repeated under its number on the new leader, until ctx ends. Errors are
// *errs.Error: an outcome of None means that nothing happened and nothing will. A result that refuses the command
// comes as Reply.Code with a nil error.
func (n *Node) Propose(ctx context.Context, p Proposal) (Reply, error) {
	c, err := n.newCall(p)
	if err != nil {
		return Reply{}, err
	}
	reply, refused := n.intake.do(ctx, c)
	if refused != nil {
		return Reply{}, refused
	}
	if reply.Bare = p.Bare && c.isLocal; c.isLocal && reply.HasContents() && !p.Bare {
		if err := n.load(&reply.Result); err != nil {
			return Reply{}, err
		}
	}
	return reply, nil
}

// Submit has a command applied as Propose does, without waiting for it: done is called with the outcome, once, from
// any goroutine, possibly before Submit returns. It must not block.
//
// Commands submitted through one node are applied in the order in which Submit was called, whoever leads and however
// often that changes; those that come close together share entries of the log. What is refused with an outcome of None
// leaves the others where they are. A receive that waits (Proposal.Wait) is not part of the order: it is served when
// there is something for it. Commands passed to Propose are ordered only by its returning.
func (n *Node) Submit(p Proposal, done func(Reply, error)) {
	c, err := n.newCall(p)
	if err != nil {
		done(Reply{}, err)
		return
	}
	c.ordered = c.waitUntil.IsZero()
	if p.Timeout > 0 {
		c.deadline = n.now().Add(p.Timeout)
	}
	c.notify = func(c *call) {
		switch {
		case c.err != nil:
			done(Reply{}, c.err)
		case !c.isLocal || !c.reply.HasContents():
			done(*c.reply, nil)
		case !n.spawn(func() {
			if err := n.load(&c.reply.Result); err != nil {
				done(Reply{}, err)
				return
			}
			done(*c.reply, nil)
		}):
			done(Reply{}, errs.Of(errs.OutcomeUnknown).With(ErrClosed))
		}
	}
	n.intake.submit(c)
}

// newCall makes a call of a proposal, if clients may propose it.
func (n *Node) newCall(p Proposal) (*call, error) {
	c := &call{first: op{request: request{cmd: p.Command, require: p.Require}}}
	probe := &c.first
	if err := probe.inspect(); err != nil {
		return nil, errs.Of(errs.BadRequest).With(err)
	}
	switch probe.kind {
	case engine.CmdInit, engine.CmdOpenIntake, engine.CmdShrink, engine.CmdExpand, engine.CmdLevel:
		return nil, errs.New(errs.BadRequest, "command kind %d is not for clients", probe.kind)
	case engine.CmdReceive, engine.CmdStreamReadGroup:
		wait := p.Wait > 0 && probe.receive != nil
		if probe.receive != nil && probe.receive.Park != wait {
			cmd, err := engine.WithPark(p.Command, wait)
			if err != nil {
				return nil, errs.From(err)
			}
			probe.cmd, probe.receive.Park = cmd, wait
		}
		if wait {
			probe.since = n.now()
			c.waitUntil = probe.since.Add(p.Wait)
			c.stop = p.Stop
		}
	case engine.CmdAdvance:
		if !n.cfg.VirtualClock {
			return nil, errs.New(errs.Unsupported, "the clock is not virtual")
		}
	default:
	}
	return c, nil
}

// release gives back what a receive was given whose client is gone.
func (n *Node) release(c *call, ds []engine.Delivery) {
	var topic, group string
	switch cmd, err := engine.DecodeCommand(c.first.cmd); cmd := cmd.(type) {
	case *engine.Receive:
		topic, group = cmd.Topic, cmd.Group
	case *engine.ReceiveID:
		topic, group = cmd.Topic, cmd.Group
	default:
		n.log.Warn("cannot release what an abandoned receive was given", "error", err)
		return
	}
	s := &engine.Settle{Topic: topic, Group: group, Op: engine.Extend}
	for i := range ds {
		s.Receipts = append(s.Receipts, ds[i].Receipt)
	}
	n.spawn(func() {
		ctx, cancel := context.WithTimeout(context.Background(), abandonedMax)
		defer cancel()
		if _, err := n.Propose(ctx, Proposal{Command: s.AppendTo(nil)}); err != nil && !n.closing.Load() {
			n.log.Warn("what an abandoned receive was given stays leased until its deadline", "topic", topic, "group", group, "error", err)
		}
	})
}

// Secret returns the cluster's key for receipts and message IDs, nil before the cluster is founded.
func (n *Node) Secret() []byte { return n.eng.Secret() }

// Done is closed when the node has stopped, after Close or by itself.
func (n *Node) Done() <-chan struct{} { return n.done }

// Err returns why the node stopped: ErrClosed after Close, else the fatal error. Nil while it runs.
func (n *Node) Err() error {
	n.errMu.Lock()
	defer n.errMu.Unlock()
	return n.err
}

func (n *Node) setErr(err error) {
	n.errMu.Lock()
	defer n.errMu.Unlock()
	if n.err == nil {
		n.err = err
	}
}

// fatal stops the node for an error that it must not survive: what is on its disk, or what it applied, may differ
// from what it promised. It may be called from any goroutine.
func (n *Node) fatal(err error) {
	if n.closing.Load() && errors.Is(err, wal.ErrClosed) {
		return
	}
	n.setErr(err)
	n.log.Error("stopping", "error", err)
	go func() { _ = n.Close() }()
}

// beginReign replaces the context that ends with the leader known now.
func (n *Node) beginReign() {
	if n.endReign != nil {
		n.endReign()
	}
	ctx, cancel := context.WithCancel(context.Background())
	n.reign.Store(&ctx)
	n.endReign = cancel
}

// Gatherer returns the registry that holds the node's metrics when Config.Registerer was nil.
func (n *Node) Gatherer() prometheus.Gatherer { return n.metrics.registry }

// signal is a broadcast that can be waited for again and again.
type signal struct {
	mu sync.Mutex
	ch chan struct{}
}

func (s *signal) init() { s.ch = make(chan struct{}) }

func (s *signal) broadcast() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.ch)
	s.ch = make(chan struct{})
}

// next returns what the next broadcast closes.
func (s *signal) next() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ch
}

// isVoter reports whether a node votes in the latest configuration.
func (n *Node) isVoter(id engine.NodeID) bool { return slices.Contains(n.voters(), id) }
