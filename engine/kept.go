package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/cockroachdb/pebble/v2"
)

// Parked messages may outlive their block. Every checkpoint copies what has been parked for longer than the message
// lives into a row of its own, so that the block can go when its time comes: with that checkpoint at the earliest,
// since a message is parked before it expires. The copies are physical: an entry of the set reads its message from
// the block while that is there, and from the copy afterwards, with the same result.

// keptItem is a message to be copied.
type keptItem struct {
	topic *topic
	off   uint64
	dep   uint64
	d     Delivery
}

// keep notes that an entry of the set outlives its message.
func (g *group) keep(off uint64) {
	if g.kept == nil {
		g.kept = make(map[uint64]bool)
	}
	g.kept[off] = true
}

// gatherKept compares what has to be copied with what is, and drops the copies that nobody needs any more.
func (e *Engine) gatherKept(batch *pebble.Batch) ([]keptItem, error) {
	now := e.stamp.Cluster
	var items []keptItem
	for _, inc := range sortedKeys(e.byInc) {
		t := e.byInc[inc]
		needed := make(map[uint64]bool)
		for _, ginc := range sortedKeys(t.byInc) {
			g := t.byInc[ginc]
			if g.settings.ParkedRetention > 0 {
				g.fold(now, foldAll)
			}
			for off := range g.kept {
				if !t.removed(off) {
					needed[off] = true
				}
			}
		}
		for off, upload := range t.keptRows {
			if !needed[off] {
				delete(t.keptRows, off)
				delete(e.keptUploads, upload)
				_ = batch.Delete(e.keys.key(rowKept, inc, off), nil)
			}
		}
		for _, off := range sortedSet(needed) {
			if _, ok := t.keptRows[off]; ok {
				continue
			}
			b, i, err := e.blockAt(t, nil, off)
			if err != nil {
				return nil, err
			}
			items = append(items, keptItem{topic: t, off: off, dep: b.dep(i), d: e.stored1(t, nil, b, i)})
		}
	}
	return items, nil
}

func sortedSet(m map[uint64]bool) []uint64 { return sortedKeys(m) }

// keptBatchBytes is where copies go to the store before the checkpoint they belong to: nothing asks for them earlier.
const keptBatchBytes = 8 << 20

// copyKept writes the copies, without holding mu.
func (e *Engine) copyKept(batch *pebble.Batch, items []keptItem) error {
	var early *pebble.Batch
	for at := 0; at < len(items); at += 64 {
		some := items[at:min(at+64, len(items))]
		ds := make([]Delivery, len(some))
		for i := range some {
			ds[i] = some[i].d
		}
		if err := e.loadAll(ds); err != nil {
			return fmt.Errorf("engine: copying parked messages: %w", err)
		}
		to := batch
		if len(items) > 64 {
			if early == nil {
				early = e.db.NewBatch()
			}
			to = early
		}
		for i := range some {
			k := &some[i]
			_ = to.Set(e.keys.key(rowKept, k.topic.inc, k.off), appendKept(nil, &ds[i], k.dep), nil)
			upload := uint64(0)
			if ds[i].Large != nil {
				upload = ds[i].Large.Upload
			}
			k.d.Large, k.d.Body = ds[i].Large, nil
			e.mu.Lock()
			if k.topic.keptRows == nil {
				k.topic.keptRows = make(map[uint64]uint64)
			}
			k.topic.keptRows[k.off] = upload
			if upload != 0 {
				e.keptUploads[upload] = true
			}
			e.mu.Unlock()
		}
		if early != nil && (early.Len() >= keptBatchBytes || at+64 >= len(items)) {
			if err := errors.Join(early.Commit(pebble.NoSync), early.Close()); err != nil {
				return fmt.Errorf("engine: copying parked messages: %w", err)
			}
			early = nil
		}
	}
	return nil
}

// appendKept appends a copy: ID, times and contents of a message.
func appendKept(b []byte, d *Delivery, dep uint64) []byte {
	b = append(b, rowVersion)
	b = d.ID.append(b)
	b = d.Stream.append(b)
	b = appendVarint(b, d.PublishedAt)
	b = binary.AppendUvarint(b, dep)
	m := NewMessage{ContentType: d.ContentType, Headers: d.Headers, Deployment: d.Deployment, Body: d.Body, Large: d.Large}
	return m.appendRecord(b)
}

func parseKept(row []byte, d *Delivery, contents bool) (dep uint64, err error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return 0, rowError(rowKept, v)
	}
	id, stream, published := r.messageID(), r.streamID(), r.varint()
	dep = r.uvarint()
	var rec record
	parseRecord(&r, &rec)
	if err := r.err(); err != nil {
		return 0, err
	}
	d.ID, d.Stream, d.PublishedAt = id, stream, published
	if contents {
		d.fill(&rec)
		d.Body = append(make([]byte, 0, len(d.Body)), d.Body...)
	}
	return dep, nil
}

// loadKept fills a delivery from the copy of its message, if there is one.
func (e *Engine) loadKept(topic, off uint64, d *Delivery, contents bool) (ok bool, err error) {
	_, ok, err = e.readKept(topic, off, d, contents)
	return ok, err
}

func (e *Engine) readKept(topic, off uint64, d *Delivery, contents bool) (dep uint64, ok bool, err error) {
	defer e.damaged(&err)
	v, closer, err := e.db.Get(e.keys.key(rowKept, topic, off))
	if errors.Is(err, pebble.ErrNotFound) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("engine: reading a parked message: %w", err)
	}
	dep, err = parseKept(v, d, contents)
	if cerr := closer.Close(); err == nil {
		err = cerr
	}
	return dep, err == nil, err
}

// again describes a message of the unsettled set as its next delivery: from its block, or from its copy.
func (e *Engine) again(g *group, off uint64, l *lease) (Delivery, error) {
	t := g.topic
	var d Delivery
	b, i, err := e.blockAt(t, g.cur, off)
	if err != nil {
		return d, err
	}
	d = e.stored1(t, g, b, i)
	d.Receipt.Epoch = l.epoch
	d.Count = l.count
	if l.kept && l.expiry != never {
		d.ExpiresAt = e.wallAt(l.expiry)
	}
	d.LeaseUntil = e.stamp.Wall + l.deadline - l.granted
	return d, nil
}

// keptBlock returns a block of the one message whose own has been removed, made from the message's copy.
func (e *Engine) keptBlock(t *topic, off uint64) (*block, error) {
	var d Delivery
	dep, ok, err := e.readKept(t.inc, off, &d, false)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("engine: message at offset %d of topic %q is not stored", off, t.name)
	}
	b := &block{topic: t.inc, base: off, index: d.ID.Index, wall: d.PublishedAt, stream: d.Stream, count: 1, bytes: 1}
	if d.ID.Kind == KindDelayed {
		b.refs = []refRun{{index: d.ID.Index, pos: d.ID.Pos, count: 1, wall: d.PublishedAt, bytes: 1, dep: dep}}
	} else {
		b.uniform, b.runs = true, []posRun{{d.ID.Pos, 1}}
		if dep != 0 {
			b.deps = []depRun{{dep: dep}}
		}
	}
	b.lastExpiry = never
	return b, nil
}

// keptBytes is what an entry that outlives its message counts for where answers are bounded: the message's own block,
// which would tell, may be gone on one node and not on another.
const keptBytes = 4 << 10

// sizeIn is an estimate of the size of an entry's message, the same on every node.
func (l *lease) sizeIn(b *block, i uint32) uint64 {
	if l.kept {
		return keptBytes
	}
	return b.sizeOf(i)
}

// loadKeptRow notes a copy that is stored.
func (e *Engine) loadKeptRow(key, row []byte) error {
	topic, _ := keyPart(key, 0)
	off, ok := keyPart(key, 1)
	t := e.byInc[topic]
	if !ok || t == nil {
		return nil // of a topic deleted after the copy was made, or before the checkpoint it was made for
	}
	var d Delivery
	if _, err := parseKept(row, &d, true); err != nil {
		return err
	}
	if t.keptRows == nil {
		t.keptRows = make(map[uint64]uint64)
	}
	t.keptRows[off] = 0
	if d.Large != nil {
		t.keptRows[off] = d.Large.Upload
		e.keptUploads[d.Large.Upload] = true
	}
	return nil
}

// keptAgain is when the parts of a kept large message are looked at again, in ticks of the expiry index.
func keptAgain(upto int64) uint64 { return uint64(min(upto+3600*1000/expiryUnit, math.MaxInt64)) }
