package raft

import (
	"testing"
	"time"

	"tercet.dev/tercet/engine"
)

// testClock is a pair of clocks that a test moves.
type testClock struct {
	mono time.Time
	wall time.Time
}

func newTestClock() *testClock {
	return &testClock{mono: time.Unix(1_000, 0), wall: time.UnixMilli(1_700_000_000_000)}
}

func (c *testClock) monoNow() time.Time { return c.mono }
func (c *testClock) wallNow() time.Time { return c.wall }

// pass lets time pass on both.
func (c *testClock) pass(d time.Duration) {
	c.mono = c.mono.Add(d)
	c.wall = c.wall.Add(d)
}

func TestClusterClockRunsAtTheMonotonicRate(t *testing.T) {
	tc := newTestClock()
	c := newClusterClock(tc.monoNow, tc.wallNow, false, 1, engine.Stamp{Cluster: 5_000})
	// A leader that stamps every 10 ms and sees each entry applied 7 ms later, with four in flight.
	var stamps []engine.Stamp
	for range 1_000 {
		stamps = append(stamps, c.now())
		tc.pass(7 * time.Millisecond)
		c.follow(1, stamps[len(stamps)-1])
		tc.pass(3 * time.Millisecond)
	}
	if got := c.now().Cluster; got != 5_000+10_000 {
		t.Fatalf("cluster time after 10 s: %d, want 15000", got)
	}
}

func TestClusterClockIgnoresSteps(t *testing.T) {
	for _, step := range []time.Duration{time.Hour, -time.Hour} {
		tc := newTestClock()
		c := newClusterClock(tc.monoNow, tc.wallNow, false, 1, engine.Stamp{Cluster: 1, Wall: tc.wall.UnixMilli()})
		before := c.now()
		tc.wall = tc.wall.Add(step)
		tc.pass(time.Second)
		after := c.now()
		if d := after.Cluster - before.Cluster; d != 1000 {
			t.Errorf("step %v: cluster time moved by %d ms in a second", step, d)
		}
		if after.Wall < before.Wall {
			t.Errorf("step %v: wall stamp fell from %d to %d", step, before.Wall, after.Wall)
		}
		if step > 0 && after.Wall-before.Wall < step.Milliseconds() {
			t.Errorf("step %v: wall stamp does not follow the wall clock forward", step)
		}
	}
}

// A cluster that was down for an hour: cluster time goes on where it stood, wall time shows the hour.
func TestClusterClockStandsStillWhileNothingRuns(t *testing.T) {
	tc := newTestClock()
	recovered := engine.Stamp{Cluster: 77_000, Wall: tc.wall.UnixMilli()}
	tc.pass(time.Hour)
	c := newClusterClock(tc.monoNow, tc.wallNow, false, 1, recovered)
	s := c.now()
	if s.Cluster != 77_000 {
		t.Errorf("cluster time %d, want 77000", s.Cluster)
	}
	if s.Wall != recovered.Wall+time.Hour.Milliseconds() {
		t.Errorf("wall time %d did not follow", s.Wall)
	}
}

// A follower that becomes leader goes on from the last stamp it saw, and never below.
func TestClusterClockFollower(t *testing.T) {
	tc := newTestClock()
	c := newClusterClock(tc.monoNow, tc.wallNow, false, 1, engine.Stamp{})
	tc.pass(time.Minute)
	c.follow(1, engine.Stamp{Cluster: 500_000, Wall: tc.wall.UnixMilli() + 9_000})
	tc.pass(2 * time.Second)
	s := c.now()
	if s.Cluster != 502_000 {
		t.Errorf("cluster time %d, want 502000", s.Cluster)
	}
	if s.Wall != tc.wall.UnixMilli()+7_000 {
		t.Errorf("wall stamp %d is below one already used", s.Wall)
	}
	c.follow(1, engine.Stamp{Cluster: 400_000, Wall: 1})
	if again := c.now(); again != s {
		t.Errorf("an old stamp moved the clock from %v to %v", s, again)
	}
}

// The virtual clock advances both clocks, and both go on from there.
func TestClusterClockVirtual(t *testing.T) {
	tc := newTestClock()
	c := newClusterClock(tc.monoNow, tc.wallNow, true, 1, engine.Stamp{})
	s := c.now()
	hour := time.Hour.Milliseconds()
	c.follow(1, engine.Stamp{Cluster: s.Cluster + hour, Wall: s.Wall + hour})
	tc.pass(time.Second)
	got := c.now()
	if got.Cluster != s.Cluster+hour+1000 || got.Wall != s.Wall+hour+1000 {
		t.Errorf("one second after advancing an hour: %+v, from %+v", got, s)
	}
}

// Whatever happens, neither clock falls between two stamps of one node.
func TestClusterClockNeverFalls(t *testing.T) {
	for _, virtual := range []bool{false, true} {
		tc := newTestClock()
		c := newClusterClock(tc.monoNow, tc.wallNow, virtual, 1, engine.Stamp{})
		var last engine.Stamp
		steps := []time.Duration{0, time.Millisecond, -time.Hour, time.Hour, -2 * time.Hour, 3 * time.Second}
		for i := range 600 {
			tc.wall = tc.wall.Add(steps[i%len(steps)])
			tc.pass(time.Duration(i%5) * time.Millisecond)
			s := c.now()
			if s.Cluster < last.Cluster || s.Wall < last.Wall {
				t.Fatalf("virtual %v, step %d: %+v after %+v", virtual, i, s, last)
			}
			last = s
			if i%3 == 0 {
				c.follow(1, s)
			}
		}
	}
}

func TestClusterClockOfALongerLivedFollowerIsNotAhead(t *testing.T) {
	tc := newTestClock()
	c := newClusterClock(tc.monoNow, tc.wallNow, false, 1, engine.Stamp{Cluster: 1_000})
	tc.pass(5 * time.Second) // this node runs alone before its leader does
	c.follow(7, engine.Stamp{Cluster: 1_200})
	tc.pass(2 * time.Second)
	if got := c.now().Cluster; got != 3_200 {
		t.Fatalf("cluster time two seconds after the leader's stamp of 1200: %d, want 3200", got)
	}
	// Within a term the higher of the two counts, so that no entry's travelling time is lost.
	c.follow(7, engine.Stamp{Cluster: 3_100})
	if got := c.now().Cluster; got != 3_200 {
		t.Fatalf("cluster time after a stamp that travelled 100 ms: %d, want 3200", got)
	}
}

// A leader's own first entry sets nothing back, however long it takes to the log: its clock is cluster time.
func TestClusterClockOfALeaderIsItsOwn(t *testing.T) {
	tc := newTestClock()
	c := newClusterClock(tc.monoNow, tc.wallNow, false, 3, engine.Stamp{Cluster: 10_000})
	tc.pass(time.Second)
	own := c.stamp()
	tc.pass(2 * time.Second) // a slow disk
	c.follow(4, own)
	if got := c.now().Cluster; got != 13_000 {
		t.Fatalf("cluster time two seconds after the stamp of 11000: %d, want 13000", got)
	}
	// Another leader's does, once, and not that of an entry of an earlier term that is applied later.
	c.follow(5, engine.Stamp{Cluster: 12_990})
	tc.pass(time.Second)
	c.follow(4, engine.Stamp{Cluster: 11_500})
	if got := c.now().Cluster; got != 13_990 {
		t.Fatalf("cluster time a second after another leader's stamp of 12990: %d, want 13990", got)
	}
}

// A node that catches up with old entries of an idle cluster learns the time from the leader's card.
func TestClusterClockHearsTheLeader(t *testing.T) {
	for _, virtual := range []bool{false, true} {
		tc := newTestClock()
		c := newClusterClock(tc.monoNow, tc.wallNow, virtual, 3, engine.Stamp{Cluster: 10_000})
		c.follow(3, engine.Stamp{Cluster: 11_000}) // stamped half a minute ago
		before := c.now()
		c.hear(3, 41_000)
		c.hear(2, 90_000) // a leader that is none any more
		c.hear(3, 40_000) // overtaken on its way
		s := c.now()
		if s.Cluster != 41_000 || s.Wall != before.Wall {
			t.Fatalf("virtual %v: %+v, then %+v", virtual, before, s)
		}
		c.hear(4, 40_500)
		tc.pass(time.Second)
		if got := c.now().Cluster; got != 41_500 {
			t.Fatalf("a second after the new leader said 40500: %d", got)
		}
	}
}
