package raft

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft/peer"
	"tercet.dev/tercet/raft/transport"
)

// How a node with an empty directory comes to take part (decision 7).
//
// Founding. Every node of Peers asks every other who it is, until it knows the identity of all. What it knows then is
// frozen: it answers with it, and never founds with anything else. It founds when all others have answered with
// the same, by bootstrapping the same configuration in the same order. A node that finds another one founded
// already does the same if it is listed there, and is a wiped member otherwise. So no two nodes ever found
// with different configurations, and none founds alone.
//
// Joining. A node asks members for admission until the leader has taken it in (see members.go).

// kindIntroduce is the kind of the one request of an introduction.
const kindIntroduce = peer.KindUser + 48

// introduceEvery is how often questions are repeated.
const introduceEvery = 100 * time.Millisecond

// joinEvery is how often a node asks for admission.
const joinEvery = 500 * time.Millisecond

// introduction is the question a node asks, and the answer.
type introduction struct {
	// Want is "found" or "join" in a question.
	Want string        `json:"want,omitempty"`
	ID   engine.NodeID `json:"id"`
	Zone string        `json:"zone"`
	Addr string        `json:"addr"`
	// Level is the highest feature level the node's release knows.
	Level *uint32 `json:"level,omitempty"`
	// View is who the founding members are, by name, once all of them are known.
	View map[string]engine.NodeID `json:"view,omitempty"`

	// Founded says that the answering node is part of a cluster; Members is its configuration then, and Leader
	// the address of the leader it knows.
	Founded bool                     `json:"founded,omitempty"`
	Cluster string                   `json:"cluster,omitempty"`
	Members map[engine.NodeID]string `json:"members,omitempty"`
	Leader  string                   `json:"leader,omitempty"`
	// Admitted says that the asking node is a member.
	Admitted bool `json:"admitted,omitempty"`
	// Known names the member that has the asking node's name and another incarnation.
	Known engine.NodeID `json:"known,omitempty"`
	// NeedLevel says that the asking node's release is too old for the cluster.
	NeedLevel uint32 `json:"needLevel,omitempty"`
}

// founding is what a node knows while the cluster is founded.
type founding struct {
	mu sync.Mutex
	// ids are the identities that were seen, by name; frozen is set once all are known.
	ids    map[string]engine.NodeID
	frozen bool
}

// view returns the identities if all are known.
func (f *founding) view() map[string]engine.NodeID {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.frozen {
		return nil
	}
	return maps.Clone(f.ids)
}

// saw takes note of an identity. Once all are known nothing changes any more.
func (f *founding) saw(id engine.NodeID, names int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.frozen {
		return
	}
	f.ids[nameOf(id)] = id
	f.frozen = len(f.ids) == names
}

// introduce answers another node's question.
func (n *Node) introduce(_ context.Context, from peer.Remote, body []byte) ([]byte, error) {
	var q introduction
	if err := json.Unmarshal(body, &q); err != nil || q.ID != engine.NodeID(from.ID) {
		return nil, errMalformed
	}
	level := n.levelMax()
	a := introduction{ID: n.id, Zone: n.cfg.Zone, Addr: n.cfg.PeerAddr, Level: &level}
	config := n.configuration()
	if len(config.Servers) == 0 {
		if f := n.foundingNow(); f != nil {
			if q.Want == "found" && slices.ContainsFunc(n.cfg.Peers, func(p Peer) bool { return p.Name == nameOf(q.ID) }) {
				n.directory.putLevel(q.ID, q.Level)
				f.saw(q.ID, len(n.cfg.Peers))
			}
			a.View = f.view()
		}
		return json.Marshal(a)
	}
	a.Founded = true
	if id := n.clusterID.Load(); id != nil {
		a.Cluster = *id
	}
	a.Members = make(map[engine.NodeID]string, len(config.Servers))
	for _, s := range config.Servers {
		id := engine.NodeID(s.ID)
		a.Members[id] = string(s.Address)
		switch {
		case id == q.ID:
			a.Admitted = true
		case nameOf(id) == nameOf(q.ID):
			a.Known = id
		}
	}
	if n.ready.Load() {
		addr, _ := n.raft.LeaderWithID()
		a.Leader = string(addr)
		switch {
		case q.Level == nil || q.Want != "join":
		case n.tooOld(*q.Level):
			a.NeedLevel = n.eng.Level()
		}
		if q.Want == "join" && !a.Admitted && a.NeedLevel == 0 && validName(nameOf(q.ID)) {
			n.strangersMu.Lock()
			if len(n.strangers) < 64 {
				n.strangers[q.ID] = stranger{id: q.ID, addr: q.Addr, at: n.now()}
			}
			n.strangersMu.Unlock()
			n.directory.put(card{ID: q.ID, Zone: q.Zone, Peer: q.Addr, Level: q.Level}, n.now())
		}
	}
	return json.Marshal(a)
}

// ask asks the node at an address.
func (n *Node) ask(ctx context.Context, addr string, q introduction) (introduction, error) {
	level := n.levelMax()
	q.ID, q.Zone, q.Addr, q.Level = n.id, n.cfg.Zone, n.cfg.PeerAddr, &level
	body, err := json.Marshal(q)
	if err != nil {
		return introduction{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	remote, raw, err := n.mesh.Introduce(ctx, addr, kindIntroduce, body)
	if err != nil {
		return introduction{}, err
	}
	var a introduction
	if err := json.Unmarshal(raw, &a); err != nil || a.ID != engine.NodeID(remote.ID) {
		return introduction{}, errMalformed
	}
	return a, nil
}

// takePart makes an empty node part of a cluster. Others need nothing.
func (n *Node) takePart(ctx context.Context) error {
	has, err := hraft.HasExistingState(n.logs, n.logs, n.snaps)
	if err != nil {
		return err
	}
	if has {
		return nil
	}
	switch {
	case len(n.cfg.Join) > 0:
		return n.join(ctx)
	case n.dir.id.Cluster != "":
		return &StartError{Kind: ErrWiped, Message: fmt.Sprintf("%s belongs to cluster %s and holds no log", n.cfg.Dir, n.dir.id.Cluster),
			Remedy: replaceRemedy(n.cfg.Name)}
	case len(n.cfg.Peers) > 1:
		config, err := n.found(ctx)
		if err != nil {
			return err
		}
		return n.bootstrap(config)
	default:
		return n.bootstrap(hraft.Configuration{Servers: []hraft.Server{{ID: hraft.ServerID(n.id), Address: hraft.ServerAddress(n.cfg.PeerAddr)}}})
	}
}

// bootstrap writes the first configuration.
func (n *Node) bootstrap(c hraft.Configuration) error {
	n.log.Info("founding the cluster", "members", describe(c))
	if err := hraft.BootstrapCluster(n.raftConfig(), n.logs, n.logs, n.snaps, n.trans.Load(), c); err != nil {
		return fmt.Errorf("founding the cluster: %w", err)
	}
	return nil
}

// configurationOf makes the configuration that the founding members stand for: sorted by name, so that it is the
// same on all of them.
func (n *Node) configurationOf(view map[string]engine.NodeID) hraft.Configuration {
	peers := slices.Clone(n.cfg.Peers)
	slices.SortFunc(peers, func(a, b Peer) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
	var c hraft.Configuration
	for _, p := range peers {
		c.Servers = append(c.Servers, hraft.Server{ID: hraft.ServerID(view[p.Name]), Address: hraft.ServerAddress(p.Addr)})
	}
	return c
}

func (n *Node) foundingNow() *founding { return n.foundingPtr.Load() }

// found waits until all founding members agree on who they are.
func (n *Node) found(ctx context.Context) (hraft.Configuration, error) {
	f := &founding{ids: make(map[string]engine.NodeID)}
	f.saw(n.id, len(n.cfg.Peers))
	n.foundingPtr.Store(f)
	t := time.NewTicker(introduceEvery)
	defer t.Stop()
	for {
		agreed := 0
		missing := ""
		for _, p := range n.cfg.Peers {
			if p.Name == n.cfg.Name {
				continue
			}
			a, err := n.ask(ctx, p.Addr, introduction{Want: "found", View: f.view()})
			if err != nil {
				missing = p.Name
				continue
			}
			if nameOf(a.ID) != p.Name {
				return hraft.Configuration{}, &StartError{Kind: ErrRefused,
					Message: fmt.Sprintf("the node at %s is %s, and --peers says %s", p.Addr, nameOf(a.ID), p.Name), Remedy: "check --peers"}
			}
			n.directory.put(card{ID: a.ID, Zone: a.Zone, Peer: a.Addr}, n.now())
			switch {
			case a.Founded && a.Admitted:
				return n.foundedConfiguration(a)
			case a.Founded && a.Known != "":
				return hraft.Configuration{}, n.wiped(a)
			case a.Founded:
				return hraft.Configuration{}, &StartError{Kind: ErrRefused, Message: fmt.Sprintf("%s is already part of a cluster without %s", p.Name, n.cfg.Name),
					Remedy: fmt.Sprintf("tercet cluster add %s --server URL, then start this node with --join", n.cfg.Name)}
			}
			n.directory.putLevel(a.ID, a.Level)
			f.saw(a.ID, len(n.cfg.Peers))
			if view := f.view(); view != nil {
				// Whoever founds first connects at once, and should not be taken for a stranger.
				n.mesh.SetPeers(transport.Peers(n.configurationOf(view)))
				if maps.Equal(view, a.View) {
					agreed++
				}
			}
		}
		if view := f.view(); view != nil && agreed == len(n.cfg.Peers)-1 {
			return n.configurationOf(view), nil
		}
		if missing != "" {
			n.logEvery("founding", "waiting for the founding members", "missing", missing)
		}
		select {
		case <-ctx.Done():
			return hraft.Configuration{}, fmt.Errorf("waiting for the founding members: %w", context.Cause(ctx))
		case <-n.stop:
			return hraft.Configuration{}, ErrClosed
		case <-t.C:
		}
	}
}

// foundedConfiguration is what a founding member does that finds another one ahead: the same.
func (n *Node) foundedConfiguration(a introduction) (hraft.Configuration, error) {
	view := make(map[string]engine.NodeID)
	for id := range a.Members {
		view[nameOf(id)] = id
	}
	same := len(view) == len(n.cfg.Peers)
	for _, p := range n.cfg.Peers {
		id, ok := view[p.Name]
		same = same && ok && a.Members[id] == p.Addr
	}
	if !same {
		return hraft.Configuration{}, &StartError{Kind: ErrRefused, Message: "the cluster was founded with other members than --peers lists",
			Remedy: "make --peers the same on all nodes"}
	}
	return n.configurationOf(view), nil
}

// wiped is the refusal of a node whose name another incarnation has.
func (n *Node) wiped(a introduction) error {
	return &StartError{Kind: ErrWiped,
		Message: fmt.Sprintf("%s is empty, and the cluster knows %s as %s", n.cfg.Dir, n.cfg.Name, a.Known),
		Remedy:  fmt.Sprintf("tercet cluster replace %s --server URL; then: tercet server --node-id %s … --join H:P[,H:P]", n.cfg.Name, n.cfg.Name)}
}

// join asks for admission until this node is a member.
func (n *Node) join(ctx context.Context) error {
	level := n.levelMax()
	t := time.NewTicker(joinEvery)
	defer t.Stop()
	var last error
	for {
		asked := make(map[string]bool)
		queue := slices.Clone(n.cfg.Join)
		for len(queue) > 0 {
			addr := queue[0]
			queue = queue[1:]
			if asked[addr] {
				continue
			}
			asked[addr] = true
			a, err := n.ask(ctx, addr, introduction{Want: "join"})
			if err != nil {
				last = err
				continue
			}
			if !a.Founded {
				last = fmt.Errorf("the node at %s is part of no cluster yet", addr)
				continue
			}
			n.directory.put(card{ID: a.ID, Zone: a.Zone, Peer: a.Addr, Level: a.Level}, n.now())
			if a.NeedLevel != 0 {
				return &StartError{Kind: ErrRefused, Message: fmt.Sprintf("the cluster is at feature level %d, and this release knows %d", a.NeedLevel, level),
					Remedy: sameRelease}
			}
			if a.Admitted {
				return n.admitted(a)
			}
			if a.Known != "" {
				return n.wiped(a)
			}
			last = fmt.Errorf("not invited yet: run tercet cluster add %s --server URL", n.cfg.Name)
			if a.Leader != "" {
				queue = append(queue, a.Leader)
			}
		}
		n.logEvery("join", "waiting for admission", "why", last)
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for admission: %w (%w)", context.Cause(ctx), last)
		case <-n.stop:
			return ErrClosed
		case <-t.C:
		}
	}
}

// admitted takes the table of members from the node that knows.
func (n *Node) admitted(a introduction) error {
	if a.Cluster == "" {
		return errors.New("the cluster has no id yet")
	}
	n.foundedAs(a.Cluster)
	peers := make(map[peer.ID]string, len(a.Members))
	for id, addr := range a.Members {
		peers[peerID(id)] = addr
	}
	n.mesh.SetPeers(peers)
	n.log.Info("admitted", "cluster", a.Cluster)
	return nil
}
