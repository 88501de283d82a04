package compat

import (
	"net"
	"os"
	"syscall"
)

var pid = os.Getpid()

// cpuSeconds is the processor time of this process.
func cpuSeconds() (sys, user float64) {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0, 0
	}
	return float64(u.Stime.Nano()) / 1e9, float64(u.Utime.Nano()) / 1e9
}

// localPort is the port that a client has connected to.
func localPort(nc net.Conn) string {
	_, port, err := net.SplitHostPort(nc.LocalAddr().String())
	if err != nil {
		return "0"
	}
	return port
}
