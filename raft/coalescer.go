package raft

import (
	"runtime"
	"sync"
	"time"
	"unsafe"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// entriesInFlight is how many entries are proposed and not yet applied at a time. While there is room, an op is
// proposed at once; when there is none, ops gather, and the next entry takes all of them. Batches form by
// themselves under load, and a single publisher never waits for company.
const entriesInFlight = 3

// gatherRounds bounds how often the coalescer lets others run before it makes an entry.
const gatherRounds = 16

// pressurePoll is how often the log is looked at while it has too much that is not synced.
const pressurePoll = 2 * time.Millisecond

// coalescerEnv is what the coalescer needs of the node. Functions, so that it can be tested without one.
type coalescerEnv struct {
	// stamp returns the clocks for an entry, level the replicated feature level.
	stamp func() engine.Stamp
	level func() uint32
	// propose hands an entry to raft.
	propose func(entry []byte)
	// pressed reports that the log has more unsynced data than it should.
	pressed func() bool
	// refuse returns why an op must not be proposed now.
	refuse func(o *op) *errs.Error
	// eng answers for the parking lot.
	eng parker
	// fatal stops the node.
	fatal func(error)
}

// coalescer turns the ops brought to the leader into entries. One goroutine (run) builds and proposes them. What
// raft says of an entry it gave up is not waited for: it gives entries up only when leadership is lost or handed
// on, and then the node closes the coalescer, which ends everything in flight.
type coalescer struct {
	env      coalescerEnv
	lot      *lot
	bytesMax int64

	wake  chan struct{}
	mu    sync.Mutex
	mode  serviceMode
	queue []*op
	// head is where the queue begins in its slice.
	head   int
	bytes  int64
	urgent []*op
	// lanes hold, for each intake with ordered ops, what was accepted of it since this node began to serve.
	lanes map[engine.IntakeID]*lane
	// pressed is what env.pressed last said.
	pressed bool
	idle    bool
	// inFlight holds the proposed entries by the address of their bytes, which raft hands to the state machine
	// unchanged.
	inFlight map[*byte]*batch
	// drained is closed, if set, when nothing is in flight.
	drained []chan struct{}
}

// lane is the ordered part of one intake, as accepted since the coalescer was last closed or paused.
type lane struct {
	// last is the highest number accepted or refused.
	last uint64
	// holes are the numbers up to last that were refused or sent back.
	holes map[uint64]struct{}
}

// laneLocked returns the lane of an intake.
func (c *coalescer) laneLocked(id engine.IntakeID) *lane {
	l := c.lanes[id]
	if l == nil {
		if c.lanes == nil {
			c.lanes = make(map[engine.IntakeID]*lane)
		}
		l = &lane{}
		c.lanes[id] = l
	}
	return l
}

// inOrder reports whether an ordered op may be accepted now (R12). Its origin names the one before it whose outcome it
// awaits, and the first of all those. The one before must have come here since the coalescer was last closed: then
// whatever of the order is or will be applied, by this node's entries or by an earlier leader's, precedes this op. And
// none of those whose outcome the origin awaits may have been refused or sent back: the origin may never hear of it,
// and bring that one again. An op that is not in order goes back as well, and comes again behind the others.
func (l *lane) inOrder(o *op) bool {
	if o.after > l.last {
		return false
	}
	for number := range l.holes {
		switch {
		case number < o.floor:
			delete(l.holes, number) // its origin knows
		case number < o.number:
			return false
		}
	}
	return true
}

// accept notes an op that is in order.
func (l *lane) accept(o *op) {
	l.last = max(l.last, o.number)
	delete(l.holes, o.number)
}

// leaveOut notes that an op in order was refused or sent back.
func (l *lane) leaveOut(o *op) {
	l.last = max(l.last, o.number)
	if l.holes == nil {
		l.holes = make(map[uint64]struct{})
	}
	l.holes[o.number] = struct{}{}
}

// leaveOut notes that an ordered op was refused or sent back after it was accepted.
func (c *coalescer) leaveOut(o *op) {
	if !o.ordered {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.laneLocked(o.intake).leaveOut(o)
}

// stillInOrder judges an accepted op again, now that what was before it in the queue has been judged.
func (c *coalescer) stillInOrder(o *op) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.laneLocked(o.intake)
	if len(l.holes) == 0 || l.inOrder(o) {
		return true
	}
	l.leaveOut(o)
	return false
}

// serviceMode says what the leader's side of this node does with ops.
type serviceMode uint8

const (
	// closed: the node does not lead, or must not; ops are sent back to their origins.
	closed serviceMode = iota
	// gathering: the node leads but has not yet applied an entry of its term; only urgent ops are proposed.
	gathering
	// open: ops are proposed.
	open
	// paused: the node is about to hand leadership on; ops are sent back, urgent ones are proposed.
	paused
)

// batch is one proposed entry.
type batch struct {
	entry []byte
	ops   []*op
}

func newCoalescer(env coalescerEnv, bytesMax int64) *coalescer {
	c := &coalescer{env: env, bytesMax: bytesMax, wake: make(chan struct{}, 1),
		inFlight: make(map[*byte]*batch, entriesInFlight)}
	c.lot = newLot(c.signal)
	return c
}

// signal wakes run.
func (c *coalescer) signal() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// enqueue takes an op, or ends it.
func (c *coalescer) enqueue(o *op) {
	c.mu.Lock()
	if c.mode == closed || c.mode == paused && !o.urgent {
		c.mu.Unlock()
		o.endAgain(false)
		return
	}
	if o.urgent {
		c.urgent = append(c.urgent, o)
	} else {
		var l *lane
		if o.ordered {
			l = c.laneLocked(o.intake)
			if !l.inOrder(o) {
				c.mu.Unlock()
				o.endAgain(false)
				return
			}
		}
		if !o.repeat {
			// While the disk is behind, ops wait here as they do while entries are in flight: most disks stand still for
			// a moment now and then, and who waits for that is better off than who is refused.
			var err *errs.Error
			if c.bytes > 0 && c.bytes+int64(len(o.cmd)) > c.bytesMax || len(c.queue)-c.head >= limits.IntakeOpenMax {
				err = &errs.Error{Code: errs.Overloaded, Message: "the leader's queue is full", RetryAfter: time.Second}
				if c.pressed {
					err.Message = "the disk cannot keep up"
				}
			}
			if err != nil {
				if l != nil {
					l.leaveOut(o)
				}
				c.mu.Unlock()
				o.end(outcome{kind: refused, err: err})
				return
			}
		}
		if l != nil {
			l.accept(o)
		}
		c.queue = append(c.queue, o)
		c.bytes += int64(len(o.cmd))
	}
	idle := c.idle
	c.mu.Unlock()
	if idle {
		c.signal()
	}
}

// isOpen reports whether ops are being proposed.
func (c *coalescer) isOpen() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mode == open
}

// setMode changes what happens to ops. Closing sends everything queued, parked and in flight back to the
// origins: they bring it to the next leader under the same numbers.
func (c *coalescer) setMode(m serviceMode) {
	c.mu.Lock()
	c.mode = m
	var queued, parked []*op
	var flying []*batch
	if m == closed || m == paused {
		queued = append(queued, c.queue[c.head:]...)
		c.queue, c.head, c.bytes = nil, 0, 0
		c.lanes = nil // what was accepted may go back: the order begins anew
		parked = c.lot.close()
	}
	if m == open {
		c.lot.open()
	}
	if m == closed {
		queued = append(queued, c.urgent...)
		c.urgent = nil
		for key, b := range c.inFlight {
			flying = append(flying, b)
			delete(c.inFlight, key)
		}
		c.drainedLocked()
	}
	c.mu.Unlock()
	for _, o := range queued {
		o.phase.CompareAndSwap(phaseQueued, phaseWithdrawn)
		o.endAgain(false)
	}
	for _, o := range parked {
		o.endAgain(false)
	}
	for _, b := range flying {
		for _, o := range b.ops {
			o.endAgain(true)
		}
	}
	c.signal()
}

// take returns the batch whose entry this is, if this node proposed it and still waits for it.
func (c *coalescer) take(entry []byte) *batch {
	key := unsafe.SliceData(entry)
	c.mu.Lock()
	b := c.inFlight[key]
	if b != nil {
		delete(c.inFlight, key)
		if len(c.inFlight) == 0 {
			c.drainedLocked()
		}
	}
	wake := b != nil && c.idle
	c.mu.Unlock()
	if wake {
		c.signal()
	}
	return b
}

func (c *coalescer) drainedLocked() {
	for _, ch := range c.drained {
		close(ch)
	}
	c.drained = nil
}

// whenDrained returns a channel that is closed as soon as nothing is in flight.
func (c *coalescer) whenDrained() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	ch := make(chan struct{})
	if len(c.inFlight) == 0 && len(c.urgent) == 0 {
		close(ch)
	} else {
		c.drained = append(c.drained, ch)
	}
	return ch
}

// run proposes until stop is closed.
func (c *coalescer) run(stop <-chan struct{}) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		c.settleDown()
		b, wait := c.next()
		if b != nil {
			c.env.propose(b.entry)
			continue
		}
		if wait <= 0 {
			wait = time.Hour
		}
		timer.Reset(wait)
		select {
		case <-stop:
			return
		case <-c.wake:
		case <-timer.C:
		}
	}
}

// settleDown lets the callers that were just answered bring what they want next, as long as they do: one entry for
// all of them instead of one for the first and one for the rest.
func (c *coalescer) settleDown() {
	seen := 0
	for range gatherRounds {
		c.mu.Lock()
		n := len(c.queue) - c.head
		full := c.mode != open || len(c.inFlight) >= entriesInFlight
		c.mu.Unlock()
		if full || n == seen {
			return
		}
		seen = n
		runtime.Gosched()
	}
}

// next builds the next entry. When there is nothing to propose it returns nil, and after how long to look
// again, 0 for when woken.
func (c *coalescer) next() (*batch, time.Duration) {
	var stamp engine.Stamp
	var ride []*op
	var wait time.Duration
	c.mu.Lock()
	if c.mode == open && len(c.inFlight) < entriesInFlight {
		c.mu.Unlock()
		// The lot asks the engine, whose lock is held for as long as an apply takes: not under ours.
		if pressed := c.env.pressed(); pressed {
			c.setPressed(true)
		} else {
			c.setPressed(false)
			if c.lot.len() > 0 {
				stamp = c.env.stamp()
				if due := c.lot.refresh(c.env.eng, stamp.Cluster); due > 0 {
					wait = max(time.Duration(due-stamp.Cluster)*time.Millisecond, time.Millisecond)
				}
				var err error
				if ride, err = c.lot.alone(c.env.eng, stamp, nil); err != nil {
					c.env.fatal(err)
					return nil, 0
				}
			}
		}
		c.mu.Lock()
	}
	ops := c.gatherLocked(len(ride) > 0)
	c.mu.Unlock()
	if len(ops) == 0 && len(ride) == 0 {
		if c.isPressed() {
			wait = pressurePoll
		}
		return nil, wait
	}
	return c.build(ops, ride), 0
}

func (c *coalescer) setPressed(p bool) {
	c.mu.Lock()
	c.pressed = p
	c.mu.Unlock()
}

func (c *coalescer) isPressed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pressed
}

// gatherLocked takes what goes into the next entry.
func (c *coalescer) gatherLocked(riders bool) []*op {
	c.idle = true
	if c.mode == closed || len(c.inFlight) >= entriesInFlight {
		return nil
	}
	ops := c.urgent
	c.urgent = nil
	if c.mode == open && !c.pressed {
		size := 0
		for c.head < len(c.queue) {
			o := c.queue[c.head]
			n := len(o.cmd) + engine.EntryOverhead
			if size > 0 && size+n > limits.EntryBytesTarget {
				break
			}
			size += n
			ops = append(ops, o)
			c.queue[c.head] = nil
			c.head++
			c.bytes -= int64(len(o.cmd))
		}
		switch {
		case c.head == len(c.queue):
			c.queue, c.head = c.queue[:0], 0
		case c.head > 1024 && c.head > len(c.queue)/2:
			n := copy(c.queue, c.queue[c.head:])
			clear(c.queue[n:])
			c.queue, c.head = c.queue[:n], 0
		}
	}
	if len(ops) > 0 || riders {
		c.idle = false
	}
	return ops
}

// build makes the entry and enters it among those in flight. It returns nil when nothing is left to propose.
func (c *coalescer) build(ops, ride []*op) *batch {
	kept := ops[:0]
	size := 0
	keep := func(o *op) bool {
		// From here on the op counts as proposed, unless its origin took it back before.
		if o.phase.Load() == phaseProposed || o.phase.CompareAndSwap(phaseQueued, phaseProposed) {
			kept = append(kept, o)
			size += len(o.cmd) + engine.EntryOverhead
			return true
		}
		o.endAgain(false)
		return false
	}
	type published struct {
		topic    []byte
		messages int
	}
	var topics []published
	for _, o := range ops {
		if !o.repeat {
			if err := c.env.refuse(o); err != nil {
				if o.phase.CompareAndSwap(phaseQueued, phaseWithdrawn) {
					c.leaveOut(o)
					o.endRefused(err)
				} else {
					o.endAgain(false)
				}
				continue
			}
		}
		if o.ordered && !c.stillInOrder(o) {
			o.phase.CompareAndSwap(phaseQueued, phaseWithdrawn)
			o.endAgain(false)
			continue
		}
		if !keep(o) || o.kind != engine.CmdPublish && o.kind != engine.CmdStreamAdd {
			continue
		}
		found := false
		for i := range topics {
			if found = string(topics[i].topic) == string(o.topic); found {
				topics[i].messages += o.count
				break
			}
		}
		if !found {
			topics = append(topics, published{o.topic, o.count})
		}
	}
	for _, o := range ride {
		keep(o)
	}
	if c.lot.len() > 0 {
		budget := ridersBytesMax
		var behind []*op
		for _, t := range topics {
			behind, budget = c.lot.behind(string(t.topic), t.messages, budget, behind[:0])
			for _, o := range behind {
				keep(o)
			}
		}
	}
	if len(kept) == 0 {
		c.mu.Lock()
		if len(c.inFlight) == 0 {
			c.drainedLocked()
		}
		c.mu.Unlock()
		c.signal() // there may be more in the queue
		return nil
	}
	// One lowest number for each intake, the newest that came: whatever is still awaited lies above it.
	type bound struct {
		intake engine.IntakeID
		lowest uint64
	}
	var boundsArray [4]bound
	bounds := boundsArray[:0]
	lowest := func(o *op) *uint64 {
		for i := range bounds {
			if bounds[i].intake == o.intake {
				return &bounds[i].lowest
			}
		}
		bounds = append(bounds, bound{o.intake, 0})
		return &bounds[len(bounds)-1].lowest
	}
	for _, o := range kept {
		at := lowest(o)
		*at = max(*at, o.lowest)
	}
	var eb engine.EntryBuilder
	eb.Reset(c.env.level(), c.env.stamp(), size)
	for _, o := range kept {
		eb.Add(o.intake, o.number, *lowest(o), o.cmd)
	}
	b := &batch{entry: eb.Bytes(), ops: kept}
	c.mu.Lock()
	if c.mode == closed {
		// Closed meanwhile: nothing was handed to raft.
		c.mu.Unlock()
		for _, o := range kept {
			o.endAgain(true)
		}
		return nil
	}
	c.inFlight[unsafe.SliceData(b.entry)] = b
	c.mu.Unlock()
	return b
}
