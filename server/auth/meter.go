package auth

import (
	"sync"
	"time"
)

// Limits bound what one token, or one subject of an issuer, may ask of this node. Zero is no bound. They are counted by
// each node for itself and forgotten when it stops.
type Limits struct {
	// RequestsPerSecond may be exceeded for as long as a burst of Burst requests lasts (default: one second's worth).
	RequestsPerSecond float64 `json:"requestsPerSecond,omitempty" yaml:"requests-per-second"`
	Burst             int     `json:"burst,omitempty" yaml:"burst"`
	// BytesPerSecond bounds what is published. A message may be larger: the next one waits the longer.
	BytesPerSecond int64 `json:"bytesPerSecond,omitempty" yaml:"bytes-per-second"`
	// BytesPerDay is what may be published from one midnight UTC to the next.
	BytesPerDay int64 `json:"bytesPerDay,omitempty" yaml:"bytes-per-day"`
}

// Check refuses what cannot be meant.
func (l Limits) Check() error {
	if l.RequestsPerSecond < 0 || l.Burst < 0 || l.BytesPerSecond < 0 || l.BytesPerDay < 0 ||
		l.RequestsPerSecond != l.RequestsPerSecond || l.Burst > 0 && l.RequestsPerSecond == 0 {
		return errLimits
	}
	return nil
}

// bucket is a token bucket that can be overdrawn: what is taken may exceed what is there, and the debt is paid by
// waiting. So one request may be larger than the burst.
type bucket struct {
	rate, burst, level float64
	last               time.Time
}

func (b *bucket) refill(now time.Time) {
	if b.last.IsZero() {
		b.level = b.burst
	} else if d := now.Sub(b.last); d > 0 {
		b.level = min(b.burst, b.level+d.Seconds()*b.rate)
	}
	b.last = now
}

// wait returns how long it takes until at least need is there, 0 when it is.
func (b *bucket) wait(now time.Time, need float64) time.Duration {
	if b.rate == 0 {
		return 0
	}
	b.refill(now)
	if b.level >= need {
		return 0
	}
	return max(time.Duration((need-b.level)/b.rate*float64(time.Second)), time.Nanosecond)
}

// meter counts one principal's use.
type meter struct {
	limits Limits

	mu              sync.Mutex
	requests, bytes bucket
	day             int64 // of today
	today           int64 // bytes
}

func newMeter(l Limits) *meter {
	if l == (Limits{}) {
		return nil
	}
	m := &meter{limits: l}
	m.requests.rate, m.bytes.rate, m.bytes.burst = l.RequestsPerSecond, float64(l.BytesPerSecond), float64(l.BytesPerSecond)
	if m.requests.burst = float64(l.Burst); l.Burst == 0 {
		m.requests.burst = max(1, l.RequestsPerSecond)
	}
	return m
}

// Request counts a request. A positive time means that it is one too many now and may be tried again after that.
func (p *Principal) Request(now time.Time) (retryAfter time.Duration) {
	if p == nil || p.meter == nil {
		return 0
	}
	m := p.meter
	m.mu.Lock()
	defer m.mu.Unlock()
	if wait := m.requests.wait(now, 1); wait > 0 {
		return wait
	}
	m.requests.level--
	return 0
}

// Publish counts n bytes about to be published. quota tells the two bounds apart.
func (p *Principal) Publish(now time.Time, n int64) (retryAfter time.Duration, quota bool) {
	if p == nil || p.meter == nil {
		return 0, false
	}
	m := p.meter
	m.mu.Lock()
	defer m.mu.Unlock()
	const daySeconds = 24 * 60 * 60
	if day := now.Unix() / daySeconds; day != m.day {
		m.day, m.today = day, 0
	}
	if most := m.limits.BytesPerDay; most > 0 && m.today+n > most {
		return time.Unix((m.day+1)*daySeconds, 0).Sub(now), true
	}
	if wait := m.bytes.wait(now, 1); wait > 0 {
		return wait, false
	}
	m.bytes.level -= float64(n)
	m.today += n
	return 0, false
}
