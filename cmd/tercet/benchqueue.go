package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/bench"
	"tercet.dev/tercet/internal/limits"
)

// queueFigure starts three servers, measures, and prints. The servers may push to this machine.
func (a *app) queueFigure(ctx context.Context, o *benchCluster, w bench.Workload, measure func(ctx context.Context, s *bench.Subject) (*bench.QueueReport, error)) error {
	if err := o.check(); err != nil {
		return err
	}
	binary, err := os.Executable()
	if err != nil {
		return err
	}
	ctx, cancel := a.interruptible(ctx)
	defer cancel()
	o.serverArgs = append([]string{"--push-allow=127.0.0.0/8"}, o.serverArgs...)
	s, stop, err := o.start(ctx, a, "tercet", binary, false)
	if err != nil {
		return ended(ctx, err)
	}
	defer stop()
	if err := bench.Fits(s.Dir, w, len(s.Nodes)); err != nil {
		return codedError{exitPrecondition, err}
	}
	r, err := measure(ctx, s)
	if err != nil {
		return ended(ctx, err)
	}
	r.Command, r.Version = commandLine(), version
	return a.print(r, r.Text)
}

func (a *app) benchPushCommand() *cobra.Command {
	var o campaignFlags
	var concurrencies []int
	cmd := &cobra.Command{
		Use:   "push",
		Short: "Have messages pushed, and report rates and the time from publish to callback",
		Long: `Publishes over HTTP and has the messages pushed to an endpoint in this process, which acknowledges each by its
receipt and answers. For each concurrency (the subscription's maxConcurrency) it does so as fast as it goes,
which gives the rate, and then at half of that, which gives the time from publish to callback.`,
		Example: examples(`
			tercet bench push
			tercet bench push --concurrency 16 --duration 30s
			tercet bench push --concurrency 1,256 --size 100 -o json`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Topic, o.Group, o.Consumers, o.ReceiveMax = "push", "g", 1, 1
			w, err := o.workload()
			if err != nil {
				return err
			}
			for _, c := range concurrencies {
				if c < 1 || c > 1024 {
					return usageError{fmt.Errorf("--concurrency %d: want 1 to 1024", c)}
				}
			}
			return a.queueFigure(cmd.Context(), &o.benchCluster, w, func(ctx context.Context, s *bench.Subject) (*bench.QueueReport, error) {
				return bench.Push(ctx, s, w, concurrencies, a.progress())
			})
		},
	}
	o.registerShape(cmd, 64, 1024, 1)
	o.register(cmd)
	f := cmd.Flags()
	f.IntSliceVar(&concurrencies, "concurrency", []int{1, 16, 256}, "pushes at once, one measurement after the other")
	f.DurationVar(&o.Duration, "duration", 5*time.Second, "how long each part is measured")
	f.DurationVar(&o.Warmup, "warmup", time.Second, "how long to publish before that")
	f.DurationVar(&o.Retention, "retention", 10*time.Minute, "retention of the messages")
	return cmd
}

func (a *app) benchKeysCommand() *cobra.Command {
	var o campaignFlags
	var live int64
	var pairs int
	cmd := &cobra.Command{
		Use:   "keys",
		Short: "Compare publishes with idempotency keys with publishes without",
		Long: `Publishes inside the leader's process, without and with an idempotency key for each message, in turn in one
run, and compares the rates: single messages, then batches of 100. --live messages with keys of their own are
published before and stay known meanwhile.`,
		Example: examples(`
			tercet bench keys
			tercet bench keys --live 10000000
			tercet bench keys --duration 10s --pairs 3 -o json`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Topic = "keys"
			w, err := o.workload()
			if err != nil {
				return err
			}
			if live < 0 || pairs < 1 {
				return usageError{errors.New("--live must not be negative, and --pairs at least 1")}
			}
			return a.queueFigure(cmd.Context(), &o.benchCluster, w, func(ctx context.Context, s *bench.Subject) (*bench.QueueReport, error) {
				return bench.Keys(ctx, s, w, live, pairs, a.progress())
			})
		},
	}
	o.registerShape(cmd, 256, 1024, 1)
	o.register(cmd)
	f := cmd.Flags()
	f.Int64Var(&live, "live", 0, "messages with keys that are published before")
	f.IntVar(&pairs, "pairs", 2, "measurements of each, in turn")
	f.DurationVar(&o.Duration, "duration", 4*time.Second, "how long each part is measured")
	f.DurationVar(&o.Warmup, "warmup", time.Second, "how long to publish before that")
	f.DurationVar(&o.Retention, "retention", limits.RetentionMin, "retention of the messages that are measured")
	return cmd
}

func (a *app) benchDelayedCommand() *cobra.Command {
	var o campaignFlags
	within := time.Minute
	cmd := &cobra.Command{
		Use:   "delayed",
		Short: "Have many delayed messages fall due, and report how late consumers get them",
		Long: `Publishes messages that fall due evenly within a time, beginning 10 s after the last one was published, and
reports how long after that moment consumers inside the leader's process have them, and what memory the
nodes take.`,
		Example: examples(`
			tercet bench delayed
			tercet bench delayed --messages 10000 --within 5s
			tercet bench delayed --messages 1000000 --within 1m -o json`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Topic, o.Group, o.ReceiveMax, o.Retention = "delayed", "g", limits.ReceiveMessagesMax, time.Hour
			w, err := o.workload()
			if err != nil {
				return err
			}
			if within < time.Second || w.Messages < 1 {
				return usageError{errors.New("want --messages of at least 1 and --within of at least 1s")}
			}
			return a.queueFigure(cmd.Context(), &o.benchCluster, w, func(ctx context.Context, s *bench.Subject) (*bench.QueueReport, error) {
				return bench.Delayed(ctx, s, w, within, a.progress())
			})
		},
	}
	o.registerShape(cmd, 16, 100, 100)
	o.register(cmd)
	f := cmd.Flags()
	f.Int64Var(&o.Messages, "messages", 1_000_000, "how many messages")
	f.IntVar(&o.Consumers, "consumers", 64, "consumers that receive and acknowledge them")
	f.DurationVar(&within, "within", within, "time within which they fall due")
	return cmd
}

func (a *app) benchLargeCommand() *cobra.Command {
	var o benchCluster
	size := byteSize(100 << 20)
	var rounds int
	cmd := &cobra.Command{
		Use:   "large",
		Short: "Send and receive one large message after the other",
		Long: `Sends a large message over HTTP, receives it, compares it, acknowledges it, and reports how long sending and
receiving take and what memory the nodes need for it.`,
		Example: examples(`
			tercet bench large
			tercet bench large --size 8MiB --rounds 20
			tercet bench large --rounds 10 -o json`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if size < 1 || int64(size) > limits.LargeMessageBytesMax || rounds < 1 {
				return usageError{fmt.Errorf("want --size of 1 byte to %s, and --rounds of at least 1", bench.FormatBytes(limits.LargeMessageBytesMax))}
			}
			w := bench.Workload{Publishers: 1, Messages: int64(rounds), Size: int(size)}
			return a.queueFigure(cmd.Context(), &o, w, func(ctx context.Context, s *bench.Subject) (*bench.QueueReport, error) {
				return bench.Large(ctx, s, int64(size), rounds)
			})
		},
	}
	o.register(cmd)
	cmd.Flags().Var(&size, "size", "size of the message")
	cmd.Flags().IntVar(&rounds, "rounds", 5, "how many messages")
	return cmd
}
