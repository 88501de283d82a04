package engine

import (
	"fmt"
	"io"
	"sync"
	"unsafe"

	"github.com/cockroachdb/pebble/v2/vfs"
)

const (
	// packChunk is how much of a pack is written at a time, outside of Apply and past the system's page cache: at 1 MiB
	// that takes a fifth of the CPU time that writes of an entry each into the cache do, and a tenth once the cache
	// has to take memory that the machine has not touched for a while.
	packChunk = 1 << 20
	// packWaiting is how many chunks may wait for being written before Apply does.
	packWaiting = 2
	// packBlock is what the address, the place and the length of such a write have to be multiples of: the page of
	// nearly all machines, which no disk's sector exceeds.
	packBlock = 4096
)

func alignUp(n int) int { return (n + packBlock - 1) &^ (packBlock - 1) }

func misaligned(b []byte) int { return int(uintptr(unsafe.Pointer(unsafe.SliceData(b))) % packBlock) }

// alignedBytes returns n zero bytes that begin at a multiple of packBlock.
func alignedBytes(n int) []byte {
	b := make([]byte, n+packBlock)
	skip := (packBlock - misaligned(b)) % packBlock
	return b[skip : skip+n : skip+n]
}

// packPart is a part of a pack that was not written yet. It begins and ends at a multiple of packBlock once it is
// handed over.
type packPart struct {
	f     vfs.File
	pack  uint64
	start uint64
	buf   []byte
}

// holds tells whether all of a block's payload is in the chunk.
func (c *packPart) holds(at place, n int) bool {
	return c.pack == at.pack && c.start <= at.offset && at.offset+uint64(n) <= c.start+uint64(len(c.buf))
}

// packQueue writes chunks in the order in which they are handed over, one at a time, and gives back to readers what is
// not written yet. Its methods may be called concurrently.
type packQueue struct {
	spawn func(func())
	fail  func(error)

	mu      sync.Mutex
	moved   *sync.Cond // on mu: a chunk was written, or nothing more will be
	open    packPart   // what Apply still adds to, as far as its entries are complete
	waiting []packPart
	busy    bool
	handed  uint64 // chunks handed over so far
	written uint64 // of these, chunks in the file
	err     error
	spare   [][]byte
}

func newPackQueue(spawn func(func()), fail func(error)) *packQueue {
	q := &packQueue{spawn: spawn, fail: fail}
	q.moved = sync.NewCond(&q.mu)
	return q
}

// show lets readers see what was added to the chunk that is being filled.
func (q *packQueue) show(c packPart) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.open = c
	return q.err
}

// hand hands a chunk over for writing, and waits while too many do. The buffer belongs to the queue from then on.
// Whatever was shown of the same pack is replaced by it.
func (q *packQueue) hand(c packPart) error {
	n := len(c.buf)
	if padded := alignUp(n); padded > n {
		if padded > cap(c.buf) {
			c.buf = append(alignedBytes(padded)[:0], c.buf...)
		}
		c.buf = c.buf[:padded]
		clear(c.buf[n:])
	}
	if misaligned(c.buf) != 0 {
		c.buf = append(alignedBytes(len(c.buf))[:0], c.buf...)
	}
	q.mu.Lock()
	for len(q.waiting) >= packWaiting && q.err == nil {
		q.moved.Wait()
	}
	if q.err != nil {
		defer q.mu.Unlock()
		return q.err
	}
	if q.open.pack == c.pack {
		q.open = packPart{}
	}
	q.waiting = append(q.waiting, c)
	q.handed++
	start := !q.busy
	q.busy = true
	q.mu.Unlock()
	if start {
		q.spawn(q.write)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.err
}

// write writes all chunks that wait.
func (q *packQueue) write() {
	q.mu.Lock()
	for len(q.waiting) > 0 && q.err == nil {
		c := q.waiting[0]
		q.mu.Unlock()
		err := c.write()
		q.mu.Lock()
		if q.err = err; err == nil {
			q.waiting = append(q.waiting[:0], q.waiting[1:]...)
			q.written++
			if cap(c.buf) <= 2*packChunk && len(q.spare) < packWaiting {
				q.spare = append(q.spare, c.buf[:0])
			}
		}
		q.moved.Broadcast()
	}
	if err := q.err; err != nil {
		q.mu.Unlock()
		q.fail(err)
		q.mu.Lock()
	}
	q.busy = false
	q.moved.Broadcast()
	q.mu.Unlock()
}

func (c *packPart) write() error {
	n, err := writePast(c.f, c.buf)
	if err == nil && n != len(c.buf) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("engine: writing %s: %w", packName(c.pack), err)
	}
	return nil
}

// buffer returns an empty buffer for at least n bytes.
func (q *packQueue) buffer(n int) []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	if last := len(q.spare) - 1; last >= 0 && cap(q.spare[last]) >= n {
		b := q.spare[last]
		q.spare = q.spare[:last]
		return b
	}
	return alignedBytes(alignUp(n))[:0]
}

// ticket is what wait waits for: everything handed over so far.
func (q *packQueue) ticket() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.handed
}

// wait waits until what was handed over before the ticket was taken is written.
func (q *packQueue) wait(ticket uint64) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.written < ticket && q.err == nil {
		q.moved.Wait()
	}
	return q.err
}

// idle waits until nothing is being written.
func (q *packQueue) idle() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.busy {
		q.moved.Wait()
	}
}

// read copies the bytes at a place into buf, if they are not in the file yet.
func (q *packQueue) read(at place, buf []byte) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	from := &q.open
	for i := 0; !from.holds(at, len(buf)); i++ {
		if i == len(q.waiting) {
			return false
		}
		from = &q.waiting[i]
	}
	copy(buf, from.buf[at.offset-from.start:])
	return true
}
