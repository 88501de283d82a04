package raft

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tercet.dev/tercet/internal/errs"
)

// testHooks are what tests replace in a Config.
type testHooks struct{}

// A Node is one member of the cluster. Its methods may be called from any goroutine.
type Node struct {
	cfg      Config
	registry *prometheus.Registry
	done     chan struct{}
}

// Start opens the data directory, rebuilds the state, and takes part in the cluster. It returns once the node
// runs, which may be before a leader is known (see Ready); with empty directories it waits, until ctx ends, for
// the founding members or for admission.
func Start(ctx context.Context, cfg Config) (*Node, error) {
	return nil, errs.Of(errs.Unsupported)
}

// Propose has a command applied and returns its result. Any node takes it; a follower passes it to the leader.
// Through an election it is held, and repeated under its number on the new leader, until ctx ends. Errors are
// *errs.Error: an outcome of None means that nothing happened and nothing will.
func (n *Node) Propose(ctx context.Context, p Proposal) (Reply, error) {
	return Reply{}, errs.Of(errs.Unsupported)
}

// Status returns this node's view of the cluster. It never waits for other nodes.
func (n *Node) Status() Status { return Status{} }

// Secret returns the cluster's key for receipts and message IDs, nil before the cluster is founded.
func (n *Node) Secret() []byte { return nil }

// Ready returns nil when requests sent to this node can be expected to succeed, else why not.
func (n *Node) Ready() error { return errs.Of(errs.NoLeader) }

// Live returns nil unless the process should be restarted. It does not depend on other nodes.
func (n *Node) Live() error { return nil }

// Drain takes the node out of service without an unknown outcome: it stops proposing, lets what is in flight
// finish, leaves the in-sync set and hands leadership on. The node still passes requests to the leader until
// Close.
func (n *Node) Drain(ctx context.Context) error { return nil }

// Close stops the node. It does not wait for other nodes; call Drain first for a stop without consequences.
func (n *Node) Close() error { return nil }

// Done is closed when the node has stopped, after Close or by itself.
func (n *Node) Done() <-chan struct{} { return n.done }

// Err returns why the node stopped: ErrClosed after Close, else the fatal error. Nil while it runs.
func (n *Node) Err() error { return nil }

// Gatherer returns the registry that holds the node's metrics when Config.Registerer was nil.
func (n *Node) Gatherer() prometheus.Gatherer { return n.registry }

// AddMember admits the node that waits under this name (see Config.Join): first as a non-voter that catches up,
// then as a voter. Its zone must have no voter.
func (n *Node) AddMember(ctx context.Context, name string) error { return nil }

// RemoveMember takes the member out of the cluster for good.
func (n *Node) RemoveMember(ctx context.Context, name string) error { return nil }

// ReplaceMember removes the member's present incarnation and admits the next one that asks to join under the
// same name.
func (n *Node) ReplaceMember(ctx context.Context, name string) error { return nil }

// TransferLeadership hands leadership to the named member, or to the most advanced one when name is empty.
func (n *Node) TransferLeadership(ctx context.Context, name string) error { return nil }

// RecoverReport is what Recover did.
type RecoverReport struct {
	// Node is the node's new identity, ClusterID the new cluster's.
	Node, ClusterID string
	// Applied is the last entry known to be committed before, Last the last one of the log. What lies
	// between was kept though it may never have been acknowledged.
	Applied, Last uint64
	// Lost names the members that are no longer part of the cluster.
	Lost []string
	// At is when the last kept entry was appended.
	At time.Time
}

// Recover turns the stopped node in dir into a cluster of one. It appends a configuration with that node alone,
// in a new term and under a new cluster id, and keeps the whole log: nothing that this node holds is lost. Nodes
// of the old cluster cannot rejoin by themselves. Without force it only reports.
func Recover(dir string, force bool) (RecoverReport, error) {
	return RecoverReport{}, errs.Of(errs.Unsupported)
}
