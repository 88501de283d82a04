package wal

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sort"
	"strings"
	"syscall"
	"testing"

	"tercet.dev/tercet/wal/disk"
	"tercet.dev/tercet/wal/disk/sim"
)

// image is a log that was closed properly, and what it holds.
type image struct {
	disk  *sim.Disk
	state string
	used  map[string]int64 // bytes that mean something, by segment file
}

const imageDir = "/log"

func steppedOptions(fsys disk.FS) Options {
	return Options{Dir: imageDir, FS: fsys, SegmentSize: 32 << 10, Prefill: 1, RingBytes: 1, stepped: true, stream: 77}
}

// describe is the logical content of a log as one string. An entry that cannot be read is an error.
func describe(w *WAL) (string, error) {
	var b strings.Builder
	for _, s := range w.order {
		first, last := s.Range()
		if first == 0 && len(s.stable) == 0 && s.Committed() == 0 {
			continue // a shard nothing was ever written to
		}
		fmt.Fprintf(&b, "shard %d [%d %d] commit %d\n", s.id, first, last, s.Committed())
		keys := make([]string, 0, len(s.stable))
		for k := range s.stable {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		for _, k := range keys {
			fmt.Fprintf(&b, "  %q=%q\n", k, s.stable[k])
		}
		for i := first; i != 0 && i <= last; i++ {
			var e Entry
			if err := s.Get(i, &e); err != nil {
				return "", err
			}
			fmt.Fprintf(&b, "  %d %d %d %d %x %x\n", e.Index, e.Term, e.Type, unixNano(e.AppendedAt), e.Data, e.Extensions)
		}
	}
	return b.String(), nil
}

// makeImage writes a log of a few segments with every kind of record.
func makeImage(t testing.TB) image { return makeImageOf(t, 77, 0) }

// makeImageOf is makeImage with a stream of its own and other terms.
func makeImageOf(t testing.TB, stream, term uint64) image {
	t.Helper()
	d := sim.New(1, sim.Options{})
	o := steppedOptions(d)
	o.stream = stream
	w := mustOpen(t, o)
	a, b := w.Shard(0), w.Shard(5)
	must(t, b.SetStable("vote", []byte("candidate")))
	for i := uint64(1); i <= 60; i++ {
		appendTo(t, a, i, term+1, 300)
		a.StageCommit(i - 1)
		if i%3 == 0 {
			appendTo(t, b, i/3, term+2, 40)
			must(t, w.WaitDurable(w.Written(), nil))
		}
		if i == 40 {
			_, err := a.TruncateSuffix(39)
			must(t, err)
			appendTo(t, a, 39, term+3, 10)
			appendTo(t, a, 40, term+3, 10)
			must(t, a.TruncatePrefix(4))
		}
	}
	must(t, a.SetStable("term", []byte{1, 2, 3}))
	return closed(t, d, w)
}

// closed closes a log and takes down what it holds.
func closed(t testing.TB, d *sim.Disk, w *WAL) image {
	t.Helper()
	state, err := describe(w)
	must(t, err)
	must(t, w.Close())
	im := image{disk: d.Crash(), state: state, used: make(map[string]int64)}
	rep, err := Verify(im.disk, imageDir)
	must(t, err)
	if rep.Corruption != nil || len(rep.Segments) == 0 {
		t.Fatalf("the image is damaged from the start: %v", rep.Corruption)
	}
	for _, s := range rep.Segments {
		im.used[s.File] = s.End
	}
	return im
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mustOpen(t testing.TB, o Options) *WAL {
	t.Helper()
	w, err := Open(o)
	must(t, err)
	return w
}

func appendTo(t testing.TB, s *Shard, index, term uint64, size int) LSN {
	t.Helper()
	lsn, err := s.Append([]Entry{{Index: index, Term: term, Type: 2, AppendedAt: fromUnixNano(int64(index) + 1), Data: payload(index, size), Extensions: []byte{byte(index)}}})
	must(t, err)
	return lsn
}

// outcome opens a possibly damaged image and says what came of it.
type outcome struct {
	corrupt *CorruptionError
	state   string
	torn    bool
}

func open(t testing.TB, d *sim.Disk) outcome {
	t.Helper()
	var out outcome
	w, err := Open(steppedOptions(d))
	if err != nil {
		if !errors.As(err, &out.corrupt) {
			t.Fatalf("opening fails with something else than damage: %v", err)
		}
		if out.corrupt.File == "" || out.corrupt.Remedy == "" || !errors.Is(err, ErrCorrupt) {
			t.Fatalf("the error does not help: %+v", out.corrupt)
		}
		return out
	}
	out.state, err = describe(w)
	must(t, err)
	out.torn = w.Recovery().TornFile != ""
	must(t, w.Close())
	return out
}

// sample returns about most of the numbers below n, always the same.
func sample(n, most int64) []int64 {
	var out []int64
	rng := rand.New(rand.NewPCG(3, 3))
	for i := int64(0); i < n; i++ {
		if n <= most || rng.Int64N(n) < most {
			out = append(out, i)
		}
	}
	return out
}

// TestEveryFlippedBitIsNoticedOrHarmless flips bits of every file of a log, in use or not: a sample, and in a campaign
// every bit of a whole segment.
func TestEveryFlippedBitIsNoticedOrHarmless(t *testing.T) {
	im := makeImage(t)
	noticed, harmless := 0, 0
	whole := campaign()
	for _, name := range im.disk.Names() {
		bits := int64(len(im.disk.ReadFile(name))) * 8
		most := int64(300)
		if whole && im.used[name] > 0 {
			whole, most = false, bits
		}
		for _, bit := range sample(bits, most) {
			d := im.disk.Clone()
			d.FlipBit(name, bit)
			out := open(t, d)
			switch {
			case out.corrupt != nil:
				noticed++
				if bit/8 >= im.used[name] {
					t.Fatalf("%s: bit %d means nothing, and yet: %v", name, bit, out.corrupt)
				}
				if out.corrupt.File != name {
					t.Fatalf("%s: bit %d: the wrong file is blamed: %v", name, bit, out.corrupt)
				}
				if out.corrupt.Offset/blockSize != bit/8/blockSize && out.corrupt.Offset > bit/8 {
					t.Fatalf("%s: bit %d, byte %d: the wrong place is blamed: %v", name, bit, bit/8, out.corrupt)
				}
			case out.state != im.state:
				t.Fatalf("%s: bit %d (byte %d of %d used) changes the content unnoticed", name, bit, bit/8, im.used[name])
			default:
				harmless++
			}
		}
	}
	t.Logf("%d flips noticed, %d harmless", noticed, harmless)
	if noticed == 0 || harmless == 0 {
		t.Fatal("the sample shows nothing")
	}
}

func TestIdleTailIsNeverCut(t *testing.T) {
	// A node at rest: its last batch has a marker behind it. Whatever is flipped in the batch is damage, not a torn
	// write; in the marker itself it costs nothing.
	d := sim.New(1, sim.Options{})
	w := mustOpen(t, steppedOptions(d))
	s := w.Shard(0)
	for i := uint64(1); i <= 5; i++ {
		must(t, w.WaitDurable(appendTo(t, s, i, 1, 700), nil))
	}
	seg := w.tail.seg.path
	from := w.tail.prev
	if _, err := w.commitOnce(true); err != nil {
		t.Fatal(err)
	}
	marker := w.tail.prev
	end := w.tail.off
	state, err := describe(w)
	must(t, err)
	d = d.Crash()
	_ = w.Close()
	if marker-from != blockSize || end-marker != blockSize {
		t.Fatalf("the tail has another shape: %d, %d, %d", from, marker, end)
	}
	for bit := from * 8; bit < end*8; bit++ {
		if bit%53 != 0 && !campaign() {
			continue
		}
		c := d.Clone()
		c.FlipBit(seg, bit)
		out := open(t, c)
		if bit/8 < marker {
			if out.corrupt == nil {
				t.Fatalf("bit %d of the last batch was not noticed", bit-from*8)
			}
			if out.corrupt.Offset < from || out.corrupt.Offset >= marker {
				t.Fatalf("bit %d: the wrong place is blamed: %v", bit-from*8, out.corrupt)
			}
		} else if out.corrupt != nil || out.state != state {
			t.Fatalf("bit %d of the marker: %v, content kept: %v", bit-marker*8, out.corrupt, out.state == state)
		}
	}
}

func TestMarkerIsWhatProtectsTheTail(t *testing.T) {
	// The negative control of the test above: without the marker the same flip is taken for a torn write.
	d := sim.New(1, sim.Options{})
	w := mustOpen(t, steppedOptions(d))
	s := w.Shard(0)
	must(t, w.WaitDurable(appendTo(t, s, 1, 1, 700), nil))
	must(t, w.WaitDurable(appendTo(t, s, 2, 1, 700), nil))
	seg, at := w.tail.seg.path, w.tail.prev
	d = d.Crash()
	_ = w.Close()
	d.FlipBit(seg, (at+200)*8)
	out := open(t, d)
	if out.corrupt != nil || !out.torn || !strings.Contains(out.state, "[1 1]") {
		t.Fatalf("expected the last entry to be cut: %+v", out)
	}
}

func TestDamagedLastBatchIsATornTail(t *testing.T) {
	// Garbage in the last written block, and in no other, is what a power loss leaves behind: the log is cut there.
	// The same garbage one block earlier is damage.
	build := func() (*sim.Disk, string, int64, int64, []string) {
		d := sim.New(1, sim.Options{})
		w := mustOpen(t, steppedOptions(d))
		s := w.Shard(0)
		must(t, w.WaitDurable(appendTo(t, s, 1, 1, 3000), nil))
		// The last batch: 8 entries in three blocks.
		for i := uint64(2); i <= 9; i++ {
			appendTo(t, s, i, 1, 1400)
		}
		must(t, w.WaitDurable(w.Written(), nil))
		seg, from, end := w.tail.seg.path, w.tail.prev, w.tail.off
		state, err := describe(w)
		must(t, err)
		d = d.Crash()
		_ = w.Close()
		return d, seg, from, end, strings.Split(strings.TrimSpace(state), "\n")
	}
	d, seg, from, end, state := build()
	if end-from != 3*blockSize {
		t.Fatalf("the last batch takes %d bytes", end-from)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	for n := range points(t, 300) {
		c := d.Clone()
		content := c.ReadFile(seg)
		block := content[end-blockSize : end]
		switch n % 3 {
		case 0:
			for i := range block {
				block[i] = byte(rng.Uint32())
			}
		case 1:
			clear(block[rng.IntN(3000):])
		case 2:
			block[rng.IntN(3400)] ^= byte(1 + rng.IntN(255))
		}
		c.WriteFile(seg, content)
		out := open(t, c)
		if out.corrupt != nil || !out.torn {
			t.Fatalf("garbage %d in the last block: %+v", n, out)
		}
		got := strings.Split(strings.TrimSpace(out.state), "\n")
		for i, line := range got[1:] {
			if line != strings.ReplaceAll(state[i+1], "\n", "") {
				t.Fatalf("garbage %d: entry %d was changed", n, i+1)
			}
		}
		if len(got) < 6 || len(got) >= len(state) {
			t.Fatalf("garbage %d: %d entries are left", n, len(got)-1)
		}
		// What was cut stays cut, whatever is written afterwards.
		if again := open(t, c); again.state != out.state || again.torn {
			t.Fatalf("garbage %d: the second start finds something else", n)
		}
	}
	// One block earlier, before the batch: the batch shows that this had been synced.
	content := d.ReadFile(seg)
	for i := range blockSize {
		content[from-blockSize+int64(i)] = byte(rng.Uint32())
	}
	d.WriteFile(seg, content)
	out := open(t, d)
	if out.corrupt == nil || out.corrupt.First != 1 || out.corrupt.Last != 1 {
		t.Fatalf("garbage in a synced block: %+v", out.corrupt)
	}
}

func TestTruncatedAndMissingFilesAreDamage(t *testing.T) {
	im := makeImage(t)
	if len(im.used) < 2 {
		t.Fatalf("the image has %d segments", len(im.used))
	}
	for name, used := range im.used {
		for _, size := range []int64{0, 1, 100, used / 2, used, used + 1, int64(len(im.disk.ReadFile(name))) - 1} {
			d := im.disk.Clone()
			d.WriteFile(name, im.disk.ReadFile(name)[:size])
			out := open(t, d)
			if out.corrupt == nil || out.corrupt.File != name {
				t.Fatalf("%s cut to %d bytes of %d used: %v", name, size, used, out.corrupt)
			}
		}
	}
	names := im.disk.Names()
	first := ""
	for _, name := range names {
		if im.used[name] > 0 {
			first = name
			break
		}
	}
	d := im.disk.Clone()
	d.RemoveFile(first)
	if out := open(t, d); out.corrupt == nil || out.corrupt.File != first {
		t.Fatalf("a missing segment: %+v", out)
	}
}

// TestMisplacedBlocksAreNoticedOrHarmless puts a block where another belongs: from elsewhere in the file, and from the
// log of another node, which has segments of the same numbers.
func TestMisplacedBlocksAreNoticedOrHarmless(t *testing.T) {
	im := makeImage(t)
	noticed, harmless := 0, 0
	try := func(name string, at int64, block []byte, what string) {
		content := im.disk.ReadFile(name)
		if string(content[at:at+blockSize]) == string(block) {
			return
		}
		copy(content[at:], block)
		d := im.disk.Clone()
		d.WriteFile(name, content)
		switch out := open(t, d); {
		case out.corrupt != nil:
			noticed++
		case out.state != im.state:
			t.Fatalf("%s: %s at %d changes the content unnoticed", name, what, at)
		default:
			harmless++
		}
	}
	other := makeImageOf(t, 78, 10).disk
	for name, used := range im.used {
		content, foreign := im.disk.ReadFile(name), other.ReadFile(name)
		if foreign == nil {
			t.Fatalf("the other log has no %s", name)
		}
		for at := int64(0); at < int64(len(content)); at += blockSize {
			for from := int64(0); from < used; from += blockSize {
				try(name, at, content[from:from+blockSize], fmt.Sprintf("the block of %d", from))
			}
			try(name, at, foreign[at:at+blockSize], "another log's block")
		}
	}
	t.Logf("%d noticed, %d harmless", noticed, harmless)
	if noticed == 0 || harmless == 0 {
		t.Fatal("the test shows nothing")
	}
}

// script does a bit of everything and reports what was acknowledged.
func script(w *WAL) (acked uint64, stable string, err error) {
	s, idle := w.Shard(0), w.Shard(1)
	if _, err := idle.Append([]Entry{{Index: 1, Data: []byte("idle")}}); err != nil {
		return 0, "", err
	}
	for i := uint64(1); i <= 70; i++ {
		lsn, err := s.Append([]Entry{{Index: i, Term: 1, Data: payload(i, 1500)}})
		if err != nil {
			return acked, stable, err
		}
		if i%2 == 0 {
			if err := w.WaitDurable(lsn, nil); err != nil {
				return acked, stable, err
			}
			acked = i
		}
		if i%10 == 0 {
			v := fmt.Sprint(i)
			if err := s.SetStable("v", []byte(v)); err != nil {
				return acked, stable, err
			}
			stable = v
			acked = i
			if err := s.TruncatePrefix(i - 8); err != nil {
				return acked, stable, err
			}
			w.keeper.pass()
		}
		if i%15 == 0 {
			var e Entry
			if err := s.Get(s.First(), &e); err != nil {
				return acked, stable, err
			}
		}
	}
	return acked, stable, nil
}

// TestEveryOperationFailsInTurn lets the k-th disk operation fail, for every k: nothing is acknowledged after the
// error, the owner is told once, and the next start has everything that was acknowledged.
func TestEveryOperationFailsInTurn(t *testing.T) {
	for _, injected := range []error{nil, syscall.ENOSPC} {
		kinds := make(map[string]int)
		k := 1
		for ; ; k++ {
			d := sim.New(uint64(k), sim.Options{})
			d.FailAt(k, injected)
			fatal := 0
			o := steppedOptions(d)
			o.OnFatal = func(error) { fatal++ }
			w, err := Open(o)
			var acked uint64
			var stable string
			if err == nil {
				acked, stable, err = script(w)
				_ = w.Close()
				poisoned := w.Err() != nil
				if poisoned != (fatal == 1) || fatal > 1 {
					t.Fatalf("operation %d: poisoned %v, owner told %d times", k, poisoned, fatal)
				}
				switch kind := d.Failed(); kind {
				case "write", "sync", "rename", "syncdir":
					// A segment that cannot be prepared for want of space is tried again; everything else is final.
					if !poisoned && !errors.Is(injected, syscall.ENOSPC) {
						t.Fatalf("operation %d: a failed %s went unnoticed", k, kind)
					}
				}
				if poisoned {
					if _, err := w.Shard(0).Append([]Entry{{Index: w.Shard(0).Last() + 1}}); err == nil {
						t.Fatalf("operation %d: a poisoned log accepts entries", k)
					}
					if err := w.Shard(0).SetStable("v", nil); err == nil {
						t.Fatalf("operation %d: a poisoned log accepts values", k)
					}
				}
			} else if fatal > 1 {
				t.Fatalf("operation %d: owner told %d times", k, fatal)
			}
			if d.Failed() == "" {
				if err != nil {
					t.Fatalf("without a fault: %v", err)
				}
				break
			}
			kinds[d.Failed()]++
			again := mustOpen(t, steppedOptions(d.Crash()))
			s := again.Shard(0)
			if s.Last() < acked {
				t.Fatalf("operation %d (%s): entry %d was acknowledged, the log ends with %d", k, d.Failed(), acked, s.Last())
			}
			for i := s.First(); i != 0 && i <= s.Last(); i++ {
				var e Entry
				must(t, s.Get(i, &e))
				if string(e.Data) != string(payload(i, 1500)) {
					t.Fatalf("operation %d: entry %d was changed", k, i)
				}
			}
			if got := string(s.Stable("v")); got < stable && len(got) <= len(stable) {
				t.Fatalf("operation %d: value %q was acknowledged, found %q", k, stable, got)
			}
			must(t, again.Close())
		}
		t.Logf("%d operations failed in turn: %v", k-1, kinds)
		for _, kind := range []string{"write", "sync", "rename", "syncdir", "create", "open", "read", "list"} {
			if kinds[kind] == 0 {
				t.Errorf("no %s ever failed", kind)
			}
		}
	}
}
