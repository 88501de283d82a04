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

	// work is held while a segment is prepared, by the keeper or by a committer that cannot wait for it.
	work sync.Mutex

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
		err := k.prepareNext(false)
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
	steps := []func() (bool, error){
		k.recycle,
		k.fillPool,
		k.rewrite,
	}
	for _, step := range steps {
		if k.w.Err() != nil {
			return false
		}
		later, err := step()
		again = again || later
		switch {
		case errors.Is(err, syscall.ENOSPC):
			k.mu.Lock()
			if !k.full {
				k.full = true
				k.w.log.Warn("disk full: no segment prepared", "dir", k.w.opts.Dir)
			}
			k.mu.Unlock()
			again = true
		case err != nil && !errors.Is(err, errStopped):
			_ = k.w.fail(err)
			return false
		}
	}
	return again
}

// errStopped ends background work because the log closes.
var errStopped = errors.New("stopped")

// recycle gives freed segments that nobody reads a name in the pool, or deletes them if there are enough. Nothing
// needs to be synced here: a freed segment that a power loss brings back is known to be unneeded by the state record
// that freed it, and one that is reused is renamed again and synced before it is written.
func (k *keeper) recycle() (again bool, err error) {
	k.mu.Lock()
	freed := k.freed
	k.freed = nil
	k.mu.Unlock()
	var pinned []*segment
	defer func() {
		k.mu.Lock()
		k.freed = append(k.freed, pinned...)
		k.mu.Unlock()
	}()
	for i, seg := range freed {
		if seg.file != nil {
			if !seg.refs.CompareAndSwap(1, 0) {
				pinned = append(pinned, seg)
				continue
			}
			_ = seg.file.Close()
		}
		k.mu.Lock()
		keep := len(k.pool) < k.w.opts.Prefill+poolSpare && (seg.size == 0 || seg.size == k.w.opts.SegmentSize)
		name := k.w.path(poolName(k.poolSeq))
		k.poolSeq++
		k.mu.Unlock()
		if !keep {
			if err := k.w.fs.Remove(seg.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				pinned = append(pinned, freed[i+1:]...)
				return false, fmt.Errorf("remove %s: %w", seg.path, err)
			}
			continue
		}
		if err := k.w.fs.Rename(seg.path, name); err != nil {
			pinned = append(pinned, freed[i+1:]...)
			return false, fmt.Errorf("recycle %s: %w", seg.path, err)
		}
		k.mu.Lock()
		k.pool = append(k.pool, name)
		k.mu.Unlock()
	}
	return len(pinned) > 0, nil
}

// prepareNext makes the file of the wanted segment, unless that stands ready: from the pool, or a new one. Its name is
// durable before anything is written to it. In the background it gives up when the log closes.
func (k *keeper) prepareNext(background bool) error {
	w := k.w
	k.work.Lock()
	defer k.work.Unlock()
	k.mu.Lock()
	id := k.wanted
	if k.nextID == id {
		k.mu.Unlock()
		return nil
	}
	var from string
	if n := len(k.pool); n > 0 {
		from = k.pool[n-1]
		k.pool = k.pool[:n-1]
	}
	k.mu.Unlock()
	if from == "" {
		var err error
		if from, err = k.fill(background, w.opts.SegmentSize); err != nil {
			return err
		}
	}
	to := w.path(segmentName(id))
	if err := w.fs.Rename(from, to); err != nil {
		return fmt.Errorf("name segment %d: %w", id, err)
	}
	if err := w.fs.SyncDir(w.opts.Dir); err != nil {
		return fmt.Errorf("sync %s: %w", w.opts.Dir, err)
	}
	f, err := w.fs.Open(to, w.mode)
	if err != nil {
		return fmt.Errorf("open segment %d: %w", id, err)
	}
	k.mu.Lock()
	k.next, k.nextID, k.full = f, id, false
	k.cond.Broadcast()
	k.mu.Unlock()
	return nil
}

// fillPool makes sure that the next segment is prepared, and that the pool holds as many as asked for.
func (k *keeper) fillPool() (bool, error) {
	for {
		// The committer may have taken the prepared segment while the last one was being filled.
		if err := k.prepareNext(true); err != nil {
			return false, err
		}
		k.mu.Lock()
		lacking := len(k.pool) < k.w.opts.Prefill
		name := k.w.path(poolName(k.poolSeq))
		k.poolSeq++
		k.mu.Unlock()
		if !lacking {
			return false, nil
		}
		temp, err := k.fill(true, k.w.opts.SegmentSize+k.w.opts.Reserve)
		if err != nil {
			return false, err
		}
		if err := k.w.fs.Rename(temp, name); err != nil {
			return false, fmt.Errorf("name a pool segment: %w", err)
		}
		k.mu.Lock()
		k.pool = append(k.pool, name)
		k.full = false
		k.mu.Unlock()
	}
}

// fill makes a segment file of real, synced zeros under a temporary name and returns that. Space that is merely
// allocated would make each later sync of the log wait for the file system's journal. With less than room bytes free it
// does not even begin: trying would take the last space from everybody else.
func (k *keeper) fill(background bool, room int64) (string, error) {
	w := k.w
	if free, err := w.fs.Free(w.opts.Dir); err != nil {
		return "", fmt.Errorf("free space: %w", err)
	} else if free < room {
		return "", fmt.Errorf("create a segment with %d bytes free: %w", free, syscall.ENOSPC)
	}
	k.mu.Lock()
	name := w.path(fmt.Sprintf("%s%08x", tempPrefix, k.tempSeq))
	k.tempSeq++
	k.mu.Unlock()
	f, err := w.fs.Create(name, disk.Buffered)
	if err != nil {
		return "", fmt.Errorf("create a segment: %w", err)
	}
	if err := k.fillFile(f, background); err != nil {
		_ = f.Close()
		if rerr := w.fs.Remove(name); rerr != nil && !errors.Is(err, errStopped) {
			return "", fmt.Errorf("fill a segment: %w", errors.Join(err, rerr))
		}
		return "", fmt.Errorf("fill a segment: %w", err)
	}
	if err := f.Close(); err != nil {
		return "", fmt.Errorf("close a filled segment: %w", err)
	}
	return name, nil
}

func (k *keeper) fillFile(f disk.File, background bool) error {
	w := k.w
	zeros := disk.Aligned(int(min(fillChunk, w.opts.SegmentSize)))
	syncs := w.syncs.Load()
	for off := int64(0); off < w.opts.SegmentSize; {
		n := min(int64(len(zeros)), w.opts.SegmentSize-off)
		if _, err := f.WriteAt(zeros[:n], off); err != nil {
			return err
		}
		off += n
		if off%fillSync == 0 || off == w.opts.SegmentSize {
			if err := f.Sync(); err != nil {
				return err
			}
		}
		if !background || !k.started {
			continue
		}
		if !k.running() {
			return errStopped
		}
		k.mu.Lock()
		hurry := k.waiting
		k.mu.Unlock()
		if now := w.syncs.Load(); now != syncs && !hurry {
			syncs = now
			select {
			case <-time.After(fillPause):
			case <-w.stop:
				return errStopped
			}
		}
	}
	return nil
}

// rewrite moves the entries that are left in the oldest segment to the tail, when they are few and the log has
// become long: a shard on which nothing happens must not keep all segments since then. The old copies stay valid
// until the new ones are durable.
func (k *keeper) rewrite() (bool, error) {
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
		return false, nil
	}
	front := w.segs[0]
	// Once a batch of the segment after it is durable, all of it is.
	if front.live == 0 || front.liveBytes > w.opts.SegmentSize/rewriteShare || w.segs[1].synced.Load() == 0 {
		w.mu.Unlock()
		return false, nil
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
			return false, err
		}
		h := recordHeader{
			payloadSum: payloadSum(e.Data, e.Extensions), dataLen: uint32(len(e.Data)), auxLen: uint32(len(e.Extensions)),
			typ: recordRewrite, entryType: e.Type, shard: it.shard.id, index: it.index, term: e.Term,
			appendedAt: unixNano(e.AppendedAt),
		}
		w.mu.Lock()
		if err := w.usable(); err != nil {
			w.mu.Unlock()
			return false, nil //nolint:nilerr // closing or poisoned: there is nothing left to do
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
	return false, nil
}

// close closes the prepared segment. The keeper has stopped.
func (k *keeper) close() {
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
