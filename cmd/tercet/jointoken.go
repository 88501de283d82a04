package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/internal/nodecert"
	"tercet.dev/tercet/server/wire"
)

func (a *app) joinTokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Give nodes the certificates they show each other",
		Long: `Nodes that show each other certificates are started with --peer-token. The founding nodes share one token,
made with --founding; every later node has one of its own, good for one certificate. Whom clients are is
another matter: see 'tercet token'.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.joinTokenCreateCommand(), a.joinTokenListCommand(), a.joinTokenRevokeCommand())
	return cmd
}

// foundingToken is what `tercet cluster token create --founding -o json` prints.
type foundingToken struct {
	Token string `json:"token"`
}

func (a *app) joinTokenCreateCommand() *cobra.Command {
	var c connection
	var founding bool
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "create NODE | create --founding",
		Short: "Make a token that a node obtains its certificate with",
		Long: `Makes the token that NODE is started with once, as --peer-token beside --join, and prints it, this once: the
cluster keeps its hash. NODE asks a member for its certificate with it; afterwards the token is used up.
Certificates are renewed by the nodes themselves.

With --founding no server is asked. The token printed is for all founding nodes of one new cluster, and
for one that begins with a single node. Whoever has it can make certificates of that cluster: keep it
from others, and delete it once the cluster is there.`,
		Example: examples(`
			tercet cluster token create --founding > founding.token && TERCET_PEER_TOKEN_FILE=founding.token tercet server --node-id n1 --data /var/lib/tercet
			tercet cluster token create n4 --server https://queue-1.example.com:7300
			tercet cluster token create n4 --ttl 10m -o json | jq -r .token`),
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case founding == (len(args) == 1):
				return usageError{errors.New("want the id of a node, or --founding")}
			case founding:
				t := foundingToken{nodecert.NewFounding(time.Now())}
				return a.print(t, func(w io.Writer) error {
					_, err := fmt.Fprintln(w, t.Token)
					return err
				})
			case ttl < 0:
				return usageError{fmt.Errorf("--ttl %s: want no negative time", ttl)}
			}
			return a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
				created, err := cl.CreateJoinToken(ctx, wire.NewJoinToken{Node: args[0], TTLSeconds: int64((ttl + time.Second - 1) / time.Second)})
				if err != nil {
					return err
				}
				a.note("for %s, once, until %s; then admit the node: tercet cluster add %s (or replace, where it was a member)",
					created.Node, created.ExpiresAt.Format(time.RFC3339), created.Node)
				return a.print(created, func(w io.Writer) error {
					_, err := fmt.Fprintln(w, created.Token)
					return err
				})
			})(cmd, args)
		},
	}
	c.register(cmd)
	cmd.Flags().BoolVar(&founding, "founding", false, "make the token of a new cluster's founding nodes")
	cmd.Flags().DurationVar(&ttl, "ttl", 0, "how long the token can be used (default 1h, at most a week)")
	return cmd
}

func (a *app) joinTokenListCommand() *cobra.Command {
	var c connection
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List join tokens, those of the last day that are of no use any more included",
		Example: examples(`
			tercet cluster token list
			tercet cluster token list --server http://127.0.0.1:7301
			tercet cluster token list -o json | jq -r '.tokens[] | select(.used | not) | .id'`),
		Args: cobra.NoArgs,
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, _ []string) error {
			list, err := cl.JoinTokens(ctx)
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) error {
				if len(list.Tokens) == 0 {
					a.note("no join tokens")
					return nil
				}
				rows := [][]string{{"ID", "NODE", "STATE", "EXPIRES"}}
				for _, t := range list.Tokens {
					state := "good"
					switch {
					case t.Used:
						state = "used"
					case time.Now().After(t.ExpiresAt):
						state = "expired"
					}
					rows = append(rows, []string{t.ID, t.Node, state, t.ExpiresAt.Format(time.RFC3339)})
				}
				return table(w, rows)
			})
		}),
	}
	c.register(cmd)
	return cmd
}

func (a *app) joinTokenRevokeCommand() *cobra.Command {
	var c connection
	cmd := &cobra.Command{
		Use:   "revoke ID...",
		Short: "End join tokens",
		Long:  `Ends join tokens by their ids. A node that has its certificate already keeps it.`,
		Example: examples(`
			tercet cluster token revoke 6f1d0c8a2b9e4475
			tercet cluster token revoke 6f1d0c8a2b9e4475 90aa1f4e7c3b2d16
			tercet cluster token list -o json | jq -r '.tokens[].id' | xargs tercet cluster token revoke`),
		Args: cobra.MinimumNArgs(1),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			var failure error
			for _, id := range args {
				if err := cl.RevokeJoinToken(ctx, id); err != nil {
					failure = errors.Join(failure, fmt.Errorf("%s: %w", id, err))
				}
			}
			return failure
		}),
	}
	c.register(cmd)
	return cmd
}
