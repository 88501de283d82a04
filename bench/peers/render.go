package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"tercet.dev/tercet/bench"
)

// render writes the report of a run: report.md, goals.json, and pictures.
func render(r *results, dir string, png bool) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	pictures, err := drawAll(r, dir, png)
	if err != nil {
		return err
	}
	goals := r.goals()
	text, err := json.MarshalIndent(goals, "", " ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "goals.json"), append(text, '\n'), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "report.md"), []byte(markdown(r, goals, pictures)), 0o644)
}

// picture is a file with its title.
type picture struct{ file, title string }

func markdown(r *results, goals []verdict, pictures []picture) string {
	var b strings.Builder
	say := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	m := r.Machine
	say("# Tercet beside its peers\n")
	say("Made by `%s` from %s, %s, in %s.\n", r.Command, r.Version, r.At.UTC().Format("2006-01-02 15:04 UTC"), r.Took.Round(time.Second))
	say("%d × %s, Linux %s, %s, %s. Three servers of each system on this one machine and disk, clients included; all", m.CPUs, m.CPU, m.Kernel, m.Filesystem, m.Go)
	say("systems run all the time, idle but for the one whose turn it is, and take turns line by line. Of each turn the repetition counts at")
	say("which least CPU time was lost to other programs and to the hypervisor; lines at which more than %.1f CPUs were lost are marked ⚠. Ratios are", crowded)
	say("between turns next to each other. Figures with a range are median (least … most) of the rounds.\n")

	say("## Systems\n\n| system | version | an acknowledgement means |\n|---|---|---|")
	for _, s := range r.Systems {
		version := s.Version
		if s.Skipped != "" {
			version = "**left out**: " + s.Skipped
		}
		say("| %s | %s | %s |", s.Name, cell(version), cell(s.Promise))
	}

	for _, c := range r.Closed {
		say("\n**Left out**: %s.", cell(c))
	}
	say("\n## Goals\n\n| figure | goal | measured | |\n|---|---|---|---|")
	for _, g := range goals {
		mark := "·"
		if g.Met != nil {
			if mark = "✗"; *g.Met {
				mark = "✓"
			}
		}
		say("| %s | %s | %s | %s |", cell(g.Figure), g.Goal, cell(g.Measured), mark)
	}

	say("\n## Pictures\n")
	for _, p := range pictures {
		say("![%s](%s)\n", p.title, p.file)
	}
	if k := r.Kill; k != nil {
		say("The leader %s was killed (SIGKILL) under load: %d ms without an acknowledgement by the other servers; of %s acknowledged messages %d", k.Victim,
			k.Gap.Milliseconds(), bench.FormatCount(float64(k.Balance.Acknowledged)), k.Balance.Lost)
		say("were lost, %d came twice; replicas equal: %t. `%s`\n", k.Balance.Duplicates, k.Equal, k.Command)
	}
	say("## Lines\n")
	for i := range r.Lines {
		lineTable(&b, &r.Lines[i])
	}
	if len(r.Disk) > 0 {
		say("## Disk\n\n| write | streams | mode | blocks | p50 ms | p99 ms | a stream |\n|---|---|---|---|---|---|---|")
		for _, p := range r.Disk {
			say("| %s | %d | %s | %s | %.2f | %.2f | %s/s |", bench.FormatBytes(p.Size), p.Streams, p.Mode, map[bool]string{true: "prefilled", false: "growing"}[p.Prefilled],
				millis(p.Sync.P50), millis(p.Sync.P99), bench.FormatBytes(int64(p.BytesPerSecond)))
		}
	}
	return b.String()
}

func cell(s string) string { return strings.ReplaceAll(strings.ReplaceAll(s, "|", "\\|"), "\n", " ") }

// lineTable writes a line's measurements.
func lineTable(b *strings.Builder, l *lineResult) {
	say := func(format string, args ...any) { fmt.Fprintf(b, format+"\n", args...) }
	say("### %s\n", l.Name)
	w := l.W
	shape := fmt.Sprintf("%d publishers", w.Publishers)
	if w.Window > 1 {
		shape += fmt.Sprintf(" with %d requests under way each", w.Window)
	}
	if w.Consumers > 0 {
		shape += fmt.Sprintf(", %d consumers", w.Consumers)
	}
	sizes := bench.FormatBytes(int64(w.Size))
	if len(w.Sizes) > 0 {
		sizes = "mixed sizes"
	}
	say("%s. %s, %s × %d a request.", l.Title, shape, sizes, w.Batch)
	for _, p := range l.Probes {
		say("Disk: %s: p50 %.2f ms, p99 %.2f ms, %s/s a stream.", p, millis(p.Sync.P50), millis(p.Sync.P99), bench.FormatBytes(int64(p.BytesPerSecond)))
	}
	say("")
	say("| contender | messages/s | p50 ms | p99 ms | p99.9 ms | end to end p50 / p99 ms | server CPU µs/msg (a node) | client | written per byte | lost |\n|---|---|---|---|---|---|---|---|---|---|")
	phases := []string{""}
	if l.Drain {
		phases = []string{"fill", "drain"}
	}
	var failures []string
	for _, c := range l.Contenders {
		for _, phase := range phases {
			var picked *measurement
			lost := 0.0
			for round := 1; round <= max(1, l.Rounds); round++ {
				if m := l.counted(c, round, phase); m != nil {
					lost = max(lost, m.LostCores)
					if picked == nil || m.LostCores < picked.LostCores {
						picked = m
					}
					for _, code := range slices.Sorted(maps.Keys(m.Failed)) {
						failures = append(failures, fmt.Sprintf("%s: %d × %s", c, m.Failed[code], code))
					}
				}
			}
			if picked == nil {
				continue
			}
			name := c.String()
			if phase != "" {
				name += ", " + phase
			}
			of := picked.Publish
			if picked.Workload.Publishers == 0 && picked.Receive != nil {
				of = *picked.Receive
			}
			endToEnd := ""
			if e := picked.EndToEnd; e != nil {
				endToEnd = fmt.Sprintf("%.2f / %.2f", millis(e.P50), millis(e.P99))
			}
			mark := ""
			if lost > crowded {
				mark = " ⚠"
			}
			written := ""
			if picked.WrittenPerByte > 0 {
				written = fmt.Sprintf("%.2f", picked.WrittenPerByte)
			}
			say("| %s | %s | %.2f | %.2f | %.2f | %s | %.1f (%.1f) | %.1f | %s | %.2f%s |", name,
				spreadOf(l.values(c, phase, rateOf)).text(bench.FormatCount), millis(of.P50), millis(of.P99), millis(of.P999), endToEnd,
				picked.ServerMicros, picked.NodeMicros, picked.ClientMicros, written, lost, mark)
		}
	}
	say("")
	if len(failures) > 0 {
		say("Failed requests: %s.\n", strings.Join(failures, "; "))
	}
	for _, m := range l.Measurements {
		if m.Error != "" {
			say("%s: no result: %s.\n", m.Contender, cell(m.Error))
		}
	}
}
