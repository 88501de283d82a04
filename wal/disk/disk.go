// Package disk is the little of a file system that the write-ahead log needs, with its contracts in prose, so that
// the log's real code can be run on a disk that loses power (package wal/disk/sim).
//
// Three rules hold for every implementation, and the log relies on nothing else:
//
//   - What WriteAt wrote may be lost, wholly or in part and sector by sector, until a later Sync of the same file
//     returned nil. What it replaces is then in doubt as well: a block being written may come back old, new, zero
//     or as garbage. Blocks that were not written since the last Sync do not change.
//   - Create, Rename and Remove take effect at once for everyone who looks, but may be undone by a power loss, each
//     for itself, until a SyncDir of their directory returned nil. A Rename is done or not done, never half.
//   - After WriteAt or Sync returned an error the content of the file is in doubt until it has been read back by
//     another process. Calling Sync again proves nothing.
package disk

import (
	"errors"
	"io"
	"io/fs"
	"unsafe"
)

// BlockSize is the unit of direct I/O: offsets, lengths and buffer addresses of files opened as Direct are
// multiples of it. It is also the largest unit that a power loss is taken to damage around a write.
const BlockSize = 4096

// Mode says how a file is opened.
type Mode uint8

const (
	// ReadOnly opens an existing file for ReadAt alone.
	ReadOnly Mode = iota
	// Buffered reads and writes through the page cache; Sync makes what was written durable.
	Buffered
	// Direct reads and writes past the page cache, and each WriteAt is durable when it returns, so that Sync has
	// nothing left to do. Writes must be aligned to BlockSize in offset, length and address; reads need not be.
	Direct
)

// String names the mode for logs.
func (m Mode) String() string {
	switch m {
	case ReadOnly:
		return "read-only"
	case Buffered:
		return "buffered"
	case Direct:
		return "direct"
	default:
		return "unknown"
	}
}

// ErrLocked reports that another process (or another holder in this one) has the lock.
var ErrLocked = errors.New("disk: locked by another process")

// Errors of missing and existing files, as in package io/fs; test for them with errors.Is.
var (
	ErrNotExist = fs.ErrNotExist
	ErrExist    = fs.ErrExist
)

// FS is a file system. Names are paths; the separator is that of the operating system. All methods may be called by
// several goroutines at once.
type FS interface {
	// Create makes a new empty file and opens it. It fails with ErrExist if the name is taken. The name is durable
	// only after SyncDir of its directory.
	Create(name string, mode Mode) (File, error)
	// Open opens an existing file; it never creates one (ErrNotExist).
	Open(name string, mode Mode) (File, error)
	// Rename gives a file a new name in the same directory, replacing whatever had it. Open handles stay valid.
	Rename(from, to string) error
	// Remove deletes a name. Open handles stay valid.
	Remove(name string) error
	// List returns the base names of the entries of a directory, sorted.
	List(dir string) ([]string, error)
	// MkdirAll makes a directory and its missing parents, and makes each new name durable.
	MkdirAll(dir string) error
	// SyncDir makes all earlier Create, Rename and Remove in dir durable.
	SyncDir(dir string) error
	// Lock takes an exclusive lock on a file, which it creates if need be, and fails with ErrLocked at once if
	// somebody has it. The lock ends with Close, or with the process.
	Lock(name string) (io.Closer, error)
	// Free returns the bytes that may still be allocated below dir.
	Free(dir string) (int64, error)
	// DirectWorks tries whether files in dir can be opened as Direct and written, by writing one and removing it.
	DirectWorks(dir string) bool
}

// File is an open file. ReadAt may run beside WriteAt and Sync of other ranges; writers are serialised by the caller.
type File interface {
	io.ReaderAt
	io.WriterAt
	// Sync makes all earlier writes of this file durable, its length included.
	Sync() error
	// Size returns the file's length in bytes.
	Size() (int64, error)
	// Close closes the handle. It does not sync.
	Close() error
}

// Aligned returns a zeroed buffer of n bytes whose address is a multiple of BlockSize, as Direct files need it.
func Aligned(n int) []byte {
	if n == 0 {
		return nil
	}
	b := make([]byte, n+BlockSize)
	skip := 0
	if r := int(uintptr(unsafe.Pointer(unsafe.SliceData(b))) % BlockSize); r != 0 {
		skip = BlockSize - r
	}
	return b[skip : skip+n : skip+n]
}

// IsAligned reports whether the buffer, its length and the offset all lie on block boundaries.
func IsAligned(b []byte, off int64) bool {
	return off%BlockSize == 0 && len(b)%BlockSize == 0 && uintptr(unsafe.Pointer(unsafe.SliceData(b)))%BlockSize == 0
}

// AlignUp rounds n up to a multiple of BlockSize.
func AlignUp(n int64) int64 { return (n + BlockSize - 1) &^ (BlockSize - 1) }

// AlignDown rounds n down to a multiple of BlockSize.
func AlignDown(n int64) int64 { return n &^ (BlockSize - 1) }
