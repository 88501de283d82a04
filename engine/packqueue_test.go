package engine

import (
	"bytes"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// beside is the Spawn of tests in which files are written beside Apply, as on a node.
func beside(f func()) { go f() }

// slowFile writes what it is allowed to.
type slowFile struct {
	vfs.File
	allow chan error
	wrote bytes.Buffer
}

func (f *slowFile) Write(b []byte) (int, error) {
	if err := <-f.allow; err != nil {
		return 0, err
	}
	return f.wrote.Write(b)
}

func (f *slowFile) Fd() uintptr { return vfs.InvalidFd }

// TestPackQueue: what was added is read back before, while and after it is written; who hands over more than may wait,
// waits; and a checkpoint goes on only when all that it lists is in the file.
func TestPackQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &slowFile{allow: make(chan error)}
		q := newPackQueue(beside, func(err error) { t.Errorf("failed: %v", err) })
		w := &packWriter{pack: &pack{number: 7}, q: q, packPart: packPart{f: f, pack: 7}}
		var places []place
		var bodies [][]byte
		add := func() {
			body := bytes.Repeat([]byte{byte('a' + len(bodies))}, packChunk/4)
			b := &block{topic: 1, base: uint64(len(bodies)), bytes: uint64(len(body))}
			places = append(places, w.add(b, func(dst []byte) []byte { return append(dst, body...) }))
			bodies = append(bodies, body)
			if err := w.write(false); err != nil {
				t.Error(err)
			}
			if err := q.show(w.packPart); err != nil {
				t.Error(err)
			}
		}
		check := func() {
			t.Helper()
			for i, at := range places {
				buf := make([]byte, packHead+int(at.length))
				if !q.read(at, buf) {
					copy(buf, f.wrote.Bytes()[at.offset:])
				}
				if !bytes.Equal(buf[packHead:], bodies[i]) {
					t.Errorf("block %d of %d is read as %.8q", i, len(places), buf[packHead:])
				}
			}
		}
		for range 4*packWaiting + 3 {
			add()
		}
		synctest.Wait()
		check()
		full, synced := make(chan bool, 1), make(chan error, 1)
		go func() { add(); full <- true }()
		go func() {
			work := packWork{ticket: q.ticket()}
			synced <- work.sync(&packs{queue: q})
		}()
		synctest.Wait()
		select {
		case <-full:
			t.Error("more was handed over than may wait")
		case err := <-synced:
			t.Errorf("the checkpoint went on before anything was written: %v", err)
		default:
		}
		f.allow <- nil
		<-full
		f.allow <- nil
		if err := <-synced; err != nil {
			t.Error(err)
		}
		synctest.Wait()
		check()
		f.allow <- nil
		q.idle()
		check()
		if n := f.wrote.Len(); n%packBlock != 0 || uint64(n) != w.start {
			t.Errorf("%d bytes are in the file, the next chunk begins at %d", n, w.start)
		}
	})
}

// TestPackQueueFails: after a failed write nothing is written any more, the failure is reported once, and nobody waits
// for what will not come.
func TestPackQueueFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &slowFile{allow: make(chan error)}
		var told []error
		q := newPackQueue(beside, func(err error) { told = append(told, err) })
		part := func(start uint64) packPart {
			return packPart{f: f, pack: 1, start: start, buf: alignedBytes(packBlock)}
		}
		results := make(chan error, 2)
		for i := range packWaiting {
			if err := q.hand(part(uint64(i * packBlock))); err != nil {
				t.Error(err)
			}
		}
		go func() { results <- q.hand(part(packWaiting * packBlock)) }()
		go func() { results <- q.wait(q.ticket()) }()
		synctest.Wait()
		cause := errors.New("no disk")
		f.allow <- cause
		for range 2 {
			if err := <-results; !errors.Is(err, cause) {
				t.Errorf("it ended with %v", err)
			}
		}
		q.idle()
		if err := q.show(packPart{}); !errors.Is(err, cause) {
			t.Errorf("later entries are told %v", err)
		}
		if len(told) != 1 || !errors.Is(told[0], cause) || f.wrote.Len() > 0 {
			t.Errorf("told %v, wrote %d bytes", told, f.wrote.Len())
		}
	})
}

// TestPackPadding: what fills a chunk up is zeros, whatever its buffer held before.
func TestPackPadding(t *testing.T) {
	f := &slowFile{allow: make(chan error, 1)}
	f.allow <- nil
	q := newPackQueue(func(f func()) { f() }, func(err error) { t.Error(err) })
	buf := bytes.Repeat([]byte{'x'}, packBlock)
	if err := q.hand(packPart{f: f, pack: 1, buf: append(alignedBytes(packBlock)[:0], buf...)[:100]}); err != nil {
		t.Fatal(err)
	}
	if want := append(buf[:100:100], make([]byte, packBlock-100)...); !bytes.Equal(f.wrote.Bytes(), want) {
		t.Errorf("the file has %q", f.wrote.Bytes())
	}
}
