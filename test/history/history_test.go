package history

import (
	"slices"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// at makes an interval out of milliseconds.
func at(start, end int64) Interval {
	return Interval{Moment(time.Duration(start) * time.Millisecond), Moment(time.Duration(end) * time.Millisecond)}
}

// story is a history in which group g got and acknowledged what was published, for the cases to spoil.
func story() *History {
	return &History{
		Groups: []string{"g", "h"},
		Publishes: []Publish{
			{Interval: at(0, 10), Key: "k1", Outcome: harness.OK, ID: "m1", Zones: 3},
			{Interval: at(5, 20), Key: "k2", Outcome: harness.Unknown},
			{Interval: at(6, 21), Key: "k3", Outcome: harness.No, What: "429"},
		},
		Receives: []Receive{
			{Interval: at(20, 30), Group: "g", Outcome: harness.OK},
			{Interval: at(2000, 2010), Group: "g", Outcome: harness.OK},
			{Interval: at(20, 30), Group: "h", Outcome: harness.OK},
		},
		Grants: []Grant{
			{Interval: at(20, 30), Group: "g", Key: "k1", ID: "m1", Receipt: "g1", Count: 1, Visibility: time.Second},
			{Interval: at(2000, 2010), Group: "g", Key: "k1", ID: "m1", Receipt: "g2", Count: 2, Visibility: time.Second},
			{Interval: at(20, 30), Group: "h", Key: "k1", ID: "m1", Receipt: "h1", Count: 1, Visibility: time.Second},
		},
		Settles: []Settle{
			{Interval: at(2020, 2030), Group: "g", Receipt: "g1", Ack: true, Outcome: harness.No, Status: 409},
			{Interval: at(2040, 2050), Group: "g", Receipt: "g2", Ack: true, Outcome: harness.OK, Status: 204},
			{Interval: at(40, 50), Group: "h", Receipt: "h1", Ack: true, Outcome: harness.Unknown},
		},
	}
}

func TestGoodHistory(t *testing.T) {
	r := Check(story())
	if len(r.Violations) > 0 {
		t.Errorf("violations in a history without any: %q", r.Violations)
	}
	if r.PublishOK != 1 || r.PublishNo != 1 || r.PublishUnknown != 1 || r.UnknownSeen != 0 || r.Grants != 3 ||
		r.Redelivered != 1 || r.StaleRefused != 1 || r.AckOK != 1 || r.AckNo != 1 || r.AckUnknown != 1 {
		t.Errorf("miscounted: %+v", r)
	}
	if checked, bad := Linearizable(story(), time.Minute); checked != 1 || len(bad) > 0 {
		t.Errorf("%d checked, want 1; %q", checked, bad)
	}
}

// Each case spoils the story in one way; the checker must find it and name the rule. Porcupine must agree where the
// case is about the order of operations on one message.
func TestBadHistories(t *testing.T) {
	cases := []struct {
		name, rule string
		order      bool
		spoil      func(h *History)
	}{
		{"published, never delivered", "S1:", false, func(h *History) {
			h.Publishes = append(h.Publishes, Publish{Interval: at(30, 40), Key: "k4", Outcome: harness.OK, ID: "m4"})
		}},
		{"delivered, never settled", "S1:", false, func(h *History) { h.Settles = h.Settles[:2] }},
		{"unknown in one group only", "S1b:", false, func(h *History) {
			h.Grants = append(h.Grants, Grant{Interval: at(20, 30), Group: "g", Key: "k2", ID: "m2", Receipt: "g3", Count: 1})
			h.Settles = append(h.Settles, Settle{Interval: at(31, 32), Group: "g", Receipt: "g3", Ack: true, Outcome: harness.OK})
		}},
		{"refused and delivered", "S1b:", false, func(h *History) {
			h.Grants = append(h.Grants, Grant{Interval: at(20, 30), Group: "g", Key: "k3", ID: "m3", Receipt: "g3", Count: 1})
		}},
		{"count passed over and no reply lost", "S2:", false, func(h *History) { h.Grants[1].Count = 3 }},
		{"count passed over, a receive waited in vain afterwards", "S2:", false, func(h *History) {
			h.Grants[1].Count = 3
			h.Receives = append(h.Receives, Receive{Interval: at(2100, 2500), Group: "g", Outcome: harness.OK, Waited: true})
		}},
		{"delivered after its acknowledgement", "S3:", true, func(h *History) {
			h.Settles[0] = Settle{Interval: at(40, 50), Group: "g", Receipt: "g1", Ack: true, Outcome: harness.OK}
		}},
		{"leased twice at a time", "S4:", false, func(h *History) {
			h.Grants[1].Interval = at(500, 510)
			h.Settles = h.Settles[1:]
		}},
		{"leased again while the extension runs", "S4:", false, func(h *History) {
			h.Settles = append(h.Settles, Settle{Interval: at(900, 910), Group: "g", Receipt: "g1", Visibility: 5 * time.Second, Outcome: harness.OK})
		}},
		{"stale acknowledgement accepted", "S5:", true, func(h *History) {
			h.Settles[0].Outcome = harness.OK
			h.Settles = append(h.Settles[:1], h.Settles[2:]...)
		}},
		{"stale extension accepted", "S5:", true, func(h *History) {
			h.Settles[0].Ack, h.Settles[0].Visibility, h.Settles[0].Outcome = false, time.Second, harness.OK
		}},
		{"acknowledged twice", "S5:", true, func(h *History) {
			h.Settles = append(h.Settles, Settle{Interval: at(2060, 2070), Group: "g", Receipt: "g2", Ack: true, Outcome: harness.OK})
		}},
		{"refused within the lease", "S5:", true, func(h *History) {
			h.Settles[1].Outcome, h.Settles[1].Status = harness.No, 409
			h.Settles = append(h.Settles, Settle{Interval: at(2060, 2070), Group: "g", Receipt: "g2", Ack: true, Outcome: harness.OK})
		}},
		{"refused within the lease, which others get later", "S5:", true, func(h *History) {
			h.Settles = append(h.Settles, Settle{Interval: at(500, 510), Group: "g", Receipt: "g1", Ack: true, Outcome: harness.No, Status: 409})
		}},
		{"one receipt for two leases", "S5:", false, func(h *History) { h.Grants[1].Receipt = "g1" }},
		{"count does not rise", "S6:", true, func(h *History) { h.Grants[1].Count = 1 }},
		{"count falls", "S6:", true, func(h *History) {
			h.Grants[0].Interval, h.Grants[1].Interval = h.Grants[1].Interval, h.Grants[0].Interval
		}},
		{"nobody sent it", "S10:", false, func(h *History) { h.Grants[2].Key = "k9" }},
		{"stored twice", "S10:", false, func(h *History) { h.Grants[2].ID = "m9" }},
		{"one id for two messages", "S10:", false, func(h *History) { h.Publishes[1].Outcome, h.Publishes[1].ID = harness.OK, "m1" }},
		{"body changed", "S10:", false, func(h *History) { h.Broken = []string{"k1 came out with another body"} }},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			h := story()
			c.spoil(h)
			r := Check(h)
			found := false
			for _, v := range r.Violations {
				found = found || strings.HasPrefix(v, c.rule)
			}
			if !found {
				t.Errorf("no violation of %s found, but %q", c.rule, r.Violations)
			}
			if !c.order {
				return
			}
			if _, bad := Linearizable(h, time.Minute); len(bad) == 0 {
				t.Error("porcupine finds an order that explains it")
			}
		})
	}
}

// What is allowed must not be reported: the checker has to be as tolerant as the promises are.
func TestTolerated(t *testing.T) {
	cases := []struct {
		name  string
		spoil func(h *History)
	}{
		{"count passed over, a reply was lost", func(h *History) {
			h.Grants[1].Count = 3
			h.Receives = append(h.Receives, Receive{Interval: at(1100, 1500), Group: "g", Outcome: harness.Unknown})
		}},
		{"count passed over, a receive waited in vain", func(h *History) {
			h.Grants[1].Count = 3
			h.Receives = append(h.Receives, Receive{Interval: at(1100, 1500), Group: "g", Outcome: harness.OK, Waited: true})
		}},
		{"count passed over, a wait was cut short", func(h *History) {
			h.Grants[1].Count = 3
			h.Receives = append(h.Receives, Receive{Interval: at(1100, 1500), Group: "g", Outcome: harness.No})
		}},
		{"released and leased again at once", func(h *History) {
			h.Settles = append(h.Settles, Settle{Interval: at(40, 50), Group: "g", Receipt: "g1", Outcome: harness.OK})
			h.Grants[1].Interval = at(60, 70)
		}},
		{"release of unknown outcome that happens late", func(h *History) {
			h.Settles = append(h.Settles, Settle{Interval: at(40, 50), Group: "g", Receipt: "g1", Outcome: harness.Unknown})
			h.Grants[1].Interval = at(500, 510)
		}},
		{"acknowledgement of unknown outcome that did not happen", func(h *History) {
			h.Settles = append(h.Settles, Settle{Interval: at(40, 50), Group: "g", Receipt: "g1", Ack: true, Outcome: harness.Unknown})
		}},
		{"acknowledged late, when nobody else had it", func(h *History) {
			h.Settles[1].Interval = at(5000, 5010)
		}},
		{"refused because the lease was over", func(h *History) {
			h.Settles = append(h.Settles, Settle{Interval: at(1500, 1510), Group: "g", Receipt: "g1", Ack: true, Outcome: harness.No, Status: 409})
		}},
		{"not served within the lease", func(h *History) {
			h.Settles = append(h.Settles, Settle{Interval: at(40, 45), Group: "g", Receipt: "g1", Ack: true, Outcome: harness.No, Status: 503})
		}},
		{"unknown publish that happened in all groups", func(h *History) {
			for _, g := range h.Groups {
				h.Grants = append(h.Grants, Grant{Interval: at(60, 70), Group: g, Key: "k2", ID: "m2", Receipt: g + "9", Count: 1, Visibility: time.Second})
				h.Settles = append(h.Settles, Settle{Interval: at(80, 81), Group: g, Receipt: g + "9", Ack: true, Outcome: harness.OK})
			}
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			h := story()
			c.spoil(h)
			if r := Check(h); len(r.Violations) > 0 {
				t.Errorf("reported: %q", r.Violations)
			}
			if _, bad := Linearizable(h, time.Minute); len(bad) > 0 {
				t.Errorf("porcupine reports: %q", bad)
			}
		})
	}
}

func TestGap(t *testing.T) {
	h := &History{}
	for _, end := range []int64{0, 10, 20, 500, 510, 2510, 2520} {
		h.Publishes = append(h.Publishes, Publish{Interval: at(end-1, end), Outcome: harness.OK})
	}
	h.Publishes = append(h.Publishes, Publish{Interval: at(100, 1000), Outcome: harness.Unknown})
	if gap, from := h.Gap(at(15, 0).Start, at(600, 0).Start); gap != 2*time.Second || from != at(510, 0).Start {
		t.Errorf("gap %v at %v, want 2s at 0.510s", gap, from)
	}
	if gap, _ := h.Gap(at(15, 0).Start, at(400, 0).Start); gap != 480*time.Millisecond {
		t.Errorf("gap %v, want 480ms", gap)
	}
}

// TestDisaster: what was agreed on before a disaster may be forgotten, and nothing else is excused by it.
func TestDisaster(t *testing.T) {
	forgetful := func() *History {
		h := story()
		// The acknowledgement by g at 2040 ms is forgotten, and so are both leases: the count begins anew.
		h.Disaster = at(2060, 2060).Start
		h.Receives = append(h.Receives, Receive{Interval: at(2070, 2080), Group: "g", Outcome: harness.OK})
		h.Grants = append(h.Grants, Grant{Interval: at(2070, 2080), Group: "g", Key: "k1", ID: "m1", Receipt: "g3", Count: 1, Visibility: time.Second})
		h.Settles = append(h.Settles,
			Settle{Interval: at(2085, 2086), Group: "g", Receipt: "g2", Outcome: harness.No, Status: 404},
			Settle{Interval: at(2090, 2100), Group: "g", Receipt: "g3", Ack: true, Outcome: harness.OK, Status: 204})
		// What nobody confirmed came to g and is gone.
		h.Grants = append(h.Grants, Grant{Interval: at(20, 30), Group: "g", Key: "k2", ID: "m2", Receipt: "g4", Count: 1, Visibility: time.Second})
		return h
	}
	if r := Check(forgetful()); len(r.Violations) > 0 || r.Forgotten != 1 {
		t.Errorf("%d acknowledgements forgotten, want 1; violations: %q", r.Forgotten, r.Violations)
	}
	if checked, bad := Linearizable(forgetful(), time.Minute); checked == 0 || len(bad) > 0 {
		t.Errorf("%d checked; %q", checked, bad)
	}
	cases := []struct {
		rule  string
		spoil func(h *History)
	}{
		{"S3", func(h *History) { h.Disaster = at(2035, 2035).Start }}, // it was acknowledged after the disaster
		{"S5", func(h *History) { h.Grants[3].Receipt = "h1" }},
		{"S5", func(h *History) { h.Settles[3].Outcome = harness.OK }}, // an old receipt changes the new lease
		{"S1", func(h *History) { h.Grants = slices.Delete(h.Grants, 2, 3) }},
		{"S1", func(h *History) { h.Publishes[1].Outcome, h.Publishes[1].ID = harness.OK, "m2" }},
	}
	for i, c := range cases {
		h := forgetful()
		c.spoil(h)
		if r := Check(h); !slices.ContainsFunc(r.Violations, func(v string) bool { return strings.HasPrefix(v, c.rule+":") }) {
			t.Errorf("case %d: violations %q, want one of %s", i, r.Violations, c.rule)
		}
	}
}
