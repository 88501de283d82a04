package raft

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
)

// zoneWorld drives a zonePolicy against three voters and applies what it proposes.
type zoneWorld struct {
	t      *testing.T
	p      *zonePolicy
	now    time.Time
	head   uint64
	views  map[engine.NodeID]*voterView
	set    engine.InSync
	shrunk []time.Time
}

func newZoneWorld(t *testing.T) *zoneWorld {
	w := &zoneWorld{t: t, p: newZonePolicy(2 * time.Second), now: time.Unix(0, 0), head: 100,
		views: map[engine.NodeID]*voterView{
			"b": {ID: "b", Match: 100, Connected: true},
			"c": {ID: "c", Match: 100, Connected: true},
		},
		set: engine.InSync{Epoch: 1, Nodes: []engine.NodeID{"a", "b", "c"}},
	}
	w.p.observe(w.now, w.set)
	w.p.lead(w.now, []engine.NodeID{"a", "b", "c"}, nil)
	return w
}

// tick lets d pass with a step every 50 ms and returns the changes made.
func (w *zoneWorld) tick(d time.Duration) []zoneChange {
	w.t.Helper()
	var made []zoneChange
	for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(50 * time.Millisecond) {
		c, ok := w.p.step(w.now, "a", w.head, []voterView{*w.views["b"], *w.views["c"]})
		if !ok {
			continue
		}
		if c.Epoch != w.set.Epoch {
			w.t.Fatalf("proposed on epoch %d, the set's is %d", c.Epoch, w.set.Epoch)
		}
		made = append(made, c)
		w.apply(c)
	}
	return made
}

func (w *zoneWorld) apply(c zoneChange) {
	if c.Out {
		w.set.Nodes = slices.DeleteFunc(slices.Clone(w.set.Nodes), func(id engine.NodeID) bool { return id == c.Node })
		w.shrunk = append(w.shrunk, w.now)
	} else {
		w.set.Nodes = append(slices.Clone(w.set.Nodes), c.Node)
		slices.Sort(w.set.Nodes)
	}
	w.set.Epoch++
	w.p.observe(w.now, w.set)
}

func TestZonePolicyHealthyChangesNothing(t *testing.T) {
	w := newZoneWorld(t)
	for range 100 {
		w.head += 7
		w.views["b"].Match, w.views["c"].Match = w.head, w.head-3
		if made := w.tick(100 * time.Millisecond); len(made) != 0 {
			t.Fatalf("proposed %+v", made)
		}
	}
	// Silence with nothing outstanding is no evidence.
	w.views["c"].Match = w.head
	if made := w.tick(time.Minute); len(made) != 0 {
		t.Fatalf("idle cluster: proposed %+v", made)
	}
}

func TestZonePolicyRefusedRedialDropsAtOnce(t *testing.T) {
	w := newZoneWorld(t)
	w.views["c"].Refused, w.views["c"].Connected = true, false
	c, ok := w.p.step(w.now, "a", w.head, []voterView{*w.views["b"], *w.views["c"]})
	if !ok || c != (zoneChange{Node: "c", Out: true, Epoch: 1}) {
		t.Fatalf("got %+v, %v", c, ok)
	}
	// Under way: not proposed again on the same epoch.
	if c, ok := w.p.step(w.now, "a", w.head, []voterView{*w.views["b"], *w.views["c"]}); ok {
		t.Fatalf("proposed %+v twice", c)
	}
}

func TestZonePolicyStalledDiskDropsAtOnce(t *testing.T) {
	w := newZoneWorld(t)
	w.views["c"].Stalled = true
	got := w.tick(25 * time.Millisecond)
	if len(got) != 1 || got[0].Node != "c" || !got[0].Out {
		t.Fatalf("got %+v", got)
	}
	for range 200 {
		if got := w.tick(25 * time.Millisecond); len(got) != 0 {
			t.Fatalf("stalled still, and %+v", got)
		}
	}
}

func TestZonePolicySilenceDropsAfterTimeout(t *testing.T) {
	w := newZoneWorld(t)
	w.head += 10
	w.views["b"].Match = w.head
	if made := w.tick(2 * time.Second); len(made) != 0 {
		t.Fatalf("dropped early: %+v", made)
	}
	made := w.tick(100 * time.Millisecond)
	if len(made) != 1 || made[0].Node != "c" || !made[0].Out {
		t.Fatalf("got %+v", made)
	}
}

// Progress, however slow, is progress: the disk of a slow zone bounds publishes until it stands still.
func TestZonePolicySlowIsNotSilent(t *testing.T) {
	w := newZoneWorld(t)
	w.head += 1000
	w.views["b"].Match = w.head
	for range 50 {
		w.views["c"].Match++
		if made := w.tick(1900 * time.Millisecond); len(made) != 0 {
			t.Fatalf("dropped a zone that moves: %+v", made)
		}
	}
}

// A new leader counts the former leader's silence from the last frame it had of it.
func TestZonePolicyNewLeaderKeepsCounting(t *testing.T) {
	w := newZoneWorld(t)
	w.p.follow()
	w.now = w.now.Add(time.Minute)
	lastFrame := w.now.Add(-1200 * time.Millisecond)
	w.p.lead(w.now, []engine.NodeID{"a", "b", "c"}, map[engine.NodeID]time.Time{"c": lastFrame})
	w.head++
	w.views["b"].Match, w.views["c"].Match = w.head, 0
	start := w.now
	made := w.tick(900 * time.Millisecond)
	if len(made) != 1 || made[0].Node != "c" || !made[0].Out {
		t.Fatalf("got %+v within 900 ms, want the former leader dropped %v after its last frame", made, 2*time.Second)
	}
	if d := w.shrunk[0].Sub(lastFrame); d < 2*time.Second {
		t.Fatalf("dropped after %v (election at %v)", d, start)
	}
}

func TestZonePolicyReturnsWhenCaughtUp(t *testing.T) {
	w := newZoneWorld(t)
	w.views["c"].Refused, w.views["c"].Connected = true, false
	w.tick(50 * time.Millisecond)
	w.views["c"].Refused, w.views["c"].Connected = false, true
	w.views["c"].BehindBytes = 5 << 20
	if made := w.tick(10 * time.Second); len(made) != 0 {
		t.Fatalf("returned while 5 MiB behind: %+v", made)
	}
	w.views["c"].BehindBytes = 1 << 20
	if made := w.tick(1900 * time.Millisecond); len(made) != 0 {
		t.Fatalf("returned too early: %+v", made)
	}
	// A break starts the count anew.
	w.views["c"].BehindBytes = 2 << 20
	w.tick(50 * time.Millisecond)
	w.views["c"].BehindBytes = 0
	if made := w.tick(1900 * time.Millisecond); len(made) != 0 {
		t.Fatalf("returned in spite of a break: %+v", made)
	}
	if made := w.tick(200 * time.Millisecond); len(made) != 1 || made[0].Out || made[0].Node != "c" {
		t.Fatalf("got %+v", made)
	}
}

// A zone that falls whenever it returns settles at one fall a minute.
func TestZonePolicyFlapping(t *testing.T) {
	w := newZoneWorld(t)
	c := w.views["c"]
	for range 6 * 60 * 20 { // six minutes in steps of 50 ms
		in := slices.Contains(w.set.Nodes, "c")
		c.Refused, c.Connected = in, !in
		w.tick(50 * time.Millisecond)
	}
	var gaps []time.Duration
	for i := 1; i < len(w.shrunk); i++ {
		gaps = append(gaps, w.shrunk[i].Sub(w.shrunk[i-1]))
	}
	if len(gaps) < 7 {
		t.Fatalf("only %d falls: %v", len(w.shrunk), gaps)
	}
	for i, g := range gaps {
		if want := min(returnAfterMin<<i, returnAfterMax); g < want {
			t.Errorf("fall %d came %v after the one before, want at least %v", i+2, g, want)
		}
	}
}

func TestZonePolicyTrustsAgainAfterQuiet(t *testing.T) {
	w := newZoneWorld(t)
	c := w.views["c"]
	fall := func() {
		c.Refused, c.Connected = true, false
		w.tick(50 * time.Millisecond)
		c.Refused, c.Connected = false, true
	}
	for range 4 {
		fall()
		w.tick(2 * time.Minute)
	}
	if d := w.p.returnAfter("c"); d != 16*time.Second {
		t.Fatalf("after four falls: %v", d)
	}
	w.tick(fallsForgottenAfter)
	fall()
	if d := w.p.returnAfter("c"); d != returnAfterMin {
		t.Fatalf("after five quiet minutes: %v", d)
	}
}

// Self goes in first when a founding set lacks it, the dead go out before anyone comes in, and a refused
// proposal is made again.
func TestZonePolicyOrder(t *testing.T) {
	w := newZoneWorld(t)
	w.set = engine.InSync{Epoch: 3, Nodes: []engine.NodeID{"b"}}
	w.p.observe(w.now, w.set)
	w.views["b"].Refused, w.views["b"].Connected = true, false
	made := w.tick(3 * time.Second)
	want := []zoneChange{{"b", true, 3}, {"a", false, 4}, {"c", false, 5}}
	if !slices.Equal(made, want) {
		t.Fatalf("got %+v, want %+v", made, want)
	}
	w.views["c"].Refused, w.views["c"].Connected = true, false
	lost := 0
	for range 100 {
		c, ok := w.p.step(w.now, "a", w.head, []voterView{*w.views["b"], *w.views["c"]})
		if ok {
			if c.Node != "c" || !c.Out {
				t.Fatalf("proposed %+v", c)
			}
			lost++
		}
		w.now = w.now.Add(50 * time.Millisecond)
	}
	if lost != 3 {
		t.Fatalf("a proposal that had no effect was made %d times in 5 s, want 3 (every zone timeout)", lost)
	}
}

// Whatever the voters do, a change is always decided on the set's own epoch, names a voter, and changes
// something.
func TestZonePolicyRandom(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	w := newZoneWorld(t)
	for range 20_000 {
		w.head += uint64(rnd.IntN(3))
		for _, v := range w.views {
			switch rnd.IntN(40) {
			case 0:
				v.Refused, v.Connected = true, false
			case 1:
				v.Refused, v.Connected = false, true
			case 2:
				v.BehindBytes = rnd.Int64N(2 << 20)
			}
			if !v.Refused && rnd.IntN(3) > 0 {
				v.Match = w.head - uint64(rnd.IntN(2))
			}
		}
		before := slices.Clone(w.set.Nodes)
		for _, c := range w.tick(50 * time.Millisecond) {
			if c.Out != slices.Contains(before, c.Node) {
				t.Fatalf("seed %d: %+v on %v", seed, c, before)
			}
		}
	}
	if len(w.shrunk) == 0 {
		t.Fatalf("seed %d: nothing happened", seed)
	}
}
