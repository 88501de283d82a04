package compat

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"tercet.dev/tercet/compat/acl"
	"tercet.dev/tercet/compat/command"
	"tercet.dev/tercet/compat/resp"
	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft"
)

// conn is one client. Two goroutines serve it: the reader takes commands and carries them out or submits them, the writer
// sends replies. Between them lies the queue of replies, in the order of the commands: a reply goes out when it and all
// before it are there, whoever completes it.
//
// Fields without a note belong to the reader.
type conn struct {
	s     *Server
	nc    net.Conn
	id    uint64
	since time.Time
	r     *resp.Reader

	// w takes the reply of the command in hand.
	w resp.Buffer
	// user is who the client is; authenticated is set once it has said so, or need not.
	user          *acl.User
	authenticated bool
	usersRev      uint64
	multi         *transaction
	watches       []engine.Watch
	readOnly      bool
	asking        bool
	tracking      tracking
	subs          *subscriber
	// skipReply and noReply are CLIENT REPLY's.
	skipReply, noReply bool
	capaStale          bool
	// inExec is set while a local command is run as part of a transaction.
	inExec bool
	// lastZones is how many zones held the last write when it was acknowledged; wrote is set once there was one.
	hasDeadline bool
	add         engine.StreamAdd
	keyUses     []command.KeyUse

	desc description

	// ups are the sessions on the upstream, by address, once there were commands for them; upLeft is set when the reader
	// has ended. upOne is the session of an upstream that is one server.
	upMu   sync.Mutex
	ups    map[string]*upstreamConn
	upLeft bool
	upOne  *upstreamConn
	upV3   atomic.Bool
	// routes is the map of the upstream's slots that the client's commands follow.
	routes *routes
	// upWatch is the session that watches keys, upChannels the one that has subscriptions other than to a shard's channels;
	// upSubscribing is set once there was any.
	upWatch, upChannels *upstreamConn
	upSubscribing       bool
	// upMulti says where an open transaction runs, upQueue what is in it, upDirty that a command of it was refused.
	upMulti multiSide
	upQueue upstreamQueue
	upDirty bool

	lastZones atomic.Int32
	wrote     atomic.Bool

	mu      sync.Mutex
	changed sync.Cond
	// waiting is set while somebody waits for changed.
	waiting bool
	// out are replies to be written, spare the buffer that takes turns with it; writing is how much is being written.
	out     resp.Buffer
	spare   []byte
	writing int
	taken   int
	queue   []*slot
	head    int
	// pending counts the submitted commands without outcome, with their bytes.
	pending, pendingBytes int
	// blocked is set while the client waits in a blocking read: sending on it ends the wait.
	blocked   chan unblock
	finishing bool
	dead      bool
	reason    string

	wake chan struct{}
	// writeUntil is the deadline of writes; the writer's own.
	writeUntil time.Time
	done       chan struct{} // closed by kill
	readEnd    chan struct{} // closed when the reader has ended
}

// unblock says how a blocked read is ended from outside.
type unblock struct{ withError bool }

// slot is the place of one reply in the queue.
type slot struct {
	c *conn
	// raw is a reply that is ready. Otherwise the reply is made by word when the outcome is there.
	raw    []byte
	word   wordFunc
	v3     bool
	silent bool
	ready  bool
	size   int
	reply  raft.Reply
	err    error
	// after follows the reply: an invalidation.
	after []byte
	// complete is finish, bound once.
	complete func(raft.Reply, error)
}

// wordFunc words the outcome of a command. r is nil when err is not, and the other way round. ans is set for reads.
type wordFunc func(w *resp.Buffer, r *engine.Result, ans *engine.Answer)

var slots = sync.Pool{New: func() any {
	s := new(slot)
	s.complete = s.finish
	return s
}}

// outFree is the output that a connection may hold without asking the budget.
const outFree = 16 << 10

func newConn(s *Server, nc net.Conn) *conn {
	c := &conn{s: s, nc: nc, since: time.Now(), wake: make(chan struct{}, 1), done: make(chan struct{}), readEnd: make(chan struct{})}
	c.changed.L = &c.mu
	c.upQueue.slot = -1
	c.r = resp.NewReader(nc, s.memory.take)
	c.desc.lastAt.Store(c.since.UnixNano())
	return c
}

// serve reads commands until the connection ends.
func (c *conn) serve() {
	defer func() {
		c.leave()
		close(c.readEnd)
		c.flush()
	}()
	if !c.begin() {
		return
	}
	for {
		args, err := c.r.Buffer()
		if err == nil && args == nil {
			c.flush()
			c.passOn()
			if !c.beforeRead() {
				return
			}
			if err = c.r.Fill(); err == nil {
				continue
			}
		}
		if err != nil {
			c.ended(err)
			return
		}
		c.dispatch(args)
		if c.isEnding() {
			return
		}
	}
}

// begin makes the client the default user if that one needs no password, or who its certificate says.
// It reports false when the connection has ended before that was known.
func (c *conn) begin() bool {
	c.usersRev = c.s.usersRev.Load()
	c.setUser(c.s.users.Default(), false)
	c.authenticated = c.user.Enabled && c.user.NoPassword
	c.limits()
	secured, ok := c.nc.(*tls.Conn)
	if !ok || !c.s.opts.CertificateUsers {
		return true
	}
	ctx, cancel := c.s.untilClosing(c.s.limits.LoginTimeout)
	defer cancel()
	if err := secured.HandshakeContext(ctx); err != nil {
		c.kill("login")
		return false
	}
	state := secured.ConnectionState()
	if len(state.VerifiedChains) == 0 {
		return true
	}
	name := state.PeerCertificates[0].Subject.CommonName
	u := c.s.users.Get(name)
	if u == nil && c.s.freshUsers() {
		u = c.s.users.Get(name) // another node may have set the user a moment ago
	}
	if u == nil || !u.Enabled {
		c.s.log.Debug("a client's certificate names nobody who may log in", "client", c.nc.RemoteAddr(), "name", name)
		return true
	}
	c.setUser(u, true)
	return true
}

// setUser makes u the client's user.
func (c *conn) setUser(u *acl.User, authenticated bool) {
	c.user, c.authenticated = u, authenticated
	c.desc.setUser(u.Name)
	c.limits()
}

func (c *conn) limits() {
	if c.authenticated {
		c.r.SetLimits(resp.Limits{})
	} else {
		c.r.SetLimits(resp.BeforeAuthentication)
	}
}

// beforeRead sets the deadline of the next read. It reports false when the connection is ending.
func (c *conn) beforeRead() bool {
	l := &c.s.limits
	var deadline time.Time
	now := time.Now()
	_, isTLS := c.nc.(*tls.Conn)
	switch {
	case c.r.Buffered() > 0:
		deadline = now.Add(l.CommandTimeout)
	case !c.authenticated, isTLS && !c.nc.(*tls.Conn).ConnectionState().HandshakeComplete:
		deadline = c.since.Add(l.LoginTimeout)
	case l.IdleTimeout > 0 && c.subs == nil:
		deadline = now.Add(l.IdleTimeout)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.finishing || c.dead {
		return false
	}
	if !deadline.IsZero() || c.hasDeadline {
		c.nc.SetReadDeadline(deadline)
		c.hasDeadline = !deadline.IsZero()
	}
	return true
}

// ended handles the end of input.
func (c *conn) ended(err error) {
	if p, ok := errors.AsType[*resp.ProtocolError](err); ok {
		c.s.log.Debug("protocol error", "client", c.nc.RemoteAddr(), "error", p.Text)
		c.w.Error("ERR " + p.Text)
		c.emit()
		c.finish("protocol")
		return
	}
	switch {
	case errors.Is(err, resp.ErrMemory):
		c.finish("memory")
	case errors.Is(err, os.ErrDeadlineExceeded):
		switch {
		case c.isEnding():
		case c.r.Buffered() > 0:
			c.finish("stalled")
		case !c.authenticated:
			c.finish("login")
		default:
			c.finish("idle")
		}
	case errors.Is(err, io.EOF):
		// What was sent before is carried out and answered.
		c.finish("")
	default:
		c.kill("")
	}
}

// leave gives back what the reader holds.
func (c *conn) leave() {
	c.s.bus.leave(c)
	c.endTracking()
	if c.s.opts.Upstream != nil {
		c.endUpstream()
	}
	c.r.Release()
}

// isEnding reports whether no further command is to be carried out.
func (c *conn) isEnding() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.finishing || c.dead
}

// finish lets the replies that are due go out and closes the connection then. reason is counted unless empty.
func (c *conn) finish(reason string) {
	c.mu.Lock()
	if !c.finishing && !c.dead {
		c.finishing, c.reason = true, reason
		if reason != "" {
			c.s.metrics.closed.WithLabelValues(reason).Inc()
		}
		c.nc.SetReadDeadline(time.Unix(1, 0))
	}
	c.mu.Unlock()
	c.flush()
}

// kill closes the connection at once.
func (c *conn) kill(reason string) {
	c.mu.Lock()
	c.killLocked(reason)
	c.mu.Unlock()
}

func (c *conn) killLocked(reason string) {
	if c.dead {
		return
	}
	c.dead = true
	if reason != "" && !c.finishing {
		c.s.metrics.closed.WithLabelValues(reason).Inc()
	}
	c.nc.Close()
	close(c.done)
	c.changed.Broadcast()
	c.flush() // ends the writer
}

// write sends replies until the connection is closed.
func (c *conn) write() {
	defer func() {
		c.kill("")
		c.s.clients.remove(c)
		c.mu.Lock()
		c.s.memory.take(-c.taken)
		c.taken = 0
		c.mu.Unlock()
	}()
	for range c.wake {
		for {
			c.mu.Lock()
			if c.dead {
				c.mu.Unlock()
				return
			}
			c.drainLocked()
			buf := c.out.B
			if len(buf) == 0 {
				end := c.finishing && len(c.queue) == c.head
				reason := c.reason
				c.mu.Unlock()
				if end && c.readerEnded() {
					c.linger(reason)
					return
				}
				break
			}
			c.out.B, c.writing = c.spare[:0], len(buf)
			c.mu.Unlock()
			err := c.send(buf)
			c.mu.Lock()
			c.writing = 0
			if cap(buf) <= outFree {
				c.spare = buf[:0]
			} else {
				c.spare = nil
			}
			c.accountLocked()
			c.mu.Unlock()
			if err != nil {
				if errors.Is(err, os.ErrDeadlineExceeded) {
					c.kill("slow")
				}
				return
			}
		}
	}
}

// readerEnded reports whether the reader has ended, which it does soon once the connection is finishing. It wakes the
// writer when it does.
func (c *conn) readerEnded() bool {
	select {
	case <-c.readEnd:
		return true
	default:
		return false
	}
}

// writeChunk is what one write deadline is given for.
const writeChunk = 64 << 10

// send writes buf. Each piece has at least three quarters of the time-out: the deadline is not set anew for every reply.
func (c *conn) send(buf []byte) error {
	for len(buf) > 0 {
		n := min(len(buf), writeChunk)
		if now, limit := time.Now(), c.s.limits.WriteTimeout; c.writeUntil.Sub(now) < limit/4*3 {
			c.writeUntil = now.Add(limit)
			c.nc.SetWriteDeadline(c.writeUntil)
		}
		if _, err := c.nc.Write(buf[:n]); err != nil {
			return err
		}
		buf = buf[n:]
	}
	return nil
}

// linger ends this side of the connection first, and for a moment takes what the client is still sending: a connection
// that is closed over unread input takes the last replies with it.
func (c *conn) linger(reason string) {
	if half, ok := c.nc.(interface{ CloseWrite() error }); ok && reason != "" {
		_ = half.CloseWrite()
		c.nc.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, _ = io.CopyN(io.Discard, c.nc, 1<<20)
	}
	c.kill("")
}

// flush wakes the writer.
func (c *conn) flush() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// emit takes the reply in w.
func (c *conn) emit() {
	if len(c.w.B) == 0 {
		return
	}
	if c.silence() {
		c.w.B = c.w.B[:0]
		return
	}
	c.mu.Lock()
	if len(c.queue) == c.head {
		c.out.B = append(c.out.B, c.w.B...)
		c.accountLocked()
	} else {
		s := c.newSlot()
		s.raw, s.ready = append([]byte(nil), c.w.B...), true
		s.size = len(s.raw)
		c.queue = append(c.queue, s)
	}
	c.mu.Unlock()
	c.w.B = c.w.B[:0]
	if cap(c.w.B) > 64<<10 {
		c.w.B = nil
	}
}

// silence reports whether the reply of the command in hand is unwanted (CLIENT REPLY).
func (c *conn) silence() bool {
	if c.skipReply {
		c.skipReply = false
		return true
	}
	return c.noReply
}

// push takes a message that answers no command.
func (c *conn) push(p []byte) {
	c.mu.Lock()
	if !c.dead {
		c.out.B = append(c.out.B, p...)
		c.accountLocked()
	}
	c.mu.Unlock()
	c.flush()
}

func (c *conn) newSlot() *slot {
	s := slots.Get().(*slot)
	s.c = c
	s.v3 = c.w.V3
	return s
}

// drainLocked moves the replies that are there to the output.
func (c *conn) drainLocked() {
	moved := false
	for c.head < len(c.queue) && c.queue[c.head].ready {
		s := c.queue[c.head]
		c.queue[c.head] = nil
		c.head++
		moved = true
		switch {
		case s.silent:
		case s.word == nil:
			c.out.B = append(c.out.B, s.raw...)
		default:
			c.out.V3 = s.v3
			wordOutcome(&c.out, s.word, &s.reply.Result, s.err)
		}
		c.out.B = append(c.out.B, s.after...)
		if s.word != nil {
			c.pending--
			c.pendingBytes -= s.size
		}
		*s = slot{complete: s.complete}
		slots.Put(s)
	}
	if !moved {
		return
	}
	if c.head == len(c.queue) {
		c.queue, c.head = c.queue[:0], 0
		if cap(c.queue) > 1024 {
			c.queue = nil
		}
	}
	c.accountLocked()
	if c.waiting {
		c.changed.Broadcast()
	}
}

// accountLocked takes from the budget what the output holds, and closes a client that takes too little of it.
func (c *conn) accountLocked() {
	held := len(c.out.B) + c.writing
	if held > c.s.limits.OutputBytes {
		c.out.B = nil
		c.killLocked("output")
		return
	}
	want := 0
	if held > outFree {
		want = (held + outFree - 1) / outFree * outFree
	}
	if want != c.taken {
		if !c.s.memory.take(want - c.taken) {
			c.out.B = nil
			c.killLocked("memory")
			return
		}
		c.taken = want
	}
}

// finish takes the outcome of a submitted command.
func (s *slot) finish(r raft.Reply, err error) {
	c := s.c
	if err == nil {
		c.lastZones.Store(int32(r.Zones))
		c.wrote.Store(true)
	}
	c.mu.Lock()
	s.reply, s.err, s.ready = r, err, true
	first := c.queue[c.head] == s
	if c.waiting {
		c.changed.Broadcast()
	}
	c.mu.Unlock()
	if first {
		c.flush()
	}
}

// submit has a command applied; its reply takes the next place in the queue.
func (c *conn) submit(cmd []byte, word wordFunc, after []byte) {
	s := c.newSlot()
	s.word, s.size, s.silent, s.after = word, len(cmd), c.silence(), after
	c.passOn() // what follows may have to wait for replies from there
	l := &c.s.limits
	c.mu.Lock()
	for !c.dead && c.pending > 0 && (c.pending >= l.PipelineCommands || c.pendingBytes+len(cmd) > l.PipelineBytes) {
		c.drainLocked()
		if c.pending < l.PipelineCommands && c.pendingBytes+len(cmd) <= l.PipelineBytes {
			break
		}
		c.waitLocked()
	}
	c.queue = append(c.queue, s)
	c.pending++
	c.pendingBytes += len(cmd)
	c.mu.Unlock()
	c.s.backend.Submit(raft.Proposal{Command: cmd, Timeout: l.RequestTimeout}, s.complete)
}

func (c *conn) waitLocked() {
	c.waiting = true
	c.changed.Wait()
	c.waiting = false
}

// settle waits until everything submitted has its outcome. It reports false when the connection is closed.
func (c *conn) settle() bool {
	c.passOn()
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.dead && c.head < len(c.queue) {
		c.drainLocked()
		if c.head < len(c.queue) {
			c.waitLocked()
		}
	}
	return !c.dead
}

// read asks the engine. A client that asked for it is given this node's state as it stands.
func (c *conn) read(q *engine.Query) (engine.Answer, error) {
	if c.readOnly {
		if _, leads := c.s.backend.Leading(); !leads {
			return c.s.backend.StaleQuery(*q)
		}
	}
	if !c.settle() {
		return engine.Answer{}, net.ErrClosed
	}
	ctx, cancel := context.WithTimeout(context.Background(), c.s.limits.RequestTimeout)
	defer cancel()
	return c.s.backend.Query(ctx, *q)
}
