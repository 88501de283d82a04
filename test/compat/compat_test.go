// Package compat runs unmodified Valkey and Redis clients against three real processes: valkey-glide, iovalkey, ioredis 5 and 6,
// node-redis 4, 5 and 6, valkey-go, rueidis, go-redis, redigo, redis-cli and redis-benchmark.
package compat

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }

// addresses lists the Valkey addresses of all nodes, the leader's first.
func addresses(c *harness.Cluster) string {
	followers, leader := c.Followers()
	list := []string{leader.Valkey}
	for _, n := range followers {
		list = append(list, n.Valkey)
	}
	return strings.Join(list, ",")
}

// run runs a command of a client's own language and shows what it said when it failed.
func run(t *testing.T, dir string, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// errNotYet says that what a test waits for has not happened yet.
var errNotYet = errors.New("not yet")

// npmInstall installs the Node clients unless they are.
func npmInstall(t *testing.T) { npmInstallIn(t, "node") }

// npmInstallIn installs what a folder's lock file names unless it is installed.
func npmInstallIn(t *testing.T, dir string) {
	t.Helper()
	lock, err := os.ReadFile(filepath.Join(dir, "package-lock.json"))
	if err != nil {
		t.Fatal(err)
	}
	stamp := filepath.Join(dir, "node_modules/.installed")
	if have, err := os.ReadFile(stamp); err == nil && bytes.Equal(have, lock) {
		return
	}
	// Not npm ci: valkey-glide has a package for each platform, and a registry need not have those of the others.
	run(t, dir, nil, "npm", "install", "--no-save", "--no-audit", "--no-fund", "--loglevel=error")
	if err := os.WriteFile(stamp, lock, 0o600); err != nil {
		t.Fatal(err)
	}
}

// control lets the tests of other languages kill the leader, which is started again a second later.
func control(t *testing.T, c *harness.Cluster) string {
	back := make(chan *harness.Node, 8)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := range back {
			time.Sleep(time.Second) // long enough that the others have gone on without it
			n.Start()
		}
	}()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		leader, err := c.FindLeader()
		if err != nil || r.URL.Path != "/kill-leader" {
			http.Error(w, fmt.Sprint(r.URL.Path, err), http.StatusConflict)
			return
		}
		leader.Kill()
		back <- leader
	}))
	t.Cleanup(func() {
		s.Close()
		close(back)
		<-done
	})
	return s.URL
}

// TestNodeClients runs the template's sequence through valkey-glide, the work of a queue through every Node client, and a
// kill of the leader under all of them.
func TestNodeClients(t *testing.T) {
	c := harness.Start(t, harness.Options{})
	npmInstall(t)
	env := []string{"TERCET_VALKEY=" + addresses(c), "TERCET_CONTROL=" + control(t, c)}
	for file, least := range map[string]string{"template.test.mjs": "# pass 3", "clients.test.mjs": "# pass 19"} {
		out := run(t, "node", env, "node", "--test", "--test-reporter=tap", file)
		if !strings.Contains(out, least+"\n") {
			t.Errorf("%s: want %q\n%s", file, least, out)
		}
	}
}

// TestGoClients does the same work with the Go clients, in either presentation.
func TestGoClients(t *testing.T) {
	for _, mode := range []string{"standalone", "cluster"} {
		t.Run(mode, func(t *testing.T) {
			c := harness.Start(t, harness.Options{Args: []string{"--valkey-mode", mode}})
			env := []string{"TERCET_VALKEY=" + addresses(c), "TERCET_VALKEY_MODE=" + mode, "GOFLAGS=-mod=mod"}
			out := run(t, "go", env, "go", "test", "-count=1", "-v", "./...")
			if strings.Count(out, "--- PASS: TestClients/") < 9 || !strings.Contains(out, "--- PASS: TestPubSub") {
				t.Errorf("not all clients ran:\n%s", out)
			}
		})
	}
}

// TestRedisTools runs redis-cli and redis-benchmark of the distribution.
func TestRedisTools(t *testing.T) {
	c := harness.Start(t, harness.Options{Args: []string{"--flush-allowed"}})
	_, leader := c.Followers()
	host, port, _ := strings.Cut(leader.Valkey, ":")
	cli := func(args ...string) string {
		return strings.TrimSpace(run(t, "", nil, "redis-cli", append([]string{"-h", host, "-p", port}, args...)...))
	}
	if got := cli("XADD", "k", "5-1", "f", "v"); got != "5-1" {
		t.Errorf("XADD: %s", got)
	}
	if got := cli("-3", "XRANGE", "k", "-", "+"); !strings.Contains(got, "5-1") {
		t.Errorf("XRANGE: %s", got)
	}
	if got := cli("TYPE", "k"); got != "stream" {
		t.Errorf("TYPE: %s", got)
	}
	if got := cli("--scan"); got != "k" {
		t.Errorf("--scan: %q", got)
	}
	if got := cli("FLUSHALL"); got != "OK" {
		t.Errorf("FLUSHALL: %s", got)
	}
	out := run(t, "", nil, "redis-benchmark", "-h", host, "-p", port, "-n", "2000", "-c", "20", "-P", "16", "-q", "XADD", "bench", "*", "f", "v")
	if got := cli("XLEN", "bench"); got != "2000" {
		t.Errorf("after redis-benchmark: %s entries\n%s", got, out)
	}
	t.Log(strings.TrimSpace(out[strings.LastIndexByte(out, '\r')+1:]))
}
