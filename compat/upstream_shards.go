package compat

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tercet.dev/tercet/compat/resp"
)

// upstreamTable is what the upstream says of its commands and its shards. It is asked once, and about its shards again when
// they turn out to have changed.
type upstreamTable struct {
	known  atomic.Pointer[map[string]UpstreamCommand] // every command of every client looks here
	routes atomic.Pointer[routes]                     // nil for an upstream that is one server
	mu     sync.Mutex
	failed error
	at     time.Time
	asked  time.Time // about the shards
}

// routes is a map of a cluster's slots. It does not change; a new one takes its place.
type routes struct {
	shards []string // addresses of primaries
	slot   [slotCount]uint16
	// patched is set when redirections changed the map since the cluster was asked for it.
	patched bool
}

// noShard marks a slot that nobody has.
const noShard = math.MaxUint16

// upstreamRetry is how long a failure to ask is remembered, and how long a map of the slots is good enough.
const upstreamRetry = time.Second

// upstreamHops bounds the redirections that a command follows.
const upstreamHops = 16

func (t *upstreamTable) get(u Upstream) (map[string]UpstreamCommand, error) {
	if table := t.known.Load(); table != nil {
		return *table, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if table := t.known.Load(); table != nil {
		return *table, nil
	}
	if t.failed != nil && time.Since(t.at) < upstreamRetry {
		return nil, t.failed
	}
	ctx, cancel := context.WithTimeout(context.Background(), upstreamDial)
	defer cancel()
	table, err := u.KeyTable(ctx)
	if err == nil {
		err = t.ask(ctx, u)
	}
	if t.failed, t.at = err, time.Now(); err == nil {
		t.known.Store(&table)
	}
	return table, err
}

// ask asks for the map of the slots, with the lock held.
func (t *upstreamTable) ask(ctx context.Context, u Upstream) error {
	var known []string
	old := t.routes.Load()
	if old != nil {
		known = old.shards
	}
	t.asked = time.Now()
	shards, err := u.Shards(ctx, known)
	if err != nil {
		return err
	}
	if shards == nil {
		return nil
	}
	r := &routes{}
	for i := range r.slot {
		r.slot[i] = noShard
	}
	slices.SortFunc(shards, func(a, b UpstreamShard) int { return strings.Compare(a.Addr, b.Addr) })
	for i, s := range shards {
		r.shards = append(r.shards, s.Addr)
		for _, span := range s.Slots {
			for n := max(span[0], 0); n <= min(span[1], slotCount-1); n++ {
				r.slot[n] = uint16(i)
			}
		}
	}
	if old == nil || old.patched || old.slot != r.slot || !slices.Equal(old.shards, r.shards) {
		t.routes.Store(r)
	}
	return nil
}

// refresh asks again, unless that was done a moment ago.
func (t *upstreamTable) refresh(u Upstream) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if time.Since(t.asked) < upstreamRetry {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), upstreamDial)
	defer cancel()
	return t.ask(ctx, u)
}

// moved notes where a slot is now.
func (t *upstreamTable) moved(slot int, addr string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.routes.Load()
	if n := old.slot[slot]; n != noShard && old.shards[n] == addr {
		return
	}
	r := &routes{shards: old.shards, slot: old.slot, patched: true}
	i := slices.Index(r.shards, addr)
	if i < 0 {
		i = len(r.shards)
		r.shards = append(slices.Clone(r.shards), addr)
	}
	r.slot[slot] = uint16(i)
	t.routes.Store(r)
}

func (t *upstreamTable) clustered() bool { return t.routes.Load() != nil }

// errUnserved says that nobody has a slot.
var errUnserved = errors.New("no shard serves the slot of the key")

// upstreamOf returns the session with whoever has a slot; -1 is for commands without keys, which go to any shard, for a
// client always to the same.
func (c *conn) upstreamOf(slot int) (*upstreamConn, error) {
	if c.upV3.Load() != c.w.V3 {
		c.upV3.Store(c.w.V3)
	}
	t := &c.s.upstream
	if c.upOne != nil && !c.upOne.over() {
		return c.upOne, nil
	}
	if _, err := t.get(c.s.opts.Upstream); err != nil {
		return nil, err
	}
	if !t.clustered() {
		u, err := c.upstreamAt("")
		if err == nil {
			c.upOne = u
		}
		return u, err
	}
	c.adoptRoutes()
	u, err := c.shardOf(slot)
	if err != nil {
		// Somebody else may have its place.
		if again := t.refresh(c.s.opts.Upstream); again != nil {
			return nil, err
		}
		c.adoptRoutes()
		u, err = c.shardOf(slot)
	}
	return u, err
}

func (c *conn) shardOf(slot int) (*upstreamConn, error) {
	r := c.routes
	if slot < 0 {
		return c.upstreamAt(r.shards[c.id%uint64(len(r.shards))])
	}
	if r.slot[slot] == noShard {
		return nil, errUnserved
	}
	return c.upstreamAt(r.shards[r.slot[slot]])
}

// adoptRoutes makes the client follow the newest map. Everything sent by an older one is answered first: so two commands
// on one key, of which the first is redirected, arrive in their order.
func (c *conn) adoptRoutes() {
	t := &c.s.upstream
	r := t.routes.Load()
	if c.routes == r {
		return
	}
	if r.patched && t.refresh(c.s.opts.Upstream) == nil {
		r = t.routes.Load()
	}
	if c.routes != nil {
		c.settle()
	}
	c.routes = r
}

// follow sends a command after its slot, and reports whether the answer will come from there.
func (u *upstreamConn) follow(w *upstreamWait) bool {
	sent, c := w.sent, u.c
	words := strings.Fields(sent.redirect)
	sent.redirect = ""
	if len(words) != 3 || sent.fold != nil || sent.hops >= upstreamHops || !c.s.upstream.clustered() {
		return false
	}
	slot, err := strconv.Atoi(words[1])
	if err != nil || slot < 0 || slot >= slotCount {
		return false
	}
	host, port, err := net.SplitHostPort(words[2])
	if err != nil {
		return false
	}
	if host == "" { // the one that answered, at another port
		host, _, _ = net.SplitHostPort(u.addr)
	}
	addr := net.JoinHostPort(host, port)
	if words[0] == "MOVED" {
		c.s.upstream.moved(slot, addr)
	}
	if sent.watched {
		// There the keys are not watched: as if they had changed.
		null := resp.Buffer{V3: sent.v3}
		null.NullArray()
		if w.s.fill(null.B) {
			c.flush()
		}
		return true
	}
	sent.hops++
	next := upstreamWait{s: w.s, sent: sent}
	to, err := c.upstreamAt(addr)
	refusal := errBroken
	if err != nil {
		refusal = "-ERR the upstream's shard " + addr + " cannot be reached, nothing was done: " + oneLine(err.Error()) + "\r\n"
	} else if to.enqueueAfter(words[0] == "ASK", next) {
		to.send()
		return true
	}
	if u.answer(&next, []byte(refusal)) {
		c.flush()
	}
	return true
}

// enqueueAfter is enqueue for a command that was redirected. With asking it is preceded by ASKING, whose reply nobody
// wants; in a transaction that holds up to its end.
func (u *upstreamConn) enqueueAfter(asking bool, w upstreamWait) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return false
	}
	if asking {
		u.waiting = append(u.waiting, upstreamWait{})
		u.out.Raw([]byte("*1\r\n$6\r\nASKING\r\n"))
	}
	w.sent.left = w.sent.replies
	u.kept += len(w.sent.raw)
	u.subscribing = u.subscribing || w.sent.sub != ""
	u.waiting = append(u.waiting, w)
	u.out.Raw(w.sent.raw)
	return true
}

// subscribeUpstream sends what begins or ends subscriptions. Its answers are messages.
func (c *conn) subscribeUpstream(name string, args [][]byte, slot int) {
	c.upSubscribing = true
	sharded := name == "ssubscribe" || name == "sunsubscribe"
	clustered := c.s.upstream.clustered()
	if !sharded || !clustered {
		slot = -1 // messages go to every shard
	}
	if sharded && clustered && slot < 0 {
		// All channels of all shards.
		any := false
		for _, u := range c.upstreams() {
			if u.subscribed() {
				any = true
				c.sendTo(u, args, -1)
			}
		}
		if any {
			return
		}
	}
	u, err := c.upChannels, error(nil)
	if u == nil || u.over() || slot >= 0 {
		if u, err = c.upstreamOf(slot); err != nil {
			c.unreachable(err)
			return
		}
	}
	if slot < 0 {
		c.upChannels = u
	}
	u.mu.Lock()
	u.subscribing = true
	u.mu.Unlock()
	c.sendTo(u, args, -1)
}

// sendEverywhere sends a command without keys to whom it concerns: to all shards, or to any.
func (c *conn) sendEverywhere(name string, args [][]byte, known UpstreamCommand) {
	switch {
	case name == "select" && (len(args) != 2 || string(args[1]) != "0"):
		c.w.Error("ERR SELECT is not allowed in cluster mode")
		c.emit()
		return
	case name == "scan":
		c.scanUpstream(args)
		return
	case !known.Everywhere:
		c.sendUpstream(args, -1)
		return
	}
	if _, err := c.upstreamOf(-1); err != nil {
		c.unreachable(err)
		return
	}
	if c.routes.patched {
		// A shard that lost its slots must not be counted.
		_ = c.s.upstream.refresh(c.s.opts.Upstream)
		c.adoptRoutes()
	}
	how := known.Fold
	if name == "randomkey" {
		how = "first"
	}
	var raw resp.Buffer
	appendCommand(&raw, args)
	targets := c.routes.serving()
	f := &fold{s: c.place(), how: how, replies: make([][]byte, len(targets)), left: len(targets)}
	c.s.metrics.passed.Inc()
	for i, at := range targets {
		w := &upstreamWait{sent: &sentCommand{fold: f, part: i, replies: 1}}
		u, err := c.upstreamAt(c.routes.shards[at])
		if err != nil {
			if f.take(i, []byte("-ERR the upstream's shard "+c.routes.shards[at]+" cannot be reached: "+oneLine(err.Error())+"\r\n")) {
				c.flush()
			}
			continue
		}
		c.loginAgain(u)
		u.room()
		if !u.enqueue(nil, raw.B, w) && f.take(i, []byte(errBroken)) {
			c.flush()
		}
	}
}

// serving returns the shards that have slots.
func (r *routes) serving() []int {
	has := make([]bool, len(r.shards))
	for _, n := range r.slot {
		if n != noShard {
			has[n] = true
		}
	}
	var list []int
	for i, ok := range has {
		if ok {
			list = append(list, i)
		}
	}
	return list
}

// scanUpstream goes through the shards one after the other. Which one it is at is part of the cursor.
func (c *conn) scanUpstream(args [][]byte) {
	if _, err := c.upstreamOf(-1); err != nil {
		c.unreachable(err)
		return
	}
	serving := c.routes.serving()
	n := uint64(len(serving))
	cursor, err := uint64(0), error(nil)
	if len(args) > 1 {
		cursor, err = strconv.ParseUint(string(args[1]), 10, 64)
	}
	if len(args) < 2 || err != nil {
		c.sendUpstream(args, -1) // its error is the upstream's to word
		return
	}
	at := cursor % n
	u, err := c.upstreamAt(c.routes.shards[serving[at]])
	if err != nil {
		c.unreachable(err)
		return
	}
	words := slices.Clone(args)
	words[1] = strconv.AppendUint(nil, cursor/n, 10)
	f := &fold{s: c.place(), how: "scan", shard: at, shards: n, replies: make([][]byte, 1), left: 1}
	c.s.metrics.passed.Inc()
	c.loginAgain(u)
	u.room()
	if !u.enqueue(words, nil, &upstreamWait{sent: &sentCommand{fold: f, replies: 1}}) && f.take(0, []byte(errBroken)) {
		c.flush()
	}
}

// fold makes one reply of those of several shards.
type fold struct {
	s   *slot
	how string
	// shard of shards is where a SCAN is.
	shard, shards uint64

	mu      sync.Mutex
	left    int
	replies [][]byte
}

// take takes one shard's reply, and reports whether the client's writer has to be woken.
func (f *fold) take(part int, reply []byte) bool {
	f.mu.Lock()
	f.replies[part] = reply
	f.left--
	left := f.left
	f.mu.Unlock()
	return left == 0 && f.s.fill(f.whole())
}

// whole is the reply to the client.
func (f *fold) whole() []byte {
	first := f.replies[0]
	var failed, succeeded []byte
	for _, r := range f.replies {
		if r[0] == '-' || r[0] == '!' {
			failed = r
		} else {
			succeeded = r
		}
	}
	switch {
	case f.how == "one_succeeded" && succeeded != nil:
		return succeeded
	case failed != nil:
		return failed
	}
	switch f.how {
	case "scan":
		return f.scanned(first)
	case "first":
		for _, r := range f.replies {
			if !bytes.HasPrefix(r, []byte("$-1")) && r[0] != '_' {
				return r
			}
		}
		return first
	case "all_succeeded", "special":
		return first
	case "agg_sum", "agg_min", "agg_max":
		return f.aggregated()
	case "agg_logical_and", "agg_logical_or":
		return f.logical()
	}
	return f.joined()
}

// scanned puts the shard into the cursor of a SCAN's reply.
func (f *fold) scanned(reply []byte) []byte {
	head, rest, ok := bytes.Cut(reply, []byte("\r\n"))
	_, rest, ok2 := bytes.Cut(rest, []byte("\r\n"))
	number, rest, ok3 := bytes.Cut(rest, []byte("\r\n"))
	cursor, err := strconv.ParseUint(string(number), 10, 64)
	if !ok || !ok2 || !ok3 || err != nil || string(head) != "*2" {
		return reply
	}
	switch {
	case cursor > (math.MaxUint64-f.shard)/f.shards:
		return []byte("-ERR the upstream's cursor is too large to be passed on\r\n")
	case cursor != 0:
		cursor = cursor*f.shards + f.shard
	case f.shard+1 < f.shards:
		cursor = f.shard + 1
	}
	var b resp.Buffer
	b.Array(2)
	b.Uint(cursor)
	b.Raw(rest)
	return b.B
}

// aggregated is the sum, least or greatest of integers.
func (f *fold) aggregated() []byte {
	total := int64(0)
	for i, r := range f.replies {
		n, err := strconv.ParseInt(string(bytes.TrimSpace(r[1:])), 10, 64)
		if r[0] != ':' || err != nil {
			return r
		}
		switch {
		case i == 0:
			total = n
		case f.how == "agg_sum":
			total += n
		case f.how == "agg_min":
			total = min(total, n)
		default:
			total = max(total, n)
		}
	}
	return fmt.Appendf(nil, ":%d\r\n", total)
}

// logical joins arrays of integers that are truths, place by place.
func (f *fold) logical() []byte {
	lines := bytes.SplitAfter(f.replies[0], []byte("\r\n"))
	for _, r := range f.replies[1:] {
		other := bytes.SplitAfter(r, []byte("\r\n"))
		if len(other) != len(lines) {
			return f.replies[0]
		}
		for i := 1; i < len(lines); i++ {
			if len(lines[i]) != 4 || len(other[i]) != 4 {
				continue
			}
			if set := f.how == "agg_logical_or"; (other[i][1] == '1') == set {
				lines[i] = other[i]
			}
		}
	}
	return bytes.Join(lines, nil)
}

// joined puts arrays behind each other.
func (f *fold) joined() []byte {
	count := int64(0)
	var all []byte
	for _, r := range f.replies {
		head, rest, _ := bytes.Cut(r, []byte("\r\n"))
		n, err := strconv.ParseInt(string(head[1:]), 10, 64)
		if err != nil || r[0] != f.replies[0][0] || r[0] != '*' && r[0] != '~' && r[0] != '%' {
			return f.replies[0]
		}
		count += max(n, 0)
		all = append(all, rest...)
	}
	return append(fmt.Appendf(nil, "%c%d\r\n", f.replies[0][0], count), all...)
}
