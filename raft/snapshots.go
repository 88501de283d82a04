package raft

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/engine"
)

// A snapshot on its way between nodes is a stream:
//
//	magic        u32   "TSNP"
//	header size  u32
//	header             version u8 | index, term, configuration index uvarint | configuration (length-prefixed)
//	                   | files uvarint | { name (length-prefixed) | size uvarint }*
//	header crc   u32   CRC-32C of the header
//	{ content | CRC-32C of the content u32 }*   one per file, in the header's order
//
// Numbers are little-endian. The size is known beforehand, as hraft requires.
const (
	snapshotMagic     = 0x54534e50
	snapshotVersion   = 1
	snapshotHeaderMax = 16 << 20
	snapshotNameMax   = 1 << 10
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// installedPrefix marks the ID of a snapshot that was just installed: its state is in place already.
const installedPrefix = "installed-"

// installGrace is how long the log from an exported snapshot on is kept after the export, so that the follower
// finds the entries it needs next.
const installGrace = 30 * time.Second

// unreadMax is how long a snapshot waits for its receiver to be there. The copy holds on to files that the store would
// like to remove, and the log is kept from it on; whoever comes later gets a fresher one.
const unreadMax = 10 * time.Second

// errUnread fails the reading of a snapshot whose receiver came too late for it.
var errUnread = errors.New("the snapshot has been waiting for too long; a fresh one is sent")

// snapshots implements hraft.SnapshotStore. There is exactly one snapshot: the engine's durable checkpoint
// (decision 2). Nothing is stored here.
type snapshots struct {
	store store
	// room reports the free bytes of the data directory.
	room func() (int64, error)
	log  hclog.Logger
	// grace is installGrace, unless a test is in a hurry.
	grace time.Duration

	mu sync.Mutex
	// exports holds the index of each snapshot being sent, or sent a moment ago.
	exports map[*export]struct{}
	// sending is held while an export runs: one at a time.
	sending chan struct{}
}

// store is what snapshots need of the engine.
type store interface {
	Durable() engine.Meta
	Export() (*engine.Export, error)
	BeginInstall() (*engine.Install, error)
}

func newSnapshots(s store, room func() (int64, error), log hclog.Logger) *snapshots {
	return &snapshots{store: s, room: room, log: log, grace: installGrace, exports: make(map[*export]struct{}), sending: make(chan struct{}, 1)}
}

// hraftMeta translates a checkpoint's place.
func hraftMeta(m engine.Meta, id string, size int64) *hraft.SnapshotMeta {
	return &hraft.SnapshotMeta{
		Version: hraft.SnapshotVersionMax, ID: id, Index: m.Index, Term: m.Term, Size: size,
		Configuration: hraft.DecodeConfiguration(m.Configuration), ConfigurationIndex: m.ConfigurationIndex,
	}
}

// List implements hraft.SnapshotStore.
func (s *snapshots) List() ([]*hraft.SnapshotMeta, error) {
	m := s.store.Durable()
	if m.Index == 0 || len(m.Configuration) == 0 {
		return nil, nil
	}
	return []*hraft.SnapshotMeta{hraftMeta(m, fmt.Sprintf("%d-%d", m.Term, m.Index), 0)}, nil
}

// Open implements hraft.SnapshotStore: it makes a copy of the durable state and streams it. What it returns may be
// fresher than what was listed; hraft goes by what it returns.
func (s *snapshots) Open(id string) (*hraft.SnapshotMeta, io.ReadCloser, error) {
	if strings.HasPrefix(id, installedPrefix) {
		return hraftMeta(s.store.Durable(), id, 0), io.NopCloser(bytes.NewReader(nil)), nil
	}
	select {
	case s.sending <- struct{}{}:
	default:
		return nil, nil, errors.New("another snapshot is being sent")
	}
	x, err := s.store.Export()
	if err != nil {
		<-s.sending
		return nil, nil, err
	}
	header := encodeSnapshotHeader(x)
	size := int64(len(header))
	for _, f := range x.Files {
		size += f.Size + crc32.Size
	}
	e := &export{s: s, x: x, index: x.Meta.Index, openedAt: time.Now(), head: bytes.NewReader(header)}
	s.mu.Lock()
	s.exports[e] = struct{}{}
	s.mu.Unlock()
	s.log.Info("sending a snapshot", "index", x.Meta.Index, "term", x.Meta.Term, "bytes", size, "files", len(x.Files))
	return hraftMeta(x.Meta, id, size), e, nil
}

// floor returns the lowest index a snapshot being sent (or sent a moment ago) begins at; the log from there on is
// needed. ok is false when there is none.
func (s *snapshots) floor() (index uint64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for e := range s.exports {
		if e.closedAt.IsZero() && time.Since(e.openedAt) > unreadMax && e.abandon() {
			// Closing takes the lock, and removes files: not here.
			go func() { _ = e.Close() }()
		}
		if !e.closedAt.IsZero() && time.Since(e.closedAt) > s.grace {
			delete(s.exports, e)
			continue
		}
		if !ok || e.index < index {
			index, ok = e.index, true
		}
	}
	return index, ok
}

func encodeSnapshotHeader(x *engine.Export) []byte {
	b := make([]byte, 8, 1024)
	b = append(b, snapshotVersion)
	b = binary.AppendUvarint(b, x.Meta.Index)
	b = binary.AppendUvarint(b, x.Meta.Term)
	b = binary.AppendUvarint(b, x.Meta.ConfigurationIndex)
	b = appendBytes(b, x.Meta.Configuration)
	b = binary.AppendUvarint(b, uint64(len(x.Files)))
	for _, f := range x.Files {
		b = appendBytes(b, f.Name)
		b = binary.AppendUvarint(b, uint64(f.Size))
	}
	binary.LittleEndian.PutUint32(b, snapshotMagic)
	binary.LittleEndian.PutUint32(b[4:], uint32(len(b)-8))
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[8:], castagnoli))
}

// export is a snapshot being sent.
type export struct {
	s        *snapshots
	x        *engine.Export
	index    uint64
	openedAt time.Time
	closedAt time.Time // guarded by s.mu

	// state decides between being read and being abandoned.
	state atomic.Uint32

	head io.Reader // header, or the checksum of the file before
	next int       // the file that comes after head
	file io.ReadCloser
	left int64
	sum  hash.Hash32
	once sync.Once
}

// States of an export.
const (
	exportWaiting uint32 = iota
	exportRead
	exportAbandoned
)

// abandon gives up an export that nobody has begun to read.
func (e *export) abandon() bool { return e.state.CompareAndSwap(exportWaiting, exportAbandoned) }

// Read implements io.Reader.
func (e *export) Read(p []byte) (int, error) {
	e.state.CompareAndSwap(exportWaiting, exportRead)
	if e.state.Load() == exportAbandoned {
		return 0, errUnread
	}
	for {
		if e.head != nil {
			n, err := e.head.Read(p)
			if n > 0 {
				return n, nil
			}
			if err != io.EOF {
				return 0, err
			}
			e.head = nil
		}
		if e.file == nil {
			if e.next == len(e.x.Files) {
				return 0, io.EOF
			}
			f := e.x.Files[e.next]
			r, err := e.x.Open(f.Name)
			if err != nil {
				return 0, err
			}
			e.next++
			e.file, e.left, e.sum = r, f.Size, crc32.New(castagnoli)
		}
		if e.left == 0 {
			err := e.file.Close()
			e.file = nil
			if err != nil {
				return 0, err
			}
			e.head = bytes.NewReader(binary.LittleEndian.AppendUint32(nil, e.sum.Sum32()))
			continue
		}
		if int64(len(p)) > e.left {
			p = p[:e.left]
		}
		n, err := e.file.Read(p)
		e.left -= int64(n)
		_, _ = e.sum.Write(p[:n])
		if err == io.EOF && e.left > 0 {
			return n, fmt.Errorf("snapshot file %s is shorter than listed", e.x.Files[e.next-1].Name)
		}
		if err == io.EOF {
			err = nil
		}
		return n, err
	}
}

// Close implements io.Closer.
func (e *export) Close() (err error) {
	e.once.Do(func() {
		if e.file != nil {
			_ = e.file.Close() // read only
		}
		err = e.x.Close()
		e.s.mu.Lock()
		e.closedAt = time.Now()
		e.s.mu.Unlock()
		<-e.s.sending
	})
	return err
}

// Create implements hraft.SnapshotStore, for a snapshot that another node sends.
func (s *snapshots) Create(_ hraft.SnapshotVersion, index, term uint64, c hraft.Configuration, cIndex uint64, _ hraft.Transport) (hraft.SnapshotSink, error) {
	in, err := s.store.BeginInstall()
	if err != nil {
		return nil, err
	}
	k := &sink{s: s, in: in, want: engine.Meta{Index: index, Term: term, Configuration: hraft.EncodeConfiguration(c), ConfigurationIndex: cIndex},
		id: fmt.Sprintf("%s%d-%d", installedPrefix, term, index)}
	r, w := io.Pipe()
	k.w = w
	k.done = make(chan error, 1)
	go func() {
		err := k.receive(bufio.NewReaderSize(r, 256<<10))
		_ = r.CloseWithError(err) // nil lets nothing more in, which is right: receive read to the end
		k.done <- err
	}()
	s.log.Info("receiving a snapshot", "index", index, "term", term)
	return k, nil
}

// sink receives a snapshot. Its Close is the moment the state becomes the node's (decision 2).
type sink struct {
	s    *snapshots
	in   *engine.Install
	id   string
	want engine.Meta
	got  engine.Meta
	w    *io.PipeWriter
	done chan error
	over bool
}

// ID implements hraft.SnapshotSink.
func (k *sink) ID() string { return k.id }

// Write implements io.Writer.
func (k *sink) Write(p []byte) (int, error) { return k.w.Write(p) }

// Close implements io.Closer: it verifies, syncs and switches.
func (k *sink) Close() error {
	if k.over {
		return nil
	}
	k.over = true
	_ = k.w.Close()
	if err := <-k.done; err != nil {
		return errors.Join(err, k.in.Abort())
	}
	if k.got.Index != k.want.Index || k.got.Term != k.want.Term || k.got.ConfigurationIndex != k.want.ConfigurationIndex {
		return errors.Join(fmt.Errorf("the snapshot is of entry %d, term %d; announced was entry %d, term %d",
			k.got.Index, k.got.Term, k.want.Index, k.want.Term), k.in.Abort())
	}
	if err := k.in.Commit(k.got); err != nil {
		return err
	}
	k.s.log.Info("snapshot installed", "index", k.got.Index, "term", k.got.Term)
	return nil
}

// Cancel implements hraft.SnapshotSink.
func (k *sink) Cancel() error {
	if k.over {
		return nil
	}
	k.over = true
	_ = k.w.CloseWithError(errors.New("the transfer was given up"))
	<-k.done //nolint:errcheck // what is given up has failed
	return k.in.Abort()
}

// receive reads the stream into files.
func (k *sink) receive(r *bufio.Reader) error {
	var fixed [8]byte
	if _, err := io.ReadFull(r, fixed[:]); err != nil {
		return fmt.Errorf("reading the snapshot's head: %w", err)
	}
	if binary.LittleEndian.Uint32(fixed[:]) != snapshotMagic {
		return errors.New("not a snapshot")
	}
	n := binary.LittleEndian.Uint32(fixed[4:])
	if n > snapshotHeaderMax {
		return fmt.Errorf("a snapshot header of %d bytes is too long", n)
	}
	header := make([]byte, int(n)+crc32.Size)
	if _, err := io.ReadFull(r, header); err != nil {
		return fmt.Errorf("reading the snapshot's header: %w", err)
	}
	if binary.LittleEndian.Uint32(header[n:]) != crc32.Checksum(header[:n], castagnoli) {
		return errors.New("the snapshot's header is damaged")
	}
	meta, files, err := decodeSnapshotHeader(header[:n])
	if err != nil {
		return err
	}
	k.got = meta
	total := int64(0)
	for _, f := range files {
		total += f.Size
	}
	if room, err := k.s.room(); err == nil && room < total {
		return fmt.Errorf("the snapshot needs %d bytes besides the present state, and %d are free", total, room)
	}
	for _, f := range files {
		if err := k.receiveFile(r, f); err != nil {
			return fmt.Errorf("snapshot file %s: %w", f.Name, err)
		}
	}
	if _, err := r.ReadByte(); err != io.EOF {
		return errors.New("the snapshot is longer than announced")
	}
	return nil
}

func (k *sink) receiveFile(r io.Reader, f engine.ExportFile) error {
	w, err := k.in.Create(f.Name)
	if err != nil {
		return err
	}
	sum := crc32.New(castagnoli)
	// The sum first: Pebble's files may scribble over what they have written.
	_, err = io.CopyN(io.MultiWriter(sum, w), r, f.Size)
	if cerr := w.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	var want [crc32.Size]byte
	if _, err := io.ReadFull(r, want[:]); err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(want[:]) != sum.Sum32() {
		return errors.New("checksum mismatch")
	}
	return nil
}

func decodeSnapshotHeader(b []byte) (engine.Meta, []engine.ExportFile, error) {
	r := wireReader{b: b}
	if v := r.u8(); v != snapshotVersion {
		return engine.Meta{}, nil, fmt.Errorf("snapshot version %d is unknown", v)
	}
	m := engine.Meta{Index: r.uvarint(), Term: r.uvarint(), ConfigurationIndex: r.uvarint()}
	m.Configuration = append([]byte(nil), r.bytes()...)
	n := r.uvarint()
	if n > uint64(len(r.b)) {
		r.bad = true
		n = 0
	}
	files := make([]engine.ExportFile, 0, n)
	for range n {
		f := engine.ExportFile{Name: string(r.bytes()), Size: int64(r.uvarint())}
		if f.Size < 0 || len(f.Name) == 0 || len(f.Name) > snapshotNameMax || strings.ContainsAny(f.Name, "/\\\x00") || f.Name == "." || f.Name == ".." {
			r.bad = true
		}
		files = append(files, f)
	}
	if r.bad || len(r.b) > 0 {
		return engine.Meta{}, nil, errors.New("the snapshot's header cannot be read")
	}
	return m, files, nil
}

// wireReader reads what the append functions of this package wrote. After a bad read everything is zero.
type wireReader struct {
	b   []byte
	bad bool
}

func (r *wireReader) u8() byte {
	if len(r.b) == 0 {
		r.bad = true
		return 0
	}
	v := r.b[0]
	r.b = r.b[1:]
	return v
}

func (r *wireReader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *wireReader) bytes() []byte {
	n := r.uvarint()
	if n > uint64(len(r.b)) {
		r.bad, r.b = true, nil
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

// appendBytes appends a length and the bytes.
func appendBytes[T ~string | ~[]byte](b []byte, s T) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}
