package harness

import (
	"fmt"
	"testing"
	"time"
)

// pollEvery is the pace at which conditions are looked at.
const pollEvery = 15 * time.Millisecond

// Until polls cond until it returns nil and fails the test when it has not within the deadline, with the last
// error. The deadline is a bound against hanging, not an expectation; it is stretched on slow builds.
func Until(tb testing.TB, deadline time.Duration, what string, cond func() error) {
	tb.Helper()
	if err := Poll(patience(deadline), cond); err != nil {
		tb.Fatalf("waiting for %s: %v", what, err)
	}
}

// stepMax is how much of the time between two looks at a condition counts: a machine that stood still for longer gave
// nobody the time to fulfil it.
const stepMax = 3 * time.Second

// Poll calls cond until it returns nil or the deadline has passed, and then returns its last error.
func Poll(deadline time.Duration, cond func() error) error {
	last, waited := time.Now(), time.Duration(0)
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for {
		err := cond()
		if err == nil {
			return nil
		}
		waited += min(time.Since(last), stepMax)
		if last = time.Now(); waited > deadline {
			return fmt.Errorf("not within %v: %w", waited.Round(time.Millisecond), err)
		}
		<-ticker.C
	}
}
