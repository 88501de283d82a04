package raft

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// The intake is what this process brings into the replicated log. Every command gets a number here and keeps it
// until its outcome is known, over as many leaders as that takes; the engine applies each number once and
// remembers its result until the lowest outstanding number, which travels with every entry, has passed it (R5).
//
//	Propose ──► call ──► route: this node leads      ──► coalescer
//	             ▲             another node leads    ──► forward connection
//	             │             nobody does           ──► held
//	             └── outcome: replied, refused ──► caller
//	                          again            ──► held, then the route of the moment
//	                          stillWaiting     ──► a new number, and the same again
//
// Commands that were submitted (Node.Submit) are applied in the order of their numbers. The intake sends them in that
// order and tells with each the one before it whose outcome it does not know; a leader that has not accepted that one
// sends the command back (lane.inOrder). What may overtake on the way, a new connection beside a broken one or
// a new leader beside an old one, is so brought into order where entries are made.

// parkSliceMax is how long a receive waits under one number. A number that stays open holds the lowest
// outstanding one back, and with it the results the engine has to remember.
const parkSliceMax = time.Second

// againDelay is how long an op that was sent back is held before it is tried on the same node again.
const againDelay = 15 * time.Millisecond

// abandonedMax is how long the outcome of a receive that nobody waits for is awaited, so that what it may have
// leased can be released.
const abandonedMax = 30 * time.Second

// route is where commands go at the moment.
type route struct {
	// node leads; empty when nobody is known to.
	node engine.NodeID
	term uint64
}

// sender brings ops to the node of a route. Its methods are called without locks held and do not block.
type sender interface {
	// send takes ops. It reports false when nothing was sent.
	send(to engine.NodeID, ops []*op) bool
	// withdraw tells the node that nobody waits for the op any more.
	withdraw(to engine.NodeID, o *op)
}

// intake numbers this process's commands and sees each to its outcome.
type intake struct {
	self   engine.NodeID
	sender sender
	now    func() time.Time
	// release gives back what an abandoned receive was given.
	release  func(call *call, deliveries []engine.Delivery)
	bytesMax int64
	// slice is parkSliceMax, unless a test wants to see wake-ups that are lost.
	slice time.Duration

	mu      sync.Mutex
	id      engine.IntakeID // 0: not open yet
	route   route
	closing *errs.Error // set once: nothing is taken any more
	// calls is a ring over the numbers lowest to next-1.
	calls        []*call
	lowest, next uint64
	bytes        int64
	held         []*call
	// orderedFirst and orderedLast are the ends of the list of ordered calls without an outcome, by number; orderedHeld
	// counts those of them that are held.
	orderedFirst, orderedLast *call
	orderedHeld               int
	// outgoing are ordered calls on their way to the sender, each once; pumping while a goroutine passes them on.
	outgoing []*call
	pumping  bool
	// numberedAt is when a number was last given out.
	numberedAt time.Time
	// timed counts the calls with a deadline of their own.
	timed int
	// told are calls whose outcome is to be passed on once the lock is released.
	told []*call
	// kick wakes the flusher when something is held and could be sent.
	kick chan struct{}
}

// call is one command of this process.
type call struct {
	number  uint64
	attempt uint32
	// waitUntil is when a receive gives up waiting; zero for other commands.
	waitUntil time.Time
	// stop ends the waiting when it is closed.
	stop <-chan struct{}

	// Guarded by the intake's lock.
	sentTo   engine.NodeID
	intake   engine.IntakeID
	sent     int  // times handed to a node
	proposed bool // may have been proposed
	isHeld   bool
	heldAt   time.Time
	// abandoned: the caller is gone; since when.
	abandoned time.Time
	// present is the op of the present attempt. Only when the route was this node itself does its phase
	// tell whether it was proposed.
	present *op
	isLocal bool

	// ordered calls form a list; unlinked ones have no outcome to wait for.
	ordered      bool
	isOutgoing   bool
	before, next *call
	// deadline ends a submitted call; zero for none.
	deadline time.Time

	// first is the op of the first attempt; it says what is asked.
	first op
	// done is told of the outcome, unless there is a function to call. reply is nil with err, and the op's with a reply.
	done   chan struct{}
	notify func(*call)
	reply  *Reply
	err    *errs.Error
}

func newIntake(self engine.NodeID, s sender, now func() time.Time, bytesMax int64) *intake {
	return &intake{self: self, sender: s, now: now, bytesMax: bytesMax, slice: parkSliceMax, calls: make([]*call, 256), lowest: 1, next: 1,
		kick: make(chan struct{}, 1), release: func(*call, []engine.Delivery) {}}
}

// unlock releases the intake and passes on the outcomes that were found under its lock.
func (in *intake) unlock() {
	told := in.told
	in.told = nil
	in.mu.Unlock()
	for _, c := range told {
		c.tell()
	}
}

// tellLocked gives c's caller the outcome, once.
func (in *intake) tellLocked(c *call, reply *Reply, err *errs.Error) {
	c.reply, c.err = reply, err
	if !c.deadline.IsZero() {
		in.timed--
	}
	in.told = append(in.told, c)
}

// tell passes the outcome on, without the intake's lock: whoever is woken may come back at once.
func (c *call) tell() {
	if c.notify != nil {
		c.notify(c)
		return
	}
	c.done <- struct{}{} // there is room for the one outcome
}

// doneChannels holds channels without content, for calls that are waited for.
var doneChannels = sync.Pool{New: func() any { return make(chan struct{}, 1) }}

// submit takes a command without waiting for its outcome: c.notify is called with it. Ordered calls are applied in the
// order in which they were submitted.
func (in *intake) submit(c *call) {
	in.mu.Lock()
	defer in.unlock()
	err := in.closing
	if err == nil {
		err = in.roomLocked(len(c.first.cmd))
	}
	if err != nil {
		c.deadline = time.Time{}
		in.tellLocked(c, nil, err)
		return
	}
	in.numberLocked(c)
	in.bytes += int64(len(c.first.cmd))
	if !c.deadline.IsZero() {
		in.timed++
		if in.timed == 1 {
			in.kickLocked() // run has to look at deadlines
		}
	}
	if c.ordered {
		c.before = in.orderedLast
		if c.before != nil {
			c.before.next = c
		} else {
			in.orderedFirst = c
		}
		in.orderedLast = c
	}
	switch {
	case in.id == 0, in.route.node == "", c.ordered && in.orderedHeld > 0:
		in.holdLocked(c)
	case c.ordered:
		in.passLocked(c)
		in.pumpLocked()
	default:
		to, o := in.route.node, in.sendLocked(c)
		in.unlock()
		in.sendOne(to, o)
		in.mu.Lock()
	}
}

// idle reports whether nothing was brought in for a while, and could be.
func (in *intake) idle(every time.Duration) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.id != 0 && in.route.node != "" && in.now().Sub(in.numberedAt) >= every
}

// lowestNumber returns the lowest number without an outcome.
func (in *intake) lowestNumber() uint64 {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.lowest
}

// passLocked puts c among the outgoing calls.
func (in *intake) passLocked(c *call) {
	if !c.isOutgoing {
		c.isOutgoing = true
		in.outgoing = append(in.outgoing, c)
	}
}

// pumpLocked passes the outgoing calls on, in their order, unless another goroutine is doing so: then that one takes
// these along. It releases the lock while it sends.
func (in *intake) pumpLocked() {
	if in.pumping {
		return
	}
	in.pumping = true
	for len(in.outgoing) > 0 {
		batch := in.outgoing
		in.outgoing = nil
		slices.SortFunc(batch, func(a, b *call) int { return cmp.Compare(a.number, b.number) })
		ops := make([]*op, 0, len(batch))
		for _, c := range batch {
			c.isOutgoing = false
			switch {
			case c.isHeld || in.findLocked(c.number) != c:
				// Held anew when the route changed, or over.
			case in.id == 0 || in.route.node == "":
				in.holdLocked(c)
			default:
				ops = append(ops, in.sendLocked(c))
			}
		}
		if len(ops) == 0 {
			continue
		}
		to := in.route.node
		in.unlock()
		in.sendAll(to, ops)
		in.mu.Lock()
	}
	in.pumping = false
}

// sendAll sends ops; when nothing can be sent, they are held again.
func (in *intake) sendAll(to engine.NodeID, ops []*op) {
	if in.sender.send(to, ops) {
		return
	}
	for _, o := range ops {
		in.complete(o.number, o.attempt, nil, outcome{kind: again, proposed: o.repeat})
	}
}

// do sees a command to its outcome.
func (in *intake) do(ctx context.Context, c *call) (Reply, *errs.Error) {
	in.mu.Lock()
	if in.closing != nil {
		in.mu.Unlock()
		return Reply{}, in.closing
	}
	if err := in.roomLocked(len(c.first.cmd)); err != nil {
		in.mu.Unlock()
		return Reply{}, err
	}
	c.done = doneChannels.Get().(chan struct{})
	in.numberLocked(c)
	in.bytes += int64(len(c.first.cmd))
	if in.id == 0 || in.route.node == "" {
		in.holdLocked(c)
		in.mu.Unlock()
	} else {
		to, o := in.route.node, in.sendLocked(c)
		in.mu.Unlock()
		in.sendOne(to, o)
	}
	stop := c.stop
	for told := false; !told; {
		select {
		case <-c.done:
			told = true
		case <-ctx.Done():
			in.abandon(c)
			<-c.done
			told = true
		case <-stop:
			in.endWait(c)
			stop = nil
		}
	}
	doneChannels.Put(c.done)
	if c.err != nil {
		return Reply{}, c.err
	}
	return *c.reply, nil
}

// roomLocked refuses what would break the intake's bounds.
func (in *intake) roomLocked(n int) *errs.Error {
	if in.next-in.lowest >= limits.IntakeOpenMax-1 {
		return &errs.Error{Code: errs.Overloaded, Message: "this node holds as many requests as it may", RetryAfter: time.Second}
	}
	if in.bytes > 0 && in.bytes+int64(n) > in.bytesMax {
		return &errs.Error{Code: errs.Overloaded, Message: "the requests this node holds fill its queue", RetryAfter: time.Second}
	}
	return nil
}

// numberLocked gives c the next number.
func (in *intake) numberLocked(c *call) {
	c.number = in.next
	in.next++
	in.numberedAt = in.now()
	if n := uint64(len(in.calls)); in.next-in.lowest > n {
		bigger := make([]*call, 2*n)
		for i := in.lowest; i < c.number; i++ {
			bigger[i%(2*n)] = in.calls[i%n]
		}
		in.calls = bigger
	}
	in.calls[c.number%uint64(len(in.calls))] = c
}

// forgetLocked frees c's number.
func (in *intake) forgetLocked(c *call) {
	if c.ordered {
		c.ordered = false
		if c.isHeld {
			in.orderedHeld--
		}
		if c.before != nil {
			c.before.next = c.next
		} else {
			in.orderedFirst = c.next
		}
		if c.next != nil {
			c.next.before = c.before
		} else {
			in.orderedLast = c.before
		}
		c.before, c.next = nil, nil
	}
	n := uint64(len(in.calls))
	in.calls[c.number%n] = nil
	for in.lowest < in.next && in.calls[in.lowest%n] == nil {
		in.lowest++
	}
}

// findLocked returns the call with that number, nil when its outcome is known.
func (in *intake) findLocked(number uint64) *call {
	if number < in.lowest || number >= in.next {
		return nil
	}
	return in.calls[number%uint64(len(in.calls))]
}

// sendLocked makes the op of c's next attempt, for the route of the moment.
func (in *intake) sendLocked(c *call) *op {
	o := &c.first
	if c.present != nil {
		o = &op{request: c.first.request}
	}
	c.attempt++
	c.sent++
	in.unholdLocked(c)
	c.sentTo = in.route.node
	c.isLocal = in.route.node == in.self
	c.intake = in.id
	c.present = o
	o.intake, o.number, o.lowest, o.attempt = in.id, c.number, in.lowest, c.attempt
	o.repeat = c.proposed
	if o.ordered = c.ordered; o.ordered {
		o.floor = in.orderedFirst.number
		if c.before != nil {
			o.after = c.before.number
		}
	}
	if !c.waitUntil.IsZero() {
		o.parkUntil = c.waitUntil
		if slice := in.now().Add(in.slice); slice.Before(c.waitUntil) {
			o.parkUntil = slice
		}
	}
	o.from = in
	return o
}

// sendOne sends one op; when nothing can be sent, it is held again.
func (in *intake) sendOne(to engine.NodeID, o *op) {
	o.self[0] = o
	in.sendAll(to, o.self[:])
}

// takeBackLocked takes back the present attempt of c and reports whether it is certain that no node proposed it.
func (c *call) takeBackLocked() bool {
	if c.proposed {
		return false
	}
	if c.isHeld || c.sentTo == "" {
		return true
	}
	return c.isLocal && c.present.withdraw()
}

// holdLocked keeps c until there is a route.
func (in *intake) holdLocked(c *call) {
	if c.isHeld {
		return
	}
	c.isHeld = true
	if c.ordered {
		in.orderedHeld++
	}
	c.heldAt = in.now()
	c.sentTo = ""
	in.held = append(in.held, c)
	in.kickLocked()
}

// unholdLocked says that c is not held any more.
func (in *intake) unholdLocked(c *call) {
	if c.isHeld && c.ordered {
		in.orderedHeld--
	}
	c.isHeld = false // flush skips it
}

// endLocked gives c its outcome.
func (in *intake) endLocked(c *call, reply *Reply, err *errs.Error) {
	in.forgetLocked(c)
	in.bytes -= int64(len(c.first.cmd))
	in.unholdLocked(c)
	if !c.abandoned.IsZero() {
		return
	}
	in.tellLocked(c, reply, err)
}

// complete takes an outcome from the node that an attempt was sent to.
func (in *intake) complete(number uint64, attempt uint32, reply *Reply, out outcome) {
	in.mu.Lock()
	c := in.findLocked(number)
	if c == nil || c.attempt != attempt && out.kind != replied {
		// A late outcome of a former attempt. A result is good whoever brings it; anything else says
		// nothing of the present attempt.
		if c != nil && out.proposed {
			c.proposed = true
		}
		in.unlock()
		return
	}
	switch out.kind {
	case replied:
		if reply.Code == errs.IntakeClosed {
			in.closedLocked(c)
			in.unlock()
			return
		}
		abandoned := !c.abandoned.IsZero()
		in.endLocked(c, reply, nil)
		in.unlock()
		if abandoned && len(reply.Deliveries) > 0 {
			in.release(c, reply.Deliveries)
		}
		return
	case refused:
		in.endLocked(c, nil, out.err)
	case again:
		c.proposed = c.proposed || out.proposed
		if !c.abandoned.IsZero() && !c.proposed {
			in.endLocked(c, new(Reply), nil)
			break
		}
		in.holdLocked(c)
	case stillWaiting:
		if !c.abandoned.IsZero() || !in.now().Before(c.waitUntil) || in.roomLocked(0) != nil {
			in.endLocked(c, reply, nil)
			break
		}
		// Nothing is recorded under the old number: a new one lets the lowest rise.
		in.forgetLocked(c)
		in.numberLocked(c)
		c.proposed = false
		if in.id == 0 || in.route.node == "" {
			in.holdLocked(c)
			break
		}
		to, o := in.route.node, in.sendLocked(c)
		in.unlock()
		in.sendOne(to, o)
		return
	}
	in.unlock()
}

// finish makes the intake the origin of the ops it sends to its own node.
func (in *intake) finish(o *op, out outcome) {
	o.reply.Zones = out.zones
	in.complete(o.number, o.attempt, &o.reply, out)
}

// finishAll finishes ops that have replies, all under one lock.
func (in *intake) finishAll(ops []*op) {
	in.mu.Lock()
	defer in.unlock()
	in.told = slices.Grow(in.told, len(ops))
	for _, o := range ops {
		if !o.finished.CompareAndSwap(false, true) {
			continue
		}
		c := in.findLocked(o.number)
		switch {
		case c == nil:
		case !c.abandoned.IsZero() || o.reply.Code == errs.IntakeClosed:
			// Rare, and more than the end of a call.
			in.unlock()
			in.complete(o.number, o.attempt, &o.reply, outcome{kind: replied, zones: o.reply.Zones})
			in.mu.Lock()
		default:
			in.endLocked(c, &o.reply, nil)
		}
	}
}

// closedLocked handles the answer that the intake is closed: the entry was refused, not applied. What was
// certainly proposed only this once is brought in again under the next intake.
func (in *intake) closedLocked(c *call) {
	if in.id == c.intake {
		in.id = 0
	}
	if !c.proposed && c.sent == 1 && c.abandoned.IsZero() {
		c.sent = 0
		in.holdLocked(c)
		return
	}
	in.endLocked(c, nil, errs.Of(errs.OutcomeUnknown))
}

// endWait ends the waiting of a receive: what it was given meanwhile is its outcome, or that it was given nothing.
func (in *intake) endWait(c *call) {
	in.mu.Lock()
	var to engine.NodeID
	var o *op
	if in.findLocked(c.number) == c && c.abandoned.IsZero() && !c.waitUntil.IsZero() {
		to, o = in.endWaitLocked(c)
	}
	in.unlock()
	if to != "" {
		in.sender.withdraw(to, o)
	}
}

// endWaitLocked returns what to withdraw from which node.
func (in *intake) endWaitLocked(c *call) (to engine.NodeID, o *op) {
	switch {
	case c.isHeld && !c.proposed:
		in.endLocked(c, new(Reply), nil)
		return "", nil
	case c.isHeld:
		c.waitUntil = in.now()
		return "", nil
	default:
		c.waitUntil = in.now()
		return c.sentTo, c.present
	}
}

// abandon is called when the caller does not wait any longer.
func (in *intake) abandon(c *call) {
	in.mu.Lock()
	if in.findLocked(c.number) != c || !c.abandoned.IsZero() {
		in.mu.Unlock()
		return // it has its outcome
	}
	to, o := in.giveUpLocked(c)
	in.unlock()
	if to != "" {
		in.sender.withdraw(to, o)
	}
}

// giveUpLocked ends a call before its outcome is known, and returns what to withdraw from which node.
func (in *intake) giveUpLocked(c *call) (to engine.NodeID, o *op) {
	var err *errs.Error
	possible := !c.takeBackLocked()
	switch {
	case possible:
		err = errs.Of(errs.OutcomeUnknown)
	case in.route.node == "":
		err = errs.Of(errs.NoLeader)
	default:
		err = errs.Of(errs.NotLeader)
	}
	if err.Code != errs.OutcomeUnknown {
		err.RetryAfter = time.Second
	}
	to, o = c.sentTo, c.present
	if possible && (c.first.kind == engine.CmdReceive || c.first.kind == engine.CmdReceiveID) {
		// Whether it leased something will be known, and is then given back.
		c.abandoned = in.now()
		in.tellLocked(c, nil, err)
		return to, o
	}
	in.endLocked(c, nil, err)
	c.abandoned = in.now()
	return to, o
}

// setRoute says who leads. Everything outstanding goes to a new leader under its number: the old one may be
// unable to answer, and applying is idempotent.
func (in *intake) setRoute(r route) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if r == in.route {
		return
	}
	in.route = r
	for n := in.lowest; n < in.next; n++ {
		c := in.calls[n%uint64(len(in.calls))]
		if c == nil || c.isHeld {
			continue
		}
		c.proposed = !c.takeBackLocked()
		in.holdLocked(c)
		c.heldAt = time.Time{} // a new route: no reason to wait
	}
	in.kickLocked()
}

// opened says that the intake is open under id.
func (in *intake) opened(id engine.IntakeID) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.id = id
	in.numberedAt = in.now() // opening it was a sign of life
	in.kickLocked()
}

// isOpen reports whether the cluster knows this intake.
func (in *intake) isOpen() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.id != 0
}

// refuse takes no new calls from now on, and ends the waiting of receives.
func (in *intake) refuse(err *errs.Error) {
	in.mu.Lock()
	if in.closing == nil {
		in.closing = err
	}
	type sent struct {
		to engine.NodeID
		o  *op
	}
	var waiting []sent
	for n := in.lowest; n < in.next; n++ {
		c := in.calls[n%uint64(len(in.calls))]
		if c == nil || c.waitUntil.IsZero() || !c.abandoned.IsZero() {
			continue
		}
		if to, o := in.endWaitLocked(c); to != "" {
			waiting = append(waiting, sent{to, o})
		}
	}
	in.unlock()
	for _, s := range waiting {
		in.sender.withdraw(s.to, s.o)
	}
}

func (in *intake) kickLocked() {
	select {
	case in.kick <- struct{}{}:
	default:
	}
}

// run sends what is held, until stop is closed.
func (in *intake) run(stop <-chan struct{}) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		if next, ok := in.flush(); ok {
			timer.Reset(next)
		} else {
			timer.Reset(time.Second) // abandoned calls are swept
		}
		select {
		case <-stop:
			return
		case <-in.kick:
		case <-timer.C:
		}
	}
}

// deadlineEvery is how often the deadlines of submitted calls are looked at.
const deadlineEvery = 100 * time.Millisecond

// flush sends the held calls whose time has come, in the order of their numbers, gives up those whose deadline is
// over, and returns when to look again.
func (in *intake) flush() (time.Duration, bool) {
	in.expire()
	now := in.now()
	in.mu.Lock()
	defer in.unlock()
	in.sweepLocked(now)
	var next time.Duration
	if in.timed > 0 {
		next = deadlineEvery
	}
	if in.id == 0 || in.route.node == "" || len(in.held) == 0 {
		in.held = compact(in.held)
		return next, next > 0
	}
	slices.SortFunc(in.held, func(a, b *call) int { return cmp.Compare(a.number, b.number) })
	var batch []*op
	rest := in.held[:0]
	blocked := false // an ordered call waits: those behind it do as well
	for _, c := range in.held {
		wait := againDelay - now.Sub(c.heldAt)
		switch {
		case !c.isHeld:
		case c.ordered && blocked:
			rest = append(rest, c)
		case c.sent > 0 && wait > 0:
			rest = append(rest, c)
			blocked = blocked || c.ordered
			if next == 0 || wait < next {
				next = wait
			}
		case c.ordered:
			in.unholdLocked(c)
			in.passLocked(c)
		default:
			batch = append(batch, in.sendLocked(c))
		}
	}
	clear(in.held[len(rest):])
	in.held = rest
	to := in.route.node
	if len(batch) > 0 {
		in.unlock()
		in.sendAll(to, batch)
		in.mu.Lock()
	}
	in.pumpLocked()
	return next, next > 0
}

// expire gives up the calls whose deadline is over.
func (in *intake) expire() {
	type withdrawal struct {
		to engine.NodeID
		o  *op
	}
	var out []withdrawal
	in.mu.Lock()
	if in.timed > 0 {
		now := in.now()
		for n := in.lowest; n < in.next; n++ {
			c := in.calls[n%uint64(len(in.calls))]
			if c == nil || c.deadline.IsZero() || !c.abandoned.IsZero() || now.Before(c.deadline) {
				continue
			}
			if to, o := in.giveUpLocked(c); to != "" {
				out = append(out, withdrawal{to, o})
			}
		}
	}
	in.unlock()
	for _, w := range out {
		in.sender.withdraw(w.to, w.o)
	}
}

// sweepLocked forgets abandoned calls whose outcome does not come.
func (in *intake) sweepLocked(now time.Time) {
	for n := in.lowest; n < in.next; n++ {
		c := in.calls[n%uint64(len(in.calls))]
		if c == nil || c.abandoned.IsZero() {
			if c != nil {
				break // the lowest is alive: nothing is gained behind it
			}
			continue
		}
		if now.Sub(c.abandoned) < abandonedMax {
			break
		}
		in.endLocked(c, new(Reply), nil)
	}
}

// compact drops calls that are not held any more.
func compact(held []*call) []*call {
	rest := held[:0]
	for _, c := range held {
		if c.isHeld {
			rest = append(rest, c)
		}
	}
	clear(held[len(rest):])
	return rest
}

// close ends everything outstanding: what may have been proposed as unknown, the rest with err.
func (in *intake) close(err *errs.Error) {
	in.mu.Lock()
	defer in.unlock()
	if in.closing == nil {
		in.closing = err
	}
	for n := in.lowest; n < in.next; n++ {
		c := in.calls[n%uint64(len(in.calls))]
		if c == nil {
			continue
		}
		if !c.takeBackLocked() {
			in.endLocked(c, nil, errs.Of(errs.OutcomeUnknown))
		} else {
			in.endLocked(c, nil, in.closing)
		}
	}
	in.held = nil
}

// outstanding returns the number of calls without an outcome.
func (in *intake) outstanding() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	n := 0
	for i := in.lowest; i < in.next; i++ {
		if in.calls[i%uint64(len(in.calls))] != nil {
			n++
		}
	}
	return n
}
