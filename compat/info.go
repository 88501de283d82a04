package compat

import (
	"context"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"time"

	"tercet.dev/tercet/compat/acl"
	"tercet.dev/tercet/compat/command"
	"tercet.dev/tercet/compat/resp"
	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft"
)

// What this server says it is. Clients choose features by these numbers: the Redis version that Valkey names for
// compatibility, and the Valkey release whose answers are given.
const (
	redisVersion  = "7.2.4"
	valkeyVersion = "8.1.0"
)

// mode is what HELLO and INFO call the presentation.
func (s *Server) mode() string {
	if s.opts.Cluster {
		return "cluster"
	}
	return "standalone"
}

// leads reports whether this node is to be shown as the primary: every node is, except in cluster mode.
func (s *Server) leads() bool {
	if !s.opts.Cluster {
		return true
	}
	_, ok := s.backend.Leading()
	return ok
}

// role is the word of HELLO and CLUSTER SHARDS.
func (s *Server) role() string {
	if s.leads() {
		return "master"
	}
	return "replica"
}

// infoSections are the sections of INFO in their order.
var infoSections = []struct {
	name  string
	write func(c *conn, b *strings.Builder)
}{
	{"server", infoServer},
	{"clients", infoClients},
	{"memory", infoMemory},
	{"persistence", infoPersistence},
	{"stats", infoStats},
	{"replication", infoReplication},
	{"cpu", infoCPU},
	{"modules", func(*conn, *strings.Builder) {}},
	{"errorstats", func(*conn, *strings.Builder) {}},
	{"cluster", infoCluster},
	{"keyspace", infoKeyspace},
	{"tercet", infoTercet},
}

func cmdInfo(c *conn, a [][]byte) {
	wanted := map[string]bool{}
	for _, word := range a[1:] {
		wanted[lower(word)] = true
	}
	all := len(wanted) == 0 || wanted["all"] || wanted["everything"] || wanted["default"]
	var b strings.Builder
	for _, sec := range infoSections {
		if !all && !wanted[sec.name] {
			continue
		}
		if b.Len() > 0 {
			b.WriteString("\r\n")
		}
		title := strings.ToUpper(sec.name[:1]) + sec.name[1:]
		if sec.name == "cpu" {
			title = "CPU"
		}
		b.WriteString("# " + title + "\r\n")
		sec.write(c, &b)
	}
	c.w.Verbatim(b.String())
}

func line(b *strings.Builder, name string, v any) { fmt.Fprintf(b, "%s:%v\r\n", name, v) }

func infoServer(c *conn, b *strings.Builder) {
	s := c.s
	up := int64(time.Since(s.started).Seconds())
	line(b, "redis_version", redisVersion)
	line(b, "server_name", "valkey")
	line(b, "valkey_version", valkeyVersion)
	line(b, "valkey_release_stage", "ga")
	line(b, "tercet_version", s.opts.Version)
	line(b, "redis_git_sha1", "00000000")
	line(b, "redis_git_dirty", 0)
	line(b, "redis_build_id", "0")
	line(b, "redis_mode", s.mode())
	line(b, "server_mode", s.mode())
	line(b, "os", runtime.GOOS+" "+runtime.GOARCH)
	line(b, "arch_bits", strconv.IntSize)
	line(b, "monotonic_clock", "go")
	line(b, "multiplexing_api", "go")
	line(b, "process_id", pid)
	line(b, "process_supervised", "no")
	line(b, "run_id", s.runID)
	line(b, "tcp_port", localPort(c.nc))
	line(b, "server_time_usec", time.Now().UnixMicro())
	line(b, "uptime_in_seconds", up)
	line(b, "uptime_in_days", up/86400)
	line(b, "hz", 10)
	line(b, "configured_hz", 10)
	line(b, "executable", "tercet")
	line(b, "config_file", "")
	line(b, "io_threads_active", 0)
	line(b, "availability_zone", s.zone())
}

// zone is this node's zone.
func (s *Server) zone() string { return s.backend.Status().Zone }

func infoClients(c *conn, b *strings.Builder) {
	s := c.s
	line(b, "connected_clients", s.clients.count())
	line(b, "cluster_connections", 0)
	line(b, "maxclients", s.limits.Connections)
	line(b, "blocked_clients", s.blocked.Load())
	line(b, "tracking_clients", 0)
	line(b, "pubsub_clients", s.bus.clients())
	line(b, "watching_clients", 0)
	line(b, "clients_in_timeout_table", 0)
	line(b, "total_watched_keys", 0)
	line(b, "total_blocking_keys", 0)
}

func infoMemory(c *conn, b *strings.Builder) {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	line(b, "used_memory", m.HeapInuse)
	line(b, "used_memory_human", fmt.Sprintf("%.2fM", float64(m.HeapInuse)/(1<<20)))
	line(b, "used_memory_rss", m.Sys)
	line(b, "used_memory_peak", m.Sys)
	line(b, "used_memory_lua", 0)
	line(b, "maxmemory", 0)
	line(b, "maxmemory_human", "0B")
	line(b, "maxmemory_policy", "noeviction")
	line(b, "mem_fragmentation_ratio", "1.00")
	line(b, "mem_clients_normal", c.s.memory.used.Load())
	line(b, "mem_allocator", "go")
}

func infoPersistence(_ *conn, b *strings.Builder) {
	line(b, "loading", 0)
	line(b, "async_loading", 0)
	line(b, "rdb_changes_since_last_save", 0)
	line(b, "rdb_bgsave_in_progress", 0)
	line(b, "rdb_last_save_time", time.Now().Unix())
	line(b, "rdb_last_bgsave_status", "ok")
	line(b, "aof_enabled", 1)
	line(b, "aof_rewrite_in_progress", 0)
	line(b, "aof_last_bgrewrite_status", "ok")
	line(b, "aof_last_write_status", "ok")
}

func infoStats(c *conn, b *strings.Builder) {
	s := c.s
	line(b, "total_connections_received", s.counts.connections.Load())
	line(b, "total_commands_processed", s.counts.commands.Load())
	line(b, "rejected_connections", s.counts.rejected.Load())
	line(b, "expired_keys", 0)
	line(b, "evicted_keys", 0)
	channels, patterns := s.bus.sizes()
	line(b, "pubsub_channels", channels)
	line(b, "pubsub_patterns", patterns)
}

func infoReplication(c *conn, b *strings.Builder) {
	st := c.s.backend.Status()
	others := 0
	for _, n := range st.Nodes {
		if n.ID != st.ID {
			others++
		}
	}
	if !c.s.leads() {
		host, port := "", "0"
		linkStatus := "down"
		for _, n := range st.Nodes {
			if n.ID == st.Leader {
				host, port = splitAddr(n.Valkey, c)
				linkStatus = "up"
			}
		}
		line(b, "role", "slave")
		line(b, "master_host", host)
		line(b, "master_port", port)
		line(b, "master_link_status", linkStatus)
		line(b, "master_last_io_seconds_ago", 0)
		line(b, "master_sync_in_progress", 0)
		line(b, "slave_read_repl_offset", st.AppliedIndex)
		line(b, "slave_repl_offset", st.AppliedIndex)
		line(b, "slave_priority", 100)
		line(b, "slave_read_only", 1)
		line(b, "replica_announced", 1)
		line(b, "connected_slaves", 0)
	} else {
		line(b, "role", "master")
		line(b, "connected_slaves", others)
		i := 0
		for _, n := range st.Nodes {
			if n.ID == st.ID {
				continue
			}
			host, port := splitAddr(n.Valkey, c)
			state := "online"
			if !n.InSync {
				state = "wait_bgsave"
			}
			fmt.Fprintf(b, "slave%d:ip=%s,port=%s,state=%s,offset=%d,lag=0\r\n", i, host, port, state, n.MatchIndex)
			i++
		}
	}
	line(b, "master_failover_state", "no-failover")
	line(b, "master_replid", hexID(st.ClusterID))
	line(b, "master_replid2", strings.Repeat("0", 40))
	line(b, "master_repl_offset", st.AppliedIndex)
	line(b, "second_repl_offset", -1)
	line(b, "repl_backlog_active", 0)
}

func infoCPU(_ *conn, b *strings.Builder) {
	sys, user := cpuSeconds()
	fmt.Fprintf(b, "used_cpu_sys:%.6f\r\nused_cpu_user:%.6f\r\n", sys, user)
}

func infoCluster(c *conn, b *strings.Builder) {
	enabled := 0
	if c.s.opts.Cluster {
		enabled = 1
	}
	line(b, "cluster_enabled", enabled)
}

func infoKeyspace(c *conn, b *strings.Builder) {
	a, err := c.s.backend.StaleQuery(engine.Query{Kind: engine.QueryDBSize})
	if err != nil || a.Stream == nil || a.Stream.Count == 0 {
		return
	}
	fmt.Fprintf(b, "db0:keys=%d,expires=0,avg_ttl=0\r\n", a.Stream.Count)
}

// infoTercet tells what no Valkey has: who leads, and which zones hold every write.
func infoTercet(c *conn, b *strings.Builder) {
	st := c.s.backend.Status()
	line(b, "node", st.ID)
	line(b, "zone", st.Zone)
	line(b, "raft_role", st.Role)
	line(b, "raft_leader", st.Leader)
	line(b, "raft_term", st.Term)
	line(b, "durability", st.Durability)
	line(b, "zones_in_sync", strings.Join(st.InSync, ","))
}

func cmdTime(c *conn, _ [][]byte) {
	now := time.Now()
	c.w.Array(2)
	c.w.String(itoa(now.Unix()))
	c.w.String(itoa(int64(now.Nanosecond() / 1000)))
}

func cmdLastSave(c *conn, _ [][]byte) { c.w.Int(time.Now().Unix()) }

func cmdLolwut(c *conn, _ [][]byte) {
	c.w.Verbatim("Tercet " + c.s.opts.Version + ": three disks say yes before you hear it.\n")
}

func cmdRole(c *conn, _ [][]byte) {
	st := c.s.backend.Status()
	if !c.s.leads() {
		host, port := "", "0"
		state := "connect"
		for _, n := range st.Nodes {
			if n.ID == st.Leader {
				host, port = splitAddr(n.Valkey, c)
				state = "connected"
			}
		}
		n, _ := strconv.ParseInt(port, 10, 64)
		c.w.Array(5)
		c.w.String("slave")
		c.w.String(host)
		c.w.Int(n)
		c.w.String(state)
		c.w.Int(int64(st.AppliedIndex))
		return
	}
	c.w.Array(3)
	c.w.String("master")
	c.w.Int(int64(st.AppliedIndex))
	var others []raft.NodeStatus
	for _, n := range st.Nodes {
		if n.ID != st.ID {
			others = append(others, n)
		}
	}
	c.w.Array(len(others))
	for _, n := range others {
		host, port := splitAddr(n.Valkey, c)
		c.w.Array(3)
		c.w.String(host)
		c.w.String(port)
		c.w.String(strconv.FormatUint(n.MatchIndex, 10))
	}
}

// cmdWait tells how many other zones hold what the client has written. Writes are acknowledged once every in-sync zone
// holds them, so there is only something to wait for while a zone is away.
func cmdWait(c *conn, a [][]byte) {
	n, ok1 := resp.ParseInt(a[1])
	timeout, ok2 := resp.ParseInt(a[2])
	switch {
	case !ok1:
		c.w.Error("ERR value is not an integer or out of range")
	case n < 0:
		c.w.Error("ERR value is out of range, must be positive")
	case !ok2:
		c.w.Error("ERR timeout is not an integer or out of range")
	case timeout < 0:
		c.w.Error("ERR timeout is negative")
	default:
		c.w.Int(c.replicas(n, timeout))
	}
}

func cmdWaitAOF(c *conn, a [][]byte) {
	local, ok0 := resp.ParseInt(a[1])
	n, ok1 := resp.ParseInt(a[2])
	timeout, ok2 := resp.ParseInt(a[3])
	switch {
	case !ok0 || !ok1:
		c.w.Error("ERR value is not an integer or out of range")
	case local < 0 || local > 1 || n < 0:
		c.w.Error("ERR value is out of range, must be positive")
	case !ok2:
		c.w.Error("ERR timeout is not an integer or out of range")
	case timeout < 0:
		c.w.Error("ERR timeout is negative")
	default:
		others := c.replicas(n, timeout)
		c.w.Array(2)
		c.w.Int(1)
		c.w.Int(others)
	}
}

// replicas waits until n other zones hold the client's writes, at most timeout milliseconds, and returns their number.
func (c *conn) replicas(n, timeout int64) int64 {
	if !c.settle() {
		return 0
	}
	held := int64(c.lastZones.Load()) - 1
	if !c.wrote.Load() {
		held = int64(len(c.s.backend.Status().InSync)) - 1
	}
	held = max(held, 0)
	if held >= n || c.multi != nil {
		return held
	}
	// An entry that all zones hold proves that they hold what came before it.
	deadline := time.Duration(timeout) * time.Millisecond
	ctx, cancel := context.Background(), context.CancelFunc(func() {})
	if timeout > 0 {
		ctx, cancel = context.WithTimeout(ctx, deadline)
	}
	defer cancel()
	tick := engine.Tick{}
	for all := int64(len(c.s.backend.Status().Nodes)) - 1; all >= n; {
		reply, err := c.s.backend.Propose(ctx, raft.Proposal{Command: tick.AppendTo(nil), Require: raft.AllZones})
		if err == nil {
			return max(int64(reply.Zones)-1, held)
		}
		if !c.sleep(ctx, 50*time.Millisecond) {
			return held
		}
	}
	c.sleep(ctx, time.Until(time.Now().Add(min(deadline, time.Hour))))
	return held
}

// sleep waits, unless the connection, the server or ctx ends before.
func (c *conn) sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
	case <-c.done:
	case <-c.s.draining:
	}
	return false
}

func cmdCommand(c *conn, _ [][]byte) {
	specs := command.Specs()
	c.w.Array(len(specs))
	for _, s := range specs {
		writeSpec(&c.w, s)
	}
}

func cmdCommandCount(c *conn, _ [][]byte) { c.w.Int(int64(len(command.Specs()))) }

func cmdCommandInfo(c *conn, a [][]byte) {
	if len(a) == 2 {
		cmdCommand(c, a)
		return
	}
	c.w.Array(len(a) - 2)
	for _, name := range a[2:] {
		if s := command.Lookup(lower(name)); s != nil {
			writeSpec(&c.w, s)
		} else {
			c.w.NullArray()
		}
	}
}

func writeSpec(w *resp.Buffer, s *command.Spec) {
	w.Array(10)
	w.String(s.Name)
	w.Int(int64(s.Arity))
	words := func(list []string, prefix string) {
		w.Set(len(list))
		for _, f := range list {
			w.Simple(prefix + f)
		}
	}
	words(strings.Fields(s.Flags), "")
	w.Int(int64(s.First))
	w.Int(int64(s.Last))
	w.Int(int64(s.Step))
	words(strings.Fields(s.Categories), "@")
	tips := strings.Fields(s.Tips)
	w.Array(len(tips))
	for _, t := range tips {
		w.String(t)
	}
	writeKeySpec(w, s)
	w.Array(len(s.Subcommands))
	for _, sub := range s.Subcommands {
		writeSpec(w, sub)
	}
}

// writeKeySpec says where a command's keys are, in the form of Redis 7.
func writeKeySpec(w *resp.Buffer, s *command.Spec) {
	movable := s.Name == "xread" || s.Name == "xreadgroup"
	if s.First == 0 && !movable {
		w.Array(0)
		return
	}
	w.Array(1)
	w.Map(3)
	w.String("flags")
	if strings.Contains(s.Access, "w") {
		w.Set(2)
		w.Simple("RW")
		w.Simple("update")
	} else {
		w.Set(2)
		w.Simple("RO")
		w.Simple("access")
	}
	w.String("begin_search")
	w.Map(2)
	w.String("type")
	if movable {
		w.String("keyword")
		w.String("spec")
		w.Map(2)
		w.String("keyword")
		w.String("STREAMS")
		w.String("startfrom")
		w.Int(1)
	} else {
		w.String("index")
		w.String("spec")
		w.Map(1)
		w.String("index")
		w.Int(int64(s.First))
	}
	w.String("find_keys")
	w.Map(2)
	w.String("type")
	w.String("range")
	w.String("spec")
	w.Map(3)
	w.String("lastkey")
	last, limit := s.Last, 0
	if movable {
		last, limit = -1, 2
	} else if last > 0 {
		last -= s.First
	}
	w.Int(int64(last))
	w.String("keystep")
	w.Int(int64(max(s.Step, 1)))
	w.String("limit")
	w.Int(int64(limit))
}

func cmdCommandDocs(c *conn, a [][]byte) {
	specs := command.Specs()
	if len(a) > 2 {
		specs = nil
		for _, name := range a[2:] {
			if s := command.Lookup(lower(name)); s != nil {
				specs = append(specs, s)
			}
		}
	}
	c.w.Map(len(specs))
	for _, s := range specs {
		c.w.String(s.Name)
		writeDocs(&c.w, s)
	}
}

func writeDocs(w *resp.Buffer, s *command.Spec) {
	n := 2
	if len(s.Subcommands) > 0 {
		n++
	}
	w.Map(n)
	w.String("since")
	w.String(s.Since)
	w.String("group")
	w.String(s.Group)
	if len(s.Subcommands) > 0 {
		w.String("subcommands")
		w.Map(len(s.Subcommands))
		for _, sub := range s.Subcommands {
			w.String(sub.Name)
			writeDocs(w, sub)
		}
	}
}

func cmdCommandList(c *conn, a [][]byte) {
	keep := func(*command.Spec) bool { return true }
	switch {
	case len(a) == 2:
	case len(a) == 5 && is(a[2], "filterby") && is(a[3], "module"):
		keep = func(*command.Spec) bool { return false }
	case len(a) == 5 && is(a[2], "filterby") && is(a[3], "aclcat"):
		ids, _ := command.InCategory(lower(a[4]))
		in := map[command.ID]bool{}
		for _, id := range ids {
			in[id] = true
		}
		keep = func(s *command.Spec) bool { return in[s.ID] }
	case len(a) == 5 && is(a[2], "filterby") && is(a[3], "pattern"):
		pattern := string(a[4])
		keep = func(s *command.Spec) bool { return acl.Match(strings.ToLower(pattern), s.Name) }
	default:
		c.w.Error("ERR syntax error")
		return
	}
	var names []string
	for _, s := range command.Specs() {
		if keep(s) {
			names = append(names, s.Name)
		}
		for _, sub := range s.Subcommands {
			if len(a) > 2 && keep(sub) {
				names = append(names, sub.Name)
			}
		}
	}
	c.w.Array(len(names))
	for _, n := range names {
		c.w.String(n)
	}
}

// keysOf finds the keys of a command that is given as arguments, or writes why that cannot be done.
func (c *conn) keysOf(a [][]byte) ([]command.KeyUse, bool) {
	spec, bad := command.Find(a)
	if spec == nil || bad {
		c.w.Error("ERR Invalid command specified")
		return nil, false
	}
	if !spec.Arguments(len(a)) {
		c.w.Error("ERR Invalid number of arguments specified for command")
		return nil, false
	}
	keys := spec.Keys(nil, a)
	if len(keys) == 0 {
		c.w.Error("ERR The command has no key arguments")
		return nil, false
	}
	return keys, true
}

func cmdCommandGetKeys(c *conn, a [][]byte) {
	keys, ok := c.keysOf(a[2:])
	if !ok {
		return
	}
	c.w.Array(len(keys))
	for _, k := range keys {
		c.w.Bulk(a[2+k.Index])
	}
}

func cmdCommandGetKeysAndFlags(c *conn, a [][]byte) {
	keys, ok := c.keysOf(a[2:])
	if !ok {
		return
	}
	c.w.Array(len(keys))
	for _, k := range keys {
		c.w.Array(2)
		c.w.Bulk(a[2+k.Index])
		flags := []string{"RO", "access"}
		switch {
		case k.Write && k.Read:
			flags = []string{"RW", "access", "update"}
		case k.Write:
			flags = []string{"RW", "update"}
		}
		c.w.Set(len(flags))
		for _, f := range flags {
			c.w.Simple(f)
		}
	}
}

// configuration is what CONFIG GET answers: what clients and tools ask for.
func (s *Server) configuration(c *conn) [][2]string {
	return [][2]string{
		{"appendfsync", "always"},
		{"appendonly", "yes"},
		{"bind", "127.0.0.1 -::1"},
		{"cluster-enabled", map[bool]string{true: "yes", false: "no"}[s.opts.Cluster]},
		{"databases", "1"},
		{"maxclients", strconv.Itoa(s.limits.Connections)},
		{"maxmemory", "0"},
		{"maxmemory-policy", "noeviction"},
		{"notify-keyspace-events", ""},
		{"port", localPort(c.nc)},
		{"proto-max-bulk-len", strconv.Itoa(resp.BulkMax)},
		{"save", ""},
		{"slowlog-log-slower-than", "-1"},
		{"slowlog-max-len", "0"},
		{"stream-node-max-bytes", "4096"},
		{"stream-node-max-entries", "100"},
		{"timeout", itoa(int64(s.limits.IdleTimeout.Seconds()))},
	}
}

func cmdConfigGet(c *conn, a [][]byte) {
	var found [][2]string
	for _, kv := range c.s.configuration(c) {
		for _, pattern := range a[2:] {
			if acl.Match(lower(pattern), kv[0]) {
				found = append(found, kv)
				break
			}
		}
	}
	c.w.Map(len(found))
	for _, kv := range found {
		c.w.String(kv[0])
		c.w.String(kv[1])
	}
}

func cmdConfigSet(c *conn, a [][]byte) {
	if len(a)%2 != 0 {
		c.w.Error("ERR wrong number of arguments for 'config|set' command")
		return
	}
	for _, kv := range c.s.configuration(c) {
		if is(a[2], kv[0]) {
			c.w.Error("ERR CONFIG SET failed (possibly related to argument '" + kv[0] + "') - can't set immutable config")
			return
		}
	}
	c.w.Error("ERR Unknown option or number of arguments for CONFIG SET - '" + string(a[2]) + "'")
}

func cmdConfigRewrite(c *conn, _ [][]byte) {
	c.w.Error("ERR The server is running without a config file")
}

func cmdOK(c *conn, _ [][]byte) { c.w.OK() }

func cmdZero(c *conn, _ [][]byte) { c.w.Int(0) }

func cmdEmpty(c *conn, _ [][]byte) { c.w.Array(0) }

func cmdEmptyMap(c *conn, _ [][]byte) { c.w.Map(0) }

func cmdLatencyDoctor(c *conn, _ [][]byte) {
	c.w.Verbatim("Latency is measured elsewhere: see /metrics of the HTTP port.\n")
}

func cmdLatencyGraph(c *conn, a [][]byte) {
	c.w.Error("ERR No samples available for event '" + string(a[2]) + "'")
}

func cmdLatencyReset(c *conn, _ [][]byte) { c.w.Int(0) }
