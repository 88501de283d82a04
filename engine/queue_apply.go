package engine

import "tercet.dev/tercet/internal/errs"

// applyQueue applies the commands of queue_types.go. end is where the command ends in the entry.
func (e *Engine) applyQueue(k Kind, r *reader, end uint32, res *Result) error {
	switch k {
	case CmdDocument:
		e.applyDocument(r, res)
	case CmdTopicSet:
		e.applyTopicSet(r, res)
	case CmdTopicDelete:
		e.applyTopicDelete(r, res)
	case CmdPurge:
		e.applyPurge(r, res)
	case CmdGroupSet:
		return e.applyGroupSet(r, res)
	case CmdGroupDelete:
		e.applyGroupDelete(r, res)
	case CmdParked:
		return e.applyParked(r, res)
	case CmdDelayed:
		return e.applyDelayed(r, res)
	case CmdUploadOpen:
		return e.applyUploadOpen(r, res)
	case CmdUploadPart:
		e.applyUploadPart(r, res)
	case CmdUploadCommit:
		return e.applyUploadCommit(r, end, res)
	case CmdUploadAbort:
		e.applyUploadAbort(r, res)
	default:
		decodeQueue(k, r)
		res.Code = errs.Unsupported
		if r.err() != nil {
			res.Code = errs.BadRequest
		}
	}
	return nil
}
