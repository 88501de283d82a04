package raft

import (
	"fmt"
	"time"

	"tercet.dev/tercet/engine"
)

const (
	// checkpointEvery is the longest time between two checkpoints of a state that changes.
	checkpointEvery = 30 * time.Second
	// checkpointLook is how often the loop looks.
	checkpointLook = 250 * time.Millisecond
	// keepLogBytes is how much of the log below the checkpoint stays for followers that lag: catching up from
	// the log is cheaper than a snapshot, for them and for the leader.
	keepLogBytes = 128 << 20
)

// checkpoints makes the engine's state durable now and then, and cuts the log below it.
func (n *Node) checkpoints() {
	t := time.NewTicker(checkpointLook)
	defer t.Stop()
	last := n.now()
	for {
		select {
		case <-n.stop:
			return
		case <-t.C:
		}
		n.saveDirectory()
		applied, _ := n.eng.Applied()
		due := n.now().Sub(last) >= checkpointEvery && applied > n.eng.Durable().Index
		if !due && !n.eng.NeedsCheckpoint() {
			continue
		}
		start := n.now()
		m, err := n.eng.Checkpoint()
		if err != nil {
			n.fatal(fmt.Errorf("checkpoint: %w", err))
			return
		}
		last = n.now()
		n.metrics.checkpoint.Observe(last.Sub(start).Seconds())
		if err := n.cutLog(m.Index); err != nil {
			n.fatal(fmt.Errorf("cutting the log: %w", err))
			return
		}
	}
}

// saveDirectory writes what is known of the others, if that has changed. It happens here because it may wait for the
// disk.
func (n *Node) saveDirectory() {
	if err := n.directory.save(func(id engine.NodeID, heard bool) bool {
		_, member := n.memberID(nameOf(id))
		return member || heard
	}); err != nil {
		n.logEvery("members", "cannot write "+membersName, "error", err)
	}
}

// cutLog drops the log below a checkpoint, except for what others may still need.
func (n *Node) cutLog(index uint64) error {
	first := n.logs.shard.First()
	cut := min(index, n.keptBelow())
	if first == 0 || cut < first {
		return nil
	}
	return n.logs.DeleteRange(first, cut)
}

// keptBelow returns the highest index that may be cut as far as the others are concerned: about keepLogBytes
// stay, and everything from a snapshot on that is on its way, up to a quarter of the free space.
func (n *Node) keptBelow() uint64 {
	keep := int64(keepLogBytes)
	if n.cfg.test.keepLogBytes != 0 {
		keep = n.cfg.test.keepLogBytes
	}
	end := n.wal.Written()
	below := n.meter.indexBehind(keep, end)
	if floor, ok := n.snaps.floor(); ok && floor < below {
		free, _ := n.space()
		if n.meter.between(floor, below, end) < max(free/4, keep) {
			return floor
		}
		n.logEvery("retain", "the log since the snapshot being sent is too large to keep", "from", floor)
	}
	return below
}

// retainFrom is the lowest index that a prefix deletion must leave in the log.
func (n *Node) retainFrom() uint64 {
	if n.snaps == nil {
		return 0
	}
	return n.keptBelow() + 1
}
