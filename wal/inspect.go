package wal

import (
	"errors"
	"fmt"
	"sort"
	"time"

	"tercet.dev/tercet/wal/disk"
)

// Record is one record of a log as Dump shows it.
type Record struct {
	// Segment is the number of the segment, Offset the record's place in its file, Bytes what it takes there.
	Segment uint64 `json:"segment"`
	Offset  int64  `json:"offset"`
	Bytes   int64  `json:"bytes"`
	// Batch is the offset of the batch the record was written in, WrittenAt when that was.
	Batch     int64     `json:"batch"`
	WrittenAt time.Time `json:"written_at"`
	// Kind is entry, rewrite, truncate, reset, stable, commit, state, or marker for a batch without records.
	Kind  string `json:"kind"`
	Shard uint16 `json:"shard"`
	// Index is the entry's index, or the one the record speaks of; Term, Type and AppendedAt are of entries.
	Index      uint64    `json:"index,omitempty"`
	Term       uint64    `json:"term,omitempty"`
	Type       uint8     `json:"type,omitempty"`
	AppendedAt time.Time `json:"appended_at,omitzero"`
	// Key is the key of a stable record.
	Key string `json:"key,omitempty"`
	// Data is the entry's data or the stable value. It is valid only until the callback returns.
	Data []byte `json:"-"`
	// Shards is the content of a state record.
	Shards []ShardSummary `json:"shards,omitempty"`
}

// ShardSummary is what a log amounts to for one shard.
type ShardSummary struct {
	Shard uint16 `json:"shard"`
	// First and Last are the bounds of the log, 0 and 0 when it is empty.
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	// Commit is the newest recorded commit index.
	Commit uint64 `json:"commit"`
	// Stable are the keys of the stable values.
	Stable []string `json:"stable,omitempty"`
}

// SegmentReport is what Verify found in one segment.
type SegmentReport struct {
	Segment uint64 `json:"segment"`
	File    string `json:"file"`
	// Batches and Records were readable, up to End.
	Batches int   `json:"batches"`
	Records int   `json:"records"`
	End     int64 `json:"end"`
}

// Report is what Verify found.
type Report struct {
	Segments []SegmentReport `json:"segments"`
	Shards   []ShardSummary  `json:"shards"`
	// TornFile and TornOffset say where the next start would cut a torn tail; TornFile is empty when there is none.
	TornFile   string `json:"torn_file,omitempty"`
	TornOffset int64  `json:"torn_offset,omitempty"`
	// Spare are files that are no part of the log: prepared, freed, or left behind by a crash.
	Spare []string `json:"spare,omitempty"`
	// Corruption is the damage found, nil when the log is sound. A log with damage is not opened.
	Corruption *CorruptionError `json:"corruption,omitempty"`
}

// Dump calls fn for every record of a stopped node's log, in the order of the stream, and changes nothing. It ends
// with fn's error, or with a *CorruptionError at the first damage; a torn tail is an ordinary end. A nil fsys is the
// operating system's.
func Dump(fsys disk.FS, dir string, fn func(*Record) error) error {
	_, err := inspect(fsys, dir, fn)
	return err
}

// Verify reads a stopped node's log as a start would, and reports what it amounts to. The error is one of reading;
// damage is in the report.
func Verify(fsys disk.FS, dir string) (*Report, error) {
	r, err := inspect(fsys, dir, nil)
	if errors.As(err, &r.Corruption) {
		err = nil
	}
	return r, err
}

// inspector counts, and hands records to fn.
type inspector struct {
	report *Report
	fn     func(*Record) error
	head   batchHeader
}

func (in *inspector) batch(h *batchHeader) error {
	in.head = *h
	seg := &in.report.Segments[len(in.report.Segments)-1]
	seg.Batches++
	seg.End = int64(h.offset) + disk.AlignUp(int64(h.used))
	if in.fn != nil && h.flags&flagMarker != 0 {
		return in.fn(&Record{
			Segment: h.segment, Offset: int64(h.offset), Batch: int64(h.offset), Bytes: batchHeaderSize,
			WrittenAt: fromUnixNano(h.time), Kind: "marker",
		})
	}
	return nil
}

func (in *inspector) record(r *scanned) error {
	in.report.Segments[len(in.report.Segments)-1].Records++
	if in.fn == nil {
		return nil
	}
	out := Record{
		Segment: r.segment, Offset: r.off, Bytes: r.size(), Batch: int64(in.head.offset), WrittenAt: fromUnixNano(in.head.time),
		Kind: r.typ.String(), Shard: r.shard, Index: r.index, Term: r.term, Type: r.entryType,
		AppendedAt: fromUnixNano(r.appendedAt), Data: r.data,
	}
	switch r.typ {
	case recordStable:
		out.Key = string(r.aux)
	case recordState:
		out.Data = nil
		if st, ok := decodeState(r.data); ok {
			for i := range st.shards {
				out.Shards = append(out.Shards, st.shards[i].summary())
			}
		}
	}
	return in.fn(&out)
}

func (s *shardState) summary() ShardSummary {
	out := ShardSummary{Shard: s.id, Commit: s.commit}
	if s.first != s.next {
		out.First, out.Last = s.first, s.next-1
	}
	for _, kv := range s.stable {
		out.Stable = append(out.Stable, kv.key)
	}
	return out
}

func inspect(fsys disk.FS, dir string, fn func(*Record) error) (*Report, error) {
	if fsys == nil {
		fsys = disk.OS()
	}
	rep := &Report{}
	l, err := list(fsys, dir)
	if err != nil {
		return rep, fmt.Errorf("wal: list %s: %w", dir, err)
	}
	p := &prober{fs: fsys, dir: dir, mode: disk.ReadOnly}
	for _, n := range l.pool {
		rep.Spare = append(rep.Spare, poolName(n))
	}
	rep.Spare = append(rep.Spare, l.temps...)
	c, err := p.findChain(l.segments)
	if err != nil {
		return rep, wrapOpen(err)
	}
	for _, id := range append(c.stale, c.unused...) {
		rep.Spare = append(rep.Spare, segmentName(id))
	}
	r := &replay{p: p, shards: make(map[uint16]*replayed), more: &inspector{report: rep, fn: fn}}
	var file disk.File
	closeFile := func() error {
		if file == nil {
			return nil
		}
		f := file
		file = nil
		return f.Close()
	}
	end, torn, err := r.run(&c, func(l link) (*scanner, error) {
		if err := closeFile(); err != nil {
			return nil, err
		}
		f, sc, err := p.open(l.id, c.stream)
		if err != nil {
			return nil, err
		}
		file = f
		rep.Segments = append(rep.Segments, SegmentReport{Segment: l.id, File: p.path(l.id)})
		return sc, nil
	})
	if cerr := closeFile(); err == nil {
		err = cerr
	}
	ids := make([]int, 0, len(r.shards))
	for id := range r.shards {
		ids = append(ids, int(id))
	}
	sort.Ints(ids)
	for _, id := range ids {
		s := r.shards[uint16(id)]
		st := shardState{id: uint16(id), first: s.first, next: s.next, commit: s.commit}
		for k := range s.stable {
			st.stable = append(st.stable, keyValue{key: k})
		}
		sort.Slice(st.stable, func(i, j int) bool { return st.stable[i].key < st.stable[j].key })
		rep.Shards = append(rep.Shards, st.summary())
	}
	if err != nil {
		return rep, wrapOpen(err)
	}
	if n := len(rep.Segments); n > 0 {
		rep.Segments[n-1].End = end
		if torn {
			rep.TornFile, rep.TornOffset = rep.Segments[n-1].File, end
		}
	}
	return rep, nil
}
