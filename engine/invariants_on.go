//go:build invariants

package engine

import (
	"fmt"
	"slices"

	"tercet.dev/tercet/internal/limits"
)

// invariants turns on the checks of DESIGN.md's numbered invariants after every entry.
const invariants = true

// checkInvariants panics with the number of the invariant that does not hold. The other place where each is
// looked at is named in DESIGN.md.
func (e *Engine) checkInvariants() {
	assert := func(ok bool, name string, args ...any) {
		if !ok {
			panic(fmt.Sprintf("engine: invariant %s does not hold after entry %d: %v", name, e.index, args))
		}
	}
	var kept int64
	for _, r := range e.recent[e.recentHead:] {
		kept += r.bytes
	}
	assert(kept == e.recentBytes && (e.recentBytes <= max(e.o.RecentBytes, 0) || e.recentHead == len(e.recent)), "I12", kept, e.recentBytes)
	for _, t := range e.byInc {
		assert(e.topics[t.name] == t && t.inc <= e.incarnations, "I3", t.name)
		assert(t.open == nil, "I4", t.name)
		for i, b := range t.recent[t.head:] {
			end := t.next
			if rest := t.recent[t.head+i+1:]; len(rest) > 0 {
				end = rest[0].base
			}
			assert(b.end() == end && b.index <= e.index && (len(b.starts) == int(b.count) || b.refs != nil), "I4", t.name, b.base, b.end(), end)
			n := uint32(0)
			for _, r := range b.runs {
				n += r.count
			}
			assert(b.refs != nil || n == b.count && (b.uniform || len(b.retention) == int(b.count)), "I4", t.name, b.base)
		}
		assert(t.gone <= t.next, "I5", t.name, t.gone, t.next)
		for _, g := range t.byInc {
			e.checkGroup(g, assert)
		}
	}
	for id, in := range e.intakes {
		assert(in.id == id && uint64(id) <= e.intakeCount && in.lowest <= in.high && in.high-in.lowest <= limits.IntakeOpenMax, "I10", id)
		assert(e.stamp.Cluster-in.heard <= e.advance+limits.IntakeSilenceMax.Milliseconds(), "I10", id)
	}
	assert(slices.IsSorted(e.inSync.Nodes), "I11", e.inSync)
	for _, n := range e.inSync.Nodes {
		assert(slices.Contains(e.members, Member{ID: n, Voter: true}), "I11", n)
	}
}

func (e *Engine) checkGroup(g *group, assert func(bool, string, ...any)) {
	assert(g.next <= g.topic.next && g.inc <= e.incarnations, "I5", g.name, g.next)
	live, ahead, inflight, parkedCount := 0, 0, 0, 0
	epochs := make(map[uint64]bool)
	pending, ready, expiring := make(map[timer]bool), make(map[timer]bool), make(map[timer]bool)
	for _, t := range g.pending {
		pending[t] = true
	}
	for _, t := range g.ready {
		ready[t] = true
	}
	for _, t := range g.expiring {
		expiring[t] = true
	}
	for key, c := range g.chunks {
		n := 0
		for i := range c.slots {
			l := &c.slots[i]
			assert(i == 0 || c.slots[i-1].low < l.low, "I6", g.name, key)
			if l.state == slotFree {
				continue
			}
			n++
			off := key<<chunkShift | uint64(l.low)
			assert(off < g.topic.next, "I6", g.name, off)
			if !g.passed(off, l.dep) {
				ahead++
			}
			if l.state == parked {
				parkedCount++
			}
			if l.state == leased && l.flags&flagLapsed == 0 {
				inflight++
			}
			assert(l.state != settledAhead || !g.passed(off, l.dep), "I6", g.name, off)
			assert(l.epoch > 0 && l.epoch <= g.epoch && !epochs[l.epoch], "I7", g.name, off, l.epoch)
			epochs[l.epoch] = true
			assert((l.count > 0 || l.state == released || g.consumerCount > 0) && l.granted <= e.stamp.Cluster, "I7", g.name, off)
			assert(l.expiry == never || expiring[timer{l.expiry, off}], "I8", g.name, off)
			switch {
			case l.idle():
			case l.flags&flagReady != 0:
				assert((ready[timer{l.due(), off}] || g.excluded(l.dep)) && l.due() <= e.stamp.Cluster, "I8", g.name, off)
				if p := g.parts[l.dep]; p != nil {
					assert(slices.Contains(p.ready, timer{l.due(), off}), "I8", g.name, off)
				}
			case l.wake() != never:
				assert(pending[timer{l.wake(), off}], "I8", g.name, off)
			}
		}
		assert(n == c.live && n > 0, "I6", g.name, key)
		live += n
	}
	assert(live == g.live && ahead == g.ahead && inflight == g.inflight, "I6", g.name, live, g.live, ahead, g.ahead, inflight, g.inflight)
	assert(parkedCount == g.parkedCount, "I6", g.name, parkedCount, g.parkedCount)
	assert(g.unsettled() <= e.unsettledLimit(g) && g.parkedCount <= limits.ParkedPerGroupMax+e.unsettledLimit(g), "I9", g.name, g.live, g.parkedCount)
}
