// Package auth says who makes a request and what they may do: bearer tokens from the configuration and from the
// replicated state, and JWTs of OpenID Connect issuers. The HTTP server and the Valkey front end check the same
// credentials with it.
package auth

import (
	"errors"
	"fmt"
	"strings"
)

// Access is what a request wants to do.
type Access uint8

// The kinds of access.
const (
	// Publish sends messages to a topic.
	Publish Access = 1 << iota
	// Receive takes, settles, or reads messages of a topic.
	Receive
	// Admin changes or shows topics, groups and the cluster.
	Admin

	// Look shows figures and no contents: whoever may receive or administer may.
	Look = Receive | Admin
)

var accessNames = []struct {
	access Access
	name   string
}{{Publish, "publish"}, {Receive, "receive"}, {Admin, "admin"}}

// String returns the names as scopes spell them.
func (a Access) String() string {
	var names []string
	for _, n := range accessNames {
		if a&n.access != 0 {
			names = append(names, n.name)
		}
	}
	return strings.Join(names, ",")
}

// A Scope allows kinds of access to the topics a pattern names. It is written "publish,receive:orders-*"; without a
// pattern it holds for everything, the cluster included.
type Scope struct {
	Access Access
	// Prefix is the pattern without its asterisk; Exact is set for a pattern that has none.
	Prefix string
	Exact  bool
}

// ParseScope reads what String writes. A pattern is a topic's name, or a prefix of one followed by an asterisk.
func ParseScope(s string) (Scope, error) {
	names, pattern, limited := strings.Cut(s, ":")
	var scope Scope
next:
	for name := range strings.SplitSeq(names, ",") {
		for _, n := range accessNames {
			if name == n.name {
				scope.Access |= n.access
				continue next
			}
		}
		return Scope{}, fmt.Errorf("scope %q: want publish, receive or admin, joined by commas, then : and a topic or PREFIX*", s)
	}
	if !limited {
		return scope, nil
	}
	prefix, wild := strings.CutSuffix(pattern, "*")
	if pattern == "" || strings.Contains(prefix, "*") {
		return Scope{}, fmt.Errorf("scope %q: want a topic's name or a prefix followed by one *", s)
	}
	scope.Prefix, scope.Exact = prefix, !wild
	return scope, nil
}

// ParseScopes reads a list of scopes that is not empty.
func ParseScopes(list []string) ([]Scope, error) {
	if len(list) == 0 {
		return nil, errors.New("no scopes: a token without any allows nothing")
	}
	scopes := make([]Scope, 0, len(list))
	for _, s := range list {
		scope, err := ParseScope(s)
		if err != nil {
			return nil, err
		}
		scopes = append(scopes, scope)
	}
	return scopes, nil
}

// String returns the scope as it is written.
func (s Scope) String() string {
	switch {
	case s.Exact:
		return s.Access.String() + ":" + s.Prefix
	case s.Prefix == "":
		return s.Access.String()
	}
	return s.Access.String() + ":" + s.Prefix + "*"
}

// covers reports whether every topic of the pattern is in the scope.
func (s Scope) covers(pattern string, wild bool) bool {
	if s.Exact {
		return !wild && pattern == s.Prefix
	}
	return strings.HasPrefix(pattern, s.Prefix)
}

// Principal is who makes a request. A nil Principal is everybody while nothing is configured, and may do everything.
type Principal struct {
	// Name is the token's, or the issuer's and subject's of a JWT. It is for logs and people.
	Name   string
	scopes []Scope
	meter  *meter
}

// Allows reports whether the principal has one of the kinds of access to a topic. The empty topic stands for the
// cluster and everything in it.
func (p *Principal) Allows(access Access, topic string) bool {
	return p.allows(access, topic, topic == "")
}

// AllowsPattern is Allows for all topics of a pattern: a name, or a prefix followed by an asterisk.
func (p *Principal) AllowsPattern(access Access, pattern string) bool {
	prefix, wild := strings.CutSuffix(pattern, "*")
	return p.allows(access, prefix, wild || prefix == "")
}

func (p *Principal) allows(access Access, pattern string, wild bool) bool {
	if p == nil {
		return true
	}
	for _, s := range p.scopes {
		if s.Access&access != 0 && s.covers(pattern, wild) {
			return true
		}
	}
	return false
}

// AllowsSome reports whether there may be topics to which the principal has one of the kinds of access.
func (p *Principal) AllowsSome(access Access) bool {
	if p == nil {
		return true
	}
	for _, s := range p.scopes {
		if s.Access&access != 0 {
			return true
		}
	}
	return false
}
