package gateway

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/valkey-io/valkey-go"
)

// Reading says where looks may be answered from: reads that change nothing, and may be a moment old. What leases are judged
// by is never read there.
type Reading struct {
	// Addrs are a reader endpoint, or replicas' own endpoints. In cluster mode the shards' replicas are known, and it
	// may be empty.
	Addrs []string
	// Zone is the availability zone that is preferred, empty for none: a replica there, the primary if it is there, any
	// replica, the primary.
	Zone string
}

// ParseReading reads the addresses of readers, host:port separated by commas, and a zone.
func ParseReading(addrs, zone string) (Reading, error) {
	r := Reading{Zone: zone}
	for a := range strings.SplitSeq(addrs, ",") {
		if a == "" {
			continue
		}
		if _, _, err := net.SplitHostPort(a); err != nil {
			if strings.ContainsAny(a, "/@:") {
				return r, fmt.Errorf("%q: want host:port; user, password and TLS are those of the upstream", a)
			}
			a = net.JoinHostPort(a, "6379")
		}
		r.Addrs = append(r.Addrs, a)
	}
	return r, nil
}

func (r Reading) wanted() bool { return len(r.Addrs) > 0 || r.Zone != "" }

// options adds to a client's what makes it read from replicas.
func (r Reading) options(o *valkey.ClientOption, mode Mode) {
	o.SendToReplicas = func(valkey.Completed) bool { return true } // it is asked nothing else than looks
	if r.Zone != "" {
		o.EnableReplicaAZInfo, o.AZFromInfo = true, true
		o.ReadNodeSelector = valkey.AZAffinityReplicasAndPrimaryNodeSelector(r.Zone)
	}
	if mode == Cluster {
		if len(r.Addrs) > 0 {
			o.InitAddress = []string{r.Addrs[0], r.Addrs[0]}
		}
		if r.Zone == "" {
			o.ReadNodeSelector = valkey.PreferReplicaNodeSelector()
		}
		// Replicas come and go without a redirection that would tell.
		o.ClusterOption.ShardsRefreshInterval = readerRefresh
		return
	}
	o.ForceSingleClient = false
	o.Standalone.ReplicaAddress = r.Addrs
}

// readerRefresh is how often a cluster is asked for its replicas.
const readerRefresh = 10 * time.Second

// readerRetry is how long looks go to the primary after readers could not be reached.
const readerRetry = time.Second

// reader is the client for looks. It is dialled when it is first needed, and again after it failed; meanwhile the primary
// answers.
type reader struct {
	target  Target
	reading Reading
	log     hclog.Logger
	mu      sync.Mutex
	ref     *clientRef
	failed  time.Time
	closed  bool
	retired sync.WaitGroup
}

func newReader(t Target, found Mode, r Reading, log hclog.Logger) *reader {
	t.Mode = found
	return &reader{target: t, reading: r, log: log}
}

// get returns the client, nil while there is none.
func (r *reader) get() *clientRef {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.ref == nil && time.Since(r.failed) < readerRetry {
		return nil
	}
	if r.ref == nil {
		o := r.target.options()
		if r.target.Mode == Cluster {
			o.InitAddress = []string{r.target.Addr, r.target.Addr}
		}
		r.reading.options(&o, r.target.Mode)
		c, err := valkey.NewClient(o)
		if err != nil {
			r.failed = time.Now()
			r.log.Warn("readers cannot be reached, the primary is asked", "readers", r.reading.Addrs, "error", err)
			return nil
		}
		r.ref = &clientRef{Client: c, since: time.Now()}
	}
	return r.ref
}

// use runs a look, and reports whether it was answered.
func (r *reader) use(ctx context.Context, f func(valkey.Client) error) bool {
	if r == nil {
		return false
	}
	ref := r.get()
	if ref == nil {
		return false
	}
	err := ref.use(f)
	if err == nil {
		return true
	}
	if ctx.Err() == nil {
		r.log.Debug("a reader does not answer, the primary is asked", "error", err)
	}
	if broken(err) || refusedLogin(err) || moved(err) {
		r.drop(ref)
	}
	return false
}

// drop has the next look dial anew.
func (r *reader) drop(ref *clientRef) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ref != ref {
		return
	}
	r.ref, r.failed = nil, time.Now()
	r.retired.Go(ref.retire)
}

func (r *reader) close() {
	if r == nil {
		return
	}
	r.mu.Lock()
	ref := r.ref
	r.ref, r.closed = nil, true
	r.mu.Unlock()
	if ref != nil {
		ref.retire()
	}
	r.retired.Wait()
}

// ReaderReport is what Probe found out about a reader.
type ReaderReport struct {
	Addr string `json:"addr"`
	Role string `json:"role"`
	// Zone is the server's availability zone, as far as it says.
	Zone string `json:"zone,omitempty"`
	// Linked tells whether a replica is connected to its primary.
	Linked bool `json:"linked"`
}

// probeReaders looks at each reader.
func (r *Report) probeReaders(ctx context.Context, t Target, reading Reading) {
	problem := func(format string, args ...any) { r.Problems = append(r.Problems, fmt.Sprintf(format, args...)) }
	remark := func(format string, args ...any) { r.Remarks = append(r.Remarks, fmt.Sprintf(format, args...)) }
	if r.Mode == Single && len(reading.Addrs) == 0 && reading.Zone != "" {
		problem("--az needs --upstream-reader with cluster mode disabled: name the reader endpoint, or the endpoints of the replicas")
	}
	near := false
	for _, addr := range reading.Addrs {
		one := t
		one.Addr, one.Others, one.Mode = addr, nil, Single
		found := ReaderReport{Addr: addr}
		err := one.ask(func(c valkey.Client) error {
			info, err := c.Do(ctx, c.B().Info().Build()).ToString()
			fields := parseInfo(info)
			found.Role, found.Zone = fields["role"], fields["availability_zone"]
			found.Linked = fields["master_link_status"] == "up"
			return err
		})
		switch {
		case err != nil:
			remark("the reader %s does not answer, so the primary will be asked: %v", addr, err)
		case found.Role == "slave" && !found.Linked:
			remark("the reader %s is not connected to its primary: what it shows is old until it is", addr)
		}
		near = near || found.Zone == reading.Zone
		r.Readers = append(r.Readers, found)
	}
	if reading.Zone != "" && len(reading.Addrs) > 0 && !near {
		remark("no reader says that it is in zone %s: any of them will be asked", reading.Zone)
	}
}
