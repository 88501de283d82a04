package server

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// TestReference checks that docs/http.md names every header of the protocol, every metric, operation and outcome.
func TestReference(t *testing.T) {
	page, err := os.ReadFile("../docs/http.md")
	if err != nil {
		t.Fatal(err)
	}
	named := func(what, name string) {
		t.Helper()
		if !strings.Contains(string(page), name) {
			t.Errorf("docs/http.md does not name the %s %s", what, name)
		}
	}
	file, err := parser.ParseFile(token.NewFileSet(), "wire/wire.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	ast.Inspect(file, func(node ast.Node) bool {
		spec, ok := node.(*ast.ValueSpec)
		if !ok || !strings.HasPrefix(spec.Names[0].Name, "Header") && !strings.HasPrefix(spec.Names[0].Name, "Media") {
			return true
		}
		value, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		if value != mediaJSON {
			named("header or media type", value)
		}
		n++
		return true
	})
	if n < 20 {
		t.Errorf("only %d constants were found", n)
	}
	for _, name := range opNames {
		named("operation", "`"+name+"`")
	}
	for _, name := range outcomeNames {
		named("outcome", "`"+name+"`")
	}
	registry := prometheus.NewRegistry()
	if _, err := New(Options{Backend: &fakeBackend{}, Registerer: registry, Gatherer: registry}); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		named("metric", f.GetName())
	}
}

// TestLimitsPage checks the node's own bounds in docs/limits.md against the defaults.
func TestLimitsPage(t *testing.T) {
	page, err := os.ReadFile("../docs/limits.md")
	if err != nil {
		t.Fatal(err)
	}
	var l Limits
	l.setDefaults()
	for what, value := range map[string]string{
		"open connections":                                     strconv.Itoa(l.Connections),
		"open connections from one address":                    strconv.Itoa(l.ConnectionsPerAddr),
		"commands in progress":                                 strconv.Itoa(l.Requests),
		"receives that wait for messages":                      strconv.Itoa(l.Waits),
		"bytes of request bodies and answers in memory":        strconv.FormatInt(l.InflightBytes>>20, 10) + " MiB",
		"headers of a request":                                 strconv.Itoa(headerCountMax) + " names",
		"application headers of one message":                   strconv.Itoa(messageHeadersMax),
		"head of a request":                                    strconv.Itoa((headerBytesMax+4<<10)>>10) + " KiB",
		"body of a visibility change":                          strconv.Itoa(extendBodyMax>>10) + " KiB",
		"body of an administrative request":                    strconv.Itoa(adminBodyMax>>10) + " KiB",
		"time for the head of a request":                       strconv.FormatFloat(l.HeaderTimeout.Seconds(), 'f', -1, 64) + " s",
		"time between two requests":                            strconv.FormatFloat(l.IdleTimeout.Minutes(), 'f', -1, 64) + " min",
		"time until a body begins":                             strconv.FormatFloat(l.BodyTimeout.Seconds(), 'f', -1, 64) + " s",
		"slowest body, slowest reader":                         strconv.FormatInt(l.TransferRate>>10, 10) + " KiB/s after " + strconv.FormatFloat(l.TransferGrace.Seconds(), 'f', -1, 64) + " s",
		"time for a command, through an election for instance": strconv.FormatFloat(l.RequestTimeout.Seconds(), 'f', -1, 64) + " s, and the wait of a receive",
		"items of a page in `/v1`":                             strconv.Itoa(pageMax),
		"topics of one scrape of `/metrics/topics`":            strconv.Itoa(topicMetricsMax),
	} {
		if !regexp.MustCompile(`(?m)^\| ` + regexp.QuoteMeta(what) + ` \| ` + regexp.QuoteMeta(value) + ` \|`).Match(page) {
			t.Errorf("docs/limits.md does not say that %s: %s", what, value)
		}
	}
}
