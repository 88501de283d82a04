package raft

import (
	"sort"
	"sync"

	"tercet.dev/tercet/wal"
)

// meterEvery is how much log lies between two samples of a logMeter, meterSamples how many it keeps.
const (
	meterEvery   = 64 << 10
	meterSamples = 4096
)

// logMeter tells roughly how many bytes of log lie between two indexes.
type logMeter struct {
	mu      sync.Mutex
	samples []meterSample // rising in both fields
}

type meterSample struct {
	index uint64
	at    wal.LSN
}

// note records that the log was at a position when index was applied.
func (m *logMeter) note(index uint64, at wal.LSN) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := len(m.samples); n > 0 && (at < m.samples[n-1].at+meterEvery || index <= m.samples[n-1].index) {
		return
	}
	if len(m.samples) == meterSamples {
		m.samples = append(m.samples[:0], m.samples[meterSamples/2:]...)
	}
	m.samples = append(m.samples, meterSample{index, at})
}

// between estimates the bytes of log after index and up to head, which ends at the given position. What lies before
// the first sample counts as everything since that sample.
func (m *logMeter) between(index, head uint64, end wal.LSN) int64 {
	if index >= head {
		return 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	// The last sample at or below index: at most meterEvery too much.
	i := sort.Search(len(m.samples), func(i int) bool { return m.samples[i].index > index }) - 1
	if i >= 0 {
		return int64(end - m.samples[i].at)
	}
	if len(m.samples) > 0 {
		// Older than everything sampled: certainly behind by all of it, and by at least the bound that matters
		// unless the log is that young.
		return int64(end-m.samples[0].at) + int64(m.samples[0].index-index)
	}
	return int64(head - index)
}

// indexBehind returns an index about n bytes before end: what is at or below it is at least that far back. 0 when
// nothing is known to be.
func (m *logMeter) indexBehind(n int64, end wal.LSN) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if uint64(end) < uint64(n) {
		return 0
	}
	i := sort.Search(len(m.samples), func(i int) bool { return m.samples[i].at > end-wal.LSN(n) }) - 1
	if i < 0 {
		return 0
	}
	return m.samples[i].index
}
