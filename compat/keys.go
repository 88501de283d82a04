package compat

import (
	"math"
	"math/rand/v2"
	"strconv"
	"time"

	"tercet.dev/tercet/compat/acl"
	"tercet.dev/tercet/compat/resp"
	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// scanCountMax bounds the keys one step of SCAN looks at, keysMax what KEYS answers.
const (
	scanCountMax = 10000
	keysMax      = 1000000
)

func strs(list [][]byte) []string {
	out := make([]string, len(list))
	for i, b := range list {
		out[i] = string(b)
	}
	return out
}

func buildDel(_ *conn, a [][]byte) (operation, bool) {
	size := 0
	for _, k := range a[1:] {
		size += len(k) + 4
	}
	return operation{command: &engine.KeyDelete{Keys: strs(a[1:])}, word: wordCount, size: size}, true
}

// keysQuery makes an operation that asks about keys and words what is known of them.
func keysQuery(keys [][]byte, word func(w *resp.Buffer, keys []engine.KeyInfo)) operation {
	return operation{
		query: &engine.Query{Kind: engine.QueryKeys, Stream: &engine.StreamQuery{Keys: strs(keys)}}, block: noBlock,
		word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
			if r.Code != errs.OK {
				w.Error(refusalText(r.Code))
				return
			}
			word(w, a.Stream.Keys)
		},
	}
}

func buildExists(_ *conn, a [][]byte) (operation, bool) {
	return keysQuery(a[1:], func(w *resp.Buffer, keys []engine.KeyInfo) {
		n := int64(0)
		for i := range keys {
			if keys[i].Type != engine.KeyNone {
				n++
			}
		}
		w.Int(n)
	}), true
}

func buildType(_ *conn, a [][]byte) (operation, bool) {
	return keysQuery(a[1:2], func(w *resp.Buffer, keys []engine.KeyInfo) {
		switch keys[0].Type {
		case engine.KeyStream:
			w.Simple("stream")
		case engine.KeyString:
			w.Simple("string")
		default:
			w.Simple("none")
		}
	}), true
}

// buildTTL builds the family of TTL: what is left, or when, in milliseconds or in seconds rounded.
func buildTTL(absolute, seconds bool) func(c *conn, a [][]byte) (operation, bool) {
	return func(_ *conn, a [][]byte) (operation, bool) {
		return keysQuery(a[1:2], func(w *resp.Buffer, keys []engine.KeyInfo) {
			k := &keys[0]
			n := k.TTL
			if absolute {
				n = k.ExpiresAt
			}
			switch {
			case k.Type == engine.KeyNone:
				w.Int(-2)
			case k.TTL < 0:
				w.Int(-1)
			case seconds:
				w.Int((n + 500) / 1000)
			default:
				w.Int(n)
			}
		}), true
	}
}

// expireWords are the names that errors of expiries mention.
func errExpire(name string) string { return "ERR invalid expire time in '" + name + "' command" }

// deadline turns a number into a deadline, false when it overflows.
func deadline(n int64, absolute, seconds bool) (engine.Deadline, bool) {
	if seconds {
		if n > math.MaxInt64/1000 || n < math.MinInt64/1000 {
			return engine.Deadline{}, false
		}
		n *= 1000
	}
	if !absolute && n > math.MaxInt64-time.Now().UnixMilli() {
		return engine.Deadline{}, false
	}
	return engine.Deadline{Set: true, Absolute: absolute, Ms: n}, true
}

func buildExpire(name string, absolute, seconds bool) func(c *conn, a [][]byte) (operation, bool) {
	return func(c *conn, a [][]byte) (operation, bool) {
		var nx, xx, gt, lt bool
		for _, opt := range a[3:] {
			switch lower(opt) {
			case "nx":
				nx = true
			case "xx":
				xx = true
			case "gt":
				gt = true
			case "lt":
				lt = true
			default:
				return c.fail("ERR Unsupported option " + string(opt))
			}
		}
		switch {
		case nx && (xx || gt || lt):
			return c.fail("ERR NX and XX, GT or LT options at the same time are not compatible")
		case gt && lt:
			return c.fail("ERR GT and LT options at the same time are not compatible")
		}
		n, ok := c.integer(a[2])
		if !ok {
			return operation{}, false
		}
		cmd := &engine.KeyExpire{Key: string(a[1])}
		if cmd.By, ok = deadline(n, absolute, seconds); !ok {
			return c.fail(errExpire(name))
		}
		switch {
		case nx:
			cmd.When = engine.IfAbsent
		case gt: // a key without an expiry never passes GT, so XX adds nothing
			cmd.When = engine.IfGreater
		case xx && lt:
			cmd.When = engine.IfSooner
		case xx:
			cmd.When = engine.IfPresent
		case lt:
			cmd.When = engine.IfLess
		}
		return operation{command: cmd, word: zeroUnlessThere, size: len(a[1])}, true
	}
}

func buildPersist(_ *conn, a [][]byte) (operation, bool) {
	return operation{command: &engine.KeyExpire{Key: string(a[1])}, word: zeroUnlessThere, size: len(a[1])}, true
}

func buildRename(keep bool) func(c *conn, a [][]byte) (operation, bool) {
	word := wordOK
	if keep {
		word = wordCount
	}
	return func(_ *conn, a [][]byte) (operation, bool) {
		return operation{command: &engine.KeyRename{From: string(a[1]), To: string(a[2]), KeepTarget: keep}, word: word, size: len(a[1]) + len(a[2])}, true
	}
}

func buildCopy(c *conn, a [][]byte) (operation, bool) {
	cmd := &engine.KeyCopy{From: string(a[1]), To: string(a[2])}
	for i := 3; i < len(a); i++ {
		switch {
		case is(a[i], "replace"):
			cmd.Replace = true
		case is(a[i], "db") && i+1 < len(a):
			i++
			n, ok := c.integer(a[i])
			if !ok {
				return operation{}, false
			}
			if n != 0 {
				return c.fail("ERR DB index is out of range")
			}
		default:
			return c.fail(errSyntax)
		}
	}
	if cmd.From == cmd.To {
		return c.fail("ERR source and destination objects are the same")
	}
	return operation{command: cmd, word: zeroUnlessThere, size: len(a[1]) + len(a[2])}, true
}

func buildScan(c *conn, a [][]byte) (operation, bool) {
	cursor, err := strconv.ParseUint(string(a[1]), 10, 64)
	if err != nil {
		return c.fail("ERR invalid cursor")
	}
	sq := &engine.StreamQuery{Cursor: cursor, Count: 10}
	none := false
	for i := 2; i < len(a); i += 2 {
		if i+1 == len(a) {
			return c.fail(errSyntax)
		}
		switch v := a[i+1]; {
		case is(a[i], "count"):
			n, ok := c.integer(v)
			if !ok {
				return operation{}, false
			}
			if n < 1 {
				return c.fail(errSyntax)
			}
			sq.Count = uint64(min(n, scanCountMax))
		case is(a[i], "match"):
			sq.Match = string(v)
		case is(a[i], "type"):
			sq.Type = lower(v)
			none = sq.Type != "stream" && sq.Type != "string"
		default:
			return c.fail(errSyntax)
		}
	}
	if sq.Match == "*" {
		sq.Match = ""
	}
	if none {
		// No key has such a type: the cursor moves on all the same.
		sq.Type = ""
	}
	user := c.user
	return operation{query: &engine.Query{Kind: engine.QueryScan, Stream: sq}, block: noBlock,
		word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
			if r.Code != errs.OK {
				w.Error(refusalText(r.Code))
				return
			}
			var keys []string
			for i := range a.Stream.Keys {
				if name := a.Stream.Keys[i].Name; !none && user.MayRead(name) {
					keys = append(keys, name)
				}
			}
			w.Array(2)
			w.Uint(a.Stream.Next)
			w.Array(len(keys))
			for _, k := range keys {
				w.String(k)
			}
		}}, true
}

// cmdKeys answers KEYS with as many steps of SCAN as that takes, each of which lets others in between.
func cmdKeys(c *conn, a [][]byte) {
	pattern := string(a[1])
	q := engine.Query{Kind: engine.QueryScan, Stream: &engine.StreamQuery{Count: scanCountMax}}
	var keys []string
	bytes := 0
	for {
		answer, err := c.read(&q)
		if err != nil {
			c.w.Error(errorText(err))
			return
		}
		for i := range answer.Stream.Keys {
			name := answer.Stream.Keys[i].Name
			if (pattern == "*" || acl.Match(pattern, name)) && c.user.MayRead(name) {
				keys = append(keys, name)
				bytes += len(name) + 16
			}
		}
		if len(keys) > keysMax || bytes > c.s.limits.OutputBytes/2 {
			c.w.Error("ERR too many keys: use SCAN")
			return
		}
		if answer.Stream.Next == 0 {
			break
		}
		q.Stream.Cursor = answer.Stream.Next
	}
	c.w.Array(len(keys))
	for _, k := range keys {
		c.w.String(k)
	}
}

// buildKeys is KEYS in a transaction: one step at its place among the other commands, for as many keys as a step looks at.
func buildKeys(c *conn, a [][]byte) (operation, bool) {
	pattern, user := string(a[1]), c.user
	return operation{query: &engine.Query{Kind: engine.QueryScan, Stream: &engine.StreamQuery{Count: scanCountMax}}, block: noBlock,
		word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
			switch {
			case r.Code != errs.OK:
				w.Error(refusalText(r.Code))
				return
			case a.Stream.Next != 0:
				w.Error("ERR too many keys for KEYS in a transaction: use SCAN")
				return
			}
			var keys []string
			for i := range a.Stream.Keys {
				if name := a.Stream.Keys[i].Name; (pattern == "*" || acl.Match(pattern, name)) && user.MayRead(name) {
					keys = append(keys, name)
				}
			}
			w.Array(len(keys))
			for _, k := range keys {
				w.String(k)
			}
		}}, true
}

func buildDBSize(_ *conn, _ [][]byte) (operation, bool) {
	return operation{query: &engine.Query{Kind: engine.QueryDBSize}, block: noBlock, word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
		if r.Code != errs.OK {
			w.Error(refusalText(r.Code))
			return
		}
		w.Int(int64(a.Stream.Count))
	}}, true
}

func buildRandomKey(_ *conn, _ [][]byte) (operation, bool) {
	q := &engine.Query{Kind: engine.QueryRandomKey, Stream: &engine.StreamQuery{Cursor: rand.Uint64()}}
	return operation{query: q, block: noBlock, word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
		switch {
		case r.Code != errs.OK:
			w.Error(refusalText(r.Code))
		case len(a.Stream.Keys) == 0:
			w.Null()
		default:
			w.String(a.Stream.Keys[0].Name)
		}
	}}, true
}

func buildObject(what string) func(c *conn, a [][]byte) (operation, bool) {
	return func(_ *conn, a [][]byte) (operation, bool) {
		return keysQuery(a[2:3], func(w *resp.Buffer, keys []engine.KeyInfo) {
			switch {
			case keys[0].Type == engine.KeyNone:
				w.Null()
			case what == "encoding" && keys[0].Type == engine.KeyStream:
				w.String("stream")
			case what == "encoding":
				w.String("raw")
			case what == "freq":
				w.Error("ERR An LFU maxmemory policy is not selected, access frequency not tracked. Please note that when switching between policies at runtime LRU and LFU data will take some time to adjust.")
			case what == "refcount":
				w.Int(1)
			default:
				w.Int(0)
			}
		}), true
	}
}

func buildMemoryUsage(c *conn, a [][]byte) (operation, bool) {
	if len(a) != 3 && (len(a) != 5 || !is(a[3], "samples")) {
		return c.fail(errSyntax)
	}
	return keysQuery(a[2:3], func(w *resp.Buffer, keys []engine.KeyInfo) {
		if keys[0].Type == engine.KeyNone {
			w.Null()
			return
		}
		// What a key costs in memory: its entries are on disk.
		w.Int(int64(len(keys[0].Name)) + 512)
	}), true
}

func buildSet(c *conn, a [][]byte) (operation, bool) {
	cmd := &engine.StringSet{Key: string(a[1]), Value: a[2]}
	var expire []byte
	var absolute, seconds bool
	for i := 3; i < len(a); i++ {
		more := i+1 < len(a)
		opt := lower(a[i])
		switch {
		case opt == "nx" && cmd.When != engine.IfPresent:
			cmd.When = engine.IfAbsent
		case opt == "xx" && cmd.When != engine.IfAbsent:
			cmd.When = engine.IfPresent
		case opt == "get":
			cmd.Get = true
		case opt == "keepttl" && expire == nil:
			cmd.KeepTTL = true
		case (opt == "ex" || opt == "px" || opt == "exat" || opt == "pxat") && more && expire == nil && !cmd.KeepTTL:
			i++
			expire, absolute, seconds = a[i], len(opt) == 4, opt[0] == 'e'
		default:
			return c.fail(errSyntax)
		}
	}
	if expire != nil {
		n, ok := c.integer(expire)
		if !ok {
			return operation{}, false
		}
		if n <= 0 {
			return c.fail(errExpire("set"))
		}
		if cmd.By, ok = deadline(n, absolute, seconds); !ok {
			return c.fail(errExpire("set"))
		}
	}
	return operation{command: cmd, size: len(a[1]) + len(a[2]), word: func(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
		switch {
		case r.Code != errs.OK:
			w.Error(refusalText(r.Code))
		case cmd.Get:
			writeValue(w, r.Stream)
		case r.Count == 0:
			w.Null()
		default:
			w.OK()
		}
	}}, true
}

func writeValue(w *resp.Buffer, s *engine.StreamResult) {
	if s == nil || s.Value == nil {
		w.Null()
		return
	}
	w.Bulk(s.Value)
}

func buildGet(_ *conn, a [][]byte) (operation, bool) {
	return operation{query: &engine.Query{Kind: engine.QueryString, Topic: string(a[1])}, block: noBlock, word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
		switch {
		case r.Code == errs.TopicNotFound:
			w.Null()
		case r.Code != errs.OK:
			w.Error(refusalText(r.Code))
		case a.Stream == nil || a.Stream.Value == nil:
			w.Null()
		default:
			w.Bulk(a.Stream.Value)
		}
	}}, true
}

func buildGetDel(_ *conn, a [][]byte) (operation, bool) {
	return operation{command: &engine.StringGetDel{Key: string(a[1])}, size: len(a[1]), word: func(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
		if r.Code != errs.OK {
			w.Error(refusalText(r.Code))
			return
		}
		writeValue(w, r.Stream)
	}}, true
}

func buildFlush(c *conn, a [][]byte) (operation, bool) {
	if len(a) > 2 || len(a) == 2 && !is(a[1], "async") && !is(a[1], "sync") {
		return c.fail(errSyntax)
	}
	if !c.s.opts.FlushAllowed {
		return c.fail("ERR " + lower(a[0]) + " is not allowed on this node: it was not started with --flush-allowed")
	}
	c.s.log.Info("audit: "+lower(a[0]), "by", c.user.Name, "client", c.nc.RemoteAddr().String())
	return operation{command: &engine.Flush{}, word: wordOK}, true
}
