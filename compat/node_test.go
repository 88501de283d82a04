package compat

import (
	"fmt"
	"strings"
	"testing"

	"tercet.dev/tercet/server/servertest"
)

// nodeServer runs the front end on a cluster of one node.
func nodeServer(t *testing.T) (*Server, string) {
	t.Helper()
	return start(t, Options{Backend: servertest.Nodes(t, 1)[0], FlushAllowed: true})
}

// TestPipelineSharesEntries: a thousand commands of one pipeline are far fewer entries of the log, and one transaction is one.
func TestPipelineSharesEntries(t *testing.T) {
	s, addr := nodeServer(t)
	c := dial(t, addr)
	c.want("XADD k 1-1 a b", "$3|1-1")
	before := s.backend.Status().AppliedIndex
	const n = 1000
	var b strings.Builder
	for i := range n {
		b.Write(encodeCommand("XADD", "k", fmt.Sprintf("2-%d", i+1), "f", "v"))
	}
	c.raw(b.String())
	for i := range n {
		if got, want := c.reply(), fmt.Sprintf("2-%d", i+1); !strings.HasSuffix(got, want) {
			t.Fatalf("reply %d: %s, want %s", i, got, want)
		}
	}
	c.want("XLEN k", ":1001")
	if entries := s.backend.Status().AppliedIndex - before; entries > n/10 {
		t.Errorf("%d commands of a pipeline took %d entries", n, entries)
	}
	before = s.backend.Status().AppliedIndex
	c.raw("MULTI\r\n" + strings.Repeat("XADD tx * f v\r\n", 50) + "XLEN tx\r\nEXEC\r\n")
	for range 52 {
		c.reply()
	}
	if got := c.reply(); !strings.HasPrefix(got, "*51|") || !strings.HasSuffix(got, "|:50") {
		t.Errorf("EXEC: %s", got)
	}
	if entries := s.backend.Status().AppliedIndex - before; entries > 3 {
		t.Errorf("a transaction took %d entries", entries)
	}
}

// TestBlocking: blocked reads are woken by what comes, end with their time, by CLIENT UNBLOCK, and with their connection, and
// what follows on the connection is answered after them.
func TestBlocking(t *testing.T) {
	s, addr := nodeServer(t)
	c, b := dial(t, addr), dial(t, addr)
	step := ""
	blockedNow := func(n int64) {
		t.Helper()
		waitFor(t, fmt.Sprintf("%d clients to block in %s", n, step), func() bool { return s.blocked.Load() == n })
	}
	c.want("XGROUP CREATE k g $ MKSTREAM", "+OK")
	id := strings.TrimPrefix(b.do("CLIENT", "ID"), ":")

	for _, read := range []string{"XREADGROUP GROUP g c1 BLOCK 0 STREAMS k >", "XREAD BLOCK 0 STREAMS k $", "XREAD BLOCK 0 STREAMS other k 0 $", "XREADGROUP GROUP g c1 BLOCK 0 STREAMS k k > >"} {
		step = read
		c.do("XREADGROUP", "GROUP", "g", "drain", "STREAMS", "k", ">")
		b.send(strings.Fields(read)...)
		blockedNow(1)
		b.raw("PING behind\r\n")
		added := c.do("XADD", "k", "*", "f", "v")
		if got := b.reply(); !strings.Contains(got, added) {
			t.Errorf("%s: %s, want %s", read, got, added)
		}
		if got := b.reply(); got != "$6|behind" {
			t.Errorf("%s: then %s", read, got)
		}
		blockedNow(0)

		b.send(strings.Fields(read)...)
		blockedNow(1)
		c.want("CLIENT UNBLOCK "+id, ":1")
		if got := b.reply(); got != "*-1" {
			t.Errorf("%s unblocked: %s", read, got)
		}
		b.send(strings.Fields(read)...)
		blockedNow(1)
		c.want("CLIENT UNBLOCK "+id+" ERROR", ":1")
		if got := b.reply(); got != "-UNBLOCKED client unblocked via CLIENT UNBLOCK" {
			t.Errorf("%s unblocked: %s", read, got)
		}
		if got := b.do(strings.Fields(strings.Replace(read, "BLOCK 0", "BLOCK 5", 1))...); got != "*-1" {
			t.Errorf("%s after 5 ms: %s", read, got)
		}
		// A client that goes is not given anything.
		gone := dial(t, addr)
		gone.send(strings.Fields(read)...)
		blockedNow(1)
		gone.nc.Close()
		blockedNow(0)
	}
	c.want("XADD k 99999999999999-1 f v", "$16|99999999999999-1")
	if got := c.do("XREADGROUP", "GROUP", "g", "c2", "STREAMS", "k", ">"); !strings.Contains(got, "99999999999999-1") {
		t.Errorf("an entry was given to a client that had gone: %s", got)
	}

	// XREAD waits on when its key goes, or becomes another type.
	step = "XREAD of a key that changes"
	b.send(strings.Fields("XREAD BLOCK 0 STREAMS z 0")...)
	blockedNow(1)
	c.want("SET z 1", "+OK")
	c.want("DEL z", ":1")
	c.want("XADD z 1-1 f v", "$3|1-1")
	if got := b.reply(); got != "*1|*2|$1|z|*1|*2|$3|1-1|*2|$1|f|$1|v" {
		t.Errorf("%s: %s", step, got)
	}
	// A blocked CLAIM takes what becomes idle, and what is new.
	step = "CLAIM"
	c.want("XGROUP CREATE z g 0", "+OK")
	c.do("XREADGROUP", "GROUP", "g", "c1", "STREAMS", "z", ">")
	got := b.do(strings.Fields("XREADGROUP GROUP g c2 BLOCK 0 CLAIM 50 STREAMS z >")...)
	if !strings.HasPrefix(got, "*1|*2|$1|z|*1|*4|$3|1-1|*2|$1|f|$1|v|:") || !strings.HasSuffix(got, "|:1") {
		t.Errorf("%s: %s", step, got)
	}
	b.send(strings.Fields("XREADGROUP GROUP g c2 BLOCK 0 CLAIM 3600000 STREAMS z k > >")...)
	blockedNow(1)
	c.want("XADD z 1-2 f v", "$3|1-2")
	if got := b.reply(); got != "*1|*2|$1|z|*1|*4|$3|1-2|*2|$1|f|$1|v|:0|:0" {
		t.Errorf("%s: %s", step, got)
	}

	// The group that a read waits for is destroyed.
	for _, end := range []string{"XGROUP DESTROY k g", "DEL k"} {
		c.do("XGROUP", "CREATE", "k", "g", "$", "MKSTREAM")
		b.send(strings.Fields("XREADGROUP GROUP g c1 BLOCK 0 STREAMS k >")...)
		blockedNow(1)
		c.want(end, ":1")
		if got := b.reply(); got != "-NOGROUP No such key 'k' or consumer group 'g' in XREADGROUP with GROUP option" {
			t.Errorf("%s: %s", end, got)
		}
	}
	step = ""
	b.want("XREADGROUP GROUP g c1 BLOCK -1 STREAMS k >", "-ERR timeout is negative")
	b.want("XREAD BLOCK 1.5 STREAMS k $", "-ERR timeout is not an integer or out of range")
}

// TestOneWaiterEach: of several that wait in one group, each entry wakes one, in the order in which they began to wait.
func TestOneWaiterEach(t *testing.T) {
	s, addr := nodeServer(t)
	c := dial(t, addr)
	c.want("XGROUP CREATE k g $ MKSTREAM", "+OK")
	var waiting []*client
	for i := range 5 {
		w := dial(t, addr)
		w.send("XREADGROUP", "GROUP", "g", fmt.Sprint("c", i), "COUNT", "1", "BLOCK", "0", "STREAMS", "k", ">")
		waitFor(t, "the client to block", func() bool { return s.blocked.Load() == int64(i+1) })
		waiting = append(waiting, w)
	}
	for i, w := range waiting {
		id := fmt.Sprintf("%d-1", i+1)
		c.want("XADD k "+id+" f v", "$3|"+id)
		if got := w.reply(); !strings.Contains(got, id) {
			t.Errorf("waiter %d: %s", i, got)
		}
	}
}

// TestWatch: a transaction whose watched key has changed does nothing.
func TestWatch(t *testing.T) {
	_, addr := nodeServer(t)
	c, other := dial(t, addr), dial(t, addr)
	c.want("SET a 1", "+OK")
	c.want("WATCH a", "+OK")
	other.want("SET a 2", "+OK")
	c.want("MULTI", "+OK")
	c.want("SET a 3", "+QUEUED")
	c.want("EXEC", "*-1")
	c.want("GET a", "$1|2")
	c.want("WATCH a", "+OK")
	c.want("MULTI", "+OK")
	c.want("SET a 3", "+QUEUED")
	c.want("PING", "+QUEUED")
	c.want("GET a", "+QUEUED")
	c.want("NOSUCH", "-ERR unknown command 'NOSUCH', with args beginning with: ")
	c.want("EXEC", "-EXECABORT Transaction discarded because of previous errors.")
	c.want("MULTI", "+OK")
	c.want("SET a 3", "+QUEUED")
	c.want("PING", "+QUEUED")
	c.want("XLEN a", "+QUEUED")
	c.want("GET a", "+QUEUED")
	c.want("EXEC", "*4|+OK|+PONG|-WRONGTYPE Operation against a key holding the wrong kind of value|$1|3")
}

// TestIdempotentAdd: a repetition answers the first entry's ID and adds nothing.
func TestIdempotentAdd(t *testing.T) {
	_, addr := nodeServer(t)
	c := dial(t, addr)
	first := c.do("XADD", "k", "IDMP", "p", "1", "*", "f", "v")
	if again := c.do("XADD", "k", "IDMP", "p", "1", "*", "f", "v"); again != first {
		t.Errorf("%s, then %s", first, again)
	}
	if other := c.do("XADD", "k", "IDMP", "p", "2", "*", "f", "v"); other == first {
		t.Errorf("another id gives %s again", other)
	}
	auto := c.do("XADD", "k", "IDMPAUTO", "p", "*", "f", "w")
	if again := c.do("XADD", "k", "IDMPAUTO", "p", "*", "f", "w"); again != auto {
		t.Errorf("IDMPAUTO: %s, then %s", auto, again)
	}
	c.want("XLEN k", ":3")
	c.want("XADD k IDMP p 3 5-1 f v", "-ERR IDMP and IDMPAUTO need the ID *")
}

// TestClientCaching: a read under tracking is invalidated right after its reply.
func TestClientCaching(t *testing.T) {
	_, addr := nodeServer(t)
	c := dial(t, addr)
	c.do("HELLO", "3")
	c.want("CLIENT TRACKING ON OPTIN", "+OK")
	c.want("CLIENT CACHING YES", "+OK")
	c.want("TTL k", ":-2")
	if got := c.reply(); got != ">2|$10|invalidate|*1|$1|k" {
		t.Errorf("after a tracked read: %s", got)
	}
	c.want("TTL k", ":-2")
	c.want("PING", "+PONG")
}
