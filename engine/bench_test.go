package engine

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// publishEntry is an entry of n messages of size bytes each in one publish command per message, as the
// coalescer makes it from single publishes.
func publishEntry(now Stamp, n, size, perCommand int) []byte {
	var eb EntryBuilder
	eb.Reset(1, now, n*(size+64))
	body := make([]byte, size)
	for i := range body {
		body[i] = byte(i * 7)
	}
	for i := 0; i < n; i += perCommand {
		p := &Publish{Topic: "bench"}
		for range perCommand {
			p.Messages = append(p.Messages, NewMessage{ContentType: "application/json", Retention: 24 * time.Hour, Body: body})
		}
		eb.Add(0, uint64(i), 0, p.AppendTo(nil))
	}
	return eb.Bytes()
}

func benchEngine(b *testing.B) *testLog {
	return openTest(b, Options{FS: vfs.Default, Dir: b.TempDir()})
}

func BenchmarkApplyPublish(b *testing.B) {
	for _, c := range []struct{ n, size, per int }{{240, 1024, 1}, {200, 1024, 100}, {2000, 100, 1}, {1, 1024, 1}} {
		b.Run(fmt.Sprintf("%dx%d/%d", c.n, c.size, c.per), func(b *testing.B) {
			l := benchEngine(b)
			index := uint64(0)
			entry := publishEntry(l.now, c.n, c.size, c.per)
			b.SetBytes(int64(len(entry)))
			b.ReportAllocs()
			var res []Result
			var err error
			start := cpu(b)
			for b.Loop() {
				index++
				if res, err = l.e.Apply(index, 1, entry, res[:0], &l.fx); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*c.n), "ns/msg")
			b.ReportMetric(float64((cpu(b)-start).Nanoseconds())/float64(b.N*c.n), "cpu-ns/msg")
			b.StopTimer()
			if err := l.e.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkReceiveAck measures one receive of one message and its acknowledgement, a hundred of each an entry.
func BenchmarkReceiveAck(b *testing.B) {
	for _, max := range []int{1, 10} {
		b.Run(fmt.Sprint(max), func(b *testing.B) {
			l := benchEngine(b)
			index := uint64(0)
			fill := func() {
				entry := publishEntry(l.now, 2000, 100, 1)
				for range 5 {
					index++
					if _, err := l.e.Apply(index, 1, entry, nil, &l.fx); err != nil {
						b.Fatal(err)
					}
				}
			}
			cmd := (&Receive{Topic: "bench", Group: "g", Max: max, Visibility: time.Minute}).AppendTo(nil)
			left, received := 0, 0
			var acks []Receipt
			var res []Result
			b.ReportAllocs()
			for b.Loop() {
				if left < 100*max {
					b.StopTimer()
					fill()
					left += 10000
					b.StartTimer()
				}
				var eb EntryBuilder
				eb.Reset(1, l.now, 100*len(cmd))
				for range 100 {
					eb.Add(0, 0, 0, cmd)
				}
				index++
				var err error
				if res, err = l.e.Apply(index, 1, eb.Bytes(), res[:0], &l.fx); err != nil {
					b.Fatal(err)
				}
				left -= 100 * max
				eb.Reset(1, l.now, 100*len(cmd))
				for i := range res {
					acks = acks[:0]
					for _, d := range res[i].Deliveries {
						acks = append(acks, d.Receipt)
					}
					eb.Add(0, 0, 0, (&Settle{Topic: "bench", Group: "g", Op: Acknowledge, Receipts: acks}).AppendTo(nil))
					received += len(acks)
				}
				index++
				if res, err = l.e.Apply(index, 1, eb.Bytes(), res[:0], &l.fx); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*100), "ns/receive+ack")
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(received), "ns/msg")
			b.StopTimer()
			if err := l.e.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// BenchmarkColdDrain receives, loads and acknowledges messages that are only in the store.
func BenchmarkColdDrain(b *testing.B) {
	l := openTest(b, Options{FS: vfs.Default, Dir: b.TempDir(), RecentBytes: -1})
	index := uint64(0)
	entry := publishEntry(l.now, 2000, 100, 1)
	const rounds = 200
	for range rounds {
		index++
		if _, err := l.e.Apply(index, 1, entry, nil, &l.fx); err != nil {
			b.Fatal(err)
		}
	}
	if _, err := l.e.Checkpoint(); err != nil {
		b.Fatal(err)
	}
	apply := func(c Command) []Result {
		var eb EntryBuilder
		eb.Reset(1, l.now, 256)
		eb.Add(0, 0, 0, c.AppendTo(nil))
		index++
		res, err := l.e.Apply(index, 1, eb.Bytes(), nil, &l.fx)
		if err != nil {
			b.Fatal(err)
		}
		return res
	}
	group, left := 0, 0
	var acks []Receipt
	for b.Loop() {
		if left == 0 {
			group, left = group+1, rounds*2000
		}
		name := fmt.Sprint("g", group)
		ds := apply(&Receive{Topic: "bench", Group: name, Max: 10, Visibility: time.Minute})[0].Deliveries
		if len(ds) != 10 {
			b.Fatal(len(ds))
		}
		left -= 10
		if err := l.e.Load(ds); err != nil {
			b.Fatal(err)
		}
		acks = acks[:0]
		for _, d := range ds {
			acks = append(acks, d.Receipt)
		}
		apply(&Settle{Topic: "bench", Group: name, Op: Acknowledge, Receipts: acks})
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*10), "ns/msg")
	b.StopTimer()
	if err := l.e.Close(); err != nil {
		b.Fatal(err)
	}
}

func BenchmarkSealer(b *testing.B) {
	s := NewSealer(make([]byte, 32))
	id := MessageID{Shard: 0, Index: 1 << 24, Pos: 77, Kind: KindPlain}
	rc := Receipt{Topic: 300, Group: 301, Offset: 1 << 30, Epoch: 1 << 28}
	b.Run("id", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_ = s.MessageID(id)
		}
	})
	b.Run("receipt", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_ = s.Receipt(rc)
		}
	})
	text := s.Receipt(rc)
	b.Run("parse receipt", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := s.ParseReceipt(text); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkInspect(b *testing.B) {
	p := &Publish{Topic: "bench"}
	for range 100 {
		p.Messages = append(p.Messages, NewMessage{ContentType: "application/json", Retention: 24 * time.Hour, Body: make([]byte, 1024)})
	}
	cmd := p.AppendTo(nil)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Inspect(cmd); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEntryBuild(b *testing.B) {
	cmd := (&Publish{Topic: "bench", Messages: []NewMessage{{Body: make([]byte, 1024)}}}).AppendTo(nil)
	b.SetBytes(int64(len(cmd)) * 240)
	b.ReportAllocs()
	for b.Loop() {
		var eb EntryBuilder
		eb.Reset(1, Stamp{1, 1}, 240*(len(cmd)+EntryOverhead))
		for i := range 240 {
			eb.Add(1, uint64(i), 0, cmd)
		}
	}
}

// BenchmarkBacklog measures a backlog of -backlog messages of 100 bytes: memory of the process, opening after
// a crash (replay of the log since the last checkpoint included), and a receive behind that many acknowledged
// messages against one in an empty topic. Run it with -benchtime 1x.
func BenchmarkBacklog(b *testing.B) {
	o := Options{FS: vfs.Default, Dir: b.TempDir()}
	e, err := Open(o)
	if err != nil {
		b.Fatal(err)
	}
	index := uint64(0)
	var fx Effects
	since := map[uint64][]byte{} // the log since the last checkpoint
	apply := func(entry []byte) []Result {
		index++
		since[index] = entry
		res, err := e.Apply(index, 1, entry, nil, &fx)
		if err != nil {
			b.Fatal(err)
		}
		if e.NeedsCheckpoint() {
			m, err := e.Checkpoint()
			if err != nil {
				b.Fatal(err)
			}
			for i := range since {
				if i <= m.Index {
					delete(since, i)
				}
			}
		}
		return res
	}
	command := func(cs ...Command) []Result {
		var eb EntryBuilder
		eb.Reset(1, testStart, 256*len(cs))
		for _, c := range cs {
			eb.Add(0, 0, 0, c.AppendTo(nil))
		}
		return apply(eb.Bytes())
	}
	receive := func(topic string) time.Duration {
		best := time.Duration(1 << 62)
		for range 200 {
			command(&Publish{Topic: topic, Messages: messages(time.Hour, "x")})
			start := time.Now()
			res := command(&Receive{Topic: topic, Group: "g", Max: 1, Visibility: time.Hour})
			best = min(best, time.Since(start))
			if len(res[0].Deliveries) != 1 {
				b.Fatal("nothing received")
			}
		}
		return best
	}
	for b.Loop() {
		empty := receive("empty")
		start := time.Now()
		for n := 0; n < *backlog; n += 2000 {
			apply(publishEntry(testStart, 2000, 100, 1))
		}
		b.ReportMetric(float64(time.Since(start).Nanoseconds())/float64(*backlog), "ns/publish")
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		b.ReportMetric(float64(m.HeapAlloc)/(1<<20), "MiB-heap")
		b.ReportMetric(rss(b), "MiB-rss")
		crashed := e
		start = time.Now()
		// The old engine is abandoned as a killed process would be, except that it holds the lock.
		if err := crashed.Close(); err != nil {
			b.Fatal(err)
		}
		if e, err = Open(o); err != nil {
			b.Fatal(err)
		}
		applied, _ := e.Applied()
		for i := applied + 1; i <= index; i++ {
			if _, err := e.Apply(i, 1, since[i], nil, &fx); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(time.Since(start).Seconds(), "s-reopen")
		b.ReportMetric(float64(index-applied), "replayed")
		start = time.Now()
		for n := 0; n < *backlog; {
			var cs []Command
			for range 100 {
				cs = append(cs, &Receive{Topic: "bench", Group: "g", Max: 10, Visibility: time.Minute})
			}
			res := command(cs...)
			cs = cs[:0]
			for i := range res {
				c := &Settle{Topic: "bench", Group: "g", Op: Acknowledge}
				for _, d := range res[i].Deliveries {
					c.Receipts = append(c.Receipts, d.Receipt)
				}
				n += len(c.Receipts)
				cs = append(cs, c)
			}
			command(cs...)
		}
		b.ReportMetric(float64(time.Since(start).Nanoseconds())/float64(*backlog), "ns/receive+ack")
		behind := receive("bench")
		b.ReportMetric(float64(empty.Nanoseconds()), "ns-receive-empty")
		b.ReportMetric(float64(behind.Nanoseconds()), "ns-receive-behind")
	}
	if err := e.Close(); err != nil {
		b.Fatal(err)
	}
}

var backlog = flag.Int("backlog", 200_000, "messages of BenchmarkBacklog")

// rss is the resident memory of the process in MiB.
func rss(b *testing.B) float64 {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, _ := strconv.ParseFloat(strings.Fields(v)[0], 64)
			return kib / 1024
		}
	}
	return 0
}

// cpu is the processor time the process has used, the store's background work included.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRetention publishes -retained MiB of 1 KiB messages that live for 60 seconds, 16 MiB a second of
// cluster time, and reports how much the store takes beyond what lives.
func BenchmarkRetention(b *testing.B) {
	dir := b.TempDir()
	e, err := Open(Options{FS: vfs.Default, Dir: dir})
	if err != nil {
		b.Fatal(err)
	}
	const perEntry = 256
	now := testStart
	var fx Effects
	var published, worst int64
	body := make([]byte, 1000)
	size := func() int64 {
		var n int64
		err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				if info, err := d.Info(); err == nil {
					n += info.Size()
				}
			}
			return nil // files come and go
		})
		if err != nil {
			b.Fatal(err)
		}
		return n
	}
	for b.Loop() {
		index, _ := e.Applied()
		for range *retained * 4 {
			var eb EntryBuilder
			p := &Publish{Topic: "t"}
			for i := range perEntry {
				body[i%1000]++
				p.Messages = append(p.Messages, NewMessage{Retention: time.Minute, Body: body})
			}
			eb.Reset(1, now, perEntry*1024)
			eb.Add(0, 0, 0, p.AppendTo(nil))
			index++
			now.Cluster += 1000 / 64
			if _, err := e.Apply(index, 1, eb.Bytes(), nil, &fx); err != nil {
				b.Fatal(err)
			}
			published += int64(eb.Len())
			if e.NeedsCheckpoint() {
				if _, err := e.Checkpoint(); err != nil {
					b.Fatal(err)
				}
				live := min(published, 60*16<<20)
				worst = max(worst, size()-live)
			}
		}
	}
	b.ReportMetric(float64(worst)/(1<<20), "MiB-beyond-live")
	b.ReportMetric(float64(size())/(1<<20), "MiB-at-end")
	if err := e.Close(); err != nil {
		b.Fatal(err)
	}
}

var retained = flag.Int("retained", 64, "MiB of BenchmarkRetention")

// BenchmarkCheckpoint measures what a checkpoint of 100 000 changed leases costs, and how long of it Apply
// has to wait.
func BenchmarkCheckpoint(b *testing.B) {
	e, err := Open(Options{FS: vfs.Default, Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	index := uint64(0)
	apply := func(entry []byte) []Result {
		index++
		res, err := e.Apply(index, 1, entry, nil, nil)
		if err != nil {
			b.Fatal(err)
		}
		return res
	}
	const n = 100_000
	for range n / 2000 {
		apply(publishEntry(testStart, 2000, 100, 100))
	}
	now := testStart
	var locked time.Duration
	for b.Loop() {
		b.StopTimer()
		var eb EntryBuilder
		now.Cluster += 60_000
		eb.Reset(1, now, 0)
		for range n / 1000 {
			eb.Add(0, 0, 0, (&Receive{Topic: "bench", Group: "g", Max: 1000, Visibility: time.Minute}).AppendTo(nil))
		}
		apply(eb.Bytes())
		b.StartTimer()
		e.mu.Lock()
		batch := e.db.NewBatch()
		start := time.Now()
		for _, c := range e.groups[0].chunks {
			c.dirty = true
		}
		e.groups[0].dirty = true
		e.encodeDirty(batch)
		locked += time.Since(start)
		for _, c := range e.groups[0].chunks {
			c.dirty = true
		}
		e.groups[0].dirty = true
		e.mu.Unlock()
		if err := batch.Close(); err != nil {
			b.Fatal(err)
		}
		if _, err := e.Checkpoint(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(locked.Microseconds())/float64(b.N), "us-locked")
	if err := e.Close(); err != nil {
		b.Fatal(err)
	}
}
