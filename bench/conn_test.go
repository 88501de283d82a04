package bench

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/internal/errs"
)

// scripted answers each request on a connection with the next text, and then closes it.
func scripted(t *testing.T, answers ...string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r := bufio.NewReader(c)
			for _, a := range answers {
				req, err := http.ReadRequest(r)
				if err != nil {
					break
				}
				_, _ = io.Copy(io.Discard, req.Body)
				if _, err := io.WriteString(c, a); err != nil {
					break
				}
			}
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String()
}

const anyRequest = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"

func TestConnReadsAnswers(t *testing.T) {
	addr := scripted(t,
		"HTTP/1.1 201 Created\r\nContent-Length: 5\r\nTercet-Zones: 3\r\nX-Other: y\r\n\r\nhello",
		"HTTP/1.1 204 No Content\r\n\r\n",
		"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntercet-zones: 2\r\n\r\n5\r\nhello\r\nA\r\n, it is me\r\n0\r\n\r\n",
		"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
	)
	c := newConn([]string{addr}, 0, time.Minute)
	defer c.Close()
	for i, want := range []answer{
		{status: 201, zones: 3, body: []byte("hello")},
		{status: 204, zones: -1},
		{status: 200, zones: 2, body: []byte("hello, it is me")},
		{status: 429, zones: -1},
		{status: 201, zones: 3, body: []byte("hello")}, // on a new connection
	} {
		got, err := c.do(t.Context(), []byte(anyRequest), nil)
		if err != nil {
			t.Fatalf("answer %d: %v", i, err)
		}
		if got.status != want.status || got.zones != want.zones || string(got.body) != string(want.body) {
			t.Errorf("answer %d: got %d %d %q", i, got.status, got.zones, got.body)
		}
	}
}

func TestConnRefusesOtherThings(t *testing.T) {
	for _, bad := range []string{
		"",
		"HTTP/1.0 200 OK\r\n\r\n",
		"HTTP/1.1 2x0 OK\r\n\r\n",
		"HTTP/1.1 200 OK\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
		"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
		"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTercet-Zones: many\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
	} {
		c := newConn([]string{scripted(t, bad)}, 0, time.Minute)
		a, err := c.do(t.Context(), []byte(anyRequest), nil)
		if errs.CodeOf(err) != errs.OutcomeUnknown {
			t.Errorf("%q: %+v, error %v", bad, a, err)
		}
		c.Close()
	}
}

func TestConnTurnsToTheNextServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := l.Addr().String()
	l.Close()
	c := newConn([]string{gone, scripted(t, "HTTP/1.1 204 No Content\r\n\r\n")}, 0, time.Minute)
	defer c.Close()
	_, err = c.do(t.Context(), []byte(anyRequest), nil)
	if code := errs.CodeOf(err); code.Info().Outcome != errs.None {
		t.Errorf("a refused connection: %v, outcome %s", err, code.Info().Outcome)
	}
	if a, err := c.do(t.Context(), []byte(anyRequest), nil); err != nil || a.status != 204 {
		t.Errorf("the next server: %+v, %v", a, err)
	}
	// The connection has been closed by the server: nobody knows what became of the request.
	if _, err := c.do(t.Context(), []byte(anyRequest), nil); errs.CodeOf(err) != errs.OutcomeUnknown {
		t.Errorf("a closed connection: %v", err)
	}
}

func TestConnIsInterrupted(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var server net.Conn // stays open: only the interruption ends the request
	arrived := make(chan struct{})
	go func() {
		defer close(arrived)
		var err error
		if server, err = l.Accept(); err == nil {
			_, _ = server.Read(make([]byte, 1))
		}
		cancel()
	}()
	rs := &requests{pool: []request{{head: []byte(anyRequest)}}}
	p := &httpPublisher{conn: newConn([]string{l.Addr().String()}, 0, time.Hour), feed: rs.feed(0)}
	defer p.Close()
	_, err = p.Publish(ctx, time.Now())
	<-arrived
	defer server.Close()
	if errs.CodeOf(err) != errs.OutcomeUnknown {
		t.Errorf("got %v", err)
	}
}

func TestFailureOf(t *testing.T) {
	a := answer{status: 429, body: []byte(`{"error":"full","code":"disk_full","outcome":"none"}`)}
	if err := a.failure(); !errors.Is(err, errs.Of(errs.DiskFull)) || !strings.Contains(err.Error(), "429") {
		t.Errorf("got %v", err)
	}
	for _, body := range []string{"", "not JSON", `{"code":`, `{"code":"`, `{"code":"never_heard"}`} {
		if err := (answer{status: 500, body: []byte(body)}).failure(); !errors.Is(err, errs.Of(errs.Internal)) {
			t.Errorf("%q: got %v", body, err)
		}
	}
}
