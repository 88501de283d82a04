package raft

import (
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

func addCommand(key string, fields ...string) []byte {
	c := &engine.StreamAdd{Key: key}
	for _, f := range fields {
		c.Fields = append(c.Fields, []byte(f))
	}
	return c.AppendTo(nil)
}

func readGroupCommand(group string, count uint64, keys ...string) []byte {
	c := &engine.StreamReadGroup{Group: group, Consumer: "c", Count: count}
	for _, k := range keys {
		c.Streams = append(c.Streams, engine.StreamPosition{Key: k, New: true})
	}
	return c.AppendTo(nil)
}

// A read of several streams waits in the line of each. Whichever has something first serves it, in the entry that brings
// it, and nothing of it stays in the lines of the others.
func TestParkedReadOfSeveralStreams(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	lead, via := c.leader(), c.follower()
	keys := []string{"a", "b", "c"}
	for _, k := range keys {
		must(t, c.node(lead), Proposal{Command: (&engine.StreamGroup{Op: engine.GroupCreate, Key: k, Group: "g", Create: true, EntriesRead: -1}).AppendTo(nil)})
	}
	type result struct {
		r   Reply
		err error
	}
	wait := func(d time.Duration, keys ...string) chan result {
		parked := c.node(lead).coal.lot.len()
		got := make(chan result, 1)
		go func() {
			r, err := c.node(via).Propose(testContext(t), Proposal{Command: readGroupCommand("g", 1, keys...), Wait: d})
			got <- result{r, err}
		}()
		c.eventually("a parked read", func() bool { return c.node(lead).coal.lot.len() == parked+1 })
		return got
	}
	for i, k := range keys {
		got := wait(time.Minute, "a", "b", "c", "b")
		p := must(t, c.node(lead), Proposal{Command: addCommand(k, "n", k)})
		r := <-got
		if r.err != nil || r.r.Stream == nil || len(r.r.Stream.Reads) != 1 || r.r.Stream.Reads[0].Key != k || r.r.Index != p.Index {
			t.Fatalf("round %d: added in entry %d, read %+v in entry %d, %v", i, p.Index, r.r.Stream, r.r.Index, r.err)
		}
		l := c.node(lead).coal.lot
		l.mu.Lock()
		if l.size != 0 || len(l.groups) != 0 || len(l.topics) != 0 {
			t.Errorf("left in the lot: %d, %v, %v", l.size, l.groups, l.topics)
		}
		l.mu.Unlock()
	}
	// In the order of waiting, whatever else each waits for.
	first, second, third := wait(time.Minute, "a", "b"), wait(time.Minute, "b"), wait(time.Minute, "c", "b")
	for i, got := range []chan result{first, second, third} {
		must(t, c.node(lead), Proposal{Command: addCommand("b", "n", "x")})
		if r := <-got; r.err != nil || r.r.Stream == nil {
			t.Fatalf("waiter %d: %+v, %v", i, r.r, r.err)
		}
	}
	// Time ends it, and so does the end of one of the groups.
	if r := <-wait(50*time.Millisecond, "a", "b"); r.err != nil || r.r.Stream != nil {
		t.Errorf("when its time was over: %+v, %v", r.r, r.err)
	}
	got := wait(time.Minute, "a", "b")
	must(t, c.node(lead), Proposal{Command: (&engine.StreamGroup{Op: engine.GroupDestroy, Key: "b", Group: "g"}).AppendTo(nil)})
	if r := <-got; errs.CodeOf(r.err) != errs.GroupNotFound && r.r.Code != errs.GroupNotFound {
		t.Errorf("when a group went: %+v, %v", r.r, r.err)
	}
	c.agree()
}

// A waiting read of streams waits on the node that leads, is answered from there, and goes to the next leader.
func TestWaitingRead(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.inSync(3)
	lead, via := c.leader(), c.follower()
	must(t, c.node(lead), Proposal{Command: addCommand("a", "n", "old")})
	type result struct {
		a   engine.Answer
		err error
	}
	read := func(wait time.Duration) chan result {
		got := make(chan result, 1)
		q := engine.Query{Kind: engine.QueryStreamRead, Wait: wait, Stream: &engine.StreamQuery{Streams: []engine.StreamPosition{{Key: "a", ID: engine.StreamIDMax}, {Key: "b"}}}}
		go func() {
			a, err := c.node(via).Query(testContext(t), q)
			got <- result{a, err}
		}()
		return got
	}
	if r := <-read(20 * time.Millisecond); r.err != nil || r.a.Stream.HasEntries() {
		t.Fatalf("when its time was over: %+v, %v", r.a.Stream, r.err)
	}
	got := read(time.Minute)
	c.eventually("a read that waits on the leader", func() bool { return c.node(lead).waitingReads.Load() == 1 })
	// Another kind of key in the stream's place ends nothing.
	must(t, c.node(lead), Proposal{Command: (&engine.StringSet{Key: "b", Value: []byte("x")}).AppendTo(nil)})
	if err := c.node(lead).TransferLeadership(testContext(t), ""); err != nil {
		t.Fatal(err)
	}
	c.eventually("the read to wait on the next leader", func() bool {
		l := c.leader()
		return l != "" && c.node(l).waitingReads.Load() == 1
	})
	must(t, c.node(via), Proposal{Command: (&engine.KeyDelete{Keys: []string{"b"}}).AppendTo(nil)})
	must(t, c.node(via), Proposal{Command: addCommand("b", "n", "new")})
	r := <-got
	if r.err != nil || len(r.a.Stream.Reads) != 2 || len(r.a.Stream.Reads[1].Entries) != 1 {
		t.Fatalf("%+v, %v", r.a.Stream, r.err)
	}
	c.eventually("nobody to wait", func() bool { return c.node(c.leader()).waitingReads.Load() == 0 })
}
