package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// shellBlocks returns what stands in the README in blocks of shell commands, under each of the headings.
func shellBlocks(t *testing.T, readme string, headings ...string) string {
	t.Helper()
	var script strings.Builder
	for _, h := range headings {
		_, section, ok := strings.Cut(readme, "\n## "+h+"\n")
		if !ok {
			t.Fatalf("the README has no section %q", h)
		}
		section, _, _ = strings.Cut(section, "\n## ")
		blocks := strings.Split(section, "```")
		for i := 1; i < len(blocks); i += 2 {
			if code, ok := strings.CutPrefix(blocks[i], "sh\n"); ok {
				script.WriteString(code)
			}
		}
	}
	return script.String()
}

// TestReadme runs the README's commands as they stand, one after the other in one shell, as somebody would who pastes
// them. Only the ports and the directory are others, so that it may run beside a cluster of the developer's own.
func TestReadme(t *testing.T) {
	t.Parallel()
	root, err := harness.ModuleRoot()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	script := shellBlocks(t, string(text), "Start", "Kill a node", "Real input")
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(harness.Binary(t), filepath.Join(dir, "bin", "tercet")); err != nil {
		t.Fatal(err)
	}
	args, port := devArguments(t, filepath.Join(dir, "tercet-data"), "-o", "json")
	dev := startDev(t, args)
	doc := document(t, dev)

	replace := func(old, with string) {
		t.Helper()
		if !strings.Contains(script, old) {
			t.Fatalf("the README's commands do not contain %q:\n%s", old, script)
		}
		script = strings.ReplaceAll(script, old, with)
	}
	replace("make run\n", "")
	replace("go run ./", "go run -C '"+root+"' ./")
	for i := range doc.Nodes {
		replace("127.0.0.1:"+strconv.Itoa(7301+i), "127.0.0.1:"+strconv.Itoa(port+i))
	}
	shell := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-x", "-c", script)
	shell.Dir = dir
	shell.Env = append(harness.Environment(), "TERCET_TIMEOUT=5m", "TERCET_SERVER="+doc.Nodes[0].HTTP+","+doc.Nodes[1].HTTP+","+doc.Nodes[2].HTTP)
	shell.WaitDelay = time.Second
	var out, errs bytes.Buffer
	shell.Stdout, shell.Stderr = &out, &errs
	if err := shell.Run(); err != nil {
		t.Fatalf("the README's commands: %v\n%s%s", err, out.String(), errs.String())
	}
	t.Logf("%s", errs.String())
	// What was sent comes out, to billing and to audit, and the comparison at the end finds nothing missing.
	for text, times := range map[string]int{`{"id": 1}`: 1, `{"id": 2}`: 2, `{"id": 3}`: 1, "nothing lost\n": 1} {
		if got := strings.Count(out.String(), text); got != times {
			t.Errorf("%q is printed %d times, want %d:\n%s", text, got, times, out.String())
		}
	}
}
