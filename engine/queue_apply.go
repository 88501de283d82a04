package engine

import "tercet.dev/tercet/internal/errs"

// applyQueue applies the commands of queue_types.go. end is where the command ends in the entry.
func (e *Engine) applyQueue(k Kind, r *reader, end uint32, res *Result) error {
	switch k {
	case CmdDocument:
		e.applyDocument(r, res)
	default:
		decodeQueue(k, r)
		res.Code = errs.Unsupported
		if r.err() != nil {
			res.Code = errs.BadRequest
		}
	}
	return nil
}
