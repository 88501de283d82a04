package harness

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A Cgroup is a control group of its own, of version 1 or 2, for the time of the test.
type Cgroup struct {
	tb  testing.TB
	dir string
	two bool
}

const (
	cgroupRoot    = "/sys/fs/cgroup"
	graceOfCgroup = 5 * time.Second
)

var cgroups atomic.Int64

// MemoryCgroup makes a group whose processes may use so much memory. It needs root and cgroups that may be written to.
// Without them the test fails and says so: a skipped test would look like a passed one.
func MemoryCgroup(tb testing.TB, bytes int64) *Cgroup {
	tb.Helper()
	g := newCgroup(tb, "memory")
	if g.two {
		g.set("memory.max", fmt.Sprint(bytes))
		g.set("memory.swap.max", "0")
	} else {
		g.set("memory.limit_in_bytes", fmt.Sprint(bytes))
	}
	return g
}

// DiskCgroup makes a group whose processes' writes can be slowed down. It needs what MemoryCgroup needs.
func DiskCgroup(tb testing.TB) *Cgroup {
	tb.Helper()
	return newCgroup(tb, map[bool]string{true: "io", false: "blkio"}[unified()])
}

// unified reports whether the machine has version 2 of cgroups, and nothing else.
func unified() bool {
	_, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.controllers"))
	return err == nil
}

func newCgroup(tb testing.TB, controller string) *Cgroup {
	tb.Helper()
	g := &Cgroup{tb: tb, two: unified()}
	parent := filepath.Join(cgroupRoot, controller)
	if g.two {
		parent = cgroupRoot
		g.write(filepath.Join(parent, "cgroup.subtree_control"), "+"+controller)
	}
	g.dir = filepath.Join(parent, fmt.Sprintf("tercet-test-%d-%d", os.Getpid(), cgroups.Add(1)))
	if text, err := tool("mkdir", g.dir); err != nil {
		tb.Fatalf("this test needs a control group: %v\n%s\nRun it as root, on a machine with cgroups.", err, text)
	}
	// Processes that were started later have been killed then. The kernel lets go of a group a moment after its last one.
	tb.Cleanup(func() {
		if err := Poll(patience(graceOfCgroup), func() error {
			text, err := tool("rmdir", g.dir)
			if err != nil {
				return fmt.Errorf("%w: %s", err, text)
			}
			return nil
		}); err != nil {
			tb.Errorf("remove %s: %v", g.dir, err)
		}
	})
	return g
}

// Wrap is what a command line has to begin with for its process to be in the group from the start.
func (g *Cgroup) Wrap() []string {
	g.tb.Helper()
	procs := filepath.Join(g.dir, "cgroup.procs")
	if os.Geteuid() != 0 {
		if text, err := tool("chown", fmt.Sprint(os.Geteuid()), g.dir, procs); err != nil {
			g.tb.Fatalf("chown %s: %v\n%s", procs, err, text)
		}
	}
	return []string{"sh", "-c", "echo $$ > " + procs + ` && exec "$@"`, "sh"}
}

// Add moves a process into the group.
func (g *Cgroup) Add(p *Process) {
	g.tb.Helper()
	g.set("cgroup.procs", fmt.Sprint(p.PID))
}

// Throttle lets the group's processes write only so many bytes, in so many operations, to a file system in a second.
func (g *Cgroup) Throttle(f *Filesystem, bytes, operations int64) {
	g.tb.Helper()
	device := f.device()
	if g.two {
		g.set("io.max", fmt.Sprintf("%s wbps=%d wiops=%d", device, bytes, operations))
		return
	}
	g.set("blkio.throttle.write_bps_device", fmt.Sprintf("%s %d", device, bytes))
	g.set("blkio.throttle.write_iops_device", fmt.Sprintf("%s %d", device, operations))
}

// Killed returns how many of the group's processes the kernel has killed for want of memory.
func (g *Cgroup) Killed() string {
	g.tb.Helper()
	file := "memory.oom_control"
	if g.two {
		file = "memory.events"
	}
	text, err := os.ReadFile(filepath.Join(g.dir, file))
	if err != nil {
		g.tb.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if count, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok {
			return count
		}
	}
	g.tb.Fatalf("%s does not count what was killed:\n%s", file, text)
	return ""
}

func (g *Cgroup) set(file, value string) {
	g.tb.Helper()
	g.write(filepath.Join(g.dir, file), value)
}

func (g *Cgroup) write(file, value string) {
	g.tb.Helper()
	if text, err := tool("sh", "-c", `echo "$1" > "$2"`, "sh", value, file); err != nil {
		g.tb.Fatalf("write %q to %s: %v\n%s\nRun this test as root, on a machine with cgroups.", value, file, err, text)
	}
}

// device is the number of the block device below the file system, as cgroups name it.
func (f *Filesystem) device() string {
	f.tb.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(f.Dir, &st); err != nil {
		f.tb.Fatal(err)
	}
	return fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
}
