package compat

import (
	"errors"
	"net"

	"tercet.dev/tercet/compat/resp"
	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// errUnknownOutcome is what a client hears whose write may or may not have happened. The connection stays.
const errUnknownOutcome = "ERR outcome unknown, retry with IDMP"

// isRefusal reports whether a code is the engine's answer to the command, which the command words itself. What is not is
// about the node or the cluster.
func isRefusal(code errs.Code) bool {
	switch code {
	case errs.OK, errs.TopicNotFound, errs.GroupNotFound, errs.MessageNotFound, errs.WrongType, errs.GroupExists, errs.StreamIDTooLow, errs.StreamIDZero,
		errs.StreamExhausted, errs.StreamIDDeleted, errs.StreamCountTooLow, errs.KeyChanged, errs.ReservedConsumer, errs.Conflict:
		return true
	}
	return false
}

// errorText words what a command failed with for reasons that are not its own. The first words are those that clients
// look at: TRYAGAIN and CLUSTERDOWN may be retried, since nothing was done.
func errorText(err error) string {
	if errors.Is(err, net.ErrClosed) {
		return "ERR the connection is closed"
	}
	e := errs.From(err)
	if e.Outcome() == errs.Unknown {
		return errUnknownOutcome
	}
	return refusalOf(e.Code, e.Text())
}

// refusalText words a refusal without particulars.
func refusalText(code errs.Code) string { return refusalOf(code, code.Info().Text) }

func refusalOf(code errs.Code, text string) string {
	switch code {
	case errs.WrongType:
		return errWrongType
	case errs.TopicNotFound:
		return errNoKey
	case errs.GroupExists:
		return "BUSYGROUP Consumer Group name already exists"
	case errs.StreamIDTooLow:
		return "ERR The ID specified in XADD is equal or smaller than the target stream top item"
	case errs.StreamIDZero:
		return "ERR The ID specified in XADD must be greater than 0-0"
	case errs.StreamExhausted:
		return "ERR The stream has exhausted the last possible ID, unable to add more items"
	case errs.UnsettledLimit, errs.MemoryLimit, errs.TooManyTopics, errs.TooManyGroups:
		return "OOM command not allowed when used memory > 'maxmemory'. (" + text + ")"
	case errs.DiskFull:
		return "OOM " + text
	case errs.ZonesUnavailable:
		return "NOREPLICAS Not enough good replicas to write."
	case errs.NoLeader, errs.NotLeader:
		return "CLUSTERDOWN The cluster is down: " + text + ", nothing was done"
	case errs.Overloaded, errs.Draining:
		return "TRYAGAIN " + text + ", nothing was done"
	case errs.MessageTooLarge:
		return "ERR Elements are too large to be stored"
	case errs.OutcomeUnknown, errs.IntakeClosed, errs.Internal:
		return errUnknownOutcome
	}
	return "ERR " + text
}

// wordOutcome words what a command came to.
func wordOutcome(w *resp.Buffer, word wordFunc, r *engine.Result, err error) {
	if err != nil {
		e := errs.From(err)
		if !isRefusal(e.Code) || errors.Is(err, net.ErrClosed) {
			w.Error(errorText(err))
			return
		}
		word(w, &engine.Result{Code: e.Code}, nil)
		return
	}
	if !isRefusal(r.Code) {
		w.Error(refusalText(r.Code))
		return
	}
	word(w, r, nil)
}

// wordRead words an answer into w.
func (c *conn) wordRead(a *engine.Answer, err error, op *operation) {
	if c.capaStale && c.readOnly && c.w.V3 {
		if _, leads := c.s.backend.Leading(); !leads {
			// An attribute, which is no part of the reply: |1 stale → true.
			c.w.Raw([]byte("|1\r\n+stale\r\n#t\r\n"))
		}
	}
	if err != nil {
		wordOutcome(&c.w, op.word, nil, err)
		return
	}
	op.word(&c.w, &engine.Result{}, a)
}
