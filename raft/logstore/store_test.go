package logstore

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	hraft "github.com/hashicorp/raft"
	"go.uber.org/goleak"

	"tercet.dev/tercet/wal"
	"tercet.dev/tercet/wal/disk/sim"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for something that must happen before it gives up. Nothing is measured by it.
const patience = 2 * time.Minute

// rig is a store on a simulated disk.
type rig struct {
	t    *testing.T
	disk *sim.Disk
	wal  *wal.WAL
	*Store
	seen atomic.Uint64 // index of the newest configuration announced
	once sync.Once
}

// openRig opens a store on what a disk holds.
func openRig(t *testing.T, d *sim.Disk, change ...func(*Options)) *rig {
	t.Helper()
	r := &rig{t: t, disk: d}
	w, err := wal.Open(wal.Options{Dir: "/wal", FS: d, SegmentSize: 1 << 20, Prefill: -1})
	if err != nil {
		t.Fatal(err)
	}
	r.wal = w
	o := Options{WAL: w, Shard: w.Shard(3), OnConfiguration: func(index uint64, _ hraft.Configuration) { r.seen.Store(index) }}
	for _, c := range change {
		c(&o)
	}
	if r.Store, err = Open(o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.close)
	return r
}

func newRig(t *testing.T, change ...func(*Options)) *rig {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return openRig(t, sim.New(seed, sim.Options{Keep: sim.KeepNone}), change...)
}

func (r *rig) close() {
	r.once.Do(func() {
		if err := r.Store.Close(); err != nil {
			r.t.Error(err)
		}
		if err := r.wal.Close(); err != nil && !r.disk.Crashed() {
			r.t.Error(err)
		}
	})
}

// crash cuts the power and returns what the next start finds.
func (r *rig) crash(change ...func(*Options)) *rig {
	r.t.Helper()
	return openRig(r.t, r.disk.Crash(), change...)
}

func config(voters, others int) hraft.Configuration {
	var c hraft.Configuration
	for i := range voters + others {
		s := hraft.Server{ID: hraft.ServerID(fmt.Sprintf("n%d.x", i+1)), Address: hraft.ServerAddress(fmt.Sprintf("h%d:1", i+1))}
		if i >= voters {
			s.Suffrage = hraft.Nonvoter
		}
		c.Servers = append(c.Servers, s)
	}
	return c
}

func base(voters int) func(*Options) {
	return func(o *Options) { o.Base = config(voters, 0) }
}

// entries makes commands from..through of a term.
func entries(term, from, through uint64) (logs []*hraft.Log) {
	for i := from; i <= through; i++ {
		logs = append(logs, &hraft.Log{Index: i, Term: term, Type: hraft.LogCommand, Data: fmt.Appendf(nil, "%d of term %d", i, term),
			AppendedAt: time.Unix(int64(i), 0)})
	}
	return logs
}

func configEntry(term, index uint64, c hraft.Configuration) *hraft.Log {
	return &hraft.Log{Index: index, Term: term, Type: hraft.LogConfiguration, Data: hraft.EncodeConfiguration(c)}
}

func (r *rig) store(logs ...*hraft.Log) {
	r.t.Helper()
	if err := r.StoreLogs(logs); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) sync() {
	r.t.Helper()
	if err := r.wal.WaitDurable(r.wal.Written(), nil); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) bounds() (uint64, uint64) {
	first, _ := r.FirstIndex()
	last, _ := r.LastIndex()
	return first, last
}

// expect checks that the log holds exactly from..through, all of one term.
func (r *rig) expect(term, from, through uint64) {
	r.t.Helper()
	if first, last := r.bounds(); first != from || last != through {
		r.t.Fatalf("the log holds %d to %d, want %d to %d", first, last, from, through)
	}
	for i := from; i <= through && i > 0; i++ {
		var l hraft.Log
		if err := r.GetLog(i, &l); err != nil || l.Index != i || l.Term != term {
			r.t.Fatalf("entry %d: %+v, %v", i, l, err)
		}
	}
}

func TestStoreAndGet(t *testing.T) {
	r := newRig(t, base(3))
	want := entries(2, 1, 3)
	want[1].Extensions = []byte("extension")
	want[2].Type = hraft.LogBarrier
	r.store(want...)
	for i, w := range want {
		var l hraft.Log
		if err := r.GetLog(uint64(i+1), &l); err != nil {
			t.Fatal(err)
		}
		if l.Index != w.Index || l.Term != w.Term || l.Type != w.Type || string(l.Data) != string(w.Data) ||
			string(l.Extensions) != string(w.Extensions) || !l.AppendedAt.Equal(w.AppendedAt) {
			t.Errorf("got %+v, want %+v", l, w)
		}
	}
	var l hraft.Log
	if err := r.GetLog(4, &l); !errors.Is(err, hraft.ErrLogNotFound) {
		t.Errorf("got %v", err)
	}
	if err := r.StoreLogs(entries(2, 9, 9)); err == nil {
		t.Error("a gap was accepted")
	}
	if !r.IsMonotonic() {
		t.Error("not monotonic")
	}
}

// frozen runs f on a disk that does not sync and reports whether f returned.
func (r *rig) frozen(f func()) bool {
	r.disk.Freeze()
	written := r.wal.Written()
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		f()
	}()
	// Either f returns without the disk, or it waits for it: a caller in WaitDurable has appended before.
	for {
		select {
		case <-returned:
			r.disk.Thaw()
			return true
		default:
		}
		if r.wal.Written() > written {
			break
		}
		time.Sleep(time.Millisecond) // polls; nothing is concluded from the time
	}
	select {
	case <-returned:
		r.disk.Thaw()
		return true
	case <-time.After(100 * time.Millisecond): // long enough to be noticed if it did not wait; too short never fails a correct store
	}
	r.disk.Thaw()
	<-returned
	return false
}

// TestWhenStoreLogsWaits is decision 3a: for configurations, and while nobody else's answer carries the proof.
func TestWhenStoreLogsWaits(t *testing.T) {
	for name, tt := range map[string]struct {
		base  hraft.Configuration
		logs  []*hraft.Log
		waits bool
	}{
		"three voters":              {config(3, 0), entries(1, 1, 2), false},
		"two voters":                {config(2, 0), entries(1, 1, 2), false},
		"two voters and others":     {config(2, 2), entries(1, 1, 2), false},
		"one voter":                 {config(1, 0), entries(1, 1, 2), true},
		"one voter and others":      {config(1, 2), entries(1, 1, 2), true},
		"nobody known":              {hraft.Configuration{}, entries(1, 1, 2), true},
		"a configuration":           {config(3, 0), []*hraft.Log{configEntry(1, 1, config(3, 1))}, true},
		"a configuration among all": {config(3, 0), append(entries(1, 1, 2), configEntry(1, 3, config(3, 1))), true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(o *Options) { o.Base = tt.base })
			if returned := r.frozen(func() { r.store(tt.logs...) }); returned == tt.waits {
				t.Errorf("returned without the disk: %t", returned)
			}
		})
	}
}

// TestLatestConfigurationCounts: not the committed one. Removing the second of two voters leaves one at once.
func TestLatestConfigurationCounts(t *testing.T) {
	r := newRig(t, base(2))
	r.store(entries(1, 1, 1)...)
	r.store(configEntry(1, 2, config(1, 0)))
	if index, c := r.Configuration(); index != 2 || len(c.Servers) != 1 || r.seen.Load() != 2 {
		t.Errorf("configuration %d: %+v, announced %d", index, c, r.seen.Load())
	}
	if r.frozen(func() { r.store(entries(1, 3, 3)...) }) {
		t.Error("did not wait as the single voter")
	}
	// Another leader's entries replace the change: two voters again.
	if err := r.DeleteRange(2, 3); err != nil {
		t.Fatal(err)
	}
	if index, c := r.Configuration(); index != 0 || len(c.Servers) != 2 || r.seen.Load() != 0 {
		t.Errorf("configuration %d: %+v, announced %d", index, c, r.seen.Load())
	}
	if !r.frozen(func() { r.store(entries(2, 2, 2)...) }) {
		t.Error("waited although the change was truncated")
	}
}

// TestConfigurationIsFoundAtStart: in the log, above the base, and announced.
func TestConfigurationIsFoundAtStart(t *testing.T) {
	r := newRig(t, base(3))
	r.store(entries(1, 1, 1)...)
	r.store(configEntry(1, 2, config(3, 1)))
	r.store(entries(1, 3, 3)...)
	r.store(configEntry(1, 4, config(1, 1)))
	r.sync()
	r = r.crash(base(3))
	if index, c := r.Configuration(); index != 4 || len(c.Servers) != 2 || r.seen.Load() != 4 {
		t.Errorf("configuration %d: %+v, announced %d", index, c, r.seen.Load())
	}
	if r.frozen(func() { r.store(entries(1, 5, 5)...) }) {
		t.Error("did not wait as the single voter")
	}
	// A prefix that goes takes no knowledge along.
	if err := r.DeleteRange(1, 4); err != nil {
		t.Fatal(err)
	}
	if index, _ := r.Configuration(); index != 4 {
		t.Errorf("configuration %d", index)
	}
}

// TestPositionAndDurable: which place of the stream an index waits for, before and after it has been synced.
func TestPositionAndDurable(t *testing.T) {
	durable := make(chan struct{}, 64)
	r := newRig(t, base(3), func(o *Options) { o.OnDurable = func() { durable <- struct{}{} } })
	r.disk.Freeze()
	var ends []wal.LSN
	for i := uint64(1); i <= 5; i++ {
		r.store(entries(1, 2*i-1, 2*i)...)
		ends = append(ends, r.Position(2*i))
	}
	for i := uint64(1); i <= 10; i++ {
		if got, want := r.Position(i), ends[(i-1)/2]; got != want || got == 0 {
			t.Errorf("position of %d is %d, want %d", i, got, want)
		}
	}
	if got := r.Position(11); got != r.wal.Written() {
		t.Errorf("position of what is not there is %d, written %d", got, r.wal.Written())
	}
	if r.Durable() != 0 {
		t.Errorf("durable %d", r.Durable())
	}
	r.disk.Thaw()
	if err := r.WaitDurable(10, nil); err != nil {
		t.Fatal(err)
	}
	await(t, durable, func() bool { return r.Durable() == 10 })
	if p := r.Position(10); p != 0 {
		t.Errorf("position of a durable entry is %d", p)
	}
	if err := r.WaitDurable(10, nil); err != nil {
		t.Error(err)
	}
}

// await waits for a condition that changes with a signal.
func await(t *testing.T, changed <-chan struct{}, ok func() bool) {
	t.Helper()
	timeout := time.After(patience)
	for !ok() {
		select {
		case <-changed:
		case <-timeout:
			t.Fatal("it does not become so")
		}
	}
}

// TestPositionAfterTruncation: an index that was replaced waits for what replaced it.
func TestPositionAfterTruncation(t *testing.T) {
	durable := make(chan struct{}, 64)
	r := newRig(t, base(3), func(o *Options) { o.OnDurable = func() { durable <- struct{}{} } })
	r.store(entries(1, 1, 4)...)
	r.sync()
	await(t, durable, func() bool { return r.Durable() == 4 })
	r.disk.Freeze()
	r.store(entries(1, 5, 8)...)
	r.store(entries(1, 9, 9)...)
	kept, old := r.Position(6), r.Position(9)
	if err := r.DeleteRange(7, 9); err != nil {
		t.Fatal(err)
	}
	if got := r.Position(6); got != kept {
		t.Errorf("what was kept moved from %d to %d", kept, got)
	}
	if got := r.Position(7); got < old {
		t.Errorf("what is gone waits for %d", got)
	}
	r.store(entries(2, 7, 9)...)
	if got := r.Position(7); got <= old || got != r.Position(9) {
		t.Errorf("the replacement waits for %d, what it replaced for %d", got, old)
	}
	r.disk.Thaw()
	await(t, durable, func() bool { return r.Durable() == 9 })
	r.disk.Freeze()
	if err := r.DeleteRange(3, 9); err != nil {
		t.Fatal(err)
	}
	if got := r.Durable(); got != 2 {
		t.Errorf("durable up to %d after a truncation from 3 on", got)
	}
	if got := r.Position(2); got != 0 {
		t.Errorf("position of 2 is %d", got)
	}
	r.disk.Thaw()
	r.sync()
	r.crash(base(3)).expect(1, 1, 2)
}

// TestDurableNeverOverstates appends, truncates and crashes at random: what Durable said before the power failed is
// there after it, with the same content.
func TestDurableNeverOverstates(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 30 {
		d := sim.New(rng.Uint64(), sim.Options{Keep: sim.KeepNone})
		d.SetSyncLatency(func() time.Duration { return 200 * time.Microsecond })
		r := openRig(t, d, base(3))
		terms := map[uint64]uint64{} // of what the log holds
		term, last := uint64(1), uint64(0)
		var claims [][2]uint64
		claimed := uint64(0)
		claim := func(index uint64) {
			claims = append(claims, [2]uint64{index, terms[index]})
			claimed = max(claimed, index)
		}
		for range 60 {
			switch rng.IntN(8) {
			case 0:
				if last > 0 {
					from := max(claimed, r.Durable(), last-min(last, 5)) + 1
					if from <= last {
						if err := r.DeleteRange(from, last); err != nil {
							t.Fatal(err)
						}
						last = from - 1
						term++
					}
				}
			case 1:
				if last > 0 {
					if err := r.WaitDurable(last, nil); err != nil {
						t.Fatal(err)
					}
					claim(last)
				}
			default:
				n := 1 + rng.Uint64N(4)
				r.store(entries(term, last+1, last+n)...)
				for i := last + 1; i <= last+n; i++ {
					terms[i] = term
				}
				last += n
			}
			if got := r.Durable(); got > 0 {
				claim(got)
			}
		}
		after := r.crash(base(3))
		for _, c := range claims {
			var l hraft.Log
			if err := after.GetLog(c[0], &l); err != nil || l.Term != c[1] {
				t.Fatalf("entry %d of term %d was durable and is %+v, %v", c[0], c[1], l, err)
			}
		}
		after.close()
		r.close()
	}
}

func TestDeleteRange(t *testing.T) {
	retain := uint64(0)
	fresh := func(t *testing.T) *rig {
		retain = ^uint64(0)
		r := newRig(t, base(3), func(o *Options) { o.RetainFrom = func() uint64 { return retain } })
		r.store(entries(1, 1, 20)...)
		return r
	}
	t.Run("prefix", func(t *testing.T) {
		r := fresh(t)
		if err := r.DeleteRange(1, 9); err != nil {
			t.Fatal(err)
		}
		r.expect(1, 10, 20)
	})
	t.Run("prefix that somebody needs", func(t *testing.T) {
		r := fresh(t)
		retain = 5
		if err := r.DeleteRange(1, 9); err != nil {
			t.Fatal(err)
		}
		r.expect(1, 5, 20)
		retain = 2
		if err := r.DeleteRange(5, 9); err != nil {
			t.Fatal(err)
		}
		r.expect(1, 5, 20)
	})
	t.Run("suffix, whoever needs it", func(t *testing.T) {
		r := fresh(t)
		retain = 1
		if err := r.DeleteRange(9, 20); err != nil {
			t.Fatal(err)
		}
		r.expect(1, 1, 8)
		r.store(entries(2, 9, 9)...)
		r.sync()
		r = r.crash(base(3))
		if first, last := r.bounds(); first != 1 || last != 9 {
			t.Errorf("after a crash: %d to %d", first, last)
		}
	})
	t.Run("everything, whoever needs it", func(t *testing.T) {
		r := fresh(t)
		retain = 1
		if err := r.DeleteRange(1, 20); err != nil {
			t.Fatal(err)
		}
		r.expect(0, 0, 0)
		r.SetBase(30, config(3, 0))
		r.store(entries(3, 31, 33)...)
		r.expect(3, 31, 33)
		r.sync()
		r.crash(base(3)).expect(3, 31, 33)
	})
	t.Run("nothing", func(t *testing.T) {
		r := fresh(t)
		if err := r.DeleteRange(1, 9); err != nil {
			t.Fatal(err)
		}
		for _, d := range [][2]uint64{{1, 5}, {21, 30}, {5, 4}} {
			if err := r.DeleteRange(d[0], d[1]); err != nil {
				t.Errorf("%v: %v", d, err)
			}
		}
		r.expect(1, 10, 20)
	})
	t.Run("middle", func(t *testing.T) {
		r := fresh(t)
		if err := r.DeleteRange(5, 9); err == nil {
			t.Error("a hole was accepted")
		}
		r.expect(1, 1, 20)
	})
}

// TestResetLeavesTheConfigurationOpen: after an install the store does not know who votes until it is told, unless the
// next entries show that it was no install.
func TestResetLeavesTheConfigurationOpen(t *testing.T) {
	t.Run("install", func(t *testing.T) {
		r := newRig(t, base(3))
		r.store(entries(1, 1, 5)...)
		if err := r.DeleteRange(1, 5); err != nil {
			t.Fatal(err)
		}
		if r.frozen(func() { r.store(entries(2, 9, 9)...) }) {
			t.Error("did not wait without knowing who votes")
		}
		r.SetBase(8, config(3, 0))
		if r.seen.Load() != 8 {
			t.Errorf("announced %d", r.seen.Load())
		}
		if !r.frozen(func() { r.store(entries(2, 10, 10)...) }) {
			t.Error("waited among three voters")
		}
	})
	t.Run("replaced from the first on", func(t *testing.T) {
		r := newRig(t, base(3))
		r.store(entries(1, 1, 5)...)
		if err := r.DeleteRange(1, 5); err != nil {
			t.Fatal(err)
		}
		if !r.frozen(func() { r.store(entries(2, 1, 3)...) }) {
			t.Error("waited among three voters")
		}
		r.expect(2, 1, 3)
	})
}

func TestReconcile(t *testing.T) {
	for name, tt := range map[string]struct {
		index, term uint64
		reset, ok   bool
	}{
		"no state":                    {0, 0, false, true},
		"inside, same term":           {15, 2, false, true},
		"at the end":                  {20, 2, false, true},
		"just before the beginning":   {10, 7, false, true}, // the log cannot contradict what it does not hold
		"inside, another term":        {15, 3, true, true},
		"beyond the end":              {25, 2, true, true},
		"entries between are missing": {9, 1, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, base(3))
			from := uint64(11)
			if tt.index == 0 {
				from = 1
			}
			r.store(entries(2, from, 20)...)
			reset, err := r.Reconcile(tt.index, tt.term)
			if reset != tt.reset || (err == nil) != tt.ok {
				t.Fatalf("reset %t, %v", reset, err)
			}
			if !reset {
				r.expect(2, from, 20)
				return
			}
			r.expect(0, 0, 0)
			r = r.crash(base(3)) // the reset is durable when Reconcile returns
			r.expect(0, 0, 0)
			r.store(entries(4, tt.index+1, tt.index+2)...)
			r.expect(4, tt.index+1, tt.index+2)
		})
	}
	r := newRig(t, base(3))
	if reset, err := r.Reconcile(9, 1); reset || err != nil {
		t.Errorf("empty log: %t, %v", reset, err)
	}
}

// TestReplayCommitted: everything above the engine's index up to what was known to be committed, once, in order.
func TestReplayCommitted(t *testing.T) {
	r := newRig(t, base(3))
	logs := entries(1, 1, 30)
	logs[4].Type, logs[9].Type = hraft.LogNoop, hraft.LogBarrier
	logs[14] = configEntry(1, 15, config(3, 1))
	r.store(logs[:20]...)
	r.StageCommit(18)
	r.store(logs[20:]...) // the commit index rides with the next batch
	r.sync()
	r = r.crash(base(3))
	replay := func(applied uint64) (got []*hraft.Log, through uint64, err error) {
		through, err = r.ReplayCommitted(applied, func(l *hraft.Log) error {
			got = append(got, l)
			return nil
		})
		return got, through, err
	}
	got, through, err := replay(3)
	if err != nil || through != 18 || len(got) != 15 {
		t.Fatalf("%d entries through %d, %v", len(got), through, err)
	}
	for i, l := range got {
		want := logs[3+i]
		if l.Index != want.Index || l.Type != want.Type || string(l.Data) != string(want.Data) {
			t.Errorf("got %+v, want %+v", l, want)
		}
	}
	for _, applied := range []uint64{18, 25, 99} {
		if got, through, err := replay(applied); len(got) != 0 || through != applied || err != nil {
			t.Errorf("above %d: %d entries through %d, %v", applied, len(got), through, err)
		}
	}
	stop := errors.New("stop")
	if through, err := r.ReplayCommitted(3, func(l *hraft.Log) error {
		if l.Index == 7 {
			return stop
		}
		return nil
	}); !errors.Is(err, stop) || through != 6 {
		t.Errorf("through %d, %v", through, err)
	}
	// Committed beyond the end of the log (it was in entries that are gone): only what is there.
	r.StageCommit(1000)
	if _, through, err := replay(3); through != 30 || err != nil {
		t.Errorf("through %d, %v", through, err)
	}
	if err := r.DeleteRange(1, 9); err != nil {
		t.Fatal(err)
	}
	if _, _, err := replay(3); err == nil {
		t.Error("a gap between state and log was passed over")
	}
	if _, through, err := replay(9); through != 30 || err != nil {
		t.Errorf("through %d, %v", through, err)
	}
}

// TestPoisonedLogSaysNothing: after a disk error nothing is durable, and nobody is told so.
func TestPoisonedLogSaysNothing(t *testing.T) {
	r := newRig(t, base(3))
	r.store(entries(1, 1, 1)...)
	r.sync()
	// The operation that fails may be one the log can do without (filling its pool), so more than one may have to.
	var err error
	last := uint64(1)
	for err == nil && last < 100 {
		r.disk.FailAt(1, nil)
		last++
		if err = r.StoreLogs(entries(1, last, last)); err == nil {
			err = r.WaitDurable(last, nil)
		}
	}
	if !errors.Is(err, wal.ErrPoisoned) {
		t.Errorf("got %v", err)
	}
	if r.Durable() >= last {
		t.Errorf("durable %d of %d", r.Durable(), last)
	}
	if err := r.SetUint64([]byte(raftTerm), 9); err == nil {
		t.Error("a term was stored")
	}
	r.disk.Crash() // so that closing may fail
}

// TestConcurrentUse is for the race detector: raft stores while the gate and the watermark look.
func TestConcurrentUse(t *testing.T) {
	r := newRig(t, base(3))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				_, last := r.bounds()
				r.Position(last)
				r.Durable()
				r.Configuration()
				var l hraft.Log
				if err := r.GetLog(last, &l); err != nil && last > 0 && !errors.Is(err, hraft.ErrLogNotFound) {
					t.Error(err)
				}
				_ = r.WaitDurable(last, stop)
			}
		})
	}
	for i := uint64(1); i <= 300; i++ {
		r.store(entries(1, i, i)...)
		if i%50 == 0 {
			if err := r.DeleteRange(i-3, i); err != nil {
				t.Fatal(err)
			}
			r.store(entries(2, i-3, i)...)
		}
	}
	close(stop)
	wg.Wait()
	r.sync()
}
