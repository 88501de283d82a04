package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	hclog "github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/raft/logstore"
	"tercet.dev/tercet/raft/peer"
	"tercet.dev/tercet/wal"
	"tercet.dev/tercet/wal/disk/sim"
)

// This file is the stage for tests with the real library: nodes of hashicorp/raft on this transport, the log store and
// the WAL, on simulated disks, over loopback connections that end with their node's life.

// world is where nodes find each other: logical address to the listener of the present life.
type world struct {
	t    *testing.T
	mu   sync.Mutex
	live map[string]*life // by logical address; nil while a node is down
	cut  map[*life]bool   // lives that are cut off, and live

	barriers atomic.Int64
}

// life is one run of a node's process, from its start to its end or the loss of power.
type life struct {
	w       *world
	name    string
	id      hraft.ServerID
	address string
	disk    *sim.Disk
	dead    chan struct{} // closed when the power fails
	once    sync.Once

	listener net.Listener
	connMu   sync.Mutex
	conns    map[*mortalConn]struct{}

	wal   *wal.WAL
	store *logstore.Store
	mesh  *peer.Mesh
	trans atomic.Pointer[Transport]
	raft  *hraft.Raft
	fsm   *recorder
	stage nodeOptions
	level levels
}

// nodeOptions say how a node of the stage differs from a correct one, and how it starts.
type nodeOptions struct {
	bootstrap *hraft.Configuration // of the first start
	faults    func(*Transport)     // negative controls of the transport
	lyingLog  bool                 // negative control: the log store takes everything for durable
	eager     bool                 // the state machine applies before the node's own disk has synced
	config    func(*hraft.Config)
	stallMax  time.Duration
	logger    hclog.Logger
}

func newWorld(t *testing.T) *world {
	return &world{t: t, live: make(map[string]*life), cut: make(map[*life]bool)}
}

func nodeName(i int) string { return fmt.Sprintf("n%d", i+1) }

func logicalAddress(name string) string { return name + ".cluster:7400" }

func nodeID(name string) hraft.ServerID { return hraft.ServerID(name + ".aa") }

// isDead tells whether the power has failed.
func (l *life) isDead() bool {
	select {
	case <-l.dead:
		return true
	default:
		return false
	}
}

// mortalConn is a connection of a life. When the power fails it is cut, or says nothing more.
type mortalConn struct {
	net.Conn
	l      *life
	closed chan struct{}
	once   sync.Once
	mute   atomic.Bool
}

func (l *life) own(nc net.Conn) net.Conn {
	c := &mortalConn{Conn: nc, l: l, closed: make(chan struct{})}
	l.connMu.Lock()
	defer l.connMu.Unlock()
	if l.isDead() {
		c.mute.Store(true)
	}
	l.conns[c] = struct{}{}
	return c
}

func (c *mortalConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.mute.Load() {
		<-c.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (c *mortalConn) Write(p []byte) (int, error) {
	if c.mute.Load() {
		<-c.closed
		return 0, net.ErrClosed
	}
	return c.Conn.Write(p)
}

// SetDeadline ends what hangs when its time has come already: that is how a mesh ends a handshake.
func (c *mortalConn) SetDeadline(t time.Time) error {
	if !t.IsZero() && t.Before(time.Now()) {
		c.once.Do(func() { close(c.closed) })
	}
	return c.Conn.SetDeadline(t)
}

func (c *mortalConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	c.l.connMu.Lock()
	delete(c.l.conns, c)
	c.l.connMu.Unlock()
	return c.Conn.Close()
}

type mortalListener struct {
	net.Listener
	l *life
}

func (m mortalListener) Accept() (net.Conn, error) {
	nc, err := m.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return m.l.own(nc), nil
}

// dial connects a life to a logical address.
func (l *life) dial(ctx context.Context, address string) (net.Conn, error) {
	l.w.mu.Lock()
	to := l.w.live[address]
	if l.w.cut[l] {
		to = nil
	}
	l.w.mu.Unlock()
	if l.isDead() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if to == nil {
		return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	}
	var d net.Dialer
	nc, err := d.DialContext(ctx, "tcp", to.listener.Addr().String())
	if err != nil {
		return nil, err
	}
	return l.own(nc), nil
}

// mortalStore is a store as raft sees it. After the power has failed it hangs, until the life is buried, and then says
// that all went well: raft panics when its term cannot be stored, and nobody hears the dead.
type mortalStore struct {
	*logstore.Store
	l *life
}

func (m mortalStore) verdict(err error) error {
	if err != nil && m.l.isDead() {
		return nil
	}
	return err
}

func (m mortalStore) SetUint64(k []byte, v uint64) error { return m.verdict(m.Store.SetUint64(k, v)) }
func (m mortalStore) Set(k, v []byte) error              { return m.verdict(m.Store.Set(k, v)) }
func (m mortalStore) DeleteRange(from, to uint64) error {
	return m.verdict(m.Store.DeleteRange(from, to))
}

func (m mortalStore) GetLog(i uint64, l *hraft.Log) error {
	err := m.Store.GetLog(i, l)
	if err != nil && m.l.isDead() {
		*l = hraft.Log{Index: i, Term: 1, Type: hraft.LogNoop}
		return nil
	}
	return err
}

// lyingWAL is the negative control of everything that the log store waits for.
type lyingWAL struct{ *wal.WAL }

func (w lyingWAL) Durable() wal.LSN                           { return w.Written() }
func (w lyingWAL) WaitDurable(wal.LSN, <-chan struct{}) error { return nil }

// recorder is a state machine that remembers what it applied, in memory. At start it is rebuilt from the log.
type recorder struct {
	l *life

	mu      sync.Mutex
	applied uint64
	seq     []string // "index:payload" of each command
	changed chan struct{}
	waiting map[string]chan uint64 // who waits for a command to be applied here
}

// await returns where the index of a command is sent when this node applies it. A future of raft's would do, but for
// one thing: some never end when raft shuts down.
func (f *recorder) await(command string) <-chan uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := make(chan uint64, 1)
	f.waiting[command] = c
	return c
}

func (f *recorder) Apply(l *hraft.Log) any { return f.ApplyBatch([]*hraft.Log{l})[0] }

// ApplyBatch implements hraft.BatchingFSM: wait for the disk, apply, stage the commit.
func (f *recorder) ApplyBatch(logs []*hraft.Log) []any {
	last := logs[len(logs)-1].Index
	var err error
	if !f.l.stage.eager {
		err = f.l.store.WaitDurable(last, f.l.dead)
	}
	results := make([]any, len(logs))
	for i, l := range logs {
		if err != nil {
			results[i] = err
			continue
		}
		f.record(l)
	}
	if err == nil {
		f.l.store.StageCommit(last)
	}
	return results
}

func (f *recorder) record(l *hraft.Log) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if l.Index <= f.applied {
		return
	}
	f.applied = l.Index
	if l.Type == hraft.LogCommand {
		f.seq = append(f.seq, fmt.Sprintf("%d:%s", l.Index, l.Data))
		if c := f.waiting[string(l.Data)]; c != nil {
			c <- l.Index
			delete(f.waiting, string(l.Data))
		}
	}
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *recorder) Snapshot() (hraft.FSMSnapshot, error) { return nil, errors.New("no snapshots here") }
func (f *recorder) Restore(io.ReadCloser) error          { return errors.New("no snapshots here") }

// sequence returns what has been applied.
func (f *recorder) sequence() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.seq...)
}

// reach waits until an index has been applied.
func (f *recorder) reach(ctx context.Context, index uint64) error {
	for {
		f.mu.Lock()
		applied, changed := f.applied, f.changed
		f.mu.Unlock()
		if applied >= index {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("applied %d of %d: %w", applied, index, ctx.Err())
		}
	}
}

// levels lets publishers wait for the watermark.
type levels struct {
	mu      sync.Mutex
	now     Advance
	changed chan struct{}
}

func (v *levels) advance(a Advance) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.now = a
	close(v.changed)
	v.changed = make(chan struct{})
}

// raftConfig is what the tests run raft with: fast, and not so fast that a busy machine elects all the time.
func raftConfig(id hraft.ServerID, logger hclog.Logger) *hraft.Config {
	c := hraft.DefaultConfig()
	c.LocalID = id
	c.HeartbeatTimeout, c.ElectionTimeout = 300*time.Millisecond, 300*time.Millisecond
	c.LeaderLeaseTimeout, c.CommitTimeout = 250*time.Millisecond, 50*time.Millisecond
	c.MaxAppendEntries = 16
	c.SnapshotInterval, c.SnapshotThreshold = 24*time.Hour, 1<<62
	c.NoSnapshotRestoreOnStart = true
	c.NoLegacyTelemetry = true
	c.Logger = logger
	return c
}

// testLogger logs to stderr if asked for by the environment.
func testLogger(name string) hclog.Logger {
	if level := os.Getenv("TERCET_TEST_LOG"); level != "" {
		return hclog.New(&hclog.LoggerOptions{Name: name, Level: hclog.LevelFromString(level), Output: os.Stderr})
	}
	return hclog.NewNullLogger()
}

// start begins a life of a node on what a disk holds.
func (w *world) start(name string, d *sim.Disk, o nodeOptions) *life {
	w.t.Helper()
	logger := o.logger
	if logger == nil {
		logger = testLogger(name)
	}
	l := &life{w: w, name: name, id: nodeID(name), address: logicalAddress(name), disk: d, dead: make(chan struct{}),
		conns: make(map[*mortalConn]struct{}), stage: o}
	l.level.changed = make(chan struct{})
	fail := func(err error) {
		w.t.Helper()
		w.t.Fatalf("start %s: %v", name, err)
	}
	var err error
	if l.wal, err = wal.Open(wal.Options{Dir: "/wal", FS: d, SegmentSize: 256 << 10, Prefill: -1, Logger: logger,
		OnFatal: func(err error) {
			if !l.isDead() {
				w.t.Errorf("%s: %v", name, err)
			}
		}}); err != nil {
		fail(err)
	}
	var stream logstore.WAL = l.wal
	if o.lyingLog {
		stream = lyingWAL{l.wal}
	}
	if l.store, err = logstore.Open(logstore.Options{WAL: stream, Shard: l.wal.Shard(0), Logger: logger,
		OnConfiguration: l.configure,
		OnTerm:          func(term uint64) { l.with(func(t *Transport) { t.ObserveTerm(term) }) },
		OnDurable:       func() { l.with((*Transport).LogDurable) },
	}); err != nil {
		fail(err)
	}
	if l.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		fail(err)
	}
	l.mesh = peer.New(peer.Options{ID: peer.ID(l.id), Zone: name, Cluster: "c1", Listener: mortalListener{l.listener, l}, Dial: l.dial,
		Logger: logger, RedialMin: 5 * time.Millisecond, RedialMax: 50 * time.Millisecond, DialTimeout: 300 * time.Millisecond,
		HandshakeTimeout: 500 * time.Millisecond, KeepAlive: 300 * time.Millisecond, Silence: 1200 * time.Millisecond,
		Linger: 200 * time.Millisecond})
	t := New(Options{Mesh: l.mesh, Address: hraft.ServerAddress(l.address), Log: l.store, WAL: l.wal, Logger: logger,
		CallTimeout: 300 * time.Millisecond, StallMax: o.stallMax, OnAdvance: l.level.advance})
	if o.faults != nil {
		o.faults(t)
	}
	l.trans.Store(t)
	if index, c := l.store.Configuration(); len(c.Servers) > 0 {
		l.configure(index, c)
	}
	l.fsm = &recorder{l: l, changed: make(chan struct{}), waiting: make(map[string]chan uint64)}
	if _, err := l.store.ReplayCommitted(0, func(e *hraft.Log) error { l.fsm.record(e); return nil }); err != nil {
		fail(err)
	}
	store := mortalStore{l.store, l}
	config := raftConfig(l.id, logger)
	if o.config != nil {
		o.config(config)
	}
	snapshots := hraft.NewDiscardSnapshotStore()
	if o.bootstrap != nil {
		if err := hraft.BootstrapCluster(config, store, store, snapshots, t, *o.bootstrap); err != nil && !errors.Is(err, hraft.ErrCantBootstrap) {
			fail(err)
		}
	}
	if l.raft, err = hraft.NewRaft(config, l.fsm, store, store, snapshots, t); err != nil {
		fail(err)
	}
	l.mesh.Start()
	w.mu.Lock()
	w.live[l.address] = l
	w.mu.Unlock()
	return l
}

// with calls f with the transport once there is one.
func (l *life) with(f func(*Transport)) {
	if t := l.trans.Load(); t != nil {
		f(t)
	}
}

func (l *life) configure(index uint64, c hraft.Configuration) {
	l.with(func(t *Transport) {
		t.SetConfiguration(index, c)
		l.mesh.SetPeers(Peers(c))
	})
}

// cutPower ends a life as a power loss does: the disk forgets, the network falls silent or is cut. It returns the disk
// that the next life finds.
func (l *life) cutPower(silent bool) *sim.Disk {
	l.w.mu.Lock()
	if l.w.live[l.address] == l {
		l.w.live[l.address] = nil
	}
	l.w.mu.Unlock()
	l.once.Do(func() { close(l.dead) })
	next := l.disk.Crash()
	l.connMu.Lock()
	conns := make([]*mortalConn, 0, len(l.conns))
	for c := range l.conns {
		c.mute.Store(true)
		conns = append(conns, c)
	}
	l.connMu.Unlock()
	if !silent {
		for _, c := range conns {
			_ = c.Close()
		}
	}
	_ = l.listener.Close()
	return next
}

// stop ends a life: what lives is shut down, what is dead is buried. Everything of it is gone afterwards.
func (l *life) stop() {
	l.w.mu.Lock()
	if l.w.live[l.address] == l {
		l.w.live[l.address] = nil
	}
	l.w.mu.Unlock()
	future := l.raft.Shutdown()
	l.disk.Release() // a heartbeat may wait for the disk to store its term
	if err := l.trans.Load().Close(); err != nil {
		l.w.t.Error(err)
	}
	if err := future.Error(); err != nil {
		l.w.t.Error(err)
	}
	if err := l.mesh.Close(); err != nil {
		l.w.t.Error(err)
	}
	if err := l.store.Close(); err != nil {
		l.w.t.Error(err)
	}
	if err := l.wal.Close(); err != nil && !l.isDead() {
		l.w.t.Error(err)
	}
}

// leader returns the living node that believes to lead, nil if none does.
func (w *world) leader() *life {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range w.live {
		if l != nil && l.raft.State() == hraft.Leader {
			return l
		}
	}
	return nil
}

// awaitLeader waits for a leader that has applied something new: only then does it know what is committed. It does not
// wait for raft's barrier, whose future never ends when its node dies.
func (w *world) awaitLeader(ctx context.Context) (*life, error) {
	for {
		if l := w.leader(); l != nil {
			command := fmt.Sprintf("barrier-%d", w.barriers.Add(1))
			applied := l.fsm.await(command)
			l.raft.Apply([]byte(command), time.Second)
			t := time.NewTimer(2 * time.Second)
			select {
			case <-applied:
				t.Stop()
				return l, nil
			case <-l.dead:
			case <-t.C:
			case <-ctx.Done():
			}
			t.Stop()
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return nil, fmt.Errorf("no leader: %w", err)
		}
	}
}

// pause lets time pass in a simulation.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// servers makes a configuration of voters.
func servers(names ...string) hraft.Configuration {
	var c hraft.Configuration
	for _, n := range names {
		c.Servers = append(c.Servers, hraft.Server{ID: nodeID(n), Address: hraft.ServerAddress(logicalAddress(n))})
	}
	return c
}

// lines shortens a sequence for a message.
func lines(seq []string) string {
	if len(seq) > 12 {
		seq = append(append([]string{fmt.Sprintf("… %d …", len(seq)-12)}, seq[len(seq)-12:]...), "")
	}
	return strings.Join(seq, " ")
}
