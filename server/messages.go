package server

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

// offsetOf reads an offset of a query, 0 for none.
func offsetOf(q url.Values, name string) (uint64, *errs.Error) {
	text := q.Get(name)
	if text == "" {
		return 0, nil
	}
	v, err := strconv.ParseUint(text, 10, 64)
	if err != nil || text[0] == '+' {
		return 0, errs.New(errs.BadRequest, "%s must be an offset", name)
	}
	return v, nil
}

// browseFilter reads what a browse is restricted to.
func browseFilter(q url.Values) (f engine.MessageFilter, e *errs.Error) {
	if text := q.Get("state"); text != "" {
		state, ok := engine.ParseMessageState(text)
		if !ok {
			return f, errs.New(errs.BadRequest, "state must be delayed, ready, leased, waiting, parked or acknowledged")
		}
		f.State = state
		if state > engine.StateDelayed && q.Get("group") == "" {
			return f, errs.New(errs.BadRequest, "a state other than delayed is one for a group: name it")
		}
	}
	if f.Since, e = timeOf("since", q.Get("since")); e != nil {
		return f, e
	}
	if f.Until, e = timeOf("until", q.Get("until")); e != nil {
		return f, e
	}
	f.Header, f.Value = strings.ToLower(q.Get("header")), q.Get("value")
	if f.Header == "" && f.Value != "" || f.Header != "" && !validToken(f.Header) {
		return f, errs.New(errs.BadRequest, "header must be a header's name, and value goes with it")
	}
	return f, nil
}

// browse answers GET /v1/topics/{topic}/messages: stored messages from an offset on, whatever any group did with them, or
// those that are in a state, of a time, or have a header. Delayed messages are in no place yet and are paged by after.
func (x *exchange) browse() {
	q, limit, e := x.page()
	if e != nil {
		x.fail(e)
		return
	}
	from, e := offsetOf(q, "from")
	if e != nil {
		x.fail(e)
		return
	}
	filter, e := browseFilter(q)
	if e != nil {
		x.fail(e)
		return
	}
	query := engine.Query{Kind: engine.QueryBrowse, Topic: x.topic, Group: q.Get("group"), From: from, Max: limit, Filter: filter}
	if filter.State == engine.StateDelayed {
		query.Kind, query.After = engine.QueryDelayed, q.Get("after")
	}
	answer, e := x.ask(query)
	if e != nil {
		x.fail(e)
		return
	}
	sealer, e := x.sealer()
	if e != nil {
		x.fail(e)
		return
	}
	bodies := q.Get("body") != "false"
	out := wire.Messages{Messages: make([]wire.BrowsedMessage, 0, len(answer.Messages)), Next: answer.Next}
	if answer.More && query.Kind == engine.QueryDelayed {
		out.After = answer.Last
	}
	for i := range answer.Messages {
		d := &answer.Messages[i]
		if d.Gone {
			continue
		}
		x.chargeBytes(int64(len(d.Body)))
		out.Messages = append(out.Messages, browsed(sealer, d, bodies))
	}
	x.answerJSON(out)
}

// browsed is a message as an administrator sees it.
func browsed(sealer *engine.Sealer, d *engine.Delivery, body bool) wire.BrowsedMessage {
	m := wire.BrowsedMessage{
		MessageID: sealer.MessageID(d.ID), Offset: d.Receipt.Offset, Timestamp: timeText(d.PublishedAt), ExpiresAt: timeText(d.ExpiresAt),
		ContentType: contentType(d), DeploymentID: d.Deployment, Bytes: int64(len(d.Body)), Headers: headersOf(d.Headers),
	}
	switch {
	case d.Large != nil:
		m.Bytes = d.Large.Bytes
	case body:
		m.Body = d.Body
	}
	return m
}

// headersOf is a message's headers as a JSON object; of several with one name the last stands.
func headersOf(list []engine.Header) map[string]string {
	if len(list) == 0 {
		return nil
	}
	out := make(map[string]string, len(list))
	for _, h := range list {
		out[h.Name] = h.Value
	}
	return out
}

// messageID reads the message the path names.
func (x *exchange) messageID() (engine.MessageID, *engine.Sealer, *errs.Error) {
	sealer, e := x.sealer()
	if e != nil {
		return engine.MessageID{}, nil, e
	}
	id, err := sealer.ParseMessageID(x.param("messageId"))
	if err != nil {
		return engine.MessageID{}, nil, errs.From(err)
	}
	return id, sealer, nil
}

// showStory answers GET /v1/topics/{topic}/messages/{messageId}.
func (x *exchange) showStory() {
	id, sealer, e := x.messageID()
	if e != nil {
		x.fail(e)
		return
	}
	verify := x.r.URL.Query().Get("verify")
	if verify != "" && verify != "true" && verify != "false" {
		x.fail(errs.New(errs.BadRequest, "verify must be true or false"))
		return
	}
	x.manage(func(ctx context.Context) (any, *errs.Error) {
		query := engine.Query{Kind: engine.QueryStory, Topic: x.topic, ID: id.Original(), Max: 1}
		answer, e := x.look(ctx, query)
		if e == nil && answer.Story == nil {
			e = errs.Of(errs.MessageNotFound)
		}
		if e != nil {
			return nil, e
		}
		out := storyOf(x.topic, sealer, answer.Story)
		if id.Kind == engine.KindDuplicate {
			out.MessageID, out.DuplicateOf = sealer.MessageID(id), out.MessageID
		}
		if verify == "true" {
			members, ok := x.s.backend.(memberReader)
			if !ok {
				return nil, errs.New(errs.Unsupported, "there are no zones here to compare")
			}
			out.Zones = x.verify(ctx, members, query, answer.Story)
			same := true
			for i := range out.Zones {
				same = same && out.Zones[i].Same
			}
			out.Verified = &same
		}
		return out, nil
	})
}

func storyOf(topic string, sealer *engine.Sealer, s *engine.Story) wire.Story {
	d := &s.Message
	out := wire.Story{
		MessageID: sealer.MessageID(d.ID), Topic: topic, State: "visible", Offset: d.Receipt.Offset, PublishedAt: timeText(d.PublishedAt), VisibleAt: timeText(s.VisibleAt),
		ExpiresAt: timeText(d.ExpiresAt), ContentType: contentType(d), DeploymentID: d.Deployment, Headers: headersOf(d.Headers), Bytes: s.Bytes, CRC32C: crcText(s.CRC),
		Groups: make([]wire.GroupStory, 0, len(s.Groups)),
	}
	if s.State == engine.StateDelayed {
		out.State = "delayed"
	}
	for _, g := range s.Groups {
		out.Groups = append(out.Groups, wire.GroupStory{
			Group: g.Group, State: g.State.String(), Deliveries: g.Count, Consumer: g.Consumer, LeasedAt: timeText(g.LeasedAt), LeasedUntil: timeText(g.LeasedUntil), NextAt: timeText(g.NextAt),
			ParkedAt: timeText(g.ParkedAt), LastError: g.Error,
		})
	}
	return out
}

func crcText(crc uint32) string { return fmt.Sprintf("%08x", crc) }

// verifyPatience is how long one member may take to read a message.
const verifyPatience = 3 * time.Second

// verify has every member read the message from its own disk and compares size and checksum with the leader's.
func (x *exchange) verify(ctx context.Context, members memberReader, query engine.Query, leader *engine.Story) []wire.ZoneCopy {
	nodes := x.s.backend.Status().Nodes
	copies := make([]wire.ZoneCopy, len(nodes))
	ctx, cancel := context.WithTimeout(ctx, verifyPatience)
	defer cancel()
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() {
			c := wire.ZoneCopy{Node: n.ID, Zone: n.Zone}
			answer, err := members.QueryMember(ctx, n.ID, query)
			// A node that has it on disk may learn only later that it is committed.
			for behind := time.Now().Add(verifyPatience / 2); err == nil && answer.Story == nil && time.Now().Before(behind); {
				pause(ctx, askAgain)
				answer, err = members.QueryMember(ctx, n.ID, query)
			}
			switch {
			case err != nil:
				c.Error = errs.From(err).Text()
			case answer.Story == nil:
				c.Error = errs.Of(errs.MessageNotFound).Text()
			default:
				c.Bytes, c.CRC32C = answer.Story.Bytes, crcText(answer.Story.CRC)
				c.Same = answer.Story.Bytes == leader.Bytes && answer.Story.CRC == leader.CRC
			}
			copies[i] = c
		})
	}
	wg.Wait()
	return copies
}

// cancelDelayed answers DELETE /v1/topics/{topic}/messages/{messageId}.
func (x *exchange) cancelDelayed() { x.changeDelayed(engine.Delayed{Cancel: true}) }

// moveDelayed answers PATCH /v1/topics/{topic}/messages/{messageId} {"delaySeconds"}.
func (x *exchange) moveDelayed() {
	var in wire.Move
	if e := x.readJSON(&in); e != nil {
		x.fail(e)
		return
	}
	if in.DelaySeconds == nil || *in.DelaySeconds < 0 || *in.DelaySeconds > delayMax {
		x.fail(errs.New(errs.InvalidBody, "delaySeconds must be from 0 to %d", delayMax))
		return
	}
	x.changeDelayed(engine.Delayed{Delay: time.Duration(*in.DelaySeconds) * time.Second})
}

func (x *exchange) changeDelayed(change engine.Delayed) {
	id, _, e := x.messageID()
	if e != nil {
		x.fail(e)
		return
	}
	change.Topic, change.ID = x.topic, id
	x.manage(func(ctx context.Context) (any, *errs.Error) { return nil, x.command(ctx, &change) })
}

// parkedQuery reads which parked messages are meant from a query.
func parkedQuery(q url.Values) (f engine.ParkedFilter, e *errs.Error) {
	f.Error = q.Get("error")
	if f.Since, e = timeOf("since", q.Get("since")); e == nil {
		f.Until, e = timeOf("until", q.Get("until"))
	}
	return f, e
}

// listParked answers GET /v1/topics/{topic}/groups/{group}/parked.
func (x *exchange) listParked() {
	q, limit, e := x.page()
	if e != nil {
		x.fail(e)
		return
	}
	from, e := offsetOf(q, "from")
	if e != nil {
		x.fail(e)
		return
	}
	filter, e := parkedQuery(q)
	if e != nil {
		x.fail(e)
		return
	}
	answer, e := x.ask(engine.Query{Kind: engine.QueryParked, Topic: x.topic, Group: x.group, From: from, Max: limit, Parked: filter})
	if e != nil {
		x.fail(e)
		return
	}
	sealer, e := x.sealer()
	if e != nil {
		x.fail(e)
		return
	}
	bodies := q.Get("body") != "false"
	out := wire.Parked{Messages: make([]wire.ParkedMessage, 0, len(answer.Parked)), Next: answer.Next}
	for i := range answer.Parked {
		p := &answer.Parked[i]
		x.chargeBytes(int64(len(p.Delivery.Body)))
		out.Messages = append(out.Messages, wire.ParkedMessage{
			BrowsedMessage: browsed(sealer, &p.Delivery, bodies), Deliveries: p.Delivery.Count, ParkedAt: timeText(p.ParkedAt), LastError: p.Error,
		})
	}
	x.answerJSON(out)
}

// redriveParked answers POST …/parked/redrive, dropParked …/parked/drop.
func (x *exchange) redriveParked() { x.changeParked(engine.Redrive) }
func (x *exchange) dropParked()    { x.changeParked(engine.Drop) }

// parkedIDsMax bounds the messages that one change names.
const parkedIDsMax = 1000

// parkedChange reads what a change is about.
func (x *exchange) parkedChange(op engine.ParkedOp) (in wire.ParkedChange, c engine.Parked, e *errs.Error) {
	body, e := x.body()
	if e != nil {
		return in, c, e
	}
	if e = decodeOver(body, &in); e != nil {
		return in, c, e
	}
	c = engine.Parked{Topic: x.topic, Group: x.group, Op: op, DryRun: in.DryRun}
	c.Filter.Error = in.Error
	if c.Filter.Since, e = timeOf("since", in.Since); e != nil {
		return in, c, e
	}
	if c.Filter.Until, e = timeOf("until", in.Until); e != nil {
		return in, c, e
	}
	if len(in.MessageIDs) > parkedIDsMax {
		return in, c, errs.New(errs.InvalidBody, "messageIds has more than %d members", parkedIDsMax)
	}
	sealer, e := x.sealer()
	if e != nil {
		return in, c, e
	}
	for _, text := range in.MessageIDs {
		id, err := sealer.ParseMessageID(text)
		if err != nil {
			return in, c, errs.New(errs.InvalidBody, "messageIds holds something that is no message id")
		}
		c.Filter.IDs = append(c.Filter.IDs, id)
	}
	conditions := len(in.MessageIDs) > 0 || in.Error != "" || in.Since != "" || in.Until != ""
	switch {
	case conditions == in.All:
		e = errs.New(errs.InvalidBody, `name messages by messageIds, error, since or until, or say "all": true`)
	case in.Max < 0 || in.RatePerSecond < 0:
		e = errs.New(errs.InvalidBody, "max and ratePerSecond must not be negative")
	}
	return in, c, e
}

// changeParked redrives or drops parked messages, some at a time: a command works on a thousand at most, and with a rate
// each second has its share. A client that goes away ends it; what was done is done.
func (x *exchange) changeParked(op engine.ParkedOp) {
	in, command, e := x.parkedChange(op)
	if e != nil {
		x.fail(e)
		return
	}
	_ = http.NewResponseController(x.w).SetWriteDeadline(time.Time{})
	out := wire.ParkedChanged{DryRun: in.DryRun}
	for {
		step := limits.ParkedPerCommandMax
		if in.RatePerSecond > 0 && !in.DryRun {
			step = min(step, in.RatePerSecond)
		}
		if in.Max > 0 {
			step = min(step, in.Max-int(out.Count))
		}
		command.Max = step
		ctx, cancel := x.commandContext()
		reply, e := x.commandReply(ctx, &command)
		cancel()
		if e != nil {
			if out.Count > 0 {
				e.Fields = map[string]any{"count": out.Count}
			}
			x.fail(e)
			return
		}
		out.Count += reply.Count
		command.From = reply.Next
		if reply.Next == 0 || in.Max > 0 && int(out.Count) >= in.Max {
			break
		}
		if in.RatePerSecond > 0 && !in.DryRun {
			pause := time.Duration(float64(reply.Count) / float64(in.RatePerSecond) * float64(time.Second))
			if !x.pause(pause) {
				break
			}
		}
	}
	x.answerJSON(out)
}

// pause waits, and reports whether there is anybody left to go on for.
func (x *exchange) pause(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-x.r.Context().Done():
	case <-x.s.drained.Done():
	}
	return false
}
