package peer

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	hclog "github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for something that must happen before it gives up. Nothing is measured by it.
const patience = 2 * time.Minute

func patient(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// logBook collects log lines and lets a test wait for one.
type logBook struct {
	mu      sync.Mutex
	text    strings.Builder
	changed chan struct{}
}

func newLogBook() *logBook { return &logBook{changed: make(chan struct{})} }

func (l *logBook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	close(l.changed)
	l.changed = make(chan struct{})
	return len(p), nil
}

func (l *logBook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *logBook) await(t *testing.T, text string) {
	t.Helper()
	timeout := time.After(patience)
	for {
		l.mu.Lock()
		all, changed := l.text.String(), l.changed
		l.mu.Unlock()
		if strings.Contains(all, text) {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("log lacks %q:\n%s", text, all)
		}
	}
}

// node is a mesh under test with what it logged and found out.
type node struct {
	*Mesh
	log    *logBook
	events chan Event
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// start makes a mesh, changed by the options, and starts it.
func start(t *testing.T, id ID, change ...func(*Options)) *node {
	t.Helper()
	n := prepare(t, id, change...)
	n.Start()
	return n
}

func prepare(t *testing.T, id ID, change ...func(*Options)) *node {
	t.Helper()
	n := &node{log: newLogBook(), events: make(chan Event, 1024)}
	o := Options{
		ID: id, Zone: "zone-" + id.Name(), Cluster: "c1",
		Logger: hclog.New(&hclog.LoggerOptions{Output: n.log, Level: hclog.Debug}),
		Observe: func(e Event) {
			select {
			case n.events <- e:
			default:
			}
		},
		Linger: time.Millisecond,
	}
	for _, c := range change {
		c(&o)
	}
	if o.Listener == nil {
		o.Listener = listen(t)
	}
	n.Mesh = New(o)
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close %s: %v", id, err)
		}
	})
	return n
}

// awaitEvent returns the next event of the kind, skipping others.
func (n *node) awaitEvent(t *testing.T, kind EventKind, purpose Purpose) Event {
	t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case e := <-n.events:
			if e.Kind == kind && e.Purpose == purpose {
				return e
			}
		case <-timeout:
			t.Fatalf("no event %s on %s; log:\n%s", kind, purpose, n.log.text.String())
		}
	}
}

func table(nodes ...*node) map[ID]string {
	peers := make(map[ID]string)
	for _, n := range nodes {
		peers[n.ID()] = n.Addr().String()
	}
	return peers
}

// handlerFunc makes a Handler of a function.
type handlerFunc func(*Request)

func (f handlerFunc) HandleRequest(r *Request) { f(r) }
