package resp

import (
	"math/rand/v2"
	"strings"
	"testing"
)

var replies = []string{
	"+OK\r\n", "-ERR no\r\n", ":-12\r\n", ",1.5\r\n", "#t\r\n", "_\r\n", "(123456789012345678901234567890\r\n",
	"$-1\r\n", "$0\r\n\r\n", "$5\r\nhe\r\nl\r\n", "=7\r\ntxt:a\r\n\r\n", "!5\r\nERR x\r\n",
	"*-1\r\n", "*0\r\n", "*2\r\n$1\r\na\r\n*2\r\n:1\r\n*0\r\n", "%1\r\n+k\r\n*1\r\n+v\r\n", "~2\r\n:1\r\n:2\r\n",
	">3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$2\r\nhi\r\n", "|1\r\n+ttl\r\n:3\r\n$1\r\nx\r\n",
}

func TestScanner(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	for range 200 {
		var want []string
		for range 1 + rnd.IntN(20) {
			want = append(want, replies[rnd.IntN(len(replies))])
		}
		all := []byte(strings.Join(want, ""))
		// The bytes come in pieces of any size.
		var s Scanner
		have, got := 0, []string(nil)
		start := 0
		for start < len(all) {
			n, err := s.Reply(all[start:have])
			if err != nil {
				t.Fatal(err)
			}
			if n > 0 {
				got = append(got, string(all[start:start+n]))
				start += n
				continue
			}
			if have == len(all) {
				t.Fatalf("no end found in %q", all[start:])
			}
			have = min(have+1+rnd.IntN(9), len(all))
		}
		if strings.Join(got, "|") != strings.Join(want, "|") {
			t.Fatalf("found %q\nwant  %q", got, want)
		}
	}
	for _, bad := range []string{"x\r\n", "\r\n", "$x\r\n", "$-2\r\n", "*99999999999999\r\n", "*-2\r\n", "+OK\n", "$999999999999\r\n"} {
		var s Scanner
		if n, err := s.Reply([]byte(bad)); err == nil {
			t.Errorf("%q: length %d and no error", bad, n)
		}
	}
}

func FuzzScanner(f *testing.F) {
	for _, r := range replies {
		f.Add([]byte(r), 3)
	}
	f.Fuzz(func(t *testing.T, in []byte, cut int) {
		var whole, split Scanner
		n, err := whole.Reply(in)
		if n < 0 || n > len(in) {
			t.Fatalf("length %d of %d", n, len(in))
		}
		if cut < 0 || cut > len(in) {
			return
		}
		// In two pieces the answer is the same.
		m, err2 := split.Reply(in[:cut])
		if m == 0 && err2 == nil {
			m, err2 = split.Reply(in)
		}
		if m != n || (err == nil) != (err2 == nil) {
			t.Fatalf("in one piece %d %v, cut at %d %d %v", n, err, cut, m, err2)
		}
	})
}
