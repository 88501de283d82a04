package engine

import (
	"encoding/binary"
	"sort"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// browseMax bounds the items of one Answer.
const browseMax = 1000

// answerBytes is where a list of messages is cut short, so that an Answer fits into a frame.
const answerBytes = 4 << 20

// Query answers a read from the applied state; messages come loaded. It may be called from any goroutine.
func (e *Engine) Query(q Query) (Answer, error) {
	if err := e.Err(); err != nil {
		return Answer{}, err
	}
	e.dbMu.RLock()
	defer e.dbMu.RUnlock()
	if q.Kind >= queryStreamFirst {
		return e.streamQuery(&q)
	}
	a, sizes, err := e.query(&q)
	if err != nil {
		return Answer{}, err
	}
	total := uint64(0)
	for i, n := range sizes {
		if total += n; total > answerBytes && i > 0 {
			a.Next = a.Messages[i].Receipt.Offset
			a.Messages, a.More = a.Messages[:i], true
			break
		}
	}
	if len(a.Messages) > 0 {
		// dbMu is held already; Load would take it a second time.
		err = e.loadAll(a.Messages)
		if errs.CodeOf(err) == errs.MessageNotFound {
			err = nil
			if a.Story != nil {
				err = errs.Of(errs.MessageNotFound)
			}
		}
		a.finish(&q)
	}
	if q.Kind == QueryBrowse || q.Kind == QueryMessage {
		for i := range a.Messages {
			a.Messages[i].Receipt = Receipt{Shard: a.Messages[i].Receipt.Shard, Offset: a.Messages[i].Receipt.Offset}
		}
	}
	return a, err
}

// query fills the answer except for contents; sizes are estimates of the messages' bytes.
func (e *Engine) query(q *Query) (Answer, []uint64, error) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	now := max(q.Now, e.stamp.Cluster)
	limit := min(max(q.Max, 1), browseMax)
	var a Answer
	if q.Kind == QueryTopics {
		names := sortedKeys(e.topics)
		for _, name := range names[sort.Search(len(names), func(i int) bool { return names[i] > q.After }):] {
			if len(a.Topics) == limit {
				a.More = true
				break
			}
			info, err := e.topicInfo(e.topics[name], now)
			if err != nil {
				return a, nil, err
			}
			a.Topics = append(a.Topics, info)
		}
		return a, nil, nil
	}
	if q.Kind == QueryDocuments {
		return e.queryDocuments(q, limit), nil, nil
	}
	t := e.topics[q.Topic]
	if t == nil {
		if q.Kind == QueryPeek {
			return a, nil, nil
		}
		return a, nil, errs.New(errs.TopicNotFound, "topic %q not found", q.Topic)
	}
	switch q.Kind {
	case QueryPeek:
		return e.peek(t, t.groups[q.Group], q.Deployment, min(limit, limits.ReceiveMessagesMax), now)
	case QueryBrowse:
		g := t.groups[q.Group]
		if g == nil && q.Group != "" {
			return a, nil, errs.New(errs.GroupNotFound, "consumer group %q not found", q.Group)
		}
		return e.browse(t, g, q, limit, now)
	case QueryParked:
		g := t.groups[q.Group]
		if g == nil {
			return a, nil, errs.New(errs.GroupNotFound, "consumer group %q not found", q.Group)
		}
		return e.parkedAnswer(g, q, limit, now)
	case QueryStory:
		a, err := e.storyAnswer(t, q.ID, now)
		return a, nil, err
	case QueryMessage:
		b, i, err := e.byID(t, q.ID)
		if err != nil {
			return a, nil, err
		}
		if b == nil {
			d, _, ok, err := e.waitingMessage(t, q.ID, now)
			if err == nil && !ok {
				err = errs.Of(errs.MessageNotFound)
			}
			a.Messages = []Delivery{d}
			return a, nil, err
		}
		if b.expiry(i) <= now {
			return a, nil, errs.Of(errs.MessageNotFound)
		}
		a.Messages = []Delivery{e.stored1(t, nil, b, i)}
		return a, nil, nil
	case QueryDelayed:
		return e.delayedAnswer(t, q, limit, now)
	case QueryTopic:
		info, err := e.topicInfo(t, now)
		a.Topics = []TopicInfo{info}
		return a, nil, err
	case QueryGroup:
		g := t.groups[q.Group]
		if g == nil {
			return a, nil, errs.New(errs.GroupNotFound, "consumer group %q not found", q.Group)
		}
		info, err := e.groupInfo(g, q.Deployment, now)
		if err == nil && q.DrainRate > 0 {
			info.Expiring, err = e.expiring(g, q.Deployment, q.DrainRate, now)
		}
		a.Groups = []GroupInfo{info}
		return a, nil, err
	case QueryGroups:
		names := sortedKeys(t.groups)
		for _, name := range names[sort.Search(len(names), func(i int) bool { return names[i] > q.After }):] {
			if len(a.Groups) == limit {
				a.More = true
				break
			}
			info, err := e.groupInfo(t.groups[name], "", now)
			if err != nil {
				return a, nil, err
			}
			a.Groups = append(a.Groups, info)
		}
		return a, nil, nil
	}
	return a, nil, errs.New(errs.BadRequest, "query kind %d is not known", q.Kind)
}

// stored1 is a message as it stands in the log, and for a group as its next delivery would be.
func (e *Engine) stored1(t *topic, g *group, b *block, i uint32) Delivery {
	d := Delivery{
		ID:     b.id(e.o.Shard, i),
		Stream: b.streamOf(i), PublishedAt: b.publishedWall(i), ExpiresAt: b.wallExpiry(i),
		Receipt: Receipt{Shard: e.o.Shard, Topic: t.inc, Offset: b.base + uint64(i)},
	}
	if g != nil {
		d.Receipt.Group = g.inc
	}
	return d
}

// sizeOf is an estimate of a message's size. It is the same on every node, whatever a node keeps in memory: what a
// command is given may depend on it.
func (b *block) sizeOf(i uint32) uint64 {
	switch {
	case b.refs != nil:
		r := b.ref(i)
		return uint64(r.bytes / r.count)
	case b.sizes != nil:
		return uint64(b.sizes[i])
	}
	return b.bytes / uint64(b.count)
}

func (e *Engine) peek(t *topic, g *group, deployed string, limit int, now int64) (Answer, []uint64, error) {
	var a Answer
	var sizes []uint64
	add := func(b *block, i uint32, count uint32) {
		d := e.stored1(t, g, b, i)
		d.Count = count + 1
		d.LeaseUntil = e.stamp.Wall
		a.Messages = append(a.Messages, d)
		sizes = append(sizes, b.sizeOf(i))
	}
	if g != nil {
		deployed = g.named(deployed)
	}
	dep := deployment(deployed)
	room := func() bool { return len(a.Messages) < limit && (g == nil || e.room(g) && !g.paused()) }
	fresh := func(off uint64) (*block, uint32, error) {
		if g == nil {
			return e.nextOf(t, dep, off, now)
		}
		return e.freshFrom(g, dep, off, endless, now)
	}
	for off := uint64(0); dep != 0 && room(); off++ {
		b, i, err := fresh(off)
		if err != nil {
			return a, nil, err
		}
		if b == nil || g != nil && g.held(b, i) > now {
			break
		}
		add(b, i, 0)
		off = b.base + uint64(i)
	}
	off, held := uint64(0), false
	if g != nil {
		off = g.next
	}
	if dep == 0 && g != nil && g.behind > 0 {
		for from := uint64(0); room() && !held; from++ {
			b, i, err := e.behindFrom(g, from, now)
			if err != nil {
				return a, nil, err
			}
			if b == nil {
				break
			}
			if held = g.held(b, i) > now; !held {
				add(b, i, 0)
			}
			from = b.base + uint64(i)
		}
	}
	for looks := looksMax; dep == 0 && !held && room(); {
		b, i, err := e.firstLive(t, nil, off, now, false)
		if err != nil {
			return a, nil, err
		}
		if b == nil {
			break
		}
		off = b.base + uint64(i)
		if g != nil {
			if n := g.skips(b, i); n > 0 {
				if looks--; looks == 0 {
					break
				}
				off += uint64(n)
				continue
			}
		}
		if g == nil || (g.ahead == 0 || g.find(off) == nil) && g.pos.less(b.streamOf(i)) {
			if g != nil && g.held(b, i) > now {
				break
			}
			add(b, i, 0)
		}
		off++
	}
	if g == nil || g.paused() || len(a.Messages) == limit {
		return a, sizes, nil
	}
	var due []timer
	g.each(func(off uint64, l *lease) {
		if v, ok := g.view(off, l, now); ok && !v.idle() && v.due() <= now && !t.removed(off) && (dep == 0 && !g.excluded(l.dep) || dep != 0 && l.dep == dep) {
			due = append(due, timer{l.due(), off})
		}
	})
	sort.Slice(due, func(i, j int) bool { return due[i].before(due[j]) })
	for _, x := range due[:min(len(due), limit-len(a.Messages))] {
		l := g.find(x.off)
		d, err := e.again(g, x.off, l)
		if err != nil {
			return a, nil, err
		}
		d.Receipt.Epoch, d.Count, d.LeaseUntil = 0, l.count+1, e.stamp.Wall
		a.Messages = append(a.Messages, d)
		sizes = append(sizes, 4<<10)
	}
	return a, sizes, nil
}

func (e *Engine) browse(t *topic, g *group, q *Query, limit int, now int64) (Answer, []uint64, error) {
	from, looks := q.From, browseLooks
	var a Answer
	var sizes []uint64
	var hint *block
	for {
		b, i, err := e.firstLive(t, hint, from, now, false)
		if err != nil || b == nil {
			return a, sizes, err
		}
		hint = b
		from = b.base + uint64(i)
		if len(a.Messages) == limit || looks == 0 {
			a.Next, a.More = from, true
			return a, sizes, nil
		}
		looks--
		if !q.Filter.matchesPlace(g, b, i, now) {
			from++
			continue
		}
		a.Messages = append(a.Messages, e.stored1(t, nil, b, i))
		sizes = append(sizes, b.sizeOf(i))
		from++
	}
}

func (e *Engine) topicInfo(t *topic, now int64) (TopicInfo, error) {
	info := TopicInfo{Name: t.name, Incarnation: t.inc, First: max(t.floor.offset, t.gone, t.first), Next: t.next, Last: t.last,
		Published: t.published, Bytes: t.bytes, Groups: len(t.groups), Delayed: t.delayed, Settings: t.settings}
	b, i, err := e.firstLive(t, nil, 0, now, false)
	if err != nil {
		return info, err
	}
	if b == nil {
		info.First = t.next
		return info, nil
	}
	info.First, info.OldestAt = b.base+uint64(i), b.publishedWall(i)
	return info, nil
}

// groupInfo describes a group: all of it, or what is a deployment's.
func (e *Engine) groupInfo(g *group, deployed string, now int64) (GroupInfo, error) {
	t := g.topic
	info := GroupInfo{Topic: t.name, Name: g.name, Incarnation: g.inc, Position: g.pos, Offset: g.next,
		Delivered: g.delivered, Redelivered: g.redelivered, Acknowledged: g.acked, Settings: g.settings}
	oldest := uint64(never)
	only := deployment(deployed)
	g.each(func(off uint64, l *lease) {
		v, ok := g.view(off, l, now)
		switch {
		case !ok || v.state == settledAhead || only != 0 && l.dep != only:
		case v.state == parked:
			info.Parked++
		default:
			info.Unsettled++
			if v.state == leased && v.deadline > now {
				info.Inflight++
			}
			if !t.removed(off) {
				oldest = min(oldest, off)
			}
		}
	})
	var err error
	if name := g.named(deployed); name != "" {
		dep := deployment(name)
		b, i, e1 := e.freshOf(g, dep, endless, now)
		if e1 != nil {
			return info, e1
		}
		if b != nil {
			oldest = min(oldest, b.base+uint64(i))
		}
		info.Ready, err = e.readyOf(g, dep, now)
	} else {
		var first uint64
		info.Ready, first, err = e.readyOfAll(g, now)
		oldest = min(oldest, first)
	}
	if err != nil || oldest == never {
		return info, err
	}
	b, i, err := e.blockAt(t, nil, oldest)
	if err != nil {
		return info, err
	}
	info.OldestAt = b.publishedWall(i)
	return info, nil
}

const queryVersion = 1

// AppendQuery appends the encoded query, for the way to the leader.
func AppendQuery(b []byte, q *Query) []byte {
	b = append(b, queryVersion, byte(q.Kind))
	b = appendBytes(b, q.Topic)
	b = appendBytes(b, q.Group)
	b = binary.AppendUvarint(b, uint64(max(q.Max, 0)))
	b = binary.AppendUvarint(b, q.From)
	b = appendBytes(b, q.After)
	b = q.ID.append(b)
	b = appendBytes(b, q.Deployment)
	b = appendVarint(b, q.Now)
	b = appendBytes(b, q.Table)
	b = appendBytes(b, q.Key)
	b = q.Filter.append(b)
	b = q.Parked.append(b)
	b = binary.AppendUvarint(b, q.DrainRate)
	b = appendMillis(b, q.Wait)
	return q.Stream.append(b)
}

// DecodeQuery decodes what AppendQuery wrote.
func DecodeQuery(b []byte) (Query, error) {
	r := reader{b: b}
	if r.u8() != queryVersion {
		return Query{}, errMalformed
	}
	q := Query{Kind: QueryKind(r.u8()), Topic: r.str(), Group: r.str(), Max: int(r.upTo(1 << 31)), From: r.uvarint(), After: r.str(),
		ID: r.messageID(), Deployment: r.str(), Now: r.varint(), Table: r.str(), Key: r.str(), Filter: r.messageFilter(), Parked: r.parkedFilter(),
		DrainRate: r.uvarint(), Wait: r.duration(), Stream: r.streamQuery()}
	if err := r.err(); err != nil {
		return Query{}, err
	}
	return q, nil
}

// AppendAnswer appends the encoded answer, for the way back.
func AppendAnswer(b []byte, a *Answer) []byte {
	b = append(b, queryVersion)
	b = appendDeliveries(b, a.Messages)
	b = binary.AppendUvarint(b, uint64(len(a.Topics)))
	for i := range a.Topics {
		t := &a.Topics[i]
		b = appendBytes(b, t.Name)
		b = binary.AppendUvarint(b, t.Incarnation)
		b = binary.AppendUvarint(b, t.First)
		b = binary.AppendUvarint(b, t.Next)
		b = t.Last.append(b)
		b = binary.AppendUvarint(b, t.Published)
		b = binary.AppendUvarint(b, t.Bytes)
		b = binary.AppendUvarint(b, uint64(t.Groups))
		b = appendVarint(b, t.OldestAt)
		b = binary.AppendUvarint(b, t.Delayed)
		b = t.Settings.append(b)
	}
	b = binary.AppendUvarint(b, uint64(len(a.Groups)))
	for i := range a.Groups {
		g := &a.Groups[i]
		b = appendBytes(b, g.Topic)
		b = appendBytes(b, g.Name)
		b = binary.AppendUvarint(b, g.Incarnation)
		b = g.Position.append(b)
		b = binary.AppendUvarint(b, g.Offset)
		b = binary.AppendUvarint(b, g.Ready)
		b = binary.AppendUvarint(b, uint64(g.Unsettled))
		b = binary.AppendUvarint(b, uint64(g.Inflight))
		b = binary.AppendUvarint(b, g.Delivered)
		b = binary.AppendUvarint(b, g.Redelivered)
		b = binary.AppendUvarint(b, g.Acknowledged)
		b = appendVarint(b, g.OldestAt)
		b = binary.AppendUvarint(b, uint64(g.Parked))
		b = binary.AppendUvarint(b, g.Expiring)
		b = g.Settings.append(b)
	}
	b = binary.AppendUvarint(b, a.Next)
	b = appendBool(b, a.More)
	b = appendDocuments(b, a.Documents)
	b = appendParked(b, a.Parked)
	b = a.Story.append(b)
	b = appendBytes(b, a.Last)
	return a.Stream.append(b)
}

// DecodeAnswer decodes what AppendAnswer wrote. Bodies point into b.
func DecodeAnswer(b []byte) (Answer, error) {
	r := reader{b: b}
	a := r.answer()
	if err := r.err(); err != nil {
		return Answer{}, err
	}
	return a, nil
}

func (r *reader) answer() Answer {
	if r.u8() != queryVersion {
		r.fail()
	}
	a := Answer{Messages: r.deliveries()}
	for range r.count(10) {
		a.Topics = append(a.Topics, TopicInfo{Name: r.str(), Incarnation: r.uvarint(), First: r.uvarint(), Next: r.uvarint(), Last: r.streamID(),
			Published: r.uvarint(), Bytes: r.uvarint(), Groups: int(r.upTo(1 << 40)), OldestAt: r.varint(), Delayed: r.uvarint(), Settings: r.topicSettings()})
	}
	for range r.count(13) {
		a.Groups = append(a.Groups, GroupInfo{Topic: r.str(), Name: r.str(), Incarnation: r.uvarint(), Position: r.streamID(), Offset: r.uvarint(),
			Ready: r.uvarint(), Unsettled: int(r.upTo(1 << 40)), Inflight: int(r.upTo(1 << 40)), Delivered: r.uvarint(), Redelivered: r.uvarint(),
			Acknowledged: r.uvarint(), OldestAt: r.varint(), Parked: int(r.upTo(1 << 40)), Expiring: r.uvarint(), Settings: r.groupSettings()})
	}
	a.Next, a.More = r.uvarint(), r.bool()
	a.Documents, a.Parked, a.Story, a.Last = r.documents(), r.parkedMessages(), r.story(), r.str()
	a.Stream = r.streamAnswer()
	return a
}
