package harness

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"
)

// Campaign reports whether the full counts of faults, lines and bytes are asked for (TERCET_CAMPAIGN=1, or
// TERCET_TEST_ALL=1 as `make test-all` sets it). Without it a fixed sample runs.
func Campaign() bool {
	return os.Getenv("TERCET_CAMPAIGN") == "1" || os.Getenv("TERCET_TEST_ALL") == "1"
}

// Scale returns sample in an ordinary run and full in a campaign.
func Scale[T any](sample, full T) T {
	if Campaign() {
		return full
	}
	return sample
}

// Seed returns the seed of this test and logs it. It is random unless TERCET_SEED is set, which repeats the
// choices of an earlier run (not its schedule: the processes are real).
func Seed(tb testing.TB) uint64 {
	tb.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("TERCET_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			tb.Fatalf("TERCET_SEED: %v", err)
		}
	}
	tb.Logf("seed: TERCET_SEED=%d go test ./test/e2e -run '^%s$' -count=1 -v", seed, tb.Name())
	return seed
}

// Rand returns a source of choices for the named part of a test, independent of the other parts.
func Rand(seed uint64, part string) *rand.Rand {
	h := uint64(14695981039346656037)
	for i := 0; i < len(part); i++ {
		h = (h ^ uint64(part[i])) * 1099511628211
	}
	return rand.New(rand.NewPCG(seed, h))
}

// patience is how much longer than usual bounded waits may take, since machines are busy and their caches cold: only
// what is broken waits for so long. The race detector's build takes more.
func patience(d time.Duration) time.Duration {
	if os.Getenv(envRace) == "1" {
		return 12 * d
	}
	return 6 * d
}
