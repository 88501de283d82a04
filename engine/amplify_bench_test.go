package engine

import (
	"flag"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// countingFS counts the bytes written to its files, apart those of packs.
type countingFS struct {
	vfs.FS
	packs, store atomic.Int64
}

// Create implements vfs.FS.
func (c *countingFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := c.FS.Create(name, category)
	n := &c.store
	if strings.HasPrefix(c.PathBase(name), packPrefix) {
		n = &c.packs
	}
	return countingFile{f, n}, err
}

type countingFile struct {
	vfs.File
	n *atomic.Int64
}

// Write implements vfs.File.
func (f countingFile) Write(p []byte) (int, error) {
	f.n.Add(int64(len(p)))
	return f.File.Write(p)
}

// BenchmarkAmplification publishes -amplified MiB of 1 KiB messages with 60 seconds of retention, 32 MiB a second of
// cluster time, round robin over the topics as the coalescer would mix them, with a checkpoint whenever one is due. It
// reports the bytes written per byte of payload and the processor time per message, both without the first minute of
// cluster time, since nothing is removed before.
func BenchmarkAmplification(b *testing.B) {
	for _, topics := range []int{1, 64} {
		b.Run(fmt.Sprintf("topics=%d", topics), func(b *testing.B) {
			fs := &countingFS{FS: vfs.Default}
			e, err := Open(Options{FS: fs, Dir: b.TempDir()})
			if err != nil {
				b.Fatal(err)
			}
			const perEntry, size = 240, 1024
			body := make([]byte, size)
			for i := range body {
				body[i] = byte(i * 7)
			}
			cmds := make([][]byte, topics)
			for i := range cmds {
				p := &Publish{Topic: fmt.Sprint("topic-", i), Messages: []NewMessage{{ContentType: "application/json", Retention: time.Minute, Body: body}}}
				cmds[i] = p.AppendTo(nil)
			}
			now := testStart
			var fx Effects
			var res []Result
			var packs0, store0 int64
			var cpu0 time.Duration
			counted := 0
			for b.Loop() {
				for n := 0; n < *amplified<<10; n += perEntry {
					if n>>10 >= *amplified/2 && counted == 0 {
						packs0, store0 = fs.packs.Load(), fs.store.Load()
						cpu0 = cpu(b)
					}
					var eb EntryBuilder
					eb.Reset(1, now, perEntry*(size+128))
					for i := range perEntry {
						eb.Add(0, 0, 0, cmds[(n+i)%topics])
					}
					index, _ := e.Applied()
					now.Cluster += 1000 * perEntry / (32 << 10)
					now.Wall = now.Cluster
					if res, err = e.Apply(index+1, 1, eb.Bytes(), res[:0], &fx); err != nil {
						b.Fatal(err)
					}
					if n>>10 >= *amplified/2 {
						counted += perEntry
					}
					if e.NeedsCheckpoint() {
						if _, err := e.Checkpoint(); err != nil {
							b.Fatal(err)
						}
					}
				}
			}
			payload := float64(counted) * size
			b.ReportMetric(float64(fs.packs.Load()-packs0)/payload, "packs/B")
			b.ReportMetric(float64(fs.store.Load()-store0)/payload, "store/B")
			b.ReportMetric(float64((cpu(b)-cpu0).Nanoseconds())/float64(counted), "cpu-ns/msg")
			if testing.Verbose() {
				b.Log(e.Metrics().String())
			}
			if err := e.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

var amplified = flag.Int("amplified", 64, "MiB of BenchmarkAmplification")
