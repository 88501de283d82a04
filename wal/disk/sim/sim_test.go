package sim

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"tercet.dev/tercet/wal/disk"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fresh is a disk with a file of two durable blocks of 1, under a durable name.
func fresh(t *testing.T, seed uint64, o Options) (*Disk, disk.File) {
	t.Helper()
	d := New(seed, o)
	must(t, d.MkdirAll("/d"))
	f, err := d.Create("/d/f", disk.Buffered)
	must(t, err)
	put(t, f, 0, 1, 2*blockSize)
	must(t, f.Sync())
	must(t, d.SyncDir("/d"))
	return d, f
}

func put(t *testing.T, f disk.File, off int64, c byte, n int) {
	t.Helper()
	b := disk.Aligned(n)
	for i := range b {
		b[i] = c
	}
	_, err := f.WriteAt(b, off)
	must(t, err)
}

func TestSyncedSurvives(t *testing.T) {
	for seed := range uint64(200) {
		d, f := fresh(t, seed, Options{})
		put(t, f, blockSize, 2, 3*blockSize)
		must(t, f.Sync())
		want := d.ReadFile("/d/f")
		if got := d.Crash().ReadFile("/d/f"); !bytes.Equal(got, want) {
			t.Fatalf("seed %d: synced data did not survive", seed)
		}
	}
}

// TestUnsyncedMayBeAnything: over many seeds an unsynced write survives wholly, not at all, in sectors, or torn; the
// block before it is never touched.
func TestUnsyncedMayBeAnything(t *testing.T) {
	seen := make(map[string]int)
	for seed := range uint64(400) {
		d, f := fresh(t, seed, Options{})
		put(t, f, blockSize, 2, 2*blockSize)
		got := d.Crash().ReadFile("/d/f")
		if !bytes.Equal(got[:blockSize], bytes.Repeat([]byte{1}, blockSize)) {
			t.Fatalf("seed %d: a block that was not being written changed", seed)
		}
		kinds := make(map[byte]bool)
		for _, c := range got[blockSize:] {
			kinds[min(c, 3)] = true
		}
		switch {
		case len(got) == 3*blockSize && reflect.DeepEqual(kinds, map[byte]bool{2: true}):
			seen["whole"]++
		case len(got) == 2*blockSize && reflect.DeepEqual(kinds, map[byte]bool{1: true}):
			seen["lost"]++
		case kinds[3]:
			seen["garbage"]++
		default:
			seen["sectors"]++
		}
	}
	for _, k := range []string{"whole", "lost", "garbage", "sectors"} {
		if seen[k] == 0 {
			t.Errorf("never %s: %v", k, seen)
		}
	}
}

func TestKeepNoneAndAll(t *testing.T) {
	for keep, want := range map[Keep]byte{KeepNone: 1, KeepAll: 2} {
		d, f := fresh(t, 1, Options{Keep: keep})
		put(t, f, 0, 2, blockSize)
		must(t, d.Rename("/d/f", "/d/g"))
		n := d.Crash()
		name := map[Keep]string{KeepNone: "/d/f", KeepAll: "/d/g"}[keep]
		if got := n.ReadFile(name); len(got) == 0 || got[0] != want {
			t.Errorf("keep %d: %v", keep, n.Names())
		}
	}
}

// TestNamesNeedTheirDirectorySynced: each change of names may be undone for itself, and none after SyncDir.
func TestNamesNeedTheirDirectorySynced(t *testing.T) {
	seen := make(map[string]int)
	for seed := range uint64(300) {
		d, _ := fresh(t, seed, Options{})
		must(t, d.Rename("/d/f", "/d/g"))
		f, err := d.Create("/d/new", disk.Buffered)
		must(t, err)
		put(t, f, 0, 3, blockSize)
		must(t, f.Sync())
		seen[fmt.Sprint(d.Clone().Crash().Names())]++
		must(t, d.SyncDir("/d"))
		if got := d.Crash().Names(); !reflect.DeepEqual(got, []string{"/d/g", "/d/new"}) {
			t.Fatalf("seed %d: after SyncDir there is %v", seed, got)
		}
	}
	for _, k := range []string{"[/d/f]", "[/d/g]", "[/d/f /d/new]", "[/d/g /d/new]"} {
		if seen[k] == 0 {
			t.Errorf("never %s: %v", k, seen)
		}
	}
	if len(seen) != 4 {
		t.Errorf("found %v", seen)
	}
}

func TestKillKeepsTheCacheAndItsDoubts(t *testing.T) {
	d, f := fresh(t, 1, Options{Keep: KeepNone})
	put(t, f, 0, 2, blockSize)
	k := d.Kill()
	if got := k.ReadFile("/d/f"); got[0] != 2 {
		t.Fatal("a killed process's write is not to be seen")
	}
	if got := k.Crash().ReadFile("/d/f"); got[0] != 1 {
		t.Fatal("a killed process's unsynced write survives a power loss")
	}
	if _, err := f.WriteAt([]byte{1}, 0); !errors.Is(err, ErrCrashed) {
		t.Fatalf("the dead process can write: %v", err)
	}
}

func TestFailedSyncIsNeverMadeGood(t *testing.T) {
	lost := 0
	for seed := range uint64(50) {
		d, f := fresh(t, seed, Options{})
		put(t, f, 0, 2, blockSize)
		d.FailAt(1, nil)
		if err := f.Sync(); !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
		must(t, f.Sync()) // succeeds, and proves nothing
		if d.ReadFile("/d/f")[0] != 2 {
			t.Fatal("the cache forgot the write")
		}
		if d.Crash().ReadFile("/d/f")[0] == 1 {
			lost++
		}
	}
	if lost == 0 || lost == 50 {
		t.Fatalf("lost in %d of 50", lost)
	}
}

// TestSameSeedSameDisk: what happens is a function of the seed and the operations.
func TestSameSeedSameDisk(t *testing.T) {
	run := func() string {
		d, f := fresh(t, 42, Options{})
		out := ""
		for i := range 20 {
			put(t, f, int64(i%3)*blockSize, byte(i), 2*blockSize)
			if i%4 == 0 {
				must(t, d.Rename("/d/f", "/d/g"))
				must(t, d.Rename("/d/g", "/d/f"))
			}
			c := d.Clone().Crash()
			out += fmt.Sprintf("%v %x\n", c.Names(), c.ReadFile("/d/f"))
		}
		return out
	}
	if first, second := run(), run(); first != second {
		t.Fatal("the same seed gives different disks")
	}
}

func TestCrashAtEndsEverything(t *testing.T) {
	d, f := fresh(t, 1, Options{})
	d.CrashAt(2)
	put(t, f, 0, 2, blockSize)
	if err := f.Sync(); !errors.Is(err, ErrCrashed) || !d.Crashed() {
		t.Fatalf("the second operation: %v", err)
	}
	if _, err := d.List("/d"); !errors.Is(err, ErrCrashed) {
		t.Fatalf("after the crash: %v", err)
	}
	if d.Crash().ReadFile("/d/f") == nil {
		t.Fatal("the next disk is empty")
	}
}

func TestHangUntilRelease(t *testing.T) {
	d, f := fresh(t, 1, Options{Hang: true})
	d.Crash()
	var wg sync.WaitGroup
	errs := make(chan error, 4)
	for range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			errs <- f.Sync()
		}()
	}
	select {
	case err := <-errs:
		t.Fatalf("a dead disk answers: %v", err)
	default:
	}
	d.Release()
	d.Release()
	wg.Wait()
	for range 4 {
		if err := <-errs; !errors.Is(err, ErrCrashed) {
			t.Fatal(err)
		}
	}
}

func TestFreezeAndLatency(t *testing.T) {
	d, f := fresh(t, 1, Options{})
	asked := make(chan struct{}, 1)
	d.SetSyncLatency(func() time.Duration { asked <- struct{}{}; return time.Microsecond })
	d.Freeze()
	d.Freeze()
	done := make(chan error)
	go func() { done <- f.Sync() }()
	<-asked
	if got := d.ReadFile("/d/f"); got == nil {
		t.Fatal("a frozen disk cannot be looked at")
	}
	select {
	case err := <-done:
		t.Fatalf("a frozen disk syncs: %v", err)
	default:
	}
	d.Thaw()
	must(t, <-done)
	d.SetSyncLatency(nil)
	// A power loss ends the wait of a frozen disk.
	d.Freeze()
	go func() { done <- f.Sync() }()
	d.Crash()
	if err := <-done; !errors.Is(err, ErrCrashed) {
		t.Fatal(err)
	}
}

func TestCapacity(t *testing.T) {
	d, f := fresh(t, 1, Options{Capacity: 4 * blockSize})
	put(t, f, 2*blockSize, 1, 2*blockSize)
	if _, err := f.WriteAt(make([]byte, 1), 4*blockSize); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("writing beyond the capacity: %v", err)
	}
	if free, _ := d.Free("/d"); free != 0 {
		t.Fatalf("%d bytes free", free)
	}
	must(t, d.Remove("/d/f"))
	if free, _ := d.Free("/d"); free != 4*blockSize {
		t.Fatalf("%d bytes free", free)
	}
}

func TestDamage(t *testing.T) {
	d, _ := fresh(t, 1, Options{})
	d.FlipBit("/d/f", 9)
	if got := d.Crash().ReadFile("/d/f"); got[1] != 3 || got[0] != 1 {
		t.Fatalf("%v", got[:4])
	}
	d, _ = fresh(t, 1, Options{})
	d.WriteFile("/d/f", []byte("x"))
	d.WriteFile("/e/g", []byte("y"))
	d.RemoveFile("/d/f")
	n := d.Crash()
	if got := n.Names(); !reflect.DeepEqual(got, []string{"/e/g"}) || string(n.ReadFile("/e/g")) != "y" {
		t.Fatalf("%v", got)
	}
}
