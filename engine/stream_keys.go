package engine

import (
	"encoding/binary"
	"math"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// This file is the keyspace as Valkey knows it: topics and strings under their names, their expiry, and what
// deletes, moves and copies them.
//
// Expiry does not depend on when it is looked at: every entry first drops the keys whose time has come by its own
// stamp, and a query compares with the reader's clock.

// stringKey is a key that holds a string.
type stringKey struct {
	name                 string
	inc                  uint64
	value                []byte
	changed              uint64
	expireAt, expireWall int64
	dirty                bool
}

func (e *Engine) resetKeys() {
	e.strings, e.stringBytes = make(map[string]*stringKey), 0
	e.byExpiry = make(map[uint64]string)
	e.removedStrings, e.expiries = nil, nil
	e.scanList, e.scanVersion = nil, 0
}

func (s *stringKey) bytes() int64 { return int64(len(s.name)+len(s.value)) + 128 }

func (s *stringKey) appendRow(b []byte) []byte {
	b = append(b, rowVersion)
	b = appendBytes(b, s.name)
	b = binary.AppendUvarint(b, s.changed)
	b = appendVarint(b, s.expireAt)
	b = appendVarint(b, s.expireWall)
	return appendBytes(b, s.value)
}

func parseString(inc uint64, row []byte) (*stringKey, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return nil, rowError(rowString, v)
	}
	s := &stringKey{inc: inc, name: r.str(), changed: r.uvarint(), expireAt: r.varint(), expireWall: r.varint(), value: slices.Clone(r.bytes())}
	return s, r.err()
}

func (e *Engine) loadString(key, v []byte) error {
	inc, _ := keyPart(key, 0)
	s, err := parseString(inc, v)
	if err != nil {
		return err
	}
	e.strings[s.name] = s
	e.stringBytes += s.bytes()
	e.expires(inc, s.name, s.expireAt)
	return nil
}

// encodeStrings puts changed strings into a checkpoint.
func (e *Engine) encodeStrings(batch *pebble.Batch) {
	for _, name := range sortedKeys(e.strings) {
		if s := e.strings[name]; s.dirty {
			s.dirty = false
			e.put(batch, s.appendRow(nil), rowString, s.inc)
		}
	}
}

// appendStrings appends all strings in their canonical form.
func (e *Engine) appendStrings(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(e.strings)))
	for _, name := range sortedKeys(e.strings) {
		b = binary.AppendUvarint(b, e.strings[name].inc)
		b = e.strings[name].appendRow(b)
	}
	return b
}

// expires notes that the key of that incarnation and name expires at a time, 0 for never.
func (e *Engine) expires(inc uint64, name string, at int64) {
	if at == 0 {
		delete(e.byExpiry, inc)
		return
	}
	e.byExpiry[inc] = name
	e.expiries.push(timer{at, inc})
}

// expireKeys drops the keys whose time has come by the entry's stamp.
func (e *Engine) expireKeys() {
	for len(e.expiries) > 0 && e.expiries[0].at <= e.stamp.Cluster {
		it := e.expiries[0]
		e.expiries.pop()
		name, ok := e.byExpiry[it.off]
		if !ok {
			continue
		}
		if t := e.topics[name]; t != nil && t.inc == it.off && t.expireAt == it.at {
			e.dropTopic(t)
		} else if s := e.strings[name]; s != nil && s.inc == it.off && s.expireAt == it.at {
			e.dropString(s)
		}
	}
}

// topicAt returns the topic of that name that exists at now.
func (e *Engine) topicAt(name string, now int64) *topic {
	if t := e.topics[name]; t != nil && (t.expireAt == 0 || t.expireAt > now) {
		return t
	}
	return nil
}

// stringAt returns the string of that name that exists at now.
func (e *Engine) stringAt(name string, now int64) *stringKey {
	if s := e.strings[name]; s != nil && (s.expireAt == 0 || s.expireAt > now) {
		return s
	}
	return nil
}

// wakeParked has the receives that wait for groups of a topic look again, under the names they know.
func (e *Engine) wakeParked(t *topic) {
	for _, g := range t.parked {
		e.announce(g)
		g.parked = false
	}
	t.parked = nil
}

func (e *Engine) dropString(s *stringKey) {
	e.noteKey(s.name)
	delete(e.strings, s.name)
	delete(e.byExpiry, s.inc)
	e.stringBytes -= s.bytes()
	e.removedStrings = append(e.removedStrings, s.inc)
	e.keyGone()
}

// keyGone notes that a key came or went: the version of every absent key changes.
func (e *Engine) keyGone() {
	e.absent = e.index
	e.dirtRough.Add(128)
	if e.fx != nil {
		e.fx.Topics = true
	}
}

// noteKey tells whoever follows keys that one has changed.
func (e *Engine) noteKey(name string) {
	if e.fx != nil {
		e.fx.Keys = append(e.fx.Keys, name)
	}
}

// dropKey removes whatever stands under a name and reports whether something did.
func (e *Engine) dropKey(name string) bool {
	if t := e.topics[name]; t != nil {
		e.dropTopic(t)
		return true
	}
	if s := e.strings[name]; s != nil {
		e.dropString(s)
		return true
	}
	return false
}

func (e *Engine) exists(name string) bool { return e.topics[name] != nil || e.strings[name] != nil }

// version is what WATCH compares: the index of the last change of a key, and of any key that went for one that is
// not there.
func (e *Engine) version(name string, now int64) uint64 {
	if t := e.topicAt(name, now); t != nil {
		return t.changed
	}
	if s := e.stringAt(name, now); s != nil {
		return s.changed
	}
	if e.exists(name) {
		return math.MaxUint64 // it has expired, and the next entry says so
	}
	return e.absent
}

func (e *Engine) applyKeyDelete(c *KeyDelete, res *Result) {
	for _, name := range c.Keys {
		if e.dropKey(name) {
			res.Count++
		}
	}
}

func (e *Engine) applyKeyRename(c *KeyRename, res *Result) {
	switch {
	case !e.exists(c.From):
		res.Code = errs.TopicNotFound
		return
	case len(c.To) == 0 || len(c.To) > limits.KeyBytesMax:
		res.Code = errs.InvalidName
		return
	case c.KeepTarget && e.exists(c.To):
		return
	}
	res.Count = 1
	if c.From == c.To {
		return
	}
	e.dropKey(c.To)
	e.noteKey(c.From)
	e.noteKey(c.To)
	if t := e.topics[c.From]; t != nil {
		e.wakeParked(t)
		delete(e.topics, c.From)
		t.name, t.dirty, t.changed = c.To, true, e.index
		e.topics[c.To] = t
		e.expires(t.inc, t.name, t.expireAt)
		e.appended(t)
	} else {
		s := e.strings[c.From]
		delete(e.strings, c.From)
		e.stringBytes += int64(len(c.To) - len(c.From))
		s.name, s.dirty, s.changed = c.To, true, e.index
		e.strings[c.To] = s
		e.expires(s.inc, s.name, s.expireAt)
	}
	e.keyGone()
}

// appended tells those who read the topic that there may be something new under its name.
func (e *Engine) appended(t *topic) {
	if e.fx != nil && t.open == nil {
		e.fx.Appended = append(e.fx.Appended, t.name)
	}
}

// deadline converts a client's deadline into cluster time and Unix time.
func (e *Engine) deadline(d Deadline) (cluster, wall int64) {
	const far = int64(1) << 60
	ms := min(max(d.Ms, -far), far)
	if d.Absolute {
		return e.stamp.Cluster + ms - e.stamp.Wall, ms
	}
	return e.stamp.Cluster + ms, e.stamp.Wall + ms
}

func (e *Engine) applyKeyExpire(c *KeyExpire, res *Result) {
	t, s := e.topics[c.Key], e.strings[c.Key]
	var at, wall *int64
	var inc uint64
	switch {
	case t != nil:
		at, wall, inc = &t.expireAt, &t.expireWall, t.inc
	case s != nil:
		at, wall, inc = &s.expireAt, &s.expireWall, s.inc
	default:
		return
	}
	var cluster, told int64
	if c.By.Set {
		cluster, told = e.deadline(c.By)
		old := *at
		switch {
		case c.When == IfAbsent && old != 0, c.When == IfPresent && old == 0,
			c.When == IfGreater && (old == 0 || cluster <= old), c.When == IfLess && old != 0 && cluster >= old, c.When == IfSooner && (old == 0 || cluster >= old):
			return
		}
		if cluster <= e.stamp.Cluster {
			e.dropKey(c.Key)
			res.Count = 1
			return
		}
	} else if *at == 0 {
		return // PERSIST of a key that has no expiry
	}
	res.Count = 1
	*at, *wall = cluster, told
	e.expires(inc, c.Key, cluster)
	e.changedKey(t, s)
}

// changedKey notes a change of one of the two.
func (e *Engine) changedKey(t *topic, s *stringKey) {
	if t != nil {
		t.changed, t.dirty = e.index, true
		e.noteKey(t.name)
	}
	if s != nil {
		s.changed, s.dirty = e.index, true
		e.noteKey(s.name)
	}
	e.dirtRough.Add(64)
}

func (e *Engine) applyStringSet(c *StringSet, res *Result) {
	t, s := e.topics[c.Key], e.strings[c.Key]
	if c.Get {
		if t != nil {
			res.Code = errs.WrongType
			return
		}
		if s != nil {
			res.Stream = &StreamResult{Value: slices.Clone(s.value)}
			if res.Stream.Value == nil {
				res.Stream.Value = []byte{}
			}
		}
	}
	there := t != nil || s != nil
	switch {
	case c.When == IfAbsent && there, c.When == IfPresent && !there:
		return
	case len(c.Key) == 0 || len(c.Key) > limits.KeyBytesMax:
		res.Code = errs.InvalidName
		return
	}
	var at, wall int64
	if c.By.Set {
		at, wall = e.deadline(c.By)
	} else if c.KeepTTL && s != nil {
		at, wall = s.expireAt, s.expireWall
	} else if c.KeepTTL && t != nil {
		at, wall = t.expireAt, t.expireWall
	}
	n := &stringKey{name: c.Key, value: c.Value, changed: e.index, expireAt: at, expireWall: wall, dirty: true}
	grown := n.bytes()
	if s != nil {
		grown -= s.bytes()
	}
	if len(c.Value) > limits.StringBytesMax || e.stringBytes+grown > limits.StringsBytesMax {
		res.Code, res.Stream = errs.MemoryLimit, nil
		return
	}
	res.Count = 1
	if t != nil {
		e.dropTopic(t)
	}
	if at != 0 && at <= e.stamp.Cluster {
		if s != nil {
			e.dropString(s)
		}
		return
	}
	if s != nil {
		n.inc = s.inc
		delete(e.byExpiry, s.inc)
		e.stringBytes -= s.bytes()
	} else {
		e.incarnations++
		n.inc = e.incarnations
		e.keyGone()
	}
	e.noteKey(n.name)
	e.strings[c.Key] = n
	e.stringBytes += n.bytes()
	e.expires(n.inc, n.name, at)
	e.dirtRough.Add(n.bytes())
}

func (e *Engine) applyStringGetDel(c *StringGetDel, res *Result) {
	if e.topics[c.Key] != nil {
		res.Code = errs.WrongType
		return
	}
	if s := e.strings[c.Key]; s != nil {
		res.Stream = &StreamResult{Value: append([]byte{}, s.value...)}
		e.dropString(s)
	}
}

func (e *Engine) applyFlush() {
	for _, name := range sortedKeys(e.topics) {
		e.dropTopic(e.topics[name])
	}
	for _, name := range sortedKeys(e.strings) {
		e.dropString(e.strings[name])
	}
	e.keyGone()
}
