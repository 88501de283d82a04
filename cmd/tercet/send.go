package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/internal/limits"
)

// sendOptions are the flags of `tercet send`.
type sendOptions struct {
	connection
	contentType string
	retention   time.Duration
	delay       time.Duration
	headers     []string
	durability  string
	key         string

	run      string
	keyField string
	jsonl    bool
	batch    int
	inflight int
}

// runBytesMax leaves room for the line's number in a key.
const runBytesMax = limits.IdempotencyKeyBytesMax - 32

// sent is what `tercet send -o json` prints for one message.
type sent struct {
	MessageID string `json:"messageId"`
	Zones     int    `json:"zones"`
}

func (a *app) sendCommand() *cobra.Command {
	var o sendOptions
	cmd := &cobra.Command{
		Use:     "send TOPIC [MESSAGE]",
		Short:   "Publish a message, or a message per line",
		GroupID: groupEveryday,
		Long: `Publishes MESSAGE, or all of stdin without one, and prints the message's id once every in-sync zone has
it on disk. Should a node die under the request it is repeated at the next one, under an idempotency key, so
that the message is stored once; --idempotency-key chooses it, and makes a later send of it a duplicate as well.

With --jsonl each line of stdin is a message, sent in batches, several of them on their way at once, so
that the order is kept only roughly (--inflight 1 keeps it). A batch whose outcome is not known is sent
again; each line has an idempotency key, so that it is stored once. The key is made of the run, which is
random unless --run names it, and the line's number, or it is what --key-field finds in the line: a send that
was broken off can be started over with the same run, and only adds what is missing. Lines that are not JSON
or are refused for good are named, left out, and make the command fail at the end.`,
		Example: examples(`
			tercet send orders '{"id": 1}'
			echo hello | tercet send greetings --retention 1h --delay 30s
			tercet send invoices '{"month": "2026-11"}' --idempotency-key invoice-2026-11
			tercet send orders --jsonl < orders.jsonl
			tercet send orders --jsonl --run import-7 < orders.jsonl
			tercet send orders --jsonl --key-field orderId < orders.jsonl
			tercet send orders '{"id": 2}' --durability all -o json`),
		Args: cobra.RangeArgs(1, 2),
		RunE: a.withClient(&o.connection, func(ctx context.Context, cl *client.Client, args []string) error {
			if o.jsonl {
				if len(args) > 1 {
					return usageError{errors.New("--jsonl reads the messages from stdin: leave MESSAGE out")}
				}
				return a.sendLines(ctx, cl, args[0], &o)
			}
			return a.sendOne(ctx, cl, args, &o)
		}),
	}
	o.register(cmd)
	f := cmd.Flags()
	f.StringVar(&o.contentType, "content-type", "", "media `type` of the messages (default: JSON or UTF-8 text if they are)")
	f.DurationVar(&o.retention, "retention", 0, "how long the messages are kept, from 1m to 168h (default 24h)")
	f.DurationVar(&o.delay, "delay", 0, "how long until they become visible")
	f.StringArrayVar(&o.headers, "header", nil, "application `header` as 'Name: value', may be repeated")
	f.StringVar(&o.durability, "durability", "", "in-sync or all; all is refused while a `zone` is away (default: the servers')")
	f.StringVar(&o.key, "idempotency-key", "", "of all messages with this `key` one is delivered (default: a random one)")
	f.StringVar(&o.run, "run", "", "with --jsonl: `name` of the run, for the idempotency keys (default: a random one)")
	f.StringVar(&o.keyField, "key-field", "", "with --jsonl: the `field` of each line that is its idempotency key")
	f.BoolVar(&o.jsonl, "jsonl", false, "send each line of stdin as a message")
	f.IntVar(&o.batch, "batch", limits.BatchMessagesMax, "with --jsonl: messages per `request`, up to 100")
	f.IntVar(&o.inflight, "inflight", 4, "with --jsonl: `requests` on their way at once")
	return cmd
}

// message checks the flags and returns a message without body.
func (o *sendOptions) message() (client.Message, client.Durability, error) {
	m := client.Message{ContentType: o.contentType, Retention: o.retention, Delay: o.delay}
	var problems []error
	if o.retention != 0 {
		if o.retention < limits.RetentionMin || o.retention > limits.RetentionMax {
			problems = append(problems, fmt.Errorf("--retention %s: want %s to %s", o.retention, limits.RetentionMin, limits.RetentionMax))
		}
		problems = append(problems, wholeSeconds("--retention", o.retention))
	}
	if o.delay < 0 || o.delay > limits.DelayMax {
		problems = append(problems, fmt.Errorf("--delay %s: want 0s to %s", o.delay, limits.DelayMax))
	}
	problems = append(problems, wholeSeconds("--delay", o.delay))
	for _, h := range o.headers {
		name, value, ok := strings.Cut(h, ":")
		if !ok || name == "" {
			problems = append(problems, fmt.Errorf("--header %q: want 'Name: value'", h))
			continue
		}
		if m.Header == nil {
			m.Header = http.Header{}
		}
		m.Header.Add(name, strings.TrimSpace(value))
	}
	switch d := client.Durability(o.durability); d {
	case client.Default, client.InSync, client.All:
	default:
		problems = append(problems, fmt.Errorf("--durability %q: want in-sync or all", o.durability))
	}
	if o.key != "" && o.jsonl {
		problems = append(problems, errors.New("--idempotency-key is for one message: with --jsonl use --key-field or --run"))
	}
	if (o.run != "" || o.keyField != "") && !o.jsonl {
		problems = append(problems, errors.New("--run and --key-field are for --jsonl"))
	}
	if o.run != "" && o.keyField != "" {
		problems = append(problems, errors.New("--run and --key-field: either the run and the line's number are the key, or the field"))
	}
	if o.run != "" {
		if len(o.run) > runBytesMax {
			problems = append(problems, fmt.Errorf("--run: at most %d characters", runBytesMax))
		} else if err := validKey(o.run); err != nil {
			problems = append(problems, fmt.Errorf("--run: %w", err))
		}
	}
	if o.batch < 1 || o.batch > limits.BatchMessagesMax {
		problems = append(problems, fmt.Errorf("--batch %d: want 1 to %d", o.batch, limits.BatchMessagesMax))
	}
	if o.inflight < 1 || o.inflight > 256 {
		problems = append(problems, fmt.Errorf("--inflight %d: want 1 to 256", o.inflight))
	}
	if err := errors.Join(problems...); err != nil {
		return m, "", usageError{err}
	}
	return m, client.Durability(o.durability), nil
}

func (a *app) sendOne(ctx context.Context, cl *client.Client, args []string, o *sendOptions) error {
	m, durability, err := o.message()
	if err != nil {
		return err
	}
	if len(args) > 1 {
		m.Body = []byte(args[1])
	} else if m.Body, err = io.ReadAll(io.LimitReader(a.in, limits.LargeMessageBytesMax+1)); err != nil {
		return err
	}
	if len(m.Body) > limits.LargeMessageBytesMax {
		return usageError{fmt.Errorf("the message is larger than %d bytes", limits.LargeMessageBytesMax)}
	}
	if m.ContentType == "" {
		m.ContentType = sniff(m.Body)
	}
	if m.Key = o.key; m.Key == "" {
		m.Key = rand.Text()
	}
	id, stored, err := cl.Send(ctx, args[0], m, durability)
	if err != nil {
		return err
	}
	return a.print(sent{id, stored.Zones}, func(w io.Writer) error {
		_, err := fmt.Fprintln(w, id)
		return err
	})
}

// sniff names the content type of a body for which none was given.
func sniff(body []byte) string {
	switch {
	case json.Valid(body):
		return "application/json"
	case utf8.Valid(body):
		return "text/plain; charset=utf-8"
	}
	return "application/octet-stream"
}
