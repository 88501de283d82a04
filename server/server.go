package server

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/auth"
	"tercet.dev/tercet/server/wire"
)

// Options are what a Server is made with. Backend is required; the zero value of everything else means its
// default.
type Options struct {
	Backend Backend
	// Version is shown by /v1/node and the status page when the backend does not name one.
	Version string
	// Logger receives the server's log; the default discards it.
	Logger hclog.Logger
	// Registerer receives the server's metrics and Gatherer is what /metrics shows. The default for both is a
	// registry of the server's own.
	Registerer prometheus.Registerer
	Gatherer   prometheus.Gatherer
	// Authorizer tells who makes a request. Without one everything is allowed and an Authorization header is
	// accepted and ignored.
	Authorizer Authorizer
	// Contact keeps the messages of the contact-form template's routes, /api/messages/…; without it there are none.
	Contact ContactStore
	// Worth is what a publish is worth where it is not a matter of zones: answers say it (Tercet-Durability) instead of
	// zones, position and term.
	Worth string
	// Extensions add paths below /v1.
	Extensions []Extension
	// Spool is a directory for the bodies of batches that are not held in memory; without one there are none, and no message
	// of a batch is stored in parts.
	Spool string
	// PublicHosts are host names, besides IP literals and localhost, that requests may be addressed to.
	PublicHosts []string
	// VirtualClock offers POST /v1/clock/advance.
	VirtualClock bool
	// TLS makes the listeners speak TLS, and HTTP/2 with clients that negotiate it where NextProtos offers it.
	TLS *tls.Config
	// H2C offers HTTP/2 without TLS to clients that begin with it.
	H2C    bool
	Limits Limits
}

// Limits bound what clients can make the server hold. The zero value of a field means its default.
type Limits struct {
	// Connections bounds open connections, ConnectionsPerAddr those from one address (defaults 16384 and half).
	Connections, ConnectionsPerAddr int
	// Requests bounds requests whose command is being carried out, Waits those that wait for messages
	// (defaults 4096 and 8192).
	Requests, Waits int
	// InflightBytes bounds request bodies and answers in memory (default 64 MiB).
	InflightBytes int64
	// HeaderTimeout bounds the arrival of a request's head (default 5 s), IdleTimeout the silence between two
	// requests (2 min).
	HeaderTimeout, IdleTimeout time.Duration
	// BodyTimeout bounds the arrival of a body that comes in one piece (default 20 s).
	BodyTimeout time.Duration
	// TransferGrace and TransferRate are the slowest client that is served: after the grace (default 10 s) it
	// must have sent, or taken, TransferRate bytes a second (default 8 KiB).
	TransferGrace time.Duration
	TransferRate  int64
	// RequestTimeout is how long a command may be held, through an election for instance, before the request
	// fails (default 15 s). A wait for messages comes on top.
	RequestTimeout time.Duration
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
	def(&l.ConnectionsPerAddr, (l.Connections+1)/2)
	def(&l.Requests, 4096)
	def(&l.Waits, 8192)
	if l.InflightBytes <= 0 {
		l.InflightBytes = 64 << 20
	}
	defTime(&l.HeaderTimeout, 5*time.Second)
	defTime(&l.IdleTimeout, 2*time.Minute)
	defTime(&l.BodyTimeout, 20*time.Second)
	defTime(&l.TransferGrace, 10*time.Second)
	if l.TransferRate <= 0 {
		l.TransferRate = 8 << 10
	}
	defTime(&l.RequestTimeout, 15*time.Second)
}

// headerBytesMax bounds a request's head. net/http allows 4 KiB more than it is told.
const headerBytesMax = 60 << 10

// headerCountMax bounds the distinct headers of a request.
const headerCountMax = 256

// Access is what a request wants to do.
type Access = auth.Access

// The kinds of access. Health probes and the OpenAPI document ask for none.
const (
	Publish = auth.Publish
	Receive = auth.Receive
	Admin   = auth.Admin
	Look    = auth.Look
)

// someTopics marks the access of a path that names no topic itself: the handler shows only what the client may see.
const someTopics Access = 0x80

// An Authorizer tells who makes a request. *auth.Authenticator is one.
type Authorizer interface {
	// Authenticate returns whose request it is, nil while nobody has to say who they are, or an *errs.Error of code
	// Unauthorized. What they may do is the server's to check.
	Authenticate(r *http.Request) (*auth.Principal, error)
	// Required reports whether requests without credentials are refused.
	Required() bool
	// Ready returns nil once it can tell: until then the node is not ready.
	Ready() error
}

// Server answers HTTP for one node. It is an http.Handler; Serve runs it on listeners with the timeouts and
// bounds that the protocol needs.
//
// A stop has five steps, in this order: Drain (not ready any more, waiting receives are sent elsewhere), the
// node's Leave (nothing depends on it any more, requests are passed on), Linger (clients learn to go elsewhere),
// Shutdown (no new requests, those in flight finish) with the node's Drain, and the node's Close.
type Server struct {
	backend    Backend
	version    string
	log        hclog.Logger
	gatherer   prometheus.Gatherer
	authorizer Authorizer
	hosts      map[string]bool
	hostSeen   atomic.Pointer[string]
	keyed      atomic.Pointer[keyed]
	paths      adminPaths
	contact    ContactStore
	worth      string
	openAPI    func() (openAPI, error)
	rates      rates
	largeMax   int64 // bytes of a message in parts
	spool      string
	// batchBodyMax bounds the messages of a batch, where they may be stored in parts.
	batchBodyMax int64
	tls          *tls.Config
	virtual      bool
	limits       Limits
	load         load
	metrics      *metrics
	http         *http.Server

	idPrefix string
	idNext   atomic.Uint64

	// mu guards what Shutdown and Serve have in common.
	mu        sync.Mutex
	stopping  bool
	listeners []*listener

	// drained is done once Drain was called; waiting receives end with it.
	drained context.Context
	drain   context.CancelCauseFunc
}

// errDraining is the cause of waits that Drain ends.
var errDraining = errors.New("the server is draining")

// New makes a Server. It starts no goroutine.
func New(o Options) (*Server, error) {
	if o.Backend == nil {
		return nil, errors.New("server: no backend")
	}
	o.Limits.setDefaults()
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	if o.Registerer == nil || o.Gatherer == nil {
		registry := prometheus.NewRegistry()
		o.Registerer, o.Gatherer = registry, registry
	}
	s := &Server{
		backend:    o.Backend,
		version:    o.Version,
		log:        o.Logger,
		gatherer:   o.Gatherer,
		authorizer: o.Authorizer,
		hosts:      map[string]bool{"localhost": true},
		tls:        o.TLS,
		largeMax:   limits.LargeMessageBytesMax,
		spool:      o.Spool,
		contact:    o.Contact,
		worth:      o.Worth,
		virtual:    o.VirtualClock,
		limits:     o.Limits,
	}
	if s.spool != "" {
		s.batchBodyMax = s.largeMax
	}
	var err error
	if s.paths, err = ownPaths(); err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	for _, extension := range o.Extensions {
		for i := range extension.Routes {
			r := &extension.Routes[i]
			access := r.Access
			if r.Scoped {
				access |= someTopics
			}
			if err := s.paths.add(r.Method, r.Pattern, access, r.handler()); err != nil {
				return nil, fmt.Errorf("server: %w", err)
			}
		}
	}
	s.openAPI = sync.OnceValues(func() (openAPI, error) { return assembleOpenAPI(o.Extensions) })
	s.load.init(&s.limits)
	for _, h := range o.PublicHosts {
		s.hosts[normalHost(h)] = true
	}
	var random [5]byte
	rand.Read(random[:])
	s.idPrefix = hex.EncodeToString(random[:]) + "-"
	s.drained, s.drain = context.WithCancelCause(context.Background())
	if s.metrics, err = newMetrics(o.Registerer, s); err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	// TLS ends below net/http (see headConn): what it calls unencrypted is what comes out of that.
	protocols.SetUnencryptedHTTP2(o.H2C || o.TLS != nil)
	s.http = &http.Server{
		Handler:                      s,
		Protocols:                    &protocols,
		ReadHeaderTimeout:            s.limits.HeaderTimeout,
		ReadTimeout:                  s.limits.BodyTimeout,
		WriteTimeout:                 waitMax + s.limits.RequestTimeout + s.limits.BodyTimeout + s.limits.TransferGrace,
		IdleTimeout:                  s.limits.IdleTimeout,
		MaxHeaderBytes:               headerBytesMax,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     s.log.StandardLogger(&hclog.StandardLoggerOptions{ForceLevel: hclog.Debug}),
		ConnState:                    connState,
		ConnContext:                  connContext,
	}
	return s, nil
}

// Serve answers requests on the listener until Shutdown or Close, and then returns nil. The listener is closed.
func (s *Server) Serve(l net.Listener) error {
	bound, err := s.listen(l)
	if err != nil {
		return l.Close() // a stop has begun
	}
	err = s.http.Serve(bound)
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// exchange is one request and its answer.
type exchange struct {
	s     *Server
	w     http.ResponseWriter
	r     *http.Request
	start time.Time

	op      op
	outcome outcome
	// waits is set for a receive that may wait for messages: its duration says nothing.
	waits bool
	// close ends the connection after the answer.
	close bool
	// aborted ends the connection at once: what was written of the answer is not to be taken for all of it.
	aborted bool
	// allow lists the path's methods, for 405.
	allow string
	id    string

	// From the path, decoded and checked. tail is a message id or a receipt handle of the queue protocol; path and params
	// are those of /v1.
	topic, group, tail string
	path               *adminPath
	params             []string

	// principal is who asks; nil may do everything.
	principal *auth.Principal

	// bytes is what this request holds of the budget of bytes in memory.
	bytes int64
	// slot is set while this request holds one of the slots for commands.
	slot bool
}

var exchanges = sync.Pool{New: func() any { return new(exchange) }}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := exchanges.Get().(*exchange)
	*x = exchange{s: s, w: w, r: r, start: time.Now()}
	headRead(r)
	defer func() {
		if p := recover(); p != nil {
			// A mistake of ours costs this request and its connection, and is not kept quiet.
			if e, ok := p.(error); !ok || !errors.Is(e, http.ErrAbortHandler) {
				s.log.Error("panic in a request", "op", x.op.String(), "panic", p, "stack", string(debug.Stack()))
			}
			x.release()
			panic(http.ErrAbortHandler)
		}
	}()
	x.serve()
	x.release()
	s.metrics.observe(x)
	aborted := x.aborted
	*x = exchange{}
	exchanges.Put(x)
	if aborted {
		panic(http.ErrAbortHandler)
	}
}

// serve checks what every request has in common and hands it to its handler.
func (x *exchange) serve() {
	s, r := x.s, x.r
	if s.Draining() {
		x.w.Header()["Connection"] = connectionClose
		x.close = true
	}
	if len(r.Header) > headerCountMax {
		x.close = true
		x.fail(errs.New(errs.BadRequest, "more than %d headers", headerCountMax))
		return
	}
	handle, access, e := x.route()
	if e == nil {
		e = s.checkHost(r)
	}
	if e == nil {
		e = checkOrigin(r)
	}
	if e == nil && s.authorizer != nil && access != 0 {
		e = x.authorize(access)
	}
	if e != nil {
		x.fail(e)
		return
	}
	handle(x)
	if x.path != nil && r.Method != http.MethodGet && r.Method != http.MethodHead {
		x.audit()
	}
}

// audit leaves a line in the log for every change that was asked for below /v1.
func (x *exchange) audit() {
	who := "anybody"
	if x.principal != nil {
		who = x.principal.Name
	}
	at := make([]any, 0, 16)
	at = append(at, "who", strconv.Quote(who), "did", x.r.Method+" "+x.path.pattern, "outcome", outcomeNames[x.outcome], "request_id", x.requestID())
	i := 0
	for _, s := range x.path.segments {
		if variable(s) {
			at = append(at, s[1:len(s)-1], strconv.Quote(x.params[i]))
			i++
		}
	}
	x.s.log.Info("audit", at...)
}

// authorize finds out who asks and whether they may.
func (x *exchange) authorize(access Access) *errs.Error {
	p, err := x.s.authorizer.Authenticate(x.r)
	if err != nil {
		return errs.From(err)
	}
	x.principal = p
	allowed := false
	if access&someTopics != 0 {
		allowed = p.AllowsSome(access)
	} else {
		allowed = p.Allows(access, x.topic)
	}
	if !allowed {
		return errs.Of(errs.Forbidden)
	}
	if wait := p.Request(time.Now()); wait > 0 {
		e := errs.Of(errs.RateLimited)
		e.RetryAfter = wait
		return e
	}
	return nil
}

// meter counts n bytes about to be published against the token's bounds.
func (x *exchange) meter(n int) *errs.Error {
	if x.principal == nil {
		return nil
	}
	wait, quota := x.principal.Publish(time.Now(), int64(n))
	if wait == 0 {
		return nil
	}
	e := errs.Of(errs.RateLimited)
	if quota {
		e = errs.Of(errs.QuotaExceeded)
	}
	e.RetryAfter = wait
	return e
}

// requestID returns the id by which the log and the client know this request: the client's own X-Request-Id when it
// is short and plain, else one of ours.
func (x *exchange) requestID() string {
	if x.id == "" {
		if v := x.r.Header[wire.HeaderRequestID]; len(v) == 1 && saneID(v[0]) {
			x.id = v[0]
		} else {
			x.id = x.s.idPrefix + strconv.FormatUint(x.s.idNext.Add(1), 36)
		}
	}
	return x.id
}

func saneID(s string) bool {
	if len(s) == 0 || len(s) > 128 {
		return false
	}
	for i := 0; i < len(s); i++ {
		if c := s[i]; c <= ' ' || c >= 0x7f || c == '"' || c == '\\' || c == '<' {
			return false
		}
	}
	return true
}

// commandContext returns a context for carrying the request's command out.
func (x *exchange) commandContext() (context.Context, context.CancelFunc) {
	return context.WithTimeout(x.r.Context(), x.s.limits.RequestTimeout)
}

// Header values that never change. net/http only reads them.
var (
	jsonType        = []string{wire.MediaJSON}
	ndjsonType      = []string{wire.MediaNDJSON}
	batchType       = []string{wire.MediaBatch}
	noStore         = []string{"no-store"}
	noSniff         = []string{"nosniff"}
	connectionClose = []string{"close"}
)
