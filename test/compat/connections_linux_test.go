package compat

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// TestManyConnections: blocked readers on all nodes, in many groups; whoever else comes is served at once, each reader is
// woken by what it waits for, half of them vanish without a word, and what a node keeps for one is bounded.
func TestManyConnections(t *testing.T) {
	n := harness.Scale(600, 10_000)
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		t.Fatal(err)
	}
	if files.Cur = files.Max; syscall.Setrlimit(syscall.RLIMIT_NOFILE, &files) != nil || files.Cur < uint64(n+1000) {
		t.Fatalf("this test needs %d file descriptors, the limit is %d: ulimit -n", n+1000, files.Cur)
	}
	c := harness.Start(t, harness.Options{})
	control := dial(t, c.Nodes[0].Valkey)
	const groups = 20
	for g := range groups {
		control.must(t, fmt.Sprintf("XGROUP CREATE s%d g $ MKSTREAM", g))
	}
	memory := func(node *harness.Node) int64 {
		rss, err := residentBytes(node.Process().PID)
		if err != nil {
			t.Fatal(err)
		}
		return rss
	}
	// All on one node, so that what it holds shows.
	busy := c.Nodes[1]
	before := memory(busy)
	readers := make([]*conn, n)
	for i := range readers {
		readers[i] = dial(t, busy.Valkey)
		if err := readers[i].send(fmt.Sprintf("XREADGROUP GROUP g c%d COUNT 1 BLOCK 0 STREAMS s%d >", i, i%groups)); err != nil {
			t.Fatal(err)
		}
	}
	blocked := func(want int) {
		t.Helper()
		harness.Until(t, time.Minute, fmt.Sprintf("%d blocked clients", want), func() error {
			k, err := connect(busy.Valkey)
			if err != nil {
				return err
			}
			defer k.nc.Close()
			info, err := k.do("INFO clients")
			if err != nil || !strings.Contains(info, fmt.Sprintf("blocked_clients:%d\r\n", want)) {
				return fmt.Errorf("%s, %w", info, errNotYet)
			}
			return nil
		})
	}
	blocked(n)
	each := (memory(busy) - before) / int64(n)
	t.Logf("%d blocked connections take %d KiB each", n, each>>10)
	if each > 64<<10 {
		t.Errorf("a blocked connection takes %d bytes", each)
	}
	// Others are served meanwhile.
	other := dial(t, busy.Valkey)
	other.must(t, "PING")
	other.must(t, "XADD elsewhere * f v")

	// Half of them go: the other half is given everything that comes.
	r := rand.New(rand.NewPCG(harness.Seed(t), 1))
	r.Shuffle(n, func(i, j int) { readers[i], readers[j] = readers[j], readers[i] })
	for _, k := range readers[n/2:] {
		if err := k.nc.(*net.TCPConn).SetLinger(0); err != nil { // a reset, as of a process that died
			t.Fatal(err)
		}
		k.nc.Close()
	}
	readers = readers[:n/2]
	blocked(n / 2)
	var added []string
	for g := range groups {
		for range n/groups + 1 { // more than there are readers
			added = append(added, fmt.Sprintf("XADD s%d * f v", g))
		}
	}
	if err := control.send(added...); err != nil {
		t.Fatal(err)
	}
	for range added {
		if got, err := control.reply(); err != nil || !streamID.MatchString(got) {
			t.Fatalf("XADD: %s, %v", got, err)
		}
	}
	given := map[string]bool{}
	for i, k := range readers {
		if err := k.nc.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		got, err := k.reply()
		if err != nil || len(streamID.FindAllString(got, -1)) != 1 {
			t.Fatalf("reader %d: %s, %v", i, got, err)
		}
		if given[got] {
			t.Errorf("%s was given to two", got)
		}
		given[got] = true
	}
	blocked(0)
}

// residentBytes is what a process has in memory.
func residentBytes(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0, fmt.Errorf("statm says %q", b)
	}
	pages, err := strconv.ParseInt(fields[1], 10, 64)
	return pages * int64(os.Getpagesize()), err
}
