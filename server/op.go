package server

import (
	"net/http"

	"tercet.dev/tercet/internal/errs"
)

// op is what a request asks for, as metrics and the log name it.
type op uint8

const (
	opOther op = iota
	opSend
	opBatch
	opReceive
	opReceiveWait
	opReceiveID
	opPeek
	opAcknowledge
	opExtend
	opAdmin
	opHealth
	opCount
)

var opNames = [opCount]string{
	opOther:       "other",
	opSend:        "send",
	opBatch:       "batch",
	opReceive:     "receive",
	opReceiveWait: "receive_wait",
	opReceiveID:   "receive_by_id",
	opPeek:        "peek",
	opAcknowledge: "acknowledge",
	opExtend:      "extend",
	opAdmin:       "admin",
	opHealth:      "health",
}

func (o op) String() string { return opNames[o] }

// publishes reports whether decision 27 rules the status of refusals.
func (o op) publishes() bool { return o == opSend || o == opBatch }

// outcome is how a request ended, as metrics name it.
type outcome uint8

const (
	outcomeOK outcome = iota
	// outcomeRefused: the client has to change something.
	outcomeRefused
	// outcomeThrottled: not now; nothing happened.
	outcomeThrottled
	// outcomeUnavailable: not now, and not because of load; nothing happened.
	outcomeUnavailable
	// outcomeUnknown: it may have happened.
	outcomeUnknown
	// outcomeGone: the client hung up.
	outcomeGone
	outcomeCount
)

var outcomeNames = [outcomeCount]string{
	outcomeOK:          "ok",
	outcomeRefused:     "refused",
	outcomeThrottled:   "throttled",
	outcomeUnavailable: "unavailable",
	outcomeUnknown:     "unknown",
	outcomeGone:        "gone",
}

func outcomeOf(e *errs.Error, status int) outcome {
	info := e.Code.Info()
	switch {
	case info.Outcome == errs.Unknown:
		return outcomeUnknown
	case info.Status == http.StatusServiceUnavailable:
		return outcomeUnavailable
	case status == http.StatusTooManyRequests:
		return outcomeThrottled
	}
	return outcomeRefused
}
