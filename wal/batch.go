package wal

import (
	"sort"
	"time"

	"tercet.dev/tercet/wal/disk"
)

// batchBytes is the capacity of a batch's buffer; a larger record gets a buffer of its own size. Beyond 1 MiB a
// single write no longer gains throughput on the disks measured.
const batchBytes = 1 << 20

// sparesMax bounds the buffers kept for reuse.
const sparesMax = 8

// batch is what one write and one sync bring to disk: a header and records, padded to whole blocks. It is bound to a
// place in a segment from the start, since the checksums of its records cover that place. It is filled under WAL.mu
// and belongs to the committer from sealing on.
type batch struct {
	seg   *segment
	off   int64 // in the segment
	lsn   LSN   // of its first byte
	buf   []byte
	n     int64 // bytes used
	limit int64 // bytes that may be used
	count uint32
	flags uint32

	prevSeg, prevEnd uint64 // for the header

	// oldest, if not 0, is what the batch's newest state record says: older segments may go once it is durable.
	oldest uint64
	// began is when the first record was appended, in nanoseconds since WAL.epoch.
	began int64
	// moves are entries whose location changes once the batch is durable.
	moves []move
}

// move is a rewritten entry on its way to its new place.
type move struct {
	shard    *Shard
	index    uint64
	from, to location
}

// end is the LSN after the batch, padding included.
func (b *batch) end() LSN { return b.lsn + LSN(disk.AlignUp(b.n)) }

// reserve returns a batch with room for a record of n bytes, beginning a batch, and a segment if need be.
// Called with mu.
func (w *WAL) reserve(n int64) *batch {
	if b := w.cur; b != nil {
		if b.n+n <= b.limit {
			return b
		}
		w.seal()
	}
	// A segment keeps a block for the marker behind its last batch.
	if w.tail.off+disk.AlignUp(batchHeaderSize+n)+blockSize > w.opts.SegmentSize {
		w.rotate()
		if b := w.cur; b.n+n <= b.limit {
			return b
		}
		w.seal() // the record outgrows the buffer that holds the state record
	}
	w.cur = w.newBatch(n)
	return w.cur
}

// newBatch begins a batch at the tail with room for a record of n bytes. Called with mu.
func (w *WAL) newBatch(n int64) *batch {
	room := w.opts.SegmentSize - blockSize - w.tail.off
	capacity := min(max(batchBytes, disk.AlignUp(batchHeaderSize+n)), room)
	b := &batch{
		seg: w.tail.seg, off: w.tail.off, lsn: w.tail.lsn, n: batchHeaderSize, limit: capacity,
		buf: w.takeBuffer(int(capacity)), prevEnd: uint64(w.tail.prev), began: int64(time.Since(w.epoch)) + 1,
	}
	w.oldestUnsynced.CompareAndSwap(0, b.began)
	return b
}

// newMarker seals a batch without records of its own behind everything else. Called with mu; nothing is buffered.
func (w *WAL) newMarker() {
	w.cur = &batch{
		seg: w.tail.seg, off: w.tail.off, lsn: w.tail.lsn, n: batchHeaderSize, limit: blockSize, flags: flagMarker,
		buf: w.takeBuffer(blockSize), prevEnd: uint64(w.tail.prev), began: int64(time.Since(w.epoch)) + 1,
	}
	w.oldestUnsynced.CompareAndSwap(0, w.cur.began)
	w.seal()
}

// takeBuffer returns an aligned buffer of at least n bytes, whose content is arbitrary. Called with mu.
func (w *WAL) takeBuffer(n int) []byte {
	for i, b := range w.spare {
		if len(b) >= n {
			last := len(w.spare) - 1
			w.spare[i] = w.spare[last]
			w.spare = w.spare[:last]
			return b
		}
	}
	return disk.Aligned(max(n, int(min(batchBytes, w.opts.SegmentSize))))
}

// giveBuffer takes a buffer back. Called with mu.
func (w *WAL) giveBuffer(b []byte) {
	if len(b) <= batchBytes && len(w.spare) < sparesMax {
		w.spare = append(w.spare, b)
	}
}

// put appends a record to the current batch, in which reserve has made room, and returns where it stands and the
// position after it. Called with mu.
func (w *WAL) put(h recordHeader, data, aux []byte) (location, LSN) {
	b := w.cur
	at := b.off + b.n
	size := h.size()
	dst := b.buf[b.n : b.n+size]
	h.encode(dst, place{w.stream, b.seg.id, at})
	copy(dst[recordHeaderSize:], data)
	copy(dst[recordHeaderSize+len(data):], aux)
	b.n += size
	b.count++
	end := b.lsn + LSN(b.n)
	w.written.Store(uint64(end))
	return location{seg: b.seg, off: uint32(at), size: uint32(size)}, end
}

// record appends a record without a place in the index. Called with mu.
func (w *WAL) record(h recordHeader, data, aux []byte) LSN {
	h.dataLen, h.auxLen = uint32(len(data)), uint32(len(aux))
	h.payloadSum = payloadSum(data, aux)
	w.reserve(h.size())
	_, lsn := w.put(h, data, aux)
	return lsn
}

// seal closes the current batch: from here on it is the committer's. Staged commit indexes go along if there is room.
// Called with mu; cur is not nil.
func (w *WAL) seal() {
	b := w.cur
	w.cur = nil
	w.putCommits(b)
	w.sealed.push(b)
	w.tail.prev = b.off
	w.tail.off = b.off + disk.AlignUp(b.n)
	w.tail.lsn = b.end()
	w.written.Store(uint64(w.tail.lsn))
}

// putCommits appends a commit record for each shard whose staged index is newer than the recorded one.
func (w *WAL) putCommits(b *batch) {
	for _, s := range w.order {
		staged := s.staged.Load()
		if staged <= s.recordedCommit {
			continue
		}
		h := recordHeader{typ: recordCommit, shard: s.id, index: staged}
		if b.n+h.size() > b.limit {
			return // they go with the next batch
		}
		h.encode(b.buf[b.n:], place{w.stream, b.seg.id, b.off + b.n})
		b.n += h.size()
		b.count++
		s.recordedCommit = staged
	}
}

// rotate begins a segment: its first batch begins with a state record, so that nothing before it is needed to know
// the shards' state. Called with mu; nothing is being filled.
func (w *WAL) rotate() {
	old, end := w.tail.seg, w.tail.off
	w.tail.seg = newSegment(w.opts.Dir, old.id+1, w.opts.SegmentSize)
	w.tail.off, w.tail.prev = 0, 0
	w.segs = append(w.segs, w.tail.seg)
	w.rotations.Add(1)
	w.beginSegment(old.id, uint64(end))
}

// beginSegment begins the first batch of the tail segment. Called with mu.
func (w *WAL) beginSegment(prevSeg, prevEnd uint64) {
	w.cur = w.newBatch(recordHeaderSize + int64(w.stateBytes))
	w.cur.flags = flagFirst
	w.cur.prevSeg, w.cur.prevEnd = prevSeg, prevEnd
	w.putState(w.needed())
}

// needed returns the lowest segment that holds an entry somebody needs, or the tail. Called with mu.
func (w *WAL) needed() uint64 {
	for _, seg := range w.segs {
		if seg.live > 0 {
			return seg.id
		}
	}
	return w.tail.seg.id
}

// putState appends a state record; the current batch has room for it. Called with mu.
func (w *WAL) putState(oldest uint64) {
	state := w.state(oldest)
	payload := state.append(make([]byte, 0, state.size()))
	h := recordHeader{typ: recordState, dataLen: uint32(len(payload)), payloadSum: payloadSum(payload, nil)}
	w.put(h, payload, nil)
	w.oldest = oldest
	w.cur.oldest = oldest
	for i := range state.shards {
		w.shards[state.shards[i].id].recordedCommit = state.shards[i].commit
	}
}

// releaseOld appends a state record if a segment has become unnecessary since the last one; the segment goes when
// the record is durable. Called with mu.
func (w *WAL) releaseOld() {
	if w.needed() == w.oldest {
		return
	}
	w.reserve(recordHeaderSize + int64(w.stateBytes))
	// A segment begun just now has brought the record along.
	if oldest := w.needed(); oldest != w.oldest {
		w.putState(oldest)
	}
	w.signal()
}

// state describes all shards. Called with mu.
func (w *WAL) state(oldest uint64) *logState {
	st := &logState{oldest: oldest, shards: make([]shardState, 0, len(w.shards))}
	for _, s := range w.order {
		sh := shardState{id: s.id, first: s.first, next: s.next, commit: max(s.staged.Load(), s.recordedCommit)}
		for k, v := range s.stable {
			sh.stable = append(sh.stable, keyValue{k, v})
		}
		sort.Slice(sh.stable, func(i, j int) bool { return sh.stable[i].key < sh.stable[j].key })
		st.shards = append(st.shards, sh)
	}
	return st
}
