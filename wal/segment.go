package wal

import (
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"tercet.dev/tercet/wal/disk"
)

// Names of files in the log's directory. Segment numbers rise and are never used twice, not even after a crash.
const (
	segmentSuffix = ".wal"
	poolPrefix    = "pool-"
	poolSuffix    = ".free"
	tempPrefix    = "tmp-"
	lockName      = "LOCK"
)

func segmentName(id uint64) string { return fmt.Sprintf("%016x%s", id, segmentSuffix) }

func poolName(n uint64) string { return fmt.Sprintf("%s%016x%s", poolPrefix, n, poolSuffix) }

func parseName(name, prefix, suffix string) (uint64, bool) {
	digits, ok := strings.CutPrefix(name, prefix)
	if !ok {
		return 0, false
	}
	if digits, ok = strings.CutSuffix(digits, suffix); !ok || len(digits) != 16 || strings.ToLower(digits) != digits {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 16, 64)
	return n, err == nil
}

// segment is one file of the log. Its number is fixed; the file comes into being when the committer first writes to
// it (for a segment found at start, when it is opened).
type segment struct {
	id   uint64
	path string

	// file is set before the segment's first byte is durable, and read only by those who look for durable bytes.
	file disk.File
	// size of the file; it never changes.
	size int64

	// synced is the offset up to which the file is durable and will not be written again.
	synced atomic.Int64

	// live and liveBytes count the entries located here that their shards still need. Guarded by WAL.mu.
	live      int
	liveBytes int64

	// refs counts the readers using file, and the log itself as one. The file is closed when it falls to zero.
	refs atomic.Int64
}

func newSegment(dir string, id uint64, size int64) *segment {
	s := &segment{id: id, path: filepath.Join(dir, segmentName(id)), size: size}
	s.refs.Store(1)
	return s
}

// pin keeps the file open and its content in place until unpin. It fails when the log has let go of the segment.
func (s *segment) pin() bool {
	for {
		n := s.refs.Load()
		if n == 0 {
			return false
		}
		if s.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

// unpin gives a reference back and closes the file with the last one.
func (s *segment) unpin() {
	if s.refs.Add(-1) == 0 && s.file != nil {
		_ = s.file.Close() // nothing rests on it: what had to be durable was synced
	}
}

// location is where an entry's record stands.
type location struct {
	seg  *segment
	off  uint32
	size uint32
}
