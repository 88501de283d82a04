package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Options say what cluster to start. The zero value is three nodes with the product's defaults.
type Options struct {
	// Nodes is their number (default 3), in zones a, b, c…
	Nodes int
	// Args are further arguments of every `tercet server`.
	Args []string
	// NodeArgs returns further arguments of one node; nil for none.
	NodeArgs func(id string) []string
	// DataDir returns a node's data directory; nil for one below the cluster's own.
	DataDir func(id string) string
	// Wrap returns what one node's command line begins with; nil for nothing. What it names has to become the node.
	Wrap func(id string) []string
	// TLS is spoken on the HTTP and Valkey ports with the server's certificate of these; nil for none. That clients have to
	// have certificates as well is up to Args.
	TLS *Certificates
}

// A Cluster is a set of nodes that were started with the same list of peers.
type Cluster struct {
	// TB is the test that started it.
	TB testing.TB
	// Dir holds the nodes' data directories and logs.
	Dir   string
	Nodes []*Node

	opts   Options
	binary string
	http   *http.Client
}

// A Node is one member: a data directory, addresses, and at most one process at a time.
type Node struct {
	ID, Zone string
	// Data is its data directory, Log the file its processes print into.
	Data, Log string
	// HTTP, Peer and Valkey are its addresses, host:port.
	HTTP, Peer, Valkey string

	c  *Cluster
	mu sync.Mutex
	// proc is the newest process, nil before the first Start.
	proc   *Process
	paused bool
}

// NodeStatus is what GET /v1/node answers.
type NodeStatus struct {
	ID           string          `json:"id"`
	Zone         string          `json:"zone"`
	Role         string          `json:"role"`
	Incarnation  string          `json:"incarnation"`
	AppliedIndex uint64          `json:"appliedIndex"`
	StateHash    json.RawMessage `json:"stateHash"`
	Version      string          `json:"version"`
}

// ClusterStatus is what GET /v1/cluster answers.
type ClusterStatus struct {
	ClusterID  string   `json:"clusterId"`
	Term       uint64   `json:"term"`
	Leader     string   `json:"leader"`
	Durability string   `json:"durability"`
	InSync     []string `json:"inSync"`
	Nodes      []Member `json:"nodes"`
}

// Member is a node as GET /v1/cluster lists it.
type Member struct {
	ID         string `json:"id"`
	Zone       string `json:"zone"`
	HTTP       string `json:"http"`
	Peer       string `json:"peer"`
	Valkey     string `json:"valkey"`
	Role       string `json:"role"`
	InSync     bool   `json:"inSync"`
	MatchIndex uint64 `json:"matchIndex"`
}

// New makes a cluster without starting a process.
func New(tb testing.TB, opts Options) *Cluster {
	tb.Helper()
	if opts.Nodes == 0 {
		opts.Nodes = 3
	}
	dir, err := os.MkdirTemp("", "tercet-"+strings.Map(fileName, tb.Name())+"-")
	if err != nil {
		tb.Fatal(err)
	}
	transport := &http.Transport{DisableKeepAlives: true}
	if opts.TLS != nil {
		transport.TLSClientConfig = opts.TLS.Client
	}
	c := &Cluster{TB: tb, Dir: dir, opts: opts, binary: Binary(tb), http: &http.Client{Transport: transport}}
	// Registered before any process's own clean-up, so it runs after them.
	tb.Cleanup(func() {
		c.scanLogs()
		if tb.Failed() {
			c.printLogs()
			if os.Getenv(envKeep) == "1" {
				tb.Logf("kept %s", dir)
				return
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			tb.Errorf("remove %s: %v", dir, err)
		}
	})
	for i := range opts.Nodes {
		id := fmt.Sprintf("n%d", i+1)
		n := &Node{
			ID: id, Zone: string(rune('a' + i)),
			Data: filepath.Join(dir, id), Log: filepath.Join(dir, id+".log"),
			HTTP: FreeAddr(tb), Peer: FreeAddr(tb), Valkey: FreeAddr(tb),
			c: c,
		}
		if opts.DataDir != nil {
			n.Data = opts.DataDir(id)
		}
		c.Nodes = append(c.Nodes, n)
	}
	return c
}

// Start makes a cluster, starts all nodes, and waits until every zone is in sync.
func Start(tb testing.TB, opts Options) *Cluster {
	tb.Helper()
	c := New(tb, opts)
	start := time.Now()
	for _, n := range c.Nodes {
		n.Start()
	}
	c.WaitInSync(c.Zones()...)
	tb.Logf("%d nodes in sync after %v", len(c.Nodes), time.Since(start).Round(time.Millisecond))
	return c
}

func fileName(r rune) rune {
	if r == '/' || r == ' ' {
		return '-'
	}
	return r
}

// scanLogs fails the test when a node has panicked or, built with the race detector, found a race.
func (c *Cluster) scanLogs() {
	for _, n := range c.Nodes {
		log, err := os.ReadFile(n.Log)
		if err != nil {
			continue // never started
		}
		for _, bad := range []string{"WARNING: DATA RACE", "\npanic: ", "\nfatal error: "} {
			if at := bytes.Index(log, []byte(bad)); at >= 0 {
				c.TB.Errorf("%s:\n%s", n.ID, log[at:min(len(log), at+6000)])
			}
		}
	}
}

// printLogs shows the end of each node's log.
func (c *Cluster) printLogs() {
	for _, n := range c.Nodes {
		if _, err := os.Stat(n.Log); err != nil {
			continue
		}
		c.TB.Logf("end of %s's log:\n%s", n.ID, tail(n.Log, 60))
	}
}

// Zones returns the zones of all nodes.
func (c *Cluster) Zones() []string {
	var zones []string
	for _, n := range c.Nodes {
		zones = append(zones, n.Zone)
	}
	return zones
}

// Node returns the node of this name.
func (c *Cluster) Node(id string) *Node {
	for _, n := range c.Nodes {
		if n.ID == id {
			return n
		}
	}
	c.TB.Fatalf("no node %q", id)
	return nil
}

// Peers is the value of --peers.
func (c *Cluster) Peers() string {
	var peers []string
	for _, n := range c.Nodes {
		peers = append(peers, n.ID+"="+n.Peer)
	}
	return strings.Join(peers, ",")
}

// Arguments is the node's command line without the program, and without what says whom to form a cluster with.
func (n *Node) Arguments() []string {
	args := []string{"server", "--node-id", n.ID, "--zone", n.Zone, "--data", n.Data,
		"--http", n.HTTP, "--peer", n.Peer, "--valkey", n.Valkey}
	if c := n.c.opts.TLS; c != nil {
		args = append(args, "--tls-cert", c.ServerCert, "--tls-key", c.ServerKey)
	}
	args = append(args, n.c.opts.Args...)
	if n.c.opts.NodeArgs != nil {
		args = append(args, n.c.opts.NodeArgs(n.ID)...)
	}
	return args
}

// Start starts the node's process. It does not wait for it to become ready.
func (n *Node) Start() { n.c.TB.Helper(); n.StartWith("--peers", n.c.Peers()) }

// StartWith starts the node's process with these arguments instead of --peers.
func (n *Node) StartWith(args ...string) {
	n.c.TB.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.proc != nil && n.proc.Alive() {
		n.c.TB.Fatalf("%s runs already", n.ID)
	}
	var argv []string
	if n.c.opts.Wrap != nil {
		argv = append(argv, n.c.opts.Wrap(n.ID)...)
	}
	argv = append(append(argv, n.c.binary), n.Arguments()...)
	n.proc = StartProcess(n.c.TB, n.Log, n.c.Dir, nil, append(argv, args...)...)
	n.paused = false
}

// Process returns the node's newest process.
func (n *Node) Process() *Process {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.proc
}

// Alive reports whether the node's process runs and is not paused.
func (n *Node) Alive() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.proc != nil && n.proc.Alive() && !n.paused
}

// Kill ends the node with SIGKILL.
func (n *Node) Kill() { n.Process().Kill() }

// Stop sends SIGTERM, waits until the node has ended, and fails the test unless it exits with 0.
func (n *Node) Stop() {
	n.c.TB.Helper()
	start := time.Now()
	n.signal(syscall.SIGTERM)
	code, err := n.Process().WaitExit(30 * time.Second)
	if err != nil {
		n.c.TB.Fatalf("%s after SIGTERM: %v", n.ID, err)
	}
	if code != 0 {
		n.c.TB.Errorf("%s exits with %d after SIGTERM, want 0", n.ID, code)
	}
	n.c.TB.Logf("%s drained and stopped in %v", n.ID, time.Since(start).Round(time.Millisecond))
}

// Pause stops the node's process with SIGSTOP, Resume lets it go on.
func (n *Node) Pause() {
	n.c.TB.Helper()
	n.signal(syscall.SIGSTOP)
	n.mu.Lock()
	n.paused = true
	n.mu.Unlock()
}

// Resume lets a paused node go on.
func (n *Node) Resume() {
	n.c.TB.Helper()
	n.signal(syscall.SIGCONT)
	n.mu.Lock()
	n.paused = false
	n.mu.Unlock()
}

func (n *Node) signal(sig syscall.Signal) {
	n.c.TB.Helper()
	if err := n.Process().Signal(sig); err != nil {
		n.c.TB.Fatalf("signal %v to %s: %v", sig, n.ID, err)
	}
}

// Wipe removes everything in the stopped node's data directory.
func (n *Node) Wipe() {
	n.c.TB.Helper()
	if n.Process() != nil && n.Process().Alive() {
		n.c.TB.Fatalf("%s still runs", n.ID)
	}
	entries, err := os.ReadDir(n.Data)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // a node that was killed early has none
		n.c.TB.Fatal(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(n.Data, e.Name())); err != nil {
			n.c.TB.Fatal(err)
		}
	}
}

// DataBytes returns how much the node's data directory occupies.
func (n *Node) DataBytes() int64 {
	var total int64
	_ = filepath.WalkDir(n.Data, func(_ string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil // a file that was removed meanwhile
		}
		if info, err := d.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				total += st.Blocks * 512
			}
		}
		return nil
	})
	return total
}

// URL is the base of the node's HTTP surface.
func (n *Node) URL() string {
	if n.c.opts.TLS != nil {
		return "https://" + n.HTTP
	}
	return "http://" + n.HTTP
}

// get decodes the answer of a GET into out, which may be nil. Any status but 200 is an error.
func (n *Node) get(path string, out any) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, n.URL()+path, nil)
	if err != nil {
		return err
	}
	resp, err := n.c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var body bytes.Buffer
	if _, err := body.ReadFrom(resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s: %s", n.ID, path, resp.Status, bytes.TrimSpace(body.Bytes()))
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(body.Bytes(), out)
}

// Status asks the node about itself.
func (n *Node) Status() (NodeStatus, error) {
	var s NodeStatus
	err := n.get("/v1/node", &s)
	return s, err
}

// Cluster asks the node about the cluster.
func (n *Node) Cluster() (ClusterStatus, error) {
	var s ClusterStatus
	err := n.get("/v1/cluster", &s)
	return s, err
}

// Ready asks /readyz.
func (n *Node) Ready() error { return n.get("/readyz", nil) }

// Live asks /livez.
func (n *Node) Live() error { return n.get("/livez", nil) }

// Metrics returns /metrics as text.
func (n *Node) Metrics() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, n.URL()+"/metrics", nil)
	if err != nil {
		return "", err
	}
	resp, err := n.c.http.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var body bytes.Buffer
	_, err = body.ReadFrom(resp.Body)
	return body.String(), err
}

// WaitReady waits until the node answers /readyz with 200, and fails the test if its process ends instead.
func (n *Node) WaitReady() {
	n.c.TB.Helper()
	Until(n.c.TB, 20*time.Second, n.ID+" to be ready", func() error {
		if !n.Process().Alive() {
			code, _ := n.Process().WaitExit(0)
			n.c.TB.Fatalf("%s ended with %d:\n%s", n.ID, code, tail(n.Log, 20))
		}
		return n.Ready()
	})
}

// Up returns the nodes whose processes run.
func (c *Cluster) Up() []*Node {
	var up []*Node
	for _, n := range c.Nodes {
		if n.Alive() {
			up = append(up, n)
		}
	}
	return up
}

// FindLeader returns the leader if all running nodes name the same one in the same term and it says so itself.
func (c *Cluster) FindLeader() (*Node, error) {
	var (
		name string
		term uint64
	)
	up := c.Up()
	if len(up) == 0 {
		return nil, errors.New("no node runs")
	}
	for i, n := range up {
		s, err := n.Cluster()
		switch {
		case err != nil:
			return nil, err
		case s.Leader == "":
			return nil, fmt.Errorf("%s knows no leader", n.ID)
		case i > 0 && (s.Leader != name || s.Term != term):
			return nil, fmt.Errorf("%s says leader %s in term %d, %s says %s in %d", up[0].ID, name, term, n.ID, s.Leader, s.Term)
		}
		name, term = s.Leader, s.Term
	}
	for _, n := range up {
		if n.ID != name {
			continue
		}
		s, err := n.Status()
		if err == nil && s.Role != "leader" {
			err = fmt.Errorf("%s is named leader and calls itself %s", n.ID, s.Role)
		}
		return n, err
	}
	return nil, fmt.Errorf("leader %s does not run", name)
}

// Leader waits until the running nodes agree on a leader and returns it.
func (c *Cluster) Leader() *Node {
	c.TB.Helper()
	var leader *Node
	Until(c.TB, 20*time.Second, "a leader that all running nodes name", func() (err error) {
		leader, err = c.FindLeader()
		return err
	})
	return leader
}

// Followers returns the running nodes that are not the leader, and the leader.
func (c *Cluster) Followers() (followers []*Node, leader *Node) {
	c.TB.Helper()
	leader = c.Leader()
	for _, n := range c.Up() {
		if n != leader {
			followers = append(followers, n)
		}
	}
	return followers, leader
}

// WaitInSync waits until every running node is ready and reports exactly these zones as in sync. A node that has
// ended by itself fails the test.
func (c *Cluster) WaitInSync(zones ...string) {
	c.TB.Helper()
	want := slices.Sorted(slices.Values(zones))
	Until(c.TB, 30*time.Second, fmt.Sprintf("zones %v to be in sync", want), func() error {
		for _, n := range c.Nodes {
			if p := n.Process(); p != nil && !p.Alive() {
				if code, err := p.WaitExit(0); err == nil && code > 0 {
					c.TB.Fatalf("%s has ended with %d:\n%s", n.ID, code, tail(n.Log, 5))
				}
			}
		}
		for _, n := range c.Up() {
			if err := n.Ready(); err != nil {
				return err
			}
			s, err := n.Cluster()
			if err != nil {
				return err
			}
			if got := slices.Sorted(slices.Values(s.InSync)); !slices.Equal(got, want) {
				return fmt.Errorf("%s reports %v", n.ID, got)
			}
		}
		if len(c.Up()) == 0 {
			return errors.New("no node runs")
		}
		_, err := c.FindLeader()
		return err
	})
}

// EqualHashes waits until all running nodes report the same applied index and fails the test unless they report
// the same state hash there (S12).
func (c *Cluster) EqualHashes() {
	c.TB.Helper()
	var all []NodeStatus
	Until(c.TB, 20*time.Second, "equal applied indexes", func() error {
		all = all[:0]
		for _, n := range c.Up() {
			s, err := n.Status()
			if err != nil {
				return err
			}
			all = append(all, s)
			if s.AppliedIndex != all[0].AppliedIndex {
				return fmt.Errorf("%s is at %d, %s at %d", all[0].ID, all[0].AppliedIndex, s.ID, s.AppliedIndex)
			}
		}
		return nil
	})
	if len(all) == 0 {
		c.TB.Fatal("no node runs")
	}
	for _, s := range all {
		if len(s.StateHash) == 0 || string(s.StateHash) == `""` || string(s.StateHash) == "0" {
			c.TB.Errorf("%s reports no state hash", s.ID)
		}
		if !bytes.Equal(s.StateHash, all[0].StateHash) {
			c.TB.Errorf("at index %d the states differ: %s has %s, %s has %s", s.AppliedIndex, all[0].ID, all[0].StateHash, s.ID, s.StateHash)
		}
	}
	c.TB.Logf("state hash of %d nodes at index %d: %s", len(all), all[0].AppliedIndex, all[0].StateHash)
}
