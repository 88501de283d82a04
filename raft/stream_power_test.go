package raft

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// streamLoad is clients of the Valkey port as the log sees them: each adds to two streams by one transaction, reads and
// acknowledges in a group, and knows what it was told.
type streamLoad struct {
	t    *testing.T
	quit atomic.Bool
	wg   sync.WaitGroup

	mu sync.Mutex
	// pairs are transactions that were confirmed: the IDs they gave in both streams by the client's number; tried are all.
	pairs map[string][2]engine.StreamID
	tried map[string]bool
	// acked are entries of the first stream whose acknowledgement was confirmed.
	acked map[engine.StreamID]bool
	// unknown counts outcomes that were not told.
	unknown int
}

func addTo(key, value string) *engine.StreamAdd {
	return &engine.StreamAdd{Key: key, Fields: [][]byte{[]byte("n"), []byte(value)}}
}

func startStreams(t *testing.T, clients int, via func() *Node) *streamLoad {
	s := &streamLoad{t: t, pairs: map[string][2]engine.StreamID{}, tried: map[string]bool{}, acked: map[engine.StreamID]bool{}}
	for i := range clients {
		s.wg.Go(func() { s.produce(i, via) })
		s.wg.Go(func() { s.consume(i, via) })
	}
	t.Cleanup(s.stop)
	return s
}

func (s *streamLoad) stop() {
	s.quit.Store(true)
	s.wg.Wait()
}

func (s *streamLoad) produce(client int, via func() *Node) {
	for n := 0; !s.quit.Load(); n++ {
		node := via()
		if node == nil {
			<-time.After(time.Millisecond) // the node is being restarted
			continue
		}
		name := fmt.Sprintf("%d-%d", client, n)
		x := &engine.Exec{Ops: []engine.ExecOp{{Command: addTo("left", name)}, {Command: addTo("right", name)}}}
		s.mu.Lock()
		s.tried[name] = true
		s.mu.Unlock()
		r, err := node.Propose(testContext(s.t), Proposal{Command: x.AppendTo(nil)})
		s.mu.Lock()
		switch {
		case err == nil && r.Stream != nil && len(r.Stream.Exec) == 2:
			s.pairs[name] = [2]engine.StreamID{r.Stream.Exec[0].Result.Published.Stream, r.Stream.Exec[1].Result.Published.Stream}
		case errs.From(err).Outcome() == errs.None:
			delete(s.tried, name)
		default:
			s.unknown++
		}
		s.mu.Unlock()
	}
}

func (s *streamLoad) consume(client int, via func() *Node) {
	for !s.quit.Load() {
		node := via()
		if node == nil {
			<-time.After(time.Millisecond)
			continue
		}
		read := &engine.StreamReadGroup{Group: "g", Consumer: fmt.Sprint("c", client), Count: 4, Park: true, Streams: []engine.StreamPosition{{Key: "left", New: true}}}
		r, err := node.Propose(testContext(s.t), Proposal{Command: read.AppendTo(nil), Wait: 50 * time.Millisecond})
		if err != nil || r.Stream == nil || len(r.Stream.Reads) == 0 {
			continue
		}
		var ids []engine.StreamID
		s.mu.Lock()
		for _, e := range r.Stream.Reads[0].Entries {
			if s.acked[e.ID] {
				s.t.Errorf("entry %v was given by > after its acknowledgement was confirmed", e.ID)
			}
			ids = append(ids, e.ID)
		}
		s.mu.Unlock()
		a, err := node.Propose(testContext(s.t), Proposal{Command: (&engine.StreamAck{Key: "left", Group: "g", IDs: ids}).AppendTo(nil)})
		if err != nil {
			continue
		}
		if a.Count != int64(len(ids)) {
			s.t.Errorf("of %d entries just read %d were acknowledged", len(ids), a.Count)
		}
		s.mu.Lock()
		for _, id := range ids {
			s.acked[id] = true
		}
		s.mu.Unlock()
	}
}

// more waits until n more transactions were confirmed.
func (s *streamLoad) more(c *cluster, n int) {
	count := func() int {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.pairs)
	}
	before := count()
	c.eventually("transactions to be confirmed", func() bool { return count() >= before+n })
}

// content reads a whole stream: the values in order, with their IDs.
func (s *streamLoad) content(n *Node, key string) map[string][]engine.StreamID {
	s.t.Helper()
	found := map[string][]engine.StreamID{}
	from := engine.StreamID{}
	for {
		q := engine.Query{Kind: engine.QueryStreamRange, Topic: key, Stream: &engine.StreamQuery{Start: from, End: engine.StreamID{Ms: 1<<64 - 1, Seq: 1<<64 - 1}, Count: 1000}}
		a, err := n.Query(testContext(s.t), q)
		if err != nil {
			s.t.Fatal(err)
		}
		if len(a.Stream.Reads) == 0 || len(a.Stream.Reads[0].Entries) == 0 {
			return found
		}
		for _, e := range a.Stream.Reads[0].Entries {
			found[string(e.Fields[1])] = append(found[string(e.Fields[1])], e.ID)
			from = engine.StreamID{Ms: e.ID.Ms, Seq: e.ID.Seq + 1}
		}
	}
}

// check: every confirmed transaction is in both streams, once, under the IDs it gave; no transaction is in one of them alone;
// and what is pending is nothing that was acknowledged.
func (s *streamLoad) check(n *Node) {
	s.t.Helper()
	left, right := s.content(n, "left"), s.content(n, "right")
	for name, ids := range s.pairs {
		if l, r := left[name], right[name]; len(l) != 1 || len(r) != 1 || l[0] != ids[0] || r[0] != ids[1] {
			s.t.Errorf("transaction %s gave %v and was confirmed; the streams hold %v and %v", name, ids, l, r)
		}
	}
	for name, ids := range left {
		if !s.tried[name] || len(ids) != 1 || len(right[name]) != 1 {
			s.t.Errorf("transaction %s is in the streams as %v and %v; tried: %t", name, ids, right[name], s.tried[name])
		}
	}
	if len(left) != len(right) {
		s.t.Errorf("%d entries on the left, %d on the right", len(left), len(right))
	}
	a, err := n.Query(testContext(s.t), engine.Query{Kind: engine.QueryPendingRange, Topic: "left", Group: "g",
		Stream: &engine.StreamQuery{End: engine.StreamID{Ms: 1<<64 - 1, Seq: 1<<64 - 1}, Count: 1 << 20}})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, p := range a.Stream.Pending.Entries {
		if s.acked[p.ID] {
			s.t.Errorf("entry %v is pending after its acknowledgement was confirmed", p.ID)
		}
	}
}

// S14: power losses of one, two and all three nodes under both protocols at once. What a transaction said is in both streams
// or, unless it was confirmed, in none; acknowledgements hold; all states agree.
func TestPowerLossesWithStreams(t *testing.T) {
	seed := testSeed(t)
	losses := 4
	if campaign() {
		losses = 200
	}
	rnd := rand.New(rand.NewPCG(seed, 11))
	m := newMachines(seed)
	c := newCluster(t, m.use)
	c.start(founders...)
	c.inSync(3)
	must(t, c.node(c.leader()), Proposal{Command: (&engine.StreamGroup{Op: engine.GroupCreate, Key: "left", Group: "g", Create: true, EntriesRead: -1}).AppendTo(nil)})
	c.tweak = func(cfg *Config) { m.use(cfg); cfg.Peers = nil }
	var turn atomic.Int64
	any := func() *Node { return c.node(founders[turn.Add(1)%3]) }
	l, consumed, streams := startLoad(t, 3, any), startConsumers(t, 2, any), startStreams(t, 3, any)
	m.losePower(c, rnd, losses, func() {
		l.more(c, 20)
		streams.more(c, 40)
	})
	streams.more(c, 40)
	l.stop()
	consumed.stop()
	streams.stop()
	c.agree()
	l.check(c, c.node(c.follower()))
	consumed.check(c)
	streams.check(c.node(c.follower()))
	t.Logf("%d transactions confirmed, %d unknown; %d entries acknowledged", len(streams.pairs), streams.unknown, len(streams.acked))
}
