package server

import (
	"bytes"
	"io"
	"os"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
)

// A batch that is larger than what one entry takes is put aside in a file until it is known to be whole, and then stored
// in several steps. The file has no name, so that nothing of it outlives the process.

const (
	// spoolsMax bounds the batches that are put aside at a time: together they stay below a node's default reserve of disk.
	spoolsMax = 8
	// spoolWindow is how much of one is looked at at a time.
	spoolWindow = 64 << 10
	// severalBytes is about how much of such a batch one entry takes: publishes beside it do not wait long for theirs.
	severalBytes = 512 << 10
	// spoolMemory is what such a batch holds of the budget: bodies, the command made of them, and a window.
	spoolMemory = 2*(severalBytes+limits.MessageBytesMax) + spoolWindow
)

// extent is where something stands in the body of a batch.
type extent struct{ from, to int64 }

func (x extent) len() int64 { return x.to - x.from }

// source is the body of a batch.
type source interface {
	size() int64
	// index tells where needle stands in [from, to) first, -1 if it does not.
	index(from, to int64, needle []byte) (int64, *errs.Error)
	// bytes returns what stands in [from, to), which is little. It is not to be changed.
	bytes(from, to int64) ([]byte, *errs.Error)
	// reader returns a reader of what stands there.
	reader(at extent) io.Reader
}

// memory is a body that is in memory.
type memory []byte

func (m memory) size() int64 { return int64(len(m)) }

func (m memory) index(from, to int64, needle []byte) (int64, *errs.Error) {
	i := bytes.Index(m[from:to], needle)
	if i < 0 {
		return -1, nil
	}
	return from + int64(i), nil
}

func (m memory) bytes(from, to int64) ([]byte, *errs.Error) { return m[from:to:to], nil }

func (m memory) reader(at extent) io.Reader { return bytes.NewReader(m[at.from:at.to]) }

// spool is a body that was put aside.
type spool struct {
	f      *os.File
	length int64
	window []byte
}

func (s *spool) size() int64 { return s.length }

func (s *spool) readAt(b []byte, from int64) *errs.Error {
	if _, err := s.f.ReadAt(b, from); err != nil {
		return errs.New(errs.Internal, "a batch that was put aside cannot be read").With(err)
	}
	return nil
}

func (s *spool) index(from, to int64, needle []byte) (int64, *errs.Error) {
	for from+int64(len(needle)) <= to {
		b := s.window[:min(int64(len(s.window)), to-from)]
		if e := s.readAt(b, from); e != nil {
			return 0, e
		}
		if i := bytes.Index(b, needle); i >= 0 {
			return from + int64(i), nil
		}
		from += int64(len(b) - len(needle) + 1)
	}
	return -1, nil
}

func (s *spool) bytes(from, to int64) ([]byte, *errs.Error) {
	b := make([]byte, to-from)
	return b, s.readAt(b, from)
}

func (s *spool) reader(at extent) io.Reader { return io.NewSectionReader(s.f, at.from, at.len()) }

// sendSpooled goes on with a batch that is not held in memory. begun is what has been read of the body.
func (x *exchange) sendSpooled(b *batch, begun []byte, boundary string, require raft.Require) {
	load := &x.s.load
	if !take(&load.spooled, 1, spoolsMax) {
		x.s.metrics.refused.bytes.Inc()
		x.close = true
		x.fail(errs.New(errs.Overloaded, "this node is receiving %d large batches", spoolsMax))
		return
	}
	defer load.spooled.Add(-1)
	src, e := x.spool(begun)
	if e != nil {
		x.close = true
		x.fail(e)
		return
	}
	defer src.f.Close()
	x.writeDeadline(0)
	if e = b.parse(src, boundary); e == nil {
		e = x.meter(int(src.length))
	}
	if e == nil {
		e = x.holdSlot()
	}
	if e == nil {
		e = x.storeSeveral(b, src, require)
	}
	x.writeDeadline(0)
	if e != nil {
		x.fail(e)
		return
	}
	buf := getBuffer(0)
	defer putBuffer(buf)
	x.answerBatch(b, buf)
}

// spool reads the body into a file.
func (x *exchange) spool(begun []byte) (*spool, *errs.Error) {
	if length := x.r.ContentLength; length > limits.LargeBatchBytesMax {
		return nil, errs.New(errs.MessageTooLarge, "the body has %d bytes and may have %d", length, limits.LargeBatchBytesMax)
	}
	if e := x.holdBytes(spoolMemory); e != nil {
		return nil, e
	}
	failed := func(err error) *errs.Error {
		return errs.New(errs.Overloaded, "the batch could not be put aside").With(err)
	}
	f, err := os.CreateTemp(x.s.spool, "batch-*")
	if err != nil {
		return nil, failed(err)
	}
	s := &spool{f: f, window: make([]byte, spoolWindow)}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, failed(err)
	}
	for piece, ended := begun, false; ; {
		if s.length += int64(len(piece)); s.length > limits.LargeBatchBytesMax {
			f.Close()
			return nil, errs.New(errs.MessageTooLarge, "the body has more than %d bytes", limits.LargeBatchBytesMax)
		}
		if _, err := f.Write(piece); err != nil {
			f.Close()
			return nil, failed(err)
		}
		if ended {
			break
		}
		got := time.Duration(s.length) * time.Second / time.Duration(x.s.limits.TransferRate)
		x.readDeadline(x.start.Add(x.s.limits.TransferGrace + got))
		n, err := x.r.Body.Read(s.window)
		if ended = err == io.EOF; err != nil && !ended {
			f.Close()
			return nil, bodyError(err)
		}
		piece = s.window[:n]
	}
	if x.r.ContentLength >= 0 && s.length != x.r.ContentLength {
		f.Close()
		return nil, bodyError(io.ErrUnexpectedEOF)
	}
	return s, nil
}

// large tells whether one of the messages has to be stored in parts.
func (b *batch) large() bool { return b.longest > limits.MessageBytesMax }

// retryable tells whether a message that failed may be sent again as it is.
func retryable(e *errs.Error) bool {
	status := e.Code.Info().Status
	return status == 429 || status >= 500
}

// storeSeveral stores the messages of a batch in order, in as many steps as it takes. When one fails, its messages and all
// behind it have failed; when that is the first one, so has the request. What was stored before stays, which a client
// that tries the others again, or all with keys, need not mind.
func (x *exchange) storeSeveral(b *batch, src source, require raft.Require) *errs.Error {
	var weakest raft.Reply
	step := func(reply raft.Reply) {
		x.s.metrics.published(reply.Zones, int(reply.Published.Count))
		if len(b.ids) == 0 || reply.Zones <= weakest.Zones {
			weakest = reply
		}
		for i := range int(reply.Published.Count) {
			b.ids = append(b.ids, reply.Published.ID(i))
		}
	}
	for at := 0; at < len(b.messages); at = len(b.ids) {
		var e *errs.Error
		if b.extents[at].len() > limits.MessageBytesMax {
			u := upload{x: x, require: require, msg: b.messages[at], from: src.reader(b.extents[at]), length: b.extents[at].len()}
			u.msg.Body = nil
			if e = u.store(nil); e == nil {
				step(u.reply)
			}
		} else {
			var reply raft.Reply
			if reply, e = x.storeSome(b, src, at, require); e == nil {
				step(reply)
			}
		}
		if e != nil && at == 0 {
			return e
		}
		if e != nil {
			b.failFrom(at, e)
			break
		}
	}
	if len(b.ids) > 0 {
		x.proof(weakest, 0)
	}
	return nil
}

// storeSome stores the messages from at on that go into one entry.
func (x *exchange) storeSome(b *batch, src source, at int, require raft.Require) (raft.Reply, *errs.Error) {
	end, bytes := at, int64(0)
	for end < len(b.messages) {
		n := b.extents[end].len()
		if n > limits.MessageBytesMax || end > at && bytes+n > severalBytes {
			break
		}
		bytes += n
		end++
	}
	bodies := make([]byte, 0, bytes)
	for i := at; i < end; i++ {
		from := len(bodies)
		bodies = bodies[:from+int(b.extents[i].len())]
		if _, err := io.ReadFull(src.reader(b.extents[i]), bodies[from:]); err != nil {
			return raft.Reply{}, errs.New(errs.Internal, "a batch that was put aside cannot be read").With(err)
		}
		b.messages[i].Body = bodies[from:len(bodies):len(bodies)]
	}
	publish := engine.Publish{Topic: x.topic, Messages: b.messages[at:end]}
	reply, e := x.propose(raft.Proposal{Command: publish.AppendTo(make([]byte, 0, len(bodies)+(end-at)*64+len(x.topic)+16)), Require: require})
	for i := at; i < end; i++ {
		b.messages[i].Body = nil
	}
	return reply, e
}

// failFrom says of the messages from the given one on that they have failed.
func (b *batch) failFrom(at int, e *errs.Error) {
	sent := 0
	for i, verdict := range b.verdicts {
		if verdict != nil {
			continue
		}
		if sent >= at {
			b.verdicts[i] = e
		}
		sent++
	}
}
