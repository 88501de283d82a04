package raft

import (
	"slices"
	"time"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// Status returns this node's view of the cluster. It never waits for other nodes.
func (n *Node) Status() Status {
	s := Status{ID: n.cfg.Name, Zone: n.cfg.Zone, Incarnation: n.incarnation, Version: n.cfg.Version,
		Durability: n.cfg.Durability, Draining: n.draining.Load() || n.closing.Load()}
	s.AppliedIndex, s.StateHash = n.eng.StateHash()
	if id := n.clusterID.Load(); id != nil {
		s.ClusterID = *id
	}
	s.Level = n.eng.Level()
	s.Term = n.raft.CurrentTerm()
	_, leader := n.raft.LeaderWithID()
	s.Leader = nameOf(engine.NodeID(leader))
	set := n.inSync.Load()
	leads := n.raft.State() == hraft.Leader
	s.Role = Outsider
	for _, server := range n.configuration().Servers {
		id := engine.NodeID(server.ID)
		name, incarnation := splitID(id)
		c, at := n.directory.get(id)
		node := NodeStatus{ID: name, Incarnation: incarnation, Zone: n.directory.zone(id), Peer: string(server.Address),
			HTTP: c.HTTP, Valkey: c.Valkey, Role: Follower, InSync: set != nil && slices.Contains(set.Nodes, id)}
		if n.now().Sub(at) < diskNewsMax {
			node.DiskFree = c.Free
		}
		switch {
		case id == n.id:
			node.LevelMax = n.levelMax()
		case c.levelKnown():
			node.LevelMax = *c.Level
		}
		switch {
		case server.Suffrage != hraft.Voter:
			node.Role = NonVoter
		case id == engine.NodeID(leader):
			node.Role = Leader
		case id == n.id && n.raft.State() == hraft.Candidate:
			node.Role = Candidate
		}
		switch {
		case id == n.id:
			s.Role = node.Role
			node.MatchIndex = n.logs.Durable()
		case leads:
			node.MatchIndex = n.match(id)
		}
		if node.InSync && server.Suffrage == hraft.Voter {
			s.InSync = append(s.InSync, node.Zone)
		}
		s.Nodes = append(s.Nodes, node)
	}
	slices.Sort(s.InSync)
	slices.SortFunc(s.Nodes, func(a, b NodeStatus) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	return s
}

// readyLagMax is how many entries a follower may be behind what it has on disk and be ready.
const readyLagMax = 4096

// Ready returns nil when requests sent to this node can be expected to succeed, else why not.
func (n *Node) Ready() error {
	switch {
	case n.closing.Load(), n.draining.Load():
		return errs.Of(errs.Draining)
	case n.stalled.Load():
		return errs.New(errs.Overloaded, "the disk is stalled")
	case n.clusterID.Load() == nil:
		return errs.New(errs.NoLeader, "the cluster is not founded yet")
	case !n.intake.isOpen():
		return errs.New(errs.NoLeader, "no leader has taken this node's requests yet")
	}
	_, leader := n.raft.LeaderWithID()
	switch {
	case leader == "":
		return errs.Of(errs.NoLeader)
	case engine.NodeID(leader) == n.id && n.openTerm.Load() == 0:
		return errs.New(errs.NoLeader, "this node has just been elected")
	}
	if applied, _ := n.eng.Applied(); n.logs.Last() > applied+readyLagMax {
		return errs.New(errs.Overloaded, "this node is catching up")
	}
	return nil
}

// Live returns nil unless the process should be restarted. It does not depend on other nodes.
func (n *Node) Live() error {
	if err := n.Err(); err != nil {
		return err
	}
	if err := n.wal.Err(); err != nil {
		return err
	}
	return n.eng.Err()
}

// Where the coalescer stops proposing.
const (
	unsyncedBytesMax = limits.UnsyncedBytesMax
	unsyncedAgeMax   = limits.UnsyncedAgeMax
)

// lag is how long ago this node heard of a leader.
func (n *Node) lag() time.Duration {
	if n.raft == nil || n.raft.State() == hraft.Leader {
		return 0
	}
	at := n.raft.LastContact()
	if at.IsZero() {
		return 0
	}
	return time.Since(at)
}
