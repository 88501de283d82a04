package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"tercet.dev/tercet/internal/errs"
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
	// Found is called for each message a consumer receives, if set.
	Found func(body []byte)

	pool []request
}

// request is a prepared publish.
type request struct{ head, body []byte }

// Prepare makes the requests that publishers send. It is called once, before the driver is used.
func (d *HTTPDriver) Prepare() error {
	if len(d.Addrs) == 0 {
		return errors.New("no server address")
	}
	if d.Timeout == 0 {
		d.Timeout = 30 * time.Second
	}
	w := d.Workload
	if w.Publishers == 0 {
		return nil
	}
	source := newBodies(w.Seed)
	n := poolSize(w.Size * w.Batch)
	d.pool = make([]request, n)
	for i := range d.pool {
		var err error
		if d.pool[i], err = d.request(source); err != nil {
			return err
		}
	}
	return nil
}

func (d *HTTPDriver) request(source *bodies) (request, error) {
	w := d.Workload
	path, contentType := "/api/v3/topic/"+w.Topic, wire.MediaOctets
	var body []byte
	retention := strconv.FormatInt(int64(w.Retention/time.Second), 10)
	var inHead string // retention belongs to the request, in a batch as well
	switch {
	case w.Batch == 1:
		body = source.next(w.Size)
	case d.Multipart:
		const boundary = "vqs-tercet-bench-5d1f9be07c3a"
		path, contentType = path+"/batch", wire.MediaMultipart+"; boundary="+boundary
		var b bytes.Buffer
		for range w.Batch {
			fmt.Fprintf(&b, "--%s\r\ncontent-type: %s\r\n\r\n", boundary, wire.MediaOctets)
			b.Write(source.next(w.Size))
			b.WriteString("\r\n")
		}
		fmt.Fprintf(&b, "--%s--\r\n", boundary)
		body = b.Bytes()
	default:
		path, contentType = path+"/batch", wire.MediaBatch
		inHead = "Accept: " + wire.MediaBatch + "\r\n"
		for range w.Batch {
			body = wire.AppendFrame(body, nil, source.next(w.Size))
		}
	}
	var head strings.Builder
	fmt.Fprintf(&head, "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\nContent-Length: %d\r\n%s: %s\r\n%s%s",
		path, contentType, len(body), wire.HeaderRetention, retention, inHead, d.authorization())
	if w.AllZones {
		head.WriteString(wire.HeaderDurability + ": all\r\n")
	}
	head.WriteString("\r\n")
	return request{head: []byte(head.String()), body: body}, nil
}

func (d *HTTPDriver) authorization() string {
	if d.Token == "" {
		return ""
	}
	return "Authorization: Bearer " + d.Token + "\r\n"
}

// Publisher implements Driver.
func (d *HTTPDriver) Publisher(i int) (Publisher, error) {
	p := &httpPublisher{
		conn: newConn(d.Addrs, i, d.Timeout), d: d, stamp: Stamp{Publisher: uint32(i)},
		next: i * len(d.pool) / d.Workload.Publishers, // far from what the others send at the moment
	}
	if d.Workload.Stamped {
		p.own = bytes.Clone(d.pool[i%len(d.pool)].body)
	}
	return p, nil
}

type httpPublisher struct {
	*conn
	d     *HTTPDriver
	next  int
	stamp Stamp
	own   []byte // the body of a stamped workload
}

// Publish implements Publisher.
func (p *httpPublisher) Publish(ctx context.Context) (Ack, error) {
	req := &p.d.pool[p.next%len(p.d.pool)]
	p.next++
	body := req.body
	if p.own != nil {
		p.stamp.Number++
		p.stamp.put(p.own)
		body = p.own
	}
	a, err := p.do(ctx, req.head, body)
	if err != nil {
		return Ack{Stamp: p.stamp}, err
	}
	if a.status != http.StatusCreated && a.status != http.StatusOK {
		if a.status == http.StatusServiceUnavailable || a.status == http.StatusTooManyRequests {
			p.turn() // the next attempt goes elsewhere
		}
		return Ack{Stamp: p.stamp}, a.failure()
	}
	return Ack{Messages: p.d.Workload.Batch, Zones: a.zones, Stamp: p.stamp}, nil
}

// receiveWait is how long a receive waits for its first message.
const receiveWait = 2 * time.Second

// Consumer implements Driver.
func (d *HTTPDriver) Consumer(i int) (Consumer, error) {
	w := d.Workload
	group := "/api/v3/topic/" + w.Topic + "/consumer/" + w.Group
	return &httpConsumer{
		conn: newConn(d.Addrs, i, d.Timeout), d: d,
		receive: fmt.Appendf(nil,
			"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nAccept: %s\r\n%s: %d\r\n%s: %d\r\n%s\r\n",
			group, wire.MediaBatch, wire.HeaderMaxMessages, w.ReceiveMax, wire.HeaderWait, int(receiveWait/time.Second), d.authorization()),
		leasePath: []byte("DELETE " + group + "/lease/"),
		rest:      []byte(" HTTP/1.1\r\nHost: localhost\r\n" + d.authorization() + "\r\n"),
	}, nil
}

type httpConsumer struct {
	*conn
	d               *HTTPDriver
	receive         []byte
	leasePath, rest []byte
	receipts        [][]byte
	scratch         []byte
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
		if c.d.Found != nil {
			c.d.Found(body)
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

// Settle implements Consumer. The protocol acknowledges one message per request.
func (c *httpConsumer) Settle(ctx context.Context) (int, error) {
	done := 0
	var failed error
	for _, receipt := range c.receipts {
		c.scratch = append(append(append(c.scratch[:0], c.leasePath...), receipt...), c.rest...)
		switch a, err := c.do(ctx, c.scratch, nil); {
		case err != nil:
			return done, err
		case a.status == http.StatusNoContent:
			done++
		default:
			failed = a.failure()
		}
	}
	return done, failed
}
