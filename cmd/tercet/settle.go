package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/internal/limits"
)

// settled is what ack, release and extend print for a receipt with -o json.
type settled struct {
	ReceiptHandle string `json:"receiptHandle"`
	OK            bool   `json:"ok"`
	Error         string `json:"error,omitempty"`
}

// settleEach does the same to each receipt and ends with the first error.
func (a *app) settleEach(receipts []string, done string, settle func(receipt string) error) error {
	var failure error
	for _, receipt := range receipts {
		err := settle(receipt)
		doc := settled{ReceiptHandle: receipt, OK: err == nil}
		if err != nil {
			doc.Error = err.Error()
			if failure == nil {
				failure = err
			} else {
				a.note("tercet: %s", describe(err))
			}
		}
		if err := a.print(doc, func(w io.Writer) error {
			if !doc.OK {
				return nil
			}
			_, err := fmt.Fprintln(w, done)
			return err
		}); err != nil {
			return err
		}
	}
	return failure
}

func (a *app) ackCommand() *cobra.Command {
	var c connection
	var group string
	cmd := &cobra.Command{
		Use:     "ack TOPIC RECEIPT...",
		Short:   "Acknowledge received messages: the group is done with them",
		GroupID: groupEveryday,
		Example: examples(`
			tercet ack orders --group billing RECEIPT
			tercet receive orders --group billing -o json | jq -r .receiptHandle | xargs tercet ack orders --group billing
			tercet ack orders --group billing RECEIPT1 RECEIPT2 -o json`),
		Args: cobra.MinimumNArgs(2),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			return a.settleEach(args[1:], "acknowledged", func(receipt string) error {
				return cl.Acknowledge(ctx, args[0], group, receipt)
			})
		}),
	}
	c.register(cmd)
	cmd.Flags().StringVar(&group, "group", defaultGroup, "consumer `group` that received the messages")
	return cmd
}

func (a *app) releaseCommand() *cobra.Command {
	var c connection
	var group, reason string
	var delay time.Duration
	cmd := &cobra.Command{
		Use:     "release TOPIC RECEIPT...",
		Short:   "Give received messages back: they are delivered again, at once or later",
		GroupID: groupEveryday,
		Long: `Ends the leases. The messages are delivered again after --delay, and --reason is kept as the last
error of the message for the group (see tercet message show, tercet parked list).`,
		Example: examples(`
			tercet release orders --group billing RECEIPT
			tercet receive orders -o json | jq -r .receiptHandle | xargs tercet release orders
			tercet release orders RECEIPT --delay 5m --reason 'no stock'`),
		Args: cobra.MinimumNArgs(2),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			if delay < 0 || delay > limits.VisibilityMax {
				return usageError{fmt.Errorf("--delay %s: want 0s to %s", delay, limits.VisibilityMax)}
			}
			if err := wholeSeconds("--delay", delay); err != nil {
				return err
			}
			return a.settleEach(args[1:], "released", func(receipt string) error {
				return cl.Release(ctx, args[0], group, receipt, delay, reason)
			})
		}),
	}
	c.register(cmd)
	cmd.Flags().StringVar(&group, "group", defaultGroup, "consumer `group` that received the messages")
	cmd.Flags().DurationVar(&delay, "delay", 0, "how long until the messages are delivered again")
	cmd.Flags().StringVar(&reason, "reason", "", "why, kept with the message for people to read")
	return cmd
}

func (a *app) extendCommand() *cobra.Command {
	var c connection
	var group string
	var lease time.Duration
	cmd := &cobra.Command{
		Use:     "extend TOPIC RECEIPT...",
		Short:   "Change how long received messages stay leased",
		GroupID: groupEveryday,
		Long: `Makes the leases end --lease from now, later or earlier than before. A lease cannot outlive its
message.`,
		Example: examples(`
			tercet extend orders --group billing --lease 5m RECEIPT
			tercet extend orders --lease 10s RECEIPT
			tercet extend orders --lease 1h RECEIPT1 RECEIPT2 -o json`),
		Args: cobra.MinimumNArgs(2),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			if lease < time.Second || lease > limits.VisibilityMax {
				return usageError{fmt.Errorf("--lease %s: want 1s to %s", lease, limits.VisibilityMax)}
			}
			if err := errors.Join(wholeSeconds("--lease", lease)); err != nil {
				return usageError{err}
			}
			return a.settleEach(args[1:], fmt.Sprintf("leased for %s from now", lease), func(receipt string) error {
				return cl.Extend(ctx, args[0], group, receipt, lease)
			})
		}),
	}
	c.register(cmd)
	cmd.Flags().StringVar(&group, "group", defaultGroup, "consumer `group` that received the messages")
	cmd.Flags().DurationVar(&lease, "lease", limits.VisibilityDefault, "how long from now the messages stay leased")
	return cmd
}
