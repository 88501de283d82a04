package local

import "syscall"

// childAttributes keep the terminal's interrupt from the children, which their parent stops in good order, and
// have the kernel kill them should the parent die without doing so.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
