package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/server/wire"
	"tercet.dev/tercet/test/harness"
	"tercet.dev/tercet/test/workload"
)

// call is a request of any kind, as TestStatuses makes it.
type call struct {
	method, path string
	header       map[string]string
	body         []byte
	// kind is what the answer may be when it is not the usual one.
	kind callKind
	// usual are the statuses with a leader.
	usual []int
}

type callKind int

const (
	publishes callKind = iota // 429 when nothing was proposed, 500 or 504 when that is not known, never 502 or 503
	changes                   // 429 or 503; 500 or 504 when the outcome is not known
	reads                     // 429 or 503: there is no outcome to be unknown
	local                     // answered by the node itself, whatever the others do
)

// calls lists every call of the surface, with a message and its receipt to name.
func calls(id, receipt string, n int) []call {
	json := map[string]string{"Content-Type": "application/json"}
	ndjson := func(more ...string) map[string]string {
		h := map[string]string{"Accept": "application/x-ndjson"}
		for i := 0; i < len(more); i += 2 {
			h[more[i]] = more[i+1]
		}
		return h
	}
	const (
		topic = "/api/v3/topic/statuses"
		admin = "/v1/topics/statuses"
	)
	multipart := "--b\r\nContent-Type: text/plain\r\n\r\none\r\n--b\r\nContent-Type: text/plain\r\n\r\ntwo\r\n--b--\r\n"
	compact := wire.AppendFrame(wire.AppendFrame(nil, nil, []byte("one")), nil, []byte("two"))
	lease := topic + "/consumer/kept/lease/" + receipt
	fresh := fmt.Sprintf("fresh-%d", n)
	return []call{
		{"POST", topic, nil, []byte("small"), publishes, []int{201}},
		{"POST", "/api/v3/topic/" + fresh, nil, []byte("a new topic"), publishes, []int{201}},
		{"POST", topic, map[string]string{"Tercet-Durability": "all"}, []byte("everywhere"), publishes, []int{201, 429}},
		{"POST", topic, map[string]string{"Vqs-Idempotency-Key": fresh}, []byte("keyed"), publishes, []int{201}},
		{"POST", topic, map[string]string{"Vqs-Delay-Seconds": "60"}, []byte("delayed"), publishes, []int{201}},
		{"POST", topic, nil, workload.Body("large", 2<<20), publishes, []int{201}},
		{"POST", topic + "/batch", map[string]string{"Content-Type": "multipart/mixed; boundary=b"}, []byte(multipart), publishes, []int{200}},
		{"POST", topic + "/batch", map[string]string{"Content-Type": wire.MediaBatch}, compact, publishes, []int{200}},

		{"POST", topic + "/consumer/g", ndjson("Vqs-Max-Messages", "2"), nil, changes, []int{200, 204}},
		{"POST", topic + "/consumer/g", map[string]string{"Accept": "multipart/mixed"}, nil, changes, []int{200, 204}},
		{"POST", topic + "/consumer/g", ndjson("Vqs-Visibility-Timeout-Seconds", "0"), nil, changes, []int{200, 204}},
		{"POST", "/api/v3/topic/nothing-here/consumer/g", ndjson("Tercet-Wait-Seconds", "1"), nil, changes, []int{204}},
		{"POST", topic + "/consumer/by-id/id/" + id, ndjson("Vqs-Visibility-Timeout-Seconds", "1"), nil, changes, []int{200, 409}},
		{"PATCH", lease, json, []byte(`{"visibilityTimeoutSeconds": 3000}`), changes, []int{200}},
		{"DELETE", lease[:len(lease)-1] + "!", nil, nil, changes, []int{400}},
		{"DELETE", topic + "/consumer/none/lease/" + receipt, nil, nil, changes, []int{400, 404, 409}},

		{"PUT", "/v1/topics/" + fresh + "-made", json, []byte(`{}`), changes, []int{200, 201}},
		{"PATCH", admin, json, []byte(`{}`), changes, []int{200}},
		{"POST", "/v1/topics/" + fresh + "-made/pause", nil, nil, changes, []int{200, 404}},
		{"POST", "/v1/topics/" + fresh + "-made/resume", nil, nil, changes, []int{200, 404}},
		{"POST", "/v1/topics/" + fresh + "-made/purge", nil, nil, changes, []int{200, 404}},
		{"DELETE", "/v1/topics/" + fresh + "-gone", nil, nil, changes, []int{404}},
		{"PUT", admin + "/groups/" + fresh, json, []byte(`{}`), changes, []int{200, 201}},
		{"PATCH", admin + "/groups/kept", json, []byte(`{}`), changes, []int{200}},
		{"POST", admin + "/groups/" + fresh + "/seek", json, []byte(`{"at":"end"}`), changes, []int{200, 404}},
		{"POST", admin + "/groups/" + fresh + "/pause", nil, nil, changes, []int{200, 404}},
		{"POST", admin + "/groups/" + fresh + "/resume", nil, nil, changes, []int{200, 404}},
		{"POST", admin + "/groups/" + fresh + "/parked/redrive", json, []byte(`{"all":true}`), changes, []int{200, 404}},
		{"POST", admin + "/groups/" + fresh + "/parked/drop", json, []byte(`{"all":true}`), changes, []int{200, 404}},
		{"DELETE", admin + "/groups/" + fresh + "-gone", nil, nil, changes, []int{404}},
		{"DELETE", admin + "/messages/" + id, nil, nil, changes, []int{200, 204, 404, 409, 412}},
		{"POST", "/v1/subscriptions", json, []byte(`{"topic":"pushed","consumerGroup":"g","url":"http://127.0.0.1:1/"}`), changes, []int{201, 400}},
		{"DELETE", "/v1/subscriptions/none", nil, nil, changes, []int{400, 404}},
		{"POST", "/v1/clock/advance", json, []byte(`{"seconds":1}`), changes, []int{200}},
		{"POST", "/v1/tokens", json, []byte(`{`), changes, []int{400}},
		{"DELETE", "/v1/tokens/none", nil, nil, changes, []int{404}},
		{"POST", "/v1/cluster/finalize", nil, nil, changes, []int{200, 409, 412}},
		{"DELETE", "/v1/cluster/members/none", nil, nil, changes, []int{404, 400}},
		{"POST", "/api/messages/produce", json, []byte(`{"name":"n","email":"e@example.com","message":"m"}`), changes, []int{201}},
		{"GET", "/api/messages/consume?consumer=" + fresh, nil, nil, changes, []int{200}},
		{"POST", "/api/messages/acknowledge", json, []byte(`{"messageId":"none"}`), changes, []int{200}},

		{"GET", "/v1/topics", nil, nil, reads, []int{200}},
		{"GET", admin, nil, nil, reads, []int{200}},
		{"GET", admin + "/groups", nil, nil, reads, []int{200}},
		{"GET", admin + "/groups/kept", nil, nil, reads, []int{200}},
		{"GET", admin + "/groups/kept/parked", nil, nil, reads, []int{200}},
		{"GET", admin + "/messages", nil, nil, reads, []int{200}},
		{"GET", admin + "/messages/" + id, nil, nil, reads, []int{200}},
		{"GET", "/v1/subscriptions", nil, nil, reads, []int{200}},
		{"GET", "/v1/tokens", nil, nil, reads, []int{200}},

		{"GET", "/v1/node", nil, nil, local, []int{200}},
		{"GET", "/v1/cluster", nil, nil, local, []int{200}},
		{"GET", "/livez", nil, nil, local, []int{200}},
		{"GET", "/readyz", nil, nil, local, []int{200, 503}},
		{"GET", "/metrics", nil, nil, local, []int{200}},
	}
}

// judge says what is wrong with an answer; whole is set when there is a leader and all is as usual.
func (c call) judge(a harness.Answer, whole bool) error {
	switch {
	case a.Err != nil:
		return fmt.Errorf("no answer: %w", a.Err)
	case slices.Contains(c.usual, a.Status):
		return nil
	case whole && a.Code != "overloaded" || c.kind == local: // a busy machine's disk may not keep up
		return fmt.Errorf("%v, want one of %v", a, c.usual)
	}
	unknown := a.Status == http.StatusInternalServerError || a.Status == http.StatusGatewayTimeout
	refused := a.Status == http.StatusTooManyRequests || a.Status == http.StatusServiceUnavailable && c.kind != publishes
	switch {
	case a.Code == "":
		return fmt.Errorf("%v: no error document", a)
	case refused && a.Outcome == harness.No && a.RetryAfter() > 0:
		return nil
	case unknown && a.Outcome == harness.Unknown && c.kind != reads:
		return nil
	}
	return fmt.Errorf("%v with Retry-After %q", a, a.Header.Get("Retry-After"))
}

// TestStatuses makes every call of the surface through every node with a leader, while leadership changes hands, and
// with a single node left. A send or batch is answered 429 with Retry-After when nothing was proposed, 500 or 504 when
// its outcome is not known, never 502 or 503; all else 429 or 503 (decision 27).
func TestStatuses(t *testing.T) {
	t.Parallel() // it mostly waits: a call is held for 15 s in the hope of a leader
	c := harness.Start(t, harness.Options{Args: []string{"--virtual-clock"}})
	id := publish(t, client(t, c.Nodes[0]), "statuses", []byte("kept")).ID
	ds, a := client(t, c.Nodes[0]).Receive(t.Context(), harness.Receive{Topic: "statuses", Group: "kept", Visibility: time.Hour})
	if len(ds) != 1 {
		t.Fatalf("receive: %v", a)
	}
	n := 0
	var mu sync.Mutex
	seen := map[string]map[string]int{}
	// round makes all calls at once through these nodes.
	round := func(phase string, whole bool, nodes ...*harness.Node) {
		t.Helper()
		n++
		var wg sync.WaitGroup
		for i, node := range nodes {
			cl := client(t, node)
			cl.Timeout = 2 * time.Minute
			for _, call := range calls(id, ds[0].Receipt, n*10+i) {
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(context.Background(), cl.Timeout)
					defer cancel()
					do := func() harness.Answer {
						return cl.Do(ctx, call.method, call.path, call.header, bytes.NewReader(call.body))
					}
					a := do()
					for a.Err != nil && a.Outcome == harness.No && ctx.Err() == nil {
						a = do() // no connection: a busy machine's node has not accepted it
					}
					if err := call.judge(a, whole); err != nil {
						t.Errorf("%s, through %s: %s %s: %v", phase, node.ID, call.method, call.path, err)
					}
					mu.Lock()
					defer mu.Unlock()
					if seen[phase] == nil {
						seen[phase] = map[string]int{}
					}
					seen[phase][strings.TrimSpace(fmt.Sprint(a.Status, " ", a.Code))]++
				})
			}
		}
		wg.Wait()
	}
	t.Cleanup(func() {
		for phase, statuses := range seen {
			t.Logf("%s: %v", phase, statuses)
		}
	})
	round("with a leader", true, c.Nodes...)
	for i, fault := range []struct {
		name        string
		break_, fix func(*harness.Node)
	}{
		{"killed", (*harness.Node).Kill, (*harness.Node).Start},
		{"paused", (*harness.Node).Pause, (*harness.Node).Resume},
		{"stopped", (*harness.Node).Stop, (*harness.Node).Start},
	} {
		followers, leader := c.Followers()
		phase := "leader " + fault.name
		// Calls go on before, during and after; none is sent to the node that is broken.
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 3 {
				round(phase, false, followers...)
			}
		}()
		harness.Until(t, time.Minute, "calls to be under way", func() error {
			mu.Lock()
			defer mu.Unlock()
			if len(seen[phase]) == 0 {
				return errNotYet
			}
			return nil
		})
		fault.break_(leader)
		<-done
		fault.fix(leader)
		c.WaitInSync(c.Zones()...)
		round(fmt.Sprintf("with a leader again (%d)", i), true, c.Nodes...)
	}

	// A node that was the leader, and then one that never was: first it believes that it leads, then it knows that nobody does.
	for _, leads := range []bool{true, false} {
		followers, leader := c.Followers()
		phase, left, others := "the leader alone", leader, followers
		if !leads {
			phase, left, others = "a follower alone", followers[0], []*harness.Node{followers[1], leader}
		}
		for _, o := range others {
			o.Kill()
		}
		round(phase, false, left)
		harness.Until(t, 30*time.Second, "the node to know of no leader", func() error {
			s, err := left.Cluster()
			if err == nil && s.Leader != "" {
				err = fmt.Errorf("it names %s", s.Leader)
			}
			return err
		})
		round(phase+", and knows it", false, left)
		if seen[phase+", and knows it"]["201"] > 0 {
			t.Errorf("%s: something was stored without a majority", phase)
		}
		for _, o := range others {
			o.Start()
		}
		c.WaitInSync(c.Zones()...)
		round(phase+" no longer", true, c.Nodes...)
	}
	c.EqualHashes()
}
