package engine

import (
	"time"

	"tercet.dev/tercet/internal/errs"
)

// Stamp is the pair of clocks every entry carries, in milliseconds, set by the leader that proposed it.
// Neither ever falls from one entry to the next.
type Stamp struct {
	// Cluster rules leases, delays, retention and idempotency keys. It advances with the leader's
	// monotonic clock from the last stamp and is not a date.
	Cluster int64
	// Wall is Unix time. It dates messages for people and makes stream IDs.
	Wall int64
}

// NodeID is a member's identity: its name and the incarnation of its data directory ("n1.5f3a…").
type NodeID string

// IntakeID names an intake: one node process's numbered sequence of commands. Zero is no intake: the
// command is applied each time it appears.
type IntakeID uint64

// StreamID is a position in a topic's log as Valkey clients see it ("ms-seq"). It strictly increases.
type StreamID struct{ Ms, Seq uint64 }

// MessageID names a message for ever: where in the replicated log it was published.
type MessageID struct {
	Shard uint16
	// Index is the raft index of the entry, Pos the message's position among the messages of that entry.
	Index uint64
	Pos   uint32
	Kind  MessageKind
	// OriginalIndex, OriginalPos and OriginalKind are set for KindDuplicate alone: the message the publish was a
	// duplicate of.
	OriginalIndex uint64
	OriginalPos   uint32
	OriginalKind  MessageKind
}

// Original returns the message a duplicate leads to, and any other ID itself.
func (id MessageID) Original() MessageID {
	if id.Kind != KindDuplicate {
		return id
	}
	return MessageID{Shard: id.Shard, Index: id.OriginalIndex, Pos: id.OriginalPos, Kind: id.OriginalKind}
}

// MessageKind tells how a message was published.
type MessageKind uint8

const (
	// KindPlain is a message that is visible from the moment it is published.
	KindPlain MessageKind = 1
	// KindDelayed is a message published with a delay.
	KindDelayed MessageKind = 2
	// KindDuplicate is a publish that an idempotency key dropped.
	KindDuplicate MessageKind = 3
)

// Kind is a command's type on the wire. Numbers are append-only.
type Kind uint8

// The command kinds.
const (
	CmdInit       Kind = 1 // cluster id, secret and first feature level, once
	CmdOpenIntake Kind = 2
	CmdTick       Kind = 3 // nothing but the entry's stamp
	CmdPublish    Kind = 4
	CmdReceive    Kind = 5
	CmdReceiveID  Kind = 6
	CmdSettle     Kind = 7 // acknowledge, extend, release: by receipt
	CmdShrink     Kind = 8
	CmdExpand     Kind = 9
	CmdAdvance    Kind = 10 // virtual clock
	CmdLevel      Kind = 11 // feature level
)

// Command is one request as it travels in a raft entry. Encoded commands start with kind and version.
type Command interface {
	Kind() Kind
	// AppendTo appends the encoded command to b.
	AppendTo(b []byte) []byte
}

// Init founds the cluster's replicated identity. Applied once; later ones are no-ops.
type Init struct {
	ClusterID string
	// Secret keys the check code of receipt handles and message IDs (32 bytes).
	Secret []byte
	Level  uint32
	// Refound gives an existing state a new cluster id (and, if Secret is not empty, a new secret): what is
	// left of a cluster after forced recovery is another cluster.
	Refound bool
}

// OpenIntake opens an intake for a node process and closes the node's earlier ones. Result.Intake is its ID.
type OpenIntake struct {
	Node NodeID
	// Nonce tells repeated proposals of one opening apart from a new one.
	Nonce uint64
}

// Tick carries time alone.
type Tick struct{}

// Publish appends messages to a topic, all or none.
type Publish struct {
	Topic    string
	Messages []NewMessage
}

// NewMessage is one message to be published.
type NewMessage struct {
	ContentType string
	// Headers are application and trace headers, in order, names in lower case.
	Headers   []Header
	Retention time.Duration // whole seconds, 0 for none
	// RetentionDefault asks for the topic's default retention; Retention is 0 then.
	RetentionDefault bool
	Delay            time.Duration // whole seconds
	// Key is the idempotency key, empty for none.
	Key string
	// Deployment is the partition, empty for none.
	Deployment string
	Body       []byte
	// Large stands for a body that was uploaded in parts; only UploadCommit sets it.
	Large *Large
	// Fields are names and values in turn, as XADD brings them, instead of ContentType, Headers and Body.
	Fields [][]byte
}

// Header is one name and value.
type Header struct{ Name, Value string }

// Receive leases up to Max messages of a topic for a group. A group that does not exist is created.
type Receive struct {
	Topic, Group string
	Max          int
	Visibility   time.Duration // whole seconds, > 0: a peek is a query, not a command
	// MaxConcurrency bounds the group's messages under lease; 0 is no bound.
	MaxConcurrency int
	Deployment     string
	// Latest makes a group that this receive creates start after everything stored.
	Latest bool
	// Park makes a receive that finds nothing leave no result: its number stays open in the intake, so that
	// the same command can be proposed again behind a publish.
	Park bool

	consumer string   // in the probe of a StreamReadGroup: it does not park before its consumer exists
	others   []string // likewise: the streams beside Topic that it reads
}

// ReceiveID leases one message by its ID.
type ReceiveID struct {
	Topic, Group   string
	ID             MessageID
	Visibility     time.Duration
	MaxConcurrency int
	Deployment     string
}

// Settle ends or changes leases.
type Settle struct {
	Topic, Group string
	Op           SettleOp
	// Visibility counts from the entry's stamp. For Extend it is the lease's new end, zero releases; for Release
	// it is the delay until the message is deliverable again.
	Visibility time.Duration
	Deployment string
	// Reason, of a Release, is kept as the message's last error for the group (limits.ReasonBytesMax).
	Reason   string
	Receipts []Receipt
}

// SettleOp is what a Settle does.
type SettleOp uint8

// The operations of Settle.
const (
	Acknowledge SettleOp = 1
	Extend      SettleOp = 2
	Release     SettleOp = 3
	// Route lets a ReceiveID of the group take the lease over: whoever holds it has told a consumer of the message
	// and waits for it to ask. The delivery that was counted for the lease is then the consumer's.
	Route SettleOp = 4
)

// Receipt is a decoded receipt handle: it names one grant of one message to one group.
type Receipt struct {
	Shard uint16
	// Topic and Group are incarnation numbers.
	Topic, Group uint64
	Offset       uint64
	// Epoch is the grant's number within the group; 0 is a peek's, which settles nothing.
	Epoch uint64
}

// Shrink takes a node out of the in-sync set. It applies only if Epoch is the set's.
type Shrink struct {
	Node  NodeID
	Epoch uint64
}

// Expand puts a member into the in-sync set. It applies only if Epoch is the set's.
type Expand struct {
	Node  NodeID
	Epoch uint64
}

// Advance adds to both clocks (virtual clock).
type Advance struct{ By time.Duration }

// Level raises the replicated feature level.
type Level struct{ Level uint32 }

// Result is what applying one command gave. Only the fields of its command's kind are set.
type Result struct {
	Code errs.Code
	// Repeat is set when the intake knew the command's number: the effect is that of an earlier entry, the
	// acknowledgement must still wait for the watermark of this one.
	Repeat bool
	// Parked is set for a Receive with Park that found nothing: no result is recorded, and the same number may
	// be proposed again. Code may then say why (ConcurrencyLimit, UnsettledLimit) for whoever gives up waiting.
	Parked bool
	// Intake is the result of OpenIntake.
	Intake IntakeID
	// Published is the result of Publish.
	Published Published
	// Deliveries are the result of Receive and ReceiveID, without bodies (see Engine.Load).
	Deliveries []Delivery
	// Codes has one code per receipt of a Settle.
	Codes []errs.Code
	// RetryAfter tells when a refused request may succeed (leases, delays).
	RetryAfter time.Duration
	// Inflight is the number under lease when ConcurrencyLimit or UnsettledLimit was answered.
	Inflight int
	// ExpiresAt is the message's wall expiry in Unix ms, with ExtendPastExpiry.
	ExpiresAt int64
	// Original is the first message, with Duplicate.
	Original MessageID
	// Revision is that of the document a Document command set.
	Revision uint64
	// Count is how many a command that works on several has found.
	Count int64
	// Next is where to go on when a command of several was cut short, 0 at the end.
	Next uint64
	// Upload names the upload that UploadOpen began.
	Upload uint64
	// Stream is what stream commands give beyond that, nil for nothing.
	Stream *StreamResult
}

// Published tells where the messages of one Publish went: Count messages with consecutive positions, offsets
// and, unless the topic's stream IDs say otherwise, sequence numbers.
type Published struct {
	Shard uint16
	Index uint64
	Pos   uint32
	Count uint32
	// Offset and Stream are those of the first message that is in the log; delayed messages and duplicates take
	// neither.
	Offset uint64
	Stream StreamID
	// Kinds has the kind of each message; nil means that all are plain.
	Kinds []MessageKind
	// Originals has, for each duplicate in order, the message it is one of.
	Originals []MessageID
	// IDs are the messages' own IDs where they do not follow from Index and Pos. The engine leaves it empty.
	IDs []MessageID
}

// isZero reports that nothing was published.
func (p *Published) isZero() bool { return p.Count == 0 && p.Index == 0 }

// ID returns the ID of the i-th message.
func (p *Published) ID(i int) MessageID {
	if p.IDs != nil {
		return p.IDs[i]
	}
	id := MessageID{Shard: p.Shard, Index: p.Index, Pos: p.Pos + uint32(i), Kind: KindPlain}
	if p.Kinds == nil {
		return id
	}
	id.Kind = p.Kinds[i]
	if id.Kind == KindDuplicate {
		n := 0
		for _, k := range p.Kinds[:i] {
			if k == KindDuplicate {
				n++
			}
		}
		o := p.Originals[n]
		id.OriginalIndex, id.OriginalPos, id.OriginalKind = o.Index, o.Pos, o.Kind
	}
	return id
}

// Delivery is one message given to a consumer.
type Delivery struct {
	ID      MessageID
	Receipt Receipt
	Stream  StreamID
	// Count is the number of deliveries to this group, this one included.
	Count uint32
	// PublishedAt, ExpiresAt and LeaseUntil are Unix ms.
	PublishedAt, ExpiresAt, LeaseUntil int64
	// What follows is filled by Engine.Load.

	// Gone is set by Load if the message expired between the grant and the load: it must not be shown.
	Gone        bool
	ContentType string
	Headers     []Header
	Deployment  string
	Body        []byte
	// Large stands in place of the body of a large message: it is read in parts (Engine.LoadPart).
	Large *Large

	// asFields asks Load for names and values in turn instead.
	asFields bool
	fields   [][]byte
	// copy asks for the record itself.
	copy *recordCopy
}

// Effects is what one Apply changed that the leader acts upon; followers ignore it. It is reused: Apply
// resets it first.
type Effects struct {
	// Deliverable lists groups that may now give something to a parked receive.
	Deliverable []GroupRef
	// Due lists groups with parked receives whose next message becomes deliverable earlier than NextDue said
	// before: whoever holds a timer for them sets it anew.
	Due []GroupRef
	// Appended names the topics that got entries or came to stand under this name, Topics is set when a topic came or went, and Documents names the tables
	// that changed. They are for whoever watches this node's state, on followers too.
	// Keys names the keys that changed otherwise, as WATCH sees it; a name may stand there more than once.
	Appended  []string
	Keys      []string
	Topics    bool
	Documents []string
	// InSync is set when the in-sync set changed.
	InSync bool
	// Configuration is set when the membership changed.
	Configuration bool

	// Answer is the caller's and not reset: this node proposed the entry, so the reads of an Exec are answered.
	Answer bool
}

// GroupRef names a group and, for receives that name one, the deployment they wait for.
type GroupRef struct{ Topic, Group, Deployment string }

// Meta is the durable checkpoint's place in the replicated log. It is the node's only snapshot.
type Meta struct {
	Index, Term uint64
	// Configuration is the encoded membership in force at Index, ConfigurationIndex where it was made.
	Configuration      []byte
	ConfigurationIndex uint64
}

// InSync is the replicated in-sync set.
type InSync struct {
	// Epoch rises by one with each change.
	Epoch uint64
	// Nodes are sorted.
	Nodes []NodeID
}

// Member is one voter or non-voter of the configuration as the engine knows it.
type Member struct {
	ID    NodeID
	Voter bool
}
