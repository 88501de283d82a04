package server

import (
	"bytes"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

// Bounds in seconds.
const (
	retentionMin     = int64(limits.RetentionMin / time.Second)
	retentionMax     = int64(limits.RetentionMax / time.Second)
	retentionDefault = int64(limits.RetentionDefault / time.Second)
	delayMax         = int64(limits.DelayMax / time.Second)
)

// send answers POST /api/v3/topic/{topic}: one message.
func (x *exchange) send() {
	h := x.r.Header
	require, e := requireOf(h)
	if e != nil {
		x.fail(e)
		return
	}
	msg, e := messageOf(h)
	if e != nil {
		x.fail(e)
		return
	}
	if x.r.ContentLength > limits.MessageBytesMax {
		x.sendLarge(msg, nil, require)
		return
	}
	buf := getBuffer(int(min(max(x.r.ContentLength, 0), bodyPiece)))
	defer putBuffer(buf)
	buf.b, e = x.readBody(buf.b, limits.MessageBytesMax)
	if e != nil && e.Code == errs.MessageTooLarge {
		// A body of unknown length that turns out to be large: what has been read is its beginning.
		x.close = false
		x.sendLarge(msg, buf.b, require)
		return
	}
	if e != nil {
		x.fail(e)
		return
	}
	if e := x.meter(len(buf.b)); e != nil {
		x.fail(e)
		return
	}
	msg.Body = buf.b
	publish := engine.Publish{Topic: x.topic, Messages: []engine.NewMessage{msg}}
	size := len(x.topic) + len(msg.ContentType) + len(msg.Key) + len(msg.Deployment) + len(msg.Body) + 64
	for _, h := range msg.Headers {
		size += len(h.Name) + len(h.Value) + 6
	}
	reply, e := x.publish(publish.AppendTo(make([]byte, 0, size)), require)
	if e != nil {
		x.fail(e)
		return
	}
	buf.b = x.answerSent(reply, buf.b)
}

// answerSent answers a send. The buffer may be the request's body, which nobody reads any more.
func (x *exchange) answerSent(reply raft.Reply, buf []byte) []byte {
	sealer, e := x.sealer()
	if e != nil {
		x.fail(e)
		return buf
	}
	out := x.published(reply, 2)
	id := sealer.MessageID(reply.Published.ID(0))
	out.set(wire.HeaderMessageID, id)
	out.set(wire.HeaderRequestID, x.requestID())
	x.w.Header()["Content-Type"] = jsonType
	x.w.WriteHeader(http.StatusCreated)
	body := append(buf[:0], `{"messageId":"`...)
	body = append(body, id...)
	body = append(body, '"', '}')
	x.w.Write(body)
	return body
}

// publish has a publish command carried out.
func (x *exchange) publish(command []byte, require raft.Require) (raft.Reply, *errs.Error) {
	if e := x.holdSlot(); e != nil {
		return raft.Reply{}, e
	}
	return x.propose(raft.Proposal{Command: command, Require: require})
}

// propose has a command carried out within the request's time. A refusal by the engine is returned as an error.
func (x *exchange) propose(p raft.Proposal) (raft.Reply, *errs.Error) {
	ctx, cancel := x.commandContext()
	defer cancel()
	reply, err := x.s.backend.Propose(ctx, p)
	if err != nil {
		return reply, errs.From(err)
	}
	if reply.Code != errs.OK {
		return reply, x.resultError(&reply.Result)
	}
	return reply, nil
}

// sealer returns what turns message IDs and receipts into text. It changes only when a node first learns the
// secret.
func (x *exchange) sealer() (*engine.Sealer, *errs.Error) {
	secret := x.s.backend.Secret()
	if k := x.s.keyed.Load(); k != nil && bytes.Equal(k.secret, secret) {
		return k.sealer, nil
	}
	if len(secret) == 0 {
		return nil, errs.New(errs.NoLeader, "this node has not met its cluster yet")
	}
	k := &keyed{secret: bytes.Clone(secret), sealer: engine.NewSealer(secret)}
	x.s.keyed.Store(k)
	return k.sealer, nil
}

// keyed is a Sealer and the secret it was made with.
type keyed struct {
	secret []byte
	sealer *engine.Sealer
}

// resultError is the error of a result that refuses.
func (x *exchange) resultError(r *engine.Result) *errs.Error {
	e := errs.Of(r.Code)
	e.RetryAfter = r.RetryAfter
	switch r.Code {
	case errs.ConcurrencyLimit, errs.UnsettledLimit:
		e.Fields = map[string]any{"currentInflight": r.Inflight}
	case errs.Duplicate:
		if sealer, e2 := x.sealer(); e2 == nil {
			e.Fields = map[string]any{"originalMessageId": sealer.MessageID(r.Original)}
		}
	case errs.ExtendPastExpiry:
		e.Fields = map[string]any{"messageExpiresAt": string(wire.AppendTime(nil, r.ExpiresAt))}
	}
	return e
}

// headerSetter sets answer headers whose values share one backing array.
type headerSetter struct {
	h      http.Header
	values []string
}

func (s *headerSetter) set(name, value string) {
	n := len(s.values)
	s.values = append(s.values, value)
	s.h[name] = s.values[n : n+1 : n+1]
}

// published sets the headers that say where a publish is, and leaves room for more.
func (x *exchange) published(reply raft.Reply, more int) headerSetter {
	x.s.metrics.published(reply.Zones, int(reply.Published.Count))
	return x.proof(reply, more)
}

// proof is published without counting it.
func (x *exchange) proof(reply raft.Reply, more int) headerSetter {
	out := headerSetter{h: x.w.Header(), values: make([]string, 0, 3+more)}
	if x.s.worth != "" {
		out.set(wire.HeaderDurability, x.s.worth)
	} else {
		out.set(wire.HeaderZones, strconv.Itoa(reply.Zones))
		out.set(wire.HeaderPosition, strconv.FormatUint(reply.Published.Index, 10))
		out.set(wire.HeaderTerm, strconv.FormatUint(reply.Term, 10))
	}
	return out
}

// requireOf reads Tercet-Durability.
func requireOf(h http.Header) (raft.Require, *errs.Error) {
	value, present, e := one(h, wire.HeaderDurability)
	switch {
	case e != nil:
		return 0, e
	case !present, value == "in-sync":
		return raft.Default, nil
	case value == "all":
		return raft.AllZones, nil
	}
	return 0, errs.New(errs.InvalidHeader, "%s must be all or in-sync", wire.HeaderDurability)
}

// messageOf reads what the request's headers say of a message. The body is left empty.
func messageOf(h http.Header) (engine.NewMessage, *errs.Error) {
	var p messageHead
	p.init()
	for name, values := range h {
		switch name {
		case "Content-Type", wire.HeaderRetention, wire.HeaderDelay, wire.HeaderIdempotencyKey, wire.HeaderDeployment:
			value, _, e := one(h, name)
			if e != nil {
				return p.msg, e
			}
			if e := p.set(name, value); e != nil {
				return p.msg, e
			}
		default:
			if !stored(name) {
				continue
			}
			name = strings.ToLower(name)
			for _, value := range values {
				if e := p.keep(name, value); e != nil {
					return p.msg, e
				}
			}
		}
	}
	if len(p.msg.Headers) > 1 {
		// The order on the wire is lost in the map; a fixed one keeps equal requests equal.
		slices.SortStableFunc(p.msg.Headers, func(a, b engine.Header) int { return strings.Compare(a.Name, b.Name) })
	}
	return p.msg, p.check()
}

// messageHead collects a message's headers, from a request or from a part of a batch.
type messageHead struct {
	msg       engine.NewMessage
	bytes     int // of the kept headers
	delay     int64
	retention int64 // seconds
	typed     bool
	// retained is set when the retention was named; else it is the topic's.
	retained bool
}

func (p *messageHead) init() { *p = messageHead{retention: retentionDefault} }

// set takes one of the headers with a meaning, by its canonical name.
func (p *messageHead) set(name, value string) (e *errs.Error) {
	switch name {
	case "Content-Type":
		if e := checkContentType(value); e != nil {
			return e
		}
		p.msg.ContentType, p.typed = value, true
	case wire.HeaderRetention:
		p.retention, e = number(name, value, retentionMin, retentionMax)
		p.retained = true
	case wire.HeaderDelay:
		p.delay, e = number(name, value, 0, delayMax)
	case wire.HeaderIdempotencyKey:
		if len(value) == 0 || len(value) > limits.IdempotencyKeyBytesMax || !validValue(value) {
			return errs.New(errs.InvalidHeader, "%s must have 1 to %d characters and no control characters", name, limits.IdempotencyKeyBytesMax)
		}
		p.msg.Key = value
	case wire.HeaderDeployment:
		p.msg.Deployment, e = deploymentOf(value)
	}
	return e
}

func deploymentOf(value string) (string, *errs.Error) {
	if !validName(value) {
		return "", errs.New(errs.InvalidHeader, "%s must have 1 to %d characters out of A-Z a-z 0-9 _ -", wire.HeaderDeployment, limits.NameBytesMax)
	}
	return value, nil
}

// keep takes an application header, by its name in lower case.
func (p *messageHead) keep(name, value string) *errs.Error {
	p.bytes += len(name) + len(value)
	if p.bytes > limits.HeaderBytesMax {
		return errs.New(errs.InvalidHeader, "the message's headers have more than %d bytes", limits.HeaderBytesMax)
	}
	if len(p.msg.Headers) == messageHeadersMax {
		return errs.New(errs.InvalidHeader, "the message has more than %d headers", messageHeadersMax)
	}
	p.msg.Headers = append(p.msg.Headers, engine.Header{Name: name, Value: value})
	return nil
}

// messageHeadersMax bounds the application headers of one message.
const messageHeadersMax = 128

// check completes the message once all headers are known.
func (p *messageHead) check() *errs.Error {
	if p.delay > p.retention {
		return errs.New(errs.InvalidHeader, "%s is longer than the retention of %d seconds", wire.HeaderDelay, p.retention)
	}
	if !p.typed {
		p.msg.ContentType = wire.MediaOctets
	}
	if p.msg.RetentionDefault = !p.retained; p.retained {
		p.msg.Retention = time.Duration(p.retention) * time.Second
	}
	p.msg.Delay = time.Duration(p.delay) * time.Second
	return nil
}
