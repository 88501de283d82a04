// Package e2e tests the product as its users meet it: three real processes, real clients, real faults. See
// docs/testing.md for how to run one test, a campaign, or a seed again.
//
// Tests that mostly wait, for leases, time-outs and zones, run two at a time, and so do those that break nodes under load
// unless they are a campaign: then they have the machine to themselves, so that the gaps they log mean something.
package e2e

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// errNotYet is a condition that does not hold yet and has no more to say.
var errNotYet = errors.New("not yet")

func TestMain(m *testing.M) { harness.Main(m) }

// beside lets a test run beside others, unless it is a campaign.
func beside(t *testing.T) {
	if !harness.Campaign() {
		t.Parallel()
	}
}

// lease is one that no test outlasts, however slow the machine is.
const lease = 30 * time.Minute

// client returns a client of the node that is closed with the test.
func client(t *testing.T, n *harness.Node) *harness.Client {
	c := n.NewClient()
	t.Cleanup(c.Close)
	return c
}

// publish sends a message through any of the nodes and fails the test unless it succeeds. For tests that are
// not about publishing: what was refused is tried again.
func publish(t *testing.T, c *harness.Client, topic string, body []byte) harness.Published {
	t.Helper()
	var p harness.Published
	harness.Until(t, 15*time.Second, "a publish to "+topic, func() error {
		p = c.Publish(t.Context(), topic, body, nil)
		if p.Outcome == harness.No {
			return fmt.Errorf("%v", p.Answer)
		}
		return nil
	})
	if p.Outcome != harness.OK {
		t.Fatalf("publish to %s: %v", topic, p.Answer)
	}
	return p
}

// receiveAll receives and acknowledges everything a group can have, and returns the bodies by message id. It stops
// at the first receive that waited in vain.
func receiveAll(t *testing.T, c *harness.Client, topic, group string) map[string]harness.Delivery {
	t.Helper()
	all := map[string]harness.Delivery{}
	for {
		ds, a := c.Receive(t.Context(), harness.Receive{Topic: topic, Group: group, Max: 10, Visibility: lease, Wait: time.Second})
		if a.Outcome != harness.OK {
			t.Fatalf("receive from %s: %v", topic, a)
		}
		if len(ds) == 0 {
			return all
		}
		for _, d := range ds {
			if _, twice := all[d.ID]; twice {
				t.Errorf("message %s came twice to group %s", d.ID, group)
			}
			all[d.ID] = d
			if a := c.Ack(t.Context(), topic, group, d.Receipt); a.Outcome != harness.OK {
				t.Errorf("acknowledge %s: %v", d.ID, a)
			}
		}
	}
}

// want fails the test when an answer has another status or error code.
func want(t *testing.T, what string, a harness.Answer, status int, code string) {
	t.Helper()
	if a.Status != status || a.Code != code {
		t.Errorf("%s: got %d %q (%v), want %d %q", what, a.Status, a.Code, a, status, code)
	}
}
