package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// host runs the servers of all systems as child processes.
type host struct {
	spawns chan spawn
	closed chan struct{}
	ended  chan struct{}

	mu       sync.Mutex
	children []*process
}

type spawn struct {
	cmd  *exec.Cmd
	done chan error
}

// newHost returns a host without children.
func newHost() *host {
	h := &host{spawns: make(chan spawn), closed: make(chan struct{}), ended: make(chan struct{})}
	go func() {
		// The kernel ties a child's death signal to the thread that made it, so that one thread makes them all and
		// lives until they have ended.
		runtime.LockOSThread()
		defer close(h.ended)
		for {
			select {
			case s := <-h.spawns:
				s.done <- s.cmd.Start()
			case <-h.closed:
				for _, p := range h.all() {
					p.stop(0)
				}
				return
			}
		}
	}()
	return h
}

// close kills what still runs. No start may be under way or come afterwards.
func (h *host) close() {
	close(h.closed)
	<-h.ended
}

func (h *host) all() []*process {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.children)
}

// process is one server.
type process struct {
	name, log string
	cmd       *exec.Cmd
	done      chan struct{}
	err       error // valid once done is closed
}

// start starts a server whose output goes to name.log in dir. It is the leader of a process group of its own, so that
// an interrupt typed at a terminal does not reach it and its children end with it.
func (h *host) start(dir, name string, env []string, binary string, args ...string) (*process, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	p := &process{name: name, log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	out, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p.cmd = exec.Command(binary, args...)
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = dir, out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	s := spawn{p.cmd, make(chan error, 1)}
	select {
	case h.spawns <- s:
	case <-h.closed:
		return nil, errors.New("the run is over")
	}
	if err := <-s.done; err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		p.err = p.cmd.Wait()
	}()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.children = append(h.children, p)
	return p, nil
}

// pid is the child's.
func (p *process) pid() int { return p.cmd.Process.Pid }

// stop ends the process and its group: after patience with SIGTERM, then with SIGKILL.
func (p *process) stop(patience time.Duration) {
	if patience > 0 {
		_ = syscall.Kill(-p.pid(), syscall.SIGTERM) // it may have ended
		select {
		case <-p.done:
		case <-time.After(patience):
		}
	}
	_ = syscall.Kill(-p.pid(), syscall.SIGKILL) // as above
	<-p.done
}

// await polls until check succeeds, the process ends, or the context does.
func (p *process) await(ctx context.Context, what string, check func() error) error {
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended (%s) before %s: %s", p.name, p.cmd.ProcessState, what, p.tail())
		case <-ctx.Done():
			return fmt.Errorf("%s: %s: %w: %w; %s", p.name, what, ctx.Err(), err, p.tail())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// tail is the end of the process's output.
func (p *process) tail() string {
	text, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(text[max(0, len(text)-600):]))
}

// stopAll stops processes at the same time.
func stopAll(patience time.Duration, ps ...*process) {
	var group sync.WaitGroup
	for _, p := range ps {
		if p != nil {
			group.Go(func() { p.stop(patience) })
		}
	}
	group.Wait()
}

// freePorts returns so many ports of the loopback address that nobody listens on at the moment.
func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // all at the end, so that they differ
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

// loopback is the address of a port of this machine.
func loopback(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }

// dialable reports whether somebody listens at addr.
func dialable(addr string) error {
	c, err := net.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		return err
	}
	return c.Close()
}

// which finds a program by its name or path.
func which(names ...string) (string, error) {
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return filepath.Abs(path)
		}
	}
	return "", fmt.Errorf("no %s", strings.Join(names, " or "))
}
