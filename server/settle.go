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
	seconds, e := parseExtend(buf.b)
	if e != nil {
		x.fail(e)
		return
	}
	visibility := time.Duration(seconds) * time.Second
	if e := x.settle(engine.Settle{Op: engine.Extend, Visibility: visibility}); e != nil {
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

// parseExtend reads {"visibilityTimeoutSeconds": n}. Members it does not know are passed over; a member twice, a
// fraction, an exponent, and anything behind the object are refused.
func parseExtend(body []byte) (int64, *errs.Error) {
	const member = "visibilityTimeoutSeconds"
	malformed := errs.New(errs.InvalidBody, `the body must be {"%s": n} with a whole number from 0 to %d`, member, visibilityMax)
	// What clients send, without looking further.
	if rest, ok := bytes.CutPrefix(body, []byte(`{"`+member+`":`)); ok {
		if digits, ok := bytes.CutSuffix(rest, []byte("}")); ok {
			if v, ok := jsonInteger(string(bytes.Trim(digits, " \t\r\n"))); ok && v <= visibilityMax {
				return v, nil
			}
		}
	}
	if !utf8.Valid(body) {
		return 0, malformed
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	seen := make(map[string]bool)
	value, found := int64(0), false
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return 0, malformed
	}
	for dec.More() {
		t, err := dec.Token()
		name, ok := t.(string)
		if err != nil || !ok || seen[name] {
			return 0, malformed
		}
		seen[name] = true
		t, err = dec.Token()
		if err != nil {
			return 0, malformed
		}
		if name == member {
			n, ok := t.(json.Number)
			if !ok {
				return 0, malformed
			}
			if value, found = jsonInteger(n.String()); !found || value > visibilityMax {
				return 0, malformed
			}
			continue
		}
		if _, nested := t.(json.Delim); nested {
			return 0, malformed
		}
	}
	if _, err := dec.Token(); err != nil || !found { // the closing brace
		return 0, malformed
	}
	if _, err := dec.Token(); err != io.EOF {
		return 0, malformed
	}
	return value, nil
}

// jsonInteger reads a JSON number that is written as a whole one and is not negative.
func jsonInteger(s string) (int64, bool) {
	if len(s) > 1 && strings.HasPrefix(s, "0") {
		return 0, false
	}
	return decimal(s)
}
