package raft

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/internal/errs"
)

// BenchmarkPublish measures publishes of 1 KiB through the leader of three nodes in one process, on the directory of
// TMPDIR. Set TERCET_BENCH_SYNC to a duration to add it to each sync: one sync lies in the path, not two.
func BenchmarkPublish(b *testing.B) {
	for _, publishers := range []int{1, 16, 256} {
		b.Run(fmt.Sprint(publishers), func(b *testing.B) { benchmarkPublish(b, publishers) })
	}
}

func benchmarkPublish(b *testing.B, publishers int) {
	dir := b.TempDir()
	names := []string{"n1", "n2", "n3"}
	var peers []Peer
	for _, name := range names {
		peers = append(peers, Peer{name, freeAddr(b)})
	}
	nodes := make([]*Node, len(names))
	var wg sync.WaitGroup
	for i, p := range peers {
		cfg := Config{Name: p.Name, Dir: filepath.Join(dir, p.Name), PeerAddr: p.Addr, Peers: peers, DiskReserve: 1 << 20}
		if d, err := time.ParseDuration(os.Getenv("TERCET_BENCH_SYNC")); err == nil {
			cfg.SyncDelay = d
		}
		wg.Go(func() {
			n, err := Start(context.Background(), cfg)
			if err != nil {
				b.Error(err)
				return
			}
			nodes[i] = n
		})
	}
	wg.Wait()
	if b.Failed() {
		return
	}
	defer func() {
		for _, n := range nodes {
			_ = n.Close()
		}
	}()
	var lead *Node
	for lead == nil {
		for _, n := range nodes {
			if n.openTerm.Load() != 0 && n.Ready() == nil && len(n.Status().InSync) == 3 {
				lead = n
			}
		}
		time.Sleep(time.Millisecond)
	}
	cmd := publishCommand("t", strings.Repeat("x", 1<<10))
	var left atomic.Int64
	left.Store(int64(b.N))
	lat := make([][]time.Duration, publishers)
	syncs := lead.wal.Stats().Syncs
	b.ReportAllocs()
	b.ResetTimer()
	for p := range publishers {
		wg.Go(func() {
			for left.Add(-1) >= 0 {
				at := time.Now()
				if r, err := lead.Propose(context.Background(), Proposal{Command: cmd}); err != nil || r.Code != errs.OK {
					b.Error(r.Code, err)
					return
				}
				lat[p] = append(lat[p], time.Since(at))
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	all := slices.Concat(lat...)
	slices.Sort(all)
	if len(all) > 0 {
		b.ReportMetric(float64(all[len(all)/2].Microseconds()), "p50-us")
		b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "p99-us")
		b.ReportMetric(float64(len(all))/b.Elapsed().Seconds(), "msg/s")
		b.ReportMetric(float64(lead.wal.Stats().Syncs-syncs)/float64(len(all)), "syncs/msg")
	}
}
