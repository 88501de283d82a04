package bench

import (
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// What a Histogram can hold, in microseconds. Longer times are recorded as the longest.
const (
	histogramMin    = 1
	histogramMax    = int64(10 * time.Minute / time.Microsecond)
	histogramDigits = 3
)

// Histogram is a set of durations with a resolution of a microsecond or three digits, whichever is coarser.
// Its methods may be called from any goroutine. As JSON it is the standard serialised form of HdrHistogram
// (version 2, compressed, base64), which the tools around HdrHistogram read.
type Histogram struct {
	mu sync.Mutex
	h  *hdrhistogram.Histogram
}

// NewHistogram returns an empty histogram.
func NewHistogram() *Histogram {
	return &Histogram{h: hdrhistogram.New(histogramMin, histogramMax, histogramDigits)}
}

// Record adds one duration.
func (h *Histogram) Record(d time.Duration) { h.recordAll([]time.Duration{d}) }

func (h *Histogram) recordAll(ds []time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, d := range ds {
		// Never fails: the value is within the range that New was given.
		_ = h.h.RecordValue(max(histogramMin, min(int64((d+time.Microsecond/2)/time.Microsecond), histogramMax)))
	}
}

// Merge adds what other holds.
func (h *Histogram) Merge(other *Histogram) {
	other.mu.Lock()
	from := hdrhistogram.Import(other.h.Export())
	other.mu.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.h.Merge(from)
}

// Count returns the number of durations.
func (h *Histogram) Count() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.h.TotalCount()
}

// Quantile returns the duration that percent of all do not exceed; zero when there are none.
func (h *Histogram) Quantile(percent float64) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.h.TotalCount() == 0 {
		return 0
	}
	return time.Duration(h.h.ValueAtQuantile(percent)) * time.Microsecond
}

// Max returns the longest duration.
func (h *Histogram) Max() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return time.Duration(h.h.Max()) * time.Microsecond
}

// Mean returns the average.
func (h *Histogram) Mean() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return time.Duration(h.h.Mean() * float64(time.Microsecond))
}

// Percentiles are the figures of a report.
type Percentiles struct {
	Count int64 `json:"count"`
	// In microseconds.
	P50  int64 `json:"p50us"`
	P90  int64 `json:"p90us"`
	P99  int64 `json:"p99us"`
	P999 int64 `json:"p999us"`
	Max  int64 `json:"maxus"`
	Mean int64 `json:"meanus"`
}

// Percentiles returns the figures of a report.
func (h *Histogram) Percentiles() Percentiles {
	us := func(d time.Duration) int64 { return int64(d / time.Microsecond) }
	return Percentiles{
		Count: h.Count(), P50: us(h.Quantile(50)), P90: us(h.Quantile(90)), P99: us(h.Quantile(99)),
		P999: us(h.Quantile(99.9)), Max: us(h.Max()), Mean: us(h.Mean()),
	}
}

// MarshalJSON implements json.Marshaler.
func (h *Histogram) MarshalJSON() ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	text, err := h.h.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
	if err != nil {
		return nil, err
	}
	return json.Marshal(string(text))
}

// UnmarshalJSON implements json.Unmarshaler.
func (h *Histogram) UnmarshalJSON(data []byte) error {
	var text string
	if err := json.Unmarshal(data, &text); err != nil {
		return err
	}
	decoded, err := hdrhistogram.Decode([]byte(text))
	if err != nil {
		return fmt.Errorf("histogram: %w", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.h = decoded
	return nil
}

// recorder gathers one goroutine's durations, so that the histogram's lock is taken once in a while.
type recorder struct {
	to   *Histogram
	n    int
	some [128]time.Duration
}

func (r *recorder) record(d time.Duration) {
	r.some[r.n] = d
	if r.n++; r.n == len(r.some) {
		r.flush()
	}
}

func (r *recorder) flush() {
	r.to.recordAll(r.some[:r.n])
	r.n = 0
}
