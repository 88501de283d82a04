package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

// discard is a ResponseWriter that keeps nothing.
type discard struct{ h http.Header }

func (d *discard) Header() http.Header         { return d.h }
func (d *discard) WriteHeader(int)             {}
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }

// replay is a request body that can be read again.
type replay struct{ bytes.Reader }

func (*replay) Close() error { return nil }

func benchServer(b *testing.B) *Server {
	b.Helper()
	s, err := New(Options{Backend: &fakeBackend{propose: func(ctx context.Context, p raft.Proposal) (raft.Reply, error) {
		info, err := engine.Inspect(p.Command)
		if err != nil {
			return raft.Reply{}, err
		}
		return raft.Reply{Index: 1 << 30, Term: 3, Zones: 3, Result: engine.Result{Published: engine.Published{Index: 1 << 30, Count: uint32(info.Messages)}}}, nil
	}}})
	if err != nil {
		b.Fatal(err)
	}
	return s
}

// benchHandler measures the handler alone: everything above net/http.
func benchHandler(b *testing.B, path, contentType, accept string, body []byte, messages int) {
	s := benchServer(b)
	r := httptest.NewRequest("POST", "http://127.0.0.1:7301"+path, nil)
	r.Header = http.Header{
		"Content-Type": {contentType}, "User-Agent": {"bench"}, "Accept-Encoding": {"gzip"}, "Authorization": {"Bearer x"},
	}
	if accept != "" {
		r.Header["Accept"] = []string{accept}
	}
	in := &replay{}
	r.Body, r.ContentLength = in, int64(len(body))
	w := &discard{h: make(http.Header)}
	b.ReportAllocs()
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		in.Reset(body)
		clear(w.h)
		s.ServeHTTP(w, r)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(messages), "ns/message")
}

func BenchmarkHandlerSend1K(b *testing.B) {
	benchHandler(b, "/api/v3/topic/orders", "application/json", "", bytes.Repeat([]byte("x"), 1024), 1)
}

func benchMessages(n, size int) []client.Message {
	messages := make([]client.Message, n)
	for i := range messages {
		body := make([]byte, size)
		rand.Read(body)
		messages[i] = client.Message{Body: body, ContentType: "application/json"}
	}
	return messages
}

func BenchmarkHandlerBatchFrames100x1K(b *testing.B) {
	body, _ := client.EncodeBatch(nil, benchMessages(100, 1024))
	benchHandler(b, "/api/v3/topic/orders/batch", wire.MediaBatch, wire.MediaBatch, body, 100)
}

func BenchmarkHandlerBatchMultipart100x1K(b *testing.B) {
	var body bytes.Buffer
	for _, m := range benchMessages(100, 1024) {
		fmt.Fprintf(&body, "--vqs-1\r\ncontent-type: application/json\r\n\r\n%s\r\n", m.Body)
	}
	body.WriteString("--vqs-1--\r\n")
	benchHandler(b, "/api/v3/topic/orders/batch", "multipart/mixed; boundary=vqs-1", "", body.Bytes(), 100)
}

// BenchmarkLoopbackSend1K measures one connection after another request over loopback, client included, and beside
// it the same exchange with a handler that only reads the body: what net/http costs without us.
func BenchmarkLoopbackSend1K(b *testing.B) {
	bare := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
		io.WriteString(w, `{"messageId":"0123456789"}`)
	})
	for _, run := range []struct {
		name    string
		handler http.Handler
	}{{"nethttp", bare}, {"tercet", nil}} {
		b.Run(run.name, func(b *testing.B) {
			s := benchServer(b)
			if run.handler != nil {
				s.http.Handler = run.handler
			}
			listeners, err := Listen(b.Context(), "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			l := listeners[0]
			if run.handler == nil {
				go s.Serve(l)
			} else {
				go s.http.Serve(l)
			}
			defer s.Close()
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) { rawClient(b, l.Addr(), pb) })
		})
	}
}

// BenchmarkNodeSend1K is the same against a real node of one, with many publishers so that entries are shared.
func BenchmarkNodeSend1K(b *testing.B) {
	_, base := start(b, Options{Backend: newNode(b)})
	addr, err := net.ResolveTCPAddr("tcp", strings.TrimPrefix(base, "http://"))
	if err != nil {
		b.Fatal(err)
	}
	b.SetParallelism(128)
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) { rawClient(b, addr, pb) })
}

// rawClient sends one prepared request after another, so that the client costs next to nothing.
func rawClient(b *testing.B, addr net.Addr, pb *testing.PB) {
	conn, err := net.Dial("tcp", addr.String())
	if err != nil {
		b.Error(err)
		return
	}
	defer conn.Close()
	request := []byte("POST /api/v3/topic/orders HTTP/1.1\r\nHost: " + addr.String() +
		"\r\nUser-Agent: bench\r\nContent-Type: application/json\r\nContent-Length: 1024\r\n\r\n" + strings.Repeat("x", 1024))
	answer := make([]byte, 4096)
	for pb.Next() {
		if _, err := conn.Write(request); err != nil {
			b.Error(err)
			return
		}
		n, err := conn.Read(answer)
		if err != nil || !bytes.HasPrefix(answer[:n], []byte("HTTP/1.1 201")) {
			b.Errorf("%s %v", answer[:n], err)
			return
		}
	}
}
