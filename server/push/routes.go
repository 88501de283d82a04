package push

import (
	"context"
	_ "embed"
	"encoding/json"
	"net/http"
	"strconv"
	"time"

	"tercet.dev/tercet/internal/errs"
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
	asked := make([]*wire.Subscription, len(out.Subscriptions))
	for i := range out.Subscriptions {
		asked[i] = &out.Subscriptions[i]
	}
	d.fillStates(c.Context(), asked)
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
	d.fillStates(c.Context(), []*wire.Subscription{&out})
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

// stateSubject is what the dispatchers of other nodes ask about.
const stateSubject = "push state"

// askTimeout bounds a question to the leader: the rest of the answer is there already.
const askTimeout = 2 * time.Second

// pushState is the state of a subscription of a certain revision.
type pushState struct {
	ID       string                  `json:"id"`
	Revision uint64                  `json:"revision"`
	State    *wire.SubscriptionState `json:"state,omitempty"`
}

// answerStates answers other nodes' questions for the states of subscriptions.
func (d *Dispatcher) answerStates(question []byte) ([]byte, error) {
	var of []pushState
	if err := json.Unmarshal(question, &of); err != nil {
		return nil, err
	}
	for i := range of {
		of[i].State = d.State(of[i].ID, of[i].Revision)
	}
	return json.Marshal(of)
}

// fillStates asks the leader, which alone knows how endpoints fare. Where there is nothing to be had, the answer goes
// without.
func (d *Dispatcher) fillStates(ctx context.Context, subs []*wire.Subscription) {
	if _, leads := d.backend.Leading(); leads || len(subs) == 0 {
		return
	}
	of := make([]pushState, len(subs))
	for i, s := range subs {
		of[i] = pushState{ID: s.ID, Revision: s.Revision}
	}
	question, err := json.Marshal(of)
	if err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	raw, err := d.backend.AskLeader(ctx, stateSubject, question)
	if err != nil {
		return
	}
	var answer []pushState
	if json.Unmarshal(raw, &answer) != nil || len(answer) != len(subs) {
		return
	}
	for i, s := range subs {
		if answer[i].ID == s.ID && answer[i].Revision == s.Revision {
			s.State = answer[i].State
		}
	}
}
