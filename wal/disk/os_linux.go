package disk

import (
	"errors"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// directFlags open a file past the page cache with every write synchronous.
const directFlags = unix.O_DIRECT | unix.O_DSYNC

// syncData makes the file's data durable, and of its metadata what is needed to read them back.
func syncData(f *os.File) error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if errors.Is(err, unix.EINTR) {
			continue // not carried out; unlike an I/O error this may be repeated
		}
		if err != nil {
			return &fs.PathError{Op: "fdatasync", Path: f.Name(), Err: err}
		}
		return nil
	}
}

// dropCache forgets the clean cached pages of the file. It is advice; failing to follow it costs nothing but doubt.
func dropCache(f *os.File) { _ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) }
