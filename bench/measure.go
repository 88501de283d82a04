package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	"tercet.dev/tercet/wal/disk"
)

// Plan says how a subject is measured.
type Plan struct {
	Workload Workload
	// Via says where the publishers are: inside the leader, or clients in this process.
	Via Via
	// Spread sends clients' requests to all nodes in turn instead of the leader alone.
	Spread bool
	// Multipart sends batches over HTTP in the standard framing instead of the compact one.
	Multipart bool
	// Probe is how long each disk probe takes; 0 for none.
	Probe time.Duration
	// Token is the bearer token for HTTP.
	Token string
	// Progress is called about once a second while the workload runs.
	Progress func(published, acknowledged int64)
	// During is called when the part that counts has begun, on a goroutine of its own; Measure waits for it. It is
	// told who leads, and may for instance take profiles.
	During func(ctx context.Context, s *Subject, leader string)
}

// Via is a way into a cluster.
type Via string

// The ways.
const (
	// ViaLeader is publishers inside the leader's process: the replicated queue without a protocol.
	ViaLeader Via = "leader"
	// ViaHTTP is clients of the queue protocol.
	ViaHTTP Via = "http"
	// ViaRESP is clients of the Valkey port.
	ViaRESP Via = "resp"
)

// ParseVia checks a way's name.
func ParseVia(s string) (Via, error) {
	switch v := Via(s); v {
	case ViaLeader, ViaHTTP, ViaRESP:
		return v, nil
	}
	return "", fmt.Errorf("%q: want %s, %s or %s", s, ViaLeader, ViaHTTP, ViaRESP)
}

// Measure puts the workload on the subject and reports. The disk is probed before and after, in the same minute.
func Measure(ctx context.Context, s *Subject, p Plan) (*Report, error) {
	r := &Report{
		Variant: s.Variant, At: time.Now(), Machine: ThisMachine(s.Dir), Workload: p.Workload,
		Via: p.Via, EmulatedSync: s.Delay,
	}
	if err := s.identify(ctx); err != nil {
		return nil, err
	}
	cluster, err := s.waitLeader(ctx)
	if err != nil {
		return nil, err
	}
	leader, ok := s.node(cluster.Leader)
	if !ok && !p.Spread {
		return nil, fmt.Errorf("the leader %s is none of the given servers", cluster.Leader)
	}
	r.Leader, r.Durability, r.InSync = cluster.Leader, cluster.Durability, cluster.InSync
	if len(cluster.Nodes) > 0 {
		// Every node of the cluster runs the program that answered, as far as the bench started them.
		r.Nodes = len(cluster.Nodes)
	}
	probes := prober{dir: s.Dir, delay: s.Delay, duration: p.Probe, report: r}
	if s.Dir != "" {
		if err := Fits(s.Dir, p.Workload, len(s.Nodes)); err != nil {
			return nil, err
		}
	}
	// The log pads each sync to a block, so that this is what a single publisher waits for.
	if err := probes.run(ctx, disk.BlockSize, 1); err != nil {
		return nil, err
	}
	if err := r.load(ctx, s, p, leader); err != nil {
		return nil, err
	}
	if size := r.SyncBytes; size > 0 {
		if err := errors.Join(probes.run(ctx, size, 1), probes.run(ctx, size, 3)); err != nil {
			return nil, err
		}
	}
	r.finish()
	return r, nil
}

// load runs the workload and fills in what was counted meanwhile.
func (r *Report) load(ctx context.Context, s *Subject, p Plan, leader SubjectNode) error {
	var (
		before, after map[string]Counters
		meter         *Meter
		during        = make(chan struct{})
	)
	close(during)
	hooks := Hooks{
		Progress: p.Progress,
		Begin: func() {
			before = s.counters(ctx)
			if s.Pids != nil {
				// Without /proc there is no account; everything else stands.
				meter, _ = StartMeter(s.Pids())
			}
			if p.During != nil {
				during = make(chan struct{})
				go func() { defer close(during); p.During(ctx, s, leader.ID) }()
			}
		},
		End: func() {
			if meter != nil {
				if cpu, err := meter.Stop(); err == nil {
					r.CPU = &cpu
				}
			}
			after = s.counters(ctx)
		},
	}
	var err error
	nodes := []SubjectNode{leader}
	if p.Spread {
		nodes = s.Nodes
	}
	switch p.Via {
	case ViaHTTP:
		driver := &HTTPDriver{Workload: p.Workload, Multipart: p.Multipart, Token: p.Token}
		for _, n := range nodes {
			driver.Addrs = append(driver.Addrs, n.HTTP)
		}
		r.Result, err = runPrepared(ctx, p.Workload, driver, hooks)
	case ViaRESP:
		driver := &RESPDriver{Workload: p.Workload}
		for _, n := range nodes {
			if n.RESP == "" {
				return fmt.Errorf("server %s has no known Valkey port", n.ID)
			}
			driver.Addrs = append(driver.Addrs, n.RESP)
		}
		r.Result, err = runPrepared(ctx, p.Workload, driver, hooks)
	default:
		if leader.Endpoint == "" {
			return errors.New("publishers inside the leader's process need a cluster that the bench started")
		}
		r.Result, err = RunRemote(ctx, leader.Endpoint, p.Workload, hooks)
	}
	<-during
	if err != nil {
		return err
	}
	r.Counters = countersSince(after, before)
	if c := r.Counters[leader.ID]; c.Syncs > 0 {
		r.SyncBytes = int64(c.SyncBytes / c.Syncs)
	}
	return nil
}

// runPrepared prepares a driver and runs the workload with it.
func runPrepared(ctx context.Context, w Workload, d interface {
	Driver
	Prepare() error
}, hooks Hooks) (*Result, error) {
	if err := d.Prepare(); err != nil {
		return nil, err
	}
	return Run(ctx, w, d, hooks)
}

// prober runs the disk probes of one report.
type prober struct {
	dir      string
	delay    time.Duration
	duration time.Duration
	report   *Report
}

// run adds one probe to the report: in the log's mode, over prefilled blocks.
func (p *prober) run(ctx context.Context, size int64, streams int) error {
	if p.dir == "" || p.duration <= 0 {
		return nil
	}
	probe, err := Probe(ctx, ProbeOptions{
		Dir: p.dir, Direct: DirectWorks(p.dir), Prefilled: true, Size: size, Streams: streams,
		Duration: p.duration, Delay: p.delay,
	})
	if err == nil {
		p.report.Probes = append(p.report.Probes, probe)
	}
	return err
}

// The space a run may need, besides what it publishes: per node the log's prefilled segments, a memtable being
// written, and files waiting to be deleted.
const (
	nodeOverhead = 1 << 30
	// storedTwice: a payload byte is in the log and in the store.
	storedTwice = 2
	// expiryLag is how long expired messages may lie about until a checkpoint removes them.
	expiryLag = 60 * time.Second
	// rateGuess is a payload rate that no machine this is made for exceeds, in bytes a second, if no other bound
	// is known.
	rateGuess = 200 << 20
)

// Fits refuses a workload whose data would not fit the disk that holds the data of so many nodes in dir.
func Fits(dir string, w Workload, nodes int) error {
	free, err := disk.OS().Free(dir)
	if err != nil {
		return err
	}
	if need := spaceNeeded(w, nodes); need > free {
		return fmt.Errorf("the run may need %s in %s, where %s are free; make it shorter, slower or smaller",
			FormatBytes(need), dir, FormatBytes(free))
	}
	return nil
}

// spaceNeeded bounds the space that a workload takes on a disk shared by so many nodes.
func spaceNeeded(w Workload, nodes int) int64 {
	const perMessage = 64 // encoding
	message := w.MeanSize() + perMessage
	var payload float64
	switch alive := min(w.Warmup+w.Duration, w.Retention+expiryLag).Seconds(); {
	case w.Publishers == 0:
	case w.Messages > 0:
		payload = float64(w.Messages) * message
	case w.Rate > 0:
		payload = w.Rate * message * alive
	default:
		payload = rateGuess * alive
	}
	return int64(float64(nodes) * (payload*storedTwice + nodeOverhead))
}
