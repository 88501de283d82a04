package wal

import (
	"errors"
	"fmt"
	"io"

	"tercet.dev/tercet/wal/disk"
)

// scanWindow is how much of a segment is read at a time.
const scanWindow = 1 << 20

// scanner reads a segment file from front to back through a window. It allocates no more than the file is long.
type scanner struct {
	file    disk.File
	size    int64
	segment uint64
	stream  uint64 // 0 accepts any

	buf   []byte
	start int64 // offset of buf[0]
}

func newScanner(f disk.File, segment, stream uint64) (*scanner, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	return &scanner{file: f, size: size, segment: segment, stream: stream}, nil
}

// bytes returns n bytes at an offset, fewer at the end of the file. They are valid until the next call.
func (s *scanner) bytes(off, n int64) ([]byte, error) {
	if off >= s.size || n <= 0 {
		return nil, nil
	}
	n = min(n, s.size-off)
	if off >= s.start && off+n <= s.start+int64(len(s.buf)) {
		return s.buf[off-s.start : off-s.start+n], nil
	}
	s.start = disk.AlignDown(off)
	want := min(max(scanWindow, disk.AlignUp(off+n)-s.start), s.size-s.start)
	if int64(cap(s.buf)) < want {
		s.buf = disk.Aligned(int(disk.AlignUp(want)))
	}
	s.buf = s.buf[:want]
	if got, err := s.file.ReadAt(s.buf, s.start); err != nil && (!errors.Is(err, io.EOF) || int64(got) < want) {
		s.buf = s.buf[:0]
		return nil, fmt.Errorf("read %d bytes at %d: %w", want, s.start, err)
	}
	return s.buf[off-s.start : off-s.start+n], nil
}

// scanned is one record as the scanner meets it. Data and aux are valid until the visit returns.
type scanned struct {
	recordHeader
	segment   uint64
	off       int64
	data, aux []byte
}

// visitor is told what a scan meets. Its error ends the scan and is returned as it is.
type visitor interface {
	batch(h *batchHeader) error
	record(r *scanned) error
}

// stop says where and why a scan ended.
type stop struct {
	// end is the offset up to which the segment is good.
	end int64
	// clean: end is where the caller said the segment ends, or where a batch would begin and none does.
	clean bool
	// next is where to look for later batches.
	next int64
	// started: a batch had begun at end, or the block there is not blank, so that something was being written.
	started bool
	reason  string
	// batches that were read completely.
	batches int
	// first is the header of the batch at the head of the segment, if that is valid.
	first *batchHeader
	// headBad: the state record at the head of the segment is unreadable.
	headBad bool
}

// scan reads batches from the head of the segment up to end, or, if end is negative, as far as they go.
// The error is one of reading, or of the visitor; damage is described by the result.
func (s *scanner) scan(end int64, v visitor) (stop, error) {
	st := stop{}
	off := int64(0)
	var prev int64
	for {
		if off == end {
			st.end, st.clean, st.reason = off, true, "end"
			return st, nil
		}
		if end >= 0 && off > end {
			st.end, st.next, st.reason = end, off, "a batch reaches beyond the end that the next segment states"
			return st, nil
		}
		b, err := s.bytes(off, batchHeaderSize)
		if err != nil {
			return st, err
		}
		h, ok, err := decodeBatchHeader(b, s.stream, s.segment, off)
		if err != nil {
			return st, err
		}
		if !ok {
			st.end, st.next, st.clean, st.reason = off, off+blockSize, end < 0, "no valid batch"
			if off < s.size {
				if b, err = s.bytes(off, blockSize); err != nil {
					return st, err
				}
				st.started = len(b) >= 4 && string(b[:4]) == string(magicBytes[:])
			}
			return st, nil
		}
		next := off + disk.AlignUp(int64(h.used))
		bad := ""
		switch {
		case int64(h.size) != s.size:
			bad = fmt.Sprintf("the file has %d bytes, written as %d", s.size, h.size)
		case next > s.size:
			bad = "a batch reaches beyond the end of the file"
		case off > 0 && (int64(h.prevEnd) != prev || h.prevSeg != 0):
			bad = "a batch does not follow the one before it"
		}
		if bad != "" {
			// The header is genuine, so this is no torn write: what it speaks of had been synced.
			st.end, st.next, st.reason, st.started = off, off, bad, true
			return st, nil
		}
		if off == 0 {
			st.first = &h
			s.stream = h.stream
		}
		if err := v.batch(&h); err != nil {
			return st, err
		}
		pos, at, reason, err := s.records(&h, off, end, v)
		if err != nil {
			return st, err
		}
		if reason != "" {
			st.end, st.next, st.reason, st.started = pos, next, reason, true
			st.headBad = off == 0 && at == 0
			return st, nil
		}
		if pos == end {
			st.end, st.clean, st.reason = pos, true, "end"
			return st, nil
		}
		st.batches++
		prev, off = off, next
	}
}

var magicBytes = [4]byte{'T', 'W', 'B', '1'}

// records visits the records of the batch at off. It returns how far they are good, the number of the record it
// stopped at, and why it stopped early, if it did for another reason than having reached end.
func (s *scanner) records(h *batchHeader, off, end int64, v visitor) (pos int64, n uint32, reason string, err error) {
	pos = off + batchHeaderSize
	limit := off + int64(h.used)
	for n = 0; n < h.count; n++ {
		if pos == end {
			return pos, n, "", nil
		}
		b, err := s.bytes(pos, recordHeaderSize)
		if err != nil {
			return pos, n, "", err
		}
		rh, ok := decodeRecordHeader(b, place{s.stream, s.segment, pos})
		switch {
		case !ok || pos+recordHeaderSize > limit:
			return pos, n, "the checksum of a record's header is wrong", nil
		case pos+rh.size() > limit:
			return pos, n, "a record reaches beyond its batch", nil
		case off == 0 && n == 0 && rh.typ != recordState:
			return pos, n, "a segment does not begin with a state record", nil
		}
		r := scanned{recordHeader: rh, segment: s.segment, off: pos}
		if b, err = s.bytes(pos, rh.size()); err != nil {
			return pos, n, "", err
		}
		r.data = b[recordHeaderSize : recordHeaderSize+int64(rh.dataLen)]
		r.aux = b[recordHeaderSize+int64(rh.dataLen):]
		if payloadSum(r.data, r.aux) != rh.payloadSum {
			return pos, n, "the checksum of a record's content is wrong", nil
		}
		if err := v.record(&r); err != nil {
			return pos, n, "", err
		}
		pos += rh.size()
	}
	if pos == end {
		return pos, n, "", nil
	}
	if pos != limit {
		return pos, n, "a batch does not end with its last record", nil
	}
	pad, err := s.bytes(pos, off+disk.AlignUp(int64(h.used))-pos)
	if err != nil {
		return pos, n, "", err
	}
	for _, c := range pad {
		if c != 0 {
			return pos, n, "the padding behind a batch is not zero", nil
		}
	}
	return pos, n, "", nil
}

// findBatch looks for a valid batch of this segment at a block boundary from off on. Finding one proves that
// everything before it had been synced.
func (s *scanner) findBatch(off int64) (at int64, found bool, err error) {
	for off = disk.AlignUp(off); off < s.size; off += blockSize {
		b, err := s.bytes(off, batchHeaderSize)
		if err != nil {
			return 0, false, err
		}
		if _, ok, err := decodeBatchHeader(b, s.stream, s.segment, off); err != nil {
			return 0, false, err
		} else if ok {
			return off, true, nil
		}
	}
	return 0, false, nil
}
