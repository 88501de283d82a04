package engine

import (
	"cmp"
	"fmt"
	"hash/crc32"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"tercet.dev/tercet/internal/errs"
)

// castagnoli is the table of the checksums of contents.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// browseLooks bounds the messages that one filtered browse looks at; what matched none goes on at Answer.Next.
const browseLooks = 10_000

// stateOf says what a message is to a group at now, and the entry it has in the unsettled set, if any.
func (g *group) stateOf(off, dep uint64, now int64) (MessageState, lease) {
	if l := g.find(off); l != nil {
		v, ok := g.view(off, l, now)
		switch {
		case !ok, v.state == settledAhead:
			return StateAcknowledged, v
		case v.state == parked:
			return StateParked, v
		case v.state == leased && v.deadline > now:
			return StateLeased, v
		case v.due() > now:
			return StateWaiting, v
		}
		return StateReady, v
	}
	if g.passed(off, dep) {
		return StateAcknowledged, lease{}
	}
	return StateReady, lease{}
}

// matchesPlace applies the conditions that show without the contents.
func (f *MessageFilter) matchesPlace(g *group, b *block, i uint32, now int64) bool {
	if at := b.publishedWall(i); f.Since != 0 && at < f.Since || f.Until != 0 && at >= f.Until {
		return false
	}
	switch {
	case f.State == StateAny:
		return true
	case g == nil:
		return f.State == StateReady
	}
	state, _ := g.stateOf(b.base+uint64(i), b.dep(i), now)
	return state == f.State
}

// matchesContent applies the conditions on the contents.
func (f *MessageFilter) matchesContent(d *Delivery) bool {
	return f.Header == "" || slices.ContainsFunc(d.Headers, func(h Header) bool {
		return h.Name == f.Header && (f.Value == "" || h.Value == f.Value)
	})
}

// parkedAnswer lists what a group has parked; the contents are loaded afterwards.
func (e *Engine) parkedAnswer(g *group, q *Query, limit int, now int64) (Answer, []uint64, error) {
	var a Answer
	var sizes []uint64
	offs, next, err := e.selected(g, &q.Parked, q.From, limit, now)
	if err != nil {
		return a, nil, err
	}
	for _, off := range offs {
		v, _ := g.view(off, g.find(off), now)
		d, size, err := e.kept(g, off, &v)
		if err != nil {
			return a, nil, err
		}
		d.Count = v.count
		a.Messages = append(a.Messages, d)
		a.Parked = append(a.Parked, ParkedMessage{ParkedAt: e.wallAt(v.deadline), Error: g.notes[off]})
		sizes = append(sizes, size)
	}
	a.Next, a.More = next, next != 0
	return a, sizes, nil
}

// kept describes a message of the unsettled set, with an estimate of its size.
func (e *Engine) kept(g *group, off uint64, l *lease) (Delivery, uint64, error) {
	d, err := e.again(g, off, l)
	if l.expiry != never {
		d.ExpiresAt = e.wallAt(l.expiry)
	}
	d.Receipt.Epoch, d.LeaseUntil = 0, 0
	return d, 4 << 10, err
}

// storyAnswer tells what became of a message; the contents are loaded afterwards.
func (e *Engine) storyAnswer(t *topic, id MessageID, now int64) (Answer, error) {
	var a Answer
	b, i, err := e.byID(t, id.Original())
	if err != nil {
		return a, err
	}
	if b == nil {
		d, due, ok, err := e.waitingMessage(t, id.Original(), now)
		if err != nil || !ok {
			return a, cmp.Or[error](err, errs.Of(errs.MessageNotFound))
		}
		a.Messages = []Delivery{d}
		a.Story = &Story{State: StateDelayed, VisibleAt: e.wallAt(due)}
		for _, name := range sortedKeys(t.groups) {
			a.Story.Groups = append(a.Story.Groups, GroupStory{Group: name, State: StateDelayed, NextAt: e.wallAt(due)})
		}
		return a, nil
	}
	if b.expiry(i) <= now {
		return a, errs.Of(errs.MessageNotFound)
	}
	a.Messages = []Delivery{e.stored1(t, nil, b, i)}
	off := b.base + uint64(i)
	a.Story = &Story{State: StateReady, VisibleAt: b.wall}
	for _, name := range sortedKeys(t.groups) {
		g := t.groups[name]
		state, l := g.stateOf(off, b.dep(i), now)
		s := GroupStory{Group: name, State: state, Count: l.count, Error: g.notes[off]}
		if l.count > 0 {
			s.LeasedAt = e.wallAt(l.granted)
		}
		if l.state == leased || l.state == released {
			s.Consumer = g.holder(&l)
		}
		switch state {
		case StateLeased:
			s.LeasedUntil = e.wallAt(l.deadline)
			s.NextAt = e.wallAt(l.due())
		case StateWaiting:
			s.NextAt = e.wallAt(l.due())
		case StateParked:
			s.ParkedAt = e.wallAt(l.deadline)
		case StateReady:
			if held := g.held(b, i); l.count == 0 && held > now {
				s.NextAt = e.wallAt(held)
			}
		case StateAny, StateDelayed, StateAcknowledged:
		}
		a.Story.Groups = append(a.Story.Groups, s)
	}
	return a, nil
}

// holder names who has an entry, or had it last.
func (g *group) holder(l *lease) string {
	if c := g.byNum[l.consumer]; c != nil {
		return c.name
	}
	return HTTPConsumer
}

// finish brings an answer whose messages are loaded into the form its kind has.
func (a *Answer) finish(q *Query) {
	switch {
	case a.Parked != nil:
		n := 0
		for i := range a.Messages { // a.Parked may be longer: the answer was cut short
			if !a.Messages[i].Gone {
				a.Parked[n] = a.Parked[i]
				a.Parked[n].Delivery = a.Messages[i]
				n++
			}
		}
		a.Parked, a.Messages = a.Parked[:n], nil
	case a.Story != nil:
		if len(a.Messages) == 1 && !a.Messages[0].Gone {
			m := a.Messages[0]
			a.Story.Message, a.Story.Bytes, a.Story.CRC = m, int64(len(m.Body)), crc32.Checksum(m.Body, castagnoli)
			if m.Large != nil {
				a.Story.Bytes, a.Story.CRC = m.Large.Bytes, m.Large.CRC
			}
		}
		a.Messages = nil
	default:
		a.Messages = slices.DeleteFunc(a.Messages, func(d Delivery) bool { return d.Gone || !q.Filter.matchesContent(&d) })
	}
}

// expiring counts the messages which the group was never given, of those that its receives are given, that expire
// before it comes to them: the n-th is reached when n were taken at rate in 1000 seconds, and not while the group's
// settings keep it back; a paused group, or one that takes nothing, reaches none. It looks at so many blocks and messages; beyond, what it saw is
// extrapolated.
func (e *Engine) expiring(g *group, deployed string, rate uint64, now int64) (uint64, error) {
	t, dep := g.topic, deployment(g.named(deployed))
	next := func(off uint64) (b *block, i uint32, err error) {
		if dep != 0 {
			b, i, _, err = e.unreadOf(g, dep, off, now)
			return b, i, err
		}
		if off < g.next && g.behind > 0 {
			if b, i, err = e.behindFrom(g, off, now); b != nil || err != nil {
				return b, i, err
			}
		}
		return e.fresh(g, max(off, g.next), now, false)
	}
	none := g.paused() || rate == DrainNone
	var count, rank, first, off uint64
	for looks := 2 * looksMax; looks > 0 && rank < 100*browseLooks; looks-- {
		b, i, err := next(off)
		if err != nil || b == nil {
			return count, err
		}
		if rank == 0 {
			first = b.base + uint64(i)
		}
		for ; i < b.count; i++ {
			x := b.expiry(i)
			if x <= now || !g.gives(dep, b, i) {
				continue
			}
			rank++
			reached := max(int64(rank*1_000_000/rate), g.held(b, i)-now)
			if x != never && (none || reached >= x-now) {
				count++
			}
		}
		off = b.end()
	}
	return count * (t.next - first) / max(off-first, 1), nil
}

// gives reports whether a message that lives is new to the group's receives of a deployment, or to those that name none.
func (g *group) gives(dep uint64, b *block, i uint32) bool {
	off, of := b.base+uint64(i), b.dep(i)
	if dep != 0 && of != dep || dep == 0 && g.excluded(of) || g.topic.removed(off) || g.passed(off, of) || g.find(off) != nil {
		return false
	}
	_, _, after := g.unread(of, off)
	return after.less(b.streamOf(i))
}

// waitingMessage describes a delayed message that has not matured.
func (e *Engine) waitingMessage(t *topic, id MessageID, now int64) (d Delivery, due int64, ok bool, err error) {
	run, due, ok, err := e.waiting(t, id)
	if err != nil || !ok || run.expiry() <= now {
		return d, 0, false, err
	}
	return e.waitingDelivery(t, &run), due, true, nil
}

func (e *Engine) waitingDelivery(t *topic, run *refRun) Delivery {
	d := Delivery{ID: MessageID{Shard: e.o.Shard, Index: run.index, Pos: run.pos, Kind: KindDelayed}, PublishedAt: run.wall,
		Receipt: Receipt{Shard: e.o.Shard, Topic: t.inc}}
	if run.retention != 0 {
		d.ExpiresAt = run.wall + int64(run.retention)*1000
	}
	return d
}

// delayedAnswer lists the delayed messages of a topic by the time at which they become visible. It looks at no more
// than 100 000 of all topics; a list that is cut short says where to go on.
func (e *Engine) delayedAnswer(t *topic, q *Query, limit int, now int64) (a Answer, sizes []uint64, err error) {
	defer e.damaged(&err)
	var after movedItem
	if q.After != "" {
		if _, err := fmt.Sscanf(q.After, "%d.%d.%d", &after.due, &after.key.index, &after.key.pos); err != nil {
			return a, nil, errs.New(errs.BadRequest, "%q is no place in the list of delayed messages", q.After)
		}
	}
	after.key.topic = t.inc
	var moved []movedItem
	for k, c := range e.changes {
		if m := (movedItem{c.due, k}); k.topic == t.inc && c.due != never && after.before(m) && !t.purgedDelayed(k.index, k.pos) {
			moved = append(moved, m)
		}
	}
	slices.SortFunc(moved, func(a, b movedItem) int {
		if a.before(b) {
			return -1
		}
		return 1
	})
	last := after
	add := func(m movedItem, run refRun) bool {
		if len(a.Messages) == limit {
			a.More, a.Last = true, fmt.Sprintf("%d.%d.%d", last.due, last.key.index, last.key.pos)
			return false
		}
		last = m
		run.pos, run.count = m.key.pos, 1
		if at := run.wall; run.expiry() <= now || q.Filter.Since != 0 && at < q.Filter.Since || q.Filter.Until != 0 && at >= q.Filter.Until {
			return true
		}
		d := e.waitingDelivery(t, &run)
		d.LeaseUntil = e.wallAt(m.due) // when it becomes visible
		a.Messages = append(a.Messages, d)
		sizes = append(sizes, uint64(run.bytes/max(run.count, 1)))
		return true
	}
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: append(e.keys.key(rowDue, uint64(e.matured.due), e.matured.topic, e.matured.index), 0),
		UpperBound: keyspaceEnd(e.keys, rowDue)})
	if err != nil {
		return a, nil, fmt.Errorf("engine: reading due messages: %w", err)
	}
	defer func() { _ = it.Close() }()
	looks := 10 * browseLooks
	for it.SeekGE(e.keys.key(rowDue, uint64(after.due))); it.Valid() && looks > 0; it.Next() {
		looks--
		at := dueOf(it.Key())
		if at.topic != t.inc || at.index > e.index {
			continue
		}
		v, err := it.ValueAndErr()
		if err != nil {
			return a, nil, fmt.Errorf("engine: reading due messages: %w", err)
		}
		runs, err := parseRuns(rowDue, at.index, v)
		if err != nil {
			return a, nil, err
		}
		for _, run := range runs {
			for k := range run.count {
				m := movedItem{at.due, delayKey{t.inc, at.index, run.pos + k}}
				if !after.before(m) || e.changes[m.key] != nil || t.purgedDelayed(at.index, m.key.pos) {
					continue
				}
				for len(moved) > 0 && moved[0].before(m) {
					if !add(moved[0], e.changes[moved[0].key].run) {
						return a, sizes, nil
					}
					moved = moved[1:]
				}
				if !add(m, run) {
					return a, sizes, nil
				}
			}
		}
	}
	if err := it.Error(); err != nil {
		return a, nil, fmt.Errorf("engine: reading due messages: %w", err)
	}
	for _, m := range moved {
		if !add(m, e.changes[m.key].run) {
			return a, sizes, nil
		}
	}
	return a, sizes, nil
}
