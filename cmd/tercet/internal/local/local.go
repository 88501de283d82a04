// Package local runs a three-node cluster on this machine: one child process of a tercet binary per zone. It
// is what `tercet dev` and `tercet bench` stand on.
package local

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"tercet.dev/tercet/server"
)

const (
	// restartAfterDefault is how long a child that died stays away: long enough to watch the other two go on
	// without it.
	restartAfterDefault = 2 * time.Second
	// stopPatience bounds the drain of all children; what still runs then is killed, which loses nothing.
	stopPatience = 15 * time.Second
	// lastStopPatience bounds the drain of the last node alone.
	lastStopPatience = 500 * time.Millisecond
	// pollEvery is the pace of the readiness poll.
	pollEvery = 50 * time.Millisecond
)

// zones are the zones of the nodes n1, n2, n3.
var zones = [3]string{"a", "b", "c"}

// Options say how to run the cluster.
type Options struct {
	// Binary is the tercet to start.
	Binary string
	// Data holds a directory and a log file per node.
	Data string
	// Env is added to the nodes' environment: settings that do not belong on a command line.
	Env []string
	// HTTPPort and PeerPort are those of the first node; the others count up. 0 picks free ports.
	HTTPPort, PeerPort int
	// ValkeyPort is that of the first node; 0 opens no such port.
	ValkeyPort int
	// Args returns further arguments of node i's `tercet server`; it is called again for a restart.
	Args func(i int) []string
	// Restart starts a child again that died, after RestartAfter (default 2 s).
	Restart      bool
	RestartAfter time.Duration
	// Notice receives one line per event that a person should see.
	Notice func(line string)
}

// Node is one node of the cluster.
type Node struct {
	ID, Zone string
	// HTTP is the base URL, Peer the node-to-node address, LogFile where the node's log goes. PidFile holds the
	// id of the node's present process.
	HTTP, Peer, LogFile, PidFile string

	// Valkey is the address for Valkey clients, empty for none.
	Valkey string

	httpPort, peerPort, valkeyPort int
}

// Cluster is a running local cluster.
type Cluster struct {
	Nodes [3]Node

	opts     Options
	stopping chan struct{}
	stopOnce sync.Once
	// closeOnce closes stopping.
	closeOnce sync.Once
	// failed receives the first reason why the cluster cannot go on.
	failed chan error
	spawns chan spawn
	done   sync.WaitGroup
	// formed is set once all zones have been in sync.
	formed atomic.Bool

	mu struct {
		sync.Mutex
		processes [3]*os.Process
	}
}

// spawn asks the starter for a child process.
type spawn struct {
	cmd    *exec.Cmd
	result chan error
}

// ExitError is a child that ended for a reason that starting it again cannot cure.
type ExitError struct {
	Node string
	Code int
	// Message says how the child ended, and why where it said so.
	Message string
}

// Error implements error.
func (e *ExitError) Error() string {
	return fmt.Sprintf("node %s: %s", e.Node, e.Message)
}

// PortError is a port that something else listens on.
type PortError struct {
	// Flag is the flag that says which ports to use, First its value.
	Flag  string
	First int
	Port  int
	Node  string
	Cause error
}

// Error implements error.
func (e *PortError) Error() string {
	return fmt.Sprintf("port %d for node %s is taken; choose others with %s (now %d, nodes 2 and 3 count up): %v",
		e.Port, e.Node, e.Flag, e.First, e.Cause)
}

// Unwrap returns the cause.
func (e *PortError) Unwrap() error { return e.Cause }

// Start starts the three processes. They keep running until Stop.
func Start(opts Options) (*Cluster, error) {
	if opts.RestartAfter == 0 {
		opts.RestartAfter = restartAfterDefault
	}
	c := &Cluster{opts: opts, stopping: make(chan struct{}), failed: make(chan error, 1), spawns: make(chan spawn)}
	if err := c.choosePorts(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(opts.Data, 0o700); err != nil {
		return nil, err
	}
	c.done.Add(1)
	go c.starter()
	for i := range c.Nodes {
		if err := c.startNode(i); err != nil {
			c.Stop()
			return nil, err
		}
	}
	return c, nil
}

// choosePorts fills in the nodes and makes sure that nobody listens on their ports.
func (c *Cluster) choosePorts() error {
	var free []net.Listener
	defer func() {
		for _, l := range free {
			l.Close()
		}
	}()
	choose := func(flag string, first, i int) (int, error) {
		port := first
		if first != 0 {
			port += i
		}
		ls, err := server.Listen(context.Background(), net.JoinHostPort("", strconv.Itoa(port)))
		if err != nil {
			return 0, &PortError{flag, first, port, nodeID(i), err}
		}
		free = append(free, ls...)
		return ls[0].Addr().(*net.TCPAddr).Port, nil
	}
	for i := range c.Nodes {
		httpPort, err := choose("--http-port", c.opts.HTTPPort, i)
		if err != nil {
			return err
		}
		peerPort, err := choose("--peer-port", c.opts.PeerPort, i)
		if err != nil {
			return err
		}
		valkeyPort, valkey := 0, ""
		if c.opts.ValkeyPort != 0 {
			if valkeyPort, err = choose("--valkey-port", c.opts.ValkeyPort, i); err != nil {
				return err
			}
			valkey = fmt.Sprintf("127.0.0.1:%d", valkeyPort)
		}
		id := nodeID(i)
		c.Nodes[i] = Node{
			ID: id, Zone: zones[i],
			HTTP:     fmt.Sprintf("http://127.0.0.1:%d", httpPort),
			Peer:     fmt.Sprintf("127.0.0.1:%d", peerPort),
			LogFile:  filepath.Join(c.opts.Data, id+".log"),
			PidFile:  filepath.Join(c.opts.Data, id+".pid"),
			Valkey:   valkey,
			httpPort: httpPort, peerPort: peerPort, valkeyPort: valkeyPort,
		}
	}
	return nil
}

func nodeID(i int) string { return "n" + strconv.Itoa(i+1) }

// arguments is the command line of node i.
func (c *Cluster) arguments(i int) []string {
	peers := make([]string, len(c.Nodes))
	for j, n := range c.Nodes {
		peers[j] = n.ID + "=" + n.Peer
	}
	n := c.Nodes[i]
	args := []string{
		"server", "--node-id", n.ID, "--zone", n.Zone,
		"--data", filepath.Join(c.opts.Data, n.ID),
		"--http", ":" + strconv.Itoa(n.httpPort),
		"--peer", ":" + strconv.Itoa(n.peerPort),
		"--peers", strings.Join(peers, ","),
	}
	if n.valkeyPort != 0 {
		args = append(args, "--valkey", ":"+strconv.Itoa(n.valkeyPort))
	}
	if c.opts.Args != nil {
		args = append(args, c.opts.Args(i)...)
	}
	return args
}

// starter starts all children from one thread that lives as long as the process: the kernel ties a child's
// death signal to the thread that made it.
func (c *Cluster) starter() {
	defer c.done.Done()
	runtime.LockOSThread()
	for {
		select {
		case s := <-c.spawns:
			s.result <- s.cmd.Start()
		case <-c.stopping:
			// Not unlocked, and not before the children have ended: ending this goroutine ends its thread.
			c.waitForProcesses()
			return
		}
	}
}

// startNode starts node i and the goroutine that minds it.
func (c *Cluster) startNode(i int) error {
	n := c.Nodes[i]
	log, err := os.OpenFile(n.LogFile, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	cmd := exec.Command(c.opts.Binary, c.arguments(i)...)
	cmd.Env = append(environment(), c.opts.Env...)
	cmd.SysProcAttr = childAttributes()
	pipe, err := cmd.StderrPipe()
	if err != nil {
		log.Close()
		return err
	}
	s := spawn{cmd, make(chan error, 1)}
	select {
	case c.spawns <- s:
		err = <-s.result
	case <-c.stopping:
		err = errStopping
	}
	if err != nil {
		log.Close()
		return err
	}
	c.mu.Lock()
	c.mu.processes[i] = cmd.Process
	c.mu.Unlock()
	if err := os.WriteFile(n.PidFile, []byte(strconv.Itoa(cmd.Process.Pid)+"\n"), 0o600); err != nil {
		c.notice("node %s: %v", n.ID, err)
	}
	// A Stop that came in between has not seen this child.
	select {
	case <-c.stopping:
		_ = cmd.Process.Signal(syscall.SIGTERM)
	default:
	}
	c.done.Add(1)
	go c.mind(i, cmd, pipe, log)
	return nil
}

var errStopping = errors.New("the cluster is being stopped")

// environment is that of the children: ours without the settings, which are meant for this process.
func environment() []string {
	var env []string
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "TERCET_") {
			env = append(env, v)
		}
	}
	return env
}

// mind copies a child's log, waits for its end, and starts it again.
func (c *Cluster) mind(i int, cmd *exec.Cmd, pipe io.Reader, log *os.File) {
	defer c.done.Done()
	n := c.Nodes[i]
	last := c.copyLog(n, pipe, log)
	err := cmd.Wait()
	log.Close()
	c.mu.Lock()
	c.mu.processes[i] = nil
	c.mu.Unlock()
	os.Remove(n.PidFile)
	select {
	case <-c.stopping:
		return
	default:
	}
	reason := "exit status 0"
	if err != nil {
		reason = err.Error()
	}
	if strings.HasPrefix(last, "tercet: ") {
		reason += ": " + strings.TrimPrefix(last, "tercet: ")
	}
	// A node that ends by itself before the cluster has ever been whole, or that refuses to start, would do so
	// again.
	code := cmd.ProcessState.ExitCode()
	if code == 2 || code == 4 || code > 0 && !c.formed.Load() || !c.opts.Restart {
		c.fail(&ExitError{Node: n.ID, Code: code, Message: reason})
		return
	}
	c.notice("node %s (zone %s) ended: %s; starting it again in %s", n.ID, n.Zone, reason, c.opts.RestartAfter)
	select {
	case <-time.After(c.opts.RestartAfter):
	case <-c.stopping:
		return
	}
	if err := c.startNode(i); err != nil {
		if !errors.Is(err, errStopping) {
			c.fail(fmt.Errorf("start node %s again: %w", n.ID, err))
		}
		return
	}
	c.notice("node %s started again, pid %d", n.ID, c.Pids()[i])
}

// copyLog writes the child's log to its file and shows warnings. It returns the last line.
func (c *Cluster) copyLog(n Node, pipe io.Reader, log io.Writer) string {
	last := ""
	r := bufio.NewReaderSize(pipe, 64<<10)
	for {
		line, err := r.ReadBytes('\n')
		if len(line) > 0 {
			_, _ = log.Write(line) // a full disk must not stop the node's log from being drained
			text := string(bytes.TrimRight(line, "\n"))
			if strings.HasPrefix(text, "tercet: ") || last == "" || !strings.HasPrefix(last, "tercet: ") {
				last = text
			}
			if c.alarming(text) && c.opts.Notice != nil {
				c.opts.Notice("[" + n.ID + "] " + text)
			}
		}
		if err != nil {
			return last
		}
	}
}

// alarming tells lines that belong on the terminal: crashes, and warnings that are none of the ordinary course of things.
// While nodes come and go together they miss each other, and elections are what a killed node is followed by; the log
// files have it all.
func (c *Cluster) alarming(line string) bool {
	if strings.HasPrefix(line, "panic:") || strings.HasPrefix(line, "fatal error:") {
		return true
	}
	select {
	case <-c.stopping:
		return false
	default:
	}
	if !c.formed.Load() || strings.Contains(line, "tercet.raft.hraft: ") {
		return false
	}
	for _, mark := range []string{"[WARN]", "[ERROR]", `"@level":"warn"`, `"@level":"error"`} {
		if strings.Contains(line, mark) {
			return true
		}
	}
	return false
}

func (c *Cluster) notice(format string, args ...any) {
	if c.opts.Notice != nil {
		c.opts.Notice(fmt.Sprintf(format, args...))
	}
}

func (c *Cluster) fail(err error) {
	select {
	case c.failed <- err:
	default:
	}
}

// Failed delivers the reason when the cluster cannot go on by itself.
func (c *Cluster) Failed() <-chan error { return c.failed }

// Pids returns the nodes' process ids, 0 for one that is away.
func (c *Cluster) Pids() [3]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	var pids [3]int
	for i, p := range c.mu.processes {
		if p != nil {
			pids[i] = p.Pid
		}
	}
	return pids
}

// Status is what the cluster document says, as far as it matters here.
type Status struct {
	Leader string   `json:"leader"`
	InSync []string `json:"inSync"`
}

// WaitInSync waits until a leader is known, all three zones are in sync, and every node is ready: one that has just
// started still refuses what it cannot judge yet.
func (c *Cluster) WaitInSync(ctx context.Context) (Status, error) {
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for {
		s, err := status(ctx, client, c.Nodes[0].HTTP)
		if err == nil && s.Leader != "" && len(s.InSync) == len(c.Nodes) && c.ready(ctx, client) {
			c.formed.Store(true)
			return s, nil
		}
		select {
		case <-ctx.Done():
			return s, fmt.Errorf("the zones did not come in sync (now: %v): %w", s.InSync, context.Cause(ctx))
		case err := <-c.failed:
			c.fail(err) // for Failed, too
			return s, err
		case <-time.After(pollEvery):
		}
	}
}

// ready reports whether every node says that it is.
func (c *Cluster) ready(ctx context.Context, client *http.Client) bool {
	for _, n := range c.Nodes {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, n.HTTP+"/readyz", nil)
		if err != nil {
			return false
		}
		resp, err := client.Do(req)
		if err != nil {
			return false
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return false
		}
	}
	return true
}

func status(ctx context.Context, client *http.Client, base string) (Status, error) {
	var s Status
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/v1/cluster", nil)
	if err != nil {
		return s, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return s, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return s, fmt.Errorf("GET /v1/cluster: %s", resp.Status)
	}
	return s, json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&s)
}

// Stop drains and ends the processes one after the other and waits for them. It may be called more than once.
func (c *Cluster) Stop() { c.stopOnce.Do(c.stop) }

func (c *Cluster) stop() {
	c.closeOnce.Do(func() { close(c.stopping) })
	tick := time.NewTicker(pollEvery / 5)
	defer tick.Stop()
	patience := time.After(stopPatience)
	// One by one: a node hands over to those that are left. The last one has nobody to hand over to, and would only
	// find that out; told twice, it goes at once.
	for i := len(c.Nodes) - 1; i >= 0; i-- {
		c.signal(syscall.SIGTERM, i)
		var lastPatience <-chan time.Time
		if i == 0 {
			lastPatience = time.After(lastStopPatience)
		}
		for c.Pids()[i] != 0 {
			select {
			case <-tick.C:
			case <-lastPatience:
				c.signal(syscall.SIGTERM, i)
			case <-patience:
				c.notice("some nodes did not stop within %s and are killed; nothing is lost by that", stopPatience)
				c.Kill()
			}
		}
	}
	c.done.Wait()
}

// Kill ends all processes at once. Stop then waits for them.
func (c *Cluster) Kill() {
	c.closeOnce.Do(func() { close(c.stopping) })
	c.signal(syscall.SIGKILL, 0, 1, 2)
}

// signal sends a signal to those of the nodes that run.
func (c *Cluster) signal(s os.Signal, nodes ...int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, i := range nodes {
		if p := c.mu.processes[i]; p != nil {
			_ = p.Signal(s) // it may have ended by itself
		}
	}
}

// waitForProcesses returns when no child runs any more.
func (c *Cluster) waitForProcesses() {
	for {
		if c.Pids() == [3]int{} {
			return
		}
		time.Sleep(pollEvery)
	}
}
