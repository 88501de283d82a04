package engine

import (
	"strings"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// A message whose last lease has run out after MaxDeliveries is *spent*. Nothing happens at that moment: being
// spent follows from deadline, count and settings, folding only brings the entry into the form it has then, and
// the canonical encoding shows it in that form whether it was folded or not. So replicas that fold at different
// moments are equal. Settings change only after the group was folded completely.

// spent reports that the group gave the message up by time: its last lease ran out before it expired.
func (g *group) spent(l *lease, now int64) bool {
	most := g.settings.MaxDeliveries
	return most > 0 && l.state == leased && l.deadline <= now && l.deadline < l.expiry && l.count-l.base >= most
}

// parkedForm is what a spent entry becomes, if the group parks.
func (g *group) parkedForm(l *lease) lease {
	p := *l
	p.state, p.flags, p.routed, p.consumer = parked, 0, false, 0
	if keep := g.settings.ParkedRetention.Milliseconds(); keep > 0 && p.expiry != never {
		if until := p.deadline + keep; until > p.expiry {
			p.expiry, p.kept = until, true
		}
	}
	return p
}

// giveUp brings a spent entry into its final form: parked, or gone as if it had been acknowledged.
func (g *group) giveUp(off uint64, l *lease, now int64) {
	if !g.settings.Park {
		if g.passed(off, l.dep) || l.expiry <= now {
			g.remove(off, l)
		} else {
			g.settleAhead(off, l)
		}
		return
	}
	p := g.parkedForm(l)
	if p.expiry <= now {
		g.remove(off, l)
		return
	}
	if l.flags&flagLapsed == 0 {
		g.inflight--
	}
	if l.consumer != 0 {
		g.own(off, l, nil)
	}
	later := p.expiry != l.expiry
	*l = p
	if l.kept {
		g.keep(off)
	}
	g.parkedCount++
	if later {
		g.pushExpiring(timer{p.expiry, off})
	}
}

// view is the entry as of now, whether it was folded or not; false if it is not there any more.
func (g *group) view(off uint64, l *lease, now int64) (lease, bool) {
	v := *l
	switch {
	case !g.spent(l, now):
	case g.settings.Park:
		v = g.parkedForm(l)
	case g.passed(off, l.dep):
		return v, false
	default:
		v.state, v.flags, v.deadline, v.routed, v.consumer = settledAhead, 0, never, false, 0
	}
	return v, v.expiry > now
}

// park gives a message up at once: it was released once too often.
func (g *group) park(off uint64, l *lease, now int64) {
	l.deadline = now
	g.giveUp(off, l, now)
	g.dirty = true
	if g.find(off) != nil {
		g.touch(off)
	}
}

// exhausted reports that a pending entry was delivered as often as the group allows: the next delivery parks it.
func (g *group) exhausted(l *lease) bool {
	most := g.settings.MaxDeliveries
	return most > 0 && l.count-l.base >= most
}

// exhaust gives a pending entry up at once, whoever has it.
func (g *group) exhaust(off uint64, l *lease, now int64) {
	if l.state == released {
		l.state, l.flags = leased, flagLapsed // as one whose lease is over, which it is
	}
	g.park(off, l, now)
}

// note keeps the last error of an entry, or forgets it. The set's bytes are bounded; what is beyond is dropped.
func (g *group) note(off uint64, text []byte) {
	if g.notes == nil && len(text) == 0 {
		return
	}
	if old, ok := g.notes[off]; ok {
		g.noteBytes -= len(old)
		delete(g.notes, off)
	}
	if len(text) == 0 || g.noteBytes+len(text) > limits.ReasonsPerGroupBytesMax {
		return
	}
	if g.notes == nil {
		g.notes = make(map[uint64]string)
	}
	g.notes[off] = string(text)
	g.noteBytes += len(text)
}

// matches reports whether a parked entry meets the filter, as far as that shows without the message.
func (f *ParkedFilter) matches(g *group, off uint64, l *lease, wallAt func(int64) int64) bool {
	at := wallAt(l.deadline)
	return (f.Since == 0 || at >= f.Since) && (f.Until == 0 || at < f.Until) && (f.Error == "" || strings.Contains(g.notes[off], f.Error))
}

// wallAt converts a time of the cluster to what people are told.
func (e *Engine) wallAt(cluster int64) int64 { return e.stamp.Wall + cluster - e.stamp.Cluster }

// parkedFrom visits the parked entries from an offset on in their order until visit returns false.
func (g *group) parkedFrom(from uint64, now int64, visit func(off uint64, l *lease) bool) {
	for _, key := range sortedKeys(g.chunks) {
		if key < from>>chunkShift {
			continue
		}
		c := g.chunks[key]
		for i := range c.slots {
			l := &c.slots[i]
			off := key<<chunkShift | uint64(l.low)
			if l.state == slotFree || off < from {
				continue
			}
			if v, ok := g.view(off, l, now); ok && v.state == parked && !g.topic.removed(off) && !visit(off, &v) {
				return
			}
		}
	}
}

// selected returns the parked messages a filter selects, at most limit, and where to go on (0 at the end).
func (e *Engine) selected(g *group, f *ParkedFilter, from uint64, limit int, now int64) (offs []uint64, next uint64, err error) {
	if len(f.IDs) > 0 || len(f.Streams) > 0 {
		// Found by ID: the group's list need not be walked.
		seen := make(map[uint64]bool)
		take := func(off uint64, l *lease) {
			if l == nil || seen[off] || off < from || len(offs) == limit || g.topic.removed(off) {
				return
			}
			if v, ok := g.view(off, l, now); ok && v.state == parked && f.matches(g, off, &v, e.wallAt) {
				seen[off] = true
				offs = append(offs, off)
			}
		}
		var outlived map[MessageID]uint64
		for _, id := range f.IDs {
			off, ok, err := e.offsetOf(g.topic, id, now)
			if err == nil && !ok {
				// What outlives its message is found by what is said of it: the rows that lead from its ID may be gone
				// on one node and not on another.
				if outlived == nil {
					outlived, err = e.outlived(g)
				}
				off, ok = outlived[id]
			}
			if err != nil {
				return nil, 0, err
			}
			if ok {
				take(off, g.find(off))
			}
		}
		for _, id := range f.Streams {
			take(g.findWith(id, func(off uint64, l *lease) bool {
				v, ok := g.view(off, l, now)
				return ok && v.state == parked
			}))
		}
		return offs, 0, nil
	}
	g.parkedFrom(from, now, func(off uint64, l *lease) bool {
		if !f.matches(g, off, l, e.wallAt) {
			return true
		}
		if len(offs) == limit {
			next = off
			return false
		}
		offs = append(offs, off)
		return true
	})
	return offs, next, nil
}

func (e *Engine) applyParked(r *reader, res *Result) error {
	c := r.parkedCommand()
	if r.err() != nil || c.Op != Redrive && c.Op != Drop || c.Max < 1 || len(c.Filter.IDs)+len(c.Filter.Streams) > limits.ParkedPerCommandMax {
		res.Code = errs.BadRequest
		return nil
	}
	g, code := e.groupOf(c.Topic, c.Group)
	if code != errs.OK {
		res.Code = code
		return nil
	}
	now := e.stamp.Cluster
	g.fold(now, foldAll)
	offs, next, err := e.selected(g, &c.Filter, c.From, min(c.Max, limits.ParkedPerCommandMax), now)
	if err != nil {
		return err
	}
	res.Count, res.Next = int64(len(offs)), next
	if c.DryRun {
		return nil
	}
	for _, off := range offs {
		l := g.find(off)
		switch c.Op {
		case Redrive:
			g.parkedCount--
			l.state, l.deadline, l.base = released, now, l.count
			g.touch(off)
			g.pushPending(timer{now, off})
		case Drop:
			g.acked++
			e.noteDone(g, off)
			if g.passed(off, l.dep) {
				g.remove(off, l)
			} else {
				g.parkedCount--
				l.state, l.deadline = settledAhead, never
				g.touch(off)
			}
		}
	}
	e.dirtRough.Add(int64(24 * len(offs)))
	e.look(g)
	return nil
}

// offsetOf returns the place of a message that lives in its topic's log.
func (e *Engine) offsetOf(t *topic, id MessageID, now int64) (uint64, bool, error) {
	b, i, err := e.byID(t, id)
	if err != nil || b == nil || b.expiry(i) <= now {
		return 0, false, err
	}
	return b.base + uint64(i), true, nil
}

// outlived returns the IDs and places of the entries that outlive their messages.
func (e *Engine) outlived(g *group) (map[MessageID]uint64, error) {
	ids := make(map[MessageID]uint64, len(g.kept))
	for off := range g.kept {
		d, err := e.again(g, off, g.find(off))
		if err != nil {
			return nil, err
		}
		ids[d.ID] = off
	}
	return ids, nil
}

// spentKeeps reports that an entry that was not folded has become one that outlives its message.
func (g *group) spentKeeps(l *lease, now int64) bool {
	if !g.spent(l, now) || !g.settings.Park {
		return false
	}
	p := g.parkedForm(l)
	return p.kept
}
