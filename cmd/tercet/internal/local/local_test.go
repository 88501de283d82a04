package local

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// childMode makes the test binary play a `tercet server`: "serve" answers as a node in sync until SIGTERM,
// "refuse" exits as one whose identity was wiped.
const childMode = "LOCAL_TEST_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childMode) {
	case "":
		goleak.VerifyTestMain(m)
	case "serve":
		os.Exit(serve(os.Args[2:]))
	case "refuse":
		fmt.Fprintln(os.Stderr, "some [INFO] line")
		fmt.Fprintln(os.Stderr, "tercet: the data directory of a member is empty")
		fmt.Fprintln(os.Stderr, "a trailing line")
		os.Exit(4)
	}
}

func serve(args []string) int {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	warn := make(chan os.Signal, 1)
	signal.Notify(warn, syscall.SIGUSR1)
	f := flag.NewFlagSet("server", flag.ExitOnError)
	addr := f.String("http", "", "")
	for _, name := range []string{"node-id", "zone", "data", "peer", "peers", "extra"} {
		f.String(name, "", "")
	}
	_ = f.Parse(args) // exits on errors
	mux := http.NewServeMux()
	mux.HandleFunc("/v1/cluster", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"leader":"n2","inSync":["a","b","c"]}`)
	})
	var asked atomic.Int32
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		// As a node that has not read the cluster's tokens yet.
		if n := asked.Add(1); n <= 2 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		if asked.Load() == 3 {
			fmt.Fprintln(os.Stderr, "2026-01-01T00:00:00Z [INFO]  said ready")
		}
	})
	l, err := net.Listen("tcp", "127.0.0.1"+*addr)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Fprintln(os.Stderr, "2026-01-01T00:00:00Z [WARN]  too early "+strings.Join(args, " "))
	go func() { _ = http.Serve(l, mux) }()
	go func() {
		<-warn
		fmt.Fprintln(os.Stderr, "2026-01-01T00:00:00Z [ERROR] tercet.raft.hraft: an election")
		fmt.Fprintln(os.Stderr, "2026-01-01T00:00:00Z [WARN]  a warning")
	}()
	<-signals
	fmt.Fprintln(os.Stderr, "2026-01-01T00:00:00Z [WARN]  too late")
	fmt.Fprintln(os.Stderr, "drained")
	return 0
}

// start starts a cluster of fakes and collects the notices.
func start(t *testing.T, mode string, o Options) (*Cluster, func() string) {
	t.Helper()
	t.Setenv(childMode, mode)
	t.Setenv("TERCET_ZONE", "must not reach the children")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var notices []string
	o.Binary, o.Data = self, t.TempDir()
	o.Notice = func(line string) {
		mu.Lock()
		defer mu.Unlock()
		notices = append(notices, line)
	}
	c, err := Start(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Stop)
	return c, func() string {
		mu.Lock()
		defer mu.Unlock()
		return strings.Join(notices, "\n")
	}
}

func waitInSync(t *testing.T, c *Cluster) Status {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	s, err := c.WaitInSync(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// await waits for a condition.
func await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for timeout := time.After(2 * time.Minute); !holds(); {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func TestStartAndStop(t *testing.T) {
	c, notices := start(t, "serve", Options{Args: func(i int) []string { return []string{"--extra", "x" + strconv.Itoa(i)} }})
	if s := waitInSync(t, c); s.Leader != "n2" {
		t.Errorf("leader %q", s.Leader)
	}
	for _, n := range c.Nodes {
		await(t, n.ID+" to have been ready before the cluster was", func() bool {
			log, err := os.ReadFile(n.LogFile)
			return err == nil && strings.Contains(string(log), "said ready")
		})
	}
	pids := c.Pids()
	if pids[0] == 0 || pids[0] == pids[1] || pids[1] == pids[2] || pids[2] == 0 {
		t.Fatalf("pids %v", pids)
	}
	for i, n := range c.Nodes {
		if pid, err := os.ReadFile(n.PidFile); err != nil || strings.TrimSpace(string(pid)) != strconv.Itoa(pids[i]) {
			t.Errorf("pid file of %s: %q, %v", n.ID, pid, err)
		}
	}
	for i, n := range c.Nodes {
		if err := syscall.Kill(pids[i], syscall.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		await(t, "the warning of "+n.ID, func() bool {
			return strings.Contains(notices(), "["+n.ID+"] 2026-01-01T00:00:00Z [WARN]  a warning")
		})
	}
	c.Stop()
	if strings.Contains(notices(), "too ") || strings.Contains(notices(), "election") {
		t.Errorf("noise on the terminal:\n%s", notices())
	}
	for i, n := range c.Nodes {
		if _, err := os.Stat(n.PidFile); err == nil {
			t.Errorf("the pid file of %s is left", n.ID)
		}
		if syscall.Kill(pids[i], 0) == nil {
			t.Errorf("process %d of %s still runs", pids[i], n.ID)
		}
		log, err := os.ReadFile(n.LogFile)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(log), "drained") {
			t.Errorf("%s was not asked to drain: %q", n.ID, log)
		}
		for _, want := range []string{
			"--node-id " + n.ID, "--zone " + n.Zone, "--extra x" + strconv.Itoa(i),
			"--peers n1=" + c.Nodes[0].Peer + ",n2=" + c.Nodes[1].Peer + ",n3=" + c.Nodes[2].Peer,
		} {
			if !strings.Contains(string(log), want) {
				t.Errorf("%s was not started with %s: %q", n.ID, want, log)
			}
		}
	}
}

func TestRestart(t *testing.T) {
	c, notices := start(t, "serve", Options{Restart: true, RestartAfter: time.Millisecond})
	waitInSync(t, c)
	old := c.Pids()[1]
	if err := syscall.Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, "a new process", func() bool { return c.Pids()[1] != old && c.Pids()[1] != 0 })
	waitInSync(t, c)
	await(t, "the notice", func() bool { return strings.Contains(notices(), "node n2 started again, pid") })
	if !strings.Contains(notices(), "node n2 (zone b) ended: signal: killed") {
		t.Errorf("notices %s", notices())
	}
}

// TestRefusal: a node that refuses to start is not started over and over, and its reason comes through.
func TestRefusal(t *testing.T) {
	c, _ := start(t, "refuse", Options{Restart: true, RestartAfter: time.Millisecond})
	_, err := c.WaitInSync(context.Background())
	var exit *ExitError
	if !errors.As(err, &exit) || exit.Code != 4 || exit.Message != "exit status 4: the data directory of a member is empty" {
		t.Errorf("error %v", err)
	}
	select {
	case err := <-c.Failed():
		if !errors.As(err, &exit) {
			t.Errorf("failed with %v", err)
		}
	default:
		t.Error("Failed says nothing")
	}
}

// TestTakenPort: the error names the flag, whichever node's port it is.
func TestTakenPort(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := l.Addr().(*net.TCPAddr).Port
	for _, c := range []struct {
		flag string
		opts Options
	}{
		{"--http-port", Options{HTTPPort: taken}},
		{"--peer-port", Options{PeerPort: taken}},
		{"--peer-port", Options{PeerPort: taken - 2}},
	} {
		_, err := Start(c.opts)
		var port *PortError
		if !errors.As(err, &port) {
			t.Fatalf("%+v: error %v", c.opts, err)
		}
		// With taken-2 the ports below may be taken too; the flag is the same.
		if port.Flag != c.flag || !strings.Contains(err.Error(), c.flag) {
			t.Errorf("%+v: %v", c.opts, err)
		}
	}
}
