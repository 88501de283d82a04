package engine

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"pgregory.net/rapid"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// The queue model says in the plainest way what every feature of the queue does: it keeps each message for ever and
// looks at all of them for every answer. Cursors, spans, blocks and heaps do not occur in it. TestModel has what is
// bounded: full sets, intakes, repeats.
type queueModel struct {
	now int64
	// done are the messages a group has done with in the entry at hand, catching the topics whose head is looked at.
	done     map[*qTopic][]int
	catching map[*qTopic]bool
	dropped  int
	topics   map[string]*qTopic
	uploads  map[uint64]*qUpload
	made     int
}

type qTopic struct {
	made     int
	settings TopicSettings
	messages []*qMessage // in the order of the log
	delayed  []*qMessage
	byID     map[MessageID]*qMessage
	keys     map[string]qKey
	groups   map[string]*qGroup
}

type qKey struct {
	id      MessageID
	expires int64
}

type qMessage struct {
	id                MessageID
	body              []byte
	large             bool
	dep, key          string
	published, expiry int64
	due               int64 // of a delayed one
	moved, gone       bool
	visible           int64 // when it came into the log
	off               int   // -1 while it is delayed
}

type qGroup struct {
	start    int
	epoch    uint64
	settings GroupSettings
	given    map[int]*qLease
	done     map[int]bool
}

type qLease struct {
	modelLease
	base   uint32
	expiry int64
	parked bool
	kept   bool
	note   string
}

type qUpload struct {
	topic    *qTopic
	data     []byte
	parts    uint32
	ended    bool
	deadline int64
}

// due is when a lease that is not parked makes its message deliverable.
func (l *qLease) due() int64 {
	if l.released {
		return l.deadline
	}
	probe := l.modelLease
	return probe.due()
}

func (m *queueModel) topic(name string) *qTopic {
	t := m.topics[name]
	if t == nil {
		m.made++
		t = &qTopic{made: m.made, byID: map[MessageID]*qMessage{}, keys: map[string]qKey{}, groups: map[string]*qGroup{}}
		m.topics[name] = t
	}
	return t
}

func (t *qTopic) group(name string, latest bool) *qGroup {
	g := t.groups[name]
	if g == nil {
		g = &qGroup{given: map[int]*qLease{}, done: map[int]bool{}}
		if latest {
			g.start = len(t.messages)
		}
		t.groups[name] = g
	}
	return g
}

// begin does what an entry does before its commands.
func (m *queueModel) begin(now int64) {
	m.now = now
	for id, u := range m.uploads {
		if u.deadline <= now {
			delete(m.uploads, id)
		}
	}
	type ripe struct {
		t *qTopic
		x *qMessage
	}
	var all []ripe
	for _, t := range m.topics {
		t.delayed = slices.DeleteFunc(t.delayed, func(x *qMessage) bool {
			if x.due <= now {
				all = append(all, ripe{t, x})
			}
			return x.due <= now
		})
	}
	moved := func(x *qMessage) int {
		if x.moved {
			return 0
		}
		return 1
	}
	slices.SortFunc(all, func(a, b ripe) int {
		return cmp.Or(cmp.Compare(a.x.due, b.x.due), cmp.Compare(a.t.made, b.t.made), cmp.Compare(a.x.id.Index, b.x.id.Index),
			cmp.Compare(moved(a.x), moved(b.x)), cmp.Compare(a.x.id.Pos, b.x.id.Pos))
	})
	for _, r := range all {
		if r.x.expiry > now {
			r.x.off, r.x.visible = len(r.t.messages), now
			r.t.messages = append(r.t.messages, r.x)
		}
	}
}

// fold gives up what was delivered too often by the time that has come.
func (m *queueModel) fold(t *qTopic, g *qGroup) {
	for off, l := range g.given {
		if !l.parked && !l.released && l.deadline <= m.now && l.deadline < l.expiry && g.settings.MaxDeliveries > 0 && l.count-l.base >= g.settings.MaxDeliveries {
			m.giveUp(g, off, l)
		}
	}
	for off, l := range g.given {
		if l.expiry <= m.now {
			delete(g.given, off)
			g.done[off] = true
		}
	}
}

// drop removes, at the end of an entry, what all groups have done with, in topics that ask for it.
func (m *queueModel) drop() {
	for t, offs := range m.done {
		m.catching[t] = true
		for _, off := range offs {
			if x := t.messages[off]; t.settings.DropAcknowledged && !m.needed(t, off) && x.expiry > m.now {
				m.remove(x)
			}
		}
	}
	for t := range m.catching {
		for off, x := range t.messages {
			if x.gone || x.expiry <= m.now {
				continue
			}
			if !t.settings.DropAcknowledged || m.needed(t, off) {
				break
			}
			m.remove(x)
		}
	}
	clear(m.done)
	clear(m.catching)
}

func (m *queueModel) remove(x *qMessage) {
	if !x.gone {
		m.dropped++
	}
	x.gone = true
}

func (m *queueModel) needed(t *qTopic, off int) bool {
	for _, g := range t.groups {
		m.fold(t, g)
		if g.given[off] != nil || !g.done[off] && off >= g.start {
			return true
		}
	}
	return len(t.groups) == 0
}

func (m *queueModel) giveUp(g *qGroup, off int, l *qLease) {
	if !g.settings.Park {
		delete(g.given, off)
		g.done[off] = true
		return
	}
	l.parked, l.routed = true, false
	if keep := g.settings.ParkedRetention.Milliseconds(); keep > 0 && l.expiry != never && l.deadline+keep > l.expiry {
		l.expiry, l.kept = l.deadline+keep, true
	}
}

func (m *queueModel) inflight(g *qGroup) int {
	n := 0
	for _, l := range g.given {
		if !l.parked && !l.released && l.deadline > m.now {
			n++
		}
	}
	return n
}

func (g *qGroup) most(asked int) int {
	if own := g.settings.MaxConcurrency; own > 0 && (asked == 0 || own < asked) {
		return own
	}
	return asked
}

func (m *queueModel) held(g *qGroup, x *qMessage) int64 {
	if g.settings.InitialDelay == 0 {
		return g.settings.NotBefore
	}
	return max(g.settings.NotBefore, x.published+g.settings.InitialDelay.Milliseconds())
}

// sees reports whether a receive for a deployment is given messages of another one.
func (g *qGroup) sees(asked, dep string) bool {
	if asked != "" {
		return asked == dep
	}
	return !slices.Contains(g.settings.ExcludeDeployments, dep)
}

// order returns what a receive is given, in order.
func (m *queueModel) order(t *qTopic, g *qGroup, dep string) (fresh, retried []int) {
	m.fold(t, g)
	for off := g.start; off < len(t.messages); off++ {
		x := t.messages[off]
		if x.gone || x.expiry <= m.now || g.given[off] != nil || g.done[off] || !g.sees(dep, x.dep) {
			continue
		}
		if m.held(g, x) > m.now {
			break
		}
		fresh = append(fresh, off)
	}
	for off, l := range g.given {
		if !l.parked && l.due() <= m.now && g.sees(dep, t.messages[off].dep) {
			retried = append(retried, off)
		}
	}
	slices.SortFunc(retried, func(a, b int) int {
		return cmp.Or(cmp.Compare(g.given[a].due(), g.given[b].due()), cmp.Compare(a, b))
	})
	return fresh, retried
}

// expiring counts what expires before it is reached when so many are taken in 1000 seconds.
func (m *queueModel) expiring(t *qTopic, g *qGroup, dep string, rate uint64) (count uint64) {
	if dep == "" {
		dep = g.settings.Deployment
	}
	rank := int64(0)
	for off := g.start; off < len(t.messages); off++ {
		x := t.messages[off]
		if x.gone || x.expiry <= m.now || g.given[off] != nil || g.done[off] || !g.sees(dep, x.dep) {
			continue
		}
		rank++
		late := rate == DrainNone || max(m.now+rank*1_000_000/int64(rate), m.held(g, x)) >= x.expiry
		if x.expiry != never && (late || t.settings.Paused || g.settings.Paused) {
			count++
		}
	}
	return count
}

func (m *queueModel) deliverable(t *qTopic, g *qGroup, dep string) bool {
	if dep == "" {
		dep = g.settings.Deployment
	}
	fresh, retried := m.order(t, g, dep)
	if most := g.most(0); most > 0 && m.inflight(g) >= most {
		return false
	}
	return !t.settings.Paused && !g.settings.Paused && len(fresh)+len(retried) > 0
}

func (m *queueModel) grant(t *qTopic, g *qGroup, off int, vis time.Duration) string {
	l := g.given[off]
	if l == nil {
		l = &qLease{expiry: t.messages[off].expiry}
		g.given[off] = l
	}
	g.epoch++
	l.epoch = g.epoch
	l.count++
	l.granted, l.deadline, l.released, l.routed = m.now, m.now+vis.Milliseconds(), false, false
	return fmt.Sprintf("%d@%d#%d ", off, l.epoch, l.count)
}

func (m *queueModel) receive(c *Receive) string {
	t := m.topic(c.Topic)
	g := t.group(c.Group, c.Latest)
	dep := c.Deployment
	if dep == "" {
		dep = g.settings.Deployment
	}
	fresh, retried := m.order(t, g, dep)
	most, room := g.most(c.MaxConcurrency), c.Max
	if most > 0 {
		room = min(room, most-m.inflight(g))
	}
	paused := t.settings.Paused || g.settings.Paused
	if paused {
		room = 0
	}
	out := ""
	for _, off := range append(fresh, retried...) {
		if room <= 0 {
			break
		}
		room--
		out += m.grant(t, g, off, c.Visibility)
	}
	switch {
	case out != "":
		return "ok " + out
	case !paused && most > 0 && m.inflight(g) >= most:
		return errs.ConcurrencyLimit.String() + " "
	}
	return "ok "
}

func (m *queueModel) receiveID(c *ReceiveID) string {
	t := m.topics[c.Topic]
	if t == nil {
		return errs.MessageNotFound.String()
	}
	if c.ID.Kind == KindDuplicate {
		if x := t.byID[c.ID.Original()]; x != nil && !x.gone && x.expiry > m.now {
			return errs.Duplicate.String()
		}
		return errs.MessageNotFound.String()
	}
	x := t.byID[c.ID]
	switch {
	case x == nil || x.gone || x.expiry <= m.now || c.Deployment != "" && c.Deployment != x.dep:
		return errs.MessageNotFound.String()
	case x.off < 0:
		return errs.NotYetVisible.String()
	}
	g := t.group(c.Group, false)
	m.fold(t, g)
	l := g.given[x.off]
	most := g.most(c.MaxConcurrency)
	switch {
	case g.done[x.off] || l == nil && x.off < g.start:
		return errs.AlreadyAcknowledged.String()
	case l != nil && l.parked:
		return errs.Parked.String()
	case l != nil && !l.released && l.routed && l.deadline > m.now:
		l.count--
		return "ok " + m.grant(t, g, x.off, c.Visibility)
	case t.settings.Paused || g.settings.Paused:
		return errs.Paused.String()
	case l != nil && !l.released && l.deadline > m.now:
		return errs.LeasedElsewhere.String()
	case l != nil && l.due() > m.now, l == nil && m.held(g, x) > m.now:
		return errs.NotYetVisible.String()
	case most > 0 && m.inflight(g) >= most:
		return errs.ConcurrencyLimit.String()
	}
	return "ok " + m.grant(t, g, x.off, c.Visibility)
}

// settle is what becomes of one receipt; of is the group that gave it.
func (m *queueModel) settle(c *Settle, of *qGroup, off int, epoch uint64) errs.Code {
	t := m.topics[c.Topic]
	if t == nil || t.groups[c.Group] != of {
		return errs.MessageNotFound
	}
	g := of
	m.fold(t, g)
	l := g.given[off]
	switch {
	case l == nil, c.Deployment != "" && c.Deployment != t.messages[off].dep:
		return errs.MessageNotFound
	case l.epoch != epoch:
		return errs.NotHolder
	case l.released || l.parked:
		return errs.NotInFlight
	case l.deadline <= m.now:
		return errs.LeaseExpired
	}
	until := m.now + c.Visibility.Milliseconds()
	switch {
	case c.Op == Acknowledge:
		delete(g.given, off)
		g.done[off] = true
		m.done[t] = append(m.done[t], off)
	case c.Op == Route:
		l.routed = true
	case c.Op == Release || c.Visibility == 0:
		if c.Reason != "" {
			l.note = c.Reason
		}
		l.deadline = m.now
		if most := g.settings.MaxDeliveries; most > 0 && l.count-l.base >= most {
			m.giveUp(g, off, l)
			m.done[t] = append(m.done[t], off)
			break
		}
		probe := l.modelLease
		probe.deadline = until
		l.deadline, l.released, l.routed = probe.due(), true, false
	case l.expiry != never && until > l.expiry:
		return errs.ExtendPastExpiry
	default:
		l.deadline = until
	}
	return errs.OK
}

// publish judges a publish and, if it is not refused, makes its messages: the IDs tell where they are.
func (m *queueModel) publish(t *qTopic, index uint64, pos *uint32, messages []NewMessage, large []byte) errs.Code {
	s := &t.settings
	var retentions []time.Duration
	for i := range messages {
		n := &messages[i]
		r := n.Retention
		size := int64(len(n.Body))
		if large != nil {
			size = int64(len(large))
		}
		if r > 0 && n.Delay > r {
			return errs.BadRequest
		}
		if s.MessageBytesMax > 0 && size > s.MessageBytesMax {
			return errs.MessageTooLarge
		}
		if n.RetentionDefault {
			if r = s.RetentionDefault; r == 0 {
				r = limits.RetentionDefault
			}
		}
		if r == 0 {
			r = s.RetentionDefault
		}
		if s.RetentionMax > 0 && (r == 0 || r > s.RetentionMax) {
			r = s.RetentionMax
		}
		if r > 0 && n.Delay > r {
			return errs.BadRequest
		}
		retentions = append(retentions, r)
	}
	if s.DepthMax > 0 {
		held := len(t.delayed) + len(messages)
		for off, x := range t.messages {
			if !x.gone && x.expiry > m.now {
				held += len(t.messages) - off
				break
			}
		}
		if uint64(held) > s.DepthMax {
			return errs.TopicFull
		}
	}
	for i := range messages {
		n := &messages[i]
		x := &qMessage{id: MessageID{Index: index, Pos: *pos, Kind: KindPlain}, body: n.Body, large: large != nil, dep: n.Deployment, key: n.Key,
			published: m.now, expiry: never, visible: m.now, off: -1}
		*pos++
		if large != nil {
			x.body = large
		}
		window := limits.RetentionMax.Milliseconds()
		if retentions[i] > 0 {
			window = retentions[i].Milliseconds()
			x.expiry = m.now + window
		}
		if n.Delay > 0 {
			x.id.Kind = KindDelayed
		}
		if n.Key != "" {
			name := n.Deployment + "/" + n.Key
			if k, ok := t.keys[name]; ok && k.expires > m.now {
				continue
			}
			t.keys[name] = qKey{x.id, m.now + window}
		}
		t.byID[x.id] = x
		if n.Delay > 0 {
			x.due = m.now + n.Delay.Milliseconds()
			t.delayed = append(t.delayed, x)
			continue
		}
		x.off = len(t.messages)
		t.messages = append(t.messages, x)
	}
	return errs.OK
}

func (m *queueModel) purge(t *qTopic) {
	for _, x := range t.byID {
		x.gone = true
	}
	t.delayed, t.keys = nil, map[string]qKey{}
	for _, g := range t.groups {
		g.start = len(t.messages)
		clear(g.given)
		clear(g.done)
	}
}

func (m *queueModel) groupSet(c *GroupSet) errs.Code {
	t := m.topics[c.Topic]
	var g *qGroup
	if t != nil {
		g = t.groups[c.Group]
	}
	created := g == nil
	switch {
	case created && c.Create:
		t = m.topic(c.Topic)
		g = t.group(c.Group, false)
	case t == nil:
		return errs.TopicNotFound
	case g == nil:
		return errs.GroupNotFound
	}
	m.fold(t, g)
	if created || c.Seek {
		g.start = 0
		switch c.Start.Kind {
		case StartEnd:
			g.start = len(t.messages)
		case StartTime:
			at := c.Start.Time - testStart.Wall + testStart.Cluster
			g.start = len(t.messages)
			for off, x := range t.messages {
				if x.visible >= at {
					g.start = off
					break
				}
			}
		}
		for off, l := range g.given {
			if !l.parked {
				delete(g.given, off)
			}
		}
		clear(g.done)
		m.catching[t] = true
	}
	if c.Settings != nil {
		g.settings = *c.Settings
		if d := g.settings.StartDelay; d > 0 {
			g.settings.NotBefore, g.settings.StartDelay = m.now+d.Milliseconds(), 0
		}
		m.fold(t, g)
	}
	return errs.OK
}

func (m *queueModel) parked(c *Parked) string {
	t := m.topics[c.Topic]
	switch {
	case t == nil:
		return errs.TopicNotFound.String() + " 0 0"
	case t.groups[c.Group] == nil:
		return errs.GroupNotFound.String() + " 0 0"
	}
	g := t.groups[c.Group]
	m.fold(t, g)
	var offs []int
	next := 0
	for off, x := range t.messages {
		l := g.given[off]
		switch {
		case l == nil || !l.parked || off < int(c.From) || !strings.Contains(l.note, c.Filter.Error):
		case len(c.Filter.IDs) > 0 && !slices.Contains(c.Filter.IDs, x.id):
		case len(offs) == c.Max:
			if next == 0 && len(c.Filter.IDs) == 0 {
				next = off
			}
		default:
			offs = append(offs, off)
		}
	}
	for _, off := range offs {
		l := g.given[off]
		switch {
		case c.DryRun:
		case c.Op == Redrive:
			l.parked, l.released, l.deadline, l.base = false, true, m.now, l.count
		default:
			delete(g.given, off)
			g.done[off] = true
			m.done[t] = append(m.done[t], off)
		}
	}
	return fmt.Sprintf("ok %d %d", len(offs), next)
}

func (m *queueModel) change(c *Delayed) errs.Code {
	t := m.topics[c.Topic]
	if t == nil {
		return errs.MessageNotFound
	}
	x := t.byID[c.ID]
	switch {
	case x == nil || x.gone || x.expiry <= m.now:
		return errs.MessageNotFound
	case x.off >= 0:
		return errs.Conflict
	case !c.Cancel && m.now+c.Delay.Milliseconds() > x.expiry:
		return errs.BadRequest
	case c.Cancel:
		x.gone = true
		t.delayed = slices.DeleteFunc(t.delayed, func(y *qMessage) bool { return y == x })
	default:
		x.due, x.moved = m.now+c.Delay.Milliseconds(), true
	}
	return errs.OK
}

// qGrant is a grant that was seen, and what the observer knows of it.
type qGrant struct {
	receipt      Receipt
	topic, group string
	of           *qGroup
	dep          string
}

// qSeen is what an observer who knows nothing of the model has seen of one message and group: S1 to S10 are judged by
// it.
type qSeen struct {
	until int64
	count uint32
	acked bool
}

type queueMachine struct {
	l       *testLog
	fs      *vfs.MemFS
	m       *queueModel
	ids     []MessageID
	idTopic []string
	grants  []qGrant
	uploads []uint64
	seen    map[[3]uint64]*qSeen // topic incarnation, group incarnation, offset
	epochs  map[[2]uint64]uint64
	bodies  map[string]int64 // of every message that was accepted: when it may first be given
	keyed   map[string]MessageID
	waiters map[GroupRef]bool
	hits    map[string]int
	serial  int
	// removing: the entry at hand empties or deletes a topic.
	removing bool
}

var (
	depGen  = rapid.SampledFrom([]string{"", "", "x", "y", "z"})
	lifeGen = rapid.SampledFrom([]time.Duration{0, 0, 10 * time.Second, 10 * time.Minute, 49 * time.Hour, 49 * time.Hour})
	// Most of what happens happens to one topic and one group: what is spread out meets nothing.
	qTopicGen = rapid.SampledFrom([]string{"t", "t", "t", "t", "u"})
	qGroupGen = rapid.SampledFrom([]string{"g", "g", "g", "h"})
)

func (q *queueMachine) message(rt *rapid.T) NewMessage {
	q.serial++
	n := NewMessage{Body: fmt.Appendf(nil, "m%d", q.serial), Retention: lifeGen.Draw(rt, "retention"), Deployment: depGen.Draw(rt, "dep")}
	switch rapid.IntRange(0, 5).Draw(rt, "extra") {
	case 0:
		n.Delay = rapid.SampledFrom([]time.Duration{time.Second, 3 * time.Second, 10 * time.Second, 45 * time.Second, 24 * time.Hour}).Draw(rt, "delay")
	case 1:
		n.Key = rapid.SampledFrom([]string{"k", "l"}).Draw(rt, "key")
	case 2:
		n.Key, n.Delay = rapid.SampledFrom([]string{"k", "l"}).Draw(rt, "key"), 2*time.Second
	case 3:
		n.Retention, n.RetentionDefault = 0, true
	}
	return n
}

func (q *queueMachine) settings(rt *rapid.T) *GroupSettings {
	s := &GroupSettings{Paused: rapid.IntRange(0, 7).Draw(rt, "paused") == 5, MaxDeliveries: uint32(rapid.SampledFrom([]int{0, 0, 1, 2}).Draw(rt, "deliveries")),
		Park: rapid.Bool().Draw(rt, "park"), ParkedRetention: rapid.SampledFrom([]time.Duration{0, time.Hour}).Draw(rt, "keep"),
		InitialDelay: rapid.SampledFrom([]time.Duration{0, 0, 0, 4 * time.Second}).Draw(rt, "initial"),
		StartDelay:   rapid.SampledFrom([]time.Duration{0, 0, 0, 3 * time.Second}).Draw(rt, "start"), MaxConcurrency: concGen.Draw(rt, "conc")}
	switch rapid.IntRange(0, 4).Draw(rt, "deployments") {
	case 0:
		s.Deployment = "x"
	case 1, 2:
		s.ExcludeDeployments = []string{"x"}
	case 3:
		s.ExcludeDeployments = []string{"x", "y"}
	}
	return s
}

// someID is an ID that was given out, or one that does not exist.
func (q *queueMachine) someID(rt *rapid.T, topic string) (string, MessageID) {
	if len(q.ids) == 0 || rapid.IntRange(0, 9).Draw(rt, "known") == 0 {
		return topic, MessageID{Index: uint64(len(q.l.entries)) + 1, Pos: uint32(rapid.IntRange(0, 2).Draw(rt, "pos")), Kind: KindDelayed}
	}
	i := rapid.IntRange(max(0, len(q.ids)-12), len(q.ids)-1).Draw(rt, "id")
	return q.idTopic[i], q.ids[i]
}

func (q *queueMachine) draw(rt *rapid.T) Command {
	topic, group := qTopicGen.Draw(rt, "topic"), qGroupGen.Draw(rt, "group")
	verbs := []string{"publish", "publish", "publish", "publish", "receive", "receive", "receive", "receive", "receive", "exclude", "exclude", "byid", "ack", "ack", "release", "release", "extend", "route",
		"set", "set", "seek", "topic", "purge", "delete", "ungroup", "parked", "parked", "delayed", "upload", "upload"}
	switch rapid.SampledFrom(verbs).Draw(rt, "verb") {
	case "publish":
		p := &Publish{Topic: topic}
		for range rapid.IntRange(1, 4).Draw(rt, "count") {
			p.Messages = append(p.Messages, q.message(rt))
		}
		return p
	case "receive":
		return &Receive{Topic: topic, Group: group, Max: rapid.IntRange(1, 5).Draw(rt, "max"), Visibility: visGen.Draw(rt, "vis"),
			MaxConcurrency: concGen.Draw(rt, "conc"), Deployment: depGen.Draw(rt, "dep"), Latest: rapid.Bool().Draw(rt, "latest")}
	case "byid":
		c := &ReceiveID{Group: group, Visibility: visGen.Draw(rt, "vis"), MaxConcurrency: concGen.Draw(rt, "conc"), Deployment: depGen.Draw(rt, "dep")}
		c.Topic, c.ID = q.someID(rt, topic)
		return c
	case "ack":
		return q.drawSettle(rt, &Settle{Op: Acknowledge})
	case "release":
		return q.drawSettle(rt, &Settle{Op: Release, Visibility: rapid.SampledFrom([]time.Duration{0, 0, 2 * time.Second, time.Minute}).Draw(rt, "vis"),
			Reason: rapid.SampledFrom([]string{"", "bad", "worse"}).Draw(rt, "reason")})
	case "extend":
		return q.drawSettle(rt, &Settle{Op: Extend, Visibility: visGen.Draw(rt, "vis")})
	case "route":
		return q.drawSettle(rt, &Settle{Op: Route})
	case "set":
		return &GroupSet{Topic: topic, Group: group, Create: rapid.Bool().Draw(rt, "create"), Settings: q.settings(rt)}
	case "exclude":
		return &GroupSet{Topic: topic, Group: group, Create: true, Settings: &GroupSettings{
			ExcludeDeployments: rapid.SampledFrom([][]string{nil, {"x"}, {"x", "y"}, {"y"}}).Draw(rt, "excluded")}}
	case "seek":
		c := &GroupSet{Topic: topic, Group: group, Seek: true}
		c.Start.Kind = rapid.SampledFrom([]StartKind{StartBeginning, StartEnd, StartTime}).Draw(rt, "kind")
		if c.Start.Kind == StartTime {
			c.Start.Time = q.l.now.Wall - rapid.Int64Range(0, 20_000).Draw(rt, "ago")
		}
		return c
	case "topic":
		return &TopicSet{Topic: topic, Create: true, Settings: &TopicSettings{Paused: rapid.IntRange(0, 9).Draw(rt, "paused") == 5,
			RetentionMax: rapid.SampledFrom([]time.Duration{0, 0, 30 * time.Second}).Draw(rt, "longest"), RetentionDefault: 20 * time.Second,
			DepthMax: uint64(rapid.SampledFrom([]int{0, 0, 12}).Draw(rt, "depth")), DropAcknowledged: rapid.Bool().Draw(rt, "drop")}}
	case "purge":
		if rapid.IntRange(0, 7).Draw(rt, "really") == 5 {
			return &Purge{Topic: topic}
		}
	case "delete":
		if rapid.IntRange(0, 7).Draw(rt, "really") == 5 {
			return &TopicDelete{Topic: topic}
		}
	case "ungroup":
		if rapid.IntRange(0, 7).Draw(rt, "really") == 5 {
			return &GroupDelete{Topic: topic, Group: group}
		}
	case "parked":
		c := &Parked{Topic: topic, Group: group, Op: rapid.SampledFrom([]ParkedOp{Redrive, Drop}).Draw(rt, "op"), Max: rapid.IntRange(1, 3).Draw(rt, "max"),
			DryRun: rapid.IntRange(0, 3).Draw(rt, "dry") == 0}
		c.Filter.Error = rapid.SampledFrom([]string{"", "", "ba", "worse"}).Draw(rt, "error")
		if rapid.IntRange(0, 3).Draw(rt, "ids") == 0 {
			_, id := q.someID(rt, topic)
			c.Filter.IDs = []MessageID{id}
		}
		return c
	case "delayed":
		c := &Delayed{Cancel: rapid.Bool().Draw(rt, "cancel"), Delay: rapid.SampledFrom([]time.Duration{0, time.Second, 20 * time.Second, time.Hour}).Draw(rt, "delay")}
		c.Topic, c.ID = q.someID(rt, topic)
		if c.Cancel {
			c.Delay = 0
		}
		return c
	case "upload":
		return q.drawUpload(rt, topic)
	}
	return &Tick{}
}

func (q *queueMachine) drawUpload(rt *rapid.T, topic string) Command {
	if len(q.uploads) == 0 || rapid.IntRange(0, 3).Draw(rt, "open") == 0 {
		return &UploadOpen{Topic: topic, Key: rapid.SampledFrom([]string{"", "", "k"}).Draw(rt, "key"), Deployment: depGen.Draw(rt, "dep")}
	}
	id := q.uploads[rapid.IntRange(max(0, len(q.uploads)-3), len(q.uploads)-1).Draw(rt, "upload")]
	u := q.m.uploads[id]
	if u == nil {
		return &UploadPart{Upload: id, Data: []byte("late")}
	}
	switch rapid.SampledFrom([]string{"part", "commit", "commit", "abort"}).Draw(rt, "step") {
	case "part":
		size := rapid.SampledFrom([]int{1, 9, 9, limits.PartBytes}).Draw(rt, "size")
		q.serial++
		data := bytes.Repeat([]byte{byte(q.serial)}, size)
		return &UploadPart{Upload: id, Number: u.parts, Data: data}
	case "commit":
		if u.parts > 0 {
			n := q.message(rt)
			n.Body = nil
			return &UploadCommit{Upload: id, Message: n, Parts: u.parts, Bytes: int64(len(u.data)), CRC: crc32.Checksum(u.data, castagnoli)}
		}
	}
	return &UploadAbort{Upload: id}
}

func (q *queueMachine) drawSettle(rt *rapid.T, c *Settle) Command {
	if len(q.grants) == 0 {
		return &Tick{}
	}
	first := rapid.IntRange(max(0, len(q.grants)-10), len(q.grants)-1).Draw(rt, "receipt")
	g := q.grants[first]
	c.Topic, c.Group = g.topic, g.group
	if rapid.IntRange(0, 3).Draw(rt, "named") == 0 {
		c.Deployment = depGen.Draw(rt, "dep")
	}
	for _, o := range q.grants[first:min(len(q.grants), first+rapid.IntRange(1, 3).Draw(rt, "receipts"))] {
		if o.of == g.of {
			c.Receipts = append(c.Receipts, o.receipt)
		}
	}
	return c
}

// apply proposes the commands as one entry and compares every result with the model's.
func (q *queueMachine) apply(rt *rapid.T, cmds []Command) []Result {
	q.l.t = rt
	q.removing = slices.ContainsFunc(cmds, func(c Command) bool { return c.Kind() == CmdPurge || c.Kind() == CmdTopicDelete })
	res := q.l.apply(cmds...)
	index := uint64(len(q.l.entries))
	q.m.begin(q.l.now.Cluster)
	pos := uint32(0)
	for i, c := range cmds {
		r := &res[i]
		got, want := r.Code.String(), "ok"
		before := pos
		switch c := c.(type) {
		case *Publish:
			t := q.m.topics[c.Topic]
			if t == nil && !slices.ContainsFunc(c.Messages, func(n NewMessage) bool { return n.Retention > 0 && n.Delay > n.Retention }) {
				t = q.m.topic(c.Topic)
			}
			if want = errs.BadRequest.String(); t != nil {
				want = q.m.publish(t, index, &pos, c.Messages, nil).String()
			}
			q.published(rt, c.Topic, r, c.Messages)
		case *Receive:
			want, got = q.m.receive(c), show(c, r)
			q.observe(rt, c.Topic, c.Group, c.Deployment, r, false)
		case *ReceiveID:
			want, got = q.m.receiveID(c), show(c, r)
			q.observe(rt, c.Topic, c.Group, c.Deployment, r, true)
		case *Settle:
			var codes []errs.Code
			for _, rc := range c.Receipts {
				of := q.grants[slices.IndexFunc(q.grants, func(g qGrant) bool { return g.receipt == rc })].of
				codes = append(codes, q.m.settle(c, of, int(rc.Offset), rc.Epoch))
			}
			want, got = fmt.Sprint(codes), fmt.Sprint(r.Codes)
			q.settled(rt, c, r)
		case *TopicSet:
			q.m.topic(c.Topic).settings = *c.Settings
			q.m.catching[q.m.topic(c.Topic)] = true
		case *TopicDelete:
			if t := q.m.topics[c.Topic]; t == nil {
				want = errs.TopicNotFound.String()
			} else {
				delete(q.m.topics, c.Topic)
				for id, u := range q.m.uploads {
					if u.topic == t {
						delete(q.m.uploads, id)
					}
				}
				q.forget(c.Topic)
			}
		case *Purge:
			if t := q.m.topics[c.Topic]; t == nil {
				want = errs.TopicNotFound.String()
			} else {
				q.m.purge(t)
				q.forget(c.Topic)
			}
		case *GroupSet:
			want = q.m.groupSet(c).String()
			if c.Seek {
				clear(q.seen) // an explicit repetition: what was seen of the group says nothing any more
			}
		case *GroupDelete:
			switch t := q.m.topics[c.Topic]; {
			case t == nil:
				want = errs.TopicNotFound.String()
			case t.groups[c.Group] == nil:
				want = errs.GroupNotFound.String()
			default:
				delete(t.groups, c.Group)
				q.m.catching[t] = true
			}
		case *Parked:
			want, got = q.m.parked(c), fmt.Sprintf("%v %d %d", r.Code, r.Count, r.Next)
			if r.Count > 0 && !c.DryRun {
				q.hits[fmt.Sprint("parked op ", c.Op)]++
			}
		case *Delayed:
			want = q.m.change(c).String()
		case *UploadOpen:
			want = q.open(c, r, &pos)
			got = fmt.Sprint(r.Upload != 0)
		case *UploadPart:
			want = q.part(c).String()
		case *UploadCommit:
			u := q.m.uploads[c.Upload]
			if want = errs.UploadNotFound.String(); u != nil {
				code := q.m.publish(u.topic, index, &pos, []NewMessage{c.Message}, u.data)
				if want = code.String(); code == errs.OK {
					delete(q.m.uploads, c.Upload)
					q.bodies[string(u.data)] = q.m.now + c.Message.Delay.Milliseconds()
				}
				for name, t := range q.m.topics {
					if t == u.topic {
						q.published(rt, name, r, nil)
					}
				}
			}
		case *UploadAbort:
			if _, ok := q.m.uploads[c.Upload]; !ok {
				want = errs.UploadNotFound.String()
			}
			delete(q.m.uploads, c.Upload)
		}
		if got != want {
			rt.Fatalf("entry %d command %d %T%+v: got %q, want %q", index, i, c, c, got, want)
		}
		for k := range r.Published.Count {
			id := r.Published.ID(int(k))
			if id.Pos != before+k || id.Index != index {
				rt.Fatalf("message %d of %+v has the ID %v", k, c, id)
			}
		}
		q.hits[fmt.Sprintf("%T %s", c, r.Code)]++
	}
	q.m.drop()
	q.hits["dropped"] += q.m.dropped
	q.m.dropped = 0
	for _, ref := range q.l.fx.Deliverable {
		delete(q.waiters, ref)
	}
	for ref := range q.waiters {
		t := q.m.topics[ref.Topic]
		if t == nil || t.groups[ref.Group] == nil {
			rt.Fatalf("%v waits though the group is gone", ref)
		}
		if q.m.deliverable(t, t.groups[ref.Group], ref.Deployment) {
			rt.Fatalf("%v waits though something is deliverable", ref)
		}
	}
	return res
}

// forget: what was seen of a topic that was emptied says nothing any more.
func (q *queueMachine) forget(string) { clear(q.seen) }

func (q *queueMachine) open(c *UploadOpen, r *Result, pos *uint32) string {
	t := q.m.topic(c.Topic)
	if k, ok := t.keys[c.Deployment+"/"+c.Key]; ok && c.Key != "" && k.expires > q.m.now {
		*pos++
		return "false"
	}
	q.m.uploads[r.Upload] = &qUpload{topic: t, deadline: q.m.now + limits.UploadIdleMax.Milliseconds()}
	q.uploads = append(q.uploads, r.Upload)
	return "true"
}

func (q *queueMachine) part(c *UploadPart) errs.Code {
	u := q.m.uploads[c.Upload]
	switch {
	case u == nil:
		return errs.UploadNotFound
	case u.ended:
		return errs.Conflict
	}
	u.data = append(u.data, c.Data...)
	u.parts++
	u.ended = len(c.Data) < limits.PartBytes
	u.deadline = q.m.now + limits.UploadIdleMax.Milliseconds()
	return errs.OK
}

// published notes the IDs of a publish: those of messages, and those of duplicates, which lead to the first of their
// key (S7).
func (q *queueMachine) published(rt *rapid.T, topic string, r *Result, messages []NewMessage) {
	for k := range r.Published.Count {
		id := r.Published.ID(int(k))
		q.ids, q.idTopic = append(q.ids, id), append(q.idTopic, topic)
		t := q.m.topics[topic]
		if id.Kind == KindDuplicate {
			q.hits["duplicate"]++
			if t.byID[id.Original()] == nil {
				rt.Fatalf("%v leads to a message that does not exist", id)
			}
			continue
		}
		if messages != nil {
			q.bodies[string(messages[k].Body)] = q.m.now + messages[k].Delay.Milliseconds()
		}
		if t.byID[id] == nil {
			rt.Fatalf("%v is not the model's", id)
		}
	}
}

func (q *queueMachine) settled(rt *rapid.T, c *Settle, r *Result) {
	for i, rc := range c.Receipts {
		s := q.seen[[3]uint64{rc.Topic, rc.Group, rc.Offset}]
		if r.Codes[i] != errs.OK || s == nil {
			continue
		}
		switch c.Op {
		case Acknowledge:
			s.acked = true
		case Route:
			s.until = 0 // whoever asks for it may have it
		default:
			s.until = q.m.now + c.Visibility.Milliseconds()
		}
	}
}

func (q *queueMachine) observe(rt *rapid.T, topic, group, dep string, r *Result, byID bool) {
	if len(r.Deliveries) == 0 {
		return
	}
	if err := q.l.e.Load(r.Deliveries); err != nil && !errors.Is(err, errs.Of(errs.MessageNotFound)) {
		rt.Fatal(err)
	}
	t := q.m.topics[topic]
	for _, d := range r.Deliveries {
		x := t.messages[d.Receipt.Offset]
		body := d.Body
		if d.Large != nil {
			q.hits["large"]++
			body = nil
			for n := range d.Large.Parts {
				part, err := q.l.e.LoadPart(*d.Large, n)
				if err != nil {
					rt.Fatal(err)
				}
				body = append(body, part...)
			}
		}
		k := [3]uint64{d.Receipt.Topic, d.Receipt.Group, d.Receipt.Offset}
		s := q.seen[k]
		if s == nil {
			s = &qSeen{}
			q.seen[k] = s
		}
		first, sent := q.bodies[string(body)]
		check := func(ok bool, invariant string) {
			if !ok {
				rt.Fatalf("%s does not hold: %s/%s was given %v of %q at %d, known of it: %+v", invariant, topic, group, d.Receipt, body[:min(9, len(body))], q.m.now, s)
			}
		}
		check(!s.acked, "S3")
		l := t.groups[group].given[x.off] // the model has given it as well
		redriven := l != nil && l.base > 0 && l.count == l.base+1
		check(s.until <= q.m.now || redriven, "S4")
		check(d.Receipt.Epoch > q.epochs[[2]uint64{k[0], k[1]}], "S5")
		check(d.Count > s.count || byID && d.Count == s.count, "S6")
		check(x.moved || first <= q.m.now || d.Gone, "S8")
		check(q.m.now < x.expiry || t.groups[group].given[x.off].kept, "S9")
		check(d.ID == x.id, "S10")
		if d.Gone { // what the same entry dropped again cannot be loaded
			check(q.removing, "S1")
		} else {
			check(sent && bytes.Equal(body, x.body) && d.Deployment == x.dep, "S10")
		}
		if x.key != "" {
			// One message a key and group while the key is held: the first one.
			name := fmt.Sprint(k[0], k[1], x.dep, x.key)
			if o, ok := q.keyed[name]; ok && o != x.id {
				old := t.byID[o]
				check(old == nil || old.gone || old.published >= x.expiry || x.published >= old.published+keyLife(old) || old.published >= x.published+keyLife(x), "S7")
			}
			q.keyed[name] = x.id
		}
		if dep != "" && dep != x.dep {
			rt.Fatalf("a receive for %q was given a message of %q", dep, x.dep)
		}
		s.until, s.count = q.m.now+d.LeaseUntil-q.l.e.Stamp().Wall, d.Count
		q.epochs[[2]uint64{k[0], k[1]}] = d.Receipt.Epoch
		q.grants = append(q.grants, qGrant{receipt: d.Receipt, topic: topic, group: group, of: t.groups[group], dep: x.dep})
		if t.groups[group].given[x.off].kept && q.m.now >= x.expiry {
			q.hits["outlived"]++
		}
		if x.off < len(t.messages)-1 && x.dep == "x" && !slices.Contains(t.groups[group].settings.ExcludeDeployments, "x") && d.Count == 1 {
			q.hits["of x"]++
		}
	}
}

// keyLife is how long a message holds its key.
func keyLife(x *qMessage) int64 {
	if x.expiry == never {
		return limits.RetentionMax.Milliseconds()
	}
	return x.expiry - x.published
}

// inspect compares what is said of a group's deployment with the states message by message, and how many of the messages
// that the group's receives will be given expire before that.
func (q *queueMachine) inspect(rt *rapid.T, topic, group, dep string) {
	t := q.m.topics[topic]
	if t == nil || t.groups[group] == nil {
		return
	}
	g := t.groups[group]
	q.m.begin(q.m.now)
	q.m.fold(t, g)
	a, err := q.l.e.Query(Query{Kind: QueryGroup, Topic: topic, Group: group, Deployment: dep, Max: 1})
	if err != nil {
		rt.Fatal(err)
	}
	ready, unsettled, parked := 0, 0, 0
	for off, x := range t.messages {
		if dep != x.dep {
			continue
		}
		switch l := g.given[off]; {
		case l != nil && l.parked:
			parked++
		case l != nil:
			unsettled++
		case off >= g.start && !g.done[off] && !x.gone && x.expiry > q.m.now:
			ready++
		}
	}
	if i := a.Groups[0]; int(i.Ready) != ready || i.Unsettled != unsettled || i.Parked != parked {
		rt.Fatalf("%s/%s of %q: ready %d unsettled %d parked %d, want %d %d %d", topic, group, dep, i.Ready, i.Unsettled, i.Parked, ready, unsettled, parked)
	}
	rate := rapid.SampledFrom([]uint64{1, 100, 500, 10_000, DrainNone}).Draw(rt, "rate")
	for _, asked := range []string{"", dep} {
		a, err := q.l.e.Query(Query{Kind: QueryGroup, Topic: topic, Group: group, Deployment: asked, Max: 1, DrainRate: rate})
		if err != nil {
			rt.Fatal(err)
		}
		if got, want := a.Groups[0].Expiring, q.m.expiring(t, g, asked, rate); got != want {
			rt.Fatalf("%s/%s of %q at %d: %d expire unreached, want %d", topic, group, asked, rate, got, want)
		} else if want > 0 {
			q.hits["expiring"]++
		}
	}
	q.hits["inspected"]++
}

// TestQueueModel drives the engine and the plain model with the same random commands of every queue feature: delays,
// keys, releases, parking, deployments, purges and deletions, seeks, pauses, uploads in parts, retentions of their own;
// through checkpoints, restarts and power losses. Every result is compared, and S1 to S10 are judged by what was seen.
func TestQueueModel(t *testing.T) {
	setRapid(t, 120, 8000)
	checkUntil(t, queueModelRun, "*engine.Receive ok", "*engine.Receive concurrency_limit", "*engine.ReceiveID ok", "*engine.ReceiveID duplicate", "*engine.ReceiveID not_yet_visible",
		"*engine.ReceiveID parked", "*engine.ReceiveID paused", "*engine.Publish topic_full", "*engine.Delayed ok", "*engine.Delayed conflict", "*engine.UploadCommit ok",
		"*engine.UploadPart upload_not_found", "*engine.TopicDelete ok", "*engine.Purge ok", "duplicate", "parked op 1", "parked op 2", "large", "outlived", "of x", "inspected", "expiring", "dropped", "waited", "crash")
}

func queueModelRun(rt *rapid.T, hits map[string]int) {
	fs := vfs.NewCrashableMem()
	q := &queueMachine{fs: fs, m: &queueModel{done: map[*qTopic][]int{}, catching: map[*qTopic]bool{}, topics: map[string]*qTopic{}, uploads: map[uint64]*qUpload{}}, seen: map[[3]uint64]*qSeen{}, epochs: map[[2]uint64]uint64{},
		bodies: map[string]int64{}, keyed: map[string]MessageID{}, waiters: map[GroupRef]bool{}, hits: hits}
	o := Options{FS: fs, Dir: "engine", RecentBytes: rapid.SampledFrom([]int64{-1, 300, 1 << 20}).Draw(rt, "recent"), CacheBytes: 1 << 20, MemTableBytes: 256 << 10}
	q.l = &testLog{t: rt, o: o, now: testStart}
	q.l.open()
	defer func() { q.l.close() }()
	q.m.now = q.l.now.Cluster
	rt.Repeat(map[string]func(*rapid.T){
		"apply": func(rt *rapid.T) {
			q.l.pass(rapid.SampledFrom([]time.Duration{0, 0, time.Millisecond, time.Second, 3 * time.Second}).Draw(rt, "pass"))
			var cmds []Command
			for range rapid.SampledFrom([]int{1, 3, 5, 8, 12}).Draw(rt, "commands") {
				c := q.draw(rt)
				cmds = append(cmds, c)
				if _, ok := c.(*UploadPart); ok {
					break // the next step depends on what comes of it
				}
			}
			uploads := 0
			q.apply(rt, slices.DeleteFunc(cmds, func(c Command) bool {
				switch c.(type) {
				case *Tick:
					return true
				case *UploadPart, *UploadCommit, *UploadAbort:
					uploads++
					return uploads > 1
				}
				return false
			}))
		},
		"pass": func(rt *rapid.T) {
			q.l.pass(rapid.SampledFrom([]time.Duration{5 * time.Second, 5 * time.Second, 31 * time.Second, 31 * time.Second, 2 * time.Minute, 25 * time.Hour}).Draw(rt, "pass"))
			q.apply(rt, nil)
		},
		"park": func(rt *rapid.T) {
			ref := GroupRef{Topic: qTopicGen.Draw(rt, "topic"), Group: qGroupGen.Draw(rt, "group"), Deployment: depGen.Draw(rt, "dep")}
			parked, err := q.l.e.Park(&Receive{Topic: ref.Topic, Group: ref.Group, Max: 1, Deployment: ref.Deployment, Park: true}, q.l.now, func() {})
			if err != nil {
				rt.Fatal(err)
			}
			if !parked {
				return
			}
			t := q.m.topics[ref.Topic]
			q.hits["waited"]++
			if q.m.deliverable(t, t.groups[ref.Group], ref.Deployment) && q.m.now == q.l.now.Cluster {
				rt.Fatalf("%v was parked though something is deliverable", ref)
			}
			q.waiters[ref] = true
		},
		"exhaust": func(rt *rapid.T) {
			// Messages that are given up, and what can be done about them, before and after their own ends.
			topic, group := qTopicGen.Draw(rt, "topic"), qGroupGen.Draw(rt, "group")
			q.apply(rt, []Command{&Publish{Topic: topic, Messages: []NewMessage{q.message(rt), q.message(rt)}},
				&GroupSet{Topic: topic, Group: group, Create: true, Settings: &GroupSettings{MaxDeliveries: 1, Park: rapid.IntRange(0, 3).Draw(rt, "park") > 0, ParkedRetention: time.Hour}},
				&Receive{Topic: topic, Group: group, Max: 5, Visibility: time.Second}})
			if len(q.grants) > 0 && rapid.Bool().Draw(rt, "released") {
				q.apply(rt, []Command{q.drawSettle(rt, &Settle{Op: Release, Reason: "bad"})})
			}
			q.l.pass(rapid.SampledFrom([]time.Duration{2 * time.Second, 12 * time.Second, 65 * time.Second}).Draw(rt, "pass"))
			c := &ReceiveID{Group: group, Visibility: time.Second}
			c.Topic, c.ID = q.someID(rt, topic)
			p := &Parked{Topic: topic, Group: group, Op: rapid.SampledFrom([]ParkedOp{Redrive, Redrive, Drop}).Draw(rt, "op"), Max: 5}
			if rapid.Bool().Draw(rt, "id") {
				_, id := q.someID(rt, topic)
				p.Filter.IDs = []MessageID{id}
			}
			if rapid.Bool().Draw(rt, "stored") {
				q.l.checkpoint()
			}
			q.apply(rt, []Command{c, p, &Receive{Topic: topic, Group: group, Max: 5, Visibility: time.Second}})
		},
		"upload": func(rt *rapid.T) {
			q.apply(rt, []Command{&UploadOpen{Topic: qTopicGen.Draw(rt, "topic"), Deployment: depGen.Draw(rt, "dep")}})
			for range rapid.IntRange(1, 3).Draw(rt, "steps") {
				q.l.pass(rapid.SampledFrom([]time.Duration{0, time.Second, 40 * time.Second}).Draw(rt, "pass"))
				if c := q.drawUpload(rt, "t"); c.Kind() != CmdUploadOpen {
					q.apply(rt, []Command{c})
				}
			}
		},
		"inspect": func(rt *rapid.T) {
			q.apply(rt, nil)
			q.inspect(rt, qTopicGen.Draw(rt, "topic"), qGroupGen.Draw(rt, "group"), rapid.SampledFrom([]string{"x", "y", "z"}).Draw(rt, "dep"))
		},
		"checkpoint": func(rt *rapid.T) {
			q.l.t = rt
			q.l.checkpoint()
		},
		"restart": func(rt *rapid.T) {
			if rapid.IntRange(0, 2).Draw(rt, "really") > 0 {
				return
			}
			q.l.t = rt
			want := q.l.fullHash()
			if rapid.Bool().Draw(rt, "crash") {
				hits["crash"]++
				if rapid.Bool().Draw(rt, "flushed") {
					if err := q.l.e.db.Flush(); err != nil {
						rt.Fatal(err)
					}
				}
				q.fs = q.l.crash(q.fs)
			} else {
				q.l.close()
				q.l.open()
			}
			if q.l.fullHash() != want {
				rt.Fatal("S12 does not hold: the hash is another after a restart")
			}
			clear(q.waiters)
		},
	})
	q.drain(rt)
}

// drain acknowledges everything there is, for every deployment: then each message that lives is done, or parked (S1).
func (q *queueMachine) drain(rt *rapid.T) {
	q.l.pass(2 * time.Hour)
	var open []Command
	for name, t := range q.m.topics {
		open = append(open, &TopicSet{Topic: name, Settings: &TopicSettings{}})
		for group := range t.groups {
			open = append(open, &GroupSet{Topic: name, Group: group, Settings: &GroupSettings{ExcludeDeployments: []string{"y"}}})
		}
	}
	slices.SortFunc(open, func(a, b Command) int { return bytes.Compare(a.AppendTo(nil), b.AppendTo(nil)) })
	q.apply(rt, open)
	for name, t := range q.m.topics {
		for group, g := range t.groups {
			for _, dep := range []string{"", "y"} {
				for {
					r := q.apply(rt, []Command{&Receive{Topic: name, Group: group, Max: 5, Visibility: time.Minute, Deployment: dep}})
					if len(r[0].Deliveries) == 0 {
						break
					}
					c := &Settle{Topic: name, Group: group, Op: Acknowledge}
					for _, d := range r[0].Deliveries {
						c.Receipts = append(c.Receipts, d.Receipt)
					}
					q.apply(rt, []Command{c})
				}
			}
			for off, x := range t.messages {
				if l := g.given[off]; off >= g.start && !x.gone && x.expiry > q.m.now && !g.done[off] && (l == nil || !l.parked) {
					rt.Fatalf("S1 does not hold: %s/%s was never given %q", name, group, x.body[:min(9, len(x.body))])
				}
			}
		}
	}
}
