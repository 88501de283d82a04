package transport

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/raft/peer"
)

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func (m *member) snapshot(term uint64, size int) *hraft.InstallSnapshotRequest {
	return &hraft.InstallSnapshotRequest{RPCHeader: m.header(), SnapshotVersion: 1, Term: term, LastLogIndex: 40, LastLogTerm: 4,
		Configuration: hraft.EncodeConfiguration(voters("n1.aa", "n2.bb")), ConfigurationIndex: 2, Size: int64(size)}
}

// takeInstall returns the next snapshot raft would get.
func (m *member) takeInstall(t *testing.T) (hraft.RPC, *hraft.InstallSnapshotRequest) {
	t.Helper()
	rpc := receive(t, m.Consumer())
	a, ok := rpc.Command.(*hraft.InstallSnapshotRequest)
	if !ok {
		t.Fatalf("got %T", rpc.Command)
	}
	return rpc, a
}

// TestInstallSnapshot: what is sent arrives whole, and is answered when the follower's disk has synced.
func TestInstallSnapshot(t *testing.T) {
	for _, size := range []int{0, 1, snapshotPart, 7*snapshotPart + 123} {
		ms := members(t, 2)
		leader, follower := ms[0], ms[1]
		leader.disk.sync(100)
		data := randomBytes(size)
		done := make(chan error, 1)
		var resp hraft.InstallSnapshotResponse
		go func() {
			done <- leader.InstallSnapshot(follower.id, "", leader.snapshot(5, size), &resp, bytes.NewReader(data))
		}()
		rpc, a := follower.takeInstall(t)
		if a.LastLogIndex != 40 || a.LastLogTerm != 4 || a.Size != int64(size) || string(a.ID) != string(leader.id) || a.ConfigurationIndex != 2 {
			t.Errorf("got %+v", a)
		}
		got, err := io.ReadAll(iotest.OneByteReader(io.LimitReader(rpc.Reader, 1000)))
		if err != nil {
			t.Fatal(err)
		}
		rest, err := io.ReadAll(rpc.Reader)
		if err != nil || !bytes.Equal(append(got, rest...), data) {
			t.Errorf("size %d: %d bytes arrived, %v", size, len(got)+len(rest), err)
		}
		follower.disk.append(7) // the reset of the log
		rpc.Respond(&hraft.InstallSnapshotResponse{Term: 5, Success: true}, nil)
		if lsn := receive(t, follower.disk.waiting); lsn != 7 {
			t.Errorf("waits for %d", lsn)
		}
		none(t, done, "answered before the sync")
		follower.disk.sync(7)
		if err := receive(t, done); err != nil || !resp.Success || resp.Term != 5 {
			t.Errorf("size %d: %+v, %v", size, resp, err)
		}
		if m := leader.marks.Match(follower.id); m != 40 {
			t.Errorf("watermark %d", m)
		}
	}
}

// TestInstallSnapshotGateCanBeSwitchedOff is the negative control of decision 3c.
func TestInstallSnapshotGateCanBeSwitchedOff(t *testing.T) {
	ms := members(t, 2)
	leader, follower := ms[0], ms[1]
	follower.faults.openInstallGate = true
	leader.disk.sync(100)
	done := make(chan error, 1)
	var resp hraft.InstallSnapshotResponse
	go func() {
		done <- leader.InstallSnapshot(follower.id, "", leader.snapshot(5, 0), &resp, bytes.NewReader(nil))
	}()
	rpc, _ := follower.takeInstall(t)
	follower.disk.append(7)
	rpc.Respond(&hraft.InstallSnapshotResponse{Term: 5, Success: true}, nil)
	if err := receive(t, done); err != nil || !resp.Success {
		t.Errorf("%+v, %v", resp, err)
	}
}

// TestInstallSnapshotEnds: every way in which a transfer can end early reaches both sides.
func TestInstallSnapshotEnds(t *testing.T) {
	const size = 64 * snapshotPart
	for name, tt := range map[string]struct {
		data io.Reader
		act  func(leader, follower *member, rpc hraft.RPC)
		read bool // the follower's raft sees an error
		sent bool // the leader gets an answer
	}{
		"source fails":    {data: io.MultiReader(bytes.NewReader(randomBytes(3*snapshotPart)), iotest.ErrReader(errors.New("disk"))), read: true},
		"leader deposed":  {act: func(leader, _ *member, _ hraft.RPC) { leader.ObserveTerm(6) }, read: true},
		"connection lost": {act: func(leader, _ *member, _ hraft.RPC) { leader.net.set(true) }, read: true},
		"newer leader":    {act: func(_, follower *member, _ hraft.RPC) { follower.supersede(6) }, read: true},
		"follower closes": {act: func(_, follower *member, _ hraft.RPC) { _ = follower.Transport.Close() }, read: true},
		"not wanted": {act: func(_, _ *member, rpc hraft.RPC) {
			rpc.Respond(&hraft.InstallSnapshotResponse{Term: 9}, nil)
		}, read: true, sent: true},
	} {
		t.Run(name, func(t *testing.T) {
			ms := members(t, 2)
			leader, follower := ms[0], ms[1]
			leader.disk.sync(100)
			data := tt.data
			if data == nil {
				data = bytes.NewReader(randomBytes(size))
			}
			done := make(chan error, 1)
			var resp hraft.InstallSnapshotResponse
			go func() { done <- leader.InstallSnapshot(follower.id, "", leader.snapshot(5, size), &resp, data) }()
			rpc, _ := follower.takeInstall(t)
			if _, err := io.ReadFull(rpc.Reader, make([]byte, snapshotPart)); err != nil {
				t.Fatal(err)
			}
			if tt.act != nil {
				tt.act(leader, follower, rpc)
			}
			if _, err := io.Copy(io.Discard, rpc.Reader); (err != nil) != tt.read {
				t.Errorf("read to the end with %v", err)
			}
			if name != "not wanted" {
				rpc.Respond(&hraft.InstallSnapshotResponse{Term: 5}, errors.New("short read"))
			}
			err := receive(t, done)
			if (err == nil) != tt.sent {
				t.Errorf("sent with %v", err)
			}
			if tt.sent && (resp.Success || resp.Term != 9) {
				t.Errorf("answer %+v", resp)
			}
			if m := leader.marks.Match(follower.id); m != 0 {
				t.Errorf("watermark %d", m)
			}
		})
	}
}

// TestInstallSnapshotDamaged: what does not add up never ends with io.EOF, so that raft discards it.
func TestInstallSnapshotDamaged(t *testing.T) {
	data := []byte("some state")
	for name, end := range map[string][]byte{
		"checksum": encodeSnapshotEnd(uint64(len(data)), 1234),
		"size":     encodeSnapshotEnd(uint64(len(data))-1, 0),
	} {
		t.Run(name, func(t *testing.T) {
			ms := members(t, 2)
			leader, follower := ms[0], ms[1]
			c, err := leader.mesh.Dial(patient(t), peer.ID(follower.id), peer.Snapshot)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			number := c.Begin(kindSnapshotBegin, 3, [][]byte{encodeSnapshotBegin(leader.snapshot(5, len(data)))}, func([]byte, error) {})
			rpc, _ := follower.takeInstall(t)
			for kind, body := range map[peer.Kind][]byte{kindSnapshotPart: data} {
				if err := c.Stream(kind, 3, number, [][]byte{body}, 1<<20); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.Stream(kindSnapshotEnd, 3, number, [][]byte{end}, 1<<20); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadAll(rpc.Reader); !errors.Is(err, errSnapshot) {
				t.Errorf("read to the end with %v", err)
			}
			rpc.Respond(&hraft.InstallSnapshotResponse{Term: 5}, errSnapshot)
		})
	}
}
