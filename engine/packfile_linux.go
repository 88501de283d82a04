package engine

import (
	"errors"

	"github.com/cockroachdb/pebble/v2/vfs"
	"golang.org/x/sys/unix"
)

// openPast makes writes to a file go past the page cache: what a queue stores is read soon, from memory, or late. Where
// the file system cannot do that, they go through it and are on their way to the disk at once.
func openPast(f vfs.File) vfs.File {
	if setDirect(f, unix.O_DIRECT) != nil {
		return throughCache(f)
	}
	return f
}

// writePast writes to a file that openPast returned.
func writePast(f vfs.File, b []byte) (int, error) {
	n, err := f.Write(b)
	if n == 0 && errors.Is(err, unix.EINVAL) && setDirect(f, 0) == nil {
		// Some file systems take the flag and refuse the write.
		return f.Write(b)
	}
	return n, err
}

func setDirect(f vfs.File, flag int) error {
	fd := f.Fd()
	if fd == vfs.InvalidFd {
		return errors.ErrUnsupported
	}
	flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
	if err == nil {
		_, err = unix.FcntlInt(fd, unix.F_SETFL, flags&^unix.O_DIRECT|flag)
	}
	return err
}
