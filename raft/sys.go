package raft

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"tercet.dev/tercet/internal/memory"
)

// memoryBudgetMax bounds the default budget.
const memoryBudgetMax = 1 << 30

// defaultMemoryBudget is a quarter of the memory this process may use, at most 1 GiB.
func defaultMemoryBudget() int64 {
	limit := int64(memoryBudgetMax * 4)
	if raw, err := os.ReadFile("/proc/meminfo"); err == nil {
		for line := range strings.Lines(string(raw)) {
			if f := strings.Fields(line); len(f) >= 2 && f[0] == "MemTotal:" {
				if kib, err := strconv.ParseInt(f[1], 10, 64); err == nil {
					limit = min(limit, kib<<10)
				}
			}
		}
	}
	if group := memory.CgroupLimit(os.ReadFile); group > 0 {
		limit = min(limit, group)
	}
	return min(limit/4, memoryBudgetMax)
}

// diskReserveMax bounds the default reserve.
const diskReserveMax = 1 << 30

// defaultDiskReserve is 5 % of the file system, at most 1 GiB.
func defaultDiskReserve(dir string) int64 {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return 0
	}
	return min(int64(s.Blocks)*int64(s.Bsize)/20, diskReserveMax) //nolint:unconvert // Bsize differs between systems
}

// closeAll closes listeners that will not be used.
func closeAll(ls []net.Listener) {
	for _, l := range ls {
		_ = l.Close()
	}
}

// listen returns one listener for all of the given ones, or for an address; one without a host stands for both
// loopback addresses.
func listen(addr string, given []net.Listener) (net.Listener, error) {
	if len(given) == 0 {
		host, port, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, fmt.Errorf("peer address %s: %w", addr, err)
		}
		hosts := []string{host}
		if host == "" {
			hosts = []string{"127.0.0.1", "::1"}
		}
		for i, h := range hosts {
			l, err := net.Listen("tcp", net.JoinHostPort(h, port))
			if err != nil {
				if i > 0 && !errors.Is(err, unix.EADDRINUSE) {
					continue // a machine without IPv6
				}
				closeAll(given)
				return nil, fmt.Errorf("listening for other nodes: %w", err)
			}
			given = append(given, l)
		}
	}
	if len(given) == 1 {
		return given[0], nil
	}
	m := &multiListener{listeners: given, conns: make(chan accepted), closed: make(chan struct{})}
	for _, l := range given {
		m.wg.Add(1)
		go m.accept(l)
	}
	return m, nil
}

// multiListener accepts from several listeners.
type multiListener struct {
	listeners []net.Listener
	conns     chan accepted
	closed    chan struct{}
	once      sync.Once
	wg        sync.WaitGroup
}

type accepted struct {
	conn net.Conn
	err  error
}

func (m *multiListener) accept(l net.Listener) {
	defer m.wg.Done()
	for {
		c, err := l.Accept()
		select {
		case m.conns <- accepted{c, err}:
		case <-m.closed:
			if c != nil {
				_ = c.Close()
			}
			return
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
	}
}

// Accept implements net.Listener.
func (m *multiListener) Accept() (net.Conn, error) {
	select {
	case a := <-m.conns:
		return a.conn, a.err
	case <-m.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (m *multiListener) Close() error {
	var err error
	m.once.Do(func() {
		close(m.closed)
		for _, l := range m.listeners {
			err = errors.Join(err, l.Close())
		}
		m.wg.Wait()
	})
	return err
}

// Addr implements net.Listener.
func (m *multiListener) Addr() net.Addr { return m.listeners[0].Addr() }
