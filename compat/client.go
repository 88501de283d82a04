package compat

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tercet.dev/tercet/compat/acl"
	"tercet.dev/tercet/compat/command"
	"tercet.dev/tercet/compat/resp"
)

// description is what others may look at: CLIENT LIST, ACL LOG.
type description struct {
	lastAt atomic.Int64

	mu          sync.Mutex
	name        string
	libName     string
	libVer      string
	user        string
	lastCommand string
	proto       int
	sub, psub   int
	ssub        int
	multi       int // queued commands, -1 outside of a transaction
	watch       int
	qbuf        int
	flags       string
	redirect    int64 // of tracking, -1 without
	noEvict     bool
	noTouch     bool
	initialized bool
}

func (d *description) setUser(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.user = name
	if !d.initialized {
		d.initialized, d.proto, d.multi, d.redirect = true, 2, -1, -1
	}
}

// command notes the command in hand.
func (d *description) command(spec *command.Spec, _ [][]byte) {
	d.lastAt.Store(time.Now().UnixNano())
	name := "NULL"
	if spec != nil {
		name = spec.Name
	}
	d.mu.Lock()
	d.lastCommand = name
	d.mu.Unlock()
}

func (d *description) set(f func(d *description)) {
	d.mu.Lock()
	f(d)
	d.mu.Unlock()
}

// line is the client's line of CLIENT LIST.
func (c *conn) line() string {
	now := time.Now()
	c.mu.Lock()
	blocked := c.blocked != nil
	obl, oll := len(c.out.B)+c.writing, len(c.queue)-c.head
	c.mu.Unlock()
	d := &c.desc
	d.mu.Lock()
	defer d.mu.Unlock()
	flags := ""
	if d.sub+d.psub+d.ssub > 0 {
		flags += "P"
	}
	if d.multi >= 0 {
		flags += "x"
	}
	if blocked {
		flags += "b"
	}
	flags += d.flags
	if d.noEvict {
		flags += "e"
	}
	if d.noTouch {
		flags += "T"
	}
	if flags == "" {
		flags = "N"
	}
	last := d.lastCommand
	if last == "" {
		last = "NULL"
	}
	return fmt.Sprintf("id=%d addr=%s laddr=%s fd=-1 name=%s age=%d idle=%d flags=%s db=0 sub=%d psub=%d ssub=%d multi=%d watch=%d qbuf=%d qbuf-free=0 argv-mem=0 multi-mem=0 rbs=0 rbp=0 obl=%d oll=%d omem=%d tot-mem=%d events=r cmd=%s user=%s redir=%d resp=%d lib-name=%s lib-ver=%s",
		c.id, c.nc.RemoteAddr(), c.nc.LocalAddr(), d.name, int(now.Sub(c.since).Seconds()),
		int(now.Sub(time.Unix(0, d.lastAt.Load())).Seconds()), flags, d.sub, d.psub, d.ssub, d.multi, d.watch, d.qbuf,
		obl, oll, obl, obl+d.qbuf, last, d.user, d.redirect, d.proto, d.libName, d.libVer)
}

func sortByID(list []*conn) []*conn {
	slices.SortFunc(list, func(a, b *conn) int {
		if a.id < b.id {
			return -1
		}
		return 1
	})
	return list
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b)
	return hex.EncodeToString(b)
}

// lower returns an argument in lower case.
func lower(b []byte) string { return strings.ToLower(string(b)) }

func is(b []byte, name string) bool { return strings.EqualFold(string(b), name) }

func cmdPing(c *conn, a [][]byte) {
	switch {
	case len(a) > 2:
		c.w.Error("ERR wrong number of arguments for 'ping' command")
	case c.subs != nil && c.subs.count() > 0 && !c.w.V3:
		c.w.Array(2)
		c.w.String("pong")
		if len(a) == 2 {
			c.w.Bulk(a[1])
		} else {
			c.w.String("")
		}
	case len(a) == 2:
		c.w.Bulk(a[1])
	default:
		c.w.Simple("PONG")
	}
}

func cmdEcho(c *conn, a [][]byte) { c.w.Bulk(a[1]) }

func cmdQuit(c *conn, _ [][]byte) {
	c.w.OK()
	c.emit()
	c.finish("quit")
}

func cmdSelect(c *conn, a [][]byte) {
	n, ok := resp.ParseInt(a[1])
	switch {
	case !ok:
		c.w.Error("ERR value is not an integer or out of range")
	case n != 0 && c.s.opts.Cluster:
		c.w.Error("ERR SELECT is not allowed in cluster mode")
	case n != 0:
		c.w.Error("ERR DB index is out of range")
	default:
		c.w.OK()
	}
}

func cmdReset(c *conn, _ [][]byte) {
	c.multi, c.watches = nil, nil
	c.s.bus.leave(c)
	c.subs = nil
	c.endTracking()
	c.noReply, c.skipReply, c.readOnly, c.asking = false, false, false, false
	c.w.V3 = false
	c.desc.set(func(d *description) {
		d.name, d.proto, d.multi, d.watch, d.sub, d.psub, d.ssub = "", 2, -1, 0, 0, 0, 0
		d.noEvict, d.noTouch = false, false
	})
	u := c.s.users.Default()
	c.setUser(u, u.Enabled && u.NoPassword)
	c.w.Simple("RESET")
}

// validName reports whether a client, or library, may have that name: no blanks, no control characters.
func validName(b []byte) bool {
	for _, ch := range b {
		if ch < '!' || ch > '~' {
			return false
		}
	}
	return true
}

const errName = "ERR Client names cannot contain spaces, newlines or special characters."

func cmdHello(c *conn, a [][]byte) {
	proto := 0
	if len(a) > 1 {
		n, ok := resp.ParseInt(a[1])
		if !ok {
			c.w.Error("ERR Protocol version is not an integer or out of range")
			return
		}
		if n < 2 || n > 3 {
			c.w.Error("NOPROTO unsupported protocol version")
			return
		}
		proto = int(n)
	}
	var user, password, name []byte
	hasAuth, hasName := false, false
	for i := 2; i < len(a); i++ {
		more := len(a) - 1 - i
		switch {
		case is(a[i], "auth") && more >= 2:
			hasAuth, user, password = true, a[i+1], a[i+2]
			i += 2
		case is(a[i], "setname") && more >= 1:
			hasName, name = true, a[i+1]
			if !validName(name) {
				c.w.Error(errName)
				return
			}
			i++
		default:
			c.w.Error("ERR Syntax error in HELLO option '" + string(a[i]) + "'")
			return
		}
	}
	if hasAuth && !c.login(string(user), string(password)) {
		return
	}
	if !c.authenticated {
		c.w.Error("NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH <user> <pass> option can be used to authenticate the client and select the RESP protocol version at the same time")
		return
	}
	if hasName {
		c.desc.set(func(d *description) { d.name = string(name) })
	}
	if proto != 0 {
		c.w.V3 = proto == 3
		c.desc.set(func(d *description) { d.proto = proto })
	}
	w := &c.w
	w.Map(7)
	w.String("server")
	w.String("valkey")
	w.String("version")
	w.String(valkeyVersion)
	w.String("proto")
	if w.V3 {
		w.Int(3)
	} else {
		w.Int(2)
	}
	w.String("id")
	w.Int(int64(c.id))
	w.String("mode")
	w.String(c.s.mode())
	w.String("role")
	w.String(c.s.role())
	w.String("modules")
	w.Array(0)
}

func cmdAuth(c *conn, a [][]byte) {
	if len(a) > 3 {
		c.w.Error("ERR syntax error")
		return
	}
	user, password := acl.DefaultName, string(a[1])
	if len(a) == 3 {
		user, password = string(a[1]), string(a[2])
	} else if c.s.users.Default().NoPassword {
		c.w.Error("ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?")
		return
	}
	if c.login(user, password) {
		c.w.OK()
	}
}

// login makes the client that user, or writes why not.
func (c *conn) login(user, password string) bool {
	u := c.s.users.Get(user)
	if (u == nil || !u.Authenticate(password)) && c.s.freshUsers() {
		// Another node may have set the user a moment ago.
		u = c.s.users.Get(user)
	}
	if u == nil || !u.Authenticate(password) {
		if u == nil {
			acl.HashPassword(password) // a name that does not exist takes as long
		}
		c.s.metrics.refused.WithLabelValues("password").Inc()
		c.s.logins.failed(c)
		c.s.aclLog.add("auth", c.context(), "AUTH", user, c)
		c.w.Error("WRONGPASS invalid username-password pair or user is disabled.")
		return false
	}
	c.setUser(u, true)
	return true
}

// logins slows down failing logins: above the allowed number in a second, each waits for a place in a queue.
type logins struct {
	mu   sync.Mutex
	next time.Time
}

func (l *logins) failed(c *conn) {
	every := time.Second / time.Duration(c.s.limits.AuthFailures)
	now := time.Now()
	l.mu.Lock()
	// A second's worth may come at once.
	if earliest := now.Add(-time.Second); l.next.Before(earliest) {
		l.next = earliest
	}
	l.next = l.next.Add(every)
	wait := min(l.next.Sub(now), 2*time.Second)
	l.mu.Unlock()
	if wait <= 0 {
		return
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
	case <-c.done:
	case <-c.s.closing:
	}
}

func cmdClientID(c *conn, _ [][]byte) { c.w.Int(int64(c.id)) }

func cmdClientInfo(c *conn, _ [][]byte) { c.w.Verbatim(c.line() + "\n") }

func cmdClientSetName(c *conn, a [][]byte) {
	if !validName(a[2]) {
		c.w.Error(errName)
		return
	}
	c.desc.set(func(d *description) { d.name = string(a[2]) })
	c.w.OK()
}

func cmdClientGetName(c *conn, _ [][]byte) {
	c.desc.mu.Lock()
	name := c.desc.name
	c.desc.mu.Unlock()
	if name == "" {
		c.w.Null()
		return
	}
	c.w.String(name)
}

func cmdClientSetInfo(c *conn, a [][]byte) {
	option := string(a[2])
	if !strings.EqualFold(option, "lib-name") && !strings.EqualFold(option, "lib-ver") {
		c.w.Error("ERR Unrecognized option '" + option + "'")
		return
	}
	if !validName(a[3]) {
		c.w.Error("ERR " + strings.ToLower(option) + " cannot contain spaces, newlines or special characters.")
		return
	}
	c.desc.set(func(d *description) {
		if strings.EqualFold(option, "lib-name") {
			d.libName = string(a[3])
		} else {
			d.libVer = string(a[3])
		}
	})
	c.w.OK()
}

// clientFilter chooses clients, for LIST and KILL.
type clientFilter struct {
	ids             []uint64
	addr, laddr     string
	user            string
	kind            string
	skipMe          bool
	hasUser, hasIDs bool
	maxAge          int64
}

// parseFilter reads the filters from args[from:]. It writes the error and reports false when they are wrong.
func (c *conn) parseFilter(a [][]byte, from int, kill bool) (clientFilter, bool) {
	f := clientFilter{skipMe: kill}
	for i := from; i < len(a); {
		more := i+1 < len(a)
		switch word := lower(a[i]); {
		case word == "id" && more:
			f.hasIDs = true
			for i++; i < len(a); i++ {
				n, ok := resp.ParseInt(a[i])
				if !ok || n < 1 {
					if len(f.ids) > 0 {
						break
					}
					if kill {
						c.w.Error("ERR client-id should be greater than 0")
					} else {
						c.w.Error("ERR Invalid client ID")
					}
					return f, false
				}
				f.ids = append(f.ids, uint64(n))
				if kill {
					i++
					break
				}
			}
			continue
		case word == "type" && more:
			f.kind = lower(a[i+1])
			switch f.kind {
			case "normal", "pubsub", "master", "primary", "replica", "slave":
			default:
				c.w.Error("ERR Unknown client type '" + string(a[i+1]) + "'")
				return f, false
			}
		case word == "addr" && more:
			f.addr = string(a[i+1])
		case word == "laddr" && more:
			f.laddr = string(a[i+1])
		case word == "user" && more:
			f.hasUser, f.user = true, string(a[i+1])
			if c.s.users.Get(f.user) == nil {
				c.w.Error("ERR No such user '" + f.user + "'")
				return f, false
			}
		case word == "maxage" && more && kill:
			n, ok := resp.ParseInt(a[i+1])
			if !ok || n < 0 {
				c.w.Error("ERR maxage is not an integer or out of range")
				return f, false
			}
			f.maxAge = n
		case word == "skipme" && more && kill:
			switch lower(a[i+1]) {
			case "yes":
				f.skipMe = true
			case "no":
				f.skipMe = false
			default:
				c.w.Error("ERR syntax error")
				return f, false
			}
		default:
			c.w.Error("ERR syntax error")
			return f, false
		}
		i += 2
	}
	return f, true
}

func (f *clientFilter) matches(k *conn) bool {
	k.desc.mu.Lock()
	user, subs := k.desc.user, k.desc.sub+k.desc.psub+k.desc.ssub
	k.desc.mu.Unlock()
	kind := "normal"
	if subs > 0 {
		kind = "pubsub"
	}
	switch {
	case f.hasIDs && !slices.Contains(f.ids, k.id),
		f.addr != "" && f.addr != k.nc.RemoteAddr().String(),
		f.laddr != "" && f.laddr != k.nc.LocalAddr().String(),
		f.hasUser && f.user != user,
		f.kind != "" && f.kind != kind,
		f.maxAge > 0 && time.Since(k.since) < time.Duration(f.maxAge)*time.Second:
		return false
	}
	return true
}

func cmdClientList(c *conn, a [][]byte) {
	f, ok := c.parseFilter(a, 2, false)
	if !ok {
		return
	}
	var b strings.Builder
	for _, k := range c.s.clients.list() {
		if f.matches(k) {
			b.WriteString(k.line())
			b.WriteByte('\n')
		}
	}
	c.w.Verbatim(b.String())
}

func cmdClientKill(c *conn, a [][]byte) {
	if len(a) == 3 {
		addr := string(a[2])
		for _, k := range c.s.clients.list() {
			if k.nc.RemoteAddr().String() == addr {
				c.w.OK()
				c.killClient(k)
				return
			}
		}
		c.w.Error("ERR No such client")
		return
	}
	f, ok := c.parseFilter(a, 2, true)
	if !ok {
		return
	}
	n := 0
	for _, k := range c.s.clients.list() {
		if f.matches(k) && (k != c || !f.skipMe) {
			n++
			defer c.killClient(k)
		}
	}
	c.w.Int(int64(n))
}

// killClient closes a client; this one after its reply.
func (c *conn) killClient(k *conn) {
	if k == c {
		c.emit()
		c.finish("killed")
		return
	}
	k.kill("killed")
}

func cmdClientUnblock(c *conn, a [][]byte) {
	withError := false
	if len(a) == 4 {
		switch lower(a[3]) {
		case "timeout":
		case "error":
			withError = true
		default:
			c.w.Error("ERR CLIENT UNBLOCK reason should be TIMEOUT or ERROR")
			return
		}
	}
	if len(a) > 4 {
		c.w.Error("ERR syntax error")
		return
	}
	n, ok := resp.ParseInt(a[2])
	if !ok {
		c.w.Error("ERR value is not an integer or out of range")
		return
	}
	k := c.s.clients.get(uint64(n))
	c.w.Bool01(k != nil && k.unblock(unblock{withError}))
}

// unblock ends a blocked read. It reports false when the client does not wait.
func (c *conn) unblock(u unblock) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.blocked == nil {
		return false
	}
	select {
	case c.blocked <- u:
		return true
	default:
		return false
	}
}

func onOff(c *conn, b []byte, set func(on bool)) {
	switch lower(b) {
	case "on":
		set(true)
	case "off":
		set(false)
	default:
		c.w.Error("ERR syntax error")
		return
	}
	c.w.OK()
}

func cmdClientNoEvict(c *conn, a [][]byte) {
	onOff(c, a[2], func(on bool) { c.desc.set(func(d *description) { d.noEvict = on }) })
}

func cmdClientNoTouch(c *conn, a [][]byte) {
	onOff(c, a[2], func(on bool) { c.desc.set(func(d *description) { d.noTouch = on }) })
}

func cmdClientReply(c *conn, a [][]byte) {
	switch lower(a[2]) {
	case "on":
		c.noReply, c.skipReply = false, false
		c.w.OK()
	case "off":
		c.noReply = true
	case "skip":
		if !c.noReply {
			c.skipReply = true
		}
	default:
		c.w.Error("ERR syntax error")
	}
}

func cmdClientCapa(c *conn, a [][]byte) {
	for _, word := range a[2:] {
		if is(word, "stale") {
			c.capaStale = true
		}
	}
	c.w.OK()
}

func cmdClientPause(c *conn, _ [][]byte) {
	c.w.Error("ERR CLIENT PAUSE is not supported: other nodes would go on")
}

func cmdClientCaching(c *conn, a [][]byte) {
	t := &c.tracking
	if !t.on {
		c.w.Error("ERR CLIENT CACHING can be called only when the client is in tracking mode with OPTIN or OPTOUT mode enabled")
		return
	}
	switch lower(a[2]) {
	case "yes":
		if !t.optIn {
			c.w.Error("ERR CLIENT CACHING YES is only valid when tracking is enabled in OPTIN mode.")
			return
		}
		t.caching, t.cachingSet = true, true
	case "no":
		if !t.optOut {
			c.w.Error("ERR CLIENT CACHING NO is only valid when tracking is enabled in OPTOUT mode.")
			return
		}
		t.caching, t.cachingSet = false, true
	default:
		c.w.Error("ERR syntax error")
		return
	}
	c.w.OK()
}

func cmdReadOnly(c *conn, _ [][]byte) {
	if !c.s.opts.Cluster {
		// Valkey refuses it here; clients that read from replicas send it to any node.
		c.readOnly = true
		c.w.OK()
		return
	}
	c.readOnly = true
	c.w.OK()
}

func cmdReadWrite(c *conn, _ [][]byte) {
	c.readOnly = false
	c.w.OK()
}

func cmdAsking(c *conn, _ [][]byte) {
	c.asking = true
	c.w.OK()
}

func help(lines ...string) func(c *conn, a [][]byte) {
	return func(c *conn, a [][]byte) {
		name := strings.ToUpper(string(a[0]))
		all := append([]string{name + " <subcommand> [<arg> [value] [opt] ...]. Subcommands are:"}, lines...)
		all = append(all, "HELP", "    Print this help.")
		c.w.Array(len(all))
		for _, l := range all {
			c.w.Simple(l)
		}
	}
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }
