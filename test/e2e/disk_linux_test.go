package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
	"tercet.dev/tercet/test/history"
	"tercet.dev/tercet/test/workload"
)

// TestDiskFull fills the disk of one node, a follower and then the leader. Before it is quite full publishes are
// refused, with nothing stored; receives and acknowledgements go on; when space returns so do publishes, and no
// process was restarted.
func TestDiskFull(t *testing.T) {
	for _, leads := range []bool{false, true} {
		name := "follower"
		if leads {
			name = "leader"
		}
		t.Run(name, func(t *testing.T) {
			// Which node leads is not known before, so each has a small disk.
			const disk = 768 << 20
			disks := map[string]*harness.Filesystem{}
			c := harness.New(t, harness.Options{
				Args: []string{"--wal-segment-size", "8MiB", "--disk-reserve", "128MiB"},
				DataDir: func(id string) string {
					disks[id] = harness.MountSmall(t, disk)
					return filepath.Join(disks[id].Dir, "data")
				},
			})
			for _, n := range c.Nodes {
				n.Start()
			}
			c.WaitInSync(c.Zones()...)
			followers, leader := c.Followers()
			victim, other := followers[0], followers[1]
			if leads {
				victim = leader
			}
			load := client(t, other)
			for i := range 50 {
				publish(t, load, "before", workload.Body(fmt.Sprintf("before-%d", i), 1000))
			}
			leased, a := load.Receive(t.Context(), harness.Receive{Topic: "before", Group: "early", Max: 10, Visibility: 10 * time.Minute})
			if len(leased) != 10 {
				t.Fatalf("received %d messages, want 10: %v", len(leased), a)
			}

			// Something else on the victim's disk takes all but the reserve and a little more. The rest the
			// product takes itself.
			giveBack := disks[victim.ID].Fill(128<<20 + 48<<20)
			var (
				refused harness.Published
				taken   int
			)
			body := workload.Body("large", 200<<10)
			start := time.Now()
			harness.Until(t, 60*time.Second, "a publish to be refused", func() error {
				p := load.Publish(t.Context(), "filling", body, nil)
				switch p.Outcome {
				case harness.OK:
					if taken++; taken > 2000 {
						t.Fatalf("%d MiB were taken, and %d MiB are free on %s", taken/5, disks[victim.ID].Free()>>20, victim.ID)
					}
					return errors.New("still taken")
				case harness.Unknown:
					t.Fatalf("publish while the disk fills: %v", p.Answer)
				}
				refused = p
				return nil
			})
			free := disks[victim.ID].Free()
			t.Logf("refused after %d MiB in %v, with %d MiB free on %s", taken/5, time.Since(start).Round(time.Millisecond), free>>20, victim.ID)
			want(t, "publish with a full disk", refused.Answer, http.StatusTooManyRequests, "disk_full")
			if refused.RetryAfter() <= 0 {
				t.Error("the refusal names no time to try again")
			}
			if free < 32<<20 {
				t.Errorf("only %d MiB are free when publishes are refused, with a reserve of 128 MiB", free>>20)
			}
			for _, n := range c.Nodes {
				want(t, "publish via "+n.ID, client(t, n).Publish(t.Context(), "filling", body, nil).Answer, http.StatusTooManyRequests, "disk_full")
				if _, a := client(t, n).Batch(t.Context(), "filling", [][]byte{body}, nil); a.Status != http.StatusTooManyRequests {
					t.Errorf("batch via %s: %v, want 429", n.ID, a)
				}
			}

			// Consumers notice nothing.
			for _, d := range leased {
				want(t, "acknowledge with a full disk", client(t, victim).Ack(t.Context(), "before", "early", d.Receipt), http.StatusNoContent, "")
			}
			if got := len(receiveAll(t, load, "before", "full")); got != 50 {
				t.Errorf("%d messages received with a full disk, want 50", got)
			}

			// Space returns.
			pids := map[string]int{}
			for _, n := range c.Nodes {
				if !n.Process().Alive() {
					t.Fatalf("%s has ended", n.ID)
				}
				pids[n.ID] = n.Process().PID
			}
			giveBack()
			start = time.Now()
			after := publish(t, load, "after", []byte("after"))
			t.Logf("taken again %v after the space returned, with %d zones", time.Since(start).Round(time.Millisecond), after.Zones)
			c.WaitInSync(c.Zones()...)
			if got := receiveAll(t, client(t, victim), "after", "g"); len(got) != 1 {
				t.Errorf("received %d messages after the space returned, want 1", len(got))
			}
			// What was refused was not stored.
			if got := len(receiveAll(t, load, "filling", "g")); got != taken {
				t.Errorf("%d of the large messages came out, want the %d that were acknowledged", got, taken)
			}
			c.EqualHashes()
			for _, n := range c.Nodes {
				if !n.Process().Alive() || n.Process().PID != pids[n.ID] {
					t.Errorf("%s was restarted", n.ID)
				}
				if strings.Contains(n.Process().Log(), "no space left") {
					t.Errorf("%s met the end of its disk", n.ID)
				}
			}
		})
	}
}

// TestPowerLoss cuts the power of all three nodes at once, and of one, under load: each disk forgets what was not
// synced (ext4, its journal included). What was acknowledged is there (S13).
func TestPowerLoss(t *testing.T) {
	seed := harness.Seed(t)
	rng := harness.Rand(seed, "power")
	disks := map[string]*harness.Filesystem{}
	c := harness.New(t, harness.Options{
		Args: []string{"--wal-segment-size", "8MiB", "--disk-reserve", "64MiB"},
		DataDir: func(id string) string {
			disks[id] = harness.MountExt4(t, 1<<30)
			return filepath.Join(disks[id].Dir, "data")
		},
	})
	for _, n := range c.Nodes {
		n.Start()
	}
	c.WaitInSync(c.Zones()...)
	load := workload.Start(t, c, workload.Options{Seed: seed})
	for round := range harness.Scale(3, 60) {
		load.WaitPublished(100)
		var victims []*harness.Node
		switch round % 3 {
		case 0:
			victims = c.Nodes
		case 1:
			victims = []*harness.Node{c.Leader()}
		case 2: // a majority: the third has to be enough, together with either
			victims = append(victims, c.Nodes...)
			rng.Shuffle(len(victims), func(i, j int) { victims[i], victims[j] = victims[j], victims[i] })
			victims = victims[:2]
		}
		from := load.Recorder.Mark("power loss of %d nodes", len(victims))
		for _, n := range victims {
			n.Pause() // nothing may be answered between this disk's loss and the process's end
		}
		for _, n := range victims {
			disks[n.ID].CutPower()
		}
		for _, n := range victims {
			n.Kill()
			disks[n.ID].Restore()
		}
		for _, n := range victims {
			n.Start()
		}
		c.WaitInSync(c.Zones()...)
		load.WaitPublished(1)
		gap, _ := load.Recorder.History().Gap(from, load.Recorder.Now())
		t.Logf("round %d: power loss of %d nodes; no publish was confirmed for %v", round, len(victims), gap.Round(time.Millisecond))
	}
	enough(load, 300)
	_, r := load.Finish()
	c.EqualHashes()
	valid(t, r, 300)
}

// confirmedBetween counts the publishes that were both sent and confirmed between two moments.
func confirmedBetween(load *workload.Load, from, to history.Moment) int {
	n := 0
	for _, p := range load.Recorder.History().Publishes {
		if p.Outcome == harness.OK && p.Start > from && p.End < to {
			n++
		}
	}
	return n
}

// TestFrozenDisk has the leader's disk hang for ten seconds: publishes resume elsewhere, no request hangs, and when
// the disk goes on nothing is undone.
func TestFrozenDisk(t *testing.T) {
	seed := harness.Seed(t)
	disks := map[string]*harness.Filesystem{}
	c := harness.New(t, harness.Options{
		Args: []string{"--wal-segment-size", "8MiB", "--disk-reserve", "64MiB"},
		DataDir: func(id string) string {
			disks[id] = harness.MountExt4(t, 1<<30)
			return filepath.Join(disks[id].Dir, "data")
		},
	})
	for _, n := range c.Nodes {
		n.Start()
	}
	c.WaitInSync(c.Zones()...)
	load := workload.Start(t, c, workload.Options{Seed: seed, Timeout: 20 * time.Second})
	for range harness.Scale(1, 15) {
		load.WaitPublished(100)
		leader := c.Leader()
		from := load.Recorder.Mark("freeze the disk of %s", leader.ID)
		disks[leader.ID].Freeze()
		load.Run(10 * time.Second)
		// Those that were sent before the fault and answered during it do not count.
		harness.Until(t, 30*time.Second, "the two other nodes to take publishes while the disk hangs", func() error {
			if n := confirmedBetween(load, from, load.Recorder.Now()); n < 20 {
				return fmt.Errorf("%d were sent and confirmed", n)
			}
			return nil
		})
		load.Recorder.Mark("thaw")
		disks[leader.ID].Thaw()
		c.WaitInSync(c.Zones()...)
		load.WaitPublished(100)
		h := load.Recorder.History()
		gap, at := h.Gap(from, load.Recorder.Now())
		t.Logf("frozen disk of %s: no publish was confirmed for %v from %v on (fault at %v)", leader.ID, gap.Round(time.Millisecond), at, from)
		if !leader.Process().Alive() {
			leader.Start() // a node may end itself when its disk hangs for so long
			c.WaitInSync(c.Zones()...)
		}
	}
	enough(load, 300)
	_, r := load.Finish()
	c.EqualHashes()
	valid(t, r, 300)
}
