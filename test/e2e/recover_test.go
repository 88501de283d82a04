package e2e

import (
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
	"tercet.dev/tercet/test/workload"
)

// TestRecover destroys two zones for good and turns the third into a cluster of one: everything that was
// published with three zones is there. Leases and acknowledgements need a majority only, so their last ones may be
// forgotten, but no receipt of them fits another lease. Each zone in turn is the survivor.
func TestRecover(t *testing.T) {
	t.Parallel()
	for i := range harness.Scale(2, 3) {
		seed := harness.Seed(t)
		c := harness.Start(t, harness.Options{})
		_, leader := c.Followers()
		survivor := leader
		for _, n := range c.Nodes[:i] {
			if n != leader {
				survivor = n
			}
		}
		t.Logf("the survivor is %s, the leader %s", survivor.ID, leader.ID)
		before, err := survivor.Cluster()
		if err != nil {
			t.Fatal(err)
		}
		// All three die in the middle of the load.
		load := workload.Start(t, c, workload.Options{Seed: seed, Topic: "kept", Timeout: time.Second})
		load.WaitPublished(500)
		// The survivor last: until its death it is in the in-sync set of whoever confirms a publish.
		for _, n := range c.Nodes {
			if n != survivor {
				n.Kill()
			}
		}
		survivor.Kill()
		load.Recorder.Disaster("all zones lost but %s", survivor.Zone)
		for _, n := range c.Nodes {
			if n != survivor {
				n.Wipe()
			}
		}
		out, errs, code := tercet(t, time.Minute, "cluster", "recover", "--data", survivor.Data)
		if code == 0 {
			t.Errorf("recover without --force exits with 0: %s%s", out, errs)
		}
		out, errs, code = tercet(t, time.Minute, "cluster", "recover", "--data", survivor.Data, "--force")
		if code != 0 {
			t.Fatalf("recover exits with %d: %s%s", code, out, errs)
		}
		t.Logf("recover says:\n%s%s", out, errs)
		survivor.StartWith()
		survivor.WaitReady()
		c.WaitInSync(survivor.Zone)
		after, err := survivor.Cluster()
		if err != nil {
			t.Fatal(err)
		}
		if after.ClusterID == before.ClusterID || len(after.Nodes) != 1 || after.Nodes[0].ID != survivor.ID {
			t.Errorf("after the recovery: %+v, want a new cluster id (was %s) and one member", after, before.ClusterID)
		}
		// The old members, even with their data, could not come back: one does not try.
		load.WaitPublished(100)
		h, _ := load.Finish()
		one := 0
		for _, p := range h.Publishes {
			if p.Zones == 1 {
				one++
			}
		}
		if one < 100 {
			t.Errorf("%d publishes were acknowledged with one zone, want the 100 after the recovery", one)
		}
	}
}
