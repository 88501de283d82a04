package server

import (
	"bytes"
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft"
)

// TestPanic shows that a panic ends one request, is logged, and gives back what the request held.
func TestPanic(t *testing.T) {
	var log bytes.Buffer
	b := &fakeBackend{propose: func(_ context.Context, p raft.Proposal) (raft.Reply, error) {
		command, err := engine.DecodeCommand(p.Command)
		if err != nil {
			t.Error(err)
		}
		if command.(*engine.Publish).Topic == "bad" {
			panic("a mistake")
		}
		return raft.Reply{Result: engine.Result{Published: engine.Published{Index: 1, Count: 1}}}, nil
	}}
	s, err := New(Options{Backend: b, Logger: hclog.New(&hclog.LoggerOptions{Output: &log}), Limits: Limits{Requests: 2}})
	if err != nil {
		t.Fatal(err)
	}
	h := httptest.NewServer(s)
	for range 10 {
		if r, err := http.Post(h.URL+"/api/v3/topic/bad", "text/plain", strings.NewReader("x")); err == nil {
			r.Body.Close()
			t.Fatalf("status %d", r.StatusCode)
		}
	}
	r, err := http.Post(h.URL+"/api/v3/topic/good", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if r.StatusCode != http.StatusCreated {
		t.Errorf("status %d: the panics kept their places", r.StatusCode)
	}
	http.DefaultClient.CloseIdleConnections()
	h.Close()
	if text := log.String(); !strings.Contains(text, "a mistake") || !strings.Contains(text, "panic_test.go") {
		t.Errorf("the log says %q", text)
	}
}
