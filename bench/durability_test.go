package bench

import (
	"context"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseFaults(t *testing.T) {
	if got, err := ParseFaults([]string{"power", "kill"}); err != nil || !slices.Equal(got, []FaultKind{FaultPower, FaultKill}) {
		t.Errorf("%v, %v", got, err)
	}
	for _, bad := range [][]string{nil, {"kill", "quake"}} {
		if got, err := ParseFaults(bad); err == nil {
			t.Errorf("%v: %v", bad, got)
		}
	}
}

func TestSilence(t *testing.T) {
	at := func(ms int) time.Time { return time.UnixMilli(int64(1_000_000 + ms)) }
	s := silence{from: 250 * time.Millisecond}
	for _, ms := range []int{0, 100, 349, 700, 650, 1700, 1949} { // one answer was noted late
		s.acknowledged(at(ms))
	}
	if s.longest != time.Second || s.sum != 1351*time.Millisecond || s.gaps != 2 {
		t.Errorf("longest %s, %s in %d gaps", s.longest, s.sum, s.gaps)
	}
}

// TestVictims: every server is hit alone and all of them together, and equal seeds give equal runs.
func TestVictims(t *testing.T) {
	s := &Subject{Nodes: []SubjectNode{{ID: "n1"}, {ID: "n2"}, {ID: "n3"}}}
	draw := func() (all []string) {
		choose := rand.New(rand.NewPCG(7, 0))
		for range 200 {
			all = append(all, strings.Join(victims(choose, s), "+"))
		}
		return all
	}
	first := draw()
	counts := map[string]int{}
	for _, v := range first {
		counts[v]++
	}
	if len(counts) != 4 || counts["n1+n2+n3"] < 20 || counts["n1+n2+n3"] > 70 || counts["n2"] < 20 {
		t.Errorf("%v", counts)
	}
	if !slices.Equal(first, draw()) {
		t.Error("the same seed drew other victims")
	}
}

func TestLedgerOfOneZone(t *testing.T) {
	l := NewLedger()
	for n := range uint64(3) {
		l.Acknowledged(Stamp{1, n})
		l.Found(Stamp{1, n})
	}
	own := l.onlyAcknowledged()
	own.Found(Stamp{1, 0})
	own.Found(Stamp{9, 9})
	if got, want := own.Balance(), (Balance{Acknowledged: 3, Lost: 2, Unacknowledged: 1}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if l.Missing() != 0 {
		t.Error("the cluster's own account was changed")
	}
	r := DurabilityReport{Balance: l.Balance(), Zones: []ZoneBalance{{"n1", Balance{}}, {"n2", own.Balance()}}}
	if r.Lost() != 2 {
		t.Errorf("lost %d", r.Lost())
	}
}

// TestVolume cuts a file system off from its disk: what was synced stays, what was not is gone.
func TestVolume(t *testing.T) {
	if os.Geteuid() != 0 {
		// The default run has no root everywhere; tercet bench durability says that it needs it.
		if _, err := NewVolume(t.Context(), t.TempDir()+"/v", 64<<20); err == nil {
			t.Error("a volume without root")
		}
		return
	}
	dir := t.TempDir() + "/v"
	v, err := NewVolume(t.Context(), dir, 64<<20)
	if err != nil {
		t.Logf("no loop device here: %v", err)
		return
	}
	closed := false
	defer func() {
		if !closed {
			v.Close()
		}
	}()
	write := func(name string, sync bool) {
		t.Helper()
		f, err := os.Create(dir + "/" + name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteString("content"); err != nil {
			t.Fatal(err)
		}
		if sync {
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	write("synced", true)
	write("unsynced", false)
	if err := v.cut(); err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := v.Await(gone); err == nil {
		t.Error("a volume without a disk is not there")
	}
	if err := v.restore(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := v.Await(t.Context()); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(dir + "/synced"); err != nil || string(b) != "content" {
		t.Errorf("synced: %q, %v", b, err)
	}
	if b, err := os.ReadFile(dir + "/unsynced"); err == nil && len(b) > 0 {
		t.Errorf("unsynced: %q", b)
	}
	closed = true
	if err := v.Close(); err != nil {
		t.Error(err)
	}
}
