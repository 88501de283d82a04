// Command baseline is what Tercet's log and transport are measured against: the same engine and the same
// coalescing of commands, on hashicorp/raft with its stock TCP transport and on hashicorp/raft-wal. A publish is
// acknowledged when all three nodes have synced it, as Tercet's is.
//
// It takes the arguments of `tercet server` that `tercet bench` passes, and serves as much of the HTTP interface as
// the bench looks at. It only publishes: there are no receives, no in-sync set, and no changes of membership.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"tercet.dev/tercet/bench"
	"tercet.dev/tercet/internal/timerslack"
)

func main() {
	timerslack.Widen() // as Tercet's servers do
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "baseline: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 || args[0] != "server" {
		return errors.New("usage: baseline server --node-id n1 --data DIR --http H:P --peer H:P --peers n1=H:P,… --bench-listen H:P")
	}
	var o options
	flags := flag.NewFlagSet("server", flag.ContinueOnError)
	flags.StringVar(&o.id, "node-id", "", "name of this node")
	flags.String("zone", "", "ignored")
	flags.StringVar(&o.dir, "data", "", "data directory")
	httpAddr := flags.String("http", "", "HTTP address")
	flags.String("peer", "", "ignored: the address in --peers is used")
	peers := flags.String("peers", "", "members as n1=H:P,n2=H:P,…")
	endpoint := flags.String("bench-listen", "", "loopback address of the load generator's endpoint")
	flags.String("durability", "all", "ignored: always all")
	flags.DurationVar(&o.delay, "emulate-sync", 0, "make each sync of the log take this much longer")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	for _, item := range strings.Split(*peers, ",") {
		name, addr, ok := strings.Cut(item, "=")
		if !ok {
			return fmt.Errorf("--peers: %q", item)
		}
		o.peers = append(o.peers, peer{name, addr})
	}
	if err := os.MkdirAll(filepath.Join(o.dir, "wal"), 0o700); err != nil {
		return err
	}
	n, err := start(o)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	// Without a host: loopback, as in `tercet server`.
	addr := *httpAddr
	if strings.HasPrefix(addr, ":") {
		addr = "127.0.0.1" + addr
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return errors.Join(err, n.close())
	}
	server := &http.Server{Handler: n.handler(), ReadHeaderTimeout: 5 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(l) }()
	if *endpoint != "" {
		e, err := bench.Listen(*endpoint, n)
		if err != nil {
			return errors.Join(err, n.close())
		}
		defer e.Close()
	}
	select {
	case <-ctx.Done():
	case err = <-failed:
	case err = <-n.failed:
	}
	return errors.Join(err, server.Close(), n.close())
}
