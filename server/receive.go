package server

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"net/http"
	"strconv"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

const (
	visibilityMax     = int64(limits.VisibilityMax / time.Second)
	visibilityDefault = int64(limits.VisibilityDefault / time.Second)
	waitMax           = limits.WaitMax
	concurrencyMax    = 1<<31 - 1
)

// delivery is what the headers of a receive ask for.
type delivery struct {
	form        form
	max         int64
	visibility  int64
	concurrency int64
	deployment  string
	latest      bool
	wait        int64
}

// form is the form of an answer with messages.
type form uint8

const (
	formMultipart form = iota
	formNDJSON
	formFrames
)

// deliveryOf reads the headers of a receive, and of a receive by id, which takes fewer.
func deliveryOf(h http.Header, byID bool) (d delivery, e *errs.Error) {
	switch a := parseAccept(h["Accept"]); {
	case a.batch:
		d.form = formFrames
	case a.multipart:
		d.form = formMultipart
	case a.ndjson:
		d.form = formNDJSON
	default:
		return d, errs.Of(errs.NotAcceptable)
	}
	if d.visibility, e = numberOf(h, wire.HeaderVisibility, 0, visibilityMax, visibilityDefault); e != nil {
		return d, e
	}
	if d.concurrency, e = numberOf(h, wire.HeaderMaxConcurrency, 1, concurrencyMax, 0); e != nil {
		return d, e
	}
	value, present, e := one(h, wire.HeaderDeployment)
	if e != nil {
		return d, e
	}
	if present {
		if d.deployment, e = deploymentOf(value); e != nil {
			return d, e
		}
	}
	d.max = 1
	if byID {
		return d, nil
	}
	if d.max, e = numberOf(h, wire.HeaderMaxMessages, 1, limits.ReceiveMessagesMax, 1); e != nil {
		return d, e
	}
	if d.wait, e = numberOf(h, wire.HeaderWait, 0, int64(waitMax/time.Second), 0); e != nil {
		return d, e
	}
	if d.wait > 0 && d.visibility == 0 {
		return d, errs.New(errs.InvalidHeader, "%s: a peek (visibility 0) does not wait", wire.HeaderWait)
	}
	switch value, present, e = one(h, wire.HeaderCursorFallback); {
	case e != nil:
		return d, e
	case value == "latest":
		d.latest = true
	case present && value != "earliest":
		return d, errs.New(errs.InvalidHeader, "%s must be earliest or latest", wire.HeaderCursorFallback)
	}
	return d, nil
}

// receive answers POST /api/v3/topic/{topic}/consumer/{group}.
func (x *exchange) receive() {
	d, e := deliveryOf(x.r.Header, false)
	if e != nil {
		x.fail(e)
		return
	}
	if d.visibility == 0 {
		x.op = opPeek
		x.query(d, engine.Query{Kind: engine.QueryPeek, Topic: x.topic, Group: x.group, Max: int(d.max), Deployment: d.deployment})
		return
	}
	receive := engine.Receive{
		Topic: x.topic, Group: x.group, Max: int(d.max), Visibility: time.Duration(d.visibility) * time.Second,
		MaxConcurrency: int(d.concurrency), Deployment: d.deployment, Latest: d.latest,
	}
	proposal := raft.Proposal{Command: receive.AppendTo(make([]byte, 0, len(x.topic)+len(x.group)+len(d.deployment)+32))}
	if d.wait > 0 {
		x.op, x.waits = opReceiveWait, true
		proposal.Wait = time.Duration(d.wait) * time.Second
	}
	x.grant(d, proposal)
}

// receiveID answers POST /api/v3/topic/{topic}/consumer/{group}/id/{messageId}.
func (x *exchange) receiveID() {
	d, e := deliveryOf(x.r.Header, true)
	if e != nil {
		x.fail(e)
		return
	}
	sealer, e := x.sealer()
	if e != nil {
		x.fail(e)
		return
	}
	id, err := sealer.ParseMessageID(x.tail)
	if err != nil {
		x.fail(errs.From(err))
		return
	}
	if d.visibility == 0 {
		x.op = opPeek
		x.query(d, engine.Query{Kind: engine.QueryMessage, Topic: x.topic, Group: x.group, ID: id, Deployment: d.deployment, Max: 1})
		return
	}
	receive := engine.ReceiveID{
		Topic: x.topic, Group: x.group, ID: id, Visibility: time.Duration(d.visibility) * time.Second,
		MaxConcurrency: int(d.concurrency), Deployment: d.deployment,
	}
	x.grant(d, raft.Proposal{Command: receive.AppendTo(make([]byte, 0, len(x.topic)+len(x.group)+len(d.deployment)+64))})
}

// grant has a receive carried out and answers with what it was given.
func (x *exchange) grant(d delivery, p raft.Proposal) {
	if e := x.holdSlot(); e != nil {
		x.fail(e)
		return
	}
	ctx, cancel := context.WithTimeout(x.r.Context(), x.s.limits.RequestTimeout+p.Wait)
	defer cancel()
	if p.Wait > 0 {
		p.Stop = x.s.drained.Done()
	}
	reply, err := x.s.backend.Propose(ctx, p)
	switch {
	case err == nil && reply.Code == errs.OK && len(reply.Deliveries) == 0 && p.Wait > 0 && x.s.Draining():
		x.fail(errs.New(errs.Draining, "the node is stopping and the wait for messages was cut short"))
		return
	case err != nil:
		x.fail(errs.From(err))
		return
	case reply.Code != errs.OK:
		e := x.resultError(&reply.Result)
		if e.Code == errs.ConcurrencyLimit && d.concurrency > 0 {
			e.Fields["maxConcurrency"] = d.concurrency
		}
		x.fail(e)
		return
	}
	x.deliver(d.form, reply.Deliveries)
}

// query answers a peek.
func (x *exchange) query(d delivery, q engine.Query) {
	if e := x.holdSlot(); e != nil {
		x.fail(e)
		return
	}
	ctx, cancel := x.commandContext()
	defer cancel()
	answer, err := x.s.backend.Query(ctx, q)
	if err != nil {
		x.fail(errs.From(err))
		return
	}
	x.deliver(d.form, answer.Messages)
}

// flushAfter is how many bytes may wait for company: an answer of small messages is one write, a large message is
// on its way before the next one is touched.
const flushAfter = 16 << 10

// deliver writes messages in one of the three forms, each part as soon as there is enough to send.
func (x *exchange) deliver(f form, messages []engine.Delivery) {
	n := 0
	size := int64(0)
	for i := range messages {
		// A message that expired between the grant and now must not be shown.
		if !messages[i].Gone {
			n++
			if messages[i].Large != nil {
				size += largeMemory
			}
			size += int64(len(messages[i].Body))
		}
	}
	h := x.w.Header()
	h[wire.HeaderRequestID] = []string{x.requestID()}
	if n == 0 {
		x.w.WriteHeader(http.StatusNoContent)
		return
	}
	sealer, e := x.sealer()
	if e != nil {
		x.fail(e)
		return
	}
	x.chargeBytes(size)
	h["Cache-Control"] = noStore
	h["X-Content-Type-Options"] = noSniff
	m := messageWriter{x: x, f: f, sealer: sealer, buf: getBuffer(smallBuffer)}
	defer putBuffer(m.buf)
	switch f {
	case formMultipart:
		m.boundary = newBoundary()
		h["Content-Type"] = []string{mediaMultipart + "; boundary=" + m.boundary}
	case formNDJSON:
		h["Content-Type"] = ndjsonType
	case formFrames:
		h["Content-Type"] = batchType
	}
	x.writeDeadline(size)
	for i := range messages {
		if messages[i].Gone {
			continue
		}
		if err := m.write(&messages[i]); err != nil {
			x.outcome = outcomeGone
			return
		}
	}
	if err := m.end(); err != nil {
		x.outcome = outcomeGone
	}
}

// newBoundary returns a boundary that no payload can have known: 128 random bits, fresh for each answer.
func newBoundary() string {
	var random [16]byte
	rand.Read(random[:])
	text := append(make([]byte, 0, 40), "tercet-"...)
	return string(hex.AppendEncode(text, random[:]))
}

// messageWriter writes the messages of one answer.
type messageWriter struct {
	x        *exchange
	f        form
	sealer   *engine.Sealer
	boundary string
	buf      *buffer
	written  int
	head     []byte
	// sent is set once part of the answer was handed over.
	sent bool
}

// write writes one message.
func (m *messageWriter) write(d *engine.Delivery) error {
	m.written++
	b := m.buf.b
	switch m.f {
	case formMultipart:
		if m.written > 1 {
			b = append(b, '\r', '\n')
		}
		b = append(b, '-', '-')
		b = append(b, m.boundary...)
		b = append(b, '\r', '\n')
		b = m.appendHead(b, d, "\r\n")
		b = append(b, '\r', '\n')
	case formFrames:
		m.head = m.appendHead(m.head[:0], d, "\n")
		size := len(d.Body)
		if d.Large != nil {
			size = int(d.Large.Bytes)
		}
		b = wire.AppendFrameHead(b, m.head, size)
	case formNDJSON:
		b = m.appendLine(b, d)
	}
	if d.Large != nil {
		m.buf.b = b
		return m.writeLarge(d)
	}
	if m.f == formNDJSON {
		m.buf.b = b
		return m.flush(false)
	}
	if len(d.Body) < flushAfter {
		m.buf.b = append(b, d.Body...)
		return m.flush(false)
	}
	// A large body goes to the connection from where it is.
	m.buf.b = b
	if err := m.flush(true); err != nil {
		return err
	}
	if _, err := m.x.w.Write(d.Body); err != nil {
		return err
	}
	return http.NewResponseController(m.x.w).Flush()
}

// flush hands over what is buffered once it is worth it, or in any case.
func (m *messageWriter) flush(always bool) error {
	if len(m.buf.b) < flushAfter && !always || len(m.buf.b) == 0 {
		return nil
	}
	m.sent = true
	_, err := m.x.w.Write(m.buf.b)
	m.buf.b = m.buf.b[:0]
	if err != nil || always {
		return err
	}
	return http.NewResponseController(m.x.w).Flush()
}

// end closes the answer. Nothing may follow the last delimiter of a multipart answer, not even a line end: the
// public client's parser takes it for an error when it arrives in a packet of its own.
func (m *messageWriter) end() error {
	b := m.buf.b
	if m.f == formMultipart {
		b = append(b, "\r\n--"...)
		b = append(b, m.boundary...)
		b = append(b, '-', '-')
	}
	m.buf.b = b
	if !m.sent {
		// The whole answer at once: no chunks.
		m.x.w.Header()["Content-Length"] = []string{strconv.Itoa(len(b))}
	}
	return m.flush(true)
}

// appendHead appends the headers of a part, each line ended by eol.
func (m *messageWriter) appendHead(b []byte, d *engine.Delivery, eol string) []byte {
	line := func(name, value string) {
		b = append(b, name...)
		b = append(b, ':', ' ')
		b = append(b, value...)
		b = append(b, eol...)
	}
	line("Content-Type", contentType(d))
	line(wire.HeaderMessageID, m.sealer.MessageID(d.ID))
	line(wire.HeaderReceipt, m.sealer.Receipt(d.Receipt))
	b = append(b, wire.HeaderDeliveryCount+": "...)
	b = strconv.AppendUint(b, uint64(d.Count), 10)
	b = append(b, eol...)
	b = append(b, wire.HeaderTimestamp+": "...)
	b = wire.AppendTime(b, d.PublishedAt)
	b = append(b, eol...)
	if d.ExpiresAt > 0 {
		b = append(b, wire.HeaderExpiresAt+": "...)
		b = wire.AppendTime(b, d.ExpiresAt)
		b = append(b, eol...)
	}
	for _, h := range d.Headers {
		// What was checked on the way in is checked again on the way out: the other protocol stores here too.
		if validToken(h.Name) && validValue(h.Value) {
			line(h.Name, h.Value)
		}
	}
	return b
}

// contentType is the message's content type, or the default for one that could break the answer's form.
func contentType(d *engine.Delivery) string {
	if d.ContentType == "" || !validValue(d.ContentType) {
		return wire.MediaOctets
	}
	return d.ContentType
}

// appendLine appends a message as a line of JSON.
func (m *messageWriter) appendLine(b []byte, d *engine.Delivery) []byte {
	b = append(b, `{"messageId":"`...)
	b = append(b, m.sealer.MessageID(d.ID)...)
	b = append(b, `","receiptHandle":"`...)
	b = append(b, m.sealer.Receipt(d.Receipt)...)
	b = append(b, `","deliveryCount":`...)
	b = strconv.AppendUint(b, uint64(d.Count), 10)
	b = append(b, `,"timestamp":"`...)
	b = wire.AppendTime(b, d.PublishedAt)
	if d.ExpiresAt > 0 {
		b = append(b, `","expiresAt":"`...)
		b = wire.AppendTime(b, d.ExpiresAt)
	}
	b = append(b, `","contentType":`...)
	b = appendJSON(b, contentType(d))
	if len(d.Headers) > 0 {
		b = append(b, `,"headers":{`...)
		for i, h := range d.Headers {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendJSON(b, h.Name)
			b = append(b, ':')
			b = appendJSON(b, h.Value)
		}
		b = append(b, '}')
	}
	b = append(b, `,"body":"`...)
	if d.Large != nil {
		return b // the body follows in parts
	}
	b = base64.StdEncoding.AppendEncode(b, d.Body)
	return append(b, '"', '}', '\n')
}
