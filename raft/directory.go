package raft

import (
	"encoding/json"
	"path/filepath"
	"sync"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/wal/disk"
)

// card is what a node tells the others about itself, twice a second. Nothing of it is needed for safety; the
// leader uses the free space to refuse publishes in time, and the zones to keep one voter in each.
type card struct {
	ID      engine.NodeID `json:"id"`
	Zone    string        `json:"zone"`
	Peer    string        `json:"peer,omitempty"`
	HTTP    string        `json:"http,omitempty"`
	Valkey  string        `json:"valkey,omitempty"`
	Version string        `json:"version,omitempty"`
	// Free and Reserve are bytes of the data directory's file system.
	Free    int64  `json:"free,omitempty"`
	Reserve int64  `json:"reserve,omitempty"`
	Applied uint64 `json:"applied,omitempty"`
	// Leads is the term in which the node is open for service as leader, 0 when it is not.
	Leads uint64 `json:"leads,omitempty"`
	// Stalled says that the node's disk has not synced for too long.
	Stalled bool `json:"stalled,omitempty"`
	// Draining says that the node is about to stop.
	Draining bool `json:"draining,omitempty"`
	// Clock is the cluster time when the card was written, from the node that leads.
	Clock int64 `json:"clock,omitempty"`
	// Level is the newest feature level the node's release knows; nil where it was not told.
	Level *uint32 `json:"level,omitempty"`
	// Expected names the nodes that an operator has invited (AddMember, ReplaceMember), with the time until
	// which that holds, Unix seconds. It travels with the cards so that the next leader knows.
	Expected map[string]int64 `json:"expected,omitempty"`
}

func (c *card) levelKnown() bool { return c.Level != nil }

// invitationLife is how long an operator's invitation holds.
const invitationLife = 24 * time.Hour

// leaderNewsMax is how old a card may be that says who leads.
const leaderNewsMax = 1500 * time.Millisecond

// directory is what a node knows of the others' cards, kept in members.json across restarts.
type directory struct {
	fs   disk.FS
	path string
	self engine.NodeID

	mu    sync.Mutex
	cards map[engine.NodeID]cardAt
	// expected are the names an operator has invited, with the end of the invitation.
	expected map[string]time.Time
	dirty    bool
}

type cardAt struct {
	card
	at time.Time
}

// directoryFile is the content of members.json.
type directoryFile struct {
	Cards    []card           `json:"cards"`
	Expected map[string]int64 `json:"expected,omitempty"`
}

func openDirectory(d *dataDir) *directory {
	dir := &directory{fs: d.fs, path: filepath.Join(d.path, membersName), self: d.id.id(),
		cards: make(map[engine.NodeID]cardAt), expected: make(map[string]time.Time)}
	var f directoryFile
	if raw, err := readFile(d.fs, dir.path); err == nil && json.Unmarshal(raw, &f) == nil {
		for _, c := range f.Cards {
			dir.cards[c.ID] = cardAt{card: c}
		}
		for name, until := range f.Expected {
			dir.expected[name] = time.Unix(until, 0)
		}
	}
	return dir
}

// put takes note of a card.
func (d *directory) put(c card, now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.cards[c.ID]
	if old.Zone != c.Zone || old.HTTP != c.HTTP || old.Peer != c.Peer || old.Valkey != c.Valkey {
		d.dirty = true
	}
	d.cards[c.ID] = cardAt{card: c, at: now}
	for name, until := range c.Expected {
		if t := time.Unix(until, 0); t.After(d.expected[name]) {
			d.expected[name] = t
			d.dirty = true
		}
	}
}

// putLevel takes note of the level a node's release knows, as it says when it introduces itself.
func (d *directory) putLevel(id engine.NodeID, level *uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.cards[id]
	c.ID, c.Level = id, level
	d.cards[id] = c
}

// get returns a node's card and when it came, zero when it is from before this process.
func (d *directory) get(id engine.NodeID) (card, time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.cards[id]
	return c.card, c.at
}

// leader returns the node that says of itself, lately, that it leads in the newest term.
func (d *directory) leader(now time.Time) (id engine.NodeID, term uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, c := range d.cards {
		if c.Leads > term && !c.at.IsZero() && now.Sub(c.at) < leaderNewsMax {
			id, term = c.ID, c.Leads
		}
	}
	return id, term
}

// stalled reports whether a node says of itself, lately, that its disk is stalled.
func (d *directory) stalled(id engine.NodeID, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, ok := d.cards[id]
	return ok && c.Stalled && now.Sub(c.at) < leaderNewsMax
}

// zone returns the zone of a node; a node that was never heard of is taken to be its own.
func (d *directory) zone(id engine.NodeID) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	if c, ok := d.cards[id]; ok && c.Zone != "" {
		return c.Zone
	}
	return nameOf(id)
}

// invite lets a node of this name join.
func (d *directory) invite(name string, until time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.expected[name] = until
	d.dirty = true
}

// settled ends an invitation.
func (d *directory) settled(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, ok := d.expected[name]; ok {
		delete(d.expected, name)
		d.dirty = true
	}
}

// invited reports whether a node of this name may join.
func (d *directory) invited(name string, now time.Time) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	until, ok := d.expected[name]
	return ok && now.Before(until)
}

// invitations returns what goes into this node's card.
func (d *directory) invitations(now time.Time) map[string]int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out map[string]int64
	for name, until := range d.expected {
		if !now.Before(until) {
			continue
		}
		if out == nil {
			out = make(map[string]int64)
		}
		out[name] = until.Unix()
	}
	return out
}

// save writes members.json if something worth keeping changed. keep says which nodes are still of interest.
// It is called with the directory's lock held.
func (d *directory) save(keep func(id engine.NodeID, heard bool) bool) error {
	d.mu.Lock()
	if !d.dirty {
		d.mu.Unlock()
		return nil
	}
	d.dirty = false
	var f directoryFile
	for id, c := range d.cards {
		if !keep(id, !c.at.IsZero()) {
			delete(d.cards, id)
			continue
		}
		f.Cards = append(f.Cards, card{ID: c.ID, Zone: c.Zone, Peer: c.Peer, HTTP: c.HTTP, Valkey: c.Valkey})
	}
	for name, until := range d.expected {
		if f.Expected == nil {
			f.Expected = make(map[string]int64)
		}
		f.Expected[name] = until.Unix()
	}
	d.mu.Unlock()
	raw, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(d.fs, d.path, append(raw, '\n'))
}
