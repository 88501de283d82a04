// Package compat runs unmodified Valkey and Redis clients against three real processes: valkey-glide, iovalkey, ioredis 5 and 6,
// node-redis 4, 5 and 6, their cluster clients, valkey-go, rueidis, go-redis, redigo, watermill, redis-cli and redis-benchmark.
package compat

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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

// control lets the tests of other languages kill the leader, which is started again a second later. They are told its address.
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
		fmt.Fprint(w, leader.Valkey)
	}))
	t.Cleanup(func() {
		s.Close()
		close(back)
		<-done
	})
	return s.URL
}

// TestNodeClients runs the template's sequence through valkey-glide, the work of a queue through every Node client, and a
// kill of the leader under all of them: in either presentation, and with password and TLS.
func TestNodeClients(t *testing.T) {
	npmInstall(t)
	for _, x := range []struct {
		name, mode string
		secured    bool
		// template and clients are how many tests have to pass.
		template, clients int
	}{
		{"standalone", "standalone", false, 3, 23},
		{"standalone-secured", "standalone", true, 0, 23},
		{"cluster", "cluster", false, 0, 17},
		{"cluster-secured", "cluster", true, 0, 17},
	} {
		if x.secured != (x.mode == "cluster") && !harness.Campaign() {
			continue // the sample has each client, each presentation, and each kind of access once
		}
		t.Run(x.name, func(t *testing.T) {
			opts, env := harness.Options{Args: []string{"--valkey-mode", x.mode}}, []string{"TERCET_VALKEY_MODE=" + x.mode}
			if x.secured {
				var more []string
				opts, more = secure(t, opts, false)
				env = append(env, more...)
			}
			c := harness.Start(t, opts)
			env = append(env, "TERCET_VALKEY="+addresses(c), "TERCET_CONTROL="+control(t, c))
			for file, passes := range map[string]int{"template.test.mjs": x.template, "clients.test.mjs": x.clients} {
				if passes == 0 {
					continue
				}
				out := run(t, "node", env, "node", "--test", "--test-reporter=tap", file)
				if !strings.Contains(out, fmt.Sprintf("\n# pass %d\n", passes)) {
					t.Errorf("%s: want %d passes\n%s", file, passes, out)
				}
			}
		})
	}
}

// TestGoClients does the same work with the Go clients, in either presentation, without and with password, TLS and
// certificates of the clients.
func TestGoClients(t *testing.T) {
	for _, mode := range []string{"standalone", "cluster"} {
		for _, secured := range []bool{false, true} {
			if secured != (mode == "cluster") && !harness.Campaign() {
				continue
			}
			name, opts, env := mode, harness.Options{Args: []string{"--valkey-mode", mode}}, []string{"TERCET_VALKEY_MODE=" + mode}
			if secured {
				name += " secured"
				var more []string
				opts, more = secure(t, opts, true)
				env = append(env, more...)
			}
			t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
				c := harness.Start(t, opts)
				env := append(env, "TERCET_VALKEY="+addresses(c), "TERCET_CONTROL="+control(t, c))
				out := run(t, "go", env, "go", "test", "-count=1", "-v", "./...")
				clients := map[string]int{"standalone": 7, "cluster": 6}[mode]
				if n := strings.Count(out, "--- PASS: TestClients/"); n != 3*clients {
					t.Errorf("%d clients did their work, want %d through each node:\n%s", n, clients, out)
				}
				for _, name := range []string{"TestPubSub", "TestLeaderKilled", "TestWatermill"} {
					if !strings.Contains(out, "--- PASS: "+name) {
						t.Errorf("%s did not run:\n%s", name, out)
					}
				}
			})
		}
	}
}

// The user of the secured clusters.
const (
	testUser     = "app"
	testPassword = "correct horse battery staple"
)

// secure adds a user with a password and TLS to the options, and returns the environment of their clients. mutual: the
// clients have to have certificates.
func secure(t *testing.T, opts harness.Options, mutual bool) (harness.Options, []string) {
	t.Helper()
	dir := t.TempDir()
	acl := filepath.Join(dir, "users.acl")
	hash := sha256.Sum256([]byte(testPassword))
	if err := os.WriteFile(acl, fmt.Appendf(nil, "user default off\nuser %s on #%x ~* &* +@all\n", testUser, hash), 0o600); err != nil {
		t.Fatal(err)
	}
	certs := harness.NewCertificates(t, dir)
	opts.TLS = certs
	opts.Args = append(slices.Clone(opts.Args), "--valkey-acl", acl)
	if mutual {
		opts.Args = append(opts.Args, "--tls-client-ca", certs.CA)
	}
	return opts, []string{
		"TERCET_VALKEY_USER=" + testUser, "TERCET_VALKEY_PASSWORD=" + testPassword,
		"TERCET_VALKEY_CA=" + certs.CA, "TERCET_VALKEY_CERT=" + certs.ClientCert, "TERCET_VALKEY_KEY=" + certs.ClientKey,
	}
}

// TestRedisTools runs redis-cli and redis-benchmark of the distribution, without and with password, TLS and certificates.
func TestRedisTools(t *testing.T) {
	for _, secured := range []bool{false, true} {
		t.Run(map[bool]string{false: "plain", true: "secured"}[secured], func(t *testing.T) {
			opts := harness.Options{Args: []string{"--flush-allowed"}}
			var extra []string
			if secured {
				opts, _ = secure(t, opts, true)
				extra = []string{"--user", testUser, "-a", testPassword, "--tls", "--cacert", opts.TLS.CA, "--cert", opts.TLS.ClientCert, "--key", opts.TLS.ClientKey}
			}
			c := harness.Start(t, opts)
			followers, leader := c.Followers()
			arguments := func(n *harness.Node, args ...string) []string {
				host, port, _ := strings.Cut(n.Valkey, ":")
				return slices.Concat([]string{"-h", host, "-p", port}, extra, args)
			}
			cli := func(args ...string) string {
				if secured {
					args = append([]string{"--no-auth-warning"}, args...)
				}
				return strings.TrimSpace(run(t, "", nil, "redis-cli", arguments(leader, args...)...))
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
			for i, n := range []*harness.Node{leader, followers[0]} {
				key := fmt.Sprint("bench", i)
				// The tool asks for CONFIG GET first, and goes on whatever it is told.
				out := run(t, "", nil, "redis-benchmark", arguments(n, "-n", "2000", "-c", "20", "-P", "16", "-q", "XADD", key, "*", "f", "v")...)
				if got := cli("XLEN", key); got != "2000" {
					t.Errorf("after redis-benchmark: %s entries\n%s", got, out)
				}
				t.Log(strings.TrimSpace(out[strings.LastIndexByte(out, '\r')+1:]))
			}
		})
	}
}

// TestStrangers: whoever has no certificate, no password, the wrong one, or does not speak TLS is told so or hears nothing,
// and does nothing.
func TestStrangers(t *testing.T) {
	opts, _ := secure(t, harness.Options{Nodes: 1}, true)
	c := harness.Start(t, opts)
	host, port, _ := strings.Cut(c.Nodes[0].Valkey, ":")
	certs := opts.TLS
	fails := func(want string, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "redis-cli", slices.Concat([]string{"-h", host, "-p", port, "--no-auth-warning"}, args, []string{"XADD", "k", "*", "f", "v"})...)
		out, _ := cmd.CombinedOutput() // redis-cli exits with 0 on errors of the server
		if !strings.Contains(string(out), want) {
			t.Errorf("%q: %s, want %s", args, out, want)
		}
	}
	mutual := []string{"--tls", "--cacert", certs.CA, "--cert", certs.ClientCert, "--key", certs.ClientKey}
	fails("rror") // in clear text: the connection ends
	fails("rror", "--tls", "--cacert", certs.CA, "--user", testUser, "-a", testPassword)
	fails("certificate verify failed", "--tls", "--cert", certs.ClientCert, "--key", certs.ClientKey, "--user", testUser, "-a", testPassword)
	fails("NOAUTH Authentication required.", mutual...)
	fails("WRONGPASS", append(mutual, "--user", testUser, "-a", "no")...)
	fails("WRONGPASS", append(mutual, "--user", "default", "-a", testPassword)...)
	cli := func(args ...string) string {
		return strings.TrimSpace(run(t, "", nil, "redis-cli", slices.Concat([]string{"-h", host, "-p", port, "--no-auth-warning", "--user", testUser, "-a", testPassword}, mutual, args)...))
	}
	if got := cli("EXISTS", "k"); got != "0" {
		t.Errorf("a stranger has written: %s", got)
	}
	if got := cli("ACL", "LOG", "COUNT"); strings.Contains(got, testPassword) {
		t.Errorf("ACL LOG shows a password: %s", got)
	}
}

// TestUsersAreReplicated: users that are set on one node are there on the others, through the death of the leader, and
// those that are deleted are not.
func TestUsersAreReplicated(t *testing.T) {
	c := harness.Start(t, harness.Options{})
	cli := func(n *harness.Node, args ...string) (out string) {
		t.Helper()
		host, port, _ := strings.Cut(n.Valkey, ":")
		return strings.TrimSpace(run(t, "", nil, "redis-cli", append([]string{"-h", host, "-p", port, "--no-auth-warning"}, args...)...))
	}
	followers, leader := c.Followers()
	if got := cli(followers[0], "ACL", "SETUSER", "orders", "on", ">secret", "~orders:*", "+@stream", "+ping", "-xtrim"); got != "OK" {
		t.Fatalf("ACL SETUSER: %s", got)
	}
	as := []string{"--user", "orders", "-a", "secret"}
	check := func(nodes ...*harness.Node) {
		t.Helper()
		for _, n := range nodes {
			for _, x := range []struct{ command, want string }{
				{"XADD orders:1 * f v", ""}, {"XADD other * f v", "NOPERM"}, {"XTRIM orders:1 MAXLEN 0", "NOPERM"}, {"SET orders:x y", "NOPERM"},
			} {
				harness.Until(t, 10*time.Second, x.command, func() error {
					got := cli(n, append(slices.Clone(as), strings.Fields(x.command)...)...)
					if strings.Contains(got, "WRONGPASS") || strings.Contains(got, "CLUSTERDOWN") || strings.Contains(got, "outcome unknown") {
						return errors.New(got) // it has not heard of the user yet, or of the new leader
					}
					if x.want == "" && strings.Contains(got, "NOPERM") || !strings.Contains(got, x.want) {
						t.Errorf("%s on %s: %s, want %q", x.command, n.ID, got, x.want)
					}
					return nil
				})
			}
		}
	}
	check(c.Nodes...)
	leader.Kill()
	check(followers...)
	leader.Start()
	c.WaitInSync(c.Zones()...)
	check(leader)
	if got := cli(followers[1], "ACL", "DELUSER", "orders"); got != "1" {
		t.Fatalf("ACL DELUSER: %s", got)
	}
	for _, n := range c.Nodes {
		harness.Until(t, 10*time.Second, "the user to be gone", func() error {
			if got := cli(n, append(slices.Clone(as), "PING")...); !strings.Contains(got, "WRONGPASS") {
				return errors.New(got)
			}
			return nil
		})
	}
}
