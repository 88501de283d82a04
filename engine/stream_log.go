package engine

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"
	"sort"

	"github.com/cockroachdb/pebble/v2"
)

// This file is a topic's log as streams need it: entries found by their stream IDs, walked in both directions, and
// removed one by one. Blocks never change; what is removed is noted in marks, which are checkpointed state.
//
// Invariant I15: the IDs of the entries that exist rise with their offsets, and none is above the topic's last ID.
// IDs of removed entries may break the order after XSETID; a search that begins behind the first block whose first ID
// is not above the ID sought therefore still meets every entry that exists (the block of such an entry was written
// before any block with a lower first ID could be, since that one came when the entry existed).

// streamPart is a topic's state as a stream.
type streamPart struct {
	// marks are the removed entries from topic.first on, marked their number: all below that are removed.
	marks  map[uint64]*markChunk
	marked uint64
	// added is entries-added, maxDeleted the greatest ID that XDEL removed.
	added      uint64
	maxDeleted StreamID
	// changed is the raft index of the last change, for WATCH.
	changed uint64
	// expireAt is when the key expires in cluster time (0: never), expireWall the Unix time it was told.
	expireAt, expireWall int64
	// rewound is set once XSETID has moved the last ID back: then stream IDs of blocks may not rise.
	rewound bool
	// expires is set once a message with a retention was stored, mixed once one expires before an earlier one
	// does; topExpiry is the latest expiry so far.
	expires, mixed bool
	topExpiry      int64
	// catching is set while the head of a log that drops what is acknowledged was not looked at to its end.
	catching bool

	goneMarks []uint64 // stored rows of mark chunks that are empty now
	dead      []uint64 // bases of blocks that were removed entry by entry since the last checkpoint
}

// markChunk has a bit for each removed one of 4096 consecutive offsets.
type markChunk struct {
	bits          [(chunkMask + 1) / 64]uint64
	n             uint64
	dirty, stored bool
}

func (c *markChunk) has(low uint64) bool { return c.bits[low/64]&(1<<(low%64)) != 0 }

// below counts the marks under low.
func (c *markChunk) below(low uint64) uint64 {
	n := 0
	for i := range low / 64 {
		n += bits.OnesCount64(c.bits[i])
	}
	if low%64 != 0 {
		n += bits.OnesCount64(c.bits[low/64] & (1<<(low%64) - 1))
	}
	return uint64(n)
}

// removed reports whether the entry at off was removed by XDEL or trimming.
func (t *topic) removed(off uint64) bool {
	if off < t.first {
		return true
	}
	if t.marked == 0 {
		return false
	}
	c := t.marks[off>>chunkShift]
	return c != nil && c.has(off&chunkMask)
}

// marksIn counts the marks from one offset up to another.
func (t *topic) marksIn(from, to uint64) uint64 {
	if t.marked == 0 || from >= to {
		return 0
	}
	n := uint64(0)
	count := func(key uint64, c *markChunk) {
		lo, hi := uint64(0), uint64(chunkMask+1)
		if key == from>>chunkShift {
			lo = from & chunkMask
		}
		if key == to>>chunkShift {
			hi = to & chunkMask
		}
		if lo == 0 && hi == chunkMask+1 {
			n += c.n
		} else if hi > lo {
			n += c.below(hi) - c.below(lo)
		}
	}
	first, last := from>>chunkShift, to>>chunkShift
	if last-first > uint64(len(t.marks)) {
		for key, c := range t.marks {
			if key >= first && key <= last {
				count(key, c)
			}
		}
		return n
	}
	for key := first; key <= last; key++ {
		if c := t.marks[key]; c != nil {
			count(key, c)
		}
	}
	return n
}

// mark notes that an entry that was there is removed.
func (t *topic) mark(off uint64) {
	key, low := off>>chunkShift, off&chunkMask
	c := t.marks[key]
	if c == nil {
		c = &markChunk{}
		if t.marks == nil {
			t.marks = make(map[uint64]*markChunk)
		}
		t.marks[key] = c
	}
	c.bits[low/64] |= 1 << (low % 64)
	c.n++
	c.dirty = true
	t.marked++
	if off == t.first {
		next := off + 1
		for t.marked > 0 {
			c := t.marks[next>>chunkShift]
			if c == nil || !c.has(next&chunkMask) {
				break
			}
			next++
		}
		t.removeBelow(next)
	}
	t.dirty = true
}

// removeBelow notes that everything below off is removed.
func (t *topic) removeBelow(off uint64) {
	if off <= t.first {
		return
	}
	drop := func(key uint64, c *markChunk) {
		t.marked -= c.n
		if c.stored {
			t.goneMarks = append(t.goneMarks, key)
		}
		delete(t.marks, key)
	}
	last := off >> chunkShift
	if t.marked > 0 {
		if last-t.first>>chunkShift > uint64(len(t.marks)) {
			for key, c := range t.marks {
				if key < last {
					drop(key, c)
				}
			}
			slices.Sort(t.goneMarks)
		} else {
			for key := t.first >> chunkShift; key < last; key++ {
				if c := t.marks[key]; c != nil {
					drop(key, c)
				}
			}
		}
		if c := t.marks[last]; c != nil {
			low := off & chunkMask
			n := c.below(low)
			if n == c.n {
				drop(last, c)
			} else if n > 0 {
				clear(c.bits[:low/64])
				c.bits[low/64] &^= 1<<(low%64) - 1
				c.n -= n
				c.dirty = true
				t.marked -= n
			}
		}
	}
	t.first = off
	t.gone = max(t.gone, off)
	t.dirty = true
}

func (c *markChunk) appendRow(b []byte) []byte {
	b = append(b, rowVersion)
	for _, w := range c.bits {
		b = binary.AppendUvarint(b, w)
	}
	return b
}

func parseMarks(row []byte) (*markChunk, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return nil, rowError(rowMarks, v)
	}
	c := &markChunk{stored: true}
	for i := range c.bits {
		c.bits[i] = r.uvarint()
		c.n += uint64(bits.OnesCount64(c.bits[i]))
	}
	if c.n == 0 {
		r.fail()
	}
	return c, r.err()
}

// append appends what a topic's row holds of it. The marks have rows of their own.
func (s *streamPart) append(b []byte) []byte {
	b = append(b, flags(s.rewound, s.expires, s.mixed, s.catching))
	b = binary.AppendUvarint(b, s.added)
	b = s.maxDeleted.append(b)
	b = binary.AppendUvarint(b, s.changed)
	b = appendVarint(b, s.expireAt)
	b = appendVarint(b, s.expireWall)
	return appendVarint(b, s.topExpiry)
}

func (r *reader) streamPart() streamPart {
	f := r.flags(4)
	return streamPart{rewound: f&1 != 0, expires: f&2 != 0, mixed: f&4 != 0, catching: f&8 != 0, added: r.uvarint(), maxDeleted: r.streamID(),
		changed: r.uvarint(), expireAt: r.varint(), expireWall: r.varint(), topExpiry: r.varint()}
}

// blockOf returns the topic's block of the entry being applied, into which n more records will come.
func (e *Engine) blockOf(t *topic, n int) *block {
	if t.open == nil {
		t.open = &block{topic: t.inc, base: t.next, index: e.index, cluster: e.stamp.Cluster, wall: e.stamp.Wall, data: e.entry, starts: make([]uint32, 0, n)}
		t.segs = t.segs[:0]
		e.open = append(e.open, t)
	}
	return t.open
}

// addID notes the ID of the message that was added last.
func (b *block) addID(id StreamID) {
	i := b.count - 1
	switch {
	case i == 0:
		b.stream = id
	case b.ids != nil:
		b.ids = append(b.ids, id)
	case id.Ms != b.stream.Ms || id.Seq-b.stream.Seq != uint64(i):
		for k := range i {
			b.ids = append(b.ids, StreamID{Ms: b.stream.Ms, Seq: b.stream.Seq + uint64(k)})
		}
		b.ids = append(b.ids, id)
	}
}

// noted keeps a topic's counters up with a message that was just added with that expiry.
func (t *topic) noted(expiry int64) {
	t.added++
	if expiry != never {
		t.expires = true
	}
	if expiry < t.topExpiry {
		t.mixed = true
	}
	t.topExpiry = max(t.topExpiry, expiry)
}

// place is the lowest index whose ID is not below id; entries before it that exist have lower ones.
func (b *block) place(id StreamID) uint32 {
	return uint32(sort.Search(int(b.count), func(i int) bool { return !b.streamOf(uint32(i)).less(id) }))
}

// seekID returns an offset from which a walk meets every entry that exists with an ID not below id, and few others.
func (e *Engine) seekID(t *topic, id StreamID) (uint64, error) {
	if t.open != nil && t.open.count > 0 && !id.less(t.open.stream) {
		return t.open.base + uint64(t.open.place(id)), nil
	}
	live := t.recent[t.head:]
	if k := sort.Search(len(live), func(i int) bool { return id.less(live[i].stream) }); k > 0 {
		return live[k-1].base + uint64(live[k-1].place(id)), nil
	}
	return e.seekStored(t, id)
}

func (e *Engine) seekStored(t *topic, id StreamID) (off uint64, err error) {
	defer e.damaged(&err)
	start := max(t.first, t.floor.offset)
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: e.keys.key(rowByStream, t.inc), UpperBound: e.keys.key(rowByStream, t.inc+1)})
	if err != nil {
		return 0, fmt.Errorf("engine: reading the ID index: %w", err)
	}
	defer func() { _ = it.Close() }()
	key := e.keys.key(rowByStream, t.inc, id.Ms, id.Seq, ^uint64(0))
	for ok := it.SeekLT(key); ok; ok = it.Prev() {
		base, _ := keyPart(it.Key(), 3)
		v, err := it.ValueAndErr()
		if err != nil {
			return 0, fmt.Errorf("engine: reading the ID index: %w", err)
		}
		r := reader{b: v}
		index := r.uvarint()
		if err := r.err(); err != nil {
			return 0, fmt.Errorf("engine: ID row %x: %w", it.Key(), err)
		}
		if !e.seeLaterRows && (index > e.index || e.applying && index == e.index) {
			continue // of an entry that is yet to be applied again
		}
		if base < start {
			return start, nil
		}
		b, err := e.blockFor(t, base)
		if err != nil {
			return 0, err
		}
		if b == nil || b.base != base {
			return max(base, start), nil // removed with its header
		}
		return max(base+uint64(b.place(id)), start), nil
	}
	if err := it.Error(); err != nil {
		return 0, fmt.Errorf("engine: reading the ID index: %w", err)
	}
	return start, nil
}

// from returns the first entry that exists at now with an ID not below id, a nil block without one.
func (e *Engine) from(t *topic, id StreamID, now int64) (*block, uint32, error) {
	off, err := e.seekID(t, id)
	if err != nil {
		return nil, 0, err
	}
	var b *block
	var i uint32
	for {
		if b, i, err = e.firstLive(t, b, off, now, false); b == nil || err != nil {
			return nil, 0, err
		}
		if !b.streamOf(i).less(id) {
			return b, i, nil
		}
		off = b.base + uint64(i) + 1
	}
}

// entry returns the entry with that ID, a nil block if none exists at now.
func (e *Engine) entryAt(t *topic, id StreamID, now int64) (*block, uint32, error) {
	b, i, err := e.from(t, id, now)
	if err != nil || b == nil || b.streamOf(i) != id {
		return nil, 0, err
	}
	return b, i, nil
}

// blockBefore returns the last block that begins below off.
func (e *Engine) blockBefore(t *topic, off uint64) (b *block, err error) {
	defer e.damaged(&err)
	if t.open != nil && t.open.base < off {
		return t.open, nil
	}
	live := t.recent[t.head:]
	if k := sort.Search(len(live), func(i int) bool { return live[i].base >= off }); k > 0 {
		return live[k-1], nil
	}
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: e.keys.key(rowBlock, t.inc, t.floor.offset), UpperBound: e.keys.key(rowBlock, t.inc, min(off, t.next))})
	if err != nil {
		return nil, fmt.Errorf("engine: reading block headers: %w", err)
	}
	defer func() { _ = it.Close() }()
	if !it.Last() {
		return nil, it.Error()
	}
	return e.headerAt(t, it)
}

// lastLive returns the last entry below off that exists at now, a nil block without one.
func (e *Engine) lastLive(t *topic, hint *block, off uint64, now int64) (*block, uint32, error) {
	for off > t.first {
		b := hint
		if b == nil || off <= b.base || off > b.end() {
			var err error
			if b, err = e.blockBefore(t, off); err != nil || b == nil {
				return nil, 0, err
			}
		}
		hint = nil
		if b.lastExpiry > now {
			for at := min(off, b.end()); at > b.base; at-- {
				i := uint32(at - 1 - b.base)
				if b.expiry(i) > now && !t.removed(at-1) {
					return b, i, nil
				}
			}
		}
		off = b.base
	}
	return nil, 0, nil
}

// liveIn counts the entries from one offset up to another that exist at now.
func (e *Engine) liveIn(t *topic, from, to uint64, now int64) (uint64, error) {
	from = max(from, t.first)
	to = min(to, t.next)
	if from >= to {
		return 0, nil
	}
	if !t.expires {
		return to - from - t.marksIn(from, to), nil
	}
	n := uint64(0)
	var hint *block
	for {
		b, i, err := e.firstLive(t, hint, from, now, false)
		if err != nil || b == nil {
			return n, err
		}
		off := b.base + uint64(i)
		if off >= to {
			return n, nil
		}
		if !t.mixed {
			// What expires does so in order: behind one that lives all do.
			return n + to - off - t.marksIn(off, to), nil
		}
		hint = b
		n++
		from = off + 1
	}
}

// length is the number of entries that exist at now.
func (e *Engine) length(t *topic, now int64) (uint64, error) { return e.liveIn(t, 0, t.next, now) }

// behind returns the offset behind the first n entries that exist at now; there are that many.
func (e *Engine) offsetBehind(t *topic, n uint64, now int64) (uint64, error) {
	off := t.first
	if n == 0 {
		return off, nil
	}
	if !t.expires && t.marked == 0 {
		return off + n, nil
	}
	if !t.expires {
		for ; n > 0; off++ {
			if !t.removed(off) {
				n--
			}
		}
		return off, nil
	}
	var hint *block
	for ; n > 0; n-- {
		b, i, err := e.firstLive(t, hint, off, now, false)
		if err != nil || b == nil {
			return off, err
		}
		hint, off = b, b.base+uint64(i)+1
	}
	return off, nil
}

// removeEntry removes an entry that exists.
func (e *Engine) removeEntry(t *topic, b *block, i uint32) {
	id := b.streamOf(i)
	if t.maxDeleted.less(id) {
		t.maxDeleted = id
	}
	t.mark(b.base + uint64(i))
	t.changed = e.index
	e.noteKey(t.name)
	e.dirtRough.Add(64)
	t.noteDead(b)
}

// noteDead has the next checkpoint remove a block if nothing of it is left. One that is still growing is looked at
// when its entry is done; one that ends at the first entry or below goes with the floor.
func (t *topic) noteDead(b *block) {
	if b != t.open && b.base >= t.first && t.allRemoved(b) {
		t.dead = append(t.dead, b.base)
	}
}

// allRemoved reports whether every entry of a block was removed.
func (t *topic) allRemoved(b *block) bool {
	if b.end() <= t.first {
		return true
	}
	if t.marked < uint64(b.count) && b.base >= t.first {
		return false
	}
	for off := b.base; off < b.end(); off++ {
		if !t.removed(off) {
			return false
		}
	}
	return true
}

// removedBlocks is what a checkpoint has to know of a topic whose entries were removed.
type removedBlocks struct {
	first   uint64
	dead    []uint64
	rewound bool
}

// takeRemoved gathers, for a checkpoint, the topics whose blocks may have to go.
func (e *Engine) takeRemoved() map[uint64]removedBlocks {
	out := make(map[uint64]removedBlocks)
	for inc, t := range e.byInc {
		if len(t.dead) > 0 || t.first > t.floor.offset || t.rewound {
			e.packs.blocksGrown.loosened = true
			out[inc] = removedBlocks{first: t.first, dead: t.dead, rewound: t.rewound}
			t.dead = nil
		}
	}
	return out
}

// removeIDs removes the ID rows of the stored blocks from one offset up to another.
func (e *Engine) removeIDs(batch *pebble.Batch, inc, from, to uint64) error {
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: e.keys.key(rowBlock, inc, from), UpperBound: e.keys.key(rowBlock, inc, to)})
	if err != nil {
		return fmt.Errorf("engine: reading block headers: %w", err)
	}
	defer func() { _ = it.Close() }()
	for it.First(); it.Valid(); it.Next() {
		base, _ := keyPart(it.Key(), 1)
		v, err := it.ValueAndErr()
		if err != nil {
			return fmt.Errorf("engine: reading a block header: %w", err)
		}
		b, err := parseBlock(inc, base, v)
		if err != nil {
			return fmt.Errorf("engine: block header at offset %d: %w", base, err)
		}
		_ = batch.Delete(e.keys.key(rowByStream, inc, b.stream.Ms, b.stream.Seq, base), nil)
	}
	return it.Error()
}

// encodeMarks puts the changed marks of a topic into a checkpoint.
func (e *Engine) encodeMarks(batch *pebble.Batch, t *topic) {
	for _, key := range t.goneMarks {
		_ = batch.Delete(e.keys.key(rowMarks, t.inc, key), nil) // a batch in memory takes everything
	}
	t.goneMarks = nil
	for _, key := range sortedKeys(t.marks) {
		if c := t.marks[key]; c.dirty {
			c.dirty, c.stored = false, true
			e.put(batch, c.appendRow(e.rowBuf[:0]), rowMarks, t.inc, key)
		}
	}
}

func (e *Engine) loadMarks(key, v []byte) error {
	inc, _ := keyPart(key, 0)
	no, _ := keyPart(key, 1)
	t := e.byInc[inc]
	if t == nil {
		return fmt.Errorf("marks of unknown topic %d: %w", inc, errMalformed)
	}
	c, err := parseMarks(v)
	if err != nil {
		return err
	}
	if t.marks == nil {
		t.marks = make(map[uint64]*markChunk)
	}
	t.marks[no] = c
	t.marked += c.n
	return nil
}
