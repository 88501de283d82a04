package compat

import (
	"bytes"
	"context"
	"net"
	"strconv"
	"strings"
	"time"

	"tercet.dev/tercet/compat/acl"
	"tercet.dev/tercet/compat/command"
	"tercet.dev/tercet/compat/resp"
)

// Upstream is a real server beside the log, or a cluster of them. Keys that match Options.UpstreamKeep are the log's;
// whatever is about other keys, and commands that the log does not know, go to the upstream as they came.
type Upstream interface {
	// Session opens a connection that is logged in and speaks the version of the protocol, 2 or 3. addr is one of the
	// addresses of Shards, or empty for the upstream's own.
	Session(ctx context.Context, addr string, version int) (net.Conn, error)
	// Login returns the command that logs in, nil for none, and after how long a session has to log in again, 0 for never.
	Login(ctx context.Context) (args []string, again time.Duration, err error)
	// KeyTable returns the upstream's own account of its commands, by name in lower case; subcommands are called
	// "script|load".
	KeyTable(ctx context.Context) (map[string]UpstreamCommand, error)
	// Shards returns who has which slots, nil for a server that is not in cluster mode. known are further addresses to ask
	// when the upstream's own does not answer.
	Shards(ctx context.Context, known []string) ([]UpstreamShard, error)
	// String names the upstream without its secrets.
	String() string
}

// UpstreamCommand is what COMMAND says of a command: how many words it has, the name included (at least as many if
// negative), where its keys are, and what to do with it in cluster mode.
type UpstreamCommand struct {
	Arity             int
	First, Last, Step int
	// Movable is set when finding the keys takes a look at the arguments, NoMulti for what MULTI does not take.
	Movable, NoMulti bool
	// Everywhere is set for commands without keys that go to all shards; Fold says how their replies become one, as the
	// response_policy does.
	Everywhere bool
	Fold       string
}

// UpstreamShard is a primary of a cluster, with the slots that it has, first and last of each range.
type UpstreamShard struct {
	Addr  string
	Slots [][2]int
}

// Bounds of one client's connection to the upstream.
const (
	upstreamDial = 5 * time.Second
	// upstreamAhead bounds the commands that wait for the upstream's replies, upstreamKept their bytes where they are kept
	// for another shard, upstreamBuffer the bytes that are not yet sent.
	upstreamAhead  = 4096
	upstreamKept   = 4 << 20
	upstreamBuffer = 64 << 10
	// upstreamReply bounds one reply.
	upstreamReply = 512 << 20
	// upstreamLinger is how long replies are waited for once the client has ended its side.
	upstreamLinger = time.Second
)

// side is where a command goes.
type side uint8

const (
	sideLog side = iota
	sideUpstream
	sideBoth // its keys lie on both sides
	sideNone // the log does not know it, and a key is the log's
)

// passThrough takes a command that is the upstream's, and reports whether it did. spec is nil for a name that the log does
// not know.
func (c *conn) passThrough(spec *command.Spec, args [][]byte) bool {
	var low [64]byte
	name := string(bytes.ToLower(append(low[:0], args[0][:min(len(args[0]), len(low))]...)))
	switch name {
	case "hello", "auth", "client", "quit", "echo", "acl", "command", "config", "info", "cluster", "readonly", "readwrite", "role", "tercet", "time",
		"wait", "waitaof", "lolwut", "asking", "latency", "memory", "slowlog":
		if spec != nil {
			if name == "hello" || name == "auth" {
				c.leaveUpstream()
			}
			return c.inTransaction(name, args)
		}
	case "reset":
		c.leaveUpstream()
		return false
	case "unwatch":
		if c.upWatch == nil || c.upMulti != multiNone {
			return c.inTransaction(name, args)
		}
		c.watches = nil
		c.unwatchUpstream()
		c.w.OK()
		c.emit()
		return true
	case "ping":
		if u := c.subscribedUpstream(); u != nil {
			replies := 1
			if !c.w.V3 {
				replies = -1 // its reply is a message
			}
			c.sendTo(u, args, replies)
			return true
		}
		return c.inTransaction(name, args)
	case "multi":
		if c.multi == nil && c.upMulti == multiNone {
			c.upMulti = multiOpen
			c.w.OK()
		} else {
			c.upDirty = c.upDirty || c.upMulti != multiNone
			c.w.Error("ERR MULTI calls can not be nested")
		}
		c.emit()
		return true
	case "exec", "discard":
		return c.endUpstreamMulti(name)
	}
	table, err := c.s.upstream.get(c.s.opts.Upstream)
	if err != nil && spec == nil {
		c.unreachable(err)
		return true
	}
	known, isKnown := lookUp(table, name, args)
	where := c.sideOf(spec, name, args, known, isKnown)
	if (where == sideLog || where == sideUpstream) && (c.upWatch != nil && where == sideLog || len(c.watches) > 0 && where == sideUpstream) &&
		(name == "watch" || c.upMulti == multiOpen) {
		where = sideBoth
	}
	switch where {
	case sideLog:
		if c.upMulti == multiUpstream {
			c.refuseInMulti("ERR this transaction runs on the upstream, and the command is about keys of the log: use two transactions")
			return true
		}
		if c.upMulti == multiOpen {
			c.upMulti = multiLog
			c.multi = &transaction{dirty: c.upDirty}
		}
		return false
	case sideBoth:
		what := "the keys of this command"
		if c.upMulti != multiNone || name == "watch" {
			what = "the keys of this command, and those that are watched,"
		}
		c.refuseInMulti("ERR " + what + " are on both sides: those that match " + strings.Join(c.s.opts.UpstreamKeep, " ") +
			" are in the log, others on the upstream; use one command for each side")
		return true
	case sideNone:
		c.refuseInMulti("ERR '" + name + "' runs on the upstream only, and keys that match " + strings.Join(c.s.opts.UpstreamKeep, " ") +
			" are in the log: use keys that match none of these")
		return true
	}
	if c.upMulti == multiLog {
		c.refuseInMulti("ERR this transaction runs in the log, and the command belongs to the upstream: use two transactions")
		return true
	}
	if text := c.upstreamPermission(name, args); text != "" {
		c.refuseInMulti(text)
		return true
	}
	slot := -1
	if len(c.keyUses) > 0 && c.keyUses[0].Index < len(args) {
		slot = keySlot(args[c.keyUses[0].Index])
	}
	switch name {
	case "subscribe", "psubscribe", "ssubscribe", "unsubscribe", "punsubscribe", "sunsubscribe":
		if c.upMulti != multiNone {
			c.refuseInMulti("ERR Command not allowed inside a transaction")
			return true
		}
		c.settle() // messages overtake nothing
		c.subscribeUpstream(name, args, slot)
		return true
	}
	if !c.w.V3 && c.subscribedUpstream() != nil {
		c.refuseInMulti(subscribedOnly(name))
		return true
	}
	if c.upMulti == multiOpen {
		c.upMulti = multiUpstream
	}
	if c.upMulti == multiUpstream {
		c.queueUpstream(args, known, isKnown, slot)
		return true
	}
	switch {
	case name == "watch":
		c.watchUpstream(args, slot)
	case slot < 0 && c.s.upstream.clustered():
		c.sendEverywhere(name, args, known)
	default:
		c.sendUpstream(args, slot)
	}
	return true
}

// lookUp finds a command, or the subcommand that args name, in the upstream's own account.
func lookUp(table map[string]UpstreamCommand, name string, args [][]byte) (UpstreamCommand, bool) {
	known, ok := table[name]
	if ok && known.First == 0 && len(args) > 1 && len(args[1]) <= 32 {
		if sub, ok := table[name+"|"+lower(args[1])]; ok {
			return sub, true
		}
	}
	return known, ok
}

// inTransaction takes a command that concerns neither side into the transaction that is open, wherever that runs.
func (c *conn) inTransaction(name string, args [][]byte) bool {
	switch c.upMulti {
	case multiUpstream:
		table, _ := c.s.upstream.get(c.s.opts.Upstream)
		known, ok := lookUp(table, name, args)
		c.queueUpstream(args, known, ok, -1)
		return true
	case multiOpen:
		c.upMulti, c.multi = multiLog, &transaction{dirty: c.upDirty}
	}
	return false
}

// multiSide says where an open transaction runs. The first command that is about one side decides.
type multiSide uint8

const (
	multiNone multiSide = iota
	multiOpen
	multiLog
	multiUpstream
)

// refuseInMulti answers a command with an error; a transaction that is open fails with it.
func (c *conn) refuseInMulti(text string) {
	if c.upMulti != multiNone {
		c.upDirty = true
	}
	if c.multi != nil {
		c.multi.dirty = true
	}
	c.w.Error(text)
	c.emit()
}

// queueUpstream keeps a command of a transaction that will run on the upstream. The transaction goes there as one when
// EXEC comes: only then is it known to be on one shard, and it can follow its slot to another.
func (c *conn) queueUpstream(args [][]byte, known UpstreamCommand, isKnown bool, slot int) {
	t := &c.upQueue
	switch {
	case isKnown && (known.Arity > 0 && len(args) != known.Arity || len(args) < -known.Arity):
		c.refuseInMulti("ERR wrong number of arguments for '" + lower(args[0]) + "' command")
		return
	case isKnown && known.NoMulti:
		c.refuseInMulti("ERR Command not allowed inside a transaction")
		return
	case slot >= 0 && t.slot >= 0 && slot != t.slot && c.s.upstream.clustered():
		c.refuseInMulti("CROSSSLOT Keys in request don't hash to the same slot")
		return
	}
	size := queuedOverhead
	for _, a := range args {
		size += len(a) + queuedOverhead
	}
	if !c.s.memory.take(size) {
		c.refuseInMulti("ERR no memory for a transaction of this size")
		return
	}
	t.taken += size
	if t.commands == 0 {
		t.raw.Array(1)
		t.raw.String("MULTI")
	}
	appendCommand(&t.raw, args)
	t.commands++
	if slot >= 0 {
		t.slot = slot
	}
	c.w.Simple("QUEUED")
	c.emit()
}

// upstreamQueue is the transaction that a client is putting together.
type upstreamQueue struct {
	raw      resp.Buffer
	commands int
	taken    int // of the budget
	slot     int // of its keys, -1 for none so far
}

// dropUpstreamMulti forgets the open transaction.
func (c *conn) dropUpstreamMulti() {
	c.s.memory.take(-c.upQueue.taken)
	c.upQueue = upstreamQueue{slot: -1}
	c.upMulti, c.upDirty = multiNone, false
}

// endUpstreamMulti handles EXEC and DISCARD of a transaction whose side is open or the upstream's.
func (c *conn) endUpstreamMulti(name string) bool {
	if c.upMulti == multiNone || c.upMulti == multiLog {
		c.upMulti, c.upDirty = multiNone, false
		return false
	}
	defer c.dropUpstreamMulti()
	switch {
	case name == "discard":
		c.unwatchUpstream()
		c.w.OK()
	case c.upDirty:
		c.unwatchUpstream()
		c.w.Error("EXECABORT Transaction discarded because of previous errors.")
	case c.upMulti == multiOpen && c.upWatch == nil:
		c.w.Array(0)
	default:
		c.execUpstream()
		return true
	}
	c.emit()
	return true
}

// sideOf decides by the keys. What has none is the upstream's, unless only the log knows it.
func (c *conn) sideOf(spec *command.Spec, name string, args [][]byte, known UpstreamCommand, ok bool) side {
	c.keyUses = c.keyUses[:0]
	switch {
	case spec != nil && (spec.First != 0 || name == "xread" || name == "xreadgroup"):
		c.keyUses = spec.Keys(c.keyUses, args)
	case ok && known.First > 0:
		last := known.Last
		if last < 0 {
			last += len(args)
		}
		for i := known.First; i <= last && i < len(args); i += max(known.Step, 1) {
			c.keyUses = append(c.keyUses, command.KeyUse{Index: i, Read: true, Write: true})
		}
	case ok && known.Movable:
		c.keyUses = countedKeys(c.keyUses, name, args)
	}
	if spec != nil && spec.Parent != nil && !ok && len(c.keyUses) == 0 {
		return sideLog
	}
	logs := 0
	for _, u := range c.keyUses {
		if u.Index < len(args) && c.s.kept(args[u.Index]) {
			logs++
		}
	}
	switch {
	case len(c.keyUses) == 0:
		return sideUpstream
	case logs == 0:
		return sideUpstream
	case spec == nil:
		return sideNone
	case logs < len(c.keyUses):
		return sideBoth
	}
	return sideLog
}

// countedKeys finds the keys of commands that say how many they have.
func countedKeys(dst []command.KeyUse, name string, args [][]byte) []command.KeyUse {
	at := 1
	switch name {
	case "eval", "eval_ro", "evalsha", "evalsha_ro", "fcall", "fcall_ro", "zunionstore", "zinterstore", "zdiffstore", "blmpop", "bzmpop":
		at = 2
	}
	switch name {
	case "zunionstore", "zinterstore", "zdiffstore", "sort", "sort_ro":
		dst = append(dst, command.KeyUse{Index: 1, Read: true, Write: true})
	}
	if at >= len(args) {
		return dst
	}
	n, err := strconv.Atoi(string(args[at]))
	if err != nil || n < 0 {
		return dst
	}
	for i := at + 1; i <= at+n && i < len(args); i++ {
		dst = append(dst, command.KeyUse{Index: i, Read: true, Write: true})
	}
	return dst
}

// kept reports whether a key is the log's. What Tercet's own programs put beside a stream, under its hash tag, goes with it.
func (s *Server) kept(key []byte) bool {
	if name, rest, ok := bytes.Cut(key, []byte("}")); ok && len(name) > 1 && name[0] == '{' && bytes.HasPrefix(rest, []byte(":tercet:")) {
		key = name[1:]
	}
	for _, p := range s.opts.UpstreamKeep {
		if acl.Match(p, string(key)) {
			return true
		}
	}
	return false
}

// upstreamPermission checks what the client's user may do on the upstream. The upstream itself knows one user: the one of
// the session.
func (c *conn) upstreamPermission(name string, args [][]byte) string {
	id, ok := command.AnyID(name)
	if !ok {
		// Newer than the catalogue: who may do what is dangerous may do this.
		id, _ = command.AnyID("debug")
	}
	a := acl.Access{Command: id, Args: args, Keys: c.keyUses}
	verdict, object := c.user.Check(&a)
	if verdict == acl.Allowed {
		return ""
	}
	c.s.metrics.refused.WithLabelValues("permission").Inc()
	what := name
	if verdict != acl.DeniedCommand {
		what = string(args[object])
	}
	c.s.aclLog.add(verdict.String(), c.context(), what, c.user.Name, c)
	return denial(verdict, c.user.Name, name)
}
