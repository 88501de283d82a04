package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/wire"
)

func (a *app) subscriptionCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "subscription",
		Aliases: []string{"sub"},
		Short:   "Have messages pushed to HTTP endpoints",
		GroupID: groupEveryday,
		Long: `A subscription has the messages of a topic, or of all topics with a prefix, sent to a URL, for one
consumer group. See docs/push.md.`,
		Example: examples(`
			tercet subscription create orders --group billing --url https://app.example.com/api/queues/billing
			tercet subscription list
			tercet subscription show sub_abc`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.subscriptionCreate(), a.subscriptionList(), a.subscriptionShow(), a.subscriptionDelete(), a.subscriptionRotate(), a.subscriptionDrain())
	return cmd
}

func (a *app) subscriptionCreate() *cobra.Command {
	var c connection
	var s wire.Subscription
	var n struct{ retry, delay, concurrency, deliveries, inline, lease, timeout int64 }
	var files struct{ secret, token, cert, key, ca string }
	var flags *pflag.FlagSet
	cmd := &cobra.Command{
		Use:   "create TOPIC",
		Short: "Create a subscription, or replace the one of the same topic, group and deployment",
		Long: `Creates a subscription. TOPIC is a name, or a prefix of names followed by one *. It is in force when the
command ends; its group starts at the beginning of the topic.

A new subscription gets a random secret that its pushes are signed with (Standard Webhooks). It is printed
once, here. Secrets are read from files, so that they stand in no history.`,
		Example: examples(`
			tercet subscription create orders --group billing --url https://app.example.com/api/queues/billing
			tercet subscription create 'order-*' --group audit --url https://app.example.com/audit --max-concurrency 8
			tercet subscription create orders --group billing --url https://x.example.com/b --deployment dpl_1 -o json | jq -r .secret`),
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			s.Topic = args[0]
			for name, f := range map[string]struct {
				from *int64
				to   **int64
			}{
				"retry-after": {&n.retry, &s.RetryAfterSeconds}, "initial-delay": {&n.delay, &s.InitialDelaySeconds},
				"max-concurrency": {&n.concurrency, &s.MaxConcurrency}, "max-deliveries": {&n.deliveries, &s.MaxDeliveries},
				"inline-bytes": {&n.inline, &s.InlineBytesMax}, "lease": {&n.lease, &s.LeaseSeconds}, "answer-timeout": {&n.timeout, &s.TimeoutSeconds},
			} {
				if flags.Changed(name) {
					*f.to = f.from
				}
			}
			for _, f := range []struct {
				flag, file string
				to         *string
			}{
				{"--secret-file", files.secret, &s.Secret}, {"--bearer-token-file", files.token, &s.BearerToken}, {"--client-cert", files.cert, &s.ClientCertificate},
				{"--client-key", files.key, &s.ClientKey}, {"--endpoint-ca", files.ca, &s.CACertificate},
			} {
				if f.file == "" {
					continue
				}
				content, err := os.ReadFile(f.file)
				if err != nil {
					return fmt.Errorf("%s: %w", f.flag, err)
				}
				*f.to = strings.TrimRight(string(content), "\r\n")
			}
			out, err := cl.CreateSubscription(ctx, s, false)
			if err != nil {
				return err
			}
			return a.print(out, func(w io.Writer) error {
				if _, err := fmt.Fprintf(w, "%s %s\n", out.ID, out.Change); err != nil {
					return err
				}
				if out.Secret != "" {
					_, err := fmt.Fprintf(w, "secret %s (shown only now)\n", out.Secret)
					return err
				}
				return nil
			})
		}),
	}
	c.register(cmd)
	flags = cmd.Flags()
	flags.StringVar(&s.ConsumerGroup, "group", "", "consumer `group` (required)")
	flags.StringVar(&s.URL, "url", "", "`URL` that messages are sent to (required)")
	flags.StringVar(&s.DeploymentID, "deployment", "", "only messages of this deployment `ID`")
	flags.StringVar(&s.Type, "type", wire.PushV2Beta, "form of the requests: queue/v2beta, or queue/v1beta, which never carries the message")
	flags.Int64Var(&n.retry, "retry-after", 60, "`seconds` from a failed delivery to the next")
	flags.Int64Var(&n.delay, "initial-delay", 0, "`seconds` that messages, and the subscription itself, are held back at first")
	flags.Int64Var(&n.concurrency, "max-concurrency", 0, "`number` of messages in flight in each topic (default: no bound)")
	flags.Int64Var(&n.deliveries, "max-deliveries", 0, "`number` of deliveries after which a message is given up (default: never)")
	flags.Int64Var(&n.inline, "inline-bytes", 256<<10, "size in `bytes` up to which a message travels with its request; 0: never")
	flags.Int64Var(&n.lease, "lease", 60, "`seconds` of the lease that a push begins with")
	flags.Int64Var(&n.timeout, "answer-timeout", 1800, "`seconds` that an answer is waited for")
	flags.BoolVar(&s.Paused, "paused", false, "store the subscription and push nothing yet")
	flags.StringVar(&files.secret, "secret-file", "", "`file` with the signing secret (whsec_…) instead of a random one")
	flags.StringVar(&files.token, "bearer-token-file", "", "`file` with a token to send in the Authorization header")
	flags.StringVar(&files.cert, "client-cert", "", "PEM `file` with a certificate to present to the endpoint")
	flags.StringVar(&files.key, "client-key", "", "PEM `file` with the certificate's key")
	flags.StringVar(&files.ca, "endpoint-ca", "", "PEM `file` with the authority of the endpoint's certificate, instead of the system's")
	_ = cmd.MarkFlagRequired("group") // there is such a flag
	_ = cmd.MarkFlagRequired("url")
	return cmd
}

func (a *app) subscriptionList() *cobra.Command {
	var c connection
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the subscriptions and how their endpoints fare",
		Example: examples(`
			tercet subscription list
			tercet subscription list -o json | jq -r 'select(.state.breaker=="open") | .url'
			tercet subscription list -o json | jq -r 'select(.source=="dev") | .id'`),
		Args: cobra.NoArgs,
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, _ []string) error {
			all, err := cl.Subscriptions(ctx)
			if err != nil {
				return err
			}
			if a.output == outputJSON {
				for i := range all {
					if err := a.print(all[i], nil); err != nil {
						return err
					}
				}
				return nil
			}
			if len(all) == 0 {
				a.note("no subscriptions")
				return nil
			}
			rows := [][]string{{"ID", "TOPIC", "GROUP", "DEPLOYMENT", "STATE", "IN FLIGHT", "FAILED", "URL"}}
			for _, s := range all {
				state, inflight, failed := "?", "?", "?"
				if t := s.State; t != nil {
					state, inflight, failed = t.State, strconv.Itoa(t.Inflight), strconv.FormatUint(t.Failed, 10)
				}
				rows = append(rows, []string{s.ID, s.Topic, s.ConsumerGroup, orDash(s.DeploymentID), state, inflight, failed, s.URL})
			}
			return table(a.out, rows)
		}),
	}
	c.register(cmd)
	return cmd
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (a *app) subscriptionShow() *cobra.Command {
	var c connection
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "Show one subscription: its settings, and the state of its endpoint",
		Example: examples(`
			tercet subscription show sub_abc
			tercet subscription show sub_abc -o json | jq .state
			tercet subscription show sub_abc --server https://queue.example.com:7300`),
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			s, err := cl.Subscription(ctx, args[0])
			if err != nil {
				return err
			}
			return a.print(s, func(w io.Writer) error { return showSubscription(w, &s) })
		}),
	}
	c.register(cmd)
	return cmd
}

func showSubscription(w io.Writer, s *wire.Subscription) error {
	rows := [][]string{
		{"id", s.ID}, {"topic", s.Topic}, {"consumer group", s.ConsumerGroup}, {"deployment", orDash(s.DeploymentID)}, {"url", s.URL}, {"type", s.Type},
		{"retry after", seconds(s.RetryAfterSeconds)}, {"initial delay", seconds(s.InitialDelaySeconds)},
		{"max concurrency", bound(s.MaxConcurrency)}, {"max deliveries", bound(s.MaxDeliveries)}, {"inline up to", bound(s.InlineBytesMax) + " bytes"},
		{"lease", seconds(s.LeaseSeconds)}, {"answer within", seconds(s.TimeoutSeconds)}, {"source", orDash(s.Source)}, {"created", s.CreatedAt}, {"changed", s.ChangedAt},
	}
	add := func(name, value string) {
		if value != "" {
			rows = append(rows, []string{name, value})
		}
	}
	if t := s.State; t != nil {
		add("state", t.State)
		add("breaker", t.Breaker)
		add("open since", t.OpenSince)
		add("next probe", t.NextProbe)
		add("in flight", fmt.Sprintf("%d of %d", t.Inflight, t.Limit))
		add("topics", strconv.Itoa(t.Topics))
		add("requests", fmt.Sprintf("%d: %d answered 2xx, %d failed", t.Requests, t.Succeeded, t.Failed))
		add("last push", t.LastPushAt)
		if t.LastError != "" {
			add("last error", t.LastErrorAt+" "+t.LastError)
		}
	} else {
		add("state", "? (the leader could not be asked)")
	}
	return table(w, rows)
}

func seconds(v *int64) string {
	if v == nil {
		return "-"
	}
	return (time.Duration(*v) * time.Second).String()
}

func bound(v *int64) string {
	if v == nil {
		return "-"
	}
	return strconv.FormatInt(*v, 10)
}

func (a *app) subscriptionDelete() *cobra.Command {
	var c connection
	cmd := &cobra.Command{
		Use:   "delete ID...",
		Short: "Delete subscriptions",
		Long: `Deletes subscriptions. Their groups stay, with what they have done: a subscription that is created again goes
on where this one stopped.`,
		Example: examples(`
			tercet subscription delete sub_abc
			tercet subscription delete sub_abc sub_def
			tercet subscription list -o json | jq -r 'select(.deploymentId=="dpl_1") | .id' | xargs tercet subscription delete`),
		Args: cobra.MinimumNArgs(1),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			for _, id := range args {
				if err := cl.DeleteSubscription(ctx, id); err != nil {
					return err
				}
				a.note("deleted %s", id)
			}
			return nil
		}),
	}
	c.register(cmd)
	return cmd
}

func (a *app) subscriptionRotate() *cobra.Command {
	var c connection
	var file string
	var overlap time.Duration
	cmd := &cobra.Command{
		Use:   "rotate ID",
		Short: "Give a subscription a new signing secret",
		Long: `Gives a subscription a new signing secret and prints it. Pushes are signed with the old one as well until the
overlap is over, so that the endpoint can be changed in between.`,
		Example: examples(`
			tercet subscription rotate sub_abc
			tercet subscription rotate sub_abc --overlap 1h
			tercet subscription rotate sub_abc --overlap 0s --secret-file new.txt`),
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			if err := wholeSeconds("--overlap", overlap); err != nil {
				return err
			}
			s := int64(overlap / time.Second)
			r := wire.RotateSecret{OverlapSeconds: &s}
			if file != "" {
				content, err := os.ReadFile(file)
				if err != nil {
					return fmt.Errorf("--secret-file: %w", err)
				}
				r.Secret = string(bytes.TrimSpace(content))
			}
			out, err := cl.RotateSecret(ctx, args[0], r)
			if err != nil {
				return err
			}
			return a.print(out, func(w io.Writer) error {
				_, err := fmt.Fprintln(w, out.Secret)
				return err
			})
		}),
	}
	c.register(cmd)
	cmd.Flags().DurationVar(&overlap, "overlap", 24*time.Hour, "how long the old secret is used beside the new one")
	cmd.Flags().StringVar(&file, "secret-file", "", "`file` with the new secret (whsec_…) instead of a random one")
	return cmd
}

// errNotDrained ends a drain that found something left.
var errNotDrained = errors.New("messages of the deployment are left")

func (a *app) subscriptionDrain() *cobra.Command {
	var c connection
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "drain DEPLOYMENT",
		Short: "Say what a deployment's subscriptions have left to do",
		Long: `Prints, for each group that a subscription of the deployment feeds, how many of the deployment's messages were
never delivered and how many were delivered and not acknowledged. Exits with 4 while something is left. A
deployment is stopped without loss when nothing publishes for it any more and nothing is left.`,
		Example: examples(`
			tercet subscription drain dpl_1
			tercet subscription drain dpl_1 -o json | jq .groups
			tercet subscription drain dpl_1 --wait 10m && stop-old-deployment`),
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			until := time.Now().Add(wait)
			for {
				d, err := cl.DrainDeployment(ctx, args[0])
				if err != nil {
					return err
				}
				if !d.Drained && time.Now().Before(until) {
					if !pause(ctx, time.Second) {
						return context.Cause(ctx)
					}
					continue
				}
				err = a.print(d, func(w io.Writer) error {
					if d.Drained {
						_, err := fmt.Fprintln(w, "nothing is left")
						return err
					}
					rows := [][]string{{"TOPIC", "GROUP", "NEVER DELIVERED", "NOT ACKNOWLEDGED"}}
					for _, g := range d.Groups {
						rows = append(rows, []string{g.Topic, g.ConsumerGroup, strconv.FormatUint(g.Ready, 10), strconv.FormatUint(g.Unsettled, 10)})
					}
					return table(w, rows)
				})
				if err == nil && !d.Drained {
					err = codedError{exitPrecondition, errNotDrained}
				}
				return err
			}
		}),
	}
	c.register(cmd)
	cmd.Flags().DurationVar(&wait, "wait", 0, "how long to wait until nothing is left")
	return cmd
}

// isNotFound reports an answer that says there is no such thing.
func isNotFound(err error) bool { return errors.Is(err, errs.Of(errs.NotFound)) }
