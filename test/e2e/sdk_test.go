package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"tercet.dev/tercet/test/harness"
)

// TestSDK runs the unmodified npm package @vercel/queue against three nodes: whole, without one zone, and without
// a majority.
func TestSDK(t *testing.T) {
	t.Parallel()
	installSDK(t)
	c := harness.Start(t, harness.Options{Args: []string{"--virtual-clock"}})
	followers, leader := c.Followers()

	t.Run("whole", func(t *testing.T) {
		runNode(t, "queue.test.mjs", 57, "TERCET_NODES=leader="+leader.URL()+",follower="+followers[0].URL()+",follower="+followers[1].URL())
		runNode(t, "large.test.mjs", 2, "TERCET_NODES=leader="+leader.URL()+",follower="+followers[0].URL()+",follower="+followers[1].URL())
		c.EqualHashes()
	})
	t.Run("a zone away", func(t *testing.T) {
		followers[0].Kill()
		c.WaitInSync(zonesWithout(c, followers[0])...)
		runNode(t, "refusals.test.mjs", 8, "TERCET_STATE=zone away", "TERCET_NODES=leader="+leader.URL()+",follower="+followers[1].URL())
	})
	t.Run("no majority", func(t *testing.T) {
		leader.Kill()
		runNode(t, "refusals.test.mjs", 3, "TERCET_STATE=no majority", "TERCET_NODES=follower="+followers[1].URL())
	})
}

// TestSDKFailover: the leader is killed while unmodified clients, the newest and the oldest, send and receive.
func TestSDKFailover(t *testing.T) {
	t.Parallel()
	installSDK(t)
	c := harness.Start(t, harness.Options{Args: []string{"--virtual-clock"}})
	followers, leader := c.Followers()
	runNode(t, "failover.test.mjs", 1, fmt.Sprint("TERCET_VICTIM=", leader.Process().PID), "TERCET_NODES=leader="+leader.URL()+",follower="+followers[0].URL()+",follower="+followers[1].URL())
	leader.Kill() // it is dead; the harness is to know
	leader.Start()
	c.WaitInSync(c.Zones()...)
	c.EqualHashes()
}

// installSDK makes sure that the client is installed as the lock file says.
func installSDK(t *testing.T) {
	t.Helper()
	for _, name := range []string{"node", "npm"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Fatalf("this test needs Node.js >= 20.9 with npm: %v; see `make deps`", err)
		}
	}
	if _, err := filepath.Abs("sdk"); err != nil {
		t.Fatal(err)
	}
	check := exec.Command("npm", "ls", "--omit=optional", "@vercel/queue@0.6.0", "queue-oldest")
	check.Dir = "sdk"
	if check.Run() == nil {
		return
	}
	install := exec.Command("npm", "ci", "--no-audit", "--no-fund", "--loglevel=error")
	install.Dir = "sdk"
	if text, err := install.CombinedOutput(); err != nil {
		t.Fatalf("npm ci: %v\n%s", err, text)
	}
}

var (
	passedLine = regexp.MustCompile(`(?m)^# pass (\d+)$`)
	badLine    = regexp.MustCompile(`(?m)^# (fail|cancelled|skipped|todo) ([1-9]\d*)$`)
)

// runNode runs one file of tests with Node's own runner and fails the test unless all passed, and at least this
// many.
func runNode(t *testing.T, file string, least int, env ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "node", "--test", "--test-timeout=180000", "--test-reporter=tap", file)
	cmd.Dir = "sdk"
	cmd.Env = append(harness.Environment(), append(env, "NODE_ENV=production")...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatalf("node --test %s: %v %v", file, err, exit)
	}
	text := out.String()
	passed := 0
	if m := passedLine.FindStringSubmatch(text); m != nil {
		passed, _ = strconv.Atoi(m[1])
	}
	switch {
	case err != nil || badLine.MatchString(text):
		t.Errorf("node --test %s: %v\n%s", file, err, failures(text))
	case passed < least:
		t.Errorf("node --test %s: %d tests passed, want %d at least\n%s", file, passed, least, text)
	default:
		t.Logf("node --test %s: %d tests passed", file, passed)
	}
}

// failures drops the lines of tests that passed from a report.
func failures(tap string) string {
	var b strings.Builder
	inPassed := false
	for line := range strings.Lines(tap) {
		trimmed := strings.TrimLeft(line, " ")
		switch {
		case strings.HasPrefix(trimmed, "ok "):
			inPassed = true
			continue
		case strings.HasPrefix(trimmed, "not ok "), strings.HasPrefix(trimmed, "# "):
			inPassed = false
		}
		if !inPassed {
			b.WriteString(line)
		}
	}
	return b.String()
}
