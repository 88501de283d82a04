package engine

import (
	"encoding/binary"
	"slices"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// intake keeps the results of one node's numbered commands from the lowest it still waits for on, so that a
// command of unknown outcome can be proposed again and is done once.
type intake struct {
	id    IntakeID
	node  NodeID
	nonce uint64
	// heard is the cluster time of the last entry that carried commands of it.
	heard  int64
	lowest uint64
	// high is one more than the highest number with a result; slots is a ring indexed by number.
	high  uint64
	slots []outcome
}

// outcome is a recorded result, without payloads.
type outcome struct {
	kind outcomeKind
	code errs.Code
	// acked is the number of receipts of a Settle that were all in order.
	acked     uint32
	published Published
	count     int64
	more      *outcomeMore
}

type outcomeKind uint8

const (
	outcomeNone outcomeKind = iota
	outcomeDone
)

// outcomeMore is what only some results have.
type outcomeMore struct {
	// result is without Deliveries; nil if there is nothing but those.
	result *Result
	grants []grantRecord
}

// grantRecord is a Delivery without its contents.
type grantRecord struct {
	id                           MessageID
	receipt                      Receipt
	stream                       StreamID
	count                        uint32
	published, expires, leasedTo int64
}

func (o *outcome) set(r *Result) {
	*o = outcome{kind: outcomeDone, code: r.Code, published: r.Published, count: r.Count}
	plain := r.Intake == 0 && r.RetryAfter == 0 && r.Inflight == 0 && r.ExpiresAt == 0 && r.Original == (MessageID{}) &&
		r.Revision == 0 && r.Next == 0 && r.Upload == 0 && r.Stream == nil
	if plain && len(r.Deliveries) == 0 && !slices.ContainsFunc(r.Codes, func(c errs.Code) bool { return c != errs.OK }) {
		o.acked = uint32(len(r.Codes))
		return
	}
	if r.Stream.deepReads() {
		// What it read cannot be read again (decision 12).
		o.more = &outcomeMore{result: &Result{Code: errs.OutcomeUnknown}}
		return
	}
	m := &outcomeMore{}
	if !plain || len(r.Codes) > 0 {
		rest := *r
		rest.Deliveries, rest.Stream = nil, r.Stream.bare()
		m.result = &rest
	}
	if len(r.Deliveries) > 0 {
		m.grants = make([]grantRecord, len(r.Deliveries))
		for i := range r.Deliveries {
			d := &r.Deliveries[i]
			m.grants[i] = grantRecord{id: d.ID, receipt: d.Receipt, stream: d.Stream, count: d.Count, published: d.PublishedAt, expires: d.ExpiresAt, leasedTo: d.LeaseUntil}
		}
	}
	o.more = m
}

func (o *outcome) result() Result {
	r := Result{Code: o.code, Published: o.published, Count: o.count}
	if o.acked > 0 {
		r.Codes = make([]errs.Code, o.acked)
	}
	if o.more == nil {
		return r
	}
	if o.more.result != nil {
		r = *o.more.result
		r.Codes = append([]errs.Code(nil), r.Codes...)
		r.Stream = r.Stream.bare()
	}
	if len(o.more.grants) > 0 {
		r.Deliveries = make([]Delivery, len(o.more.grants))
		for i := range o.more.grants {
			g := &o.more.grants[i]
			r.Deliveries[i] = Delivery{ID: g.id, Receipt: g.receipt, Stream: g.stream, Count: g.count, PublishedAt: g.published, ExpiresAt: g.expires, LeaseUntil: g.leasedTo}
		}
	}
	return r
}

// settle drops the results below lowest.
func (in *intake) settle(lowest uint64) {
	if lowest <= in.lowest {
		return
	}
	for n := in.lowest; n < min(lowest, in.high); n++ {
		*in.slot(n) = outcome{}
	}
	in.lowest = lowest
	in.high = max(in.high, lowest)
	if in.high == in.lowest && len(in.slots) > 1<<10 {
		in.slots = nil
	}
}

func (in *intake) slot(n uint64) *outcome { return &in.slots[n&uint64(len(in.slots)-1)] }

// find returns the recorded outcome of a number.
func (in *intake) find(n uint64) *outcome {
	if n < in.lowest || n >= in.high {
		return nil
	}
	if o := in.slot(n); o.kind != outcomeNone {
		return o
	}
	return nil
}

// room reports whether a number lies within what an intake may have outstanding.
func (in *intake) room(n uint64) bool { return n-in.lowest < limits.IntakeOpenMax }

// record keeps the result of a number for which room is.
func (in *intake) record(n uint64, r *Result) {
	need := n - in.lowest + 1
	if need > uint64(len(in.slots)) {
		size := max(uint64(len(in.slots)), 64)
		for size < need {
			size *= 2
		}
		old := *in
		in.slots = make([]outcome, size)
		for k := old.lowest; k < old.high; k++ {
			*in.slot(k) = *old.slot(k)
		}
	}
	in.slot(n).set(r)
	in.high = max(in.high, n+1)
}

const intakeRowVersion = 1

func (in *intake) appendRow(b []byte) []byte {
	b = append(b, intakeRowVersion)
	b = appendBytes(b, in.node)
	b = binary.AppendUvarint(b, in.nonce)
	b = appendVarint(b, in.heard)
	b = binary.AppendUvarint(b, in.lowest)
	b = binary.AppendUvarint(b, in.high)
	last := in.lowest
	for n := in.lowest; n < in.high; n++ {
		o := in.find(n)
		if o == nil {
			continue
		}
		b = binary.AppendUvarint(b, n-last)
		last = n
		at := len(b)
		r := o.result()
		b = AppendResult(append(b, 0, 0, 0, 0), &r)
		binary.LittleEndian.PutUint32(b[at:], uint32(len(b)-at-4))
	}
	return b
}

func parseIntake(id IntakeID, row []byte) (*intake, error) {
	r := reader{b: row}
	if r.u8() != intakeRowVersion {
		return nil, errMalformed
	}
	in := &intake{id: id, node: NodeID(r.bytes()), nonce: r.uvarint(), heard: r.varint(), lowest: r.uvarint()}
	high := r.uvarint()
	if r.bad || high < in.lowest || high-in.lowest > limits.IntakeOpenMax {
		return nil, errMalformed
	}
	in.high = in.lowest
	n := in.lowest
	for len(r.b) > 0 {
		n += r.uvarint()
		head := r.take(4)
		if r.bad || n < in.lowest || n >= high {
			return nil, errMalformed
		}
		res, err := DecodeResult(r.take(uint64(binary.LittleEndian.Uint32(head))))
		if err != nil {
			return nil, err
		}
		in.record(n, &res)
	}
	if r.bad {
		return nil, errMalformed
	}
	// Numbers without a result up to high need slots as well.
	if high > in.high {
		if need := high - in.lowest; need > uint64(len(in.slots)) {
			in.record(high-1, &Result{})
			*in.slot(high - 1) = outcome{}
		}
		in.high = high
	}
	return in, nil
}
