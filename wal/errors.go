package wal

import (
	"errors"
	"fmt"
)

// Errors of this package. They may come wrapped; test for them with errors.Is.
var (
	// ErrNotFound reports an index outside of a shard's log.
	ErrNotFound = errors.New("wal: no such entry")
	// ErrClosed reports a call on a closed log.
	ErrClosed = errors.New("wal: closed")
	// ErrPoisoned reports that a write or a sync failed earlier. Nothing can be written any more; what was durable
	// stays so, and only opening the log again in a new process tells what that is.
	ErrPoisoned = errors.New("wal: poisoned by an earlier disk error")
	// ErrCanceled reports that a wait was given up. What was waited for may still become durable.
	ErrCanceled = errors.New("wal: wait canceled")
	// ErrTooLarge reports an entry or value that does not fit into a record.
	ErrTooLarge = errors.New("wal: record too large")
	// ErrGap reports an append that does not follow the last entry.
	ErrGap = errors.New("wal: entry does not follow the last one")
	// ErrCorrupt is what every *CorruptionError matches.
	ErrCorrupt = errors.New("wal: corrupt")
)

// Remedy is what an operator does about a damaged log: the other zones hold what this one lost.
const Remedy = "tercet cluster replace NODE"

// CorruptionError reports damage that a crash cannot explain: something is unreadable that had been synced. A log
// with such damage is not opened, since cutting it would forget what was promised.
type CorruptionError struct {
	// File is the damaged segment file, and Offset where in it the damage begins.
	File   string
	Offset int64
	// Shard is the shard whose entries First to Last cannot be read. First is 0 when no entry is known to be
	// affected; Last is 0 when it is not known where the damage ends.
	Shard       uint16
	First, Last uint64
	// Reason says what is wrong, in words.
	Reason string
	// Remedy is the command that helps.
	Remedy string
}

// Error names the file, the offset, the shard, the entries and the remedy.
func (e *CorruptionError) Error() string {
	what := ""
	switch {
	case e.First != 0 && e.Last == e.First:
		what = fmt.Sprintf(", shard %d, entry %d", e.Shard, e.First)
	case e.First != 0 && e.Last != 0:
		what = fmt.Sprintf(", shard %d, entries %d to %d", e.Shard, e.First, e.Last)
	case e.First != 0:
		what = fmt.Sprintf(", shard %d, entries from %d on", e.Shard, e.First)
	}
	return fmt.Sprintf("wal: %s is damaged at offset %d%s: %s; replace this node from the others with `%s`",
		e.File, e.Offset, what, e.Reason, e.Remedy)
}

// Is makes every CorruptionError match ErrCorrupt.
func (e *CorruptionError) Is(target error) bool { return target == ErrCorrupt }
