package server

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// single is a backend of one engine without replication.
type single struct {
	fakeBackend
	e     *engine.Engine
	mu    sync.Mutex
	index uint64
	begun time.Time
	woken chan struct{}
}

func newSingle(t testing.TB) *single {
	t.Helper()
	e, err := engine.Open(engine.Options{Dir: "e", FS: vfs.NewMem()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	b := &single{e: e, begun: time.Now(), woken: make(chan struct{})}
	init := engine.Init{ClusterID: "c", Secret: fakeSecret, Level: engine.LevelMax()}
	if _, err := b.apply(init.AppendTo(nil)); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *single) apply(command []byte) (engine.Result, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var eb engine.EntryBuilder
	eb.Reset(1, engine.Stamp{Cluster: time.Since(b.begun).Milliseconds() + 1, Wall: time.Now().UnixMilli()}, 1024)
	eb.Add(0, 0, 0, command)
	b.index++
	var fx engine.Effects
	results, err := b.e.Apply(b.index, 1, eb.Bytes(), nil, &fx)
	if err != nil {
		return engine.Result{}, err
	}
	if len(fx.Deliverable) > 0 {
		close(b.woken)
		b.woken = make(chan struct{})
	}
	r := results[0]
	return r, b.e.Load(r.Deliveries)
}

func (b *single) Propose(ctx context.Context, p raft.Proposal) (raft.Reply, error) {
	end := time.Now().Add(p.Wait)
	for {
		b.mu.Lock()
		woken := b.woken
		b.mu.Unlock()
		r, err := b.apply(p.Command)
		if err != nil {
			return raft.Reply{}, err
		}
		left := time.Until(end)
		if p.Wait == 0 || r.Code != errs.OK || len(r.Deliveries) > 0 || left <= 0 {
			return raft.Reply{Result: r, Index: b.index, Term: 1, Zones: 1}, nil
		}
		timer := time.NewTimer(min(left, 100*time.Millisecond))
		select {
		case <-woken:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return raft.Reply{}, errs.Of(errs.OutcomeUnknown).With(ctx.Err())
		}
		timer.Stop()
	}
}

func (b *single) Query(ctx context.Context, q engine.Query) (engine.Answer, error) {
	return b.e.Query(q)
}
