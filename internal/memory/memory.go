// Package memory tells how much memory the process may use.
package memory

import (
	"path"
	"strconv"
	"strings"
)

// CgroupLimit returns the memory limit of the process's control group, or of one above it, whichever is least: 0 for none.
// read reads a file, as os.ReadFile does.
//
// The group's path is as the process's own mount of the hierarchy shows it, or, in a container with version 1, as the
// host does. Groups that are not found are passed over, and the root of the mount is the container's own.
func CgroupLimit(read func(string) ([]byte, error)) int64 {
	least := int64(0)
	try := func(file string) {
		content, err := read(file)
		if err != nil {
			return
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(content)), 10, 64)
		// Version 1 says "none" as a number near the largest, version 2 as a word.
		if err == nil && n > 0 && n < 1<<60 && (least == 0 || n < least) {
			least = n
		}
	}
	walk := func(root, group, name string) {
		for group = path.Join("/", group); ; group = path.Dir(group) {
			try(path.Join(root, group, name))
			if group == "/" {
				return
			}
		}
	}
	two, one := "/", "/"
	if content, err := read("/proc/self/cgroup"); err == nil {
		for line := range strings.Lines(string(content)) {
			// number:controllers:path
			fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
			switch {
			case len(fields) < 3:
			case fields[0] == "0" && fields[1] == "":
				two = fields[2]
			case strings.Contains(","+fields[1]+",", ",memory,"):
				one = fields[2]
			}
		}
	}
	walk("/sys/fs/cgroup", two, "memory.max")
	walk("/sys/fs/cgroup/memory", one, "memory.limit_in_bytes")
	return least
}
