package raft

import "sync"

// acks holds the publishes that are applied and wait for the disks of the zones they require (R4). Applied in
// the order of their entries, they wait in that order, one queue for each requirement.
type acks struct {
	// watermark returns the last index that every node of the in-sync set, and every voter, has on disk.
	watermark func() (inSync, all uint64)
	// zones counts the zones that hold an index.
	zones func(index uint64) int

	mu     sync.Mutex
	closed bool
	inSync []*op
	all    []*op
}

// add takes an applied publish.
func (a *acks) add(o *op, durability Durability) {
	a.mu.Lock()
	closed := a.closed
	switch {
	case closed:
	case o.require == AllZones || o.require == Default && durability == All:
		a.all = append(a.all, o)
	default:
		a.inSync = append(a.inSync, o)
	}
	a.mu.Unlock()
	if closed {
		o.endAgain(true)
	}
}

// advance ends the publishes whose watermark has been reached. It is called whenever a mark or the in-sync set
// changed, from any goroutine.
func (a *acks) advance() {
	a.mu.Lock()
	if len(a.inSync) == 0 && len(a.all) == 0 {
		a.mu.Unlock()
		return
	}
	inSync, all := a.watermark()
	var ready []*op
	a.inSync, ready = reached(a.inSync, inSync, ready)
	a.all, ready = reached(a.all, all, ready)
	a.mu.Unlock()
	var index uint64
	zones := 0
	for _, o := range ready {
		if o.reply.Index != index {
			index = o.reply.Index
			zones = a.zones(index)
		}
		o.reply.Zones = zones
	}
	repliedTo(ready)
}

// reached moves the head of queue up to index mark to ready.
func reached(queue []*op, mark uint64, ready []*op) (rest, out []*op) {
	n := 0
	for n < len(queue) && (queue[n].reply.Index <= mark || queue[n].dropped.Load()) {
		n++
	}
	ready = append(ready, queue[:n]...)
	if n == len(queue) {
		clear(queue)
		return queue[:0], ready
	}
	return queue[n:], ready
}

// setClosed closes or opens. Closing sends everything that waits back to its origins: the marks it waits for are
// of a term that is over.
func (a *acks) setClosed(closed bool) {
	a.mu.Lock()
	a.closed = closed
	var out []*op
	if closed {
		out = append(a.inSync, a.all...)
		a.inSync, a.all = nil, nil
	}
	a.mu.Unlock()
	for _, o := range out {
		o.endAgain(true)
	}
}

// waiting returns how many publishes wait.
func (a *acks) waiting() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.inSync) + len(a.all)
}
