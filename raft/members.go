package raft

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft/peer"
)

// Membership changes in small steps, each of them safe to stop after:
//
//	AddMember n4:      n4 is invited ─ n4 asks to join ─ non-voter ─ caught up ─ voter
//	ReplaceMember n2:  n2.old is removed ─ n2 is invited ─ n2.new asks … as above
//	RemoveMember n3:   n3 is removed
//
// The invitation travels with the nodes' cards, and whoever leads takes the next step; an operator's call ends when
// its first step is done. A zone has one voter (decision 11): a second one stays a non-voter until the first
// is gone.

// stranger is a node that asked to join.
type stranger struct {
	id   engine.NodeID
	addr string
	at   time.Time
}

// strangerLife is how long a request to join counts; those who wait ask again twice a second.
const strangerLife = 5 * time.Second

// membershipEvery is how often the leader looks whether there is a step to take.
const membershipEvery = 200 * time.Millisecond

// catchUpBytesMax is how far behind a non-voter may be to become a voter.
const catchUpBytesMax = returnBytesMax

// stepMembership takes the next step of a change under way, if there is one.
func (n *Node) stepMembership() {
	now := n.now()
	if now.Before(n.membersNext) {
		return
	}
	n.membersNext = now.Add(membershipEvery)
	config := n.configuration()
	voterOf := make(map[string]engine.NodeID)   // by name
	zoneVoter := make(map[string]engine.NodeID) // by zone
	for _, s := range config.Servers {
		if s.Suffrage == hraft.Voter {
			id := engine.NodeID(s.ID)
			voterOf[nameOf(id)] = id
			zoneVoter[n.directory.zone(id)] = id
		}
	}
	for name := range n.directory.invitations(now) {
		if _, ok := voterOf[name]; ok {
			n.directory.settled(name)
		}
	}
	if n.openTerm.Load() == 0 || n.draining.Load() || n.changing.Load() {
		return
	}
	head := n.logs.Last()
	for _, s := range config.Servers {
		id := engine.NodeID(s.ID)
		if s.Suffrage == hraft.Voter || !n.directory.invited(nameOf(id), now) {
			continue
		}
		match := n.match(id)
		if match == 0 || n.meter.between(match, head, n.wal.Written()) > catchUpBytesMax {
			continue
		}
		if other, taken := zoneVoter[n.directory.zone(id)]; taken {
			n.logEvery("zone-taken", "a non-voter waits: its zone has a voter", "node", id, "zone", n.directory.zone(id), "voter", other)
			continue
		}
		n.change("promoting", func() hraft.IndexFuture { return n.raft.AddVoter(s.ID, s.Address, 0, 0) })
		return
	}
	for _, st := range n.strangersNow(now) {
		if slices.ContainsFunc(config.Servers, func(s hraft.Server) bool { return nameOf(engine.NodeID(s.ID)) == nameOf(st.id) }) {
			continue
		}
		if !n.directory.invited(nameOf(st.id), now) {
			continue
		}
		n.change("admitting", func() hraft.IndexFuture {
			return n.raft.AddNonvoter(hraft.ServerID(st.id), hraft.ServerAddress(st.addr), 0, 0)
		})
		return
	}
}

// change makes a configuration change on a goroutine of its own, one at a time.
func (n *Node) change(what string, do func() hraft.IndexFuture) {
	if !n.changing.CompareAndSwap(false, true) {
		return
	}
	n.spawn(func() {
		defer n.changing.Store(false)
		if err := n.await(do()); err != nil {
			n.log.Warn("membership change failed", "change", what, "error", err)
		}
	})
}

// await waits for one of hraft's futures, or for the node to stop.
func (n *Node) await(f hraft.Future) error {
	done := make(chan error, 1)
	go func() { done <- f.Error() }()
	select {
	case err := <-done:
		return err
	case <-n.stop:
		return ErrClosed
	}
}

// strangersNow returns who asked to join lately.
func (n *Node) strangersNow(now time.Time) []stranger {
	n.strangersMu.Lock()
	defer n.strangersMu.Unlock()
	var out []stranger
	for id, s := range n.strangers {
		if now.Sub(s.at) > strangerLife {
			delete(n.strangers, id)
			continue
		}
		out = append(out, s)
	}
	return out
}

// adminRequest is an operator's wish on its way to the leader.
type adminRequest struct {
	// Do is "add", "remove", "replace", "transfer" or "finalize".
	Do   string `json:"do"`
	Name string `json:"name"`
}

// adminReply is the answer.
type adminReply struct {
	Code    errs.Code `json:"code"`
	Message string    `json:"message,omitempty"`
	Hint    string    `json:"hint,omitempty"`
}

func adminReplyOf(err error) adminReply {
	if err == nil {
		return adminReply{}
	}
	e := errs.From(err)
	return adminReply{Code: e.Code, Message: e.Error(), Hint: e.Hint}
}

func (r adminReply) err() error {
	if r.Code == errs.OK {
		return nil
	}
	return &errs.Error{Code: r.Code, Message: r.Message, Hint: r.Hint}
}

// AddMember lets the node of this name join: it comes in as a non-voter, catches up, and becomes a voter if its
// zone has none. The call returns when the invitation stands, which may be before the node asks.
func (n *Node) AddMember(ctx context.Context, name string) error {
	return n.admin(ctx, adminRequest{"add", name})
}

// RemoveMember takes the member out of the cluster for good.
func (n *Node) RemoveMember(ctx context.Context, name string) error {
	return n.admin(ctx, adminRequest{"remove", name})
}

// ReplaceMember removes the member's present incarnation and lets the next one that asks under the same name join.
func (n *Node) ReplaceMember(ctx context.Context, name string) error {
	return n.admin(ctx, adminRequest{"replace", name})
}

// TransferLeadership hands leadership to the named member, or to the most advanced one of the in-sync set when
// name is empty.
func (n *Node) TransferLeadership(ctx context.Context, name string) error {
	return n.admin(ctx, adminRequest{"transfer", name})
}

// admin has the leader do what an operator wants.
func (n *Node) admin(ctx context.Context, a adminRequest) error {
	for {
		leader := n.leaderNow()
		err := error(errs.Of(errs.NoLeader))
		switch leader {
		case "":
		case n.id:
			err = n.administer(ctx, a)
		default:
			body, jerr := json.Marshal(a)
			if jerr != nil {
				return jerr
			}
			var raw []byte
			var conn *peer.Conn
			if conn, err = n.toLeader(leader); err == nil {
				// Not only while it leads: what is wished for may be that it does not.
				raw, err = conn.Call(ctx, kindAdmin, 0, body)
			}
			if err == nil {
				var r adminReply
				if err = json.Unmarshal(raw, &r); err == nil {
					err = r.err()
				}
			} else if reachedPeer(err) {
				return errs.Of(errs.OutcomeUnknown).With(err)
			} else {
				err = errs.Of(errs.NotLeader).With(err)
			}
		}
		switch errs.CodeOf(err) {
		case errs.NoLeader, errs.NotLeader:
		default:
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-n.stop:
			return errs.Of(errs.Draining)
		case <-time.After(4 * againDelay):
		}
	}
}

// administer carries an operator's wish out, on the leader.
func (n *Node) administer(ctx context.Context, a adminRequest) error {
	if n.openTerm.Load() == 0 {
		return errs.Of(errs.NotLeader)
	}
	if !validName(a.Name) && !((a.Do == "transfer" || a.Do == "finalize") && a.Name == "") {
		return errs.New(errs.InvalidName, "%q is not a node id", a.Name)
	}
	now := n.now()
	switch a.Do {
	case "add":
		if id, ok := n.memberID(a.Name); ok {
			return errs.New(errs.Conflict, "%s is a member already (%s)", a.Name, id)
		}
		n.directory.invite(a.Name, now.Add(invitationLife))
		n.exchangeNow()
		return nil
	case "remove":
		return n.remove(ctx, a.Name, true)
	case "replace":
		if err := n.remove(ctx, a.Name, false); err != nil {
			return err
		}
		n.directory.invite(a.Name, now.Add(invitationLife))
		n.exchangeNow()
		return nil
	case "transfer":
		return n.transfer(ctx, a.Name)
	case "finalize":
		return n.finalize(ctx)
	default:
		return errs.New(errs.BadRequest, "unknown wish %q", a.Do)
	}
}

// memberID returns the member of that name.
func (n *Node) memberID(name string) (engine.NodeID, bool) {
	for _, s := range n.configuration().Servers {
		if nameOf(engine.NodeID(s.ID)) == name {
			return engine.NodeID(s.ID), true
		}
	}
	return "", false
}

// remove takes all incarnations of a name out of the configuration.
func (n *Node) remove(ctx context.Context, name string, must bool) error {
	id, ok := n.memberID(name)
	if !ok {
		if must {
			return errs.New(errs.NotFound, "%s is not a member", name)
		}
		return nil
	}
	if voters := n.voters(); len(voters) == 1 && voters[0] == id {
		return errs.New(errs.Precondition, "%s is the only voter", name)
	}
	if id == n.id {
		// The one who leads cannot replicate its own leaving well: another leader does it.
		if err := n.transfer(ctx, ""); err != nil {
			return err
		}
		return errs.Of(errs.NotLeader)
	}
	for !n.changing.CompareAndSwap(false, true) {
		select {
		case <-ctx.Done():
			return errs.New(errs.Conflict, "another membership change is under way")
		case <-n.stop:
			return errs.Of(errs.Draining)
		case <-time.After(againDelay):
		}
	}
	defer n.changing.Store(false)
	err := n.await(n.raft.RemoveServer(hraft.ServerID(id), 0, 0))
	switch {
	case err == nil:
		n.log.Info("removed member", "node", id)
		return nil
	case errors.Is(err, hraft.ErrNotLeader):
		return errs.Of(errs.NotLeader)
	case errors.Is(err, hraft.ErrLeadershipLost), errors.Is(err, ErrClosed), errors.Is(err, hraft.ErrRaftShutdown):
		return errs.Of(errs.OutcomeUnknown).With(err)
	default:
		return errs.New(errs.Conflict, "%v", err)
	}
}

// transfer hands leadership on. The service is closed meanwhile, so that no entry is proposed that raft would give
// up: what comes in waits at its origins for the next leader.
func (n *Node) transfer(ctx context.Context, name string) error {
	to, err := n.successor(name)
	if err != nil {
		return err
	}
	if to == n.id {
		return nil
	}
	n.coal.setMode(paused)
	select {
	case <-n.coal.whenDrained():
	case <-ctx.Done():
		n.reopen()
		return errs.New(errs.Conflict, "entries are in flight: %v", ctx.Err())
	case <-n.stop:
		return errs.Of(errs.Draining)
	}
	_, addr := n.address(to)
	err = n.await(n.raft.LeadershipTransferToServer(hraft.ServerID(to), addr))
	if err != nil {
		n.log.Warn("leadership was not handed on", "to", to, "error", err)
		n.reopen()
		return errs.New(errs.Conflict, "leadership was not handed to %s: %v", nameOf(to), err)
	}
	n.log.Info("handed leadership on", "to", to)
	return nil
}

// reopen opens the service again after a pause that led to nothing, through a new entry of the term: what raft may
// have given up meanwhile is ended first.
func (n *Node) reopen() {
	n.follow()
	if n.raft.State() == hraft.Leader {
		n.lead()
	}
}

// successor picks who leads next: the named voter, or of the in-sync voters the one whose disk has most.
func (n *Node) successor(name string) (engine.NodeID, error) {
	set := n.inSync.Load()
	var best engine.NodeID
	for _, id := range n.voters() {
		if name != "" {
			if nameOf(id) == name {
				return id, nil
			}
			continue
		}
		if id == n.id || set == nil || !slices.Contains(set.Nodes, id) || !n.stays(id) || !n.mesh.Connected(peerID(id)) {
			continue
		}
		if best == "" || n.match(id) > n.match(best) {
			best = id
		}
	}
	switch {
	case best != "":
		return best, nil
	case name != "":
		return "", errs.New(errs.NotFound, "%s is not a voter", name)
	default:
		return "", errs.New(errs.Precondition, "no other voter is in sync")
	}
}

// address returns a member's address.
func (n *Node) address(id engine.NodeID) (bool, hraft.ServerAddress) {
	for _, s := range n.configuration().Servers {
		if engine.NodeID(s.ID) == id {
			return true, s.Address
		}
	}
	return false, ""
}

// voters returns the voters of the latest configuration.
func (n *Node) voters() []engine.NodeID {
	var out []engine.NodeID
	for _, s := range n.configuration().Servers {
		if s.Suffrage == hraft.Voter {
			out = append(out, engine.NodeID(s.ID))
		}
	}
	return out
}

// exchangeEvery is how often nodes exchange cards.
const exchangeEvery = 500 * time.Millisecond

// exchange sends this node's card to the others and takes theirs, until the node stops.
func (n *Node) exchange() {
	t := time.NewTicker(exchangeEvery)
	defer t.Stop()
	for {
		mine := n.card()
		n.directory.put(mine, n.now())
		body, err := json.Marshal(mine)
		if err == nil {
			for id := range n.mesh.Peers() {
				n.sendCard(id, body)
			}
		}
		n.noteDisk()
		select {
		case <-n.stop:
			return
		case <-t.C:
		case <-n.exchangeKick:
		}
	}
}

// sendCard sends a card without waiting for the answer.
func (n *Node) sendCard(id peer.ID, body []byte) {
	link, err := n.mesh.Link(id, peer.Forward)
	if err != nil {
		return
	}
	conn := link.Current()
	if conn == nil {
		return
	}
	conn.Go(kindCard, 0, [][]byte{body}, func(reply []byte, err error) {
		var c card
		if err == nil && json.Unmarshal(reply, &c) == nil && c.ID == engine.NodeID(id) {
			n.noteCard(c)
		}
	})
}

// noteCard takes note of another node's card.
func (n *Node) noteCard(c card) {
	n.directory.put(c, n.now())
	if c.Leads != 0 {
		n.clock.hear(c.Leads, c.Clock)
	}
}

// exchangeNow has the cards exchanged at once.
func (n *Node) exchangeNow() {
	select {
	case n.exchangeKick <- struct{}{}:
	default:
	}
}

// serveCard takes another node's card and answers with this one's.
func (n *Node) serveCard(from engine.NodeID, body []byte) ([]byte, error) {
	var c card
	if err := json.Unmarshal(body, &c); err != nil || c.ID != from {
		return nil, errMalformed
	}
	n.noteCard(c)
	return json.Marshal(n.card())
}

// card describes this node.
func (n *Node) card() card {
	free, reserve := n.space()
	index, _ := n.eng.Applied()
	leads, level := n.openTerm.Load(), n.levelMax()
	var clock int64
	if leads != 0 {
		clock = n.clock.now().Cluster
	}
	return card{ID: n.id, Zone: n.cfg.Zone, Peer: n.cfg.PeerAddr, HTTP: n.cfg.HTTPAddr, Valkey: n.cfg.ValkeyAddr,
		Version: n.cfg.Version, Free: free, Reserve: reserve, Applied: index, Level: &level, Leads: leads, Clock: clock, Stalled: n.stalled.Load(), Draining: n.draining.Load(),
		Expected: n.directory.invitations(n.now())}
}

// space returns the free bytes of the data directory and the reserve.
func (n *Node) space() (free, reserve int64) {
	s, err := n.wal.Space()
	if err != nil {
		n.logEvery("space", "cannot read the free space", "error", err)
		return 0, 0
	}
	return s.Free, max(s.Reserve, n.cfg.DiskReserve)
}

// diskNewsMax is how old a card may be for its free space to count.
const diskNewsMax = 10 * time.Second

// noteDisk finds out whether a node of the in-sync set has reached its reserve.
func (n *Node) noteDisk() {
	set := n.inSync.Load()
	if set == nil {
		return
	}
	now := n.now()
	var full *string
	for _, id := range set.Nodes {
		c, at := n.directory.get(id)
		if at.IsZero() || now.Sub(at) > diskNewsMax || c.Reserve == 0 {
			continue
		}
		if c.Free < c.Reserve {
			name := nameOf(id)
			full = &name
			n.logEvery("disk", "a disk has reached its reserve: publishes are refused", "node", id, "free", c.Free, "reserve", c.Reserve)
		}
	}
	n.fullDisk.Store(full)
}

// validName checks a node id.
func validName(name string) bool {
	if name == "" || len(name) > 64 {
		return false
	}
	for _, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
		default:
			return false
		}
	}
	return true
}

// peerID translates an identity for package peer.
func peerID(id engine.NodeID) peer.ID { return peer.ID(id) }

// describe names members for a log line.
func describe(c hraft.Configuration) string {
	out := ""
	for i, s := range c.Servers {
		if i > 0 {
			out += ", "
		}
		out += fmt.Sprintf("%s at %s (%s)", s.ID, s.Address, s.Suffrage)
	}
	return out
}
