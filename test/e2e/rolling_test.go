package e2e

import (
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
	"tercet.dev/tercet/test/workload"
)

// TestRollingRestart restarts each node in turn with SIGTERM. Clients that try again what was refused, at another
// node, see no unknown outcome.
func TestRollingRestart(t *testing.T) {
	seed := harness.Seed(t)
	c := harness.Start(t, harness.Options{})
	// A client that gives up by itself does not know the outcome either: here none does.
	load := workload.Start(t, c, workload.Options{Seed: seed, Timeout: time.Minute})
	load.WaitPublished(100)
	for range harness.Scale(1, 15) {
		followers, leader := c.Followers()
		for _, n := range append(followers, leader) { // the leader last, as an operator would
			from := load.Recorder.Mark("restart %s", n.ID)
			n.Stop()
			n.Start()
			c.WaitInSync(c.Zones()...)
			load.WaitPublished(100)
			gap, _ := load.Recorder.History().Gap(from, load.Recorder.Now())
			t.Logf("restart of %s (leader: %v) at %v: no publish was confirmed for %v", n.ID, n == leader, from, gap.Round(time.Millisecond))
		}
		if c.Leader() == leader {
			t.Errorf("%s leads again without having handed leadership on", leader.ID)
		}
	}
	enough(load, 400)
	h, r := load.Finish()
	c.EqualHashes()
	valid(t, r, 400)
	shown := 0
	for _, p := range h.Publishes {
		if p.Outcome == harness.Unknown {
			if shown++; shown <= 5 {
				t.Errorf("a publish via %s at %v has an unknown outcome: %s", p.Via, p.Interval, p.What)
			}
		}
	}
	for _, s := range h.Settles {
		if s.Outcome == harness.Unknown {
			if shown++; shown <= 5 {
				t.Errorf("a settlement via %s at %v has an unknown outcome: %s", s.Via, s.Interval, s.What)
			}
		}
	}
	if shown > 0 {
		t.Errorf("%d unknown outcomes in a rolling restart, want none", shown)
	}
}
