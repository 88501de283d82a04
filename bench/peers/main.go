// Command peers runs Tercet and other queues on this machine in turn, with the same workloads and the same promise as
// far as each can give it, and writes a report.
//
// It is a module of its own, so that neither the clients of other systems nor the library that draws the pictures are
// linked into tercet.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"tercet.dev/tercet/bench"
)

const usage = `want a command:

  report   measure everything and write the report
  core     run tercet bench for the goals of the core alone, in ten minutes
  valkey   the goals of the Valkey port, against Redis, in eight minutes
  gateway  what the gateway, the bridge and the pass-through cost, in six minutes
  queue    the figures of pushes, large messages, keys, delays, groups and topics, in six minutes
  smoke    a short run of every driver, which checks that it works and never how fast
  render   write the report again from its results.json
  list     the lines and the systems, and what is not installed`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "peers: %v\n", err)
		stop()
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	bin, dir, out   string
	lines, systems  string
	full            bool
	warmup, measure time.Duration
	rounds          int
	budget          time.Duration
	png             bool
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New(usage)
	}
	var o options
	f := flag.NewFlagSet(args[0], flag.ContinueOnError)
	f.StringVar(&o.bin, "bin", "bin", "directory of the programs: tercet, tercet-baseline, nats-server")
	f.StringVar(&o.dir, "dir", "", "directory for the servers' data, on the disk to measure (default: the temporary directory)")
	f.StringVar(&o.out, "out", "bench/report", "directory of the report")
	f.StringVar(&o.lines, "lines", "", "names of the lines, with commas (default: all)")
	f.StringVar(&o.systems, "systems", "", "names of the systems, with commas (default: all)")
	f.BoolVar(&o.full, "full", false, "the whole of it: four rounds, ten million messages for everybody")
	f.DurationVar(&o.warmup, "warmup", 0, "warm-up of each measurement (default: as listed)")
	f.DurationVar(&o.measure, "duration", 0, "duration of each measurement (default: as listed)")
	f.IntVar(&o.rounds, "rounds", 0, "rounds (default: as listed)")
	f.DurationVar(&o.budget, "budget", 32*time.Minute, "time after which crowded measurements are not repeated any more")
	f.BoolVar(&o.png, "png", false, "also write the pictures as PNG")
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("what is %q?", f.Arg(0))
	}
	switch args[0] {
	case "report":
		return report(ctx, o)
	case "core":
		return coreTable(ctx, o)
	case "valkey":
		return valkeyTable(ctx, o)
	case "gateway":
		return gatewayTable(ctx, o)
	case "queue":
		return queueTable(ctx, o)
	case "smoke":
		return smoke(ctx, o)
	case "render":
		var res results
		text, err := os.ReadFile(filepath.Join(o.out, "results.json"))
		if err != nil {
			return err
		}
		if err := json.Unmarshal(text, &res); err != nil {
			return err
		}
		return render(&res, o.out, o.png)
	case "list":
		return list(o)
	}
	return fmt.Errorf("unknown command %q; %s", args[0], usage)
}

// allSystems are the systems with the programs of a directory.
func allSystems(bin string) []system {
	program := func(name string) string {
		path, err := filepath.Abs(filepath.Join(bin, name))
		if err != nil {
			return name
		}
		return path
	}
	own, raftWAL, nats := program("tercet"), program("tercet-baseline"), program("nats-server")
	const all = "on the disks of all three zones"
	return []system{
		tercet{as: sysTercet, binary: own, valkey: true, says: "durability in-sync: " + all + ", as long as none is away"},
		tercet{as: sysRaftWAL, binary: raftWAL, says: "Tercet's engine on hashicorp/raft-wal and the stock transport: " + all},
		jetStream{as: sysAlways, binary: nats, sync: "always", says: "file streams R3, sync_interval: always: on the disks of two of three"},
		jetStream{as: sysDefault, binary: nats, says: "file streams R3, sync_interval of 2 minutes: in the memory of two of three, which promises less"},
		redis{}, rabbitMQ{},
		tercet{as: sysAll, binary: own, extra: []string{"--durability", "all"}, says: "durability all: " + all + ", or refused"},
		tercet{as: sysMajority, binary: own, extra: []string{"--bench-majority"}, says: "for comparison, nothing that can be had: on the disks of two of three"},
		tercet{as: sysSlow1, binary: own, extra: []string{"--emulate-sync", "1ms"}, says: all + ", each sync 1 ms longer"},
		tercet{as: sysSlow5, binary: own, extra: []string{"--emulate-sync", "5ms"}, says: all + ", each sync 5 ms longer"},
	}
}

// chosen applies the flags to systems and lines.
func (o options) chosen(s shape) ([]system, []line, error) {
	systems := allSystems(o.bin)
	if o.systems != "" {
		var some []system
		for _, name := range strings.Split(o.systems, ",") {
			i := -1
			for j, s := range systems {
				if s.name() == name {
					i = j
				}
			}
			if i < 0 {
				return nil, nil, fmt.Errorf("no system is named %q", name)
			}
			some = append(some, systems[i])
		}
		systems = some
	}
	if o.full {
		s.rounds, s.drain = 4, s.drainTercet
	}
	if o.warmup > 0 {
		s.warmup = o.warmup
	}
	if o.measure > 0 {
		s.duration = o.measure
	}
	if o.rounds > 0 {
		s.rounds = o.rounds
	}
	var names []string
	if o.lines != "" {
		names = strings.Split(o.lines, ",")
	}
	lines, err := selectLines(s.lines(), names, o.full)
	if err != nil {
		return nil, nil, err
	}
	for i := range lines {
		var some []contender
		for _, c := range lines[i].Contenders {
			for _, s := range systems {
				if s.name() == c.System {
					some = append(some, c)
				}
			}
		}
		lines[i].Contenders = some
	}
	return systems, lines, nil
}

func list(o options) error {
	systems, lines, err := o.chosen(reportShape)
	if err != nil {
		return err
	}
	for _, s := range systems {
		state := "ready"
		if how := s.missing(); how != "" {
			state = "not installed: " + how
		}
		fmt.Printf("%-18s %s (%s)\n", s.name(), s.promise(), state)
	}
	for _, l := range lines {
		var who []string
		for _, c := range l.Contenders {
			who = append(who, c.String())
		}
		fmt.Printf("%-18s %s: %s\n", l.Name, l.Title, strings.Join(who, ", "))
	}
	return nil
}

// measureAll runs lines.
func measureAll(ctx context.Context, o options, s shape, strict bool) (*results, error) {
	systems, lines, err := o.chosen(s)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(o.dir, "tercet-peers-")
	if err != nil {
		return nil, err
	}
	h := newHost()
	r := &runner{
		host: h, dir: dir, systems: systems, view: newView(os.Stderr), deadline: time.Now().Add(o.budget), strict: strict,
		probe: 300 * time.Millisecond, clusters: map[string]cluster{}, skipped: map[string]string{},
		results: &results{
			Command: strings.Join(append([]string{filepath.Base(os.Args[0])}, os.Args[1:]...), " "), Version: revision(ctx),
			At: time.Now(), Machine: bench.ThisMachine(dir),
		},
	}
	defer r.removeData()
	defer h.close()
	err = r.run(ctx, lines)
	r.stopAll()
	r.results.Took = time.Since(r.results.At)
	return r.results, err
}

// revision names the sources.
func revision(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "git", "describe", "--tags", "--always", "--dirty").Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// report is `peers report`.
func report(ctx context.Context, o options) error {
	res, err := measureAll(ctx, o, reportShape, false)
	if res == nil || len(res.Lines) == 0 {
		return err
	}
	if o.lines == "" && ctx.Err() == nil {
		err = errors.Join(err, killAndProbe(ctx, o, res))
	}
	return errors.Join(err, write(res, o.out), render(res, o.out, o.png))
}

// killAndProbe adds a kill of the leader and what the disk does.
func killAndProbe(ctx context.Context, o options, res *results) error {
	bin, err := filepath.Abs(o.bin)
	if err != nil {
		return err
	}
	c := &core{o: o, tercet: filepath.Join(bin, "tercet"), began: res.At}
	var kill bench.DisruptReport
	err = c.run(ctx, &kill, "publish", "--kill", "leader", "--rate", "3000")
	if kill.Victim != "" {
		res.Kill = &kill
	}
	var disk struct{ Probes []bench.ProbeResult }
	err = errors.Join(err, c.run(ctx, &disk, "disk", "--duration", "300ms"))
	res.Disk = disk.Probes
	return err
}

// write writes results.json.
func write(res *results, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(res, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "results.json"), append(text, '\n'), 0o644)
}

// smoke is `peers smoke`.
func smoke(ctx context.Context, o options) error {
	out, err := os.MkdirTemp("", "tercet-smoke-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(out)
	res, err := measureAll(ctx, o, smokeShape, true)
	if err != nil {
		return err
	}
	if err := check(res); err != nil {
		return err
	}
	if err := errors.Join(write(res, out), render(res, out, false)); err != nil {
		return err
	}
	fmt.Printf("every driver works: %d lines in %s\n", len(res.Lines), res.Took.Round(time.Second))
	return nil
}

// check looks for drivers that did not do their work.
func check(res *results) error {
	var problems []error
	left := map[string]bool{} // not installed
	for _, s := range res.Systems {
		left[s.Name] = s.Skipped != ""
	}
	for _, c := range res.Closed {
		name, _, _ := strings.Cut(c, ":")
		left[name] = true
	}
	for _, l := range res.Lines {
		done := map[contender]bool{}
		for _, m := range l.Measurements {
			who := fmt.Sprintf("%s, %s", l.Name, m.Contender)
			switch {
			case m.Error != "":
				problems = append(problems, fmt.Errorf("%s: %s", who, m.Error))
			case m.rate() <= 0:
				problems = append(problems, fmt.Errorf("%s: nothing was done", who))
			case failures(&m) > m.Messages+m.Acknowledged:
				// Some do on a machine that has no time: a server answers late, and the client has given up.
				problems = append(problems, fmt.Errorf("%s: more failures than successes: %v", who, m.Failed))
			default:
				done[m.Contender] = true
			}
		}
		for _, c := range l.Contenders {
			if !done[c] && !left[c.System] && !left[c.String()] {
				problems = append(problems, fmt.Errorf("%s, %s: no result", l.Name, c))
			}
		}
	}
	return errors.Join(problems...)
}

// failures counts failed requests.
func failures(m *measurement) (n int64) {
	for _, of := range m.Failed {
		n += of
	}
	return n
}
