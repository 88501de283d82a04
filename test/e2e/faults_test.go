package e2e

import (
	"fmt"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
	"tercet.dev/tercet/test/history"
	"tercet.dev/tercet/test/workload"
)

// TestHealthy runs consumers that acknowledge in time against a cluster that nothing happens to: each message comes
// once to each group, and nothing is refused or left open.
func TestHealthy(t *testing.T) {
	seed := harness.Seed(t)
	for try := 1; ; try++ {
		problem, elections := healthy(t, seed)
		switch {
		case problem == "":
			return
		case elections == 0 || try == 5:
			t.Fatalf("in a healthy cluster, with %d elections meanwhile: %s", elections, problem)
		}
		// All three processes stood still for longer than an election takes: not what this test is about.
		t.Logf("run %d was disturbed by %d elections: %s", try, elections, problem)
	}
}

// healthy runs faithful consumers and returns what else went wrong than violations, and how often another leader was elected.
func healthy(t *testing.T, seed uint64) (problem string, elections uint64) {
	t.Helper()
	// No zone is dropped because the machine stood still for a moment.
	c := harness.Start(t, harness.Options{Args: []string{"--zone-timeout", "1m"}})
	term := func() uint64 {
		t.Helper()
		s, err := c.Leader().Cluster()
		if err != nil {
			t.Fatal(err)
		}
		return s.Term
	}
	before := term()
	load := workload.Start(t, c, workload.Options{Seed: seed, Faithful: true, Pace: 5 * time.Millisecond, Timeout: time.Minute})
	load.WaitPublished(harness.Scale(2000, 200_000))
	h, r := load.Finish()
	c.EqualHashes()
	elections = term() - before
	if r.PublishNo+r.PublishUnknown+r.ReceiveUnknown+r.ReceiveNo+r.Redelivered+r.Lost+r.Withdrawn+r.AckNo+r.AckUnknown > 0 {
		return r.String(), elections
	}
	for _, p := range h.Publishes {
		if p.Zones != 3 {
			return fmt.Sprintf("%s was confirmed with %d zones, want 3", p.Key, p.Zones), elections
		}
	}
	return "", elections
}

// TestFault breaks one node under load and checks what clients saw. Each fault has a cluster of its own. The gap in
// publishing is measured and logged; how long it may be is for benchmarks on quiet machines to say.
func TestFault(t *testing.T) {
	beside(t)
	faults := []struct {
		name string
		// leads is set when the victim is the leader, moves when leadership must be elsewhere afterwards.
		leads, moves bool
		fault, heal  func(n *harness.Node)
		// away is how long the fault lasts, as an experiment.
		away time.Duration
		// shrinks is set when the victim's zone leaves the in-sync set meanwhile.
		shrinks bool
	}{
		{"kill leader", true, true, (*harness.Node).Kill, (*harness.Node).Start, 0, true},
		{"kill follower", false, false, (*harness.Node).Kill, (*harness.Node).Start, 0, true},
		{"terminate leader", true, true, (*harness.Node).Stop, (*harness.Node).Start, 0, true},
		{"terminate follower", false, false, (*harness.Node).Stop, (*harness.Node).Start, 0, true},
		{"pause leader", true, true, (*harness.Node).Pause, (*harness.Node).Resume, 10 * time.Second, true},
		{"pause follower", false, false, (*harness.Node).Pause, (*harness.Node).Resume, 10 * time.Second, true},
		// Shorter than an election takes: nothing may be lost in between either.
		{"pause leader briefly", true, false, (*harness.Node).Pause, (*harness.Node).Resume, 300 * time.Millisecond, false},
	}
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) {
			beside(t)
			seed := harness.Seed(t)
			rounds := harness.Scale(1, 20)
			c := harness.Start(t, harness.Options{})
			load := workload.Start(t, c, workload.Options{Seed: seed})
			load.WaitPublished(100)
			for round := range rounds {
				followers, victim := c.Followers()
				if !f.leads {
					victim = followers[harness.Rand(seed, f.name).IntN(2)]
				}
				before, err := victim.Cluster()
				if err != nil {
					t.Fatal(err)
				}
				from := load.Recorder.Mark("%s %s", f.name, victim.ID)
				f.fault(victim)
				load.Run(f.away)
				if f.shrinks {
					c.WaitInSync(zonesWithout(c, victim)...)
					load.WaitPublished(200)
				}
				if f.moves {
					after := c.Leader()
					if after == victim {
						t.Errorf("round %d: %s leads again without having been away", round, victim.ID)
					}
				}
				load.Recorder.Mark("heal %s", victim.ID)
				f.heal(victim)
				c.WaitInSync(c.Zones()...)
				load.WaitPublished(300)
				to := load.Recorder.Now()
				after, err := c.Leader().Cluster()
				if err != nil {
					t.Fatal(err)
				}
				gap, at := load.Recorder.History().Gap(from, to)
				t.Logf("%s %s: no publish was confirmed for %v from %v on (fault at %v); terms %d → %d", f.name, victim.ID,
					gap.Round(time.Millisecond), at, from, before.Term, after.Term)
				if f.moves && after.Term == before.Term {
					t.Errorf("the leader was gone and the term is still %d", after.Term)
				}
			}
			enough(load, 400)
			_, r := load.Finish()
			c.EqualHashes()
			valid(t, r, 400)
		})
	}
}

func zonesWithout(c *harness.Cluster, n *harness.Node) []string {
	var zones []string
	for _, other := range c.Nodes {
		if other != n {
			zones = append(zones, other.Zone)
		}
	}
	return zones
}

// enough lets the load go on until so many of its publishes have succeeded, however long that takes.
func enough(load *workload.Load, publishes int) {
	load.WaitPublished(max(publishes-load.Recorder.PublishedOK(), 0))
}

// valid fails the test when the run did too little to mean anything.
func valid(t *testing.T, r *history.Report, publishes int) {
	t.Helper()
	if r.PublishOK < publishes || r.AckOK < publishes || r.Redelivered < publishes/40 || r.StaleRefused < publishes/400 {
		t.Errorf("the run did too little: want %d publishes and acknowledgements, %d redeliveries, %d stale receipts refused; got %v",
			publishes, publishes/40, publishes/400, r)
	}
}

// TestKillAll kills all three nodes at once under load and starts them again: what was acknowledged is there, and
// the three states are one (S12, S13).
func TestKillAll(t *testing.T) {
	beside(t)
	seed := harness.Seed(t)
	c := harness.Start(t, harness.Options{})
	load := workload.Start(t, c, workload.Options{Seed: seed})
	for round := range harness.Scale(2, 50) {
		load.WaitPublished(200)
		from := load.Recorder.Mark("kill all")
		for _, n := range c.Nodes {
			n.Kill()
		}
		for _, n := range c.Nodes {
			n.Start()
		}
		load.WaitPublished(1)
		gap, _ := load.Recorder.History().Gap(from, load.Recorder.Now())
		c.WaitInSync(c.Zones()...)
		t.Logf("round %d: all killed and started; no publish was confirmed for %v", round, gap.Round(time.Millisecond))
	}
	enough(load, 400)
	_, r := load.Finish()
	c.EqualHashes()
	valid(t, r, 400)

	// And once more at rest: a start of nothing but old state.
	for _, n := range c.Nodes {
		n.Kill()
	}
	for _, n := range c.Nodes {
		n.Start()
	}
	c.WaitInSync(c.Zones()...)
	c.EqualHashes()
}
