package compat

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"

	"tercet.dev/tercet/compat/acl"
)

// Options are what a Server is made with. Backend is required; the zero value of everything else means its default.
type Options struct {
	Backend Backend
	// Version is this program's, shown by INFO, HELLO and LOLWUT.
	Version string
	// Logger receives the server's log; the default discards it.
	Logger hclog.Logger
	// Registerer receives the server's metrics; the default is a registry of its own.
	Registerer prometheus.Registerer
	// Cluster presents the nodes as a Valkey cluster of one shard: CLUSTER answers, and a node that does not lead sends
	// clients to the one that does. Otherwise every node looks like a primary of its own and passes requests on.
	Cluster bool
	// FlushAllowed offers FLUSHALL and FLUSHDB.
	FlushAllowed bool
	// Users are the users of an access file, with UsersFrom as its name. Without a file users are documents, the same on
	// all nodes, and ACL SETUSER changes them.
	Users     []*acl.User
	UsersFrom string
	// Insecure lets clients from other machines in although the default user needs no password.
	Insecure bool
	// TLS, when set, is spoken on every connection; ClientCertificates says that it lets nobody in without a certificate.
	TLS                *tls.Config
	ClientCertificates bool
	// CertificateUsers makes a client the user that its certificate's common name says, if there is such a user and it is on
	// (Valkey's tls-auth-clients-user CN).
	CertificateUsers bool
	// Upstream, when set, is a real server that answers what the log does not: commands on keys that match no pattern of
	// UpstreamKeep, and commands that the log does not know.
	Upstream     Upstream
	UpstreamKeep []string
	Limits       Limits
}

// Limits bound what clients can make the server hold. The zero value of a field means its default.
type Limits struct {
	// Connections bounds open connections (default 16384).
	Connections int
	// OutputBytes bounds the replies that a client has not taken (default 64 MiB).
	OutputBytes int
	// MemoryBytes bounds input and output of all clients together (default 256 MiB).
	MemoryBytes int64
	// WriteTimeout is how long a client may take nothing of what was sent (default 60 s).
	WriteTimeout time.Duration
	// CommandTimeout is the longest pause within a command (default 60 s), LoginTimeout how long a client that has to
	// authenticate may take before (30 s).
	CommandTimeout, LoginTimeout time.Duration
	// IdleTimeout is the longest silence between two commands; 0, the default, is no limit: Valkey has none, and pools
	// keep connections for hours. Clients that are gone are found by keep-alive probes within two minutes.
	IdleTimeout time.Duration
	// RequestTimeout is how long a command may be held, through an election for instance, before it fails (default
	// 4.5 s: clients give up after 5 s, and some repeat then what may have happened).
	RequestTimeout time.Duration
	// TransactionBytes bounds what MULTI queues (default 4 MiB), Watches the keys of WATCH (default 4096).
	TransactionBytes, Watches int
	// PipelineCommands and PipelineBytes bound the writes of one connection whose outcome is awaited (defaults 4096 and 8 MiB).
	PipelineCommands, PipelineBytes int
	// AuthFailures is the number of failed logins a second, by all clients, above which answers are slowed down
	// (default 50).
	AuthFailures int
}

func (l *Limits) setDefaults() {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	defTime := func(v *time.Duration, d time.Duration) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&l.Connections, 16384)
	def(&l.OutputBytes, 64<<20)
	if l.MemoryBytes <= 0 {
		l.MemoryBytes = 256 << 20
	}
	defTime(&l.WriteTimeout, time.Minute)
	defTime(&l.CommandTimeout, time.Minute)
	defTime(&l.LoginTimeout, 30*time.Second)
	defTime(&l.RequestTimeout, 4500*time.Millisecond)
	def(&l.TransactionBytes, 4<<20)
	def(&l.Watches, 4096)
	def(&l.PipelineCommands, 4096)
	def(&l.PipelineBytes, 8<<20)
	def(&l.AuthFailures, 50)
}

// Server answers the Valkey protocol for one node.
//
// A stop has the same steps as the HTTP server's: Drain (blocked reads end as if their time were over), the node's own
// drain, Shutdown, and the node's Close.
type Server struct {
	sealed   atomic.Pointer[sealed]
	backend  Backend
	opts     Options
	log      hclog.Logger
	limits   Limits
	metrics  *metrics
	users    *acl.Store
	usersRev atomic.Uint64
	usersMu  sync.Mutex // orders loads of the users
	// usersFresh is when a failed login last had them read, in nanoseconds.
	usersFresh atomic.Int64
	start      sync.Once
	aclLog     aclLog
	memory     memory
	clients    clients
	bus        bus
	broadcasts broadcasts
	blocked    atomic.Int64
	started    time.Time
	runID      string
	counts     counts
	logins     logins
	upstream   upstreamTable

	// draining is closed by Drain, closing when no more connections are taken.
	draining, closing chan struct{}
	drainOnce         sync.Once
	closeOnce         sync.Once
	wg                sync.WaitGroup

	mu        sync.Mutex
	listeners map[net.Listener]struct{}
	closed    bool
}

// counts are totals for INFO.
type counts struct {
	connections, commands, rejected atomic.Uint64
}

// memory is the budget of all connections' buffers.
type memory struct {
	max  int64
	used atomic.Int64
}

// take takes n bytes, or gives them back if n is negative.
func (m *memory) take(n int) bool {
	if m.used.Add(int64(n)) > m.max && n > 0 {
		m.used.Add(int64(-n))
		return false
	}
	return true
}

// New makes a Server. It starts no goroutine before Serve.
func New(o Options) (*Server, error) {
	if o.Backend == nil {
		return nil, errors.New("compat: no backend")
	}
	o.Limits.setDefaults()
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	if o.Registerer == nil {
		o.Registerer = prometheus.NewRegistry()
	}
	if o.Version == "" {
		o.Version = "0.0.0"
	}
	s := &Server{
		backend: o.Backend, opts: o, log: o.Logger, limits: o.Limits, users: acl.NewStore(),
		memory: memory{max: o.Limits.MemoryBytes}, started: time.Now(),
		draining: make(chan struct{}), closing: make(chan struct{}), listeners: map[net.Listener]struct{}{},
		runID: randomHex(20),
	}
	s.clients.init()
	s.bus.init()
	if o.UsersFrom != "" {
		s.users.Replace(o.Users, true)
	}
	var err error
	if s.metrics, err = newMetrics(o.Registerer, s); err != nil {
		return nil, fmt.Errorf("compat: %w", err)
	}
	return s, nil
}

// Serve answers clients on the listener until Shutdown or Close, and then returns nil. The listener is closed.
func (s *Server) Serve(l net.Listener) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		l.Close()
		return nil
	}
	s.listeners[l] = struct{}{}
	s.mu.Unlock()
	s.start.Do(s.begin)
	var pause time.Duration
	for {
		nc, err := l.Accept()
		if err == nil {
			pause = 0
			s.accept(nc)
			continue
		}
		select {
		case <-s.closing:
			return nil
		default:
		}
		var temporary interface{ Temporary() bool }
		if !errors.As(err, &temporary) || !temporary.Temporary() {
			return err
		}
		// Out of file descriptors, say: others may close theirs.
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		s.log.Warn("cannot accept connections", "error", err)
		select {
		case <-time.After(pause):
		case <-s.closing:
			return nil
		}
	}
}

// begin starts what serves all connections.
func (s *Server) begin() {
	if b, ok := s.backend.(Broadcaster); ok {
		b.OnBroadcast(s.received)
	}
	if b, ok := s.backend.(KeyFollower); ok {
		b.OnKeys(s.keysChanged)
	}
	s.firstUsers()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.opts.UsersFrom != "" {
		return
	}
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		s.watchUsers()
	}()
}

// errTooMany and errProtected are all that a connection hears that is not taken.
const (
	errTooMany   = "-ERR max number of clients reached\r\n"
	errProtected = "-DENIED Tercet is running in protected mode: no user with a password is configured, so only connections from " +
		"this machine are accepted. Configure users with --valkey-acl or ACL SETUSER, or start the node with --insecure.\r\n"
)

// accept takes a connection or turns it away.
func (s *Server) accept(nc net.Conn) {
	s.counts.connections.Add(1)
	if tcp, ok := nc.(*net.TCPConn); ok {
		// A client that is gone without a word is found within 90 seconds.
		_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 15 * time.Second, Count: 4})
	}
	refuse := func(reason, text string) {
		s.counts.rejected.Add(1)
		s.metrics.closed.WithLabelValues(reason).Inc()
		if s.opts.TLS == nil {
			nc.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
			_, _ = nc.Write([]byte(text))
		}
		nc.Close()
	}
	if s.protected(nc) {
		refuse("protected", errProtected)
		return
	}
	if s.opts.TLS != nil {
		nc = tls.Server(nc, s.opts.TLS)
	}
	c := newConn(s, nc)
	if !s.clients.add(c, s.limits.Connections) {
		refuse("connections", errTooMany)
		return
	}
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		s.clients.remove(c)
		nc.Close()
		return
	}
	s.wg.Add(2)
	s.mu.Unlock()
	go func() {
		defer s.wg.Done()
		c.write()
	}()
	go func() {
		defer s.wg.Done()
		c.serve()
	}()
}

// protected reports whether a connection from another machine must be turned away because nobody is asked for a password.
func (s *Server) protected(nc net.Conn) bool {
	if s.opts.Insecure {
		return false
	}
	if u := s.users.Default(); !u.Enabled || !u.NoPassword {
		return false
	}
	if s.opts.TLS != nil && s.opts.ClientCertificates {
		return false
	}
	addr, ok := remoteIP(nc)
	return !ok || !addr.IsLoopback()
}

func remoteIP(nc net.Conn) (netip.Addr, bool) {
	tcp, ok := nc.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}, false
	}
	return tcp.AddrPort().Addr().Unmap(), true
}

// Drain ends blocked reads, which are answered as if their time were over.
func (s *Server) Drain() { s.drainOnce.Do(func() { close(s.draining) }) }

// Shutdown stops accepting connections, lets commands that are being carried out finish, answers them, and closes. When ctx
// ends it closes what is left. It implies Drain.
func (s *Server) Shutdown(ctx context.Context) error {
	s.Drain()
	s.stopListening()
	for _, c := range s.clients.list() {
		c.finish("shutdown")
	}
	done := make(chan struct{})
	go func() {
		s.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return s.Close()
	case <-ctx.Done():
		err := s.Close()
		<-done
		return errors.Join(ctx.Err(), err)
	}
}

// Close stops at once.
func (s *Server) Close() error {
	s.Drain()
	s.stopListening()
	for _, c := range s.clients.list() {
		c.kill("")
	}
	s.wg.Wait()
	return nil
}

func (s *Server) stopListening() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.closeOnce.Do(func() { close(s.closing) })
	for l := range s.listeners {
		l.Close()
	}
	clear(s.listeners)
}

// clients are the open connections.
type clients struct {
	mu   sync.Mutex
	last uint64
	byID map[uint64]*conn
}

func (k *clients) init() { k.byID = make(map[uint64]*conn) }

func (k *clients) add(c *conn, limit int) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.byID) >= limit {
		return false
	}
	k.last++
	c.id = k.last
	k.byID[c.id] = c
	return true
}

func (k *clients) remove(c *conn) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.byID, c.id)
}

func (k *clients) get(id uint64) *conn {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.byID[id]
}

func (k *clients) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.byID)
}

// list returns the connections by id.
func (k *clients) list() []*conn {
	k.mu.Lock()
	defer k.mu.Unlock()
	out := make([]*conn, 0, len(k.byID))
	for _, c := range k.byID {
		out = append(out, c)
	}
	return sortByID(out)
}
