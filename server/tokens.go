package server

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/auth"
	"tercet.dev/tercet/server/wire"
)

// storedTokens reads the cluster's tokens.
func (x *exchange) storedTokens(ctx context.Context) ([]auth.Token, *errs.Error) {
	tokens, _, err := auth.Stored(func(q engine.Query) (engine.Answer, error) { return x.s.backend.Query(ctx, q) })
	if err != nil {
		return nil, errs.From(err)
	}
	return tokens, nil
}

// configuredTokens are those of this node's file, and others says whether there are further ways to be let in.
func (x *exchange) configuredTokens() (tokens []auth.Token, others bool) {
	if a, ok := x.s.authorizer.(*auth.Authenticator); ok {
		return a.Configured(), a.Issuers()
	}
	return nil, false
}

func tokenOf(t *auth.Token, source string) wire.Token {
	return wire.Token{Name: t.Name, Scopes: t.Scopes, Limits: wire.TokenLimits(t.Limits), Source: source, CreatedAt: t.Created, ExpiresAt: t.Expires}
}

// The sources of tokens.
const (
	tokenOfCluster       = "cluster"
	tokenOfConfiguration = "configuration"
)

// listTokens answers GET /v1/tokens.
func (x *exchange) listTokens() {
	ctx, cancel := x.commandContext()
	defer cancel()
	stored, e := x.storedTokens(ctx)
	if e != nil {
		x.fail(e)
		return
	}
	configured, _ := x.configuredTokens()
	out := wire.Tokens{Tokens: make([]wire.Token, 0, len(stored)+len(configured))}
	for i := range stored {
		out.Tokens = append(out.Tokens, tokenOf(&stored[i], tokenOfCluster))
	}
	for i := range configured {
		out.Tokens = append(out.Tokens, tokenOf(&configured[i], tokenOfConfiguration))
	}
	x.answerJSON(out)
}

// createToken answers POST /v1/tokens.
func (x *exchange) createToken() {
	var in wire.NewToken
	if e := x.readJSON(&in); e != nil {
		x.fail(e)
		return
	}
	if x.s.authorizer == nil {
		x.fail(errs.New(errs.Precondition, "this node checks no tokens"))
		return
	}
	out := wire.CreatedToken{}
	now := time.Now().UTC().Truncate(time.Millisecond)
	t := auth.Token{Name: in.Name, SHA256: strings.ToLower(in.SHA256), Scopes: in.Scopes, Limits: auth.Limits(in.Limits), Expires: in.ExpiresAt.UTC(), Created: now}
	if in.SHA256 == "" {
		out.Secret = auth.NewSecret()
		t.SHA256, _ = auth.HashSecret(out.Secret)
	}
	if err := t.Check(); err != nil {
		x.fail(errs.New(errs.InvalidBody, "%s", err.Error()))
		return
	}
	if !in.ExpiresAt.IsZero() && !in.ExpiresAt.After(now) {
		x.fail(errs.New(errs.InvalidBody, "the token would have expired already"))
		return
	}
	ctx, cancel := x.commandContext()
	defer cancel()
	if !x.s.authorizer.Required() && (!t.Everything(Admin) || !t.Expires.IsZero()) {
		e := errs.New(errs.Precondition, "the first token needs the scope admin, for everything and for ever: from then on every request needs a token")
		e.Hint = "create a token with the scope admin first"
		x.fail(e)
		return
	}
	value, err := json.Marshal(&t)
	if err != nil {
		x.fail(errs.Of(errs.Internal).With(err))
		return
	}
	document := engine.Document{Table: auth.Table, Key: t.Name, Value: value, IfAbsent: true}
	if e := x.command(ctx, &document); e != nil {
		if e.Code == errs.Conflict {
			e = errs.New(errs.Conflict, "there is a token %s already", t.Name)
			e.Hint = "choose another name: several tokens are good at once, and the old one can be revoked later"
		}
		x.fail(e)
		return
	}
	out.Token = tokenOf(&t, tokenOfCluster)
	x.answerStatus(http.StatusCreated, out)
}

// command has a command carried out and returns only whether it was.
func (x *exchange) command(ctx context.Context, c engine.Command) *errs.Error {
	_, e := x.commandReply(ctx, c)
	return e
}

// commandReply has a command carried out.
func (x *exchange) commandReply(ctx context.Context, c engine.Command) (raft.Reply, *errs.Error) {
	reply, err := x.s.backend.Propose(ctx, raft.Proposal{Command: c.AppendTo(nil)})
	if err != nil {
		return reply, errs.From(err)
	}
	if reply.Code != errs.OK {
		return reply, x.resultError(&reply.Result)
	}
	return reply, nil
}

// revokeToken answers DELETE /v1/tokens/{name}.
func (x *exchange) revokeToken() {
	name := x.param("name")
	ctx, cancel := x.commandContext()
	defer cancel()
	stored, e := x.storedTokens(ctx)
	if e != nil {
		x.fail(e)
		return
	}
	configured, others := x.configuredTokens()
	found := slices.ContainsFunc(stored, func(t auth.Token) bool { return t.Name == name })
	left, admins := 0, 0
	count := func(t *auth.Token) {
		left++
		if t.Everything(Admin) && (t.Expires.IsZero() || t.Expires.After(time.Now())) {
			admins++
		}
	}
	for i := range stored {
		if stored[i].Name != name {
			count(&stored[i])
		}
	}
	for i := range configured {
		count(&configured[i])
	}
	open := x.r.URL.Query().Get("open")
	switch {
	case !found:
		e = errs.New(errs.NotFound, "there is no token of that name in the cluster")
		e.Hint = "tokens of the configuration are taken out of the file"
	case others:
	case left > 0 && admins == 0:
		e = errs.New(errs.Precondition, "no token would be left that may administer the cluster, while others are")
		e.Hint = "create another one with the scope admin first, or revoke the others first"
	case left == 0 && open != "true":
		e = errs.New(errs.Precondition, "this is the last token: without it requests are accepted from everybody who reaches the cluster")
		e.Hint = "say so with ?open=true (--open) if that is meant"
	}
	if e != nil {
		x.fail(e)
		return
	}
	if e := x.command(ctx, &engine.Document{Table: auth.Table, Key: name, Delete: true}); e != nil {
		x.fail(e)
		return
	}
	x.noContent()
}
