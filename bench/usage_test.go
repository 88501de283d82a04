package bench

import (
	"strings"
	"testing"
	"time"
)

func TestParseProcessStat(t *testing.T) {
	// The command may hold anything.
	stat := "42 (a) b (c) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 7 7 20 0 9 0 100 12345 777 18446744073709551615\n"
	got, err := parseProcessStat([]byte(stat))
	if err != nil {
		t.Fatal(err)
	}
	want := ProcessUsage{User: 2500 * time.Millisecond, System: 500 * time.Millisecond, RSS: 777}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for _, bad := range []string{"", "42", "42 (a) S 1", strings.Replace(stat, "250", "x", 1)} {
		if _, err := parseProcessStat([]byte(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestParseProcessIO(t *testing.T) {
	if got := parseProcessIO([]byte("rchar: 1\nwchar: 2\nwrite_bytes: 4096\ncancelled_write_bytes: 9\n")); got != 4096 {
		t.Errorf("got %d", got)
	}
	if got := parseProcessIO(nil); got != 0 {
		t.Errorf("got %d of nothing", got)
	}
}

func TestParseMachineStat(t *testing.T) {
	got, err := parseMachineStat([]byte("cpu  100 1 200 9999 50 3 4 55 7 8\ncpu0 1 1 1 1 1 1 1 1 1 1\n"))
	if err != nil {
		t.Fatal(err)
	}
	if want := (MachineUsage{Busy: 3080 * time.Millisecond, Stolen: 550 * time.Millisecond}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for _, bad := range []string{"", "cpu 1 2", "intr 1 2 3 4 5 6 7 8 9", "cpu 1 2 3 4 x 6 7 8 9"} {
		if _, err := parseMachineStat([]byte(bad)); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestLostCores(t *testing.T) {
	r := CPUReport{Elapsed: 10 * time.Second, Others: 4 * time.Second, Stolen: 3 * time.Second}
	if got := r.LostCores(); got != 0.7 {
		t.Errorf("got %g", got)
	}
	if (CPUReport{}).LostCores() != 0 {
		t.Error("nothing measured, something lost")
	}
}
