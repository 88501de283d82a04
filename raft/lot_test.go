package raft

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
)

// fakeDues answers when groups are due; nothing is ever deliverable.
type fakeDues map[engine.GroupRef]int64

func (f fakeDues) Park(*engine.Receive, engine.Stamp, func()) (bool, error) { return true, nil }

func (f fakeDues) NextDue(topic, group string) (int64, bool) {
	due, ok := f[engine.GroupRef{Topic: topic, Group: group}]
	return due, ok
}

// TestLotDueTimes parks and takes away receives of many groups, moves what they wait for, and lets time pass: the lot
// wakes each group when its time has come and says rightly when to look again, and what nobody waits for any more
// leaves nothing behind.
func TestLotDueTimes(t *testing.T) {
	const groups, steps = 40, 4000
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 1))
	t.Logf("seed %d", seed)
	l := newLot(func() {})
	l.open()
	dues := fakeDues{}
	var ops []*op
	now, woken, left := int64(1), 0, 0
	for step := range steps {
		ref := engine.GroupRef{Topic: fmt.Sprint("t", rng.IntN(groups)), Group: "g"}
		switch rng.IntN(4) {
		case 0:
			o := &op{parkUntil: time.Now().Add(time.Hour)}
			o.refs = []engine.GroupRef{ref}
			if rng.IntN(4) == 0 {
				o.refs = append(o.refs, engine.GroupRef{Topic: ref.Topic, Group: "h"})
			}
			o.since = time.Unix(int64(step), 0)
			if got := l.add(o); got != parked {
				t.Fatalf("step %d: adding a receive gave %v", step, got)
			}
			ops = append(ops, o)
		case 1:
			if len(ops) > 0 {
				k := rng.IntN(len(ops))
				l.expire(ops[k])
				ops = append(ops[:k], ops[k+1:]...)
				left++
			}
		case 2:
			delete(dues, ref)
			if rng.IntN(3) > 0 {
				dues[ref] = now + rng.Int64N(500)
			}
			l.touch(ref)
		case 3:
			now += rng.Int64N(30)
		}
		next := l.refresh(dues, now)
		want, timed := int64(0), 0
		for ref, w := range l.groups {
			due, ok := dues[ref]
			switch {
			case len(w.ops) == 0:
				t.Fatalf("step %d: nobody waits for %v", step, ref)
			case w.due == 0 && ok && due > now && !w.isReady:
				t.Fatalf("step %d: %v is due at %d, and the lot does not know", step, ref, due)
			case w.due != 0 && w.due <= now:
				t.Fatalf("step %d: %v was due at %d and is not woken at %d", step, ref, w.due, now)
			case w.due != 0:
				timed++
				if want == 0 || w.due < want {
					want = w.due
				}
			}
		}
		if next != want || len(l.dues) != timed {
			t.Fatalf("step %d: to be looked at again at %d, want %d; %d groups are queued, %d have a due time", step, next, want, len(l.dues), timed)
		}
		// The coalescer asks the engine of those that are ready, which finds nothing.
		woken += len(l.ready)
		if ride, err := l.alone(dues, engine.Stamp{Cluster: now}, nil); err != nil || len(ride) > 0 {
			t.Fatalf("step %d: %d receives ride: %v", step, len(ride), err)
		}
	}
	if woken == 0 || left == 0 {
		t.Errorf("%d groups woken, %d receives gone: the test tests nothing", woken, left)
	}
	l.close()
	for _, o := range ops {
		l.done(o)
	}
	if l.len() != 0 || len(l.dues) != 0 {
		t.Errorf("closed, the lot holds %d receives and %d due times", l.len(), len(l.dues))
	}
}

// BenchmarkLotRefresh is a step of the coalescer while receives of n groups wait for leases to end.
func BenchmarkLotRefresh(b *testing.B) {
	for _, n := range []int{10, 10_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			l := newLot(func() {})
			l.open()
			dues := fakeDues{}
			var ops []*op
			for i := range n {
				ref := engine.GroupRef{Topic: fmt.Sprint("t", i), Group: "g"}
				dues[ref] = 1 << 40
				o := &op{parkUntil: time.Now().Add(time.Hour)}
				o.refs = []engine.GroupRef{ref}
				l.add(o)
				ops = append(ops, o)
			}
			defer func() {
				for _, o := range ops {
					l.done(o)
				}
			}()
			l.refresh(dues, 1)
			for b.Loop() {
				l.touch(ops[0].refs[0])
				l.refresh(dues, 1)
			}
		})
	}
}
