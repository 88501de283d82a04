package harness

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"
)

// Ports handed out by this test binary. A port is not handed out twice: a node that was killed must find its
// port free when it comes back.
var ports struct {
	sync.Mutex
	taken map[int]bool
}

// freePort returns a loopback port on which nothing listens. They lie below the range from which the kernel takes
// the ports of outgoing connections, since one of those could sit on a killed node's port when it is restarted.
func freePort(tb testing.TB) int { return FreePorts(tb, 1) }

// FreePorts returns the first of n loopback ports in a row on which nothing listens.
func FreePorts(tb testing.TB, n int) int {
	tb.Helper()
	ports.Lock()
	defer ports.Unlock()
	if ports.taken == nil {
		ports.taken = map[int]bool{}
	}
	for range 1000 {
		port := 12_000 + rand.IntN(18_000)
		free := 0
		for free < n && !ports.taken[port+free] && unused(port+free) {
			free++
		}
		if free < n {
			continue
		}
		for i := range n {
			ports.taken[port+i] = true
		}
		return port
	}
	tb.Fatal("no free port on 127.0.0.1 between 12000 and 30000")
	return 0
}

// unused reports whether nothing listens on the port.
func unused(port int) bool {
	for _, host := range []string{"127.0.0.1", "[::1]"} {
		l, err := net.Listen("tcp", fmt.Sprintf("%s:%d", host, port))
		switch {
		case err == nil:
			l.Close()
		case errors.Is(err, syscall.EADDRINUSE):
			return false
		}
	}
	return true
}

// FreeAddr returns a loopback address on which nothing listens.
func FreeAddr(tb testing.TB) string { return fmt.Sprintf("127.0.0.1:%d", freePort(tb)) }
