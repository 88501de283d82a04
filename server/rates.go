package server

import (
	"context"
	"math"
	"sync"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/wire"
)

// A rate is the difference of two looks at counters that only rise. The older look is kept for those who ask again; who
// asks for the first time waits a moment for the second one.
const (
	// rateFirst is how long the first asker waits.
	rateFirst = 500 * time.Millisecond
	// rateSpan is from when on a look is replaced by a newer one, rateForget until when it is worth comparing with.
	rateSpan   = 10 * time.Second
	rateForget = 5 * time.Minute
	// ratesMax bounds the groups whose looks are kept.
	ratesMax = 4096
)

// sample is one look at a group. Its counters are replicated: they go on through a change of the leader.
type sample struct {
	at                             time.Time
	incarnation                    uint64
	arrived, acknowledged, reached uint64
}

// sampleOf notes what has become visible to the group, was acknowledged, and was delivered for the first time. A group
// that is a deployment's has no counter of what arrived: that is what was delivered and what waits.
func sampleOf(t *engine.TopicInfo, g *engine.GroupInfo, at time.Time) sample {
	s := sample{at: at, incarnation: g.Incarnation, arrived: t.Next, acknowledged: g.Acknowledged, reached: g.Delivered - g.Redelivered}
	if g.Settings.Deployment != "" {
		s.arrived = g.Ready + s.reached
	}
	return s
}

// rates are the looks that are kept, two for each group: the one to compare with, and its successor.
type rates struct {
	mu      sync.Mutex
	byGroup map[engine.GroupRef][2]sample
}

// compare returns the look to compare a new one with, if there is one, and keeps the new one.
func (r *rates) compare(key engine.GroupRef, now sample) (base sample, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byGroup == nil {
		r.byGroup = make(map[engine.GroupRef][2]sample)
	}
	kept, known := r.byGroup[key]
	if known && (kept[0].incarnation != now.incarnation || now.at.Sub(kept[1].at) > rateForget || now.acknowledged < kept[0].acknowledged) {
		known = false
	}
	if !known {
		if len(r.byGroup) >= ratesMax {
			clear(r.byGroup)
		}
		r.byGroup[key] = [2]sample{now, now}
		return sample{}, false
	}
	if now.at.Sub(kept[1].at) >= rateSpan {
		r.byGroup[key] = [2]sample{kept[1], now}
	}
	return kept[0], now.at.Sub(kept[0].at) >= rateFirst
}

// groupRates answers how a group gets on. It returns the group as of the last look.
func (x *exchange) groupRates(ctx context.Context) (*engine.GroupInfo, *wire.GroupRates, *errs.Error) {
	key := engine.GroupRef{Topic: x.topic, Group: x.group}
	for {
		t, e := x.lookTopic(ctx)
		if e != nil {
			return nil, nil, e
		}
		g, e := x.lookGroup(ctx)
		if e != nil {
			return nil, nil, e
		}
		now := sampleOf(t, g, time.Now())
		base, ok := x.s.rates.compare(key, now)
		if !ok {
			timer := time.NewTimer(rateFirst)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return nil, nil, errs.Of(errs.Overloaded).With(ctx.Err())
			}
			continue
		}
		over := now.at.Sub(base.at).Seconds()
		per := func(later, earlier uint64) float64 {
			if later < earlier {
				return 0
			}
			return math.Round(float64(later-earlier)/over*1000) / 1000
		}
		r := &wire.GroupRates{
			OverSeconds: math.Round(over*1000) / 1000, ArrivalPerSecond: per(now.arrived, base.arrived), DrainPerSecond: per(now.acknowledged, base.acknowledged),
			ReachedPerSecond: per(now.reached, base.reached), Delayed: t.Delayed,
		}
		depth := float64(g.Ready) + float64(g.Unsettled)
		if net := r.DrainPerSecond - r.ArrivalPerSecond; depth == 0 || net > 0 {
			seconds := 0.0
			if depth > 0 {
				seconds = math.Round(depth/net*10) / 10
			}
			r.SecondsToDrain = &seconds
		}
		drain := uint64(r.ReachedPerSecond * 1000)
		if drain == 0 {
			drain = engine.DrainNone
		}
		answer, e := x.look(ctx, engine.Query{Kind: engine.QueryGroup, Topic: x.topic, Group: x.group, Max: 1, DrainRate: drain})
		if e != nil {
			return nil, nil, e
		}
		if len(answer.Groups) == 1 {
			r.ExpiringUnreached = answer.Groups[0].Expiring
		}
		return g, r, nil
	}
}
