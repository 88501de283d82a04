package resp

import (
	"bytes"
	"math"
)

// Scanner finds the ends of replies in a stream of bytes, in either version of the protocol, without reading what is in
// them. It keeps its place between calls, so that a reply that arrives in many pieces is looked at once. The zero value is
// ready.
type Scanner struct {
	pos  int // what was looked at of the reply at hand
	need int // values that are still to come
	busy bool
}

// Reply looks at in, which begins with the reply at hand, and returns the reply's length, or 0 while its end has not
// arrived. in must keep its beginning until then.
func (s *Scanner) Reply(in []byte) (int, error) {
	if !s.busy {
		s.pos, s.need, s.busy = 0, 1, true
	}
	for s.need > 0 {
		line := bytes.IndexByte(in[s.pos:], '\n')
		if line < 0 {
			return 0, nil
		}
		if line < 2 || in[s.pos+line-1] != '\r' {
			return 0, &ProtocolError{Text: "Protocol error: a reply's line does not end in CRLF"}
		}
		head := in[s.pos : s.pos+line-1]
		next := s.pos + line + 1
		more := 0
		switch head[0] {
		case '+', '-', ':', ',', '(', '#', '_':
		case '$', '=', '!':
			n, ok := ParseInt(head[1:])
			if !ok || n < -1 || n > math.MaxInt32 {
				return 0, &ProtocolError{Text: "Protocol error: a reply has an invalid length"}
			}
			if n >= 0 {
				next += int(n) + 2
			}
		case '*', '~', '>', '%', '|':
			n, ok := ParseInt(head[1:])
			if !ok || n < -1 || n > math.MaxInt32/2 {
				return 0, &ProtocolError{Text: "Protocol error: a reply has an invalid count"}
			}
			more = int(max(n, 0))
			if head[0] == '%' || head[0] == '|' {
				more *= 2
			}
			if head[0] == '|' {
				more++ // an attribute is followed by what it is about
			}
		default:
			return 0, &ProtocolError{Text: "Protocol error: a reply of an unknown type"}
		}
		if next > len(in) {
			return 0, nil
		}
		s.pos = next
		s.need += more - 1
		if s.need > math.MaxInt32 {
			return 0, &ProtocolError{Text: "Protocol error: a reply has too many values"}
		}
	}
	s.busy = false
	return s.pos, nil
}
