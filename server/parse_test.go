package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

// FuzzDecimal compares the reader of header numbers with arithmetic.
func FuzzDecimal(f *testing.F) {
	for _, s := range []string{"", "0", "007", "60", "604800", "604801", "-1", "+1", " 1", "1 ", "1e3", "0x10", "\u0663", "999999999999999999", "9223372036854775807", "9223372036854775808", "18446744073709551616"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		v, ok := decimal(s)
		digits := s != "" && strings.Trim(s, "0123456789") == ""
		if ok && !digits {
			t.Fatalf("%q was read as %d", s, v)
		}
		want, valid := new(big.Int).SetString(s, 10)
		if digits && len(s) <= 18 && (!ok || !valid || want.Cmp(big.NewInt(v)) != 0) {
			t.Fatalf("%q was read as %d, %v", s, v, ok)
		}
		if _, e := number("H", s, 60, 604800); e == nil && (v < 60 || v > 604800) {
			t.Fatalf("%q passed as from 60 to 604800", s)
		}
	})
}

// FuzzExtendBody: what is accepted is a JSON object with exactly one such member, and its value is what the standard
// library reads.
func FuzzExtendBody(f *testing.F) {
	for _, s := range []string{`{"visibilityTimeoutSeconds":30}`, `{ "visibilityTimeoutSeconds" : 30 }`, "{\n\"a\":1,\"visibilityTimeoutSeconds\":0}\n", `{"visibilityTimeoutSeconds":3600,"x":null}`,
		`{"visibilityTimeoutSeconds":03}`, `{"visibilityTimeoutSeconds":3}}`, `{"visibilityTimeoutSeconds":"3"}`, `{"a":"\ud800","visibilityTimeoutSeconds":3}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		in, e := parseExtend(body)
		if e != nil {
			return
		}
		v := in.seconds
		var doc map[string]json.RawMessage
		if err := json.Unmarshal(body, &doc); err != nil {
			t.Fatalf("%q was accepted and is no object: %v", body, err)
		}
		if got := string(doc["visibilityTimeoutSeconds"]); got != strconv.FormatInt(v, 10) || v < 0 || v > visibilityMax {
			t.Fatalf("%q was read as %d", body, v)
		}
	})
}

func TestExtendBodyAccepted(t *testing.T) {
	for body, want := range map[string]int64{
		`{"visibilityTimeoutSeconds":30}`: 30, `{"visibilityTimeoutSeconds": 0 }`: 0, "{\r\n\t\"visibilityTimeoutSeconds\" : 3600}\n": 3600,
		`{"other":"x","visibilityTimeoutSeconds":1,"more":null}`: 1,
	} {
		if v, e := parseExtend([]byte(body)); e != nil || v != (extension{seconds: want}) {
			t.Errorf("%q: %+v %v, want %d", body, v, e, want)
		}
	}
	body := `{"visibilityTimeoutSeconds":5,"release":true,"reason":"no \"stock\""}`
	if v, e := parseExtend([]byte(body)); e != nil || v != (extension{5, true, `no "stock"`}) {
		t.Errorf("%s: %+v %v", body, v, e)
	}
	for _, body := range []string{`{"visibilityTimeoutSeconds":5,"release":1}`, `{"visibilityTimeoutSeconds":5,"reason":"x"}`, `{"release":true}`, `{"visibilityTimeoutSeconds":5,"release":true,"reason":1}`,
		`{"visibilityTimeoutSeconds":5,"release":true,"reason":"` + strings.Repeat("x", 1025) + `"}`} {
		if v, e := parseExtend([]byte(body)); e == nil {
			t.Errorf("%.80s is read as %+v", body, v)
		}
	}
}

// FuzzBatchFrames: whatever is accepted comes out of the encoder again, and allocations follow the input.
func FuzzBatchFrames(f *testing.F) {
	f.Add(wire.AppendFrame(nil, nil, []byte("hello")))
	f.Add(wire.AppendFrame(wire.AppendFrame(nil, []byte("content-type: text/plain\nx-a: b\n"), []byte("hello")), []byte("vqs-retention-seconds: 60\n"), nil))
	f.Add([]byte("\xff\xff\xff\xff\xff\xff\xff\xff\x7f"))
	f.Add([]byte("\x86\x00\x00hello"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var b batch
		b.base.init()
		e := b.parse(memory(data), "")
		checkSpooled(t, data, "", &b, e)
		if e != nil {
			return
		}
		var again []byte
		for rest := data; len(rest) > 0; {
			head, body, more, err := wire.NextFrame(rest)
			if err != nil {
				t.Fatal(err)
			}
			again, rest = wire.AppendFrame(again, head, body), more
		}
		if !bytes.Equal(again, data) {
			t.Fatalf("%q was read as %q", data, again)
		}
		// The stream reader of the client agrees.
		r := wire.NewReader(bytes.NewReader(data), len(data))
		for range b.verdicts {
			if _, _, err := r.Next(); err != nil {
				t.Fatalf("the stream reader: %v", err)
			}
		}
		if _, _, err := r.Next(); !errors.Is(err, io.EOF) {
			t.Fatalf("the stream reader at the end: %v", err)
		}
		checkBatch(t, &b)
	})
}

// checkSpooled: a batch that was put aside is read like one in memory.
func checkSpooled(t *testing.T, data []byte, boundary string, b *batch, e *errs.Error) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "spool"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	src := &spool{f: f, length: int64(len(data)), window: make([]byte, 7)}
	var again batch
	again.base.init()
	e2 := again.parse(src, boundary)
	if fmt.Sprint(e) != fmt.Sprint(e2) || len(again.verdicts) != len(b.verdicts) || len(again.messages) != len(b.messages) {
		t.Fatalf("%q is %v and %d messages of %d in memory, and %v and %d of %d in a file", data, e, len(b.messages), len(b.verdicts), e2, len(again.messages), len(again.verdicts))
	}
	for i := range b.messages {
		m, n := b.messages[i], again.messages[i]
		if n.Body, err = io.ReadAll(src.reader(again.extents[i])); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(m.Body, n.Body) || m.ContentType != n.ContentType || m.Key != n.Key || !slices.Equal(m.Headers, n.Headers) {
			t.Fatalf("message %d is %+v in memory and %+v in a file", i, m, n)
		}
	}
}

// checkBatch checks what holds of every accepted batch.
func checkBatch(t *testing.T, b *batch) {
	t.Helper()
	if len(b.verdicts) == 0 || len(b.verdicts) > limits.BatchMessagesMax {
		t.Fatalf("%d messages were accepted", len(b.verdicts))
	}
	good := 0
	for _, e := range b.verdicts {
		if e == nil {
			good++
		}
	}
	if good != len(b.messages) {
		t.Fatalf("%d messages and %d good verdicts", len(b.messages), good)
	}
	for _, m := range b.messages {
		if !validValue(m.ContentType) || m.ContentType == "" || !m.RetentionDefault && m.Retention < limits.RetentionMin || m.Retention > limits.RetentionMax || m.Delay < 0 || !m.RetentionDefault && m.Delay > m.Retention {
			t.Fatalf("accepted: %+v", m)
		}
		for _, h := range m.Headers {
			if !validToken(h.Name) || !validValue(h.Value) || strings.ToLower(h.Name) != h.Name {
				t.Fatalf("accepted the header %+v", h)
			}
		}
	}
}

// FuzzBatchMultipart: what our reader accepts, the standard library's reads alike.
func FuzzBatchMultipart(f *testing.F) {
	for _, s := range []string{
		"--b\r\n\r\n\r\n--b--", "--b\r\ncontent-type: text/plain\r\n\r\nhello\r\n--b--\r\n", "--b\r\n\r\na\r\n--b\r\n\r\nb\r\n--bb\r\n--b--",
		"--b\r\nx-a: 1\r\nX-A: 2\r\n\r\n\r\n--\r\n--b-\r\n--b--", "--b\r\n\r\n--b--\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var b batch
		b.base.init()
		e := b.parse(memory(data), "b")
		checkSpooled(t, data, "b", &b, e)
		if e != nil {
			return
		}
		checkBatch(t, &b)
		parts := multipart.NewReader(bytes.NewReader(data), "b")
		sent := 0
		for i, e := range b.verdicts {
			p, err := parts.NextRawPart()
			if err != nil {
				// Heads that we judge one by one make the standard library give up on the whole.
				if e == nil && !oddHead(data) {
					t.Fatalf("part %d: %v in %q", i, err, data)
				}
				return
			}
			body, err := io.ReadAll(p)
			if err != nil {
				t.Fatal(err)
			}
			if e == nil {
				if !bytes.Equal(body, b.messages[sent].Body) {
					t.Fatalf("part %d is %q here and %q there, in %q", i, b.messages[sent].Body, body, data)
				}
				sent++
			}
		}
	})
}

// oddHead reports header lines that net/textproto refuses or reads differently: folded ones, and line feeds alone.
func oddHead(data []byte) bool {
	return bytes.Contains(data, []byte("\n ")) || bytes.Contains(data, []byte("\n\t")) ||
		bytes.Count(data, []byte("\n")) != bytes.Count(data, []byte("\r\n")) || bytes.Contains(data, []byte("\r\r")) || bytes.Contains(data, []byte(":\r"))
}

// FuzzPath: whatever the path, a request that reaches a handler has valid names.
func FuzzPath(f *testing.F) {
	for _, p := range []string{"/api/v3/topic/a", "/api/v3/topic/a%2Fb", "/api/v3/topic/a/consumer/b/lease/%2e%2e%2f", "/api/v3/topic/%", "/v1/topics/a%2Fb/messages", "//api/v3/topic/a", "/api/v3/topic/a/consumer/b/id/"} {
		f.Add(p, "POST")
	}
	s, err := New(Options{Backend: &fakeBackend{}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, path, method string) {
		u, err := url.ParseRequestURI(path)
		if err != nil {
			return
		}
		x := &exchange{s: s, r: &http.Request{Method: method, URL: u, Header: http.Header{}}}
		h, _, e := x.route()
		if (h == nil) == (e == nil) {
			t.Fatalf("%s %s: handler %v, error %v", method, path, h != nil, e)
		}
		if h != nil && x.op != opAdmin && x.op != opHealth && x.op != opOther && (!validName(x.topic) || x.group != "" && !validName(x.group)) {
			t.Fatalf("%s %s: topic %q, group %q", method, path, x.topic, x.group)
		}
	})
}

// FuzzReceiptText: only texts that the sealer wrote are receipts, and they are read back.
func FuzzReceiptText(f *testing.F) {
	sealer := engine.NewSealer(fakeSecret)
	f.Add(sealer.Receipt(engine.Receipt{Topic: 1, Group: 2, Offset: 3, Epoch: 4}))
	f.Add("")
	f.Add("AAAA")
	f.Fuzz(func(t *testing.T, text string) {
		if rc, err := sealer.ParseReceipt(text); err == nil && sealer.Receipt(rc) != text {
			t.Fatalf("%q was read as %+v, which is %q", text, rc, sealer.Receipt(rc))
		}
		if id, err := sealer.ParseMessageID(text); err == nil && sealer.MessageID(id) != text {
			t.Fatalf("%q was read as %+v, which is %q", text, id, sealer.MessageID(id))
		}
	})
}

// FuzzJSONString: what we write as a string, the standard library reads as the same one.
func FuzzJSONString(f *testing.F) {
	for _, s := range []string{"", "a", `"\`, "\x00\x1f\x7f\n\r\t", "\u2028<>&", "\xff\xfe", "é"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var got string
		if err := json.Unmarshal(appendJSON(nil, s), &got); err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		if want := strings.ToValidUTF8(s, "\ufffd"); utf8.ValidString(s) && got != want {
			t.Fatalf("%q came back as %q", s, got)
		}
	})
}

// FuzzHead: cutting the bytes of a head into pieces does not change the verdict.
func FuzzHead(f *testing.F) {
	for _, s := range []string{
		"POST / HTTP/1.1\r\nHost: a\r\n\r\nbody\n", "POST / HTTP/1.1\r\nHost: a\n\r\n", "POST / HTTP/1.1\r\nX: a\r\n b\r\n\r\n", "GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
		"\r\n\r\nGET / HTTP/1.1\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\n\n", "GET /" + strings.Repeat("a", 100) + "\n", "GET / HTTP/1.1\r\n" + strings.Repeat("a", 100) + ": b\r\n\r\n",
	} {
		f.Add([]byte(s), 3)
	}
	f.Fuzz(func(t *testing.T, data []byte, step int) {
		whole := &headConn{inHead: true}
		want := whole.look(data)
		if step <= 0 || step > len(data) {
			step = 1
		}
		pieces := &headConn{inHead: true}
		got := true
		for rest := data; got && pieces.inHead && len(rest) > 0; {
			n := min(step, len(rest))
			got = pieces.look(rest[:n])
			rest = rest[n:]
		}
		if got != want || got && pieces.inHead != whole.inHead {
			t.Fatalf("%q: %v at once, %v in pieces of %d", data, want, got, step)
		}
	})
}

func TestParseAccept(t *testing.T) {
	for value, want := range map[string]accepts{
		"multipart/mixed":                                 {multipart: true},
		"application/x-ndjson, multipart/mixed":           {multipart: true, ndjson: true},
		"Multipart/Mixed; q=0.5 ,APPLICATION/X-NDJSON":    {multipart: true, ndjson: true},
		"multipart/mixed;q=0, application/x-ndjson;q=1.0": {ndjson: true},
		"multipart/mixed; a=b; Q = 0.000":                 {},
		"application/vnd.tercet.batch, application/json":  {batch: true, json: true},
		"*/*":            {},
		"":               {},
		"multipart/":     {},
		"multipart/mixe": {},
		",;q=,":          {},
	} {
		if got := parseAccept([]string{value}); got != want {
			t.Errorf("%q: %+v, want %+v", value, got, want)
		}
	}
	if got := parseAccept([]string{"application/x-ndjson", "multipart/mixed"}); !got.multipart || !got.ndjson {
		t.Errorf("two headers: %+v", got)
	}
}

func TestContentTypes(t *testing.T) {
	for _, good := range []string{"text/plain", "application/json", "application/vnd.api+json; charset=utf-8", `multipart/form-data; boundary="a b"`, "x/y ; a=b"} {
		if e := checkContentType(good); e != nil {
			t.Errorf("%q: %v", good, e)
		}
	}
	for _, bad := range []string{"", "/", "text", "text/", "/plain", "text/plain/x", "te xt/plain", "text/plain; a", "text/plain; a=b; a=c", "text/plain\r\nX: y", "text/pl\u00e4in", "text/plain; a=\"\x01\"",
		"text/" + strings.Repeat("x", limits.ContentTypeBytesMax)} {
		if checkContentType(bad) == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

// TestStoredHeaders: nothing that may carry credentials or describes the connection is kept.
func TestStoredHeaders(t *testing.T) {
	for _, name := range []string{"Authorization", "Cookie", "X-Vercel-Oidc-Token", "Proxy-Authorization", "X-Api-Key", "Content-Length", "Transfer-Encoding", "Connection", "Host", wire.HeaderRetention, wire.HeaderReceipt, wire.HeaderZones, "Sec-Fetch-Mode", "User-Agent", "X-Forwarded-For"} {
		if stored(name) {
			t.Errorf("%s is stored", name)
		}
	}
	for _, name := range []string{"Traceparent", "Tracestate", "Baggage", "Content-Encoding", "X-Order", "Ce-Type"} {
		if !stored(name) {
			t.Errorf("%s is not stored", name)
		}
	}
}

func TestHostNames(t *testing.T) {
	s, err := New(Options{Backend: &fakeBackend{}, PublicHosts: []string{"Queue.Example.com"}})
	if err != nil {
		t.Fatal(err)
	}
	for host, good := range map[string]bool{
		"127.0.0.1": true, "127.0.0.1:7301": true, "[::1]:7301": true, "[::1]": true, "10.1.2.3:80": true, "localhost": true, "LOCALHOST:7301": true, "localhost.": true,
		"queue.example.com": true, "queue.example.com:443": true, "QUEUE.example.COM.": true,
		"": false, "evil.example": false, "example.com": false, "a.localhost": false, "127.0.0.1.evil.example": false, "[::1": false, "1.2.3": false, "0x7f.1": false, ":7301": false,
	} {
		if e := s.checkHost(&http.Request{Host: host}); (e == nil) != good {
			t.Errorf("host %q: %v", host, e)
		}
	}
}

func TestBefore(t *testing.T) {
	for _, prefix := range []string{"a", "order-", "b\x00", "\x01"} {
		after := before(prefix)
		for _, name := range []string{prefix, prefix + "\x00", prefix + "zzz"} {
			if name <= after {
				t.Errorf("%q does not come behind %q", name, after)
			}
		}
	}
	if got := before(""); got != "" {
		t.Errorf("before nothing: %q", got)
	}
}

func ExampleNew() {
	_, err := New(Options{})
	fmt.Println(err)
	// Output: server: no backend
}
