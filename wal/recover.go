package wal

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sort"

	"tercet.dev/tercet/wal/disk"
)

func (w *WAL) path(name string) string { return filepath.Join(w.opts.Dir, name) }

// listing is what a log's directory holds, by kind, each sorted by number.
type listing struct {
	segments []uint64
	pool     []uint64
	temps    []string
}

func list(fsys disk.FS, dir string) (listing, error) {
	var l listing
	names, err := fsys.List(dir)
	if err != nil {
		return l, err
	}
	for _, name := range names {
		if id, ok := parseName(name, "", segmentSuffix); ok {
			l.segments = append(l.segments, id)
		} else if n, ok := parseName(name, poolPrefix, poolSuffix); ok {
			l.pool = append(l.pool, n)
		} else if len(name) > len(tempPrefix) && name[:len(tempPrefix)] == tempPrefix {
			l.temps = append(l.temps, name)
		}
	}
	sort.Slice(l.segments, func(i, j int) bool { return l.segments[i] < l.segments[j] })
	sort.Slice(l.pool, func(i, j int) bool { return l.pool[i] < l.pool[j] })
	return l, nil
}

// chain is what the segment files of a directory amount to: those that make up the log, oldest first, and those
// that do not.
type chain struct {
	links  []link
	stream uint64
	unused []uint64 // above the last link: prepared, or abandoned by a crash before their first batch was synced
	stale  []uint64 // below the first link, or between links: freed, or abandoned, and renamed back by a crash
	maxID  uint64
}

// link is one segment of the chain.
type link struct {
	id  uint64
	end int64 // where its successor says it ends; -1 for the last one
}

// prober opens segments for reading. Recovery opens them the way they will be used, the inspector read-only.
type prober struct {
	fs   disk.FS
	dir  string
	mode disk.Mode
}

func (p *prober) path(id uint64) string { return filepath.Join(p.dir, segmentName(id)) }

func (p *prober) open(id, stream uint64) (disk.File, *scanner, error) {
	f, err := p.fs.Open(p.path(id), p.mode)
	if err != nil {
		return nil, nil, err
	}
	sc, err := newScanner(f, id, stream)
	if err != nil {
		_ = f.Close()
		return nil, nil, fmt.Errorf("%s: %w", p.path(id), err)
	}
	return f, sc, nil
}

// with runs fn on a segment and closes it again.
func (p *prober) with(id, stream uint64, fn func(*scanner) error) error {
	f, sc, err := p.open(id, stream)
	if err != nil {
		return err
	}
	err = fn(sc)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	var corrupt *CorruptionError
	if err != nil && !errors.As(err, &corrupt) {
		err = fmt.Errorf("%s: %w", p.path(id), err)
	}
	return err
}

func (p *prober) corrupt(id uint64, off int64, format string, args ...any) *CorruptionError {
	return &CorruptionError{File: p.path(id), Offset: off, Reason: fmt.Sprintf(format, args...), Remedy: Remedy}
}

// headOnly stops a scan behind the state record at the head of a segment.
type headOnly struct{ state *logState }

var errStop = errors.New("stop")

func (h *headOnly) batch(*batchHeader) error { return nil }

func (h *headOnly) record(r *scanned) error {
	if st, ok := decodeState(r.data); ok {
		h.state = &st
	}
	return errStop
}

// statesOnly notes the newest state record of a segment.
type statesOnly struct{ state *logState }

func (v *statesOnly) batch(*batchHeader) error { return nil }

func (v *statesOnly) record(r *scanned) error {
	if r.typ == recordState {
		if st, ok := decodeState(r.data); ok {
			v.state = &st
		}
	}
	return nil
}

// head reads the head of a segment. It returns nil without an error when the segment does not begin with a valid
// header and state record.
func (s *scanner) head() (*batchHeader, *logState, error) {
	var v headOnly
	st, err := s.scan(-1, &v)
	if err != nil && !errors.Is(err, errStop) {
		return nil, nil, err
	}
	if st.first == nil || v.state == nil {
		return nil, nil, nil
	}
	return st.first, v.state, nil
}

// findChain finds out which segments make up the log. The last one is the highest with a readable head; those above
// it must not hold a single valid batch, since a head is synced before anything follows it. From the last one the
// links lead back to the oldest segment that the newest state record names.
func (p *prober) findChain(ids []uint64) (chain, error) {
	c := chain{}
	if len(ids) == 0 {
		return c, nil
	}
	c.maxID = ids[len(ids)-1]
	last := len(ids) - 1
	var head *batchHeader
	for ; last >= 0; last-- {
		err := p.with(ids[last], 0, func(sc *scanner) (err error) {
			if sc.size < SegmentSizeMin || sc.size%blockSize != 0 {
				return p.corrupt(ids[last], sc.size, "the file has been cut: segments get their name at full size")
			}
			head, _, err = sc.head()
			return err
		})
		if err != nil {
			return c, err
		}
		if head != nil {
			break
		}
	}
	if head != nil {
		c.stream = head.stream
	}
	for _, id := range ids[last+1:] {
		err := p.with(id, c.stream, func(sc *scanner) error {
			at, found, err := sc.findBatch(blockSize)
			if err == nil && found {
				return p.corrupt(id, 0, "the head of the segment is unreadable, but a batch at %d shows that it had been synced", at)
			}
			return err
		})
		if err != nil {
			return c, err
		}
		c.unused = append(c.unused, id)
	}
	if head == nil {
		return c, nil
	}
	var newest statesOnly
	if err := p.with(ids[last], c.stream, func(sc *scanner) error {
		_, err := sc.scan(-1, &newest)
		return err
	}); err != nil {
		return c, err
	}
	oldest := newest.state.oldest
	have := make(map[uint64]bool, last+1)
	for _, id := range ids[:last+1] {
		have[id] = true
	}
	id, end := ids[last], int64(-1)
	for {
		c.links = append(c.links, link{id, end})
		delete(have, id)
		if id <= oldest {
			break
		}
		if head.prevSeg == 0 {
			return c, p.corrupt(id, 0, "the log needs segments from %d on, but this one is the first", oldest)
		}
		next := head.prevSeg
		end = int64(head.prevEnd)
		if next >= id {
			return c, p.corrupt(id, 0, "the segment before it is said to be %d", next)
		}
		if !have[next] {
			return c, &CorruptionError{File: p.path(next), Reason: "the segment is missing", Remedy: Remedy}
		}
		if err := p.with(next, c.stream, func(sc *scanner) (err error) {
			head, _, err = sc.head()
			if err == nil && head == nil {
				return p.corrupt(next, 0, "the head of the segment is unreadable, but segment %d shows that it had been synced", id)
			}
			return err
		}); err != nil {
			return c, err
		}
		id = next
	}
	for i, j := 0, len(c.links)-1; i < j; i, j = i+1, j-1 {
		c.links[i], c.links[j] = c.links[j], c.links[i]
	}
	for id := range have {
		c.stale = append(c.stale, id)
	}
	sort.Slice(c.stale, func(i, j int) bool { return c.stale[i] < c.stale[j] })
	return c, nil
}

// replay rebuilds the shards' logs from the records of the chain. It serves recovery and the inspector.
type replay struct {
	p       *prober
	shards  map[uint16]*replayed
	state   bool // a state record has been read
	records int
	bytes   int64
	// place makes a location; nil when nobody will read the entries.
	place func(r *scanned) location
	// more, if not nil, sees everything as well.
	more visitor
}

// replayed is a shard's log being rebuilt. The entries [first, hollow) were said to exist by the first state record;
// their records stood in segments that are gone, unless they were moved to later ones (moved). The records of
// [hollow, next) have been read.
type replayed struct {
	first, hollow, next uint64

	moved  map[uint64]location
	locs   fifo[location]
	commit uint64
	stable map[string][]byte
}

func (p *replay) shard(id uint16) *replayed {
	s := p.shards[id]
	if s == nil {
		s = &replayed{stable: make(map[string][]byte), moved: make(map[uint64]location)}
		p.shards[id] = s
	}
	return s
}

// reset drops everything.
func (s *replayed) reset(next uint64) {
	clear(s.moved)
	s.locs = fifo[location]{}
	s.first, s.hollow, s.next = next, next, next
}

// truncate drops what is not below next.
func (s *replayed) truncate(next uint64) {
	if next < s.hollow {
		s.hollow = next // entries moved above it are not looked at any more
	}
	s.locs.cutBack(int(next - s.hollow))
	s.next = next
}

// begin drops what is below first.
func (s *replayed) begin(first uint64) {
	if first > s.hollow {
		s.locs.dropFront(int(first - s.hollow))
		s.hollow = first
	}
	s.first = first
}

// missing returns the first range of entries that no record was found for.
func (s *replayed) missing() (first, last uint64, any bool) {
	for first = s.first; first < s.hollow; first++ {
		if _, ok := s.moved[first]; ok {
			continue
		}
		last = s.hollow - 1
		for i := range s.moved {
			if i > first && i <= last {
				last = i - 1
			}
		}
		return first, last, true
	}
	return 0, 0, false
}

// locations returns where all entries are. None is missing.
func (s *replayed) locations() fifo[location] {
	if s.first == s.hollow {
		return s.locs
	}
	var out fifo[location]
	for i := s.first; i < s.hollow; i++ {
		out.push(s.moved[i])
	}
	for i := range s.locs.len() {
		out.push(*s.locs.at(i))
	}
	return out
}

func (p *replay) batch(h *batchHeader) error {
	p.bytes += disk.AlignUp(int64(h.used))
	if p.more != nil {
		return p.more.batch(h)
	}
	return nil
}

func (p *replay) record(r *scanned) error {
	p.records++
	if p.more != nil {
		if err := p.more.record(r); err != nil {
			return err
		}
	}
	bad := func(format string, args ...any) error {
		e := p.p.corrupt(r.segment, r.off, format, args...)
		e.Shard = r.shard
		if r.typ == recordEntry || r.typ == recordRewrite {
			e.First, e.Last = r.index, r.index
		}
		return e
	}
	if r.typ == recordState {
		return p.applyState(r, bad)
	}
	s := p.shard(r.shard)
	var loc location
	if p.place != nil && (r.typ == recordEntry || r.typ == recordRewrite) {
		loc = p.place(r)
	}
	switch r.typ {
	case recordEntry:
		if r.index != s.next || r.index == 0 {
			if s.first != s.next || r.index == 0 {
				return bad("entry %d of shard %d follows %d", r.index, r.shard, int64(s.next)-1)
			}
			s.reset(r.index)
		}
		s.locs.push(loc)
		s.next++
	case recordRewrite:
		// Outside of [first, next) it repeats an entry that was dropped after it had been read.
		if r.index >= s.hollow && r.index < s.next {
			*s.locs.at(int(r.index - s.hollow)) = loc
		} else if r.index >= s.first && r.index < s.hollow {
			s.moved[r.index] = loc
		}
	case recordTruncate:
		if r.index <= s.first || r.index > s.next {
			return bad("shard %d is truncated from %d on, but holds %d up to %d", r.shard, r.index, s.first, int64(s.next)-1)
		}
		s.truncate(r.index)
	case recordReset:
		s.reset(r.index)
	case recordStable:
		if r.entryType == stableRemoved {
			delete(s.stable, string(r.aux))
		} else {
			s.stable[string(r.aux)] = append([]byte{}, r.data...)
		}
	case recordCommit:
		s.commit = max(s.commit, r.index)
	}
	return nil
}

// applyState takes over the first state record. Each later one only repeats what the records before it amount to,
// except that the logs may begin later: prefix truncations have no record of their own.
func (p *replay) applyState(r *scanned, bad func(string, ...any) error) error {
	st, ok := decodeState(r.data)
	if !ok {
		return bad("a state record cannot be decoded")
	}
	first := !p.state
	p.state = true
	for i := range st.shards {
		in := &st.shards[i]
		s := p.shard(in.id)
		if first {
			s.reset(in.first)
			s.hollow, s.next = in.next, in.next
			s.commit = in.commit
			for _, kv := range in.stable {
				s.stable[kv.key] = kv.value
			}
			continue
		}
		if in.first == in.next && s.first == s.next {
			s.reset(in.next)
		}
		if in.next != s.next || in.first < s.first {
			return bad("the state of shard %d is stated as [%d, %d), but the records amount to [%d, %d)", in.id, in.first, in.next, s.first, s.next)
		}
		s.begin(in.first)
		s.commit = max(s.commit, in.commit)
		if len(in.stable) != len(s.stable) {
			return bad("shard %d has %d stable values, stated as %d", in.id, len(s.stable), len(in.stable))
		}
		for _, kv := range in.stable {
			if v, ok := s.stable[kv.key]; !ok || string(v) != string(kv.value) {
				return bad("the stable value %q of shard %d is not the one stated", kv.key, in.id)
			}
		}
	}
	return nil
}

// complete checks that every entry was met: an entry that the state knows and no segment holds is lost.
func (p *replay) complete(c *chain) error {
	for id, s := range p.shards {
		if first, last, any := s.missing(); any {
			e := p.p.corrupt(c.links[0].id, 0, "entries that the log should hold are in none of its segments")
			e.Shard, e.First, e.Last = id, first, last
			return e
		}
	}
	return nil
}

// run replays the chain. It returns where the last segment ends, and whether that is a torn tail.
func (p *replay) run(c *chain, open func(link) (*scanner, error)) (end int64, torn bool, err error) {
	for i, l := range c.links {
		sc, err := open(l)
		if err != nil {
			return 0, false, err
		}
		st, err := sc.scan(l.end, p)
		if err != nil {
			var corrupt *CorruptionError
			if errors.As(err, &corrupt) {
				return 0, false, err
			}
			return 0, false, fmt.Errorf("%s: %w", p.p.path(l.id), err)
		}
		if i < len(c.links)-1 {
			if !st.clean {
				return 0, false, p.damaged(sc, l, st, fmt.Sprintf("segment %d shows that this had been synced", c.links[i+1].id))
			}
			continue
		}
		// The last segment ends where its batches end. What is unreadable there was being written when the node
		// stopped, unless a later batch shows that it had been synced.
		at, found, err := sc.findBatch(st.next)
		if err != nil {
			return 0, false, fmt.Errorf("%s: %w", p.p.path(l.id), err)
		}
		if found {
			return 0, false, p.damaged(sc, l, st, fmt.Sprintf("the batch at %d shows that this had been synced", at))
		}
		end, torn = st.end, !st.clean || st.started
	}
	return end, torn, p.complete(c)
}

// damaged describes damage in a segment, and which entries it hides as far as what follows tells.
func (p *replay) damaged(sc *scanner, l link, st stop, proof string) *CorruptionError {
	e := p.p.corrupt(l.id, st.end, "%s, and %s", st.reason, proof)
	// A readable header names the entry at once.
	if b, err := sc.bytes(st.end, recordHeaderSize); err == nil && st.end%blockSize != 0 {
		if h, ok := decodeRecordHeader(b, place{sc.stream, l.id, st.end}); ok && (h.typ == recordEntry || h.typ == recordRewrite) {
			e.Shard, e.First, e.Last = h.shard, h.index, h.index
			return e
		}
	}
	// Otherwise the entries missing between what was read before and the first entry that comes after.
	at, found, err := sc.findBatch(st.next)
	if err == nil && found {
		after := &firstEntries{first: make(map[uint16]uint64)}
		sc.from(at, after)
		for id, first := range after.first {
			next := uint64(1)
			if s := p.shards[id]; s != nil {
				next = max(s.next, 1)
			}
			if first > next && (e.First == 0 || id < e.Shard) {
				e.Shard, e.First, e.Last = id, next, first-1
			}
		}
		if e.First != 0 {
			return e
		}
	}
	for id, s := range p.shards {
		if s.next > 0 && (e.First == 0 || id < e.Shard) {
			e.Shard, e.First, e.Last = id, s.next, 0
		}
	}
	return e
}

// firstEntries notes the first entry of each shard.
type firstEntries struct{ first map[uint16]uint64 }

func (v *firstEntries) batch(*batchHeader) error { return nil }

func (v *firstEntries) record(r *scanned) error {
	if _, ok := v.first[r.shard]; !ok && r.typ == recordEntry {
		v.first[r.shard] = r.index
	}
	return nil
}

// from visits what can be read of the batches from an offset on, for a better error message.
func (s *scanner) from(off int64, v visitor) {
	for {
		b, err := s.bytes(off, batchHeaderSize)
		if err != nil {
			return
		}
		h, ok, err := decodeBatchHeader(b, s.stream, s.segment, off)
		if err != nil || !ok || off+int64(h.used) > s.size {
			return
		}
		if _, _, reason, err := s.records(&h, off, -1, v); err != nil || reason != "" {
			return
		}
		off += disk.AlignUp(int64(h.used))
	}
}

// found is what recovery hands to begin.
type found struct {
	chain   chain
	list    listing
	prevSeg uint64
	prevEnd int64
}

// recover reads the log and changes nothing.
func (w *WAL) recover() (*found, error) {
	f := &found{}
	// Names that an earlier process left without syncing the directory must not vanish after they were relied upon.
	if err := w.fs.SyncDir(w.opts.Dir); err != nil {
		return nil, fmt.Errorf("wal: sync %s: %w", w.opts.Dir, err)
	}
	var err error
	if f.list, err = list(w.fs, w.opts.Dir); err != nil {
		return nil, fmt.Errorf("wal: list %s: %w", w.opts.Dir, err)
	}
	p := &prober{fs: w.fs, dir: w.opts.Dir, mode: w.mode}
	if f.chain, err = p.findChain(f.list.segments); err != nil {
		return nil, wrapOpen(err)
	}
	c := &f.chain
	w.stream = c.stream
	if w.stream == 0 {
		w.stream = w.opts.stream
	}
	segs := make(map[uint64]*segment)
	r := &replay{p: p, shards: make(map[uint16]*replayed)}
	r.place = func(rec *scanned) location {
		return location{seg: segs[rec.segment], off: uint32(rec.off), size: uint32(rec.size())}
	}
	end, torn, err := r.run(c, func(l link) (*scanner, error) {
		file, sc, err := p.open(l.id, c.stream)
		if err != nil {
			return nil, err
		}
		seg := newSegment(w.opts.Dir, l.id, sc.size)
		seg.file = file
		seg.synced.Store(sc.size)
		segs[l.id] = seg
		w.segs = append(w.segs, seg)
		return sc, nil
	})
	if err != nil {
		return nil, wrapOpen(err)
	}
	if n := len(c.links); n > 0 {
		// What was read may stand in a cache only, when it was the process that died and not the power.
		lastSeg := w.segs[n-1]
		if err := lastSeg.file.Sync(); err != nil {
			return nil, fmt.Errorf("wal: sync %s: %w", lastSeg.path, err)
		}
		f.prevSeg, f.prevEnd = c.links[n-1].id, end
		if torn {
			w.recovery.TornFile, w.recovery.TornOffset = lastSeg.path, end
		}
	}
	w.recovery.Segments, w.recovery.Records, w.recovery.Bytes = len(c.links), r.records, r.bytes
	for id, in := range r.shards {
		s := w.shardLocked(id)
		s.first, s.next, s.locs, s.stable = in.first, in.next, in.locations(), in.stable
		s.staged.Store(in.commit)
		s.recordedCommit = in.commit
		for i := range s.locs.len() {
			loc := s.locs.at(i)
			loc.seg.live++
			loc.seg.liveBytes += int64(loc.size)
		}
	}
	w.stateBytes = w.state(0).size()
	return f, nil
}

// wrapOpen says what was being done, except to damage, whose message is complete.
func wrapOpen(err error) error {
	var corrupt *CorruptionError
	if errors.As(err, &corrupt) {
		return err
	}
	return fmt.Errorf("wal: read the log: %w", err)
}

// begin makes the segment that this life of the log writes to. Old segments are never written again: where the log
// ends in the last one is stated at the head of the new one, so that whatever a torn write left behind there is never
// looked at. Only when that head is durable anything else is changed.
func (w *WAL) begin(f *found) error {
	id := f.chain.maxID + 1
	if n := len(f.list.pool); n > 0 {
		w.keeper.poolSeq = f.list.pool[n-1] + 1
	}
	for _, n := range f.list.pool {
		w.keeper.addPool(w.path(poolName(n)))
	}
	for _, name := range f.list.temps {
		if err := w.fs.Remove(w.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, unused := range f.chain.unused {
		w.keeper.addPool(w.path(segmentName(unused)))
	}
	w.keeper.wanted = id
	w.mu.Lock()
	w.tail.seg = newSegment(w.opts.Dir, id, w.opts.SegmentSize)
	w.segs = append(w.segs, w.tail.seg)
	w.beginSegment(f.prevSeg, uint64(f.prevEnd))
	w.mu.Unlock()
	if _, err := w.commitOnce(false); err != nil {
		return err
	}
	for _, stale := range f.chain.stale {
		w.keeper.freePath(w.path(segmentName(stale)))
	}
	return nil
}
