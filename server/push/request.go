package push

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/server/wire"
)

// CloudEvents types.
const (
	eventV2Beta     = "com.vercel.queue.v2beta"
	eventV1Beta     = "com.vercel.queue.v1beta"
	mediaCloudEvent = "application/cloudevents+json"
)

// headersBytesMax is up to which size a message's application headers travel with a push: Node.js, for one, refuses a
// head of more than 16 KiB, and what it refuses it would refuse for ever.
const headersBytesMax = 8 << 10

// headerPrefix stands before the name of an application header, which could otherwise pass for one of the event's.
const headerPrefix = "tercet-header-"

// traceHeaders are the producer's, and travel under names of their own.
var traceHeaders = map[string]string{
	"traceparent": "x-vercel-queue-traceparent",
	"tracestate":  "x-vercel-queue-tracestate",
	"baggage":     "x-vercel-queue-baggage",
}

// event is one push before it is a request.
type event struct {
	sub    *Subscription
	url    *url.URL
	topic  string
	region string
	agent  string
	// id and receipt are texts. An empty receipt makes a push routing only.
	id, receipt string
	delivery    *engine.Delivery
	now         time.Time
}

// request makes the HTTP request. Names of headers are set as they go on the wire.
func (e *event) request(ctx context.Context) (*http.Request, error) {
	h := make(http.Header, 24)
	var body []byte
	set := func(name, value string) { h[name] = []string{value} }
	source := "/topic/" + e.topic + "/consumer/" + e.sub.Group
	published := string(wire.AppendTime(nil, e.delivery.PublishedAt))
	if e.sub.Type == wire.PushV1Beta {
		var err error
		body, err = json.Marshal(map[string]any{
			"specversion": "1.0", "type": eventV1Beta, "source": source, "id": e.id, "time": published, "datacontenttype": wire.MediaJSON,
			"data": map[string]string{"queueName": e.topic, "consumerGroup": e.sub.Group, "messageId": e.id},
		})
		if err != nil {
			return nil, err
		}
		set("Content-Type", mediaCloudEvent)
	} else {
		set("ce-specversion", "1.0")
		set("ce-type", eventV2Beta)
		set("ce-source", source)
		set("ce-id", e.id)
		set("ce-time", published)
		set("ce-vqsqueuename", e.topic)
		set("ce-vqsconsumergroup", e.sub.Group)
		set("ce-vqsmessageid", e.id)
		set("ce-vqsregion", e.region)
		if e.receipt != "" {
			body = e.delivery.Body
			set("ce-vqsreceipthandle", e.receipt)
			set("ce-vqsdeliverycount", strconv.FormatUint(uint64(e.delivery.Count), 10))
			set("ce-vqscreatedat", published)
			set("ce-vqsexpiresat", string(wire.AppendTime(nil, e.delivery.ExpiresAt)))
			set("ce-vqsvisibilitydeadline", string(wire.AppendTime(nil, e.delivery.LeaseUntil)))
			contentType := e.delivery.ContentType
			if contentType == "" || !visible(contentType) {
				contentType = wire.MediaOctets
			}
			set("Content-Type", contentType)
		}
		e.messageHeaders(set)
	}
	set("User-Agent", e.agent)
	if e.sub.BearerToken != "" {
		set("Authorization", "Bearer "+e.sub.BearerToken)
	}
	if keys := e.sub.keys(e.now.UnixMilli()); len(keys) > 0 {
		set("webhook-id", e.id)
		set("webhook-timestamp", strconv.FormatInt(e.now.Unix(), 10))
		set("webhook-signature", sign(keys, e.id, e.now.Unix(), body))
	}
	// A connection that the endpoint closed while it was idle is no failure: the request may be sent again on
	// another. An entry without values says so to net/http and is not sent.
	h["X-Idempotency-Key"] = nil
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, e.url.String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = h
	return req, nil
}

// messageHeaders sets the headers that the message was published with.
func (e *event) messageHeaders(set func(name, value string)) {
	size := 0
	for _, h := range e.delivery.Headers {
		size += len(headerPrefix) + len(h.Name) + len(h.Value) + 4
	}
	for _, h := range e.delivery.Headers {
		if !token(h.Name) || !visible(h.Value) {
			continue // stored by the other protocol
		}
		if name, ok := traceHeaders[h.Name]; ok {
			if len(h.Value) <= headersBytesMax/4 {
				set(name, h.Value)
			}
		} else if size <= headersBytesMax {
			set(headerPrefix+h.Name, h.Value)
		}
	}
}

// token reports whether s can be a header's name.
func token(s string) bool {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`()<>@,;:\"/[]?={}`, c) >= 0 {
			return false
		}
	}
	return s != ""
}

// answer is what became of a request.
type answer struct {
	verdict verdict
	// reason says why it counts as failed; empty for a 2xx.
	reason string
	// kind is how metrics call it.
	kind string
	// pause is what a Retry-After asked for.
	pause time.Duration
}

// answerBytesMax is how much of an answer is read; what follows is cut off with the connection.
const answerBytesMax = 64 << 10

// reasonBytesMax bounds what is kept of an answer's body in a reason.
const reasonBytesMax = 200

// judge reads an answer to its end, or says why there is none.
func judge(res *http.Response, err error, now time.Time) answer {
	if err != nil {
		return judgeError(err)
	}
	defer res.Body.Close()
	head := make([]byte, 0, 512)
	head, readErr := readSome(res.Body, head)
	a := answer{kind: strconv.Itoa(res.StatusCode/100) + "xx"}
	switch code := res.StatusCode; {
	case code >= 200 && code < 300:
		if readErr != nil {
			// The status has arrived, and the lease decides in any case.
			return a
		}
		return a
	case code == http.StatusTooManyRequests:
		a.kind = "429"
		a.verdict = overloaded
	case code >= 502 && code <= 504:
		a.verdict = overloaded
	}
	if a.verdict == overloaded {
		a.pause = retryAfter(res.Header.Get("Retry-After"), now)
	}
	a.reason = fmt.Sprintf("HTTP %d", res.StatusCode)
	switch text := clean(head); {
	case res.StatusCode >= 300 && res.StatusCode < 400:
		a.reason += ": redirects are not followed"
	case text != "":
		a.reason += ": " + text
	}
	return a
}

// readSome reads an answer's body up to its bound and returns how it begins.
func readSome(r io.Reader, head []byte) ([]byte, error) {
	r = io.LimitReader(r, answerBytesMax)
	for len(head) < cap(head) {
		n, err := r.Read(head[len(head):cap(head)])
		head = head[:len(head)+n]
		if errors.Is(err, io.EOF) {
			return head, nil
		}
		if err != nil {
			return head, err
		}
	}
	_, err := io.Copy(io.Discard, r)
	return head, err
}

// judgeError says what a request without an answer failed of. The address stands in it, the request does not.
func judgeError(err error) answer {
	a := answer{verdict: overloaded, kind: "connection"}
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	blocked, isBlocked := errors.AsType[*BlockedError](err)
	switch {
	case isBlocked:
		a.kind, a.reason = "blocked", blocked.Error()
	case errors.Is(err, context.DeadlineExceeded):
		a.kind, a.reason = "timeout", "no answer in time"
	case isTimeout(err):
		a.kind, a.reason = "timeout", clean([]byte(err.Error()))
	default:
		a.reason = clean([]byte(err.Error()))
	}
	return a
}

func isTimeout(err error) bool {
	t, ok := errors.AsType[net.Error](err)
	return ok && t.Timeout()
}

// clean makes one short line of text that an endpoint chose.
func clean(b []byte) string {
	b = bytes.TrimSpace(b)
	cut := len(b) > reasonBytesMax
	if cut {
		b = b[:reasonBytesMax]
		for len(b) > 0 && !utf8.Valid(b) && len(b) > reasonBytesMax-utf8.UTFMax {
			b = b[:len(b)-1]
		}
	}
	text := strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			return ' '
		case r < ' ' || r == 0x7f || r == utf8.RuneError:
			return -1
		}
		return r
	}, string(b))
	if cut {
		text += "…"
	}
	return text
}

// retryAfter reads the header in its two forms: seconds, and a date.
func retryAfter(value string, now time.Time) time.Duration {
	if value == "" {
		return 0
	}
	if s, err := strconv.ParseUint(value, 10, 31); err == nil {
		return time.Duration(s) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(at.Sub(now), 0)
	}
	return 0
}
