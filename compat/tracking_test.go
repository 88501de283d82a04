package compat

import (
	"strings"
	"testing"

	"tercet.dev/tercet/server/servertest"
)

// TestTrackingBroadcast: with BCAST a client hears of every change of keys with its prefixes, whichever node was asked for
// it and whatever protocol it speaks, and of no other.
func TestTrackingBroadcast(t *testing.T) {
	nodes := servertest.Nodes(t, 3)
	_, addr := start(t, Options{Backend: nodes[0], FlushAllowed: true})
	_, elsewhere := start(t, Options{Backend: nodes[1]})
	writer := dial(t, elsewhere)
	all := dial(t, addr)
	all.do("HELLO", "3")
	some := dial(t, addr)
	some.do("HELLO", "3")
	all.want("CLIENT TRACKING ON BCAST", "+OK")
	some.want("CLIENT TRACKING ON BCAST PREFIX order: PREFIX user:", "+OK")
	hears := func(c *client, keys ...string) {
		t.Helper()
		for _, k := range keys {
			want := ">2|$10|invalidate|*1|$" + itoa(int64(len(k))) + "|" + k
			if got := c.reply(); got != want {
				t.Errorf("heard %s, want %s", got, want)
			}
		}
	}
	for _, line := range []string{"XADD order:1 1-1 a b", "SET other v", "SET user:1 v"} {
		if got := writer.do(strings.Fields(line)...); strings.HasPrefix(got, "-") {
			t.Errorf("%s: %s", line, got)
		}
	}
	hears(some, "order:1", "order:1", "user:1") // a key that comes is told of as such, and for what came into it
	hears(all, "order:1", "order:1", "other", "user:1")
	for _, line := range []string{"XDEL order:1 1-1", "XGROUP CREATE order:1 g 0", "EXPIRE user:1 1000", "RENAME user:1 user:2", "GETDEL user:2", "SET user:3 a", "SET user:3 b"} {
		if got := writer.do(strings.Fields(line)...); strings.HasPrefix(got, "-") {
			t.Errorf("%s: %s", line, got)
		}
	}
	hears(some, "order:1", "order:1", "user:1")
	if got := some.reply(); got != ">2|$10|invalidate|*2|$6|user:1|$6|user:2" {
		t.Errorf("a key that moved: %s", got)
	}
	hears(some, "user:2", "user:3", "user:3")
	some.want("CLIENT TRACKING OFF", "+OK")
	writer.want("DEL order:1", ":1")
	some.want("PING", "+PONG")
}

// TestTrackingRedirect: what a client of RESP2 reads is invalidated at the client that it redirects to.
func TestTrackingRedirect(t *testing.T) {
	_, addr := nodeServer(t)
	ear, c := dial(t, addr), dial(t, addr)
	id := strings.TrimPrefix(ear.do("CLIENT", "ID"), ":")
	ear.want("SUBSCRIBE __redis__:invalidate", "*3|$9|subscribe|$20|__redis__:invalidate|:1")
	c.want("CLIENT TRACKING ON REDIRECT "+id, "+OK")
	c.want("CLIENT GETREDIR", ":"+id)
	c.want("TTL k", ":-2")
	if got := ear.reply(); got != "*3|$7|message|$20|__redis__:invalidate|*1|$1|k" {
		t.Errorf("the other client heard %s", got)
	}
	if got := c.do("CLIENT", "INFO"); !strings.Contains(got, " flags=t ") || !strings.Contains(got, " redir="+id+" ") {
		t.Errorf("CLIENT INFO: %s", got)
	}
	c.want("CLIENT TRACKINGINFO", "*6|$5|flags|*1|$2|on|$8|redirect|:"+id+"|$8|prefixes|*0")
	ear.nc.Close()
	waitFor(t, "the redirection to be broken", func() bool {
		return strings.Contains(c.do("CLIENT", "TRACKINGINFO"), "broken_redirect")
	})
	c.want("TTL k", ":-2")
	c.want("CLIENT TRACKING OFF", "+OK")
	c.want("CLIENT GETREDIR", ":-1")
}

// TestTrackingErrors: the options' rules, in Valkey's words.
func TestTrackingErrors(t *testing.T) {
	_, addr := nodeServer(t)
	for _, row := range []struct{ before, line, want string }{
		{"", "CLIENT TRACKING ON REDIRECT 999999", "-ERR The client ID you want redirect to does not exist"},
		{"", "CLIENT TRACKING ON REDIRECT x", "-ERR value is not an integer or out of range"},
		{"", "CLIENT TRACKING ON REDIRECT", "-ERR syntax error"},
		{"", "CLIENT TRACKING ON PREFIX a", "-ERR PREFIX option requires BCAST mode to be enabled"},
		{"", "CLIENT TRACKING ON BCAST OPTIN", "-ERR OPTIN and OPTOUT are not compatible with BCAST"},
		{"", "CLIENT TRACKING ON OPTIN OPTOUT", "-ERR You can't specify both OPTIN mode and OPTOUT mode"},
		{"", "CLIENT TRACKING ON BCAST PREFIX a PREFIX ab", "-ERR Prefix 'a' overlaps with another provided prefix 'ab'. Prefixes for a single client must not overlap."},
		{"CLIENT TRACKING ON BCAST PREFIX ab", "CLIENT TRACKING ON BCAST PREFIX a", "-ERR Prefix 'a' overlaps with an existing prefix 'ab'. Prefixes for a single client must not overlap."},
		{"CLIENT TRACKING ON BCAST", "CLIENT TRACKING ON", "-ERR You can't switch BCAST mode on/off before disabling tracking for this client, and then re-enabling it with a different mode."},
		{"CLIENT TRACKING ON OPTIN", "CLIENT TRACKING ON OPTOUT", "-ERR You can't switch OPTIN/OPTOUT mode before disabling tracking for this client, and then re-enabling it with a different mode."},
		{"CLIENT TRACKING ON BCAST PREFIX a", "CLIENT TRACKINGINFO", "*6|$5|flags|*2|$2|on|$5|bcast|$8|redirect|:0|$8|prefixes|*1|$1|a"},
		{"CLIENT TRACKING ON BCAST", "CLIENT CACHING YES", "-ERR CLIENT CACHING YES is only valid when tracking is enabled in OPTIN mode."},
		{"", "CLIENT TRACKING MAYBE", "-ERR syntax error"},
		{"", "CLIENT TRACKING ON BOGUS", "-ERR syntax error"},
	} {
		c := dial(t, addr)
		if row.before != "" {
			c.want(row.before, "+OK")
		}
		c.want(row.line, row.want)
	}
}
