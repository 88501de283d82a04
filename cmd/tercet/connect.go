package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/internal/certs"
	"tercet.dev/tercet/internal/client"
)

// localServers are the nodes of `tercet dev`: what the client commands talk to unless told otherwise.
var localServers = []string{"http://127.0.0.1:7301", "http://127.0.0.1:7302", "http://127.0.0.1:7303"}

// connection is the flags of every command that talks to servers.
type connection struct {
	servers       []string
	timeout       time.Duration
	tokenFile     string
	ca, cert, key string
}

func (c *connection) register(cmd *cobra.Command) {
	cmd.Flags().StringSliceVar(&c.servers, "server", localServers, "base `URLs` of nodes of the cluster (TERCET_SERVER)")
	cmd.Flags().DurationVar(&c.timeout, "timeout", 15*time.Second, "how long to try again what was refused for the moment (TERCET_TIMEOUT)")
	cmd.Flags().StringVar(&c.tokenFile, "token-file", "", "`file` with the token to present (TERCET_TOKEN_FILE; TERCET_TOKEN holds the token itself)")
	cmd.Flags().StringVar(&c.ca, "ca", "", "PEM `file` of the authorities of https servers (TERCET_CA; default: the system's)")
	cmd.Flags().StringVar(&c.cert, "cert", "", "PEM `file` with a client certificate (TERCET_CERT)")
	cmd.Flags().StringVar(&c.key, "key", "", "PEM `file` with its private key (TERCET_KEY)")
}

// token is what the client presents. It never stands on the command line, which others on the machine can read.
func (c *connection) token(getenv func(string) (string, bool)) (string, error) {
	value, set := getenv("TERCET_TOKEN")
	if c.tokenFile == "" {
		return strings.TrimSpace(value), nil
	}
	if set {
		return "", usageError{errors.New("TERCET_TOKEN and a token file are both given")}
	}
	data, err := os.ReadFile(c.tokenFile)
	if err != nil {
		return "", usageError{fmt.Errorf("--token-file: %w", err)}
	}
	return strings.TrimSpace(string(data)), nil
}

// tls is how https servers are spoken to; nil for the system's way.
func (c *connection) tls() (*tls.Config, error) {
	if c.ca == "" && c.cert == "" && c.key == "" {
		return nil, nil
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.ca != "" {
		pool, err := certs.Pool(c.ca)
		if err != nil {
			return nil, usageError{fmt.Errorf("--ca: %w", err)}
		}
		cfg.RootCAs = pool
	}
	if c.cert != "" || c.key != "" {
		pair, err := tls.LoadX509KeyPair(c.cert, c.key)
		if err != nil {
			return nil, usageError{fmt.Errorf("--cert, --key: %w", err)}
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg, nil
}

func (c *connection) open(getenv func(string) (string, bool)) (*client.Client, error) {
	if c.timeout < 0 {
		return nil, usageError{fmt.Errorf("--timeout %s: want no negative time", c.timeout)}
	}
	patience := c.timeout
	if patience == 0 {
		patience = -1 // the client's way to say never
	}
	token, err := c.token(getenv)
	if err != nil {
		return nil, err
	}
	secured, err := c.tls()
	if err != nil {
		return nil, err
	}
	cl, err := client.New(client.Options{Servers: c.servers, UserAgent: "tercet/" + version, Patience: patience, Token: token, TLS: secured})
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
		cl, err := c.open(a.getenv)
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
