package resp

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// commands reads all commands of a stream, as text, and how it ended.
func commands(src io.Reader, l Limits) (list []string, err error) {
	r := NewReader(src, nil)
	r.SetLimits(l)
	for {
		args, err := r.Next()
		if err != nil {
			return list, err
		}
		list = append(list, fmt.Sprintf("%q", args))
	}
}

var corpus = []struct {
	name, in string
	want     []string
	end      string
}{
	{"array", "*2\r\n$4\r\nECHO\r\n$2\r\nhi\r\n", []string{`["ECHO" "hi"]`}, "EOF"},
	{"empty argument", "*2\r\n$4\r\nECHO\r\n$0\r\n\r\n", []string{`["ECHO" ""]`}, "EOF"},
	{"binary", "*1\r\n$5\r\na\r\n\x00b\r\n", []string{`["a\r\n\x00b"]`}, "EOF"},
	{"pipeline", "PING\r\n*1\r\n$4\r\nPING\r\nPING a\n", []string{`["PING"]`, `["PING"]`, `["PING" "a"]`}, "EOF"},
	{"empty ones", "*0\r\n\r\n*-1\r\n*-2\r\n \r\nPING\r\n", []string{`["PING"]`}, "EOF"},
	{"plus", "*+1\r\n", nil, "Protocol error: invalid multibulk length"},
	{"leading zero", "*01\r\n", nil, "Protocol error: invalid multibulk length"},
	{"blank", "* 1\r\n", nil, "Protocol error: invalid multibulk length"},
	{"nothing", "*\r\n", nil, "Protocol error: invalid multibulk length"},
	{"too many", "*1048577\r\n", nil, "Protocol error: invalid multibulk length"},
	{"2^31", "*2147483648\r\n", nil, "Protocol error: invalid multibulk length"},
	{"2^63-1", "*9223372036854775807\r\n", nil, "Protocol error: invalid multibulk length"},
	{"2^64", "*18446744073709551616\r\n", nil, "Protocol error: invalid multibulk length"},
	{"count without CR", "*1\n", nil, "unexpected EOF"},
	{"negative bulk", "*1\r\n$-1\r\n", nil, "Protocol error: invalid bulk length"},
	{"bulk -2", "*1\r\n$-2\r\n", nil, "Protocol error: invalid bulk length"},
	{"512 MiB + 1", "*1\r\n$536870913\r\n", nil, "Protocol error: invalid bulk length"},
	{"bulk 2^63-1", "*1\r\n$9223372036854775807\r\n", nil, "Protocol error: invalid bulk length"},
	{"not a bulk", "*1\r\nPING\r\n", nil, "Protocol error: expected '$', got 'P'"},
	{"nested", "*1\r\n*1\r\n$4\r\nPING\r\n", nil, "Protocol error: expected '$', got '*'"},
	{"map", "%1\r\n+a\r\n+b\r\n", []string{`["%1"]`, `["+a"]`, `["+b"]`}, "EOF"},
	{"shorter than said", "*1\r\n$3\r\nPING\r\n", nil, "Protocol error: invalid bulk length"},
	{"no CR LF", "*1\r\n$4\r\nPINGxx", nil, "Protocol error: invalid bulk length"},
	{"cut off", "*2\r\n$4\r\nECHO\r\n$10\r\nabc", nil, "unexpected EOF"},
	{"quotes", `SET "a b" 'c d' "\x41\n\"" 'it\'s' ""` + "\r\n", []string{`["SET" "a b" "c d" "A\n\"" "it's" ""]`}, "EOF"},
	{"quote in a word", `a"b c"` + "\r\n", []string{`["ab c"]`}, "EOF"},
	{"unbalanced", "GET \"a\r\n", nil, "Protocol error: unbalanced quotes in request"},
	{"quote too close", "GET \"a\"b\r\n", nil, "Protocol error: unbalanced quotes in request"},
	{"NUL in line", "PI\x00NG\r\n", []string{`["PI"]`}, "EOF"},
	{"long line", strings.Repeat("a", 65536), nil, "unexpected EOF"},
	{"longer line", strings.Repeat("a", 65537), nil, "Protocol error: too big inline request"},
	{"longer line with end", strings.Repeat("a", 65537) + "\r\n", nil, "Protocol error: too big inline request"},
	{"long count", "*" + strings.Repeat("1", 65537), nil, "Protocol error: too big mbulk count string"},
	{"long bulk count", "*1\r\n$" + strings.Repeat("1", 65537), nil, "Protocol error: too big bulk count string"},
}

// TestReader reads the corpus whole, one byte at a time, and cut in two at every offset: the commands are the same.
func TestReader(t *testing.T) {
	for _, c := range corpus {
		t.Run(c.name, func(t *testing.T) {
			check := func(how string, src io.Reader) {
				t.Helper()
				got, err := commands(src, Limits{})
				if !slices.Equal(got, c.want) || err.Error() != c.end {
					t.Fatalf("%s: %q, %v; want %q, %s", how, got, err, c.want, c.end)
				}
			}
			check("whole", strings.NewReader(c.in))
			check("bytes", iotest.OneByteReader(strings.NewReader(c.in)))
			if len(c.in) > 1000 {
				return
			}
			for i := range len(c.in) {
				check(fmt.Sprintf("cut at %d", i), io.MultiReader(strings.NewReader(c.in[:i]), strings.NewReader(c.in[i:])))
			}
		})
	}
}

func TestBeforeAuthentication(t *testing.T) {
	for _, c := range []struct{ in, end string }{
		{"*10\r\n" + strings.Repeat("$1\r\na\r\n", 10), "EOF"},
		{"*11\r\n", "Protocol error: unauthenticated multibulk length"},
		{"*1\r\n$16384\r\n" + strings.Repeat("a", 16384) + "\r\n", "EOF"},
		{"*1\r\n$16385\r\n", "Protocol error: unauthenticated bulk length"},
	} {
		if _, err := commands(strings.NewReader(c.in), BeforeAuthentication); err.Error() != c.end {
			t.Errorf("%.20q: %v; want %s", c.in, err, c.end)
		}
	}
}

func TestCommandLimit(t *testing.T) {
	in := "*3\r\n" + strings.Repeat("$40\r\n"+strings.Repeat("a", 40)+"\r\n", 3)
	if list, err := commands(strings.NewReader(in), Limits{Command: 200}); len(list) != 1 || !errors.Is(err, io.EOF) {
		t.Errorf("within: %d commands, %v", len(list), err)
	}
	var p *ProtocolError
	if _, err := commands(strings.NewReader(in), Limits{Command: 100}); !errors.As(err, &p) {
		t.Errorf("above: %v", err)
	}
}

// endless gives the same bytes for ever, n at a time.
type endless struct{ piece []byte }

func (e endless) Read(p []byte) (int, error) { return copy(p, e.piece), nil }

// TestMemory: what a client announces costs nothing; what it sends costs at most a small multiple; the budget is asked
// for every buffer, and gets everything back.
func TestMemory(t *testing.T) {
	measure := func(in string) (held int, err error) {
		most := 0
		r := NewReader(strings.NewReader(in), func(n int) bool {
			held += n
			most = max(most, held)
			return true
		})
		for err == nil {
			_, err = r.Next()
		}
		r.Release()
		if held != 0 {
			t.Errorf("%.20q: %d bytes are not given back", in, held)
		}
		return most, err
	}
	for _, in := range []string{"*1000000\r\n", "*1\r\n$33554432\r\n", "*2\r\n$33554432\r\nabc"} {
		if held, err := measure(in); held > 64<<10 || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%q: %d bytes, %v", in, held, err)
		}
	}
	big := "*1\r\n$8000000\r\n" + strings.Repeat("a", 8000000) + "\r\n"
	if held, err := measure(big); held > 4*len(big) || !errors.Is(err, io.EOF) {
		t.Errorf("8 MB: %d bytes, %v", held, err)
	}
	left := 100 << 10
	r := NewReader(endless{[]byte("*1\r\n$10000000\r\naaaaaaa")}, func(n int) bool {
		if n > left {
			return false
		}
		left -= n
		return true
	})
	if _, err := r.Next(); !errors.Is(err, ErrMemory) {
		t.Errorf("without memory: %v", err)
	}
}

// TestAllocations: a command that is in the buffer costs no allocation.
func TestAllocations(t *testing.T) {
	cmd := []byte("*5\r\n$4\r\nXADD\r\n$6\r\norders\r\n$1\r\n*\r\n$1\r\nf\r\n$100\r\n" + strings.Repeat("v", 100) + "\r\n")
	r := NewReader(endless{cmd}, nil)
	for range 100 {
		if _, err := r.Next(); err != nil {
			t.Fatal(err)
		}
	}
	if n := testing.AllocsPerRun(1000, func() { r.Next() }); n > 0 {
		t.Errorf("%v allocations a command", n)
	}
}

// TestShrink: a connection that once needed much keeps little.
func TestShrink(t *testing.T) {
	in := "*1\r\n$8000000\r\n" + strings.Repeat("a", 8000000) + "\r\n" + strings.Repeat("PING\r\n", 3)
	r := NewReader(iotest.OneByteReader(strings.NewReader(in)), nil)
	for range 3 {
		if _, err := r.Next(); err != nil {
			t.Fatal(err)
		}
	}
	if r.Size() > bufferIdle {
		t.Errorf("%d bytes are held", r.Size())
	}
}

func TestUnread(t *testing.T) {
	r := NewReader(strings.NewReader("NG\r\n"), nil)
	if err := r.Unread([]byte("PI")); err != nil {
		t.Fatal(err)
	}
	if args, err := r.Next(); err != nil || string(args[0]) != "PING" {
		t.Errorf("%q, %v", args, err)
	}
}

func TestParseInt(t *testing.T) {
	for _, c := range []struct {
		in string
		n  int64
		ok bool
	}{
		{"0", 0, true}, {"1", 1, true}, {"-1", -1, true}, {"9223372036854775807", 1<<63 - 1, true}, {"-9223372036854775808", -1 << 63, true},
		{"9223372036854775808", 0, false}, {"-9223372036854775809", 0, false}, {"18446744073709551616", 0, false}, {"99999999999999999999", 0, false},
		{"", 0, false}, {"-", 0, false}, {"-0", 0, false}, {"00", 0, false}, {"01", 0, false}, {"+1", 0, false}, {" 1", 0, false}, {"1 ", 0, false}, {"0x1", 0, false}, {"1e3", 0, false},
	} {
		if n, ok := ParseInt([]byte(c.in)); ok != c.ok || ok && n != c.n {
			t.Errorf("%q: %d, %v", c.in, n, ok)
		}
	}
}

func TestBuffer(t *testing.T) {
	write := func(v3 bool) string {
		b := Buffer{V3: v3}
		b.OK()
		b.Simple("a")
		b.Error("ERR a\r\nb")
		b.Int(-7)
		b.Bool01(true)
		b.Bulk([]byte("x\r\n"))
		b.String("")
		b.Uint(1<<64 - 1)
		b.Double(1.5)
		b.Verbatim("v")
		b.Null()
		b.NullArray()
		b.Array(1)
		b.Map(1)
		b.Set(1)
		b.Push(1)
		return string(b.B)
	}
	common := "+OK\r\n+a\r\n-ERR a  b\r\n:-7\r\n:1\r\n$3\r\nx\r\n\r\n$0\r\n\r\n$20\r\n18446744073709551615\r\n"
	if got, want := write(false), common+"$3\r\n1.5\r\n$1\r\nv\r\n$-1\r\n*-1\r\n*1\r\n*2\r\n*1\r\n*1\r\n"; got != want {
		t.Errorf("RESP2\n got %q\nwant %q", got, want)
	}
	if got, want := write(true), common+",1.5\r\n=5\r\ntxt:v\r\n_\r\n_\r\n*1\r\n%1\r\n~1\r\n>1\r\n"; got != want {
		t.Errorf("RESP3\n got %q\nwant %q", got, want)
	}
}

// FuzzReader: no input panics, or costs more memory than a multiple of its size; how it is cut does not matter.
func FuzzReader(f *testing.F) {
	for _, c := range corpus {
		if len(c.in) < 1000 {
			f.Add([]byte(c.in), uint8(3))
		}
	}
	f.Fuzz(func(t *testing.T, in []byte, cut uint8) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		whole, err1 := commands(bytes.NewReader(in), Limits{})
		runtime.ReadMemStats(&after)
		if used := after.TotalAlloc - before.TotalAlloc; used > uint64(64*len(in)+256<<10) {
			t.Errorf("%d bytes for %d", used, len(in))
		}
		n := min(int(cut), len(in))
		parts, err2 := commands(io.MultiReader(bytes.NewReader(in[:n]), iotest.OneByteReader(bytes.NewReader(in[n:]))), Limits{})
		if !slices.Equal(whole, parts) || err1.Error() != err2.Error() {
			t.Errorf("%q cut at %d: %q %v and %q %v", in, n, whole, err1, parts, err2)
		}
	})
}
