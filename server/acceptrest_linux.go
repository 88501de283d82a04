package server

import (
	"errors"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// acceptRest accepts what waits in the listener's queue and ends the listening in the same breath: closing the socket
// alone resets every connection in the queue, and its clients may have sent a request already.
func acceptRest(l net.Listener) (rest []net.Conn, ended bool) {
	raw, ok := l.(syscall.Conn)
	if !ok {
		return nil, false
	}
	conn, err := raw.SyscallConn()
	if err != nil {
		return nil, false
	}
	var fds []int
	err = conn.Control(func(fd uintptr) {
		for {
			n, _, err := unix.Accept4(int(fd), unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
			switch {
			case err == nil:
				fds = append(fds, n)
			case errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNABORTED):
			default:
				ended = unix.Shutdown(int(fd), unix.SHUT_RDWR) == nil
				return
			}
		}
	})
	for _, fd := range fds {
		file := os.NewFile(uintptr(fd), "accepted")
		if c, err := net.FileConn(file); err == nil {
			rest = append(rest, c)
		}
		file.Close() // FileConn has made its own
	}
	return rest, ended && err == nil
}
