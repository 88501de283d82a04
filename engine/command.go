package engine

import (
	"encoding/binary"
	"fmt"
	"time"

	"tercet.dev/tercet/internal/errs"
)

// commandVersion is the version byte of every command this release writes and reads.
const commandVersion = 1

// levelMax is the highest feature level this release understands.
const levelMax = 1

// LevelMax returns the highest feature level this release understands, for the announcement to the leader.
func LevelMax() uint32 { return levelMax }

// Level returns the feature level a command belongs to. What a cluster needs to exist belongs to none.
func (k Kind) Level() uint32 {
	switch k {
	case CmdInit, CmdOpenIntake, CmdTick, CmdShrink, CmdExpand, CmdLevel:
		return 0
	}
	return 1
}

// Flags of a message record.
const (
	recordDelay      = 1 << 0
	recordKey        = 1 << 1
	recordDeployment = 1 << 2
	recordHeaders    = 1 << 3
	recordFields     = 1 << 4 // the body is pairs of bytes (Valkey fields) instead of a message
	recordLarge      = 1 << 5 // in place of the body stand the parts of a large message
	recordDefault    = 1 << 6 // the retention is the topic's default
	recordKnownFlags = recordDelay | recordKey | recordDeployment | recordHeaders | recordFields | recordLarge | recordDefault
)

// Kind implements Command.
func (c *Init) Kind() Kind { return CmdInit }

// Kind implements Command.
func (c *OpenIntake) Kind() Kind { return CmdOpenIntake }

// Kind implements Command.
func (c *Tick) Kind() Kind { return CmdTick }

// Kind implements Command.
func (c *Publish) Kind() Kind { return CmdPublish }

// Kind implements Command.
func (c *Receive) Kind() Kind { return CmdReceive }

// Kind implements Command.
func (c *ReceiveID) Kind() Kind { return CmdReceiveID }

// Kind implements Command.
func (c *Settle) Kind() Kind { return CmdSettle }

// Kind implements Command.
func (c *Shrink) Kind() Kind { return CmdShrink }

// Kind implements Command.
func (c *Expand) Kind() Kind { return CmdExpand }

// Kind implements Command.
func (c *Advance) Kind() Kind { return CmdAdvance }

// Kind implements Command.
func (c *Level) Kind() Kind { return CmdLevel }

func seconds(d time.Duration) uint64 {
	if d <= 0 {
		return 0
	}
	return uint64(d / time.Second)
}

// AppendTo implements Command.
func (c *Init) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdInit), commandVersion)
	b = appendBytes(b, c.ClusterID)
	b = appendBytes(b, c.Secret)
	b = binary.AppendUvarint(b, uint64(c.Level))
	return appendBool(b, c.Refound)
}

// AppendTo implements Command.
func (c *OpenIntake) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdOpenIntake), commandVersion)
	b = appendBytes(b, c.Node)
	return binary.AppendUvarint(b, c.Nonce)
}

// AppendTo implements Command.
func (c *Tick) AppendTo(b []byte) []byte { return append(b, byte(CmdTick), commandVersion) }

// AppendTo implements Command.
func (c *Publish) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdPublish), commandVersion)
	b = appendBytes(b, c.Topic)
	b = binary.AppendUvarint(b, uint64(len(c.Messages)))
	for i := range c.Messages {
		b = c.Messages[i].appendRecord(b)
	}
	return b
}

// appendRecord appends the message in the form in which it travels and in which it is stored: its size,
// flags, retention, the optional fields, content type, headers, and the body as what is left.
func (m *NewMessage) appendRecord(b []byte) []byte {
	var flags byte
	n := 1 + uvarintLen(seconds(m.Retention))
	if m.Delay > 0 {
		flags |= recordDelay
		n += uvarintLen(seconds(m.Delay))
	}
	if m.Key != "" {
		flags |= recordKey
		n += uvarintLen(uint64(len(m.Key))) + len(m.Key)
	}
	if m.Deployment != "" {
		flags |= recordDeployment
		n += uvarintLen(uint64(len(m.Deployment))) + len(m.Deployment)
	}
	if m.Fields != nil {
		flags |= recordFields
		n += fieldsLen(m.Fields)
	}
	n += uvarintLen(uint64(len(m.ContentType))) + len(m.ContentType)
	if len(m.Headers) > 0 {
		flags |= recordHeaders
		n += uvarintLen(uint64(len(m.Headers)))
		for _, h := range m.Headers {
			n += uvarintLen(uint64(len(h.Name))) + len(h.Name) + uvarintLen(uint64(len(h.Value))) + len(h.Value)
		}
	}
	if m.RetentionDefault {
		flags |= recordDefault
	}
	if m.Large != nil {
		flags |= recordLarge
		n += m.Large.size()
	} else {
		n += len(m.Body)
	}
	b = binary.AppendUvarint(b, uint64(n))
	b = append(b, flags)
	b = binary.AppendUvarint(b, seconds(m.Retention))
	if m.Delay > 0 {
		b = binary.AppendUvarint(b, seconds(m.Delay))
	}
	if m.Key != "" {
		b = appendBytes(b, m.Key)
	}
	if m.Deployment != "" {
		b = appendBytes(b, m.Deployment)
	}
	b = appendBytes(b, m.ContentType)
	if len(m.Headers) > 0 {
		b = binary.AppendUvarint(b, uint64(len(m.Headers)))
		for _, h := range m.Headers {
			b = appendBytes(b, h.Name)
			b = appendBytes(b, h.Value)
		}
	}
	if m.Large != nil {
		return m.Large.append(b)
	}
	if m.Fields != nil {
		return appendFields(b, m.Fields)
	}
	return append(b, m.Body...)
}

// record is a message record taken apart; its slices point into the encoding.
type record struct {
	flags       byte
	retention   uint64 // seconds, 0 for none
	delay       uint64 // seconds
	key         []byte
	deployment  []byte
	contentType []byte
	headers     int    // number of headers
	headerBytes []byte // the encoded headers and, behind them, the body
	body        []byte
}

// retentionLimit keeps sums of times far from overflow.
const retentionLimit = 1 << 33

// recordHead reads the size of the record at the head of r, its flags and its retention, and leaves r
// behind the record. rest is what follows the retention.
func recordHead(r *reader) (flags byte, retention uint64, rest reader) {
	rest = reader{b: r.bytes(), bad: r.bad}
	flags = rest.u8()
	retention = rest.upTo(retentionLimit)
	if rest.bad || flags&^recordKnownFlags != 0 {
		r.fail()
	}
	return flags, retention, rest
}

// parseRecord reads the record at the head of r completely. Headers are checked and left encoded.
func parseRecord(r *reader, rec *record) {
	*rec = record{}
	var in reader
	rec.flags, rec.retention, in = recordHead(r)
	if rec.flags&recordDelay != 0 {
		rec.delay = in.upTo(retentionLimit)
	}
	if rec.flags&recordKey != 0 {
		rec.key = in.bytes()
	}
	if rec.flags&recordDeployment != 0 {
		rec.deployment = in.bytes()
	}
	rec.contentType = in.bytes()
	if rec.flags&recordHeaders != 0 {
		rec.headers = in.count(2)
		rec.headerBytes = in.b
		for range rec.headers {
			in.bytes()
			in.bytes()
		}
	}
	if in.bad || rec.flags&recordFields != 0 && !checkFields(in.b) {
		r.fail()
		return
	}
	rec.body = in.b
	if rec.flags&recordLarge != 0 {
		if _, ok := parseLarge(rec.body); !ok {
			r.fail()
		}
	}
}

func (rec *record) message() NewMessage {
	m := NewMessage{
		ContentType: string(rec.contentType), Retention: time.Duration(rec.retention) * time.Second,
		Delay: time.Duration(rec.delay) * time.Second, Key: string(rec.key), Deployment: string(rec.deployment), Body: rec.body,
	}
	m.Headers = rec.decodeHeaders()
	m.RetentionDefault = rec.flags&recordDefault != 0
	if l, ok := parseLarge(rec.body); ok && rec.flags&recordLarge != 0 {
		m.Body, m.Large = nil, &l
	}
	if rec.flags&recordFields != 0 {
		m.Fields, m.Body = decodeFields(rec.body), nil
	}
	return m
}

func (rec *record) decodeHeaders() []Header {
	if rec.headers == 0 {
		return nil
	}
	in := reader{b: rec.headerBytes}
	out := make([]Header, rec.headers)
	for i := range out {
		out[i] = Header{Name: in.str(), Value: in.str()}
	}
	return out
}

// AppendTo implements Command.
func (c *Receive) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdReceive), commandVersion)
	b = appendBytes(b, c.Topic)
	b = appendBytes(b, c.Group)
	b = binary.AppendUvarint(b, uint64(max(c.Max, 0)))
	b = binary.AppendUvarint(b, seconds(c.Visibility))
	b = binary.AppendUvarint(b, uint64(max(c.MaxConcurrency, 0)))
	b = appendBytes(b, c.Deployment)
	var flags byte
	if c.Latest {
		flags |= 1
	}
	if c.Park {
		flags |= 2
	}
	return append(b, flags)
}

// AppendTo implements Command.
func (c *ReceiveID) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdReceiveID), commandVersion)
	b = appendBytes(b, c.Topic)
	b = appendBytes(b, c.Group)
	b = c.ID.append(b)
	b = binary.AppendUvarint(b, seconds(c.Visibility))
	b = binary.AppendUvarint(b, uint64(max(c.MaxConcurrency, 0)))
	return appendBytes(b, c.Deployment)
}

// AppendTo implements Command.
func (c *Settle) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdSettle), commandVersion)
	b = appendBytes(b, c.Topic)
	b = appendBytes(b, c.Group)
	b = append(b, byte(c.Op))
	b = binary.AppendUvarint(b, seconds(c.Visibility))
	b = appendBytes(b, c.Deployment)
	if c.Op == Release {
		b = appendBytes(b, c.Reason)
	}
	b = binary.AppendUvarint(b, uint64(len(c.Receipts)))
	for i := range c.Receipts {
		b = c.Receipts[i].append(b)
	}
	return b
}

// AppendTo implements Command.
func (c *Shrink) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdShrink), commandVersion)
	b = appendBytes(b, c.Node)
	return binary.AppendUvarint(b, c.Epoch)
}

// AppendTo implements Command.
func (c *Expand) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdExpand), commandVersion)
	b = appendBytes(b, c.Node)
	return binary.AppendUvarint(b, c.Epoch)
}

// AppendTo implements Command.
func (c *Advance) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdAdvance), commandVersion)
	return binary.AppendUvarint(b, uint64(max(c.By, 0)/time.Millisecond))
}

// AppendTo implements Command.
func (c *Level) AppendTo(b []byte) []byte {
	b = append(b, byte(CmdLevel), commandVersion)
	return binary.AppendUvarint(b, uint64(c.Level))
}

func (id MessageID) append(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(id.Shard))
	b = binary.AppendUvarint(b, id.Index)
	b = binary.AppendUvarint(b, uint64(id.Pos))
	b = append(b, byte(id.Kind))
	if id.Kind == KindDuplicate {
		b = binary.AppendUvarint(b, id.OriginalIndex)
		b = binary.AppendUvarint(b, uint64(id.OriginalPos))
		b = append(b, byte(id.OriginalKind))
	}
	return b
}

func (r *reader) messageID() MessageID {
	id := MessageID{Shard: uint16(r.upTo(1<<16 - 1)), Index: r.uvarint(), Pos: uint32(r.upTo(1<<32 - 1)), Kind: MessageKind(r.u8())}
	if id.Kind == KindDuplicate {
		id.OriginalIndex, id.OriginalPos, id.OriginalKind = r.uvarint(), uint32(r.upTo(1<<32-1)), MessageKind(r.u8())
		if id.OriginalKind == KindDuplicate {
			r.fail()
		}
	}
	return id
}

func (rc Receipt) append(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(rc.Shard))
	b = binary.AppendUvarint(b, rc.Topic)
	b = binary.AppendUvarint(b, rc.Group)
	b = binary.AppendUvarint(b, rc.Offset)
	return binary.AppendUvarint(b, rc.Epoch)
}

func (r *reader) receipt() Receipt {
	return Receipt{Shard: uint16(r.upTo(1<<16 - 1)), Topic: r.uvarint(), Group: r.uvarint(), Offset: r.uvarint(), Epoch: r.uvarint()}
}

// visibilityLimit bounds what a command may carry in seconds, so that no sum of times overflows.
const visibilityLimit = 1 << 32

// openCommand checks kind and version. An unknown one must halt the node: whoever proposed it knows
// something this release does not, and guessing would part the replicas.
func openCommand(cmd []byte) (Kind, reader, error) {
	if len(cmd) < 2 {
		return 0, reader{}, errMalformed
	}
	k := Kind(cmd[0])
	if (k < CmdInit || k > cmdQueueLast) && (k < cmdStreamFirst || k > cmdStreamLast) {
		return 0, reader{}, &UnknownError{What: "command kind", Value: uint64(cmd[0])}
	}
	if cmd[1] != commandVersion {
		return 0, reader{}, &UnknownError{What: fmt.Sprintf("version of command kind %d", k), Value: uint64(cmd[1])}
	}
	return k, reader{b: cmd[2:]}, nil
}

// UnknownError says that the log holds something a newer release wrote.
type UnknownError struct {
	What  string
	Value uint64
}

// Error implements error.
func (e *UnknownError) Error() string {
	return fmt.Sprintf("engine: the log holds %s %d, which this release does not know: install the release that the other members run, then start this node again", e.What, e.Value)
}

// DecodeCommand decodes a command. Message bodies point into cmd.
func DecodeCommand(cmd []byte) (Command, error) {
	k, r, err := openCommand(cmd)
	if err != nil {
		return nil, err
	}
	if k >= cmdStreamFirst {
		return decodeStream(k, &r)
	}
	var c Command
	switch k {
	case CmdInit:
		c = &Init{ClusterID: r.str(), Secret: append([]byte(nil), r.bytes()...), Level: uint32(r.upTo(1<<32 - 1)), Refound: r.bool()}
	case CmdOpenIntake:
		c = &OpenIntake{Node: NodeID(r.bytes()), Nonce: r.uvarint()}
	case CmdTick:
		c = &Tick{}
	case CmdPublish:
		p := &Publish{Topic: r.str()}
		n := r.count(recordBytesMin)
		var rec record
		for range n {
			parseRecord(&r, &rec)
			if r.bad {
				break
			}
			p.Messages = append(p.Messages, rec.message())
		}
		c = p
	case CmdReceive:
		var v receiveView
		v.parse(&r)
		c = &Receive{Topic: string(v.topic), Group: string(v.group), Max: v.max, Visibility: time.Duration(v.visibility) * time.Millisecond,
			MaxConcurrency: v.maxConcurrency, Deployment: string(v.deployment), Latest: v.latest, Park: v.park}
	case CmdReceiveID:
		var v receiveIDView
		v.parse(&r)
		c = &ReceiveID{Topic: string(v.topic), Group: string(v.group), ID: v.id, Visibility: time.Duration(v.visibility) * time.Millisecond,
			MaxConcurrency: v.maxConcurrency, Deployment: string(v.deployment)}
	case CmdSettle:
		var v settleView
		v.parse(&r)
		s := &Settle{Topic: string(v.topic), Group: string(v.group), Op: v.op, Visibility: time.Duration(v.visibility) * time.Millisecond, Deployment: string(v.deployment), Reason: string(v.reason)}
		for range v.count {
			s.Receipts = append(s.Receipts, r.receipt())
		}
		c = s
	case CmdShrink:
		c = &Shrink{Node: NodeID(r.bytes()), Epoch: r.uvarint()}
	case CmdExpand:
		c = &Expand{Node: NodeID(r.bytes()), Epoch: r.uvarint()}
	case CmdAdvance:
		c = &Advance{By: time.Duration(r.upTo(advanceLimit)) * time.Millisecond}
	case CmdLevel:
		c = &Level{Level: uint32(r.upTo(1<<32 - 1))}
	default:
		c = decodeQueue(k, &r)
	}
	if err := r.err(); err != nil {
		return nil, err
	}
	return c, nil
}

// advanceLimit bounds one step of the virtual clock, in milliseconds: 100 years.
const advanceLimit = 100 * 366 * 86400 * 1000

// recordBytesMin is the size of the smallest record: size, flags, retention, content type length.
const recordBytesMin = 4

func (r *reader) bool() bool {
	v := r.u8()
	if v > 1 {
		r.fail()
	}
	return v == 1
}

// receiveView is a Receive as apply reads it: names point into the entry. Times are milliseconds.
type receiveView struct {
	topic, group, deployment []byte
	max, maxConcurrency      int
	visibility               int64
	latest, park             bool
}

func (v *receiveView) parse(r *reader) {
	v.topic, v.group = r.bytes(), r.bytes()
	v.max = int(r.upTo(1 << 20))
	v.visibility = int64(r.upTo(visibilityLimit)) * 1000
	v.maxConcurrency = int(r.upTo(1 << 31))
	v.deployment = r.bytes()
	flags := r.u8()
	if flags > 3 {
		r.fail()
	}
	v.latest, v.park = flags&1 != 0, flags&2 != 0
}

type receiveIDView struct {
	topic, group, deployment []byte
	id                       MessageID
	maxConcurrency           int
	visibility               int64
}

func (v *receiveIDView) parse(r *reader) {
	v.topic, v.group = r.bytes(), r.bytes()
	v.id = r.messageID()
	v.visibility = int64(r.upTo(visibilityLimit)) * 1000
	v.maxConcurrency = int(r.upTo(1 << 31))
	v.deployment = r.bytes()
}

// settleView leaves the reader at the first of count receipts.
type settleView struct {
	topic, group, deployment, reason []byte
	op                               SettleOp
	visibility                       int64
	count                            int
}

func (v *settleView) parse(r *reader) {
	v.topic, v.group = r.bytes(), r.bytes()
	v.op = SettleOp(r.u8())
	v.visibility = int64(r.upTo(visibilityLimit)) * 1000
	v.deployment = r.bytes()
	if v.op == Release {
		v.reason = r.bytes()
	}
	v.count = r.count(5)
}

// CommandInfo is what the coalescer needs to know of an encoded command. Topic and Group point into it.
type CommandInfo struct {
	Kind         Kind
	Topic, Group []byte
	// Messages is the number of messages of a Publish, 1 for a StreamAdd.
	Messages int
	// Max and Park are a Receive's, and those of a StreamReadGroup that may park: new entries alone. Topic, that of the
	// first stream, and Group are set for both, Others has the other streams.
	Max    int
	Park   bool
	Others []string
	// Consumer is a StreamReadGroup's, where Topic and Group are set.
	Consumer []byte
}

// Inspect checks an encoded command completely, as Apply would read it, and says what it is about. A node
// calls it on every command it did not encode itself before it is proposed. It does not allocate.
func Inspect(cmd []byte) (CommandInfo, error) {
	k, r, err := openCommand(cmd)
	if err != nil {
		return CommandInfo{}, err
	}
	info := CommandInfo{Kind: k}
	if k >= cmdStreamFirst {
		return info, inspectStream(k, &r, &info)
	}
	switch k {
	case CmdInit:
		r.bytes()
		r.bytes()
		r.upTo(1<<32 - 1)
		r.bool()
	case CmdOpenIntake, CmdShrink, CmdExpand:
		r.bytes()
		r.uvarint()
	case CmdTick:
	case CmdPublish:
		info.Topic = r.bytes()
		info.Messages = r.count(recordBytesMin)
		var rec record
		for i := 0; i < info.Messages && !r.bad; i++ {
			parseRecord(&r, &rec)
		}
	case CmdReceive:
		var v receiveView
		v.parse(&r)
		info.Topic, info.Group, info.Max, info.Park = v.topic, v.group, v.max, v.park
	case CmdReceiveID:
		var v receiveIDView
		v.parse(&r)
		info.Topic, info.Group = v.topic, v.group
	case CmdSettle:
		var v settleView
		v.parse(&r)
		info.Topic, info.Group = v.topic, v.group
		for i := 0; i < v.count && !r.bad; i++ {
			r.receipt()
		}
	case CmdAdvance:
		r.upTo(advanceLimit)
	case CmdLevel:
		r.upTo(1<<32 - 1)
	default:
		inspectQueue(k, &r, &info)
	}
	if err := r.err(); err != nil {
		return CommandInfo{}, err
	}
	return info, nil
}

// WithPark returns an encoded Receive or StreamReadGroup with its Park flag set or cleared, without decoding
// it. The given slice is not changed. A StreamReadGroup that cannot park is errs.BadRequest.
func WithPark(cmd []byte, park bool) ([]byte, error) {
	info, err := Inspect(cmd)
	if err != nil || info.Kind != CmdReceive && (info.Kind != CmdStreamReadGroup || info.Topic == nil) {
		return nil, errs.Of(errs.BadRequest).With(err)
	}
	out := append([]byte(nil), cmd...)
	flags := &out[len(out)-1]
	*flags &^= 2
	if park {
		*flags |= 2
	}
	return out, nil
}

// ParkStreamsMax is how many streams a StreamReadGroup that parks may read.
const ParkStreamsMax = 1024

// ParkProbe returns what Park needs to know of an encoded Receive or StreamReadGroup, nil if it cannot park.
func ParkProbe(cmd []byte) *Receive {
	info, err := Inspect(cmd)
	switch {
	case err != nil:
	case info.Kind == CmdReceive:
		c, err := DecodeCommand(cmd)
		if r, ok := c.(*Receive); ok && err == nil {
			return r
		}
	case info.Kind == CmdStreamReadGroup && info.Topic != nil:
		return &Receive{Topic: string(info.Topic), Group: string(info.Group), Max: info.Max, Park: info.Park, consumer: string(info.Consumer), others: info.Others}
	}
	return nil
}
