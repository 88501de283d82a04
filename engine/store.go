package engine

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/sstable"
	sblock "github.com/cockroachdb/pebble/v2/sstable/block"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/go-hclog"
)

// Names in the engine's directory.
const (
	currentFile      = "CURRENT"
	durableFile      = "DURABLE"
	generationPrefix = "gen-"
	exportPrefix     = "export-"
)

func generationName(n uint64) string { return fmt.Sprintf("%s%06d", generationPrefix, n) }

func generationNumber(name string) (uint64, bool) {
	digits, ok := strings.CutPrefix(name, generationPrefix)
	if !ok || len(digits) < 6 {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	return n, err == nil && generationName(n) == name
}

// CorruptError says that the store is damaged beyond what it can be trusted with.
type CorruptError struct {
	File   string
	Detail string
	Remedy string
}

// Error implements error.
func (e *CorruptError) Error() string {
	return fmt.Sprintf("engine: %s: %s; %s", e.File, e.Detail, e.Remedy)
}

// damaged turns a panic of Pebble's into an error: it panics over some kinds of damage to a blob file instead
// of reporting them. It is deferred around reads of the store, and around nothing else.
func (e *Engine) damaged(err *error) {
	if p := recover(); p != nil {
		*err = &CorruptError{File: e.o.FS.PathJoin(e.o.Dir, generationName(e.gen)), Detail: fmt.Sprint("reading failed: ", p), Remedy: remedyReplace}
		e.fail(*err)
	}
}

const remedyReplace = "replace this node from the others: tercet cluster replace NODE"

// Open opens the store that CURRENT points to, creating the first one, and loads its checkpoint.
func Open(o Options) (*Engine, error) {
	o.defaults()
	e := &Engine{o: o, keys: keyspace{o.Shard}, failure: make(chan struct{})}
	fs := o.FS
	if err := mkdirSync(fs, o.Dir); err != nil {
		return nil, err
	}
	gen, ok, err := readCurrent(fs, o.Dir)
	if err != nil {
		return nil, err
	}
	if !ok {
		if gen, err = e.createFirst(); err != nil {
			return nil, err
		}
	}
	if err := e.removeLeftovers(gen); err != nil {
		return nil, err
	}
	if err := e.openGeneration(gen); err != nil {
		return nil, err
	}
	if err := e.checkDurable(); err != nil {
		return nil, errors.Join(err, e.closeStore())
	}
	return e, nil
}

// writeDurable notes beside the store which checkpoint it has reached. Pebble takes damage in its manifest
// for the end of it and opens with an earlier state: with the note that shows.
func (e *Engine) writeDurable(s *state) error {
	line := fmt.Sprintf("%s %d %d", generationName(e.gen), s.index, s.term)
	return writeFile(e.o.FS, e.o.Dir, durableFile, fmt.Sprintf("%s %016x\n", line, xxhash.Sum64String(line)))
}

func (e *Engine) checkDurable() error {
	path := e.o.FS.PathJoin(e.o.Dir, durableFile)
	text, err := readFile(e.o.FS, path)
	if isNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	var gen string
	var index, term, sum uint64
	n, err := fmt.Sscanf(text, "%s %d %d %x\n", &gen, &index, &term, &sum)
	line := fmt.Sprintf("%s %d %d", gen, index, term)
	if n != 4 || err != nil || text != fmt.Sprintf("%s %016x\n", line, xxhash.Sum64String(line)) {
		return &CorruptError{File: path, Detail: fmt.Sprintf("holds %q", text), Remedy: remedyReplace}
	}
	if have := e.Durable().Index; gen == generationName(e.gen) && have < index {
		return &CorruptError{File: e.o.FS.PathJoin(e.o.Dir, gen), Detail: fmt.Sprintf("holds the checkpoint of entry %d, though that of entry %d was made", have, index), Remedy: remedyReplace}
	}
	return nil
}

// createFirst creates the first generation and only then CURRENT: what a crash leaves in between has never
// held a checkpoint. A generation that has one is not thrown away for the lack of a pointer to it.
func (e *Engine) createFirst() (uint64, error) {
	fs := e.o.FS
	names, err := fs.List(e.o.Dir)
	if err != nil {
		return 0, fmt.Errorf("engine: listing %s: %w", e.o.Dir, err)
	}
	for _, name := range names {
		if _, ok := generationNumber(name); !ok {
			continue
		}
		if name != generationName(1) {
			return 0, &CorruptError{File: fs.PathJoin(e.o.Dir, currentFile), Detail: "missing, though " + name + " exists", Remedy: remedyReplace}
		}
		if err := e.openGeneration(1); err != nil {
			return 0, err
		}
		held := e.durable.Load()
		if err := e.closeStore(); err != nil {
			return 0, fmt.Errorf("engine: closing %s: %w", name, err)
		}
		if held != nil {
			return 0, &CorruptError{File: fs.PathJoin(e.o.Dir, currentFile), Detail: "missing, though " + name + " holds a checkpoint", Remedy: remedyReplace}
		}
		return 1, writeCurrent(fs, e.o.Dir, 1)
	}
	if err := e.openGeneration(1); err != nil {
		return 0, err
	}
	if err := e.closeStore(); err != nil {
		return 0, fmt.Errorf("engine: creating the store: %w", err)
	}
	if err := syncDir(fs, fs.PathJoin(e.o.Dir, generationName(1))); err != nil {
		return 0, err
	}
	return 1, writeCurrent(fs, e.o.Dir, 1)
}

// removeLeftovers removes what an install or export that was cut off has left.
func (e *Engine) removeLeftovers(current uint64) error {
	names, err := e.o.FS.List(e.o.Dir)
	if err != nil {
		return fmt.Errorf("engine: listing %s: %w", e.o.Dir, err)
	}
	for _, name := range names {
		n, isGen := generationNumber(name)
		if isGen && n != current || strings.HasPrefix(name, exportPrefix) {
			e.o.Logger.Info("removing what is left of an install or export", "name", name)
			if err := e.o.FS.RemoveAll(e.o.FS.PathJoin(e.o.Dir, name)); err != nil {
				return fmt.Errorf("engine: removing %s: %w", name, err)
			}
		}
	}
	return nil
}

// openGeneration opens a generation's store and loads its checkpoint.
func (e *Engine) openGeneration(gen uint64) error {
	db, err := pebble.Open(e.o.FS.PathJoin(e.o.Dir, generationName(gen)), e.pebbleOptions(false))
	if err != nil {
		return fmt.Errorf("engine: opening %s: %w", generationName(gen), err)
	}
	e.packs.close()
	e.db, e.gen = db, gen
	e.packs = newPacks(e.o.FS, e.o.FS.PathJoin(e.o.Dir, generationName(gen)), e.o.packBytes, newPackQueue(e.o.Spawn, e.fail))
	err = e.load()
	if err == nil {
		err = e.packs.removeUnlisted()
	}
	if err != nil {
		return errors.Join(err, e.closeStore())
	}
	return nil
}

// closeStore closes the files of the generation in use.
func (e *Engine) closeStore() error {
	e.packs.close()
	return e.db.Close()
}

func (e *Engine) pebbleOptions(readOnly bool) *pebble.Options {
	o := &pebble.Options{
		FS:                          manifestFS{e.o.FS},
		ReadOnly:                    readOnly,
		DisableWAL:                  true,
		FormatMajorVersion:          pebble.FormatNewest,
		CacheSize:                   e.o.CacheBytes,
		MemTableSize:                uint64(e.o.MemTableBytes),
		MemTableStopWritesThreshold: 4,
		L0CompactionThreshold:       4,
		L0StopWritesThreshold:       40,
		LBaseMaxBytes:               64 << 20,
		BytesPerSync:                256 << 10,
		FlushDelayDeleteRange:       10 * time.Second,
		CompactionConcurrencyRange:  func() (int, int) { return 1, 2 },
		Logger:                      pebbleLogger{e.o.Logger.Named("pebble"), e},
	}
	// Delayed messages are kept out of the tables that compactions rewrite, as the payloads in packs are. Nothing is compressed, which would cost every message more than the disk gains.
	o.Experimental.ValueSeparationPolicy = func() pebble.ValueSeparationPolicy {
		return pebble.ValueSeparationPolicy{Enabled: true, MinimumSize: 1 << 10, MaxBlobReferenceDepth: 10, RewriteMinimumAge: 5 * time.Minute, TargetGarbageRatio: 0.3}
	}
	for i := range o.Levels {
		o.Levels[i].Compression = func() *sstable.CompressionProfile { return sblock.NoCompression }
	}
	o.EventListener = &pebble.EventListener{
		BackgroundError: func(err error) { e.fail(fmt.Errorf("engine: the store failed in the background: %w", err)) },
		DataCorruption: func(info pebble.DataCorruptionInfo) {
			e.fail(&CorruptError{File: info.Path, Detail: fmt.Sprint(info.Details), Remedy: remedyReplace})
		},
	}
	return o
}

// manifestFS syncs the directory as soon as a manifest has been created in it. Pebble itself syncs it only
// after it has created the marker that names the new manifest; on a file system that may keep the one entry
// and lose the other, a power failure in between would leave a store that does not open.
type manifestFS struct{ vfs.FS }

// Create implements vfs.FS.
func (m manifestFS) Create(name string, category vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := m.FS.Create(name, category)
	if err != nil || !strings.HasPrefix(m.PathBase(name), "MANIFEST-") {
		return f, err
	}
	if err := syncDir(m.FS, m.PathDir(name)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// pebbleLogger passes on what Pebble logs. Pebble calls Fatalf where it cannot go on, for instance when its
// manifest cannot be written, and expects it not to return.
type pebbleLogger struct {
	l hclog.Logger
	e *Engine
}

// Infof implements pebble.Logger.
func (p pebbleLogger) Infof(format string, args ...any) {
	if p.l.IsTrace() {
		p.l.Trace(fmt.Sprintf(format, args...))
	}
}

// Errorf implements pebble.Logger.
func (p pebbleLogger) Errorf(format string, args ...any) { p.l.Error(fmt.Sprintf(format, args...)) }

// Fatalf implements pebble.Logger.
func (p pebbleLogger) Fatalf(format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	p.l.Error(msg)
	p.e.fail(errors.New("engine: the store cannot go on: " + msg))
	if p.e.o.fatal != nil {
		p.e.o.fatal()
	}
	panic("engine: the store cannot go on: " + msg)
}

// Close closes the store. What was applied after the last checkpoint is the log's to keep.
func (e *Engine) Close() error {
	e.cpMu.Lock()
	defer e.cpMu.Unlock()
	e.dbMu.Lock()
	defer e.dbMu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.db == nil {
		return nil
	}
	err := e.closeStore()
	e.db = nil
	e.failed.CompareAndSwap(nil, &failure{ErrClosed})
	if err != nil {
		return fmt.Errorf("engine: closing the store: %w", err)
	}
	return nil
}

// Export is a copy of a durable checkpoint, made by hard links, to be sent to another node.
type Export struct {
	// Meta is the checkpoint's place in the log.
	Meta Meta
	// Files are the copy's files in the order of their names.
	Files []ExportFile

	fs  vfs.FS
	dir string
}

// ExportFile is one file of an Export.
type ExportFile struct {
	Name string
	Size int64
}

// Export copies the durable checkpoint, making one first if there is none. Close deletes the copy. One export
// is open at a time, so that forgotten ones cannot fill the disk: an earlier one that was left open is deleted.
func (e *Engine) Export() (*Export, error) {
	e.cpMu.Lock()
	defer e.cpMu.Unlock()
	if err := e.Err(); err != nil {
		return nil, err
	}
	if e.durable.Load() == nil {
		if _, err := e.checkpoint(); err != nil {
			return nil, err
		}
	}
	fs := e.o.FS
	x := &Export{Meta: e.durable.Load().meta(), fs: fs, dir: fs.PathJoin(e.o.Dir, exportPrefix+"000001")}
	if err := fs.RemoveAll(x.dir); err != nil {
		return nil, fmt.Errorf("engine: removing an earlier export: %w", err)
	}
	if err := e.db.Checkpoint(x.dir); err != nil {
		return nil, fmt.Errorf("engine: exporting: %w", err)
	}
	sizes := make(map[string]int64)
	for i := range e.packs.durable {
		k := &e.packs.durable[i]
		name := packName(k.number)
		if err := fs.Link(e.packs.path(k.number), fs.PathJoin(x.dir, name)); err != nil {
			return nil, errors.Join(fmt.Errorf("engine: exporting: %w", err), x.Close())
		}
		sizes[name] = int64(k.listed)
	}
	names, err := fs.List(x.dir)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("engine: listing the export: %w", err), x.Close())
	}
	slices.Sort(names)
	for _, name := range names {
		st, err := fs.Stat(fs.PathJoin(x.dir, name))
		if err != nil {
			return nil, errors.Join(fmt.Errorf("engine: sizing the export: %w", err), x.Close())
		}
		size, ok := sizes[name]
		if !ok {
			size = st.Size()
		}
		x.Files = append(x.Files, ExportFile{Name: name, Size: size})
	}
	return x, nil
}

// Open opens one of the files for reading. It ends at the listed size, although a pack may have grown since.
func (x *Export) Open(name string) (io.ReadCloser, error) {
	i := slices.IndexFunc(x.Files, func(f ExportFile) bool { return f.Name == name })
	if i < 0 {
		return nil, fmt.Errorf("engine: %q is not part of the export", name)
	}
	f, err := x.fs.Open(x.fs.PathJoin(x.dir, name), vfs.SequentialReadsOption)
	if err != nil {
		return nil, fmt.Errorf("engine: opening %s: %w", name, err)
	}
	return exportReader{io.LimitReader(f, x.Files[i].Size), f}, nil
}

type exportReader struct {
	io.Reader
	io.Closer
}

// Close deletes the copy.
func (x *Export) Close() error {
	if err := x.fs.RemoveAll(x.dir); err != nil {
		return fmt.Errorf("engine: removing the export: %w", err)
	}
	return nil
}

// Install receives a checkpoint from another node into a new generation beside the one in use.
type Install struct {
	e    *Engine
	gen  uint64
	dir  string
	done bool
}

// BeginInstall makes an empty new generation. One install runs at a time: what is left of an earlier one is
// removed.
func (e *Engine) BeginInstall() (*Install, error) {
	e.cpMu.Lock()
	defer e.cpMu.Unlock()
	if e.installed != nil {
		return nil, errors.New("engine: an installed state has not been opened yet")
	}
	if err := e.removeGenerations(e.gen); err != nil {
		return nil, err
	}
	in := &Install{e: e, gen: e.gen + 1}
	in.dir = e.o.FS.PathJoin(e.o.Dir, generationName(in.gen))
	if err := mkdirSync(e.o.FS, in.dir); err != nil {
		return nil, err
	}
	return in, nil
}

func (e *Engine) removeGenerations(keep uint64) error {
	names, err := e.o.FS.List(e.o.Dir)
	if err != nil {
		return fmt.Errorf("engine: listing %s: %w", e.o.Dir, err)
	}
	for _, name := range names {
		if n, ok := generationNumber(name); ok && n != keep {
			if err := e.o.FS.RemoveAll(e.o.FS.PathJoin(e.o.Dir, name)); err != nil {
				return fmt.Errorf("engine: removing %s: %w", name, err)
			}
		}
	}
	return nil
}

// Create creates a file of the new generation. Closing it syncs it.
func (in *Install) Create(name string) (io.WriteCloser, error) {
	fs := in.e.o.FS
	if in.done {
		return nil, errors.New("engine: the install has ended")
	}
	if name == "" || name == "." || name == ".." || fs.PathBase(name) != name || strings.ContainsAny(name, `/\`) || strings.ContainsRune(name, 0) {
		return nil, fmt.Errorf("engine: %q is not a file name", name)
	}
	f, err := fs.Create(fs.PathJoin(in.dir, name), vfs.WriteCategoryUnspecified)
	if err != nil {
		return nil, fmt.Errorf("engine: creating %s: %w", name, err)
	}
	return syncedFile{f}, nil
}

type syncedFile struct{ vfs.File }

// Close implements io.Closer.
func (f syncedFile) Close() error { return errors.Join(f.Sync(), f.File.Close()) }

// Commit verifies that the new generation is whole (every block's checksum) and is the checkpoint m, makes
// it durable, and points CURRENT to it: from then on, also after a crash, that is the engine's state. Reopen
// opens it.
func (in *Install) Commit(m Meta) error {
	e := in.e
	e.cpMu.Lock()
	defer e.cpMu.Unlock()
	if in.done {
		return errors.New("engine: the install has ended")
	}
	s, err := in.verify(m)
	if err != nil {
		return err
	}
	fs := e.o.FS
	if err := syncDir(fs, in.dir); err != nil {
		return err
	}
	if err := writeCurrent(fs, e.o.Dir, in.gen); err != nil {
		return err
	}
	in.done = true
	e.installed = s
	e.durable.Store(s)
	return nil
}

// verify opens the new generation for reading and reads every row of it.
func (in *Install) verify(m Meta) (*state, error) {
	v := &Engine{o: in.e.o, keys: in.e.keys, failure: make(chan struct{})}
	v.o.OnFatal = nil
	db, err := pebble.Open(in.dir, v.pebbleOptions(true))
	if err != nil {
		return nil, fmt.Errorf("engine: the received state cannot be opened: %w", err)
	}
	v.db = db
	var s *state
	v.gen = in.gen
	v.packs = newPacks(v.o.FS, in.dir, v.o.packBytes, newPackQueue(v.o.Spawn, v.fail))
	check := func() (err error) {
		defer v.damaged(&err)
		if err := v.load(); err != nil {
			return err
		}
		if s = v.durable.Load(); s == nil || s.index != m.Index || s.term != m.Term {
			return fmt.Errorf("the received state is not the checkpoint of entry %d, term %d", m.Index, m.Term)
		}
		it, err := db.NewIter(nil)
		if err != nil {
			return err
		}
		for it.First(); it.Valid(); it.Next() {
			if _, err := it.ValueAndErr(); err != nil {
				return errors.Join(err, it.Close())
			}
		}
		if err := errors.Join(it.Error(), it.Close()); err != nil {
			return err
		}
		err = v.eachStored(func(b *block) error {
			if b.index > s.index {
				return nil // of an entry that the log brings again
			}
			_, err := v.packs.read(b.topic, b.base, b.at)
			return err
		})
		if err == nil {
			err = v.eachPart(func(key []byte, index uint64, at place) error {
				if index > s.index {
					return nil // the same
				}
				topic, _ := keyPart(key, 0)
				upload, _ := keyPart(key, 1)
				_, err := v.packs.read(topic, upload, at)
				return err
			})
		}
		return errors.Join(err, v.Err())
	}
	if err := errors.Join(check(), v.closeStore()); err != nil {
		return nil, fmt.Errorf("engine: verifying the received state: %w", err)
	}
	return s, nil
}

// Abort drops the new generation. After Commit it does nothing.
func (in *Install) Abort() error {
	e := in.e
	e.cpMu.Lock()
	defer e.cpMu.Unlock()
	if in.done {
		return nil
	}
	in.done = true
	if err := e.o.FS.RemoveAll(in.dir); err != nil {
		return fmt.Errorf("engine: removing an aborted install: %w", err)
	}
	return nil
}

// Reopen closes the generation in use and opens the one that Install.Commit switched to. No Apply may run.
func (e *Engine) Reopen() error {
	e.cpMu.Lock()
	defer e.cpMu.Unlock()
	gen, ok, err := readCurrent(e.o.FS, e.o.Dir)
	if err != nil {
		return err
	}
	if !ok {
		return &CorruptError{File: e.o.FS.PathJoin(e.o.Dir, currentFile), Detail: "missing", Remedy: remedyReplace}
	}
	e.dbMu.Lock()
	defer e.dbMu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.db != nil {
		if err := e.closeStore(); err != nil {
			e.o.Logger.Warn("closing the replaced state", "error", err)
		}
		e.db = nil
	}
	if err := e.openGeneration(gen); err != nil {
		e.fail(err)
		return err
	}
	e.installed = nil
	return e.removeGenerations(gen)
}

// readCurrent returns the generation CURRENT names; ok is false if there is no CURRENT.
func readCurrent(fs vfs.FS, dir string) (gen uint64, ok bool, err error) {
	path := fs.PathJoin(dir, currentFile)
	text, err := readFile(fs, path)
	if isNotExist(err) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	gen, ok = generationNumber(strings.TrimSuffix(text, "\n"))
	if !ok || text != generationName(gen)+"\n" {
		return 0, false, &CorruptError{File: path, Detail: fmt.Sprintf("holds %q", text), Remedy: remedyReplace}
	}
	if _, err := fs.Stat(fs.PathJoin(dir, generationName(gen))); isNotExist(err) {
		return 0, false, &CorruptError{File: path, Detail: "names " + generationName(gen) + ", which is not there", Remedy: remedyReplace}
	} else if err != nil {
		return 0, false, fmt.Errorf("engine: looking for %s: %w", generationName(gen), err)
	}
	return gen, true, nil
}

// writeCurrent points CURRENT to a generation.
func writeCurrent(fs vfs.FS, dir string, gen uint64) error {
	return writeFile(fs, dir, currentFile, generationName(gen)+"\n")
}

// readFile reads one of the small files.
func readFile(fs vfs.FS, path string) (string, error) {
	f, err := fs.Open(path)
	if err != nil {
		return "", fmt.Errorf("engine: opening %s: %w", path, err)
	}
	b, err := io.ReadAll(io.LimitReader(f, 256))
	if err = errors.Join(err, f.Close()); err != nil {
		return "", fmt.Errorf("engine: reading %s: %w", path, err)
	}
	return string(b), nil
}

// writeFile replaces one of the small files as a whole: written aside, synced, renamed, the directory synced.
func writeFile(fs vfs.FS, dir, name, text string) error {
	tmp := fs.PathJoin(dir, name+".new")
	f, err := fs.Create(tmp, vfs.WriteCategoryUnspecified)
	if err != nil {
		return fmt.Errorf("engine: creating %s: %w", tmp, err)
	}
	_, err = f.Write([]byte(text))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("engine: writing %s: %w", tmp, err)
	}
	if err := fs.Rename(tmp, fs.PathJoin(dir, name)); err != nil {
		return fmt.Errorf("engine: replacing %s: %w", name, err)
	}
	return syncDir(fs, dir)
}

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }

func syncDir(fs vfs.FS, dir string) error {
	d, err := fs.OpenDir(dir)
	if err != nil {
		return fmt.Errorf("engine: opening %s: %w", dir, err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("engine: syncing %s: %w", dir, err)
	}
	return nil
}

// mkdirSync makes a directory and its missing parents, and syncs every directory that gained an entry.
func mkdirSync(fs vfs.FS, dir string) error {
	var missing []string
	for p := dir; ; p = fs.PathDir(p) {
		if _, err := fs.Stat(p); err == nil || fs.PathDir(p) == p {
			missing = append(missing, p)
			break
		}
		missing = append(missing, p)
	}
	if err := fs.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("engine: creating %s: %w", dir, err)
	}
	for i := len(missing) - 1; i > 0; i-- {
		if err := syncDir(fs, missing[i]); err != nil {
			return err
		}
	}
	return nil
}
