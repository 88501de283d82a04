package harness

import (
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
)

// Ports handed out by this test binary. A port is not handed out twice: a node that was killed must find its
// port free when it comes back.
var ports struct {
	sync.Mutex
	taken map[int]bool
}

// freePort returns a loopback port on which nothing listens. It lies below the range from which the kernel takes
// the ports of outgoing connections, since one of those could sit on a killed node's port when it is restarted.
func freePort(tb testing.TB) int {
	tb.Helper()
	ports.Lock()
	defer ports.Unlock()
	if ports.taken == nil {
		ports.taken = map[int]bool{}
	}
	for range 1000 {
		port := 12_000 + rand.IntN(18_000)
		if ports.taken[port] {
			continue
		}
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		l.Close()
		ports.taken[port] = true
		return port
	}
	tb.Fatal("no free port on 127.0.0.1 between 12000 and 30000")
	return 0
}

// FreeAddr returns a loopback address on which nothing listens.
func FreeAddr(tb testing.TB) string { return fmt.Sprintf("127.0.0.1:%d", freePort(tb)) }
