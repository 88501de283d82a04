package harness

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// An Outcome is what a client knows after a call.
type Outcome string

// The outcomes.
const (
	// OK: it happened.
	OK Outcome = "ok"
	// No: it did not happen and will not.
	No Outcome = "no"
	// Unknown: it may have happened, or may still.
	Unknown Outcome = "unknown"
)

// A Client speaks the queue protocol to one node in plain HTTP, the way curl would. It repeats nothing and
// follows no redirect. Its methods may be called from several goroutines.
type Client struct {
	// Base is the server's URL.
	Base string
	// Timeout bounds a call that names no wait.
	Timeout time.Duration
	// Header goes on every request.
	Header http.Header

	http *http.Client
}

// NewClient returns a client of the node. Call Close when done.
func (n *Node) NewClient() *Client {
	c := NewClient(n.URL())
	if secure := n.c.opts.TLS; secure != nil {
		t := c.http.Transport.(*http.Transport)
		t.TLSClientConfig, t.ForceAttemptHTTP2 = secure.Client, true
	}
	return c
}

// NewClient returns a client of the server at this URL. Call Close when done.
func NewClient(base string) *Client {
	return &Client{
		Base:    base,
		Timeout: time.Minute,
		http: &http.Client{
			Transport: &http.Transport{
				MaxIdleConnsPerHost: 64,
				IdleConnTimeout:     30 * time.Second,
				DialContext:         (&net.Dialer{Timeout: 10 * time.Second}).DialContext,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
}

// Close closes the idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// An Answer is what came back from a call.
type Answer struct {
	Outcome Outcome
	// Status is 0 when no answer arrived.
	Status int
	// Proto is the protocol of the answer: "HTTP/1.1" or "HTTP/2.0".
	Proto  string
	Header http.Header
	Body   []byte
	// Code and Text are those of an error document.
	Code, Text string
	// Err says why no answer arrived.
	Err error
}

// String describes the answer in an error message.
func (a Answer) String() string {
	if a.Err != nil {
		return fmt.Sprintf("%s: %v", a.Outcome, a.Err)
	}
	return fmt.Sprintf("%s: %d %s", a.Outcome, a.Status, bytes.TrimSpace(a.Body[:min(len(a.Body), 300)]))
}

// RetryAfter returns the header of this name, 0 for none.
func (a Answer) RetryAfter() time.Duration {
	s, _ := strconv.Atoi(a.Header.Get("Retry-After"))
	return time.Duration(s) * time.Second
}

// Do makes one request and classifies its answer. A refused or timed-out dial is No: nothing was sent. Any other
// failure of the connection is Unknown. An answer other than 2xx says its outcome itself; one that does not is
// No for 4xx and Unknown for 5xx.
func (c *Client) Do(ctx context.Context, method, path string, header map[string]string, body io.Reader) Answer {
	req, err := http.NewRequestWithContext(ctx, method, c.Base+path, body)
	if err != nil {
		return Answer{Outcome: No, Err: err}
	}
	maps.Copy(req.Header, c.Header)
	for k, v := range header {
		req.Header.Set(k, v)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return Answer{Outcome: outcomeOfDial(err), Err: err}
	}
	defer resp.Body.Close()
	a := Answer{Status: resp.StatusCode, Proto: resp.Proto, Header: resp.Header}
	if a.Body, err = io.ReadAll(resp.Body); err != nil {
		// The status is known, and with it the outcome of everything but a receive.
		a.Err = fmt.Errorf("read the answer: %w", err)
	}
	switch {
	case resp.StatusCode < 300:
		a.Outcome = OK
	case resp.StatusCode < 500:
		a.Outcome = No
	default:
		a.Outcome = Unknown
	}
	if a.Outcome != OK {
		var doc struct{ Error, Code, Outcome string }
		if json.Unmarshal(a.Body, &doc) == nil {
			a.Code, a.Text = doc.Code, doc.Error
			if doc.Outcome == "none" {
				a.Outcome = No
			}
			if doc.Outcome == "unknown" {
				a.Outcome = Unknown
			}
		}
	}
	return a
}

func outcomeOfDial(err error) Outcome {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
		return No
	}
	return Unknown
}

func (c *Client) timeout(ctx context.Context, wait time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, c.Timeout+wait)
}

// Published is the answer to a publish.
type Published struct {
	Answer
	ID string
	// Zones is the number of zones that hold the message.
	Zones int
}

// Publish sends one message with a content type of its own choice and further headers, which may be nil.
func (c *Client) Publish(ctx context.Context, topic string, body []byte, header map[string]string) Published {
	ctx, cancel := c.timeout(ctx, 0)
	defer cancel()
	h := map[string]string{"Content-Type": "application/octet-stream"}
	maps.Copy(h, header)
	p := Published{Answer: c.Do(ctx, http.MethodPost, "/api/v3/topic/"+topic, h, bytes.NewReader(body))}
	if p.Outcome != OK {
		return p
	}
	var doc struct{ MessageID string }
	if err := json.Unmarshal(p.Body, &doc); err != nil || doc.MessageID == "" {
		p.Outcome, p.Err = Unknown, fmt.Errorf("publish answered %d with %q", p.Status, p.Body)
		return p
	}
	p.ID = doc.MessageID
	p.Zones, _ = strconv.Atoi(p.Header.Get("Tercet-Zones"))
	return p
}

// BatchResult is what a batch answers of one of its messages.
type BatchResult struct {
	Status     string
	MessageID  string
	StatusCode int
	Error      string
	Retryable  bool
}

// Batch sends messages as one multipart batch. keys are their idempotency keys, where not empty; nil for none.
func (c *Client) Batch(ctx context.Context, topic string, bodies [][]byte, keys []string) ([]BatchResult, Answer) {
	return c.BatchWith(ctx, topic, bodies, func(i int) map[string]string {
		if keys == nil || keys[i] == "" {
			return nil
		}
		return map[string]string{"Vqs-Idempotency-Key": keys[i]}
	})
}

// BatchWith sends messages as one multipart batch, each with the headers that header returns.
func (c *Client) BatchWith(ctx context.Context, topic string, bodies [][]byte, header func(i int) map[string]string) ([]BatchResult, Answer) {
	ctx, cancel := c.timeout(ctx, 0)
	defer cancel()
	var b bytes.Buffer
	w := multipart.NewWriter(&b)
	for i, body := range bodies {
		h := map[string][]string{"content-type": {"application/octet-stream"}}
		for name, value := range header(i) {
			h[name] = []string{value}
		}
		part, err := w.CreatePart(h)
		if err != nil {
			return nil, Answer{Outcome: No, Err: err}
		}
		if _, err := part.Write(body); err != nil {
			return nil, Answer{Outcome: No, Err: err}
		}
	}
	w.Close()
	h := map[string]string{"Content-Type": "multipart/mixed; boundary=" + w.Boundary()}
	a := c.Do(ctx, http.MethodPost, "/api/v3/topic/"+topic+"/batch", h, &b)
	if a.Outcome != OK {
		return nil, a
	}
	var doc struct{ Results []BatchResult }
	if err := json.Unmarshal(a.Body, &doc); err != nil {
		a.Outcome, a.Err = Unknown, err
	}
	return doc.Results, a
}

// Delivery is one message as a consumer gets it.
type Delivery struct {
	ID, Receipt string
	Count       int
	Timestamp   time.Time
	Expires     time.Time
	ContentType string
	Body        []byte
	Header      http.Header // of the part; nil in NDJSON
}

// Receive asks for messages.
type Receive struct {
	Topic, Group string
	// Max is the number asked for, 0 for the server's default.
	Max int
	// Visibility is the lease, negative for the server's default. Zero peeks.
	Visibility time.Duration
	// Wait makes an empty receive wait.
	Wait time.Duration
	// ID asks for this message.
	ID string
	// Multipart asks for multipart instead of NDJSON.
	Multipart bool
	Header    map[string]string
}

// Receive makes one receive. Its outcome is OK when the answer arrived completely, empty or not.
func (c *Client) Receive(ctx context.Context, r Receive) ([]Delivery, Answer) {
	ctx, cancel := c.timeout(ctx, r.Wait)
	defer cancel()
	h := map[string]string{"Accept": "application/x-ndjson"}
	if r.Multipart {
		h["Accept"] = "multipart/mixed"
	}
	if r.Max > 0 {
		h["Vqs-Max-Messages"] = strconv.Itoa(r.Max)
	}
	if r.Visibility >= 0 {
		h["Vqs-Visibility-Timeout-Seconds"] = strconv.Itoa(int(r.Visibility / time.Second))
	}
	if r.Wait > 0 {
		h["Tercet-Wait-Seconds"] = strconv.Itoa(int(r.Wait / time.Second))
	}
	maps.Copy(h, r.Header)
	path := "/api/v3/topic/" + r.Topic + "/consumer/" + r.Group
	if r.ID != "" {
		path += "/id/" + r.ID
	}
	a := c.Do(ctx, http.MethodPost, path, h, nil)
	if a.Outcome != OK || a.Status == http.StatusNoContent {
		return nil, a
	}
	if a.Err != nil {
		a.Outcome = Unknown
		return nil, a
	}
	parse := parseNDJSON
	if r.Multipart {
		parse = parseMultipart
	}
	ds, err := parse(a)
	if err != nil {
		a.Outcome, a.Err = Unknown, fmt.Errorf("parse the answer of a receive: %w", err)
	}
	return ds, a
}

func parseNDJSON(a Answer) ([]Delivery, error) {
	var out []Delivery
	lines := bufio.NewScanner(bytes.NewReader(a.Body))
	lines.Buffer(nil, len(a.Body)+1)
	for lines.Scan() {
		var d struct {
			MessageID, ReceiptHandle string
			DeliveryCount            int
			Timestamp, ExpiresAt     time.Time
			ContentType              string
			Body                     []byte
		}
		if err := json.Unmarshal(lines.Bytes(), &d); err != nil {
			return out, fmt.Errorf("line %q: %w", lines.Bytes()[:min(len(lines.Bytes()), 200)], err)
		}
		out = append(out, Delivery{ID: d.MessageID, Receipt: d.ReceiptHandle, Count: d.DeliveryCount,
			Timestamp: d.Timestamp, Expires: d.ExpiresAt, ContentType: d.ContentType, Body: d.Body})
	}
	return out, lines.Err()
}

func parseMultipart(a Answer) ([]Delivery, error) {
	_, params, err := mime.ParseMediaType(a.Header.Get("Content-Type"))
	if err != nil {
		return nil, err
	}
	boundary := params["boundary"]
	// What the public client insists on, see section 3.1 of the protocol: no preamble, no epilogue.
	if !bytes.HasPrefix(a.Body, []byte("--"+boundary)) {
		return nil, fmt.Errorf("does not begin with its delimiter: %q", a.Body[:min(len(a.Body), 100)])
	}
	if !bytes.HasSuffix(a.Body, []byte("--"+boundary+"--")) {
		return nil, fmt.Errorf("does not end with its closing delimiter: %q", a.Body[max(0, len(a.Body)-100):])
	}
	var out []Delivery
	parts := multipart.NewReader(bytes.NewReader(a.Body), boundary)
	for {
		part, err := parts.NextRawPart()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		h := http.Header(part.Header)
		d := Delivery{ID: h.Get("Vqs-Message-Id"), Receipt: h.Get("Vqs-Receipt-Handle"), ContentType: h.Get("Content-Type"), Header: h}
		if d.Count, err = strconv.Atoi(h.Get("Vqs-Delivery-Count")); err != nil {
			return out, err
		}
		if d.Timestamp, err = time.Parse(time.RFC3339Nano, h.Get("Vqs-Timestamp")); err != nil {
			return out, err
		}
		if d.Expires, err = time.Parse(time.RFC3339Nano, h.Get("Vqs-Expires-At")); err != nil {
			return out, err
		}
		if d.Body, err = io.ReadAll(part); err != nil {
			return out, err
		}
		out = append(out, d)
	}
}

func leasePath(topic, group, receipt string) string {
	return "/api/v3/topic/" + topic + "/consumer/" + group + "/lease/" + receipt
}

// Ack acknowledges a delivery.
func (c *Client) Ack(ctx context.Context, topic, group, receipt string) Answer {
	ctx, cancel := c.timeout(ctx, 0)
	defer cancel()
	return c.Do(ctx, http.MethodDelete, leasePath(topic, group, receipt), nil, nil)
}

// Extend sets a lease to end this long from now. Zero releases it.
func (c *Client) Extend(ctx context.Context, topic, group, receipt string, visibility time.Duration) Answer {
	ctx, cancel := c.timeout(ctx, 0)
	defer cancel()
	body := fmt.Sprintf(`{"visibilityTimeoutSeconds": %d}`, int(visibility/time.Second))
	return c.Do(ctx, http.MethodPatch, leasePath(topic, group, receipt), map[string]string{"Content-Type": "application/json"}, strings.NewReader(body))
}
