package server

import (
	"context"
	"encoding/base64"
	"hash/crc32"
	"io"
	"net/http"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// largeMemory is what one message in parts holds of the budget: the part that is being read, and the one that travels.
const largeMemory = 2 * limits.PartBytes

// abortPatience is how long the dropping of an upload may take. One that is not dropped ends by its deadline.
const abortPatience = 5 * time.Second

// partLoader is a Backend that has messages in parts.
type partLoader interface {
	LoadPart(ctx context.Context, d *engine.Delivery, number uint32) ([]byte, error)
}

// sendLarge sends a message that does not fit one command: in parts, one in flight at a time, so that the memory it
// takes does not depend on its size. begun is what has been read of the body; the rest follows from the connection.
// Nothing is visible before the commit, so whatever goes wrong earlier has not happened.
func (x *exchange) sendLarge(msg engine.NewMessage, begun []byte, require raft.Require) {
	u := upload{x: x, require: require, msg: msg, from: x.r.Body, length: x.r.ContentLength, client: true}
	if e := u.run(begun); e != nil {
		x.writeDeadline(0)
		x.fail(e)
		return
	}
	x.writeDeadline(0)
	x.answerSent(u.reply, make([]byte, 0, 128))
}

// upload is one message on its way into the cluster.
type upload struct {
	x       *exchange
	require raft.Require
	msg     engine.NewMessage
	// from is where the body comes from and length how long it is, -1 for unknown. client tells that it comes from the
	// connection, which cannot be used any more unless all of it was read.
	from   io.Reader
	length int64
	client bool

	id         uint64
	parts      uint32
	bytes      int64
	crc        uint32
	committing bool
	reply      raft.Reply
}

func (u *upload) run(begun []byte) *errs.Error {
	x := u.x
	if length := x.r.ContentLength; length > x.s.largeMax {
		x.close = true
		return errs.New(errs.MessageTooLarge, "the body has %d bytes and may have %d", length, x.s.largeMax)
	} else if length > 0 {
		if e := x.meter(int(length)); e != nil {
			x.close = true
			return e
		}
	}
	if e := x.holdBytes(largeMemory); e != nil {
		x.close = true
		return e
	}
	if e := x.holdSlot(); e != nil {
		x.close = true
		return e
	}
	return u.store(begun)
}

// store stores the message, or leaves nothing of it behind.
func (u *upload) store(begun []byte) *errs.Error {
	e := u.steps(begun)
	if e != nil && u.id != 0 && !u.committing {
		u.abort()
	}
	return e
}

func (u *upload) steps(begun []byte) *errs.Error {
	x := u.x
	reply, e := u.propose(&engine.UploadOpen{Topic: x.topic, Key: u.msg.Key, Deployment: u.msg.Deployment}, raft.Majority)
	if e != nil {
		x.close = x.close || u.client
		return u.nothing(e)
	}
	if reply.Published.Count == 1 {
		// The key is known: there is nothing to store, and the client is to have its answer once it has sent all.
		u.reply = reply
		if !u.client {
			return nil
		}
		return u.discard()
	}
	u.id = reply.Upload
	if e := u.body(begun); e != nil {
		x.close = x.close || u.client
		return e
	}
	if u.client && u.length < 0 {
		if e := x.meter(int(u.bytes)); e != nil {
			return e
		}
	}
	u.committing = true
	u.reply, e = u.propose(&engine.UploadCommit{Upload: u.id, Message: u.msg, Parts: u.parts, Bytes: u.bytes, CRC: u.crc}, u.require)
	if e != nil && e.Outcome() == errs.None {
		u.committing = false
	}
	return e
}

// propose has one command of the upload carried out.
func (u *upload) propose(c engine.Command, require raft.Require) (raft.Reply, *errs.Error) {
	return u.x.propose(raft.Proposal{Command: c.AppendTo(nil), Require: require})
}

// nothing turns an unknown outcome of a step before the commit into what it means for the message: it is not there.
func (u *upload) nothing(e *errs.Error) *errs.Error {
	if e.Outcome() == errs.Unknown {
		return errs.New(errs.Overloaded, "the message could not be stored in parts").With(e)
	}
	return e
}

// body reads the body and sends it part by part.
func (u *upload) body(begun []byte) *errs.Error {
	part := make([]byte, 0, limits.PartBytes)
	for ended := false; !ended; {
		n := min(len(begun), limits.PartBytes-len(part))
		part, begun = append(part, begun[:n]...), begun[n:]
		since := time.Now()
		u.pace(since, len(part))
		for len(part) < limits.PartBytes && !ended {
			n, err := u.from.Read(part[len(part):limits.PartBytes])
			part = part[:len(part)+n]
			if err == io.EOF {
				ended = true
			} else if err != nil && !u.client {
				return errs.New(errs.Internal, "a batch that was put aside cannot be read").With(err)
			} else if err != nil {
				return bodyError(err)
			}
			u.pace(since, len(part))
		}
		if u.bytes+int64(len(part)) > u.x.s.largeMax {
			return errs.New(errs.MessageTooLarge, "the body has more than %d bytes", u.x.s.largeMax)
		}
		if ended && u.length >= 0 && u.bytes+int64(len(part)) != u.length {
			return bodyError(io.ErrUnexpectedEOF)
		}
		if len(part) == 0 {
			break
		}
		if _, e := u.propose(&engine.UploadPart{Upload: u.id, Number: u.parts, Data: part}, raft.Majority); e != nil {
			return u.nothing(e)
		}
		u.parts++
		u.bytes += int64(len(part))
		u.crc = crc32.Update(u.crc, castagnoli, part)
		part = part[:0]
	}
	return nil
}

// pace holds the client to the minimum rate, part by part: the time that the cluster takes is not the client's, and a
// client that stops is let go of before its upload ends by itself.
func (u *upload) pace(since time.Time, got int) {
	if !u.client {
		return
	}
	l := &u.x.s.limits
	need := time.Duration(got) * time.Second / time.Duration(l.TransferRate)
	u.x.readDeadline(since.Add(l.TransferGrace + need))
}

// discard reads the rest of the body and forgets it.
func (u *upload) discard() *errs.Error {
	buf := getBuffer(bodyPacedBuffer)
	defer putBuffer(buf)
	for {
		u.pace(time.Now(), 0)
		n, err := u.x.r.Body.Read(buf.b[:cap(buf.b)])
		if u.bytes += int64(n); u.bytes > u.x.s.largeMax {
			u.x.close = true
			return errs.New(errs.MessageTooLarge, "the body has more than %d bytes", u.x.s.largeMax)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			u.x.close = true
			return bodyError(err)
		}
	}
}

// bodyPacedBuffer is the buffer of a body that is read and forgotten.
const bodyPacedBuffer = 32 << 10

// abort drops the upload, whether or not the client is still there.
func (u *upload) abort() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(u.x.r.Context()), abortPatience)
	defer cancel()
	command := engine.UploadAbort{Upload: u.id}
	reply, err := u.x.s.backend.Propose(ctx, raft.Proposal{Command: command.AppendTo(nil), Require: raft.Majority})
	if err == nil && reply.Code != errs.OK && reply.Code != errs.UploadNotFound {
		err = errs.Of(reply.Code)
	}
	if err != nil {
		u.x.s.log.Debug("an upload that broke off ends by its deadline", "request_id", u.x.requestID(), "error", err)
	}
}

// largeBody writes the body of a message in parts to w, and reports whether it was all there and what it should be. The
// memory it takes does not depend on its size.
func (m *messageWriter) largeBody(w io.Writer, d *engine.Delivery) error {
	parts, ok := m.x.s.backend.(partLoader)
	if !ok {
		return errs.New(errs.Unsupported, "messages in parts cannot be read here")
	}
	crc, bytes := uint32(0), int64(0)
	for number := range d.Large.Parts {
		ctx, cancel := m.x.commandContext()
		part, err := parts.LoadPart(ctx, d, number)
		cancel()
		if err != nil {
			return err
		}
		m.x.writeDeadline(int64(len(part)))
		crc = crc32.Update(crc, castagnoli, part)
		bytes += int64(len(part))
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
	if crc != d.Large.CRC || bytes != d.Large.Bytes {
		return errs.New(errs.Internal, "the parts of a large message are not what was sent")
	}
	return nil
}

// writeLarge writes a message in parts whose head is in the buffer. An error in the middle of it ends the connection:
// the client must not take what it has for the whole.
func (m *messageWriter) writeLarge(d *engine.Delivery) error {
	if err := m.flush(true); err != nil {
		return err
	}
	m.sent = true
	var err error
	if m.f == formNDJSON {
		enc := base64.NewEncoder(base64.StdEncoding, m.x.w)
		if err = m.largeBody(enc, d); err == nil {
			err = enc.Close()
		}
		m.buf.b = append(m.buf.b, '"', '}', '\n')
	} else {
		err = m.largeBody(m.x.w, d)
	}
	if err != nil {
		if m.x.r.Context().Err() == nil {
			m.x.s.log.Warn("a large message could not be sent whole", "request_id", m.x.requestID(), "error", err)
		}
		m.x.aborted = true
		return err
	}
	return http.NewResponseController(m.x.w).Flush()
}
