package main

import (
	"io"
	"strings"
	"testing"
)

// TestSurface: what scripts and other programs hold on to is there under exactly these names. A line may be added here,
// never changed or taken away.
func TestSurface(t *testing.T) {
	root := (&app{out: io.Discard, err: io.Discard}).root()
	for command, flags := range map[string]string{
		"dev": "data http-port peer-port valkey-port valkey-mode virtual-clock app vercel-json deployment-id",
		"server": "node-id zone data http peer valkey peers join durability zone-timeout region flush-allowed push-allow disk-reserve " +
			"wal-segment-size tls-cert tls-key tls-client-ca valkey-acl valkey-mode insecure config virtual-clock",
		"send":             "jsonl durability server output",
		"receive":          "group ack exec wait max server output",
		"ack":              "server",
		"release":          "server",
		"extend":           "server",
		"peek":             "server",
		"tail":             "server",
		"cluster status":   "server output",
		"cluster add":      "server",
		"cluster remove":   "server",
		"cluster replace":  "server",
		"cluster recover":  "data force",
		"cluster transfer": "server",
		"wal dump":         "data",
		"wal verify":       "data",
		"bench publish":    "via publishers size",
		"message show":     "server",
		"token create":     "value-file",
		"token list":       "server",
		"token revoke":     "server",
		"version":          "output",
	} {
		cmd, rest, err := root.Find(strings.Fields(command))
		if err != nil || len(rest) > 0 || cmd.CommandPath() != "tercet "+command {
			t.Errorf("tercet %s: %v", command, err)
			continue
		}
		for flag := range strings.FieldsSeq(flags) {
			if cmd.Flag(flag) == nil {
				t.Errorf("tercet %s has no flag --%s", command, flag)
			}
		}
	}
	for name, code := range map[string][2]int{
		"failure": {exitFailure, 1}, "usage": {exitUsage, 2}, "not found": {exitNotFound, 3}, "precondition": {exitPrecondition, 4},
		"unavailable": {exitUnavailable, 5}, "outcome unknown": {exitOutcomeUnknown, 6},
	} {
		if code[0] != code[1] {
			t.Errorf("the exit code of %s is %d, want %d", name, code[0], code[1])
		}
	}
}
