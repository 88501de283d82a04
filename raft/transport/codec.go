package transport

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/raft/peer"
)

// The frame kinds of raft's messages. They travel on the wire, so their numbers are fixed.
const (
	kindHeartbeat     = peer.KindUser + 0 // control
	kindAppend        = peer.KindUser + 1 // data
	kindVote          = peer.KindUser + 2 // control
	kindPreVote       = peer.KindUser + 3 // control
	kindTimeoutNow    = peer.KindUser + 4 // control
	kindSnapshotBegin = peer.KindUser + 5 // snapshot; answered when the install is done
	kindSnapshotPart  = peer.KindUser + 6 // snapshot; never answered
	kindSnapshotEnd   = peer.KindUser + 7 // snapshot; never answered

	// KindNode is the first frame kind that this package leaves to others.
	KindNode = peer.KindUser + 16
)

// Bounds that a decoder checks before it allocates. Raft itself takes no more entries a request.
const (
	entriesMax       = 1024
	addressMax       = 1 << 10
	configurationMax = 1 << 20
)

// errMalformed says that a body does not have the form its kind demands.
var errMalformed = errors.New("transport: malformed message")

// decoder reads numbers off a body; after the first failure it only returns zeros and bad is set.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) take(n int) []byte {
	if d.bad || n < 0 || n > len(d.b) {
		d.bad = true
		return nil
	}
	p := d.b[:n:n]
	d.b = d.b[n:]
	return p
}

func (d *decoder) u8() uint8 {
	if p := d.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (d *decoder) u16() uint16 {
	if p := d.take(2); p != nil {
		return binary.LittleEndian.Uint16(p)
	}
	return 0
}

func (d *decoder) u32() uint32 {
	if p := d.take(4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if p := d.take(8); p != nil {
		return binary.LittleEndian.Uint64(p)
	}
	return 0
}

// end reports an error unless everything was read and nothing was missing.
func (d *decoder) end() error {
	if d.bad || len(d.b) != 0 {
		return errMalformed
	}
	return nil
}

// header is the part that every request begins with: the protocol version of raft and the sender's address. The
// sender's identity is not in it: that is the connection's.
func appendHeader(b []byte, h hraft.RPCHeader) []byte {
	b = append(b, byte(h.ProtocolVersion))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(h.Addr)))
	return append(b, h.Addr...)
}

func (d *decoder) header(from peer.ID) hraft.RPCHeader {
	h := hraft.RPCHeader{ProtocolVersion: hraft.ProtocolVersion(d.u8()), ID: []byte(from)}
	n := int(d.u16())
	if n > addressMax {
		d.bad = true
		return h
	}
	h.Addr = d.take(n)
	return h
}

// isHeartbeat tells whether raft means a request as a heartbeat. It is raft's own rule: such a request says nothing
// about the log.
func isHeartbeat(a *hraft.AppendEntriesRequest) bool {
	return a.Term != 0 && a.PrevLogEntry == 0 && a.PrevLogTerm == 0 && len(a.Entries) == 0 && a.LeaderCommitIndex == 0
}

// Heartbeat: header, term u64.

func encodeHeartbeat(a *hraft.AppendEntriesRequest) []byte {
	return binary.LittleEndian.AppendUint64(appendHeader(make([]byte, 0, 64), a.RPCHeader), a.Term)
}

func decodeHeartbeat(from peer.ID, body []byte) (*hraft.AppendEntriesRequest, error) {
	d := decoder{b: body}
	a := &hraft.AppendEntriesRequest{RPCHeader: d.header(from), Term: d.u64()}
	if err := d.end(); err != nil {
		return nil, err
	}
	if a.Term == 0 {
		return nil, errMalformed
	}
	return a, nil
}

// entryMeta is the length of what an append says about each entry before the payloads.
const entryMeta = 8 + 1 + 8 + 4 + 4

// part is one frame's worth of an append: a request in its own right.
type part struct {
	body [][]byte
	// last is the index up to which its success proves the log: its last entry, or the one before it.
	last  uint64
	bytes int
}

// encodeAppend makes one or more frames of a request. Raft bounds a request by the number of entries only; one that
// does not fit into a frame is cut into several, each of which is a valid request of the same term: its entries
// follow the ones before. Payloads are referenced, not copied.
func encodeAppend(a *hraft.AppendEntriesRequest, limit int) ([]part, error) {
	prevIndex, prevTerm := a.PrevLogEntry, a.PrevLogTerm
	entries := a.Entries
	var parts []part
	for {
		n, bytes := 0, 64+len(a.Addr)
		for n < len(entries) && n < entriesMax {
			size := entryMeta + len(entries[n].Data) + len(entries[n].Extensions)
			if bytes+size > limit {
				break
			}
			bytes += size
			n++
		}
		if n == 0 && len(entries) > 0 {
			return nil, fmt.Errorf("entry %d with %d bytes does not fit into a frame of %d",
				entries[0].Index, len(entries[0].Data)+len(entries[0].Extensions), limit)
		}
		p := part{last: prevIndex, bytes: bytes}
		meta := make([]byte, 0, 64+len(a.Addr)+n*entryMeta)
		meta = appendHeader(meta, a.RPCHeader)
		meta = binary.LittleEndian.AppendUint64(meta, a.Term)
		meta = binary.LittleEndian.AppendUint64(meta, prevIndex)
		meta = binary.LittleEndian.AppendUint64(meta, prevTerm)
		meta = binary.LittleEndian.AppendUint64(meta, a.LeaderCommitIndex)
		meta = binary.LittleEndian.AppendUint32(meta, uint32(n))
		p.body = make([][]byte, 1, 1+n)
		for _, e := range entries[:n] {
			if e.Index != p.last+1 {
				return nil, fmt.Errorf("entry %d follows entry %d in one request", e.Index, p.last)
			}
			p.last = e.Index
			meta = binary.LittleEndian.AppendUint64(meta, e.Term)
			meta = append(meta, byte(e.Type))
			meta = binary.LittleEndian.AppendUint64(meta, uint64(encodeTime(e.AppendedAt)))
			meta = binary.LittleEndian.AppendUint32(meta, uint32(len(e.Data)))
			meta = binary.LittleEndian.AppendUint32(meta, uint32(len(e.Extensions)))
			if len(e.Data) > 0 {
				p.body = append(p.body, e.Data)
			}
			if len(e.Extensions) > 0 {
				p.body = append(p.body, e.Extensions)
			}
			prevTerm = e.Term
		}
		p.body[0] = meta
		parts = append(parts, p)
		prevIndex = p.last
		entries = entries[n:]
		if len(entries) == 0 {
			return parts, nil
		}
	}
}

// decodeAppend reads one frame's worth. The payloads of its entries alias body, which therefore must be the frame's
// own: raft, the log's ring and the state machine keep them.
func decodeAppend(from peer.ID, body []byte) (*hraft.AppendEntriesRequest, error) {
	d := decoder{b: body}
	a := &hraft.AppendEntriesRequest{RPCHeader: d.header(from), Term: d.u64(), PrevLogEntry: d.u64(), PrevLogTerm: d.u64(),
		LeaderCommitIndex: d.u64()}
	n := int(d.u32())
	if d.bad || n > entriesMax || n*entryMeta > len(d.b) || a.Term == 0 || a.PrevLogEntry+uint64(n) < a.PrevLogEntry {
		return nil, errMalformed
	}
	if n > 0 {
		meta := decoder{b: d.take(n * entryMeta)}
		logs := make([]hraft.Log, n)
		a.Entries = make([]*hraft.Log, n)
		for i := range logs {
			l := &logs[i]
			l.Index = a.PrevLogEntry + 1 + uint64(i)
			l.Term = meta.u64()
			l.Type = hraft.LogType(meta.u8())
			l.AppendedAt = decodeTime(int64(meta.u64()))
			data, extensions := int(meta.u32()), int(meta.u32())
			if data > 0 {
				l.Data = d.take(data)
			}
			if extensions > 0 {
				l.Extensions = d.take(extensions)
			}
			// Raft panics on a type it does not know, once the entry is committed and on every node.
			if d.bad || l.Type > hraft.LogConfiguration || l.Term == 0 || l.Term > a.Term {
				return nil, errMalformed
			}
			if l.Type == hraft.LogConfiguration && !decodable(l.Data) {
				return nil, errMalformed
			}
			a.Entries[i] = l
		}
	}
	if err := d.end(); err != nil {
		return nil, err
	}
	return a, nil
}

// clampCommit lowers the leader's commit index to what the request covers. Raft's paper demands it of the follower,
// and the library takes the minimum with its last index instead: that may lie beyond what the leader has compared,
// in a suffix that the leader does not have (decision 3d).
func clampCommit(a *hraft.AppendEntriesRequest) {
	a.LeaderCommitIndex = min(a.LeaderCommitIndex, covers(a))
}

// covers returns the index up to which the success of a request proves the follower's log.
func covers(a *hraft.AppendEntriesRequest) uint64 {
	if n := len(a.Entries); n > 0 {
		return a.Entries[n-1].Index
	}
	return a.PrevLogEntry
}

func encodeTime(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func decodeTime(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

// Answer to heartbeat and append: term u64, last index u64, flags u8.

const (
	flagSuccess   = 1 << 0
	flagNoBackoff = 1 << 1
)

func encodeAppendResponse(r *hraft.AppendEntriesResponse) []byte {
	b := make([]byte, 17)
	binary.LittleEndian.PutUint64(b, r.Term)
	binary.LittleEndian.PutUint64(b[8:], r.LastLog)
	if r.Success {
		b[16] |= flagSuccess
	}
	if r.NoRetryBackoff {
		b[16] |= flagNoBackoff
	}
	return b
}

func decodeAppendResponse(from peer.ID, body []byte) (hraft.AppendEntriesResponse, error) {
	d := decoder{b: body}
	r := hraft.AppendEntriesResponse{RPCHeader: hraft.RPCHeader{ID: []byte(from)}, Term: d.u64(), LastLog: d.u64()}
	flags := d.u8()
	r.Success = flags&flagSuccess != 0
	r.NoRetryBackoff = flags&flagNoBackoff != 0
	return r, d.end()
}

// Vote: header, term u64, last index u64, last term u64, transfer u8. A pre-vote has no transfer.

func encodeVote(a *hraft.RequestVoteRequest) []byte {
	b := appendHeader(make([]byte, 0, 96), a.RPCHeader)
	b = binary.LittleEndian.AppendUint64(b, a.Term)
	b = binary.LittleEndian.AppendUint64(b, a.LastLogIndex)
	b = binary.LittleEndian.AppendUint64(b, a.LastLogTerm)
	return append(b, boolByte(a.LeadershipTransfer))
}

func decodeVote(from peer.ID, body []byte) (*hraft.RequestVoteRequest, error) {
	d := decoder{b: body}
	a := &hraft.RequestVoteRequest{RPCHeader: d.header(from), Term: d.u64(), LastLogIndex: d.u64(), LastLogTerm: d.u64()}
	transfer := d.u8()
	if transfer > 1 {
		d.bad = true
	}
	a.LeadershipTransfer = transfer == 1
	return a, d.end()
}

func encodePreVote(a *hraft.RequestPreVoteRequest) []byte {
	b := appendHeader(make([]byte, 0, 96), a.RPCHeader)
	b = binary.LittleEndian.AppendUint64(b, a.Term)
	b = binary.LittleEndian.AppendUint64(b, a.LastLogIndex)
	return binary.LittleEndian.AppendUint64(b, a.LastLogTerm)
}

func decodePreVote(from peer.ID, body []byte) (*hraft.RequestPreVoteRequest, error) {
	d := decoder{b: body}
	a := &hraft.RequestPreVoteRequest{RPCHeader: d.header(from), Term: d.u64(), LastLogIndex: d.u64(), LastLogTerm: d.u64()}
	return a, d.end()
}

// Answer to votes and snapshots: term u64, yes u8.

func encodeVerdict(term uint64, yes bool) []byte {
	return append(binary.LittleEndian.AppendUint64(make([]byte, 0, 9), term), boolByte(yes))
}

func decodeVerdict(body []byte) (term uint64, yes bool, err error) {
	d := decoder{b: body}
	term = d.u64()
	v := d.u8()
	if v > 1 {
		d.bad = true
	}
	return term, v == 1, d.end()
}

func boolByte(v bool) byte {
	if v {
		return 1
	}
	return 0
}

// TimeoutNow: header.

func encodeTimeoutNow(a *hraft.TimeoutNowRequest) []byte {
	return appendHeader(make([]byte, 0, 64), a.RPCHeader)
}

func decodeTimeoutNow(from peer.ID, body []byte) (*hraft.TimeoutNowRequest, error) {
	d := decoder{b: body}
	a := &hraft.TimeoutNowRequest{RPCHeader: d.header(from)}
	return a, d.end()
}

// Snapshot begin: header, version u8, term u64, last index u64, last term u64, configuration index u64, size u64,
// length of configuration u32, configuration.

func encodeSnapshotBegin(a *hraft.InstallSnapshotRequest) []byte {
	b := appendHeader(make([]byte, 0, 128+len(a.Configuration)), a.RPCHeader)
	b = append(b, byte(a.SnapshotVersion))
	b = binary.LittleEndian.AppendUint64(b, a.Term)
	b = binary.LittleEndian.AppendUint64(b, a.LastLogIndex)
	b = binary.LittleEndian.AppendUint64(b, a.LastLogTerm)
	b = binary.LittleEndian.AppendUint64(b, a.ConfigurationIndex)
	b = binary.LittleEndian.AppendUint64(b, uint64(a.Size))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(a.Configuration)))
	return append(b, a.Configuration...)
}

func decodeSnapshotBegin(from peer.ID, body []byte) (*hraft.InstallSnapshotRequest, error) {
	d := decoder{b: body}
	a := &hraft.InstallSnapshotRequest{RPCHeader: d.header(from), SnapshotVersion: hraft.SnapshotVersion(d.u8()), Term: d.u64(),
		LastLogIndex: d.u64(), LastLogTerm: d.u64(), ConfigurationIndex: d.u64(), Size: int64(d.u64())}
	n := int(d.u32())
	if n > configurationMax {
		return nil, errMalformed
	}
	a.Configuration = d.take(n)
	if err := d.end(); err != nil {
		return nil, err
	}
	// Version 0 would make raft read the deprecated peer list, which is not sent.
	if a.Term == 0 || a.Size < 0 || a.SnapshotVersion < 1 || !decodable(a.Configuration) {
		return nil, errMalformed
	}
	return a, nil
}

// decodable tells whether raft can decode a configuration; it panics where it cannot.
func decodable(b []byte) (ok bool) {
	defer func() {
		if recover() != nil {
			ok = false
		}
	}()
	hraft.DecodeConfiguration(b)
	return true
}

// Snapshot end: size u64, crc u32 over all parts.

func encodeSnapshotEnd(size uint64, crc uint32) []byte {
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint64(make([]byte, 0, 12), size), crc)
}

func decodeSnapshotEnd(body []byte) (size uint64, crc uint32, err error) {
	d := decoder{b: body}
	return d.u64(), d.u32(), d.end()
}

// encodeAddress makes what raft stores and compares as a node's address: it names the incarnation as well. Raft
// remembers a vote by these bytes alone, and a wiped node that returns to the old address is not the node it voted for.
func encodeAddress(id hraft.ServerID, addr hraft.ServerAddress) []byte {
	b := binary.LittleEndian.AppendUint16(make([]byte, 0, 2+len(id)+len(addr)), uint16(len(id)))
	b = append(b, id...)
	return append(b, addr...)
}

func decodeAddress(b []byte) hraft.ServerAddress {
	d := decoder{b: b}
	n := int(d.u16())
	if d.take(n); d.bad {
		return ""
	}
	return hraft.ServerAddress(d.b)
}
