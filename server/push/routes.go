package push

import (
	"context"
	_ "embed"
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"time"

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

// listMax bounds one page of subscriptions.
const listMax = 1000

// Extension returns the routes of subscriptions for the HTTP server. Whoever may administrate the topics of a
// subscription may see and change it.
func (d *Dispatcher) Extension() server.Extension {
	route := func(method, pattern string, handle func(*server.Call) (int, any, error)) server.Route {
		return server.Route{Method: method, Pattern: pattern, Access: server.Admin, Scoped: true, Handle: handle}
	}
	return server.Extension{OpenAPI: openAPI, Routes: []server.Route{
		route("POST", "/v1/subscriptions", d.serveCreate),
		route("GET", "/v1/subscriptions", d.serveList),
		route("GET", "/v1/subscriptions/{id}", d.serveGet),
		route("DELETE", "/v1/subscriptions/{id}", d.serveDelete),
		route("POST", "/v1/subscriptions/{id}/secret", d.serveRotate),
		route("GET", "/v1/deployments/{deployment}/drain", d.serveDrain),
	}}
}

func (d *Dispatcher) serveCreate(c *server.Call) (int, any, error) {
	var w wire.Subscription
	if err := c.Decode(&w); err != nil {
		return 0, nil, err
	}
	if w.Topic != "" {
		if err := c.Allows(server.Admin, w.Topic); err != nil {
			return 0, nil, err
		}
	}
	dryRun := c.Query().Get("dryRun") == "true"
	out, created, changed, err := d.Create(c.Context(), &w, dryRun)
	if err != nil {
		return 0, nil, err
	}
	switch {
	case created:
		out.Change = "created"
	case changed:
		out.Change = "changed"
	default:
		out.Change = "unchanged"
	}
	if dryRun {
		return http.StatusOK, out, nil
	}
	return http.StatusCreated, out, nil
}

func (d *Dispatcher) serveList(c *server.Call) (int, any, error) {
	q := c.Query()
	limit := 100
	if text := q.Get("limit"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > listMax {
			return 0, nil, errs.New(errs.BadRequest, "limit must be from 1 to %d", listMax)
		}
		limit = n
	}
	out, err := d.List(c.Context(), q.Get("after"), limit)
	if err != nil {
		return 0, nil, err
	}
	kept := out.Subscriptions[:0]
	for _, s := range out.Subscriptions {
		if c.Allows(server.Admin, s.Topic) == nil {
			kept = append(kept, s)
		}
	}
	out.Subscriptions = kept
	var there wire.Subscriptions
	if d.askLeader(c, &there) {
		state := make(map[string]*wire.Subscription, len(there.Subscriptions))
		for i := range there.Subscriptions {
			state[there.Subscriptions[i].ID] = &there.Subscriptions[i]
		}
		for i := range out.Subscriptions {
			s := &out.Subscriptions[i]
			if t := state[s.ID]; t != nil && t.Revision == s.Revision {
				s.State = t.State
			}
		}
	}
	return http.StatusOK, out, nil
}

func (d *Dispatcher) serveGet(c *server.Call) (int, any, error) {
	out, err := d.Get(c.Context(), c.Param("id"))
	if err != nil {
		return 0, nil, err
	}
	if err := c.Allows(server.Admin, out.Topic); err != nil {
		return 0, nil, err
	}
	var there wire.Subscription
	if d.askLeader(c, &there) && there.Revision == out.Revision {
		out.State = there.State
	}
	return http.StatusOK, out, nil
}

func (d *Dispatcher) serveDelete(c *server.Call) (int, any, error) {
	s, err := d.find(c.Context(), c.Param("id"))
	if err != nil {
		return 0, nil, err
	}
	if err := c.Allows(server.Admin, s.Topic); err != nil {
		return 0, nil, err
	}
	return http.StatusNoContent, nil, d.Delete(c.Context(), s.ID)
}

func (d *Dispatcher) serveRotate(c *server.Call) (int, any, error) {
	var r wire.RotateSecret
	if err := c.Decode(&r); err != nil {
		return 0, nil, err
	}
	s, err := d.find(c.Context(), c.Param("id"))
	if err != nil {
		return 0, nil, err
	}
	if err := c.Allows(server.Admin, s.Topic); err != nil {
		return 0, nil, err
	}
	out, err := d.Rotate(c.Context(), s.ID, r)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, out, nil
}

func (d *Dispatcher) serveDrain(c *server.Call) (int, any, error) {
	out, err := d.Drained(c.Context(), c.Param("deployment"))
	if err != nil {
		return 0, nil, err
	}
	for _, g := range out.Groups {
		if err := c.Allows(server.Admin, g.Topic); err != nil {
			return 0, nil, err
		}
	}
	return http.StatusOK, out, nil
}

const (
	// headerForwarded marks a question that another node passes on, so that it is not passed on again.
	headerForwarded = "Tercet-Forwarded"
	// askTimeout bounds it: the rest of the answer is there already.
	askTimeout = 2 * time.Second
)

// askLeader puts the same question to the leader, which alone knows how endpoints fare. It does so with the client's
// own credentials and reports false where there is nothing to be had: then the answer goes without.
func (d *Dispatcher) askLeader(c *server.Call, document any) bool {
	r := c.Request()
	if _, leads := d.backend.Leading(); leads || r.TLS != nil || r.Header.Get(headerForwarded) != "" {
		return false
	}
	st := d.backend.Status()
	address := leaderAddress(&st)
	if address == "" {
		return false
	}
	ctx, cancel := context.WithTimeout(c.Context(), askTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+r.URL.RequestURI(), nil)
	if err != nil {
		return false
	}
	req.Header.Set(headerForwarded, "1")
	if a := r.Header.Values("Authorization"); len(a) > 0 {
		req.Header["Authorization"] = a
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, CheckRedirect: noRedirects}
	res, err := client.Do(req)
	if err != nil {
		return false
	}
	defer res.Body.Close()
	return res.StatusCode == http.StatusOK && json.NewDecoder(io.LimitReader(res.Body, limits.FrameBytesMax)).Decode(document) == nil
}

func leaderAddress(st *raft.Status) string {
	for _, n := range st.Nodes {
		if n.ID == st.Leader && n.ID != st.ID {
			return n.HTTP
		}
	}
	return ""
}
