package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/internal/client"
)

// localServers are the nodes of `tercet dev`: what the client commands talk to unless told otherwise.
var localServers = []string{"http://127.0.0.1:7301", "http://127.0.0.1:7302", "http://127.0.0.1:7303"}

// connection is the flags of every command that talks to servers.
type connection struct {
	servers []string
	timeout time.Duration
}

func (c *connection) register(cmd *cobra.Command) {
	cmd.Flags().StringSliceVar(&c.servers, "server", localServers, "base `URLs` of nodes of the cluster (TERCET_SERVER)")
	cmd.Flags().DurationVar(&c.timeout, "timeout", 15*time.Second, "how long to try again what was refused for the moment (TERCET_TIMEOUT)")
}

func (c *connection) open() (*client.Client, error) {
	if c.timeout < 0 {
		return nil, usageError{fmt.Errorf("--timeout %s: want no negative time", c.timeout)}
	}
	patience := c.timeout
	if patience == 0 {
		patience = -1 // the client's way to say never
	}
	cl, err := client.New(client.Options{Servers: c.servers, UserAgent: "tercet/" + version, Patience: patience})
	if err != nil {
		return nil, usageError{fmt.Errorf("--server: %w", err)}
	}
	return cl, nil
}

// errInterrupted is the cause of a context that a signal ended.
var errInterrupted = errors.New("interrupted")

// interruptible returns a context that ends with a signal.
func (a *app) interruptible(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-a.signals:
			cancel(errInterrupted)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// withClient wraps what a client command does: it gets a client, and a context that ends with a signal.
func (a *app) withClient(c *connection, f func(ctx context.Context, cl *client.Client, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		cl, err := c.open()
		if err != nil {
			return err
		}
		defer cl.Close()
		ctx, cancel := a.interruptible(cmd.Context())
		defer cancel()
		return f(ctx, cl, args)
	}
}

// wholeSeconds checks a duration that travels in seconds.
func wholeSeconds(flag string, d time.Duration) error {
	if d < 0 || d%time.Second != 0 {
		return usageError{fmt.Errorf("%s %s: want whole seconds", flag, d)}
	}
	return nil
}
