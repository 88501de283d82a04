package bench

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"tercet.dev/tercet/wal"
	"tercet.dev/tercet/wal/disk"
)

// The pairs below are to be read together: what the log takes for one entry, and what the disk under it takes for the
// same bytes in the same mode. Set TMPDIR to choose the disk.

var benchSizes = []int{1 << 10, 16 << 10, 64 << 10, 256 << 10}

// BenchmarkDiskSync writes and syncs over prefilled blocks, as the log does.
func BenchmarkDiskSync(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			dir := b.TempDir()
			mode := disk.Buffered
			if DirectWorks(dir) {
				mode = disk.Direct
			}
			const span = 64 << 20
			body := disk.Aligned(int(disk.AlignUp(int64(size))))
			copy(body, newBodies(1).next(len(body)))
			name := filepath.Join(dir, "stream")
			if err := prepareProbeFile(name, body, span/int64(len(body))*int64(len(body)), true); err != nil {
				b.Fatal(err)
			}
			f, err := disk.OS().Open(name, mode)
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			b.SetBytes(int64(size))
			var off int64
			for b.Loop() {
				if off+int64(len(body)) > span {
					off = 0
				}
				if _, err := f.WriteAt(body, off); err != nil {
					b.Fatal(err)
				}
				if err := f.Sync(); err != nil {
					b.Fatal(err)
				}
				off += int64(len(body))
			}
		})
	}
}

// BenchmarkLogSync appends one entry at a time and waits until it is durable.
func BenchmarkLogSync(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) { benchmarkLog(b, size, 1) })
	}
}

// BenchmarkLogStream appends entries of 256 KiB and waits only for the eighth but last, as a busy leader does.
func BenchmarkLogStream(b *testing.B) { benchmarkLog(b, 256<<10, 8) }

func benchmarkLog(b *testing.B, size, inFlight int) {
	w, err := wal.Open(wal.Options{Dir: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer w.Close()
	shard, data := w.Shard(0), newBodies(2).next(size)
	pending := make([]wal.LSN, inFlight)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	var index uint64
	for b.Loop() {
		slot := index % uint64(inFlight)
		if err := w.WaitDurable(pending[slot], nil); err != nil {
			b.Fatal(err)
		}
		index++
		lsn, err := shard.Append([]wal.Entry{{Index: index, Term: 1, AppendedAt: time.Now(), Data: data}})
		if err != nil {
			b.Fatal(err)
		}
		pending[slot] = lsn
		if inFlight == 1 {
			if err := w.WaitDurable(lsn, nil); err != nil {
				b.Fatal(err)
			}
		}
		if index%64 == 0 { // as checkpoints do
			if err := shard.TruncatePrefix(index - 32); err != nil {
				b.Fatal(err)
			}
		}
	}
}
