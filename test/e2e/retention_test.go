package e2e

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// TestRetentionFreesDisk publishes much more than is ever alive: what has expired takes no room. In a campaign that is
// 10 GiB in real time, and all the time no node holds more than what may be alive or not yet reclaimed, and 1 GiB for log,
// memtables and compactions; otherwise the virtual clock lets each part expire, and segments are small so that less shows.
func TestRetentionFreesDisk(t *testing.T) {
	t.Parallel()
	const (
		parts     = 2
		retention = time.Minute
		// What has expired goes with a checkpoint, and one comes every 30 s at the latest; as much again is for checkpoints and
		// compactions that take their time.
		reclaimed = retention + 2*30*time.Second
	)
	total := harness.Scale(int64(320<<20), 10<<30)
	allowed := harness.Scale(int64(240<<20), 1<<30) // over what is alive, which is nothing at the end
	args := []string{"--virtual-clock", "--wal-segment-size", "8MiB", "--memory", "128MiB"}
	if harness.Campaign() {
		args = nil
	}
	c := harness.Start(t, harness.Options{Args: args})
	header := map[string]string{"Vqs-Retention-Seconds": fmt.Sprint(int(retention.Seconds()))}
	var sent atomic.Int64
	watched := watchDisks(c, &sent, reclaimed)
	for part := range parts {
		fillCounting(t, c, fmt.Sprintf("short-%d", part), total/parts, header, &sent)
		most := int64(0)
		for _, n := range c.Nodes {
			most = max(most, n.DataBytes())
		}
		t.Logf("%d MiB published, at most %d MiB on a node's disk", (int64(part)+1)*(total/parts)>>20, most>>20)
		if !harness.Campaign() {
			cl := client(t, c.Leader())
			if a := cl.Do(t.Context(), "POST", "/v1/clock/advance", map[string]string{"Content-Type": "application/json"},
				jsonBody(map[string]any{"seconds": int(retention.Seconds()) + 1})); a.Outcome != harness.OK {
				t.Fatalf("advance the clock: %v", a)
			}
		}
	}
	// A little goes on, as on any cluster that is in use: checkpoints follow what is written, and time.
	cl := client(t, c.Nodes[0])
	harness.Until(t, 4*time.Minute, "the nodes to give back what has expired", func() error {
		publish(t, cl, "alive", []byte("x"))
		for _, n := range c.Nodes {
			if used := n.DataBytes(); used > allowed {
				return fmt.Errorf("%s holds %d MiB with nothing alive, want at most %d", n.ID, used>>20, allowed>>20)
			}
		}
		return nil
	})
	peak, above := watched()
	t.Logf("at most %d MiB on a node, %d MiB more than was published in the %v before", peak>>20, above>>20, reclaimed)
	if harness.Campaign() && above > allowed {
		t.Errorf("a node held %d MiB more than was published in the %v before, want at most %d", above>>20, reclaimed, allowed>>20)
	}
	for _, n := range c.Nodes {
		t.Logf("%s: %d MiB in the end, of %d MiB published", n.ID, n.DataBytes()>>20, total>>20)
	}
	for part := range parts {
		if got := receiveAll(t, cl, fmt.Sprintf("short-%d", part), "late"); len(got) != 0 {
			t.Errorf("%d messages came after their time", len(got))
		}
	}
	c.EqualHashes()
}

// watchDisks looks at what the nodes hold until the function it returns is called. That tells the most that was on one, and
// the most that was on one above what had been sent within the window before. A machine that stands still, these nodes
// included, adds nothing to the window's time.
func watchDisks(c *harness.Cluster, sent *atomic.Int64, window time.Duration) func() (peak, above int64) {
	const every = 500 * time.Millisecond
	type sample struct {
		at   time.Duration
		sent int64
	}
	var (
		peak, above int64
		samples     []sample
		awake       time.Duration
	)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			samples = append(samples, sample{awake, sent.Load()})
			for len(samples) > 1 && samples[1].at <= awake-window {
				samples = samples[1:]
			}
			for _, n := range c.Nodes {
				used := n.DataBytes()
				peak, above = max(peak, used), max(above, used-(sent.Load()-samples[0].sent))
			}
			select {
			case <-tick.C:
				awake += every // and not how long it was
			case <-stop:
				return
			}
		}
	}()
	return func() (int64, int64) {
		close(stop)
		<-stopped
		return peak, above
	}
}
