package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"tercet.dev/tercet/bench"
)

// gatewayShape says how long the figures of the gateway take.
type gatewayShape struct {
	warmup, duration time.Duration
	rounds           int
	backlog          int64 // messages that are received and acknowledged
	requests         int   // of redis-benchmark
	entries          int64 // that a bridge copies
}

// gatewayBench measures what stands between an application and a real server, beside that server alone, in turn.
type gatewayBench struct {
	o      options
	s      gatewayShape
	host   *host
	dir    string
	tercet string
	began  time.Time
	rows   []verdict
	table  strings.Builder
}

// gatewayTable is `peers gateway`.
func gatewayTable(ctx context.Context, o options) error {
	s := gatewayShape{warmup: time.Second, duration: 4 * time.Second, rounds: 3, backlog: 20_000, requests: 1_000_000, entries: 400_000}
	if o.measure > 0 { // a trial
		s.duration, s.backlog, s.requests, s.entries = o.measure, 500, 2_000, 3_000
	}
	if o.warmup > 0 {
		s.warmup = o.warmup
	}
	if o.rounds > 0 {
		s.rounds = o.rounds
	}
	binary, err := which(filepath.Join(o.bin, "tercet"))
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(o.dir, "tercet-peers-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	g := &gatewayBench{o: o, s: s, host: newHost(), dir: dir, tercet: binary, began: time.Now()}
	defer g.host.close()
	err = errors.Join(g.operations(ctx), g.passThrough(ctx), g.bridge(ctx))
	if len(g.rows) == 0 {
		return err
	}
	text := g.markdown(ctx)
	fmt.Print(text)
	if failed := os.MkdirAll(o.out, 0o755); failed != nil {
		return errors.Join(err, failed)
	}
	doc, failed := json.MarshalIndent(g.rows, "", " ")
	return errors.Join(err, failed, os.WriteFile(filepath.Join(o.out, "gateway.md"), []byte(text), 0o644),
		os.WriteFile(filepath.Join(o.out, "gateway.json"), append(doc, '\n'), 0o644))
}

func (g *gatewayBench) note(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s %s\n", time.Since(g.began).Round(time.Second), fmt.Sprintf(format, args...))
}

// server starts a redis-server that keeps everything in memory: the cache as ElastiCache sells it by default.
func (g *gatewayBench) server(ctx context.Context, name string) (*process, string, error) {
	binary, err := which("redis-server")
	if err != nil {
		return nil, "", err
	}
	ports, err := freePorts(1)
	if err != nil {
		return nil, "", err
	}
	addr := loopback(ports[0])
	p, err := g.host.start(filepath.Join(g.dir, name), name, nil, binary, "--bind", "127.0.0.1", "--port", strconv.Itoa(ports[0]), "--save", "", "--appendonly", "no")
	if err != nil {
		return nil, "", err
	}
	return p, addr, p.await(ctx, "it answered", func() error {
		_, err := redisCommand(ctx, addr, "PING")
		return err
	})
}

// taken is one measurement of operations.
type taken struct {
	rate, p50, p99    float64 // messages a second, milliseconds
	server, inBetween float64 // microseconds of CPU a message
}

// measure runs a workload and reads the processes' CPU around the part that counts.
func (g *gatewayBench) measure(ctx context.Context, w bench.Workload, d prepared, server, between *process) (taken, *bench.Result, error) {
	var cpu [2][2]time.Duration
	read := func(at int) {
		for i, p := range []*process{server, between} {
			if p != nil {
				if u, err := bench.ReadProcess(p.pid()); err == nil {
					cpu[i][at] = u.CPU()
				}
			}
		}
	}
	r, err := drive(ctx, w, d, bench.Hooks{Begin: func() { read(0) }, End: func() { read(1) }})
	if err != nil {
		return taken{}, nil, err
	}
	h, n := r.Publish, r.Messages
	if w.Publishers == 0 {
		h, n = r.Receive, r.Acknowledged
	}
	if n == 0 {
		return taken{}, nil, fmt.Errorf("nothing was done; failed: %v", r.Failed)
	}
	per := func(i int) float64 { return float64((cpu[i][1] - cpu[i][0]).Microseconds()) / float64(n) }
	return taken{
		rate: float64(n) / r.Elapsed.Seconds(), p50: millis(h.Quantile(50).Microseconds()), p99: millis(h.Quantile(99).Microseconds()), server: per(0), inBetween: per(1),
	}, r, nil
}

// medianOf is the median of each figure by itself.
func medianOf(all []taken) taken {
	pick := func(f func(t taken) float64) float64 {
		var v []float64
		for _, t := range all {
			v = append(v, f(t))
		}
		return spreadOf(v).median
	}
	return taken{
		pick(func(t taken) float64 { return t.rate }), pick(func(t taken) float64 { return t.p50 }), pick(func(t taken) float64 { return t.p99 }),
		pick(func(t taken) float64 { return t.server }), pick(func(t taken) float64 { return t.inBetween }),
	}
}

// operations compares XADD, and XREADGROUP with XACK, with the same through the gateway.
func (g *gatewayBench) operations(ctx context.Context) error {
	server, addr, err := g.server(ctx, "upstream")
	if err != nil {
		return err
	}
	defer server.stop(0)
	ports, err := freePorts(1)
	if err != nil {
		return err
	}
	front := loopback(ports[0])
	gate, err := g.host.start(filepath.Join(g.dir, "gateway"), "gateway", nil, g.tercet, "gateway", "--upstream", addr, "--http", front)
	if err != nil {
		return err
	}
	defer gate.stop(time.Second)
	err = gate.await(ctx, "it was ready", func() error {
		resp, err := http.Get("http://" + front + "/readyz")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
	if err != nil {
		return err
	}
	g.table.WriteString("\n| operation | | p50 | p99 | messages/s | server, CPU a message | gateway, CPU a message |\n|---|---|---|---|---|---|---|\n")
	base := bench.Workload{Size: 1024, Batch: 1, Warmup: g.s.warmup, Duration: g.s.duration, Retention: time.Hour, Seed: 1}
	topic := 0
	for _, x := range []struct {
		name                           string
		publishers, consumers, perCall int
	}{{"publish, 1 client", 1, 0, 0}, {"publish, 16 clients", 16, 0, 0}, {"receive 10 and acknowledge, 16 clients", 0, 16, 10}} {
		var direct, through []taken
		for round := range g.s.rounds {
			for _, way := range []bool{round%2 == 0, round%2 != 0} { // they take turns at being first
				w := base
				w.Topic, w.Publishers = fmt.Sprintf("bench-%d", topic), x.publishers
				topic++
				if x.consumers > 0 {
					fill := base
					fill.Topic, fill.Publishers, fill.Batch, fill.Warmup, fill.Duration, fill.Messages = w.Topic, 8, 50, 0, 0, g.s.backlog
					w.Consumers, w.Group, w.ReceiveMax, w.Messages, w.Warmup, w.Duration = x.consumers, "g", x.perCall, g.s.backlog, 0, 0
					if _, err := redisCommand(ctx, addr, "XGROUP", "CREATE", w.Topic, "g", "0", "MKSTREAM"); err != nil {
						return err
					}
					var fillBy prepared = &bench.HTTPDriver{Addrs: []string{front}, Workload: fill}
					if way {
						fillBy = &bench.RESPDriver{Addrs: []string{addr}, Workload: fill}
					}
					if _, _, err := g.measure(ctx, fill, fillBy, nil, nil); err != nil {
						return fmt.Errorf("%s: backlog: %w", x.name, err)
					}
				}
				var t taken
				var err error
				if way {
					t, _, err = g.measure(ctx, w, &bench.RESPDriver{Addrs: []string{addr}, Workload: w}, server, nil)
					direct = append(direct, t)
				} else {
					t, _, err = g.measure(ctx, w, &bench.HTTPDriver{Addrs: []string{front}, Workload: w}, server, gate)
					through = append(through, t)
				}
				if err != nil {
					return fmt.Errorf("%s: %w", x.name, err)
				}
				g.note("%s, directly %v: p50 %.3f ms, %.0f/s", x.name, way, t.p50, t.rate)
				if _, err := redisCommand(ctx, addr, "FLUSHALL"); err != nil {
					return err
				}
				// The gateway's secret went with the rest; a gateway that was started later would make another.
			}
		}
		d, t := medianOf(direct), medianOf(through)
		for _, row := range []struct {
			name string
			t    taken
		}{{"directly", d}, {"gateway", t}} {
			fmt.Fprintf(&g.table, "| %s | %s | %.3f ms | %.3f ms | %s | %.1f µs | %.1f µs |\n", x.name, row.name, row.t.p50, row.t.p99,
				bench.FormatCount(row.t.rate), row.t.server, row.t.inBetween)
		}
		met := true // there is no goal but to know it
		g.rows = append(g.rows, verdict{"gateway: " + x.name + ", beside the same commands directly", "reported", fmt.Sprintf(
			"p50 %+.3f ms (%.3f), p99 %+.3f ms (%.3f), CPU of the gateway %.1f µs a message", t.p50-d.p50, t.p50, t.p99-d.p99, t.p99, t.inBetween), &met})
	}
	return nil
}

// passThrough compares redis-benchmark against a server with the same through a node that passes it on.
func (g *gatewayBench) passThrough(ctx context.Context) error {
	program, err := which("redis-benchmark")
	if err != nil {
		return err
	}
	server, addr, err := g.server(ctx, "cache")
	if err != nil {
		return err
	}
	defer server.stop(0)
	ports, err := freePorts(3)
	if err != nil {
		return err
	}
	front := loopback(ports[2])
	node, err := g.host.start(filepath.Join(g.dir, "node"), "node", []string{"TERCET_UPSTREAM=" + addr}, g.tercet, "server", "--node-id", "n1",
		"--data", filepath.Join(g.dir, "node", "data"), "--http", loopback(ports[0]), "--peer", loopback(ports[1]), "--valkey", front, "--upstream-except", "kept*")
	if err != nil {
		return err
	}
	defer node.stop(5 * time.Second)
	if err := node.await(ctx, "it served", func() error {
		_, err := redisCommand(ctx, front, "XADD", "kept-probe", "*", "a", "b")
		return err
	}); err != nil {
		return err
	}
	rates := map[string]map[string][]float64{}
	for round := range g.s.rounds {
		for i := range 2 {
			who, at := "directly", addr
			if (i+round)%2 == 1 {
				who, at = "passed on", front
			}
			found, err := pipelined(ctx, program, at, g.s.requests)
			if err != nil {
				return err
			}
			for name, rate := range found {
				if rates[name] == nil {
					rates[name] = map[string][]float64{}
				}
				rates[name][who] = append(rates[name][who], rate)
				g.note("redis-benchmark -P 16 -c 50 -t %s, %s: %.0f/s", name, who, rate)
			}
		}
	}
	for _, name := range []string{"SET", "GET"} {
		direct, passed := spreadOf(rates[name]["directly"]), spreadOf(rates[name]["passed on"])
		if direct.n == 0 || passed.n == 0 {
			return fmt.Errorf("redis-benchmark says nothing of %s: %v", name, rates)
		}
		lost := 100 * (1 - passed.median/direct.median)
		met := lost <= 25
		g.rows = append(g.rows, verdict{"pass-through: " + name + ", 50 clients, pipeline 16", "≤ 25 % of throughput lost", fmt.Sprintf("%.0f %%; %s/s directly, %s/s passed on",
			lost, direct.text(bench.FormatCount), passed.text(bench.FormatCount)), &met})
	}
	return nil
}

// pipelined runs redis-benchmark and returns requests a second by command.
func pipelined(ctx context.Context, program, addr string, requests int) (map[string]float64, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, program, "-h", host, "-p", port, "-P", "16", "-c", "50", "-n", strconv.Itoa(requests), "-d", "100", "-r", "10000",
		"-t", "set,get", "--csv").Output()
	if err != nil {
		return nil, fmt.Errorf("redis-benchmark: %w: %s", err, out)
	}
	rates := map[string]float64{}
	for line := range strings.Lines(string(out)) {
		parts := strings.Split(strings.TrimSpace(line), ",")
		if len(parts) < 2 {
			continue
		}
		if rate, err := strconv.ParseFloat(strings.Trim(parts[1], `"`), 64); err == nil {
			rates[strings.Trim(parts[0], `"`)] = rate
		}
	}
	return rates, nil
}

// bridge copies a stream from a server to three nodes, and to another server for comparison.
func (g *gatewayBench) bridge(ctx context.Context) error {
	source, from, err := g.server(ctx, "source")
	if err != nil {
		return err
	}
	defer source.stop(0)
	other, second, err := g.server(ctx, "second")
	if err != nil {
		return err
	}
	defer other.stop(0)
	nodes, err := tercet{as: sysTercet, binary: g.tercet, valkey: true}.start(ctx, g.host, filepath.Join(g.dir, "nodes"))
	if err != nil {
		return err
	}
	cluster := nodes.(*tercetCluster)
	defer cluster.stop()
	w := bench.Workload{Topic: "orders", Size: 1024, Batch: 100, Publishers: 8, Messages: g.s.entries, Retention: time.Hour, Seed: 1}
	if _, err := drive(ctx, w, &bench.RESPDriver{Addrs: []string{from}, Workload: w}, bench.Hooks{}); err != nil {
		return err
	}
	for _, x := range []struct {
		name, to, goal string
	}{{"three nodes, on the disks of all", strings.Join(cluster.valkey, ","), "≥ 50 000 entries/s"}, {"another server's memory", second, "for comparison"}} {
		var rates []float64
		for round := range min(2, g.s.rounds) {
			began := time.Now()
			cmd := exec.CommandContext(ctx, g.tercet, "bridge", "--from", from, "--to", x.to, "--stream", "orders", "--copy", fmt.Sprintf("copy%d", round), "--once")
			var said bytes.Buffer
			cmd.Stderr = &said
			if err := cmd.Run(); err != nil {
				return fmt.Errorf("tercet bridge: %w: %s", err, said.String())
			}
			rates = append(rates, float64(g.s.entries)/time.Since(began).Seconds())
			cpu := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
			g.note("bridge to %s: %.0f entries/s, %.1f µs of CPU an entry in the bridge", x.name, rates[round], float64(cpu.Microseconds())/float64(g.s.entries))
		}
		s := spreadOf(rates)
		met := s.median >= 50_000 || x.goal == "for comparison"
		g.rows = append(g.rows, verdict{"bridge: back-fill of " + bench.FormatCount(float64(g.s.entries)) + " entries of 1 KiB to " + x.name, x.goal,
			s.text(bench.FormatCount) + " entries/s, the start of the process included", &met})
	}
	return nil
}

func (g *gatewayBench) markdown(ctx context.Context) string {
	var b strings.Builder
	m := bench.ThisMachine(os.TempDir())
	fmt.Fprintf(&b, "# Gateway, bridge and pass-through\n\n%s, %s, in %s. %d × %s, Linux %s, %s; redis-server in memory, and everything on this machine. Medians of %d rounds in turn.\n\n",
		revision(ctx), g.began.UTC().Format("2006-01-02 15:04 UTC"), time.Since(g.began).Round(time.Second), m.CPUs, m.CPU, m.Kernel, m.Go, g.s.rounds)
	b.WriteString("| figure | goal | measured | |\n|---|---|---|---|\n")
	for _, v := range g.rows {
		mark := "✗"
		if *v.Met {
			mark = "✓"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", v.Figure, v.Goal, v.Measured, mark)
	}
	b.WriteString(g.table.String())
	b.WriteString("\n```sh\n" + strings.Join(append([]string{filepath.Base(os.Args[0])}, os.Args[1:]...), " ") + "\n```\n")
	return b.String()
}
