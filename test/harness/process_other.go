//go:build unix && !linux

package harness

import "syscall"

// attributes keep the terminal's signals from a child.
func attributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
