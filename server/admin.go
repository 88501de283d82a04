package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

// routeAdmin routes below /v1/. A topic here may be any key of the Valkey front end, percent-encoded.
func (x *exchange) routeAdmin(rest string, escaped bool) (handler, Access, *errs.Error) {
	var seg [5]string
	n := segments(rest, escaped, seg[:])
	get := func(access Access, h handler) (handler, Access, *errs.Error) {
		return x.methods(opAdmin, access, "GET, HEAD", h)
	}
	switch {
	case n == 1 && seg[0] == "node":
		return get(Admin, (*exchange).showNode)
	case n == 1 && seg[0] == "cluster":
		return get(Admin, (*exchange).showCluster)
	case n == 2 && seg[0] == "cluster" && seg[1] == "members":
		return x.methods(opAdmin, Admin, "POST", (*exchange).addMember)
	case n == 3 && seg[0] == "cluster" && seg[1] == "members":
		x.tail = seg[2]
		return x.methods(opAdmin, Admin, "DELETE", (*exchange).removeMember)
	case n == 4 && seg[0] == "cluster" && seg[1] == "members" && seg[3] == "replace":
		x.tail = seg[2]
		return x.methods(opAdmin, Admin, "POST", (*exchange).replaceMember)
	case n == 2 && seg[0] == "cluster" && seg[1] == "transfer":
		return x.methods(opAdmin, Admin, "POST", (*exchange).transfer)
	case n == 2 && seg[0] == "clock" && seg[1] == "advance":
		return x.methods(opAdmin, Admin, "POST", (*exchange).advanceClock)
	case n == 1 && seg[0] == "topics":
		return get(Admin, (*exchange).listTopics)
	case n >= 2 && seg[0] == "topics":
		if x.topic = seg[1]; len(x.topic) == 0 || len(x.topic) > limits.KeyBytesMax {
			x.op = opAdmin
			return nil, 0, errs.New(errs.InvalidName, "a topic's name has 1 to %d bytes", limits.KeyBytesMax)
		}
		switch {
		case n == 2:
			return get(Consume, (*exchange).showTopic)
		case n == 3 && seg[2] == "groups":
			return get(Consume, (*exchange).listGroups)
		case n == 4 && seg[2] == "groups":
			x.group = seg[3]
			return get(Consume, (*exchange).showGroup)
		case n == 3 && seg[2] == "messages":
			return get(Consume, (*exchange).browse)
		}
	}
	x.op = opOther
	return nil, 0, errs.Of(errs.NotFound)
}

// answerJSON answers 200 with a document.
func (x *exchange) answerJSON(document any) { x.answerStatus(http.StatusOK, document) }

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
	dec := json.NewDecoder(strings.NewReader(string(buf.b)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(document); err != nil {
		return errs.New(errs.InvalidBody, "the body is not the expected JSON object")
	}
	if _, err := dec.Token(); err != io.EOF {
		return errs.New(errs.InvalidBody, "there is more behind the JSON object")
	}
	return nil
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
		Nodes: make([]wire.ClusterNode, 0, len(st.Nodes)),
	}
	if c.InSync == nil {
		c.InSync = []string{}
	}
	for _, n := range st.Nodes {
		c.Nodes = append(c.Nodes, wire.ClusterNode{
			ID: n.ID, Zone: n.Zone, Incarnation: n.Incarnation, HTTP: n.HTTP, Peer: n.Peer, Valkey: n.Valkey, Role: string(n.Role),
			InSync: n.InSync, MatchIndex: n.MatchIndex, DiskFree: n.DiskFree,
		})
	}
	return c
}

// member reads the member a request names and carries the change out. Catching a new member up takes as long as
// its snapshot takes, so these requests have the client's patience and no deadline of ours.
func (x *exchange) member(name string, change func(context.Context, string) error) {
	if !validName(name) {
		x.fail(errs.New(errs.InvalidName, "the node id is not valid"))
		return
	}
	_ = http.NewResponseController(x.w).SetWriteDeadline(time.Time{})
	if err := change(x.r.Context(), name); err != nil {
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
func (x *exchange) removeMember() { x.member(x.tail, x.s.backend.RemoveMember) }

// replaceMember answers POST /v1/cluster/members/{id}/replace.
func (x *exchange) replaceMember() { x.member(x.tail, x.s.backend.ReplaceMember) }

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
	if err := x.s.backend.TransferLeadership(ctx, m.ID); err != nil {
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
		out.Topics = append(out.Topics, topicOf(&answer.Topics[i]))
	}
	if n := len(out.Topics); answer.More && n > 0 {
		out.Next = out.Topics[n-1].Name
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

// showGroup answers GET /v1/topics/{topic}/groups/{group}.
func (x *exchange) showGroup() {
	answer, e := x.ask(engine.Query{Kind: engine.QueryGroup, Topic: x.topic, Group: x.group, Max: 1})
	if e == nil && len(answer.Groups) == 0 {
		e = errs.Of(errs.GroupNotFound)
	}
	if e != nil {
		x.fail(e)
		return
	}
	x.answerJSON(groupOf(&answer.Groups[0]))
}

func topicOf(t *engine.TopicInfo) wire.Topic {
	return wire.Topic{
		Name: t.Name, FirstOffset: t.First, NextOffset: t.Next, Published: t.Published, PublishedBytes: t.Bytes,
		Groups: t.Groups, OldestAt: timeText(t.OldestAt),
	}
}

func groupOf(g *engine.GroupInfo) wire.Group {
	return wire.Group{
		Topic: g.Topic, Name: g.Name, NextOffset: g.Offset, Ready: g.Ready, Inflight: g.Inflight, Returned: g.Unsettled - g.Inflight,
		Delivered: g.Delivered, Redelivered: g.Redelivered, Acknowledged: g.Acknowledged, OldestAt: timeText(g.OldestAt),
	}
}

// timeText writes a time, or nothing for none.
func timeText(ms int64) string {
	if ms <= 0 {
		return ""
	}
	return string(wire.AppendTime(nil, ms))
}

// browse answers GET /v1/topics/{topic}/messages?from=&limit=: stored messages from an offset on, whatever any group
// did with them.
func (x *exchange) browse() {
	q, limit, e := x.page()
	if e != nil {
		x.fail(e)
		return
	}
	var from uint64
	if text := q.Get("from"); text != "" {
		v, err := strconv.ParseUint(text, 10, 64)
		if err != nil || text[0] == '+' {
			x.fail(errs.New(errs.BadRequest, "from must be an offset"))
			return
		}
		from = v
	}
	answer, e := x.ask(engine.Query{Kind: engine.QueryBrowse, Topic: x.topic, From: from, Max: limit})
	if e != nil {
		x.fail(e)
		return
	}
	sealer, e := x.sealer()
	if e != nil {
		x.fail(e)
		return
	}
	out := wire.Messages{Messages: make([]wire.BrowsedMessage, 0, len(answer.Messages)), Next: answer.Next}
	for i := range answer.Messages {
		d := &answer.Messages[i]
		if d.Gone {
			continue
		}
		x.chargeBytes(int64(len(d.Body)))
		m := wire.BrowsedMessage{
			MessageID: sealer.MessageID(d.ID), Offset: d.Receipt.Offset, Timestamp: timeText(d.PublishedAt), ExpiresAt: timeText(d.ExpiresAt),
			ContentType: contentType(d), DeploymentID: d.Deployment, Body: d.Body,
		}
		if len(d.Headers) > 0 {
			m.Headers = make(map[string]string, len(d.Headers))
			for _, h := range d.Headers {
				m.Headers[h.Name] = h.Value
			}
		}
		out.Messages = append(out.Messages, m)
	}
	x.answerJSON(out)
}
