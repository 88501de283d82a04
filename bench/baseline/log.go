package main

import (
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	hraft "github.com/hashicorp/raft"
	raftwal "github.com/hashicorp/raft-wal"
	"github.com/hashicorp/raft-wal/fs"
	"github.com/hashicorp/raft-wal/segment"
	"github.com/hashicorp/raft-wal/types"
)

// logCacheEntries is how many entries are kept in memory, so that replication and apply do not read the log again:
// 64 MiB of full entries, as much as Tercet's log keeps.
const logCacheEntries = 256

// openLog opens the log as its authors recommend it: default segments, and raft's cache in front.
func openLog(dir string, delay time.Duration, stats *syncStats) (*raftwal.WAL, hraft.LogStore, error) {
	wal, err := raftwal.Open(dir, raftwal.WithSegmentFiler(segment.NewFiler(dir, &meteredFS{fs.New(), delay, stats})))
	if err != nil {
		return nil, nil, err
	}
	cached, err := hraft.NewLogCache(logCacheEntries, wal)
	return wal, cached, err
}

// syncStats counts the syncs of the log.
type syncStats struct {
	count, nanos, bytes atomic.Int64
}

// meteredFS counts syncs and makes each take longer if asked to.
type meteredFS struct {
	types.VFS
	delay time.Duration
	stats *syncStats
}

// Create implements types.VFS.
func (m *meteredFS) Create(dir, name string, size uint64) (types.WritableFile, error) {
	return m.wrap(m.VFS.Create(dir, name, size))
}

// OpenWriter implements types.VFS.
func (m *meteredFS) OpenWriter(dir, name string) (types.WritableFile, error) {
	return m.wrap(m.VFS.OpenWriter(dir, name))
}

func (m *meteredFS) wrap(f types.WritableFile, err error) (types.WritableFile, error) {
	if err != nil {
		return nil, err
	}
	return &meteredFile{WritableFile: f, fs: m}, nil
}

type meteredFile struct {
	types.WritableFile
	fs *meteredFS
}

// WriteAt implements io.WriterAt.
func (f *meteredFile) WriteAt(p []byte, off int64) (int, error) {
	f.fs.stats.bytes.Add(int64(len(p)))
	return f.WritableFile.WriteAt(p, off)
}

// Sync implements types.WritableFile.
func (f *meteredFile) Sync() error {
	began := time.Now()
	if f.fs.delay > 0 {
		time.Sleep(f.fs.delay)
	}
	err := f.WritableFile.Sync()
	f.fs.stats.nanos.Add(int64(time.Since(began)))
	f.fs.stats.count.Add(1)
	return err
}

// discardSnapshots satisfies raft, which cuts its log at snapshots: the state is in the engine's own store, and no
// node of a measurement ever falls so far behind that it would need another's.
type discardSnapshots struct{ dir string }

func (d discardSnapshots) store() (hraft.SnapshotStore, error) {
	dir := filepath.Join(d.dir, "snapshots")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return hraft.NewFileSnapshotStore(dir, 1, nil)
}
