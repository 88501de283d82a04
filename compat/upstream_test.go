package compat

import (
	"fmt"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/compat/internal/redistest"
	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft"
)

// Target makes an upstream of an address. The gateway's is used, which this package cannot import.
var Target func(addr string) Upstream

// startBoth runs a front end that keeps order* in the log and has a real server beside it.
func startBoth(t *testing.T) (*fakeBackend, *redistest.Server, string) {
	t.Helper()
	r := redistest.Start(t)
	b, addr := startBeside(t, r)
	return b, r, addr
}

func startBeside(t *testing.T, r *redistest.Server) (*fakeBackend, string) {
	t.Helper()
	b := newFake()
	b.submit = func(cmd engine.Command, done func(raft.Reply, error)) {
		reply := raft.Reply{Zones: 3}
		if _, ok := cmd.(*engine.StreamAdd); ok {
			reply.Published = engine.Published{Count: 1, Stream: engine.StreamID{Ms: 7, Seq: 1}}
		}
		done(reply, nil)
	}
	b.query = func(q engine.Query) (engine.Answer, error) {
		a := engine.Answer{Stream: &engine.StreamAnswer{}}
		if q.Stream != nil {
			a.Stream.Keys = make([]engine.KeyInfo, len(q.Stream.Keys))
		}
		return a, nil
	}
	_, addr := start(t, Options{Backend: b, Upstream: Target(r.Addr()), UpstreamKeep: []string{"order*"}})
	return b, addr
}

func TestPassThrough(t *testing.T) {
	b, r, addr := startBoth(t)
	c := dial(t, addr)
	c.want("SET k v", "+OK")
	c.want("GET k", "$1|v")
	c.want("GET nothing", "$-1")
	c.want("LPUSH l 1 2 3", ":3")
	c.want("LRANGE l 0 -1", "*3|$1|3|$1|2|$1|1")
	c.want("HSET h a 1", ":1")
	c.want("EVAL return{KEYS[1],1} 1 x", "*2|$1|x|:1")
	c.want("XADD elsewhere 1-1 a b", "$3|1-1")
	c.want("XADD orders * a b", "$3|7-1")
	c.want("MSET a 1 b 2", "+OK")
	c.want("NOSUCHCOMMAND a", "-ERR unknown command 'NOSUCHCOMMAND', with args beginning with: 'a' ")
	c.want("DBSIZE", ":6")
	spans := "-ERR the keys of this command are on both sides: those that match order* are in the log, others on the upstream; use one command for each side"
	c.want("DEL k orders", spans)
	only := " runs on the upstream only, and keys that match order* are in the log: use keys that match none of these"
	c.want("LPUSH orders 1", "-ERR 'lpush'"+only)
	c.want("MSET a 1 orders 2", "-ERR 'mset'"+only)
	c.want("EVAL return(1) 1 orders", "-ERR 'eval'"+only)
	c.want("EVAL return(1) 2 k orders", "-ERR 'eval'"+only)
	if got := r.Do("EXISTS", "orders"); got != "0" {
		t.Errorf("the log's stream is on the upstream")
	}
	for _, cmd := range b.commands {
		if add, ok := cmd.(*engine.StreamAdd); ok && add.Key != "orders" {
			t.Errorf("the log got %+v", add)
		}
	}
	// The record of a bridge goes with the stream it is about.
	c.want("WATCH {orders}:tercet:bridge", "+OK")
	c.want("MULTI", "+OK")
	c.want("XADD orders * a b", "+QUEUED")
	c.want("SET {orders}:tercet:bridge x", "+QUEUED")
	c.want("SET {elsewhere}:tercet:bridge x", "-ERR this transaction runs in the log, and the command belongs to the upstream: use two transactions")
	c.want("DISCARD", "+OK")
	// HELLO changes the version on both sides.
	if got := c.do("HELLO", "3"); !strings.HasPrefix(got, "%") {
		t.Fatalf("HELLO 3: %s", got)
	}
	c.want("GET nothing", "_")
	c.want("HSET h b 1", ":1")
}

// TestPassThroughPipeline mixes both sides in one pipeline, far deeper than any buffer: replies come in order.
func TestPassThroughPipeline(t *testing.T) {
	_, _, addr := startBoth(t)
	c := dial(t, addr)
	const n = 20_000
	go func() {
		var all []byte
		for i := range n {
			switch i % 4 {
			case 0:
				all = append(all, encodeCommand("XADD", "orders", "*", "a", "b")...)
			case 3:
				all = append(all, encodeCommand("ECHO", fmt.Sprint(i))...)
			default:
				all = append(all, encodeCommand("INCR", "n")...)
			}
		}
		c.nc.Write(all)
	}()
	count := 0
	for i := range n {
		want := ""
		switch i % 4 {
		case 0:
			want = "$3|7-1"
		case 3:
			want = fmt.Sprintf("$%d|%d", len(fmt.Sprint(i)), i)
		default:
			count++
			want = fmt.Sprintf(":%d", count)
		}
		if got := c.reply(); got != want {
			t.Fatalf("reply %d: %s, want %s", i, got, want)
		}
	}
}

func TestPassThroughTransactions(t *testing.T) {
	_, r, addr := startBoth(t)
	c := dial(t, addr)
	c.want("MULTI", "+OK")
	c.want("SET a 1", "+QUEUED")
	c.want("INCR a", "+QUEUED")
	c.want("EXEC", "*2|+OK|:2")

	c.want("MULTI", "+OK")
	c.want("MULTI", "-ERR MULTI calls can not be nested")
	c.want("DISCARD", "+OK")
	c.want("MULTI", "+OK")
	c.want("EXEC", "*0")
	c.want("EXEC", "-ERR EXEC without MULTI")

	c.want("MULTI", "+OK")
	c.want("SET a 5", "+QUEUED")
	c.want("XADD orders * a b", "-ERR this transaction runs on the upstream, and the command is about keys of the log: use two transactions")
	c.want("EXEC", "-EXECABORT Transaction discarded because of previous errors.")
	c.want("GET a", "$1|2")

	c.want("MULTI", "+OK")
	c.want("XADD orders * a b", "+QUEUED")
	c.want("SET a 5", "-ERR this transaction runs in the log, and the command belongs to the upstream: use two transactions")
	c.want("EXEC", "-EXECABORT Transaction discarded because of previous errors.")
	c.want("GET a", "$1|2")

	c.want("WATCH a", "+OK")
	r.Do("SET", "a", "changed")
	c.want("MULTI", "+OK")
	c.want("SET a 6", "+QUEUED")
	c.want("EXEC", "*-1")
	c.want("GET a", "$7|changed")

	// What is watched and what is written is on one side.
	both := "-ERR the keys of this command, and those that are watched, are on both sides: those that match order* are in the log, others on the upstream; use one command for each side"
	c.want("WATCH a", "+OK")
	c.want("WATCH orders", both)
	c.want("MULTI", "+OK")
	c.want("XADD orders * a b", both)
	c.want("EXEC", "-EXECABORT Transaction discarded because of previous errors.")
	c.want("WATCH orders", "+OK")
	c.want("WATCH a", both)
	c.want("UNWATCH", "+OK")

	// A connection that breaks takes the watch with it, and no command out of its transaction.
	c.want("WATCH a", "+OK")
	r.Do("CLIENT", "KILL", "TYPE", "normal")
	c.want("MULTI", "+OK")
	c.want("SET a 7", "+QUEUED")
	r.Do("CLIENT", "KILL", "TYPE", "normal")
	c.want("SET b 7", "+QUEUED")
	c.want("EXEC", "*-1")
	c.want("GET a", "$7|changed")
	c.want("MULTI", "+OK")
	c.want("SET a 8", "+QUEUED")
	r.Do("CLIENT", "KILL", "TYPE", "normal")
	redistest.Until(t, 20*time.Second, "the broken connection", func() error {
		if got := r.Do("INFO", "clients"); !strings.Contains(got, "connected_clients:1\r\n") && !strings.Contains(got, "connected_clients:1\n") {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
	c.want("SET b 8", "+QUEUED")
	if got := c.do("EXEC"); got != "*2|+OK|+OK" && !strings.HasPrefix(got, "-ERR the connection to the upstream br") {
		t.Errorf("EXEC over a broken connection: %s", got)
	}
	if a, b := r.Do("GET", "a"), r.Do("GET", "b"); (a == "8") != (b == "8") {
		t.Errorf("half a transaction was done: %s, %s", a, b)
	}
}

func TestPassThroughBlockingAndMessages(t *testing.T) {
	_, r, addr := startBoth(t)
	c := dial(t, addr)
	c.send("BLPOP", "list", "0")
	c.send("ECHO", "behind")
	redistest.Until(t, 20*time.Second, "the client to block", func() error {
		if !strings.Contains(r.Do("INFO", "clients"), "blocked_clients:1") {
			return fmt.Errorf("not blocked")
		}
		return nil
	})
	r.Do("LPUSH", "list", "x")
	if got := c.reply(); got != "*2|$4|list|$1|x" {
		t.Errorf("BLPOP: %s", got)
	}
	if got := c.reply(); got != "$6|behind" {
		t.Errorf("ECHO behind it: %s", got)
	}

	for _, version := range []string{"2", "3"} {
		s := dial(t, addr)
		s.do("HELLO", version)
		s.want("SUBSCRIBE ch", map[string]string{"2": "*3|$9|subscribe|$2|ch|:1", "3": ">3|$9|subscribe|$2|ch|:1"}[version])
		c.want("PUBLISH ch hi", ":1")
		if got := s.reply(); got != map[string]string{"2": "*", "3": ">"}[version]+"3|$7|message|$2|ch|$2|hi" {
			t.Errorf("message: %s", got)
		}
		s.want("SUBSCRIBE", "-ERR wrong number of arguments for 'subscribe' command")
		if version == "3" {
			s.want("GET nothing", "_")
			s.want("PING", "+PONG")
		} else {
			s.want("GET k", "-ERR Can't execute 'get': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this context")
			s.want("PING", "*2|$4|pong|$0|")
		}
		s.want("UNSUBSCRIBE", map[string]string{"2": "*3|$11|unsubscribe|$2|ch|:0", "3": ">3|$11|unsubscribe|$2|ch|:0"}[version])
		s.want("SET k v", "+OK")
		s.want("EVAL return{'subscribe','a'} 0", "*2|$9|subscribe|$1|a")
		s.want("XADD orders * a b", "$3|7-1")
	}

	// A client that goes while it blocks leaves nothing behind.
	gone := dial(t, addr)
	gone.send("BLPOP", "list", "0")
	redistest.Until(t, 20*time.Second, "the client to block", func() error {
		if !strings.Contains(r.Do("INFO", "clients"), "blocked_clients:1") {
			return fmt.Errorf("not blocked")
		}
		return nil
	})
	gone.nc.Close()
	redistest.Until(t, 20*time.Second, "the client to be gone", func() error {
		if !strings.Contains(r.Do("INFO", "clients"), "blocked_clients:0") {
			return fmt.Errorf("still blocked")
		}
		return nil
	})
}

func TestPassThroughWithoutUpstream(t *testing.T) {
	_, r, addr := startBoth(t)
	c := dial(t, addr)
	c.want("SET k v", "+OK")
	r.Kill()
	redistest.Until(t, 20*time.Second, "the broken connection", func() error {
		if got := c.do("GET", "k"); !strings.HasPrefix(got, "-ERR the upstream "+"redis://"+r.Addr()+" cannot be reached") {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
	c.want("XADD orders * a b", "$3|7-1") // the log does not need it
	r.Run()
	c.want("SET k again", "+OK")
	c.want("GET k", "$5|again")
}

// TestPassThroughTools runs programs that know nothing of Tercet.
func TestPassThroughTools(t *testing.T) {
	_, _, addr := startBoth(t)
	_, port, _ := net.SplitHostPort(addr)
	out, err := exec.Command("redis-benchmark", "-p", port, "-n", "20000", "-P", "16", "-c", "10", "-q", "-t", "set,get,lpush,lpop,sadd,hset").CombinedOutput()
	if err != nil || strings.Contains(string(out), "rror") {
		t.Errorf("redis-benchmark: %v\n%s", err, out)
	}
}
