package server

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

// acknowledge answers DELETE /api/v3/topic/{topic}/consumer/{group}/lease/{receiptHandle}.
func (x *exchange) acknowledge() {
	if e := x.settle(engine.Settle{Op: engine.Acknowledge}); e != nil {
		x.fail(e)
		return
	}
	x.w.Header()[wire.HeaderRequestID] = []string{x.requestID()}
	x.w.WriteHeader(http.StatusNoContent)
}

// extendBodyMax bounds the body of a visibility change.
const extendBodyMax = 4 << 10

// extend answers PATCH on a lease, with and without /visibility.
func (x *exchange) extend() {
	buf := getBuffer(0)
	defer putBuffer(buf)
	var e *errs.Error
	if buf.b, e = x.readBody(buf.b, extendBodyMax); e != nil {
		x.fail(e)
		return
	}
	in, e := parseExtend(buf.b)
	if e != nil {
		x.fail(e)
		return
	}
	visibility := time.Duration(in.seconds) * time.Second
	settle := engine.Settle{Op: engine.Extend, Visibility: visibility}
	if in.release {
		settle.Op, settle.Reason = engine.Release, in.reason
	}
	if e := x.settle(settle); e != nil {
		if e.Code == errs.ExtendPastExpiry && e.Fields != nil {
			e.Fields["requestedExpiresAt"] = string(wire.AppendTime(nil, time.Now().Add(visibility).UnixMilli()))
		}
		x.fail(e)
		return
	}
	h := x.w.Header()
	h[wire.HeaderRequestID] = []string{x.requestID()}
	h["Content-Type"] = jsonType
	io.WriteString(x.w, `{"success":true}`)
}

// settle has the lease named in the path changed.
func (x *exchange) settle(s engine.Settle) *errs.Error {
	value, present, e := one(x.r.Header, wire.HeaderDeployment)
	if e != nil {
		return e
	}
	if present {
		if s.Deployment, e = deploymentOf(value); e != nil {
			return e
		}
	}
	sealer, e := x.sealer()
	if e != nil {
		return e
	}
	receipt, err := sealer.ParseReceipt(x.tail)
	if err != nil {
		return errs.From(err)
	}
	if receipt.Epoch == 0 {
		// A peek's handle: it never held anything (decision D10).
		return errs.Of(errs.LeaseExpired)
	}
	s.Topic, s.Group = x.topic, x.group
	receipts := [1]engine.Receipt{receipt}
	s.Receipts = receipts[:]
	if e := x.holdSlot(); e != nil {
		return e
	}
	reply, e := x.propose(raft.Proposal{Command: s.AppendTo(make([]byte, 0, len(x.topic)+len(x.group)+len(s.Deployment)+64))})
	if e != nil {
		return e
	}
	if len(reply.Codes) == 1 && reply.Codes[0] != errs.OK {
		reply.Code = reply.Codes[0]
		return x.resultError(&reply.Result)
	}
	return nil
}

// extension is what a visibility change asks for: another end of the lease, or with release its end now and the message
// again after that time.
type extension struct {
	seconds int64
	release bool
	// reason is why, kept as the message's last error for the group.
	reason string
}

// parseExtend reads {"visibilityTimeoutSeconds": n, "release": bool, "reason": text}, the latter two optional. Members it
// does not know are passed over; a member twice, a fraction, an exponent, and anything behind the object are refused.
func parseExtend(body []byte) (in extension, e *errs.Error) {
	const member = "visibilityTimeoutSeconds"
	malformed := errs.New(errs.InvalidBody, `the body must be {"%s": n} with a whole number from 0 to %d`, member, visibilityMax)
	// What clients send, without looking further.
	if rest, ok := bytes.CutPrefix(body, []byte(`{"`+member+`":`)); ok {
		if digits, ok := bytes.CutSuffix(rest, []byte("}")); ok {
			if v, ok := jsonInteger(string(bytes.Trim(digits, " \t\r\n"))); ok && v <= visibilityMax {
				return extension{seconds: v}, nil
			}
		}
	}
	if !utf8.Valid(body) {
		return in, malformed
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	seen := make(map[string]bool)
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return in, malformed
	}
	for dec.More() {
		t, err := dec.Token()
		name, ok := t.(string)
		if err != nil || !ok || seen[name] {
			return in, malformed
		}
		seen[name] = true
		t, err = dec.Token()
		if err != nil {
			return in, malformed
		}
		switch name {
		case member:
			n, ok := t.(json.Number)
			if ok {
				in.seconds, ok = jsonInteger(n.String())
			}
			if !ok || in.seconds > visibilityMax {
				return in, malformed
			}
		case "release":
			if in.release, ok = t.(bool); !ok {
				return in, errs.New(errs.InvalidBody, "release must be true or false")
			}
		case "reason":
			if in.reason, ok = t.(string); !ok || len(in.reason) > limits.ReasonBytesMax {
				return in, errs.New(errs.InvalidBody, "reason must be a text of at most %d bytes", limits.ReasonBytesMax)
			}
		default:
			if _, nested := t.(json.Delim); nested {
				return in, malformed
			}
		}
	}
	if _, err := dec.Token(); err != nil || !seen[member] { // the closing brace
		return in, malformed
	}
	if _, err := dec.Token(); err != io.EOF {
		return in, malformed
	}
	if in.reason != "" && !in.release {
		return in, errs.New(errs.InvalidBody, "a reason goes with \"release\": true")
	}
	return in, nil
}

// jsonInteger reads a JSON number that is written as a whole one and is not negative.
func jsonInteger(s string) (int64, bool) {
	if len(s) > 1 && strings.HasPrefix(s, "0") {
		return 0, false
	}
	return decimal(s)
}
