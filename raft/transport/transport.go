package transport

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	hclog "github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft/peer"
	"tercet.dev/tercet/wal"
)

// Conditions that raft logs and tests look for.
var (
	// ErrStalled says that this node's disk has not synced for too long, so that it neither leads nor campaigns.
	ErrStalled = errors.New("transport: withheld, this node's disk is stalled")
	// ErrPipelineAborted says that a pipeline has ended, because the follower rejected a request or could not be
	// served; raft goes on without a pipeline.
	ErrPipelineAborted = errors.New("transport: append pipeline aborted")
)

// Log is what the gate asks of this node's log. *logstore.Store is one.
type Log interface {
	// Position returns the place of the stream that has to be durable before this node may say that it holds the
	// log up to index, 0 if it is.
	Position(index uint64) wal.LSN
	// Durable returns the newest index that is on disk together with everything before it.
	Durable() uint64
}

// WAL is what the gate asks of the stream the log lives in. *wal.WAL is one.
type WAL interface {
	// Written returns the position after everything appended so far.
	Written() wal.LSN
	// WaitDurable waits until everything before lsn is on disk.
	WaitDurable(lsn wal.LSN, cancel <-chan struct{}) error
	// Unsynced returns how many bytes wait for the disk, and the oldest for how long.
	Unsynced() (bytes int64, oldest time.Duration)
}

// Options configure a Transport. Zero durations and bounds take the defaults named.
type Options struct {
	// Mesh carries the frames, Shard is which shard's.
	Mesh  *peer.Mesh
	Shard uint16
	// Address is where the other nodes reach this one, as the raft configuration has it.
	Address hraft.ServerAddress
	// Log and WAL are this node's.
	Log Log
	WAL WAL
	// OnAdvance, if not nil, is told whenever the watermark or the confirmed instant rises, one call at a time and
	// never backwards. It is called from connections' goroutines and must not block.
	OnAdvance func(Advance)
	// ObserveGate, if not nil, is told how long the gate held each answer back, on the follower's or leader's side.
	ObserveGate func(leader bool, held time.Duration)
	// Logger is the parent of the transport's logger.
	Logger hclog.Logger

	// CallTimeout bounds heartbeats, votes and TimeoutNow, the wait for a connection included: 500 ms.
	CallTimeout time.Duration
	// StallMax is after what time without a sync heartbeats, appends and candidacies are withheld: limits.StallMax.
	StallMax time.Duration
	// InFlightMax and InFlightBytesMax bound the unanswered appends of one pipeline: 64 and 32 MiB.
	InFlightMax      int
	InFlightBytesMax int
}

func (o *Options) fill() {
	if o.CallTimeout <= 0 {
		o.CallTimeout = 500 * time.Millisecond
	}
	if o.StallMax <= 0 {
		o.StallMax = limits.StallMax
	}
	if o.InFlightMax <= 0 {
		o.InFlightMax = 64
	}
	if o.InFlightBytesMax <= 0 {
		o.InFlightBytesMax = 32 << 20
	}
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
}

// inboxMax bounds the requests handed over to raft and not yet answered, inboxBytesMax their bytes. Both lie well
// above what the other nodes may have in flight together; what exceeds them is answered as busy, never waited for:
// the reader serves other shards too.
const (
	inboxMax      = 512
	inboxBytesMax = 128 << 20
)

// frameLimit is how large the transport makes a frame; tests lower it.
const frameLimit = peer.BodyMax

// Transport implements hraft.Transport, hraft.WithPreVote and hraft.WithClose for one shard.
type Transport struct {
	o    Options
	log  hclog.Logger
	self peer.ID

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	consumer   chan hraft.RPC
	inboxBytes atomic.Int64
	heartbeat  atomic.Pointer[func(hraft.RPC)]
	beats      chan *beat
	marks      *Watermark
	frameLimit int

	mu struct {
		sync.Mutex
		closed  bool
		term    uint64 // newest term known to this node
		over    uint64 // terms up to this one have passed for this node as a leader
		tenures map[*tenure]struct{}
		answers map[*peer.Session]*answerer
		install *install // the snapshot being received, nil if none
	}

	// faults are switched on by negative controls in this package's tests, and by nothing else.
	faults struct {
		openFollowerGate bool // answer appends before the disk has synced
		openLeaderGate   bool // deliver answers before the own disk has synced
		openInstallGate  bool // answer InstallSnapshot before the disk has synced
		skipClamp        bool // hand the leader's commit index over as it came
		skipOwnRow       bool // take the own disk for synced in the watermark
	}
}

var (
	_ hraft.Transport   = (*Transport)(nil)
	_ hraft.WithPreVote = (*Transport)(nil)
	_ hraft.WithClose   = (*Transport)(nil)
	_ peer.Handler      = (*Transport)(nil)
)

// New makes the transport of a shard and binds it to the mesh. Requests that arrive before raft consumes them wait.
func New(o Options) *Transport {
	o.fill()
	t := &Transport{o: o, log: o.Logger.Named("transport"), self: o.Mesh.ID(), frameLimit: frameLimit}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	t.consumer = make(chan hraft.RPC, inboxMax)
	t.beats = make(chan *beat, 64)
	t.mu.tenures = make(map[*tenure]struct{})
	t.mu.answers = make(map[*peer.Session]*answerer)
	t.marks = newWatermark(hraft.ServerID(t.self), t.ownDurable, o.OnAdvance)
	t.wg.Add(1)
	go t.serveHeartbeats()
	o.Mesh.Bind(o.Shard, t)
	return t
}

// Close ends what waits in the transport and frees its goroutines; the mesh stays open. It is idempotent: raft calls
// it too, once its own goroutines have ended.
func (t *Transport) Close() error {
	t.mu.Lock()
	t.mu.closed = true
	install := t.mu.install
	t.mu.Unlock()
	t.o.Mesh.Unbind(t.o.Shard)
	t.cancel()
	t.endTenures(^uint64(0), hraft.ErrTransportShutdown)
	if install != nil {
		install.fail(hraft.ErrTransportShutdown)
	}
	t.wg.Wait()
	return nil
}

// Watermark returns the table of who holds what.
func (t *Transport) Watermark() *Watermark { return t.marks }

// LogDurable tells the transport that this node's own disk holds more of the log: logstore.Options.OnDurable.
func (t *Transport) LogDurable() { t.marks.logDurable() }

func (t *Transport) ownDurable() uint64 {
	if t.faults.skipOwnRow {
		return ^uint64(0)
	}
	return t.o.Log.Durable()
}

// ObserveTerm tells the transport that this node has entered a term: logstore.Options.OnTerm. Appends of earlier terms
// that wait for an unreachable node end.
func (t *Transport) ObserveTerm(term uint64) {
	t.mu.Lock()
	t.mu.term = max(t.mu.term, term)
	t.mu.Unlock()
	if term > 0 {
		t.endTenures(term-1, ErrTermPassed)
	}
}

// LeadershipLost tells the transport that this node no longer leads in the given term, for the case that it learnt
// so without a new one: it gave up, or it is stopping. Appends of that term that wait for an unreachable node end.
func (t *Transport) LeadershipLost(term uint64) { t.endTenures(term, ErrTermPassed) }

// SetConfiguration tells the transport the latest configuration: logstore.Options.OnConfiguration. It makes the mesh's
// table of nodes match, unless several shards share the mesh, whose owner then joins their tables.
func (t *Transport) SetConfiguration(_ uint64, c hraft.Configuration) {
	t.marks.SetConfiguration(c)
}

// Peers returns the table of nodes that a configuration stands for, for peer.Mesh.SetPeers.
func Peers(c hraft.Configuration) map[peer.ID]string {
	peers := make(map[peer.ID]string, len(c.Servers))
	for _, server := range c.Servers {
		peers[peer.ID(server.ID)] = string(server.Address)
	}
	return peers
}

// tenure is the time in which something sent on behalf of one term may wait.
type tenure struct {
	term   uint64
	began  time.Time
	ctx    context.Context
	cancel context.CancelCauseFunc
}

// enter begins a tenure, or reports why there is none. The caller leaves it.
func (t *Transport) enter(term uint64) (*tenure, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.mu.closed:
		return nil, hraft.ErrTransportShutdown
	case term < t.mu.term || term <= t.mu.over:
		return nil, ErrTermPassed
	}
	t.mu.term = term
	ctx, cancel := context.WithCancelCause(t.ctx)
	n := &tenure{term, time.Now(), ctx, cancel}
	t.mu.tenures[n] = struct{}{}
	return n, nil
}

func (t *Transport) leave(n *tenure) {
	n.cancel(context.Canceled)
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.mu.tenures, n)
}

// endTenures ends everything of terms up to the given one.
func (t *Transport) endTenures(through uint64, cause error) {
	t.mu.Lock()
	t.mu.over = max(t.mu.over, through)
	var ended []*tenure
	for n := range t.mu.tenures {
		if n.term <= through {
			ended = append(ended, n)
			delete(t.mu.tenures, n)
		}
	}
	t.mu.Unlock()
	t.marks.passed(through)
	for _, n := range ended {
		n.cancel(cause)
	}
}

// stalled tells whether this node's disk has not synced for too long.
func (t *Transport) stalled() bool {
	_, oldest := t.o.WAL.Unsynced()
	return oldest > t.o.StallMax
}

// stallPoll is how often a stalled node looks whether its disk is back.
const stallPoll = 50 * time.Millisecond

// waitUnstalled waits until the disk syncs again.
func (t *Transport) waitUnstalled(ctx context.Context) error {
	if !t.stalled() {
		return nil
	}
	t.log.Warn("disk is stalled: appends and heartbeats are withheld")
	tick := time.NewTicker(stallPoll)
	defer tick.Stop()
	for t.stalled() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	t.log.Info("disk syncs again")
	return nil
}

// Consumer implements hraft.Transport.
func (t *Transport) Consumer() <-chan hraft.RPC { return t.consumer }

// LocalAddr implements hraft.Transport: the address the configuration has, not the one the listener is bound to.
func (t *Transport) LocalAddr() hraft.ServerAddress { return t.o.Address }

// SetHeartbeatHandler implements hraft.Transport.
func (t *Transport) SetHeartbeatHandler(cb func(rpc hraft.RPC)) { t.heartbeat.Store(&cb) }

// EncodePeer implements hraft.Transport. Raft remembers votes by these bytes, so they contain the identity.
func (t *Transport) EncodePeer(id hraft.ServerID, addr hraft.ServerAddress) []byte {
	return encodeAddress(id, addr)
}

// DecodePeer implements hraft.Transport.
func (t *Transport) DecodePeer(b []byte) hraft.ServerAddress { return decodeAddress(b) }

// call sends a small request on the control connection and waits for its answer, all within Options.CallTimeout. It
// returns when the request was sent.
func (t *Transport) call(ctx context.Context, id hraft.ServerID, kind peer.Kind, body []byte) ([]byte, time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, t.o.CallTimeout)
	defer cancel()
	link, err := t.o.Mesh.Link(peer.ID(id), peer.Control)
	if err != nil {
		return nil, time.Time{}, err
	}
	conn, err := link.Conn(ctx)
	if err != nil {
		return nil, time.Time{}, err
	}
	sent := time.Now()
	reply, err := conn.Call(ctx, kind, t.o.Shard, body)
	return reply, sent, err
}

// sendHeartbeat asks a follower whether it still follows. The answer says nothing about the log, so no gate holds it
// back; it is what reads are confirmed by.
func (t *Transport) sendHeartbeat(id hraft.ServerID, args *hraft.AppendEntriesRequest, resp *hraft.AppendEntriesResponse) error {
	n, err := t.enter(args.Term)
	if err != nil {
		return err
	}
	defer t.leave(n)
	if t.stalled() {
		return ErrStalled
	}
	t.marks.Lead(args.Term)
	reply, sent, err := t.call(n.ctx, id, kindHeartbeat, encodeHeartbeat(args))
	if err != nil {
		return err
	}
	r, err := decodeAppendResponse(peer.ID(id), reply)
	if err != nil {
		return err
	}
	if r.Term == args.Term {
		t.marks.exchanged(id, args.Term, sent, time.Now())
	}
	*resp = r
	return nil
}

// RequestVote implements hraft.Transport. A node whose disk is stalled does not campaign: it could not commit.
func (t *Transport) RequestVote(id hraft.ServerID, _ hraft.ServerAddress, args *hraft.RequestVoteRequest, resp *hraft.RequestVoteResponse) error {
	t.mu.Lock()
	t.mu.term = max(t.mu.term, args.Term)
	t.mu.Unlock()
	if t.stalled() {
		return ErrStalled
	}
	reply, _, err := t.call(t.ctx, id, kindVote, encodeVote(args))
	if err != nil {
		return err
	}
	term, granted, err := decodeVerdict(reply)
	if err != nil {
		return err
	}
	*resp = hraft.RequestVoteResponse{RPCHeader: hraft.RPCHeader{ID: []byte(id)}, Term: term, Granted: granted}
	return nil
}

// RequestPreVote implements hraft.WithPreVote.
func (t *Transport) RequestPreVote(id hraft.ServerID, _ hraft.ServerAddress, args *hraft.RequestPreVoteRequest, resp *hraft.RequestPreVoteResponse) error {
	if t.stalled() {
		return ErrStalled
	}
	reply, _, err := t.call(t.ctx, id, kindPreVote, encodePreVote(args))
	if err != nil {
		if strings.Contains(err.Error(), "unexpected command") {
			// Raft takes this text for a node without pre-vote and counts it as granted. All of ours have it.
			return fmt.Errorf("pre-vote: %s did not understand it", id)
		}
		return err
	}
	term, granted, err := decodeVerdict(reply)
	if err != nil {
		return err
	}
	*resp = hraft.RequestPreVoteResponse{RPCHeader: hraft.RPCHeader{ID: []byte(id)}, Term: term, Granted: granted}
	return nil
}

// TimeoutNow implements hraft.Transport. Raft cannot give up on it, so it must end by itself.
func (t *Transport) TimeoutNow(id hraft.ServerID, _ hraft.ServerAddress, args *hraft.TimeoutNowRequest, resp *hraft.TimeoutNowResponse) error {
	_, _, err := t.call(t.ctx, id, kindTimeoutNow, encodeTimeoutNow(args))
	if err != nil {
		return err
	}
	*resp = hraft.TimeoutNowResponse{RPCHeader: hraft.RPCHeader{ID: []byte(id)}}
	return nil
}
