package e2e

import (
	"fmt"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// TestRetentionFreesDisk publishes much more than is ever alive: what has expired takes no room. In a campaign that is
// 10 GiB in real time; otherwise the virtual clock lets each part expire, and segments are small so that less shows.
func TestRetentionFreesDisk(t *testing.T) {
	t.Parallel()
	const (
		parts     = 2
		retention = time.Minute
	)
	total := harness.Scale(int64(320<<20), 10<<30)
	allowed := harness.Scale(int64(240<<20), 1<<30) // over what is alive, which is nothing at the end
	args := []string{"--virtual-clock", "--wal-segment-size", "8MiB", "--memory", "128MiB"}
	if harness.Campaign() {
		args = nil
	}
	c := harness.Start(t, harness.Options{Args: args})
	header := map[string]string{"Vqs-Retention-Seconds": fmt.Sprint(int(retention.Seconds()))}
	for part := range parts {
		fill(t, c, fmt.Sprintf("short-%d", part), total/parts, header)
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
