package engine

import (
	"errors"
	"math"
	"slices"
	"sort"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// streamQuery answers the stream and key queries, with dbMu held. Entries come loaded.
func (e *Engine) streamQuery(q *Query) (Answer, error) {
	e.mu.RLock()
	a, err := e.answerStream(q)
	e.mu.RUnlock()
	if err != nil {
		return Answer{}, err
	}
	if err := e.loadEntries(a.Stream.entries()); err != nil {
		return Answer{}, err
	}
	a.Stream.dropGone()
	return a, nil
}

// dropGone leaves out entries that a checkpoint removed before they could be loaded.
func (a *StreamAnswer) dropGone() {
	a.Parked = slices.DeleteFunc(a.Parked, func(p ParkedEntry) bool { return p.Entry.Deleted })
	for i := range a.Reads {
		a.Reads[i].Entries = slices.DeleteFunc(a.Reads[i].Entries, StreamEntry.gone)
	}
	if a.Info != nil {
		a.Info.Entries = slices.DeleteFunc(a.Info.Entries, StreamEntry.gone)
	}
}

// entries lists the entries of an answer that have to be loaded.
func (a *StreamAnswer) entries() []*StreamEntry {
	var out []*StreamEntry
	for i := range a.Reads {
		for k := range a.Reads[i].Entries {
			out = append(out, &a.Reads[i].Entries[k])
		}
	}
	for i := range a.Parked {
		out = append(out, &a.Parked[i].Entry)
	}
	if a.Info != nil {
		for i := range a.Info.Entries {
			out = append(out, &a.Info.Entries[i])
		}
		if a.Info.First != nil {
			out = append(out, a.Info.First, a.Info.Final)
		}
	}
	return out
}

// answerStream answers a query, with mu held, except for the contents of entries. It changes nothing.
func (e *Engine) answerStream(q *Query) (Answer, error) {
	s := q.Stream
	if s == nil {
		s = &StreamQuery{}
	}
	now := max(q.Now, e.stamp.Cluster)
	out := &StreamAnswer{}
	err := e.answerKeys(q, s, now, out)
	if errors.Is(err, errNotKeys) {
		err = e.answerTopic(q, s, now, out)
	}
	return Answer{Stream: out}, err
}

var errNotKeys = errs.New(errs.BadRequest, "the query is about one stream")

// answerKeys answers queries about names.
func (e *Engine) answerKeys(q *Query, s *StreamQuery, now int64, out *StreamAnswer) error {
	switch q.Kind {
	case QueryKeys:
		for _, name := range s.Keys {
			out.Keys = append(out.Keys, e.keyInfo(name, now))
		}
	case QueryString:
		if e.topicAt(q.Topic, now) != nil {
			return errs.Of(errs.WrongType)
		}
		if k := e.stringAt(q.Topic, now); k != nil {
			out.Value = append([]byte{}, k.value...)
		}
	case QueryDBSize:
		out.Count = uint64(len(e.topics) + len(e.strings))
		for _, name := range e.byExpiry {
			if e.topicAt(name, now) == nil && e.stringAt(name, now) == nil {
				out.Count--
			}
		}
	case QueryScan:
		return e.scanKeys(s, now, out)
	case QueryRandomKey:
		keys := e.sortedKeyspace()
		for n := 0; n < len(keys); n++ {
			k := keys[(s.Cursor+uint64(n))%uint64(len(keys))]
			if info := e.keyInfo(k.name, now); info.Type != KeyNone {
				out.Keys = append(out.Keys, info)
				break
			}
		}
	case QueryStreamRead:
		room := answerRoom{left: answerBytes}
		if s.Size > 0 {
			room.left = min(room.left, int64(min(s.Size, answerBytes)))
		}
		left := s.Total
		if left == 0 {
			left = math.MaxUint64
		}
		for i := range s.Streams {
			p := &s.Streams[i]
			if left == 0 { // enough was given, but the key has to be one of a stream
				if _, err := e.streamAt(p.Key, now); err != nil {
					return err
				}
				out.Reads = append(out.Reads, StreamRead{Key: p.Key, From: p.ID})
				continue
			}
			count := left
			if s.Count > 0 {
				count = min(count, s.Count)
			}
			read, err := e.readStream(p, count, now, &room)
			if err != nil {
				return err
			}
			left -= uint64(len(read.Entries))
			out.Reads = append(out.Reads, read)
		}
	default:
		return errNotKeys
	}
	return nil
}

func (e *Engine) keyInfo(name string, now int64) KeyInfo {
	k := KeyInfo{Name: name, TTL: -1, Version: e.version(name, now)}
	var at, wall int64
	if t := e.topicAt(name, now); t != nil {
		k.Type, at, wall = KeyStream, t.expireAt, t.expireWall
	} else if s := e.stringAt(name, now); s != nil {
		k.Type, at, wall = KeyString, s.expireAt, s.expireWall
	}
	if at != 0 {
		k.TTL, k.ExpiresAt = at-now, wall
	}
	return k
}

// keyName is a key with its number: SCAN goes by numbers, which do not change while a key exists.
type keyName struct {
	inc  uint64
	name string
}

// sortedKeyspace lists all keys by number. The list is kept until a key comes, goes or is renamed.
func (e *Engine) sortedKeyspace() []keyName {
	e.scanMu.Lock()
	defer e.scanMu.Unlock()
	if e.scanVersion == e.absent && len(e.scanList) == len(e.topics)+len(e.strings) && !e.applying {
		return e.scanList
	}
	list := make([]keyName, 0, len(e.topics)+len(e.strings))
	for name, t := range e.topics {
		list = append(list, keyName{t.inc, name})
	}
	for name, s := range e.strings {
		list = append(list, keyName{s.inc, name})
	}
	slices.SortFunc(list, func(a, b keyName) int {
		if a.inc < b.inc {
			return -1
		}
		return 1
	})
	if !e.applying { // within an entry keys may come and go under one version
		e.scanList, e.scanVersion = list, e.absent
	}
	return list
}

func (e *Engine) scanKeys(s *StreamQuery, now int64, out *StreamAnswer) error {
	keys := e.sortedKeyspace()
	count := s.Count
	if count == 0 {
		count = math.MaxUint64
	}
	room := answerRoom{left: answerBytes}
	i := sort.Search(len(keys), func(i int) bool { return keys[i].inc > s.Cursor })
	for ; i < len(keys); i++ {
		if count == 0 {
			out.Next = keys[i-1].inc
			return nil
		}
		count--
		k := keys[i]
		if s.Match != "" && !globMatch(s.Match, k.name) {
			continue
		}
		info := e.keyInfo(k.name, now)
		if info.Type == KeyNone || s.Type != "" && s.Type != info.Type.String() {
			continue
		}
		if !room.take(uint64(len(k.name))+32, len(out.Keys) == 0) {
			out.Next = keys[i-1].inc
			return nil
		}
		out.Keys = append(out.Keys, info)
	}
	return nil
}

// String returns the name that TYPE answers.
func (k KeyType) String() string {
	switch k {
	case KeyStream:
		return "stream"
	case KeyString:
		return "string"
	}
	return "none"
}

// globMatch matches as KEYS does: * any run, ? any byte, [a-z] and [^a-z] classes, \ takes the next byte as it is.
// It goes back to the last * alone, so no pattern takes more than the product of the lengths.
func globMatch(p, s string) bool {
	var star, from int
	haveStar := false
	i, k := 0, 0
	for k < len(s) {
		if i < len(p) && p[i] == '*' {
			haveStar, star, from = true, i, k
			i++
			continue
		}
		if i < len(p) {
			if n, ok := globByte(p[i:], s[k]); ok {
				i += n
				k++
				continue
			}
		}
		if !haveStar {
			return false
		}
		from++
		i, k = star+1, from
	}
	for i < len(p) && p[i] == '*' {
		i++
	}
	return i == len(p)
}

// globByte matches one byte against the head of a pattern and returns how much of the pattern that took.
func globByte(p string, c byte) (int, bool) {
	switch p[0] {
	case '?':
		return 1, true
	case '\\':
		if len(p) > 1 {
			return 2, p[1] == c
		}
		return 1, c == '\\'
	case '[':
		i, not, match := 1, false, false
		if i < len(p) && p[i] == '^' {
			not = true
			i++
		}
		for {
			switch {
			case i >= len(p):
				return len(p), match != not
			case p[i] == '\\' && i+1 < len(p):
				i++
				match = match || p[i] == c
			case p[i] == ']':
				return i + 1, match != not
			case i+2 < len(p) && p[i+1] == '-':
				lo, hi := min(p[i], p[i+2]), max(p[i], p[i+2])
				match = match || c >= lo && c <= hi
				i += 2
			default:
				match = match || p[i] == c
			}
			i++
		}
	}
	return 1, p[0] == c
}

// streamAt returns the topic of a key for a query.
func (e *Engine) streamAt(key string, now int64) (*topic, error) {
	if t := e.topicAt(key, now); t != nil {
		return t, nil
	}
	if e.stringAt(key, now) != nil {
		return nil, errs.Of(errs.WrongType)
	}
	return nil, nil
}

// readStream is XREAD of one stream.
func (e *Engine) readStream(p *StreamPosition, count uint64, now int64, room *answerRoom) (StreamRead, error) {
	read := StreamRead{Key: p.Key, From: p.ID}
	t, err := e.streamAt(p.Key, now)
	switch {
	case err != nil:
		return read, err
	case p.New:
		if read.From = (StreamID{}); t != nil {
			read.From = t.last
		}
		return read, nil
	case p.Tail:
		if read.From = (StreamID{}); t == nil {
			return read, nil
		}
		read.From = t.last
		b, i, err := e.lastLive(t, nil, t.next, now)
		if err != nil || b == nil {
			return read, err
		}
		read.Entries = []StreamEntry{e.streamEntry(b, i)}
		room.take(b.sizeOf(i), true)
		return read, nil
	case t == nil:
		return read, nil
	}
	if from, ok := StreamID.Next(p.ID); ok && p.ID.less(t.last) {
		err = e.forward(t, from, StreamIDMax, count, now, room, &read)
	}
	return read, err
}

// forward adds the entries of a range in order, at most count (0: all).
func (e *Engine) forward(t *topic, start, end StreamID, count uint64, now int64, room *answerRoom, read *StreamRead) error {
	off, err := e.seekID(t, start)
	if err != nil {
		return err
	}
	var hint *block
	for {
		b, i, err := e.firstLive(t, hint, off, now, false)
		if err != nil || b == nil {
			return err
		}
		hint, off = b, b.base+uint64(i)+1
		id := b.streamOf(i)
		switch {
		case id.less(start):
			continue
		case end.less(id), count > 0 && uint64(len(read.Entries)) == count:
			return nil
		case !room.take(b.sizeOf(i), !room.given):
			read.Cut = true
			return nil
		}
		read.Entries = append(read.Entries, e.streamEntry(b, i))
	}
}

// backward is forward from the end.
func (e *Engine) backward(t *topic, start, end StreamID, count uint64, now int64, room *answerRoom, read *StreamRead) error {
	off := t.next
	if end.less(t.last) {
		above, _ := StreamID.Next(end)
		b, i, err := e.from(t, above, now)
		if err != nil {
			return err
		}
		if b != nil {
			off = b.base + uint64(i)
		}
	}
	var hint *block
	for {
		b, i, err := e.lastLive(t, hint, off, now)
		if err != nil || b == nil {
			return err
		}
		hint, off = b, b.base+uint64(i)
		id := b.streamOf(i)
		switch {
		case end.less(id):
			continue
		case id.less(start), count > 0 && uint64(len(read.Entries)) == count:
			return nil
		case !room.take(b.sizeOf(i), len(read.Entries) == 0):
			read.Cut = true
			return nil
		}
		read.Entries = append(read.Entries, e.streamEntry(b, i))
	}
}

// parkedEntries lists what a group has parked.
func (e *Engine) parkedEntries(g *group, s *StreamQuery, now int64, room *answerRoom, out *StreamAnswer) error {
	offs, next, err := e.selected(g, &ParkedFilter{}, s.Cursor, int(min(max(s.Count, 1), limits.ParkedPerCommandMax)), now)
	if err != nil {
		return err
	}
	out.Next = next
	for _, off := range offs {
		v, _ := g.view(off, g.find(off), now)
		b, i, err := e.blockAt(g.topic, nil, off)
		if err != nil {
			return err
		}
		if !room.take(v.sizeIn(b, i), !room.given) {
			out.Next = off
			return nil
		}
		entry := e.streamEntry(b, i)
		entry.Claimed, entry.Idle, entry.Count = true, max(now-v.deadline, 0), uint64(v.count)
		out.Parked = append(out.Parked, ParkedEntry{Entry: entry, Error: g.notes[off]})
	}
	return nil
}

// answerTopic answers queries about one stream.
func (e *Engine) answerTopic(q *Query, s *StreamQuery, now int64, out *StreamAnswer) error {
	t, err := e.streamAt(q.Topic, now)
	if err != nil {
		return err
	}
	room := answerRoom{left: answerBytes}
	switch q.Kind {
	case QueryStreamRange:
		read := StreamRead{Key: q.Topic}
		if t != nil && !s.End.less(s.Start) {
			if s.Reverse {
				err = e.backward(t, s.Start, s.End, s.Count, now, &room, &read)
			} else {
				err = e.forward(t, s.Start, s.End, s.Count, now, &room, &read)
			}
		}
		out.Reads = []StreamRead{read}
		return err
	case QueryStreamLen:
		if t != nil {
			out.Count, err = e.length(t, now)
		}
		return err
	}
	if t == nil {
		return errs.Of(errs.TopicNotFound)
	}
	switch q.Kind {
	case QueryStreamInfo:
		out.Info, err = e.streamInfo(t, s, now, &room)
		return err
	case QueryStreamGroups:
		shape, err := e.shape(t, now)
		if err != nil {
			return err
		}
		out.Info = &StreamInfo{GroupCount: len(t.groups)}
		for _, name := range sortedKeys(t.groups) {
			out.Info.Groups = append(out.Info.Groups, e.groupFacts(t.groups[name], shape, now))
		}
		return nil
	}
	g := t.groups[q.Group]
	if g == nil {
		return errs.Of(errs.GroupNotFound)
	}
	switch q.Kind {
	case QueryStreamConsumers:
		shape, err := e.shape(t, now)
		if err != nil {
			return err
		}
		info := e.groupFacts(g, shape, now)
		info.Consumers = e.consumerFacts(g, now)
		out.Info = &StreamInfo{GroupCount: len(t.groups), Groups: []StreamGroupInfo{info}}
	case QueryPending:
		out.Pending = e.pendingSummary(g, now)
	case QueryPendingRange:
		out.Pending = e.pendingRange(g, s, now)
	case QueryStreamParked:
		return e.parkedEntries(g, s, now, &room, out)
	default:
		return errs.New(errs.BadRequest, "query kind %d is not known", q.Kind)
	}
	return nil
}

func (e *Engine) streamInfo(t *topic, s *StreamQuery, now int64, room *answerRoom) (*StreamInfo, error) {
	shape, err := e.shape(t, now)
	if err != nil {
		return nil, err
	}
	info := &StreamInfo{Length: shape.length, Last: t.last, MaxDeleted: t.maxDeleted, EntriesAdded: t.added, FirstID: shape.first, GroupCount: len(t.groups),
		RadixKeys: (shape.length + approxRun - 1) / approxRun}
	info.RadixNodes = info.RadixKeys + 1
	if !s.Full {
		if shape.length == 0 {
			return info, nil
		}
		b, i, err := e.firstLive(t, nil, t.first, now, false)
		if err != nil || b == nil {
			return info, err
		}
		first := e.streamEntry(b, i)
		if b, i, err = e.lastLive(t, nil, t.next, now); err != nil || b == nil {
			return info, err
		}
		last := e.streamEntry(b, i)
		info.First, info.Final = &first, &last
		return info, nil
	}
	var read StreamRead
	if err := e.forward(t, StreamIDMin, StreamIDMax, s.Count, now, room, &read); err != nil {
		return nil, err
	}
	info.Entries = read.Entries
	limit := s.Count
	if limit == 0 {
		limit = math.MaxUint64
	}
	for _, name := range sortedKeys(t.groups) {
		g := t.groups[name]
		f := e.groupFacts(g, shape, now)
		f.Entries = e.pendingList(g, nil, StreamIDMin, StreamIDMax, limit, 0, now, room)
		f.Consumers = e.consumerFacts(g, now)
		for i := range f.Consumers {
			if c := g.consumers[f.Consumers[i].Name]; c != nil {
				f.Consumers[i].Entries = e.pendingList(g, c, StreamIDMin, StreamIDMax, limit, 0, now, room)
			}
		}
		info.Groups = append(info.Groups, f)
	}
	return info, nil
}

func (e *Engine) groupFacts(g *group, s streamShape, now int64) StreamGroupInfo {
	counts := g.pendingBy(now)
	total := uint64(0)
	for _, n := range counts {
		total += n
	}
	info := StreamGroupInfo{Name: g.name, LastDelivered: g.pos, EntriesRead: g.entriesRead, Lag: e.lag(g, s), Pending: total, ConsumerCount: len(g.consumers)}
	if counts[0] > 0 {
		info.ConsumerCount++
	}
	return info
}

// pendingBy counts the pending entries of each consumer at now; 0 is the queue protocol's.
func (g *group) pendingBy(now int64) map[uint32]uint64 {
	out := make(map[uint32]uint64)
	if len(g.expiring) == 0 && g.settings.MaxDeliveries == 0 {
		rest := g.pendingCount()
		for num, c := range g.byNum {
			if c.pending > 0 {
				out[num] = uint64(c.pending)
				rest -= c.pending
			}
		}
		if rest > 0 {
			out[0] = uint64(rest)
		}
		return out
	}
	g.each(func(_ uint64, l *lease) {
		if g.pends(l, now) {
			out[l.consumer]++
		}
	})
	return out
}

// consumerFacts describes a group's consumers by name. The queue protocol's is among them while it holds something.
func (e *Engine) consumerFacts(g *group, now int64) []ConsumerInfo {
	counts := g.pendingBy(now)
	wall := e.stamp.Wall + now - e.stamp.Cluster
	var out []ConsumerInfo
	for _, name := range sortedKeys(g.consumers) {
		c := g.consumers[name]
		f := ConsumerInfo{Name: name, Pending: counts[c.num], SeenAt: c.seen, ActiveAt: c.active, Idle: max(wall-c.seen, 0), Inactive: -1}
		if c.active >= 0 {
			f.Inactive = max(wall-c.active, 0)
		}
		out = append(out, f)
	}
	if counts[0] > 0 {
		f := ConsumerInfo{Name: HTTPConsumer, Pending: counts[0], SeenAt: wall, ActiveAt: wall}
		i := sort.Search(len(out), func(i int) bool { return out[i].Name > f.Name })
		out = slices.Insert(out, i, f)
	}
	return out
}

func (g *group) consumerName(num uint32) string {
	if c := g.byNum[num]; c != nil {
		return c.name
	}
	return HTTPConsumer
}

func (e *Engine) pendingEntry(g *group, l *lease, now int64) PendingEntry {
	return PendingEntry{ID: l.stream, Consumer: g.consumerName(l.consumer), Idle: max(now-l.granted, 0), DeliveredAt: e.wallAt(l.granted), Count: uint64(l.count)}
}

// pendingList lists pending entries from one ID to another, both included, of one consumer if c is not nil, idle for
// at least so long.
func (e *Engine) pendingList(g *group, c *consumer, start, end StreamID, limit uint64, idle, now int64, room *answerRoom) []PendingEntry {
	var out []PendingEntry
	if limit == 0 {
		return nil
	}
	g.eachFrom(start, c, now, func(_ uint64, l *lease) bool {
		if end.less(l.stream) {
			return g.topic.rewound
		}
		if now-l.granted < idle {
			return true
		}
		if !room.take(64, len(out) == 0) {
			return false
		}
		out = append(out, e.pendingEntry(g, l, now))
		return uint64(len(out)) < limit
	})
	return out
}

func (e *Engine) pendingSummary(g *group, now int64) *PendingInfo {
	p := &PendingInfo{}
	counts := g.pendingBy(now)
	for num, n := range counts {
		p.Total += n
		p.Consumers = append(p.Consumers, ConsumerInfo{Name: g.consumerName(num), Pending: n})
	}
	sort.Slice(p.Consumers, func(i, j int) bool { return p.Consumers[i].Name < p.Consumers[j].Name })
	if p.Total == 0 {
		return p
	}
	g.eachFrom(StreamIDMin, nil, now, func(_ uint64, l *lease) bool {
		p.Min = l.stream
		return false
	})
	for k := len(g.order) - 1; k >= 0 && p.Max == (StreamID{}); k-- {
		s := g.chunks[g.order[k]].slots
		for i := len(s) - 1; i >= 0; i-- {
			if g.pends(&s[i], now) {
				p.Max = s[i].stream
				break
			}
		}
	}
	return p
}

func (e *Engine) pendingRange(g *group, s *StreamQuery, now int64) *PendingInfo {
	p := &PendingInfo{}
	var c *consumer
	if s.Consumer == HTTPConsumer {
		c = &consumer{} // number 0
	} else if s.Consumer != "" {
		if c = g.consumers[s.Consumer]; c == nil {
			return p
		}
	}
	room := answerRoom{left: answerBytes}
	p.Entries = e.pendingList(g, c, s.Start, s.End, s.Count, s.MinIdle, now, &room)
	return p
}
