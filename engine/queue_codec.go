package engine

import (
	"encoding/binary"
	"slices"
	"time"
)

// Durations of settings travel in milliseconds, those of messages and leases in seconds.
func appendMillis(b []byte, d time.Duration) []byte {
	return binary.AppendUvarint(b, uint64(max(d, 0)/time.Millisecond))
}

func (r *reader) duration() time.Duration {
	return time.Duration(r.upTo(advanceLimit)) * time.Millisecond
}

func appendStrings(b []byte, list []string) []byte {
	b = binary.AppendUvarint(b, uint64(len(list)))
	for _, s := range list {
		b = appendBytes(b, s)
	}
	return b
}

func (r *reader) strings() []string {
	var out []string
	for range r.count(1) {
		out = append(out, r.str())
	}
	return out
}

func appendIDs(b []byte, list []MessageID) []byte {
	b = binary.AppendUvarint(b, uint64(len(list)))
	for _, id := range list {
		b = id.append(b)
	}
	return b
}

func (r *reader) ids() []MessageID {
	var out []MessageID
	for range r.count(4) {
		out = append(out, r.messageID())
	}
	return out
}

// flags packs conditions into a byte, the first into the lowest bit.
func flags(list ...bool) byte {
	var b byte
	for i, on := range list {
		if on {
			b |= 1 << i
		}
	}
	return b
}

// flags reads a byte of at most n flags.
func (r *reader) flags(n int) byte {
	b := r.u8()
	if b>>n != 0 {
		r.fail()
	}
	return b
}

// AppendTo implements Command.
func (c *Document) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdDocument), commandVersion, flags(c.IfAbsent, c.Delete))
	b = appendBytes(b, c.Table)
	b = appendBytes(b, c.Key)
	b = binary.AppendUvarint(b, c.IfRevision)
	return appendBytes(b, c.Value)
}

func (r *reader) document() *Document {
	f := r.flags(2)
	c := &Document{IfAbsent: f&1 != 0, Delete: f&2 != 0, Table: r.str(), Key: r.str(), IfRevision: r.uvarint()}
	if v := r.bytes(); len(v) > 0 {
		c.Value = v
	}
	return c
}

// AppendTo implements Command.
func (c *TopicSet) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdTopicSet), commandVersion)
	b = appendBytes(b, c.Topic)
	b = append(b, flags(c.Create, c.Settings != nil))
	if c.Settings != nil {
		b = binary.AppendUvarint(c.Settings.append(b), uint64(c.Only))
	}
	return b
}

func (s *TopicSettings) append(b []byte) []byte {
	b = append(b, flags(s.Paused, s.DropAcknowledged))
	b = appendMillis(b, s.RetentionDefault)
	b = appendMillis(b, s.RetentionMax)
	b = binary.AppendUvarint(b, uint64(max(s.MessageBytesMax, 0)))
	return binary.AppendUvarint(b, s.DepthMax)
}

func (r *reader) topicSettings() TopicSettings {
	f := r.flags(2)
	return TopicSettings{Paused: f&1 != 0, DropAcknowledged: f&2 != 0, RetentionDefault: r.duration(), RetentionMax: r.duration(), MessageBytesMax: int64(r.upTo(1 << 50)), DepthMax: r.uvarint()}
}

func (r *reader) topicSet() *TopicSet {
	c := &TopicSet{Topic: r.str()}
	f := r.flags(2)
	c.Create = f&1 != 0
	if f&2 != 0 {
		s := r.topicSettings()
		c.Settings, c.Only = &s, r.settingMask()
	}
	return c
}

// AppendTo implements Command.
func (c *TopicDelete) AppendTo(b []byte) []byte {
	return appendBytes(append(b, byte(CmdTopicDelete), commandVersion), c.Topic)
}

// AppendTo implements Command.
func (c *Purge) AppendTo(b []byte) []byte {
	return appendBytes(append(b, byte(CmdPurge), commandVersion), c.Topic)
}

// AppendTo implements Command.
func (c *GroupSet) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdGroupSet), commandVersion)
	b = appendBytes(b, c.Topic)
	b = appendBytes(b, c.Group)
	b = append(b, flags(c.Create, c.Seek, c.Settings != nil), byte(c.Start.Kind))
	switch c.Start.Kind {
	case StartTime:
		b = appendVarint(b, c.Start.Time)
	case StartID:
		b = c.Start.ID.append(b)
	}
	if c.Settings != nil {
		b = binary.AppendUvarint(c.Settings.append(b), uint64(c.Only))
	}
	return b
}

func (r *reader) settingMask() SettingMask { return SettingMask(r.upTo(1<<settingMasks - 1)) }

func (s *GroupSettings) append(b []byte) []byte {
	b = append(b, flags(s.Paused, s.Park))
	b = binary.AppendUvarint(b, uint64(s.MaxDeliveries))
	for _, d := range []time.Duration{s.ParkedRetention, s.RetryAfter, s.InitialDelay, s.StartDelay, s.Visibility} {
		b = appendMillis(b, d)
	}
	b = binary.AppendUvarint(b, uint64(max(s.NotBefore, 0)))
	b = binary.AppendUvarint(b, uint64(max(s.MaxConcurrency, 0)))
	b = appendBytes(b, s.Deployment)
	return appendStrings(b, s.ExcludeDeployments)
}

func (r *reader) groupSettings() GroupSettings {
	f := r.flags(2)
	return GroupSettings{Paused: f&1 != 0, Park: f&2 != 0, MaxDeliveries: uint32(r.upTo(1<<32 - 1)),
		ParkedRetention: r.duration(), RetryAfter: r.duration(), InitialDelay: r.duration(), StartDelay: r.duration(), Visibility: r.duration(),
		NotBefore: int64(r.upTo(1 << 61)), MaxConcurrency: int(r.upTo(1 << 31)), Deployment: r.str(), ExcludeDeployments: r.strings()}
}

func (r *reader) groupSet() *GroupSet {
	c := &GroupSet{Topic: r.str(), Group: r.str()}
	f := r.flags(3)
	c.Create, c.Seek = f&1 != 0, f&2 != 0
	c.Start.Kind = StartKind(r.u8())
	switch c.Start.Kind {
	case StartBeginning, StartEnd:
	case StartTime:
		c.Start.Time = r.varint()
	case StartID:
		c.Start.ID = r.streamID()
	default:
		r.fail()
	}
	if f&4 != 0 {
		s := r.groupSettings()
		c.Settings, c.Only = &s, r.settingMask()
	}
	return c
}

// AppendTo implements Command.
func (c *GroupDelete) AppendTo(b []byte) []byte {
	b = appendBytes(append(b, byte(CmdGroupDelete), commandVersion), c.Topic)
	return appendBytes(b, c.Group)
}

// AppendTo implements Command.
func (c *Parked) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdParked), commandVersion)
	b = appendBytes(b, c.Topic)
	b = appendBytes(b, c.Group)
	b = append(b, byte(c.Op), flags(c.DryRun))
	b = binary.AppendUvarint(b, uint64(max(c.Max, 0)))
	b = binary.AppendUvarint(b, c.From)
	return c.Filter.append(b)
}

func (f *ParkedFilter) append(b []byte) []byte {
	b = appendIDs(b, f.IDs)
	b = appendStreamIDs(b, f.Streams)
	b = appendBytes(b, f.Error)
	b = appendVarint(b, f.Since)
	return appendVarint(b, f.Until)
}

func (r *reader) parkedFilter() ParkedFilter {
	return ParkedFilter{IDs: r.ids(), Streams: r.streamIDs(), Error: r.str(), Since: r.varint(), Until: r.varint()}
}

func (r *reader) parkedCommand() *Parked {
	c := &Parked{Topic: r.str(), Group: r.str(), Op: ParkedOp(r.u8()), DryRun: r.flags(1) != 0, Max: int(r.upTo(1 << 31)), From: r.uvarint()}
	c.Filter = r.parkedFilter()
	return c
}

// AppendTo implements Command.
func (c *Delayed) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdDelayed), commandVersion)
	b = appendBytes(b, c.Topic)
	b = c.ID.append(b)
	b = append(b, flags(c.Cancel))
	return appendMillis(b, c.Delay)
}

// AppendTo implements Command.
func (c *UploadOpen) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdUploadOpen), commandVersion)
	b = appendBytes(b, c.Topic)
	b = appendBytes(b, c.Key)
	return appendBytes(b, c.Deployment)
}

// AppendTo implements Command.
func (c *UploadPart) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdUploadPart), commandVersion)
	b = binary.AppendUvarint(b, c.Upload)
	b = binary.AppendUvarint(b, uint64(c.Number))
	return appendBytes(b, c.Data)
}

// AppendTo implements Command.
func (c *UploadCommit) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdUploadCommit), commandVersion)
	b = binary.AppendUvarint(b, c.Upload)
	m := c.Message
	m.Body, m.Large = nil, &Large{Upload: c.Upload, Parts: c.Parts, Bytes: c.Bytes, CRC: c.CRC}
	return m.appendRecord(b)
}

// AppendTo implements Command.
func (c *UploadAbort) AppendTo(b []byte) []byte {
	return binary.AppendUvarint(append(b, byte(CmdUploadAbort), commandVersion), c.Upload)
}

// appendLarge appends what stands in a record in place of the body.
func (l *Large) append(b []byte) []byte {
	b = binary.AppendUvarint(b, l.Upload)
	b = binary.AppendUvarint(b, uint64(l.Parts))
	b = binary.AppendUvarint(b, uint64(max(l.Bytes, 0)))
	return binary.AppendUvarint(b, uint64(l.CRC))
}

func (l *Large) size() int {
	return uvarintLen(l.Upload) + uvarintLen(uint64(l.Parts)) + uvarintLen(uint64(max(l.Bytes, 0))) + uvarintLen(uint64(l.CRC))
}

// parseLarge reads the body of a record with recordLarge; the zero value and false if it is none.
func parseLarge(body []byte) (Large, bool) {
	r := reader{b: body}
	l := Large{Upload: r.uvarint(), Parts: uint32(r.upTo(1<<32 - 1)), Bytes: int64(r.upTo(1 << 50)), CRC: uint32(r.upTo(1<<32 - 1))}
	return l, r.done()
}

// decodeQueue decodes the commands of this file.
func decodeQueue(k Kind, r *reader) Command {
	switch k {
	case CmdDocument:
		return r.document()
	case CmdTopicSet:
		return r.topicSet()
	case CmdTopicDelete:
		return &TopicDelete{Topic: r.str()}
	case CmdPurge:
		return &Purge{Topic: r.str()}
	case CmdGroupSet:
		return r.groupSet()
	case CmdGroupDelete:
		return &GroupDelete{Topic: r.str(), Group: r.str()}
	case CmdParked:
		return r.parkedCommand()
	case CmdDelayed:
		return &Delayed{Topic: r.str(), ID: r.messageID(), Cancel: r.flags(1) != 0, Delay: r.duration()}
	case CmdUploadOpen:
		return &UploadOpen{Topic: r.str(), Key: r.str(), Deployment: r.str()}
	case CmdUploadPart:
		return &UploadPart{Upload: r.uvarint(), Number: uint32(r.upTo(1<<32 - 1)), Data: r.bytes()}
	case CmdUploadCommit:
		c := &UploadCommit{Upload: r.uvarint()}
		var rec record
		parseRecord(r, &rec)
		l, ok := parseLarge(rec.body)
		if !ok || rec.flags&recordLarge == 0 || l.Upload != c.Upload {
			r.fail()
			return c
		}
		c.Parts, c.Bytes, c.CRC = l.Parts, l.Bytes, l.CRC
		c.Message = rec.message()
		c.Message.Large = nil
		return c
	}
	return &UploadAbort{Upload: r.uvarint()}
}

// inspectQueue checks the commands of this file. They are rare, or large beside what decoding allocates.
func inspectQueue(k Kind, r *reader, info *CommandInfo) {
	at := reader{b: slices.Clip(r.b)}
	switch k {
	case CmdTopicSet, CmdTopicDelete, CmdPurge, CmdDelayed, CmdUploadOpen:
		info.Topic = at.bytes()
	case CmdGroupSet, CmdGroupDelete, CmdParked:
		info.Topic, info.Group = at.bytes(), at.bytes()
	case CmdUploadPart:
		r.uvarint()
		r.upTo(1<<32 - 1)
		r.bytes()
		return
	}
	decodeQueue(k, r)
}

// append appends the query's filters behind the fields all queries have.
func (f *MessageFilter) append(b []byte) []byte {
	b = append(b, byte(f.State))
	b = appendVarint(b, f.Since)
	b = appendVarint(b, f.Until)
	b = appendBytes(b, f.Header)
	return appendBytes(b, f.Value)
}

func (r *reader) messageFilter() MessageFilter {
	return MessageFilter{State: MessageState(r.u8()), Since: r.varint(), Until: r.varint(), Header: r.str(), Value: r.str()}
}

func appendDocuments(b []byte, list []StoredDocument) []byte {
	b = binary.AppendUvarint(b, uint64(len(list)))
	for i := range list {
		d := &list[i]
		b = appendBytes(b, d.Table)
		b = appendBytes(b, d.Key)
		b = appendBytes(b, d.Value)
		b = binary.AppendUvarint(b, d.Revision)
	}
	return b
}

func (r *reader) documents() []StoredDocument {
	var out []StoredDocument
	for range r.count(4) {
		d := StoredDocument{Table: r.str(), Key: r.str()}
		if v := r.bytes(); len(v) > 0 {
			d.Value = v
		}
		d.Revision = r.uvarint()
		out = append(out, d)
	}
	return out
}

func appendParked(b []byte, list []ParkedMessage) []byte {
	b = binary.AppendUvarint(b, uint64(len(list)))
	for i := range list {
		b = appendDeliveries(b, []Delivery{list[i].Delivery})
		b = appendVarint(b, list[i].ParkedAt)
		b = appendBytes(b, list[i].Error)
	}
	return b
}

func (r *reader) parkedMessages() []ParkedMessage {
	var out []ParkedMessage
	for range r.count(deliveryBytesMin) {
		d := r.oneDelivery()
		out = append(out, ParkedMessage{Delivery: d, ParkedAt: r.varint(), Error: r.str()})
	}
	return out
}

// oneDelivery reads a list that has to have one item.
func (r *reader) oneDelivery() Delivery {
	ds := r.deliveries()
	if len(ds) != 1 {
		r.fail()
		return Delivery{}
	}
	return ds[0]
}

func (s *Story) append(b []byte) []byte {
	b = appendBool(b, s != nil)
	if s == nil {
		return b
	}
	b = appendDeliveries(b, []Delivery{s.Message})
	b = append(b, byte(s.State))
	b = appendVarint(b, s.VisibleAt)
	b = appendVarint(b, s.Bytes)
	b = binary.AppendUvarint(b, uint64(s.CRC))
	b = binary.AppendUvarint(b, uint64(len(s.Groups)))
	for i := range s.Groups {
		g := &s.Groups[i]
		b = appendBytes(b, g.Group)
		b = append(b, byte(g.State))
		b = binary.AppendUvarint(b, uint64(g.Count))
		for _, at := range []int64{g.LeasedAt, g.LeasedUntil, g.NextAt, g.ParkedAt} {
			b = appendVarint(b, at)
		}
		b = appendBytes(b, g.Error)
		b = appendBytes(b, g.Consumer)
	}
	return b
}

func (r *reader) story() *Story {
	if !r.bool() {
		return nil
	}
	s := &Story{Message: r.oneDelivery(), State: MessageState(r.u8()), VisibleAt: r.varint(), Bytes: r.varint(), CRC: uint32(r.upTo(1<<32 - 1))}
	for range r.count(9) {
		s.Groups = append(s.Groups, GroupStory{Group: r.str(), State: MessageState(r.u8()), Count: uint32(r.upTo(1<<32 - 1)),
			LeasedAt: r.varint(), LeasedUntil: r.varint(), NextAt: r.varint(), ParkedAt: r.varint(), Error: r.str(), Consumer: r.str()})
	}
	return s
}
