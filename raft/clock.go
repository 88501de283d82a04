package raft

import (
	"sync"
	"time"

	"tercet.dev/tercet/engine"
)

// clusterClock estimates the two clocks an entry is stamped with (R9).
//
// Cluster time is the highest of: each stamp of the present term that this node has seen applied, plus the
// monotonic time since it saw it. So it advances on every node between entries, a new leader goes on where the old
// one was give or take the time an entry travels, and it stands still only while no node runs. A new term's first
// stamp replaces what was estimated before, downwards too: a node that has run longer than its leader would
// otherwise be ahead of cluster time, and leases would end early when it leads. Wall time is this machine's, but
// never lower than a stamp already used; with a virtual clock it also keeps whatever lead the last stamp had.
//
// The wall clock is read nowhere else in the decision path: a step of it moves dates, and nothing that decides.
type clusterClock struct {
	// mono and wall are time.Now unless a test replaces them.
	mono func() time.Time
	wall func() time.Time
	// virtual keeps the lead of the last wall stamp.
	virtual bool

	mu   sync.Mutex
	base engine.Stamp
	at   time.Time
	// term is that of the entry observed last.
	term uint64
}

func newClusterClock(mono, wall func() time.Time, virtual bool, recovered engine.Stamp) *clusterClock {
	return &clusterClock{mono: mono, wall: wall, virtual: virtual, base: recovered, at: mono()}
}

// follow takes note of a stamp that was applied in an entry of the given term.
func (c *clusterClock) follow(term uint64, s engine.Stamp) {
	c.mu.Lock()
	if term != c.term {
		c.term = term
		c.base.Cluster, c.at = s.Cluster, c.mono()
		if c.virtual {
			c.base.Wall = s.Wall
		}
	}
	c.mu.Unlock()
	c.observe(s)
}

// observe takes note of a stamp that was applied in the present term.
func (c *clusterClock) observe(s engine.Stamp) {
	now := c.mono()
	c.mu.Lock()
	defer c.mu.Unlock()
	lead := now.Sub(c.at).Milliseconds()
	// Keeping the higher of the two is what makes the clock run at the rate of the monotonic one: taking
	// each stamp as "now" would lose the time its commit took, once per entry.
	if s.Cluster > c.base.Cluster+lead {
		c.base.Cluster, c.at = s.Cluster, now
		if s.Wall > c.base.Wall || !c.virtual {
			c.base.Wall = max(c.base.Wall, s.Wall)
		}
		return
	}
	c.base.Wall = max(c.base.Wall, s.Wall-c.virtualLead(lead))
}

// virtualLead is what must be taken off a wall stamp seen lead after base, so that base plus lead is that stamp.
func (c *clusterClock) virtualLead(lead int64) int64 {
	if c.virtual {
		return lead
	}
	return 0
}

// now returns the stamp an entry proposed now gets.
func (c *clusterClock) now() engine.Stamp {
	mono, wall := c.mono(), c.wall().UnixMilli()
	c.mu.Lock()
	defer c.mu.Unlock()
	lead := mono.Sub(c.at).Milliseconds()
	s := engine.Stamp{Cluster: c.base.Cluster + lead, Wall: max(c.base.Wall+c.virtualLead(lead), wall)}
	// What was handed out is a floor: two entries of one leader are proposed before either is applied.
	c.base.Wall = max(c.base.Wall, s.Wall-c.virtualLead(lead))
	return s
}
