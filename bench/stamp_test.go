package bench

import (
	"math"
	"testing"
)

func TestStamp(t *testing.T) {
	for _, s := range []Stamp{{}, {1, 1}, {255, 1 << 40}, {math.MaxUint32, math.MaxUint64}} {
		body := make([]byte, StampSize+5)
		s.put(body)
		if got, err := parseStamp(body); err != nil || got != s {
			t.Errorf("%v became %v (%v), written as %q", s, got, err, body)
		}
	}
	for _, bad := range []string{"", "00000000-000000000000000", "0000000000000000000000000", "0000000g-0000000000000000", "00000000-000000000000000g"} {
		if s, err := parseStamp([]byte(bad)); err == nil {
			t.Errorf("%q was read as %v", bad, s)
		}
	}
}

func TestLedger(t *testing.T) {
	l := NewLedger()
	for n := range uint64(5) {
		l.Acknowledged(Stamp{1, n})
	}
	l.Acknowledged(Stamp{1, 0}) // told twice
	for _, n := range []uint64{0, 1, 1, 2, 9} {
		l.Found(Stamp{1, n})
	}
	if l.Missing() != 2 {
		t.Errorf("%d are missing", l.Missing())
	}
	l.Acknowledged(Stamp{1, 9}) // its answer came after the message
	l.Found(Stamp{2, 1})
	want := Balance{Acknowledged: 6, Lost: 2, Unacknowledged: 1, Duplicates: 1}
	if got := l.Balance(); got != want || l.Missing() != 2 {
		t.Errorf("got %+v, want %+v; %d are missing", got, want, l.Missing())
	}
}
