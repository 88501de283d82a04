package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// Payloads stand in packs: files beside Pebble's that are only appended to, a chunk at a time. A block's header says
// where its payload is. A pack goes when its last message has expired; one of which less than a quarter is alive is
// rewritten at a checkpoint. The parts of large messages stand in packs of their own, which nothing but rewriting removes: a part
// is written before anybody knows how long its message lives.
//
// A pack is written and synced before the checkpoint that lists it is committed, and what is listed is read up to the
// listed size only: what stands behind that, and packs that are not listed, are of entries that the log brings again.

const (
	packPrefix = "pack-"
	// packHead stands before every payload: checksum of what follows u64, topic u64, base offset u64, length u32, all
	// little endian.
	packHead = 8 + 8 + 8 + 4
	// packBytes is where a pack ends and the next begins.
	packBytes = 64 << 20
	// packHandles is how many packs are open for reading at most.
	packHandles = 64
	// packLookMillis is how long at least, in cluster time, lies between two looks for what explicit removals have left.
	packLookMillis = 60_000
)

func packName(n uint64) string { return fmt.Sprintf("%s%06d", packPrefix, n) }

func packNumber(name string) (uint64, bool) {
	digits, ok := strings.CutPrefix(name, packPrefix)
	if !ok || len(digits) < 6 {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	return n, err == nil && packName(n) == name
}

// pack is what is known of one of the files.
type pack struct {
	number uint64
	size   uint64
	expiry int64  // when the last of its messages expires: never for parts
	listed uint64 // the size that its row tells
	parts  bool   // holds parts of large messages
}

func (k *pack) appendRow(b []byte) []byte {
	b = append(b, rowVersion, flags(k.parts))
	b = binary.AppendUvarint(b, k.size)
	return appendVarint(b, k.expiry)
}

func parsePack(number uint64, row []byte) (*pack, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return nil, rowError(rowPack, v)
	}
	k := &pack{number: number, parts: r.flags(1) != 0, size: r.uvarint(), expiry: r.varint()}
	k.listed = k.size
	return k, r.err()
}

// place is where a block's payload stands. Nothing stands at length 0: for references, and for blocks in which nothing was
// alive when their pack was rewritten.
type place struct {
	pack, offset uint64
	length       uint32
}

func (at place) append(b []byte) []byte {
	b = binary.AppendUvarint(b, at.pack)
	b = binary.AppendUvarint(b, at.offset)
	return binary.AppendUvarint(b, uint64(at.length))
}

func (r *reader) place() place {
	return place{pack: r.uvarint(), offset: r.uvarint(), length: uint32(r.upTo(1<<32 - 1))}
}

// packWriter appends to one pack.
type packWriter struct {
	*pack
	q *packQueue
	packPart
}

// add puts a block's payload behind what was added before and says where it stands.
func (w *packWriter) add(b *block, payload func(dst []byte) []byte) place {
	w.expiry = max(w.expiry, b.lastExpiry)
	return w.append(b.topic, b.base, int(b.bytes), payload)
}

// append is add for anything that has a topic and a number there.
func (w *packWriter) append(topic, base uint64, size int, payload func(dst []byte) []byte) place {
	if room := packHead + 16 + size; cap(w.buf)-len(w.buf) < room {
		grown := w.q.buffer(max(len(w.buf)+room, packChunk+packChunk/4))
		w.buf = append(grown, w.buf...)
	}
	at := len(w.buf)
	buf := append(w.buf, make([]byte, packHead)...)
	buf = payload(buf)
	head := buf[at:]
	length := uint32(len(head) - packHead)
	binary.LittleEndian.PutUint64(head[8:], topic)
	binary.LittleEndian.PutUint64(head[16:], base)
	binary.LittleEndian.PutUint32(head[24:], length)
	binary.LittleEndian.PutUint64(head, xxhash.Sum64(head[8:]))
	w.buf = buf
	w.size = w.start + uint64(len(buf))
	return place{pack: w.number, offset: w.start + uint64(at), length: length}
}

// write has what was added written, if it is a chunk by now or has to be on its way.
func (w *packWriter) write(now bool) error {
	if len(w.buf) == 0 || !now && len(w.buf) < packChunk {
		return nil
	}
	c := w.packPart
	w.start += uint64(alignUp(len(w.buf)))
	w.size, w.buf = w.start, nil
	return w.q.hand(c)
}

// packs are the packs of one generation.
type packs struct {
	fs    vfs.FS
	dir   string
	limit uint64
	queue *packQueue

	// Guarded by Engine.mu.

	list map[uint64]*pack
	// cur takes the payloads of blocks, parts the parts of large messages.
	cur, parts *packWriter
	// sealed are files to which nothing is added any more and that were not synced yet, made tells that the directory was not.
	sealed []vfs.File
	made   bool
	last   uint64 // the highest number in use
	// What tells when to look again at what is alive.
	blocksGrown, partsGrown growth

	// Guarded by Engine.cpMu.

	durable []pack // those that the durable checkpoint lists

	// mu guards the files open for reading. It is held while one is read, so that none is closed meanwhile.
	mu   sync.RWMutex
	open map[uint64]vfs.File
}

// growth is what happened since the last look at what is alive.
type growth struct {
	appended uint64 // bytes
	loosened bool   // something was removed that does not go by itself
	looked   int64  // cluster time of that look
}

// due reports whether to look again, and takes that as done. total is what is stored.
func (g *growth) due(limit, total uint64, now int64) bool {
	if g.appended < max(limit, total/4) && (!g.loosened || now < g.looked+packLookMillis) {
		return false
	}
	*g = growth{looked: now}
	return true
}

func newPacks(fs vfs.FS, dir string, limit int64, queue *packQueue) *packs {
	return &packs{fs: fs, dir: dir, limit: uint64(limit), queue: queue, list: make(map[uint64]*pack), open: make(map[uint64]vfs.File)}
}

func (p *packs) path(number uint64) string { return p.fs.PathJoin(p.dir, packName(number)) }

// create begins a new pack, of parts or of blocks.
func (p *packs) create(parts bool) (*packWriter, error) {
	p.last++
	f, err := p.fs.Create(p.path(p.last), vfs.WriteCategoryUnspecified)
	if err != nil {
		return nil, fmt.Errorf("creating %s: %w", packName(p.last), err)
	}
	p.made = true
	k := &pack{number: p.last, parts: parts}
	if parts {
		k.expiry = never
	}
	p.list[k.number] = k
	return &packWriter{pack: k, q: p.queue, packPart: packPart{f: openPast(f), pack: k.number}}, nil
}

// throughCache has the system begin to write what it is given, so that a checkpoint finds little left to do.
func throughCache(f vfs.File) vfs.File {
	return cachedFile{vfs.NewSyncingFile(f, vfs.SyncingFileOptions{NoSyncOnClose: true, BytesPerSync: packChunk})}
}

// cachedFile writes a copy: a vfs.File may change what it is given, and readers look at it meanwhile.
type cachedFile struct{ vfs.File }

func (f cachedFile) Write(b []byte) (int, error) { return f.File.Write(slices.Clone(b)) }

// begin makes sure that w, for parts or for blocks, is a pack with room.
func (p *packs) begin(w **packWriter, parts bool) (err error) {
	if *w != nil && (*w).size >= p.limit {
		err = p.seal(w)
	}
	if err == nil && *w == nil {
		*w, err = p.create(parts)
	}
	return err
}

// seal ends a pack.
func (p *packs) seal(w **packWriter) error {
	err := (*w).write(true)
	p.sealed = append(p.sealed, (*w).f)
	*w = nil
	return err
}

// endParts is called when an entry's parts were added. They are large enough to be written at once.
func (p *packs) endParts() error { return p.parts.write(true) }

// end is called when an entry's payloads were added.
func (p *packs) end() error {
	if err := p.cur.write(false); err != nil {
		return err
	}
	return p.queue.show(p.cur.packPart)
}

// close closes all files, without writing or syncing the rest: what is not synced is not listed.
func (p *packs) close() {
	if p == nil {
		return
	}
	p.queue.idle()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range p.sealed {
		_ = f.Close()
	}
	for _, w := range []*packWriter{p.cur, p.parts} {
		if w != nil {
			_ = w.f.Close()
		}
	}
	for _, f := range p.open {
		_ = f.Close() // read only
	}
	p.sealed, p.cur, p.parts, p.open = nil, nil, nil, nil
}

// load notes a listed pack.
func (p *packs) load(number uint64, row []byte) error {
	k, err := parsePack(number, row)
	if err != nil {
		return err
	}
	st, err := p.fs.Stat(p.path(number))
	switch {
	case isNotExist(err):
		return &CorruptError{File: p.path(number), Detail: "missing", Remedy: remedyReplace}
	case err != nil:
		return fmt.Errorf("engine: looking for %s: %w", packName(number), err)
	case st.Size() < int64(k.size):
		return &CorruptError{File: p.path(number), Detail: fmt.Sprintf("has %d bytes of %d", st.Size(), k.size), Remedy: remedyReplace}
	}
	p.list[number] = k
	p.last = max(p.last, number)
	p.durable = append(p.durable, *k)
	return nil
}

// removeUnlisted removes the packs of entries that the log brings again.
func (p *packs) removeUnlisted() error {
	names, err := p.fs.List(p.dir)
	if err != nil {
		return fmt.Errorf("engine: listing %s: %w", p.dir, err)
	}
	for _, name := range names {
		n, ok := packNumber(name)
		if !ok || p.list[n] != nil {
			continue
		}
		p.last = max(p.last, n)
		if err := p.fs.Remove(p.path(n)); err != nil {
			return fmt.Errorf("engine: removing %s: %w", name, err)
		}
	}
	return nil
}

// errPackGone is returned for a pack that was removed since its place was looked up.
var errPackGone = errors.New("engine: the pack is gone")

// read returns the payload of a block.
func (p *packs) read(topic, base uint64, at place) ([]byte, error) {
	buf := make([]byte, packHead+int(at.length))
	if p.queue.read(at, buf) {
		return buf[packHead:], nil
	}
	if err := p.readAt(at.pack, buf, int64(at.offset)); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, &CorruptError{File: p.path(at.pack), Detail: fmt.Sprintf("ends before byte %d", at.offset+uint64(len(buf))), Remedy: remedyReplace}
		}
		return nil, err
	}
	if xxhash.Sum64(buf[8:]) != binary.LittleEndian.Uint64(buf) || binary.LittleEndian.Uint64(buf[8:]) != topic ||
		binary.LittleEndian.Uint64(buf[16:]) != base || binary.LittleEndian.Uint32(buf[24:]) != at.length {
		return nil, &CorruptError{File: p.path(at.pack), Detail: fmt.Sprintf("the block at byte %d is damaged", at.offset), Remedy: remedyReplace}
	}
	return buf[packHead:], nil
}

func (p *packs) readAt(number uint64, buf []byte, off int64) error {
	p.mu.RLock()
	f := p.open[number]
	if f != nil {
		defer p.mu.RUnlock()
		return readFull(f, buf, off)
	}
	p.mu.RUnlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	if f = p.open[number]; f == nil {
		if p.open == nil {
			return ErrClosed
		}
		var err error
		if f, err = p.fs.Open(p.path(number), vfs.RandomReadsOption); isNotExist(err) {
			return errPackGone
		} else if err != nil {
			return fmt.Errorf("engine: opening %s: %w", packName(number), err)
		}
		for n, other := range p.open { // any of them: which one has no effect but on time
			if len(p.open) < packHandles {
				break
			}
			_ = other.Close() // read only
			delete(p.open, n)
		}
		p.open[number] = f
	}
	return readFull(f, buf, off)
}

func readFull(f vfs.File, buf []byte, off int64) error {
	n, err := f.ReadAt(buf, off)
	if n == len(buf) {
		return nil
	}
	if err == nil {
		err = io.EOF
	}
	return fmt.Errorf("engine: reading a pack: %w", err)
}

// remove deletes packs that no durable row names any more. One that cannot be deleted goes at the next start.
func (e *Engine) removePacks(dead []uint64) {
	p := e.packs
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range dead {
		if f := p.open[n]; f != nil {
			_ = f.Close() // read only
			delete(p.open, n)
		}
		if err := p.fs.Remove(p.path(n)); err != nil {
			e.o.Logger.Warn("a file that is not needed any more cannot be removed", "file", p.path(n), "error", err)
		}
	}
}

// packWork is what a checkpoint has to do about packs.
type packWork struct {
	ticket uint64
	sealed []vfs.File
	open   []vfs.File
	made   bool
	dead   []uint64
	listed []pack
}

// takePacks lists the packs in the batch of a checkpoint, but for those of which everything has expired by then, and
// those in rewritten. mu is held.
func (e *Engine) takePacks(batch *pebble.Batch, rewritten []uint64) (packWork, error) {
	p := e.packs
	upto := uint64(max(e.stamp.Cluster/expiryUnit, e.swept))
	expired := func(k *pack) bool { return k.expiry != never && expiryTick(k.expiry) <= upto }
	var err error
	switch {
	case p.cur == nil:
	case expired(p.cur.pack):
		err = p.seal(&p.cur)
	default:
		err = p.cur.write(true)
	}
	if err != nil {
		return packWork{}, err
	}
	w := packWork{ticket: p.queue.ticket(), sealed: p.sealed, made: p.made}
	p.sealed, p.made = nil, false
	for _, open := range []*packWriter{p.cur, p.parts} {
		if open != nil {
			w.open = append(w.open, open.f)
		}
	}
	for _, n := range sortedKeys(p.list) {
		k := p.list[n]
		if expired(k) || slices.Contains(rewritten, n) {
			w.dead = append(w.dead, n)
			delete(p.list, n)
			_ = batch.Delete(e.keys.key(rowPack, n), nil) // a batch in memory takes everything
			continue
		}
		if k.size != k.listed {
			k.listed = k.size
			e.put(batch, k.appendRow(e.rowBuf[:0]), rowPack, n)
		}
		w.listed = append(w.listed, *k)
	}
	return w, nil
}

// sync brings to the disk what the checkpoint lists.
func (w *packWork) sync(p *packs) error {
	if err := p.queue.wait(w.ticket); err != nil {
		return err
	}
	for i, f := range w.sealed {
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			for _, f := range w.sealed[i+1:] {
				_ = f.Close()
			}
			return fmt.Errorf("engine: syncing a pack: %w", err)
		}
	}
	for _, f := range w.open {
		if err := f.Sync(); err != nil {
			return fmt.Errorf("engine: syncing a pack: %w", err)
		}
	}
	if w.made {
		return syncDir(p.fs, p.dir)
	}
	return nil
}

// payload returns a block's payload, nil if it is not stored any more. at is its place as it was read.
func (e *Engine) payload(topic, base uint64, at place) ([]byte, error) {
	if b := e.payloads.get(topic, base); b != nil {
		return b, nil
	}
	if at.length == 0 {
		return nil, nil
	}
	b, err := e.readPack(topic, base, at, func() (place, error) {
		v, closer, err := e.db.Get(e.keys.key(rowBlock, topic, base))
		if errors.Is(err, pebble.ErrNotFound) {
			return place{}, nil
		}
		if err != nil {
			return place{}, fmt.Errorf("engine: reading a block header: %w", err)
		}
		h, err := parseBlock(topic, base, v)
		if err = errors.Join(err, closer.Close()); err != nil {
			return place{}, err
		}
		return h.at, nil
	})
	if b == nil || err != nil {
		return nil, err
	}
	e.payloads.put(topic, base, b)
	return b, nil
}

// readPack reads what stands at a place, or where lookup says that it stands now: it may have been rewritten or removed
// since the place was read. It returns nil for what is not stored any more.
func (e *Engine) readPack(topic, base uint64, at place, lookup func() (place, error)) ([]byte, error) {
	b, err := e.packs.read(topic, base, at)
	for errors.Is(err, errPackGone) {
		old := at
		if at, err = lookup(); err != nil || at.length == 0 {
			return nil, err
		}
		if at == old {
			err = &CorruptError{File: e.packs.path(at.pack), Detail: "missing", Remedy: remedyReplace}
			break
		}
		b, err = e.packs.read(topic, base, at)
	}
	if err != nil {
		if c := (*CorruptError)(nil); errors.As(err, &c) {
			e.fail(err)
		}
		return nil, err
	}
	return b, nil
}

// payloadCache holds payloads read last, the oldest dropped first: whoever reads a backlog asks for each block many
// times over.
type payloadCache struct {
	mu    sync.Mutex
	m     map[headerKey][]byte
	order []headerKey
	bytes int64
	limit int64
}

func (c *payloadCache) get(topic, base uint64) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.m[headerKey{topic, base}]
}

func (c *payloadCache) put(topic, base uint64, payload []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := headerKey{topic, base}
	if c.m[k] != nil {
		return
	}
	if c.m == nil {
		c.m = make(map[headerKey][]byte)
	}
	c.m[k] = payload
	c.order = append(c.order, k)
	c.bytes += int64(len(payload)) + 64
	for c.bytes > c.limit && len(c.order) > 0 {
		c.bytes -= int64(len(c.m[c.order[0]])) + 64
		delete(c.m, c.order[0])
		c.order = c.order[1:]
	}
}

func (c *payloadCache) reset(limit int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.m, c.order, c.bytes, c.limit = nil, nil, 0, limit
}
