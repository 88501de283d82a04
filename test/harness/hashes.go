package harness

import (
	"encoding/json"
	"testing"
	"time"
)

// A HashWatch samples every node's applied index and state hash while a test runs. Whenever two samples, of
// whatever nodes and times, show the same index, their hashes must be equal (S12).
type HashWatch struct {
	c    *Cluster
	stop chan struct{}
	done chan struct{}

	// Read after Stop.
	samples, compared int
	differences       []string
}

// WatchHashes starts sampling until Stop.
func (c *Cluster) WatchHashes() *HashWatch {
	w := &HashWatch{c: c, stop: make(chan struct{}), done: make(chan struct{})}
	go w.run()
	return w
}

func (w *HashWatch) run() {
	defer close(w.done)
	type sample struct{ node, hash string }
	seen := map[uint64]sample{}
	ticker := time.NewTicker(40 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-w.stop:
			return
		case <-ticker.C:
		}
		for _, n := range w.c.Up() {
			s, err := n.Status()
			if err != nil {
				continue
			}
			w.samples++
			hash := string(s.StateHash)
			first, ok := seen[s.AppliedIndex]
			switch {
			case !ok:
				seen[s.AppliedIndex] = sample{n.ID, hash}
			case first.hash != hash:
				b, _ := json.Marshal(s)
				w.differences = append(w.differences, first.node+" had "+first.hash+", then "+string(b))
			case first.node != n.ID:
				w.compared++
			}
		}
	}
}

// Stop ends the sampling and fails the test for each difference.
func (w *HashWatch) Stop(tb testing.TB) {
	tb.Helper()
	close(w.stop)
	<-w.done
	for _, d := range w.differences {
		tb.Errorf("two states at one applied index: %s", d)
	}
	tb.Logf("state hashes: %d samples, %d of them compared with another node's at the same index", w.samples, w.compared)
}
