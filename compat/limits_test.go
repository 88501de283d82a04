package compat

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tercet.dev/tercet/compat/acl"
	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft"
)

// closedBy returns how many connections the server has closed for a reason.
func closedBy(t *testing.T, reg *prometheus.Registry, reason string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.Metric {
			if f.GetName() == "tercet_compat_closed_total" && m.Label[0].GetValue() == reason {
				return m.Counter.GetValue()
			}
		}
	}
	return 0
}

func TestConnectionLimit(t *testing.T) {
	_, addr := start(t, Options{Limits: Limits{Connections: 3}})
	var open []*client
	for range 3 {
		c := dial(t, addr)
		c.want("PING", "+PONG")
		open = append(open, c)
	}
	dial(t, addr).closed("-ERR max number of clients reached|")
	open[0].want("QUIT", "+OK")
	open[0].closed("")
	// The place is free again as soon as the server has seen the end.
	for {
		nc, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(nc, "PING\r\n")
		b := make([]byte, 5)
		io.ReadFull(nc, b)
		nc.Close()
		if string(b) == "+PONG" {
			return
		}
	}
}

// TestUnauthenticated: what a client that has not logged in may send, and how long it may take.
func TestUnauthenticated(t *testing.T) {
	alice, err := acl.NewUser("alice").Set("on", ">pw", "~orders:*", "+@all", "-flushall")
	if err != nil {
		t.Fatal(err)
	}
	_, addr := start(t, Options{Users: []*acl.User{alice}, UsersFrom: "users.acl", Limits: Limits{LoginTimeout: 50 * time.Millisecond, AuthFailures: 1000}})
	dial(t, addr).closed("") // says nothing for too long
	fresh := func() *client {
		_, addr := start(t, Options{Users: []*acl.User{alice}, UsersFrom: "users.acl"})
		return dial(t, addr)
	}
	c := fresh()
	c.want("PING", "-NOAUTH Authentication required.")
	c.want("HELLO 3", "-NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH <user> <pass> option can be used to authenticate the client and select the RESP protocol version at the same time")
	c.want("AUTH alice no", "-WRONGPASS invalid username-password pair or user is disabled.")
	c.want("AUTH pw", "-WRONGPASS invalid username-password pair or user is disabled.")
	c.want("AUTH alice pw", "+OK")
	c.want("ACL WHOAMI", "$5|alice")
	c.want("XLEN orders:1", ":0")
	c.want("XADD other * a b", "-NOPERM No permissions to access a key")
	c.want("FLUSHALL", "-NOPERM User alice has no permissions to run the 'flushall' command")
	c.want("SUBSCRIBE ch", "-NOPERM No permissions to access a channel")
	if log := c.do("ACL", "LOG", "1"); !strings.Contains(log, "|$7|channel|") || !strings.Contains(log, "$5|alice") {
		t.Errorf("ACL LOG: %s", log)
	}
	c.want("ACL SETUSER bob on", "-ERR the users of this node come from the file users.acl: change it on every node and run ACL LOAD")

	c = fresh()
	c.raw("*11\r\n")
	c.closed("-ERR Protocol error: unauthenticated multibulk length|")
	c = fresh()
	c.raw("*1\r\n$16385\r\n")
	c.closed("-ERR Protocol error: unauthenticated bulk length|")
	c = fresh()
	c.want("HELLO 3 AUTH alice pw SETNAME me", "%7|$6|server|$6|valkey|$7|version|$5|8.1.0|$5|proto|:3|$2|id|:1|$4|mode|$10|standalone|$4|role|$6|master|$7|modules|*0")
}

// fromAfar makes connections look as if they came from another machine.
type fromAfar struct{ net.Listener }

type farConn struct{ net.Conn }

func (farConn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 40000} }

func (l fromAfar) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return farConn{c}, nil
}

// TestProtectedMode: while nobody needs a password, only clients of this machine are let in, unless told otherwise; once the
// default user is off, others may come to log in.
func TestProtectedMode(t *testing.T) {
	afar := func(s *Server) *client {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- s.Serve(fromAfar{l}) }()
		t.Cleanup(func() {
			s.Close()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
		return dial(t, l.Addr().String())
	}
	s, addr := start(t, Options{})
	afar(s).closed(strings.TrimSuffix(errProtected, "\r\n") + "|")
	near := dial(t, addr)
	near.want("PING", "+PONG")
	near.want("ACL SETUSER bob on >pw ~* +@all", "+OK")
	near.want("ACL SETUSER default off", "+OK")
	c := afar(s)
	c.want("PING", "-NOAUTH Authentication required.")
	c.want("AUTH bob pw", "+OK")
	c.want("PING", "+PONG")

	s, _ = start(t, Options{Insecure: true})
	afar(s).want("PING", "+PONG")
}

// TestUsersAsDocuments: users that are set are users at once; one that is deleted is cut off.
func TestUsersAsDocuments(t *testing.T) {
	_, addr := start(t, Options{})
	admin := dial(t, addr)
	admin.want("ACL SETUSER bob on >pw ~* +@all -acl", "+OK")
	bob := dial(t, addr)
	bob.want("AUTH bob pw", "+OK")
	bob.want("ACL WHOAMI", "-NOPERM User bob has no permissions to run the 'acl|whoami' command")
	admin.want("ACL SETUSER bob +acl|whoami", "+OK")
	bob.want("ACL WHOAMI", "$3|bob")
	admin.want("ACL SETUSER bob bogus", "-ERR Error in ACL SETUSER modifier 'bogus': Syntax error")
	admin.want("ACL USERS", "*2|$3|bob|$7|default")
	admin.want("ACL DELUSER bob nobody", ":1")
	bob.closed("")
	admin.want("ACL GETUSER bob", "*-1")
	admin.want("ACL DELUSER default", "-ERR The 'default' user cannot be removed")
	admin.want("ACL SETUSER default off", "+OK")
	dial(t, addr).want("PING", "-NOAUTH Authentication required.")
}

// TestSlowReaders: a client that reads nothing is cut off at its limit, and nobody else notices.
func TestSlowReaders(t *testing.T) {
	reg := prometheus.NewRegistry()
	s, addr := start(t, Options{Registerer: reg, Limits: Limits{OutputBytes: 1 << 20}})
	slow := dial(t, addr)
	slow.nc.(*net.TCPConn).SetReadBuffer(4096)
	pipeline := bytes.Repeat(encodeCommand("INFO"), 200)
	for range 200 {
		if _, err := slow.nc.Write(pipeline); err != nil {
			break // closed already
		}
	}
	waitFor(t, "the client to be cut off", func() bool { return closedBy(t, reg, "output") == 1 })
	dial(t, addr).want("PING", "+PONG")
	waitFor(t, "the memory to be given back", func() bool { return s.memory.used.Load() < 64<<10 })
}

// waitFor polls a condition that nothing announces.
func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
		<-tick.C
	}
}

func TestStalledCommand(t *testing.T) {
	reg := prometheus.NewRegistry()
	_, addr := start(t, Options{Registerer: reg, Limits: Limits{CommandTimeout: 20 * time.Millisecond}})
	c := dial(t, addr)
	c.raw("*2\r\n$4\r\nECHO\r\n$5\r\nhel")
	c.closed("")
	waitFor(t, "the stalled command to be counted", func() bool { return closedBy(t, reg, "stalled") == 1 })
}

func TestIdleConnection(t *testing.T) {
	reg := prometheus.NewRegistry()
	_, addr := start(t, Options{Registerer: reg, Limits: Limits{IdleTimeout: 50 * time.Millisecond}})
	dial(t, addr).closed("")
	waitFor(t, "the idle connection to be counted", func() bool { return closedBy(t, reg, "idle") == 1 })
}

// TestInputMemory: a command that does not fit the budget ends its connection; the budget comes back.
func TestInputMemory(t *testing.T) {
	reg := prometheus.NewRegistry()
	s, addr := start(t, Options{Registerer: reg, Limits: Limits{MemoryBytes: 1 << 20}})
	c := dial(t, addr)
	fmt.Fprintf(c.nc, "*2\r\n$4\r\nECHO\r\n$8000000\r\n")
	c.nc.Write(make([]byte, 8000000)) // fails when the server has closed
	waitFor(t, "the connection to be closed", func() bool { return closedBy(t, reg, "memory") == 1 })
	waitFor(t, "the memory to be given back", func() bool { return s.memory.used.Load() < 64<<10 })
	dial(t, addr).want("PING", "+PONG")
}

// TestTransactionLimit: MULTI without end costs a bounded amount, and its EXEC fails.
func TestTransactionLimit(t *testing.T) {
	_, addr := start(t, Options{Limits: Limits{TransactionBytes: 2000, Watches: 3}})
	c := dial(t, addr)
	c.want("MULTI", "+OK")
	refused := false
	for range 100 {
		refused = refused || strings.HasPrefix(c.do("ECHO", "hello"), "-ERR the transaction is larger than 2000 bytes")
	}
	if !refused {
		t.Error("a hundred commands are queued")
	}
	c.want("EXEC", "-EXECABORT Transaction discarded because of previous errors.")
	c.want("WATCH a b c d", "-ERR a transaction may watch 3 keys")
}

// TestPipelineOrder: replies come in the order of commands whatever completes first, and a read waits for the writes before it.
func TestPipelineOrder(t *testing.T) {
	f := newFake()
	type pending struct {
		cmd  *engine.StreamAdd
		done func(raft.Reply, error)
	}
	submitted := make(chan pending, 100)
	f.submit = func(cmd engine.Command, done func(raft.Reply, error)) {
		submitted <- pending{cmd.(*engine.StreamAdd), done}
	}
	asked := make(chan struct{}, 1)
	f.query = func(engine.Query) (engine.Answer, error) {
		asked <- struct{}{}
		return engine.Answer{Stream: &engine.StreamAnswer{Count: 42}}, nil
	}
	_, addr := start(t, Options{Backend: f})
	c := dial(t, addr)
	c.raw(string(encodeCommand("XADD", "k", "1-1", "a", "b")) + string(encodeCommand("XADD", "k", "2-1", "a", "b")) + "PING\r\n" + "XLEN k\r\n" + "PING last\r\n")
	first, second := <-submitted, <-submitted // both before either was answered
	if first.cmd.ID.Ms != 1 || second.cmd.ID.Ms != 2 {
		t.Fatalf("submitted %v, %v", first.cmd.ID, second.cmd.ID)
	}
	reply := func(p pending) {
		var r raft.Reply
		r.Published.Stream = p.cmd.ID
		p.done(r, nil)
	}
	reply(second)
	select {
	case <-asked:
		t.Fatal("the read did not wait for the writes")
	default:
	}
	reply(first)
	for _, want := range []string{"$3|1-1", "$3|2-1", "+PONG", ":42", "$4|last"} {
		if got := c.reply(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// TestDeepPipeline: a hundred thousand commands written before anything is read are all answered.
func TestDeepPipeline(t *testing.T) {
	_, addr := start(t, Options{})
	c := dial(t, addr)
	const n = 100000
	c.raw(strings.Repeat("PING\r\n", n))
	got := make([]byte, n*len("+PONG\r\n"))
	if _, err := io.ReadFull(c.r, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, bytes.Repeat([]byte("+PONG\r\n"), n)) {
		t.Error("the replies are not what was asked for")
	}
}

// TestSplit: every command cut at every offset gives the same reply.
func TestSplit(t *testing.T) {
	_, addr := start(t, Options{})
	c := dial(t, addr)
	for _, cmd := range []string{string(encodeCommand("ECHO", "a\r\nb")), "ECHO \"a\\r\\nb\"\r\n"} {
		for i := range len(cmd) {
			c.raw(cmd[:i])
			c.raw(cmd[i:])
			if got := c.reply(); got != "$4|a|b" {
				t.Fatalf("cut at %d: %s", i, got)
			}
		}
	}
}

// TestShutdownAnswersFirst: what is being carried out is answered before the connection is closed.
func TestShutdownAnswersFirst(t *testing.T) {
	f := newFake()
	release := make(chan func(raft.Reply, error), 1)
	f.submit = func(_ engine.Command, done func(raft.Reply, error)) { release <- done }
	s, addr := start(t, Options{Backend: f})
	c := dial(t, addr)
	c.send("XADD", "k", "5-1", "a", "b")
	done := <-release
	stopped := make(chan error, 1)
	go func() { stopped <- s.Shutdown(t.Context()) }()
	waitFor(t, "the shutdown to begin", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.closed
	})
	var r raft.Reply
	r.Published.Stream = engine.StreamID{Ms: 5, Seq: 1}
	done(r, nil)
	c.closed("$3|5-1|")
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// TestCluster: what cluster clients are told, by the leader and by others.
func TestCluster(t *testing.T) {
	f := newFake()
	_, addr := start(t, Options{Backend: f, Cluster: true})
	c := dial(t, addr)
	c.want("CLUSTER KEYSLOT {user}:1", ":5474")
	c.want("CLUSTER KEYSLOT 123456789", ":12739")
	slots := c.do("CLUSTER", "SLOTS")
	if !strings.HasPrefix(slots, "*1|*5|:0|:16383|*4|$9|127.0.0.1|:6379|$40|") {
		t.Errorf("CLUSTER SLOTS: %s", slots)
	}
	c.want("SELECT 1", "-ERR SELECT is not allowed in cluster mode")
	c.want("XLEN k", ":0")
	f.mu.Lock()
	f.leading, f.status.Leader = false, "n2"
	f.mu.Unlock()
	c.want("XLEN k", "-MOVED 7629 127.0.0.1:6380")
	c.want("READONLY", "+OK")
	c.want("XLEN k", ":0")
	c.want("XADD k * a b", "-MOVED 7629 127.0.0.1:6380")
	if info := c.do("INFO", "replication"); !strings.Contains(info, "|role:slave|master_host:127.0.0.1|master_port:6380|") {
		t.Errorf("INFO: %s", info)
	}
}

// TestFailedLogins: above the allowed number a second, each failed login waits for a place behind all others.
func TestFailedLogins(t *testing.T) {
	s, _ := start(t, Options{Limits: Limits{AuthFailures: 10}})
	here, there := net.Pipe()
	defer there.Close()
	gone := newConn(s, here)
	gone.kill("") // whoever is gone does not wait, but has taken a place
	before := time.Now()
	for range 100 {
		s.logins.failed(gone)
	}
	if ahead := s.logins.next.Sub(before); ahead < 9*time.Second {
		t.Errorf("a hundred failures of ten a second are a queue of %v", ahead)
	}
}
