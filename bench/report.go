package bench

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// Report is everything that one measurement says.
type Report struct {
	// Command is the command line that made it.
	Command string    `json:"command,omitempty"`
	Variant string    `json:"variant"`
	Version string    `json:"version,omitempty"`
	At      time.Time `json:"at"`
	Machine Machine   `json:"machine"`
	// Via is where the publishers are.
	Via        Via      `json:"via"`
	Durability string   `json:"durability"`
	InSync     []string `json:"inSync"`
	Nodes      int      `json:"nodes"`
	Leader     string   `json:"leader"`
	// EmulatedSync is what was added to each sync, of the servers and of the probes.
	EmulatedSync time.Duration `json:"emulatedSync,omitempty"`
	Workload     Workload      `json:"workload"`
	Result       *Result       `json:"result"`

	Latency            Percentiles  `json:"latency"`
	ReceiveLatency     *Percentiles `json:"receiveLatency,omitempty"`
	AcknowledgeLatency *Percentiles `json:"acknowledgeLatency,omitempty"`
	EndToEndLatency    *Percentiles `json:"endToEndLatency,omitempty"`
	// Rates, per second. BytesPerSecond counts bodies.
	MessagesPerSecond     float64 `json:"messagesPerSecond"`
	BytesPerSecond        float64 `json:"bytesPerSecond"`
	AcknowledgedPerSecond float64 `json:"acknowledgedPerSecond,omitempty"`

	// Counters are what each server counted. The rest is the leader's: bytes, raft entries and messages per sync,
	// and the mean time of one.
	Counters        map[string]Counters `json:"counters,omitempty"`
	SyncBytes       int64               `json:"syncBytes,omitempty"`
	EntriesPerSync  float64             `json:"entriesPerSync,omitempty"`
	MessagesPerSync float64             `json:"messagesPerSync,omitempty"`
	SyncMeanMicros  float64             `json:"syncMeanUs,omitempty"`

	// CPU is nil for servers elsewhere. The per-message figures are microseconds of CPU time: of all servers
	// together, of one node on average, and of the client. With publishers in the leader's process their own cost is
	// among the servers'.
	CPU                    *CPUReport `json:"cpu,omitempty"`
	ServerMicrosPerMessage float64    `json:"serverUsPerMessage,omitempty"`
	NodeMicrosPerMessage   float64    `json:"nodeUsPerMessage,omitempty"`
	ClientMicrosPerMessage float64    `json:"clientUsPerMessage,omitempty"`
	// WrittenPerByte is what one node had written to disk per byte of body, on average.
	WrittenPerByte float64 `json:"writtenPerByte,omitempty"`
	// LogPerByte is what the leader synced to its log per byte of body: the part of WrittenPerByte that is in the
	// way of an acknowledgement.
	LogPerByte float64 `json:"logPerByte,omitempty"`

	// Probes are in the order in which they were made: one block by one stream, before; then the size of the
	// leader's average sync, by one stream and by three.
	Probes []ProbeResult `json:"probes,omitempty"`
	// OfRaw is the rate of bodies as a share of what each of the three probe streams wrote.
	OfRaw float64 `json:"ofRaw,omitempty"`
	// AboveSync is how much longer the median publish took than the median sync of one block; negative if shorter.
	AboveSyncMicros int64 `json:"aboveSyncUs"`
}

// finish computes what follows from the measured parts.
func (r *Report) finish() {
	res := r.Result
	r.Latency = res.Publish.Percentiles()
	r.MessagesPerSecond = res.MessagesPerSecond()
	r.BytesPerSecond = perSecond(res.Bytes, res.Elapsed)
	if r.Workload.Consumers > 0 {
		receive, acknowledge := res.Receive.Percentiles(), res.Acknowledge.Percentiles()
		r.ReceiveLatency, r.AcknowledgeLatency = &receive, &acknowledge
		r.AcknowledgedPerSecond = perSecond(res.Acknowledged, res.Elapsed)
	}
	if r.Workload.Timed {
		endToEnd := res.EndToEnd.Percentiles()
		r.EndToEndLatency = &endToEnd
	}
	messages := float64(res.Messages)
	if r.Workload.Publishers == 0 {
		messages = float64(res.Acknowledged)
	}
	body := float64(res.Bytes)
	if c := r.Counters[r.Leader]; c.Syncs > 0 {
		r.EntriesPerSync = c.Applied / c.Syncs
		r.MessagesPerSync = messages / c.Syncs
		r.SyncMeanMicros = c.SyncSeconds / c.Syncs * 1e6
		if body > 0 {
			r.LogPerByte = c.SyncBytes / body
		}
	}
	if r.CPU != nil && messages > 0 {
		r.ServerMicrosPerMessage = micros(r.CPU.Servers()) / messages
		r.NodeMicrosPerMessage = r.ServerMicrosPerMessage / float64(max(1, len(r.CPU.Processes)))
		r.ClientMicrosPerMessage = micros(r.CPU.Client.CPU()) / messages
		var written int64
		for _, u := range r.CPU.Processes {
			written += u.Written
		}
		if body > 0 {
			r.WrittenPerByte = float64(written) / float64(len(r.CPU.Processes)) / body
		}
	}
	for i, p := range r.Probes {
		if p.Streams == 3 && p.BytesPerSecond > 0 {
			r.OfRaw = r.BytesPerSecond / p.BytesPerSecond
		}
		if i == 0 && r.Latency.Count > 0 {
			r.AboveSyncMicros = r.Latency.P50 - p.Sync.P50
		}
	}
}

// crowded is the number of CPUs lost to others above which a report says so: figures differ severalfold then.
const crowded = 0.6

// Text writes the report for people.
func (r *Report) Text(w io.Writer) error {
	var b strings.Builder
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-10s  "+format+"\n", append([]any{name}, args...)...)
	}
	r.heading(row)
	if r.Workload.Publishers > 0 {
		row("published", "%s messages at %s a second, %s/s of bodies", FormatCount(float64(r.Result.Messages)),
			FormatCount(r.MessagesPerSecond), FormatBytes(int64(r.BytesPerSecond)))
		row("", "%s", latencies(r.Latency))
		row("zones", "%s", zonesText(r.Result.Zones))
	}
	if r.Workload.Consumers > 0 {
		row("consumed", "%s received, %s acknowledged at %s a second", FormatCount(float64(r.Result.Received)),
			FormatCount(float64(r.Result.Acknowledged)), FormatCount(r.AcknowledgedPerSecond))
		row("receive", "%s", latencies(*r.ReceiveLatency))
		row("ack", "%s", latencies(*r.AcknowledgeLatency))
	}
	if r.EndToEndLatency != nil {
		row("end to end", "%s", latencies(*r.EndToEndLatency))
	}
	if len(r.Result.Failed) > 0 {
		row("failed", "%s", failuresText(r.Result.Failed))
	}
	if r.EntriesPerSync > 0 {
		row("log", "%s per sync, %.1f entries, %.1f messages; a sync took %s ms on average; %.2f bytes per byte", FormatBytes(r.SyncBytes),
			r.EntriesPerSync, r.MessagesPerSync, formatMillis(int64(r.SyncMeanMicros)), r.LogPerByte)
	}
	r.cpuRows(row)
	for _, p := range r.Probes {
		row("disk", "%s: sync p50 %s ms, p99 %s ms; %s/s a stream", p, formatMillis(p.Sync.P50), formatMillis(p.Sync.P99),
			FormatBytes(int64(p.BytesPerSecond)))
	}
	if r.OfRaw > 0 {
		row("of raw", "%.0f %% of what each of three raw streams writes at that size", 100*r.OfRaw)
	}
	if len(r.Probes) > 0 && r.Latency.Count > 0 {
		row("above sync", "the median publish took %+.2f ms more than one sync of %s", float64(r.AboveSyncMicros)/1000,
			FormatBytes(r.Probes[0].Size))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (r *Report) heading(row func(name, format string, args ...any)) {
	if r.Command != "" {
		row("command", "%s", r.Command)
	}
	m, l := r.Machine, r.Workload
	row("variant", "%s %s; %s, raft %s, pebble %s", r.Variant, r.Version, m.Go, m.Raft, m.Pebble)
	row("machine", "%d × %s, Linux %s, %s; %s", m.CPUs, m.CPU, m.Kernel, m.Filesystem, r.At.UTC().Format(time.RFC3339))
	loop := "closed loop"
	if l.Rate > 0 {
		loop = "open loop at " + FormatCount(l.Rate) + " messages a second"
	}
	end := l.Duration.String() + " after " + l.Warmup.String()
	if l.Messages > 0 {
		end = FormatCount(float64(l.Messages)) + " messages"
	}
	row("load", "%d publishers via %s%s, %s × %d a request, %d consumers%s; %s; %s", l.Publishers, r.Via, several(l.Window, "requests each"),
		sizesText(&l), l.Batch, l.Consumers, several(l.Topics, "topics")+several(l.Groups, "groups"), loop, end)
	durability := r.Durability
	if l.AllZones {
		durability = "all, asked for with each publish"
	}
	row("durability", "%s; in sync: %s; retention %s", durability, strings.Join(r.InSync, ", "), l.Retention)
	if r.EmulatedSync > 0 {
		row("emulated", "every sync takes %s more", r.EmulatedSync)
	}
}

// several names a number that is more than one.
func several(n int, of string) string {
	if n <= 1 {
		return ""
	}
	return fmt.Sprintf(", %d %s", n, of)
}

// sizesText names the lengths of a workload's bodies.
func sizesText(w *Workload) string {
	var parts []string
	for _, size := range w.sizes() {
		parts = append(parts, FormatBytes(int64(size)))
	}
	return strings.Join(parts, "/")
}

func (r *Report) cpuRows(row func(name, format string, args ...any)) {
	if r.CPU == nil {
		return
	}
	included := ""
	if r.Via == ViaLeader {
		included = ", publishers included"
	}
	var parts []string
	for _, id := range slices.Sorted(maps.Keys(r.CPU.Processes)) {
		role := ""
		if id == r.Leader {
			role = " (leader" + included + ")"
		}
		parts = append(parts, fmt.Sprintf("%s%s %.2f s", id, role, r.CPU.Processes[id].CPU().Seconds()))
	}
	row("cpu", "%s, client %.2f s", strings.Join(parts, ", "), r.CPU.Client.CPU().Seconds())
	row("", "%.1f µs a message on all servers, %.1f on one node, %.1f in the client; %.2f bytes written by a node per byte",
		r.ServerMicrosPerMessage, r.NodeMicrosPerMessage, r.ClientMicrosPerMessage, r.WrittenPerByte)
	note := ""
	if r.CPU.LostCores() > crowded {
		note = ": too much for the other figures to mean a lot, repeat it"
	}
	row("lost", "%.2f CPUs to other programs, %.2f to the hypervisor%s", r.CPU.Others.Seconds()/r.CPU.Elapsed.Seconds(),
		r.CPU.Stolen.Seconds()/r.CPU.Elapsed.Seconds(), note)
}

func latencies(p Percentiles) string {
	return fmt.Sprintf("p50 %s, p90 %s, p99 %s, p99.9 %s, max %s ms", formatMillis(p.P50), formatMillis(p.P90),
		formatMillis(p.P99), formatMillis(p.P999), formatMillis(p.Max))
}

func zonesText(zones map[int]int64) string {
	var parts []string
	for _, n := range slices.Sorted(maps.Keys(zones)) {
		name := fmt.Sprintf("held by %d", n)
		if n < 0 {
			name = "not told"
		}
		parts = append(parts, fmt.Sprintf("%s requests %s", FormatCount(float64(zones[n])), name))
	}
	return strings.Join(parts, ", ")
}

func failuresText(failed map[string]int64) string {
	var parts []string
	for _, code := range slices.Sorted(maps.Keys(failed)) {
		parts = append(parts, fmt.Sprintf("%s %s", FormatCount(float64(failed[code])), code))
	}
	return strings.Join(parts, ", ")
}

// Pair compares two measurements of the same workload that were made one after the other.
type Pair struct {
	// Of are the variants.
	Of [2]string `json:"of"`
	// Throughput, P50, P99 and CPU (of all servers per message) are the first's figure over the second's.
	Throughput float64 `json:"throughput"`
	P50        float64 `json:"p50"`
	P99        float64 `json:"p99"`
	CPU        float64 `json:"cpu"`
}

// Compare divides a's figures by b's.
func Compare(a, b *Report) Pair {
	over := func(x, y float64) float64 {
		if y == 0 {
			return 0
		}
		return x / y
	}
	return Pair{
		Of:         [2]string{a.Variant, b.Variant},
		Throughput: over(a.MessagesPerSecond, b.MessagesPerSecond),
		P50:        over(float64(a.Latency.P50), float64(b.Latency.P50)),
		P99:        over(float64(a.Latency.P99), float64(b.Latency.P99)),
		CPU:        over(a.ServerMicrosPerMessage, b.ServerMicrosPerMessage),
	}
}

// String writes the pair as one line.
func (p Pair) String() string {
	return fmt.Sprintf("%s / %s: throughput %.2f, p50 %.2f, p99 %.2f, CPU per message %.2f", p.Of[0], p.Of[1],
		p.Throughput, p.P50, p.P99, p.CPU)
}
