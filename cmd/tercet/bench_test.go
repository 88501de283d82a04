package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tercet.dev/tercet/bench"
)

func TestBenchUsage(t *testing.T) {
	for want, line := range map[string]string{
		"--via":                         "bench publish --via carrier-pigeon",
		"--format":                      "bench publish --format xml",
		"--pairs":                       "bench publish --pairs 0",
		"--durability":                  "bench publish --durability most",
		"leave out --server":            "bench publish --server http://127.0.0.1:1 --kill leader",
		"leave out --via leader":        "bench publish --via leader --kill leader",
		"leave out --via resp":          "bench publish --via resp --kill leader",
		"add --via leader":              "bench publish --baseline",
		"want http://HOST:PORT":         "bench publish --server 127.0.0.1:7301",
		"want leader, follower":         "bench publish --kill everybody",
		"neither publishers":            "bench publish --publishers 0",
		"a batch has 1 to 100":          "bench publish --batch 101",
		"the size must be":              "bench publish --size 2MiB",
		"stamped messages need":         "bench publish --kill leader --size 5",
		"want kill, pause or power":     "bench durability --faults earthquake",
		"no faults":                     "bench durability --faults=",
		"leave out the window":          "bench publish --window 4 --rate 100",
		"--end-to-end needs":            "bench publish --end-to-end",
		"--mixed-sizes":                 "bench publish --mixed-sizes 1KiB,big",
		"is not a size such as":         "bench disk --size big",
		"want 1 byte to 64 MiB":         "bench disk --size 1GiB",
		"the retention must be 1m0s to": "bench backlog --retention 1s",
	} {
		code, out, stderr := invoke("", strings.Fields(line)...)
		if code != exitUsage || out != "" || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit %d, stdout %q, stderr %q, want %q in it", line, code, out, stderr, want)
		}
	}
}

// TestBenchIgnoresTheEnvironment: what says to everyday commands where the cluster is must not aim a load test at it.
func TestBenchIgnoresTheEnvironment(t *testing.T) {
	var out, stderr bytes.Buffer
	a := newApp(strings.NewReader(""), &out, &stderr, nil)
	a.getenv = func(name string) (string, bool) {
		if name == "TERCET_SERVER" {
			return "http://production:7300", true
		}
		return "", false
	}
	// With --server set the complaint would be that there is nothing to kill.
	code := a.run([]string{"bench", "publish", "--kill", "leader", "--publishers", "0"})
	if code != exitUsage || !strings.Contains(stderr.String(), "neither publishers") {
		t.Errorf("exit %d, stderr %q", code, stderr.String())
	}
}

func TestBenchDisk(t *testing.T) {
	dir := t.TempDir()
	args := []string{"bench", "disk", "--dir", dir, "--size", "4KiB,5000", "--duration", "1ms"}
	code, out, stderr := invoke("", append(args, "-o", "json")...)
	if code != exitOK {
		t.Fatalf("exit %d, stderr %q", code, stderr)
	}
	var report struct{ Probes []bench.ProbeResult }
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatal(err)
	}
	modes := 1
	if bench.DirectWorks(dir) {
		modes = 2
	}
	// Two sizes, prefilled and growing, one stream and three.
	if len(report.Probes) != 8*modes {
		t.Errorf("%d probes", len(report.Probes))
	}
	sizes := map[int64]int{}
	for _, p := range report.Probes {
		sizes[p.Size]++
		if p.Sync.Count == 0 || p.Sync.P50 <= 0 {
			t.Errorf("%s: %+v", p, p.Sync)
		}
	}
	if sizes[4096] != 4*modes || sizes[8192] != 4*modes {
		t.Errorf("sizes %v", sizes)
	}
	code, out, stderr = invoke("", args...)
	if lines := strings.Count(out, "\n"); code != exitOK || lines != 1+8*modes {
		t.Errorf("exit %d, %d lines, stderr %q", code, lines, stderr)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("it left %v", left)
	}
}

func TestFindBaseline(t *testing.T) {
	t.Chdir(t.TempDir())
	if _, _, err := findBaseline(t.Context(), ""); err == nil || exitCode(err) != exitUsage {
		t.Errorf("outside the source tree: %v", err)
	}
	given := filepath.Join(t.TempDir(), "baseline")
	if binary, _, err := findBaseline(t.Context(), given); err != nil || binary != given {
		t.Errorf("got %s, %v", binary, err)
	}
}
