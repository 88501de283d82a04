package compat

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/server/servertest"
)

// The differential test: the same random commands for Tercet and for a redis-server 7.0, and the same replies byte for
// byte, but for what depends on the clock and for the differences listed in docs/valkey.md, each of which stands as a
// mask or a rule below. A sequence that differs is shrunk before it is shown.

// redisServer runs a redis-server until the test ends and returns its address.
func redisServer(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("redis-server")
	if err != nil {
		t.Fatal("this test needs redis-server 7.0: run .ci/deps, or apt-get install redis-server")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(addr)
	cmd := exec.Command(path, "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", t.TempDir())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for range 200 {
		if nc, err := net.Dial("tcp", addr); err == nil {
			nc.Close()
			return addr
		}
		time.Sleep(10 * time.Millisecond) // another program's start, nothing to wait on
	}
	t.Fatal("redis-server does not answer")
	return ""
}

// step is one command of a sequence.
type step []string

// generator makes commands that meet often: few keys, groups, consumers and IDs.
type generator struct {
	r *rand.Rand
}

func (g *generator) pick(list ...string) string { return list[g.r.IntN(len(list))] }

func (g *generator) chance(percent int) bool { return g.r.IntN(100) < percent }

func (g *generator) key() string {
	switch n := g.r.IntN(100); {
	case n < 60:
		return "s1"
	case n < 85:
		return "s2"
	case n < 92:
		return "s3"
	case n < 96:
		return "str"
	}
	return "nokey"
}

func (g *generator) group() string {
	if g.chance(5) {
		return "nogroup"
	}
	return g.pick("g1", "g1", "g2")
}

func (g *generator) consumer() string { return g.pick("c1", "c1", "c2", "c3") }

// id is an ID in the range where things happen, now and then something odd.
func (g *generator) id() string {
	switch n := g.r.IntN(100); {
	case n < 80:
		return fmt.Sprintf("%d-%d", g.r.IntN(14), g.r.IntN(3))
	case n < 90:
		return strconv.Itoa(g.r.IntN(16))
	case n < 92:
		return g.pick("0", "0-0")
	}
	return g.pick("-", "+", "$", ">", "abc", "1-1-1", "", "-1", " 5", "05-01", "+5-1", "18446744073709551615-18446744073709551615",
		"18446744073709551616-1", "18446744073709551615", "1-*", "*", "5-", "-5", "(3-1", "0x5", strings.Repeat("1", 130), "5- 1", "5--1")
}

// bound is a bound of a range.
func (g *generator) bound() string {
	switch n := g.r.IntN(100); {
	case n < 30:
		return g.pick("-", "+")
	case n < 50:
		return "(" + g.id()
	}
	return g.id()
}

func (g *generator) number() string {
	if g.chance(85) {
		return strconv.Itoa(g.r.IntN(5))
	}
	return g.pick("-1", "100", "abc", "", "9223372036854775807", "9223372036854775808", "-9223372036854775808", "1.5", " 1", "01", "-0")
}

func (g *generator) idle() string {
	if g.chance(90) {
		return g.pick("0", "0", "-5", "100000000")
	}
	// No small numbers: what has been idle for 3 ms depends on the clock.
	return g.pick("abc", "", "9223372036854775807", "9223372036854775808", "1.5", " 1", "01", "-0")
}

func (g *generator) mixed(s string) string {
	if g.chance(10) {
		return strings.ToLower(s)
	}
	return s
}

func (g *generator) ids(n int) []string {
	var out []string
	for range 1 + g.r.IntN(n) {
		out = append(out, g.id())
	}
	return out
}

func (g *generator) trim() []string {
	var out []string
	what, how := g.pick("MAXLEN", "MINID"), g.pick("", "", "=", "", "", "", "") // ~ removes whole runs, which begin elsewhere in Redis
	out = append(out, g.mixed(what))
	if how != "" {
		out = append(out, how)
	}
	if what == "MAXLEN" {
		out = append(out, g.number())
	} else {
		out = append(out, g.id())
	}
	if g.chance(15) {
		out = append(out, "LIMIT", g.number())
	}
	if g.chance(3) {
		out = append(out, g.trim()...)
	}
	return out
}

// command makes one command.
func (g *generator) command() step {
	type maker struct {
		weight int
		make   func() step
	}
	makers := []maker{
		{30, func() step {
			s := step{"XADD", g.key()}
			if g.chance(10) {
				s = append(s, "NOMKSTREAM")
			}
			if g.chance(15) {
				s = append(s, g.trim()...)
			}
			switch n := g.r.IntN(100); {
			case n < 70:
				s = append(s, fmt.Sprintf("%d-*", g.r.IntN(14)))
			case n < 95:
				s = append(s, fmt.Sprintf("%d-%d", g.r.IntN(14), g.r.IntN(4)))
			default:
				s = append(s, g.pick("0-0", "0-*", "abc", "-", "5", "(1-1", "1-1-*", ""))
			}
			for range 1 + g.r.IntN(2) {
				s = append(s, g.pick("f", "g", ""), g.pick("v", "w\r\n", "", "\x00"))
			}
			if g.chance(3) {
				s = s[:len(s)-1]
			}
			return s
		}},
		{4, func() step { return step{"XLEN", g.key()} }},
		{8, func() step {
			s := step{g.pick("XRANGE", "XREVRANGE"), g.key(), g.bound(), g.bound()}
			if g.chance(30) {
				s = append(s, "COUNT", g.number())
			}
			return s
		}},
		{4, func() step { return append(step{"XDEL", g.key()}, g.ids(3)...) }},
		{3, func() step { return append(step{"XTRIM", g.key()}, g.trim()...) }},
		{1, func() step {
			// Redis 7.0 lets the ID fall below that of a deleted entry: this one never does.
			s := step{"XSETID", g.key(), g.pick("14-0", "14-0", "14-0", "14", "abc", "-", "$", "")}
			if g.chance(30) {
				s = append(s, "ENTRIESADDED", g.number())
			}
			if g.chance(30) {
				s = append(s, "MAXDELETEDID", g.id())
			}
			return s
		}},
		{8, func() step {
			s := step{"XREAD"}
			if g.chance(30) {
				s = append(s, "COUNT", g.number())
			}
			s = append(s, "STREAMS")
			n := 1 + g.r.IntN(2)
			for range n {
				s = append(s, g.key())
			}
			for range n {
				id := g.id()
				if id == "+" {
					id = "0" // Redis 7.0 has no +
				}
				s = append(s, id)
			}
			return s
		}},
		{22, func() step {
			s := step{"XREADGROUP", "GROUP", g.group(), g.consumer()}
			if g.chance(60) {
				s = append(s, "COUNT", g.number())
			}
			if g.chance(10) {
				s = append(s, "NOACK")
			}
			s = append(s, "STREAMS")
			n := 1
			if g.chance(15) {
				n = 2
			}
			for range n {
				s = append(s, g.key())
			}
			for range n {
				if g.chance(70) {
					s = append(s, ">")
				} else {
					id := g.id()
					for id == "+" {
						id = g.id() // Redis 7.0 has no word for it
					}
					s = append(s, id)
				}
			}
			return s
		}},
		{10, func() step { return append(step{"XACK", g.key(), g.group()}, g.ids(4)...) }},
		{8, func() step {
			s := append(step{"XCLAIM", g.key(), g.group(), g.consumer(), g.idle()}, g.ids(3)...)
			for _, o := range [][]string{{"IDLE", g.idle()}, {"RETRYCOUNT", g.number()}, {"FORCE"}, {"JUSTID"}, {"LASTID", g.id()}, {"BOGUS"}} {
				if g.chance(12) {
					s = append(s, o...)
				}
			}
			return s
		}},
		{6, func() step {
			s := step{"XAUTOCLAIM", g.key(), g.group(), g.consumer(), g.idle(), g.bound()}
			if g.chance(40) {
				s = append(s, "COUNT", g.number())
			}
			if g.chance(20) {
				s = append(s, "JUSTID")
			}
			return s
		}},
		{5, func() step { return step{"XPENDING", g.key(), g.group()} }},
		{6, func() step {
			s := step{"XPENDING", g.key(), g.group()}
			if g.chance(30) {
				s = append(s, "IDLE", g.idle())
			}
			s = append(s, g.bound(), g.bound(), g.number())
			if g.chance(30) {
				s = append(s, g.pick("c1", "c2", "noconsumer"))
			}
			return s
		}},
		{7, func() step {
			s := step{"XGROUP", "CREATE", g.key(), g.group(), g.pick("0", "0", "$", g.id())}
			if g.chance(50) {
				s = append(s, "MKSTREAM")
			}
			if g.chance(10) {
				s = append(s, "ENTRIESREAD", g.number())
			}
			return s
		}},
		{2, func() step {
			s := step{"XGROUP", "SETID", g.key(), g.group(), g.pick("0", "$", g.id())}
			if g.chance(20) {
				s = append(s, "ENTRIESREAD", g.number())
			}
			return s
		}},
		{1, func() step { return step{"XGROUP", "DESTROY", g.key(), g.group()} }},
		{2, func() step { return step{"XGROUP", "CREATECONSUMER", g.key(), g.group(), g.consumer()} }},
		{2, func() step { return step{"XGROUP", "DELCONSUMER", g.key(), g.group(), g.consumer()} }},
		{3, func() step { return step{"XINFO", "STREAM", g.key()} }},
		{3, func() step {
			s := step{"XINFO", "STREAM", g.key(), "FULL"}
			if g.chance(40) {
				s = append(s, "COUNT", g.number())
			}
			if g.chance(5) {
				s = append(s, "MORE")
			}
			return s
		}},
		{3, func() step { return step{"XINFO", "GROUPS", g.key()} }},
		{3, func() step { return step{"XINFO", "CONSUMERS", g.key(), g.group()} }},
		{1, func() step { return step{g.pick("DEL", "UNLINK"), g.key(), g.key()} }},
		{2, func() step { return step{"EXISTS", g.key(), g.key()} }},
		{2, func() step { return step{"TYPE", g.key()} }},
		{1, func() step { return step{"RENAME", g.key(), g.key()} }},
		{1, func() step { return step{"RENAMENX", g.key(), g.key()} }},
		{3, func() step {
			s := step{"COPY", g.key(), g.pick("s1", "s2", "s3", "str")}
			for _, o := range [][]string{{"REPLACE"}, {"DB", g.pick("0", "0", "0", "x")}} {
				if g.chance(50) {
					s = append(s, o...)
				}
			}
			if g.chance(2) {
				s = append(s, "BOGUS")
			}
			return s
		}},
		{2, func() step { return step{g.pick("TTL", "PTTL", "EXPIRETIME", "PEXPIRETIME"), g.key()} }},
		{1, func() step {
			s := step{g.pick("EXPIRE", "PEXPIRE", "EXPIREAT", "PEXPIREAT"), g.key(), g.pick("1000000", "99999999999", "99999999999999", "-5", "0", "x", "9223372036854775807")}
			if g.chance(30) {
				s = append(s, strings.Fields(g.pick("NX", "XX", "GT", "LT", "XX LT", "LT XX", "XX GT", "NX LT", "GT LT", "BOGUS"))...)
			}
			return s
		}},
		{1, func() step { return step{"PERSIST", g.key()} }},
		{1, func() step { return step{"DBSIZE"} }},
		{1, func() step { return step{"KEYS", g.pick("*", "s*", "s[12]", "none")} }},
		{1, func() step { return step{"TOUCH", g.key(), g.key()} }},
		{2, func() step {
			s := step{"SET", g.pick("str", "str", "str", "s3"), g.pick("v", "", "w")}
			for _, o := range [][]string{{"NX"}, {"XX"}, {"GET"}, {"EX", g.pick("100000", "0", "-1", "x")}, {"PX", "100000000"}, {"KEEPTTL"}} {
				if g.chance(10) {
					s = append(s, o...)
				}
			}
			return s
		}},
		{2, func() step { return step{g.pick("GET", "GET", "GETDEL"), g.key()} }},
		{1, func() step { return step{"OBJECT", "REFCOUNT", g.pick("s1", "nokey")} }},
		{1, func() step {
			return step{g.pick("XADD", "XREAD", "XACK", "XGROUP", "XINFO", "XPENDING", "NOSUCH", "DEL"), g.pick("s1", "CREATE", "")}
		}},
		{1, func() step { return step{"ECHO", g.pick("hi", "", "\r\n")} }},
	}
	total := 0
	for _, m := range makers {
		total += m.weight
	}
	n := g.r.IntN(total)
	for _, m := range makers {
		if n -= m.weight; n < 0 {
			return m.make()
		}
	}
	panic("unreachable")
}

// sequence makes n commands, some of them in transactions.
func (g *generator) sequence(n int) []step {
	var out []step
	for len(out) < n {
		if !g.chance(3) {
			out = append(out, g.command())
			continue
		}
		if g.chance(30) {
			out = append(out, step{"WATCH", g.key()})
		}
		out = append(out, step{"MULTI"})
		for range 1 + g.r.IntN(4) {
			out = append(out, g.command())
		}
		out = append(out, step{g.pick("EXEC", "EXEC", "EXEC", "DISCARD")})
	}
	return out
}

// value is a reply as a tree.
type value struct {
	t    byte
	text string
	list []value
}

func readValue(r *bufio.Reader) (value, error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return value{}, err
	}
	v := value{t: line[0], text: strings.TrimSuffix(line[1:], "\r\n")}
	n, _ := strconv.Atoi(v.text)
	switch v.t {
	case '$':
		if n < 0 {
			return v, nil
		}
		b := make([]byte, n+2)
		for k := 0; k < len(b); {
			m, err := r.Read(b[k:])
			if err != nil {
				return v, err
			}
			k += m
		}
		v.text = string(b[:n])
		return v, nil
	case '%':
		n *= 2
		fallthrough
	case '*', '~', '>':
		for range max(n, 0) {
			e, err := readValue(r)
			if err != nil {
				return v, err
			}
			v.list = append(v.list, e)
		}
	}
	return v, nil
}

func (v value) String() string {
	switch v.t {
	case '*', '~', '>', '%':
		if v.list == nil {
			return string(v.t) + v.text
		}
		parts := make([]string, len(v.list))
		for i, e := range v.list {
			parts[i] = e.String()
		}
		return string(v.t) + "[" + strings.Join(parts, " ") + "]"
	}
	return fmt.Sprintf("%c%q", v.t, v.text)
}

// field finds a member of a map, or of the array that stands for one in RESP2.
func (v *value) field(name string) *value {
	for i := 0; i+1 < len(v.list); i += 2 {
		if v.list[i].text == name {
			return &v.list[i+1]
		}
	}
	return nil
}

// without removes a member of a map that Redis 7.0 does not have.
func (v *value) without(name string) {
	for i := 0; i+1 < len(v.list); i += 2 {
		if v.list[i].text == name {
			v.list = slices.Delete(v.list, i, i+2)
			n := len(v.list)
			if v.t == '%' {
				n /= 2
			}
			v.text = strconv.Itoa(n)
			return
		}
	}
}

func (v *value) mask() {
	if v != nil && v.t == ':' && v.text != "-1" && v.text != "-2" {
		v.text = "T"
	}
}

// normalize removes from a reply what depends on the clock, and what is listed as a difference.
func normalize(s step, v *value, lagKnown bool) {
	if len(s) == 0 {
		return
	}
	name := strings.ToUpper(s[0])
	sub := ""
	if len(s) > 1 {
		sub = strings.ToUpper(s[1])
	}
	groups := func(list *value) {
		if list == nil {
			return
		}
		for i := range list.list {
			g := &list.list[i]
			if !lagKnown {
				// Lag and entries-read after deletions are those of later releases.
				for _, f := range []string{"lag", "entries-read"} {
					if e := g.field(f); e != nil {
						*e = value{t: '?'}
					}
				}
			}
			if p := g.field("pending"); p != nil {
				for k := range p.list {
					if len(p.list[k].list) == 4 {
						p.list[k].list[2].mask()
					}
				}
			}
			if cs := g.field("consumers"); cs != nil {
				for k := range cs.list {
					c := &cs.list[k]
					c.field("seen-time").mask()
					c.without("active-time")
					if p := c.field("pending"); p != nil {
						for m := range p.list {
							p.list[m].list[1].mask()
						}
					}
				}
			}
		}
	}
	switch {
	case v.t == '-' && (name == "XREAD" || name == "XREADGROUP") && strings.Contains(v.text, "Unbalanced"):
		*v = value{t: '-', text: "Unbalanced"} // worded anew in Valkey 8
	case v.t == '-' && name == "XADD" && (strings.Contains(v.text, "Elements are too large") || strings.Contains(v.text, "equal or smaller")):
		*v = value{t: '-', text: "full"} // 7.0 gives the wrong one of the two when ms-* overflows
	case name == "XPENDING" && len(s) > 3:
		for i := range v.list {
			if len(v.list[i].list) == 4 {
				v.list[i].list[2].mask()
			}
		}
	case name == "XINFO" && sub == "STREAM":
		for _, f := range []string{"radix-tree-keys", "radix-tree-nodes"} {
			if e := v.field(f); e != nil {
				*e = value{t: '?'}
			}
		}
		if g := v.field("groups"); g != nil && g.t != ':' {
			groups(g)
		}
	case name == "XINFO" && sub == "GROUPS":
		groups(v)
	case name == "XINFO" && sub == "CONSUMERS":
		for i := range v.list {
			v.list[i].field("idle").mask()
			v.list[i].without("inactive")
		}
	case name == "TTL" || name == "PTTL" || name == "EXPIRETIME" || name == "PEXPIRETIME":
		v.mask()
	case name == "KEYS":
		slices.SortFunc(v.list, func(a, b value) int { return strings.Compare(a.text, b.text) })
	}
}

// peer is one side of the comparison.
type peer struct {
	nc   net.Conn
	r    *bufio.Reader
	isV3 bool
}

func dialPeer(t testing.TB, addr string, v3 bool) *peer {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	p := &peer{nc: nc, r: bufio.NewReaderSize(nc, 64<<10), isV3: v3}
	if v3 {
		p.all(t, []step{{"HELLO", "3"}})
	}
	return p
}

// all sends steps as one pipeline and reads the replies.
func (p *peer) all(t testing.TB, steps []step) []value {
	t.Helper()
	p.nc.SetDeadline(time.Now().Add(2 * time.Minute))
	var b []byte
	for _, s := range steps {
		b = append(b, encodeCommand(s...)...)
	}
	if _, err := p.nc.Write(b); err != nil {
		t.Fatal(err)
	}
	out := make([]value, len(steps))
	for i := range steps {
		v, err := readValue(p.r)
		if err != nil {
			t.Fatalf("reply to %q: %v", steps[i], err)
		}
		out[i] = v
	}
	return out
}

// touched are the keys whose lag Redis 7.0 does not know rightly any more.
func touches(s step) []string {
	switch strings.ToUpper(s[0]) {
	case "XDEL", "XTRIM", "XSETID":
		return s[1:2]
	case "XADD":
		if slices.ContainsFunc(s, func(w string) bool { return strings.EqualFold(w, "maxlen") || strings.EqualFold(w, "minid") }) {
			return s[1:2]
		}
	case "XGROUP":
		// An invented number of entries read gives Redis 7.0 a lag below zero.
		if len(s) > 3 && slices.ContainsFunc(s, func(w string) bool { return strings.EqualFold(w, "entriesread") }) {
			return s[2:3]
		}
	case "RENAME", "RENAMENX", "COPY":
		if len(s) > 2 {
			return s[1:3]
		}
	}
	return nil
}

// excuseRemoved lets pass that a read gives an entry without its fields: when a command that follows in the pipeline removes
// the entry before the reply is made, the fields are gone (docs/valkey.md).
func excuseRemoved(s step, us, them *value) {
	switch strings.ToUpper(s[0]) {
	case "XREADGROUP", "XCLAIM", "XAUTOCLAIM", "EXEC":
	default:
		return
	}
	var walk func(a, b *value)
	walk = func(a, b *value) {
		if (a.t == '_' || a.t == '*' && a.text == "-1") && b.t == '*' && b.text != "-1" {
			*a = *b
		}
		for i := range min(len(a.list), len(b.list)) {
			walk(&a.list[i], &b.list[i])
		}
	}
	for i := range min(len(us.list), len(them.list)) {
		walk(&us.list[i], &them.list[i])
	}
}

// consumersOf makes the consumers that a command names. Valkey makes them in any case, Redis 7.0 only when they are given
// something.
func consumersOf(s step) (before []step) {
	add := func(key, group, consumer string) {
		before = append(before, step{"XGROUP", "CREATECONSUMER", key, group, consumer})
	}
	switch strings.ToUpper(s[0]) {
	case "XCLAIM", "XAUTOCLAIM":
		if len(s) > 5 {
			add(s[1], s[2], s[3])
		}
	case "XREADGROUP":
		if at := slices.Index(s, "STREAMS"); at > 0 && len(s) > 4 {
			keys := s[at+1 : at+1+(len(s)-at-1)/2]
			for _, k := range keys {
				add(k, s[2], s[3])
			}
		}
	}
	return before
}

// balanced reports whether transactions begin and end in turn, as they do before a sequence is shrunk.
func balanced(steps []step) bool {
	open := false
	for _, s := range steps {
		switch s[0] {
		case "MULTI":
			if open {
				return false
			}
			open = true
		case "EXEC", "DISCARD":
			if !open {
				return false
			}
			open = false
		case "WATCH":
			if open {
				return false
			}
		}
	}
	return true
}

// compare runs a sequence on both sides from an empty state, in pipelines of the given size, and returns the index of the
// first command whose replies differ, -1 for none.
func compare(t testing.TB, ours, theirs *peer, steps []step, pipeline int) (at int, us, them string) {
	t.Helper()
	reset := []step{{"RESET"}, {"FLUSHALL"}}
	if ours.isV3 {
		reset = []step{{"RESET"}, {"HELLO", "3"}, {"FLUSHALL"}}
	}
	ours.all(t, reset)
	theirs.all(t, reset)
	unsure := map[string]bool{}
	var queued []step
	inMulti := false
	for from := 0; from < len(steps); from += pipeline {
		var part []step
		var origin []int // of each step, -1 for those that were put in
		for i, s := range steps[from:min(from+pipeline, len(steps))] {
			for _, before := range consumersOf(s) {
				part, origin = append(part, before), append(origin, -1)
			}
			part, origin = append(part, s), append(origin, from+i)
		}
		a, b := ours.all(t, part), theirs.all(t, part)
		for i, s := range part {
			for _, k := range touches(s) {
				unsure[k] = true
			}
			known := true
			for k := range unsure {
				known = known && !slices.Contains(s, k)
			}
			switch strings.ToUpper(s[0]) {
			case "MULTI":
				inMulti, queued = true, nil
			case "EXEC":
				for k := range a[i].list {
					if k < len(queued) {
						normalize(queued[k], &a[i].list[k], len(unsure) == 0)
					}
				}
				for k := range b[i].list {
					if k < len(queued) {
						normalize(queued[k], &b[i].list[k], len(unsure) == 0)
					}
				}
				inMulti = false
			case "DISCARD":
				inMulti = false
			default:
				if inMulti && a[i].text == "QUEUED" {
					queued = append(queued, s)
				}
				normalize(s, &a[i], known)
				normalize(s, &b[i], known)
			}
			if pipeline > 1 {
				excuseRemoved(s, &a[i], &b[i])
			}
			if us, them := a[i].String(), b[i].String(); us != them && origin[i] >= 0 {
				return origin[i], us, them
			}
		}
	}
	return -1, "", ""
}

// shrink removes commands while the sequence still differs.
func shrink(t testing.TB, ours, theirs *peer, steps []step) []step {
	for size := len(steps) / 2; size > 0; {
		removed := false
		for from := 0; from+size <= len(steps); {
			less := slices.Concat(steps[:from], steps[from+size:])
			if balanced(less) {
				at, _, _ := compare(t, ours, theirs, less, 1000)
				if at < 0 {
					from += size
					continue
				}
				steps, removed = less[:at+1], true
			} else {
				from += size
			}
		}
		if !removed || size > len(steps) {
			size /= 2
		}
	}
	return steps
}

func TestDifferential(t *testing.T) {
	sequences, length := 6, 250
	if os.Getenv("TERCET_CAMPAIGN") != "" || os.Getenv("TERCET_TEST_ALL") == "1" {
		sequences, length = 260, 400
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("TERCET_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed, sequences = n, 1
	}
	node := servertest.Nodes(t, 1)[0]
	_, addr := start(t, Options{Backend: node, FlushAllowed: true})
	redis := redisServer(t)
	commands := 0
	for i := range sequences {
		one := seed + uint64(i)
		v3 := one%2 == 1
		g := &generator{rand.New(rand.NewPCG(one, 0))}
		steps := g.sequence(length)
		ours, theirs := dialPeer(t, addr, v3), dialPeer(t, redis, v3)
		pipeline := []int{1, 7, 50}[one%3]
		at, us, them := compare(t, ours, theirs, steps, pipeline)
		// A machine that stands still for seconds makes the node say so: that is no answer to a command.
		for range 20 {
			if !strings.Contains(us, errUnknownOutcome) && !strings.Contains(us, "CLUSTERDOWN") {
				break
			}
			at, us, them = compare(t, ours, theirs, steps, pipeline)
		}
		commands += len(steps)
		if at < 0 {
			continue
		}
		small := shrink(t, ours, theirs, steps[:at+1])
		_, us2, them2 := compare(t, ours, theirs, small, 1)
		if us2 != "" {
			us, them = us2, them2
		}
		var b strings.Builder
		for _, s := range small {
			fmt.Fprintf(&b, "  %q\n", []string(s))
		}
		t.Fatalf("TERCET_SEED=%d, RESP3 %v: after %d commands the replies differ\ntercet: %s\nredis:  %s\n%s", one, v3, at+1, us, them, b.String())
	}
	t.Logf("%d commands, seeds from %d", commands, seed)
}
