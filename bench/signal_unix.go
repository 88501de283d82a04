//go:build unix

package bench

import "syscall"

// The signals of disruptions.
const (
	terminate       = syscall.SIGTERM
	stopProcess     = syscall.SIGSTOP
	continueProcess = syscall.SIGCONT
)
