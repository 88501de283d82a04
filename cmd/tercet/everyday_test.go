package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server"
	"tercet.dev/tercet/server/wire"
)

// startNode runs a cluster of one in this process and returns its URL.
func startNode(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	node, err := raft.Start(t.Context(), raft.Config{
		Name: "n1", Zone: "a", Dir: t.TempDir(), PeerAddr: l.Addr().String(), PeerListeners: []net.Listener{l},
		WALSegmentSize: 4 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { node.Close() })
	srv, err := server.New(server.Options{Backend: node})
	if err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(srv)
	t.Cleanup(web.Close)
	await(t, "a leader", func() bool { return node.Ready() == nil })
	return web.URL
}

// await waits for a condition.
func await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for timeout := time.After(2 * time.Minute); !holds(); {
		select {
		case <-tick.C:
		case <-timeout:
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// cli runs commands against one server.
type cli struct {
	t   *testing.T
	url string
}

func (c cli) run(args ...string) (code int, stdout, stderr string) {
	return c.pipe("", args...)
}

func (c cli) pipe(stdin string, args ...string) (code int, stdout, stderr string) {
	c.t.Helper()
	return invoke(stdin, append(args, "--server", c.url)...)
}

// must runs a command that has to succeed and returns its output.
func (c cli) must(args ...string) string {
	c.t.Helper()
	code, out, stderr := c.run(args...)
	if code != 0 {
		c.t.Fatalf("%q: exit %d\n%s%s", args, code, out, stderr)
	}
	return out
}

// fails runs a command that has to end with the exit code and returns what it wrote to stderr.
func (c cli) fails(code int, args ...string) string {
	c.t.Helper()
	got, out, stderr := c.run(args...)
	if got != code {
		c.t.Fatalf("%q: exit %d, want %d\n%s%s", args, got, code, out, stderr)
	}
	return stderr
}

// messages decodes what receive -o json printed.
func messages(t *testing.T, out string) []wire.Message {
	t.Helper()
	var all []wire.Message
	for dec := json.NewDecoder(strings.NewReader(out)); ; {
		var m wire.Message
		if err := dec.Decode(&m); err == io.EOF {
			return all
		} else if err != nil {
			t.Fatalf("%v in %q", err, out)
		}
		all = append(all, m)
	}
}

// TestSendIsStoredOnce: the connection ends under the request although the message was stored. It is sent again, and
// stored once.
func TestSendIsStoredOnce(t *testing.T) {
	c := cli{t, startNode(t)}
	target, err := url.Parse(c.url)
	if err != nil {
		t.Fatal(err)
	}
	requests := 0
	cutting := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests++
		if requests > 1 {
			httputil.NewSingleHostReverseProxy(target).ServeHTTP(w, r)
			return
		}
		answer := httptest.NewRecorder()
		httputil.NewSingleHostReverseProxy(target).ServeHTTP(answer, r)
		if answer.Code != http.StatusCreated {
			t.Errorf("the first send is answered %d", answer.Code)
		}
		panic(http.ErrAbortHandler)
	}))
	defer cutting.Close()
	code, out, stderr := invoke("", "send", "once", "x", "--server", cutting.URL)
	if code != 0 || requests != 2 {
		t.Fatalf("exit %d after %d requests: %s%s", code, requests, out, stderr)
	}
	if got := messages(t, c.must("receive", "once", "--max", "0", "--ack", "-o", "json")); len(got) != 1 {
		t.Errorf("%d messages came out, want 1", len(got))
	}
	// Under a key of the caller's, sending again is no second message.
	for range 2 {
		c.must("send", "keyed", "x", "--idempotency-key", "k-1")
	}
	if got := messages(t, c.must("receive", "keyed", "--max", "0", "--ack", "-o", "json")); len(got) != 1 {
		t.Errorf("%d messages came out under one key, want 1", len(got))
	}
}

// TestEveryday walks a message through the commands of every day.
func TestEveryday(t *testing.T) {
	c := cli{t, startNode(t)}

	id := strings.TrimSpace(c.must("send", "orders", `{"id": 1}`))
	if id == "" {
		t.Fatal("no message id")
	}
	var s sent
	if err := json.Unmarshal([]byte(c.must("send", "orders", "text", "--header", "X-Origin: here", "-o", "json")), &s); err != nil || s.MessageID == "" || s.Zones != 1 {
		t.Errorf("sent %+v, %v", s, err)
	}
	if code, out, stderr := c.pipe("\xff\x00 from stdin", "send", "orders"); code != 0 || out == "" {
		t.Fatalf("exit %d, %s", code, stderr)
	}

	if out := c.must("peek", "orders"); out != "{\"id\": 1}\ntext\n\xff\x00 from stdin\n" {
		t.Errorf("peek printed %q", out)
	}
	if out := c.must("peek", "orders", "--from", "1", "--max", "1"); out != "text\n" {
		t.Errorf("peek --from printed %q", out)
	}
	if out := c.must("peek", "orders", "--group", "billing"); out != "{\"id\": 1}\ntext\n\xff\x00 from stdin\n" {
		t.Errorf("peek --group printed %q", out)
	}

	// Without --ack the way to settle it is on stderr, ready to be pasted.
	code, out, stderr := c.run("receive", "orders", "--group", "billing", "--lease", "5m")
	if code != 0 || out != "{\"id\": 1}\n" {
		t.Fatalf("exit %d, %q, %q", code, out, stderr)
	}
	paste := regexp.MustCompile(`tercet (ack orders --group billing \S+)`).FindStringSubmatch(stderr)
	if paste == nil || !strings.Contains(stderr, id) {
		t.Fatalf("stderr %q", stderr)
	}
	c.must(strings.Fields(paste[1])...)
	c.fails(exitNotFound, strings.Fields(paste[1])...)

	got := messages(t, c.must("receive", "orders", "--group", "billing", "--max", "5", "-o", "json"))
	if len(got) != 2 || string(got[0].Body) != "text" || got[0].ContentType != "text/plain; charset=utf-8" || got[0].DeliveryCount != 1 ||
		string(got[1].Body) != "\xff\x00 from stdin" || got[1].ContentType != "application/octet-stream" {
		t.Fatalf("received %+v", got)
	}
	if h := got[0].Headers; len(h) != 1 {
		t.Errorf("headers %v", h)
	}
	c.must("extend", "orders", "--group", "billing", "--lease", "10m", got[0].ReceiptHandle)
	c.must("release", "orders", "--group", "billing", got[0].ReceiptHandle)
	c.fails(exitPrecondition, "extend", "orders", "--group", "billing", "--lease", "10m", got[0].ReceiptHandle)
	again := messages(t, c.must("receive", "orders", "--group", "billing", "-o", "json"))
	if len(again) != 1 || again[0].MessageID != got[0].MessageID || again[0].DeliveryCount != 2 {
		t.Fatalf("received again %+v", again)
	}
	// One good receipt of two: the good one is settled, the exit code tells of the other.
	code, out, _ = c.run("ack", "orders", "--group", "billing", got[0].ReceiptHandle, again[0].ReceiptHandle)
	if code != exitPrecondition || out != "acknowledged\n" {
		t.Errorf("exit %d, %q", code, out)
	}
	c.must("ack", "orders", "--group", "billing", got[1].ReceiptHandle)
	if stderr := c.fails(exitOK, "receive", "orders", "--group", "billing"); !strings.Contains(stderr, "no messages") {
		t.Errorf("stderr %q", stderr)
	}
	// Another group has seen nothing of all that.
	if out := c.must("receive", "orders", "--group", "audit", "--max", "0", "--ack"); out != "{\"id\": 1}\ntext\n\xff\x00 from stdin\n" {
		t.Errorf("audit received %q", out)
	}
}

func TestMistakes(t *testing.T) {
	c := cli{t, startNode(t)}
	for _, x := range []struct {
		code int
		want string
		args []string
	}{
		{exitUsage, "name", []string{"send", "no such topic", "x"}},
		{exitUsage, "--retention", []string{"send", "t", "x", "--retention", "1s"}},
		{exitUsage, "whole seconds", []string{"send", "t", "x", "--delay", "1500ms"}},
		{exitUsage, "--delay 200h0m0s: want 0s to 168h0m0s", []string{"send", "t", "x", "--delay", "200h"}},
		{exitUsage, "--durability", []string{"send", "t", "x", "--durability", "most"}},
		{exitUsage, "--header", []string{"send", "t", "x", "--header", "novalue"}},
		{exitUsage, "--batch", []string{"send", "t", "x", "--batch", "101"}},
		{exitUsage, "--inflight", []string{"send", "t", "x", "--inflight", "0"}},
		{exitUsage, "--idempotency-key", []string{"send", "t", "--jsonl", "--idempotency-key", "k"}},
		{exitUsage, "leave MESSAGE out", []string{"send", "t", "x", "--jsonl"}},
		{exitUsage, "--max", []string{"receive", "t", "--max", "-1"}},
		{exitUsage, "--wait", []string{"receive", "t", "--wait", "61s"}},
		{exitUsage, "--lease", []string{"receive", "t", "--lease", "2h"}},
		{exitUsage, "exclude each other", []string{"receive", "t", "--ack", "--exec", "true"}},
		{exitUsage, "--parallel", []string{"receive", "t", "--parallel", "0"}},
		{exitUsage, "arg", []string{"ack", "t"}},
		{exitUsage, "--lease", []string{"extend", "t", "r", "--lease", "0s"}},
		{exitUsage, "--max", []string{"peek", "t", "--max", "0"}},
		{exitUsage, "--max", []string{"peek", "t", "--group", "g", "--max", "11"}},
		{exitUsage, "exclude each other", []string{"peek", "t", "--group", "g", "--from", "1"}},
		{exitUsage, "receipt", []string{"ack", "t", "nonsense"}},
		{exitUsage, "--timeout", []string{"peek", "t", "--timeout", "-1s"}},
		{exitNotFound, "", []string{"cluster", "remove", "n9"}},
		{exitNotFound, "no such directory", []string{"wal", "verify", "--data", "/nonexistent"}},
		{exitUsage, "--data", []string{"cluster", "recover"}},
	} {
		args := x.args
		if x.args[0] != "wal" && !(x.args[0] == "cluster" && x.args[1] == "recover") {
			args = append(args[:len(args):len(args)], "--server", c.url)
		}
		code, out, stderr := invoke("", args...)
		if code != x.code || out != "" || !strings.Contains(stderr, x.want) {
			t.Errorf("%q: exit %d, want %d, stdout %q, stderr %q", x.args, code, x.code, out, stderr)
		}
	}
}

// TestDrain receives everything there is with several requests at once: each message is printed once.
func TestDrain(t *testing.T) {
	c := cli{t, startNode(t)}
	const n = 1000
	if code, _, stderr := c.pipe(numbered(n), "send", "lines", "--jsonl"); code != 0 {
		t.Fatal(stderr)
	}
	out := c.must("receive", "lines", "--max", "0", "--ack", "--parallel", "8")
	seen := map[string]int{}
	for line := range strings.Lines(out) {
		seen[line]++
	}
	for i := range n {
		if seen[fmt.Sprintf("{\"n\":%d}\n", i)] != 1 {
			t.Fatalf("line %d was printed %d times", i, seen[fmt.Sprintf("{\"n\":%d}\n", i)])
		}
	}
	if len(seen) != n {
		t.Errorf("%d different lines", len(seen))
	}
	// A bounded receive takes no more than asked for, whatever the number of requests.
	out = c.must("receive", "lines", "--group", "other", "--max", "25", "--parallel", "8", "--ack")
	if got := strings.Count(out, "\n"); got != 25 {
		t.Errorf("%d messages, want 25", got)
	}
	rest := c.must("receive", "lines", "--group", "other", "--max", "0", "--parallel", "4", "--ack")
	if got := strings.Count(rest, "\n"); got != n-25 {
		t.Errorf("%d messages left, want %d", got, n-25)
	}
}

func TestExec(t *testing.T) {
	c := cli{t, startNode(t)}
	c.must("send", "jobs", "one")
	c.must("send", "jobs", "two")
	dir := t.TempDir()
	script := fmt.Sprintf(`cat > %s/$TERCET_MESSAGE_ID; echo "$TERCET_TOPIC $TERCET_GROUP $TERCET_DELIVERY_COUNT $TERCET_CONTENT_TYPE"`, dir)
	if out := c.must("receive", "jobs", "--group", "g", "--exec", script); out != "jobs g 1 text/plain; charset=utf-8\n" {
		t.Errorf("the command printed %q", out)
	}
	files, err := filepath.Glob(dir + "/*")
	if err != nil || len(files) != 1 {
		t.Fatalf("files %v, %v", files, err)
	}
	if body, err := os.ReadFile(files[0]); err != nil || string(body) != "one" {
		t.Errorf("the command was given %q, %v", body, err)
	}
	// A failing command gives the message back, once in a run, and the run ends.
	stderr := c.fails(exitFailure, "receive", "jobs", "--group", "g", "--max", "0", "--exec", "exit 7")
	if !strings.Contains(stderr, "exit status 7; released") {
		t.Errorf("stderr %q", stderr)
	}
	got := messages(t, c.must("receive", "jobs", "--group", "g", "-o", "json", "--max", "0", "--ack"))
	if len(got) != 1 || string(got[0].Body) != "two" || got[0].DeliveryCount < 2 {
		t.Errorf("left: %+v", got)
	}
}

// TestExecProlongs: the lease is extended while the command runs, so that its acknowledgement counts.
func TestExecProlongs(t *testing.T) {
	c := cli{t, startNode(t)}
	c.must("send", "jobs", "slow")
	c.must("receive", "jobs", "--lease", "1s", "--exec", "sleep 2")
	if stderr := c.fails(exitOK, "receive", "jobs", "--wait", "1s"); !strings.Contains(stderr, "no messages") {
		t.Errorf("it came again: %q", stderr)
	}
}

// writer is a goroutine-safe buffer.
type writer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (w *writer) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

func (w *writer) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

// TestTail follows a topic from before it exists until an interrupt, which is no failure.
func TestTail(t *testing.T) {
	c := cli{t, startNode(t)}
	var out, stderr writer
	signals := make(chan os.Signal, 1)
	a := newApp(strings.NewReader(""), &out, &stderr, signals)
	ended := make(chan int)
	go func() { ended <- a.run([]string{"tail", "news", "--server", c.url}) }()
	c.must("send", "news", "first")
	await(t, "the first message", func() bool { return out.String() == "first\n" })
	for i := range 150 {
		c.must("send", "news", fmt.Sprint(i))
	}
	await(t, "the others", func() bool { return strings.HasSuffix(out.String(), "\n149\n") })
	signals <- os.Interrupt
	if code := <-ended; code != 0 {
		t.Errorf("exit %d: %s", code, stderr.String())
	}
	if got := strings.Count(out.String(), "\n"); got != 151 {
		t.Errorf("%d lines", got)
	}

	// --last begins before the end.
	out = writer{}
	go func() { ended <- a.run([]string{"tail", "news", "--last", "2", "--server", c.url}) }()
	await(t, "the last two", func() bool { return out.String() == "148\n149\n" })
	signals <- os.Interrupt
	<-ended
}

func TestClusterStatus(t *testing.T) {
	c := cli{t, startNode(t)}
	out := c.must("cluster", "status")
	for _, want := range []string{"leader n1", "durability in-sync", "in sync: a", "NODE", "n1", "leader", "yes"} {
		if !strings.Contains(out, want) {
			t.Errorf("status lacks %q:\n%s", want, out)
		}
	}
	var doc wire.Cluster
	if err := json.Unmarshal([]byte(c.must("cluster", "status", "-o", "json")), &doc); err != nil || doc.Leader != "n1" || len(doc.Nodes) != 1 {
		t.Errorf("%+v, %v", doc, err)
	}
}

// TestServerCommand runs `tercet server` as its process does, and reads its log afterwards.
func TestServerCommand(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	signals := make(chan os.Signal, 2)
	var stderr writer
	a := newApp(strings.NewReader(""), io.Discard, &stderr, signals)
	ended := make(chan int)
	go func() {
		ended <- a.run([]string{"server", "--node-id", "n1", "--data", dir, "--http", addr, "--peer", "127.0.0.1:0", "--wal-segment-size", "4MiB", "--log-level", "error"})
	}()
	c := cli{t, "http://" + addr}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	await(t, "readiness", func() bool {
		resp, err := client.Get(c.url + "/readyz")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	resp, err := client.Get(c.url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	metrics, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\ntercet_build_info{", "\ntercet_insecure 0\n", "\ntercet_insync_zones 1\n", "\ngo_goroutines "} {
		if !strings.Contains(string(metrics), want) {
			t.Errorf("metrics lack %q", want)
		}
	}
	c.must("send", "orders", "kept")
	signals <- os.Interrupt
	if code := <-ended; code != 0 {
		t.Fatalf("exit %d: %s", code, stderr.String())
	}

	out := cli{t, ""}.offline("wal", "verify", "--data", dir)
	if !strings.Contains(out, "sound") || !strings.Contains(out, "shard 0: entries ") {
		t.Errorf("verify says\n%s", out)
	}
	out = cli{t, ""}.offline("wal", "dump", "--data", dir, "--kind", "entry")
	if !strings.Contains(out, " commands  ") || strings.Contains(out, "kept") {
		t.Errorf("dump says\n%s", out)
	}
	// Recovery says what it would do, and does it when told so; a cluster of one loses nobody.
	code, out, stderr2 := invoke("", "cluster", "recover", "--data", dir)
	if code != exitPrecondition || !strings.Contains(stderr2, "--force") || !strings.Contains(out, "committed") {
		t.Errorf("exit %d\n%s%s", code, out, stderr2)
	}
	damage(t, dir)
	code, out, stderr2 = invoke("", "wal", "verify", "--data", dir)
	if code != exitPrecondition || strings.Contains(out, "sound\n") || !strings.Contains(stderr2, "tercet cluster replace") {
		t.Errorf("after damage: exit %d\n%s%s", code, out, stderr2)
	}
}

// offline runs a command that needs no server.
func (c cli) offline(args ...string) string {
	c.t.Helper()
	code, out, stderr := invoke("", args...)
	if code != 0 {
		c.t.Fatalf("%q: exit %d\n%s%s", args, code, out, stderr)
	}
	return out
}

// damage flips a bit in the middle of the first segment's records.
func damage(t *testing.T, dir string) {
	t.Helper()
	var report struct {
		Segments []struct {
			File string
			End  int64
		}
	}
	if err := json.Unmarshal([]byte(cli{t, ""}.offline("wal", "verify", "--data", dir, "-o", "json")), &report); err != nil {
		t.Fatal(err)
	}
	s := report.Segments[0]
	path := s.File
	if !filepath.IsAbs(path) {
		path = filepath.Join(dir, "wal", filepath.Base(path))
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, s.End/8); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, s.End/8); err != nil {
		t.Fatal(err)
	}
}
