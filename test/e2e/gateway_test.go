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

// TestGatewaySDK runs the unmodified @vercel/queue client against a gateway process in front of a real redis-server,
// and stops the gateway in good order.
func TestGatewaySDK(t *testing.T) {
	installSDK(t)
	upstream := startRedis(t)
	addr := harness.FreeAddr(t)
	cmd := exec.Command(harness.Binary(t), "gateway", "--upstream", upstream, "--http", addr)
	cmd.Env = harness.Environment()
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
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
	defer func() {
		_ = cmd.Process.Kill()
		for _, line := range <-lines {
			t.Log(line)
		}
		_ = cmd.Wait()
	}()
	harness.Until(t, 20*time.Second, "the gateway", func() error {
		r, err := http.Get("http://" + addr + "/readyz")
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
	runNode(t, "gateway.test.mjs", 9, "TERCET_NODES=gateway=http://"+addr)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	select {
	case err := <-exited:
		if err != nil {
			t.Errorf("the gateway stops with %v", err)
		}
	case <-time.After(2 * time.Minute):
		t.Error("the gateway does not stop")
	}
}
