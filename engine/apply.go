package engine

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/cockroachdb/pebble/v2"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// Apply applies a committed entry and appends one Result per command, in the entry's order, to results. It is
// called from one goroutine, with rising indexes; an entry at or below the applied index is skipped. The
// entry is kept by reference. An error is fatal: the node must halt, since it cannot follow the log.
func (e *Engine) Apply(index, term uint64, entry []byte, results []Result, fx *Effects) ([]Result, error) {
	if fx != nil {
		fx.reset()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.Err(); err != nil {
		return results, err
	}
	if index <= e.index {
		return results, nil
	}
	results, err := e.apply(index, term, entry, results, fx)
	if err != nil {
		err = fmt.Errorf("engine: applying entry %d: %w", index, err)
		e.fail(err)
		return results, err
	}
	if invariants {
		e.checkInvariants()
	}
	return results, nil
}

func (fx *Effects) reset() {
	fx.Deliverable, fx.Due = fx.Deliverable[:0], fx.Due[:0]
	fx.InSync, fx.Configuration = false, false
}

func (e *Engine) apply(index, term uint64, entry []byte, results []Result, fx *Effects) ([]Result, error) {
	r := reader{b: entry}
	head, err := parseEntryHead(&r)
	if err != nil {
		return results, err
	}
	e.begin(index, term, entry, fx)
	defer e.end()
	e.stamp.Cluster = max(e.stamp.Cluster, head.stamp.Cluster)
	e.stamp.Wall = max(e.stamp.Wall, head.stamp.Wall)
	e.closeSilent()
	var it entryItem
	var in *intake
	for {
		ok, err := nextItem(&r, &it)
		if err != nil {
			return results, err
		}
		if !ok {
			break
		}
		if it.opened {
			if in = e.intakes[it.intake]; in != nil {
				in.heard = e.stamp.Cluster
				in.settle(it.lowest)
			}
		}
		results = append(results, Result{})
		res := &results[len(results)-1]
		if it.intake != 0 {
			// A command that was opened in this very entry may follow its OpenIntake.
			if in == nil || in.id != it.intake {
				in = e.intakes[it.intake]
			}
			if in == nil || it.number < in.lowest {
				res.Code = errs.IntakeClosed
				continue
			}
			if o := in.find(it.number); o != nil {
				*res = o.result()
				res.Repeat = true
				continue
			}
			if !in.room(it.number) {
				res.Code = errs.Overloaded
				continue
			}
		}
		at := uint32(len(entry) - len(r.b) - len(it.command))
		if err := e.command(it.command, at, res); err != nil {
			return results, err
		}
		if it.intake != 0 && !res.Parked {
			in.record(it.number, res)
		}
	}
	if err := e.store(entry); err != nil {
		return results, err
	}
	e.chain = chainHash(e.chain, index, entry)
	e.stamp.Cluster += e.advance
	e.stamp.Wall += e.advance
	e.tidy()
	if err := e.report(); err != nil {
		return results, err
	}
	e.logBytes.Add(int64(len(entry)))
	return results, nil
}

func chainHash(chain, index uint64, entry []byte) uint64 {
	var head [24]byte
	binary.LittleEndian.PutUint64(head[0:], chain)
	binary.LittleEndian.PutUint64(head[8:], index)
	binary.LittleEndian.PutUint64(head[16:], xxhash.Sum64(entry))
	return xxhash.Sum64(head[:])
}

func (e *Engine) begin(index, term uint64, entry []byte, fx *Effects) {
	e.index, e.term = index, term
	e.applying, e.entry, e.fx = true, entry, fx
	e.pos, e.advance = 0, 0
	e.open, e.touched = e.open[:0], e.touched[:0]
}

func (e *Engine) end() {
	e.applying, e.entry, e.fx = false, nil, nil
}

// ApplyEmpty advances over an entry that says nothing to the state machine.
func (e *Engine) ApplyEmpty(index, term uint64) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.Err(); err != nil {
		return err
	}
	if index > e.index {
		e.index, e.term = index, term
	}
	return nil
}

// ApplyConfiguration applies a change of membership in log order: nodes that are no voters any more leave the
// in-sync set. The first configuration puts all its voters into the set.
func (e *Engine) ApplyConfiguration(index, term uint64, encoded []byte, members []Member, fx *Effects) error {
	if fx != nil {
		fx.reset()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.Err(); err != nil {
		return err
	}
	if index <= e.index {
		return nil
	}
	e.index, e.term = index, term
	e.configuration, e.configurationIndex = slices.Clone(encoded), index
	e.members = slices.Clone(members)
	slices.SortFunc(e.members, func(a, b Member) int { return compare(a.ID, b.ID) })
	var voters []NodeID
	for _, m := range e.members {
		if m.Voter {
			voters = append(voters, m.ID)
		}
	}
	set := slices.DeleteFunc(slices.Clone(e.inSync.Nodes), func(n NodeID) bool { return !slices.Contains(voters, n) })
	if len(set) == 0 {
		// The first configuration, or what forced recovery left of a cluster: whoever may vote has to hold all.
		set = voters
	}
	changed := !slices.Equal(set, e.inSync.Nodes)
	if changed {
		e.inSync = InSync{Epoch: e.inSync.Epoch + 1, Nodes: set}
	}
	e.chain = chainHash(e.chain, index, encoded)
	if fx != nil {
		fx.Configuration, fx.InSync = true, changed
	}
	e.logBytes.Add(int64(len(encoded)))
	return nil
}

func compare[T ~string](a, b T) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// closeSilent closes the intakes that have not been heard of for too long.
func (e *Engine) closeSilent() {
	for id, in := range e.intakes { // I10: closing one has no effect on another, so the order does not show
		if e.stamp.Cluster-in.heard > int64(limits.IntakeSilenceMax/time.Millisecond) {
			e.closeIntake(id)
		}
	}
}

func (e *Engine) closeIntake(id IntakeID) {
	delete(e.intakes, id)
	e.removedIntakes = append(e.removedIntakes, id)
}

// command applies one command; at is where it begins in the entry. An error halts the node; whatever a client
// can cause ends as a code in res.
func (e *Engine) command(cmd []byte, at uint32, res *Result) error {
	kind, r, err := openCommand(cmd)
	if err == errMalformed {
		res.Code = errs.BadRequest
		return nil
	}
	if err != nil {
		return err
	}
	switch kind {
	case CmdInit:
		return e.applyInit(&r, res)
	case CmdOpenIntake:
		e.applyOpenIntake(&r, res)
	case CmdTick:
	case CmdPublish:
		e.applyPublish(&r, at+uint32(len(cmd)), res)
	case CmdReceive:
		return e.applyReceive(&r, res)
	case CmdReceiveID:
		return e.applyReceiveID(&r, res)
	case CmdSettle:
		return e.applySettle(&r, res)
	case CmdShrink:
		e.applyShrink(&r, res)
	case CmdExpand:
		e.applyExpand(&r, res)
	case CmdAdvance:
		ms := r.upTo(advanceLimit)
		if r.err() != nil {
			res.Code = errs.BadRequest
			return nil
		}
		// In force from the next entry on, so that all messages of an entry carry one stamp.
		e.advance += int64(ms)
	case CmdLevel:
		level := r.upTo(math.MaxUint32)
		if r.err() != nil {
			res.Code = errs.BadRequest
			return nil
		}
		if level > levelMax {
			return &UnknownError{What: "feature level", Value: level}
		}
		e.level = max(e.level, uint32(level))
	}
	return nil
}

func (e *Engine) applyInit(r *reader, res *Result) error {
	id, secret, level, refound := r.str(), r.bytes(), r.upTo(math.MaxUint32), r.bool()
	if r.err() != nil || id == "" {
		res.Code = errs.BadRequest
		return nil
	}
	if level > levelMax {
		return &UnknownError{What: "feature level", Value: level}
	}
	switch {
	case e.clusterID == "":
		e.clusterID, e.secret, e.level = id, slices.Clone(secret), uint32(level)
	case refound:
		e.clusterID = id
		if len(secret) > 0 {
			e.secret = slices.Clone(secret)
		}
	}
	return nil
}

func (e *Engine) applyOpenIntake(r *reader, res *Result) {
	node, nonce := NodeID(r.bytes()), r.uvarint()
	if r.err() != nil || node == "" {
		res.Code = errs.BadRequest
		return
	}
	for _, id := range sortedKeys(e.intakes) {
		in := e.intakes[id]
		if in.node != node {
			continue
		}
		if in.nonce == nonce {
			in.heard = e.stamp.Cluster
			res.Intake, res.Repeat = id, true
			continue
		}
		e.closeIntake(id)
	}
	if res.Intake != 0 {
		return
	}
	e.intakeCount++
	id := IntakeID(e.intakeCount)
	e.intakes[id] = &intake{id: id, node: node, nonce: nonce, heard: e.stamp.Cluster}
	res.Intake = id
}

func (e *Engine) applyShrink(r *reader, res *Result) {
	node, epoch := NodeID(r.bytes()), r.uvarint()
	i := slices.Index(e.inSync.Nodes, node)
	switch {
	case r.err() != nil:
		res.Code = errs.BadRequest
	case epoch != e.inSync.Epoch:
		res.Code = errs.Conflict
	case i < 0:
	case len(e.inSync.Nodes) == 1:
		res.Code = errs.Precondition
	default:
		e.setInSync(slices.Delete(slices.Clone(e.inSync.Nodes), i, i+1))
	}
}

func (e *Engine) applyExpand(r *reader, res *Result) {
	node, epoch := NodeID(r.bytes()), r.uvarint()
	switch {
	case r.err() != nil:
		res.Code = errs.BadRequest
	case epoch != e.inSync.Epoch:
		res.Code = errs.Conflict
	case slices.Contains(e.inSync.Nodes, node):
	case !slices.Contains(e.members, Member{ID: node, Voter: true}):
		res.Code = errs.Precondition
	default:
		set := append(slices.Clone(e.inSync.Nodes), node)
		slices.Sort(set)
		e.setInSync(set)
	}
}

func (e *Engine) setInSync(nodes []NodeID) {
	e.inSync = InSync{Epoch: e.inSync.Epoch + 1, Nodes: nodes}
	if e.fx != nil {
		e.fx.InSync = true
	}
}

// topicNamed returns the topic, creating it if need be, or says why not.
func (e *Engine) topicNamed(name []byte) (*topic, errs.Code) {
	if t := e.topics[string(name)]; t != nil {
		return t, errs.OK
	}
	if len(name) == 0 || len(name) > limits.KeyBytesMax {
		return nil, errs.InvalidName
	}
	if len(e.topics) >= limits.TopicsMax {
		return nil, errs.TooManyTopics
	}
	e.incarnations++
	t := newTopic(string(name), e.incarnations)
	t.dirty = true
	e.topics[t.name], e.byInc[t.inc] = t, t
	e.dirtRough.Add(int64(len(name)) + 64)
	return t, errs.OK
}

// groupNamed returns the group, creating it if need be, or says why not.
func (e *Engine) groupNamed(t *topic, name []byte, latest bool) (*group, errs.Code) {
	if g := t.groups[string(name)]; g != nil {
		return g, errs.OK
	}
	if len(name) == 0 || len(name) > limits.KeyBytesMax {
		return nil, errs.InvalidName
	}
	if len(t.groups) >= limits.GroupsPerTopicMax {
		return nil, errs.TooManyGroups
	}
	e.incarnations++
	g := newGroup(t, string(name), e.incarnations)
	if latest {
		g.pos, g.next = t.last, t.next
	}
	g.dirty = true
	e.addGroup(t, g)
	e.dirtRough.Add(int64(len(name)) + 64)
	return g, errs.OK
}

// applyPublish appends messages to a topic. end is where the command ends in the entry.
func (e *Engine) applyPublish(r *reader, end uint32, res *Result) {
	name := r.bytes()
	n := r.count(recordBytesMin)
	e.heads = e.heads[:0]
	var rec record
	total := 0
	for range n {
		size := len(r.b)
		start := end - uint32(size)
		parseRecord(r, &rec)
		if r.bad {
			break
		}
		size -= len(r.b)
		total += size
		if rec.flags&(recordDelay|recordKey|recordDeployment) != 0 {
			res.Code = errs.Unsupported
		} else if len(rec.body) > limits.MessageBytesMax && res.Code == errs.OK {
			res.Code = errs.MessageTooLarge
		}
		e.heads = append(e.heads, recordHeadNote{start: start, size: uint32(size), retention: uint32(min(rec.retention, math.MaxUint32))})
	}
	if r.err() != nil || n == 0 {
		res.Code = errs.BadRequest
	}
	if res.Code != errs.OK {
		return
	}
	t, code := e.topicNamed(name)
	if code != errs.OK {
		res.Code = code
		return
	}
	b := t.open
	if b == nil {
		id, ok := t.nextStreamID(uint64(e.stamp.Wall), uint64(n))
		if !ok {
			res.Code = errs.BadRequest
			return
		}
		b = &block{topic: t.inc, base: t.next, index: e.index, cluster: e.stamp.Cluster, wall: e.stamp.Wall, stream: id, data: e.entry,
			starts: make([]uint32, 0, n)}
		t.open, t.segs = b, t.segs[:0]
		e.open = append(e.open, t)
	} else if b.stream.Seq > math.MaxUint64-uint64(b.count)-uint64(n) {
		res.Code = errs.BadRequest
		return
	}
	first := b.count
	for i := range e.heads {
		h := &e.heads[i]
		b.add(e.pos, h.retention, int(h.size))
		b.starts = append(b.starts, h.start)
		e.pos++
	}
	from := e.heads[0].start
	if k := len(t.segs); k > 0 && t.segs[k-1].to == from {
		t.segs[k-1].to = end
	} else {
		t.segs = append(t.segs, segment{from, end})
	}
	res.Published = Published{Shard: e.o.Shard, Index: e.index, Pos: e.pos - uint32(n), Count: uint32(n), Offset: b.base + uint64(first), Stream: b.streamOf(first)}
	t.next += uint64(n)
	t.last = b.streamOf(b.count - 1)
	t.published += uint64(n)
	t.bytes += uint64(total)
	t.dirty = true
	for _, g := range t.parked {
		e.look(g)
	}
}

// nextStreamID is the ID of the first of n messages that take consecutive ones.
func (t *topic) nextStreamID(wall, n uint64) (StreamID, bool) {
	id := StreamID{Ms: wall}
	switch {
	case wall > t.last.Ms:
	case t.last.Seq <= math.MaxUint64-n:
		id = StreamID{Ms: t.last.Ms, Seq: t.last.Seq + 1}
	case t.last.Ms < math.MaxUint64:
		id = StreamID{Ms: t.last.Ms + 1}
	default:
		return id, false
	}
	if id == (StreamID{}) {
		id.Seq = 1 // 0-0 is no ID
	}
	return id, true
}

// store writes the blocks of the entry and keeps them in memory.
func (e *Engine) store(entry []byte) error {
	if e.breakMutable {
		if err := e.storeMutableNow(); err != nil {
			return err
		}
	}
	if e.breakRemoval {
		if err := e.removeNow(); err != nil {
			return err
		}
	}
	if len(e.open) == 0 {
		return nil
	}
	size := 0
	for _, t := range e.open {
		size += int(t.open.bytes) + 512 + len(t.open.retention)*4
	}
	batch := e.db.NewBatchWithSize(size)
	defer func() { _ = batch.Close() }()
	blocks := make([]*block, 0, len(e.open))
	for _, t := range e.open {
		b := t.open
		e.putBlock(batch, t, entry)
		blocks = append(blocks, b)
	}
	if err := batch.Commit(pebble.NoSync); err != nil {
		return fmt.Errorf("writing blocks: %w", err)
	}
	for _, t := range e.open {
		t.open = nil
	}
	e.keep(entry, blocks)
	return nil
}

// putBlock writes the rows of a topic's block: all are written once, and each tells the entry it is of.
func (e *Engine) putBlock(batch *pebble.Batch, t *topic, entry []byte) {
	b := t.open
	var head [12]byte
	h := payloadHead(head[:0], b.count)
	op := batch.SetDeferred(3+16, len(h)+int(b.bytes))
	e.keys.append(op.Key[:0], rowPayload, t.inc, b.base)
	n := copy(op.Value, h)
	for _, s := range t.segs {
		n += copy(op.Value[n:], entry[s.from:s.to])
	}
	if n != len(op.Value) {
		panic(fmt.Sprintf("engine: block of %d bytes has %d", len(op.Value), n)) // I4: sizes were counted from the same bytes
	}
	_ = op.Finish() // only fails on batches that index their content

	e.rowBuf = b.appendRow(e.rowBuf[:0])
	e.put(batch, e.rowBuf, rowBlock, t.inc, b.base)
	base := binary.AppendUvarint(e.rowBuf[:0], b.base)
	e.put(batch, base, rowByIndex, t.inc, b.index)
	e.put(batch, binary.AppendUvarint(base, b.index), rowByStream, t.inc, b.stream.Ms, b.stream.Seq)
	if b.lastExpiry != never {
		e.put(batch, binary.AppendUvarint(e.rowBuf[:0], b.index), rowExpiry, minuteAfter(b.lastExpiry), t.inc, b.base)
	}
}

func (e *Engine) put(batch *pebble.Batch, value []byte, kind byte, parts ...uint64) {
	op := batch.SetDeferred(3+8*len(parts), len(value))
	e.keys.append(op.Key[:0], kind, parts...)
	copy(op.Value, value)
	_ = op.Finish()
}

const minute = 60_000

// minuteAfter is the first whole minute at or after a time.
func minuteAfter(at int64) uint64 { return uint64((at + minute - 1) / minute) }

func (e *Engine) applyReceive(r *reader, res *Result) error {
	var v receiveView
	v.parse(r)
	switch {
	case r.err() != nil || v.max < 1 || v.visibility <= 0:
		res.Code = errs.BadRequest
		return nil
	case len(v.deployment) > 0:
		res.Code = errs.Unsupported
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
	room := v.max
	if v.maxConcurrency > 0 {
		room = min(room, v.maxConcurrency-g.inflight)
	}
	ds := e.scratch[:0]
	for len(ds) < room && g.live < e.unsettledMax {
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
		known := g.ahead > 0 && g.find(off) != nil
		g.advance(off + 1)
		g.pos = b.streamOf(i)
		if known {
			continue // given out through its ID before
		}
		l := g.grantNew(off, g.pos, b.expiry(i), now, v.visibility)
		ds = append(ds, e.delivery(b, i, g, l))
	}
	for len(ds) < room {
		off, l := g.retry()
		if l == nil {
			break
		}
		b, i, err := e.blockAt(t, g.cur, off)
		if err != nil {
			return err
		}
		g.ready.pop()
		g.grant(off, l, now, v.visibility)
		ds = append(ds, e.delivery(b, i, g, l))
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
	case v.maxConcurrency > 0 && g.inflight >= v.maxConcurrency:
		res.Code, res.Inflight = errs.ConcurrencyLimit, g.inflight
	case g.live >= e.unsettledMax:
		res.Code, res.Inflight = errs.UnsettledLimit, g.inflight
	}
	if res.Code != errs.OK {
		if at := g.nextEvent(); at != never {
			res.RetryAfter = time.Duration(max(at-now, 0)) * time.Millisecond
		}
	}
	if v.park {
		res.Parked = true
		e.park(g)
	}
	return nil
}

func (e *Engine) delivery(b *block, i uint32, g *group, l *lease) Delivery {
	off := b.base + uint64(i)
	return Delivery{
		ID:      MessageID{Shard: e.o.Shard, Index: b.index, Pos: b.posOf(i), Kind: KindPlain},
		Receipt: Receipt{Shard: e.o.Shard, Topic: g.topic.inc, Group: g.inc, Offset: off, Epoch: l.epoch},
		Stream:  b.streamOf(i), Count: l.count,
		PublishedAt: b.wall, ExpiresAt: b.wallExpiry(i), LeaseUntil: e.stamp.Wall + l.deadline - l.granted,
	}
}

func (e *Engine) applyReceiveID(r *reader, res *Result) error {
	var v receiveIDView
	v.parse(r)
	switch {
	case r.err() != nil || v.visibility <= 0:
		res.Code = errs.BadRequest
		return nil
	case len(v.deployment) > 0:
		res.Code = errs.Unsupported
		return nil
	}
	now := e.stamp.Cluster
	res.Code = errs.MessageNotFound
	t := e.topics[string(v.topic)]
	if t == nil {
		return nil
	}
	b, i, err := e.byID(t, v.id)
	if err != nil {
		return err
	}
	if b == nil || b.expiry(i) <= now {
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
	switch {
	case l == nil && off < g.next, l != nil && l.state == settledAhead:
		res.Code = errs.AlreadyAcknowledged
		return nil
	case l != nil && l.state == leased && l.deadline > now:
		wait(errs.LeasedElsewhere, l.deadline)
		return nil
	case l != nil && l.due() > now:
		wait(errs.NotYetVisible, l.due())
		return nil
	case v.maxConcurrency > 0 && g.inflight >= v.maxConcurrency:
		res.Code, res.Inflight = errs.ConcurrencyLimit, g.inflight
		return nil
	case l == nil && g.live >= e.unsettledMax:
		res.Code, res.Inflight = errs.UnsettledLimit, g.inflight
		return nil
	case l == nil:
		l = g.grantNew(off, b.streamOf(i), b.expiry(i), now, v.visibility)
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
	case r.bad || v.count == 0 || v.op != Acknowledge && v.op != Extend:
		res.Code = errs.BadRequest
		return nil
	case len(v.deployment) > 0:
		res.Code = errs.Unsupported
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
	case l == nil || l.state == settledAhead:
		return errs.MessageNotFound, nil
	case l.epoch != rc.Epoch:
		return errs.NotHolder, nil
	case l.state == released:
		return errs.NotInFlight, nil
	case l.deadline <= now:
		return errs.LeaseExpired, nil
	case v.op == Acknowledge:
		g.acknowledge(rc.Offset, l)
	case v.visibility == 0:
		g.release(rc.Offset, l, now)
	case l.expiry != never && now+v.visibility > l.expiry:
		b, i, err := e.blockAt(g.topic, g.cur, rc.Offset)
		if err != nil {
			return errs.OK, err
		}
		res.ExpiresAt = b.wallExpiry(i)
		return errs.ExtendPastExpiry, nil
	default:
		g.extend(rc.Offset, l, now+v.visibility)
	}
	return errs.OK, nil
}

// park notes that receives wait for the group on this node.
func (e *Engine) park(g *group) {
	if !g.parked {
		g.parked = true
		g.topic.parked = append(g.topic.parked, g)
	}
	if e.applying {
		e.look(g)
	} else {
		g.fold(e.stamp.Cluster, math.MaxInt)
		e.arm(g, g.nextEvent())
	}
}

// look puts a group with parked receives on the list of those to be looked at when the entry is done.
func (e *Engine) look(g *group) {
	if e.fx != nil && g.touched != e.index {
		g.touched = e.index
		e.touched = append(e.touched, g)
	}
}

// arm sees to it that the group is looked at when cluster time reaches at; it reports whether that is
// earlier than before.
func (e *Engine) arm(g *group, at int64) bool {
	if at >= g.armed {
		return false
	}
	g.armed = at
	e.due.push(timer{at, g.number})
	return true
}

// report lists the groups that have become deliverable for receives parked on this node.
func (e *Engine) report() error {
	if e.fx == nil {
		return nil
	}
	now := e.stamp.Cluster
	for len(e.due) > 0 && e.due[0].at <= now {
		g := e.groups[e.due[0].off]
		if g.armed == e.due[0].at {
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
		ref := GroupRef{Topic: g.topic.name, Group: g.name}
		ok, err := e.deliverable(g, now, true)
		if err != nil {
			return err
		}
		if ok {
			e.fx.Deliverable = append(e.fx.Deliverable, ref)
		}
		if e.arm(g, g.nextEvent()) {
			e.fx.Due = append(e.fx.Due, ref)
		}
	}
	return nil
}

// deliverable reports whether a receive without a bound on concurrency would be given something at now.
func (e *Engine) deliverable(g *group, now int64, apply bool) (bool, error) {
	if g.live < e.unsettledMax {
		off := g.next
		for {
			b, i, err := e.firstLive(g.topic, g.cur, off, now, apply)
			if err != nil {
				return false, err
			}
			if b == nil {
				break
			}
			off = b.base + uint64(i)
			if g.ahead == 0 || g.find(off) == nil {
				return true, nil
			}
			off++
		}
	}
	_, l := g.retry()
	return l != nil || g.nextEvent() <= now, nil
}

// tidy folds one group an entry, in turn, so that groups nobody asks for do not hold on to what has expired.
func (e *Engine) tidy() {
	if len(e.groups) == 0 {
		return
	}
	if e.tidyAt >= len(e.groups) {
		e.tidyAt = 0
	}
	e.groups[e.tidyAt].fold(e.stamp.Cluster, limits.FoldPerCommandMax)
	e.tidyAt++
}

// Park decides, under the lock that Apply takes, whether a receive would find nothing at now. If the group
// exists and nothing is deliverable, it calls register, if that is not nil, and reports true: whatever makes
// the group deliverable from then on is reported by the Effects of the Apply that does it. With a nil
// register it only answers.
func (e *Engine) Park(r *Receive, now Stamp, register func()) (parked bool, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.Err(); err != nil {
		return false, err
	}
	t := e.topics[r.Topic]
	if t == nil || t.groups[r.Group] == nil {
		return false, nil
	}
	g := t.groups[r.Group]
	at := max(now.Cluster, e.stamp.Cluster)
	if r.MaxConcurrency <= 0 || g.inflightAtMost(at) < r.MaxConcurrency {
		ok, err := e.deliverable(g, at, false)
		if err != nil || ok {
			return false, err
		}
	}
	if register != nil {
		register()
		e.park(g)
	}
	return true, nil
}

// inflightAtMost bounds the leases that run at now from above without visiting them all: those that have
// just run out show as an earliest time that has passed, which deliverable then finds.
func (g *group) inflightAtMost(now int64) int {
	if g.nextEvent() <= now {
		return g.inflightAt(now)
	}
	return g.inflight
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
	at := g.nextEvent()
	return at, at != never
}

// storeMutableNow breaks rule 16(b) for a test: groups are written when they change.
func (e *Engine) storeMutableNow() error {
	if e.durable.Load() == nil {
		return nil
	}
	batch := e.db.NewBatch()
	defer func() { _ = batch.Close() }()
	for _, g := range e.groups {
		e.put(batch, g.appendRow(nil), rowGroup, g.topic.inc, g.inc)
	}
	return batch.Commit(pebble.NoSync)
}

// removeNow breaks rule 16(c) for a test: blocks are removed when they have expired.
func (e *Engine) removeNow() error {
	var dead []*block
	for _, name := range sortedKeys(e.topics) {
		t := e.topics[name]
		for off := t.gone; off < t.next; {
			b, err := e.blockFor(t, off)
			if err != nil {
				return err
			}
			if b == nil {
				break
			}
			if b != t.open && b.lastExpiry <= e.stamp.Cluster {
				dead = append(dead, b)
			}
			off = b.end()
		}
	}
	for _, b := range dead {
		for _, kind := range []byte{rowBlock, rowPayload} {
			if err := e.db.Delete(e.keys.key(kind, b.topic, b.base), pebble.NoSync); err != nil {
				return err
			}
		}
	}
	return nil
}
