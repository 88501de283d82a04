//go:build unix

package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"sync"

	"golang.org/x/sys/unix"
)

// OS returns the operating system's file system.
func OS() FS { return osFS{} }

type osFS struct{}

func (osFS) Create(name string, mode Mode) (File, error) {
	return openOS(name, mode, os.O_CREATE|os.O_EXCL)
}

func (osFS) Open(name string, mode Mode) (File, error) { return openOS(name, mode, 0) }

func openOS(name string, mode Mode, flag int) (File, error) {
	switch mode {
	case ReadOnly:
		flag |= os.O_RDONLY
	case Buffered:
		flag |= os.O_RDWR
	case Direct:
		if directFlags == 0 {
			return nil, &fs.PathError{Op: "open direct", Path: name, Err: errors.ErrUnsupported}
		}
		flag |= os.O_RDWR | directFlags
	}
	f, err := os.OpenFile(name, flag, 0o600)
	if err != nil {
		return nil, err
	}
	if mode != ReadOnly {
		// What an earlier process wrote and did not live to sync may stand in a cache, the kernel's or the drive's, as if
		// it were on disk. Make it durable or fail, then forget the cached copy, so that what is read is what the disk
		// holds.
		if err := syncData(f); err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("sync %s on opening: %w", name, err)
		}
		dropCache(f)
	}
	return &osFile{f: f, mode: mode}, nil
}

func (osFS) Rename(from, to string) error { return os.Rename(from, to) }

func (osFS) Remove(name string) error { return os.Remove(name) }

func (osFS) List(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	sort.Strings(names)
	return names, nil
}

func (o osFS) MkdirAll(dir string) error {
	if st, err := os.Stat(dir); err == nil {
		if !st.IsDir() {
			return &fs.PathError{Op: "mkdir", Path: dir, Err: unix.ENOTDIR}
		}
		return nil
	}
	parent := filepath.Dir(dir)
	if parent != dir {
		if err := o.MkdirAll(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return o.SyncDir(parent)
}

func (osFS) SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (osFS) Lock(name string) (io.Closer, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrLocked, name)
		}
		return nil, &fs.PathError{Op: "flock", Path: name, Err: err}
	}
	return f, nil
}

func (osFS) Free(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(st.Bavail) * int64(st.Bsize), nil //nolint:unconvert // Bsize differs between systems
}

// probeName is the file DirectWorks writes; a leftover of it is overwritten and removed.
const probeName = "direct-probe.tmp"

func (o osFS) DirectWorks(dir string) bool {
	name := filepath.Join(dir, probeName)
	_ = os.Remove(name)
	f, err := o.Create(name, Direct)
	if err != nil {
		return false
	}
	defer func() { _ = os.Remove(name) }()
	defer func() { _ = f.Close() }()
	b := Aligned(2 * BlockSize)
	b[0], b[BlockSize] = 0xa5, 0x5a
	if _, err := f.WriteAt(b, 0); err != nil {
		return false
	}
	got := Aligned(BlockSize)
	if _, err := f.ReadAt(got, BlockSize); err != nil {
		return false
	}
	return got[0] == 0x5a
}

// osFile is a file of the operating system.
type osFile struct {
	f    *os.File
	mode Mode
}

// bounce holds aligned buffers for reads of Direct files that are not aligned themselves.
var bounce = sync.Pool{New: func() any {
	b := Aligned(bounceBytes)
	return &b
}}

const bounceBytes = 64 << 10

func (f *osFile) ReadAt(p []byte, off int64) (int, error) {
	if f.mode != Direct || IsAligned(p, off) {
		return f.f.ReadAt(p, off)
	}
	bp := bounce.Get().(*[]byte)
	defer bounce.Put(bp)
	buf := *bp
	done := 0
	for done < len(p) {
		at := off + int64(done)
		start := AlignDown(at)
		n := min(int64(len(buf)), AlignUp(off+int64(len(p)))-start)
		got, err := f.f.ReadAt(buf[:n], start)
		if skip := int(at - start); got > skip {
			done += copy(p[done:], buf[skip:got])
		}
		if done == len(p) {
			return done, nil
		}
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

func (f *osFile) WriteAt(p []byte, off int64) (int, error) {
	if f.mode == Direct && !IsAligned(p, off) {
		return 0, &fs.PathError{Op: "write direct", Path: f.f.Name(), Err: unix.EINVAL}
	}
	return f.f.WriteAt(p, off)
}

func (f *osFile) Sync() error {
	if f.mode == Direct {
		return nil // O_DSYNC: every WriteAt that returned was durable
	}
	return syncData(f.f)
}

func (f *osFile) Size() (int64, error) {
	st, err := f.f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (f *osFile) Close() error { return f.f.Close() }
