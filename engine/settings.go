package engine

import (
	"encoding/binary"
	"math"
	"slices"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// foldAll makes fold go on until nothing is left to do.
const foldAll = math.MaxInt

// groupOf returns an existing group, or says what is missing.
func (e *Engine) groupOf(topic, name string) (*group, errs.Code) {
	t := e.topics[topic]
	if t == nil {
		return nil, errs.TopicNotFound
	}
	g := t.groups[name]
	if g == nil {
		return nil, errs.GroupNotFound
	}
	return g, errs.OK
}

// paused reports that nothing of the group is delivered.
func (g *group) paused() bool { return g.settings.Paused || g.topic.settings.Paused }

// concurrency is the bound in force when a receive asks for one.
func (g *group) concurrency(asked int) int {
	switch own := g.settings.MaxConcurrency; {
	case own == 0:
		return asked
	case asked == 0:
		return own
	default:
		return min(own, asked)
	}
}

// held is until when a message that was never given is kept from the group.
func (g *group) held(b *block, i uint32) int64 {
	s := &g.settings
	if s.InitialDelay == 0 {
		return s.NotBefore
	}
	return max(s.NotBefore, b.publishedAt(i)+s.InitialDelay.Milliseconds())
}

func (e *Engine) applyTopicSet(r *reader, res *Result) {
	c := r.topicSet()
	t := e.topics[c.Topic]
	s := c.Settings
	if s != nil && c.Only != 0 {
		old := TopicSettings{}
		if t != nil {
			old = t.settings
		}
		s = s.over(old, c.Only)
	}
	if r.err() != nil || s != nil && (s.RetentionDefault%time.Second != 0 || s.RetentionMax%time.Second != 0 || s.RetentionMax > 0 && s.RetentionDefault > s.RetentionMax) {
		res.Code = errs.BadRequest
		return
	}
	if t == nil {
		if !c.Create {
			res.Code = errs.TopicNotFound
			return
		}
		if t, res.Code = e.topicNamed([]byte(c.Topic)); res.Code != errs.OK {
			return
		}
	}
	if s != nil {
		t.settings = *s
		t.dirty = true
		e.setCatching(t, s.DropAcknowledged)
		for _, g := range t.parked {
			e.look(g)
		}
	}
}

// replace sets a setting if only names it.
func replace[T any](only, which SettingMask, setting *T, value T) {
	if only&which != 0 {
		*setting = value
	}
}

// over returns old with the settings that only names taken from s.
func (s *TopicSettings) over(old TopicSettings, only SettingMask) *TopicSettings {
	replace(only, OnlyPaused, &old.Paused, s.Paused)
	replace(only, OnlyRetentionDefault, &old.RetentionDefault, s.RetentionDefault)
	replace(only, OnlyRetentionMax, &old.RetentionMax, s.RetentionMax)
	replace(only, OnlyMessageBytesMax, &old.MessageBytesMax, s.MessageBytesMax)
	replace(only, OnlyDepthMax, &old.DepthMax, s.DepthMax)
	replace(only, OnlyDropAcknowledged, &old.DropAcknowledged, s.DropAcknowledged)
	return &old
}

// over returns old with the settings that only names taken from s.
func (s *GroupSettings) over(old GroupSettings, only SettingMask) *GroupSettings {
	replace(only, OnlyPaused, &old.Paused, s.Paused)
	replace(only, OnlyMaxDeliveries, &old.MaxDeliveries, s.MaxDeliveries)
	replace(only, OnlyPark, &old.Park, s.Park)
	replace(only, OnlyParkedRetention, &old.ParkedRetention, s.ParkedRetention)
	replace(only, OnlyInitialDelay, &old.InitialDelay, s.InitialDelay)
	replace(only, OnlyMaxConcurrency, &old.MaxConcurrency, s.MaxConcurrency)
	replace(only, OnlyVisibility, &old.Visibility, s.Visibility)
	return &old
}

func (e *Engine) applyTopicDelete(r *reader, res *Result) {
	name := r.str()
	t := e.topics[name]
	switch {
	case r.err() != nil:
		res.Code = errs.BadRequest
	case t == nil:
		res.Code = errs.TopicNotFound
	default:
		e.dropTopic(t)
	}
}

// dropTopic ends a topic's incarnation. Its rows go with the next checkpoint, which is the first that does not
// know it any more.
func (e *Engine) dropTopic(t *topic) {
	for _, inc := range sortedKeys(t.byInc) {
		e.dropGroup(t.byInc[inc])
	}
	if e.topics[t.name] == t {
		delete(e.topics, t.name)
	}
	delete(e.byInc, t.inc)
	delete(e.byExpiry, t.inc)
	delete(e.catching, t.inc)
	e.keyGone()
	e.noteKey(t.name)
	if t.open != nil {
		e.open = slices.DeleteFunc(e.open, func(o *topic) bool { return o == t })
		t.open = nil
	}
	e.endUploads(func(u *upload) bool { return u.topic == t.inc })
	if len(t.staged) > 0 {
		e.staging = slices.DeleteFunc(e.staging, func(o *topic) bool { return o == t })
		t.staged = nil
	}
	e.removedTopics = append(e.removedTopics, t.inc)
	e.dirtRough.Add(256)
}

// dropGroup ends a group. Whoever waits for it here is told to ask again: what comes after it is another group.
func (e *Engine) dropGroup(g *group) {
	e.announce(g)
	g.parked = false
	g.topic.parked = slices.DeleteFunc(g.topic.parked, func(o *group) bool { return o == g })
	delete(g.topic.groups, g.name)
	delete(g.topic.byInc, g.inc)
	g.topic.changed, g.topic.dirty = e.index, true
	e.noteKey(g.topic.name)
	e.touched = slices.DeleteFunc(e.touched, func(o *group) bool { return o == g })
	e.groups[g.number] = nil
	e.freeGroups = append(e.freeGroups, g.number)
	e.catchUp(g.topic)
	e.removedGroups = append(e.removedGroups, [2]uint64{g.topic.inc, g.inc})
	e.dirtRough.Add(64)
}

func (e *Engine) applyPurge(r *reader, res *Result) {
	name := r.str()
	t := e.topics[name]
	switch {
	case r.err() != nil:
		res.Code = errs.BadRequest
	case t == nil:
		res.Code = errs.TopicNotFound
	default:
		e.purge(t)
	}
}

// purge drops all a topic holds.
func (e *Engine) purge(t *topic) {
	t.removeBelow(t.next)
	t.firstIndex, t.firstPos = e.index, e.pos
	t.changed = e.index
	e.noteKey(t.name)
	// Keys of what is gone are free again. Their rows are, as ever, never written a second time: the topic takes
	// a new number to hash them with.
	e.incarnations++
	t.keySpace = e.incarnations
	if b := t.open; b != nil {
		t.cut = floor{offset: b.base, index: b.index, stream: b.stream}
	} else {
		t.cut = floor{offset: t.next, index: e.index, stream: t.last.next()}
	}
	t.delayed = 0
	e.purgeParts(t)
	t.dirty = true
	for _, inc := range sortedKeys(t.byInc) {
		g := t.byInc[inc]
		g.clear(true)
		g.next, g.pos = t.next, t.last
		g.reopen()
		g.dirty = true
		e.look(g)
	}
	e.dirtRough.Add(256)
}

// clear empties the unsettled set, parked messages only if told to.
func (g *group) clear(all bool) {
	var offs []uint64
	g.each(func(off uint64, l *lease) {
		if all || l.state != parked {
			offs = append(offs, off)
		}
	})
	for _, off := range offs {
		g.remove(off, g.find(off))
	}
	g.rebuild()
}

func (e *Engine) applyGroupDelete(r *reader, res *Result) {
	topic, name := r.str(), r.str()
	if r.err() != nil {
		res.Code = errs.BadRequest
		return
	}
	g, code := e.groupOf(topic, name)
	if res.Code = code; code == errs.OK {
		e.dropGroup(g)
	}
}

func (s *GroupSettings) valid() bool {
	if s.ParkedRetention > limits.ParkedRetentionMax || len(s.Deployment) > limits.NameBytesMax || len(s.ExcludeDeployments) > limits.DeploymentsPerGroupMax {
		return false
	}
	if s.Deployment != "" && len(s.ExcludeDeployments) > 0 {
		return false
	}
	for _, d := range s.ExcludeDeployments {
		if d == "" || len(d) > limits.NameBytesMax {
			return false
		}
	}
	return true
}

func (e *Engine) applyGroupSet(r *reader, res *Result) error {
	c := r.groupSet()
	if r.err() != nil || c.Settings != nil && !c.Settings.valid() {
		res.Code = errs.BadRequest
		return nil
	}
	g, code := e.groupOf(c.Topic, c.Group)
	created := code != errs.OK
	if created {
		if !c.Create {
			res.Code = code
			return nil
		}
		t, code := e.topicNamed([]byte(c.Topic))
		if code == errs.OK {
			g, code = e.groupNamed(t, []byte(c.Group), false)
		}
		if code != errs.OK {
			res.Code = code
			return nil
		}
	}
	now := e.stamp.Cluster
	g.fold(now, foldAll)
	if created || c.Seek {
		next, pos, err := e.place(g.topic, &c.Start)
		if err != nil {
			return err
		}
		g.clear(false)
		g.next, g.pos, g.cur = next, pos, nil
		g.reopen()
		g.countAhead()
		g.rebuild()
		e.catchUp(g.topic)
	}
	if c.Settings != nil {
		s := c.Settings
		if c.Only != 0 {
			s = s.over(g.settings, c.Only)
		}
		if code, err := e.exclude(g, s); code != errs.OK || err != nil {
			res.Code = code
			return err
		}
		e.announce(g) // which deployment a receive waits for may be another from here on: it is told under the old one
		g.set(s, now)
	}
	g.dirty = true
	e.look(g)
	return nil
}

// set puts settings in force. The group is folded.
func (g *group) set(s *GroupSettings, now int64) {
	own := *s
	if own.StartDelay > 0 {
		own.NotBefore, own.StartDelay = now+own.StartDelay.Milliseconds(), 0
	}
	own.ExcludeDeployments = slices.Clone(own.ExcludeDeployments)
	slices.Sort(own.ExcludeDeployments)
	own.ExcludeDeployments = slices.Compact(own.ExcludeDeployments)
	g.settings = own
	g.compile()
	// What the old settings made of the set is written as it is: the rows would be read under the new ones. What
	// is spent under the new ones is given up now.
	var offs []uint64
	for _, c := range g.chunks {
		c.dirty = true
	}
	g.each(func(off uint64, l *lease) {
		if g.spent(l, now) {
			offs = append(offs, off)
		}
	})
	slices.Sort(offs)
	for _, off := range offs {
		g.giveUp(off, g.find(off), now)
	}
	g.rebuild()
}

// place finds a Start in a topic: the first offset behind it, and the stream ID before that.
func (e *Engine) place(t *topic, s *Start) (uint64, StreamID, error) {
	var behind func(b *block) bool // monotone in the log: the place is in this block or before it
	switch s.Kind {
	case StartBeginning:
		return t.first, StreamID{}, nil
	case StartEnd:
		return t.next, t.last, nil
	case StartTime:
		behind = func(b *block) bool { return b.wall >= s.Time }
	default:
		behind = func(b *block) bool { return s.ID.less(b.streamOf(b.count - 1)) }
	}
	now := e.stamp.Cluster
	b, i, err := e.firstLive(t, nil, 0, now, false)
	if err != nil {
		return 0, StreamID{}, err
	}
	lo, hi := t.next, t.next
	if b != nil {
		lo = b.base + uint64(i)
	}
	for lo < hi {
		mid := lo + (hi-lo)/2
		b, err := e.blockFor(t, mid)
		if err != nil {
			return 0, StreamID{}, err
		}
		if b == nil || behind(b) {
			hi = mid
		} else {
			lo = max(mid+1, b.end())
		}
	}
	if s.Kind == StartID {
		for lo < t.next {
			b, err := e.blockFor(t, lo)
			if err != nil {
				return 0, StreamID{}, err
			}
			if b == nil || s.ID.less(b.streamOf(uint32(max(lo, b.base)-b.base))) {
				break
			}
			lo++
		}
	}
	// Blocks that have expired may be there still or not: the place is the first message that lives.
	b, i, err = e.firstLive(t, nil, lo, now, false)
	switch {
	case err != nil:
		return 0, StreamID{}, err
	case s.Kind == StartID:
		if b == nil {
			return t.next, s.ID, nil
		}
		return b.base + uint64(i), s.ID, nil
	case b == nil:
		return t.next, t.last, nil
	}
	return b.base + uint64(i), b.streamOf(i).prev(), nil
}

// prev is the highest ID below id; the lowest has none and stays.
func (id StreamID) prev() StreamID {
	switch {
	case id.Seq != 0:
		return StreamID{Ms: id.Ms, Seq: id.Seq - 1}
	case id.Ms != 0:
		return StreamID{Ms: id.Ms - 1, Seq: math.MaxUint64}
	}
	return id
}

// topicMore is the part of a topic's row that only topics with settings, purges or delays have.
func (t *topic) appendMore(b []byte) []byte {
	b = t.settings.append(b)
	b = binary.AppendUvarint(b, t.first)
	b = binary.AppendUvarint(b, t.firstIndex)
	b = binary.AppendUvarint(b, uint64(t.firstPos))
	b = binary.AppendUvarint(b, t.keySpace)
	return binary.AppendUvarint(b, t.delayed)
}

func (t *topic) hasMore() bool {
	return t.settings != (TopicSettings{}) || t.first != 0 || t.firstIndex != 0 || t.keySpace != 0 || t.delayed != 0
}

func (t *topic) parseMore(r *reader) {
	t.settings = r.topicSettings()
	t.first, t.firstIndex, t.firstPos = r.uvarint(), r.uvarint(), uint32(r.upTo(math.MaxUint32))
	t.keySpace, t.delayed = r.uvarint(), r.uvarint()
}

func (s *GroupSettings) isZero() bool {
	return !s.Paused && s.MaxDeliveries == 0 && !s.Park && s.ParkedRetention == 0 && s.RetryAfter == 0 && s.InitialDelay == 0 && s.NotBefore == 0 &&
		s.MaxConcurrency == 0 && s.Visibility == 0 && s.Deployment == "" && len(s.ExcludeDeployments) == 0
}
