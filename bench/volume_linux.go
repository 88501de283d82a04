package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Volume is an ext4 of its own in an image file, which can be cut off from its disk as a loss of power does.
type Volume struct {
	// Dir is where it is mounted.
	Dir   string
	image string

	mu sync.Mutex
	// back is closed while it is mounted.
	back chan struct{}
}

// NewVolume makes one at dir, which must be empty or not exist. It needs root and a loop device.
func NewVolume(ctx context.Context, dir string, bytes int64) (*Volume, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a file system of its own for each server needs root")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	v := &Volume{Dir: dir, image: dir + ".image", back: make(chan struct{})}
	image, err := os.Create(v.image)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(image.Truncate(bytes), image.Close()); err != nil {
		return nil, err
	}
	if err := tool(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", v.image); err != nil {
		return nil, err
	}
	if err := v.mount(ctx); err != nil {
		return nil, err
	}
	// The data directory of a new node is empty.
	return v, os.RemoveAll(filepath.Join(dir, "lost+found"))
}

// tool runs a program and returns what it says if it fails.
func tool(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

func (v *Volume) mount(ctx context.Context) error {
	if err := tool(ctx, "mount", "-o", "loop", v.image, v.Dir); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	close(v.back)
	return nil
}

// Await waits while the volume is not mounted.
func (v *Volume) Await(ctx context.Context) error {
	v.mu.Lock()
	back := v.back
	v.mu.Unlock()
	select {
	case <-back:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// The ioctl that cuts a file system off from its disk, FS_IOC_SHUTDOWN, and its flag for not even writing the journal.
const (
	shutdownRequest = 0x8004587d
	shutdownNoFlush = 2
)

// cut drops everything that has not been synced.
func (v *Volume) cut() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.back = make(chan struct{})
	dir, err := os.Open(v.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.IoctlSetPointerInt(int(dir.Fd()), shutdownRequest, shutdownNoFlush)
}

// unmountPatience bounds the wait for a killed process to let go of its files.
const unmountPatience = 20 * time.Second

// restore mounts it again, with what was synced.
func (v *Volume) restore(ctx context.Context) error {
	// Not the run's context: the volume has to come back when the run ends meanwhile.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unmountPatience)
	defer cancel()
	for {
		err := tool(ctx, "umount", v.Dir)
		if err == nil {
			return v.mount(ctx)
		}
		if ctx.Err() != nil {
			return err
		}
		pause(ctx, 20*time.Millisecond)
	}
}

// Close unmounts and removes it.
func (v *Volume) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), unmountPatience)
	defer cancel()
	var err error
	for err = tool(ctx, "umount", v.Dir); err != nil && ctx.Err() == nil; err = tool(ctx, "umount", v.Dir) {
		pause(ctx, 50*time.Millisecond)
	}
	return errors.Join(err, os.Remove(v.image), os.Remove(v.Dir))
}
