package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// FaultKind is what is done to servers under load, again and again.
type FaultKind string

// The faults.
const (
	// FaultKill ends processes with SIGKILL.
	FaultKill FaultKind = "kill"
	// FaultPause stops processes with SIGSTOP for a while.
	FaultPause FaultKind = "pause"
	// FaultPower cuts servers off from their disks and ends them: what was not synced is gone.
	FaultPower FaultKind = "power"
)

// ParseFaults checks names of faults.
func ParseFaults(names []string) ([]FaultKind, error) {
	var kinds []FaultKind
	for _, name := range names {
		switch k := FaultKind(name); k {
		case FaultKill, FaultPause, FaultPower:
			kinds = append(kinds, k)
		default:
			return nil, fmt.Errorf("%q: want %s, %s or %s", name, FaultKill, FaultPause, FaultPower)
		}
	}
	if len(kinds) == 0 {
		return nil, errors.New("no faults")
	}
	return kinds, nil
}

// DurabilityPlan says how durability is put to the test.
type DurabilityPlan struct {
	// Workload is published, stamped, by clients of all servers. Its Duration is the time under faults.
	Workload Workload
	// Faults take turns at random, one begins Every so often. Seed decides which, and whom they hit.
	Faults []FaultKind
	Every  time.Duration
	Seed   uint64
	// Volumes hold the servers' data by node id; FaultPower needs them.
	Volumes map[string]*Volume
	// Alone ends the cluster, which is of no more use then, and starts what one zone holds as a cluster of its own.
	// stop ends that.
	Alone func(ctx context.Context, node string) (s *Subject, stop func(), err error)
	// Progress is called about once a second while the load runs, Notice for each event.
	Progress func(published, acknowledged int64)
	Notice   func(line string)
}

// FaultDone is one fault as it was carried out.
type FaultDone struct {
	// At counts from the begin of the load.
	At      time.Duration `json:"at"`
	Kind    FaultKind     `json:"kind"`
	Victims []string      `json:"victims"`
	// For is how long a pause took.
	For time.Duration `json:"for,omitempty"`
}

// DurabilityReport is the proof.
type DurabilityReport struct {
	Command  string      `json:"command,omitempty"`
	Version  string      `json:"version,omitempty"`
	At       time.Time   `json:"at"`
	Machine  Machine     `json:"machine"`
	Workload Workload    `json:"workload"`
	Seed     uint64      `json:"seed"`
	Faults   []FaultDone `json:"faults"`
	// Failed counts requests by error: refused, or of unknown outcome.
	Failed map[string]int64 `json:"failed"`
	// Longest is the longest time in which no server acknowledged anything, Unavailable the sum of those of
	// unavailableFrom and more, Gaps their number.
	Longest     time.Duration `json:"longest"`
	Unavailable time.Duration `json:"unavailable"`
	Gaps        int           `json:"gaps"`
	// Balance is the account by a consumer group of the healed cluster.
	Balance Balance `json:"balance"`
	// Zones are the accounts of what each zone holds by itself.
	Zones []ZoneBalance `json:"zones"`
	// StateHashes are the replicas', at the same applied index. Equal is set if they agree.
	StateHashes map[string]string `json:"stateHashes"`
	Equal       bool              `json:"equal"`
}

// ZoneBalance is the account of one zone alone.
type ZoneBalance struct {
	Node string `json:"node"`
	Balance
}

// Lost is the largest number of acknowledged messages that are missing anywhere.
func (r *DurabilityReport) Lost() int64 {
	lost := r.Balance.Lost
	for _, z := range r.Zones {
		lost = max(lost, z.Lost)
	}
	return lost
}

// unavailableFrom is the length from which a time without acknowledgements counts as a gap.
const unavailableFrom = 250 * time.Millisecond

// The lengths of pauses: from one that nobody minds to one in which leadership moves on.
const (
	pauseMin = 500 * time.Millisecond
	pauseMax = 6 * time.Second
)

// Durability publishes under faults and then accounts for every message: through the healed cluster, and in each zone
// alone. The servers are expected to be started again by whoever started them, once their volumes are back.
func Durability(ctx context.Context, s *Subject, p DurabilityPlan) (*DurabilityReport, error) {
	w := p.Workload
	w.Stamped, w.Batch, w.Consumers = true, 1, 0
	if err := w.Validate(); err != nil {
		return nil, err
	}
	if s.Pids == nil {
		return nil, errors.New("the bench breaks only servers that it started")
	}
	r := &DurabilityReport{At: time.Now(), Machine: ThisMachine(s.Dir), Workload: w, Seed: p.Seed, Failed: map[string]int64{}}
	ledger, watch := NewLedger(), &silence{from: unavailableFrom}
	driver := &HTTPDriver{Addrs: s.httpAddrs(), Workload: w, Timeout: disruptedTimeout}
	if err := driver.Prepare(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	loading, stop := context.WithCancel(ctx)
	faults := make(chan error, 1)
	var result *Result
	var err error
	result, err = Run(ctx, w, driver, Hooks{
		Progress: p.Progress,
		Begin: func() {
			began := time.Now()
			go func() { faults <- p.breakAll(loading, s, began, r) }()
		},
		End: stop,
		Published: func(_ int, ack Ack, err error) {
			if err == nil {
				watch.acknowledged(time.Now())
				ledger.Acknowledged(ack.Stamp)
			}
		},
	})
	stop()
	if err != nil {
		return nil, err
	}
	if err := <-faults; err != nil {
		return nil, err
	}
	r.Failed = result.Failed
	r.Longest, r.Unavailable, r.Gaps = watch.longest, watch.sum, watch.gaps
	p.notice("the load is over, the cluster heals")
	if _, err := s.waitInSync(ctx); err != nil {
		return r, err
	}
	if err := account(ctx, s, w, "account", ledger); err != nil {
		return r, err
	}
	r.Balance = ledger.Balance()
	r.StateHashes, r.Equal = s.stateHashes(ctx)
	for _, n := range s.Nodes {
		p.notice("what does the zone of %s hold alone?", n.ID)
		b, err := p.alone(ctx, n.ID, w, ledger)
		if err != nil {
			return r, fmt.Errorf("the zone of %s: %w", n.ID, err)
		}
		r.Zones = append(r.Zones, ZoneBalance{n.ID, b})
	}
	return r, nil
}

func (p *DurabilityPlan) notice(format string, args ...any) {
	if p.Notice != nil {
		p.Notice(fmt.Sprintf(format, args...))
	}
}

// alone accounts for the messages by a consumer group of one zone started alone.
func (p *DurabilityPlan) alone(ctx context.Context, node string, w Workload, ledger *Ledger) (Balance, error) {
	s, stop, err := p.Alone(ctx, node)
	if err != nil {
		return Balance{}, err
	}
	defer stop()
	own := ledger.onlyAcknowledged()
	if err := account(ctx, s, w, "alone-"+node, own); err != nil {
		return Balance{}, err
	}
	return own.Balance(), nil
}

// breakAll carries out faults until the context ends, and heals what they left.
func (p *DurabilityPlan) breakAll(ctx context.Context, s *Subject, began time.Time, r *DurabilityReport) error {
	choose := rand.New(rand.NewPCG(p.Seed, 0))
	for {
		pause(ctx, p.Every)
		if ctx.Err() != nil {
			return nil
		}
		f := FaultDone{Kind: p.Faults[choose.IntN(len(p.Faults))], Victims: victims(choose, s)}
		if f.Kind == FaultPause {
			f.For = pauseMin + time.Duration(choose.Int64N(int64(pauseMax-pauseMin)))
		}
		f.At = time.Since(began)
		pids := s.Pids()
		// Who does not run at the moment is on its way back from the fault before.
		f.Victims = slices.DeleteFunc(f.Victims, func(id string) bool { return pids[id] == 0 })
		if len(f.Victims) == 0 {
			continue
		}
		p.notice("%s: %s of %s", f.At.Round(100*time.Millisecond), f.Kind, strings.Join(f.Victims, ", "))
		if err := p.carryOut(ctx, f, pids); err != nil {
			return fmt.Errorf("%s of %v: %w", f.Kind, f.Victims, err)
		}
		r.Faults = append(r.Faults, f)
	}
}

// victims draws one server mostly, and all of them in one of five cases.
func victims(choose *rand.Rand, s *Subject) []string {
	var all []string
	for _, n := range s.Nodes {
		all = append(all, n.ID)
	}
	if choose.IntN(5) == 0 {
		return all
	}
	i := choose.IntN(len(all))
	return all[i : i+1]
}

// carryOut does one fault and ends it. A process that ended meanwhile is no error.
func (p *DurabilityPlan) carryOut(ctx context.Context, f FaultDone, pids map[string]int) error {
	send := func(id string, sig os.Signal) error {
		if err := signalProcess(pids[id], sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		return nil
	}
	each := func(do func(id string) error) error {
		var failed error
		for _, id := range f.Victims {
			failed = errors.Join(failed, do(id))
		}
		return failed
	}
	switch f.Kind {
	case FaultKill:
		return each(func(id string) error { return send(id, os.Kill) })
	case FaultPause:
		err := each(func(id string) error { return send(id, stopProcess) })
		pause(ctx, f.For)
		return errors.Join(err, each(func(id string) error { return send(id, continueProcess) }))
	case FaultPower:
		// Stopped first, so that no answer leaves a server whose disk has forgotten what it says.
		err := each(func(id string) error { return send(id, stopProcess) })
		err = errors.Join(err, each(func(id string) error { return p.Volumes[id].cut() }))
		err = errors.Join(err, each(func(id string) error { return send(id, os.Kill) }))
		return errors.Join(err, each(func(id string) error { return p.Volumes[id].restore(ctx) }))
	}
	return fmt.Errorf("fault %q", f.Kind)
}

// silence measures times without acknowledgements.
type silence struct {
	from time.Duration

	mu      sync.Mutex
	last    time.Time
	longest time.Duration
	sum     time.Duration
	gaps    int
}

// acknowledged takes note of one.
func (s *silence) acknowledged(at time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if gap := at.Sub(s.last); !s.last.IsZero() && gap > 0 {
		s.longest = max(s.longest, gap)
		if gap >= s.from {
			s.sum += gap
			s.gaps++
		}
	}
	if at.After(s.last) {
		s.last = at
	}
}

// Text writes the report for people.
func (r *DurabilityReport) Text(w io.Writer) error {
	var b strings.Builder
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-10s  "+format+"\n", append([]any{name}, args...)...)
	}
	if r.Command != "" {
		row("command", "%s", r.Command)
	}
	m := r.Machine
	row("machine", "%d × %s, Linux %s, %s; %s", m.CPUs, m.CPU, m.Kernel, m.Filesystem, r.At.UTC().Format(time.RFC3339))
	row("load", "%d publishers via http on all servers, %s each, for %s", r.Workload.Publishers, FormatBytes(int64(r.Workload.Size)),
		r.Workload.Duration)
	counts := map[string]int{}
	for _, f := range r.Faults {
		counts[fmt.Sprintf("%s of %d", f.Kind, len(f.Victims))]++
	}
	var kinds []string
	for _, k := range slices.Sorted(maps.Keys(counts)) {
		kinds = append(kinds, fmt.Sprintf("%d × %s", counts[k], k))
	}
	row("faults", "%d with seed %d: %s", len(r.Faults), r.Seed, strings.Join(kinds, ", "))
	row("gaps", "%d of %d ms and more without an acknowledgement, %.1f s together, the longest %d ms", r.Gaps,
		unavailableFrom.Milliseconds(), r.Unavailable.Seconds(), r.Longest.Milliseconds())
	if len(r.Failed) > 0 {
		row("failed", "%s", failuresText(r.Failed))
	}
	balance := func(name string, b Balance) {
		row(name, "%s acknowledged, lost=%d, %d duplicates, %d found without an acknowledgement", FormatCount(float64(b.Acknowledged)),
			b.Lost, b.Duplicates, b.Unacknowledged)
	}
	balance("cluster", r.Balance)
	for _, z := range r.Zones {
		balance(z.Node+" alone", z.Balance)
	}
	agree := "agree"
	if !r.Equal {
		agree = "do not agree"
	}
	var hashes []string
	for _, id := range slices.Sorted(maps.Keys(r.StateHashes)) {
		hashes = append(hashes, id+" "+r.StateHashes[id])
	}
	row("replicas", "%s: %s", agree, strings.Join(hashes, ", "))
	_, err := io.WriteString(w, b.String())
	return err
}
