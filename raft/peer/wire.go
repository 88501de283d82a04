package peer

import (
	"bufio"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// readBuffer is the size of a connection's read buffer. Bodies larger than it are read straight into their own
// memory.
const readBuffer = 64 << 10

// errSilent and errStalled end connections whose other end no longer takes part.
var (
	errSilent  = &timeoutError{"nothing was heard for too long"}
	errStalled = &timeoutError{"the other end takes no more bytes"}
	errLinger  = errors.New("closed by this node")
)

// timeoutError is a net.Error that times out.
type timeoutError struct{ text string }

func (e *timeoutError) Error() string   { return e.text }
func (e *timeoutError) Timeout() bool   { return true }
func (e *timeoutError) Temporary() bool { return true }

// wire is one established connection below the handshake: a reader, and a writer that sends everything queued in
// one call. It belongs to exactly one Conn (this node dialled) or one session (this node accepted).
type wire struct {
	nc net.Conn
	br *bufio.Reader
	// vectored tells whether nc takes a list of buffers in one system call.
	vectored bool

	// done is closed when the connection has ended; err is set before, and onEnd, if not nil, called after.
	done  chan struct{}
	onEnd func()

	// heard is when bytes last arrived, in nanoseconds since the mesh was made. clock reads that time.
	heard atomic.Int64
	clock func() int64
	// also is the same for the node as a whole, over all its connections; nil before the handshake.
	also atomic.Pointer[atomic.Int64]
	// writing is when the write in progress began, 0 when none is.
	writing atomic.Int64
	// silence and stall are after what time without bytes, or in one write, the connection is given up.
	silence, stall time.Duration

	mu struct {
		sync.Mutex
		cond  *sync.Cond // signalled when queue grows, shrinks, or the connection ends
		queue [][]byte
		bytes int
		err   error
		ended bool
		drain bool // end once the queue is written
	}
}

func newWire(nc net.Conn, clock func() int64, silence, stall time.Duration) *wire {
	w := &wire{nc: nc, done: make(chan struct{}), clock: clock, silence: silence, stall: stall}
	_, w.vectored = nc.(*net.TCPConn)
	w.br = bufio.NewReaderSize(hearing{w}, readBuffer)
	w.mu.cond = sync.NewCond(&w.mu)
	w.heard.Store(clock())
	return w
}

// hearing notes when bytes arrive.
type hearing struct{ w *wire }

func (h hearing) Read(p []byte) (int, error) {
	n, err := h.w.nc.Read(p)
	if n > 0 {
		now := h.w.clock()
		h.w.heard.Store(now)
		if also := h.w.also.Load(); also != nil {
			also.Store(now)
		}
	}
	return n, err
}

// send queues a frame. It never blocks; the caller bounds what it has outstanding. It fails when the connection has
// ended or the frame is too large.
func (w *wire) send(kind Kind, flags uint8, shard uint16, request uint64, body [][]byte) error {
	// The checksum over a large body is not computed under the lock.
	vec, n, err := appendFrame(nil, kind, flags, shard, request, body)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mu.ended || w.mu.drain {
		return w.endedErr()
	}
	w.mu.queue = append(w.mu.queue, vec...)
	w.mu.bytes += n
	w.mu.cond.Broadcast()
	return nil
}

func (w *wire) endedErr() error {
	if w.mu.err != nil {
		return w.mu.err
	}
	return errLinger
}

// sendWait is send for callers that produce as fast as they may: it first waits until the queue has room.
func (w *wire) sendWait(kind Kind, flags uint8, shard uint16, request uint64, body [][]byte, room int) error {
	w.mu.Lock()
	for !w.mu.ended && !w.mu.drain && w.mu.bytes > room {
		w.mu.cond.Wait()
	}
	w.mu.Unlock()
	return w.send(kind, flags, shard, request, body)
}

// writeLoop writes what is queued, everything at once, until the connection ends.
func (w *wire) writeLoop() {
	var scratch []byte
	for {
		w.mu.Lock()
		for len(w.mu.queue) == 0 && !w.mu.ended && !w.mu.drain {
			w.mu.cond.Wait()
		}
		if w.mu.ended || len(w.mu.queue) == 0 {
			w.mu.Unlock()
			w.end(errLinger)
			return
		}
		queue, bytes := w.mu.queue, w.mu.bytes
		w.mu.queue = nil
		w.mu.Unlock()

		w.writing.Store(max(w.clock(), 1))
		var err error
		if w.vectored {
			vec := net.Buffers(queue)
			_, err = vec.WriteTo(w.nc)
		} else {
			scratch, err = writeJoined(w.nc, queue, scratch)
		}
		w.writing.Store(0)
		if err != nil {
			w.end(err)
			return
		}
		w.mu.Lock()
		w.mu.bytes -= bytes
		w.mu.cond.Broadcast()
		w.mu.Unlock()
	}
}

// joinMax is how much writeJoined collects into one write: a few TLS records.
const joinMax = 64 << 10

// writeJoined is the writer for connections without vectored writes (TLS, in-memory): small parts are joined, so
// that a frame is not torn into one record for its header and one for its body.
func writeJoined(nc net.Conn, queue [][]byte, scratch []byte) ([]byte, error) {
	if scratch == nil {
		scratch = make([]byte, 0, joinMax)
	}
	scratch = scratch[:0]
	flush := func() error {
		if len(scratch) == 0 {
			return nil
		}
		_, err := nc.Write(scratch)
		scratch = scratch[:0]
		return err
	}
	for _, p := range queue {
		for len(p) > 0 {
			if len(scratch) == 0 && len(p) >= joinMax {
				if _, err := nc.Write(p); err != nil {
					return scratch, err
				}
				break
			}
			n := min(len(p), joinMax-len(scratch))
			scratch = append(scratch, p[:n]...)
			p = p[n:]
			if len(scratch) == joinMax {
				if err := flush(); err != nil {
					return scratch, err
				}
			}
		}
	}
	return scratch, flush()
}

// end closes the connection, once, for the reason given.
func (w *wire) end(err error) {
	w.mu.Lock()
	if w.mu.ended {
		w.mu.Unlock()
		return
	}
	w.mu.ended = true
	if w.mu.err == nil {
		w.mu.err = err
	}
	w.mu.queue = nil
	w.mu.cond.Broadcast()
	w.mu.Unlock()
	_ = w.nc.Close() // the connection is given up either way
	close(w.done)
	if w.onEnd != nil {
		w.onEnd()
	}
}

// endAfter closes the connection for the reason given once everything queued is written.
func (w *wire) endAfter(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.mu.err == nil {
		w.mu.err = err
	}
	w.mu.drain = true
	w.mu.cond.Broadcast()
}

// ended tells whether the connection has ended.
func (w *wire) ended() bool {
	select {
	case <-w.done:
		return true
	default:
		return false
	}
}

// reason returns why the connection ended.
func (w *wire) reason() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.endedErr()
}

// check ends the connection if its other end no longer takes part. The mesh's keeper calls it now and then.
func (w *wire) check(now int64) {
	if t := w.writing.Load(); t != 0 && time.Duration(now-t) > w.stall {
		w.end(errStalled)
		return
	}
	if time.Duration(now-w.heard.Load()) > w.silence {
		w.end(errSilent)
	}
}
