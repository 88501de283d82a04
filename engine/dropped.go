package engine

import "tercet.dev/tercet/internal/limits"

// Dropping what is acknowledged. In a topic that asks for it a message goes as soon as every group has done with it: it is
// marked as XDEL would mark it, and what is marked from the topic's beginning on goes as by XTRIM. Two things lead to
// that at the end of an entry: an acknowledgement of the message itself, and a look at the head of the log, which
// also finds what was done with by time (given up, expired) or all at once (a group was deleted or moved, the setting was
// made). The look is bounded; what it has not come to is looked at by the next entry, which NextTick asks for.

// doneNote is a message that a group has done with in the entry being applied.
type doneNote struct {
	topic *topic
	off   uint64
}

// noteDone has the end of the entry look at a message that the group has done with.
func (e *Engine) noteDone(g *group, off uint64) {
	if g.topic.settings.DropAcknowledged {
		e.done = append(e.done, doneNote{g.topic, off})
	}
}

// catchUp has the end of the entry, and following ones, look at the head of the topic's log.
func (e *Engine) catchUp(t *topic) {
	if t.settings.DropAcknowledged {
		e.setCatching(t, true)
	}
}

func (e *Engine) setCatching(t *topic, on bool) {
	if t.catching == on {
		return
	}
	t.catching, t.dirty = on, true
	if on {
		e.catching[t.inc] = true
	} else {
		delete(e.catching, t.inc)
	}
}

// dropDone removes what all groups have done with, as far as the entry leads to it.
func (e *Engine) dropDone() error {
	if len(e.done) == 0 && len(e.catching) == 0 {
		return nil
	}
	now := e.stamp.Cluster
	var b *block
	for k := range e.done {
		t, off := e.done[k].topic, e.done[k].off
		if e.byInc[t.inc] != t || !t.settings.DropAcknowledged {
			continue
		}
		if !t.removed(off) {
			if b == nil || b.topic != t.inc || off < b.base || off >= b.end() {
				var err error
				if b, err = e.blockFor(t, off); err != nil {
					return err
				}
			}
			if b != nil && off >= b.base && b.expiry(uint32(off-b.base)) > now && !t.needed(b, uint32(off-b.base), now) {
				e.dropOne(t, b, off)
			}
		}
		if k+1 == len(e.done) || e.done[k+1].topic != t {
			if err := e.dropHead(t); err != nil {
				return err
			}
		}
	}
	for _, inc := range sortedKeys(e.catching) {
		if err := e.dropHead(e.byInc[inc]); err != nil {
			return err
		}
	}
	return nil
}

func (e *Engine) dropOne(t *topic, b *block, off uint64) {
	t.mark(off)
	t.noteDead(b)
	t.changed = e.index
	e.dirtRough.Add(8)
}

// dropHead removes messages from the head of the log on, up to the first that a group needs.
func (e *Engine) dropHead(t *topic) error {
	now := e.stamp.Cluster
	if len(t.byInc) == 0 {
		e.setCatching(t, false)
		return nil
	}
	// What a group has parked beyond its message's time is found by its place as long as that is not removed.
	outlives := false
	for _, g := range t.byInc {
		if len(g.kept) > 0 {
			g.fold(now, foldAll)
		}
		if len(g.kept) > 0 || g.settings.Park && g.settings.ParkedRetention > 0 {
			outlives = true
		}
	}
	var b *block
	for looks := limits.DropPerEntryMax; ; looks-- {
		var i uint32
		var err error
		if b, i, err = e.firstLive(t, b, 0, now, true); err != nil {
			return err
		}
		off := t.next
		if b != nil {
			off = b.base + uint64(i)
		}
		if off > t.first && !outlives {
			t.removeBelow(off)
		}
		if b == nil || t.needed(b, i, now) {
			e.setCatching(t, false)
			return nil
		}
		if looks == 0 {
			e.setCatching(t, true)
			return nil
		}
		e.dropOne(t, b, off)
	}
}
