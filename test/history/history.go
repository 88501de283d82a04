// Package history records what concurrent clients of a queue saw and checks it against the promises of the
// product. The record is made on one clock, outside the product; each operation has an interval in which it
// took effect, if it did.
//
// The promises are numbered as in the reliability notes:
//
//	S1   a publish that was acknowledged is, in each group, acknowledged or delivered until it is
//	S1b  a publish of unknown outcome reaches all groups or none, a refused one reaches none
//	S2   each redelivery has a reason: the lease ended, it was given back, or a reply was lost
//	S3   after a confirmed acknowledgement the group never sees the message again
//	S4   no second lease before the first one has ended
//	S5   a receipt works exactly as long as no newer lease exists; within its lease it is never refused
//	S6   delivery counts rise with each lease
//	S10  what comes out is what went in, once, under one message id
//
// [Check] applies the rules one by one, so that a violation names its rule. [Linearizable] asks porcupine the
// same question in another form: is there an order of all operations on a message that a lease could have gone
// through?
package history

import (
	"fmt"
	"sync"
	"time"

	"tercet.dev/tercet/test/harness"
)

// A Moment is the time since the recorder was made.
type Moment time.Duration

// String formats a moment in seconds.
func (m Moment) String() string { return fmt.Sprintf("%.3fs", time.Duration(m).Seconds()) }

// An Interval is from before an operation was sent until after its answer arrived.
type Interval struct{ Start, End Moment }

// String formats an interval.
func (i Interval) String() string { return fmt.Sprintf("[%v, %v]", i.Start, i.End) }

// Publish is one attempt to send a message. Each attempt has a key of its own, which is part of the body.
type Publish struct {
	Interval
	Key     string
	Outcome harness.Outcome
	// ID and Zones are set when the outcome is OK.
	ID    string
	Zones int
	// Via names the node, What describes an answer that was not OK.
	Via, What string
}

// Receive is one receive of a group. Its grants are recorded apart.
type Receive struct {
	Interval
	Group   string
	Outcome harness.Outcome
	// Waited is set for one that was ready to wait for messages, and found none.
	Waited bool
	Via    string
	What   string
}

// Grant is one lease of one message, as a receive brought it.
type Grant struct {
	Interval
	Group, Key, ID, Receipt string
	Count                   int
	Visibility              time.Duration
	Via                     string
}

// Settle is an attempt to end or change a lease.
type Settle struct {
	Interval
	Group, Receipt string
	// Ack is set for an acknowledgement; otherwise the lease was to end Visibility from then.
	Ack        bool
	Visibility time.Duration
	Outcome    harness.Outcome
	Status     int
	Code       string
	Via, What  string
}

// A Recorder collects the record. Its methods may be called from several goroutines.
type Recorder struct {
	origin time.Time

	mu        sync.Mutex
	publishes []Publish
	receives  []Receive
	grants    []Grant
	settles   []Settle
	broken    []string
	marks     []Mark
	disaster  Moment
	// open holds, per group, what was published with outcome OK and is not acknowledged; see Unsettled.
	open map[string]map[string]bool
}

// A Mark notes when something was done to the cluster.
type Mark struct {
	At   Moment
	What string
}

// NewRecorder returns a recorder for these consumer groups.
func NewRecorder(groups ...string) *Recorder {
	r := &Recorder{origin: time.Now(), open: map[string]map[string]bool{}}
	for _, g := range groups {
		r.open[g] = map[string]bool{}
	}
	return r
}

// Now returns the present moment.
func (r *Recorder) Now() Moment { return Moment(time.Since(r.origin)) }

// Mark notes an event and returns its moment.
func (r *Recorder) Mark(format string, args ...any) Moment {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := Mark{Moment(time.Since(r.origin)), fmt.Sprintf(format, args...)}
	r.marks = append(r.marks, m)
	return m.At
}

// Disaster notes that the cluster lost its majority for good and was founded anew from what one node had: what was
// published with all zones is there, but settlements and leases from before may be forgotten (the exception to S3
// that the reliability notes name). There may be one in a record.
func (r *Recorder) Disaster(format string, args ...any) Moment {
	at := r.Mark(format, args...)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.disaster = at
	return at
}

// Publish records an attempt that began at start and ends now.
func (r *Recorder) Publish(p Publish) {
	p.End = r.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.publishes = append(r.publishes, p)
	if p.Outcome == harness.OK {
		for _, open := range r.open {
			// A consumer may have acknowledged it before its publisher had the answer.
			if _, early := open[p.Key]; !early {
				open[p.Key] = true
			}
		}
	}
}

// Receive records a receive that ends now, with what it brought.
func (r *Recorder) Receive(rec Receive, grants []Grant) {
	rec.End = r.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.receives = append(r.receives, rec)
	for _, g := range grants {
		g.Interval = rec.Interval
		g.Group = rec.Group
		g.Via = rec.Via
		r.grants = append(r.grants, g)
	}
}

// Settle records an attempt that ends now on a message.
func (r *Recorder) Settle(s Settle, key string) {
	s.End = r.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.settles = append(r.settles, s)
	if s.Ack && s.Outcome != harness.No {
		r.open[s.Group][key] = false
	}
}

// Broken records that something came out otherwise than it went in.
func (r *Recorder) Broken(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.broken = append(r.broken, fmt.Sprintf(format, args...))
}

// Unsettled returns how many messages that were published with outcome OK the group has not acknowledged (an
// acknowledgement of unknown outcome counts as one).
func (r *Recorder) Unsettled(group string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, open := range r.open[group] {
		if open {
			n++
		}
	}
	return n
}

// PublishedOK returns how many publishes had the outcome OK so far.
func (r *Recorder) PublishedOK() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for i := range r.publishes {
		if r.publishes[i].Outcome == harness.OK {
			n++
		}
	}
	return n
}

// History returns a copy of the record.
func (r *Recorder) History() *History {
	r.mu.Lock()
	defer r.mu.Unlock()
	h := &History{
		Publishes: append([]Publish(nil), r.publishes...),
		Receives:  append([]Receive(nil), r.receives...),
		Grants:    append([]Grant(nil), r.grants...),
		Settles:   append([]Settle(nil), r.settles...),
		Broken:    append([]string(nil), r.broken...),
		Marks:     append([]Mark(nil), r.marks...),
		Disaster:  r.disaster,
	}
	for g := range r.open {
		h.Groups = append(h.Groups, g)
	}
	return h
}

// A History is a finished record.
type History struct {
	Groups    []string
	Publishes []Publish
	Receives  []Receive
	Grants    []Grant
	Settles   []Settle
	Broken    []string
	Marks     []Mark
	// Disaster is 0, or when what a majority had agreed on may have been lost; see Recorder.Disaster.
	Disaster Moment
}

// parted reports whether the disaster came between two operations that began then.
func (h *History) parted(earlier, later Moment) bool {
	return earlier <= h.Disaster && h.Disaster < later
}
