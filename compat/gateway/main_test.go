package gateway

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/valkey-io/valkey-go"
	"go.uber.org/goleak"

	"tercet.dev/tercet/server"
)

func TestMain(m *testing.M) {
	// The client refreshes its view of a cluster at most once a second, and sleeps through Close.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/valkey-io/valkey-go.(*call).DelayDo.func1"))
}

// redis is a real redis-server.
type redis struct {
	t    *testing.T
	port int
	dir  string
	args []string
	cmd  *exec.Cmd
	tls  bool
}

// startRedis starts a redis-server on a free port of the loopback and waits until it answers.
func startRedis(t *testing.T, args ...string) *redis {
	t.Helper()
	r := &redis{t: t, port: freePort(t), dir: t.TempDir(), args: args}
	r.start()
	t.Cleanup(r.kill)
	return r
}

func freePort(t *testing.T) int {
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

func (r *redis) addr() string { return fmt.Sprintf("127.0.0.1:%d", r.port) }

func (r *redis) start() {
	r.t.Helper()
	path, err := exec.LookPath("redis-server")
	if err != nil {
		r.t.Fatal("redis-server is needed: apt-get install redis-server")
	}
	port := []string{"--port", fmt.Sprint(r.port)}
	if r.tls {
		port = []string{"--port", "0", "--tls-port", fmt.Sprint(r.port)}
	}
	args := append(port, "--bind", "127.0.0.1", "--dir", r.dir, "--save", "", "--daemonize", "no", "--logfile", filepath.Join(r.dir, "log"),
		"--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")
	r.cmd = exec.Command(path, append(args, r.args...)...)
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	until(r.t, 20*time.Second, "redis-server on "+r.addr(), func() error {
		c, err := net.Dial("tcp", r.addr())
		if err != nil {
			return err
		}
		defer c.Close()
		if r.tls {
			return nil
		}
		c.SetDeadline(time.Now().Add(time.Second))
		fmt.Fprint(c, "PING\r\n")
		answer := make([]byte, 64)
		n, err := c.Read(answer)
		if err != nil || !strings.HasPrefix(string(answer[:n]), "+PONG") && !strings.HasPrefix(string(answer[:n]), "-NOAUTH") {
			return fmt.Errorf("%q %v", answer[:n], err)
		}
		return nil
	})
}

func (r *redis) kill() {
	if r.cmd != nil {
		r.cmd.Process.Kill()
		r.cmd.Wait()
		r.cmd = nil
	}
	if r.t.Failed() {
		if log, err := os.ReadFile(filepath.Join(r.dir, "log")); err == nil {
			lines := strings.Split(strings.TrimSpace(string(log)), "\n")
			r.t.Logf("end of the log of %s:\n%s", r.addr(), strings.Join(lines[max(0, len(lines)-10):], "\n"))
		}
	}
}

// do runs commands on the server.
func (r *redis) do(args ...string) string {
	r.t.Helper()
	out, err := exec.Command("redis-cli", append([]string{"-p", fmt.Sprint(r.port)}, args...)...).CombinedOutput()
	if err != nil {
		r.t.Fatalf("redis-cli %v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// client is a client of the server's own.
func (r *redis) client() valkey.Client {
	r.t.Helper()
	c, err := valkey.NewClient(valkey.ClientOption{InitAddress: []string{r.addr()}, ForceSingleClient: true, DisableCache: true})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(c.Close)
	return c
}

// until calls f until it succeeds.
func until(t *testing.T, limit time.Duration, what string, f func() error) {
	t.Helper()
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

// open opens a gateway on the target with an HTTP server in front of it.
func open(t *testing.T, o Options) *api {
	t.Helper()
	o.Logger = hclog.New(&hclog.LoggerOptions{Output: testWriter{t}, Level: hclog.Info})
	g, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	s, err := server.New(server.Options{Backend: g})
	if err != nil {
		t.Fatal(err)
	}
	h := httptest.NewServer(s)
	a := &api{t: t, g: g, url: h.URL, client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}}
	t.Cleanup(func() {
		s.Drain()
		g.Close()
		h.Close()
		s.Close()
		a.client.CloseIdleConnections()
	})
	return a
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimRight(string(b), "\n"))
	return len(b), nil
}

// api calls the queue protocol.
type api struct {
	t      *testing.T
	g      *Gateway
	url    string
	client *http.Client
}

// answer is an HTTP answer.
type answer struct {
	status int
	head   http.Header
	body   string
}

func (a *api) try(ctx context.Context, method, path, body string, headers ...string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, method, a.url+path, bytes.NewReader([]byte(body)))
	if err != nil {
		return answer{}, err
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	res, err := a.client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header, string(b)}, err
}

func (a *api) call(method, path, body string, headers ...string) answer {
	a.t.Helper()
	r, err := a.try(a.t.Context(), method, path, body, headers...)
	if err != nil {
		a.t.Fatal(err)
	}
	return r
}
