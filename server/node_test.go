package server

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
	"tercet.dev/tercet/server/servertest"
)

// startTimeout bounds the start of nodes. It is a bound for broken code, not an assertion.
const startTimeout = 60 * time.Second

// newNode runs a cluster of one node until the test ends.
func newNode(t testing.TB) *raft.Node { return newCluster(t, 1)[0] }

// newCluster runs a cluster of size nodes in this process and waits until all are ready and in sync.
func newCluster(t testing.TB, size int) []*raft.Node {
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
				Logger: hclog.New(&hclog.LoggerOptions{Output: logWriter{t}, Level: hclog.Error}),
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
	waitFor(t, func() bool {
		for _, n := range nodes {
			if n.Ready() != nil || len(n.Status().InSync) != size {
				return false
			}
		}
		return true
	})
	return nodes
}

// TestBadInput runs the table against a leader and against a follower.
func TestBadInput(t *testing.T) {
	nodes := newCluster(t, 3)
	done := map[raft.Role]bool{}
	for _, n := range nodes {
		role := n.Status().Role
		if done[role] {
			continue
		}
		done[role] = true
		t.Run(string(role), func(t *testing.T) {
			_, url := start(t, Options{Backend: n})
			servertest.BadInput(t, servertest.Target{URL: url})
		})
	}
	if !done[raft.Leader] || !done[raft.Follower] {
		t.Errorf("the table ran against %v", done)
	}
}
