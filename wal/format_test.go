package wal

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tercet.dev/tercet/wal/disk/sim"
)

var rewrite = flag.Bool("rewrite", false, "write the golden files anew")

// goldenSegment holds the used part of a segment of format version 1, as hex. Logs written by any release must stay
// readable: this file may be added to, and is never changed.
const goldenSegment = "segment-v1.hex"

// goldenLog is the log in the golden file, with every kind of record but rewrite.
func goldenLog(t *testing.T) (image, string) {
	d := sim.New(1, sim.Options{})
	w := mustOpen(t, steppedOptions(d))
	a, b := w.Shard(0), w.Shard(258)
	appendTo(t, a, 7, 1, 20)
	appendTo(t, a, 8, 1, 0)
	appendTo(t, a, 9, 1, 5)
	a.StageCommit(8)
	must(t, w.WaitDurable(w.Written(), nil))
	must(t, b.SetStable("vote", []byte("b@4")))
	must(t, b.SetStable("gone", []byte("x")))
	must(t, b.SetStable("gone", nil))
	_, err := a.TruncateSuffix(9)
	must(t, err)
	appendTo(t, a, 9, 2, 6)
	_, err = b.Reset(41)
	must(t, err)
	appendTo(t, b, 41, 1, 3)
	must(t, w.WaitDurable(w.Written(), nil))
	name := w.tail.seg.path
	return closed(t, d, w), name
}

func TestGoldenSegment(t *testing.T) {
	path := filepath.Join("testdata", goldenSegment)
	im, name := goldenLog(t)
	if *rewrite {
		used := im.disk.ReadFile(name)[:im.used[name]]
		var b strings.Builder
		for i := 0; i < len(used); i += 32 {
			line := used[i : i+32]
			if !bytes.Equal(line, make([]byte, 32)) {
				b.WriteString(hex.EncodeToString(binary.BigEndian.AppendUint32(nil, uint32(i))) + " " + hex.EncodeToString(line) + "\n")
			}
		}
		must(t, os.MkdirAll("testdata", 0o755))
		must(t, os.WriteFile(path, []byte(b.String()), 0o644))
	}
	text, err := os.ReadFile(path)
	must(t, err)
	content := make([]byte, 32<<10)
	for _, line := range strings.Fields(strings.ReplaceAll(string(text), " ", "")) {
		raw, err := hex.DecodeString(line)
		must(t, err)
		copy(content[binary.BigEndian.Uint32(raw):], raw[4:])
	}
	// Written today, the log differs only in the times at which its batches were written.
	d := sim.New(1, sim.Options{})
	d.WriteFile(name, content)
	out := open(t, d)
	if out.corrupt != nil || out.torn || out.state != im.state {
		t.Fatalf("the golden segment reads as %+v, want\n%s", out, im.state)
	}
	now := im.disk.ReadFile(name)
	for off := 0; off < len(content); off += blockSize {
		for _, b := range [][]byte{content[off : off+blockSize], now[off : off+blockSize]} {
			if len(b) >= batchHeaderSize && binary.LittleEndian.Uint32(b) == batchMagic {
				clear(b[64:72]) // time
				clear(b[4:8])   // and the checksum over it
			}
		}
	}
	if !bytes.Equal(content, now) {
		t.Fatal("the format has changed: raise its version, keep reading this one, and add a golden file")
	}
}

func TestNewerFormatIsRefusedAsSuch(t *testing.T) {
	im, name := goldenLog(t)
	content := im.disk.ReadFile(name)
	binary.LittleEndian.PutUint32(content[76:], formatVersion+1)
	binary.LittleEndian.PutUint32(content[4:], checksum(content[8:batchHeaderSize]))
	im.disk.WriteFile(name, content)
	_, err := Open(steppedOptions(im.disk))
	if err == nil || errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "newer than this program") {
		t.Fatalf("a newer format gives %v", err)
	}
}

// FuzzSegment feeds arbitrary bytes to the segment reader: as they are, and as the payload region of a segment whose
// checksums are right, which is what gets past the first check.
func FuzzSegment(f *testing.F) {
	text, err := os.ReadFile(filepath.Join("testdata", goldenSegment))
	if err == nil {
		content := make([]byte, 16<<10)
		for _, line := range strings.Fields(strings.ReplaceAll(string(text), " ", "")) {
			if raw, err := hex.DecodeString(line); err == nil && binary.BigEndian.Uint32(raw) < uint32(len(content)) {
				copy(content[binary.BigEndian.Uint32(raw):], raw[4:])
			}
		}
		f.Add(content, false)
		f.Add(content, true)
	}
	f.Add([]byte{}, true)
	f.Fuzz(func(t *testing.T, content []byte, mend bool) {
		if len(content) > 256<<10 {
			return
		}
		size := max((len(content)+blockSize-1)/blockSize*blockSize, SegmentSizeMin)
		b := make([]byte, size)
		copy(b, content)
		if mend {
			mendChecksums(b)
		}
		d := sim.New(1, sim.Options{})
		d.WriteFile("/log/"+segmentName(1), b)
		rep, verr := Verify(d, "/log")
		n := 0
		derr := Dump(d, "/log", func(*Record) error { n++; return nil })
		if n > size/recordHeaderSize+size/blockSize {
			t.Fatalf("%d records in %d bytes", n, size)
		}
		w, oerr := Open(steppedOptions(d))
		if (oerr == nil) != (verr == nil && rep.Corruption == nil) {
			t.Fatalf("verify says %v, %v; opening says %v", rep.Corruption, verr, oerr)
		}
		if oerr == nil && derr != nil {
			t.Fatalf("dump fails on a sound log: %v", derr)
		}
		if oerr != nil {
			return
		}
		// Whatever was accepted must be served, and be found again.
		state, err := describe(w)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if again := open(t, d); again.corrupt != nil || again.state != state {
			t.Fatalf("the second start finds another log: %v", again.corrupt)
		}
	})
}

// mendChecksums puts the right checksums into whatever looks like a batch or a record, and gives batches the place
// they have.
func mendChecksums(b []byte) {
	le := binary.LittleEndian
	for off := 0; off+batchHeaderSize <= len(b); {
		used := int(le.Uint32(b[off+40:]))
		if le.Uint32(b[off:]) != batchMagic || used < batchHeaderSize || off+used > len(b) {
			off += blockSize
			continue
		}
		le.PutUint64(b[off+16:], 1)
		le.PutUint64(b[off+24:], uint64(off))
		le.PutUint64(b[off+32:], uint64(len(b)))
		le.PutUint32(b[off+4:], checksum(b[off+8:off+batchHeaderSize]))
		for at := off + batchHeaderSize; at+recordHeaderSize <= off+used; {
			size := recordHeaderSize + int(le.Uint32(b[at+8:])) + int(le.Uint32(b[at+12:]))
			if size < recordHeaderSize || at+size > off+used {
				break
			}
			h := recordHeader{
				dataLen: le.Uint32(b[at+8:]), auxLen: le.Uint32(b[at+12:]), typ: recordType(b[at+16]), entryType: b[at+17],
				shard: le.Uint16(b[at+18:]), index: le.Uint64(b[at+24:]), term: le.Uint64(b[at+32:]), appendedAt: int64(le.Uint64(b[at+40:])),
			}
			h.payloadSum = payloadSum(b[at+recordHeaderSize:at+size], nil)
			h.encode(b[at:], place{le.Uint64(b[off+8:]), 1, int64(at)})
			at += size
		}
		off += (used + blockSize - 1) / blockSize * blockSize
	}
}

// FuzzState feeds arbitrary bytes to the decoder of state records.
func FuzzState(f *testing.F) {
	st := logState{oldest: 3, shards: []shardState{{id: 1, first: 2, next: 9, commit: 4, stable: []keyValue{{"k", []byte("v")}}}}}
	f.Add(st.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if st, ok := decodeState(b); ok {
			if again := st.append(nil); !bytes.Equal(again, b) || len(again) != st.size() {
				t.Fatalf("%x is encoded as %x", b, again)
			}
		}
	})
}

// segmentBytes puts a segment together by hand: one batch with the given records.
func segmentBytes(records ...func(h *recordHeader) []byte) []byte {
	b := make([]byte, SegmentSizeMin)
	n := batchHeaderSize
	for _, r := range records {
		var h recordHeader
		data := r(&h)
		h.dataLen, h.payloadSum = uint32(len(data)), payloadSum(data, nil)
		h.encode(b[n:], place{9, 1, int64(n)})
		n += recordHeaderSize + copy(b[n+recordHeaderSize:], data)
	}
	bh := batchHeader{stream: 9, segment: 1, size: SegmentSizeMin, used: uint32(n), count: uint32(len(records)), flags: flagFirst}
	bh.encode(b)
	return b
}

// TestEntriesInNoSegmentAreMissed: what a state record claims has to be found. Entries that were moved are.
func TestEntriesInNoSegmentAreMissed(t *testing.T) {
	state := func(h *recordHeader) []byte {
		h.typ = recordState
		st := logState{oldest: 1, shards: []shardState{{id: 4, first: 3, next: 6}}}
		return st.append(nil)
	}
	moved := func(index uint64) func(h *recordHeader) []byte {
		return func(h *recordHeader) []byte {
			h.typ, h.shard, h.index = recordRewrite, 4, index
			return []byte("moved")
		}
	}
	for name, c := range map[string]struct {
		records     []func(*recordHeader) []byte
		first, last uint64
	}{
		"all":      {nil, 3, 5},
		"the last": {[]func(*recordHeader) []byte{moved(3), moved(4)}, 5, 5},
		"a middle": {[]func(*recordHeader) []byte{moved(3), moved(5)}, 4, 4},
		"none":     {[]func(*recordHeader) []byte{moved(3), moved(5), moved(4), moved(6), moved(2)}, 0, 0},
	} {
		d := sim.New(1, sim.Options{})
		d.WriteFile("/log/"+segmentName(1), segmentBytes(append([]func(*recordHeader) []byte{state}, c.records...)...))
		out := open(t, d)
		if c.first == 0 {
			if out.corrupt != nil || strings.Count(out.state, hex.EncodeToString([]byte("moved"))) != 3 {
				t.Errorf("missing %s: %+v", name, out)
			}
			continue
		}
		if out.corrupt == nil || out.corrupt.Shard != 4 || out.corrupt.First != c.first || out.corrupt.Last != c.last {
			t.Errorf("missing %s: %v", name, out.corrupt)
		}
	}
}

// TestStaleRecordsNeverParse: a segment recycled for records of the same sizes, of which a torn write brought only the
// first block to disk. What stands behind it is well-formed, and of another life.
func TestStaleRecordsNeverParse(t *testing.T) {
	life := func(term uint64, segments int) (*sim.Disk, string) {
		d := sim.New(1, sim.Options{})
		o := steppedOptions(d)
		w := mustOpen(t, o)
		for range segments - 1 {
			must(t, w.Close())
			w = mustOpen(t, o)
		}
		s := w.Shard(0)
		if _, err := s.Reset(1); err != nil {
			t.Fatal(err)
		}
		must(t, w.WaitDurable(w.Written(), nil))
		for i := uint64(1); i <= 12; i++ {
			appendTo(t, s, i, term, 955) // records of 1004 bytes: the fifth begins a block
		}
		must(t, w.WaitDurable(w.Written(), nil))
		name := w.tail.seg.path
		d = d.Crash()
		_ = w.Close()
		return d, name
	}
	old, oldName := life(1, 1)
	d, name := life(2, 2)
	content := d.ReadFile(name)
	if name == oldName {
		t.Fatal("both lives write to the same segment number")
	}
	// The batch begins in the third block; its first block is of this life, the others of the former one.
	copy(content[3*blockSize:], old.ReadFile(oldName)[3*blockSize:])
	d.WriteFile(name, content)
	out := open(t, d)
	if out.corrupt != nil || !out.torn || !strings.Contains(out.state, "[1 4]") || strings.Contains(out.state, "\n  4 1 ") {
		t.Fatalf("found torn %v, %v:\n%.400s", out.torn, out.corrupt, out.state)
	}
}
