package server

import (
	"net/http"
	"net/netip"
	"net/url"
	"strings"

	"tercet.dev/tercet/internal/errs"
)

// handler answers a request whose path, host and rights have been checked.
type handler func(*exchange)

const (
	topicPrefix = "/api/v3/topic/"
	adminPrefix = "/v1/"
)

// route finds the handler of the request's method and path, and what access it needs. Paths are taken as they
// are: nothing is cleaned, joined or redirected, so that a name never means another path.
func (x *exchange) route() (handler, Access, *errs.Error) {
	// RawPath is set when the path holds an escape that decoding would hide, %2F above all. Splitting comes
	// first and decoding second.
	path, escaped := x.r.URL.Path, false
	if raw := x.r.URL.RawPath; raw != "" {
		path, escaped = raw, true
	}
	if rest, ok := strings.CutPrefix(path, topicPrefix); ok {
		return x.routeTopic(rest, escaped)
	}
	if rest, ok := strings.CutPrefix(path, contactPrefix); ok && x.s.contact != nil {
		return x.routeContact(rest)
	}
	if rest, ok := strings.CutPrefix(path, adminPrefix); ok {
		return x.routeAdmin(rest, escaped)
	}
	switch path {
	case "/livez":
		return x.methods(opHealth, 0, "GET, HEAD", (*exchange).livez)
	case "/readyz":
		return x.methods(opHealth, 0, "GET, HEAD", (*exchange).readyz)
	case "/healthz":
		return x.methods(opHealth, 0, "GET, HEAD", (*exchange).healthz)
	case "/metrics":
		return x.methods(opOther, Look, "GET, HEAD", (*exchange).showMetrics)
	case "/metrics/topics":
		return x.methods(opOther, Look|someTopics, "GET, HEAD", (*exchange).topicMetrics)
	case "/":
		return x.methods(opOther, Look, "GET, HEAD", (*exchange).statusPage)
	}
	x.op = opOther
	return nil, 0, errs.Of(errs.NotFound)
}

// methods refuses a method that the path does not take. allow is the value of the Allow header.
func (x *exchange) methods(o op, access Access, allow string, h handler) (handler, Access, *errs.Error) {
	x.op = o
	if m := x.r.Method; m == allow || strings.Contains(allow, ", ") && methodIn(m, allow) {
		return h, access, nil
	}
	x.allow = allow
	return nil, 0, errs.New(errs.MethodNotAllowed, "the path takes %s", allow)
}

func methodIn(method, allow string) bool {
	for allow != "" {
		var m string
		m, allow, _ = strings.Cut(allow, ", ")
		if m == method {
			return true
		}
	}
	return false
}

// segments cuts path into at most len(out) segments, decodes them, and returns their number. More segments, or an
// escape that is none, give -1.
func segments(path string, escaped bool, out []string) int {
	n := 0
	for more := true; more; n++ {
		if n == len(out) {
			return -1
		}
		out[n], path, more = strings.Cut(path, "/")
		if escaped {
			s, err := url.PathUnescape(out[n])
			if err != nil {
				return -1
			}
			out[n] = s
		}
	}
	return n
}

// routeTopic routes below /api/v3/topic/.
func (x *exchange) routeTopic(rest string, escaped bool) (handler, Access, *errs.Error) {
	var seg [6]string
	n := segments(rest, escaped, seg[:])
	x.topic = seg[0]
	var h handler
	var access Access
	var e *errs.Error
	switch {
	case n == 1:
		h, access, e = x.methods(opSend, Publish, "POST", (*exchange).send)
	case n == 2 && seg[1] == "batch":
		h, access, e = x.methods(opBatch, Publish, "POST", (*exchange).sendBatch)
	case n >= 3 && seg[1] == "consumer":
		x.group = seg[2]
		switch {
		case n == 3:
			h, access, e = x.methods(opReceive, Receive, "POST", (*exchange).receive)
		case n == 5 && seg[3] == "id":
			x.tail = seg[4]
			h, access, e = x.methods(opReceiveID, Receive, "POST", (*exchange).receiveID)
		case n == 5 && seg[3] == "lease":
			x.tail = seg[4]
			if x.r.Method == http.MethodPatch {
				h, access, e = x.methods(opExtend, Receive, "PATCH", (*exchange).extend)
			} else {
				h, access, e = x.methods(opAcknowledge, Receive, "DELETE, PATCH", (*exchange).acknowledge)
			}
		case n == 6 && seg[3] == "lease" && seg[5] == "visibility":
			x.tail = seg[4]
			h, access, e = x.methods(opExtend, Receive, "PATCH", (*exchange).extend)
		}
	}
	if e != nil {
		return nil, 0, e
	}
	if h == nil {
		x.op = opOther
		return nil, 0, errs.Of(errs.NotFound)
	}
	if !validName(x.topic) {
		return nil, 0, errs.New(errs.InvalidName, "the topic's name is not valid")
	}
	if n >= 3 && !validName(x.group) {
		return nil, 0, errs.New(errs.InvalidName, "the consumer group's name is not valid")
	}
	return h, access, nil
}

// checkHost refuses a request addressed to a host that is not this node. A page in a browser can make a name of its
// own resolve to 127.0.0.1 (DNS rebinding), but it cannot change the Host header. Where authentication is required, whoever has
// no token gets nowhere anyway, and the names a proxy uses need not be known here.
func (s *Server) checkHost(r *http.Request) *errs.Error {
	if s.authorizer != nil && s.authorizer.Required() {
		return nil
	}
	if seen := s.hostSeen.Load(); seen != nil && *seen == r.Host {
		return nil
	}
	host := normalHost(r.Host)
	if _, err := netip.ParseAddr(host); err != nil && !s.hosts[host] {
		return errs.New(errs.MisdirectedHost, "this node does not answer for the host named in the request")
	}
	h := strings.Clone(r.Host)
	s.hostSeen.Store(&h)
	return nil
}

// normalHost cuts the port and a final dot, and the brackets of an IPv6 literal.
func normalHost(host string) string {
	if i := strings.LastIndexByte(host, ':'); i >= 0 && (strings.HasSuffix(host[:i], "]") || strings.IndexByte(host, ':') == i) {
		host = host[:i]
	}
	if len(host) > 1 && host[0] == '[' && host[len(host)-1] == ']' {
		host = host[1 : len(host)-1]
	}
	return strings.ToLower(strings.TrimSuffix(host, "."))
}

// checkOrigin refuses requests that change something and that a browser made on behalf of another site's page.
// Clients that are no browsers send neither header, or do not lie about it.
func checkOrigin(r *http.Request) *errs.Error {
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		return nil
	}
	if site := r.Header["Sec-Fetch-Site"]; len(site) > 0 {
		if site[0] == "same-origin" || site[0] == "none" {
			return nil
		}
	} else if origin := r.Header["Origin"]; len(origin) == 0 {
		return nil
	} else if _, host, ok := strings.Cut(origin[0], "://"); ok && strings.EqualFold(host, r.Host) {
		return nil
	}
	return errs.New(errs.Forbidden, "requests from another site's page are refused")
}
