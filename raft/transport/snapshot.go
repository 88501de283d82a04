package transport

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/raft/peer"
)

// snapshotPart is how much of a snapshot one frame carries, snapshotRoom how many bytes may wait to be written before
// the sender waits, snapshotBuffers how many buffers it uses in turn: by the time one is used again, the frame that
// it was used for has been written.
const (
	snapshotPart    = 256 << 10
	snapshotRoom    = 2 * snapshotPart
	snapshotBuffers = 6
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)

	errSuperseded = errors.New("transport: a leader of a newer term has taken over")
	errSnapshot   = errors.New("transport: snapshot arrived damaged")
)

// InstallSnapshot implements hraft.Transport. The snapshot travels on a connection of its own, in frames of 256 KiB with
// a checksum each and one over all of them. It waits until the follower can be reached; once begun, a failure is
// raft's to repeat.
func (t *Transport) InstallSnapshot(id hraft.ServerID, _ hraft.ServerAddress, args *hraft.InstallSnapshotRequest, resp *hraft.InstallSnapshotResponse, data io.Reader) error {
	n, err := t.enter(args.Term)
	if err != nil {
		return err
	}
	defer t.leave(n)
	if len(args.Configuration) > configurationMax {
		return fmt.Errorf("snapshot's configuration has %d bytes of at most %d", len(args.Configuration), configurationMax)
	}
	t.marks.Lead(args.Term)
	gate := t.o.Log.Position(args.LastLogIndex)
	link, err := t.o.Mesh.Link(peer.ID(id), peer.Control)
	if err != nil {
		return err
	}
	if _, err := link.Conn(n.ctx); err != nil {
		return err
	}
	conn, err := t.o.Mesh.Dial(n.ctx, peer.ID(id), peer.Snapshot)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(n.ctx, conn.Close)
	defer stop()

	type answer struct {
		reply []byte
		err   error
	}
	got := make(chan answer, 1)
	number := conn.Begin(kindSnapshotBegin, t.o.Shard, [][]byte{encodeSnapshotBegin(args)},
		func(reply []byte, err error) { got <- answer{reply, err} })
	sent := func() error {
		var buffers [snapshotBuffers][]byte
		size, crc := uint64(0), uint32(0)
		for i := 0; len(got) == 0; i++ {
			b := &buffers[i%snapshotBuffers]
			if *b == nil {
				*b = make([]byte, snapshotPart)
			}
			k, err := io.ReadFull(data, *b)
			if k > 0 {
				size += uint64(k)
				crc = crc32.Update(crc, castagnoli, (*b)[:k])
				if err := conn.Stream(kindSnapshotPart, t.o.Shard, number, [][]byte{(*b)[:k]}, snapshotRoom); err != nil {
					return err
				}
			}
			if err == io.EOF || err == io.ErrUnexpectedEOF {
				return conn.Stream(kindSnapshotEnd, t.o.Shard, number, [][]byte{encodeSnapshotEnd(size, crc)}, snapshotRoom)
			}
			if err != nil {
				return fmt.Errorf("read snapshot: %w", err)
			}
		}
		return nil // answered before everything was sent: it is not wanted
	}()
	var a answer
	if sent != nil {
		// The follower may have said why it does not want it, before or while it hung up.
		conn.Close()
		if a = <-got; a.err != nil {
			if cause := context.Cause(n.ctx); cause != nil {
				return cause
			}
			return errors.Join(sent, a.err)
		}
	} else {
		a = <-got // ends with the connection, which ends with the tenure
		if a.err != nil {
			if cause := context.Cause(n.ctx); cause != nil {
				return cause
			}
			return a.err
		}
	}
	term, success, err := decodeVerdict(a.reply)
	if err != nil {
		return err
	}
	if success && term == args.Term {
		t.note(id, args.Term, args.LastLogIndex, n.began, &hraft.AppendEntriesResponse{Term: term, Success: true})
	}
	if success {
		if err := t.leaderGate(gate, n.ctx.Done(), func() error { return context.Cause(n.ctx) }); err != nil {
			return err
		}
	}
	*resp = hraft.InstallSnapshotResponse{RPCHeader: hraft.RPCHeader{ID: []byte(id)}, Term: term, Success: success}
	return nil
}

// install is a snapshot being received: what arrives on its connection on one side, raft's reader on the other. At
// most one part waits between them, so that a slow disk holds the sender back through the connection.
type install struct {
	session *peer.Session
	number  uint64
	term    uint64

	mu struct {
		sync.Mutex
		cond *sync.Cond
		part []byte
		size uint64
		crc  uint32
		err  error // io.EOF once everything arrived whole
	}
}

// Read implements io.Reader for raft. It returns io.EOF only after the checksum over everything was right.
func (s *install) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.mu.part) == 0 && s.mu.err == nil {
		s.mu.cond.Wait()
	}
	if len(s.mu.part) == 0 {
		return 0, s.mu.err
	}
	n := copy(p, s.mu.part)
	s.mu.part = s.mu.part[n:]
	if len(s.mu.part) == 0 {
		s.mu.cond.Broadcast()
	}
	return n, nil
}

// put adds a part, waiting until the one before has been read. It reports false when nobody reads any more.
func (s *install) put(part []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.size += uint64(len(part))
	s.mu.crc = crc32.Update(s.mu.crc, castagnoli, part)
	for len(s.mu.part) > 0 && s.mu.err == nil {
		s.mu.cond.Wait()
	}
	if s.mu.err != nil {
		return false
	}
	s.mu.part = part
	s.mu.cond.Broadcast()
	return true
}

// finish ends the stream: with io.EOF if it arrived whole.
func (s *install) finish(size uint64, crc uint32) {
	s.mu.Lock()
	whole := size == s.mu.size && crc == s.mu.crc
	s.mu.Unlock()
	if whole {
		s.fail(io.EOF)
	} else {
		s.fail(errSnapshot)
	}
}

// fail ends the stream. What has been put can still be read before io.EOF; any other end drops it.
func (s *install) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.err != nil {
		return
	}
	s.mu.err = err
	if !errors.Is(err, io.EOF) {
		s.mu.part = nil
	}
	s.mu.cond.Broadcast()
}

// supersede ends the reception of a snapshot of an older term: raft's main goroutine is reading it, and would not see
// the new leader's request before the old leader's connection is given up.
func (t *Transport) supersede(term uint64) {
	t.mu.Lock()
	s := t.mu.install
	t.mu.Unlock()
	if s != nil && s.term < term {
		s.fail(errSuperseded)
	}
}

// takeSnapshot takes one frame of a snapshot. It runs on the snapshot's own connection and may block.
func (t *Transport) takeSnapshot(r *peer.Request) error {
	if r.Kind == kindSnapshotBegin {
		return t.beginInstall(r)
	}
	t.mu.Lock()
	s := t.mu.install
	t.mu.Unlock()
	if s == nil || s.session != r.Session || s.number != r.Number {
		// It ended here; the sender learns so from the answer or the end of the connection.
		return nil
	}
	switch r.Kind {
	case kindSnapshotPart:
		if len(r.Body) > 0 {
			s.put(r.Body)
		}
		return nil
	case kindSnapshotEnd:
		size, crc, err := decodeSnapshotEnd(r.Body)
		if err != nil {
			return err
		}
		s.finish(size, crc)
		return nil
	default:
		return fmt.Errorf("kind %d on a snapshot connection", r.Kind)
	}
}

// beginInstall hands a snapshot to raft and answers when raft has installed it and the disk holds what the answer
// claims (decision 3c).
func (t *Transport) beginInstall(r *peer.Request) error {
	req, err := decodeSnapshotBegin(r.Session.Remote().ID, r.Body)
	if err != nil {
		return err
	}
	s := &install{session: r.Session, number: r.Number, term: req.Term}
	s.mu.cond = sync.NewCond(&s.mu)
	t.mu.Lock()
	old := t.mu.install
	if old != nil && old.term > req.Term {
		t.mu.Unlock()
		r.Fail(peer.CodeBusy, "a snapshot of a newer term is being installed")
		return nil
	}
	t.mu.install = s
	t.mu.Unlock()
	if old != nil {
		old.fail(errSuperseded)
	}
	end := func() {
		t.mu.Lock()
		if t.mu.install == s {
			t.mu.install = nil
		}
		t.mu.Unlock()
	}
	stop := context.AfterFunc(r.Session.Context(), func() { s.fail(io.ErrUnexpectedEOF) })
	answer := make(chan hraft.RPCResponse, 1)
	if !t.handOver(hraft.RPC{Command: req, Reader: s, RespChan: answer}) {
		stop()
		end()
		r.Fail(peer.CodeBusy, "raft has too many requests")
		return nil
	}
	return t.spawn(func() {
		defer stop()
		defer end()
		var a hraft.RPCResponse
		select {
		case a = <-answer:
		case <-t.ctx.Done():
			s.fail(hraft.ErrTransportShutdown)
			return
		}
		s.fail(errSuperseded) // raft reads no further; a part that waits must not hold the connection
		resp, ok := a.Response.(*hraft.InstallSnapshotResponse)
		switch {
		case a.Error != nil:
			r.Fail(peer.CodeFailed, a.Error.Error())
		case !ok:
			r.Fail(peer.CodeFailed, "raft gave no answer")
		default:
			if resp.Success && !t.faults.openInstallGate {
				// The removal of the old log stands behind the snapshot in the stream: all of it must hold.
				ctx, cancel := context.WithCancel(r.Session.Context())
				defer cancel()
				defer context.AfterFunc(t.ctx, cancel)()
				if err := t.followerGate(ctx, t.o.WAL.Written()); err != nil {
					r.Session.Close(err)
					return
				}
			}
			r.Reply(encodeVerdict(resp.Term, resp.Success))
		}
	})
}
