package compat

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server"
	"tercet.dev/tercet/server/servertest"
)

// queueServer runs the queue protocol of a node, and returns how to ask it.
func queueServer(t *testing.T, node *raft.Node) func(method, path, body string) string {
	t.Helper()
	s, err := server.New(server.Options{Backend: node})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	httpClient := &http.Client{Transport: &http.Transport{}, Timeout: time.Minute}
	t.Cleanup(func() {
		httpClient.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return func(method, path, body string) string {
		t.Helper()
		req, err := http.NewRequest(method, "http://"+l.Addr().String()+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		resp, err := httpClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.Status[:3] + " " + string(b)
	}
}

// TestTercetSettings: what one protocol sets of a group or stream the other one shows and obeys.
func TestTercetSettings(t *testing.T) {
	node := servertest.Nodes(t, 1)[0]
	_, addr := start(t, Options{Backend: node})
	ask := queueServer(t, node)
	c := dial(t, addr)
	c.want("XADD k 1-0 v 1", "$3|1-0")
	c.want("XGROUP CREATE k g 0", "+OK")
	c.want("SET word x", "+OK")
	for _, x := range []struct{ line, want string }{
		{"TERCET GETGROUP k g", "*14|$7|pending|:0|$13|maxdeliveries|:0|$4|park|$2|no|$15|parkedretention|:0|$12|initialdelay|:0|$6|paused|$2|no|$6|parked|:0"},
		{"TERCET SETGROUP k g PENDING 1 maxdeliveries 2 PARK yes", "+OK"},
		{"TERCET SETGROUP k g PARKEDRETENTION 3600", "+OK"},
		{"TERCET GETGROUP k g", "*14|$7|pending|:1|$13|maxdeliveries|:2|$4|park|$3|yes|$15|parkedretention|:3600|$12|initialdelay|:0|$6|paused|$2|no|$6|parked|:0"},
		{"TERCET SETGROUP k g PENDING", "-ERR wrong number of arguments for 'tercet|setgroup' command"},
		{"TERCET SETGROUP k g PARK yes PENDING", "-ERR syntax error"},
		{"TERCET SETGROUP k g COLOUR 1", "-ERR unknown setting 'COLOUR'. Try TERCET HELP."},
		{"TERCET SETGROUP k g PENDING 3601", "-ERR the value of 'pending' must be a whole number from 0 to 3600"},
		{"TERCET SETGROUP k g PENDING -1", "-ERR the value of 'pending' must be a whole number from 0 to 3600"},
		{"TERCET SETGROUP k g PARK 1", "-ERR the value of 'park' must be YES or NO"},
		{"TERCET SETGROUP k none PARK no", "-NOGROUP No such key 'k' or consumer group 'none'"},
		{"TERCET GETGROUP k none", "-NOGROUP No such key 'k' or consumer group 'none'"},
		{"TERCET GETGROUP none g", "-NOGROUP No such key 'none' or consumer group 'g'"},
		{"TERCET PARKED k none", "-NOGROUP No such key 'k' or consumer group 'none'"},
		{"TERCET PARKED word g", "-WRONGTYPE Operation against a key holding the wrong kind of value"},
		{"TERCET REDRIVE k none *", "-NOGROUP No such key 'k' or consumer group 'none'"},
		{"TERCET REDRIVE k g x", "-ERR Invalid stream ID specified as stream command argument"},
		{"TERCET GETSTREAM none", "-ERR no such key"},
		{"TERCET SETSTREAM none PAUSED yes", "-ERR no such key"},
		{"TERCET SETSTREAM k RETENTION 120", "+OK"},
		{"TERCET SETSTREAM k MAXENTRIES 3", "+OK"},
		{"TERCET SETSTREAM k RETENTIONMAX 60", "-ERR the request is not well formed"},
		{"TERCET GETSTREAM k", "*10|$9|retention|:120|$12|retentionmax|:0|$10|maxentries|:3|$6|paused|$2|no|$7|delayed|:0"},
		{"TERCET NOSUCH k", "-ERR unknown subcommand 'NOSUCH'. Try TERCET HELP."},
	} {
		c.want(x.line, x.want)
	}
	if got := c.do("TERCET", "HELP"); !strings.Contains(got, "|+SETGROUP <key> <group>") || !strings.Contains(got, "|+XADD <key> DELAY") {
		t.Errorf("TERCET HELP: %s", got)
	}
	group := ask("GET", "/v1/topics/k/groups/g", "")
	for _, part := range []string{`200 `, `"pendingSeconds":1,`, `"maxDeliveries":2,`, `"park":true`, `"parkedRetentionSeconds":3600`} {
		if !strings.Contains(group, part) {
			t.Errorf("no %s in %s", part, group)
		}
	}
	if got := ask("PATCH", "/v1/topics/k/groups/g", `{"pendingSeconds":5,"park":false}`); !strings.HasPrefix(got, "200") {
		t.Errorf("PATCH: %s", got)
	}
	c.want("TERCET GETGROUP k g", "*14|$7|pending|:5|$13|maxdeliveries|:2|$4|park|$2|no|$15|parkedretention|:3600|$12|initialdelay|:0|$6|paused|$2|no|$6|parked|:0")
	if got := ask("PATCH", "/v1/topics/k", `{"paused":true}`); !strings.HasPrefix(got, "200") {
		t.Errorf("PATCH: %s", got)
	}
	c.want("XREADGROUP GROUP g c STREAMS k >", "*-1")
	c.want("TERCET SETSTREAM k PAUSED no", "+OK")
	c.want("XREADGROUP GROUP g c STREAMS k >", "*1|*2|$1|k|*1|*2|$3|1-0|*2|$1|v|$1|1")
	// In a transaction as any other write, and by the rules of access.
	c.want("MULTI", "+OK")
	c.want("TERCET SETGROUP k g PENDING 7", "+QUEUED")
	c.want("TERCET REDRIVE k g *", "+QUEUED")
	c.want("EXEC", "*2|+OK|:0")
	c.want("ACL SETUSER reader on nopass %R~* +@read", "+OK")
	c.want("AUTH reader x", "+OK")
	if got := c.do("TERCET", "GETGROUP", "k", "g"); !strings.Contains(got, "|$7|pending|:7|") {
		t.Errorf("%s", got)
	}
	c.want("TERCET SETGROUP k g PENDING 8", "-NOPERM User reader has no permissions to run the 'tercet|setgroup' command")
}

// TestTercetParking: an entry that nobody acknowledges is given again behind new ones, parked after its last delivery, listed
// and redriven by either protocol, and dropped.
func TestTercetParking(t *testing.T) {
	node := servertest.Nodes(t, 1)[0]
	_, addr := start(t, Options{Backend: node})
	ask := queueServer(t, node)
	c, other := dial(t, addr), dial(t, addr)
	c.want("XADD k 1-0 v 1", "$3|1-0")
	c.want("XGROUP CREATE k g 0", "+OK")
	c.want("TERCET SETGROUP k g PENDING 1 MAXDELIVERIES 2 PARK yes", "+OK")
	const first = "*1|*2|$1|k|*1|*2|$3|1-0|*2|$1|v|$1|1"
	c.want("XREADGROUP GROUP g a STREAMS k >", first)
	// Whoever waits is given it when its time is over, in the case of several streams too.
	c.want("XGROUP CREATE empty g 0 MKSTREAM", "+OK")
	other.want("XREADGROUP GROUP g b BLOCK 0 STREAMS k empty > >", first)
	list := func() string { return c.do("TERCET", "PARKED", "k", "g") }
	waitFor(t, "the entry to be parked", func() bool { return strings.HasPrefix(list(), "*2|$1|0|*1|") })
	if got := list(); !strings.HasPrefix(got, "*2|$1|0|*1|*5|$3|1-0|*2|$1|v|$1|1|:2|:") || !strings.HasSuffix(got, "|$-1") {
		t.Errorf("parked: %s", got)
	}
	c.want("XPENDING k g", "*4|:0|$-1|$-1|*-1")
	if got := ask("GET", "/v1/topics/k/groups/g/parked", ""); !strings.Contains(got, `"deliveries":2`) {
		t.Errorf("GET parked: %s", got)
	}
	other.send("XREADGROUP", "GROUP", "g", "b", "BLOCK", "0", "STREAMS", "k", ">")
	c.want("TERCET REDRIVE k g 7-7", ":0")
	c.want("TERCET REDRIVE k g 1-0", ":1")
	if got := other.reply(); got != first {
		t.Errorf("after a redrive: %s", got)
	}
	if got := c.do("XPENDING", "k", "g", "-", "+", "10"); !strings.HasPrefix(got, "*1|*4|$3|1-0|$1|b|:") || !strings.HasSuffix(got, "|:3") {
		t.Errorf("pending: %s", got)
	}
	// Twice more, then it is given up again, by a claim as well.
	if got := c.do("XAUTOCLAIM", "k", "g", "c", "0", "0-0"); !strings.HasPrefix(got, "*3|$3|0-0|*1|*2|$3|1-0|") {
		t.Errorf("XAUTOCLAIM: %s", got)
	}
	c.want("XNACK k g FAIL IDS 1 1-0", ":1")
	if got := list(); !strings.HasPrefix(got, "*2|$1|0|*1|*5|$3|1-0|*2|$1|v|$1|1|:4|:") {
		t.Errorf("parked by XNACK: %s", got)
	}
	if got := ask("POST", "/v1/topics/k/groups/g/parked/redrive", `{"all":true}`); !strings.HasPrefix(got, "200") {
		t.Errorf("redrive over HTTP: %s", got)
	}
	c.want("XREADGROUP GROUP g a STREAMS k >", first)
	c.want("XNACK k g FATAL IDS 1 1-0", ":1")
	c.want("TERCET DROP k g *", ":1")
	c.want("TERCET PARKED k g FROM 0 COUNT 5", "*2|$1|0|*0")
	c.want("XREADGROUP GROUP g a STREAMS k >", "*-1")
}

// TestTercetDelay: an entry added with DELAY is there when its time has come, once however often it was sent; until then
// it has a message ID by which it can be cancelled.
func TestTercetDelay(t *testing.T) {
	node := servertest.Nodes(t, 1)[0]
	_, addr := start(t, Options{Backend: node})
	ask := queueServer(t, node)
	c, other := dial(t, addr), dial(t, addr)
	id := c.do("XADD", "k", "IDMP", "p", "1", "DELAY", "1", "*", "v", "1")
	if !strings.HasPrefix(id, "$") || strings.Contains(id, "-") {
		t.Fatalf("XADD DELAY: %s", id)
	}
	if again := c.do("XADD", "k", "IDMP", "p", "1", "DELAY", "1", "*", "v", "1"); again != id {
		t.Errorf("repeated: %s, was %s", again, id)
	}
	never := c.do("XADD", "k", "DELAY", "3600", "RETENTION", "7200", "*", "v", "2")
	_, text, _ := strings.Cut(never, "|")
	if got := ask("GET", "/v1/topics/k/messages/"+text, ""); !strings.Contains(got, `"state":"delayed"`) {
		t.Errorf("as HTTP sees it: %s", got)
	}
	c.want("TERCET CANCEL k "+text, ":1")
	c.want("TERCET CANCEL k "+text, ":0")
	c.want("TERCET CANCEL k nosuch", "-ERR the message id is none that XADD has answered")
	other.send("XREAD", "BLOCK", "0", "STREAMS", "k", "0")
	got := other.reply()
	if !strings.HasPrefix(got, "*1|*2|$1|k|*1|*2|$") || !strings.HasSuffix(got, "|*2|$1|v|$1|1") {
		t.Fatalf("when it is due: %s", got)
	}
	// From now on a repetition answers its stream ID, and the message ID once more when the entry is gone.
	stream := c.do("XADD", "k", "IDMP", "p", "1", "DELAY", "1", "*", "v", "1")
	_, text, _ = strings.Cut(stream, "|")
	if !strings.Contains(got, "|"+stream+"|") {
		t.Errorf("a repetition answers %s, the entry is %s", stream, got)
	}
	c.want("XLEN k", ":1")
	c.want("XDEL k "+text, ":1")
	if again := c.do("XADD", "k", "IDMP", "p", "1", "*", "v", "1"); again != id {
		t.Errorf("after its deletion: %s, was %s", again, id)
	}
	for _, x := range []struct{ line, want string }{
		{"XADD k DELAY 1 5-5 v 1", "-ERR DELAY needs the ID *"},
		{"XADD k DELAY 61 RETENTION 60 * v 1", "-ERR DELAY is longer than RETENTION"},
		{"XADD k DELAY 604801 * v 1", "-ERR the value of 'delay' must be a whole number from 0 to 604800"},
		{"XADD k DELAY x * v 1", "-ERR the value of 'delay' must be a whole number from 0 to 604800"},
		{"XADD k NOMKSTREAM DELAY 0 1-1 v 1", "-ERR The ID specified in XADD is equal or smaller than the target stream top item"},
		{"XLEN k", ":0"},
	} {
		c.want(x.line, x.want)
	}
}
