package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/cmd/tercet/internal/local"
)

// devOptions are the flags of `tercet dev`.
type devOptions struct {
	data               string
	httpPort, peerPort int
	valkeyPort         int
	valkeyMode         string
	upstream           string
	upstreamExcept     []string
	virtualClock       bool
	durability         string
	app, vercelJSON    string
	deployment         string
}

// The ports of the local cluster's first node.
const (
	devHTTPPort = 7301
	devPeerPort = 7401

	devValkeyPort = 6379
)

func (a *app) devCommand() *cobra.Command {
	var o devOptions
	cmd := &cobra.Command{
		Use:     "dev",
		Short:   "Run three nodes on this machine",
		GroupID: groupRun,
		Long: `Runs a cluster of three nodes on this machine, one child process per zone a, b and c, on 127.0.0.1
and ::1. Says when all zones are in sync, starts a node again 2 seconds after it died, and stops all of
them on Ctrl-C. The data stays; the next run goes on with it.

With --app, messages are pushed to an application on this machine: each function that the vercel.json gives a
queue trigger gets the messages of its topic, at the route that Next.js or Vercel serve it under.`,
		Example: examples(`
			tercet dev
			tercet dev --app http://localhost:3000 --vercel-json ./vercel.json
			tercet dev --data /tmp/second --http-port 7311 --peer-port 7411
			tercet dev -o json | jq -r '.nodes[].http'`),
		Args:        cobra.NoArgs,
		Annotations: map[string]string{annotationNode: "all"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.dev(cmd.Context(), o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.data, "data", "tercet-data", "`directory` for the nodes' data and logs")
	f.IntVar(&o.httpPort, "http-port", devHTTPPort, "HTTP `port` of node 1; nodes 2 and 3 count up")
	f.IntVar(&o.peerPort, "peer-port", devPeerPort, "node-to-node `port` of node 1; nodes 2 and 3 count up")
	f.IntVar(&o.valkeyPort, "valkey-port", devValkeyPort, "Valkey `port` of node 1; nodes 2 and 3 count up; 0 for none")
	f.StringVar(&o.upstream, "upstream", "", "`address` of a real server that answers Valkey clients for all keys but --upstream-except")
	f.StringSliceVar(&o.upstreamExcept, "upstream-except", nil, "`patterns` of the keys whose streams Tercet keeps in spite of --upstream")
	f.StringVar(&o.valkeyMode, "valkey-mode", "standalone", "what Valkey clients see: standalone or cluster")
	f.StringVar(&o.durability, "durability", "in-sync", "what a publish waits for: in-sync or all zones")
	f.StringVar(&o.app, "app", "", "base `URL` of the application that messages are pushed to, as its --vercel-json says")
	f.StringVar(&o.vercelJSON, "vercel-json", "vercel.json", "`file` with the application's queue triggers; read again when it changes")
	f.StringVar(&o.deployment, "deployment-id", "", "push only messages of this deployment `ID`")
	f.BoolVar(&o.virtualClock, "virtual-clock", false, "let POST /v1/clock/advance move the cluster's time, for tests")
	return cmd
}

// devDocument is what `tercet dev -o json` prints once all zones are in sync.
type devDocument struct {
	Data   string    `json:"data"`
	Leader string    `json:"leader"`
	InSync []string  `json:"inSync"`
	Nodes  []devNode `json:"nodes"`
}

type devNode struct {
	ID   string `json:"id"`
	Zone string `json:"zone"`
	Pid  int    `json:"pid"`
	HTTP string `json:"http"`
	Peer string `json:"peer"`
	// Valkey is empty when there is no such port.
	Valkey string `json:"valkey,omitempty"`
	Log    string `json:"log"`
}

func (a *app) dev(ctx context.Context, o devOptions) error {
	for flag, port := range map[string]int{"--http-port": o.httpPort, "--peer-port": o.peerPort} {
		if port < 1 || port > 65533 {
			return usageError{fmt.Errorf("%s %d: want a port from 1 to 65533", flag, port)}
		}
	}
	if o.valkeyPort < 0 || o.valkeyPort > 65533 {
		return usageError{fmt.Errorf("--valkey-port %d: want a port from 1 to 65533, or 0 for none", o.valkeyPort)}
	}
	if o.valkeyMode != "standalone" && o.valkeyMode != "cluster" {
		return usageError{fmt.Errorf("--valkey-mode %q: want standalone or cluster", o.valkeyMode)}
	}
	if o.durability != "in-sync" && o.durability != "all" {
		return usageError{fmt.Errorf("--durability %q: want in-sync or all", o.durability)}
	}
	binary, err := os.Executable()
	if err != nil {
		return err
	}
	if err := o.checkApp(); err != nil {
		return usageError{err}
	}
	args := []string{"--durability", o.durability, "--valkey-mode", o.valkeyMode, "--flush-allowed", "--push-allow", "127.0.0.0/8,::1/128"}
	var env []string
	if o.upstream != "" || len(o.upstreamExcept) > 0 {
		// The address may hold a password, and everybody on the machine can read command lines.
		env = append(env, "TERCET_UPSTREAM="+o.upstream)
		args = append(args, "--upstream-except", strings.Join(o.upstreamExcept, ","))
	}
	if o.virtualClock {
		args = append(args, "--virtual-clock")
	}
	cluster, err := local.Start(local.Options{
		Binary: binary, Data: o.data, HTTPPort: o.httpPort, PeerPort: o.peerPort, ValkeyPort: o.valkeyPort, Restart: true,
		Args:   func(int) []string { return args },
		Env:    env,
		Notice: func(line string) { a.note("%s", line) },
	})
	if err != nil {
		return fromLocal(err)
	}
	defer cluster.Stop()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var following sync.WaitGroup
	defer following.Wait()
	defer cancel()
	ready := make(chan error, 1)
	go func() {
		s, err := cluster.WaitInSync(ctx)
		if err == nil {
			err = a.printDev(cluster, o, s)
		}
		ready <- err
	}()
	slow := time.NewTicker(10 * time.Second)
	defer slow.Stop()
	for {
		select {
		case err := <-ready:
			if err != nil {
				return fromLocal(err)
			}
			ready = nil
			slow.Stop()
			if o.app != "" {
				following.Go(func() { a.followVercel(ctx, cluster, o) })
			}
		case err := <-cluster.Failed():
			return fromLocal(err)
		case <-slow.C:
			a.note("still waiting for all zones to come in sync; the logs are in %s", o.data)
		case <-a.signals:
			a.note("stopping; press Ctrl-C again to kill the nodes")
			cancel()
			following.Wait()
			return a.stopDev(cluster)
		}
	}
}

// stopDev drains the nodes, or kills them at a second signal.
func (a *app) stopDev(cluster *local.Cluster) error {
	stopped := make(chan struct{})
	go func() { cluster.Stop(); close(stopped) }()
	select {
	case <-stopped:
		a.note("stopped")
		return nil
	case <-a.signals:
		cluster.Kill()
		<-stopped
		return errors.New("killed; nothing is lost by that")
	}
}

// fromLocal gives an error of the local cluster its exit code.
func fromLocal(err error) error {
	var port *local.PortError
	if errors.As(err, &port) {
		return codedError{exitPrecondition, err}
	}
	var exit *local.ExitError
	if errors.As(err, &exit) && exit.Code > 0 {
		return codedError{exit.Code, err}
	}
	return err
}

func (a *app) printDev(cluster *local.Cluster, o devOptions, s local.Status) error {
	doc := devDocument{Data: o.data, Leader: s.Leader, InSync: s.InSync}
	pids := cluster.Pids()
	leaderPid := 0
	for i, n := range cluster.Nodes {
		doc.Nodes = append(doc.Nodes, devNode{n.ID, n.Zone, pids[i], n.HTTP, n.Peer, n.Valkey, n.LogFile})
		if n.ID == s.Leader {
			leaderPid = pids[i]
		}
	}
	return a.print(doc, func(w io.Writer) error {
		rows := [][]string{{"NODE", "ZONE", "PID", "HTTP", "PEER", "VALKEY", "LOG"}}
		for _, n := range doc.Nodes {
			rows = append(rows, []string{n.ID, n.Zone, strconv.Itoa(n.Pid), n.HTTP, n.Peer, n.Valkey, n.Log})
		}
		if err := table(w, rows); err != nil {
			return err
		}
		self, server := os.Args[0], ""
		if filepath.Base(self) == self {
			self = "tercet"
		}
		if o.httpPort != devHTTPPort {
			server = fmt.Sprintf(" --server %s,%s", cluster.Nodes[1].HTTP, cluster.Nodes[2].HTTP)
		}
		_, err := fmt.Fprintf(w, `
Zones %s are in sync, node %s leads. Try, in another terminal:

  %s send orders '{"id": 1}'%s
  kill -9 %d      # the leader; send again meanwhile, it comes back after %s
  %s receive orders --group billing --ack%s

Ctrl-C stops all three; the data stays in %s.
`, strings.Join(s.InSync, ", "), s.Leader, self, server, leaderPid, "2 s", self, server, o.data)
		return err
	})
}
