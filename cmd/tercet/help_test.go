package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/internal/errs"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden compares got with testdata/name.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o666); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -run %s -update rewrites it):\n--- got\n%s\n--- want\n%s", path, t.Name(), got, want)
	}
}

// invoke runs one command line in process.
func invoke(stdin string, args ...string) (code int, stdout, stderr string) {
	var out, err bytes.Buffer
	a := newApp(strings.NewReader(stdin), &out, &err, nil)
	a.getenv = func(string) (string, bool) { return "", false }
	code = a.run(args)
	return code, out.String(), err.String()
}

// visit calls f for every command that people can see, with its path below the root.
func visit(c *cobra.Command, path []string, f func(c *cobra.Command, path []string)) {
	f(c, path)
	for _, child := range c.Commands() {
		if child.IsAvailableCommand() && child.Name() != "help" {
			visit(child, append(path[:len(path):len(path)], child.Name()), f)
		}
	}
}

func TestHelpPages(t *testing.T) {
	a := newApp(nil, nil, nil, nil)
	visit(a.root(), nil, func(c *cobra.Command, path []string) {
		name := strings.Join(append([]string{"tercet"}, path...), "-")
		t.Run(name, func(t *testing.T) {
			code, out, stderr := invoke("", append(path[:len(path):len(path)], "--help")...)
			if code != 0 || stderr != "" {
				t.Fatalf("exit %d, stderr %q", code, stderr)
			}
			golden(t, "help/"+name+".txt", out)
			if c.Short == "" {
				t.Error("no short description")
			}
			if c.HasSubCommands() {
				return
			}
			if n := strings.Count(c.Example, "tercet "); n < 3 {
				t.Errorf("%d examples, want three", n)
			}
			for line := range strings.Lines(c.Example) {
				if !strings.HasPrefix(line, "  ") {
					t.Errorf("example %q is not indented", line)
				}
			}
		})
	})
}

func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{
		{"frobnicate"},
		{"version", "extra"},
		{"version", "--frobnicate"},
		{"version", "-o", "yaml"},
	} {
		code, out, stderr := invoke("", args...)
		if code != exitUsage || out != "" || !strings.HasPrefix(stderr, "tercet: ") || !strings.Contains(stderr, "--help") {
			t.Errorf("%q: exit %d, stdout %q, stderr %q", args, code, out, stderr)
		}
	}
}

// TestExitCodes fixes the exit code of every code of the catalogue: scripts branch on them.
func TestExitCodes(t *testing.T) {
	var b strings.Builder
	for _, c := range errs.Codes() {
		code := exitCode(errs.Of(c))
		if c.Info().Outcome == errs.Unknown && code != exitOutcomeUnknown {
			t.Errorf("%s: outcome unknown exits with %d", c, code)
		}
		b.WriteString(c.String() + " " + string(rune('0'+code)) + "\n")
	}
	golden(t, "exit-codes.txt", b.String())
}
