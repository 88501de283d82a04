package compat

import (
	"bytes"
	"math"
	"strconv"
	"strings"
	"unsafe"

	"tercet.dev/tercet/compat/resp"
	"tercet.dev/tercet/engine"
)

// The errors that arguments end with, in Valkey's words.
const (
	errSyntax        = "ERR syntax error"
	errNotInteger    = "ERR value is not an integer or out of range"
	errInvalidID     = "ERR Invalid stream ID specified as stream command argument"
	errIntervalStart = "ERR invalid start ID for the interval"
	errIntervalEnd   = "ERR invalid end ID for the interval"
	errNoKey         = "ERR no such key"
	errWrongType     = "WRONGTYPE Operation against a key holding the wrong kind of value"
	errGroupNeedsKey = "ERR The XGROUP subcommand requires the key to exist. Note that for CREATE you may want to use the MKSTREAM option to create an empty stream automatically."
)

func errNoGroup(key, group string) string {
	return "NOGROUP No such key '" + key + "' or consumer group '" + group + "'"
}

func errNoGroupOfKey(key, group string) string {
	return "NOGROUP No such consumer group '" + group + "' for key name '" + key + "'"
}

// view is an argument as a string that is good as long as the argument: for what is encoded at once.
func view(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

// fail writes an error and reports false, for builders.
func (c *conn) fail(text string) (operation, bool) {
	c.w.Error(text)
	return operation{}, false
}

// integer reads an integer argument, or writes the error.
func (c *conn) integer(b []byte) (int64, bool) { return c.integerOr(b, errNotInteger) }

func (c *conn) integerOr(b []byte, text string) (int64, bool) {
	n, ok := resp.ParseInt(b)
	if !ok {
		c.w.Error(text)
	}
	return n, ok
}

// parseUint reads a number the way C's strtoull does, which is Valkey's: blanks, a sign and leading zeros are let pass, and
// a negative number behind blanks or zeros wraps around.
func parseUint(s string) (uint64, bool) {
	if n, ok := resp.ParseInt([]byte(s)); ok {
		return uint64(n), n >= 0
	}
	t := strings.TrimLeft(s, " \t\n\v\f\r")
	neg := false
	if t != "" && (t[0] == '+' || t[0] == '-') {
		neg = t[0] == '-'
		t = t[1:]
	}
	if t == "" || t[0] < '0' || t[0] > '9' {
		return 0, false
	}
	n, err := strconv.ParseUint(t, 10, 64)
	if err != nil {
		return 0, false
	}
	if neg {
		n = -n
	}
	return n, true
}

// idText returns the text of an ID as C would see it; false if it is too long.
func idText(b []byte) (string, bool) {
	if len(b) > 127 {
		return "", false
	}
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b), true
}

// parseID reads an ID; a missing sequence number is missing. - and + are no IDs unless extremes says so.
func parseID(b []byte, missing uint64, extremes bool) (engine.StreamID, bool) {
	if id, ok := parseSimpleID(b); ok {
		return id, true
	}
	s, ok := idText(b)
	if !ok {
		return engine.StreamID{}, false
	}
	if s == "-" || s == "+" {
		if s == "-" {
			return engine.StreamIDMin, extremes
		}
		return engine.StreamIDMax, extremes
	}
	ms, seq, hasSeq := strings.Cut(s, "-")
	id := engine.StreamID{Seq: missing}
	if id.Ms, ok = parseUint(ms); !ok {
		return id, false
	}
	if hasSeq {
		id.Seq, ok = parseUint(seq)
	}
	return id, ok
}

// parseSimpleID reads the usual form, digits-digits, without copying.
func parseSimpleID(b []byte) (id engine.StreamID, ok bool) {
	i := 0
	digits := func() (n uint64, ok bool) {
		from := i
		for i < len(b) && b[i] >= '0' && b[i] <= '9' && i-from < 19 {
			n = n*10 + uint64(b[i]-'0')
			i++
		}
		return n, i > from
	}
	if id.Ms, ok = digits(); !ok || i >= len(b) || b[i] != '-' {
		return id, false
	}
	i++
	id.Seq, ok = digits()
	return id, ok && i == len(b)
}

// id reads an ID in its strict form, or writes the error.
func (c *conn) streamID(b []byte) (engine.StreamID, bool) {
	id, ok := parseID(b, 0, false)
	if !ok {
		c.w.Error(errInvalidID)
	}
	return id, ok
}

// ids reads IDs. It writes nothing: where a bad one is an error depends on the key.
func parseIDs(list [][]byte) ([]engine.StreamID, bool) {
	out := make([]engine.StreamID, len(list))
	for i, b := range list {
		id, ok := parseID(b, 0, false)
		if !ok {
			return nil, false
		}
		out[i] = id
	}
	return out, true
}

// rangeStart and rangeEnd read the bounds of a range: IDs, - and +, and ( before an ID that is excluded.
func parseRangeStart(b []byte) (engine.StreamID, string) {
	id, open, ok := parseBound(b, 0)
	if !ok {
		return id, errInvalidID
	}
	if open {
		if id, ok = id.Next(); !ok {
			return id, errIntervalStart
		}
	}
	return id, ""
}

func parseRangeEnd(b []byte) (engine.StreamID, string) {
	id, open, ok := parseBound(b, math.MaxUint64)
	if !ok {
		return id, errInvalidID
	}
	if open {
		if id, ok = id.Prev(); !ok {
			return id, errIntervalEnd
		}
	}
	return id, ""
}

func parseBound(b []byte, missing uint64) (id engine.StreamID, open, ok bool) {
	if len(b) > 1 && b[0] == '(' {
		id, ok = parseID(b[1:], missing, false)
		return id, true, ok
	}
	id, ok = parseID(b, missing, true)
	return id, false, ok
}

// appendID writes an ID as text.
func appendID(b []byte, id engine.StreamID) []byte {
	b = strconv.AppendUint(b, id.Ms, 10)
	b = append(b, '-')
	return strconv.AppendUint(b, id.Seq, 10)
}

func writeID(w *resp.Buffer, id engine.StreamID) {
	var d [41]byte
	w.Bulk(appendID(d[:0], id))
}
