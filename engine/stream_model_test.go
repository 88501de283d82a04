package engine

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/internal/errs"
)

var streamSeed = flag.Uint64("streamseed", 0, "run the stream model with this seed alone")

// The reference: streams as Valkey's documentation has them, with nothing of how the engine does it.
type refEntry struct {
	id     StreamID
	fields string
}

type refPending struct {
	consumer string
	at       int64
	count    uint64
}

type refGroup struct {
	last      StreamID
	read      int64
	pel       map[StreamID]*refPending
	consumers map[string]bool
}

type refStream struct {
	entries          []refEntry
	last, maxDeleted StreamID
	added            uint64
	groups           map[string]*refGroup
	expire           int64
}

type refModel struct {
	keys map[string]*refStream
	now  int64
	wall uint64
}

func (m *refModel) get(key string) *refStream {
	s := m.keys[key]
	if s != nil && s.expire != 0 && s.expire <= m.now {
		delete(m.keys, key)
		return nil
	}
	return s
}

func (s *refStream) find(id StreamID) int {
	return slices.IndexFunc(s.entries, func(e refEntry) bool { return e.id == id })
}

func (s *refStream) first() StreamID {
	if len(s.entries) == 0 {
		return StreamID{}
	}
	return s.entries[0].id
}

func (m *refModel) trim(s *refStream, c Trim) int {
	n := 0
	for len(s.entries) > 0 && (c.By == TrimMaxLen && uint64(len(s.entries)) > c.MaxLen || c.By == TrimMinID && s.entries[0].id.less(c.MinID)) {
		s.entries = s.entries[1:]
		n++
	}
	return n
}

func (s *refStream) holes(from StreamID) bool {
	return len(s.entries) > 0 && s.maxDeleted != (StreamID{}) && s.first().Compare(s.maxDeleted) <= 0 && from.Compare(s.maxDeleted) <= 0
}

func (s *refStream) counter(id StreamID) int64 {
	n := uint64(len(s.entries))
	switch {
	case s.added == 0:
		return 0
	case n == 0 && id.Compare(s.last) <= 0:
		return int64(s.added)
	case id == s.last:
		return int64(s.added)
	case s.last.less(id):
		return -1
	case id != (StreamID{}) && id.less(s.maxDeleted):
		return -1
	}
	if s.maxDeleted == (StreamID{}) || s.maxDeleted.less(s.first()) {
		if id.less(s.first()) {
			return int64(s.added - n)
		}
		if id == s.first() {
			return int64(s.added - n + 1)
		}
	}
	return -1
}

func (s *refStream) lag(g *refGroup) int64 {
	switch {
	case s.added == 0, len(s.entries) == 0:
		return 0
	case g.last.less(s.first()) && s.maxDeleted.less(s.first()):
		return int64(len(s.entries))
	case g.read >= 0 && !s.holes(g.last):
		return int64(s.added) - g.read
	}
	if n := s.counter(g.last); n >= 0 {
		return int64(s.added) - n
	}
	return -1
}

func (g *refGroup) ids(consumer string) []StreamID {
	var out []StreamID
	for id, p := range g.pel {
		if consumer == "" || p.consumer == consumer {
			out = append(out, id)
		}
	}
	slices.SortFunc(out, StreamID.Compare)
	return out
}

func refID(id StreamID) string { return fmt.Sprintf("%d-%d", id.Ms, id.Seq) }

// apply does what the command says and tells the result in words.
func (m *refModel) apply(c Command) string {
	group := func(key, name string) (*refStream, *refGroup) {
		s := m.get(key)
		if s == nil {
			return nil, nil
		}
		return s, s.groups[name]
	}
	var b strings.Builder
	switch c := c.(type) {
	case *StreamAdd:
		s := m.get(c.Key)
		if c.ID == (StreamID{}) && c.By == AddExplicit {
			return errs.StreamIDZero.String()
		}
		if s == nil && c.NoCreate {
			return errs.TopicNotFound.String()
		}
		var last StreamID
		if s != nil {
			last = s.last
		}
		id := c.ID
		switch c.By {
		case AddAuto:
			if id = (StreamID{Ms: m.wall}); m.wall <= last.Ms {
				id = last.next()
			}
		case AddAutoSeq:
			if id.Seq = 0; id.Ms == last.Ms {
				id.Seq = last.Seq + 1
			}
		}
		if !last.less(id) {
			return errs.StreamIDTooLow.String()
		}
		if s == nil {
			s = &refStream{groups: map[string]*refGroup{}}
			m.keys[c.Key] = s
		}
		s.entries = append(s.entries, refEntry{id, fmt.Sprintf("%s", c.Fields)})
		s.last = id
		s.added++
		m.trim(s, c.Trim)
		return refID(id)
	case *StreamDelete:
		n := 0
		if s := m.get(c.Key); s != nil {
			for _, id := range c.IDs {
				if i := s.find(id); i >= 0 {
					s.entries = slices.Delete(slices.Clone(s.entries), i, i+1)
					if s.maxDeleted.less(id) {
						s.maxDeleted = id
					}
					n++
				}
			}
		}
		return fmt.Sprint(n)
	case *StreamTrim:
		if s := m.get(c.Key); s != nil {
			return fmt.Sprint(m.trim(s, c.Trim))
		}
		return "0"
	case *StreamSetID:
		s := m.get(c.Key)
		switch {
		case s == nil:
			return errs.TopicNotFound.String()
		case c.ID.less(s.maxDeleted):
			return errs.StreamIDDeleted.String()
		case len(s.entries) > 0 && c.ID.less(s.entries[len(s.entries)-1].id):
			return errs.StreamIDTooLow.String()
		}
		s.last = c.ID
		return "ok"
	case *StreamGroup:
		s := m.get(c.Key)
		if s == nil {
			if c.Op != GroupCreate || !c.Create {
				return errs.TopicNotFound.String()
			}
			s = &refStream{groups: map[string]*refGroup{}}
			m.keys[c.Key] = s
		}
		g := s.groups[c.Group]
		if g == nil && c.Op != GroupCreate && c.Op != GroupDestroy {
			return errs.GroupNotFound.String()
		}
		id := c.ID
		if c.Last {
			id = s.last
		}
		switch c.Op {
		case GroupCreate:
			if g != nil {
				return errs.GroupExists.String()
			}
			s.groups[c.Group] = &refGroup{last: id, read: c.EntriesRead, pel: map[StreamID]*refPending{}, consumers: map[string]bool{}}
		case GroupSetID:
			g.last, g.read = id, c.EntriesRead
		case GroupDestroy:
			delete(s.groups, c.Group)
			return fmt.Sprint(map[bool]int{true: 1}[g != nil])
		case GroupAddConsumer:
			was := g.consumers[c.Consumer]
			g.consumers[c.Consumer] = true
			return fmt.Sprint(map[bool]int{false: 1}[was])
		case GroupDelConsumer:
			ids := g.ids(c.Consumer)
			for _, id := range ids {
				delete(g.pel, id)
			}
			delete(g.consumers, c.Consumer)
			return fmt.Sprint(len(ids))
		}
		return "ok"
	case *StreamReadGroup:
		p := c.Streams[0]
		s, g := group(p.Key, c.Group)
		if g == nil {
			return errs.GroupNotFound.String()
		}
		g.consumers[c.Consumer] = true
		n := uint64(0)
		if !p.New {
			for _, id := range g.ids(c.Consumer) {
				if p.ID.less(id) && (c.Count == 0 || n < c.Count) {
					n++
					if i := s.find(id); i < 0 {
						fmt.Fprintf(&b, "%s! ", refID(id))
					} else {
						fmt.Fprintf(&b, "%s%s ", refID(id), s.entries[i].fields)
						g.pel[id].at = m.now
						g.pel[id].count++
					}
				}
			}
			return "[" + b.String() + "]"
		}
		for _, e := range s.entries {
			if !g.last.less(e.id) || c.Count > 0 && n == c.Count {
				continue
			}
			n++
			if g.read >= 0 && g.last.Compare(s.first()) >= 0 && !s.holes(g.last) {
				g.read++
			} else {
				g.read = s.counter(e.id)
			}
			g.last = e.id
			fmt.Fprintf(&b, "%s%s ", refID(e.id), e.fields)
			if !c.NoAck {
				g.pel[e.id] = &refPending{c.Consumer, m.now, 1}
			}
		}
		if n == 0 {
			return "nil"
		}
		return "[" + b.String() + "]"
	case *StreamAck:
		n := 0
		if _, g := group(c.Key, c.Group); g != nil {
			for _, id := range c.IDs {
				if g.pel[id] != nil {
					delete(g.pel, id)
					n++
				}
			}
		}
		return fmt.Sprint(n)
	case *StreamClaim:
		s, g := group(c.Key, c.Group)
		if s == nil {
			return errs.TopicNotFound.String()
		}
		if g == nil {
			return errs.GroupNotFound.String()
		}
		g.consumers[c.Consumer] = true
		for _, id := range c.IDs {
			p, i := g.pel[id], s.find(id)
			if i < 0 {
				delete(g.pel, id)
				continue
			}
			if p == nil {
				if !c.Force {
					continue
				}
				p = &refPending{c.Consumer, m.now - max(c.MinIdle, 0), 1}
				g.pel[id] = p
			}
			if m.now-p.at < c.MinIdle {
				continue
			}
			p.consumer, p.at = c.Consumer, m.now
			if c.Idle >= 0 {
				p.at = m.now - c.Idle
			}
			if c.RetryCount >= 0 {
				p.count = uint64(c.RetryCount)
			} else if !c.JustID {
				p.count++
			}
			if c.JustID {
				fmt.Fprintf(&b, "%s ", refID(id))
			} else {
				fmt.Fprintf(&b, "%s%s ", refID(id), s.entries[i].fields)
			}
		}
		return "[" + b.String() + "]"
	case *StreamAutoClaim:
		s, g := group(c.Key, c.Group)
		if s == nil {
			return errs.TopicNotFound.String()
		}
		if g == nil {
			return errs.GroupNotFound.String()
		}
		g.consumers[c.Consumer] = true
		left, scan := c.Count, c.Count*10
		var next StreamID
		var gone []StreamID
		for _, id := range g.ids("") {
			if id.less(c.Start) {
				continue
			}
			if left == 0 || scan == 0 {
				next = id
				break
			}
			scan--
			p, i := g.pel[id], s.find(id)
			if i < 0 {
				delete(g.pel, id)
				gone = append(gone, id)
				left--
				continue
			}
			if m.now-p.at < c.MinIdle {
				continue
			}
			left--
			p.consumer, p.at = c.Consumer, m.now
			if !c.JustID {
				p.count++
				fmt.Fprintf(&b, "%s%s ", refID(id), s.entries[i].fields)
			} else {
				fmt.Fprintf(&b, "%s ", refID(id))
			}
		}
		return fmt.Sprintf("[%s] %v %s", b.String(), gone, refID(next))
	case *KeyDelete:
		n := 0
		for _, k := range c.Keys {
			if m.get(k) != nil {
				delete(m.keys, k)
				n++
			}
		}
		return fmt.Sprint(n)
	case *KeyRename:
		s := m.get(c.From)
		if s == nil {
			return errs.TopicNotFound.String()
		}
		delete(m.keys, c.From)
		m.keys[c.To] = s
		return "1"
	case *KeyCopy:
		s := m.get(c.From)
		if s == nil || c.From == c.To || m.get(c.To) != nil && !c.Replace {
			return "0"
		}
		n := *s
		n.entries = slices.Clone(s.entries)
		n.groups = make(map[string]*refGroup)
		for name, g := range s.groups {
			h := &refGroup{last: g.last, read: g.read, pel: make(map[StreamID]*refPending), consumers: maps.Clone(g.consumers)}
			for id, p := range g.pel {
				one := *p
				h.pel[id] = &one
			}
			n.groups[name] = h
		}
		m.keys[c.To] = &n
		return "1"
	case *KeyExpire:
		s := m.get(c.Key)
		if s == nil {
			return "0"
		}
		s.expire = m.now + c.By.Ms
		return "1"
	}
	return "?"
}

// told is the engine's result in the reference's words.
func told(c Command, r *Result) string {
	if r.Code != errs.OK {
		return r.Code.String()
	}
	entries := func(list []StreamEntry) string {
		var b strings.Builder
		for _, e := range list {
			b.WriteString(refID(e.ID))
			switch {
			case e.Deleted:
				b.WriteByte('!')
			case e.Fields != nil:
				fmt.Fprintf(&b, "%s", e.Fields)
			}
			b.WriteByte(' ')
		}
		return "[" + b.String() + "]"
	}
	switch c := c.(type) {
	case *StreamAdd:
		return refID(r.Published.Stream)
	case *StreamSetID:
		return "ok"
	case *StreamGroup:
		if c.Op == GroupCreate || c.Op == GroupSetID {
			return "ok"
		}
	case *StreamReadGroup:
		if r.Stream == nil {
			return "nil"
		}
		return entries(r.Stream.Reads[0].Entries)
	case *StreamClaim:
		return entries(r.Stream.Entries)
	case *StreamAutoClaim:
		return fmt.Sprintf("%s %v %s", entries(r.Stream.Entries), r.Stream.Deleted, refID(r.Stream.Next))
	}
	return fmt.Sprint(r.Count)
}

// view tells everything a client can see of the keys.
func (m *refModel) view(keys []string) string {
	var b strings.Builder
	for _, key := range keys {
		s := m.get(key)
		if s == nil {
			fmt.Fprintf(&b, "%s none\n", key)
			continue
		}
		fmt.Fprintf(&b, "%s len %d last %s deleted %s added %d first %s\n", key, len(s.entries), refID(s.last), refID(s.maxDeleted), s.added, refID(s.first()))
		for _, e := range s.entries {
			fmt.Fprintf(&b, " %s%s", refID(e.id), e.fields)
		}
		b.WriteByte('\n')
		for _, name := range slices.Sorted(maps.Keys(s.groups)) {
			g := s.groups[name]
			fmt.Fprintf(&b, " %s at %s read %d lag %d pending %d consumers %d\n", name, refID(g.last), g.read, s.lag(g), len(g.pel), len(g.consumers))
			for _, id := range g.ids("") {
				p := g.pel[id]
				fmt.Fprintf(&b, "  %s %s %d %d\n", refID(id), p.consumer, m.now-p.at, p.count)
			}
			for _, k := range slices.Sorted(maps.Keys(g.consumers)) {
				fmt.Fprintf(&b, "  %s: %d\n", k, len(g.ids(k)))
			}
		}
	}
	return b.String()
}

func (l *testLog) view(keys []string) string {
	l.t.Helper()
	var b strings.Builder
	for _, key := range keys {
		if l.ask(Query{Kind: QueryKeys, Stream: &StreamQuery{Keys: []string{key}}}).Keys[0].Type == KeyNone {
			fmt.Fprintf(&b, "%s none\n", key)
			continue
		}
		i := l.ask(Query{Kind: QueryStreamInfo, Topic: key, Stream: &StreamQuery{Full: true}}).Info
		if n := l.ask(Query{Kind: QueryStreamLen, Topic: key}).Count; n != i.Length {
			l.t.Fatalf("XLEN is %d, XINFO says %d", n, i.Length)
		}
		fmt.Fprintf(&b, "%s len %d last %s deleted %s added %d first %s\n", key, i.Length, refID(i.Last), refID(i.MaxDeleted), i.EntriesAdded, refID(i.FirstID))
		for _, e := range i.Entries {
			fmt.Fprintf(&b, " %s%s", refID(e.ID), e.Fields)
		}
		b.WriteByte('\n')
		back := l.ask(Query{Kind: QueryStreamRange, Topic: key, Stream: &StreamQuery{End: StreamIDMax, Reverse: true}}).Reads[0].Entries
		slices.Reverse(back)
		if showEntries(back) != showEntries(i.Entries) {
			l.t.Fatalf("backwards %s, forwards %s", showEntries(back), showEntries(i.Entries))
		}
		for n, e := range i.Entries { // each is found by itself, and by what is around it
			a := l.rng(key, e.ID, e.ID, 0, false)
			r := l.ask(Query{Kind: QueryStreamRead, Stream: &StreamQuery{Count: 1, Streams: []StreamPosition{{Key: key, ID: e.ID.prev()}}}}).Reads[0].Entries
			if one := showEntries(i.Entries[n : n+1]); a != one || showEntries(r) != one {
				l.t.Fatalf("%s is found as %q and %q", one, a, showEntries(r))
			}
		}
		for _, g := range i.Groups {
			fmt.Fprintf(&b, " %s at %s read %d lag %d pending %d consumers %d\n", g.Name, refID(g.LastDelivered), g.EntriesRead, g.Lag, g.Pending, g.ConsumerCount)
			for _, p := range g.Entries {
				fmt.Fprintf(&b, "  %s %s %d %d\n", refID(p.ID), p.Consumer, p.Idle, p.Count)
			}
			for _, k := range g.Consumers {
				if len(k.Entries) != int(k.Pending) {
					l.t.Fatalf("consumer %s: %d pending, %d listed", k.Name, k.Pending, len(k.Entries))
				}
				fmt.Fprintf(&b, "  %s: %d\n", k.Name, k.Pending)
			}
		}
	}
	return b.String()
}

// randomStreamCommand makes a command about what may be there.
func randomStreamCommand(r *rand.Rand, m *refModel, keys []string) Command {
	key := keys[r.IntN(len(keys))]
	grp := []string{"g", "h"}[r.IntN(2)]
	consumer := []string{"a", "b", "c"}[r.IntN(3)]
	s := m.get(key)
	id := func() StreamID {
		if s == nil || len(s.entries) == 0 || r.IntN(4) == 0 {
			return StreamID{Ms: uint64(r.IntN(40)), Seq: uint64(r.IntN(4))}
		}
		e := s.entries[r.IntN(len(s.entries))].id
		if r.IntN(4) == 0 {
			e.Seq += uint64(r.IntN(3))
		}
		return e
	}
	pendingID := func() StreamID {
		if s != nil && s.groups[grp] != nil && r.IntN(5) > 0 {
			if ids := s.groups[grp].ids(""); len(ids) > 0 {
				return ids[r.IntN(len(ids))]
			}
		}
		return id()
	}
	ids := func(one func() StreamID) []StreamID {
		var out []StreamID
		for range 1 + r.IntN(4) {
			out = append(out, one())
		}
		return out
	}
	trim := func() Trim {
		if r.IntN(2) == 0 {
			return Trim{By: TrimMaxLen, MaxLen: uint64(r.IntN(20))}
		}
		return Trim{By: TrimMinID, MinID: id()}
	}
	switch n := r.IntN(100); {
	case n < 38:
		c := &StreamAdd{Key: key, NoCreate: r.IntN(10) == 0, Fields: fieldsOf("n", fmt.Sprint(r.IntN(1000)))}
		switch r.IntN(4) {
		case 0:
			c.By, c.ID = AddExplicit, StreamID{Ms: uint64(r.IntN(40)), Seq: uint64(r.IntN(4))}
			if s != nil && r.IntN(5) > 0 {
				c.ID = StreamID{Ms: s.last.Ms, Seq: s.last.Seq + 1 + uint64(r.IntN(3))}
			}
		case 1:
			c.By, c.ID = AddAutoSeq, StreamID{Ms: uint64(r.IntN(40))}
			if s != nil && r.IntN(5) > 0 {
				c.ID.Ms = s.last.Ms + uint64(r.IntN(2))
			}
		}
		if r.IntN(8) == 0 {
			c.Trim = trim()
		}
		return c
	case n < 46:
		return &StreamDelete{Key: key, IDs: ids(id)}
	case n < 49:
		return &StreamTrim{Key: key, Trim: trim()}
	case n < 52:
		if s != nil {
			for _, g := range s.groups { // a pending list holds IDs; ours holds entries: see DESIGN.md
				for p := range g.pel {
					if s.find(p) < 0 {
						return &StreamSetID{Key: key, ID: s.last.next(), EntriesAdded: -1}
					}
				}
			}
		}
		c := &StreamSetID{Key: key, ID: id(), EntriesAdded: -1}
		if s != nil && r.IntN(3) > 0 && len(s.entries) > 0 {
			c.ID = s.entries[len(s.entries)-1].id
		}
		return c
	case n < 57:
		return &StreamGroup{Op: GroupCreate, Key: key, Group: grp, ID: id(), Last: r.IntN(3) == 0, Create: r.IntN(2) == 0, EntriesRead: -1}
	case n < 59:
		return &StreamGroup{Op: GroupSetID, Key: key, Group: grp, ID: id(), Last: r.IntN(3) == 0, EntriesRead: -1}
	case n < 60:
		return &StreamGroup{Op: GroupDestroy, Key: key, Group: grp}
	case n < 63:
		return &StreamGroup{Op: GroupOp(4 + r.IntN(2)), Key: key, Group: grp, Consumer: consumer}
	case n < 78:
		c := &StreamReadGroup{Group: grp, Consumer: consumer, Count: uint64(r.IntN(5)), NoAck: r.IntN(10) == 0, Streams: []StreamPosition{{Key: key, New: true}}}
		if r.IntN(3) == 0 {
			c.Streams[0] = StreamPosition{Key: key, ID: pendingID().prev()}
			c.NoAck = false
		}
		return c
	case n < 86:
		return &StreamAck{Key: key, Group: grp, IDs: ids(pendingID)}
	case n < 90:
		c := &StreamClaim{Key: key, Group: grp, Consumer: consumer, MinIdle: int64(r.IntN(3000)), IDs: ids(pendingID), Idle: -1, Time: -1, RetryCount: -1, Force: r.IntN(3) == 0, JustID: r.IntN(3) == 0}
		if r.IntN(4) == 0 {
			c.Idle = int64(r.IntN(5000))
		}
		if r.IntN(4) == 0 {
			c.RetryCount = int64(r.IntN(5))
		}
		return c
	case n < 94:
		return &StreamAutoClaim{Key: key, Group: grp, Consumer: consumer, MinIdle: int64(r.IntN(3000)), Start: id(), Count: 1 + uint64(r.IntN(3)), JustID: r.IntN(3) == 0}
	case n < 95:
		return &KeyDelete{Keys: []string{key}}
	case n < 96:
		return &KeyRename{From: key, To: keys[r.IntN(len(keys))]}
	case n < 98:
		return &KeyCopy{From: key, To: keys[r.IntN(len(keys))], Replace: r.IntN(3) > 0}
	default:
		return &KeyExpire{Key: key, By: Deadline{Set: true, Ms: int64(1 + r.IntN(20000))}}
	}
}

// TestStreamModel: random commands, several an entry, against the reference; what a client can see is compared after
// every entry, and the engine loses its memory, or all of the disk that was not synced, in between.
func TestStreamModel(t *testing.T) {
	seeds, steps := 12, 250
	if campaign() {
		seeds, steps = 400, 1000
	}
	first := rand.Uint64()
	if *streamSeed != 0 {
		first, seeds = *streamSeed, 1
	}
	for n := range seeds {
		seed := first + uint64(n)
		t.Run(fmt.Sprint(seed), func(t *testing.T) { streamModelRun(t, seed, steps) })
		if t.Failed() {
			t.Fatalf("repeat with -streamseed %d", seed)
		}
	}
}

func streamModelRun(t *testing.T, seed uint64, steps int) {
	r := rand.New(rand.NewPCG(seed, 1))
	o := Options{MemTableBytes: 64 << 10, CacheBytes: 1 << 20}
	if r.IntN(2) == 0 {
		o.RecentBytes = []int64{-1, 2000}[r.IntN(2)]
	}
	l := openTest(t, o)
	defer func() { l.close() }()
	m := &refModel{keys: map[string]*refStream{}, now: l.now.Cluster, wall: uint64(l.now.Wall)}
	keys := []string{"s", "t"}
	var trace []string
	for range steps {
		if r.IntN(3) == 0 {
			l.pass(time.Duration(r.IntN(2000)) * time.Millisecond)
		}
		if l.now.Wall < 0 {
			t.Fatal("time ran backwards")
		}
		m.now, m.wall = l.now.Cluster, uint64(l.now.Wall)
		var cmds []Command
		var wanted []string
		for range 1 + r.IntN(3) {
			c := randomStreamCommand(r, m, keys)
			switch c.(type) {
			case *KeyDelete, *KeyRename, *KeyCopy:
				// What was given earlier in the entry that drops the key cannot be loaded any more: see DESIGN.md.
				if len(cmds) > 0 {
					continue
				}
			}
			cmds = append(cmds, c)
			wanted = append(wanted, m.apply(c))
		}
		results := l.apply(cmds...)
		for i, c := range cmds {
			// What an entry was given and removed behind is loaded as it was, or is told as removed.
			if err := l.e.LoadResult(&results[i]); err != nil {
				t.Fatal(err)
			}
			got := told(c, &results[i])
			trace = append(trace, fmt.Sprintf("%T %+v -> %s", c, c, got))
			if got != wanted[i] {
				t.Fatalf("%s\ngot  %s\nwant %s", strings.Join(trace[max(0, len(trace)-30):], "\n"), got, wanted[i])
			}
		}
		if got, want := l.view(keys), m.view(keys); got != want {
			t.Fatalf("%s\ngot\n%s\nwant\n%s", strings.Join(trace[max(0, len(trace)-30):], "\n"), got, want)
		}
		switch r.IntN(25) {
		case 0:
			l.checkpoint()
		case 1:
			before := l.fullHash()
			l.close()
			l.open()
			if after := l.fullHash(); after != before {
				t.Fatalf("%s\nthe state is %x after a restart, was %x", strings.Join(trace[max(0, len(trace)-30):], "\n"), after, before)
			}
		case 2:
			if err := l.e.flush(); err != nil {
				t.Fatal(err)
			}
		}
	}
}
