package e2e

import (
	"bufio"
	"fmt"
	"net/http"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// startRedis starts a real redis-server and returns its address.
func startRedis(t *testing.T, args ...string) string {
	t.Helper()
	addr := harness.FreeAddr(t)
	_, port, _ := strings.Cut(addr, ":")
	cmd := exec.Command("redis-server", append([]string{"--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", t.TempDir()}, args...)...)
	if err := cmd.Start(); err != nil {
		t.Fatalf("redis-server: %v; see `make deps`", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	harness.Until(t, 20*time.Second, "redis-server", func() error {
		out, err := exec.Command("redis-cli", "-p", port, "PING").CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != "PONG" {
			return fmt.Errorf("%s: %w", out, err)
		}
		return nil
	})
	return addr
}

// TestGatewaySDK runs the unmodified @vercel/queue client, in its newest and its oldest version, against two gateway
// processes in front of one real redis-server, and stops them in good order.
func TestGatewaySDK(t *testing.T) {
	installSDK(t)
	upstream := startRedis(t)
	first, second := startGateway(t, upstream), startGateway(t, upstream)
	urls := "TERCET_NODES=gateway=http://" + first.addr + ",gateway=http://" + second.addr
	t.Run("versions", func(t *testing.T) {
		for version, least := range map[string]int{"@vercel/queue": 15, "queue-oldest": 13} {
			t.Run(version, func(t *testing.T) {
				t.Parallel()
				runNode(t, "gateway.test.mjs", least, urls, "TERCET_SDK="+version)
			})
		}
	})
	for _, g := range []*gatewayProcess{first, second} {
		g.stop()
	}
}

// gatewayProcess is a running `tercet gateway`.
type gatewayProcess struct {
	t    *testing.T
	addr string
	cmd  *exec.Cmd
}

func startGateway(t *testing.T, upstream string, args ...string) *gatewayProcess {
	t.Helper()
	g := &gatewayProcess{t: t, addr: harness.FreeAddr(t)}
	g.cmd = exec.Command(harness.Binary(t), append([]string{"gateway", "--upstream", upstream, "--http", g.addr}, args...)...)
	g.cmd.Env = harness.Environment()
	log, err := g.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := make(chan []string, 1)
	go func() {
		var all []string
		for s := bufio.NewScanner(log); s.Scan(); {
			all = append(all, s.Text())
		}
		lines <- all
	}()
	t.Cleanup(func() {
		_ = g.cmd.Process.Kill()
		for _, line := range <-lines {
			t.Log(line)
		}
		_ = g.cmd.Wait()
	})
	harness.Until(t, 60*time.Second, "the gateway", func() error {
		r, err := http.Get("http://" + g.addr + "/readyz")
		if err != nil {
			return err
		}
		defer r.Body.Close()
		if r.StatusCode != http.StatusOK {
			return fmt.Errorf("status %d", r.StatusCode)
		}
		return nil
	})
	http.DefaultClient.CloseIdleConnections()
	return g
}

// stop ends the gateway as a service manager would.
func (g *gatewayProcess) stop() {
	g.t.Helper()
	if err := g.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		g.t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- g.cmd.Wait() }()
	select {
	case err := <-exited:
		if err != nil {
			g.t.Errorf("the gateway stops with %v", err)
		}
	case <-time.After(60 * time.Second):
		g.t.Error("the gateway does not stop")
	}
}
