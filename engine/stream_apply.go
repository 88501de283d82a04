package engine

import (
	"math"
	"slices"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// applyStream applies a stream command: its body begins at in, and it ends at end in the entry.
func (e *Engine) applyStream(kind Kind, in *reader, end uint32, res *Result) error {
	if kind == CmdStreamAdd {
		return e.applyStreamAdd(in, end, res)
	}
	if kind == CmdExec {
		return e.applyExec(in, end, res)
	}
	cmd, err := decodeStream(kind, in)
	if err != nil {
		res.Code = errs.BadRequest
		return nil
	}
	switch c := cmd.(type) {
	case *StreamDelete:
		return e.applyStreamDelete(c, res)
	case *StreamTrim:
		return e.applyStreamTrim(c, res)
	case *StreamSetID:
		return e.applyStreamSetID(c, res)
	case *StreamGroup:
		return e.applyStreamGroup(c, res)
	case *StreamReadGroup:
		return e.applyStreamReadGroup(c, res)
	case *StreamAck:
		return e.applyStreamAck(c, res)
	case *StreamClaim:
		return e.applyStreamClaim(c, res)
	case *StreamAutoClaim:
		return e.applyStreamAutoClaim(c, res)
	case *StreamNack:
		return e.applyStreamNack(c, res)
	case *KeyDelete:
		e.applyKeyDelete(c, res)
	case *KeyRename:
		e.applyKeyRename(c, res)
	case *KeyCopy:
		return e.applyKeyCopy(c, res)
	case *KeyExpire:
		e.applyKeyExpire(c, res)
	case *StringSet:
		e.applyStringSet(c, res)
	case *StringGetDel:
		e.applyStringGetDel(c, res)
	case *Flush:
		e.applyFlush()
	default:
		res.Code = errs.Unsupported
	}
	return nil
}

// stream returns the topic of a key, nil with a code if there is none or the key holds a string.
func (e *Engine) stream(key string) (*topic, errs.Code) {
	if t := e.topics[key]; t != nil {
		return t, errs.OK
	}
	if e.strings[key] != nil {
		return nil, errs.WrongType
	}
	return nil, errs.TopicNotFound
}

// applyStreamAdd is XADD. The record travels at the end of the command and is stored as it came.
func (e *Engine) applyStreamAdd(in *reader, end uint32, res *Result) error {
	var v addView
	v.parse(in)
	start := end - uint32(len(in.b))
	var rec record
	parseRecord(in, &rec)
	switch {
	case in.err() != nil || rec.flags&recordFields == 0:
		res.Code = errs.BadRequest
	case v.by == AddExplicit && v.id == StreamID{}:
		res.Code = errs.StreamIDZero
	case rec.flags&(recordDeployment|recordDefault) != 0 || v.by != AddAuto && rec.flags&(recordKey|recordDelay) != 0:
		res.Code = errs.BadRequest
	case len(rec.body) > limits.FieldsBytesMax:
		res.Code = errs.MessageTooLarge
	}
	if res.Code != errs.OK {
		return nil
	}
	t := e.topics[string(v.key)]
	if t == nil {
		switch {
		case e.strings[string(v.key)] != nil:
			res.Code = errs.WrongType
		case v.noCreate:
			res.Code = errs.TopicNotFound
		}
		if res.Code != errs.OK {
			return nil
		}
	}
	var last StreamID
	if t != nil {
		last = t.last
	}
	if last == StreamIDMax {
		res.Code = errs.StreamExhausted
		return nil
	}
	id := v.id
	switch v.by {
	case AddAuto:
		id = StreamID{}
	case AddAutoSeq:
		id.Seq = 0
		if id.Ms == last.Ms {
			if last.Seq == math.MaxUint64 {
				res.Code = errs.StreamIDTooLow
				return nil
			}
			id.Seq = last.Seq + 1
		}
	}
	if v.by != AddAuto && !last.less(id) {
		res.Code = errs.StreamIDTooLow
		return nil
	}
	if t == nil {
		var code errs.Code
		if t, code = e.topicNamed(v.key); code != errs.OK {
			res.Code = code
			return nil
		}
	}
	e.beginPublish()
	if res.Code = e.noteRecord(&rec, start, end-start); res.Code != errs.OK {
		return nil
	}
	if err := e.publishAt(t, id, res); err != nil || res.Code != errs.OK {
		return err
	}
	if p := &res.Published; len(p.Kinds) == 1 && p.Kinds[0] == KindDuplicate {
		b, i, err := e.byID(t, p.Originals[0])
		if err == nil && b != nil {
			p.Stream = b.streamOf(i)
		}
		return err // nothing was added, so nothing is trimmed
	}
	if v.trim.By == TrimNone {
		return nil
	}
	_, err := e.trim(t, &v.trim)
	return err
}

// approxRun is how many entries "~" removes at a time: what Valkey keeps in one node.
const approxRun = 100

// trim trims a topic and returns the number of entries removed.
func (e *Engine) trim(t *topic, c *Trim) (uint64, error) {
	now := e.stamp.Cluster
	var n uint64
	switch c.By {
	case TrimMaxLen:
		length, err := e.length(t, now)
		if err != nil || length <= c.MaxLen {
			return 0, err
		}
		n = length - c.MaxLen
	case TrimMinID:
		b, i, err := e.from(t, c.MinID, now)
		if err != nil {
			return 0, err
		}
		to := t.next
		if b != nil {
			to = b.base + uint64(i)
		}
		if n, err = e.liveIn(t, t.first, to, now); err != nil {
			return 0, err
		}
	}
	if c.Approx {
		if c.Limit > 0 {
			n = min(n, c.Limit)
		}
		n -= n % approxRun
	}
	if n == 0 {
		return 0, nil
	}
	to, err := e.offsetBehind(t, n, now)
	if err != nil {
		return 0, err
	}
	switch c.Refs {
	case Acked:
		if n, err = e.trimAcked(t, to, now); n == 0 || err != nil {
			return 0, err
		}
	case DelRef:
		e.dropRefs(t, to)
		t.removeBelow(to)
	default:
		t.removeBelow(to)
	}
	t.changed, t.dirty = e.index, true
	e.noteKey(t.name)
	e.dirtRough.Add(64)
	return n, nil
}

// ackedLooks bounds the entries that one trimming with ACKED looks at: what the groups hold is looked at each time.
const ackedLooks = 10_000

// trimAcked removes the entries below an offset that no group needs any more.
func (e *Engine) trimAcked(t *topic, to uint64, now int64) (n uint64, err error) {
	for _, g := range t.byInc {
		to = min(to, g.next) // what a group was not given it needs
	}
	var b *block
	var i uint32
	off := t.first
	for range ackedLooks {
		if b, i, err = e.firstLive(t, b, off, now, false); b == nil || err != nil {
			return n, err
		}
		off = b.base + uint64(i)
		if off >= to {
			return n, nil
		}
		if !t.needed(b, i, now) {
			t.mark(off)
			t.noteDead(b)
			n++
		}
		off++
	}
	return n, nil
}

// needed reports whether a group has not been given a message, or not done with it.
func (t *topic) needed(b *block, i uint32, now int64) bool {
	off, dep := b.base+uint64(i), b.dep(i)
	for _, g := range t.byInc { // asks all of them in any order
		l := g.find(off)
		if l == nil {
			if !g.passed(off, dep) {
				return true
			}
			continue
		}
		if v, ok := g.view(off, l, now); ok && v.state != settledAhead {
			return true
		}
	}
	return false
}

// dropRefs takes the entries below an offset that still exist out of the sets of all groups.
func (e *Engine) dropRefs(t *topic, to uint64) {
	for _, inc := range sortedKeys(t.byInc) {
		g := t.byInc[inc]
		var offs []uint64
		for _, key := range g.order {
			if key > to>>chunkShift {
				break
			}
			for i := range g.chunks[key].slots {
				l := &g.chunks[key].slots[i]
				if off := key<<chunkShift | uint64(l.low); l.state != slotFree && off < to && !t.removed(off) {
					offs = append(offs, off)
				}
			}
		}
		for _, off := range offs {
			g.remove(off, g.find(off))
		}
		e.dirtRough.Add(int64(24 * len(offs)))
		if g.parked {
			e.look(g)
		}
	}
}

func (e *Engine) applyStreamTrim(c *StreamTrim, res *Result) error {
	t, code := e.stream(c.Key)
	if t == nil {
		if code == errs.WrongType {
			res.Code = code
		}
		return nil
	}
	n, err := e.trim(t, &c.Trim)
	res.Count = int64(n)
	return err
}

func (e *Engine) applyStreamDelete(c *StreamDelete, res *Result) error {
	t, code := e.stream(c.Key)
	if code == errs.WrongType {
		res.Code = code
		return nil
	}
	if c.Each {
		res.Stream = &StreamResult{Statuses: make([]int8, len(c.IDs))}
	}
	for i, id := range c.IDs {
		status := StatusNotFound
		if t != nil {
			var err error
			if status, err = e.deleteEntry(t, id, c.Refs); err != nil {
				return err
			}
		}
		if status == StatusDeleted {
			res.Count++
		}
		if c.Each {
			res.Stream.Statuses[i] = status
		}
	}
	return nil
}

// deleteEntry removes an entry as a policy says.
func (e *Engine) deleteEntry(t *topic, id StreamID, refs RefPolicy) (int8, error) {
	now := e.stamp.Cluster
	b, i, err := e.entryAt(t, id, now)
	if err != nil || b == nil {
		return StatusNotFound, err
	}
	off := b.base + uint64(i)
	if refs == Acked && t.needed(b, i, now) {
		return StatusKept, nil
	}
	if refs == DelRef {
		for _, inc := range sortedKeys(t.byInc) {
			g := t.byInc[inc]
			if l := g.find(off); l != nil {
				g.remove(off, l)
			}
		}
	}
	e.removeEntry(t, b, i)
	return StatusDeleted, nil
}

func (e *Engine) applyStreamSetID(c *StreamSetID, res *Result) error {
	t, code := e.stream(c.Key)
	if t == nil {
		res.Code = code
		return nil
	}
	now := e.stamp.Cluster
	length, err := e.length(t, now)
	if err != nil {
		return err
	}
	if c.ID.less(t.maxDeleted) {
		res.Code = errs.StreamIDDeleted
		return nil
	}
	if length > 0 {
		b, i, err := e.lastLive(t, nil, t.next, now)
		if err != nil {
			return err
		}
		if b != nil && c.ID.less(b.streamOf(i)) {
			res.Code = errs.StreamIDTooLow
			return nil
		}
		if c.EntriesAdded >= 0 && uint64(c.EntriesAdded) < length {
			res.Code = errs.StreamCountTooLow
			return nil
		}
	}
	if c.ID.less(t.last) {
		// What lies above was trimmed away or has expired.
		t.rewound = true
	}
	t.last = c.ID
	if c.EntriesAdded >= 0 {
		t.added = uint64(c.EntriesAdded)
	}
	if c.MaxDeleted != (StreamID{}) {
		t.maxDeleted = c.MaxDeleted
	}
	e.changedKey(t, nil)
	return nil
}

func (e *Engine) applyStreamGroup(c *StreamGroup, res *Result) error {
	t, code := e.stream(c.Key)
	if t == nil && (code == errs.WrongType || c.Op != GroupCreate || !c.Create) {
		res.Code = code
		return nil
	}
	var g *group
	if t != nil {
		g = t.groups[c.Group]
	}
	if g == nil && (c.Op == GroupSetID || c.Op == GroupAddConsumer || c.Op == GroupDelConsumer) {
		res.Code = errs.GroupNotFound
		return nil
	}
	if c.Consumer == HTTPConsumer {
		res.Code = errs.ReservedConsumer
		return nil
	}
	switch c.Op {
	case GroupCreate:
		if g != nil {
			res.Code = errs.GroupExists
			return nil
		}
		if len(c.Group) > limits.KeyBytesMax {
			res.Code = errs.InvalidName
			return nil
		}
		if t == nil {
			if t, res.Code = e.topicNamed([]byte(c.Key)); t == nil {
				return nil
			}
		}
		if len(t.groups) >= limits.GroupsPerTopicMax {
			res.Code = errs.TooManyGroups
			return nil
		}
		e.incarnations++
		g = newGroup(t, c.Group, e.incarnations)
		g.valkey, g.dirty = true, true
		e.addGroup(t, g)
		e.dirtRough.Add(int64(len(c.Group)) + 64)
		fallthrough
	case GroupSetID:
		id := c.ID
		if c.Last {
			id = t.last
		}
		g.entriesRead = max(c.EntriesRead, -1)
		e.changedKey(t, nil)
		if g.parked {
			e.look(g)
		}
		e.catchUp(t)
		return e.setPosition(g, id)
	case GroupDestroy:
		if g != nil {
			e.dropGroup(g)
			res.Count = 1
		}
	case GroupAddConsumer:
		if g.consumers[c.Consumer] == nil && len(g.consumers) >= limits.ConsumersPerGroupMax {
			res.Code = errs.Overloaded
			return nil
		}
		if g.consumers[c.Consumer] != nil {
			return nil
		}
		g.consumerNamed(c.Consumer, e.stamp.Wall)
		res.Count = 1
	case GroupDelConsumer:
		k := g.consumers[c.Consumer]
		if k == nil {
			return nil
		}
		e.fold(g)
		var offs []uint64
		g.eachFrom(StreamIDMin, k, e.stamp.Cluster, func(off uint64, _ *lease) bool {
			offs = append(offs, off)
			return true
		})
		for _, off := range offs {
			g.remove(off, g.find(off))
		}
		e.catchUp(g.topic)
		res.Count = int64(len(offs))
		delete(g.consumers, k.name)
		delete(g.byNum, k.num)
		if k.stored {
			g.goneConsumers = append(g.goneConsumers, k.num)
		}
		g.dirty = true
		e.dirtRough.Add(int64(24 * len(offs)))
	}
	return nil
}

func (e *Engine) fold(g *group) { g.fold(e.stamp.Cluster, math.MaxInt) }

// consumerFor returns the consumer of a read or claim, nil with a code if it cannot be had.
func (e *Engine) consumerFor(g *group, name string) (*consumer, errs.Code) {
	if name == HTTPConsumer {
		return nil, errs.ReservedConsumer
	}
	if len(name) > limits.KeyBytesMax {
		return nil, errs.InvalidName
	}
	if g.consumers[name] == nil && len(g.consumers) >= limits.ConsumersPerGroupMax {
		return nil, errs.Overloaded
	}
	c, _ := g.consumerNamed(name, e.stamp.Wall)
	return c, errs.OK
}

// active notes that a consumer was given something.
func (c *consumer) gotSome(g *group, wall int64) {
	if c.active != wall {
		c.active, c.dirty, g.dirty = wall, true, true
	}
}

// answerRoom is how many bytes of entries one command gives.
type answerRoom struct {
	left  int64
	given bool // something was
}

// take reports whether an entry of that size is still given: the first always is.
func (a *answerRoom) take(size uint64, first bool) bool {
	if !first && a.left < int64(size) {
		return false
	}
	a.left -= int64(size)
	a.given = true
	return true
}

func (e *Engine) streamEntry(b *block, i uint32) StreamEntry {
	s := StreamEntry{ID: b.streamOf(i), topic: b.topic, offset: b.base + uint64(i)}
	if b.refs != nil {
		r := b.ref(i)
		s.stagedIndex, s.stagedPos = r.index, r.pos+(i-r.from)
	}
	return s
}

func (e *Engine) applyStreamReadGroup(c *StreamReadGroup, res *Result) error {
	groups := make([]*group, len(c.Streams))
	for i := range c.Streams {
		t, code := e.stream(c.Streams[i].Key)
		if code == errs.WrongType {
			res.Code = code
			return nil
		}
		if t != nil {
			groups[i] = t.groups[c.Group]
		}
		if groups[i] == nil {
			res.Code, res.Count = errs.GroupNotFound, int64(i)
			return nil
		}
	}
	if c.Consumer == HTTPConsumer {
		res.Code = errs.ReservedConsumer
		return nil
	}
	room := answerRoom{left: answerBytes}
	if c.Size > 0 {
		room.left = min(room.left, int64(min(c.Size, answerBytes)))
	}
	total := c.Total
	if total == 0 {
		total = math.MaxUint64
	}
	out := &StreamResult{}
	full := false
	for i := range c.Streams {
		p, g := &c.Streams[i], groups[i]
		k, code := e.consumerFor(g, c.Consumer)
		if code != errs.OK {
			res.Code = code
			return nil
		}
		e.fold(g)
		read := StreamRead{Key: p.Key, From: p.ID}
		count := total
		if c.Count > 0 {
			count = min(count, c.Count)
		}
		var err error
		if read.fresh = p.New || p.ID == StreamIDMax; read.fresh {
			var limited bool
			limited, err = e.readNew(g, k, c, count, &read, &room)
			full = full || limited
			if len(read.Entries) > 0 {
				out.Reads = append(out.Reads, read)
			}
		} else {
			err = e.readHistory(g, k, count, &read, &room)
			out.Reads = append(out.Reads, read)
		}
		if err != nil {
			return err
		}
		total -= uint64(len(read.Entries))
		if g.parked {
			e.look(g)
		}
	}
	if len(out.Reads) > 0 {
		res.Stream = out
		return nil
	}
	if full {
		res.Code = errs.UnsettledLimit
	}
	if c.Park {
		res.Parked = true
		for _, g := range groups {
			e.park(g, "")
		}
	}
	return nil
}

// pendingDeadline is when an entry that a consumer is given now becomes due again: never, unless the group has a time
// for that.
func (g *group) pendingDeadline(now int64) int64 {
	if v := g.settings.Visibility.Milliseconds(); v > 0 {
		return now + v
	}
	return never
}

// readBehind reads what the group's cursor left behind of deployments that were excluded. done says that there is no
// going on, full that the group holds as much as it may.
func (e *Engine) readBehind(g *group, k *consumer, c *StreamReadGroup, count uint64, read *StreamRead, room *answerRoom) (done, full bool, err error) {
	for now := e.stamp.Cluster; g.behind > 0 && uint64(len(read.Entries)) < count; {
		b, i, err := e.behindFrom(g, 0, now)
		if err != nil {
			return false, false, err
		}
		if g.passBehind(b, i); b == nil {
			break
		}
		off, dep := b.base+uint64(i), b.dep(i)
		switch {
		case g.held(b, i) > now:
			return true, false, nil
		case !c.NoAck && !e.room(g):
			return false, true, nil
		case !room.take(b.sizeOf(i), len(read.Entries) == 0):
			read.Cut = true
			return true, false, nil
		}
		g.pass(dep, g.parts[dep], off+1)
		g.entriesRead = -1
		read.Entries = append(read.Entries, e.streamEntry(b, i))
		if c.NoAck {
			continue
		}
		g.take(off, g.put(off, dep, b.streamOf(i), b.expiry(i)), k, now, g.pendingDeadline(now), 1)
		g.delivered++
		k.gotSome(g, e.stamp.Wall)
		e.dirtRough.Add(48)
	}
	return false, false, nil
}

// readNew gives a consumer entries that the group was not given, then those that have become due again. It reports
// whether the group's set was too full for more.
func (e *Engine) readNew(g *group, k *consumer, c *StreamReadGroup, count uint64, read *StreamRead, room *answerRoom) (limited bool, err error) {
	t, now := g.topic, e.stamp.Cluster
	if c.NoAck {
		e.catchUp(t)
	}
	if c.Claim && count > 0 {
		if err := e.readIdle(g, k, c.ClaimIdle, count, read, room); err != nil {
			return false, err
		}
	}
	s, err := e.shape(t, now)
	if err != nil {
		return false, err
	}
	if g.paused() {
		count = 0
	}
	if done, full, err := e.readBehind(g, k, c, count, read, room); err != nil || done || full {
		return full, err
	}
	for looks := looksMax; uint64(len(read.Entries)) < count; {
		b, i, err := e.firstLive(t, g.cur, g.next, now, true)
		if err != nil {
			return false, err
		}
		g.cur = b
		if b == nil {
			if g.next != t.next {
				g.advance(t.next)
			}
			break
		}
		off, id := b.base+uint64(i), b.streamOf(i)
		if n := g.skips(b, i); n > 0 { // another deployment's
			g.advance(off + uint64(n))
			g.pos = b.streamOf(i + n - 1)
			g.entriesRead = -1
			if looks--; looks == 0 {
				break
			}
			continue
		}
		if !g.pos.less(id) {
			g.advance(off + 1) // below a position that lies ahead of the stream
			continue
		}
		var l *lease
		if g.ahead > 0 {
			l = g.find(off)
		}
		if l == nil && g.held(b, i) > now {
			break
		}
		passed := l != nil && (l.state == settledAhead || l.state == parked || l.heldByHTTP(now))
		if !passed {
			if l == nil && !c.NoAck && !e.room(g) {
				limited = true
				break
			}
			if !room.take(b.sizeOf(i), !room.given) {
				read.Cut = true
				return false, nil
			}
		}
		e.countRead(g, id, s)
		g.pos = id
		g.advance(off + 1)
		if passed {
			continue
		}
		read.Entries = append(read.Entries, e.streamEntry(b, i))
		if c.NoAck {
			continue
		}
		if l == nil {
			l = g.put(off, b.dep(i), id, b.expiry(i))
		}
		g.take(off, l, k, now, g.pendingDeadline(now), 1)
		g.delivered++
		k.gotSome(g, e.stamp.Wall)
		e.dirtRough.Add(48)
	}
	for uint64(len(read.Entries)) < count {
		off, l := g.retry()
		if l == nil {
			break
		}
		if t.removed(off) {
			g.remove(off, l)
			continue
		}
		b, i, err := e.blockAt(t, g.cur, off)
		if err != nil {
			return false, err
		}
		if !room.take(l.sizeIn(b, i), !room.given) {
			read.Cut = true
			break
		}
		g.ready.pop()
		read.Entries = append(read.Entries, e.streamEntry(b, i))
		if c.NoAck {
			g.remove(off, l)
			continue
		}
		g.take(off, l, k, now, g.pendingDeadline(now), min(l.count, math.MaxUint32-1)+1)
		g.delivered++
		g.redelivered++
		k.gotSome(g, e.stamp.Wall)
		e.dirtRough.Add(48)
	}
	return limited, nil
}

// readIdle gives a consumer pending entries that have been idle for long enough, the oldest first.
func (e *Engine) readIdle(g *group, k *consumer, idle int64, count uint64, read *StreamRead, room *answerRoom) error {
	t, now := g.topic, e.stamp.Cluster
	var offs []uint64
	g.eachFrom(StreamIDMin, nil, now, func(off uint64, l *lease) bool {
		if now-l.granted >= idle && !l.heldByHTTP(now) && !t.removed(off) {
			offs = append(offs, off)
		}
		return uint64(len(offs)) < count
	})
	for _, off := range offs {
		l := g.find(off)
		if g.exhausted(l) {
			g.exhaust(off, l, now)
			continue
		}
		b, i, err := e.blockAt(t, nil, off)
		if err != nil {
			return err
		}
		if !room.take(l.sizeIn(b, i), !room.given) {
			read.Cut = true
			break
		}
		s := e.streamEntry(b, i)
		s.Claimed, s.Idle, s.Count = true, now-l.granted, uint64(l.count)
		read.Entries = append(read.Entries, s)
		g.take(off, l, k, now, g.pendingDeadline(now), min(l.count, math.MaxUint32-1)+1)
		k.gotSome(g, e.stamp.Wall)
		e.dirtRough.Add(48)
	}
	return nil
}

// readHistory gives a consumer its own pending entries above an ID once more.
func (e *Engine) readHistory(g *group, k *consumer, count uint64, read *StreamRead, room *answerRoom) error {
	t, now := g.topic, e.stamp.Cluster
	from, ok := StreamID.Next(read.From)
	if !ok || k.pending == 0 || count == 0 {
		return nil
	}
	var hint *block
	var failed error
	left := k.pending
	g.eachFrom(from, k, now, func(off uint64, l *lease) bool {
		left--
		if t.removed(off) {
			read.Entries = append(read.Entries, StreamEntry{ID: l.stream, Deleted: true})
			return left > 0 && uint64(len(read.Entries)) < count
		}
		b, i, err := e.blockAt(t, hint, off)
		if err != nil {
			failed = err
			return false
		}
		hint = b
		if !room.take(l.sizeIn(b, i), !room.given) {
			read.Cut = true
			return false
		}
		read.Entries = append(read.Entries, e.streamEntry(b, i))
		g.take(off, l, k, now, g.pendingDeadline(now), min(l.count, math.MaxUint32-1)+1)
		e.dirtRough.Add(48)
		return left > 0 && uint64(len(read.Entries)) < count
	})
	return failed
}

// groupFolded returns a group for a claim or an acknowledgement, nil with a code.
func (e *Engine) groupFolded(key, name string) (*group, errs.Code) {
	t, code := e.stream(key)
	if t == nil {
		return nil, code
	}
	g := t.groups[name]
	if g == nil {
		return nil, errs.GroupNotFound
	}
	e.fold(g)
	return g, errs.OK
}

func (e *Engine) applyStreamAck(c *StreamAck, res *Result) error {
	g, code := e.groupFolded(c.Key, c.Group)
	if code == errs.WrongType {
		res.Code = code
		return nil
	}
	if c.Delete {
		res.Stream = &StreamResult{Statuses: make([]int8, len(c.IDs))}
	}
	for i, id := range c.IDs {
		status := StatusNotFound
		if g != nil {
			if off, l := g.findID(id, e.stamp.Cluster); l != nil {
				g.drop(off, l)
				e.noteDone(g, off)
				g.acked++
				g.dirty = true
				res.Count++
				status = StatusDeleted
				if c.Delete {
					deleted, err := e.deleteEntry(g.topic, id, c.Refs)
					if err != nil {
						return err
					}
					if deleted == StatusKept {
						status = StatusKept
					}
				}
			}
		}
		if c.Delete {
			res.Stream.Statuses[i] = status
		}
	}
	e.dirtRough.Add(24 * res.Count)
	if g != nil && g.parked {
		e.look(g)
	}
	return nil
}

// claim gives one pending entry, or with force any that exists, to a consumer, and reports whether it did. What was
// delivered as often as the group allows is parked instead, unless the claim is no delivery or says what the count is.
func (e *Engine) claim(g *group, k *consumer, off uint64, l *lease, minIdle, granted int64, retry int64, justID bool, room *answerRoom, out *[]StreamEntry) (ok bool, err error) {
	now := e.stamp.Cluster
	if l.heldByHTTP(now) || now-l.granted < minIdle {
		return false, nil
	}
	if !justID && retry < 0 && g.exhausted(l) {
		g.exhaust(off, l, now)
		g.dirty = true
		e.dirtRough.Add(48)
		return false, nil
	}
	s := StreamEntry{ID: l.stream}
	if !justID {
		b, i, err := e.blockAt(g.topic, nil, off)
		if err != nil {
			return false, err
		}
		room.take(l.sizeIn(b, i), true)
		s = e.streamEntry(b, i)
	}
	count := l.count
	switch {
	case retry >= 0:
		count = uint32(min(retry, math.MaxUint32))
	case !justID:
		count = min(count, math.MaxUint32-1) + 1
	}
	g.take(off, l, k, granted, g.pendingDeadline(now), count)
	k.gotSome(g, e.stamp.Wall)
	*out = append(*out, s)
	e.dirtRough.Add(48)
	return true, nil
}

func (e *Engine) applyStreamClaim(c *StreamClaim, res *Result) error {
	g, code := e.groupFolded(c.Key, c.Group)
	if g == nil {
		res.Code = code
		return nil
	}
	k, code := e.consumerFor(g, c.Consumer)
	if code != errs.OK {
		res.Code = code
		return nil
	}
	t, now := g.topic, e.stamp.Cluster
	granted := now
	if c.Idle >= 0 {
		granted = now - c.Idle
	}
	if c.Time >= 0 {
		granted = now - (e.stamp.Wall - c.Time)
	}
	if granted > now || granted < now-e.stamp.Wall {
		granted = now // ahead of now, or before time began
	}
	if g.pos.less(c.LastID) {
		if err := e.setPosition(g, c.LastID); err != nil {
			return err
		}
	}
	res.Stream = &StreamResult{}
	room := answerRoom{left: answerBytes}
	for _, id := range c.IDs {
		if room.left <= 0 {
			break
		}
		off, l := g.findID(id, now)
		b, i, err := e.entryAt(t, id, now)
		if err != nil {
			return err
		}
		switch {
		case b == nil && l != nil:
			g.drop(off, l)
			continue
		case b == nil || l == nil && (!c.Force || !e.room(g)):
			continue
		case l == nil:
			off = b.base + uint64(i)
			if l = g.find(off); l != nil {
				continue // settled ahead
			}
			l = g.put(off, b.dep(i), id, b.expiry(i))
			g.take(off, l, k, now-max(c.MinIdle, 0), never, 1)
		}
		if _, err := e.claim(g, k, off, l, c.MinIdle, granted, c.RetryCount, c.JustID, &room, &res.Stream.Entries); err != nil {
			return err
		}
	}
	if g.parked {
		e.look(g)
	}
	return nil
}

// autoClaimScan is how many pending entries XAUTOCLAIM looks at for each it may claim.
const autoClaimScan = 10

func (e *Engine) applyStreamAutoClaim(c *StreamAutoClaim, res *Result) error {
	g, code := e.groupFolded(c.Key, c.Group)
	if g == nil {
		res.Code = code
		return nil
	}
	k, code := e.consumerFor(g, c.Consumer)
	if code != errs.OK {
		res.Code = code
		return nil
	}
	t, now := g.topic, e.stamp.Cluster
	count := max(c.Count, 1)
	scan := uint64(math.MaxUint64)
	if count < math.MaxUint64/autoClaimScan {
		scan = count * autoClaimScan
	}
	out := &StreamResult{}
	res.Stream = out
	type item struct {
		off uint64
		id  StreamID
	}
	// First looked at, then claimed: claiming changes the set that is walked.
	var claims, gone []item
	g.eachFrom(c.Start, nil, now, func(off uint64, l *lease) bool {
		if scan == 0 || count == 0 {
			out.Next = l.stream
			return false
		}
		scan--
		switch {
		case t.removed(off):
			gone = append(gone, item{off, l.stream})
			count--
		case !l.heldByHTTP(now) && now-l.granted >= c.MinIdle:
			claims = append(claims, item{off, l.stream})
			count--
		}
		return true
	})
	for _, it := range gone {
		out.Deleted = append(out.Deleted, it.id)
		g.drop(it.off, g.find(it.off))
	}
	room := answerRoom{left: answerBytes}
	for n, it := range claims {
		if n > 0 && room.left <= 0 {
			out.Next = it.id
			break
		}
		if _, err := e.claim(g, k, it.off, g.find(it.off), c.MinIdle, now, -1, c.JustID, &room, &out.Entries); err != nil {
			return err
		}
	}
	if g.parked {
		e.look(g)
	}
	return nil
}

func (e *Engine) applyStreamNack(c *StreamNack, res *Result) error {
	g, code := e.groupFolded(c.Key, c.Group)
	if g == nil {
		res.Code = code
		return nil
	}
	t, now := g.topic, e.stamp.Cluster
	for _, id := range c.IDs {
		off, l := g.findID(id, now)
		if l == nil {
			if !c.Force {
				continue
			}
			b, i, err := e.entryAt(t, id, now)
			if err != nil {
				return err
			}
			if b == nil || !e.room(g) {
				continue
			}
			off = b.base + uint64(i)
			if g.find(off) != nil {
				continue
			}
			l = g.put(off, b.dep(i), id, b.expiry(i))
			g.take(off, l, nil, now, never, 0)
		} else if l.heldByHTTP(now) {
			continue
		}
		count := l.count
		switch {
		case c.RetryCount >= 0:
			count = uint32(min(c.RetryCount, math.MaxUint32))
		case c.Mode == NackSilent && count > 0:
			count--
		case c.Mode == NackFatal:
			count = math.MaxUint32
		}
		res.Count++
		if l.count, l.base = count, min(l.base, count); g.exhausted(l) {
			g.exhaust(off, l, now)
			continue
		}
		g.giveBack(off, l, now, count)
	}
	e.dirtRough.Add(48 * res.Count)
	if g.parked {
		e.look(g)
	}
	return nil
}

// giveBack makes a pending entry due at once, without an owner.
func (g *group) giveBack(off uint64, l *lease, now int64, count uint32) {
	if l.state == leased && l.flags&flagLapsed == 0 {
		g.inflight--
	}
	g.own(off, l, nil)
	g.epoch++
	l.epoch = g.epoch
	l.count = count
	l.state, l.flags, l.deadline = released, 0, now
	g.touch(off)
	g.pushPending(timer{now, off})
}

// applyExec applies a transaction.
func (e *Engine) applyExec(in *reader, end uint32, res *Result) error {
	x := *in
	watches := x.execWatches()
	n := x.count(2)
	items := make([]execItem, 0, n)
	for range n {
		items = append(items, x.execItem())
	}
	if x.err() != nil {
		res.Code = errs.BadRequest
		return nil
	}
	for i := range items {
		if _, err := items[i].decode(); err != nil {
			res.Code = errs.BadRequest
			return nil
		}
	}
	for _, w := range watches {
		if e.version(w.Key, e.stamp.Cluster) != w.Version {
			res.Code = errs.KeyChanged
			return nil
		}
	}
	out := &StreamResult{Exec: make([]ExecResult, len(items))}
	budget := answerBytes
	for i := range items {
		it, r := &items[i], &out.Exec[i]
		if it.read {
			r.read = true
			if e.fx != nil && e.fx.Answer {
				if err := e.execRead(it, r, &budget); err != nil {
					return err
				}
			}
			continue
		}
		if err := e.command(it.bytes, end-uint32(it.at), &r.Result); err != nil {
			return err
		}
		if r.Result.Stream != nil && e.fx != nil && e.fx.Answer {
			// What it gave may be removed further on in the same transaction.
			if err := e.loadEntriesLocked(r.Result.Stream.pending()); err != nil {
				return err
			}
		}
	}
	res.Stream = out
	return nil
}

// execRead answers a read inside a transaction, from the state as it is at its place.
func (e *Engine) execRead(it *execItem, r *ExecResult, budget *int) error {
	q, err := DecodeQuery(it.bytes)
	if err != nil || q.Kind < queryStreamFirst {
		r.Result.Code = errs.BadRequest
		return nil
	}
	q.Now = e.stamp.Cluster
	a, err := e.answerStream(&q)
	if err == nil {
		err = e.loadEntriesLocked(a.Stream.entries())
	}
	var refused *errs.Error
	if err != nil {
		refused = errs.From(err)
		if refused.Code == errs.Internal {
			return err
		}
		r.Result.Code = refused.Code
		return nil
	}
	if *budget -= len(AppendAnswer(nil, &a)); *budget < 0 {
		r.Result.Code = errs.MemoryLimit
		return nil
	}
	r.Answer = &a
	return nil
}

// deepReads reports whether a result holds reads, which a repeat cannot give again.
func (s *StreamResult) deepReads() bool {
	return s != nil && slices.ContainsFunc(s.Exec, func(x ExecResult) bool { return x.read })
}
