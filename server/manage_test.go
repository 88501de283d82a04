package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/server/servertest"
	"tercet.dev/tercet/server/wire"
)

// manager asks /v1 for things.
type manager struct {
	t    testing.TB
	base string
}

// do makes a request that has to be answered with the status, and decodes the answer.
func (m manager) do(status int, method, path, body string, document any) reply {
	m.t.Helper()
	r := call(m.t, method, m.base+path, []byte(body))
	if r.status != status {
		m.t.Fatalf("%s %s %s: %v, want %d", method, path, body, r, status)
	}
	if document != nil {
		if err := json.Unmarshal(r.body, document); err != nil {
			m.t.Fatalf("%s %s: %v: %s", method, path, err, r.body)
		}
	}
	return r
}

func (m manager) advance(d time.Duration) {
	m.t.Helper()
	m.do(200, "POST", "/v1/clock/advance", fmt.Sprintf(`{"seconds":%d}`, int64(d/time.Second)), nil)
}

func (m manager) group(topic, group string) (g wire.Group) {
	m.t.Helper()
	m.do(200, "GET", "/v1/topics/"+topic+"/groups/"+group+"?rates=false", "", &g)
	return g
}

// bodiesOf receives up to ten messages and returns their bodies.
func bodiesOf(t testing.TB, base, topic, group string, headers ...string) string {
	t.Helper()
	var out []string
	for _, m := range receiveMessages(t, base, topic, group, wire.MediaMultipart, append(headers, wire.HeaderMaxMessages, "10")...) {
		out = append(out, string(m.body))
	}
	return strings.Join(out, " ")
}

func TestManageTopics(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t), VirtualClock: true})
	m := manager{t, base}
	m.do(404, "PATCH", "/v1/topics/orders", `{"paused":true}`, nil)
	m.do(404, "POST", "/v1/topics/orders/pause", "", nil)
	var topic wire.Topic
	m.do(200, "PUT", "/v1/topics/orders", `{"retentionDefaultSeconds":3600,"depthMax":3}`, &topic)
	if topic.Settings.RetentionDefaultSeconds != 3600 || topic.Settings.DepthMax != 3 || topic.Name != "orders" || topic.Settings.Paused {
		t.Errorf("topic %+v", topic)
	}
	m.do(200, "PATCH", "/v1/topics/orders", `{"messageBytesMax":5}`, &topic)
	if topic.Settings.RetentionDefaultSeconds != 3600 || topic.Settings.MessageBytesMax != 5 {
		t.Errorf("a change of one setting: %+v", topic.Settings)
	}
	for _, body := range []string{`{"retentionMaxSeconds":59}`, `{"retentionDefaultSeconds":604801}`, `{"retentionMaxSeconds":60}`, `{"paused":1}`, `{"messageBytesMax":-1}`, `{"nothing":1}`, `[]`, `{} x`} {
		expect(t, call(t, "PATCH", base+"/v1/topics/orders", []byte(body)), 400, "invalid_body")
	}
	for body, want := range map[string]string{
		`{"nothing":1}`: `it has no member \"nothing\"`, `{"paused":1}`: "a number is not what paused takes", `[]`: "not the expected JSON object\"",
		`{"` + strings.Repeat("x", 1000) + `":1}`: "not the expected JSON object\"",
	} {
		if r := call(t, "PATCH", base+"/v1/topics/orders", []byte(body)); !strings.Contains(string(r.body), want) {
			t.Errorf("%.40s: %s", body, r.body)
		}
	}
	for i := range 3 {
		sendMessage(t, base, "orders", fmt.Append(nil, i))
	}
	expect(t, call(t, "POST", base+"/api/v3/topic/orders", []byte("x")), 429, "topic_full")
	expect(t, call(t, "POST", base+"/api/v3/topic/orders", []byte("123456")), 413, "message_too_large")
	m.do(200, "POST", "/v1/topics/orders/pause", "", &topic)
	if !topic.Settings.Paused || topic.Settings.DepthMax != 3 {
		t.Errorf("paused: %+v", topic.Settings)
	}
	if got := bodiesOf(t, base, "orders", "g"); got != "" {
		t.Errorf("a paused topic delivers %s", got)
	}
	m.do(400, "POST", "/v1/topics/orders/resume", `{"x":1}`, nil)
	m.do(200, "POST", "/v1/topics/orders/resume", "", nil)
	if got := bodiesOf(t, base, "orders", "g"); got != "0 1 2" {
		t.Errorf("after the pause: %s", got)
	}
	m.do(200, "POST", "/v1/topics/orders/purge", "", nil)
	if got := bodiesOf(t, base, "orders", "other"); got != "" {
		t.Errorf("after the purge: %s", got)
	}
	if g := m.group("orders", "g"); g.Inflight != 0 || g.Depth != 0 {
		t.Errorf("after the purge: %+v", g)
	}
	id := sendMessage(t, base, "orders", []byte("3"))
	var story wire.Story
	m.do(200, "GET", "/v1/topics/orders/messages/"+id, "", &story)
	if got := lifetime(t, story); got != time.Hour {
		t.Errorf("the topic's default retention gives %s", got)
	}
	m.do(204, "DELETE", "/v1/topics/orders", "", nil)
	m.do(404, "GET", "/v1/topics/orders", "", nil)
	m.do(404, "DELETE", "/v1/topics/orders", "", nil)
	// A key that is no queue name stands percent-encoded.
	m.do(200, "PUT", "/v1/topics/a%2Fb%20%C3%A9%00", "", &topic)
	if topic.Name != "a/b é\x00" {
		t.Errorf("name %q", topic.Name)
	}
	m.do(204, "DELETE", "/v1/topics/a%2Fb%20%C3%A9%00", "", nil)
}

// lifetime is how long a message lives.
func lifetime(t testing.TB, s wire.Story) time.Duration {
	t.Helper()
	from, err1 := time.Parse(time.RFC3339Nano, s.PublishedAt)
	to, err2 := time.Parse(time.RFC3339Nano, s.ExpiresAt)
	if err1 != nil || err2 != nil {
		t.Fatalf("story %+v", s)
	}
	return to.Sub(from)
}

func TestManageGroups(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t), VirtualClock: true})
	m := manager{t, base}
	path := func(group string) string { return "/v1/topics/orders/groups/" + group }
	m.do(200, "PUT", path("early"), `{"settings":{"maxConcurrency":2}}`, nil)
	sendMessage(t, base, "orders", []byte("a"))
	m.advance(time.Hour)
	between := time.Now().Add(30 * time.Minute).UTC().Format(time.RFC3339)
	sendMessage(t, base, "orders", []byte("b"))
	m.do(200, "PUT", path("begin"), "", nil)
	m.do(200, "PUT", path("end"), `{"start":{"at":"end"}}`, nil)
	m.do(200, "PUT", path("time"), `{"start":{"at":"time","time":"`+between+`"}}`, nil)
	var page wire.Messages
	m.do(200, "GET", "/v1/topics/orders/messages", "", &page)
	sendMessage(t, base, "orders", []byte("c"))
	for group, want := range map[string]string{"early": "a b", "begin": "a b c", "end": "c", "time": "b c"} {
		if got := bodiesOf(t, base, "orders", group); got != want {
			t.Errorf("group %s is given %q, want %q", group, got, want)
		}
	}
	// A group that exists is not moved by being made again.
	m.do(200, "PUT", path("end"), `{"start":{"at":"beginning"}}`, nil)
	if got := bodiesOf(t, base, "orders", "end"); got != "" {
		t.Errorf("made again, the group is given %q", got)
	}
	m.do(200, "POST", path("end")+"/seek", `{"at":"beginning"}`, nil)
	if got := bodiesOf(t, base, "orders", "end"); got != "a b c" {
		t.Errorf("after seek to the beginning: %q", got)
	}
	m.do(200, "POST", path("begin")+"/seek", `{"at":"time","time":"`+between+`"}`, nil)
	m.do(200, "POST", path("begin")+"/pause", "", nil)
	if got := bodiesOf(t, base, "orders", "begin"); got != "" {
		t.Errorf("a paused group is given %q", got)
	}
	m.do(200, "POST", path("begin")+"/resume", "", nil)
	got := receiveMessages(t, base, "orders", "begin", wire.MediaMultipart, wire.HeaderMaxMessages, "10")
	if len(got) != 2 {
		t.Fatalf("after seek to a time: %d messages", len(got))
	}
	expect(t, call(t, "DELETE", lease(base, "orders", "begin", got[0].head["vqs-receipt-handle"]), nil), 204, "")
	if g := m.group("orders", "begin"); g.Inflight != 1 || g.Acknowledged != 1 || g.Depth != 1 {
		t.Errorf("group %+v", g)
	}
	var group wire.Group
	m.do(200, "PATCH", path("begin"), `{"excludeDeployments":["d2","d1"]}`, &group)
	if s := group.Settings; !slices.Equal(s.ExcludeDeployments, []string{"d1", "d2"}) {
		t.Errorf("settings %+v", s)
	}
	m.do(200, "PATCH", path("begin"), `{"excludeDeployments":[]}`, nil)
	m.do(200, "PATCH", path("begin"), `{"maxDeliveries":3,"park":true}`, &group)
	m.do(200, "PATCH", path("begin"), `{"parkedRetentionSeconds":60}`, &group)
	if s := group.Settings; s.MaxDeliveries != 3 || !s.Park || s.ParkedRetentionSeconds != 60 {
		t.Errorf("settings %+v", s)
	}
	for _, body := range []string{`{"maxDeliveries":-1}`, `{"maxConcurrency":-1}`, `{"initialDelaySeconds":604801}`, `{"deploymentId":"a b"}`, `{"excludeDeployments":[""]}`, `{"excludeDeployments":["x"],"deploymentId":"y"}`, `{"parkedRetentionSeconds":1e9}`, `{"x":1}`} {
		expect(t, call(t, "PATCH", base+path("begin"), []byte(body)), 400, "invalid_body")
	}
	for _, body := range []string{`{"at":"middle"}`, `{"at":"time"}`, `{"at":"end","time":"` + between + `"}`, `{"at":"id","id":"x"}`, `{}`, ``} {
		r := call(t, "POST", base+path("begin")+"/seek", []byte(body))
		expect(t, r, 400, "invalid_body")
	}
	expect(t, call(t, "POST", base+path("none")+"/seek", []byte(`{"at":"end"}`)), 404, "group_not_found")
	m.do(204, "DELETE", path("begin"), "", nil)
	expect(t, call(t, "GET", base+path("begin"), nil), 404, "group_not_found")
}

// TestDropAcknowledged: with the setting a message is gone once all groups have acknowledged it, and kept as long as one has not.
func TestDropAcknowledged(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t), VirtualClock: true})
	m := manager{t, base}
	var topic wire.Topic
	m.do(200, "PUT", "/v1/topics/orders", `{"dropAcknowledged":true}`, &topic)
	if !topic.Settings.DropAcknowledged {
		t.Errorf("settings %+v", topic.Settings)
	}
	id := sendMessage(t, base, "orders", []byte("x"))
	for _, group := range []string{"g", "h"} {
		m.do(200, "PUT", "/v1/topics/orders/groups/"+group, `{}`, nil)
	}
	for _, group := range []string{"g", "h"} {
		m.do(200, "GET", "/v1/topics/orders/messages/"+id, "", nil)
		got := receiveMessages(t, base, "orders", group, wire.MediaMultipart)
		if len(got) != 1 {
			t.Fatalf("%s received %v", group, got)
		}
		expect(t, call(t, "DELETE", lease(base, "orders", group, got[0].head["vqs-receipt-handle"]), nil), 204, "")
	}
	expect(t, call(t, "GET", base+"/v1/topics/orders/messages/"+id, nil), 404, "message_not_found")
	m.do(200, "GET", "/v1/topics/orders", "", &topic)
	if topic.FirstOffset != 1 || topic.NextOffset != 1 {
		t.Errorf("what is left of the topic: %+v", topic)
	}
	if got := bodiesOf(t, base, "orders", "late"); got != "" {
		t.Errorf("a group that was made later is given %q", got)
	}
}

func TestRates(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t), VirtualClock: true})
	m := manager{t, base}
	for i := range 10 {
		sendMessage(t, base, "orders", fmt.Append(nil, i), wire.HeaderRetention, "60")
	}
	receiveMessages(t, base, "orders", "g", wire.MediaMultipart)
	var g wire.Group
	m.do(200, "GET", "/v1/topics/orders/groups/g", "", &g)
	switch r := g.Rates; {
	case r == nil:
		t.Fatal("no rates")
	case r.OverSeconds < 0.4 || r.ArrivalPerSecond != 0 || r.DrainPerSecond != 0 || r.SecondsToDrain != nil:
		t.Errorf("nothing happened, and the rates are %+v", r)
	case r.ExpiringUnreached != 9:
		t.Errorf("%d of 9 messages expire unreached when nothing is taken", r.ExpiringUnreached)
	}
	for range 5 {
		for _, got := range receiveMessages(t, base, "orders", "g", wire.MediaMultipart) {
			expect(t, call(t, "DELETE", lease(base, "orders", "g", got.head["vqs-receipt-handle"]), nil), 204, "")
		}
	}
	m.do(200, "GET", "/v1/topics/orders/groups/g", "", &g)
	if r := g.Rates; r == nil || r.DrainPerSecond <= 0 || r.ReachedPerSecond <= 0 || r.SecondsToDrain == nil || *r.SecondsToDrain <= 0 {
		t.Errorf("five were acknowledged, and the rates are %+v", g.Rates)
	}
}

// TestParked: messages that are given up, looked at, redriven and dropped.
func TestParked(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t), VirtualClock: true})
	m := manager{t, base}
	const parked = "/v1/topics/orders/groups/g/parked"
	m.do(200, "PUT", "/v1/topics/orders/groups/g", `{"settings":{"maxDeliveries":1,"park":true}}`, nil)
	ids := map[string]string{}
	for _, b := range []string{"a", "b", "c", "d"} {
		ids[b] = sendMessage(t, base, "orders", []byte(b), "X-Kind", b)
	}
	for _, got := range receiveMessages(t, base, "orders", "g", wire.MediaMultipart, wire.HeaderMaxMessages, "10") {
		body := fmt.Sprintf(`{"visibilityTimeoutSeconds":0,"release":true,"reason":"cannot do %s"}`, got.body)
		expect(t, call(t, "PATCH", lease(base, "orders", "g", got.head["vqs-receipt-handle"]), []byte(body)), 200, "")
	}
	m.advance(time.Second)
	var page wire.Parked
	m.do(200, "GET", parked, "", &page)
	if len(page.Messages) != 4 {
		t.Fatalf("parked: %+v", page)
	}
	for i, p := range page.Messages {
		want := string("abcd"[i])
		if string(p.Body) != want || p.MessageID != ids[want] || p.Deliveries != 1 || p.LastError != "cannot do "+want || !isoTime.MatchString(p.ParkedAt) || p.Headers["x-kind"] != want {
			t.Errorf("parked message %+v", p)
		}
	}
	if g := m.group("orders", "g"); g.Parked != 4 || g.Depth != 0 {
		t.Errorf("group %+v", g)
	}
	var first wire.Parked
	m.do(200, "GET", parked+"?limit=3&body=false", "", &first)
	if len(first.Messages) != 3 || first.Next == 0 || first.Messages[0].Body != nil {
		t.Errorf("a page of 3: %+v", first)
	}
	m.do(200, "GET", fmt.Sprintf("%s?from=%d", parked, first.Next), "", &page)
	if len(page.Messages) != 1 || string(page.Messages[0].Body) != "d" {
		t.Errorf("the next page: %+v", page)
	}
	m.do(200, "GET", parked+"?error=do+b", "", &page)
	if len(page.Messages) != 1 {
		t.Errorf("by error: %+v", page)
	}
	var changed wire.ParkedChanged
	m.do(200, "POST", parked+"/redrive", `{"all":true,"dryRun":true}`, &changed)
	if changed.Count != 4 || !changed.DryRun {
		t.Errorf("dry run: %+v", changed)
	}
	m.do(200, "POST", parked+"/redrive", `{"messageIds":["`+ids["b"]+`"]}`, &changed)
	if got := bodiesOf(t, base, "orders", "g"); changed.Count != 1 || got != "b" {
		t.Errorf("redriven by id: %+v, %q", changed, got)
	}
	m.do(200, "POST", parked+"/drop", `{"error":"do c"}`, &changed)
	if changed.Count != 1 || m.group("orders", "g").Parked != 2 {
		t.Errorf("dropped by error: %+v", changed)
	}
	m.do(200, "POST", parked+"/redrive", `{"all":true,"ratePerSecond":1000,"max":1}`, &changed)
	if changed.Count != 1 {
		t.Errorf("with a rate and a maximum: %+v", changed)
	}
	m.do(200, "POST", parked+"/redrive", `{"all":true,"ratePerSecond":1000}`, &changed)
	if got := bodiesOf(t, base, "orders", "g"); changed.Count != 1 || got != "a d" {
		t.Errorf("with a rate: %+v, %q", changed, got)
	}
	for _, body := range []string{``, `{}`, `{"all":false}`, `{"all":true,"error":"x"}`, `{"messageIds":["x"]}`, `{"all":true,"max":-1}`, `{"all":true,"y":1}`} {
		for _, verb := range []string{"/redrive", "/drop"} {
			expect(t, call(t, "POST", base+parked+verb, []byte(body)), 400, "invalid_body")
		}
	}
	expect(t, call(t, "POST", base+parked+"/drop", []byte(`{"since":"yesterday"}`)), 400, "bad_request")
}

// TestVerifyWaitsForFollowers has the other zones learn only after the leader that a message is committed.
func TestVerifyWaitsForFollowers(t *testing.T) {
	var asked atomic.Int32
	backend := &fakeBackend{status: fakeStatus, query: func(context.Context, engine.Query) (engine.Answer, error) {
		if n := asked.Add(1); n > 1 && n < 6 {
			return engine.Answer{}, nil
		}
		return engine.Answer{Story: &engine.Story{Bytes: 5, CRC: 1}}, nil
	}}
	_, base := start(t, Options{Backend: backend})
	id := engine.NewSealer(fakeSecret).MessageID(engine.MessageID{Index: 7})
	var s wire.Story
	manager{t, base}.do(200, "GET", "/v1/topics/orders/messages/"+id+"?verify=true", "", &s)
	if s.Verified == nil || !*s.Verified || len(s.Zones) != 3 {
		t.Errorf("verified %v: %+v", s.Verified, s.Zones)
	}
}

// TestStory tells what became of messages, from every node, and what each zone holds of them.
func TestStory(t *testing.T) {
	nodes := servertest.Nodes(t, 3)
	_, base := start(t, Options{Backend: nodes[0], VirtualClock: true})
	_, other := start(t, Options{Backend: nodes[2], VirtualClock: true})
	id := sendMessage(t, base, "orders", []byte("hello"), "Content-Type", "text/plain", "Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	got := receiveMessages(t, other, "orders", "a", wire.MediaMultipart)
	receiveMessages(t, other, "orders", "b", wire.MediaMultipart)
	expect(t, call(t, "DELETE", lease(base, "orders", "a", got[0].head["vqs-receipt-handle"]), nil), 204, "")
	bodiesOf(t, base, "orders", "c", wire.HeaderVisibility, "0") // a peek makes no group
	for _, b := range []string{base, other} {
		var s wire.Story
		manager{t, b}.do(200, "GET", "/v1/topics/orders/messages/"+id+"?verify=true", "", &s)
		if s.MessageID != id || s.Topic != "orders" || s.State != "visible" || s.Bytes != 5 || s.CRC32C != "9a71bb4c" || s.ContentType != "text/plain" || s.Headers["traceparent"] == "" || lifetime(t, s) != 24*time.Hour {
			t.Errorf("story %+v", s)
		}
		if len(s.Groups) != 2 || s.Groups[0].Group != "a" || s.Groups[0].State != "acknowledged" || s.Groups[1].State != "leased" || s.Groups[1].Deliveries != 1 || s.Groups[1].LeasedUntil == "" {
			t.Errorf("groups %+v", s.Groups)
		}
		if s.Verified == nil || !*s.Verified || len(s.Zones) != 3 {
			t.Fatalf("verified %v: %+v", s.Verified, s.Zones)
		}
		for i, z := range s.Zones {
			if z.Node != fmt.Sprintf("n%d", i+1) || z.Zone != "zone-"+z.Node || !z.Same || z.CRC32C != s.CRC32C || z.Bytes != 5 || z.Error != "" {
				t.Errorf("zone %+v", z)
			}
		}
	}
	// A zone that is away is not verified, and said to be so.
	if err := nodes[1].Close(); err != nil {
		t.Fatal(err)
	}
	var s wire.Story
	waitFor(t, func() bool {
		r := call(t, "GET", base+"/v1/topics/orders/messages/"+id+"?verify=true", nil)
		return r.status == 200 && json.Unmarshal(r.body, &s) == nil
	})
	if s.Verified == nil || *s.Verified || len(s.Zones) != 3 || s.Zones[1].Same || s.Zones[1].Error == "" || !s.Zones[0].Same {
		t.Errorf("with a zone away: %v, %+v", *s.Verified, s.Zones)
	}
	expect(t, call(t, "GET", base+"/v1/topics/orders/messages/"+id+"?verify=yes", nil), 400, "bad_request")
	expect(t, call(t, "GET", base+"/v1/topics/bills/messages/"+id, nil), 404, "")
	expect(t, call(t, "GET", base+"/v1/topics/orders/messages/x", nil), 404, "message_not_found")
}

// TestBrowseFilters finds messages by state, time and header.
func TestBrowseFilters(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t), VirtualClock: true})
	m := manager{t, base}
	for _, b := range []string{"a", "b", "c"} {
		sendMessage(t, base, "orders", []byte(b), "X-Kind", b, "X-All", "1")
	}
	got := receiveMessages(t, base, "orders", "g", wire.MediaMultipart, wire.HeaderMaxMessages, "2")
	expect(t, call(t, "DELETE", lease(base, "orders", "g", got[0].head["vqs-receipt-handle"]), nil), 204, "")
	m.advance(time.Hour)
	half := time.Now().Add(30 * time.Minute).UTC().Format(time.RFC3339)
	sendMessage(t, base, "orders", []byte("d"))
	find := func(query string) string {
		var page wire.Messages
		m.do(http.StatusOK, "GET", "/v1/topics/orders/messages?"+query, "", &page)
		out := ""
		for _, msg := range page.Messages {
			out += string(msg.Body)
		}
		return out
	}
	for query, want := range map[string]string{
		"":                              "abcd",
		"header=x-all":                  "abc",
		"header=X-Kind&value=b":         "b",
		"header=x-none":                 "",
		"since=" + half:                 "d",
		"until=" + half:                 "abc",
		"group=g&state=acknowledged":    "a",
		"group=g&state=waiting":         "",
		"group=g&state=ready":           "bcd", // the lease of b is over
		"group=g&state=leased":          "",
		"group=g&state=parked":          "",
		"state=any":                     "abcd",
		"header=x-all&limit=2":          "ab",
		"header=x-all&limit=2&from=100": "",
	} {
		if got := find(query); got != want {
			t.Errorf("%q finds %q, want %q", query, got, want)
		}
	}
	for _, query := range []string{"state=done", "state=ready", "since=now", "value=x", "header=a%20b", "from=x", "limit=0"} {
		expect(t, call(t, "GET", base+"/v1/topics/orders/messages?"+query, nil), 400, "bad_request")
	}
}

// TestDelayed finds, moves and cancels messages that are not visible yet.
func TestDelayed(t *testing.T) {
	_, base := start(t, Options{Backend: newNode(t), VirtualClock: true})
	m := manager{t, base}
	ids := map[string]string{}
	for i, b := range []string{"a", "b", "c"} {
		ids[b] = sendMessage(t, base, "orders", []byte(b), wire.HeaderDelay, fmt.Sprint(60*(i+1)))
	}
	r := call(t, "POST", base+"/api/v3/topic/orders/consumer/g/id/"+ids["a"], nil, "Accept", wire.MediaMultipart)
	expect(t, r, 409, "not_yet_visible")
	if after, ok := decimal(r.header.Get("Retry-After")); !ok || after < 50 || after > 60 {
		t.Errorf("Retry-After: %s", r.header.Get("Retry-After"))
	}
	var page wire.Messages
	m.do(200, "GET", "/v1/topics/orders/messages?state=delayed", "", &page)
	if len(page.Messages) != 3 || page.Messages[0].MessageID != ids["a"] || string(page.Messages[2].Body) != "c" {
		t.Fatalf("delayed: %+v", page)
	}
	var s wire.Story
	m.do(200, "GET", "/v1/topics/orders/messages/"+ids["c"], "", &s)
	if s.State != "delayed" || s.VisibleAt <= s.PublishedAt {
		t.Errorf("story %+v", s)
	}
	m.do(204, "PATCH", "/v1/topics/orders/messages/"+ids["c"], `{"delaySeconds":30}`, nil)
	m.do(204, "DELETE", "/v1/topics/orders/messages/"+ids["b"], "", nil)
	for _, body := range []string{`{}`, `{"delaySeconds":-1}`, `{"delaySeconds":604801}`, `{"delaySeconds":1.5}`, `{"at":1}`} {
		expect(t, call(t, "PATCH", base+"/v1/topics/orders/messages/"+ids["a"], []byte(body)), 400, "invalid_body")
	}
	m.advance(30 * time.Second)
	waitFor(t, func() bool { return bodiesOf(t, base, "orders", "g") == "c" })
	m.advance(30 * time.Second)
	waitFor(t, func() bool { return bodiesOf(t, base, "orders", "g") == "a" })
	m.advance(time.Hour)
	if got := bodiesOf(t, base, "orders", "h"); got != "c a" {
		t.Errorf("a group that comes later is given %q, want c and a: b was cancelled", got)
	}
	for _, method := range []string{"PATCH", "DELETE"} {
		expect(t, call(t, method, base+"/v1/topics/orders/messages/"+ids["a"], []byte(`{"delaySeconds":1}`)), 409, "conflict")
	}
}
