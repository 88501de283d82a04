package compat

import (
	_ "embed"
	"net/http"
	"strings"

	"tercet.dev/tercet/compat/acl"
	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server"
	"tercet.dev/tercet/server/wire"
)

//go:embed openapi.yaml
var openAPI []byte

// usersAPI is the users of the Valkey port over HTTP.
type usersAPI struct {
	b    UserDocuments
	from string
}

// UsersExtension returns the routes of the Valkey port's users for the HTTP server: the same documents that ACL SETUSER
// changes, so every node's port follows. from is the file that users come from instead, which is then all that is told.
func UsersExtension(b UserDocuments, from string) server.Extension {
	u := usersAPI{b, from}
	route := func(method, pattern string, handle func(*server.Call) (int, any, error)) server.Route {
		return server.Route{Method: method, Pattern: pattern, Access: server.Admin, Handle: func(c *server.Call) (int, any, error) {
			if u.from != "" {
				e := errs.New(errs.Precondition, "the users of this node come from the file %s", u.from)
				e.Hint = "change it on every node and run ACL LOAD"
				return 0, nil, e
			}
			return handle(c)
		}}
	}
	return server.Extension{OpenAPI: openAPI, Routes: []server.Route{
		route("GET", "/v1/acl/users", u.list),
		route("GET", "/v1/acl/users/{name}", u.show),
		route("PUT", "/v1/acl/users/{name}", u.set),
		route("DELETE", "/v1/acl/users/{name}", u.remove),
	}}
}

func (u usersAPI) list(c *server.Call) (int, any, error) {
	out := wire.ACLUsers{Users: []wire.ACLUser{}}
	q := engine.Query{Kind: engine.QueryDocuments, Table: usersTable, Max: 1000}
	for {
		a, err := u.b.Query(c.Context(), q)
		if err != nil {
			return 0, nil, err
		}
		for _, d := range a.Documents {
			out.Users = append(out.Users, storedUser(&d))
		}
		if !a.More || len(a.Documents) == 0 {
			return http.StatusOK, out, nil
		}
		q.After = a.Documents[len(a.Documents)-1].Key
	}
}

func storedUser(d *engine.StoredDocument) wire.ACLUser {
	return wire.ACLUser{Name: d.Key, Rules: strings.Fields(string(d.Value))}
}

func errNoUser(name string) error {
	return errs.New(errs.NotFound, "there is no user %q in the cluster", name)
}

func (u usersAPI) show(c *server.Call) (int, any, error) {
	name := c.Param("name")
	a, err := u.b.Query(c.Context(), engine.Query{Kind: engine.QueryDocuments, Table: usersTable, Key: name})
	if err != nil {
		return 0, nil, err
	}
	if len(a.Documents) == 0 {
		return 0, nil, errNoUser(name)
	}
	return http.StatusOK, storedUser(&a.Documents[0]), nil
}

// set makes a user anew out of rules: what the user was before does not count.
func (u usersAPI) set(c *server.Call) (int, any, error) {
	var in wire.ACLRules
	if err := c.Decode(&in); err != nil {
		return 0, nil, err
	}
	name := c.Param("name")
	if !validUser(name) {
		return 0, nil, errs.New(errs.InvalidName, "%q is no user name: want 1 to 1024 characters without blanks", name)
	}
	for _, r := range in.Rules {
		if !validRule(r) {
			return 0, nil, errs.New(errs.InvalidBody, "the rule %q has blanks", r)
		}
	}
	next, err := changeUser(c.Context(), u.b, name, func(*acl.User) (*acl.User, error) { return acl.NewUser(name).Set(in.Rules...) })
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, wire.ACLUser{Name: name, Rules: strings.Fields(next.Rules())}, nil
}

func (u usersAPI) remove(c *server.Call) (int, any, error) {
	name := c.Param("name")
	if name == acl.DefaultName {
		e := errs.New(errs.Precondition, "the user default cannot be removed")
		e.Hint = "switch it off: PUT with the rule off"
		return 0, nil, e
	}
	switch gone, err := deleteUser(c.Context(), u.b, name); {
	case err != nil:
		return 0, nil, err
	case !gone:
		return 0, nil, errNoUser(name)
	}
	return http.StatusNoContent, nil, nil
}
