package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"os"
	"runtime"
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

// pattern is a body of any size that takes no memory: reproducible bytes that do not repeat in parts.
type pattern struct {
	rnd  *rand.ChaCha8
	left int64
}

func newPattern(seed byte, n int64) *pattern {
	var key [32]byte
	key[0] = seed
	return &pattern{rand.NewChaCha8(key), n}
}

// Read implements io.Reader.
func (p *pattern) Read(b []byte) (int, error) {
	if p.left == 0 {
		return 0, io.EOF
	}
	n := int(min(int64(len(b)), p.left))
	// ChaCha8's stream depends on how it is cut, so it is always cut alike.
	if n > 8 {
		n &^= 7
	}
	p.rnd.Read(b[:n])
	p.left -= int64(n)
	return n, nil
}

func patternBytes(seed byte, n int64) []byte {
	b, _ := io.ReadAll(newPattern(seed, n))
	return b
}

func TestLargeMessages(t *testing.T) {
	nodes := servertest.Nodes(t, 3)
	_, base := start(t, Options{Backend: nodes[0], VirtualClock: true})
	_, other := start(t, Options{Backend: nodes[1]})
	m := manager{t, base}
	sizes := []int64{limits.MessageBytesMax, limits.MessageBytesMax + 1, 2*limits.PartBytes*3 - 1, 8 * limits.PartBytes, 5<<20 + 7}
	for i, n := range sizes {
		body := patternBytes(byte(i), n)
		for _, chunked := range []bool{false, true} {
			var reader io.Reader = bytes.NewReader(body)
			if chunked {
				reader = io.MultiReader(reader) // hides the length
			}
			topic := fmt.Sprintf("large-%d-%v", i, chunked)
			req, err := http.NewRequest("POST", base+"/api/v3/topic/"+topic, reader)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "video/mp4")
			req.Header.Set("X-Name", "film")
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			var sent wire.Sent
			err = json.NewDecoder(res.Body).Decode(&sent)
			res.Body.Close()
			if res.StatusCode != 201 || err != nil || res.Header.Get(wire.HeaderZones) != "3" || sent.MessageID != res.Header.Get(wire.HeaderMessageID) {
				t.Fatalf("%d bytes: %s, %v, %v", n, res.Status, err, res.Header)
			}
			for _, form := range []string{wire.MediaMultipart, wire.MediaNDJSON, wire.MediaBatch} {
				got := receiveMessages(t, other, topic, "g-"+form[len(form)-5:], form)
				if len(got) != 1 || !bytes.Equal(got[0].body, body) || got[0].head["content-type"] != "video/mp4" || got[0].head["x-name"] != "film" || got[0].head["vqs-message-id"] != sent.MessageID {
					t.Fatalf("%d bytes as %s: %d messages", n, form, len(got))
				}
			}
			var s wire.Story
			m.do(200, "GET", "/v1/topics/"+topic+"/messages/"+sent.MessageID+"?verify=true", "", &s)
			if s.Bytes != n || s.Verified == nil || !*s.Verified {
				t.Errorf("%d bytes: story %+v", n, s)
			}
			var page wire.Messages
			m.do(200, "GET", "/v1/topics/"+topic+"/messages", "", &page)
			if len(page.Messages) != 1 || page.Messages[0].Bytes != n {
				t.Errorf("%d bytes: browsed %d messages", n, len(page.Messages))
			}
		}
	}
}

// TestLargeBesideSmall: large and small messages in one answer, by multipart and by id, with keys and delays.
func TestLargeBesideSmall(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t), VirtualClock: true})
	m := manager{t, base}
	large := patternBytes(1, 3<<20)
	sendMessage(t, base, "t", []byte("before"))
	id := sendMessage(t, base, "t", large, wire.HeaderIdempotencyKey, "k")
	sendMessage(t, base, "t", []byte("after"))
	twice := sendMessage(t, base, "t", large, wire.HeaderIdempotencyKey, "k")
	if twice == id {
		t.Error("a duplicate has its original's id")
	}
	got := receiveMessages(t, base, "t", "g", wire.MediaMultipart, wire.HeaderMaxMessages, "10")
	if len(got) != 3 || string(got[0].body) != "before" || !bytes.Equal(got[1].body, large) || string(got[2].body) != "after" {
		t.Fatalf("%d messages", len(got))
	}
	r := call(t, "POST", base+"/api/v3/topic/t/consumer/h/id/"+twice, nil, "Accept", wire.MediaMultipart)
	expect(t, r, 409, "duplicate")
	if !strings.Contains(string(r.body), `"originalMessageId":"`+id+`"`) {
		t.Errorf("the duplicate leads to %s", r.body)
	}
	r = call(t, "POST", base+"/api/v3/topic/t/consumer/h/id/"+id, nil, "Accept", wire.MediaMultipart)
	expect(t, r, 200, "")
	if parts := strictParts(t, r.header.Get("Content-Type"), r.body); len(parts) != 1 || !bytes.Equal(parts[0].body, large) {
		t.Error("by id it is another message")
	}
	delayed := sendMessage(t, base, "d", large, wire.HeaderDelay, "60")
	if got := receiveMessages(t, base, "d", "g", wire.MediaMultipart); len(got) != 0 {
		t.Error("a delayed message is there at once")
	}
	m.advance(time.Minute)
	waitFor(t, func() bool {
		got := receiveMessages(t, base, "d", "g", wire.MediaMultipart)
		return len(got) == 1 && bytes.Equal(got[0].body, large) && got[0].head["vqs-message-id"] == delayed
	})
}

// TestLargeRefused: what is not sent whole, or too large, leaves nothing behind.
func TestLargeRefused(t *testing.T) {
	node := newNode(t)
	s, base := start(t, Options{Backend: node, VirtualClock: true, Limits: Limits{TransferGrace: 300 * time.Millisecond, BodyTimeout: 300 * time.Millisecond}})
	s.largeMax = 3 << 20
	uploads := func() int { return node.Totals().Uploads }
	send := func(body io.Reader, length int64) (int, string) {
		req, err := http.NewRequest("POST", base+"/api/v3/topic/t", body)
		if err != nil {
			t.Fatal(err)
		}
		req.ContentLength = length
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer res.Body.Close()
		var e wire.Error
		json.NewDecoder(res.Body).Decode(&e)
		return res.StatusCode, e.Code
	}
	if status, code := send(newPattern(1, 3<<20), -1); status != 201 {
		t.Fatalf("a chunked body of the limit: %d %s", status, code)
	}
	// The client may see the connection end before it has sent everything.
	if status, code := send(newPattern(1, 3<<20+1), -1); status != 413 && status != 0 || status == 413 && code != "message_too_large" {
		t.Errorf("a chunked body above the limit: %d %s", status, code)
	}
	if status, code := send(newPattern(1, 3<<20+1), 3<<20+1); status != 413 && status != 0 {
		t.Errorf("a body above the limit: %d %s", status, code)
	}
	// A client that hangs up in the middle, and one that stops sending.
	for _, stop := range []bool{false, true} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST /api/v3/topic/t HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n", 2<<20)
		conn.Write(patternBytes(2, 1<<20))
		waitFor(t, func() bool { return uploads() == 1 })
		if stop {
			conn.SetReadDeadline(time.Now().Add(time.Minute))
			answer, err := io.ReadAll(conn)
			if err != nil || !bytes.HasPrefix(answer, []byte("HTTP/1.1 408 ")) {
				t.Errorf("a client that stops is told %.80q, %v", answer, err)
			}
		}
		conn.Close()
		waitFor(t, func() bool { return uploads() == 0 })
	}
	if got := receiveMessages(t, base, "t", "g", wire.MediaNDJSON, wire.HeaderMaxMessages, "10"); len(got) != 1 {
		t.Errorf("%d messages are there, want the one that was sent whole", len(got))
	}
	waitFor(t, func() bool { return s.load.bytes.Load() == 0 && s.load.requests.Load() == 0 })
}

// partsBackend answers receives with one large message whose last part is not there.
type partsBackend struct {
	*fakeBackend
	fail error
}

func (b *partsBackend) LoadPart(_ context.Context, d *engine.Delivery, number uint32) ([]byte, error) {
	if number == d.Large.Parts-1 && b.fail != nil {
		return nil, b.fail
	}
	return make([]byte, limits.PartBytes), nil
}

// TestLargeBreaksOff: an answer that cannot be completed must not look complete, in any form.
func TestLargeBreaksOff(t *testing.T) {
	for name, fail := range map[string]error{"part missing": errs.Of(errs.MessageNotFound), "wrong checksum": nil} {
		backend := &partsBackend{&fakeBackend{}, fail}
		backend.propose = func(context.Context, raft.Proposal) (raft.Reply, error) {
			d := engine.Delivery{ID: engine.MessageID{Index: 1, Kind: engine.KindPlain}, Receipt: engine.Receipt{Topic: 1, Group: 1, Epoch: 1}, Count: 1, PublishedAt: 1,
				Large: &engine.Large{Upload: 1, Parts: 3, Bytes: 3 * limits.PartBytes, CRC: 1}}
			return raft.Reply{Result: engine.Result{Deliveries: []engine.Delivery{d}}}, nil
		}
		_, base := start(t, Options{Backend: backend})
		for _, form := range []string{wire.MediaMultipart, wire.MediaNDJSON, wire.MediaBatch} {
			req, err := http.NewRequest("POST", base+"/api/v3/topic/t/consumer/g", nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Accept", form)
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, res.Body); !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s as %s: the answer ends with %v", name, form, err)
			}
			res.Body.Close()
		}
	}
}

// TestLargeMemory sends and receives large messages at once and looks at the memory of the process, which runs all three
// nodes. With TERCET_CAMPAIGN=1 they are ten of 100 MiB.
func TestLargeMemory(t *testing.T) {
	count, n := 3, int64(8<<20)
	if os.Getenv("TERCET_CAMPAIGN") != "" || os.Getenv("TERCET_TEST_ALL") == "1" {
		count, n = 10, limits.LargeMessageBytesMax
	}
	nodes := servertest.Nodes(t, 3)
	var bases [3]string
	for i, n := range nodes {
		_, bases[i] = start(t, Options{Backend: n})
	}
	sendMessage(t, bases[0], "warm", patternBytes(0, 2<<20))
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	idle, peak := heap(), uint64(0)
	stop := make(chan struct{})
	var watch, work sync.WaitGroup
	watch.Go(func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				peak = max(peak, m.HeapInuse+m.StackInuse)
			case <-stop:
				return
			}
		}
	})
	begun := time.Now()
	for i := range count {
		work.Go(func() {
			topic := fmt.Sprintf("large-%d", i)
			want := sha256.New()
			req, err := http.NewRequest("POST", bases[i%3]+"/api/v3/topic/"+topic, io.TeeReader(newPattern(byte(i), n), want))
			if err != nil {
				t.Error(err)
				return
			}
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			res.Body.Close()
			if res.StatusCode != 201 {
				t.Errorf("send: %s", res.Status)
				return
			}
			req, err = http.NewRequest("POST", bases[(i+1)%3]+"/api/v3/topic/"+topic+"/consumer/g", nil)
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Accept", wire.MediaMultipart)
			if res, err = http.DefaultClient.Do(req); err != nil {
				t.Error(err)
				return
			}
			defer res.Body.Close()
			_, params, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
			part, err := multipart.NewReader(res.Body, params["boundary"]).NextPart()
			if err != nil {
				t.Errorf("receive: %s, %v", res.Status, err)
				return
			}
			got := sha256.New()
			if size, err := io.Copy(got, part); err != nil || size != n || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
				t.Errorf("received %d bytes, %v", size, err)
			}
		})
	}
	work.Wait()
	close(stop)
	watch.Wait()
	t.Logf("%d messages of %d MiB through three nodes in one process in %s: heap %d MiB idle, %d MiB at most", count, n>>20, time.Since(begun).Round(time.Millisecond), idle>>20, peak>>20)
	if over := (peak - idle) / 3; over > 128<<20 {
		t.Errorf("%d MiB above idle for each node", over>>20)
	}
}
