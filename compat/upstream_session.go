package compat

import (
	"bytes"
	"context"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"tercet.dev/tercet/compat/resp"
)

// upstreamConn is a client's session with one server of the upstream. Commands go out in their order; replies come back in
// it and take their places in the client's queue.
type upstreamConn struct {
	c    *conn
	addr string // of the shard, empty for an upstream that is one server
	nc   net.Conn
	v3   bool
	// since is when the session last logged in, again after how long it has to anew; 0 for never. They are the reader's.
	since time.Time
	again time.Duration

	writing sync.Mutex // held while what is buffered is written

	mu      sync.Mutex
	moved   sync.Cond
	out     resp.Buffer // not yet sent
	spare   []byte
	waiting []upstreamWait // for replies, in order
	kept    int            // bytes of commands in waiting
	closed  bool
	ending  bool
	// subscribing is set once there was a subscription, subs are how many there are, as the upstream last said.
	subscribing bool
	subs        int
	ended       chan struct{}
}

// upstreamWait is a place in the order of a session's replies.
type upstreamWait struct {
	s    *slot // takes the reply; nil for one that nobody wants
	sent *sentCommand
}

// sentCommand is what is known of a command beyond whose it is: its bytes where it may have to follow its slot to another
// shard, and for a transaction how many replies it has.
type sentCommand struct {
	raw  []byte
	left int // replies that are due, of which the last is the answer
	// redirect is the first MOVED or ASK among them.
	redirect string
	hops     int
	// sub is the word of a command that subscribes: its confirmations are messages, and only an error is a reply.
	sub     string
	watched bool // whose keys are watched: it runs where it was sent or not at all
	v3      bool
	fold    *fold
	part    int           // of fold
	at      *upstreamConn // where the answer came from; read after the client's queue is settled
	replies int           // the value of left when it is sent
}

func appendCommand(out *resp.Buffer, args [][]byte) {
	out.Array(len(args))
	for _, a := range args {
		out.Bulk(a)
	}
}

// errBroken is what a command hears that could not be sent.
const errBroken = "-ERR the connection to the upstream is broken, nothing was done\r\n"

// enqueue buffers a command, given as words or as bytes, and the place of its reply. It reports false when the session is
// over.
func (u *upstreamConn) enqueue(args [][]byte, raw []byte, w *upstreamWait) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return false
	}
	if w != nil {
		u.waiting = append(u.waiting, *w)
		if w.sent != nil {
			w.sent.left = w.sent.replies
			u.kept += len(w.sent.raw)
		}
	}
	if args != nil {
		appendCommand(&u.out, args)
	} else {
		u.out.Raw(raw)
	}
	return true
}

// room waits until the session may take another command.
func (u *upstreamConn) room() (full bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for (len(u.waiting) >= upstreamAhead || u.kept >= upstreamKept) && !u.closed {
		u.mu.Unlock()
		u.c.passOn()
		u.mu.Lock()
		if (len(u.waiting) >= upstreamAhead || u.kept >= upstreamKept) && !u.closed {
			u.moved.Wait()
		}
	}
	return len(u.out.B) >= upstreamBuffer
}

// send writes what is buffered. Its failure is the receiver's to tell.
func (u *upstreamConn) send() {
	u.writing.Lock()
	defer u.writing.Unlock()
	u.mu.Lock()
	buf := u.out.B
	u.out.B = u.spare[:0]
	u.mu.Unlock()
	if len(buf) == 0 {
		u.spare = buf
		return
	}
	_ = u.nc.SetWriteDeadline(time.Now().Add(u.c.s.limits.WriteTimeout))
	if _, err := u.nc.Write(buf); err != nil {
		u.nc.Close()
	}
	if cap(buf) > 2*upstreamBuffer {
		buf = nil
	}
	u.spare = buf
}

// upstreamAt returns the client's session with a server, and makes it unless there is one.
func (c *conn) upstreamAt(addr string) (*upstreamConn, error) {
	c.upMu.Lock()
	u := c.ups[addr]
	c.upMu.Unlock()
	if u != nil && !u.over() {
		return u, nil
	}
	u, err := c.dialUpstream(addr)
	if err != nil {
		return nil, err
	}
	c.upMu.Lock()
	defer c.upMu.Unlock()
	if c.upLeft {
		// A redirection after the client has said its last: the answer is all that the session is for.
		u.mu.Lock()
		u.ending = true
		u.mu.Unlock()
		_ = u.nc.SetReadDeadline(time.Now().Add(upstreamLinger))
	}
	if other := c.ups[addr]; other != nil && !other.over() {
		u.nc.Close() // a redirection and the client's own command came at once
		return other, nil
	}
	if c.ups == nil {
		c.ups = make(map[string]*upstreamConn)
	}
	c.ups[addr] = u
	return u, nil
}

func (u *upstreamConn) over() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.closed
}

// upstreams returns the client's sessions.
func (c *conn) upstreams() []*upstreamConn {
	c.upMu.Lock()
	defer c.upMu.Unlock()
	list := make([]*upstreamConn, 0, len(c.ups))
	for _, u := range c.ups {
		list = append(list, u)
	}
	return list
}

// subscribedUpstream returns the session that has subscriptions, nil for none.
func (c *conn) subscribedUpstream() *upstreamConn {
	if !c.upSubscribing {
		return nil
	}
	for _, u := range c.upstreams() {
		if u.subscribed() {
			return u
		}
	}
	return nil
}

func (u *upstreamConn) subscribed() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.subs > 0
}

// place is the slot of the command in hand's reply, at the end of the client's queue.
func (c *conn) place() *slot {
	s := c.newSlot()
	s.silent = c.silence()
	c.mu.Lock()
	c.queue = append(c.queue, s)
	c.mu.Unlock()
	return s
}

// sendUpstream sends a command to whoever has its slot, -1 for one without keys.
func (c *conn) sendUpstream(args [][]byte, slot int) {
	u, err := c.upstreamOf(slot)
	if err != nil {
		c.unreachable(err)
		return
	}
	c.sendTo(u, args, 1)
}

// sendTo sends a command to one server. replies is 1, or -1 for a command that is answered by messages.
func (c *conn) sendTo(u *upstreamConn, args [][]byte, replies int) {
	c.loginAgain(u)
	full := u.room()
	c.s.metrics.passed.Inc()
	var raw resp.Buffer
	var w *upstreamWait
	if u.addr != "" {
		appendCommand(&raw, args)
	}
	switch {
	case replies > 0:
		w = &upstreamWait{s: c.place()}
		if u.addr != "" {
			w.sent = &sentCommand{raw: raw.B, replies: 1}
		}
	case is(args[0], "ping"), len(args) == 1 && strings.Contains(lower(args[0]), "unsub"):
		// The end of all subscriptions has as many answers as there are, and cannot fail.
	default:
		w = &upstreamWait{sent: &sentCommand{raw: raw.B, replies: max(len(args)-1, 1), sub: lower(args[0])}}
	}
	if raw.B != nil {
		c.deliver(u, nil, raw.B, w)
	} else {
		c.deliver(u, args, nil, w)
	}
	if full {
		u.send()
	}
}

// deliver enqueues, and answers for a session that is over.
func (c *conn) deliver(u *upstreamConn, args [][]byte, raw []byte, w *upstreamWait) {
	switch {
	case u.enqueue(args, raw, w):
	case w == nil:
		c.push([]byte(errBroken))
	default:
		if u.answer(w, []byte(errBroken)) {
			c.flush()
		}
	}
}

// execUpstream sends the transaction that was put together.
func (c *conn) execUpstream() {
	t := &c.upQueue
	watched := c.upWatch
	c.upWatch = nil
	var u *upstreamConn
	var err error
	if t.commands == 0 {
		t.raw.Array(1)
		t.raw.String("MULTI")
		u = watched
	} else if u, err = c.upstreamOf(t.slot); err != nil {
		c.unreachable(err)
		return
	}
	if watched != nil && (u != watched || u.over()) {
		// The watch is somewhere else, or went with its connection: whether its keys changed is not known.
		if !watched.over() {
			watched.enqueue([][]byte{[]byte("UNWATCH")}, nil, &upstreamWait{})
			watched.send()
		}
		c.w.NullArray()
		c.emit()
		return
	}
	t.raw.Array(1)
	t.raw.String("EXEC")
	c.loginAgain(u)
	u.room()
	sent := &sentCommand{raw: t.raw.B, replies: t.commands + 2, watched: watched != nil, v3: c.w.V3}
	c.s.metrics.passed.Add(float64(t.commands))
	c.deliver(u, nil, sent.raw, &upstreamWait{s: c.place(), sent: sent})
}

// watchUpstream has keys watched. What it finds out is needed to judge EXEC, so it waits for the answer.
func (c *conn) watchUpstream(args [][]byte, slot int) {
	u, err := c.upstreamOf(slot)
	switch {
	case err != nil:
		c.unreachable(err)
		return
	case c.upWatch != nil && c.upWatch != u && !c.upWatch.over():
		c.w.Error("CROSSSLOT Keys that are watched together have to be on one shard")
		c.emit()
		return
	case c.upWatch != nil && c.upWatch != u:
		// What was watched first is not watched any more, and EXEC has to say so.
		c.w.OK()
		c.emit()
		return
	}
	c.loginAgain(u)
	u.room()
	var raw resp.Buffer
	appendCommand(&raw, args)
	sent := &sentCommand{raw: raw.B, replies: 1, at: u}
	c.deliver(u, nil, raw.B, &upstreamWait{s: c.place(), sent: sent})
	if c.settle() {
		c.upWatch = sent.at
	}
}

// unwatchUpstream ends the watch that there is.
func (c *conn) unwatchUpstream() {
	if u := c.upWatch; u != nil {
		c.upWatch = nil
		u.enqueue([][]byte{[]byte("UNWATCH")}, nil, &upstreamWait{})
	}
}

// loginAgain sends a fresh login ahead of the next command when it is due.
func (c *conn) loginAgain(u *upstreamConn) {
	if u.again == 0 || time.Since(u.since) < u.again {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), upstreamDial)
	defer cancel()
	words, again, err := c.s.opts.Upstream.Login(ctx)
	if err != nil || words == nil {
		c.s.log.Warn("cannot log in to the upstream anew", "upstream", c.s.opts.Upstream.String(), "error", err)
		u.since = time.Now().Add(upstreamLoginRetry - u.again)
		return
	}
	u.since, u.again = time.Now(), again
	args := make([][]byte, len(words))
	for i, w := range words {
		args[i] = []byte(w)
	}
	u.enqueue(args, nil, &upstreamWait{})
}

// upstreamLoginRetry is how long a failed login is left alone.
const upstreamLoginRetry = 10 * time.Second

// unreachable says that there is nobody to pass a command to.
func (c *conn) unreachable(err error) {
	c.s.metrics.upstream.WithLabelValues("refused").Inc()
	c.refuseInMulti("ERR the upstream " + c.s.opts.Upstream.String() + " cannot be reached: " + oneLine(err.Error()))
}

// passOn sends what is buffered for the upstream.
func (c *conn) passOn() {
	if c.upOne != nil {
		c.upOne.send()
		return
	}
	if c.routes == nil {
		return
	}
	for _, u := range c.upstreams() {
		u.send()
	}
}

func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\r' || r == '\n' {
			return ' '
		}
		return r
	}, s)
}

// fill completes a slot with a reply that is ready, and reports whether the client's writer has to be woken.
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

func (c *conn) dialUpstream(addr string) (*upstreamConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), upstreamDial)
	defer cancel()
	version, v3 := 2, c.upV3.Load()
	if v3 {
		version = 3
	}
	nc, err := c.s.opts.Upstream.Session(ctx, addr, version)
	if err != nil {
		return nil, err
	}
	u := &upstreamConn{c: c, addr: addr, nc: nc, v3: v3, since: time.Now(), ended: make(chan struct{})}
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

// endUpstream lets the replies that are due come in for a moment, and closes the sessions.
func (c *conn) endUpstream() {
	c.upMu.Lock()
	c.upLeft = true
	c.upMu.Unlock()
	c.dropUpstreamMulti()
	for _, u := range c.upstreams() {
		u.send()
		u.mu.Lock()
		u.ending = true
		if len(u.waiting) == 0 {
			u.nc.Close()
		} else {
			_ = u.nc.SetReadDeadline(time.Now().Add(upstreamLinger))
		}
		u.mu.Unlock()
	}
}

// leaveUpstream ends the client's sessions there; the next command begins others.
func (c *conn) leaveUpstream() {
	c.dropUpstreamMulti()
	c.upWatch = nil
	list := c.upstreams()
	if len(list) == 0 {
		return
	}
	c.settle()
	for _, u := range list {
		u.nc.Close()
		<-u.ended
	}
	c.upMu.Lock()
	clear(c.ups)
	c.upMu.Unlock()
	c.upOne = nil
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
	for _, w := range rest {
		if u.answer(&w, []byte("-ERR the connection to the upstream broke, the outcome is unknown\r\n")) {
			u.c.flush()
		}
	}
	if wasSubscribed {
		// The client has to subscribe anew, and learns of it as it would from the server itself.
		u.c.kill("upstream")
	}
}

// answer hands over a reply, which has to stay as it is, and reports whether the client's writer has to be woken.
func (u *upstreamConn) answer(w *upstreamWait, reply []byte) bool {
	switch {
	case w.sent != nil && w.sent.fold != nil:
		return w.sent.fold.take(w.sent.part, reply)
	case w.sent != nil && w.sent.sub != "":
		u.c.push(reply)
		return false
	}
	return w.s != nil && w.s.fill(reply)
}

// take gives one reply to whom it belongs, and reports whether the client's writer has to be woken for it.
func (u *upstreamConn) take(reply []byte) (due bool) {
	push := reply[0] == '>'
	u.mu.Lock()
	if word, count, ok := subscription(reply); ok && (push || !u.v3 && u.subscribing && (u.subs > 0 || count >= 0)) {
		if count >= 0 {
			u.subs = count
			if head := u.head(); head.sub == word {
				if head.left--; head.left == 0 {
					u.pop()
				}
			}
		}
		push = true
	}
	if push {
		u.mu.Unlock()
		u.c.push(bytes.Clone(reply))
		return false
	}
	for reply[0] != '-' && u.head().sub != "" {
		u.pop()
	}
	if len(u.waiting) == 0 {
		u.mu.Unlock()
		u.nc.Close() // a reply to nothing: the two sides do not agree any more
		return false
	}
	w := u.waiting[0]
	if sent := w.sent; sent != nil {
		sent.left--
		if reply[0] == '-' && sent.redirect == "" && (bytes.HasPrefix(reply, []byte("-MOVED ")) || bytes.HasPrefix(reply, []byte("-ASK "))) {
			sent.redirect = string(reply[1 : len(reply)-2])
		}
		if sent.left > 0 && sent.sub == "" {
			u.mu.Unlock()
			return false
		}
	}
	u.pop()
	last := u.ending && len(u.waiting) == 0
	u.mu.Unlock()
	if w.sent == nil || w.sent.redirect == "" || !u.follow(&w) {
		if w.sent != nil {
			w.sent.at = u
		}
		due = u.answer(&w, bytes.Clone(reply))
	}
	if last || bytes.HasPrefix(reply, []byte("-READONLY ")) {
		u.nc.Close() // the name leads to another server now; the next command dials it
	}
	return due
}

// head is what is known of the command whose reply is next.
func (u *upstreamConn) head() *sentCommand {
	if len(u.waiting) == 0 || u.waiting[0].sent == nil {
		return &noCommand
	}
	return u.waiting[0].sent
}

var noCommand sentCommand

// pop takes the place of the next reply away.
func (u *upstreamConn) pop() {
	if sent := u.waiting[0].sent; sent != nil {
		u.kept -= len(sent.raw)
	}
	u.waiting[0] = upstreamWait{}
	u.waiting = u.waiting[1:]
	u.moved.Signal()
}

// subscription recognises what pub/sub sends: confirmations, with the number of subscriptions, and messages, for which the
// number is -1.
func subscription(reply []byte) (word string, count int, ok bool) {
	if reply[0] != '*' && reply[0] != '>' {
		return "", 0, false
	}
	_, rest, _ := bytes.Cut(reply, []byte("\r\n"))
	if len(rest) == 0 || rest[0] != '$' {
		return "", 0, false
	}
	_, rest, _ = bytes.Cut(rest, []byte("\r\n"))
	first, _, _ := bytes.Cut(rest, []byte("\r\n"))
	switch string(first) {
	case "subscribe", "psubscribe", "ssubscribe", "unsubscribe", "punsubscribe", "sunsubscribe":
	case "message", "pmessage", "smessage":
		return string(first), -1, true
	case "pong":
		return "pong", -1, reply[0] == '*' && bytes.HasPrefix(reply, []byte("*2\r\n"))
	default:
		return "", 0, false
	}
	last := bytes.LastIndex(reply, []byte("\r\n:"))
	if last < 0 {
		return "", 0, false
	}
	n, err := strconv.Atoi(string(bytes.TrimSpace(reply[last+3:])))
	return string(first), n, err == nil && n >= 0
}
