package compat

import (
	"context"
	"encoding/binary"
	"maps"
	"slices"
	"sync"
	"time"

	"tercet.dev/tercet/compat/acl"
	"tercet.dev/tercet/compat/resp"
)

// Broadcaster carries messages to the front ends of the other nodes. A Backend that is one makes PUBLISH reach the
// subscribers of all nodes; *raft.Node is one.
type Broadcaster interface {
	// Broadcast hands payload to every other node that can be reached, and returns their answers.
	Broadcast(ctx context.Context, payload []byte) [][]byte
	// OnBroadcast sets what answers the payloads of other nodes.
	OnBroadcast(answer func(payload []byte) []byte)
}

// broadcastTimeout bounds how long PUBLISH waits for another node. Pub/sub promises nothing to those who are not there.
const broadcastTimeout = 500 * time.Millisecond

// The three kinds of subscription.
const (
	subChannel = iota
	subPattern
	subShard
	subKinds
)

var subWords = [subKinds][3]string{
	subChannel: {"subscribe", "unsubscribe", "message"},
	subPattern: {"psubscribe", "punsubscribe", "pmessage"},
	subShard:   {"ssubscribe", "sunsubscribe", "smessage"},
}

// bus knows who has subscribed to what on this node.
type bus struct {
	mu   sync.RWMutex
	subs [subKinds]map[string]map[*conn]struct{}
	// members are the connections with any subscription.
	members map[*conn]struct{}
}

func (b *bus) init() {
	for i := range b.subs {
		b.subs[i] = map[string]map[*conn]struct{}{}
	}
	b.members = map[*conn]struct{}{}
}

// subscriber is what one connection has subscribed to.
type subscriber struct {
	names [subKinds]map[string]struct{}
}

func (s *subscriber) count() int {
	if s == nil {
		return 0
	}
	return len(s.names[subChannel]) + len(s.names[subPattern]) + len(s.names[subShard])
}

// number is what a confirmation tells: shard channels count apart.
func (s *subscriber) number(kind int) int64 {
	if kind == subShard {
		return int64(len(s.names[subShard]))
	}
	return int64(len(s.names[subChannel]) + len(s.names[subPattern]))
}

// subscriptionsMax bounds the subscriptions of one connection.
const subscriptionsMax = 10000

func (b *bus) add(c *conn, kind int, name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	set := b.subs[kind][name]
	if set == nil {
		set = map[*conn]struct{}{}
		b.subs[kind][name] = set
	}
	set[c] = struct{}{}
	b.members[c] = struct{}{}
}

func (b *bus) remove(c *conn, kind int, name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.removeLocked(c, kind, name)
}

func (b *bus) removeLocked(c *conn, kind int, name string) {
	if set := b.subs[kind][name]; set != nil {
		delete(set, c)
		if len(set) == 0 {
			delete(b.subs[kind], name)
		}
	}
}

// leave ends all subscriptions of a connection.
func (b *bus) leave(c *conn) {
	if c.subs == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for kind := range c.subs.names {
		for name := range c.subs.names[kind] {
			b.removeLocked(c, kind, name)
		}
	}
	delete(b.members, c)
	c.subs = nil
}

func (b *bus) clients() int {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return len(b.members)
}

func (b *bus) sizes() (channels, patterns int) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return len(b.subs[subChannel]), len(b.subs[subPattern])
}

// deliver hands a message to the subscribers of this node and returns their number.
func (b *bus) deliver(shard bool, channel, message string) int {
	b.mu.RLock()
	defer b.mu.RUnlock()
	n := 0
	kind := subChannel
	if shard {
		kind = subShard
	}
	send := func(set map[*conn]struct{}, words ...string) {
		var forms [2][]byte
		for c := range set {
			v3 := 0
			if c.desc.isV3() {
				v3 = 1
			}
			if forms[v3] == nil {
				w := resp.Buffer{V3: v3 == 1}
				w.Push(len(words))
				for _, word := range words {
					w.String(word)
				}
				forms[v3] = w.B
			}
			c.push(forms[v3])
			n++
		}
	}
	if set := b.subs[kind][channel]; set != nil {
		send(set, subWords[kind][2], channel, message)
	}
	if !shard {
		for pattern, set := range b.subs[subPattern] {
			if acl.Match(pattern, channel) {
				send(set, "pmessage", pattern, channel, message)
			}
		}
	}
	return n
}

func (d *description) isV3() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.proto == 3
}

// publish hands a message to the subscribers of all nodes.
func (s *Server) publish(shard bool, channel, message []byte) int {
	n := s.bus.deliver(shard, string(channel), string(message))
	others, ok := s.backend.(Broadcaster)
	if !ok {
		return n
	}
	payload := make([]byte, 0, len(channel)+len(message)+12)
	kind := byte(subChannel)
	if shard {
		kind = subShard
	}
	payload = append(payload, kind)
	payload = binary.AppendUvarint(payload, uint64(len(channel)))
	payload = append(append(payload, channel...), message...)
	ctx, cancel := context.WithTimeout(context.Background(), broadcastTimeout)
	defer cancel()
	for _, answer := range others.Broadcast(ctx, payload) {
		if there, k := binary.Uvarint(answer); k > 0 && there < 1<<31 {
			n += int(there)
		}
	}
	return n
}

// received takes a message that was published on another node.
func (s *Server) received(payload []byte) []byte {
	if len(payload) < 2 {
		return nil
	}
	size, k := binary.Uvarint(payload[1:])
	if k <= 0 || size > uint64(len(payload)-1-k) {
		return nil
	}
	rest := payload[1+k:]
	n := s.bus.deliver(payload[0] == subShard, string(rest[:size]), string(rest[size:]))
	return binary.AppendUvarint(nil, uint64(n))
}

func subscribe(kind int) func(c *conn, a [][]byte) {
	return func(c *conn, a [][]byte) {
		if c.subs == nil {
			c.subs = &subscriber{}
		}
		if c.subs.count()+len(a)-1 > subscriptionsMax {
			c.w.Error("ERR a connection may have " + itoa(subscriptionsMax) + " subscriptions")
			return
		}
		for _, arg := range a[1:] {
			name := string(arg)
			if c.subs.names[kind] == nil {
				c.subs.names[kind] = map[string]struct{}{}
			}
			c.subs.names[kind][name] = struct{}{}
			c.w.Push(3)
			c.w.String(subWords[kind][0])
			c.w.String(name)
			c.w.Int(c.subs.number(kind))
			// The confirmation goes out before any message.
			c.emitConfirmation()
			c.s.bus.add(c, kind, name)
		}
		c.describeSubscriptions()
	}
}

// emitConfirmation takes the confirmation of a subscription, unless it is part of a transaction's reply.
func (c *conn) emitConfirmation() {
	if c.inExec {
		return
	}
	c.settle()
	c.emit()
}

func unsubscribe(kind int) func(c *conn, a [][]byte) {
	return func(c *conn, a [][]byte) {
		var names []string
		for _, arg := range a[1:] {
			names = append(names, string(arg))
		}
		if len(a) == 1 && c.subs != nil {
			names = slices.Sorted(maps.Keys(c.subs.names[kind]))
		}
		confirm := func(name string, null bool) {
			c.w.Push(3)
			c.w.String(subWords[kind][1])
			if null {
				c.w.Null()
			} else {
				c.w.String(name)
			}
			n := int64(0)
			if c.subs != nil {
				n = c.subs.number(kind)
			}
			c.w.Int(n)
		}
		if len(names) == 0 {
			confirm("", true)
			return
		}
		for _, name := range names {
			if c.subs != nil {
				delete(c.subs.names[kind], name)
				c.s.bus.remove(c, kind, name)
			}
			confirm(name, false)
		}
		c.describeSubscriptions()
	}
}

func (c *conn) describeSubscriptions() {
	var n [subKinds]int
	if c.subs != nil {
		for kind := range n {
			n[kind] = len(c.subs.names[kind])
		}
		if c.subs.count() == 0 {
			c.s.bus.leave(c)
		}
	}
	c.desc.set(func(d *description) { d.sub, d.psub, d.ssub = n[subChannel], n[subPattern], n[subShard] })
}

// publishCommand answers PUBLISH. A message never overtakes the writes that stand before it in the pipeline.
func publishCommand(shard bool) func(c *conn, a [][]byte) {
	return func(c *conn, a [][]byte) {
		c.settle()
		c.w.Int(int64(c.s.publish(shard, a[1], a[2])))
	}
}

func pubsubChannels(kind int) func(c *conn, a [][]byte) {
	return func(c *conn, a [][]byte) {
		if len(a) > 3 {
			c.w.Error("ERR Unknown PUBSUB subcommand or wrong number of arguments for '" + string(a[1]) + "'")
			return
		}
		pattern := "*"
		if len(a) == 3 {
			pattern = string(a[2])
		}
		b := &c.s.bus
		b.mu.RLock()
		var names []string
		for name := range b.subs[kind] {
			if acl.Match(pattern, name) {
				names = append(names, name)
			}
		}
		b.mu.RUnlock()
		slices.Sort(names)
		c.w.Array(len(names))
		for _, n := range names {
			c.w.String(n)
		}
	}
}

func pubsubNumSub(kind int) func(c *conn, a [][]byte) {
	return func(c *conn, a [][]byte) {
		b := &c.s.bus
		b.mu.RLock()
		defer b.mu.RUnlock()
		c.w.Array(2 * (len(a) - 2))
		for _, name := range a[2:] {
			c.w.Bulk(name)
			c.w.Int(int64(len(b.subs[kind][string(name)])))
		}
	}
}

func cmdPubsubNumPat(c *conn, _ [][]byte) {
	_, patterns := c.s.bus.sizes()
	c.w.Int(int64(patterns))
}
