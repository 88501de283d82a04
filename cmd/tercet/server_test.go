package main

import (
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"tercet.dev/tercet/raft"
)

// parseServer reads a `tercet server` command line as the command does.
func parseServer(t *testing.T, args ...string) (raft.Config, error) {
	t.Helper()
	var o serverOptions
	flags := pflag.NewFlagSet("server", pflag.ContinueOnError)
	o.register(flags)
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	return o.config()
}

func TestServerConfig(t *testing.T) {
	cfg, err := parseServer(t, "--node-id", "n2", "--zone", "b", "--data", "/d", "--http", ":7302", "--peer", ":7402",
		"--peers", "n1=127.0.0.1:7401,n2=127.0.0.1:7402,n3=127.0.0.1:7403", "--durability", "all", "--zone-timeout", "3s",
		"--disk-reserve", "1GiB", "--wal-segment-size", "16MiB", "--memory", "256MiB", "--virtual-clock")
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Name != "n2" || cfg.Zone != "b" || cfg.Dir != "/d" || cfg.HTTPAddr != "127.0.0.1:7302" || cfg.PeerAddr != "127.0.0.1:7402" ||
		len(cfg.Peers) != 3 || cfg.Durability != raft.All || cfg.ZoneTimeout != 3*time.Second || cfg.DiskReserve != 1<<30 ||
		cfg.WALSegmentSize != 16<<20 || cfg.MemoryBudget != 256<<20 || !cfg.VirtualClock {
		t.Errorf("%+v", cfg)
	}
	cfg, err = parseServer(t, "--node-id", "n1", "--data", "/d")
	if err != nil || cfg.Zone != "n1" || cfg.Peers != nil || cfg.PeerAddr != "127.0.0.1:7400" || cfg.HTTPAddr != "127.0.0.1:7300" {
		t.Errorf("defaults: %+v, %v", cfg, err)
	}
	// A node that joins does not found: --peers may stay in a script.
	cfg, err = parseServer(t, "--node-id", "n1", "--data", "/d", "--peers", "n1=127.0.0.1:7400,n2=127.0.0.1:2", "--join", "127.0.0.1:2")
	if err != nil || cfg.Peers != nil || len(cfg.Join) != 1 {
		t.Errorf("join: %+v, %v", cfg, err)
	}
}

// TestServerConfigErrors: each mistake is named with its flag, and all of them at once.
func TestServerConfigErrors(t *testing.T) {
	good := []string{"--node-id", "n1", "--data", "/d"}
	for _, c := range []struct {
		args []string
		want []string
	}{
		{nil, []string{"--node-id is required", "--data is required"}},
		{[]string{"--node-id", "a/b", "--data", "/d"}, []string{`--node-id "a/b"`}},
		{append(good, "--zone", "z z"), []string{`--zone "z z"`}},
		{append(good, "--http", "0.0.0.0:7300"), []string{"--http", "--insecure"}},
		{append(good, "--http", "example.com:7300"), []string{"--http", "--insecure"}},
		{append(good, "--peer", "10.1.2.3:7400"), []string{"--peer", "--peer-token", "--insecure"}},
		{append(good, "--valkey", "10.1.2.3:6379"), []string{"--valkey", "--insecure"}},
		{append(good, "--http", "http://127.0.0.1:7300"), []string{"--http", "without a scheme"}},
		{append(good, "--http", "7300"), []string{"--http", "HOST:PORT"}},
		{append(good, "--http", ":7300", "--peer", ":7300"), []string{"--http and --peer are both"}},
		{append(good, "--insecure", "--peer", "0.0.0.0:7400"), []string{"--peer 0.0.0.0:7400", "others can dial"}},
		{append(good, "--peers", "n2=127.0.0.1:1"), []string{`--peers names no node "n1"`}},
		{append(good, "--peers", "n1"), []string{"--peers", "NAME=HOST:PORT"}},
		{append(good, "--peers", "n1=127.0.0.1:1,n1=127.0.0.1:2"), []string{"--peers", "twice"}},
		{append(good, "--peers", "n1=127.0.0.1:1,n2=127.0.0.1:1"), []string{"--peers", "twice"}},
		{append(good, "--durability", "some"), []string{"--durability"}},
		{append(good, "--zone-timeout", "1ms"), []string{"--zone-timeout"}},
		{append(good, "--wal-segment-size", "5000"), []string{"--wal-segment-size"}},
	} {
		_, err := parseServer(t, c.args...)
		if err == nil {
			t.Errorf("%q was accepted", c.args)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %v, want %q", c.args, err, want)
			}
		}
	}
	code, _, stderr := invoke("", "server", "--log-level", "loud")
	if code != exitUsage || !strings.Contains(stderr, "--node-id") || !strings.Contains(stderr, "--log-level") {
		t.Errorf("exit %d: %s", code, stderr)
	}
}

// TestExampleConfig: the commented configuration file names every setting, and is accepted.
func TestExampleConfig(t *testing.T) {
	const path = "../../examples/tercet.yaml"
	var o serverOptions
	flags := pflag.NewFlagSet("server", pflag.ContinueOnError)
	o.register(flags)
	none := func(string) (string, bool) { return "", false }
	if err := overlay(flags, func(*pflag.Flag) bool { return true }, none, path); err != nil {
		t.Fatal(err)
	}
	if _, err := o.config(); err != nil {
		t.Error(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden || f.Name == "config" {
			return
		}
		if !regexp.MustCompile(`(?m)^(# )?` + f.Name + `: `).Match(content) {
			t.Errorf("%s is missing", f.Name)
		}
		// What stands there and has a default is that, but for the addresses of the three machines.
		example := slices.Contains([]string{"", "0", "[]", "false"}, f.DefValue) || f.Name == "http" || f.Name == "peer"
		stands := regexp.MustCompile(`(?m)^` + f.Name + `: `).Match(content)
		if stands && !example && f.Value.String() != f.DefValue {
			t.Errorf("%s is %s, and %s without the file", f.Name, f.Value, f.DefValue)
		}
	})
}

func TestNotifySystemd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	notifySystemd("READY=1")
	buf := make([]byte, 64)
	n, err := l.Read(buf)
	if err != nil || string(buf[:n]) != "READY=1" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "nobody"))
	notifySystemd("STOPPING=1") // must not fail
}
