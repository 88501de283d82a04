package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"tercet.dev/tercet/bench"
)

// queueTable is `peers queue`: the figures of the queue's own semantics, by `tercet bench`, as a table.
func queueTable(ctx context.Context, o options) error {
	bin, err := filepath.Abs(o.bin)
	if err != nil {
		return err
	}
	q := &queueFigures{core{o: o, tercet: filepath.Join(bin, "tercet"), began: time.Now()}}
	failed := errors.Join(q.push(ctx), q.large(ctx), q.keys(ctx), q.fanOut(ctx), q.topics(ctx), q.delayed(ctx))
	if len(q.rows) == 0 {
		return failed
	}
	text := q.markdown(ctx, "The queue's figures")
	fmt.Print(text)
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	table, err := json.MarshalIndent(q.rows, "", " ")
	if err != nil {
		return err
	}
	return errors.Join(failed, os.WriteFile(filepath.Join(o.out, "queue.md"), []byte(text), 0o644),
		os.WriteFile(filepath.Join(o.out, "queue.json"), append(table, '\n'), 0o644))
}

// queueFigures are measured as those of the core are.
type queueFigures struct{ core }

// figure runs a command that prints a bench.QueueReport.
func (q *queueFigures) figure(ctx context.Context, args ...string) (*bench.QueueReport, error) {
	var r bench.QueueReport
	if err := q.run(ctx, &r, args...); err != nil {
		return nil, err
	}
	for _, row := range r.Rows {
		for code, n := range row.Failed {
			fmt.Fprintf(os.Stderr, "%s: %d requests failed with %s\n", row.Name, n, code)
		}
	}
	return &r, nil
}

// told adds a row for which there is no goal.
func (q *queueFigures) told(figure, format string, args ...any) {
	q.rows = append(q.rows, verdict{Figure: figure, Goal: "–", Measured: fmt.Sprintf(format, args...)})
}

// few is a count for a trial, or the one for the table.
func (q *queueFigures) few(trial, table int64) string {
	if q.o.measure > 0 {
		return fmt.Sprint(trial)
	}
	return fmt.Sprint(table)
}

func (q *queueFigures) push(ctx context.Context) error {
	r, err := q.figure(ctx, "push", "--concurrency", "1,16,256", "--duration", q.duration().String())
	if err != nil {
		return err
	}
	for i := 0; i+1 < len(r.Rows); i += 2 {
		fast, half := r.Rows[i], r.Rows[i+1]
		q.told(fmt.Sprintf("push of 1 KiB, %s at once", []string{"1", "16", "256"}[i/2]), "%s/s; at half of that publish to callback %.2f ms at p50, %.2f ms at p99",
			bench.FormatCount(fast.PerSecond), millis(half.Latency.P50), millis(half.Latency.P99))
	}
	return nil
}

func (q *queueFigures) large(ctx context.Context) error {
	size := int64(100 << 20)
	if q.o.measure > 0 {
		size = 4 << 20
	}
	r, err := q.figure(ctx, "large", "--size", fmt.Sprint(size), "--rounds", q.few(1, 5))
	if err != nil {
		return err
	}
	rate := func(us int64) string { return bench.FormatBytes(int64(float64(size)/(float64(us)/1e6))) + "/s" }
	send, receive, both := r.Rows[0].Latency.P50, r.Rows[1].Latency.P50, r.Rows[2].Latency.P50
	q.told("message of "+bench.FormatBytes(size)+", there and back", "%.2f s: sent in %.2f s (%s), received in %.2f s (%s)",
		float64(both)/1e6, float64(send)/1e6, rate(send), float64(receive)/1e6, rate(receive))
	q.row(r.Added <= 128<<20, "memory of a node above idle meanwhile", "≤ 128 MiB", "%s", bench.FormatBytes(r.Added))
	return nil
}

func (q *queueFigures) keys(ctx context.Context) error {
	live := q.few(10_000, 1_000_000)
	if q.o.full {
		live = "10000000"
	}
	r, err := q.figure(ctx, "keys", "--live", live, "--duration", q.duration().String())
	if err != nil {
		return err
	}
	known := bench.FormatCount(float64(r.Rows[0].Messages)) + " live keys"
	for i, goal := range []int{15, 40} {
		without, with := r.Rows[1+2*i], r.Rows[2+2*i]
		cost := 100 * (1 - with.Ratio)
		what := "single messages"
		if i == 1 {
			what = "batches of 100"
		}
		q.row(cost <= float64(goal), "cost of an idempotency key, "+what+", "+known, fmt.Sprintf("≤ %d %% of throughput", goal), "%.0f %%; %s/s without, %s/s with",
			cost, bench.FormatCount(without.PerSecond), bench.FormatCount(with.PerSecond))
	}
	q.told("memory of a node with them", "%s at most, %s when empty", bench.FormatBytes(r.Peak), bench.FormatBytes(r.Idle))
	return nil
}

func (q *queueFigures) delayed(ctx context.Context) error {
	within := time.Minute
	if q.o.measure > 0 {
		within = 2 * time.Second
	}
	r, err := q.figure(ctx, "delayed", "--messages", q.few(2000, 1_000_000), "--within", within.String())
	if err != nil {
		return err
	}
	row := r.Rows[0]
	q.told(fmt.Sprintf("%s delayed messages falling due within %s", bench.FormatCount(float64(row.Messages)), within), "late by %.2f ms at p50, %.2f ms at p99; memory of a node %s at most",
		millis(row.Latency.P50), millis(row.Latency.P99), bench.FormatBytes(r.Peak))
	return nil
}

func (q *queueFigures) fanOut(ctx context.Context) error {
	for _, groups := range []string{"1", "10", "100"} {
		r, err := q.publish(ctx, "--via", "leader", "--publishers", "16", "--groups", groups, "--consumers", "100", "--retention", "10m")
		if err != nil {
			return err
		}
		q.told("fan-out to "+groups+" groups, 16 publishers in the leader's process", "%s published and %s acknowledged a second; receive %.2f ms at p50",
			bench.FormatCount(r.MessagesPerSecond), bench.FormatCount(r.AcknowledgedPerSecond), millis(r.ReceiveLatency.P50))
	}
	return nil
}

func (q *queueFigures) topics(ctx context.Context) error {
	var rates [2]float64
	for i, topics := range []string{"1", "10000"} {
		r, err := q.publish(ctx, "--via", "leader", "--publishers", "256", "--topics", topics)
		if err != nil {
			return err
		}
		rates[i] = r.MessagesPerSecond
	}
	q.told("10 000 topics with traffic, 256 publishers in the leader's process", "%s messages/s, %.2f × those of one topic", bench.FormatCount(rates[1]), rates[1]/rates[0])
	r, err := q.publish(ctx, "--via", "leader", "--publishers", "16", "--topics", q.few(100, 10_000), "--consumers", q.few(100, 10_000), "--rate", q.few(100, 1000), "--end-to-end")
	if err != nil {
		return err
	}
	q.told("the same, 1 000 messages a second and a waiting consumer at each topic", "publish to consumer %.2f ms at p50, %.2f ms at p99", millis(r.EndToEndLatency.P50), millis(r.EndToEndLatency.P99))
	return nil
}
