// Package limits declares every bound of Tercet once. A bound is enforced at the edge that meets the
// input first (server, compat, the transport), asserted in the core (engine, wal), and printed in the
// reference (docs/limits.md, checked by a test against this file).
package limits

import "time"

// Names.
const (
	// NameBytesMax bounds a topic, consumer group or deployment name on the queue protocol.
	NameBytesMax = 256
	// KeyBytesMax bounds any topic name inside the engine: a Valkey key may be longer than a queue name.
	KeyBytesMax = 16 << 10
)

// Messages.
const (
	// MessageBytesMax bounds one message's body. Larger ones need staged parts.
	MessageBytesMax = 1 << 20
	// FieldsBytesMax bounds the names and values of one entry of XADD, with a few bytes for each.
	FieldsBytesMax = 3 << 20
	// HeaderBytesMax bounds all application headers of one message together (names and values).
	HeaderBytesMax = 16 << 10
	// ContentTypeBytesMax bounds a content type.
	ContentTypeBytesMax = 1 << 10
	// BatchMessagesMax bounds the messages of one publish command.
	BatchMessagesMax = 100
	// BatchBytesMax bounds the body of a batch that is held in memory and stored by one entry, framing included.
	BatchBytesMax = 3 << 20
	// LargeBatchBytesMax bounds the body of one batch request, framing included.
	LargeBatchBytesMax = 100 << 20
	// ReceiveMessagesMax bounds the messages of one receive.
	ReceiveMessagesMax = 10
	// IdempotencyKeyBytesMax bounds an idempotency key.
	IdempotencyKeyBytesMax = 256
)

// Times.
const (
	// RetentionMin is the shortest retention of a message.
	RetentionMin = 60 * time.Second
	// RetentionMax is the longest retention of a message.
	RetentionMax = 7 * 24 * time.Hour
	// RetentionDefault is the retention of a message that names none.
	RetentionDefault = 24 * time.Hour
	// DelayMax bounds a message's delay, which is never longer than its retention either.
	DelayMax = 7 * 24 * time.Hour
	// VisibilityMax bounds a lease, and each extension of one, counted from the request.
	VisibilityMax = time.Hour
	// VisibilityDefault is the lease of a receive that names none.
	VisibilityDefault = 60 * time.Second
	// WaitMax bounds a long poll.
	WaitMax = 60 * time.Second
)

// Replication.
const (
	// EntryBytesTarget is where the coalescer closes a raft entry.
	EntryBytesTarget = 512 << 10
	// EntryBytesMax bounds one raft entry; a command that would exceed it is refused before it is proposed.
	EntryBytesMax = 4 << 20
	// FrameBytesMax bounds one frame between nodes; checked before anything is allocated.
	FrameBytesMax = 8 << 20
	// WALRecordBytesMax bounds one record of the write-ahead log.
	WALRecordBytesMax = 8 << 20
	// UnsyncedBytesMax is how much unsynced data makes the coalescer stop proposing.
	UnsyncedBytesMax = 32 << 20
	// UnsyncedAgeMax is how old unsynced data makes the coalescer stop proposing.
	UnsyncedAgeMax = 500 * time.Millisecond
	// StallMax is the age of unsynced data after which a node withholds heartbeats and closes for service.
	StallMax = 2 * time.Second
	// IntakeSilenceMax of cluster time closes an intake.
	IntakeSilenceMax = 10 * time.Minute
	// IntakeOpenMax bounds the commands of one intake without a settled outcome.
	IntakeOpenMax = 1 << 16
)

// Groups.
const (
	// UnsettledPerGroupMax bounds everything a queue group has been given and has not settled.
	UnsettledPerGroupMax = 100_000
	// UnsettledPerValkeyGroupMax is the same for a group that Valkey commands created.
	UnsettledPerValkeyGroupMax = 1_000_000
	// FoldPerCommandMax bounds the expired leases that one command tidies.
	FoldPerCommandMax = 1000
	// GroupsPerTopicMax bounds the consumer groups of one topic.
	GroupsPerTopicMax = 4096
	// TopicsMax bounds the topics of one shard.
	TopicsMax = 1_000_000
	// ConsumersPerGroupMax bounds the named consumers of one group.
	ConsumersPerGroupMax = 100_000
	// StringBytesMax bounds the value of a key that holds a string.
	StringBytesMax = 1 << 20
	// StringsBytesMax bounds all such keys together, which are kept in memory, with 128 bytes for each beyond name and value.
	StringsBytesMax = 64 << 20
	// CopyBytesMax bounds the bytes of a stream that COPY copies, and of all that one entry of the log copies.
	CopyBytesMax = 16 << 20
	// CopyEntriesMax bounds the entries of a stream that COPY copies; with pending entries, consumers and groups they may be twice as many.
	CopyEntriesMax = 100_000
	// ReasonBytesMax bounds the reason given with a release.
	ReasonBytesMax = 1 << 10
	// ReasonsPerGroupBytesMax bounds the reasons that a group keeps; later ones are dropped.
	ReasonsPerGroupBytesMax = 16 << 20
	// ParkedPerGroupMax bounds the messages a group has parked; at the limit no more are given up.
	ParkedPerGroupMax = 100_000
	// ParkedRetentionMax bounds how long a parked message is kept beyond its own retention.
	ParkedRetentionMax = 30 * 24 * time.Hour
	// ParkedPerCommandMax bounds the messages that one redrive or drop works on.
	ParkedPerCommandMax = 1000
	// DeploymentsPerGroupMax bounds the deployments that a group keeps positions of.
	DeploymentsPerGroupMax = 4096
)

// Delays.
const (
	// MaturePerEntryMax bounds the delayed messages that one entry makes visible.
	MaturePerEntryMax = 1000
	// DropPerEntryMax bounds the messages at the head of a topic with dropAcknowledged that one entry looks at.
	DropPerEntryMax = 1000
	// DelayedChangesMax bounds the cancelled and moved messages whose time has not come.
	DelayedChangesMax = 100_000
)

// Large messages.
const (
	// LargeMessageBytesMax bounds the body of a message that is uploaded in parts.
	LargeMessageBytesMax = 100 << 20
	// PartBytes is the size of each part of an upload but the last.
	PartBytes = 256 << 10
	// UploadsPerNodeMax bounds the uploads one node has open.
	UploadsPerNodeMax = 32
	// UploadIdleMax of cluster time without a part ends an upload.
	UploadIdleMax = 60 * time.Second
)

// Nodes.
const (
	// JoinTokenLifeMax bounds how long a token that lets a node into the cluster can be used.
	JoinTokenLifeMax = 7 * 24 * time.Hour
)

// Documents: replicated configuration.
const (
	// DocumentBytesMax bounds a document.
	DocumentBytesMax = 64 << 10
	// DocumentKeyBytesMax bounds a document's key.
	DocumentKeyBytesMax = 1 << 10
	// DocumentTableBytesMax bounds a table's name.
	DocumentTableBytesMax = 256
	// DocumentsPerTableMax bounds the documents of a table.
	DocumentsPerTableMax = 10_000
	// DocumentTablesMax bounds the tables.
	DocumentTablesMax = 64
)
