package e2e

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// sourceLines makes one JSON line per file of the Go toolchain's own source: path, size and hash. The tree is walked
// again, with another copy number, until there are enough lines.
func sourceLines(t *testing.T, count int) [][]byte {
	t.Helper()
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatalf("go env GOROOT: %v", err)
	}
	root := filepath.Join(strings.TrimSpace(string(out)), "src")
	type file struct {
		Path   string `json:"path"`
		Size   int    `json:"size"`
		SHA256 string `json:"sha256"`
		Copy   int    `json:"copy"`
	}
	var files []file
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(content)
		files = append(files, file{Path: rel, Size: len(content), SHA256: hex.EncodeToString(sum[:])})
		return nil
	})
	if err != nil || len(files) == 0 {
		t.Fatalf("%d files below %s: %v", len(files), root, err)
	}
	lines := make([][]byte, 0, count)
	for i := 0; len(lines) < count; i++ {
		f := files[i%len(files)]
		f.Copy = i / len(files)
		line, err := json.Marshal(f)
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, line)
	}
	t.Logf("%d lines from %d files below %s", len(lines), len(files), root)
	return lines
}

// TestRealInput pipes the lines through `tercet send --jsonl`, kills the leader midway, receives them with two
// groups, and compares: nothing is lost and nothing is there twice. What the leader took with it was sent again under its
// keys.
func TestRealInput(t *testing.T) {
	lines := sourceLines(t, harness.Scale(100_000, 400_000))
	c := harness.Start(t, harness.Options{})
	// The leader comes first and gets all requests: a follower would hold them through the election, and the sender would
	// not notice.
	followers, leader := c.Followers()
	urls := []string{leader.URL()}
	for _, n := range followers {
		urls = append(urls, n.URL())
	}
	servers := strings.Join(urls, ",")

	send := exec.CommandContext(t.Context(), harness.Binary(t), "send", "source", "--jsonl", "-o", "json", "--server", servers)
	send.Env = harness.Environment()
	stdin, err := send.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	send.Stdout, send.Stderr = &stdout, &stderr
	if err := send.Start(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	w := bufio.NewWriterSize(stdin, 64<<10)
	for i, line := range lines {
		if i == len(lines)/2 {
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			leader.Kill()
			t.Logf("killed the leader %s when %d lines were in the pipe, after %v", leader.ID, i, time.Since(start).Round(time.Millisecond))
		}
		w.Write(line)
		w.WriteByte('\n') // errors stay until Flush
	}
	if err := w.Flush(); err != nil {
		t.Errorf("write the input: %v", err)
	}
	stdin.Close()
	if err := send.Wait(); err != nil {
		t.Fatalf("tercet send: %v\n%s%s", err, stdout.String(), stderr.String())
	}
	var sum struct {
		Lines, Sent, Refused, Unsent, Repeated, Zones int
	}
	if err := json.Unmarshal(bytes.TrimSpace(stdout.Bytes()), &sum); err != nil {
		t.Fatalf("tercet send printed %q: %v", stdout.String(), err)
	}
	t.Logf("sent in %v: %+v\n%s", time.Since(start).Round(time.Millisecond), sum, stderr.String())
	if sum.Lines != len(lines) || sum.Sent != len(lines) || sum.Refused+sum.Unsent != 0 {
		t.Errorf("%+v, want all %d lines sent", sum, len(lines))
	}
	if sum.Repeated == 0 {
		t.Error("no line was on its way to the leader when it died: this shows nothing of keys")
	}
	leader.Start()
	c.WaitInSync(c.Zones()...)

	type result struct {
		group string
		got   map[string][]receivedLine
		err   error
	}
	results := make(chan result, 2)
	start = time.Now()
	for _, group := range []string{"first", "second"} {
		go func() {
			got, err := receiveLines(t, servers, "source", group)
			results <- result{group, got, err}
		}()
	}
	for range 2 {
		r := <-results
		if r.err != nil {
			t.Errorf("group %s: %v", r.group, r.err)
			continue
		}
		var lost, redelivered, storedTwice int
		for _, line := range lines {
			ds := r.got[string(line)]
			if len(ds) == 0 {
				if lost++; lost <= 5 {
					t.Errorf("group %s: lost: %s", r.group, line)
				}
				continue
			}
			ids := map[string]bool{}
			for _, d := range ds {
				ids[d.id] = true
			}
			storedTwice += len(ids) - 1
			redelivered += len(ds) - len(ids)
			delete(r.got, string(line))
		}
		for line := range r.got {
			t.Errorf("group %s: nobody sent %q", r.group, line)
		}
		t.Logf("group %s, after %v: %d lines lost, %d stored twice, %d delivered twice",
			r.group, time.Since(start).Round(time.Millisecond), lost, storedTwice, redelivered)
		if lost > 0 {
			t.Errorf("group %s: %d lines are lost", r.group, lost)
		}
		if storedTwice > 0 {
			t.Errorf("group %s: %d lines are stored twice, although each has a key", r.group, storedTwice)
		}
		if redelivered > 0 {
			t.Errorf("group %s: %d messages were delivered twice by a healthy cluster to consumers that acknowledge in time", r.group, redelivered)
		}
	}
	c.EqualHashes()
}

type receivedLine struct {
	id    string
	count int
}

// receiveLines runs `tercet receive` until the group has everything, and returns what it printed by line.
func receiveLines(t *testing.T, servers, topic, group string) (map[string][]receivedLine, error) {
	cmd := exec.CommandContext(t.Context(), harness.Binary(t), "receive", topic, "--group", group, "--max", "0", "--ack",
		"--wait", "2s", "--parallel", "8", "-o", "json", "--server", servers)
	cmd.Env = harness.Environment()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	got := map[string][]receivedLine{}
	dec := json.NewDecoder(stdout)
	for {
		var m struct {
			MessageID     string
			DeliveryCount int
			Body          []byte
		}
		if err = dec.Decode(&m); err != nil {
			break
		}
		got[string(m.Body)] = append(got[string(m.Body)], receivedLine{m.MessageID, m.DeliveryCount})
	}
	if werr := cmd.Wait(); werr != nil {
		return nil, fmt.Errorf("tercet receive: %w\n%s", werr, stderr.String())
	}
	if !errors.Is(err, io.EOF) {
		return nil, err
	}
	return got, nil
}
