package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"golang.org/x/term"

	"tercet.dev/tercet/bench"
	"tercet.dev/tercet/cmd/tercet/internal/local"
	"tercet.dev/tercet/internal/limits"
)

func (a *app) benchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "bench",
		Short:   "Measure a cluster and the disk under it",
		GroupID: groupDiagnose,
		Long: `Measures a cluster and the disk under it. Every figure comes with what the disk could do in the same
minute and with the CPU time that others took meanwhile. docs/benchmarks.md says what each one means.`,
		Example: examples(`
			tercet bench publish --via leader --publishers 256 --size 1024
			tercet bench publish --kill leader
			tercet bench disk`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.benchPublishCommand(), a.benchDiskCommand(), a.benchBacklogCommand(), a.benchDrainedCommand(),
		a.benchExpiryCommand(), a.benchDurabilityCommand(), a.benchPushCommand(), a.benchLargeCommand(), a.benchKeysCommand(), a.benchDelayedCommand())
	return cmd
}

// benchCluster are the flags of the servers that a bench starts.
type benchCluster struct {
	dir        string
	durability string
	delay      time.Duration
	serverArgs []string
	keep       bool
}

func (o *benchCluster) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.dir, "dir", "", "`directory` for the servers' data, on the disk to measure (default: the temporary directory)")
	f.StringVar(&o.durability, "durability", "in-sync", "the servers' durability: in-sync or all")
	f.DurationVar(&o.delay, "emulate-sync", 0, "make every sync of the servers' logs take this much longer")
	f.StringSliceVar(&o.serverArgs, "server-arg", nil, "a further `argument` for the servers, for instance --memory=256MiB")
	f.BoolVar(&o.keep, "keep", false, "leave data and logs behind and say where")
}

func (o *benchCluster) check() error {
	if o.durability != "in-sync" && o.durability != "all" {
		return usageError{fmt.Errorf("--durability %q: want in-sync or all", o.durability)}
	}
	return nil
}

// start starts three servers of the binary and waits until all zones are in sync.
func (o *benchCluster) start(ctx context.Context, a *app, variant, binary string, restart bool) (*bench.Subject, func(), error) {
	dir, err := os.MkdirTemp(o.dir, "tercet-bench-")
	if err != nil {
		return nil, nil, err
	}
	s, stop, err := o.startIn(ctx, dir, variant, binary, restart, func(int) {})
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(dir))
	}
	return s, func() { stop(); o.discard(a, dir) }, nil
}

// discard removes the servers' data, or says where it is.
func (o *benchCluster) discard(a *app, dir string) {
	if o.keep {
		fmt.Fprintf(a.err, "data and logs of the servers are in %s\n", dir)
		return
	}
	_ = os.RemoveAll(dir) // what cannot be removed stays in the temporary directory
}

// startIn starts them in a directory, which stays. before is called before each start of a server.
func (o *benchCluster) startIn(ctx context.Context, dir, variant, binary string, restart bool, before func(i int)) (*bench.Subject, func(), error) {
	var err error
	var endpoints, valkey [3]string
	for i := range endpoints {
		var failed error
		endpoints[i], err = freeLoopbackAddress()
		if variant == "tercet" {
			valkey[i], failed = freeLoopbackAddress()
		}
		if err := errors.Join(err, failed); err != nil {
			return nil, nil, err
		}
	}
	cluster, err := local.Start(local.Options{
		Binary: binary, Data: dir, Restart: restart,
		Args: func(i int) []string {
			before(i)
			args := []string{"--bench-listen", endpoints[i], "--durability", o.durability}
			if o.delay > 0 {
				args = append(args, "--emulate-sync", o.delay.String())
			}
			if valkey[i] != "" {
				args = append(args, "--valkey", valkey[i])
			}
			return append(args, o.serverArgs...)
		},
	})
	if err != nil {
		return nil, nil, fromLocal(err)
	}
	stop := func() {
		cluster.Kill() // the data is of no more use
		cluster.Stop()
	}
	wait, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := cluster.WaitInSync(wait); err != nil {
		stop()
		return nil, nil, fromLocal(err)
	}
	s := &bench.Subject{
		Variant: variant, Dir: dir, Delay: o.delay,
		Pids: func() map[string]int {
			pids := map[string]int{}
			for i, pid := range cluster.Pids() {
				if pid != 0 {
					pids[cluster.Nodes[i].ID] = pid
				}
			}
			return pids
		},
	}
	for i, n := range cluster.Nodes {
		s.Nodes = append(s.Nodes, bench.SubjectNode{
			ID: n.ID, HTTP: strings.TrimPrefix(n.HTTP, "http://"), RESP: valkey[i], Endpoint: endpoints[i], Data: filepath.Join(dir, n.ID),
		})
	}
	return s, stop, nil
}

// freeLoopbackAddress returns an address that nobody listens on at the moment.
func freeLoopbackAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// ended prefers the reason for which a context ended to the error that this led to.
func ended(ctx context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(ctx), errInterrupted) {
		return errInterrupted
	}
	return err
}

// progress shows a line on a terminal that the next one overwrites, and nothing elsewhere.
func (a *app) progress() func(published, acknowledged int64) {
	f, ok := a.err.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	var last int64
	return func(published, acknowledged int64) {
		now := published + acknowledged
		fmt.Fprintf(f, "\r\x1b[K%s published, %s acknowledged (%s a second)\r", bench.FormatCount(float64(published)),
			bench.FormatCount(float64(acknowledged)), bench.FormatCount(float64(now-last)))
		last = now
	}
}

// benchServer are the hidden flags by which `tercet bench` looks into the servers it starts.
type benchServer struct {
	listen   string
	delay    time.Duration
	majority bool
}

func (o *benchServer) register(f *pflag.FlagSet) {
	f.StringVar(&o.listen, "bench-listen", "", "loopback `address` of the load generator inside this process")
	f.DurationVar(&o.delay, "emulate-sync", 0, "make every sync of the log take this much longer")
	f.BoolVar(&o.majority, "bench-majority", false, "acknowledge publishes when a majority has them on disk, to measure what the third zone costs")
	for _, name := range []string{"bench-listen", "emulate-sync", "bench-majority"} {
		_ = f.MarkHidden(name) // fails for unknown names only
	}
}

// open opens the endpoint if it was asked for. The returned function closes it.
func (o *benchServer) open(node bench.Node, log hclog.Logger) (func(), error) {
	if o.delay > 0 {
		log.Warn("--emulate-sync: every sync of the log takes longer than it has to", "by", o.delay)
	}
	if o.majority {
		log.Warn("--bench-majority: publishes are acknowledged although one zone may not have them")
	}
	if o.listen == "" {
		return func() {}, nil
	}
	endpoint, err := bench.Listen(o.listen, node)
	if err != nil {
		return nil, codedError{exitPrecondition, fmt.Errorf("--bench-listen: %w", err)}
	}
	log.Warn("--bench-listen: whoever can connect to this address can generate load and take profiles", "address", endpoint.Addr())
	return func() { endpoint.Close() }, nil
}

// commandLine is what was typed, for reports.
func commandLine() string {
	args := slices.Clone(os.Args)
	if len(args) > 0 {
		args[0] = filepath.Base(args[0])
	}
	return strings.Join(args, " ")
}

// workloadFlags are the flags of what is published.
type workloadFlags struct {
	bench.Workload
	size  byteSize
	sizes []string
}

func (o *workloadFlags) registerShape(cmd *cobra.Command, publishers, size, batch int) {
	o.size = byteSize(size)
	f := cmd.Flags()
	f.IntVar(&o.Publishers, "publishers", publishers, "publishers, each with one request in flight")
	f.Var(&o.size, "size", "size of a message's body")
	f.IntVar(&o.Batch, "batch", batch, "messages in a request, up to 100")
}

func (o *workloadFlags) workload() (bench.Workload, error) {
	w := o.Workload
	w.Size = int(o.size)
	for _, text := range o.sizes {
		var size byteSize
		if err := size.Set(text); err != nil {
			return w, usageError{fmt.Errorf("--mixed-sizes %w", err)}
		}
		w.Sizes = append(w.Sizes, int(size))
	}
	if err := w.Validate(); err != nil {
		return w, usageError{err}
	}
	return w, nil
}

// publishFlags are the flags of `tercet bench publish`.
type publishFlags struct {
	benchCluster
	workloadFlags
	via, format, kill string
	servers           []string
	token             string
	spread            bool
	probe             time.Duration
	baseline          bool
	baselineBinary    string
	pairs             int
	profile           string
}

func (a *app) benchPublishCommand() *cobra.Command {
	var o publishFlags
	cmd := &cobra.Command{
		Use:   "publish",
		Short: "Publish, and report rates, latencies, CPU time and the disk",
		Long: `Starts three servers of its own in a temporary directory (or uses those of --server), publishes to
them, and reports rates, latencies, CPU time, and what the disk could do in the same minute. The messages
have 60 s retention; a run that would not fit the disk is refused.

--via leader runs the publishers inside the leader's process: the replicated queue without HTTP. Without
--rate each publisher waits for its acknowledgement before it sends again; with it a message's latency
counts from the moment it was due, so that a stall is charged to all messages it held up.

--kill publishes to all servers, kills, terminates or pauses one of them, reports the longest time without
an acknowledgement by the others, and receives everything afterwards to prove that nothing was lost.`,
		Example: examples(`
			tercet bench publish --via leader --publishers 256 --size 1024
			tercet bench publish --via leader --publishers 1 --emulate-sync 5ms
			tercet bench publish --via leader --publishers 256 --baseline --pairs 4
			tercet bench publish --publishers 16 --batch 100
			tercet bench publish --via resp --publishers 16 --window 64
			tercet bench publish --publishers 64 --consumers 16 --rate 5000 --end-to-end --duration 30s
			tercet bench publish --via leader --publishers 16 --window 64 --topics 64
			tercet bench publish --kill term-leader
			tercet bench publish --server http://10.0.0.1:7300,http://10.0.0.2:7300`),
		Args:        cobra.NoArgs,
		Annotations: map[string]string{annotationCommandLine: "all"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.kill != "" {
				return a.benchKill(cmd, o)
			}
			return a.benchPublish(cmd.Context(), o)
		},
	}
	o.registerShape(cmd, 256, 1024, 1)
	o.register(cmd)
	f := cmd.Flags()
	f.StringVar(&o.via, "via", "http", "where the publishers are: inside the leader, or clients over http or resp")
	f.StringVar(&o.format, "format", "compact", "framing of a batch over HTTP: compact or multipart")
	f.BoolVar(&o.spread, "spread", false, "over HTTP: publish to all servers in turn instead of the leader alone")
	f.Float64Var(&o.Rate, "rate", 0, "messages a second of all publishers together (default: as many as are acknowledged)")
	f.IntVar(&o.Consumers, "consumers", 0, "consumers that receive and acknowledge meanwhile")
	f.IntVar(&o.ReceiveMax, "receive-max", limits.ReceiveMessagesMax, "messages that a receive takes at most")
	f.DurationVar(&o.Duration, "duration", 10*time.Second, "how long to measure")
	f.DurationVar(&o.Warmup, "warmup", 2*time.Second, "how long to publish before that")
	f.BoolVar(&o.AllZones, "all-zones", false, "ask for durability all with each publish")
	f.DurationVar(&o.Retention, "retention", limits.RetentionMin, "retention of the messages")
	f.StringVar(&o.Topic, "topic", "bench", "topic to publish to")
	f.StringVar(&o.Group, "group", "bench", "consumer group")
	f.IntVar(&o.Window, "window", 1, "requests that a publisher has under way at once; more than 1 with --via leader or resp")
	f.StringSliceVar(&o.sizes, "mixed-sizes", nil, "`sizes` of bodies that take turns, instead of --size")
	f.IntVar(&o.Topics, "topics", 1, "topics that the messages are spread over")
	f.IntVar(&o.Groups, "groups", 1, "consumer groups that each receive every message")
	f.BoolVar(&o.Timed, "end-to-end", false, "measure the time from when a message was due until a consumer has it")
	f.Uint64Var(&o.Seed, "seed", 1, "what the bodies are made from")
	f.DurationVar(&o.probe, "probe", time.Second, "how long each disk probe takes; 0 for none")
	f.StringSliceVar(&o.servers, "server", nil, "base `URLs` of a running cluster's servers, instead of starting one")
	f.StringVar(&o.token, "token", "", "bearer token for --server")
	f.BoolVar(&o.baseline, "baseline", false, "also run the same engine on hashicorp/raft-wal and the stock transport, in turn, and print ratios")
	f.StringVar(&o.baselineBinary, "baseline-binary", "", "`path` of the baseline (default: built from bench/baseline, which needs Go)")
	f.IntVar(&o.pairs, "pairs", 2, "runs of each with --baseline")
	f.StringVar(&o.kill, "kill", "", "`whom` to disrupt: leader or follower (SIGKILL), term-leader, or pause-leader")
	f.StringVar(&o.profile, "profile", "", "write CPU, allocation, block and mutex profiles and a trace of each server into this `directory`")
	return cmd
}

func (o *publishFlags) check() error {
	var problems []error
	problem := func(when bool, format string, args ...any) {
		if when {
			problems = append(problems, fmt.Errorf(format, args...))
		}
	}
	if _, err := bench.ParseVia(o.via); err != nil {
		problem(true, "--via %w", err)
	}
	problem(o.format != "compact" && o.format != "multipart", "--format %q: want compact or multipart", o.format)
	problem(o.Timed && o.Consumers == 0, "--end-to-end needs --consumers")
	problem(o.pairs < 1, "--pairs %d: want at least 1", o.pairs)
	foreign := len(o.servers) > 0
	problem(foreign && (o.via != "http" || o.delay > 0 || o.baseline || o.kill != "" || o.profile != ""),
		"--via leader, --via resp, --emulate-sync, --baseline, --kill and --profile need servers that this command starts: leave out --server")
	problem(o.kill != "" && o.via != "http", "--kill publishes over HTTP: leave out --via %s", o.via)
	problem(o.baseline && o.via != "leader", "--baseline has no HTTP interface: add --via leader")
	if err := errors.Join(problems...); err != nil {
		return usageError{err}
	}
	return o.benchCluster.check()
}

func (o *publishFlags) plan(a *app, w bench.Workload) bench.Plan {
	p := bench.Plan{
		Workload: w, Via: bench.Via(o.via), Spread: o.spread || len(o.servers) > 0, Multipart: o.format == "multipart",
		Probe: o.probe, Token: o.token, Progress: a.progress(),
	}
	if o.profile != "" {
		p.During = func(ctx context.Context, s *bench.Subject, leader string) {
			if err := profileAll(ctx, s, leader, o.profile, w.Duration); err != nil {
				fmt.Fprintf(a.err, "profile: %v\n", err)
			}
		}
	}
	return p
}

// profileAll fetches the profiles of all servers while they are under load. The files are named after the variant, the
// role and the node.
func profileAll(ctx context.Context, s *bench.Subject, leader, dir string, during time.Duration) error {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	var group errgroup.Group
	for _, n := range s.Nodes {
		role := "follower"
		if n.ID == leader {
			role = "leader"
		}
		group.Go(func() error {
			return profile(ctx, n, filepath.Join(dir, s.Variant+"-"+role+"-"+n.ID), during)
		})
	}
	return group.Wait()
}

// profile fetches the profiles of one server into files that begin with prefix.
func profile(ctx context.Context, server bench.SubjectNode, prefix string, during time.Duration) error {
	fetch := func(path, file string) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+server.Endpoint+"/debug/pprof/"+path, nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("GET %s: %s", path, resp.Status)
		}
		f, err := os.Create(prefix + file)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, resp.Body)
		return errors.Join(err, f.Close())
	}
	contention := func(on bool) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("http://%s/debug/contention?on=%t", server.Endpoint, on), nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}
	// One after the other, since each costs the server something: most of the time for CPU, then a second of what is
	// waited for, and a trace, which is large.
	seconds := max(1, int((during-2500*time.Millisecond)/time.Second))
	return errors.Join(
		fetch(fmt.Sprintf("profile?seconds=%d", seconds), "-cpu.pprof"),
		// What was allocated since the process began; the load is nearly all of it.
		fetch("allocs", "-allocs.pprof"),
		contention(true),
		fetch("block?seconds=1", "-block.pprof"),
		fetch("mutex?seconds=1", "-mutex.pprof"),
		contention(false),
		fetch("trace?seconds=0.1", "-trace.out"),
	)
}

// benchRuns is what a run with --baseline prints.
type benchRuns struct {
	Runs  []*bench.Report `json:"runs"`
	Pairs []bench.Pair    `json:"pairs"`
}

func (a *app) benchPublish(ctx context.Context, o publishFlags) error {
	if err := o.check(); err != nil {
		return err
	}
	w, err := o.workload()
	if err != nil {
		return err
	}
	ctx, cancel := a.interruptible(ctx)
	defer cancel()
	plan := o.plan(a, w)
	if len(o.servers) > 0 {
		s, err := foreignSubject(o.servers)
		if err != nil {
			return err
		}
		r, err := bench.Measure(ctx, s, plan)
		if err != nil {
			return ended(ctx, err)
		}
		r.Command = commandLine()
		return a.print(r, r.Text)
	}
	binary, err := os.Executable()
	if err != nil {
		return err
	}
	measure := func(variant, binary string) (*bench.Report, error) {
		s, stop, err := o.start(ctx, a, variant, binary, false)
		if err != nil {
			return nil, ended(ctx, err)
		}
		defer stop()
		r, err := bench.Measure(ctx, s, plan)
		if err != nil {
			return nil, ended(ctx, err)
		}
		r.Command, r.Version = commandLine(), version
		return r, nil
	}
	if !o.baseline {
		r, err := measure("tercet", binary)
		if err != nil {
			return err
		}
		return a.print(r, r.Text)
	}
	baseline, remove, err := findBaseline(ctx, o.baselineBinary)
	if err != nil {
		return err
	}
	defer remove()
	var all benchRuns
	for range o.pairs {
		var pair [2]*bench.Report
		for i, v := range []struct{ name, binary string }{{"tercet", binary}, {"raft-wal", baseline}} {
			if pair[i], err = measure(v.name, v.binary); err != nil {
				return fmt.Errorf("%s: %w", v.name, err)
			}
			all.Runs = append(all.Runs, pair[i])
		}
		all.Pairs = append(all.Pairs, bench.Compare(pair[0], pair[1]))
	}
	return a.print(all, func(out io.Writer) error {
		for _, r := range all.Runs {
			if err := r.Text(out); err != nil {
				return err
			}
			fmt.Fprintln(out)
		}
		for _, p := range all.Pairs {
			fmt.Fprintln(out, p)
		}
		return nil
	})
}

// foreignSubject is a cluster that runs already.
func foreignSubject(servers []string) (*bench.Subject, error) {
	s := &bench.Subject{Variant: "tercet"}
	for _, text := range servers {
		u, err := url.Parse(text)
		if err != nil || u.Scheme != "http" || u.Host == "" || strings.Trim(u.Path, "/") != "" {
			return nil, usageError{fmt.Errorf("--server %q: want http://HOST:PORT", text)}
		}
		s.Nodes = append(s.Nodes, bench.SubjectNode{HTTP: u.Host})
	}
	return s, nil
}

// findBaseline returns a binary of bench/baseline: the given one, or one that it builds from the source tree around
// the working directory.
func findBaseline(ctx context.Context, given string) (binary string, remove func(), err error) {
	if given != "" {
		return given, func() {}, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", nil, err
	}
	for {
		source := filepath.Join(dir, "bench", "baseline")
		if _, err := os.Stat(filepath.Join(source, "go.mod")); err == nil {
			return buildBaseline(ctx, source)
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", nil, usageError{errors.New("--baseline: no bench/baseline above the working directory; run it in the source tree or name a binary with --baseline-binary")}
		}
		dir = up
	}
}

func buildBaseline(ctx context.Context, source string) (binary string, remove func(), err error) {
	dir, err := os.MkdirTemp("", "tercet-baseline-")
	if err != nil {
		return "", nil, err
	}
	remove = func() { _ = os.RemoveAll(dir) } // what cannot be removed stays in the temporary directory
	binary = filepath.Join(dir, "baseline")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", binary, ".")
	build.Dir = source
	if out, err := build.CombinedOutput(); err != nil {
		remove()
		return "", nil, fmt.Errorf("build %s: %w\n%s", source, err, out)
	}
	return binary, remove, nil
}

// benchKill runs `tercet bench publish --kill`.
func (a *app) benchKill(cmd *cobra.Command, o publishFlags) error {
	if err := o.check(); err != nil {
		return err
	}
	d, err := bench.ParseDisruption(o.kill)
	if err != nil {
		return usageError{fmt.Errorf("--kill %w", err)}
	}
	given := cmd.Flags().Changed
	if !given("duration") {
		// A third before, then room for an election, or for the pause and what follows it.
		o.Duration = 15 * time.Second
		if d == bench.PauseLeader {
			o.Duration = 30 * time.Second
		}
	}
	if !given("publishers") {
		o.Publishers = 24 // every message is received again afterwards
	}
	if !given("retention") {
		o.Retention = 10 * time.Minute // nothing must expire before it is accounted for
	}
	o.Stamped = true
	w, err := o.workload()
	if err != nil {
		return err
	}
	binary, err := os.Executable()
	if err != nil {
		return err
	}
	ctx, cancel := a.interruptible(cmd.Context())
	defer cancel()
	s, stop, err := o.start(ctx, a, "tercet", binary, true)
	if err != nil {
		return ended(ctx, err)
	}
	defer stop()
	r, err := bench.Disrupt(ctx, s, w, d)
	if err != nil {
		return ended(ctx, err)
	}
	r.Command, r.Version = commandLine(), version
	if err := a.print(r, r.Text); err != nil {
		return err
	}
	if r.Balance.Lost > 0 || !r.Equal {
		return fmt.Errorf("%d acknowledged messages are lost, replicas equal: %t", r.Balance.Lost, r.Equal)
	}
	return nil
}

// diskFlags are the flags of `tercet bench disk`.
type diskFlags struct {
	dir      string
	sizes    []string
	duration time.Duration
	delay    time.Duration
}

func (a *app) benchDiskCommand() *cobra.Command {
	var o diskFlags
	cmd := &cobra.Command{
		Use:   "disk",
		Short: "Measure what synced writes to a disk take",
		Long: `Writes and syncs, and reports how long that takes: by size, through O_DIRECT|O_DSYNC and through
fdatasync, over blocks written before and at the end of a growing file, by one stream and by three at once.

A server's log writes over prefilled blocks, direct where the file system allows it. A disk that syncs 4 KiB
in much less than its seek or flash program time has a cache; whether that survives a power failure cannot be
measured from here.`,
		Example: examples(`
			tercet bench disk
			tercet bench disk --dir /var/lib/tercet --duration 5s
			tercet bench disk --size 4KiB,64KiB -o json`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.benchDisk(cmd.Context(), o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.dir, "dir", "", "`directory` on the disk to measure (default: the temporary directory)")
	f.StringSliceVar(&o.sizes, "size", []string{"4KiB", "64KiB", "256KiB", "1MiB"}, "sizes of a write")
	f.DurationVar(&o.duration, "duration", time.Second, "how long each line is measured")
	f.DurationVar(&o.delay, "emulate-sync", 0, "make every sync take this much longer")
	return cmd
}

func (a *app) benchDisk(ctx context.Context, o diskFlags) error {
	var sizes []int64
	for _, text := range o.sizes {
		var size byteSize
		if err := size.Set(text); err != nil {
			return usageError{fmt.Errorf("--size %w", err)}
		}
		if size < 1 || size > 64<<20 {
			return usageError{fmt.Errorf("--size %s: want 1 byte to 64 MiB", text)}
		}
		sizes = append(sizes, int64(size))
	}
	if o.dir == "" {
		o.dir = os.TempDir()
	}
	ctx, cancel := a.interruptible(ctx)
	defer cancel()
	modes := []bool{false}
	if bench.DirectWorks(o.dir) {
		modes = []bool{true, false}
	}
	var results []bench.ProbeResult
	for _, size := range sizes {
		for _, direct := range modes {
			for _, prefilled := range []bool{true, false} {
				for _, streams := range []int{1, 3} {
					r, err := bench.Probe(ctx, bench.ProbeOptions{
						Dir: o.dir, Direct: direct, Prefilled: prefilled, Size: size, Streams: streams,
						Duration: o.duration, Delay: o.delay,
					})
					if err != nil {
						return ended(ctx, err)
					}
					results = append(results, r)
				}
			}
		}
	}
	report := struct {
		Command string              `json:"command"`
		Dir     string              `json:"dir"`
		Machine bench.Machine       `json:"machine"`
		Probes  []bench.ProbeResult `json:"probes"`
	}{commandLine(), o.dir, bench.ThisMachine(o.dir), results}
	return a.print(report, func(w io.Writer) error { return bench.ProbeTable(w, results) })
}

// campaignFlags are the flags that the campaigns share.
type campaignFlags struct {
	benchCluster
	workloadFlags
	topicSize byteSize
	wait      time.Duration
}

// campaign starts three servers and runs one campaign on them.
func (a *app) campaign(ctx context.Context, o *campaignFlags, restart bool, run func(ctx context.Context, s *bench.Subject, w bench.Workload) error) error {
	if err := o.benchCluster.check(); err != nil {
		return err
	}
	o.Topic, o.Group, o.ReceiveMax = "bench", "bench", limits.ReceiveMessagesMax
	w, err := o.workload()
	if err != nil {
		return err
	}
	binary, err := os.Executable()
	if err != nil {
		return err
	}
	ctx, cancel := a.interruptible(ctx)
	defer cancel()
	s, stop, err := o.start(ctx, a, "tercet", binary, restart)
	if err != nil {
		return ended(ctx, err)
	}
	defer stop()
	if err := bench.Fits(s.Dir, w, len(s.Nodes)); err != nil {
		return codedError{exitPrecondition, err}
	}
	return ended(ctx, run(ctx, s, w))
}

func (a *app) benchBacklogCommand() *cobra.Command {
	var o campaignFlags
	cmd := &cobra.Command{
		Use:   "backlog",
		Short: "Fill a topic, and report memory and restart time of the nodes",
		Long: `Publishes a number of messages that nobody receives, reports the memory and disk space that each node
takes, and then kills the nodes one after the other (SIGKILL) and reports how long each takes until it is ready.`,
		Example: examples(`
			tercet bench backlog
			tercet bench backlog --messages 100000 --size 1KiB
			tercet bench backlog --messages 10000000 --server-arg --memory=256MiB -o json`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.campaign(cmd.Context(), &o, true, func(ctx context.Context, s *bench.Subject, w bench.Workload) error {
				r, err := bench.Backlog(ctx, s, w, a.progress())
				if err != nil {
					return err
				}
				r.Command, r.Version = commandLine(), version
				return a.print(r, r.Text)
			})
		},
	}
	o.registerShape(cmd, 64, 100, 100)
	o.register(cmd)
	cmd.Flags().Int64Var(&o.Messages, "messages", 10_000_000, "how many messages")
	cmd.Flags().DurationVar(&o.Retention, "retention", limits.RetentionDefault, "retention of the messages")
	return cmd
}

func (a *app) benchDrainedCommand() *cobra.Command {
	var o campaignFlags
	cmd := &cobra.Command{
		Use:   "drained",
		Short: "Compare receives behind many acknowledged messages with receives from an empty topic",
		Long: `Publishes a number of messages, has all of them received and acknowledged, and then times receives of
single messages, in turn from that topic and from one that never had any.`,
		Example: examples(`
			tercet bench drained
			tercet bench drained --messages 100000
			tercet bench drained --messages 1000000 --consumers 64 -o json`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.campaign(cmd.Context(), &o, false, func(ctx context.Context, s *bench.Subject, w bench.Workload) error {
				r, err := bench.Drained(ctx, s, w, a.progress())
				if err != nil {
					return err
				}
				r.Command, r.Version = commandLine(), version
				return a.print(r, r.Text)
			})
		},
	}
	o.registerShape(cmd, 64, 100, 100)
	o.register(cmd)
	cmd.Flags().Int64Var(&o.Messages, "messages", 10_000_000, "how many messages")
	cmd.Flags().IntVar(&o.Consumers, "consumers", 128, "consumers that acknowledge them")
	cmd.Flags().DurationVar(&o.Retention, "retention", limits.RetentionDefault, "retention of the messages")
	return cmd
}

func (a *app) benchExpiryCommand() *cobra.Command {
	var o campaignFlags
	o.topicSize = 10 << 30
	cmd := &cobra.Command{
		Use:   "expiry",
		Short: "Publish much with a short retention, and report what stays on the disk",
		Long: `Publishes a number of bytes with a retention of 60 s and reports the size of the data directories while
it does, at the end, and when all messages have been expired for a while.`,
		Example: examples(`
			tercet bench expiry
			tercet bench expiry --bytes 1GiB --wait 90s
			tercet bench expiry --bytes 10GiB -o json`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.size > 0 {
				o.Messages = int64(o.topicSize) / int64(o.size)
			}
			return a.campaign(cmd.Context(), &o, false, func(ctx context.Context, s *bench.Subject, w bench.Workload) error {
				r, err := bench.Expiry(ctx, s, w, o.wait, a.progress())
				if err != nil {
					return err
				}
				r.Command, r.Version = commandLine(), version
				return a.print(r, r.Text)
			})
		},
	}
	o.registerShape(cmd, 64, 1024, 100)
	o.register(cmd)
	cmd.Flags().Var(&o.topicSize, "bytes", "bytes of bodies to publish")
	cmd.Flags().DurationVar(&o.wait, "wait", time.Minute, "how long to look on after the last message expired")
	cmd.Flags().DurationVar(&o.Retention, "retention", limits.RetentionMin, "retention of the messages")
	return cmd
}
