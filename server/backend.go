package server

import (
	"context"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft"
)

// Backend is what the server needs of a node. *raft.Node is one.
//
// Errors are *errs.Error. A result that carries a code other than errs.OK is a refusal by the replicated
// engine; both are answered alike.
type Backend interface {
	// Propose has a command applied and returns its result. Deliveries come with their content.
	Propose(ctx context.Context, p raft.Proposal) (raft.Reply, error)
	// Query reads the applied state linearizably.
	Query(ctx context.Context, q engine.Query) (engine.Answer, error)
	// Status is the node's own view and never waits for others.
	Status() raft.Status
	// Secret keys receipts and message IDs. Nil before the cluster is founded.
	Secret() []byte
	// Ready returns nil when requests can be expected to succeed, Live unless the process should be restarted.
	Ready() error
	Live() error

	AddMember(ctx context.Context, name string) error
	RemoveMember(ctx context.Context, name string) error
	ReplaceMember(ctx context.Context, name string) error
	TransferLeadership(ctx context.Context, name string) error
}

// memberReader is a Backend that can have each member read what it has applied and stored by itself.
type memberReader interface {
	QueryMember(ctx context.Context, name string, q engine.Query) (engine.Answer, error)
}

// finalizer is a Backend whose cluster has a feature level.
type finalizer interface {
	Finalize(ctx context.Context) error
}

var (
	_ Backend      = (*raft.Node)(nil)
	_ finalizer    = (*raft.Node)(nil)
	_ memberReader = (*raft.Node)(nil)
)
