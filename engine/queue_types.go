package engine

import "time"

// The command kinds of the queue's management. Numbers are append-only, as all kinds.
const (
	CmdDocument     Kind = 12 // one document: set or delete
	CmdTopicSet     Kind = 13 // a topic's settings
	CmdTopicDelete  Kind = 14
	CmdPurge        Kind = 15 // drop everything a topic stores
	CmdGroupSet     Kind = 16 // create, seek, settings of a group
	CmdGroupDelete  Kind = 17
	CmdParked       Kind = 18 // redrive or drop parked messages
	CmdDelayed      Kind = 19 // cancel or move a delayed message
	CmdUploadOpen   Kind = 20 // large messages: begin, part, commit, abort
	CmdUploadPart   Kind = 21
	CmdUploadCommit Kind = 22
	CmdUploadAbort  Kind = 23

	cmdQueueLast = CmdUploadAbort
)

// Document sets or deletes one document: a replicated key and value of configuration, kept in memory. Tables
// come into being with their first document. Result.Revision is the raft index of the change, which is the
// document's new revision. A condition that does not hold is errs.Conflict; deleting what is not there is
// errs.NotFound.
type Document struct {
	Table, Key string
	Value      []byte
	// IfRevision, if not 0, has to be the document's present revision.
	IfRevision uint64
	// IfAbsent requires that there is no such document.
	IfAbsent bool
	Delete   bool
}

// StoredDocument is a document as it stands.
type StoredDocument struct {
	Table, Key string
	Value      []byte
	// Revision is the raft index of the last change.
	Revision uint64
}

// TopicSet sets a topic's settings. A nil Settings leaves them; with Create the topic is made if need be, else
// one that does not exist is errs.TopicNotFound.
type TopicSet struct {
	Topic    string
	Create   bool
	Settings *TopicSettings
	// Only, if not 0, names the settings that are replaced; the others stay.
	Only SettingMask
}

// SettingMask names settings of a topic or group.
type SettingMask uint16

// The settings that can be set one by one. The first is both a topic's and a group's.
const (
	OnlyPaused SettingMask = 1 << iota
	OnlyRetentionDefault
	OnlyRetentionMax
	OnlyMessageBytesMax
	OnlyDepthMax
	OnlyMaxDeliveries
	OnlyPark
	OnlyParkedRetention
	OnlyInitialDelay
	OnlyMaxConcurrency
	OnlyVisibility
	OnlyDropAcknowledged

	settingMasks = iota
)

// TopicSettings are what an operator says about a topic. The zero value of a field leaves the limit of the
// cluster in force.
type TopicSettings struct {
	// Paused stops all deliveries of the topic; publishes go on.
	Paused bool
	// RetentionDefault is the retention of messages that ask for the default, and of entries that XADD gives none;
	// RetentionMax cuts longer ones. Whole seconds.
	RetentionDefault, RetentionMax time.Duration
	// MessageBytesMax bounds a message's body.
	MessageBytesMax int64
	// DepthMax bounds the messages the topic holds: from the first that has not expired to the end, and the
	// delayed ones. Publishes beyond it are errs.TopicFull.
	DepthMax uint64
	// DropAcknowledged removes a message as soon as every group of the topic has done with it, instead of keeping it
	// until it expires. A group that is made later starts with what is left; without a group nothing goes.
	DropAcknowledged bool
}

// TopicDelete deletes a topic with its groups, messages, delayed messages and settings. A topic of that name
// that appears later is another one.
type TopicDelete struct{ Topic string }

// Purge drops every message a topic holds, delayed ones included, for all groups. Groups and settings stay.
type Purge struct{ Topic string }

// StartKind says where a group begins to read.
type StartKind uint8

// The kinds of Start.
const (
	// StartBeginning is the first message that has not expired.
	StartBeginning StartKind = 0
	// StartEnd is behind everything stored.
	StartEnd StartKind = 1
	// StartTime is the first message published at or after a wall time.
	StartTime StartKind = 2
	// StartID is behind a stream ID, as in Valkey.
	StartID StartKind = 3
)

// Start is a place in a topic's log.
type Start struct {
	Kind StartKind
	// Time is Unix ms, for StartTime.
	Time int64
	// ID is for StartID.
	ID StreamID
}

// GroupSet creates a group, moves it, or sets its settings; each part is left out by its zero value.
type GroupSet struct {
	Topic, Group string
	// Create makes topic and group if they do not exist, at Start. Without it a missing group is
	// errs.GroupNotFound.
	Create bool
	// Seek moves an existing group to Start: all its leases end, their receipts with them, and everything
	// from Start on is delivered anew. Parked messages stay parked.
	Seek  bool
	Start Start
	// Settings replace the group's, if not nil; Only, if not 0, names those that are replaced.
	Settings *GroupSettings
	Only     SettingMask
}

// GroupSettings are what an operator says about a group.
type GroupSettings struct {
	// Paused stops deliveries; leases can still be settled and extended.
	Paused bool
	// MaxDeliveries is after how many deliveries a message is given up: once the last lease is over it counts
	// as acknowledged, or with Park is parked. 0 is never.
	MaxDeliveries uint32
	Park          bool
	// ParkedRetention is how long a parked message is kept at least, counted from its parking: it may outlive
	// the message's own retention. 0 is the message's own.
	ParkedRetention time.Duration
	// RetryAfter is the delay after a failed push; the engine keeps it for whoever pushes.
	RetryAfter time.Duration
	// InitialDelay keeps each message from the group until it is that old.
	InitialDelay time.Duration
	// StartDelay, in a command, sets NotBefore to the entry's stamp plus it. It is not kept.
	StartDelay time.Duration
	// NotBefore is the cluster time before which nothing is delivered.
	NotBefore int64
	// MaxConcurrency bounds the group's messages under lease beside what a receive asks for; 0 is no bound.
	MaxConcurrency int
	// Visibility is the pending time-out of what XREADGROUP gives and XCLAIM takes over; 0 is none.
	Visibility time.Duration
	// Deployment is the partition of receives that name none.
	Deployment string
	// ExcludeDeployments are partitions that receives without one do not see.
	ExcludeDeployments []string
}

// GroupDelete deletes a group with its leases and parked messages.
type GroupDelete struct{ Topic, Group string }

// ParkedOp is what a Parked command does.
type ParkedOp uint8

// The operations of Parked.
const (
	// Redrive makes parked messages deliverable again; their count of deliveries goes on, MaxDeliveries counts
	// anew.
	Redrive ParkedOp = 1
	// Drop ends them for the group, as an acknowledgement would.
	Drop ParkedOp = 2
)

// Parked redrives or drops parked messages of a group in the order of their offsets: at most Max of those that
// match, from offset From on. Result.Count says how many, Result.Next where to go on (0: that was all). With
// DryRun nothing changes.
type Parked struct {
	Topic, Group string
	Op           ParkedOp
	Filter       ParkedFilter
	Max          int
	From         uint64
	DryRun       bool
}

// ParkedFilter selects parked messages; all conditions that are set have to hold.
type ParkedFilter struct {
	IDs []MessageID
	// Streams are IDs as Valkey knows them; what either list has is selected.
	Streams []StreamID
	// Error is a part of the last error.
	Error string
	// Since and Until bound the time of parking, Unix ms, Until exclusively; 0 is no bound.
	Since, Until int64
}

// Delayed cancels a delayed message that has not matured, or moves it to another time. One that has matured is
// errs.Conflict.
type Delayed struct {
	Topic string
	ID    MessageID
	// Cancel drops the message; else it matures after Delay from now, at once if that is zero. A delay beyond
	// the message's expiry is errs.BadRequest.
	Cancel bool
	Delay  time.Duration
}

// UploadOpen begins a large message. Result.Upload names it; if Key is known already, the result is that of a
// Publish that the key drops (Published with one duplicate) and there is nothing to upload. An upload ends by
// its commit or abort, limits.UploadIdleMax after its last part, or with its intake.
type UploadOpen struct {
	Topic           string
	Key, Deployment string
}

// UploadPart adds a part. Parts come in order, from 0, each of limits.PartBytes except the last. A part that
// is there already is passed over.
type UploadPart struct {
	Upload uint64
	Number uint32
	Data   []byte
}

// UploadCommit makes an upload a message of its topic: Message without a body. Its result is that of a Publish
// of one message.
type UploadCommit struct {
	Upload  uint64
	Message NewMessage
	// Parts, Bytes and CRC are what was sent; what does not agree is errs.Conflict, and the upload stays.
	Parts uint32
	Bytes int64
	// CRC is the CRC-32C of the content.
	CRC uint32
}

// UploadAbort drops an upload.
type UploadAbort struct{ Upload uint64 }

// Large is the body of a large message: where its parts are (Engine.LoadPart).
type Large struct {
	// Topic is an incarnation, Upload the upload the message was made from.
	Topic, Upload uint64
	Parts         uint32
	Bytes         int64
	CRC           uint32
}

// MessageState is what is to be said of a message, by itself or to a group.
type MessageState uint8

// The states of a message.
const (
	// StateAny, in a filter, is all of them.
	StateAny MessageState = iota
	// StateDelayed: not visible yet.
	StateDelayed
	// StateReady: deliverable, or never given and kept back by a pause or an initial delay.
	StateReady
	// StateLeased: under a lease that runs.
	StateLeased
	// StateWaiting: given before, deliverable again later.
	StateWaiting
	// StateParked: given up by the group.
	StateParked
	// StateAcknowledged: done for the group.
	StateAcknowledged
)

var messageStates = [...]string{"any", "delayed", "ready", "leased", "waiting", "parked", "acknowledged"}

// String returns the state's stable name.
func (s MessageState) String() string {
	if int(s) < len(messageStates) {
		return messageStates[s]
	}
	return "unknown"
}

// ParseMessageState reads what String writes.
func ParseMessageState(name string) (MessageState, bool) {
	for s, n := range messageStates {
		if n == name {
			return MessageState(s), true
		}
	}
	return StateAny, false
}

// MessageFilter selects messages of a QueryBrowse; all conditions that are set have to hold.
type MessageFilter struct {
	// State is what the message is to Query.Group; StateDelayed needs no group.
	State MessageState
	// Since and Until bound the time of publishing, Unix ms, Until exclusively; 0 is no bound.
	Since, Until int64
	// Header is a header's name in lower case; the message has to have it, with Value if that is not empty.
	Header, Value string
}

// ParkedMessage is a message that a group gave up.
type ParkedMessage struct {
	// Delivery holds the message; Count is the number of deliveries, ExpiresAt until when it is kept.
	Delivery Delivery
	// ParkedAt is Unix ms.
	ParkedAt int64
	// Error is the last reason a release gave, empty if there was none.
	Error string
}

// Story is what became of one message.
type Story struct {
	// Message is the message with its contents. Stream and Receipt.Offset are set once it is in the log.
	Message Delivery
	// State is StateDelayed, or StateReady once the message is in the log.
	State MessageState
	// VisibleAt is when it became visible, or will, Unix ms.
	VisibleAt int64
	// Bytes is the size of the body, CRC its CRC-32C.
	Bytes  int64
	CRC    uint32
	Groups []GroupStory
}

// GroupStory is what a group did with a message.
type GroupStory struct {
	Group string
	State MessageState
	// Count is the number of deliveries. For an acknowledged message it is not known any more.
	Count uint32
	// Consumer has the message, or had it last, while it is neither parked nor acknowledged: a Valkey consumer's name, or
	// HTTPConsumer for all of the queue protocol.
	Consumer string
	// LeasedAt and LeasedUntil are the last lease, NextAt is when the message is deliverable again, ParkedAt
	// when it was parked; Unix ms, 0 for none.
	LeasedAt, LeasedUntil, NextAt, ParkedAt int64
	// Error is the last reason a release gave.
	Error string
}

// Totals are figures of all topics and groups together, for metrics.
type Totals struct {
	Topics, Groups int
	// Ready counts, over all groups, messages never given to the group, Inflight those under lease, Waiting
	// those given before and not done, Parked those given up. Delayed counts messages of all topics.
	Ready, Inflight, Waiting, Parked, Delayed uint64
	// Uploads is the number of open uploads.
	Uploads int
	// OldestAt is when the oldest message was published that some group has not been given, Unix ms, 0 without
	// any.
	OldestAt int64
}

// Kind implements Command.
func (c *Document) Kind() Kind { return CmdDocument }

// Kind implements Command.
func (c *TopicSet) Kind() Kind { return CmdTopicSet }

// Kind implements Command.
func (c *TopicDelete) Kind() Kind { return CmdTopicDelete }

// Kind implements Command.
func (c *Purge) Kind() Kind { return CmdPurge }

// Kind implements Command.
func (c *GroupSet) Kind() Kind { return CmdGroupSet }

// Kind implements Command.
func (c *GroupDelete) Kind() Kind { return CmdGroupDelete }

// Kind implements Command.
func (c *Parked) Kind() Kind { return CmdParked }

// Kind implements Command.
func (c *Delayed) Kind() Kind { return CmdDelayed }

// Kind implements Command.
func (c *UploadOpen) Kind() Kind { return CmdUploadOpen }

// Kind implements Command.
func (c *UploadPart) Kind() Kind { return CmdUploadPart }

// Kind implements Command.
func (c *UploadCommit) Kind() Kind { return CmdUploadCommit }

// Kind implements Command.
func (c *UploadAbort) Kind() Kind { return CmdUploadAbort }
