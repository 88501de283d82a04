package engine

import (
	"math"
	"time"
)

// QueryKind says what a Query asks for.
type QueryKind uint8

// The kinds of Query.
const (
	// QueryPeek asks for what a receive of Topic and Group would be given, changing nothing.
	QueryPeek QueryKind = 1
	// QueryBrowse asks for stored messages of Topic from offset From on, whatever any group did with them.
	QueryBrowse QueryKind = 2
	// QueryTopic asks for one topic's figures.
	QueryTopic QueryKind = 3
	// QueryGroup asks for one group's figures; with Deployment, or for a group bound to one, Ready counts that
	// deployment's messages alone (in no more than 2000 blocks).
	QueryGroup QueryKind = 4
	// QueryTopics lists topics by name after After.
	QueryTopics QueryKind = 5
	// QueryGroups lists the groups of Topic by name after After.
	QueryGroups QueryKind = 6
	// QueryMessage asks for the message ID of Topic.
	QueryMessage QueryKind = 7
	// QueryDocuments lists the documents of Table by key after After, or asks for the one of Key, if that is
	// not empty: without it the answer is empty.
	QueryDocuments QueryKind = 8
	// QueryParked lists what a group has parked from offset From on, as Parked selects.
	QueryParked QueryKind = 9
	// QueryStory asks what became of the message ID of Topic, for all its groups.
	QueryStory QueryKind = 10
	// QueryDelayed lists the delayed messages of Topic in the order in which they become visible, after After
	// (Answer.Last). LeaseUntil of a message in the answer is when that is.
	QueryDelayed QueryKind = 11
)

// DrainNone is the Query.DrainRate of a group that takes nothing.
const DrainNone = math.MaxUint64

// Query is a read of the applied state. It can be encoded, since a follower passes it to the leader.
type Query struct {
	Kind         QueryKind
	Topic, Group string
	// Max bounds the items of the answer; 0 means one.
	Max int
	// From is the first offset of QueryBrowse.
	From uint64
	// After is the name behind which QueryTopics and QueryGroups begin.
	After string
	// ID is the message of QueryMessage.
	ID MessageID
	// Deployment restricts QueryPeek.
	Deployment string
	// Now is cluster time as the reader knows it; the last stamp counts if it is later.
	Now int64
	// Table and Key are those of QueryDocuments.
	Table, Key string
	// Filter restricts QueryBrowse and QueryDelayed, Parked restricts QueryParked.
	Filter MessageFilter
	Parked ParkedFilter
	// DrainRate is how many messages the group of a QueryGroup is given for the first time in 1000 seconds: the
	// answer then says how many will expire before they are reached. DrainNone is a group that is given nothing.
	DrainRate uint64
	// Wait makes a QueryStreamRead that finds nothing wait this long for something to come, on the node that leads. The
	// engine does not look at it. A stream that has become another kind of key counts as empty then.
	Wait time.Duration
	// Stream is what the stream and key queries need beyond this.
	Stream *StreamQuery
}

// Answer is what a Query gave; which fields are set depends on its kind.
type Answer struct {
	// Messages are loaded. In a peek their receipts have epoch 0; in a browse they have none.
	Messages []Delivery
	Topics   []TopicInfo
	Groups   []GroupInfo
	// Next is where a browse that was cut short goes on, 0 at the end.
	Next uint64
	// More is set when a list was cut short: ask again after its last name.
	More bool
	// Documents are the answer to QueryDocuments, Parked to QueryParked, Story to QueryStory.
	Documents []StoredDocument
	Parked    []ParkedMessage
	Story     *Story
	// Last is what After of the next QueryDelayed has to be when More is set.
	Last string
	// Stream is the answer to stream and key queries.
	Stream *StreamAnswer
}

// TopicInfo describes a topic.
type TopicInfo struct {
	Name        string
	Incarnation uint64
	// First is the lowest offset that may still be stored, Next the one the next message gets.
	First, Next uint64
	Last        StreamID
	// Published and Bytes count everything ever published, as stored.
	Published, Bytes uint64
	Groups           int
	// OldestAt is when the oldest message that has not expired was published, Unix ms, 0 without any.
	OldestAt int64
	// Delayed counts messages that are not visible yet.
	Delayed  uint64
	Settings TopicSettings
}

// GroupInfo describes a consumer group.
type GroupInfo struct {
	Topic, Name string
	Incarnation uint64
	// Position is the ID of the last message passed, Offset the first offset not yet looked at.
	Position StreamID
	Offset   uint64
	// Ready counts messages the group has not been given (some may have expired), Unsettled all it was given
	// and has not settled, Inflight those of them under a lease that runs.
	Ready     uint64
	Unsettled int
	Inflight  int
	// Delivered, Redelivered and Acknowledged count for ever.
	Delivered, Redelivered, Acknowledged uint64
	// OldestAt is when the oldest message this group has not settled was published, Unix ms, 0 without any.
	OldestAt int64
	// Parked counts what the group gave up and keeps. Unsettled does not count it.
	Parked int
	// Expiring counts messages that the group was never given and that will expire before it reaches them at
	// Query.DrainRate; 0 unless that was given. What its receives leave alone is not among them.
	Expiring uint64
	Settings GroupSettings
}
