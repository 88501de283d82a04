package compat

import (
	"strings"
	"testing"
)

func TestConnectionCommands(t *testing.T) {
	_, addr := start(t, Options{})
	c := dial(t, addr)
	for _, x := range []struct{ line, want string }{
		{"PING", "+PONG"},
		{"ping hello", "$5|hello"},
		{"PING a b", "-ERR wrong number of arguments for 'ping' command"},
		{"ECHO hi", "$2|hi"},
		{"echo", "-ERR wrong number of arguments for 'echo' command"},
		{"SELECT 0", "+OK"},
		{"SELECT 1", "-ERR DB index is out of range"},
		{"SELECT x", "-ERR value is not an integer or out of range"},
		{"FOO a b", "-ERR unknown command 'FOO', with args beginning with: 'a' 'b' "},
		{"FOO", "-ERR unknown command 'FOO', with args beginning with: "},
		{"CLIENT FOO", "-ERR unknown subcommand 'FOO'. Try CLIENT HELP."},
		{"CLIENT MAINT_NOTIFICATIONS ON", "-ERR unknown subcommand 'MAINT_NOTIFICATIONS'. Try CLIENT HELP."},
		{"CLIENT", "-ERR wrong number of arguments for 'client' command"},
		{"XGROUP CREATE a", "-ERR wrong number of arguments for 'xgroup|create' command"},
		{"CLIENT GETNAME", "$-1"},
		{"CLIENT SETNAME tester", "+OK"},
		{"CLIENT GETNAME", "$6|tester"},
		{"CLIENT SETINFO LIB-NAME lib", "+OK"},
		{"CLIENT SETINFO LIB-VER 1", "+OK"},
		{"CLIENT SETINFO FOO 1", "-ERR Unrecognized option 'FOO'"},
		{"CLIENT ID", ":1"},
		{"CLIENT NO-EVICT ON", "+OK"},
		{"CLIENT NO-TOUCH maybe", "-ERR syntax error"},
		{"CLIENT TRACKING ON OPTIN", "+OK"},
		{"CLIENT TRACKINGINFO", "*6|$5|flags|*2|$2|on|$5|optin|$8|redirect|:0|$8|prefixes|*0"},
		{"CLIENT CACHING YES", "+OK"},
		{"CLIENT TRACKING OFF", "+OK"},
		{"CLIENT CACHING YES", "-ERR CLIENT CACHING can be called only when the client is in tracking mode with OPTIN or OPTOUT mode enabled"},
		{"CLIENT KILL 1.2.3.4:5", "-ERR No such client"},
		{"CLIENT UNBLOCK 1", ":0"},
		{"CLUSTER SLOTS", "-ERR This instance has cluster support disabled"},
		{"CLUSTER INFO", "-ERR This instance has cluster support disabled"},
		{"AUTH x", "-ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?"},
		{"AUTH nobody x", "-WRONGPASS invalid username-password pair or user is disabled."},
		{"AUTH default x", "+OK"},
		{"HELLO 4", "-NOPROTO unsupported protocol version"},
		{"HELLO x", "-ERR Protocol version is not an integer or out of range"},
		{"HELLO 3 FOO", "-ERR Syntax error in HELLO option 'FOO'"},
		{"HELLO 2", "*14|$6|server|$6|valkey|$7|version|$5|8.1.0|$5|proto|:2|$2|id|:1|$4|mode|$10|standalone|$4|role|$6|master|$7|modules|*0"},
		{"EXEC", "-ERR EXEC without MULTI"},
		{"DISCARD", "-ERR DISCARD without MULTI"},
		{"WAIT 2 0", ":2"},
		{"WAITAOF 1 2 0", "*2|:1|:2"},
		{"CONFIG GET maxmemory-policy", "*2|$16|maxmemory-policy|$10|noeviction"},
		{"CONFIG SET maxmemory 1", "-ERR CONFIG SET failed (possibly related to argument 'maxmemory') - can't set immutable config"},
		{"COMMAND GETKEYS XREADGROUP GROUP g c COUNT 1 STREAMS a b > >", "*2|$1|a|$1|b"},
		{"COMMAND INFO xadd nosuch", "*2|*10|$4|xadd|:-5|*3|+write|+denyoom|+fast|:1|:1|:1|*3|+@write|+@stream|+@fast|*1|$23|nondeterministic_output|*1|*6|$5|flags|*2|+RW|+update|$12|begin_search|*4|$4|type|$5|index|$4|spec|*2|$5|index|:1|$9|find_keys|*4|$4|type|$5|range|$4|spec|*6|$7|lastkey|:0|$7|keystep|:1|$5|limit|:0|*0|*-1"},
		{"READONLY", "+OK"},
		{"READWRITE", "+OK"},
		{"PUBLISH ch m", ":0"},
		{"FLUSHALL", "-ERR flushall is not allowed on this node: it was not started with --flush-allowed"},
		{"RESET", "+RESET"},
		{"CLIENT GETNAME", "$-1"},
		{"HELLO 3 SETNAME again", "%7|$6|server|$6|valkey|$7|version|$5|8.1.0|$5|proto|:3|$2|id|:1|$4|mode|$10|standalone|$4|role|$6|master|$7|modules|*0"},
		{"CLIENT GETNAME", "$5|again"},
		{"CONFIG GET databases", "%1|$9|databases|$1|1"},
		{"CLIENT TRACKINGINFO", "%3|$5|flags|~1|$3|off|$8|redirect|:-1|$8|prefixes|*0"},
	} {
		c.want(x.line, x.want)
	}
	if info := c.do("INFO"); !strings.HasPrefix(info, "=") || !strings.Contains(info, "|role:master|") || !strings.Contains(info, "|loading:0|") || !strings.Contains(info, "|redis_version:7.2.4|") {
		t.Errorf("INFO: %s", info)
	}
	if info := c.do("INFO", "REPLICATION"); !strings.Contains(info, "|role:master|") || strings.Contains(info, "# Server") {
		t.Errorf("INFO REPLICATION: %s", info)
	}
	c.want("QUIT", "+OK")
	c.closed("")
}

func TestProtocolErrors(t *testing.T) {
	_, addr := start(t, Options{})
	for in, want := range map[string]string{
		"*1\r\n$-1\r\n":               "-ERR Protocol error: invalid bulk length|",
		"PING\r\n*x\r\n":              "+PONG|-ERR Protocol error: invalid multibulk length|",
		"*1\r\nPING\r\n":              "-ERR Protocol error: expected '$', got 'P'|",
		"GET \"a\r\n":                 "-ERR Protocol error: unbalanced quotes in request|",
		"POST / HTTP/1.1\r\nPING\r\n": "",
		"Host: example\r\n":           "",
	} {
		c := dial(t, addr)
		c.raw(in)
		c.closed(want)
	}
}
