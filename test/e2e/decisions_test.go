package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// jsonBody is a request's body in JSON.
func jsonBody(v any) io.Reader {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // the test's own
	}
	return bytes.NewReader(b)
}

// TestWipedNodeGivesNoVote pauses the one node that has what was confirmed, wipes a second that had it, and lets the
// third, which has not, come back: no majority may form without the confirmed messages. When the first goes on they
// are all there. (Decision 7.)
func TestWipedNodeGivesNoVote(t *testing.T) {
	t.Parallel()
	c := harness.Start(t, harness.Options{})
	followers, leader := c.Followers()
	behind, wiped := followers[0], followers[1]
	behind.Pause()
	// The zone that is silent is dropped when a publish waits for it.
	var sent []string
	send := func() harness.Published {
		p := publish(t, client(t, leader), "kept", fmt.Appendf(nil, "m%d", len(sent)))
		sent = append(sent, p.ID)
		return p
	}
	send()
	c.WaitInSync(zonesWithout(c, behind)...)
	for range 20 {
		if p := send(); p.Zones != 2 {
			t.Errorf("%d zones hold the message, want 2", p.Zones)
		}
	}
	wiped.Kill()
	wiped.Wipe()
	leader.Pause()
	behind.Resume()
	wiped.Start()
	code, err := wiped.Process().WaitExit(15 * time.Second)
	if err != nil || code != exitPrecondition {
		t.Errorf("the wiped node under its old identity: exit %d, %v, want %d", code, err, exitPrecondition)
	}
	// The node that is behind asks for votes by now, and finds nobody.
	harness.Until(t, 20*time.Second, "the node that is behind to miss its leader", func() error {
		s, err := behind.Cluster()
		if err == nil && s.Leader != "" {
			return fmt.Errorf("it names %s", s.Leader)
		}
		return err
	})
	cl := client(t, behind)
	cl.Timeout = 5 * time.Second
	if p := cl.Publish(t.Context(), "kept", []byte("without a majority"), nil); p.Outcome == harness.OK {
		t.Errorf("a publish was confirmed by one node of three: %+v", p)
	}
	leader.Resume()
	harness.Until(t, 20*time.Second, "the two that are left to be in sync", func() error {
		s, err := behind.Cluster()
		if err == nil && (s.Leader == "" || len(s.InSync) != 2) {
			return fmt.Errorf("leader %q, in sync %v", s.Leader, s.InSync)
		}
		return err
	})
	got := receiveAll(t, client(t, behind), "kept", "g")
	for _, id := range sent {
		if _, ok := got[id]; !ok {
			t.Errorf("message %s was confirmed and is lost", id)
		}
	}
}

// TestNewGroupIsGivenEverything acknowledges all messages in all groups there are: a group that comes later is given
// them all the same, before and after the nodes have restarted. (Decision 18.)
func TestNewGroupIsGivenEverything(t *testing.T) {
	t.Parallel()
	c := harness.Start(t, harness.Options{})
	cl := client(t, c.Nodes[0])
	const count = 100
	for i := range count {
		publish(t, cl, "all", fmt.Append(nil, i))
	}
	for _, group := range []string{"first", "second", "third"} {
		if got := len(receiveAll(t, cl, "all", group)); got != count {
			t.Errorf("group %s was given %d messages, want %d", group, got, count)
		}
	}
	for _, n := range c.Nodes {
		n.Kill()
	}
	for _, n := range c.Nodes {
		n.Start()
	}
	c.WaitInSync(c.Zones()...)
	for group, want := range map[string]int{"third": 0, "late": count} {
		if got := len(receiveAll(t, cl, "all", group)); got != want {
			t.Errorf("after a restart group %s was given %d messages, want %d", group, got, want)
		}
	}
}
