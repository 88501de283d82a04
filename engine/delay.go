package engine

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// Delayed messages. What an entry brings with a delay is staged: the records under topic and raft index (Q), a
// summary of them (Z), and one row per due time (D); all are written once. A cursor over D, part of the state, says
// what has matured. An entry matures what is due as of its stamp before its commands are applied, a bounded number
// of messages in order of (due, topic, raft index): they get a block of references in the topic's log, and rows
// that lead from IDs to offsets (R). Payloads are neither read nor copied for it. Cancelled and moved messages are
// memory over the last checkpoint.

// dueKey is a place in the order in which messages mature.
type dueKey struct {
	due          int64
	topic, index uint64
}

func (k dueKey) before(o dueKey) bool {
	switch {
	case k.due != o.due:
		return k.due < o.due
	case k.topic != o.topic:
		return k.topic < o.topic
	}
	return k.index < o.index
}

// refRun is a run of staged messages of one entry with consecutive positions and equal properties. In a block of
// references, from is the first message's place in the block.
type refRun struct {
	index         uint64
	pos, count    uint32
	cluster, wall int64 // of the entry that staged them
	due           int64
	retention     uint32
	bytes         uint32 // of all records together
	dep           uint64
	from          uint32
}

func (r *refRun) expiry() int64 {
	if r.retention == 0 {
		return never
	}
	return r.cluster + int64(r.retention)*1000
}

// follows reports whether a message directly continues the run.
func (r *refRun) follows(o *refRun) bool {
	return r.index == o.index && r.pos+r.count == o.pos && r.retention == o.retention && r.due == o.due && r.dep == o.dep
}

// stagedMessage is a delayed message of the entry being applied.
type stagedMessage struct {
	pos         uint32
	start, size uint32
	due         int64
	retention   uint32
	dep         uint64
}

// delayKey names a delayed message.
type delayKey struct {
	topic, index uint64
	pos          uint32
}

// delayChange says that a delayed message was cancelled or moved. It stays until the cursor has passed the
// message's first place and, of a moved one, until it has matured.
type delayChange struct {
	run       refRun // of the one message; due is where it was staged
	due       int64  // where it was moved to; never if it was cancelled or has matured
	cancelled bool
	dirty     bool
}

// movedItem is an entry of the heap of moved messages.
type movedItem struct {
	due int64
	key delayKey
}

func (a movedItem) before(b movedItem) bool {
	x, y := dueKey{a.due, a.key.topic, a.key.index}, dueKey{b.due, b.key.topic, b.key.index}
	return x.before(y) || x == y && a.key.pos < b.key.pos
}

func (e *Engine) pushMoved(m movedItem) {
	s := append(e.moved, m)
	for i := len(s) - 1; i > 0; {
		p := (i - 1) / 2
		if !s[i].before(s[p]) {
			break
		}
		s[i], s[p] = s[p], s[i]
		i = p
	}
	e.moved = s
	e.delayNext = min(e.delayNext, m.due)
}

func (e *Engine) popMoved() {
	s := e.moved
	n := len(s) - 1
	s[0] = s[n]
	s = s[:n]
	for i := 0; ; {
		c := 2*i + 1
		if c >= n {
			break
		}
		if c+1 < n && s[c+1].before(s[c]) {
			c++
		}
		if !s[c].before(s[i]) {
			break
		}
		s[i], s[c] = s[c], s[i]
		i = c
	}
	e.moved = s
}

// firstMoved returns the moved message that matures first; items that are obsolete are dropped.
func (e *Engine) firstMoved() (movedItem, *delayChange) {
	for len(e.moved) > 0 {
		m := e.moved[0]
		if c := e.changes[m.key]; c != nil && c.due == m.due {
			return m, c
		}
		e.popMoved()
	}
	return movedItem{}, nil
}

// appendRuns appends the rows' common form of staged messages.
func appendRuns(b []byte, cluster, wall int64, runs []refRun) []byte {
	b = append(b, rowVersion, 0)
	b = binary.AppendUvarint(b, uint64(cluster))
	b = binary.AppendUvarint(b, uint64(wall))
	b = binary.AppendUvarint(b, uint64(len(runs)))
	for i := range runs {
		r := &runs[i]
		b = binary.AppendUvarint(b, uint64(r.pos))
		b = binary.AppendUvarint(b, uint64(r.count))
		b = binary.AppendUvarint(b, uint64(r.due))
		b = binary.AppendUvarint(b, uint64(r.retention))
		b = binary.AppendUvarint(b, uint64(r.bytes))
		b = binary.AppendUvarint(b, r.dep)
	}
	return b
}

func parseRuns(kind byte, index uint64, row []byte) ([]refRun, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return nil, rowError(kind, v)
	}
	r.upTo(0)
	cluster, wall := int64(r.upTo(1<<60)), int64(r.upTo(1<<60))
	var runs []refRun
	for range r.count(6) {
		run := refRun{index: index, cluster: cluster, wall: wall, pos: uint32(r.upTo(math.MaxUint32)), count: uint32(r.upTo(math.MaxUint32)),
			due: int64(r.upTo(1 << 61)), retention: uint32(r.upTo(math.MaxUint32)), bytes: uint32(r.upTo(math.MaxUint32)), dep: r.uvarint()}
		if run.count == 0 || uint64(run.pos)+uint64(run.count) > math.MaxUint32 {
			return nil, errMalformed
		}
		runs = append(runs, run)
	}
	return runs, r.err()
}

// stage takes a delayed message of the entry being applied.
func (e *Engine) stage(t *topic, m stagedMessage) {
	if len(t.staged) == 0 {
		e.staging = append(e.staging, t)
	}
	t.staged = append(t.staged, m)
	t.delayed++
	t.dirty = true
	e.delayNext = min(e.delayNext, m.due)
}

// stagedRuns are the runs of what the entry staged for the topic.
func (e *Engine) stagedRuns(t *topic) []refRun {
	var runs []refRun
	for i := range t.staged {
		m := &t.staged[i]
		one := refRun{index: e.index, pos: m.pos, count: 1, cluster: e.stamp.Cluster, wall: e.stamp.Wall, due: m.due, retention: m.retention, bytes: m.size, dep: m.dep}
		if k := len(runs) - 1; k >= 0 && runs[k].follows(&one) {
			runs[k].count++
			runs[k].bytes += one.bytes
		} else {
			runs = append(runs, one)
		}
	}
	return runs
}

// putStaged writes the rows of what the entry staged for the topic.
func (e *Engine) putStaged(batch *pebble.Batch, t *topic, entry []byte) {
	runs := e.stagedRuns(t)
	size := 0
	for i := range t.staged {
		size += int(t.staged[i].size) + uvarintLen(uint64(t.staged[i].pos))
	}
	head := payloadHead(nil, uint32(len(t.staged)))
	op := batch.SetDeferred(3+16, len(head)+size)
	e.keys.append(op.Key[:0], rowStaged, t.inc, e.index)
	v := append(op.Value[:0], head...)
	last := int64(0)
	for i := range t.staged {
		m := &t.staged[i]
		v = binary.AppendUvarint(v, uint64(m.pos))
		v = append(v, entry[m.start:m.start+m.size]...)
	}
	if len(v) != len(op.Value) {
		panic(fmt.Sprintf("engine: staged messages of %d bytes have %d", len(op.Value), len(v))) // I4
	}
	_ = op.Finish()
	e.put(batch, appendRuns(e.rowBuf[:0], e.stamp.Cluster, e.stamp.Wall, runs), rowStagedIndex, t.inc, e.index)
	// One row per due time, in the order of positions within it.
	written := make(map[int64]bool)
	var same []refRun
	for i := range runs {
		last = max(last, runs[i].expiry())
		due := runs[i].due
		if written[due] {
			continue
		}
		written[due] = true
		same = same[:0]
		for _, r := range runs[i:] {
			if r.due == due {
				same = append(same, r)
			}
		}
		e.put(batch, appendRuns(e.rowBuf[:0], e.stamp.Cluster, e.stamp.Wall, same), rowDue, uint64(due), t.inc, e.index)
	}
	if last != never {
		e.put(batch, nil, rowStagedExpiry, expiryTick(last), t.inc, e.index)
	}
}

// NextTick returns the cluster time at which something is due that waits for an entry, though no command asks
// for it: a delayed message, the end of an upload that was broken off, what is left to be dropped. The leader proposes a
// Tick then.
func (e *Engine) NextTick() (cluster int64, ok bool) {
	e.mu.RLock()
	defer e.mu.RUnlock()
	at := e.delayNext
	if len(e.catching) > 0 {
		at = e.stamp.Cluster
	}
	for _, u := range e.uploads {
		at = min(at, u.deadline)
	}
	return at, at != never
}

// mature makes visible what is due as of the entry's stamp, at most limits.MaturePerEntryMax messages and whatever
// shares the last one's row.
func (e *Engine) mature() (err error) {
	now := e.stamp.Cluster
	if e.delayNext > now {
		return nil
	}
	defer e.damaged(&err)
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: append(e.keys.key(rowDue, uint64(e.matured.due), e.matured.topic, e.matured.index), 0),
		UpperBound: keyspaceEnd(e.keys, rowDue)})
	if err != nil {
		return fmt.Errorf("reading due messages: %w", err)
	}
	defer func() { _ = it.Close() }()
	valid := it.First()
	var order []*topic
	left := limits.MaturePerEntryMax
	for {
		at := dueKey{due: never}
		if valid {
			at = dueOf(it.Key())
		}
		m, c := e.firstMoved()
		isMoved := c != nil && !at.before(dueKey{m.due, m.key.topic, m.key.index})
		if isMoved {
			at.due = m.due
		}
		e.delayNext = at.due
		if at.due > now || left <= 0 {
			break
		}
		if isMoved {
			left--
			e.popMoved()
			if t := e.byInc[m.key.topic]; t != nil && !t.purgedDelayed(c.run.index, c.run.pos) {
				order = e.matureRun(order, t, c.run, now)
			}
			c.due, c.dirty = never, true
			e.settleChange(m.key, c)
			continue
		}
		v, err := it.ValueAndErr()
		if err != nil {
			return fmt.Errorf("reading due messages: %w", err)
		}
		runs, err := parseRuns(rowDue, at.index, v)
		if err != nil {
			return err
		}
		if at.index >= e.index && !e.seeLaterRows {
			return fmt.Errorf("due messages of entry %d in view of entry %d", at.index, e.index)
		}
		t := e.byInc[at.topic]
		e.matured = at
		for _, run := range runs {
			left -= int(run.count)
			if len(e.changes) == 0 && t == nil {
				continue
			}
			if len(e.changes) == 0 && !t.purgedDelayed(run.index, run.pos+run.count-1) {
				order = e.matureRun(order, t, run, now)
				continue
			}
			for k := range run.count {
				one := run
				one.pos, one.count, one.bytes = run.pos+k, 1, run.bytes/run.count
				key := delayKey{at.topic, run.index, one.pos}
				if c := e.changes[key]; c != nil {
					e.settleChange(key, c)
				} else if t != nil && !t.purgedDelayed(one.index, one.pos) {
					order = e.matureRun(order, t, one, now)
				}
			}
		}
		valid = it.Next()
	}
	if err := it.Error(); err != nil {
		return fmt.Errorf("reading due messages: %w", err)
	}
	return e.placeMatured(order)
}

func dueOf(key []byte) dueKey {
	due, _ := keyPart(key, 0)
	topic, _ := keyPart(key, 1)
	index, _ := keyPart(key, 2)
	return dueKey{int64(due), topic, index}
}

// purgedDelayed reports whether a purge came behind the staging of a message.
func (t *topic) purgedDelayed(index uint64, pos uint32) bool {
	return index < t.firstIndex || index == t.firstIndex && pos < t.firstPos
}

// settleChange drops a change that nothing will ask for any more.
func (e *Engine) settleChange(k delayKey, c *delayChange) {
	if passed := !e.matured.before(dueKey{c.run.due, k.topic, k.index}); passed && c.due == never {
		delete(e.changes, k)
		e.removedChanges = append(e.removedChanges, k)
	}
}

// matureRun adds messages to the block of references that the topic gets.
func (e *Engine) matureRun(order []*topic, t *topic, run refRun, now int64) []*topic {
	t.delayed -= min(t.delayed, uint64(run.count))
	t.dirty = true
	if run.expiry() <= now {
		return order
	}
	if t.maturing == nil {
		t.maturing = &block{topic: t.inc, index: e.index, cluster: e.stamp.Cluster, wall: e.stamp.Wall}
		order = append(order, t)
	}
	t.maturing.addRefs(run)
	return order
}

// addRefs appends staged messages to a block of references under construction.
func (b *block) addRefs(run refRun) {
	run.from = b.count
	if k := len(b.refs) - 1; k >= 0 && b.refs[k].follows(&run) {
		b.refs[k].count += run.count
		b.refs[k].bytes += run.bytes
	} else {
		b.refs = append(b.refs, run)
	}
	b.count += run.count
	b.bytes += uint64(run.bytes)
	b.lastExpiry = max(b.lastExpiry, run.expiry())
}

// placeMatured writes the blocks of references.
func (e *Engine) placeMatured(order []*topic) error {
	if len(order) == 0 {
		return nil
	}
	batch := e.db.NewBatch()
	defer func() { _ = batch.Close() }()
	kept := recentEntry{}
	for _, t := range order {
		b := t.maturing
		t.maturing = nil
		id, ok := t.nextStreamID(uint64(e.stamp.Wall), uint64(b.count))
		if !ok {
			continue // the stream is exhausted: there is no place for anything
		}
		b.base, b.stream = t.next, id
		e.putHeader(batch, b)
		for i := range b.refs {
			r := &b.refs[i]
			row := append(e.rowBuf[:0], rowVersion)
			row = binary.AppendUvarint(row, e.index)
			row = binary.AppendUvarint(row, b.base+uint64(r.from))
			row = binary.AppendUvarint(row, uint64(r.count))
			e.put(batch, row, rowPlace, t.inc, r.index, uint64(r.pos))
		}
		t.next += uint64(b.count)
		t.last = b.streamOf(b.count - 1)
		t.changed, t.dirty = e.index, true
		for i := range b.refs {
			for range b.refs[i].count {
				t.noted(b.refs[i].expiry())
			}
		}
		t.recent = append(t.recent, b)
		kept.blocks = append(kept.blocks, b)
		kept.bytes += headerBytes(b)
		for _, g := range t.parked {
			e.look(g)
		}
		if e.fx != nil {
			e.fx.Appended = append(e.fx.Appended, t.name)
		}
	}
	e.putExpiries(batch, kept.blocks, true)
	if err := batch.Commit(pebble.NoSync); err != nil {
		return fmt.Errorf("writing matured messages: %w", err)
	}
	e.recent = append(e.recent, kept)
	e.recentBytes += kept.bytes
	e.trimRecent()
	return nil
}

// placeOf returns the offset at which a delayed message stands in the log, if it has matured.
func (e *Engine) placeOf(t *topic, id MessageID) (off uint64, ok bool, err error) {
	if t.purgedDelayed(id.Index, id.Pos) || id.Index > e.index && !e.seeLaterRows {
		return 0, false, nil
	}
	defer e.damaged(&err)
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: e.keys.key(rowPlace, t.inc, id.Index), UpperBound: e.keys.key(rowPlace, t.inc, id.Index+1)})
	if err != nil {
		return 0, false, fmt.Errorf("reading the place of a message: %w", err)
	}
	defer func() { _ = it.Close() }()
	// Rows of later maturities may be there from before a crash: one entry may have matured in several steps.
	for valid := it.SeekLT(e.keys.key(rowPlace, t.inc, id.Index, uint64(id.Pos)+1)); valid; valid = it.Prev() {
		pos, _ := keyPart(it.Key(), 2)
		v, err := it.ValueAndErr()
		if err != nil {
			return 0, false, fmt.Errorf("reading the place of a message: %w", err)
		}
		r := reader{b: v}
		if ver := r.u8(); ver != rowVersion {
			return 0, false, rowError(rowPlace, ver)
		}
		index, base, count := r.uvarint(), r.uvarint(), r.uvarint()
		if err := r.err(); err != nil {
			return 0, false, err
		}
		if uint64(id.Pos)-pos < count {
			return base + uint64(id.Pos) - pos, index <= e.index || e.seeLaterRows, nil
		}
	}
	return 0, false, it.Error()
}

// waiting returns the run of the one delayed message of that ID, if it has not matured, with the time at which it
// will.
func (e *Engine) waiting(t *topic, id MessageID) (run refRun, due int64, ok bool, err error) {
	if id.Kind != KindDelayed || id.Shard != e.o.Shard || t.purgedDelayed(id.Index, id.Pos) {
		return run, 0, false, nil
	}
	var runs []refRun
	switch {
	case e.applying && id.Index == e.index:
		runs = e.stagedRuns(t)
	case id.Index > e.index:
		return run, 0, false, nil
	default:
		v, closer, err := e.db.Get(e.keys.key(rowStagedIndex, t.inc, id.Index))
		if errors.Is(err, pebble.ErrNotFound) {
			return run, 0, false, nil
		}
		if err != nil {
			return run, 0, false, fmt.Errorf("reading staged messages: %w", err)
		}
		runs, err = parseRuns(rowStagedIndex, id.Index, v)
		_ = closer.Close()
		if err != nil {
			return run, 0, false, err
		}
	}
	for _, r := range runs {
		if id.Pos < r.pos || id.Pos-r.pos >= r.count {
			continue
		}
		r.bytes /= r.count
		r.pos, r.count = id.Pos, 1
		due = r.due
		if c := e.changes[delayKey{t.inc, id.Index, id.Pos}]; c != nil {
			return r, c.due, c.due != never, nil
		}
		passed := !e.matured.before(dueKey{r.due, t.inc, id.Index})
		return r, due, !passed, nil
	}
	return run, 0, false, nil
}

func (e *Engine) applyDelayed(r *reader, res *Result) error {
	topic, id, cancel, delay := r.str(), r.messageID(), r.flags(1) != 0, r.duration()
	if r.err() != nil {
		res.Code = errs.BadRequest
		return nil
	}
	now := e.stamp.Cluster
	res.Code = errs.MessageNotFound
	t := e.topics[topic]
	if t == nil {
		return nil
	}
	run, _, ok, err := e.waiting(t, id)
	if err != nil {
		return err
	}
	if !ok {
		b, i, err := e.byID(t, id)
		if err == nil && b != nil && b.expiry(i) > now {
			res.Code = errs.Conflict
		}
		return err
	}
	if run.expiry() <= now {
		return nil
	}
	key := delayKey{t.inc, id.Index, id.Pos}
	to := now + delay.Milliseconds()
	c := e.changes[key]
	switch {
	case !cancel && to > run.expiry():
		res.Code = errs.BadRequest
		return nil
	case c == nil && len(e.changes) >= limits.DelayedChangesMax:
		res.Code = errs.Overloaded
		return nil
	case c == nil:
		c = &delayChange{run: run}
		e.changes[key] = c
	}
	res.Code = errs.OK
	c.dirty, c.cancelled, c.due = true, cancel, to
	if cancel {
		c.due = never
		t.delayed -= min(t.delayed, 1)
		t.dirty = true
		e.settleChange(key, c)
	} else {
		e.pushMoved(movedItem{to, key})
	}
	e.dirtRough.Add(64)
	return nil
}

func (c *delayChange) appendRow(b []byte) []byte {
	b = append(b, rowVersion, flags(c.cancelled))
	b = binary.AppendUvarint(b, uint64(c.due))
	for _, v := range []int64{c.run.cluster, c.run.wall, c.run.due, int64(c.run.retention), int64(c.run.bytes)} {
		b = binary.AppendUvarint(b, uint64(v))
	}
	return binary.AppendUvarint(b, c.run.dep)
}

func parseChange(k delayKey, row []byte) (*delayChange, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return nil, rowError(rowChange, v)
	}
	c := &delayChange{cancelled: r.flags(1) != 0, due: int64(r.upTo(never))}
	c.run = refRun{index: k.index, pos: k.pos, count: 1, cluster: int64(r.upTo(1 << 61)), wall: int64(r.upTo(1 << 61)), due: int64(r.upTo(1 << 61)),
		retention: uint32(r.upTo(math.MaxUint32)), bytes: uint32(r.upTo(math.MaxUint32)), dep: r.uvarint()}
	return c, r.err()
}

func sortDelayKeys(keys []delayKey) {
	slices.SortFunc(keys, func(a, b delayKey) int {
		return cmp.Or(cmp.Compare(a.topic, b.topic), cmp.Compare(a.index, b.index), cmp.Compare(a.pos, b.pos))
	})
}

func (e *Engine) encodeChanges(batch *pebble.Batch) {
	for _, k := range e.removedChanges {
		_ = batch.Delete(e.keys.key(rowChange, k.topic, k.index, uint64(k.pos)), nil)
	}
	e.removedChanges = nil
	for k, c := range e.changes { // rows of different keys: their order in the batch does not show
		if c.dirty {
			c.dirty = false
			e.put(batch, c.appendRow(e.rowBuf[:0]), rowChange, k.topic, k.index, uint64(k.pos))
		}
	}
}

func (e *Engine) loadChange(key, row []byte) error {
	topic, _ := keyPart(key, 0)
	index, _ := keyPart(key, 1)
	pos, ok := keyPart(key, 2)
	if !ok || pos > math.MaxUint32 {
		return errMalformed
	}
	k := delayKey{topic, index, uint32(pos)}
	c, err := parseChange(k, row)
	if err != nil {
		return err
	}
	e.changes[k] = c
	if c.due != never {
		e.pushMoved(movedItem{c.due, k})
	}
	return nil
}

// canonicalChanges appends the changes in the form that replicas agree upon.
func (e *Engine) canonicalChanges(b []byte) []byte {
	keys := make([]delayKey, 0, len(e.changes))
	for k := range e.changes {
		keys = append(keys, k)
	}
	sortDelayKeys(keys)
	b = binary.AppendUvarint(b, uint64(len(keys)))
	for _, k := range keys {
		for _, v := range []uint64{k.topic, k.index, uint64(k.pos)} {
			b = binary.AppendUvarint(b, v)
		}
		b = appendBytes(b, e.changes[k].appendRow(nil))
	}
	return b
}

// loadStaged fills delayed messages from where they were staged.
func (e *Engine) loadStaged(d *Delivery) (ok bool, err error) {
	defer e.damaged(&err)
	v, closer, err := e.db.Get(e.keys.key(rowStaged, d.Receipt.Topic, d.ID.Index))
	if errors.Is(err, pebble.ErrNotFound) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("engine: reading staged messages of entry %d: %w", d.ID.Index, err)
	}
	defer func() { _ = closer.Close() }()
	r := reader{b: v}
	if ver := r.u8(); ver != rowVersion {
		return false, rowError(rowStaged, ver)
	}
	for range r.count(recordBytesMin + 1) {
		pos := r.uvarint()
		if pos != uint64(d.ID.Pos) {
			r.bytes()
			continue
		}
		var rec record
		parseRecord(&r, &rec)
		if r.bad {
			break
		}
		d.fill(&rec)
		d.Body = append(make([]byte, 0, len(d.Body)), d.Body...)
		d.fields = cloneFields(d.fields)
		return true, nil
	}
	return false, fmt.Errorf("engine: staged message %d of entry %d: %w", d.ID.Pos, d.ID.Index, errMalformed)
}
