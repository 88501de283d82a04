package engine

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"sort"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// COPY of a stream. The copy is a topic of its own: what exists of the old one becomes one block, whose records are
// made here and stand in no entry, and its groups get their pending lists anew. All of it is read and written while
// applying, which is why it is bounded.
//
// Pending entries that the stream has no more keep their IDs: each has a place in the block, between its neighbours, and is
// removed there at once.

// copyItem is an entry of the copy.
type copyItem struct {
	id     StreamID
	off    uint64 // in the topic that is copied
	dep    uint64
	expiry int64
	block  *block // nil for what is pending and no more in the stream
	at     uint32
}

// copyPlan is what a copy consists of, in the order of IDs.
type copyPlan struct {
	items []copyItem
	// live are the places of those that the stream has, byOff the places of all in the order of their offsets there.
	live, byOff []int
}

// copied is where in the copy the entries begin that had at least an offset.
func (p *copyPlan) copied(off uint64) uint64 {
	if off == endless {
		return off
	}
	if k := sort.Search(len(p.live), func(n int) bool { return p.items[p.live[n]].off >= off }); k < len(p.live) {
		return uint64(p.live[k])
	}
	return uint64(len(p.items))
}

// place is the place of the entry that had an offset, false if the copy has no such entry.
func (p *copyPlan) place(off uint64) (int, bool) {
	k := sort.Search(len(p.byOff), func(n int) bool { return p.items[p.byOff[n]].off >= off })
	if k == len(p.byOff) || p.items[p.byOff[k]].off != off {
		return 0, false
	}
	return p.byOff[k], true
}

// recordCopy asks Load for a record as a copy of its message has it: without delay, key and retention.
type recordCopy struct {
	retention uint32 // that of the copy
	inner     []byte // the record's bytes behind its size, up to the body
	body      []byte
	large     *Large
}

// take notes a record that was loaded. Nothing of it points into the record afterwards.
func (c *recordCopy) take(rec *record) {
	flags := rec.flags & (recordDeployment | recordHeaders | recordFields | recordLarge)
	headers := rec.headerBytes[:max(0, len(rec.headerBytes)-len(rec.body))]
	b := make([]byte, 0, 32+len(rec.deployment)+len(rec.contentType)+len(headers)+len(rec.body))
	b = append(b, flags)
	b = binary.AppendUvarint(b, uint64(c.retention))
	if flags&recordDeployment != 0 {
		b = appendBytes(b, rec.deployment)
	}
	b = appendBytes(b, rec.contentType)
	if flags&recordHeaders != 0 {
		b = binary.AppendUvarint(b, uint64(rec.headers))
		b = append(b, headers...)
	}
	c.inner = b
	if l, ok := parseLarge(rec.body); ok && flags&recordLarge != 0 {
		c.large = &l
		return
	}
	c.body = append(b[len(b):], rec.body...)
}

func (c *recordCopy) size() int64 {
	n := int64(len(c.inner) + len(c.body))
	if c.large != nil {
		n += c.large.Bytes
	}
	return n
}

func (c *recordCopy) append(b []byte) []byte {
	body := c.body
	if c.large != nil {
		body = c.large.append(nil)
	}
	b = binary.AppendUvarint(b, uint64(len(c.inner)+len(body)))
	b = append(b, c.inner...)
	return append(b, body...)
}

// applyKeyCopy is COPY.
func (e *Engine) applyKeyCopy(c *KeyCopy, res *Result) error {
	if !e.exists(c.From) || c.From == c.To || e.exists(c.To) && !c.Replace {
		return nil
	}
	if len(c.To) == 0 || len(c.To) > limits.KeyBytesMax {
		res.Code = errs.InvalidName
		return nil
	}
	if s := e.strings[c.From]; s != nil {
		set := &StringSet{Key: c.To, Value: s.value, When: Always}
		if s.expireAt != 0 {
			set.By = Deadline{Set: true, Absolute: true, Ms: e.stamp.Wall + s.expireAt - e.stamp.Cluster}
		}
		e.applyStringSet(set, res)
		return nil
	}
	if e.topics[c.To] == nil && len(e.topics) >= limits.TopicsMax {
		res.Code = errs.TooManyTopics
		return nil
	}
	src := e.topics[c.From]
	for _, inc := range sortedKeys(src.byInc) {
		e.fold(src.byInc[inc])
	}
	plan, err := e.copyPlan(src)
	if err != nil {
		return err
	}
	if plan == nil {
		res.Code = errs.CopyTooLarge
		return nil
	}
	records, bytes, err := e.copyRecords(src, plan.items)
	switch {
	case err != nil:
		return err
	case bytes > limits.CopyBytesMax:
		res.Code = errs.CopyTooLarge
		return nil
	case e.copied > 0 && e.copied+bytes > limits.CopyBytesMax:
		res.Code = errs.Overloaded // with what else the entry copies
		return nil
	}
	e.copied += bytes
	e.dropKey(c.To)
	t, code := e.topicNamed([]byte(c.To))
	if t == nil {
		return fmt.Errorf("copying a stream: %s", code) // it was looked at before
	}
	t.settings, t.rewound = src.settings, src.rewound
	if err := e.copyEntries(t, src, plan.items, records); err != nil {
		return err
	}
	t.last, t.added, t.maxDeleted = src.last, src.added, src.maxDeleted
	t.expireAt, t.expireWall = src.expireAt, src.expireWall
	e.expires(t.inc, t.name, t.expireAt)
	for _, inc := range sortedKeys(src.byInc) {
		if err := e.copyGroup(t, src.byInc[inc], plan); err != nil {
			return err
		}
	}
	t.dirty = true
	e.catchUp(t)
	res.Count = 1
	return nil
}

// copyPlan lists what the copy of a topic consists of; nil if that is too much. Its groups are folded.
func (e *Engine) copyPlan(src *topic) (*copyPlan, error) {
	now := e.stamp.Cluster
	var items []copyItem
	bytes := uint64(0)
	var b *block
	var i uint32
	var err error
	for off := uint64(0); ; off++ {
		if b, i, err = e.firstLive(src, b, off, now, false); err != nil {
			return nil, err
		}
		if b == nil {
			break
		}
		off = b.base + uint64(i)
		items = append(items, copyItem{id: b.streamOf(i), off: off, dep: b.dep(i), expiry: b.expiry(i), block: b, at: i})
		bytes += b.sizeOf(i)
		if len(items) > limits.CopyEntriesMax || bytes > 2*limits.CopyBytesMax {
			return nil, nil
		}
	}
	count := len(items)
	missing := make(map[uint64]bool)
	for _, inc := range sortedKeys(src.byInc) {
		g := src.byInc[inc]
		if count += len(g.byNum) + g.live + 1; count > 2*limits.CopyEntriesMax {
			return nil, nil
		}
		for _, key := range g.order {
			s := g.chunks[key].slots
			for k := range s {
				off := key<<chunkShift | uint64(s[k].low)
				if s[k].state == slotFree || missing[off] || !src.removed(off) || !g.pends(&s[k], now) {
					continue
				}
				missing[off] = true
				items = append(items, copyItem{id: s[k].stream, off: off, dep: s[k].dep, expiry: s[k].expiry})
			}
		}
	}
	p := &copyPlan{items: items, byOff: make([]int, len(items))}
	if len(missing) > 0 {
		slices.SortFunc(items, func(a, b copyItem) int { return cmp.Or(a.id.Compare(b.id), cmp.Compare(a.off, b.off)) })
	}
	for k := range items {
		p.byOff[k] = k
		if items[k].block != nil {
			p.live = append(p.live, k)
		}
	}
	slices.SortFunc(p.byOff, func(a, b int) int { return cmp.Compare(items[a].off, items[b].off) })
	return p, nil
}

// copyRecords loads the records of a copy and counts their bytes, those of the parts of large messages included.
func (e *Engine) copyRecords(src *topic, items []copyItem) (records []recordCopy, bytes int64, err error) {
	now := e.stamp.Cluster
	records = make([]recordCopy, len(items))
	ds := make([]Delivery, 0, len(items))
	for k := range items {
		it, c := &items[k], &records[k]
		if it.expiry != never {
			c.retention = uint32((it.expiry - now + 999) / 1000)
		}
		if it.block == nil {
			c.take(&record{flags: recordFields, body: appendFields(nil, nil)})
			continue
		}
		d := Delivery{Receipt: Receipt{Topic: src.inc, Offset: it.off}, copy: c}
		if s := e.streamEntry(it.block, it.at); s.stagedIndex != 0 {
			d.ID = MessageID{Index: s.stagedIndex, Pos: s.stagedPos, Kind: KindDelayed}
		}
		ds = append(ds, d)
	}
	cold, err := e.loadRecent(ds)
	if err == nil && cold {
		err = e.loadStored(ds)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("copying topic %q: %w", src.name, err)
	}
	for k := range records {
		bytes += records[k].size()
	}
	return records, bytes, nil
}

// copyEntries puts the entries of a copy into its block.
func (e *Engine) copyEntries(t, src *topic, items []copyItem, records []recordCopy) error {
	if len(items) == 0 {
		return nil
	}
	b := e.blockOf(t, len(items))
	b.own, b.data = true, nil
	var data []byte
	for k := range items {
		it, c := &items[k], &records[k]
		if c.large != nil {
			if err := e.copyParts(t, src, c); err != nil {
				return err
			}
		}
		start := len(data)
		data = c.append(data)
		b.add(e.pos, c.retention, len(data)-start)
		e.pos++
		b.addID(it.id)
		b.addDep(it.dep)
		b.starts = append(b.starts, uint32(start))
		t.noted(b.expiry(b.count - 1))
		if it.block != nil {
			t.published++
			t.bytes += uint64(len(data) - start)
		}
	}
	b.data = data
	t.next = uint64(len(items))
	for k := range items {
		if items[k].block == nil {
			t.mark(uint64(k))
		}
	}
	return nil
}

// copyParts gives the copy of a large message parts of its own.
func (e *Engine) copyParts(t, src *topic, c *recordCopy) error {
	l := c.large
	e.incarnations++
	from := l.Upload
	l.Upload, l.CRC = e.incarnations, 0
	for n := range l.Parts {
		data, err := e.partOf(src.inc, from, n)
		if err != nil {
			return fmt.Errorf("copying part %d of upload %d: %w", n, from, err)
		}
		l.CRC = crc32.Update(l.CRC, castagnoli, data)
		e.newParts = append(e.newParts, part{t.inc, l.Upload, n, data})
	}
	if c.retention != 0 {
		e.newLarge = append(e.newLarge, largeEnd{t.inc, l.Upload, e.stamp.Cluster + int64(c.retention)*1000})
	}
	return nil
}

// partOf reads a part of a large message while applying.
func (e *Engine) partOf(topic, upload uint64, number uint32) (data []byte, err error) {
	defer e.damaged(&err)
	for i := range e.newParts {
		if p := &e.newParts[i]; p.topic == topic && p.upload == upload && p.number == number {
			return p.data, nil
		}
	}
	if data, err = e.readPart(topic, upload, number); err == nil && data == nil {
		err = errors.New("not stored")
	}
	return data, err
}

// copyGroup gives a copy a group of the topic that it was made from, which is folded.
func (e *Engine) copyGroup(t *topic, from *group, p *copyPlan) error {
	now := e.stamp.Cluster
	e.incarnations++
	g := newGroup(t, from.name, e.incarnations)
	g.pos, g.next, g.epoch = from.pos, p.copied(from.next), from.epoch
	g.delivered, g.redelivered, g.acked = from.delivered, from.redelivered, from.acked
	g.settings = from.settings
	g.settings.ExcludeDeployments = slices.Clone(from.settings.ExcludeDeployments)
	g.compile()
	g.valkey, g.entriesRead, g.consumerCount = from.valkey, from.entriesRead, from.consumerCount
	for _, num := range from.consumerNumbers() {
		k := from.byNum[num]
		g.addConsumer(&consumer{name: k.name, num: k.num, seen: k.seen, active: k.active, dirty: true})
	}
	for dep, old := range from.parts {
		n := &partition{next: p.copied(old.next)}
		for _, s := range old.open {
			s.from, s.to = p.copied(s.from), p.copied(s.to)
			n.open = append(n.open, s)
		}
		if g.parts == nil {
			g.parts = make(map[uint64]*partition, len(from.parts))
		}
		g.parts[dep] = n
	}
	g.countBehind()
	e.addGroup(t, g)
	if err := e.copyLeases(g, from, p, now); err != nil {
		return err
	}
	g.rebuild()
	g.dirty = true
	e.dirtRough.Add(int64(64 + len(g.name) + 48*g.live + 48*len(g.byNum)))
	return nil
}

// copyLeases gives a copied group its unsettled set. What is parked or settled and no more in the stream stays behind.
func (e *Engine) copyLeases(g, from *group, p *copyPlan, now int64) error {
	type placed struct {
		off uint64
		l   lease
	}
	var all []placed
	for _, key := range from.order {
		s := from.chunks[key].slots
		for i := range s {
			off := key<<chunkShift | uint64(s[i].low)
			if s[i].state == slotFree {
				continue
			}
			l, ok := from.view(off, &s[i], now)
			place, there := p.place(off)
			if !ok || !there {
				continue
			}
			it := &p.items[place]
			if it.block == nil && l.idle() {
				continue // another group has it pending
			}
			to := uint64(place)
			l.flags, l.low = 0, uint16(to&chunkMask)
			if it.block != nil && !l.kept && it.expiry != never {
				l.expiry = now + (it.expiry-now+999)/1000*1000 // as the copy's record says
			}
			g.note(to, []byte(from.notes[off]))
			all = append(all, placed{to, l})
		}
	}
	slices.SortFunc(all, func(a, b placed) int { return cmp.Compare(a.off, b.off) })
	for len(all) > 0 {
		key := all[0].off >> chunkShift
		n := sort.Search(len(all), func(i int) bool { return all[i].off>>chunkShift > key })
		c := &chunk{slots: make([]lease, 0, n), live: n, dirty: true}
		for i := range all[:n] {
			c.slots = append(c.slots, all[i].l)
		}
		if err := g.addChunk(key, c); err != nil {
			return err
		}
		all = all[n:]
	}
	return nil
}

// ownRecord moves a record of the entry into the bytes of a block that a copy began.
func (b *block) ownRecord(entry []byte, start, size uint32) uint32 {
	at := uint32(len(b.data))
	b.data = append(b.data, entry[start:start+size]...)
	return at
}
