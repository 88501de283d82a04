package gateway

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/valkey-io/valkey-go"
)

// Worth is what an acknowledged publish waited for besides the primary's memory.
type Worth struct {
	// Replicas is how many replicas must have the message in memory (WAIT).
	Replicas int
	// Fsync makes the primary and Replicas replicas have it on disk as well (WAITAOF). It needs append-only files.
	Fsync bool
	// MultiAZLog says that the service was set up with a durable multi-zone log that takes every write before its
	// reply (ElastiCache's durability option, synchronous). It cannot be read from the server, so it is declared, and
	// refused where what can be read rules it out.
	MultiAZLog bool
	// Timeout bounds the wait for replicas (default 5 s). What was not confirmed by then has an unknown outcome.
	Timeout time.Duration
}

// Level is how much a publish is worth, in rising order.
type Level struct {
	rank     int
	replicas int
}

// ranks of a Level.
const (
	rankMemory = iota
	rankReplicas
	rankFsync
	rankMultiAZ
)

// Level returns what the wait makes a publish worth.
func (w Worth) Level() Level {
	switch {
	case w.MultiAZLog:
		return Level{rank: rankMultiAZ}
	case w.Fsync:
		return Level{rankFsync, w.Replicas}
	case w.Replicas > 0:
		return Level{rankReplicas, w.Replicas}
	}
	return Level{}
}

// String is the level as answers and flags write it: memory, replicas=N, fsync=N (N disks), multi-az-log.
func (l Level) String() string {
	switch l.rank {
	case rankReplicas:
		return "replicas=" + strconv.Itoa(l.replicas)
	case rankFsync:
		return "fsync=" + strconv.Itoa(l.replicas+1)
	case rankMultiAZ:
		return "multi-az-log"
	}
	return "memory"
}

// ParseLevel reads what String writes. Empty is memory.
func ParseLevel(s string) (Level, error) {
	name, n, counted := strings.Cut(s, "=")
	count, err := strconv.Atoi(n)
	switch {
	case s == "" || s == "memory":
		return Level{}, nil
	case s == "multi-az-log":
		return Level{rank: rankMultiAZ}, nil
	case name == "replicas" && counted && err == nil && count > 0:
		return Level{rankReplicas, count}, nil
	case name == "fsync" && counted && err == nil && count > 0:
		return Level{rankFsync, count - 1}, nil
	}
	return Level{}, fmt.Errorf("durability level %q: want memory, replicas=N, fsync=N or multi-az-log", s)
}

// covers reports whether l is at least want.
func (l Level) covers(want Level) bool {
	if l.rank == rankMultiAZ || want.rank == rankMemory {
		return true
	}
	return l.rank >= want.rank && l.replicas >= want.replicas && want.rank != rankMultiAZ
}

// Report is what Probe found out about an upstream.
type Report struct {
	// Server is the program and Version its version, as far as it says.
	Server, Version string
	// Mode is Single or Cluster. Role is the role of the node that answered.
	Mode Mode
	Role string
	// Replicas counts the replicas that are connected to the node that answered.
	Replicas int
	// AppendOnly tells whether the server keeps an append-only file, and Fsync its policy ("" where not readable).
	AppendOnly bool
	Fsync      string
	// MaxMemoryPolicy is how the server makes room ("" where not readable). Anything but noeviction may drop streams.
	MaxMemoryPolicy string
	// TLS tells whether the connection is encrypted.
	TLS bool
	// User is who the gateway is there ("" where the server does not say), Refused the commands that it needs and may not call.
	User    string
	Refused []string
	// Latency is the median of a few round trips.
	Latency time.Duration
	// Readers are the servers that looks may be answered from.
	Readers []ReaderReport
	// Level is what the configured waits make of a publish here.
	Level Level
	// Problems are what keeps the gateway from working as configured, Remarks what the operator should know. Both end
	// with the way out.
	Problems, Remarks []string

	clockAhead time.Duration // the server's clock, less this process's
}

// Allows refuses an upstream with problems, or one below a level.
func (r Report) Allows(want Level) error {
	if len(r.Problems) > 0 {
		return fmt.Errorf("the upstream does not fit: %s", strings.Join(r.Problems, "; "))
	}
	if !r.Level.covers(want) {
		return fmt.Errorf("a publish to this upstream is worth %s, and %s is required: wait for more (--wait-replicas, --wait-fsync), "+
			"or use an upstream that gives it", r.Level, want)
	}
	return nil
}

// Probe connects to an upstream and reports what it is and what a publish there is worth.
func Probe(ctx context.Context, t Target, w Worth, reading Reading) (Report, error) {
	c, err := t.Dial()
	if err != nil {
		return Report{}, err
	}
	defer c.Close()
	r, err := probe(ctx, c, t, w)
	if err == nil && reading.wanted() {
		r.probeReaders(ctx, t, reading)
	}
	return r, err
}

func probe(ctx context.Context, c valkey.Client, t Target, w Worth) (Report, error) {
	r := Report{Mode: Single, TLS: t.TLS != nil, Level: w.Level()}
	info, err := c.Do(ctx, c.B().Info().Build()).ToString()
	if err != nil {
		return r, refusedOutright("INFO", err, w)
	}
	fields := parseInfo(info)
	r.Server, r.Version = "redis", fields["redis_version"]
	if v := fields["valkey_version"]; v != "" {
		r.Server, r.Version = "valkey", v
	} else if n := fields["server_name"]; n != "" {
		r.Server = n
	}
	if fields["cluster_enabled"] == "1" {
		r.Mode = Cluster
	}
	r.Role = fields["role"]
	r.Replicas, _ = strconv.Atoi(fields["connected_slaves"])
	r.AppendOnly = fields["aof_enabled"] == "1"
	r.MaxMemoryPolicy = fields["maxmemory_policy"]
	if config, err := c.Do(ctx, c.B().ConfigGet().Parameter("appendfsync").Build()).AsStrMap(); err == nil {
		r.Fsync = config["appendfsync"]
	}
	var best []time.Duration
	for range 9 {
		start := time.Now()
		if err := c.Do(ctx, c.B().Ping().Build()).Error(); err != nil {
			return r, refusedOutright("PING", err, w)
		}
		best = append(best, time.Since(start))
	}
	r.Latency = median(best)
	start := time.Now()
	clock, err := c.Do(ctx, c.B().Time().Build()).AsStrSlice()
	if err != nil || len(clock) != 2 {
		return r, refusedOutright("TIME", err, w)
	}
	seconds, _ := strconv.ParseInt(clock[0], 10, 64)
	micros, _ := strconv.ParseInt(clock[1], 10, 64)
	r.clockAhead = time.Unix(seconds, micros*1000).Sub(start.Add(time.Since(start) / 2))

	if who, err := c.Do(ctx, c.B().AclWhoami().Build()).ToString(); err == nil {
		r.User = who
	}
	keys := r.rights(ctx, c)

	problem := func(format string, args ...any) { r.Problems = append(r.Problems, fmt.Sprintf(format, args...)) }
	remark := func(format string, args ...any) { r.Remarks = append(r.Remarks, fmt.Sprintf(format, args...)) }
	if len(r.Refused) > 0 {
		problem("the user may not call %s: add them to its access string, or %s", strings.Join(r.Refused, ", "), rightsFor(w))
	}
	if keys {
		problem("the user may not touch keys named %s*: add ~tercet:gateway:*, and for each topic T ~T and ~{T}:tercet:*, to its access string", probePrefix)
	}
	major := versionOf(r.Version)
	if major < 7 {
		problem("version %s is older than 7.0: upgrade", r.Version)
	}
	if r.Mode == Single && r.Role != "master" {
		problem("the node that answered is a replica: use the primary endpoint")
	}
	if w.Replicas > r.Replicas {
		problem("--wait-replicas is %d and the number of connected replicas %d: add replicas, or wait for fewer", w.Replicas, r.Replicas)
	}
	if w.Fsync {
		switch {
		case !r.AppendOnly:
			problem("the server keeps no append-only file: turn it on (appendonly yes), or leave --wait-fsync out")
		case r.Server != "valkey" && major < 8 && fields["redis_version"] < "7.2":
			problem("WAITAOF needs version 7.2 and this is %s: upgrade, or leave --wait-fsync out", r.Version)
		}
	}
	if w.MultiAZLog {
		switch {
		case r.Server != "valkey" || major < 9:
			problem("the durability option needs Valkey 9.0 and this is %s %s: leave --multi-az-log out", r.Server, r.Version)
		case r.Mode != Cluster:
			problem("the durability option needs cluster mode: leave --multi-az-log out, or enable cluster mode")
		case !r.TLS:
			problem("the durability option needs TLS: write rediss://")
		case r.Replicas == 0:
			problem("the durability option needs at least one replica: add one, or leave --multi-az-log out")
		default:
			remark("the durability option was declared and could not be checked: see that it is sync")
		}
	}
	if p := r.MaxMemoryPolicy; p != "" && p != "noeviction" {
		remark("maxmemory-policy is %s: under memory pressure the server may drop whole streams; set noeviction", p)
	}
	if r.Level.rank == rankMemory {
		remark("a publish is acknowledged from the primary's memory alone: a failover loses what was not replicated; wait for replicas with --wait-replicas")
	}
	if r.Level.rank == rankReplicas {
		remark("WAIT counts copies in memory: they survive the primary, not a failure of all at once")
	}
	return r, nil
}

// rightsFor is what the access string of the gateway's user has to have. A server that does not know WAITAOF refuses a
// string that names it.
func rightsFor(w Worth) string {
	s := "+@stream +@sortedset +@hash +@string +@scripting +@connection +info +time +wait"
	if w.Fsync {
		s += " +waitaof"
	}
	return s
}

// refusedOutright is the error of a command without which nothing can be said about an upstream.
func refusedOutright(command string, err error, w Worth) error {
	if err != nil && strings.HasPrefix(err.Error(), "NOPERM") {
		return fmt.Errorf("the user may not call %s (%w): add to its access string %s", command, err, rightsFor(w))
	}
	return fmt.Errorf("the upstream does not answer %s: %w", command, err)
}

// probePrefix begins the keys that are the gateway's own, and the one that is asked about and never exists.
const probePrefix = "tercet:gateway:"

// rights asks the server about each command that the gateway and its scripts call, on a key that does not exist and in a
// form that makes none. It reports whether keys of that name are refused.
func (r *Report) rights(ctx context.Context, c valkey.Client) (keys bool) {
	for _, words := range [][]string{
		{"XADD", "", "NOMKSTREAM", "*", "a", "b"}, {"XRANGE", "", "-", "+", "COUNT", "1"}, {"XREVRANGE", "", "+", "-", "COUNT", "1"}, {"XLEN", ""}, {"XDEL", "", "0-1"},
		{"XACK", "", "g", "0-1"}, {"XCLAIM", "", "g", "c", "0", "0-1"}, {"XPENDING", "", "g"}, {"XINFO", "", "GROUPS"}, {"XGROUP", "", "SETID", "g", "0"},
		{"GET", ""}, {"SET", "", "x", "XX"}, {"HGET", "", "a"}, {"HDEL", "", "a"}, {"ZADD", "", "XX", "1", "a"}, {"ZRANGE", "", "0", "0"}, {"ZSCORE", "", "a"},
		{"ZCOUNT", "", "0", "1"}, {"ZREM", "", "a"}, {"EVALSHA", "", "0"}, {"EVAL", "", "0"}, {"EVALSHA_RO", "", "0"}, {"EVAL_RO", "", "0"},
	} {
		name, key := words[0], probePrefix+"probe"
		b := c.B().Arbitrary(name)
		switch name {
		case "XINFO", "XGROUP": // the key comes behind the subcommand
			b = b.Args(words[2]).Keys(key).Args(words[3:]...)
		case "EVAL", "EVAL_RO":
			b = b.Args("return 1", "1").Keys(key)
		case "EVALSHA", "EVALSHA_RO":
			b = b.Args(strings.Repeat("0", 40), "1").Keys(key)
		default:
			b = b.Keys(key).Args(words[2:]...)
		}
		err := c.Do(ctx, b.Build()).Error()
		if err == nil || !strings.HasPrefix(err.Error(), "NOPERM") {
			continue
		}
		if strings.Contains(err.Error(), "the keys") || strings.Contains(err.Error(), " key") {
			keys = true
		} else {
			r.Refused = append(r.Refused, name)
		}
	}
	return keys
}

// parseInfo reads the answer of INFO.
func parseInfo(s string) map[string]string {
	m := make(map[string]string)
	for line := range strings.Lines(s) {
		if name, value, ok := strings.Cut(strings.TrimRight(line, "\r\n"), ":"); ok {
			m[name] = value
		}
	}
	return m
}

func median(ds []time.Duration) time.Duration {
	slices.Sort(ds)
	return ds[len(ds)/2]
}

func versionOf(s string) int {
	first, _, _ := strings.Cut(s, ".")
	n, err := strconv.Atoi(first)
	if err != nil {
		return 0
	}
	return n
}
