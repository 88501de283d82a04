package transport

import (
	"bytes"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/raft/peer"
)

const sender = peer.ID("n1.aa")

func someHeader() hraft.RPCHeader {
	return hraft.RPCHeader{ProtocolVersion: 3, ID: []byte(sender), Addr: encodeAddress("n1.aa", "127.0.0.1:7400")}
}

// someAppend makes a random valid append.
func someAppend(rng *rand.Rand) *hraft.AppendEntriesRequest {
	a := &hraft.AppendEntriesRequest{RPCHeader: someHeader(), Term: 1 + rng.Uint64N(1<<40), PrevLogEntry: rng.Uint64N(1 << 40),
		PrevLogTerm: rng.Uint64N(10), LeaderCommitIndex: rng.Uint64N(1 << 40)}
	for i := range rng.IntN(20) {
		l := &hraft.Log{Index: a.PrevLogEntry + 1 + uint64(i), Term: 1 + rng.Uint64N(a.Term),
			Type: []hraft.LogType{hraft.LogCommand, hraft.LogNoop, hraft.LogBarrier, hraft.LogConfiguration}[rng.IntN(4)]}
		switch {
		case l.Type == hraft.LogConfiguration:
			l.Data = hraft.EncodeConfiguration(hraft.Configuration{Servers: []hraft.Server{{ID: "n1.aa", Address: "x:1"}}})
		case rng.IntN(3) > 0:
			l.Data = make([]byte, 1+rng.IntN(300))
			for j := range l.Data {
				l.Data[j] = byte(rng.Uint32())
			}
		}
		if rng.IntN(4) == 0 {
			l.Extensions = []byte("extension")
		}
		if rng.IntN(4) > 0 {
			l.AppendedAt = time.Unix(0, rng.Int64N(1<<60)+1)
		}
		a.Entries = append(a.Entries, l)
	}
	return a
}

func TestAppendRoundTrip(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 500 {
		a := someAppend(rng)
		parts, err := encodeAppend(a, peer.BodyMax)
		if err != nil || len(parts) != 1 {
			t.Fatalf("seed %d: %d parts, %v", seed, len(parts), err)
		}
		body := bytes.Join(parts[0].body, nil)
		if len(body) > parts[0].bytes {
			t.Fatalf("seed %d: %d bytes, estimated at %d", seed, len(body), parts[0].bytes)
		}
		got, err := decodeAppend(sender, body)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if !reflect.DeepEqual(got, a) {
			t.Fatalf("seed %d: got %+v, want %+v", seed, got, a)
		}
		if parts[0].last != covers(a) {
			t.Fatalf("seed %d: covers %d, want %d", seed, parts[0].last, covers(a))
		}
	}
}

// TestAppendIsCutIntoFrames: raft bounds a request by count only. What exceeds a frame becomes several requests, each
// valid by itself, which together are the original.
func TestAppendIsCutIntoFrames(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	const limit = 1000
	cut := 0
	for range 500 {
		a := someAppend(rng)
		parts, err := encodeAppend(a, limit)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		var entries []*hraft.Log
		prev, prevTerm := a.PrevLogEntry, a.PrevLogTerm
		for _, p := range parts {
			body := bytes.Join(p.body, nil)
			got, err := decodeAppend(sender, body)
			if err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if len(body) > limit || got.PrevLogEntry != prev || got.PrevLogTerm != prevTerm || got.Term != a.Term ||
				got.LeaderCommitIndex != a.LeaderCommitIndex || covers(got) != p.last {
				t.Fatalf("seed %d: part %+v", seed, got)
			}
			if n := len(got.Entries); n > 0 {
				prev, prevTerm = got.Entries[n-1].Index, got.Entries[n-1].Term
			}
			entries = append(entries, got.Entries...)
		}
		if !reflect.DeepEqual(entries, a.Entries) {
			t.Fatalf("seed %d: entries differ", seed)
		}
		if len(parts) > 1 {
			cut++
		}
	}
	if cut == 0 {
		t.Error("no request was cut")
	}
	big := &hraft.AppendEntriesRequest{RPCHeader: someHeader(), Term: 1, Entries: []*hraft.Log{{Index: 1, Term: 1, Data: make([]byte, limit)}}}
	if _, err := encodeAppend(big, limit); err == nil {
		t.Error("an entry larger than a frame was accepted")
	}
	gap := &hraft.AppendEntriesRequest{RPCHeader: someHeader(), Term: 1, Entries: []*hraft.Log{{Index: 2, Term: 1}}}
	if _, err := encodeAppend(gap, limit); err == nil {
		t.Error("entries that do not follow were accepted")
	}
}

// TestPayloadsAreTheFramesOwn: raft, the log and the state machine keep what they are given.
func TestPayloadsAreTheFramesOwn(t *testing.T) {
	a := &hraft.AppendEntriesRequest{RPCHeader: someHeader(), Term: 1, Entries: []*hraft.Log{
		{Index: 1, Term: 1, Data: []byte("first")}, {Index: 2, Term: 1, Data: []byte("second")}}}
	parts, err := encodeAppend(a, peer.BodyMax)
	if err != nil {
		t.Fatal(err)
	}
	if &parts[0].body[1][0] != &a.Entries[0].Data[0] {
		t.Error("a payload was copied on the way out")
	}
	body := bytes.Join(parts[0].body, nil)
	got, err := decodeAppend(sender, body)
	if err != nil {
		t.Fatal(err)
	}
	_ = append(got.Entries[0].Data, "overwrites"...)
	if string(got.Entries[1].Data) != "second" {
		t.Error("appending to one payload changed the next")
	}
}

func TestSmallMessagesRoundTrip(t *testing.T) {
	hb := &hraft.AppendEntriesRequest{RPCHeader: someHeader(), Term: 7}
	if got, err := decodeHeartbeat(sender, encodeHeartbeat(hb)); err != nil || !reflect.DeepEqual(got, hb) || !isHeartbeat(got) {
		t.Errorf("heartbeat: %+v, %v", got, err)
	}
	for _, v := range []*hraft.RequestVoteRequest{
		{RPCHeader: someHeader(), Term: 7, LastLogIndex: 8, LastLogTerm: 6},
		{RPCHeader: someHeader(), Term: 7, LastLogIndex: 8, LastLogTerm: 6, LeadershipTransfer: true},
	} {
		if got, err := decodeVote(sender, encodeVote(v)); err != nil || !reflect.DeepEqual(got, v) {
			t.Errorf("vote: %+v, %v", got, err)
		}
	}
	pv := &hraft.RequestPreVoteRequest{RPCHeader: someHeader(), Term: 7, LastLogIndex: 8, LastLogTerm: 6}
	if got, err := decodePreVote(sender, encodePreVote(pv)); err != nil || !reflect.DeepEqual(got, pv) {
		t.Errorf("pre-vote: %+v, %v", got, err)
	}
	tn := &hraft.TimeoutNowRequest{RPCHeader: someHeader()}
	if got, err := decodeTimeoutNow(sender, encodeTimeoutNow(tn)); err != nil || !reflect.DeepEqual(got, tn) {
		t.Errorf("timeout now: %+v, %v", got, err)
	}
	is := &hraft.InstallSnapshotRequest{RPCHeader: someHeader(), SnapshotVersion: 1, Term: 7, LastLogIndex: 9, LastLogTerm: 5,
		Configuration: hraft.EncodeConfiguration(hraft.Configuration{}), ConfigurationIndex: 3, Size: 1 << 40}
	if got, err := decodeSnapshotBegin(sender, encodeSnapshotBegin(is)); err != nil || !reflect.DeepEqual(got, is) {
		t.Errorf("snapshot: %+v, %v", got, err)
	}
	for _, r := range []*hraft.AppendEntriesResponse{{Term: 7, LastLog: 8}, {Term: 7, LastLog: 8, Success: true}, {NoRetryBackoff: true}} {
		got, err := decodeAppendResponse(sender, encodeAppendResponse(r))
		r.ID = []byte(sender)
		if err != nil || !reflect.DeepEqual(&got, r) {
			t.Errorf("append response: %+v, %v", got, err)
		}
	}
	if term, yes, err := decodeVerdict(encodeVerdict(7, true)); term != 7 || !yes || err != nil {
		t.Errorf("verdict: %d, %t, %v", term, yes, err)
	}
	if size, crc, err := decodeSnapshotEnd(encodeSnapshotEnd(1<<40, 77)); size != 1<<40 || crc != 77 || err != nil {
		t.Errorf("snapshot end: %d, %d, %v", size, crc, err)
	}
}

// TestMalformedMessages: what raft would panic on, or act on wrongly, does not reach it.
func TestMalformedMessages(t *testing.T) {
	good := &hraft.AppendEntriesRequest{RPCHeader: someHeader(), Term: 5, PrevLogEntry: 1, Entries: []*hraft.Log{{Index: 2, Term: 5, Data: []byte("x")}}}
	for name, change := range map[string]func(*hraft.AppendEntriesRequest){
		"term 0":                    func(a *hraft.AppendEntriesRequest) { a.Term, a.Entries[0].Term = 0, 0 },
		"unknown entry type":        func(a *hraft.AppendEntriesRequest) { a.Entries[0].Type = 77 },
		"entry of a later term":     func(a *hraft.AppendEntriesRequest) { a.Entries[0].Term = 6 },
		"entry without a term":      func(a *hraft.AppendEntriesRequest) { a.Entries[0].Term = 0 },
		"broken configuration":      func(a *hraft.AppendEntriesRequest) { a.Entries[0].Type = hraft.LogConfiguration },
		"index beyond all numbers":  func(a *hraft.AppendEntriesRequest) { a.PrevLogEntry = ^uint64(0); a.Entries[0].Index = 0 },
		"address longer than known": func(a *hraft.AppendEntriesRequest) { a.Addr = make([]byte, addressMax+1) },
	} {
		a := *good
		e := *good.Entries[0]
		a.Entries = []*hraft.Log{&e}
		change(&a)
		parts, err := encodeAppend(&a, peer.BodyMax)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got, err := decodeAppend(sender, bytes.Join(parts[0].body, nil)); err == nil {
			t.Errorf("%s: accepted as %+v", name, got)
		}
	}
	parts, _ := encodeAppend(good, peer.BodyMax)
	body := bytes.Join(parts[0].body, nil)
	for n := range body {
		if got, err := decodeAppend(sender, body[:n]); err == nil {
			t.Errorf("first %d of %d bytes: accepted as %+v", n, len(body), got)
		}
	}
	if _, err := decodeAppend(sender, append(body, 0)); err == nil {
		t.Error("trailing garbage accepted")
	}
}

func TestClampCommit(t *testing.T) {
	for _, tt := range []struct{ prev, entries, commit, want uint64 }{
		{10, 0, 99, 10}, {10, 3, 99, 13}, {10, 3, 12, 12}, {0, 0, 5, 0},
	} {
		a := &hraft.AppendEntriesRequest{PrevLogEntry: tt.prev, LeaderCommitIndex: tt.commit}
		for i := range tt.entries {
			a.Entries = append(a.Entries, &hraft.Log{Index: tt.prev + 1 + i})
		}
		if clampCommit(a); a.LeaderCommitIndex != tt.want {
			t.Errorf("%+v: clamped to %d", tt, a.LeaderCommitIndex)
		}
	}
}

// TestVotesNameTheIncarnation: raft remembers a vote by the candidate's encoded address alone.
func TestVotesNameTheIncarnation(t *testing.T) {
	a, b := encodeAddress("n1.aa", "host:1"), encodeAddress("n1.bb", "host:1")
	if bytes.Equal(a, b) {
		t.Error("two incarnations have one encoded address")
	}
	if decodeAddress(a) != "host:1" || decodeAddress(b) != "host:1" {
		t.Errorf("decoded to %q and %q", decodeAddress(a), decodeAddress(b))
	}
	for _, bad := range [][]byte{nil, {1}, {9, 0, 'x'}} {
		if got := decodeAddress(bad); got != "" {
			t.Errorf("%v decoded to %q", bad, got)
		}
	}
}

func FuzzDecode(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 2))
	for kind := range uint8(9) {
		var body []byte
		switch kind {
		case 0:
			parts, _ := encodeAppend(someAppend(rng), peer.BodyMax)
			body = bytes.Join(parts[0].body, nil)
		case 1:
			body = encodeHeartbeat(&hraft.AppendEntriesRequest{RPCHeader: someHeader(), Term: 7})
		case 2:
			body = encodeVote(&hraft.RequestVoteRequest{RPCHeader: someHeader(), Term: 7, LeadershipTransfer: true})
		case 3:
			body = encodePreVote(&hraft.RequestPreVoteRequest{RPCHeader: someHeader(), Term: 7})
		case 4:
			body = encodeTimeoutNow(&hraft.TimeoutNowRequest{RPCHeader: someHeader()})
		case 5:
			body = encodeSnapshotBegin(&hraft.InstallSnapshotRequest{RPCHeader: someHeader(), SnapshotVersion: 1, Term: 7, Size: 5,
				Configuration: hraft.EncodeConfiguration(hraft.Configuration{})})
		case 6:
			body = encodeAppendResponse(&hraft.AppendEntriesResponse{Term: 7, Success: true})
		case 7:
			body = encodeVerdict(7, true)
		case 8:
			body = encodeSnapshotEnd(7, 8)
		}
		f.Add(kind, body)
	}
	f.Fuzz(func(t *testing.T, kind uint8, body []byte) {
		same := func(again []byte, err error) {
			if err == nil && !bytes.Equal(again, body) {
				t.Fatalf("kind %d: %x decoded and encoded to %x", kind, body, again)
			}
		}
		switch kind % 9 {
		case 0:
			a, err := decodeAppend(sender, body)
			if err != nil {
				return
			}
			parts, err := encodeAppend(a, peer.BodyMax)
			if err != nil {
				t.Fatal(err)
			}
			same(bytes.Join(parts[0].body, nil), nil)
		case 1:
			if a, err := decodeHeartbeat(sender, body); err == nil {
				same(encodeHeartbeat(a), nil)
			}
		case 2:
			a, err := decodeVote(sender, body)
			same(encodeVote(a), err)
		case 3:
			a, err := decodePreVote(sender, body)
			same(encodePreVote(a), err)
		case 4:
			a, err := decodeTimeoutNow(sender, body)
			same(encodeTimeoutNow(a), err)
		case 5:
			if a, err := decodeSnapshotBegin(sender, body); err == nil {
				same(encodeSnapshotBegin(a), nil)
			}
		case 6:
			if r, err := decodeAppendResponse(sender, body); err == nil {
				again, err := decodeAppendResponse(sender, encodeAppendResponse(&r))
				if err != nil || !reflect.DeepEqual(again, r) {
					t.Fatalf("%+v became %+v", r, again)
				}
			}
		case 7:
			term, yes, err := decodeVerdict(body)
			same(encodeVerdict(term, yes), err)
		case 8:
			size, crc, err := decodeSnapshotEnd(body)
			same(encodeSnapshotEnd(size, crc), err)
		}
		decodeAddress(body)
	})
}
