package wal

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"tercet.dev/tercet/wal/disk"
)

// benchDir is where the benchmarks write: TERCET_BENCH_DIR, or the temporary directory.
func benchDir(b *testing.B) string {
	if dir := os.Getenv("TERCET_BENCH_DIR"); dir != "" {
		dir = filepath.Join(dir, fmt.Sprintf("wal-bench-%d", os.Getpid()))
		b.Cleanup(func() { _ = os.RemoveAll(dir) })
		return dir
	}
	return b.TempDir()
}

// nullDisk takes writes and forgets them: what remains is the cost of the log itself.
type nullDisk struct{ disk.FS }

func (d nullDisk) Create(name string, mode disk.Mode) (disk.File, error) {
	f, err := d.FS.Create(name, mode)
	return nullFile{f}, err
}

func (d nullDisk) Open(name string, mode disk.Mode) (disk.File, error) {
	f, err := d.FS.Open(name, mode)
	if err != nil {
		return nil, err
	}
	return nullFile{f}, nil
}

type nullFile struct{ disk.File }

func (nullFile) WriteAt(p []byte, off int64) (int, error) { return len(p), nil }
func (nullFile) Sync() error                              { return nil }
func (nullFile) Size() (int64, error)                     { return SegmentSizeDefault, nil }

// BenchmarkAppend is the CPU cost of an entry: checksum, copy, index, ring. Nothing is written to the disk.
func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{100, 1 << 10, 16 << 10, 256 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			w, err := Open(Options{Dir: benchDir(b), FS: nullDisk{disk.OS()}, Prefill: 1})
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = w.Close() }()
			s := w.Shard(0)
			data := make([]byte, size)
			entries := make([]Entry, 1)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				entries[0] = Entry{Index: uint64(i + 1), Term: 1, Data: data}
				lsn, err := s.Append(entries)
				if err != nil {
					b.Fatal(err)
				}
				if bytes, _ := w.Unsynced(); bytes > 16<<20 {
					if err := w.WaitDurable(lsn, nil); err != nil {
						b.Fatal(err)
					}
				}
				if every := 16 << 20 / size; i%every == every-1 {
					if err := s.TruncatePrefix(uint64(i)); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// BenchmarkProbe is what the disk itself takes: one write and sync after the other over a filled file.
func BenchmarkProbe(b *testing.B) {
	for _, mode := range []disk.Mode{disk.Direct, disk.Buffered} {
		for _, size := range []int{4 << 10, 68 << 10, 260 << 10} {
			b.Run(fmt.Sprintf("%s/%d", mode, size), func(b *testing.B) {
				const fileSize = 32 << 20
				fsys, dir := disk.OS(), benchDir(b)
				if err := fsys.MkdirAll(dir); err != nil {
					b.Fatal(err)
				}
				name := filepath.Join(dir, "probe")
				f, err := fsys.Create(name, mode)
				if err != nil {
					b.Log(err) // no direct I/O here: nothing to compare with
					return
				}
				defer func() { _ = f.Close() }()
				buf := disk.Aligned(1 << 20)
				for off := int64(0); off < fileSize; off += int64(len(buf)) {
					if _, err := f.WriteAt(buf, off); err != nil {
						b.Fatal(err)
					}
				}
				if err := f.Sync(); err != nil {
					b.Fatal(err)
				}
				b.SetBytes(int64(size))
				b.ResetTimer()
				off := int64(0)
				for range b.N {
					if off+int64(size) > fileSize {
						off = 0
					}
					if _, err := f.WriteAt(buf[:size], off); err != nil {
						b.Fatal(err)
					}
					if err := f.Sync(); err != nil {
						b.Fatal(err)
					}
					off += int64(size)
				}
			})
		}
	}
}

// BenchmarkCommit is one append after the other, each made durable: the latency a single publisher sees, in the
// mode the disk offers and through the page cache, and on an emulated slow disk.
func BenchmarkCommit(b *testing.B) {
	for _, mode := range []struct {
		name   string
		direct DirectMode
		delay  time.Duration
	}{{"direct", Auto, 0}, {"buffered", Off, 0}, {"delay1ms", Auto, time.Millisecond}} {
		for _, size := range []int{1 << 10, 64 << 10, 256 << 10} {
			b.Run(fmt.Sprintf("%s/%d", mode.name, size), func(b *testing.B) {
				w, err := Open(Options{Dir: benchDir(b), FS: disk.WithSyncDelay(disk.OS(), mode.delay), Direct: mode.direct, Prefill: 1})
				if err != nil {
					b.Fatal(err)
				}
				defer func() { _ = w.Close() }()
				s := w.Shard(0)
				data := make([]byte, size)
				b.SetBytes(int64(size))
				b.ResetTimer()
				for i := range b.N {
					lsn, err := s.Append([]Entry{{Index: uint64(i + 1), Term: 1, Data: data}})
					if err != nil {
						b.Fatal(err)
					}
					if err := w.WaitDurable(lsn, nil); err != nil {
						b.Fatal(err)
					}
					if i%512 == 511 {
						if err := s.TruncatePrefix(uint64(i - 100)); err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		}
	}
}

// BenchmarkStream keeps 4 MiB in flight: the throughput of group commit.
func BenchmarkStream(b *testing.B) {
	for _, size := range []int{1 << 10, 64 << 10} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			w, err := Open(Options{Dir: benchDir(b), Prefill: 2})
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = w.Close() }()
			s := w.Shard(0)
			data := make([]byte, size)
			b.SetBytes(int64(size))
			b.ResetTimer()
			for i := range b.N {
				if _, err := s.Append([]Entry{{Index: uint64(i + 1), Term: 1, Data: data}}); err != nil {
					b.Fatal(err)
				}
				if n := w.Written(); n > 4<<20 {
					if err := w.WaitDurable(n-4<<20, nil); err != nil {
						b.Fatal(err)
					}
				}
				if every := 64 << 20 / size; i%every == every-1 {
					if err := s.TruncatePrefix(uint64(i - every/8)); err != nil {
						b.Fatal(err)
					}
				}
			}
			if err := w.WaitDurable(w.Written(), nil); err != nil {
				b.Fatal(err)
			}
			st := w.Stats()
			b.ReportMetric(float64(st.SyncedBytes)/float64(st.Syncs)/1024, "KiB/sync")
			b.ReportMetric(float64(st.RotationWaits), "waits")
		})
	}
}

// BenchmarkReadLagging reads entries from disk in order, as replication does for a follower that fell behind.
func BenchmarkReadLagging(b *testing.B) {
	w, err := Open(Options{Dir: benchDir(b), RingBytes: 1, Prefill: 1})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	s := w.Shard(0)
	const count = 20000
	data := make([]byte, 4096)
	for i := range uint64(count) {
		if _, err := s.Append([]Entry{{Index: i + 1, Data: data}}); err != nil {
			b.Fatal(err)
		}
	}
	if err := w.WaitDurable(w.Written(), nil); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(data)))
	b.ResetTimer()
	for i := range b.N {
		var e Entry
		if err := s.Get(uint64(i%(count-1))+1, &e); err != nil {
			b.Fatal(err)
		}
	}
}
