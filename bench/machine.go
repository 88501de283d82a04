package bench

import (
	"os"
	"runtime"
	"runtime/debug"
	"strings"
)

// Machine is where and with what a measurement was made.
type Machine struct {
	CPUs       int    `json:"cpus"`
	CPU        string `json:"cpu,omitempty"`
	Kernel     string `json:"kernel,omitempty"`
	Filesystem string `json:"filesystem,omitempty"`
	Platform   string `json:"platform"`
	Go         string `json:"go"`
	Raft       string `json:"raft,omitempty"`
	Pebble     string `json:"pebble,omitempty"`
}

// ThisMachine describes the machine of this process. dir is where the servers' data is, if it is here.
func ThisMachine(dir string) Machine {
	m := Machine{CPUs: runtime.NumCPU(), Platform: runtime.GOOS + "/" + runtime.GOARCH, Go: runtime.Version()}
	if text, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = strings.TrimSpace(string(text))
	}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		m.CPU = cpuModel(string(text))
	}
	if text, err := os.ReadFile("/proc/self/mounts"); err == nil && dir != "" {
		m.Filesystem = filesystemOf(string(text), dir)
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			switch d.Path {
			case "github.com/hashicorp/raft":
				m.Raft = d.Version
			case "github.com/cockroachdb/pebble/v2":
				m.Pebble = d.Version
			}
		}
	}
	return m
}

// cpuModel reads the first model name of /proc/cpuinfo.
func cpuModel(text string) string {
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// filesystemOf finds the type of the file system that holds an absolute path in the text of /proc/mounts.
func filesystemOf(mounts, path string) string {
	best, found := 0, ""
	for line := range strings.Lines(mounts) {
		fields := strings.Fields(line)
		if len(fields) < 3 {
			continue
		}
		at := strings.TrimSuffix(fields[1], "/")
		// The last of equal mount points covers the others.
		if (path == at || strings.HasPrefix(path, at+"/")) && len(at) >= best {
			best, found = len(at), fields[2]
		}
	}
	return found
}
