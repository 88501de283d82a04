package engine

import (
	"encoding/binary"
	"fmt"
	"slices"
	"sort"
)

// Row kinds: the first byte of every key; the shard follows. Letters that later features will use are
// listed so that nobody takes them for something else.
const (
	rowBlock        = 'M' // topic, base offset -> block header and where its payload stands; written once, but for the place
	rowByIndex      = 'I' // topic, raft index -> base offset; written once
	rowByStream     = 'X' // topic, stream ID, base offset -> raft index; written once
	rowExpiry       = 'E' // expiry tick, raft index, 1 for references -> blocks; written once
	rowTopic        = 'T' // topic -> topic; checkpoint
	rowGroup        = 'G' // topic, group -> group; checkpoint
	rowChunk        = 'U' // topic, group, chunk -> unsettled messages; checkpoint
	rowIntake       = 'N' // intake -> intake; checkpoint
	rowState        = 'S' // applied index and all else; checkpoint
	rowKey          = 'K' // class, bucket, hash -> idempotency key; written once
	rowDue          = 'D' // due time, topic, raft index -> delayed messages; written once
	rowStaged       = 'Q' // topic, raft index -> records of delayed messages; written once
	rowStagedIndex  = 'Z' // topic, raft index -> what is staged there; written once
	rowStagedExpiry = 'W' // expiry tick, topic, raft index; written once
	rowPlace        = 'R' // topic, raft index, position -> where matured messages are in the log; written once
	rowChange       = 'J' // topic, raft index, position -> a delayed message that was cancelled or moved; checkpoint
	rowPosting      = 'B' // topic, deployment, base offset -> raft index, expiry; written once
	rowKept         = 'p' // topic, offset -> copy of a parked message that outlives its block; checkpoint, not part of the logical state
	rowPart         = 'L' // topic, upload, number -> where a part stands; written once, but for the place
	rowLargeExpiry  = 'H' // expiry tick, topic, upload; written once
	rowUpload       = 'A' // upload -> upload; checkpoint
	rowDocument     = 'O' // table, key -> document; checkpoint
	rowMarks        = 'Y' // topic, chunk -> removed entries; checkpoint
	rowConsumer     = 'C' // topic, group, number -> consumer; checkpoint
	rowString       = 'V' // number of the key -> string; checkpoint
	rowPack         = 'k' // pack -> of parts, size, last expiry; checkpoint, not part of the logical state
	rowFloor        = 'F' // topic -> where its stored blocks begin; checkpoint, not part of the logical state
)

// topicRows are the kinds whose key begins with a topic.
var topicRows = []byte{rowBlock, rowByIndex, rowByStream, rowTopic, rowGroup, rowChunk, rowFloor, rowStaged, rowStagedIndex, rowPlace, rowPart, rowPosting, rowKept,
	rowMarks, rowConsumer}

const rowVersion = 1

// keyspace builds keys of one shard.
type keyspace struct{ shard uint16 }

func (k keyspace) append(b []byte, kind byte, parts ...uint64) []byte {
	b = append(b, kind)
	b = binary.BigEndian.AppendUint16(b, k.shard)
	for _, p := range parts {
		b = binary.BigEndian.AppendUint64(b, p)
	}
	return b
}

func (k keyspace) key(kind byte, parts ...uint64) []byte {
	return k.append(make([]byte, 0, 3+8*len(parts)), kind, parts...)
}

// part returns the i-th number of a key.
func keyPart(key []byte, i int) (uint64, bool) {
	at := 3 + 8*i
	if len(key) < at+8 {
		return 0, false
	}
	return binary.BigEndian.Uint64(key[at:]), true
}

// posRun is a run of messages of a block with consecutive positions in the entry.
type posRun struct{ pos, count uint32 }

// block is the header of a stored block: the messages of one topic in one entry. It never changes once its
// entry is applied.
type block struct {
	topic         uint64
	base          uint64
	count         uint32
	uniform       bool // all messages have retention0
	retention0    uint32
	index         uint64
	cluster, wall int64 // the entry's stamps, milliseconds
	stream        StreamID
	ids           []StreamID // all of them where they are not consecutive from stream on
	bytes         uint64     // of the records
	lastExpiry    int64      // cluster time at which the last message expires
	retention     []uint32
	runs          []posRun
	run0          [1]posRun
	// sizes are about those of the records, kept when one is larger than sizesFrom.
	sizes []uint32

	// refs, in a block of references, are the delayed messages it stands for; retention and runs are empty.
	refs []refRun
	// deps are the deployments of the messages; nil if they have none. References carry their own.
	deps []depRun

	// at is where the payload stood when the header was written or read; blocks of references have none.
	at place

	// data and starts are set while the entry is kept in memory: where each record begins in it. A block that COPY made
	// has bytes of its own instead of the entry's.
	data   []byte
	starts []uint32
	own    bool
}

func (b *block) end() uint64 { return b.base + uint64(b.count) }

// retentionOf is in seconds, 0 for none.
func (b *block) retentionOf(i uint32) uint32 {
	if b.refs != nil {
		return b.ref(i).retention
	}
	if b.uniform {
		return b.retention0
	}
	return b.retention[i]
}

// ref is the run that holds the i-th message of a block of references.
func (b *block) ref(i uint32) *refRun {
	return &b.refs[sort.Search(len(b.refs), func(k int) bool { return b.refs[k].from > i })-1]
}

// id is the i-th message's ID.
func (b *block) id(shard uint16, i uint32) MessageID {
	if b.refs != nil {
		r := b.ref(i)
		return MessageID{Shard: shard, Index: r.index, Pos: r.pos + i - r.from, Kind: KindDelayed}
	}
	return MessageID{Shard: shard, Index: b.index, Pos: b.posOf(i), Kind: KindPlain}
}

// expiry is the cluster time at which the i-th message expires.
func (b *block) expiry(i uint32) int64 {
	if b.refs != nil {
		return b.ref(i).expiry()
	}
	if r := b.retentionOf(i); r != 0 {
		return b.cluster + int64(r)*1000
	}
	return never
}

// wallExpiry is what people are told, 0 for never.
func (b *block) wallExpiry(i uint32) int64 {
	if r := b.retentionOf(i); r != 0 {
		return b.publishedWall(i) + int64(r)*1000
	}
	return 0
}

// publishedAt is the cluster time at which the i-th message was published.
func (b *block) publishedAt(i uint32) int64 {
	if b.refs != nil {
		return b.ref(i).cluster
	}
	return b.cluster
}

// publishedWall is the same in wall time.
func (b *block) publishedWall(i uint32) int64 {
	if b.refs != nil {
		return b.ref(i).wall
	}
	return b.wall
}

func (b *block) streamOf(i uint32) StreamID {
	if b.ids != nil {
		return b.ids[i]
	}
	return StreamID{Ms: b.stream.Ms, Seq: b.stream.Seq + uint64(i)}
}

// posOf is the i-th message's position among the messages of the entry.
func (b *block) posOf(i uint32) uint32 {
	for _, r := range b.runs {
		if i < r.count {
			return r.pos + i
		}
		i -= r.count
	}
	return 0
}

// byPos is the reverse of posOf.
func (b *block) byPos(pos uint32) (uint32, bool) {
	i := uint32(0)
	for _, r := range b.runs {
		if pos >= r.pos && pos-r.pos < r.count {
			return i + pos - r.pos, true
		}
		i += r.count
	}
	return 0, false
}

// add appends a message to the header of a block under construction.
func (b *block) add(pos uint32, retention uint32, size int) {
	i := b.count
	b.count++
	if i == 0 {
		b.uniform, b.retention0 = true, retention
		b.runs = append(b.run0[:0], posRun{pos, 1})
	} else {
		if b.uniform && retention != b.retention0 {
			b.uniform = false
			b.retention = b.retention[:0]
			for range i {
				b.retention = append(b.retention, b.retention0)
			}
		}
		if !b.uniform {
			b.retention = append(b.retention, retention)
		}
		if last := &b.runs[len(b.runs)-1]; last.pos+last.count == pos {
			last.count++
		} else {
			b.runs = append(b.runs, posRun{pos, 1})
		}
	}
	if size > sizesFrom || b.sizes != nil {
		b.addSize(uint32(size))
	}
	b.bytes += uint64(size)
	b.lastExpiry = max(b.lastExpiry, b.expiry(i))
}

// sizesFrom is the size of a record from which on a block tells its records apart by size: an answer that is bounded by the
// average could otherwise hold the large ones alone.
const sizesFrom = 16 << 10

// addSize notes the size of the record that was added last. Those before the first large one count as their average.
func (b *block) addSize(size uint32) {
	for n := b.count - 1; uint32(len(b.sizes)) < n; {
		b.sizes = append(b.sizes, uint32(b.bytes/uint64(n)))
	}
	b.sizes = append(b.sizes, size)
}

// Flags of a block header.
const (
	blockRetentionTable = 1 << 0
	blockRunTable       = 1 << 1
	blockIDTable        = 1 << 2 // the stream IDs are not consecutive
	blockReferences     = 1 << 3
	blockDeployments    = 1 << 4
	blockSizeTable      = 1 << 5
)

// appendRow appends the header as it is stored: the logical one and, unless it is one of references, the place of the
// payload.
func (b *block) appendRow(dst []byte) []byte {
	dst = b.appendHeader(dst)
	if b.refs == nil {
		dst = b.at.append(dst)
	}
	return dst
}

// appendHeader appends the part that is the same on every node.
func (b *block) appendHeader(dst []byte) []byte {
	var flags byte
	if b.refs != nil {
		flags |= blockReferences
	}
	if b.deps != nil {
		flags |= blockDeployments
	}
	if !b.uniform && b.refs == nil {
		flags |= blockRetentionTable
	}
	if len(b.runs) > 1 {
		flags |= blockRunTable
	}
	if b.ids != nil {
		flags |= blockIDTable
	}
	if b.sizes != nil {
		flags |= blockSizeTable
	}
	dst = append(dst, rowVersion, flags)
	dst = binary.AppendUvarint(dst, b.index)
	dst = binary.AppendUvarint(dst, uint64(b.cluster))
	dst = binary.AppendUvarint(dst, uint64(b.wall))
	dst = b.stream.append(dst)
	dst = binary.AppendUvarint(dst, b.bytes)
	dst = binary.AppendUvarint(dst, uint64(b.count))
	if b.refs != nil {
		return b.appendRefs(dst)
	}
	if b.deps != nil {
		dst = b.appendDeps(dst)
	}
	if b.uniform {
		dst = binary.AppendUvarint(dst, uint64(b.retention0))
	} else {
		for _, r := range b.retention {
			dst = binary.AppendUvarint(dst, uint64(r))
		}
	}
	if len(b.runs) == 1 {
		dst = binary.AppendUvarint(dst, uint64(b.runs[0].pos))
	} else {
		dst = binary.AppendUvarint(dst, uint64(len(b.runs)))
		for _, r := range b.runs {
			dst = binary.AppendUvarint(dst, uint64(r.pos))
			dst = binary.AppendUvarint(dst, uint64(r.count))
		}
	}
	last := b.stream
	for _, id := range b.ids[min(1, len(b.ids)):] {
		dst = appendVarint(dst, int64(id.Ms-last.Ms))
		dst = binary.AppendUvarint(dst, id.Seq)
		last = id
	}
	for _, n := range b.sizes {
		dst = binary.AppendUvarint(dst, uint64(n))
	}
	return dst
}

func parseBlock(topic, base uint64, row []byte) (*block, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return nil, rowError(rowBlock, v)
	}
	flags := r.u8()
	if flags&^(blockRetentionTable|blockRunTable|blockIDTable|blockReferences|blockDeployments|blockSizeTable) != 0 || flags&blockReferences != 0 && flags&^blockReferences != 0 {
		return nil, &UnknownError{What: "block header flags", Value: uint64(flags)}
	}
	b := &block{topic: topic, base: base, index: r.uvarint(), cluster: int64(r.upTo(1 << 60)), wall: int64(r.upTo(1 << 60)), stream: r.streamID(), bytes: r.uvarint()}
	n := r.uvarint()
	if r.bad || n == 0 || n > b.bytes {
		return nil, errMalformed
	}
	b.count = uint32(n)
	if flags&blockReferences != 0 {
		return b, b.parseRefs(&r)
	}
	if flags&blockDeployments != 0 {
		b.parseDeps(&r)
	}
	if flags&blockRetentionTable == 0 {
		b.uniform, b.retention0 = true, uint32(r.upTo(1<<32-1))
		b.lastExpiry = b.expiry(0)
	} else {
		if n > uint64(len(r.b)) {
			return nil, errMalformed
		}
		b.retention = make([]uint32, n)
		for i := range b.retention {
			b.retention[i] = uint32(r.upTo(1<<32 - 1))
			b.lastExpiry = max(b.lastExpiry, b.expiry(uint32(i)))
		}
	}
	if flags&blockRunTable == 0 {
		b.runs = append(b.run0[:0], posRun{uint32(r.upTo(1<<32 - 1)), b.count})
	} else {
		total := uint64(0)
		for range r.count(2) {
			run := posRun{uint32(r.upTo(1<<32 - 1)), uint32(r.upTo(1<<32 - 1))}
			b.runs = append(b.runs, run)
			total += uint64(run.count)
		}
		if total != n {
			return nil, errMalformed
		}
	}
	if flags&blockIDTable != 0 {
		if n > uint64(len(r.b))/2+1 {
			return nil, errMalformed
		}
		b.ids = make([]StreamID, n)
		b.ids[0] = b.stream
		for i := 1; i < len(b.ids); i++ {
			b.ids[i] = StreamID{Ms: b.ids[i-1].Ms + uint64(r.varint()), Seq: r.uvarint()}
		}
	}
	if flags&blockSizeTable != 0 {
		if n > uint64(len(r.b)) {
			return nil, errMalformed
		}
		b.sizes = make([]uint32, n)
		for i := range b.sizes {
			b.sizes[i] = uint32(r.upTo(1<<32 - 1))
		}
	}
	b.at = r.place()
	if err := r.err(); err != nil {
		return nil, err
	}
	return b, nil
}

// appendRefs appends the runs of a block of references.
func (b *block) appendRefs(dst []byte) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(b.refs)))
	for i := range b.refs {
		r := &b.refs[i]
		for _, v := range []uint64{r.index, uint64(r.pos), uint64(r.count), uint64(r.cluster), uint64(r.wall), uint64(r.due), uint64(r.retention), uint64(r.bytes), r.dep} {
			dst = binary.AppendUvarint(dst, v)
		}
	}
	return dst
}

func (b *block) parseRefs(r *reader) error {
	from, bytes := uint64(0), uint64(0)
	for range r.count(9) {
		run := refRun{index: r.uvarint(), pos: uint32(r.upTo(1<<32 - 1)), count: uint32(r.upTo(1<<32 - 1)), cluster: int64(r.upTo(1 << 60)), wall: int64(r.upTo(1 << 60)),
			due: int64(r.upTo(1 << 61)), retention: uint32(r.upTo(1<<32 - 1)), bytes: uint32(r.upTo(1<<32 - 1)), dep: r.uvarint(), from: uint32(from)}
		if run.count == 0 {
			return errMalformed
		}
		from += uint64(run.count)
		bytes += uint64(run.bytes)
		if from > uint64(b.count) {
			return errMalformed
		}
		b.refs = append(b.refs, run)
		b.lastExpiry = max(b.lastExpiry, run.expiry())
	}
	if r.bad || from != uint64(b.count) || bytes != b.bytes {
		return errMalformed
	}
	return r.err()
}

func rowError(kind byte, version byte) error {
	return &UnknownError{What: fmt.Sprintf("version of row kind %c", kind), Value: uint64(version)}
}

func (t *topic) appendRow(b []byte) []byte {
	more := t.hasMore()
	b = append(b, rowVersion, flags(more))
	b = appendBytes(b, t.name)
	b = binary.AppendUvarint(b, t.next)
	b = t.last.append(b)
	b = binary.AppendUvarint(b, t.published)
	b = binary.AppendUvarint(b, t.bytes)
	if more {
		b = t.appendMore(b)
	}
	return t.streamPart.append(b)
}

func parseTopic(inc uint64, row []byte) (*topic, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return nil, rowError(rowTopic, v)
	}
	f := r.flags(1)
	t := newTopic(r.str(), inc)
	t.next, t.last, t.published, t.bytes = r.uvarint(), r.streamID(), r.uvarint(), r.uvarint()
	if f&1 != 0 {
		t.parseMore(&r)
	}
	t.streamPart = r.streamPart()
	t.gone = t.first
	return t, r.err()
}

func (g *group) appendRow(b []byte) []byte {
	more := !g.settings.isZero()
	b = append(b, rowVersion, flags(more, len(g.parts) > 0))
	b = appendBytes(b, g.name)
	b = g.pos.append(b)
	b = binary.AppendUvarint(b, g.next)
	b = binary.AppendUvarint(b, g.epoch)
	b = binary.AppendUvarint(b, g.delivered)
	b = binary.AppendUvarint(b, g.redelivered)
	b = binary.AppendUvarint(b, g.acked)
	if more {
		b = g.settings.append(b)
	}
	if len(g.parts) > 0 {
		b = g.appendParts(b)
	}
	return g.streamGroup.append(b)
}

func parseGroup(t *topic, inc uint64, row []byte) (*group, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return nil, rowError(rowGroup, v)
	}
	f := r.flags(2)
	g := newGroup(t, r.str(), inc)
	g.pos, g.next, g.epoch = r.streamID(), r.uvarint(), r.uvarint()
	g.delivered, g.redelivered, g.acked = r.uvarint(), r.uvarint(), r.uvarint()
	if f&1 != 0 {
		g.settings = r.groupSettings()
		g.compile()
	}
	if f&2 != 0 {
		g.parseParts(&r)
	}
	g.streamGroup = r.streamGroup()
	return g, r.err()
}

// appendRow appends the chunk of g with that key as of now: what has expired is left out, and what is spent has
// the form that folding gives it, so that two replicas that tidied at different moments write the same bytes. It
// returns nil if nothing is left.
func (c *chunk) appendRow(b []byte, g *group, key uint64, now int64) []byte {
	n := 0
	more := false // some entry has what most have not
	for i := range c.slots {
		l := &c.slots[i]
		if l.state == slotFree {
			continue
		}
		if _, ok := g.view(key<<chunkShift|uint64(l.low), l, now); ok {
			n++
			more = more || l.kept || g.spentKeeps(l, now) || l.base != 0 || l.dep != 0 || g.notes[key<<chunkShift|uint64(l.low)] != ""
		}
	}
	if n == 0 {
		return nil
	}
	b = append(b, rowVersion, flags(more))
	b = binary.AppendUvarint(b, uint64(n))
	var low uint16
	var granted int64
	var epoch, ms uint64
	for i := range c.slots {
		l := &c.slots[i]
		if l.state == slotFree {
			continue
		}
		v, ok := g.view(key<<chunkShift|uint64(l.low), l, now)
		if !ok {
			continue
		}
		l = &v
		b = binary.AppendUvarint(b, uint64(l.low-low))
		state := byte(l.state)
		if l.routed {
			state |= routedBit
		}
		b = append(b, state)
		b = binary.AppendUvarint(b, uint64(l.count))
		b = binary.AppendUvarint(b, uint64(l.consumer))
		b = appendVarint(b, int64(l.epoch-epoch))
		b = appendVarint(b, l.granted-granted)
		b = appendTime(b, l.deadline, l.granted)
		b = appendTime(b, l.expiry, l.granted)
		b = appendVarint(b, int64(l.stream.Ms-ms))
		b = binary.AppendUvarint(b, l.stream.Seq)
		if more {
			base := uint64(l.base) << 1
			if l.kept {
				base |= 1
			}
			b = binary.AppendUvarint(b, base)
			b = binary.AppendUvarint(b, l.dep)
			b = appendBytes(b, g.notes[key<<chunkShift|uint64(l.low)])
		}
		low, granted, epoch, ms = l.low, l.granted, l.epoch, l.stream.Ms
	}
	return b
}

// appendTime appends a time relative to another; never has a form of its own.
func appendTime(b []byte, at, from int64) []byte {
	if at == never {
		return append(b, 1)
	}
	// Zigzag would use odd numbers for negative values; here odd means never, so the sign goes one bit up.
	d := at - from
	return binary.AppendUvarint(b, (uint64(d<<1)^uint64(d>>63))<<1)
}

func (r *reader) time(from int64) int64 {
	u := r.uvarint()
	if u&1 != 0 {
		return never
	}
	u >>= 1
	return from + (int64(u>>1) ^ -int64(u&1))
}

// routedBit marks a routed lease in its stored state.
const routedBit = 0x80

// parseChunk reads the chunk of g with that key; notes go to the group.
func parseChunk(g *group, key uint64, row []byte) (*chunk, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return nil, rowError(rowChunk, v)
	}
	more := r.flags(1) != 0
	n := r.count(10)
	if n > chunkMask+1 {
		return nil, errMalformed
	}
	c := &chunk{slots: make([]lease, 0, n), stored: true}
	var prev lease
	for i := range n {
		d := r.upTo(chunkMask)
		if i > 0 && d == 0 || uint64(prev.low)+d > chunkMask {
			return nil, errMalformed
		}
		state := r.u8()
		l := lease{low: prev.low + uint16(d), state: leaseState(state &^ routedBit), routed: state&routedBit != 0, count: uint32(r.upTo(1<<32 - 1)), consumer: uint32(r.upTo(1<<32 - 1))}
		l.epoch = prev.epoch + uint64(r.varint())
		l.granted = prev.granted + r.varint()
		l.deadline = r.time(l.granted)
		l.expiry = r.time(l.granted)
		l.stream = StreamID{Ms: prev.stream.Ms + uint64(r.varint()), Seq: r.uvarint()}
		if more {
			base := r.upTo(uint64(l.count)<<1 | 1)
			l.base, l.kept = uint32(base>>1), base&1 != 0
			l.dep = r.uvarint()
			g.note(key<<chunkShift|uint64(l.low), r.bytes())
		}
		if r.bad || l.state == slotFree || l.state > parked || l.routed && l.state != leased {
			return nil, errMalformed
		}
		c.slots = append(c.slots, l)
		prev = l
	}
	c.live = n
	return c, r.err()
}

// state is the part of the replicated state that belongs to no topic.
type state struct {
	index, term uint64
	stamp       Stamp
	level       uint32
	clusterID   string
	secret      []byte
	// chain is the rolling hash over all entries applied.
	chain uint64
	// incarnations numbers topics and groups, intakeCount numbers intakes. Neither number is used twice.
	incarnations, intakeCount uint64
	// absent is the version of every key that does not exist: the index of the last entry in which one came or went.
	absent             uint64
	inSync             InSync
	members            []Member
	configuration      []byte
	configurationIndex uint64
	// matured is the last of the due messages that were looked at.
	matured dueKey
}

func (s *state) appendRow(b []byte) []byte {
	b = append(b, rowVersion)
	b = binary.AppendUvarint(b, s.index)
	b = binary.AppendUvarint(b, s.term)
	return s.appendRest(b)
}

// appendRest appends what replicas at equal state agree upon: an entry without content moves the index alone.
func (s *state) appendRest(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(s.stamp.Cluster))
	b = binary.AppendUvarint(b, uint64(s.stamp.Wall))
	b = binary.AppendUvarint(b, uint64(s.level))
	b = appendBytes(b, s.clusterID)
	b = appendBytes(b, s.secret)
	b = binary.LittleEndian.AppendUint64(b, s.chain)
	b = binary.AppendUvarint(b, s.incarnations)
	b = binary.AppendUvarint(b, s.intakeCount)
	b = binary.AppendUvarint(b, s.absent)
	b = binary.AppendUvarint(b, s.inSync.Epoch)
	b = binary.AppendUvarint(b, uint64(len(s.inSync.Nodes)))
	for _, n := range s.inSync.Nodes {
		b = appendBytes(b, n)
	}
	b = binary.AppendUvarint(b, uint64(len(s.members)))
	for _, m := range s.members {
		b = appendBytes(b, m.ID)
		b = appendBool(b, m.Voter)
	}
	b = appendBytes(b, s.configuration)
	b = binary.AppendUvarint(b, s.configurationIndex)
	b = binary.AppendUvarint(b, uint64(s.matured.due))
	b = binary.AppendUvarint(b, s.matured.topic)
	return binary.AppendUvarint(b, s.matured.index)
}

func parseState(row []byte) (state, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return state{}, rowError(rowState, v)
	}
	var s state
	s.index, s.term = r.uvarint(), r.uvarint()
	s.stamp = Stamp{Cluster: int64(r.upTo(1 << 61)), Wall: int64(r.upTo(1 << 61))}
	s.level = uint32(r.upTo(1<<32 - 1))
	s.clusterID = r.str()
	s.secret = slices.Clone(r.bytes())
	s.chain = r.u64()
	s.incarnations, s.intakeCount, s.absent = r.uvarint(), r.uvarint(), r.uvarint()
	s.inSync.Epoch = r.uvarint()
	for range r.count(1) {
		s.inSync.Nodes = append(s.inSync.Nodes, NodeID(r.bytes()))
	}
	for range r.count(2) {
		s.members = append(s.members, Member{ID: NodeID(r.bytes()), Voter: r.bool()})
	}
	s.configuration = slices.Clone(r.bytes())
	s.configurationIndex = r.uvarint()
	s.matured = dueKey{due: int64(r.upTo(1 << 61)), topic: r.uvarint(), index: r.uvarint()}
	if err := r.err(); err != nil {
		return state{}, err
	}
	if s.level > levelMax {
		return state{}, &UnknownError{What: "feature level", Value: uint64(s.level)}
	}
	return s, nil
}

func (s *state) meta() Meta {
	return Meta{Index: s.index, Term: s.term, Configuration: s.configuration, ConfigurationIndex: s.configurationIndex}
}

// floor says where the stored rows of a topic begin: all below is removed.
type floor struct {
	offset, index uint64
	stream        StreamID
}

func (f floor) appendRow(b []byte) []byte {
	b = append(b, rowVersion)
	b = binary.AppendUvarint(b, f.offset)
	b = binary.AppendUvarint(b, f.index)
	return f.stream.append(b)
}

func parseFloor(row []byte) (floor, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return floor{}, rowError(rowFloor, v)
	}
	f := floor{offset: r.uvarint(), index: r.uvarint(), stream: r.streamID()}
	return f, r.err()
}

// sortedKeys returns the keys of m in order; apply and the encoders never range over a map otherwise.
func sortedKeys[K ~uint64 | ~string, V any](m map[K]V) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Slice(keys, func(i, j int) bool { return keys[i] < keys[j] })
	return keys
}
