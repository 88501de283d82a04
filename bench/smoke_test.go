package bench

import (
	"context"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tercet.dev/tercet/server"
	"tercet.dev/tercet/server/servertest"
)

// serveNode runs a node in this process, with its HTTP server and an endpoint.
func serveNode(t *testing.T) *Subject {
	t.Helper()
	node := servertest.Nodes(t, 1)[0]
	registry := prometheus.NewRegistry()
	s, err := server.New(server.Options{
		Backend: node, Registerer: registry, Gatherer: prometheus.Gatherers{registry, node.Gatherer()},
	})
	if err != nil {
		t.Fatal(err)
	}
	listeners, err := server.Listen(context.Background(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(listeners[0]) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	e, err := Listen("127.0.0.1:0", node)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return &Subject{
		Variant: "tercet",
		Nodes:   []SubjectNode{{HTTP: listeners[0].Addr().String(), Endpoint: e.Addr()}},
	}
}

func via(http bool) Via {
	if http {
		return ViaHTTP
	}
	return ViaLeader
}

// TestMeasureNode drives a real node both ways, with publishers and consumers.
func TestMeasureNode(t *testing.T) {
	s := serveNode(t)
	for _, c := range []struct {
		topic              string
		http, multipart    bool
		batch, receivedMin int64
	}{
		{"leader", false, false, 1, 1000}, {"leader-batch", false, false, 10, 1000},
		{"http", true, false, 1, 1000}, {"http-compact", true, false, 10, 1000}, {"http-multipart", true, true, 10, 1000},
	} {
		w := Workload{
			Topic: c.topic, Publishers: 4, Size: 300, Batch: int(c.batch), Messages: 1000, Retention: time.Minute,
			Consumers: 3, Group: "g", ReceiveMax: 10,
		}
		r, err := Measure(t.Context(), s, Plan{Workload: w, Via: via(c.http), Multipart: c.multipart})
		if err != nil {
			t.Fatalf("%s: %v", c.topic, err)
		}
		res := r.Result
		if len(res.Failed) > 0 || res.Messages < 1000 || res.Messages != c.batch*res.Requests || res.Zones[1] != res.Requests {
			t.Errorf("%s: published %+v", c.topic, res)
		}
		// What is acknowledged is over: each message comes once.
		if res.Received != res.Messages || res.Acknowledged != res.Messages {
			t.Errorf("%s: %d published, %d received, %d acknowledged", c.topic, res.Messages, res.Received, res.Acknowledged)
		}
		if r.Leader != "n1" || r.EntriesPerSync <= 0 || r.MessagesPerSync <= 0 || r.SyncBytes < 300 || r.Latency.Count != res.Requests {
			t.Errorf("%s: report %+v", c.topic, r)
		}
	}
}

// TestShapesOfNode drives a real node with windows, several topics and groups, mixed sizes and timed bodies.
func TestShapesOfNode(t *testing.T) {
	s := serveNode(t)
	for _, http := range []bool{false, true} {
		w := Workload{
			Topic: "shapes", Topics: 3, Publishers: 2, Window: 4, Sizes: []int{50, 2000}, Batch: 2, Messages: 600, Retention: time.Minute,
			Consumers: 6, Group: "g", Groups: 2, ReceiveMax: 10, Timed: true,
		}
		if http {
			w.Topic, w.Window = "shapes-http", 1
		}
		r, err := Measure(t.Context(), s, Plan{Workload: w, Via: via(http)})
		if err != nil {
			t.Fatal(err)
		}
		res := r.Result
		if len(res.Failed) > 0 || res.Messages < 600 || res.Received != 2*res.Messages || res.Acknowledged != 2*res.Messages {
			t.Errorf("http %t: %+v", http, res)
		}
		if mean := float64(res.Bytes) / float64(res.Messages); mean < 950 || mean > 1100 {
			t.Errorf("http %t: %.0f bytes a message", http, mean)
		}
		if r.EndToEndLatency == nil || r.EndToEndLatency.Count != 2*res.Messages || r.EndToEndLatency.P50 <= 0 || r.EndToEndLatency.Max > 60e6 {
			t.Errorf("http %t: end to end %+v", http, r.EndToEndLatency)
		}
	}
}

// TestAccountOfNode publishes stamped messages to a real node and finds each of them.
func TestAccountOfNode(t *testing.T) {
	s := serveNode(t)
	w := Workload{
		Topic: "t", Publishers: 4, Size: 64, Batch: 1, Messages: 500, Retention: time.Minute, Stamped: true,
		Consumers: 2, Group: "g", ReceiveMax: 10,
	}
	ledger := NewLedger()
	d := &HTTPDriver{Addrs: s.httpAddrs(), Workload: w}
	if err := d.Prepare(); err != nil {
		t.Fatal(err)
	}
	r, err := Run(t.Context(), w, d, Hooks{
		Published: func(_ int, ack Ack, err error) {
			if err == nil {
				ledger.Acknowledged(ack.Stamp)
			}
		},
		Received: func(_ int, body []byte) {
			stamp, err := parseStamp(body)
			if err != nil {
				t.Error(err)
			}
			ledger.Found(stamp)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := ledger.Balance(), (Balance{Acknowledged: r.Messages}); got != want {
		t.Errorf("got %+v, want %+v; failed %v", got, want, r.Failed)
	}
}
