package main

import (
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/hashicorp/go-hclog"
)

// limitMemory makes the garbage collector work harder as the process nears the limit of its cgroup, instead of
// being killed at it. GOMEMLIMIT, when set, is left alone.
func limitMemory(log hclog.Logger) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	limit := cgroupLimit(os.ReadFile)
	if limit == 0 {
		return
	}
	soft := limit / 10 * 9
	debug.SetMemoryLimit(soft)
	log.Info("memory limit", "cgroup", limit, "soft", soft)
}

// cgroupLimit returns the memory limit of the process's cgroup (v2, else v1), 0 for none.
func cgroupLimit(read func(string) ([]byte, error)) int64 {
	for _, path := range []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"} {
		content, err := read(path)
		if err != nil {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(content)), 10, 64)
		// Version 1 says "none" as a number near the largest.
		if err == nil && n > 0 && n < 1<<60 {
			return n
		}
	}
	return 0
}
