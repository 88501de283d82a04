package resp

import (
	"bytes"
	"errors"
	"fmt"
	"io"
)

// ProtocolError is input after which a connection cannot go on. Its text is what Valkey answers before it closes.
type ProtocolError struct{ Text string }

// Error implements error.
func (e *ProtocolError) Error() string { return e.Text }

// ErrMemory is returned when the budget refuses the bytes that a command needs.
var ErrMemory = errors.New("resp: no memory for the command")

// Limits bound one command. A field of zero means its default.
type Limits struct {
	// Args bounds the number of arguments, the command's name included (default 1048576).
	Args int
	// Bulk bounds the bytes of one argument (default 32 MiB).
	Bulk int
	// Command bounds the bytes of one command on the wire (default 64 MiB).
	Command int
	// Unauthenticated gives excesses the words Valkey has for clients that have not authenticated.
	Unauthenticated bool
}

// The defaults of Limits, the bounds before authentication, and the longest line.
const (
	ArgsMax    = 1 << 20
	BulkMax    = 32 << 20
	CommandMax = 64 << 20

	UnauthenticatedArgsMax = 10
	UnauthenticatedBulkMax = 16 << 10

	lineMax = 64 << 10
)

// BeforeAuthentication are the limits of a client that has not authenticated.
var BeforeAuthentication = Limits{Args: UnauthenticatedArgsMax, Bulk: UnauthenticatedBulkMax, Command: 1 << 20, Unauthenticated: true}

const (
	bufferMin = 2 << 10
	// bufferIdle is the largest buffer an idle connection keeps.
	bufferIdle = 64 << 10
	// quietMax is how many reads in a row that fill little of the buffer make it shrink.
	quietMax = 64
	// argsIdle is the largest list of arguments that is kept.
	argsIdle = 1 << 10
)

// Reader reads commands. It is used by one goroutine.
type Reader struct {
	src io.Reader
	// reserve asks for n more bytes of memory (n may be negative) and reports whether they may be used.
	reserve func(n int) bool

	limits Limits

	buf []byte
	// buf[start:end] has been read from src and not been handed out. A command begins at start; pos, relative to
	// start, is how far it is understood.
	start, end, pos int
	quiet           int
	// missing is the number of arguments still to come, -1 before the command's first line is understood.
	missing int
	// bulk is the length of the argument that is being read, -1 before it is known.
	bulk int
	// spans are the arguments found, relative to start.
	spans []span
	args  [][]byte
}

type span struct{ from, to uint32 }

// NewReader returns a Reader of src. reserve may be nil.
func NewReader(src io.Reader, reserve func(n int) bool) *Reader {
	if reserve == nil {
		reserve = func(int) bool { return true }
	}
	r := &Reader{src: src, reserve: reserve, missing: -1, bulk: -1}
	r.SetLimits(Limits{})
	return r
}

// SetLimits changes the limits of the commands that follow.
func (r *Reader) SetLimits(l Limits) {
	if l.Args == 0 {
		l.Args = ArgsMax
	}
	if l.Bulk == 0 {
		l.Bulk = BulkMax
	}
	if l.Command == 0 {
		l.Command = CommandMax
	}
	r.limits = l
}

// Buffered returns the number of bytes that were read and belong to no command that Next has returned.
func (r *Reader) Buffered() int { return r.end - r.start }

// Size returns the bytes of memory that the Reader holds, as it has told reserve.
func (r *Reader) Size() int { return cap(r.buf) }

// Next returns the next command, reading as much as that takes. The arguments are good until the next call. An
// empty line and an empty array are no commands and are passed over. Errors are those of the source, io.EOF only
// between commands, ErrMemory, and *ProtocolError.
func (r *Reader) Next() ([][]byte, error) {
	for {
		args, err := r.Buffer()
		if args != nil || err != nil {
			return args, err
		}
		if err := r.Fill(); err != nil {
			if errors.Is(err, io.EOF) && r.end > r.start {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
}

// Buffer is Next without reading: it returns nil, nil when what was read holds no whole command.
func (r *Reader) Buffer() ([][]byte, error) {
	for {
		args, done, err := r.parse()
		if err != nil || !done {
			return nil, err
		}
		if len(args) > 0 {
			return args, nil
		}
	}
}

// Fill reads once.
func (r *Reader) Fill() error {
	if err := r.room(); err != nil {
		return err
	}
	n, err := r.src.Read(r.buf[r.end:])
	r.end += n
	if r.end > len(r.buf)/8 {
		r.quiet = 0
	} else {
		r.quiet++
	}
	if n > 0 {
		return nil
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// Unread puts bytes behind those that were read, as if the source had given them.
func (r *Reader) Unread(p []byte) error {
	for len(p) > 0 {
		if err := r.room(); err != nil {
			return err
		}
		n := copy(r.buf[r.end:], p)
		r.end += n
		p = p[n:]
	}
	return nil
}

// room makes room behind end. The buffer at most doubles, so that memory follows what has arrived.
func (r *Reader) room() error {
	if r.start == r.end {
		r.start, r.end = 0, 0
		if cap(r.buf) > bufferIdle || cap(r.buf) > bufferMin && r.quiet >= quietMax {
			r.reserve(-cap(r.buf))
			r.buf, r.quiet = nil, 0
		}
		if cap(r.spans) > argsIdle {
			r.spans, r.args = nil, nil
		}
	}
	if r.end < len(r.buf) && (r.start == 0 || len(r.buf)-r.end >= len(r.buf)/4) {
		return nil
	}
	if r.start > 0 && r.end-r.start <= len(r.buf)/2 {
		copy(r.buf, r.buf[r.start:r.end])
		r.end -= r.start
		r.start = 0
		return nil
	}
	size := max(2*len(r.buf), bufferMin)
	if !r.reserve(size - cap(r.buf)) {
		return ErrMemory
	}
	bigger := make([]byte, size)
	r.end = copy(bigger, r.buf[r.start:r.end])
	r.start, r.buf = 0, bigger
	return nil
}

// Release gives the buffer back. The Reader is of no use afterwards.
func (r *Reader) Release() {
	r.reserve(-cap(r.buf))
	r.buf, r.start, r.end = nil, 0, 0
}

// parse goes on with the command at start. It reports done with the arguments of a whole command, which are none
// for an empty one.
func (r *Reader) parse() (args [][]byte, done bool, err error) {
	in := r.buf[r.start:r.end]
	if r.missing < 0 {
		if len(in) == 0 {
			return nil, false, nil
		}
		if in[0] != '*' {
			return r.inline(in)
		}
		n, rest, err := r.number(in, 1, "multibulk length", "mbulk count string")
		if err != nil || rest == 0 {
			return nil, false, err
		}
		if n > int64(r.limits.Args) {
			if r.limits.Unauthenticated {
				return nil, false, &ProtocolError{"Protocol error: unauthenticated multibulk length"}
			}
			return nil, false, &ProtocolError{"Protocol error: invalid multibulk length"}
		}
		if n <= 0 {
			r.start += rest
			return nil, true, nil
		}
		r.missing, r.pos, r.spans = int(n), rest, r.spans[:0]
	}
	for r.missing > 0 {
		if r.bulk < 0 {
			if r.pos == len(in) {
				return nil, false, nil
			}
			if c := in[r.pos]; c != '$' {
				return nil, false, &ProtocolError{fmt.Sprintf("Protocol error: expected '$', got '%c'", printable(c))}
			}
			n, rest, err := r.number(in, r.pos+1, "bulk length", "bulk count string")
			if err != nil || rest == 0 {
				return nil, false, err
			}
			if n < 0 || n > int64(r.limits.Bulk) {
				if n > 0 && r.limits.Unauthenticated {
					return nil, false, &ProtocolError{"Protocol error: unauthenticated bulk length"}
				}
				return nil, false, &ProtocolError{"Protocol error: invalid bulk length"}
			}
			if int64(rest)+n > int64(r.limits.Command) {
				return nil, false, &ProtocolError{"Protocol error: the command is too large"}
			}
			r.bulk, r.pos = int(n), rest
		}
		after := r.pos + r.bulk
		if len(in) < after+2 {
			return nil, false, nil
		}
		if in[after] != '\r' || in[after+1] != '\n' {
			return nil, false, &ProtocolError{"Protocol error: invalid bulk length"}
		}
		r.spans = append(r.spans, span{uint32(r.pos), uint32(after)})
		r.pos, r.bulk = after+2, -1
		r.missing--
	}
	if cap(r.args) < len(r.spans) {
		r.args = make([][]byte, max(len(r.spans), 16))
	}
	args = r.args[:len(r.spans)]
	for i, s := range r.spans {
		args[i] = in[s.from:s.to:s.to]
	}
	r.start += r.pos
	r.missing, r.pos = -1, 0
	return args, true, nil
}

// number reads the decimal line that begins at from; what are its names in errors. rest is where the next line begins, 0
// when the line has not ended.
func (r *Reader) number(in []byte, from int, invalid, long string) (n int64, rest int, err error) {
	cr := bytes.IndexByte(in[from:], '\r')
	if cr < 0 {
		if len(in)-from > lineMax {
			return 0, 0, &ProtocolError{"Protocol error: too big " + long}
		}
		return 0, 0, nil
	}
	if from+cr+1 >= len(in) {
		return 0, 0, nil
	}
	n, ok := ParseInt(in[from : from+cr])
	if !ok || in[from+cr+1] != '\n' {
		return 0, 0, &ProtocolError{"Protocol error: invalid " + invalid}
	}
	return n, from + cr + 2, nil
}

// inline reads a command that is a line of words.
func (r *Reader) inline(in []byte) (args [][]byte, done bool, err error) {
	line, _, ok := bytes.Cut(in[r.pos:], []byte{'\n'})
	if !ok {
		if len(in) > lineMax {
			return nil, false, &ProtocolError{"Protocol error: too big inline request"}
		}
		r.pos = len(in)
		return nil, false, nil
	}
	length := r.pos + len(line)
	if length > lineMax {
		return nil, false, &ProtocolError{"Protocol error: too big inline request"}
	}
	line = in[:length]
	// Valkey reads the line as a C string.
	if nul := bytes.IndexByte(line, 0); nul >= 0 {
		line = line[:nul]
	}
	r.start += length + 1
	r.pos = 0
	if n := len(line); n > 0 && line[n-1] == '\r' {
		line = line[:n-1]
	}
	args, ok = splitWords(r.args[:0], line)
	if !ok {
		return nil, false, &ProtocolError{"Protocol error: unbalanced quotes in request"}
	}
	r.args = args[:cap(args)]
	return args, true, nil
}

// ParseInt reads a decimal integer as Valkey does: no leading zeros, blanks or plus sign.
func ParseInt(b []byte) (int64, bool) {
	if len(b) == 0 || len(b) > 20 {
		return 0, false
	}
	neg := b[0] == '-'
	d := b
	if neg {
		d = b[1:]
		if len(d) == 0 {
			return 0, false
		}
	}
	if d[0] == '0' {
		return 0, len(d) == 1 && !neg
	}
	var u uint64
	for _, c := range d {
		if c < '0' || c > '9' {
			return 0, false
		}
		if u > (1<<63)/10 {
			return 0, false
		}
		u = u*10 + uint64(c-'0')
	}
	switch {
	case neg && u <= 1<<63:
		return -int64(u), true
	case !neg && u < 1<<63:
		return int64(u), true
	}
	return 0, false
}

// splitWords splits a line the way Valkey's command line does: words in blanks, "…" with escapes, '…' with \' alone. It
// reports false for quotes that are not closed or are followed by anything but a blank. Words without quotes are parts
// of the line.
func splitWords(words [][]byte, line []byte) ([][]byte, bool) {
	i := 0
	for {
		for i < len(line) && isSpace(line[i]) {
			i++
		}
		if i == len(line) {
			return words, true
		}
		begin := i
		for i < len(line) && !isSpace(line[i]) && line[i] != '"' && line[i] != '\'' {
			i++
		}
		if i == len(line) || isSpace(line[i]) {
			words = append(words, line[begin:i:i])
			continue
		}
		word, next, ok := quotedWord(bytes.Clone(line[begin:i]), line, i)
		if !ok {
			return nil, false
		}
		words, i = append(words, word), next
	}
}

// quotedWord reads the rest of a word that has a quote at i.
func quotedWord(word, line []byte, i int) (_ []byte, next int, ok bool) {
	if word == nil {
		word = []byte{}
	}
	var quote byte
	for ; i < len(line); i++ {
		c := line[i]
		switch {
		case quote == 0 && isSpace(c):
			return word, i, true
		case quote == 0 && (c == '"' || c == '\''):
			quote = c
		case quote == 0:
			word = append(word, c)
		case quote == '"' && c == '\\' && i+3 < len(line) && line[i+1] == 'x' && isHex(line[i+2]) && isHex(line[i+3]):
			word = append(word, unhex(line[i+2])<<4|unhex(line[i+3]))
			i += 3
		case quote == '"' && c == '\\' && i+1 < len(line):
			i++
			c = line[i]
			switch c {
			case 'n':
				c = '\n'
			case 'r':
				c = '\r'
			case 't':
				c = '\t'
			case 'b':
				c = '\b'
			case 'a':
				c = '\a'
			}
			word = append(word, c)
		case quote == '\'' && c == '\\' && i+1 < len(line) && line[i+1] == '\'':
			i++
			word = append(word, '\'')
		case c == quote:
			if i+1 < len(line) && !isSpace(line[i+1]) {
				return nil, 0, false
			}
			return word, i + 1, true
		default:
			word = append(word, c)
		}
	}
	return word, i, quote == 0
}

// isSpace is C's isspace.
func isSpace(c byte) bool { return c == ' ' || c >= '\t' && c <= '\r' }

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

func unhex(c byte) byte {
	switch {
	case c <= '9':
		return c - '0'
	case c >= 'a':
		return c - 'a' + 10
	}
	return c - 'A' + 10
}

func printable(c byte) rune {
	if c < ' ' || c >= 0x7f {
		return ' '
	}
	return rune(c)
}
