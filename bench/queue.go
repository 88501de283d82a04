package bench

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"strings"
	"sync"
	"time"

	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

// The figures of the queue's own semantics: pushes, messages of 100 MiB, idempotency keys, delays.

// QueueReport is what one of them says, a row for each part.
type QueueReport struct {
	Command string     `json:"command,omitempty"`
	Version string     `json:"version,omitempty"`
	At      time.Time  `json:"at"`
	Machine Machine    `json:"machine"`
	Rows    []QueueRow `json:"rows"`
	// Idle is the memory of the largest server before, Peak that at its largest, Added the most that any one took more
	// than when idle.
	Idle  int64 `json:"idle,omitempty"`
	Peak  int64 `json:"peak,omitempty"`
	Added int64 `json:"added,omitempty"`
}

// QueueRow is one part.
type QueueRow struct {
	Name string `json:"name"`
	// Messages were carried in Elapsed, at PerSecond.
	Messages  int64         `json:"messages"`
	Elapsed   time.Duration `json:"elapsed"`
	PerSecond float64       `json:"perSecond"`
	// Latency is the time that the row is about: from publish to callback, of a round trip, from when a message was due.
	Latency *Percentiles `json:"latency,omitempty"`
	// Ratio is that to the row before, where rows come in pairs.
	Ratio float64 `json:"ratio,omitempty"`
	// Failed are failed requests by code.
	Failed map[string]int64 `json:"failed,omitempty"`
}

func newQueueReport(s *Subject) *QueueReport {
	return &QueueReport{At: time.Now(), Machine: ThisMachine(s.Dir)}
}

// Text writes the report for people.
func (r *QueueReport) Text(w io.Writer) error {
	var b strings.Builder
	if r.Command != "" {
		fmt.Fprintf(&b, "command  %s\n", r.Command)
	}
	for _, row := range r.Rows {
		fmt.Fprintf(&b, "%-28s %s messages in %s, %s/s", row.Name, FormatCount(float64(row.Messages)), row.Elapsed.Round(time.Millisecond), FormatCount(row.PerSecond))
		if row.Latency != nil && row.Latency.Count > 0 {
			fmt.Fprintf(&b, "; p50 %.2f ms, p99 %.2f ms", float64(row.Latency.P50)/1000, float64(row.Latency.P99)/1000)
		}
		if row.Ratio != 0 {
			fmt.Fprintf(&b, "; %.2f of the row above", row.Ratio)
		}
		for code, n := range row.Failed {
			fmt.Fprintf(&b, "; %d failed with %s", n, code)
		}
		b.WriteByte('\n')
	}
	if r.Peak > 0 {
		fmt.Fprintf(&b, "memory of a node: %s idle, %s at most, at most %s more than idle\n", FormatBytes(r.Idle), FormatBytes(r.Peak), FormatBytes(r.Added))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// watchMemory looks at the servers' memory until stop is called, which fills in the report.
func (r *QueueReport) watchMemory(ctx context.Context, s *Subject) (stop func()) {
	if s.Pids == nil {
		return func() {}
	}
	idle := map[string]int64{}
	for id, pid := range s.Pids() {
		if u, err := ReadProcess(pid); err == nil {
			idle[id], r.Idle = u.RSS, max(r.Idle, u.RSS)
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		for ; ctx.Err() == nil; pause(ctx, 100*time.Millisecond) {
			for id, pid := range s.Pids() {
				if u, err := ReadProcess(pid); err == nil {
					r.Peak, r.Added = max(r.Peak, u.RSS), max(r.Added, u.RSS-idle[id])
				}
			}
		}
	})
	return func() { cancel(); wg.Wait() }
}

func (s *Subject) leaderNode(ctx context.Context) (SubjectNode, error) {
	c, err := s.waitInSync(ctx)
	if err != nil {
		return SubjectNode{}, err
	}
	n, ok := s.node(c.Leader)
	if !ok {
		return n, errors.New("the leader is none of the servers")
	}
	return n, nil
}

// Push has messages pushed to an endpoint in this process with each of the concurrencies: first as fast as they are
// published, which gives the rate, then at half of that rate, which gives the time from publish to callback. w says how
// long each takes.
func Push(ctx context.Context, s *Subject, w Workload, concurrencies []int, progress func(published, acknowledged int64)) (*QueueReport, error) {
	r := newQueueReport(s)
	leader, err := s.leaderNode(ctx)
	if err != nil {
		return nil, err
	}
	stop := r.watchMemory(ctx, s)
	defer stop()
	for _, concurrency := range concurrencies {
		rate, at := 0.0, int64(concurrency)
		for _, half := range []bool{false, true} {
			one := w
			one.Topic, one.Group, one.Batch, one.Timed = fmt.Sprintf("push-%d-%t", concurrency, half), "g", 1, true
			// Enough consumers for every push that may be under way, and never many more publishers than those.
			one.Publishers, one.Consumers, one.ReceiveMax = min(w.Publishers, 2*concurrency), min(concurrency, 64), (concurrency+63)/64
			if half {
				one.Rate = max(1, rate/2)
			}
			d := &PushDriver{HTTPDriver: HTTPDriver{Addrs: []string{leader.HTTP}, Workload: one}, Concurrency: &at}
			res, err := runPrepared(ctx, one, d, Hooks{Progress: progress})
			if err := errors.Join(err, d.Close()); err != nil {
				return r, err
			}
			rate = perSecond(res.Acknowledged, res.Elapsed)
			name := fmt.Sprintf("push, %d at once, as fast as it goes", concurrency)
			latency := res.EndToEnd.Percentiles()
			row := QueueRow{Name: name, Messages: res.Acknowledged, Elapsed: res.Elapsed, PerSecond: rate, Failed: res.Failed}
			if half {
				row.Name, row.Latency = fmt.Sprintf("push, %d at once, at half of that", concurrency), &latency
			}
			r.Rows = append(r.Rows, row)
		}
	}
	return r, nil
}

// Keys publishes without and with idempotency keys in turn, pairs times, and compares: single messages, then batches.
// Before that it publishes live messages with keys, which stay known.
func Keys(ctx context.Context, s *Subject, w Workload, live int64, pairs int, progress func(published, acknowledged int64)) (*QueueReport, error) {
	r := newQueueReport(s)
	leader, err := s.leaderNode(ctx)
	if err != nil {
		return nil, err
	}
	stop := r.watchMemory(ctx, s)
	defer stop()
	w.Seed = 100
	run := func(one Workload) (*Result, error) {
		w.Seed++
		one.Seed = w.Seed
		return RunRemote(ctx, leader.Endpoint, one, Hooks{Progress: progress})
	}
	if live > 0 {
		fill := w
		fill.Topic, fill.Publishers, fill.Batch, fill.Size, fill.Messages, fill.Keyed, fill.Retention = "keys-live", 64, limits.BatchMessagesMax, 16, live, true, time.Hour
		res, err := run(fill)
		if err != nil {
			return r, err
		}
		r.Rows = append(r.Rows, QueueRow{Name: "live keys", Messages: res.Messages, Elapsed: res.Elapsed, PerSecond: res.MessagesPerSecond(), Failed: res.Failed})
	}
	for _, batch := range []int{1, limits.BatchMessagesMax} {
		one := w
		one.Topic, one.Batch = fmt.Sprintf("keys-%d", batch), batch
		if batch > 1 {
			one.Publishers = max(1, w.Publishers/16)
		}
		var rows [2]QueueRow
		for range pairs {
			for i := range rows {
				one.Keyed = i == 1
				res, err := run(one)
				if err != nil {
					return r, err
				}
				rows[i].Messages, rows[i].Elapsed, rows[i].Failed = rows[i].Messages+res.Messages, rows[i].Elapsed+res.Elapsed, res.Failed
			}
		}
		for i, what := range []string{"without keys", "with keys"} {
			rows[i].Name, rows[i].PerSecond = fmt.Sprintf("batches of %d, %s", batch, what), perSecond(rows[i].Messages, rows[i].Elapsed)
		}
		if rows[0].PerSecond > 0 {
			rows[1].Ratio = rows[1].PerSecond / rows[0].PerSecond
		}
		r.Rows = append(r.Rows, rows[:]...)
	}
	return r, nil
}

// delayMargin is how long after the last one was published the first delayed message falls due.
const delayMargin = 10 * time.Second

// Delayed publishes messages that fall due evenly within a time, as long after they were published, and reports how late
// consumers got them.
func Delayed(ctx context.Context, s *Subject, w Workload, within time.Duration, progress func(published, acknowledged int64)) (*QueueReport, error) {
	r := newQueueReport(s)
	leader, err := s.leaderNode(ctx)
	if err != nil {
		return nil, err
	}
	stop := r.watchMemory(ctx, s)
	defer stop()
	w.Topic, w.Group, w.ReceiveMax, w.Timed = "delayed", "g", limits.ReceiveMessagesMax, true
	w.Delay = (within + delayMargin).Round(time.Second)
	w.Rate, w.Retention = float64(w.Messages)/within.Seconds(), time.Hour
	res, err := RunRemote(ctx, leader.Endpoint, w, Hooks{Progress: progress})
	if err != nil {
		return r, err
	}
	latency := res.EndToEnd.Percentiles()
	r.Rows = append(r.Rows, QueueRow{Name: "delayed, lateness", Messages: res.Acknowledged, Elapsed: res.Elapsed, PerSecond: w.Rate, Latency: &latency, Failed: res.Failed})
	return r, nil
}

// Large sends a message of this size, receives and acknowledges it, so many times one after the other.
func Large(ctx context.Context, s *Subject, size int64, rounds int) (*QueueReport, error) {
	r := newQueueReport(s)
	leader, err := s.leaderNode(ctx)
	if err != nil {
		return nil, err
	}
	stop := r.watchMemory(ctx, s)
	defer stop()
	client := &http.Client{Transport: &http.Transport{DisableCompression: true, WriteBufferSize: 256 << 10, ReadBufferSize: 256 << 10}}
	defer client.CloseIdleConnections()
	base := "http://" + leader.HTTP + "/api/v3/topic/large"
	body := newBodies(1).next(int(size))
	sent := sha256.Sum256(body)
	do := func(method, url string, header map[string]string, body io.Reader, want int) (*http.Response, error) {
		req, err := http.NewRequestWithContext(ctx, method, url, body)
		if err != nil {
			return nil, err
		}
		for name, value := range header {
			req.Header.Set(name, value)
		}
		res, err := client.Do(req)
		if err != nil {
			return nil, err
		}
		if res.StatusCode != want {
			text, _ := io.ReadAll(io.LimitReader(res.Body, 4<<10)) // as much of the reason as there is
			_ = res.Body.Close()
			return nil, fmt.Errorf("%s %s: %s: %s", method, url, res.Status, bytes.TrimSpace(text))
		}
		return res, nil
	}
	sends, receives, both := NewHistogram(), NewHistogram(), NewHistogram()
	var sending, receiving time.Duration
	for range rounds {
		began := time.Now()
		res, err := do(http.MethodPost, base, map[string]string{"Content-Type": wire.MediaOctets}, bytes.NewReader(body), http.StatusCreated)
		if err != nil {
			return r, err
		}
		_ = res.Body.Close()
		there := time.Now()
		res, err = do(http.MethodPost, base+"/consumer/g", map[string]string{"Accept": wire.MediaMultipart}, nil, http.StatusOK)
		if err != nil {
			return r, err
		}
		receipt, got, err := readOne(res)
		if err != nil {
			return r, err
		}
		if got != sent {
			return r, errors.New("another message came back than was sent")
		}
		back := time.Now()
		if res, err = do(http.MethodDelete, base+"/consumer/g/lease/"+receipt, nil, nil, http.StatusNoContent); err != nil {
			return r, err
		}
		_ = res.Body.Close()
		sends.Record(there.Sub(began))
		receives.Record(back.Sub(there))
		both.Record(back.Sub(began))
		sending, receiving = sending+there.Sub(began), receiving+back.Sub(there)
	}
	for _, row := range []struct {
		name    string
		h       *Histogram
		elapsed time.Duration
	}{{"large message, send", sends, sending}, {"large message, receive", receives, receiving}, {"large message, round trip", both, sending + receiving}} {
		latency := row.h.Percentiles()
		r.Rows = append(r.Rows, QueueRow{Name: row.name, Messages: int64(rounds), Elapsed: row.elapsed, PerSecond: perSecond(int64(rounds), row.elapsed), Latency: &latency})
	}
	return r, nil
}

// readOne reads the one message of a multipart answer.
func readOne(res *http.Response) (receipt string, sum [sha256.Size]byte, err error) {
	defer res.Body.Close()
	_, params, err := mime.ParseMediaType(res.Header.Get("Content-Type"))
	if err != nil {
		return "", sum, err
	}
	parts := multipart.NewReader(res.Body, params["boundary"])
	part, err := parts.NextRawPart()
	if err != nil {
		return "", sum, err
	}
	h := sha256.New()
	if _, err := io.Copy(h, part); err != nil {
		return "", sum, err
	}
	if _, err := parts.NextRawPart(); !errors.Is(err, io.EOF) {
		return "", sum, fmt.Errorf("more than one message came: %w", err)
	}
	return part.Header.Get(wire.HeaderReceipt), [sha256.Size]byte(h.Sum(nil)), nil
}
