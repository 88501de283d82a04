package compat

import (
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// badInput is what malformed, oversized and hostile clients send, with what they are answered before the connection is closed
// or, with open, stays. What cannot be told from outside (limits of memory, of time and of what waits) is tested in compat.
var badInput = []struct {
	name, in, want string
	open           bool
}{
	{"empty commands", "*0\r\n*-1\r\n*-2\r\n\r\nPING\r\n", "+PONG\r\n", true},
	{"too many arguments", "*1048577\r\n", "-ERR Protocol error: invalid multibulk length\r\n", false},
	{"2^31 arguments", "*2147483648\r\n", "-ERR Protocol error: invalid multibulk length\r\n", false},
	{"2^63-1 arguments", "*9223372036854775807\r\n", "-ERR Protocol error: invalid multibulk length\r\n", false},
	{"a plus", "*+1\r\n", "-ERR Protocol error: invalid multibulk length\r\n", false},
	{"a leading zero", "*01\r\n", "-ERR Protocol error: invalid multibulk length\r\n", false},
	{"a blank", "* 1\r\n", "-ERR Protocol error: invalid multibulk length\r\n", false},
	{"bulk -1", "*1\r\n$-1\r\n", "-ERR Protocol error: invalid bulk length\r\n", false},
	{"bulk of 512 MiB + 1", "*1\r\n$536870913\r\n", "-ERR Protocol error: invalid bulk length\r\n", false},
	{"bulk of 2^63-1", "*1\r\n$9223372036854775807\r\n", "-ERR Protocol error: invalid bulk length\r\n", false},
	{"longer than said", "*1\r\n$3\r\nPING\r\n", "-ERR Protocol error: invalid bulk length\r\n", false},
	{"nested", "*1\r\n*1\r\n$4\r\nPING\r\n", "-ERR Protocol error: expected '$', got '*'\r\n", false},
	{"deeply nested", strings.Repeat("*1\r\n", 10_000), "-ERR Protocol error: expected '$', got '*'\r\n", false},
	{"a map of RESP3", "*1\r\n%1\r\n", "-ERR Protocol error: expected '$', got '%'\r\n", false},
	{"an attribute", "*1\r\n|1\r\n", "-ERR Protocol error: expected '$', got '|'\r\n", false},
	{"a long line", strings.Repeat("a", 65537), "-ERR Protocol error: too big inline request\r\n", false},
	{"unbalanced quotes", "GET \"a\r\n", "-ERR Protocol error: unbalanced quotes in request\r\n", false},
	{"a web page", "POST / HTTP/1.1\r\nHost: example\r\n\r\nXADD evil * f v\r\n", "", false},
	{"a host header", "Host: example\r\n", "", false},
	{"HELLO 4", "HELLO 4\r\n", "-NOPROTO unsupported protocol version\r\n", true},
	{"HELLO of a word", "HELLO three\r\n", "-ERR Protocol version is not an integer or out of range\r\n", true},
	{"a block of -1", "XREAD BLOCK -1 STREAMS s $\r\n", "-ERR timeout is negative\r\n", true},
	{"a block of 1e308", "XREAD BLOCK 1e308 STREAMS s $\r\n", "-ERR timeout is not an integer or out of range\r\n", true},
	{"a block of nan", "XREAD BLOCK nan STREAMS s $\r\n", "-ERR timeout is not an integer or out of range\r\n", true},
	{"a block of inf", "XREAD BLOCK inf STREAMS s $\r\n", "-ERR timeout is not an integer or out of range\r\n", true},
	{"a negative ID", "XADD bad -1-1 f v\r\n", "-ERR Invalid stream ID specified as stream command argument\r\n", true},
	{"ID of stars", "XADD bad *-* f v\r\n", "-ERR Invalid stream ID specified as stream command argument\r\n", true},
	{"ID beyond 64 bits", "XADD bad 18446744073709551616-0 f v\r\n", "-ERR Invalid stream ID specified as stream command argument\r\n", true},
	{"ID with a prefix", "XADD bad 0x1-1 f v\r\n", "-ERR Invalid stream ID specified as stream command argument\r\n", true},
	{"ID with a blank behind", "XADD bad \"1 \" f v\r\n", "-ERR Invalid stream ID specified as stream command argument\r\n", true},
	{"ID zero", "XADD bad 0-0 f v\r\n", "-ERR The ID specified in XADD must be greater than 0-0\r\n", true},
	{"the count is no number", "XRANGE bad - + COUNT 9223372036854775808\r\n", "-ERR value is not an integer or out of range\r\n", true},
	{"minus zero", "XRANGE bad - + COUNT -0\r\n", "-ERR value is not an integer or out of range\r\n", true},
	{"none of it was stored", "EXISTS bad evil\r\n", ":0\r\n", true},
	{"NUL and CR LF", "*5\r\n$4\r\nXADD\r\n$4\r\nk\x00\r\n\r\n$3\r\n1-1\r\n$3\r\n\x00\r\n\r\n$0\r\n\r\n*2\r\n$3\r\nDEL\r\n$4\r\nk\x00\r\n\r\n", "$3\r\n1-1\r\n:1\r\n", true},
	{"an empty key", "XADD \"\" 1-1 f v\r\n", "-ERR name is not valid\r\n", true},
	{"EVAL", "EVAL x 0\r\n", "-ERR unknown command 'EVAL', with args beginning with: 'x' '0' \r\n", true},
	{"MODULE", "MODULE LOAD x\r\n", "-ERR unknown command 'MODULE', with args beginning with: 'LOAD' 'x' \r\n", true},
	{"MIGRATE", "MIGRATE h 1 k 0 1\r\n", "-ERR unknown command 'MIGRATE', with args beginning with: 'h' '1' 'k' '0' '1' \r\n", true},
	{"SHUTDOWN", "SHUTDOWN\r\n", "-ERR unknown command 'SHUTDOWN', with args beginning with: \r\n", true},
	{"REPLICAOF", "REPLICAOF h 1\r\n", "-ERR unknown command 'REPLICAOF', with args beginning with: 'h' '1' \r\n", true},
	{"FLUSHALL", "FLUSHALL\r\n", "-ERR flushall is not allowed on this node: it was not started with --flush-allowed\r\n", true},
	{"a pattern against a long key", "KEYS " + strings.Repeat("*a", 5_000) + "b\r\n", "*0\r\n", true},
	{"a transaction that is broken", "MULTI\r\nNOSUCH\r\nEXEC\r\n", "+OK\r\n-ERR unknown command 'NOSUCH', with args beginning with: \r\n-EXECABORT Transaction discarded because of previous errors.\r\n", true},
}

// TestBadInput sends each of them to the leader and to a follower: an error to the sender, and nothing to anyone else.
func TestBadInput(t *testing.T) {
	c := harness.Start(t, harness.Options{})
	followers, leader := c.Followers()
	for _, n := range []*harness.Node{leader, followers[0]} {
		other := dial(t, n.Valkey) // connected all the time
		other.must(t, "SET "+strings.Repeat("a", 4_000)+" v")
		for _, x := range badInput {
			nc, err := net.Dial("tcp", n.Valkey)
			if err != nil {
				t.Fatal(err)
			}
			if err := nc.SetDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			in, want := x.in, x.want
			if x.open {
				in, want = in+"QUIT\r\n", want+"+OK\r\n"
			}
			// The server may close before it has read everything, as it should.
			_, _ = io.WriteString(nc, in)
			got, err := io.ReadAll(nc)
			if string(got) != want && (err == nil || len(got) > 0) {
				t.Errorf("%s, %s: got %.300q, %v, want %.300q", n.ID, x.name, got, err, want)
			}
			nc.Close()
		}
		if got := other.must(t, "PING"); got != "PONG" {
			t.Errorf("another client is answered %s", got)
		}
	}
	c.EqualHashes()
}
