package e2e

import (
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
	"tercet.dev/tercet/test/history"
)

// TestLeaseAcrossLeaders gives one node's process a head start of five seconds, has another node grant leases, and
// hands leadership to the early one: however long each process has been running, no lease ends before its time (S4).
func TestLeaseAcrossLeaders(t *testing.T) {
	t.Parallel()
	c := harness.Start(t, harness.Options{})
	const visibility = 8 * time.Second
	for _, n := range c.Nodes {
		n.Kill()
	}
	// The early node would win the election; so it sleeps while the others hold it.
	early := c.Nodes[0]
	early.Start()
	timer := time.NewTimer(5 * time.Second) // the head start is the experiment
	<-timer.C
	early.Pause()
	c.Nodes[1].Start()
	c.Nodes[2].Start()
	leader := c.Leader()
	early.Resume()
	c.WaitInSync(c.Zones()...)

	cl := client(t, c.Nodes[2])
	first := publish(t, cl, "clock", []byte("x"))
	start := time.Now()
	ds, a := cl.Receive(t.Context(), harness.Receive{Topic: "clock", Group: "g", Visibility: visibility})
	if len(ds) != 1 || ds[0].ID != first.ID {
		t.Fatalf("received %v: %v", ds, a)
	}
	if out, errs, code := tercet(t, 30*time.Second, "cluster", "transfer", early.ID, "--server", leader.URL()); code != 0 {
		t.Fatalf("cluster transfer exits with %d: %s%s", code, out, errs)
	}
	harness.Until(t, 10*time.Second, "the early node to lead", func() error {
		n, err := c.FindLeader()
		if err == nil && n != early {
			return errNotYet
		}
		return err
	})
	// It wakes when the lease is over.
	ds, a = cl.Receive(t.Context(), harness.Receive{Topic: "clock", Group: "g", Visibility: visibility, Wait: time.Minute})
	passed := time.Since(start)
	if len(ds) != 1 || ds[0].ID != first.ID || ds[0].Count != 2 {
		t.Fatalf("received %v: %v", ds, a)
	}
	t.Logf("leased for %v by %s, leadership handed to %s, leased again after %v", visibility, leader.ID, early.ID, passed.Round(time.Millisecond))
	if passed < visibility-history.Epsilon {
		t.Errorf("the lease of %v was over after %v", visibility, passed)
	}
}
