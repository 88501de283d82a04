package peer

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"tercet.dev/tercet/internal/limits"
)

// Kind says what a frame asks. Numbers below KindUser belong to this package.
type Kind uint8

// The kinds of this package.
const (
	kindHello  Kind = 1 // both directions, first frame
	kindRefuse Kind = 2 // both directions, last frame: the code and text of a *RefusedError
	kindPing   Kind = 3 // request; answered by pong without body
	kindPong   Kind = 4
	kindCancel Kind = 5 // the asker no longer waits for the request of this number

	// KindUser is the first kind that users of the package may give a meaning.
	KindUser Kind = 16
)

// Frame flags.
const (
	flagReply = 1 << 0 // the frame answers the request of its number
	flagError = 1 << 1 // with flagReply: the body is an encoded *RemoteError

	flagsKnown = flagReply | flagError
)

// headerSize is the length of a frame header:
//
//	0   length   u32  bytes of body that follow the header
//	4   kind     u8
//	5   flags    u8
//	6   shard    u16
//	8   request  u64  number of the request, unique on its connection while unanswered
//	16  crc      u32  CRC-32C over bytes 0..16 and the body
//
// All numbers are little-endian.
const headerSize = 20

// Bounds of a body by the state of the connection. A peer that has not said who it is gets little room.
const (
	bodyMax      = limits.FrameBytesMax - headerSize
	helloMax     = 4 << 10
	introduceMax = 64 << 10
)

// BodyMax bounds the body of one frame.
const BodyMax = bodyMax

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// frame is one received frame. Its body is freshly allocated and belongs to whoever gets the frame.
type frame struct {
	kind    Kind
	flags   uint8
	shard   uint16
	request uint64
	body    []byte
}

// FrameError says that what arrived is no frame of this protocol. Its connection is closed.
type FrameError struct {
	// Reason says what is wrong with it.
	Reason string
}

// Error implements error.
func (e *FrameError) Error() string { return "bad frame: " + e.Reason }

// readFrame reads one frame whose body may have at most limit bytes. The length is checked before anything is
// allocated for it; the checksum before anything is done with it.
func readFrame(r *bufio.Reader, limit int) (frame, error) {
	// Peek instead of a local array: an array handed to an io.Reader would escape, one allocation a frame.
	h, err := r.Peek(headerSize)
	if err != nil {
		if err == io.EOF && len(h) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return frame{}, err
	}
	length := binary.LittleEndian.Uint32(h)
	f := frame{
		kind:    Kind(h[4]),
		flags:   h[5],
		shard:   binary.LittleEndian.Uint16(h[6:]),
		request: binary.LittleEndian.Uint64(h[8:]),
	}
	want := binary.LittleEndian.Uint32(h[16:])
	crc := crc32.Update(0, castagnoli, h[:16])
	if uint64(length) > uint64(limit) {
		return frame{}, &FrameError{Reason: fmt.Sprintf("length %d exceeds %d", length, limit)}
	}
	if f.flags&^flagsKnown != 0 {
		return frame{}, &FrameError{Reason: fmt.Sprintf("unknown flags %#x", f.flags)}
	}
	if f.kind == 0 {
		return frame{}, &FrameError{Reason: "kind 0"}
	}
	if _, err := r.Discard(headerSize); err != nil {
		return frame{}, err
	}
	if length > 0 {
		f.body = make([]byte, length)
		if _, err := io.ReadFull(r, f.body); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return frame{}, err
		}
		crc = crc32.Update(crc, castagnoli, f.body)
	}
	if crc != want {
		return frame{}, &FrameError{Reason: "checksum mismatch"}
	}
	return f, nil
}

// inlineMax is the size up to which the first part of a body is copied behind its header: one small copy is
// cheaper than one more vector of the write call.
const inlineMax = 1 << 10

// appendFrame appends the frame to queue as vectors for one write call and returns its size. Parts larger than
// inlineMax are referenced, not copied: nobody may change them until the frame is written.
func appendFrame(queue [][]byte, kind Kind, flags uint8, shard uint16, request uint64, body [][]byte) ([][]byte, int, error) {
	length := 0
	for _, p := range body {
		length += len(p)
	}
	if length > bodyMax {
		return queue, 0, &FrameError{Reason: fmt.Sprintf("length %d exceeds %d", length, bodyMax)}
	}
	size := headerSize
	inline := len(body) > 0 && len(body[0]) <= inlineMax
	if inline {
		size += len(body[0])
	}
	h := make([]byte, headerSize, size)
	binary.LittleEndian.PutUint32(h, uint32(length))
	h[4] = byte(kind)
	h[5] = flags
	binary.LittleEndian.PutUint16(h[6:], shard)
	binary.LittleEndian.PutUint64(h[8:], request)
	crc := crc32.Update(0, castagnoli, h[:16])
	for _, p := range body {
		crc = crc32.Update(crc, castagnoli, p)
	}
	binary.LittleEndian.PutUint32(h[16:], crc)
	if inline {
		h = append(h, body[0]...)
		body = body[1:]
	}
	if queue == nil {
		queue = make([][]byte, 0, 1+len(body))
	}
	queue = append(queue, h)
	for _, p := range body {
		if len(p) > 0 {
			queue = append(queue, p)
		}
	}
	return queue, headerSize + length, nil
}
