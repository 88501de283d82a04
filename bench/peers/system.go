package main

import (
	"context"

	"tercet.dev/tercet/bench"
)

// A system is a queue that can be run on this machine: three servers on loopback, their data in one directory.
type system interface {
	// name is what reports call it, without spaces.
	name() string
	// promise says in one line what an acknowledgement of a publish means, and its policy of syncs.
	promise() string
	// missing names what is not installed and the command that installs it, or is empty.
	missing() string
	// start starts the servers in dir and returns when they serve.
	start(ctx context.Context, h *host, dir string) (cluster, error)
}

// A cluster is a system that runs.
type cluster interface {
	// version is the servers'.
	version() string
	// pids are the servers' processes by name.
	pids() map[string]int
	// run makes the topics and groups of a workload, carries it out by clients of the given way, and is told when
	// the part that counts begins and ends. Topics have names that were not used before.
	run(ctx context.Context, w bench.Workload, way string, hooks bench.Hooks) (*bench.Result, error)
	// clean removes the workload's topics with all that is in them, as far as the system can.
	clean(ctx context.Context, w bench.Workload) error
	// stop ends the servers. Their data is of no more use.
	stop()
}

// refusing is a cluster that not every way leads into.
type refusing interface {
	// refuses says why a way is closed, or nothing.
	refuses(way string) string
}

// The ways of a client into a system that has several.
const (
	// wayNative is the only one of most systems.
	wayNative = ""
	// wayLeader is publishers inside the leader's process.
	wayLeader = "leader"
	wayHTTP   = "http"
	wayRESP   = "resp"
	// wayPush publishes over HTTP and has messages pushed to the consumers.
	wayPush = "push"
)

// contender is a system and a way into it.
type contender struct {
	System string `json:"system"`
	Way    string `json:"way,omitempty"`
}

// String names it in reports: "tercet/http".
func (c contender) String() string {
	if c.Way == wayNative {
		return c.System
	}
	return c.System + "/" + c.Way
}

// prepared is a driver that has to be prepared.
type prepared interface {
	bench.Driver
	Prepare() error
}

// drive prepares a driver and runs the workload with it.
func drive(ctx context.Context, w bench.Workload, d prepared, hooks bench.Hooks) (*bench.Result, error) {
	if err := d.Prepare(); err != nil {
		return nil, err
	}
	return bench.Run(ctx, w, d, hooks)
}

// topicsOf lists the names of a workload's topics.
func topicsOf(w bench.Workload) []string {
	var names []string
	for i := range max(1, w.Topics) {
		names = append(names, w.TopicName(i))
	}
	return names
}

// groupsOf lists the names of a workload's groups, none without consumers.
func groupsOf(w bench.Workload) []string {
	if w.Group == "" {
		return nil
	}
	var names []string
	for i := range max(1, w.Groups) {
		names = append(names, w.GroupName(i))
	}
	return names
}
