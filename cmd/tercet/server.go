package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tercet.dev/tercet/compat"
	"tercet.dev/tercet/internal/nodecert"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server"
	"tercet.dev/tercet/server/push"
)

// The default addresses of a node: loopback on these ports.
const (
	defaultHTTP = ":7300"
	defaultPeer = ":7400"
)

// shutdownPatience bounds each step of an orderly stop; what is not done by then is cut off, which loses nothing
// that was acknowledged.
const shutdownPatience = 10 * time.Second

// pushPatience is how long a stopping node waits for the answers to its pushes.
const pushPatience = time.Second

// serverOptions are the flags of `tercet server`.
type serverOptions struct {
	nodeID, zone, data string
	http, peer         string
	peerTLS            raft.PeerFiles
	peerToken          string
	valkey             valkeyOptions
	peers, join        []string
	publicHosts        []string
	region             string
	pushAllow          []string
	durability         string
	zoneTimeout        time.Duration
	drainGrace         time.Duration
	diskReserve        byteSize
	walSegmentSize     byteSize
	memory             byteSize
	insecure           bool
	virtualClock       bool
	logFormat          string
	logLevel           string
	bench              benchServer
	security           securityOptions
	contact            contactOptions
}

func (o *serverOptions) register(f *pflag.FlagSet) {
	f.StringVar(&o.nodeID, "node-id", "", "`name` of this node, unique in the cluster (required)")
	f.StringVar(&o.zone, "zone", "", "`zone` (failure domain) of this node (default: the node id)")
	f.StringVar(&o.data, "data", "", "data `directory` (required)")
	f.StringVar(&o.http, "http", defaultHTTP, "HTTP `address`; without a host 127.0.0.1 and ::1")
	f.StringVar(&o.peer, "peer", defaultPeer, "`address` for the other nodes; without a host 127.0.0.1 and ::1")
	f.StringVar(&o.peerTLS.Cert, "peer-tls-cert", "", "PEM `file` with this node's certificate for the other nodes, its DNS names holding the node id")
	f.StringVar(&o.peerTLS.Key, "peer-tls-key", "", "PEM `file` with that certificate's private key")
	f.StringVar(&o.peerTLS.CA, "peer-tls-ca", "", "PEM `file` of the authorities that sign the nodes' certificates")
	f.StringVar(&o.peerToken, "peer-token", "", "`token` of 'tercet cluster token create' that secures the connections between nodes; read while the data directory holds no certificate")
	o.valkey.register(f)
	f.StringSliceVar(&o.peers, "peers", nil, "founding members as `n1=H:P,n2=H:P,…`, the same on all of them; read while the data directory is empty")
	f.StringSliceVar(&o.join, "join", nil, "`addresses` of members to ask for admission with an empty data directory, instead of --peers")
	f.StringSliceVar(&o.publicHosts, "public-host", nil, "host `names`, besides addresses and localhost, that requests may be addressed to")
	f.StringVar(&o.region, "region", "iad1", "region `code` that pushed messages name")
	f.StringSliceVar(&o.pushAllow, "push-allow", nil, "`networks` (10.1.0.0/16, …) that messages may be pushed to although they are not public, also without TLS")
	f.StringVar(&o.durability, "durability", "in-sync", "what a publish waits for: the disks of the in-sync zones, or of `all` zones")
	f.DurationVar(&o.zoneTimeout, "zone-timeout", 2*time.Second, "how long a silent zone stays in the in-sync set")
	f.DurationVar(&o.drainGrace, "drain-grace", time.Second, "how long to go on serving at a stop, with /readyz at 503, while connections are open")
	f.Var(&o.diskReserve, "disk-reserve", "free space below which publishes are refused (default: 5 % of the disk, at most 1 GiB)")
	f.Var(&o.walSegmentSize, "wal-segment-size", "size of a log segment (default 64 MiB)")
	f.Var(&o.memory, "memory", "budget for caches, buffers and queues (default: a quarter of the memory, at most 1 GiB)")
	f.BoolVar(&o.insecure, "insecure", false, "allow addresses that others can reach although there is no authentication")
	f.BoolVar(&o.virtualClock, "virtual-clock", false, "let POST /v1/clock/advance move the cluster's time, for tests")
	f.StringVar(&o.logFormat, "log-format", "text", "`format` of the log: text or json")
	f.StringVar(&o.logLevel, "log-level", "info", "lowest `level` that is logged: trace, debug, info, warn or error")
	o.bench.register(f)
	o.security.register(f)
	o.contact.register(f)
	f.StringVar(&o.security.config, "config", "", "YAML `file` with the same names as keys; flags and environment come first")
}

func (a *app) serverCommand() *cobra.Command {
	var o serverOptions
	cmd := &cobra.Command{
		Use:     "server",
		Short:   "Run one node",
		GroupID: groupRun,
		Long: `Runs one node. Empty data directories form a cluster when all --peers are present and empty; later
starts need no --peers. With neither --peers nor --join the node is a cluster of one.

Each flag can also be set as TERCET_… (--zone-timeout is TERCET_ZONE_TIMEOUT; TERCET_…_FILE names a file
that holds the value) and in a YAML file. A flag comes before the environment, that before the file.

SIGTERM drains: /readyz turns 503, waiting receives are sent elsewhere, leadership is handed on, requests
are served on open connections for --drain-grace and told to go elsewhere. A second signal ends the process
at once.`,
		Example: examples(`
			tercet server --node-id n1 --data /var/lib/tercet
			tercet server --node-id n1 --zone a --data /var/lib/tercet --peers n1=127.0.0.1:7401,n2=127.0.0.1:7402,n3=127.0.0.1:7403 --peer 127.0.0.1:7401
			tercet server --config /etc/tercet.yaml --log-format json
			tercet server --node-id n2 --zone b --data /var/lib/tercet --join 127.0.0.1:7401`),
		Args:        cobra.NoArgs,
		Annotations: map[string]string{annotationNode: "all"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.server(cmd.Context(), &o)
		},
	}
	o.register(cmd.Flags())
	return cmd
}

// regionCode is what the public client takes for a region; it answers 500 to pushes that name another.
var regionCode = regexp.MustCompile(`^[a-z]{2,5}[0-9]{1,2}$`)

var nodeName = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// config checks all flags and turns them into the node's configuration. It opens nothing.
func (o *serverOptions) config() (raft.Config, error) {
	var problems []error
	problem := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	cfg := raft.Config{
		Name: o.nodeID, Zone: o.zone, Dir: o.data, Version: version, Join: o.join,
		ZoneTimeout: o.zoneTimeout, DiskReserve: int64(o.diskReserve), WALSegmentSize: int64(o.walSegmentSize),
		MemoryBudget: int64(o.memory), VirtualClock: o.virtualClock, SyncDelay: o.bench.delay,
	}
	if o.nodeID == "" {
		problem("--node-id is required")
	} else if !nodeName.MatchString(o.nodeID) {
		problem("--node-id %q: want 1 to 64 characters out of A-Z a-z 0-9 _ -", o.nodeID)
	}
	if cfg.Zone == "" {
		cfg.Zone = o.nodeID
	} else if !nodeName.MatchString(cfg.Zone) {
		problem("--zone %q: want 1 to 64 characters out of A-Z a-z 0-9 _ -", o.zone)
	}
	if !regionCode.MatchString(o.region) {
		problem("--region %q: want two to five letters and one or two digits, as in iad1", o.region)
	}
	if o.data == "" {
		problem("--data is required")
	}
	if o.zoneTimeout < 500*time.Millisecond {
		problem("--zone-timeout %s: want at least 500ms", o.zoneTimeout)
	}
	if n := int64(o.walSegmentSize); n != 0 && (n < 1<<20 || n%4096 != 0) {
		problem("--wal-segment-size %s: want a multiple of 4096 from 1 MiB up", &o.walSegmentSize)
	}
	securePeers := o.securePeers()
	if o.peerToken != "" {
		if err := nodecert.CheckToken(o.peerToken); err != nil {
			problem("--peer-token: %w", err)
		}
		if o.peerTLS != (raft.PeerFiles{}) {
			problem("--peer-token and --peer-tls-cert exclude each other: the one obtains a certificate, the other names one")
		}
	}
	if o.peerTLS != (raft.PeerFiles{}) && (o.peerTLS.Cert == "" || o.peerTLS.Key == "" || o.peerTLS.CA == "") {
		problem("--peer-tls-cert, --peer-tls-key and --peer-tls-ca belong together")
	}
	durability, err := raft.ParseDurability(o.durability)
	if err != nil {
		problem("--durability: %w", err)
	}
	cfg.Durability = durability
	if o.bench.majority {
		cfg.Durability = raft.OnlyMajority
	}
	if err := o.security.check(); err != nil {
		problem("%w", err)
	}
	for _, f := range []struct {
		flag, addr    string
		authenticated bool
	}{{"--http", o.http, o.security.authenticated()}, {"--peer", o.peer, true}} {
		if f.addr == "" {
			continue
		}
		if err := checkAddress(f.addr, f.authenticated, o.insecure); err != nil {
			problem("%s: %w", f.flag, err)
		}
	}
	if public, _ := server.CheckBind(o.peer, true, false); public && !securePeers && !o.insecure {
		problem("--peer: address %q can be reached from other machines: give the nodes certificates with --peer-token or --peer-tls-cert, or pass --insecure", o.peer)
	}
	if err := o.valkey.check(o.security.files.ClientCA != "", o.insecure); err != nil {
		problem("%w", err)
	}
	if o.http == o.peer && !strings.HasSuffix(o.http, ":0") {
		problem("--http and --peer are both %s", o.http)
	}
	cfg.HTTPAddr, cfg.PeerAddr, cfg.ValkeyAddr = advertised(o.http), advertised(o.peer), o.valkey.advertised()
	cfg.Peers, err = parsePeers(o.peers)
	if err != nil {
		problem("--peers: %w", err)
	}
	own := false
	for _, p := range cfg.Peers {
		if p.Name == o.nodeID {
			own = true
			cfg.PeerAddr = p.Addr
		}
	}
	if len(cfg.Peers) > 0 && !own {
		problem("--peers names no node %q, which --node-id says this is", o.nodeID)
	}
	if host, _, err := net.SplitHostPort(cfg.PeerAddr); err == nil {
		if ip, err := netip.ParseAddr(host); err == nil && ip.IsUnspecified() {
			problem("--peer %s is no address that others can dial: name one, or give this node's in --peers", o.peer)
		}
	}
	if len(o.join) > 0 {
		cfg.Peers = nil
	}
	return cfg, errors.Join(problems...)
}

// securePeers reports whether the nodes show each other certificates.
func (o *serverOptions) securePeers() bool {
	return o.peerTLS != raft.PeerFiles{} || o.ownCertificates()
}

// ownCertificates reports whether the node's certificate comes from the cluster's own authority.
func (o *serverOptions) ownCertificates() bool {
	return o.peerToken != "" || o.peerTLS == raft.PeerFiles{} && o.data != "" && nodecert.Has(o.data)
}

// checkAddress refuses addresses that are malformed, or that others can reach although nobody is asked who they are.
func checkAddress(addr string, authenticated, insecure bool) error {
	if strings.Contains(addr, "://") {
		return fmt.Errorf("address %q: want HOST:PORT without a scheme", addr)
	}
	_, err := server.CheckBind(addr, authenticated, insecure)
	return err
}

// advertised is how others reach what listens on addr.
func advertised(addr string) string {
	if host, port, err := net.SplitHostPort(addr); err == nil && host == "" {
		return net.JoinHostPort("127.0.0.1", port)
	}
	return addr
}

func parsePeers(list []string) ([]raft.Peer, error) {
	var peers []raft.Peer
	seen := map[string]bool{}
	for _, item := range list {
		name, addr, ok := strings.Cut(strings.TrimSpace(item), "=")
		if !ok || !nodeName.MatchString(name) {
			return nil, fmt.Errorf("%q: want NAME=HOST:PORT", item)
		}
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return nil, fmt.Errorf("%q: want NAME=HOST:PORT", item)
		}
		if seen[name] || seen[addr] {
			return nil, fmt.Errorf("%q: its name or address stands twice", item)
		}
		seen[name], seen[addr] = true, true
		peers = append(peers, raft.Peer{Name: name, Addr: addr})
	}
	return peers, nil
}

func (o *serverOptions) logger(w *os.File) (hclog.Logger, error) {
	level := hclog.LevelFromString(o.logLevel)
	if level == hclog.NoLevel {
		return nil, fmt.Errorf("--log-level %q: want trace, debug, info, warn or error", o.logLevel)
	}
	if o.logFormat != "text" && o.logFormat != "json" {
		return nil, fmt.Errorf("--log-format %q: want text or json", o.logFormat)
	}
	return hclog.New(&hclog.LoggerOptions{
		Name: "tercet", Level: level, Output: w, JSONFormat: o.logFormat == "json",
		TimeFormat: "2006-01-02T15:04:05.000Z07:00", TimeFn: func() time.Time { return time.Now().UTC() },
	}), nil
}

// server runs one node until a signal or a fatal error.
func (a *app) server(ctx context.Context, o *serverOptions) error {
	cfg, problem := o.config()
	log, err := o.logger(os.Stderr)
	pushAllow, badNetwork := push.ParseAllow(o.pushAllow)
	if badNetwork != nil {
		badNetwork = fmt.Errorf("--push-allow: %w", badNetwork)
	}
	if err := errors.Join(problem, err, badNetwork); err != nil {
		return usageError{err}
	}

	// From here on a first signal ends what is going on in good order, and a second one ends the process.
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	ended := make(chan struct{})
	defer close(ended)
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

	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	insecure := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "tercet_insecure",
		Help: "1 when --insecure allows addresses that others can reach without authentication.",
	})
	built := thisBuild()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "tercet_build_info",
		Help:        "1, labelled with what the binary was built from.",
		ConstLabels: prometheus.Labels{"version": built.Version, "go": built.Go, "raft": built.Raft, "pebble": built.Pebble},
	})
	info.Set(1)
	registry.MustRegister(insecure, info)
	if o.insecure {
		insecure.Set(1)
		log.Warn("--insecure: whoever reaches this node's addresses can read and write everything")
	}
	secured, err := o.security.open(log, registry)
	if err != nil {
		return err
	}
	defer secured.stop()
	if public, _ := server.CheckBind(o.http, true, false); public && secured.tls == nil {
		log.Warn("--http can be reached from other machines without TLS: tokens and messages cross the network in clear text", "address", o.http)
	}

	if public, _ := server.CheckBind(o.http, true, false); !public && !o.security.authenticated() {
		log.Info("no tokens, issuers or client certificates are configured: HTTP is bound to the loopback interface only", "address", o.http)
	}

	httpListeners, err := listenAs(ctx, "--http", o.http)
	if err != nil {
		return err
	}
	defer closeAll(httpListeners)
	valkeyListeners, err := o.valkey.listen(ctx)
	if err != nil {
		return err
	}
	defer closeAll(valkeyListeners)
	cfg.PeerListeners, err = listenAs(ctx, "--peer", o.peer)
	if err != nil {
		return err
	}
	if o.peerTLS != (raft.PeerFiles{}) {
		if cfg.PeerTLS, err = raft.PeerTLS(o.peerTLS); err != nil {
			closeAll(cfg.PeerListeners)
			return codedError{exitPrecondition, fmt.Errorf("--peer-tls-cert: %w", err)}
		}
	}
	var keeper *nodecert.Keeper
	if o.ownCertificates() {
		keeper, err = nodecert.Open(ctx, nodecert.Options{Dir: cfg.Dir, Name: cfg.Name, Token: o.peerToken, Join: cfg.Join, Logger: log.Named("certificate")})
		if err != nil {
			closeAll(cfg.PeerListeners)
			return startFailure(ctx, err)
		}
		cfg.PeerTLS, cfg.Enrol = keeper.TLS(), keeper.Enrol
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "tercet_peer_certificate_expiry_timestamp_seconds",
			Help: "When the certificate that this node shows the others expires. The node renews it when a third of its life is left.",
		}, func() float64 { return float64(keeper.NotAfter().Unix()) }))
	}
	limitMemory(log)
	log.Info("starting", "version", version, "node", cfg.Name, "zone", cfg.Zone, "data", cfg.Dir,
		"http", o.http, "peer", o.peer, "valkey", o.valkey.addr, "durability", cfg.Durability, "pid", os.Getpid())

	cfg.Logger, cfg.Registerer = log, registry
	formed := serveForming(httpListeners, secured.tls, log.Named("server"))
	node, err := raft.Start(ctx, cfg)
	formed()
	if err != nil {
		return startFailure(ctx, err)
	}
	defer node.Close()
	defer secured.follow(ctx, node, log)()
	if keeper != nil {
		defer follow(ctx, keeper, node)()
	}

	pusher, err := push.New(push.Options{Backend: node, Region: o.region, Allow: pushAllow, Version: version, Logger: log.Named("push"), Registerer: registry})
	if err != nil {
		return err
	}
	defer pusher.Close()
	srv, err := server.New(server.Options{
		Extensions: []server.Extension{pusher.Extension(), nodecert.Extension(node), compat.UsersExtension(node, o.valkey.acl)},
		Backend:    node, Spool: o.data, Version: version, Logger: log.Named("http"), Registerer: registry, Gatherer: registry,
		PublicHosts: o.publicHosts, VirtualClock: o.virtualClock, Contact: server.NewNodeContact(node, o.contact.options()), Authorizer: secured.tokens, TLS: secured.tls,
	})
	if err != nil {
		return err
	}
	pusher.Start()
	failed := make(chan error, len(httpListeners)+1)
	for _, l := range httpListeners {
		go func() { failed <- srv.Serve(l) }()
	}
	valkey, err := o.valkey.open(node, valkeyListeners, secured, o.security.files.ClientCA != "", o.insecure, log, registry)
	if err != nil {
		return err
	}
	defer valkey.close()
	closeBench, err := o.bench.open(node, log)
	if err != nil {
		return err
	}
	defer closeBench()
	notifySystemd("READY=1")

	select {
	case <-ctx.Done():
	case <-node.Done():
		_ = srv.Close()
		return fmt.Errorf("the node stopped: %w", node.Err())
	case err := <-failed:
		return fmt.Errorf("HTTP server: %w", err)
	case err := <-valkey.failures():
		return fmt.Errorf("the Valkey port: %w", err)
	}

	notifySystemd("STOPPING=1")
	return drain(log, srv, pusher, valkey, node, o.drainGrace)
}

// startFailure is the end of a process whose node did not start.
func startFailure(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errStopped) {
		return nil
	}
	var refusal *raft.StartError
	if errors.As(err, &refusal) {
		return codedError{exitPrecondition, err}
	}
	return err
}

// follow keeps the node's certificate good until ctx ends or the returned function is called.
func follow(ctx context.Context, keeper *nodecert.Keeper, node *raft.Node) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		keeper.Follow(ctx, node)
	}()
	return func() { cancel(); <-ended }
}

// errStopped is the cause of a context that a signal ended.
var errStopped = errors.New("stopped by a signal")

// drain stops a serving node without consequences for its clients. Requests are served, by passing them on, until
// nobody has a connection open or the grace is over: a client that finds out from an answer goes elsewhere, one that
// finds its connection closed under a request knows nothing.
func drain(log hclog.Logger, srv *server.Server, pusher *push.Dispatcher, valkey *valkeyPort, node *raft.Node, grace time.Duration) error {
	start := time.Now()
	srv.Drain()
	valkey.drain()
	lingering, stop := context.WithTimeout(context.Background(), grace)
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), shutdownPatience)
	defer cancel()
	if err := node.Leave(ctx); err != nil {
		log.Warn("the node is still needed", "error", err)
	}
	go func() {
		select {
		case <-node.Done():
			stop()
		case <-lingering.Done():
		}
	}()
	srv.Linger(lingering)
	// Another node pushes by now. What this one has begun goes on without it: the leases say what becomes of it.
	pushed, cut := context.WithTimeout(context.Background(), pushPatience)
	pusher.Drain(pushed)
	cut()
	// The node passes requests on to the leader until it is drained, so HTTP ends first.
	ctx, cancel = context.WithTimeout(context.Background(), shutdownPatience)
	defer cancel()
	if err := errors.Join(valkey.shutdown(ctx), srv.Shutdown(ctx)); err != nil {
		log.Warn("some requests were cut off", "error", err)
	}
	if err := node.Drain(ctx); err != nil {
		log.Warn("the node was not drained in full", "error", err)
	}
	if err := node.Close(); err != nil {
		return fmt.Errorf("close the node: %w", err)
	}
	log.Info("stopped", "after", time.Since(start).Round(time.Millisecond))
	return nil
}

// listenAs listens on the address of a flag.
func listenAs(ctx context.Context, flag, addr string) ([]net.Listener, error) {
	ls, err := server.Listen(ctx, addr)
	if err != nil {
		return nil, codedError{exitPrecondition, fmt.Errorf("%s %s: %w", flag, addr, err)}
	}
	return ls, nil
}

func closeAll(ls []net.Listener) {
	for _, l := range ls {
		l.Close()
	}
}

// notifySystemd tells a supervisor that asked for it (NOTIFY_SOCKET) about the process's state. A supervisor that
// cannot be told is no reason to fail.
func notifySystemd(state string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	if strings.HasPrefix(path, "@") {
		path = "\x00" + path[1:] // an abstract socket
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = conn.Write([]byte(state))
}
