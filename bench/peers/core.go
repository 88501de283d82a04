package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"tercet.dev/tercet/bench"
)

// core runs `tercet bench` for the goals of the core, one after the other, and writes them as a table.
type core struct {
	o      options
	tercet string
	base   string
	began  time.Time
	rows   []verdict
	// lost is the most CPUs that any of the runs lost to others.
	lost     float64
	commands []string
}

// coreBudget is what the whole table may take. The number of messages of the long campaigns follows from it.
const coreBudget = 10 * time.Minute

// coreTable is `peers core`.
func coreTable(ctx context.Context, o options) error {
	bin, err := filepath.Abs(o.bin)
	if err != nil {
		return err
	}
	c := &core{o: o, tercet: filepath.Join(bin, "tercet"), base: filepath.Join(bin, "tercet-baseline"), began: time.Now()}
	failed := errors.Join(c.latency(ctx), c.throughput(ctx), c.kills(ctx), c.campaigns(ctx))
	if len(c.rows) == 0 {
		return failed
	}
	text := c.markdown(ctx, "The core's goals")
	fmt.Print(text)
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	table, err := json.MarshalIndent(c.rows, "", " ")
	if err != nil {
		return err
	}
	return errors.Join(failed, os.WriteFile(filepath.Join(o.out, "core.md"), []byte(text), 0o644),
		os.WriteFile(filepath.Join(o.out, "core.json"), append(table, '\n'), 0o644))
}

// run runs one command of tercet bench and reads what it prints.
func (c *core) run(ctx context.Context, into any, args ...string) error {
	args = append([]string{"bench"}, args...)
	if c.o.dir != "" {
		args = append(args, "--dir", c.o.dir)
	}
	line := strings.ReplaceAll("tercet "+strings.Join(args, " "), c.base, "bin/"+filepath.Base(c.base)) // whoever repeats it has it there
	c.commands = append(c.commands, line)
	fmt.Fprintf(os.Stderr, "%s %s\n", time.Since(c.began).Round(time.Second), line)
	cmd := exec.CommandContext(ctx, c.tercet, append(args, "-o", "json")...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) } // it has servers to stop
	cmd.WaitDelay = 10 * time.Second
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if len(out) > 0 {
		// A campaign that found something wrong prints what it found and fails.
		if parsed := json.Unmarshal(out, into); parsed != nil {
			return fmt.Errorf("%s: %w", line, parsed)
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", line, err, strings.TrimSpace(errOut.String()))
	}
	return nil
}

func (c *core) publish(ctx context.Context, args ...string) (*bench.Report, error) {
	var r bench.Report
	args = append([]string{"publish", "--duration", c.duration().String(), "--warmup", c.warmup(args).String(), "--size", "1024"}, args...)
	if err := c.run(ctx, &r, args...); err != nil {
		return nil, err
	}
	if r.CPU != nil {
		c.lost = max(c.lost, r.CPU.LostCores())
	}
	return &r, nil
}

func (c *core) duration() time.Duration {
	if c.o.measure > 0 {
		return c.o.measure
	}
	return 5 * time.Second
}

// warmup is how long a run goes on before it counts. A new log fills each segment once before it writes to it; what counts
// for throughput is a log that has come to use its segments again.
func (c *core) warmup(args []string) time.Duration {
	if c.o.measure > 0 || slices.Contains(args, "--emulate-sync") {
		return time.Second
	}
	return 8 * time.Second
}

func (c *core) row(met bool, figure, goal, format string, args ...any) {
	c.rows = append(c.rows, verdict{figure, goal, fmt.Sprintf(format, args...), &met})
}

// latency is one publisher in the leader's process, on this disk and on slower ones.
func (c *core) latency(ctx context.Context) error {
	for _, delay := range []string{"0s", "1ms", "5ms"} {
		r, err := c.publish(ctx, "--via", "leader", "--publishers", "1", "--emulate-sync", delay)
		if err != nil {
			return err
		}
		sync := r.Probes[0].Sync.P50
		above := float64(r.AboveSyncMicros) / 1000
		figure := "p50 publish, 1 publisher in the leader's process, all zones"
		if delay != "0s" {
			figure = "the same, each sync " + delay + " longer: one sync in the path, not two"
		}
		c.row(above <= 0.5, figure, "≤ 1.0 f + 0.5 ms", "%.2f ms; f = %.2f ms, so 1.0 f %+.2f ms", millis(r.Latency.P50), millis(sync), above)
	}
	return nil
}

func (c *core) throughput(ctx context.Context) error {
	var pairs struct {
		Runs  []*bench.Report
		Pairs []bench.Pair
	}
	if err := c.run(ctx, &pairs, "publish", "--duration", c.duration().String(), "--warmup", c.warmup(nil).String(), "--size", "1024", "--via", "leader",
		"--publishers", "256", "--baseline", "--baseline-binary", c.base, "--pairs", "2"); err != nil {
		return err
	}
	var rates, raw, ratios []float64
	var leader *bench.Report
	for _, r := range pairs.Runs {
		c.lost = max(c.lost, r.CPU.LostCores())
		if r.Variant == "tercet" {
			rates, raw, leader = append(rates, r.MessagesPerSecond), append(raw, 100*r.OfRaw), r
		}
	}
	for _, p := range pairs.Pairs {
		ratios = append(ratios, p.Throughput)
	}
	share, ratio, alone := spreadOf(raw), spreadOf(ratios), spreadOf(rates)
	percent := func(x float64) string { return fmt.Sprintf("%.0f %%", x) }
	c.row(share.median >= 35, "throughput, 256 publishers × 1 KiB in the leader's process, vs the raw three-stream syncs", "≥ 35 %",
		"%s; %s messages/s, %.1f µs of CPU a node", share.text(percent), alone.text(bench.FormatCount), leader.NodeMicrosPerMessage)
	c.row(ratio.median >= 1.5, "the same vs the same engine on hashicorp/raft-wal", "≥ 1.5 ×", "%s", ratio.text(ratioText))

	http, err := c.publish(ctx, "--publishers", "256")
	if err != nil {
		return err
	}
	efficiency := 100 * leader.ServerMicrosPerMessage / http.ServerMicrosPerMessage
	c.row(efficiency >= 40, "the same over HTTP, one message a request: CPU efficiency of the servers", "≥ 40 % of in-cluster",
		"%.0f %%; %s messages/s, %.1f µs of CPU a node, %.1f the client", efficiency, bench.FormatCount(http.MessagesPerSecond),
		http.NodeMicrosPerMessage, http.ClientMicrosPerMessage)
	batch, err := c.publish(ctx, "--publishers", "16", "--batch", "100")
	if err != nil {
		return err
	}
	c.row(batch.MessagesPerSecond >= 50_000, "batch publish over HTTP, 16 clients × 100 × 1 KiB", "≥ 50 000 messages/s", "%s; %.1f µs of CPU a node",
		bench.FormatCount(batch.MessagesPerSecond), batch.NodeMicrosPerMessage)
	both, err := c.publish(ctx, "--via", "leader", "--publishers", "256", "--consumers", "16")
	if err != nil {
		return err
	}
	done := min(both.MessagesPerSecond, both.AcknowledgedPerSecond)
	of := 100 * done / alone.median
	c.row(of >= 60, "publish + receive + ack, 16 consumers, vs publish alone", "≥ 60 %", "%.0f %%; %s published and %s acknowledged a second",
		of, bench.FormatCount(both.MessagesPerSecond), bench.FormatCount(both.AcknowledgedPerSecond))
	return nil
}

func (c *core) kills(ctx context.Context) error {
	for _, k := range []struct {
		whom, figure, goal string
		gap                time.Duration
	}{
		{"leader", "kill -9 the leader under load", "resumes in ≤ 2.5 s, nothing lost", 2500 * time.Millisecond},
		{"term-leader", "SIGTERM to the leader under load", "≤ 0.5 s, no failed request", 500 * time.Millisecond},
		{"follower", "kill -9 a follower under load", "≤ 0.5 s", 500 * time.Millisecond},
		{"pause-leader", "SIGSTOP the leader for 10 s", "resumes in ≤ 3.5 s", 3500 * time.Millisecond},
	} {
		var r bench.DisruptReport
		err := c.run(ctx, &r, "publish", "--kill", k.whom, "--rate", "3000")
		if r.Victim == "" {
			return err
		}
		failures := int64(0)
		for code, n := range r.Failed {
			if code != "not_leader" && code != "no_leader" {
				failures += n
			}
		}
		met := r.Gap <= k.gap && r.Balance.Lost == 0 && r.Equal && (k.whom != "term-leader" || failures == 0)
		c.row(met, k.figure, k.goal, "%d ms without an acknowledgement by the others; %d of %s lost, %d failed through them; replicas equal: %t",
			r.Gap.Milliseconds(), r.Balance.Lost, bench.FormatCount(float64(r.Balance.Acknowledged)), failures, r.Equal)
	}
	return nil
}

// Rates below which the campaigns are not expected to fall, in messages a second: filling and draining.
const (
	fillGuess  = 100_000
	drainGuess = 40_000
)

// campaigns are the long ones: a backlog, and receives behind acknowledged messages.
func (c *core) campaigns(ctx context.Context) error {
	messages := int64(10_000_000)
	if c.o.measure > 0 {
		messages = 100_000
	}
	if left := coreBudget - time.Since(c.began) - time.Minute; !c.o.full && messages > 100_000 {
		// Both campaigns fill, one of them drains.
		fit := left.Seconds() / (2.0/fillGuess + 1.0/drainGuess)
		messages = max(1_000_000, min(messages, int64(fit)/1_000_000*1_000_000))
	}
	n := fmt.Sprint(messages)
	of := bench.FormatCount(float64(messages))
	var backlog bench.BacklogReport
	if err := c.run(ctx, &backlog, "backlog", "--messages", n); err != nil {
		return err
	}
	var rss int64
	var ready time.Duration
	for _, node := range backlog.Nodes {
		rss, ready = max(rss, node.RSS, node.RSSRestarted), max(ready, node.Ready)
	}
	c.row(rss <= 1<<30, "memory of a node with a backlog of "+of+" messages of 100 B", "≤ 1 GiB (10 million)", "%s", bench.FormatBytes(rss))
	c.row(ready <= 10*time.Second, "start after kill -9 with that backlog", "≤ 10 s", "%.2f s", ready.Seconds())
	var drained bench.DrainedReport
	if err := c.run(ctx, &drained, "drained", "--messages", n); err != nil {
		return err
	}
	c.row(drained.Ratio <= 1.1, "receive with "+of+" acknowledged messages before the cursor", "≤ 1.1 × empty (10 million)",
		"%.2f × (%.2f and %.2f ms)", drained.Ratio, millis(drained.Drained.P50), millis(drained.Empty.P50))
	return nil
}

func (c *core) markdown(ctx context.Context, title string) string {
	var b strings.Builder
	m := bench.ThisMachine(os.TempDir())
	fmt.Fprintf(&b, "# %s\n\n%s, %s, in %s. %d × %s, Linux %s, %s; three processes and one disk. At most %.2f CPUs were lost to other programs\nand to the hypervisor during a throughput run.\n\n",
		title, revision(ctx), c.began.UTC().Format("2006-01-02 15:04 UTC"), time.Since(c.began).Round(time.Second), m.CPUs, m.CPU, m.Kernel, m.Go, c.lost)
	b.WriteString("| figure | goal | measured | |\n|---|---|---|---|\n")
	for _, v := range c.rows {
		mark := ""
		if v.Met != nil {
			if mark = "✗"; *v.Met {
				mark = "✓"
			}
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", v.Figure, v.Goal, v.Measured, mark)
	}
	b.WriteString("\n```sh\n" + strings.Join(c.commands, "\n") + "\n```\n")
	return b.String()
}
