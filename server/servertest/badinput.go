// Package servertest holds tests of the HTTP surface that need nothing but a base URL: they run against a handler in
// process, a node, and real processes, leader and follower alike.
package servertest

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

// patience bounds every exchange, so that a hanging server is a failure and no hang.
const patience = 3 * time.Minute

// Target is a server under test.
type Target struct {
	// URL is its base URL; plain http.
	URL string
	// Slow also runs the rows that wait for the server's own timeouts, which take as long as the longest of them.
	Slow bool
}

// row is one bad input. Requests are written byte by byte as they stand, since a client library would refuse or
// repair most of them.
type row struct {
	name string
	// raw is the request. HOST stands for the target's host and port, TOPIC for a topic of this run that stays
	// empty.
	raw string
	// status lists what may be answered; 0 is a connection that is closed without an answer.
	status []int
	// code is the expected error code, empty where net/http answers before us.
	code string
	// closed: the connection must not be used again after this.
	closed bool
	// hangUp ends our side of the connection after the request.
	hangUp bool
}

// post is a request to the queue protocol. Header lines end without CRLF.
func post(method, path, body string, headers ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: HOST\r\n", method, path)
	for _, h := range headers {
		b.WriteString(h + "\r\n")
	}
	fmt.Fprintf(&b, "Content-Length: %d\r\n\r\n%s", len(body), body)
	return b.String()
}

const (
	sendPath    = "/api/v3/topic/TOPIC"
	batchPath   = "/api/v3/topic/TOPIC/batch"
	receivePath = "/api/v3/topic/TOPIC/consumer/g"
	leasePath   = "/api/v3/topic/TOPIC/consumer/g/lease/"
	accept      = "Accept: multipart/mixed"
)

// rows returns the table. Every row stores nothing.
func rows() []row {
	var t []row
	add := func(name, raw, code string, status ...int) {
		t = append(t, row{name: name, raw: raw, status: status, code: code})
	}

	// Names. What would be another path's segment is an unknown path.
	long := strings.Repeat("a", limits.NameBytesMax+1)
	for _, n := range []string{"", "%20", ".", "..", "%2e%2e%2f", "%2E%2E", "a%2Fb", "a%00b", "a%20b", "a+b", "a.b", "%C3%A9", "%FF", long, "a%25b", "a;b", "a%0d%0ab", "a%5Cb"} {
		add("topic "+n, post("POST", "/api/v3/topic/"+n, "x"), "invalid_name", 400)
		add("topic in batch "+n, post("POST", "/api/v3/topic/"+n+"/batch", "x"), "invalid_name", 400)
		add("group "+n, post("POST", "/api/v3/topic/TOPIC/consumer/"+n, "", accept), "invalid_name", 400)
	}
	add("topic a/b", post("POST", "/api/v3/topic/a/b", "x"), "not_found", 404)
	add("topic ../b", post("POST", "/api/v3/topic/../b", "x"), "not_found", 404)
	add("topic with a broken escape", post("POST", "/api/v3/topic/a%zz", "x"), "", 400)

	// Numbers in headers.
	numbers := []struct {
		header, path, body string
		other              []string
		bad                []string
	}{
		{wire.HeaderRetention, sendPath, "x", nil, []string{"0", "59", "604801"}},
		{wire.HeaderDelay, sendPath, "x", nil, []string{"604801", "86401"}},
		{wire.HeaderMaxMessages, receivePath, "", []string{accept}, []string{"0", "11"}},
		{wire.HeaderVisibility, receivePath, "", []string{accept}, []string{"3601"}},
		{wire.HeaderMaxConcurrency, receivePath, "", []string{accept}, []string{"0"}},
		{wire.HeaderWait, receivePath, "", []string{accept}, []string{"61"}},
	}
	everywhere := []string{"", "-1", "+1", "1 1", "1.5", "1.", "1e1", "1e3", "0x10", "1_0", "\u0663", "2147483648", "9223372036854775808", "18446744073709551616", "1,1", "one", strings.Repeat("1", 2000)}
	for _, n := range numbers {
		for _, v := range slices.Concat(everywhere, n.bad) {
			add(n.header+" "+short(v), post("POST", n.path, n.body, append(slices.Clone(n.other), n.header+": "+v)...), "invalid_header", 400)
		}
		for _, second := range []string{"1", "2"} {
			add(n.header+" twice 1 "+second, post("POST", n.path, n.body, append(slices.Clone(n.other), n.header+": 1", n.header+": "+second)...), "invalid_header", 400)
		}
	}
	add("delay above retention", post("POST", sendPath, "x", wire.HeaderRetention+": 60", wire.HeaderDelay+": 61"), "invalid_header", 400)
	add("peek that waits", post("POST", receivePath, "", accept, wire.HeaderVisibility+": 0", wire.HeaderWait+": 1"), "invalid_header", 400)

	// Other headers.
	for _, h := range []struct{ path, name, value string }{
		{sendPath, wire.HeaderIdempotencyKey, ""}, {sendPath, wire.HeaderIdempotencyKey, strings.Repeat("k", 257)},
		{sendPath, wire.HeaderDeployment, ""}, {sendPath, wire.HeaderDeployment, "a b"}, {sendPath, wire.HeaderDeployment, long},
		{sendPath, wire.HeaderDurability, "most"}, {sendPath, wire.HeaderDurability, ""}, {sendPath, wire.HeaderDurability, "ALL"},
		{sendPath, "Content-Type", ""}, {sendPath, "Content-Type", "json"}, {sendPath, "Content-Type", "a/b/c"}, {sendPath, "Content-Type", "text/plain; charset"},
		{sendPath, "Content-Type", "text/pl\u00e4in"}, {sendPath, "Content-Type", "text /plain"}, {sendPath, "Content-Type", "text/" + strings.Repeat("x", 2000)},
		{receivePath, wire.HeaderCursorFallback, "oldest"}, {receivePath, wire.HeaderCursorFallback, ""}, {receivePath, wire.HeaderDeployment, "../x"},
	} {
		add(h.name+" "+short(h.value), post("POST", h.path, "x", accept, h.name+": "+h.value), "invalid_header", 400)
	}
	add("idempotency key twice", post("POST", sendPath, "x", wire.HeaderIdempotencyKey+": k", wire.HeaderIdempotencyKey+": k"), "invalid_header", 400)
	add("content type twice", post("POST", sendPath, "x", "Content-Type: text/plain", "Content-Type: text/plain"), "invalid_header", 400)
	add("application headers above their limit", post("POST", sendPath, "x", "X-A: "+strings.Repeat("a", limits.HeaderBytesMax)), "invalid_header", 400)
	for _, a := range []string{"Accept: */*", "Accept: application/json", "Accept: multipart/*", "Accept:", "Accept: multipart/mixed;q=0", "X-Nothing: 1"} {
		add("receive with "+a, post("POST", receivePath, "", a), "not_acceptable", 400)
	}
	// What net/http refuses before a handler sees it.
	for _, h := range []string{"Content-Type: text/plain\x00", wire.HeaderIdempotencyKey + ": a\x07b", "X-A: a\rb"} {
		t = append(t, row{name: "control character in " + short(h), raw: post("POST", sendPath, "x", h), status: []int{400}, closed: true})
	}
	// A CR LF in a value is the end of the header; what follows is another one, and not ours.
	t = append(t, row{name: "folded header", raw: post("POST", sendPath, "x", "X-A: a\r\n b"), status: []int{400}, closed: true},
		row{name: "folded content type", raw: post("POST", sendPath, "x", "Content-Type: text/plain;\r\n\tcharset=utf-8"), status: []int{400}, closed: true},
		row{name: "space before the colon", raw: post("POST", sendPath, "x", "X-A : a"), status: []int{400}, closed: true},
		row{name: "header line ended by LF", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\nContent-Length: 1\r\n\r\nx", status: []int{400}, closed: true},
		row{name: "head ended by LF LF", raw: "POST " + sendPath + " HTTP/1.1\nHost: HOST\nContent-Length: 1\n\nx", status: []int{400}, closed: true},
		row{name: "length and chunked", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n", status: []int{400}, closed: true},
		row{name: "chunked and length", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\ntransfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n1\r\nx\r\n0\r\n\r\n", status: []int{400}, closed: true},
		row{name: "two lengths", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx", status: []int{400}, closed: true},
		row{name: "negative length", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nContent-Length: -1\r\n\r\nx", status: []int{400}, closed: true},
		row{name: "signed length", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nContent-Length: +1\r\n\r\nx", status: []int{400}, closed: true},
		row{name: "length of 2^64", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nContent-Length: 18446744073709551616\r\n\r\nx", status: []int{400}, closed: true},
		row{name: "unknown transfer encoding", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", status: []int{400, 501}, closed: true},
		row{name: "no host", raw: "POST " + sendPath + " HTTP/1.1\r\nContent-Length: 1\r\n\r\nx", status: []int{400}, closed: true},
		row{name: "two hosts", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nHost: HOST\r\nContent-Length: 1\r\n\r\nx", status: []int{400}, closed: true},
		row{name: "headers above 64 KiB", raw: post("POST", sendPath, "x", "X-A: "+strings.Repeat("a", 65<<10)), status: []int{431}, closed: true},
		row{name: "10,000 headers", raw: post("POST", sendPath, "x", manyHeaders(10000)...), status: []int{431}, closed: true},
		row{name: "path of 1 MB", raw: post("POST", "/api/v3/topic/"+strings.Repeat("a", 1<<20), "x"), status: []int{431}, closed: true},
		row{name: "receipt of 1 MB", raw: post("DELETE", leasePath+strings.Repeat("a", 1<<20), ""), status: []int{431}, closed: true},
		row{name: "not HTTP", raw: "*1\r\n$4\r\nPING\r\n", status: []int{400}, closed: true},
		row{name: "HTTP/3.7", raw: "POST " + sendPath + " HTTP/3.7\r\nHost: HOST\r\n\r\n", status: []int{400, 505}, closed: true})
	add("300 headers", post("POST", sendPath, "x", manyHeaders(300)...), "bad_request", 400)

	// Bodies.
	announced := func(n int64) string {
		return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: HOST\r\nContent-Length: %d\r\n\r\nx", sendPath, n)
	}
	big := strings.Repeat("x", limits.MessageBytesMax+1)
	t = append(t, row{name: "body above the limit", raw: announced(limits.LargeMessageBytesMax + 1), status: []int{413}, code: "message_too_large", closed: true},
		row{name: "body of 2^62", raw: announced(1 << 62), status: []int{413}, code: "message_too_large", closed: true},
		row{name: "body in parts shorter than announced", raw: fmt.Sprintf("POST %s HTTP/1.1\r\nHost: HOST\r\nContent-Length: %d\r\n\r\n%s", sendPath, 3<<20, big), status: []int{400}, code: "bad_request", closed: true, hangUp: true},
		row{name: "body in parts, chunked, without end", raw: fmt.Sprintf("POST %s HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", sendPath, len(big), big), status: []int{400}, code: "bad_request", closed: true, hangUp: true},
		row{name: "batch above the limit", raw: fmt.Sprintf("POST %s HTTP/1.1\r\nHost: HOST\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\nx", batchPath, wire.MediaBatch, limits.LargeBatchBytesMax+1), status: []int{413}, code: "message_too_large", closed: true},
		row{name: "large batch shorter than announced", raw: fmt.Sprintf("POST %s HTTP/1.1\r\nHost: HOST\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s", batchPath, wire.MediaBatch, 4<<20, wire.AppendFrame(nil, nil, []byte(big))), status: []int{400}, code: "bad_request", closed: true, hangUp: true},
		row{name: "body shorter than announced", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nContent-Length: 10\r\n\r\nshort", status: []int{400}, code: "bad_request", closed: true, hangUp: true},
		row{name: "large body shorter than announced", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nContent-Length: 1000000\r\n\r\n" + strings.Repeat("x", 500000), status: []int{400}, code: "bad_request", closed: true, hangUp: true},
		row{name: "chunked without end", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", status: []int{400}, code: "bad_request", closed: true, hangUp: true},
		row{name: "chunk size that is none", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\nz\r\nhello\r\n0\r\n\r\n", status: []int{400}, code: "bad_request", closed: true},
		row{name: "chunk of 2^63", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n8000000000000000\r\nhello\r\n0\r\n\r\n", status: []int{400}, code: "bad_request", closed: true, hangUp: true},
		row{name: "chunk line ended by LF", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n5\nhello\r\n0\r\n\r\n", status: []int{400}, code: "bad_request", closed: true},
		row{name: "chunk extension of 1 MB", raw: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n5;" + strings.Repeat("e", 1<<20) + "\r\nhello\r\n0\r\n\r\n", status: []int{400}, code: "bad_request", closed: true})

	// Batches.
	part := "--b\r\ncontent-type: text/plain\r\n\r\nhello\r\n"
	multipart := "Content-Type: multipart/mixed; boundary=b"
	for name, body := range map[string]string{
		"empty":                          "",
		"only the end":                   "--b--\r\n",
		"101 parts":                      strings.Repeat(part, 101) + "--b--\r\n",
		"missing end":                    part,
		"missing end after many":         strings.Repeat(part, 50),
		"cut inside a part":              part + "--b\r\ncontent-type: te",
		"cut inside the last delimiter":  part + "--b-",
		"preamble":                       "hello\r\n" + part + "--b--\r\n",
		"more behind the end":            part + "--b--\r\nmore",
		"no empty line":                  "--b\r\ncontent-type: text/plain\r\n--b--\r\n",
		"other boundary":                 strings.ReplaceAll(part, "--b", "--c") + "--c--\r\n",
		"line feeds only":                "--b\ncontent-type: text/plain\n\nhello\n--b--\n",
		"space behind the delimiter":     "--b \r\n\r\nhello\r\n--b--\r\n",
		"a good part and half a bad one": part + "--b\r\nvqs-delay-seconds: x\r\n",
	} {
		add("multipart batch: "+name, post("POST", batchPath, body, multipart), "invalid_body", 400)
	}
	for _, h := range []string{"Content-Type: multipart/mixed", "Content-Type: multipart/mixed; boundary=", "Content-Type: multipart/mixed; boundary=" + strings.Repeat("b", 71),
		"Content-Type: multipart/form-data; boundary=b", "Content-Type: application/json", "X-A: b"} {
		add("batch with "+short(h), post("POST", batchPath, part+"--b--\r\n", h), "invalid_header", 400)
	}
	frame := string(wire.AppendFrame(nil, nil, []byte("hello")))
	for name, body := range map[string]string{
		"empty":             "",
		"101 frames":        strings.Repeat(frame, 101),
		"cut":               frame + frame[:3],
		"length of 2^63":    "\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
		"length overflows":  strings.Repeat("\xff", 11),
		"head above length": "\x02\x05xx",
		"long form":         "\x86\x00\x00hello",
		"length zero":       "\x00",
	} {
		add("compact batch: "+name, post("POST", batchPath, body, "Content-Type: "+wire.MediaBatch), "invalid_body", 400)
	}
	add("batch with a key for all", post("POST", batchPath, frame, "Content-Type: "+wire.MediaBatch, wire.HeaderIdempotencyKey+": k"), "invalid_header", 400)

	// Receipts and ids that were never given out.
	for _, r := range []string{"", "x", "%20", "%00", "AAAA", "a%2Fb", strings.Repeat("A", 60), strings.Repeat("A", 8000), "%FF%FE", "..", "null"} {
		add("acknowledge "+short(r), post("DELETE", leasePath+r, ""), "invalid_receipt", 400)
		add("extend "+short(r), post("PATCH", leasePath+r, `{"visibilityTimeoutSeconds":30}`), "invalid_receipt", 400)
		add("extend with /visibility "+short(r), post("PATCH", leasePath+r+"/visibility", `{"visibilityTimeoutSeconds":30}`), "invalid_receipt", 400)
	}
	for _, id := range []string{"x", "0", "%00", "msg_1", "a%2Fb", strings.Repeat("0", 60), strings.Repeat("0", 8000)} {
		add("receive by id "+short(id), post("POST", receivePath+"/id/"+id, "", accept), "message_not_found", 404)
	}

	// Bodies of a visibility change; the body is judged before the receipt.
	for name, body := range map[string]string{
		"nothing": "", "no object": "30", "array": "[30]", "null": "null", "absent": "{}", "other member": `{"seconds":30}`,
		"string": `{"visibilityTimeoutSeconds":"30"}`, "fraction": `{"visibilityTimeoutSeconds":30.5}`, "zero fraction": `{"visibilityTimeoutSeconds":30.0}`,
		"exponent": `{"visibilityTimeoutSeconds":3e1}`, "huge": `{"visibilityTimeoutSeconds":1e400}`, "negative": `{"visibilityTimeoutSeconds":-1}`, "minus zero": `{"visibilityTimeoutSeconds":-0}`,
		"above": `{"visibilityTimeoutSeconds":3601}`, "2^64": `{"visibilityTimeoutSeconds":18446744073709551616}`, "NaN": `{"visibilityTimeoutSeconds":NaN}`,
		"leading zero": `{"visibilityTimeoutSeconds":030}`, "true": `{"visibilityTimeoutSeconds":true}`, "null value": `{"visibilityTimeoutSeconds":null}`,
		"twice": `{"visibilityTimeoutSeconds":30,"visibilityTimeoutSeconds":30}`, "trailing": `{"visibilityTimeoutSeconds":30}x`, "two objects": `{"visibilityTimeoutSeconds":30}{}`,
		"trailing comma": `{"visibilityTimeoutSeconds":30,}`, "single quotes": `{'visibilityTimeoutSeconds':30}`, "comment": `{"visibilityTimeoutSeconds":30/**/}`,
		"BOM": "\xef\xbb\xbf" + `{"visibilityTimeoutSeconds":30}`, "invalid UTF-8": "{\"a\":\"\xff\",\"visibilityTimeoutSeconds\":30}", "other case": `{"VisibilityTimeoutSeconds":30}`,
		"cut": `{"visibilityTimeoutSeconds":3`, "nested": `{"visibilityTimeoutSeconds":{"a":30}}`, "depth 1500": `{"a":` + strings.Repeat("[", 1500) + strings.Repeat("]", 1500) + `,"visibilityTimeoutSeconds":30}`,
	} {
		add("extend by "+name, post("PATCH", leasePath+"x", body), "invalid_body", 400)
	}
	t = append(t, row{name: "extend by depth 10000", raw: post("PATCH", leasePath+"x", strings.Repeat("[", 10000)), status: []int{413}, code: "message_too_large", closed: true})

	// Paths, methods, hosts.
	for _, p := range []string{"/api", "/api/v3", "/api/v3/topic", "/api/v2/messages", sendPath + "/", sendPath + "/consumer", receivePath + "/", receivePath + "/id", leasePath + "x/y", leasePath + "x/visibility/",
		"//api/v3/topic/x", "/api/v3//topic/x", "/API/V3/topic/x", "/v1", "/v1/", "/v1/nothing", "/favicon.ico", "/.git/config", "/debug/pprof/", "/debug/vars", "/metrics/", "/livez/x"} {
		add("path "+p, post("POST", p, ""), "not_found", 404)
		add("path "+p+" by GET", post("GET", p, ""), "not_found", 404)
	}
	for _, m := range []string{"GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "FOO", "post"} {
		add(m+" on a topic", post(m, sendPath, ""), "method_not_allowed", 405)
	}
	for _, m := range []string{"GET", "POST", "PUT", "OPTIONS", "TRACE"} {
		add(m+" on a lease", post(m, leasePath+"x", ""), "method_not_allowed", 405)
	}
	for _, p := range []string{"/v1/node", "/v1/cluster", "/v1/topics", "/livez", "/readyz", "/metrics", "/"} {
		add("POST on "+p, post("POST", p, ""), "method_not_allowed", 405)
	}
	add("OPTIONS *", "OPTIONS * HTTP/1.1\r\nHost: HOST\r\n\r\n", "not_found", 404)
	t = append(t, row{name: "CONNECT", raw: "CONNECT evil.example:80 HTTP/1.1\r\nHost: evil.example:80\r\n\r\n", status: []int{400, 404, 405}})
	for _, host := range []string{"evil.example", "evil.example:7301", "127.0.0.1.evil.example", "localhost.evil.example", "[::1", "::1:evil", "localhost@evil.example"} {
		raw := strings.Replace(post("POST", sendPath, "x"), "Host: HOST", "Host: "+host, 1)
		t = append(t, row{name: "host " + host, raw: raw, status: []int{400}})
		t = append(t, row{name: "page for host " + host, raw: strings.Replace(post("GET", "/", ""), "Host: HOST", "Host: "+host, 1), status: []int{400}})
	}
	add("absolute form for another host", strings.Replace(post("POST", "http://evil.example"+sendPath, "x"), "Host: HOST", "Host: HOST", 1), "misdirected_host", 400)
	for _, h := range []string{"Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site", "Origin: http://evil.example", "Origin: null"} {
		add("page elsewhere: "+h, post("POST", sendPath, "x", h), "forbidden", 403)
		add("page elsewhere settles: "+h, post("DELETE", leasePath+"x", "", h), "forbidden", 403)
	}

	// Administration.
	for name, body := range map[string]string{"nothing": "", "no object": "1", "unknown member": `{"id":"n1","x":1}`, "trailing": `{"id":"n1"} x`, "number": `{"id":1}`} {
		add("add a member by "+name, post("POST", "/v1/cluster/members", body), "invalid_body", 400)
	}
	for _, id := range []string{"", "a b", "../x", long} {
		add("add member "+short(id), post("POST", "/v1/cluster/members", fmt.Sprintf(`{"id":%q}`, id)), "invalid_name", 400)
	}
	add("topic of 17 KiB", post("GET", "/v1/topics/"+strings.Repeat("a", limits.KeyBytesMax+1), ""), "invalid_name", 400)
	for _, q := range []string{"limit=0", "limit=1001", "limit=x", "limit=-1", "limit=1e2"} {
		add("topics with "+q, post("GET", "/v1/topics?"+q, ""), "bad_request", 400)
	}
	for _, q := range []string{"from=-1", "from=%2B1", "from=x", "from=18446744073709551616", "from=1.5"} {
		add("browse with "+q, post("GET", "/v1/topics/TOPIC/messages?"+q, ""), "bad_request", 400)
	}
	add("metrics of topics without a pattern", post("GET", "/metrics/topics", ""), "bad_request", 400)
	return t
}

// manyHeaders returns n header lines of different names.
func manyHeaders(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("X-%d: v", i)
	}
	return out
}

func short(s string) string {
	if len(s) > 40 {
		return fmt.Sprintf("%s… (%d bytes)", s[:40], len(s))
	}
	return fmt.Sprintf("%q", s)
}

// BadInput sends every kind of bad input to the target and checks that it costs an error to its sender and nothing to
// anyone else: the documented status and code, an outcome of none, the connection closed where its state is in doubt,
// nothing stored, and a server that still works.
func BadInput(t *testing.T, target Target) {
	t.Helper()
	host := hostOf(t, target)
	var random [6]byte
	rand.Read(random[:])
	topic := "bad-input-" + hex.EncodeToString(random[:])
	for _, r := range rows() {
		t.Run(r.name, func(t *testing.T) { r.run(t, host, topic) })
	}
	t.Run("receipts", func(t *testing.T) { receipts(t, target, topic) })
	if target.Slow {
		t.Run("slow", func(t *testing.T) { Slow(t, target) })
	}
	t.Run("nothing stored", func(t *testing.T) {
		res := request(t, target, "POST", "/api/v3/topic/"+topic+"/consumer/after", "", accept)
		if res.status != http.StatusNoContent {
			t.Errorf("a receive from the topic of the refused requests: %d %s, want 204", res.status, res.body)
		}
	})
	t.Run("still works", func(t *testing.T) {
		res := request(t, target, "POST", "/api/v3/topic/"+topic+"-good", "x")
		if res.status != http.StatusCreated {
			t.Errorf("send: %d %s", res.status, res.body)
		}
	})
}

func hostOf(t *testing.T, target Target) string {
	t.Helper()
	u, err := url.Parse(target.URL)
	if err != nil || u.Scheme != "http" {
		t.Fatalf("target %q: want a base URL of plain http", target.URL)
	}
	return u.Host
}

// run sends the row's request on a connection of its own.
func (r *row) run(t *testing.T, host, topic string) {
	conn, err := net.Dial("tcp", host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	raw := strings.NewReplacer("HOST", host, "TOPIC", topic).Replace(r.raw)
	written := make(chan struct{})
	go func() {
		defer close(written)
		// A server that answers early and closes makes the rest fail to be written.
		io.WriteString(conn, raw)
		if r.hangUp {
			conn.(*net.TCPConn).CloseWrite()
		}
	}()
	defer func() { conn.Close(); <-written }()
	in := bufio.NewReader(conn)
	res, err := http.ReadResponse(in, &http.Request{Method: method(raw)})
	if err != nil {
		if !slices.Contains(r.status, 0) {
			t.Fatalf("no answer: %v, want %v", err, r.status)
		}
		return
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%d, then: %v", res.StatusCode, err)
	}
	if !slices.Contains(r.status, res.StatusCode) {
		t.Fatalf("answered %d %s, want %v", res.StatusCode, body, r.status)
	}
	if r.code != "" && method(raw) != "HEAD" {
		checkError(t, res.Header, body, r.code)
	}
	if r.closed {
		if _, err := in.ReadByte(); err == nil {
			t.Error("the connection is still open and sends more")
		}
	}
}

func method(raw string) string {
	m, _, _ := strings.Cut(raw, " ")
	return m
}

// checkError checks an error's document.
func checkError(t *testing.T, h http.Header, body []byte, code string) {
	t.Helper()
	if got := h.Get("Content-Type"); got != wire.MediaJSON {
		t.Errorf("Content-Type %q", got)
	}
	var e wire.Error
	if err := json.Unmarshal(body, &e); err != nil {
		t.Fatalf("the body is no JSON: %v: %s", err, body)
	}
	if e.Code != code {
		t.Errorf("code %q, want %q: %s", e.Code, code, body)
	}
	if e.Outcome != "none" {
		t.Errorf("outcome %q, want none", e.Outcome)
	}
	if e.Error == "" || e.Hint == "" || e.RequestID == "" || e.RequestID != h.Get(wire.HeaderRequestID) {
		t.Errorf("incomplete: %s (%s %s)", body, wire.HeaderRequestID, h.Get(wire.HeaderRequestID))
	}
}

// answer is a whole answer.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// request makes a well-formed request. Header lines end without CRLF.
func request(t *testing.T, target Target, method, path, body string, headers ...string) answer {
	t.Helper()
	req, err := http.NewRequest(method, target.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Add(name, value)
	}
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{res.StatusCode, res.Header, data}
}

// leased publishes a message and leases it for a group.
func leased(t *testing.T, target Target, topic, group string) (id, receipt string) {
	t.Helper()
	sent := request(t, target, "POST", "/api/v3/topic/"+topic, "a secret")
	if sent.status != http.StatusCreated {
		t.Fatalf("send: %d %s", sent.status, sent.body)
	}
	got := request(t, target, "POST", "/api/v3/topic/"+topic+"/consumer/"+group, "", "Accept: application/x-ndjson")
	var m wire.Message
	if err := json.Unmarshal(got.body, &m); got.status != http.StatusOK || err != nil {
		t.Fatalf("receive: %d %s", got.status, got.body)
	}
	return m.MessageID, m.ReceiptHandle
}

// receipts uses real receipts where they must not work.
func receipts(t *testing.T, target Target, topic string) {
	topic += "-receipts"
	id, receipt := leased(t, target, topic, "g")
	_, elsewhere := leased(t, target, topic+"-2", "g")
	lease := func(topic, group, receipt string) string {
		return "/api/v3/topic/" + topic + "/consumer/" + group + "/lease/" + url.PathEscape(receipt)
	}
	refused := func(name, path string) {
		t.Helper()
		for _, method := range []string{"DELETE", "PATCH"} {
			res := request(t, target, method, path, `{"visibilityTimeoutSeconds":60}`)
			if !slices.Contains([]int{400, 404, 409}, res.status) {
				t.Errorf("%s: %s answered %d %s", name, method, res.status, res.body)
			}
			if bytes.Contains(res.body, []byte("a secret")) || bytes.Contains(res.body, []byte(id)) {
				t.Errorf("%s: the answer tells of the message: %s", name, res.body)
			}
		}
	}
	refused("of another group", lease(topic, "other", receipt))
	refused("of another topic", lease(topic, "g", elsewhere))
	refused("in a topic that does not exist", lease(topic+"-none", "g", receipt))
	first := ""
	for i := range len(receipt) * 8 {
		b := []byte(receipt)
		if b[i/8] ^= 1 << (i % 8); b[i/8] >= 0x80 || i%8 > 2 && i%24 != 0 {
			continue // a sample of the positions of the higher bits
		}
		res := request(t, target, "DELETE", lease(topic, "g", string(b)), "")
		if res.status != 400 {
			t.Fatalf("bit %d flipped: %d %s", i, res.status, res.body)
		}
		var e wire.Error
		json.Unmarshal(res.body, &e)
		if first == "" {
			first = e.Error
		}
		if e.Error != first {
			t.Errorf("bit %d flipped: %q, and others %q", i, e.Error, first)
		}
	}
	for _, cut := range []int{1, len(receipt) / 2, len(receipt) - 1} {
		refused(fmt.Sprintf("cut to %d characters", cut), lease(topic, "g", receipt[:cut]))
	}
	refused("with more behind it", lease(topic, "g", receipt+"A"))
	if res := request(t, target, "DELETE", lease(topic, "g", receipt), ""); res.status != http.StatusNoContent {
		t.Fatalf("the receipt itself: %d %s", res.status, res.body)
	}
	if res := request(t, target, "DELETE", lease(topic, "g", receipt), ""); res.status != http.StatusNotFound {
		t.Errorf("the receipt after its acknowledgement: %d %s, want 404", res.status, res.body)
	}
	if res := request(t, target, "POST", "/api/v3/topic/"+topic+"/consumer/g/id/"+id, "", accept); res.status != http.StatusGone {
		t.Errorf("the message by its id after its acknowledgement: %d %s, want 410", res.status, res.body)
	}
	if res := request(t, target, "POST", "/api/v3/topic/"+topic+"-2/consumer/g/id/"+id, "", accept); res.status != http.StatusNotFound {
		t.Errorf("the message by its id in another topic: %d %s, want 404", res.status, res.body)
	}
}

// slowClient is a client that takes its time.
type slowClient struct {
	begin string
	// more is sent again and again.
	more string
	// answered is set where a 408 is expected; else the connection may be closed without an answer.
	answered bool
}

var slowClients = map[string]slowClient{
	"nothing at all":   {},
	"head never ends":  {begin: "POST / HTTP/1.1\r\nHost: HOST\r\n"},
	"head by bytes":    {begin: "POST / HTTP/1.1\r\nHost: HOST\r\nX-A: ", more: "a"},
	"body never comes": {begin: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nContent-Length: 1000\r\n\r\n", answered: true},
	"body stops":       {begin: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nContent-Length: 1000\r\n\r\nx", answered: true},
	"body by bytes":    {begin: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nContent-Length: 1000000\r\n\r\nx", more: "x", answered: true},
	"chunks by bytes":  {begin: "POST " + sendPath + " HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n", more: "1\r\nx\r\n", answered: true},
	"batch stops":      {begin: "POST " + batchPath + " HTTP/1.1\r\nHost: HOST\r\nContent-Type: " + wire.MediaBatch + "\r\nContent-Length: 1000000\r\n\r\n" + strings.Repeat("x", 100000), answered: true},
}

// Slow runs clients that take their time, all at once. The server must let go of every one of them.
func Slow(t *testing.T, target Target) {
	t.Helper()
	host := hostOf(t, target)
	var clients sync.WaitGroup
	for name, c := range slowClients {
		clients.Go(func() {
			if err := c.run(host, "slow-clients"); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	clients.Wait()
}

// run connects and waits until the server has had enough.
func (c *slowClient) run(host, topic string) error {
	conn, err := net.Dial("tcp", host)
	if err != nil {
		return err
	}
	conn.SetDeadline(time.Now().Add(patience))
	replace := strings.NewReplacer("HOST", host, "TOPIC", topic)
	var writer sync.WaitGroup
	stop := make(chan struct{})
	writer.Go(func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		if _, err := io.WriteString(conn, replace.Replace(c.begin)); err != nil || c.more == "" {
			return
		}
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				if _, err := io.WriteString(conn, c.more); err != nil {
					return
				}
			}
		}
	})
	defer func() { close(stop); conn.Close(); writer.Wait() }()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	switch {
	case err == nil && res.StatusCode != http.StatusRequestTimeout:
		return fmt.Errorf("answered %s", res.Status)
	case err != nil && errors.Is(err, os.ErrDeadlineExceeded):
		return errors.New("the server holds on to the connection")
	case err != nil && c.answered:
		return fmt.Errorf("no answer: %w", err)
	case !c.answered:
		return nil
	}
	var e wire.Error
	if err := json.NewDecoder(res.Body).Decode(&e); err != nil || e.Code != "request_timeout" || e.Outcome != "none" {
		return fmt.Errorf("408 with %+v, %w", e, err)
	}
	return nil
}
