package peer

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"testing"
)

func encodeFrame(t testing.TB, kind Kind, flags uint8, shard uint16, request uint64, body ...[]byte) []byte {
	t.Helper()
	vec, n, err := appendFrame(nil, kind, flags, shard, request, body)
	if err != nil {
		t.Fatal(err)
	}
	b := bytes.Join(vec, nil)
	if len(b) != n {
		t.Fatalf("frame of %d bytes, said to have %d", len(b), n)
	}
	return b
}

func TestFrameRoundTrip(t *testing.T) {
	large := bytes.Repeat([]byte("0123456789abcdef"), inlineMax)
	for _, body := range [][][]byte{
		nil,
		{nil},
		{[]byte("x")},
		{[]byte("head"), large, nil, []byte("tail")},
		{large, []byte("tail")},
	} {
		b := encodeFrame(t, KindUser+3, flagReply, 0xbeef, 1<<63+5, body...)
		f, err := readFrame(bufio.NewReader(bytes.NewReader(b)), bodyMax)
		if err != nil {
			t.Fatal(err)
		}
		if f.kind != KindUser+3 || f.flags != flagReply || f.shard != 0xbeef || f.request != 1<<63+5 || !bytes.Equal(f.body, bytes.Join(body, nil)) {
			t.Errorf("got %+v", f)
		}
	}
}

// TestFrameLargePartsAreNotCopied: payloads travel by reference from the log to the socket.
func TestFrameLargePartsAreNotCopied(t *testing.T) {
	payload := make([]byte, 4*inlineMax)
	vec, _, err := appendFrame(nil, KindUser, 0, 0, 0, [][]byte{[]byte("meta"), payload})
	if err != nil {
		t.Fatal(err)
	}
	if len(vec) != 2 || &vec[1][0] != &payload[0] {
		t.Errorf("%d vectors, payload copied", len(vec))
	}
}

// TestFrameEveryBitCounts: no frame with a flipped bit is taken for one.
func TestFrameEveryBitCounts(t *testing.T) {
	good := encodeFrame(t, KindUser, 0, 1, 7, []byte("entry"))
	next := encodeFrame(t, KindUser, 0, 1, 8, []byte("after"))
	for bit := range len(good) * 8 {
		b := append(append([]byte(nil), good...), next...)
		b[bit/8] ^= 1 << (bit % 8)
		if f, err := readFrame(bufio.NewReader(bytes.NewReader(b)), bodyMax); err == nil {
			t.Errorf("bit %d of byte %d flipped unnoticed: %+v", bit%8, bit/8, f)
		}
	}
}

// TestFrameOversizeAllocatesNothing: the length is judged before memory is set aside for it.
func TestFrameOversizeAllocatesNothing(t *testing.T) {
	h := encodeFrame(t, KindUser, 0, 0, 0)
	for _, length := range []uint32{bodyMax + 1, 1 << 31, 1<<32 - 1} {
		binary.LittleEndian.PutUint32(h, length)
		r := bufio.NewReader(nil)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		r.Reset(bytes.NewReader(h))
		_, err := readFrame(r, bodyMax)
		runtime.ReadMemStats(&after)
		var bad *FrameError
		if !errors.As(err, &bad) {
			t.Errorf("length %d: %v", length, err)
		}
		if grown := after.TotalAlloc - before.TotalAlloc; grown > 1<<20 {
			t.Errorf("length %d: %d bytes allocated", length, grown)
		}
	}
}

func TestFrameTooLargeToSend(t *testing.T) {
	_, _, err := appendFrame(nil, KindUser, 0, 0, 0, [][]byte{make([]byte, bodyMax), {1}})
	var bad *FrameError
	if !errors.As(err, &bad) {
		t.Errorf("got %v", err)
	}
	vec, n, err := appendFrame(nil, KindUser, 0, 0, 0, [][]byte{make([]byte, bodyMax)})
	if err != nil || n != headerSize+bodyMax || len(vec) != 2 {
		t.Errorf("largest frame: %d vectors, %d bytes, %v", len(vec), n, err)
	}
}

func TestFrameCutShort(t *testing.T) {
	b := encodeFrame(t, KindUser, 0, 1, 7, []byte("entry"))
	for n := range b {
		_, err := readFrame(bufio.NewReader(bytes.NewReader(b[:n])), bodyMax)
		want := io.ErrUnexpectedEOF
		if n == 0 {
			want = io.EOF
		}
		if !errors.Is(err, want) {
			t.Errorf("%d bytes: %v, want %v", n, err, want)
		}
	}
}

func FuzzFrame(f *testing.F) {
	f.Add([]byte{})
	f.Add(encodeFrame(f, KindUser, 0, 1, 7, []byte("entry")))
	f.Add(encodeFrame(f, KindUser, flagReply|flagError, 1, 7, encodeRemoteError(CodeBusy, "no")))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReader(bytes.NewReader(b))
		for {
			fr, err := readFrame(r, 1<<16)
			if err != nil {
				return
			}
			again := encodeFrame(t, fr.kind, fr.flags, fr.shard, fr.request, fr.body)
			if !bytes.Contains(b, again) {
				t.Fatalf("frame %+v was not in the input", fr)
			}
			decodeRemoteError(fr.body)
			decodeRefusal(fr.body)
		}
	})
}

func FuzzHello(f *testing.F) {
	h := Hello{Newest: 1, Oldest: 1, Purpose: Data, Cluster: "c", ID: "n1.aa", Zone: "a", Target: "n2.bb"}
	f.Add(h.encode())
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := decodeHello(b)
		if err != nil {
			return
		}
		again, err := decodeHello(h.encode())
		if err != nil || again != h {
			t.Fatalf("%+v became %+v: %v", h, again, err)
		}
	})
}

// collect is a net.Conn that keeps what is written and how.
type collect struct {
	net.Conn
	all    []byte
	writes int
}

func (c *collect) Write(p []byte) (int, error) {
	c.all = append(c.all, p...)
	c.writes++
	return len(p), nil
}

// TestJoinedWrites: without vectored writes, small frames share one write and nothing is lost at the seams.
func TestJoinedWrites(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	var scratch []byte
	for range 200 {
		var queue [][]byte
		for range rng.IntN(12) {
			p := make([]byte, rng.IntN([]int{4, 4096, 3 * joinMax}[rng.IntN(3)]))
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			queue = append(queue, p)
		}
		want := bytes.Join(queue, nil)
		c := &collect{}
		var err error
		if scratch, err = writeJoined(c, queue, scratch); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(c.all, want) {
			t.Fatalf("seed %d: %d bytes written, want %d", seed, len(c.all), len(want))
		}
		if len(want) > 0 && len(want) < joinMax && c.writes != 1 {
			t.Fatalf("seed %d: %d bytes in %d writes", seed, len(want), c.writes)
		}
	}
}
