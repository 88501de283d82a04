package compat

import (
	"bytes"
	"context"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tercet.dev/tercet/compat/acl"
	"tercet.dev/tercet/compat/command"
	"tercet.dev/tercet/compat/resp"
)

// Upstream is a real server beside the log. Keys that match Options.UpstreamKeep are the log's; whatever is about other
// keys, and commands that the log does not know, go to the upstream as they came.
type Upstream interface {
	// Session opens a connection that is logged in and speaks the version of the protocol, 2 or 3.
	Session(ctx context.Context, version int) (net.Conn, error)
	// Login returns the command that logs in, nil for none, and after how long a session has to log in again, 0 for never.
	Login(ctx context.Context) (args []string, again time.Duration, err error)
	// KeyTable returns the upstream's own account of its commands: for each name in lower case where keys stand.
	KeyTable(ctx context.Context) (map[string]UpstreamCommand, error)
	// String names the upstream without its secrets.
	String() string
}

// UpstreamCommand says where a command of the upstream has its keys, as COMMAND INFO does. Movable is set when that takes
// a look at the arguments.
type UpstreamCommand struct {
	First, Last, Step int
	Movable           bool
}

// Bounds of one client's connection to the upstream.
const (
	upstreamDial = 5 * time.Second
	// upstreamAhead bounds the commands that wait for the upstream's replies, upstreamBuffer their bytes before they are sent.
	upstreamAhead  = 4096
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
			return c.upMulti != multiNone && c.inTransaction(args)
		}
	case "reset":
		c.leaveUpstream()
		return false
	case "unwatch":
		if c.up == nil || c.upMulti == multiLog {
			return false
		}
		c.watches = nil
		return c.sendUpstream(args, 1)
	case "ping":
		if c.up != nil && c.up.subscribed() {
			c.sendUpstream(args, 1)
			return true
		}
		return c.upMulti != multiNone && c.inTransaction(args)
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
		return c.endUpstreamMulti(name, args)
	}
	table, err := c.s.upstream.get(c.s.opts.Upstream)
	if err != nil && spec == nil {
		c.unreachable(err)
		return true
	}
	switch c.sideOf(spec, name, args, table) {
	case sideLog:
		if c.upMulti == multiUpstream {
			c.refuseInMulti("ERR this transaction runs on the upstream, and the command is about keys of the log: use two transactions")
			return true
		}
		if c.upMulti == multiOpen {
			c.upMulti = multiLog
			c.multi = &transaction{}
		}
		return false
	case sideBoth:
		c.refuseInMulti("ERR the keys of this command are on both sides: those that match " + strings.Join(c.s.opts.UpstreamKeep, " ") +
			" are in the log, others on the upstream; use one command for each side")
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
	if c.upMulti == multiOpen {
		c.upMulti = multiUpstream
		if !c.sendUpstream([][]byte{[]byte("MULTI")}, 0) {
			return true
		}
	}
	replies := 1
	switch name {
	case "subscribe", "psubscribe", "ssubscribe", "unsubscribe", "punsubscribe", "sunsubscribe":
		if c.upMulti == multiNone {
			c.settle() // messages overtake nothing
			replies = -1
		}
	}
	c.sendUpstream(args, replies)
	return true
}

// inTransaction takes a command that concerns neither side into the transaction that is open, wherever that runs.
func (c *conn) inTransaction(args [][]byte) bool {
	switch c.upMulti {
	case multiUpstream:
		c.sendUpstream(args, 1)
		return true
	case multiOpen:
		c.upMulti, c.multi = multiLog, &transaction{}
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

// endUpstreamMulti handles EXEC and DISCARD of a transaction whose side is open or the upstream's.
func (c *conn) endUpstreamMulti(name string, args [][]byte) bool {
	where, dirty := c.upMulti, c.upDirty
	c.upMulti, c.upDirty = multiNone, false
	switch where {
	case multiNone, multiLog:
		return false
	case multiOpen:
		if name == "discard" {
			c.w.OK()
		} else if dirty {
			c.w.Error("EXECABORT Transaction discarded because of previous errors.")
		} else {
			c.w.Array(0)
		}
		c.emit()
		return true
	}
	if dirty && name == "exec" {
		if c.sendUpstream([][]byte{[]byte("DISCARD")}, 0) {
			c.w.Error("EXECABORT Transaction discarded because of previous errors.")
			c.emit()
		}
		return true
	}
	c.sendUpstream(args, 1)
	return true
}

// sideOf decides by the keys. What has none is the upstream's, unless only the log knows it.
func (c *conn) sideOf(spec *command.Spec, name string, args [][]byte, table map[string]UpstreamCommand) side {
	c.keyUses = c.keyUses[:0]
	known, ok := table[name]
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
		if _, ok := table[spec.Parent.Name]; !ok {
			return sideLog
		}
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
	case logs < len(c.keyUses), spec == nil:
		return sideBoth // a command that the log does not know cannot be about its keys
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

// upstreamConn is one client's connection to the upstream. Commands go out in their order; replies come back in it and
// take their places in the client's queue.
type upstreamConn struct {
	c   *conn
	nc  net.Conn
	out resp.Buffer // not yet sent; the reader's
	// since is when the session last logged in, again after how long it has to anew; 0 for never.
	since time.Time
	again time.Duration

	mu      sync.Mutex
	moved   sync.Cond
	waiting []*slot // for replies, in order; nil for one that nobody wants
	closed  bool
	ending  bool
	subs    int // subscriptions, as the upstream last said
	ended   chan struct{}
}

// sendUpstream sends a command that has the given number of replies: 0 for one that is dropped, -1 for none but messages.
// It reports false after answering with an error.
func (c *conn) sendUpstream(args [][]byte, replies int) bool {
	u := c.up
	if u == nil {
		var err error
		if u, err = c.dialUpstream(); err != nil {
			c.unreachable(err)
			return false
		}
		c.up = u
	}
	c.loginAgain(u)
	var s *slot
	if replies == 1 {
		s = c.newSlot()
		s.silent = c.silence()
		c.mu.Lock()
		c.queue = append(c.queue, s)
		c.mu.Unlock()
	}
	u.mu.Lock()
	for len(u.waiting) >= upstreamAhead && !u.closed {
		u.mu.Unlock()
		u.send()
		u.mu.Lock()
		if len(u.waiting) >= upstreamAhead && !u.closed {
			u.moved.Wait()
		}
	}
	closed := u.closed
	if !closed && replies >= 0 {
		u.waiting = append(u.waiting, s)
	}
	u.mu.Unlock()
	if closed {
		c.up = nil
		if s != nil {
			s.answer([]byte("-ERR the connection to the upstream is broken, nothing was done\r\n"))
		}
		c.upMulti, c.upDirty = multiNone, false
		return s != nil
	}
	u.command(args)
	c.s.metrics.passed.Inc()
	if len(u.out.B) >= upstreamBuffer {
		u.send()
	}
	return true
}

// command buffers a command.
func (u *upstreamConn) command(args [][]byte) {
	u.out.Array(len(args))
	for _, a := range args {
		u.out.Bulk(a)
	}
}

// loginAgain sends a fresh login ahead of the next command when it is due.
func (c *conn) loginAgain(u *upstreamConn) {
	if u.again == 0 || c.upMulti != multiNone || time.Since(u.since) < u.again {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), upstreamDial)
	defer cancel()
	words, again, err := c.s.opts.Upstream.Login(ctx)
	if err != nil || words == nil {
		c.s.log.Warn("cannot log in to the upstream anew", "upstream", c.s.opts.Upstream.String(), "error", err)
		return
	}
	u.since, u.again = time.Now(), again
	args := make([][]byte, len(words))
	for i, w := range words {
		args[i] = []byte(w)
	}
	u.mu.Lock()
	u.waiting = append(u.waiting, nil)
	u.mu.Unlock()
	u.command(args)
}

// unreachable says that there is nobody to pass a command to.
func (c *conn) unreachable(err error) {
	c.s.metrics.upstream.WithLabelValues("refused").Inc()
	c.upMulti, c.upDirty = multiNone, false
	c.w.Error("ERR the upstream " + c.s.opts.Upstream.String() + " cannot be reached: " + oneLine(err.Error()))
	c.emit()
}

// passOn sends what is buffered for the upstream.
func (c *conn) passOn() {
	if c.up != nil {
		c.up.send()
	}
}

// upstreamTable is where the upstream's commands have their keys, asked for once.
type upstreamTable struct {
	known  atomic.Pointer[map[string]UpstreamCommand] // every command of every client looks here
	mu     sync.Mutex
	failed error
	at     time.Time
}

// upstreamRetry is how long a failure to ask is remembered.
const upstreamRetry = time.Second

func (t *upstreamTable) get(u Upstream) (map[string]UpstreamCommand, error) {
	if table := t.known.Load(); table != nil {
		return *table, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if table := t.known.Load(); table != nil {
		return *table, nil
	}
	if t.failed != nil && time.Since(t.at) < upstreamRetry {
		return nil, t.failed
	}
	ctx, cancel := context.WithTimeout(context.Background(), upstreamDial)
	defer cancel()
	table, err := u.KeyTable(ctx)
	if t.failed, t.at = err, time.Now(); err == nil {
		t.known.Store(&table)
	}
	return table, err
}

func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\r' || r == '\n' {
			return ' '
		}
		return r
	}, s)
}

// answer completes a slot with a reply that is ready.
func (s *slot) answer(raw []byte) {
	c := s.c
	if s.fill(raw) {
		c.flush()
	}
}

// fill is answer, and leaves it to the caller to have the client's writer woken, which it reports to be due.
func (s *slot) fill(raw []byte) bool {
	c := s.c
	c.mu.Lock()
	s.raw, s.size, s.ready = raw, len(raw), true
	first := c.head < len(c.queue) && c.queue[c.head] == s
	if c.waiting {
		c.changed.Broadcast()
	}
	c.mu.Unlock()
	return first
}

func (c *conn) dialUpstream() (*upstreamConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), upstreamDial)
	defer cancel()
	version := 2
	if c.w.V3 {
		version = 3
	}
	nc, err := c.s.opts.Upstream.Session(ctx, version)
	if err != nil {
		return nil, err
	}
	u := &upstreamConn{c: c, nc: nc, since: time.Now(), ended: make(chan struct{})}
	if _, again, err := c.s.opts.Upstream.Login(ctx); err == nil {
		u.again = again
	}
	u.moved.L = &u.mu
	c.s.wg.Add(1)
	go func() {
		defer c.s.wg.Done()
		u.receive()
	}()
	return u, nil
}

// send writes what is buffered. Its failure is the receiver's to tell.
func (u *upstreamConn) send() {
	if len(u.out.B) == 0 {
		return
	}
	_ = u.nc.SetWriteDeadline(time.Now().Add(u.c.s.limits.WriteTimeout))
	if _, err := u.nc.Write(u.out.B); err != nil {
		u.nc.Close()
	}
	u.out.B = u.out.B[:0]
	if cap(u.out.B) > upstreamBuffer {
		u.out.B = nil
	}
}

// end lets the replies that are due come in for a moment, and closes the session.
func (u *upstreamConn) end() {
	u.send()
	u.mu.Lock()
	defer u.mu.Unlock()
	u.ending = true
	if len(u.waiting) == 0 {
		u.nc.Close()
		return
	}
	_ = u.nc.SetReadDeadline(time.Now().Add(upstreamLinger))
}

func (u *upstreamConn) subscribed() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.subs > 0
}

// leaveUpstream ends the client's session there; the next command begins another.
func (c *conn) leaveUpstream() {
	u := c.up
	if u == nil {
		c.upMulti, c.upDirty = multiNone, false
		return
	}
	u.send()
	c.settle()
	u.nc.Close()
	<-u.ended
	c.up, c.upMulti, c.upDirty = nil, multiNone, false
}

// receive hands replies to their slots until the connection ends.
func (u *upstreamConn) receive() {
	defer close(u.ended)
	var scan resp.Scanner
	buf := make([]byte, 0, 16<<10)
	start := 0
	var cause error
	due := false
	for cause == nil {
		n, err := scan.Reply(buf[start:])
		switch {
		case err != nil:
			cause = err
		case n > 0:
			due = u.take(buf[start:start+n]) || due
			start += n
		default:
			// What came together goes on together: the client's writer is woken once for all of it.
			if due {
				u.c.flush()
				due = false
			}
			if start > 0 {
				buf = buf[:copy(buf, buf[start:])]
				start = 0
				if len(buf) == 0 && cap(buf) > 1<<20 {
					buf = make([]byte, 0, 16<<10)
				}
			}
			if len(buf) == cap(buf) {
				if cap(buf) >= upstreamReply {
					cause = errors.New("a reply is too large")
					break
				}
				buf = append(make([]byte, 0, 2*cap(buf)), buf...)
			}
			var got int
			got, cause = u.nc.Read(buf[len(buf):cap(buf)])
			buf = buf[:len(buf)+got]
		}
	}
	if due {
		u.c.flush()
	}
	u.nc.Close()
	u.mu.Lock()
	u.closed = true
	rest := u.waiting
	u.waiting = nil
	wasSubscribed := u.subs > 0
	u.moved.Broadcast()
	u.mu.Unlock()
	for _, s := range rest {
		if s != nil {
			s.answer([]byte("-ERR the connection to the upstream broke, the outcome is unknown\r\n"))
		}
	}
	if wasSubscribed {
		// The client has to subscribe anew, and learns of it as it would from the server itself.
		u.c.kill("upstream")
	}
}

// take gives one reply to whom it belongs, and reports whether the client's writer has to be woken for it.
func (u *upstreamConn) take(reply []byte) (due bool) {
	push := reply[0] == '>'
	u.mu.Lock()
	if kind, count, ok := subscription(reply); ok && (push || u.subs > 0 || kind == "subscribe" || kind == "unsubscribe") {
		if kind != "message" {
			u.subs = count
		}
		push = true
	}
	if push {
		u.mu.Unlock()
		u.c.push(bytes.Clone(reply))
		return false
	}
	if len(u.waiting) == 0 {
		u.mu.Unlock()
		u.nc.Close() // a reply to nothing: the two sides do not agree any more
		return false
	}
	s := u.waiting[0]
	u.waiting[0] = nil
	u.waiting = u.waiting[1:]
	last := u.ending && len(u.waiting) == 0
	u.moved.Signal()
	u.mu.Unlock()
	if s != nil {
		due = s.fill(bytes.Clone(reply))
	}
	if last || bytes.HasPrefix(reply, []byte("-READONLY ")) {
		u.nc.Close() // the name leads to another server now; the next command dials it
	}
	return due
}

// subscription recognises what pub/sub sends: confirmations, with the number of subscriptions, and messages.
func subscription(reply []byte) (kind string, count int, ok bool) {
	if reply[0] != '*' && reply[0] != '>' {
		return "", 0, false
	}
	_, rest, _ := bytes.Cut(reply, []byte("\r\n"))
	if len(rest) == 0 || rest[0] != '$' {
		return "", 0, false
	}
	_, rest, _ = bytes.Cut(rest, []byte("\r\n"))
	word, _, _ := bytes.Cut(rest, []byte("\r\n"))
	switch string(word) {
	case "subscribe", "psubscribe", "ssubscribe":
		kind = "subscribe"
	case "unsubscribe", "punsubscribe", "sunsubscribe":
		kind = "unsubscribe"
	case "message", "pmessage", "smessage":
		return "message", 0, true
	case "pong":
		return "message", 0, reply[0] == '*' && bytes.HasPrefix(reply, []byte("*2\r\n"))
	default:
		return "", 0, false
	}
	last := bytes.LastIndex(reply, []byte("\r\n:"))
	if last < 0 {
		return "", 0, false
	}
	n, err := strconv.Atoi(string(bytes.TrimSpace(reply[last+3:])))
	return kind, n, err == nil
}
