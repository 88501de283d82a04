package server

import (
	"bytes"
	"encoding/binary"
	"mime"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
	"sync"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

// Media types under the names that are used most.
const (
	mediaMultipart = wire.MediaMultipart
	mediaNDJSON    = wire.MediaNDJSON
	mediaBatch     = wire.MediaBatch
	mediaJSON      = wire.MediaJSON
)

// partHeadBytesMax bounds the head of one message in a batch.
const partHeadBytesMax = limits.HeaderBytesMax + 4<<10

// batch is the work space of one batch request. It is used again, so that a batch costs no allocation per message
// beyond the strings of its heads.
type batch struct {
	messages []engine.NewMessage
	// extents is where the bodies of messages stand in what was parsed, ids what they were given.
	extents []extent
	ids     []engine.MessageID
	// bodyMax bounds each body; 0 is the bound of those that fit one command. longest is what one has at most.
	bodyMax, longest int64
	// verdicts has one entry per message of the request: nil for one that is in messages.
	verdicts []*errs.Error

	base messageHead // what the request's own headers say of every message
	// head is the last message's head and parsed what it said: producers send the same head again and again.
	head   []byte
	parsed messageHead
	err    *errs.Error
}

var batches = sync.Pool{New: func() any { return new(batch) }}

func (b *batch) reset() {
	clear(b.messages)
	clear(b.verdicts)
	*b = batch{messages: b.messages[:0], extents: b.extents[:0], ids: b.ids[:0], verdicts: b.verdicts[:0]}
}

// sendBatch answers POST /api/v3/topic/{topic}/batch: 1 to 100 messages, which are judged one by one. What fits one entry is
// stored all together. A body that is malformed or ends early stores nothing.
func (x *exchange) sendBatch() {
	h := x.r.Header
	require, e := requireOf(h)
	if e != nil {
		x.fail(e)
		return
	}
	boundary, e := batchForm(h)
	if e != nil {
		x.fail(e)
		return
	}
	b := batches.Get().(*batch)
	defer func() { b.reset(); batches.Put(b) }()
	if e := b.defaults(h); e != nil {
		x.fail(e)
		return
	}
	b.bodyMax = x.s.batchBodyMax
	if x.s.spool != "" && x.r.ContentLength > limits.BatchBytesMax {
		x.sendSpooled(b, nil, boundary, require)
		return
	}
	// A batch of unknown length starts with a buffer that the last one may have left.
	buf := getBuffer(int(min(max(x.r.ContentLength, smallBuffer+1), largeBufferMax)))
	defer putBuffer(buf)
	buf.b, e = x.readBody(buf.b, limits.BatchBytesMax)
	if e != nil && e.Code == errs.MessageTooLarge && x.s.spool != "" {
		// A body of unknown length that turns out to be large: what has been read is its beginning.
		x.close = false
		x.sendSpooled(b, buf.b, boundary, require)
		return
	}
	if e == nil {
		e = b.parse(memory(buf.b), boundary)
	}
	if e == nil {
		e = x.meter(len(buf.b))
	}
	if e != nil {
		x.fail(e)
		return
	}
	switch {
	case b.large():
		if e := x.holdSlot(); e != nil {
			x.fail(e)
			return
		}
		if e := x.storeSeveral(b, memory(buf.b), require); e != nil {
			x.fail(e)
			return
		}
	case len(b.messages) > 0:
		publish := engine.Publish{Topic: x.topic, Messages: b.messages}
		command := publish.AppendTo(make([]byte, 0, len(buf.b)+len(b.messages)*64+len(x.topic)+16))
		if len(command) > limits.EntryBytesMax-engine.EntryOverhead-64 {
			x.fail(errs.New(errs.MessageTooLarge, "the batch has %d bytes once encoded and may have %d", len(command), limits.EntryBytesMax))
			return
		}
		reply, e := x.publish(command, require)
		if e != nil {
			x.fail(e)
			return
		}
		x.published(reply, 0)
		for i := range b.messages {
			b.ids = append(b.ids, reply.Published.ID(i))
		}
	}
	// The answer is written over the request, which nobody reads any more.
	x.answerBatch(b, buf)
}

// answerBatch says what became of each message.
func (x *exchange) answerBatch(b *batch, buf *buffer) {
	head := x.w.Header()
	head[wire.HeaderRequestID] = []string{x.requestID()}
	sealer, e := x.sealer()
	if e != nil {
		x.fail(e)
		return
	}
	if parseAccept(x.r.Header["Accept"]).batch {
		head["Content-Type"] = batchType
		buf.b = b.appendFrames(buf.b[:0], sealer)
	} else {
		head["Content-Type"] = jsonType
		buf.b = b.appendJSON(buf.b[:0], sealer)
	}
	head["Content-Length"] = []string{strconv.Itoa(len(buf.b))}
	x.w.WriteHeader(http.StatusOK)
	x.w.Write(buf.b)
}

// batchForm tells the boundary of a multipart batch; it is empty for the compact framing.
func batchForm(h http.Header) (boundary string, e *errs.Error) {
	value, _, e := one(h, "Content-Type")
	if e != nil {
		return "", e
	}
	if value == mediaBatch {
		return "", nil
	}
	media, params, err := mime.ParseMediaType(value)
	if err == nil && media == mediaBatch {
		return "", nil
	}
	boundary = params["boundary"]
	if err != nil || media != mediaMultipart || len(boundary) == 0 || len(boundary) > 70 || !validValue(boundary) {
		return "", errs.New(errs.InvalidHeader, "Content-Type must be %s with a boundary of 1 to 70 characters, or %s", mediaMultipart, mediaBatch)
	}
	return boundary, nil
}

// defaults reads what the request's headers say of all messages.
func (b *batch) defaults(h http.Header) *errs.Error {
	b.base.init()
	for _, name := range [...]string{wire.HeaderRetention, wire.HeaderDelay, wire.HeaderDeployment} {
		value, present, e := one(h, name)
		if e != nil {
			return e
		}
		if present {
			if e := b.base.set(name, value); e != nil {
				return e
			}
		}
	}
	if _, present := h[wire.HeaderIdempotencyKey]; present {
		return errs.New(errs.InvalidHeader, "%s belongs to the messages of a batch, not to the request", wire.HeaderIdempotencyKey)
	}
	return nil
}

// add judges one message, whose body is at an extent of src.
func (b *batch) add(head []byte, src source, at extent) *errs.Error {
	if len(b.verdicts) == limits.BatchMessagesMax {
		return errs.New(errs.InvalidBody, "the batch has more than %d messages", limits.BatchMessagesMax)
	}
	if b.head == nil || !bytes.Equal(head, b.head) {
		b.err = b.parseHead(head)
		b.head = head
	}
	e := b.err
	if most := max(b.bodyMax, limits.MessageBytesMax); e == nil && at.len() > most {
		e = errs.New(errs.MessageTooLarge, "the message has %d bytes and may have %d", at.len(), most)
	}
	b.verdicts = append(b.verdicts, e)
	if e == nil {
		b.messages = append(b.messages, b.parsed.msg)
		b.extents = append(b.extents, at)
		b.longest = max(b.longest, at.len())
		if m, ok := src.(memory); ok {
			b.messages[len(b.messages)-1].Body = m[at.from:at.to]
		}
	}
	return nil
}

// parseHead reads the lines of a message's head into parsed.
func (b *batch) parseHead(head []byte) *errs.Error {
	last := b.parsed.msg.ContentType
	b.parsed = b.base
	if len(head) > partHeadBytesMax {
		return errs.New(errs.InvalidHeader, "the message's headers have more than %d bytes", partHeadBytesMax)
	}
	p := &b.parsed
	var seen uint
	for len(head) > 0 {
		var line []byte
		line, head, _ = bytes.Cut(head, []byte{'\n'})
		line = bytes.TrimSuffix(line, []byte{'\r'})
		colon := bytes.IndexByte(line, ':')
		if colon <= 0 {
			return errs.New(errs.InvalidHeader, "a line of the message's head is not a header")
		}
		name, value := line[:colon], bytes.Trim(line[colon+1:], " \t")
		canonical, bit := partHeader(name)
		switch {
		case bit != 0:
			if seen&bit != 0 {
				return errs.New(errs.InvalidHeader, "%s appears more than once", canonical)
			}
			seen |= bit
			text := last
			if bit != 1 || string(value) != last {
				text = string(value)
			}
			if e := p.set(canonical, text); e != nil {
				return e
			}
		case !validToken(string(name)) || !validValue(string(value)):
			return errs.New(errs.InvalidHeader, "a line of the message's head is not a header")
		case stored(textproto.CanonicalMIMEHeaderKey(string(name))):
			if e := p.keep(strings.ToLower(string(name)), string(value)); e != nil {
				return e
			}
		}
	}
	return p.check()
}

// partHeader recognises the headers with a meaning and gives each a bit. The content type's is 1.
func partHeader(name []byte) (canonical string, bit uint) {
	var candidates [2]string
	switch len(name) {
	case len("Content-Type"):
		candidates[0] = "Content-Type"
		bit = 1
	case len(wire.HeaderRetention):
		candidates[0] = wire.HeaderRetention
		bit = 2
	case len(wire.HeaderIdempotencyKey):
		candidates[0] = wire.HeaderIdempotencyKey
		bit = 4
	case len(wire.HeaderDelay):
		candidates = [2]string{wire.HeaderDelay, wire.HeaderDeployment}
		bit = 8
	}
	for i, c := range candidates {
		if c != "" && len(c) == len(name) && strings.EqualFold(c, string(name)) {
			return c, bit << i
		}
	}
	return "", 0
}

func (b *batch) parse(src source, boundary string) *errs.Error {
	if boundary == "" {
		return b.parseFrames(src)
	}
	return b.parseMultipart(src, boundary)
}

// parseFrames reads a body in the compact framing.
func (b *batch) parseFrames(src source) *errs.Error {
	malformed := func() *errs.Error {
		return errs.New(errs.InvalidBody, "frame %d of the batch is malformed or ends early", len(b.verdicts)+1)
	}
	for at, size := int64(0), src.size(); at < size; {
		prefix, e := src.bytes(at, min(at+2*binary.MaxVarintLen64, size))
		if e != nil {
			return e
		}
		head, frame, err := wire.FrameHead(prefix, size-at)
		if err != nil {
			return malformed()
		}
		body := extent{at + head.From + head.Length, at + frame}
		// A head that is too long is an error of this message: so much of it is enough to see that.
		text, e := src.bytes(at+head.From, at+head.From+min(head.Length, partHeadBytesMax+1))
		if e != nil {
			return e
		}
		if e := b.add(text, src, body); e != nil {
			return e
		}
		at += frame
	}
	return b.whole()
}

func (b *batch) whole() *errs.Error {
	if len(b.verdicts) == 0 {
		return errs.New(errs.InvalidBody, "the batch has no message")
	}
	return nil
}

// parseMultipart reads a body in multipart form. There must be nothing before the first delimiter and nothing but
// white space behind the last one.
func (b *batch) parseMultipart(src source, boundary string) *errs.Error {
	malformed := func(what string) *errs.Error {
		return errs.New(errs.InvalidBody, "part %d of the batch: %s", len(b.verdicts)+1, what)
	}
	// Every delimiter but the first has a CRLF before it that is its own. The needle is made once.
	delimiter := append(append(make([]byte, 0, len(boundary)+4), "\r\n--"...), boundary...)
	size := src.size()
	at := int64(len(delimiter) - 2)
	if begin, e := src.bytes(0, min(at, size)); e != nil {
		return e
	} else if !bytes.Equal(begin, delimiter[2:]) {
		return errs.New(errs.InvalidBody, "the batch does not begin with its boundary")
	}
	for {
		// Here at is behind a delimiter.
		behind, e := src.bytes(at, min(at+2, size))
		if e != nil {
			return e
		}
		if string(behind) == "--" {
			rest, e := src.bytes(at+2, min(at+2+partHeadBytesMax, size))
			if e != nil {
				return e
			}
			if len(bytes.Trim(rest, " \t\r\n")) > 0 || size-at-2 > partHeadBytesMax {
				return malformed("there is more behind the last delimiter")
			}
			return b.whole()
		}
		if string(behind) != "\r\n" {
			return malformed("no line end behind the delimiter")
		}
		part := extent{from: at} // from the line end on, so that a part without headers and body is found too
		for from := at; part.to == 0; {
			i, e := src.index(from, size, delimiter)
			if e != nil {
				return e
			}
			if i < 0 {
				return malformed("the body ends before the last delimiter")
			}
			from = i + int64(len(delimiter))
			rest, e := src.bytes(from, min(from+2, size))
			switch {
			case e != nil:
				return e
			case string(rest) == "\r\n", string(rest) == "--":
				part.to, at = i, from
			case len(rest) > 0 && strings.IndexByte(" \t\r\n-", rest[0]) >= 0:
				// A delimiter to some readers and content to others.
				return malformed("no line end behind the delimiter")
			}
		}
		blank, e := src.index(part.from, part.to, []byte("\r\n\r\n"))
		if e != nil {
			return e
		}
		if blank < 0 {
			return malformed("no empty line behind the headers")
		}
		// A head that is too long is an error of this message: so much of it is enough to see that.
		head, e := src.bytes(part.from, min(blank, part.from+partHeadBytesMax+3))
		if e != nil {
			return e
		}
		if len(head) >= 2 {
			head = head[2:]
		}
		if bytes.Count(head, []byte("\n")) != bytes.Count(head, []byte("\r\n")) {
			// Some readers take a line feed alone for the end of a line, and find the end of the head elsewhere.
			return malformed("a header line that does not end in CR LF")
		}
		if e := b.add(head, src, extent{blank + 4, part.to}); e != nil {
			return e
		}
	}
}

// appendJSON appends the JSON answer.
func (b *batch) appendJSON(dst []byte, sealer *engine.Sealer) []byte {
	dst = append(dst, `{"results":[`...)
	sent := 0
	for i, e := range b.verdicts {
		if i > 0 {
			dst = append(dst, ',')
		}
		if e == nil {
			dst = append(dst, `{"status":"sent","messageId":"`...)
			dst = append(dst, sealer.MessageID(b.ids[sent])...)
			dst = append(dst, '"', '}')
			sent++
			continue
		}
		dst = append(dst, `{"status":"failed","statusCode":`...)
		dst = strconv.AppendInt(dst, int64(e.Code.Info().Status), 10)
		dst = append(dst, `,"code":"`...)
		dst = append(dst, e.Code.String()...)
		dst = append(dst, `","error":`...)
		dst = appendJSON(dst, e.Text())
		dst = append(dst, `,"retryable":`...)
		dst = strconv.AppendBool(dst, retryable(e))
		dst = append(dst, '}')
	}
	return append(dst, ']', '}')
}

// appendFrames appends the compact answer: a frame per message, whose body is its id and whose head is empty, or
// whose body is the error's text and whose head names its status and code.
func (b *batch) appendFrames(dst []byte, sealer *engine.Sealer) []byte {
	sent := 0
	var head []byte
	for _, e := range b.verdicts {
		if e == nil {
			dst = wire.AppendFrame(dst, nil, []byte(sealer.MessageID(b.ids[sent])))
			sent++
			continue
		}
		head = append(head[:0], "status: "...)
		head = strconv.AppendInt(head, int64(e.Code.Info().Status), 10)
		head = append(head, "\ncode: "...)
		head = append(head, e.Code.String()...)
		head = append(head, '\n')
		dst = wire.AppendFrame(dst, head, []byte(e.Text()))
	}
	return dst
}
