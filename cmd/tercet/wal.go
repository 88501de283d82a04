package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/wal"
)

func (a *app) walCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "wal",
		Short:   "Read the log of a stopped node",
		GroupID: groupDiagnose,
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.walDumpCommand(), a.walVerifyCommand())
	return cmd
}

// logDirectory finds the log below a node's data directory; the log's own directory will do as well.
func logDirectory(data string) (string, error) {
	if data == "" {
		return "", usageError{errors.New("--data is required")}
	}
	if dir := filepath.Join(data, "wal"); isDirectory(dir) {
		return dir, nil
	}
	if !isDirectory(data) {
		return "", codedError{exitNotFound, fmt.Errorf("--data %s: no such directory", data)}
	}
	return data, nil
}

func isDirectory(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

// dumped is what `tercet wal dump -o json` prints for a record.
type dumped struct {
	*wal.Record
	DataBytes int `json:"data_bytes,omitempty"`
	// Entry is the head of an entry that holds commands.
	Entry *dumpedEntry `json:"entry,omitempty"`
}

type dumpedEntry struct {
	Level       uint32 `json:"level"`
	Commands    int    `json:"commands"`
	ClusterTime int64  `json:"cluster_ms"`
	WallTime    string `json:"wall"`
}

func (a *app) walDumpCommand() *cobra.Command {
	var data, kind string
	var from, to uint64
	cmd := &cobra.Command{
		Use:   "dump",
		Short: "Print the records of a stopped node's log",
		Long: `Prints every record in the order it was written: entries with index, term, time and number of commands,
votes and other stable values, truncations, and the state at the head of each segment. It changes nothing. The
contents of messages are not printed.`,
		Example: examples(`
			tercet wal dump --data /var/lib/tercet
			tercet wal dump --data /var/lib/tercet --kind entry --from 1000 --to 1010
			tercet wal dump --data tercet-data/n1 -o json | jq -r .kind | sort | uniq -c`),
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			dir, err := logDirectory(data)
			if err != nil {
				return err
			}
			return a.walError(wal.Dump(nil, dir, func(r *wal.Record) error {
				if kind != "" && r.Kind != kind || r.Index < from || to != 0 && r.Index > to {
					return nil
				}
				return a.printRecord(r)
			}))
		},
	}
	f := cmd.Flags()
	f.StringVar(&data, "data", "", "data `directory` of the stopped node (required)")
	f.StringVar(&kind, "kind", "", "print records of this `kind` only: entry, rewrite, truncate, reset, stable, commit, state or marker")
	f.Uint64Var(&from, "from", 0, "lowest `index` to print")
	f.Uint64Var(&to, "to", 0, "highest `index` to print; 0: no bound")
	return cmd
}

func (a *app) printRecord(r *wal.Record) error {
	doc := dumped{Record: r, DataBytes: len(r.Data)}
	if info, err := engine.InspectEntry(r.Data); err == nil && r.Kind == "entry" && info.Commands > 0 {
		doc.Entry = &dumpedEntry{
			Level: info.Level, Commands: info.Commands, ClusterTime: info.Stamp.Cluster,
			WallTime: time.UnixMilli(info.Stamp.Wall).UTC().Format(time.RFC3339Nano),
		}
	}
	return a.print(doc, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%8d:%-10d %-8s shard %d", r.Segment, r.Offset, r.Kind, r.Shard)
		if err != nil {
			return err
		}
		if r.Index != 0 {
			fmt.Fprintf(w, "  index %d", r.Index)
		}
		if r.Term != 0 {
			fmt.Fprintf(w, "  term %d  type %d", r.Term, r.Type)
		}
		if r.Key != "" {
			fmt.Fprintf(w, "  key %s", r.Key)
		}
		if len(r.Data) > 0 {
			fmt.Fprintf(w, "  %d bytes", len(r.Data))
		}
		if e := doc.Entry; e != nil {
			fmt.Fprintf(w, "  %d commands  %s", e.Commands, e.WallTime)
		}
		for _, s := range r.Shards {
			fmt.Fprintf(w, "  [%s]", shardText(s))
		}
		_, err = fmt.Fprintln(w)
		return err
	})
}

func shardText(s wal.ShardSummary) string {
	return fmt.Sprintf("shard %d: entries %d to %d, committed %d, stable %s", s.Shard, s.First, s.Last, s.Commit,
		orUnknown(len(s.Stable) > 0, strings.Join(s.Stable, ", ")))
}

// walError gives damage its exit code: the node would not start with it.
func (a *app) walError(err error) error {
	var damage *wal.CorruptionError
	if errors.As(err, &damage) {
		return codedError{exitPrecondition, err}
	}
	return err
}

func (a *app) walVerifyCommand() *cobra.Command {
	var data string
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Check a stopped node's log as a start would",
		Long: `Reads the whole log, checks every checksum, and tells a torn tail, which a start cuts, from damage, with
which the node does not start. It changes nothing. Exits with 4 when there is damage.`,
		Example: examples(`
			tercet wal verify --data /var/lib/tercet
			tercet wal verify --data tercet-data/n1 && echo sound
			tercet wal verify --data /var/lib/tercet -o json | jq .shards`),
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			dir, err := logDirectory(data)
			if err != nil {
				return err
			}
			report, err := wal.Verify(nil, dir)
			if err != nil {
				return err
			}
			if err := a.print(report, func(w io.Writer) error { return verifyText(w, report) }); err != nil {
				return err
			}
			if report.Corruption != nil {
				return a.walError(report.Corruption)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&data, "data", "", "data `directory` of the stopped node (required)")
	return cmd
}

func verifyText(w io.Writer, r *wal.Report) error {
	rows := [][]string{{"SEGMENT", "FILE", "BATCHES", "RECORDS", "BYTES"}}
	for _, s := range r.Segments {
		rows = append(rows, []string{fmt.Sprint(s.Segment), s.File, fmt.Sprint(s.Batches), fmt.Sprint(s.Records), fmt.Sprint(s.End)})
	}
	if err := table(w, rows); err != nil {
		return err
	}
	fmt.Fprintln(w)
	for _, s := range r.Shards {
		fmt.Fprintln(w, shardText(s))
	}
	if r.TornFile != "" {
		fmt.Fprintf(w, "torn tail: the next start cuts %s at offset %d\n", r.TornFile, r.TornOffset)
	}
	if r.Corruption == nil {
		_, err := fmt.Fprintln(w, "sound")
		return err
	}
	return nil
}
