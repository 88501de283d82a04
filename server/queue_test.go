package server

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

// reply is a whole answer.
type reply struct {
	status int
	header http.Header
	body   []byte
}

func (r reply) String() string { return fmt.Sprintf("%d %s", r.status, r.body) }

// code is the error code of the answer.
func (r reply) code() string {
	var e wire.Error
	json.Unmarshal(r.body, &e)
	return e.Code
}

// call makes a request with pairs of header names and values.
func call(t testing.TB, method, url string, body []byte, headers ...string) reply {
	t.Helper()
	req, err := http.NewRequest(method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{res.StatusCode, res.Header, data}
}

// expect fails the test unless the answer has the status and, for errors, the code.
func expect(t testing.TB, r reply, status int, code string) {
	t.Helper()
	if r.status != status || code != "" && r.code() != code {
		t.Fatalf("answered %v, want %d %s", r, status, code)
	}
}

func sendMessage(t testing.TB, base, topic string, body []byte, headers ...string) string {
	t.Helper()
	r := call(t, "POST", base+"/api/v3/topic/"+topic, body, headers...)
	expect(t, r, 201, "")
	var sent wire.Sent
	if err := json.Unmarshal(r.body, &sent); err != nil || sent.MessageID == "" || sent.MessageID != r.header.Get(wire.HeaderMessageID) {
		t.Fatalf("send: %v, %s %s", r, wire.HeaderMessageID, r.header.Get(wire.HeaderMessageID))
	}
	return sent.MessageID
}

// received is a message as any of the three forms shows it.
type received struct {
	head map[string]string // names in lower case
	body []byte
}

// strictParts takes a multipart answer apart as the public client does: the delimiter at byte 0, a CRLF before each
// further one, nothing behind the last.
func strictParts(t testing.TB, contentType string, body []byte) []received {
	t.Helper()
	media, params, err := mime.ParseMediaType(contentType)
	if err != nil || media != "multipart/mixed" || len(params["boundary"]) < 32 {
		t.Fatalf("Content-Type %q", contentType)
	}
	delimiter := []byte("--" + params["boundary"])
	rest, ok := bytes.CutPrefix(body, delimiter)
	if !ok {
		t.Fatalf("the body does not begin with its boundary: %q", body[:min(len(body), 80)])
	}
	var out []received
	for !bytes.Equal(rest, []byte("--")) {
		if rest, ok = bytes.CutPrefix(rest, []byte("\r\n")); !ok {
			t.Fatalf("behind a delimiter: %q", rest[:min(len(rest), 80)])
		}
		head, after, ok := bytes.Cut(rest, []byte("\r\n\r\n"))
		if !ok {
			t.Fatal("a part without an empty line")
		}
		m := received{head: map[string]string{}}
		for _, line := range strings.Split(string(head), "\r\n") {
			name, value, _ := strings.Cut(line, ": ")
			if _, twice := m.head[strings.ToLower(name)]; twice {
				t.Fatalf("header twice: %q", head)
			}
			m.head[strings.ToLower(name)] = value
		}
		if m.body, rest, ok = bytes.Cut(after, append([]byte("\r\n"), delimiter...)); !ok {
			t.Fatal("a part without an end")
		}
		out = append(out, m)
	}
	return out
}

// receiveForms are the three forms of an answer with messages and how to read them.
var receiveForms = map[string]func(t testing.TB, r reply) []received{
	wire.MediaMultipart: func(t testing.TB, r reply) []received {
		return strictParts(t, r.header.Get("Content-Type"), r.body)
	},
	wire.MediaNDJSON: func(t testing.TB, r reply) (out []received) {
		for _, line := range bytes.Split(bytes.TrimSuffix(r.body, []byte("\n")), []byte("\n")) {
			var m wire.Message
			if err := json.Unmarshal(line, &m); err != nil {
				t.Fatalf("%v: %s", err, line)
			}
			head := map[string]string{
				"content-type": m.ContentType, "vqs-message-id": m.MessageID, "vqs-receipt-handle": m.ReceiptHandle,
				"vqs-delivery-count": fmt.Sprint(m.DeliveryCount), "vqs-timestamp": m.Timestamp, "vqs-expires-at": m.ExpiresAt,
			}
			for name, value := range m.Headers {
				head[name] = value
			}
			out = append(out, received{head, m.Body})
		}
		return out
	},
	wire.MediaBatch: func(t testing.TB, r reply) (out []received) {
		for data := r.body; len(data) > 0; {
			head, body, rest, err := wire.NextFrame(data)
			if err != nil {
				t.Fatal(err)
			}
			m := received{head: map[string]string{}, body: body}
			for _, line := range strings.Split(strings.TrimSuffix(string(head), "\n"), "\n") {
				name, value, _ := strings.Cut(line, ": ")
				m.head[strings.ToLower(name)] = value
			}
			out, data = append(out, m), rest
		}
		return out
	},
}

func receiveMessages(t testing.TB, base, topic, group, form string, headers ...string) []received {
	t.Helper()
	r := call(t, "POST", base+"/api/v3/topic/"+topic+"/consumer/"+group, nil, append(headers, "Accept", form)...)
	if r.status == http.StatusNoContent {
		if len(r.body) != 0 {
			t.Fatalf("204 with a body: %q", r.body)
		}
		return nil
	}
	expect(t, r, 200, "")
	return receiveForms[form](t, r)
}

func lease(base, topic, group, receipt string) string {
	return base + "/api/v3/topic/" + topic + "/consumer/" + group + "/lease/" + receipt
}

var isoTime = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$`)

// payloads are bodies that an answer's form could take for its own.
var payloads = map[string][]byte{
	"text":              []byte("hello"),
	"empty":             {},
	"CRLF":              []byte("\r\n"),
	"CRLFs":             []byte("\r\n\r\n--\r\n\r\n"),
	"delimiter":         []byte("--tercet-00000000000000000000000000000000\r\nContent-Type: text/plain\r\n\r\nx\r\n--tercet-00000000000000000000000000000000--"),
	"SDK delimiter":     []byte("\r\n--vqs-1\r\n\r\n--vqs-1--\r\n"),
	"all bytes":         allBytes(),
	"frame":             wire.AppendFrame(nil, []byte("a: b\n"), []byte("x")),
	"16 KiB":            bytes.Repeat([]byte("0123456789abcdef"), 1<<10),
	"16 KiB and a byte": append(bytes.Repeat([]byte("0123456789abcdef"), 1<<10), '!'),
	"largest":           bytes.Repeat([]byte("\r\n--tercet-"), limits.MessageBytesMax/11+1)[:limits.MessageBytesMax],
}

func allBytes() []byte {
	b := make([]byte, 256)
	for i := range b {
		b[i] = byte(i)
	}
	return b
}

func TestRoundTrip(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t)})
	for form := range receiveForms {
		for name, payload := range payloads {
			t.Run(form+"/"+name, func(t *testing.T) {
				topic := "t" + fmt.Sprintf("%x", name+form)
				id := sendMessage(t, base, topic, payload, "Content-Type", `text/x-thing; a="b;c"`, "X-Trace", "abc", "traceparent", "00-1-2-03", "Content-Encoding", "gzip", "User-Agent", "me", "Authorization", "Bearer secret")
				got := receiveMessages(t, base, topic, "g", form)
				if len(got) != 1 {
					t.Fatalf("%d messages", len(got))
				}
				m := got[0]
				if !bytes.Equal(m.body, payload) {
					t.Errorf("body of %d bytes came back as %d bytes", len(payload), len(m.body))
				}
				receipt := m.head["vqs-receipt-handle"]
				for _, h := range []string{"vqs-timestamp", "vqs-expires-at"} {
					if !isoTime.MatchString(m.head[h]) {
						t.Errorf("%s: %q", h, m.head[h])
					}
					delete(m.head, h)
				}
				delete(m.head, "vqs-receipt-handle")
				want := map[string]string{
					"content-type": `text/x-thing; a="b;c"`, "vqs-message-id": id, "vqs-delivery-count": "1",
					"x-trace": "abc", "traceparent": "00-1-2-03", "content-encoding": "gzip",
				}
				if fmt.Sprint(m.head) != fmt.Sprint(want) {
					t.Errorf("headers\n%v, want\n%v", m.head, want)
				}
				expect(t, call(t, "DELETE", lease(base, topic, "g", receipt), nil), 204, "")
				if got := receiveMessages(t, base, topic, "g", form); got != nil {
					t.Errorf("after the acknowledgement: %v", got)
				}
			})
		}
	}
}

// A chunked body has no length to go by.
func TestChunkedSend(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t)})
	for name, payload := range payloads {
		req, err := http.NewRequest("POST", base+"/api/v3/topic/chunked", struct{ io.Reader }{bytes.NewReader(payload)}) // hides the length
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != 201 {
			t.Fatalf("%s: %s", name, res.Status)
		}
		got := receiveMessages(t, base, "chunked", "g", wire.MediaMultipart)
		if len(got) != 1 || !bytes.Equal(got[0].body, payload) {
			t.Fatalf("%s: came back as %d messages", name, len(got))
		}
		if ct := got[0].head["content-type"]; ct != wire.MediaOctets {
			t.Errorf("%s: Content-Type %q of a message sent without one", name, ct)
		}
	}
}

func TestReceiveMany(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t)})
	for i := range 15 {
		sendMessage(t, base, "many", bytes.Repeat([]byte{'a' + byte(i)}, i*3000))
	}
	for form := range receiveForms {
		next := 0
		for _, want := range []int{10, 5, 0} {
			got := receiveMessages(t, base, "many", "g-"+fmt.Sprintf("%x", form), form, wire.HeaderMaxMessages, "10")
			if len(got) != want {
				t.Fatalf("%s: %d messages, want %d", form, len(got), want)
			}
			for _, m := range got {
				if !bytes.Equal(m.body, bytes.Repeat([]byte{'a' + byte(next)}, next*3000)) {
					t.Errorf("%s: message %d is another one", form, next)
				}
				next++
			}
		}
	}
	// The standard library's reader agrees with ours.
	r := call(t, "POST", base+"/api/v3/topic/many/consumer/std", nil, "Accept", "multipart/mixed, application/x-ndjson", wire.HeaderMaxMessages, "10")
	expect(t, r, 200, "")
	_, params, _ := mime.ParseMediaType(r.header.Get("Content-Type"))
	parts := multipart.NewReader(bytes.NewReader(r.body), params["boundary"])
	for i := range 10 {
		p, err := parts.NextRawPart()
		if err != nil {
			t.Fatalf("part %d: %v", i, err)
		}
		if b, _ := io.ReadAll(p); len(b) != i*3000 {
			t.Errorf("part %d: %d bytes", i, len(b))
		}
	}
	if _, err := parts.NextRawPart(); err != io.EOF {
		t.Errorf("behind the last part: %v", err)
	}
}

func TestBoundaryIsFresh(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		b := newBoundary()
		if seen[b] {
			t.Fatal("a boundary came twice")
		}
		seen[b] = true
		if len(b) != len("tercet-")+32 {
			t.Fatalf("boundary %q has no 128 bits", b)
		}
	}
}

func TestLeases(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t)})
	topic := base + "/api/v3/topic/leases"
	id := sendMessage(t, base, "leases", []byte("x"))
	byID := func(id string, headers ...string) reply {
		t.Helper()
		return call(t, "POST", topic+"/consumer/g/id/"+id, nil, append(headers, "Accept", wire.MediaMultipart)...)
	}
	// A peek changes nothing and its handle settles nothing.
	for range 2 {
		peeked := receiveMessages(t, base, "leases", "g", wire.MediaMultipart, wire.HeaderVisibility, "0")
		if len(peeked) != 1 || peeked[0].head["vqs-delivery-count"] != "1" || peeked[0].head["vqs-message-id"] != id {
			t.Fatalf("peek: %v", peeked)
		}
		expect(t, call(t, "DELETE", lease(base, "leases", "g", peeked[0].head["vqs-receipt-handle"]), nil), 409, "lease_expired")
	}
	expect(t, byID(id, wire.HeaderVisibility, "0"), 200, "")

	first := strictParts(t, "multipart/mixed; boundary="+strings.Repeat("x", 32), fixedBoundary(t, byID(id)))[0]
	receipt := first.head["vqs-receipt-handle"]
	if first.head["vqs-delivery-count"] != "1" || string(first.body) != "x" {
		t.Fatalf("by id: %v", first)
	}
	// Leased: others do not get it.
	r := byID(id)
	expect(t, r, 409, "leased_elsewhere")
	if r.header.Get("Retry-After") == "" {
		t.Error("409 without Retry-After")
	}
	if got := receiveMessages(t, base, "leases", "g", wire.MediaMultipart); got != nil {
		t.Fatalf("received twice: %v", got)
	}
	// Extensions, with and without /visibility; the handle stays.
	for _, path := range []string{"", "/visibility"} {
		r := call(t, "PATCH", lease(base, "leases", "g", receipt)+path, []byte(`{"visibilityTimeoutSeconds": 120}`), "Content-Type", "application/json")
		expect(t, r, 200, "")
		if string(r.body) != `{"success":true}` {
			t.Errorf("extend: %v", r)
		}
	}
	// Beyond the expiry: the message's own comes back and the lease stays.
	short := sendMessage(t, base, "leases", []byte("y"), wire.HeaderRetention, "60")
	m := receiveMessages(t, base, "leases", "g", wire.MediaMultipart, wire.HeaderVisibility, "300")[0]
	if m.head["vqs-message-id"] != short {
		t.Fatalf("received %v", m)
	}
	r = call(t, "PATCH", lease(base, "leases", "g", m.head["vqs-receipt-handle"]), []byte(`{"visibilityTimeoutSeconds":3600}`))
	expect(t, r, 400, "extend_past_expiry")
	var e wire.Error
	json.Unmarshal(r.body, &e)
	if !isoTime.MatchString(e.MessageExpiresAt) || !isoTime.MatchString(e.RequestedExpiresAt) {
		t.Errorf("past the expiry: %v", r)
	}
	// Released at once, it comes again under another handle; the old one is stale.
	expect(t, call(t, "PATCH", lease(base, "leases", "g", receipt), []byte(`{"visibilityTimeoutSeconds":0}`)), 200, "")
	expect(t, call(t, "DELETE", lease(base, "leases", "g", receipt), nil), 409, "not_in_flight")
	again := receiveMessages(t, base, "leases", "g", wire.MediaMultipart)[0]
	if again.head["vqs-delivery-count"] != "2" || again.head["vqs-receipt-handle"] == receipt {
		t.Fatalf("again: %v", again)
	}
	expect(t, call(t, "DELETE", lease(base, "leases", "g", receipt), nil), 409, "not_holder")
	expect(t, call(t, "DELETE", lease(base, "leases", "g", again.head["vqs-receipt-handle"]), nil), 204, "")
	expect(t, call(t, "DELETE", lease(base, "leases", "g", again.head["vqs-receipt-handle"]), nil), 404, "message_not_found")
	expect(t, call(t, "PATCH", lease(base, "leases", "g", again.head["vqs-receipt-handle"]), []byte(`{"visibilityTimeoutSeconds":1}`)), 404, "message_not_found")
	expect(t, byID(id), 410, "already_acknowledged")
}

// fixedBoundary rewrites a multipart answer so that its boundary is 32 times x.
func fixedBoundary(t testing.TB, r reply) []byte {
	t.Helper()
	expect(t, r, 200, "")
	_, params, err := mime.ParseMediaType(r.header.Get("Content-Type"))
	if err != nil {
		t.Fatal(err)
	}
	return bytes.ReplaceAll(r.body, []byte(params["boundary"]), bytes.Repeat([]byte("x"), 32))
}

func TestConcurrencyLimit(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t)})
	for range 5 {
		sendMessage(t, base, "limited", []byte("x"))
	}
	leased := receiveMessages(t, base, "limited", "g", wire.MediaMultipart, wire.HeaderMaxConcurrency, "3", wire.HeaderMaxMessages, "10")
	if len(leased) != 3 {
		t.Fatalf("%d messages with room for 3", len(leased))
	}
	// No room at all: a refusal that counts, and passes as soon as a message is settled.
	full := []string{"Accept", wire.MediaMultipart, wire.HeaderMaxConcurrency, "3"}
	r := call(t, "POST", base+"/api/v3/topic/limited/consumer/g", nil, full...)
	expect(t, r, 429, "concurrency_limit")
	var limit struct{ CurrentInflight, MaxConcurrency int }
	if err := json.Unmarshal(r.body, &limit); err != nil || limit.CurrentInflight != 3 || limit.MaxConcurrency != 3 {
		t.Errorf("the refusal says %s, want 3 of 3 in flight", r.body)
	}
	if seconds, _ := strconv.Atoi(r.header.Get("Retry-After")); seconds < 1 {
		t.Errorf("Retry-After %q, want the time until a lease ends", r.header.Get("Retry-After"))
	}
	// One that waits is answered empty when its time is over: it was refused nothing.
	if r := call(t, "POST", base+"/api/v3/topic/limited/consumer/g", nil, append(full, wire.HeaderWait, "1")...); r.status != 204 {
		t.Errorf("a wait at the limit: %v, want 204", r)
	}
	expect(t, call(t, "DELETE", base+"/api/v3/topic/limited/consumer/g/lease/"+leased[0].head["vqs-receipt-handle"], nil), 204, "")
	if got := receiveMessages(t, base, "limited", "g", wire.MediaMultipart, full[2:]...); len(got) != 1 {
		t.Errorf("%d messages after one was settled, want 1", len(got))
	}
	if got := receiveMessages(t, base, "limited", "other", wire.MediaMultipart, wire.HeaderMaxConcurrency, "1", wire.HeaderMaxMessages, "10"); len(got) != 1 {
		t.Fatalf("%d messages for another group with room for 1", len(got))
	}
}

// TestUnsettledLimit leases as many messages as a group may hold: further ones are refused, other groups are not
// concerned, and a settlement makes room.
func TestUnsettledLimit(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t)})
	const each = limits.BatchMessagesMax
	var part strings.Builder
	for range each {
		part.WriteString("--b\r\ncontent-type: text/plain\r\n\r\nx\r\n")
	}
	part.WriteString("--b--\r\n")
	parallel := func(n int, call func()) {
		var left atomic.Int64
		left.Store(int64(n))
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				for left.Add(-1) >= 0 {
					call()
				}
			})
		}
		wg.Wait()
	}
	parallel(limits.UnsettledPerGroupMax/each+1, func() {
		if r := call(t, "POST", base+"/api/v3/topic/held/batch", []byte(part.String()), "Content-Type", "multipart/mixed; boundary=b"); r.status != 200 {
			t.Errorf("batch: %v", r)
		}
	})
	take := []string{"Accept", wire.MediaNDJSON, wire.HeaderMaxMessages, "10", wire.HeaderVisibility, "3600"}
	var one atomic.Pointer[string]
	parallel(limits.UnsettledPerGroupMax/10, func() {
		r := call(t, "POST", base+"/api/v3/topic/held/consumer/g", nil, take...)
		var d struct{ ReceiptHandle string }
		if err := json.NewDecoder(bytes.NewReader(r.body)).Decode(&d); r.status != 200 || err != nil {
			t.Errorf("receive: %v, %v", r, err)
		}
		one.Store(&d.ReceiptHandle)
	})
	if t.Failed() {
		return
	}
	r := call(t, "POST", base+"/api/v3/topic/held/consumer/g", nil, take...)
	expect(t, r, 429, "unsettled_limit")
	if seconds, _ := strconv.Atoi(r.header.Get("Retry-After")); seconds < 1 {
		t.Errorf("Retry-After %q, want the time until a lease ends", r.header.Get("Retry-After"))
	}
	if got := receiveMessages(t, base, "held", "other", wire.MediaMultipart); len(got) != 1 {
		t.Errorf("another group is given %d messages, want 1", len(got))
	}
	expect(t, call(t, "DELETE", base+"/api/v3/topic/held/consumer/g/lease/"+*one.Load(), nil), 204, "")
	if got := receiveMessages(t, base, "held", "g", wire.MediaMultipart); len(got) != 1 {
		t.Errorf("%d messages after one was settled, want 1", len(got))
	}
}

func TestCursorFallback(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t)})
	sendMessage(t, base, "cursor", []byte("old"))
	if got := receiveMessages(t, base, "cursor", "latest", wire.MediaMultipart, wire.HeaderCursorFallback, "latest"); got != nil {
		t.Fatalf("a group that starts at the end was given %v", got)
	}
	sendMessage(t, base, "cursor", []byte("new"))
	if got := receiveMessages(t, base, "cursor", "latest", wire.MediaMultipart, wire.HeaderCursorFallback, "earliest"); len(got) != 1 || string(got[0].body) != "new" {
		t.Errorf("then %v", got)
	}
	if got := receiveMessages(t, base, "cursor", "earliest", wire.MediaMultipart, wire.HeaderCursorFallback, "earliest", wire.HeaderMaxMessages, "2"); len(got) != 2 {
		t.Errorf("from the beginning: %v", got)
	}
}

// What the engine does not support yet is refused as such, once its headers were found valid.
func TestUnsupported(t *testing.T) {
	_, base := start(t, Options{Backend: &fakeBackend{propose: func(ctx context.Context, p raft.Proposal) (raft.Reply, error) {
		return raft.Reply{Result: engine.Result{Code: errs.Unsupported}}, nil
	}}})
	for _, h := range [][]string{{wire.HeaderDelay, "5"}, {wire.HeaderIdempotencyKey, "k"}, {wire.HeaderDeployment, "d1"}} {
		expect(t, call(t, "POST", base+"/api/v3/topic/t", nil, h...), 501, "unsupported")
	}
}

func TestBatch(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t)})
	large := strings.Repeat("x", limits.MessageBytesMax+1)
	parts := []struct{ head, body string }{
		{"content-type: text/plain\r\nx-a: 1\r\n", "one"},
		{"content-type: text/plain\r\nx-a: 1\r\n", "two, with the same head"},
		{"", ""},
		{"content-type: text/plain\r\nvqs-retention-seconds: 59\r\n", "bad retention"},
		{"Content-Type: multipart/mixed; boundary=inner\r\nVQS-Retention-Seconds: 60\r\n", "--inner\r\n\r\nnested\r\n--inner--\r\n"},
		{"content-type: text/plain\r\ncontent-type: text/plain\r\n", "twice"},
		{"content-type\r\n", "no colon"},
		{"x-a: " + strings.Repeat("a", 1<<20) + "\r\n", "1 MB of headers"},
		{"vqs-idempotency-key: \r\n", "empty key"},
		{"", large},
		{"x-b: \x01\r\n", "control character"},
		{"", "\r\n--"},
	}
	failed := map[int]string{3: "invalid_header", 5: "invalid_header", 6: "invalid_header", 7: "invalid_header", 8: "invalid_header", 10: "invalid_header"}
	var body bytes.Buffer
	var frames []byte
	for _, p := range parts {
		fmt.Fprintf(&body, "--vqs-1\r\n%s\r\n%s\r\n", p.head, p.body)
		frames = wire.AppendFrame(frames, []byte(strings.ReplaceAll(p.head, "\r\n", "\n")), []byte(p.body))
	}
	body.WriteString("--vqs-1--\r\n")
	for _, form := range []struct {
		name, contentType string
		body              []byte
	}{
		{"multipart", `multipart/mixed; boundary="vqs-1"`, body.Bytes()},
		{"compact", wire.MediaBatch, frames},
	} {
		t.Run(form.name, func(t *testing.T) {
			topic := "batch-" + form.name
			r := call(t, "POST", base+"/api/v3/topic/"+topic+"/batch", form.body, "Content-Type", form.contentType)
			expect(t, r, 200, "")
			if r.header.Get(wire.HeaderZones) != "1" || r.header.Get(wire.HeaderPosition) == "" || r.header.Get(wire.HeaderTerm) == "" {
				t.Errorf("headers %v", r.header)
			}
			var answer wire.Batch
			if err := json.Unmarshal(r.body, &answer); err != nil || len(answer.Results) != len(parts) {
				t.Fatalf("%v %s", err, r.body)
			}
			ids := map[string]int{}
			for i, res := range answer.Results {
				if code := failed[i]; code != "" {
					if res.Status != "failed" || res.Code != code || res.StatusCode != 400 || res.Retryable || res.Error == "" {
						t.Errorf("message %d: %+v", i, res)
					}
					continue
				}
				if res.Status != "sent" || res.MessageID == "" {
					t.Errorf("message %d: %+v", i, res)
				}
				ids[res.MessageID] = i
			}
			got := receiveMessages(t, base, topic, "g", wire.MediaMultipart, wire.HeaderMaxMessages, "10")
			if len(got) != len(parts)-len(failed) || len(got) != len(ids) {
				t.Fatalf("%d messages stored, %d ids", len(got), len(ids))
			}
			for _, m := range got {
				i, ok := ids[m.head["vqs-message-id"]]
				if !ok || string(m.body) != parts[i].body {
					t.Errorf("message %s is %q", m.head["vqs-message-id"], m.body)
				}
				if (m.head["x-a"] == "1") != (i < 2) {
					t.Errorf("message %d has the headers %v", i, m.head)
				}
			}
		})
	}
	t.Run("all failed", func(t *testing.T) {
		r := call(t, "POST", base+"/api/v3/topic/batch-failed/batch", wire.AppendFrame(nil, []byte("vqs-delay-seconds: x\n"), nil), "Content-Type", wire.MediaBatch, "Accept", wire.MediaBatch)
		expect(t, r, 200, "")
		head, text, rest, err := wire.NextFrame(r.body)
		if err != nil || len(rest) > 0 || string(head) != "status: 400\ncode: invalid_header\n" || len(text) == 0 {
			t.Errorf("%q %q %q %v", head, text, rest, err)
		}
	})
	t.Run("100", func(t *testing.T) {
		body := bytes.Repeat(wire.AppendFrame(nil, nil, []byte("x")), 100)
		r := call(t, "POST", base+"/api/v3/topic/batch-100/batch", body, "Content-Type", wire.MediaBatch, "Accept", wire.MediaBatch, wire.HeaderRetention, "60")
		expect(t, r, 200, "")
		seen := map[string]bool{}
		for data := r.body; len(data) > 0; {
			head, id, rest, err := wire.NextFrame(data)
			if err != nil || len(head) > 0 || seen[string(id)] {
				t.Fatalf("%q %q %v", head, id, err)
			}
			seen[string(id)], data = true, rest
		}
		if len(seen) != 100 {
			t.Fatalf("%d ids", len(seen))
		}
	})
}

// A wait ends with a message that is published meanwhile.
func TestLongPoll(t *testing.T) {
	backend := newNode(t)
	s, base := start(t, Options{Backend: backend})
	got := make(chan []received)
	go func() {
		got <- receiveMessages(t, base, "poll", "g", wire.MediaMultipart, wire.HeaderWait, "60")
	}()
	waitFor(t, func() bool { return s.load.waits.Load() == 1 })
	sendMessage(t, base, "poll", []byte("x"))
	if m := <-got; len(m) != 1 || string(m[0].body) != "x" {
		t.Fatalf("the wait ended with %v", m)
	}
	waitFor(t, func() bool { return s.load.waits.Load() == 0 })
	if got := receiveMessages(t, base, "poll", "g", wire.MediaMultipart, wire.HeaderWait, "0"); got != nil {
		t.Errorf("without a wait: %v", got)
	}
}

// waitFor waits for a condition that becomes true by itself.
func waitFor(t testing.TB, condition func() bool) {
	t.Helper()
	deadline := time.After(2 * time.Minute)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("what the test waits for did not happen")
		}
	}
}
