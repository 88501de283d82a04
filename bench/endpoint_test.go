package bench

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// fakeNode keeps the commands it is given and hands messages out once.
type fakeNode struct {
	mu       sync.Mutex
	commands []engine.Command
	requires map[raft.Require]int
	waiting  int
	settled  int
}

func (n *fakeNode) Propose(_ context.Context, p raft.Proposal) (raft.Reply, error) {
	command, err := engine.DecodeCommand(p.Command)
	if err != nil {
		return raft.Reply{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.commands = append(n.commands, command)
	if n.requires == nil {
		n.requires = map[raft.Require]int{}
	}
	n.requires[p.Require]++
	switch c := command.(type) {
	case *engine.Publish:
		n.waiting += len(c.Messages)
		return raft.Reply{Zones: 3}, nil
	case *engine.Receive:
		give := min(c.Max, n.waiting)
		n.waiting -= give
		r := raft.Reply{Result: engine.Result{Deliveries: make([]engine.Delivery, give)}}
		for i := range r.Deliveries {
			r.Deliveries[i].Receipt = engine.Receipt{Offset: uint64(i), Epoch: 1}
		}
		return r, nil
	case *engine.Settle:
		n.settled += len(c.Receipts)
		return raft.Reply{Result: engine.Result{Codes: make([]errs.Code, len(c.Receipts))}}, nil
	}
	return raft.Reply{Result: engine.Result{Code: errs.Unsupported}}, nil
}

func TestEndpoint(t *testing.T) {
	n := &fakeNode{}
	e, err := Listen("127.0.0.1:0", n)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	w := Workload{
		Topic: "t", Publishers: 3, Size: 200, Batch: 5, Messages: 1000, Retention: time.Minute, AllZones: true, Seed: 7,
	}
	var phases []string
	r, err := RunRemote(t.Context(), e.Addr(), w, Hooks{
		Begin: func() { phases = append(phases, "begin") },
		End:   func() { phases = append(phases, "end") },
	})
	if err != nil {
		t.Fatal(err)
	}
	if strings.Join(phases, " ") != "begin end" {
		t.Errorf("phases %v", phases)
	}
	if r.Messages < 1000 || r.Messages != 5*r.Requests || r.Zones[3] != r.Requests || r.Publish.Count() != r.Requests {
		t.Errorf("%+v", r)
	}
	bodies := map[string]bool{}
	for _, c := range n.commands {
		p := c.(*engine.Publish)
		if p.Topic != "t" || len(p.Messages) != 5 {
			t.Fatalf("%+v", p)
		}
		for _, m := range p.Messages {
			if len(m.Body) != 200 || m.Retention != time.Minute {
				t.Fatalf("%+v", m)
			}
			bodies[string(m.Body)] = true
		}
	}
	if len(bodies) < 900 {
		t.Errorf("only %d different bodies in 1000 messages", len(bodies))
	}
	if n.requires[raft.AllZones] != len(n.commands) {
		t.Errorf("required %v", n.requires)
	}

	drain := Workload{
		Topic: "t", Consumers: 2, Group: "g", ReceiveMax: 10, Batch: 1, Messages: r.Messages, Retention: time.Minute,
	}
	r, err = RunRemote(t.Context(), e.Addr(), drain, Hooks{})
	if err != nil {
		t.Fatal(err)
	}
	if r.Acknowledged != drain.Messages || int64(n.settled) != drain.Messages {
		t.Errorf("acknowledged %d, settled %d of %d", r.Acknowledged, n.settled, drain.Messages)
	}
}

func TestEndpointRefuses(t *testing.T) {
	if e, err := Listen("0.0.0.0:0", &fakeNode{}); err == nil {
		e.Close()
		t.Error("it listens on an address that others can reach")
	}
	e, err := Listen("127.0.0.1:0", &fakeNode{})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if _, err := RunRemote(t.Context(), e.Addr(), Workload{}, Hooks{}); err == nil || !strings.Contains(err.Error(), "no topic") {
		t.Errorf("an empty workload: %v", err)
	}
	resp, err := http.Post("http://"+e.Addr()+"/load", "application/json", strings.NewReader("{"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusBadRequest {
		t.Errorf("half a document: %s", resp.Status)
	}
	http.DefaultClient.CloseIdleConnections()
}

// TestEndpointStopsWithItsClient: a bench that is interrupted must not leave a load behind in the server.
func TestEndpointStopsWithItsClient(t *testing.T) {
	e, err := Listen("127.0.0.1:0", &fakeNode{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	w := Workload{Topic: "t", Publishers: 1, Size: 1, Batch: 1, Duration: time.Hour, Retention: time.Minute}
	_, err = RunRemote(ctx, e.Addr(), w, Hooks{Begin: cancel})
	if err == nil {
		t.Error("an interrupted run ended well")
	}
	if err := e.Close(); err != nil { // goleak tells whether the run has ended
		t.Error(err)
	}
}
