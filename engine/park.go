package engine

import "math"

// Refs are the groups that a receive waits for: one, but for a StreamReadGroup of several streams.
func (r *Receive) Refs() []GroupRef {
	refs := []GroupRef{{Topic: r.Topic, Group: r.Group, Deployment: r.Deployment}}
	for _, topic := range r.others {
		refs = append(refs, GroupRef{Topic: topic, Group: r.Group})
	}
	return refs
}

// Park decides, under the lock that Apply takes, whether a receive would find nothing at now. If the group
// exists (each of them, when there are several) and nothing is deliverable, it calls register, if that is not nil, and reports true: whatever makes
// the group deliverable from then on is reported by the Effects of the Apply that does it. With a nil
// register it only answers. A receive that does not park, of a group that holds as much as it may, is for Apply
// to refuse.
func (e *Engine) Park(r *Receive, now Stamp, register func()) (parked bool, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.Err(); err != nil {
		return false, err
	}
	if ok, err := e.empty(r, r.Topic, now); !ok || err != nil {
		return false, err
	}
	for _, topic := range r.others {
		if ok, err := e.empty(r, topic, now); !ok || err != nil {
			return false, err
		}
	}
	if register != nil {
		register()
		g := e.topics[r.Topic].groups[r.Group]
		e.park(g, g.named(r.Deployment))
		for _, topic := range r.others {
			e.park(e.topics[topic].groups[r.Group], "")
		}
	}
	return true, nil
}

// empty reports whether a receive may wait for its group of a topic: the group exists, and nothing is deliverable.
func (e *Engine) empty(r *Receive, topic string, now Stamp) (bool, error) {
	t := e.topics[topic]
	if t == nil || t.groups[r.Group] == nil {
		return false, nil
	}
	g := t.groups[r.Group]
	if r.consumer != "" && g.consumers[r.consumer] == nil {
		return false, nil // reading creates it
	}
	if !r.Park && g.live >= e.unsettledLimit(g) {
		return false, nil // it is not just empty, and its answer says so
	}
	at := max(now.Cluster, e.stamp.Cluster)
	if most := g.concurrency(r.MaxConcurrency); most <= 0 || g.inflightAtMost(at) < most {
		ok, err := e.deliverable(g, g.named(r.Deployment), at, false)
		if err != nil || ok {
			return false, err
		}
	} else if !r.Park {
		return false, nil // likewise
	}
	return true, nil
}

// NextDue tells when time will next make a message of the group deliverable or end a lease of it: the cluster
// time, later than the last stamp, at which to propose a parked receive, or a tick. What is deliverable
// already does not count: Park and the Effects tell that.
func (e *Engine) NextDue(topic, group string) (cluster int64, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	t := e.topics[topic]
	if t == nil || t.groups[group] == nil {
		return 0, false
	}
	g := t.groups[group]
	g.fold(e.stamp.Cluster, math.MaxInt)
	at, err := e.nextEvent(g, e.stamp.Cluster, false)
	if err != nil {
		e.fail(err)
		return 0, false
	}
	g.told = at
	return g.told, g.told != never
}

// park notes that receives wait for the group on this node.
func (e *Engine) park(g *group, deployment string) {
	if g.waits == nil {
		g.waits = make(map[string]bool)
	}
	g.waits[deployment] = true
	if !g.parked {
		g.parked = true
		g.topic.parked = append(g.topic.parked, g)
	}
	if e.applying {
		e.look(g)
	} else {
		g.fold(e.stamp.Cluster, math.MaxInt)
		at, err := e.nextEvent(g, e.stamp.Cluster, false)
		if err != nil {
			e.fail(err)
			return
		}
		e.arm(g, at)
	}
}

// nextEvent returns when time will next do something for the group: to its unsettled set, or by letting it have
// a message that is kept from it until then.
func (e *Engine) nextEvent(g *group, now int64, apply bool) (int64, error) {
	at := g.nextEvent()
	if g.settings.NotBefore <= now && g.settings.InitialDelay == 0 {
		return at, nil
	}
	held := func(b *block, i uint32, err error) error {
		if err == nil && b != nil {
			if h := g.held(b, i); h > now {
				at = min(at, h)
			}
		}
		return err
	}
	if err := held(e.fresh(g, g.next, now, apply)); err != nil {
		return 0, err
	}
	if g.behind > 0 {
		if err := held(e.behindFrom(g, 0, now)); err != nil {
			return 0, err
		}
	}
	for _, d := range sortedKeys(g.waits) {
		if d == "" {
			continue
		}
		if err := held(e.freshOf(g, deployment(d), endless, now)); err != nil {
			return 0, err
		}
	}
	return at, nil
}

// named is the deployment of a receive that names this one.
func (g *group) named(deployment string) string {
	if deployment == "" {
		return g.settings.Deployment
	}
	return deployment
}

// fresh returns the first message at or behind off that the group was never given and has not expired, nil
// without one. Having passed over much that is other deployments', it takes the next for one: whoever asks for it goes
// on from there.
func (e *Engine) fresh(g *group, off uint64, now int64, apply bool) (*block, uint32, error) {
	for looks := looksMax; ; {
		b, i, err := e.firstLive(g.topic, g.cur, off, now, apply)
		if err != nil || b == nil {
			return nil, 0, err
		}
		off = b.base + uint64(i)
		if n := g.skips(b, i); n > 0 {
			if looks--; looks == 0 {
				return b, i, nil
			}
			off += uint64(n)
			continue
		}
		if (g.ahead == 0 || g.find(off) == nil) && g.pos.less(b.streamOf(i)) {
			return b, i, nil
		}
		off++
	}
}

// waiting lists the deployments that receives wait for.
func (g *group) waiting() []string {
	if len(g.waits) == 1 && g.waits[""] {
		return onlyAll
	}
	return sortedKeys(g.waits)
}

var onlyAll = []string{""}

// announce tells whoever waits for the group here to ask again.
func (e *Engine) announce(g *group) {
	if g.parked && e.fx != nil {
		for _, d := range sortedKeys(g.waits) {
			e.fx.Deliverable = g.appendRefs(e.fx.Deliverable, d)
		}
	}
}

// appendRefs appends under which names receives wait for a deployment: those that name none wait under no name.
func (g *group) appendRefs(refs []GroupRef, deployment string) []GroupRef {
	if deployment == g.settings.Deployment {
		refs = append(refs, GroupRef{Topic: g.topic.name, Group: g.name})
	}
	if deployment != "" {
		refs = append(refs, GroupRef{Topic: g.topic.name, Group: g.name, Deployment: deployment})
	}
	return refs
}

// freshOf is fresh for a deployment, below an offset.
func (e *Engine) freshOf(g *group, dep, end uint64, now int64) (*block, uint32, error) {
	return e.freshFrom(g, dep, 0, end, now)
}

func (e *Engine) freshFrom(g *group, dep, off, end uint64, now int64) (*block, uint32, error) {
	for ; ; off++ {
		b, i, after, err := e.unreadOf(g, dep, off, now)
		if err != nil || b == nil {
			return nil, 0, err
		}
		if off = b.base + uint64(i); off >= end {
			return nil, 0, nil
		}
		if g.find(off) == nil && after.less(b.streamOf(i)) {
			return b, i, nil
		}
	}
}

// behindFrom returns the first message at or behind off that the group's cursor left behind of deployments which were
// excluded, nil without one.
func (e *Engine) behindFrom(g *group, off uint64, now int64) (first *block, at uint32, err error) {
	for _, dep := range sortedKeys(g.parts) {
		p := g.parts[dep]
		if !p.behind() {
			continue
		}
		b, i, err := e.freshFrom(g, dep, off, p.end(), now)
		if err != nil {
			return nil, 0, err
		}
		if b != nil && (first == nil || b.base+uint64(i) < first.base+uint64(at)) {
			first, at = b, i
		}
	}
	return first, at, nil
}

// passBehind ends the spans in which nothing is left for receives without a deployment.
func (g *group) passBehind(first *block, at uint32) {
	for dep, p := range g.parts {
		if !p.behind() {
			continue
		}
		end := p.end()
		if first != nil {
			end = min(end, first.base+uint64(at))
		}
		g.pass(dep, p, end)
	}
}

// look puts a group with parked receives on the list of those to be looked at when the entry is done.
func (e *Engine) look(g *group) {
	if e.fx != nil && g.touched != e.index {
		g.touched = e.index
		e.touched = append(e.touched, g)
	}
}

// arm sees to it that the group is looked at when cluster time reaches at.
func (e *Engine) arm(g *group, at int64) {
	if at < g.armed {
		g.armed = at
		e.due.push(timer{at, g.number})
	}
}

// report lists the groups that have become deliverable for receives parked on this node.
func (e *Engine) report() error {
	if e.fx == nil {
		return nil
	}
	now := e.stamp.Cluster
	for len(e.due) > 0 && e.due[0].at <= now {
		if g := e.groups[e.due[0].off]; g != nil && g.armed == e.due[0].at {
			g.armed = never
			e.look(g)
		}
		e.due.pop()
	}
	for _, g := range e.touched {
		if !g.parked {
			continue
		}
		g.fold(now, math.MaxInt)
		for _, d := range g.waiting() {
			ok, err := e.deliverable(g, d, now, true)
			if err != nil {
				return err
			}
			if ok {
				e.fx.Deliverable = g.appendRefs(e.fx.Deliverable, d)
			}
		}
		at, err := e.nextEvent(g, now, true)
		if err != nil {
			return err
		}
		e.arm(g, at)
		if g.told <= now {
			g.told = never // that timer has run out
		}
		if at < g.told {
			g.told = at
			for _, d := range sortedKeys(g.waits) {
				e.fx.Due = g.appendRefs(e.fx.Due, d)
			}
		}
	}
	return nil
}

// deliverable reports whether a receive without a bound on concurrency would be given something at now.
// It is one that names the deployment, if that is not empty.
func (e *Engine) deliverable(g *group, deployed string, now int64, apply bool) (bool, error) {
	if g.paused() {
		return false, nil
	}
	if e.room(g) {
		var b *block
		var i uint32
		var err error
		if deployed == "" {
			if g.behind > 0 {
				b, i, err = e.behindFrom(g, 0, now)
			}
			if b == nil && err == nil {
				b, i, err = e.fresh(g, g.next, now, apply)
			}
		} else {
			b, i, err = e.freshOf(g, deployment(deployed), endless, now)
		}
		if err != nil {
			return false, err
		}
		if b != nil && g.held(b, i) <= now {
			return true, nil
		}
	}
	if deployed != "" {
		p := g.parts[deployment(deployed)]
		if p == nil {
			return g.nextEvent() <= now || g.live > 0, nil // a receive makes it, and finds what there is
		}
		_, l := g.retryOf(p)
		return l != nil || g.nextEvent() <= now, nil
	}
	_, l := g.retry()
	return l != nil || g.nextEvent() <= now, nil
}

// inflightAtMost bounds the leases that run at now from above without visiting them all: those that have
// just run out show as an earliest time that has passed, which deliverable then finds.
func (g *group) inflightAtMost(now int64) int {
	if g.nextEvent() <= now {
		return g.inflightAt(now)
	}
	return g.inflight
}
