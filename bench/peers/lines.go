package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"tercet.dev/tercet/bench"
)

// A line is one workload that contenders carry out in turn.
type line struct {
	Name  string         `json:"name"`
	Title string         `json:"title"`
	W     bench.Workload `json:"workload"`
	// Contenders take turns, Rounds times.
	Contenders []contender `json:"contenders"`
	Rounds     int         `json:"rounds"`
	// Drain first publishes Messages, then has consumers receive and acknowledge them all; both are measured.
	Drain bool `json:"drain,omitempty"`
	// HalfOf sets the rate to half of what the contender reached in the line of this name.
	HalfOf string `json:"halfOf,omitempty"`
	// Full lines are left out of the listed subset.
	Full bool `json:"full,omitempty"`
}

// The names of the systems. Those with a plus are the same program with other settings, started for their lines alone.
const (
	sysTercet   = "tercet"
	sysRaftWAL  = "raft-wal"
	sysAlways   = "jetstream-always"
	sysDefault  = "jetstream-default"
	sysRedis    = "redis"
	sysRabbit   = "rabbitmq"
	sysAll      = "tercet+all"
	sysMajority = "tercet+majority"
	sysSlow1    = "tercet+1ms"
	sysSlow5    = "tercet+5ms"
)

// peersOf are the systems that Tercet is compared with.
var peersOf = []string{sysAlways, sysDefault, sysRedis, sysRabbit}

// fsynced are the peers whose acknowledgement means a disk, as Tercet's does.
var fsynced = []string{sysAlways, sysRedis, sysRabbit}

// contenders makes a list out of ways into Tercet and the peers.
func contenders(ways ...string) []contender {
	var all []contender
	for _, way := range ways {
		all = append(all, contender{sysTercet, way})
	}
	for _, p := range peersOf {
		all = append(all, contender{p, wayNative})
	}
	return all
}

// shape says how long the lines of a run take, and how large they are.
type shape struct {
	warmup, duration time.Duration
	rounds           int
	drain            int64 // messages of the backlog that everybody drains
	drainTercet      int64 // messages of Tercet's own
	// counted lines end after a number of messages instead of a time: however slow the machine is, something is done.
	counted bool
}

// The shapes of the runs.
var (
	reportShape = shape{warmup: time.Second, duration: 4 * time.Second, rounds: 2, drain: 1_000_000, drainTercet: 10_000_000}
	smokeShape  = shape{rounds: 1, drain: 2_000, drainTercet: 5_000, counted: true}
)

// lines are everything that is measured.
func (s shape) lines() []line {
	base := bench.Workload{
		Size: 1024, Batch: 1, Publishers: 16, Warmup: s.warmup, Duration: s.duration, Retention: time.Minute, Seed: 1,
	}
	var all []line
	add := func(name, title string, rounds int, who []contender, change func(l *line, w *bench.Workload)) {
		l := line{Name: name, Title: title, W: base, Contenders: who, Rounds: min(rounds, s.rounds)}
		change(&l, &l.W)
		if w := &l.W; s.counted && !l.Drain {
			w.Messages = int64(max(100, 2*w.Publishers*w.Batch*max(1, w.Window/8)))
		}
		all = append(all, l)
	}
	for _, n := range []int{1, 16, 64, 256, 1024} {
		who := contenders(wayLeader, wayRESP, wayHTTP)
		if n == 256 {
			who = append(who, contender{sysRaftWAL, wayLeader})
		}
		add(fmt.Sprintf("clients-%d", n), fmt.Sprintf("%d clients, one message a request", n), 2, who,
			func(_ *line, w *bench.Workload) { w.Publishers = n })
	}
	add("batch", "16 clients, 100 messages a request", 2, contenders(wayLeader, wayRESP, wayHTTP),
		func(_ *line, w *bench.Workload) { w.Batch = 100 })
	add("window", "16 clients, 64 requests of one message under way each", 2, contenders(wayLeader, wayRESP),
		func(_ *line, w *bench.Workload) { w.Window = 64 })
	// The largest is as large as a stream's entry may be together with the name of its field.
	for _, size := range []int{100, 16 << 10, 1023 << 10} {
		add("size-"+strings.ReplaceAll(bench.FormatBytes(int64(size)), " ", ""), "64 clients, "+bench.FormatBytes(int64(size)), 1,
			contenders(wayLeader, wayRESP, wayHTTP), func(_ *line, w *bench.Workload) { w.Publishers, w.Size = 64, size })
	}
	consume := func(w *bench.Workload, consumers, groups int) {
		w.Consumers, w.Groups, w.Group, w.ReceiveMax = consumers, groups, "g", settleAt
	}
	add("roundtrip", "16 publishers, 4 consumers: publish, receive, acknowledge", 2, contenders(wayLeader, wayRESP, wayHTTP),
		func(_ *line, w *bench.Workload) { consume(w, 4, 1); w.Timed = true })
	add("rate-500", "500 messages a second, end to end: 4 publishers, 4 consumers", 2, contenders(wayLeader, wayRESP, wayHTTP),
		func(_ *line, w *bench.Workload) { consume(w, 4, 1); w.Timed, w.Rate, w.Publishers = true, 500, 4 })
	add("push", "16 publishers over HTTP; messages pushed to a handler and acknowledged by it", 2, []contender{{sysTercet, wayPush}, {sysTercet, wayHTTP}},
		func(_ *line, w *bench.Workload) { consume(w, 16, 1); w.Timed = true })
	add("fanout-3", "16 publishers, 3 groups of 2 consumers", 2, contenders(wayLeader, wayRESP, wayHTTP),
		func(_ *line, w *bench.Workload) { consume(w, 6, 3) })
	add("mixed", "64 clients, 100 B, 1 KiB and 16 KiB in turn", 1, contenders(wayRESP, wayHTTP),
		func(_ *line, w *bench.Workload) { w.Publishers, w.Sizes = 64, []int{100, 1 << 10, 16 << 10} })
	add("topics-64", "64 topics, 256 clients", 1, []contender{
		{sysTercet, wayLeader}, {sysTercet, wayRESP}, {sysTercet, wayHTTP}, {sysAlways, wayNative}, {sysRedis, wayNative},
	}, func(_ *line, w *bench.Workload) { w.Publishers, w.Topics = 256, 64 })
	for _, way := range []string{wayLeader, wayRESP, wayHTTP} {
		add("half-"+way, "256 clients at half of the maximum rate", 2, []contender{{sysTercet, way}},
			func(l *line, w *bench.Workload) { w.Publishers = 256; l.HalfOf = "clients-256" })
	}
	add("durability-1", "1 client by durability", 2, []contender{
		{sysTercet, wayLeader}, {sysAll, wayLeader}, {sysMajority, wayLeader},
	}, func(_ *line, w *bench.Workload) { w.Publishers = 1 })
	add("durability-256", "256 clients by durability", 2, []contender{
		{sysTercet, wayLeader}, {sysAll, wayLeader}, {sysMajority, wayLeader},
	}, func(_ *line, w *bench.Workload) { w.Publishers = 256 })
	add("slow-disk", "1 client, every sync 1 ms and 5 ms longer", 1, []contender{
		{sysTercet, wayLeader}, {sysSlow1, wayLeader}, {sysSlow5, wayLeader},
	}, func(_ *line, w *bench.Workload) { w.Publishers = 1 })
	add("drain", bench.FormatCount(float64(s.drain))+" messages published, then drained by 16 consumers", 1,
		contenders(wayLeader, wayRESP, wayHTTP), func(l *line, w *bench.Workload) {
			l.Drain, w.Size, w.Batch, w.Messages, w.Retention = true, 100, 100, s.drain, time.Hour
			consume(w, 16, 1)
		})
	add("drain-10", bench.FormatCount(float64(s.drainTercet))+" messages published, then drained by 64 consumers", 1,
		[]contender{{sysTercet, wayLeader}}, func(l *line, w *bench.Workload) {
			l.Drain, w.Size, w.Batch, w.Messages, w.Retention = true, 100, 100, s.drainTercet, time.Hour
			consume(w, 64, 1)
		})
	return all
}

// selectLines returns the lines of the names, or all that are not Full if there are none.
func selectLines(all []line, names []string, full bool) ([]line, error) {
	var chosen []line
	for _, l := range all {
		if len(names) == 0 && (full || !l.Full) || slices.Contains(names, l.Name) {
			chosen = append(chosen, l)
		}
	}
	for _, n := range names {
		if !slices.ContainsFunc(all, func(l line) bool { return l.Name == n }) {
			return nil, fmt.Errorf("no line is named %q", n)
		}
	}
	return chosen, nil
}
