package harness

import "syscall"

// attributes keep the terminal's signals from a child and have the kernel kill it should the test binary die.
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
