package raft

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/engine"
)

// A message published through any node is delivered and acknowledged through any other.
func TestPublishReceiveAcknowledgeThroughEachNode(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.leader()
	c.inSync(3)
	for i, from := range founders {
		for j, to := range founders {
			topic, group := fmt.Sprintf("t%d%d", i, j), "g"
			body := "through " + from
			r := must(t, c.node(from), Proposal{Command: publishCommand(topic, body)})
			if r.Zones != 3 || r.Index == 0 || r.Term == 0 {
				t.Fatalf("publish through %s: %+v", from, r)
			}
			got := must(t, c.node(to), Proposal{Command: receiveCommand(topic, group, 1)})
			if len(got.Deliveries) != 1 || string(got.Deliveries[0].Body) != body || got.Deliveries[0].ID != r.Published.ID(0) {
				t.Fatalf("receive through %s: %+v", to, got)
			}
			again := must(t, c.node(from), Proposal{Command: receiveCommand(topic, group, 1)})
			if len(again.Deliveries) != 0 {
				t.Fatalf("leased message given again: %+v", again)
			}
			acked := must(t, c.node(from), Proposal{Command: ackCommand(topic, group, got.Deliveries...)})
			if len(acked.Codes) != 1 || acked.Codes[0] != 0 {
				t.Fatalf("acknowledge: %+v", acked)
			}
			a, err := c.node(to).Query(testContext(t), engine.Query{Kind: engine.QueryGroup, Topic: topic, Group: group})
			if err != nil || len(a.Groups) != 1 || a.Groups[0].Acknowledged != 1 {
				t.Fatalf("query through %s: %+v, %v", to, a, err)
			}
		}
	}
	c.agree()
}

// All nodes stop without notice and start again: members, state and messages are what they were, without a
// snapshot and with --peers no longer needed.
func TestRestartOfAllNodes(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	const messages = 300
	want := make(map[string]bool)
	for i := range messages {
		body := fmt.Sprint("m", i)
		must(t, c.node(founders[i%3]), Proposal{Command: publishCommand("orders", body)})
		want[body] = true
	}
	half := must(t, c.node("n1"), Proposal{Command: receiveCommand("orders", "g", 10)})
	must(t, c.node("n2"), Proposal{Command: ackCommand("orders", "g", half.Deliveries...)})
	// Many small entries: more than hraft's own replay could queue (decision 1).
	entries := 3000
	if campaign() {
		entries = 100_000
	}
	lead := c.node(c.leader())
	tick := (&engine.Tick{}).AppendTo(nil)
	for i := range entries {
		var eb engine.EntryBuilder
		eb.Reset(lead.eng.Level(), lead.clock.now(), len(tick)+engine.EntryOverhead)
		eb.Add(0, 0, 0, tick)
		applied := lead.raft.ApplyLog(hraft.Log{Data: eb.Bytes()}, 0)
		if i%8 == 7 {
			if err := applied.Error(); err != nil {
				t.Fatal(err)
			}
		}
	}
	must(t, lead, Proposal{Command: tick})
	for _, d := range half.Deliveries {
		delete(want, string(d.Body))
	}
	c.agree()
	before := c.node("n1").Status()
	for _, name := range founders {
		c.stop(name)
	}
	c.tweak = func(cfg *Config) { cfg.Peers = nil }
	c.start(founders...)
	c.leader()
	c.inSync(3)
	after := c.node("n1").Status()
	if after.ClusterID != before.ClusterID || after.Incarnation != before.Incarnation || len(after.Nodes) != 3 {
		t.Fatalf("before %+v\nafter  %+v", before, after)
	}
	for len(want) > 0 {
		r := must(t, c.node("n3"), Proposal{Command: receiveCommand("orders", "g", 10)})
		if len(r.Deliveries) == 0 {
			t.Fatalf("%d messages are gone: %v", len(want), want)
		}
		for _, d := range r.Deliveries {
			if !want[string(d.Body)] {
				t.Fatalf("unexpected message %q", d.Body)
			}
			delete(want, string(d.Body))
		}
	}
	c.agree()
}

// A single node is a cluster.
func TestSingleNode(t *testing.T) {
	c := newCluster(t, func(cfg *Config) { cfg.Peers = nil })
	c.start("n1")
	c.leader()
	r := must(t, c.node("n1"), Proposal{Command: publishCommand("a", "x")})
	if r.Zones != 1 {
		t.Fatalf("zones %d", r.Zones)
	}
	c.stop("n1")
	c.start("n1")
	c.leader()
	got := must(t, c.node("n1"), Proposal{Command: receiveCommand("a", "g", 1)})
	if len(got.Deliveries) != 1 || string(got.Deliveries[0].Body) != "x" {
		t.Fatalf("after a restart: %+v", got)
	}
}

// lineCounter counts log lines with a text in them.
type lineCounter struct {
	mu    sync.Mutex
	text  string
	lines []string
}

func (l *lineCounter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if strings.Contains(string(p), l.text) {
		l.lines = append(l.lines, string(p))
	}
	return len(p), nil
}

// Founding a cluster is nothing to warn of, in whatever order its nodes come to know each other.
func TestFoundingLogsNoWarnings(t *testing.T) {
	warnings := &lineCounter{text: "[WARN]"}
	c := newCluster(t, func(cfg *Config) {
		cfg.Logger = hclog.New(&hclog.LoggerOptions{Output: warnings, Level: hclog.Info})
	})
	c.start(founders...)
	c.inSync(3)
	c.leader()
	warnings.mu.Lock()
	defer warnings.mu.Unlock()
	for _, line := range warnings.lines {
		t.Error(line)
	}
}
