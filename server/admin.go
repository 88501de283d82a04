package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"time"
	"unicode/utf8"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

// ownPaths are the paths below /v1 that the server itself answers.
func ownPaths() (paths adminPaths, err error) {
	for _, r := range []struct {
		method, pattern string
		access          Access
		handle          handler
	}{
		{"GET", "/v1/openapi.yaml", 0, (*exchange).openAPIYAML},
		{"GET", "/v1/openapi.json", 0, (*exchange).openAPIJSON},

		{"GET", "/v1/node", Admin, (*exchange).showNode},
		{"GET", "/v1/cluster", Admin, (*exchange).showCluster},
		{"POST", "/v1/cluster/members", Admin, (*exchange).addMember},
		{"DELETE", "/v1/cluster/members/{id}", Admin, (*exchange).removeMember},
		{"POST", "/v1/cluster/members/{id}/replace", Admin, (*exchange).replaceMember},
		{"POST", "/v1/cluster/transfer", Admin, (*exchange).transfer},
		{"POST", "/v1/cluster/finalize", Admin, (*exchange).finalize},
		{"POST", "/v1/clock/advance", Admin, (*exchange).advanceClock},

		{"GET", "/v1/tokens", Admin, (*exchange).listTokens},
		{"POST", "/v1/tokens", Admin, (*exchange).createToken},
		{"DELETE", "/v1/tokens/{name}", Admin, (*exchange).revokeToken},

		{"GET", "/v1/topics", Look | someTopics, (*exchange).listTopics},
		{"GET", "/v1/topics/{topic}", Look, (*exchange).showTopic},
		{"PUT", "/v1/topics/{topic}", Admin, (*exchange).createTopic},
		{"PATCH", "/v1/topics/{topic}", Admin, (*exchange).changeTopic},
		{"DELETE", "/v1/topics/{topic}", Admin, (*exchange).deleteTopic},
		{"POST", "/v1/topics/{topic}/pause", Admin, (*exchange).pauseTopic},
		{"POST", "/v1/topics/{topic}/resume", Admin, (*exchange).resumeTopic},
		{"POST", "/v1/topics/{topic}/purge", Admin, (*exchange).purgeTopic},

		{"GET", "/v1/topics/{topic}/groups", Look, (*exchange).listGroups},
		{"GET", "/v1/topics/{topic}/groups/{group}", Look, (*exchange).showGroup},
		{"PUT", "/v1/topics/{topic}/groups/{group}", Admin, (*exchange).createGroup},
		{"PATCH", "/v1/topics/{topic}/groups/{group}", Admin, (*exchange).changeGroup},
		{"DELETE", "/v1/topics/{topic}/groups/{group}", Admin, (*exchange).deleteGroup},
		{"POST", "/v1/topics/{topic}/groups/{group}/pause", Admin, (*exchange).pauseGroup},
		{"POST", "/v1/topics/{topic}/groups/{group}/resume", Admin, (*exchange).resumeGroup},
		{"POST", "/v1/topics/{topic}/groups/{group}/seek", Admin, (*exchange).seekGroup},
		{"GET", "/v1/topics/{topic}/groups/{group}/parked", Receive, (*exchange).listParked},
		{"POST", "/v1/topics/{topic}/groups/{group}/parked/redrive", Admin, (*exchange).redriveParked},
		{"POST", "/v1/topics/{topic}/groups/{group}/parked/drop", Admin, (*exchange).dropParked},

		{"GET", "/v1/topics/{topic}/messages", Receive, (*exchange).browse},
		{"GET", "/v1/topics/{topic}/messages/{messageId}", Receive, (*exchange).showStory},
		{"PATCH", "/v1/topics/{topic}/messages/{messageId}", Admin, (*exchange).moveDelayed},
		{"DELETE", "/v1/topics/{topic}/messages/{messageId}", Admin, (*exchange).cancelDelayed},
	} {
		if err := paths.add(r.method, r.pattern, r.access, r.handle); err != nil {
			return nil, err
		}
	}
	return paths, nil
}

// answerJSON answers 200 with a document.
func (x *exchange) answerJSON(document any) { x.answerStatus(http.StatusOK, document) }

// noContent answers 204.
func (x *exchange) noContent() {
	x.w.Header()[wire.HeaderRequestID] = []string{x.requestID()}
	x.w.WriteHeader(http.StatusNoContent)
}

func (x *exchange) answerStatus(status int, document any) {
	body, err := json.Marshal(document)
	if err != nil {
		x.fail(errs.Of(errs.Internal).With(err))
		return
	}
	h := x.w.Header()
	h["Content-Type"] = jsonType
	h["Cache-Control"] = noStore
	h["X-Content-Type-Options"] = noSniff
	h[wire.HeaderRequestID] = []string{x.requestID()}
	x.w.WriteHeader(status)
	if x.r.Method != http.MethodHead {
		x.w.Write(append(body, '\n'))
	}
}

// adminBodyMax bounds the body of an administrative request.
const adminBodyMax = 64 << 10

// readJSON reads the request's body into a document. Members that the document does not have are refused: a
// misspelt one would otherwise be ignored.
func (x *exchange) readJSON(document any) *errs.Error {
	buf := getBuffer(0)
	defer putBuffer(buf)
	var e *errs.Error
	if buf.b, e = x.readBody(buf.b, adminBodyMax); e != nil {
		return e
	}
	if !utf8.Valid(buf.b) {
		return errs.New(errs.InvalidBody, "the body is not UTF-8")
	}
	return decodeOver(buf.b, document)
}

func (x *exchange) version(st *raft.Status) string {
	if st.Version != "" {
		return st.Version
	}
	return x.s.version
}

// showNode answers GET /v1/node: this node's own view, never forwarded.
func (x *exchange) showNode() {
	st := x.s.backend.Status()
	x.answerJSON(wire.Node{
		ID: st.ID, Zone: st.Zone, Role: string(st.Role), Incarnation: st.Incarnation, AppliedIndex: st.AppliedIndex,
		StateHash: fmt.Sprintf("%016x", st.StateHash), Version: x.version(&st), Draining: st.Draining || x.s.Draining(),
	})
}

// showCluster answers GET /v1/cluster.
func (x *exchange) showCluster() { x.answerJSON(clusterOf(x.s.backend.Status())) }

func clusterOf(st raft.Status) wire.Cluster {
	c := wire.Cluster{
		ClusterID: st.ClusterID, Term: st.Term, Leader: st.Leader, Durability: st.Durability.String(), InSync: st.InSync,
		Level: st.Level, Nodes: make([]wire.ClusterNode, 0, len(st.Nodes)),
	}
	if c.InSync == nil {
		c.InSync = []string{}
	}
	for _, n := range st.Nodes {
		c.Nodes = append(c.Nodes, wire.ClusterNode{
			ID: n.ID, Zone: n.Zone, Incarnation: n.Incarnation, HTTP: n.HTTP, Peer: n.Peer, Valkey: n.Valkey, Role: string(n.Role),
			InSync: n.InSync, MatchIndex: n.MatchIndex, DiskFree: n.DiskFree, LevelMax: n.LevelMax,
		})
	}
	return c
}

// member carries out a change of the member that a request names. A new member is only invited: catching it up is not
// waited for.
func (x *exchange) member(name string, change func(context.Context, string) error) {
	if !validName(name) {
		x.fail(errs.New(errs.InvalidName, "the node id is not valid"))
		return
	}
	ctx, cancel := x.commandContext()
	defer cancel()
	if err := change(ctx, name); err != nil {
		x.fail(errs.From(err))
		return
	}
	x.showCluster()
}

// addMember answers POST /v1/cluster/members {"id"}.
func (x *exchange) addMember() {
	var m wire.Member
	if e := x.readJSON(&m); e != nil {
		x.fail(e)
		return
	}
	x.member(m.ID, x.s.backend.AddMember)
}

// removeMember answers DELETE /v1/cluster/members/{id}.
func (x *exchange) removeMember() { x.member(x.param("id"), x.s.backend.RemoveMember) }

// replaceMember answers POST /v1/cluster/members/{id}/replace.
func (x *exchange) replaceMember() { x.member(x.param("id"), x.s.backend.ReplaceMember) }

// transfer answers POST /v1/cluster/transfer {"id"}; without an id the most advanced node is chosen.
func (x *exchange) transfer() {
	var m wire.Member
	if e := x.readJSON(&m); e != nil {
		x.fail(e)
		return
	}
	if m.ID != "" && !validName(m.ID) {
		x.fail(errs.New(errs.InvalidName, "the node id is not valid"))
		return
	}
	ctx, cancel := x.commandContext()
	defer cancel()
	before := x.s.backend.Status().Leader
	if err := x.s.backend.TransferLeadership(ctx, m.ID); err != nil {
		x.fail(errs.From(err))
		return
	}
	// Leadership is on its way; who asked is told where it arrived.
	for end := time.Now().Add(transferPatience); time.Now().Before(end) && ctx.Err() == nil; {
		if leader := x.s.backend.Status().Leader; leader != "" && (leader == m.ID || m.ID == "" && leader != before) {
			break
		}
		pause(ctx, askAgain)
	}
	x.showCluster()
}

const (
	// transferPatience is how long the answer to a transfer waits for the new leader to be known.
	transferPatience = 3 * time.Second
	// askAgain is the pause before a node is asked again for what it does not know yet.
	askAgain = 20 * time.Millisecond
)

// pause waits, or less if the context ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// finalize answers POST /v1/cluster/finalize: the feature level rises to what every member knows.
func (x *exchange) finalize() {
	b, ok := x.s.backend.(finalizer)
	if !ok {
		x.fail(errs.Of(errs.Unsupported))
		return
	}
	ctx, cancel := x.commandContext()
	defer cancel()
	if err := b.Finalize(ctx); err != nil {
		x.fail(errs.From(err))
		return
	}
	x.showCluster()
}

// advanceMax bounds one step of the virtual clock.
const advanceMax = 10 * 366 * 24 * time.Hour

// advanceClock answers POST /v1/clock/advance {"seconds"}.
func (x *exchange) advanceClock() {
	if !x.s.virtual {
		x.fail(errs.New(errs.NotFound, "the clock is real: start with --virtual-clock to move it"))
		return
	}
	var a wire.Advance
	if e := x.readJSON(&a); e != nil {
		x.fail(e)
		return
	}
	if a.Seconds < 0 || a.Seconds > int64(advanceMax/time.Second) {
		x.fail(errs.New(errs.InvalidBody, "seconds must be from 0 to %d", int64(advanceMax/time.Second)))
		return
	}
	command := &engine.Advance{By: time.Duration(a.Seconds) * time.Second}
	if _, e := x.propose(raft.Proposal{Command: command.AppendTo(nil)}); e != nil {
		x.fail(e)
		return
	}
	x.answerJSON(a)
}

// pageMax bounds the items of one page.
const pageMax = 1000

// page reads ?after= and ?limit=.
func (x *exchange) page() (q url.Values, limit int, e *errs.Error) {
	q, err := url.ParseQuery(x.r.URL.RawQuery)
	if err != nil {
		return nil, 0, errs.New(errs.BadRequest, "the query is not well formed")
	}
	limit = 100
	if text := q.Get("limit"); text != "" {
		v, ok := decimal(text)
		if !ok || v < 1 || v > pageMax {
			return nil, 0, errs.New(errs.BadRequest, "limit must be from 1 to %d", pageMax)
		}
		limit = int(v)
	}
	return q, limit, nil
}

// ask reads the engine's state.
func (x *exchange) ask(q engine.Query) (engine.Answer, *errs.Error) {
	if e := x.holdSlot(); e != nil {
		return engine.Answer{}, e
	}
	ctx, cancel := x.commandContext()
	defer cancel()
	answer, err := x.s.backend.Query(ctx, q)
	if err != nil {
		return answer, errs.From(err)
	}
	return answer, nil
}

// listTopics answers GET /v1/topics?after=&limit=.
func (x *exchange) listTopics() {
	q, limit, e := x.page()
	if e != nil {
		x.fail(e)
		return
	}
	answer, e := x.ask(engine.Query{Kind: engine.QueryTopics, After: q.Get("after"), Max: limit})
	if e != nil {
		x.fail(e)
		return
	}
	out := wire.Topics{Topics: make([]wire.Topic, 0, len(answer.Topics))}
	for i := range answer.Topics {
		if x.principal.Allows(Look, answer.Topics[i].Name) {
			out.Topics = append(out.Topics, topicOf(&answer.Topics[i]))
		}
	}
	if n := len(answer.Topics); answer.More && n > 0 {
		out.Next = answer.Topics[n-1].Name
	}
	x.answerJSON(out)
}

// showTopic answers GET /v1/topics/{topic}.
func (x *exchange) showTopic() {
	answer, e := x.ask(engine.Query{Kind: engine.QueryTopic, Topic: x.topic, Max: 1})
	if e == nil && len(answer.Topics) == 0 {
		e = errs.Of(errs.TopicNotFound)
	}
	if e != nil {
		x.fail(e)
		return
	}
	x.answerJSON(topicOf(&answer.Topics[0]))
}

// listGroups answers GET /v1/topics/{topic}/groups?after=&limit=.
func (x *exchange) listGroups() {
	q, limit, e := x.page()
	if e != nil {
		x.fail(e)
		return
	}
	answer, e := x.ask(engine.Query{Kind: engine.QueryGroups, Topic: x.topic, After: q.Get("after"), Max: limit})
	if e != nil {
		x.fail(e)
		return
	}
	out := wire.Groups{Groups: make([]wire.Group, 0, len(answer.Groups))}
	for i := range answer.Groups {
		out.Groups = append(out.Groups, groupOf(&answer.Groups[i]))
	}
	if n := len(out.Groups); answer.More && n > 0 {
		out.Next = out.Groups[n-1].Name
	}
	x.answerJSON(out)
}

// showGroup answers GET /v1/topics/{topic}/groups/{group}. The first look at a group takes a moment, for its rates.
func (x *exchange) showGroup() {
	x.manage(func(ctx context.Context) (any, *errs.Error) {
		if x.r.URL.Query().Get("rates") == "false" {
			return x.answerGroup(ctx)
		}
		g, rates, e := x.groupRates(ctx)
		if e != nil {
			return nil, e
		}
		out := groupOf(g)
		out.Rates = rates
		return out, nil
	})
}

func topicOf(t *engine.TopicInfo) wire.Topic {
	return wire.Topic{
		Name: t.Name, FirstOffset: t.First, NextOffset: t.Next, Published: t.Published, PublishedBytes: t.Bytes,
		Groups: t.Groups, Delayed: t.Delayed, OldestAt: timeText(t.OldestAt), Settings: topicSettingsOf(&t.Settings),
	}
}

func groupOf(g *engine.GroupInfo) wire.Group {
	return wire.Group{
		Topic: g.Topic, Name: g.Name, NextOffset: g.Offset, Depth: g.Ready + uint64(g.Unsettled), Ready: g.Ready, Inflight: g.Inflight,
		Returned: g.Unsettled - g.Inflight, Parked: g.Parked, Delivered: g.Delivered, Redelivered: g.Redelivered, Acknowledged: g.Acknowledged,
		OldestAt: timeText(g.OldestAt), Settings: groupSettingsOf(&g.Settings),
	}
}

// timeText writes a time, or nothing for none.
func timeText(ms int64) string {
	if ms <= 0 {
		return ""
	}
	return string(wire.AppendTime(nil, ms))
}
