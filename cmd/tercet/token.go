package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/server/auth"
	"tercet.dev/tercet/server/wire"
)

func (a *app) tokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "token",
		Short:   "Say who may publish, receive and administer",
		GroupID: groupCluster,
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.tokenCreateCommand(), a.tokenListCommand(), a.tokenRevokeCommand())
	return cmd
}

func (a *app) tokenCreateCommand() *cobra.Command {
	var c connection
	var t wire.NewToken
	var valueFile string
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "create NAME --scope SCOPE...",
		Short: "Make a token",
		Long: `Makes a token and prints it, this once: the cluster keeps its hash. A scope is publish, receive or
admin, several joined by commas, and holds for everything or, behind a colon, for a topic or a PREFIX*.

From the first token on every request needs one, so the first one has to have the scope admin. Several
tokens are good at once: to replace one, create another, change the clients, then revoke the old one.`,
		Example: examples(`
			tercet token create root --scope admin,publish,receive
			tercet token create shop --scope publish:orders-* --scope receive:bills --requests-per-second 100
			tercet token create ci --scope publish --value-file ./ci.token --ttl 720h -o json`),
		Args: cobra.ExactArgs(1),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			t.Name = args[0]
			if _, err := auth.ParseScopes(t.Scopes); err != nil {
				return usageError{fmt.Errorf("--scope: %w", err)}
			}
			if ttl < 0 {
				return usageError{fmt.Errorf("--ttl %s: want no negative time", ttl)}
			}
			if ttl > 0 {
				t.ExpiresAt = time.Now().Add(ttl).UTC().Truncate(time.Second)
			}
			// The text is made here, so that it never crosses the network but where it is used.
			secret := auth.NewSecret()
			if valueFile != "" {
				data, err := readValue(a.in, valueFile)
				if err != nil {
					return usageError{fmt.Errorf("--value-file: %w", err)}
				}
				secret = strings.TrimSpace(string(data))
			}
			hash, err := auth.HashSecret(secret)
			if err != nil {
				return usageError{err}
			}
			t.SHA256 = hash
			created, err := cl.CreateToken(ctx, t)
			if err != nil {
				return err
			}
			if valueFile == "" {
				created.Secret = secret
				a.note("the token, shown this once; present it as TERCET_TOKEN, in a --token-file, or as Authorization: Bearer TOKEN")
			}
			return a.print(created, func(w io.Writer) error {
				if created.Secret == "" {
					return nil
				}
				_, err := fmt.Fprintln(w, created.Secret)
				return err
			})
		}),
	}
	c.register(cmd)
	f := cmd.Flags()
	f.StringArrayVar(&t.Scopes, "scope", nil, "what the token may do: `ACCESS[:TOPIC]`, several times")
	f.StringVar(&valueFile, "value-file", "", "`file` with the token to use instead of a new one; - is stdin")
	f.DurationVar(&ttl, "ttl", 0, "how long the token is good (default: until it is revoked)")
	f.Float64Var(&t.Limits.RequestsPerSecond, "requests-per-second", 0, "`rate` that each node allows the token (default: any)")
	f.IntVar(&t.Limits.Burst, "burst", 0, "`number` of requests that may come at once (default: one second's worth)")
	f.Int64Var(&t.Limits.BytesPerSecond, "bytes-per-second", 0, "published `bytes` a second that each node allows (default: any)")
	f.Int64Var(&t.Limits.BytesPerDay, "bytes-per-day", 0, "published `bytes` a day, midnight to midnight UTC, that each node allows (default: any)")
	return cmd
}

// readValue reads a file, or what is there for -.
func readValue(in io.Reader, file string) ([]byte, error) {
	if file == "-" {
		return io.ReadAll(io.LimitReader(in, 64<<10))
	}
	return os.ReadFile(file)
}

func (a *app) tokenListCommand() *cobra.Command {
	var c connection
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List tokens and what they may do",
		Example: examples(`
			tercet token list
			tercet token list --server http://127.0.0.1:7301
			tercet token list -o json | jq -r '.tokens[].name'`),
		Args: cobra.NoArgs,
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, _ []string) error {
			list, err := cl.Tokens(ctx)
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) error {
				if len(list.Tokens) == 0 {
					a.note("no tokens: requests need none")
					return nil
				}
				rows := [][]string{{"NAME", "SCOPES", "SOURCE", "EXPIRES"}}
				for _, t := range list.Tokens {
					expires := "never"
					if !t.ExpiresAt.IsZero() {
						expires = t.ExpiresAt.Format(time.RFC3339)
					}
					rows = append(rows, []string{t.Name, strings.Join(t.Scopes, " "), t.Source, expires})
				}
				return table(w, rows)
			})
		}),
	}
	c.register(cmd)
	return cmd
}

func (a *app) tokenRevokeCommand() *cobra.Command {
	var c connection
	var open bool
	cmd := &cobra.Command{
		Use:   "revoke NAME...",
		Short: "End tokens",
		Long: `Ends tokens at once, on every node that is up to date. The last token that may administer the cluster
stays while there are others, and the last one of all needs --open: without any token requests are
accepted from everybody who reaches the cluster.`,
		Example: examples(`
			tercet token revoke shop
			tercet token revoke ci ci-2
			tercet token revoke root --open`),
		Args: cobra.MinimumNArgs(1),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			var failure error
			for _, name := range args {
				if err := cl.RevokeToken(ctx, name, open); err != nil {
					failure = errors.Join(failure, fmt.Errorf("%s: %w", name, err))
				}
			}
			return failure
		}),
	}
	c.register(cmd)
	cmd.Flags().BoolVar(&open, "open", false, "revoke the last token too, so that requests need none")
	return cmd
}
