package main

import (
	"os"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// A command that starts servers starts its own binary, and under test that is this one: it must not run the tests
	// again, and those start servers.
	if len(os.Args) > 1 && os.Args[1] == "server" {
		os.Exit(exitFailure)
	}
	goleak.VerifyTestMain(m)
}

// TestServes: only a server runs its program once more to widen its timer slack.
func TestServes(t *testing.T) {
	for args, want := range map[string]bool{
		"server": true, "server --node-id n1": true, "--log-level=debug server": true,
		"": false, "dev": false, "send server": false, "help server": false, "--help": false,
	} {
		if got := serves(strings.Fields(args)); got != want {
			t.Errorf("%q: %v", args, got)
		}
	}
}
