package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"tercet.dev/tercet/compat/gateway"
	"tercet.dev/tercet/compat/gateway/bridge"
)

// bridgeOptions are the flags of `tercet bridge` and `tercet bridge migrate`.
type bridgeOptions struct {
	upstreamOptions
	from, to, stream, copy string
	source, receiving      gateway.Target // what from and to mean
	once, noGroups         bool
	metrics                string
	logFormat, logLevel    string
}

func (o *bridgeOptions) register(f *pflag.FlagSet) {
	o.upstreamOptions.register(f)
	f.StringVar(&o.from, "from", "", "`address` of the source (required)")
	f.StringVar(&o.to, "to", "localhost:6379", "`address` of the receiving side: Valkey ports of a Tercet cluster (a:6379,b:6379,c:6379), or a real server for the way back")
	f.StringVar(&o.stream, "stream", "", "`name` of the source's stream (required)")
	f.StringVar(&o.copy, "copy", "", "`name` of the receiving stream (default: the same)")
	f.BoolVar(&o.noGroups, "no-groups", false, "leave the state of consumer groups out")
	f.StringVar(&o.metrics, "metrics", "", "loopback `address` that answers /metrics (default: none)")
	f.StringVar(&o.logFormat, "log-format", "text", "`format` of the log: text or json")
	f.StringVar(&o.logLevel, "log-level", "warn", "lowest `level` that is logged: trace, debug, info, warn or error")
}

func (a *app) bridgeCommand() *cobra.Command {
	var o bridgeOptions
	cmd := &cobra.Command{
		Use:     "bridge",
		Short:   "Keep a stream in step with a stream on another server",
		GroupID: groupRun,
		Long: `Copies a stream from one server to another over the Valkey protocol, and follows it: from a real ElastiCache to a
Tercet cluster, or the other way round. Entries keep their IDs. The place up to which the copy is complete is stored
on the receiving side in the same transaction as the entries, so a bridge that was killed goes on exactly there.
Positions, consumers and pending entries of consumer groups are carried along every few seconds.

--iam-… flags are about the side whose address is rediss://.`,
		Example: examples(`
			tercet bridge --from rediss://app:secret@master.orders.use1.cache.amazonaws.com:6379 --to localhost:6379 --stream orders
			tercet bridge --from node1:6379,node2:6379,node3:6379 --to rediss://app:secret@master.orders.use1.cache.amazonaws.com:6379 --stream orders
			tercet bridge --from localhost:6380 --to localhost:6379 --stream orders --once
			tercet bridge migrate --from rediss://app:secret@master.orders.use1.cache.amazonaws.com:6379 --stream orders`),
		Args:        cobra.NoArgs,
		Annotations: map[string]string{annotationCommandLine: "all"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.bridge(cmd.Context(), &o, func(ctx context.Context, b *bridge.Bridge, _ *bridgeView) error {
				return stopped(ctx, b.Run(ctx, !o.once))
			})
		},
	}
	o.register(cmd.Flags())
	cmd.Flags().BoolVar(&o.once, "once", false, "stop when nothing is missing instead of following")
	cmd.AddCommand(a.migrateCommand())
	return cmd
}

// bridge opens a bridge, shows its progress, and runs it.
func (a *app) bridge(ctx context.Context, o *bridgeOptions, run func(context.Context, *bridge.Bridge, *bridgeView) error) error {
	if o.from == "" || o.stream == "" {
		return usageError{errors.New("--from and --stream are required")}
	}
	log, err := (&serverOptions{logFormat: o.logFormat, logLevel: o.logLevel}).logger(os.Stderr)
	if err != nil {
		return usageError{err}
	}
	if o.source, err = o.side(ctx, "--from", o.from); err != nil {
		return err
	}
	if o.receiving, err = o.side(ctx, "--to", o.to); err != nil {
		return err
	}
	ctx, stop := a.untilSignal(ctx, log)
	defer stop()
	shown := a.newBridgeView(o)
	defer shown.end()
	if o.metrics != "" {
		closeMetrics, err := shown.serve(ctx, o.metrics)
		if err != nil {
			return err
		}
		defer closeMetrics()
	}
	b, err := bridge.Open(ctx, bridge.Options{
		From: o.source, To: o.receiving, Stream: o.stream, Copy: o.copy, Groups: !o.noGroups, Progress: shown.tell, Logger: log,
	})
	if err != nil {
		return codedError{exitPrecondition, err}
	}
	defer b.Close()
	return run(ctx, b, shown)
}

// early is the error of a migration that ended before its copy was complete.
func early(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errStopped) {
		return errors.New("stopped before the copy was complete; the same command goes on where this one was")
	}
	return err
}

// stopped is the error of something that ran under ctx: none if it was the user who ended it.
func stopped(ctx context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(ctx), errStopped) {
		return nil
	}
	return err
}

// side is one end's target. The IAM flags are for the encrypted one.
func (o *bridgeOptions) side(ctx context.Context, flag, addr string) (t gateway.Target, err error) {
	u := o.upstreamOptions
	if !strings.HasPrefix(addr, "rediss://") && !strings.HasPrefix(addr, "valkeys://") {
		u.iamCache, u.ca = "", ""
	}
	return u.target(ctx, flag, addr)
}

// bridgeView shows progress on a terminal, as lines elsewhere, and as metrics.
type bridgeView struct {
	a        *app
	live     bool
	last     time.Time
	drawn    bool
	untold   *bridge.Progress // the newest that was not shown, for it came too soon after another
	registry *prometheus.Registry
	copied   prometheus.Gauge
	lag      prometheus.Gauge
	rate     prometheus.Gauge
}

func (a *app) newBridgeView(o *bridgeOptions) *bridgeView {
	f, ok := a.err.(*os.File)
	v := &bridgeView{a: a, live: ok && term.IsTerminal(int(f.Fd())), registry: prometheus.NewRegistry()}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: prometheus.Labels{"stream": o.stream}})
		v.registry.MustRegister(g)
		return g
	}
	v.copied = gauge("tercet_bridge_copied_entries", "Entries copied, in all runs.")
	v.lag = gauge("tercet_bridge_lag_entries", "Entries known to be missing on the receiving side; -1 when not known.")
	v.rate = gauge("tercet_bridge_entries_per_second", "Entries copied per second in this run.")
	return v
}

func (v *bridgeView) serve(ctx context.Context, addr string) (func(), error) {
	if err := checkAddress(addr, false, false); err != nil {
		return nil, usageError{fmt.Errorf("--metrics: %w", err)}
	}
	ls, err := listenAs(ctx, "--metrics", addr)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(v.registry, promhttp.HandlerOpts{}))
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	for _, l := range ls {
		go func() { _ = s.Serve(l) }()
	}
	return func() { _ = s.Close() }, nil
}

const barWidth = 24

func (v *bridgeView) tell(p bridge.Progress) {
	v.copied.Set(float64(p.Copied))
	v.lag.Set(float64(p.Lag))
	v.rate.Set(p.Rate)
	v.untold = &p
	every := 5 * time.Second
	if v.live {
		every = 100 * time.Millisecond
	}
	if time.Since(v.last) >= every {
		v.show(p)
	}
}

func (v *bridgeView) show(p bridge.Progress) {
	v.last, v.untold = time.Now(), nil
	done := barWidth
	if p.Total > 0 {
		done = int(min(int64(barWidth)*p.Copied/p.Total, barWidth))
	}
	state := "copying"
	if p.Following {
		state = "following"
	}
	line := fmt.Sprintf("%s [%s%s] %d of %d entries, %d behind, %.0f/s, at %s",
		state, strings.Repeat("#", done), strings.Repeat(".", barWidth-done), p.Copied, p.Total, p.Lag, p.Rate, p.Position)
	if v.live {
		fmt.Fprintf(v.a.err, "\r\x1b[K%s", line)
		v.drawn = true
		return
	}
	v.a.note("%s", line)
}

// end shows where it ended, and leaves the terminal on a line of its own.
func (v *bridgeView) end() {
	if v.untold != nil {
		v.show(*v.untold)
	}
	if v.drawn {
		fmt.Fprintln(v.a.err)
		v.drawn = false
	}
}

// migrated is what `tercet bridge migrate -o json` prints after a comparison.
type migrated struct {
	Stream    string `json:"stream"`
	Position  string `json:"position"`
	Source    int64  `json:"sourceEntries"`
	Copy      int64  `json:"copyEntries"`
	Missing   int64  `json:"missing"`
	Foreign   int64  `json:"foreign"`
	Different int64  `json:"different"`
	Deleted   int64  `json:"deletedSince"`
	First     string `json:"firstDifference,omitempty"`
	Checksum  string `json:"checksum"`
	Equal     bool   `json:"equal"`
}

func (m migrated) text(w io.Writer) (err error) {
	switch {
	case !m.Equal:
		_, err = fmt.Fprintf(w, "different: source %d, copy %d entries up to %s; %d missing, %d foreign, %d different; the first at %s\n",
			m.Source, m.Copy, m.Position, m.Missing, m.Foreign, m.Different, m.First)
	case m.Position == "0-0":
		_, err = fmt.Fprintln(w, "nothing to compare: no entry was copied yet")
	default:
		deleted := ""
		if m.Deleted > 0 {
			deleted = fmt.Sprintf("; the copy has %d more that the source has deleted since", m.Deleted)
		}
		_, err = fmt.Fprintf(w, "equal: %d entries up to %s, checksum %s%s\n", m.Source, m.Position, m.Checksum, deleted)
	}
	return err
}

func (a *app) migrateCommand() *cobra.Command {
	var o bridgeOptions
	var verifyOnly bool
	cmd := &cobra.Command{
		Use:   "migrate",
		Short: "Move a stream: back-fill, compare, say when to switch, follow until the switch",
		Long: `Back-fills the stream, follows it until nothing is missing, compares every entry on both sides by count and
checksum, and says when to switch the clients. It goes on following until you stop the clients and interrupt it
(Ctrl-C): it copies what is left, carries the groups' state over a last time, compares what came since, and says that
the clients can be started at the receiving side. That pause takes a few seconds, however long the stream is.

What the source deletes or trims after it was copied stays in the copy; the comparison counts it and goes on.

The way back is the same command with --from and --to exchanged: entries written since the switch are copied back.`,
		Example: examples(`
			tercet bridge migrate --from rediss://app:secret@master.orders.use1.cache.amazonaws.com:6379 --stream orders
			tercet bridge migrate --from localhost:6379 --to rediss://app:secret@master.orders.use1.cache.amazonaws.com:6379 --stream orders
			tercet bridge migrate --from localhost:6380 --to localhost:6379 --stream orders --verify-only -o json`),
		Args:        cobra.NoArgs,
		Annotations: map[string]string{annotationCommandLine: "all"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.bridge(cmd.Context(), &o, func(ctx context.Context, b *bridge.Bridge, shown *bridgeView) error {
				if verifyOnly {
					_, err := a.compare(ctx, b, &o, bridge.Comparison{})
					return err
				}
				a.note("back-filling %s", o.stream)
				if err := b.Run(ctx, false); err != nil {
					return early(ctx, err)
				}
				shown.end()
				c, err := a.compare(ctx, b, &o, bridge.Comparison{})
				if err != nil {
					return early(ctx, err)
				}
				a.note("The copy is complete and follows the source. To switch: stop the clients of %s, producers and consumers; then press Ctrl-C.", o.source)
				a.note("What is left is copied and compared then, in the time that a few entries take, and you start the clients at %s.", o.receiving)
				if err := b.Run(ctx, true); stopped(ctx, err) != nil {
					return err
				}
				rest, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Minute)
				defer cancel()
				shown.end()
				a.note("copying what is left")
				if err := b.Run(rest, false); err != nil {
					return err
				}
				shown.end()
				if _, err := a.compare(rest, b, &o, c); err != nil {
					return err
				}
				a.note("Done: start the clients at %s. The way back: the same command with --from and --to exchanged.", o.receiving)
				return nil
			})
		},
	}
	o.register(cmd.Flags())
	cmd.Flags().BoolVar(&verifyOnly, "verify-only", false, "compare what was copied so far, and copy nothing")
	return cmd
}

// compare compares both sides and prints what it found. A difference fails the command.
func (a *app) compare(ctx context.Context, b *bridge.Bridge, o *bridgeOptions, since bridge.Comparison) (bridge.Comparison, error) {
	next := time.Now().Add(2 * time.Second)
	c, err := b.Verify(ctx, since, func(n int64) {
		if time.Now().After(next) {
			next = time.Now().Add(2 * time.Second)
			a.note("compared %d entries", n)
		}
	})
	if err != nil {
		return c, err
	}
	m := migrated{
		Stream: o.stream, Position: c.Position, Source: c.Source, Copy: c.Copy, Missing: c.Missing, Foreign: c.Foreign,
		Different: c.Different, Deleted: c.Deleted, First: c.FirstDifference, Checksum: fmt.Sprintf("%016x", c.Sum), Equal: c.Equal(),
	}
	err = a.print(m, m.text)
	if err == nil && !m.Equal {
		err = codedError{exitPrecondition, errors.New("the copy is not the source: copy into another stream (--copy NAME), or delete the copy first")}
	}
	return c, err
}
