//go:build unix && !linux

package local

import "syscall"

// childAttributes keep the terminal's interrupt from the children, which their parent stops in good order.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
