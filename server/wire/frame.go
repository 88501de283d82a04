package wire

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
)

// The compact framing carries messages without boundaries to search for:
//
//	frame = length head-length head body
//
// length counts everything behind it and head-length the head, both as unsigned LEB128 (the varint of
// Protocol Buffers and encoding/binary). The head is a list of "name: value" lines, each ended by a line feed:
// exactly the part headers of the multipart form. An empty head means all defaults. A stream is a sequence of
// frames up to the end of the body.

// AppendFrame appends one frame to b.
func AppendFrame(b, head, body []byte) []byte {
	b = AppendFrameHead(b, head, len(body))
	return append(b, body...)
}

// AppendFrameHead appends a frame up to its body, which has to follow.
func AppendFrameHead(b, head []byte, body int) []byte {
	b = binary.AppendUvarint(b, uint64(uvarintLen(uint64(len(head)))+len(head)+body))
	b = binary.AppendUvarint(b, uint64(len(head)))
	return append(b, head...)
}

func uvarintLen(v uint64) int {
	n := 1
	for v >= 0x80 {
		v >>= 7
		n++
	}
	return n
}

// ErrFrame is a frame whose lengths contradict each other or the data.
var ErrFrame = errors.New("malformed frame")

// NextFrame cuts the first frame off data. Head and body alias data.
func NextFrame(data []byte) (head, body, rest []byte, err error) {
	length, data, ok := cutUvarint(data)
	if !ok || length > uint64(len(data)) {
		return nil, nil, nil, ErrFrame
	}
	frame, rest := data[:length], data[length:]
	headLen, frame, ok := cutUvarint(frame)
	if !ok || headLen > uint64(len(frame)) {
		return nil, nil, nil, ErrFrame
	}
	return frame[:headLen:headLen], frame[headLen:len(frame):len(frame)], rest, nil
}

// Head is where a frame's head stands.
type Head struct{ From, Length int64 }

// FrameHead reads the lengths that a frame begins with, out of the first bytes of data of size bytes: where its head stands
// and how long the whole frame is.
func FrameHead(prefix []byte, size int64) (head Head, frame int64, err error) {
	length, rest, ok := cutUvarint(prefix)
	first := int64(len(prefix) - len(rest))
	if !ok || length > uint64(size-first) {
		return Head{}, 0, ErrFrame
	}
	rest = rest[:min(uint64(len(rest)), length)]
	before := len(rest)
	headLen, rest, ok := cutUvarint(rest)
	second := int64(before - len(rest))
	if !ok || headLen > length-uint64(second) {
		return Head{}, 0, ErrFrame
	}
	return Head{From: first + second, Length: int64(headLen)}, first + int64(length), nil
}

// cutUvarint reads a varint in its shortest form.
func cutUvarint(data []byte) (v uint64, rest []byte, ok bool) {
	v, n := binary.Uvarint(data)
	if n <= 0 || n > 1 && data[n-1] == 0 {
		return 0, nil, false
	}
	return v, data[n:], true
}

// Reader reads frames from a stream.
type Reader struct {
	r   *bufio.Reader
	max uint64
}

// NewReader returns a Reader that refuses frames longer than max.
func NewReader(r io.Reader, max int) *Reader {
	return &Reader{r: bufio.NewReaderSize(r, 64<<10), max: uint64(max)}
}

// Next returns the next frame in memory of its own, io.EOF after the last one, and io.ErrUnexpectedEOF when the
// stream ends within a frame.
func (r *Reader) Next() (head, body []byte, err error) {
	if _, err := r.r.Peek(1); err != nil {
		return nil, nil, err
	}
	length, err := binary.ReadUvarint(r.r)
	if err != nil {
		return nil, nil, unexpected(err)
	}
	if length > r.max {
		return nil, nil, ErrFrame
	}
	frame := make([]byte, length)
	if _, err := io.ReadFull(r.r, frame); err != nil {
		return nil, nil, unexpected(err)
	}
	headLen, frame, ok := cutUvarint(frame)
	if !ok || headLen > uint64(len(frame)) {
		return nil, nil, ErrFrame
	}
	return frame[:headLen:headLen], frame[headLen:], nil
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
