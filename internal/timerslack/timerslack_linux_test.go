package timerslack

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain runs the program that TestWiden starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "widen" {
		Widen()
		slack, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
		fmt.Println(os.Getpid(), slack, err, os.Args[2:])
		return
	}
	os.Exit(m.Run())
}

// TestWiden: the program runs in the same process, with its arguments, under the wide slack; and once only.
func TestWiden(t *testing.T) {
	var out strings.Builder
	cmd := exec.Command(os.Args[0], "widen", "a", "b c")
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	slack, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if slack == kernelDefault { // a test's own slack is the program's otherwise
		slack = int(Wide.Nanoseconds())
	}
	if want := fmt.Sprintf("%d %d <nil> [a b c]\n", cmd.Process.Pid, slack); out.String() != want {
		t.Errorf("it says %q, want %q", out.String(), want)
	}
}
