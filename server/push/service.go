package push

import (
	"context"
	"slices"
	"sort"
	"strings"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

// writeAttempts is how often a change is tried anew that another one got ahead of.
const writeAttempts = 8

// Create creates or replaces the subscription of a topic, group and deployment; created says which. When it returns,
// the subscription is in force: the groups exist from the beginning of their topics on, and whatever is published
// from now on is pushed. With dryRun it only says what it would do.
func (d *Dispatcher) Create(ctx context.Context, w *wire.Subscription, dryRun bool) (out wire.Subscription, created, changed bool, err error) {
	s, err := fromWire(w, d.guard)
	if err != nil {
		return out, false, false, err
	}
	for range writeAttempts {
		old, err := find(ctx, d.backend, s.ID)
		if err != nil {
			return out, false, false, err
		}
		next := *s
		next.CreatedAt = time.Now().UnixMilli()
		next.ChangedAt = next.CreatedAt
		secret, revision := "", uint64(0)
		if old != nil {
			next.CreatedAt, revision = old.CreatedAt, old.Revision
			if len(next.Secrets) == 0 || next.Secrets[0].Text == old.Secrets[0].Text {
				next.Secrets = old.Secrets
			}
			if next.same(old) {
				return old.toWire(), false, false, nil
			}
		}
		if len(next.Secrets) == 0 {
			secret = newSecret()
			next.Secrets = []Secret{{Text: secret}}
		}
		if dryRun {
			return next.toWire(), old == nil, true, nil
		}
		if err := d.prepare(ctx, &next, old); err != nil {
			return out, false, false, err
		}
		switch err := put(ctx, d.backend, &next, revision); errs.CodeOf(err) {
		case errs.OK:
			out = next.toWire()
			out.Secret = secret
			return out, old == nil, true, nil
		case errs.Conflict, errs.Precondition, errs.NotFound:
			continue
		default:
			return out, false, false, err
		}
	}
	return out, false, false, errs.New(errs.Conflict, "the subscription is being changed by others")
}

// prepare makes the groups that a subscription is about to have, with the settings it asks for. It comes before the
// subscription itself is stored, so that nothing is pushed under the settings of before.
func (d *Dispatcher) prepare(ctx context.Context, next, old *Subscription) error {
	subs, err := list(ctx, d.backend)
	if err != nil {
		return err
	}
	var before []*Subscription
	after := []*Subscription{next}
	for _, s := range subs {
		before = append(before, s)
		if s.ID != next.ID {
			after = append(after, s)
		}
	}
	names, err := d.names(ctx, next.Topic)
	if err != nil {
		return err
	}
	was, will := planFor(before, names), planFor(after, names)
	for _, topic := range will.topics[next.ID] {
		key := groupKey{topic, next.Group}
		if err := will.settings[key].ensure(ctx, d.backend, topic, next.Group, next.InitialDelay > 0, was.settings[key]); err != nil {
			return err
		}
	}
	return nil
}

// names lists the topics that a pattern stands for now; one that is a name stands for itself.
func (d *Dispatcher) names(ctx context.Context, pattern string) ([]string, error) {
	if prefix, wild := strings.CutSuffix(pattern, "*"); wild {
		return topics(ctx, d.backend, prefix)
	}
	return []string{pattern}, nil
}

// planFor makes a plan for certain topics alone.
func planFor(subs []*Subscription, names []string) *plan {
	known := make(map[string][]string)
	var fit []*Subscription
	for _, s := range subs {
		if prefix, wild := strings.CutSuffix(s.Topic, "*"); wild {
			known[prefix] = nil
			for _, n := range names {
				if Matches(s.Topic, n) {
					known[prefix] = append(known[prefix], n)
				}
			}
			fit = append(fit, s)
			continue
		}
		for _, n := range names {
			if s.Topic == n {
				fit = append(fit, s)
			}
		}
	}
	return makePlan(fit, known)
}

// List returns subscriptions by ID after one, with what this node knows of their state.
func (d *Dispatcher) List(ctx context.Context, after string, limit int) (wire.Subscriptions, error) {
	out := wire.Subscriptions{Subscriptions: []wire.Subscription{}}
	a, err := d.backend.Query(ctx, engine.Query{Kind: engine.QueryDocuments, Table: Table, After: after, Max: limit})
	if err != nil {
		return out, err
	}
	for i := range a.Documents {
		s, err := decode(&a.Documents[i])
		if err != nil {
			continue
		}
		w := s.toWire()
		w.State = d.State(s.ID, s.Revision)
		out.Subscriptions = append(out.Subscriptions, w)
	}
	if n := len(a.Documents); a.More && n > 0 {
		out.Next = a.Documents[n-1].Key
	}
	return out, nil
}

// Get returns one subscription.
func (d *Dispatcher) Get(ctx context.Context, id string) (wire.Subscription, error) {
	s, err := d.find(ctx, id)
	if err != nil {
		return wire.Subscription{}, err
	}
	w := s.toWire()
	w.State = d.State(s.ID, s.Revision)
	return w, nil
}

func (d *Dispatcher) find(ctx context.Context, id string) (*Subscription, error) {
	s, err := find(ctx, d.backend, id)
	if err == nil && s == nil {
		err = errs.New(errs.NotFound, "there is no subscription %q", id)
	}
	return s, err
}

// Delete deletes a subscription. Its groups stay, with what they have done; what is in flight is settled as ever. What
// it claimed of a deployment is no longer kept from the group's other receives.
func (d *Dispatcher) Delete(ctx context.Context, id string) error {
	gone, err := d.find(ctx, id)
	if err != nil {
		return err
	}
	if _, err := apply(ctx, d.backend, &engine.Document{Table: Table, Key: id, Delete: true}); err != nil {
		return err
	}
	subs, err := list(ctx, d.backend)
	if err != nil {
		return err
	}
	names, err := d.names(ctx, gone.Topic)
	if err != nil {
		return err
	}
	was, will := planFor(append(slices.Clone(subs), gone), names), planFor(subs, names)
	for _, topic := range was.topics[id] {
		key := groupKey{topic, gone.Group}
		if !was.settings[key].rest {
			continue // nothing was kept from anybody
		}
		left := will.settings[key]
		if left == nil {
			left = new(groupSettings)
		}
		if err := left.unclaim(ctx, d.backend, topic, gone.Group, was.settings[key].claimed); err != nil {
			return err
		}
	}
	return nil
}

// Rotate gives a subscription a new signing secret. Pushes are signed with the old ones as well until overlap has
// passed.
func (d *Dispatcher) Rotate(ctx context.Context, id string, r wire.RotateSecret) (wire.Subscription, error) {
	var out wire.Subscription
	overlap := overlapDefault
	if r.OverlapSeconds != nil {
		overlap = *r.OverlapSeconds
	}
	if overlap < 0 || overlap > overlapMax {
		return out, errs.New(errs.InvalidBody, "overlapSeconds must be from 0 to %d", overlapMax)
	}
	secret := r.Secret
	if secret == "" {
		secret = newSecret()
	} else if _, err := secretKey(secret); err != nil {
		return out, errs.New(errs.InvalidBody, "secret: %v", err)
	}
	for range writeAttempts {
		old, err := d.find(ctx, id)
		if err != nil {
			return out, err
		}
		now := time.Now().UnixMilli()
		next := *old
		next.ChangedAt = now
		next.Secrets = []Secret{{Text: secret}}
		for _, s := range old.Secrets {
			until := now + overlap*1000
			if s.Until != 0 {
				until = min(until, s.Until)
			}
			if s.Text != secret && until > now && len(next.Secrets) < secretsMax {
				next.Secrets = append(next.Secrets, Secret{Text: s.Text, Until: until})
			}
		}
		switch err := put(ctx, d.backend, &next, old.Revision); errs.CodeOf(err) {
		case errs.OK:
			out = next.toWire()
			out.Secret = secret
			return out, nil
		case errs.Conflict, errs.Precondition, errs.NotFound:
			continue
		default:
			return out, err
		}
	}
	return out, errs.New(errs.Conflict, "the subscription is being changed by others")
}

// Drained says what the groups of a deployment's subscriptions have not done of its messages.
func (d *Dispatcher) Drained(ctx context.Context, deployment string) (wire.DeploymentDrain, error) {
	out := wire.DeploymentDrain{DeploymentID: deployment, Drained: true, Groups: []wire.DrainGroup{}}
	if !validName(deployment) {
		return out, errs.New(errs.InvalidName, "a deployment's name has 1 to %d characters out of A-Z a-z 0-9 _ -", limits.NameBytesMax)
	}
	subs, err := list(ctx, d.backend)
	if err != nil {
		return out, err
	}
	known := make(map[string][]string)
	for _, s := range subs {
		if prefix, wild := strings.CutSuffix(s.Topic, "*"); wild && s.Deployment == deployment && known[prefix] == nil {
			if known[prefix], err = topics(ctx, d.backend, prefix); err != nil {
				return out, err
			}
		}
	}
	p := makePlan(subs, known)
	found := false
	for _, s := range subs {
		if s.Deployment != deployment {
			continue
		}
		found = true
		for _, topic := range p.topics[s.ID] {
			a, err := d.backend.Query(ctx, engine.Query{Kind: engine.QueryGroup, Topic: topic, Group: s.Group, Deployment: deployment, Max: 1})
			switch code := errs.CodeOf(err); {
			case code == errs.TopicNotFound || code == errs.GroupNotFound:
				continue
			case err != nil:
				return out, err
			case len(a.Groups) == 0:
				continue
			}
			g := &a.Groups[0]
			if g.Ready == 0 && g.Unsettled == 0 {
				continue
			}
			out.Drained = false
			out.Groups = append(out.Groups, wire.DrainGroup{SubscriptionID: s.ID, Topic: topic, ConsumerGroup: s.Group, Ready: g.Ready, Unsettled: uint64(g.Unsettled)})
		}
	}
	if !found {
		return out, errs.New(errs.NotFound, "no subscription names the deployment %q", deployment)
	}
	sort.Slice(out.Groups, func(i, j int) bool {
		a, b := &out.Groups[i], &out.Groups[j]
		return a.Topic < b.Topic || a.Topic == b.Topic && a.ConsumerGroup < b.ConsumerGroup
	})
	return out, nil
}

// State is what this node knows of a subscription while it leads, nil otherwise.
func (d *Dispatcher) State(id string, revision uint64) *wire.SubscriptionState {
	d.mu.Lock()
	f := d.feeds[id]
	topics := 0
	if f != nil {
		topics = len(f.lanes)
	}
	d.mu.Unlock()
	if f == nil || f.sub.Revision != revision {
		return nil
	}
	s := f.ep.snapshot()
	return &wire.SubscriptionState{
		State: s.state, Breaker: s.breaker, OpenSince: text(s.openSince), NextProbe: text(s.nextProbe), Inflight: s.inflight, Limit: s.limit,
		Topics: topics, Requests: s.requests, Succeeded: s.succeeded, Failed: s.failed, LastError: s.lastError, LastErrorAt: text(s.lastErrorAt),
		LastPushAt: text(s.lastPushAt),
	}
}

func text(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return timeText(t.UnixMilli())
}
