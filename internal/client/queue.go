package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

// Message is one message to be sent. The zero value of a field means the server's default.
type Message struct {
	ContentType string
	Body        []byte
	Retention   time.Duration // whole seconds
	Delay       time.Duration // whole seconds
	// Key is an idempotency key. With one, a send whose outcome is unknown is tried again.
	Key        string
	Deployment string
	// Header holds application headers, which consumers are given.
	Header http.Header
}

// Stored says where a publish is.
type Stored struct {
	// Zones is the number of zones that held it when it was acknowledged.
	Zones    int
	Position uint64
	Term     uint64
	// Repeated reports that an earlier attempt at the same request may have stored it already. With an idempotency
	// key it is stored once nevertheless.
	Repeated bool
}

// Durability is what a publish asks for.
type Durability string

// The durabilities. Default leaves it to the servers.
const (
	Default Durability = ""
	InSync  Durability = "in-sync"
	All     Durability = "all"
)

func topicPath(topic string) string { return "/api/v3/topic/" + url.PathEscape(topic) }

func groupPath(topic, group string) string {
	return topicPath(topic) + "/consumer/" + url.PathEscape(group)
}

func (m *Message) header() http.Header {
	h := make(http.Header, len(m.Header)+5)
	for name, values := range m.Header {
		h[textproto.CanonicalMIMEHeaderKey(name)] = values
	}
	if m.ContentType != "" {
		h["Content-Type"] = []string{m.ContentType}
	}
	set := func(name string, d time.Duration) {
		if d != 0 {
			h[name] = []string{seconds(d)}
		}
	}
	set(wire.HeaderRetention, m.Retention)
	set(wire.HeaderDelay, m.Delay)
	if m.Key != "" {
		h[wire.HeaderIdempotencyKey] = []string{m.Key}
	}
	if m.Deployment != "" {
		h[wire.HeaderDeployment] = []string{m.Deployment}
	}
	return h
}

func seconds(d time.Duration) string { return strconv.FormatInt(int64(d/time.Second), 10) }

// Send publishes one message and returns its id.
func (c *Client) Send(ctx context.Context, topic string, m Message, d Durability) (id string, at Stored, err error) {
	h := m.header()
	if d != Default {
		h[wire.HeaderDurability] = []string{string(d)}
	}
	res, _, err := c.do(ctx, request{method: http.MethodPost, path: topicPath(topic), header: h, body: m.Body, repeatable: m.Key != ""})
	if err != nil {
		return "", at, err
	}
	defer res.Body.Close()
	var sent wire.Sent
	if err := decode(res, &sent); err != nil {
		return "", at, err
	}
	return sent.MessageID, storedOf(res.Header), nil
}

func storedOf(h http.Header) (s Stored) {
	s.Zones, _ = strconv.Atoi(h.Get(wire.HeaderZones))
	s.Position, _ = strconv.ParseUint(h.Get(wire.HeaderPosition), 10, 64)
	s.Term, _ = strconv.ParseUint(h.Get(wire.HeaderTerm), 10, 64)
	return s
}

// SentMessage is the result for one message of a batch.
type SentMessage struct {
	ID string
	// Err is set when this message was refused, for good; the others are not affected.
	Err *Error
}

// SendBatch publishes 1 to 100 messages, all of those that are valid or none. It uses the compact framing. An
// unknown outcome is tried again only when every message has a key.
func (c *Client) SendBatch(ctx context.Context, topic string, messages []Message, d Durability) ([]SentMessage, Stored, error) {
	body, keyed := EncodeBatch(nil, messages)
	h := http.Header{"Content-Type": {wire.MediaBatch}, "Accept": {wire.MediaBatch}}
	if d != Default {
		h[wire.HeaderDurability] = []string{string(d)}
	}
	res, unknown, err := c.do(ctx, request{method: http.MethodPost, path: topicPath(topic) + "/batch", header: h, body: body, repeatable: keyed})
	if err != nil {
		return nil, Stored{}, err
	}
	defer res.Body.Close()
	at := storedOf(res.Header)
	at.Repeated = unknown
	out := make([]SentMessage, 0, len(messages))
	for frames := wire.NewReader(res.Body, limits.HeaderBytesMax); ; {
		head, body, err := frames.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, at, &Error{Status: res.StatusCode, Outcome: errs.Unknown, Message: "the answer to the batch could not be read", Cause: err}
		}
		if len(head) == 0 {
			out = append(out, SentMessage{ID: string(body)})
			continue
		}
		e := &Error{Outcome: errs.None, Message: string(body)}
		for name, value := range headLines(head) {
			switch name {
			case "status":
				e.Status, _ = strconv.Atoi(value)
			case "code":
				e.Code = value
			}
		}
		out = append(out, SentMessage{Err: e})
	}
	if len(out) != len(messages) {
		return nil, at, &Error{Status: res.StatusCode, Outcome: errs.Unknown, Message: fmt.Sprintf("the answer holds %d results for %d messages", len(out), len(messages))}
	}
	return out, at, nil
}

// EncodeBatch appends messages in the compact framing to b and reports whether each has an idempotency key.
func EncodeBatch(b []byte, messages []Message) (body []byte, keyed bool) {
	keyed = true
	var head []byte
	for i := range messages {
		m := &messages[i]
		keyed = keyed && m.Key != ""
		head = head[:0]
		for name, values := range m.header() {
			for _, v := range values {
				head = append(head, name...)
				head = append(head, ": "...)
				head = append(head, v...)
				head = append(head, '\n')
			}
		}
		b = wire.AppendFrame(b, head, m.Body)
	}
	return b, keyed && len(messages) > 0
}

// headLines iterates over the lines of a head, names in lower case.
func headLines(head []byte) func(yield func(name, value string) bool) {
	return func(yield func(name, value string) bool) {
		for len(head) > 0 {
			var line []byte
			line, head, _ = bytes.Cut(head, []byte{'\n'})
			name, value, _ := strings.Cut(string(line), ":")
			if !yield(strings.ToLower(name), strings.TrimSpace(value)) {
				return
			}
		}
	}
}

// ReceiveOptions are what a receive asks for. The zero value of a field means the server's default.
type ReceiveOptions struct {
	Max int
	// Visibility is the length of the lease, in whole seconds.
	Visibility time.Duration
	// Peek shows messages and changes nothing.
	Peek           bool
	MaxConcurrency int
	Deployment     string
	// Latest makes a group that this receive creates start after everything stored.
	Latest bool
	// Wait is how long to wait for a message, in whole seconds.
	Wait time.Duration
}

func (o *ReceiveOptions) header() http.Header {
	h := http.Header{"Accept": {wire.MediaBatch}}
	if o.Max != 0 {
		h[wire.HeaderMaxMessages] = []string{strconv.Itoa(o.Max)}
	}
	switch {
	case o.Peek:
		h[wire.HeaderVisibility] = []string{"0"}
	case o.Visibility != 0:
		h[wire.HeaderVisibility] = []string{seconds(o.Visibility)}
	}
	if o.MaxConcurrency != 0 {
		h[wire.HeaderMaxConcurrency] = []string{strconv.Itoa(o.MaxConcurrency)}
	}
	if o.Deployment != "" {
		h[wire.HeaderDeployment] = []string{o.Deployment}
	}
	if o.Latest {
		h[wire.HeaderCursorFallback] = []string{"latest"}
	}
	if o.Wait >= time.Second {
		h[wire.HeaderWait] = []string{seconds(o.Wait)}
	}
	return h
}

// Delivery is one message received.
type Delivery struct {
	ID, Receipt string
	// Count is the number of deliveries to this group, this one included.
	Count                uint32
	Timestamp, ExpiresAt time.Time
	ContentType          string
	// Header holds the application and trace headers it was sent with.
	Header http.Header
	Body   []byte
}

// Deliveries are the messages of one receive as they arrive.
type Deliveries struct {
	body   io.ReadCloser // nil without messages
	frames *wire.Reader
}

// Next returns the next message, io.EOF after the last one. After any other error, messages may be leased that never
// arrived; they are delivered again when their lease is over.
func (d *Deliveries) Next() (*Delivery, error) {
	if d.body == nil {
		return nil, io.EOF
	}
	head, body, err := d.frames.Next()
	if errors.Is(err, io.EOF) {
		return nil, io.EOF
	}
	if err != nil {
		return nil, &Error{Outcome: errs.Unknown, Message: "the messages could not be read", Cause: err}
	}
	m := &Delivery{Body: body, Header: make(http.Header)}
	for name, value := range headLines(head) {
		switch textproto.CanonicalMIMEHeaderKey(name) {
		case "Content-Type":
			m.ContentType = value
		case wire.HeaderMessageID:
			m.ID = value
		case wire.HeaderReceipt:
			m.Receipt = value
		case wire.HeaderDeliveryCount:
			n, _ := strconv.ParseUint(value, 10, 32)
			m.Count = uint32(n)
		case wire.HeaderTimestamp:
			m.Timestamp, _ = time.Parse(time.RFC3339, value)
		case wire.HeaderExpiresAt:
			m.ExpiresAt, _ = time.Parse(time.RFC3339, value)
		default:
			m.Header.Add(name, value)
		}
	}
	return m, nil
}

// Close ends the answer. Messages not yet returned by Next stay leased.
func (d *Deliveries) Close() error {
	if d.body == nil {
		return nil
	}
	return d.body.Close()
}

// All returns the messages that are left and closes.
func (d *Deliveries) All() ([]*Delivery, error) {
	defer d.Close()
	var out []*Delivery
	for {
		m, err := d.Next()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		out = append(out, m)
	}
}

// frameOverhead bounds what a delivery's frame holds besides the body.
const frameOverhead = limits.HeaderBytesMax + limits.ContentTypeBytesMax + 8<<10

func (c *Client) deliveries(ctx context.Context, path string, o ReceiveOptions) (*Deliveries, error) {
	res, _, err := c.do(ctx, request{method: http.MethodPost, path: path, header: o.header(), repeatable: true})
	if err != nil {
		return nil, err
	}
	if res.StatusCode == http.StatusNoContent {
		res.Body.Close()
		return &Deliveries{}, nil
	}
	return &Deliveries{body: res.Body, frames: wire.NewReader(res.Body, limits.LargeMessageBytesMax+frameOverhead)}, nil
}

// Receive leases messages. Without one, Next returns io.EOF at once.
func (c *Client) Receive(ctx context.Context, topic, group string, o ReceiveOptions) (*Deliveries, error) {
	return c.deliveries(ctx, groupPath(topic, group), o)
}

// ReceiveID leases one message by its id.
func (c *Client) ReceiveID(ctx context.Context, topic, group, id string, o ReceiveOptions) (*Delivery, error) {
	d, err := c.deliveries(ctx, groupPath(topic, group)+"/id/"+url.PathEscape(id), o)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Next()
}

// Acknowledge settles a message for its group, for good. It may be repeated; that a repetition finds the message
// gone is no error.
func (c *Client) Acknowledge(ctx context.Context, topic, group, receipt string) error {
	res, unknown, err := c.do(ctx, request{method: http.MethodDelete, path: groupPath(topic, group) + "/lease/" + url.PathEscape(receipt), repeatable: true})
	if err != nil {
		if e, ok := errors.AsType[*Error](err); ok && unknown && e.Status == http.StatusNotFound {
			return nil
		}
		return err
	}
	return res.Body.Close()
}

// Extend makes a lease end d from now; zero releases the message at once.
func (c *Client) Extend(ctx context.Context, topic, group, receipt string, d time.Duration) error {
	body, err := json.Marshal(wire.Extend{VisibilityTimeoutSeconds: int64(d / time.Second)})
	if err != nil {
		return err
	}
	return c.json(ctx, request{
		method: http.MethodPatch, path: groupPath(topic, group) + "/lease/" + url.PathEscape(receipt),
		header: http.Header{"Content-Type": {wire.MediaJSON}}, body: body, repeatable: true,
	}, nil)
}

// Release ends a lease: the message is delivered again after the delay. The reason is kept as its last error for the
// group. It is not repeated when its outcome is unknown: the message may be somebody else's by then.
func (c *Client) Release(ctx context.Context, topic, group, receipt string, delay time.Duration, reason string) error {
	body, err := json.Marshal(wire.Extend{VisibilityTimeoutSeconds: int64(delay / time.Second), Release: true, Reason: reason})
	if err != nil {
		return err
	}
	return c.json(ctx, request{
		method: http.MethodPatch, path: groupPath(topic, group) + "/lease/" + url.PathEscape(receipt),
		header: http.Header{"Content-Type": {wire.MediaJSON}}, body: body,
	}, nil)
}
