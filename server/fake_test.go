package server

import (
	"context"
	"sync"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// fakeBackend injects what a real node cannot be made to answer on demand: unknown outcomes, overload, refusals of
// every code, and deliveries with fixed times for golden files.
type fakeBackend struct {
	propose func(ctx context.Context, p raft.Proposal) (raft.Reply, error)
	query   func(ctx context.Context, q engine.Query) (engine.Answer, error)
	status  raft.Status
	ready   error
	live    error
	change  func(ctx context.Context, verb, name string) error

	mu       sync.Mutex
	commands []engine.Command
	// toLead is who leads after Status was asked leaderless times more.
	toLead     string
	leaderless int
}

var fakeSecret = []byte("0123456789abcdef0123456789abcdef")

func (f *fakeBackend) Propose(ctx context.Context, p raft.Proposal) (raft.Reply, error) {
	if f.propose != nil {
		return f.propose(ctx, p)
	}
	command, err := engine.DecodeCommand(p.Command)
	if err != nil {
		return raft.Reply{}, errs.Of(errs.Internal).With(err)
	}
	f.mu.Lock()
	f.commands = append(f.commands, command)
	f.mu.Unlock()
	reply := raft.Reply{Index: 7, Term: 3, Zones: 3}
	switch c := command.(type) {
	case *engine.Publish:
		reply.Published = engine.Published{Index: 7, Pos: 1, Count: uint32(len(c.Messages))}
	case *engine.Settle:
		reply.Codes = []errs.Code{errs.OK}
	}
	return reply, nil
}

func (f *fakeBackend) Query(ctx context.Context, q engine.Query) (engine.Answer, error) {
	if f.query != nil {
		return f.query(ctx, q)
	}
	return engine.Answer{}, nil
}

func (f *fakeBackend) QueryMember(ctx context.Context, _ string, q engine.Query) (engine.Answer, error) {
	return f.Query(ctx, q)
}

func (f *fakeBackend) Secret() []byte { return fakeSecret }
func (f *fakeBackend) Ready() error   { return f.ready }
func (f *fakeBackend) Live() error    { return f.live }

// Status is the status that the test gave; while leadership is on its way there is no leader.
func (f *fakeBackend) Status() raft.Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	st := f.status
	if f.toLead != "" {
		if f.leaderless--; f.leaderless < 0 {
			f.status.Leader, f.toLead = f.toLead, ""
		}
		st.Leader = ""
	}
	return st
}

func (f *fakeBackend) member(ctx context.Context, verb, name string) error {
	if f.change != nil {
		return f.change(ctx, verb, name)
	}
	return nil
}

func (f *fakeBackend) AddMember(ctx context.Context, name string) error {
	return f.member(ctx, "add", name)
}

func (f *fakeBackend) RemoveMember(ctx context.Context, name string) error {
	return f.member(ctx, "remove", name)
}

func (f *fakeBackend) ReplaceMember(ctx context.Context, name string) error {
	return f.member(ctx, "replace", name)
}

func (f *fakeBackend) TransferLeadership(ctx context.Context, name string) error {
	f.mu.Lock()
	if f.toLead, f.leaderless = name, 2; name == "" {
		f.toLead = "another"
	}
	f.mu.Unlock()
	return f.member(ctx, "transfer", name)
}

// last returns the last command that was proposed.
func (f *fakeBackend) last() engine.Command {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.commands) == 0 {
		return nil
	}
	return f.commands[len(f.commands)-1]
}
