package raft

import (
	"sync/atomic"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// request is what is asked: the same for every attempt.
type request struct {
	cmd  []byte
	kind engine.Kind
	// topic is a publish's, a part of cmd.
	topic []byte
	// refs are the groups of a receive that may park; it is served by whichever has something first.
	refs []engine.GroupRef
	// count is the number of messages of a publish, the most that a receive takes.
	count int
	// receive is the decoded command of a receive, for questions to the engine.
	receive *engine.Receive
	require Require
	// since orders parked receives: when this one began to wait.
	since time.Time
}

// An op is one command on its way through the leader: queued, proposed, applied, waiting for the watermark, or
// parked. It belongs to whoever brought it in, its origin: a call of this process or a forward connection.
type op struct {
	request
	intake         engine.IntakeID
	number, lowest uint64

	// parkUntil is until when a receive waits; zero when it does not park.
	parkUntil time.Time
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

	// reply is set before the op ends with an outcome of kind replied or stillWaiting, and belongs to the origin then.
	reply Reply

	// self is a slice of this op alone.
	self [1]*op
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

// repliedTo hands replies to the ops' origins: those of one origin that stand together at once, if it can take them so.
// The ops' reply.Zones are set.
func repliedTo(ops []*op) {
	for i := 0; i < len(ops); {
		in, many := ops[i].from.(*intake)
		if !many {
			ops[i].end(outcome{kind: replied, zones: ops[i].reply.Zones})
			i++
			continue
		}
		n := i
		for ; n < len(ops) && ops[n].from == origin(in); n++ {
		}
		in.finishAll(ops[i:n])
		i = n
	}
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
