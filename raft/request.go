package raft

import (
	"sync/atomic"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// An op is one command on its way through the leader: queued, proposed, applied, waiting for the watermark, or
// parked. It belongs to whoever brought it in, its origin: a call of this process or a forward connection.
type op struct {
	intake         engine.IntakeID
	number, lowest uint64
	cmd            []byte

	kind engine.Kind
	// topic is a publish's, a part of cmd.
	topic []byte
	// ref names the topic and group of a receive that may park.
	ref engine.GroupRef
	// count is the number of messages of a publish, the most that a receive takes.
	count int
	// receive is the decoded command of a receive, for questions to the engine.
	receive *engine.Receive
	require Require

	// since orders parked receives: when this one began to wait. Zero parkUntil: it does not park.
	since, parkUntil time.Time
	// repeat is set when an earlier leader may have proposed the command already: it may then not be
	// refused as if nothing had happened.
	repeat bool
	// ordered ops are accepted in the order of their numbers. after is the one before this whose outcome the origin
	// awaited when it sent this one, 0 for none; floor is the first one of all those, this one included.
	ordered      bool
	after, floor uint64
	// urgent ops go before the queue and are exempt from back-pressure: changes of the in-sync set.
	urgent bool

	from origin
	// attempt tells the sendings of one number apart.
	attempt uint32

	// phase decides between being proposed and being withdrawn.
	phase atomic.Uint32
	// dropped is set when nobody waits for the outcome any more.
	dropped atomic.Bool
	// finished makes sure of one outcome.
	finished atomic.Bool

	// Guarded by the lot.
	park    parkState
	expired bool
	timer   *time.Timer

	// Set by the apply goroutine before the op is handed on.
	result      engine.Result
	index, term uint64
}

// Phases of an op.
const (
	phaseQueued uint32 = iota
	// phaseProposed: handed to raft; from here on the outcome may be unknown.
	phaseProposed
	// phaseWithdrawn: will not be proposed.
	phaseWithdrawn
)

// withdraw says that nobody waits for the op any more. It reports whether the op is certain not to have been
// proposed by this node.
func (o *op) withdraw() bool {
	o.dropped.Store(true)
	return o.phase.CompareAndSwap(phaseQueued, phaseWithdrawn)
}

// origin is where outcomes go. finish is called once per op, from any goroutine, and must not block.
type origin interface {
	finish(o *op, out outcome)
}

// outcome is what became of an op.
type outcome struct {
	kind outcomeKind
	// err is the refusal, with kind refused.
	err *errs.Error
	// proposed says, with kind again, that the op may have been proposed.
	proposed bool
	// zones held the entry when the reply was made.
	zones int
}

type outcomeKind uint8

const (
	// replied: result, index and term of the op are set.
	replied outcomeKind = iota
	// refused: nothing happened and nothing will, unless the op is a repeat.
	refused
	// again: this node does not lead (any more); the origin should bring the op to the node that does.
	again
	// stillWaiting: the slice of waiting ended, or the receive was withdrawn, with nothing delivered and
	// nothing recorded under the op's number.
	stillWaiting
)

// end hands the outcome to the origin, once.
func (o *op) end(out outcome) {
	if o.finished.CompareAndSwap(false, true) {
		o.from.finish(o, out)
	}
}

// endAgain sends the op back to its origin.
func (o *op) endAgain(proposed bool) { o.end(outcome{kind: again, proposed: proposed || o.repeat}) }

// endRefused refuses the op, unless an earlier leader may have proposed it: then its origin has to go on
// trying.
func (o *op) endRefused(err *errs.Error) {
	if o.repeat {
		o.endAgain(true)
		return
	}
	o.end(outcome{kind: refused, err: err})
}
