package engine

import (
	"fmt"
	"sync"
	"testing"
	"time"
)

// TestQueriesBesideEachOther: several look at one group at once, each at another part of its set, and neither they nor
// what is applied afterwards mistake one part for another.
func TestQueriesBesideEachOther(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	const chunks, size = 4, chunkMask + 1
	p := &Publish{Topic: "t"}
	for i := range chunks * size {
		p.Messages = append(p.Messages, NewMessage{Body: fmt.Append(nil, i), Retention: time.Hour})
	}
	first := l.apply(p)[0].Published
	given := l.apply(&Receive{Topic: "t", Group: "g", Max: chunks * size, Visibility: time.Minute})[0].Deliveries
	if len(given) != chunks*size {
		t.Fatalf("%d were given", len(given))
	}
	done := &Settle{Topic: "t", Group: "g", Op: Acknowledge}
	for i := range chunks {
		done.Receipts = append(done.Receipts, given[i*size+i].Receipt) // another one of each chunk
	}
	l.apply(done)
	var all sync.WaitGroup
	for i := range chunks {
		all.Go(func() {
			for range 200 {
				for k := range chunks {
					a, err := l.e.Query(Query{Kind: QueryStory, Topic: "t", ID: first.ID(i*size + k)})
					want := StateLeased
					if k == i {
						want = StateAcknowledged
					}
					if err != nil || a.Story.Groups[0].State != want {
						t.Errorf("message %d of chunk %d: %+v, %v; want %v", k, i, a.Story, err, want)
						return
					}
				}
			}
		})
	}
	all.Wait()
}
