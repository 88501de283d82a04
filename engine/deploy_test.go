package engine

import (
	"fmt"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"tercet.dev/tercet/internal/errs"
)

// deployed returns n messages of a deployment.
func deployed(dep string, n int) []NewMessage {
	out := make([]NewMessage, n)
	for i := range out {
		out[i] = NewMessage{Deployment: dep, Body: fmt.Appendf(nil, "%s%d", dep, i)}
	}
	return out
}

// TestExcludedFollowUp: a receive that passes over what is other deployments' stops after looksMax runs; whoever
// waits is told to go on, until it finds what is its own.
func TestExcludedFollowUp(t *testing.T) {
	fs := vfs.NewCrashableMem()
	l := openTest(t, Options{FS: fs})
	defer func() { l.close() }()
	l.apply(&GroupSet{Topic: "t", Group: "g", Create: true, Settings: &GroupSettings{ExcludeDeployments: []string{"x"}}})
	for range 2*looksMax + 100 {
		l.apply(&Publish{Topic: "t", Messages: deployed("x", 3)})
	}
	l.apply(&Publish{Topic: "t", Messages: deployed("y", 1)})
	receive := &Receive{Topic: "t", Group: "g", Max: 1, Visibility: time.Minute, Park: true}
	for step := 1; ; step++ {
		r := l.apply(receive)[0]
		if len(r.Deliveries) == 1 {
			if step != 3 {
				t.Errorf("found after %d steps", step)
			}
			break
		}
		if !r.Parked || len(l.fx.Deliverable) != 1 {
			t.Fatalf("step %d gave %+v, effects %+v", step, r, l.fx)
		}
		if parked, err := l.e.Park(receive, l.now, nil); parked || err != nil {
			t.Fatalf("step %d: parked %v, %v", step, parked, err)
		}
		want := l.fullHash()
		fs = l.crash(fs)
		if got := l.fullHash(); got != want {
			t.Fatalf("hash %x, was %x", got, want)
		}
	}
}

// TestDeploymentsForgotten: cursors of deployments whose messages have expired do not add up.
func TestDeploymentsForgotten(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	for i := range 1000 {
		dep := fmt.Sprint("dpl", i)
		m := deployed(dep, 1)
		m[0].Retention = time.Minute
		r := l.apply(&Publish{Topic: "t", Messages: m}, &Receive{Topic: "t", Group: "g", Max: 1, Visibility: time.Hour, Deployment: dep})
		if len(r[1].Deliveries) != 1 {
			t.Fatalf("deployment %d gave %+v", i, r[1])
		}
		l.pass(10 * time.Second)
	}
	if g := l.e.topics["t"].groups["g"]; len(g.parts) > 80 || g.live > 10 || g.ahead != 0 {
		t.Errorf("%d cursors, %d entries, %d ahead", len(g.parts), g.live, g.ahead)
	}
}

// TestDeploymentAcknowledged: a group that is read by deployment alone does not keep what it has acknowledged.
func TestDeploymentAcknowledged(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	l.apply(&Publish{Topic: "t", Messages: deployed("x", 100)})
	for range 10 {
		r := l.apply(&Receive{Topic: "t", Group: "g", Max: 10, Visibility: time.Hour, Deployment: "x"})[0]
		c := &Settle{Topic: "t", Group: "g", Op: Acknowledge, Deployment: "x"}
		for _, d := range r.Deliveries {
			c.Receipts = append(c.Receipts, d.Receipt)
		}
		l.apply(c)
	}
	if g := l.e.topics["t"].groups["g"]; g.live != 0 || g.acked != 100 {
		t.Errorf("%d entries are left of %d acknowledged", g.live, g.acked)
	}
	if r := l.apply(&Receive{Topic: "t", Group: "g", Max: 10, Visibility: time.Hour})[0]; len(r.Deliveries) != 0 {
		t.Errorf("without a deployment it came again: %+v", r.Deliveries)
	}
}

// TestDeploymentDeleted: XDELEX and XACKDEL with ACKED ask the cursor of a message's deployment too, and answer the same
// whether what was spent has been folded or not, as on a node that crashed in between.
func TestDeploymentDeleted(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	l.apply(&Publish{Topic: "t", Messages: deployed("x", 3)},
		&GroupSet{Topic: "t", Group: "g", Create: true, Settings: &GroupSettings{MaxDeliveries: 1}})
	ds := l.apply(&Receive{Topic: "t", Group: "g", Max: 2, Visibility: time.Minute, Deployment: "x"})[0].Deliveries
	if len(ds) != 2 {
		t.Fatalf("%+v", ds)
	}
	ask := func(i int, want int8) {
		t.Helper()
		r := l.apply(&StreamDelete{Key: "t", IDs: []StreamID{ds[i].Stream}, Refs: Acked, Each: true})[0]
		if r.Code != errs.OK || len(r.Stream.Statuses) != 1 || r.Stream.Statuses[0] != want {
			t.Errorf("message %d: %v, %+v, want status %d", i, r.Code, r.Stream, want)
		}
	}
	ask(0, StatusKept)
	l.apply(&Settle{Topic: "t", Group: "g", Op: Acknowledge, Deployment: "x", Receipts: []Receipt{ds[0].Receipt}})
	ask(0, StatusDeleted)
	l.pass(2 * time.Minute) // the other one is spent
	l.apply(&Receive{Topic: "t", Group: "g", Max: 1, Visibility: time.Minute, Deployment: "x"})
	ask(1, StatusDeleted)
}
