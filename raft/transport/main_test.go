package transport

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	hraft "github.com/hashicorp/raft"
	"go.uber.org/goleak"

	"tercet.dev/tercet/raft/peer"
	"tercet.dev/tercet/wal"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for something that must happen before it gives up. Nothing is measured by it.
const patience = 2 * time.Minute

func patient(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// receive takes a value that must come.
func receive[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatal("nothing came")
		panic("unreachable")
	}
}

// none checks that nothing has come. It is only meaningful behind something that came later.
func none[T any](t *testing.T, c <-chan T, what string) {
	t.Helper()
	select {
	case v := <-c:
		t.Fatalf("%s: %v", what, v)
	default:
	}
}

// fakeDisk is the log and the stream of a node under test: index i is durable at position i.
type fakeDisk struct {
	mu      sync.Mutex
	written uint64
	durable uint64
	stalled time.Duration
	changed chan struct{}
	waiting chan uint64 // told of each wait that does not return at once
}

func newFakeDisk() *fakeDisk {
	return &fakeDisk{changed: make(chan struct{}), waiting: make(chan uint64, 1024)}
}

func (d *fakeDisk) set(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
	close(d.changed)
	d.changed = make(chan struct{})
}

// append grows the log to index; sync makes it durable up to index.
func (d *fakeDisk) append(index uint64) { d.set(func() { d.written = max(d.written, index) }) }
func (d *fakeDisk) sync(index uint64) {
	d.set(func() { d.durable, d.written = index, max(d.written, index) })
}
func (d *fakeDisk) stall(age time.Duration) { d.set(func() { d.stalled = age }) }

func (d *fakeDisk) Position(index uint64) wal.LSN {
	d.mu.Lock()
	defer d.mu.Unlock()
	if index <= d.durable {
		return 0
	}
	return wal.LSN(index)
}

func (d *fakeDisk) Durable() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.durable
}

func (d *fakeDisk) Written() wal.LSN {
	d.mu.Lock()
	defer d.mu.Unlock()
	return wal.LSN(d.written)
}

func (d *fakeDisk) Unsynced() (int64, time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return int64(d.written - d.durable), d.stalled
}

var errCanceled = errors.New("canceled")

func (d *fakeDisk) WaitDurable(lsn wal.LSN, cancel <-chan struct{}) error {
	told := false
	for {
		d.mu.Lock()
		durable, changed := d.durable, d.changed
		d.mu.Unlock()
		if wal.LSN(durable) >= lsn {
			return nil
		}
		if !told {
			told = true
			d.waiting <- uint64(lsn)
		}
		select {
		case <-changed:
		case <-cancel:
			return errCanceled
		}
	}
}

// member is one node under test: mesh, transport, disk; raft is played by the test.
type member struct {
	*Transport
	id   hraft.ServerID
	mesh *peer.Mesh
	disk *fakeDisk
	net  *faultyNet
}

// faultyNet is the dialling side of a node's network, which a test can cut.
type faultyNet struct {
	mu    sync.Mutex
	cut   bool
	conns []net.Conn
}

func (n *faultyNet) dial(ctx context.Context, address string) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cut {
		return nil, errors.New("cut for the test")
	}
	var d net.Dialer
	nc, err := d.DialContext(ctx, "tcp", address)
	if err == nil {
		n.conns = append(n.conns, nc)
	}
	return nc, err
}

// set cuts the network, ending what stands, or restores it.
func (n *faultyNet) set(cut bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = cut
	if cut {
		for _, nc := range n.conns {
			_ = nc.Close()
		}
		n.conns = nil
	}
}

// members starts nodes that know each other; change may alter their options.
func members(t testing.TB, count int, change ...func(*Options)) []*member {
	t.Helper()
	all := make([]*member, count)
	peers := make(map[peer.ID]string)
	var config hraft.Configuration
	for i := range all {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		id := peer.ID([]string{"n1.aa", "n2.bb", "n3.cc", "n4.dd"}[i])
		m := &member{id: hraft.ServerID(id), disk: newFakeDisk(), net: &faultyNet{}}
		m.mesh = peer.New(peer.Options{ID: id, Zone: id.Name(), Cluster: "c1", Listener: l, Dial: m.net.dial,
			RedialMin: time.Millisecond, RedialMax: 10 * time.Millisecond, Logger: testLogger(string(id))})
		o := Options{Mesh: m.mesh, Shard: 3, Address: hraft.ServerAddress(l.Addr().String()), Log: m.disk, WAL: m.disk,
			CallTimeout: patience}
		for _, c := range change {
			c(&o)
		}
		m.Transport = New(o)
		all[i] = m
		peers[id] = l.Addr().String()
		config.Servers = append(config.Servers, hraft.Server{Suffrage: hraft.Voter, ID: m.id, Address: o.Address})
		t.Cleanup(func() {
			if err := m.Transport.Close(); err != nil {
				t.Error(err)
			}
			if err := m.mesh.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	for _, m := range all {
		m.mesh.Start()
		m.mesh.SetPeers(peers)
		m.SetConfiguration(1, config)
		m.marks.SetRequired(all[0].id)
	}
	return all
}

// request makes an append of entries from..through in a term.
func (m *member) request(term, prev uint64, through uint64) *hraft.AppendEntriesRequest {
	a := &hraft.AppendEntriesRequest{RPCHeader: m.header(), Term: term, PrevLogEntry: prev, PrevLogTerm: min(prev, term),
		LeaderCommitIndex: 1}
	for i := prev + 1; i <= through; i++ {
		a.Entries = append(a.Entries, &hraft.Log{Index: i, Term: term, Type: hraft.LogCommand, Data: []byte{byte(i)}})
	}
	return a
}

func (m *member) header() hraft.RPCHeader {
	return hraft.RPCHeader{ProtocolVersion: 3, ID: []byte(m.id), Addr: m.EncodePeer(m.id, m.LocalAddr())}
}

// take returns the next append raft would get.
func (m *member) take(t *testing.T) (hraft.RPC, *hraft.AppendEntriesRequest) {
	t.Helper()
	rpc := receive(t, m.Consumer())
	a, ok := rpc.Command.(*hraft.AppendEntriesRequest)
	if !ok {
		t.Fatalf("got %T", rpc.Command)
	}
	return rpc, a
}

// accept plays a follower that has appended what it got.
func (m *member) accept(t *testing.T) *hraft.AppendEntriesRequest {
	t.Helper()
	rpc, a := m.take(t)
	m.disk.append(covers(a))
	rpc.Respond(&hraft.AppendEntriesResponse{Term: a.Term, Success: true}, nil)
	return a
}
