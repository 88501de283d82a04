package push

import (
	"context"
	"encoding/json"
	"slices"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// Table is the table of documents that holds the subscriptions, each under its ID.
const Table = "subscriptions"

// pageMax is how many items one query asks for.
const pageMax = 500

// list returns all subscriptions by ID. One that cannot be read is passed over: a newer release may have written it.
func list(ctx context.Context, b querier) ([]*Subscription, error) {
	var out []*Subscription
	after := ""
	for {
		a, err := b.Query(ctx, engine.Query{Kind: engine.QueryDocuments, Table: Table, After: after, Max: pageMax})
		if err != nil {
			return nil, err
		}
		for i := range a.Documents {
			if s, err := decode(&a.Documents[i]); err == nil {
				out = append(out, s)
			}
			after = a.Documents[i].Key
		}
		if !a.More || len(a.Documents) == 0 {
			return out, nil
		}
	}
}

type querier interface {
	Query(ctx context.Context, q engine.Query) (engine.Answer, error)
}

type proposer interface {
	querier
	Propose(ctx context.Context, p raft.Proposal) (raft.Reply, error)
}

func decode(doc *engine.StoredDocument) (*Subscription, error) {
	s := new(Subscription)
	if err := json.Unmarshal(doc.Value, s); err != nil {
		return nil, err
	}
	s.ID, s.Revision = doc.Key, doc.Revision
	return s, nil
}

// find returns the subscription of this ID, nil for none.
func find(ctx context.Context, b querier, id string) (*Subscription, error) {
	a, err := b.Query(ctx, engine.Query{Kind: engine.QueryDocuments, Table: Table, Key: id, Max: 1})
	if err != nil || len(a.Documents) == 0 {
		return nil, err
	}
	return decode(&a.Documents[0])
}

// put stores a subscription if it is still at the revision it was read at (0: it must not exist).
func put(ctx context.Context, b proposer, s *Subscription, revision uint64) error {
	value, err := json.Marshal(s)
	if err != nil {
		return errs.Of(errs.Internal).With(err)
	}
	r, err := apply(ctx, b, &engine.Document{Table: Table, Key: s.ID, Value: value, IfRevision: revision, IfAbsent: revision == 0})
	if err != nil {
		return err
	}
	s.Revision = r.Revision
	return nil
}

// apply has a command applied; a refusal by the engine is an error.
func apply(ctx context.Context, b proposer, c engine.Command) (raft.Reply, error) {
	r, err := b.Propose(ctx, raft.Proposal{Command: c.AppendTo(nil)})
	if err == nil && r.Code != errs.OK {
		e := errs.Of(r.Code)
		e.RetryAfter = r.RetryAfter
		err = e
	}
	return r, err
}

// topics lists the names of topics that begin with a prefix and that the queue protocol can name.
func topics(ctx context.Context, b querier, prefix string) ([]string, error) {
	out := []string{}
	after := ""
	if prefix != "" {
		// The first name to be listed is the prefix itself, if there is such a topic.
		after = prefix[:len(prefix)-1] + string([]byte{prefix[len(prefix)-1] - 1, 0xff})
	}
	for {
		a, err := b.Query(ctx, engine.Query{Kind: engine.QueryTopics, After: after, Max: pageMax})
		if err != nil {
			return nil, err
		}
		for i := range a.Topics {
			after = a.Topics[i].Name
			if len(after) >= len(prefix) && after[:len(prefix)] > prefix {
				return out, nil
			}
			if Matches(prefix+"*", after) {
				out = append(out, after)
			}
		}
		if !a.More || len(a.Topics) == 0 {
			return out, nil
		}
	}
}

// ensure makes a group fit what its subscriptions ask for. Settings that are none of theirs stay as they are.
// changed says that a subscription was created or changed: its initial delay begins anew. before is what they asked
// for until then, so that what they no longer ask for goes.
func (g *groupSettings) ensure(ctx context.Context, b proposer, topic, group string, changed bool, before *groupSettings) error {
	var have engine.GroupSettings
	exists := true
	a, err := b.Query(ctx, engine.Query{Kind: engine.QueryGroup, Topic: topic, Group: group, Max: 1})
	switch code := errs.CodeOf(err); {
	case code == errs.TopicNotFound || code == errs.GroupNotFound || code == errs.OK && len(a.Groups) == 0:
		exists = false
	case err != nil:
		return err
	default:
		have = a.Groups[0].Settings
	}
	want := have
	if g.maxDeliveries > 0 || before != nil && int64(have.MaxDeliveries) == before.maxDeliveries {
		want.MaxDeliveries = uint32(g.maxDeliveries)
	}
	if g.maxConcurrency > 0 || before != nil && int64(have.MaxConcurrency) == before.maxConcurrency {
		want.MaxConcurrency = int(g.maxConcurrency)
	}
	want.InitialDelay = time.Duration(g.initialDelay) * time.Second
	if changed || !exists {
		want.StartDelay = want.InitialDelay
	}
	if g.rest {
		want.ExcludeDeployments = g.claimed
	}
	if exists && want.StartDelay == 0 && want.MaxDeliveries == have.MaxDeliveries && want.MaxConcurrency == have.MaxConcurrency &&
		want.InitialDelay == have.InitialDelay && slices.Equal(want.ExcludeDeployments, have.ExcludeDeployments) {
		return nil
	}
	_, err = apply(ctx, b, &engine.GroupSet{Topic: topic, Group: group, Create: true, Start: engine.Start{Kind: engine.StartBeginning}, Settings: &want})
	return err
}

// unclaim lets receives without a deployment have those that were claimed and are not any more.
func (g *groupSettings) unclaim(ctx context.Context, b proposer, topic, group string, claimed []string) error {
	a, err := b.Query(ctx, engine.Query{Kind: engine.QueryGroup, Topic: topic, Group: group, Max: 1})
	switch code := errs.CodeOf(err); {
	case code == errs.TopicNotFound || code == errs.GroupNotFound || code == errs.OK && len(a.Groups) == 0:
		return nil
	case err != nil:
		return err
	}
	want := a.Groups[0].Settings
	var kept []string
	for _, d := range want.ExcludeDeployments {
		if !slices.Contains(claimed, d) || slices.Contains(g.excluded(), d) {
			kept = append(kept, d)
		}
	}
	if len(kept) == len(want.ExcludeDeployments) {
		return nil
	}
	want.ExcludeDeployments = kept
	_, err = apply(ctx, b, &engine.GroupSet{Topic: topic, Group: group, Settings: &want})
	return err
}
