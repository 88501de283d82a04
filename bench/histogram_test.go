package bench

import (
	"encoding/json"
	"testing"
	"time"
)

func TestHistogram(t *testing.T) {
	h := NewHistogram()
	for i := 1; i <= 1000; i++ {
		h.Record(time.Duration(i) * time.Microsecond)
	}
	want := Percentiles{Count: 1000, P50: 500, P90: 900, P99: 990, P999: 999, Max: 1000, Mean: 500}
	if got := h.Percentiles(); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	h.Record(-time.Second)
	h.Record(24 * time.Hour)
	if h.Count() != 1002 || h.Quantile(0.01) != time.Microsecond {
		t.Errorf("out of range: count %d, least %s", h.Count(), h.Quantile(0.01))
	}
	if got := h.Max(); got < 10*time.Minute || got > 10*time.Minute+time.Second {
		t.Errorf("a day was recorded as %s", got)
	}
	if NewHistogram().Quantile(50) != 0 {
		t.Error("the median of nothing is not zero")
	}
}

func TestHistogramJSON(t *testing.T) {
	h := NewHistogram()
	for i := range 5000 {
		h.Record(time.Duration(i*i) * time.Microsecond)
	}
	text, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	back := new(Histogram)
	if err := json.Unmarshal(text, back); err != nil {
		t.Fatal(err)
	}
	if got, want := back.Percentiles(), h.Percentiles(); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	back.Merge(h)
	if back.Count() != 2*h.Count() || back.Quantile(50) != h.Quantile(50) {
		t.Errorf("merged with itself: %+v", back.Percentiles())
	}
	for _, bad := range []string{`1`, `"x"`, `"SElTVA=="`} {
		if err := json.Unmarshal([]byte(bad), new(Histogram)); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
}

func TestRecorderLosesNothing(t *testing.T) {
	h := NewHistogram()
	rec := recorder{to: h}
	const n = 3*128 + 7
	for i := range n {
		rec.record(time.Duration(i+1) * time.Millisecond)
	}
	rec.flush()
	rec.flush()
	if h.Count() != n {
		t.Errorf("%d of %d", h.Count(), n)
	}
}
