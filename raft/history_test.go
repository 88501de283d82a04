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
// them were given out (leases outlive the test), and acked holds those that were acknowledged.
type queueState struct {
	n, next uint64
	acked   [4]uint64 // a bit each, so that states compare
}

func (s queueState) isAcked(off uint64) bool { return s.acked[off/64]&(1<<(off%64)) != 0 }

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
			if s.next < s.n {
				done.next++
				ok = out.unknown || out.found && out.off == s.next
			} else {
				ok = out.unknown || !out.found
			}
		case "ack":
			switch {
			case out.unknown:
				ok = op.off < s.next
			case out.code == errs.OK:
				ok = op.off < s.next && !s.isAcked(op.off)
			default:
				return nil // every receipt is used once, within its lease
			}
			done.acked[op.off/64] |= 1 << (op.off % 64)
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

// Decision 13: publishes, leases, acknowledgements and reads through all nodes are linearizable while leadership moves, by
// transfer, by death and because the leader's disk stands still, and while that disk is slow.
func TestHistoryIsLinearizable(t *testing.T) {
	seed := testSeed(t)
	disturbances := []string{"transfer", "death", "frozen disk", "slow disk"}
	rounds := len(disturbances)
	if campaign() {
		rounds = 40
	}
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
					// Long enough that no receive is given up: what it had been given would be released, which the model does not know.
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
						r, err := n.Propose(opCtx, Proposal{Command: cmd.AppendTo(nil)})
						out.unknown = err != nil
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
		t.Logf("round %d, %s: %d operations, %d unknown", round, disturbance, len(history), unknown)
		if result != porcupine.Ok {
			file := t.TempDir() + "/history.html"
			_ = porcupine.VisualizePath(queueModel.ToModel(), info, file)
			t.Fatalf("round %d: %v (see %s)", round, result, file)
		}
		c.inSync(3)
	}
}
