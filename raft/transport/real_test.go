package transport

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	hclog "github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/raft/logstore"
	"tercet.dev/tercet/raft/peer"
	"tercet.dev/tercet/wal"
	"tercet.dev/tercet/wal/disk/sim"
)

// Tests with the real library that are not about crashes.

// three starts three voters on the given disks.
func (w *world) three(disks []*sim.Disk, change func(i int, o *nodeOptions)) []*life {
	all := servers(nodeName(0), nodeName(1), nodeName(2))
	lives := make([]*life, 3)
	for i := range lives {
		o := nodeOptions{bootstrap: &all}
		if change != nil {
			change(i, &o)
		}
		lives[i] = w.start(nodeName(i), disks[i], o)
		w.t.Cleanup(lives[i].stop)
	}
	return lives
}

func emptyDisks() []*sim.Disk {
	disks := make([]*sim.Disk, 3)
	for i := range disks {
		disks[i] = sim.New(uint64(i), sim.Options{Keep: sim.KeepNone, Hang: true})
	}
	return disks
}

// lockedBuffer is a buffer that loggers may share.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) contains(s string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return bytes.Contains(l.b.Bytes(), []byte(s))
}

// awaitState waits until raft is in a state.
func (l *life) awaitState(t *testing.T, state hraft.RaftState) {
	t.Helper()
	ctx := patient(t)
	for l.raft.State() != state {
		if err := pause(ctx, 2*time.Millisecond); err != nil {
			t.Fatalf("%s is %s, not %s", l.name, l.raft.State(), state)
		}
	}
}

// isolate cuts a node off without stopping it; rejoin undoes it.
func (l *life) isolate() {
	l.w.mu.Lock()
	l.w.live[l.address] = nil
	l.w.cut[l] = true
	l.w.mu.Unlock()
	l.connMu.Lock()
	conns := make([]*mortalConn, 0, len(l.conns))
	for c := range l.conns {
		conns = append(conns, c)
	}
	l.connMu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
}

func (l *life) rejoin() {
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	delete(l.w.cut, l)
	l.w.live[l.address] = l
}

// TestPreVoteIsActive: raft uses the transport's pre-vote, so that a node which was cut off campaigns without raising its
// term, and returns without deposing anybody. The control shows that without pre-vote it would.
func TestPreVoteIsActive(t *testing.T) {
	for _, disabled := range []bool{false, true} {
		t.Run(fmt.Sprintf("disabled=%t", disabled), func(t *testing.T) {
			// On a machine that is so busy that the leader loses its followers anyway, nothing is shown: again.
			for attempt := 1; !preVoteRun(t, disabled); attempt++ {
				if attempt == 10 {
					t.Fatal("the leader never stayed in office by itself")
				}
			}
		})
	}
}

// preVoteRun reports whether the run shows something.
func preVoteRun(t *testing.T, disabled bool) bool {
	var logged lockedBuffer
	w := newWorld(t)
	lives := w.three(emptyDisks(), func(_ int, o *nodeOptions) {
		o.logger = hclog.New(&hclog.LoggerOptions{Output: &logged, Level: hclog.Debug})
		o.config = func(c *hraft.Config) { c.PreVoteDisabled = disabled }
	})
	leader, err := w.awaitLeader(patient(t))
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(lives, func(l *life) bool { return l != leader })
	follower := lives[i]
	term := leader.raft.CurrentTerm()
	follower.isolate()
	follower.awaitState(t, hraft.Candidate)
	ctx := patient(t)
	// Let it campaign more than once.
	for !logged.contains("Election timeout reached, restarting election") {
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			t.Fatal("it does not campaign again")
		}
	}
	if raised := follower.raft.CurrentTerm() > term; raised != disabled {
		t.Errorf("term %d after campaigns from term %d", follower.raft.CurrentTerm(), term)
	}
	steady := leader.raft.State() == hraft.Leader && leader.raft.CurrentTerm() == term
	follower.rejoin()
	if disabled {
		return true
	}
	if !steady {
		return false
	}
	follower.awaitState(t, hraft.Follower)
	if now, err := w.awaitLeader(patient(t)); err != nil || now != leader || leader.raft.CurrentTerm() != term {
		t.Errorf("leader %v in term %d after the return, before in term %d: %v", now.name, leader.raft.CurrentTerm(), term, err)
	}
	if logged.contains("pre-vote is disabled") {
		t.Error("raft says that pre-vote is disabled")
	}
	if !logged.contains("pre-vote") {
		t.Error("raft never spoke of pre-vote")
	}
	return true
}

// TestRestartWithoutSnapshot is decision 1's test as far as this package goes: three nodes with 100 000 small committed
// entries and no snapshot come back with their members and everything applied, before raft has a leader.
func TestRestartWithoutSnapshot(t *testing.T) {
	const count = 100_000
	members := servers(nodeName(0), nodeName(1), nodeName(2))
	disks := emptyDisks()
	for _, d := range disks {
		w, err := wal.Open(wal.Options{Dir: "/wal", FS: d, SegmentSize: 1 << 20, Prefill: -1})
		if err != nil {
			t.Fatal(err)
		}
		s, err := logstore.Open(logstore.Options{WAL: w, Shard: w.Shard(0)})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SetUint64([]byte("CurrentTerm"), 1); err != nil {
			t.Fatal(err)
		}
		if err := s.StoreLog(&hraft.Log{Index: 1, Term: 1, Type: hraft.LogConfiguration, Data: hraft.EncodeConfiguration(members)}); err != nil {
			t.Fatal(err)
		}
		var batch []*hraft.Log
		for i := uint64(2); i <= count+1; i++ {
			batch = append(batch, &hraft.Log{Index: i, Term: 1, Data: fmt.Appendf(nil, "entry %d", i)})
			if len(batch) == 1000 || i == count+1 {
				if i == count+1 {
					s.StageCommit(i)
				}
				if err := s.StoreLogs(batch); err != nil {
					t.Fatal(err)
				}
				batch = batch[:0]
			}
		}
		if err := w.WaitDurable(w.Written(), nil); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	w := newWorld(t)
	began := time.Now()
	lives := w.three(disks, nil)
	replayed := time.Since(began)
	for _, l := range lives {
		if n := len(l.fsm.sequence()); n != count {
			t.Errorf("%s replayed %d entries of %d", l.name, n, count)
		}
		future := l.raft.GetConfiguration()
		if err := future.Error(); err != nil || len(future.Configuration().Servers) != 3 {
			t.Errorf("%s starts with members %+v, %v", l.name, future.Configuration().Servers, err)
		}
	}
	leader, err := w.awaitLeader(patient(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d entries: three nodes up after %s, a leader that has committed after %s", count, replayed, time.Since(began))
	reference := leader.fsm.sequence()
	leader.fsm.mu.Lock()
	applied := leader.fsm.applied
	leader.fsm.mu.Unlock()
	for _, l := range lives {
		if err := l.fsm.reach(patient(t), applied); err != nil {
			t.Fatalf("%s: %v", l.name, err)
		}
		seq := l.fsm.sequence()
		if n := min(len(seq), len(reference)); n < count || !slices.Equal(seq[:n], reference[:n]) {
			t.Errorf("%s applied %d entries, not what %s did", l.name, len(seq), leader.name)
		}
	}
}

// TestStalledLeaderIsReplaced: a leader whose disk freezes goes on sending heartbeats in the library and keeps the
// cluster from committing for ever. Here it falls silent, gives up, and follows when its disk is back.
func TestStalledLeaderIsReplaced(t *testing.T) {
	w := newWorld(t)
	lives := w.three(emptyDisks(), func(_ int, o *nodeOptions) { o.stallMax = 200 * time.Millisecond })
	old, err := w.awaitLeader(patient(t))
	if err != nil {
		t.Fatal(err)
	}
	term := old.raft.CurrentTerm()
	old.disk.Freeze()
	lost := old.fsm.await("while frozen")
	old.raft.Apply([]byte("while frozen"), time.Second)
	old.awaitState(t, hraft.Follower)
	var next *life
	for ctx := patient(t); next == nil || next == old; {
		if next, err = w.awaitLeader(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if next.raft.CurrentTerm() <= term {
		t.Errorf("leads in term %d, before in term %d", next.raft.CurrentTerm(), term)
	}
	none(t, lost, "a frozen leader committed")
	applied := next.fsm.await("afterwards")
	next.raft.Apply([]byte("afterwards"), time.Second)
	index := receive(t, applied)
	old.disk.Thaw()
	for _, l := range lives {
		if err := l.fsm.reach(patient(t), index); err != nil {
			t.Errorf("%s: %v", l.name, err)
		}
		mine, theirs := l.fsm.sequence(), next.fsm.sequence()
		if n := min(len(mine), len(theirs)); n == 0 || !slices.Equal(mine[:n], theirs[:n]) {
			t.Errorf("%s applied %s, %s %s", l.name, lines(mine), next.name, lines(theirs))
		}
	}
}

// puppet is a node whose raft is played by the test, in a world of real ones.
func (w *world) puppet(name string) *member {
	w.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	m := &member{id: nodeID(name), disk: newFakeDisk()}
	from := &life{w: w, dead: make(chan struct{}), conns: make(map[*mortalConn]struct{})}
	m.mesh = peer.New(peer.Options{ID: peer.ID(m.id), Zone: name, Cluster: "c1", Listener: l, Dial: from.dial})
	m.Transport = New(Options{Mesh: m.mesh, Address: hraft.ServerAddress(logicalAddress(name)), Log: m.disk, WAL: m.disk, CallTimeout: patience})
	m.mesh.Start()
	m.mesh.SetPeers(Peers(servers(nodeName(0), nodeName(1), nodeName(2))))
	w.t.Cleanup(func() {
		_ = m.Transport.Close()
		_ = m.mesh.Close()
	})
	return m
}

// TestCommitIndexIsClamped is decision 3d: a follower with a suffix that the leader has not compared yet is told of a
// commit index beyond it. The library alone commits the suffix (the control); behind the clamp it commits what has
// been compared.
func TestCommitIndexIsClamped(t *testing.T) {
	for _, clamped := range []bool{true, false} {
		t.Run(fmt.Sprintf("clamped=%t", clamped), func(t *testing.T) {
			w := newWorld(t)
			members := servers(nodeName(0), nodeName(1), nodeName(2))
			follower := w.start(nodeName(0), emptyDisks()[0], nodeOptions{bootstrap: &members,
				faults: func(t *Transport) { t.faults.skipClamp = !clamped },
				config: func(c *hraft.Config) { c.HeartbeatTimeout, c.ElectionTimeout = time.Minute, time.Minute }})
			t.Cleanup(follower.stop)
			send := func(leader *member, a *hraft.AppendEntriesRequest) {
				t.Helper()
				a.RPCHeader = leader.header()
				leader.disk.sync(100)
				var resp hraft.AppendEntriesResponse
				if err := leader.AppendEntries(follower.id, "", a, &resp); err != nil || !resp.Success {
					t.Fatalf("%+v: %+v, %v", a, resp, err)
				}
			}
			first := &hraft.AppendEntriesRequest{Term: 2, PrevLogEntry: 1, PrevLogTerm: 1, LeaderCommitIndex: 1}
			for i := uint64(2); i <= 6; i++ {
				first.Entries = append(first.Entries, &hraft.Log{Index: i, Term: 2, Data: fmt.Appendf(nil, "of term 2: %d", i)})
			}
			send(w.puppet(nodeName(1)), first)
			// The next leader has 4 to 6 otherwise, and has committed them. Its first request compares up to 3.
			send(w.puppet(nodeName(2)), &hraft.AppendEntriesRequest{Term: 3, PrevLogEntry: 3, PrevLogTerm: 2, LeaderCommitIndex: 6})
			want := uint64(3)
			if !clamped {
				want = 6 // what the leader never had
			}
			if err := follower.fsm.reach(patient(t), want); err != nil {
				t.Fatal(err)
			}
			if got := follower.raft.CommitIndex(); got != want {
				t.Errorf("committed up to %d", got)
			}
		})
	}
}

// TestOneSyncInThePath measures, and does not judge, how long a publish takes to be on three disks that sync slowly.
func TestOneSyncInThePath(t *testing.T) {
	w := newWorld(t)
	disks := emptyDisks()
	w.three(disks, nil)
	leader, err := w.awaitLeader(patient(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, delay := range []time.Duration{0, 5 * time.Millisecond, 20 * time.Millisecond} {
		for _, d := range disks {
			d.SetSyncLatency(func() time.Duration { return delay })
		}
		var times []time.Duration
		for i := range 20 {
			command := fmt.Sprintf("%s %d", delay, i)
			applied := leader.fsm.await(command)
			began := time.Now()
			leader.raft.Apply([]byte(command), time.Second)
			index := receive(t, applied)
			var e hraft.Log
			if err := leader.store.GetLog(index, &e); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			if err := leader.awaitAll(ctx, e.Term, index); err != nil {
				t.Fatal(err)
			}
			cancel()
			times = append(times, time.Since(began))
		}
		slices.Sort(times)
		t.Logf("sync %s: a publish on all three disks takes %s (median), %s at best", delay, times[len(times)/2], times[0])
	}
}
