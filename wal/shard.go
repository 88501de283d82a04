package wal

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Entry is one entry of a shard's log. The log keeps Data and Extensions by reference and returns them so: neither
// the appender nor a reader may modify them.
type Entry struct {
	Index      uint64
	Term       uint64
	Type       uint8
	AppendedAt time.Time
	Data       []byte
	Extensions []byte
}

// Shard is one shard's log in the stream. Its methods may be called by several goroutines at once; appends and
// truncations take effect in the order of the calls.
type Shard struct {
	w  *WAL
	id uint16

	// mu guards what readers look at. Writers hold WAL.mu as well.
	mu          sync.RWMutex
	first, next uint64 // the log holds [first, next)
	locs        fifo[location]
	recentFirst uint64 // recent holds [recentFirst, next)
	recent      fifo[recent]
	stable      map[string][]byte

	// staged is the newest staged commit index; recordedCommit, guarded by WAL.mu, the newest appended one.
	staged         atomic.Uint64
	recordedCommit uint64
}

// ID returns the shard's number.
func (s *Shard) ID() uint16 { return s.id }

// First returns the first index of the log, 0 when it is empty.
func (s *Shard) First() uint64 {
	first, _ := s.Range()
	return first
}

// Last returns the last index of the log, 0 when it is empty.
func (s *Shard) Last() uint64 {
	_, last := s.Range()
	return last
}

// Range returns the first and last index of the log as of one moment, 0 and 0 when it is empty.
func (s *Shard) Range() (first, last uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.first == s.next {
		return 0, 0
	}
	return s.first, s.next - 1
}

// Get reads an entry, also one that is not durable yet. Entries not in memory are read from disk and their checksums
// verified; damage poisons the log and is returned as a *CorruptionError.
func (s *Shard) Get(index uint64, e *Entry) error {
	s.mu.RLock()
	if index < s.first || index >= s.next {
		s.mu.RUnlock()
		return ErrNotFound
	}
	if n := s.recent.len(); n > 0 && index >= s.recentFirst {
		*e = s.recent.at(int(index - s.recentFirst)).Entry
		s.mu.RUnlock()
		return nil
	}
	loc := *s.locs.at(int(index - s.first))
	pinned := loc.seg.pin()
	s.mu.RUnlock()
	if !pinned {
		return ErrClosed
	}
	defer loc.seg.unpin()
	return s.w.readEntry(s.id, index, loc, e)
}

// Append appends entries that follow each other and the last one; on an empty log they may start at any index but 0.
// It returns at once with the position to wait for; the entries can be read at once. Either all or none are appended.
func (s *Shard) Append(entries []Entry) (LSN, error) {
	w := s.w
	if len(entries) == 0 {
		return w.Written(), nil
	}
	// The payload checksums do not depend on the place in the log: compute them outside of the lock.
	var sumsArray [16]uint32
	sums := sumsArray[:0]
	for i := range entries {
		e := &entries[i]
		if size := recordHeaderSize + int64(len(e.Data)) + int64(len(e.Extensions)); size > w.recordMax() {
			return 0, fmt.Errorf("%w: entry %d of shard %d takes %d bytes of at most %d", ErrTooLarge, e.Index, s.id, size, w.recordMax())
		}
		if e.Index == 0 || e.Index != entries[0].Index+uint64(i) {
			return 0, fmt.Errorf("%w: entry %d of shard %d at place %d of an append from %d on", ErrGap, e.Index, s.id, i, entries[0].Index)
		}
		sums = append(sums, payloadSum(e.Data, e.Extensions))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.usable(); err != nil {
		return 0, err
	}
	if from := entries[0].Index; from != s.next {
		if s.first != s.next {
			return 0, fmt.Errorf("%w: entry %d of shard %d after %d", ErrGap, from, s.id, s.next-1)
		}
		// The log is empty, but perhaps only because of a prefix truncation that no record speaks of yet.
		w.record(recordHeader{typ: recordReset, shard: s.id, index: from}, nil, nil)
		s.drop(from, from)
	}
	var lsn LSN
	for i := range entries {
		e := &entries[i]
		h := recordHeader{
			payloadSum: sums[i], dataLen: uint32(len(e.Data)), auxLen: uint32(len(e.Extensions)), typ: recordEntry,
			entryType: e.Type, shard: s.id, index: e.Index, term: e.Term, appendedAt: unixNano(e.AppendedAt),
		}
		w.reserve(h.size())
		var loc location
		loc, lsn = w.put(h, e.Data, e.Extensions)
		s.push(e, loc, lsn)
	}
	w.ring.evict(w.Durable())
	w.signal()
	return lsn, nil
}

// push makes an appended entry readable. Called with WAL.mu.
func (s *Shard) push(e *Entry, loc location, lsn LSN) {
	s.mu.Lock()
	s.locs.push(loc)
	if s.recent.len() == 0 {
		s.recentFirst = e.Index
	}
	s.recent.push(recent{*e, lsn})
	bytes := s.recent.at(s.recent.len() - 1).bytes()
	s.next = e.Index + 1
	s.mu.Unlock()
	loc.seg.live++
	loc.seg.liveBytes += int64(loc.size)
	s.w.ring.bytes += bytes
	s.w.ring.refs.push(ringRef{s, lsn})
}

// Forget drops the oldest entries up to through from memory while the shard keeps more than keep bytes there: whoever still
// asks for one of them is served from the disk. Entries that are not durable stay. The log itself is not changed.
func (s *Shard) Forget(through uint64, keep int64) {
	w := s.w
	w.mu.Lock()
	defer w.mu.Unlock()
	durable := w.Durable()
	s.mu.Lock()
	n := 0
	for w.ring.bytes > keep && n < s.recent.len() && s.recentFirst+uint64(n) <= through && s.recent.at(n).lsn <= durable {
		w.ring.bytes -= s.recent.at(n).bytes()
		n++
	}
	s.recent.dropFront(n)
	s.recentFirst += uint64(n)
	s.mu.Unlock()
	if n > 0 {
		w.ring.evict(durable)
	}
}

// drop makes [first, next) what the log holds, a part of what it held, or nothing. Called with WAL.mu.
func (s *Shard) drop(first, next uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if first == next {
		s.forget(0, s.locs.len())
		s.locs.dropFront(s.locs.len())
		s.forgetRecent(0, s.recent.len())
		s.recent.dropFront(s.recent.len())
		s.first, s.next = first, next
		return
	}
	if n := int(s.next - next); n > 0 {
		s.forget(s.locs.len()-n, s.locs.len())
		s.locs.cutBack(s.locs.len() - n)
		n = min(n, s.recent.len())
		s.forgetRecent(s.recent.len()-n, s.recent.len())
		s.recent.cutBack(s.recent.len() - n)
		s.next = next
	}
	if n := int(first - s.first); n > 0 {
		s.forget(0, n)
		s.locs.dropFront(n)
		if first > s.recentFirst {
			n = min(int(first-s.recentFirst), s.recent.len())
			s.forgetRecent(0, n)
			s.recent.dropFront(n)
			s.recentFirst += uint64(n)
		}
		s.first = first
	}
}

// forget takes the locations [i, j) out of their segments' accounts.
func (s *Shard) forget(i, j int) {
	for ; i < j; i++ {
		loc := s.locs.at(i)
		loc.seg.live--
		loc.seg.liveBytes -= int64(loc.size)
	}
}

func (s *Shard) forgetRecent(i, j int) {
	for ; i < j; i++ {
		s.w.ring.bytes -= s.recent.at(i).bytes()
	}
}

// TruncateSuffix drops the entries from an index on. The truncation is durable when the returned position is; it is
// in force at once, and what is appended after it stands after it on disk.
func (s *Shard) TruncateSuffix(from uint64) (LSN, error) {
	w := s.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.usable(); err != nil {
		return 0, err
	}
	if from >= s.next || s.first == s.next {
		return w.Written(), nil
	}
	if from <= s.first {
		// Written as a reset: at the next start the log may begin lower than now, since prefix truncations are
		// recorded late.
		return s.reset(max(from, 1)), nil
	}
	lsn := w.record(recordHeader{typ: recordTruncate, shard: s.id, index: from}, nil, nil)
	s.drop(s.first, from)
	w.releaseOld()
	w.signal()
	return lsn, nil
}

// TruncatePrefix drops the entries up to and including an index. Nothing waits for the disk: after a crash some of
// them may be back. Segments that no shard needs any more are freed once a state record saying so is durable.
func (s *Shard) TruncatePrefix(through uint64) error {
	w := s.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.usable(); err != nil {
		return err
	}
	if through < s.first || s.first == s.next {
		return nil
	}
	if through >= s.next-1 {
		s.drop(s.next, s.next)
	} else {
		s.drop(through+1, s.next)
	}
	w.releaseOld()
	w.keeper.wake() // what remains may be little enough to be moved
	return nil
}

// Reset drops everything; the next append may start at next (or at any other index). The commit index stays.
func (s *Shard) Reset(next uint64) (LSN, error) {
	w := s.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.usable(); err != nil {
		return 0, err
	}
	return s.reset(max(next, 1)), nil
}

// reset is Reset with WAL.mu held.
func (s *Shard) reset(next uint64) LSN {
	w := s.w
	lsn := w.record(recordHeader{typ: recordReset, shard: s.id, index: next}, nil, nil)
	s.drop(next, next)
	w.releaseOld()
	w.signal()
	return lsn
}

// SetStable sets a small value, all or nothing, and waits until it is durable. A nil value removes the key. When it
// fails, the value may still turn up at the next start.
func (s *Shard) SetStable(key string, value []byte) error {
	lsn, err := s.setStable(key, value)
	if err != nil {
		return err
	}
	return s.w.WaitDurable(lsn, nil)
}

func (s *Shard) setStable(key string, value []byte) (LSN, error) {
	w := s.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.usable(); err != nil {
		return 0, err
	}
	if n := w.stateBytes + 8 + len(key) + len(value); n > w.stateMax() {
		return 0, fmt.Errorf("%w: all stable values would take %d bytes of at most %d", ErrTooLarge, n, w.stateMax())
	}
	h := recordHeader{typ: recordStable, shard: s.id}
	if value == nil {
		h.entryType = stableRemoved
	}
	lsn := w.record(h, value, []byte(key))
	s.applyStable(key, value)
	w.stateBytes = w.state(0).size()
	w.signal()
	return lsn, nil
}

// stableRemoved is the entryType of a stable record that removes its key.
const stableRemoved = 1

func (s *Shard) applyStable(key string, value []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if value == nil {
		delete(s.stable, key)
		return
	}
	s.stable[key] = append([]byte{}, value...)
}

// Stable returns a copy of a stable value, nil when there is none. A value being set may show before it is durable.
func (s *Shard) Stable(key string) []byte {
	s.mu.RLock()
	defer s.mu.RUnlock()
	v, ok := s.stable[key]
	if !ok {
		return nil
	}
	return append([]byte{}, v...)
}

// StageCommit notes that the entries up to index are committed. It is written with the next batch and never causes
// one; a lower index than before is ignored.
func (s *Shard) StageCommit(index uint64) {
	for {
		old := s.staged.Load()
		if index <= old || s.staged.CompareAndSwap(old, index) {
			return
		}
	}
}

// Committed returns the newest staged commit index; after Open, the newest that was recorded. It may lie above the
// last entry, or in entries that are gone.
func (s *Shard) Committed() uint64 { return s.staged.Load() }
