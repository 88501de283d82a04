package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"

	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/internal/errs"
)

// The exit codes. Scripts branch on them: they never change.
const (
	exitOK             = 0
	exitFailure        = 1
	exitUsage          = 2
	exitNotFound       = 3
	exitPrecondition   = 4
	exitUnavailable    = 5
	exitOutcomeUnknown = 6
)

// usageError is a mistake in the command line, the environment or the configuration file.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// codedError is an error whose exit code its origin knows better than its type tells.
type codedError struct {
	code int
	error
}

func (e codedError) Unwrap() error { return e.error }

// errReported marks an error that has already been printed.
var errReported = errors.New("already reported")

// exitCode maps an error to the process's exit code.
func exitCode(err error) int {
	var (
		usage  usageError
		coded  codedError
		answer *client.Error
		known  *errs.Error
		dial   *net.OpError
	)
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &coded):
		return coded.code
	case errors.As(err, &usage), isCobraUsage(err):
		return exitUsage
	case errors.As(err, &answer):
		return exitOfAnswer(answer)
	case errors.As(err, &known):
		return exitOf(known.Code)
	case errors.Is(err, context.DeadlineExceeded):
		return exitUnavailable
	case errors.As(err, &dial) && dial.Op == "dial":
		return exitUnavailable
	}
	return exitFailure
}

// exitOf maps a code of the catalogue. What the catalogue answers with 400 is a mistake of the command line.
func exitOf(c errs.Code) int {
	info := c.Info()
	switch {
	case c == errs.OK:
		return exitOK
	case info.Outcome == errs.Unknown:
		return exitOutcomeUnknown
	}
	return exitOfStatus(info.Status)
}

// exitOfStatus maps an HTTP status whose outcome is known.
func exitOfStatus(status int) int {
	switch status {
	case http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusRequestEntityTooLarge:
		return exitUsage
	case http.StatusNotFound:
		return exitNotFound
	case http.StatusConflict, http.StatusGone, http.StatusPreconditionFailed:
		return exitPrecondition
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return exitUnavailable
	}
	return exitFailure
}

// exitOfAnswer maps what a request ended with. The outcome comes first: whether something may have happened is what
// a script has to know above all.
func exitOfAnswer(e *client.Error) int {
	switch {
	case e.Outcome == errs.Unknown:
		return exitOutcomeUnknown
	case e.Status == 0:
		return exitUnavailable // no server could be reached
	}
	if code, ok := errs.ByName(e.Code); ok {
		return exitOf(code)
	}
	return exitOfStatus(e.Status)
}

// isCobraUsage recognises the one mistake that cobra reports without passing a hook: an unknown command.
func isCobraUsage(err error) bool {
	return strings.HasPrefix(err.Error(), "unknown command ")
}

// describe is what a person reads: the error, and the way out where there is one.
func describe(err error) string {
	text, hint := err.Error(), ""
	var answer *client.Error
	var known *errs.Error
	switch {
	case errors.As(err, &answer):
		hint = answer.Hint
		if hint == "" && answer.Status == 0 && answer.Outcome == errs.None {
			hint = "is the cluster running, and --server right? `tercet dev` starts one on this machine"
		}
		if answer.Outcome == errs.Unknown {
			text += "\nthe outcome is not known: it may have been done"
		}
		if answer.RequestID != "" {
			text += "\nrequest " + answer.RequestID
		}
	case errors.As(err, &known):
		if hint = known.Hint; hint == "" {
			hint = known.Code.Info().Hint
		}
	}
	if hint == "" {
		return text
	}
	return fmt.Sprintf("%s\nhint: %s", text, hint)
}
