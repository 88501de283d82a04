package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

func secondsOf(d time.Duration) int64 { return int64(d / time.Second) }

func topicSettingsOf(s *engine.TopicSettings) wire.TopicSettings {
	return wire.TopicSettings{
		Paused: s.Paused, RetentionDefaultSeconds: secondsOf(s.RetentionDefault), RetentionMaxSeconds: secondsOf(s.RetentionMax),
		MessageBytesMax: s.MessageBytesMax, DepthMax: s.DepthMax, DropAcknowledged: s.DropAcknowledged,
	}
}

func groupSettingsOf(s *engine.GroupSettings) wire.GroupSettings {
	out := wire.GroupSettings{
		Paused: s.Paused, MaxDeliveries: s.MaxDeliveries, Park: s.Park, ParkedRetentionSeconds: secondsOf(s.ParkedRetention),
		RetryAfterSeconds: secondsOf(s.RetryAfter), InitialDelaySeconds: secondsOf(s.InitialDelay), MaxConcurrency: s.MaxConcurrency,
		PendingSeconds: secondsOf(s.Visibility), DeploymentID: s.Deployment, ExcludeDeployments: s.ExcludeDeployments,
	}
	if out.ExcludeDeployments == nil {
		out.ExcludeDeployments = []string{}
	}
	return out
}

// bound checks a number of a body.
func bound(name string, v, high int64) *errs.Error {
	if v < 0 || v > high {
		return errs.New(errs.InvalidBody, "%s must be from 0 to %d", name, high)
	}
	return nil
}

// decodeOver reads a JSON object over a document that has values already: members that are absent stay as they are, and
// unknown ones are refused.
func decodeOver(body []byte, document any) *errs.Error {
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(document); err != nil {
		return errs.New(errs.InvalidBody, "the body is not the expected JSON object%s", whatIsWrong(err))
	}
	if _, err := dec.Token(); err != io.EOF {
		return errs.New(errs.InvalidBody, "there is more behind the JSON object")
	}
	return nil
}

// whatIsWrong names the member that a JSON object could not be read for, if it was one.
func whatIsWrong(err error) string {
	const shown = 100 // a member's name is the client's, and may be long
	if name, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok && len(name) < shown {
		return ": it has no member " + name
	}
	if wrong := (*json.UnmarshalTypeError)(nil); errors.As(err, &wrong) && wrong.Field != "" && len(wrong.Value) < shown {
		return ": a " + wrong.Value + " is not what " + wrong.Field + " takes"
	}
	return ""
}

// changeTopicSettings reads a JSON object over settings.
func changeTopicSettings(s engine.TopicSettings, body []byte) (engine.TopicSettings, *errs.Error) {
	w := topicSettingsOf(&s)
	if e := decodeOver(body, &w); e != nil {
		return s, e
	}
	for _, f := range []struct {
		name      string
		value, lo int64
	}{{"retentionDefaultSeconds", w.RetentionDefaultSeconds, retentionMin}, {"retentionMaxSeconds", w.RetentionMaxSeconds, retentionMin}} {
		if f.value != 0 && (f.value < f.lo || f.value > retentionMax) {
			return s, errs.New(errs.InvalidBody, "%s must be 0 or from %d to %d", f.name, f.lo, retentionMax)
		}
	}
	if w.RetentionMaxSeconds > 0 && w.RetentionDefaultSeconds > w.RetentionMaxSeconds {
		return s, errs.New(errs.InvalidBody, "retentionDefaultSeconds is above retentionMaxSeconds")
	}
	if e := bound("messageBytesMax", w.MessageBytesMax, limits.LargeMessageBytesMax); e != nil {
		return s, e
	}
	return engine.TopicSettings{
		Paused: w.Paused, RetentionDefault: time.Duration(w.RetentionDefaultSeconds) * time.Second, RetentionMax: time.Duration(w.RetentionMaxSeconds) * time.Second,
		MessageBytesMax: w.MessageBytesMax, DepthMax: w.DepthMax, DropAcknowledged: w.DropAcknowledged,
	}, nil
}

// changeGroupSettings reads a JSON object over settings.
func changeGroupSettings(s engine.GroupSettings, body []byte) (engine.GroupSettings, *errs.Error) {
	w := groupSettingsOf(&s)
	if e := decodeOver(body, &w); e != nil {
		return s, e
	}
	for _, f := range []struct {
		name        string
		value, high int64
	}{
		{"parkedRetentionSeconds", w.ParkedRetentionSeconds, secondsOf(limits.ParkedRetentionMax)}, {"retryAfterSeconds", w.RetryAfterSeconds, retentionMax},
		{"initialDelaySeconds", w.InitialDelaySeconds, delayMax}, {"maxConcurrency", int64(w.MaxConcurrency), concurrencyMax}, {"pendingSeconds", w.PendingSeconds, visibilityMax},
		{"maxDeliveries", int64(w.MaxDeliveries), 1<<31 - 1},
	} {
		if e := bound(f.name, f.value, f.high); e != nil {
			return s, e
		}
	}
	for _, d := range append([]string{w.DeploymentID}, w.ExcludeDeployments...) {
		if d != "" && !validName(d) {
			return s, errs.New(errs.InvalidBody, "a deployment has 1 to %d characters out of A-Z a-z 0-9 _ -", limits.NameBytesMax)
		}
	}
	switch {
	case w.DeploymentID != "" && len(w.ExcludeDeployments) > 0:
		return s, errs.New(errs.InvalidBody, "deploymentId and excludeDeployments contradict each other")
	case slices.Contains(w.ExcludeDeployments, ""):
		return s, errs.New(errs.InvalidBody, "excludeDeployments holds an empty name")
	case len(w.ExcludeDeployments) > limits.DeploymentsPerGroupMax:
		return s, errs.New(errs.InvalidBody, "excludeDeployments holds more than %d names", limits.DeploymentsPerGroupMax)
	}
	out := s
	out.Paused, out.MaxDeliveries, out.Park, out.MaxConcurrency = w.Paused, w.MaxDeliveries, w.Park, w.MaxConcurrency
	out.ParkedRetention, out.RetryAfter = time.Duration(w.ParkedRetentionSeconds)*time.Second, time.Duration(w.RetryAfterSeconds)*time.Second
	out.InitialDelay, out.Visibility = time.Duration(w.InitialDelaySeconds)*time.Second, time.Duration(w.PendingSeconds)*time.Second
	out.Deployment, out.ExcludeDeployments = w.DeploymentID, w.ExcludeDeployments
	return out, nil
}

// startOf reads a place in a topic.
func startOf(w wire.Start) (s engine.Start, e *errs.Error) {
	if w.Time != "" && w.At != "time" || w.ID != "" && w.At != "id" {
		return s, errs.New(errs.InvalidBody, `time belongs to "at": "time", and id to "at": "id"`)
	}
	switch w.At {
	case "", "beginning":
		s.Kind = engine.StartBeginning
	case "end":
		s.Kind = engine.StartEnd
	case "time":
		s.Kind = engine.StartTime
		if s.Time, e = timeOf("time", w.Time); e == nil && s.Time == 0 {
			e = errs.New(errs.InvalidBody, "time is missing")
		}
	case "id":
		s.Kind = engine.StartID
		ms, seq, _ := strings.Cut(w.ID, "-")
		var err1, err2 error
		s.ID.Ms, err1 = strconv.ParseUint(ms, 10, 64)
		if seq != "" {
			s.ID.Seq, err2 = strconv.ParseUint(seq, 10, 64)
		}
		if err1 != nil || err2 != nil {
			e = errs.New(errs.InvalidBody, "id must be a stream ID such as 1767225600123-0")
		}
	default:
		e = errs.New(errs.InvalidBody, `at must be "beginning", "end", "time" or "id"`)
	}
	return s, e
}

// timeOf reads a time in RFC 3339, or none.
func timeOf(name, text string) (ms int64, e *errs.Error) {
	if text == "" {
		return 0, nil
	}
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil || t.UnixMilli() <= 0 {
		return 0, errs.New(errs.BadRequest, "%s must be a time such as 2026-11-22T06:00:00Z", name)
	}
	return t.UnixMilli(), nil
}

// body reads a body that is a JSON object; an absent one reads as an empty one.
func (x *exchange) body() ([]byte, *errs.Error) {
	body, e := x.readBody(nil, adminBodyMax)
	if e != nil {
		return nil, e
	}
	if len(bytes.TrimSpace(body)) == 0 {
		return []byte("{}"), nil
	}
	return body, nil
}

// noBody refuses a body where none is read: it may have been meant for something.
func (x *exchange) noBody() *errs.Error {
	body, e := x.body()
	if e != nil {
		return e
	}
	return decodeOver(body, &struct{}{})
}

// manage runs an administrative change within the request's time and one of the slots for commands, and answers with
// what it returns.
func (x *exchange) manage(do func(ctx context.Context) (document any, e *errs.Error)) {
	if e := x.holdSlot(); e != nil {
		x.fail(e)
		return
	}
	ctx, cancel := x.commandContext()
	defer cancel()
	document, e := do(ctx)
	switch {
	case e != nil:
		x.fail(e)
	case document == nil:
		x.noContent()
	default:
		x.answerJSON(document)
	}
}

// look reads the engine's state while a slot is held.
func (x *exchange) look(ctx context.Context, q engine.Query) (engine.Answer, *errs.Error) {
	answer, err := x.s.backend.Query(ctx, q)
	if err != nil {
		return answer, errs.From(err)
	}
	return answer, nil
}

func (x *exchange) lookTopic(ctx context.Context) (*engine.TopicInfo, *errs.Error) {
	answer, e := x.look(ctx, engine.Query{Kind: engine.QueryTopic, Topic: x.topic, Max: 1})
	if e == nil && len(answer.Topics) == 0 {
		e = errs.Of(errs.TopicNotFound)
	}
	if e != nil {
		return nil, e
	}
	return &answer.Topics[0], nil
}

func (x *exchange) lookGroup(ctx context.Context) (*engine.GroupInfo, *errs.Error) {
	answer, e := x.look(ctx, engine.Query{Kind: engine.QueryGroup, Topic: x.topic, Group: x.group, Max: 1})
	if e == nil && len(answer.Groups) == 0 {
		e = errs.Of(errs.GroupNotFound)
	}
	if e != nil {
		return nil, e
	}
	return &answer.Groups[0], nil
}

func (x *exchange) answerTopic(ctx context.Context) (any, *errs.Error) {
	t, e := x.lookTopic(ctx)
	if e != nil {
		return nil, e
	}
	return topicOf(t), nil
}

func (x *exchange) answerGroup(ctx context.Context) (any, *errs.Error) {
	g, e := x.lookGroup(ctx)
	if e != nil {
		return nil, e
	}
	return groupOf(g), nil
}

// createTopic answers PUT /v1/topics/{topic}: it makes the topic if need be and sets what the body names.
func (x *exchange) createTopic() { x.setTopic(true, nil) }

// changeTopic answers PATCH /v1/topics/{topic}.
func (x *exchange) changeTopic() { x.setTopic(false, nil) }

// pauseTopic and resumeTopic answer POST …/pause and …/resume.
func (x *exchange) pauseTopic()  { x.setTopic(false, []byte(`{"paused":true}`)) }
func (x *exchange) resumeTopic() { x.setTopic(false, []byte(`{"paused":false}`)) }

func (x *exchange) setTopic(create bool, change []byte) {
	var e *errs.Error
	if change == nil {
		change, e = x.body()
	} else {
		e = x.noBody()
	}
	if e != nil {
		x.fail(e)
		return
	}
	x.manage(func(ctx context.Context) (any, *errs.Error) {
		var old engine.TopicSettings
		t, e := x.lookTopic(ctx)
		switch {
		case e == nil:
			old = t.Settings
		case !create || e.Code != errs.TopicNotFound:
			return nil, e
		}
		settings, e := changeTopicSettings(old, change)
		if e != nil {
			return nil, e
		}
		if e := x.command(ctx, &engine.TopicSet{Topic: x.topic, Create: create, Settings: &settings}); e != nil {
			return nil, e
		}
		return x.answerTopic(ctx)
	})
}

// purgeTopic answers POST /v1/topics/{topic}/purge.
func (x *exchange) purgeTopic() {
	if e := x.noBody(); e != nil {
		x.fail(e)
		return
	}
	x.manage(func(ctx context.Context) (any, *errs.Error) {
		if e := x.command(ctx, &engine.Purge{Topic: x.topic}); e != nil {
			return nil, e
		}
		return x.answerTopic(ctx)
	})
}

// deleteTopic answers DELETE /v1/topics/{topic}.
func (x *exchange) deleteTopic() {
	x.manage(func(ctx context.Context) (any, *errs.Error) {
		return nil, x.command(ctx, &engine.TopicDelete{Topic: x.topic})
	})
}

// createGroup answers PUT /v1/topics/{topic}/groups/{group}: it makes topic and group if need be. The start counts for a
// group that is made.
func (x *exchange) createGroup() {
	body, e := x.body()
	if e != nil {
		x.fail(e)
		return
	}
	var in wire.NewGroup
	if e = decodeOver(body, &in); e != nil {
		x.fail(e)
		return
	}
	start, e := startOf(in.Start)
	if e != nil {
		x.fail(e)
		return
	}
	x.manage(func(ctx context.Context) (any, *errs.Error) {
		command := &engine.GroupSet{Topic: x.topic, Group: x.group, Create: true, Start: start}
		if len(in.Settings) > 0 {
			var old engine.GroupSettings
			if g, e := x.lookGroup(ctx); e == nil {
				old = g.Settings
			} else if e.Code != errs.TopicNotFound && e.Code != errs.GroupNotFound {
				return nil, e
			}
			settings, e := changeGroupSettings(old, in.Settings)
			if e != nil {
				return nil, e
			}
			command.Settings = &settings
		}
		if e := x.command(ctx, command); e != nil {
			return nil, e
		}
		return x.answerGroup(ctx)
	})
}

// changeGroup answers PATCH /v1/topics/{topic}/groups/{group}.
func (x *exchange) changeGroup() { x.setGroup(nil) }

// pauseGroup and resumeGroup answer POST …/pause and …/resume.
func (x *exchange) pauseGroup()  { x.setGroup([]byte(`{"paused":true}`)) }
func (x *exchange) resumeGroup() { x.setGroup([]byte(`{"paused":false}`)) }

func (x *exchange) setGroup(change []byte) {
	var e *errs.Error
	if change == nil {
		change, e = x.body()
	} else {
		e = x.noBody()
	}
	if e != nil {
		x.fail(e)
		return
	}
	x.manage(func(ctx context.Context) (any, *errs.Error) {
		g, e := x.lookGroup(ctx)
		if e != nil {
			return nil, e
		}
		settings, e := changeGroupSettings(g.Settings, change)
		if e != nil {
			return nil, e
		}
		if e := x.command(ctx, &engine.GroupSet{Topic: x.topic, Group: x.group, Settings: &settings}); e != nil {
			return nil, e
		}
		return x.answerGroup(ctx)
	})
}

// seekGroup answers POST /v1/topics/{topic}/groups/{group}/seek.
func (x *exchange) seekGroup() {
	var in wire.Start
	if e := x.readJSON(&in); e != nil {
		x.fail(e)
		return
	}
	if in.At == "" {
		x.fail(errs.New(errs.InvalidBody, `at must be "beginning", "end", "time" or "id"`))
		return
	}
	start, e := startOf(in)
	if e != nil {
		x.fail(e)
		return
	}
	x.manage(func(ctx context.Context) (any, *errs.Error) {
		if e := x.command(ctx, &engine.GroupSet{Topic: x.topic, Group: x.group, Seek: true, Start: start}); e != nil {
			return nil, e
		}
		return x.answerGroup(ctx)
	})
}

// deleteGroup answers DELETE /v1/topics/{topic}/groups/{group}.
func (x *exchange) deleteGroup() {
	x.manage(func(ctx context.Context) (any, *errs.Error) {
		return nil, x.command(ctx, &engine.GroupDelete{Topic: x.topic, Group: x.group})
	})
}
