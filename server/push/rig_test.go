package push

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server"
	"tercet.dev/tercet/server/servertest"
	"tercet.dev/tercet/server/wire"
)

// patience bounds what tests wait for; it says nothing of how long things take.
const patience = 2 * time.Minute

// A rig is a node with its HTTP server and its dispatcher, and a client of both.
type rig struct {
	t    *testing.T
	node *raft.Node
	d    *Dispatcher
	url  string
	*client.Client
}

var loopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

func newRig(t *testing.T) *rig { return newRigOf(t, servertest.Nodes(t, 1)[0], loopback) }

func newRigOf(t *testing.T, node *raft.Node, allow []netip.Prefix) *rig {
	t.Helper()
	log := hclog.New(&hclog.LoggerOptions{Output: logWriter{t}, Level: hclog.Warn})
	d, err := New(Options{Backend: node, Allow: allow, Version: "test", Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	s, err := server.New(server.Options{Backend: node, VirtualClock: true, Extensions: []server.Extension{d.Extension()}, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	d.Start()
	r := &rig{t: t, node: node, d: d, url: "http://" + l.Addr().String()}
	if r.Client, err = client.New(client.Options{Servers: []string{r.url}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Client.Close()
		http.DefaultClient.CloseIdleConnections()
		d.Close()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return r
}

type logWriter struct{ t testing.TB }

func (w logWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", bytes.TrimRight(p, "\n"))
	return len(p), nil
}

// until waits for a condition.
func until(t *testing.T, what string, cond func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		err := cond()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		<-tick.C
	}
}

// publish sends a message in plain HTTP and returns its ID.
func (r *rig) publish(topic, body string, header ...string) string {
	r.t.Helper()
	req, err := http.NewRequest(http.MethodPost, r.url+"/api/v3/topic/"+topic, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer res.Body.Close()
	if text, _ := io.ReadAll(res.Body); res.StatusCode != http.StatusCreated {
		r.t.Fatalf("publish: %s %s", res.Status, text)
	}
	return res.Header.Get("Vqs-Message-Id")
}

// create makes a subscription, which must be in force when this returns.
func (r *rig) create(s wire.Subscription) wire.Subscription {
	r.t.Helper()
	out, err := r.CreateSubscription(r.t.Context(), s, false)
	if err != nil {
		r.t.Fatal(err)
	}
	return out
}

func (r *rig) advance(d time.Duration) {
	r.t.Helper()
	if err := r.AdvanceClock(r.t.Context(), d); err != nil {
		r.t.Fatal(err)
	}
}

// group asks the engine about a group.
func (r *rig) group(topic, group string) engine.GroupInfo {
	r.t.Helper()
	a, err := r.node.Query(r.t.Context(), engine.Query{Kind: engine.QueryGroup, Topic: topic, Group: group, Max: 1})
	if err != nil || len(a.Groups) != 1 {
		r.t.Fatalf("group %s of %s: %+v, %v", group, topic, a, err)
	}
	return a.Groups[0]
}

// hidden fails the test if the group would be given a message now.
func (r *rig) hidden(topic, group string) {
	r.t.Helper()
	a, err := r.node.Query(r.t.Context(), engine.Query{Kind: engine.QueryPeek, Topic: topic, Group: group, Max: 1})
	if err != nil || len(a.Messages) != 0 {
		r.t.Errorf("%d messages of %s are deliverable, %v", len(a.Messages), topic, err)
	}
}

// acknowledged waits until a group is done with so many messages.
func (r *rig) acknowledged(topic, group string, n uint64) {
	r.t.Helper()
	until(r.t, fmt.Sprintf("%d acknowledged messages of %s", n, topic), func() error {
		if g := r.group(topic, group); g.Acknowledged != n || g.Inflight != 0 {
			return fmt.Errorf("%d acknowledged, %d in flight", g.Acknowledged, g.Inflight)
		}
		return nil
	})
}

// pushed is one request that an endpoint got.
type pushed struct {
	*http.Request
	body []byte
	// reply answers it; nothing happens before.
	reply func(status int, header ...string)
}

func (p *pushed) id() string      { return p.Header.Get("ce-vqsmessageid") }
func (p *pushed) receipt() string { return p.Header.Get("ce-vqsreceipthandle") }
func (p *pushed) topic() string   { return p.Header.Get("ce-vqsqueuename") }

// endpoint is an application that does with each request what the test says.
type testEndpointServer struct {
	*httptest.Server
	t        *testing.T
	requests chan *pushed
	closing  chan struct{}
	once     sync.Once
}

// newEndpointServer starts an endpoint whose requests wait for the test.
func newEndpointServer(t *testing.T) *testEndpointServer {
	e := &testEndpointServer{t: t, requests: make(chan *pushed, 4096), closing: make(chan struct{})}
	e.Server = httptest.NewServer(e)
	t.Cleanup(e.stop)
	return e
}

func (e *testEndpointServer) stop() {
	e.once.Do(func() {
		close(e.closing)
		e.Close()
	})
}

// ServeHTTP implements http.Handler.
func (e *testEndpointServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		e.t.Errorf("body of a push: %v", err)
	}
	done := make(chan struct{})
	e.requests <- &pushed{Request: r, body: body, reply: func(status int, header ...string) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		close(done)
	}}
	select {
	case <-done:
	case <-e.closing:
	case <-r.Context().Done():
	}
}

// next waits for the next request.
func (e *testEndpointServer) next() *pushed {
	e.t.Helper()
	select {
	case p := <-e.requests:
		return p
	case <-time.After(patience):
		e.t.Fatal("no push arrived")
		return nil
	}
}

// none fails the test if a request has arrived that nobody asked for.
func (e *testEndpointServer) none() {
	e.t.Helper()
	select {
	case p := <-e.requests:
		e.t.Errorf("pushed %s, delivery %s", p.id(), p.Header.Get("ce-vqsdeliverycount"))
	default:
	}
}

// ack does what the SDK does when a handler is done.
func (r *rig) ack(p *pushed) {
	r.t.Helper()
	if status := r.lease(p, http.MethodDelete, ""); status != http.StatusNoContent {
		r.t.Errorf("acknowledge %s: %d", p.id(), status)
	}
}

func (r *rig) lease(p *pushed, method, body string) int {
	r.t.Helper()
	url := r.url + "/api/v3/topic/" + p.topic() + "/consumer/" + p.Header.Get("ce-vqsconsumergroup") + "/lease/" + p.receipt()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	res.Body.Close()
	return res.StatusCode
}

// receiveID asks for a message by its ID as the SDK does after a push that does not carry it.
func (r *rig) receiveID(topic, group, id string) (engine.Delivery, errs.Code) {
	r.t.Helper()
	parsed, err := engine.NewSealer(r.node.Secret()).ParseMessageID(id)
	if err != nil {
		r.t.Fatal(err)
	}
	reply, err := r.node.Propose(r.t.Context(), raft.Proposal{Command: (&engine.ReceiveID{Topic: topic, Group: group, ID: parsed, Visibility: time.Minute}).AppendTo(nil)})
	if err != nil {
		r.t.Fatal(err)
	}
	if reply.Code != errs.OK {
		return engine.Delivery{}, reply.Code
	}
	return reply.Deliveries[0], errs.OK
}

func n64(v int64) *int64 { return &v }

// settled waits until no push of the dispatcher is under way: what it had to say is said.
func (r *rig) settled() {
	r.t.Helper()
	rests := r.d.rests.Load() // the next push may begin in the moment in which the last one ends
	until(r.t, "pushes to end", func() error {
		if n := r.d.underway.Load(); n > 0 && r.d.rests.Load() == rests {
			return fmt.Errorf("%d are under way", n)
		}
		return nil
	})
}
