package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tercet.dev/tercet/compat/gateway"
	"tercet.dev/tercet/server"
)

// upstreamOptions are the flags that say where an upstream is and how to log in.
type upstreamOptions struct {
	ca, mode                     string
	iamCache, iamUser, iamRegion string
	iamServerless                bool
}

func (o *upstreamOptions) register(f *pflag.FlagSet) {
	f.StringVar(&o.ca, "upstream-ca", "", "`file` of certificates to trust besides the system's, for rediss://")
	f.StringVar(&o.mode, "upstream-mode", "auto", "how the upstream is addressed: auto, single or cluster")
	f.StringVar(&o.iamCache, "iam-cache", "", "log in by AWS IAM: `name` of the replication group or serverless cache")
	f.StringVar(&o.iamUser, "iam-user", "", "ElastiCache `user` for --iam-cache")
	f.StringVar(&o.iamRegion, "iam-region", "", "AWS `region` of the cache (default: AWS_REGION)")
	f.BoolVar(&o.iamServerless, "iam-serverless", false, "the cache is a serverless one")
}

// target reads an upstream address under the options.
func (o *upstreamOptions) target(ctx context.Context, flag, addr string) (gateway.Target, error) {
	t, err := gateway.ParseTarget(addr, o.ca)
	if err != nil {
		return t, usageError{fmt.Errorf("%s: %w", flag, err)}
	}
	switch t.Mode = gateway.Mode(o.mode); t.Mode {
	case gateway.Auto, gateway.Single, gateway.Cluster:
	default:
		return t, usageError{fmt.Errorf("--upstream-mode %q: want auto, single or cluster", o.mode)}
	}
	if o.iamCache == "" {
		return t, nil
	}
	switch {
	case o.iamUser == "":
		return t, usageError{errors.New("--iam-cache needs --iam-user")}
	case t.TLS == nil:
		return t, usageError{errors.New("--iam-cache needs TLS: write rediss://")}
	case t.Password != "":
		return t, usageError{errors.New("--iam-cache makes the password: leave it out of the address")}
	}
	t.IAM, err = gateway.NewIAM(ctx, o.iamCache, o.iamUser, o.iamRegion, o.iamServerless)
	return t, err
}

// gatewayOptions are the flags of `tercet gateway`.
type gatewayOptions struct {
	upstreamOptions
	upstream, http      string
	reader, az          string
	publicHosts         []string
	waitReplicas        int
	waitFsync           bool
	multiAZLog          bool
	waitTimeout         time.Duration
	requireDurability   string
	consumer            string
	maxDeliveries       int
	park, insecure      bool
	logFormat, logLevel string
	security            securityOptions
	contact             contactOptions
}

// defaultUpstream is where the contact-form template looks, and the port every server listens on.
const defaultUpstream = "localhost:6379"

func (o *gatewayOptions) register(f *pflag.FlagSet) {
	o.upstreamOptions.register(f)
	f.StringVar(&o.upstream, "upstream", "", "`address` of the upstream: rediss://user:password@host:port (default: VALKEY_ENDPOINT, or "+defaultUpstream+")")
	o.registerWorth(f)
	f.StringVar(&o.http, "http", defaultHTTP, "HTTP `address`; without a host 127.0.0.1 and ::1")
	f.StringSliceVar(&o.publicHosts, "public-host", nil, "host `names`, besides addresses and localhost, that requests may be addressed to")
	f.StringVar(&o.consumer, "consumer", "tercet", "`name` under which leases stand in pending entries lists")
	f.IntVar(&o.maxDeliveries, "max-deliveries", 0, "give a message to a group this often at most; 0 is no limit")
	f.BoolVar(&o.park, "park", false, "keep what reached --max-deliveries as dead letters instead of dropping it for the group")
	o.contact.register(f)
	f.BoolVar(&o.insecure, "insecure", false, "allow addresses that others can reach although there is no authentication")
	f.StringVar(&o.logFormat, "log-format", "text", "`format` of the log: text or json")
	f.StringVar(&o.logLevel, "log-level", "info", "lowest `level` that is logged: trace, debug, info, warn or error")
	o.security.register(f)
	f.StringVar(&o.security.config, "config", "", "YAML `file` with the same names as keys; flags and environment come first")
}

func (o *gatewayOptions) registerWorth(f *pflag.FlagSet) {
	f.IntVar(&o.waitReplicas, "wait-replicas", 0, "replicas that must hold a message before its publisher is told (WAIT)")
	f.BoolVar(&o.waitFsync, "wait-fsync", false, "and have it on disk, the primary included (WAITAOF)")
	f.BoolVar(&o.multiAZLog, "multi-az-log", false, "declare that ElastiCache's synchronous durability option is on; refused where that cannot be")
	f.DurationVar(&o.waitTimeout, "wait-timeout", 5*time.Second, "how long to wait for replicas before the outcome is unknown")
	f.StringVar(&o.reader, "upstream-reader", "", "`addresses`, host:port,…, of the reader endpoint or of replicas: peeks, which may be a moment old, are answered there")
	f.StringVar(&o.az, "az", "", "availability `zone` whose replicas answer peeks if they can; with cluster mode disabled it needs --upstream-reader")
	f.StringVar(&o.requireDurability, "require-durability", "memory", "refuse to start below this `level`: memory, replicas=N, fsync=N or multi-az-log")
}

func (o *gatewayOptions) worth() (gateway.Worth, gateway.Level, error) {
	w := gateway.Worth{Replicas: o.waitReplicas, Fsync: o.waitFsync, MultiAZLog: o.multiAZLog, Timeout: o.waitTimeout}
	if o.waitReplicas < 0 {
		return w, gateway.Level{}, usageError{errors.New("--wait-replicas is negative")}
	}
	level, err := gateway.ParseLevel(o.requireDurability)
	if err != nil {
		return w, level, usageError{fmt.Errorf("--require-durability: %w", err)}
	}
	return w, level, nil
}

func (o *gatewayOptions) reading() (gateway.Reading, error) {
	r, err := gateway.ParseReading(o.reader, o.az)
	if err != nil {
		return r, usageError{fmt.Errorf("--upstream-reader: %w", err)}
	}
	return r, nil
}

// address is where the upstream is: the flag, the template's variable, the default.
func (a *app) upstreamAddress(given string) string {
	if given != "" {
		return given
	}
	if v, ok := a.getenv("VALKEY_ENDPOINT"); ok && v != "" {
		return v
	}
	return defaultUpstream
}

func (a *app) gatewayCommand() *cobra.Command {
	var o gatewayOptions
	cmd := &cobra.Command{
		Use:     "gateway",
		Short:   "Serve the queue protocol on streams in ElastiCache, Valkey or Redis",
		GroupID: groupRun,
		Long: `Serves the queue protocol (send, receive, acknowledge, extend, by id, keys, delays, groups) with streams of an
upstream as the store; no Tercet cluster is needed. A gateway keeps no state of its own: run as many as you like.

A publish is worth what the upstream gives, and each answer says it (Tercet-Durability): memory, replicas=N
(--wait-replicas N), fsync=N (--wait-fsync), or multi-az-log (--multi-az-log). --require-durability refuses to
start below a level. "tercet gateway test" looks at an upstream and says what it found.`,
		Example: examples(`
			tercet gateway --upstream localhost:6379
			tercet gateway --upstream rediss://app:secret@master.orders.use1.cache.amazonaws.com:6379 --wait-replicas 1
			tercet gateway --upstream rediss://orders.serverless.use1.cache.amazonaws.com:6379 --iam-cache orders --iam-user app --iam-serverless
			tercet gateway test rediss://app:secret@master.orders.use1.cache.amazonaws.com:6379`),
		Args:        cobra.NoArgs,
		Annotations: map[string]string{annotationNode: "all"},
		RunE:        func(cmd *cobra.Command, _ []string) error { return a.gateway(cmd.Context(), &o) },
	}
	o.register(cmd.Flags())
	cmd.AddCommand(a.gatewayTestCommand())
	return cmd
}

// gateway runs a gateway until a signal.
func (a *app) gateway(ctx context.Context, o *gatewayOptions) error {
	log, err := (&serverOptions{logFormat: o.logFormat, logLevel: o.logLevel}).logger(os.Stderr)
	if err != nil {
		return usageError{err}
	}
	o.security.alone = true
	if err := o.security.check(); err != nil {
		return usageError{err}
	}
	if err := checkAddress(o.http, o.security.authenticated(), o.insecure); err != nil {
		return usageError{fmt.Errorf("--http: %w", err)}
	}
	worth, level, err := o.worth()
	if err != nil {
		return err
	}
	target, err := o.target(ctx, "--upstream", a.upstreamAddress(o.upstream))
	if err != nil {
		return err
	}
	reading, err := o.reading()
	if err != nil {
		return err
	}
	ctx, stop := a.untilSignal(ctx, log)
	defer stop()
	listeners, err := listenAs(ctx, "--http", o.http)
	if err != nil {
		return err
	}
	defer closeAll(listeners)
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	secured, err := o.security.open(log, registry)
	if err != nil {
		return err
	}
	defer secured.stop()
	g, err := gateway.Open(ctx, gateway.Options{
		Target: target, Worth: worth, Reading: reading, Require: level, Consumer: o.consumer, MaxDeliveries: o.maxDeliveries, Park: o.park,
		Version: version, Logger: log, Registerer: registry,
	})
	if err != nil {
		return codedError{exitPrecondition, err}
	}
	defer g.Close()
	report := g.Report()
	log.Info("starting", "version", version, "http", o.http, "upstream", target.String(), "server", report.Server+" "+report.Version,
		"mode", report.Mode, "durability", report.Level, "pid", os.Getpid())
	for _, remark := range report.Remarks {
		log.Warn(remark)
	}
	srv, err := server.New(server.Options{
		Backend: g, Version: version, Logger: log.Named("http"), Registerer: registry, Gatherer: registry, PublicHosts: o.publicHosts,
		Contact: g.Contact(o.contact.options()),
		Worth:   report.Level.String(), Authorizer: secured.tokens, TLS: secured.tls,
	})
	if err != nil {
		return err
	}
	failed := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { failed <- srv.Serve(l) }()
	}
	notifySystemd("READY=1")
	select {
	case <-ctx.Done():
	case err := <-failed:
		return fmt.Errorf("HTTP server: %w", err)
	}
	notifySystemd("STOPPING=1")
	g.Drain()
	ctx, cancel := context.WithTimeout(context.Background(), shutdownPatience)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		log.Warn("some requests were cut off", "error", err)
	}
	log.Info("stopped")
	return nil
}

// untilSignal returns a context that a first signal ends; a second one ends the process.
func (a *app) untilSignal(ctx context.Context, log hclog.Logger) (context.Context, func()) {
	ctx, stop := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	go func() {
		select {
		case s := <-a.signals:
			log.Info("stopping", "signal", s)
			stop(errStopped)
		case <-ended:
			return
		}
		select {
		case s := <-a.signals:
			log.Warn("stopping at once", "signal", s)
			os.Exit(exitFailure)
		case <-ended:
		}
	}()
	return ctx, func() {
		close(ended)
		stop(nil)
	}
}

// probed is what `tercet gateway test -o json` prints.
type probed struct {
	Upstream        string                 `json:"upstream"`
	Server          string                 `json:"server"`
	Version         string                 `json:"version"`
	Mode            string                 `json:"mode"`
	Role            string                 `json:"role"`
	Replicas        int                    `json:"replicas"`
	AppendOnly      bool                   `json:"appendOnly"`
	Fsync           string                 `json:"fsync,omitempty"`
	MaxMemoryPolicy string                 `json:"maxMemoryPolicy,omitempty"`
	TLS             bool                   `json:"tls"`
	User            string                 `json:"user,omitempty"`
	Refused         []string               `json:"refused"`
	LatencyMicros   int64                  `json:"latencyMicros"`
	Durability      string                 `json:"durability"`
	Readers         []gateway.ReaderReport `json:"readers,omitempty"`
	Problems        []string               `json:"problems"`
	Remarks         []string               `json:"remarks"`
}

func (a *app) gatewayTestCommand() *cobra.Command {
	var o gatewayOptions
	cmd := &cobra.Command{
		Use:   "test [ADDRESS]",
		Short: "Look at an upstream and say what it gives and what is missing",
		Long: `Connects as "tercet gateway" would with the same flags, and prints version, mode, replicas, durability, rights and
latency, and for all that is missing how to get it. It changes nothing. It exits with 4 if the gateway would not start.`,
		Example: examples(`
			tercet gateway test localhost:6379
			tercet gateway test rediss://app:secret@master.orders.use1.cache.amazonaws.com:6379 --wait-replicas 2 --require-durability replicas=2
			tercet gateway test rediss://orders.serverless.use1.cache.amazonaws.com:6379 --iam-cache orders --iam-user app --iam-serverless -o json`),
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			addr := a.upstreamAddress(strings.Join(args, ""))
			worth, level, err := o.worth()
			if err != nil {
				return err
			}
			reading, err := o.reading()
			if err != nil {
				return err
			}
			target, err := o.target(cmd.Context(), "ADDRESS", addr)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 20*time.Second)
			defer cancel()
			r, err := gateway.Probe(ctx, target, worth, reading)
			if err != nil {
				return codedError{exitUnavailable, err}
			}
			refusal := r.Allows(level)
			p := probed{
				Upstream: target.String(), Server: r.Server, Version: r.Version, Mode: string(r.Mode), Role: r.Role, Replicas: r.Replicas,
				AppendOnly: r.AppendOnly, Fsync: r.Fsync, MaxMemoryPolicy: r.MaxMemoryPolicy, TLS: r.TLS,
				LatencyMicros: r.Latency.Microseconds(), Durability: r.Level.String(), User: r.User, Refused: append([]string{}, r.Refused...),
				Readers: r.Readers, Problems: []string{}, Remarks: []string{},
			}
			p.Problems, p.Remarks = append(p.Problems, r.Problems...), append(p.Remarks, r.Remarks...)
			if err := a.print(p, p.text); err != nil {
				return err
			}
			if refusal != nil {
				return codedError{exitPrecondition, refusal}
			}
			return nil
		},
	}
	o.upstreamOptions.register(cmd.Flags())
	o.registerWorth(cmd.Flags())
	return cmd
}

func (p probed) text(w io.Writer) error {
	orUnknown := func(s string) string {
		if s == "" {
			return "not readable"
		}
		return s
	}
	yes := func(b bool) string {
		if b {
			return "yes"
		}
		return "no"
	}
	role := func(s string) string {
		switch s {
		case "master":
			return "primary"
		case "slave":
			return "replica"
		}
		return orUnknown(s)
	}
	file := yes(p.AppendOnly)
	if p.AppendOnly {
		file += ", synced " + orUnknown(p.Fsync)
	}
	worth := p.Durability
	if len(p.Problems) > 0 {
		worth += ", once nothing is missing"
	}
	rights := "every command that is needed is allowed"
	if len(p.Refused) > 0 {
		rights = "not allowed: " + strings.Join(p.Refused, ", ")
	}
	rows := [][]string{
		{"upstream", p.Upstream},
		{"server", p.Server + " " + p.Version},
		{"mode", p.Mode + ", " + role(p.Role)},
		{"replicas connected", fmt.Sprint(p.Replicas)},
		{"append-only file", file},
		{"eviction", orUnknown(p.MaxMemoryPolicy)},
		{"TLS", yes(p.TLS)},
		{"user", orUnknown(p.User) + ", " + rights},
		{"round trip", (time.Duration(p.LatencyMicros) * time.Microsecond).String()},
		{"a publish is worth", worth},
	}
	for _, r := range p.Readers {
		what := "does not answer"
		if r.Role != "" {
			what = role(r.Role) + ", zone " + orUnknown(r.Zone)
		}
		rows = append(rows, []string{"peeks are answered by", r.Addr + ", " + what})
	}
	if err := table(w, rows); err != nil {
		return err
	}
	for _, s := range p.Problems {
		fmt.Fprintln(w, "missing:", s)
	}
	for _, s := range p.Remarks {
		fmt.Fprintln(w, "note:", s)
	}
	return nil
}
