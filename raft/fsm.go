package raft

import (
	"fmt"
	"io"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/engine"
)

// machine adapts the engine to hraft. Its methods run on hraft's apply goroutine, one at a time; replay runs
// them before there is one.
type machine struct {
	n *Node

	fx      engine.Effects
	results []engine.Result
	// responses is handed to hraft, which wants one per entry; ours travel another way.
	responses []any
	// dead is set by a fatal error: what follows is not applied.
	dead bool
}

var (
	_ hraft.BatchingFSM        = (*machine)(nil)
	_ hraft.ConfigurationStore = (*machine)(nil)
)

// ApplyBatch implements hraft.BatchingFSM.
func (m *machine) ApplyBatch(logs []*hraft.Log) []any {
	if cap(m.responses) < len(logs) {
		m.responses = make([]any, len(logs))
	}
	responses := m.responses[:len(logs)]
	if m.dead || len(logs) == 0 {
		return responses
	}
	// A follower may learn of a commit before its own disk has the entries. Nothing is applied that a crash
	// could take out of the local log again (R3).
	if err := m.n.waitDurable(logs[len(logs)-1].Index); err != nil {
		m.die(err)
		return responses
	}
	for _, l := range logs {
		if err := m.apply(l); err != nil {
			m.die(fmt.Errorf("applying entry %d of term %d: %w", l.Index, l.Term, err))
			break
		}
	}
	m.n.applied()
	return responses
}

// die stops the node for an error that must not be survived: the engine's state may differ from the others'.
func (m *machine) die(err error) {
	m.dead = true
	m.n.fatal(err)
}

// apply applies one entry.
func (m *machine) apply(l *hraft.Log) error {
	eng := m.n.eng
	switch l.Type {
	case hraft.LogCommand:
		b := m.n.coal.take(l.Data)
		if applied, _ := eng.Applied(); l.Index <= applied {
			return nil // replayed before hraft started; nobody waits for it
		}
		m.fx.Answer = b != nil
		results, err := eng.Apply(l.Index, l.Term, l.Data, m.results[:0], &m.fx)
		if err != nil {
			return err
		}
		m.results = results
		m.n.clock.follow(l.Term, eng.Stamp())
		m.n.noteEffects(&m.fx)
		if b != nil {
			if len(results) != len(b.ops) {
				return fmt.Errorf("%d results for %d commands", len(results), len(b.ops))
			}
			m.n.settle(b, l.Index, l.Term, results)
		}
		clear(m.results) // they hold on to deliveries
		return nil
	case hraft.LogConfiguration:
		if applied, _ := eng.Applied(); l.Index <= applied {
			return nil
		}
		members := members(hraft.DecodeConfiguration(l.Data))
		if err := eng.ApplyConfiguration(l.Index, l.Term, l.Data, members, &m.fx); err != nil {
			return err
		}
		m.n.noteEffects(&m.fx)
		return nil
	case hraft.LogNoop, hraft.LogBarrier:
		if applied, _ := eng.Applied(); l.Index <= applied {
			return nil
		}
		return eng.ApplyEmpty(l.Index, l.Term)
	default:
		return fmt.Errorf("entry of unknown type %d", l.Type)
	}
}

// members translates a configuration.
func members(c hraft.Configuration) []engine.Member {
	out := make([]engine.Member, 0, len(c.Servers))
	for _, s := range c.Servers {
		out = append(out, engine.Member{ID: engine.NodeID(s.ID), Voter: s.Suffrage == hraft.Voter})
	}
	return out
}

// Apply implements hraft.FSM; hraft calls ApplyBatch instead.
func (m *machine) Apply(l *hraft.Log) any {
	m.ApplyBatch([]*hraft.Log{l})
	return nil
}

// StoreConfiguration implements hraft.ConfigurationStore, by which hraft knows that configurations survive in
// the state machine. Those that are applied come through ApplyBatch.
func (m *machine) StoreConfiguration(uint64, hraft.Configuration) {}

// Snapshot implements hraft.FSM. Snapshots are what the engine's checkpoint says (decision 2); hraft's own
// triggers are off, and nothing else asks.
func (m *machine) Snapshot() (hraft.FSMSnapshot, error) { return nil, hraft.ErrNothingNewToSnapshot }

// Restore implements hraft.FSM. The state came with the sink, and its Close made it the node's state on disk;
// here it only becomes the one in use.
func (m *machine) Restore(r io.ReadCloser) error {
	_ = r.Close() // an empty reader: see snapshots.Open
	if err := m.n.eng.Reopen(); err != nil {
		m.die(fmt.Errorf("opening the installed state: %w", err))
		return err
	}
	_, term := m.n.eng.Applied()
	m.n.clock.follow(term, m.n.eng.Stamp())
	m.n.noteEffects(&engine.Effects{InSync: true, Configuration: true})
	m.n.watches.signalAll()
	m.n.applied()
	return nil
}
