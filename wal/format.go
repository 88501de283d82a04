package wal

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"time"

	"tercet.dev/tercet/wal/disk"
)

// The format on disk; DESIGN.md has the diagrams. All numbers are little-endian.
const (
	// blockSize is the unit of writing. Each batch starts on a block of its own, so that a block holding synced
	// bytes is never written again.
	blockSize = disk.BlockSize
	// batchMagic begins every batch ("TWB1").
	batchMagic = 0x31425754
	// formatVersion is raised when a reader of this version could misunderstand what a writer wrote.
	formatVersion = 1

	batchHeaderSize  = 80
	recordHeaderSize = 48
)

// Flags of a batch.
const (
	// flagFirst marks the batch at the head of a segment. Its first record is a state record.
	flagFirst = 1 << iota
	// flagMarker marks a batch written only to record how far the log had been synced.
	flagMarker
)

const flagsKnown = flagFirst | flagMarker

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// batchHeader stands at the start of each batch. Since a batch is written only after the sync of the one before it
// returned, a valid header at some offset proves that everything before that offset had been synced.
type batchHeader struct {
	stream  uint64 // drawn once per log directory; tells our blocks from those of other logs
	segment uint64 // number of the segment
	offset  uint64 // of the batch in the segment
	size    uint64 // of the segment file
	used    uint32 // bytes of header and records; the rest of the last block is zero
	count   uint32 // records
	prevSeg uint64 // first batch: the segment before this one, or 0
	prevEnd uint64 // first batch: where the log ends in prevSeg; else the offset of the batch before
	time    int64  // Unix nanoseconds, for people
	flags   uint32
}

func (h *batchHeader) encode(b []byte) {
	_ = b[batchHeaderSize-1]
	le := binary.LittleEndian
	le.PutUint32(b[0:], batchMagic)
	le.PutUint64(b[8:], h.stream)
	le.PutUint64(b[16:], h.segment)
	le.PutUint64(b[24:], h.offset)
	le.PutUint64(b[32:], h.size)
	le.PutUint32(b[40:], h.used)
	le.PutUint32(b[44:], h.count)
	le.PutUint64(b[48:], h.prevSeg)
	le.PutUint64(b[56:], h.prevEnd)
	le.PutUint64(b[64:], uint64(h.time))
	le.PutUint32(b[72:], h.flags)
	le.PutUint32(b[76:], formatVersion)
	le.PutUint32(b[4:], checksum(b[8:batchHeaderSize]))
}

// errVersion reports a valid batch of a format this program does not know.
type errVersion struct{ version, flags uint32 }

func (e errVersion) Error() string {
	return fmt.Sprintf("wal: format version %d, flags %#x are newer than this program (version %d)", e.version, e.flags, formatVersion)
}

// decodeBatchHeader reports whether b begins with a valid header of the given segment at the given offset. A stream
// of zero accepts any stream.
func decodeBatchHeader(b []byte, stream, segment uint64, offset int64) (h batchHeader, ok bool, err error) {
	le := binary.LittleEndian
	if len(b) < batchHeaderSize || le.Uint32(b) != batchMagic {
		return h, false, nil
	}
	if le.Uint32(b[4:]) != checksum(b[8:batchHeaderSize]) {
		return h, false, nil
	}
	h = batchHeader{
		stream: le.Uint64(b[8:]), segment: le.Uint64(b[16:]), offset: le.Uint64(b[24:]), size: le.Uint64(b[32:]),
		used: le.Uint32(b[40:]), count: le.Uint32(b[44:]), prevSeg: le.Uint64(b[48:]), prevEnd: le.Uint64(b[56:]),
		time: int64(le.Uint64(b[64:])), flags: le.Uint32(b[72:]),
	}
	if h.segment != segment || h.offset != uint64(offset) || (stream != 0 && h.stream != stream) {
		return h, false, nil
	}
	if v := le.Uint32(b[76:]); v != formatVersion || h.flags&^flagsKnown != 0 {
		return h, false, errVersion{v, h.flags}
	}
	if h.used < batchHeaderSize || (h.flags&flagFirst != 0) != (offset == 0) {
		return h, false, nil
	}
	return h, true, nil
}

// recordType says what a record does to its shard.
type recordType uint8

const (
	// recordEntry appends the entry index, which follows the last one or starts an empty log.
	recordEntry recordType = iota + 1
	// recordRewrite repeats an entry of an old segment, so that the old segment can go.
	recordRewrite
	// recordTruncate drops the entries from index on.
	recordTruncate
	// recordReset drops everything; the log goes on at index.
	recordReset
	// recordStable sets a stable value: aux is the key, data the value; entryType 1 removes the key.
	recordStable
	// recordCommit says that the entries up to index are committed.
	recordCommit
	// recordState holds the state of all shards at its place in the stream, except the entries themselves.
	recordState
)

// String names the type as `tercet wal dump` prints it.
func (t recordType) String() string {
	names := [...]string{"", "entry", "rewrite", "truncate", "reset", "stable", "commit", "state"}
	if int(t) < len(names) && t > 0 {
		return names[t]
	}
	return fmt.Sprintf("type %d", uint8(t))
}

// recordHeader stands before each record's data and aux bytes. The header's checksum covers the log, the segment's
// number and the record's place in it, so that what an earlier life of the file left behind cannot be taken for a record; the
// payload's checksum does not, so that it can be computed before the place is known and outside the log's lock.
type recordHeader struct {
	payloadSum uint32
	dataLen    uint32
	auxLen     uint32
	typ        recordType
	entryType  uint8
	shard      uint16
	index      uint64
	term       uint64
	appendedAt int64 // Unix nanoseconds; 0 is the zero time
}

func (h *recordHeader) size() int64 { return recordHeaderSize + int64(h.dataLen) + int64(h.auxLen) }

// place is where a record stands: the log, the segment's number, and the offset in it.
type place struct {
	stream, segment uint64
	offset          int64
}

// sum is the start value of the header checksum of a record. A CRC is a bijection of its start value, and the products
// are bijections of the halves: a header found at its old place in a recycled file never matches, unless 2^32 segments
// lie between the two lives; one of another log does so once in 2^32.
func (p place) sum() uint32 {
	return uint32(p.segment)*0x9e3779b1 ^ uint32(p.segment>>32)*0x85ebca77 ^ uint32(p.offset) ^
		uint32(p.stream)*0xc2b2ae3d ^ uint32(p.stream>>32)*0x27d4eb2f
}

func (h *recordHeader) encode(b []byte, at place) {
	_ = b[recordHeaderSize-1]
	le := binary.LittleEndian
	le.PutUint32(b[4:], h.payloadSum)
	le.PutUint32(b[8:], h.dataLen)
	le.PutUint32(b[12:], h.auxLen)
	b[16] = uint8(h.typ)
	b[17] = h.entryType
	le.PutUint16(b[18:], h.shard)
	le.PutUint32(b[20:], 0)
	le.PutUint64(b[24:], h.index)
	le.PutUint64(b[32:], h.term)
	le.PutUint64(b[40:], uint64(h.appendedAt))
	le.PutUint32(b[0:], crc32.Update(at.sum(), castagnoli, b[4:recordHeaderSize]))
}

func decodeRecordHeader(b []byte, at place) (h recordHeader, ok bool) {
	le := binary.LittleEndian
	if len(b) < recordHeaderSize {
		return h, false
	}
	if le.Uint32(b) != crc32.Update(at.sum(), castagnoli, b[4:recordHeaderSize]) {
		return h, false
	}
	h = recordHeader{
		payloadSum: le.Uint32(b[4:]), dataLen: le.Uint32(b[8:]), auxLen: le.Uint32(b[12:]),
		typ: recordType(b[16]), entryType: b[17], shard: le.Uint16(b[18:]),
		index: le.Uint64(b[24:]), term: le.Uint64(b[32:]), appendedAt: int64(le.Uint64(b[40:])),
	}
	return h, h.typ >= recordEntry && h.typ <= recordState && le.Uint32(b[20:]) == 0
}

// payloadSum is the checksum over a record's data and aux bytes.
func payloadSum(data, aux []byte) uint32 {
	return crc32.Update(crc32.Checksum(data, castagnoli), castagnoli, aux)
}

func unixNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromUnixNano(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// shardState is what a state record says of one shard.
type shardState struct {
	id          uint16
	first, next uint64 // the log holds [first, next)
	commit      uint64
	stable      []keyValue // sorted by key
}

type keyValue struct {
	key   string
	value []byte
}

// logState is the payload of a state record.
type logState struct {
	oldest uint64       // the lowest segment the log still needs
	shards []shardState // sorted by id
}

func (s *logState) size() int {
	n := 8 + 4
	for i := range s.shards {
		n += 2 + 3*8 + 4
		for _, kv := range s.shards[i].stable {
			n += 8 + len(kv.key) + len(kv.value)
		}
	}
	return n
}

func (s *logState) append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint64(b, s.oldest)
	b = le.AppendUint32(b, uint32(len(s.shards)))
	for i := range s.shards {
		sh := &s.shards[i]
		b = le.AppendUint16(b, sh.id)
		b = le.AppendUint64(b, sh.first)
		b = le.AppendUint64(b, sh.next)
		b = le.AppendUint64(b, sh.commit)
		b = le.AppendUint32(b, uint32(len(sh.stable)))
		for _, kv := range sh.stable {
			b = le.AppendUint32(b, uint32(len(kv.key)))
			b = le.AppendUint32(b, uint32(len(kv.value)))
			b = append(b, kv.key...)
			b = append(b, kv.value...)
		}
	}
	return b
}

// decodeState reads a state record's payload. It allocates in proportion to b, whatever the counts in it say.
func decodeState(b []byte) (s logState, ok bool) {
	le := binary.LittleEndian
	if len(b) < 12 {
		return s, false
	}
	s.oldest = le.Uint64(b)
	n := le.Uint32(b[8:])
	b = b[12:]
	for range n {
		if len(b) < 30 {
			return s, false
		}
		sh := shardState{id: le.Uint16(b), first: le.Uint64(b[2:]), next: le.Uint64(b[10:]), commit: le.Uint64(b[18:])}
		kvs := le.Uint32(b[26:])
		b = b[30:]
		for range kvs {
			if len(b) < 8 {
				return s, false
			}
			kl, vl := uint64(le.Uint32(b)), uint64(le.Uint32(b[4:]))
			b = b[8:]
			if uint64(len(b)) < kl+vl {
				return s, false
			}
			sh.stable = append(sh.stable, keyValue{key: string(b[:kl]), value: append([]byte{}, b[kl:kl+vl]...)})
			b = b[kl+vl:]
		}
		if sh.first > sh.next {
			return s, false
		}
		s.shards = append(s.shards, sh)
	}
	return s, len(b) == 0
}
