package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/compat/internal/redistest"
)

// message is a received message as the NDJSON form has it.
type message struct {
	ID      string            `json:"messageId"`
	Receipt string            `json:"receiptHandle"`
	Count   int               `json:"deliveryCount"`
	Type    string            `json:"contentType"`
	Headers map[string]string `json:"headers"`
	Body    []byte            `json:"body"`
}

const ndjson = "application/x-ndjson"

// send publishes and returns the message's ID.
func (a *api) send(topic, body string, headers ...string) string {
	a.t.Helper()
	r := a.call("POST", "/api/v3/topic/"+topic, body, headers...)
	if r.status != 201 {
		a.t.Fatalf("send: %d %s", r.status, r.body)
	}
	return r.head.Get("Vqs-Message-Id")
}

func parse(t *testing.T, r answer) []message {
	t.Helper()
	if r.status == 204 {
		return nil
	}
	if r.status != 200 {
		t.Fatalf("receive: %d %s", r.status, r.body)
	}
	var ms []message
	dec := json.NewDecoder(strings.NewReader(r.body))
	for dec.More() {
		var m message
		if err := dec.Decode(&m); err != nil {
			t.Fatal(err)
		}
		ms = append(ms, m)
	}
	return ms
}

func (a *api) receive(topic, group string, headers ...string) []message {
	a.t.Helper()
	return parse(a.t, a.call("POST", "/api/v3/topic/"+topic+"/consumer/"+group, "", append([]string{"Accept", ndjson}, headers...)...))
}

// one receives exactly one message with the body.
func (a *api) one(topic, group, body string, headers ...string) message {
	a.t.Helper()
	ms := a.receive(topic, group, headers...)
	if len(ms) != 1 || string(ms[0].Body) != body {
		a.t.Fatalf("received %+v, want one message %q", ms, body)
	}
	return ms[0]
}

func (a *api) none(topic, group string, headers ...string) {
	a.t.Helper()
	if ms := a.receive(topic, group, headers...); len(ms) != 0 {
		a.t.Fatalf("received %+v, want nothing", ms)
	}
}

func (a *api) status(want int, r answer) answer {
	a.t.Helper()
	if r.status != want {
		a.t.Fatalf("answered %d %s, want %d", r.status, r.body, want)
	}
	return r
}

func (a *api) ack(want int, topic, group, receipt string) {
	a.t.Helper()
	a.status(want, a.call("DELETE", "/api/v3/topic/"+topic+"/consumer/"+group+"/lease/"+receipt, ""))
}

func (a *api) extend(want int, topic, group, receipt string, seconds int) answer {
	a.t.Helper()
	return a.status(want, a.call("PATCH", "/api/v3/topic/"+topic+"/consumer/"+group+"/lease/"+receipt, fmt.Sprintf(`{"visibilityTimeoutSeconds":%d}`, seconds)))
}

func (a *api) byID(topic, group, id string, headers ...string) answer {
	a.t.Helper()
	return a.call("POST", "/api/v3/topic/"+topic+"/consumer/"+group+"/id/"+id, "", append([]string{"Accept", ndjson}, headers...)...)
}

// TestQueue goes through the protocol on one server.
func TestQueue(t *testing.T) {
	r := redistest.Start(t)
	a := open(t, Options{Target: Target{Addr: r.Addr()}})

	t.Run("send, receive, acknowledge", func(t *testing.T) {
		a := a.in(t)
		id := a.send("orders", "one", "Content-Type", "text/plain", "X-App", "7")
		a.send("orders", "two")
		m := a.one("orders", "g", "one")
		if m.ID != id || m.Count != 1 || m.Type != "text/plain" || m.Headers["x-app"] != "7" {
			t.Errorf("received %+v", m)
		}
		a.ack(204, "orders", "g", m.Receipt)
		a.ack(404, "orders", "g", m.Receipt)
		a.ack(404, "orders", "other", m.Receipt)
		if ms := a.receive("orders", "other", "Vqs-Max-Messages", "10"); len(ms) != 2 {
			t.Errorf("another group received %+v", ms)
		}
		a.ack(204, "orders", "g", a.one("orders", "g", "two").Receipt)
		a.none("orders", "g")
	})
	t.Run("a topic never written to", func(t *testing.T) { a.in(t).none("nothing", "g") })
	t.Run("new before retried, and leases that are released", func(t *testing.T) {
		a := a.in(t)
		a.send("retry", "poison")
		m := a.one("retry", "g", "poison")
		a.extend(200, "retry", "g", m.Receipt, 0)
		a.extend(409, "retry", "g", m.Receipt, 10)
		a.ack(409, "retry", "g", m.Receipt)
		a.send("retry", "fresh")
		a.one("retry", "g", "fresh", "Vqs-Max-Concurrency", "1")
		if got := a.status(429, a.call("POST", "/api/v3/topic/retry/consumer/g", "", "Accept", ndjson, "Vqs-Max-Concurrency", "1")); !strings.Contains(got.body, `"currentInflight":1`) {
			t.Errorf("answered %s", got.body)
		}
		again := a.one("retry", "g", "poison")
		if again.Count != 2 || again.Receipt == m.Receipt {
			t.Errorf("received %+v after %+v", again, m)
		}
		a.ack(409, "retry", "g", m.Receipt)
		a.ack(204, "retry", "g", again.Receipt)
	})
	t.Run("a lease that ran out", func(t *testing.T) {
		a := a.in(t)
		a.send("lease", "x")
		m := a.one("lease", "g", "x", "Vqs-Visibility-Timeout-Seconds", "1")
		a.none("lease", "g")
		again := a.one("lease", "g", "x", "Tercet-Wait-Seconds", "20")
		a.ack(409, "lease", "g", m.Receipt)
		a.extend(200, "lease", "g", again.Receipt, 60)
		a.ack(204, "lease", "g", again.Receipt)
	})
	t.Run("a lease does not outlive its message", func(t *testing.T) {
		a := a.in(t)
		a.send("short", "x", "Vqs-Retention-Seconds", "60")
		m := a.one("short", "g", "x", "Vqs-Visibility-Timeout-Seconds", "300")
		if got := a.extend(400, "short", "g", m.Receipt, 120); !strings.Contains(got.body, "messageExpiresAt") {
			t.Errorf("answered %s", got.body)
		}
	})
	t.Run("idempotency keys", func(t *testing.T) {
		a := a.in(t)
		first := a.send("keys", "x", "Vqs-Idempotency-Key", "k")
		second := a.send("keys", "y", "Vqs-Idempotency-Key", "k")
		third := a.send("keys", "z", "Vqs-Idempotency-Key", "k")
		other := a.send("keys", "other", "Vqs-Idempotency-Key", "k", "Vqs-Deployment-Id", "d")
		if first == second || second == third || first == other {
			t.Errorf("IDs %s %s %s %s", first, second, third, other)
		}
		for _, id := range []string{second, third} {
			if got := a.status(409, a.byID("keys", "g", id)); !strings.Contains(got.body, `"originalMessageId":"`+first+`"`) {
				t.Errorf("answered %s, want %s", got.body, first)
			}
		}
		if ms := a.receive("keys", "g", "Vqs-Max-Messages", "10"); len(ms) != 2 {
			t.Errorf("received %+v, want the original and the other deployment's", ms)
		}
	})
	t.Run("delay", func(t *testing.T) {
		a := a.in(t)
		id := a.send("delay", "late", "Vqs-Delay-Seconds", "1", "Vqs-Idempotency-Key", "k")
		dup := a.send("delay", "late", "Vqs-Idempotency-Key", "k")
		a.send("delay", "now")
		got := a.status(409, a.byID("delay", "g", id))
		if got.head.Get("Retry-After") == "" || strings.Contains(got.body, "originalMessageId") {
			t.Errorf("answered %s %v", got.body, got.head)
		}
		a.status(409, a.byID("delay", "g", dup))
		a.one("delay", "g", "now")
		a.none("delay", "g")
		m := a.one("delay", "g", "late", "Tercet-Wait-Seconds", "20")
		if m.ID != id {
			t.Errorf("received %s, sent %s", m.ID, id)
		}
		a.status(409, a.byID("delay", "g", id))
		a.ack(204, "delay", "g", m.Receipt)
		a.status(410, a.byID("delay", "g", id))
	})
	t.Run("by ID", func(t *testing.T) {
		a := a.in(t)
		first, second := a.send("ids", "1"), a.send("ids", "2")
		ms := parse(t, a.status(200, a.byID("ids", "g", second)))
		if len(ms) != 1 || string(ms[0].Body) != "2" {
			t.Fatalf("received %+v", ms)
		}
		if got := a.status(409, a.byID("ids", "g", second)); got.head.Get("Retry-After") == "" {
			t.Errorf("no Retry-After: %v", got.head)
		}
		a.ack(204, "ids", "g", ms[0].Receipt)
		a.status(410, a.byID("ids", "g", second))
		m := a.one("ids", "g", "1", "Vqs-Max-Messages", "10")
		if m.ID != first {
			t.Errorf("received %s", m.ID)
		}
		a.none("ids", "g")
		a.ack(204, "ids", "g", m.Receipt)
		a.status(410, a.byID("ids", "g", first))
		a.status(410, a.byID("ids", "g", second))
		a.status(404, a.byID("ids", "g", "abc"))
		a.status(404, a.byID("other", "g", first))
	})
	t.Run("peek", func(t *testing.T) {
		a := a.in(t)
		a.send("peek", "x")
		for range 2 {
			m := a.one("peek", "g", "x", "Vqs-Visibility-Timeout-Seconds", "0")
			a.ack(409, "peek", "g", m.Receipt)
		}
		if m := a.one("peek", "g", "x"); m.Count != 1 {
			t.Errorf("a peek was counted: %+v", m)
		}
	})
	t.Run("deployments", func(t *testing.T) {
		a := a.in(t)
		for i := range 6 {
			a.send("dep", strconv.Itoa(i), "Vqs-Deployment-Id", []string{"a", "b"}[i%2])
		}
		a.send("dep", "free")
		for _, want := range []string{"1", "3", "5"} {
			m := a.one("dep", "g", want, "Vqs-Deployment-Id", "b")
			a.status(404, a.call("DELETE", "/api/v3/topic/dep/consumer/g/lease/"+m.Receipt, "", "Vqs-Deployment-Id", "a"))
			a.ack(204, "dep", "g", m.Receipt)
		}
		a.none("dep", "g", "Vqs-Deployment-Id", "b")
		a.one("dep", "g", "0", "Vqs-Deployment-Id", "a")
		if ms := a.receive("dep", "g", "Vqs-Max-Messages", "10"); len(ms) != 3 {
			t.Errorf("without a deployment %+v were received, want 2, 4 and free", ms)
		}
	})
	t.Run("a group that starts at the end", func(t *testing.T) {
		a := a.in(t)
		a.send("latest", "before")
		a.none("latest", "g", "Vqs-Cursor-Fallback", "latest")
		a.send("latest", "after")
		a.one("latest", "g", "after", "Vqs-Cursor-Fallback", "earliest")
	})
	t.Run("a wait ends with the message", func(t *testing.T) {
		a := a.in(t)
		got := make(chan []message, 1)
		go func() { got <- a.receive("wait", "g", "Tercet-Wait-Seconds", "60") }()
		redistest.Until(t, 10*time.Second, "the receive to wait", func() error {
			if !strings.Contains(r.Do("CLIENT", "LIST"), "cmd=xread") {
				return fmt.Errorf("no blocked client")
			}
			return nil
		})
		r.Do("XADD", "wait", "*", "name", "Ada", "n", "1") // another program's entry
		ms := <-got
		if len(ms) != 1 || string(ms[0].Body) != `{"name":"Ada","n":"1"}` || ms[0].Type != "application/json" {
			t.Errorf("received %+v", ms)
		}
	})
	t.Run("entries that are no text", func(t *testing.T) {
		a := a.in(t)
		c := r.Client()
		if err := c.Do(t.Context(), c.B().Arbitrary("XADD").Keys("binary").Args("*", "a", "\xff", "a", "2").Build()).Error(); err != nil {
			t.Fatal(err)
		}
		a.one("binary", "g", `[["YQ==","/w=="],["YQ==","Mg=="]]`)
	})
	t.Run("native consumers keep what is theirs", func(t *testing.T) {
		a := a.in(t)
		id := a.send("native", "x")
		a.none("native", "g", "Vqs-Cursor-Fallback", "latest")
		r.Do("XGROUP", "SETID", "native", "g", "0")
		r.Do("XREADGROUP", "GROUP", "g", "someone", "STREAMS", "native", ">")
		a.none("native", "g")
		a.status(409, a.byID("native", "g", id))
		if got := r.Do("XPENDING", "native", "g"); !strings.Contains(got, "someone") {
			t.Errorf("pending: %s", got)
		}
	})
	t.Run("a key that is no stream", func(t *testing.T) {
		a := a.in(t)
		r.Do("SET", "text", "x")
		a.status(409, a.call("POST", "/api/v3/topic/text", "x"))
		a.status(409, a.call("POST", "/api/v3/topic/text", "x", "Vqs-Delay-Seconds", "1"))
		a.status(409, a.call("POST", "/api/v3/topic/text", "x", "Vqs-Delay-Seconds", "1", "Vqs-Idempotency-Key", "k"))
	})
	t.Run("expiry", func(t *testing.T) {
		a := a.in(t)
		id := a.send("gone", "x")
		a.send("gone", "y")
		// The entry is written anew with an expiry in the past: retentions are a minute at least.
		entry := strings.Fields(r.Do("XRANGE", "gone", "-", "+", "COUNT", "1"))[0]
		r.Do("DEL", "gone")
		r.Do("XADD", "gone", entry, "body", "x", "content-type", "text/plain", "tercet-expires", "1000")
		a.send("gone", "y")
		a.one("gone", "g", "y")
		if got := strings.Fields(r.Do("XPENDING", "gone", "g")); got[0] != "1" {
			t.Errorf("%s entries are pending, want the living one alone", got[0])
		}
		a.status(404, a.byID("gone", "g", id))
		if err := a.g.sweepTopic(t.Context(), "gone"); err != nil {
			t.Fatal(err)
		}
		if n := r.Do("XLEN", "gone"); n != "1" {
			t.Errorf("%s entries are left, want 1", n)
		}
	})
}

// in is the same API for a subtest.
func (a *api) in(t *testing.T) *api {
	b := *a
	b.t = t
	return &b
}

// TestMaxDeliveries parks a message that fails too often.
func TestMaxDeliveries(t *testing.T) {
	r := redistest.Start(t)
	a := open(t, Options{Target: Target{Addr: r.Addr()}, MaxDeliveries: 2, Park: true})
	a.send("t", "bad")
	for range 2 {
		a.extend(200, "t", "g", a.one("t", "g", "bad").Receipt, 0)
	}
	a.none("t", "g")
	if got := r.Do("ZCARD", "{t}:tercet:group:g:parked"); got != "1" {
		t.Errorf("%s messages are parked", got)
	}
}

// TestParked lists dead letters, drops one, and makes the others deliverable again: their deliveries are counted on, and the
// limit counts anew.
func TestParked(t *testing.T) {
	r := redistest.Start(t)
	a := open(t, Options{Target: Target{Addr: r.Addr()}, MaxDeliveries: 2, Park: true})
	park := func(bodies ...string) {
		t.Helper()
		for range 2 {
			for _, body := range bodies {
				a.extend(200, "t", "g", a.one("t", "g", body).Receipt, 0)
			}
		}
		a.none("t", "g", "Vqs-Max-Messages", "10")
	}
	var ids []string
	for _, body := range []string{"a", "b", "c"} {
		ids = append(ids, a.send("t", body))
	}
	park("a", "b", "c")
	type listed struct {
		Messages []struct {
			MessageID, LastError string
			Deliveries           int
			Body                 []byte
		}
		Next uint64
	}
	list := func(query string) (l listed) {
		t.Helper()
		got := a.status(200, a.call("GET", "/v1/topics/t/groups/g/parked"+query, ""))
		if err := json.Unmarshal([]byte(got.body), &l); err != nil {
			t.Fatal(err)
		}
		return l
	}
	change := func(what, body string, want int) {
		t.Helper()
		got := a.status(200, a.call("POST", "/v1/topics/t/groups/g/parked/"+what, body, "Content-Type", "application/json"))
		var done struct{ Count int }
		if err := json.Unmarshal([]byte(got.body), &done); err != nil || done.Count != want {
			t.Errorf("%s %s: %s, want %d", what, body, got.body, want)
		}
	}
	all := list("")
	if len(all.Messages) != 3 || all.Next != 0 || all.Messages[1].MessageID != ids[1] || all.Messages[1].Deliveries != 2 ||
		string(all.Messages[1].Body) != "b" || all.Messages[1].LastError != "max_deliveries" {
		t.Errorf("listed %+v", all)
	}
	first := list("?limit=2")
	if len(first.Messages) != 2 || first.Next == 0 {
		t.Fatalf("a page of two: %+v", first)
	}
	if rest := list(fmt.Sprintf("?limit=2&from=%d", first.Next)); len(rest.Messages) != 1 || rest.Messages[0].MessageID != ids[2] || rest.Next != 0 {
		t.Errorf("the page after it: %+v", rest)
	}
	if l := list("?error=nothing"); len(l.Messages) != 0 {
		t.Errorf("by reason: %+v", l)
	}
	change("drop", `{"all": true, "dryRun": true}`, 3)
	change("drop", `{"messageIds": ["`+ids[1]+`"]}`, 1)
	change("redrive", `{"error": "max", "max": 1}`, 1)
	if got := a.one("t", "g", "a"); got.Count != 3 {
		t.Errorf("delivery %d of what came back, want 3", got.Count)
	} else {
		a.extend(200, "t", "g", got.Receipt, 0)
	}
	change("redrive", `{"all": true}`, 1)
	seen := map[string]int{}
	for _, m := range a.receive("t", "g", "Vqs-Max-Messages", "10") {
		seen[string(m.Body)] = m.Count
		a.extend(200, "t", "g", m.Receipt, 0)
	}
	if fmt.Sprint(seen) != "map[a:4 c:3]" {
		t.Errorf("received %v, want a for the fourth time and c for the third", seen)
	}
	if m := a.one("t", "g", "c", "Vqs-Max-Messages", "10"); m.Count != 4 {
		t.Errorf("received %+v; a is a dead letter again, and c has one delivery left", m)
	}
	if l := list(""); len(l.Messages) != 1 || l.Messages[0].MessageID != ids[0] {
		t.Errorf("dead letters in the end: %+v", l)
	}
	if got := r.Do("XPENDING", "t", "g"); !strings.HasPrefix(got, "2") {
		t.Errorf("pending: %s, want a and c", got)
	}
}

// TestTooLargeMessage sends more than a gateway takes.
func TestTooLargeMessage(t *testing.T) {
	a := open(t, Options{Target: Target{Addr: redistest.Start(t).Addr()}})
	got := a.status(413, a.call("POST", "/api/v3/topic/t", strings.Repeat("x", 1<<20+1)))
	if !strings.Contains(got.body, "message_too_large") || !strings.Contains(got.body, "1048576") {
		t.Errorf("answered %s", got.body)
	}
	a.send("t", strings.Repeat("x", 1<<20))
}

// TestTwoGateways lets consumers of two gateways work on one group with leases that run out, and checks that no two
// leases on one message overlap and nothing is lost.
func TestTwoGateways(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("TERCET_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("seed: TERCET_SEED=%d", seed)
	r := redistest.Start(t)
	gates := []*api{open(t, Options{Target: Target{Addr: r.Addr()}}), open(t, Options{Target: Target{Addr: r.Addr()}})}
	const messages, consumers = 300, 8
	type lease struct{ from, until time.Time }
	var mu sync.Mutex
	leases := make(map[string][]lease)
	acked := make(map[string]int)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	for i := range consumers {
		a := gates[i%2]
		rnd := rand.New(rand.NewPCG(seed, uint64(i)))
		wg.Go(func() {
			for ctx.Err() == nil {
				mu.Lock()
				done := len(acked) == messages
				mu.Unlock()
				if done {
					return
				}
				got, err := a.try(ctx, "POST", "/api/v3/topic/t/consumer/g", "", "Accept", ndjson, "Vqs-Max-Messages", "3",
					"Vqs-Visibility-Timeout-Seconds", "1", "Tercet-Wait-Seconds", "1")
				if err != nil || got.status != 200 {
					continue
				}
				granted := time.Now() // the lease began before
				for _, m := range parse(t, got) {
					abandon := rnd.IntN(4) == 0
					end := granted
					status := 0
					if !abandon {
						sent := time.Now()
						res, err := a.try(ctx, "DELETE", "/api/v3/topic/t/consumer/g/lease/"+m.Receipt, "")
						if err == nil {
							status = res.status
						}
						if status == 204 {
							end = sent // it was valid when the acknowledgement arrived
						}
					}
					mu.Lock()
					leases[m.ID] = append(leases[m.ID], lease{granted, end})
					if status == 204 {
						acked[m.ID]++
					}
					mu.Unlock()
				}
			}
		})
	}
	for i := range messages {
		gates[i%2].send("t", strconv.Itoa(i))
	}
	wg.Wait()
	if len(acked) != messages {
		t.Errorf("%d of %d messages were acknowledged", len(acked), messages)
	}
	redelivered := 0
	for id, n := range acked {
		if n != 1 {
			t.Errorf("message %s was acknowledged %d times", id, n)
		}
		ls := leases[id]
		redelivered += len(ls) - 1
		for i := range ls {
			for j := range ls {
				if i != j && ls[i].from.Before(ls[j].until) && ls[j].from.Before(ls[i].from) {
					t.Errorf("message %s: leases overlap: %v %v", id, ls[i], ls[j])
				}
			}
		}
	}
	if redelivered == 0 {
		t.Error("no lease ran out: the test shows nothing")
	}
	t.Logf("%d messages, %d redeliveries", messages, redelivered)
}
