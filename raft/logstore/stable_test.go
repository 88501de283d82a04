package logstore

import (
	"testing"

	hraft "github.com/hashicorp/raft"
)

func (r *rig) number(key string) uint64 {
	r.t.Helper()
	v, err := r.GetUint64([]byte(key))
	if err != nil {
		r.t.Fatal(err)
	}
	return v
}

func (r *rig) bytes(key string) string {
	r.t.Helper()
	v, err := r.Get([]byte(key))
	if err != nil {
		r.t.Fatal(err)
	}
	return string(v)
}

func (r *rig) set(key string, v uint64) {
	r.t.Helper()
	if err := r.SetUint64([]byte(key), v); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) setBytes(key, v string) {
	r.t.Helper()
	if err := r.Set([]byte(key), []byte(v)); err != nil {
		r.t.Fatal(err)
	}
}

// TestStableSurvives: what was stored is there after the power failed, without anybody having waited for it.
func TestStableSurvives(t *testing.T) {
	var terms []uint64
	r := newRig(t, base(3), func(o *Options) { o.OnTerm = func(term uint64) { terms = append(terms, term) } })
	if r.number(raftTerm) != 0 || r.number(raftVoteTerm) != 0 || r.bytes(raftVoteCand) != "" || r.bytes("other") != "" || r.number("count") != 0 {
		t.Error("a new store has values")
	}
	if v, err := r.Get([]byte(raftVoteCand)); v != nil || err != nil {
		t.Errorf("no vote is %v, %v; raft compares with nil", v, err)
	}
	r.set(raftTerm, 7)
	r.set(raftTerm, 7)
	r.set(raftVoteTerm, 7)
	r.setBytes(raftVoteCand, "n1")
	r.setBytes("other", "thing")
	r.set("count", 12)
	r = r.crash(base(3))
	if r.number(raftTerm) != 7 || r.number(raftVoteTerm) != 7 || r.bytes(raftVoteCand) != "n1" || r.bytes("other") != "thing" || r.number("count") != 12 {
		t.Errorf("term %d, vote %d for %q, other %q, count %d", r.number(raftTerm), r.number(raftVoteTerm), r.bytes(raftVoteCand), r.bytes("other"), r.number("count"))
	}
	if len(terms) != 1 || terms[0] != 7 {
		t.Errorf("terms announced: %v", terms)
	}
}

// TestVoteIsOneRecord: the term of a vote does not show before its candidate, neither now nor after a crash.
func TestVoteIsOneRecord(t *testing.T) {
	r := newRig(t, base(3))
	r.set(raftVoteTerm, 3)
	r.setBytes(raftVoteCand, "old")
	written := r.wal.Written()
	r.set(raftVoteTerm, 4)
	if r.number(raftVoteTerm) != 3 || r.bytes(raftVoteCand) != "old" || r.wal.Written() != written {
		t.Errorf("half a vote shows: term %d for %q", r.number(raftVoteTerm), r.bytes(raftVoteCand))
	}
	r = r.crash(base(3))
	if r.number(raftVoteTerm) != 3 || r.bytes(raftVoteCand) != "old" {
		t.Errorf("half a vote was stored: term %d for %q", r.number(raftVoteTerm), r.bytes(raftVoteCand))
	}
	r.set(raftVoteTerm, 5)
	r.setBytes(raftVoteCand, "new")
	r = r.crash(base(3))
	if r.number(raftVoteTerm) != 5 || r.bytes(raftVoteCand) != "new" {
		t.Errorf("the vote is term %d for %q", r.number(raftVoteTerm), r.bytes(raftVoteCand))
	}
}

// TestStaleCandidateIsRefused is decision 4's test, with the real library: a node that crashes between the two calls of
// a vote, is then asked by the candidate of its *previous* vote, whose log is far behind. Raft grants what it takes
// for a repetition without comparing logs.
func TestStaleCandidateIsRefused(t *testing.T) {
	r := newRig(t, func(o *Options) { o.Base = config(3, 0) })
	// A long log of term 4, a vote for n2 in term 4, and half a vote in term 5.
	r.store(configEntry(1, 1, config(3, 0)))
	r.store(entries(4, 2, 100)...)
	r.sync()
	r.set(raftTerm, 4)
	r.set(raftVoteTerm, 4)
	_, any := hraft.NewInmemTransport("")
	candidate := any.EncodePeer("n2.x", "h2:1")
	if err := r.Set([]byte(raftVoteCand), candidate); err != nil {
		t.Fatal(err)
	}
	r.set(raftTerm, 5)
	r.set(raftVoteTerm, 5) // the first of persistVote's two calls
	r = r.crash()

	granted := func(stable hraft.StableStore, term, lastIndex, lastTerm uint64) bool {
		_, trans := hraft.NewInmemTransport("h1:1")
		conf := hraft.DefaultConfig()
		conf.LocalID = "n1.x"
		conf.LogOutput = testWriter{t}
		conf.LogLevel = "ERROR"
		ra, err := hraft.NewRaft(conf, &hraft.MockFSM{}, r.Store, stable, hraft.NewInmemSnapshotStore(), trans)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := ra.Shutdown().Error(); err != nil {
				t.Error(err)
			}
		}()
		_, from := hraft.NewInmemTransport("h2:1")
		from.Connect("h1:1", trans)
		defer func() { _ = from.Close() }()
		req := &hraft.RequestVoteRequest{RPCHeader: hraft.RPCHeader{ProtocolVersion: 3, ID: []byte("n2.x"), Addr: candidate},
			Term: term, LastLogIndex: lastIndex, LastLogTerm: lastTerm}
		var resp hraft.RequestVoteResponse
		if err := from.RequestVote("n1.x", "h1:1", req, &resp); err != nil {
			t.Fatal(err)
		}
		return resp.Granted
	}
	if granted(r.Store, 5, 2, 1) {
		t.Error("the stale candidate won the vote of a node whose log is far ahead")
	}
	if !granted(r.Store, 5, 100, 4) {
		t.Error("a candidate whose log is up to date was refused")
	}
	if r.number(raftVoteTerm) != 5 || r.bytes(raftVoteCand) != string(candidate) {
		t.Errorf("the vote is term %d for %q", r.number(raftVoteTerm), r.bytes(raftVoteCand))
	}

	// The negative control: the same crash in a store of two records.
	two := hraft.NewInmemStore()
	for key, v := range map[string]uint64{raftTerm: 5, raftVoteTerm: 5} {
		if err := two.SetUint64([]byte(key), v); err != nil {
			t.Fatal(err)
		}
	}
	if err := two.Set([]byte(raftVoteCand), candidate); err != nil {
		t.Fatal(err)
	}
	if !granted(two, 5, 2, 1) {
		t.Error("the control does not show what this test is about")
	}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(string(p))
	return len(p), nil
}
