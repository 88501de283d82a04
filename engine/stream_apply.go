package engine

import "tercet.dev/tercet/internal/errs"

// applyStream applies a stream command: its body begins at in, the command at `at` in the entry, size bytes long.
func (e *Engine) applyStream(kind Kind, in *reader, at, size uint32, res *Result) error {
	res.Code = errs.Unsupported
	return nil
}

// streamQuery answers the stream and key queries.
func (e *Engine) streamQuery(q *Query) (Answer, error) {
	return Answer{}, errs.Of(errs.Unsupported)
}

// loadEntries fills the fields of entries.
func (e *Engine) loadEntries(list []*StreamEntry) error {
	return nil
}
