// Package wire holds what the HTTP server and its clients agree on and nothing else: header names, media
// types, the JSON documents of /v1, and the compact framing of message batches. It imports nothing of Tercet.
package wire

import (
	"encoding/json"
	"time"
)

// Header names in canonical form, so that they can index an http.Header directly.
const (
	HeaderRetention      = "Vqs-Retention-Seconds"
	HeaderDelay          = "Vqs-Delay-Seconds"
	HeaderIdempotencyKey = "Vqs-Idempotency-Key"
	HeaderDeployment     = "Vqs-Deployment-Id"
	HeaderMaxMessages    = "Vqs-Max-Messages"
	HeaderVisibility     = "Vqs-Visibility-Timeout-Seconds"
	HeaderMaxConcurrency = "Vqs-Max-Concurrency"
	HeaderCursorFallback = "Vqs-Cursor-Fallback"

	HeaderMessageID     = "Vqs-Message-Id"
	HeaderReceipt       = "Vqs-Receipt-Handle"
	HeaderDeliveryCount = "Vqs-Delivery-Count"
	HeaderTimestamp     = "Vqs-Timestamp"
	HeaderExpiresAt     = "Vqs-Expires-At"

	HeaderDurability = "Tercet-Durability"
	HeaderWait       = "Tercet-Wait-Seconds"
	HeaderZones      = "Tercet-Zones"
	HeaderPosition   = "Tercet-Position"
	HeaderTerm       = "Tercet-Term"

	HeaderRequestID = "X-Request-Id"
)

// Media types.
const (
	MediaJSON      = "application/json"
	MediaNDJSON    = "application/x-ndjson"
	MediaMultipart = "multipart/mixed"
	// MediaBatch is the compact framing (see Reader).
	MediaBatch = "application/vnd.tercet.batch"
	// MediaOctets is the content type of a message that was sent without one (decision D3).
	MediaOctets = "application/octet-stream"
)

// TimeFormat is how times are written: UTC with milliseconds.
const TimeFormat = "2006-01-02T15:04:05.000Z"

// AppendTime appends a Unix time in milliseconds in TimeFormat.
func AppendTime(b []byte, ms int64) []byte {
	return time.UnixMilli(ms).UTC().AppendFormat(b, TimeFormat)
}

// Error is the body of every answer that is none of the asked-for ones.
type Error struct {
	Error string `json:"error"`
	// Code is the stable identifier to branch on.
	Code string `json:"code"`
	// Outcome is "none" when nothing happened and nothing will, "unknown" when it may have.
	Outcome   string `json:"outcome"`
	Hint      string `json:"hint"`
	RequestID string `json:"requestId"`

	// With concurrency_limit and unsettled_limit.
	CurrentInflight int `json:"currentInflight,omitempty"`
	MaxConcurrency  int `json:"maxConcurrency,omitempty"`
	// With duplicate.
	OriginalMessageID string `json:"originalMessageId,omitempty"`
	// With extend_past_expiry.
	MessageExpiresAt   string `json:"messageExpiresAt,omitempty"`
	RequestedExpiresAt string `json:"requestedExpiresAt,omitempty"`
}

// Sent is the answer to a send.
type Sent struct {
	MessageID string `json:"messageId"`
}

// BatchResult is one element of Batch.
type BatchResult struct {
	// Status is "sent" or "failed".
	Status    string `json:"status"`
	MessageID string `json:"messageId,omitempty"`
	// With "failed".
	StatusCode int    `json:"statusCode,omitempty"`
	Code       string `json:"code,omitempty"`
	Error      string `json:"error,omitempty"`
	Retryable  bool   `json:"retryable,omitempty"`
}

// Batch is the JSON answer to a batch: one result per message, in order.
type Batch struct {
	Results []BatchResult `json:"results"`
}

// Extend is the body of a visibility change.
type Extend struct {
	VisibilityTimeoutSeconds int64 `json:"visibilityTimeoutSeconds"`
	// Release ends the lease: the time is until the message is delivered again. Reason is kept as its last error.
	Release bool   `json:"release,omitempty"`
	Reason  string `json:"reason,omitempty"`
}

// Message is one line of an NDJSON receive. Body is base64 on the wire.
type Message struct {
	MessageID     string `json:"messageId"`
	ReceiptHandle string `json:"receiptHandle"`
	DeliveryCount uint32 `json:"deliveryCount"`
	Timestamp     string `json:"timestamp"`
	ExpiresAt     string `json:"expiresAt"`
	ContentType   string `json:"contentType"`
	// Headers are the application and trace headers the message was sent with.
	Headers map[string]string `json:"headers,omitempty"`
	Body    []byte            `json:"body"`
}

// Node is the answer to GET /v1/node.
type Node struct {
	ID           string `json:"id"`
	Zone         string `json:"zone"`
	Role         string `json:"role"`
	Incarnation  string `json:"incarnation"`
	AppliedIndex uint64 `json:"appliedIndex"`
	// StateHash is the hash of the replicated state at AppliedIndex, 16 hexadecimal digits.
	StateHash string `json:"stateHash"`
	Version   string `json:"version"`
	Draining  bool   `json:"draining"`
}

// Cluster is the answer to GET /v1/cluster.
type Cluster struct {
	ClusterID  string   `json:"clusterId"`
	Term       uint64   `json:"term"`
	Leader     string   `json:"leader"`
	Durability string   `json:"durability"`
	InSync     []string `json:"inSync"`
	// Level is the feature level: what releases older than all members of it do not know is not in use below it.
	Level uint32        `json:"featureLevel"`
	Nodes []ClusterNode `json:"nodes"`
}

// ClusterNode is one member in Cluster.
type ClusterNode struct {
	ID          string `json:"id"`
	Zone        string `json:"zone"`
	Incarnation string `json:"incarnation"`
	HTTP        string `json:"http"`
	Peer        string `json:"peer"`
	Valkey      string `json:"valkey"`
	Role        string `json:"role"`
	InSync      bool   `json:"inSync"`
	MatchIndex  uint64 `json:"matchIndex"`
	// DiskFree is what the member last reported, 0 where unknown.
	DiskFree int64 `json:"diskFree"`
	// LevelMax is the highest feature level the member's release knows, 0 where unknown.
	LevelMax uint32 `json:"featureLevelMax"`
}

// Member names a node in a membership request.
type Member struct {
	ID string `json:"id"`
}

// Advance is the body of POST /v1/clock/advance.
type Advance struct {
	Seconds int64 `json:"seconds"`
}

// Topics is the answer to GET /v1/topics. Next, when set, is the ?after= of the next page.
type Topics struct {
	Topics []Topic `json:"topics"`
	Next   string  `json:"next,omitempty"`
}

// Topic describes a topic.
type Topic struct {
	Name string `json:"name"`
	// FirstOffset is the lowest offset that may still be stored, NextOffset the one the next message gets.
	FirstOffset uint64 `json:"firstOffset"`
	NextOffset  uint64 `json:"nextOffset"`
	// Published and PublishedBytes count everything ever published.
	Published      uint64 `json:"published"`
	PublishedBytes uint64 `json:"publishedBytes"`
	Groups         int    `json:"groups"`
	// Delayed counts messages that are not visible yet.
	Delayed uint64 `json:"delayed"`
	// OldestAt is when the oldest stored message was published.
	OldestAt string        `json:"oldestAt,omitempty"`
	Settings TopicSettings `json:"settings"`
}

// TopicSettings are what an operator says about a topic. 0 leaves the cluster's limit in force.
type TopicSettings struct {
	Paused                  bool   `json:"paused"`
	RetentionDefaultSeconds int64  `json:"retentionDefaultSeconds"`
	RetentionMaxSeconds     int64  `json:"retentionMaxSeconds"`
	MessageBytesMax         int64  `json:"messageBytesMax"`
	DepthMax                uint64 `json:"depthMax"`
	// DropAcknowledged removes a message once every group has acknowledged it, instead of keeping it until it expires.
	DropAcknowledged bool `json:"dropAcknowledged"`
}

// Groups is the answer to GET /v1/topics/{topic}/groups. Next, when set, is the ?after= of the next page.
type Groups struct {
	Groups []Group `json:"groups"`
	Next   string  `json:"next,omitempty"`
}

// Group describes a consumer group.
type Group struct {
	Topic string `json:"topic"`
	Name  string `json:"name"`
	// NextOffset is the first offset the group has not looked at.
	NextOffset uint64 `json:"nextOffset"`
	// Depth is Ready, Inflight and Returned together. Ready counts messages the group was never given, Inflight those
	// under a lease, Returned those whose lease ended without an acknowledgement, Parked those it gave up and keeps.
	Depth    uint64 `json:"depth"`
	Ready    uint64 `json:"ready"`
	Inflight int    `json:"inflight"`
	Returned int    `json:"returned"`
	Parked   int    `json:"parked"`
	// Delivered, Redelivered and Acknowledged count for ever.
	Delivered    uint64 `json:"delivered"`
	Redelivered  uint64 `json:"redelivered"`
	Acknowledged uint64 `json:"acknowledged"`
	// OldestAt is when the oldest message the group has not settled was published.
	OldestAt string        `json:"oldestAt,omitempty"`
	Settings GroupSettings `json:"settings"`
	// Rates are there when one group is asked for.
	Rates *GroupRates `json:"rates,omitempty"`
}

// GroupRates are how a group gets on, as this node has seen it over a while.
type GroupRates struct {
	// OverSeconds is how long that was.
	OverSeconds float64 `json:"overSeconds"`
	// ArrivalPerSecond counts messages that became visible, DrainPerSecond acknowledgements, ReachedPerSecond first
	// deliveries.
	ArrivalPerSecond float64 `json:"arrivalPerSecond"`
	DrainPerSecond   float64 `json:"drainPerSecond"`
	ReachedPerSecond float64 `json:"reachedPerSecond"`
	// SecondsToDrain is when the group has nothing left if both rates go on; absent when it never has.
	SecondsToDrain *float64 `json:"secondsToDrain,omitempty"`
	// Delayed counts messages of the topic that are not visible yet.
	Delayed uint64 `json:"delayed"`
	// ExpiringUnreached counts messages that the group was never given and that will expire before it comes to them if
	// first deliveries go on at ReachedPerSecond. A paused group comes to none.
	ExpiringUnreached uint64 `json:"expiringUnreached"`
}

// GroupSettings are what an operator says about a group.
type GroupSettings struct {
	Paused bool `json:"paused"`
	// MaxDeliveries is after how many deliveries a message is given up, 0 for never: then it is parked, or counts as
	// acknowledged without Park.
	MaxDeliveries uint32 `json:"maxDeliveries"`
	Park          bool   `json:"park"`
	// ParkedRetentionSeconds is how long a parked message is kept at least; 0 is its own retention.
	ParkedRetentionSeconds int64 `json:"parkedRetentionSeconds"`
	RetryAfterSeconds      int64 `json:"retryAfterSeconds"`
	InitialDelaySeconds    int64 `json:"initialDelaySeconds"`
	// MaxConcurrency bounds the messages under lease, 0 for no bound.
	MaxConcurrency int `json:"maxConcurrency"`
	// PendingSeconds is the lease of what Valkey clients are given, 0 for none.
	PendingSeconds int64 `json:"pendingSeconds"`
	// DeploymentID is the partition of receives that name none; ExcludeDeployments are those that they do not see.
	DeploymentID       string   `json:"deploymentId"`
	ExcludeDeployments []string `json:"excludeDeployments"`
}

// Start is a place in a topic.
type Start struct {
	// At is "beginning" (the default), "end", "time" or "id".
	At string `json:"at,omitempty"`
	// Time is with "time": the first message published then or later.
	Time string `json:"time,omitempty"`
	// ID is with "id": behind this stream ID, as Valkey writes it.
	ID string `json:"id,omitempty"`
}

// NewGroup is the body of PUT /v1/topics/{topic}/groups/{group}.
type NewGroup struct {
	Start    Start           `json:"start,omitzero"`
	Settings json.RawMessage `json:"settings,omitempty"`
}

// Parked is the answer to GET /v1/topics/{topic}/groups/{group}/parked. Next is the ?from= to go on with, 0 at the end.
type Parked struct {
	Messages []ParkedMessage `json:"messages"`
	Next     uint64          `json:"next"`
}

// ParkedMessage is a message that a group gave up.
type ParkedMessage struct {
	BrowsedMessage
	Deliveries uint32 `json:"deliveries"`
	ParkedAt   string `json:"parkedAt"`
	// LastError is the last reason a release gave.
	LastError string `json:"lastError,omitempty"`
}

// ParkedChange is the body of …/parked/redrive and …/parked/drop: which messages, all conditions together.
type ParkedChange struct {
	MessageIDs []string `json:"messageIds,omitempty"`
	// Error is a part of the last error.
	Error string `json:"error,omitempty"`
	// Since and Until bound the time of parking.
	Since string `json:"since,omitempty"`
	Until string `json:"until,omitempty"`
	// All says that a change without any condition is meant.
	All bool `json:"all,omitempty"`
	// Max bounds the messages that are changed, 0 for no bound.
	Max    int  `json:"max,omitempty"`
	DryRun bool `json:"dryRun,omitempty"`
	// RatePerSecond spreads a redrive over time, 0 for at once.
	RatePerSecond int `json:"ratePerSecond,omitempty"`
}

// ParkedChanged is the answer to it.
type ParkedChanged struct {
	Count  int64 `json:"count"`
	DryRun bool  `json:"dryRun"`
}

// Move is the body of PATCH on a delayed message. DelaySeconds counts from now.
type Move struct {
	DelaySeconds *int64 `json:"delaySeconds"`
}

// Story is the answer to GET /v1/topics/{topic}/messages/{id}.
type Story struct {
	MessageID string `json:"messageId"`
	Topic     string `json:"topic"`
	// State is "delayed", or "visible" once the message is in the log.
	State string `json:"state"`
	// DuplicateOf is set for a message that an idempotency key dropped: the rest tells of the original.
	DuplicateOf  string            `json:"duplicateOf,omitempty"`
	Offset       uint64            `json:"offset"`
	PublishedAt  string            `json:"publishedAt"`
	VisibleAt    string            `json:"visibleAt,omitempty"`
	ExpiresAt    string            `json:"expiresAt,omitempty"`
	ContentType  string            `json:"contentType"`
	DeploymentID string            `json:"deploymentId,omitempty"`
	Headers      map[string]string `json:"headers,omitempty"`
	Bytes        int64             `json:"bytes"`
	// CRC32C is the checksum of the body, 8 hexadecimal digits.
	CRC32C string       `json:"crc32c"`
	Groups []GroupStory `json:"groups"`
	// Zones are there with ?verify=true: what each node read from its own disk.
	Zones []ZoneCopy `json:"zones,omitempty"`
	// Verified is there with ?verify=true, and set when all nodes hold the same bytes.
	Verified *bool `json:"verified,omitempty"`
}

// GroupStory is what one group did with a message.
type GroupStory struct {
	Group string `json:"group"`
	// State is ready, leased, waiting, parked or acknowledged.
	State      string `json:"state"`
	Deliveries uint32 `json:"deliveries"`
	// Consumer has the message, or had it last: a consumer of the Valkey port, or "tercet:http" for receives and pushes.
	Consumer    string `json:"consumer,omitempty"`
	LeasedAt    string `json:"leasedAt,omitempty"`
	LeasedUntil string `json:"leasedUntil,omitempty"`
	NextAt      string `json:"nextAt,omitempty"`
	ParkedAt    string `json:"parkedAt,omitempty"`
	LastError   string `json:"lastError,omitempty"`
}

// ZoneCopy is one node's copy of a message.
type ZoneCopy struct {
	Node   string `json:"node"`
	Zone   string `json:"zone"`
	Bytes  int64  `json:"bytes"`
	CRC32C string `json:"crc32c"`
	// Same is set when bytes and checksum are those the leader has; Error says why there is none to compare.
	Same  bool   `json:"same"`
	Error string `json:"error,omitempty"`
}

// Messages is the answer to GET /v1/topics/{topic}/messages. Next is the ?from= to go on with, 0 at the end.
type Messages struct {
	Messages []BrowsedMessage `json:"messages"`
	Next     uint64           `json:"next"`
	// After, when set, is the ?after= of the next page of delayed messages.
	After string `json:"after,omitempty"`
}

// BrowsedMessage is a stored message, apart from any group. Body is base64 on the wire.
type BrowsedMessage struct {
	MessageID    string            `json:"messageId"`
	Offset       uint64            `json:"offset"`
	Timestamp    string            `json:"timestamp"`
	ExpiresAt    string            `json:"expiresAt,omitempty"`
	ContentType  string            `json:"contentType"`
	DeploymentID string            `json:"deploymentId,omitempty"`
	Headers      map[string]string `json:"headers,omitempty"`
	Bytes        int64             `json:"bytes"`
	// Body is left out of a large message, and where it was not asked for.
	Body []byte `json:"body,omitempty"`
}

// JoinTokens is the answer to GET /v1/cluster/tokens.
type JoinTokens struct {
	Tokens []JoinToken `json:"tokens"`
}

// JoinToken describes a token that lets one node into the cluster, once.
type JoinToken struct {
	ID        string    `json:"id"`
	Node      string    `json:"node"`
	CreatedAt time.Time `json:"createdAt"`
	ExpiresAt time.Time `json:"expiresAt"`
	Used      bool      `json:"used"`
}

// NewJoinToken is the body of POST /v1/cluster/tokens.
type NewJoinToken struct {
	Node string `json:"node"`
	// TTLSeconds is how long the token can be used; 0 is an hour.
	TTLSeconds int64 `json:"ttlSeconds,omitempty"`
}

// CreatedJoinToken is the answer to POST /v1/cluster/tokens.
type CreatedJoinToken struct {
	JoinToken
	// Token is what the node is started with, shown this once.
	Token string `json:"token"`
}

// Tokens is the answer to GET /v1/tokens.
type Tokens struct {
	Tokens []Token `json:"tokens"`
}

// Token describes a bearer token. Its text is known to its holder alone.
type Token struct {
	Name   string      `json:"name"`
	Scopes []string    `json:"scopes"`
	Limits TokenLimits `json:"limits,omitzero"`
	// Source is "cluster" for a token that POST /v1/tokens made, "configuration" for one of the node's file.
	Source    string    `json:"source"`
	CreatedAt time.Time `json:"createdAt,omitzero"`
	ExpiresAt time.Time `json:"expiresAt,omitzero"`
}

// TokenLimits bound what a token may ask of each node.
type TokenLimits struct {
	RequestsPerSecond float64 `json:"requestsPerSecond,omitempty"`
	Burst             int     `json:"burst,omitempty"`
	BytesPerSecond    int64   `json:"bytesPerSecond,omitempty"`
	BytesPerDay       int64   `json:"bytesPerDay,omitempty"`
}

// NewToken is the body of POST /v1/tokens.
type NewToken struct {
	Name   string      `json:"name"`
	Scopes []string    `json:"scopes"`
	Limits TokenLimits `json:"limits,omitzero"`
	// SHA256 is the hash of a text that the client chose, in hexadecimal; without it the server makes one up.
	SHA256    string    `json:"sha256,omitempty"`
	ExpiresAt time.Time `json:"expiresAt,omitzero"`
}

// CreatedToken is the answer to POST /v1/tokens.
type CreatedToken struct {
	Token
	// Secret is the text to present, shown this once; empty when the client chose it.
	Secret string `json:"secret,omitempty"`
}
