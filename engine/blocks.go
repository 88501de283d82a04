package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sort"
	"sync"

	"github.com/cockroachdb/pebble/v2"

	"tercet.dev/tercet/internal/errs"
)

// topic is one topic's log and groups.
type topic struct {
	name string
	inc  uint64
	// next is the offset of the next message, last the highest stream ID given out.
	next uint64
	last StreamID
	// published and bytes count everything ever published.
	published, bytes uint64
	groups           map[string]*group
	byInc            map[uint64]*group
	dirty            bool
	streamPart

	// What follows is memory of this node alone.

	open     *block // the block of the entry being applied
	staged   []stagedMessage
	maturing *block
	segs     []segment
	// recent are the blocks whose entries are kept in memory, from head on, without gaps.
	recent   []*block
	head     int
	settings TopicSettings
	// first is the offset below which everything was removed explicitly. Delayed messages published before
	// firstIndex, or in that entry before position firstPos, went with it.
	first, firstIndex uint64
	firstPos          uint32
	// keySpace is what idempotency keys are hashed with besides, 0 for the incarnation.
	keySpace uint64
	// delayed counts messages that are not visible yet.
	delayed uint64
	// gone is a cache: all below it has expired as of the last applied stamp.
	gone uint64
	// keptRows are the copies of parked messages that are stored, with the uploads of large ones.
	keptRows map[uint64]uint64
	// cut is where stored rows may be removed up to with the next checkpoint, by an explicit removal.
	cut    floor
	floor  floor
	parked []*group
}

// segment is a range of an entry that holds consecutive records.
type segment struct{ from, to uint32 }

func newTopic(name string, inc uint64) *topic {
	return &topic{name: name, inc: inc, groups: make(map[string]*group), byInc: make(map[uint64]*group)}
}

func (e *Engine) addGroup(t *topic, g *group) {
	t.groups[g.name] = g
	t.byInc[g.inc] = g
	g.pool = &e.slots
	if n := len(e.freeGroups); n > 0 {
		g.number = e.freeGroups[n-1]
		e.freeGroups = e.freeGroups[:n-1]
		e.groups[g.number] = g
		return
	}
	g.number = uint64(len(e.groups))
	e.groups = append(e.groups, g)
}

// inMemory returns the block in memory that holds off, or the first behind it.
func (t *topic) inMemory(off uint64) *block {
	live := t.recent[t.head:]
	if n := len(live); n > 0 && off < live[n-1].end() {
		if off >= live[n-1].base {
			return live[n-1]
		}
		return live[sort.Search(n, func(i int) bool { return live[i].end() > off })]
	}
	if t.open != nil && off < t.open.end() {
		return t.open
	}
	return nil
}

// memoryBase is the first offset whose block is in memory.
func (t *topic) memoryBase() uint64 {
	if t.head < len(t.recent) {
		return t.recent[t.head].base
	}
	if t.open != nil {
		return t.open.base
	}
	return t.next
}

// recentEntry is an entry kept in memory with the blocks made from it.
type recentEntry struct {
	bytes  int64
	blocks []*block
}

// keep puts the blocks of an entry into the ring and drops the oldest beyond its size.
func (e *Engine) keep(entry []byte, blocks []*block) {
	if cap(entry) >= keepCopied {
		var bytes uint64
		for _, b := range blocks {
			if !b.own {
				bytes += b.bytes
			}
		}
		if bytes < uint64(cap(entry))/2 {
			entry = e.compactRecords(blocks, bytes)
		}
	}
	var records int64
	for _, b := range blocks {
		t := e.byInc[b.topic]
		t.recent = append(t.recent, b)
		records += 4 * int64(cap(b.starts))
		if b.own {
			records += int64(cap(b.data))
		}
	}
	e.recent = append(e.recent, recentEntry{bytes: int64(cap(entry)) + records, blocks: blocks})
	e.recentBytes += int64(cap(entry)) + records
	e.trimRecent()
}

// keepCopied is the size from which on an entry is not kept for the sake of a few messages in it: parts of large messages come in
// such entries, and would be kept with every small message that came beside them.
const keepCopied = 64 << 10

// compactRecords lets the blocks of the entry being applied have copies of their records in place of the entry.
func (e *Engine) compactRecords(blocks []*block, bytes uint64) []byte {
	out := make([]byte, 0, bytes)
	for _, b := range blocks {
		if b.own {
			continue
		}
		i := 0
		for _, s := range e.byInc[b.topic].segs {
			for ; i < len(b.starts) && b.starts[i] < s.to; i++ {
				b.starts[i] += uint32(len(out)) - s.from
			}
			out = append(out, b.data[s.from:s.to]...)
		}
		b.data = out[:len(out):cap(out)]
	}
	return out
}

// trimRecent drops the oldest entries beyond the ring's size.
func (e *Engine) trimRecent() {
	for e.recentBytes > e.o.RecentBytes && e.recentHead < len(e.recent) {
		old := &e.recent[e.recentHead]
		for _, b := range old.blocks {
			t := e.byInc[b.topic]
			if t == nil {
				continue // deleted meanwhile
			}
			t.recent[t.head] = nil
			t.head++
			if t.head > 32 && t.head > len(t.recent)/2 {
				n := copy(t.recent, t.recent[t.head:])
				clear(t.recent[n:])
				t.recent, t.head = t.recent[:n], 0
			}
		}
		e.recentBytes -= old.bytes
		*old = recentEntry{}
		e.recentHead++
	}
	if e.recentHead > 64 && e.recentHead > len(e.recent)/2 {
		n := copy(e.recent, e.recent[e.recentHead:])
		clear(e.recent[n:])
		e.recent, e.recentHead = e.recent[:n], 0
	}
}

// headerCache holds decoded headers of stored blocks, the oldest dropped first.
type headerCache struct {
	mu    sync.Mutex
	m     map[headerKey]*block
	order []headerKey
	head  int
	bytes int64
	limit int64
}

type headerKey struct{ topic, base uint64 }

func headerBytes(b *block) int64 {
	return 312 + 4*int64(cap(b.retention)+cap(b.sizes)) + 8*int64(len(b.runs)) + 16*int64(cap(b.ids))
}

func (c *headerCache) get(topic, base uint64) *block {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.m[headerKey{topic, base}]
}

func (c *headerCache) put(b *block) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := headerKey{b.topic, b.base}
	if _, ok := c.m[k]; ok {
		return
	}
	if c.m == nil {
		c.m = make(map[headerKey]*block)
	}
	c.m[k] = b
	c.order = append(c.order, k)
	c.bytes += headerBytes(b)
	for c.bytes > c.limit && c.head < len(c.order) {
		old := c.order[c.head]
		c.bytes -= headerBytes(c.m[old])
		delete(c.m, old)
		c.head++
	}
	if c.head > 256 && c.head > len(c.order)/2 {
		n := copy(c.order, c.order[c.head:])
		c.order, c.head = c.order[:n], 0
	}
}

func (c *headerCache) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.m, c.order, c.head, c.bytes = nil, nil, 0, 0
}

// readAhead is how many headers one visit to the store brings in.
const readAhead = 32

// stored returns the stored block that holds off, or the first behind it and below bound, nil without one.
// bound is never above the topic's next offset of the entry being applied, which is what makes rows of later
// entries invisible (invariant I6).
func (e *Engine) stored(t *topic, off, bound uint64) (found *block, err error) {
	defer e.damaged(&err)
	off = max(off, t.floor.offset)
	if e.seeLaterRows {
		bound = 1<<64 - 1
	}
	if off >= bound {
		return nil, nil
	}
	if b := e.headers.get(t.inc, off); b != nil {
		return b, nil
	}
	it, err := e.db.NewIter(&pebble.IterOptions{
		LowerBound: e.keys.key(rowBlock, t.inc, t.floor.offset), UpperBound: e.keys.key(rowBlock, t.inc, bound)})
	if err != nil {
		return nil, fmt.Errorf("engine: reading block headers: %w", err)
	}
	defer func() { _ = it.Close() }()
	if it.SeekLT(e.keys.key(rowBlock, t.inc, off+1)) {
		b, err := e.headerAt(t, it)
		if err != nil {
			return nil, err
		}
		if b.end() > off {
			found = b
			e.headers.put(b)
		}
	}
	if it.Error() == nil && found == nil && it.SeekGE(e.keys.key(rowBlock, t.inc, off+1)) {
		if found, err = e.headerAt(t, it); err != nil {
			return nil, err
		}
		e.headers.put(found)
	}
	for n := 1; found != nil && n < readAhead && it.Next(); n++ {
		b, err := e.headerAt(t, it)
		if err != nil {
			return nil, err
		}
		e.headers.put(b)
	}
	if err := it.Error(); err != nil {
		return nil, fmt.Errorf("engine: reading block headers of topic %q: %w", t.name, err)
	}
	return found, nil
}

func (e *Engine) headerAt(t *topic, it *pebble.Iterator) (*block, error) {
	base, _ := keyPart(it.Key(), 1)
	v, err := it.ValueAndErr()
	if err != nil {
		return nil, fmt.Errorf("engine: reading a block header of topic %q: %w", t.name, err)
	}
	b, err := parseBlock(t.inc, base, v)
	if err != nil {
		return nil, fmt.Errorf("engine: block header of topic %q at offset %d: %w", t.name, base, err)
	}
	if !e.seeLaterRows && b.index > e.index {
		return nil, fmt.Errorf("engine: block of entry %d in view of entry %d", b.index, e.index)
	}
	return b, nil
}

// blockFor returns the block that holds off, or the first behind it, nil at the end of the log.
func (e *Engine) blockFor(t *topic, off uint64) (*block, error) {
	if off >= t.next && !e.seeLaterRows {
		return nil, nil
	}
	base := t.memoryBase()
	if off < base || e.seeLaterRows && off >= t.next {
		b, err := e.stored(t, off, base)
		if b != nil || err != nil {
			return b, err
		}
	}
	return t.inMemory(off), nil
}

// firstLive returns the first message at or behind off that has not expired at now, with its block and place
// in it; a nil block means there is none. hint is a block to look into first. advance allows remembering
// that everything below has expired; only apply, whose now is the entry's stamp, may.
func (e *Engine) firstLive(t *topic, hint *block, off uint64, now int64, advance bool) (*block, uint32, error) {
	off = max(off, t.gone, t.first)
	dead := advance && off == max(t.gone, t.first) // everything below off has expired
	for off < t.next || e.seeLaterRows {
		b := hint
		if b == nil || off < b.base || off >= b.end() {
			var err error
			if b, err = e.blockFor(t, off); err != nil {
				return nil, 0, err
			}
			if b == nil {
				break
			}
		}
		if b.lastExpiry > now {
			for i := uint32(max(off, b.base) - b.base); i < b.count; i++ {
				if b.expiry(i) > now && (t.marked == 0 || !t.removed(b.base+uint64(i))) {
					return b, i, nil
				}
			}
			dead = false // not all of the block is behind us for good: off may lie within it
		} else if dead && b != t.open {
			t.gone = b.end()
		}
		off = b.end()
	}
	return nil, 0, nil
}

// blockAt returns the block of a message that is known to be stored.
func (e *Engine) blockAt(t *topic, hint *block, off uint64) (*block, uint32, error) {
	if hint != nil && off >= hint.base && off < hint.end() {
		return hint, uint32(off - hint.base), nil
	}
	b, err := e.blockFor(t, off)
	if err != nil {
		return nil, 0, err
	}
	if b == nil || off < b.base {
		if b, err = e.keptBlock(t, off); err != nil {
			return nil, 0, err
		}
	}
	return b, uint32(off - b.base), nil
}

// byID finds a message of the topic by its ID. A nil block means it is not stored (any more).
func (e *Engine) byID(t *topic, id MessageID) (*block, uint32, error) {
	if id.Shard != e.o.Shard || id.Kind == KindDuplicate {
		return nil, 0, nil
	}
	if id.Kind == KindDelayed {
		off, ok, err := e.placeOf(t, id)
		if err != nil || !ok || t.removed(off) {
			return nil, 0, err
		}
		b, err := e.blockFor(t, off)
		if err != nil || b == nil || off < b.base || b.refs == nil {
			return nil, 0, err
		}
		return b, uint32(off - b.base), nil
	}
	if t.open != nil && id.Index == t.open.index {
		i, ok := t.open.byPos(id.Pos)
		if !ok || t.removed(t.open.base+uint64(i)) {
			return nil, 0, nil
		}
		return t.open, i, nil
	}
	// Rows of this entry and later ones may be there from before a crash: they do not exist yet.
	if id.Index >= e.index && !e.seeLaterRows && (e.applying || id.Index > e.index) {
		return nil, 0, nil
	}
	live := t.recent[t.head:]
	var b *block
	if n := len(live); n > 0 && id.Index >= live[0].index {
		k := sort.Search(n, func(i int) bool { return live[i].index >= id.Index })
		if k < n && live[k].refs != nil {
			k++ // what matured with an entry stands before what the entry brought
		}
		if k == n || live[k].index != id.Index {
			if !e.seeLaterRows {
				return nil, 0, nil
			}
		} else {
			b = live[k]
		}
	}
	if b == nil {
		v, closer, err := e.db.Get(e.keys.key(rowByIndex, t.inc, id.Index))
		if errors.Is(err, pebble.ErrNotFound) {
			return nil, 0, nil
		}
		if err != nil {
			return nil, 0, fmt.Errorf("engine: reading the index row of entry %d: %w", id.Index, err)
		}
		r := reader{b: v}
		base := r.uvarint()
		bad := r.err()
		_ = closer.Close()
		if bad != nil {
			return nil, 0, fmt.Errorf("engine: index row of entry %d: %w", id.Index, bad)
		}
		if b, err = e.blockFor(t, base); err != nil {
			return nil, 0, err
		}
		if b == nil || b.base != base {
			return nil, 0, nil // expired and removed in part: the header went with the same checkpoint
		}
	}
	i, ok := b.byPos(id.Pos)
	if !ok || t.removed(b.base+uint64(i)) {
		return nil, 0, nil
	}
	return b, i, nil
}

// contentType is string(b) without an allocation for those that most messages have.
func contentType(b []byte) string {
	switch string(b) {
	case "":
		return ""
	case "application/json":
		return "application/json"
	case "application/octet-stream":
		return "application/octet-stream"
	case "text/plain":
		return "text/plain"
	}
	return string(b)
}

// fill puts the contents of a record into a delivery.
func (d *Delivery) fill(rec *record) {
	if d.copy != nil {
		d.copy.take(rec)
		d.Body = []byte{}
		return
	}
	if d.asFields {
		d.fields, d.Body = rec.fields(), []byte{}
		return
	}
	d.ContentType = contentType(rec.contentType)
	d.Headers = rec.decodeHeaders()
	d.Deployment = string(rec.deployment)
	d.Body = rec.body
	if rec.flags&recordLarge != 0 {
		l, _ := parseLarge(rec.body)
		l.Topic = d.Receipt.Topic
		d.Large, d.Body = &l, []byte{}
	}
	if rec.flags&recordFields != 0 {
		d.ContentType, d.Body = fieldsBody(decodeFields(rec.body))
	}
}

// Load fills the contents of deliveries that Apply granted or a Query found. It may be called from any
// goroutine. Bodies of recent messages point into the entry they came in and must not be changed. A message
// that expired and was removed in the meantime is marked Gone, and Load then returns errs.MessageNotFound
// after it has loaded the others.
func (e *Engine) Load(ds []Delivery) error {
	e.dbMu.RLock()
	defer e.dbMu.RUnlock()
	return e.loadAll(ds)
}

// loadAll is Load with dbMu held.
func (e *Engine) loadAll(ds []Delivery) error {
	if err := e.Err(); err != nil {
		return err
	}
	e.mu.RLock()
	cold, err := e.loadRecent(ds)
	e.mu.RUnlock()
	if !cold || err != nil {
		return err
	}
	return e.loadStored(ds)
}

// loadRecent loads the deliveries whose entries are in memory, with mu held. It reports whether there are others.
func (e *Engine) loadRecent(ds []Delivery) (cold bool, err error) {
	for i := range ds {
		d := &ds[i]
		t := e.byInc[d.Receipt.Topic]
		if d.ID.Kind == KindDelayed || t == nil || d.Receipt.Offset < t.memoryBase() {
			cold = true
			continue
		}
		b := t.inMemory(d.Receipt.Offset)
		if b == nil || b.data == nil || d.Receipt.Offset < b.base {
			cold = true
			continue
		}
		var rec record
		r := reader{b: b.data[b.starts[d.Receipt.Offset-b.base]:]}
		parseRecord(&r, &rec)
		if r.bad {
			return false, fmt.Errorf("engine: record at offset %d of topic %q: %w", d.Receipt.Offset, t.name, errMalformed)
		}
		d.fill(&rec)
		if d.Body == nil {
			d.Body = []byte{}
		}
	}
	return cold, nil
}

// loadStored loads the deliveries that have no body yet from the store.
func (e *Engine) loadStored(ds []Delivery) (err error) {
	defer e.damaged(&err)
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: e.keys.key(rowBlock), UpperBound: keyspaceEnd(e.keys, rowBlock)})
	if err != nil {
		return fmt.Errorf("engine: reading messages: %w", err)
	}
	defer func() { _ = it.Close() }()
	gone := false
	var (
		topic, base, count uint64 // what rest has been read of: record count of the block at base
		rest               reader
		at                 uint64 // index of the record at the head of rest
		valid              bool
		key                []byte
	)
	for i := range ds {
		d := &ds[i]
		if d.Body != nil {
			continue
		}
		if d.ID.Kind == KindDelayed {
			ok, err := e.loadStaged(d)
			if err == nil && !ok {
				ok, err = e.loadKept(d.Receipt.Topic, d.Receipt.Offset, d, true)
			}
			if err != nil {
				return err
			}
			d.Gone = !ok
			gone = gone || !ok
			continue
		}
		off := d.Receipt.Offset
		if !valid || topic != d.Receipt.Topic || off < base+at || off >= base+count {
			key = e.keys.append(key[:0], rowBlock, d.Receipt.Topic, off+1)
			valid = it.SeekLT(key)
			if !valid {
				if err := it.Error(); err != nil {
					return fmt.Errorf("engine: reading messages: %w", err)
				}
				ok, err := e.loadKept(d.Receipt.Topic, off, d, true)
				if err != nil {
					return err
				}
				d.Gone = !ok
				gone = gone || !ok
				continue
			}
			topic, _ = keyPart(it.Key(), 0)
			base, _ = keyPart(it.Key(), 1)
			v, err := it.ValueAndErr()
			if err != nil {
				return fmt.Errorf("engine: reading the block at offset %d: %w", base, err)
			}
			b, err := parseBlock(topic, base, v)
			if err != nil {
				return fmt.Errorf("engine: block header of topic %d at offset %d: %w", topic, base, err)
			}
			v = nil
			if topic == d.Receipt.Topic && off < b.end() && b.refs == nil {
				if v, err = e.payload(topic, base, b.at); err != nil {
					return err
				}
			}
			rest, at = reader{b: v}, 0
			if v == nil { // no block has it any more
				ok, err := e.loadKept(d.Receipt.Topic, off, d, true)
				if err != nil {
					return err
				}
				valid, d.Gone = false, !ok
				gone = gone || !ok
				continue
			}
			if ver := rest.u8(); ver != rowVersion {
				return fmt.Errorf("engine: payload of topic %d at offset %d: %w", topic, base, errMalformed)
			}
			count = rest.uvarint()
			if topic != d.Receipt.Topic || off-base >= count {
				ok, err := e.loadKept(d.Receipt.Topic, off, d, true)
				if err != nil {
					return err
				}
				valid, d.Gone = false, !ok
				gone = gone || !ok
				continue
			}
		}
		for ; at < off-base; at++ {
			rest.bytes()
		}
		if len(rest.b) > 0 && rest.b[0] == 0 { // dropped when the block was rewritten
			ok, err := e.loadKept(d.Receipt.Topic, off, d, true)
			if err != nil {
				return err
			}
			d.Gone = !ok
			gone = gone || !ok
			continue
		}
		var rec record
		r := reader{b: rest.b, bad: rest.bad}
		parseRecord(&r, &rec)
		if r.bad {
			return fmt.Errorf("engine: record %d of the block at offset %d: %w", off-base, base, errMalformed)
		}
		d.fill(&rec)
		// A delivery must not hold on to its whole block.
		d.Body = append(make([]byte, 0, len(d.Body)), d.Body...)
		d.fields = cloneFields(d.fields)
	}
	if gone {
		return errs.New(errs.MessageNotFound, "a message expired while it was being delivered")
	}
	return nil
}

// payloadHead is what stands before the records of a payload row.
func payloadHead(dst []byte, count uint32) []byte {
	return binary.AppendUvarint(append(dst, rowVersion), uint64(count))
}
