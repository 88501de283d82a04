package nodecert

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"net/http"
	"regexp"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server"
	"tercet.dev/tercet/server/wire"
)

// openAPI describes the routes.
//
//go:embed openapi.yaml
var openAPI []byte

// tokenTable is the table of documents that holds join tokens, by id.
const tokenTable = "join-tokens"

// How long a token is good, and how long one that no longer is stays in the list.
const (
	tokenLife    = time.Hour
	tokenLifeMax = limits.JoinTokenLifeMax
	tokenShown   = 24 * time.Hour
)

var nodeName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// Extension returns the routes of join tokens for the HTTP server of a node.
func Extension(b Backend) server.Extension { return tokens{b: b, now: time.Now}.extension() }

func (t tokens) extension() server.Extension {
	route := func(method, pattern string, handle func(*server.Call) (int, any, error)) server.Route {
		return server.Route{Method: method, Pattern: pattern, Access: server.Admin, Handle: handle}
	}
	return server.Extension{OpenAPI: openAPI, Routes: []server.Route{
		route("POST", "/v1/cluster/tokens", t.create),
		route("GET", "/v1/cluster/tokens", t.list),
		route("DELETE", "/v1/cluster/tokens/{id}", t.revoke),
	}}
}

type tokens struct {
	b   Backend
	now func() time.Time
}

// all reads the tokens.
func (t tokens) all(ctx context.Context) (ids []string, stored map[string]storedToken, err error) {
	stored = make(map[string]storedToken)
	for after := ""; ; {
		answer, err := t.b.Query(ctx, engine.Query{Kind: engine.QueryDocuments, Table: tokenTable, After: after, Max: 1000})
		if err != nil {
			return nil, nil, err
		}
		for _, d := range answer.Documents {
			s, err := decodeToken(d.Value)
			if err != nil {
				return nil, nil, err
			}
			ids, stored[d.Key], after = append(ids, d.Key), s, d.Key
		}
		if !answer.More || len(answer.Documents) == 0 {
			return ids, stored, nil
		}
	}
}

func (t tokens) command(ctx context.Context, d *engine.Document) error {
	reply, err := t.b.Propose(ctx, raft.Proposal{Command: d.AppendTo(nil)})
	if err != nil {
		return err
	}
	if reply.Code != errs.OK {
		return errs.Of(reply.Code)
	}
	return nil
}

func (t tokens) create(c *server.Call) (int, any, error) {
	var in wire.NewJoinToken
	if err := c.Decode(&in); err != nil {
		return 0, nil, err
	}
	life := time.Duration(in.TTLSeconds) * time.Second
	switch {
	case !nodeName.MatchString(in.Node):
		return 0, nil, errs.New(errs.InvalidName, "%q is not a node id", in.Node)
	case in.TTLSeconds < 0 || in.TTLSeconds > int64(tokenLifeMax/time.Second):
		return 0, nil, errs.New(errs.InvalidBody, "ttlSeconds: want up to %d", int64(tokenLifeMax/time.Second))
	case life == 0:
		life = tokenLife
	}
	ctx := c.Context()
	a, err := storedOf(ctx, t.b)
	if err != nil {
		return 0, nil, err
	}
	if a == nil {
		e := errs.New(errs.Precondition, "the nodes of this cluster do not get their certificates from the cluster")
		e.Hint = "found it with a token of `tercet cluster token create --founding`; with --peer-tls-cert, give the new node files of its own"
		return 0, nil, e
	}
	now := t.now().UTC().Truncate(time.Millisecond)
	ids, stored, err := t.all(ctx)
	if err != nil {
		return 0, nil, err
	}
	for _, id := range ids {
		if now.Sub(stored[id].Expires) > tokenShown {
			if err := t.command(ctx, &engine.Document{Table: tokenTable, Key: id, Delete: true}); err != nil && errs.CodeOf(err) != errs.NotFound {
				return 0, nil, err
			}
		}
	}
	j := joining{fingerprint: fingerprint(a.cert)}
	_, _ = rand.Read(j.id[:])
	_, _ = rand.Read(j.secret[:])
	hash := sha256.Sum256(j.secret[:])
	s := storedToken{Node: in.Node, SHA256: hash[:], Created: now, Expires: now.Add(life)}
	value, err := json.Marshal(&s)
	if err != nil {
		return 0, nil, err
	}
	if err := t.command(ctx, &engine.Document{Table: tokenTable, Key: j.key(), Value: value, IfAbsent: true}); err != nil {
		return 0, nil, err
	}
	return http.StatusCreated, wire.CreatedJoinToken{JoinToken: shown(j.key(), &s), Token: j.text()}, nil
}

func shown(id string, s *storedToken) wire.JoinToken {
	return wire.JoinToken{ID: id, Node: s.Node, CreatedAt: s.Created, ExpiresAt: s.Expires, Used: len(s.Used) > 0}
}

func (t tokens) list(c *server.Call) (int, any, error) {
	ids, stored, err := t.all(c.Context())
	if err != nil {
		return 0, nil, err
	}
	out := wire.JoinTokens{Tokens: make([]wire.JoinToken, 0, len(ids))}
	for _, id := range ids {
		s := stored[id]
		out.Tokens = append(out.Tokens, shown(id, &s))
	}
	return http.StatusOK, out, nil
}

func (t tokens) revoke(c *server.Call) (int, any, error) {
	err := t.command(c.Context(), &engine.Document{Table: tokenTable, Key: c.Param("id"), Delete: true})
	if errs.CodeOf(err) == errs.NotFound {
		err = errs.New(errs.NotFound, "there is no join token of that id")
	}
	return http.StatusNoContent, nil, err
}
