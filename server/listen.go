package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/wire"
)

// CheckBind refuses an address that others than this machine could reach, unless requests are authenticated or
// insecure says that this is meant. It looks at the address only and opens nothing. A nil error with public set
// means: allowed, worth a warning when requests are not authenticated.
func CheckBind(addr string, authenticated, insecure bool) (public bool, err error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return false, fmt.Errorf("address %q: want HOST:PORT or :PORT", addr)
	}
	if loopback(host) {
		return false, nil
	}
	if authenticated || insecure {
		return true, nil
	}
	return true, fmt.Errorf("address %q can be reached from other machines: configure tokens (auth in the --config file) or --tls-client-ca, or pass --insecure to serve without authentication", addr)
}

func loopback(host string) bool {
	if host == "" || host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

// Listen opens the listeners of an address. Without a host that is 127.0.0.1 and, where the machine has it, ::1, both
// on the same port; port 0 takes one that is free on both.
func Listen(ctx context.Context, addr string) ([]net.Listener, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("address %q: want HOST:PORT or :PORT", addr)
	}
	var config net.ListenConfig
	if host != "" {
		l, err := config.Listen(ctx, "tcp", addr)
		if err != nil {
			return nil, err
		}
		return []net.Listener{l}, nil
	}
	// A free port on 127.0.0.1 may be taken on ::1; then another one is drawn.
	for attempt := 0; ; attempt++ {
		four, err := config.Listen(ctx, "tcp4", net.JoinHostPort("127.0.0.1", port))
		if err != nil {
			return nil, err
		}
		_, bound, _ := net.SplitHostPort(four.Addr().String())
		six, err := config.Listen(ctx, "tcp6", net.JoinHostPort("::1", bound))
		switch {
		case err == nil:
			return []net.Listener{four, six}, nil
		case !addressTaken(err):
			return []net.Listener{four}, nil // no IPv6 here
		}
		four.Close()
		if port != "0" || attempt == 10 {
			return nil, err
		}
	}
}

// listener keeps the bounds on connections, looks at request heads (see headConn), and ends without losing anybody
// (see refuse).
type listener struct {
	net.Listener
	s *Server
	// closed is closed by Close, drained when everybody who was let in before refuse has been handed on.
	closed, drained chan struct{}
	once            sync.Once

	mu sync.Mutex
	// refusing is set once nobody is let in any more, late holds those who were and have not been accepted.
	refusing bool
	late     []net.Conn
}

// tooMany is what a connection above the bounds is told. Which operation it would have asked for is not known;
// 429 is understood by all of them.
var tooMany = func() []byte {
	e := errs.New(errs.Overloaded, "too many connections to this node")
	e.Hint = "close idle connections, or use other nodes"
	body := appendError(nil, e, "")
	return fmt.Appendf(nil, "HTTP/1.1 429 Too Many Requests\r\nContent-Type: %s\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s",
		wire.MediaJSON, len(body), body)
}()

// Accept returns the next connection within the bounds.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			if c, err = l.nextLate(err); err != nil {
				return nil, err
			}
		}
		conn := &headConn{Conn: c, s: l.s, accepted: time.Now(), inHead: true}
		if l.s.tls != nil {
			// Heads are looked at behind TLS. The handshake is part of the first read, and of its time.
			conn.raw, conn.Conn = c, tls.Server(c, l.s.tls)
		}
		if l.s.load.admit(conn) {
			l.s.metrics.conns.Inc()
			return conn, nil
		}
		l.s.metrics.refused.connections.Inc()
		if l.s.tls == nil {
			// The answer fits the socket's buffer; a client that does not take it does not hold us up.
			c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
			_, _ = c.Write(tooMany)
		}
		c.Close()
	}
}

// connections are the open ones, and how many there are by remote address.
type connections struct {
	mu     sync.Mutex
	open   map[*headConn]struct{}
	byAddr map[netip.Addr]int
}

// admit counts a new connection in, unless a bound is reached.
func (l *load) admit(c *headConn) bool {
	if tcp, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		c.addr = tcp.AddrPort().Addr().Unmap()
	}
	k := &l.connections
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.open) >= l.connectionsMax || k.byAddr[c.addr] >= l.perAddrMax {
		return false
	}
	k.open[c] = struct{}{}
	k.byAddr[c.addr]++
	return true
}

// leave counts a connection out.
func (l *load) leave(c *headConn) {
	k := &l.connections
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.open, c)
	if k.byAddr[c.addr]--; k.byAddr[c.addr] == 0 {
		delete(k.byAddr, c.addr)
	}
}

// errHead is what a request whose head is ambiguous ends with. net/http answers 400 and closes the connection.
var errHead = errors.New("server: ambiguous request head")

// headConn watches the heads of requests for three things that net/http lets pass and that proxies in front read
// differently, which is how requests are smuggled past them: a line that ends without CR, a header folded over
// two lines, and a length beside Transfer-Encoding.
//
// It looks while a head is expected: from the beginning of the connection, and from the moment the last answer is
// complete, until the request reaches the handler. The next request of a client that does not wait for its answers
// may come in between and is not looked at; no proxy sends like that.
type headConn struct {
	net.Conn
	// raw is the connection below TLS, nil without TLS.
	raw  net.Conn
	s    *Server
	addr netip.Addr
	once sync.Once
	// state is one of connSilent, connBusy and connIdle.
	state    atomic.Int32
	accepted time.Time

	mu     sync.Mutex
	inHead bool
	// line is the beginning of the line that has not ended yet, as far as it matters.
	line                []byte
	first               bool // the next line is not the first of its head
	hasLength, hasCoded bool
	// frames is set for a connection that speaks HTTP/2: it has no heads of this kind.
	frames bool
}

// Read implements net.Conn.
func (c *headConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		if c.state.Load() != connBusy {
			c.state.Store(connBusy)
		}
		c.mu.Lock()
		ok := !c.inHead || c.look(p[:n])
		c.mu.Unlock()
		if !ok {
			return 0, errHead
		}
	}
	if err != nil && c.raw != nil {
		if e, ok := errors.AsType[tls.RecordHeaderError](err); ok && e.Conn != nil && looksLikeHTTP(e.RecordHeader[:]) {
			c.raw.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
			_, _ = c.raw.Write(plainHTTP)
		}
	}
	return n, err
}

// plainHTTP is what a client is told that does not speak TLS to a port that does.
var plainHTTP = func() []byte {
	e := errs.New(errs.BadRequest, "this port speaks TLS, and the request came without")
	e.Hint = "use https:// in the address"
	body := appendError(nil, e, "")
	return fmt.Appendf(nil, "HTTP/1.1 400 Bad Request\r\nContent-Type: %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", wire.MediaJSON, len(body), body)
}()

// looksLikeHTTP reports whether a first record's head is the beginning of a request in clear text.
func looksLikeHTTP(head []byte) bool {
	for _, method := range []string{"GET /", "HEAD ", "POST ", "PUT /", "PATCH", "DELET"} {
		if string(head) == method {
			return true
		}
	}
	return false
}

// Close implements net.Conn.
func (c *headConn) Close() error {
	c.once.Do(func() {
		c.s.load.leave(c)
		c.s.metrics.conns.Dec()
	})
	return c.Conn.Close()
}

// CloseWrite lets net/http end its side first, so that the last answer is not lost with unread input.
func (c *headConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// expect begins or ends the expectation of a head.
func (c *headConn) expect(head bool) {
	c.mu.Lock()
	c.inHead = head && !c.frames
	c.line, c.first, c.hasLength, c.hasCoded = c.line[:0], false, false, false
	c.mu.Unlock()
}

// connState is http.Server's: an idle connection expects a head.
func connState(conn net.Conn, state http.ConnState) {
	c, ok := conn.(*headConn)
	if !ok {
		return
	}
	switch state {
	case http.StateActive:
		c.state.Store(connBusy) // its head may have come together with the request before
	case http.StateIdle:
		c.state.Store(connIdle)
		c.expect(true)
	}
}

type connKey struct{}

// connContext is http.Server's: it makes the connection known to its requests.
func connContext(ctx context.Context, conn net.Conn) context.Context {
	if c, ok := conn.(*headConn); ok {
		return context.WithValue(ctx, connKey{}, c)
	}
	return ctx
}

// headRead says that the request's head has been read: what comes now is body.
func headRead(r *http.Request) {
	if c, ok := r.Context().Value(connKey{}).(*headConn); ok {
		c.expect(false)
	}
}
