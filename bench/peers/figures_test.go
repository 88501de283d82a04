package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/bench"
)

func TestSpread(t *testing.T) {
	if s := spreadOf([]float64{3, 1, 2, 10}); s != (spread{1, 2.5, 10, 4}) {
		t.Errorf("%+v", s)
	}
	if s := spreadOf(nil); s.text(ratioText) != "–" {
		t.Errorf("nothing is %q", s.text(ratioText))
	}
	if got := spreadOf([]float64{2, 1, 30}).text(ratioText); got != "2.00 (1.00 … 30.0)" {
		t.Errorf("%q", got)
	}
}

// sample is a run in which Tercet publishes 100 messages a second over HTTP and 300 over RESP, with repetitions, and
// each peer 50 times its number.
func sample() *results {
	at := func(c contender, round, attempt int, rate, lost float64, p50 int64) measurement {
		return measurement{
			Contender: c, Round: round, Attempt: attempt, MessagesPerSecond: rate, LostCores: lost, Crowded: lost > crowded,
			Publish: bench.Percentiles{Count: 1, P50: p50, P90: p50, P99: 2 * p50, P999: 3 * p50, Max: 4 * p50}, NodeMicros: 5,
		}
	}
	l := lineResult{
		line: line{Name: "clients-16", Title: "sixteen", Rounds: 2, W: bench.Workload{Publishers: 16, Size: 1024, Batch: 1},
			Contenders: contenders(wayLeader, wayRESP, wayHTTP)},
		Probes: []bench.ProbeResult{{Streams: 1, Sync: bench.Percentiles{P50: 100}}, {Streams: 3, BytesPerSecond: 400 << 20}},
	}
	http, resp := contender{sysTercet, wayHTTP}, contender{sysTercet, wayRESP}
	l.Measurements = []measurement{
		at(http, 1, 1, 9999, 1.5, 10), at(http, 1, 2, 100, 0.1, 1000), at(http, 2, 1, 120, 0.1, 1000),
		at(resp, 1, 1, 300, 0.1, 300), at(resp, 2, 1, 300, 0.1, 300),
	}
	for i, p := range peersOf {
		for round := 1; round <= 2; round++ {
			l.Measurements = append(l.Measurements, at(contender{p, ""}, round, 1, float64(50*(i+1)), 0.1, 1000))
		}
	}
	l.Measurements = append(l.Measurements, measurement{Contender: contender{sysTercet, wayLeader}, Round: 1, Error: "it fell over"})
	return &results{Command: "peers report", At: time.Unix(0, 0), Lines: []lineResult{l}}
}

// TestCounted: of the repetitions of a turn the calmest counts, not the best, and what failed does not.
func TestCounted(t *testing.T) {
	l := &sample().Lines[0]
	if m := l.counted(contender{sysTercet, wayHTTP}, 1, ""); m == nil || m.MessagesPerSecond != 100 {
		t.Errorf("%+v", m)
	}
	if m := l.counted(contender{sysTercet, wayLeader}, 1, ""); m != nil {
		t.Errorf("a failed turn counts: %+v", m)
	}
	if got := l.ratios(contender{sysTercet, wayHTTP}, contender{sysAlways, ""}, "", rateOf); len(got) != 2 || got[0] != 2 || got[1] != 2.4 {
		t.Errorf("ratios %v", got)
	}
	if c, ok := l.bestPeer(peersOf, "", rateOf, true); !ok || c.System != sysRabbit {
		t.Errorf("the best peer is %v", c)
	}
	if c, ok := l.bestPeer(fsynced, "", p50Of, false); !ok || c.System != sysAlways {
		t.Errorf("the fastest peer is %v", c)
	}
}

func TestGoals(t *testing.T) {
	found := map[string]verdict{}
	for _, v := range sample().goals() {
		if _, ok := found[v.Figure]; ok {
			t.Errorf("%q stands twice", v.Figure)
		}
		found[v.Figure] = v
	}
	for figure, want := range map[string]bool{
		"clients-16, RESP, throughput vs JetStream sync always": true,  // 6 × 3
		"clients-16, RESP, p50 vs JetStream sync always":        true,  // 0.3 × 0.4
		"clients-16, HTTP, throughput vs JetStream sync always": true,  // 2.2 × 1.5
		"clients-16, http, vs RabbitMQ quorum queues":           false, // 0.55 × 5
		"clients-16, http, vs JetStream at its default":         true,  // 1.1 × 1
	} {
		v, ok := found[figure]
		if !ok || v.Met == nil || *v.Met != want {
			t.Errorf("%s: %+v", figure, v)
		}
	}
	if v := found["drain of a million, http, vs the best peer"]; v.Met != nil || v.Measured != "not measured" {
		t.Errorf("what was not measured: %+v", v)
	}
}

func TestRender(t *testing.T) {
	dir := t.TempDir()
	r := sample()
	r.Kill = &bench.DisruptReport{Victim: "n1", Timeline: []bench.TimelineStep{{Acknowledged: 5}, {Failed: 2}, {Acknowledged: 3}}}
	if err := render(r, dir, false); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "report.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"| tercet/http | 110 (100 … 120) |", "no result: it fell over", "leader-kill.svg", "throughput-by-concurrency.svg"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the report lacks %q", want)
		}
	}
	for _, name := range []string{"leader-kill.svg", "latency-clients-16.svg", "goals.json"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() == 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLinesAreSound(t *testing.T) {
	seen := map[string]bool{}
	systems := map[string]bool{}
	for _, s := range allSystems("bin") {
		systems[s.name()] = true
	}
	for _, s := range []shape{reportShape, smokeShape} {
		for _, l := range s.lines() {
			w := l.W
			w.Topic = "t"
			if l.Drain || l.HalfOf != "" {
				w.Duration = time.Second
			}
			if err := w.Validate(); err != nil {
				t.Errorf("%s: %v", l.Name, err)
			}
			if !s.counted && seen[l.Name] {
				t.Errorf("%s stands twice", l.Name)
			}
			seen[l.Name] = true
			for _, c := range l.Contenders {
				if !systems[c.System] {
					t.Errorf("%s: no system %s", l.Name, c.System)
				}
			}
		}
	}
	if _, err := selectLines(reportShape.lines(), []string{"no-such-line"}, false); err == nil {
		t.Error("a line that does not exist was selected")
	}
}

// TestValkeyGoals: every goal has a row with its mark, and a system that was not measured none.
func TestValkeyGoals(t *testing.T) {
	v := &valkeyResults{results: &results{At: time.Unix(0, 0)}}
	for _, l := range (valkeyShape{rounds: 1, one: 1, many: 1}).lines() {
		r := lineResult{line: l}
		for i, c := range l.Contenders {
			m := measurement{Contender: c, Round: 1, Workload: l.W, MessagesPerSecond: float64(500 - 300*i), AcknowledgedPerSecond: float64(500 - 300*i)}
			m.Publish = bench.Percentiles{Count: 1, P50: int64(300 + 100*i), P99: int64(900 - 100*i)}
			if l.Drain {
				m.Phase = "drain"
			}
			if l.W.Timed {
				m.EndToEnd = &bench.Percentiles{Count: 1, P50: 800, P99: 2000}
			}
			r.Measurements = append(r.Measurements, m)
		}
		v.Lines = append(v.Lines, r)
	}
	v.Goals = v.goals()
	// 12 XADD lines, 10 with two goals; two reads; two of the latency.
	if len(v.Goals) != 2+20+2+2 {
		t.Fatalf("%d goals", len(v.Goals))
	}
	met := map[string]bool{}
	for _, g := range v.Goals {
		met[g.Figure] = *g.Met
	}
	for figure, want := range map[string]bool{
		"XADD 1 KiB, 1 client, pipeline 1: p50":            true,
		"XADD 1 KiB, 256 clients, pipeline 1: throughput":  true,
		"XADD 1 KiB, 256 clients, pipeline 16: throughput": false,
		"XADD 100 B, 50 clients, pipeline 1: p99":          false,
		"XREADGROUP COUNT 1 + XACK, 50 consumers":          true,
	} {
		if got, ok := met[figure]; !ok || got != want {
			t.Errorf("%s: %t, %t", figure, got, ok)
		}
	}
	v.Raw = []rawFigure{{System: sysTercet, Args: "XADD", Rate: 1000}, {System: sysRedis, Args: "XADD", Error: "gone"}}
	for _, want := range []string{"| XADD 1 KiB, 50 clients, pipeline 16: throughput | ≥ 3 × | 2.50 × Redis | ✗ |", "0.80 ms", "| XADD | 1 000 | 0.00 | gone | – |"} {
		if !strings.Contains(v.markdown(), want) {
			t.Errorf("%q is not in\n%s", want, v.markdown())
		}
	}
}

func TestParseRedisBenchmark(t *testing.T) {
	rate, p50, err := parseRedisBenchmark("XADD k * f v: rps=0.0 (overall: nan) avg_msec=nan\rXADD k * body x: 13245.03 requests per second, p50=16.399 msec\n\n")
	if rate != 13245.03 || p50 != 16.399 || err != nil {
		t.Errorf("%v, %v, %v", rate, p50, err)
	}
	if _, _, err := parseRedisBenchmark("Could not connect"); err == nil {
		t.Error("nonsense is read")
	}
}
