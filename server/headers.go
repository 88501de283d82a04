package server

import (
	"mime"
	"net/http"
	"strings"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// one returns the single value of a header. Two occurrences are refused even when they agree: a proxy in
// front might have acted on the other one.
func one(h http.Header, name string) (value string, present bool, e *errs.Error) {
	values := h[name]
	switch len(values) {
	case 0:
		return "", false, nil
	case 1:
		return values[0], true, nil
	}
	return "", false, errs.New(errs.InvalidHeader, "%s appears more than once", name)
}

// decimal reads an unsigned decimal number: digits only, no sign, no spaces, no exponent.
func decimal(s string) (v int64, ok bool) {
	if len(s) == 0 || len(s) > 18 {
		return 0, false
	}
	for i := 0; i < len(s); i++ {
		c := s[i] - '0'
		if c > 9 {
			return 0, false
		}
		v = v*10 + int64(c)
	}
	return v, true
}

// number checks a numeric header's value against its bounds.
func number(name, value string, low, high int64) (int64, *errs.Error) {
	v, ok := decimal(value)
	if !ok || v < low || v > high {
		return 0, errs.New(errs.InvalidHeader, "%s must be a whole number from %d to %d, in decimal digits", name, low, high)
	}
	return v, nil
}

// numberOf reads a numeric header that may be absent.
func numberOf(h http.Header, name string, low, high, absent int64) (int64, *errs.Error) {
	value, present, e := one(h, name)
	if e != nil || !present {
		return absent, e
	}
	return number(name, value, low, high)
}

// validName reports whether s may name a topic, a consumer group or a deployment.
func validName(s string) bool {
	if len(s) == 0 || len(s) > limits.NameBytesMax {
		return false
	}
	for i := 0; i < len(s); i++ {
		if nameBytes[s[i]] == 0 {
			return false
		}
	}
	return true
}

var nameBytes = func() (t [256]byte) {
	for _, c := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-" {
		t[c] = 1
	}
	return t
}()

// tokenBytes are the bytes of a token (RFC 9110, 5.6.2): header names and the halves of a media type.
var tokenBytes = func() (t [256]byte) {
	for _, c := range "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~" {
		t[c] = 1
	}
	return t
}()

func validToken(s string) bool {
	for i := 0; i < len(s); i++ {
		if tokenBytes[s[i]] == 0 {
			return false
		}
	}
	return len(s) > 0
}

// validValue reports whether s may stand as a header value: visible ASCII, spaces, tabs, and bytes above.
func validValue(s string) bool {
	for i := 0; i < len(s); i++ {
		if c := s[i]; c < 0x20 && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// checkContentType refuses what could not be given back as a Content-Type of a part.
func checkContentType(s string) *errs.Error {
	if len(s) > limits.ContentTypeBytesMax {
		return errs.New(errs.InvalidHeader, "Content-Type is longer than %d bytes", limits.ContentTypeBytesMax)
	}
	media, params, _ := strings.Cut(s, ";")
	kind, sub, _ := strings.Cut(strings.TrimRight(media, " \t"), "/")
	ok := validToken(kind) && validToken(sub)
	if ok && params != "" {
		// The parser of the standard library is for the rare rest; it also refuses repeated parameters.
		_, _, err := mime.ParseMediaType(s)
		ok = err == nil && validValue(s)
	}
	for i := 0; ok && i < len(s); i++ {
		ok = s[i] < 0x80
	}
	if !ok {
		return errs.New(errs.InvalidHeader, "Content-Type is not a media type")
	}
	return nil
}

// accepts is the set of answer forms an Accept header names.
type accepts struct{ multipart, ndjson, batch, json bool }

// parseAccept reads an Accept header. Wildcards name nothing: a client has to say which form it reads.
func parseAccept(values []string) (a accepts) {
	for _, value := range values {
		for value != "" {
			var item string
			item, value, _ = strings.Cut(value, ",")
			media, params, _ := strings.Cut(item, ";")
			if params != "" && refusedByQuality(params) {
				continue
			}
			switch media = strings.TrimSpace(media); {
			case strings.EqualFold(media, mediaMultipart):
				a.multipart = true
			case strings.EqualFold(media, mediaNDJSON):
				a.ndjson = true
			case strings.EqualFold(media, mediaBatch):
				a.batch = true
			case strings.EqualFold(media, mediaJSON):
				a.json = true
			}
		}
	}
	return a
}

// refusedByQuality reports whether the parameters of an Accept item hold a weight of zero.
func refusedByQuality(params string) bool {
	for params != "" {
		var p string
		p, params, _ = strings.Cut(params, ";")
		name, value, _ := strings.Cut(strings.TrimSpace(p), "=")
		if strings.EqualFold(strings.TrimSpace(name), "q") {
			value = strings.TrimSpace(value)
			return value != "" && strings.Trim(value, "0.") == ""
		}
	}
	return false
}

// stored reports whether a request header belongs to the message and is given back to consumers. What
// describes the connection, the client or the request is not stored, nor what may carry credentials.
// The name is in canonical form.
func stored(name string) bool {
	switch name {
	case "Accept", "Accept-Charset", "Accept-Encoding", "Accept-Language", "Alt-Used", "Authorization",
		"Cache-Control", "Cdn-Loop", "Connection", "Content-Length", "Content-Type", "Cookie", "Date", "Dnt",
		"Expect", "Forwarded", "Host", "If-Match", "If-Modified-Since", "If-None-Match", "If-Range",
		"If-Unmodified-Since", "Keep-Alive", "Max-Forwards", "Origin", "Pragma", "Priority", "Range",
		"Referer", "Retry-After", "Set-Cookie", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
		"Upgrade-Insecure-Requests", "User-Agent", "Via", "Warning", "Www-Authenticate", "X-Api-Key",
		"X-Real-Ip", "X-Request-Id":
		return false
	}
	for _, prefix := range [...]string{"Vqs-", "Tercet-", "Sec-", "Proxy-", "X-Forwarded-", "X-Vercel-"} {
		if strings.HasPrefix(name, prefix) {
			return false
		}
	}
	return true
}
