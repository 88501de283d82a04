package raft

import (
	"sync"
	"time"

	"tercet.dev/tercet/engine"
)

// clusterClock estimates the two clocks an entry is stamped with (R9).
//
// Cluster time is the highest of: each stamp of the present term that has reached this node, plus the monotonic time
// since it did. Stamps come with the entries when they are stored in the log, and with the cards of the node that
// leads, so that an idle cluster has them as well. So cluster time advances on every node, a new leader goes on where
// the old one was give or take the time a message travels, and it stands still only while no node runs. A new term's
// first stamp replaces what was estimated before, downwards too: a node that has run longer than its leader would
// otherwise be ahead of cluster time, and leases would end early when it leads. What this node has stamped itself
// replaces nothing: its own clock was cluster time then, and the entry's way to the log would be lost each time.
//
// Wall time is this machine's, but never lower than a stamp already used; with a virtual clock it also keeps whatever
// lead the last stamp had. The wall clock is read nowhere else in the decision path: a step of it moves dates, and
// nothing that decides.
type clusterClock struct {
	// mono and wall are time.Now unless a test replaces them.
	mono func() time.Time
	wall func() time.Time
	// virtual keeps the lead of the last wall stamp.
	virtual bool

	mu   sync.Mutex
	base engine.Stamp
	at   time.Time
	// term is the newest one that a stamp has come of.
	term uint64
	// stamped is the highest cluster time this node has given to an entry.
	stamped int64
}

// newClusterClock makes a clock that goes on from the stamp that was recovered, and the term it is of.
func newClusterClock(mono, wall func() time.Time, virtual bool, term uint64, recovered engine.Stamp) *clusterClock {
	return &clusterClock{mono: mono, wall: wall, virtual: virtual, term: term, base: recovered, at: mono()}
}

// follow takes note of the stamp of an entry of the given term.
func (c *clusterClock) follow(term uint64, s engine.Stamp) {
	now := c.mono()
	c.mu.Lock()
	defer c.mu.Unlock()
	if term > c.term {
		c.term = term
		if s.Cluster > c.stamped {
			c.setLocked(s.Cluster, now)
			if c.virtual {
				c.base.Wall = s.Wall
			}
		}
	}
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

// hear takes note of the cluster time that the leader of a term has just told.
func (c *clusterClock) hear(term uint64, cluster int64) {
	now := c.mono()
	c.mu.Lock()
	defer c.mu.Unlock()
	newer := term > c.term && cluster > c.stamped
	c.term = max(c.term, term)
	if newer || term == c.term && cluster > c.base.Cluster+now.Sub(c.at).Milliseconds() {
		c.setLocked(cluster, now)
	}
}

// setLocked makes cluster the cluster time of now, and leaves wall time where it is.
func (c *clusterClock) setLocked(cluster int64, now time.Time) {
	c.base.Wall += c.virtualLead(now.Sub(c.at).Milliseconds())
	c.base.Cluster, c.at = cluster, now
}

// virtualLead is what must be taken off a wall stamp seen lead after base, so that base plus lead is that stamp.
func (c *clusterClock) virtualLead(lead int64) int64 {
	if c.virtual {
		return lead
	}
	return 0
}

// stamp returns the stamp for an entry that is proposed now.
func (c *clusterClock) stamp() engine.Stamp {
	s := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stamped = max(c.stamped, s.Cluster)
	return s
}

// now returns the stamp that an entry proposed now would get.
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
