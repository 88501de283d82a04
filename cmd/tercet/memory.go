package main

import (
	"os"
	"runtime/debug"

	"github.com/hashicorp/go-hclog"

	"tercet.dev/tercet/internal/memory"
)

// limitMemory makes the garbage collector work harder as the process nears the limit of its cgroup, instead of
// being killed at it. GOMEMLIMIT, when set, is left alone.
func limitMemory(log hclog.Logger) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	limit := memory.CgroupLimit(os.ReadFile)
	if limit == 0 {
		return
	}
	soft := limit / 10 * 9
	debug.SetMemoryLimit(soft)
	log.Info("memory limit", "cgroup", limit, "soft", soft)
}
