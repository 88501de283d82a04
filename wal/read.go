package wal

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"tercet.dev/tercet/wal/disk"
)

const (
	// readAhead is read around an entry that is not in memory; a reader that goes on where the last read ended gets
	// readAheadMax, so that a lagging follower or a replay costs few reads.
	readAhead    = 128 << 10
	readAheadMax = 1 << 20
	// chunksMax bounds the chunks kept: one for each of several readers at different places.
	chunksMax = 4
)

// chunk is a piece of a segment in memory. It is never modified, so that entries may refer to it.
type chunk struct {
	seg  *segment
	off  int64
	data []byte
}

// chunkCache keeps the chunks that were read last, newest first.
type chunkCache struct {
	mu     sync.Mutex
	chunks []*chunk
}

// get returns the bytes of a record if a chunk holds them.
func (c *chunkCache) get(loc location) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, ch := range c.chunks {
		at := int64(loc.off) - ch.off
		if ch.seg == loc.seg && at >= 0 && at+int64(loc.size) <= int64(len(ch.data)) {
			copy(c.chunks[1:i+1], c.chunks[:i])
			c.chunks[0] = ch
			return ch.data[at : at+int64(loc.size) : at+int64(loc.size)]
		}
	}
	return nil
}

// follows reports whether a record lies at the end of a chunk: its reader goes through the segment in order.
func (c *chunkCache) follows(loc location) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, ch := range c.chunks {
		end := ch.off + int64(len(ch.data))
		if ch.seg == loc.seg && int64(loc.off) <= end && int64(loc.off)+int64(loc.size) > end {
			return true
		}
	}
	return false
}

func (c *chunkCache) put(ch *chunk) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.chunks) < chunksMax {
		c.chunks = append(c.chunks, nil)
	}
	copy(c.chunks[1:], c.chunks)
	c.chunks[0] = ch
}

// drop forgets the chunks of segments that are about to be reused.
func (c *chunkCache) drop(segs []*segment) {
	c.mu.Lock()
	defer c.mu.Unlock()
	kept := c.chunks[:0]
	for _, ch := range c.chunks {
		gone := false
		for _, seg := range segs {
			gone = gone || ch.seg == seg
		}
		if !gone {
			kept = append(kept, ch)
		}
	}
	clear(c.chunks[len(kept):])
	c.chunks = kept
}

// readEntry reads an entry that is durable from its segment, which the caller has pinned.
func (w *WAL) readEntry(shard uint16, index uint64, loc location, e *Entry) error {
	raw := w.chunks.get(loc)
	if raw == nil {
		var err error
		if raw, err = w.readChunk(loc); err != nil {
			err = fmt.Errorf("wal: read entry %d of shard %d from %s at %d: %w", index, shard, loc.seg.path, loc.off, err)
			if errors.Is(err, io.EOF) {
				return w.damagedEntry(shard, index, loc, "the file ends before it")
			}
			return w.fail(err)
		}
	}
	h, ok := decodeRecordHeader(raw, place{w.stream, loc.seg.id, int64(loc.off)})
	switch {
	case !ok:
		return w.damagedEntry(shard, index, loc, "the checksum of its header is wrong")
	case h.size() != int64(loc.size) || h.shard != shard || h.index != index:
		return w.damagedEntry(shard, index, loc, "another record is in its place")
	}
	data := raw[recordHeaderSize : recordHeaderSize+int(h.dataLen) : recordHeaderSize+int(h.dataLen)]
	aux := raw[recordHeaderSize+int(h.dataLen):]
	if payloadSum(data, aux) != h.payloadSum {
		return w.damagedEntry(shard, index, loc, "the checksum of its content is wrong")
	}
	*e = Entry{Index: h.index, Term: h.term, Type: h.entryType, AppendedAt: fromUnixNano(h.appendedAt), Data: data}
	if len(aux) > 0 {
		e.Extensions = aux
	}
	return nil
}

// damagedEntry poisons the log: a node that cannot read what it promised to keep has to be replaced.
func (w *WAL) damagedEntry(shard uint16, index uint64, loc location, reason string) error {
	err := &CorruptionError{
		File: loc.seg.path, Offset: int64(loc.off), Shard: shard, First: index, Last: index, Reason: reason, Remedy: Remedy,
	}
	_ = w.fail(err)
	return err
}

func (w *WAL) readChunk(loc location) ([]byte, error) {
	w.diskReads.Add(1)
	ahead := int64(readAhead)
	if w.chunks.follows(loc) {
		ahead = readAheadMax
	}
	start := disk.AlignDown(int64(loc.off))
	// Only what is durable: beyond it a write may be under way, and a chunk is never read again.
	end := min(max(start+ahead, int64(loc.off)+int64(loc.size)), loc.seg.synced.Load())
	if end < int64(loc.off)+int64(loc.size) {
		return nil, io.EOF
	}
	ch := &chunk{seg: loc.seg, off: start, data: disk.Aligned(int(end - start))}
	if n, err := loc.seg.file.ReadAt(ch.data, start); err != nil && (!errors.Is(err, io.EOF) || n < len(ch.data)) {
		return nil, err
	}
	w.chunks.put(ch)
	at := int64(loc.off) - start
	return ch.data[at : at+int64(loc.size) : at+int64(loc.size)], nil
}
