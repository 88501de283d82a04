package raft

import (
	"slices"
	"time"

	"tercet.dev/tercet/engine"
)

// The in-sync set is replicated state: who is in it changes only by an applied Shrink, Expand or
// configuration. What is here decides when the leader proposes one. It is a state machine without clock or
// I/O: step is given the present and returns proposals.
//
//	            behind without progress for zone-timeout,
//	            or its port refused a redial, or it says that its disk is stalled
//	          ┌────────────────────────────────────────────┐
//	      ┌───┴───┐                                   ┌────▼───┐
//	      │  in   │                                   │  out   │◄─┐ further behind than 1 MiB,
//	      └───▲───┘                                   └────┬───┘  │ or no contact
//	          │  close to the head without a break         │      │
//	          │  for 2 s, after repeated falls 4 … 60 s    ▼      │
//	          │                                      ┌─────────┐  │
//	          └──────────────────────────────────────┤ nearing ├──┘
//	                                                 └─────────┘

const (
	// zoneTimeoutDefault is how long a zone may be behind without progress.
	zoneTimeoutDefault = 2 * time.Second
	// returnAfterMin is how long a zone has to be close to the head before it returns, doubled with each
	// fall up to returnAfterMax.
	returnAfterMin = 2 * time.Second
	returnAfterMax = 60 * time.Second
	// fallsForgottenAfter in the set without a fall, a zone is trusted like a new one.
	fallsForgottenAfter = 5 * time.Minute
	// returnBytesMax is how far behind the head a zone may be to count as close.
	returnBytesMax = 1 << 20
)

// voterView is what the leader's transport knows of a voter at an instant.
type voterView struct {
	ID engine.NodeID
	// Match is the last index the voter is known to have on disk in this term.
	Match uint64
	// BehindBytes estimates the log between Match and the head.
	BehindBytes int64
	// Connected says that something was heard from it recently.
	Connected bool
	// Refused says that its port refused the last redial.
	Refused bool
	// Stalled says that its disk does not sync, by its own word.
	Stalled bool
}

// zoneChange is a proposal: Shrink when Out, else Expand.
type zoneChange struct {
	Node  engine.NodeID
	Out   bool
	Epoch uint64
}

// zonePolicy keeps what the decision needs from one step to the next. The falls are kept on every node, from
// the applied changes, so that a new leader does not trust a flapping zone anew; the rest is a leader's.
type zonePolicy struct {
	timeout time.Duration
	set     engine.InSync
	falls   map[engine.NodeID]*fallRecord

	leading bool
	voters  map[engine.NodeID]*voterRecord
	// proposedEpoch is the epoch of the set for which a change is under way.
	proposedEpoch uint64
	proposedAt    time.Time
}

// fallRecord counts how often a node left the set.
type fallRecord struct {
	count int
	// at is the last fall, returned the last return.
	at, returned time.Time
}

// voterRecord is the progress of one voter under this leader.
type voterRecord struct {
	match uint64
	// since is when the voter last made progress or had nothing to do.
	since time.Time
	// closeSince is since when it has been close to the head, zero while it is not.
	closeSince time.Time
}

func newZonePolicy(timeout time.Duration) *zonePolicy {
	if timeout <= 0 {
		timeout = zoneTimeoutDefault
	}
	return &zonePolicy{timeout: timeout, falls: make(map[engine.NodeID]*fallRecord)}
}

// observe takes note of the set as applied.
func (p *zonePolicy) observe(now time.Time, set engine.InSync) {
	for _, id := range p.set.Nodes {
		if slices.Contains(set.Nodes, id) {
			continue
		}
		f := p.falls[id]
		if f == nil {
			f = &fallRecord{}
			p.falls[id] = f
		}
		if !f.returned.IsZero() && now.Sub(f.returned) >= fallsForgottenAfter {
			f.count = 0
		}
		f.count++
		f.at = now
	}
	for _, id := range set.Nodes {
		if f := p.falls[id]; f != nil && !slices.Contains(p.set.Nodes, id) {
			f.returned = now
		}
	}
	p.set = engine.InSync{Epoch: set.Epoch, Nodes: slices.Clone(set.Nodes)}
}

// lead starts a term of leadership. since holds, per voter, from when its silence counts: the last frame of the
// former leader for that one; voters that are missing count from now.
func (p *zonePolicy) lead(now time.Time, voters []engine.NodeID, since map[engine.NodeID]time.Time) {
	p.leading = true
	p.proposedEpoch = 0
	p.voters = make(map[engine.NodeID]*voterRecord, len(voters))
	for _, id := range voters {
		at, ok := since[id]
		if !ok || at.After(now) {
			at = now
		}
		p.voters[id] = &voterRecord{since: at}
	}
}

// follow ends it.
func (p *zonePolicy) follow() {
	p.leading = false
	p.voters = nil
}

// step decides. self is the leader, head the last index of its log, voters all voters but itself. At most one
// change is under way at a time, since each applies only to the epoch it was decided on; the dead go first.
func (p *zonePolicy) step(now time.Time, self engine.NodeID, head uint64, voters []voterView) (zoneChange, bool) {
	if !p.leading {
		return zoneChange{}, false
	}
	var leaves, returns engine.NodeID
	for _, v := range voters {
		r := p.voters[v.ID]
		if r == nil {
			r = &voterRecord{since: now}
			p.voters[v.ID] = r
		}
		if v.Match > r.match || v.Match >= head {
			r.match = max(r.match, v.Match)
			r.since = now
		}
		in := slices.Contains(p.set.Nodes, v.ID)
		// Being close includes moving: one that stands still a few entries behind would fall at once.
		close := v.Connected && !v.Refused && !v.Stalled && v.Match > 0 && v.BehindBytes <= returnBytesMax &&
			now.Sub(r.since) < p.timeout/2
		switch {
		case in || !close:
			r.closeSince = time.Time{}
		case r.closeSince.IsZero():
			r.closeSince = now
		}
		if in {
			if v.Refused || v.Stalled || now.Sub(r.since) >= p.timeout {
				leaves = v.ID
			}
		} else if !r.closeSince.IsZero() && now.Sub(r.closeSince) >= p.returnAfter(v.ID) {
			returns = v.ID
		}
	}
	if p.proposedEpoch == p.set.Epoch && p.proposedEpoch != 0 && now.Sub(p.proposedAt) < p.timeout {
		return zoneChange{}, false
	}
	change := zoneChange{Epoch: p.set.Epoch}
	switch {
	case leaves != "":
		change.Node, change.Out = leaves, true
	case !slices.Contains(p.set.Nodes, self):
		// What the leader appends is on its own disk when it counts, so it is never behind itself.
		change.Node = self
	case returns != "":
		change.Node = returns
	default:
		return zoneChange{}, false
	}
	p.proposedEpoch, p.proposedAt = p.set.Epoch, now
	return change, true
}

// returnAfter is how long a node has to be close to the head before it may return.
func (p *zonePolicy) returnAfter(id engine.NodeID) time.Duration {
	f := p.falls[id]
	if f == nil || f.count <= 1 {
		return returnAfterMin
	}
	if f.count > 6 {
		return returnAfterMax
	}
	return min(returnAfterMin<<(f.count-1), returnAfterMax)
}
