package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

// PushDriver publishes over HTTP and has messages pushed to consumers: a server in this process, which acknowledges each
// message by its receipt before it answers, as clients of the protocol do. The servers have to be allowed to push to
// loopback addresses.
type PushDriver struct {
	HTTPDriver
	// Concurrency is the subscriptions' maxConcurrency, nil for none.
	Concurrency *int64

	listener net.Listener
	server   http.Server
	served   chan struct{}
	arrived  []chan pushed // by topic and group
	ids      []string      // of the subscriptions
}

// pushed is one message on its way.
type pushed struct {
	body, receipt []byte
	// settled is closed when the consumer is done with it.
	settled chan struct{}
}

// headerPushReceipt carries the receipt of a push.
const headerPushReceipt = "Ce-Vqsreceipthandle"

// Prepare makes the requests, opens the server, and subscribes. Close is called afterwards, also after an error.
func (d *PushDriver) Prepare() error {
	if err := d.HTTPDriver.Prepare(); err != nil {
		return err
	}
	var err error
	if d.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return err
	}
	w := d.Workload
	d.arrived = make([]chan pushed, w.topics()*w.groups())
	mux := http.NewServeMux()
	for i := range d.arrived {
		d.arrived[i] = make(chan pushed)
		mux.HandleFunc(fmt.Sprintf("POST /%d", i), func(rw http.ResponseWriter, r *http.Request) { take(rw, r, d.arrived[i]) })
	}
	d.server = http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	d.served = make(chan struct{})
	go func() {
		defer close(d.served)
		_ = d.server.Serve(d.listener) // returns when Close is called
	}()
	for i := range d.arrived {
		topic, group := w.Consumes(i)
		var made wire.Subscription
		err := d.admin(http.MethodPost, "/v1/subscriptions", wire.Subscription{
			Topic: topic, ConsumerGroup: group, URL: fmt.Sprintf("http://%s/%d", d.listener.Addr(), i), MaxConcurrency: d.Concurrency,
		}, &made)
		if err != nil {
			return err
		}
		d.ids = append(d.ids, made.ID)
	}
	return nil
}

// take hands a push to a consumer and answers when it is settled.
func take(w http.ResponseWriter, r *http.Request, to chan<- pushed) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limits.MessageBytesMax))
	receipt := r.Header.Get(headerPushReceipt)
	if err != nil || receipt == "" {
		http.Error(w, "a push without its message", http.StatusBadRequest)
		return
	}
	p := pushed{body, []byte(receipt), make(chan struct{})}
	select {
	case to <- p:
	case <-r.Context().Done():
		return
	}
	select {
	case <-p.settled:
	case <-r.Context().Done():
	}
}

// admin makes one administrative request of the first server.
func (d *PushDriver) admin(method, path string, body, into any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+d.Addrs[0]+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", wire.MediaJSON)
	if d.Token != "" {
		req.Header.Set("Authorization", "Bearer "+d.Token)
	}
	resp, err := administration.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<16))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %.200s", method, path, resp.Status, answer)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(answer, into)
}

// Close ends the subscriptions and the server.
func (d *PushDriver) Close() error {
	var failed error
	for _, id := range d.ids {
		if err := d.admin(http.MethodDelete, "/v1/subscriptions/"+id, nil, nil); err != nil {
			failed = err
		}
	}
	if d.served != nil {
		_ = d.server.Close() // what is under way is under a lease
		<-d.served
	}
	return failed
}

// Consumer implements Driver.
func (d *PushDriver) Consumer(i int, found func(body []byte)) (Consumer, error) {
	inner, err := d.HTTPDriver.Consumer(i, nil)
	if err != nil {
		return nil, err
	}
	return &pushConsumer{httpConsumer: inner.(*httpConsumer), arrived: d.arrived[i%len(d.arrived)], tell: found, max: d.Workload.ReceiveMax}, nil
}

type pushConsumer struct {
	*httpConsumer
	arrived chan pushed
	tell    func(body []byte)
	max     int
	leased  []pushed
}

// Receive implements Consumer.
func (c *pushConsumer) Receive(ctx context.Context) (int, error) {
	c.leased, c.receipts = c.leased[:0], c.receipts[:0]
	timer := time.NewTimer(receiveWait)
	defer timer.Stop()
	select {
	case p := <-c.arrived:
		c.leased = append(c.leased, p)
	case <-timer.C:
		return 0, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	for more := true; more && len(c.leased) < c.max; {
		select {
		case p := <-c.arrived:
			c.leased = append(c.leased, p)
		default:
			more = false
		}
	}
	for _, p := range c.leased {
		c.receipts = append(c.receipts, p.receipt)
		if c.tell != nil {
			c.tell(p.body)
		}
	}
	return len(c.leased), nil
}

// Settle implements Consumer.
func (c *pushConsumer) Settle(ctx context.Context) (int, error) { return c.Overlap()(ctx) }

// Overlap implements Overlapper.
func (c *pushConsumer) Overlap() func(ctx context.Context) (int, error) {
	leased, settle := c.leased, c.httpConsumer.Overlap()
	c.leased = nil
	return func(ctx context.Context) (int, error) {
		defer func() {
			for _, p := range leased {
				close(p.settled)
			}
		}()
		return settle(ctx)
	}
}
