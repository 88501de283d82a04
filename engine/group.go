package engine

import (
	"math"
	"slices"
	"sync/atomic"
	"time"
)

// never is the deadline or expiry of what has none.
const never = math.MaxInt64

// lease is one entry of a group's unsettled set: a message that was given to the group and is not done.
type lease struct {
	// granted is when it was last given away. deadline is when the lease ends or, of a released message, when
	// it becomes deliverable. expiry is the message's. All are cluster time.
	granted, deadline, expiry int64
	stream                    StreamID
	// epoch is the number of the last grant within the group.
	epoch    uint64
	count    uint32
	consumer uint32 // 0 is the reserved one of the queue protocol
	dep      uint64 // the message's deployment
	kept     bool   // the entry outlives the message: it was parked for longer
	base     uint32 // count as of the last redrive: deliveries before it do not count against MaxDeliveries
	low      uint16 // offset within the chunk
	state    leaseState
	flags    uint8 // what folding noted; never stored, never hashed
	// routed: a ReceiveID may take the lease over (Route).
	routed bool
}

type leaseState uint8

const (
	slotFree leaseState = 0
	// leased: given away; the lease is over once deadline has passed.
	leased leaseState = 1
	// released: given back; deliverable from deadline on.
	released leaseState = 2
	// settledAhead: acknowledged through its ID before the group's cursor came to it. It stays in the set
	// until the cursor has passed, so that it is not given out once more.
	settledAhead leaseState = 3
	// parked: given up by the group. deadline is when that was. It stays until it is redriven, dropped, or
	// expires, which may be later than the message would have.
	parked leaseState = 4
)

// idle reports that time does nothing to the entry but expire it.
func (l *lease) idle() bool { return l.state >= settledAhead }

const (
	flagLapsed = 1 << iota // the end of the lease was noted and is no longer counted as in flight
	flagReady              // it stands in the ready heap
)

// Forced backoff: from this delivery on, the next comes no sooner than 2^(count-32) seconds later.
const (
	backoffFrom = 33
	backoffMax  = 900 * time.Second
)

func backoff(count uint32) int64 {
	if count < backoffFrom {
		return 0
	}
	if n := count - (backoffFrom - 1); n < 10 {
		return int64(1000) << n
	}
	return int64(backoffMax / time.Millisecond)
}

// due is when the message becomes deliverable again.
func (l *lease) due() int64 {
	if l.state == leased {
		return max(l.deadline, l.granted+backoff(l.count))
	}
	return l.deadline
}

// wake is when folding has something to do about it.
func (l *lease) wake() int64 {
	if l.state == leased && l.flags&flagLapsed == 0 {
		return l.deadline
	}
	return l.due()
}

// Chunks of the unsettled set.
const (
	chunkShift = 12
	chunkMask  = 1<<chunkShift - 1
)

// chunk holds the unsettled messages of 4096 consecutive offsets: slots sorted by offset, freed ones among
// them until there are too many.
type chunk struct {
	key    uint64 // its offsets over 4096
	slots  []lease
	live   int
	who    uint64 // a bit for the number modulo 64 of each consumer that may have entries here
	dirty  bool   // differs from its stored row
	stored bool   // has a stored row
}

// at returns the place of low, or where it would be.
func (c *chunk) at(low uint16) (int, bool) {
	s := c.slots
	if len(s) == 0 {
		return 0, false
	}
	// Most groups go through a chunk in order and without gaps: the place follows from the first slot.
	if i := int(low) - int(s[0].low); i >= 0 && i < len(s) && s[i].low == low {
		return i, true
	}
	if low > s[len(s)-1].low {
		return len(s), false
	}
	return slices.BinarySearchFunc(s, low, func(l lease, low uint16) int { return int(l.low) - int(low) })
}

func (c *chunk) find(low uint16) *lease {
	if i, ok := c.at(low); ok && c.slots[i].state != slotFree {
		return &c.slots[i]
	}
	return nil
}

// timer is a heap item: what happens at a time to an offset.
type timer struct {
	at  int64
	off uint64
}

func (a timer) before(b timer) bool { return a.at < b.at || a.at == b.at && a.off < b.off }

// timers is a binary heap by (at, off). Items are not removed when they become obsolete: whoever takes one
// off checks it against the lease it speaks of.
type timers []timer

func (h *timers) push(t timer) {
	s := append(*h, t)
	i := len(s) - 1
	for i > 0 {
		p := (i - 1) / 2
		if !s[i].before(s[p]) {
			break
		}
		s[i], s[p] = s[p], s[i]
		i = p
	}
	*h = s
}

func (h *timers) pop() {
	s := *h
	n := len(s) - 1
	s[0] = s[n]
	s = s[:n]
	i := 0
	for {
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
	*h = s
}

// group is a consumer group: its position in the topic and its unsettled set.
type group struct {
	topic *topic
	name  string
	inc   uint64

	// pos is the stream ID of the last message passed; next is its cache, the first offset not looked at.
	pos  StreamID
	next uint64
	// epoch numbers the grants. It never falls, so no receipt is given out twice.
	epoch                         uint64
	delivered, redelivered, acked uint64
	chunks                        map[uint64]*chunk
	lastChunk                     atomic.Pointer[chunk] // a cache that queries, of which several run at once, fill as well
	live                          int                   // entries of the set
	ahead                         int                   // those of them that no cursor has passed
	inflight                      int                   // leased and not noted as over
	pending, ready, expiring      timers
	gone                          []uint64 // stored rows of chunks that no longer exist
	dirty                         bool
	settings                      GroupSettings
	parkedCount                   int // entries of the set that are parked
	// notes holds the last error of messages that were released with one; noteBytes is what they take.
	notes     map[uint64]string
	noteBytes int
	streamGroup
	// parts are the cursors of the deployments that the group was read with, excludes those that receives without a
	// deployment do not see.
	parts    map[uint64]*partition
	excludes map[uint64]bool
	behind   int // parts with messages below next for receives without a deployment
	// waits are the deployments that receives parked here wait for.
	waits map[string]bool
	// kept are the offsets of entries that outlive their messages.
	kept map[uint64]bool

	// What follows is memory of this node alone.
	pool    *slotPool
	cur     *block // where next was found last
	parked  bool   // receives were parked here; sticky
	told    int64  // what NextDue has last said, or the effects since
	armed   int64  // the earliest time the due queue of the engine holds for it
	number  uint64 // place among the engine's groups
	touched uint64 // the index of the entry that put it on the list of groups to look at
}

func newGroup(t *topic, name string, inc uint64) *group {
	return &group{topic: t, name: name, inc: inc, chunks: make(map[uint64]*chunk), pool: &slotPool{}, armed: never, told: never, streamGroup: streamGroup{entriesRead: -1}}
}

func (g *group) chunk(key uint64) *chunk {
	if c := g.lastChunk.Load(); c != nil && c.key == key {
		return c
	}
	c := g.chunks[key]
	if c != nil {
		g.lastChunk.Store(c)
	}
	return c
}

// slotPool keeps the arrays of chunks that have become empty: groups that are drained would else grow one anew every
// few thousand messages.
type slotPool struct{ free [][]lease }

// slotPoolMax is how many it keeps.
const slotPoolMax = 8

func (p *slotPool) take() []lease {
	n := len(p.free) - 1
	if n < 0 {
		return nil
	}
	s := p.free[n]
	p.free = p.free[:n]
	return s
}

func (p *slotPool) give(s []lease) {
	if len(p.free) < slotPoolMax && cap(s) >= 64 {
		p.free = append(p.free, s[:0])
	}
}

// find returns the entry of an offset, nil if the set has none. It is valid until the next insert.
func (g *group) find(off uint64) *lease {
	if c := g.chunk(off >> chunkShift); c != nil {
		return c.find(uint16(off & chunkMask))
	}
	return nil
}

// touch marks the offset's chunk, and with it the group, as changed.
func (g *group) touch(off uint64) {
	g.chunk(off >> chunkShift).dirty = true
	g.dirty = true
}

// insert adds an entry for a message of a deployment that has none.
func (g *group) insert(off, dep uint64) *lease {
	key, low := off>>chunkShift, uint16(off&chunkMask)
	c := g.chunk(key)
	if c == nil {
		c = &chunk{key: key, slots: g.pool.take()}
		g.chunks[key] = c
		g.newChunk(key)
		g.lastChunk.Store(c)
	}
	i, ok := c.at(low)
	if !ok {
		c.slots = slices.Insert(c.slots, i, lease{low: low, dep: dep})
	} else {
		c.slots[i] = lease{low: low, dep: dep}
	}
	c.live++
	c.dirty, g.dirty = true, true
	g.live++
	if !g.passed(off, dep) {
		g.ahead++
	}
	return &c.slots[i]
}

// remove takes the entry of an offset out of the set.
func (g *group) remove(off uint64, l *lease) {
	if l.state == leased && l.flags&flagLapsed == 0 {
		g.inflight--
	}
	if !g.passed(off, l.dep) {
		g.ahead--
	}
	if l.state == settledAhead {
		g.settled--
	}
	if l.consumer != 0 {
		g.own(off, l, nil)
	}
	g.live--
	if l.state == parked {
		g.parkedCount--
	}
	g.note(off, nil)
	if l.kept {
		l.kept = false
		delete(g.kept, off)
	}
	key := off >> chunkShift
	c := g.chunk(key)
	l.state, l.flags = slotFree, 0
	c.live--
	c.dirty, g.dirty = true, true
	if c.live == 0 {
		if c.stored {
			g.gone = append(g.gone, key)
		}
		delete(g.chunks, key)
		g.dropChunk(key)
		g.lastChunk.Store(nil)
		g.pool.give(c.slots)
		return
	}
	if len(c.slots) > 64 && c.live < len(c.slots)/4 {
		c.slots = slices.DeleteFunc(c.slots, func(l lease) bool { return l.state == slotFree })
	}
}

// advance moves the cursor to next, over messages that were given out (their entries are in the set), that
// have expired, or that were settled ahead of it.
func (g *group) advance(next uint64) {
	pass := func(off uint64, l *lease) {
		if g.passed(off, l.dep) {
			return // by the cursor of its deployment
		}
		if p := g.parts[l.dep]; p != nil && p.keeps(off) {
			return // for that cursor to pass
		}
		if l.state == settledAhead {
			g.remove(off, l)
		} else {
			g.ahead--
		}
	}
	if g.ahead > 0 && next-g.next <= 2*chunkMask {
		for off := g.next; off < next && g.ahead > 0; off++ {
			if l := g.find(off); l != nil {
				pass(off, l)
			}
		}
	} else if g.ahead > 0 {
		var offs []uint64
		g.each(func(off uint64, _ *lease) {
			if off >= g.next && off < next {
				offs = append(offs, off)
			}
		})
		for _, off := range offs {
			pass(off, g.find(off))
		}
	}
	g.next = next
	g.dirty = true
}

func (g *group) pushPending(t timer) {
	if t.at == never {
		return
	}
	g.pending.push(t)
	if len(g.pending) > 2*g.live+64 {
		g.rebuild()
	}
}

// rebuild makes the heaps anew from the set.
func (g *group) rebuild() {
	g.pending, g.ready, g.expiring = g.pending[:0], g.ready[:0], g.expiring[:0]
	for _, p := range g.parts {
		p.ready = p.ready[:0]
	}
	g.each(func(off uint64, l *lease) {
		if l.expiry != never {
			g.expiring.push(timer{l.expiry, off})
		}
		switch {
		case l.idle():
		case l.flags&flagReady != 0:
			g.pushReady(off, l)
		case l.wake() != never:
			g.pending.push(timer{l.wake(), off})
		}
	})
}

// each visits the set in no particular order.
func (g *group) each(visit func(off uint64, l *lease)) {
	for key, c := range g.chunks {
		for i := range c.slots {
			if l := &c.slots[i]; l.state != slotFree {
				visit(key<<chunkShift|uint64(l.low), l)
			}
		}
	}
}

// fold notes what time has brought: leases that ran out, messages that became deliverable, messages that
// expired, at most limit of them; it returns how many. Every answer compares deadlines with a time of its
// own after folding the group completely, so nothing depends on when else it is called.
func (g *group) fold(now int64, limit int) int {
	n := 0
	for len(g.expiring) > 0 && g.expiring[0].at <= now && n < limit {
		t := g.expiring[0]
		g.expiring.pop()
		if l := g.find(t.off); l != nil && l.expiry == t.at {
			if g.spent(l, now) {
				g.giveUp(t.off, l, now)
			} else {
				g.remove(t.off, l)
			}
			n++
		}
	}
	for len(g.pending) > 0 && g.pending[0].at <= now && n < limit {
		t := g.pending[0]
		g.pending.pop()
		l := g.find(t.off)
		if l == nil || l.flags&flagReady != 0 || l.idle() || l.wake() != t.at {
			continue
		}
		n++
		if g.spent(l, now) {
			g.giveUp(t.off, l, now)
			continue
		}
		if l.state == leased && l.flags&flagLapsed == 0 {
			l.flags |= flagLapsed
			g.inflight--
			if d := l.due(); d > now {
				g.pending.push(timer{d, t.off})
				continue
			}
		}
		l.flags |= flagReady
		g.pushReady(t.off, l)
	}
	if g.overgrown() {
		g.rebuild()
	}
	return n
}

// retry returns the retried message that is first in order, nil without one. The group is folded.
func (g *group) retry() (uint64, *lease) {
	for len(g.ready) > 0 {
		t := g.ready[0]
		if l := g.find(t.off); l != nil && l.flags&flagReady != 0 && l.due() == t.at {
			return t.off, l
		}
		g.ready.pop()
	}
	return 0, nil
}

// nextEvent returns when time will next do something to the set of a folded group, never if it will not: a
// lease ends, a message becomes deliverable, or one expires, which makes room in a full set.
func (g *group) nextEvent() int64 {
	at := int64(never)
	for len(g.expiring) > 0 {
		t := g.expiring[0]
		if l := g.find(t.off); l != nil && l.expiry == t.at {
			at = t.at
			break
		}
		g.expiring.pop()
	}
	for len(g.pending) > 0 {
		t := g.pending[0]
		if l := g.find(t.off); l != nil && l.flags&flagReady == 0 && !l.idle() && l.wake() == t.at {
			return min(at, t.at)
		}
		g.pending.pop()
	}
	return at
}

// grant leases an entry of the set, or a new one.
func (g *group) grant(off uint64, l *lease, now, visibility int64) {
	if l.state == leased && l.flags&flagLapsed == 0 {
		g.inflight--
	}
	if l.consumer != 0 {
		g.own(off, l, nil)
	}
	g.epoch++
	l.epoch = g.epoch
	l.count++
	l.granted, l.deadline = now, now+visibility
	l.state, l.flags, l.routed = leased, 0, false
	g.inflight++
	g.delivered++
	if l.count > 1 {
		g.redelivered++
	}
	g.touch(off)
	g.pushPending(timer{l.deadline, off})
}

// takeOver hands a routed lease to whoever asked for the message by its ID. It is a new grant, but not another
// delivery.
func (g *group) takeOver(off uint64, l *lease, now, visibility int64) {
	g.epoch++
	l.epoch = g.epoch
	l.granted, l.deadline, l.routed = now, now+visibility, false
	g.touch(off)
	g.pushPending(timer{l.deadline, off})
}

// grantOf leases a message of a deployment for the first time.
func (g *group) grantOf(off, dep uint64, stream StreamID, expiry, now, visibility int64) *lease {
	l := g.insert(off, dep)
	l.stream, l.expiry = stream, expiry
	g.grant(off, l, now, visibility)
	if expiry != never {
		g.pushExpiring(timer{expiry, off})
	}
	return l
}

func (g *group) pushExpiring(t timer) {
	g.expiring.push(t)
	if len(g.expiring) > 2*g.live+64 {
		g.rebuild()
	}
}

// release ends a lease and makes the message deliverable again at a time, or later if it has been delivered too
// often.
func (g *group) release(off uint64, l *lease, at int64) {
	at = max(at, l.granted+backoff(l.count))
	g.inflight--
	l.state, l.flags, l.deadline, l.routed = released, 0, at, false
	g.touch(off)
	g.pushPending(timer{at, off})
}

// extend moves the end of a running lease.
func (g *group) extend(off uint64, l *lease, deadline int64) {
	l.deadline = deadline
	g.touch(off)
	g.pushPending(timer{deadline, off})
}

// acknowledge ends a message for the group.
func (g *group) acknowledge(off uint64, l *lease) {
	g.acked++
	g.dirty = true
	if g.passed(off, l.dep) {
		g.remove(off, l)
		return
	}
	g.settleAhead(off, l)
}

// settleAhead keeps an entry that is done in the set, since the cursor has not come to it.
func (g *group) settleAhead(off uint64, l *lease) {
	if l.state == leased && l.flags&flagLapsed == 0 {
		g.inflight--
	}
	if l.consumer != 0 {
		g.own(off, l, nil)
	}
	l.state, l.flags, l.deadline, l.routed = settledAhead, 0, never, false
	g.settled++
	g.touch(off)
}

// inflightAt counts the leases that run at now without folding anything.
func (g *group) inflightAt(now int64) int {
	n := 0
	g.each(func(_ uint64, l *lease) {
		if l.state == leased && l.deadline > now && l.expiry > now {
			n++
		}
	})
	return n
}

// unsettled is what counts against the limit of the set.
func (g *group) unsettled() int { return g.live - g.parkedCount }
