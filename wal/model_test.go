package wal

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"tercet.dev/tercet/wal/disk"
	"tercet.dev/tercet/wal/disk/sim"
)

// TestAgainstMemory drives the log with all its goroutines beside a log in memory, through restarts and kills.
func TestAgainstMemory(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		d := sim.New(rapid.Uint64().Draw(rt, "seed"), sim.Options{})
		o := Options{
			Dir: "/log", FS: d, SegmentSize: 32 << 10, Prefill: 1,
			RingBytes: int64(rapid.SampledFrom([]int{1, 5000, 1 << 20}).Draw(rt, "ring")),
		}
		w, err := Open(o)
		if err != nil {
			rt.Fatal(err)
		}
		defer func() { _ = w.Close() }()
		m := newModel()
		compare := func() {
			if diff := m.differs(w); diff != "" {
				rt.Fatal(diff)
			}
		}
		shard := rapid.Uint16Range(0, 2)
		serial := 0
		rt.Repeat(map[string]func(*rapid.T){
			"append": func(rt *rapid.T) {
				id := shard.Draw(rt, "shard")
				s, ms := w.Shard(id), m.shard(id)
				next := max(ms.next, 1)
				if ms.first == ms.next {
					next += uint64(rapid.IntRange(0, 3).Draw(rt, "skip"))
				}
				var entries []Entry
				for range rapid.IntRange(1, 6).Draw(rt, "entries") {
					serial++
					data := bytes.Repeat([]byte(fmt.Sprint(serial, ".")), rapid.IntRange(0, 1500).Draw(rt, "size"))
					entries = append(entries, Entry{Index: next, Term: uint64(serial), Data: data})
					m.apply(op{kind: opEntry, shard: id, index: next, term: uint64(serial), data: string(data)})
					next++
				}
				if _, err := s.Append(entries); err != nil {
					rt.Fatal(err)
				}
				compare()
			},
			"truncate suffix": func(rt *rapid.T) {
				id := shard.Draw(rt, "shard")
				ms := m.shard(id)
				if ms.first == ms.next {
					return
				}
				from := rapid.Uint64Range(ms.first, ms.next).Draw(rt, "from")
				if _, err := w.Shard(id).TruncateSuffix(from); err != nil {
					rt.Fatal(err)
				}
				if from <= ms.first {
					m.apply(op{kind: opReset, shard: id, index: from})
				} else {
					m.apply(op{kind: opTruncate, shard: id, index: from})
				}
			},
			"truncate prefix": func(rt *rapid.T) {
				id := shard.Draw(rt, "shard")
				ms := m.shard(id)
				if ms.first == ms.next {
					return
				}
				through := rapid.Uint64Range(ms.first, ms.next-1).Draw(rt, "through")
				if err := w.Shard(id).TruncatePrefix(through); err != nil {
					rt.Fatal(err)
				}
				m.apply(op{kind: opPrefix, shard: id, index: through})
			},
			"forget": func(rt *rapid.T) {
				id := shard.Draw(rt, "shard")
				w.Shard(id).Forget(rapid.Uint64Range(0, m.shard(id).next+1).Draw(rt, "through"), int64(rapid.SampledFrom([]int{0, 2000}).Draw(rt, "keep")))
				compare()
			},
			"reset": func(rt *rapid.T) {
				id := shard.Draw(rt, "shard")
				next := rapid.Uint64Range(1, 500).Draw(rt, "next")
				if _, err := w.Shard(id).Reset(next); err != nil {
					rt.Fatal(err)
				}
				m.apply(op{kind: opReset, shard: id, index: next})
			},
			"stable": func(rt *rapid.T) {
				id := shard.Draw(rt, "shard")
				key, value := rapid.SampledFrom([]string{"a", "b"}).Draw(rt, "key"), rapid.String().Draw(rt, "value")
				if err := w.Shard(id).SetStable(key, []byte(value)); err != nil {
					rt.Fatal(err)
				}
				m.apply(op{kind: opStable, shard: id, key: key, data: value})
			},
			"reopen": func(rt *rapid.T) {
				kill := rapid.Bool().Draw(rt, "kill")
				if kill {
					if err := w.WaitDurable(w.Written(), nil); err != nil {
						rt.Fatal(err)
					}
					d = d.Kill()
					_ = w.Close()
				} else if err := w.Close(); err != nil {
					rt.Fatal(err)
				}
				o.FS = d
				if w, err = Open(o); err != nil {
					rt.Fatal(err)
				}
				compare()
				for id, ms := range m.shards {
					if first := w.Shard(id).First(); first != 0 {
						ms.first = min(ms.first, first)
					}
				}
			},
			"": func(rt *rapid.T) {
				for id, ms := range m.shards {
					first, last := w.Shard(id).Range()
					if (first == 0) != (ms.first == ms.next) && ms.first != ms.next {
						rt.Fatalf("shard %d holds [%d, %d], not [%d, %d)", id, first, last, ms.first, ms.next)
					}
				}
			},
		})
		compare()
	})
}

// TestReadersBesideWriters reads everywhere while entries are appended, truncated at both ends and segments recycled.
func TestReadersBesideWriters(t *testing.T) {
	d := sim.New(1, sim.Options{})
	w := mustOpen(t, Options{Dir: "/log", FS: d, SegmentSize: 64 << 10, Prefill: 1, RingBytes: 20 << 10})
	s := w.Shard(0)
	content := func(index, term uint64) []byte { return bytes.Repeat(fmt.Appendf(nil, "%d/%d;", index, term), 60) }
	const last = 3000
	var done atomic.Bool
	var readers sync.WaitGroup
	for r := range 4 {
		readers.Add(1)
		go func() {
			defer readers.Done()
			at := uint64(1)
			for !done.Load() {
				first, end := s.Range()
				if first == 0 {
					continue
				}
				if at < first || at > end {
					at = first + uint64(r)*(end-first)/4
				}
				var e Entry
				switch err := s.Get(at, &e); {
				case errors.Is(err, ErrNotFound): // truncated meanwhile
				case err != nil:
					t.Errorf("entry %d: %v", at, err)
					return
				case e.Index != at || !bytes.Equal(e.Data, content(at, e.Term)):
					t.Errorf("entry %d was read as %d of term %d with %d bytes", at, e.Index, e.Term, len(e.Data))
					return
				}
				at++
			}
		}()
	}
	readers.Add(1)
	go func() { // somebody waits for the disk, and looks at the figures
		defer readers.Done()
		for !done.Load() {
			if err := w.WaitDurable(w.Written(), nil); err != nil {
				t.Errorf("wait: %v", err)
				return
			}
			_ = w.Stats()
			_, _ = w.Unsynced()
			if w.Durable() > w.Written() {
				t.Error("more is durable than was written")
			}
		}
	}()
	term := uint64(1)
	next := uint64(1)
	for round := 1; next <= last; round++ {
		n := min(uint64(1+round%7), last-next+1)
		entries := make([]Entry, n)
		for i := range entries {
			entries[i] = Entry{Index: next + uint64(i), Term: term, Data: content(next+uint64(i), term)}
		}
		lsn, err := s.Append(entries)
		must(t, err)
		next += n
		switch {
		case round%10 == 0:
			term++
			from := next - min(3, next-s.First())
			_, err := s.TruncateSuffix(from)
			must(t, err)
			next = max(from, 1)
		case round%9 == 0:
			must(t, w.WaitDurable(lsn, nil))
			if first := s.First(); next > first+200 {
				must(t, s.TruncatePrefix(next-150))
			}
		}
		if round%7 == 0 {
			s.Forget(next-1, 4<<10)
		}
		s.StageCommit(next - 1)
	}
	done.Store(true)
	readers.Wait()
	st := w.Stats()
	must(t, w.Close())
	if st.Rotations < 10 || st.DiskReads == 0 || st.Freed == 0 {
		t.Fatalf("the test did too little: %+v", st)
	}
	if st.Segments > 12 {
		t.Fatalf("segments are not freed: %+v", st)
	}
}

// TestForget: what is forgotten is read from the disk, and what is not there yet is not forgotten.
func TestForget(t *testing.T) {
	d := sim.New(1, sim.Options{})
	w := mustOpen(t, Options{Dir: "/log", FS: d, SegmentSize: 64 << 10})
	s := w.Shard(0)
	several := func(from, to uint64) (lsn LSN) {
		for i := from; i <= to; i++ {
			lsn = appendTo(t, s, i, 1, 1000)
		}
		return lsn
	}
	must(t, w.WaitDurable(several(1, 10), nil))
	all := w.Stats().RingBytes
	s.Forget(0, 0)
	s.Forget(10, all)
	if got := w.Stats().RingBytes; got != all {
		t.Fatalf("%d bytes are left of %d, and nothing was to be forgotten", got, all)
	}
	s.Forget(4, 0)
	if got := w.Stats().RingBytes; got <= all/2 || got >= all*7/10 {
		t.Fatalf("%d bytes are left of %d after 4 of 10 entries", got, all)
	}
	d.Freeze()
	several(11, 15)
	s.Forget(15, 0)
	if got := w.Stats().RingBytes; got != all/2 {
		t.Fatalf("%d bytes are left, those of 5 entries that are not on the disk have %d", got, all/2)
	}
	reads := w.Stats().DiskReads
	d.Thaw()
	var e Entry
	for i := uint64(1); i <= 15; i++ {
		if must(t, s.Get(i, &e)); e.Index != i {
			t.Fatalf("entry %d was read as %d", i, e.Index)
		}
	}
	if w.Stats().DiskReads == reads {
		t.Error("nothing was read from the disk")
	}
	must(t, w.WaitDurable(w.Written(), nil))
	s.Forget(15, 0)
	if got := w.Stats().RingBytes; got != 0 {
		t.Errorf("%d bytes are left", got)
	}
	must(t, w.Close())
}

// TestStalledDisk: appending goes on, waiting can be given up, and the age of what waits shows.
func TestStalledDisk(t *testing.T) {
	d := sim.New(1, sim.Options{})
	w := mustOpen(t, Options{Dir: "/log", FS: d, SegmentSize: 64 << 10})
	s := w.Shard(0)
	must(t, w.WaitDurable(appendTo(t, s, 1, 1, 10), nil))
	d.Freeze()
	lsn := appendTo(t, s, 2, 1, 10)
	cancel := make(chan struct{})
	waited := make(chan error)
	go func() { waited <- w.WaitDurable(lsn, cancel) }()
	appendTo(t, s, 3, 1, 10)
	var e Entry
	must(t, s.Get(3, &e))
	close(cancel)
	if err := <-waited; !errors.Is(err, ErrCanceled) {
		t.Fatalf("a wait given up returns %v", err)
	}
	bytes, age := w.Unsynced()
	for later := age; later <= age; _, later = w.Unsynced() {
	}
	if bytes <= 0 {
		t.Fatalf("%d bytes are unsynced", bytes)
	}
	d.Thaw()
	must(t, w.WaitDurable(w.Written(), nil))
	if bytes, age := w.Unsynced(); bytes != 0 || age != 0 {
		t.Fatalf("%d bytes are unsynced since %v", bytes, age)
	}
	must(t, w.Close())
}

// TestPowerLossHangs: a dead incarnation says nothing any more, and can be let go of.
func TestPowerLossHangs(t *testing.T) {
	d := sim.New(1, sim.Options{Hang: true})
	fatal := make(chan error, 1)
	w := mustOpen(t, Options{Dir: "/log", FS: d, SegmentSize: 64 << 10, OnFatal: func(err error) { fatal <- err }})
	must(t, w.WaitDurable(appendTo(t, w.Shard(0), 1, 1, 10), nil))
	next := d.Crash()
	lsn, err := w.Shard(0).Append([]Entry{{Index: 2}})
	must(t, err)
	cancel := make(chan struct{})
	waited := make(chan error)
	go func() { waited <- w.WaitDurable(lsn, cancel) }()
	select {
	case err := <-fatal:
		t.Fatalf("a dead disk should hang, not fail: %v", err)
	default:
	}
	close(cancel)
	if err := <-waited; !errors.Is(err, ErrCanceled) {
		t.Fatal(err)
	}
	d.Release()
	if err := <-fatal; !errors.Is(err, ErrPoisoned) || !errors.Is(err, sim.ErrCrashed) {
		t.Fatal(err)
	}
	_ = w.Close()
	w = mustOpen(t, Options{Dir: "/log", FS: next, SegmentSize: 64 << 10})
	if w.Shard(0).Last() < 1 {
		t.Fatal("the acknowledged entry is gone")
	}
	must(t, w.Close())
}

// TestFullDisk: the log waits for room instead of dying, and goes on when there is some.
func TestFullDisk(t *testing.T) {
	d := sim.New(1, sim.Options{Capacity: 3 * 64 << 10})
	w := mustOpen(t, Options{Dir: "/log", FS: d, SegmentSize: 64 << 10, Prefill: 1, Reserve: 1000})
	s := w.Shard(0)
	var lsn LSN
	for i := uint64(1); i <= 300; i++ {
		lsn = appendTo(t, s, i, 1, 1000)
	}
	space, err := w.Space()
	must(t, err)
	if !space.Low() {
		t.Fatalf("a full disk is not reported: %+v", space)
	}
	cancel := make(chan struct{})
	go func() {
		defer close(cancel)
		for full := false; !full; { // until the keeper has tried in vain
			runtime.Gosched()
			w.keeper.mu.Lock()
			full = w.keeper.full && w.keeper.waiting
			w.keeper.mu.Unlock()
			if free, _ := d.Free("/log"); free > 0 {
				full = false
			}
		}
	}()
	if err := w.WaitDurable(lsn, cancel); !errors.Is(err, ErrCanceled) {
		t.Fatalf("300 KB on a disk of 192 KB: %v", err)
	}
	if n := d.OpsByKind()["create"]; n != 3 {
		t.Fatalf("%d files were begun where three have room", n)
	}
	d.SetCapacity(0)
	must(t, w.WaitDurable(lsn, nil))
	must(t, w.Err())
	must(t, w.Close())
}

// TestMarkerFollowsAnIdleBatch: nothing has to be called for the synced offset to be recorded.
func TestMarkerFollowsAnIdleBatch(t *testing.T) {
	d := sim.New(1, sim.Options{})
	w := mustOpen(t, Options{Dir: "/log", FS: d, SegmentSize: 64 << 10, MarkerDelay: time.Microsecond})
	s := w.Shard(0)
	before := w.Stats().Markers
	s.StageCommit(1) // first: the batch is written as soon as it is there
	lsn := appendTo(t, s, 1, 1, 10)
	must(t, w.WaitDurable(lsn, nil))
	for w.Stats().Markers == before {
		must(t, w.WaitDurable(w.Durable()+1, nil))
	}
	d = d.Crash()
	_ = w.Close()
	kinds := make(map[string]int)
	must(t, Dump(d, "/log", func(r *Record) error { kinds[r.Kind]++; return nil }))
	if kinds["marker"] == 0 || kinds["entry"] != 1 || kinds["commit"] != 1 {
		t.Fatalf("found %v", kinds)
	}
}

// TestOneLogPerDirectory: a second opener is refused while the first lives.
func TestOneLogPerDirectory(t *testing.T) {
	dir := t.TempDir()
	w := mustOpen(t, Options{Dir: dir, SegmentSize: 64 << 10})
	if _, err := Open(Options{Dir: dir}); !errors.Is(err, disk.ErrLocked) {
		t.Fatalf("a second opener gets %v", err)
	}
	must(t, w.Close())
	must(t, mustOpen(t, Options{Dir: dir, SegmentSize: 64 << 10}).Close())
}

// TestRefusals: what may not be appended changes nothing.
func TestRefusals(t *testing.T) {
	d := sim.New(1, sim.Options{})
	w := mustOpen(t, Options{Dir: "/log", FS: d, SegmentSize: 64 << 10})
	s := w.Shard(0)
	appendTo(t, s, 5, 1, 10)
	for name, c := range map[string]struct {
		entries []Entry
		want    error
	}{
		"gap":         {[]Entry{{Index: 7}}, ErrGap},
		"overlap":     {[]Entry{{Index: 5}}, ErrGap},
		"hole inside": {[]Entry{{Index: 6}, {Index: 8}}, ErrGap},
		"index zero":  {[]Entry{{Index: 0}}, ErrGap},
		"too large":   {[]Entry{{Index: 6}, {Index: 7, Data: make([]byte, 33<<10)}}, ErrTooLarge},
	} {
		if _, err := s.Append(c.entries); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := s.SetStable("k", make([]byte, 9<<10)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("large stable value: %v", err)
	}
	if first, last := s.Range(); first != 5 || last != 5 {
		t.Fatalf("the log holds [%d, %d]", first, last)
	}
	must(t, w.Close())
	if _, err := s.Append([]Entry{{Index: 6}}); !errors.Is(err, ErrClosed) {
		t.Fatalf("append after close: %v", err)
	}
	if err := w.WaitDurable(w.Written()+1, nil); !errors.Is(err, ErrClosed) {
		t.Fatalf("wait after close: %v", err)
	}
}

// TestIdleShardDoesNotPinSegments: a shard on which nothing happens costs a few moved records, not all segments.
func TestIdleShardDoesNotPinSegments(t *testing.T) {
	d := sim.New(1, sim.Options{})
	w := mustOpen(t, Options{Dir: "/log", FS: d, SegmentSize: 32 << 10, Prefill: 1, RingBytes: 1, stepped: true})
	idle, busy := w.Shard(1), w.Shard(0)
	for i := uint64(1); i <= 3; i++ {
		appendTo(t, idle, i, 1, 100)
	}
	most := 0
	for i := uint64(1); i <= 2000; i++ {
		must(t, w.WaitDurable(appendTo(t, busy, i, 1, 1000), nil))
		if i%20 == 0 {
			must(t, busy.TruncatePrefix(i-10))
		}
		most = max(most, len(w.segs))
	}
	if most > rewriteAfter+2 {
		t.Fatalf("up to %d segments were kept", most)
	}
	check := func() {
		for i := uint64(1); i <= 3; i++ {
			var e Entry
			must(t, idle.Get(i, &e))
			if !bytes.Equal(e.Data, payload(i, 100)) {
				t.Fatalf("entry %d was changed", i)
			}
		}
	}
	check()
	must(t, w.Close())
	w = mustOpen(t, Options{Dir: "/log", FS: d.Crash(), SegmentSize: 32 << 10, stepped: true})
	idle = w.Shard(1)
	check()
	must(t, w.Close())
}

// TestMovingEntriesDoesNotHoldUpRotation: an idle shard pins the oldest segment while another writes at full speed.
// The keeper moves the pinned entry, and must not wait for that while the committer waits for the keeper's segment.
func TestMovingEntriesDoesNotHoldUpRotation(t *testing.T) {
	d := sim.New(1, sim.Options{})
	w := mustOpen(t, Options{Dir: "/log", FS: d, SegmentSize: 32 << 10, Prefill: -1, RingBytes: 1})
	idle, busy := w.Shard(0), w.Shard(1)
	appendTo(t, idle, 1, 1, 100)
	for i := uint64(1); i <= 3000; i++ {
		lsn := appendTo(t, busy, i, 1, 8<<10)
		if i%8 == 0 {
			must(t, busy.TruncatePrefix(i-1))
		}
		if i%16 == 0 {
			must(t, w.WaitDurable(lsn, nil))
		}
	}
	st := w.Stats()
	must(t, w.Close())
	if st.Rewritten == 0 || st.RotationWaits == 0 {
		t.Fatalf("it never came to moving and waiting: %+v", st)
	}
}
