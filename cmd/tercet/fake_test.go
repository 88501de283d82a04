package main

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"

	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

// fakeQueue answers batches as a server does, after a hook had its say. It stores the bodies.
type fakeQueue struct {
	*httptest.Server
	// before is called for each batch; stored says whether it is stored, and a status other than 0 is answered
	// with the outcome instead of the results.
	before func(request int, bodies []string) (stored bool, status int, outcome string)
	// refuse names the bodies that are refused one by one.
	refuse map[string]bool

	mu       sync.Mutex
	requests int
	sizes    []int
	bodies   map[string]int
	// keys are the idempotency keys of what is stored, and their bodies.
	keys map[string]string
}

func newFakeQueue(t *testing.T) *fakeQueue {
	q := &fakeQueue{bodies: map[string]int{}, keys: map[string]string{}, refuse: map[string]bool{}}
	q.Server = httptest.NewServer(http.HandlerFunc(q.batch))
	t.Cleanup(q.Close)
	return q
}

func (q *fakeQueue) batch(w http.ResponseWriter, r *http.Request) {
	q.mu.Lock()
	defer q.mu.Unlock()
	var bodies, keys []string
	for frames := wire.NewReader(r.Body, limits.BatchBytesMax); ; {
		head, body, err := frames.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		bodies = append(bodies, string(body))
		key := ""
		for l := range strings.Lines(string(head)) {
			if name, value, _ := strings.Cut(l, ":"); strings.EqualFold(name, wire.HeaderIdempotencyKey) {
				key = strings.TrimSpace(value)
			}
		}
		keys = append(keys, key)
	}
	q.requests++
	q.sizes = append(q.sizes, len(bodies))
	stored, status, outcome := true, 0, ""
	if q.before != nil {
		stored, status, outcome = q.before(q.requests, bodies)
	}
	var answer []byte
	for i, b := range bodies {
		if q.refuse[b] {
			answer = wire.AppendFrame(answer, []byte("status: 413\ncode: message_too_large\n"), []byte("too large for the test"))
			continue
		}
		if _, there := q.keys[keys[i]]; stored && (keys[i] == "" || !there) {
			q.bodies[b]++
			q.keys[keys[i]] = b
		}
		answer = wire.AppendFrame(answer, nil, []byte("id-"+strconv.Itoa(q.requests)))
	}
	if status != 0 {
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(wire.Error{Error: "made to fail", Code: "outcome_unknown", Outcome: outcome, Hint: "none", RequestID: "r1"})
		return
	}
	w.Header().Set("Content-Type", wire.MediaBatch)
	w.Header().Set(wire.HeaderZones, "3")
	_, _ = w.Write(answer)
}
