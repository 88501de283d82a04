package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

// tailEvery is how often tail looks for new messages.
const tailEvery = 250 * time.Millisecond

// browsePage is how many messages are asked for at once.
const browsePage = 100

func (a *app) peekCommand() *cobra.Command {
	var c connection
	var group string
	var from uint64
	var most int
	cmd := &cobra.Command{
		Use:     "peek TOPIC",
		Short:   "Look at messages without taking them",
		GroupID: groupEveryday,
		Long: `Prints stored messages, from the oldest on, whatever any group did with them. With --group it prints
what the group would be given next. Neither changes anything: not the messages, not their delivery counts,
not the group.`,
		Example: examples(`
			tercet peek orders
			tercet peek orders --group billing --max 10
			tercet peek orders --from 1000 --max 100 -o json`),
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			switch {
			case most < 1:
				return usageError{fmt.Errorf("--max %d: want 1 or more", most)}
			case group == "":
				return a.browse(ctx, cl, args[0], from, most)
			case from != 0:
				return usageError{errors.New("--from and --group exclude each other")}
			case most > limits.ReceiveMessagesMax:
				return usageError{fmt.Errorf("--max %d: want 1 to %d with --group", most, limits.ReceiveMessagesMax)}
			}
			ds, err := cl.Receive(ctx, args[0], group, client.ReceiveOptions{Max: most, Peek: true})
			if err != nil {
				return err
			}
			messages, err := ds.All()
			if err != nil {
				return err
			}
			for _, d := range messages {
				if err := a.print(wireMessage(d), func(w io.Writer) error { return writeLine(w, d.Body) }); err != nil {
					return err
				}
			}
			if len(messages) == 0 {
				a.note("no messages")
			}
			return nil
		}),
	}
	c.register(cmd)
	f := cmd.Flags()
	f.StringVar(&group, "group", "", "consumer `group` to look for (default: none, all stored messages)")
	f.Uint64Var(&from, "from", 0, "`offset` in the topic to begin at")
	f.IntVar(&most, "max", 10, "`number` of messages to print at most")
	return cmd
}

// browse prints up to most stored messages from an offset on.
func (a *app) browse(ctx context.Context, cl *client.Client, topic string, from uint64, most int) error {
	shown := 0
	for shown < most {
		page, err := cl.Browse(ctx, topic, from, min(browsePage, most-shown))
		if err != nil {
			return err
		}
		for i := range page.Messages {
			if err := a.printStored(&page.Messages[i]); err != nil {
				return err
			}
		}
		shown += len(page.Messages)
		if page.Next == 0 {
			break
		}
		from = page.Next
	}
	if shown == 0 {
		a.note("no messages")
	}
	return nil
}

func (a *app) printStored(m *wire.BrowsedMessage) error {
	return a.print(m, func(w io.Writer) error { return writeLine(w, m.Body) })
}

func (a *app) tailCommand() *cobra.Command {
	var c connection
	var last uint64
	cmd := &cobra.Command{
		Use:     "tail TOPIC",
		Short:   "Follow a topic's messages as they are published",
		GroupID: groupEveryday,
		Long: `Prints the last messages of a topic and then each new one, until it is interrupted. It takes nothing
away from any group. The topic need not exist yet.`,
		Example: examples(`
			tercet tail orders
			tercet tail orders --last 100
			tercet tail orders -o json | jq -r .messageId`),
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			err := a.tail(ctx, cl, args[0], last)
			if errors.Is(context.Cause(ctx), errInterrupted) {
				return nil
			}
			return err
		}),
	}
	c.register(cmd)
	cmd.Flags().Uint64Var(&last, "last", 10, "`number` of stored messages to begin with")
	return cmd
}

func (a *app) tail(ctx context.Context, cl *client.Client, topic string, last uint64) error {
	from := uint64(0)
	switch t, err := cl.Topic(ctx, topic); {
	case err == nil:
		from = t.NextOffset - min(t.NextOffset, last)
	case !errors.Is(err, errs.Of(errs.TopicNotFound)):
		return err
	}
	for {
		page, err := cl.Browse(ctx, topic, from, browsePage)
		if err != nil && !errors.Is(err, errs.Of(errs.TopicNotFound)) {
			return err
		}
		for i := range page.Messages {
			m := &page.Messages[i]
			if err := a.printStored(m); err != nil {
				return err
			}
			from = m.Offset + 1
		}
		if page.Next != 0 {
			from = page.Next
			continue
		}
		if !pause(ctx, tailEvery) {
			return context.Cause(ctx)
		}
	}
}
