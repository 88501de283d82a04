package bench

import (
	"os"
	"testing"
	"time"
)

func TestProbe(t *testing.T) {
	dir := t.TempDir()
	for _, prefilled := range []bool{true, false} {
		for _, streams := range []int{1, 3} {
			o := ProbeOptions{Dir: dir, Direct: DirectWorks(dir), Prefilled: prefilled, Size: 5000, Streams: streams, Duration: 50 * time.Millisecond}
			r, err := Probe(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			if r.Size != 8192 || r.Sync.Count == 0 || r.Sync.P50 == 0 || r.SyncsPerSecond == 0 {
				t.Errorf("%s: %+v", r, r)
			}
			if total := r.SyncsPerSecond * float64(streams); r.BytesPerSecond*float64(streams) != total*8192 {
				t.Errorf("%s: %f syncs and %f bytes a second", r, total, r.BytesPerSecond)
			}
			t.Logf("%v: %+v", r, r)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("the probe left %v", left)
	}
}

func TestProbeDelay(t *testing.T) {
	r, err := Probe(t.Context(), ProbeOptions{Dir: t.TempDir(), Prefilled: true, Size: 4096, Duration: 60 * time.Millisecond, Delay: 5 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if r.Sync.P50 < 5000 {
		t.Errorf("a sync took %d us on a disk with 5 ms more", r.Sync.P50)
	}
}
