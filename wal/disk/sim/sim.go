// Package sim is a disk in memory that behaves as badly as a real one may under the contract of package disk. A power
// loss (Crash) keeps of the writes that were not synced none, all, or any sectors, tears blocks that were being
// written, and undoes names whose directory was not synced. Any operation can be made to fail or to be the last one.
// The disk can be slow, full, or frozen. All of it follows from a seed and the order of the operations.
//
//	d := sim.New(seed, sim.Options{})
//	... run on d ...
//	d = d.Crash()   // the power fails: d is dead, the new disk is what the next start finds
package sim

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"sort"
	"sync"
	"syscall"
	"time"

	"tercet.dev/tercet/wal/disk"
)

// ErrCrashed is what operations on a disk without power return, unless they hang.
var ErrCrashed = errors.New("sim: the disk has lost power")

// ErrInjected is what an operation chosen by FailAt returns when no other error was given.
var ErrInjected = fmt.Errorf("sim: injected fault: %w", syscall.EIO)

// Keep says what a power loss leaves of the writes and names that were not synced.
type Keep uint8

const (
	// KeepRandom decides anew at each crash, for each file and for the names, among all that may happen.
	KeepRandom Keep = iota
	// KeepNone loses everything that was not synced.
	KeepNone
	// KeepAll loses nothing, as if the process had been killed and the power had stayed.
	KeepAll
)

// Options configure a disk.
type Options struct {
	// Keep says what power losses leave behind.
	Keep Keep
	// Hang makes operations on a dead disk block until Release instead of returning ErrCrashed: a node without power
	// says nothing any more, and hashicorp/raft panics when saving its term fails.
	Hang bool
	// Capacity bounds the bytes of all files; 0 is unlimited.
	Capacity int64
	// NoDirect makes direct I/O unavailable.
	NoDirect bool
	// NoTear never damages the blocks around an unsynced write; sectors are then old or new.
	NoTear bool
}

const (
	sectorSize = 512
	blockSize  = disk.BlockSize
)

// Disk is a simulated disk. It implements disk.FS.
type Disk struct {
	opts Options
	seed uint64

	mu      sync.Mutex
	rng     *rand.Rand
	names   map[string]*node
	dirs    map[string]bool
	durable map[string]*node // names as of the last SyncDir
	dirOps  []dirOp          // names changed since
	locks   map[string]bool
	used    int64

	ops     int
	kinds   map[string]int
	failAt  int // number of the operation that fails; 0: none
	failErr error
	crashAt int // number of the operation during which the power fails; 0: none
	failed  string

	dead     bool
	deadCh   chan struct{} // closed when the power fails
	released chan struct{} // closed by Release
	thawed   chan struct{} // closed while not frozen
	latency  func() time.Duration
}

// node is a file, independent of its names.
type node struct {
	data    []byte  // what a reader sees
	durable []byte  // what survives for certain
	pending []write // unsynced writes, in order
}

type write struct {
	off  int64
	data []byte
}

// dirOp is a change of names that is not durable.
type dirOp struct {
	dir      string
	from, to string // from is empty for a creation, to for a removal
	node     *node
}

// New returns an empty disk.
func New(seed uint64, o Options) *Disk {
	d := &Disk{
		opts: o, seed: seed, rng: rand.New(rand.NewPCG(seed, 0x7465726365740001)),
		names: make(map[string]*node), durable: make(map[string]*node), dirs: make(map[string]bool),
	}
	d.reset()
	return d
}

func (d *Disk) reset() {
	d.locks = make(map[string]bool)
	d.kinds = make(map[string]int)
	d.deadCh = make(chan struct{})
	d.released = make(chan struct{})
	d.thawed = make(chan struct{})
	close(d.thawed)
}

// Seed returns the seed of the disk, for messages.
func (d *Disk) Seed() uint64 { return d.seed }

// SetSyncLatency makes each Sync and SyncDir take what fn returns; nil is no time.
func (d *Disk) SetSyncLatency(fn func() time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.latency = fn
}

// Freeze makes writes and syncs wait until Thaw, or until the power fails.
func (d *Disk) Freeze() {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case <-d.thawed:
		d.thawed = make(chan struct{})
	default:
	}
}

// Thaw ends Freeze.
func (d *Disk) Thaw() {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case <-d.thawed:
	default:
		close(d.thawed)
	}
}

// Ops returns how many operations the disk has been asked for.
func (d *Disk) Ops() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ops
}

// OpsByKind returns how many operations of each kind the disk has been asked for.
func (d *Disk) OpsByKind() map[string]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make(map[string]int, len(d.kinds))
	for k, v := range d.kinds {
		out[k] = v
	}
	return out
}

// FailAt makes the n-th operation from now on fail with err, or with ErrInjected if err is nil. A write that fails is
// done in part. A sync that fails leaves some of the writes undone for good, though reading shows them and a second
// sync succeeds, as Linux does it.
func (d *Disk) FailAt(n int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil {
		err = ErrInjected
	}
	d.failAt, d.failErr = d.ops+n, err
}

// Failed names the operation that FailAt made fail, empty if it has not come to that.
func (d *Disk) Failed() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failed
}

// CrashAt lets the power fail during the n-th operation from now on.
func (d *Disk) CrashAt(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.crashAt = d.ops + n
}

// Crashed reports whether the power has failed.
func (d *Disk) Crashed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.dead
}

// SetCapacity changes the capacity; 0 is unlimited.
func (d *Disk) SetCapacity(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.opts.Capacity = n
}

// Release lets the operations that hang on a dead disk return ErrCrashed, so that their goroutines can end.
func (d *Disk) Release() {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case <-d.released:
	default:
		close(d.released)
	}
}

// die ends the power. Called with mu.
func (d *Disk) die() {
	if !d.dead {
		d.dead = true
		close(d.deadCh)
	}
}

// Crash is a power loss: this disk is dead, and the one returned is what the next start finds. If the power has
// failed already (CrashAt), it only returns what is found; each further call may find something else.
func (d *Disk) Crash() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.die()
	return d.next(d.opts.Keep, false)
}

// Kill is the death of the process alone: this disk is dead, and the one returned shows everything that was written,
// though what was not synced may still be lost when the power fails.
func (d *Disk) Kill() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.die()
	return d.next(d.opts.Keep, true)
}

// Clone returns an independent copy of a disk, unsynced writes included.
func (d *Disk) Clone() *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.next(d.opts.Keep, true)
}

// next builds the disk that is found later. Called with mu.
func (d *Disk) next(keep Keep, cached bool) *Disk {
	seed := d.rng.Uint64()
	n := &Disk{
		opts: d.opts, seed: seed, rng: rand.New(rand.NewPCG(seed, 0x7465726365740001)),
		names: make(map[string]*node), durable: make(map[string]*node), dirs: make(map[string]bool),
	}
	n.reset()
	for dir := range d.dirs {
		n.dirs[dir] = true
	}
	copies := make(map[*node]*node)
	if cached {
		clone := func(old *node) *node {
			if c := copies[old]; c != nil {
				return c
			}
			c := &node{data: append([]byte(nil), old.data...), durable: append([]byte(nil), old.durable...)}
			c.pending = append(c.pending, old.pending...) // their bytes are never modified
			copies[old] = c
			return c
		}
		for name, old := range d.names {
			n.names[name] = clone(old)
		}
		for name, old := range d.durable {
			n.durable[name] = clone(old)
		}
		for _, op := range d.dirOps {
			op.node = clone(op.node)
			n.dirOps = append(n.dirOps, op)
		}
		n.used = d.used
		return n
	}
	names := make(map[string]*node, len(d.durable))
	for name, old := range d.durable {
		names[name] = old
	}
	d.keepNames(names, keep)
	sorted := make([]string, 0, len(names))
	for name := range names {
		sorted = append(sorted, name)
	}
	sort.Strings(sorted)
	for _, name := range sorted {
		old := names[name]
		c := copies[old]
		if c == nil {
			content := d.keepWrites(old, keep)
			c = &node{data: content, durable: append([]byte(nil), content...)}
			copies[old] = c
			n.used += int64(len(content))
		}
		n.names[name], n.durable[name] = c, c
	}
	return n
}

// keepNames applies those changes of names that survive.
func (d *Disk) keepNames(names map[string]*node, keep Keep) {
	ops := d.dirOps
	each := false
	switch keep {
	case KeepNone:
		ops = nil
	case KeepAll:
	case KeepRandom:
		switch d.rng.IntN(4) {
		case 0:
			ops = nil
		case 1:
		case 2: // a journal: the first ones
			ops = ops[:d.rng.IntN(len(ops)+1)]
		case 3: // no order between them
			each = true
		}
	}
	for _, op := range ops {
		if each && d.rng.IntN(2) == 0 {
			continue
		}
		switch {
		case op.from == "":
			names[op.to] = op.node
		case names[op.from] != op.node:
			// What it was to act upon did not survive.
		case op.to == "":
			delete(names, op.from)
		default:
			delete(names, op.from)
			names[op.to] = op.node
		}
	}
}

// keepWrites returns the content of a file after a power loss.
func (d *Disk) keepWrites(f *node, keep Keep) []byte {
	out := append([]byte(nil), f.durable...)
	if len(f.pending) == 0 || keep == KeepNone {
		return out
	}
	pending := f.pending
	how := 1
	if keep == KeepRandom {
		how = d.rng.IntN(6)
	}
	switch how {
	case 0:
		return out
	case 1: // all of it
		for _, w := range pending {
			out = apply(out, w.off, w.data)
		}
		return out
	case 2: // whole writes, in order
		for _, w := range pending[:d.rng.IntN(len(pending)+1)] {
			out = apply(out, w.off, w.data)
		}
		return out
	}
	// Sectors, each for itself.
	odds := [...]int{1, 2, 9}[d.rng.IntN(3)]
	for _, w := range pending {
		for at := int64(0); at < int64(len(w.data)); {
			n := min(sectorSize-(w.off+at)%sectorSize, int64(len(w.data))-at)
			if d.rng.IntN(odds+1) > 0 {
				out = apply(out, w.off+at, w.data[at:at+n])
			}
			at += n
		}
	}
	if how == 5 && !d.opts.NoTear {
		d.tear(f, pending, out)
	}
	return out
}

// tear damages some of the blocks that were being written.
func (d *Disk) tear(f *node, pending []write, out []byte) {
	for range 1 + d.rng.IntN(3) {
		w := pending[len(pending)-1-d.rng.IntN(min(len(pending), 3))]
		if len(w.data) == 0 {
			continue
		}
		unit := int64(blockSize)
		if d.rng.IntN(2) == 0 {
			unit = sectorSize
		}
		start := (w.off + d.rng.Int64N(int64(len(w.data)))) / unit * unit
		if start >= int64(len(out)) {
			continue
		}
		piece := out[start:min(start+unit, int64(len(out)))]
		switch d.rng.IntN(3) {
		case 0:
			clear(piece)
		case 1:
			for i := range piece {
				piece[i] = byte(d.rng.Uint32())
			}
		case 2: // partly as it was before
			cut := d.rng.IntN(len(piece))
			if start+int64(len(piece)) <= int64(len(f.durable)) {
				copy(piece[cut:], f.durable[start+int64(cut):])
			} else {
				clear(piece[cut:])
			}
		}
	}
}

func apply(b []byte, off int64, data []byte) []byte {
	if need := off + int64(len(data)); need > int64(len(b)) {
		if need <= int64(cap(b)) {
			b = b[:need]
		} else {
			grown := make([]byte, need, need+need/2)
			copy(grown, b)
			b = grown
		}
	}
	copy(b[off:], data)
	return b
}

// verdict is what becomes of an operation.
type verdict uint8

const (
	proceed verdict = iota
	fails           // do it in part, then return the injected error
	crashes         // do it unsynced, then the power is gone
)

// begin counts an operation and decides about it. It returns with mu held unless it returns an error.
func (d *Disk) begin(kind string, waits bool) (verdict, error) {
	d.mu.Lock()
	for waits && !d.dead {
		thawed, dead := d.thawed, d.deadCh
		select {
		case <-thawed:
			waits = false
		default:
			d.mu.Unlock()
			select {
			case <-thawed:
			case <-dead:
			}
			d.mu.Lock()
		}
	}
	if d.dead {
		return 0, d.deadLocked()
	}
	d.ops++
	d.kinds[kind]++
	if d.ops == d.crashAt {
		return crashes, nil
	}
	if d.ops == d.failAt {
		d.failed = kind
		return fails, nil
	}
	return proceed, nil
}

// deadLocked is what an operation on a dead disk comes to. Called with mu, which it releases.
func (d *Disk) deadLocked() error {
	hang, released := d.opts.Hang, d.released
	d.mu.Unlock()
	if hang {
		<-released
	}
	return ErrCrashed
}

// finish ends an operation that begin let through: it releases mu and turns the verdict into an error.
func (d *Disk) finish(v verdict) error {
	switch v {
	case crashes:
		d.die()
		return d.deadLocked()
	case fails:
		err := d.failErr
		d.mu.Unlock()
		return err
	default:
		d.mu.Unlock()
		return nil
	}
}

// sleep lets a sync take its time. A power loss ends it.
func (d *Disk) sleep() {
	d.mu.Lock()
	fn, dead := d.latency, d.deadCh
	d.mu.Unlock()
	if fn == nil {
		return
	}
	if t := fn(); t > 0 {
		timer := time.NewTimer(t)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-dead:
		}
	}
}

func pathError(op, name string, err error) error {
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// Create implements disk.FS.
func (d *Disk) Create(name string, mode disk.Mode) (disk.File, error) {
	name = filepath.Clean(name)
	v, err := d.begin("create", false)
	if err != nil {
		return nil, err
	}
	if v == fails {
		return nil, d.finish(v)
	}
	if d.names[name] != nil {
		d.mu.Unlock()
		return nil, pathError("create", name, fs.ErrExist)
	}
	if !d.dirs[filepath.Dir(name)] {
		d.mu.Unlock()
		return nil, pathError("create", name, fs.ErrNotExist)
	}
	f := &node{}
	d.names[name] = f
	d.dirOps = append(d.dirOps, dirOp{dir: filepath.Dir(name), to: name, node: f})
	return d.open(f, name, mode), d.finish(v)
}

// Open implements disk.FS.
func (d *Disk) Open(name string, mode disk.Mode) (disk.File, error) {
	name = filepath.Clean(name)
	v, err := d.begin("open", false)
	if err != nil {
		return nil, err
	}
	f := d.names[name]
	if err := d.finish(v); err != nil {
		return nil, err
	}
	if f == nil {
		return nil, pathError("open", name, fs.ErrNotExist)
	}
	return d.open(f, name, mode), nil
}

func (d *Disk) open(f *node, name string, mode disk.Mode) disk.File {
	return &file{d: d, node: f, name: name, mode: mode}
}

// Rename implements disk.FS.
func (d *Disk) Rename(from, to string) error {
	from, to = filepath.Clean(from), filepath.Clean(to)
	v, err := d.begin("rename", false)
	if err != nil {
		return err
	}
	if v == fails {
		return d.finish(v)
	}
	f := d.names[from]
	if f == nil {
		d.mu.Unlock()
		return pathError("rename", from, fs.ErrNotExist)
	}
	if old := d.names[to]; old != nil && old != f {
		d.used -= int64(len(old.data))
	}
	delete(d.names, from)
	d.names[to] = f
	d.dirOps = append(d.dirOps, dirOp{dir: filepath.Dir(to), from: from, to: to, node: f})
	return d.finish(v)
}

// Remove implements disk.FS.
func (d *Disk) Remove(name string) error {
	name = filepath.Clean(name)
	v, err := d.begin("remove", false)
	if err != nil {
		return err
	}
	if v == fails {
		return d.finish(v)
	}
	f := d.names[name]
	if f == nil {
		d.mu.Unlock()
		return pathError("remove", name, fs.ErrNotExist)
	}
	d.used -= int64(len(f.data))
	delete(d.names, name)
	d.dirOps = append(d.dirOps, dirOp{dir: filepath.Dir(name), from: name, node: f})
	return d.finish(v)
}

// List implements disk.FS.
func (d *Disk) List(dir string) ([]string, error) {
	dir = filepath.Clean(dir)
	v, err := d.begin("list", false)
	if err != nil {
		return nil, err
	}
	exists := d.dirs[dir]
	names := d.in(dir)
	if err := d.finish(v); err != nil {
		return nil, err
	}
	if !exists {
		return nil, pathError("list", dir, fs.ErrNotExist)
	}
	return names, nil
}

// in returns the base names in a directory, sorted. Called with mu.
func (d *Disk) in(dir string) []string {
	var names []string
	for name := range d.names {
		if filepath.Dir(name) == dir {
			names = append(names, filepath.Base(name))
		}
	}
	sort.Strings(names)
	return names
}

// MkdirAll implements disk.FS. Directories are durable at once.
func (d *Disk) MkdirAll(dir string) error {
	dir = filepath.Clean(dir)
	v, err := d.begin("mkdir", false)
	if err != nil {
		return err
	}
	if v != fails {
		for ; !d.dirs[dir]; dir = filepath.Dir(dir) {
			d.dirs[dir] = true
		}
	}
	return d.finish(v)
}

// SyncDir implements disk.FS.
func (d *Disk) SyncDir(dir string) error {
	dir = filepath.Clean(dir)
	d.sleep()
	v, err := d.begin("syncdir", true)
	if err != nil {
		return err
	}
	if v == proceed {
		kept := d.dirOps[:0:0]
		for _, op := range d.dirOps {
			if op.dir != dir {
				kept = append(kept, op)
				continue
			}
			if op.from != "" && d.durable[op.from] == op.node {
				delete(d.durable, op.from)
			}
			if op.to != "" {
				d.durable[op.to] = op.node
			}
		}
		d.dirOps = kept
	}
	return d.finish(v)
}

// Lock implements disk.FS. Locks end with the power.
func (d *Disk) Lock(name string) (io.Closer, error) {
	name = filepath.Clean(name)
	v, err := d.begin("lock", false)
	if err != nil {
		return nil, err
	}
	if v == proceed && d.locks[name] {
		d.mu.Unlock()
		return nil, fmt.Errorf("%w: %s", disk.ErrLocked, name)
	}
	if v == proceed {
		d.locks[name] = true
	}
	if err := d.finish(v); err != nil {
		return nil, err
	}
	return unlocker(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.locks, name)
	}), nil
}

type unlocker func()

func (u unlocker) Close() error {
	u()
	return nil
}

// unlimited is what a disk without a capacity reports as free.
const unlimited = 1 << 40

// Free implements disk.FS.
func (d *Disk) Free(string) (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.opts.Capacity == 0 {
		return unlimited, nil
	}
	return max(d.opts.Capacity-d.used, 0), nil
}

// DirectWorks implements disk.FS.
func (d *Disk) DirectWorks(string) bool { return !d.opts.NoDirect }

// file is an open file.
type file struct {
	d      *Disk
	node   *node
	name   string
	mode   disk.Mode
	closed bool
}

func (f *file) ReadAt(p []byte, off int64) (int, error) {
	v, err := f.d.begin("read", false)
	if err != nil {
		return 0, err
	}
	n := 0
	if off < int64(len(f.node.data)) {
		n = copy(p, f.node.data[off:])
	}
	closed := f.closed
	if err := f.d.finish(v); err != nil {
		return 0, err
	}
	switch {
	case closed:
		return 0, pathError("read", f.name, fs.ErrClosed)
	case n < len(p):
		return n, io.EOF
	}
	return n, nil
}

func (f *file) WriteAt(p []byte, off int64) (int, error) {
	d := f.d
	v, err := d.begin("write", true)
	if err != nil {
		return 0, err
	}
	switch {
	case f.closed:
		d.mu.Unlock()
		return 0, pathError("write", f.name, fs.ErrClosed)
	case f.mode == disk.ReadOnly, f.mode == disk.Direct && !disk.IsAligned(p, off):
		d.mu.Unlock()
		return 0, pathError("write", f.name, syscall.EINVAL)
	}
	n := len(p)
	if v == fails {
		n = d.rng.IntN(len(p) + 1)
	}
	if grow := off + int64(n) - int64(len(f.node.data)); grow > 0 {
		if d.opts.Capacity > 0 && d.used+grow > d.opts.Capacity {
			d.mu.Unlock()
			return 0, pathError("write", f.name, syscall.ENOSPC)
		}
		d.used += grow
	}
	data := append([]byte(nil), p[:n]...)
	f.node.data = apply(f.node.data, off, data)
	f.node.pending = append(f.node.pending, write{off, data})
	if err := d.finish(v); err != nil {
		return n, err
	}
	return n, nil
}

func (f *file) Sync() error {
	d := f.d
	d.sleep()
	v, err := d.begin("sync", true)
	if err != nil {
		return err
	}
	if f.closed {
		d.mu.Unlock()
		return pathError("sync", f.name, fs.ErrClosed)
	}
	if v == proceed || v == fails {
		for _, w := range f.node.pending {
			if v == proceed || d.rng.IntN(2) == 0 {
				f.node.durable = apply(f.node.durable, w.off, w.data)
			}
		}
		f.node.pending = nil
	}
	return d.finish(v)
}

func (f *file) Size() (int64, error) {
	v, err := f.d.begin("size", false)
	if err != nil {
		return 0, err
	}
	n := int64(len(f.node.data))
	return n, f.d.finish(v)
}

func (f *file) Close() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.closed = true
	return nil
}

// Names returns the names of all files, sorted.
func (d *Disk) Names() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	names := make([]string, 0, len(d.names))
	for name := range d.names {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

// ReadFile returns a copy of a file's content, nil if there is none.
func (d *Disk) ReadFile(name string) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.names[filepath.Clean(name)]
	if f == nil {
		return nil
	}
	return append([]byte(nil), f.data...)
}

// WriteFile replaces a file's content behind everybody's back, durably: bit rot, or an operator.
func (d *Disk) WriteFile(name string, content []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name = filepath.Clean(name)
	for dir := filepath.Dir(name); !d.dirs[dir]; dir = filepath.Dir(dir) {
		d.dirs[dir] = true
	}
	if old := d.names[name]; old != nil {
		d.used -= int64(len(old.data))
	}
	f := &node{data: append([]byte(nil), content...), durable: append([]byte(nil), content...)}
	d.names[name], d.durable[name] = f, f
	d.used += int64(len(content))
}

// FlipBit flips one bit of a file, durably, in place.
func (d *Disk) FlipBit(name string, bit int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.names[filepath.Clean(name)]
	f.data[bit/8] ^= 1 << (bit % 8)
	if bit/8 < int64(len(f.durable)) {
		f.durable[bit/8] ^= 1 << (bit % 8)
	}
}

// RemoveFile makes a file vanish, durably.
func (d *Disk) RemoveFile(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	name = filepath.Clean(name)
	if f := d.names[name]; f != nil {
		d.used -= int64(len(f.data))
	}
	delete(d.names, name)
	delete(d.durable, name)
}
