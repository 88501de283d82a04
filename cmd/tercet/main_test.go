package main

import (
	"os"
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
