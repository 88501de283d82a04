package bench

import (
	"os"
	"testing"
	"time"
)

func TestMeter(t *testing.T) {
	const gone = 1 << 30 // no such process
	m, err := StartMeter(map[string]int{"self": os.Getpid(), "gone": gone})
	if err != nil {
		t.Fatal(err)
	}
	for began := time.Now(); ; {
		if u, err := ReadProcess(os.Getpid()); err != nil || u.CPU() >= m.self.CPU()+3*clockTick {
			break
		} else if time.Since(began) > time.Minute {
			t.Fatal("no CPU time in a minute of work")
		}
	}
	r, err := m.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if used := r.Client.CPU(); used < 3*clockTick || r.Processes["self"].CPU() < 3*clockTick {
		t.Errorf("counted %s of client, %+v", used, r.Processes)
	}
	if r.Processes["gone"] != (ProcessUsage{}) {
		t.Errorf("a process that does not exist used %+v", r.Processes["gone"])
	}
	if r.Servers() != r.Processes["self"].CPU() || r.Elapsed <= 0 {
		t.Errorf("%+v", r)
	}
}
