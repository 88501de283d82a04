package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"tercet.dev/tercet/internal/limits"
)

// numbered returns n lines of JSON.
func numbered(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "{\"n\":%d}\n", i)
	}
	return b.String()
}

func sendLinesTo(t *testing.T, q *fakeQueue, input string, args ...string) (code int, sum sentLines, stderr string) {
	t.Helper()
	args = append([]string{"send", "topic", "--jsonl", "-o", "json", "--server", q.URL}, args...)
	code, out, stderr := invoke(input, args...)
	if out != "" {
		if err := json.Unmarshal([]byte(out), &sum); err != nil {
			t.Fatalf("stdout %q: %v", out, err)
		}
	}
	return code, sum, stderr
}

func TestSendLines(t *testing.T) {
	q := newFakeQueue(t)
	const n = 12_345
	code, sum, stderr := sendLinesTo(t, q, "\n"+numbered(n)+"\r\n  \n"+`{"last":"without line feed"}`)
	if code != 0 || sum.Sent != n+1 || sum.Lines != n+1 || sum.Zones != 3 || sum.Repeated != 0 || sum.Run == "" {
		t.Fatalf("exit %d, %+v, %s", code, sum, stderr)
	}
	if len(q.bodies) != n+1 || q.bodies[`{"n":17}`] != 1 {
		t.Errorf("%d different bodies are stored", len(q.bodies))
	}
	// Input that is there does not travel in small batches.
	if q.requests > n/50 {
		t.Errorf("%d requests for %d lines", q.requests, n)
	}
}

// TestSendLinesOutcomeUnknown: what may have been stored is sent again, counted, and stored once.
func TestSendLinesOutcomeUnknown(t *testing.T) {
	q := newFakeQueue(t)
	repeated := 0
	q.before = func(request int, bodies []string) (bool, int, string) {
		switch request {
		case 2: // stored, and the answer lost
			repeated += len(bodies)
			return true, http.StatusInternalServerError, "unknown"
		case 4: // not stored, and nobody knows
			repeated += len(bodies)
			return false, http.StatusGatewayTimeout, "unknown"
		}
		return true, 0, ""
	}
	const n = 2000
	code, sum, stderr := sendLinesTo(t, q, numbered(n))
	if code != 0 || sum.Sent != n || sum.Unsent != 0 {
		t.Fatalf("exit %d, %+v, %s", code, sum, stderr)
	}
	for i := range n {
		if times := q.bodies[fmt.Sprintf(`{"n":%d}`, i)]; times != 1 {
			t.Fatalf("line %d is stored %d times", i, times)
		}
	}
	if repeated == 0 || sum.Repeated == 0 || sum.Repeated > repeated {
		t.Errorf("%d lines were on their way twice, %d are owned up to", repeated, sum.Repeated)
	}
}

// TestSendLinesKeys: the same run again adds only what is missing, another one adds everything; --key-field takes the
// key out of the line.
func TestSendLinesKeys(t *testing.T) {
	q := newFakeQueue(t)
	for _, c := range []struct {
		lines int
		args  []string
		want  int // how often the first line is stored then
	}{
		{300, []string{"--run", "r1"}, 1},
		{500, []string{"--run", "r1"}, 1},
		{500, []string{"--run", "r2"}, 2},
		{500, nil, 3},
		{500, nil, 4},
		{500, []string{"--key-field", "n"}, 5},
		{500, []string{"--key-field", "n"}, 5},
	} {
		code, sum, stderr := sendLinesTo(t, q, numbered(c.lines), c.args...)
		if code != 0 || sum.Sent != c.lines {
			t.Fatalf("%v: exit %d, %+v, %s", c.args, code, sum, stderr)
		}
		if got := q.bodies[`{"n":0}`]; got != c.want {
			t.Fatalf("%v: the first line is stored %d times, want %d", c.args, got, c.want)
		}
	}
	if q.keys["r1-500"] != `{"n":499}` || q.keys["17"] != `{"n":17}` {
		t.Errorf("keys: r1-500 has %q, 17 has %q", q.keys["r1-500"], q.keys["17"])
	}

	q = newFakeQueue(t)
	input := `{"id":"a b"}` + "\n" + `{"id":-1.50}` + "\n" + `{"id":""}` + "\n" + `{"id":{}}` + "\n" + `{"other":1}` + "\n" + `[1]` + "\n" +
		`{"id":"x\nVqs-Delay-Seconds: 7"}` + "\n" + `{"id":"` + strings.Repeat("k", limits.IdempotencyKeyBytesMax+1) + `"}` + "\n"
	code, sum, stderr := sendLinesTo(t, q, input, "--key-field", "id")
	if code != exitFailure || sum.Sent != 2 || sum.Refused != 6 || sum.Run != "" {
		t.Errorf("exit %d, %+v, %s", code, sum, stderr)
	}
	if q.keys["a b"] == "" || q.keys["-1.50"] == "" || len(q.keys) != 2 {
		t.Errorf("keys %v", q.keys)
	}
	for _, args := range [][]string{
		{"--run", "r", "--key-field", "id"}, {"--run", "a\nb"}, {"--run", strings.Repeat("r", 256)}, {"--idempotency-key", "k"},
	} {
		if code, _, _ := sendLinesTo(t, q, "1\n", args...); code != exitUsage {
			t.Errorf("%q: exit %d", args, code)
		}
	}
	if code, _, _ := invoke("1\n", "send", "topic", "1", "--run", "r", "--server", q.URL); code != exitUsage {
		t.Errorf("--run without --jsonl: exit %d", code)
	}
}

func TestSendLinesRefused(t *testing.T) {
	q := newFakeQueue(t)
	q.refuse[`{"n":3}`] = true
	input := numbered(5) + "not json\n" + `"` + strings.Repeat("x", limits.MessageBytesMax) + "\"\n" + numbered(1)
	code, sum, stderr := sendLinesTo(t, q, input)
	if code != exitFailure || sum.Lines != 8 || sum.Sent != 5 || sum.Refused != 3 || sum.Unsent != 0 {
		t.Fatalf("exit %d, %+v, %s", code, sum, stderr)
	}
	for _, want := range []string{
		"line 4 was left out: too large for the test", "line 6 was left out: not JSON", "line 7 was left out: longer than 1048576 bytes",
		"3 of 8 lines were refused",
	} {
		if !strings.Contains(stderr, want) {
			t.Errorf("stderr lacks %q: %s", want, stderr)
		}
	}
}

// TestSendLinesGivesUp: an outcome that stays unknown ends with that exit code and says where to go on.
func TestSendLinesGivesUp(t *testing.T) {
	q := newFakeQueue(t)
	q.before = func(request int, bodies []string) (bool, int, string) {
		if request > 2 {
			return false, http.StatusInternalServerError, "unknown"
		}
		return true, 0, ""
	}
	code, sum, stderr := sendLinesTo(t, q, numbered(1000), "--timeout", "1ms", "--inflight", "1", "--run", "r7")
	if code != exitOutcomeUnknown || sum.Sent == 0 || sum.Unsent == 0 || sum.FirstUnsent != sum.Sent+1 {
		t.Fatalf("exit %d, %+v, %s", code, sum, stderr)
	}
	if !strings.Contains(stderr, fmt.Sprintf("line %d the first of them", sum.FirstUnsent)) || !strings.Contains(stderr, "again with --run r7") || !strings.Contains(stderr, "may have been done") {
		t.Errorf("stderr %s", stderr)
	}
}

func TestSendUnreachable(t *testing.T) {
	q := newFakeQueue(t)
	q.Close()
	for _, args := range [][]string{{"send", "topic", "x"}, {"send", "topic", "--jsonl"}, {"receive", "topic"}, {"cluster", "status"}} {
		code, out, stderr := invoke("1\n", append(args, "--server", q.URL, "--timeout", "0s")...)
		if code != exitUnavailable || !strings.Contains(stderr, "tercet dev") {
			t.Errorf("%v: exit %d, stdout %q, stderr %q", args, code, out, stderr)
		}
	}
}

// TestGroup: batches are full when lines are there, and a line on its own is not kept waiting.
func TestGroup(t *testing.T) {
	lines, batches := make(chan line, 250), make(chan []line)
	for i := range 250 {
		lines <- line{i, "", []byte("x")}
	}
	go group(context.Background(), lines, batches, 100)
	for i, want := range []int{100, 100, 50} {
		if b := <-batches; len(b) != want || b[0].number != 100*i {
			t.Fatalf("batch %d has %d lines from %d on", i, len(b), b[0].number)
		}
	}
	lines <- line{number: 250}
	if b := <-batches; len(b) != 1 {
		t.Fatalf("batch of %d", len(b))
	}
	// A large line closes its batch.
	lines <- line{251, "", make([]byte, batchBytesTarget)}
	lines <- line{252, "", []byte("x")}
	if b := <-batches; len(b) != 1 {
		t.Fatalf("batch of %d after a large line", len(b))
	}
	if b := <-batches; len(b) != 1 || b[0].number != 252 {
		t.Fatalf("batch of %d at the end", len(b))
	}
	close(lines)
}
