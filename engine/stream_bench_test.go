package engine

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// BenchmarkStreamAdd is XADD as a pipeline brings it: entries of many commands, one block each.
func BenchmarkStreamAdd(b *testing.B) {
	for _, c := range []struct{ size, batch int }{{1024, 240}, {100, 2000}, {1024, 1}} {
		b.Run(fmt.Sprintf("%dx%d", c.batch, c.size), func(b *testing.B) {
			l := benchEngine(b)
			cmd := (&StreamAdd{Key: "s", Fields: [][]byte{[]byte("body"), make([]byte, c.size)}}).AppendTo(nil)
			var eb EntryBuilder
			eb.Reset(1, l.now, c.batch*(len(cmd)+EntryOverhead))
			for range c.batch {
				eb.Add(0, 0, 0, cmd)
			}
			entry := eb.Bytes()
			b.SetBytes(int64(len(entry)))
			b.ReportAllocs()
			index := uint64(0)
			var res []Result
			var err error
			start := cpu(b)
			for b.Loop() {
				index++
				if res, err = l.e.Apply(index, 1, entry, res[:0], &l.fx); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*c.batch), "ns/entry")
			b.ReportMetric(float64((cpu(b)-start).Nanoseconds())/float64(b.N*c.batch), "cpu-ns/entry")
			b.StopTimer()
			l.close()
		})
	}
}

// BenchmarkStreamPending measures a pending list of many entries: memory, and the commands that walk it.
func BenchmarkStreamPending(b *testing.B) {
	for _, n := range []int{100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			l := openTest(b, Options{Dir: b.TempDir(), FS: vfs.Default, RecentBytes: -1})
			defer l.close()
			l.do(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g", Create: true, EntriesRead: -1})
			heap := func() int64 {
				runtime.GC()
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				return int64(m.HeapAlloc)
			}
			before := heap()
			for i := 0; i < n; i += 1000 {
				cmds := make([]Command, 0, 1001)
				for range 1000 {
					cmds = append(cmds, &StreamAdd{Key: "s", Fields: fieldsOf("a", "b")})
				}
				cmds = append(cmds, &StreamReadGroup{Group: "g", Consumer: fmt.Sprint("c", i%7), Streams: []StreamPosition{{Key: "s", New: true}}})
				l.apply(cmds...)
				l.entries = nil
				l.entries = append(l.entries, make([]logEntry, i/1000+2)...)
				l.now.Wall++
			}
			figures := map[string]float64{"B/entry": float64(heap()-before) / float64(n)}
			for name, c := range map[string]Command{
				"xautoclaim-ms": &StreamAutoClaim{Key: "s", Group: "g", Consumer: "z", MinIdle: int64(time.Hour / time.Millisecond), Count: 100},
				"history-ms":    &StreamReadGroup{Group: "g", Consumer: "c0", Count: 10, Streams: []StreamPosition{{Key: "s", ID: StreamID{Ms: uint64(l.now.Wall - 5)}}}},
			} {
				at := time.Now()
				l.apply(c)
				figures[name] = float64(time.Since(at).Microseconds()) / 1000
			}
			at := time.Now()
			l.ask(Query{Kind: QueryPending, Topic: "s", Group: "g"})
			figures["xpending-ms"] = float64(time.Since(at).Microseconds()) / 1000
			for b.Loop() {
			}
			for name, v := range figures {
				b.ReportMetric(v, name)
			}
		})
	}
}
