// Command tercet is the whole product in one binary: the node, the local cluster, and the command line
// client.
package main

import (
	"os"
	"os/signal"
	"strings"
	"syscall"

	"tercet.dev/tercet/internal/timerslack"
)

// version is set by the linker (see Makefile).
var version = "dev"

func main() {
	if serves(os.Args[1:]) {
		timerslack.Widen()
	}
	// First of all: a signal that arrives while the process is still starting must end it in good order too.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	os.Exit(newApp(os.Stdin, os.Stdout, os.Stderr, signals).run(os.Args[1:]))
}

// serves reports whether the arguments ask for a server.
func serves(args []string) bool {
	for _, a := range args {
		if !strings.HasPrefix(a, "-") {
			return a == "server"
		}
	}
	return false
}
