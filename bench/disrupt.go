package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"tercet.dev/tercet/server/wire"
)

// Disruption is what is done to a cluster under load.
type Disruption string

// The disruptions.
const (
	// KillLeader and KillFollower end a server with SIGKILL.
	KillLeader   Disruption = "leader"
	KillFollower Disruption = "follower"
	// TermLeader asks the leader to stop with SIGTERM.
	TermLeader Disruption = "term-leader"
	// PauseLeader stops the leader with SIGSTOP for ten seconds.
	PauseLeader Disruption = "pause-leader"
)

// ParseDisruption checks a disruption's name.
func ParseDisruption(s string) (Disruption, error) {
	switch d := Disruption(s); d {
	case KillLeader, KillFollower, TermLeader, PauseLeader:
		return d, nil
	}
	return "", fmt.Errorf("%q: want %s, %s, %s or %s", s, KillLeader, KillFollower, TermLeader, PauseLeader)
}

// pauseTime is how long PauseLeader stops the leader.
const pauseTime = 10 * time.Second

// disruptedTimeout bounds a request of a disrupted run: a client of a stopped server goes to another one then.
const disruptedTimeout = 5 * time.Second

// DisruptReport says what clients saw of a disruption.
type DisruptReport struct {
	Command    string     `json:"command,omitempty"`
	Version    string     `json:"version,omitempty"`
	At         time.Time  `json:"at"`
	Machine    Machine    `json:"machine"`
	Disruption Disruption `json:"disruption"`
	// Victim is the server it was done to, Leader who led before and NewLeader after.
	Victim    string   `json:"victim"`
	Leader    string   `json:"leader"`
	NewLeader string   `json:"newLeader"`
	Workload  Workload `json:"workload"`
	// Gap is the longest time without any acknowledgement by the other servers, from the disruption on. GapBefore is
	// the longest one before it.
	Gap       time.Duration `json:"gap"`
	GapBefore time.Duration `json:"gapBefore"`
	// Longest is the longest time that a publish through another server took.
	Longest time.Duration `json:"longest"`
	// Timeline counts answers in steps of TimelineStep since the load began, and DisruptedAt is on it.
	Timeline    []TimelineStep `json:"timeline"`
	DisruptedAt time.Duration  `json:"disruptedAt"`
	// Failed counts requests by error: at the other servers, and at the victim.
	Failed       map[string]int64 `json:"failed"`
	FailedVictim map[string]int64 `json:"failedVictim"`
	// Balance is the account of every message, made by receiving all of them afterwards.
	Balance Balance `json:"balance"`
	// InSyncAgain is how long it took until all zones were in sync again, from the disruption's end. Negative: they
	// were not.
	InSyncAgain time.Duration `json:"inSyncAgain"`
	// StateHashes are the replicas', at the same applied index. Equal is set if they agree.
	StateHashes map[string]string `json:"stateHashes"`
	Equal       bool              `json:"equal"`
}

// TimelineEvery is the length of a step of a timeline.
const TimelineEvery = 100 * time.Millisecond

// TimelineStep counts the answers of a tenth of a second, those of the victim included.
type TimelineStep struct {
	Acknowledged int64 `json:"acknowledged"`
	Failed       int64 `json:"failed,omitempty"`
	// Longest is the longest time that a publish took which was acknowledged in this step.
	Longest time.Duration `json:"longest"`
}

// signaller sends signals to processes; it is replaced in tests.
type signaller func(pid int, s os.Signal) error

func signalProcess(pid int, s os.Signal) error {
	p, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	return p.Signal(s)
}

// Disrupt publishes stamped messages to all servers, does d to one of them halfway, and accounts for every message
// afterwards. The servers are expected to be started again by whoever started them.
func Disrupt(ctx context.Context, s *Subject, w Workload, d Disruption) (*DisruptReport, error) {
	w.Stamped, w.Batch, w.Consumers = true, 1, 0
	if err := w.Validate(); err != nil {
		return nil, err
	}
	if s.Pids == nil {
		return nil, errors.New("the bench disrupts only servers that it started")
	}
	cluster, err := s.waitLeader(ctx)
	if err != nil {
		return nil, err
	}
	r := &DisruptReport{
		At: time.Now(), Machine: ThisMachine(s.Dir), Disruption: d, Leader: cluster.Leader, Victim: cluster.Leader, Workload: w,
	}
	if d == KillFollower {
		for _, n := range s.Nodes {
			if n.ID != cluster.Leader {
				r.Victim = n.ID
				break
			}
		}
	}
	victim := slices.IndexFunc(s.Nodes, func(n SubjectNode) bool { return n.ID == r.Victim })
	if victim < 0 {
		return nil, fmt.Errorf("the leader %s is none of the servers", r.Victim)
	}

	ledger := NewLedger()
	watch := newGapWatch(len(s.Nodes), victim)
	driver := &HTTPDriver{Addrs: s.httpAddrs(), Workload: w, Timeout: disruptedTimeout}
	if err := driver.Prepare(); err != nil {
		return nil, err
	}
	disrupted := make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	_, err = Run(ctx, w, driver, Hooks{
		Begin: func() {
			go func() {
				pause(ctx, w.Duration/3)
				disrupted <- disrupt(ctx, s, d, r.Victim, watch, signalProcess)
			}()
		},
		Published: func(i int, ack Ack, err error) {
			watch.published(i, time.Now(), err)
			if err == nil {
				ledger.Acknowledged(ack.Stamp)
			}
		},
	})
	if err != nil {
		return nil, err
	}
	if err := <-disrupted; err != nil {
		return nil, err
	}
	ended := time.Now()
	watch.fill(r, ended)

	after, err := s.waitInSync(ctx)
	r.InSyncAgain = time.Since(ended)
	if err != nil {
		r.InSyncAgain = -1
		if after, err = s.waitLeader(ctx); err != nil {
			return r, err
		}
	}
	r.NewLeader = after.Leader
	if err := account(ctx, s, w, "account", ledger); err != nil {
		return r, err
	}
	r.Balance = ledger.Balance()
	r.StateHashes, r.Equal = s.stateHashes(ctx)
	return r, nil
}

// disrupt does it to the victim and ends it.
func disrupt(ctx context.Context, s *Subject, d Disruption, victim string, watch *gapWatch, send signaller) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	pid := s.Pids()[victim]
	if pid == 0 {
		return fmt.Errorf("server %s does not run", victim)
	}
	watch.disrupt(time.Now())
	switch d {
	case KillLeader, KillFollower:
		return send(pid, os.Kill)
	case TermLeader:
		return send(pid, terminate)
	case PauseLeader:
		if err := send(pid, stopProcess); err != nil {
			return err
		}
		pause(ctx, pauseTime)
		return send(pid, continueProcess)
	}
	return fmt.Errorf("disruption %q", d)
}

// gapWatch finds the longest time without an acknowledgement. Publishers whose first server is the victim are kept
// apart: what they see depends on how soon they turn to another one.
type gapWatch struct {
	mu     sync.Mutex
	nodes  int
	victim int

	began     time.Time // of the load
	timeline  []TimelineStep
	last      time.Time // acknowledgement by another server
	disrupted time.Time
	gap       [2]time.Duration // before and after the disruption
	longest   time.Duration
	sent      map[int]time.Time // when each publisher got its last answer, and so sent what it waits for now
	failed    [2]map[string]int64
}

func newGapWatch(nodes, victim int) *gapWatch {
	return &gapWatch{
		began: time.Now(), nodes: nodes, victim: victim, sent: map[int]time.Time{}, failed: [2]map[string]int64{{}, {}},
	}
}

func (g *gapWatch) disrupt(at time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.disrupted = at
}

// published takes note of an answer to publisher i.
func (g *gapWatch) published(i int, at time.Time, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	side := 0
	if i%g.nodes == g.victim {
		side = 1
	}
	if err != nil {
		g.failed[side][codeName(err)]++
	}
	g.step(i, at, err)
	if side == 0 && !g.disrupted.IsZero() {
		if sent := g.sent[i]; !sent.IsZero() {
			g.longest = max(g.longest, at.Sub(sent))
		}
	}
	g.sent[i] = at
	if err != nil || side == 1 {
		return
	}
	g.close(at)
}

// timelineMax bounds a timeline: an hour.
const timelineMax = int(time.Hour / TimelineEvery)

// step enters an answer to publisher i in the timeline.
func (g *gapWatch) step(i int, at time.Time, err error) {
	n := int(at.Sub(g.began) / TimelineEvery)
	if n < 0 || n >= timelineMax {
		return
	}
	for len(g.timeline) <= n {
		g.timeline = append(g.timeline, TimelineStep{})
	}
	step := &g.timeline[n]
	if err != nil {
		step.Failed++
		return
	}
	step.Acknowledged++
	if sent := g.sent[i]; !sent.IsZero() {
		step.Longest = max(step.Longest, at.Sub(sent))
	}
}

// close ends the gap that began with the last acknowledgement.
func (g *gapWatch) close(at time.Time) {
	if !g.last.IsZero() && at.After(g.last) {
		after := 0
		if !g.disrupted.IsZero() && at.After(g.disrupted) {
			after = 1
		}
		g.gap[after] = max(g.gap[after], at.Sub(g.last))
	}
	if at.After(g.last) {
		g.last = at
	}
}

// fill reports. A gap that lasts until the end counts as well.
func (g *gapWatch) fill(r *DisruptReport, end time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.close(end)
	r.GapBefore, r.Gap, r.Longest = g.gap[0], g.gap[1], g.longest
	r.Failed, r.FailedVictim = g.failed[0], g.failed[1]
	r.Timeline, r.DisruptedAt = g.timeline, g.disrupted.Sub(g.began)
}

// The consumers that account for a run's messages, and how long they look for one that is missing.
const (
	accountConsumers = 16
	accountPatience  = 15 * time.Second
)

// account receives and acknowledges everything in the topic, as a group that has not been there before.
func account(ctx context.Context, s *Subject, w Workload, group string, ledger *Ledger) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w.Publishers, w.Consumers, w.Group, w.ReceiveMax = 0, accountConsumers, group, 10
	w.Rate, w.Messages = 0, 1<<62 // until nothing more comes
	var mu sync.Mutex
	var bad error
	driver := &HTTPDriver{Addrs: s.httpAddrs(), Workload: w}
	found := func(_ int, body []byte) {
		stamp, err := parseStamp(body)
		if err != nil {
			mu.Lock()
			bad = err
			mu.Unlock()
			return
		}
		ledger.Found(stamp)
	}
	if err := driver.Prepare(); err != nil {
		return err
	}
	last, lastAt := int64(-1), time.Now()
	_, err := Run(ctx, w, driver, Hooks{Received: found, Progress: func(_, acknowledged int64) {
		if acknowledged != last {
			last, lastAt = acknowledged, time.Now()
		}
		// All are there: what else there is comes at once or never. Otherwise leases of an earlier attempt may have
		// to run out first.
		quiet := time.Since(lastAt)
		if quiet > 3*time.Second && ledger.Missing() == 0 || quiet > accountPatience {
			cancel()
		}
	}})
	if err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	mu.Lock()
	defer mu.Unlock()
	return bad
}

// stateHashes asks all servers for their state's hash until they answer for the same applied index.
func (s *Subject) stateHashes(ctx context.Context) (hashes map[string]string, equal bool) {
	for range 100 {
		nodes := map[string]wire.Node{}
		for _, n := range s.Nodes {
			var doc wire.Node
			if err := getJSON(ctx, n.HTTP, "/v1/node", &doc); err == nil {
				nodes[n.ID] = doc
			}
		}
		hashes = map[string]string{}
		indexes, values := map[uint64]bool{}, map[string]bool{}
		for id, doc := range nodes {
			hashes[id] = fmt.Sprintf("%s at %d", doc.StateHash, doc.AppliedIndex)
			indexes[doc.AppliedIndex], values[doc.StateHash] = true, true
		}
		if len(nodes) == len(s.Nodes) && len(indexes) == 1 {
			return hashes, len(values) == 1
		}
		pause(ctx, 100*time.Millisecond)
	}
	return hashes, false
}

// Text writes the report for people.
func (r *DisruptReport) Text(w io.Writer) error {
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
	row("done", "%s, to %s; leader before %s, after %s", r.Disruption, r.Victim, r.Leader, r.NewLeader)
	row("gap", "%d ms without an acknowledgement by the other servers (before it %d ms)", r.Gap.Milliseconds(),
		r.GapBefore.Milliseconds())
	row("longest", "%d ms for one publish through them", r.Longest.Milliseconds())
	none := func(failed map[string]int64) string {
		if len(failed) == 0 {
			return "none"
		}
		return failuresText(failed)
	}
	row("failed", "through the other servers: %s; through the victim: %s", none(r.Failed), none(r.FailedVictim))
	if r.InSyncAgain >= 0 {
		row("in sync", "all zones, %s after the load ended", r.InSyncAgain.Round(time.Millisecond))
	} else {
		row("in sync", "not all zones, "+inSyncPatience.String()+" after the load ended")
	}
	row("account", "%s acknowledged, lost=%d, %d duplicates, %d found without an acknowledgement",
		FormatCount(float64(r.Balance.Acknowledged)), r.Balance.Lost, r.Balance.Duplicates, r.Balance.Unacknowledged)
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
