package main

import (
	"encoding/json"
	"strings"
	"testing"

	"tercet.dev/tercet/server/wire"
)

func TestManageCommands(t *testing.T) {
	c := cli{t, startNode(t)}
	expect := func(want int, args ...string) string {
		t.Helper()
		code, out, stderr := c.run(args...)
		if code != want {
			t.Fatalf("%q: exit %d, want %d: %s%s", args, code, want, out, stderr)
		}
		return out
	}
	contains := func(out string, words ...string) {
		t.Helper()
		for _, w := range words {
			if !strings.Contains(out, w) {
				t.Errorf("no %q in:\n%s", w, out)
			}
		}
	}
	contains(expect(exitOK, "topic", "create", "orders", "--retention", "2h"), "settings.retentionDefaultSeconds  7200")
	expect(exitUsage, "topic", "set", "orders")
	expect(exitUsage, "topic", "set", "orders", "--retention", "1500ms")
	expect(exitUsage, "topic", "set", "orders", "--retention", "1s")
	expect(exitNotFound, "topic", "set", "none", "--retention", "1h")
	contains(expect(exitOK, "topic", "set", "orders", "--depth-max", "100"), "7200", "100")
	contains(expect(exitOK, "topic", "pause", "orders"), "settings.paused                   true")
	contains(expect(exitOK, "topic", "list"), "orders", "paused")
	expect(exitOK, "topic", "resume", "orders")
	contains(expect(exitOK, "topic", "create", "a/b \x1b[2J"), `"a/b \x1b[2J"`)
	var topic wire.Topic
	if err := json.Unmarshal([]byte(expect(exitOK, "topic", "show", "a/b \x1b[2J", "-o", "json")), &topic); err != nil || topic.Name != "a/b \x1b[2J" {
		t.Errorf("%+v, %v", topic, err)
	}

	contains(expect(exitOK, "group", "create", "orders", "billing", "--max-deliveries", "1", "--park"), "settings.maxDeliveries", "settings.park")
	id := strings.TrimSpace(expect(exitOK, "send", "orders", "hello", "--header", "x-customer: 17"))
	id, _, _ = strings.Cut(id, " ")
	expect(exitOK, "receive", "orders", "--group", "billing")
	contains(expect(exitOK, "message", "list", "orders", "--group", "billing", "--state", "leased"), "hello", "5 bytes")
	contains(expect(exitOK, "message", "list", "orders", "--header", "x-customer=17"), "hello")
	if out := expect(exitOK, "message", "list", "orders", "--header", "x-customer=18"); out != "" {
		t.Errorf("found %q", out)
	}
	expect(exitOK, "send", "bills", `{"to": "C:\\"}`)
	contains(expect(exitOK, "message", "list", "bills"), `{"to": "C:\\\\"}`) // readable as it is but for what needs escapes
	expect(exitUsage, "message", "list", "orders", "--state", "leased")
	expect(exitUsage, "message", "list", "orders", "--since", "yesterday")
	contains(expect(exitOK, "message", "show", "orders", id, "--verify"), id, "billing", "leased", "crc32c", "yes")
	expect(exitNotFound, "message", "show", "orders", "none")
	contains(expect(exitOK, "group", "show", "orders", "billing"), "inflight", "rates.drainPerSecond")
	contains(expect(exitOK, "group", "list", "orders"), "billing", "INFLIGHT")
	expect(exitUsage, "group", "seek", "orders", "billing")
	expect(exitUsage, "group", "seek", "orders", "billing", "--at", "middle")
	expect(exitUsage, "group", "seek", "orders", "billing", "--at", "end", "--time", "1h")
	expect(exitOK, "group", "seek", "orders", "billing", "--time", "1h")
	var got struct {
		ReceiptHandle string `json:"receiptHandle"`
	}
	if err := json.Unmarshal([]byte(expect(exitOK, "receive", "orders", "--group", "billing", "-o", "json")), &got); err != nil {
		t.Fatal(err)
	}
	expect(exitOK, "release", "orders", "--group", "billing", got.ReceiptHandle, "--reason", "no stock")
	await(t, "the message to be parked", func() bool {
		return strings.Contains(expect(exitOK, "parked", "list", "orders", "billing"), "no stock")
	})
	expect(exitUsage, "parked", "redrive", "orders", "billing")
	contains(expect(exitOK, "parked", "redrive", "orders", "billing", "--all", "--dry-run"), "1 would be redriven")
	contains(expect(exitOK, "parked", "redrive", "orders", "billing", id, "--rate", "10"), "1 redriven")
	contains(expect(exitOK, "parked", "drop", "orders", "billing", "--all"), "0 dropped")
	expect(exitUsage, "topic", "purge", "orders")
	expect(exitUsage, "topic", "purge", "orders", "--confirm", "order")
	expect(exitOK, "topic", "purge", "orders", "--confirm", "orders")
	expect(exitUsage, "group", "delete", "orders", "billing")
	expect(exitOK, "group", "delete", "orders", "billing", "--confirm", "billing")
	expect(exitOK, "topic", "delete", "orders", "--confirm", "orders")
	expect(exitNotFound, "topic", "show", "orders")
}
