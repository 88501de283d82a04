package peer

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	hclog "github.com/hashicorp/go-hclog"
)

// Options configure a Mesh. Zero durations and bounds take the defaults named.
type Options struct {
	// ID and Zone are this node's.
	ID   ID
	Zone string
	// Cluster is this node's cluster, empty before formation; see Mesh.SetCluster.
	Cluster string
	// Listener accepts the other nodes' connections. The mesh owns it from New on.
	Listener net.Listener
	// Dial connects to an address; nil dials TCP.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// TLS, if not nil, secures every connection in both directions: it needs a certificate, RootCAs for the
	// dialling side and ClientCAs with ClientAuth for the accepting side. ServerName defaults to the address's host.
	TLS *tls.Config
	// Enrol, if not nil, takes over each accepted connection whose TLS handshake negotiated an application protocol (ALPN):
	// nodes do not, so it comes from one that has no certificate yet. It closes the connection, which never reaches the
	// handshake of nodes; without Enrol it is closed at once. ctx ends with the mesh.
	Enrol func(ctx context.Context, conn net.Conn)
	// Admit, if not nil, is asked last about every handshake this node accepts or receives the answer of; an error
	// refuses the connection with that text. It is where certificate names are compared with identities.
	Admit func(h Hello, state *tls.ConnectionState) error
	// Logger is the parent of the mesh's logger.
	Logger hclog.Logger
	// Observe, if not nil, is told what the links find out. It is called from the links' goroutines and must not
	// block.
	Observe func(Event)
	// Take, if not nil, is offered each forwarded request first, in the order of arrival on its connection and on that
	// connection's goroutine: it must not block. If it reports true it has taken the request and answers it whenever
	// it likes; else the request goes to Forward.
	Take func(r *Request) bool
	// Forward and Introduce serve forwarded requests and introductions; nil refuses them.
	Forward   ForwardHandler
	Introduce IntroduceHandler

	// ForwardMax and ForwardBytesMax bound the forwarded requests in hand, from all nodes together: 16384 and
	// 256 MiB. What exceeds them is answered CodeBusy.
	ForwardMax      int
	ForwardBytesMax int64
	// ForwardConns is how many connections carry this node's forwarded requests to each other node: 2.
	ForwardConns int
	// SessionsMax bounds the connections this node accepts: 256.
	SessionsMax int

	// DialTimeout and HandshakeTimeout bound the two steps of a connection: 1 s and 2 s.
	DialTimeout, HandshakeTimeout time.Duration
	// RedialMin and RedialMax bound the pause between attempts: 20 ms and 500 ms. The first redial after a
	// connection ended comes at once.
	RedialMin, RedialMax time.Duration
	// KeepAlive is after what silence a connection is asked for a sign of life: 1 s.
	KeepAlive time.Duration
	// Silence is after what silence a connection is given up: 4 s; on snapshot connections SnapshotSilence: 30 s.
	Silence, SnapshotSilence time.Duration
	// Linger is how long connections to a node live on after it left the table: 2 s.
	Linger time.Duration
}

func (o *Options) fill() {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	def(&o.DialTimeout, time.Second)
	def(&o.HandshakeTimeout, 2*time.Second)
	def(&o.RedialMin, 20*time.Millisecond)
	def(&o.RedialMax, 500*time.Millisecond)
	def(&o.KeepAlive, time.Second)
	def(&o.Silence, 4*time.Second)
	def(&o.SnapshotSilence, 30*time.Second)
	def(&o.Linger, 2*time.Second)
	if o.ForwardMax <= 0 {
		o.ForwardMax = 16 << 10
	}
	if o.ForwardBytesMax <= 0 {
		o.ForwardBytesMax = 256 << 20
	}
	if o.ForwardConns <= 0 {
		o.ForwardConns = 2
	}
	if o.SessionsMax <= 0 {
		o.SessionsMax = 256
	}
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	if o.Dial == nil {
		d := &net.Dialer{}
		o.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			return d.DialContext(ctx, "tcp", address)
		}
	}
}

// Mesh is one node's connections to all others. Its methods may be called from any goroutine.
type Mesh struct {
	o      Options
	log    hclog.Logger
	ctx    context.Context // ends when the mesh closes
	cancel context.CancelFunc
	wg     sync.WaitGroup
	born   time.Time

	forwarding   atomic.Int64 // forwarded requests in hand
	forwardBytes atomic.Int64 // and their bytes
	nextForward  atomic.Uint64

	handlers sync.Map // uint16 → Handler

	mu struct {
		sync.Mutex
		started, closed bool
		cluster         string
		peers           map[ID]string
		names           map[string][]ID // every identity known for a name, this node's included
		links           map[linkKey]*Link
		wires           map[*wire]*Conn // every established connection; nil for accepted ones
		sessions        int             // accepted connections, handshakes included
		heard           map[ID]*atomic.Int64
		away            map[ID]bool // nodes whose present outage has been warned of
	}
}

type linkKey struct {
	peer    ID
	purpose Purpose
	n       int
}

// New makes a mesh that neither dials nor accepts until Start. It owns o.Listener.
func New(o Options) *Mesh {
	o.fill()
	m := &Mesh{o: o, log: o.Logger.Named("peer"), born: time.Now()}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.mu.cluster = o.Cluster
	m.mu.peers = make(map[ID]string)
	m.mu.names = map[string][]ID{o.ID.Name(): {o.ID}}
	m.mu.links = make(map[linkKey]*Link)
	m.mu.wires = make(map[*wire]*Conn)
	m.mu.heard = make(map[ID]*atomic.Int64)
	m.mu.away = make(map[ID]bool)
	return m
}

// Start begins to accept connections and to dial the nodes of the table. What serves requests should be bound
// before.
func (m *Mesh) Start() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.started || m.mu.closed {
		return
	}
	m.mu.started = true
	m.wg.Add(2)
	go m.accept()
	go m.keep()
	m.relink()
}

// Close ends every connection and returns when all of the mesh's goroutines have: handlers of forwarded requests
// included, whose contexts end.
func (m *Mesh) Close() error {
	m.mu.Lock()
	if m.mu.closed {
		m.mu.Unlock()
		m.wg.Wait()
		return nil
	}
	m.mu.closed = true
	m.cancel()
	wires := make([]*wire, 0, len(m.mu.wires))
	for w := range m.mu.wires {
		wires = append(wires, w)
	}
	m.mu.Unlock()
	err := m.o.Listener.Close()
	for _, w := range wires {
		w.end(ErrClosed)
	}
	m.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	return err
}

// ID returns who this node is.
func (m *Mesh) ID() ID { return m.o.ID }

// Addr returns where the mesh listens.
func (m *Mesh) Addr() net.Addr { return m.o.Listener.Addr() }

// SetCluster tells the mesh its cluster once it is known. Connections made before are kept: their ends knew each
// other by identity.
func (m *Mesh) SetCluster(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.cluster = id
}

// Cluster returns this node's cluster, empty before formation.
func (m *Mesh) Cluster() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.cluster
}

// SetPeers replaces the table of nodes: identity to address. This node itself may be among them. New ones are
// dialled at once, connections to those that are gone end after a moment (Options.Linger), a changed address is
// used for the next dial.
func (m *Mesh) SetPeers(peers map[ID]string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.peers = make(map[ID]string, len(peers))
	m.mu.names = map[string][]ID{m.o.ID.Name(): {m.o.ID}}
	for id, address := range peers {
		if id == m.o.ID {
			continue
		}
		m.mu.peers[id] = address
		m.mu.names[id.Name()] = append(m.mu.names[id.Name()], id)
	}
	if m.mu.started && !m.mu.closed {
		m.relink()
	}
}

// Peers returns the table of nodes, without this one.
func (m *Mesh) Peers() map[ID]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	peers := make(map[ID]string, len(m.mu.peers))
	for id, address := range m.mu.peers {
		peers[id] = address
	}
	return peers
}

// relink makes the links match the table. m.mu is held.
func (m *Mesh) relink() {
	for key, l := range m.mu.links {
		address, ok := m.mu.peers[key.peer]
		if !ok {
			l.retire(m.o.Linger)
		} else if !l.stay(address) {
			delete(m.mu.links, key)
		}
	}
	for id := range m.mu.peers {
		m.linkLocked(linkKey{peer: id, purpose: Control})
		m.linkLocked(linkKey{peer: id, purpose: Data})
	}
}

// linkLocked returns the link of the key, made if the node is in the table, nil if it is not. m.mu is held.
func (m *Mesh) linkLocked(key linkKey) *Link {
	if l := m.mu.links[key]; l != nil {
		return l
	}
	address, ok := m.mu.peers[key.peer]
	if !ok || !m.mu.started || m.mu.closed {
		return nil
	}
	l := newLink(m, key.peer, address, key.purpose)
	m.mu.links[key] = l
	return l
}

// Link returns the link of a purpose to a node of the table: Control, Data or Forward. The error is ErrUnknownPeer
// or ErrClosed.
func (m *Mesh) Link(id ID, purpose Purpose) (*Link, error) {
	return m.link(linkKey{peer: id, purpose: purpose})
}

func (m *Mesh) link(key linkKey) (*Link, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.closed {
		return nil, ErrClosed
	}
	if l := m.linkLocked(key); l != nil {
		return l, nil
	}
	return nil, ErrUnknownPeer
}

// Dial opens a connection of its own to a node of the table, for a snapshot. The caller closes it.
func (m *Mesh) Dial(ctx context.Context, id ID, purpose Purpose) (*Conn, error) {
	m.mu.Lock()
	address, ok := m.mu.peers[id]
	closed := m.mu.closed
	m.mu.Unlock()
	if closed {
		return nil, ErrClosed
	}
	if !ok {
		return nil, ErrUnknownPeer
	}
	conn, err := m.dial(ctx, id, address, purpose)
	if err != nil {
		return nil, &ConnError{Peer: id, Cause: err}
	}
	return conn, nil
}

// Bind makes h serve the requests of a shard. Requests for a shard that is not bound are answered CodeUnbound.
func (m *Mesh) Bind(shard uint16, h Handler) { m.handlers.Store(shard, h) }

// Unbind ends what Bind began. Requests already handed over stay with their handler.
func (m *Mesh) Unbind(shard uint16) { m.handlers.Delete(shard) }

func (m *Mesh) handler(shard uint16) Handler {
	if h, ok := m.handlers.Load(shard); ok {
		return h.(Handler)
	}
	return nil
}

// Call passes a request to another node's ForwardHandler and waits for the answer. Many calls may be in flight;
// their order is not kept. The error is a *RemoteError if the other node answered with one, else ErrUnknownPeer,
// ErrRemoved, ErrClosed or a *ConnError, whose Sent tells whether the request may have been carried out.
func (m *Mesh) Call(ctx context.Context, id ID, kind Kind, body ...[]byte) ([]byte, error) {
	n := int(m.nextForward.Add(1) % uint64(m.o.ForwardConns))
	l, err := m.link(linkKey{peer: id, purpose: Forward, n: n})
	if err != nil {
		return nil, err
	}
	conn, err := l.Conn(ctx)
	if err != nil {
		return nil, err
	}
	return conn.Call(ctx, kind, 0, body...)
}

// Introduce asks whoever answers at address, member of any cluster or none, one question. It returns who that was
// with the answer.
func (m *Mesh) Introduce(ctx context.Context, address string, kind Kind, body []byte) (Remote, []byte, error) {
	if len(body) > introduceMax {
		return Remote{}, nil, &FrameError{Reason: "introduction too long"}
	}
	conn, err := m.dial(ctx, "", address, Introduction)
	if err != nil {
		return Remote{}, nil, &ConnError{Peer: ID(address), Cause: err}
	}
	defer conn.Close()
	reply, err := conn.Call(ctx, kind, 0, body)
	return conn.remote, reply, err
}

// LastHeard returns when anything last arrived from a node, on whatever connection; zero if nothing has.
func (m *Mesh) LastHeard(id ID) time.Time {
	m.mu.Lock()
	at := m.mu.heard[id]
	m.mu.Unlock()
	if at == nil || at.Load() == 0 {
		return time.Time{}
	}
	return m.born.Add(time.Duration(at.Load()))
}

// Connected tells whether a control connection to the node stands.
func (m *Mesh) Connected(id ID) bool {
	m.mu.Lock()
	l := m.mu.links[linkKey{peer: id, purpose: Control}]
	m.mu.Unlock()
	return l != nil && l.Current() != nil
}

func (m *Mesh) observe(e Event) {
	if m.o.Observe != nil {
		e.At = time.Now()
		m.o.Observe(e)
	}
}

// clock returns the nanoseconds since the mesh was made: one number to compare and to store atomically.
func (m *Mesh) clock() int64 { return int64(time.Since(m.born)) }

// hearing returns where to note that a node was heard.
func (m *Mesh) hearing(id ID) *atomic.Int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	at := m.mu.heard[id]
	if at == nil {
		at = new(atomic.Int64)
		m.mu.heard[id] = at
	}
	at.Store(max(m.clock(), 1))
	return at
}

// outageLevel tells how loud to be about a failed dial: a warning for each outage of a node, details for who looks for
// them. Before the cluster is founded nodes come to know each other one by one, and refuse whom they do not know yet.
func (m *Mesh) outageLevel(id ID, err error) hclog.Level {
	if m.forming(err) {
		return hclog.Debug
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.away[id] {
		return hclog.Info
	}
	m.mu.away[id] = true
	return hclog.Warn
}

// forming reports whether an error is a refusal of one that is not known yet, before the cluster is founded.
func (m *Mesh) forming(err error) bool {
	refused, ok := errors.AsType[*RefusedError](err)
	return ok && refused.Code == RefusedIdentity && m.Cluster() == ""
}

// outageOver says that a connection to the node stands.
func (m *Mesh) outageOver(id ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.mu.away, id)
}

// adopt registers an established connection; it ends it at once if the mesh is closing.
func (m *Mesh) adopt(w *wire, c *Conn) bool {
	m.mu.Lock()
	closed := m.mu.closed
	if !closed {
		m.mu.wires[w] = c
	}
	m.mu.Unlock()
	if closed {
		w.end(ErrClosed)
	}
	return !closed
}

func (m *Mesh) drop(w *wire) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.mu.wires, w)
}

func (m *Mesh) silence(p Purpose) time.Duration {
	if p == Snapshot {
		return m.o.SnapshotSilence
	}
	return m.o.Silence
}

// newWire wraps a network connection for a purpose.
func (m *Mesh) newWire(nc net.Conn, p Purpose) *wire {
	return newWire(nc, m.clock, m.silence(p), max(m.silence(p), 10*time.Second))
}

// judge applies the rules of admission to what the other end said.
func (m *Mesh) judge(h Hello, nc net.Conn) *RefusedError {
	if h.ID == m.o.ID {
		return &RefusedError{Code: RefusedIdentity, Reason: fmt.Sprintf("%s is this node itself", h.ID)}
	}
	if h.Purpose != Introduction {
		m.mu.Lock()
		cluster, names := m.mu.cluster, m.mu.names
		m.mu.Unlock()
		// names is replaced as a whole by SetPeers, never changed.
		if refused := judge(h, cluster, names); refused != nil {
			return refused
		}
	}
	if m.o.Admit != nil {
		var state *tls.ConnectionState
		if tc, ok := nc.(*tls.Conn); ok {
			s := tc.ConnectionState()
			state = &s
		}
		if err := m.o.Admit(h, state); err != nil {
			return &RefusedError{Code: RefusedPolicy, Reason: err.Error()}
		}
	}
	return nil
}

// dial opens a connection and shakes hands. target is empty for an introduction.
func (m *Mesh) dial(ctx context.Context, target ID, address string, purpose Purpose) (*Conn, error) {
	dctx, cancel := context.WithTimeout(ctx, m.o.DialTimeout)
	nc, err := m.o.Dial(dctx, address)
	cancel()
	if err != nil {
		return nil, err
	}
	// The mesh's end ends a handshake that hangs.
	stop := context.AfterFunc(ctx, func() { _ = nc.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_ = nc.SetDeadline(time.Now().Add(m.o.HandshakeTimeout))
	if m.o.TLS != nil {
		cfg := m.o.TLS
		if cfg.ServerName == "" {
			cfg = cfg.Clone()
			cfg.ServerName, _, _ = net.SplitHostPort(address)
		}
		tc := tls.Client(nc, cfg)
		if err := tc.HandshakeContext(ctx); err != nil {
			_ = nc.Close()
			return nil, err
		}
		nc = tc
	}
	h, version, err := m.greet(nc, target, purpose)
	if err != nil {
		_ = nc.Close()
		return nil, err
	}
	if !stop() {
		_ = nc.Close()
		return nil, context.Cause(ctx)
	}
	_ = nc.SetDeadline(time.Time{})
	w := m.newWire(nc, purpose)
	w.also.Store(m.hearing(h.ID))
	c := &Conn{wire: w, purpose: purpose, remote: Remote{
		ID: h.ID, Zone: h.Zone, Cluster: h.Cluster, Address: nc.RemoteAddr().String(), Version: version,
	}}
	c.pending.calls = make(map[uint64]func([]byte, error))
	if !m.adopt(w, c) {
		return nil, ErrClosed
	}
	m.wg.Add(2)
	go func() { defer m.wg.Done(); w.writeLoop() }()
	go func() { defer m.wg.Done(); defer m.drop(w); c.readLoop() }()
	return c, nil
}

// greet is the dialling side of the handshake.
func (m *Mesh) greet(nc net.Conn, target ID, purpose Purpose) (Hello, uint16, error) {
	mine := Hello{Newest: VersionNewest, Oldest: VersionOldest, Purpose: purpose,
		Cluster: m.Cluster(), ID: m.o.ID, Zone: m.o.Zone, Target: target}
	if err := writeFrame(nc, kindHello, mine.encode()); err != nil {
		return Hello{}, 0, err
	}
	// Nothing but the answer arrives before this node's first request, so a reader that reads ahead loses nothing.
	f, err := readFrame(bufio.NewReaderSize(nc, helloMax+headerSize), helloMax)
	if err != nil {
		return Hello{}, 0, err
	}
	if f.kind == kindRefuse {
		if e, ok := decodeRefusal(f.body); ok {
			return Hello{}, 0, e
		}
	}
	if f.kind != kindHello {
		return Hello{}, 0, &FrameError{Reason: fmt.Sprintf("kind %d instead of a handshake", f.kind)}
	}
	h, err := decodeHello(f.body)
	if err != nil {
		return Hello{}, 0, err
	}
	refused := func() *RefusedError {
		if h.Newest != h.Oldest || h.Newest < VersionOldest || h.Newest > VersionNewest {
			return &RefusedError{Code: RefusedVersion, Reason: fmt.Sprintf("the other node chose version %d to %d", h.Oldest, h.Newest)}
		}
		if target != "" && h.ID != target {
			return &RefusedError{Code: RefusedTarget, Reason: fmt.Sprintf("dialled %s, reached %s", target, h.ID)}
		}
		h.Purpose = purpose
		return m.judge(h, nc)
	}()
	if refused != nil {
		_ = writeFrame(nc, kindRefuse, encodeRefusal(refused)) // so that the other end logs it too
		return Hello{}, 0, refused
	}
	return h, h.Newest, nil
}

// writeFrame writes one frame of the handshake.
func writeFrame(nc net.Conn, kind Kind, body []byte) error {
	vec, _, err := appendFrame(nil, kind, 0, 0, 0, [][]byte{body})
	if err != nil {
		return err
	}
	_, err = writeJoined(nc, vec, nil)
	return err
}

// accept takes connections until the listener closes.
func (m *Mesh) accept() {
	defer m.wg.Done()
	pause := m.o.RedialMin
	for {
		nc, err := m.o.Listener.Accept()
		if err != nil {
			if m.ctx.Err() != nil {
				return
			}
			m.log.Error("cannot accept connections", "error", err)
			t := time.NewTimer(pause)
			select {
			case <-t.C:
			case <-m.ctx.Done():
				t.Stop()
				return
			}
			pause = min(pause*2, m.o.RedialMax)
			continue
		}
		pause = m.o.RedialMin
		m.mu.Lock()
		full := m.mu.sessions >= m.o.SessionsMax
		closed := m.mu.closed
		if !full && !closed {
			m.mu.sessions++
			m.wg.Add(1)
		}
		m.mu.Unlock()
		if full || closed {
			if full {
				m.log.Warn("connection turned away: too many", "from", nc.RemoteAddr().String(), "max", m.o.SessionsMax)
			}
			_ = nc.Close()
			continue
		}
		go func() {
			defer m.wg.Done()
			m.serve(nc)
			m.mu.Lock()
			m.mu.sessions--
			m.mu.Unlock()
		}()
	}
}

// serve is the life of an accepted connection.
func (m *Mesh) serve(nc net.Conn) {
	stop := context.AfterFunc(m.ctx, func() { _ = nc.Close() })
	defer stop()
	_ = nc.SetDeadline(time.Now().Add(m.o.HandshakeTimeout))
	if m.o.TLS != nil {
		tc := tls.Server(nc, m.o.TLS)
		if err := tc.HandshakeContext(m.ctx); err != nil {
			m.log.Warn("connection without a valid certificate", "from", nc.RemoteAddr().String(), "error", err)
			_ = nc.Close()
			return
		}
		if tc.ConnectionState().NegotiatedProtocol != "" {
			if m.o.Enrol == nil {
				_ = tc.Close()
				return
			}
			m.o.Enrol(m.ctx, tc)
			return
		}
		nc = tc
	}
	h, version, err := m.welcome(nc)
	if err != nil {
		_ = nc.Close()
		if m.ctx.Err() == nil && !quiet(err) {
			level := hclog.Warn
			if m.forming(err) {
				level = hclog.Debug
			}
			m.log.Log(level, "connection refused", "from", nc.RemoteAddr().String(), "node", string(h.ID), "zone", h.Zone, "error", err)
		}
		return
	}
	_ = nc.SetDeadline(time.Time{})
	w := m.newWire(nc, h.Purpose)
	s := &Session{wire: w, mesh: m, purpose: h.Purpose, remote: Remote{
		ID: h.ID, Zone: h.Zone, Cluster: h.Cluster, Address: nc.RemoteAddr().String(), Version: version,
	}}
	s.ctx, s.cancel = context.WithCancel(m.ctx)
	w.onEnd = s.cancel
	if h.Purpose != Introduction {
		w.also.Store(m.hearing(h.ID))
		m.wake(h.ID)
	}
	if !m.adopt(w, nil) {
		return
	}
	defer m.drop(w)
	m.wg.Add(1)
	go func() { defer m.wg.Done(); w.writeLoop() }()
	s.readLoop()
	if err := w.reason(); m.ctx.Err() == nil && !quiet(err) {
		m.log.Warn("connection of another node ended", "peer", string(h.ID), "purpose", h.Purpose.String(), "error", err)
	}
}

// welcome is the accepting side of the handshake. Nothing is allocated for the other end beyond a small hello.
func (m *Mesh) welcome(nc net.Conn) (Hello, uint16, error) {
	f, err := readFrame(bufio.NewReaderSize(nc, helloMax+headerSize), helloMax)
	if err != nil {
		return Hello{}, 0, err
	}
	refuse := func(h Hello, e *RefusedError) (Hello, uint16, error) {
		_ = writeFrame(nc, kindRefuse, encodeRefusal(e)) // best effort: the reason matters most in our own log
		return h, 0, e
	}
	if f.kind != kindHello {
		return refuse(Hello{}, &RefusedError{Code: RefusedProtocol, Reason: fmt.Sprintf("kind %d instead of a handshake", f.kind)})
	}
	h, err := decodeHello(f.body)
	if err != nil {
		return refuse(h, &RefusedError{Code: RefusedProtocol, Reason: err.Error()})
	}
	version, refused := negotiate(h.Newest, h.Oldest)
	if refused != nil {
		return refuse(h, refused)
	}
	if !h.Purpose.valid() {
		return refuse(h, &RefusedError{Code: RefusedPurpose, Reason: fmt.Sprintf("purpose %d is not known here", h.Purpose)})
	}
	if h.Target != m.o.ID && (h.Target != "" || h.Purpose != Introduction) {
		return refuse(h, &RefusedError{Code: RefusedTarget, Reason: fmt.Sprintf("%s was dialled, this is %s", h.Target, m.o.ID)})
	}
	if refused := m.judge(h, nc); refused != nil {
		return refuse(h, refused)
	}
	mine := Hello{Newest: version, Oldest: version, Purpose: h.Purpose,
		Cluster: m.Cluster(), ID: m.o.ID, Zone: m.o.Zone, Target: h.ID}
	return h, version, writeFrame(nc, kindHello, mine.encode())
}

// wake makes the links to a node dial now: it has just dialled this one, so it is there.
func (m *Mesh) wake(id ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for key, l := range m.mu.links {
		if key.peer == id {
			l.wake()
		}
	}
}

// keep asks silent connections for a sign of life and ends those that give none.
func (m *Mesh) keep() {
	defer m.wg.Done()
	t := time.NewTicker(max(m.o.KeepAlive/2, time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-t.C:
		}
		now := m.clock()
		type entry struct {
			w *wire
			c *Conn
		}
		m.mu.Lock()
		all := make([]entry, 0, len(m.mu.wires))
		for w, c := range m.mu.wires {
			all = append(all, entry{w, c})
		}
		m.mu.Unlock()
		for _, e := range all {
			e.w.check(now)
			if e.c != nil && time.Duration(now-e.w.heard.Load()) >= m.o.KeepAlive {
				_ = e.w.send(kindPing, 0, 0, 0, nil) // an ended connection needs none
			}
		}
	}
}
