package transport

import (
	"context"
	"errors"
	"testing"
	"time"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/raft/peer"
)

// open makes a pipeline from one member to another.
func (m *member) open(t *testing.T, to *member) hraft.AppendPipeline {
	t.Helper()
	p, err := m.AppendEntriesPipeline(to.id, to.LocalAddr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

func push(t *testing.T, p hraft.AppendPipeline, a *hraft.AppendEntriesRequest) hraft.AppendFuture {
	t.Helper()
	f, err := p.AppendEntries(a, new(hraft.AppendEntriesResponse))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// TestFollowerAnswersWhenItsDiskHasSynced is rule 3 of the gate: raft has answered, the wire has not.
func TestFollowerAnswersWhenItsDiskHasSynced(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	leader.disk.sync(100)
	p := leader.open(t, follower)
	push(t, p, leader.request(5, 0, 3))
	push(t, p, leader.request(5, 3, 6))
	follower.accept(t)
	follower.accept(t) // the second was handed over without an answer to the first
	if lsn := receive(t, follower.disk.waiting); lsn != 3 {
		t.Errorf("waits for %d", lsn)
	}
	none(t, p.Consumer(), "an answer before the sync")
	if m := leader.marks.Match(follower.id); m != 0 {
		t.Errorf("counted %d before the sync", m)
	}
	follower.disk.sync(3)
	if f := receive(t, p.Consumer()); !f.Response().Success || covers(f.Request()) != 3 {
		t.Errorf("first answer %+v", f.Response())
	}
	if lsn := receive(t, follower.disk.waiting); lsn != 6 {
		t.Errorf("waits for %d", lsn)
	}
	none(t, p.Consumer(), "the second answer before its sync")
	if m := leader.marks.Match(follower.id); m != 3 {
		t.Errorf("counted %d", m)
	}
	follower.disk.sync(6)
	if f := receive(t, p.Consumer()); covers(f.Request()) != 6 || f.Error() != nil {
		t.Errorf("second answer %+v", f.Response())
	}
}

// TestFollowerThatHasItAlreadyMustHaveItOnDisk: a deposed leader with an unsynced tail, asked for what it has.
func TestFollowerThatHasItAlreadyMustHaveItOnDisk(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	leader.disk.sync(100)
	follower.disk.append(9)
	follower.disk.sync(4)
	follower.disk.append(9)
	p := leader.open(t, follower)
	push(t, p, leader.request(5, 9, 9)) // no entries: it proves the one before
	follower.accept(t)
	if lsn := receive(t, follower.disk.waiting); lsn != 9 {
		t.Errorf("waits for %d", lsn)
	}
	none(t, p.Consumer(), "an answer before the sync")
	follower.disk.sync(9)
	receive(t, p.Consumer())
	if m := leader.marks.Match(follower.id); m != 9 {
		t.Errorf("counted %d", m)
	}
}

// TestLeaderBelievesWhenItsDiskHasSynced is rule 4: raft counts the leader's own copy when it is buffered, so it may
// not see anybody else's before the leader's is on disk. The watermark needs no gate: it has a row for the leader.
func TestLeaderBelievesWhenItsDiskHasSynced(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	leader.disk.append(6)
	leader.marks.SetRequired(leader.id, follower.id)
	p := leader.open(t, follower)
	push(t, p, leader.request(5, 0, 3))
	push(t, p, leader.request(5, 3, 6))
	follower.accept(t)
	follower.accept(t)
	follower.disk.sync(6)
	if lsn := receive(t, leader.disk.waiting); lsn != 3 {
		t.Errorf("waits for %d", lsn)
	}
	none(t, p.Consumer(), "raft learnt before the leader's sync")
	if l := leader.marks.Level(); l.Required != 0 {
		t.Errorf("the watermark rose to %d without the leader's disk", l.Required)
	}
	leader.disk.sync(3)
	leader.LogDurable()
	if f := receive(t, p.Consumer()); covers(f.Request()) != 3 {
		t.Errorf("answer to %d", covers(f.Request()))
	}
	if lsn := receive(t, leader.disk.waiting); lsn != 6 {
		t.Errorf("waits for %d", lsn)
	}
	none(t, p.Consumer(), "raft learnt before the leader's sync")
	if l := leader.marks.Level(); l.Required != 3 {
		t.Errorf("watermark %d", l.Required)
	}
	leader.disk.sync(6)
	receive(t, p.Consumer())
}

// TestUnaryAppendIsGated: the same for requests outside of a pipeline.
func TestUnaryAppendIsGated(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	leader.disk.append(3)
	done := make(chan error, 1)
	var resp hraft.AppendEntriesResponse
	go func() {
		done <- leader.AppendEntries(follower.id, follower.LocalAddr(), leader.request(5, 0, 3), &resp)
	}()
	follower.accept(t)
	receive(t, follower.disk.waiting)
	none(t, done, "answered before the follower's sync")
	follower.disk.sync(3)
	receive(t, leader.disk.waiting)
	none(t, done, "delivered before the leader's sync")
	leader.disk.sync(3)
	if err := receive(t, done); err != nil || !resp.Success {
		t.Errorf("%+v, %v", resp, err)
	}
}

// TestGateCanBeSwitchedOff: the negative controls do what they are for.
func TestGateCanBeSwitchedOff(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	follower.faults.openFollowerGate, leader.faults.openLeaderGate = true, true
	leader.disk.append(3)
	p := leader.open(t, follower)
	push(t, p, leader.request(5, 0, 3))
	follower.accept(t)
	if f := receive(t, p.Consumer()); !f.Response().Success {
		t.Errorf("%+v", f.Response())
	}
}

// TestRejectionsAreNotGated: they promise nothing, end the pipeline, and are the last thing it delivers.
func TestRejectionEndsThePipeline(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	leader.disk.append(9)
	p := leader.open(t, follower)
	push(t, p, leader.request(5, 3, 6))
	after := push(t, p, leader.request(5, 6, 9))
	rpc, _ := follower.take(t)
	rpc.Respond(&hraft.AppendEntriesResponse{Term: 5, LastLog: 1}, nil)
	rpc, _ = follower.take(t)
	rpc.Respond(&hraft.AppendEntriesResponse{Term: 5, LastLog: 1}, nil)
	if f := receive(t, p.Consumer()); f.Response().Success || f.Response().LastLog != 1 {
		t.Errorf("%+v", f.Response())
	}
	if err := after.Error(); err == nil {
		t.Error("the request behind a rejected one succeeded")
	}
	if _, err := p.AppendEntries(leader.request(5, 9, 9), new(hraft.AppendEntriesResponse)); !errors.Is(err, ErrPipelineAborted) {
		t.Errorf("got %v", err)
	}
	none(t, p.Consumer(), "a second answer")
}

// TestPipelineKeepsOrder sends many requests over connections that break, with a follower that answers each once.
func TestPipelineKeepsOrder(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	const count = 400
	leader.disk.sync(count)
	follower.disk.sync(count)
	stop := make(chan struct{})
	played := make(chan struct{})
	go func() {
		defer close(played)
		for {
			select {
			case rpc := <-follower.Consumer():
				rpc.Respond(&hraft.AppendEntriesResponse{Term: 5, Success: true}, nil)
			case <-stop:
				return
			}
		}
	}()
	p := leader.open(t, follower)
	sent := make(chan error, 1)
	go func() {
		for i := uint64(0); i < count; i++ {
			if i%100 == 50 {
				leader.net.set(true)
				leader.net.set(false)
			}
			if _, err := p.AppendEntries(leader.request(5, i, i+1), new(hraft.AppendEntriesResponse)); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	for i := uint64(1); i <= count; i++ {
		f := receive(t, p.Consumer())
		if covers(f.Request()) != i || !f.Response().Success {
			t.Fatalf("answer to %d instead of %d", covers(f.Request()), i)
		}
	}
	if err := receive(t, sent); err != nil {
		t.Error(err)
	}
	close(stop)
	<-played
}

// TestRequestsAreRepeatedOnTheNextConnection: what was under way when a connection broke arrives again, in order, and
// raft does not notice.
func TestRequestsAreRepeatedOnTheNextConnection(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	leader.disk.sync(100)
	p := leader.open(t, follower)
	push(t, p, leader.request(5, 0, 3))
	push(t, p, leader.request(5, 3, 6))
	follower.take(t)
	follower.take(t) // taken, never answered
	leader.net.set(true)
	push(t, p, leader.request(5, 6, 9)) // while there is no connection
	leader.net.set(false)
	follower.disk.sync(100)
	for i, want := range []uint64{3, 6, 9} {
		if a := follower.accept(t); covers(a) != want {
			t.Errorf("request %d is about %d", i, covers(a))
		}
	}
	for range 3 {
		receive(t, p.Consumer())
	}
	if m := leader.marks.Match(follower.id); m != 9 {
		t.Errorf("watermark %d", m)
	}
}

// TestAppendWaitsForAnUnreachableNode: until it is back, the term has passed, or the transport closes.
func TestAppendWaitsForAnUnreachableNode(t *testing.T) {
	for name, end := range map[string]func(leader, follower *member){
		"back":            func(leader, _ *member) { leader.net.set(false) },
		"new term":        func(leader, _ *member) { leader.ObserveTerm(6) },
		"leadership lost": func(leader, _ *member) { leader.LeadershipLost(5) },
		"closed":          func(leader, _ *member) { _ = leader.Transport.Close() },
		"removed":         func(leader, _ *member) { leader.mesh.SetPeers(nil) },
	} {
		t.Run(name, func(t *testing.T) {
			ms := members(t, 2)
			leader, follower := ms[0], ms[1]
			leader.disk.sync(9)
			follower.disk.sync(9)
			leader.net.set(true)
			unary := make(chan error, 1)
			var resp hraft.AppendEntriesResponse
			go func() {
				unary <- leader.AppendEntries(follower.id, follower.LocalAddr(), leader.request(5, 0, 3), &resp)
			}()
			p := leader.open(t, follower)
			piped := push(t, p, leader.request(5, 3, 6))
			none(t, unary, "an append to nobody ended")
			end(leader, follower)
			if name == "back" {
				follower.accept(t)
				follower.accept(t)
				if err := receive(t, unary); err != nil || !resp.Success {
					t.Errorf("%+v, %v", resp, err)
				}
				receive(t, p.Consumer())
				return
			}
			if err := receive(t, unary); err == nil {
				t.Error("succeeded")
			}
			if err := piped.Error(); err == nil {
				t.Error("succeeded in the pipeline")
			}
			none(t, p.Consumer(), "raft was told something")
		})
	}
}

// TestOldTermsSendNothing: a request of a term that has passed is not sent at all.
func TestOldTermsSendNothing(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	leader.ObserveTerm(6)
	var resp hraft.AppendEntriesResponse
	if err := leader.AppendEntries(follower.id, "", leader.request(5, 0, 3), &resp); !errors.Is(err, ErrTermPassed) {
		t.Errorf("got %v", err)
	}
	p := leader.open(t, follower)
	if _, err := p.AppendEntries(leader.request(5, 0, 3), &resp); !errors.Is(err, ErrTermPassed) {
		t.Errorf("got %v", err)
	}
	if _, err := leader.AppendEntriesPipeline("n9.zz", ""); err == nil {
		t.Error("a pipeline to a stranger")
	}
}

// TestWindowIsBounded: a sender that is not answered is held back, and let go when the pipeline ends.
func TestWindowIsBounded(t *testing.T) {
	for name, bound := range map[string]func(*Options){
		"count": func(o *Options) { o.InFlightMax = 2 },
		"bytes": func(o *Options) { o.InFlightBytesMax = 150 },
	} {
		t.Run(name, func(t *testing.T) {
			ms := members(t, 2, bound)
			leader, follower := ms[0], ms[1]
			leader.disk.sync(9)
			follower.disk.sync(9)
			p := leader.open(t, follower)
			push(t, p, leader.request(5, 0, 1))
			push(t, p, leader.request(5, 1, 2))
			third := make(chan error, 1)
			go func() {
				_, err := p.AppendEntries(leader.request(5, 2, 3), new(hraft.AppendEntriesResponse))
				third <- err
			}()
			follower.take(t)
			follower.take(t)
			none(t, third, "three requests in flight")
			_ = p.Close()
			if err := receive(t, third); err == nil {
				t.Error("sent after the end")
			}
		})
	}
}

// TestClampAndSlowRaft: the follower's transport lowers the commit index, and answers busy when raft does not consume.
func TestClampOnTheWay(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	leader.disk.sync(9)
	p := leader.open(t, follower)
	a := leader.request(5, 4, 6)
	a.LeaderCommitIndex = 99
	push(t, p, a)
	if _, got := follower.take(t); got.LeaderCommitIndex != 6 {
		t.Errorf("commit index %d reached raft", got.LeaderCommitIndex)
	}
}

// TestBusyRaftBlocksNobody: what raft does not take is answered, so that the connection serves the other shards.
func TestBusyRaftBlocksNobody(t *testing.T) {
	ms := members(t, 2, func(o *Options) { o.InFlightMax = 2 * inboxMax })
	leader, follower := ms[0], ms[1]
	other := New(Options{Mesh: follower.mesh, Shard: 4, Log: follower.disk, WAL: follower.disk})
	defer func() { _ = other.Close() }()
	from := New(Options{Mesh: leader.mesh, Shard: 4, Log: leader.disk, WAL: leader.disk})
	defer func() { _ = from.Close() }()
	leader.disk.sync(1 << 20)
	follower.disk.sync(1 << 20)
	p := leader.open(t, follower)
	var err error
	for i := uint64(0); err == nil && i < 4*inboxMax; i++ {
		_, err = p.AppendEntries(leader.request(5, i, i+1), new(hraft.AppendEntriesResponse))
	}
	if !errors.Is(err, ErrPipelineAborted) {
		t.Errorf("raft took nothing and the pipeline says %v", err)
	}
	go func() {
		rpc := <-other.Consumer()
		rpc.Respond(&hraft.AppendEntriesResponse{Term: 5, Success: true}, nil)
	}()
	var resp hraft.AppendEntriesResponse
	if err := from.AppendEntries(follower.id, "", leader.request(5, 0, 1), &resp); err != nil || !resp.Success {
		t.Errorf("the other shard: %+v, %v", resp, err)
	}
}

// TestHeartbeats: they pass beside everything else, count for reads and not for the watermark.
func TestHeartbeats(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	beat := &hraft.AppendEntriesRequest{RPCHeader: leader.header(), Term: 5}
	var resp hraft.AppendEntriesResponse
	if err := leader.AppendEntries(follower.id, "", beat, &resp); err == nil {
		t.Error("answered without raft")
	}
	follower.SetHeartbeatHandler(func(rpc hraft.RPC) {
		a := rpc.Command.(*hraft.AppendEntriesRequest)
		if string(a.ID) != string(leader.id) || follower.DecodePeer(a.Addr) != leader.LocalAddr() || !isHeartbeat(a) {
			t.Errorf("got %+v", a)
		}
		rpc.Respond(&hraft.AppendEntriesResponse{Term: a.Term, LastLog: 77, Success: true}, nil)
	})
	// The follower's disk and raft are stuck; its heartbeats are not.
	follower.disk.append(9)
	follower.disk.stall(time.Hour)
	before := time.Now()
	if err := leader.AppendEntries(follower.id, "", beat, &resp); err != nil || !resp.Success || resp.Term != 5 {
		t.Errorf("%+v, %v", resp, err)
	}
	if m := leader.marks.Match(follower.id); m != 0 {
		t.Errorf("a heartbeat proved %d", m)
	}
	if term, at := leader.marks.Confirmed(); term != 5 || at.Before(before) {
		t.Errorf("confirmed %s in term %d", at, term)
	}
	none(t, follower.Consumer(), "a heartbeat stood in raft's queue")
	follower.SetHeartbeatHandler(func(hraft.RPC) {}) // raft is stopping
	if err := leader.AppendEntries(follower.id, "", beat, &resp); err == nil {
		t.Error("an answer from a stopped raft")
	}
	follower.SetHeartbeatHandler(func(rpc hraft.RPC) {
		rpc.Respond(&hraft.AppendEntriesResponse{Term: 9}, nil)
	})
	_, was := leader.marks.Confirmed()
	if err := leader.AppendEntries(follower.id, "", beat, &resp); err != nil || resp.Term != 9 || resp.Success {
		t.Errorf("%+v, %v", resp, err)
	}
	if _, at := leader.marks.Confirmed(); !at.Equal(was) {
		t.Error("an answer from a newer term confirmed this one")
	}
}

// TestStalledDisk: a node whose disk does not sync neither leads nor campaigns, and goes on when it does again.
func TestStalledDisk(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	leader.disk.sync(9)
	follower.disk.sync(9)
	follower.SetHeartbeatHandler(func(rpc hraft.RPC) {
		rpc.Respond(&hraft.AppendEntriesResponse{Term: 5, Success: true}, nil)
	})
	p := leader.open(t, follower)
	push(t, p, leader.request(5, 0, 1))
	follower.accept(t)
	receive(t, p.Consumer())

	leader.disk.append(12)
	leader.disk.stall(leader.o.StallMax + 1)
	beat := &hraft.AppendEntriesRequest{RPCHeader: leader.header(), Term: 5}
	var resp hraft.AppendEntriesResponse
	if err := leader.AppendEntries(follower.id, "", beat, &resp); !errors.Is(err, ErrStalled) {
		t.Errorf("heartbeat: %v", err)
	}
	if err := leader.RequestVote(follower.id, "", &hraft.RequestVoteRequest{RPCHeader: leader.header(), Term: 6}, new(hraft.RequestVoteResponse)); !errors.Is(err, ErrStalled) {
		t.Errorf("vote: %v", err)
	}
	if err := leader.RequestPreVote(follower.id, "", &hraft.RequestPreVoteRequest{RPCHeader: leader.header(), Term: 6}, new(hraft.RequestPreVoteResponse)); !errors.Is(err, ErrStalled) {
		t.Errorf("pre-vote: %v", err)
	}
	if err := follower.TimeoutNow(leader.id, "", &hraft.TimeoutNowRequest{RPCHeader: follower.header()}, new(hraft.TimeoutNowResponse)); err == nil {
		t.Error("a stalled node took over")
	}
	results := make(chan error, 2)
	go func() {
		_, err := p.AppendEntries(leader.request(6, 1, 2), new(hraft.AppendEntriesResponse))
		results <- err
	}()
	go func() {
		results <- leader.AppendEntries(follower.id, "", leader.request(6, 1, 2), new(hraft.AppendEntriesResponse))
	}()
	// What would keep the follower from an election is not sent. A later exchange shows that it has had time to arrive.
	go func() {
		rpc := <-leader.Consumer()
		rpc.Respond(&hraft.RequestPreVoteResponse{Term: 6}, nil)
	}()
	if err := follower.RequestPreVote(leader.id, "", &hraft.RequestPreVoteRequest{RPCHeader: follower.header(), Term: 6}, new(hraft.RequestPreVoteResponse)); err != nil {
		t.Error(err)
	}
	none(t, follower.Consumer(), "a stalled leader sent an append")
	none(t, results, "an append ended")
	leader.disk.stall(0)
	leader.disk.sync(12)
	follower.accept(t)
	follower.accept(t)
	for range 2 {
		if err := receive(t, results); err != nil {
			t.Error(err)
		}
	}
}

// TestVotesAndTransfer: the small requests go to raft and back.
func TestVotesAndTransfer(t *testing.T) {
	ms := members(t, 2)
	a, b := ms[0], ms[1]
	go func() {
		for range 3 {
			rpc := <-b.Consumer()
			switch c := rpc.Command.(type) {
			case *hraft.RequestVoteRequest:
				rpc.Respond(&hraft.RequestVoteResponse{Term: c.Term, Granted: c.LeadershipTransfer}, nil)
			case *hraft.RequestPreVoteRequest:
				rpc.Respond(nil, errors.New("unexpected command"))
			case *hraft.TimeoutNowRequest:
				rpc.Respond(&hraft.TimeoutNowResponse{}, nil)
			}
		}
	}()
	var vote hraft.RequestVoteResponse
	if err := a.RequestVote(b.id, "", &hraft.RequestVoteRequest{RPCHeader: a.header(), Term: 8, LeadershipTransfer: true}, &vote); err != nil || !vote.Granted || vote.Term != 8 {
		t.Errorf("%+v, %v", vote, err)
	}
	// Raft counts a pre-vote answered with this text as granted.
	var pre hraft.RequestPreVoteResponse
	if err := a.RequestPreVote(b.id, "", &hraft.RequestPreVoteRequest{RPCHeader: a.header(), Term: 8}, &pre); err == nil || pre.Granted {
		t.Errorf("%+v, %v", pre, err)
	} else if text := err.Error(); text != "pre-vote: n2.bb did not understand it" {
		t.Errorf("got %s", text)
	}
	if err := a.TimeoutNow(b.id, "", &hraft.TimeoutNowRequest{RPCHeader: a.header()}, new(hraft.TimeoutNowResponse)); err != nil {
		t.Error(err)
	}
	if err := a.TimeoutNow("n9.zz", "", &hraft.TimeoutNowRequest{}, new(hraft.TimeoutNowResponse)); err == nil {
		t.Error("a stranger took over")
	}
}

// TestSmallRequestsEndByThemselves: raft cannot give up on them.
func TestSmallRequestsEndByThemselves(t *testing.T) {
	ms := members(t, 2, func(o *Options) { o.CallTimeout = 20 * time.Millisecond })
	a, b := ms[0], ms[1]
	if err := a.TimeoutNow(b.id, "", &hraft.TimeoutNowRequest{RPCHeader: a.header()}, new(hraft.TimeoutNowResponse)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	a.net.set(true)
	if err := a.RequestVote(b.id, "", &hraft.RequestVoteRequest{RPCHeader: a.header(), Term: 8}, new(hraft.RequestVoteResponse)); err == nil {
		t.Error("a vote from nowhere")
	}
}

// TestMisplacedFrames: a request of the wrong kind or form ends the connection it came on.
func TestMisplacedFrames(t *testing.T) {
	ms := members(t, 2)
	a, b := ms[0], ms[1]
	for name, send := range map[string]func() error{
		"append on control": func() error {
			_, _, err := a.call(patient(t), b.id, kindAppend, []byte("x"))
			return err
		},
		"malformed heartbeat": func() error {
			_, _, err := a.call(patient(t), b.id, kindHeartbeat, []byte("x"))
			return err
		},
		"malformed vote": func() error {
			_, _, err := a.call(patient(t), b.id, kindVote, nil)
			return err
		},
	} {
		if err := send(); err == nil {
			t.Errorf("%s was answered", name)
		}
	}
	none(t, b.Consumer(), "raft got garbage")
}

// TestCloseFreesEverything: pipelines, waiting appends, held answers, a snapshot half way; goleak counts the rest.
func TestCloseFreesEverything(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	leader.disk.append(9)
	p := leader.open(t, follower)
	held := push(t, p, leader.request(5, 0, 3))
	follower.accept(t) // held by the follower's gate
	unary := make(chan error, 1)
	go func() {
		unary <- leader.AppendEntries(follower.id, "", leader.request(5, 3, 6), new(hraft.AppendEntriesResponse))
	}()
	follower.take(t) // never answered by raft
	if err := follower.Transport.Close(); err != nil {
		t.Fatal(err)
	}
	if err := leader.Transport.Close(); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, unary); err == nil {
		t.Error("succeeded")
	}
	if err := held.Error(); err == nil {
		t.Error("succeeded in the pipeline")
	}
	if _, err := p.AppendEntries(leader.request(5, 0, 3), new(hraft.AppendEntriesResponse)); err == nil {
		t.Error("a closed pipeline sends")
	}
	if err := leader.AppendEntries(follower.id, "", leader.request(5, 3, 6), new(hraft.AppendEntriesResponse)); !errors.Is(err, hraft.ErrTransportShutdown) {
		t.Errorf("got %v", err)
	}
}

// TestLargeRequestsGoInParts: raft bounds a request by count; what exceeds a frame is sent as several, and raft sees one
// answer: success when all succeeded, else the first rejection.
func TestLargeRequestsGoInParts(t *testing.T) {
	large := func(m *member, prev, through uint64) *hraft.AppendEntriesRequest {
		a := m.request(5, prev, through)
		for _, e := range a.Entries {
			e.Data = make([]byte, 200)
		}
		return a
	}
	t.Run("pipeline", func(t *testing.T) {
		ms := members(t, 2)
		leader, follower := ms[0], ms[1]
		leader.frameLimit = 600
		leader.disk.sync(9)
		p := leader.open(t, follower)
		push(t, p, large(leader, 0, 5))
		push(t, p, large(leader, 5, 6))
		parts := 0
		for last := uint64(0); last < 6; parts++ {
			a := follower.accept(t)
			if a.PrevLogEntry != last {
				t.Errorf("part %d follows %d, want %d", parts, a.PrevLogEntry, last)
			}
			last = covers(a)
			follower.disk.sync(last)
			if last < 5 {
				none(t, p.Consumer(), "an answer to a part")
			}
		}
		if parts < 4 {
			t.Errorf("sent in %d parts", parts)
		}
		for _, want := range []uint64{5, 6} {
			if f := receive(t, p.Consumer()); covers(f.Request()) != want || !f.Response().Success {
				t.Errorf("answer to %d: %+v", covers(f.Request()), f.Response())
			}
		}
	})
	t.Run("rejected in the middle", func(t *testing.T) {
		ms := members(t, 2)
		leader, follower := ms[0], ms[1]
		leader.frameLimit = 600
		leader.disk.sync(9)
		follower.disk.sync(9)
		p := leader.open(t, follower)
		push(t, p, large(leader, 0, 5))
		follower.accept(t)
		rpc, _ := follower.take(t)
		rpc.Respond(&hraft.AppendEntriesResponse{Term: 5, LastLog: 1}, nil)
		if f := receive(t, p.Consumer()); f.Response().Success || covers(f.Request()) != 5 {
			t.Errorf("answer to %d: %+v", covers(f.Request()), f.Response())
		}
	})
	t.Run("unary", func(t *testing.T) {
		ms := members(t, 2)
		leader, follower := ms[0], ms[1]
		leader.frameLimit = 600
		leader.disk.sync(9)
		follower.disk.sync(9)
		done := make(chan error, 1)
		var resp hraft.AppendEntriesResponse
		go func() { done <- leader.AppendEntries(follower.id, "", large(leader, 0, 5), &resp) }()
		for last := uint64(0); last < 5; {
			none(t, done, "answered in the middle")
			last = covers(follower.accept(t))
		}
		if err := receive(t, done); err != nil || !resp.Success {
			t.Errorf("%+v, %v", resp, err)
		}
		if m := leader.marks.Match(follower.id); m != 5 {
			t.Errorf("watermark %d", m)
		}
	})
}

// TestStalledLeaderRepeatsNothing: a connection that comes back while the disk is stalled is not used for appends.
func TestStalledLeaderRepeatsNothing(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	leader.disk.sync(9)
	follower.disk.sync(9)
	p := leader.open(t, follower)
	push(t, p, leader.request(5, 0, 1))
	follower.take(t) // never answered
	leader.disk.stall(leader.o.StallMax + 1)
	leader.net.set(true)
	leader.net.set(false)
	link, err := leader.mesh.Link(peer.ID(follower.id), peer.Data)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := link.Conn(patient(t)); err != nil {
		t.Fatal(err)
	}
	// The pipeline has had the time to send: its own look at the connection came before these requests'.
	for range 20 {
		go func() {
			rpc := <-leader.Consumer()
			rpc.Respond(&hraft.RequestPreVoteResponse{Term: 6}, nil)
		}()
		if err := follower.RequestPreVote(leader.id, "", &hraft.RequestPreVoteRequest{RPCHeader: follower.header(), Term: 6}, new(hraft.RequestPreVoteResponse)); err != nil {
			t.Fatal(err)
		}
	}
	none(t, follower.Consumer(), "a stalled leader sent an append")
	leader.disk.stall(0)
	follower.accept(t)
	receive(t, p.Consumer())
}
