package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

const (
	// envBinary names a binary to test instead of building one.
	envBinary = "TERCET_TEST_BINARY"
	// envRace builds the servers with the race detector.
	envRace = "TERCET_TEST_RACE"
	// envKeep keeps the data directories and logs of failed tests.
	envKeep = "TERCET_TEST_KEEP"
)

// binaryDir holds the built binary until Main removes it.
var binaryDir string

// Main runs the tests of a package that uses Binary: it removes the binary afterwards and fails when the tests
// left a goroutine behind.
func Main(m *testing.M) {
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left behind:", err)
			code = 1
		}
	}
	if binaryDir != "" {
		os.RemoveAll(binaryDir)
	}
	os.Exit(code)
}

var build = sync.OnceValues(func() (string, error) {
	if b := os.Getenv(envBinary); b != "" {
		return filepath.Abs(b)
	}
	root, err := ModuleRoot()
	if err != nil {
		return "", err
	}
	if binaryDir, err = os.MkdirTemp("", "tercet-bin-"); err != nil {
		return "", err
	}
	out := filepath.Join(binaryDir, "tercet")
	args := []string{"build", "-trimpath", "-o", out}
	env := append(os.Environ(), "CGO_ENABLED=0")
	if os.Getenv(envRace) == "1" {
		args = append(args, "-race")
		env = append(os.Environ(), "CGO_ENABLED=1")
	}
	cmd := exec.Command("go", append(args, "./cmd/tercet")...)
	cmd.Dir, cmd.Env = root, env
	start := time.Now()
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build ./cmd/tercet: %w\n%s", err, text)
	}
	fmt.Fprintf(os.Stderr, "harness: built %s in %v\n", out, time.Since(start).Round(time.Millisecond))
	return out, nil
})

// Binary returns the path of the tercet under test. The first call builds it.
func Binary(tb testing.TB) string {
	tb.Helper()
	path, err := build()
	if err != nil {
		tb.Fatal(err)
	}
	return path
}

// ModuleRoot returns the directory of go.mod above the working directory.
func ModuleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no go.mod above the working directory")
		}
		dir = parent
	}
}
