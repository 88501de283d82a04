package e2e

import (
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
	"tercet.dev/tercet/test/workload"
)

// TestSlowFollower: a follower that comes back behind, with a disk that takes a fraction of what the others' do, catches
// up while the load goes on, and is in sync again. Slow, but not silent, it then stays in sync: publishes wait for its
// disk (decision 26).
func TestSlowFollower(t *testing.T) {
	seed := harness.Seed(t)
	disks := map[string]*harness.Filesystem{}
	c := harness.New(t, harness.Options{
		Args: []string{"--wal-segment-size", "8MiB", "--disk-reserve", "64MiB"},
		DataDir: func(id string) string {
			disks[id] = harness.MountExt4(t, 2<<30)
			return filepath.Join(disks[id].Dir, "data")
		},
	})
	group := harness.DiskCgroup(t)
	for _, n := range c.Nodes {
		n.Start()
	}
	c.WaitInSync(c.Zones()...)
	load := workload.Start(t, c, workload.Options{Seed: seed})
	load.WaitPublished(100)
	followers, _ := c.Followers()
	slow := followers[int(seed%2)]
	pids := map[string]int{}
	for _, n := range c.Nodes {
		if n != slow {
			pids[n.ID] = n.Process().PID
		}
	}

	load.Recorder.Mark("kill %s", slow.ID)
	slow.Kill()
	c.WaitInSync(zonesWithout(c, slow)...)
	missed := harness.Scale(int64(96<<20), 600<<20)
	fill(t, c, "missed", missed, nil)

	load.Recorder.Mark("%s comes back with a slow disk", slow.ID)
	slow.Start()
	group.Add(slow.Process())
	group.Throttle(disks[slow.ID], 16<<20, 200)
	start := time.Now()
	harness.Until(t, 2*time.Minute, slow.ID+" to catch up", func() error {
		s, err := c.Leader().Cluster()
		if err == nil && len(s.InSync) < len(c.Nodes) {
			err = fmt.Errorf("in sync: %v", s.InSync)
		}
		return err
	})
	t.Logf("%s missed %d MiB and was in sync again after %v, with 16 MiB and 200 writes a second", slow.ID, missed>>20, time.Since(start).Round(time.Millisecond))

	group.Throttle(disks[slow.ID], 16<<20, 50)
	from := load.Recorder.Mark("%s has a slower disk", slow.ID)
	load.WaitPublished(200)
	three, fewer := 0, 0
	for _, p := range load.Recorder.History().Publishes {
		switch {
		case p.Outcome != harness.OK || p.Start < from:
		case p.Zones == len(c.Nodes):
			three++
		default:
			fewer++
		}
	}
	t.Logf("with 50 writes a second: %d publishes were confirmed with three zones, %d with fewer, 200 in %v", three, fewer, time.Duration(load.Recorder.Now()-from).Round(time.Millisecond))
	if three == 0 {
		t.Error("a slow zone holds nothing")
	}

	group.Throttle(disks[slow.ID], 1<<40, 1<<30)
	c.WaitInSync(c.Zones()...)
	load.WaitPublished(100)
	enough(load, 400)
	_, r := load.Finish()
	c.EqualHashes()
	valid(t, r, 400)
	for id, pid := range pids {
		if p := c.Node(id).Process(); !p.Alive() || p.PID != pid {
			t.Errorf("%s was restarted", id)
		}
	}
}

// TestSmallMemory: three nodes that may use 256 MiB each take more than that, in large messages and in many small ones
// that a consumer holds and never acknowledges, and are killed by nobody but this test (decision 26).
func TestSmallMemory(t *testing.T) {
	const limit = 256 << 20
	groups := map[string]*harness.Cgroup{}
	c := harness.New(t, harness.Options{Wrap: func(id string) []string {
		if groups[id] == nil {
			groups[id] = harness.MemoryCgroup(t, limit)
		}
		return groups[id].Wrap()
	}})
	for _, n := range c.Nodes {
		n.Start()
	}
	c.WaitInSync(c.Zones()...)
	fill(t, c, "large", 320<<20, nil)
	small := small(t, c, harness.Scale(60_000, 10_000_000))
	cl := client(t, c.Nodes[0])
	held := 0
	for held < min(small, 90_000) {
		ds, a := cl.Receive(t.Context(), harness.Receive{Topic: "small", Group: "holds", Max: 10, Visibility: lease, Wait: time.Second})
		if a.Outcome != harness.OK || len(ds) == 0 {
			t.Fatalf("after %d messages: %d more, %v", held, len(ds), a)
		}
		if held += len(ds); held%10 != 0 || !harness.Campaign() && held >= 10_000 {
			break
		}
	}
	c.EqualHashes()
	killed := c.Nodes[1]
	killed.Kill()
	start := time.Now()
	killed.Start()
	c.WaitInSync(c.Zones()...)
	t.Logf("%d MiB of large messages, %d small ones, %d of them leased; after kill -9 in sync again in %v", 320, small, held, time.Since(start).Round(time.Millisecond))
	c.EqualHashes()
	for _, n := range c.Nodes {
		if !n.Process().Alive() {
			t.Errorf("%s has ended:\n%s", n.ID, n.Process().Log())
		}
		if count := groups[n.ID].Killed(); count != "0" {
			t.Errorf("the kernel has killed %s %s times for want of memory", n.ID, count)
		}
		t.Logf("%s: %d MiB resident of %d", n.ID, memory(t, n.Process().PID)>>20, limit>>20)
	}
	// What is in there comes out.
	if ds, a := client(t, killed).Receive(t.Context(), harness.Receive{Topic: "large", Group: "g", Max: 10, Visibility: lease}); len(ds) != 10 {
		t.Errorf("received %d large messages, want 10: %v", len(ds), a)
	}
}

// small publishes so many messages of 100 bytes to the topic small, in batches through all nodes, and returns their number.
func small(t *testing.T, c *harness.Cluster, count int) int {
	t.Helper()
	var (
		next   atomic.Int64
		failed atomic.Int64
		wg     sync.WaitGroup
	)
	for _, n := range c.Nodes {
		cl := client(t, n)
		wg.Go(func() {
			for next.Add(100) <= int64(count) && t.Context().Err() == nil {
				bodies := make([][]byte, 100)
				for i := range bodies {
					bodies[i] = workload.Body("small", 100)
				}
				for {
					_, a := cl.Batch(t.Context(), "small", bodies, nil)
					if a.Outcome == harness.OK {
						break
					}
					if failed.Add(1) > 100 || t.Context().Err() != nil {
						t.Errorf("after 100 batches that were not taken: %v", a)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	return count / 100 * 100
}
