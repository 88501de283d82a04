package timerslack

import (
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// kernelDefault is the slack in ns of a process for which nobody chose one.
const kernelDefault = 50_000

// Widen gives the process the slack Wide, unless one was chosen for it (systemd's TimerSlackNSec does). A thread
// inherits it from its creator, and the monitor is there before main: so the program runs once more, in the same
// process. Widen is to be called first of all in main; it returns when there is nothing to do, or it cannot be done.
func Widen() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if now, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0); err != nil || now != kernelDefault {
		return
	}
	program, err := os.Executable() // not /proc/self/exe: the process would be called exe
	if err != nil || unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(Wide.Nanoseconds()), 0, 0, 0) != nil {
		return
	}
	_ = syscall.Exec(program, os.Args, os.Environ())
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, kernelDefault, 0, 0, 0)
}
