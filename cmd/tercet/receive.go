package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

// defaultGroup is the consumer group of a command that names none.
const defaultGroup = "default"

// settlements is how many acknowledgements are on their way at once.
const settlements = 64

// receiveOptions are the flags of `tercet receive`.
type receiveOptions struct {
	connection
	group    string
	max      int
	wait     time.Duration
	lease    time.Duration
	ack      bool
	exec     string
	latest   bool
	parallel int
}

func (a *app) receiveCommand() *cobra.Command {
	var o receiveOptions
	cmd := &cobra.Command{
		Use:     "receive TOPIC",
		Short:   "Receive messages: lease them, print them, acknowledge them",
		GroupID: groupEveryday,
		Long: `Receives up to --max messages and prints their bodies, one a line (with -o json each message as the
HTTP API writes it, its body in base64). Received messages are leased: nobody else of the group gets them
until --lease has passed.

--ack acknowledges each message once it is printed. --exec runs a shell command for each message instead of
printing it, the body on its stdin and TERCET_MESSAGE_ID, TERCET_TOPIC, TERCET_GROUP, TERCET_DELIVERY_COUNT and
TERCET_CONTENT_TYPE in its environment; its exit status 0 acknowledges the message, any other releases it, and
the lease is extended while it runs. Without either, the receipt for ack, release and extend is on stderr.`,
		Example: examples(`
			tercet receive orders --group billing
			tercet receive orders --group billing --max 0 --ack -o json
			tercet receive orders --group mail --max 100 --wait 20s --exec './send-mail.sh'`),
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(&o.connection, func(ctx context.Context, cl *client.Client, args []string) error {
			return a.receive(ctx, cl, args[0], &o)
		}),
	}
	o.register(cmd)
	f := cmd.Flags()
	f.StringVar(&o.group, "group", defaultGroup, "consumer `group`; groups are independent of each other")
	f.IntVar(&o.max, "max", 1, "`number` of messages to receive; 0: all there are")
	f.DurationVar(&o.wait, "wait", 0, "how long to wait for a message when there is none, up to 60s at a time")
	f.DurationVar(&o.lease, "lease", limits.VisibilityDefault, "how long the messages are leased")
	f.BoolVar(&o.ack, "ack", false, "acknowledge each message once it is printed")
	f.StringVar(&o.exec, "exec", "", "shell `command` to run for each message")
	f.BoolVar(&o.latest, "latest", false, "a group that this command creates starts after what is stored now")
	f.IntVar(&o.parallel, "parallel", 1, "`requests` (and commands of --exec) at once; more than 1 gives up the order")
	return cmd
}

func (o *receiveOptions) check() error {
	var problems []error
	if o.max < 0 {
		problems = append(problems, fmt.Errorf("--max %d: want no negative number", o.max))
	}
	if o.wait > limits.WaitMax {
		problems = append(problems, fmt.Errorf("--wait %s: want at most %s", o.wait, limits.WaitMax))
	}
	if o.lease < time.Second || o.lease > limits.VisibilityMax {
		problems = append(problems, fmt.Errorf("--lease %s: want 1s to %s", o.lease, limits.VisibilityMax))
	}
	if o.ack && o.exec != "" {
		problems = append(problems, errors.New("--ack and --exec exclude each other: --exec acknowledges by its exit status"))
	}
	if o.parallel < 1 || o.parallel > 256 {
		problems = append(problems, fmt.Errorf("--parallel %d: want 1 to 256", o.parallel))
	}
	problems = append(problems, wholeSeconds("--wait", o.wait), wholeSeconds("--lease", o.lease))
	if err := errors.Join(problems...); err != nil {
		return usageError{err}
	}
	return nil
}

// receiver is one `tercet receive` at work.
type receiver struct {
	app    *app
	client *client.Client
	topic  string
	o      *receiveOptions

	// left is how many messages may still be asked for; it stays above zero without a bound.
	left atomic.Int64
	// settling bounds the acknowledgements on their way, settled waits for them.
	settling chan struct{}
	settled  sync.WaitGroup

	// mu guards the output, so that lines stay whole, and what follows.
	mu       sync.Mutex
	received int
	failure  error // the first
	// failed holds the messages whose command failed in this run.
	failed map[string]bool
}

func (a *app) receive(ctx context.Context, cl *client.Client, topic string, o *receiveOptions) error {
	if err := o.check(); err != nil {
		return err
	}
	r := &receiver{app: a, client: cl, topic: topic, o: o, settling: make(chan struct{}, settlements), failed: map[string]bool{}}
	r.left.Store(int64(o.max))
	workers := o.parallel
	if o.max == 0 {
		r.left.Store(1 << 60)
	} else {
		workers = min(workers, o.max)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			if err := r.work(ctx); err != nil {
				r.fail(err)
				stop()
			}
		})
	}
	wg.Wait()
	r.settled.Wait()
	if r.failure != nil {
		return r.failure
	}
	if n := len(r.failed); n > 0 {
		return fmt.Errorf("the command failed for %d messages, which were released", n)
	}
	if r.received == 0 {
		a.note("no messages")
	}
	return nil
}

func (r *receiver) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.failure == nil {
		r.failure = err
	}
}

// claim takes up to n of the messages that may still be asked for.
func (r *receiver) claim(n int64) int {
	for {
		left := r.left.Load()
		if n = min(n, left); n <= 0 {
			return 0
		}
		if r.left.CompareAndSwap(left, left-n) {
			return int(n)
		}
	}
}

// work receives until enough was received or nothing is left. An interrupt ends it without an error: what was
// printed is settled.
func (r *receiver) work(ctx context.Context) error {
	most := int64(limits.ReceiveMessagesMax)
	if r.o.exec != "" {
		most = 1 // a lease should not run out while messages wait for their turn
	}
	for {
		n := r.claim(most)
		if n == 0 || ctx.Err() != nil {
			return nil
		}
		ds, err := r.client.Receive(ctx, r.topic, r.o.group, client.ReceiveOptions{
			Max: n, Visibility: r.o.lease, Wait: r.o.wait, Latest: r.o.latest,
		})
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		got, err := r.handle(ctx, ds)
		if err != nil {
			return err
		}
		r.left.Add(int64(n - got))
		if got == 0 {
			return nil
		}
	}
}

// handle prints or executes the messages of one answer.
func (r *receiver) handle(ctx context.Context, ds *client.Deliveries) (n int, err error) {
	defer ds.Close()
	for {
		d, err := ds.Next()
		if errors.Is(err, io.EOF) || err != nil && ctx.Err() != nil {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		again := false
		if r.o.exec != "" {
			again, err = r.run(ctx, d)
		} else {
			err = r.show(d)
		}
		if err != nil {
			return n, err
		}
		if !again {
			n++
		}
	}
}

// show prints a message and, when asked to, has it acknowledged.
func (r *receiver) show(d *client.Delivery) error {
	r.mu.Lock()
	r.received++
	err := r.app.print(wireMessage(d), func(w io.Writer) error {
		if !r.o.ack {
			r.app.note("message %s, delivery %d, leased for %s\n  tercet ack %s --group %s %s", d.ID, d.Count, r.o.lease, r.topic, r.o.group, d.Receipt)
		}
		return writeLine(w, d.Body)
	})
	r.mu.Unlock()
	if err != nil || !r.o.ack {
		return err
	}
	r.settling <- struct{}{}
	r.settled.Go(func() {
		// Printed is done: an interrupt does not take that back.
		if err := r.client.Acknowledge(context.Background(), r.topic, r.o.group, d.Receipt); err != nil {
			r.fail(fmt.Errorf("acknowledge %s: %w", d.ID, err))
		}
		<-r.settling
	})
	return nil
}

// writeLine writes a body as a line, without doubling the line feed it may end with.
func writeLine(w io.Writer, body []byte) error {
	if !bytes.HasSuffix(body, []byte("\n")) {
		body = append(body[:len(body):len(body)], '\n')
	}
	_, err := w.Write(body)
	return err
}

// wireMessage is a delivery as the HTTP API writes it.
func wireMessage(d *client.Delivery) wire.Message {
	m := wire.Message{
		MessageID: d.ID, ReceiptHandle: d.Receipt, DeliveryCount: d.Count, ContentType: d.ContentType, Body: d.Body,
		Timestamp: d.Timestamp.UTC().Format(wire.TimeFormat), ExpiresAt: d.ExpiresAt.UTC().Format(wire.TimeFormat),
	}
	for name := range d.Header {
		if m.Headers == nil {
			m.Headers = map[string]string{}
		}
		m.Headers[name] = d.Header.Get(name)
	}
	return m
}

// run executes the command for one message and settles it by the exit status. A message whose command failed in this
// run is released again and reported as such, so that a run ends when only failing messages are left.
func (r *receiver) run(ctx context.Context, d *client.Delivery) (again bool, err error) {
	r.mu.Lock()
	again = r.failed[d.ID]
	if !again {
		r.received++
	}
	r.mu.Unlock()
	if again {
		r.release(d)
		return true, nil
	}
	leaseCtx, ended := context.WithCancel(ctx)
	defer ended()
	go r.prolong(leaseCtx, d)
	cmd := exec.CommandContext(ctx, "sh", "-c", r.o.exec)
	cmd.Stdin = bytes.NewReader(d.Body)
	cmd.Stdout, cmd.Stderr = r.app.out, r.app.err
	cmd.Env = append(os.Environ(),
		"TERCET_MESSAGE_ID="+d.ID, "TERCET_TOPIC="+r.topic, "TERCET_GROUP="+r.o.group,
		"TERCET_DELIVERY_COUNT="+strconv.FormatUint(uint64(d.Count), 10), "TERCET_CONTENT_TYPE="+d.ContentType)
	failure := cmd.Run()
	ended()
	if failure == nil {
		if err := r.client.Acknowledge(context.Background(), r.topic, r.o.group, d.Receipt); err != nil {
			return false, fmt.Errorf("acknowledge %s: %w", d.ID, err)
		}
		return false, nil
	}
	r.app.note("message %s, delivery %d: %s; released", d.ID, d.Count, failure)
	r.mu.Lock()
	r.failed[d.ID] = true
	r.mu.Unlock()
	r.release(d)
	return false, nil
}

// release gives a message back. Should that fail it comes back later.
func (r *receiver) release(d *client.Delivery) {
	if err := r.client.Extend(context.Background(), r.topic, r.o.group, d.Receipt, 0); err != nil {
		r.app.note("message %s could not be released and comes back when its lease is over: %v", d.ID, err)
	}
}

// prolong extends the lease while the command runs. That it fails is no reason to stop the command: the
// acknowledgement will tell.
func (r *receiver) prolong(ctx context.Context, d *client.Delivery) {
	tick := time.NewTicker(max(r.o.lease/3, time.Second/2))
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := r.client.Extend(ctx, r.topic, r.o.group, d.Receipt, r.o.lease); err != nil && ctx.Err() == nil {
				r.app.note("the lease of %s could not be extended: %v", d.ID, err)
			}
		case <-ctx.Done():
			return
		}
	}
}
