package e2e

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// TestInSyncZones takes a zone away and brings it back: three zones hold each message, then two, then three again.
// While a zone is away a publish that asks for all of them is refused, and nothing of it is stored.
func TestInSyncZones(t *testing.T) {
	t.Parallel()
	all := map[string]string{"Tercet-Durability": "all"}
	for _, how := range []struct {
		name       string
		away, back func(*harness.Node)
	}{
		{"killed", (*harness.Node).Kill, (*harness.Node).Start},
		{"paused", (*harness.Node).Pause, (*harness.Node).Resume},
		{"stopped", (*harness.Node).Stop, (*harness.Node).Start},
	} {
		t.Run(how.name, func(t *testing.T) {
			// No zone is dropped because the machine stood still for a moment.
			c := harness.Start(t, harness.Options{Args: []string{"--zone-timeout", "8s"}})
			followers, leader := c.Followers()
			gone, stays := followers[0], followers[1]
			count := 0
			send := func(via *harness.Node, header map[string]string) harness.Published {
				count++
				return client(t, via).Publish(t.Context(), "zones", fmt.Appendf(nil, "m%d", count), header)
			}
			sent := 0
			for _, via := range c.Nodes {
				for _, h := range []map[string]string{nil, all} {
					p := send(via, h)
					want(t, "publish with three zones via "+via.ID, p.Answer, http.StatusCreated, "")
					if p.Zones != 3 {
						t.Errorf("via %s: %d zones hold the message, want 3", via.ID, p.Zones)
					}
					sent++
				}
			}
			how.away(gone)
			// A silent zone is dropped when something waits for it: this publish, which is confirmed without it.
			p := send(stays, nil)
			want(t, "publish when a zone has just gone", p.Answer, http.StatusCreated, "")
			if p.Zones != 2 {
				t.Errorf("%d zones hold the message, want 2", p.Zones)
			}
			sent++
			c.WaitInSync(zonesWithout(c, gone)...)
			for _, via := range []*harness.Node{leader, stays} {
				p := send(via, nil)
				want(t, "publish with two zones via "+via.ID, p.Answer, http.StatusCreated, "")
				if p.Zones != 2 {
					t.Errorf("via %s: %d zones hold the message, want 2", via.ID, p.Zones)
				}
				sent++
				p = send(via, all)
				want(t, "publish to all with two zones via "+via.ID, p.Answer, http.StatusTooManyRequests, "zones_unavailable")
				if p.Outcome != harness.No || p.RetryAfter() <= 0 {
					t.Errorf("via %s: the refusal has outcome %s and Retry-After %v, want none and a time", via.ID, p.Outcome, p.RetryAfter())
				}
			}
			start := time.Now()
			how.back(gone)
			c.WaitInSync(c.Zones()...)
			t.Logf("in sync again %v after the zone came back", time.Since(start).Round(time.Millisecond))
			for _, via := range c.Nodes {
				p := send(via, all)
				want(t, "publish to all after the zone came back, via "+via.ID, p.Answer, http.StatusCreated, "")
				if p.Zones != 3 {
					t.Errorf("via %s: %d zones hold the message, want 3", via.ID, p.Zones)
				}
				sent++
			}
			if got := len(receiveAll(t, client(t, gone), "zones", "g")); got != sent {
				t.Errorf("%d messages came out, want the %d that were acknowledged", got, sent)
			}
			c.EqualHashes()
		})
	}
}

// TestDurabilityAll runs the cluster with --durability all: without all zones nothing is taken, and what consumers
// do goes on.
func TestDurabilityAll(t *testing.T) {
	t.Parallel()
	c := harness.Start(t, harness.Options{Args: []string{"--durability", "all"}})
	followers, leader := c.Followers()
	before := publish(t, client(t, followers[1]), "all", []byte("before"))
	if before.Zones != 3 {
		t.Errorf("%d zones hold the message, want 3", before.Zones)
	}
	followers[0].Kill()
	c.WaitInSync(zonesWithout(c, followers[0])...)
	for _, via := range []*harness.Node{leader, followers[1]} {
		p := client(t, via).Publish(t.Context(), "all", []byte("meanwhile"), nil)
		want(t, "publish via "+via.ID, p.Answer, http.StatusTooManyRequests, "zones_unavailable")
	}
	got := receiveAll(t, client(t, followers[1]), "all", "g")
	if len(got) != 1 || string(got[before.ID].Body) != "before" {
		t.Errorf("received %v, want the message sent before", got)
	}
	followers[0].Start()
	c.WaitInSync(c.Zones()...)
	after := publish(t, client(t, followers[0]), "all", []byte("after"))
	if got := receiveAll(t, client(t, leader), "all", "g"); len(got) != 1 || string(got[after.ID].Body) != "after" {
		t.Errorf("received %v, want the message sent after", got)
	}
}
