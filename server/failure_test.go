package server

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/servertest"
	"tercet.dev/tercet/server/wire"
)

// blocking is a backend whose commands wait until the test lets them go.
type blocking struct {
	fakeBackend
	entered chan struct{}
	release chan struct{}
}

func newBlocking() *blocking {
	b := &blocking{entered: make(chan struct{}, 1000), release: make(chan struct{})}
	b.propose = func(ctx context.Context, p raft.Proposal) (raft.Reply, error) {
		b.entered <- struct{}{}
		select {
		case <-b.release:
			return raft.Reply{Result: engine.Result{Published: engine.Published{Index: 1, Count: 1}}, Index: 1, Term: 1, Zones: 3}, nil
		case <-ctx.Done():
			return raft.Reply{}, errs.Of(errs.OutcomeUnknown).With(ctx.Err())
		case <-p.Stop:
			return raft.Reply{}, nil
		}
	}
	return b
}

// A command that our own deadline cut off has an unknown outcome and says so with 504.
func TestDeadlineIsUnknown(t *testing.T) {
	b := newBlocking()
	_, base := start(t, Options{Backend: b, Limits: Limits{RequestTimeout: 20 * time.Millisecond}})
	r := call(t, "POST", base+"/api/v3/topic/t", []byte("x"))
	expect(t, r, 504, "outcome_unknown")
	var e wire.Error
	json.Unmarshal(r.body, &e)
	if e.Outcome != "unknown" || r.header.Get("Retry-After") != "" {
		t.Errorf("answered %v, Retry-After %q", r, r.header.Get("Retry-After"))
	}
}

// An error that is none of the catalogue is not shown and not taken for a refusal.
func TestForeignErrorIsUnknown(t *testing.T) {
	_, base := start(t, Options{Backend: &fakeBackend{propose: func(context.Context, raft.Proposal) (raft.Reply, error) {
		return raft.Reply{}, errors.New("secret detail of the disk")
	}}})
	r := call(t, "POST", base+"/api/v3/topic/t", []byte("x"))
	expect(t, r, 500, "internal")
	if bytes.Contains(r.body, []byte("secret")) || !bytes.Contains(r.body, []byte(`"outcome":"unknown"`)) {
		t.Errorf("answered %v", r)
	}
}

// Requests above the bound are refused at once while the others wait.
func TestRequestBound(t *testing.T) {
	b := newBlocking()
	s, base := start(t, Options{Backend: b, Limits: Limits{Requests: 3}})
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if r := call(t, "POST", base+"/api/v3/topic/t", []byte("x")); r.status != 201 {
				t.Errorf("within the bound: %v", r)
			}
		})
	}
	for range 3 {
		<-b.entered
	}
	r := call(t, "POST", base+"/api/v3/topic/t", []byte("x"))
	expect(t, r, 429, "overloaded")
	if r.header.Get("Retry-After") == "" {
		t.Error("429 without Retry-After")
	}
	expect(t, call(t, "POST", base+"/api/v3/topic/t/consumer/g", nil, "Accept", wire.MediaMultipart), 429, "overloaded")
	expect(t, call(t, "GET", base+"/livez", nil), 200, "")
	close(b.release)
	wg.Wait()
	waitFor(t, func() bool { return s.load.requests.Load() == 0 && s.load.bytes.Load() == 0 })
}

// Bodies above the bound of bytes are refused before they are read; what is held follows what has arrived.
func TestByteBound(t *testing.T) {
	b := newBlocking()
	s, base := start(t, Options{Backend: b, Limits: Limits{InflightBytes: 1 << 20}})
	body := bytes.Repeat([]byte("x"), 900<<10)
	done := make(chan reply, 1)
	go func() { done <- call(t, "POST", base+"/api/v3/topic/t", body) }()
	<-b.entered
	if held := s.load.bytes.Load(); held != int64(len(body)) {
		t.Errorf("%d bytes held for a body of %d", held, len(body))
	}
	expect(t, call(t, "POST", base+"/api/v3/topic/t", body), 429, "overloaded")
	// Many clients that announce the most and send next to nothing cost next to nothing.
	host := strings.TrimPrefix(base, "http://")
	var conns []net.Conn
	for range 20 {
		conn, err := net.Dial("tcp", host)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
		fmt.Fprintf(conn, "POST /api/v3/topic/t HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\nx", host, limits.MessageBytesMax)
	}
	waitFor(t, func() bool { return s.load.bytes.Load() == int64(len(body)+20*bodyPiece) })
	for _, conn := range conns {
		conn.Close()
	}
	close(b.release)
	if r := <-done; r.status != 201 {
		t.Errorf("within the bound: %v", r)
	}
	waitFor(t, func() bool { return s.load.bytes.Load() == 0 })
	expect(t, call(t, "POST", base+"/api/v3/topic/t", body), 201, "")
}

func TestConnectionBound(t *testing.T) {
	s, base := start(t, Options{Backend: &fakeBackend{}, Limits: Limits{Connections: 3, ConnectionsPerAddr: 2}})
	host := strings.TrimPrefix(base, "http://")
	var open []net.Conn
	for range 2 {
		conn, err := net.Dial("tcp", host)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		open = append(open, conn)
	}
	waitFor(t, func() bool { return s.load.connections.count() == 2 })
	conn, err := net.Dial("tcp", host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if e := new(wire.Error); res.StatusCode != 429 || json.Unmarshal(body, e) != nil || e.Code != "overloaded" || res.Header.Get("Retry-After") == "" {
		t.Errorf("the connection above the bound: %s %s", res.Status, body)
	}
	open[0].Close()
	waitFor(t, func() bool { return s.load.connections.count() == 1 })
	expect(t, call(t, "POST", base+"/api/v3/topic/t", []byte("x")), 201, "")
}

// TestSlowClients runs clients that take their time against short timeouts.
func TestSlowClients(t *testing.T) {
	s, base := start(t, Options{Backend: newNode(t), Limits: Limits{
		HeaderTimeout: 2 * time.Second, IdleTimeout: 2 * time.Second, BodyTimeout: time.Second, // the clients' heads come in time on any machine
		TransferGrace: 500 * time.Millisecond, TransferRate: 1 << 20, RequestTimeout: 500 * time.Millisecond,
	}})
	servertest.Slow(t, servertest.Target{URL: base})
	waitFor(t, func() bool { return s.load.bytes.Load() == 0 && s.load.connections.count() == 0 })
}

// TestReaderThatNeverReads: an answer that nobody takes is given up, and its bytes are free again.
func TestReaderThatNeverReads(t *testing.T) {
	body := bytes.Repeat([]byte("x"), limits.MessageBytesMax)
	deliveries := make([]engine.Delivery, 10)
	for i := range deliveries {
		deliveries[i] = engine.Delivery{ContentType: "text/plain", Body: body}
	}
	backend := &fakeBackend{propose: func(context.Context, raft.Proposal) (raft.Reply, error) {
		return raft.Reply{Result: engine.Result{Deliveries: deliveries}}, nil
	}}
	s, base := start(t, Options{Backend: backend, Limits: Limits{TransferGrace: 3 * time.Second, TransferRate: 1 << 30}})
	host := strings.TrimPrefix(base, "http://")
	conn, err := net.Dial("tcp", host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.(*net.TCPConn).SetReadBuffer(4 << 10)
	fmt.Fprintf(conn, "POST /api/v3/topic/t/consumer/g HTTP/1.1\r\nHost: %s\r\nAccept: multipart/mixed\r\nVqs-Max-Messages: 10\r\n\r\n", host)
	waitFor(t, func() bool { return s.load.bytes.Load() == int64(len(deliveries)*len(body)) })
	waitFor(t, func() bool { return s.load.bytes.Load() == 0 && s.load.connections.count() == 0 })
}

// TestStalledClientsDisturbNobody: many bodies that never come, and requests beside them go through.
func TestStalledClientsDisturbNobody(t *testing.T) {
	s, base := start(t, Options{Backend: &fakeBackend{}, Limits: Limits{Requests: 10, HeaderTimeout: time.Hour, BodyTimeout: time.Hour, TransferGrace: time.Hour}})
	host := strings.TrimPrefix(base, "http://")
	const clients = 500
	for range clients {
		conn, err := net.Dial("tcp", host)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST /api/v3/topic/t HTTP/1.1\r\nHost: %s\r\nContent-Length: 1000000\r\n\r\nx", host)
	}
	waitFor(t, func() bool { return s.load.bytes.Load() >= clients*bodyPiece })
	for range 100 {
		expect(t, call(t, "POST", base+"/api/v3/topic/t", []byte("x")), 201, "")
	}
}

// TestDrain walks through a stop: not ready, waits sent elsewhere, others served with an answer that ends the
// connection, then no new ones while those in flight finish.
func TestDrain(t *testing.T) {
	b := newBlocking()
	s, base := start(t, Options{Backend: b})
	expect(t, call(t, "GET", base+"/readyz", nil), 200, "")
	waiting, sending := make(chan reply, 1), make(chan reply, 1)
	go func() {
		waiting <- call(t, "POST", base+"/api/v3/topic/t/consumer/g", nil, "Accept", wire.MediaMultipart, wire.HeaderWait, "60")
	}()
	go func() { sending <- call(t, "POST", base+"/api/v3/topic/t", []byte("x")) }()
	<-b.entered
	<-b.entered
	s.Drain()
	r := <-waiting
	expect(t, r, 503, "draining")
	if r.header.Get("Retry-After") == "" {
		t.Error("503 without Retry-After")
	}
	expect(t, call(t, "GET", base+"/readyz", nil), 503, "")
	expect(t, call(t, "GET", base+"/livez", nil), 200, "")
	if r := call(t, "GET", base+"/v1/node", nil); r.status != 200 || !bytes.Contains(r.body, []byte(`"draining":true`)) {
		t.Errorf("/v1/node: %v", r)
	}
	// A wait that begins now ends at once.
	expect(t, call(t, "POST", base+"/api/v3/topic/t/consumer/g", nil, "Accept", wire.MediaMultipart, wire.HeaderWait, "60"), 503, "draining")
	conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
	if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || !res.Close {
		t.Errorf("an answer while draining keeps its connection: %v", err)
	}
	stopped := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		stopped <- s.Shutdown(ctx)
	}()
	waitFor(t, func() bool {
		c, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	select {
	case r := <-sending:
		t.Fatalf("the request in flight was cut off: %v", r)
	default:
	}
	close(b.release)
	if r := <-sending; r.status != 201 {
		t.Errorf("the request in flight: %v", r)
	}
	if err := <-stopped; err != nil {
		t.Errorf("shutdown: %v", err)
	}
}

// TestLinger holds an idle connection open through a drain: it is served until the time is over, and only its answer
// ends it.
func TestLinger(t *testing.T) {
	s, base := start(t, Options{Backend: &fakeBackend{}})
	dial := func() (net.Conn, *bufio.Reader) {
		conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn, bufio.NewReader(conn)
	}
	ask := func(conn net.Conn, r *bufio.Reader) *http.Response {
		t.Helper()
		fmt.Fprintf(conn, "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
		res, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
		return res
	}
	used, fromUsed := dial()
	if ask(used, fromUsed).Close {
		t.Fatal("an answer ends its connection before the drain")
	}
	fresh, fromFresh := dial()
	waitFor(t, func() bool { return s.load.connections.count() == 2 })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	over := make(chan struct{})
	go func() {
		s.Linger(ctx)
		close(over)
	}()
	waitFor(t, s.Draining)
	for what, conn := range map[string]net.Conn{"used": used, "fresh": fresh} {
		r := fromUsed
		if conn == fresh {
			r = fromFresh
		}
		if !ask(conn, r).Close {
			t.Errorf("an answer on the %s connection while draining keeps it", what)
		}
		if _, err := r.ReadByte(); !errors.Is(err, io.EOF) {
			t.Errorf("the %s connection after its answer: %v, want its end", what, err)
		}
		conn.Close()
	}
	<-over // nobody is left, and the time is not over
	idle, fromIdle := dial()
	waitFor(t, func() bool { return s.load.connections.count() == 1 })
	cancel()
	s.Linger(ctx) // returns although a connection is open
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := fromIdle.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("the idle connection after the stop: %v, want its end", err)
	}
	idle.Close()
}

// A client that hangs up ends its wait, and what it may have been given goes back.
func TestWaitEndsWithItsClient(t *testing.T) {
	b := newBlocking()
	s, base := start(t, Options{Backend: b})
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, "POST", base+"/api/v3/topic/t/consumer/g", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", wire.MediaMultipart)
	req.Header.Set(wire.HeaderWait, "60")
	failed := make(chan error, 1)
	go func() {
		_, err := http.DefaultClient.Do(req)
		failed <- err
	}()
	<-b.entered
	cancel()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("the client saw %v", err)
	}
	waitFor(t, func() bool { return s.load.waits.Load() == 0 })
}

// A wait is not cut short by the deadline that was meant for the request's arrival.
func TestWaitOutlastsBodyTimeout(t *testing.T) {
	backend := newNode(t)
	s, base := start(t, Options{Backend: backend, Limits: Limits{BodyTimeout: 50 * time.Millisecond}})
	begun := time.Now()
	got := make(chan reply, 1)
	go func() {
		got <- call(t, "POST", base+"/api/v3/topic/t/consumer/g", nil, "Accept", wire.MediaMultipart, wire.HeaderWait, "60")
	}()
	waitFor(t, func() bool { return s.load.waits.Load() == 1 && time.Since(begun) > 200*time.Millisecond })
	sendMessage(t, base, "t", []byte("x"))
	expect(t, <-got, 200, "")
}
