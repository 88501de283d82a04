package engine

import (
	"math"
	"slices"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

func (e *Engine) applyReceive(r *reader, res *Result) error {
	var v receiveView
	v.parse(r)
	switch {
	case r.err() != nil || v.max < 1 || v.visibility <= 0:
		res.Code = errs.BadRequest
		return nil
	}
	t, code := e.topicNamed(v.topic)
	if code != errs.OK {
		res.Code = code
		return nil
	}
	g, code := e.groupNamed(t, v.group, v.latest)
	if code != errs.OK {
		res.Code = code
		return nil
	}
	now := e.stamp.Cluster
	g.fold(now, math.MaxInt)
	var err error
	room := v.max
	most := g.concurrency(v.maxConcurrency)
	if most > 0 {
		room = min(room, most-g.inflight)
	}
	if g.paused() {
		room = 0
	}
	if len(v.deployment) == 0 && g.settings.Deployment != "" {
		v.deployment = []byte(g.settings.Deployment)
	}
	ds := e.scratch[:0]
	if len(v.deployment) > 0 {
		if ds, err = e.receiveOf(g, &v, ds, room, now, res); err != nil || res.Code != errs.OK {
			return err
		}
		room = len(ds)
	}
	held := false
	for g.behind > 0 && !held && len(ds) < room && e.room(g) {
		b, i, err := e.behindFrom(g, 0, now)
		if err != nil {
			return err
		}
		if g.passBehind(b, i); b == nil {
			break
		}
		if held = g.held(b, i) > now; !held {
			off, dep := b.base+uint64(i), b.dep(i)
			g.pass(dep, g.parts[dep], off+1)
			g.entriesRead = -1
			ds = append(ds, e.delivery(b, i, g, g.grantOf(off, dep, b.streamOf(i), b.expiry(i), now, v.visibility)))
		}
	}
	for looks := looksMax; !held && len(ds) < room && e.room(g); {
		b, i, err := e.firstLive(t, g.cur, g.next, now, true)
		if err != nil {
			return err
		}
		g.cur = b
		if b == nil {
			if g.next != t.next {
				g.advance(t.next)
			}
			break
		}
		off := b.base + uint64(i)
		if n := g.skips(b, i); n > 0 {
			g.advance(off + uint64(n))
			g.pos = b.streamOf(i + n - 1)
			if looks--; looks == 0 {
				break
			}
			continue
		}
		known := g.ahead > 0 && g.find(off) != nil
		if !g.pos.less(b.streamOf(i)) { // XGROUP SETID put the position ahead of the log
			g.advance(off + 1)
			continue
		}
		if !known && g.held(b, i) > now {
			break
		}
		g.advance(off + 1)
		g.pos = b.streamOf(i)
		if known {
			continue // given out through its ID before
		}
		g.entriesRead = -1 // estimated from here on, since keeping it costs every receive
		l := g.grantOf(off, b.dep(i), g.pos, b.expiry(i), now, v.visibility)
		ds = append(ds, e.delivery(b, i, g, l))
	}
	for len(ds) < room {
		off, l := g.retry()
		if l == nil {
			break
		}
		if t.removed(off) {
			g.remove(off, l) // by XDEL or trimming
			continue
		}
		g.ready.pop()
		g.grant(off, l, now, v.visibility)
		d, err := e.again(g, off, l)
		if err != nil {
			return err
		}
		ds = append(ds, d)
	}
	e.scratch = ds[:0]
	if g.parked {
		e.look(g) // what was granted now has deadlines that whoever waits has to know
	}
	if len(ds) > 0 {
		res.Deliveries = slices.Clone(ds)
		e.dirtRough.Add(int64(48 * len(ds)))
		return nil
	}
	switch {
	case g.paused():
	case most > 0 && g.inflight >= most:
		res.Code, res.Inflight = errs.ConcurrencyLimit, g.inflight
	case !e.room(g):
		res.Code, res.Inflight = errs.UnsettledLimit, g.inflight
	}
	if res.Code != errs.OK {
		if at := g.nextEvent(); at != never {
			res.RetryAfter = time.Duration(max(at-now, 0)) * time.Millisecond
		}
	}
	if v.park {
		res.Parked = true
		e.park(g, string(v.deployment))
	}
	return nil
}

// receiveOf grants messages of a deployment.
func (e *Engine) receiveOf(g *group, v *receiveView, ds []Delivery, room int, now int64, res *Result) ([]Delivery, error) {
	dep := e.deploymentOf(v.deployment)
	p, code, err := e.partition(g, dep)
	if code != errs.OK || err != nil {
		res.Code = code
		return ds, err
	}
	for len(ds) < room && e.room(g) {
		b, i, after, err := e.unreadOf(g, dep, 0, now)
		if err != nil {
			return ds, err
		}
		if b == nil {
			g.pass(dep, p, g.topic.next)
			break
		}
		off := b.base + uint64(i)
		known, skipped := g.find(off) != nil, !after.less(b.streamOf(i))
		if !known && !skipped && g.held(b, i) > now {
			break
		}
		if g.pass(dep, p, off+1); known || skipped {
			continue
		}
		g.entriesRead = -1
		l := g.grantOf(off, dep, b.streamOf(i), b.expiry(i), now, v.visibility)
		ds = append(ds, e.delivery(b, i, g, l))
	}
	for len(ds) < room {
		off, l := g.retryOf(p)
		if l == nil {
			break
		}
		if g.topic.removed(off) {
			g.remove(off, l)
			continue
		}
		p.ready.pop()
		g.grant(off, l, now, v.visibility)
		d, err := e.again(g, off, l)
		if err != nil {
			return ds, err
		}
		ds = append(ds, d)
	}
	return ds, nil
}

// room reports whether the group may be given messages that it was never given.
func (e *Engine) room(g *group) bool {
	return g.unsettled() < e.unsettledLimit(g) && g.parkedCount < limits.ParkedPerGroupMax
}

func (e *Engine) delivery(b *block, i uint32, g *group, l *lease) Delivery {
	off := b.base + uint64(i)
	return Delivery{
		ID:      b.id(e.o.Shard, i),
		Receipt: Receipt{Shard: e.o.Shard, Topic: g.topic.inc, Group: g.inc, Offset: off, Epoch: l.epoch},
		Stream:  b.streamOf(i), Count: l.count,
		PublishedAt: b.publishedWall(i), ExpiresAt: b.wallExpiry(i), LeaseUntil: e.stamp.Wall + l.deadline - l.granted,
	}
}

func (e *Engine) applyReceiveID(r *reader, res *Result) error {
	var v receiveIDView
	v.parse(r)
	switch {
	case r.err() != nil || v.visibility <= 0:
		res.Code = errs.BadRequest
		return nil
	}
	now := e.stamp.Cluster
	res.Code = errs.MessageNotFound
	t := e.topics[string(v.topic)]
	if t == nil {
		return nil
	}
	if v.id.Kind == KindDuplicate {
		live, err := e.lives(t, v.id.Original(), now)
		if live {
			res.Code, res.Original = errs.Duplicate, v.id.Original()
		}
		return err
	}
	b, i, err := e.byID(t, v.id)
	if err != nil {
		return err
	}
	if b == nil {
		run, due, ok, err := e.waiting(t, v.id)
		if ok && run.expiry() > now && (len(v.deployment) == 0 || run.dep == e.deploymentOf(v.deployment)) {
			res.Code, res.RetryAfter = errs.NotYetVisible, time.Duration(max(due-now, 1))*time.Millisecond
		}
		return err
	}
	if off := b.base + uint64(i); b.expiry(i) <= now || t.removed(off) || len(v.deployment) > 0 && b.dep(i) != e.deploymentOf(v.deployment) {
		return nil
	}
	g, code := e.groupNamed(t, v.group, false)
	if code != errs.OK {
		res.Code = code
		return nil
	}
	g.fold(now, math.MaxInt)
	off := b.base + uint64(i)
	l := g.find(off)
	wait := func(code errs.Code, until int64) {
		res.Code = code
		res.RetryAfter = time.Duration(until-now) * time.Millisecond
	}
	most := g.concurrency(v.maxConcurrency)
	switch {
	case l == nil && g.passed(off, b.dep(i)), l != nil && l.state == settledAhead:
		res.Code = errs.AlreadyAcknowledged
		return nil
	case l != nil && l.state == parked:
		res.Code = errs.Parked
		return nil
	case l != nil && l.state == leased && l.routed && l.deadline > now:
		g.takeOver(off, l, now, v.visibility)
		res.Code = errs.OK
		res.Deliveries = []Delivery{e.delivery(b, i, g, l)}
		if g.parked {
			e.look(g)
		}
		return nil
	case g.paused():
		res.Code = errs.Paused
		return nil
	case l != nil && l.state == leased && l.deadline > now:
		wait(errs.LeasedElsewhere, l.deadline)
		return nil
	case l != nil && l.due() > now:
		wait(errs.NotYetVisible, l.due())
		return nil
	case l == nil && g.held(b, i) > now:
		wait(errs.NotYetVisible, g.held(b, i))
		return nil
	case most > 0 && g.inflight >= most:
		res.Code, res.Inflight = errs.ConcurrencyLimit, g.inflight
		return nil
	case l == nil && !e.room(g):
		res.Code, res.Inflight = errs.UnsettledLimit, g.inflight
		return nil
	case l == nil:
		l = g.grantOf(off, b.dep(i), b.streamOf(i), b.expiry(i), now, v.visibility)
	default:
		g.grant(off, l, now, v.visibility)
	}
	res.Code = errs.OK
	res.Deliveries = []Delivery{e.delivery(b, i, g, l)}
	if g.parked {
		e.look(g)
	}
	e.dirtRough.Add(48)
	return nil
}

func (e *Engine) applySettle(r *reader, res *Result) error {
	var v settleView
	v.parse(r)
	switch {
	case r.bad || v.count == 0 || len(v.reason) > limits.ReasonBytesMax || v.op < Acknowledge || v.op > Route:
		res.Code = errs.BadRequest
		return nil
	}
	at := *r
	for range v.count {
		at.receipt()
	}
	if at.err() != nil {
		res.Code = errs.BadRequest
		return nil
	}
	var g *group
	if t := e.topics[string(v.topic)]; t != nil {
		g = t.groups[string(v.group)]
	}
	res.Codes = make([]errs.Code, v.count)
	if g != nil {
		g.fold(e.stamp.Cluster, math.MaxInt)
	}
	for i := range res.Codes {
		rc := r.receipt()
		if g == nil || rc.Shard != e.o.Shard || rc.Topic != g.topic.inc || rc.Group != g.inc {
			res.Codes[i] = errs.MessageNotFound
			continue
		}
		code, err := e.settle(g, rc, &v, res)
		if err != nil {
			return err
		}
		res.Codes[i] = code
	}
	e.dirtRough.Add(int64(24 * len(res.Codes)))
	if g != nil && g.parked {
		e.look(g)
	}
	return nil
}

func (e *Engine) settle(g *group, rc Receipt, v *settleView, res *Result) (errs.Code, error) {
	now := e.stamp.Cluster
	if rc.Epoch == 0 {
		return errs.LeaseExpired, nil
	}
	l := g.find(rc.Offset)
	switch {
	case l == nil || l.state == settledAhead, len(v.deployment) > 0 && l.dep != e.deploymentOf(v.deployment):
		return errs.MessageNotFound, nil
	case l.epoch != rc.Epoch:
		return errs.NotHolder, nil
	case l.state == released || l.state == parked:
		return errs.NotInFlight, nil
	case l.deadline <= now:
		return errs.LeaseExpired, nil
	case v.op == Acknowledge:
		g.acknowledge(rc.Offset, l)
		e.noteDone(g, rc.Offset)
	case v.op == Route:
		l.routed = true
		g.touch(rc.Offset)
	case v.op == Release || v.visibility == 0:
		if len(v.reason) > 0 {
			g.note(rc.Offset, v.reason)
		}
		if most := g.settings.MaxDeliveries; most > 0 && l.count-l.base >= most {
			g.park(rc.Offset, l, now)
			e.noteDone(g, rc.Offset)
			break
		}
		g.release(rc.Offset, l, now+v.visibility)
	case l.expiry != never && now+v.visibility > l.expiry && !g.topic.removed(rc.Offset):
		d, err := e.again(g, rc.Offset, l)
		if err != nil {
			return errs.OK, err
		}
		res.ExpiresAt = d.ExpiresAt
		return errs.ExtendPastExpiry, nil
	default:
		g.extend(rc.Offset, l, now+v.visibility)
	}
	return errs.OK, nil
}
