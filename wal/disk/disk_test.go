package disk_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"tercet.dev/tercet/wal/disk"
	"tercet.dev/tercet/wal/disk/sim"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestContract holds what every file system must do, against the operating system and the simulation.
func TestContract(t *testing.T) {
	type target struct {
		fs  disk.FS
		dir string
	}
	targets := map[string]target{
		"os":    {disk.OS(), t.TempDir()},
		"delay": {disk.WithSyncDelay(disk.OS(), time.Microsecond), t.TempDir()},
		"sim":   {sim.New(1, sim.Options{}), "/d"},
	}
	if st, err := os.Stat("/dev/shm"); err == nil && st.IsDir() {
		dir, err := os.MkdirTemp("/dev/shm", "disk-test")
		must(t, err)
		defer func() { _ = os.RemoveAll(dir) }()
		targets["memory"] = target{disk.OS(), dir}
	}
	for name, target := range targets {
		t.Run(name, func(t *testing.T) {
			modes := []disk.Mode{disk.Buffered}
			dir := filepath.Join(target.dir, "a", "b")
			must(t, target.fs.MkdirAll(dir))
			must(t, target.fs.MkdirAll(dir))
			if target.fs.DirectWorks(dir) {
				modes = append(modes, disk.Direct)
			}
			for _, mode := range modes {
				t.Run(mode.String(), func(t *testing.T) { contract(t, target.fs, filepath.Join(dir, mode.String()), mode) })
			}
		})
	}
}

func contract(t *testing.T, fsys disk.FS, dir string, mode disk.Mode) {
	must(t, fsys.MkdirAll(dir))
	name := filepath.Join(dir, "file")
	if _, err := fsys.Open(name, mode); !errors.Is(err, disk.ErrNotExist) {
		t.Fatalf("opening a missing file: %v", err)
	}
	f, err := fsys.Create(name, mode)
	must(t, err)
	if _, err := fsys.Create(name, mode); !errors.Is(err, disk.ErrExist) {
		t.Fatalf("creating a file twice: %v", err)
	}
	buf := disk.Aligned(3 * disk.BlockSize)
	for i := range buf {
		buf[i] = byte(i / 7)
	}
	if n, err := f.WriteAt(buf, 0); err != nil || n != len(buf) {
		t.Fatalf("write: %d, %v", n, err)
	}
	must(t, f.Sync())
	must(t, fsys.SyncDir(dir))
	if mode == disk.Direct {
		if _, err := f.WriteAt(buf[1:disk.BlockSize+1], 0); err == nil {
			t.Error("an unaligned direct write is not refused")
		}
		if _, err := f.WriteAt(buf[:disk.BlockSize], 512); err == nil {
			t.Error("a direct write at an unaligned offset is not refused")
		}
	}
	if n, err := f.Size(); err != nil || n != int64(len(buf)) {
		t.Fatalf("size: %d, %v", n, err)
	}
	for _, c := range []struct{ off, n int }{{0, 3 * disk.BlockSize}, {1, 1}, {4095, 2}, {100, 9000}, {disk.BlockSize, disk.BlockSize}, {12287, 1}} {
		got := make([]byte, c.n)
		if n, err := f.ReadAt(got, int64(c.off)); err != nil || n != c.n || !bytes.Equal(got, buf[c.off:c.off+c.n]) {
			t.Fatalf("reading %d bytes at %d: %d, %v", c.n, c.off, n, err)
		}
	}
	got := make([]byte, 100)
	if n, err := f.ReadAt(got, 12200); !errors.Is(err, io.EOF) || n != 88 || !bytes.Equal(got[:88], buf[12200:]) {
		t.Fatalf("reading over the end: %d, %v", n, err)
	}
	other := filepath.Join(dir, "other")
	must(t, fsys.Rename(name, other))
	if n, err := f.ReadAt(got, 0); err != nil || n != 100 {
		t.Fatalf("a handle after renaming: %v", err)
	}
	if names, err := fsys.List(dir); err != nil || !reflect.DeepEqual(names, []string{"other"}) {
		t.Fatalf("list: %v, %v", names, err)
	}
	must(t, f.Close())
	r, err := fsys.Open(other, disk.ReadOnly)
	must(t, err)
	if _, err := r.WriteAt(buf, 0); err == nil {
		t.Error("a read-only file can be written")
	}
	must(t, r.Close())
	must(t, fsys.Remove(other))
	if err := fsys.Remove(other); !errors.Is(err, disk.ErrNotExist) {
		t.Fatalf("removing twice: %v", err)
	}
	lock, err := fsys.Lock(filepath.Join(dir, "LOCK"))
	must(t, err)
	if _, err := fsys.Lock(filepath.Join(dir, "LOCK")); !errors.Is(err, disk.ErrLocked) {
		t.Fatalf("locking twice: %v", err)
	}
	must(t, lock.Close())
	lock, err = fsys.Lock(filepath.Join(dir, "LOCK"))
	must(t, err)
	must(t, lock.Close())
	if free, err := fsys.Free(dir); err != nil || free <= 0 {
		t.Fatalf("free: %d, %v", free, err)
	}
}

func TestAligned(t *testing.T) {
	for _, n := range []int{1, 512, 4095, 4096, 4097, 1 << 20} {
		for range 20 {
			b := disk.Aligned(n)
			if len(b) != n || cap(b) != n || !disk.IsAligned(b[:n/disk.BlockSize*disk.BlockSize], 0) {
				t.Fatalf("a buffer of %d bytes: %d long, %d capacity", n, len(b), cap(b))
			}
		}
	}
	if disk.IsAligned(disk.Aligned(8192)[1:4097], 0) || disk.IsAligned(disk.Aligned(4096), 1) || disk.IsAligned(disk.Aligned(4096)[:100], 0) {
		t.Fatal("an unaligned buffer counts as aligned")
	}
}

func TestSyncDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := sim.New(1, sim.Options{})
		must(t, d.MkdirAll("/d"))
		f, err := disk.WithSyncDelay(d, 3*time.Millisecond).Create("/d/f", disk.Buffered)
		must(t, err)
		start := time.Now()
		for range 3 {
			must(t, f.Sync())
		}
		if took, syncs := time.Since(start), d.OpsByKind()["sync"]; took != 9*time.Millisecond || syncs != 3 {
			t.Fatalf("three syncs: %d of them in %v of the bubble's time", syncs, took)
		}
		must(t, f.Close())
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
