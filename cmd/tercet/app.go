package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// app is what every command shares: the streams, the signals, and the flags of the root.
type app struct {
	in       io.Reader
	out, err io.Writer
	signals  <-chan os.Signal
	getenv   func(string) (string, bool)

	output outputFormat
}

func newApp(in io.Reader, out, err io.Writer, signals <-chan os.Signal) *app {
	return &app{in: in, out: out, err: err, signals: signals, getenv: os.LookupEnv, output: outputText}
}

// run executes one command line and returns the exit code.
func (a *app) run(args []string) int {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	root := a.root()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	if errors.Is(err, errReported) {
		return exitCode(err)
	}
	fmt.Fprintf(a.err, "tercet: %s\n", describe(err))
	if exitCode(err) == exitUsage && cmd != nil {
		fmt.Fprintf(a.err, "Try: %s --help\n", cmd.CommandPath())
	}
	return exitCode(err)
}

// The groups under which the root's help lists the commands.
const (
	groupRun      = "run"
	groupEveryday = "everyday"
	groupManage   = "manage"
	groupCluster  = "cluster"
	groupDiagnose = "diagnose"
)

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "tercet",
		Short: "A durable message queue on three nodes",
		Long: `Tercet is a durable message queue: a message is on the disks of all three zones before its
publisher is told so, and is then leased, retried and acknowledged by independent consumer groups.

Data goes to stdout, everything else to stderr. Every command takes -o json.

Exit codes: 0 ok, 1 failure, 2 usage, 3 not found, 4 precondition, 5 unavailable,
6 the outcome is not known: the request may have been carried out.`,
		Example: examples(`
			tercet dev
			tercet send orders '{"id": 1}'
			tercet receive orders --group billing --ack`),
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			return a.prepare(cmd)
		},
	}
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.CompletionOptions.HiddenDefaultCmd = true
	root.PersistentFlags().VarP(&a.output, "output", "o", "what to print: text or json (one value a line)")
	root.AddGroup(
		&cobra.Group{ID: groupRun, Title: "Run:"},
		&cobra.Group{ID: groupEveryday, Title: "Every day:"},
		&cobra.Group{ID: groupManage, Title: "Topics, groups and messages:"},
		&cobra.Group{ID: groupCluster, Title: "Cluster:"},
		&cobra.Group{ID: groupDiagnose, Title: "Diagnose:"},
	)
	root.AddCommand(
		a.devCommand(), a.serverCommand(), a.gatewayCommand(), a.bridgeCommand(),
		a.sendCommand(), a.receiveCommand(), a.ackCommand(), a.releaseCommand(), a.extendCommand(), a.peekCommand(), a.tailCommand(),
		a.topicCommand(), a.groupCommand(), a.messageCommand(), a.parkedCommand(), a.subscriptionCommand(), a.applyCommand(),
		a.clusterCommand(), a.tokenCommand(),
		a.benchCommand(),
		a.walCommand(), a.versionCommand(),
	)
	asUsage(root)
	return root
}

// prepare lays environment and configuration file under the flags that the command line did not set.
func (a *app) prepare(cmd *cobra.Command) error {
	covered := func(f *pflag.Flag) bool {
		// A script's flags for one call (--force, --max) are its own affair; what says where the servers are
		// and how a node is set up may come from the surroundings.
		return cmd.Annotations[annotationNode] != "" || cmd.InheritedFlags().Lookup(f.Name) != nil ||
			clientFlags[f.Name] && cmd.Annotations[annotationCommandLine] == ""
	}
	file := ""
	if f := cmd.Flags().Lookup("config"); f != nil {
		if err := fromEnvironment(f, a.getenv); err != nil {
			return usageError{err}
		}
		file = f.Value.String()
	}
	if err := overlay(cmd.Flags(), covered, a.getenv, file); err != nil {
		return usageError{err}
	}
	return nil
}

// annotationNode marks the commands that run nodes: all their flags may come from environment and file.
const annotationNode = "node"

// annotationCommandLine marks the commands whose flags come from the command line alone: a load test must not hit a
// cluster because a variable happens to name it.
const annotationCommandLine = "command line"

// clientFlags are those of client commands that may come from the environment.
var clientFlags = map[string]bool{"server": true, "timeout": true, "token-file": true, "ca": true, "cert": true, "key": true}

// asUsage makes wrong arguments exit with the usage code, for all commands below c.
func asUsage(c *cobra.Command) {
	if args := c.Args; args != nil {
		c.Args = func(cmd *cobra.Command, given []string) error {
			if err := args(cmd, given); err != nil {
				return usageError{err}
			}
			return nil
		}
	}
	for _, child := range c.Commands() {
		asUsage(child)
	}
}

// examples formats the example block of a help page: its lines without the source's indentation.
func examples(block string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.Trim(block, "\n")) {
		b.WriteString("  ")
		b.WriteString(strings.TrimLeft(line, "\t"))
	}
	return b.String()
}
