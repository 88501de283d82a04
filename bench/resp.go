package bench

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync/atomic"
	"time"

	"tercet.dev/tercet/internal/errs"
)

// RESPDriver drives streams over the protocol of Redis and Valkey, one connection per publisher and consumer: XADD
// with one field, XREADGROUP, XACK. A request of several messages is that many commands in one write.
type RESPDriver struct {
	// Addrs are the servers' addresses. Publisher i starts at the i-th and goes on to the next one after a failure.
	Addrs []string
	// Workload is what the commands are made for. Retention is not said: it is the stream's.
	Workload Workload
	// WaitReplicas adds WAIT with this number to each request that writes, and takes it for failed if fewer
	// replicas have it. 0 is for servers that answer only when all zones have it.
	WaitReplicas int
	// Timeout bounds a request (default 30 s).
	Timeout time.Duration

	requests *requests
}

// Prepare makes the commands that publishers send. It is called once, before the driver is used.
func (d *RESPDriver) Prepare() error {
	if len(d.Addrs) == 0 {
		return errors.New("no server address")
	}
	if d.Workload.AllZones {
		return errors.New("the protocol has no durability of a single request")
	}
	if d.Timeout == 0 {
		d.Timeout = 30 * time.Second
	}
	if d.Workload.Publishers > 0 {
		d.requests = prepare(d.Workload, d.command)
	}
	return nil
}

// respField is the name of the field that holds the body.
const respField = "body"

func (d *RESPDriver) command(topic string, bodies [][]byte) request {
	var b []byte
	for _, body := range bodies {
		b = appendCommand(b, "XADD", topic, "*", respField)
		b = appendBulk(b, body)
	}
	return request{body: d.appendWait(b)}
}

// appendCommand appends a command; XADD's last argument is appended by the caller.
func appendCommand(b []byte, args ...string) []byte {
	n := len(args)
	if args[0] == "XADD" {
		n++
	}
	b = append(strconv.AppendInt(append(b, '*'), int64(n), 10), "\r\n"...)
	for _, a := range args {
		b = appendBulk(b, []byte(a))
	}
	return b
}

func appendBulk(b, data []byte) []byte {
	b = append(strconv.AppendInt(append(b, '$'), int64(len(data)), 10), "\r\n"...)
	return append(append(b, data...), "\r\n"...)
}

func (d *RESPDriver) appendWait(b []byte) []byte {
	if d.WaitReplicas == 0 {
		return b
	}
	return appendCommand(b, "WAIT", strconv.Itoa(d.WaitReplicas), strconv.FormatInt(d.Timeout.Milliseconds(), 10))
}

// Publisher implements Driver.
func (d *RESPDriver) Publisher(i int) (Publisher, error) {
	return &respPublisher{respConn: newRESPConn(d, i), feed: d.requests.feed(i)}, nil
}

// respConn is a connection on which one request follows the other.
type respConn struct {
	d       *RESPDriver
	at      int // the address in use
	c       net.Conn
	open    atomic.Pointer[net.Conn] // the same, for interrupt
	bound   context.Context
	unbind  func() bool
	r       *bufio.Reader
	scratch []byte
}

func newRESPConn(d *RESPDriver, i int) *respConn {
	return &respConn{d: d, at: i % len(d.Addrs), r: bufio.NewReaderSize(nil, 64<<10)}
}

func (c *respConn) connect(ctx context.Context) error {
	if c.bound != ctx {
		if c.unbind != nil {
			c.unbind()
		}
		c.bound, c.unbind = ctx, context.AfterFunc(ctx, c.interrupt)
	}
	if c.c != nil {
		return nil
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	nc, err := dialer.DialContext(ctx, "tcp", c.d.Addrs[c.at])
	if err != nil {
		c.at = (c.at + 1) % len(c.d.Addrs)
		return errs.Of(errs.NotLeader).With(err) // nothing was sent
	}
	c.c = nc
	c.open.Store(&nc)
	c.r.Reset(nc)
	return nil
}

// interrupt makes a request that waits return at once. Any goroutine may call it.
func (c *respConn) interrupt() {
	if open := c.open.Load(); open != nil {
		_ = (*open).SetDeadline(time.Unix(1, 0)) // fails on a closed connection, which nobody waits for
	}
}

// hangUp closes the connection; the next request goes to the next address.
func (c *respConn) hangUp() {
	c.open.Store(nil)
	if c.c != nil {
		_ = c.c.Close() // what it says of a broken connection is not news
		c.c = nil
	}
	c.at = (c.at + 1) % len(c.d.Addrs)
}

// Close closes the connection for good.
func (c *respConn) Close() error {
	if c.unbind != nil {
		c.unbind()
	}
	c.hangUp()
	return nil
}

// do sends commands and calls each with the reply to each of them, as many as there are. The reply's bytes are valid
// until the next request. An error reply to any command is returned when all have been read, and the connection stays.
func (c *respConn) do(ctx context.Context, commands []byte, replies int, each func(i int, v respValue) error) error {
	if err := c.connect(ctx); err != nil {
		return err
	}
	if err := c.c.SetDeadline(time.Now().Add(c.d.Timeout)); err != nil {
		c.hangUp()
		return errs.Of(errs.NotLeader).With(err) // nothing was sent
	}
	// Only now: an interruption that came before the deadline was set would have been undone by it.
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := c.c.Write(commands); err != nil {
		c.hangUp()
		return errs.Of(errs.OutcomeUnknown).With(err)
	}
	var refused error
	for i := range replies {
		v, err := readRESP(c.r, &c.scratch)
		if err != nil {
			c.hangUp()
			return errs.Of(errs.OutcomeUnknown).With(err)
		}
		if err := v.failure(); err != nil {
			refused = err
			continue
		}
		if each != nil {
			if err := each(i, v); err != nil && refused == nil {
				refused = err
			}
		}
	}
	return refused
}

// judge is what a publisher makes of the replies to one request.
type judge struct {
	d *RESPDriver
	// written counts XADDs with a reply that is an ID; replicas is what WAIT said.
	written  int
	replicas int64
}

// reply takes note of one.
func (j *judge) reply(_ int, v respValue) error {
	if v.kind == ':' {
		if j.replicas = v.n; j.replicas < int64(j.d.WaitReplicas) {
			return errs.New(errs.OutcomeUnknown, "%d replicas of %d", j.replicas, j.d.WaitReplicas)
		}
		return nil
	}
	if v.kind != '$' || v.null {
		return errs.New(errs.Internal, "XADD answers %q", v.kind)
	}
	j.written++
	return nil
}

// zones is how many servers are known to hold it.
func (j *judge) zones() int {
	if j.d.WaitReplicas == 0 {
		return -1
	}
	return 1 + int(j.replicas)
}

// replies is the number of replies to a request.
func (d *RESPDriver) replies(r request) int {
	if d.WaitReplicas > 0 {
		return r.messages + 1
	}
	return r.messages
}

type respPublisher struct {
	*respConn
	*feed
	line *respLine // of a pipeline, once it is used
}

// Publish implements Publisher.
func (p *respPublisher) Publish(ctx context.Context, due time.Time) (Ack, error) {
	req := p.take(due)
	j := judge{d: p.d}
	if err := p.do(ctx, req.body, p.d.replies(req), j.reply); err != nil {
		return Ack{Stamp: p.stamp}, err
	}
	return p.ack(req, j.zones()), nil
}

// Send implements Pipeline.
func (p *respPublisher) Send(ctx context.Context, due time.Time, done func(Ack, error)) error {
	if p.line == nil || p.line.broken() {
		if p.line != nil {
			p.line.close()
			p.line = nil
			p.hangUp()
		}
		if err := p.connect(ctx); err != nil {
			return err
		}
		p.line = newRESPLine(p.d, p.c, p.r)
	}
	req := p.take(due)
	if len(req.marks) > 0 {
		req.body = bytes.Clone(req.body) // it is written later
	}
	return p.line.send(ctx, sent{req, p.ack(req, 0), done})
}

// Close implements Publisher.
func (p *respPublisher) Close() error {
	err := p.respConn.Close()
	if p.line != nil {
		p.line.close()
	}
	return err
}

// sent is one request of a line.
type sent struct {
	request
	ack  Ack
	done func(Ack, error)
}

// respLine is a connection on which requests are written as they come, and answered in order.
type respLine struct {
	d     *RESPDriver
	c     net.Conn
	queue chan sent
	// flying are written, or about to be.
	flying chan sent
	failed chan struct{} // closed when the connection broke
	stop   chan struct{}
	ended  chan struct{}
}

// lineDepth bounds what a line holds in either direction; the window of the workload is what counts.
const lineDepth = 1024

func newRESPLine(d *RESPDriver, c net.Conn, r *bufio.Reader) *respLine {
	l := &respLine{
		d: d, c: c, queue: make(chan sent, lineDepth), flying: make(chan sent, lineDepth),
		failed: make(chan struct{}), stop: make(chan struct{}), ended: make(chan struct{}),
	}
	_ = c.SetDeadline(time.Time{}) // the window's end is the run's end
	go l.write()
	go l.read(r)
	return l
}

func (l *respLine) broken() bool {
	select {
	case <-l.failed:
		return true
	default:
		return false
	}
}

func (l *respLine) send(ctx context.Context, s sent) error {
	select {
	case l.queue <- s:
		return nil
	case <-l.failed:
		return errs.Of(errs.NotLeader).With(errors.New("the connection is broken"))
	case <-ctx.Done():
		return ctx.Err()
	}
}

// write writes requests; those that have come meanwhile share a system call.
func (l *respLine) write() {
	defer close(l.flying)
	w := bufio.NewWriterSize(l.c, 64<<10)
	for {
		var s sent
		select {
		case s = <-l.queue:
		case <-l.stop:
			return
		}
		for more := true; more; {
			l.flying <- s // the reader takes them until the line is closed
			if _, err := w.Write(s.body); err != nil {
				_ = l.c.Close() // the reader reports it
			}
			select {
			case s = <-l.queue:
			default:
				more = false
			}
		}
		if err := w.Flush(); err != nil {
			_ = l.c.Close() // as above
		}
	}
}

// read hands out the outcomes until the line is closed.
func (l *respLine) read(r *bufio.Reader) {
	defer close(l.ended)
	var scratch []byte
	var broken error
	for s := range l.flying {
		j := judge{d: l.d}
		var refused error
		for i := 0; i < l.d.replies(s.request) && broken == nil; i++ {
			v, err := readRESP(r, &scratch)
			if err != nil {
				broken = errs.Of(errs.OutcomeUnknown).With(err)
				close(l.failed)
				_ = l.c.Close() // the writer must not wait for it
				break
			}
			if err := errors.Join(v.failure(), j.unless(v)); err != nil && refused == nil {
				refused = err
			}
		}
		switch {
		case broken != nil:
			s.done(Ack{}, broken)
		case refused != nil:
			s.done(Ack{}, refused)
		default:
			s.ack.Zones = j.zones()
			s.done(s.ack, nil)
		}
	}
}

// unless is reply, for what is no error.
func (j *judge) unless(v respValue) error {
	if v.kind == '-' {
		return nil
	}
	return j.reply(0, v)
}

// close ends the line. What was under way is given up; its done is called before close returns.
func (l *respLine) close() {
	_ = l.c.Close() // for the sake of those that wait for it
	close(l.stop)
	<-l.ended
	for {
		select {
		case s := <-l.queue:
			s.done(Ack{}, errs.Of(errs.NotLeader))
		default:
			return
		}
	}
}

// Consumer implements Driver. It makes the group, which begins with the first entry.
func (d *RESPDriver) Consumer(i int, found func(body []byte)) (Consumer, error) {
	topic, group := d.Workload.Consumes(i)
	return &respConsumer{
		respConn: newRESPConn(d, i), acks: newRESPConn(d, i), topic: topic, group: group, found: found,
		create: appendCommand(nil, "XGROUP", "CREATE", topic, group, "0", "MKSTREAM"),
		read: appendCommand(nil, "XREADGROUP", "GROUP", group, "c"+strconv.Itoa(i), "COUNT", strconv.Itoa(d.Workload.ReceiveMax),
			"BLOCK", strconv.FormatInt(receiveWait.Milliseconds(), 10), "STREAMS", topic, ">"),
	}, nil
}

type respConsumer struct {
	*respConn
	// acks is the connection for acknowledgements beside a read that may block.
	acks         *respConn
	topic, group string
	found        func(body []byte)
	create, read []byte
	created      bool
	ids          []string
}

// Receive implements Consumer.
func (c *respConsumer) Receive(ctx context.Context) (int, error) {
	c.ids = c.ids[:0]
	if !c.created {
		err := c.do(ctx, c.create, 1, nil)
		if err != nil && !bytes.Contains([]byte(err.Error()), []byte("BUSYGROUP")) {
			return 0, err
		}
		c.created = true
	}
	err := c.do(ctx, c.read, 1, func(_ int, v respValue) error {
		for _, stream := range v.items { // one: its name and its entries
			if len(stream.items) != 2 {
				return errs.New(errs.Internal, "XREADGROUP answers with %d parts", len(stream.items))
			}
			for _, entry := range stream.items[1].items {
				if len(entry.items) != 2 {
					return errs.New(errs.Internal, "an entry of %d parts", len(entry.items))
				}
				c.ids = append(c.ids, string(entry.items[0].data))
				if fields := entry.items[1].items; c.found != nil && len(fields) == 2 {
					c.found(fields[1].data)
				}
			}
		}
		return nil
	})
	return len(c.ids), err
}

// Settle implements Consumer.
func (c *respConsumer) Settle(ctx context.Context) (int, error) { return c.settle(ctx, c.ids) }

// Overlap implements Overlapper.
func (c *respConsumer) Overlap() func(ctx context.Context) (int, error) {
	ids := c.ids
	c.ids = nil
	return func(ctx context.Context) (int, error) { return c.settle(ctx, ids) }
}

// Close implements Consumer.
func (c *respConsumer) Close() error { return errors.Join(c.respConn.Close(), c.acks.Close()) }

func (c *respConsumer) settle(ctx context.Context, ids []string) (int, error) {
	commands := c.d.appendWait(appendCommand(nil, append([]string{"XACK", c.topic, c.group}, ids...)...))
	replies := 1
	if c.d.WaitReplicas > 0 {
		replies = 2
	}
	done := 0
	err := c.acks.do(ctx, commands, replies, func(i int, v respValue) error {
		switch {
		case v.kind != ':':
			return errs.New(errs.Internal, "XACK answers %q", v.kind)
		case i == 0:
			done = int(v.n)
		case v.n < int64(c.d.WaitReplicas):
			return errs.New(errs.OutcomeUnknown, "%d replicas of %d", v.n, c.d.WaitReplicas)
		}
		return nil
	})
	return done, err
}

// respValue is one reply of RESP2.
type respValue struct {
	kind  byte // one of + - : $ *
	null  bool
	n     int64
	data  []byte
	items []respValue
}

// failure makes an error of an error reply.
func (v respValue) failure() error {
	if v.kind != '-' {
		return nil
	}
	code := errs.Internal
	word, _, _ := bytes.Cut(v.data, []byte(" "))
	switch string(word) {
	case "OOM", "BUSY":
		code = errs.Overloaded
	case "CLUSTERDOWN", "TRYAGAIN", "LOADING", "MASTERDOWN":
		code = errs.NotLeader
	}
	return errs.New(code, "%s", v.data)
}

// The bounds of what is read of one reply.
const (
	respDepthMax = 8
	respItemsMax = 1 << 16
)

// readRESP reads one reply. Its bytes are in scratch and valid until the next call.
func readRESP(r *bufio.Reader, scratch *[]byte) (respValue, error) {
	*scratch = (*scratch)[:0]
	v, err := parseRESP(r, scratch, 0)
	if err != nil {
		return v, err
	}
	v.locate(*scratch)
	return v, nil
}

// parseRESP leaves in n where in scratch the data begins, since scratch may still move.
func parseRESP(r *bufio.Reader, scratch *[]byte, depth int) (respValue, error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return respValue{}, err
	}
	if len(line) < 3 || line[len(line)-2] != '\r' || depth > respDepthMax {
		return respValue{}, fmt.Errorf("reply %.60q", line)
	}
	v, text := respValue{kind: line[0]}, line[1:len(line)-2]
	switch v.kind {
	case '+', '-':
		v.n = int64(len(*scratch))
		*scratch = append(*scratch, text...)
		v.data = text[:len(text):len(text)]
		return v, nil
	case ':', '$', '*':
	default:
		return v, fmt.Errorf("reply %.60q", line)
	}
	n, err := strconv.ParseInt(string(text), 10, 64)
	if err != nil {
		return v, fmt.Errorf("reply %.60q", line)
	}
	switch {
	case v.kind == ':':
		v.n = n
	case n == -1:
		v.null = true
	case n < 0 || v.kind == '$' && n > answerBytesMax || v.kind == '*' && n > respItemsMax:
		return v, fmt.Errorf("a reply of length %d", n)
	case v.kind == '$':
		at := len(*scratch)
		*scratch = append(*scratch, make([]byte, n+2)...)
		if _, err := io.ReadFull(r, (*scratch)[at:]); err != nil {
			return v, err
		}
		if end := (*scratch)[at+int(n):]; end[0] != '\r' || end[1] != '\n' {
			return v, fmt.Errorf("behind a string of %d bytes stands %q", n, end)
		}
		*scratch = (*scratch)[:at+int(n)]
		v.n, v.data = int64(at), (*scratch)[at:]
	case v.kind == '*':
		v.items = make([]respValue, n)
		for i := range v.items {
			if v.items[i], err = parseRESP(r, scratch, depth+1); err != nil {
				return v, err
			}
		}
	}
	return v, nil
}

// locate sets data of strings, now that scratch stays where it is.
func (v *respValue) locate(scratch []byte) {
	if v.kind != ':' && v.kind != '*' && !v.null {
		v.data = scratch[v.n : int(v.n)+len(v.data)]
	}
	for i := range v.items {
		v.items[i].locate(scratch)
	}
}
