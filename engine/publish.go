package engine

import (
	"encoding/binary"
	"fmt"
	"math"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// special is what some messages of a publish have.
type special struct {
	delay           uint32 // seconds
	byDefault       bool   // the retention is the topic's default
	key, deployment []byte
}

// applyPublish appends messages to a topic. end is where the command ends in the entry.
func (e *Engine) applyPublish(r *reader, end uint32, res *Result) error {
	name := r.bytes()
	n := r.count(recordBytesMin)
	e.beginPublish()
	var rec record
	for range n {
		size := len(r.b)
		start := end - uint32(size)
		parseRecord(r, &rec)
		if r.bad {
			break
		}
		if code := e.noteRecord(&rec, start, uint32(size-len(r.b))); code != errs.OK && res.Code == errs.OK {
			res.Code = code
		}
		if rec.flags&recordLarge != 0 {
			res.Code = errs.BadRequest
		}
	}
	if r.err() != nil || n == 0 {
		res.Code = errs.BadRequest
	}
	if res.Code != errs.OK {
		return nil
	}
	t, code := e.topicNamed(name)
	if code != errs.OK {
		res.Code = code
		return nil
	}
	return e.publish(t, res)
}

func (e *Engine) beginPublish() {
	e.heads, e.specials = e.heads[:0], e.specials[:0]
}

// noteRecord checks a record by itself and notes it as the next message to be published.
func (e *Engine) noteRecord(rec *record, start, size uint32) (code errs.Code) {
	body := len(rec.body)
	switch {
	case rec.flags&recordLarge != 0:
		l, _ := parseLarge(rec.body)
		body = int(l.Bytes)
		if body > limits.LargeMessageBytesMax {
			code = errs.MessageTooLarge
		}
	case rec.flags&recordFields != 0:
		if body > limits.FieldsBytesMax {
			code = errs.MessageTooLarge
		}
	case body > limits.MessageBytesMax:
		code = errs.MessageTooLarge
	}
	if rec.flags&(recordDelay|recordKey|recordDeployment|recordDefault) != 0 || len(e.specials) > 0 {
		for len(e.specials) < len(e.heads) {
			e.specials = append(e.specials, special{})
		}
		switch {
		case rec.delay > math.MaxUint32, len(rec.key) > limits.IdempotencyKeyBytesMax, len(rec.deployment) > limits.NameBytesMax,
			rec.flags&recordDefault != 0 && rec.retention != 0, rec.delay > rec.retention && rec.retention > 0:
			code = errs.BadRequest
		}
		e.specials = append(e.specials, special{delay: uint32(rec.delay), byDefault: rec.flags&recordDefault != 0, key: rec.key, deployment: rec.deployment})
	}
	e.heads = append(e.heads, recordHeadNote{start: start, size: size, body: uint32(body), retention: uint32(min(rec.retention, math.MaxUint32))})
	return code
}

// publish puts the messages noted into the topic, all or none.
func (e *Engine) publish(t *topic, res *Result) error { return e.publishAt(t, StreamID{}, res) }

// publishAt is publish of one message under a stream ID that is above the topic's last; 0-0 lets the topic choose.
func (e *Engine) publishAt(t *topic, at StreamID, res *Result) error {
	n := len(e.heads)
	if t.settings != (TopicSettings{}) || len(e.specials) > 0 {
		if code, err := e.bound(t); code != errs.OK || err != nil {
			res.Code = code
			return err
		}
	}
	id, ok := t.nextStreamID(uint64(e.stamp.Wall), uint64(n))
	if at != (StreamID{}) {
		id, ok = at, true
	}
	if !ok {
		res.Code = errs.StreamExhausted
		return nil
	}
	// Nothing is refused from here on.
	plain := n
	if len(e.specials) > 0 {
		var err error
		if plain, err = e.judge(t, res); err != nil {
			return err
		}
	}
	p := &res.Published
	p.Shard, p.Index, p.Pos, p.Count = e.o.Shard, e.index, e.pos, uint32(n)
	b := t.open
	if plain > 0 {
		b = e.blockOf(t, plain)
		p.Offset, p.Stream = b.end(), id
	}
	for i := range e.heads {
		h := &e.heads[i]
		if p.Kinds != nil && p.Kinds[i] != KindPlain {
			if p.Kinds[i] == KindDelayed {
				due := e.stamp.Cluster + int64(e.specials[i].delay)*1000
				e.stage(t, stagedMessage{pos: e.pos, start: h.start, size: h.size, due: due, retention: h.retention,
					dep: e.deploymentOf(e.specials[i].deployment)})
			}
			e.pos++
			if p.Kinds[i] == KindDelayed {
				t.published++
				t.bytes += uint64(h.size)
			}
			continue
		}
		b.add(e.pos, h.retention, int(h.size))
		b.addID(id)
		id.Seq++
		if len(e.specials) > 0 {
			b.addDep(e.deploymentOf(e.specials[i].deployment))
		} else if b.deps != nil {
			b.addDep(0)
		}
		if b.own {
			b.starts = append(b.starts, b.ownRecord(e.entry, h.start, h.size))
		} else {
			b.starts = append(b.starts, h.start)
			if k := len(t.segs); k > 0 && t.segs[k-1].to == h.start {
				t.segs[k-1].to = h.start + h.size
			} else {
				t.segs = append(t.segs, segment{h.start, h.start + h.size})
			}
		}
		t.bytes += uint64(h.size)
		t.noted(b.expiry(b.count - 1))
		e.pos++
	}
	t.changed = e.index
	t.dirty = true
	if plain == 0 {
		return nil
	}
	t.next += uint64(plain)
	t.last = b.streamOf(b.count - 1)
	t.published += uint64(plain)
	for _, g := range t.parked {
		e.look(g)
	}
	return nil
}

// deploymentOf is deployment with a memory of the last names: those of an application change rarely.
func (e *Engine) deploymentOf(name []byte) uint64 {
	if len(name) == 0 {
		return 0
	}
	if d, ok := e.deploymentNames[string(name)]; ok {
		return d
	}
	if e.deploymentNames == nil || len(e.deploymentNames) >= 256 {
		e.deploymentNames = make(map[string]uint64)
	}
	d := deployment(name)
	e.deploymentNames[string(name)] = d
	return d
}

// bound applies the topic's settings to the messages noted.
func (e *Engine) bound(t *topic) (errs.Code, error) {
	s := &t.settings
	longest := uint32(min(int64(s.RetentionMax/time.Second), math.MaxUint32))
	for i := range e.heads {
		h := &e.heads[i]
		if s.MessageBytesMax > 0 && int64(h.body) > s.MessageBytesMax {
			return errs.MessageTooLarge, nil
		}
		if len(e.specials) > 0 && e.specials[i].byDefault {
			h.retention = uint32(limits.RetentionDefault / time.Second)
			if s.RetentionDefault > 0 {
				h.retention = uint32(min(int64(s.RetentionDefault/time.Second), math.MaxUint32))
			}
		}
		if h.retention == 0 && s.RetentionDefault > 0 { // an entry of XADD
			h.retention = uint32(min(int64(s.RetentionDefault/time.Second), math.MaxUint32))
		}
		if longest > 0 && (h.retention == 0 || h.retention > longest) {
			h.retention = longest
		}
		if len(e.specials) > 0 && h.retention > 0 && e.specials[i].delay > h.retention {
			return errs.BadRequest, nil
		}
	}
	if s.DepthMax > 0 {
		b, i, err := e.firstLive(t, nil, 0, e.stamp.Cluster, true)
		if err != nil {
			return errs.OK, err
		}
		held := t.delayed + uint64(len(e.heads))
		if b != nil {
			held += t.next - b.base - uint64(i)
		}
		if held > s.DepthMax {
			return errs.TopicFull, nil
		}
	}
	return errs.OK, nil
}

// judge says what each of the messages noted is: plain, delayed, or a duplicate. It returns how many are plain.
func (e *Engine) judge(t *topic, res *Result) (plain int, err error) {
	now := e.stamp.Cluster
	p := &res.Published
	p.Kinds = make([]MessageKind, len(e.heads))
	for i := range e.heads {
		x := &e.specials[i]
		kind := KindPlain
		if x.delay > 0 {
			kind = KindDelayed
		}
		if len(x.key) > 0 {
			h := e.hashKey(t, x.deployment, x.key)
			original, held, err := e.findKey(h, now)
			if err != nil {
				return 0, err
			}
			if held {
				kind = KindDuplicate
				p.Originals = append(p.Originals, original)
			} else {
				e.holdKey(h, MessageID{Shard: e.o.Shard, Index: e.index, Pos: e.pos + uint32(i), Kind: kind}, now, keyWindow(e.heads[i].retention))
			}
		}
		p.Kinds[i] = kind
		if kind == KindPlain {
			plain++
		}
	}
	if plain == len(e.heads) {
		p.Kinds = nil
	}
	return plain, nil
}

// lives reports whether a message is there, visible or not.
func (e *Engine) lives(t *topic, id MessageID, now int64) (bool, error) {
	b, i, err := e.byID(t, id)
	if err != nil || b != nil {
		return b != nil && b.expiry(i) > now, err
	}
	run, _, ok, err := e.waiting(t, id)
	return ok && run.expiry() > now, err
}

// nextStreamID is the ID of the first of n messages that take consecutive ones.
func (t *topic) nextStreamID(wall, n uint64) (StreamID, bool) {
	id := StreamID{Ms: wall}
	switch {
	case wall > t.last.Ms:
	case t.last.Seq <= math.MaxUint64-n:
		id = StreamID{Ms: t.last.Ms, Seq: t.last.Seq + 1}
	case t.last.Ms < math.MaxUint64:
		id = StreamID{Ms: t.last.Ms + 1}
	default:
		return id, false
	}
	if id == (StreamID{}) {
		id.Seq = 1 // 0-0 is no ID
	}
	return id, true
}

// store writes the blocks of the entry and keeps them in memory.
func (e *Engine) store(entry []byte) error {
	if e.beforeStore != nil {
		if err := e.beforeStore(e); err != nil {
			return err
		}
	}
	if len(e.open) == 0 && len(e.staging) == 0 && len(e.newKeys) == 0 && len(e.newParts) == 0 {
		return nil
	}
	size := 64 * len(e.newKeys)
	size += 128 * len(e.newParts)
	for _, t := range e.staging {
		for i := range t.staged {
			size += int(t.staged[i].size) + 128
		}
	}
	for _, t := range e.open {
		size += 512 + len(t.open.retention)*4
	}
	batch := e.db.NewBatchWithSize(size)
	defer func() { _ = batch.Close() }()
	blocks := make([]*block, 0, len(e.open))
	if len(e.open) > 0 {
		if err := e.packs.begin(&e.packs.cur, false); err != nil {
			return err
		}
		before := e.packs.cur.size
		for _, t := range e.open {
			b := t.open
			e.putBlock(batch, t, entry)
			blocks = append(blocks, b)
		}
		e.putExpiries(batch, blocks, false)
		e.packs.blocksGrown.appended += e.packs.cur.size - before
		if err := e.packs.end(); err != nil {
			return err
		}
	}
	for _, t := range e.staging {
		e.putStaged(batch, t, entry)
		t.staged = t.staged[:0]
	}
	e.putKeys(batch)
	if err := e.putParts(batch); err != nil {
		return err
	}
	e.staging, e.newKeys, e.newLarge = e.staging[:0], e.newKeys[:0], e.newLarge[:0]
	clear(e.newParts) // they hold on to the entry
	e.newParts = e.newParts[:0]
	clear(e.entryKeys)
	if err := batch.Commit(pebble.NoSync); err != nil {
		return fmt.Errorf("writing blocks: %w", err)
	}
	for _, t := range e.open {
		b := t.open
		t.open = nil
		if t.marked > 0 {
			t.noteDead(b)
		}
		if e.fx != nil {
			e.fx.Appended = append(e.fx.Appended, t.name)
		}
	}
	if len(blocks) > 0 {
		e.keep(entry, blocks)
	}
	return nil
}

// putBlock puts a topic's block into the pack and writes its rows: all are written once, and each tells the entry it
// is of, or the place at which this entry put the payload.
func (e *Engine) putBlock(batch *pebble.Batch, t *topic, entry []byte) {
	b := t.open
	b.at = e.packs.cur.add(b, func(dst []byte) []byte {
		dst = payloadHead(dst, b.count)
		from := len(dst)
		if b.own {
			dst = append(dst, b.data...)
		} else {
			for _, s := range t.segs {
				dst = append(dst, entry[s.from:s.to]...)
			}
		}
		if n := len(dst) - from; n != int(b.bytes) {
			panic(fmt.Sprintf("engine: block of %d bytes has %d", b.bytes, n)) // I4: sizes were counted from the same bytes
		}
		return dst
	})
	e.put(batch, binary.AppendUvarint(e.rowBuf[:0], b.base), rowByIndex, t.inc, b.index)
	e.putHeader(batch, b)
}

// putHeader writes a block's header and the rows that lead to it by stream ID and deployment.
func (e *Engine) putHeader(batch *pebble.Batch, b *block) {
	e.rowBuf = b.appendRow(e.rowBuf[:0])
	e.put(batch, e.rowBuf, rowBlock, b.topic, b.base)
	e.put(batch, binary.AppendUvarint(e.rowBuf[:0], b.index), rowByStream, b.topic, b.stream.Ms, b.stream.Seq, b.base)
	e.putPostings(batch, b, b.deployments())
}

// putExpiries writes the rows by which a checkpoint finds the entry's blocks when their last message has expired, one
// for each time at which some do. matured tells blocks of references from the others of the entry.
func (e *Engine) putExpiries(batch *pebble.Batch, blocks []*block, matured bool) {
	ticks := make(map[uint64][]byte)
	for _, b := range blocks {
		if b.lastExpiry == never {
			continue
		}
		row := ticks[expiryTick(b.lastExpiry)]
		if row == nil {
			row = append(make([]byte, 0, 1+8*len(blocks)), rowVersion)
		}
		deps := b.deployments()
		row = binary.AppendUvarint(row, b.topic)
		row = binary.AppendUvarint(row, b.base)
		row = binary.AppendUvarint(row, uint64(len(deps)))
		for _, d := range deps {
			row = binary.LittleEndian.AppendUint64(row, d)
		}
		ticks[expiryTick(b.lastExpiry)] = row
	}
	for _, tick := range sortedKeys(ticks) {
		e.put(batch, ticks[tick], rowExpiry, expiryKey(tick, e.index, matured)...)
	}
}

func expiryKey(tick, index uint64, matured bool) []uint64 {
	key := []uint64{tick, index, 0}
	if matured {
		key[2] = 1
	}
	return key
}

// expiring is a block in a row of the expiry index, with the deployments whose postings go with it.
type expiring struct {
	topic, base uint64
	deps        []uint64
}

func parseExpiry(row []byte) (blocks []expiring, err error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return nil, rowError(rowExpiry, v)
	}
	for len(r.b) > 0 {
		x := expiring{topic: r.uvarint(), base: r.uvarint()}
		for range r.count(8) {
			x.deps = append(x.deps, r.u64())
		}
		blocks = append(blocks, x)
	}
	return blocks, r.err()
}

func (e *Engine) put(batch *pebble.Batch, value []byte, kind byte, parts ...uint64) {
	op := batch.SetDeferred(3+8*len(parts), len(value))
	e.keys.append(op.Key[:0], kind, parts...)
	copy(op.Value, value)
	_ = op.Finish()
}

// expiryUnit is how fine the expiry index tells times apart, in milliseconds. There is one row a block
// whatever it is; a coarse unit keeps what has expired on the disk until the unit has passed.
const expiryUnit = 1000

// expiryTick is the first tick of the expiry index at or after a time.
func expiryTick(at int64) uint64 { return uint64((at + expiryUnit - 1) / expiryUnit) }
