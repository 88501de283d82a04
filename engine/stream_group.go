package engine

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sort"

	"github.com/cockroachdb/pebble/v2"
)

// streamGroup is a group's state as Valkey knows it. Its pending list is the unsettled set: what the queue protocol
// leased belongs to consumer 0.
type streamGroup struct {
	// valkey is set for groups that XGROUP CREATE made: their set may be larger.
	valkey bool
	// entriesRead counts the entries read, -1 while that is not known.
	entriesRead int64

	consumers     map[string]*consumer
	byNum         map[uint32]*consumer
	consumerCount uint32 // the last number given to a consumer
	goneConsumers []uint32

	order   []uint64 // keys of the chunks, sorted
	settled int      // entries of the set that are settled ahead: they are not pending
}

// consumer is a named consumer. Times are wall time, active is -1 before it was given anything.
type consumer struct {
	name          string
	num           uint32
	seen, active  int64
	pending       int
	dirty, stored bool
}

// Flags of a group's row.
const (
	groupValkey = 1 << iota
	groupFlags  = iota
)

func (s *streamGroup) append(b []byte) []byte {
	b = append(b, bit(s.valkey, groupValkey))
	b = appendVarint(b, s.entriesRead)
	return binary.AppendUvarint(b, uint64(s.consumerCount))
}

func (r *reader) streamGroup() streamGroup {
	f := r.flags(groupFlags)
	return streamGroup{valkey: f&groupValkey != 0, entriesRead: r.varint(), consumerCount: uint32(r.upTo(1<<32 - 1))}
}

func (c *consumer) appendRow(b []byte) []byte {
	b = append(b, rowVersion)
	b = appendBytes(b, c.name)
	b = appendVarint(b, c.seen)
	return appendVarint(b, c.active)
}

func parseConsumer(num uint32, row []byte) (*consumer, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return nil, rowError(rowConsumer, v)
	}
	c := &consumer{num: num, name: r.str(), seen: r.varint(), active: r.varint(), stored: true}
	return c, r.err()
}

func (g *group) addConsumer(c *consumer) {
	if g.consumers == nil {
		g.consumers, g.byNum = make(map[string]*consumer), make(map[uint32]*consumer)
	}
	g.consumers[c.name], g.byNum[c.num] = c, c
}

func (e *Engine) loadConsumer(key, v []byte) error {
	tinc, _ := keyPart(key, 0)
	ginc, _ := keyPart(key, 1)
	num, _ := keyPart(key, 2)
	t := e.byInc[tinc]
	if t == nil || t.byInc[ginc] == nil {
		return fmt.Errorf("consumer of unknown group %d: %w", ginc, errMalformed)
	}
	c, err := parseConsumer(uint32(num), v)
	if err != nil {
		return err
	}
	t.byInc[ginc].addConsumer(c)
	return nil
}

// encodeConsumers puts the changed consumers of a group into a checkpoint.
func (e *Engine) encodeConsumers(batch *pebble.Batch, g *group) {
	for _, num := range g.goneConsumers {
		_ = batch.Delete(e.keys.key(rowConsumer, g.topic.inc, g.inc, uint64(num)), nil) // a batch in memory takes everything
	}
	g.goneConsumers = nil
	for _, num := range g.consumerNumbers() {
		if c := g.byNum[num]; c.dirty {
			c.dirty, c.stored = false, true
			e.put(batch, c.appendRow(e.rowBuf[:0]), rowConsumer, g.topic.inc, g.inc, uint64(num))
		}
	}
}

func (g *group) consumerNumbers() []uint32 {
	if len(g.byNum) == 0 {
		return nil
	}
	out := make([]uint32, 0, len(g.byNum))
	for num := range g.byNum {
		out = append(out, num)
	}
	slices.Sort(out)
	return out
}

// appendConsumers appends all consumers in their canonical form.
func (g *group) appendConsumers(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(g.byNum)))
	for _, num := range g.consumerNumbers() {
		b = binary.AppendUvarint(b, uint64(num))
		b = g.byNum[num].appendRow(b)
	}
	return b
}

// consumerNamed returns the consumer, creating it if need be, and notes that it was seen.
func (g *group) consumerNamed(name string, wall int64) (c *consumer, isNew bool) {
	c = g.consumers[name]
	if c == nil {
		g.consumerCount++
		c = &consumer{name: name, num: g.consumerCount, active: -1}
		g.addConsumer(c)
		isNew = true
	}
	if c.seen != wall || isNew {
		c.seen, c.dirty, g.dirty = wall, true, true
	}
	return c, isNew
}

// own gives an entry of the set to a consumer; nil is the queue protocol's.
func (g *group) own(off uint64, l *lease, c *consumer) {
	if l.consumer != 0 {
		g.byNum[l.consumer].pending--
	}
	l.consumer = 0
	if c != nil {
		l.consumer = c.num
		c.pending++
		g.chunk(off >> chunkShift).who |= 1 << (c.num & 63)
	}
}

// pendingCount is the length of the pending list. The group is folded.
func (g *group) pendingCount() int { return g.live - g.settled - g.parkedCount }

// pends reports whether an entry of the set is pending at now.
func (g *group) pends(l *lease, now int64) bool {
	return (l.state == leased || l.state == released) && l.expiry > now && !g.spent(l, now)
}

// heldByHTTP reports whether a lease of the queue protocol runs.
func (l *lease) heldByHTTP(now int64) bool {
	return l.consumer == 0 && l.state == leased && l.deadline > now
}

// newChunk and dropChunk keep the order of the chunks.
func (g *group) newChunk(key uint64) {
	if n := len(g.order); n == 0 || g.order[n-1] < key {
		g.order = append(g.order, key)
		return
	}
	i, _ := slices.BinarySearch(g.order, key)
	g.order = slices.Insert(g.order, i, key)
}

func (g *group) dropChunk(key uint64) {
	if i, ok := slices.BinarySearch(g.order, key); ok {
		g.order = slices.Delete(g.order, i, i+1)
	}
}

// findID returns the pending entry with that ID, nil if there is none.
func (g *group) findID(id StreamID, now int64) (uint64, *lease) {
	return g.findWith(id, func(_ uint64, l *lease) bool { return g.pends(l, now) })
}

// findWith returns the entry of the set with that ID that is as wanted, nil if there is none.
func (g *group) findWith(id StreamID, wanted func(off uint64, l *lease) bool) (uint64, *lease) {
	k := sort.Search(len(g.order), func(i int) bool { return id.less(g.chunks[g.order[i]].slots[0].stream) }) - 1
	if k >= 0 {
		key := g.order[k]
		s := g.chunks[key].slots
		i := sort.Search(len(s), func(i int) bool { return !s[i].stream.less(id) })
		for ; i < len(s) && s[i].stream == id; i++ {
			if off := key<<chunkShift | uint64(s[i].low); s[i].state != slotFree && wanted(off, &s[i]) {
				return off, &s[i]
			}
		}
	}
	if g.topic.rewound { // IDs may not rise with the offsets
		for _, key := range g.order {
			s := g.chunks[key].slots
			for i := range s {
				if off := key<<chunkShift | uint64(s[i].low); s[i].stream == id && s[i].state != slotFree && wanted(off, &s[i]) {
					return off, &s[i]
				}
			}
		}
	}
	return 0, nil
}

// eachFrom visits the pending entries with IDs not below from in order, those of one consumer if c is not nil, until
// visit returns false. visit may remove the entry it is given, and no other.
func (g *group) eachFrom(from StreamID, c *consumer, now int64, visit func(off uint64, l *lease) bool) {
	k := 0
	if !g.topic.rewound {
		k = max(0, sort.Search(len(g.order), func(i int) bool { return from.less(g.chunks[g.order[i]].slots[0].stream) })-1)
	}
	for _, key := range slices.Clone(g.order[k:]) {
		ch := g.chunks[key]
		if c != nil && c.num != 0 && ch.who&(1<<(c.num&63)) == 0 {
			continue
		}
		s := ch.slots
		i := 0
		if !g.topic.rewound && len(s) > 0 && s[0].stream.less(from) {
			i = sort.Search(len(s), func(i int) bool { return !s[i].stream.less(from) })
		}
		for lows := s; i < len(lows); i++ {
			// Removing an entry may pack the chunk's slots into their own memory: they are looked at by offset.
			low := lows[i].low
			l := &lows[i]
			if !g.pends(l, now) || l.stream.less(from) || c != nil && l.consumer != c.num {
				continue
			}
			n := len(ch.slots)
			if !visit(key<<chunkShift|uint64(low), l) {
				return
			}
			if len(ch.slots) != n {
				lows = ch.slots
				i = sort.Search(len(lows), func(i int) bool { return lows[i].low > low }) - 1
			}
			if g.chunks[key] != ch {
				break
			}
		}
	}
}

// take gives an entry of the set to a consumer, as of a time, with a count.
func (g *group) take(off uint64, l *lease, c *consumer, granted, deadline int64, count uint32) {
	if l.state == leased && l.flags&flagLapsed == 0 {
		g.inflight--
	}
	if l.state == settledAhead {
		g.settled--
	}
	g.own(off, l, c)
	g.epoch++
	l.epoch = g.epoch
	l.granted, l.deadline, l.count = granted, deadline, count
	l.base = min(l.base, count) // XCLAIM RETRYCOUNT may set the count back
	l.state, l.flags, l.routed = leased, 0, false
	g.inflight++
	g.touch(off)
	g.pushPending(timer{l.wake(), off})
}

// put puts an entry into the set that is not in it.
func (g *group) put(off, dep uint64, stream StreamID, expiry int64) *lease {
	l := g.insert(off, dep)
	l.stream, l.expiry = stream, expiry
	if expiry != never {
		g.expiring.push(timer{expiry, off})
	}
	return l
}

// countAhead counts the entries that no cursor has passed.
func (g *group) countAhead() {
	g.ahead = 0
	g.each(func(off uint64, l *lease) {
		if !g.passed(off, l.dep) {
			g.ahead++
		}
	})
}

// rewind moves the cursor back.
func (g *group) rewind(next uint64) {
	g.next = next
	g.reopen()
	g.countAhead()
	g.rebuild()
	g.cur = nil
	g.dirty = true
}

// drop takes an entry out of the set by XACK or because it is gone. One that the queue protocol received by its ID
// before the cursor came to it stays noted as settled; what Valkey made pending there (XCLAIM FORCE, XGROUP SETID
// back) is given again by ">", as there.
func (g *group) drop(off uint64, l *lease) {
	if !g.passed(off, l.dep) && l.consumer == 0 {
		g.settleAhead(off, l)
		return
	}
	g.remove(off, l)
}

// unsettledLimit bounds the set of a group.
func (e *Engine) unsettledLimit(g *group) int {
	if g.valkey {
		return e.valkeyMax
	}
	return e.unsettledMax
}

// holes reports whether entries between from and the end of the stream were deleted one by one.
func (t *topic) holes(first, from StreamID, length uint64) bool {
	return length > 0 && t.maxDeleted != (StreamID{}) && !t.maxDeleted.less(first) && !t.maxDeleted.less(from)
}

// counter estimates how many entries were ever added up to id, negative if that cannot be told. first is the ID of
// the first entry that exists.
func (t *topic) counter(id, first StreamID, length uint64) int64 {
	switch cmp := id.Compare(t.last); {
	case t.added == 0:
		return 0
	case length == 0 && cmp <= 0, cmp == 0:
		return int64(t.added)
	case cmp > 0:
		return -1
	case id != StreamID{} && id.less(t.maxDeleted):
		return -1
	case t.maxDeleted == (StreamID{}) || t.maxDeleted.less(first):
		switch id.Compare(first) {
		case -1:
			return int64(t.added - length)
		case 0:
			return int64(t.added-length) + 1
		}
	}
	return -1
}

// streamShape is what the counters of groups depend on.
type streamShape struct {
	first  StreamID
	length uint64
}

func (e *Engine) shape(t *topic, now int64) (s streamShape, err error) {
	if s.length, err = e.length(t, now); err != nil || s.length == 0 {
		return s, err
	}
	b, i, err := e.firstLive(t, nil, t.first, now, false)
	if err != nil || b == nil {
		return s, err
	}
	s.first = b.streamOf(i)
	return s, nil
}

// countRead keeps a group's entries-read when the entry id is delivered, which is above its position.
func (e *Engine) countRead(g *group, id StreamID, s streamShape) {
	t := g.topic
	if g.entriesRead >= 0 && !g.pos.less(s.first) && !t.holes(s.first, g.pos, s.length) {
		g.entriesRead++
	} else if t.added > 0 {
		g.entriesRead = t.counter(id, s.first, s.length)
	}
}

// lag is how many entries the group has not been given, negative if that cannot be told.
func (e *Engine) lag(g *group, s streamShape) int64 {
	t := g.topic
	switch {
	case t.added == 0 || s.length == 0:
		return 0
	case g.pos.less(s.first) && t.maxDeleted.less(s.first):
		return int64(s.length)
	case g.entriesRead >= 0 && !t.holes(s.first, g.pos, s.length):
		return int64(t.added) - g.entriesRead
	}
	if n := t.counter(g.pos, s.first, s.length); n >= 0 {
		return int64(t.added) - n
	}
	return -1
}

// setPosition puts a group's cursor behind id.
//
// The group is folded first: what was spent by now is behind the cursor that it had, whenever that is noticed.
func (e *Engine) setPosition(g *group, id StreamID) error {
	t := g.topic
	e.fold(g)
	next := t.next
	if id.less(t.last) {
		if above, ok := StreamID.Next(id); ok {
			b, i, err := e.from(t, above, e.stamp.Cluster)
			if err != nil {
				return err
			}
			if b != nil {
				next = b.base + uint64(i)
			}
		}
	}
	g.pos = id
	if next < g.next {
		g.rewind(next)
	} else {
		g.advance(next)
		for dep, p := range g.parts {
			g.pass(dep, p, next)
			for i := range p.open {
				if s := &p.open[i]; s.after.less(id) {
					s.after = id
				}
			}
		}
	}
	g.dirty = true
	return nil
}
