package history

import (
	"fmt"
	"time"

	"github.com/anishathalye/porcupine"

	"tercet.dev/tercet/test/harness"
)

// The model of one message in one group, for porcupine: the count of the newest lease, and whether the group
// has acknowledged the message.
type leaseState struct {
	count int
	acked bool
}

// leaseOp is an operation on it, with its result.
type leaseOp struct {
	// kind is 'g' for a grant, 'a' for an acknowledgement, 'e' for a change of the lease, 'd' for the disaster.
	kind    byte
	count   int
	outcome harness.Outcome
	// running is set when the lease had certainly not ended by time when the answer arrived.
	running bool
}

// String formats an operation for porcupine's picture.
func (o leaseOp) String() string {
	switch o.kind {
	case 'g':
		return fmt.Sprintf("lease #%d", o.count)
	case 'd':
		return "disaster"
	case 'a':
		return fmt.Sprintf("ack #%d: %s", o.count, o.outcome)
	}
	return fmt.Sprintf("extend #%d: %s", o.count, o.outcome)
}

var leaseModel = (&porcupine.NondeterministicModel{
	Init: func() []any { return []any{leaseState{}} },
	Step: func(state, input, _ any) []any {
		s, op := state.(leaseState), input.(leaseOp)
		current := !s.acked && op.count == s.count
		switch {
		case op.kind == 'd':
			// The survivor may be anywhere in the past.
			states := []any{s}
			for count := range s.count + 1 {
				states = append(states, leaseState{count: count})
			}
			return states
		case op.kind == 'g':
			if s.acked || op.count <= s.count {
				return nil
			}
			return []any{leaseState{count: op.count}}
		case op.outcome == harness.No:
			// The receipt was not the newest one, its message was acknowledged, or its time was over.
			if current && op.running {
				return nil
			}
			return []any{s}
		case op.outcome == harness.OK && !current:
			return nil
		case op.kind == 'a' && op.outcome == harness.OK:
			return []any{leaseState{s.count, true}}
		case op.kind == 'a' && current:
			return []any{s, leaseState{s.count, true}}
		}
		return []any{s}
	},
}).ToModel()

// Linearizable checks with porcupine, for each message of each group that saw more than one lease and one
// acknowledgement, that some order of all operations explains their results. It returns how many were checked,
// and those that cannot be explained.
func Linearizable(h *History, timeout time.Duration) (checked int, violations []string) {
	scratch := &Report{}
	leases, byReceipt := collectLeases(h, scratch, map[string]Publish{})
	attachSettles(h, scratch, byReceipt)
	const never = int64(1) << 62 // an operation of unknown outcome may still take effect
	deadline := time.Now().Add(timeout)
	for _, mk := range sortedKeys(leases) {
		var ops []porcupine.Operation
		add := func(in leaseOp, at Interval) {
			end := int64(at.End)
			if in.outcome == harness.Unknown {
				end = never
			}
			ops = append(ops, porcupine.Operation{ClientId: len(ops), Input: in, Call: int64(at.Start), Return: end})
		}
		if at := h.Disaster; at > 0 {
			add(leaseOp{kind: 'd', outcome: harness.OK}, Interval{at, at})
		}
		for _, l := range leases[mk] {
			add(leaseOp{kind: 'g', count: l.Count, outcome: harness.OK}, l.Interval)
			for _, s := range l.settles {
				if s.Outcome == harness.No && !refusesReceipt(s) {
					continue
				}
				op := leaseOp{kind: 'e', count: l.Count, outcome: s.Outcome, running: s.End < l.until(s.End)-Moment(Epsilon) && !h.parted(l.Start, s.End)}
				if s.Ack {
					op.kind = 'a'
				}
				add(op, s.Interval)
			}
		}
		if len(ops) <= 2 {
			continue
		}
		checked++
		switch porcupine.CheckOperationsTimeout(leaseModel, ops, max(time.Until(deadline), time.Millisecond)) {
		case porcupine.Illegal:
			violations = append(violations, fmt.Sprintf("group %s: no order explains what happened to %s: %v", mk.group, mk.key, ops))
		case porcupine.Unknown:
			violations = append(violations, fmt.Sprintf("group %s: %s could not be checked in time (%d operations)", mk.group, mk.key, len(ops)))
		}
	}
	return checked, violations
}
