package e2e

import (
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
	"tercet.dev/tercet/test/workload"
)

// TestRandomFaults mixes faults on all nodes, several at a time included.
func TestRandomFaults(t *testing.T) {
	beside(t)
	seed := harness.Seed(t)
	rng := harness.Rand(seed, "faults")
	c := harness.Start(t, harness.Options{})
	load := workload.Start(t, c, workload.Options{Seed: seed})
	load.WaitPublished(100)
	leaders := map[string]bool{}
	count := harness.Scale(5, 200)
	for i := range count {
		leader := c.Leader()
		leaders[leader.ID] = true
		n := c.Nodes[rng.IntN(3)]
		if rng.IntN(2) == 0 {
			n = leader
		}
		another := c.Nodes[rng.IntN(3)]
		switch kind := rng.IntN(5); kind {
		case 0, 1:
			load.Recorder.Mark("%d: kill %s", i, n.ID)
			n.Kill()
			load.Run(time.Duration(rng.IntN(3000)) * time.Millisecond)
			n.Start()
		case 2:
			load.Recorder.Mark("%d: pause %s", i, n.ID)
			n.Pause()
			load.Run(time.Duration(rng.IntN(5000)) * time.Millisecond)
			n.Resume()
		case 3:
			load.Recorder.Mark("%d: pause %s, kill %s meanwhile", i, n.ID, another.ID)
			n.Pause()
			load.Run(time.Duration(rng.IntN(3000)) * time.Millisecond)
			another.Kill()
			if another != n {
				load.Run(time.Duration(rng.IntN(1000)) * time.Millisecond)
				n.Resume()
			}
			load.Run(time.Duration(rng.IntN(1000)) * time.Millisecond)
			another.Start()
		case 4:
			load.Recorder.Mark("%d: terminate %s", i, n.ID)
			n.Stop()
			n.Start()
		}
		// A quarter of the faults hit a cluster that has not recovered from the one before.
		if rng.IntN(4) > 0 || i == count-1 {
			c.WaitInSync(c.Zones()...)
		}
		load.WaitPublished(20)
	}
	c.WaitInSync(c.Zones()...)
	for leaders[c.Leader().ID] = true; len(leaders) < 2; leaders[c.Leader().ID] = true {
		// None of the faults moved leadership: this one does, most of the time.
		leader := c.Leader()
		load.Recorder.Mark("kill %s, the only one that has led", leader.ID)
		leader.Kill()
		c.WaitInSync(zonesWithout(c, leader)...)
		leaders[c.Leader().ID] = true
		leader.Start()
		c.WaitInSync(c.Zones()...)
	}
	enough(load, 100*count/2)
	h, r := load.Finish()
	c.EqualHashes()
	for _, m := range h.Marks {
		t.Logf("%v %s", m.At, m.What)
	}
	t.Logf("%d faults, %d nodes led", count, len(leaders))
	valid(t, r, 100*count/2)
}
