package transport

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"
)

// ErrTermPassed says that a newer term has begun, or leadership was lost, while something waited.
var ErrTermPassed = errors.New("transport: the term has passed")

// Advance is what the watermark tells the node: how far this term's log is known to be on disk, and until when this
// leader is known to have led.
type Advance struct {
	// Term is the term all of this holds in.
	Term uint64
	// Set counts the calls of SetRequired: Required is about the nodes of that call. An Advance of an older set than
	// the node works with says nothing to it.
	Set uint64
	// Required is the index that every required node holds.
	Required uint64
	// All is the index that every voter holds.
	All uint64
	// Confirmed is the latest instant of which is known that a majority answered, in this term, something sent at
	// that instant or later. With a single voter it is not kept up: see Watermark.Confirmed.
	Confirmed time.Time
}

// Progress is what is known of one node in this term.
type Progress struct {
	// ID is the node.
	ID hraft.ServerID
	// Match is the index up to which the node's disk holds this term's log, 0 while nothing is known.
	Match uint64
	// MatchAt is when Match last rose, zero if it has not in this term.
	MatchAt time.Time
	// Behind is since when the node has lacked something that this node's disk holds; zero when it lacks nothing.
	Behind time.Time
	// Answered is when an answer of the node last arrived in this term, whatever it said.
	Answered time.Time
	// Exchange is when the newest request that the node has answered in this term was sent.
	Exchange time.Time
}

// Silent returns for how long the node has made no progress although it lacked something, 0 if it lacks nothing.
func (p Progress) Silent(now time.Time) time.Duration {
	if p.Behind.IsZero() {
		return 0
	}
	since := p.Behind
	if p.MatchAt.After(since) {
		since = p.MatchAt
	}
	return max(now.Sub(since), 0)
}

// Watermark is a leader's knowledge of who holds which part of its log on disk, for one shard. Every row is a fact
// about a disk: a follower's says what the follower answered, and its answer waits for its disk; the leader's own row
// is what its own disk has. None is derived from what raft believes.
//
// The table belongs to one term. A new term empties it, because a deposed and re-elected leader may hold other
// entries under the same indexes.
type Watermark struct {
	self    hraft.ServerID
	durable func() uint64 // own disk
	tell    func(Advance) // never called with mu held

	mu struct {
		sync.Mutex
		term     uint64
		over     uint64 // terms up to this one have passed
		rows     map[hraft.ServerID]*row
		voters   []hraft.ServerID
		required []hraft.ServerID
		set      uint64
		changed  chan struct{} // closed and replaced when confirmed, term or voters change
	}

	// telling serialises the calls of tell, so that what the node hears only rises.
	telling struct {
		sync.Mutex
		last Advance
	}
}

type row struct {
	match    uint64
	matchAt  time.Time
	behind   time.Time
	answered time.Time
	exchange time.Time
}

func newWatermark(self hraft.ServerID, durable func() uint64, tell func(Advance)) *Watermark {
	w := &Watermark{self: self, durable: durable, tell: tell}
	w.mu.rows = make(map[hraft.ServerID]*row)
	w.mu.changed = make(chan struct{})
	return w
}

// Lead begins a term of this node's leadership: it empties the table. The transport calls it before it sends anything
// of the term; the node does so when it becomes leader, for the case that there is nobody to send to.
func (w *Watermark) Lead(term uint64) {
	w.mu.Lock()
	if term > w.mu.term {
		w.mu.term = term
		w.mu.rows = make(map[hraft.ServerID]*row)
		now := time.Now()
		for _, id := range w.mu.voters {
			w.row(id).behind = now
		}
		w.wakeLocked()
	}
	w.mu.Unlock()
}

// row returns a node's row, made if need be. w.mu is held.
func (w *Watermark) row(id hraft.ServerID) *row {
	r := w.mu.rows[id]
	if r == nil {
		r = &row{}
		w.mu.rows[id] = r
	}
	return r
}

// wakeLocked lets those who wait in WaitConfirmed look again. w.mu is held.
func (w *Watermark) wakeLocked() {
	close(w.mu.changed)
	w.mu.changed = make(chan struct{})
}

// matched notes that a node answered, successfully and in this term, a request that covers the log up to index.
func (w *Watermark) matched(id hraft.ServerID, term, index uint64, now time.Time) {
	if index == 0 {
		return
	}
	w.mu.Lock()
	if term != w.mu.term {
		w.mu.Unlock()
		return
	}
	r := w.row(id)
	if index > r.match {
		r.match, r.matchAt = index, now
	}
	if r.match >= w.durable() {
		r.behind = time.Time{}
	}
	w.mu.Unlock()
	w.say()
}

// exchanged notes that a node answered, in this term, a request that was sent at the given time.
func (w *Watermark) exchanged(id hraft.ServerID, term uint64, sent, now time.Time) {
	w.mu.Lock()
	if term != w.mu.term {
		w.mu.Unlock()
		return
	}
	r := w.row(id)
	r.answered = now
	rose := sent.After(r.exchange)
	if rose {
		r.exchange = sent
		w.wakeLocked()
	}
	w.mu.Unlock()
	if rose {
		w.say()
	}
}

// logDurable notes that this node's own disk holds more.
func (w *Watermark) logDurable() {
	w.mu.Lock()
	if w.mu.term == 0 {
		w.mu.Unlock()
		return
	}
	own := w.durable()
	now := time.Now()
	for _, id := range w.mu.voters {
		if id == w.self {
			continue
		}
		if r := w.row(id); r.match < own && r.behind.IsZero() {
			r.behind = now
		}
	}
	for id, r := range w.mu.rows {
		if id != w.self && r.match < own && r.behind.IsZero() {
			r.behind = now
		}
	}
	w.mu.Unlock()
	w.say()
}

// levelLocked computes what holds now. w.mu is held.
func (w *Watermark) levelLocked() Advance {
	own := w.durable()
	lowest := func(ids []hraft.ServerID) uint64 {
		if len(ids) == 0 {
			return 0
		}
		low := ^uint64(0)
		for _, id := range ids {
			low = min(low, w.matchLocked(id, own))
		}
		return low
	}
	return Advance{Term: w.mu.term, Set: w.mu.set, Required: lowest(w.mu.required), All: lowest(w.mu.voters),
		Confirmed: w.confirmedLocked()}
}

// matchLocked returns a node's row; own is this node's. w.mu is held.
func (w *Watermark) matchLocked(id hraft.ServerID, own uint64) uint64 {
	if id == w.self {
		return own
	}
	if r := w.mu.rows[id]; r != nil {
		return r.match
	}
	return 0
}

// confirmedLocked returns the latest instant that a majority of the voters confirms, zero when there is none or this
// node alone is the majority. w.mu is held.
func (w *Watermark) confirmedLocked() time.Time {
	need := len(w.mu.voters)/2 + 1
	times := make([]time.Time, 0, 8)
	for _, id := range w.mu.voters {
		if id == w.self {
			need--
			continue
		}
		if r := w.mu.rows[id]; r != nil && !r.exchange.IsZero() {
			times = append(times, r.exchange)
		}
	}
	if need <= 0 || len(times) < need {
		return time.Time{}
	}
	slices.SortFunc(times, func(a, b time.Time) int { return b.Compare(a) })
	return times[need-1]
}

// say tells the node if something has risen.
func (w *Watermark) say() {
	if w.tell == nil {
		return
	}
	w.telling.Lock()
	defer w.telling.Unlock()
	w.mu.Lock()
	a := w.levelLocked()
	w.mu.Unlock()
	last := w.telling.last
	if a.Term == last.Term {
		if a.Set == last.Set {
			a.Required = max(a.Required, last.Required)
		}
		a.All = max(a.All, last.All)
		if a.Confirmed.Before(last.Confirmed) {
			a.Confirmed = last.Confirmed
		}
	}
	if a == last {
		return
	}
	w.telling.last = a
	w.tell(a)
}

// SetConfiguration tells the table who the voters are: the latest configuration, committed or not, as raft itself
// counts. It does not call OnAdvance.
func (w *Watermark) SetConfiguration(c hraft.Configuration) {
	voters := make([]hraft.ServerID, 0, len(c.Servers))
	keep := make(map[hraft.ServerID]bool, len(c.Servers))
	for _, server := range c.Servers {
		keep[server.ID] = true
		if server.Suffrage == hraft.Voter {
			voters = append(voters, server.ID)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.voters = voters
	for id := range w.mu.rows {
		if !keep[id] {
			delete(w.mu.rows, id)
		}
	}
	w.wakeLocked()
}

// SetRequired tells the table which nodes an acknowledgement waits for: the in-sync set. It returns what holds under
// the new set, without calling OnAdvance; what OnAdvance says about an older set is void from here on (Advance.Set).
// A larger set may have a lower watermark: the node replaces its own copy by the answer.
func (w *Watermark) SetRequired(ids ...hraft.ServerID) Advance {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.required = slices.Clone(ids)
	w.mu.set++
	return w.levelLocked()
}

// Level returns what holds now.
func (w *Watermark) Level() Advance {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.levelLocked()
}

// Term returns the term the table belongs to, 0 before this node first led.
func (w *Watermark) Term() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.mu.term
}

// Match returns the index up to which a node's disk is known to hold the log of the present term.
func (w *Watermark) Match(id hraft.ServerID) uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.matchLocked(id, w.durable())
}

// Holders appends the nodes whose disks are known to hold the log up to index, this one included, to dst.
func (w *Watermark) Holders(index uint64, dst []hraft.ServerID) []hraft.ServerID {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.durable() >= index {
		dst = append(dst, w.self)
	}
	for id, r := range w.mu.rows {
		if id != w.self && r.match >= index {
			dst = append(dst, id)
		}
	}
	return dst
}

// Progress returns what is known of a node in the present term. The zero Progress (but for its ID) stands for a node
// that has not been heard of.
func (w *Watermark) Progress(id hraft.ServerID) Progress {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := Progress{ID: id}
	if id == w.self {
		p.Match = w.durable()
		return p
	}
	if r := w.mu.rows[id]; r != nil {
		p.Match, p.MatchAt, p.Behind, p.Answered, p.Exchange = r.match, r.matchAt, r.behind, r.answered, r.exchange
	}
	return p
}

// Confirmed returns the latest instant of which is known that a majority of the voters answered, in the present term,
// something sent at that instant or later. A node that is the majority by itself needs nobody: for it that is now.
//
// A read that arrived before that instant may be answered from state that has applied everything committed when it
// arrived, if this node still leads in that term (decision 13).
func (w *Watermark) Confirmed() (term uint64, at time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.aloneLocked() {
		return w.mu.term, time.Now()
	}
	return w.mu.term, w.confirmedLocked()
}

func (w *Watermark) aloneLocked() bool {
	return len(w.mu.voters) == 1 && w.mu.voters[0] == w.self
}

// WaitConfirmed waits until a majority has answered, in the given term, something sent at or after since. It does not
// cause anything to be sent: raft's heartbeats do, and Raft.VerifyLeader asks for them at once. The error is
// ErrTermPassed or the context's.
func (w *Watermark) WaitConfirmed(ctx context.Context, term uint64, since time.Time) error {
	for {
		w.mu.Lock()
		now, alone, at := w.mu.term, w.aloneLocked(), w.confirmedLocked()
		over, changed := w.mu.over, w.mu.changed
		w.mu.Unlock()
		switch {
		case now != term || term <= over:
			return ErrTermPassed
		case alone || !at.IsZero() && !at.Before(since):
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// passed ends all terms up to the given one: what waits in them fails.
func (w *Watermark) passed(term uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if term > w.mu.over {
		w.mu.over = term
		w.wakeLocked()
	}
}
