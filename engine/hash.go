package engine

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"
)

// StateHash returns the applied index and a hash of everything replicas have to agree upon at it: all
// entries applied so far, and the state in memory. It reads nothing from the store.
func (e *Engine) StateHash() (index uint64, hash uint64) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	return e.index, xxhash.Sum64(e.appendCanonical(nil))
}

// FullHash hashes, besides what StateHash does, every stored row that belongs to the state: those of entries
// up to the applied one whose messages have not all expired. It reads everything and holds Apply up: a
// means of tests and of diagnosis.
func (e *Engine) FullHash() (index uint64, hash uint64, err error) {
	e.dbMu.RLock()
	defer e.dbMu.RUnlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	h := xxhash.New()
	_, _ = h.Write(e.appendCanonical(nil))
	add := func(b []byte) {
		_, _ = h.Write(binary.AppendUvarint(nil, uint64(len(b))))
		_, _ = h.Write(b)
	}
	err = e.logicalRows(func(key, value []byte) error {
		add(key)
		add(value)
		return nil
	})
	return e.index, h.Sum64(), err
}

// logicalRows visits the stored rows of all live blocks, with the rows that lead to them, and checks that
// they agree.
func (e *Engine) logicalRows(visit func(key, value []byte) error) (err error) {
	defer e.damaged(&err)
	now := e.stamp.Cluster
	get := func(kind byte, parts ...uint64) ([]byte, []byte, error) {
		key := e.keys.key(kind, parts...)
		v, closer, err := e.db.Get(key)
		if err != nil {
			return nil, nil, fmt.Errorf("engine: row %x: %w", key, err)
		}
		v = append([]byte(nil), v...)
		return key, v, closer.Close()
	}
	for _, inc := range sortedKeys(e.byInc) {
		t := e.byInc[inc]
		it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: e.keys.key(rowBlock, inc), UpperBound: e.keys.key(rowBlock, inc, t.next)})
		if err != nil {
			return err
		}
		for it.First(); it.Valid(); it.Next() {
			base, _ := keyPart(it.Key(), 1)
			v, err := it.ValueAndErr()
			if err != nil {
				_ = it.Close()
				return err
			}
			b, err := parseBlock(inc, base, v)
			if err != nil {
				_ = it.Close()
				return err
			}
			if b.lastExpiry <= now || b.end() <= t.first || t.allRemoved(b) {
				continue
			}
			err = visit(it.Key(), b.appendHeader(nil))
			if err == nil && b.refs == nil {
				var payload []byte
				if payload, err = e.logicalPayload(t, b); err == nil {
					err = visit(nil, payload)
				}
			}
			lead := [][]uint64{{rowByStream, inc, b.stream.Ms, b.stream.Seq, base}}
			if b.refs == nil {
				lead = append(lead, []uint64{rowByIndex, inc, b.index})
			}
			for _, r := range b.refs {
				if r.expiry() > now {
					lead = append(lead, []uint64{rowStaged, inc, r.index}, []uint64{rowPlace, inc, r.index, uint64(r.pos)})
				}
			}
			if b.lastExpiry != never {
				lead = append(lead, append([]uint64{rowExpiry}, expiryKey(expiryTick(b.lastExpiry), b.index, b.refs != nil)...))
			}
			for _, l := range lead {
				if err != nil {
					break
				}
				var key, row []byte
				if key, row, err = get(byte(l[0]), l[1:]...); err == nil && l[0] == rowExpiry {
					err = listed(row, b)
				}
				if err == nil {
					err = visit(key, row)
				}
			}
			if err != nil {
				_ = it.Close()
				return err
			}
		}
		err = it.Error()
		if cerr := it.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return fmt.Errorf("engine: reading topic %q: %w", t.name, err)
		}
	}
	if err := e.stagedRows(visit, now); err != nil {
		return err
	}
	return e.scan(rowKey, func(key, v []byte) error {
		ref, err := parseKey(e.o.Shard, v)
		if err != nil || ref.id.Index > e.index || ref.expiry <= now {
			return err
		}
		return visit(key, v)
	})
}

// stagedRows visits the rows of delayed messages that have not matured.
func (e *Engine) stagedRows(visit func(key, value []byte) error, now int64) error {
	return e.scan(rowDue, func(key, v []byte) error {
		at := dueOf(key)
		t := e.byInc[at.topic]
		if t == nil || at.index > e.index || !e.matured.before(at) {
			return nil
		}
		runs, err := parseRuns(rowDue, at.index, v)
		if err != nil {
			return err
		}
		for _, r := range runs {
			if r.expiry() <= now || t.purgedDelayed(r.index, r.pos+r.count-1) {
				continue
			}
			if err := visit(key, v); err != nil {
				return err
			}
			for _, kind := range []byte{rowStaged, rowStagedIndex} {
				key := e.keys.key(kind, at.topic, at.index)
				v, closer, err := e.db.Get(key)
				if err != nil {
					return fmt.Errorf("engine: row %x: %w", key, err)
				}
				err = visit(key, v)
				if cerr := closer.Close(); err == nil {
					err = cerr
				}
				if err != nil {
					return err
				}
			}
			break
		}
		return nil
	})
}

// logicalPayload is what of a block's payload is the same on every node: one may have dropped dead records, another not.
func (e *Engine) logicalPayload(t *topic, b *block) ([]byte, error) {
	alive, dead := t.aliveIn(b, e.stamp.Cluster, true)
	if alive == 0 {
		return nil, nil
	}
	payload, err := e.packs.read(t.inc, b.base, b.at)
	if err != nil {
		return nil, err
	}
	return appendThinned(nil, payload, dead), nil
}

// listed checks that a row of the expiry index leads to the block.
func listed(row []byte, b *block) error {
	blocks, err := parseExpiry(row)
	if err == nil && !slices.ContainsFunc(blocks, func(x expiring) bool { return x.topic == b.topic && x.base == b.base }) {
		err = fmt.Errorf("engine: no row of the expiry index leads to the block at offset %d: %w", b.base, errMalformed)
	}
	return err
}
