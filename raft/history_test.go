package raft

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// A history of one topic and one group is checked against this model: n messages were published, the first next of
// them were given out (leases outlive the test), and acked holds those that were acknowledged. Those in nobody's were
// given to receives whose clients were gone: they are leased to nobody who knows of it, or released already.
type queueState struct {
	n, next       uint64
	acked, nobody offsets
}

// offsets is a set of messages; such sets compare.
type offsets [4]uint64

func (o offsets) has(off uint64) bool { return o[off/64]&(1<<(off%64)) != 0 }
func (o *offsets) flip(off uint64)    { o[off/64] ^= 1 << (off % 64) }

type historyOp struct {
	kind string // publish, receive, ack, read
	off  uint64 // ack: of which message
}

type historyResult struct {
	unknown bool
	found   bool
	off     uint64 // publish, receive: of which message; read: the number of messages
	code    errs.Code
}

var queueModel = porcupine.NondeterministicModel{
	Init: func() []any { return []any{queueState{}} },
	Step: func(state, input, output any) []any {
		s, op, out := state.(queueState), input.(historyOp), output.(historyResult)
		done := s
		ok := false
		switch op.kind {
		case "publish":
			done.n++
			ok = out.unknown || out.off == s.n
		case "receive":
			switch {
			case out.unknown:
				// What it takes from nobody is nobody's again.
				if ok = true; s.next < s.n {
					done.next++
					done.nobody.flip(s.next)
				}
			case !out.found:
				ok = s.next == s.n // what is nobody's may still be leased
			case out.off < s.next:
				if ok = s.nobody.has(out.off); ok {
					done.nobody.flip(out.off)
				}
			default:
				ok = out.off == s.next && s.next < s.n
				done.next++
			}
		case "ack":
			switch {
			case out.unknown:
				ok = op.off < s.next
			case out.code == errs.OK:
				ok = op.off < s.next && !s.acked.has(op.off) && !s.nobody.has(op.off)
			default:
				return nil // every receipt is used once, within its lease
			}
			if !done.acked.has(op.off) {
				done.acked.flip(op.off)
			}
		case "read":
			if out.unknown || out.off == s.n {
				return []any{s}
			}
			return nil
		}
		switch {
		case !ok:
			return nil
		case out.unknown && done != s:
			return []any{s, done} // it may have happened, or not
		}
		return []any{done}
	},
	Equal:             func(a, b any) bool { return a.(queueState) == b.(queueState) },
	DescribeOperation: func(input, output any) string { return fmt.Sprintf("%+v → %+v", input, output) },
}

// The model takes what is right and nothing else.
func TestHistoryModel(t *testing.T) {
	publish := func(off uint64) [2]any { return [2]any{historyOp{kind: "publish"}, historyResult{off: off}} }
	receive := func(off uint64) [2]any {
		return [2]any{historyOp{kind: "receive"}, historyResult{found: true, off: off}}
	}
	ack := func(off uint64) [2]any { return [2]any{historyOp{kind: "ack", off: off}, historyResult{}} }
	read := func(n uint64) [2]any { return [2]any{historyOp{kind: "read"}, historyResult{off: n}} }
	empty := [2]any{historyOp{kind: "receive"}, historyResult{}}
	lost := [2]any{historyOp{kind: "receive"}, historyResult{unknown: true}}
	for _, c := range []struct {
		what    string
		ok      bool
		history [][2]any
	}{
		{"in order", true, [][2]any{publish(0), read(1), receive(0), empty, ack(0), publish(1), receive(1)}},
		{"given up and given back", true, [][2]any{publish(0), publish(1), lost, receive(1), receive(0), ack(0)}},
		{"given up, and still leased", true, [][2]any{publish(0), lost, empty, publish(1), receive(1), empty, receive(0)}},
		{"given up before it did anything", true, [][2]any{publish(0), lost, receive(0), empty}},
		{"given up twice", true, [][2]any{publish(0), lost, lost, receive(0)}},
		{"leased twice", false, [][2]any{publish(0), receive(0), receive(0)}},
		{"given back twice", false, [][2]any{publish(0), lost, receive(0), receive(0)}},
		{"what nobody gave back", false, [][2]any{publish(0), publish(1), receive(0), lost, receive(0)}},
		{"passed over", false, [][2]any{publish(0), publish(1), receive(1)}},
		{"passed over for nothing", false, [][2]any{publish(0), empty, receive(0)}},
		{"two by one that was given up", false, [][2]any{publish(0), publish(1), lost, empty}},
		{"acknowledged twice", false, [][2]any{publish(0), receive(0), ack(0), ack(0)}},
		{"acknowledged while it is nobody's", false, [][2]any{publish(0), lost, ack(0), empty, receive(0)}},
		{"an old read", false, [][2]any{publish(0), read(0)}},
	} {
		var history []porcupine.Operation
		for i, op := range c.history {
			o := porcupine.Operation{ClientId: i, Input: op[0], Output: op[1], Call: int64(2 * i), Return: int64(2*i + 1)}
			if op[1].(historyResult).unknown {
				o.Return = 1 << 62
			}
			history = append(history, o)
		}
		if got := porcupine.CheckOperations(queueModel.ToModel(), history); got != c.ok {
			t.Errorf("%s: legal %v, want %v", c.what, got, c.ok)
		}
	}
}

// Decision 13: publishes, leases, acknowledgements and reads through all nodes are linearizable while leadership moves, by
// transfer, by death and because the leader's disk stands still, and while that disk is slow. So are receives that are
// given up while they run or wait: what they were given goes back, or stays leased, but is not given to two.
func TestHistoryIsLinearizable(t *testing.T) {
	seed := testSeed(t)
	disturbances := []string{"transfer", "death", "frozen disk", "slow disk"}
	rounds := len(disturbances)
	if campaign() {
		rounds = 40
	}
	total := int64(0)
	m := newMachines(seed)
	c := newCluster(t, m.use)
	c.start(founders...)
	c.inSync(3)
	c.tweak = func(cfg *Config) { m.use(cfg); cfg.Peers = nil }
	for round := range rounds {
		rnd := rand.New(rand.NewPCG(seed, uint64(round)))
		topic := fmt.Sprint("h", round)
		ctx, stop := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		var mu sync.Mutex
		var history []porcupine.Operation
		var count atomic.Int64
		start := time.Now()
		// Messages are limited by the model's bitmap, reads keep going.
		var published atomic.Int64
		// Receives given up make the search long, since each may have happened or not, at any time: no more than one in a
		// hundred operations.
		var givenUp atomic.Int64
		for client := range 8 {
			seq := rand.New(rand.NewPCG(seed+uint64(round), uint64(client)))
			wg.Go(func() {
				var leased []engine.Delivery
				for ctx.Err() == nil && count.Add(1) < 1500 {
					n := c.node(founders[seq.IntN(3)])
					if n == nil {
						<-time.After(time.Millisecond) // the node is being restarted
						continue
					}
					opCtx, cancel := context.WithTimeout(context.Background(), testTimeout)
					var in historyOp
					var out historyResult
					call := time.Since(start).Nanoseconds()
					switch k := seq.IntN(10); {
					case k < 3 && published.Add(1) < 250:
						in.kind = "publish"
						r, err := n.Propose(opCtx, Proposal{Command: publishCommand(topic, "x")})
						out = historyResult{unknown: err != nil || r.Code != errs.OK, off: r.Published.Offset}
						if err != nil && errs.From(err).Outcome() == errs.None {
							in.kind = ""
						}
					case k < 6:
						in.kind = "receive"
						cmd := &engine.Receive{Topic: topic, Group: "g", Max: 1, Visibility: time.Hour}
						p := Proposal{}
						if seq.IntN(4) == 0 {
							cmd.Park, p.Wait = true, time.Duration(seq.IntN(20))*time.Millisecond
						}
						p.Command = cmd.AppendTo(nil)
						recvCtx, giveUp := opCtx, context.CancelFunc(func() {})
						if seq.IntN(4) == 0 && givenUp.Load() < 1+count.Load()/100 {
							recvCtx, giveUp = context.WithTimeout(opCtx, time.Duration(seq.IntN(4000))*time.Microsecond)
						}
						r, err := n.Propose(recvCtx, p)
						giveUp()
						out.unknown = err != nil
						if err != nil && errs.From(err).Outcome() == errs.Unknown {
							givenUp.Add(1)
						}
						switch {
						case err != nil && errs.From(err).Outcome() == errs.None:
							in.kind = ""
						case err == nil && r.Code != errs.OK:
							in.kind = "" // no topic yet
						case len(r.Deliveries) == 1:
							out.found, out.off = true, r.Deliveries[0].Receipt.Offset
							leased = append(leased, r.Deliveries[0])
						}
					case k < 8 && len(leased) > 0:
						d := leased[len(leased)-1]
						leased = leased[:len(leased)-1]
						in = historyOp{kind: "ack", off: d.Receipt.Offset}
						r, err := n.Propose(opCtx, Proposal{Command: ackCommand(topic, "g", d)})
						out.unknown = err != nil
						if err == nil {
							out.code = r.Codes[0]
						} else if errs.From(err).Outcome() == errs.None {
							in.kind = ""
							leased = append(leased, d)
						}
					default:
						in.kind = "read"
						a, err := n.Query(opCtx, engine.Query{Kind: engine.QueryTopic, Topic: topic})
						switch {
						case errs.CodeOf(err) == errs.TopicNotFound:
						case err != nil:
							in.kind = ""
						case len(a.Topics) == 1:
							out.off = a.Topics[0].Next
						}
					}
					cancel()
					if in.kind == "" {
						continue
					}
					back := time.Since(start).Nanoseconds()
					if out.unknown {
						back = 1 << 62 // it may take effect at any time from now on
					}
					mu.Lock()
					history = append(history, porcupine.Operation{ClientId: client, Input: in, Output: out, Call: call, Return: back})
					mu.Unlock()
				}
			})
		}
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		c.eventually("operations", func() bool { return count.Load() > 300 })
		lead := c.leader()
		disturbance := disturbances[(round+int(seed%4))%len(disturbances)]
		end := func() {}
		switch disturbance {
		case "transfer":
			if err := c.node(lead).TransferLeadership(testContext(t), ""); err != nil {
				t.Fatal(err)
			}
		case "death":
			m.powerLoss(c, lead)
			c.start(lead)
		case "frozen disk":
			frozen := m.logs[lead]
			frozen.Freeze()
			thaw := sync.OnceFunc(frozen.Thaw)
			t.Cleanup(thaw)
			c.eventually("another leader that is open", func() bool {
				for _, n := range c.all() {
					if n.cfg.Name != lead && n.openTerm.Load() != 0 {
						return true
					}
				}
				return false
			})
			thaw()
		case "slow disk":
			slow := m.logs[lead]
			var one sync.Mutex // the disk's files are synced beside each other
			slow.SetSyncLatency(func() time.Duration {
				one.Lock()
				defer one.Unlock()
				return time.Duration(rnd.IntN(30)) * time.Millisecond
			})
			end = func() { slow.SetSyncLatency(nil) }
		}
		<-done
		stop()
		end()
		// Unknown operations of one client overlap its later ones: porcupine wants a client of its own for each.
		for i := range history {
			history[i].ClientId = i
		}
		result, info := porcupine.CheckOperationsVerbose(queueModel.ToModel(), history, testTimeout)
		unknown := 0
		for _, op := range history {
			if op.Output.(historyResult).unknown {
				unknown++
			}
		}
		t.Logf("round %d, %s: %d operations, %d unknown, %d of them receives", round, disturbance, len(history), unknown, givenUp.Load())
		total += givenUp.Load()
		if result != porcupine.Ok {
			file := t.TempDir() + "/history.html"
			_ = porcupine.VisualizePath(queueModel.ToModel(), info, file)
			t.Fatalf("round %d: %v (see %s)", round, result, file)
		}
		c.inSync(3)
	}
	if total == 0 {
		t.Error("no receive was given up")
	}
}
