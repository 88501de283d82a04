package bench

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"tercet.dev/tercet/internal/errs"
)

// conn is an HTTP/1.1 client for one connection and one request at a time. It exists because the client's CPU is the
// servers' loss on a machine that runs both: a request is one write of bytes prepared beforehand, an answer is parsed
// in place, and neither allocates. It understands what Tercet's own server sends, and fails loudly on anything else.
type conn struct {
	addrs   []string
	at      int // the address in use
	timeout time.Duration

	c    net.Conn
	open atomic.Pointer[net.Conn] // the same, for interrupt
	// bound is the context whose end interrupts requests, until unbind. It is the same for all requests of a run.
	bound  context.Context
	unbind func() bool
	r      *bufio.Reader
	body   []byte // of the last answer, used again for the next one
}

// dialTimeout bounds one attempt to connect.
const dialTimeout = time.Second

// newConn returns a client that connects to addrs[first] when it is needed, and to the next address after a failure.
func newConn(addrs []string, first int, timeout time.Duration) *conn {
	return &conn{addrs: addrs, at: first % len(addrs), timeout: timeout, r: bufio.NewReaderSize(nil, 16<<10)}
}

// answer is what is read of a response.
type answer struct {
	status int
	// zones is the header Tercet-Zones, -1 if absent.
	zones int
	// body is valid until the next request.
	body []byte
}

// interrupt makes a request that waits return at once. Any goroutine may call it.
func (c *conn) interrupt() {
	if open := c.open.Load(); open != nil {
		_ = (*open).SetDeadline(time.Unix(1, 0)) // fails on a closed connection, which nobody waits for
	}
}

// bind makes the end of ctx interrupt requests.
func (c *conn) bind(ctx context.Context) {
	if c.bound == ctx {
		return
	}
	if c.unbind != nil {
		c.unbind()
	}
	c.bound, c.unbind = ctx, context.AfterFunc(ctx, c.interrupt)
}

// Close closes the connection for good.
func (c *conn) Close() error {
	if c.unbind != nil {
		c.unbind()
	}
	return c.hangUp()
}

// hangUp closes the connection. The next request makes a new one.
func (c *conn) hangUp() error {
	c.open.Store(nil)
	if c.c == nil {
		return nil
	}
	err := c.c.Close()
	c.c = nil
	return err
}

// connect connects unless it is connected.
func (c *conn) connect(ctx context.Context) error {
	if c.c != nil {
		return nil
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	nc, err := dialer.DialContext(ctx, "tcp", c.addrs[c.at])
	if err != nil {
		c.at = (c.at + 1) % len(c.addrs)
		// Nothing was sent.
		return errs.Of(errs.NotLeader).With(err)
	}
	c.c = nc
	c.open.Store(&nc)
	c.r.Reset(nc)
	return nil
}

// do sends a complete request, in one or two pieces, and reads the answer. After an error the outcome is unknown,
// the connection is closed, and the next request goes to the next address.
func (c *conn) do(ctx context.Context, head, body []byte) (answer, error) {
	c.bind(ctx)
	if err := c.connect(ctx); err != nil {
		return answer{}, err
	}
	if err := c.c.SetDeadline(time.Now().Add(c.timeout)); err != nil {
		c.turn()
		return answer{}, errs.Of(errs.NotLeader).With(err) // nothing was sent
	}
	// Only now: an interruption that came before the deadline was set would have been undone by it.
	if err := ctx.Err(); err != nil {
		return answer{}, err
	}
	a, again, err := c.exchange(head, body)
	if err != nil {
		c.turn()
		return a, errs.Of(errs.OutcomeUnknown).With(err)
	}
	if !again {
		_ = c.hangUp() // everything was read
	}
	return a, nil
}

// turn closes the connection and makes the next request go to the next address.
func (c *conn) turn() {
	_ = c.hangUp() // what it says of a broken connection is not news
	c.at = (c.at + 1) % len(c.addrs)
}

// exchange reports as again whether the connection can be used for another request.
func (c *conn) exchange(head, body []byte) (a answer, again bool, err error) {
	if len(body) == 0 {
		_, err = c.c.Write(head)
	} else {
		pieces := net.Buffers{head, body}
		_, err = pieces.WriteTo(c.c)
	}
	if err != nil {
		return a, false, err
	}
	return c.read()
}

func (c *conn) read() (a answer, again bool, err error) {
	line, err := c.line()
	if err != nil {
		return a, false, err
	}
	// HTTP/1.1 200 OK
	if len(line) < 12 || !bytes.HasPrefix(line, []byte("HTTP/1.1 ")) {
		return a, false, fmt.Errorf("status line %.60q", line)
	}
	if a.status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return a, false, fmt.Errorf("status line %.60q", line)
	}
	a.zones = -1
	length, chunked, again := int64(-1), false, true
	for {
		if line, err = c.line(); err != nil {
			return a, false, err
		}
		if len(line) == 0 {
			break
		}
		name, value, ok := bytes.Cut(line, []byte(": "))
		if !ok {
			return a, false, fmt.Errorf("header line %.60q", line)
		}
		switch {
		case is(name, "content-length"):
			if length, err = strconv.ParseInt(string(value), 10, 64); err != nil || length < 0 {
				return a, false, fmt.Errorf("header line %.60q", line)
			}
		case is(name, "transfer-encoding"):
			chunked = is(value, "chunked")
		case is(name, "connection"):
			again = !is(value, "close")
		case is(name, "tercet-zones"):
			if a.zones, err = strconv.Atoi(string(value)); err != nil {
				return a, false, fmt.Errorf("header line %.60q", line)
			}
		}
	}
	c.body = c.body[:0]
	switch {
	case a.status == http.StatusNoContent:
	case chunked:
		err = c.chunks()
	case length >= 0:
		err = c.append(length)
	default:
		err = errors.New("an answer without a length")
	}
	a.body = c.body
	return a, again, err
}

// is compares without regard to case; to is in lower case.
func is(b []byte, to string) bool {
	if len(b) != len(to) {
		return false
	}
	for i, x := range b {
		if 'A' <= x && x <= 'Z' {
			x += 'a' - 'A'
		}
		if x != to[i] {
			return false
		}
	}
	return true
}

// line reads one line without its end. It is valid until the next read.
func (c *conn) line() ([]byte, error) {
	line, err := c.r.ReadSlice('\n')
	if err != nil {
		return nil, err
	}
	line = line[:len(line)-1]
	if n := len(line); n > 0 && line[n-1] == '\r' {
		line = line[:n-1]
	}
	return line, nil
}

// answerBytesMax bounds what is read of one answer.
const answerBytesMax = 64 << 20

// append reads n bytes behind what the body has.
func (c *conn) append(n int64) error {
	have := len(c.body)
	if n > answerBytesMax-int64(have) {
		return fmt.Errorf("an answer of more than %d bytes", int64(answerBytesMax))
	}
	if need := have + int(n); cap(c.body) < need {
		c.body = append(make([]byte, 0, max(need, 2*cap(c.body))), c.body...)
	}
	c.body = c.body[:have+int(n)]
	_, err := io.ReadFull(c.r, c.body[have:])
	return err
}

// chunks reads a body in chunked encoding.
func (c *conn) chunks() error {
	for {
		line, err := c.line()
		if err != nil {
			return err
		}
		size, err := strconv.ParseInt(string(line), 16, 64)
		if err != nil || size < 0 {
			return fmt.Errorf("chunk size %.20q", line)
		}
		if err := c.append(size); err != nil {
			return err
		}
		if line, err = c.line(); err != nil {
			return err
		}
		if len(line) != 0 {
			return fmt.Errorf("behind a chunk of %d bytes stands %.20q", size, line)
		}
		if size == 0 {
			return nil
		}
	}
}

// failure makes an error of an answer that is no success.
func (a answer) failure() error {
	code := errs.Internal
	if name := stringMember(a.body, "code"); name != "" {
		if known, ok := errs.ByName(name); ok {
			code = known
		}
	}
	return errs.New(code, "status %d: %.200s", a.status, a.body)
}

// stringMember finds the value of a member of a flat JSON object, if it is a string without escapes.
func stringMember(object []byte, name string) string {
	_, rest, ok := bytes.Cut(object, []byte(`"`+name+`":"`))
	if !ok {
		return ""
	}
	value, _, ok := bytes.Cut(rest, []byte(`"`))
	if !ok {
		return ""
	}
	return string(value)
}
