package server

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"reflect"
	"strings"
	"testing"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

var fakeStatus = raft.Status{
	ID: "n1", Zone: "a", Incarnation: "5f3a", Version: "v1", Role: raft.Leader, AppliedIndex: 42, StateHash: 0xabc,
	ClusterID: "c1", Term: 3, Leader: "n1", InSync: []string{"a", "b"},
	Nodes: []raft.NodeStatus{
		{ID: "n1", Zone: "a", Incarnation: "5f3a", HTTP: "127.0.0.1:7301", Peer: "127.0.0.1:7401", Valkey: "127.0.0.1:6379", Role: raft.Leader, InSync: true, MatchIndex: 42},
		{ID: "n2", Zone: "b", Role: raft.Follower, InSync: true, MatchIndex: 41},
		{ID: "n3", Zone: "<c>", Role: raft.Follower},
	},
}

func TestNodeAndCluster(t *testing.T) {
	var b bytes.Buffer
	backend := &fakeBackend{status: fakeStatus}
	dump(&b, record(t, backend, "GET", "/v1/node", nil))
	dump(&b, record(t, backend, "GET", "/v1/cluster", nil))
	dump(&b, record(t, &fakeBackend{}, "GET", "/v1/cluster", nil))
	golden(t, "cluster.golden", b.Bytes())
}

func TestMembership(t *testing.T) {
	var calls []string
	backend := &fakeBackend{status: fakeStatus, change: func(ctx context.Context, verb, name string) error {
		calls = append(calls, verb+" "+name)
		if name == "n9" {
			return errs.New(errs.Precondition, "n9 is not waiting to join")
		}
		return nil
	}}
	_, base := start(t, Options{Backend: backend})
	for _, c := range []struct {
		method, path, body string
		status             int
	}{
		{"POST", "/v1/cluster/members", `{"id":"n4"}`, 200},
		{"DELETE", "/v1/cluster/members/n2", "", 200},
		{"POST", "/v1/cluster/members/n3/replace", "", 200},
		{"POST", "/v1/cluster/transfer", `{"id":"n2"}`, 200},
		{"POST", "/v1/cluster/transfer", `{}`, 200},
		{"POST", "/v1/cluster/members", `{"id":"n9"}`, 412},
		{"DELETE", "/v1/cluster/members/a%20b", "", 400},
	} {
		r := call(t, c.method, base+c.path, []byte(c.body))
		expect(t, r, c.status, "")
		var cluster wire.Cluster
		if c.status == 200 && (json.Unmarshal(r.body, &cluster) != nil || len(cluster.Nodes) != 3) {
			t.Errorf("%s %s: %v", c.method, c.path, r)
		}
		// Who has leadership handed on is told who leads then.
		if to := map[string]string{`{"id":"n2"}`: "n2", `{}`: "another"}[c.body]; to != "" && cluster.Leader != to {
			t.Errorf("%s leads after %s", cluster.Leader, c.body)
		}
	}
	if got := strings.Join(calls, ", "); got != "add n4, remove n2, replace n3, transfer n2, transfer , add n9" {
		t.Errorf("calls: %s", got)
	}
}

func TestVirtualClock(t *testing.T) {
	backend := &fakeBackend{}
	_, base := start(t, Options{Backend: backend, VirtualClock: true})
	expect(t, call(t, "POST", base+"/v1/clock/advance", []byte(`{"seconds":90061}`)), 200, "")
	if a, ok := backend.last().(*engine.Advance); !ok || a.By.Seconds() != 90061 {
		t.Errorf("proposed %+v", backend.last())
	}
	for _, body := range []string{`{"seconds":-1}`, `{"seconds":1e3}`, `{"seconds":1.5}`, `{"seconds":99999999999}`, `{"minutes":1}`, `[]`} {
		expect(t, call(t, "POST", base+"/v1/clock/advance", []byte(body)), 400, "invalid_body")
	}
	_, base = start(t, Options{Backend: backend})
	expect(t, call(t, "POST", base+"/v1/clock/advance", []byte(`{"seconds":1}`)), 404, "not_found")
}

func TestTopicsAndBrowse(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t)})
	expect(t, call(t, "GET", base+"/v1/topics/none", nil), 404, "topic_not_found")
	expect(t, call(t, "GET", base+"/v1/topics/none/messages", nil), 404, "topic_not_found")
	for _, topic := range []string{"a", "b", "c"} {
		for i := range 5 {
			sendMessage(t, base, topic, []byte{byte(i)}, "X-A", "1")
		}
	}
	receiveMessages(t, base, "a", "g1", wire.MediaMultipart, wire.HeaderMaxMessages, "2")
	receiveMessages(t, base, "a", "g2", wire.MediaMultipart)
	expect(t, call(t, "GET", base+"/v1/topics/a/groups/none", nil), 404, "group_not_found")

	get := func(path string, document any) {
		t.Helper()
		r := call(t, "GET", base+path, nil)
		expect(t, r, 200, "")
		if err := json.Unmarshal(r.body, document); err != nil {
			t.Fatalf("%v: %s", err, r.body)
		}
	}
	var names []string
	for after, more := "", true; more; {
		var page wire.Topics
		get("/v1/topics?limit=2&after="+after, &page)
		for _, topic := range page.Topics {
			names = append(names, topic.Name)
			if topic.Published != 5 || topic.NextOffset-topic.FirstOffset != 5 || !isoTime.MatchString(topic.OldestAt) {
				t.Errorf("topic %+v", topic)
			}
		}
		after, more = page.Next, page.Next != ""
	}
	if strings.Join(names, " ") != "a b c" {
		t.Errorf("topics %v", names)
	}
	var groups wire.Groups
	get("/v1/topics/a/groups", &groups)
	if len(groups.Groups) != 2 || groups.Groups[0].Name != "g1" || groups.Groups[0].Inflight != 2 || groups.Groups[0].Ready != 3 || groups.Groups[1].Inflight != 1 {
		t.Errorf("groups %+v", groups)
	}
	var group wire.Group
	get("/v1/topics/a/groups/g1?rates=false", &group)
	if !reflect.DeepEqual(group, groups.Groups[0]) {
		t.Errorf("group %+v", group)
	}
	var bodies []byte
	for from, more := "0", true; more; {
		var page wire.Messages
		get("/v1/topics/a/messages?limit=2&from="+from, &page)
		for _, m := range page.Messages {
			bodies = append(bodies, m.Body...)
			if m.MessageID == "" || m.Headers["x-a"] != "1" || m.ContentType != wire.MediaOctets || !isoTime.MatchString(m.Timestamp) {
				t.Errorf("message %+v", m)
			}
		}
		from, more = jsonNumber(page.Next), page.Next != 0
	}
	if !bytes.Equal(bodies, []byte{0, 1, 2, 3, 4}) {
		t.Errorf("browsed %v", bodies)
	}
	// Looking disturbs nobody.
	if got := receiveMessages(t, base, "b", "g", wire.MediaMultipart, wire.HeaderMaxMessages, "10"); len(got) != 5 {
		t.Errorf("%d messages after browsing", len(got))
	}

	r := call(t, "GET", base+"/metrics/topics?match=a", nil)
	expect(t, r, 200, "")
	for _, line := range []string{`tercet_topic_published_total{topic="a"} 5`, `tercet_group_messages{group="g1",state="inflight",topic="a"} 2`, `tercet_group_delivered_total{group="g2",topic="a"} 1`} {
		if !strings.Contains(string(r.body), line+"\n") {
			t.Errorf("no line %s in\n%s", line, r.body)
		}
	}
	r = call(t, "GET", base+"/metrics/topics?match=*", nil)
	if n := strings.Count(string(r.body), "\ntercet_topic_published_total{"); n != 3 {
		t.Errorf("%d topics match *", n)
	}
	if r = call(t, "GET", base+"/metrics/topics?match=none*", nil); r.status != 200 || strings.Contains(string(r.body), `"a"`) {
		t.Errorf("no topic matches: %v", r)
	}
}

func jsonNumber(v uint64) string {
	b, _ := json.Marshal(v)
	return string(b)
}

func TestHealth(t *testing.T) {
	backend := &fakeBackend{}
	_, base := start(t, Options{Backend: backend})
	for _, path := range []string{"/livez", "/readyz", "/healthz", "/healthz?verbose"} {
		expect(t, call(t, "GET", base+path, nil), 200, "")
		expect(t, call(t, "HEAD", base+path, nil), 200, "")
	}
	backend.ready = errs.Of(errs.NoLeader)
	expect(t, call(t, "GET", base+"/livez", nil), 200, "")
	for _, path := range []string{"/readyz", "/healthz"} {
		expect(t, call(t, "GET", base+path, nil), 503, "")
	}
	r := call(t, "GET", base+"/healthz?verbose", nil)
	want := "[+]live ok\n[-]ready the cluster has no leader at the moment\n[+]draining ok\n"
	if r.status != 503 || string(r.body) != want {
		t.Errorf("verbose: %v", r)
	}
	backend.live = errs.New(errs.Internal, "the log is poisoned")
	expect(t, call(t, "GET", base+"/livez", nil), 503, "")
}

func TestMetrics(t *testing.T) {
	backend := &fakeBackend{}
	_, base := start(t, Options{Backend: backend})
	sendMessage(t, base, "secret-topic", []byte("x"))
	call(t, "POST", base+"/api/v3/topic/a%20b", []byte("x"))
	r := call(t, "GET", base+"/metrics", nil)
	expect(t, r, 200, "")
	for _, line := range []string{
		`tercet_request_duration_seconds_count{op="send",outcome="ok"} 1`, `tercet_request_duration_seconds_count{op="send",outcome="refused"} 1`,
		`tercet_publish_total{zones="3"} 1`, `tercet_publish_total{zones="2"} 0`, `tercet_http_overload_total{bound="bytes"} 0`, `tercet_http_inflight_requests 0`,
	} {
		if !strings.Contains(string(r.body), line+"\n") {
			t.Errorf("no line %s in\n%s", line, r.body)
		}
	}
	if strings.Contains(string(r.body), "secret-topic") {
		t.Error("a topic is a label")
	}
}

func TestStatusPage(t *testing.T) {
	backend := &fakeBackend{status: fakeStatus, query: func(ctx context.Context, q engine.Query) (engine.Answer, error) {
		return engine.Answer{Topics: []engine.TopicInfo{{Name: "<script>alert(1)</script>", Published: 7}}}, nil
	}}
	_, base := start(t, Options{Backend: backend})
	r := call(t, "GET", base+"/", nil)
	expect(t, r, 200, "")
	page := string(r.body)
	for _, text := range []string{"n1", "n2", "n3", "Serving with 2 of 3 zones", "&lt;script&gt;alert(1)", "&lt;c&gt;", "leader"} {
		if !strings.Contains(page, text) {
			t.Errorf("the page does not show %q", text)
		}
	}
	if strings.Contains(page, "<script") || strings.Contains(page, "onload=") {
		t.Error("the page holds a script")
	}
	policy := r.header.Get("Content-Security-Policy")
	for _, want := range []string{"default-src 'none'", "frame-ancestors 'none'"} {
		if !strings.Contains(policy, want) {
			t.Errorf("policy %q without %s", policy, want)
		}
	}
	backend.ready = errs.Of(errs.NoLeader)
	if r := call(t, "GET", base+"/", nil); !strings.Contains(string(r.body), "Not ready") {
		t.Error("the page of a node that is not ready does not say so")
	}
}

func TestCheckBind(t *testing.T) {
	for _, c := range []struct {
		addr             string
		public, refusing bool
	}{
		{":7300", false, false}, {"127.0.0.1:7300", false, false}, {"localhost:7300", false, false}, {"[::1]:7300", false, false}, {"127.8.9.1:0", false, false}, {"[::ffff:127.0.0.1]:1", false, false},
		{"0.0.0.0:7300", true, true}, {"[::]:7300", true, true}, {"10.0.0.1:7300", true, true}, {"queue.example.com:7300", true, true}, {"7300", false, true}, {"", false, true},
	} {
		public, err := CheckBind(c.addr, false, false)
		if public != c.public || (err != nil) != c.refusing {
			t.Errorf("%q: %v %v", c.addr, public, err)
		}
		if !c.public {
			continue
		}
		if _, err := CheckBind(c.addr, true, false); err != nil {
			t.Errorf("%q with tokens: %v", c.addr, err)
		}
		if _, err := CheckBind(c.addr, false, true); err != nil {
			t.Errorf("%q insecure: %v", c.addr, err)
		}
	}
}

func TestListenWithoutHost(t *testing.T) {
	listeners, err := Listen(t.Context(), ":0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(listeners[0].Addr().String())
	for _, l := range listeners {
		host, p, _ := net.SplitHostPort(l.Addr().String())
		if !net.ParseIP(host).IsLoopback() || p != port {
			t.Errorf("listens on %s", l.Addr())
		}
	}
	if six, err := net.Listen("tcp6", "[::1]:0"); err == nil {
		six.Close()
		if len(listeners) != 2 {
			t.Errorf("%d listeners on a machine with ::1", len(listeners))
		}
	}
	if _, err := Listen(t.Context(), ":"+port); err == nil {
		t.Error("a taken port was taken again")
	}
	for _, l := range listeners {
		l.Close()
	}
}

func TestRequestIDs(t *testing.T) {
	_, base := start(t, Options{Backend: &fakeBackend{}})
	if r := call(t, "GET", base+"/livez", nil, wire.HeaderRequestID, "mine-1"); r.header.Get(wire.HeaderRequestID) != "mine-1" {
		t.Errorf("the client's id came back as %q", r.header.Get(wire.HeaderRequestID))
	}
	seen := map[string]bool{}
	for _, bad := range []string{"", "a b", strings.Repeat("x", 129), `a"b`, "é"} {
		id := call(t, "GET", base+"/livez", nil, wire.HeaderRequestID, bad).header.Get(wire.HeaderRequestID)
		if id == bad || id == "" || seen[id] {
			t.Errorf("%q: id %q", bad, id)
		}
		seen[id] = true
	}
}

// Every answer of the queue protocol that is not an error is one too for browsers: nothing is sniffed or cached.
func TestAnswersAreNotSniffed(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t)})
	sendMessage(t, base, "t", []byte("<script>"), "Content-Type", "text/html")
	for _, r := range []reply{
		call(t, "POST", base+"/api/v3/topic/t/consumer/g", nil, "Accept", wire.MediaNDJSON),
		call(t, "GET", base+"/v1/topics/t/messages", nil),
		call(t, "GET", base+"/nothing", nil),
	} {
		if r.header.Get("X-Content-Type-Options") != "nosniff" || r.header.Get("Cache-Control") != "no-store" || strings.HasPrefix(r.header.Get("Content-Type"), "text/html") {
			t.Errorf("headers %v", r.header)
		}
	}
}
