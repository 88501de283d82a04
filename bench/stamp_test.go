package bench

import (
	"bytes"
	"math"
	"testing"
	"time"
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

func TestTimeMark(t *testing.T) {
	body := make([]byte, timeMarkSize+5)
	due := time.Now().Add(-3 * time.Second)
	putTimeMark(body, due)
	if got, ok := readTimeMark(body); !ok || !got.Equal(due) {
		t.Errorf("%v, %t, want %v", got, ok, due)
	}
	if _, ok := readTimeMark(body[:timeMarkSize-1]); ok {
		t.Error("a cut mark was read")
	}
	if _, ok := readTimeMark(make([]byte, 100)); ok {
		t.Error("a body without a mark was read")
	}
}

// TestMarks: whatever a request looks like, each of its bodies carries the mark, and nothing else is changed.
func TestMarks(t *testing.T) {
	for name, encode := range map[string]func(w Workload) func(string, [][]byte) request{
		"http": func(w Workload) func(string, [][]byte) request { return (&HTTPDriver{Workload: w}).request },
		"multipart": func(w Workload) func(string, [][]byte) request {
			return (&HTTPDriver{Workload: w, Multipart: true}).request
		},
		"node": func(w Workload) func(string, [][]byte) request { return (&NodeDriver{Workload: w}).command },
	} {
		w := Workload{Topic: "t", Topics: 3, Publishers: 1, Sizes: []int{40, 300}, Batch: 5, Timed: true, Retention: time.Minute}
		rs := prepare(w, encode(w))
		f := rs.feed(0)
		for n := range 6 {
			due := time.Now().Add(time.Duration(n) * time.Second)
			plain := rs.pool[f.next%len(rs.pool)]
			r := f.take(due)
			if len(r.marks) != 5 || r.messages != 5 || r.bytes != 5*w.Sizes[n%2] || len(r.body) != len(plain.body) {
				t.Fatalf("%s: %d marks, %d messages, %d bytes", name, len(r.marks), r.messages, r.bytes)
			}
			restored := bytes.Clone(r.body)
			for _, at := range r.marks {
				if got, ok := readTimeMark(r.body[at:]); !ok || !got.Equal(due) {
					t.Errorf("%s: %v, %t", name, got, ok)
				}
				copy(restored[at:at+timeMarkSize], plain.body[at:])
			}
			if !bytes.Equal(restored, plain.body) || bytes.Contains(plain.body, []byte(timeMarkWord)) {
				t.Errorf("%s: more than the marks was changed", name)
			}
			if !bytes.Contains(append(bytes.Clone(r.head), r.body...), []byte(w.TopicName(n))) {
				t.Errorf("%s: request %d is not for %s", name, n, w.TopicName(n))
			}
		}
	}
}
