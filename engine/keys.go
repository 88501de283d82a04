package engine

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

	"github.com/cockroachdb/pebble/v2"

	"tercet.dev/tercet/internal/limits"
)

// Idempotency keys. A key's row K is written once, with the message that brought it, into the bucket of its
// retention class and expiry, and falls with the bucket. A filter in memory per bucket makes it improbable
// that the search for a key that is not there reads anything; what a filter says is verified by the row, so
// filters, which are made anew at every start, have no part in what replicas decide.
//
// Class c holds windows of [2^c, 2^(c+1)) seconds, in buckets of half of 2^c. So no row is written twice: what takes
// up an expired key again, within the same class, expires at least 2^c after the one before it did, which is beyond
// the end of that one's bucket.

// keyHash is 128 bits of SHA-256 over topic, deployment and key.
type keyHash struct{ hi, lo uint64 }

// keyBucket names a bucket.
type keyBucket struct {
	class uint64
	epoch uint64
}

// keyRef is what a key leads to.
type keyRef struct {
	id     MessageID
	expiry int64
}

// newKey is a key that the entry being applied has brought.
type newKey struct {
	bucket keyBucket
	hash   keyHash
	ref    keyRef
}

const keyClassMax = 40

func keyClass(window int64) uint64 {
	s := uint64(max(window/1000, 1))
	return min(uint64(bits.Len64(s))-1, keyClassMax)
}

// width is how long a bucket of the class is, in milliseconds.
func keyWidth(class uint64) uint64 { return 500 << class }

func bucketOf(window, expiry int64) keyBucket {
	c := keyClass(window)
	return keyBucket{class: c, epoch: uint64(expiry) / keyWidth(c)}
}

// over reports that everything in the bucket has expired.
func (b keyBucket) over(now int64) bool { return (b.epoch+1)*keyWidth(b.class) <= uint64(now) }

// hashKey hashes a key with its scope. A purge gives the topic another number to hash with.
func (e *Engine) hashKey(t *topic, deployment, key []byte) keyHash {
	b := e.rowBuf[:0]
	b = binary.BigEndian.AppendUint64(b, max(t.inc, t.keySpace))
	b = appendBytes(b, deployment)
	b = append(b, key...)
	e.rowBuf = b[:0]
	sum := sha256.Sum256(b)
	return keyHash{binary.BigEndian.Uint64(sum[0:]), binary.BigEndian.Uint64(sum[8:])}
}

// findKey returns the message that holds the key at now, if one does.
func (e *Engine) findKey(h keyHash, now int64) (MessageID, bool, error) {
	if ref, ok := e.entryKeys[h]; ok && ref.expiry > now {
		return ref.id, true, nil
	}
	for b, f := range e.keyFilters { // at most one row lives, so the order does not show
		if b.over(now) || !f.has(h) {
			continue
		}
		v, closer, err := e.db.Get(e.keys.key(rowKey, b.class, b.epoch, h.hi, h.lo))
		if errors.Is(err, pebble.ErrNotFound) {
			continue
		}
		if err != nil {
			return MessageID{}, false, fmt.Errorf("reading a key: %w", err)
		}
		ref, bad := parseKey(e.o.Shard, v)
		_ = closer.Close()
		if bad != nil {
			return MessageID{}, false, bad
		}
		if (ref.id.Index < e.index || e.seeLaterRows) && ref.expiry > now {
			return ref.id, true, nil
		}
	}
	return MessageID{}, false, nil
}

// holdKey notes that a message of the entry being applied holds the key.
func (e *Engine) holdKey(h keyHash, id MessageID, now, window int64) {
	ref := keyRef{id: id, expiry: now + window}
	if e.entryKeys == nil {
		e.entryKeys = make(map[keyHash]keyRef)
	}
	e.entryKeys[h] = ref
	b := bucketOf(window, ref.expiry)
	e.newKeys = append(e.newKeys, newKey{bucket: b, hash: h, ref: ref})
	f := e.keyFilters[b]
	if f == nil {
		// The bucket before it says how many keys to expect.
		f = newKeyFilter(e.keyFilters[keyBucket{b.class, b.epoch - 1}].count())
		e.keyFilters[b] = f
	}
	f.add(h)
}

// keyWindow is how long a key is held: the life of its message.
func keyWindow(retention uint32) int64 {
	if retention == 0 {
		return limits.RetentionMax.Milliseconds()
	}
	return int64(retention) * 1000
}

func (e *Engine) putKeys(batch *pebble.Batch) {
	for i := range e.newKeys {
		k := &e.newKeys[i]
		e.put(batch, k.ref.append(e.rowBuf[:0]), rowKey, k.bucket.class, k.bucket.epoch, k.hash.hi, k.hash.lo)
	}
}

func (ref keyRef) append(b []byte) []byte {
	b = append(b, rowVersion, byte(ref.id.Kind))
	b = binary.AppendUvarint(b, ref.id.Index)
	b = binary.AppendUvarint(b, uint64(ref.id.Pos))
	return binary.AppendUvarint(b, uint64(ref.expiry))
}

func parseKey(shard uint16, row []byte) (keyRef, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return keyRef{}, rowError(rowKey, v)
	}
	ref := keyRef{id: MessageID{Shard: shard, Kind: MessageKind(r.u8()), Index: r.uvarint(), Pos: uint32(r.upTo(1<<32 - 1))}, expiry: int64(r.upTo(1 << 61))}
	return ref, r.err()
}

// dropKeyBuckets removes the buckets that are over as of a checkpoint.
func (e *Engine) dropKeyBuckets(batch *pebble.Batch, now int64) {
	for b := range e.keyFilters {
		if b.over(now) {
			delete(e.keyFilters, b)
			_ = batch.DeleteRange(e.keys.key(rowKey, b.class, b.epoch), e.keys.key(rowKey, b.class, b.epoch+1), nil)
		}
	}
}

// loadKeys makes the filters from the rows. Rows of later entries are among them, which does no harm.
func (e *Engine) loadKeys() error {
	e.keyFilters = make(map[keyBucket]*keyFilter)
	var at keyBucket
	var hashes []keyHash
	flush := func() {
		if len(hashes) == 0 {
			return
		}
		f := newKeyFilter(len(hashes))
		for _, h := range hashes {
			f.add(h)
		}
		e.keyFilters[at] = f
		hashes = hashes[:0]
	}
	err := e.scan(rowKey, func(key, _ []byte) error {
		class, _ := keyPart(key, 0)
		epoch, _ := keyPart(key, 1)
		hi, _ := keyPart(key, 2)
		lo, ok := keyPart(key, 3)
		if !ok || class > keyClassMax {
			return errMalformed
		}
		if b := (keyBucket{class, epoch}); b != at {
			flush()
			at = b
		}
		hashes = append(hashes, keyHash{hi, lo})
		return nil
	})
	flush()
	return err
}

// keyFilter is a Bloom filter in blocks of a cache line, 13 bits a key, in layers each twice as large as the
// one before: the number of keys is not known when it begins.
type keyFilter struct {
	layers [][][8]uint64
	room   int // keys the last layer still takes
	keys   int
}

const (
	filterBlockKeys = 39  // 512 bits, 13 a key
	filterFirst     = 256 // blocks of the smallest layer: 16 KiB
)

func newKeyFilter(expect int) *keyFilter {
	f := &keyFilter{}
	f.grow(max(filterFirst, (expect+filterBlockKeys-1)/filterBlockKeys))
	return f
}

func (f *keyFilter) count() int {
	if f == nil {
		return 0
	}
	return f.keys
}

func (f *keyFilter) grow(blocks int) {
	f.layers = append(f.layers, make([][8]uint64, blocks))
	f.room = blocks * filterBlockKeys
}

func (f *keyFilter) bytes() int {
	n := 0
	for _, l := range f.layers {
		n += 64 * len(l)
	}
	return n
}

func (f *keyFilter) add(h keyHash) {
	if f.room == 0 {
		f.grow(2 * len(f.layers[len(f.layers)-1]))
	}
	f.room--
	f.keys++
	l := f.layers[len(f.layers)-1]
	hi, _ := bits.Mul64(h.hi, uint64(len(l)))
	b := &l[hi]
	for x, n := h.lo, 0; n < 7; x, n = x>>9, n+1 {
		b[x>>6&7] |= 1 << (x & 63)
	}
}

func (f *keyFilter) has(h keyHash) bool {
next:
	for _, l := range f.layers {
		hi, _ := bits.Mul64(h.hi, uint64(len(l)))
		b := &l[hi]
		for x, n := h.lo, 0; n < 7; x, n = x>>9, n+1 {
			if b[x>>6&7]&(1<<(x&63)) == 0 {
				continue next
			}
		}
		return true
	}
	return false
}
