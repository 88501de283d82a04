package wal

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"tercet.dev/tercet/wal/disk"
	"tercet.dev/tercet/wal/disk/sim"
)

// fullCount is how many crash points the full run tries.
const fullCount = 10_000

// campaign reports whether the full counts are asked for, as `make test-all` does.
func campaign() bool {
	return os.Getenv("TERCET_CAMPAIGN") != "" || os.Getenv("TERCET_TEST_ALL") == "1"
}

// points returns how many crash points to try: a small sample, the full count in a campaign, or as many as
// TERCET_CAMPAIGN says if that is more than 1.
func points(t testing.TB, sample int) int {
	if !campaign() {
		return sample
	}
	v := os.Getenv("TERCET_CAMPAIGN")
	if v == "" || v == "1" {
		return fullCount
	}
	n, err := strconv.Atoi(v)
	if err != nil || n <= 0 {
		t.Fatalf("TERCET_CAMPAIGN=%q is not a positive number", v)
	}
	return n
}

// opKind is one step in the life of a log as the model sees it: what one record does.
type opKind uint8

const (
	opEntry opKind = iota
	opTruncate
	opReset
	opStable
	// opPrefix is a prefix truncation. It has no record: it may be lost alone, and is never the reason for a difference.
	opPrefix
)

// op is a step, in the order of the stream.
type op struct {
	kind  opKind
	shard uint16
	index uint64
	term  uint64
	data  string
	ext   string
	key   string
	lsn   LSN // durable when this is
}

// modelShard is what a shard amounts to after some steps.
type modelShard struct {
	first, next uint64 // first is that of the log as it was used; prefix truncations may be lost
	entries     map[uint64]op
	stable      map[string]string
}

// model is a log that forgets nothing.
type model struct {
	shards map[uint16]*modelShard
}

func newModel() *model { return &model{shards: make(map[uint16]*modelShard)} }

func (m *model) shard(id uint16) *modelShard {
	s := m.shards[id]
	if s == nil {
		s = &modelShard{entries: make(map[uint64]op), stable: make(map[string]string)}
		m.shards[id] = s
	}
	return s
}

func (m *model) clone() *model {
	out := newModel()
	for id, s := range m.shards {
		c := out.shard(id)
		c.first, c.next = s.first, s.next
		for k, v := range s.entries {
			c.entries[k] = v
		}
		for k, v := range s.stable {
			c.stable[k] = v
		}
	}
	return out
}

func (m *model) apply(o op) {
	s := m.shard(o.shard)
	switch o.kind {
	case opEntry:
		if o.index != s.next {
			s.first = o.index
			s.entries = make(map[uint64]op)
		}
		s.entries[o.index] = o
		s.next = o.index + 1
	case opTruncate:
		for i := o.index; i < s.next; i++ {
			delete(s.entries, i)
		}
		s.next = o.index
	case opPrefix:
		if o.index >= s.next {
			break
		}
		s.first = max(s.first, o.index+1)
	case opReset:
		s.entries = make(map[uint64]op)
		s.first, s.next = o.index, o.index
	case opStable:
		s.stable[o.key] = o.data
	}
}

// differs compares a recovered log with the model: same end, same entries, same values; the log may begin earlier
// than the model, since prefix truncations are recorded late.
func (m *model) differs(w *WAL) string {
	ids := make(map[uint16]bool)
	for id := range m.shards {
		ids[id] = true
	}
	for id := range w.shards {
		ids[id] = true
	}
	for id := range ids {
		ms := m.shard(id)
		s := w.Shard(id)
		first, last := s.Range()
		switch {
		case last == 0 && ms.first != ms.next:
			return fmt.Sprintf("shard %d is empty instead of [%d, %d)", id, ms.first, ms.next)
		case last != 0 && ms.next != last+1:
			return fmt.Sprintf("shard %d ends with %d instead of %d", id, last, int64(ms.next)-1)
		case last != 0 && first > ms.first && ms.first != ms.next:
			return fmt.Sprintf("shard %d begins with %d instead of %d", id, first, ms.first)
		}
		if last != 0 {
			for i := first; i <= last; i++ {
				want, ok := ms.entries[i]
				if !ok {
					return fmt.Sprintf("shard %d has entry %d, which nobody appended", id, i)
				}
				var e Entry
				if err := s.Get(i, &e); err != nil {
					return fmt.Sprintf("shard %d, entry %d: %v", id, i, err)
				}
				if e.Term != want.term || string(e.Data) != want.data || string(e.Extensions) != want.ext || e.Index != i {
					return fmt.Sprintf("shard %d, entry %d has another content (term %d instead of %d, %d bytes instead of %d)",
						id, i, e.Term, want.term, len(e.Data), len(want.data))
				}
			}
		}
		for k, v := range ms.stable {
			if got := s.Stable(k); string(got) != v {
				return fmt.Sprintf("shard %d: stable %q is %q instead of %q", id, k, got, v)
			}
		}
	}
	return ""
}

// life runs a log through one crash after the other and checks each recovery.
type life struct {
	rng  *rand.Rand
	disk *sim.Disk
	fs   func(*sim.Disk) disk.FS
	log  *WAL

	base    *model // what is certain
	ops     []op   // appended since, in order
	acked   int    // how many of ops were reported durable
	ackAll  bool   // negative control: believe everything written to be durable
	commits map[uint16]uint64

	seen struct {
		crashes, inOpen, lost, torn, rotations, rewrites, reads, markers, kills, frees int
	}
}

func newLife(seed uint64) *life {
	return &life{
		rng:  rand.New(rand.NewPCG(seed, 7)),
		disk: sim.New(seed, sim.Options{}),
		fs:   func(d *sim.Disk) disk.FS { return d },
		base: newModel(), commits: make(map[uint16]uint64),
	}
}

const lifeDir = "/log"

func (l *life) options() Options {
	return Options{
		Dir: lifeDir, FS: l.fs(l.disk), SegmentSize: 32 << 10, Prefill: 1, RingBytes: 6 << 10, stepped: true,
		stream: 1 + l.rng.Uint64()>>1, MarkerDelay: 1,
	}
}

// round opens the log with a crash ahead, checks it, and works until the crash. The error is a violation.
func (l *life) round(ahead int) error {
	highest := uint64(0)
	for _, name := range l.disk.Names() {
		if id, ok := parseName(filepath.Base(name), "", segmentSuffix); ok {
			highest = max(highest, id)
		}
	}
	l.disk.CrashAt(1 + l.rng.IntN(ahead))
	w, err := Open(l.options())
	if err != nil {
		if !l.disk.Crashed() {
			return fmt.Errorf("open: %w", err)
		}
		l.seen.inOpen++
		l.crash()
		return nil
	}
	l.log = w
	if id := w.tail.seg.id; id <= highest {
		return fmt.Errorf("this life writes to segment %d, though %d was there before", id, highest)
	}
	if err := l.check(); err != nil {
		if l.disk.Crashed() { // while the check was reading: nothing is known anew
			_ = w.Close()
			l.crash()
			return nil
		}
		return err
	}
	if w.Recovery().TornFile != "" {
		l.seen.torn++
	}
	for !l.disk.Crashed() {
		if err := l.step(); err != nil {
			return err
		}
	}
	l.seen.rotations += int(w.rotations.Load())
	l.seen.reads += int(w.diskReads.Load())
	l.seen.markers += int(w.markers.Load())
	l.seen.rewrites += int(w.rewritten.Load())
	l.seen.frees += int(w.freed.Load())
	_ = w.Close()
	l.crash()
	return nil
}

func (l *life) crash() {
	l.seen.crashes++
	if l.rng.IntN(6) == 0 {
		l.seen.kills++
		l.disk = l.disk.Kill()
		return
	}
	l.disk = l.disk.Crash()
}

// check finds the steps that the recovered log amounts to: all that were acknowledged, and a prefix of the others.
func (l *life) check() error {
	m := l.base.clone()
	for _, o := range l.ops[:l.acked] {
		m.apply(o)
	}
	best, why := -1, ""
	var found *model
	for n := l.acked; ; n++ {
		if diff := m.differs(l.log); diff == "" {
			best, found = n, m.clone()
		} else if n == l.acked {
			why = diff
		}
		if n == len(l.ops) {
			break
		}
		m.apply(l.ops[n])
	}
	if err := l.log.Err(); err != nil {
		return fmt.Errorf("after recovery: %w", err)
	}
	if best < 0 {
		return fmt.Errorf("the log is none of the %d states after %d acknowledged steps: %s", len(l.ops)-l.acked+1, l.acked, why)
	}
	if best < len(l.ops) {
		l.seen.lost++
	}
	for id, s := range found.shards {
		sh := l.log.Shard(id)
		if first := sh.First(); first != 0 && first < s.first {
			s.first = first // a prefix truncation was lost
		}
		if got := sh.Committed(); got < l.commits[id] {
			return fmt.Errorf("shard %d: commit index %d was durable, recovered is %d", id, l.commits[id], got)
		}
		l.commits[id] = sh.Committed()
	}
	l.base, l.ops, l.acked = found, nil, 0
	return nil
}

// now is the model of everything appended.
func (l *life) now() *model {
	m := l.base.clone()
	for _, o := range l.ops {
		m.apply(o)
	}
	return m
}

// note takes down what is durable.
func (l *life) note() {
	durable := l.log.Durable()
	if l.ackAll {
		durable = l.log.Written()
	}
	for l.acked < len(l.ops) && l.ops[l.acked].lsn <= durable {
		l.acked++
	}
	if l.log.Durable() == l.log.Written() {
		for id, s := range l.log.shards {
			l.commits[id] = max(l.commits[id], s.recordedCommit)
		}
	}
}

// step does something at random. Errors of a dead disk end the round; others are violations.
func (l *life) step() error {
	w := l.log
	id := uint16(l.rng.IntN(3))
	if l.rng.IntN(3) > 0 {
		id = 0 // the others are mostly idle
	}
	s := w.Shard(id)
	fail := func(err error) error {
		if err == nil || l.disk.Crashed() {
			return nil
		}
		return err
	}
	defer l.note()
	switch p := l.rng.IntN(100); {
	case p < 50:
		next := s.next
		if s.first == s.next && l.rng.IntN(3) == 0 {
			next += uint64(l.rng.IntN(5))
		}
		next = max(next, 1)
		var entries []Entry
		var ops []op
		for range 1 + l.rng.IntN(4) {
			size := l.rng.IntN(200)
			if l.rng.IntN(4) == 0 {
				size = l.rng.IntN(9000)
			}
			data := make([]byte, size)
			for i := range data {
				data[i] = byte(l.rng.Uint32())
			}
			ext := strings.Repeat("x", l.rng.IntN(3))
			term := l.rng.Uint64N(100)
			entries = append(entries, Entry{Index: next, Term: term, Data: data, Extensions: []byte(ext)})
			ops = append(ops, op{kind: opEntry, shard: id, index: next, term: term, data: string(data), ext: ext})
			next++
		}
		lsn, err := s.Append(entries)
		if err != nil {
			return fail(err)
		}
		for _, o := range ops {
			o.lsn = lsn
			l.ops = append(l.ops, o)
		}
	case p < 70:
		return fail(w.WaitDurable(w.Written(), nil))
	case p < 74:
		_, err := w.commitOnce(true)
		return fail(err)
	case p < 80:
		if s.first == s.next {
			return nil
		}
		from := s.first + l.rng.Uint64N(s.next-s.first)
		if l.rng.IntN(4) > 0 {
			from = max(from, s.next-min(s.next-s.first, 3))
		}
		first := s.first
		lsn, err := s.TruncateSuffix(from)
		if err != nil {
			return fail(err)
		}
		o := op{kind: opTruncate, shard: id, index: from, lsn: lsn}
		if from <= first {
			o.kind = opReset
		}
		l.ops = append(l.ops, o)
	case p < 88:
		if s.first == s.next || id != 0 && l.rng.IntN(4) > 0 {
			return nil
		}
		through := s.first + l.rng.Uint64N(s.next-s.first)
		if err := s.TruncatePrefix(through); err != nil {
			return fail(err)
		}
		l.ops = append(l.ops, op{kind: opPrefix, shard: id, index: through})
	case p < 89:
		next := 1 + l.rng.Uint64N(1000)
		lsn, err := s.Reset(next)
		if err != nil {
			return fail(err)
		}
		l.ops = append(l.ops, op{kind: opReset, shard: id, index: next, lsn: lsn})
	case p < 93:
		key, value := fmt.Sprint("k", l.rng.IntN(3)), fmt.Sprint("v", l.rng.Uint64())
		// The record is in the log even if the wait for it fails.
		lsn, err := s.setStable(key, []byte(value))
		if err != nil {
			return fail(err)
		}
		l.ops = append(l.ops, op{kind: opStable, shard: id, key: key, data: value, lsn: lsn})
		return fail(w.WaitDurable(lsn, nil))
	case p < 97:
		s.StageCommit(s.next)
	default:
		w.keeper.pass()
		return fail(w.Err())
	}
	if l.rng.IntN(8) == 0 {
		if diff := l.now().differs(w); diff != "" && !l.disk.Crashed() {
			return fmt.Errorf("while running: %s", diff)
		}
	}
	return nil
}

func TestCrashAnywhere(t *testing.T) {
	n := points(t, 600)
	seed := uint64(1)
	var total life
	for done := 0; done < n; seed++ {
		l := newLife(seed)
		for range 8 {
			if err := l.round(90); err != nil {
				t.Fatalf("seed %d, crash %d: %v", seed, l.seen.crashes, err)
			}
		}
		done += l.seen.crashes
		add(&total, l)
	}
	t.Logf("seeds 1 to %d: %+v", seed-1, total.seen)
	for what, count := range map[string]int{
		"crashes while opening": total.seen.inOpen, "unsynced steps lost": total.seen.lost, "torn tails": total.seen.torn,
		"rotations": total.seen.rotations, "reads from disk": total.seen.reads, "markers": total.seen.markers, "kills": total.seen.kills,
		"moved entries": total.seen.rewrites, "freed segments": total.seen.frees,
	} {
		if count == 0 {
			t.Errorf("it never came to %s: the test shows less than it says", what)
		}
	}
}

func add(total, l *life) {
	t, s := &total.seen, &l.seen
	t.crashes += s.crashes
	t.inOpen += s.inOpen
	t.lost += s.lost
	t.torn += s.torn
	t.rotations += s.rotations
	t.rewrites += s.rewrites
	t.reads += s.reads
	t.markers += s.markers
	t.kills += s.kills
	t.frees += s.frees
}

// violated runs lives that must end in a violation.
func violated(t *testing.T, change func(*life)) {
	t.Helper()
	for seed := uint64(1); seed <= 200; seed++ {
		l := newLife(seed)
		change(l)
		for range 8 {
			if err := l.round(90); err != nil {
				t.Logf("found with seed %d: %v", seed, err)
				return
			}
		}
	}
	t.Fatal("the checks did not notice: they prove nothing")
}

// liar is a disk whose syncs do nothing.
type liar struct {
	disk.FS
	files, names bool
}

func (f liar) SyncDir(dir string) error {
	if f.names {
		return nil
	}
	return f.FS.SyncDir(dir)
}

func (f liar) Create(name string, mode disk.Mode) (disk.File, error) {
	file, err := f.FS.Create(name, mode)
	return liarFile{file, f.files}, err
}

func (f liar) Open(name string, mode disk.Mode) (disk.File, error) {
	file, err := f.FS.Open(name, mode)
	if err != nil {
		return nil, err
	}
	return liarFile{file, f.files}, nil
}

type liarFile struct {
	disk.File
	lies bool
}

func (f liarFile) Sync() error {
	if f.lies {
		return nil
	}
	return f.File.Sync()
}

func TestCrashChecksNoticeEarlyAcknowledgements(t *testing.T) {
	violated(t, func(l *life) { l.ackAll = true })
}

func TestCrashChecksNoticeMissingSyncs(t *testing.T) {
	violated(t, func(l *life) { l.fs = func(d *sim.Disk) disk.FS { return liar{FS: d, files: true} } })
}

func TestCrashChecksNoticeMissingDirectorySyncs(t *testing.T) {
	violated(t, func(l *life) { l.fs = func(d *sim.Disk) disk.FS { return liar{FS: d, names: true} } })
}
