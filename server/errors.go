package server

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"slices"
	"strconv"
	"time"
	"unicode/utf8"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/wire"
)

// retryAfterDefault is what a refusal advises when the error itself knows no time. Elections and full queues
// are over in about that long, and Retry-After has no finer unit.
const retryAfterDefault = time.Second

// status returns the HTTP status an error travels under.
//
// For a publish, decision 27 holds: whatever was refused before it was proposed is 429, whatever has an unknown
// outcome is 500, or 504 when it was our own deadline that passed. 502 and 503 never appear, since the public
// client reads them as something else.
func status(e *errs.Error, publish bool) int {
	info := e.Code.Info()
	if info.Outcome == errs.Unknown {
		if errors.Is(e.Cause, context.DeadlineExceeded) {
			return http.StatusGatewayTimeout
		}
		return info.Status
	}
	if publish && info.Status == http.StatusServiceUnavailable {
		return http.StatusTooManyRequests
	}
	return info.Status
}

// fail answers with an error. It may be called once, before anything else was written.
func (x *exchange) fail(e *errs.Error) {
	st := status(e, x.op.publishes())
	x.outcome = outcomeOf(e, st)
	if x.outcome == outcomeUnknown && x.r.Context().Err() == nil {
		x.s.log.Warn("request without a known outcome", "op", x.op.String(), "code", e.Code.String(),
			"request_id", x.requestID(), "error", e.Error())
	}
	h := x.w.Header()
	clear(h) // what a success would have said
	h["Content-Type"] = jsonType
	h["Cache-Control"] = noStore
	h["X-Content-Type-Options"] = noSniff
	if s := e.Code.Info().Status; e.RetryAfter > 0 || st == http.StatusTooManyRequests || s == http.StatusServiceUnavailable {
		h["Retry-After"] = []string{strconv.FormatInt(retrySeconds(e.RetryAfter), 10)}
	}
	if e.Code == errs.MethodNotAllowed {
		h["Allow"] = []string{x.allow}
	}
	if e.Code == errs.Unauthorized {
		h["Www-Authenticate"] = []string{"Bearer"}
	}
	if x.close || st == http.StatusRequestTimeout || st == http.StatusRequestEntityTooLarge {
		h["Connection"] = connectionClose
	}
	id := x.requestID()
	h[wire.HeaderRequestID] = []string{id}
	buf := getBuffer(512)
	defer putBuffer(buf)
	buf.b = appendError(buf.b, e, id)
	h["Content-Length"] = []string{strconv.Itoa(len(buf.b))}
	x.w.WriteHeader(st)
	if x.r.Method != http.MethodHead {
		x.w.Write(buf.b)
	}
}

// retrySeconds rounds up: coming back too early is refused again.
func retrySeconds(d time.Duration) int64 {
	if d <= 0 {
		d = retryAfterDefault
	}
	return int64(math.Ceil(d.Seconds()))
}

// appendError appends the JSON body of an error.
func appendError(b []byte, e *errs.Error, requestID string) []byte {
	info := e.Code.Info()
	hint := e.Hint
	if hint == "" {
		hint = info.Hint
	}
	b = append(b, `{"error":`...)
	b = appendJSON(b, e.Text())
	b = append(b, `,"code":"`...)
	b = append(b, info.Name...)
	b = append(b, `","outcome":"`...)
	b = append(b, info.Outcome...)
	b = append(b, `","hint":`...)
	b = appendJSON(b, hint)
	b = append(b, `,"requestId":`...)
	b = appendJSON(b, requestID)
	if len(e.Fields) > 0 {
		names := make([]string, 0, len(e.Fields))
		for name := range e.Fields {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			value, err := json.Marshal(e.Fields[name])
			if err != nil {
				continue
			}
			b = append(b, ',')
			b = appendJSON(b, name)
			b = append(b, ':')
			b = append(b, value...)
		}
	}
	return append(b, '}', '\n')
}

// appendJSON appends s as a JSON string. Invalid UTF-8 becomes U+FFFD; <, > and & stay as they are, since the
// answers are never read as HTML.
func appendJSON(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	for i := 0; i < len(s); {
		c := s[i]
		if c >= utf8.RuneSelf {
			r, n := utf8.DecodeRuneInString(s[i:])
			if r == utf8.RuneError && n == 1 {
				b = append(b, "\ufffd"...)
			} else {
				b = append(b, s[i:i+n]...)
			}
			i += n
			continue
		}
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c == '\n':
			b = append(b, '\\', 'n')
		case c == '\r':
			b = append(b, '\\', 'r')
		case c == '\t':
			b = append(b, '\\', 't')
		case c < 0x20 || c == 0x7f:
			b = append(b, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		default:
			b = append(b, c)
		}
		i++
	}
	return append(b, '"')
}
