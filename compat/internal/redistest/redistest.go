// Package redistest runs real redis-servers for tests.
package redistest

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"
)

// Server is a real redis-server.
type Server struct {
	t    *testing.T
	Port int
	Dir  string
	Args []string
	cmd  *exec.Cmd
	TLS  bool
}

// New prepares a server on a free port; Run starts it.
func New(t *testing.T, args ...string) *Server {
	return &Server{t: t, Port: FreePort(t), Dir: t.TempDir(), Args: args}
}

// Start starts a redis-server on a free port of the loopback and waits until it answers.
func Start(t *testing.T, args ...string) *Server {
	t.Helper()
	r := New(t, args...)
	r.Run()
	t.Cleanup(r.Kill)
	return r
}

// FreePort returns a port that was free a moment ago, with room for a cluster's bus above it.
func FreePort(t *testing.T) int {
	t.Helper()
	for {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		l.Close()
		if port < 55000 { // a cluster's bus is 10000 above
			return port
		}
	}
}

// Addr is the server's host:port.
func (r *Server) Addr() string { return fmt.Sprintf("127.0.0.1:%d", r.Port) }

// Run starts the server and waits until it answers.
func (r *Server) Run() {
	r.t.Helper()
	path, err := exec.LookPath("redis-server")
	if err != nil {
		r.t.Fatal("redis-server is needed: apt-get install redis-server")
	}
	port := []string{"--port", fmt.Sprint(r.Port)}
	if r.TLS {
		port = []string{"--port", "0", "--tls-port", fmt.Sprint(r.Port)}
	}
	args := append(port, "--bind", "127.0.0.1", "--dir", r.Dir, "--save", "", "--daemonize", "no", "--logfile", filepath.Join(r.Dir, "log"),
		"--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")
	r.cmd = exec.Command(path, append(args, r.Args...)...)
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	Until(r.t, 20*time.Second, "redis-server on "+r.Addr(), func() error {
		c, err := net.Dial("tcp", r.Addr())
		if err != nil {
			return err
		}
		defer c.Close()
		if r.TLS {
			return nil
		}
		c.SetDeadline(time.Now().Add(time.Second))
		fmt.Fprint(c, "PING\r\n")
		answer := make([]byte, 64)
		n, err := c.Read(answer)
		if err != nil || !strings.HasPrefix(string(answer[:n]), "+PONG") && !strings.HasPrefix(string(answer[:n]), "-NOAUTH") {
			return fmt.Errorf("%q: %w", answer[:n], err)
		}
		return nil
	})
}

// Kill ends the server at once; it may run again.
func (r *Server) Kill() {
	if r.cmd != nil {
		_ = r.cmd.Process.Kill()
		_ = r.cmd.Wait()
		r.cmd = nil
	}
	if r.t.Failed() {
		if log, err := os.ReadFile(filepath.Join(r.Dir, "log")); err == nil {
			lines := strings.Split(strings.TrimSpace(string(log)), "\n")
			r.t.Logf("end of the log of %s:\n%s", r.Addr(), strings.Join(lines[max(0, len(lines)-10):], "\n"))
		}
	}
}

// Do runs commands on the server.
func (r *Server) Do(args ...string) string {
	r.t.Helper()
	out, err := exec.Command("redis-cli", append([]string{"-p", fmt.Sprint(r.Port)}, args...)...).CombinedOutput()
	if err != nil {
		r.t.Fatalf("redis-cli %v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// Client is a client of the server's own.
func (r *Server) Client() valkey.Client {
	r.t.Helper()
	c, err := valkey.NewClient(valkey.ClientOption{InitAddress: []string{r.Addr()}, ForceSingleClient: true, DisableCache: true})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(c.Close)
	return c
}

// Until calls f until it succeeds.
func Until(t *testing.T, limit time.Duration, what string, f func() error) {
	t.Helper()
	limit *= 4 // a bound against hanging: machines are busy and their caches cold
	deadline := time.After(limit)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			t.Fatalf("%s: not within %s: %v", what, limit, err)
		case <-tick.C:
		}
	}
}
