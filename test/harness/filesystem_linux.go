package harness

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A Filesystem is a small file system of its own, whose disk can fill up, hang, and lose power.
type Filesystem struct {
	// Dir is where it is mounted.
	Dir string
	// Kind says what it is: ext4 on a loop device, or tmpfs, which can only fill up.
	Kind string

	tb    testing.TB
	image string
}

// MountExt4 mounts an empty ext4 of this size from an image on a loop device, for the time of the test. It needs
// root and a loop device. Without them the test fails and says so: a skipped test would look like a passed one.
func MountExt4(tb testing.TB, bytes int64) *Filesystem {
	tb.Helper()
	f := newFilesystem(tb)
	if err := f.mountImage(bytes); err != nil {
		tb.Fatalf("this test needs an ext4 on a loop device: %v\nRun it as root, on a machine with loop devices.", err)
	}
	return f
}

// MountSmall is MountExt4 where there are loop devices, and a tmpfs of the same size elsewhere (in a container, say).
func MountSmall(tb testing.TB, bytes int64) *Filesystem {
	tb.Helper()
	f := newFilesystem(tb)
	if err := f.mountImage(bytes); err != nil {
		tb.Logf("no ext4 on a loop device, a tmpfs instead: %v", err)
		if text, err := tool("mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%d", bytes), "tercet-test", f.Dir); err != nil {
			tb.Fatalf("mount a tmpfs: %v\n%s", err, text)
		}
		f.Kind = "tmpfs"
		f.atEnd()
		if err := f.own(); err != nil {
			tb.Fatal(err)
		}
	}
	return f
}

func newFilesystem(tb testing.TB) *Filesystem {
	tb.Helper()
	if os.Geteuid() != 0 && exec.Command("sudo", "-n", "true").Run() != nil {
		tb.Fatal("this test mounts a file system: run it as root, or let sudo work without a password")
	}
	base, err := os.MkdirTemp("", "tercet-fs-")
	if err != nil {
		tb.Fatal(err)
	}
	// Runs after atEnd's.
	tb.Cleanup(func() {
		if err := os.RemoveAll(base); err != nil {
			tb.Errorf("remove %s: %v", base, err)
		}
	})
	f := &Filesystem{tb: tb, Dir: filepath.Join(base, "mnt"), image: filepath.Join(base, "image")}
	if err := os.Mkdir(f.Dir, 0o700); err != nil {
		tb.Fatal(err)
	}
	return f
}

func (f *Filesystem) mountImage(bytes int64) error {
	image, err := os.Create(f.image)
	if err != nil {
		return err
	}
	err = image.Truncate(bytes)
	image.Close()
	if err != nil {
		return err
	}
	if text, err := tool("mkfs.ext4", "-q", "-F", "-m", "0", f.image); err != nil {
		return fmt.Errorf("mkfs.ext4: %w\n%s", err, text)
	}
	if err := f.mount(); err != nil {
		return err
	}
	f.Kind = "ext4"
	f.atEnd()
	return nil
}

func (f *Filesystem) mount() error {
	if text, err := tool("mount", "-o", "loop", f.image, f.Dir); err != nil {
		return fmt.Errorf("mount -o loop: %w\n%s", err, text)
	}
	return f.own()
}

// own gives the mounted directory to the user who runs the tests.
func (f *Filesystem) own() error {
	if os.Geteuid() == 0 {
		return nil
	}
	if text, err := tool("chown", strconv.Itoa(os.Geteuid()), f.Dir); err != nil {
		return fmt.Errorf("chown %s: %w\n%s", f.Dir, err, text)
	}
	return nil
}

// atEnd has the file system unmounted when the test ends. Processes that were started later have been killed then.
func (f *Filesystem) atEnd() {
	f.tb.Cleanup(func() {
		if text, err := tool("umount", f.Dir); err != nil {
			f.tb.Errorf("umount %s: %v\n%s", f.Dir, err, text)
		}
	})
}

// Free returns what may still be written.
func (f *Filesystem) Free() int64 {
	f.tb.Helper()
	var st syscall.Statfs_t
	if err := syscall.Statfs(f.Dir, &st); err != nil {
		f.tb.Fatal(err)
	}
	return int64(st.Bavail) * st.Bsize
}

// Fill takes all but this much of the free space away. The function it returns gives it back.
func (f *Filesystem) Fill(leave int64) (giveBack func()) {
	f.tb.Helper()
	path := filepath.Join(f.Dir, "ballast")
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		f.tb.Fatal(err)
	}
	defer file.Close()
	if bytes := f.Free() - leave; bytes > 0 {
		if err := syscall.Fallocate(int(file.Fd()), 0, 0, bytes); err != nil {
			f.tb.Fatalf("allocate %d bytes in %s: %v", bytes, path, err)
		}
	}
	return func() {
		f.tb.Helper()
		if err := os.Remove(path); err != nil {
			f.tb.Error(err)
		}
	}
}

// Freeze makes every write and sync hang, as a disk does that no longer answers. Thaw ends it, or the end of the
// test.
func (f *Filesystem) Freeze() {
	f.tb.Helper()
	if text, err := tool("fsfreeze", "--freeze", f.Dir); err != nil {
		f.tb.Fatalf("fsfreeze: %v\n%s", err, text)
	}
	// A process that hangs in a write cannot be killed: this must run before the processes' own clean-up, so it
	// is registered as late as possible.
	f.tb.Cleanup(f.thaw)
}

// Thaw ends Freeze.
func (f *Filesystem) Thaw() { f.thaw() }

func (f *Filesystem) thaw() {
	// An error means that it is not frozen.
	_, _ = tool("fsfreeze", "--unfreeze", f.Dir)
}

// ext4Shutdown is the ioctl that cuts a file system off from its disk, noLogFlush its flag for not even writing
// the journal out.
const (
	ext4Shutdown = 0x8004587d
	noLogFlush   = 2
)

// CutPower makes the file system forget what was not synced: nothing reaches its disk any more. The processes that
// use it must be killed, and then Restore called.
func (f *Filesystem) CutPower() {
	f.tb.Helper()
	if os.Geteuid() == 0 {
		if err := shutdown(f.Dir); err != nil {
			f.tb.Fatal(err)
		}
		return
	}
	// The call needs root, and no program of the system makes it: this one does, see init.
	self, err := os.Executable()
	if err != nil {
		f.tb.Fatal(err)
	}
	if text, err := tool(self, argShutdown, f.Dir); err != nil {
		f.tb.Fatalf("shut the file system %s down: %v\n%s", f.Dir, err, text)
	}
}

// argShutdown makes a test binary, run by root, shut a file system down and do nothing else.
const argShutdown = "shut-filesystem-down"

func init() {
	if len(os.Args) == 3 && os.Args[1] == argShutdown {
		if err := shutdown(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

func shutdown(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.IoctlSetPointerInt(int(dir.Fd()), ext4Shutdown, noLogFlush); err != nil {
		return fmt.Errorf("shut the file system %s down: %w", path, err)
	}
	return nil
}

// Restore mounts the file system again after CutPower, as a machine does that has power again.
func (f *Filesystem) Restore() {
	f.tb.Helper()
	if text, err := tool("umount", f.Dir); err != nil {
		f.tb.Fatalf("umount %s: %v\n%s", f.Dir, err, text)
	}
	if err := f.mount(); err != nil {
		f.tb.Fatal(err)
	}
}

// tool runs a program of the system as root. It may live where an ordinary user's path does not lead.
func tool(name string, args ...string) (string, error) {
	path := name
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil && !filepath.IsAbs(name) {
			path = filepath.Join(dir, name)
			break
		}
	}
	argv := append([]string{path}, args...)
	if os.Geteuid() != 0 {
		argv = append([]string{"sudo", "-n"}, argv...)
	}
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}
