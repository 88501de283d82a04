package redistest

import (
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Endpoint is what a service's name is: an address that leads to whoever is the primary. New connections go there; those
// that exist stay where they are.
type Endpoint struct {
	l       net.Listener
	primary atomic.Pointer[string]
	mu      sync.Mutex
	conns   map[net.Conn]struct{}
	group   sync.WaitGroup
}

// NewEndpoint returns an endpoint that leads to the server at this address.
func NewEndpoint(t *testing.T, primary string) *Endpoint {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &Endpoint{l: l, conns: make(map[net.Conn]struct{})}
	e.Lead(primary)
	e.group.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			e.group.Go(func() { e.serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		e.Cut()
		e.group.Wait()
	})
	return e
}

// Addr is the endpoint's own host:port.
func (e *Endpoint) Addr() string { return e.l.Addr().String() }

// Lead makes new connections go to another server.
func (e *Endpoint) Lead(primary string) { e.primary.Store(&primary) }

// Leads is where new connections go.
func (e *Endpoint) Leads() string { return *e.primary.Load() }

func (e *Endpoint) serve(c net.Conn) {
	defer c.Close()
	s, err := net.Dial("tcp", e.Leads())
	if err != nil {
		return
	}
	defer s.Close()
	e.mu.Lock()
	e.conns[c] = struct{}{}
	e.mu.Unlock()
	e.group.Go(func() {
		_, _ = io.Copy(s, c) // either side may break it off
		_ = s.Close()
	})
	_, _ = io.Copy(c, s)
	e.mu.Lock()
	delete(e.conns, c)
	e.mu.Unlock()
}

// Cut breaks the connections that exist.
func (e *Endpoint) Cut() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for c := range e.conns {
		c.Close()
	}
}

// Replica starts a replica of a server and waits until it is connected.
func Replica(t *testing.T, of *Server) *Server {
	t.Helper()
	r := Start(t, "--replicaof", "127.0.0.1 "+strconv.Itoa(of.Port))
	Until(t, 60*time.Second, "the replica", func() error {
		if !strings.Contains(r.Do("INFO", "replication"), "master_link_status:up") {
			return io.ErrNoProgress
		}
		return nil
	})
	return r
}

// Promote kills the server to which an endpoint leads, makes the replica the primary, and leads the endpoint to it. It
// returns a new replica.
func Promote(t *testing.T, e *Endpoint, primary, replica *Server) *Server {
	t.Helper()
	primary.Kill()
	replica.Do("REPLICAOF", "NO", "ONE")
	e.Lead(replica.Addr())
	return Replica(t, replica)
}
