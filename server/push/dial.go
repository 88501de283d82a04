package push

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"syscall"
	"time"
)

// A Guard decides which addresses pushes may go to. It is asked when a connection is dialled, about the address that
// was resolved, so that a name cannot point elsewhere after it was checked, and redirects, which are not followed,
// could not either.
type Guard struct {
	// Allow lists networks that pushes may go to although they are not public, and may go to without TLS.
	Allow []netip.Prefix
	// Own returns the addresses of the cluster's nodes: a push to one of them would act with the rights of
	// whoever is inside.
	Own func() []netip.AddrPort
}

// ParseAllow reads the value of --push-allow: networks, or single addresses.
func ParseAllow(list []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range list {
		if addr, err := netip.ParseAddr(s); err == nil {
			out = append(out, netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()))
			continue
		}
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("%q is neither a network such as 10.1.0.0/16 nor an address", s)
		}
		out = append(out, p.Masked())
	}
	return out, nil
}

// BlockedError is a push that was not sent because of where it would have gone.
type BlockedError struct {
	Addr   netip.AddrPort
	Reason string
}

// Error implements error.
func (e *BlockedError) Error() string {
	return fmt.Sprintf("pushes may not go to %s: %s", e.Addr, e.Reason)
}

// Networks that are not the public internet, besides what netip knows by name.
var special = []struct {
	prefix netip.Prefix
	reason string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "not a public address"},
	{netip.MustParsePrefix("100.64.0.0/10"), "a carrier's private address (CGNAT)"},
	{netip.MustParsePrefix("192.0.0.0/24"), "not a public address"},
	{netip.MustParsePrefix("192.0.2.0/24"), "a documentation address"},
	{netip.MustParsePrefix("192.88.99.0/24"), "a relay address"},
	{netip.MustParsePrefix("198.18.0.0/15"), "a benchmarking address"},
	{netip.MustParsePrefix("198.51.100.0/24"), "a documentation address"},
	{netip.MustParsePrefix("203.0.113.0/24"), "a documentation address"},
	{netip.MustParsePrefix("240.0.0.0/4"), "a reserved address"},
	{netip.MustParsePrefix("::/96"), "an IPv4-compatible address"},
	{netip.MustParsePrefix("64:ff9b::/96"), "a NAT64 address"},
	{netip.MustParsePrefix("64:ff9b:1::/48"), "a NAT64 address"},
	{netip.MustParsePrefix("100::/64"), "a discard address"},
	{netip.MustParsePrefix("2001::/23"), "a protocol's address"},
	{netip.MustParsePrefix("2001:db8::/32"), "a documentation address"},
	{netip.MustParsePrefix("2002::/16"), "a 6to4 address"},
	{netip.MustParsePrefix("fec0::/10"), "a site-local address"},
}

// private says why an address is not one of the public internet, or nothing.
func private(a netip.Addr) string {
	switch {
	case !a.IsValid(), a.IsUnspecified():
		return "an unspecified address"
	case a.IsLoopback():
		return "a loopback address"
	case a.IsPrivate():
		return "a private address"
	case a.IsLinkLocalUnicast():
		return "a link-local address"
	case a.IsMulticast():
		return "a multicast address"
	}
	for _, s := range special {
		if s.prefix.Contains(a) {
			return s.reason
		}
	}
	if !a.IsGlobalUnicast() {
		return "not a public address"
	}
	return ""
}

// Check decides about one resolved address. The zone of an IPv6 address does not matter to it.
func (g *Guard) Check(addr netip.AddrPort, tls bool) error {
	a := addr.Addr().WithZone("").Unmap()
	addr = netip.AddrPortFrom(a, addr.Port())
	if p := addr.Port(); p != 80 && p != 443 && p <= 1023 {
		return &BlockedError{addr, fmt.Sprintf("port %d is a system port; use 80, 443 or one above 1023", p)}
	}
	if g.Own != nil {
		for _, own := range g.Own() {
			same := own.Addr() == a || own.Addr().IsLoopback() && a.IsLoopback()
			if same && own.Port() == addr.Port() {
				return &BlockedError{addr, "a node of this cluster"}
			}
		}
	}
	for _, p := range g.Allow {
		if p.Contains(a) {
			return nil
		}
	}
	if reason := private(a); reason != "" {
		return &BlockedError{addr, reason + " that --push-allow does not name"}
	}
	if !tls {
		return &BlockedError{addr, "without TLS only to what --push-allow names"}
	}
	return nil
}

// CheckURL checks what can be known of a URL before it is dialled, and returns it parsed.
func (g *Guard) CheckURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	switch {
	case err != nil:
		return nil, errors.New("the URL is not well formed")
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, errors.New("the URL must begin with https://, or http:// for what --push-allow names")
	case u.Host == "" || u.Hostname() == "" || u.Opaque != "":
		return nil, errors.New("the URL names no host")
	case u.User != nil:
		return nil, errors.New("the URL must hold no user or password; use bearerToken")
	case u.Fragment != "" || u.RawFragment != "":
		return nil, errors.New("the URL must have no fragment")
	}
	port := uint64(443)
	if u.Scheme == "http" {
		port = 80
		if len(g.Allow) == 0 {
			return nil, errors.New("pushes without TLS are allowed only to what --push-allow names, and it names nothing")
		}
	}
	if p := u.Port(); p != "" {
		if port, err = strconv.ParseUint(p, 10, 16); err != nil || port == 0 {
			return nil, errors.New("the URL's port is not valid")
		}
	}
	if addr, err := netip.ParseAddr(u.Hostname()); err == nil {
		if err := g.Check(netip.AddrPortFrom(addr, uint16(port)), u.Scheme == "https"); err != nil {
			return nil, err
		}
	}
	return u, nil
}

// Bounds of the steps of a request that have nothing to do with how long a handler works.
const (
	dialTimeout     = 10 * time.Second
	tlsTimeout      = 10 * time.Second
	idleConnTimeout = 60 * time.Second
	// answerHeaderBytesMax bounds the head of an answer.
	answerHeaderBytesMax = 64 << 10
)

// dialer returns a dial function that asks the guard about every address it is about to connect to.
func (g *Guard) dialer(tls bool) func(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{
		Timeout: dialTimeout, KeepAlive: 15 * time.Second,
		Control: func(network, address string, _ syscall.RawConn) error {
			if network != "tcp4" && network != "tcp6" {
				return &BlockedError{Reason: network + " is not TCP"}
			}
			addr, err := netip.ParseAddrPort(address)
			if err != nil {
				return &BlockedError{Reason: "the address " + address + " is not known"}
			}
			return g.Check(addr, tls)
		},
	}
	return d.DialContext
}

// noRedirects makes a client return redirects as they are.
func noRedirects(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
