package transport

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	hraft "github.com/hashicorp/raft"
)

func voters(ids ...hraft.ServerID) (c hraft.Configuration) {
	for _, id := range ids {
		c.Servers = append(c.Servers, hraft.Server{ID: id, Suffrage: hraft.Voter})
	}
	return c
}

// table makes the watermark of node a among a, b and c, with all of them required, in term 5.
func table(own *uint64) (*Watermark, *[]Advance) {
	var told []Advance
	w := newWatermark("a", func() uint64 { return *own }, func(a Advance) { told = append(told, a) })
	w.SetConfiguration(voters("a", "b", "c"))
	w.SetRequired("a", "b", "c")
	w.Lead(5)
	return w, &told
}

var epoch = time.Now()

func at(n int) time.Time { return epoch.Add(time.Duration(n) * time.Second) }

func TestWatermarkIsTheLowestRequiredRow(t *testing.T) {
	own := uint64(0)
	w, told := table(&own)
	w.matched("b", 5, 10, at(0))
	w.matched("c", 5, 8, at(0))
	if l := w.Level(); l.Required != 0 || l.All != 0 {
		t.Errorf("own disk holds nothing: %+v", l)
	}
	own = 9
	w.logDurable()
	if l := w.Level(); l.Term != 5 || l.Required != 8 || l.All != 8 {
		t.Errorf("got %+v", l)
	}
	w.matched("c", 5, 7, at(0)) // an older answer
	w.matched("c", 5, 20, at(0))
	if l := w.Level(); l.Required != 9 {
		t.Errorf("got %+v", l)
	}
	for i, a := range *told {
		if i > 0 && a.Required < (*told)[i-1].Required {
			t.Errorf("told %+v", *told)
		}
	}
	if last := (*told)[len(*told)-1]; last.Required != 9 {
		t.Errorf("told %+v", *told)
	}
	if w.Match("a") != 9 || w.Match("b") != 10 || w.Match("x") != 0 {
		t.Errorf("rows %d, %d, %d", w.Match("a"), w.Match("b"), w.Match("x"))
	}
	holders := w.Holders(10, nil)
	slices.Sort(holders)
	if !slices.Equal(holders, []hraft.ServerID{"b", "c"}) {
		t.Errorf("10 is held by %v", holders)
	}
	if holders := w.Holders(9, nil); len(holders) != 3 {
		t.Errorf("9 is held by %v", holders)
	}
}

// TestWatermarkResetsWithTheTerm: a deposed and re-elected leader may hold other entries under the same indexes.
func TestWatermarkResetsWithTheTerm(t *testing.T) {
	own := uint64(100)
	w, told := table(&own)
	w.matched("b", 5, 100, at(0))
	w.matched("c", 5, 100, at(0))
	if l := w.Level(); l.Required != 100 {
		t.Fatalf("got %+v", l)
	}
	w.Lead(7)
	if l := w.Level(); l.Term != 7 || l.Required != 0 {
		t.Errorf("after the reset: %+v", l)
	}
	w.matched("b", 5, 100, at(0)) // answers of the old term
	w.matched("c", 5, 100, at(0))
	w.exchanged("b", 5, at(1), at(1))
	if l := w.Level(); l.Required != 0 || !l.Confirmed.IsZero() {
		t.Errorf("an answer of the old term counted: %+v", l)
	}
	w.Lead(6) // a late sender of an older term
	w.matched("b", 6, 100, at(0))
	if l := w.Level(); l.Term != 7 || l.Required != 0 {
		t.Errorf("an older term came back: %+v", l)
	}
	w.matched("b", 7, 3, at(0))
	w.matched("c", 7, 4, at(0))
	if last := (*told)[len(*told)-1]; last.Term != 7 || last.Required != 3 {
		t.Errorf("told %+v", *told)
	}
}

func TestWatermarkOfAnotherSet(t *testing.T) {
	own := uint64(10)
	w, told := table(&own)
	w.matched("b", 5, 10, at(0))
	if l := w.SetRequired("a", "b"); l.Required != 10 || l.Set != 2 || l.All != 0 {
		t.Errorf("shrunk: %+v", l)
	}
	w.exchanged("b", 5, at(1), at(1))
	if last := (*told)[len(*told)-1]; last.Required != 10 || last.Set != 2 {
		t.Errorf("told %+v", last)
	}
	w.matched("c", 5, 4, at(0))
	if l := w.SetRequired("a", "b", "c"); l.Required != 4 || l.Set != 3 {
		t.Errorf("grown: %+v", l)
	}
	w.matched("c", 5, 5, at(0))
	if last := (*told)[len(*told)-1]; last.Required != 5 || last.Set != 3 || last.All != 5 {
		t.Errorf("told %+v", last)
	}
	if l := w.SetRequired(); l.Required != 0 {
		t.Errorf("nobody required: %+v", l)
	}
	w.SetConfiguration(voters("a", "b"))
	if l := w.Level(); l.All != 10 {
		t.Errorf("c left: %+v", l)
	}
	if w.Match("c") != 0 {
		t.Error("the row of a node that left remains")
	}
}

func TestConfirmedByAMajority(t *testing.T) {
	own := uint64(0)
	w, _ := table(&own)
	confirmed := func() time.Time { _, at := w.Confirmed(); return at }
	if !confirmed().IsZero() {
		t.Error("confirmed by nobody")
	}
	w.exchanged("b", 5, at(3), at(9))
	if !confirmed().Equal(at(3)) {
		t.Errorf("one of two others: %s", confirmed().Sub(epoch))
	}
	w.exchanged("c", 5, at(2), at(9))
	if !confirmed().Equal(at(3)) {
		t.Errorf("the older of two: %s", confirmed().Sub(epoch))
	}
	w.exchanged("b", 5, at(1), at(10)) // an answer to an earlier request, held back for long
	if !confirmed().Equal(at(3)) {
		t.Errorf("went back to %s", confirmed().Sub(epoch))
	}
	w.exchanged("x", 5, at(20), at(20)) // not a voter
	if !confirmed().Equal(at(3)) {
		t.Errorf("a stranger confirmed %s", confirmed().Sub(epoch))
	}
	w.SetConfiguration(voters("a", "b", "c", "d", "e"))
	if !confirmed().Equal(at(2)) {
		t.Errorf("of five: %s", confirmed().Sub(epoch))
	}
	w.SetConfiguration(voters("b", "c")) // this node is being removed: both others are the majority
	if !confirmed().Equal(at(2)) {
		t.Errorf("without itself: %s", confirmed().Sub(epoch))
	}
	w.SetConfiguration(voters("a"))
	if confirmed().Before(time.Now().Add(-time.Minute)) {
		t.Errorf("alone: %s", confirmed().Sub(epoch))
	}
}

func TestWaitConfirmed(t *testing.T) {
	own := uint64(0)
	w, _ := table(&own)
	results := make(chan error, 8)
	wait := func(ctx context.Context, term uint64, since time.Time) {
		go func() { results <- w.WaitConfirmed(ctx, term, since) }()
	}
	wait(patient(t), 5, at(2))
	w.exchanged("b", 5, at(1), at(9)) // sent before the read came
	none(t, results, "confirmed by an earlier request")
	w.exchanged("c", 5, at(2), at(9))
	if err := receive(t, results); err != nil {
		t.Error(err)
	}
	wait(patient(t), 5, at(7))
	w.passed(5)
	if err := receive(t, results); !errors.Is(err, ErrTermPassed) {
		t.Errorf("got %v", err)
	}
	wait(patient(t), 5, at(1))
	if err := receive(t, results); !errors.Is(err, ErrTermPassed) {
		t.Errorf("got %v", err)
	}
	w.Lead(6)
	ctx, cancel := context.WithCancel(context.Background())
	wait(ctx, 6, at(1))
	cancel()
	if err := receive(t, results); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	w.SetConfiguration(voters("a"))
	wait(patient(t), 6, time.Now())
	if err := receive(t, results); err != nil {
		t.Error(err)
	}
}

func TestProgress(t *testing.T) {
	own := uint64(5)
	w, _ := table(&own)
	p := w.Progress("b")
	if p.ID != "b" || p.Match != 0 || p.Behind.IsZero() || !p.MatchAt.IsZero() || !p.Exchange.IsZero() {
		t.Errorf("at the election: %+v", p)
	}
	if s := p.Silent(p.Behind.Add(time.Second)); s != time.Second {
		t.Errorf("silent for %s since the election", s)
	}
	w.matched("b", 5, 3, p.Behind.Add(2*time.Second))
	w.exchanged("b", 5, at(1), at(2))
	p = w.Progress("b")
	if p.Match != 3 || p.Behind.IsZero() || p.Silent(p.MatchAt.Add(time.Second)) != time.Second || !p.Exchange.Equal(at(1)) || !p.Answered.Equal(at(2)) {
		t.Errorf("half way: %+v", p)
	}
	w.matched("b", 5, 5, at(3))
	if p = w.Progress("b"); !p.Behind.IsZero() || p.Silent(at(1000)) != 0 {
		t.Errorf("caught up: %+v", p)
	}
	own = 6
	w.logDurable()
	if p = w.Progress("b"); p.Behind.IsZero() {
		t.Errorf("behind again: %+v", p)
	}
	if p = w.Progress("a"); p.Match != 6 || p.Silent(at(1000)) != 0 {
		t.Errorf("itself: %+v", p)
	}
	if p = w.Progress("x"); p != (Progress{ID: "x"}) {
		t.Errorf("a stranger: %+v", p)
	}
}

// TestAdvanceOnlyRises: whatever the order of the answers, the node hears every field rise within a term and set.
func TestAdvanceOnlyRises(t *testing.T) {
	var mu sync.Mutex
	var told []Advance
	own := uint64(1 << 40)
	w := newWatermark("a", func() uint64 { return own }, func(a Advance) {
		mu.Lock()
		told = append(told, a)
		mu.Unlock()
	})
	w.SetConfiguration(voters("a", "b", "c"))
	w.SetRequired("a", "b", "c")
	w.Lead(1)
	var wg sync.WaitGroup
	for _, id := range []hraft.ServerID{"b", "c"} {
		for range 4 {
			wg.Go(func() {
				for i := range 500 {
					w.matched(id, 1, uint64(i+1), at(i))
					w.exchanged(id, 1, at(i), at(i))
				}
			})
		}
	}
	wg.Wait()
	for i := 1; i < len(told); i++ {
		a, b := told[i-1], told[i]
		if b.Required < a.Required || b.All < a.All || b.Confirmed.Before(a.Confirmed) {
			t.Fatalf("%+v after %+v", b, a)
		}
	}
	if last := told[len(told)-1]; last.Required != 500 || !last.Confirmed.Equal(at(499)) {
		t.Errorf("at last %+v", last)
	}
}
