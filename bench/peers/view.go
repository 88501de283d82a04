package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/term"

	"tercet.dev/tercet/bench"
)

// view shows a run while it goes on: a line of text per measurement, and on a terminal one below them that moves.
type view struct {
	mu       sync.Mutex
	out      io.Writer
	terminal bool
	started  time.Time
	at       string // what is done now
	shown    time.Time
	last     int64
	lines    int // done, of all
	all      int
}

func newView(out *os.File) *view {
	return &view{out: out, terminal: term.IsTerminal(int(out.Fd())), started: time.Now()}
}

// clear wipes the moving line; show draws it. Callers hold mu.
func (v *view) clear() {
	if v.terminal {
		fmt.Fprint(v.out, "\r\x1b[K")
	}
}

func (v *view) show(rest string) {
	if !v.terminal {
		return
	}
	const width = 20
	full := 0
	if v.all > 0 {
		full = width * v.lines / v.all
	}
	bar := make([]rune, width)
	for i := range bar {
		bar[i] = '·'
		if i < full {
			bar[i] = '█'
		}
	}
	fmt.Fprintf(v.out, "\r\x1b[K%s %s %s %s", time.Since(v.started).Round(time.Second), string(bar), v.at, rest)
}

// note prints a line.
func (v *view) note(format string, args ...any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.clear()
	fmt.Fprintf(v.out, format+"\n", args...)
	v.show("")
}

// status says what is done now.
func (v *view) status(format string, args ...any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.at = fmt.Sprintf(format, args...)
	v.show("")
}

// line begins line i of n.
func (v *view) line(i, n int, l line) {
	v.note("\n%s: %s", l.Name, l.Title)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.lines, v.all, v.at, v.last, v.shown = i, n, l.Name, 0, time.Now()
}

// progress is a hook of a workload.
func (v *view) progress(published, acknowledged int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := published + acknowledged
	rate := float64(now-v.last) / max(0.001, time.Since(v.shown).Seconds())
	v.last, v.shown = now, time.Now()
	if rate >= 0 {
		v.show(fmt.Sprintf("%s messages, %s a second", bench.FormatCount(float64(now)), bench.FormatCount(rate)))
	}
}

// measured prints a measurement.
func (v *view) measured(l line, m *measurement) {
	v.mu.Lock()
	v.last = 0
	v.mu.Unlock()
	name := m.Contender.String()
	if m.Phase != "" {
		name += " " + m.Phase
	}
	if m.Error != "" {
		v.note("  %-24s %s", name, m.Error)
		return
	}
	latency, of := m.Publish, "publish"
	switch {
	case m.EndToEnd != nil:
		latency, of = *m.EndToEnd, "end to end"
	case m.Phase == "drain":
		latency, of = *m.Receive, "receive"
	}
	note := ""
	if m.Crowded {
		note = "  CROWDED"
	}
	if len(m.Failed) > 0 {
		note += fmt.Sprintf("  failed %v", m.Failed)
	}
	v.note("  %-24s %9s msg/s  %s p50 %8.2f p99 %8.2f ms  CPU µs/msg: servers %6.1f client %5.1f  lost %.2f%s", name,
		bench.FormatCount(m.rate()), of, millis(latency.P50), millis(latency.P99), m.ServerMicros, m.ClientMicros, m.LostCores, note)
}

func millis(us int64) float64 { return float64(us) / 1000 }

// syncDisk waits until the page cache has been written.
func syncDisk() { syscall.Sync() }
