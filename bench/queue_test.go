package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft"
)

// keyNode takes publishes and remembers their keys and delays.
type keyNode struct {
	mu     sync.Mutex
	keys   []string
	delays []time.Duration
	bodies [][]byte
}

func (n *keyNode) Propose(_ context.Context, p raft.Proposal) (raft.Reply, error) {
	c, err := engine.DecodeCommand(p.Command)
	if err != nil {
		return raft.Reply{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, m := range c.(*engine.Publish).Messages {
		n.keys, n.delays, n.bodies = append(n.keys, m.Key), append(n.delays, m.Delay), append(n.bodies, bytes.Clone(m.Body))
	}
	return raft.Reply{}, nil
}

// TestKeyedWorkload: each message has a key that no other one has, in batches as well, and in a run with another seed.
func TestKeyedWorkload(t *testing.T) {
	n := &keyNode{}
	for seed := range uint64(2) {
		w := Workload{Topic: "t", Publishers: 3, Size: 16, Batch: 7, Messages: 200, Retention: time.Minute, Keyed: true, Seed: seed}
		d := &NodeDriver{Node: n, Workload: w}
		d.Prepare()
		if _, err := Run(t.Context(), w, d, Hooks{}); err != nil {
			t.Fatal(err)
		}
	}
	if len(n.keys) < 400 {
		t.Fatalf("%d messages", len(n.keys))
	}
	slices.Sort(n.keys)
	if all := len(n.keys); len(slices.Compact(n.keys)) != all || slices.Contains(n.keys, keyPlace) || slices.Contains(n.keys, "") {
		t.Errorf("%d messages have %d keys", all, len(slices.Compact(n.keys)))
	}
}

// TestDelayedWorkload: a message carries the moment at which its delay is over.
func TestDelayedWorkload(t *testing.T) {
	n := &keyNode{}
	w := Workload{Topic: "t", Publishers: 1, Size: 100, Batch: 2, Messages: 10, Retention: time.Hour, Delay: 70 * time.Second, Timed: true}
	d := &NodeDriver{Node: n, Workload: w}
	d.Prepare()
	before := time.Now()
	if _, err := Run(t.Context(), w, d, Hooks{}); err != nil {
		t.Fatal(err)
	}
	for i, body := range n.bodies {
		due, ok := readTimeMark(body)
		if !ok || n.delays[i] != w.Delay || due.Before(before.Add(w.Delay)) || due.After(time.Now().Add(w.Delay)) {
			t.Errorf("message %d with a delay of %s is due %s after the run began", i, n.delays[i], due.Sub(before))
		}
	}
	w.Delay = w.Retention
	if w.Validate() == nil {
		t.Error("a delay as long as the retention is taken")
	}
}

// TestReadOne: the one message of an answer is read to its end, and more than one is an error.
func TestReadOne(t *testing.T) {
	answer := func(body string) *http.Response {
		return &http.Response{Header: http.Header{"Content-Type": {"multipart/mixed; boundary=b"}}, Body: nopCloser{strings.NewReader(body)}}
	}
	one := "--b\r\nVqs-Receipt-Handle: r1\r\n\r\nhello\r\n--b"
	if receipt, _, err := readOne(answer(one + "--\r\n")); err != nil || receipt != "r1" {
		t.Errorf("%q, %v", receipt, err)
	}
	for _, bad := range []string{one + "\r\n\r\nagain\r\n--b--\r\n", one[:20], one[:38]} {
		if _, _, err := readOne(answer(bad)); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

type nopCloser struct{ *strings.Reader }

func (nopCloser) Close() error { return nil }

// TestQueueReport: what a report says for people and for programs.
func TestQueueReport(t *testing.T) {
	r := &QueueReport{Command: "tercet bench x", Idle: 1 << 20, Peak: 3 << 20, Added: 2 << 20, Rows: []QueueRow{
		{Name: "without", Messages: 1000, Elapsed: time.Second, PerSecond: 1000},
		{Name: "with", Messages: 900, Elapsed: time.Second, PerSecond: 900, Ratio: 0.9, Latency: &Percentiles{Count: 1, P50: 1500, P99: 2500}, Failed: map[string]int64{"overloaded": 3}},
	}}
	var b bytes.Buffer
	if err := r.Text(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"tercet bench x", "1 000 messages in 1s, 1 000/s", "p50 1.50 ms, p99 2.50 ms", "0.90 of the row above", "3 failed with overloaded", "2 MiB more than idle"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is not in\n%s", want, b.String())
		}
	}
	text, err := json.Marshal(r)
	var again QueueReport
	if err != nil || json.Unmarshal(text, &again) != nil || len(again.Rows) != 2 || again.Rows[1].Latency.P99 != 2500 {
		t.Errorf("%s, %v", text, err)
	}
}
