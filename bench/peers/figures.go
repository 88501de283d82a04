package main

import (
	"fmt"
	"math"
	"slices"

	"tercet.dev/tercet/bench"
)

// spread is a figure with how far its repetitions lie apart.
type spread struct {
	min, median, max float64
	n                int
}

func spreadOf(values []float64) spread {
	if len(values) == 0 {
		return spread{}
	}
	v := slices.Clone(values)
	slices.Sort(v)
	median := v[len(v)/2]
	if len(v)%2 == 0 {
		median = (median + v[len(v)/2-1]) / 2
	}
	return spread{v[0], median, v[len(v)-1], len(v)}
}

// text writes the figure with its range.
func (s spread) text(format func(float64) string) string {
	switch s.n {
	case 0:
		return "–"
	case 1:
		return format(s.median)
	}
	return fmt.Sprintf("%s (%s … %s)", format(s.median), format(s.min), format(s.max))
}

// ratioText writes a ratio.
func ratioText(x float64) string {
	if x < 10 {
		return fmt.Sprintf("%.2f", x)
	}
	return fmt.Sprintf("%.1f", x)
}

// figure is what is read off a measurement.
type figure func(m *measurement) (float64, bool)

func rateOf(m *measurement) (float64, bool) { return m.rate(), m.rate() > 0 }
func p50Of(m *measurement) (float64, bool)  { return float64(m.Publish.P50), m.Publish.Count > 0 }

func endToEndOf(quantile func(bench.Percentiles) int64) figure {
	return func(m *measurement) (float64, bool) {
		if m.EndToEnd == nil || m.EndToEnd.Count == 0 {
			return 0, false
		}
		return float64(quantile(*m.EndToEnd)), true
	}
}

func p50(p bench.Percentiles) int64 { return p.P50 }
func p99(p bench.Percentiles) int64 { return p.P99 }

// line finds a line.
func (r *results) line(name string) (*lineResult, bool) {
	i := slices.IndexFunc(r.Lines, func(l lineResult) bool { return l.Name == name })
	if i < 0 {
		return nil, false
	}
	return &r.Lines[i], true
}

// counted returns the measurement of a contender's turn in a round that counts: the one at which least was lost to
// others. Nil if there is none.
func (l *lineResult) counted(c contender, round int, phase string) *measurement {
	var best *measurement
	for i := range l.Measurements {
		m := &l.Measurements[i]
		if m.Contender != c || m.Round != round || m.Phase != phase || m.Error != "" {
			continue
		}
		if best == nil || m.LostCores < best.LostCores {
			best = m
		}
	}
	return best
}

// values reads a figure off each round of a contender.
func (l *lineResult) values(c contender, phase string, f figure) []float64 {
	var all []float64
	for round := 1; round <= max(1, l.Rounds); round++ {
		if m := l.counted(c, round, phase); m != nil {
			if v, ok := f(m); ok {
				all = append(all, v)
			}
		}
	}
	return all
}

// median is the middle of a figure over the rounds; zero if there is none.
func (l *lineResult) median(c contender, phase string, f figure) float64 {
	return spreadOf(l.values(c, phase, f)).median
}

// ratios divides the figures of two contenders round by round: those were measured next to each other.
func (l *lineResult) ratios(a, b contender, phase string, f figure) []float64 {
	var all []float64
	for round := 1; round <= max(1, l.Rounds); round++ {
		ma, mb := l.counted(a, round, phase), l.counted(b, round, phase)
		if ma == nil || mb == nil {
			continue
		}
		va, ok := f(ma)
		vb, ok2 := f(mb)
		if ok && ok2 && vb > 0 {
			all = append(all, va/vb)
		}
	}
	return all
}

// bestPeer is the contender among systems with the highest figure, or the lowest.
func (l *lineResult) bestPeer(systems []string, phase string, f figure, highest bool) (contender, bool) {
	var best contender
	value, found := 0.0, false
	for _, name := range systems {
		c := contender{name, wayNative}
		v := l.median(c, phase, f)
		if v == 0 || found && (highest && v <= value || !highest && v >= value) {
			continue
		}
		best, value, found = c, v, true
	}
	return best, found
}

// probe finds the probe with a number of streams.
func (l *lineResult) probe(streams int) (bench.ProbeResult, bool) {
	i := slices.IndexFunc(l.Probes, func(p bench.ProbeResult) bool { return p.Streams == streams })
	if i < 0 {
		return bench.ProbeResult{}, false
	}
	return l.Probes[i], true
}

// diskLimit is how many bytes a second each of three streams writes and syncs in large pieces: no system that keeps
// three copies on this disk can do better.
func (r *results) diskLimit() float64 {
	var all []float64
	for i := range r.Lines {
		if p, ok := r.Lines[i].probe(3); ok {
			all = append(all, p.BytesPerSecond)
		}
	}
	return spreadOf(all).median
}

// verdict is one row of the table of goals.
type verdict struct {
	Figure   string `json:"figure"`
	Goal     string `json:"goal"`
	Measured string `json:"measured"`
	// Met is nil where nothing was measured.
	Met *bool `json:"met"`
}

// goals fills in the table.
func (r *results) goals() []verdict {
	var all []verdict
	none := func(figure, goal, why string) { all = append(all, verdict{Figure: figure, Goal: goal, Measured: why}) }
	say := func(figure, goal, measured string, met bool) {
		all = append(all, verdict{figure, goal, measured, &met})
	}
	// ratio compares Tercet by a way with a peer.
	ratio := func(figure, name, phase, way string, peer func(l *lineResult) (contender, bool), f comparison, limit float64) {
		l, ok := r.line(name)
		goal := f.goal(limit)
		if !ok {
			none(figure, goal, "not measured")
			return
		}
		other, ok := peer(l)
		if !ok {
			none(figure, goal, "no peer was measured")
			return
		}
		s := spreadOf(l.ratios(contender{sysTercet, way}, other, phase, f.of))
		if s.n == 0 {
			none(figure, goal, "not measured")
			return
		}
		say(figure, goal, fmt.Sprintf("%s × %s", s.text(ratioText), other), f.met(s.median, limit))
	}
	against := func(name string) func(*lineResult) (contender, bool) {
		return func(*lineResult) (contender, bool) { return contender{name, wayNative}, true }
	}
	best := func(systems []string, phase string, f comparison) func(*lineResult) (contender, bool) {
		return func(l *lineResult) (contender, bool) { return l.bestPeer(systems, phase, f.of, f.higher) }
	}
	throughput, latency := comparison{rateOf, true}, comparison{p50Of, false}
	e2e50, e2e99 := comparison{endToEndOf(p50), false}, comparison{endToEndOf(p99), false}

	ratio("1 client, sync, p50, RESP, vs the best fsynced peer", "clients-1", "", wayRESP, best(fsynced, "", latency), latency, 0.7)
	ratio("1 client, sync, p50, HTTP, vs the best fsynced peer", "clients-1", "", wayHTTP, best(fsynced, "", latency), latency, 0.7)
	for _, way := range []string{wayRESP, wayHTTP, wayLeader} {
		figure, goal := "1 client, p50, "+way+", over one sync of the run's probe", "≤ 1 sync + 0.25 ms"
		l, ok := r.line("clients-1")
		if !ok {
			none(figure, goal, "not measured")
			continue
		}
		p, ok := l.probe(1)
		v := l.median(contender{sysTercet, way}, "", p50Of)
		if !ok || v == 0 {
			none(figure, goal, "not measured")
			continue
		}
		over := (v - float64(p.Sync.P50)) / 1000
		say(figure, goal, fmt.Sprintf("sync %.2f ms %+.2f ms", millis(p.Sync.P50), over), over <= 0.25)
	}
	for _, n := range []string{"clients-16", "clients-256"} {
		ratio(n+", RESP, throughput vs JetStream sync always", n, "", wayRESP, against(sysAlways), throughput, 3)
		ratio(n+", RESP, p50 vs JetStream sync always", n, "", wayRESP, against(sysAlways), latency, 0.4)
		ratio(n+", HTTP, throughput vs JetStream sync always", n, "", wayHTTP, against(sysAlways), throughput, 1.5)
	}
	for _, way := range []string{wayRESP, wayHTTP} {
		ratio("16 × batches of 100, "+way+", vs the best fsynced peer", "batch", "", way, best(fsynced, "", throughput), throughput, 3)
	}
	for _, name := range []string{"clients-1", "clients-16", "clients-256", "batch"} {
		for _, way := range []string{wayRESP, wayHTTP} {
			ratio(name+", "+way+", vs RabbitMQ quorum queues", name, "", way, against(sysRabbit), throughput, 5)
		}
	}
	for _, name := range []string{"clients-1", "clients-16", "clients-64", "clients-256", "clients-1024", "batch", "roundtrip", "fanout-3"} {
		for _, way := range []string{wayRESP, wayHTTP} {
			ratio(name+", "+way+", vs JetStream at its default", name, "", way, against(sysDefault), throughput, 1)
		}
	}
	for _, way := range []string{wayRESP, wayHTTP} {
		ratio("publish → receive → ack, 16 + 4, "+way+", throughput vs Redis", "roundtrip", "", way, against(sysRedis), throughput, 2)
		ratio("publish → receive → ack, 16 + 4, "+way+", end-to-end p50 vs Redis", "roundtrip", "", way, against(sysRedis), e2e50, 1)
		ratio("500 messages/s, "+way+", end-to-end p50 vs the best peer", "rate-500", "", way, best(peersOf, "", e2e50), e2e50, 1)
		ratio("500 messages/s, "+way+", end-to-end p99 vs the best peer", "rate-500", "", way, best(peersOf, "", e2e99), e2e99, 1)
		ratio("fan-out to 3 groups, "+way+", deliveries/s vs the best peer", "fanout-3", "", way, best(peersOf, "", throughput), throughput, 2)
	}
	for _, way := range []string{wayRESP, wayHTTP, wayLeader} {
		ratio("drain of a million, "+way+", vs the best peer", "drain", "drain", way, best(peersOf, "drain", throughput), throughput, 4)
		ownRate(r, "drain of a million, "+way+", vs its own publish rate", "drain", contender{sysTercet, way}, none, say)
	}
	ownRate(r, "drain of ten million, in-cluster, vs its own publish rate", "drain-10", contender{sysTercet, wayLeader}, none, say)

	l, ok := r.line("clients-256")
	raw := r.diskLimit()
	if v := 0.0; ok && raw > 0 {
		v = l.median(contender{sysTercet, wayLeader}, "", func(m *measurement) (float64, bool) { return m.BytesPerSecond, true })
		share := 100 * v / raw
		say("in-cluster, 256 publishers, vs the raw three-stream sync throughput", "≥ 50 % (here: of writes of 256 KiB)", fmt.Sprintf("%.0f %%", share), share >= 50)
	} else {
		none("in-cluster, 256 publishers, vs the raw three-stream sync throughput", "≥ 50 %", "not measured")
	}
	for _, c := range []struct {
		what, line, way string
		limit           float64
	}{
		{"in-cluster", "clients-256", wayLeader, 4}, {"RESP pipelined", "batch", wayRESP, 6}, {"HTTP batch", "batch", wayHTTP, 6},
		{"HTTP single", "clients-256", wayHTTP, 30},
	} {
		figure, goal := "CPU per 1 KiB publish per node, "+c.what, fmt.Sprintf("≤ %.0f µs", c.limit)
		l, ok := r.line(c.line)
		if !ok {
			none(figure, goal, "not measured")
			continue
		}
		s := spreadOf(l.values(contender{sysTercet, c.way}, "", func(m *measurement) (float64, bool) { return m.NodeMicros, m.NodeMicros > 0 }))
		if s.n == 0 {
			none(figure, goal, "not measured")
			continue
		}
		say(figure, goal, s.text(func(x float64) string { return fmt.Sprintf("%.1f µs", x) }), s.median <= c.limit)
	}
	if l, ok := r.line("topics-64"); ok {
		for _, way := range []string{wayLeader, wayRESP, wayHTTP} {
			if v := l.median(contender{sysTercet, way}, "", func(m *measurement) (float64, bool) { return m.WrittenPerByte, true }); v > 0 {
				say("bytes written to disk per payload byte, 64 topics, "+way, "≤ 2.3", fmt.Sprintf("%.2f", v), v <= 2.3)
			}
		}
	} else {
		none("bytes written to disk per payload byte, 64 topics", "≤ 2.3", "not measured")
	}
	for _, way := range []string{wayLeader, wayRESP, wayHTTP} {
		figure := "p99 / p50 of publish at 50 % of the maximum rate, " + way
		l, ok := r.line("half-" + way)
		v := 0.0
		if ok {
			v = l.median(contender{sysTercet, way}, "", func(m *measurement) (float64, bool) {
				return float64(m.Publish.P99) / math.Max(1, float64(m.Publish.P50)), m.Publish.Count > 0
			})
		}
		if v == 0 {
			none(figure, "≤ 4", "not measured")
			continue
		}
		say(figure, "≤ 4", ratioText(v), v <= 4)
	}
	return all
}

// comparison is a figure with the direction in which it is better.
type comparison struct {
	of     figure
	higher bool
}

func (f comparison) met(v, limit float64) bool {
	if f.higher {
		return v >= limit
	}
	return v <= limit
}

func (f comparison) goal(limit float64) string {
	if f.higher {
		return fmt.Sprintf("≥ %g ×", limit)
	}
	return fmt.Sprintf("≤ %g ×", limit)
}

// ownRate compares the drain of a backlog with how fast it was published.
func ownRate(r *results, figure, name string, c contender, none func(figure, goal, why string), say func(figure, goal, measured string, met bool)) {
	const goal = "≥ 1 ×"
	l, ok := r.line(name)
	if !ok {
		none(figure, goal, "not measured")
		return
	}
	fill, drain := l.median(c, "fill", rateOf), l.median(c, "drain", rateOf)
	if fill == 0 || drain == 0 {
		none(figure, goal, "not measured")
		return
	}
	say(figure, goal, ratioText(drain/fill), drain >= fill)
}
