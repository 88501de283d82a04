package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/server/wire"
)

// findFlags are the flags of a search for messages.
type findFlags struct {
	group, state, header, since, until string
	from                               uint64
	most                               int
}

func (o *findFlags) options(limit int) (b client.BrowseOptions, err error) {
	b = client.BrowseOptions{From: o.from, Limit: limit, Group: o.group, State: o.state}
	b.Header, b.Value, _ = strings.Cut(o.header, "=")
	if b.Since, err = moment("--since", o.since); err != nil {
		return b, err
	}
	b.Until, err = moment("--until", o.until)
	return b, err
}

func (o *findFlags) times(f *pflag.FlagSet, what string) {
	f.StringVar(&o.since, "since", "", what+" at this `time` or later, or so long ago (2h)")
	f.StringVar(&o.until, "until", "", what+" before this `time`, or so long ago")
	f.Uint64Var(&o.from, "from", 0, "`offset` in the topic to begin at")
	f.IntVar(&o.most, "max", 100, "`number` of messages to print at most")
}

func (a *app) messageCommand() *cobra.Command {
	var o findFlags
	var verify bool
	var delay time.Duration
	return a.noun("message", "Find messages and follow what became of them",
		a.verb("list TOPIC", "Find messages by state, time or header", "Looking changes nothing: not the messages, not their delivery counts, not the groups. States are delayed and, for a\ngroup, ready, leased, waiting, parked and acknowledged.", `
			tercet message list orders --group billing --state waiting
			tercet message list orders --state delayed
			tercet message list orders --header x-customer=17 --since 2h -o json | jq -r .messageId`, cobra.ExactArgs(1), func(f *pflag.FlagSet) {
			f.StringVar(&o.group, "group", "", "consumer `group` whose state is meant")
			f.StringVar(&o.state, "state", "", "only messages in this `state`")
			f.StringVar(&o.header, "header", "", "only messages with this header: `NAME[=VALUE]`")
			o.times(f, "published")
		}, func(ctx context.Context, cl *client.Client, args []string) error {
			return a.findMessages(ctx, cl, args[0], &o)
		}),
		a.verb("show TOPIC ID", "Tell what became of one message, group by group", "With --verify every node reads the message from its own disk, and sizes and checksums are compared; a difference, or a\nnode that does not answer, exits with 4.", `
			tercet message show orders ID
			tercet message show orders ID --verify
			tercet message show orders ID -o json | jq .groups`, cobra.ExactArgs(2), func(f *pflag.FlagSet) {
			f.BoolVar(&verify, "verify", false, "read the message from every zone and compare")
		}, func(ctx context.Context, cl *client.Client, args []string) error {
			s, err := cl.Story(ctx, args[0], args[1], verify)
			if err != nil {
				return err
			}
			if err := a.print(s, func(w io.Writer) error { return printStory(w, &s) }); err != nil {
				return err
			}
			if s.Verified != nil && !*s.Verified {
				return codedError{exitPrecondition, errors.New("not every zone holds the same bytes")}
			}
			return nil
		}),
		a.verb("cancel TOPIC ID...", "Cancel delayed messages", "Only what is not visible yet can be cancelled.", `
			tercet message cancel orders ID
			tercet message cancel orders ID1 ID2
			tercet message list orders --state delayed -o json | jq -r .messageId | xargs tercet message cancel orders`, cobra.MinimumNArgs(2), nil,
			func(ctx context.Context, cl *client.Client, args []string) error {
				return eachOf(args[1:], func(id string) error { return cl.CancelDelayed(ctx, args[0], id) })
			}),
		a.verb("move TOPIC ID...", "Make delayed messages visible at another time", "The delay counts from now; 0 makes a message visible at once. It cannot be longer than the message lives.", `
			tercet message move orders ID --delay 10m
			tercet message move orders ID --delay 0s
			tercet message move orders ID1 ID2 --delay 1h`, cobra.MinimumNArgs(2), func(f *pflag.FlagSet) {
			f.DurationVar(&delay, "delay", 0, "how long from now until the message is visible")
		}, func(ctx context.Context, cl *client.Client, args []string) error {
			if err := wholeSeconds("--delay", delay); err != nil {
				return err
			}
			return eachOf(args[1:], func(id string) error { return cl.MoveDelayed(ctx, args[0], id, delay) })
		}),
	)
}

// eachOf does something to each id, and names those for which it failed.
func eachOf(ids []string, do func(id string) error) (failure error) {
	for _, id := range ids {
		if err := do(id); err != nil {
			failure = errors.Join(failure, fmt.Errorf("%s: %w", id, err))
		}
	}
	return failure
}

// findMessages prints messages page by page.
func (a *app) findMessages(ctx context.Context, cl *client.Client, topic string, o *findFlags) error {
	shown := 0
	options, err := o.options(0)
	if err != nil {
		return err
	}
	for shown < o.most {
		options.Limit = min(browsePage, o.most-shown)
		page, err := cl.Find(ctx, topic, options)
		if err != nil {
			return err
		}
		for i := range page.Messages {
			m := &page.Messages[i]
			if err := a.print(m, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "%s  %s  %d bytes  %s\n", m.MessageID, m.Timestamp, m.Bytes, excerpt(m.Body))
				return err
			}); err != nil {
				return err
			}
		}
		shown += len(page.Messages)
		options.From, options.After = page.Next, page.After
		if page.Next == 0 && page.After == "" {
			break
		}
	}
	if shown == 0 {
		a.note("no messages")
	}
	return nil
}

// excerpt is the beginning of a body as a person can read it on one line.
func excerpt(body []byte) string {
	const most = 60
	text := strconv.Quote(string(body[:min(len(body), most)]))
	text = strings.ReplaceAll(text[1:len(text)-1], `\"`, `"`) // nothing quotes it here
	if len(body) > most {
		text += "…"
	}
	return text
}

func printStory(w io.Writer, s *wire.Story) error {
	rows := [][]string{{"message", s.MessageID}, {"topic", printable(s.Topic)}}
	add := func(name, value string) {
		if value != "" {
			rows = append(rows, []string{name, value})
		}
	}
	add("duplicate of", s.DuplicateOf)
	add("state", s.State)
	add("published", s.PublishedAt)
	add("visible", s.VisibleAt)
	add("expires", s.ExpiresAt)
	add("deployment", s.DeploymentID)
	add("content type", s.ContentType)
	add("size", strconv.FormatInt(s.Bytes, 10)+" bytes, crc32c "+s.CRC32C)
	names := make([]string, 0, len(s.Headers))
	for name := range s.Headers {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		add("header "+name, printable(s.Headers[name]))
	}
	if err := table(w, rows); err != nil {
		return err
	}
	if len(s.Groups) > 0 {
		rows = [][]string{{"\nGROUP", "STATE", "DELIVERIES", "BY", "LEASED", "UNTIL", "NEXT", "PARKED", "LAST ERROR"}}
		for _, g := range s.Groups {
			deliveries := strconv.FormatUint(uint64(g.Deliveries), 10)
			if g.State == "acknowledged" {
				deliveries = "" // an acknowledged message is a mark in its group, without a count
			}
			rows = append(rows, []string{printable(g.Group), g.State, deliveries, printable(g.Consumer), g.LeasedAt, g.LeasedUntil, g.NextAt, g.ParkedAt, g.LastError})
		}
		if err := table(w, rows); err != nil {
			return err
		}
	}
	if s.Verified != nil {
		rows = [][]string{{"\nZONE", "NODE", "BYTES", "CRC32C", "SAME"}}
		for _, z := range s.Zones {
			same := "yes"
			if !z.Same {
				same = "NO " + z.Error
			}
			rows = append(rows, []string{z.Zone, z.Node, strconv.FormatInt(z.Bytes, 10), z.CRC32C, same})
		}
		return table(w, rows)
	}
	return nil
}

// parkedFlags say which parked messages are meant.
type parkedFlags struct {
	reason, since, until string
	all, dryRun          bool
	most, rate           int
}

func (o *parkedFlags) register(f *pflag.FlagSet) {
	f.StringVar(&o.reason, "error", "", "only those whose last error contains this `text`")
	f.StringVar(&o.since, "since", "", "only those parked at this `time` or later, or so long ago (2h)")
	f.StringVar(&o.until, "until", "", "only those parked before this `time`, or so long ago")
	f.BoolVar(&o.all, "all", false, "all of them")
	f.IntVar(&o.most, "max", 0, "`number` of messages to change at most (default: all that match)")
	f.BoolVar(&o.dryRun, "dry-run", false, "only count them")
}

func (o *parkedFlags) change(ids []string) (c wire.ParkedChange, err error) {
	c = wire.ParkedChange{MessageIDs: ids, Error: o.reason, All: o.all, Max: o.most, DryRun: o.dryRun, RatePerSecond: o.rate}
	since, err := moment("--since", o.since)
	if err != nil {
		return c, err
	}
	until, err := moment("--until", o.until)
	if err != nil {
		return c, err
	}
	for _, t := range []struct {
		at  time.Time
		out *string
	}{{since, &c.Since}, {until, &c.Until}} {
		if !t.at.IsZero() {
			*t.out = t.at.UTC().Format(time.RFC3339Nano)
		}
	}
	return c, nil
}

func (a *app) parkedCommand() *cobra.Command {
	var o findFlags
	var reason string
	var redrive, drop parkedFlags
	change := func(flags *parkedFlags, done string, do func(*client.Client, context.Context, string, string, wire.ParkedChange) (wire.ParkedChanged, error)) func(context.Context, *client.Client, []string) error {
		return func(ctx context.Context, cl *client.Client, args []string) error {
			what, err := flags.change(args[2:])
			if err != nil {
				return err
			}
			n, err := do(cl, ctx, args[0], args[1], what)
			if err != nil {
				return err
			}
			return a.print(n, func(w io.Writer) error {
				if n.DryRun {
					_, err := fmt.Fprintf(w, "%d would be %s\n", n.Count, done)
					return err
				}
				_, err := fmt.Fprintf(w, "%d %s\n", n.Count, done)
				return err
			})
		}
	}
	return a.noun("parked", "Look at what groups have given up, and redrive it",
		a.verb("list TOPIC GROUP", "List what a group has given up, with the last error", "", `
			tercet parked list orders billing
			tercet parked list orders billing --error timeout --since 24h
			tercet parked list orders billing -o json | jq -r .lastError | sort | uniq -c`, cobra.ExactArgs(2), func(f *pflag.FlagSet) {
			f.StringVar(&reason, "error", "", "only those whose last error contains this `text`")
			o.times(f, "parked")
		}, func(ctx context.Context, cl *client.Client, args []string) error {
			options, err := o.options(0)
			if err != nil {
				return err
			}
			shown := 0
			for shown < o.most {
				options.Limit = min(browsePage, o.most-shown)
				page, err := cl.Parked(ctx, args[0], args[1], reason, options)
				if err != nil {
					return err
				}
				for i := range page.Messages {
					m := &page.Messages[i]
					if err := a.print(m, func(w io.Writer) error {
						_, err := fmt.Fprintf(w, "%s  parked %s after %d deliveries  %s  %s\n", m.MessageID, m.ParkedAt, m.Deliveries, printable(m.LastError), excerpt(m.Body))
						return err
					}); err != nil {
						return err
					}
				}
				shown += len(page.Messages)
				if options.From = page.Next; page.Next == 0 {
					break
				}
			}
			if shown == 0 {
				a.note("nothing is parked")
			}
			return nil
		}),
		a.verb("redrive TOPIC GROUP [ID...]", "Make parked messages deliverable again", "Which ones: those with the ids, or those that the flags select, or --all of them. Their count of deliveries goes on;\n--max-deliveries counts anew.", `
			tercet parked redrive orders billing --all --dry-run
			tercet parked redrive orders billing --error timeout --rate 50
			tercet parked redrive orders billing ID1 ID2`, cobra.MinimumNArgs(2), func(f *pflag.FlagSet) {
			redrive.register(f)
			f.IntVar(&redrive.rate, "rate", 0, "`messages` a second (default: all at once)")
		}, change(&redrive, "redriven", (*client.Client).Redrive)),
		a.verb("drop TOPIC GROUP [ID...]", "End parked messages for the group, for good", "Which ones: those with the ids, or those that the flags select, or --all of them.", `
			tercet parked drop orders billing --until 168h --dry-run
			tercet parked drop orders billing --all
			tercet parked drop orders billing ID1 ID2`, cobra.MinimumNArgs(2), drop.register, change(&drop, "dropped", (*client.Client).DropParked)),
	)
}
