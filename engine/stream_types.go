package engine

import (
	"math"
	"slices"
	"time"
)

// The commands of the Valkey front end. The front end parses arguments and words replies; whether a key
// exists, what type it has and how its IDs lie is judged here, and said in codes:
//
//	errs.TopicNotFound     no such key (XREADGROUP and what else needs both: or GroupNotFound)
//	errs.GroupNotFound     no such group; for XREADGROUP Result.Count says at which stream
//	errs.WrongType         the key holds another type
//	errs.GroupExists       BUSYGROUP
//	errs.StreamIDTooLow    XADD not above the top item; XSETID below it
//	errs.StreamIDZero      XADD 0-0
//	errs.StreamExhausted   XADD behind the greatest ID
//	errs.StreamIDDeleted   XSETID below the greatest deleted ID
//	errs.StreamCountTooLow XSETID ENTRIESADDED below the length
//	errs.KeyChanged        a watched key changed: EXEC answers null
//	errs.ReservedConsumer  the consumer's name belongs to the queue protocol
//	errs.UnsettledLimit    XREADGROUP > with the group full and nothing due: OOM
//	errs.MemoryLimit       strings or COPY beyond what the node keeps: OOM
//
// Numbers, replies to XACK, XDEL, DEL and the like, are in Result.Count. Where a key or group that is absent
// is no error in Valkey (XACK, XDEL, XTRIM, DEL), the code is OK and the count 0.
const (
	CmdStreamAdd       Kind = 64 // XADD
	CmdStreamDelete    Kind = 65 // XDEL, XDELEX
	CmdStreamTrim      Kind = 66 // XTRIM
	CmdStreamSetID     Kind = 67 // XSETID
	CmdStreamGroup     Kind = 68 // XGROUP CREATE, SETID, DESTROY, CREATECONSUMER, DELCONSUMER
	CmdStreamReadGroup Kind = 69 // XREADGROUP
	CmdStreamAck       Kind = 70 // XACK, XACKDEL
	CmdStreamClaim     Kind = 71 // XCLAIM
	CmdStreamAutoClaim Kind = 72 // XAUTOCLAIM
	CmdStreamNack      Kind = 73 // XNACK
	CmdKeyDelete       Kind = 74 // DEL, UNLINK
	CmdKeyRename       Kind = 75 // RENAME, RENAMENX
	CmdKeyCopy         Kind = 76 // COPY
	CmdKeyExpire       Kind = 77 // EXPIRE, PEXPIRE, EXPIREAT, PEXPIREAT, PERSIST
	CmdStringSet       Kind = 78 // SET
	CmdStringGetDel    Kind = 79 // GETDEL
	CmdFlush           Kind = 80 // FLUSHALL, FLUSHDB
	CmdExec            Kind = 81 // MULTI … EXEC

	cmdStreamFirst = CmdStreamAdd
	cmdStreamLast  = CmdExec
)

// Stores reports whether a command of the kind adds to what is stored: its acknowledgement waits for all in-sync
// zones by default, and it is refused while a disk is full. What only moves along what is stored (receives,
// acknowledgements, claims) waits for a majority.
func (k Kind) Stores() bool {
	switch k {
	case CmdPublish, CmdUploadOpen, CmdUploadPart, CmdUploadCommit, CmdStreamAdd, CmdStreamSetID, CmdStreamGroup, CmdKeyRename, CmdKeyCopy, CmdKeyExpire, CmdStringSet, CmdExec:
		return true
	}
	return false
}

// HTTPConsumer is the name under which leases of the queue protocol show among a group's consumers. Nobody
// else may use it.
const HTTPConsumer = "tercet:http"

// StreamIDMin and StreamIDMax are what "-" and "+" stand for.
var (
	StreamIDMin = StreamID{}
	StreamIDMax = StreamID{Ms: math.MaxUint64, Seq: math.MaxUint64}
)

// Compare orders IDs.
func (id StreamID) Compare(o StreamID) int {
	switch {
	case id.Ms != o.Ms:
		if id.Ms < o.Ms {
			return -1
		}
		return 1
	case id.Seq < o.Seq:
		return -1
	case id.Seq > o.Seq:
		return 1
	}
	return 0
}

func (id StreamID) less(o StreamID) bool { return id.Ms < o.Ms || id.Ms == o.Ms && id.Seq < o.Seq }

// Next is the lowest ID above id, false for the greatest, which has none.
func (id StreamID) Next() (StreamID, bool) { return id.next(), id != StreamIDMax }

// Prev is the greatest ID below id, false for 0-0, which has none.
func (id StreamID) Prev() (StreamID, bool) {
	switch {
	case id.Seq > 0:
		return StreamID{Ms: id.Ms, Seq: id.Seq - 1}, true
	case id.Ms > 0:
		return StreamID{Ms: id.Ms - 1, Seq: math.MaxUint64}, true
	}
	return id, false
}

// AddID says how a StreamAdd gets its ID.
type AddID uint8

// The forms of the ID of XADD.
const (
	AddAuto     AddID = 0 // *
	AddAutoSeq  AddID = 1 // ms-*: StreamAdd.ID.Ms counts
	AddExplicit AddID = 2 // ms-seq
)

// TrimBy says what a Trim keeps.
type TrimBy uint8

// The strategies of trimming.
const (
	TrimNone   TrimBy = 0
	TrimMaxLen TrimBy = 1
	TrimMinID  TrimBy = 2
)

// RefPolicy says what deleting an entry does to references to it from pending lists.
type RefPolicy uint8

// The policies of XDELEX, XACKDEL and trimming.
const (
	KeepRef RefPolicy = 0 // pending lists keep it
	DelRef  RefPolicy = 1 // it leaves every pending list
	Acked   RefPolicy = 2 // it is deleted only once every group was given it and has acknowledged it
)

// Trim is the trimming part of XADD and XTRIM.
type Trim struct {
	By     TrimBy
	MaxLen uint64
	MinID  StreamID
	// Approx (~) removes whole runs of 100 entries only, and no more than Limit entries if that is not 0.
	Approx bool
	Limit  uint64
	Refs   RefPolicy
}

// StreamAdd appends an entry. Result.Published.Stream is its ID; Result.Code is errs.TopicNotFound if
// NoCreate found no key.
type StreamAdd struct {
	Key      string
	By       AddID
	ID       StreamID
	NoCreate bool
	Trim     Trim
	// Token makes the addition idempotent (IDMP), with AddAuto only: another one with the same token within the
	// window of its retention answers the first one's ID and adds nothing; Result.Published.Kinds[0] is then
	// KindDuplicate, and the ID 0-0 if the first one is not there any more or not visible yet. Empty for none.
	Token string
	// Delay makes the entry visible later, with AddAuto only: it gets its ID then, Result.Published.Stream is 0-0 and
	// Published.Kinds[0] KindDelayed. Retention bounds its life. Beyond Valkey, zero for none. Whole seconds.
	Delay, Retention time.Duration
	// Fields are names and values in turn.
	Fields [][]byte
}

// StreamDelete removes entries. XDEL: Result.Count is the number removed. With Each (XDELEX)
// Result.Stream.Statuses has one Status per ID.
type StreamDelete struct {
	Key  string
	IDs  []StreamID
	Each bool
	Refs RefPolicy
}

// The statuses of XDELEX and XACKDEL.
const (
	StatusNotFound int8 = -1
	StatusDeleted  int8 = 1
	StatusKept     int8 = 2 // some group still refers to it
)

// StreamTrim trims. Result.Count is the number removed.
type StreamTrim struct {
	Key  string
	Trim Trim
}

// StreamSetID sets a stream's last ID.
type StreamSetID struct {
	Key string
	ID  StreamID
	// EntriesAdded replaces the counter unless it is negative.
	EntriesAdded int64
	// MaxDeleted replaces the greatest deleted ID unless it is 0-0.
	MaxDeleted StreamID
}

// GroupOp is what a StreamGroup does.
type GroupOp uint8

// The operations of XGROUP.
const (
	GroupCreate      GroupOp = 1
	GroupSetID       GroupOp = 2
	GroupDestroy     GroupOp = 3 // Result.Count 1 if it existed
	GroupAddConsumer GroupOp = 4 // Result.Count 1 if it is new
	GroupDelConsumer GroupOp = 5 // Result.Count is the number of pending entries dropped
)

// StreamGroup is XGROUP.
type StreamGroup struct {
	Op                   GroupOp
	Key, Group, Consumer string
	// ID is the position for Create and SetID; Last ($) means the stream's last ID instead.
	ID   StreamID
	Last bool
	// Create (MKSTREAM) makes an empty stream if there is none.
	Create bool
	// EntriesRead sets the group's counter; negative means unknown.
	EntriesRead int64
}

// StreamPosition is one stream of a read and where in it to begin.
type StreamPosition struct {
	Key string
	// ID: entries above it are given.
	ID StreamID
	// New is ">" in StreamReadGroup. In QueryStreamRead it is "$": the last ID as of now.
	New bool
	// Tail is "+" in QueryStreamRead: the last entry.
	Tail bool
}

// StreamReadGroup is XREADGROUP. Result.Stream.Reads has the streams that have something to give, in order: history reads
// always, new ones only with entries. Nothing at all: Result.Stream is nil, or Result.Parked is set.
type StreamReadGroup struct {
	Group, Consumer string
	Streams         []StreamPosition
	// Count bounds the entries of each stream, Total those of all together; 0 is no bound. At most 4 MiB are given,
	// counted over all, or Size bytes if that is less and not 0; the first entry is given whatever its size.
	Count, Total, Size uint64
	NoAck              bool
	// Claim makes ">" take pending entries idle for at least ClaimIdle milliseconds before the new ones.
	Claim     bool
	ClaimIdle int64
	// Park, with ">" alone, makes a read that finds nothing leave no result, as Receive.Park does.
	Park bool
}

// StreamAck is XACK: Result.Count is the number of entries acknowledged. With Delete (XACKDEL) the entries
// are also removed from the stream as Refs says, and Result.Stream.Statuses has one Status per ID.
type StreamAck struct {
	Key, Group string
	IDs        []StreamID
	Delete     bool
	Refs       RefPolicy
}

// StreamClaim is XCLAIM: Result.Stream.Entries are the claimed entries.
type StreamClaim struct {
	Key, Group, Consumer string
	MinIdle              int64 // milliseconds
	IDs                  []StreamID
	// Idle (milliseconds ago) or Time (Unix ms) set the delivery time if they are not negative. Time wins.
	Idle, Time int64
	// RetryCount sets the delivery count unless it is negative.
	RetryCount int64
	Force      bool
	JustID     bool
	// LastID raises the group's last-delivered ID.
	LastID StreamID
}

// StreamAutoClaim is XAUTOCLAIM: Result.Stream has Entries, Deleted and Next (0-0 at the end).
type StreamAutoClaim struct {
	Key, Group, Consumer string
	MinIdle              int64 // milliseconds
	Start                StreamID
	Count                uint64 // at least 1
	JustID               bool
}

// NackMode says what giving back does to the delivery count.
type NackMode uint8

// The modes of XNACK.
const (
	NackSilent NackMode = 0 // the delivery does not count: count - 1
	NackFail   NackMode = 1 // the count stays
	NackFatal  NackMode = 2 // the count becomes the highest there is
)

// StreamNack is XNACK: pending entries of a group are given back at once, to be had by CLAIM, XAUTOCLAIM,
// XREADGROUP > and receives. Result.Count is their number.
type StreamNack struct {
	Key, Group string
	Mode       NackMode
	IDs        []StreamID
	// RetryCount sets the delivery count unless it is negative.
	RetryCount int64
	// Force makes entries pending that are not.
	Force bool
}

// KeyDelete is DEL and UNLINK: Result.Count is the number of keys removed.
type KeyDelete struct{ Keys []string }

// KeyRename is RENAME, or RENAMENX with KeepTarget; Result.Count is 1 if it was done.
type KeyRename struct {
	From, To   string
	KeepTarget bool
}

// KeyCopy is COPY; Result.Count is 1 if it was done.
type KeyCopy struct {
	From, To string
	Replace  bool
}

// When is the condition of an EXPIRE or SET.
type When uint8

// The conditions.
const (
	Always    When = 0
	IfAbsent  When = 1 // NX: EXPIRE only without an expiry, SET only without a key
	IfPresent When = 2 // XX: EXPIRE only with an expiry, SET only with a key
	IfGreater When = 3 // GT, EXPIRE only
	IfLess    When = 4 // LT, EXPIRE only
	IfSooner  When = 5 // XX LT: as IfLess, and only with an expiry
)

// Deadline is when a key expires: After milliseconds from now, or At a Unix time in milliseconds. Neither
// (both zero) is no deadline. The front end refuses what overflows.
type Deadline struct {
	Set      bool
	Absolute bool
	Ms       int64
}

// KeyExpire is the EXPIRE family, and PERSIST if By is not set. Result.Count is 1 if it was done. A deadline
// that has passed deletes the key.
type KeyExpire struct {
	Key  string
	By   Deadline
	When When
}

// StringSet is SET. Result.Count is 1 if it was done. With Get, Result.Stream.Value is the old value, nil if there was
// no key, and errs.WrongType refuses a key that holds no string.
type StringSet struct {
	Key     string
	Value   []byte
	By      Deadline
	KeepTTL bool
	When    When
	Get     bool
}

// StringGetDel is GETDEL: Result.Stream.Value is nil if there was no key.
type StringGetDel struct{ Key string }

// Flush is FLUSHALL: every topic and string goes, whoever created it. Documents stay.
type Flush struct{}

// Watch is one key of WATCH with its version as QueryKeyVersion answered it.
type Watch struct {
	Key     string
	Version uint64
}

// ExecOp is one command of a transaction: a write, or a read, which is answered at its place.
type ExecOp struct {
	Command Command
	Query   *Query
}

// Exec applies several commands at one place of the log. Result.Stream.Exec has one result each; refusals
// concern their own command alone. If a watched key has changed nothing is done: errs.KeyChanged. Reads are
// answered on the node that proposed the entry; a repeat of unknown outcome that holds reads ends as
// errs.OutcomeUnknown. Parking commands and Exec itself cannot be part of it.
type Exec struct {
	Ops     []ExecOp
	Watches []Watch
}

// StreamResult is what stream commands give beyond a code, a count and an ID.
type StreamResult struct {
	// Reads is XREADGROUP's.
	Reads []StreamRead
	// Entries, Deleted and Next are XCLAIM's and XAUTOCLAIM's.
	Entries []StreamEntry
	Deleted []StreamID
	Next    StreamID
	// Statuses is XDELEX's and XACKDEL's.
	Statuses []int8
	// Value is GETDEL's and SET GET's: nil without a key.
	Value []byte
	// Exec is a transaction's.
	Exec []ExecResult
}

// ExecResult is the result of one command of a transaction: of a read, Answer is set unless Result.Code refuses it.
type ExecResult struct {
	Result Result
	Answer *Answer

	read bool // on every node, also where it is not answered
}

// StreamRead is what a read gives of one stream.
type StreamRead struct {
	Key     string
	Entries []StreamEntry
	// From is the ID behind which the read began: "$" resolved, to ask again with.
	From StreamID
	// Cut is set when more entries exist than the size of one answer allows: ask on behind the last one.
	Cut bool

	fresh bool // XREADGROUP with ">": what is gone before it is loaded is left out
}

// StreamEntry is an entry as Valkey clients see it.
type StreamEntry struct {
	ID StreamID
	// Fields are names and values in turn. A message of the queue protocol has the fields body and
	// content-type, and one for each of its headers.
	Fields [][]byte
	// Deleted: the entry is pending and exists no more.
	Deleted bool
	// Claimed is set for what XREADGROUP CLAIM took over, and for what is parked: it is given with Idle and Count.
	Claimed bool
	// Idle is how long ago it was last delivered in milliseconds, Count how often it was, as of before this.
	Idle  int64
	Count uint64

	// topic and offset are where Load finds the fields; topic 0 is nowhere.
	topic, offset uint64
	// stagedIndex and stagedPos tell, of one that was delayed, where its record is; index 0 for others.
	stagedIndex uint64
	stagedPos   uint32
	loaded      bool
}

// The stream and key queries. Key is Query.Topic, Query.Group the group; what else they need is in
// Query.Stream, which may be nil. Refusals are *errs.Error with the codes listed above.
const (
	// QueryStreamRange is XRANGE and XREVRANGE: Start to End, both included; Answer.Stream.Reads has one element.
	// A key that is absent gives none.
	QueryStreamRange QueryKind = 64
	// QueryStreamRead is XREAD: one element of Answer.Stream.Reads for each of Streams, in their order, those without
	// entries included, with From.
	QueryStreamRead QueryKind = 65
	// QueryStreamLen is XLEN: Answer.Stream.Count.
	QueryStreamLen QueryKind = 66
	// QueryStreamInfo is XINFO STREAM: Answer.Stream.Info. Full adds entries, groups, pending entries, consumers, Count of
	// each (0: all).
	QueryStreamInfo QueryKind = 67
	// QueryStreamGroups is XINFO GROUPS: Answer.Stream.Info.Groups.
	QueryStreamGroups QueryKind = 68
	// QueryStreamConsumers is XINFO CONSUMERS: Answer.Stream.Info.Groups has one element with Consumers.
	QueryStreamConsumers QueryKind = 69
	// QueryPending is XPENDING's summary: Answer.Stream.Pending.
	QueryPending QueryKind = 70
	// QueryPendingRange is XPENDING with a range: Start to End, Count, MinIdle, Consumer; Answer.Stream.Pending.Entries.
	QueryPendingRange QueryKind = 71
	// QueryKeys answers about Keys, one element of Answer.Stream.Keys each: EXISTS, TYPE, the TTL family, WATCH.
	QueryKeys QueryKind = 72
	// QueryScan is SCAN and KEYS: names of keys behind Cursor, at most Count looked at; Answer.Stream.Keys and Next.
	QueryScan QueryKind = 73
	// QueryString is GET: Answer.Stream.Value, nil without a key.
	QueryString QueryKind = 74
	// QueryDBSize is DBSIZE: Answer.Stream.Count.
	QueryDBSize QueryKind = 75
	// QueryRandomKey is RANDOMKEY: the key at Cursor modulo their number; Answer.Stream.Keys has at most one.
	QueryRandomKey QueryKind = 76

	// QueryStreamParked lists what a group has parked from Cursor on, at most Count: Answer.Stream.Parked and Next.
	QueryStreamParked QueryKind = 77

	queryStreamFirst = QueryStreamRange
	queryStreamLast  = QueryStreamParked
)

// StreamQuery is the part of a Query that stream and key queries need.
type StreamQuery struct {
	Consumer   string
	Start, End StreamID
	Reverse    bool
	// Count bounds the entries; 0 is no bound. Total and Size are those of StreamReadGroup, for QueryStreamRead.
	Count, Total, Size uint64
	MinIdle            int64 // milliseconds
	Full               bool
	Streams            []StreamPosition
	Keys               []string
	// Cursor and Match belong to QueryScan: Match is a glob pattern, empty for all; Type is "stream" or "string" or empty.
	Cursor uint64
	Match  string
	Type   string
}

// StreamAnswer is what stream and key queries give.
type StreamAnswer struct {
	Reads   []StreamRead
	Count   uint64
	Info    *StreamInfo
	Pending *PendingInfo
	Keys    []KeyInfo
	// Next is the cursor behind which a scan goes on, 0 at the end.
	Next   uint64
	Value  []byte
	Parked []ParkedEntry
}

// HasEntries reports whether a read gave anything.
func (a *StreamAnswer) HasEntries() bool {
	return a != nil && slices.ContainsFunc(a.Reads, func(r StreamRead) bool { return len(r.Entries) > 0 })
}

// ParkedEntry is an entry that a group has parked: Entry.Idle is since when, Entry.Count how often it was delivered.
type ParkedEntry struct {
	Entry StreamEntry
	// Error is the last reason a release gave, empty if there was none.
	Error string
}

// KeyType is what a key holds.
type KeyType uint8

// The types of keys.
const (
	KeyNone   KeyType = 0
	KeyStream KeyType = 1
	KeyString KeyType = 2
)

// KeyInfo describes a key; one that does not exist has KeyNone.
type KeyInfo struct {
	Name string
	Type KeyType
	// TTL is how many milliseconds are left, negative for no deadline; ExpiresAt the Unix time in milliseconds.
	TTL, ExpiresAt int64
	// Version changes with every change of the key, for WATCH.
	Version uint64
}

// StreamInfo is XINFO STREAM.
type StreamInfo struct {
	Length                uint64
	Last                  StreamID // last-generated-id
	MaxDeleted            StreamID
	EntriesAdded          uint64
	FirstID               StreamID // recorded-first-entry-id, 0-0 when empty
	GroupCount            int
	First, Final          *StreamEntry // first-entry and last-entry, nil when empty
	Entries               []StreamEntry
	Groups                []StreamGroupInfo
	RadixKeys, RadixNodes uint64 // radix-tree-keys, radix-tree-nodes: as if nodes had 100 entries
}

// StreamGroupInfo is one group of XINFO.
type StreamGroupInfo struct {
	Name          string
	LastDelivered StreamID
	// EntriesRead and Lag are negative when unknown.
	EntriesRead, Lag int64
	Pending          uint64
	ConsumerCount    int
	// Entries are the pending ones, Consumers all of them, in XINFO STREAM FULL and XINFO CONSUMERS.
	Entries   []PendingEntry
	Consumers []ConsumerInfo
}

// ConsumerInfo is one consumer of XINFO. Times are Unix ms; ActiveAt is negative if it was never given anything.
type ConsumerInfo struct {
	Name             string
	Pending          uint64
	SeenAt, ActiveAt int64
	// Idle and Inactive are milliseconds; Inactive is negative if ActiveAt is.
	Idle, Inactive int64
	Entries        []PendingEntry
}

// PendingInfo is XPENDING.
type PendingInfo struct {
	Total     uint64
	Min, Max  StreamID
	Consumers []ConsumerInfo // those with pending entries, by name: Name and Pending
	Entries   []PendingEntry
}

// PendingEntry is one pending entry.
type PendingEntry struct {
	ID       StreamID
	Consumer string
	// Idle is in milliseconds, DeliveredAt Unix ms.
	Idle, DeliveredAt int64
	Count             uint64
}

// HasContents reports whether LoadResult has something to fill.
func (r *Result) HasContents() bool {
	return len(r.Deliveries) > 0 || r.Stream != nil && (len(r.Stream.Reads) > 0 || len(r.Stream.Entries) > 0 || len(r.Stream.Exec) > 0)
}

// LoadResult fills the contents of what a command gave: of its deliveries as Load does, and of its entries.
// Entries whose contents a checkpoint has removed in the meantime are left out, or marked Deleted in a read of a
// consumer's own pending entries: they stay pending, as those that were deleted while pending.
func (e *Engine) LoadResult(r *Result) error {
	e.dbMu.RLock()
	defer e.dbMu.RUnlock()
	if len(r.Deliveries) > 0 {
		if err := e.loadAll(r.Deliveries); err != nil {
			return err
		}
	}
	if r.Stream == nil {
		return nil
	}
	if err := e.loadEntries(r.Stream.pending()); err != nil {
		return err
	}
	r.Stream.dropGone()
	return nil
}

// gone reports whether an entry is not there any more.
func (s StreamEntry) gone() bool { return s.Deleted }

// dropGone leaves out what was gone before it could be loaded.
func (s *StreamResult) dropGone() {
	s.Entries = slices.DeleteFunc(s.Entries, StreamEntry.gone)
	for i := range s.Reads {
		if read := &s.Reads[i]; read.fresh {
			read.Entries = slices.DeleteFunc(read.Entries, StreamEntry.gone)
		}
	}
	s.Reads = slices.DeleteFunc(s.Reads, func(read StreamRead) bool { return read.fresh && len(read.Entries) == 0 })
	for i := range s.Exec {
		if n := s.Exec[i].Result.Stream; n != nil {
			n.dropGone()
		}
	}
}

// pending lists the entries that have to be loaded.
func (s *StreamResult) pending() []*StreamEntry {
	var out []*StreamEntry
	for i := range s.Reads {
		for k := range s.Reads[i].Entries {
			out = append(out, &s.Reads[i].Entries[k])
		}
	}
	for i := range s.Entries {
		out = append(out, &s.Entries[i])
	}
	for i := range s.Exec {
		if n := s.Exec[i].Result.Stream; n != nil {
			out = append(out, n.pending()...)
		}
	}
	return out
}
