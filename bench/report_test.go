package bench

import (
	"encoding/json"
	"errors"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/internal/errs"
)

func TestParseMetrics(t *testing.T) {
	page := "# HELP a_total x\n# TYPE a_total counter\na_total 5\nb{le=\"} 9\"} 2.5 1700000000\nb{le=\"2\"} 1e3\na_total_more 7\n\nc NaN\n"
	got, err := parseMetrics(strings.NewReader(page), "a_total", "b", "missing")
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got["a_total"] != 5 || got["b"] != 1002.5 {
		t.Errorf("got %v", got)
	}
	if _, err := parseMetrics(strings.NewReader("a x\n"), "a"); err == nil {
		t.Error("a value that is no number was accepted")
	}
}

func TestCountersSince(t *testing.T) {
	earlier := map[string]Counters{"n1": {Syncs: 1, SyncBytes: 10, Applied: 3}, "n2": {Syncs: 5}}
	now := map[string]Counters{"n1": {Syncs: 4, SyncBytes: 100, SyncSeconds: 2, Applied: 9}, "n3": {Syncs: 5}}
	got := countersSince(now, earlier)
	if want := (Counters{Syncs: 3, SyncBytes: 90, SyncSeconds: 2, Applied: 6}); len(got) != 1 || got["n1"] != want {
		t.Errorf("got %+v", got)
	}
}

func TestFilesystemOf(t *testing.T) {
	mounts := "/dev/a / ext4 rw 0 0\nproc /proc proc rw 0 0\n/dev/b /data xfs rw 0 0\n/dev/c /data/x tmpfs rw 0 0\n"
	for dir, want := range map[string]string{
		"/": "ext4", "/tmp/x": "ext4", "/data": "xfs", "/data/y": "xfs", "/data/x": "tmpfs", "/data/xy": "xfs", "/database": "ext4",
	} {
		if got := filesystemOf(mounts, dir); got != want {
			t.Errorf("%s: %s, want %s", dir, got, want)
		}
	}
}

func TestCPUModel(t *testing.T) {
	if got := cpuModel("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: Other\n"); got != "Some CPU @ 2 GHz" {
		t.Errorf("got %q", got)
	}
}

func TestFormat(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 4096: "4 KiB", 1536: "1.5 KiB", 3 << 30: "3 GiB"} {
		if got := FormatBytes(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
	for n, want := range map[float64]string{0: "0", 999: "999", 1000: "1 000", 1234567.4: "1 234 567", -12345: "-12 345"} {
		if got := FormatCount(n); got != want {
			t.Errorf("%g: %q, want %q", n, got, want)
		}
	}
	for us, want := range map[int64]string{4: "0.00", 1234: "1.23", 12345: "12.3", 123456: "123"} {
		if got := formatMillis(us); got != want {
			t.Errorf("%d: %q, want %q", us, got, want)
		}
	}
}

// sample is a report of 1000 messages of 1000 bytes in 2 s.
func sample() *Report {
	w := Workload{Topic: "t", Publishers: 10, Size: 1000, Batch: 1, Warmup: time.Second, Duration: 2 * time.Second, Retention: time.Minute}
	res := &Result{
		Elapsed: 2 * time.Second, Messages: 1000, Bytes: 1_000_000, Requests: 1000, Zones: map[int]int64{3: 990, 2: 10},
		Failed: map[string]int64{"overloaded": 4}, Publish: NewHistogram(), Receive: NewHistogram(), Acknowledge: NewHistogram(),
	}
	for range 1000 {
		res.Publish.Record(700 * time.Microsecond)
	}
	return &Report{
		Command: "tercet bench publish", Variant: "tercet", Via: "leader", Leader: "n2", Durability: "in-sync", InSync: []string{"a", "b", "c"},
		Workload: w, Result: res, SyncBytes: 8192,
		Counters: map[string]Counters{"n2": {Syncs: 250, SyncSeconds: 0.1, SyncBytes: 2_048_000, Applied: 500}},
		CPU: &CPUReport{
			Elapsed: 2 * time.Second, Stolen: 100 * time.Millisecond, Others: 1400 * time.Millisecond,
			Processes: map[string]ProcessUsage{
				"n1": {User: 10 * time.Millisecond, Written: 2_000_000}, "n2": {User: 20 * time.Millisecond, System: 10 * time.Millisecond, Written: 2_000_000},
				"n3": {System: 20 * time.Millisecond, Written: 2_000_000},
			},
			Client: ProcessUsage{User: 5 * time.Millisecond},
		},
		Probes: []ProbeResult{
			{Mode: "direct", Prefilled: true, Size: 4096, Streams: 1, Sync: Percentiles{P50: 300}, BytesPerSecond: 4e6},
			{Mode: "direct", Prefilled: true, Size: 8192, Streams: 1, Sync: Percentiles{P50: 310}, BytesPerSecond: 8e6},
			{Mode: "direct", Prefilled: true, Size: 8192, Streams: 3, Sync: Percentiles{P50: 500}, BytesPerSecond: 1e6},
		},
	}
}

func TestReport(t *testing.T) {
	r := sample()
	r.finish()
	near := func(name string, got, want float64) {
		t.Helper()
		if math.Abs(got-want) > 1e-9 {
			t.Errorf("%s is %g, want %g", name, got, want)
		}
	}
	near("messages a second", r.MessagesPerSecond, 500)
	near("bytes a second", r.BytesPerSecond, 500_000)
	near("entries per sync", r.EntriesPerSync, 2)
	near("messages per sync", r.MessagesPerSync, 4)
	near("mean sync", r.SyncMeanMicros, 400)
	near("CPU of the servers", r.ServerMicrosPerMessage, 60)
	near("CPU of a node", r.NodeMicrosPerMessage, 20)
	near("CPU of the client", r.ClientMicrosPerMessage, 5)
	near("bytes written", r.WrittenPerByte, 2)
	near("bytes in the log", r.LogPerByte, 2.048)
	near("share of raw", r.OfRaw, 0.5)
	near("above sync", float64(r.AboveSyncMicros), 400)
	var b strings.Builder
	if err := r.Text(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "report.txt", b.String())

	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	if back.Latency != r.Latency || back.Result.Publish.Percentiles() != r.Latency || back.OfRaw != r.OfRaw {
		t.Errorf("after JSON: %+v", back)
	}
}

func TestCompare(t *testing.T) {
	a, b := sample(), sample()
	a.finish()
	b.Result.Messages /= 2
	b.finish()
	b.Variant = "other"
	if got := Compare(a, b).String(); got != "tercet / other: throughput 2.00, p50 1.00, p99 1.00, CPU per message 0.50" {
		t.Error(got)
	}
}

func TestSpaceNeeded(t *testing.T) {
	w := workload()
	closed := spaceNeeded(w, 3)
	w.Rate = 1000
	atRate := spaceNeeded(w, 3)
	w.Rate, w.Messages = 0, 1_000_000_000
	many := spaceNeeded(w, 3)
	w.Publishers, w.Consumers = 0, 1
	none := spaceNeeded(w, 3)
	// 11 s at 164 kB/s, twice, three nodes, and the overhead.
	if want := int64(3 * (11*1000*164*2 + nodeOverhead)); atRate != want {
		t.Errorf("at a rate %d, want %d", atRate, want)
	}
	if none != 3*nodeOverhead || closed <= atRate || many <= closed {
		t.Errorf("none %d, at a rate %d, closed loop %d, a billion %d", none, atRate, closed, many)
	}
	w = workload()
	w.Duration, w.Messages = 0, 1<<50
	if err := Fits(t.TempDir(), w, 3); err == nil {
		t.Error("a quadrillion messages fit this disk")
	}
	w.Messages = 0
	w.Duration, w.Rate = time.Millisecond, 1
	if err := Fits(t.TempDir(), w, 0); err != nil {
		t.Error(err)
	}
}

func TestGapWatch(t *testing.T) {
	at := func(ms int) time.Time { return time.UnixMilli(int64(1_000_000 + ms)) }
	g := newGapWatch(3, 1) // publishers 1 and 4 begin at the victim
	g.began = at(0)
	g.published(0, at(0), nil)
	g.published(2, at(30), nil)
	g.published(1, at(40), nil) // the victim's do not count
	g.published(0, at(100), nil)
	g.disrupt(at(110))
	g.published(4, at(120), errors.New("gone"))
	g.published(3, at(130), errs.Of(errs.NoLeader))
	g.published(2, at(900), nil)
	g.published(0, at(901), nil)
	g.published(0, at(950), nil)
	var r DisruptReport
	g.fill(&r, at(1000))
	if r.GapBefore != 70*time.Millisecond || r.Gap != 800*time.Millisecond || r.Longest != 870*time.Millisecond {
		t.Errorf("gaps %s and %s, longest %s", r.GapBefore, r.Gap, r.Longest)
	}
	if r.Failed["no_leader"] != 1 || r.FailedVictim["internal"] != 1 || len(r.Failed)+len(r.FailedVictim) != 2 {
		t.Errorf("failed %v and %v", r.Failed, r.FailedVictim)
	}
	if len(r.Timeline) != 10 || r.DisruptedAt != 110*time.Millisecond {
		t.Fatalf("%d steps, disrupted at %s", len(r.Timeline), r.DisruptedAt)
	}
	for i, want := range map[int]TimelineStep{
		0: {Acknowledged: 3}, 1: {Acknowledged: 1, Failed: 2, Longest: 100 * time.Millisecond}, 2: {},
		9: {Acknowledged: 3, Longest: 870 * time.Millisecond},
	} {
		if r.Timeline[i] != want {
			t.Errorf("step %d is %+v, want %+v", i, r.Timeline[i], want)
		}
	}
	g.fill(&r, at(5000))
	if r.Gap != 4000*time.Millisecond {
		t.Errorf("a gap that lasts until the end is %s", r.Gap)
	}
}

func TestDisruptSignals(t *testing.T) {
	for d, want := range map[Disruption]string{
		KillLeader: "killed", KillFollower: "killed", TermLeader: "terminated",
	} {
		var sent []string
		s := &Subject{Pids: func() map[string]int { return map[string]int{"n1": 7} }}
		send := func(pid int, sig os.Signal) error {
			if pid != 7 {
				t.Errorf("signal for %d", pid)
			}
			sent = append(sent, sig.String())
			return nil
		}
		watch := newGapWatch(3, 0)
		if err := disrupt(t.Context(), s, d, "n1", watch, send); err != nil {
			t.Fatal(err)
		}
		if strings.Join(sent, " ") != want || watch.disrupted.IsZero() {
			t.Errorf("%s sent %v", d, sent)
		}
		if err := disrupt(t.Context(), s, d, "n2", watch, send); err == nil {
			t.Error("a server that does not run was disrupted")
		}
	}
	for _, name := range []string{"leader", "follower", "term-leader", "pause-leader"} {
		if _, err := ParseDisruption(name); err != nil {
			t.Error(err)
		}
	}
	if _, err := ParseDisruption("everything"); err == nil {
		t.Error("an unknown disruption was accepted")
	}
}

func TestDisruptReportText(t *testing.T) {
	r := DisruptReport{
		Command: "tercet bench publish --kill leader", Disruption: KillLeader, Victim: "n1", Leader: "n1", NewLeader: "n3",
		Workload: Workload{Publishers: 24, Size: 1024, Duration: 15 * time.Second}, Gap: 1234 * time.Millisecond,
		GapBefore: 12 * time.Millisecond, Longest: 1300 * time.Millisecond, FailedVictim: map[string]int64{"outcome_unknown": 8},
		Balance: Balance{Acknowledged: 123456, Unacknowledged: 3}, InSyncAgain: 2 * time.Second, Equal: true,
		StateHashes: map[string]string{"n1": "00ff at 9", "n2": "00ff at 9", "n3": "00ff at 9"},
	}
	var b strings.Builder
	if err := r.Text(&b); err != nil {
		t.Fatal(err)
	}
	golden(t, "disrupt.txt", b.String())
}
