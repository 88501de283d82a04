package server

import (
	"net/netip"
	"sync"
	"sync/atomic"

	"tercet.dev/tercet/internal/errs"
)

// load counts what requests hold of the server, so that more work than the node can take is refused before it
// costs memory. Nothing here blocks: a request that does not fit is answered 429 at once.
type load struct {
	requestsMax, waitsMax, bytesMax int64

	requests, waits, bytes, spooled atomic.Int64

	connectionsMax, perAddrMax int
	connections                connections
}

func (l *load) init(limits *Limits) {
	l.requestsMax, l.waitsMax, l.bytesMax = int64(limits.Requests), int64(limits.Waits), limits.InflightBytes
	l.connectionsMax, l.perAddrMax = limits.Connections, limits.ConnectionsPerAddr
	l.connections.byAddr = make(map[netip.Addr]int)
	l.connections.open = make(map[*headConn]struct{})
}

// take adds n to a counter unless that exceeds its bound.
func take(counter *atomic.Int64, n, bound int64) bool {
	if counter.Add(n) > bound {
		counter.Add(-n)
		return false
	}
	return true
}

// holdBytes takes n more bytes of memory for a body.
func (x *exchange) holdBytes(n int64) *errs.Error {
	if !take(&x.s.load.bytes, n, x.s.load.bytesMax) {
		x.s.metrics.refused.bytes.Inc()
		return errs.New(errs.Overloaded, "too many bytes are in flight on this node")
	}
	x.bytes += n
	return nil
}

// chargeBytes counts n bytes that are in memory already: answers. They make later requests wait their turn.
func (x *exchange) chargeBytes(n int64) {
	x.s.load.bytes.Add(n)
	x.bytes += n
}

// holdSlot takes one of the slots for commands. It is taken once the body is there: a client that sends slowly
// costs its bytes and no slot.
func (x *exchange) holdSlot() *errs.Error {
	l := &x.s.load
	if x.waits {
		x.slot = take(&l.waits, 1, l.waitsMax)
	} else {
		x.slot = take(&l.requests, 1, l.requestsMax)
	}
	if !x.slot {
		x.s.metrics.refused.requests.Inc()
		return errs.New(errs.Overloaded, "too many requests are in flight on this node")
	}
	return nil
}

// release gives back what the request holds.
func (x *exchange) release() {
	l := &x.s.load
	if x.bytes > 0 {
		l.bytes.Add(-x.bytes)
	}
	if x.slot {
		if x.waits {
			l.waits.Add(-1)
		} else {
			l.requests.Add(-1)
		}
	}
}

// buffer is a byte slice that is used again. It holds nothing that outlives the request.
type buffer struct{ b []byte }

// Two pools, so that a small answer does not keep a large buffer alive.
var smallBuffers, largeBuffers sync.Pool

const (
	smallBuffer = 4 << 10
	// largeBufferMax bounds what is kept: a batch of the size that is efficient. Larger ones are garbage.
	largeBufferMax = 512 << 10
)

// getBuffer returns an empty buffer that can hold size bytes without growing.
func getBuffer(size int) *buffer {
	pool := &smallBuffers
	if size > smallBuffer {
		pool = &largeBuffers
	}
	buf, _ := pool.Get().(*buffer)
	if buf == nil {
		buf = new(buffer)
	}
	if cap(buf.b) < size {
		buf.b = make([]byte, 0, max(size, smallBuffer))
	}
	return buf
}

func putBuffer(buf *buffer) {
	buf.b = buf.b[:0]
	switch c := cap(buf.b); {
	case c <= 2*smallBuffer:
		smallBuffers.Put(buf)
	case c <= largeBufferMax:
		largeBuffers.Put(buf)
	}
}
