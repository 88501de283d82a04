package engine

import (
	"encoding/binary"
	"slices"
)

// Encodings of the stream commands, their results, queries and answers: see DESIGN.md, section Formats.

// Kind implements Command.
func (c *StreamAdd) Kind() Kind { return CmdStreamAdd }

// Kind implements Command.
func (c *StreamDelete) Kind() Kind { return CmdStreamDelete }

// Kind implements Command.
func (c *StreamTrim) Kind() Kind { return CmdStreamTrim }

// Kind implements Command.
func (c *StreamSetID) Kind() Kind { return CmdStreamSetID }

// Kind implements Command.
func (c *StreamGroup) Kind() Kind { return CmdStreamGroup }

// Kind implements Command.
func (c *StreamReadGroup) Kind() Kind { return CmdStreamReadGroup }

// Kind implements Command.
func (c *StreamAck) Kind() Kind { return CmdStreamAck }

// Kind implements Command.
func (c *StreamClaim) Kind() Kind { return CmdStreamClaim }

// Kind implements Command.
func (c *StreamAutoClaim) Kind() Kind { return CmdStreamAutoClaim }

// Kind implements Command.
func (c *StreamNack) Kind() Kind { return CmdStreamNack }

// Kind implements Command.
func (c *KeyDelete) Kind() Kind { return CmdKeyDelete }

// Kind implements Command.
func (c *KeyRename) Kind() Kind { return CmdKeyRename }

// Kind implements Command.
func (c *KeyCopy) Kind() Kind { return CmdKeyCopy }

// Kind implements Command.
func (c *KeyExpire) Kind() Kind { return CmdKeyExpire }

// Kind implements Command.
func (c *StringSet) Kind() Kind { return CmdStringSet }

// Kind implements Command.
func (c *StringGetDel) Kind() Kind { return CmdStringGetDel }

// Kind implements Command.
func (c *Flush) Kind() Kind { return CmdFlush }

// Kind implements Command.
func (c *Exec) Kind() Kind { return CmdExec }

func fieldsLen(fields [][]byte) int {
	n := uvarintLen(uint64(len(fields)))
	for _, f := range fields {
		n += uvarintLen(uint64(len(f))) + len(f)
	}
	return n
}

// appendFields appends the body of a record of fields: their number and each with its length.
func appendFields(b []byte, fields [][]byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(fields)))
	for _, f := range fields {
		b = appendBytes(b, f)
	}
	return b
}

// checkFields reports whether body is a list of names and values in turn.
func checkFields(body []byte) bool {
	r := reader{b: body}
	n := r.count(1)
	for range n {
		r.bytes()
	}
	return r.done() && n%2 == 0
}

// decodeFields takes a checked body apart; the fields point into it.
func decodeFields(body []byte) [][]byte {
	r := reader{b: body}
	out := make([][]byte, r.count(1))
	for i := range out {
		out[i] = r.bytes()
	}
	return out
}

func appendStreamIDs(b []byte, ids []StreamID) []byte {
	b = binary.AppendUvarint(b, uint64(len(ids)))
	for _, id := range ids {
		b = id.append(b)
	}
	return b
}

func (r *reader) streamIDs() []StreamID {
	n := r.count(2)
	if n == 0 {
		return nil
	}
	out := make([]StreamID, n)
	for i := range out {
		out[i] = r.streamID()
	}
	return out
}

func bit(on bool, flag byte) byte {
	if on {
		return flag
	}
	return 0
}

func (t *Trim) append(b []byte) []byte {
	b = append(b, byte(t.By)|bit(t.Approx, 4))
	if t.By == TrimNone {
		return b
	}
	b = append(b, byte(t.Refs))
	b = binary.AppendUvarint(b, t.MaxLen)
	b = t.MinID.append(b)
	return binary.AppendUvarint(b, t.Limit)
}

func (r *reader) trim() Trim {
	f := r.flags(3)
	t := Trim{By: TrimBy(f & 3), Approx: f&4 != 0}
	if t.By == TrimNone {
		return t
	}
	t.Refs, t.MaxLen, t.MinID, t.Limit = r.refs(), r.uvarint(), r.streamID(), r.uvarint()
	if t.By > TrimMinID {
		r.fail()
	}
	return t
}

func (r *reader) refs() RefPolicy {
	p := RefPolicy(r.u8())
	if p > Acked {
		r.fail()
	}
	return p
}

// AppendTo implements Command.
func (c *StreamAdd) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdStreamAdd), commandVersion)
	b = appendBytes(b, c.Key)
	b = append(b, byte(c.By)|bit(c.NoCreate, 4))
	b = c.ID.append(b)
	b = c.Trim.append(b)
	m := NewMessage{Retention: c.Retention, Delay: c.Delay, Key: c.Token, Fields: c.Fields}
	if m.Fields == nil {
		m.Fields = [][]byte{}
	}
	return m.appendRecord(b)
}

// addView is a StreamAdd as apply reads it; the record is what is left of the command.
type addView struct {
	key      []byte
	by       AddID
	noCreate bool
	id       StreamID
	trim     Trim
}

func (v *addView) parse(r *reader) {
	v.key = r.bytes()
	f := r.flags(3)
	v.by, v.noCreate = AddID(f&3), f&4 != 0
	v.id = r.streamID()
	v.trim = r.trim()
	if v.by > AddExplicit {
		r.fail()
	}
}

// AppendTo implements Command.
func (c *StreamDelete) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdStreamDelete), commandVersion)
	b = appendBytes(b, c.Key)
	b = append(b, bit(c.Each, 1), byte(c.Refs))
	return appendStreamIDs(b, c.IDs)
}

// AppendTo implements Command.
func (c *StreamTrim) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdStreamTrim), commandVersion)
	b = appendBytes(b, c.Key)
	return c.Trim.append(b)
}

// AppendTo implements Command.
func (c *StreamSetID) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdStreamSetID), commandVersion)
	b = appendBytes(b, c.Key)
	b = c.ID.append(b)
	b = appendVarint(b, c.EntriesAdded)
	return c.MaxDeleted.append(b)
}

// AppendTo implements Command.
func (c *StreamGroup) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdStreamGroup), commandVersion, byte(c.Op))
	b = appendBytes(b, c.Key)
	b = appendBytes(b, c.Group)
	b = appendBytes(b, c.Consumer)
	b = append(b, bit(c.Last, 1)|bit(c.Create, 2))
	b = c.ID.append(b)
	return appendVarint(b, c.EntriesRead)
}

// AppendTo implements Command.
func (c *StreamReadGroup) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdStreamReadGroup), commandVersion)
	b = appendBytes(b, c.Group)
	b = appendBytes(b, c.Consumer)
	b = appendPositions(b, c.Streams)
	b = binary.AppendUvarint(b, c.Count)
	b = binary.AppendUvarint(b, c.Total)
	b = binary.AppendUvarint(b, c.Size)
	b = appendVarint(b, c.ClaimIdle)
	return append(b, bit(c.NoAck, 1)|bit(c.Park, 2)|bit(c.Claim, 4))
}

func appendPositions(b []byte, list []StreamPosition) []byte {
	b = binary.AppendUvarint(b, uint64(len(list)))
	for i := range list {
		p := &list[i]
		b = appendBytes(b, p.Key)
		b = append(b, bit(p.New, 1)|bit(p.Tail, 2))
		b = p.ID.append(b)
	}
	return b
}

func (r *reader) positions() []StreamPosition {
	n := r.count(4)
	if n == 0 {
		return nil
	}
	out := make([]StreamPosition, n)
	for i := range out {
		out[i].Key = r.str()
		f := r.flags(2)
		out[i].New, out[i].Tail = f&1 != 0, f&2 != 0
		out[i].ID = r.streamID()
	}
	return out
}

// AppendTo implements Command.
func (c *StreamAck) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdStreamAck), commandVersion)
	b = appendBytes(b, c.Key)
	b = appendBytes(b, c.Group)
	b = append(b, bit(c.Delete, 1), byte(c.Refs))
	return appendStreamIDs(b, c.IDs)
}

// AppendTo implements Command.
func (c *StreamClaim) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdStreamClaim), commandVersion)
	b = appendBytes(b, c.Key)
	b = appendBytes(b, c.Group)
	b = appendBytes(b, c.Consumer)
	b = appendVarint(b, c.MinIdle)
	b = appendStreamIDs(b, c.IDs)
	b = appendVarint(b, c.Idle)
	b = appendVarint(b, c.Time)
	b = appendVarint(b, c.RetryCount)
	b = append(b, bit(c.Force, 1)|bit(c.JustID, 2))
	return c.LastID.append(b)
}

// AppendTo implements Command.
func (c *StreamAutoClaim) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdStreamAutoClaim), commandVersion)
	b = appendBytes(b, c.Key)
	b = appendBytes(b, c.Group)
	b = appendBytes(b, c.Consumer)
	b = appendVarint(b, c.MinIdle)
	b = c.Start.append(b)
	b = binary.AppendUvarint(b, c.Count)
	return append(b, bit(c.JustID, 1))
}

// AppendTo implements Command.
func (c *StreamNack) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdStreamNack), commandVersion)
	b = appendBytes(b, c.Key)
	b = appendBytes(b, c.Group)
	b = append(b, byte(c.Mode), bit(c.Force, 1))
	b = appendVarint(b, c.RetryCount)
	return appendStreamIDs(b, c.IDs)
}

// AppendTo implements Command.
func (c *KeyDelete) AppendTo(b []byte) []byte {
	return appendStrings(append(b, byte(CmdKeyDelete), commandVersion), c.Keys)
}

// AppendTo implements Command.
func (c *KeyRename) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdKeyRename), commandVersion)
	b = appendBytes(b, c.From)
	b = appendBytes(b, c.To)
	return appendBool(b, c.KeepTarget)
}

// AppendTo implements Command.
func (c *KeyCopy) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdKeyCopy), commandVersion)
	b = appendBytes(b, c.From)
	b = appendBytes(b, c.To)
	return appendBool(b, c.Replace)
}

func (d *Deadline) append(b []byte) []byte {
	return appendVarint(append(b, bit(d.Set, 1)|bit(d.Absolute, 2)), d.Ms)
}

func (r *reader) deadline() Deadline {
	f := r.flags(2)
	return Deadline{Set: f&1 != 0, Absolute: f&2 != 0, Ms: r.varint()}
}

func (r *reader) when(last When) When {
	w := When(r.u8())
	if w > last {
		r.fail()
	}
	return w
}

// AppendTo implements Command.
func (c *KeyExpire) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdKeyExpire), commandVersion)
	b = appendBytes(b, c.Key)
	return append(c.By.append(b), byte(c.When))
}

// AppendTo implements Command.
func (c *StringSet) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdStringSet), commandVersion)
	b = appendBytes(b, c.Key)
	b = append(c.By.append(b), bit(c.KeepTTL, 1)|bit(c.Get, 2), byte(c.When))
	return appendBytes(b, c.Value)
}

// AppendTo implements Command.
func (c *StringGetDel) AppendTo(b []byte) []byte {
	return appendBytes(append(b, byte(CmdStringGetDel), commandVersion), c.Key)
}

// AppendTo implements Command.
func (c *Flush) AppendTo(b []byte) []byte { return append(b, byte(CmdFlush), commandVersion) }

// AppendTo implements Command.
func (c *Exec) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdExec), commandVersion)
	b = binary.AppendUvarint(b, uint64(len(c.Watches)))
	for i := range c.Watches {
		b = appendBytes(b, c.Watches[i].Key)
		b = binary.AppendUvarint(b, c.Watches[i].Version)
	}
	b = binary.AppendUvarint(b, uint64(len(c.Ops)))
	var op []byte
	for i := range c.Ops {
		o := &c.Ops[i]
		if o.Query != nil {
			b = append(b, 1)
			op = AppendQuery(op[:0], o.Query)
		} else {
			b = append(b, 0)
			op = o.Command.AppendTo(op[:0])
		}
		b = appendBytes(b, op)
	}
	return b
}

// execItem is one command of an encoded transaction; at is where it begins, counted back from the end of the Exec.
type execItem struct {
	read  bool
	bytes []byte
	at    int
}

// execWatches leaves the reader at the first of the ops.
func (r *reader) execWatches() []Watch {
	n := r.count(2)
	var out []Watch
	for range n {
		out = append(out, Watch{Key: r.str(), Version: r.uvarint()})
	}
	return out
}

func (r *reader) execItem() execItem {
	it := execItem{read: r.bool()}
	n := r.uvarint()
	it.at = len(r.b)
	it.bytes = r.take(n)
	return it
}

// execAllows reports whether a command of that kind may be part of a transaction.
func execAllows(k Kind) bool {
	switch k {
	case CmdPublish, CmdTopicSet, CmdGroupSet, CmdParked, CmdDelayed:
		return true
	}
	return k >= cmdStreamFirst && k <= cmdStreamLast && k != CmdExec
}

// decodeStream decodes the body of a stream command.
func decodeStream(k Kind, r *reader) (Command, error) {
	var c Command
	switch k {
	case CmdStreamAdd:
		var v addView
		v.parse(r)
		var rec record
		parseRecord(r, &rec)
		if rec.flags&recordFields == 0 {
			r.fail()
		}
		m := rec.message()
		c = &StreamAdd{Key: string(v.key), By: v.by, ID: v.id, NoCreate: v.noCreate, Trim: v.trim, Token: m.Key, Delay: m.Delay, Retention: m.Retention, Fields: m.Fields}
	case CmdStreamDelete:
		c = &StreamDelete{Key: r.str(), Each: r.bool(), Refs: r.refs(), IDs: r.streamIDs()}
	case CmdStreamTrim:
		c = &StreamTrim{Key: r.str(), Trim: r.trim()}
	case CmdStreamSetID:
		c = &StreamSetID{Key: r.str(), ID: r.streamID(), EntriesAdded: r.varint(), MaxDeleted: r.streamID()}
	case CmdStreamGroup:
		g := &StreamGroup{Op: GroupOp(r.u8()), Key: r.str(), Group: r.str(), Consumer: r.str()}
		f := r.flags(2)
		g.Last, g.Create = f&1 != 0, f&2 != 0
		g.ID, g.EntriesRead = r.streamID(), r.varint()
		if g.Op < GroupCreate || g.Op > GroupDelConsumer {
			r.fail()
		}
		c = g
	case CmdStreamReadGroup:
		g := &StreamReadGroup{Group: r.str(), Consumer: r.str(), Streams: r.positions(), Count: r.uvarint(), Total: r.uvarint(), Size: r.uvarint(), ClaimIdle: r.varint()}
		f := r.flags(3)
		g.NoAck, g.Park, g.Claim = f&1 != 0, f&2 != 0, f&4 != 0
		if len(g.Streams) == 0 || g.Park && !g.parks() {
			r.fail()
		}
		c = g
	case CmdStreamAck:
		c = &StreamAck{Key: r.str(), Group: r.str(), Delete: r.bool(), Refs: r.refs(), IDs: r.streamIDs()}
	case CmdStreamClaim:
		m := &StreamClaim{Key: r.str(), Group: r.str(), Consumer: r.str(), MinIdle: r.varint(), IDs: r.streamIDs(), Idle: r.varint(), Time: r.varint(), RetryCount: r.varint()}
		f := r.flags(2)
		m.Force, m.JustID = f&1 != 0, f&2 != 0
		m.LastID = r.streamID()
		c = m
	case CmdStreamAutoClaim:
		c = &StreamAutoClaim{Key: r.str(), Group: r.str(), Consumer: r.str(), MinIdle: r.varint(), Start: r.streamID(), Count: r.uvarint(), JustID: r.bool()}
	case CmdStreamNack:
		m := &StreamNack{Key: r.str(), Group: r.str(), Mode: NackMode(r.u8()), Force: r.bool(), RetryCount: r.varint(), IDs: r.streamIDs()}
		if m.Mode > NackFatal {
			r.fail()
		}
		c = m
	case CmdKeyDelete:
		c = &KeyDelete{Keys: r.strings()}
	case CmdKeyRename:
		c = &KeyRename{From: r.str(), To: r.str(), KeepTarget: r.bool()}
	case CmdKeyCopy:
		c = &KeyCopy{From: r.str(), To: r.str(), Replace: r.bool()}
	case CmdKeyExpire:
		c = &KeyExpire{Key: r.str(), By: r.deadline(), When: r.when(IfSooner)}
	case CmdStringSet:
		s := &StringSet{Key: r.str(), By: r.deadline()}
		f := r.flags(2)
		s.KeepTTL, s.Get = f&1 != 0, f&2 != 0
		s.When, s.Value = r.when(IfPresent), slices.Clone(r.bytes())
		c = s
	case CmdStringGetDel:
		c = &StringGetDel{Key: r.str()}
	case CmdFlush:
		c = &Flush{}
	case CmdExec:
		x := &Exec{Watches: r.execWatches()}
		for range r.count(2) {
			it := r.execItem()
			if r.bad {
				break
			}
			op, err := it.decode()
			if err != nil {
				return nil, err
			}
			x.Ops = append(x.Ops, op)
		}
		c = x
	}
	if err := r.err(); err != nil {
		return nil, err
	}
	return c, nil
}

func (it *execItem) decode() (ExecOp, error) {
	if it.read {
		q, err := DecodeQuery(it.bytes)
		return ExecOp{Query: &q}, err
	}
	if len(it.bytes) == 0 || !execAllows(Kind(it.bytes[0])) {
		return ExecOp{}, errMalformed
	}
	c, err := DecodeCommand(it.bytes)
	if p, ok := c.(*StreamReadGroup); ok && p.Park {
		return ExecOp{}, errMalformed
	}
	return ExecOp{Command: c}, err
}

// parks reports whether a read can wait in the parking lot: for new entries alone, of no more streams than a node keeps
// an eye on for one read.
func (c *StreamReadGroup) parks() bool {
	if len(c.Streams) == 0 || len(c.Streams) > ParkStreamsMax || c.Claim {
		return false
	}
	for i := range c.Streams {
		if !c.Streams[i].New {
			return false
		}
	}
	return true
}

// others are the streams of a read beside the first, without those that are named twice.
func (c *StreamReadGroup) others() []string {
	var out []string
	for i := range c.Streams[1:] {
		if key := c.Streams[i+1].Key; key != c.Streams[0].Key && !slices.Contains(out, key) {
			out = append(out, key)
		}
	}
	return out
}

// inspectStream is Inspect's part for stream commands.
func inspectStream(k Kind, r *reader, info *CommandInfo) error {
	if k == CmdStreamAdd {
		var v addView
		v.parse(r)
		var rec record
		parseRecord(r, &rec)
		if rec.flags&recordFields == 0 {
			r.fail()
		}
		info.Topic, info.Messages = v.key, 1
		if err := r.err(); err != nil {
			*info = CommandInfo{}
			return err
		}
		return nil
	}
	c, err := decodeStream(k, r)
	if err != nil {
		*info = CommandInfo{}
		return err
	}
	if g, ok := c.(*StreamReadGroup); ok && g.parks() {
		info.Topic, info.Group, info.Consumer = []byte(g.Streams[0].Key), []byte(g.Group), []byte(g.Consumer)
		info.Max, info.Park, info.Others = int(min(g.Count, 1<<20)), g.Park, g.others()
	}
	return nil
}

// Flags of a StreamResult: which parts follow.
const (
	streamReads = 1 << iota
	streamEntries
	streamDeleted
	streamNext
	streamStatuses
	streamValue
	streamExec
	streamFlags = iota
)

func (s *StreamResult) append(b []byte) []byte {
	flags := bit(len(s.Reads) > 0, streamReads) | bit(len(s.Entries) > 0, streamEntries) | bit(len(s.Deleted) > 0, streamDeleted) |
		bit(s.Next != StreamID{}, streamNext) | bit(len(s.Statuses) > 0, streamStatuses) | bit(s.Value != nil, streamValue) | bit(len(s.Exec) > 0, streamExec)
	b = append(b, flags)
	if flags&streamReads != 0 {
		b = appendReads(b, s.Reads)
	}
	if flags&streamEntries != 0 {
		b = appendStreamEntries(b, s.Entries)
	}
	if flags&streamDeleted != 0 {
		b = appendStreamIDs(b, s.Deleted)
	}
	if flags&streamNext != 0 {
		b = s.Next.append(b)
	}
	if flags&streamStatuses != 0 {
		b = binary.AppendUvarint(b, uint64(len(s.Statuses)))
		for _, v := range s.Statuses {
			b = append(b, byte(v))
		}
	}
	if flags&streamValue != 0 {
		b = appendBytes(b, s.Value)
	}
	if flags&streamExec != 0 {
		b = binary.AppendUvarint(b, uint64(len(s.Exec)))
		for i := range s.Exec {
			x := &s.Exec[i]
			b = append(b, bit(x.read, 1)|bit(x.Answer != nil, 2))
			b = appendBytes(b, AppendResult(nil, &x.Result))
			if x.Answer != nil {
				b = appendBytes(b, AppendAnswer(nil, x.Answer))
			}
		}
	}
	return b
}

func (r *reader) streamResult(depth int) *StreamResult {
	flags := r.flags(streamFlags)
	if depth > 0 && flags&streamExec != 0 {
		r.fail()
	}
	s := &StreamResult{}
	if flags&streamReads != 0 {
		s.Reads = r.reads()
	}
	if flags&streamEntries != 0 {
		s.Entries = r.streamEntries()
	}
	if flags&streamDeleted != 0 {
		s.Deleted = r.streamIDs()
	}
	if flags&streamNext != 0 {
		s.Next = r.streamID()
	}
	if flags&streamStatuses != 0 {
		for range r.count(1) {
			s.Statuses = append(s.Statuses, int8(r.u8()))
		}
	}
	if flags&streamValue != 0 {
		s.Value = append([]byte{}, r.bytes()...)
	}
	if flags&streamExec != 0 && !r.bad {
		for range r.count(2) {
			f := r.flags(2)
			in := reader{b: r.bytes(), bad: r.bad}
			x := ExecResult{read: f&1 != 0, Result: in.result(depth + 1)}
			if !in.done() {
				r.fail()
			}
			if f&2 != 0 {
				in := reader{b: r.bytes(), bad: r.bad}
				a := in.answer()
				if !in.done() {
					r.fail()
				}
				x.Answer = &a
			}
			if r.bad {
				return nil
			}
			s.Exec = append(s.Exec, x)
		}
	}
	if r.bad {
		return nil
	}
	return s
}

// bare returns a copy without contents, for the intake; nil stays nil.
func (s *StreamResult) bare() *StreamResult {
	if s == nil {
		return nil
	}
	c := *s
	c.Reads = slices.Clone(s.Reads)
	for i := range c.Reads {
		c.Reads[i].Entries = bareEntries(c.Reads[i].Entries)
	}
	c.Entries = bareEntries(s.Entries)
	c.Exec = slices.Clone(s.Exec)
	for i := range c.Exec {
		c.Exec[i].Answer = nil
		c.Exec[i].Result.Stream = c.Exec[i].Result.Stream.bare()
	}
	return &c
}

func bareEntries(list []StreamEntry) []StreamEntry {
	out := slices.Clone(list)
	for i := range out {
		out[i].Fields, out[i].loaded = nil, false
	}
	return out
}

func appendReads(b []byte, list []StreamRead) []byte {
	b = binary.AppendUvarint(b, uint64(len(list)))
	for i := range list {
		s := &list[i]
		b = appendBytes(b, s.Key)
		b = s.From.append(b)
		b = appendBool(b, s.Cut)
		b = appendStreamEntries(b, s.Entries)
	}
	return b
}

func (r *reader) reads() []StreamRead {
	var out []StreamRead
	for range r.count(5) {
		out = append(out, StreamRead{Key: r.str(), From: r.streamID(), Cut: r.bool(), Entries: r.streamEntries()})
		if r.bad {
			return nil
		}
	}
	return out
}

// Flags of an entry.
const (
	entryDeleted = 1 << iota
	entryClaimed
	entryLoaded
	entryStaged
	entryFlags = iota
)

func appendStreamEntries(b []byte, list []StreamEntry) []byte {
	b = binary.AppendUvarint(b, uint64(len(list)))
	for i := range list {
		s := &list[i]
		b = s.ID.append(b)
		b = append(b, bit(s.Deleted, entryDeleted)|bit(s.Claimed, entryClaimed)|bit(s.loaded, entryLoaded)|bit(s.stagedIndex != 0, entryStaged))
		if s.Claimed {
			b = appendVarint(b, s.Idle)
			b = binary.AppendUvarint(b, s.Count)
		}
		b = binary.AppendUvarint(b, s.topic)
		b = binary.AppendUvarint(b, s.offset)
		if s.stagedIndex != 0 {
			b = binary.AppendUvarint(b, s.stagedIndex)
			b = binary.AppendUvarint(b, uint64(s.stagedPos))
		}
		if s.loaded {
			b = appendFields(b, s.Fields)
		}
	}
	return b
}

func (r *reader) streamEntries() []StreamEntry {
	n := r.count(5)
	if n == 0 {
		return nil
	}
	out := make([]StreamEntry, 0, n)
	for range n {
		s := StreamEntry{ID: r.streamID()}
		f := r.flags(entryFlags)
		s.Deleted, s.Claimed, s.loaded = f&entryDeleted != 0, f&entryClaimed != 0, f&entryLoaded != 0
		if s.Claimed {
			s.Idle, s.Count = r.varint(), r.uvarint()
		}
		s.topic, s.offset = r.uvarint(), r.uvarint()
		if f&entryStaged != 0 {
			s.stagedIndex, s.stagedPos = r.uvarint(), uint32(r.upTo(1<<32-1))
		}
		if s.loaded {
			k := r.count(1)
			if k > 0 {
				s.Fields = make([][]byte, k)
			}
			for i := range s.Fields {
				s.Fields[i] = r.bytes()
			}
		}
		if r.bad {
			return nil
		}
		out = append(out, s)
	}
	return out
}

// append appends a query's part for streams, or that there is none.
func (q *StreamQuery) append(b []byte) []byte {
	if q == nil {
		return append(b, 0)
	}
	b = append(b, 1, bit(q.Reverse, 1)|bit(q.Full, 2))
	b = appendBytes(b, q.Consumer)
	b = q.Start.append(b)
	b = q.End.append(b)
	b = binary.AppendUvarint(b, q.Count)
	b = binary.AppendUvarint(b, q.Total)
	b = binary.AppendUvarint(b, q.Size)
	b = appendVarint(b, q.MinIdle)
	b = appendPositions(b, q.Streams)
	b = appendStrings(b, q.Keys)
	b = binary.AppendUvarint(b, q.Cursor)
	b = appendBytes(b, q.Match)
	return appendBytes(b, q.Type)
}

func (r *reader) streamQuery() *StreamQuery {
	if !r.bool() {
		return nil
	}
	f := r.flags(2)
	return &StreamQuery{Reverse: f&1 != 0, Full: f&2 != 0, Consumer: r.str(), Start: r.streamID(), End: r.streamID(), Count: r.uvarint(), Total: r.uvarint(), Size: r.uvarint(), MinIdle: r.varint(),
		Streams: r.positions(), Keys: r.strings(), Cursor: r.uvarint(), Match: r.str(), Type: r.str()}
}

// Flags of a StreamAnswer.
const (
	answerInfo = 1 << iota
	answerPending
	answerValue
	answerFlags = iota
)

// append appends an answer's part for streams, or that there is none.
func (a *StreamAnswer) append(b []byte) []byte {
	if a == nil {
		return append(b, 0)
	}
	b = append(b, 1, bit(a.Info != nil, answerInfo)|bit(a.Pending != nil, answerPending)|bit(a.Value != nil, answerValue))
	b = appendReads(b, a.Reads)
	b = binary.AppendUvarint(b, a.Count)
	if a.Info != nil {
		b = a.Info.append(b)
	}
	if p := a.Pending; p != nil {
		b = binary.AppendUvarint(b, p.Total)
		b = p.Min.append(b)
		b = p.Max.append(b)
		b = appendConsumers(b, p.Consumers)
		b = appendPendingEntries(b, p.Entries)
	}
	b = binary.AppendUvarint(b, uint64(len(a.Keys)))
	for i := range a.Keys {
		k := &a.Keys[i]
		b = appendBytes(b, k.Name)
		b = append(b, byte(k.Type))
		b = appendVarint(b, k.TTL)
		b = appendVarint(b, k.ExpiresAt)
		b = binary.AppendUvarint(b, k.Version)
	}
	b = binary.AppendUvarint(b, a.Next)
	if a.Value != nil {
		b = appendBytes(b, a.Value)
	}
	entries := make([]StreamEntry, 0, len(a.Parked))
	for i := range a.Parked {
		entries = append(entries, a.Parked[i].Entry)
	}
	b = appendStreamEntries(b, entries)
	for i := range a.Parked {
		b = appendBytes(b, a.Parked[i].Error)
	}
	return b
}

func (r *reader) streamAnswer() *StreamAnswer {
	if !r.bool() {
		return nil
	}
	f := r.flags(answerFlags)
	a := &StreamAnswer{Reads: r.reads(), Count: r.uvarint()}
	if f&answerInfo != 0 {
		a.Info = r.streamInfo()
	}
	if f&answerPending != 0 {
		a.Pending = &PendingInfo{Total: r.uvarint(), Min: r.streamID(), Max: r.streamID(), Consumers: r.consumers(), Entries: r.pendingEntries()}
	}
	for range r.count(5) {
		a.Keys = append(a.Keys, KeyInfo{Name: r.str(), Type: KeyType(r.u8()), TTL: r.varint(), ExpiresAt: r.varint(), Version: r.uvarint()})
	}
	a.Next = r.uvarint()
	if f&answerValue != 0 {
		a.Value = append([]byte{}, r.bytes()...)
	}
	for _, e := range r.streamEntries() {
		a.Parked = append(a.Parked, ParkedEntry{Entry: e, Error: r.str()})
	}
	return a
}

func (s *StreamInfo) append(b []byte) []byte {
	b = binary.AppendUvarint(b, s.Length)
	b = s.Last.append(b)
	b = s.MaxDeleted.append(b)
	b = binary.AppendUvarint(b, s.EntriesAdded)
	b = s.FirstID.append(b)
	b = binary.AppendUvarint(b, uint64(s.GroupCount))
	b = binary.AppendUvarint(b, s.RadixKeys)
	b = binary.AppendUvarint(b, s.RadixNodes)
	var ends []StreamEntry
	if s.First != nil && s.Final != nil {
		ends = []StreamEntry{*s.First, *s.Final}
	}
	b = appendStreamEntries(b, ends)
	b = appendStreamEntries(b, s.Entries)
	b = binary.AppendUvarint(b, uint64(len(s.Groups)))
	for i := range s.Groups {
		g := &s.Groups[i]
		b = appendBytes(b, g.Name)
		b = g.LastDelivered.append(b)
		b = appendVarint(b, g.EntriesRead)
		b = appendVarint(b, g.Lag)
		b = binary.AppendUvarint(b, g.Pending)
		b = binary.AppendUvarint(b, uint64(g.ConsumerCount))
		b = appendPendingEntries(b, g.Entries)
		b = appendConsumers(b, g.Consumers)
	}
	return b
}

func (r *reader) streamInfo() *StreamInfo {
	s := &StreamInfo{Length: r.uvarint(), Last: r.streamID(), MaxDeleted: r.streamID(), EntriesAdded: r.uvarint(), FirstID: r.streamID(),
		GroupCount: int(r.upTo(1 << 31)), RadixKeys: r.uvarint(), RadixNodes: r.uvarint()}
	switch ends := r.streamEntries(); len(ends) {
	case 0:
	case 2:
		s.First, s.Final = &ends[0], &ends[1]
	default:
		r.fail()
	}
	s.Entries = r.streamEntries()
	for range r.count(9) {
		s.Groups = append(s.Groups, StreamGroupInfo{Name: r.str(), LastDelivered: r.streamID(), EntriesRead: r.varint(), Lag: r.varint(), Pending: r.uvarint(),
			ConsumerCount: int(r.upTo(1 << 31)), Entries: r.pendingEntries(), Consumers: r.consumers()})
		if r.bad {
			return nil
		}
	}
	return s
}

func appendConsumers(b []byte, list []ConsumerInfo) []byte {
	b = binary.AppendUvarint(b, uint64(len(list)))
	for i := range list {
		c := &list[i]
		b = appendBytes(b, c.Name)
		b = binary.AppendUvarint(b, c.Pending)
		b = appendVarint(b, c.SeenAt)
		b = appendVarint(b, c.ActiveAt)
		b = appendVarint(b, c.Idle)
		b = appendVarint(b, c.Inactive)
		b = appendPendingEntries(b, c.Entries)
	}
	return b
}

func (r *reader) consumers() []ConsumerInfo {
	var out []ConsumerInfo
	for range r.count(7) {
		out = append(out, ConsumerInfo{Name: r.str(), Pending: r.uvarint(), SeenAt: r.varint(), ActiveAt: r.varint(), Idle: r.varint(), Inactive: r.varint(), Entries: r.pendingEntries()})
		if r.bad {
			return nil
		}
	}
	return out
}

func appendPendingEntries(b []byte, list []PendingEntry) []byte {
	b = binary.AppendUvarint(b, uint64(len(list)))
	for i := range list {
		p := &list[i]
		b = p.ID.append(b)
		b = appendBytes(b, p.Consumer)
		b = appendVarint(b, p.Idle)
		b = appendVarint(b, p.DeliveredAt)
		b = binary.AppendUvarint(b, p.Count)
	}
	return b
}

func (r *reader) pendingEntries() []PendingEntry {
	n := r.count(6)
	if n == 0 {
		return nil
	}
	out := make([]PendingEntry, 0, n)
	for range n {
		out = append(out, PendingEntry{ID: r.streamID(), Consumer: r.str(), Idle: r.varint(), DeliveredAt: r.varint(), Count: r.uvarint()})
	}
	return out
}
