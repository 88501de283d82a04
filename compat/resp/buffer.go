package resp

import "strconv"

// Buffer collects replies. The zero Buffer writes RESP2. Aggregates are written as their length followed by their
// members.
type Buffer struct {
	B []byte
	// V3 is set for RESP3.
	V3 bool
}

// head writes a type byte, a number, and CR LF.
func (b *Buffer) head(t byte, n int64) {
	b.B = append(b.B, t)
	b.B = strconv.AppendInt(b.B, n, 10)
	b.B = append(b.B, '\r', '\n')
}

// Raw writes bytes as they are.
func (b *Buffer) Raw(p []byte) { b.B = append(b.B, p...) }

// OK writes +OK.
func (b *Buffer) OK() { b.B = append(b.B, "+OK\r\n"...) }

// Simple writes a simple string. It must not hold CR or LF.
func (b *Buffer) Simple(s string) {
	b.B = append(b.B, '+')
	b.B = append(b.B, s...)
	b.B = append(b.B, '\r', '\n')
}

// Error writes an error. Line ends in it become blanks.
func (b *Buffer) Error(s string) {
	b.B = append(b.B, '-')
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == '\r' || c == '\n' {
			c = ' '
		}
		b.B = append(b.B, c)
	}
	b.B = append(b.B, '\r', '\n')
}

// Int writes an integer.
func (b *Buffer) Int(n int64) { b.head(':', n) }

// Bool01 writes an integer, 1 or 0.
func (b *Buffer) Bool01(v bool) {
	if v {
		b.head(':', 1)
	} else {
		b.head(':', 0)
	}
}

// Bulk writes a bulk string.
func (b *Buffer) Bulk(p []byte) {
	b.head('$', int64(len(p)))
	b.B = append(b.B, p...)
	b.B = append(b.B, '\r', '\n')
}

// String writes a bulk string.
func (b *Buffer) String(s string) {
	b.head('$', int64(len(s)))
	b.B = append(b.B, s...)
	b.B = append(b.B, '\r', '\n')
}

// Uint writes a number as a bulk string.
func (b *Buffer) Uint(n uint64) {
	var d [20]byte
	b.Bulk(strconv.AppendUint(d[:0], n, 10))
}

// Double writes a floating-point number: a bulk string in RESP2.
func (b *Buffer) Double(f float64) {
	var d [32]byte
	text := strconv.AppendFloat(d[:0], f, 'g', -1, 64)
	if !b.V3 {
		b.Bulk(text)
		return
	}
	b.B = append(b.B, ',')
	b.B = append(b.B, text...)
	b.B = append(b.B, '\r', '\n')
}

// Verbatim writes text: a bulk string in RESP2.
func (b *Buffer) Verbatim(s string) {
	if !b.V3 {
		b.String(s)
		return
	}
	b.head('=', int64(len(s)+4))
	b.B = append(b.B, "txt:"...)
	b.B = append(b.B, s...)
	b.B = append(b.B, '\r', '\n')
}

// Null writes a missing bulk string.
func (b *Buffer) Null() {
	if b.V3 {
		b.B = append(b.B, "_\r\n"...)
	} else {
		b.B = append(b.B, "$-1\r\n"...)
	}
}

// NullArray writes a missing array.
func (b *Buffer) NullArray() {
	if b.V3 {
		b.B = append(b.B, "_\r\n"...)
	} else {
		b.B = append(b.B, "*-1\r\n"...)
	}
}

// Array begins an array of n members.
func (b *Buffer) Array(n int) { b.head('*', int64(n)) }

// Map begins a map of n pairs: in RESP2 an array of keys and values.
func (b *Buffer) Map(n int) {
	if b.V3 {
		b.head('%', int64(n))
	} else {
		b.head('*', int64(2*n))
	}
}

// Set begins a set of n members: in RESP2 an array.
func (b *Buffer) Set(n int) {
	if b.V3 {
		b.head('~', int64(n))
	} else {
		b.head('*', int64(n))
	}
}

// Push begins a message that answers no command: in RESP2 an array.
func (b *Buffer) Push(n int) {
	if b.V3 {
		b.head('>', int64(n))
	} else {
		b.head('*', int64(n))
	}
}
