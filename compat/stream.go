package compat

import (
	"crypto/sha256"
	"math"
	"strings"
	"time"

	"tercet.dev/tercet/compat/resp"
	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// The stream commands: arguments in, engine commands and queries out, and the replies worded. The order in which Valkey
// checks things is kept, since clients see which error comes first: where it looks at the key before it looks at an
// argument, a bad argument becomes a question about the key (see unlessMissing).

// trimArgs are the options that XADD and XTRIM share.
type trimArgs struct {
	trim       engine.Trim
	noCreate   bool
	token      string
	auto       bool // IDMPAUTO: the token is completed with the fields
	idAt       int
	by         engine.AddID
	id         engine.StreamID
	limitGiven bool
	// delay and retention are in seconds.
	delay, retention int64
}

const (
	errTwoTrims    = "ERR syntax error, MAXLEN and MINID options at the same time are not compatible"
	errLimitNoTrim = "ERR syntax error, LIMIT cannot be used without specifying a trimming strategy"
	errLimitNoTil  = "ERR syntax error, LIMIT cannot be used without the special ~ option"
	errTrimNothing = "ERR syntax error, XTRIM must be called with a trimming strategy"
)

// trimLimitDefault is the LIMIT of ~ without one: a hundred runs of a hundred entries.
const trimLimitDefault = 100 * 100

// parseTrim reads the options of XADD up to its ID, or those of XTRIM.
func (c *conn) parseTrim(a [][]byte, xadd bool) (trimArgs, bool) {
	t := trimArgs{idAt: -1}
	i := 2
loop:
	for ; i < len(a); i++ {
		more := len(a) - 1 - i
		opt := a[i]
		switch {
		case xadd && len(opt) == 1 && opt[0] == '*':
			break loop
		case more > 0 && (is(opt, "maxlen") || is(opt, "minid")):
			if t.trim.By != engine.TrimNone {
				c.w.Error(errTwoTrims)
				return t, false
			}
			t.trim.Approx = false
			if more >= 2 && len(a[i+1]) == 1 && (a[i+1][0] == '~' || a[i+1][0] == '=') {
				t.trim.Approx = a[i+1][0] == '~'
				i++
			}
			i++
			if is(opt, "maxlen") {
				n, ok := c.integer(a[i])
				if !ok {
					return t, false
				}
				if n < 0 {
					c.w.Error("ERR The MAXLEN argument must be >= 0.")
					return t, false
				}
				t.trim.By, t.trim.MaxLen = engine.TrimMaxLen, uint64(n)
			} else {
				id, ok := c.streamID(a[i])
				if !ok {
					return t, false
				}
				t.trim.By, t.trim.MinID = engine.TrimMinID, id
			}
		case more > 0 && is(opt, "limit"):
			n, ok := c.integer(a[i+1])
			if !ok {
				return t, false
			}
			if n < 0 {
				c.w.Error("ERR The LIMIT argument must be >= 0.")
				return t, false
			}
			t.trim.Limit, t.limitGiven = uint64(n), true
			i++
		case xadd && is(opt, "nomkstream"):
			t.noCreate = true
		case is(opt, "keepref"):
			t.trim.Refs = engine.KeepRef
		case is(opt, "delref"):
			t.trim.Refs = engine.DelRef
		case is(opt, "acked"):
			t.trim.Refs = engine.Acked
		case xadd && is(opt, "idmp") && more >= 2:
			t.token = idempotencyToken(a[i+1], a[i+2])
			i += 2
		case xadd && is(opt, "idmpauto") && more >= 1:
			t.token, t.auto = string(a[i+1]), true
			i++
		case xadd && more > 0 && (is(opt, "delay") || is(opt, "retention")):
			most := secondsOf(limits.DelayMax)
			into := &t.delay
			if is(opt, "retention") {
				most, into = retentionMax, &t.retention
			}
			n, ok := resp.ParseInt(a[i+1])
			if !ok || n < 0 || n > most {
				c.w.Error("ERR the value of '" + lower(opt) + "' must be a whole number from 0 to " + itoa(most))
				return t, false
			}
			*into = n
			i++
		case xadd:
			if !t.parseAddID(opt) {
				c.w.Error(errInvalidID)
				return t, false
			}
			break loop
		default:
			c.w.Error(errSyntax)
			return t, false
		}
	}
	t.idAt = i
	switch {
	case t.trim.Limit > 0 && t.trim.By == engine.TrimNone:
		c.w.Error(errLimitNoTrim)
		return t, false
	case !xadd && t.trim.By == engine.TrimNone:
		c.w.Error(errTrimNothing)
		return t, false
	case t.limitGiven && !t.trim.Approx:
		c.w.Error(errLimitNoTil)
		return t, false
	case !t.limitGiven && t.trim.Approx:
		t.trim.Limit = trimLimitDefault
	}
	return t, true
}

// parseAddID reads the ID of XADD when it is not *.
func (t *trimArgs) parseAddID(b []byte) bool {
	t.by = engine.AddExplicit
	if ms, ok := strings.CutSuffix(string(b), "-*"); ok && !strings.Contains(ms, "-") {
		id, ok := parseID([]byte(ms), 0, false)
		t.by, t.id = engine.AddAutoSeq, id
		return ok
	}
	id, ok := parseID(b, 0, false)
	t.id = id
	return ok
}

// idempotencyToken makes one token of a producer and a message's ID.
func idempotencyToken(producer, id []byte) string {
	return "idmp:" + itoa(int64(len(producer))) + ":" + string(producer) + string(id)
}

func buildXAdd(c *conn, a [][]byte) (operation, bool) {
	t := trimArgs{idAt: 2}
	if len(a[2]) != 1 || a[2][0] != '*' {
		var ok bool
		if t, ok = c.parseTrim(a, true); !ok {
			return operation{}, false
		}
	}
	fields := t.idAt + 1
	if n := len(a) - fields; n < 2 || n%2 == 1 {
		return c.fail("ERR wrong number of arguments for 'xadd' command")
	}
	if t.by == engine.AddExplicit && t.id == (engine.StreamID{}) {
		return c.fail("ERR The ID specified in XADD must be greater than 0-0")
	}
	if t.token != "" {
		if t.by != engine.AddAuto {
			return c.fail("ERR IDMP and IDMPAUTO need the ID *")
		}
		if t.auto {
			t.token = fieldsToken(t.token, a[fields:])
		}
	}
	c.add = engine.StreamAdd{Key: view(a[1]), By: t.by, ID: t.id, NoCreate: t.noCreate, Trim: t.trim, Token: t.token, Fields: a[fields:]}
	word := wordFunc(wordAdd)
	if t.token != "" || t.delay > 0 || t.retention > 0 {
		switch {
		case t.delay > 0 && t.by != engine.AddAuto:
			return c.fail("ERR DELAY needs the ID *")
		case t.retention > 0 && t.delay > t.retention:
			return c.fail("ERR DELAY is longer than RETENTION")
		}
		s, text := c.s.sealer()
		if s == nil {
			return c.fail(text)
		}
		word = wordAddOnce(s)
		c.add.Delay, c.add.Retention = seconds(t.delay), seconds(t.retention)
	}
	size := len(a[1]) + len(t.token)
	for _, f := range a[fields:] {
		size += len(f) + 5
	}
	return operation{command: &c.add, word: word, size: size}, true
}

// fieldsToken makes a token of a producer and what it sends.
func fieldsToken(producer string, fields [][]byte) string {
	h := sha256.New()
	for _, f := range fields {
		h.Write([]byte(itoa(int64(len(f))) + ":"))
		h.Write(f)
	}
	return idempotencyToken([]byte(producer), h.Sum(nil))
}

// detach copies a command whose builder reuses it. Its parts are those of the arguments.
func detach(cmd engine.Command) engine.Command {
	if add, ok := cmd.(*engine.StreamAdd); ok {
		copied := *add
		return &copied
	}
	return cmd
}

func wordAdd(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
	switch r.Code {
	case errs.OK:
		writeID(w, r.Published.Stream)
	case errs.TopicNotFound:
		w.Null()
	default:
		w.Error(refusalText(r.Code))
	}
}

// wordCount words commands that answer a number.
func wordCount(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
	if r.Code != errs.OK {
		w.Error(refusalText(r.Code))
		return
	}
	w.Int(r.Count)
}

// wordOK words commands that answer OK.
func wordOK(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
	if r.Code != errs.OK {
		w.Error(refusalText(r.Code))
		return
	}
	w.OK()
}

// zeroUnlessThere words a number for commands to which an absent key or group is none.
func zeroUnlessThere(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
	if r.Code == errs.TopicNotFound || r.Code == errs.GroupNotFound {
		w.Int(0)
		return
	}
	wordCount(w, r, a)
}

// unlessMissing makes an operation that answers with an error about arguments, unless the key, or the group of the key when
// one is named, is missing: then missing words the answer.
func unlessMissing(key, group, text string, missing func(w *resp.Buffer, hasKey bool)) operation {
	if group == "" {
		return operation{
			query: &engine.Query{Kind: engine.QueryKeys, Stream: &engine.StreamQuery{Keys: []string{key}}},
			block: noBlock,
			word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
				switch {
				case r.Code != errs.OK:
					w.Error(refusalText(r.Code))
				case len(a.Stream.Keys) == 0 || a.Stream.Keys[0].Type == engine.KeyNone:
					missing(w, false)
				case a.Stream.Keys[0].Type != engine.KeyStream:
					w.Error(errWrongType)
				default:
					w.Error(text)
				}
			},
		}
	}
	return operation{
		query: &engine.Query{Kind: engine.QueryStreamGroups, Topic: key, Stream: &engine.StreamQuery{}},
		block: noBlock,
		word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
			switch r.Code {
			case errs.OK:
				for i := range a.Stream.Info.Groups {
					if a.Stream.Info.Groups[i].Name == group {
						w.Error(text)
						return
					}
				}
				missing(w, true)
			case errs.TopicNotFound:
				missing(w, false)
			default:
				w.Error(refusalText(r.Code))
			}
		},
	}
}

func missingIsZero(w *resp.Buffer, _ bool) { w.Int(0) }

func buildXLen(_ *conn, a [][]byte) (operation, bool) {
	return operation{
		query: &engine.Query{Kind: engine.QueryStreamLen, Topic: string(a[1])}, block: noBlock,
		word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
			switch r.Code {
			case errs.OK:
				w.Int(int64(a.Stream.Count))
			case errs.TopicNotFound:
				w.Int(0)
			default:
				w.Error(refusalText(r.Code))
			}
		},
	}, true
}

func buildRange(reverse bool) func(c *conn, a [][]byte) (operation, bool) {
	return func(c *conn, a [][]byte) (operation, bool) {
		from, to := a[2], a[3]
		if reverse {
			from, to = to, from
		}
		start, text := parseRangeStart(from)
		var end engine.StreamID
		if text == "" {
			end, text = parseRangeEnd(to)
		}
		if text != "" {
			return c.fail(text)
		}
		count := int64(-1)
		for i := 4; i < len(a); i++ {
			if !is(a[i], "count") || i+1 == len(a) {
				return c.fail(errSyntax)
			}
			i++
			n, ok := c.integer(a[i])
			if !ok {
				return operation{}, false
			}
			count = max(n, 0)
		}
		q := &engine.Query{Kind: engine.QueryStreamRange, Topic: string(a[1]), Stream: &engine.StreamQuery{Start: start, End: end, Reverse: reverse}}
		if count == 0 {
			// No entries are wanted, but a key of another type is an error, and no key is an empty array.
			op := unlessMissing(q.Topic, "", "", func(w *resp.Buffer, _ bool) { w.Array(0) })
			word := op.word
			op.word = func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
				if r.Code == errs.OK && len(a.Stream.Keys) == 1 && a.Stream.Keys[0].Type == engine.KeyStream {
					w.NullArray()
					return
				}
				word(w, r, a)
			}
			return op, true
		}
		if count > 0 {
			q.Stream.Count = uint64(count)
		}
		return operation{query: q, block: noBlock, word: wordRange}, true
	}
}

func wordRange(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
	switch {
	case r.Code == errs.TopicNotFound, r.Code == errs.OK && len(a.Stream.Reads) == 0:
		w.Array(0)
	case r.Code != errs.OK:
		w.Error(refusalText(r.Code))
	default:
		read := &a.Stream.Reads[0]
		w.Array(len(read.Entries))
		for i := range read.Entries {
			writeEntry(w, &read.Entries[i], false)
		}
	}
}

// writeEntry writes an entry: its ID and its fields, and with claim how long ago and how often it was delivered.
func writeEntry(w *resp.Buffer, e *engine.StreamEntry, claim bool) {
	if claim {
		w.Array(4)
	} else {
		w.Array(2)
	}
	writeID(w, e.ID)
	if e.Deleted {
		w.NullArray()
	} else {
		w.Array(len(e.Fields))
		for _, f := range e.Fields {
			w.Bulk(f)
		}
	}
	if claim {
		w.Int(e.Idle)
		w.Int(int64(e.Count))
	}
}

func buildXDel(_ *conn, a [][]byte) (operation, bool) {
	ids, ok := parseIDs(a[2:])
	if !ok {
		return unlessMissing(string(a[1]), "", errInvalidID, missingIsZero), true
	}
	return operation{command: &engine.StreamDelete{Key: string(a[1]), IDs: ids}, word: zeroUnlessThere, size: len(a[1]) + 20*len(ids)}, true
}

func buildXTrim(c *conn, a [][]byte) (operation, bool) {
	t, ok := c.parseTrim(a, false)
	if !ok {
		return operation{}, false
	}
	return operation{command: &engine.StreamTrim{Key: string(a[1]), Trim: t.trim}, word: zeroUnlessThere, size: len(a[1])}, true
}

func buildXSetID(c *conn, a [][]byte) (operation, bool) {
	cmd := &engine.StreamSetID{Key: string(a[1]), EntriesAdded: -1}
	var ok bool
	if cmd.ID, ok = c.streamID(a[2]); !ok {
		return operation{}, false
	}
	for i := 3; i < len(a); i += 2 {
		more := i+1 < len(a)
		switch {
		case more && is(a[i], "entriesadded"):
			if cmd.EntriesAdded, ok = c.integer(a[i+1]); !ok {
				return operation{}, false
			}
			if cmd.EntriesAdded < 0 {
				return c.fail("ERR entries_added must be positive")
			}
		case more && is(a[i], "maxdeletedid"):
			if cmd.MaxDeleted, ok = c.streamID(a[i+1]); !ok {
				return operation{}, false
			}
			if cmd.ID.Compare(cmd.MaxDeleted) < 0 {
				return c.fail("ERR The ID specified in XSETID is smaller than the provided max_deleted_entry_id")
			}
		default:
			return c.fail(errSyntax)
		}
	}
	return operation{command: cmd, size: len(a[1]), word: func(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
		switch r.Code {
		case errs.OK:
			w.OK()
		case errs.StreamIDTooLow:
			w.Error("ERR The ID specified in XSETID is smaller than the target stream top item")
		case errs.StreamIDDeleted:
			w.Error("ERR The ID specified in XSETID is smaller than current max_deleted_entry_id")
		case errs.StreamCountTooLow:
			w.Error("ERR The entries_added specified in XSETID is smaller than the target stream length")
		default:
			w.Error(refusalText(r.Code))
		}
	}}, true
}

// readArgs are the arguments of XREAD and XREADGROUP.
type readArgs struct {
	group, consumer []byte
	hasGroup        bool
	count           int64
	block           time.Duration
	noAck           bool
	claim           int64
	hasClaim        bool
	total, size     uint64
	keys, ids       [][]byte
}

func (c *conn) parseRead(a [][]byte, name string, symbol string) (readArgs, bool) {
	r := readArgs{block: noBlock}
	isGroup := name == "xreadgroup"
	var ok bool
	for i := 1; i < len(a); i++ {
		more := len(a) - 1 - i
		switch opt := a[i]; {
		case more > 0 && is(opt, "block"):
			i++
			if r.block, ok = c.timeout(a[i]); !ok {
				return r, false
			}
		case more > 0 && is(opt, "count"):
			i++
			if r.count, ok = c.integer(a[i]); !ok {
				return r, false
			}
			r.count = max(r.count, 0)
		case more > 0 && (is(opt, "maxcount") || is(opt, "maxsize")):
			i++
			n, ok := resp.ParseInt(a[i])
			if !ok || n < 1 {
				c.w.Error("ERR " + strings.ToUpper(string(opt)) + " must be a positive integer")
				return r, false
			}
			if is(opt, "maxcount") {
				r.total = uint64(n)
			} else {
				r.size = uint64(n)
			}
		case more > 0 && is(opt, "streams"):
			rest := a[i+1:]
			if len(rest)%2 != 0 {
				c.w.Error("ERR Unbalanced '" + name + "' list of streams: for each stream key an ID or '" + symbol + "' must be specified.")
				return r, false
			}
			r.keys, r.ids = rest[:len(rest)/2], rest[len(rest)/2:]
			i = len(a)
		case more >= 2 && is(opt, "group"):
			if !isGroup {
				c.w.Error("ERR The GROUP option is only supported by XREADGROUP. You called XREAD instead.")
				return r, false
			}
			r.hasGroup, r.group, r.consumer = true, a[i+1], a[i+2]
			i += 2
		case is(opt, "noack"):
			if !isGroup {
				c.w.Error("ERR The NOACK option is only supported by XREADGROUP. You called XREAD instead.")
				return r, false
			}
			r.noAck = true
		case isGroup && more > 0 && is(opt, "claim"):
			i++
			r.hasClaim = true
			if r.claim, ok = c.integerOr(a[i], "ERR min-idle-time is not an integer"); !ok {
				return r, false
			}
			if r.claim < 0 {
				c.w.Error("ERR min-idle-time must be a positive integer")
				return r, false
			}
		default:
			c.w.Error(errSyntax)
			return r, false
		}
	}
	switch {
	case r.keys == nil:
		c.w.Error(errSyntax)
	case isGroup && !r.hasGroup:
		c.w.Error("ERR Missing GROUP option for XREADGROUP")
	default:
		return r, true
	}
	return r, false
}

// timeout reads the milliseconds of BLOCK.
func (c *conn) timeout(b []byte) (time.Duration, bool) {
	n, ok := c.integerOr(b, "ERR timeout is not an integer or out of range")
	if !ok {
		return 0, false
	}
	if n < 0 {
		c.w.Error("ERR timeout is negative")
		return 0, false
	}
	if n > math.MaxInt64-time.Now().UnixMilli() {
		c.w.Error("ERR timeout is out of range")
		return 0, false
	}
	// Durations end after 292 years.
	return time.Duration(min(n, math.MaxInt64/int64(time.Millisecond))) * time.Millisecond, true
}

func buildXRead(c *conn, a [][]byte) (operation, bool) {
	r, ok := c.parseRead(a, "xread", "$")
	if !ok {
		return operation{}, false
	}
	positions := make([]engine.StreamPosition, len(r.keys))
	for i, key := range r.keys {
		p := &positions[i]
		p.Key = string(key)
		switch string(r.ids[i]) {
		case "$":
			p.New = true
		case "+":
			p.Tail = true
		case ">":
			return readOrder(r.keys[:i+1], nil, "ERR The > ID can be specified only when calling XREADGROUP using the GROUP <group> <consumer> option."), true
		default:
			if p.ID, ok = parseID(r.ids[i], 0, false); !ok {
				return readOrder(r.keys[:i+1], nil, errInvalidID), true
			}
		}
	}
	q := &engine.Query{Kind: engine.QueryStreamRead, Stream: &engine.StreamQuery{Streams: positions, Count: uint64(r.count), Total: r.total, Size: r.size}}
	return operation{query: q, block: r.block, word: wordRead}, true
}

// readOrder answers an error about the ID of the last of keys, unless one of the keys is of another type, which Valkey looks
// at first.
func readOrder(keys [][]byte, _ []byte, text string) operation {
	names := make([]string, len(keys))
	for i, k := range keys {
		names[i] = string(k)
	}
	return operation{
		query: &engine.Query{Kind: engine.QueryKeys, Stream: &engine.StreamQuery{Keys: names}}, block: noBlock,
		word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
			if r.Code != errs.OK {
				w.Error(refusalText(r.Code))
				return
			}
			for i := range a.Stream.Keys {
				if t := a.Stream.Keys[i].Type; t != engine.KeyNone && t != engine.KeyStream {
					w.Error(errWrongType)
					return
				}
			}
			w.Error(text)
		},
	}
}

// hasEntries reports whether a read gave anything.
func hasEntries(reads []engine.StreamRead) bool {
	for i := range reads {
		if len(reads[i].Entries) > 0 {
			return true
		}
	}
	return false
}

// wordRead words XREAD.
func wordRead(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
	if r.Code != errs.OK {
		w.Error(refusalText(r.Code))
		return
	}
	writeReads(w, a.Stream.Reads, false, false)
}

// writeReads writes what a read gives of several streams; those without entries are left out unless empty ones count.
func writeReads(w *resp.Buffer, reads []engine.StreamRead, empty, claim bool) {
	n := 0
	for i := range reads {
		if empty || len(reads[i].Entries) > 0 {
			n++
		}
	}
	if n == 0 {
		w.NullArray()
		return
	}
	if w.V3 {
		w.Map(n)
	} else {
		w.Array(n)
	}
	for i := range reads {
		read := &reads[i]
		if !empty && len(read.Entries) == 0 {
			continue
		}
		if !w.V3 {
			w.Array(2)
		}
		w.String(read.Key)
		w.Array(len(read.Entries))
		for k := range read.Entries {
			writeEntry(w, &read.Entries[k], claim)
		}
	}
}

func buildXReadGroup(c *conn, a [][]byte) (operation, bool) {
	r, ok := c.parseRead(a, "xreadgroup", ">")
	if !ok {
		return operation{}, false
	}
	cmd := &engine.StreamReadGroup{Group: string(r.group), Consumer: string(r.consumer), Count: uint64(r.count), Total: r.total, Size: r.size, NoAck: r.noAck,
		Claim: r.hasClaim, ClaimIdle: r.claim, Streams: make([]engine.StreamPosition, len(r.keys))}
	onlyNew := true
	for i, key := range r.keys {
		p := &cmd.Streams[i]
		p.Key = string(key)
		text := ""
		switch string(r.ids[i]) {
		case ">":
			p.New = true
		case "$":
			text = "ERR The $ ID is meaningless in the context of XREADGROUP: you want to read the history of this consumer by specifying a proper ID, or use the > ID to get new messages. The $ ID would just return an empty result set."
		case "+":
			text = "ERR The + ID is meaningless in the context of XREADGROUP: you want to read the history of this consumer by specifying a proper ID, or use the > ID to get new messages. The + ID would just return an empty result set."
		default:
			if p.ID, ok = parseID(r.ids[i], 0, false); !ok {
				text = errInvalidID
			}
			// The greatest ID means the same as > does.
			p.New = p.ID == engine.StreamIDMax
		}
		if text != "" {
			return c.readGroupOrder(r.keys[:i+1], cmd.Group, text), true
		}
		onlyNew = onlyNew && p.New
	}
	size := len(cmd.Group) + len(cmd.Consumer) + 24
	for i := range cmd.Streams {
		size += len(cmd.Streams[i].Key) + 24
	}
	if len(cmd.Streams) > engine.ParkStreamsMax && onlyNew && r.block >= 0 {
		return c.fail("ERR a read that waits may name " + itoa(engine.ParkStreamsMax) + " streams")
	}
	op := operation{command: cmd, size: size, word: wordReadGroup(cmd), block: noBlock}
	if onlyNew && r.block >= 0 {
		op.block, op.group = r.block, cmd
	}
	return op, true
}

// readGroupOrder answers an error about the ID of the last of keys, unless one of the keys or its group is missing.
func (c *conn) readGroupOrder(keys [][]byte, group, text string) operation {
	for _, k := range keys[:len(keys)-1] {
		a, err := c.read(&engine.Query{Kind: engine.QueryStreamGroups, Topic: string(k), Stream: &engine.StreamQuery{}})
		found := false
		if err == nil {
			for i := range a.Stream.Info.Groups {
				found = found || a.Stream.Info.Groups[i].Name == group
			}
		}
		if !found {
			keys = [][]byte{k}
			break
		}
	}
	key := string(keys[len(keys)-1])
	return unlessMissing(key, group, text, func(w *resp.Buffer, _ bool) {
		w.Error(errNoGroup(key, group) + " in XREADGROUP with GROUP option")
	})
}

func wordReadGroup(cmd *engine.StreamReadGroup) wordFunc {
	return func(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
		switch r.Code {
		case errs.OK:
			if r.Stream == nil {
				w.NullArray()
				return
			}
			writeReads(w, r.Stream.Reads, true, cmd.Claim)
		case errs.TopicNotFound, errs.GroupNotFound:
			w.Error(errNoGroup(missingKey(r, cmd), cmd.Group) + " in XREADGROUP with GROUP option")
		default:
			w.Error(refusalText(r.Code))
		}
	}
}

// missingKey is the stream whose key or group a read did not find.
func missingKey(r *engine.Result, cmd *engine.StreamReadGroup) string {
	return cmd.Streams[min(max(int(r.Count), 0), len(cmd.Streams)-1)].Key
}

func buildXAck(_ *conn, a [][]byte) (operation, bool) {
	ids, ok := parseIDs(a[3:])
	if !ok {
		return unlessMissing(string(a[1]), string(a[2]), errInvalidID, missingIsZero), true
	}
	return operation{command: &engine.StreamAck{Key: view(a[1]), Group: view(a[2]), IDs: ids}, word: zeroUnlessThere,
		size: len(a[1]) + len(a[2]) + 20*len(ids)}, true
}

// noGroup words the absence of a key or group for XPENDING, XCLAIM and XAUTOCLAIM.
func noGroup(w *resp.Buffer, r *engine.Result, key, group string) bool {
	switch r.Code {
	case errs.OK:
		return false
	case errs.TopicNotFound, errs.GroupNotFound:
		w.Error(errNoGroup(key, group))
	default:
		w.Error(refusalText(r.Code))
	}
	return true
}

func buildXClaim(_ *conn, a [][]byte) (operation, bool) {
	key, group := string(a[1]), string(a[2])
	// The group is looked at before the arguments.
	bad := func(text string) (operation, bool) {
		return unlessMissing(key, group, text, func(w *resp.Buffer, _ bool) { w.Error(errNoGroup(key, group)) }), true
	}
	cmd := &engine.StreamClaim{Key: key, Group: group, Consumer: string(a[3]), Idle: -1, Time: -1, RetryCount: -1}
	n, ok := resp.ParseInt(a[4])
	if !ok {
		return bad("ERR Invalid min-idle-time argument for XCLAIM")
	}
	cmd.MinIdle = max(n, 0)
	i := 5
	for ; i < len(a); i++ {
		id, ok := parseID(a[i], 0, false)
		if !ok {
			break
		}
		cmd.IDs = append(cmd.IDs, id)
	}
	for ; i < len(a); i++ {
		more := i+1 < len(a)
		switch opt := a[i]; {
		case is(opt, "force"):
			cmd.Force = true
		case is(opt, "justid"):
			cmd.JustID = true
		case more && is(opt, "idle"):
			i++
			if n, ok = resp.ParseInt(a[i]); !ok {
				return bad("ERR Invalid IDLE option argument for XCLAIM")
			}
			// A time ahead of now is now, and so is one before 1970.
			if n < 0 || n > time.Now().UnixMilli() {
				n = 0
			}
			cmd.Idle, cmd.Time = n, -1
		case more && is(opt, "time"):
			i++
			if n, ok = resp.ParseInt(a[i]); !ok {
				return bad("ERR Invalid TIME option argument for XCLAIM")
			}
			cmd.Idle, cmd.Time = -1, n
			if n < 0 {
				cmd.Idle, cmd.Time = 0, -1
			}
		case more && is(opt, "retrycount"):
			i++
			if n, ok = resp.ParseInt(a[i]); !ok {
				return bad("ERR Invalid RETRYCOUNT option argument for XCLAIM")
			}
			cmd.RetryCount = max(n, -1)
		case more && is(opt, "lastid"):
			i++
			if cmd.LastID, ok = parseID(a[i], 0, false); !ok {
				return bad(errInvalidID)
			}
		default:
			return bad("ERR Unrecognized XCLAIM option '" + clip(opt, 4096) + "'")
		}
	}
	return operation{command: cmd, size: len(a[1]) + len(a[2]) + len(a[3]) + 20*len(cmd.IDs) + 64, word: func(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
		if noGroup(w, r, key, group) {
			return
		}
		writeClaimed(w, r, cmd.JustID)
	}}, true
}

// writeClaimed writes claimed entries, or their IDs.
func writeClaimed(w *resp.Buffer, r *engine.Result, justID bool) {
	if r.Stream == nil {
		w.Array(0)
		return
	}
	entries := r.Stream.Entries
	w.Array(len(entries))
	for i := range entries {
		if justID {
			writeID(w, entries[i].ID)
		} else {
			writeEntry(w, &entries[i], false)
		}
	}
}

func buildXAutoClaim(c *conn, a [][]byte) (operation, bool) {
	key, group := string(a[1]), string(a[2])
	cmd := &engine.StreamAutoClaim{Key: key, Group: group, Consumer: string(a[3]), Count: 100}
	n, ok := c.integerOr(a[4], "ERR Invalid min-idle-time argument for XAUTOCLAIM")
	if !ok {
		return operation{}, false
	}
	cmd.MinIdle = max(n, 0)
	var text string
	if cmd.Start, text = parseRangeStart(a[5]); text != "" {
		return c.fail(text)
	}
	for i := 6; i < len(a); i++ {
		switch {
		case i+1 < len(a) && is(a[i], "count"):
			i++
			n, ok := resp.ParseInt(a[i])
			if !ok || n < 1 || n > math.MaxInt64/16 {
				return c.fail("ERR COUNT must be > 0")
			}
			cmd.Count = uint64(n)
		case is(a[i], "justid"):
			cmd.JustID = true
		default:
			return c.fail(errSyntax)
		}
	}
	return operation{command: cmd, size: len(a[1]) + len(a[2]) + len(a[3]) + 64, word: func(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
		if noGroup(w, r, key, group) {
			return
		}
		var none engine.StreamResult
		s := r.Stream
		if s == nil {
			s = &none
		}
		w.Array(3)
		writeID(w, s.Next)
		writeClaimed(w, r, cmd.JustID)
		w.Array(len(s.Deleted))
		for _, id := range s.Deleted {
			writeID(w, id)
		}
	}}, true
}

func buildXPending(c *conn, a [][]byte) (operation, bool) {
	key, group := string(a[1]), string(a[2])
	if len(a) != 3 && (len(a) < 6 || len(a) > 9) {
		return c.fail(errSyntax)
	}
	if len(a) == 3 {
		return operation{query: &engine.Query{Kind: engine.QueryPending, Topic: key, Group: group}, block: noBlock,
			word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
				if !noGroup(w, r, key, group) {
					writePendingSummary(w, a.Stream.Pending)
				}
			}}, true
	}
	sq := &engine.StreamQuery{}
	at := 3
	var ok bool
	if is(a[3], "idle") {
		if sq.MinIdle, ok = c.integer(a[4]); !ok {
			return operation{}, false
		}
		if len(a) < 8 {
			return c.fail(errSyntax)
		}
		at = 5
	}
	count, ok := c.integer(a[at+2])
	if !ok {
		return operation{}, false
	}
	var text string
	if sq.Start, text = parseRangeStart(a[at]); text == "" {
		sq.End, text = parseRangeEnd(a[at+1])
	}
	if text != "" {
		return c.fail(text)
	}
	if at+3 < len(a) {
		sq.Consumer = string(a[at+3])
	}
	hasConsumer := at+3 < len(a)
	sq.Count = uint64(max(count, 0))
	none := count <= 0 || hasConsumer && sq.Consumer == ""
	q := &engine.Query{Kind: engine.QueryPendingRange, Topic: key, Group: group, Stream: sq}
	if none {
		// Nothing is wanted, but the group has to be there.
		q = &engine.Query{Kind: engine.QueryPending, Topic: key, Group: group}
	}
	return operation{query: q, block: noBlock, word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
		switch {
		case noGroup(w, r, key, group):
		case none:
			w.Array(0)
		default:
			entries := a.Stream.Pending.Entries
			w.Array(len(entries))
			for i := range entries {
				e := &entries[i]
				w.Array(4)
				writeID(w, e.ID)
				w.String(e.Consumer)
				w.Int(e.Idle)
				w.Int(int64(e.Count))
			}
		}
	}}, true
}

func writePendingSummary(w *resp.Buffer, p *engine.PendingInfo) {
	w.Array(4)
	w.Int(int64(p.Total))
	if p.Total == 0 {
		w.Null()
		w.Null()
		w.NullArray()
		return
	}
	writeID(w, p.Min)
	writeID(w, p.Max)
	w.Array(len(p.Consumers))
	for i := range p.Consumers {
		w.Array(2)
		w.String(p.Consumers[i].Name)
		w.Uint(p.Consumers[i].Pending)
	}
}

// subcommandSyntax is the error of a subcommand with options it does not have.
func subcommandSyntax(a [][]byte) string {
	return "ERR unknown subcommand or wrong number of arguments for '" + clip(a[1], 128) + "'. Try " + strings.ToUpper(string(a[0])) + " HELP."
}

func buildXGroupCreate(c *conn, a [][]byte) (operation, bool) {
	return buildXGroupPosition(c, a, engine.GroupCreate)
}

func buildXGroupSetID(c *conn, a [][]byte) (operation, bool) {
	return buildXGroupPosition(c, a, engine.GroupSetID)
}

// buildXGroupPosition builds XGROUP CREATE and SETID.
func buildXGroupPosition(c *conn, a [][]byte, op engine.GroupOp) (operation, bool) {
	key, group := string(a[2]), string(a[3])
	cmd := &engine.StreamGroup{Op: op, Key: key, Group: group, EntriesRead: -1}
	for i := 5; i < len(a); i++ {
		switch {
		case op == engine.GroupCreate && is(a[i], "mkstream"):
			cmd.Create = true
		case i+1 < len(a) && is(a[i], "entriesread"):
			i++
			n, ok := c.integer(a[i])
			if !ok {
				return operation{}, false
			}
			if n < -1 {
				return c.fail("ERR value for ENTRIESREAD must be positive or -1")
			}
			cmd.EntriesRead = n
		default:
			return c.fail(subcommandSyntax(a))
		}
	}
	missing := func(w *resp.Buffer, hasKey bool) {
		if !hasKey {
			w.Error(errGroupNeedsKey)
		} else {
			w.Error(errNoGroupOfKey(key, group))
		}
	}
	bad := ""
	var ok bool
	switch {
	case op == engine.GroupCreate && len(a) > 8, op == engine.GroupSetID && len(a) != 5 && len(a) != 7:
		bad = subcommandSyntax(a)
	case len(a[4]) == 1 && a[4][0] == '$':
		cmd.Last = true
	default:
		if cmd.ID, ok = parseID(a[4], 0, op == engine.GroupSetID); !ok {
			bad = errInvalidID
		}
	}
	if bad != "" {
		of := group
		if op == engine.GroupCreate {
			of = ""
			if cmd.Create {
				missing = func(w *resp.Buffer, _ bool) { w.Error(bad) }
			}
		}
		return unlessMissing(key, of, bad, missing), true
	}
	return operation{command: cmd, size: len(key) + len(group) + 40, word: wordGroup(key, group, wordOK)}, true
}

// wordGroup words the absence of key and group for XGROUP, and the rest by word.
func wordGroup(key, group string, word wordFunc) wordFunc {
	return func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
		switch r.Code {
		case errs.TopicNotFound:
			w.Error(errGroupNeedsKey)
		case errs.GroupNotFound:
			w.Error(errNoGroupOfKey(key, group))
		default:
			word(w, r, a)
		}
	}
}

func buildXGroup(op engine.GroupOp) func(c *conn, a [][]byte) (operation, bool) {
	return func(_ *conn, a [][]byte) (operation, bool) {
		cmd := &engine.StreamGroup{Op: op, Key: string(a[2]), Group: string(a[3]), EntriesRead: -1}
		size := len(cmd.Key) + len(cmd.Group) + 40
		if len(a) > 4 {
			cmd.Consumer = string(a[4])
			size += len(cmd.Consumer)
		}
		word := wordGroup(cmd.Key, cmd.Group, wordCount)
		if op == engine.GroupDestroy {
			word = func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
				if r.Code == errs.GroupNotFound {
					w.Int(0)
					return
				}
				wordGroup(cmd.Key, cmd.Group, wordCount)(w, r, a)
			}
		}
		return operation{command: cmd, size: size, word: word}, true
	}
}

// referencePolicy reads KEEPREF, DELREF or ACKED at a[i] if it stands there.
func referencePolicy(a [][]byte, i int) (engine.RefPolicy, int) {
	if i < len(a) {
		switch {
		case is(a[i], "keepref"):
			return engine.KeepRef, i + 1
		case is(a[i], "delref"):
			return engine.DelRef, i + 1
		case is(a[i], "acked"):
			return engine.Acked, i + 1
		}
	}
	return engine.KeepRef, i
}

// idsBlock reads IDS n id … from a[i] on, which must be all that is left unless rest is wanted.
func (c *conn) idsBlock(a [][]byte, i int, rest bool) (ids []engine.StreamID, next int, ok bool) {
	if i+1 >= len(a) || !is(a[i], "ids") {
		c.w.Error(errSyntax)
		return nil, 0, false
	}
	n, ok := resp.ParseInt(a[i+1])
	switch {
	case !ok || n < 1:
		c.w.Error("ERR Number of IDs must be a positive integer")
		return nil, 0, false
	case n > int64(len(a)-i-2), n < int64(len(a)-i-2) && !rest:
		c.w.Error("ERR The `numids` parameter must match the number of arguments")
		return nil, 0, false
	}
	next = i + 2 + int(n)
	ids, ok = parseIDs(a[i+2 : next])
	if !ok {
		c.w.Error(errInvalidID)
	}
	return ids, next, ok
}

// wordStatuses words XDELEX and XACKDEL: without the key or group no entry was found.
func wordStatuses(n int) wordFunc {
	return func(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
		switch {
		case r.Code == errs.TopicNotFound, r.Code == errs.GroupNotFound, r.Code == errs.OK && r.Stream == nil:
			w.Array(n)
			for range n {
				w.Int(int64(engine.StatusNotFound))
			}
		case r.Code != errs.OK:
			w.Error(refusalText(r.Code))
		default:
			w.Array(len(r.Stream.Statuses))
			for _, s := range r.Stream.Statuses {
				w.Int(int64(s))
			}
		}
	}
}

func buildXDelEx(c *conn, a [][]byte) (operation, bool) {
	refs, i := referencePolicy(a, 2)
	ids, _, ok := c.idsBlock(a, i, false)
	if !ok {
		return operation{}, false
	}
	return operation{command: &engine.StreamDelete{Key: string(a[1]), IDs: ids, Each: true, Refs: refs}, word: wordStatuses(len(ids)), size: len(a[1]) + 20*len(ids)}, true
}

func buildXAckDel(c *conn, a [][]byte) (operation, bool) {
	refs, i := referencePolicy(a, 3)
	ids, _, ok := c.idsBlock(a, i, false)
	if !ok {
		return operation{}, false
	}
	return operation{command: &engine.StreamAck{Key: string(a[1]), Group: string(a[2]), IDs: ids, Delete: true, Refs: refs}, word: wordStatuses(len(ids)),
		size: len(a[1]) + len(a[2]) + 20*len(ids)}, true
}

func buildXNack(c *conn, a [][]byte) (operation, bool) {
	key, group := string(a[1]), string(a[2])
	cmd := &engine.StreamNack{Key: key, Group: group, RetryCount: -1}
	switch lower(a[3]) {
	case "silent":
		cmd.Mode = engine.NackSilent
	case "fail":
		cmd.Mode = engine.NackFail
	case "fatal":
		cmd.Mode = engine.NackFatal
	default:
		return c.fail(errSyntax)
	}
	ids, i, ok := c.idsBlock(a, 4, true)
	if !ok {
		return operation{}, false
	}
	cmd.IDs = ids
	for ; i < len(a); i++ {
		switch {
		case is(a[i], "force"):
			cmd.Force = true
		case i+1 < len(a) && is(a[i], "retrycount"):
			i++
			if cmd.RetryCount, ok = c.integer(a[i]); !ok {
				return operation{}, false
			}
			if cmd.RetryCount < 0 {
				return c.fail("ERR RETRYCOUNT must be >= 0")
			}
		default:
			return c.fail(errSyntax)
		}
	}
	return operation{command: cmd, size: len(key) + len(group) + 20*len(ids), word: func(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
		if !noGroup(w, r, key, group) {
			w.Int(r.Count)
		}
	}}, true
}

func buildXInfoStream(c *conn, a [][]byte) (operation, bool) {
	key := string(a[2])
	sq := &engine.StreamQuery{}
	if len(a) > 3 {
		noKey := func(w *resp.Buffer, _ bool) { w.Error(errNoKey) }
		if len(a) != 4 && len(a) != 6 || !is(a[3], "full") || len(a) == 6 && !is(a[4], "count") {
			return unlessMissing(key, "", subcommandSyntax(a), noKey), true
		}
		sq.Full, sq.Count = true, 10
		if len(a) == 6 {
			n, ok := resp.ParseInt(a[5])
			if !ok {
				return unlessMissing(key, "", errNotInteger, noKey), true
			}
			if n >= 0 {
				sq.Count = uint64(n)
			}
		}
	}
	return operation{query: &engine.Query{Kind: engine.QueryStreamInfo, Topic: key, Stream: sq}, block: noBlock,
		word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
			if r.Code != errs.OK {
				w.Error(refusalText(r.Code))
				return
			}
			writeStreamInfo(w, a.Stream.Info, sq.Full)
		}}, true
}

func writeStreamInfo(w *resp.Buffer, s *engine.StreamInfo, full bool) {
	n := 10
	if full {
		n = 9
	}
	w.Map(n)
	w.String("length")
	w.Int(int64(s.Length))
	w.String("radix-tree-keys")
	w.Int(int64(s.RadixKeys))
	w.String("radix-tree-nodes")
	w.Int(int64(s.RadixNodes))
	w.String("last-generated-id")
	writeID(w, s.Last)
	w.String("max-deleted-entry-id")
	writeID(w, s.MaxDeleted)
	w.String("entries-added")
	w.Int(int64(s.EntriesAdded))
	w.String("recorded-first-entry-id")
	writeID(w, s.FirstID)
	if !full {
		w.String("groups")
		w.Int(int64(s.GroupCount))
		for _, e := range []struct {
			name  string
			entry *engine.StreamEntry
		}{{"first-entry", s.First}, {"last-entry", s.Final}} {
			w.String(e.name)
			if e.entry == nil {
				w.Null()
			} else {
				writeEntry(w, e.entry, false)
			}
		}
		return
	}
	w.String("entries")
	w.Array(len(s.Entries))
	for i := range s.Entries {
		writeEntry(w, &s.Entries[i], false)
	}
	w.String("groups")
	w.Array(len(s.Groups))
	for i := range s.Groups {
		g := &s.Groups[i]
		w.Map(7)
		w.String("name")
		w.String(g.Name)
		w.String("last-delivered-id")
		writeID(w, g.LastDelivered)
		w.String("entries-read")
		writeUnknown(w, g.EntriesRead)
		w.String("lag")
		writeUnknown(w, g.Lag)
		w.String("pel-count")
		w.Int(int64(g.Pending))
		w.String("pending")
		w.Array(len(g.Entries))
		for k := range g.Entries {
			e := &g.Entries[k]
			w.Array(4)
			writeID(w, e.ID)
			w.String(e.Consumer)
			w.Int(e.DeliveredAt)
			w.Int(int64(e.Count))
		}
		w.String("consumers")
		w.Array(len(g.Consumers))
		for k := range g.Consumers {
			writeFullConsumer(w, &g.Consumers[k])
		}
	}
}

func writeFullConsumer(w *resp.Buffer, k *engine.ConsumerInfo) {
	w.Map(5)
	w.String("name")
	w.String(k.Name)
	w.String("seen-time")
	w.Int(k.SeenAt)
	w.String("active-time")
	w.Int(max(k.ActiveAt, -1))
	w.String("pel-count")
	w.Int(int64(k.Pending))
	w.String("pending")
	w.Array(len(k.Entries))
	for i := range k.Entries {
		e := &k.Entries[i]
		w.Array(3)
		writeID(w, e.ID)
		w.Int(e.DeliveredAt)
		w.Int(int64(e.Count))
	}
}

// writeUnknown writes a number that may be unknown.
func writeUnknown(w *resp.Buffer, n int64) {
	if n < 0 {
		w.Null()
		return
	}
	w.Int(n)
}

func buildXInfoGroups(_ *conn, a [][]byte) (operation, bool) {
	return operation{query: &engine.Query{Kind: engine.QueryStreamGroups, Topic: string(a[2]), Stream: &engine.StreamQuery{}}, block: noBlock,
		word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
			if r.Code != errs.OK {
				w.Error(refusalText(r.Code))
				return
			}
			groups := a.Stream.Info.Groups
			w.Array(len(groups))
			for i := range groups {
				g := &groups[i]
				w.Map(6)
				w.String("name")
				w.String(g.Name)
				w.String("consumers")
				w.Int(int64(g.ConsumerCount))
				w.String("pending")
				w.Int(int64(g.Pending))
				w.String("last-delivered-id")
				writeID(w, g.LastDelivered)
				w.String("entries-read")
				writeUnknown(w, g.EntriesRead)
				w.String("lag")
				writeUnknown(w, g.Lag)
			}
		}}, true
}

func buildXInfoConsumers(_ *conn, a [][]byte) (operation, bool) {
	key, group := string(a[2]), string(a[3])
	return operation{query: &engine.Query{Kind: engine.QueryStreamConsumers, Topic: key, Group: group, Stream: &engine.StreamQuery{}}, block: noBlock,
		word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
			switch {
			case r.Code == errs.GroupNotFound:
				w.Error(errNoGroupOfKey(key, group))
				return
			case r.Code != errs.OK:
				w.Error(refusalText(r.Code))
				return
			}
			consumers := a.Stream.Info.Groups[0].Consumers
			w.Array(len(consumers))
			for i := range consumers {
				k := &consumers[i]
				w.Map(4)
				w.String("name")
				w.String(k.Name)
				w.String("pending")
				w.Int(int64(k.Pending))
				w.String("idle")
				w.Int(k.Idle)
				w.String("inactive")
				w.Int(max(k.Inactive, -1))
			}
		}}, true
}
