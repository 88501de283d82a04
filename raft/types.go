package raft

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"

	"tercet.dev/tercet/engine"
)

// Durability says what the acknowledgement of a publish requires.
type Durability uint8

const (
	// InSync acknowledges a publish when every zone of the replicated in-sync set has it on disk. The
	// default.
	InSync Durability = iota
	// All acknowledges a publish when every voter's zone has it on disk, and refuses publishes while a
	// zone is away.
	All
	// OnlyMajority acknowledges a publish when a majority has it on disk, which promises less. It is there to be
	// measured beside the others, and no flag that is documented leads to it.
	OnlyMajority
)

// String returns the name used by flags and status documents.
func (d Durability) String() string {
	switch d {
	case All:
		return "all"
	case OnlyMajority:
		return "majority"
	}
	return "in-sync"
}

// ParseDurability reads what String writes, but for OnlyMajority.
func ParseDurability(s string) (Durability, error) {
	switch s {
	case "", "in-sync":
		return InSync, nil
	case "all":
		return All, nil
	}
	return InSync, fmt.Errorf("durability %q: want in-sync or all", s)
}

// Peer is a founding member: a node's name and its node-to-node address.
type Peer struct {
	Name string
	Addr string
}

// Config is what a node is started with. The zero value of an optional field means its default.
type Config struct {
	// Name is the node id ("n1"). Required; letters, digits, - and _.
	Name string
	// Zone is the failure domain; the default is Name.
	Zone string
	// Dir is the data directory. Required; made when it does not exist.
	Dir string
	// Version is the program's version, shown in Status.
	Version string

	// PeerAddr is the address other nodes reach this one at. It is listened on unless PeerListeners is
	// set. Required.
	PeerAddr string
	// PeerListeners are used instead of listening on PeerAddr. The node closes them.
	PeerListeners []net.Listener
	// PeerTLS, when not nil, secures the connections between nodes in both directions: see the function PeerTLS. All nodes
	// have it or none.
	PeerTLS *tls.Config
	// Enrol, when not nil, is given the connections that negotiated an application protocol, which PeerTLS may let
	// through without a certificate: nodes that are about to obtain one. It closes them. They reach nothing else.
	Enrol func(ctx context.Context, conn net.Conn)
	// HTTPAddr and ValkeyAddr are told to the other nodes, for Status; the node does not listen on them.
	HTTPAddr, ValkeyAddr string

	// Peers are the founding members, this node among them, the same on all of them in any order. They
	// matter while the data directory is empty; with neither Peers nor Join an empty directory becomes a
	// cluster of one.
	Peers []Peer
	// Join are addresses of members that an empty directory asks for admission.
	Join []string

	// Durability is what Require Default means.
	Durability Durability
	// ZoneTimeout is how long a silent zone stays in the in-sync set (default 2 s).
	ZoneTimeout time.Duration
	// DiskReserve is the free space below which publishes are refused (default: 5 % of the file system, at
	// most 1 GiB, and never less than what the log and the store need to go on).
	DiskReserve int64
	// WALSegmentSize is the size of a log segment (default 64 MiB).
	WALSegmentSize int64
	// MemoryBudget bounds caches, memtables, the log's ring and the queues together (default: a quarter of
	// the memory this process may use, at most 1 GiB).
	MemoryBudget int64
	// VirtualClock allows engine.Advance commands.
	VirtualClock bool

	// SyncDelay makes each sync of the log take this much longer: a slower disk, for benchmarks.
	SyncDelay time.Duration

	// Logger receives the node's log; the default discards it.
	Logger hclog.Logger
	// Registerer receives the node's metrics; the default is a registry of the node's own.
	Registerer prometheus.Registerer

	// test holds what tests replace: disks, clocks, limits.
	test testHooks
}

// Require says what must hold of a proposal's entry before Propose returns its result.
type Require uint8

const (
	// Default is the node's Durability for a publish, and Majority for every other command.
	Default Require = iota
	// Majority waits for the commit by a majority, and the apply on the leader.
	Majority
	// AllZones waits for every voter's disk. It is refused, with nothing proposed, while the in-sync set
	// is not complete.
	AllZones
)

// Proposal is one command for the replicated engine.
type Proposal struct {
	// Command is an encoded engine command. The caller must not change it afterwards.
	Command []byte
	Require Require
	// Wait makes an engine.Receive that finds nothing wait this long for something to be delivered.
	Wait time.Duration
	// Stop, when it is closed, ends the waiting of a receive: Propose returns what it was given, or nothing, as soon as
	// that is certain. A context that ends gives up instead, with an outcome that may be unknown.
	Stop <-chan struct{}
	// Timeout is how long Submit awaits the outcome, 0 for as long as the node runs. Propose has its context instead.
	Timeout time.Duration
	// Bare leaves the contents of deliveries out where this node can load them later (Reply.Bare).
	Bare bool
}

// Reply is the result of a proposal.
type Reply struct {
	engine.Result
	// Index and Term are those of the entry that carried the command to its result. Zero for an empty
	// receive that was answered without an entry.
	Index, Term uint64
	// Zones is the number of zones that held the entry on disk when the reply was made.
	Zones int
	// Bare is set when the deliveries are without their contents: Node.Load fills them.
	Bare bool
}

// Role is a node's part in the cluster at the moment.
type Role string

// The roles.
const (
	Leader    Role = "leader"
	Follower  Role = "follower"
	Candidate Role = "candidate"
	// NonVoter is a member that receives the log and does not count yet.
	NonVoter Role = "nonvoter"
	// Outsider is a node that is not a member: joining, or removed.
	Outsider Role = "outsider"
)

// Status is a node's view of itself and of the cluster.
type Status struct {
	// ID is the node's name, Incarnation its data directory's.
	ID, Zone, Incarnation, Version string
	Role                           Role
	// AppliedIndex is the last entry in the engine's state, StateHash the state's hash at that index.
	AppliedIndex uint64
	StateHash    uint64

	ClusterID string
	Term      uint64
	// Leader is the name of the leader this node knows, empty for none.
	Leader     string
	Durability Durability
	// Level is the replicated feature level.
	Level uint32
	// InSync lists the zones of the in-sync set, sorted.
	InSync []string
	// Nodes lists the members, sorted by name.
	Nodes []NodeStatus
	// Draining is set once Drain or Close was called.
	Draining bool
}

// NodeStatus is what a node knows of a member.
type NodeStatus struct {
	ID, Zone, Incarnation string
	// HTTP, Peer and Valkey are addresses, empty where unknown.
	HTTP, Peer, Valkey string
	Role               Role
	InSync             bool
	// MatchIndex is the last entry the member is known to have on disk. Only the leader knows it of the
	// others.
	MatchIndex uint64
	// LevelMax is the highest feature level the member's release knows, 0 where unknown.
	LevelMax uint32
	// DiskFree is what the member last reported, 0 where unknown.
	DiskFree int64
}

// Errors that keep a node from starting, found with errors.Is in a *StartError.
var (
	// ErrWiped: the data directory is empty and the cluster knows a member of this name.
	ErrWiped = errors.New("the data directory of a member is empty")
	// ErrForeign: the data directory belongs to another node, another cluster, or a newer release.
	ErrForeign = errors.New("the data directory is another node's, another cluster's, or a newer release's")
	// ErrLocked: another process uses the data directory.
	ErrLocked = errors.New("the data directory is in use")
	// ErrDamaged: log or store are damaged.
	ErrDamaged = errors.New("the data directory is damaged")
	// ErrRefused: the other nodes refused this one.
	ErrRefused = errors.New("refused by the other nodes")
)

// StartError is a refusal to start on purpose: a precondition that an operator has to restore. Programs exit
// with status 4.
type StartError struct {
	// Kind is one of the errors above.
	Kind error
	// Message says what was found where.
	Message string
	// Remedy is the way out, in words an operator can type.
	Remedy string
	Cause  error
}

// Error implements error.
func (e *StartError) Error() string {
	s := e.Kind.Error()
	if e.Message != "" {
		s = e.Message
	}
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	if e.Remedy != "" {
		s += " (" + e.Remedy + ")"
	}
	return s
}

// Unwrap makes errors.Is find Kind and Cause.
func (e *StartError) Unwrap() []error {
	if e.Cause == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.Cause}
}

// ErrClosed is what Err returns after Close.
var ErrClosed = errors.New("the node is closed")
