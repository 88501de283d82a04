package e2e

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
	"tercet.dev/tercet/test/workload"
)

// TestDamagedLog flips a bit in the middle of a stopped follower's log. The node does not start with it; it names
// the file and the remedy, `tercet wal verify` finds the same place, the other nodes go on, and the remedy works.
func TestDamagedLog(t *testing.T) {
	t.Parallel()
	seed := harness.Seed(t)
	c := harness.Start(t, harness.Options{})
	load := workload.Start(t, c, workload.Options{Seed: seed})
	load.WaitPublished(300)
	followers, _ := c.Followers()
	victim := followers[int(seed%2)]
	victim.Kill()
	c.WaitInSync(zonesWithout(c, victim)...)

	if out, errs, code := tercet(t, time.Minute, "wal", "verify", "--data", victim.Data); code != 0 {
		t.Fatalf("wal verify of a killed node's log exits with %d: %s%s", code, out, errs)
	}
	file, at := flipBit(t, victim, seed)
	t.Logf("flipped a bit of %s at %d", file, at)
	out, errs, code := tercet(t, time.Minute, "wal", "verify", "--data", victim.Data)
	if code == 0 || !strings.Contains(out+errs, filepath.Base(file)) {
		t.Errorf("wal verify of a damaged log exits with %d and does not name %s: %s%s", code, filepath.Base(file), out, errs)
	}
	victim.Start()
	code, err := victim.Process().WaitExit(20 * time.Second)
	if err != nil {
		t.Fatalf("a node with a damaged log: %v", err)
	}
	if log := victim.Process().Log(); code == 0 || !strings.Contains(log, filepath.Base(file)) || !strings.Contains(log, "cluster replace "+victim.ID) {
		t.Errorf("a node with a damaged log exits with %d, and names %v and the remedy: %v", code,
			strings.Contains(log, filepath.Base(file)), strings.Contains(log, "cluster replace "+victim.ID))
	}
	load.WaitPublished(100)
	victim.Wipe()
	replace(t, c, victim)
	_, r := load.Finish()
	c.EqualHashes()
	valid(t, r, 400)
}

// flipBit changes one bit in the written part of the node's log, well before its end.
func flipBit(t *testing.T, n *harness.Node, seed uint64) (file string, at int64) {
	t.Helper()
	var files []string
	err := filepath.WalkDir(n.Data, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.Contains(path, string(filepath.Separator)+"wal"+string(filepath.Separator)) {
			files = append(files, path)
		}
		return err
	})
	if err != nil || len(files) == 0 {
		t.Fatalf("no log below %s: %v", n.Data, err)
	}
	// The fullest file: others are prefilled and hold nothing yet.
	var content []byte
	end := 0
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		last := len(b)
		for last > 0 && b[last-1] == 0 {
			last--
		}
		if last > end {
			file, content, end = f, b, last
		}
	}
	if end < 64<<10 {
		t.Fatalf("%s holds only %d bytes: %v", file, end, files)
	}
	// Somewhere in the middle third, on a byte that is not padding.
	i := end/3 + int(seed%uint64(end/3))
	for content[i] == 0 {
		i++
	}
	content[i] ^= 1 << (seed % 8)
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return file, int64(i)
}

// replace carries out the documented remedy for a node whose data is gone: `tercet cluster replace`, and a start
// with --join. It returns when all zones are in sync.
func replace(t *testing.T, c *harness.Cluster, victim *harness.Node) time.Duration {
	t.Helper()
	others := slices.DeleteFunc(slices.Clone(c.Nodes), func(n *harness.Node) bool { return n == victim })
	start := time.Now()
	binary := harness.Binary(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	results := make(chan result, 1)
	go func() {
		results <- command(ctx, binary, "cluster", "replace", victim.ID, "--server", others[0].URL())
	}()
	victim.StartWith("--join", others[0].Peer+","+others[1].Peer)
	c.WaitInSync(c.Zones()...)
	took := time.Since(start)
	if r := <-results; r.code != 0 {
		t.Errorf("tercet cluster replace exits with %d: %v\n%s%s", r.code, r.err, r.out, r.errs)
	}
	return took
}
