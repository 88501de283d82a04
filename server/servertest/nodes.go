package servertest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"tercet.dev/tercet/raft"
)

// startTimeout bounds the start of nodes. It is a bound for broken code, not an assertion.
const startTimeout = 3 * time.Minute

// Nodes runs a cluster of size nodes in this process until the test ends, and returns them once all are ready and in
// sync.
func Nodes(t testing.TB, size int) []*raft.Node {
	t.Helper()
	var peers []raft.Peer
	listeners := make([]net.Listener, size)
	for i := range size {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners[i] = l
		peers = append(peers, raft.Peer{Name: fmt.Sprintf("n%d", i+1), Addr: l.Addr().String()})
	}
	dir := t.TempDir()
	nodes := make([]*raft.Node, size)
	failed := make([]error, size)
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	var wg sync.WaitGroup
	for i, p := range peers {
		wg.Go(func() {
			nodes[i], failed[i] = raft.Start(ctx, raft.Config{
				Name: p.Name, Zone: "zone-" + p.Name, Dir: filepath.Join(dir, p.Name), PeerAddr: p.Addr, PeerListeners: listeners[i : i+1], Peers: peers,
				WALSegmentSize: 8 << 20, MemoryBudget: 64 << 20, DiskReserve: 1 << 20, VirtualClock: true,
				Logger: hclog.New(&hclog.LoggerOptions{Output: testLog{t}, Level: hclog.Error}),
			})
		})
	}
	wg.Wait()
	t.Cleanup(func() {
		for _, n := range nodes {
			if n == nil {
				continue
			}
			if err := n.Close(); err != nil && !errors.Is(err, raft.ErrClosed) {
				t.Errorf("closing a node: %v", err)
			}
		}
	})
	if err := errors.Join(failed...); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		ready := 0
		for _, n := range nodes {
			if n.Ready() == nil && len(n.Status().InSync) == size {
				ready++
			}
		}
		if ready == size {
			return nodes
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("%d of %d nodes became ready", ready, size)
		}
	}
}

// testLog hands the nodes' log to the test.
type testLog struct{ t testing.TB }

// Write implements io.Writer.
func (w testLog) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}
