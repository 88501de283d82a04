package wal

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/wal/disk"
)

// LSN is a position in the stream of everything that was written since the log was opened. Positions rise; they mean
// nothing to another life of the log.
type LSN uint64

// DirectMode says whether segments are written past the page cache.
type DirectMode uint8

const (
	// Auto uses direct I/O where it works and falls back to buffered writes and fdatasync.
	Auto DirectMode = iota
	// On insists on direct I/O; Open fails where it does not work.
	On
	// Off writes through the page cache.
	Off
)

// Defaults and bounds of the options.
const (
	// SegmentSizeDefault is the size of a segment file. Each start begins a segment, and the prepared next one and the
	// pool stand beside it, so that a node at rest takes about four times this.
	SegmentSizeDefault = 64 << 20
	// SegmentSizeMin leaves room for a state record, a record of half a segment and a marker in each segment.
	SegmentSizeMin = 32 << 10
	// SegmentSizeMax keeps offsets within 32 bits.
	SegmentSizeMax = 1 << 30
	// PrefillDefault keeps two segments ready beyond the prepared one, as many as the log between two checkpoints.
	PrefillDefault = 2
	// RingBytesDefault keeps in memory what replication and apply have not read yet, unless a follower lags.
	RingBytesDefault = 64 << 20
	// MarkerDelayDefault is how long nothing must be written until a marker records the synced offset.
	MarkerDelayDefault = 5 * time.Millisecond
)

// Options configure a log. Only Dir is required.
type Options struct {
	// Dir is the log's directory; it is made if it is missing, and locked while the log is open.
	Dir string
	// FS is the file system, disk.OS() by default.
	FS disk.FS
	// SegmentSize is the size of new segment files, a multiple of 4096; segments of other sizes are read all the same.
	SegmentSize int64
	// Prefill is how many segments are kept filled in the pool, beside the one that is prepared to be next.
	// Negative means none.
	Prefill int
	// Direct chooses direct I/O.
	Direct DirectMode
	// RingBytes bounds the entries kept in memory over all shards. Entries that are not yet durable are kept beyond it.
	RingBytes int64
	// Reserve is how many bytes must stay free on the file system; see Space. The log adds what its pool still needs.
	Reserve int64
	// Logger receives state changes; nil discards them.
	Logger hclog.Logger
	// OnFatal is called once, in a goroutine of its own, when a write or sync failed or damage was met while reading. The
	// log is poisoned by then.
	OnFatal func(error)
	// ObserveSync, if not nil, is called after each sync of a batch with its duration, write included, and its bytes.
	ObserveSync func(d time.Duration, bytes int)
	// MarkerDelay overrides MarkerDelayDefault; negative writes no markers.
	MarkerDelay time.Duration

	// stepped leaves all work to the caller's goroutine, so that a seed determines every operation: WaitDurable
	// commits, and what the keeper does happens after commits. For the crash tests of this package.
	stepped bool
	// stream fixes the stream id of a new log, for golden files.
	stream uint64
}

func (o *Options) withDefaults() error {
	if o.Dir == "" {
		return errors.New("wal: no directory given")
	}
	if o.FS == nil {
		o.FS = disk.OS()
	}
	if o.SegmentSize == 0 {
		o.SegmentSize = SegmentSizeDefault
	}
	if o.SegmentSize < SegmentSizeMin || o.SegmentSize > SegmentSizeMax || o.SegmentSize%blockSize != 0 {
		return fmt.Errorf("wal: segment size %d is not a multiple of %d from %d to %d",
			o.SegmentSize, blockSize, SegmentSizeMin, SegmentSizeMax)
	}
	if o.Prefill == 0 {
		o.Prefill = PrefillDefault
	}
	o.Prefill = max(o.Prefill, 0)
	if o.RingBytes == 0 {
		o.RingBytes = RingBytesDefault
	}
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	if o.MarkerDelay == 0 {
		o.MarkerDelay = MarkerDelayDefault
	}
	if o.stream == 0 {
		var b [8]byte
		_, _ = rand.Read(b[:]) // never fails, by its contract
		o.stream = binary.LittleEndian.Uint64(b[:]) | 1
	}
	return nil
}

// WAL is an open log. All methods may be called by several goroutines at once.
//
// Lock order: mu, then one Shard.mu at a time; waitMu and keeper.mu are leaves.
type WAL struct {
	opts   Options
	fs     disk.FS
	log    hclog.Logger
	mode   disk.Mode
	lock   io.Closer
	stream uint64 // of this log directory, in every batch

	// mu orders the stream: whatever is appended is appended under it.
	mu     sync.Mutex
	shards map[uint16]*Shard
	order  []*Shard // by id
	// cur is the batch being filled, nil when nothing is buffered. sealed are full batches before it, in order.
	cur    *batch
	sealed fifo[*batch]
	spare  [][]byte // buffers to reuse
	// tail is where the next batch goes: the segment, the offset in it, and the LSN.
	tail struct {
		seg  *segment
		off  int64
		lsn  LSN
		prev int64 // offset of the last batch in seg
	}
	// segs are the segments the log needs, oldest first; the last one is tail.seg.
	segs []*segment
	// oldest is the lowest segment the log needs according to the newest state record that was appended.
	oldest uint64
	// stateBytes is the size of a state record's payload.
	stateBytes int
	ring       ring
	// moving counts entries in buffered batches that are on their way out of an old segment.
	moving    int
	markerDue bool
	closing   bool

	written atomic.Uint64
	durable atomic.Uint64
	// oldestUnsynced is when the oldest bytes that are not durable were appended, in nanoseconds since epoch; 0: none.
	oldestUnsynced atomic.Int64
	epoch          time.Time

	// waitMu guards notify, which is closed and replaced whenever durable rises and when the log fails or closes.
	waitMu sync.Mutex
	notify chan struct{}
	fatal  atomic.Pointer[fatalError]
	closed atomic.Bool

	// commitMu is held by whoever writes a batch: the committer, or in stepped mode the caller.
	commitMu sync.Mutex
	kick     chan struct{}
	stop     chan struct{}
	done     sync.WaitGroup
	keeper   keeper
	chunks   chunkCache
	recovery Recovery

	syncs, syncedBytes, rotations, rotationWaits, markers, diskReads, freed, rewritten atomic.Int64
}

type fatalError struct{ err error }

// Recovery says what Open found.
type Recovery struct {
	// Segments and Records are how many were read.
	Segments, Records int
	// Bytes is how many bytes of batches were read.
	Bytes int64
	// TornFile and TornOffset say where a torn tail was cut; TornFile is empty when there was none.
	TornFile   string
	TornOffset int64
	// Duration is how long it took.
	Duration time.Duration
}

// Open opens the log in a directory, or makes a new one there, and recovers what it holds. Everything it then
// reports is durable. Damage that is not a torn tail makes it fail with a *CorruptionError, and nothing is changed.
func Open(o Options) (*WAL, error) {
	if err := o.withDefaults(); err != nil {
		return nil, err
	}
	w := &WAL{
		opts: o, fs: o.FS, log: o.Logger, shards: make(map[uint16]*Shard),
		epoch: time.Now(), notify: make(chan struct{}), kick: make(chan struct{}, 1), stop: make(chan struct{}),
	}
	w.ring.max = o.RingBytes
	w.keeper.init(w)
	if err := w.fs.MkdirAll(o.Dir); err != nil {
		return nil, fmt.Errorf("wal: make %s: %w", o.Dir, err)
	}
	lock, err := w.fs.Lock(w.path(lockName))
	if err != nil {
		return nil, fmt.Errorf("wal: lock %s: %w", o.Dir, err)
	}
	w.lock = lock
	if err := w.open(); err != nil {
		for _, seg := range w.segs {
			seg.unpin()
		}
		return nil, errors.Join(err, lock.Close())
	}
	if !o.stepped {
		w.keeper.started = true
		w.done.Add(2)
		go w.commitLoop()
		go w.keeper.run()
	}
	return w, nil
}

func (w *WAL) open() error {
	w.mode = disk.Buffered
	if w.opts.Direct != Off {
		switch {
		case w.fs.DirectWorks(w.opts.Dir):
			w.mode = disk.Direct
		case w.opts.Direct == On:
			return fmt.Errorf("wal: direct I/O does not work in %s", w.opts.Dir)
		}
	}
	start := time.Now()
	found, err := w.recover()
	if err != nil {
		return err
	}
	if err := w.begin(found); err != nil {
		return fmt.Errorf("wal: begin a segment: %w", err)
	}
	w.recovery.Duration = time.Since(start)
	r := &w.recovery
	if r.TornFile != "" {
		w.log.Warn("log ends in a torn write: cut there", "file", r.TornFile, "offset", r.TornOffset)
	}
	w.log.Info("log opened", "mode", w.mode, "segments", r.Segments, "records", r.Records, "bytes", r.Bytes, "duration", r.Duration)
	return nil
}

// Shard returns the shard's log, which begins to exist with its first use.
func (w *WAL) Shard(id uint16) *Shard {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.shardLocked(id)
}

func (w *WAL) shardLocked(id uint16) *Shard {
	s := w.shards[id]
	if s == nil {
		s = &Shard{w: w, id: id, stable: make(map[string][]byte)}
		w.shards[id] = s
		w.order = append(w.order, s)
		sort.Slice(w.order, func(i, j int) bool { return w.order[i].id < w.order[j].id })
		w.stateBytes = w.state(0).size()
	}
	return s
}

// Recovery says what Open found.
func (w *WAL) Recovery() Recovery { return w.recovery }

// Written returns the position after everything appended so far.
func (w *WAL) Written() LSN { return LSN(w.written.Load()) }

// Durable returns the position up to which everything is on disk.
func (w *WAL) Durable() LSN { return LSN(w.durable.Load()) }

// WaitDurable waits until everything before lsn is on disk. It returns ErrCanceled when cancel is closed first (a nil
// cancel never is), ErrClosed when the log is closed first, and an error matching ErrPoisoned when writing failed.
func (w *WAL) WaitDurable(lsn LSN, cancel <-chan struct{}) error {
	for {
		if w.Durable() >= lsn {
			return nil
		}
		if w.opts.stepped {
			if did, err := w.commitOnce(false); err != nil {
				return err
			} else if !did && w.Durable() < lsn {
				return fmt.Errorf("wal: nothing left to write before position %d", lsn)
			}
			w.keeper.pass()
			continue
		}
		w.waitMu.Lock()
		ch := w.notify
		w.waitMu.Unlock()
		// Look again: what happened before notify was taken would otherwise be missed.
		if w.Durable() >= lsn {
			return nil
		}
		if err := w.Err(); err != nil {
			return err
		}
		if w.closed.Load() {
			return ErrClosed
		}
		select {
		case <-ch:
		case <-cancel:
			return ErrCanceled
		}
	}
}

// WaitDurableContext is WaitDurable for callers with a context; it returns the context's error when that ends first.
func (w *WAL) WaitDurableContext(ctx context.Context, lsn LSN) error {
	err := w.WaitDurable(lsn, ctx.Done())
	if errors.Is(err, ErrCanceled) {
		return context.Cause(ctx)
	}
	return err
}

// wake lets all waiters look again.
func (w *WAL) wake() {
	w.waitMu.Lock()
	close(w.notify)
	w.notify = make(chan struct{})
	w.waitMu.Unlock()
}

// Unsynced returns how many bytes are appended and not yet durable, padding left out where it is not known yet, and
// for how long the oldest of them have been waiting.
func (w *WAL) Unsynced() (bytes int64, oldest time.Duration) {
	at := w.oldestUnsynced.Load()
	d := w.durable.Load()
	if n := w.written.Load(); n > d {
		bytes = int64(n - d)
	}
	if at != 0 && bytes > 0 {
		oldest = max(time.Since(w.epoch)-time.Duration(at), 0)
	}
	return bytes, oldest
}

// Err returns the error that poisoned the log, wrapped to match ErrPoisoned, or nil.
func (w *WAL) Err() error {
	if f := w.fatal.Load(); f != nil {
		return f.err
	}
	return nil
}

// fail poisons the log. The first error counts; the others are its consequences.
func (w *WAL) fail(cause error) error {
	f := &fatalError{fmt.Errorf("%w: %w", ErrPoisoned, cause)}
	if !w.fatal.CompareAndSwap(nil, f) {
		return w.Err()
	}
	w.log.Error("log poisoned: this node must stop", "error", cause)
	w.wake()
	w.keeper.wake()
	switch {
	case w.opts.OnFatal == nil:
	case w.opts.stepped:
		w.opts.OnFatal(f.err)
	default:
		// Its own goroutine: the owner may want to wait for what is waiting for this one, Close included.
		go w.opts.OnFatal(f.err)
	}
	return f.err
}

// usable reports why nothing may be appended.
func (w *WAL) usable() error {
	if w.closing {
		return ErrClosed
	}
	return w.Err()
}

// Stats is a view of the log for metrics and status pages.
type Stats struct {
	// Direct says whether direct I/O is in use.
	Direct bool
	// Segments are needed by the log; Pool stand ready, the prepared one included. Bytes is what all of them take.
	Segments, Pool int
	Bytes          int64
	// Syncs and SyncedBytes count batches and their padded bytes since Open; Markers those that held nothing else.
	Syncs, SyncedBytes, Markers int64
	// Rotations counts segments begun, RotationWaits how often the next one was not ready.
	Rotations, RotationWaits int64
	// Freed counts segments that the log no longer needed, Rewritten the entries moved out of old segments for that.
	Freed, Rewritten int64
	// RingBytes is what the recent entries in memory take; DiskReads counts reads of entries from disk.
	RingBytes, DiskReads int64
}

// Stats returns a view of the log.
func (w *WAL) Stats() Stats {
	pool, poolBytes := w.keeper.stats()
	s := Stats{
		Direct: w.mode == disk.Direct, Pool: pool, Bytes: poolBytes,
		Syncs: w.syncs.Load(), SyncedBytes: w.syncedBytes.Load(), Markers: w.markers.Load(),
		Rotations: w.rotations.Load(), RotationWaits: w.rotationWaits.Load(), DiskReads: w.diskReads.Load(),
		Freed: w.freed.Load(), Rewritten: w.rewritten.Load(),
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s.Segments = len(w.segs)
	for _, seg := range w.segs {
		s.Bytes += seg.size
	}
	s.RingBytes = w.ring.bytes
	return s
}

// Space is the room on the file system of the log.
type Space struct {
	// Free is what may still be allocated, Reserve what must stay free so that the log is never the one to run out.
	Free, Reserve int64
}

// Low reports that less than the reserve is free: nothing should be proposed any more.
func (s Space) Low() bool { return s.Free < s.Reserve }

// Space returns the room on the file system, and the reserve: the option's, and the prefilled segments that the pool
// still lacks.
func (w *WAL) Space() (Space, error) {
	free, err := w.fs.Free(w.opts.Dir)
	if err != nil {
		return Space{}, fmt.Errorf("wal: free space of %s: %w", w.opts.Dir, err)
	}
	pool, _ := w.keeper.stats()
	lacking := max(w.opts.Prefill+1-pool, 0)
	return Space{Free: free, Reserve: w.opts.Reserve + int64(lacking)*w.opts.SegmentSize}, nil
}

// Close writes what is buffered, a marker behind it, and closes the files. Waiters get ErrClosed unless what they wait
// for has become durable. It returns the poisoning error of a poisoned log.
func (w *WAL) Close() error {
	w.mu.Lock()
	if w.closing {
		w.mu.Unlock()
		return ErrClosed
	}
	w.closing = true
	w.mu.Unlock()
	if w.opts.stepped {
		w.flush()
	}
	close(w.stop)
	w.keeper.wake()
	w.done.Wait()
	w.closed.Store(true)
	w.wake()
	w.keeper.close()
	w.mu.Lock()
	segs := w.segs
	w.segs = nil
	w.mu.Unlock()
	for _, seg := range segs {
		seg.unpin()
	}
	return errors.Join(w.Err(), w.lock.Close())
}

// recordMax is the largest record that may be appended. Together with the bound on the state record it makes sure
// that any record fits into a fresh segment with its marker.
func (w *WAL) recordMax() int64 { return min(w.opts.SegmentSize/2, limits.WALRecordBytesMax) }

// stateMax is the largest payload of a state record.
func (w *WAL) stateMax() int { return int(min(w.opts.SegmentSize/8, limits.WALRecordBytesMax)) }
