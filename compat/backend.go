package compat

import (
	"context"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft"
)

// Backend is what the front end needs of a node. *raft.Node is one.
//
// Errors are *errs.Error. A result that carries a code other than errs.OK is a refusal by the replicated engine.
type Backend interface {
	// Submit has a command applied without waiting: done is called once, from any goroutine. Commands submitted by one
	// goroutine are applied in their order and share log entries.
	Submit(p raft.Proposal, done func(raft.Reply, error))
	// Propose has a command applied and returns its result, with the contents of what it gives.
	Propose(ctx context.Context, p raft.Proposal) (raft.Reply, error)
	// Query reads the applied state linearizably, StaleQuery this node's as it stands.
	Query(ctx context.Context, q engine.Query) (engine.Answer, error)
	StaleQuery(q engine.Query) (engine.Answer, error)
	// Watch returns a channel of capacity 1 that is signalled after changes of the kind were applied on this node.
	Watch(kind raft.WatchKind, name string) (<-chan struct{}, func())
	// Leading reports whether this node leads and is open for service.
	Leading() (term uint64, ok bool)
	// Secret is the cluster's, empty before the node has met it: message IDs are made with it.
	Secret() []byte
	// Status is the node's own view and never waits for others.
	Status() raft.Status
}

var (
	_ Backend     = (*raft.Node)(nil)
	_ Broadcaster = (*raft.Node)(nil)
	_ KeyFollower = (*raft.Node)(nil)
)
