package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"tercet.dev/tercet/server/wire"
)

// Subject is the cluster that is measured.
type Subject struct {
	// Variant names it in reports: "tercet", or what it is compared with.
	Variant string
	Nodes   []SubjectNode
	// Pids returns the servers' processes by node id. It is nil for a cluster that the bench did not start; there
	// is no account of CPU then, and nothing to kill.
	Pids func() map[string]int
	// Dir is the directory that holds the servers' data, empty if it is not on this machine. Probes run there.
	Dir string
	// Delay is what the servers add to each sync.
	Delay time.Duration
}

// SubjectNode is one server.
type SubjectNode struct {
	ID string
	// HTTP is the address of its HTTP server, RESP that of its Valkey port and Endpoint that of its Endpoint, if it
	// has them.
	HTTP, RESP, Endpoint string
	// Data is its data directory, if it is on this machine.
	Data string
}

// httpAddrs returns the servers' HTTP addresses.
func (s *Subject) httpAddrs() []string {
	addrs := make([]string, len(s.Nodes))
	for i, n := range s.Nodes {
		addrs[i] = n.HTTP
	}
	return addrs
}

func (s *Subject) node(id string) (SubjectNode, bool) {
	for _, n := range s.Nodes {
		if n.ID == id {
			return n, true
		}
	}
	return SubjectNode{}, false
}

// identify asks the servers whose id is not known for it.
func (s *Subject) identify(ctx context.Context) error {
	for i := range s.Nodes {
		n := &s.Nodes[i]
		if n.ID != "" {
			continue
		}
		var doc wire.Node
		if err := getJSON(ctx, n.HTTP, "/v1/node", &doc); err != nil {
			return err
		}
		n.ID = doc.ID
	}
	return nil
}

// administration is the client for everything but load.
var administration = &http.Client{
	Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true},
}

// getJSON asks one server.
func getJSON(ctx context.Context, addr, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		return err
	}
	resp, err := administration.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", path, resp.Status)
	}
	return json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(into)
}

// cluster returns the cluster document of the leader, or of a server that knows of one if the leader is none of the
// servers. What another server says may be old: it has just been started, or is cut off.
func (s *Subject) cluster(ctx context.Context) (wire.Cluster, error) {
	var failed []error
	var other wire.Cluster
	for _, n := range s.Nodes {
		var c wire.Cluster
		err := getJSON(ctx, n.HTTP, "/v1/cluster", &c)
		switch {
		case err != nil:
			failed = append(failed, err)
		case c.Leader == n.ID && n.ID != "":
			return c, nil
		case c.Leader != "":
			other = c
		}
	}
	if _, ok := s.node(other.Leader); other.Leader == "" || ok {
		return wire.Cluster{}, fmt.Errorf("no server leads: %w", errors.Join(failed...))
	}
	return other, nil
}

// leaderPatience bounds the wait for a leader: an election, or a server that has just been started.
const leaderPatience = 30 * time.Second

// waitLeader is cluster with patience.
func (s *Subject) waitLeader(ctx context.Context) (wire.Cluster, error) {
	ctx, cancel := context.WithTimeout(ctx, leaderPatience)
	defer cancel()
	for {
		c, err := s.cluster(ctx)
		if err == nil {
			return c, nil
		}
		pause(ctx, 50*time.Millisecond)
		if ctx.Err() != nil {
			return c, err
		}
	}
}

// inSyncPatience bounds the wait for all zones: a restarted server has to catch up, and be stable for a while.
const inSyncPatience = 2 * time.Minute

// waitInSync waits until a leader is known that counts as many zones as there are servers.
func (s *Subject) waitInSync(ctx context.Context) (wire.Cluster, error) {
	ctx, cancel := context.WithTimeout(ctx, inSyncPatience)
	defer cancel()
	for {
		c, err := s.cluster(ctx)
		if err == nil && len(c.InSync) >= len(s.Nodes) {
			return c, nil
		}
		if ctx.Err() != nil {
			return c, fmt.Errorf("the zones are not in sync (%v): %w", c.InSync, errors.Join(err, ctx.Err()))
		}
		pause(ctx, 50*time.Millisecond)
	}
}

// Counters are a server's, as its metrics show them.
type Counters struct {
	// Syncs of the log, the seconds they took together, and the bytes they wrote.
	Syncs       float64 `json:"syncs"`
	SyncSeconds float64 `json:"syncSeconds"`
	SyncBytes   float64 `json:"syncBytes"`
	// Applied is the last raft entry in the engine.
	Applied float64 `json:"applied"`
}

// Sub returns what was counted since earlier.
func (c Counters) Sub(earlier Counters) Counters {
	return Counters{
		Syncs: c.Syncs - earlier.Syncs, SyncSeconds: c.SyncSeconds - earlier.SyncSeconds,
		SyncBytes: c.SyncBytes - earlier.SyncBytes, Applied: c.Applied - earlier.Applied,
	}
}

// The metrics that Counters are read from.
const (
	metricSyncs       = "tercet_wal_fsync_duration_seconds_count"
	metricSyncSeconds = "tercet_wal_fsync_duration_seconds_sum"
	metricSyncBytes   = "tercet_wal_synced_bytes_total"
)

// readCounters asks one server.
func readCounters(ctx context.Context, addr string) (Counters, error) {
	var node wire.Node
	if err := getJSON(ctx, addr, "/v1/node", &node); err != nil {
		return Counters{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/metrics", nil)
	if err != nil {
		return Counters{}, err
	}
	resp, err := administration.Do(req)
	if err != nil {
		return Counters{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return Counters{}, fmt.Errorf("GET /metrics: %s", resp.Status)
	}
	values, err := parseMetrics(resp.Body, metricSyncs, metricSyncSeconds, metricSyncBytes)
	return Counters{
		Syncs: values[metricSyncs], SyncSeconds: values[metricSyncSeconds], SyncBytes: values[metricSyncBytes],
		Applied: float64(node.AppliedIndex),
	}, err
}

// parseMetrics reads the named samples of a Prometheus text page; samples that differ in labels alone are added up.
func parseMetrics(page io.Reader, names ...string) (map[string]float64, error) {
	wanted := make(map[string]bool, len(names))
	for _, n := range names {
		wanted[n] = true
	}
	values := map[string]float64{}
	lines := bufio.NewScanner(page)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		line := lines.Text()
		end := strings.IndexAny(line, "{ ")
		if end < 0 || !wanted[line[:end]] {
			continue
		}
		if labels := strings.LastIndexByte(line, '}'); labels >= 0 {
			line = line[labels+1:]
		} else {
			line = line[end:]
		}
		value, _, _ := strings.Cut(strings.TrimSpace(line), " ") // a timestamp may follow
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return values, fmt.Errorf("metrics: %w", err)
		}
		values[lines.Text()[:end]] += v
	}
	return values, lines.Err()
}

// counters asks all servers at once; one that does not answer is left out.
func (s *Subject) counters(ctx context.Context) map[string]Counters {
	found := make([]*Counters, len(s.Nodes))
	var group errgroup.Group
	for i, n := range s.Nodes {
		group.Go(func() error {
			if c, err := readCounters(ctx, n.HTTP); err == nil {
				found[i] = &c
			}
			return nil
		})
	}
	_ = group.Wait() // always nil
	all := map[string]Counters{}
	for i, c := range found {
		if c != nil {
			all[s.Nodes[i].ID] = *c
		}
	}
	return all
}

// countersSince subtracts by node; nodes that are missing at either end are left out.
func countersSince(now, earlier map[string]Counters) map[string]Counters {
	diff := maps.Clone(now)
	for id, c := range now {
		before, ok := earlier[id]
		if !ok {
			delete(diff, id)
			continue
		}
		diff[id] = c.Sub(before)
	}
	return diff
}
