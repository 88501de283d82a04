package e2e

import (
	"testing"

	"tercet.dev/tercet/server/servertest"
	"tercet.dev/tercet/test/harness"
)

// TestBadInput sends malformed, oversized and hostile requests to the leader and to a follower. Afterwards the three
// states are one, and no node has noticed.
func TestBadInput(t *testing.T) {
	t.Parallel()
	c := harness.Start(t, harness.Options{})
	followers, leader := c.Followers()
	for _, target := range []struct {
		role string
		node *harness.Node
	}{{"leader", leader}, {"follower", followers[0]}} {
		t.Run(target.role, func(t *testing.T) {
			// The rows that wait for the server's own time limits take half a minute.
			servertest.BadInput(t, servertest.Target{URL: target.node.URL(), Slow: harness.Campaign()})
		})
	}
	for _, n := range c.Nodes {
		if !n.Process().Alive() {
			t.Errorf("%s has ended", n.ID)
		}
	}
	c.WaitInSync(c.Zones()...)
	c.EqualHashes()
}
