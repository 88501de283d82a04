package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// The campaigns are long runs that end in one figure: what a backlog costs, what acknowledged messages before the
// cursor cost, what expired messages leave behind.

// Fill publishes w.Messages messages through the leader's endpoint.
func Fill(ctx context.Context, s *Subject, w Workload, progress func(published, acknowledged int64)) (*Result, error) {
	cluster, err := s.waitLeader(ctx)
	if err != nil {
		return nil, err
	}
	leader, ok := s.node(cluster.Leader)
	if !ok || leader.Endpoint == "" {
		return nil, errors.New("the leader is no server that the bench started")
	}
	return RunRemote(ctx, leader.Endpoint, w, Hooks{Progress: progress})
}

// BacklogReport says what a backlog costs a node.
type BacklogReport struct {
	Command  string    `json:"command,omitempty"`
	Version  string    `json:"version,omitempty"`
	At       time.Time `json:"at"`
	Machine  Machine   `json:"machine"`
	Workload Workload  `json:"workload"`
	// FilledIn is how long publishing took, MessagesPerSecond its rate.
	FilledIn          time.Duration `json:"filledIn"`
	MessagesPerSecond float64       `json:"messagesPerSecond"`
	Nodes             []BacklogNode `json:"nodes"`
}

// BacklogNode is one server's part of a BacklogReport.
type BacklogNode struct {
	ID     string `json:"id"`
	Leader bool   `json:"leader"`
	// RSS is the process's memory after the fill, RSSRestarted after the restart.
	RSS          int64 `json:"rss"`
	RSSRestarted int64 `json:"rssRestarted"`
	// Data is the size of the data directory.
	Data int64 `json:"data"`
	// Ready is how long it took from the new process's start until /readyz said yes after kill -9.
	Ready time.Duration `json:"ready"`
}

// Backlog fills a topic and then kills one server after the other with SIGKILL, timing how long each takes until it
// is ready again. Whoever started the servers has to start them again.
func Backlog(ctx context.Context, s *Subject, w Workload, progress func(published, acknowledged int64)) (*BacklogReport, error) {
	if s.Pids == nil {
		return nil, errors.New("the bench kills only servers that it started")
	}
	r := &BacklogReport{At: time.Now(), Machine: ThisMachine(s.Dir), Workload: w}
	filled, err := Fill(ctx, s, w, progress)
	if err != nil {
		return nil, err
	}
	r.FilledIn, r.MessagesPerSecond = filled.Elapsed, filled.MessagesPerSecond()
	cluster, err := s.waitInSync(ctx)
	if err != nil {
		return r, err
	}
	for _, n := range s.Nodes {
		usage, err := ReadProcess(s.Pids()[n.ID])
		if err != nil {
			return nil, err
		}
		data, err := DiskUsage(n.Data)
		if err != nil {
			return nil, err
		}
		r.Nodes = append(r.Nodes, BacklogNode{ID: n.ID, Leader: n.ID == cluster.Leader, RSS: usage.RSS, Data: data})
	}
	for i, n := range s.Nodes {
		if r.Nodes[i].Ready, err = restart(ctx, s, n); err != nil {
			return r, err
		}
		if _, err := s.waitInSync(ctx); err != nil {
			return r, err
		}
		usage, err := ReadProcess(s.Pids()[n.ID])
		if err != nil {
			return r, err
		}
		r.Nodes[i].RSSRestarted = usage.RSS
	}
	return r, nil
}

// restartPatience bounds the wait for a killed server.
const restartPatience = 5 * time.Minute

// restart kills a server and returns how long its successor took to be ready.
func restart(ctx context.Context, s *Subject, n SubjectNode) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, restartPatience)
	defer cancel()
	old := s.Pids()[n.ID]
	if err := signalProcess(old, os.Kill); err != nil {
		return 0, err
	}
	var started time.Time
	for ; ctx.Err() == nil; pause(ctx, 2*time.Millisecond) {
		if pid := s.Pids()[n.ID]; started.IsZero() && pid != 0 && pid != old {
			started = time.Now()
		}
		if !started.IsZero() && ready(ctx, n.HTTP) {
			return time.Since(started), nil
		}
	}
	return 0, fmt.Errorf("server %s is not ready again: %w", n.ID, ctx.Err())
}

func ready(ctx context.Context, addr string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/readyz", nil)
	if err != nil {
		return false
	}
	resp, err := administration.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// DiskUsage is the space that the files below dir take, as du counts it.
func DiskUsage(dir string) (sum int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			var info fs.FileInfo
			if info, err = d.Info(); err == nil {
				sum += allocated(info)
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // deleted meanwhile
		}
		return err
	})
	return sum, err
}

// Text writes the report for people.
func (r *BacklogReport) Text(w io.Writer) error {
	var b strings.Builder
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-10s  "+format+"\n", append([]any{name}, args...)...)
	}
	if r.Command != "" {
		row("command", "%s", r.Command)
	}
	row("filled", "%s messages of %s in %s, %s a second", FormatCount(float64(r.Workload.Messages)),
		FormatBytes(int64(r.Workload.Size)), r.FilledIn.Round(time.Millisecond), FormatCount(r.MessagesPerSecond))
	for _, n := range r.Nodes {
		role := "follower"
		if n.Leader {
			role = "leader"
		}
		row(n.ID, "%s, %s of memory, %s on disk; ready %.2f s after its restart (kill -9), then %s of memory", role,
			FormatBytes(n.RSS), FormatBytes(n.Data), n.Ready.Seconds(), FormatBytes(n.RSSRestarted))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// DrainedReport compares receives of a topic with many acknowledged messages with those of one without.
type DrainedReport struct {
	Command  string    `json:"command,omitempty"`
	Version  string    `json:"version,omitempty"`
	At       time.Time `json:"at"`
	Machine  Machine   `json:"machine"`
	Workload Workload  `json:"workload"`
	// Filled and Drained are how the acknowledged messages came to be.
	FillPerSecond  float64 `json:"fillPerSecond"`
	DrainPerSecond float64 `json:"drainPerSecond"`
	// Of one message by one receive, in topics with and without acknowledged messages before the cursor.
	Drained Percentiles `json:"drained"`
	Empty   Percentiles `json:"empty"`
	// Ratio is the median with over the median without.
	Ratio float64 `json:"ratio"`
}

// receiveRounds is how many receives are timed in either topic.
const receiveRounds = 2000

// Drained publishes w.Messages messages, has w.Consumers acknowledge them all, and then times receives of single
// messages, in turn from that topic and from one that was empty before.
func Drained(ctx context.Context, s *Subject, w Workload, progress func(published, acknowledged int64)) (*DrainedReport, error) {
	r := &DrainedReport{At: time.Now(), Machine: ThisMachine(s.Dir), Workload: w}
	fill := w
	fill.Consumers = 0
	filled, err := Fill(ctx, s, fill, progress)
	if err != nil {
		return nil, err
	}
	drain := w
	drain.Publishers = 0
	// A few requests more than asked for may have been under way when the fill was complete.
	drain.Messages = max(w.Messages, filled.Messages)
	drained, err := Fill(ctx, s, drain, progress)
	if err != nil {
		return nil, err
	}
	r.FillPerSecond, r.DrainPerSecond = filled.MessagesPerSecond(), perSecond(drained.Acknowledged, drained.Elapsed)
	cluster, err := s.waitLeader(ctx)
	if err != nil {
		return nil, err
	}
	leader, ok := s.node(cluster.Leader)
	if !ok {
		return nil, fmt.Errorf("the leader %s is none of the servers", cluster.Leader)
	}
	empty := w
	empty.Topic += "-empty"
	var probes [2]*roundTrip
	for i, one := range []Workload{w, empty} {
		if probes[i], err = newRoundTrip(leader.HTTP, one); err != nil {
			return nil, err
		}
		defer probes[i].close()
	}
	for range receiveRounds {
		for _, p := range probes {
			if err := p.round(ctx); err != nil {
				return nil, err
			}
		}
	}
	r.Drained, r.Empty = probes[0].receive.Percentiles(), probes[1].receive.Percentiles()
	if r.Empty.P50 > 0 {
		r.Ratio = float64(r.Drained.P50) / float64(r.Empty.P50)
	}
	return r, nil
}

// roundTrip publishes one message, receives and acknowledges it, over and over.
type roundTrip struct {
	publisher Publisher
	consumer  Consumer
	receive   *Histogram
}

func newRoundTrip(addr string, w Workload) (*roundTrip, error) {
	w.Publishers, w.Consumers, w.Batch, w.ReceiveMax = 1, 1, 1, 1
	d := &HTTPDriver{Addrs: []string{addr}, Workload: w}
	if err := d.Prepare(); err != nil {
		return nil, err
	}
	p, err := d.Publisher(0)
	if err != nil {
		return nil, err
	}
	c, err := d.Consumer(0, nil)
	return &roundTrip{publisher: p, consumer: c, receive: NewHistogram()}, err
}

func (t *roundTrip) round(ctx context.Context) error {
	if _, err := t.publisher.Publish(ctx, time.Now()); err != nil {
		return err
	}
	began := time.Now()
	n, err := t.consumer.Receive(ctx)
	if err != nil {
		return err
	}
	if n != 1 {
		return fmt.Errorf("received %d messages of one", n)
	}
	t.receive.Record(time.Since(began))
	_, err = t.consumer.Settle(ctx)
	return err
}

func (t *roundTrip) close() {
	t.publisher.Close()
	t.consumer.Close()
}

// Text writes the report for people.
func (r *DrainedReport) Text(w io.Writer) error {
	var b strings.Builder
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-10s  "+format+"\n", append([]any{name}, args...)...)
	}
	if r.Command != "" {
		row("command", "%s", r.Command)
	}
	row("filled", "%s messages of %s at %s a second, acknowledged at %s a second", FormatCount(float64(r.Workload.Messages)),
		FormatBytes(int64(r.Workload.Size)), FormatCount(r.FillPerSecond), FormatCount(r.DrainPerSecond))
	row("drained", "receive %s", latencies(r.Drained))
	row("empty", "receive %s", latencies(r.Empty))
	row("ratio", "%.2f of the medians", r.Ratio)
	_, err := io.WriteString(w, b.String())
	return err
}

// ExpiryReport says what expired messages leave on the disk.
type ExpiryReport struct {
	Command  string    `json:"command,omitempty"`
	Version  string    `json:"version,omitempty"`
	At       time.Time `json:"at"`
	Machine  Machine   `json:"machine"`
	Workload Workload  `json:"workload"`
	// Payload is how many bytes of bodies were published, at so many bytes a second.
	Payload        int64         `json:"payload"`
	FilledIn       time.Duration `json:"filledIn"`
	BytesPerSecond float64       `json:"bytesPerSecond"`
	// Sizes are those of the data directories by node: when the last message was published, at their largest, and
	// at the end, when all messages have been expired for Waited.
	Filled map[string]int64 `json:"filled"`
	Peak   map[string]int64 `json:"peak"`
	End    map[string]int64 `json:"end"`
	Waited time.Duration    `json:"waited"`
}

// Expiry publishes w.Messages messages and measures the data directories until wait after the last one expired.
func Expiry(ctx context.Context, s *Subject, w Workload, wait time.Duration, progress func(published, acknowledged int64)) (*ExpiryReport, error) {
	r := &ExpiryReport{
		At: time.Now(), Machine: ThisMachine(s.Dir), Workload: w, Waited: wait,
		Filled: map[string]int64{}, Peak: map[string]int64{}, End: map[string]int64{},
	}
	sizes := func(into map[string]int64) error {
		for _, n := range s.Nodes {
			size, err := DiskUsage(n.Data)
			if err != nil {
				return err
			}
			into[n.ID] = size
			r.Peak[n.ID] = max(r.Peak[n.ID], size)
		}
		return nil
	}
	var watched error
	filled, err := Fill(ctx, s, w, func(p, a int64) {
		watched = sizes(map[string]int64{})
		if progress != nil {
			progress(p, a)
		}
	})
	if err := errors.Join(err, watched); err != nil {
		return nil, err
	}
	r.Payload = filled.Bytes
	r.FilledIn, r.BytesPerSecond = filled.Elapsed, perSecond(filled.Bytes, filled.Elapsed)
	if err := sizes(r.Filled); err != nil {
		return nil, err
	}
	for end := time.Now().Add(w.Retention + wait); time.Now().Before(end) && ctx.Err() == nil; pause(ctx, time.Second) {
		if err := sizes(r.End); err != nil {
			return nil, err
		}
	}
	return r, errors.Join(ctx.Err(), sizes(r.End))
}

// Text writes the report for people.
func (r *ExpiryReport) Text(w io.Writer) error {
	var b strings.Builder
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-10s  "+format+"\n", append([]any{name}, args...)...)
	}
	if r.Command != "" {
		row("command", "%s", r.Command)
	}
	row("published", "%s in %s, %s/s, retention %s", FormatBytes(r.Payload), r.FilledIn.Round(time.Millisecond),
		FormatBytes(int64(r.BytesPerSecond)), r.Workload.Retention)
	for _, id := range slices.Sorted(maps.Keys(r.End)) {
		row(id, "%s on disk when published, %s at most, %s at the end (%s after the last message expired)",
			FormatBytes(r.Filled[id]), FormatBytes(r.Peak[id]), FormatBytes(r.End[id]), r.Waited)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
