package server

import (
	"errors"
	"io"
	"net/http"
	"os"
	"time"

	"tercet.dev/tercet/internal/errs"
)

// bodyPiece is how much memory a body gets before any of it has arrived. What comes with the head in one packet
// fits; a client that announces more has to send it to make us hold it.
const bodyPiece = 4 << 10

const bodyPacedAfter = 250 * time.Millisecond

// readBody appends the request's body to dst, whose capacity it may use, and refuses one above max bytes. The
// memory it takes follows what has arrived, not what was announced, and is taken from the budget of bytes.
//
// Time: until bodyPacedAfter has passed, the connection's deadline of Limits.BodyTimeout is all there is, and a body
// that arrives at once costs no timer; from then on the client is held to the minimum rate. net/http lifts the deadline
// at the end of the body.
func (x *exchange) readBody(dst []byte, max int) ([]byte, *errs.Error) {
	length := x.r.ContentLength
	if length > int64(max) {
		x.close = true
		return dst, errs.New(errs.MessageTooLarge, "the body has %d bytes and may have %d", length, max)
	}
	if length == 0 {
		return dst, nil
	}
	start := len(dst)
	room := bodyPiece
	if length > 0 {
		room = min(room, int(length))
	}
	if e := x.holdBytes(int64(room)); e != nil {
		return dst, e
	}
	if cap(dst)-len(dst) < room {
		dst = append(make([]byte, 0, len(dst)+room), dst...)
	}
	limit := start + room // how far dst may be filled without asking for more
	paced := false
	for {
		if len(dst) == limit {
			got := len(dst) - start
			if got == int(length) {
				break
			}
			if length < 0 && got > max {
				x.close = true
				return dst, errs.New(errs.MessageTooLarge, "the body has more than %d bytes", max)
			}
			more := 3 * got
			if length > 0 {
				more = min(more, int(length)-got)
			} else {
				more = min(more, max+1-got)
			}
			if e := x.holdBytes(int64(more)); e != nil {
				x.close = true
				return dst, e
			}
			if cap(dst) < limit+more {
				dst = append(make([]byte, 0, limit+more), dst...)
			}
			limit += more
		}
		n, err := x.r.Body.Read(dst[len(dst):limit])
		dst = dst[:len(dst)+n]
		if err == io.EOF {
			if got := len(dst) - start; length >= 0 && got != int(length) {
				err = io.ErrUnexpectedEOF
			} else if got > max {
				x.close = true
				return dst, errs.New(errs.MessageTooLarge, "the body has more than %d bytes", max)
			} else {
				break
			}
		}
		if err != nil {
			x.close = true
			return dst, bodyError(err)
		}
		if int64(len(dst)-start) == length {
			continue // the last read, for the end, does not wait
		}
		if paced = paced || time.Since(x.start) > bodyPacedAfter; paced {
			got := time.Duration(len(dst)-start) * time.Second / time.Duration(x.s.limits.TransferRate)
			x.readDeadline(x.start.Add(x.s.limits.TransferGrace + got))
		}
	}
	return dst, nil
}

// readDeadline sets the connection's. It fails only where there is no connection, in tests of the handler.
func (x *exchange) readDeadline(t time.Time) {
	_ = http.NewResponseController(x.w).SetReadDeadline(t)
}

// writeDeadline gives the client the time it needs at the minimum rate to take n bytes.
func (x *exchange) writeDeadline(n int64) {
	l := &x.s.limits
	need := time.Duration(n) * time.Second / time.Duration(l.TransferRate)
	_ = http.NewResponseController(x.w).SetWriteDeadline(time.Now().Add(l.TransferGrace + need))
}

// bodyError tells what kept a body from arriving whole. Nothing of it was used.
func bodyError(err error) *errs.Error {
	if e, ok := errors.AsType[*errs.Error](err); ok {
		return e
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errs.New(errs.RequestTimeout, "the body did not arrive in time").With(err)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return errs.New(errs.BadRequest, "the body ended before its announced length").With(err)
	}
	return errs.New(errs.BadRequest, "the body could not be read").With(err)
}
