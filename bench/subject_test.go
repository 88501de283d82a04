package bench

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"tercet.dev/tercet/server/wire"
)

// serveDocument serves one node's view of the cluster.
func serveDocument(t *testing.T, c wire.Cluster) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/cluster" {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		if err := json.NewEncoder(w).Encode(c); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func TestClusterAsksTheLeader(t *testing.T) {
	// n1 has been away and still believes what was so before.
	old := serveDocument(t, wire.Cluster{Leader: "n2", InSync: []string{"a", "b", "c"}})
	leader := serveDocument(t, wire.Cluster{Leader: "n2", InSync: []string{"b", "c"}})
	s := &Subject{Nodes: []SubjectNode{{ID: "n1", HTTP: old}, {ID: "n2", HTTP: leader}}}
	c, err := s.cluster(t.Context())
	if err != nil || strings.Join(c.InSync, "") != "bc" {
		t.Errorf("%+v, %v", c, err)
	}
	s.Nodes = s.Nodes[:1] // a cluster of others, of which only n1 was named
	if c, err = s.cluster(t.Context()); err != nil || c.Leader != "n2" {
		t.Errorf("%+v, %v", c, err)
	}
	s.Nodes = append(s.Nodes, SubjectNode{ID: "n2", HTTP: serveDocument(t, wire.Cluster{Leader: "n1"})})
	if c, err = s.cluster(t.Context()); err == nil {
		t.Errorf("each of two servers takes the other for the leader: %+v", c)
	}
}

// A server that has just started refuses until it knows whom it may answer, and between two leaders there is none: neither
// ends a bench.
func TestWaitLeaderHasPatience(t *testing.T) {
	asked := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked++
		switch asked {
		case 1:
			w.WriteHeader(http.StatusServiceUnavailable)
		case 2:
			_ = json.NewEncoder(w).Encode(wire.Cluster{InSync: []string{}})
		default:
			_ = json.NewEncoder(w).Encode(wire.Cluster{Leader: "n1", InSync: []string{"a"}})
		}
	}))
	defer server.Close()
	s := &Subject{Nodes: []SubjectNode{{ID: "n1", HTTP: server.Listener.Addr().String()}}}
	if c, err := s.waitLeader(t.Context()); err != nil || c.Leader != "n1" || asked != 3 {
		t.Errorf("%+v, %v, asked %d times", c, err, asked)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	server.Close()
	if c, err := s.waitLeader(ctx); err == nil {
		t.Errorf("nobody answers: %+v", c)
	}
}
