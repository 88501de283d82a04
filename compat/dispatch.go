package compat

import (
	"bytes"
	"strings"
	"time"

	"tercet.dev/tercet/compat/acl"
	"tercet.dev/tercet/compat/command"
	"tercet.dev/tercet/engine"
)

// handler carries a command out. One of its members is set.
type handler struct {
	// local answers without the engine, into c.w.
	local func(c *conn, args [][]byte)
	// build makes an engine command or query. When the arguments are wrong it writes the error into c.w and reports false.
	build func(c *conn, args [][]byte) (operation, bool)
}

// operation is what a command asks of the engine: a command or a query.
type operation struct {
	command engine.Command
	query   *engine.Query
	word    wordFunc
	// block is how long a read that finds nothing waits; negative is not at all, 0 for ever.
	block time.Duration
	// group is set for XREADGROUP with ">" alone, which may wait.
	group *engine.StreamReadGroup
	// size estimates the encoded command.
	size int
}

// noBlock is the block of an operation that does not wait.
const noBlock = time.Duration(-1)

// handlers are by command.ID; those of names that are not answered are empty.
var handlers []handler

// dispatch carries one command out.
func (c *conn) dispatch(args [][]byte) {
	s := c.s
	s.counts.commands.Add(1)
	spec, badSub := command.Find(args)
	c.desc.command(spec, args)
	if s.opts.Upstream != nil && !isCrossProtocol(args[0]) {
		if rev := s.usersRev.Load(); rev != c.usersRev && !c.refreshUser(rev) {
			return
		}
		if c.authenticated && c.passThrough(spec, args) {
			return
		}
	}
	switch {
	case spec == nil:
		if isCrossProtocol(args[0]) {
			s.log.Warn("a client speaks HTTP to the Valkey port: closing the connection, this may be a cross-protocol attack", "client", c.nc.RemoteAddr().String())
			c.kill("http")
			return
		}
		s.metrics.unknown(string(args[0]))
		c.reject(spec, unknownCommand(args))
		return
	case badSub:
		s.metrics.unknown(spec.Name + "|" + string(args[1]))
		c.reject(spec, "ERR unknown subcommand '"+clip(args[1], 128)+"'. Try "+strings.ToUpper(spec.Name)+" HELP.")
		return
	case !spec.Arguments(len(args)):
		c.reject(spec, wrongArguments(spec))
		return
	}
	if rev := s.usersRev.Load(); rev != c.usersRev && !c.refreshUser(rev) {
		return
	}
	if !c.authenticated && !spec.Is(command.NoAuth) {
		s.metrics.refused.WithLabelValues("authentication").Inc()
		c.reject(spec, "NOAUTH Authentication required.")
		return
	}
	if c.multi != nil && spec.Is(command.NoMulti) {
		c.reject(spec, "ERR Command not allowed inside a transaction")
		return
	}
	if !spec.Is(command.NoAuth) {
		if text := c.permission(spec, args); text != "" {
			c.reject(spec, text)
			return
		}
	}
	if s.opts.Cluster && c.redirect(spec, args) {
		return
	}
	if c.subs != nil && !c.w.V3 && c.subs.count() > 0 && !allowedWhileSubscribed(spec) {
		c.reject(spec, subscribedOnly(spec.Name))
		return
	}
	if c.multi != nil {
		switch spec.Name {
		case "exec", "discard", "quit", "reset", "multi", "watch":
		default:
			c.queueCommand(spec, args)
			return
		}
	}
	c.run(spec, args)
}

// run carries out a command that has passed all checks.
func (c *conn) run(spec *command.Spec, args [][]byte) {
	h := &handlers[spec.ID]
	c.s.metrics.commands.WithLabelValues(spec.Name).Inc()
	if h.local != nil {
		h.local(c, args)
		c.emit()
		return
	}
	op, ok := h.build(c, args)
	if !ok {
		c.emit()
		return
	}
	c.execute(spec, args, &op)
}

// execute submits a write, asks a query, and waits where a read may.
func (c *conn) execute(spec *command.Spec, args [][]byte, op *operation) {
	switch {
	case op.group != nil:
		c.readGroup(op)
	case op.command != nil:
		c.submit(encode(op), op.word, nil)
	case op.block >= 0:
		c.readBlocking(op)
	default:
		a, err := c.read(op.query)
		c.wordRead(&a, err, op)
		c.trackRead(spec, args)
		c.emit()
	}
}

// encode encodes an operation's command.
func encode(op *operation) []byte {
	return op.command.AppendTo(make([]byte, 0, op.size+64))
}

// reject answers a command with an error before it is carried out. In a transaction the EXEC will fail.
func (c *conn) reject(spec *command.Spec, text string) {
	if c.multi != nil {
		c.multi.dirty = true
		if spec != nil && spec.Name == "exec" {
			c.multi = nil
			c.watches = nil
			text = "EXECABORT Transaction discarded because of: " + strings.TrimPrefix(text, "ERR ")
		}
	}
	c.w.Error(text)
	c.emit()
}

func wrongArguments(spec *command.Spec) string {
	return "ERR wrong number of arguments for '" + spec.Name + "' command"
}

// unknownCommand words the error as Valkey does, blanks included: libraries look for parts of it.
func unknownCommand(args [][]byte) string {
	var b strings.Builder
	for _, a := range args[1:] {
		if b.Len() >= 128 {
			break
		}
		b.WriteString("'" + clip(a, 128-b.Len()) + "' ")
	}
	return "ERR unknown command '" + clip(args[0], 128) + "', with args beginning with: " + b.String()
}

// clip returns at most n bytes of b, as far as a C string would go.
func clip(b []byte, n int) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b[:min(n, len(b))])
}

// isCrossProtocol recognises the first words of HTTP requests.
func isCrossProtocol(name []byte) bool {
	return strings.EqualFold(string(name), "post") || strings.EqualFold(string(name), "host:")
}

func allowedWhileSubscribed(spec *command.Spec) bool {
	switch spec.Name {
	case "subscribe", "unsubscribe", "psubscribe", "punsubscribe", "ssubscribe", "sunsubscribe", "ping", "quit", "reset":
		return true
	}
	return false
}

// subscribedOnly is what a RESP2 client with subscriptions hears that sends anything else.
func subscribedOnly(name string) string {
	return "ERR Can't execute '" + strings.ReplaceAll(name, "|", " ") + "': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in this context"
}

// permission checks what the client's user may do and returns the refusal, empty for none.
func (c *conn) permission(spec *command.Spec, args [][]byte) string {
	c.keyUses = spec.Keys(c.keyUses[:0], args)
	a := acl.Access{Command: spec.ID, Args: args, Keys: c.keyUses}
	switch spec.Name {
	case "subscribe", "ssubscribe":
		a.ChannelsFrom, a.ChannelsTo = 1, len(args)
	case "psubscribe":
		a.ChannelsFrom, a.ChannelsTo, a.Literal = 1, len(args), true
	case "publish", "spublish":
		a.ChannelsFrom, a.ChannelsTo = 1, 2
	}
	verdict, object := c.user.Check(&a)
	if verdict == acl.Allowed {
		return ""
	}
	c.s.metrics.refused.WithLabelValues("permission").Inc()
	what := spec.Name
	if verdict != acl.DeniedCommand {
		what = string(args[object])
	}
	c.s.aclLog.add(verdict.String(), c.context(), what, c.user.Name, c)
	return denial(verdict, c.user.Name, spec.Name)
}

func denial(v acl.Verdict, user, name string) string {
	switch v {
	case acl.DeniedKey:
		return "NOPERM No permissions to access a key"
	case acl.DeniedChannel:
		return "NOPERM No permissions to access a channel"
	}
	return "NOPERM User " + user + " has no permissions to run the '" + name + "' command"
}

func (c *conn) context() string {
	if c.multi != nil {
		return "multi"
	}
	return "toplevel"
}

// refreshUser looks the client's user up again after users have changed. A client whose user is gone is cut off.
func (c *conn) refreshUser(rev uint64) bool {
	c.usersRev = rev
	u := c.s.users.Get(c.user.Name)
	if u == nil {
		c.kill("user deleted")
		return false
	}
	if !c.authenticated && u.Name == acl.DefaultName {
		c.setUser(u, u.Enabled && u.NoPassword)
		return true
	}
	c.user = u
	return true
}
