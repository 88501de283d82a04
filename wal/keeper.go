package wal

import (
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"syscall"
	"time"

	"tercet.dev/tercet/wal/disk"
)

const (
	// fillChunk is how much of a new segment is written at a time, fillPause how long the keeper then steps aside while
	// the log is busy: 50 MB/s, unless the committer waits for the segment.
	fillChunk = 256 << 10
	fillPause = 5 * time.Millisecond
	// fillSync is how much is written between two syncs, so that no sync of the log queues behind all of it.
	fillSync = 1 << 20
	// keeperRetry is how long the keeper waits when the disk is full or a freed segment is still being read.
	keeperRetry = 100 * time.Millisecond
	// poolSpare is how many freed segments beyond Prefill are kept for reuse.
	poolSpare = 2
	// rewriteAfter is how many segments the log may consist of before the oldest is emptied by moving its entries,
	// rewriteShare the share of a segment, as a divisor, that they may take for that.
	rewriteAfter = 4
	rewriteShare = 4
)

// keeper prepares segments ahead of the committer, recycles freed ones, and moves the last entries out of old ones.
// All of that happens in its own goroutine; in a stepped log, in pass.
type keeper struct {
	w *WAL

	// work is held for each step of preparing segments, by the keeper or by a committer that cannot wait for it.
	work sync.Mutex
	// filling is the new segment being filled, nil when there is none. Guarded by work.
	filling *filling
	zeros   []byte // what is written; only as long as something is being filled

	mu   sync.Mutex
	cond *sync.Cond // signalled when next was prepared, and when the log fails or stops
	// next is the prepared segment file, nextID its number, 0 when none is prepared. wanted is the number to prepare.
	next    disk.File
	nextID  uint64
	wanted  uint64
	waiting bool // the committer is in take
	full    bool // the disk was full at the last try
	pool    []string
	poolSeq uint64
	tempSeq uint64
	// freed are segments to recycle once nobody reads them.
	freed []*segment

	kick chan struct{}
	// started is set before the goroutine starts; without it, whoever needs something does it himself.
	started bool
}

// filling is a segment file on its way into the pool.
type filling struct {
	file disk.File
	name string
	off  int64
}

func (k *keeper) init(w *WAL) {
	k.w = w
	k.cond = sync.NewCond(&k.mu)
	k.kick = make(chan struct{}, 1)
}

// wake makes the keeper look whether there is something to do.
func (k *keeper) wake() {
	k.mu.Lock()
	k.cond.Broadcast()
	k.mu.Unlock()
	k.poke()
}

func (k *keeper) poke() {
	select {
	case k.kick <- struct{}{}:
	default:
	}
}

func (k *keeper) stats() (n int, bytes int64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	n = len(k.pool)
	if k.next != nil {
		n++
	}
	return n, int64(n) * k.w.opts.SegmentSize
}

// addPool takes a file found at start into the pool, if its size is right. Called before the keeper runs.
func (k *keeper) addPool(path string) {
	f, err := k.w.fs.Open(path, disk.ReadOnly)
	if err == nil {
		var size int64
		size, err = f.Size()
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err == nil && size == k.w.opts.SegmentSize {
			k.pool = append(k.pool, path)
			return
		}
	}
	k.w.log.Debug("pool file unusable: removed", "file", path, "error", err)
	_ = k.w.fs.Remove(path)
}

// freePath recycles a file that is no part of the log.
func (k *keeper) freePath(path string) {
	k.mu.Lock()
	k.freed = append(k.freed, &segment{path: path})
	k.mu.Unlock()
}

// free recycles segments that are no longer part of the log, once nobody reads them.
func (k *keeper) free(segs []*segment) {
	k.w.chunks.drop(segs)
	k.mu.Lock()
	k.freed = append(k.freed, segs...)
	k.mu.Unlock()
	k.wake()
}

// take hands the file of a segment to the committer, which waits for it only if the keeper has fallen behind.
func (k *keeper) take(seg *segment) (disk.File, error) {
	w := k.w
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.wanted != seg.id {
		return nil, fmt.Errorf("segment %d follows, not %d", k.wanted, seg.id)
	}
	if k.nextID != seg.id {
		if k.started {
			w.rotationWaits.Add(1)
		}
		k.waiting = true
		defer func() { k.waiting = false }()
	}
	for k.nextID != seg.id {
		if err := w.Err(); err != nil {
			return nil, err
		}
		if k.running() {
			k.poke()
			k.cond.Wait()
			continue
		}
		k.mu.Unlock()
		k.work.Lock()
		_, err := k.advance()
		k.work.Unlock()
		k.mu.Lock()
		if err != nil {
			return nil, err
		}
	}
	f := k.next
	k.next, k.nextID = nil, 0
	k.wanted = seg.id + 1
	k.poke()
	return f, nil
}

// running reports whether the keeper's goroutine does the work.
func (k *keeper) running() bool {
	if !k.started {
		return false
	}
	select {
	case <-k.w.stop:
		return false
	default:
		return true
	}
}

// run does the keeper's work until the log stops.
func (k *keeper) run() {
	defer k.w.done.Done()
	retry := time.NewTimer(time.Hour)
	retry.Stop()
	defer retry.Stop()
	for {
		again := k.pass()
		if k.w.Err() != nil {
			<-k.w.stop
			return
		}
		if again {
			retry.Reset(keeperRetry)
		}
		select {
		case <-k.kick:
		case <-retry.C:
		case <-k.w.stop:
			return
		}
		retry.Stop()
	}
}

// pass does all there is to do. It reports whether something has to be tried again later. Errors other than a full
// disk poison the log.
func (k *keeper) pass() (again bool) {
	w := k.w
	for w.Err() == nil {
		k.work.Lock()
		syncs := w.syncs.Load()
		more, err := k.advance()
		k.work.Unlock()
		if rerr := k.rewrite(); err == nil {
			err = rerr
		}
		k.mu.Lock()
		full := errors.Is(err, syscall.ENOSPC)
		if full && !k.full {
			w.log.Warn("disk full: no segment prepared", "dir", w.opts.Dir)
		}
		k.full = full
		hurry := k.waiting
		again = full || len(k.freed) > 0
		k.mu.Unlock()
		switch {
		case full:
			return true
		case err != nil:
			_ = w.fail(err)
			return false
		case !more:
			return again
		case !k.started:
			continue
		case !k.running():
			return false
		case hurry || w.syncs.Load() == syncs:
			continue
		}
		select {
		case <-time.After(fillPause):
		case <-k.kick:
		case <-w.stop:
		}
	}
	return false
}

// advance does one step of preparing segments: freed ones are recycled, the next one is prepared from the pool, and
// if the pool lacks some, a piece of a new one is filled. It reports whether there is more to fill. Called with work.
func (k *keeper) advance() (more bool, err error) {
	if err := k.recycle(); err != nil {
		return false, err
	}
	if err := k.prepare(); err != nil {
		return false, err
	}
	k.mu.Lock()
	ready := k.nextID == k.wanted
	lacking := len(k.pool) < k.w.opts.Prefill
	k.mu.Unlock()
	if ready && !lacking && k.filling == nil {
		return false, nil
	}
	if k.filling == nil {
		room := k.w.opts.SegmentSize
		if ready {
			room += k.w.opts.Reserve
		}
		if err := k.beginFilling(room); err != nil {
			return false, err
		}
	}
	if err := k.fill(); err != nil {
		return false, err
	}
	return true, k.prepare()
}

// recycle gives freed segments that nobody reads a name in the pool, or deletes them if there are enough. Nothing
// needs to be synced here: a freed segment that a power loss brings back is known to be unneeded by the state record
// that freed it, and one that is reused is renamed again and synced before it is written.
func (k *keeper) recycle() error {
	k.mu.Lock()
	freed := k.freed
	k.freed = nil
	k.mu.Unlock()
	var left []*segment
	defer func() {
		k.mu.Lock()
		k.freed = append(k.freed, left...)
		k.mu.Unlock()
	}()
	for i, seg := range freed {
		if seg.file != nil {
			if !seg.refs.CompareAndSwap(1, 0) {
				left = append(left, seg) // somebody reads it
				continue
			}
			_ = seg.file.Close()
			seg.file = nil
		}
		k.mu.Lock()
		keep := len(k.pool) < k.w.opts.Prefill+poolSpare && (seg.size == 0 || seg.size == k.w.opts.SegmentSize)
		k.mu.Unlock()
		if !keep {
			if err := k.w.fs.Remove(seg.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				left = append(left, freed[i+1:]...)
				return fmt.Errorf("remove %s: %w", seg.path, err)
			}
			continue
		}
		if err := k.pooled(seg.path); err != nil {
			left = append(left, freed[i+1:]...)
			return err
		}
	}
	return nil
}

// pooled gives a file a name in the pool.
func (k *keeper) pooled(path string) error {
	k.mu.Lock()
	name := k.w.path(poolName(k.poolSeq))
	k.poolSeq++
	k.mu.Unlock()
	if err := k.w.fs.Rename(path, name); err != nil {
		return fmt.Errorf("take %s into the pool: %w", path, err)
	}
	k.mu.Lock()
	k.pool = append(k.pool, name)
	k.mu.Unlock()
	return nil
}

// prepare makes the file of the wanted segment from the pool, unless it stands ready or the pool is empty. Its name is
// durable before anything is written to it. Called with work.
func (k *keeper) prepare() error {
	w := k.w
	k.mu.Lock()
	id, n := k.wanted, len(k.pool)
	if k.nextID == id || n == 0 {
		k.mu.Unlock()
		return nil
	}
	from := k.pool[n-1]
	k.mu.Unlock()
	to := w.path(segmentName(id))
	if err := w.fs.Rename(from, to); err != nil {
		return fmt.Errorf("name segment %d: %w", id, err)
	}
	k.mu.Lock()
	k.pool = k.pool[:n-1]
	k.mu.Unlock()
	if err := w.fs.SyncDir(w.opts.Dir); err != nil {
		return fmt.Errorf("sync %s: %w", w.opts.Dir, err)
	}
	f, err := w.fs.Open(to, w.mode)
	if err != nil {
		return fmt.Errorf("open segment %d: %w", id, err)
	}
	k.mu.Lock()
	k.next, k.nextID = f, id
	k.cond.Broadcast()
	k.mu.Unlock()
	return nil
}

// beginFilling begins a segment file under a temporary name. With less than room bytes free it does not: trying would
// take the last space from everybody else.
func (k *keeper) beginFilling(room int64) error {
	w := k.w
	if free, err := w.fs.Free(w.opts.Dir); err != nil {
		return fmt.Errorf("free space: %w", err)
	} else if free < room {
		return fmt.Errorf("begin a segment with %d bytes free: %w", free, syscall.ENOSPC)
	}
	name := w.path(fmt.Sprintf("%s%08x", tempPrefix, k.tempSeq))
	k.tempSeq++
	f, err := w.fs.Create(name, disk.Buffered)
	if err != nil {
		return fmt.Errorf("begin a segment: %w", err)
	}
	k.filling = &filling{file: f, name: name}
	return nil
}

// fill writes a piece of the segment being filled, and with the last one takes it into the pool. The zeros are real and
// synced: space that is merely allocated would make each later sync of the log wait for the file system's journal.
func (k *keeper) fill() error {
	size := k.w.opts.SegmentSize
	f := k.filling
	n := min(fillChunk, size-f.off)
	if k.zeros == nil {
		k.zeros = disk.Aligned(int(n))
	}
	_, err := f.file.WriteAt(k.zeros[:n], f.off)
	f.off += n
	if err == nil && (f.off%fillSync == 0 || f.off == size) {
		err = f.file.Sync()
	}
	if err != nil {
		k.dropFilling()
		return fmt.Errorf("fill a segment: %w", err)
	}
	if f.off < size {
		return nil
	}
	k.filling, k.zeros = nil, nil
	if err := f.file.Close(); err != nil {
		return fmt.Errorf("close a filled segment: %w", err)
	}
	return k.pooled(f.name)
}

// dropFilling gives up on the segment being filled. What cannot be removed is removed at the next start.
func (k *keeper) dropFilling() {
	if f := k.filling; f != nil {
		k.filling, k.zeros = nil, nil
		_ = f.file.Close()
		_ = k.w.fs.Remove(f.name)
	}
}

// rewrite moves the entries that are left in the oldest segment to the tail, when they are few and the log has
// become long: a shard on which nothing happens must not keep all segments since then. The old copies stay valid
// until the new ones are durable.
func (k *keeper) rewrite() error {
	w := k.w
	type item struct {
		shard *Shard
		index uint64
		loc   location
	}
	var items []item
	w.mu.Lock()
	// Entries on their way would be found again. They are not waited for: the committer may need the keeper first.
	if len(w.segs) < rewriteAfter || w.moving > 0 || w.usable() != nil {
		w.mu.Unlock()
		return nil
	}
	front := w.segs[0]
	// Once a batch of the segment after it is durable, all of it is.
	if front.live == 0 || front.liveBytes > w.opts.SegmentSize/rewriteShare || w.segs[1].synced.Load() == 0 {
		w.mu.Unlock()
		return nil
	}
	for _, s := range w.order {
		for i := range s.locs.len() {
			if loc := *s.locs.at(i); loc.seg == front {
				items = append(items, item{s, s.first + uint64(i), loc})
			}
		}
	}
	w.mu.Unlock()
	w.log.Debug("moving entries out of an old segment", "segment", front.id, "entries", len(items))
	for _, it := range items {
		var e Entry
		switch err := it.shard.Get(it.index, &e); {
		case errors.Is(err, ErrNotFound):
			continue // truncated meanwhile
		case err != nil:
			return err
		}
		h := recordHeader{
			payloadSum: payloadSum(e.Data, e.Extensions), dataLen: uint32(len(e.Data)), auxLen: uint32(len(e.Extensions)),
			typ: recordRewrite, entryType: e.Type, shard: it.shard.id, index: it.index, term: e.Term,
			appendedAt: unixNano(e.AppendedAt),
		}
		w.mu.Lock()
		if err := w.usable(); err != nil {
			w.mu.Unlock()
			return nil //nolint:nilerr // closing or poisoned: there is nothing left to do
		}
		s := it.shard
		if it.index >= s.first && it.index < s.next && *s.locs.at(int(it.index - s.first)) == it.loc {
			w.reserve(h.size())
			to, _ := w.put(h, e.Data, e.Extensions)
			w.cur.moves = append(w.cur.moves, move{s, it.index, it.loc, to})
			w.moving++
		}
		w.mu.Unlock()
	}
	w.signal()
	return nil
}

// close closes the prepared segment and drops a half-filled one. The keeper has stopped.
func (k *keeper) close() {
	k.work.Lock()
	k.dropFilling()
	k.work.Unlock()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.next != nil {
		_ = k.next.Close()
		k.next, k.nextID = nil, 0
	}
	for _, seg := range k.freed {
		if seg.file != nil {
			seg.unpin()
		}
	}
	k.freed = nil
}
