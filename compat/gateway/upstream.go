package gateway

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/valkey-io/valkey-go"

	"tercet.dev/tercet/internal/errs"
)

// Mode says how the upstream is addressed.
type Mode string

// The modes of an upstream.
const (
	// Auto asks the server.
	Auto Mode = "auto"
	// Single is one primary, with or without replicas.
	Single Mode = "single"
	// Cluster is cluster mode: several slots ranges, MOVED and ASK.
	Cluster Mode = "cluster"
)

// Target is an upstream and how to reach it.
type Target struct {
	// Addr is host:port, of the primary endpoint or the configuration endpoint. TLS certificates are checked against
	// the host, so it should be a name.
	Addr string
	// Others are further addresses of the same service, each as good as Addr: the other nodes of a Tercet cluster. A
	// connection that is refused, or whose node does not serve, is made to the next.
	Others []string
	// TLS is nil for a plain connection.
	TLS *tls.Config
	// Username and Password log in; a password alone is the AUTH token of the default user.
	Username, Password string
	// IAM makes the password from AWS credentials instead.
	IAM *IAM
	// Mode is how the upstream is addressed; empty is Auto.
	Mode Mode
	// Database is selected in Single mode.
	Database int
}

// ParseTarget reads an upstream address: redis://, rediss://, valkey://, valkeys:// with [user[:password]@]host[:port][/database],
// or host:port alone. Several hosts,
// separated by commas, are nodes of one Tercet cluster. caFile names further trusted certificates.
func ParseTarget(s, caFile string) (Target, error) {
	var t Target
	if !strings.Contains(s, "://") {
		s = "redis://" + s
	}
	s, others := splitHosts(s)
	u, err := url.Parse(s)
	if err != nil {
		return t, errors.New("upstream: not an address of the form rediss://user:password@host:port")
	}
	host := u.Hostname()
	switch u.Scheme {
	case "redis", "valkey":
	case "rediss", "valkeys":
		t.TLS = &tls.Config{MinVersion: tls.VersionTLS12, ServerName: ""}
	default:
		return t, fmt.Errorf("upstream: scheme %q: want redis, rediss, valkey or valkeys", u.Scheme)
	}
	if host == "" {
		return t, errors.New("upstream: no host")
	}
	port := u.Port()
	if port == "" {
		port = "6379"
	}
	t.Addr = net.JoinHostPort(host, port)
	for _, a := range others {
		o, err := url.Parse("redis://" + a)
		if err != nil || o.Hostname() == "" || o.User != nil || o.Path != "" {
			return t, fmt.Errorf("upstream: %q among several addresses: want host:port", a)
		}
		if port = o.Port(); port == "" {
			port = "6379"
		}
		t.Others = append(t.Others, net.JoinHostPort(o.Hostname(), port))
	}
	if u.User != nil {
		t.Username = u.User.Username()
		t.Password, _ = u.User.Password()
		if t.Password == "" {
			// redis://secret@host is a password without a user in none of the clients; :secret@host is.
			if t.Username != "" {
				return t, errors.New("upstream: a user without a password; write redis://:PASSWORD@host for a password alone")
			}
		}
	}
	if path := strings.Trim(u.Path, "/"); path != "" {
		if t.Database, err = strconv.Atoi(path); err != nil || t.Database < 0 {
			return t, fmt.Errorf("upstream: database %q: want a number", path)
		}
	}
	if u.RawQuery != "" || u.Fragment != "" {
		return t, errors.New("upstream: nothing may follow the database; options are flags")
	}
	if caFile != "" {
		if t.TLS == nil {
			return t, errors.New("upstream: trusted certificates without TLS; write rediss://")
		}
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return t, fmt.Errorf("upstream: trusted certificates: %w", err)
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return t, fmt.Errorf("%s holds no certificate", caFile)
		}
		t.TLS.RootCAs = pool
	}
	return t, nil
}

// splitHosts takes all hosts but the first out of scheme://user:password@a:1,b:2,c:3/database.
func splitHosts(s string) (string, []string) {
	start := strings.Index(s, "://") + 3
	rest := s[start:]
	end := len(rest)
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		end = i
	}
	if i := strings.LastIndexByte(rest[:end], '@'); i >= 0 {
		start, rest, end = start+i+1, rest[i+1:], end-i-1
	}
	hosts := strings.Split(rest[:end], ",")
	return s[:start] + hosts[0] + rest[end:], hosts[1:]
}

// String is the target without its secrets.
func (t Target) String() string {
	scheme := "redis://"
	if t.TLS != nil {
		scheme = "rediss://"
	}
	if t.Username != "" {
		scheme += t.Username + "@"
	}
	return scheme + strings.Join(append([]string{t.Addr}, t.Others...), ",")
}

// options are the client's for this target.
func (t Target) options() valkey.ClientOption {
	o := valkey.ClientOption{
		InitAddress: []string{t.Addr},
		TLSConfig:   t.TLS,
		Username:    t.Username,
		Password:    t.Password,
		SelectDB:    t.Database,
		ClientName:  "tercet-gateway",
		// Nothing is cached: every answer is about the present. Buffers are per connection, and every waiting topic
		// has one.
		DisableCache:        true,
		ReadBufferEachConn:  32 << 10,
		WriteBufferEachConn: 32 << 10,
		// A write whose connection broke is the caller's to judge.
		DisableRetry:      true,
		ConnWriteTimeout:  10 * time.Second,
		BlockingPoolSize:  4096,
		ForceSingleClient: t.Mode == Single,
		Dialer:            net.Dialer{Timeout: 5 * time.Second, KeepAlive: time.Second},
	}
	if t.IAM != nil {
		o.AuthCredentialsFn = t.IAM.credentials
		o.Username, o.Password = "", ""
	}
	return o
}

// Dial connects to the upstream, at the first of its addresses that answers.
func (t Target) Dial() (valkey.Client, error) {
	c, _, err := t.dialFrom(0)
	return c, err
}

// dialFrom connects to one of the addresses, trying them in turn from the given one on, and returns which it was.
func (t Target) dialFrom(turn int) (valkey.Client, int, error) {
	addrs := append([]string{t.Addr}, t.Others...)
	var first error
	for i := range addrs {
		at := (turn + i) % len(addrs)
		t.Addr = addrs[at]
		c, err := t.dialOne()
		if err == nil {
			return c, at, nil
		}
		if first == nil {
			first = err
		}
	}
	return nil, 0, first
}

func (t Target) dialOne() (valkey.Client, error) {
	o := t.options()
	if t.Mode == Cluster {
		// Two addresses make the client insist on cluster mode; the second is the first again.
		o.InitAddress = []string{t.Addr, t.Addr}
	}
	c, err := valkey.NewClient(o)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to %s: %w%s", t, err, t.advice(err))
	}
	return c, nil
}

// advice is what usually helps against a failure to connect, empty for nothing in particular.
func (t Target) advice(err error) string {
	var dns *net.DNSError
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	switch {
	case errors.As(err, &authority):
		return "; if the authority is your own, name its certificate with --upstream-ca"
	case errors.As(err, &name):
		return "; use the endpoint's name, which its certificate is for"
	case refusedLogin(err) && t.IAM != nil:
		return "; see that the cache's name, the user and the region are right, that the role may elasticache:Connect to both cache and user, and that --iam-serverless is given for a serverless cache"
	case refusedLogin(err):
		return "; see that user and password of the address are right (a password alone is written redis://:PASSWORD@host)"
	case errors.As(err, &dns):
		return "; the names of caches are known inside their VPC only: connect from there, or share its DNS"
	case neverSent(err):
		return "; see that address and port are right, and that the cache's security group admits this machine"
	case t.TLS == nil && broken(err):
		return "; a server with encryption in transit closes plain connections: write rediss://"
	}
	return ""
}

// Upstream holds the client and replaces it when the primary has moved: the address is a name, and only a new
// connection follows it. It is safe for concurrent use.
type Upstream struct {
	target   Target
	log      hclog.Logger
	current  atomic.Pointer[clientRef]
	retiring sync.WaitGroup
	mu       sync.Mutex // held while replacing
	turn     int        // which of the addresses the present client was dialled at
	closed   bool
}

// clientRef is a client and who uses it: calls hold the lock for reading, so that a replaced client is closed when the
// last of them has returned. Closing it under a call would make that call's outcome unknowable.
type clientRef struct {
	valkey.Client
	users sync.RWMutex
	since time.Time
}

// retire closes the client once nobody uses it.
func (r *clientRef) retire() {
	r.users.Lock()
	defer r.users.Unlock()
	r.Client.Close()
}

// use runs f with the client.
func (r *clientRef) use(f func(valkey.Client) error) error {
	r.users.RLock()
	defer r.users.RUnlock()
	return f(r.Client)
}

// Connect dials a target.
func Connect(t Target, log hclog.Logger) (*Upstream, error) {
	c, turn, err := t.dialFrom(0)
	if err != nil {
		return nil, err
	}
	u := &Upstream{target: t, log: log, turn: turn}
	u.current.Store(&clientRef{Client: c, since: time.Now()})
	return u, nil
}

// redialEvery keeps a primary that refuses for long from being dialled by every request.
const redialEvery = 200 * time.Millisecond

// replace dials anew unless somebody else has since old was handed out.
func (u *Upstream) replace(old *clientRef, why error) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return errClosed
	}
	if u.current.Load() != old || time.Since(old.since) < redialEvery {
		return nil
	}
	c, turn, err := u.target.dialFrom(u.turn + 1)
	if err != nil {
		return err
	}
	u.turn = turn
	u.log.Warn("dialled the upstream anew", "upstream", u.target.String(), "reason", why)
	u.current.Store(&clientRef{Client: c, since: time.Now()})
	u.retiring.Add(1)
	go func() {
		defer u.retiring.Done()
		old.retire()
	}()
	return nil
}

// Close disconnects once the calls that run have returned.
func (u *Upstream) Close() {
	u.mu.Lock()
	first := !u.closed
	u.closed = true
	u.mu.Unlock()
	if first {
		u.current.Load().retire()
	}
	u.retiring.Wait()
}

var errClosed = errors.New("the gateway is closed")

// moved reports whether an error says that the server is not, or not yet, the one to write to. Nothing was done.
func moved(err error) bool {
	ve, ok := valkey.IsValkeyErr(err)
	if !ok {
		return false
	}
	text := ve.Error()
	for _, p := range []string{"READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "UNBLOCKED"} {
		if strings.HasPrefix(text, p) {
			return true
		}
	}
	return false
}

// passing reports whether an error says that the same server will take the request in a moment: a slot that is on its
// way to another shard, a data set that is loading, an election of the cluster's own.
func passing(err error) bool {
	ve, ok := valkey.IsValkeyErr(err)
	return ok && (ve.IsTryAgain() || ve.IsLoading() || ve.IsClusterDown())
}

// refusedLogin reports whether credentials were refused, which for IAM means that the token was too old.
func refusedLogin(err error) bool {
	ve, ok := valkey.IsValkeyErr(err)
	return ok && (strings.HasPrefix(ve.Error(), "WRONGPASS") || strings.HasPrefix(ve.Error(), "NOAUTH"))
}

// Use runs f once with the present client. When f says that the connection broke, or that the server is not the one to
// write to any more, the next call has a new client.
func (u *Upstream) Use(f func(valkey.Client) error) error {
	ref := u.current.Load()
	err := ref.use(f)
	if err != nil && !valkey.IsValkeyNil(err) && (moved(err) && (!passing(err) || len(u.target.Others) > 0) || refusedLogin(err) || broken(err)) {
		u.replaceQuietly(ref, err)
	}
	return err
}

// Unreachable reports whether an error says that nobody answers at an address, as opposed to somebody who refuses.
func Unreachable(err error) bool { return broken(err) }

// broken reports whether an error came from the connection.
func broken(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, valkey.ErrClosing)
}

// call runs f until it succeeds, is refused for good, or ctx ends. A refusal that did nothing (moved, no connection)
// is repeated on a new client. repeatable says that f may be repeated even when the connection broke while it ran.
func (u *Upstream) call(ctx context.Context, repeatable bool, f func(valkey.Client) error) error {
	delay := 20 * time.Millisecond
	for {
		ref := u.current.Load()
		err := ref.use(f)
		switch {
		case err == nil:
			return nil
		case moved(err), refusedLogin(err), neverSent(err):
		case ctx.Err() != nil:
			return unknownOr(repeatable, err)
		case isServerError(err):
			return u.serverError(err)
		case !repeatable:
			u.replaceQuietly(ref, err)
			return errs.New(errs.OutcomeUnknown, "the connection to the upstream broke while it worked: %v", err)
		}
		if !passing(err) {
			if e := u.replace(ref, err); e != nil && u.isClosed() {
				return errs.Of(errs.Draining)
			}
		}
		timer := time.NewTimer(delay)
		select {
		case <-ctx.Done():
			timer.Stop()
			return errs.New(errs.NoLeader, "the upstream does not take requests: %v", err)
		case <-timer.C:
		}
		delay = min(2*delay, time.Second)
	}
}

func (u *Upstream) replaceQuietly(ref *clientRef, why error) {
	if err := u.replace(ref, why); err != nil {
		u.log.Debug("cannot dial the upstream", "upstream", u.target.String(), "error", err)
	}
}

func (u *Upstream) isClosed() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.closed
}

// unknownOr is what is said of a call that was given up while it ran.
func unknownOr(repeatable bool, err error) error {
	if repeatable {
		return errs.New(errs.NoLeader, "the upstream did not answer in time: %v", err)
	}
	return errs.New(errs.OutcomeUnknown, "the upstream did not answer in time: %v", err)
}

// neverSent reports whether the connection could not even be made.
func neverSent(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial" || errors.Is(err, valkey.ErrClosing)
}

func isServerError(err error) bool {
	_, ok := valkey.IsValkeyErr(err)
	return ok
}

// serverError words a refusal by the server.
func (u *Upstream) serverError(err error) error {
	text := err.Error()
	switch {
	case strings.HasPrefix(text, "OOM"):
		return errs.New(errs.Overloaded, "the upstream is out of memory: %s", text)
	case strings.HasPrefix(text, "NOREPLICAS"):
		return errs.New(errs.ZonesUnavailable, "the upstream has too few replicas: %s", text)
	case strings.HasPrefix(text, "NOPERM"):
		return errs.New(errs.Forbidden, "the upstream does not allow it: %s", text)
	case strings.Contains(text, "WRONGTYPE"):
		return errs.New(errs.Conflict, "the key holds something else than a stream")
	case strings.HasPrefix(text, "MISCONF"):
		return errs.New(errs.DiskFull, "the upstream cannot write to its disk: %s", text)
	}
	return errs.New(errs.Internal, "the upstream refused: %s", text)
}
