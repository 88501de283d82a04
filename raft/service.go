package raft

import (
	"crypto/rand"
	"encoding/hex"
	"slices"
	"time"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// This file is what a node does while it leads.

// accept takes an op on the node that leads, from its own intake or another node's.
func (n *Node) accept(o *op) {
	// A repeat is always proposed: an earlier leader's entry may have leased something under its number.
	// An ordered poll has to see what was submitted before it, which may not be applied yet.
	if o.receive != nil && !o.repeat && !o.ordered && n.coal.isOpen() {
		// A poll that finds nothing costs no entry: it is answered, or parked, from the applied state. It has
		// to be proposed when it creates the group, or when its answer is that the group is at a limit, and
		// engine.Park says no to that.
		place := parked
		park := func() { place = n.coal.lot.add(o) }
		if o.parkUntil.IsZero() {
			park = func() { place = timeOver }
		}
		empty, err := n.eng.Park(o.receive, n.clock.now(), park)
		if err != nil {
			n.fatal(err)
			o.endAgain(false)
			return
		}
		if empty {
			n.placed(o, place)
			return
		}
	}
	n.coal.enqueue(o)
}

// placed ends a receive that could not be parked.
func (n *Node) placed(o *op, place parking) {
	switch place {
	case timeOver:
		n.foundNothing(o)
	case lotClosed:
		o.endAgain(false)
	}
}

// foundNothing answers a receive for which nothing was deliverable, once it is certain that this node led when it
// looked (decision 13).
func (n *Node) foundNothing(o *op) {
	if o.dropped.Load() {
		o.end(outcome{kind: stillWaiting})
		return
	}
	n.reads.confirm(func(err error) {
		if err != nil {
			o.endAgain(false)
			return
		}
		o.end(outcome{kind: stillWaiting})
	})
}

// settle hands the results of an applied entry on. It runs on the apply goroutine, between this apply and the
// next: that is what makes parking here safe (R8).
func (n *Node) settle(b *batch, index, term uint64, results []engine.Result) {
	zones := 0
	ended := b.ops[:0]
	for i, o := range b.ops {
		o.reply.Result, o.reply.Index, o.reply.Term = results[i], index, term
		switch {
		case o.reply.Parked:
			// Nothing is recorded under the number, and no entry of an earlier term can come any more: it has not
			// been proposed, as far as anyone can tell.
			o.repeat = false
			o.phase.Store(phaseQueued)
			n.placed(o, n.coal.lot.add(o))
			continue
		case o.reply.Code == errs.OK && (o.require == AllZones ||
			o.require == Default && o.kind.Stores() && n.cfg.Durability != OnlyMajority):
			n.acks.add(o, n.cfg.Durability)
			continue
		}
		if !o.parkUntil.IsZero() {
			n.coal.lot.done(o)
			if o.reply.HasContents() {
				for _, ref := range o.refs {
					n.coal.lot.wake(ref) // there may be more
				}
			}
		}
		if zones == 0 {
			zones = n.holding(index)
		}
		o.reply.Zones = zones
		ended = append(ended, o)
	}
	repliedTo(ended)
	n.acks.advance()
}

// noteEffects acts on what an apply changed. Followers only keep track.
func (n *Node) noteEffects(fx *engine.Effects) {
	if fx.InSync {
		set := n.eng.InSync()
		n.inSync.Store(&set)
		n.policyMu.Lock()
		n.policy.observe(n.now(), set)
		n.policyMu.Unlock()
		n.metrics.inSync.Set(float64(len(set.Nodes)))
		n.requireSet(set)
		n.acks.advance()
	}
	for _, topic := range fx.Appended {
		n.watches.signal(WatchTopic, topic)
	}
	if len(fx.Appended) > 0 {
		n.watches.keysChanged(fx.Appended)
	}
	if len(fx.Keys) > 0 {
		n.watches.keysChanged(fx.Keys)
	}
	if fx.Topics {
		n.watches.signal(WatchTopics, "")
	}
	for _, table := range fx.Documents {
		n.watches.signal(WatchDocuments, table)
	}
	for _, ref := range fx.Deliverable {
		n.coal.lot.wake(ref)
	}
	for _, ref := range fx.Due {
		n.coal.lot.touch(ref)
	}
}

// applied is called after each batch that was applied.
func (n *Node) applied() {
	index, _ := n.eng.Applied()
	n.logs.StageCommit(index)
	n.meter.note(index, n.wal.Written())
	if n.clusterID.Load() == nil {
		if id := n.eng.ClusterID(); id != "" && id != n.dir.id.Previous {
			n.foundedAs(id)
		}
	}
	n.appliedSignal.broadcast()
}

// holding counts the voters whose disks hold index.
func (n *Node) holding(index uint64) int {
	marks := n.trans.Load().Watermark()
	count := 0
	for _, s := range n.configuration().Servers {
		if s.Suffrage == hraft.Voter && marks.Match(s.ID) >= index {
			count++
		}
	}
	return count
}

// watermark returns the last index that every node of the in-sync set, and every voter, has on disk.
func (n *Node) watermark() (inSync, all uint64) {
	level := n.trans.Load().Watermark().Level()
	return level.Required, level.All
}

// complete reports whether every voter is in the in-sync set, and which zones are not.
func (n *Node) complete() (missing []string) {
	set := n.inSync.Load()
	for _, s := range n.configuration().Servers {
		if s.Suffrage == hraft.Voter && (set == nil || !slices.Contains(set.Nodes, engine.NodeID(s.ID))) {
			missing = append(missing, n.directory.zone(engine.NodeID(s.ID)))
		}
	}
	return missing
}

// refuse says why an op must not be proposed now (decisions 10, 26).
func (n *Node) refuse(o *op) *errs.Error {
	if err := n.belowLevel(o); err != nil {
		return err
	}
	if !o.kind.Stores() {
		return nil
	}
	if o.require == AllZones || o.require == Default && n.cfg.Durability == All {
		if missing := n.complete(); len(missing) > 0 {
			e := errs.New(errs.ZonesUnavailable, "durability all was asked for and zone %s is away", missing[0])
			e.RetryAfter = time.Second
			return e
		}
	}
	if name := n.fullDisk.Load(); name != nil {
		e := errs.New(errs.DiskFull, "the disk of node %s has reached its reserve", *name)
		e.RetryAfter = 5 * time.Second
		return e
	}
	return nil
}

// leadership follows hraft's notifications.
func (n *Node) leadership() {
	for {
		select {
		case leads := <-n.notify:
			n.metrics.leaderChanges.Inc()
			if leads {
				n.lead()
			} else {
				n.follow()
			}
		case <-n.stop:
			return
		}
	}
}

// lead begins to serve: ops gather until an entry of this term has been applied, since only then the state is
// certain to hold everything that was acknowledged before (R6).
func (n *Node) lead() {
	n.serviceMu.Lock()
	defer n.serviceMu.Unlock()
	if n.closing.Load() || n.stalled.Load() {
		return
	}
	term := n.raft.CurrentTerm()
	// The transport does this with the first thing it sends; a cluster of one has nobody to send to.
	n.trans.Load().Watermark().Lead(term)
	now := n.now()
	since := make(map[engine.NodeID]time.Time)
	voters := n.voters()
	if former := n.formerLeader(); former != "" {
		if at := n.lastHeard(former); !at.IsZero() {
			since[former] = at
		}
	}
	n.policyMu.Lock()
	n.policy.lead(now, voters, since)
	n.policyMu.Unlock()
	n.acks.setClosed(false)
	n.leadAt = now
	n.coal.setMode(gathering)
	n.metrics.isLeader.Set(1)
	n.log.Info("leading", "term", term)

	var cmd engine.Command = &engine.Tick{}
	if n.eng.ClusterID() == "" {
		var b [48]byte
		_, _ = rand.Read(b[:]) // never fails, by its contract
		cmd = &engine.Init{ClusterID: hex.EncodeToString(b[:16]), Secret: b[16:], Level: n.foundingLevel()}
	}
	n.coal.enqueue(&op{request: request{cmd: cmd.AppendTo(nil), kind: cmd.Kind(), require: Majority}, urgent: true,
		from: originFunc(func(o *op, out outcome) {
			if out.kind == replied {
				n.opened(o.reply.Term)
			}
		})})
}

// originFunc makes a function an origin.
type originFunc func(*op, outcome)

func (f originFunc) finish(o *op, out outcome) { f(o, out) }

// opened opens the service: an entry of the term was applied.
func (n *Node) opened(term uint64) {
	// Runs on the apply goroutine, which must not wait for serviceMu: lead and follow hold it only briefly, and
	// never while they wait for an apply.
	n.serviceMu.Lock()
	defer n.serviceMu.Unlock()
	if n.raft.State() != hraft.Leader || n.stalled.Load() || n.closing.Load() {
		return
	}
	n.trans.Load().Watermark().Lead(term)
	n.openTerm.Store(term)
	mode := open
	if n.draining.Load() {
		mode = paused
	}
	n.coal.setMode(mode)
	n.watches.signal(WatchLeader, "")
	n.log.Info("open for service", "term", term)
}

// follow ends the service: what is queued, parked, in flight or waiting for the watermark goes back to where it
// came from, to be brought to the next leader under its number.
func (n *Node) follow() {
	n.serviceMu.Lock()
	defer n.serviceMu.Unlock()
	n.closeService()
	n.metrics.isLeader.Set(0)
}

func (n *Node) closeService() {
	if term := n.openTerm.Swap(0); term != 0 && n.raft != nil && n.raft.State() != hraft.Leader {
		// Only of a term that is certain: by now this node may lead in a later one.
		n.trans.Load().LeadershipLost(term)
	}
	n.coal.setMode(closed)
	n.acks.setClosed(true)
	n.watches.signal(WatchLeader, "")
	n.policyMu.Lock()
	n.policy.follow()
	n.policyMu.Unlock()
}

// policyEvery is how often the in-sync policy, the stall watchdog and the router look.
const policyEvery = 25 * time.Millisecond

// tick runs what has to be looked at regularly, and when a link reports something.
func (n *Node) tick() {
	t := time.NewTicker(policyEvery)
	defer t.Stop()
	for {
		select {
		case <-n.stop:
			return
		case <-t.C:
		case <-n.evidence:
		}
		n.watchDisk()
		n.watchOpening()
		n.updateRoute()
		n.keepIntake()
		n.stepPolicy()
		n.stepMembership()
		n.stepDue()
		n.stepRing()
	}
}

// watchDisk gives up service while the disk is stalled (decision 5). The transport withholds heartbeats by the
// same measure.
func (n *Node) watchDisk() {
	_, oldest := n.wal.Unsynced()
	stalled := oldest > limits.StallMax
	if stalled == n.stalled.Load() {
		return
	}
	n.serviceMu.Lock()
	n.stalled.Store(stalled)
	if stalled {
		n.log.Error("the disk is stalled: closing for service", "unsynced_for", oldest)
		n.closeService()
	}
	n.serviceMu.Unlock()
	n.exchangeNow() // the next leader need not wait for this zone
	if !stalled {
		n.log.Warn("the disk answers again")
		if n.raft.State() == hraft.Leader {
			n.lead()
		}
	}
}

// openingMax is how long the first entry of a term may take until it is proposed anew. Raft may have given it up in
// the moment after a transfer that failed.
const openingMax = time.Second

// watchOpening sees to it that a node that leads opens.
func (n *Node) watchOpening() {
	if n.openTerm.Load() != 0 || n.raft.State() != hraft.Leader {
		return
	}
	n.serviceMu.Lock()
	late := n.now().Sub(n.leadAt) > openingMax
	n.serviceMu.Unlock()
	if late {
		n.reopen()
	}
}

// stepPolicy proposes changes of the in-sync set.
func (n *Node) stepPolicy() {
	if n.openTerm.Load() == 0 || n.raft.State() != hraft.Leader {
		return
	}
	head := n.logs.Last()
	now := n.now()
	var views []voterView
	for _, s := range n.configuration().Servers {
		id := engine.NodeID(s.ID)
		if id == n.id || s.Suffrage != hraft.Voter {
			continue
		}
		match := n.match(id)
		views = append(views, voterView{ID: id, Match: match, BehindBytes: n.meter.between(match, head, n.wal.Written()),
			Connected: n.mesh.Connected(peerID(id)), Refused: n.refusing(id), Stalled: n.directory.stalled(id, now)})
	}
	n.nudge(head, views)
	n.policyMu.Lock()
	change, ok := n.policy.step(now, n.id, head, views)
	if ok && !change.Out && change.Node == n.id && n.draining.Load() {
		ok = false // it has just left on purpose
	}
	n.policyMu.Unlock()
	if !ok {
		return
	}
	var cmd engine.Command = &engine.Expand{Node: change.Node, Epoch: change.Epoch}
	if change.Out {
		n.log.Warn("zone is away: leaving it out of the in-sync set", "node", change.Node, "zone", n.directory.zone(change.Node))
		cmd = &engine.Shrink{Node: change.Node, Epoch: change.Epoch}
	} else {
		n.log.Info("taking zone into the in-sync set", "node", change.Node, "zone", n.directory.zone(change.Node))
	}
	n.coal.enqueue(&op{request: request{cmd: cmd.AppendTo(nil), kind: cmd.Kind(), require: Majority}, urgent: true,
		from: originFunc(func(*op, outcome) {})})
}

// ringKeep is how much of the log stays in memory although this node has applied it and every other one has it.
const ringKeep = 8 << 20

// stepRing lets go of the entries in memory that nobody is about to read. What the engine keeps of them for consumers it keeps
// by itself, by the same bytes; the parts of large messages it does not, and so they do not stay.
func (n *Node) stepRing() {
	through, _ := n.eng.Applied()
	if n.raft.State() == hraft.Leader {
		for _, s := range n.configuration().Servers {
			if id := engine.NodeID(s.ID); id != n.id {
				through = min(through, n.match(id))
			}
		}
	}
	n.logs.shard.Forget(through, ringKeep)
}

// stepDue proposes an entry when something is due that no command asks for: delayed messages become visible with
// an entry, and uploads that were broken off end with one.
func (n *Node) stepDue() {
	if n.openTerm.Load() == 0 || n.raft.State() != hraft.Leader {
		return
	}
	if at, ok := n.eng.NextTick(); !ok || at > n.clock.now().Cluster {
		return
	}
	cmd := &engine.Tick{}
	n.coal.enqueue(&op{request: request{cmd: cmd.AppendTo(nil), kind: cmd.Kind(), require: Majority}, urgent: true,
		from: originFunc(func(*op, outcome) {})})
}

// nudge keeps the log flowing to a voter that is behind. Raft sends at most maxAppendEntries entries for each entry that
// is appended, and what is left waits for the next one or a quarter of a second: a voter that was slow for a
// moment would trickle along just when publishers wait for it and append nothing.
func (n *Node) nudge(head uint64, voters []voterView) {
	for _, v := range voters {
		moving := n.now().Sub(n.trans.Load().Watermark().Progress(hraft.ServerID(v.ID)).MatchAt) < time.Second
		if moving && !v.Refused && v.Match+maxAppendEntries < head {
			cmd := &engine.Tick{}
			n.coal.enqueue(&op{request: request{cmd: cmd.AppendTo(nil), kind: cmd.Kind(), require: Majority}, urgent: true,
				from: originFunc(func(*op, outcome) {})})
			return
		}
	}
}

// updateRoute tells the intake who leads.
func (n *Node) updateRoute() {
	_, id := n.raft.LeaderWithID()
	node := engine.NodeID(id)
	if node != "" && node != n.lastLeader {
		n.policyMu.Lock()
		n.former, n.lastLeader = n.lastLeader, node
		n.policyMu.Unlock()
	}
	if node != n.shownLeader {
		n.shownLeader = node
		n.beginReign()
		n.watches.signal(WatchLeader, "")
	}
	if node == n.id && n.stalled.Load() {
		node = ""
	}
	r := route{node: node, term: n.raft.CurrentTerm()}
	if node == "" {
		// Raft cannot say who leads while this node's disk is stalled: it would have to save the term first. The
		// leader itself can, and what it is sent needs no disk here.
		if id, term := n.directory.leader(n.now()); id != n.id {
			r = route{node: id, term: term}
			node = id
		}
	}
	n.intake.setRoute(r)
	if node != "" {
		n.openIntake(r)
	}
}

// leaderNow returns the leader this node knows, by raft or by the leader's own word.
func (n *Node) leaderNow() engine.NodeID {
	_, id := n.raft.LeaderWithID()
	node := engine.NodeID(id)
	if node == "" || node == n.id && n.stalled.Load() {
		if other, _ := n.directory.leader(n.now()); other != n.id {
			return other
		}
	}
	return node
}

// keepIntakeEvery is how long this process's intake may be idle before something is brought in that only shows it is
// there. The cluster closes an intake after limits.IntakeSilenceMax.
const keepIntakeEvery = limits.IntakeSilenceMax / 5

// keepIntake keeps an idle intake alive.
func (n *Node) keepIntake() {
	if n.intake.idle(n.cfg.test.keepIntake) {
		cmd := &engine.Tick{}
		n.intake.submit(&call{first: op{request: request{cmd: cmd.AppendTo(nil), kind: cmd.Kind(), require: Majority}}, notify: func(*call) {}})
	}
}

// openIntake opens this process's intake when it is not: at start, and after the cluster closed it.
func (n *Node) openIntake(r route) {
	if n.intake.isOpen() {
		n.opening.number = 0
		return
	}
	now := n.now()
	if n.opening.route == r && now.Before(n.opening.next) {
		return
	}
	if n.opening.number == 0 {
		// A nonce per opening: repeats of one give the same intake.
		var b [8]byte
		_, _ = rand.Read(b[:]) // never fails, by its contract
		for i, v := range b {
			n.opening.number |= uint64(v) << (8 * i)
		}
		n.opening.number |= 1
	}
	n.opening.route, n.opening.next = r, now.Add(250*time.Millisecond)
	cmd := &engine.OpenIntake{Node: n.id, Nonce: n.opening.number}
	o := &op{request: request{cmd: cmd.AppendTo(nil), kind: cmd.Kind(), require: Majority}, repeat: true}
	o.from = originFunc(func(o *op, out outcome) {
		if out.kind == replied && o.reply.Code == errs.OK && o.reply.Intake != 0 {
			n.intake.opened(o.reply.Intake)
		}
	})
	n.outbox.send(r.node, []*op{o})
}
