package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"tercet.dev/tercet/bench"
)

// valkeyBudget is the time after which crowded measurements of `peers valkey` are not repeated any more.
const valkeyBudget = 7 * time.Minute

// valkeyShape says how long the figures of the Valkey port take. Backlogs are messages that are received and acknowledged.
type valkeyShape struct {
	warmup, duration time.Duration
	rounds           int
	// one and many are the backlogs that are taken one by one and by the hundred.
	one, many int64
	// requests are those of redis-benchmark by one client at a time, without a pipeline.
	requests int
}

// xadd names the line of one size, number of clients and depth of the pipeline.
func xadd(size, clients, pipeline int) string {
	return fmt.Sprintf("xadd-%d-%d-p%d", size, clients, pipeline)
}

func xaddTitle(size, clients, pipeline int) string {
	who := "1 client"
	if clients > 1 {
		who = fmt.Sprintf("%d clients", clients)
	}
	return fmt.Sprintf("XADD %s, %s, pipeline %d", bench.FormatBytes(int64(size)), who, pipeline)
}

// The lines beside XADD's.
const (
	lineReadOne  = "read-1"
	lineReadMany = "read-100"
	lineLatency  = "add-to-read"
)

var (
	xaddSizes     = []int{1024, 100}
	xaddClients   = []int{1, 50, 256}
	xaddPipelines = []int{1, 16}
)

var (
	valkeyTercet = contender{sysTercet, wayRESP}
	valkeyRedis  = contender{sysRedis, wayNative}
)

// lines are what Tercet and Redis do in turn.
func (s valkeyShape) lines() []line {
	base := bench.Workload{Size: 1024, Batch: 1, Warmup: s.warmup, Duration: s.duration, Retention: time.Hour, Seed: 1}
	who := []contender{valkeyTercet, valkeyRedis}
	var all []line
	for _, size := range xaddSizes {
		for _, clients := range xaddClients {
			for _, pipeline := range xaddPipelines {
				l := line{Name: xadd(size, clients, pipeline), W: base, Contenders: who, Rounds: s.rounds}
				l.Title = xaddTitle(size, clients, pipeline)
				l.W.Size, l.W.Publishers, l.W.Batch = size, clients, pipeline
				all = append(all, l)
			}
		}
	}
	for _, x := range []struct {
		name             string
		consumers, count int
		backlog          int64
	}{{lineReadOne, 50, 1, s.one}, {lineReadMany, 16, 100, s.many}} {
		l := line{Name: x.name, W: base, Contenders: who, Rounds: s.rounds, Drain: true}
		l.Title = fmt.Sprintf("XREADGROUP COUNT %d + XACK, %d consumers", x.count, x.consumers)
		l.W.Publishers, l.W.Batch, l.W.Messages = 16, 100, x.backlog
		l.W.Consumers, l.W.Group, l.W.ReceiveMax = x.consumers, "g", x.count
		all = append(all, l)
	}
	l := line{Name: lineLatency, Title: "500 messages/s to blocked readers, from XADD to XREADGROUP", W: base, Contenders: who, Rounds: s.rounds}
	l.W.Publishers, l.W.Rate, l.W.Timed = 4, 500, true
	l.W.Consumers, l.W.Group, l.W.ReceiveMax = 4, "g", settleAt
	return append(all, l)
}

// A rawFigure is what redis-benchmark says of one server.
type rawFigure struct {
	System string  `json:"system"`
	Args   string  `json:"args"`
	Rate   float64 `json:"requestsPerSecond"`
	P50    float64 `json:"p50Milliseconds"`
	Error  string  `json:"error,omitempty"`
}

// valkeyResults is what `peers valkey` writes.
type valkeyResults struct {
	*results
	Raw   []rawFigure `json:"redisBenchmark"`
	Goals []verdict   `json:"goals"`
}

// valkeyTable is `peers valkey`: the goals of the Valkey port against Redis that waits for two replicas, both at it in turn.
func valkeyTable(ctx context.Context, o options) error {
	s := valkeyShape{warmup: time.Second, duration: 4 * time.Second, rounds: 2, one: 20_000, many: 300_000, requests: 5_000}
	if o.full {
		s.rounds = 4
	}
	if o.warmup > 0 {
		s.warmup = o.warmup
	}
	if o.measure > 0 {
		s.duration, s.one, s.many, s.requests = o.measure, 500, 2_000, 100 // a trial
	}
	if o.rounds > 0 {
		s.rounds = o.rounds
	}
	var names []string
	if o.lines != "" {
		names = strings.Split(o.lines, ",")
	}
	lines, err := selectLines(s.lines(), names, true)
	if err != nil {
		return err
	}
	var systems []system
	for _, sys := range allSystems(o.bin) {
		if sys.name() == sysTercet || sys.name() == sysRedis {
			systems = append(systems, sys)
		}
	}
	dir, err := os.MkdirTemp(o.dir, "tercet-peers-")
	if err != nil {
		return err
	}
	h := newHost()
	r := &runner{
		host: h, dir: dir, systems: systems, view: newView(os.Stderr), deadline: time.Now().Add(min(o.budget, valkeyBudget)),
		probe: 300 * time.Millisecond, clusters: map[string]cluster{}, skipped: map[string]string{},
		results: &results{
			Command: strings.Join(append([]string{filepath.Base(os.Args[0])}, os.Args[1:]...), " "), Version: revision(ctx),
			At: time.Now(), Machine: bench.ThisMachine(dir),
		},
	}
	defer r.removeData()
	defer h.close()
	v := &valkeyResults{results: r.results}
	err = r.run(ctx, lines)
	if err == nil && len(names) == 0 {
		v.Raw = r.redisBenchmark(ctx, s.requests)
	}
	r.stopAll()
	v.Took = time.Since(v.At)
	if len(v.Lines) == 0 {
		return err
	}
	v.Goals = v.goals()
	text := v.markdown()
	fmt.Print(text)
	if failed := os.MkdirAll(o.out, 0o755); failed != nil {
		return errors.Join(err, failed)
	}
	doc, failed := json.MarshalIndent(v, "", " ")
	return errors.Join(err, failed, os.WriteFile(filepath.Join(o.out, "valkey.md"), []byte(text), 0o644),
		os.WriteFile(filepath.Join(o.out, "valkey.json"), append(doc, '\n'), 0o644))
}

// redisBenchmark has the distribution's tool send XADD to the leader and to the master. It knows no WAIT: what Redis answers
// then is on one disk.
func (r *runner) redisBenchmark(ctx context.Context, requests int) []rawFigure {
	var all []rawFigure
	for _, size := range xaddSizes {
		for _, shape := range []struct{ clients, pipeline, times int }{{1, 1, 1}, {50, 1, 10}, {256, 1, 20}, {50, 16, 40}} {
			for _, name := range []string{sysTercet, sysRedis} {
				addr := ""
				switch c := r.clusters[name].(type) {
				case *tercetCluster:
					if i, err := c.leader(ctx); err == nil && c.noRESP == "" {
						addr = c.valkey[i]
					}
				case *redisCluster:
					addr = c.addrs[0]
				}
				if addr == "" {
					continue // left out, as the report says
				}
				f := runRedisBenchmark(ctx, addr, size, shape.clients, shape.pipeline, requests*shape.times)
				f.System = name
				r.view.note("redis-benchmark %s, %s: %.0f/s, p50 %.2f ms %s", f.Args, name, f.Rate, f.P50, f.Error)
				all = append(all, f)
			}
		}
	}
	return all
}

func runRedisBenchmark(ctx context.Context, addr string, size, clients, pipeline, requests int) rawFigure {
	f := rawFigure{Args: fmt.Sprintf("XADD %s, -c %d -P %d -n %d", bench.FormatBytes(int64(size)), clients, pipeline, requests)}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		f.Error = err.Error()
		return f
	}
	out, err := exec.CommandContext(ctx, "redis-benchmark", "-h", host, "-p", port, "-c", strconv.Itoa(clients), "-P", strconv.Itoa(pipeline),
		"-n", strconv.Itoa(requests), "-q", "XADD", "redis-benchmark", "*", respFieldName, strings.Repeat("x", size)).CombinedOutput()
	if err == nil {
		f.Rate, f.P50, err = parseRedisBenchmark(string(out))
	}
	if err != nil {
		f.Error = err.Error()
	}
	return f
}

// respFieldName is the field of an entry that holds the body.
const respFieldName = "body"

// parseRedisBenchmark reads the last line of -q: "XADD … : 12345.67 requests per second, p50=1.234 msec".
func parseRedisBenchmark(out string) (rate, p50 float64, err error) {
	before, after, ok := strings.Cut(out, " requests per second, p50=")
	if !ok {
		return 0, 0, fmt.Errorf("redis-benchmark says %.200q", out)
	}
	rate, err = strconv.ParseFloat(before[strings.LastIndexByte(before, ' ')+1:], 64)
	if err != nil {
		return 0, 0, err
	}
	text, _, _ := strings.Cut(after, " ")
	p50, err = strconv.ParseFloat(text, 64)
	return rate, p50, err
}

func p99Of(m *measurement) (float64, bool) { return float64(m.Publish.P99), m.Publish.Count > 0 }

// goals compares.
func (v *valkeyResults) goals() []verdict {
	var all []verdict
	compare := func(figure, name, phase string, f comparison, limit float64) {
		l, ok := v.line(name)
		if !ok {
			return // not asked for
		}
		s := spreadOf(l.ratios(valkeyTercet, valkeyRedis, phase, f.of))
		if s.n == 0 {
			all = append(all, verdict{Figure: figure, Goal: f.goal(limit), Measured: "not measured"})
			return
		}
		met := f.met(s.median, limit)
		all = append(all, verdict{figure, f.goal(limit), s.text(ratioText) + " × Redis", &met})
	}
	throughput, median, tail := comparison{rateOf, true}, comparison{p50Of, false}, comparison{p99Of, false}
	for _, size := range xaddSizes {
		for _, clients := range xaddClients {
			for _, pipeline := range xaddPipelines {
				name := xadd(size, clients, pipeline)
				figure := xaddTitle(size, clients, pipeline)
				if clients == 1 && pipeline == 1 {
					// One request after the other: the rate is the latency.
					compare(figure+": p50", name, "", median, 1)
					continue
				}
				compare(figure+": throughput", name, "", throughput, map[int]float64{1: 2, 16: 3}[pipeline])
				compare(figure+": p99", name, "", tail, 1)
			}
		}
	}
	compare("XREADGROUP COUNT 1 + XACK, 50 consumers", lineReadOne, "drain", throughput, 1.5)
	compare("XREADGROUP COUNT 100 + XACK, 16 consumers", lineReadMany, "drain", throughput, 1.5)
	if l, ok := v.line(lineLatency); ok {
		s := spreadOf(l.values(valkeyTercet, "", endToEndOf(p50)))
		row := verdict{Figure: "500 messages/s, from XADD to a blocked XREADGROUP: p50", Goal: "≤ 1 ms", Measured: "not measured"}
		if s.n > 0 {
			met := s.median <= 1000
			row.Met = &met
			row.Measured = s.text(func(us float64) string { return fmt.Sprintf("%.2f ms", us/1000) })
			if p, ok := l.probe(1); ok {
				row.Measured += fmt.Sprintf("; one sync of that minute %.2f ms", millis(p.Sync.P50))
			}
		}
		all = append(all, row)
		compare("the same vs Redis", lineLatency, "", comparison{endToEndOf(p50), false}, 1)
	}
	return all
}

// markdown is the report.
func (v *valkeyResults) markdown() string {
	var b strings.Builder
	m := v.Machine
	lost := 0.0
	for i := range v.Lines {
		for j := range v.Lines[i].Measurements {
			lost = max(lost, v.Lines[i].Measurements[j].LostCores)
		}
	}
	fmt.Fprintf(&b, "# The Valkey port's goals\n\n%s, %s, in %s. %d × %s, Linux %s, %s; three processes of each on one disk, in turn. At most %.2f CPUs were lost to other\nprograms and to the hypervisor during a measurement.\n\n",
		v.Version, v.At.UTC().Format("2006-01-02 15:04 UTC"), v.Took.Round(time.Second), m.CPUs, m.CPU, m.Kernel, m.Go, lost)
	for _, s := range v.Systems {
		if s.Skipped != "" {
			fmt.Fprintf(&b, "- %s: left out: %s\n", s.Name, s.Skipped)
			continue
		}
		fmt.Fprintf(&b, "- %s (%s): %s\n", s.Name, s.Version, s.Promise)
	}
	b.WriteString("\nA pipeline is one write of so many commands on a connection, and for Redis one `WAIT 2` behind them. Ratios are of neighbouring runs; in brackets the\nlowest and the highest of the rounds.\n\n| figure | goal | measured | |\n|---|---|---|---|\n")
	for _, g := range v.Goals {
		mark := ""
		if g.Met != nil {
			mark = map[bool]string{true: "✓", false: "✗"}[*g.Met]
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", g.Figure, g.Goal, g.Measured, mark)
	}
	b.WriteString("\n## Figures\n\nMedians of the rounds. p50 and p99 are of a request: of a whole pipeline; in the last line from `XADD` to the reader.\n\n| | Tercet/s | p50 ms | p99 ms | Redis/s | p50 ms | p99 ms |\n|---|---|---|---|---|---|---|\n")
	for i := range v.Lines {
		l := &v.Lines[i]
		phase, at50, at99 := "", figure(p50Of), figure(p99Of)
		switch {
		case l.Drain:
			phase = "drain"
			at50, at99 = receiveOf(p50), receiveOf(p99)
		case l.W.Timed:
			at50, at99 = endToEndOf(p50), endToEndOf(p99)
		}
		fmt.Fprintf(&b, "| %s |", l.Title)
		for _, c := range []contender{valkeyTercet, valkeyRedis} {
			rate := spreadOf(l.values(c, phase, rateOf))
			if rate.n == 0 {
				b.WriteString(" – | – | – |")
				continue
			}
			fmt.Fprintf(&b, " %s | %.2f | %.2f |", bench.FormatCount(rate.median), l.median(c, phase, at50)/1000, l.median(c, phase, at99)/1000)
		}
		b.WriteString("\n")
	}
	if len(v.Raw) > 0 {
		b.WriteString("\n## redis-benchmark\n\nThe distribution's tool, which knows no `WAIT`: what it counts is on three disks with Tercet and on one with Redis.\n\n| | Tercet/s | p50 ms | Redis/s | p50 ms |\n|---|---|---|---|---|\n")
		for i := 0; i+1 < len(v.Raw); i += 2 {
			fmt.Fprintf(&b, "| %s |", v.Raw[i].Args)
			for _, f := range v.Raw[i : i+2] {
				if f.Error != "" {
					fmt.Fprintf(&b, " %s | – |", f.Error)
					continue
				}
				fmt.Fprintf(&b, " %s | %.2f |", bench.FormatCount(f.Rate), f.P50)
			}
			b.WriteString("\n")
		}
	}
	for i := range v.Lines {
		for _, m := range v.Lines[i].Measurements {
			if m.Error != "" {
				fmt.Fprintf(&b, "\n%s, %s: %s\n", v.Lines[i].Name, m.Contender, m.Error)
			}
		}
	}
	fmt.Fprintf(&b, "\n```sh\n%s\n```\n", v.Command)
	return b.String()
}

// receiveOf reads the time of a receive.
func receiveOf(quantile func(bench.Percentiles) int64) figure {
	return func(m *measurement) (float64, bool) {
		if m.Receive == nil || m.Receive.Count == 0 {
			return 0, false
		}
		return float64(quantile(*m.Receive)), true
	}
}
