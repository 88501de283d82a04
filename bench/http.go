package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

// HTTPDriver drives a cluster over the queue protocol, one connection per publisher and consumer.
type HTTPDriver struct {
	// Addrs are the nodes' HTTP addresses. Publisher i starts at the i-th and goes on to the next one after a
	// failure.
	Addrs []string
	// Workload is what the requests are made for.
	Workload Workload
	// Multipart sends batches as multipart/mixed instead of the compact framing.
	Multipart bool
	// Timeout bounds a request (default 30 s).
	Timeout time.Duration
	// Token is sent as a bearer token if not empty.
	Token string

	requests *requests
}

// Prepare makes the requests that publishers send. It is called once, before the driver is used.
func (d *HTTPDriver) Prepare() error {
	if len(d.Addrs) == 0 {
		return errors.New("no server address")
	}
	if d.Timeout == 0 {
		d.Timeout = 30 * time.Second
	}
	if d.Workload.Publishers > 0 {
		d.requests = prepare(d.Workload, d.request)
	}
	return nil
}

func (d *HTTPDriver) request(topic string, bodies [][]byte) request {
	w := d.Workload
	path, contentType := "/api/v3/topic/"+topic, wire.MediaOctets
	var body []byte
	retention := strconv.FormatInt(int64(w.Retention/time.Second), 10)
	var inHead string // retention belongs to the request, in a batch as well
	switch {
	case w.Batch == 1:
		body = bodies[0]
	case d.Multipart:
		const boundary = "vqs-tercet-bench-5d1f9be07c3a"
		path, contentType = path+"/batch", wire.MediaMultipart+"; boundary="+boundary
		var b bytes.Buffer
		for _, one := range bodies {
			fmt.Fprintf(&b, "--%s\r\ncontent-type: %s\r\n\r\n", boundary, wire.MediaOctets)
			b.Write(one)
			b.WriteString("\r\n")
		}
		fmt.Fprintf(&b, "--%s--\r\n", boundary)
		body = b.Bytes()
	default:
		path, contentType = path+"/batch", wire.MediaBatch
		inHead = "Accept: " + wire.MediaBatch + "\r\n"
		for _, one := range bodies {
			body = wire.AppendFrame(body, nil, one)
		}
	}
	var head strings.Builder
	fmt.Fprintf(&head, "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nContent-Length: %d\r\n%s: %s\r\n%s%s",
		path, contentType, len(body), wire.HeaderRetention, retention, inHead, d.authorization())
	if w.AllZones {
		head.WriteString(wire.HeaderDurability + ": all\r\n")
	}
	head.WriteString("\r\n")
	return request{head: []byte(head.String()), body: body}
}

func (d *HTTPDriver) authorization() string {
	if d.Token == "" {
		return ""
	}
	return "Authorization: Bearer " + d.Token + "\r\n"
}

// Publisher implements Driver.
func (d *HTTPDriver) Publisher(i int) (Publisher, error) {
	return &httpPublisher{conn: newConn(d.Addrs, i, d.Timeout), feed: d.requests.feed(i)}, nil
}

type httpPublisher struct {
	*conn
	*feed
}

// Publish implements Publisher.
func (p *httpPublisher) Publish(ctx context.Context, due time.Time) (Ack, error) {
	req := p.take(due)
	a, err := p.do(ctx, req.head, req.body)
	if err != nil {
		return Ack{Stamp: p.stamp}, err
	}
	if a.status != http.StatusCreated && a.status != http.StatusOK {
		if a.status == http.StatusServiceUnavailable || a.status == http.StatusTooManyRequests {
			p.turn() // the next attempt goes elsewhere
		}
		return Ack{Stamp: p.stamp}, a.failure()
	}
	return p.ack(req, a.zones), nil
}

// receiveWait is how long a receive waits for its first message.
const receiveWait = 2 * time.Second

// Consumer implements Driver.
func (d *HTTPDriver) Consumer(i int, found func(body []byte)) (Consumer, error) {
	w := d.Workload
	topic, name := w.Consumes(i)
	group := "/api/v3/topic/" + topic + "/consumer/" + name
	return &httpConsumer{
		conn: newConn(d.Addrs, i, d.Timeout), found: found,
		receive: fmt.Appendf(nil,
			"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nAccept: %s\r\n%s: %d\r\n%s: %d\r\n%s\r\n",
			group, wire.MediaBatch, wire.HeaderMaxMessages, min(w.ReceiveMax, limits.ReceiveMessagesMax), wire.HeaderWait, int(receiveWait/time.Second), d.authorization()),
		leasePath: []byte("DELETE " + group + "/lease/"),
		rest:      []byte(" HTTP/1.1\r\nHost: localhost\r\n" + d.authorization() + "\r\n"),
	}, nil
}

type httpConsumer struct {
	*conn
	found           func(body []byte)
	receive         []byte
	leasePath, rest []byte
	receipts        [][]byte
	settlers        []*settler
}

// Receive implements Consumer.
func (c *httpConsumer) Receive(ctx context.Context) (int, error) {
	c.receipts = c.receipts[:0]
	a, err := c.do(ctx, c.receive, nil)
	switch {
	case err != nil:
		return 0, err
	case a.status == http.StatusNoContent:
		return 0, nil
	case a.status != http.StatusOK:
		return 0, a.failure()
	}
	for rest := a.body; len(rest) > 0; {
		var head, body []byte
		if head, body, rest, err = wire.NextFrame(rest); err != nil {
			return 0, errs.Of(errs.Internal).With(err)
		}
		receipt := headLine(head, wire.HeaderReceipt)
		if receipt == nil {
			return 0, errs.New(errs.Internal, "a message without a receipt: %.100q", head)
		}
		c.receipts = append(c.receipts, bytes.Clone(receipt))
		if c.found != nil {
			c.found(body)
		}
	}
	return len(c.receipts), nil
}

// headLine finds a header of a frame.
func headLine(head []byte, name string) []byte {
	for len(head) > 0 {
		var line []byte
		line, head, _ = bytes.Cut(head, []byte{'\n'})
		if value, ok := bytes.CutPrefix(line, []byte(name)); ok {
			if value, ok := bytes.CutPrefix(value, []byte(": ")); ok {
				return value
			}
		}
	}
	return nil
}

// Settle implements Consumer. The protocol acknowledges one message per request, so that they go out at the same time,
// each on a connection of its own.
func (c *httpConsumer) Settle(ctx context.Context) (int, error) { return c.settle(ctx, c.receipts) }

// Overlap implements Overlapper.
func (c *httpConsumer) Overlap() func(ctx context.Context) (int, error) {
	receipts := c.receipts
	c.receipts = nil
	return func(ctx context.Context) (int, error) { return c.settle(ctx, receipts) }
}

func (c *httpConsumer) settle(ctx context.Context, receipts [][]byte) (int, error) {
	for len(c.settlers) < len(receipts) {
		c.settlers = append(c.settlers, &settler{conn: newConn(c.conn.addrs, c.conn.at, c.conn.timeout)})
	}
	var group sync.WaitGroup
	for i, receipt := range receipts {
		s := c.settlers[i]
		s.request = append(append(append(s.request[:0], c.leasePath...), receipt...), c.rest...)
		group.Go(func() { s.err = s.settle(ctx) })
	}
	group.Wait()
	done := 0
	var failed error
	for _, s := range c.settlers[:len(receipts)] {
		if s.err == nil {
			done++
		} else {
			failed = s.err
		}
	}
	return done, failed
}

// Close implements Consumer.
func (c *httpConsumer) Close() error {
	err := c.conn.Close()
	for _, s := range c.settlers {
		err = errors.Join(err, s.conn.Close())
	}
	return err
}

// settler acknowledges one message at a time.
type settler struct {
	conn    *conn
	request []byte
	err     error
}

func (s *settler) settle(ctx context.Context) error {
	a, err := s.conn.do(ctx, s.request, nil)
	if err == nil && a.status != http.StatusNoContent {
		err = a.failure()
	}
	return err
}
