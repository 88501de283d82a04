package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"tercet.dev/tercet/bench"
)

// crowded is the number of CPUs lost to other work and to the hypervisor above which a measurement is marked and
// repeated: repetitions differ severalfold then.
const crowded = 0.6

// attemptsMax bounds how often a crowded measurement is made.
const attemptsMax = 3

// measurement is one contender's turn at a line.
type measurement struct {
	Contender contender `json:"contender"`
	Round     int       `json:"round"`
	Attempt   int       `json:"attempt"`
	// Phase is "fill" or "drain" in a line with Drain.
	Phase    string         `json:"phase,omitempty"`
	At       time.Time      `json:"at"`
	Workload bench.Workload `json:"workload"`

	Elapsed               time.Duration      `json:"elapsed"`
	Messages              int64              `json:"messages"`
	Acknowledged          int64              `json:"acknowledged,omitempty"`
	MessagesPerSecond     float64            `json:"messagesPerSecond"`
	BytesPerSecond        float64            `json:"bytesPerSecond"`
	AcknowledgedPerSecond float64            `json:"acknowledgedPerSecond,omitempty"`
	Publish               bench.Percentiles  `json:"publish"`
	Receive               *bench.Percentiles `json:"receive,omitempty"`
	EndToEnd              *bench.Percentiles `json:"endToEnd,omitempty"`
	Failed                map[string]int64   `json:"failed,omitempty"`
	Zones                 map[int]int64      `json:"zones,omitempty"`

	CPU bench.CPUReport `json:"cpu"`
	// Micros of CPU time per message: of all servers, of one on average, of the client.
	ServerMicros float64 `json:"serverUs"`
	NodeMicros   float64 `json:"nodeUs"`
	ClientMicros float64 `json:"clientUs"`
	// WrittenPerByte is what one server had written to the disk per byte of body, on average.
	WrittenPerByte float64 `json:"writtenPerByte,omitempty"`
	// LostCores went to other programs and to the hypervisor; Crowded says that they were too many.
	LostCores float64 `json:"lostCores"`
	Crowded   bool    `json:"crowded,omitempty"`
	// Error is why there is no result.
	Error string `json:"error,omitempty"`
}

// rate is the figure that lines compare: messages a second that were published, or, where consumers take part,
// acknowledged by them.
func (m *measurement) rate() float64 {
	if m.Workload.Consumers > 0 {
		return m.AcknowledgedPerSecond
	}
	return m.MessagesPerSecond
}

// lineResult is a line with what came of it.
type lineResult struct {
	line
	// Probes are of the minute in which the line began: one block by one stream, then larger writes by three.
	Probes       []bench.ProbeResult `json:"probes"`
	Measurements []measurement       `json:"measurements"`
}

// systemResult is a system as it was measured.
type systemResult struct {
	Name    string `json:"name"`
	Version string `json:"version,omitempty"`
	Promise string `json:"promise"`
	// Skipped says why it was not measured.
	Skipped string `json:"skipped,omitempty"`
}

// results is everything a run found out, as it is written to results.json.
type results struct {
	Command string         `json:"command"`
	Version string         `json:"version"`
	At      time.Time      `json:"at"`
	Took    time.Duration  `json:"took"`
	Machine bench.Machine  `json:"machine"`
	Systems []systemResult `json:"systems"`
	Lines   []lineResult   `json:"lines"`
	// Closed are ways into a system that were left out, and why.
	Closed []string `json:"closed,omitempty"`
	// Kill is a kill of the leader under load, Disk what the disk does.
	Kill *bench.DisruptReport `json:"kill,omitempty"`
	Disk []bench.ProbeResult  `json:"disk,omitempty"`
}

// runner carries out a run.
type runner struct {
	host    *host
	dir     string // for the servers' data
	systems []system
	view    *view
	// deadline is when no more repetitions are made.
	deadline time.Time
	strict   bool // any error ends the run, and nothing is repeated
	// probe is how long each probe takes.
	probe time.Duration

	clusters map[string]cluster
	skipped  map[string]string
	runs     int
	results  *results
}

// lasting systems run from the begin to the end, so that they can take turns within a minute; the others are started
// for each of their turns.
func lasting(name string) bool { return !strings.Contains(name, "+") }

func (r *runner) system(name string) (system, bool) {
	i := slices.IndexFunc(r.systems, func(s system) bool { return s.name() == name })
	if i < 0 {
		return nil, false
	}
	return r.systems[i], true
}

// startPatience bounds the start of one system.
const startPatience = 2 * time.Minute

// start starts a system, or says why it is not there.
func (r *runner) start(ctx context.Context, s system) (cluster, error) {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	r.view.status("starting %s", s.name())
	r.runs++
	return s.start(ctx, r.host, filepath.Join(r.dir, fmt.Sprintf("%s-%d", s.name(), r.runs)))
}

// startLasting starts all systems that the lines need and that last.
func (r *runner) startLasting(ctx context.Context, lines []line) error {
	for _, s := range r.systems {
		needed := slices.ContainsFunc(lines, func(l line) bool {
			return slices.ContainsFunc(l.Contenders, func(c contender) bool { return c.System == s.name() })
		})
		if !needed {
			continue
		}
		found := systemResult{Name: s.name(), Promise: s.promise()}
		if how := s.missing(); how != "" {
			found.Skipped = "not installed: " + how
		} else if lasting(s.name()) {
			c, err := r.start(ctx, s)
			if err != nil {
				if r.strict || ctx.Err() != nil {
					return fmt.Errorf("%s: %w", s.name(), err)
				}
				found.Skipped = "did not start: " + err.Error()
			} else {
				r.clusters[s.name()] = c
				found.Version = c.version()
			}
		}
		if found.Skipped != "" {
			r.skipped[s.name()] = found.Skipped
			r.view.note("%s is left out: %s", s.name(), found.Skipped)
		}
		r.results.Systems = append(r.results.Systems, found)
	}
	return nil
}

// stopAll stops what runs.
func (r *runner) stopAll() {
	for _, c := range r.clusters {
		c.stop()
	}
}

// probes are the sizes of writes that three streams are probed with for the limits in the pictures.
var probeSizes = []int64{4 << 10, 256 << 10}

// run carries out the lines.
func (r *runner) run(ctx context.Context, lines []line) error {
	if err := r.startLasting(ctx, lines); err != nil {
		return err
	}
	for i, l := range lines {
		r.view.line(i, len(lines), l)
		done := lineResult{line: l}
		if l.HalfOf == "" {
			for j, size := range probeSizes {
				p, err := bench.Probe(ctx, bench.ProbeOptions{
					Dir: r.dir, Direct: bench.DirectWorks(r.dir), Prefilled: true, Size: size, Streams: 1 + 2*j, Duration: r.probe,
				})
				if err != nil {
					return err
				}
				done.Probes = append(done.Probes, p)
			}
		}
		for round := 1; round <= max(1, l.Rounds); round++ {
			for _, c := range l.Contenders {
				ms, err := r.turn(ctx, l, c, round)
				done.Measurements = append(done.Measurements, ms...)
				if err != nil {
					return err
				}
			}
		}
		r.results.Lines = append(r.results.Lines, done)
	}
	return nil
}

// turn measures a contender once, and again while the machine is crowded and there is time.
func (r *runner) turn(ctx context.Context, l line, c contender, round int) ([]measurement, error) {
	if r.skipped[c.System] != "" || r.skipped[c.String()] != "" {
		return nil, nil
	}
	s, ok := r.system(c.System)
	if !ok {
		return nil, nil
	}
	clusterOf, ok := r.clusters[c.System]
	if !ok {
		var err error
		if clusterOf, err = r.start(ctx, s); err != nil {
			return []measurement{{Contender: c, Round: round, At: time.Now(), Error: err.Error()}}, r.unless(ctx, err)
		}
		defer clusterOf.stop()
		i := slices.IndexFunc(r.results.Systems, func(s systemResult) bool { return s.Name == c.System })
		r.results.Systems[i].Version = clusterOf.version()
	}
	if some, ok := clusterOf.(refusing); ok {
		if why := some.refuses(c.Way); why != "" {
			r.skipped[c.String()] = why
			r.results.Closed = append(r.results.Closed, c.String()+": "+why)
			r.view.note("%s is left out: %s", c, why)
			return nil, nil
		}
	}
	var all []measurement
	for attempt := 1; ; attempt++ {
		ms, err := r.measure(ctx, clusterOf, l, c)
		again := attempt < attemptsMax && time.Now().Before(r.deadline) && !l.Drain && !r.strict
		for i := range ms {
			ms[i].Round, ms[i].Attempt = round, attempt
			again = again && ms[i].Crowded
			r.view.measured(l, &ms[i])
		}
		all = append(all, ms...)
		if err != nil || !again {
			return all, r.unless(ctx, err)
		}
	}
}

// unless swallows an error that the run survives.
func (r *runner) unless(ctx context.Context, err error) error {
	if err != nil && ctx.Err() == nil && !r.strict {
		r.view.note("%v", err)
		return nil
	}
	return err
}

// measure makes one measurement, or two in a line with Drain.
func (r *runner) measure(ctx context.Context, c cluster, l line, who contender) ([]measurement, error) {
	w := l.W
	r.runs++
	w.Topic = fmt.Sprintf("bench-%d", r.runs)
	if l.HalfOf != "" {
		best := r.best(l.HalfOf, who)
		if best == 0 {
			return nil, nil
		}
		w.Rate = best / 2
	}
	if err := bench.Fits(r.dir, w, 3); err != nil {
		return nil, err
	}
	phases := []string{""}
	if l.Drain {
		phases = []string{"fill", "drain"}
	}
	var all []measurement
	var failed error
	for _, phase := range phases {
		now := w
		switch phase {
		case "fill":
			now.Consumers = 0
		case "drain":
			now.Publishers, now.Messages = 0, max(w.Messages, all[0].Messages)
		}
		m, err := r.once(ctx, c, now, who)
		m.Phase = phase
		all = append(all, m)
		if err != nil {
			failed = fmt.Errorf("%s, %s: %w", l.Name, who, err)
			break
		}
	}
	clean, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := c.clean(clean, w); err != nil && failed == nil {
		failed = fmt.Errorf("%s, %s: clean up: %w", l.Name, who, err)
	}
	// What one contender left in the page cache is not written at the expense of the next.
	syncDisk()
	return all, failed
}

// countedPatience bounds a workload of a number of messages, if that is small.
const countedPatience = 30 * time.Second

// once runs a workload with an account of CPU time.
func (r *runner) once(ctx context.Context, c cluster, w bench.Workload, who contender) (measurement, error) {
	m := measurement{Contender: who, At: time.Now(), Workload: w}
	if w.Messages > 0 {
		// A system that refuses everything never has so many messages.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, max(countedPatience, time.Duration(w.Messages)*time.Millisecond))
		defer cancel()
	}
	var meter *bench.Meter
	var failed error
	res, err := c.run(ctx, w, who.Way, bench.Hooks{
		Begin: func() { meter, failed = bench.StartMeter(c.pids()) },
		End: func() {
			if failed == nil {
				m.CPU, failed = meter.Stop()
			}
		},
		Progress: r.view.progress,
	})
	if err := errors.Join(err, failed); err != nil {
		if res != nil && len(res.Failed) > 0 {
			err = fmt.Errorf("%w; failed: %v", err, res.Failed)
		}
		m.Error = err.Error()
		return m, err
	}
	m.fill(res)
	if m.Messages+m.Acknowledged == 0 {
		err := fmt.Errorf("nothing was done; failed: %v", res.Failed)
		m.Error = err.Error()
		return m, err
	}
	return m, nil
}

// fill computes the figures.
func (m *measurement) fill(res *bench.Result) {
	seconds := res.Elapsed.Seconds()
	m.Elapsed, m.Messages, m.Acknowledged, m.Failed, m.Zones = res.Elapsed, res.Messages, res.Acknowledged, res.Failed, res.Zones
	if seconds > 0 {
		m.MessagesPerSecond, m.BytesPerSecond = float64(res.Messages)/seconds, float64(res.Bytes)/seconds
		m.AcknowledgedPerSecond = float64(res.Acknowledged) / seconds
	}
	m.Publish = res.Publish.Percentiles()
	if m.Workload.Consumers > 0 {
		receive := res.Receive.Percentiles()
		m.Receive = &receive
	}
	if m.Workload.Timed {
		endToEnd := res.EndToEnd.Percentiles()
		m.EndToEnd = &endToEnd
	}
	messages := float64(res.Messages)
	if m.Workload.Publishers == 0 {
		messages = float64(res.Acknowledged)
	}
	m.LostCores = m.CPU.LostCores()
	m.Crowded = m.LostCores > crowded
	if messages == 0 {
		return
	}
	m.ServerMicros = float64(m.CPU.Servers().Microseconds()) / messages
	m.NodeMicros = m.ServerMicros / float64(max(1, len(m.CPU.Processes)))
	m.ClientMicros = float64(m.CPU.Client.CPU().Microseconds()) / messages
	var written int64
	for _, u := range m.CPU.Processes {
		written += u.Written
	}
	if res.Bytes > 0 {
		m.WrittenPerByte = float64(written) / float64(len(m.CPU.Processes)) / float64(res.Bytes)
	}
}

// best is the highest rate that a contender reached in a line.
func (r *runner) best(name string, who contender) float64 {
	best := 0.0
	for _, l := range r.results.Lines {
		if l.Name != name {
			continue
		}
		for _, m := range l.Measurements {
			if m.Contender == who {
				best = max(best, m.rate())
			}
		}
	}
	return best
}

// removeData removes the servers' data.
func (r *runner) removeData() { _ = os.RemoveAll(r.dir) } // what cannot be removed stays in the temporary directory
