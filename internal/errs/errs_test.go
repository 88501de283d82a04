package errs

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the table in docs/errors.md")

const page = "../../docs/errors.md"

// TestPage keeps docs/errors.md equal to the catalogue.
func TestPage(t *testing.T) {
	var table bytes.Buffer
	table.WriteString("| code | status | on send and batch | outcome | meaning | way out |\n| --- | --- | --- | --- | --- | --- |\n")
	for _, c := range Codes() {
		info := c.Info()
		publish := info.Status
		if info.Outcome == None && publish == 503 {
			publish = 429
		}
		fmt.Fprintf(&table, "| `%s` | %d | %d | %s | %s | %s |\n", info.Name, info.Status, publish, info.Outcome, info.Text, info.Hint)
	}
	old, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := bytes.Cut(old, []byte("<!-- catalogue -->\n"))
	_, after, ok2 := bytes.Cut(rest, []byte("<!-- end -->\n"))
	if !ok1 || !ok2 {
		t.Fatal("docs/errors.md has lost its markers")
	}
	want := bytes.Join([][]byte{before, []byte("<!-- catalogue -->\n"), table.Bytes(), []byte("<!-- end -->\n"), after}, nil)
	if *update {
		if err := os.WriteFile(page, want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if !bytes.Equal(old, want) {
		t.Errorf("docs/errors.md is not the catalogue: go test ./internal/errs -update")
	}
}

// TestCatalogue checks what every entry needs.
func TestCatalogue(t *testing.T) {
	seen := map[string]Code{}
	for _, c := range Codes() {
		info := c.Info()
		if other, twice := seen[info.Name]; twice || info.Name == "" {
			t.Errorf("code %d: name %q is taken by %d", c, info.Name, other)
		}
		seen[info.Name] = c
		if strings.ToLower(info.Name) != info.Name || strings.Trim(info.Name, "abcdefghijklmnopqrstuvwxyz_") != "" {
			t.Errorf("%s: not in snake case", info.Name)
		}
		if info.Text == "" || info.Hint == "" || info.Status < 400 || info.Status > 599 || info.Status == 502 {
			t.Errorf("%s: incomplete: %+v", info.Name, info)
		}
		// A 4xx means "did not happen", always.
		if info.Outcome == Unknown && info.Status < 500 || info.Outcome != None && info.Outcome != Unknown {
			t.Errorf("%s: status %d with outcome %q", info.Name, info.Status, info.Outcome)
		}
		if found, ok := ByName(info.Name); !ok || found != c {
			t.Errorf("%s: found by its name as %v", info.Name, found)
		}
	}
	if Code(60000).Info().Name != "internal" {
		t.Error("a code from the future is not read as internal")
	}
}

// TestNumbers: codes stand in the log as numbers. A changed one would make replicas disagree.
func TestNumbers(t *testing.T) {
	for want, c := range map[int]Code{1: InvalidName, 7: Unsupported, 12: MessageNotFound, 20: ConcurrencyLimit, 24: NoLeader, 29: OutcomeUnknown, 39: Internal, 40: MisdirectedHost} {
		if int(c) != want {
			t.Errorf("%s is %d and was %d", c, c, want)
		}
	}
}

func TestError(t *testing.T) {
	cause := errors.New("disk on fire")
	e := New(DiskFull, "node %s is full", "n2").With(cause)
	e.RetryAfter = time.Second
	wrapped := fmt.Errorf("publish: %w", e)
	switch {
	case e.Text() != "node n2 is full", e.Error() != "node n2 is full: disk on fire":
		t.Errorf("text %q, error %q", e.Text(), e)
	case !errors.Is(wrapped, Of(DiskFull)), errors.Is(wrapped, Of(NoLeader)), !errors.Is(wrapped, cause):
		t.Error("errors.Is does not match by code and cause")
	case From(wrapped) != e, CodeOf(wrapped) != DiskFull, CodeOf(nil) != OK, From(nil) != nil:
		t.Error("From and CodeOf lose the code")
	case CodeOf(cause) != Internal, From(cause).Outcome() != Unknown, From(cause).Text() == cause.Error():
		t.Error("a foreign error must be internal, of unknown outcome, and not shown")
	case Of(NoLeader).Text() != NoLeader.Info().Text:
		t.Error("an error without a message has the catalogue's text")
	}
}
