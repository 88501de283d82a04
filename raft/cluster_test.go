package raft

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// testTimeout bounds everything a test waits for. It is a bound for broken code, not an assertion.
const testTimeout = 2 * time.Minute

// cluster is three nodes in one process.
type cluster struct {
	t     *testing.T
	log   hclog.Logger
	addrs map[string]string
	dirs  map[string]string
	tweak func(*Config)

	mu    sync.Mutex
	nodes map[string]*Node
}

var founders = []string{"n1", "n2", "n3"}

// newCluster makes the addresses and directories of a cluster; start starts its nodes. Tests with clusters run beside
// each other: they mostly wait for time-outs.
func newCluster(t *testing.T, tweak func(*Config)) *cluster {
	t.Helper()
	t.Parallel()
	level, out := hclog.Off, io.Discard
	if os.Getenv("TERCET_TEST_LOG") != "" {
		level, out = hclog.Debug, os.Stderr
	}
	c := &cluster{t: t, log: hclog.New(&hclog.LoggerOptions{Output: out, Level: level}),
		addrs: make(map[string]string), dirs: make(map[string]string), nodes: make(map[string]*Node), tweak: tweak}
	for _, name := range founders {
		c.addrs[name] = freeAddr(t)
		c.dirs[name] = filepath.Join(t.TempDir(), name)
	}
	t.Cleanup(func() {
		for _, n := range c.all() {
			_ = n.Close()
		}
	})
	return c
}

// loopbacks counts the loopback addresses in use by this process's tests.
var loopbacks atomic.Uint32

// freeAddr returns an address that stays free while no node listens on it: on a loopback address of its own, so that
// no other test's port and no outgoing connection can take it.
func freeAddr(t testing.TB) string {
	t.Helper()
	n := loopbacks.Add(1)
	l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", 100+os.Getpid()%100, 1+n/200, 1+n%200))
	if err != nil {
		l, err = net.Listen("tcp", "127.0.0.1:0") // a system with one loopback address
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String()
}

// config is the configuration of a founding member.
func (c *cluster) configOf(name string) Config {
	cfg := Config{Name: name, Zone: "zone-" + name, Dir: c.dirs[name], PeerAddr: c.addrs[name], HTTPAddr: "http-" + name,
		WALSegmentSize: 4 << 20, MemoryBudget: 64 << 20, DiskReserve: 1 << 20, Logger: c.log}
	for _, p := range founders {
		cfg.Peers = append(cfg.Peers, Peer{Name: p, Addr: c.addrs[p]})
	}
	if c.tweak != nil {
		c.tweak(&cfg)
	}
	return cfg
}

// start starts the named nodes at the same time.
func (c *cluster) start(names ...string) {
	c.t.Helper()
	var wg sync.WaitGroup
	errList := make([]error, len(names))
	for i, name := range names {
		wg.Go(func() { errList[i] = c.startWith(c.configOf(name)) })
	}
	wg.Wait()
	if err := errors.Join(errList...); err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) startWith(cfg Config) error {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	n, err := Start(ctx, cfg)
	if err != nil {
		return fmt.Errorf("%s: %w", cfg.Name, err)
	}
	c.mu.Lock()
	c.nodes[cfg.Name] = n
	c.mu.Unlock()
	return nil
}

// stop closes a node abruptly: without a drain, as a killed process would go.
func (c *cluster) stop(name string) {
	c.t.Helper()
	c.mu.Lock()
	n := c.nodes[name]
	delete(c.nodes, name)
	c.mu.Unlock()
	if err := n.Close(); err != nil {
		c.t.Errorf("closing %s: %v", name, err)
	}
}

func (c *cluster) node(name string) *Node {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.nodes[name]
}

func (c *cluster) all() []*Node {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []*Node
	for _, n := range c.nodes {
		out = append(out, n)
	}
	return out
}

// eventually waits until ok holds.
func (c *cluster) eventually(what string, ok func() bool) {
	c.t.Helper()
	deadline := time.After(testTimeout)
	for !ok() {
		select {
		case <-deadline:
			for _, n := range c.all() {
				c.t.Logf("%s: %+v", n.cfg.Name, n.Status())
			}
			if file := os.Getenv("TERCET_TEST_STACKS"); file != "" {
				buf := make([]byte, 16<<20)
				_ = os.WriteFile(file, buf[:runtime.Stack(buf, true)], 0o600)
			}
			c.t.Fatalf("waited %v for: %s", testTimeout, what)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// poll waits until ok holds.
func poll(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(testTimeout)
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("waited %v for: %s", testTimeout, what)
		case <-time.After(time.Millisecond):
		}
	}
}

// leader waits for a leader that is open for service and known to all running nodes, and returns its name.
func (c *cluster) leader() string {
	c.t.Helper()
	var name string
	c.eventually("a leader", func() bool {
		name = ""
		for _, n := range c.all() {
			if n.Ready() != nil {
				return false
			}
			s := n.Status()
			if s.Leader == "" || name != "" && s.Leader != name {
				return false
			}
			name = s.Leader
		}
		l := c.node(name)
		return l != nil && l.openTerm.Load() != 0
	})
	return name
}

// follower returns the name of a running node that does not lead.
func (c *cluster) follower() string {
	c.t.Helper()
	lead := c.leader()
	for _, name := range founders {
		if name != lead && c.node(name) != nil {
			return name
		}
	}
	c.t.Fatal("no follower runs")
	return ""
}

// inSync waits until the in-sync set has that many zones on every running node.
func (c *cluster) inSync(zones int) {
	c.t.Helper()
	c.eventually(fmt.Sprintf("%d zones in sync", zones), func() bool {
		for _, n := range c.all() {
			if len(n.Status().InSync) != zones {
				return false
			}
		}
		return true
	})
}

// agree waits until all running nodes have applied the same index, and compares their states.
func (c *cluster) agree() {
	c.t.Helper()
	c.eventually("equal applied indexes and states", func() bool {
		var index, hash uint64
		for i, n := range c.all() {
			ni, nh, err := n.eng.FullHash()
			if err != nil {
				c.t.Fatal(err)
			}
			if i > 0 && ni == index && nh != hash {
				c.t.Fatalf("at entry %d the state of %s differs", ni, n.cfg.Name)
			}
			if i > 0 && ni != index {
				return false
			}
			index, hash = ni, nh
		}
		return true
	})
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	t.Cleanup(cancel)
	return ctx
}

// publishCommand makes a publish of one message for each body.
func publishCommand(topic string, bodies ...string) []byte {
	p := &engine.Publish{Topic: topic}
	for _, b := range bodies {
		p.Messages = append(p.Messages, engine.NewMessage{ContentType: "text/plain", Retention: time.Hour, Body: []byte(b)})
	}
	return p.AppendTo(nil)
}

func receiveCommand(topic, group string, limit int) []byte {
	r := &engine.Receive{Topic: topic, Group: group, Max: limit, Visibility: time.Minute}
	return r.AppendTo(nil)
}

func ackCommand(topic, group string, ds ...engine.Delivery) []byte {
	s := &engine.Settle{Topic: topic, Group: group, Op: engine.Acknowledge}
	for _, d := range ds {
		s.Receipts = append(s.Receipts, d.Receipt)
	}
	return s.AppendTo(nil)
}

// must proposes and fails the test on anything but success.
func must(t *testing.T, n *Node, p Proposal) Reply {
	t.Helper()
	r, err := n.Propose(testContext(t), p)
	if err != nil {
		t.Fatalf("proposing through %s: %v", n.cfg.Name, err)
	}
	if r.Code != errs.OK {
		t.Fatalf("proposing through %s: %v", n.cfg.Name, r.Code)
	}
	return r
}
