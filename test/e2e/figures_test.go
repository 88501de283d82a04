package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/server/wire"
	"tercet.dev/tercet/test/harness"
)

// TestGroupFigures asks all three nodes how a group gets on: at rest, after some work, and after the leader was killed.
// The figures are those of the cluster wherever they are asked for, and the rates of the nodes that stay go on.
func TestGroupFigures(t *testing.T) {
	t.Parallel()
	c := harness.Start(t, harness.Options{})
	cl := client(t, c.Nodes[0])
	call := func(n *harness.Node, method, path, body string, status int) harness.Answer {
		t.Helper()
		a := client(t, n).Do(t.Context(), method, path, map[string]string{"Content-Type": "application/json"}, strings.NewReader(body))
		if a.Status != status {
			t.Fatalf("%s %s through %s: %v", method, path, n.ID, a)
		}
		return a
	}
	look := func(n *harness.Node) (g wire.Group) {
		t.Helper()
		a := call(n, http.MethodGet, "/v1/topics/figures/groups/g", "", http.StatusOK)
		if err := json.Unmarshal(a.Body, &g); err != nil {
			t.Fatal(err)
		}
		if g.Rates == nil || g.Rates.OverSeconds <= 0 {
			t.Fatalf("%s answers no rates: %s", n.ID, a.Body)
		}
		return g
	}
	call(c.Nodes[0], http.MethodPut, "/v1/topics/figures/groups/g", `{"settings":{"maxDeliveries":1,"park":true}}`, http.StatusOK)
	send := func(n int, header map[string]string) {
		t.Helper()
		for i := range n {
			want(t, "publish", cl.Publish(t.Context(), "figures", fmt.Append(nil, i), header).Answer, http.StatusCreated, "")
		}
	}
	take := func(n int) (ds []harness.Delivery) {
		t.Helper()
		for len(ds) < n {
			more, a := cl.Receive(t.Context(), harness.Receive{Topic: "figures", Group: "g", Max: min(10, n-len(ds)), Visibility: time.Hour})
			if len(more) == 0 {
				t.Fatalf("received %d of %d: %v", len(ds), n, a)
			}
			ds = append(ds, more...)
		}
		return ds
	}
	ack := func(ds []harness.Delivery) {
		t.Helper()
		for _, d := range ds {
			want(t, "acknowledge", cl.Ack(t.Context(), "figures", "g", d.Receipt), http.StatusNoContent, "")
		}
	}
	send(10, nil)
	send(2, map[string]string{"Vqs-Delay-Seconds": "3600"})
	ds := take(3)
	ack(ds[:1])
	want(t, "release", cl.Extend(t.Context(), "figures", "g", ds[1].Receipt, 0), http.StatusOK, "") // delivered often enough: parked

	for _, n := range c.Nodes {
		g := look(n)
		if g.Depth != 8 || g.Ready != 7 || g.Inflight != 1 || g.Returned != 0 || g.Parked != 1 || g.Delivered != 3 || g.Redelivered != 0 || g.Acknowledged != 1 {
			t.Errorf("through %s: %+v", n.ID, g)
		}
		oldest, err := time.Parse(time.RFC3339Nano, g.OldestAt)
		if err != nil || !oldest.Equal(ds[2].Timestamp) {
			t.Errorf("through %s: the oldest message is of %s, want %s (%v)", n.ID, g.OldestAt, ds[2].Timestamp, err)
		}
		if r := g.Rates; r.Delayed != 2 || r.ArrivalPerSecond != 0 || r.DrainPerSecond != 0 || r.ReachedPerSecond != 0 || r.SecondsToDrain != nil || r.ExpiringUnreached != 7 {
			t.Errorf("through %s, at rest: %+v", n.ID, r)
		}
	}
	// All that is ready is done, and nothing comes: the group drains, and nothing expires unreached.
	send(3, nil)
	ack(take(8))
	for _, n := range c.Nodes {
		g := look(n)
		if r := g.Rates; g.Ready != 2 || r.ArrivalPerSecond <= 0 || r.DrainPerSecond <= r.ArrivalPerSecond || r.ReachedPerSecond <= 0 || r.SecondsToDrain == nil || *r.SecondsToDrain <= 0 || r.ExpiringUnreached != 0 {
			t.Errorf("through %s, at work: ready %d, %+v", n.ID, g.Ready, r)
		}
	}
	c.Leader().Kill()
	c.Leader()
	cl = client(t, c.Up()[0])
	ack(take(2))
	for _, n := range c.Up() {
		g := look(n)
		if g.Ready != 0 || g.Inflight != 1 || g.Depth != 1 || g.Parked != 1 || g.Acknowledged != 11 || g.Delivered != 13 || g.Rates.Delayed != 2 {
			t.Errorf("through %s, after the leader was killed: %+v", n.ID, g)
		}
		if r := g.Rates; r.DrainPerSecond <= r.ArrivalPerSecond || r.ReachedPerSecond <= 0 || r.ExpiringUnreached != 0 {
			t.Errorf("through %s, after the leader was killed: %+v", n.ID, r)
		}
	}
}
