package memory

import (
	"io/fs"
	"testing"
)

func TestCgroupLimit(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		want  int64
	}{
		{"no control groups", nil, 0},
		{"a container, version 2", map[string]string{"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "268435456\n"}, 256 << 20},
		{"no limit, version 2", map[string]string{"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "max\n"}, 0},
		{"a service of systemd", map[string]string{
			"/proc/self/cgroup": "0::/system.slice/tercet.service\n", "/sys/fs/cgroup/system.slice/tercet.service/memory.max": "1048576\n",
			"/sys/fs/cgroup/system.slice/memory.max": "max\n",
		}, 1 << 20},
		{"the slice allows less", map[string]string{
			"/proc/self/cgroup": "0::/a.slice/b.service\n", "/sys/fs/cgroup/a.slice/b.service/memory.max": "2000\n", "/sys/fs/cgroup/a.slice/memory.max": "1000\n",
		}, 1000},
		{"version 1", map[string]string{
			"/proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x/y\n0::/\n",
			"/sys/fs/cgroup/memory/x/y/memory.limit_in_bytes": "5000\n", "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n",
		}, 5000},
		{"a container, version 1, with the host's path", map[string]string{
			"/proc/self/cgroup": "4:memory:/docker/abc\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "7000\n",
		}, 7000},
		{"no limit, version 1", map[string]string{"/proc/self/cgroup": "4:memory:/\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 0},
		{"nonsense", map[string]string{"/proc/self/cgroup": "x\n\n4:memory\n", "/sys/fs/cgroup/memory.max": "-7\n"}, 0},
	} {
		got := CgroupLimit(func(name string) ([]byte, error) {
			if content, ok := c.files[name]; ok {
				return []byte(content), nil
			}
			return nil, fs.ErrNotExist
		})
		if got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}
