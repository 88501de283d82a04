package history

import (
	"cmp"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"tercet.dev/tercet/test/harness"
)

// Epsilon is how much earlier than its end a lease may be taken away: clocks count milliseconds, and the goal
// for the error of a lease is 100 ms.
const Epsilon = 100 * time.Millisecond

// A Report is the result of Check: what happened, and what should not have.
type Report struct {
	// Counts of publishes by outcome.
	PublishOK, PublishNo, PublishUnknown int
	// UnknownSeen counts publishes of unknown outcome that had happened.
	UnknownSeen int
	// Receives that were refused, and those of unknown outcome, whose grants, if any, are not in the record.
	ReceiveNo, ReceiveUnknown int
	Grants                    int
	// Redelivered counts grants beyond the first of a message in a group, Lost the grants that must have been
	// made (counts were passed over) and whose reply nobody got, Withdrawn those that only a receive can have
	// had that came back empty or was refused: its time was over, or its node was stopped, while the grant was
	// on its way, and the server gave the message back.
	Redelivered, Lost, Withdrawn int
	AckOK, AckNo, AckUnknown     int
	ExtendOK, ExtendNo           int
	// StaleRefused counts settlements that came with an older receipt than the newest and were refused.
	StaleRefused int
	// Forgotten counts messages that came again after an acknowledgement from before the disaster.
	Forgotten int
	// Violations name the rule first.
	Violations []string
}

// String is a summary on one line.
func (r *Report) String() string {
	return fmt.Sprintf("publishes: %d ok, %d refused, %d unknown (%d of them happened); grants: %d, %d of them redeliveries, %d lost with their reply, %d withdrawn; "+
		"receives: %d refused, %d unknown; acks: %d ok, %d refused, %d unknown; extensions: %d ok, %d refused; stale receipts refused: %d; acknowledgements forgotten: %d; violations: %d",
		r.PublishOK, r.PublishNo, r.PublishUnknown, r.UnknownSeen, r.Grants, r.Redelivered, r.Lost, r.Withdrawn,
		r.ReceiveNo, r.ReceiveUnknown, r.AckOK, r.AckNo, r.AckUnknown, r.ExtendOK, r.ExtendNo, r.StaleRefused, r.Forgotten, len(r.Violations))
}

func (r *Report) violate(rule, format string, args ...any) {
	r.Violations = append(r.Violations, rule+": "+fmt.Sprintf(format, args...))
}

// lease is one grant with everything that was tried on its receipt, in order of start.
type lease struct {
	Grant
	settles []Settle
}

// until returns the earliest moment at which the lease may have ended without an acknowledgement, for an observer
// that looks at moment at. Everything uncertain is taken in the product's favour.
func (l *lease) until(at Moment) Moment {
	end := l.Start + Moment(l.Visibility)
	floor := Moment(1<<63 - 1)
	for _, s := range l.settles {
		if s.Ack || s.Start > at {
			continue
		}
		to := s.Start + Moment(s.Visibility)
		switch {
		case s.Outcome == harness.OK && s.End <= at:
			end = to
		case s.Outcome == harness.OK:
			end = min(end, to) // it may not have happened yet
		case s.Outcome == harness.Unknown:
			floor = min(floor, to)
		}
	}
	return min(end, floor)
}

// messageKey names a message in a group.
type messageKey struct{ group, key string }

// Check checks a drained history: after the last fault each group went on receiving until it had nothing left.
func Check(h *History) *Report {
	r := &Report{}
	for _, b := range h.Broken {
		r.violate("S10", "%s", b)
	}
	published := checkPublishes(h, r)
	leases, byReceipt := collectLeases(h, r, published)
	settled := attachSettles(h, r, byReceipt)

	lostReplies, inVain := map[string][]Receive{}, map[string][]Receive{}
	for _, rec := range h.Receives {
		switch rec.Outcome {
		case harness.No:
			r.ReceiveNo++
			inVain[rec.Group] = append(inVain[rec.Group], rec)
		case harness.Unknown:
			r.ReceiveUnknown++
			lostReplies[rec.Group] = append(lostReplies[rec.Group], rec)
		case harness.OK:
			if rec.Waited {
				inVain[rec.Group] = append(inVain[rec.Group], rec)
			}
		}
	}
	for _, mk := range sortedKeys(leases) {
		ls := leases[mk]
		slices.SortStableFunc(ls, func(a, b *lease) int {
			switch {
			case h.parted(a.Start, b.Start):
				return -1
			case h.parted(b.Start, a.Start):
				return 1
			}
			return cmp.Compare(a.Count, b.Count)
		})
		checkMessage(h, r, mk, ls, lostReplies[mk.group], inVain[mk.group])
	}
	checkDelivered(h, r, leases, settled)
	return r
}

func sortedKeys[V any](m map[messageKey]V) []messageKey {
	keys := make([]messageKey, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b messageKey) int {
		return cmp.Or(strings.Compare(a.group, b.group), strings.Compare(a.key, b.key))
	})
	return keys
}

func checkPublishes(h *History, r *Report) map[string]Publish {
	published := make(map[string]Publish, len(h.Publishes))
	ids := map[string]string{}
	for _, p := range h.Publishes {
		if _, ok := published[p.Key]; ok {
			r.violate("test", "key %s was used for two attempts", p.Key)
		}
		published[p.Key] = p
		switch p.Outcome {
		case harness.OK:
			r.PublishOK++
			if other, ok := ids[p.ID]; ok {
				r.violate("S10", "messages %s and %s were given one id %s", other, p.Key, p.ID)
			}
			ids[p.ID] = p.Key
		case harness.No:
			r.PublishNo++
		default:
			r.PublishUnknown++
		}
	}
	return published
}

func collectLeases(h *History, r *Report, published map[string]Publish) (map[messageKey][]*lease, map[string]*lease) {
	leases := map[messageKey][]*lease{}
	byReceipt := map[string]*lease{}
	idOf := map[string]string{}
	for _, g := range h.Grants {
		r.Grants++
		p, ok := published[g.Key]
		switch {
		case !ok:
			r.violate("S10", "group %s got %s, which nobody sent", g.Group, g.Key)
		case p.Outcome == harness.No:
			r.violate("S1b", "%s was refused (%s) and group %s got it at %v", g.Key, p.What, g.Group, g.Interval)
		case p.Outcome == harness.OK && p.ID != g.ID:
			r.violate("S10", "%s was published as %s and delivered to group %s as %s", g.Key, p.ID, g.Group, g.ID)
		}
		if id, ok := idOf[g.Key]; ok && id != g.ID {
			r.violate("S10", "%s is stored twice, as %s and as %s", g.Key, id, g.ID)
		}
		idOf[g.Key] = g.ID
		if ok && g.End < p.Start {
			r.violate("S10", "%s was delivered before it was sent", g.Key)
		}
		l := &lease{Grant: g}
		if other, ok := byReceipt[g.Receipt]; ok {
			r.violate("S5", "receipt of %s/%s count %d was given before, to %s/%s count %d", g.Group, g.Key, g.Count, other.Group, other.Key, other.Count)
		}
		byReceipt[g.Receipt] = l
		mk := messageKey{g.Group, g.Key}
		leases[mk] = append(leases[mk], l)
	}
	return leases, byReceipt
}

// attachSettles files each settlement under its lease and returns the messages with an acknowledgement that
// succeeded or may have.
func attachSettles(h *History, r *Report, byReceipt map[string]*lease) map[messageKey]bool {
	settled := map[messageKey]bool{}
	for _, s := range h.Settles {
		l, ok := byReceipt[s.Receipt]
		if !ok || l.Group != s.Group {
			r.violate("test", "a receipt that was never given to group %s was used", s.Group)
			continue
		}
		l.settles = append(l.settles, s)
		switch {
		case s.Ack && s.Outcome == harness.OK:
			r.AckOK++
		case s.Ack && s.Outcome == harness.No:
			r.AckNo++
		case s.Ack:
			r.AckUnknown++
		case s.Outcome == harness.OK:
			r.ExtendOK++
		default:
			r.ExtendNo++
		}
		if s.Ack && s.Outcome != harness.No {
			settled[messageKey{l.Group, l.Key}] = true
		}
	}
	for _, l := range byReceipt {
		slices.SortStableFunc(l.settles, func(a, b Settle) int { return cmp.Compare(a.Start, b.Start) })
	}
	return settled
}

// checkMessage checks the leases of one message in one group, sorted by count.
func checkMessage(h *History, r *Report, mk messageKey, ls []*lease, lost, inVain []Receive) {
	previous := 0
	for i, b := range ls {
		switch {
		case i > 0 && h.parted(ls[i-1].Start, b.Start), i == 0 && h.parted(0, b.Start):
			previous = b.Count - 1 // how far the survivor was is not known
		case i > 0:
			checkPair(r, mk, ls[i-1], b)
		}
		if i > 0 {
			r.Redelivered++
		}
		if missing := b.Count - previous - 1; missing > 0 {
			// Each count that was passed over was a lease whose reply somebody did not get.
			during := Interval{0, b.End}
			if i > 0 {
				during.Start = ls[i-1].Start
			}
			possible := overlapping(lost, during)
			r.Lost += min(missing, possible)
			if missing > possible {
				r.Withdrawn += missing - possible
				possible += overlapping(inVain, during)
			}
			if possible < missing {
				r.violate("S2", "group %s: %s came at %v via %s with count %d after %d, and only %d receives can have had the leases between",
					mk.group, mk.key, b.Interval, b.Via, b.Count, previous, possible)
			}
		}
		previous = b.Count
		var newer *lease
		if i+1 < len(ls) {
			newer = ls[i+1]
		}
		checkSettles(h, r, mk, b, newer)
	}
}

// overlapping counts the receives that were under way at some time of the interval.
func overlapping(receives []Receive, during Interval) int {
	n := 0
	for _, rec := range receives {
		if rec.Start < during.End && rec.End > during.Start {
			n++
		}
	}
	return n
}

// checkPair checks two leases that follow each other.
func checkPair(r *Report, mk messageKey, a, b *lease) {
	switch {
	case a.Count == b.Count:
		r.violate("S6", "group %s: %s came twice with count %d, at %v via %s and %v via %s", mk.group, mk.key, a.Count, a.Interval, a.Via, b.Interval, b.Via)
	case b.End < a.Start:
		r.violate("S6", "group %s: %s came with count %d at %v and with %d later, at %v", mk.group, mk.key, b.Count, b.Interval, a.Count, a.Interval)
	}
	if end := a.until(b.End); b.End < end-Moment(Epsilon) {
		r.violate("S4", "group %s: %s was leased at %v via %s until %v at least, and again at %v via %s (counts %d, %d)",
			mk.group, mk.key, a.Interval, a.Via, end, b.Interval, b.Via, a.Count, b.Count)
	}
}

// checkSettles checks what was tried with one receipt. newer is the next lease of the message, if any.
func checkSettles(h *History, r *Report, mk messageKey, l, newer *lease) {
	acked := false
	for i, s := range l.settles {
		stale := newer != nil && newer.End < s.Start
		if s.Ack && s.Outcome == harness.OK {
			if newer != nil && h.parted(s.Start, newer.Start) {
				r.Forgotten++
			} else if newer != nil {
				rule := "S3"
				if stale {
					rule = "S5"
				}
				r.violate(rule, "group %s: %s count %d was acknowledged at %v via %s, and a lease with count %d was given at %v via %s",
					mk.group, mk.key, l.Count, s.Interval, s.Via, newer.Count, newer.Interval, newer.Via)
			}
			if acked {
				r.violate("S5", "group %s: %s count %d was acknowledged twice", mk.group, mk.key, l.Count)
			}
			acked = true
			continue
		}
		if stale && s.Outcome == harness.OK {
			r.violate("S5", "group %s: %s: a stale receipt (count %d, the newest is %d) changed a lease at %v via %s", mk.group, mk.key, l.Count, newer.Count, s.Interval, s.Via)
		}
		if s.Outcome != harness.No || !refusesReceipt(s) {
			continue
		}
		if stale {
			r.StaleRefused++
			continue
		}
		// Refused: then the lease must have been over, or its message acknowledged.
		over := h.parted(l.Start, s.End) || newer != nil && newer.Start <= s.End || s.End >= l.until(s.End)-Moment(Epsilon)
		for _, earlier := range l.settles[:i] {
			over = over || earlier.Ack && earlier.Outcome != harness.No
		}
		if !over {
			r.violate("S5", "group %s: %s count %d: a receipt within its lease (%v via %s, until %v at least) was refused at %v via %s: %s",
				mk.group, mk.key, l.Count, l.Interval, l.Via, l.until(s.End), s.Interval, s.Via, s.What)
		}
	}
}

// refusesReceipt tells refusals of a receipt from refusals to do anything at the moment.
func refusesReceipt(s Settle) bool {
	return s.Status == http.StatusConflict || s.Status == http.StatusNotFound || s.Status == http.StatusGone || s.Status == http.StatusBadRequest
}

func checkDelivered(h *History, r *Report, leases map[messageKey][]*lease, settled map[messageKey]bool) {
	for _, p := range h.Publishes {
		var with, without []string
		lost := false
		for _, g := range h.Groups {
			mk := messageKey{g, p.Key}
			got := len(leases[mk]) > 0
			// It was handed out, and lost before it was confirmed.
			gone := p.Outcome == harness.Unknown && got && h.Disaster > 0 && !slices.ContainsFunc(leases[mk], func(l *lease) bool { return l.Start > h.Disaster })
			if got {
				with = append(with, g)
			} else {
				without = append(without, g)
			}
			switch {
			case p.Outcome == harness.OK && !got:
				r.violate("S1", "%s (%s) was published at %v via %s with %d zones and never came to group %s", p.Key, p.ID, p.Interval, p.Via, p.Zones, g)
			case gone:
				lost = true
			case got && !settled[mk]:
				r.violate("S1", "%s came to group %s and could not be acknowledged until the end", p.Key, g)
			}
		}
		if p.Outcome == harness.Unknown && len(with) > 0 {
			r.UnknownSeen++
			if len(without) > 0 && !lost {
				r.violate("S1b", "%s, published with unknown outcome, came to groups %v and not to %v", p.Key, with, without)
			}
		}
	}
}

// Gap returns the longest time between two consecutive confirmed publishes of which the later ended after from
// and the earlier before to, and when it began.
func (h *History) Gap(from, to Moment) (gap time.Duration, at Moment) {
	var ends []Moment
	for _, p := range h.Publishes {
		if p.Outcome == harness.OK {
			ends = append(ends, p.End)
		}
	}
	slices.Sort(ends)
	for i := 1; i < len(ends); i++ {
		if ends[i] >= from && ends[i-1] <= to && time.Duration(ends[i]-ends[i-1]) > gap {
			gap, at = time.Duration(ends[i]-ends[i-1]), ends[i-1]
		}
	}
	return gap, at
}
