package compat

import (
	"bytes"
	"time"

	"tercet.dev/tercet/compat/resp"
	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// What goes beyond Valkey: the TERCET commands, and the options of XADD that have no counterpart there. All of it is off
// unless it is asked for, and all durations are whole seconds.

// tercetHelp lists what goes beyond Valkey.
var tercetHelp = []string{
	"GETGROUP <key> <group>", "    Return the settings of a group and how many entries it has parked.",
	"SETGROUP <key> <group> <setting> <value> [<setting> <value> ...]", "    Change settings of a group; those not named stay. 0 turns a setting off. Settings are:",
	"    * PENDING <seconds>", "      Entries that were not acknowledged within this time are given out again by XREADGROUP >, after new ones.",
	"    * MAXDELIVERIES <n>", "      After n deliveries an entry is given up: it is no longer pending, and dropped unless PARK is set.",
	"    * PARK YES|NO", "      Keep what is given up, for TERCET PARKED, REDRIVE and DROP.",
	"    * PARKEDRETENTION <seconds>", "      Keep parked entries this long at least, also beyond their retention.",
	"    * INITIALDELAY <seconds>", "      Keep each entry from the group until it is that old.",
	"    * PAUSED YES|NO", "      Give the group nothing.",
	"GETSTREAM <key>", "    Return the settings of a stream.",
	"SETSTREAM <key> <setting> <value> [<setting> <value> ...]", "    Change settings of a stream; those not named stay. 0 turns a setting off. Settings are:",
	"    * RETENTION <seconds>", "      Entries that name no retention of their own vanish after this time.",
	"    * RETENTIONMAX <seconds>", "      No entry stays longer than this.",
	"    * MAXENTRIES <n>", "      Refuse entries while the stream holds n.",
	"    * PAUSED YES|NO", "      Give its groups nothing.",
	"PARKED <key> <group> [FROM <cursor>] [COUNT <n>]", "    List parked entries: id, fields, deliveries, milliseconds since it was parked, last error.",
	"REDRIVE <key> <group> *|<id> [<id> ...]", "    Make parked entries deliverable again, at most 1000 at a time. Return their number.",
	"DROP <key> <group> *|<id> [<id> ...]", "    Acknowledge parked entries, at most 1000 at a time. Return their number.",
	"CANCEL <key> <message-id>", "    Drop an entry that was added with DELAY and is not in the stream yet. Return 1 if it was there.",
	"Beyond Valkey, in its own commands:",
	"XADD <key> IDMP <producer> <id> * ...", "    Add once: a repetition with the same producer and id answers the first entry's ID.",
	"XADD <key> IDMPAUTO <producer> * ...", "    The same, with an id made of the fields.",
	"XADD <key> DELAY <seconds> * ...", "    Add later. The reply is a message id, since the entry has a stream ID only once it is there; with IDMP a",
	"    repetition answers that message id, or the stream ID once there is one.",
	"XADD <key> RETENTION <seconds> ...", "    The entry vanishes after this time.",
	"XADD, XTRIM ... KEEPREF|DELREF|ACKED", "    Trim with regard to groups.",
	"XREADGROUP ... CLAIM <min-idle-ms> ...", "    Take over idle pending entries together with the new ones.",
	"XREAD, XREADGROUP ... MAXCOUNT <n> MAXSIZE <bytes>", "    Bound the reply over all streams.",
	"XNACK <key> <group> SILENT|FAIL|FATAL IDS <n> <id> ... [RETRYCOUNT <n>] [FORCE]", "    Give entries back to the group at once.",
	"XACKDEL, XDELEX [KEEPREF|DELREF|ACKED] IDS <n> <id> ...", "    Acknowledge and delete, delete with regard to groups.",
	"CLIENT CAPA stale", "    With READONLY and RESP3: replies from a node that does not lead carry the attribute stale.",
}

// setting is one name and value of SETGROUP or SETSTREAM.
type setting struct {
	name string
	mask engine.SettingMask
	// most bounds a number; a setting without one is YES or NO.
	most int64
	// put puts the value into one of the two; yes or no is 1 or 0.
	put func(g *engine.GroupSettings, t *engine.TopicSettings, n int64)
}

func seconds(n int64) time.Duration { return time.Duration(n) * time.Second }

func secondsOf(d time.Duration) int64 { return int64(d / time.Second) }

var groupSettings = []setting{
	{"pending", engine.OnlyVisibility, secondsOf(limits.VisibilityMax), func(g *engine.GroupSettings, _ *engine.TopicSettings, n int64) { g.Visibility = seconds(n) }},
	{"maxdeliveries", engine.OnlyMaxDeliveries, 1<<31 - 1, func(g *engine.GroupSettings, _ *engine.TopicSettings, n int64) { g.MaxDeliveries = uint32(n) }},
	{"park", engine.OnlyPark, 0, func(g *engine.GroupSettings, _ *engine.TopicSettings, n int64) { g.Park = n == 1 }},
	{"parkedretention", engine.OnlyParkedRetention, secondsOf(limits.ParkedRetentionMax), func(g *engine.GroupSettings, _ *engine.TopicSettings, n int64) { g.ParkedRetention = seconds(n) }},
	{"initialdelay", engine.OnlyInitialDelay, secondsOf(limits.DelayMax), func(g *engine.GroupSettings, _ *engine.TopicSettings, n int64) { g.InitialDelay = seconds(n) }},
	{"paused", engine.OnlyPaused, 0, func(g *engine.GroupSettings, _ *engine.TopicSettings, n int64) { g.Paused = n == 1 }},
}

// retentionMax bounds the retentions of entries, which may be longer here than on the queue protocol.
const retentionMax = 10 * 365 * 24 * 3600

var streamSettings = []setting{
	{"retention", engine.OnlyRetentionDefault, retentionMax, func(_ *engine.GroupSettings, t *engine.TopicSettings, n int64) { t.RetentionDefault = seconds(n) }},
	{"retentionmax", engine.OnlyRetentionMax, retentionMax, func(_ *engine.GroupSettings, t *engine.TopicSettings, n int64) { t.RetentionMax = seconds(n) }},
	{"maxentries", engine.OnlyDepthMax, 1 << 53, func(_ *engine.GroupSettings, t *engine.TopicSettings, n int64) { t.DepthMax = uint64(n) }},
	{"paused", engine.OnlyPaused, 0, func(_ *engine.GroupSettings, t *engine.TopicSettings, n int64) { t.Paused = n == 1 }},
}

// parseSettings reads names and values in turn. It writes the error and reports false when one is wrong.
func (c *conn) parseSettings(a [][]byte, known []setting, g *engine.GroupSettings, t *engine.TopicSettings) (engine.SettingMask, bool) {
	var only engine.SettingMask
	for i := 0; i < len(a); i += 2 {
		var s *setting
		for k := range known {
			if is(a[i], known[k].name) {
				s = &known[k]
			}
		}
		if s == nil {
			c.w.Error("ERR unknown setting '" + clip(a[i], 128) + "'. Try TERCET HELP.")
			return 0, false
		}
		if i+1 == len(a) {
			c.w.Error(errSyntax)
			return 0, false
		}
		var n int64
		var ok bool
		switch v := a[i+1]; {
		case s.most == 0 && is(v, "yes"):
			n, ok = 1, true
		case s.most == 0:
			ok = is(v, "no")
		default:
			n, ok = resp.ParseInt(v)
			ok = ok && n >= 0 && n <= s.most
		}
		if !ok {
			values := "YES or NO"
			if s.most > 0 {
				values = "a whole number from 0 to " + itoa(s.most)
			}
			c.w.Error("ERR the value of '" + s.name + "' must be " + values)
			return 0, false
		}
		s.put(g, t, n)
		only |= s.mask
	}
	return only, true
}

func buildSetGroup(c *conn, a [][]byte) (operation, bool) {
	key, group := string(a[2]), string(a[3])
	g := &engine.GroupSettings{}
	only, ok := c.parseSettings(a[4:], groupSettings, g, nil)
	if !ok {
		return operation{}, false
	}
	return operation{command: &engine.GroupSet{Topic: key, Group: group, Settings: g, Only: only}, size: len(key) + len(group) + 64,
		word: func(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
			if !noGroup(w, r, key, group) {
				w.OK()
			}
		}}, true
}

func buildGetGroup(_ *conn, a [][]byte) (operation, bool) {
	key, group := string(a[2]), string(a[3])
	return operation{query: &engine.Query{Kind: engine.QueryGroup, Topic: key, Group: group}, block: noBlock,
		word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
			if noGroup(w, r, key, group) {
				return
			}
			if len(a.Groups) != 1 {
				w.Error(errNoGroup(key, group))
				return
			}
			g := &a.Groups[0]
			w.Map(7)
			for _, f := range []struct {
				name string
				n    int64
			}{
				{"pending", secondsOf(g.Settings.Visibility)}, {"maxdeliveries", int64(g.Settings.MaxDeliveries)}, {"park", b01(g.Settings.Park)},
				{"parkedretention", secondsOf(g.Settings.ParkedRetention)}, {"initialdelay", secondsOf(g.Settings.InitialDelay)}, {"paused", b01(g.Settings.Paused)},
			} {
				w.String(f.name)
				writeSetting(w, f.name, f.n)
			}
			w.String("parked")
			w.Int(int64(g.Parked))
		}}, true
}

func b01(v bool) int64 {
	if v {
		return 1
	}
	return 0
}

// writeSetting writes a setting as it is given: a number, or yes or no.
func writeSetting(w *resp.Buffer, name string, n int64) {
	switch {
	case name != "park" && name != "paused":
		w.Int(n)
	case n != 0:
		w.String("yes")
	default:
		w.String("no")
	}
}

func buildSetStream(c *conn, a [][]byte) (operation, bool) {
	key := string(a[2])
	t := &engine.TopicSettings{}
	only, ok := c.parseSettings(a[3:], streamSettings, nil, t)
	if !ok {
		return operation{}, false
	}
	return operation{command: &engine.TopicSet{Topic: key, Settings: t, Only: only}, size: len(key) + 64, word: wordOK}, true
}

func buildGetStream(_ *conn, a [][]byte) (operation, bool) {
	return operation{query: &engine.Query{Kind: engine.QueryTopic, Topic: string(a[2])}, block: noBlock,
		word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
			switch {
			case r.Code != errs.OK:
				w.Error(refusalText(r.Code))
				return
			case len(a.Topics) != 1:
				w.Error(errNoKey)
				return
			}
			t := &a.Topics[0]
			w.Map(5)
			for _, f := range []struct {
				name string
				n    int64
			}{
				{"retention", secondsOf(t.Settings.RetentionDefault)}, {"retentionmax", secondsOf(t.Settings.RetentionMax)},
				{"maxentries", int64(t.Settings.DepthMax)}, {"paused", b01(t.Settings.Paused)}, {"delayed", int64(t.Delayed)},
			} {
				w.String(f.name)
				writeSetting(w, f.name, f.n)
			}
		}}, true
}

func buildParked(c *conn, a [][]byte) (operation, bool) {
	key, group := string(a[2]), string(a[3])
	sq := &engine.StreamQuery{Count: 10}
	for i := 4; i < len(a); i += 2 {
		if i+1 == len(a) {
			return c.fail(errSyntax)
		}
		n, ok := c.integer(a[i+1])
		if !ok {
			return operation{}, false
		}
		switch {
		case is(a[i], "from") && n >= 0:
			sq.Cursor = uint64(n)
		case is(a[i], "count") && n > 0:
			sq.Count = uint64(min(n, limits.ParkedPerCommandMax))
		default:
			return c.fail(errSyntax)
		}
	}
	return operation{query: &engine.Query{Kind: engine.QueryStreamParked, Topic: key, Group: group, Stream: sq}, block: noBlock,
		word: func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
			if noGroup(w, r, key, group) {
				return
			}
			w.Array(2)
			w.Uint(a.Stream.Next)
			parked := a.Stream.Parked
			w.Array(len(parked))
			for i := range parked {
				p := &parked[i]
				w.Array(5)
				writeID(w, p.Entry.ID)
				w.Array(len(p.Entry.Fields))
				for _, f := range p.Entry.Fields {
					w.Bulk(f)
				}
				w.Int(int64(p.Entry.Count))
				w.Int(p.Entry.Idle)
				if p.Error == "" {
					w.Null()
				} else {
					w.String(p.Error)
				}
			}
		}}, true
}

// buildParkedOp builds REDRIVE and DROP.
func buildParkedOp(op engine.ParkedOp) buildFunc {
	return func(c *conn, a [][]byte) (operation, bool) {
		key, group := string(a[2]), string(a[3])
		cmd := &engine.Parked{Topic: key, Group: group, Op: op, Max: limits.ParkedPerCommandMax}
		if len(a) != 5 || !bytes.Equal(a[4], []byte("*")) {
			ids, ok := parseIDs(a[4:])
			if !ok {
				return c.fail(errInvalidID)
			}
			if len(ids) > limits.ParkedPerCommandMax {
				return c.fail("ERR at most " + itoa(limits.ParkedPerCommandMax) + " IDs at a time")
			}
			cmd.Filter.Streams = ids
		}
		return operation{command: cmd, size: len(key) + len(group) + 20*len(a), word: func(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
			if !noGroup(w, r, key, group) {
				w.Int(r.Count)
			}
		}}, true
	}
}

func buildCancel(c *conn, a [][]byte) (operation, bool) {
	s, text := c.s.sealer()
	if s == nil {
		return c.fail(text)
	}
	id, err := s.ParseMessageID(string(a[3]))
	if err != nil {
		return c.fail("ERR the message id is none that XADD has answered")
	}
	if id.Kind == engine.KindDuplicate {
		id = id.Original()
	}
	return operation{command: &engine.Delayed{Topic: string(a[2]), ID: id, Cancel: true}, size: len(a[2]) + 32,
		word: func(w *resp.Buffer, r *engine.Result, _ *engine.Answer) {
			switch r.Code {
			case errs.OK:
				w.Int(1)
			case errs.MessageNotFound, errs.Conflict, errs.TopicNotFound:
				w.Int(0)
			default:
				w.Error(refusalText(r.Code))
			}
		}}, true
}

// sealed is a Sealer and the secret it was made with.
type sealed struct {
	secret []byte
	sealer *engine.Sealer
}

// sealer returns what turns message IDs into the texts that the queue protocol has for them too, or why there is none.
func (s *Server) sealer() (*engine.Sealer, string) {
	secret := s.backend.Secret()
	if k := s.sealed.Load(); k != nil && bytes.Equal(k.secret, secret) {
		return k.sealer, ""
	}
	if len(secret) == 0 {
		return nil, "CLUSTERDOWN The cluster is down: this node has not met its cluster yet, nothing was done"
	}
	k := &sealed{secret: bytes.Clone(secret), sealer: engine.NewSealer(secret)}
	s.sealed.Store(k)
	return k.sealer, ""
}

// wordAddOnce words an XADD whose entry may have no stream ID, not yet or not any more: it is called by its message ID then.
func wordAddOnce(s *engine.Sealer) wordFunc {
	return func(w *resp.Buffer, r *engine.Result, a *engine.Answer) {
		p := &r.Published
		if r.Code != errs.OK || p.Stream != (engine.StreamID{}) || p.Count != 1 {
			wordAdd(w, r, a)
			return
		}
		id := p.ID(0)
		if id.Kind == engine.KindDuplicate {
			id = id.Original()
		}
		w.String(s.MessageID(id))
	}
}
