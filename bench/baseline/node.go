package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"
	raftwal "github.com/hashicorp/raft-wal"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

// entriesInFlight is as in Tercet's own coalescer.
const entriesInFlight = 4

type peer struct{ name, addr string }

type options struct {
	id, dir string
	peers   []peer
	delay   time.Duration
}

// node is one member.
type node struct {
	o         options
	log       hclog.Logger
	engine    *engine.Engine
	wal       *raftwal.WAL
	raft      *hraft.Raft
	watermark *watermark
	syncs     syncStats

	ops    chan *op
	slots  chan struct{}
	flying chan *flight
	stop   chan struct{}
	failed chan error
	done   sync.WaitGroup
	leads  atomic.Bool
	init   atomic.Bool // the cluster's identity has been applied
}

// op is one proposal.
type op struct {
	command []byte
	result  chan opResult
}

type opResult struct {
	reply raft.Reply
	err   error
}

// flight is one entry on its way.
type flight struct {
	future hraft.ApplyFuture
	ops    []*op
}

func start(o options) (*node, error) {
	n := &node{
		o: o, watermark: newWatermark(len(o.peers) - 1), ops: make(chan *op, 4096), slots: make(chan struct{}, entriesInFlight),
		flying: make(chan *flight, entriesInFlight), stop: make(chan struct{}), failed: make(chan error, 1),
		log: hclog.New(&hclog.LoggerOptions{Name: "baseline", Output: os.Stderr, Level: hclog.Info}),
	}
	var err error
	if n.engine, err = engine.Open(engine.Options{Dir: filepath.Join(o.dir, "engine"), Logger: n.log.Named("engine"), Spawn: func(f func()) { go f() }}); err != nil {
		return nil, err
	}
	if err := n.startRaft(); err != nil {
		return nil, errors.Join(err, n.engine.Close())
	}
	n.done.Add(4)
	go n.coalesce()
	go n.complete()
	go n.lead()
	go n.checkpoint()
	return n, nil
}

func (n *node) startRaft() error {
	var own string
	var configuration hraft.Configuration
	for _, p := range n.o.peers {
		if p.name == n.o.id {
			own = p.addr
		}
		configuration.Servers = append(configuration.Servers, hraft.Server{
			ID: hraft.ServerID(p.name), Address: hraft.ServerAddress(p.addr),
		})
	}
	wal, store, err := openLog(filepath.Join(n.o.dir, "wal"), n.o.delay, &n.syncs)
	if err != nil {
		return err
	}
	n.wal = wal
	snapshots, err := discardSnapshots{n.o.dir}.store()
	if err != nil {
		return err
	}
	addr, err := net.ResolveTCPAddr("tcp", own)
	if err != nil {
		return err
	}
	tcp, err := hraft.NewTCPTransportWithLogger(own, addr, 3, 10*time.Second, n.log.Named("transport"))
	if err != nil {
		return err
	}
	conf := hraft.DefaultConfig()
	conf.LocalID = hraft.ServerID(n.o.id)
	conf.Logger = n.log.Named("raft")
	conf.HeartbeatTimeout, conf.ElectionTimeout, conf.LeaderLeaseTimeout = time.Second, time.Second, 500*time.Millisecond
	// Snapshots come when the engine has written its state, see checkpoint.
	conf.SnapshotThreshold, conf.SnapshotInterval, conf.TrailingLogs = 1<<40, time.Hour, 1024
	if err := hraft.BootstrapCluster(conf, store, wal, snapshots, tcp, configuration); err != nil && !errors.Is(err, hraft.ErrCantBootstrap) {
		return err
	}
	n.raft, err = hraft.NewRaft(conf, (*fsm)(n), store, wal, snapshots, &watchedTransport{tcp, n.watermark})
	return err
}

func (n *node) fail(err error) {
	select {
	case n.failed <- err:
	default:
	}
}

func (n *node) close() error {
	close(n.stop)
	n.watermark.close()
	err := n.raft.Shutdown().Error()
	n.done.Wait()
	return errors.Join(err, n.wal.Close(), n.engine.Close())
}

// lead proposes the cluster's identity whenever this node becomes leader; the engine applies it once.
func (n *node) lead() {
	defer n.done.Done()
	for {
		select {
		case leads := <-n.raft.LeaderCh():
			n.leads.Store(leads)
			if leads {
				init := engine.Init{ClusterID: "baseline", Secret: make([]byte, 32), Level: engine.LevelMax()}
				n.raft.Apply(n.entry([]*op{{command: init.AppendTo(nil)}}), 0)
			}
		case <-n.stop:
			return
		}
	}
}

// entry makes one raft entry of some commands.
func (n *node) entry(ops []*op) []byte {
	size := 0
	for _, o := range ops {
		size += len(o.command) + engine.EntryOverhead
	}
	now := time.Now().UnixMilli()
	var b engine.EntryBuilder
	b.Reset(max(1, n.engine.Level()), engine.Stamp{Cluster: now, Wall: now}, size)
	for _, o := range ops {
		b.Add(0, 0, 0, o.command)
	}
	return b.Bytes()
}

// Propose implements bench.Node. The reply comes when all nodes have the entry on disk and this one has applied it.
func (n *node) Propose(ctx context.Context, p raft.Proposal) (raft.Reply, error) {
	if info, err := engine.Inspect(p.Command); err != nil || info.Kind != engine.CmdPublish {
		return raft.Reply{}, errs.Of(errs.Unsupported)
	}
	if !n.leads.Load() {
		return raft.Reply{}, errs.Of(errs.NotLeader)
	}
	o := &op{command: p.Command, result: make(chan opResult, 1)}
	select {
	case n.ops <- o:
	case <-ctx.Done():
		return raft.Reply{}, ctx.Err()
	}
	select {
	case r := <-o.result:
		return r.reply, r.err
	case <-ctx.Done():
		return raft.Reply{}, errs.Of(errs.OutcomeUnknown).With(ctx.Err())
	}
}

// coalesce puts what waits into entries, without waiting for more while there is room in flight.
func (n *node) coalesce() {
	defer n.done.Done()
	for {
		var ops []*op
		select {
		case n.slots <- struct{}{}:
		case <-n.stop:
			return
		}
		size := 0
		add := func(o *op) { ops, size = append(ops, o), size+len(o.command)+engine.EntryOverhead }
		select {
		case o := <-n.ops:
			add(o)
		case <-n.stop:
			return
		}
	gather:
		for size < limits.EntryBytesTarget {
			select {
			case o := <-n.ops:
				add(o)
			default:
				break gather
			}
		}
		n.flying <- &flight{future: n.raft.Apply(n.entry(ops), 0), ops: ops}
	}
}

// complete answers the proposals of one entry after the other.
func (n *node) complete() {
	defer n.done.Done()
	for {
		var f *flight
		select {
		case f = <-n.flying:
		case <-n.stop:
			return
		}
		n.answer(f)
		<-n.slots
	}
}

func (n *node) answer(f *flight) {
	var results []engine.Result
	err := f.future.Error()
	if err == nil {
		switch response := f.future.Response().(type) {
		case []engine.Result:
			results = response
		case error:
			err = response
		}
	}
	if err == nil && !n.watermark.wait(f.future.Index()) {
		err = errs.Of(errs.OutcomeUnknown)
	}
	for i, o := range f.ops {
		switch {
		case err != nil:
			o.result <- opResult{err: errs.Of(errs.OutcomeUnknown).With(err)}
		case i >= len(results):
			o.result <- opResult{err: errs.New(errs.Internal, "%d results for %d commands", len(results), len(f.ops))}
		default:
			o.result <- opResult{reply: raft.Reply{Result: results[i], Index: f.future.Index(), Zones: len(n.o.peers)}}
		}
	}
}

// checkpoint has the engine write its state, and raft cut its log, as often as in Tercet.
func (n *node) checkpoint() {
	defer n.done.Done()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	last := time.Now()
	for {
		select {
		case <-tick.C:
		case <-n.stop:
			return
		}
		if !n.engine.NeedsCheckpoint() && time.Since(last) < 30*time.Second {
			continue
		}
		last = time.Now()
		if err := n.raft.Snapshot().Error(); err != nil && !errors.Is(err, hraft.ErrNothingNewToSnapshot) {
			n.log.Warn("no snapshot", "error", err)
		}
	}
}

// fsm is the node as raft sees it.
type fsm node

// Apply implements hraft.FSM.
func (f *fsm) Apply(l *hraft.Log) any { return f.ApplyBatch([]*hraft.Log{l})[0] }

// ApplyBatch implements hraft.BatchingFSM.
func (f *fsm) ApplyBatch(logs []*hraft.Log) []any {
	responses := make([]any, len(logs))
	for i, l := range logs {
		if l.Type != hraft.LogCommand {
			continue
		}
		results, err := f.engine.Apply(l.Index, l.Term, l.Data, nil, nil)
		if err != nil {
			responses[i] = err
			(*node)(f).fail(err)
			continue
		}
		responses[i] = results
		f.init.Store(true)
	}
	return responses
}

// Snapshot implements hraft.FSM.
func (f *fsm) Snapshot() (hraft.FSMSnapshot, error) { return snapshot{f.engine}, nil }

// Restore implements hraft.FSM. A measurement starts from nothing and restarts nobody.
func (f *fsm) Restore(r io.ReadCloser) error {
	return errors.Join(errors.New("the baseline cannot restore a snapshot"), r.Close())
}

type snapshot struct{ engine *engine.Engine }

// Persist implements hraft.FSMSnapshot: the state is made durable where it is.
func (s snapshot) Persist(sink hraft.SnapshotSink) error {
	_, err := s.engine.Checkpoint()
	if err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// Release implements hraft.FSMSnapshot.
func (snapshot) Release() {}

// handler serves what the bench asks a server for.
func (n *node) handler() http.Handler {
	mux := http.NewServeMux()
	answer := func(path string, document func() any) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", wire.MediaJSON)
			_ = json.NewEncoder(w).Encode(document()) // whoever asked has gone
		})
	}
	answer("/v1/cluster", func() any { return n.cluster() })
	answer("/v1/node", func() any {
		index, _ := n.engine.Applied()
		return wire.Node{ID: n.o.id, Zone: n.o.id, AppliedIndex: index, Role: n.raft.State().String()}
	})
	mux.HandleFunc("GET /readyz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "tercet_wal_fsync_duration_seconds_count %d\n", n.syncs.count.Load())
		fmt.Fprintf(w, "tercet_wal_fsync_duration_seconds_sum %g\n", time.Duration(n.syncs.nanos.Load()).Seconds())
		fmt.Fprintf(w, "tercet_wal_synced_bytes_total %d\n", n.syncs.bytes.Load())
	})
	return mux
}

func (n *node) cluster() wire.Cluster {
	_, leader := n.raft.LeaderWithID()
	c := wire.Cluster{ClusterID: "baseline", Leader: string(leader), Durability: "all"}
	if !n.init.Load() {
		c.Leader = ""
	}
	match := n.watermark.matched()
	for _, p := range n.o.peers {
		id := hraft.ServerID(p.name)
		// Only the leader knows; a follower takes the others for present.
		if id == leader || match[id] > 0 || n.o.id != string(leader) {
			c.InSync = append(c.InSync, p.name)
		}
		c.Nodes = append(c.Nodes, wire.ClusterNode{ID: p.name, Zone: p.name, Peer: p.addr, MatchIndex: match[id]})
	}
	return c
}
