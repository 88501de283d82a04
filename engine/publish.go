package engine

import (
	"encoding/binary"
	"fmt"
	"math"

	"github.com/cockroachdb/pebble/v2"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// applyPublish appends messages to a topic. end is where the command ends in the entry.
func (e *Engine) applyPublish(r *reader, end uint32, res *Result) {
	name := r.bytes()
	n := r.count(recordBytesMin)
	e.heads = e.heads[:0]
	var rec record
	total := 0
	for range n {
		size := len(r.b)
		start := end - uint32(size)
		parseRecord(r, &rec)
		if r.bad {
			break
		}
		size -= len(r.b)
		total += size
		if rec.flags&(recordDelay|recordKey|recordDeployment|recordLarge|recordDefault) != 0 {
			res.Code = errs.Unsupported
		} else if len(rec.body) > limits.MessageBytesMax && res.Code == errs.OK {
			res.Code = errs.MessageTooLarge
		}
		e.heads = append(e.heads, recordHeadNote{start: start, size: uint32(size), retention: uint32(min(rec.retention, math.MaxUint32))})
	}
	if r.err() != nil || n == 0 {
		res.Code = errs.BadRequest
	}
	if res.Code != errs.OK {
		return
	}
	t, code := e.topicNamed(name)
	if code != errs.OK {
		res.Code = code
		return
	}
	b := t.open
	if b == nil {
		id, ok := t.nextStreamID(uint64(e.stamp.Wall), uint64(n))
		if !ok {
			res.Code = errs.BadRequest
			return
		}
		b = &block{topic: t.inc, base: t.next, index: e.index, cluster: e.stamp.Cluster, wall: e.stamp.Wall, stream: id, data: e.entry,
			starts: make([]uint32, 0, n)}
		t.open, t.segs = b, t.segs[:0]
		e.open = append(e.open, t)
	} else if b.stream.Seq > math.MaxUint64-uint64(b.count)-uint64(n) {
		res.Code = errs.BadRequest
		return
	}
	first := b.count
	for i := range e.heads {
		h := &e.heads[i]
		b.add(e.pos, h.retention, int(h.size))
		b.starts = append(b.starts, h.start)
		e.pos++
	}
	from := e.heads[0].start
	if k := len(t.segs); k > 0 && t.segs[k-1].to == from {
		t.segs[k-1].to = end
	} else {
		t.segs = append(t.segs, segment{from, end})
	}
	res.Published = Published{Shard: e.o.Shard, Index: e.index, Pos: e.pos - uint32(n), Count: uint32(n), Offset: b.base + uint64(first), Stream: b.streamOf(first)}
	t.next += uint64(n)
	t.last = b.streamOf(b.count - 1)
	t.published += uint64(n)
	t.bytes += uint64(total)
	t.dirty = true
	for _, g := range t.parked {
		e.look(g)
	}
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
	if len(e.open) == 0 {
		return nil
	}
	size := 0
	for _, t := range e.open {
		size += int(t.open.bytes) + 512 + len(t.open.retention)*4
	}
	batch := e.db.NewBatchWithSize(size)
	defer func() { _ = batch.Close() }()
	blocks := make([]*block, 0, len(e.open))
	for _, t := range e.open {
		b := t.open
		e.putBlock(batch, t, entry)
		blocks = append(blocks, b)
	}
	if err := batch.Commit(pebble.NoSync); err != nil {
		return fmt.Errorf("writing blocks: %w", err)
	}
	for _, t := range e.open {
		t.open = nil
		if e.fx != nil {
			e.fx.Appended = append(e.fx.Appended, t.name)
		}
	}
	e.keep(entry, blocks)
	return nil
}

// putBlock writes the rows of a topic's block: all are written once, and each tells the entry it is of.
func (e *Engine) putBlock(batch *pebble.Batch, t *topic, entry []byte) {
	b := t.open
	var head [12]byte
	h := payloadHead(head[:0], b.count)
	op := batch.SetDeferred(3+16, len(h)+int(b.bytes))
	e.keys.append(op.Key[:0], rowPayload, t.inc, b.base)
	n := copy(op.Value, h)
	for _, s := range t.segs {
		n += copy(op.Value[n:], entry[s.from:s.to])
	}
	if n != len(op.Value) {
		panic(fmt.Sprintf("engine: block of %d bytes has %d", len(op.Value), n)) // I4: sizes were counted from the same bytes
	}
	_ = op.Finish() // only fails on batches that index their content

	e.rowBuf = b.appendRow(e.rowBuf[:0])
	e.put(batch, e.rowBuf, rowBlock, t.inc, b.base)
	base := binary.AppendUvarint(e.rowBuf[:0], b.base)
	e.put(batch, base, rowByIndex, t.inc, b.index)
	e.put(batch, binary.AppendUvarint(base, b.index), rowByStream, t.inc, b.stream.Ms, b.stream.Seq)
	if b.lastExpiry != never {
		e.put(batch, binary.AppendUvarint(e.rowBuf[:0], b.index), rowExpiry, expiryTick(b.lastExpiry), t.inc, b.base)
	}
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
