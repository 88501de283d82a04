package server

import (
	"context"
	"net/http"
	"net/url"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/auth"
)

// An Extension adds paths below /v1 that another part of the node answers. They go through the same checks as the
// server's own: hosts, origins, tokens, bounds on bodies and on commands in progress, error documents, metrics.
type Extension struct {
	Routes []Route
	// OpenAPI is a YAML document whose paths and components are merged into the one that /v1/openapi.yaml shows. Each
	// route has to stand in it, and nothing else.
	OpenAPI []byte
}

// Route is one method of one path.
type Route struct {
	// Method is the HTTP method. GET answers HEAD as well.
	Method string
	// Pattern is the path with its variables: "/v1/subscriptions/{id}". Each is one segment, decoded. The variables {topic}
	// and {group} are checked to be names, and access is asked for that topic.
	Pattern string
	Access  Access
	// Scoped leaves the choice of topics to Handle, which asks Call.Allows: some access of the kind is enough to get
	// there. Without it, a path without {topic} needs the access to everything.
	Scoped bool
	// Handle answers. The document is written as JSON with the status; 204 has none. An error becomes an error document.
	Handle func(*Call) (status int, document any, err error)
}

// Call is one request to a Route.
type Call struct{ x *exchange }

// Context ends when the client has gone or the time for a command is over.
func (c *Call) Context() context.Context { return c.x.r.Context() }

// Request returns the request. Its body is read with Decode.
func (c *Call) Request() *http.Request { return c.x.r }

// Param returns a variable of the pattern, decoded.
func (c *Call) Param(name string) string { return c.x.param(name) }

// Query returns the parameters behind the question mark; those that are not well formed are left out.
func (c *Call) Query() url.Values { return c.x.r.URL.Query() }

// Decode reads the body as one JSON object into a struct and refuses members that it does not have. It may be called
// once.
func (c *Call) Decode(document any) error {
	if e := c.x.readJSON(document); e != nil {
		return e
	}
	return nil
}

// Allows returns an error unless the client has the access to all topics of a pattern: a name, or a prefix followed by
// an asterisk.
func (c *Call) Allows(access Access, pattern string) error {
	if !c.x.principal.AllowsPattern(access, pattern) {
		return errs.New(errs.Forbidden, "the token does not allow to %s %q", access, pattern)
	}
	return nil
}

// Principal is who asks; nil while no authentication is configured.
func (c *Call) Principal() *auth.Principal { return c.x.principal }

// handler wraps the route's for the server.
func (r *Route) handler() handler {
	return func(x *exchange) {
		if e := x.holdSlot(); e != nil {
			x.fail(e)
			return
		}
		ctx, cancel := x.commandContext()
		defer cancel()
		x.r = x.r.WithContext(ctx)
		status, document, err := r.Handle(&Call{x})
		switch {
		case err != nil:
			x.fail(errs.From(err))
		case status == http.StatusNoContent:
			x.noContent()
		default:
			x.answerStatus(status, document)
		}
	}
}
