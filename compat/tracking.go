package compat

import (
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"tercet.dev/tercet/compat/command"
	"tercet.dev/tercet/compat/resp"
)

// Client-side caching. Without BCAST whatever is read under tracking is invalidated right after its reply: the protocol
// allows that, and it keeps clients correct without remembering what they have. With BCAST a client hears of every key
// with one of its prefixes that an entry of the log changes, on whatever node that was asked for.

// tracking is what CLIENT TRACKING has set up.
type tracking struct {
	on, optIn, optOut, noLoop, bcast bool
	// caching is what CLIENT CACHING said about the next command.
	caching, cachingSet bool
	// redirect is the client that invalidations go to, 0 for this one.
	redirect uint64
	prefixes []string
}

// KeyFollower tells of the keys that change. A Backend that is one makes CLIENT TRACKING BCAST possible; *raft.Node is one.
type KeyFollower interface {
	// OnKeys sets what is called with the keys that each applied entry changed, nil for all. It must not keep the slice.
	OnKeys(changed func(keys []string))
}

// invalidateChannel is where clients of RESP2 hear of invalidations that were redirected to them.
const invalidateChannel = "__redis__:invalidate"

// broadcasts are the clients that track prefixes.
type broadcasts struct {
	count atomic.Int64 // lets what nobody tracks cost one load
	mu    sync.Mutex
	by    map[*conn]broadcast
}

type broadcast struct {
	prefixes []string
	redirect uint64
}

func (b *broadcasts) set(c *conn, t *tracking) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.by == nil {
		b.by = map[*conn]broadcast{}
	}
	b.by[c] = broadcast{t.prefixes, t.redirect}
	b.count.Store(int64(len(b.by)))
}

func (b *broadcasts) remove(c *conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.by, c)
	b.count.Store(int64(len(b.by)))
}

// keysChanged is called while an entry is applied.
func (s *Server) keysChanged(keys []string) {
	b := &s.broadcasts
	if b.count.Load() == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	var some []string
	for c, of := range b.by {
		if keys == nil {
			c.invalidate(of.redirect, nil)
			continue
		}
		some = some[:0]
		for _, k := range keys {
			if (len(of.prefixes) == 0 || slices.ContainsFunc(of.prefixes, func(p string) bool { return strings.HasPrefix(k, p) })) && !slices.Contains(some, k) {
				some = append(some, k)
			}
		}
		if len(some) > 0 {
			c.invalidate(of.redirect, some)
		}
	}
}

// invalidate tells the client, or the one it redirects to, that keys have changed; nil stands for all. It may be called from
// any goroutine.
func (c *conn) invalidate(redirect uint64, keys []string) {
	to := c
	if redirect != 0 {
		if to = c.s.clients.get(redirect); to == nil {
			if c.desc.isV3() {
				w := resp.Buffer{V3: true}
				w.Push(2)
				w.String("tracking-redir-broken")
				w.Int(int64(redirect))
				c.push(w.B)
			}
			return
		}
	}
	w := resp.Buffer{V3: to.desc.isV3()}
	switch {
	case w.V3:
		w.Push(2)
		w.String("invalidate")
	case redirect != 0 && c.s.bus.has(to, invalidateChannel):
		w.Array(3)
		w.String("message")
		w.String(invalidateChannel)
	default:
		return // RESP2 has no place for it
	}
	appendKeys(&w, keys)
	to.push(w.B)
}

func appendKeys(w *resp.Buffer, keys []string) {
	if keys == nil {
		w.NullArray()
		return
	}
	w.Array(len(keys))
	for _, k := range keys {
		w.String(k)
	}
}

// has reports whether a client has subscribed to a channel.
func (b *bus) has(c *conn, channel string) bool {
	b.mu.RLock()
	defer b.mu.RUnlock()
	_, ok := b.subs[subChannel][channel][c]
	return ok
}

func cmdClientTracking(c *conn, a [][]byte) {
	old := &c.tracking
	var t tracking
	redirected := false
	for i := 3; i < len(a); i++ {
		more := i+1 < len(a)
		switch word := lower(a[i]); {
		case word == "redirect" && more:
			i++
			n, ok := resp.ParseInt(a[i])
			switch {
			case redirected:
				c.w.Error("ERR A client can only redirect to a single other client")
				return
			case !ok:
				c.w.Error(errNotInteger)
				return
			case n < 1 || c.s.clients.get(uint64(n)) == nil:
				c.w.Error("ERR The client ID you want redirect to does not exist")
				return
			}
			redirected, t.redirect = true, uint64(n)
		case word == "bcast":
			t.bcast = true
		case word == "optin":
			t.optIn = true
		case word == "optout":
			t.optOut = true
		case word == "noloop":
			t.noLoop = true
		case word == "prefix" && more:
			i++
			t.prefixes = append(t.prefixes, string(a[i]))
		default:
			c.w.Error(errSyntax)
			return
		}
	}
	switch lower(a[2]) {
	case "on":
	case "off":
		c.endTracking()
		c.w.OK()
		return
	default:
		c.w.Error(errSyntax)
		return
	}
	_, follows := c.s.backend.(KeyFollower)
	switch {
	case !t.bcast && len(t.prefixes) > 0:
		c.w.Error("ERR PREFIX option requires BCAST mode to be enabled")
	case old.on && old.bcast != t.bcast:
		c.w.Error("ERR You can't switch BCAST mode on/off before disabling tracking for this client, and then re-enabling it with a different mode.")
	case t.bcast && (t.optIn || t.optOut):
		c.w.Error("ERR OPTIN and OPTOUT are not compatible with BCAST")
	case t.optIn && t.optOut:
		c.w.Error("ERR You can't specify both OPTIN mode and OPTOUT mode")
	case t.optIn && old.optOut, t.optOut && old.optIn:
		c.w.Error("ERR You can't switch OPTIN/OPTOUT mode before disabling tracking for this client, and then re-enabling it with a different mode.")
	case t.bcast && !follows:
		c.w.Error("ERR CLIENT TRACKING BCAST is not available here")
	case t.bcast && len(old.prefixes)+len(t.prefixes) > prefixesMax:
		c.w.Error("ERR a client may track " + itoa(prefixesMax) + " prefixes")
	default:
		if text := overlap(old.prefixes, t.prefixes); text != "" {
			c.w.Error(text)
			return
		}
		t.prefixes = slices.Concat(old.prefixes, t.prefixes)
		slices.Sort(t.prefixes)
		t.on = true
		c.tracking = t
		if t.bcast {
			c.s.broadcasts.set(c, &t)
		}
		c.describeTracking()
		c.w.OK()
	}
}

// prefixesMax bounds the prefixes of one client: each changed key is compared with all of them.
const prefixesMax = 64

// overlap says which prefixes contain one another, as Valkey does.
func overlap(old, given []string) string {
	both := func(a, b string) bool { return strings.HasPrefix(a, b) || strings.HasPrefix(b, a) }
	for i, p := range given {
		for _, o := range old {
			if both(p, o) {
				return "ERR Prefix '" + p + "' overlaps with an existing prefix '" + o + "'. Prefixes for a single client must not overlap."
			}
		}
		for _, o := range given[i+1:] {
			if both(p, o) {
				return "ERR Prefix '" + p + "' overlaps with another provided prefix '" + o + "'. Prefixes for a single client must not overlap."
			}
		}
	}
	return ""
}

// endTracking ends what CLIENT TRACKING has set up.
func (c *conn) endTracking() {
	if c.tracking.bcast {
		c.s.broadcasts.remove(c)
	}
	c.tracking = tracking{}
	c.describeTracking()
}

func (c *conn) describeTracking() {
	t := &c.tracking
	flags, redirect := "", int64(-1)
	if t.on {
		flags, redirect = "t", int64(t.redirect)
		if t.bcast {
			flags += "B"
		}
	}
	c.desc.set(func(d *description) { d.flags, d.redirect = flags, redirect })
}

func cmdClientTrackingInfo(c *conn, _ [][]byte) {
	t := &c.tracking
	flags := []string{"off"}
	if t.on {
		flags[0] = "on"
		for _, f := range []struct {
			set  bool
			name string
		}{{t.bcast, "bcast"}, {t.optIn, "optin"}, {t.cachingSet && t.caching, "caching-yes"}, {t.optOut, "optout"}, {t.cachingSet && !t.caching, "caching-no"},
			{t.noLoop, "noloop"}, {t.redirect != 0 && c.s.clients.get(t.redirect) == nil, "broken_redirect"}} {
			if f.set {
				flags = append(flags, f.name)
			}
		}
	}
	c.w.Map(3)
	c.w.String("flags")
	c.w.Set(len(flags))
	for _, f := range flags {
		c.w.String(f)
	}
	c.w.String("redirect")
	cmdClientGetRedir(c, nil)
	c.w.String("prefixes")
	c.w.Array(len(t.prefixes))
	for _, p := range t.prefixes {
		c.w.String(p)
	}
}

func cmdClientGetRedir(c *conn, _ [][]byte) {
	if c.tracking.on {
		c.w.Int(int64(c.tracking.redirect))
	} else {
		c.w.Int(-1)
	}
}

// tracked reports whether a command's reads are to be invalidated; it uses up what CLIENT CACHING has said.
func (t *tracking) tracked() bool {
	if !t.on || t.bcast {
		return false
	}
	tracked := !t.optIn
	if t.cachingSet {
		tracked, t.cachingSet = t.caching, false
	}
	return tracked
}

// invalidateRead has the keys that a read under tracking named invalidated: in w, behind the reply, or at the client that it redirects to.
func (c *conn) invalidateRead(w *resp.Buffer, args [][]byte, keys []command.KeyUse) {
	if len(keys) == 0 {
		return
	}
	names := make([]string, len(keys))
	for i, k := range keys {
		names[i] = string(args[k.Index])
	}
	if to := c.tracking.redirect; to != 0 {
		c.invalidate(to, names)
	} else if c.w.V3 {
		w.Push(2)
		w.String("invalidate")
		appendKeys(w, names)
	}
}

// trackRead appends to the reply in w the invalidation of the keys that a read under tracking named.
func (c *conn) trackRead(spec *command.Spec, args [][]byte) {
	if !c.tracking.tracked() || !spec.Is(command.ReadOnly) {
		return
	}
	c.keyUses = spec.Keys(c.keyUses[:0], args)
	c.invalidateRead(&c.w, args, c.keyUses)
}
