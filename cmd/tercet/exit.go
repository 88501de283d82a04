package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

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
		usage usageError
		coded codedError
		known *errs.Error
		dial  *net.OpError
	)
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &coded):
		return coded.code
	case errors.As(err, &usage), isCobraUsage(err):
		return exitUsage
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
	switch info.Status {
	case 400, 405, 413:
		return exitUsage
	case 404:
		return exitNotFound
	case 409, 410, 412:
		return exitPrecondition
	case 408, 429, 503:
		return exitUnavailable
	}
	return exitFailure
}

// isCobraUsage recognises the one mistake that cobra reports without passing a hook: an unknown command.
func isCobraUsage(err error) bool {
	return strings.HasPrefix(err.Error(), "unknown command ")
}

// describe is what a person reads: the error, and the way out where the catalogue has one.
func describe(err error) string {
	var known *errs.Error
	if !errors.As(err, &known) {
		return err.Error()
	}
	hint := known.Hint
	if hint == "" {
		hint = known.Code.Info().Hint
	}
	if hint == "" {
		return err.Error()
	}
	return fmt.Sprintf("%s\nhint: %s", err, hint)
}
