package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

func (a *app) clusterCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "cluster",
		Short:   "Look at the cluster and change its members",
		GroupID: groupCluster,
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		a.clusterStatusCommand(),
		a.memberCommand("add NODE", "Admit a node that waits for admission",
			`Admits the node that was started as NODE with --join and an empty data directory: it first catches up, then
votes. Its zone must have no other node.`, `
			tercet cluster add n4
			tercet cluster add n4 --server http://127.0.0.1:7301
			tercet cluster add n4 -o json | jq -r '.nodes[].id'`,
			(*client.Client).AddMember),
		a.memberCommand("remove NODE", "Take a node out of the cluster for good",
			`Takes NODE out of the cluster. It cannot come back by itself; stop it before or after.`, `
			tercet cluster remove n2
			tercet cluster remove n2 --server http://127.0.0.1:7301
			tercet cluster remove n2 -o json`,
			(*client.Client).RemoveMember),
		a.memberCommand("replace NODE", "Replace a node whose data is lost or damaged",
			`Removes NODE as it was and admits the next one that asks under the same name. Then start the node with an
empty data directory:

  tercet server --node-id NODE … --join H:P[,H:P]

The others serve on meanwhile and send it a snapshot.`, `
			tercet cluster replace n2
			tercet cluster replace n2 --server http://127.0.0.1:7301
			tercet cluster replace n2 -o json`,
			(*client.Client).ReplaceMember),
		a.joinTokenCommand(),
		a.clusterTransferCommand(),
		a.clusterFinalizeCommand(),
		a.clusterRecoverCommand(),
	)
	return cmd
}

func (a *app) clusterStatusCommand() *cobra.Command {
	var c connection
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show members, leader, and the zones that are in sync",
		Example: examples(`
			tercet cluster status
			tercet cluster status --server http://127.0.0.1:7302
			tercet cluster status -o json | jq -r .leader`),
		Args: cobra.NoArgs,
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, _ []string) error {
			s, err := cl.Cluster(ctx)
			if err != nil {
				return err
			}
			return a.printCluster(s)
		}),
	}
	c.register(cmd)
	return cmd
}

// printCluster prints the cluster document.
func (a *app) printCluster(s wire.Cluster) error {
	return a.print(s, func(w io.Writer) error {
		leader := s.Leader
		if leader == "" {
			leader = "none"
		}
		if _, err := fmt.Fprintf(w, "cluster %s, term %d, leader %s, durability %s, feature level %d, in sync: %s\n\n",
			s.ClusterID, s.Term, leader, s.Durability, s.Level, strings.Join(s.InSync, ", ")); err != nil {
			return err
		}
		rows := [][]string{{"NODE", "ZONE", "ROLE", "IN SYNC", "LOG INDEX", "HTTP", "PEER", "DISK FREE"}}
		for _, n := range s.Nodes {
			inSync := "no"
			if n.InSync {
				inSync = "yes"
			}
			rows = append(rows, []string{
				n.ID, n.Zone, n.Role, inSync, orUnknown(n.MatchIndex != 0, strconv.FormatUint(n.MatchIndex, 10)),
				orUnknown(n.HTTP != "", n.HTTP), n.Peer, orUnknown(n.DiskFree != 0, sizeText(n.DiskFree)),
			})
		}
		return table(w, rows)
	})
}

func orUnknown(known bool, text string) string {
	if !known {
		return "-"
	}
	return text
}

// sizeText writes a size for people.
func sizeText(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d B", n)
}

// memberCommand is a command that changes the membership of one node and prints the cluster as it then is.
func (a *app) memberCommand(use, short, long, example string, change func(*client.Client, context.Context, string) (wire.Cluster, error)) *cobra.Command {
	var c connection
	cmd := &cobra.Command{
		Use:     use,
		Short:   short,
		Long:    long,
		Example: examples(example),
		Args:    cobra.ExactArgs(1),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			s, err := change(cl, ctx, args[0])
			if err != nil {
				return err
			}
			return a.printCluster(s)
		}),
	}
	c.register(cmd)
	return cmd
}

func (a *app) clusterTransferCommand() *cobra.Command {
	var c connection
	cmd := &cobra.Command{
		Use:   "transfer [NODE]",
		Short: "Hand leadership to another node",
		Long:  `Hands leadership to NODE, or to the most advanced of the others.`,
		Example: examples(`
			tercet cluster transfer
			tercet cluster transfer n3
			tercet cluster transfer n3 -o json | jq -r .leader`),
		Args: cobra.MaximumNArgs(1),
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, args []string) error {
			to := ""
			if len(args) > 0 {
				to = args[0]
			}
			s, err := cl.Transfer(ctx, to)
			if err != nil {
				return err
			}
			return a.printCluster(s)
		}),
	}
	c.register(cmd)
	return cmd
}

func (a *app) clusterFinalizeCommand() *cobra.Command {
	var c connection
	cmd := &cobra.Command{
		Use:   "finalize",
		Short: "Put what a newer release can do into use",
		Long: `Raises the cluster's feature level to what every member's release knows, after all nodes were upgraded.
Until then nothing is written that the older release does not understand, and the upgrade can be taken
back; afterwards nodes of the older release are refused. While a member is away nothing is changed.`,
		Example: examples(`
			tercet cluster finalize
			tercet cluster finalize --server http://127.0.0.1:7302
			tercet cluster finalize -o json | jq .featureLevel`),
		Args: cobra.NoArgs,
		RunE: a.withClient(&c, func(ctx context.Context, cl *client.Client, _ []string) error {
			s, err := cl.Finalize(ctx)
			if err != nil {
				return err
			}
			return a.printCluster(s)
		}),
	}
	c.register(cmd)
	return cmd
}

// recovery is what `tercet cluster recover -o json` prints.
type recovery struct {
	Node      string `json:"node"`
	ClusterID string `json:"clusterId"`
	// Committed is the last log entry known to have been committed, Last the last one there is; what lies between
	// was kept though its publishers may never have been told so.
	Committed uint64   `json:"committedIndex"`
	Last      uint64   `json:"lastIndex"`
	LastAt    string   `json:"lastAt,omitempty"`
	Lost      []string `json:"lostMembers"`
	Done      bool     `json:"done"`
}

func (a *app) clusterRecoverCommand() *cobra.Command {
	var data string
	var force bool
	cmd := &cobra.Command{
		Use:   "recover",
		Short: "Make the last surviving node a cluster of its own",
		Long: `For the case that two of three zones are gone for good. Works on the data directory of the stopped
survivor: makes it a cluster of one, with everything that it holds, under a new cluster id. Every message that was
acknowledged while this node's zone was in sync is there. The nodes of the old cluster cannot rejoin; start new
ones with --join and admit them with 'tercet cluster add'.

Without --force it only says what would happen.`,
		Example: examples(`
			tercet cluster recover --data /var/lib/tercet
			tercet cluster recover --data /var/lib/tercet --force
			tercet cluster recover --data /var/lib/tercet --force -o json`),
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if data == "" {
				return usageError{errors.New("--data is required")}
			}
			report, err := raft.Recover(data, force)
			if err != nil {
				var refusal *raft.StartError
				if errors.As(err, &refusal) {
					return codedError{exitPrecondition, err}
				}
				return err
			}
			return a.printRecovery(report, force)
		},
	}
	cmd.Flags().StringVar(&data, "data", "", "data `directory` of the stopped survivor (required)")
	cmd.Flags().BoolVar(&force, "force", false, "do it")
	return cmd
}

func (a *app) printRecovery(r raft.RecoverReport, done bool) error {
	doc := recovery{
		Node: r.Node, ClusterID: r.ClusterID, Committed: r.Applied, Last: r.Last, Lost: r.Lost, Done: done,
	}
	if doc.Lost == nil {
		doc.Lost = []string{}
	}
	if !r.At.IsZero() {
		doc.LastAt = r.At.UTC().Format(time.RFC3339Nano)
	}
	if err := a.print(doc, func(w io.Writer) error {
		fmt.Fprintf(w, "node       %s\n", doc.Node)
		fmt.Fprintf(w, "committed  up to log entry %d for certain\n", doc.Committed)
		fmt.Fprintf(w, "kept       up to log entry %d, appended %s\n", doc.Last, orUnknown(doc.LastAt != "", doc.LastAt))
		fmt.Fprintf(w, "members    that are no longer part of the cluster: %s\n", orUnknown(len(doc.Lost) > 0, strings.Join(doc.Lost, ", ")))
		_, err := fmt.Fprintf(w, "may be lost: publishes that were acknowledged with fewer zones after this node had left the in-sync set\n")
		return err
	}); err != nil {
		return err
	}
	if !done {
		return codedError{exitPrecondition, errors.New("nothing was changed; add --force to do it")}
	}
	a.note("the node is a cluster of its own now, %s; start it as before, without --peers or --join", doc.ClusterID)
	return nil
}
