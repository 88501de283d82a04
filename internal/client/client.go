// Package client speaks the HTTP protocol of Tercet: the queue protocol and /v1. The command line and the tests use
// it.
//
// A Client knows several servers of one cluster and uses one until it does not answer. What a server refused
// without having done anything is tried again, at the next server first; what may have been done is tried again
// only where that cannot do it twice. Errors are *Error and say which of the two it was.
package client

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/wire"
)

// Options are what a Client is made with.
type Options struct {
	// Servers are addresses ("127.0.0.1:7301") or base URLs of members of one cluster. At least one.
	Servers []string
	// Token is sent as a bearer token when it is not empty.
	Token string
	// UserAgent is what requests say they come from; the default is "tercet".
	UserAgent string
	// Patience is how long refusals that did nothing are tried again (default 15 s, negative: never).
	Patience time.Duration
	// TLS is used for https servers.
	TLS *tls.Config
	// Transport replaces the client's own, with its timeouts and its pool of connections.
	Transport http.RoundTripper
}

// Client is safe for concurrent use.
type Client struct {
	bases    []*url.URL
	current  atomic.Uint32
	token    string
	agent    string
	patience time.Duration
	http     http.Client
	own      *http.Transport // nil when Options.Transport was given
}

// New makes a Client. It opens no connection.
func New(o Options) (*Client, error) {
	c := &Client{token: o.Token, agent: o.UserAgent, patience: o.Patience}
	for _, s := range o.Servers {
		if !strings.Contains(s, "://") {
			s = "http://" + s
		}
		u, err := url.Parse(s)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return nil, fmt.Errorf("server %q: want HOST:PORT or an http or https URL", s)
		}
		u.Path = strings.TrimRight(u.Path, "/")
		c.bases = append(c.bases, u)
	}
	if len(c.bases) == 0 {
		return nil, errors.New("no server named")
	}
	if c.agent == "" {
		c.agent = "tercet"
	}
	if c.patience == 0 {
		c.patience = 15 * time.Second
	}
	if c.http.Transport = o.Transport; o.Transport == nil {
		dialer := &net.Dialer{Timeout: 3 * time.Second}
		c.own = &http.Transport{
			DialContext:         dialer.DialContext,
			TLSClientConfig:     o.TLS,
			TLSHandshakeTimeout: 5 * time.Second,
			MaxIdleConns:        4096,
			MaxIdleConnsPerHost: 1024,
			IdleConnTimeout:     90 * time.Second,
			DisableCompression:  true,
		}
		c.http.Transport = c.own
	}
	// A node passes requests on itself and never redirects; following one could lose the token.
	c.http.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return c, nil
}

// Close closes idle connections.
func (c *Client) Close() {
	if c.own != nil {
		c.own.CloseIdleConnections()
	}
}

// Server returns the base URL of the server in use.
func (c *Client) Server() string { return c.bases[c.index()].String() }

func (c *Client) index() int { return int(c.current.Load() % uint32(len(c.bases))) }

// Error is a request that failed.
type Error struct {
	// Status is the HTTP status, 0 when no answer arrived.
	Status int
	// Code is the stable name of the catalogue, empty when the answer named none.
	Code string
	// Outcome is errs.None when nothing happened and nothing will, errs.Unknown when it may have.
	Outcome errs.Outcome
	Message string
	Hint    string
	// RequestID finds the request in the server's log.
	RequestID string
	// RetryAfter is when the server advises to come back, 0 for no advice.
	RetryAfter time.Duration
	// Body is the parsed error document, with the members some codes add.
	Body wire.Error
	// Server is the base URL that was asked.
	Server string
	Cause  error
	// handshake: TLS came to nothing, so nothing was sent, and trying again does not help.
	handshake bool
}

// Error implements error.
func (e *Error) Error() string {
	text := e.Message
	if text == "" && e.Status != 0 {
		text = fmt.Sprintf("%s answered %d %s", e.Server, e.Status, http.StatusText(e.Status))
	}
	if e.Cause != nil {
		if text != "" {
			text += ": "
		}
		text += e.Cause.Error()
	}
	return text
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// Is makes errors.Is match errors of the catalogue by their code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*errs.Error)
	return ok && e.Code != "" && t.Code.String() == e.Code
}

// transient reports whether the refusal is over in a moment by itself, so that the same request may then succeed.
func (e *Error) transient() bool {
	if e.Outcome != errs.None {
		return false
	}
	switch e.Code {
	case errs.NotLeader.String(), errs.NoLeader.String(), errs.Draining.String(), errs.Overloaded.String():
		return true
	case "":
		return e.Status == 0 || e.Status == http.StatusTooManyRequests || e.Status == http.StatusServiceUnavailable
	}
	return false
}

// request is one call.
type request struct {
	method, path string
	header       http.Header
	body         []byte
	// repeatable: doing it twice does no harm, so it is tried again even when it may have been done.
	repeatable bool
	// only: ask the server in use and no other, once.
	only bool
}

// pauseMax bounds a pause between attempts, whatever a server advises.
const pauseMax = 5 * time.Second

// do carries a request out. The answer has a 2xx status; its body is the caller's to close. unknown reports that an
// earlier attempt may have been carried out.
func (c *Client) do(ctx context.Context, q request) (res *http.Response, unknown bool, err error) {
	begun := time.Now()
	for attempt := 0; ; attempt++ {
		at := c.current.Load()
		base := c.bases[at%uint32(len(c.bases))]
		res, e := c.once(ctx, base, q)
		if e == nil {
			return res, unknown, nil
		}
		if e.Outcome == errs.Unknown {
			unknown = true
		}
		again := e.transient() || e.Outcome == errs.Unknown && q.repeatable
		if !again || q.only || ctx.Err() != nil || c.patience < 0 {
			return nil, unknown, final(e, unknown)
		}
		// Whoever fails first moves everybody on to the next server.
		c.current.CompareAndSwap(at, at+1)
		if (attempt+1)%len(c.bases) != 0 {
			continue
		}
		if e.handshake {
			return nil, unknown, final(e, unknown)
		}
		pause := min(max(e.RetryAfter, 100*time.Millisecond), pauseMax)
		pause += time.Duration(rand.Int64N(int64(pause)/4 + 1))
		if time.Since(begun)+pause > c.patience {
			return nil, unknown, final(e, unknown)
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, unknown, final(e, unknown)
		}
	}
}

// final is the error of a request that is given up: what an earlier attempt left open stays open.
func final(e *Error, unknown bool) *Error {
	if unknown && e.transient() {
		e.Outcome = errs.Unknown
	}
	return e
}

// once makes one attempt at one server.
func (c *Client) once(ctx context.Context, base *url.URL, q request) (*http.Response, *Error) {
	var body io.Reader
	if len(q.body) > 0 {
		body = bytes.NewReader(q.body)
	}
	req, err := http.NewRequestWithContext(ctx, q.method, base.String()+q.path, body)
	if err != nil {
		return nil, &Error{Outcome: errs.None, Server: base.String(), Cause: err}
	}
	if q.header != nil {
		req.Header = q.header.Clone()
	}
	req.Header["User-Agent"] = []string{c.agent}
	if c.token != "" {
		req.Header["Authorization"] = []string{"Bearer " + c.token}
	}
	res, err := c.http.Do(req)
	if err != nil {
		e := &Error{Outcome: errs.Unknown, Server: base.String(), Cause: err}
		if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
			e.Outcome = errs.None
		}
		if q.method == http.MethodGet {
			e.Outcome = errs.None
		}
		if e.Hint = handshakeHint(err); e.Hint != "" {
			e.Outcome, e.handshake = errs.None, true
		}
		return nil, e
	}
	if res.StatusCode >= 200 && res.StatusCode < 300 {
		return res, nil
	}
	defer res.Body.Close()
	return nil, errorOf(res, base.String())
}

// handshakeHint says what to do about a TLS handshake that one side refused; it is empty for all other errors.
func handshakeHint(err error) string {
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return "name the authority of the server's certificate with --ca (TERCET_CA), and the server by a name that the certificate has"
	}
	if errors.Is(err, http.ErrSchemeMismatch) {
		return "this port speaks no TLS: use http:// in the address"
	}
	// An alert about the client's certificate, or the lack of one; crypto/tls has no type for it.
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "remote error" && strings.Contains(op.Err.Error(), "certificate") {
		return "present a certificate that the server's --tls-client-ca signed, with --cert and --key (TERCET_CERT, TERCET_KEY)"
	}
	return ""
}

// errorBytesMax bounds how much of an error's body is read.
const errorBytesMax = 64 << 10

// errorOf reads an answer that is an error.
func errorOf(res *http.Response, server string) *Error {
	e := &Error{Status: res.StatusCode, Server: server, RequestID: res.Header.Get(wire.HeaderRequestID)}
	if s, err := strconv.ParseUint(res.Header.Get("Retry-After"), 10, 32); err == nil {
		e.RetryAfter = time.Duration(s) * time.Second
	}
	data, _ := io.ReadAll(io.LimitReader(res.Body, errorBytesMax))
	if json.Unmarshal(data, &e.Body) == nil {
		e.Code, e.Message, e.Hint, e.Outcome = e.Body.Code, e.Body.Error, e.Body.Hint, errs.Outcome(e.Body.Outcome)
		e.RequestID = cmp.Or(e.RequestID, e.Body.RequestID)
	}
	if e.Outcome == "" {
		// A 4xx means "did not happen", from whoever it comes.
		e.Outcome = errs.Unknown
		if res.StatusCode < 500 || res.StatusCode == http.StatusServiceUnavailable {
			e.Outcome = errs.None
		}
	}
	return e
}

// json carries a request out and decodes its answer. A nil document is for answers without one.
func (c *Client) json(ctx context.Context, q request, document any) error {
	res, _, err := c.do(ctx, q)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	return decode(res, document)
}

func decode(res *http.Response, document any) error {
	if document == nil {
		_, err := io.Copy(io.Discard, io.LimitReader(res.Body, errorBytesMax))
		return err
	}
	if err := json.NewDecoder(res.Body).Decode(document); err != nil {
		return &Error{Status: res.StatusCode, Outcome: errs.Unknown, Message: "the answer could not be read", Cause: err}
	}
	return nil
}
