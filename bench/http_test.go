package bench

import (
	"bytes"
	"context"
	"errors"
	"io"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/wire"
)

// queueServer is as much of the queue protocol as the drivers use, with a log of one topic and no leases.
type queueServer struct {
	t  *testing.T
	mu sync.Mutex
	// heads are those of publishes.
	heads    []http.Header
	messages [][]byte
	given    int
	acked    map[string]bool
	refuse   bool
}

func (q *queueServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q.mu.Lock()
	defer q.mu.Unlock()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		q.t.Error(err)
	}
	w.Header().Set(wire.HeaderZones, "3")
	switch path := strings.TrimPrefix(r.URL.Path, "/api/v3/topic/t"); {
	case q.refuse:
		w.WriteHeader(http.StatusTooManyRequests)
		_, _ = io.WriteString(w, `{"error":"no","code":"overloaded","outcome":"none"}`)
	case r.Method == "POST" && path == "":
		q.heads = append(q.heads, r.Header)
		q.messages = append(q.messages, body)
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, `{"messageId":"1"}`)
	case r.Method == "POST" && path == "/batch":
		q.heads = append(q.heads, r.Header)
		q.messages = append(q.messages, q.parts(r.Header.Get("Content-Type"), body)...)
		_, _ = io.WriteString(w, `{}`)
	case r.Method == "POST" && path == "/consumer/g":
		if q.given == len(q.messages) {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		last := min(q.given+10, len(q.messages))
		var out []byte
		for ; q.given < last; q.given++ {
			out = wire.AppendFrame(out, []byte("Content-Type: x/y\n"+wire.HeaderReceipt+": r"+string(rune('a'+q.given))+"\n"), q.messages[q.given])
			_, _ = w.Write(out) // more than once: chunked
			out = out[:0]
			_ = http.NewResponseController(w).Flush()
		}
	case r.Method == "DELETE" && strings.HasPrefix(path, "/consumer/g/lease/"):
		q.acked[strings.TrimPrefix(path, "/consumer/g/lease/")] = true
		w.WriteHeader(http.StatusNoContent)
	default:
		q.t.Errorf("%s %s", r.Method, r.URL)
		w.WriteHeader(http.StatusNotFound)
	}
}

func (q *queueServer) parts(contentType string, body []byte) (parts [][]byte) {
	if contentType == wire.MediaBatch {
		for len(body) > 0 {
			_, part, rest, err := wire.NextFrame(body)
			if err != nil {
				q.t.Error(err)
				return parts
			}
			parts, body = append(parts, part), rest
		}
		return parts
	}
	_, params, err := mime.ParseMediaType(contentType)
	if err != nil {
		q.t.Error(err)
		return nil
	}
	for r := multipart.NewReader(bytes.NewReader(body), params["boundary"]); ; {
		p, err := r.NextPart()
		if errors.Is(err, io.EOF) {
			return parts
		}
		if err != nil {
			q.t.Error(err)
			return parts
		}
		part, err := io.ReadAll(p)
		if err != nil {
			q.t.Error(err)
		}
		parts = append(parts, part)
	}
}

func serveQueue(t *testing.T) (*queueServer, string) {
	t.Helper()
	q := &queueServer{t: t, acked: map[string]bool{}}
	s := httptest.NewServer(q)
	t.Cleanup(s.Close)
	return q, s.Listener.Addr().String()
}

func httpWorkload() Workload {
	return Workload{
		Topic: "t", Publishers: 2, Size: 64, Batch: 1, Duration: time.Second, Retention: 90 * time.Second,
		Consumers: 1, Group: "g", ReceiveMax: 10,
	}
}

func TestHTTPPublish(t *testing.T) {
	for _, c := range []struct {
		name      string
		batch     int
		multipart bool
	}{{"single", 1, false}, {"compact", 7, false}, {"multipart", 7, true}} {
		t.Run(c.name, func(t *testing.T) {
			q, addr := serveQueue(t)
			w := httpWorkload()
			w.Batch, w.AllZones = c.batch, true
			d := &HTTPDriver{Addrs: []string{addr}, Workload: w, Multipart: c.multipart, Token: "secret"}
			if err := d.Prepare(); err != nil {
				t.Fatal(err)
			}
			p, err := d.Publisher(0)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			for range 3 {
				ack, err := p.Publish(t.Context(), time.Now())
				if err != nil || ack.Messages != c.batch || ack.Zones != 3 {
					t.Fatalf("%+v, %v", ack, err)
				}
			}
			if len(q.messages) != 3*c.batch {
				t.Fatalf("%d messages arrived", len(q.messages))
			}
			seen := map[string]bool{}
			for _, m := range q.messages {
				if seen[string(m)] || len(m) != 64 {
					t.Errorf("%d bytes, seen before: %t", len(m), seen[string(m)])
				}
				seen[string(m)] = true
			}
			for _, h := range q.heads {
				if h.Get(wire.HeaderRetention) != "90" || h.Get(wire.HeaderDurability) != "all" || h.Get("Authorization") != "Bearer secret" {
					t.Errorf("headers %v", h)
				}
			}
			q.mu.Lock()
			q.refuse = true
			q.mu.Unlock()
			if _, err := p.Publish(t.Context(), time.Now()); !errors.Is(err, errs.Of(errs.Overloaded)) {
				t.Errorf("a refusal: %v", err)
			}
		})
	}
}

func TestHTTPStampedRoundTrip(t *testing.T) {
	q, addr := serveQueue(t)
	w := httpWorkload()
	w.Stamped = true
	ledger := NewLedger()
	d := &HTTPDriver{Addrs: []string{addr}, Workload: w}
	found := func(body []byte) {
		s, err := parseStamp(body)
		if err != nil {
			t.Error(err)
		}
		ledger.Found(s)
	}
	if err := d.Prepare(); err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		p, err := d.Publisher(i)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		for range 8 {
			ack, err := p.Publish(t.Context(), time.Now())
			if err != nil {
				t.Fatal(err)
			}
			ledger.Acknowledged(ack.Stamp)
		}
	}
	c, err := d.Consumer(0, found)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, want := range []int{10, 6, 0} {
		n, err := c.Receive(t.Context())
		if err != nil || n != want {
			t.Fatalf("received %d, want %d (%v)", n, want, err)
		}
		if n, err := c.Settle(t.Context()); err != nil || n != want {
			t.Fatalf("settled %d, want %d (%v)", n, want, err)
		}
	}
	if got, want := ledger.Balance(), (Balance{Acknowledged: 16}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if len(q.acked) != 16 {
		t.Errorf("acknowledged %v", q.acked)
	}
}

func TestRunOverHTTP(t *testing.T) {
	q, addr := serveQueue(t)
	w := httpWorkload()
	w.Consumers, w.Duration, w.Messages = 0, 0, 500
	d := &HTTPDriver{Addrs: []string{addr}, Workload: w}
	if err := d.Prepare(); err != nil {
		t.Fatal(err)
	}
	r, err := Run(t.Context(), w, d, Hooks{})
	if err != nil {
		t.Fatal(err)
	}
	q.mu.Lock() // a request that the run's end interrupted may still be served
	defer q.mu.Unlock()
	if r.Messages < 500 || r.Messages > int64(len(q.messages)) || len(r.Failed) > 0 || r.Publish.Count() != r.Requests {
		t.Errorf("%+v, %d arrived", r, len(q.messages))
	}
}

// BenchmarkClient shows what a request costs by the client of this package and by that of net/http. The other end does
// as little as possible.
func BenchmarkClient(b *testing.B) {
	body := newBodies(1).next(1024)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 4096)
				for got := 0; ; {
					n, err := c.Read(buf[got:])
					if err != nil {
						return
					}
					got += n
					if end := bytes.Index(buf[:got], []byte("\r\n\r\n")); end >= 0 && got >= end+4+len(body) {
						got = 0
						_, _ = io.WriteString(c, "HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nTercet-Zones: 3\r\nContent-Length: 17\r\n\r\n{\"messageId\":\"1\"}")
					}
				}
			}()
		}
	}()
	b.Run("own", func(b *testing.B) {
		d := &HTTPDriver{Addrs: []string{l.Addr().String()}, Workload: httpWorkload()}
		d.Workload.Size = len(body)
		if err := d.Prepare(); err != nil {
			b.Fatal(err)
		}
		p, err := d.Publisher(0)
		if err != nil {
			b.Fatal(err)
		}
		defer p.Close()
		ctx, cancel := context.WithCancel(b.Context())
		defer cancel()
		b.ReportAllocs()
		for b.Loop() {
			if _, err := p.Publish(ctx, time.Now()); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("net-http", func(b *testing.B) {
		client := &http.Client{Transport: &http.Transport{}}
		defer client.CloseIdleConnections()
		b.ReportAllocs()
		for b.Loop() {
			req, err := http.NewRequestWithContext(b.Context(), http.MethodPost, "http://"+l.Addr().String()+"/api/v3/topic/t", bytes.NewReader(body))
			if err != nil {
				b.Fatal(err)
			}
			req.Header.Set("Content-Type", wire.MediaOctets)
			req.Header.Set(wire.HeaderRetention, "90")
			resp, err := client.Do(req)
			if err != nil {
				b.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				b.Fatal(err)
			}
			resp.Body.Close()
		}
	})
}
