package raft

import (
	"container/heap"
	"slices"
	"sync"
	"time"

	"tercet.dev/tercet/engine"
)

// The parking lot holds receives that found nothing, in the leader's memory. Why no wake-up is lost (R8):
//
//  1. A receive enters the lot only in the step that found nothing for it: inside engine.Park, under the lock
//     that Apply takes, or on the apply goroutine between its own apply and the next.
//  2. Every apply reports the groups it made deliverable, and the apply goroutine marks them ready here before
//     the next apply.
//  3. Of what becomes deliverable by time alone, the earliest instant per group is kept here and asked for
//     anew whenever a command touched the group.
//  4. A group's ready mark is cleared before the engine is asked whether something can be served, so that an
//     apply between the answer and the next step sets it again.
//
// A receive leaves the lot to ride in an entry, behind the publish that woke it or alone. One that finds
// nothing after all comes back to its place, which is by the time it began to wait. One that waits for several
// groups has its place in each, and leaves all of them when it leaves one.
type lot struct {
	// signal wakes the coalescer, which is the only one that lets receives ride.
	signal func()

	// expired is called, on a goroutine of its own, when the time of a parked receive is over.
	expired func(o *op)

	mu     sync.Mutex
	closed bool
	groups map[engine.GroupRef]*waiters
	topics map[string][]*waiters
	ready  []*waiters
	// stale lists the groups whose due time has to be asked for; dues orders those that have one.
	stale []*waiters
	dues  dues
	size  int
}

// waiters are the parked receives of one group.
type waiters struct {
	ref engine.GroupRef
	// ops wait, by since.
	ops     []*op
	isReady bool
	isStale bool
	// due is when something becomes deliverable by time, in cluster time; 0 for never. at is its place among the dues
	// of the lot, -1 for none.
	due int64
	at  int
	// notBefore keeps a due time that passed without effect from being acted on in a circle.
	notBefore int64
}

// dues is a heap of groups by their due times. Every step of the coalescer looks at the first: with thousands of groups
// that wait, all of them cannot be looked at.
type dues []*waiters

// Len, Less, Swap, Push and Pop implement heap.Interface.
func (d dues) Len() int           { return len(d) }
func (d dues) Less(i, j int) bool { return d[i].due < d[j].due }
func (d dues) Swap(i, j int)      { d[i], d[j] = d[j], d[i]; d[i].at, d[j].at = i, j }
func (d *dues) Push(x any) {
	w := x.(*waiters)
	w.at = len(*d)
	*d = append(*d, w)
}
func (d *dues) Pop() any {
	n := len(*d) - 1
	w := (*d)[n]
	(*d)[n] = nil
	*d = (*d)[:n]
	w.at = -1
	return w
}

// setDueLocked notes when something becomes deliverable to w by time, 0 for never.
func (l *lot) setDueLocked(w *waiters, due int64) {
	w.due = due
	switch {
	case due == 0 && w.at >= 0:
		heap.Remove(&l.dues, w.at)
	case due == 0:
	case w.at >= 0:
		heap.Fix(&l.dues, w.at)
	default:
		heap.Push(&l.dues, w)
	}
}

// parkState is where a receive that may park is.
type parkState uint8

const (
	// notParked: not in the lot.
	notParked parkState = iota
	// waiting: in the lot.
	waiting
	// riding: taken out of the lot into an entry.
	riding
)

// ridersBytesMax bounds the receives that ride behind one entry's publishes.
const ridersBytesMax = 64 << 10

// ridersAlone is how many receives of one group are proposed when something became deliverable without a
// publish to count. When all of them are served, the next ones follow.
const ridersAlone = 16

// dueRetryMs is how soon a due time is acted on again that had no effect, as one whose group is at its
// concurrency limit.
const dueRetryMs = 20

func newLot(signal func()) *lot {
	return &lot{signal: signal, expired: func(*op) {}, closed: true, groups: make(map[engine.GroupRef]*waiters), topics: make(map[string][]*waiters)}
}

// parking is what came of an attempt to park.
type parking uint8

const (
	parked parking = iota
	// timeOver: the receive's time is over, or nobody waits for it.
	timeOver
	// lotClosed: the node does not lead any more.
	lotClosed
)

// add parks o, unless that is too late.
func (l *lot) add(o *op) parking {
	l.mu.Lock()
	defer l.mu.Unlock()
	o.park = notParked
	if l.closed {
		return lotClosed
	}
	if o.expired || o.dropped.Load() {
		return timeOver
	}
	if o.timer == nil {
		o.timer = time.AfterFunc(time.Until(o.parkUntil), func() { l.expire(o) })
	}
	for _, ref := range o.refs {
		w := l.groups[ref]
		if w == nil {
			w = &waiters{ref: ref, at: -1}
			l.groups[ref] = w
			l.topics[ref.Topic] = append(l.topics[ref.Topic], w)
		}
		i := len(w.ops)
		for i > 0 && w.ops[i-1].since.After(o.since) {
			i--
		}
		w.ops = slices.Insert(w.ops, i, o)
		l.staleLocked(w)
	}
	o.park = waiting
	l.size++
	return parked
}

// done stops the clock of a receive that got its outcome.
func (l *lot) done(o *op) {
	l.mu.Lock()
	defer l.mu.Unlock()
	o.park = notParked
	if o.timer != nil {
		o.timer.Stop()
	}
}

// expire ends the waiting of o, because its time is over or nobody waits for it. One that is riding is only
// marked: its entry decides.
func (l *lot) expire(o *op) {
	l.mu.Lock()
	o.expired = true
	if o.timer != nil {
		o.timer.Stop()
	}
	out := o.park == waiting
	if out {
		l.leaveLocked(o, nil)
		l.size--
		o.park = notParked
	}
	l.mu.Unlock()
	if out {
		l.expired(o)
	}
}

// leaveLocked takes o out of the groups it waits for, but for one.
func (l *lot) leaveLocked(o *op, but *waiters) {
	for _, ref := range o.refs {
		w := l.groups[ref]
		if w == nil || w == but {
			continue
		}
		if i := slices.Index(w.ops, o); i >= 0 {
			w.ops = slices.Delete(w.ops, i, i+1)
			l.removedLocked(w)
		}
	}
}

// removedLocked forgets w if nobody waits there any more.
func (l *lot) removedLocked(w *waiters) {
	if len(w.ops) > 0 {
		return
	}
	delete(l.groups, w.ref)
	l.setDueLocked(w, 0)
	rest := slices.DeleteFunc(l.topics[w.ref.Topic], func(x *waiters) bool { return x == w })
	if len(rest) == 0 {
		delete(l.topics, w.ref.Topic)
	} else {
		l.topics[w.ref.Topic] = rest
	}
}

// wake marks a group that may now give something.
func (l *lot) wake(ref engine.GroupRef) {
	l.mu.Lock()
	w := l.groups[ref]
	if w != nil && !w.isReady {
		w.isReady = true
		l.ready = append(l.ready, w)
	}
	l.mu.Unlock()
	if w != nil {
		l.signal()
	}
}

// touch has the group's due time asked for again.
func (l *lot) touch(ref engine.GroupRef) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if w := l.groups[ref]; w != nil {
		l.staleLocked(w)
	}
}

func (l *lot) staleLocked(w *waiters) {
	if !w.isStale {
		w.isStale = true
		l.stale = append(l.stale, w)
		l.signal()
	}
}

// behind takes the receives that ride behind a publish of the given number of messages to topic: of each group
// as many as could be served, in the order of waiting, within budget bytes. It returns what is left of it.
func (l *lot) behind(topic string, messages, budget int, ride []*op) ([]*op, int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	groups := l.topics[topic]
	for i := len(groups) - 1; i >= 0; i-- { // takeLocked may remove the group
		w := groups[i]
		served, n := 0, 0
		for n < len(w.ops) && served < messages && len(w.ops[n].cmd) <= budget {
			served += max(1, w.ops[n].count)
			budget -= len(w.ops[n].cmd)
			n++
		}
		ride = l.takeLocked(w, n, ride)
	}
	return ride, budget
}

// takeLocked moves the first n ops of w to ride.
func (l *lot) takeLocked(w *waiters, n int, ride []*op) []*op {
	if n == 0 {
		return ride
	}
	for _, o := range w.ops[:n] {
		o.park = riding
		if len(o.refs) > 1 {
			l.leaveLocked(o, w)
		}
	}
	ride = append(ride, w.ops[:n]...)
	w.ops = slices.Delete(w.ops, 0, n)
	l.size -= n
	l.removedLocked(w)
	return ride
}

// parker is what the lot asks the engine.
type parker interface {
	Park(r *engine.Receive, now engine.Stamp, register func()) (bool, error)
	NextDue(topic, group string) (int64, bool)
}

// alone takes the receives of ready groups that something can be served to now.
func (l *lot) alone(eng parker, now engine.Stamp, ride []*op) ([]*op, error) {
	for {
		l.mu.Lock()
		if len(l.ready) == 0 {
			l.mu.Unlock()
			return ride, nil
		}
		w := l.ready[0]
		l.ready = l.ready[1:]
		w.isReady = false // before the engine is asked: see 4 above
		var head *op
		if len(w.ops) > 0 {
			head = w.ops[0]
		}
		l.mu.Unlock()
		if head == nil {
			continue
		}
		empty, err := eng.Park(head.receive, now, func() {})
		if err != nil {
			return ride, err
		}
		if empty {
			l.mu.Lock()
			if len(w.ops) > 0 && w.due == 0 {
				l.staleLocked(w)
			}
			l.mu.Unlock()
			continue
		}
		l.mu.Lock()
		ride = l.takeLocked(w, min(ridersAlone, len(w.ops)), ride)
		l.mu.Unlock()
	}
}

// refresh asks for the due times that may have changed and wakes the groups whose time has come. It returns
// the earliest due time that is still ahead, 0 for none.
func (l *lot) refresh(eng parker, now int64) int64 {
	for {
		l.mu.Lock()
		if len(l.stale) == 0 {
			break
		}
		w := l.stale[0]
		l.stale = l.stale[1:]
		w.isStale = false
		present := len(w.ops) > 0
		l.mu.Unlock()
		if !present {
			continue
		}
		due, ok := eng.NextDue(w.ref.Topic, w.ref.Group)
		l.mu.Lock()
		switch {
		case l.groups[w.ref] != w: // nobody waits any more
		case ok:
			l.setDueLocked(w, max(due, w.notBefore, 1))
		default:
			l.setDueLocked(w, 0)
		}
		l.mu.Unlock()
	}
	defer l.mu.Unlock()
	for len(l.dues) > 0 {
		w := l.dues[0]
		if w.due > now {
			return w.due
		}
		// Asked for again when the wake-up led to nothing, or to a receive.
		l.setDueLocked(w, 0)
		w.notBefore = now + dueRetryMs
		if !w.isReady {
			w.isReady = true
			l.ready = append(l.ready, w)
		}
	}
	return 0
}

// open lets receives in.
func (l *lot) open() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = false
}

// close empties the lot and keeps it empty.
func (l *lot) close() []*op {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	var out []*op
	for _, w := range l.groups {
		for _, o := range w.ops {
			if o.park == notParked {
				continue // it waited for another group as well
			}
			o.park = notParked
			if o.timer != nil {
				o.timer.Stop()
			}
			out = append(out, o)
		}
		w.ops, w.at = nil, -1
	}
	clear(l.groups)
	clear(l.topics)
	l.ready, l.stale, l.dues, l.size = nil, nil, nil, 0
	return out
}

// len returns the number of parked receives.
func (l *lot) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.size
}
