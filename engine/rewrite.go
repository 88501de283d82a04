package engine

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"
)

// rewritePacks rewrites, at a checkpoint, the packs of blocks of which less than a quarter is alive: what lives is copied into
// a new pack, without the records that nobody can ask for any more, and the batch gets headers that say so. It goes
// before all removals of the same batch, so that what they take is gone. Whether it runs, and when, has no effect on
// what anybody sees: the place in a header is no part of the logical state.
func (e *Engine) rewritePacks(batch *pebble.Batch) (rewritten []uint64, err error) {
	p := e.packs
	e.mu.Lock()
	now, applied := e.stamp.Cluster, e.index
	total := uint64(0)
	for _, k := range p.list {
		if !k.parts {
			total += k.size
		}
	}
	look := len(p.durable) > 0 && p.blocksGrown.due(p.limit, total, now)
	e.mu.Unlock()
	if !look {
		return nil, nil
	}
	alive := make(map[uint64]uint64)
	err = e.eachStored(func(b *block) error {
		if b.index > applied {
			alive[b.at.pack] += uint64(b.at.length)
			return nil
		}
		n, _ := e.aliveIn(b, now, false)
		alive[b.at.pack] += uint64(b.at.length) * uint64(n) / uint64(b.count)
		return nil
	})
	if err != nil {
		return nil, err
	}
	victims := make(map[uint64]bool)
	e.mu.RLock()
	for i := range p.durable {
		// One that has grown since the checkpoint holds blocks that were not looked at.
		k := &p.durable[i]
		if k.parts {
			continue
		}
		if at := p.list[k.number]; at != nil && at.size == k.size && (p.cur == nil || p.cur.pack != at) && alive[k.number]*4 < k.size {
			victims[k.number] = true
			rewritten = append(rewritten, k.number)
		}
	}
	e.mu.RUnlock()
	if len(victims) == 0 {
		return nil, nil
	}
	to := packCopy{e: e}
	err = e.eachStored(func(b *block) error {
		if !victims[b.at.pack] || b.index > applied {
			return nil
		}
		n, dead := e.aliveIn(b, now, true)
		if n == 0 {
			// The header stays until its last message expires, if one was removed before that: it has no payload any more.
			b.at = place{}
			_ = batch.Set(e.keys.key(rowBlock, b.topic, b.base), b.appendRow(nil), nil) // a batch in memory takes everything
			return nil
		}
		payload, err := p.read(b.topic, b.base, b.at)
		if err != nil {
			return err
		}
		w, err := to.writer()
		if err != nil {
			return err
		}
		b.at = w.add(b, func(dst []byte) []byte { return appendThinned(dst, payload, dead) })
		_ = batch.Set(e.keys.key(rowBlock, b.topic, b.base), b.appendRow(nil), nil) // a batch in memory takes everything
		return w.write(false)
	})
	if err = errors.Join(err, to.seal()); err != nil {
		return nil, fmt.Errorf("engine: rewriting packs: %w", err)
	}
	return rewritten, nil
}

// packCopy is where rewriting puts what lives on: packs of its own, beside those that Apply adds to.
type packCopy struct {
	e     *Engine
	parts bool
	w     *packWriter
}

// writer returns a pack with room.
func (c *packCopy) writer() (w *packWriter, err error) {
	if c.w != nil && c.w.size >= c.e.packs.limit {
		err = c.seal()
	}
	if err == nil && c.w == nil {
		c.e.mu.Lock()
		c.w, err = c.e.packs.create(c.parts)
		c.e.mu.Unlock()
	}
	return c.w, err
}

func (c *packCopy) seal() error {
	if c.w == nil {
		return nil
	}
	err := c.w.write(true) // it may wait for the disk: not while Apply waits for mu
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	return errors.Join(err, c.e.packs.seal(&c.w))
}

// rewriteParts does the same for the packs of parts. A part is alive as long as it has a row; what this checkpoint removes
// is left to the next look.
func (e *Engine) rewriteParts(batch *pebble.Batch) (rewritten []uint64, err error) {
	p := e.packs
	e.mu.Lock()
	now, applied := e.stamp.Cluster, e.index
	total := uint64(0)
	for _, k := range p.list {
		if k.parts {
			total += k.size
		}
	}
	look := total > 0 && len(p.durable) > 0 && p.partsGrown.due(p.limit, total, now)
	e.mu.Unlock()
	if !look {
		return nil, nil
	}
	alive := make(map[uint64]uint64)
	err = e.eachPart(func(_ []byte, _ uint64, at place) error {
		alive[at.pack] += uint64(at.length)
		return nil
	})
	if err != nil {
		return nil, err
	}
	victims := make(map[uint64]bool)
	e.mu.Lock()
	for i := range p.durable {
		// One that has grown since the checkpoint holds parts that were not looked at.
		k := &p.durable[i]
		if at := p.list[k.number]; k.parts && at != nil && at.size == k.size && alive[k.number]*4 < k.size {
			if p.parts != nil && p.parts.pack == at {
				err = errors.Join(err, p.seal(&p.parts))
			}
			victims[k.number] = true
			rewritten = append(rewritten, k.number)
		}
	}
	e.mu.Unlock()
	if len(victims) == 0 || err != nil {
		return nil, err
	}
	to := packCopy{e: e, parts: true}
	err = e.eachPart(func(key []byte, index uint64, at place) error {
		if !victims[at.pack] || index > applied {
			return nil
		}
		topic, _ := keyPart(key, 0)
		upload, _ := keyPart(key, 1)
		part, err := p.read(topic, upload, at)
		if err != nil {
			return err
		}
		w, err := to.writer()
		if err != nil {
			return err
		}
		at = w.append(topic, upload, len(part), func(dst []byte) []byte { return append(dst, part...) })
		_ = batch.Set(key, appendPart(nil, index, at), nil) // a batch in memory takes everything
		return w.write(false)
	})
	if err = errors.Join(err, to.seal()); err != nil {
		return nil, fmt.Errorf("engine: rewriting packs: %w", err)
	}
	return rewritten, nil
}

// eachPart visits the rows of all parts.
func (e *Engine) eachPart(visit func(key []byte, index uint64, at place) error) error {
	return e.scan(rowPart, func(key, row []byte) error {
		index, at, err := parsePart(row)
		if err != nil {
			return err
		}
		return visit(key, index, at)
	})
}

// eachStored visits the stored blocks that have a payload of their own.
func (e *Engine) eachStored(visit func(b *block) error) error {
	return e.scan(rowBlock, func(key, row []byte) error {
		topic, _ := keyPart(key, 0)
		base, _ := keyPart(key, 1)
		b, err := parseBlock(topic, base, row)
		if err != nil || b.at.length == 0 {
			return err
		}
		return visit(b)
	})
}

// aliveIn counts the messages of a block that are neither expired nor removed and, if asked, says which are not; nil
// means that all are alive.
func (e *Engine) aliveIn(b *block, now int64, which bool) (n uint32, dead []bool) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	t := e.byInc[b.topic]
	if t == nil || b.lastExpiry <= now || b.end() <= t.first {
		return 0, nil
	}
	if b.uniform && t.marked == 0 && b.base >= t.first {
		return b.count, nil
	}
	return t.aliveIn(b, now, which)
}

func (t *topic) aliveIn(b *block, now int64, which bool) (n uint32, dead []bool) {
	for i := range b.count {
		if b.expiry(i) > now && !t.removed(b.base+uint64(i)) {
			n++
			continue
		}
		if which && dead == nil {
			dead = make([]bool, b.count)
		}
		if which {
			dead[i] = true
		}
	}
	return n, dead
}

// appendThinned appends a payload with an empty record in place of each dead one.
func appendThinned(dst, payload []byte, dead []bool) []byte {
	if !slices.Contains(dead, true) {
		return append(dst, payload...)
	}
	r := reader{b: payload}
	r.u8()
	r.uvarint()
	dst = append(dst, payload[:len(payload)-len(r.b)]...)
	for i := range dead {
		rest := r.b
		r.bytes()
		if dead[i] {
			dst = append(dst, 0)
		} else {
			dst = append(dst, rest[:len(rest)-len(r.b)]...)
		}
	}
	return dst
}
