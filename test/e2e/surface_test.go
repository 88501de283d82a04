package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// TestSurface holds a running node against the names that programs outside rely on: paths, fields, headers, metrics, and
// settings from the environment. A line may be added here, never changed or taken away. Flags, commands and exit codes
// are cmd/tercet's TestSurface; that every part of a cluster works is not the question here.
func TestSurface(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	secret := filepath.Join(dir, "zone-timeout")
	if err := os.WriteFile(secret, []byte("3s\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	httpAddr, valkey := harness.FreeAddr(t), harness.FreeAddr(t)
	// No flag but these: a cluster of one node, whose zone is called like the node.
	log := filepath.Join(dir, "log")
	p := harness.StartProcess(t, log, dir, []string{
		"TERCET_NODE_ID=only", "TERCET_DATA=" + filepath.Join(dir, "data"), "TERCET_HTTP=" + httpAddr, "TERCET_PEER=" + harness.FreeAddr(t),
		"TERCET_VALKEY=" + valkey, "TERCET_DURABILITY=all", "TERCET_ZONE_TIMEOUT_FILE=" + secret, "TERCET_REGION=fra1", "TERCET_FLUSH_ALLOWED=true",
		"TERCET_PUSH_ALLOW=127.0.0.0/8", "TERCET_DISK_RESERVE=64MiB", "TERCET_WAL_SEGMENT_SIZE=8MiB", "TERCET_VIRTUAL_CLOCK=true",
		"TERCET_VALKEY_MODE=standalone",
	}, harness.Binary(t), "server")
	cl := harness.NewClient("http://" + httpAddr)
	t.Cleanup(cl.Close)
	harness.Until(t, 20*time.Second, "the node to be ready", func() error {
		if !p.Alive() {
			t.Fatalf("the node ended:\n%s", p.Log())
		}
		if a := cl.Do(t.Context(), "GET", "/readyz", nil, nil); a.Status != http.StatusOK {
			return fmt.Errorf("%v", a)
		}
		return nil
	})

	doc := map[string]string{"Content-Type": "application/json"}
	saved := map[string]string{}
	for _, c := range []struct {
		request string // method and path; $name stands for what an earlier answer had
		header  map[string]string
		body    string
		status  int
		// fields are those of the JSON answer, with the values of some: a.b is b in a, a[] the first of a list. Names with
		// a dollar sign are kept: $name=field.
		fields string
		// headers are those of the answer.
		headers string
	}{
		{"GET /livez", nil, "", 200, "", ""},
		{"GET /readyz", nil, "", 200, "", ""},
		{"GET /", nil, "", 200, "", ""},
		{"GET /metrics/topics?match=*", nil, "", 200, "", ""},
		{"GET /v1/node", nil, "", 200, `id="only" zone="only" role="leader" incarnation appliedIndex stateHash version`, ""},
		{"GET /v1/cluster", nil, "", 200, `clusterId term leader="only" durability="all" inSync[]="only" nodes[].id="only" nodes[].zone="only" ` +
			`nodes[].http nodes[].peer nodes[].valkey nodes[].role="leader" nodes[].inSync=true nodes[].matchIndex`, ""},

		{"POST /api/v3/topic/orders", nil, "one", 201, `$id=messageId`, "Tercet-Zones Tercet-Position Tercet-Term"},
		{"POST /api/v3/topic/orders", map[string]string{"Tercet-Durability": "all", "Authorization": "Bearer anything"}, "two", 201, "messageId", "Tercet-Zones"},
		{"POST /api/v3/topic/or%20ders", nil, "one", 400, `error code outcome="none" hint requestId`, ""},
		{"POST /api/v3/topic/orders/consumer/g", map[string]string{"Accept": "application/x-ndjson", "Tercet-Wait-Seconds": "60"}, "", 200, "messageId receiptHandle", ""},
		{"POST /api/v3/topic/orders/consumer/g", map[string]string{"Accept": "multipart/mixed"}, "", 200, "", "Content-Type"},
		{"POST /api/v3/topic/orders/consumer/g", map[string]string{"Accept": "multipart/mixed", "Tercet-Wait-Seconds": "61"}, "", 400, `code="invalid_header"`, ""},
		{"GET /v1/topics/orders/messages/$id", nil, "", 200, "messageId", ""},

		{"POST /v1/subscriptions", doc, `{"topic":"pushed","consumerGroup":"g","url":"http://127.0.0.1:19999/x","deploymentId":"d1","retryAfterSeconds":5,"initialDelaySeconds":1,"maxConcurrency":2,"maxDeliveries":3}`,
			201, `$sub=id topic="pushed" consumerGroup="g" url="http://127.0.0.1:19999/x" deploymentId="d1" retryAfterSeconds=5 initialDelaySeconds=1 maxConcurrency=2 maxDeliveries=3`, ""},
		// The same three: another takes the place of the first.
		{"POST /v1/subscriptions", doc, `{"topic":"pushed","consumerGroup":"g","url":"http://127.0.0.1:19999/y","deploymentId":"d1"}`, 201, `$sub=id url="http://127.0.0.1:19999/y"`, ""},
		{"GET /v1/subscriptions", nil, "", 200, `subscriptions.#=1 subscriptions[].id="$sub" subscriptions[].url="http://127.0.0.1:19999/y"`, ""},
		{"DELETE /v1/subscriptions/$sub", nil, "", 204, "", ""},
		{"GET /v1/subscriptions", nil, "", 200, `subscriptions.#=0`, ""},
		{"POST /v1/clock/advance", doc, `{"seconds": 1}`, 200, "", ""},

		{"POST /api/messages/produce", doc, `{"name":"n","email":"e@example.com","message":"m"}`, 201, "$form=messageId timestamp", ""},
		{"POST /api/messages/produce", doc, `{"name":"n","message":"m"}`, 400, "error", ""},
		{"GET /api/messages/consume", nil, "", 200, `message.messageId="$form" message.name="n" message.email="e@example.com" message.message="m" message.timestamp message.deliveryCount=1`, ""},
		{"GET /api/messages/consume", nil, "", 200, `message.messageId="$form"`, ""},
		{"GET /api/messages/consume?consumer=another", nil, "", 200, `message=null`, ""},
		{"POST /api/messages/acknowledge", doc, `{"messageId":"$form"}`, 200, "success=true acknowledged=1", ""},
		{"POST /api/messages/acknowledge", doc, `{"messageId":"$form"}`, 200, "success=true acknowledged=0", ""},
		{"GET /api/messages/consume", nil, "", 200, `message=null`, ""},
	} {
		fill := func(s string) string {
			for name, value := range saved {
				s = strings.ReplaceAll(s, "$"+name, value)
			}
			return s
		}
		method, path, _ := strings.Cut(fill(c.request), " ")
		a := cl.Do(t.Context(), method, path, c.header, strings.NewReader(fill(c.body)))
		if a.Status != c.status {
			t.Errorf("%s: %v, want %d", c.request, a, c.status)
			continue
		}
		for name := range strings.FieldsSeq(c.headers) {
			if a.Header.Get(name) == "" {
				t.Errorf("%s: no header %s in %v", c.request, name, a.Header)
			}
		}
		if c.fields == "" {
			continue
		}
		var answer any
		line, _, _ := bytes.Cut(a.Body, []byte("\n")) // of NDJSON the first
		if err := json.Unmarshal(line, &answer); err != nil {
			if err = json.Unmarshal(a.Body, &answer); err != nil {
				t.Errorf("%s: %v in %q", c.request, err, a.Body)
				continue
			}
		}
		for field := range strings.FieldsSeq(c.fields) {
			var keep, want string
			if rest, ok := strings.CutPrefix(field, "$"); ok {
				keep, field, _ = strings.Cut(rest, "=")
			} else {
				field, want, _ = strings.Cut(field, "=")
			}
			got, err := at(answer, field)
			if err != nil {
				t.Errorf("%s: %s: %v in %s", c.request, field, err, a.Body)
				continue
			}
			if keep != "" {
				saved[keep] = fmt.Sprint(got)
			}
			if text, _ := json.Marshal(got); want != "" && string(text) != fill(want) {
				t.Errorf("%s: %s is %s, want %s", c.request, field, text, fill(want))
			}
		}
	}

	// A key that holds a string is no topic.
	nc, err := net.Dial("tcp", valkey)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	_ = nc.SetDeadline(time.Now().Add(2 * time.Minute))
	replies := bufio.NewReader(nc)
	for _, c := range []struct{ command, reply, path string }{
		{"SET string x", "+OK", ""},
		{"GEODIST a b c", "-ERR unknown command", "/api/v3/topic/string"},
		{"FLUSHALL", "+OK", "/api/v3/topic/late"},
	} {
		fmt.Fprintf(nc, "%s\r\n", c.command)
		if reply, err := replies.ReadString('\n'); err != nil || !strings.HasPrefix(reply, c.reply) {
			t.Errorf("%s: %q, %v, want %s", c.command, reply, err, c.reply)
		}
		if c.path == "" {
			continue
		}
		status := http.StatusCreated
		if c.path == "/api/v3/topic/string" {
			status = http.StatusConflict
		}
		if a := cl.Do(t.Context(), "POST", c.path, nil, strings.NewReader("x")); a.Status != status {
			t.Errorf("POST %s after %s: %v, want %d", c.path, c.command, a, status)
		}
	}

	a := cl.Do(t.Context(), "GET", "/metrics", nil, nil)
	for _, series := range []string{
		`tercet_messages{state="ready"}`, `tercet_messages{state="delayed"}`, `tercet_messages{state="inflight"}`, `tercet_messages{state="parked"}`,
		`tercet_publish_total{zones="1"}`, `tercet_insync_zones 1`, `tercet_raft_is_leader 1`, `tercet_wal_fsync_duration_seconds_bucket{`,
		`tercet_request_duration_seconds_bucket{op="send",outcome="ok",`, `tercet_oldest_message_age_seconds`, `tercet_compat_unsupported_total{command="geodist"} 1`,
		`tercet_build_info{`,
	} {
		if !bytes.Contains(a.Body, []byte("\n"+series)) {
			t.Errorf("/metrics has no %s:\n%s", series, grep(a.Body, series))
		}
	}
	if a := cl.Do(t.Context(), "GET", "/metrics/topics?match=late", nil, nil); !bytes.Contains(a.Body, []byte(`topic="late"`)) {
		t.Errorf("/metrics/topics?match=late: %s", a.Body)
	}
}

// grep returns the lines of a series' family.
func grep(metrics []byte, series string) string {
	name, _, _ := strings.Cut(series, "{")
	var b strings.Builder
	for line := range strings.Lines(string(metrics)) {
		if strings.HasPrefix(line, strings.TrimSuffix(strings.Fields(name)[0], "_bucket")) {
			b.WriteString(line)
		}
	}
	return b.String()
}

// at returns what stands at a path of a JSON document: names joined by dots, [] behind one for the first of its list, and
// # for the number of a list's entries.
func at(doc any, path string) (any, error) {
	for name := range strings.SplitSeq(path, ".") {
		if name == "#" {
			list, ok := doc.([]any)
			if !ok {
				return nil, fmt.Errorf("%v is no list", doc)
			}
			doc = float64(len(list))
			continue
		}
		name, list := strings.CutSuffix(name, "[]")
		object, ok := doc.(map[string]any)
		if !ok {
			return nil, fmt.Errorf("%v is no object", doc)
		}
		if doc, ok = object[name]; !ok {
			return nil, fmt.Errorf("there is no %s", name)
		}
		if !list {
			continue
		}
		entries, ok := doc.([]any)
		if !ok || len(entries) == 0 {
			return nil, fmt.Errorf("%s is %v, want a list of something", name, doc)
		}
		doc = entries[0]
	}
	return doc, nil
}
