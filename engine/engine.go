package engine

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/go-hclog"

	"tercet.dev/tercet/internal/limits"
)

// Options configures an Engine.
type Options struct {
	// Dir holds the generations of the store.
	Dir string
	// FS is the file system; nil is the operating system's.
	FS vfs.FS
	// Shard is this state machine's shard number.
	Shard uint16
	// CacheBytes bounds Pebble's block cache (default 64 MiB), MemTableBytes one of its memtables (32 MiB; up
	// to four exist while a flush is behind), RecentBytes the entries kept so that fresh messages are
	// delivered without reading (64 MiB; negative keeps none).
	CacheBytes, MemTableBytes, RecentBytes int64
	// CheckpointLogBytes and CheckpointDirtyBytes are where NeedsCheckpoint turns true (128 MiB, 32 MiB).
	CheckpointLogBytes, CheckpointDirtyBytes int64
	Logger                                   hclog.Logger
	// OnFatal is called when the store reports damage or a failed write in the background, with what it said.
	// From then on Apply, Checkpoint and Load return the error. It must not call back into the Engine. The
	// default does nothing more.
	OnFatal func(error)
	// Spawn runs a function beside its caller, to write files that nobody waits for. The default runs it at once.
	Spawn func(func())

	packBytes int64  // where a pack ends; for tests
	fatal     func() // called instead of panicking where Pebble cannot go on; for tests, must not return
}

func (o *Options) defaults() {
	if o.FS == nil {
		o.FS = vfs.Default
	}
	def := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	def(&o.CacheBytes, 64<<20)
	def(&o.MemTableBytes, 32<<20)
	def(&o.RecentBytes, 64<<20)
	def(&o.CheckpointLogBytes, 128<<20)
	def(&o.CheckpointDirtyBytes, 32<<20)
	def(&o.packBytes, packBytes)
	if o.Spawn == nil {
		o.Spawn = func(f func()) { f() }
	}
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
}

// Engine is the state machine of one shard: see DESIGN.md beside this file.
//
// Locks, in the order in which they are taken: cpMu, dbMu, mu.
type Engine struct {
	o    Options
	keys keyspace

	// cpMu serialises whatever moves the durable point or copies it: Checkpoint, Export, Install, Reopen.
	cpMu    sync.Mutex
	durable atomic.Pointer[state]
	gen     uint64 // the generation that is open
	// installed is the state CURRENT points to when an install has been committed and not reopened yet.
	installed *state
	swept     int64 // expired blocks up to this tick have been removed

	// dbMu is held for reading by whoever reads the store outside mu, and for writing while it is replaced.
	dbMu sync.RWMutex

	// mu guards everything below.
	mu sync.RWMutex
	db *pebble.DB

	state
	topics  map[string]*topic
	byInc   map[uint64]*topic
	intakes map[IntakeID]*intake
	// documents are the tables of configuration.
	documents        map[string]*documentTable
	removedDocuments []documentName
	// keyFilters are the buckets of idempotency keys; entryKeys are those of the entry being applied.
	keyFilters map[keyBucket]*keyFilter
	entryKeys  map[keyHash]keyRef
	// changes are the delayed messages that were cancelled or moved, moved orders those that were moved.
	changes        map[delayKey]*delayChange
	removedChanges []delayKey
	moved          []movedItem
	// catching are the topics whose flag of that name is set.
	catching map[uint64]bool
	// delayNext is no later than the first time at which a delayed message is due; 0 before that was looked up.
	delayNext int64
	// uploads are the large messages under way.
	uploads        map[uint64]*upload
	removedUploads []uint64
	deadParts      []deadParts
	// keptUploads are the large messages whose parts have to outlive them.
	keptUploads map[uint64]bool
	// removedTopics and removedGroups (topic, group) have rows that go with the next checkpoint.
	removedTopics []uint64
	removedGroups [][2]uint64
	freeGroups    []uint64
	slots         slotPool
	groups        []*group // all of them; the place is the group's number in due
	// removed lists rows of intakes that no longer exist.
	removedIntakes []IntakeID

	recent      []recentEntry
	recentHead  int
	recentBytes int64
	headers     headerCache
	payloads    payloadCache
	packs       *packs

	// What the entry being applied gathers.
	applying bool
	entry    []byte
	fx       *Effects
	pos      uint32
	open     []*topic
	heads    []recordHeadNote
	specials []special
	// deploymentNames is a cache.
	deploymentNames map[string]uint64
	staging         []*topic
	newKeys         []newKey
	newParts        []part
	newLarge        []largeEnd
	copied          int64    // bytes that the entry's COPYs took
	intake          IntakeID // of the command being applied
	scratch         []Delivery
	done            []doneNote
	touched         []*group
	advance         int64
	rowBuf          []byte

	due       timers // parked groups by the time at which something becomes deliverable
	tidyAt    int
	logBytes  atomic.Int64 // since the last checkpoint
	dirtRough atomic.Int64

	unsettledMax, valkeyMax int

	// scanMu guards the list of all keys that SCAN goes by, as of a version of the keyspace.
	scanMu      sync.Mutex
	scanList    []keyName
	scanVersion uint64

	// strings are the keys that hold no topic; expiries holds keys by the time at which they expire.
	strings        map[string]*stringKey
	stringBytes    int64
	removedStrings []uint64
	expiries       timers
	byExpiry       map[uint64]string // incarnation -> present name, of keys that expire
	failed         atomic.Pointer[failure]
	failure        chan struct{} // closed with failed

	// The negative controls of the crash tests break rule 16(a) with the one, (b) and (c) with the other.
	seeLaterRows bool
	beforeStore  func(*Engine) error
}

type failure struct{ err error }

// recordHeadNote is what apply notes of a message while it checks a publish.
type recordHeadNote struct {
	start, size uint32
	body        uint32
	retention   uint32
}

// fail notes the first fatal error; later calls of Apply, Checkpoint and Load return it.
func (e *Engine) fail(err error) {
	if e.failed.CompareAndSwap(nil, &failure{err}) {
		close(e.failure)
		if e.o.OnFatal != nil {
			e.o.OnFatal(err)
		}
	}
}

// Err returns what made the engine stop working, nil while it works.
func (e *Engine) Err() error {
	if f := e.failed.Load(); f != nil {
		return f.err
	}
	return nil
}

// Applied returns the index and term of the last applied entry.
func (e *Engine) Applied() (index, term uint64) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.index, e.term
}

// Stamp returns the clocks as of the last applied entry, virtual advances included.
func (e *Engine) Stamp() Stamp {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.stamp
}

// InSync returns the in-sync set.
func (e *Engine) InSync() InSync {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return InSync{Epoch: e.inSync.Epoch, Nodes: slices.Clone(e.inSync.Nodes)}
}

// ClusterID returns the cluster id, empty before Init.
func (e *Engine) ClusterID() string {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.clusterID
}

// Secret returns the cluster secret, nil before Init.
func (e *Engine) Secret() []byte {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return slices.Clone(e.secret)
}

// Level returns the replicated feature level.
func (e *Engine) Level() uint32 {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.level
}

// Members returns the membership of the last applied configuration.
func (e *Engine) Members() []Member {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return slices.Clone(e.members)
}

// Configuration returns the last applied configuration as it was encoded, and its index.
func (e *Engine) Configuration() (encoded []byte, index uint64) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return slices.Clone(e.configuration), e.configurationIndex
}

// Intake reports whether an intake is open.
func (e *Engine) Intake(id IntakeID) bool {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.intakes[id] != nil
}

// Durable returns the place of the durable checkpoint: the zero Meta before the first.
func (e *Engine) Durable() Meta {
	if s := e.durable.Load(); s != nil {
		return s.meta()
	}
	return Meta{}
}

// NeedsCheckpoint reports that enough log or changed state has gathered since the last checkpoint. Time is
// the caller's to watch.
func (e *Engine) NeedsCheckpoint() bool {
	return e.logBytes.Load() >= e.o.CheckpointLogBytes || e.dirtRough.Load() >= e.o.CheckpointDirtyBytes
}

// Metrics returns the store's own figures as Pebble keeps them, nil once it is closed.
func (e *Engine) Metrics() *pebble.Metrics {
	e.dbMu.RLock()
	defer e.dbMu.RUnlock()
	if e.db == nil {
		return nil
	}
	return e.db.Metrics()
}

func (e *Engine) resetMemory() {
	e.state = state{}
	e.topics = make(map[string]*topic)
	e.byInc = make(map[uint64]*topic)
	e.intakes = make(map[IntakeID]*intake)
	e.documents = make(map[string]*documentTable)
	e.groups, e.removedIntakes, e.removedDocuments = nil, nil, nil
	e.removedTopics, e.removedGroups, e.freeGroups = nil, nil, nil
	e.slots = slotPool{}
	e.changes, e.removedChanges, e.moved = make(map[delayKey]*delayChange), nil, nil
	e.keyFilters, e.entryKeys = make(map[keyBucket]*keyFilter), nil
	e.uploads, e.removedUploads, e.deadParts = make(map[uint64]*upload), nil, nil
	e.delayNext = never
	e.catching = make(map[uint64]bool)
	e.keptUploads = make(map[uint64]bool)
	e.recent, e.recentHead, e.recentBytes = nil, 0, 0
	e.due, e.tidyAt = nil, 0
	e.touched, e.open = nil, nil
	e.headers.reset()
	e.headers.limit = max(e.o.CacheBytes/8, 1<<20)
	e.payloads.reset(max(e.o.CacheBytes/2, 1<<20))
	e.logBytes.Store(0)
	e.dirtRough.Store(0)
	if e.unsettledMax == 0 {
		e.unsettledMax = limits.UnsettledPerGroupMax
	}
	if e.valkeyMax == 0 {
		e.valkeyMax = limits.UnsettledPerValkeyGroupMax
	}
	e.resetKeys()
}

// load reads the last checkpoint from the open store into memory.
func (e *Engine) load() error {
	e.resetMemory()
	var have bool
	err := e.scan(rowState, func(key, v []byte) (err error) {
		have = true
		e.state, err = parseState(v)
		return err
	})
	if err != nil {
		return err
	}
	if !have {
		e.durable.Store(nil)
		e.swept = 0
		return nil
	}
	err = e.scan(rowPack, func(key, v []byte) error {
		number, _ := keyPart(key, 0)
		return e.packs.load(number, v)
	})
	if err != nil {
		return err
	}
	err = e.scan(rowTopic, func(key, v []byte) error {
		inc, _ := keyPart(key, 0)
		t, err := parseTopic(inc, v)
		if err != nil {
			return err
		}
		e.topics[t.name], e.byInc[inc] = t, t
		if t.catching {
			e.catching[inc] = true
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = e.scan(rowGroup, func(key, v []byte) error {
		tinc, _ := keyPart(key, 0)
		ginc, _ := keyPart(key, 1)
		t := e.byInc[tinc]
		if t == nil {
			return fmt.Errorf("group %d of unknown topic %d: %w", ginc, tinc, errMalformed)
		}
		g, err := parseGroup(t, ginc, v)
		if err != nil {
			return err
		}
		e.addGroup(t, g)
		return nil
	})
	if err != nil {
		return err
	}
	if err := e.scan(rowMarks, e.loadMarks); err != nil {
		return err
	}
	if err := e.scan(rowConsumer, e.loadConsumer); err != nil {
		return err
	}
	if err := e.scan(rowString, e.loadString); err != nil {
		return err
	}
	err = e.scan(rowChunk, func(key, v []byte) error {
		tinc, _ := keyPart(key, 0)
		ginc, _ := keyPart(key, 1)
		no, _ := keyPart(key, 2)
		t := e.byInc[tinc]
		if t == nil || t.byInc[ginc] == nil {
			return fmt.Errorf("unsettled messages of unknown group %d: %w", ginc, errMalformed)
		}
		c, err := parseChunk(t.byInc[ginc], no, v)
		if err != nil {
			return err
		}
		return t.byInc[ginc].addChunk(no, c)
	})
	if err != nil {
		return err
	}
	for _, t := range e.byInc {
		e.expires(t.inc, t.name, t.expireAt)
	}
	for _, g := range e.groups {
		g.rebuild()
	}
	err = e.scan(rowIntake, func(key, v []byte) error {
		id, _ := keyPart(key, 0)
		in, err := parseIntake(IntakeID(id), v)
		if err != nil {
			return err
		}
		e.intakes[IntakeID(id)] = in
		return nil
	})
	if err != nil {
		return err
	}
	if err := e.scan(rowChange, e.loadChange); err != nil {
		return err
	}
	if err := e.loadKeys(); err != nil {
		return err
	}
	if err := e.scan(rowKept, e.loadKeptRow); err != nil {
		return err
	}
	e.delayNext = 0
	err = e.scan(rowUpload, func(key, v []byte) error {
		id, _ := keyPart(key, 0)
		u, err := parseUpload(id, v)
		e.uploads[id] = u
		return err
	})
	if err != nil {
		return err
	}
	if err := e.scan(rowDocument, e.loadDocument); err != nil {
		return err
	}
	e.swept = 0
	err = e.scan(rowFloor, func(key, v []byte) error {
		inc, _ := keyPart(key, 0)
		f, err := parseFloor(v)
		if err != nil {
			return err
		}
		if inc == 0 {
			e.swept = int64(f.offset)
		} else if t := e.byInc[inc]; t != nil {
			t.floor, t.gone = f, max(t.first, f.offset)
		}
		return nil
	})
	if err != nil {
		return err
	}
	s := e.cloneState()
	e.durable.Store(&s)
	return nil
}

func (e *Engine) cloneState() state {
	s := e.state
	s.secret = slices.Clone(s.secret)
	s.configuration = slices.Clone(s.configuration)
	s.members = slices.Clone(s.members)
	s.inSync.Nodes = slices.Clone(s.inSync.Nodes)
	return s
}

// addChunk puts a loaded chunk into the set.
func (g *group) addChunk(key uint64, c *chunk) error {
	c.key, g.chunks[key] = key, c
	g.newChunk(key)
	g.live += c.live
	for i := range c.slots {
		l := &c.slots[i]
		if !g.passed(key<<chunkShift|uint64(l.low), l.dep) {
			g.ahead++
		}
		if l.kept {
			g.keep(key<<chunkShift | uint64(l.low))
		}
		switch l.state {
		case leased:
			g.inflight++
		case parked:
			g.parkedCount++
		}
		if l.state == settledAhead {
			g.settled++
		}
		if l.consumer != 0 {
			c.who |= 1 << (l.consumer & 63)
			if owner := g.byNum[l.consumer]; owner != nil {
				owner.pending++
			} else {
				return fmt.Errorf("an entry of unknown consumer %d: %w", l.consumer, errMalformed)
			}
		}
	}
	return nil
}

// scan visits all rows of a kind.
func (e *Engine) scan(kind byte, visit func(key, value []byte) error) (err error) {
	defer e.damaged(&err)
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: e.keys.key(kind), UpperBound: keyspaceEnd(e.keys, kind)})
	if err != nil {
		return fmt.Errorf("engine: reading rows %c: %w", kind, err)
	}
	defer func() { _ = it.Close() }()
	for it.First(); it.Valid(); it.Next() {
		v, err := it.ValueAndErr()
		if err == nil {
			err = visit(it.Key(), v)
		}
		if err != nil {
			return fmt.Errorf("engine: row %x: %w", it.Key(), err)
		}
	}
	if err := it.Error(); err != nil {
		return fmt.Errorf("engine: reading rows %c: %w", kind, err)
	}
	return nil
}

// keyspaceEnd is behind all keys of a kind in a shard.
func keyspaceEnd(k keyspace, kind byte) []byte {
	return append(k.key(kind), 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
}
