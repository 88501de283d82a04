package engine

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
)

// ErrClosed is returned by calls on an engine that was closed.
var ErrClosed = errors.New("engine: closed")

// Checkpoint writes all state that changed since the last one, what became dead, and the applied index in one
// atomic batch, and waits until it is on disk: then the durable point moves, and the log below it is needed
// no more. It may run beside Apply, which it holds up only while it encodes; rows of entries applied in the
// meantime may reach the disk with it, which replay allows for (rule 16(a)).
func (e *Engine) Checkpoint() (Meta, error) {
	e.cpMu.Lock()
	defer e.cpMu.Unlock()
	return e.checkpoint()
}

func (e *Engine) checkpoint() (Meta, error) {
	if err := e.Err(); err != nil {
		return Meta{}, err
	}
	if e.installed != nil {
		// What is in memory is already replaced; only Reopen leads on from here.
		return e.installed.meta(), nil
	}
	e.dbMu.RLock()
	defer e.dbMu.RUnlock()
	e.mu.Lock()
	if d := e.durable.Load(); d != nil && d.index == e.index {
		e.mu.Unlock()
		return d.meta(), nil
	}
	e.mu.Unlock()
	batch := e.db.NewBatch()
	defer func() { _ = batch.Close() }()
	rewritten, err := e.rewritePacks(batch)
	if err == nil {
		var parts []uint64
		parts, err = e.rewriteParts(batch)
		rewritten = append(rewritten, parts...)
	}
	if err != nil {
		e.fail(err)
		return Meta{}, err
	}
	e.mu.Lock()
	s := e.cloneState()
	packs, err := e.takePacks(batch, rewritten)
	var kept []keptItem
	if err == nil {
		kept, err = e.gatherKept(batch)
	}
	if err == nil {
		err = e.encodeDirty(batch)
	}
	removed := e.takeRemoved()
	logBytes, dirt := e.logBytes.Load(), e.dirtRough.Load()
	e.mu.Unlock()

	if err != nil {
		e.fail(err)
		return Meta{}, err
	}
	if err := e.copyKept(batch, kept); err != nil {
		e.fail(err)
		return Meta{}, err
	}
	floors, swept, err := e.sweep(batch, &s, removed)
	if err != nil {
		e.fail(err)
		return Meta{}, err
	}
	if err := packs.sync(e.packs); err != nil {
		e.fail(err)
		return Meta{}, err
	}
	if err := batch.Commit(pebble.NoSync); err != nil {
		err = fmt.Errorf("engine: writing the checkpoint of entry %d: %w", s.index, err)
		e.fail(err)
		return Meta{}, err
	}
	err = e.flush()
	if err == nil {
		err = e.writeDurable(&s)
	}
	if err != nil {
		e.fail(err)
		return Meta{}, err
	}
	e.mu.Lock()
	for inc, f := range floors {
		if t := e.byInc[inc]; t != nil {
			t.floor = f
			t.gone = max(t.gone, f.offset)
		}
	}
	e.mu.Unlock()
	e.swept = swept
	e.packs.durable = packs.listed
	e.durable.Store(&s)
	e.removePacks(packs.dead)
	e.logBytes.Add(-logBytes)
	e.dirtRough.Add(-dirt)
	return s.meta(), nil
}

// flush waits until everything committed so far is on disk, or the store says that it cannot be.
func (e *Engine) flush() error {
	done, err := e.db.AsyncFlush()
	if err != nil {
		return fmt.Errorf("engine: flushing: %w", err)
	}
	select {
	case <-done:
		// A flush that failed for good does not end, but one failure may have preceded success: it counts.
		return e.Err()
	case <-e.failure:
		return e.Err()
	}
}

// encodeDirty puts every changed row into the batch. The order within the batch is that of names and numbers,
// so that equal histories write equal batches.
func (e *Engine) encodeDirty(batch *pebble.Batch) error {
	now := e.stamp.Cluster
	for _, inc := range e.removedStrings {
		_ = batch.Delete(e.keys.key(rowString, inc), nil) // a batch in memory takes everything
	}
	e.removedStrings = nil
	for _, id := range e.removedIntakes {
		_ = batch.Delete(e.keys.key(rowIntake, uint64(id)), nil) // a batch in memory takes everything
	}
	e.removedIntakes = nil
	for _, id := range sortedKeys(e.intakes) {
		e.put(batch, e.intakes[id].appendRow(nil), rowIntake, uint64(id))
	}
	for _, inc := range e.removedTopics {
		e.packs.blocksGrown.loosened, e.packs.partsGrown.loosened = true, true
		for _, kind := range topicRows {
			_ = batch.DeleteRange(e.keys.key(kind, inc), e.keys.key(kind, inc+1), nil)
		}
	}
	for _, ids := range e.removedGroups {
		_ = batch.Delete(e.keys.key(rowGroup, ids[0], ids[1]), nil)
		for _, kind := range []byte{rowChunk, rowConsumer} {
			_ = batch.DeleteRange(e.keys.key(kind, ids[0], ids[1]), e.keys.key(kind, ids[0], ids[1]+1), nil)
		}
	}
	e.removedTopics, e.removedGroups = nil, nil
	e.encodeChanges(batch)
	e.encodeUploads(batch)
	e.dropKeyBuckets(batch, now)
	var from dueKey
	if d := e.durable.Load(); d != nil {
		from = d.matured
	}
	if at := e.matured; at != from {
		_ = batch.DeleteRange(e.keys.key(rowDue, uint64(from.due), from.topic, from.index), append(e.keys.key(rowDue, uint64(at.due), at.topic, at.index), 0), nil)
	}
	for _, n := range e.removedDocuments {
		_ = batch.Delete(e.keys.documentKey(n.table, n.key), nil) // before what took its name
	}
	e.removedDocuments = nil
	for _, table := range sortedKeys(e.documents) {
		t := e.documents[table]
		for _, key := range sortedKeys(t.docs) {
			if d := t.docs[key]; d.dirty {
				d.dirty = false
				_ = batch.Set(e.keys.documentKey(table, key), d.appendRow(e.rowBuf[:0]), nil)
			}
		}
	}
	for _, inc := range sortedKeys(e.byInc) {
		t := e.byInc[inc]
		if t.dirty {
			t.dirty = false
			e.put(batch, t.appendRow(e.rowBuf[:0]), rowTopic, inc)
			e.encodeMarks(batch, t)
		}
		if t.cut.offset > t.floor.offset {
			e.packs.blocksGrown.loosened = true
			if err := e.removeBelow(batch, t, t.cut); err != nil {
				return err
			}
		}
	}
	e.encodeStrings(batch)
	for _, g := range e.groups {
		if g == nil {
			continue
		}
		tinc := g.topic.inc
		for _, key := range g.gone {
			_ = batch.Delete(e.keys.key(rowChunk, tinc, g.inc, key), nil)
		}
		g.gone = nil
		if !g.dirty {
			continue
		}
		g.dirty = false
		e.put(batch, g.appendRow(e.rowBuf[:0]), rowGroup, tinc, g.inc)
		e.encodeConsumers(batch, g)
		for _, key := range sortedKeys(g.chunks) {
			c := g.chunks[key]
			if !c.dirty {
				continue
			}
			c.dirty = false
			if row := c.appendRow(e.rowBuf[:0], g, key, now); row != nil {
				e.rowBuf = row[:0]
				e.put(batch, row, rowChunk, tinc, g.inc, key)
				c.stored = true
			} else if c.stored {
				_ = batch.Delete(e.keys.key(rowChunk, tinc, g.inc, key), nil)
				c.stored = false
			}
		}
	}
	e.put(batch, e.state.appendRow(e.rowBuf[:0]), rowState)
	return nil
}

// removeBelow removes the rows of all blocks of a topic below f, which something explicit has emptied, and what
// was delayed before f.
func (e *Engine) removeBelow(batch *pebble.Batch, t *topic, f floor) error {
	old := t.floor
	if err := e.removeBlocks(batch, t.inc, old, f, t.rewound); err != nil {
		return err
	}
	t.floor = f
	e.put(batch, f.appendRow(nil), rowFloor, t.inc)
	for _, kind := range []byte{rowStaged, rowStagedIndex, rowPlace} {
		_ = batch.DeleteRange(e.keys.key(kind, t.inc), e.keys.key(kind, t.inc, t.firstIndex), nil)
	}
	return nil
}

// removeBlocks removes the rows of all blocks of a topic between two floors.
func (e *Engine) removeBlocks(batch *pebble.Batch, inc uint64, from, to floor, rewound bool) error {
	switch {
	case rewound:
		// IDs do not rise with the offsets: a range of them may hold those of others.
		if err := e.removeIDs(batch, inc, from.offset, to.offset); err != nil {
			return err
		}
	case from.stream.less(to.stream):
		_ = batch.DeleteRange(e.keys.key(rowByStream, inc, from.stream.Ms, from.stream.Seq), e.keys.key(rowByStream, inc, to.stream.Ms, to.stream.Seq), nil)
	}
	_ = batch.DeleteRange(e.keys.key(rowBlock, inc, from.offset), e.keys.key(rowBlock, inc, to.offset), nil)
	_ = batch.DeleteRange(e.keys.key(rowByIndex, inc, from.index), e.keys.key(rowByIndex, inc, to.index), nil)
	return nil
}

// sweep adds to the checkpoint of s the removal of all blocks whose last message had expired or was removed by
// then. Dead blocks at the head of a topic go with one range deletion per kind, from where the last one ended;
// others one by one. It returns the floors that move with the checkpoint.
func (e *Engine) sweep(batch *pebble.Batch, s *state, removed map[uint64]removedBlocks) (floors map[uint64]floor, swept int64, err error) {
	defer e.damaged(&err)
	now := s.stamp.Cluster
	upto := max(now/expiryUnit, e.swept)
	if upto == e.swept && len(removed) == 0 {
		return nil, e.swept, nil
	}
	// The base offsets of dead blocks.
	byTopic := make(map[uint64][]uint64)
	for inc, r := range removed {
		byTopic[inc] = r.dead
	}
	it, err := e.db.NewIter(&pebble.IterOptions{
		LowerBound: e.keys.key(rowExpiry, uint64(e.swept)), UpperBound: e.keys.key(rowExpiry, uint64(upto)+1)})
	if err != nil {
		return nil, 0, fmt.Errorf("engine: reading the expiry index: %w", err)
	}
	defer func() { _ = it.Close() }()
	for it.First(); it.Valid(); it.Next() {
		v, err := it.ValueAndErr()
		if err != nil {
			return nil, 0, fmt.Errorf("engine: reading the expiry index: %w", err)
		}
		blocks, err := parseExpiry(v)
		if err != nil {
			return nil, 0, fmt.Errorf("engine: expiry row %x: %w", it.Key(), err)
		}
		for _, x := range blocks {
			byTopic[x.topic] = append(byTopic[x.topic], x.base)
			for _, d := range x.deps {
				_ = batch.Delete(e.keys.key(rowPosting, x.topic, d, x.base), nil)
			}
		}
	}
	if err := it.Error(); err != nil {
		return nil, 0, fmt.Errorf("engine: reading the expiry index: %w", err)
	}
	floors = make(map[uint64]floor)
	for _, inc := range sortedKeys(byTopic) {
		set := make(map[uint64]bool, len(byTopic[inc]))
		for _, base := range byTopic[inc] {
			set[base] = true
		}
		e.mu.RLock()
		t := e.byInc[inc]
		var old floor
		if t != nil {
			old = t.floor
		}
		e.mu.RUnlock()
		if t == nil {
			continue
		}
		f, err := e.raiseFloor(t, old, set, removed[inc].first, s)
		if err != nil {
			return nil, 0, err
		}
		if f != old {
			floors[inc] = f
			if err := e.removeBlocks(batch, inc, old, f, removed[inc].rewound); err != nil {
				return nil, 0, err
			}
			e.put(batch, f.appendRow(nil), rowFloor, inc)
		}
		for _, base := range byTopic[inc] {
			if base < f.offset {
				continue
			}
			if err := e.removeBlock(batch, inc, base); err != nil {
				return nil, 0, err
			}
		}
	}
	if err := e.sweepStaged(batch, upto); err != nil {
		return nil, 0, err
	}
	if err := e.sweepLarge(batch, upto); err != nil {
		return nil, 0, err
	}
	if upto > e.swept {
		_ = batch.DeleteRange(e.keys.key(rowExpiry, uint64(e.swept)), e.keys.key(rowExpiry, uint64(upto)+1), nil)
	}
	e.put(batch, floor{offset: uint64(upto)}.appendRow(nil), rowFloor, 0)
	return floors, upto, nil
}

// sweepStaged removes delayed messages that have expired, with the rows that lead to them.
func (e *Engine) sweepStaged(batch *pebble.Batch, upto int64) error {
	from, to := e.keys.key(rowStagedExpiry, uint64(e.swept)), e.keys.key(rowStagedExpiry, uint64(upto)+1)
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: from, UpperBound: to})
	if err != nil {
		return fmt.Errorf("engine: reading the expiry index: %w", err)
	}
	defer func() { _ = it.Close() }()
	any := false
	for it.First(); it.Valid(); it.Next() {
		inc, _ := keyPart(it.Key(), 1)
		index, ok := keyPart(it.Key(), 2)
		if !ok {
			return fmt.Errorf("engine: expiry row %x: %w", it.Key(), errMalformed)
		}
		any = true
		_ = batch.Delete(e.keys.key(rowStaged, inc, index), nil)
		_ = batch.Delete(e.keys.key(rowStagedIndex, inc, index), nil)
		_ = batch.DeleteRange(e.keys.key(rowPlace, inc, index), e.keys.key(rowPlace, inc, index+1), nil)
	}
	if err := it.Error(); err != nil {
		return fmt.Errorf("engine: reading the expiry index: %w", err)
	}
	if any {
		_ = batch.DeleteRange(from, to, nil)
	}
	return nil
}

// raiseFloor walks the stored headers of a topic from its floor over those in dead, and those that end at first or
// below, and returns where the first other block begins.
func (e *Engine) raiseFloor(t *topic, old floor, dead map[uint64]bool, first uint64, s *state) (floor, error) {
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: e.keys.key(rowBlock, t.inc, old.offset), UpperBound: e.keys.key(rowBlock, t.inc+1)})
	if err != nil {
		return old, fmt.Errorf("engine: reading block headers: %w", err)
	}
	defer func() { _ = it.Close() }()
	f := old
	for it.First(); it.Valid(); it.Next() {
		base, _ := keyPart(it.Key(), 1)
		v, err := it.ValueAndErr()
		if err != nil {
			return old, fmt.Errorf("engine: reading a block header: %w", err)
		}
		b, err := parseBlock(t.inc, base, v)
		if err != nil {
			return old, fmt.Errorf("engine: block header at offset %d: %w", base, err)
		}
		if !dead[base] && b.end() > first || b.index > s.index {
			if f == old {
				return old, nil
			}
			return floor{offset: base, index: b.index, stream: b.stream}, nil
		}
		f = floor{offset: b.end(), index: b.index + 1, stream: b.streamOf(b.count - 1).next()}
	}
	return f, it.Error()
}

// removeBlock removes the rows of one block.
func (e *Engine) removeBlock(batch *pebble.Batch, inc, base uint64) error {
	key := e.keys.key(rowBlock, inc, base)
	v, closer, err := e.db.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("engine: reading a block header: %w", err)
	}
	b, err := parseBlock(inc, base, v)
	_ = closer.Close()
	if err != nil {
		return fmt.Errorf("engine: block header at offset %d: %w", base, err)
	}
	_ = batch.Delete(key, nil)
	if b.refs == nil {
		_ = batch.Delete(e.keys.key(rowByIndex, inc, b.index), nil)
	}
	_ = batch.Delete(e.keys.key(rowByStream, inc, b.stream.Ms, b.stream.Seq, base), nil)
	return nil
}

// appendCanonical appends the replicated state in memory in its one form: what has expired is left out.
func (e *Engine) appendCanonical(b []byte) []byte {
	now := e.stamp.Cluster
	b = e.state.appendRest(b)
	b = binary.AppendUvarint(b, uint64(len(e.intakes)))
	for _, id := range sortedKeys(e.intakes) {
		b = binary.AppendUvarint(b, uint64(id))
		b = appendBytes(b, e.intakes[id].appendRow(nil))
	}
	b = e.canonicalDocuments(b)
	b = e.canonicalChanges(b)
	b = e.canonicalUploads(b)
	b = e.appendStrings(b)
	var row []byte
	b = binary.AppendUvarint(b, uint64(len(e.byInc)))
	for _, inc := range sortedKeys(e.byInc) {
		t := e.byInc[inc]
		b = binary.AppendUvarint(b, inc)
		row = t.appendRow(row[:0])
		b = appendBytes(b, row)
		for _, key := range sortedKeys(t.marks) {
			b = binary.AppendUvarint(b, key+1)
			b = t.marks[key].appendRow(b)
		}
		b = append(b, 0)
		b = binary.AppendUvarint(b, uint64(len(t.byInc)))
		for _, ginc := range sortedKeys(t.byInc) {
			g := t.byInc[ginc]
			b = binary.AppendUvarint(b, ginc)
			row = g.appendRow(row[:0])
			b = appendBytes(b, row)
			b = g.appendConsumers(b)
			for _, key := range sortedKeys(g.chunks) {
				if row = g.chunks[key].appendRow(row[:0], g, key, now); len(row) > 0 {
					b = binary.AppendUvarint(b, key+1)
					b = appendBytes(b, row)
				}
			}
			b = append(b, 0)
		}
	}
	return b
}
