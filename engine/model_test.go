package engine

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"sort"
	"strconv"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"pgregory.net/rapid"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// campaign reports that the large counts were asked for.
func campaign() bool {
	return os.Getenv("TERCET_CAMPAIGN") != "" || os.Getenv("TERCET_TEST_ALL") == "1"
}

// The model says in the plainest way what queues do: every message of a topic, and for every group what
// became of each. It shares no code with the engine beyond types.
type model struct {
	now          int64
	topics       map[string]*modelTopic
	unsettledMax int
}

type modelTopic struct {
	messages []modelMessage
	groups   map[string]*modelGroup
}

type modelMessage struct {
	id     MessageID
	body   string
	expiry int64
}

type modelGroup struct {
	start int // the first message it is to get
	next  int // below: looked at
	epoch uint64
	given map[int]*modelLease
	done  map[int]bool
}

type modelLease struct {
	epoch             uint64
	count             uint32
	deadline, granted int64
	released          bool
	routed            bool
}

func (l *modelLease) due() int64 {
	if l.released {
		return l.deadline
	}
	wait := int64(0)
	if l.count > 32 {
		wait = 900_000
		if l.count < 42 {
			wait = int64(1000) << (l.count - 32)
		}
	}
	return max(l.deadline, l.granted+wait)
}

func newModel(limit int) *model {
	return &model{topics: map[string]*modelTopic{}, unsettledMax: limit}
}

func (m *model) topic(name string) *modelTopic {
	t := m.topics[name]
	if t == nil {
		t = &modelTopic{groups: map[string]*modelGroup{}}
		m.topics[name] = t
	}
	return t
}

func (t *modelTopic) group(name string, latest bool) *modelGroup {
	g := t.groups[name]
	if g == nil {
		g = &modelGroup{given: map[int]*modelLease{}, done: map[int]bool{}}
		if latest {
			g.start, g.next = len(t.messages), len(t.messages)
		}
		t.groups[name] = g
	}
	return g
}

func (m *model) live(t *modelTopic, off int) bool { return t.messages[off].expiry > m.now }

// unsettled counts what is not done, and what was done out of turn.
func (m *model) unsettled(t *modelTopic, g *modelGroup) int {
	n := 0
	for off := range g.given {
		if m.live(t, off) {
			n++
		}
	}
	for off := range g.done {
		if off >= g.next && m.live(t, off) {
			n++
		}
	}
	return n
}

func (m *model) inflight(t *modelTopic, g *modelGroup) int {
	n := 0
	for off, l := range g.given {
		if m.live(t, off) && !l.released && l.deadline > m.now {
			n++
		}
	}
	return n
}

// order returns what the group may be given now, new ones first. full leaves out the new ones.
func (m *model) order(t *modelTopic, g *modelGroup) (fresh, retried []int) {
	for off := g.next; off < len(t.messages); off++ {
		if m.live(t, off) && g.given[off] == nil && !g.done[off] {
			fresh = append(fresh, off)
		}
	}
	for off, l := range g.given {
		if m.live(t, off) && l.due() <= m.now {
			retried = append(retried, off)
		}
	}
	sort.Slice(retried, func(i, j int) bool {
		a, b := g.given[retried[i]].due(), g.given[retried[j]].due()
		return a < b || a == b && retried[i] < retried[j]
	})
	return fresh, retried
}

func (m *model) deliverable(topic, group string, conc int) bool {
	t := m.topics[topic]
	g := t.groups[group]
	if conc > 0 && m.inflight(t, g) >= conc {
		return false
	}
	fresh, retried := m.order(t, g)
	return len(retried) > 0 || len(fresh) > 0 && m.unsettled(t, g) < m.unsettledMax
}

// earliest is when, from now on, the next lease ends, message becomes due, or message expires.
func (m *model) earliest(topic, group string) int64 {
	t := m.topics[topic]
	at := int64(never)
	for off, l := range t.groups[group].given {
		if !m.live(t, off) {
			continue
		}
		if !l.released && l.deadline > m.now {
			at = min(at, l.deadline)
		}
		if l.due() > m.now {
			at = min(at, l.due())
		}
		at = min(at, t.messages[off].expiry)
	}
	return at
}

func (m *model) publish(name string, index uint64, pos *uint32, msgs []NewMessage) {
	t := m.topic(name)
	for _, n := range msgs {
		e := int64(never)
		if n.Retention > 0 {
			e = m.now + n.Retention.Milliseconds()
		}
		t.messages = append(t.messages, modelMessage{id: MessageID{Index: index, Pos: *pos, Kind: KindPlain}, body: string(n.Body), expiry: e})
		*pos++
	}
}

func (m *model) grant(g *modelGroup, off int, vis time.Duration) string {
	l := g.given[off]
	if l == nil {
		l = &modelLease{}
		g.given[off] = l
	}
	g.epoch++
	l.epoch = g.epoch
	l.count++
	l.granted, l.deadline, l.released, l.routed = m.now, m.now+vis.Milliseconds(), false, false
	return fmt.Sprintf("%d@%d#%d ", off, l.epoch, l.count)
}

func (m *model) receive(c *Receive) string {
	t := m.topic(c.Topic)
	g := t.group(c.Group, c.Latest)
	room := c.Max
	if c.MaxConcurrency > 0 {
		room = min(room, c.MaxConcurrency-m.inflight(t, g))
	}
	fresh, retried := m.order(t, g)
	out := ""
	for _, off := range fresh {
		if room <= 0 || m.unsettled(t, g) >= m.unsettledMax {
			break
		}
		for g.next <= off { // passing a message that was done out of turn makes room
			g.next++
		}
		out += m.grant(g, off, c.Visibility)
		room--
		fresh = fresh[1:]
	}
	if room > 0 && m.unsettled(t, g) < m.unsettledMax && len(fresh) == 0 {
		g.next = len(t.messages)
	}
	for _, off := range retried {
		if room <= 0 {
			break
		}
		out += m.grant(g, off, c.Visibility)
		room--
	}
	if out != "" {
		return "ok " + out
	}
	code := errs.OK
	if n := m.inflight(t, g); c.MaxConcurrency > 0 && n >= c.MaxConcurrency {
		code = errs.ConcurrencyLimit
	} else if m.unsettled(t, g) >= m.unsettledMax {
		code = errs.UnsettledLimit
	}
	if c.Park {
		return code.String() + " parked"
	}
	return code.String() + " "
}

func (m *model) receiveID(c *ReceiveID) string {
	t := m.topics[c.Topic]
	if t == nil {
		return errs.MessageNotFound.String()
	}
	off := slices.IndexFunc(t.messages, func(x modelMessage) bool { return x.id == c.ID })
	if off < 0 || !m.live(t, off) {
		return errs.MessageNotFound.String()
	}
	g := t.group(c.Group, false)
	l := g.given[off]
	switch {
	case g.done[off] || l == nil && off < g.next:
		return errs.AlreadyAcknowledged.String()
	case l != nil && !l.released && l.routed && l.deadline > m.now:
		l.count-- // the delivery is the one that was counted already
		return "ok " + m.grant(g, off, c.Visibility)
	case l != nil && !l.released && l.deadline > m.now:
		return errs.LeasedElsewhere.String()
	case l != nil && l.due() > m.now:
		return errs.NotYetVisible.String()
	case c.MaxConcurrency > 0 && m.inflight(t, g) >= c.MaxConcurrency:
		return errs.ConcurrencyLimit.String()
	case l == nil && m.unsettled(t, g) >= m.unsettledMax:
		return errs.UnsettledLimit.String()
	}
	return "ok " + m.grant(g, off, c.Visibility)
}

func (m *model) settle(c *Settle, off int, epoch uint64) errs.Code {
	t := m.topics[c.Topic]
	if t == nil || t.groups[c.Group] == nil || off >= len(t.messages) {
		return errs.MessageNotFound
	}
	if epoch == 0 {
		return errs.LeaseExpired
	}
	g := t.groups[c.Group]
	l := g.given[off]
	switch {
	case l == nil || !m.live(t, off):
		return errs.MessageNotFound
	case l.epoch != epoch:
		return errs.NotHolder
	case l.released:
		return errs.NotInFlight
	case l.deadline <= m.now:
		return errs.LeaseExpired
	}
	switch {
	case c.Op == Acknowledge:
		delete(g.given, off)
		g.done[off] = true
	case c.Op == Route:
		l.routed = true
	case c.Visibility == 0:
		l.deadline = m.releaseAt(l)
		l.released = true
	case m.now+c.Visibility.Milliseconds() > t.messages[off].expiry:
		return errs.ExtendPastExpiry
	default:
		l.deadline = m.now + c.Visibility.Milliseconds()
	}
	return errs.OK
}

// releaseAt is now, or later if the message has been delivered too often.
func (m *model) releaseAt(l *modelLease) int64 {
	probe := *l
	probe.deadline = m.now
	return probe.due()
}

func show(c Command, r *Result) string {
	switch c.(type) {
	case *Receive, *ReceiveID:
		out := r.Code.String()
		if _, ok := c.(*Receive); ok || len(r.Deliveries) > 0 {
			out += " "
		}
		if r.Parked {
			out += "parked"
		}
		for _, d := range r.Deliveries {
			out += fmt.Sprintf("%d@%d#%d ", d.Receipt.Offset, d.Receipt.Epoch, d.Count)
		}
		return out
	case *Settle:
		return fmt.Sprint(r.Codes)
	}
	return r.Code.String()
}

// grantKey is a message of a group.
type grantKey struct {
	topic, group string
	off          uint64
}

// history checks what any client could see, without the model: leases do not overlap, receipts and counts
// never repeat, what was acknowledged does not come back, nothing is given after its expiry, contents are
// those that were sent.
type history struct {
	until  map[grantKey]int64 // the lease of the last grant runs until then
	count  map[grantKey]uint32
	epochs map[string]uint64 // per group
	acked  map[grantKey]bool
	routed map[grantKey]bool
}

type waiter struct {
	conc     int
	notified bool
	timer    int64
}

type machine struct {
	l       *testLog
	fs      *vfs.MemFS
	m       *model
	h       history
	receipt []Receipt // all ever granted
	of      []grantKey
	ids     []MessageID
	idTopic []string
	waiters map[GroupRef]*waiter
	intake  IntakeID
	nonce   uint64
	heard   int64
	number  uint64
	lowest  uint64
	results map[uint64]string
	numbers map[uint64]Command
	hits    map[string]int
	serial  int
}

func (mc *machine) check(rt *rapid.T, ok bool, format string, args ...any) {
	if !ok {
		rt.Fatalf(format, args...)
	}
}

// apply proposes the commands as one entry and compares every result with the model's.
func (mc *machine) apply(rt *rapid.T, cmds []Command, numbered bool) []Result {
	l := mc.l
	l.t = rt
	if numbered && len(cmds) > 0 {
		mc.openIntake(rt)
		mc.heard = l.now.Cluster
	}
	var eb EntryBuilder
	eb.Reset(1, l.now, 0)
	var numbers []uint64
	for _, c := range cmds {
		intake, n := IntakeID(0), uint64(0)
		if numbered {
			intake, n = mc.intake, mc.number
			mc.numbers[n] = c
			mc.number++
		}
		numbers = append(numbers, n)
		eb.Add(intake, n, mc.lowest, c.AppendTo(nil))
	}
	res := l.append(logEntry{data: eb.Bytes()})
	index := uint64(len(l.entries))
	mc.m.now = l.now.Cluster
	pos := uint32(0)
	for i, c := range cmds {
		var want string
		switch c := c.(type) {
		case *Publish:
			mc.m.publish(c.Topic, index, &pos, c.Messages)
			want = "ok"
			for k := range c.Messages {
				mc.ids, mc.idTopic = append(mc.ids, res[i].Published.ID(k)), append(mc.idTopic, c.Topic)
			}
		case *Receive:
			want = mc.m.receive(c)
		case *ReceiveID:
			want = mc.m.receiveID(c)
		case *Settle:
			var codes []errs.Code
			for _, rc := range c.Receipts {
				codes = append(codes, mc.m.settle(c, int(rc.Offset), rc.Epoch))
			}
			want = fmt.Sprint(codes)
		}
		got := show(c, &res[i])
		mc.check(rt, got == want, "entry %d command %d %+v: got %q, want %q", index, i, c, got, want)
		mc.hits[fmt.Sprintf("%T %s", c, res[i].Code)]++
		if numbered && !res[i].Parked {
			mc.results[numbers[i]] = got
		}
		mc.observe(rt, c, &res[i])
	}
	mc.reported(rt)
	return res
}

// openIntake opens an intake if there is none or the last one has been silent for too long.
func (mc *machine) openIntake(rt *rapid.T) {
	silent := mc.l.now.Cluster - mc.heard
	if mc.intake != 0 && silent <= limits.IntakeSilenceMax.Milliseconds() {
		return
	}
	mc.m.now = mc.l.now.Cluster
	if mc.intake != 0 {
		mc.hits["silent"]++
		r := mc.l.append(mc.numberedEntry(mc.number, &Publish{Topic: "t", Messages: messages(0, "late")}))
		mc.check(rt, r[0].Code == errs.IntakeClosed, "a command of a silent intake gave %v", r[0].Code)
		mc.reported(rt)
	}
	mc.nonce++
	r := mc.l.apply(&OpenIntake{Node: "n", Nonce: mc.nonce})
	mc.reported(rt)
	mc.intake, mc.heard = r[0].Intake, mc.l.now.Cluster
	mc.number = mc.lowest + mc.nonce
	mc.lowest = mc.number
	clear(mc.results)
}

func (mc *machine) numberedEntry(n uint64, c Command) logEntry {
	var eb EntryBuilder
	eb.Reset(1, mc.l.now, 0)
	eb.Add(mc.intake, n, mc.lowest, c.AppendTo(nil))
	return logEntry{data: eb.Bytes()}
}

func (mc *machine) observe(rt *rapid.T, c Command, r *Result) {
	now := mc.m.now
	var topic, group string
	switch c := c.(type) {
	case *Receive:
		topic, group = c.Topic, c.Group
	case *ReceiveID:
		topic, group = c.Topic, c.Group
	case *Settle:
		for i, rc := range r.Codes {
			k := grantKey{c.Topic, c.Group, c.Receipts[i].Offset}
			if rc != errs.OK {
				continue
			}
			switch {
			case c.Op == Acknowledge:
				mc.h.acked[k] = true
			case c.Op == Route:
				mc.h.routed[k] = true
			default:
				mc.h.until[k] = now + c.Visibility.Milliseconds()
			}
		}
		return
	}
	if len(r.Deliveries) > 0 {
		if err := mc.l.e.Load(r.Deliveries); err != nil {
			rt.Fatal(err)
		}
	}
	for _, d := range r.Deliveries {
		k := grantKey{topic, group, d.Receipt.Offset}
		mc.check(rt, !mc.h.acked[k], "%v was delivered after its acknowledgement", k)
		if _, byID := c.(*ReceiveID); byID && mc.h.routed[k] && mc.h.until[k] > now {
			mc.hits["taken over"]++
			mc.check(rt, d.Count == mc.h.count[k], "count of %v rises when a routed lease is taken over", k)
		} else {
			mc.check(rt, mc.h.until[k] <= now, "%v was granted while its lease ran", k)
			mc.check(rt, d.Count > mc.h.count[k], "count of %v does not rise", k)
		}
		delete(mc.h.routed, k)
		mc.check(rt, d.Receipt.Epoch > mc.h.epochs[topic+"/"+group], "receipt of %v is not new", k)
		msg := mc.m.topics[topic].messages[d.Receipt.Offset]
		mc.check(rt, string(d.Body) == msg.body && d.ID == msg.id, "%v came back as %q %v", msg, d.Body, d.ID)
		mc.check(rt, msg.expiry > now, "%v was delivered after its expiry", k)
		mc.h.until[k] = now + d.LeaseUntil - mc.l.e.Stamp().Wall
		mc.h.count[k] = d.Count
		mc.h.epochs[topic+"/"+group] = d.Receipt.Epoch
		mc.receipt, mc.of = append(mc.receipt, d.Receipt), append(mc.of, k)
	}
}

// reported takes the effects of an entry and checks that nobody waits for what is there.
func (mc *machine) reported(rt *rapid.T) {
	for _, ref := range mc.l.fx.Deliverable {
		if w := mc.waiters[ref]; w != nil {
			w.notified = true
		}
	}
	for _, ref := range mc.l.fx.Due {
		if w := mc.waiters[ref]; w != nil {
			if at, ok := mc.l.e.NextDue(ref.Topic, ref.Group); ok {
				w.timer = min(w.timer, at)
			}
		}
	}
	for ref, w := range mc.waiters {
		if w.notified {
			continue
		}
		mc.check(rt, !mc.m.deliverable(ref.Topic, ref.Group, w.conc), "%v waits though something is deliverable", ref)
		if at := mc.m.earliest(ref.Topic, ref.Group); at != never {
			mc.check(rt, w.timer <= at, "the timer of %v is set to %d, after %d", ref, w.timer, at)
		}
		if w.timer <= mc.m.now {
			// The timer has fired with nothing to give: it is set again, as its holder would.
			w.timer = never
			if at, ok := mc.l.e.NextDue(ref.Topic, ref.Group); ok {
				w.timer = at
			}
		}
	}
}

var (
	topicGen = rapid.SampledFrom([]string{"t", "u"})
	groupGen = rapid.SampledFrom([]string{"g", "h"})
	visGen   = rapid.SampledFrom([]time.Duration{time.Second, 2 * time.Second, 5 * time.Second, 30 * time.Second})
	concGen  = rapid.SampledFrom([]int{0, 0, 0, 1, 2})
)

func (mc *machine) draw(rt *rapid.T) Command {
	topic, group := topicGen.Draw(rt, "topic"), groupGen.Draw(rt, "group")
	switch rapid.SampledFrom([]string{"publish", "receive", "receive", "byid", "ack", "ack", "extend", "release", "route"}).Draw(rt, "verb") {
	case "publish":
		p := &Publish{Topic: topic}
		for range rapid.IntRange(1, 4).Draw(rt, "count") {
			mc.serial++
			p.Messages = append(p.Messages, NewMessage{Body: fmt.Appendf(nil, "m%d", mc.serial),
				Retention: rapid.SampledFrom([]time.Duration{0, 10 * time.Second, 60 * time.Second, 600 * time.Second}).Draw(rt, "retention")})
		}
		return p
	case "receive":
		return &Receive{Topic: topic, Group: group, Max: rapid.IntRange(1, 5).Draw(rt, "max"), Visibility: visGen.Draw(rt, "vis"),
			MaxConcurrency: concGen.Draw(rt, "conc"), Latest: rapid.Bool().Draw(rt, "latest")}
	case "byid":
		c := &ReceiveID{Topic: topic, Group: group, Visibility: visGen.Draw(rt, "vis"), MaxConcurrency: concGen.Draw(rt, "conc")}
		if len(mc.ids) > 0 && rapid.IntRange(0, 9).Draw(rt, "known") > 0 {
			i := rapid.IntRange(max(0, len(mc.ids)-12), len(mc.ids)-1).Draw(rt, "id")
			c.ID, c.Topic = mc.ids[i], mc.idTopic[i]
		} else {
			// An ID that does not exist yet may well exist in the store after a crash.
			c.ID = MessageID{Index: uint64(len(mc.l.entries)) + uint64(rapid.IntRange(0, 3).Draw(rt, "ahead")), Pos: uint32(rapid.IntRange(0, 2).Draw(rt, "pos")), Kind: KindPlain}
		}
		return c
	case "ack":
		return mc.drawSettle(rt, Acknowledge, 0)
	case "extend":
		return mc.drawSettle(rt, Extend, visGen.Draw(rt, "vis"))
	case "route":
		return mc.drawSettle(rt, Route, 0)
	}
	return mc.drawSettle(rt, Extend, 0)
}

func (mc *machine) drawSettle(rt *rapid.T, op SettleOp, vis time.Duration) Command {
	if len(mc.receipt) == 0 {
		return &Tick{}
	}
	first := rapid.IntRange(max(0, len(mc.receipt)-10), len(mc.receipt)-1).Draw(rt, "receipt")
	c := &Settle{Topic: mc.of[first].topic, Group: mc.of[first].group, Op: op, Visibility: vis}
	for i := first; i < len(mc.receipt) && i < first+rapid.IntRange(1, 3).Draw(rt, "receipts"); i++ {
		if mc.of[i].topic == c.Topic && mc.of[i].group == c.Group {
			c.Receipts = append(c.Receipts, mc.receipt[i])
		}
	}
	return c
}

// setRapid sets how much a model test tries: so many runs, or as many as a campaign makes.
func setRapid(t *testing.T, runs, long int) {
	steps := "80"
	switch {
	case campaign():
		runs, steps = long, "200"
	case testing.Short():
		runs = 50
	}
	for name, value := range map[string]string{"rapid.checks": strconv.Itoa(runs), "rapid.steps": steps, "rapid.nofailfile": "true"} {
		if err := flag.Set(name, value); err != nil {
			t.Fatal(err)
		}
	}
}

// TestModel drives the engine and the model with the same random commands, through checkpoints, restarts and
// power losses, and compares every result (S1 to S9 as far as the engine has a part in them).
func TestModel(t *testing.T) {
	setRapid(t, 300, 20000)
	checkUntil(t, modelRun, "*engine.Receive ok", "*engine.Receive concurrency_limit", "*engine.Receive unsettled_limit", "*engine.ReceiveID ok",
		"*engine.ReceiveID leased_elsewhere", "*engine.ReceiveID already_acknowledged", "*engine.ReceiveID message_not_found", "parked", "woken", "repeat", "silent", "redelivered", "crash", "expired", "taken over")
}

// checkUntil runs a model test, and again with new seeds while the runs have not yet come to everything that they must
// come to: what random commands reach in one round is a matter of luck, what they never reach is a fault of the test.
func checkUntil(t *testing.T, run func(*rapid.T, map[string]int), wants ...string) {
	hits := map[string]int{}
	var missing []string
	for range 20 {
		rapid.Check(t, func(rt *rapid.T) { run(rt, hits) })
		if t.Failed() || testing.Short() {
			return
		}
		missing = slices.DeleteFunc(slices.Clone(wants), func(want string) bool { return hits[want] > 0 })
		if len(missing) == 0 {
			return
		}
	}
	t.Errorf("the runs never came to %q: %v", missing, hits)
}

func modelRun(rt *rapid.T, hits map[string]int) {
	limit := rapid.SampledFrom([]int{4, 9, 1000}).Draw(rt, "limit")
	fs := vfs.NewCrashableMem()
	mc := &machine{fs: fs, m: newModel(limit), waiters: map[GroupRef]*waiter{}, results: map[uint64]string{}, numbers: map[uint64]Command{}, hits: hits,
		h: history{until: map[grantKey]int64{}, count: map[grantKey]uint32{}, epochs: map[string]uint64{}, acked: map[grantKey]bool{}, routed: map[grantKey]bool{}}}
	o := Options{FS: fs, Dir: "engine", RecentBytes: rapid.SampledFrom([]int64{-1, 300, 1 << 20}).Draw(rt, "recent"), CacheBytes: 1 << 20, MemTableBytes: 256 << 10}
	mc.l = &testLog{t: rt, o: o, now: testStart, unsettledMax: limit}
	mc.l.open()
	defer func() { mc.l.close() }()
	mc.m.now = mc.l.now.Cluster
	rt.Repeat(map[string]func(*rapid.T){
		"apply": func(rt *rapid.T) {
			mc.l.pass(rapid.SampledFrom([]time.Duration{0, 0, time.Millisecond, time.Second, 3 * time.Second}).Draw(rt, "pass"))
			var cmds []Command
			for range rapid.IntRange(1, 5).Draw(rt, "commands") {
				cmds = append(cmds, mc.draw(rt))
			}
			mc.apply(rt, slices.DeleteFunc(cmds, func(c Command) bool { _, tick := c.(*Tick); return tick }), rapid.Bool().Draw(rt, "numbered"))
			for i := range mc.h.count {
				if mc.h.count[i] > 1 {
					hits["redelivered"]++
				}
			}
		},
		"pass": func(rt *rapid.T) {
			d := rapid.SampledFrom([]time.Duration{5 * time.Second, 31 * time.Second, 2 * time.Minute, 11 * time.Minute}).Draw(rt, "pass")
			mc.l.pass(d)
			mc.apply(rt, nil, false)
			for _, t := range mc.m.topics {
				for off := range t.messages {
					if !mc.m.live(t, off) {
						hits["expired"]++
					}
				}
			}
		},
		"spin": func(rt *rapid.T) {
			// Many deliveries of one message, up to the forced backoff.
			topic, group := topicGen.Draw(rt, "topic"), groupGen.Draw(rt, "group")
			for range rapid.IntRange(1, 36).Draw(rt, "times") {
				r := mc.apply(rt, []Command{&Receive{Topic: topic, Group: group, Max: 1, Visibility: time.Second}}, false)
				if len(r[0].Deliveries) == 0 {
					return
				}
				mc.apply(rt, []Command{&Settle{Topic: topic, Group: group, Op: Extend, Receipts: []Receipt{r[0].Deliveries[0].Receipt}}}, false)
			}
		},
		"park": func(rt *rapid.T) {
			topic, group := topicGen.Draw(rt, "topic"), groupGen.Draw(rt, "group")
			ref := GroupRef{Topic: topic, Group: group}
			conc := concGen.Draw(rt, "conc")
			if mc.m.topics[topic] == nil || mc.m.topics[topic].groups[group] == nil {
				return
			}
			parked, err := mc.l.e.Park(&Receive{Topic: topic, Group: group, Max: 1, MaxConcurrency: conc, Park: true}, mc.l.now, func() {})
			if err != nil {
				rt.Fatal(err)
			}
			now := mc.m.now
			mc.m.now = mc.l.now.Cluster
			free := !mc.m.deliverable(topic, group, conc)
			mc.m.now = now
			mc.check(rt, !parked || free, "%v was parked though something is deliverable", ref)
			switch {
			case parked:
				hits["parked"]++
				mc.wait(ref, conc)
			case free:
				// Something has run out that was not folded yet: the receive goes through the log, which parks it.
				r := mc.apply(rt, []Command{&Receive{Topic: topic, Group: group, Max: 1, Visibility: time.Second, MaxConcurrency: conc, Park: true}}, true)
				mc.check(rt, r[0].Parked, "%v found %v", ref, r[0])
				mc.wait(ref, conc)
			}
		},
		"wake": func(rt *rapid.T) {
			// The leader proposes the receive of a group that was reported, behind a publish or alone.
			for _, ref := range []GroupRef{{Topic: "t", Group: "g"}, {Topic: "t", Group: "h"}, {Topic: "u", Group: "g"}, {Topic: "u", Group: "h"}} {
				w := mc.waiters[ref]
				if w == nil || !w.notified {
					continue
				}
				hits["woken"]++
				c := &Receive{Topic: ref.Topic, Group: ref.Group, Max: 2, Visibility: visGen.Draw(rt, "vis"), MaxConcurrency: w.conc, Park: true}
				delete(mc.waiters, ref)
				r := mc.apply(rt, []Command{c}, true)
				if r[0].Parked {
					mc.wait(ref, w.conc)
				}
				return
			}
		},
		"repeat": func(rt *rapid.T) {
			if mc.number == mc.lowest {
				return
			}
			n := rapid.Uint64Range(mc.lowest, mc.number-1).Draw(rt, "number")
			want, ok := mc.results[n]
			if !ok {
				return
			}
			if mc.l.now.Cluster-mc.heard > limits.IntakeSilenceMax.Milliseconds() {
				return
			}
			c := mc.numbers[n]
			mc.heard = mc.l.now.Cluster
			r := mc.l.append(mc.numberedEntry(n, c))
			mc.m.now = mc.l.now.Cluster
			got := show(c, &r[0])
			mc.check(rt, r[0].Repeat && got == want, "repeat of %d gives %q (%v), want %q", n, got, r[0].Repeat, want)
			hits["repeat"]++
			mc.reported(rt)
		},
		"settled": func(rt *rapid.T) {
			mc.lowest = rapid.Uint64Range(mc.lowest, mc.number).Draw(rt, "lowest")
		},
		"checkpoint": func(rt *rapid.T) {
			mc.l.t = rt
			mc.l.checkpoint()
		},
		"restart": func(rt *rapid.T) {
			mc.l.t = rt
			want := mc.l.fullHash()
			if rapid.Bool().Draw(rt, "crash") {
				hits["crash"]++
				// A flush at any moment is Pebble's right.
				if rapid.Bool().Draw(rt, "flushed") {
					if err := mc.l.e.db.Flush(); err != nil {
						rt.Fatal(err)
					}
				}
				clone := mc.fs.CrashClone(vfs.CrashCloneCfg{})
				mc.l.close()
				mc.fs, mc.l.o.FS = clone, clone
			} else {
				mc.l.close()
			}
			mc.l.o.RecentBytes = rapid.SampledFrom([]int64{-1, 300, 1 << 20}).Draw(rt, "recent")
			mc.l.open()
			mc.check(rt, mc.l.fullHash() == want, "the hash is another after a restart")
			clear(mc.waiters)
		},
	})
	mc.drain(rt)
}

func (mc *machine) wait(ref GroupRef, conc int) {
	w := &waiter{conc: conc, timer: never}
	if at, ok := mc.l.e.NextDue(ref.Topic, ref.Group); ok {
		w.timer = at
	}
	mc.waiters[ref] = w
}

// drain receives and acknowledges until every group has been given everything that lives (S1).
func (mc *machine) drain(rt *rapid.T) {
	mc.l.pass(time.Hour) // every lease and backoff is over; only messages without retention live
	for _, topic := range []string{"t", "u"} {
		for _, group := range []string{"g", "h"} {
			for {
				r := mc.apply(rt, []Command{&Receive{Topic: topic, Group: group, Max: 5, Visibility: time.Minute}}, false)
				if len(r[0].Deliveries) == 0 {
					break
				}
				c := &Settle{Topic: topic, Group: group, Op: Acknowledge}
				for _, d := range r[0].Deliveries {
					c.Receipts = append(c.Receipts, d.Receipt)
				}
				mc.apply(rt, []Command{c}, false)
			}
			t := mc.m.topics[topic]
			for off := range t.messages {
				if k := (grantKey{topic, group, uint64(off)}); mc.m.live(t, off) && off >= t.groups[group].start && !mc.h.acked[k] {
					rt.Fatalf("%v was never settled", k)
				}
			}
		}
	}
}
