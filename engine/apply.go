package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/cespare/xxhash/v2"

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
	if invariants && !e.seeLaterRows && e.beforeStore == nil {
		e.checkInvariants()
	}
	return results, nil
}

func (fx *Effects) reset() {
	fx.Deliverable, fx.Due = fx.Deliverable[:0], fx.Due[:0]
	fx.Appended, fx.Keys, fx.Documents = fx.Appended[:0], fx.Keys[:0], fx.Documents[:0]
	fx.Topics, fx.InSync, fx.Configuration = false, false, false
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
	if len(e.uploads) > 0 {
		e.endUploads(func(u *upload) bool { return u.deadline <= e.stamp.Cluster })
	}
	e.expireKeys()
	if err := e.mature(); err != nil {
		return results, err
	}
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
		e.intake = it.intake
		if err := e.command(it.command, at, res); err != nil {
			return results, err
		}
		if it.intake != 0 && !res.Parked {
			in.record(it.number, res)
		}
	}
	if err := e.dropDone(); err != nil {
		return results, err
	}
	if err := e.store(entry); err != nil {
		return results, err
	}
	e.chain = chainHash(e.chain, index, entry)
	e.stamp.Cluster += e.advance
	e.stamp.Wall += e.advance
	if e.advance > 0 {
		for _, in := range e.intakes {
			in.heard += e.advance // nobody was silent in a time that did not pass
		}
	}
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
	e.pos, e.advance, e.copied = 0, 0, 0
	e.open, e.touched, e.done = e.open[:0], e.touched[:0], e.done[:0]
	e.staging, e.newKeys, e.newParts, e.newLarge = e.staging[:0], e.newKeys[:0], e.newParts[:0], e.newLarge[:0]
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
	e.endUploads(func(u *upload) bool { return u.intake == id })
	delete(e.intakes, id)
	e.removedIntakes = append(e.removedIntakes, id)
}

// command applies one command; at is where it begins in the entry. An error halts the node; whatever a client
// can cause ends as a code in res.
func (e *Engine) command(cmd []byte, at uint32, res *Result) error {
	kind, r, err := openCommand(cmd)
	if errors.Is(err, errMalformed) {
		res.Code = errs.BadRequest
		return nil
	}
	if err != nil {
		return err
	}
	if kind >= cmdStreamFirst {
		return e.applyStream(kind, &r, at+uint32(len(cmd)), res)
	}
	switch kind {
	case CmdInit:
		return e.applyInit(&r, res)
	case CmdOpenIntake:
		e.applyOpenIntake(&r, res)
	case CmdTick:
	case CmdPublish:
		return e.applyPublish(&r, at+uint32(len(cmd)), res)
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
	default:
		return e.applyQueue(kind, &r, at+uint32(len(cmd)), res)
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
		e.skipNumbers()
	}
	return nil
}

// refoundSkip is more than a cluster gives out between the last entry that a surviving node has and its own end.
const refoundSkip = 1 << 32

// skipNumbers makes sure that no number is given out again that was given out by entries which this log has lost: a
// receipt of those would fit another message's lease.
func (e *Engine) skipNumbers() {
	e.incarnations += refoundSkip
	e.intakeCount += refoundSkip
	for _, g := range e.groups {
		g.epoch += refoundSkip
		g.dirty = true
	}
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
	if e.strings[string(name)] != nil {
		return nil, errs.WrongType
	}
	e.incarnations++
	t := newTopic(string(name), e.incarnations)
	t.dirty = true
	t.changed = e.index
	e.noteKey(t.name)
	e.topics[t.name], e.byInc[t.inc] = t, t
	e.absent = e.index
	e.dirtRough.Add(int64(len(name)) + 64)
	if e.fx != nil {
		e.fx.Topics = true
	}
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

// tidy folds one group an entry, in turn, so that groups nobody asks for do not hold on to what has expired.
func (e *Engine) tidy() {
	if len(e.groups) == 0 {
		return
	}
	if e.tidyAt >= len(e.groups) {
		e.tidyAt = 0
	}
	if g := e.groups[e.tidyAt]; g != nil {
		g.fold(e.stamp.Cluster, limits.FoldPerCommandMax)
	}
	e.tidyAt++
}
