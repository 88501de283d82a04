package bench

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"tercet.dev/tercet/server/wire"
)

// TestPush subscribes, is pushed a message, and acknowledges it before it answers.
func TestPush(t *testing.T) {
	var mu sync.Mutex
	var sub wire.Subscription
	var calls []string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		calls = append(calls, r.Method+" "+r.URL.Path)
		if r.Method == http.MethodPost {
			if err := json.NewDecoder(r.Body).Decode(&sub); err != nil {
				t.Error(err)
			}
			sub.ID = "sub_1"
			w.WriteHeader(http.StatusCreated)
			_ = json.NewEncoder(w).Encode(sub)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	}))
	defer s.Close()
	w := httpWorkload()
	w.Publishers = 0
	d := &PushDriver{HTTPDriver: HTTPDriver{Addrs: []string{s.Listener.Addr().String()}, Workload: w}}
	if err := d.Prepare(); err != nil {
		t.Fatal(err)
	}
	var got string
	c, err := d.Consumer(0, func(body []byte) { got = string(body) })
	if err != nil {
		t.Fatal(err)
	}
	if sub.Topic != "t" || sub.ConsumerGroup != "g" {
		t.Errorf("subscribed to %+v", sub)
	}
	answered := make(chan int, 1)
	go func() {
		req, _ := http.NewRequest(http.MethodPost, sub.URL, strings.NewReader("hello"))
		req.Header.Set(headerPushReceipt, "r1")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			answered <- 0
			return
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		answered <- resp.StatusCode
	}()
	if n, err := c.Receive(t.Context()); n != 1 || err != nil || got != "hello" {
		t.Fatalf("%d, %v, %q", n, err, got)
	}
	select {
	case code := <-answered:
		t.Errorf("answered %d before the message was settled", code)
	default:
	}
	if n, err := c.Settle(t.Context()); n != 1 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	if code := <-answered; code != http.StatusOK {
		t.Errorf("answered %d", code)
	}
	if resp, err := http.Post(sub.URL, "", nil); err != nil || resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a push without a receipt: %v, %v", resp, err)
	} else {
		resp.Body.Close()
	}
	c.Close()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	http.DefaultClient.CloseIdleConnections()
	if last := strings.Join(calls, ", "); last != "POST /v1/subscriptions, DELETE /api/v3/topic/t/consumer/g/lease/r1, DELETE /v1/subscriptions/sub_1" {
		t.Errorf("calls: %s", last)
	}
}
