// Package errs is the one catalogue of Tercet's errors: a stable code, what it says of the outcome, the
// HTTP status it travels under, one sentence, and the way out. Codes are append-only: their numbers stand
// in replicated results and their names in clients' programs.
package errs

import (
	"errors"
	"fmt"
	"time"
)

// Outcome says whether the operation that failed may nevertheless have happened.
type Outcome string

const (
	// None: nothing happened, and nothing will.
	None Outcome = "none"
	// Unknown: it may have happened, or may still happen. Repeating it is safe only under an idempotency key.
	Unknown Outcome = "unknown"
)

// Code identifies an error for ever. The zero Code means success.
type Code uint16

// The codes. Append only.
const (
	OK Code = iota
	InvalidName
	InvalidHeader
	InvalidBody
	InvalidReceipt
	NotAcceptable
	MessageTooLarge
	Unsupported
	Unauthorized
	Forbidden
	TopicNotFound
	GroupNotFound
	MessageNotFound
	NotInFlight
	LeaseExpired
	NotHolder
	AlreadyAcknowledged
	LeasedElsewhere
	NotYetVisible
	Duplicate
	ConcurrencyLimit
	UnsettledLimit
	ExtendPastExpiry
	NotLeader
	NoLeader
	Overloaded
	DiskFull
	ZonesUnavailable
	Draining
	OutcomeUnknown
	IntakeClosed
	TooManyTopics
	TooManyGroups
	NotFound
	MethodNotAllowed
	BadRequest
	RequestTimeout
	Conflict
	Precondition
	Internal
	MisdirectedHost
	RateLimited
	QuotaExceeded
	Paused
	TopicFull
	UploadNotFound
	TooManyUploads
	WrongType
	GroupExists
	StreamIDTooLow
	StreamIDZero
	StreamExhausted
	StreamIDDeleted
	StreamCountTooLow
	KeyChanged
	ReservedConsumer
	MemoryLimit
	Parked
	CopyTooLarge
	codeCount
)

// Info is what the catalogue holds of a code.
type Info struct {
	// Name is the stable identifier that programs branch on.
	Name string
	// Status is the HTTP status outside send and batch; those map refusals to 429 (see server).
	Status int
	// Outcome is None unless the operation may have happened.
	Outcome Outcome
	// Text is used when the error has no more particular message.
	Text string
	// Hint is the way out.
	Hint string
}

var catalogue = [codeCount]Info{
	OK:                  {"ok", 200, None, "ok", ""},
	InvalidName:         {"invalid_name", 400, None, "name is not valid", "use 1 to 256 characters out of A-Z a-z 0-9 _ -"},
	InvalidHeader:       {"invalid_header", 400, None, "header is not valid", "see docs/http.md"},
	InvalidBody:         {"invalid_body", 400, None, "body is not valid", "see docs/http.md"},
	InvalidReceipt:      {"invalid_receipt", 400, None, "receipt handle is not valid", "pass the handle exactly as receive returned it"},
	NotAcceptable:       {"not_acceptable", 400, None, "Accept must name multipart/mixed or application/x-ndjson", "set the Accept header"},
	MessageTooLarge:     {"message_too_large", 413, None, "message is too large", "store the payload elsewhere and send its address"},
	Unsupported:         {"unsupported", 501, None, "this release does not support the request", "leave the feature out, or upgrade the cluster"},
	Unauthorized:        {"unauthorized", 401, None, "no valid token was presented", "send Authorization: Bearer TOKEN; the command line takes TERCET_TOKEN or --token-file"},
	Forbidden:           {"forbidden", 403, None, "the token does not allow this", "use a token with the scope"},
	TopicNotFound:       {"topic_not_found", 404, None, "Topic not found", "a topic exists once something was published to it"},
	GroupNotFound:       {"group_not_found", 404, None, "Consumer group not found", "a group exists once something was received with it"},
	MessageNotFound:     {"message_not_found", 404, None, "Message not found", "it expired, was acknowledged, or never existed"},
	NotInFlight:         {"not_in_flight", 409, None, "Message is not currently in-flight", "receive it again to get a new receipt handle"},
	LeaseExpired:        {"lease_expired", 409, None, "Message lease has expired", "receive it again; extend leases before they run out"},
	NotHolder:           {"not_holder", 409, None, "Receipt handle does not match current lease holder", "the message was given to another consumer meanwhile"},
	AlreadyAcknowledged: {"already_acknowledged", 410, None, "Message was already acknowledged by this consumer group", "nothing to do"},
	LeasedElsewhere:     {"leased_elsewhere", 409, None, "Message is leased by another consumer of this group", "try again after Retry-After seconds"},
	NotYetVisible:       {"not_yet_visible", 409, None, "Message is delayed", "try again after Retry-After seconds"},
	Duplicate:           {"duplicate", 409, None, "This messageId was a duplicate - use originalMessageId instead", "receive originalMessageId"},
	ConcurrencyLimit:    {"concurrency_limit", 429, None, "the group's concurrency limit is reached", "acknowledge messages or raise Vqs-Max-Concurrency"},
	UnsettledLimit:      {"unsettled_limit", 429, None, "the group holds as many unacknowledged messages as it may", "acknowledge messages"},
	ExtendPastExpiry:    {"extend_past_expiry", 400, None, "the lease would outlive the message", "extend to messageExpiresAt at most"},
	NotLeader:           {"not_leader", 503, None, "this node does not lead and could not pass the request on", "try again"},
	NoLeader:            {"no_leader", 503, None, "the cluster has no leader at the moment", "try again; an election takes one to two seconds"},
	Overloaded:          {"overloaded", 429, None, "the node has more work than it can take", "slow down and try again after Retry-After seconds"},
	DiskFull:            {"disk_full", 429, None, "a zone's disk has reached its reserve", "free space on the node named in the message, or shorten retention"},
	ZonesUnavailable:    {"zones_unavailable", 429, None, "durability all was asked for and a zone is away", "wait for the zone, or publish with durability in-sync"},
	Draining:            {"draining", 503, None, "the node is stopping", "try another node"},
	OutcomeUnknown:      {"outcome_unknown", 500, Unknown, "the request was proposed, and its outcome is not known", "repeat it under an idempotency key, or check before repeating"},
	IntakeClosed:        {"intake_closed", 500, Unknown, "the node that took the request was silent for too long", "check before repeating"},
	TooManyTopics:       {"too_many_topics", 429, None, "the cluster holds as many topics as it may", "delete topics"},
	TooManyGroups:       {"too_many_groups", 429, None, "the topic has as many consumer groups as it may", "delete consumer groups"},
	NotFound:            {"not_found", 404, None, "no such path", "see docs/http.md"},
	MethodNotAllowed:    {"method_not_allowed", 405, None, "the path does not take this method", "see the Allow header"},
	BadRequest:          {"bad_request", 400, None, "the request is not well formed", "see docs/http.md"},
	RequestTimeout:      {"request_timeout", 408, None, "the request did not arrive in time", "send the body without pauses"},
	Conflict:            {"conflict", 409, None, "the request contradicts the present state", "look at the present state"},
	Precondition:        {"precondition", 412, None, "the request's condition does not hold", "look at the present state"},
	Internal:            {"internal", 500, Unknown, "internal error", "look into the node's log for the request id"},
	MisdirectedHost:     {"misdirected_host", 400, None, "the Host header names no address of this node", "address the node by IP address or localhost, or start it with --public-host NAME"},
	RateLimited:         {"rate_limited", 429, None, "the token's rate limit is reached", "slow down and try again after Retry-After seconds"},
	QuotaExceeded:       {"quota_exceeded", 429, None, "the token's quota for today is used up", "wait until midnight UTC, or have the quota raised"},
	Paused:              {"paused", 409, None, "deliveries are paused", "resume the topic or the group"},
	TopicFull:           {"topic_full", 429, None, "the topic holds as many messages as it may", "wait until messages expire, or raise the topic's limit"},
	UploadNotFound:      {"upload_not_found", 409, None, "the upload is over", "send the message again"},
	Parked:              {"parked", 409, None, "Message is parked for this consumer group", "redrive it: tercet message redrive"},
	TooManyUploads:      {"too_many_uploads", 429, None, "the node has as many large messages under way as it may", "try again after Retry-After seconds"},
	WrongType:           {"wrong_type", 409, None, "the key holds a value of another type", "use another key, or delete this one first"},
	GroupExists:         {"group_exists", 409, None, "the consumer group exists already", "nothing to do"},
	StreamIDTooLow:      {"stream_id_too_low", 409, None, "the stream ID is not above the stream's last one", "let the stream choose the ID"},
	StreamIDZero:        {"stream_id_zero", 400, None, "the stream ID 0-0 is no entry's", "use a greater ID"},
	StreamExhausted:     {"stream_exhausted", 400, None, "an entry of the stream has the greatest possible ID, so nothing can come behind it", "publish to another topic"},
	StreamIDDeleted:     {"stream_id_deleted", 409, None, "the stream ID is below that of a deleted entry", "use a greater ID"},
	StreamCountTooLow:   {"stream_count_too_low", 409, None, "the counter is below the stream's length", "use a greater number"},
	KeyChanged:          {"key_changed", 409, None, "a watched key has changed", "read it again and repeat the transaction"},
	ReservedConsumer:    {"reserved_consumer", 400, None, "the consumer's name stands for the leases of the queue protocol", "use another name"},
	MemoryLimit:         {"memory_limit", 429, None, "the request needs more memory than the cluster keeps for such values", "delete keys, or use smaller values"},
	CopyTooLarge:        {"copy_too_large", 413, None, "the stream is too large for COPY, which takes 100000 entries and 16 MiB", "trim it first, or read it and add its entries elsewhere"},
}

// Info returns the catalogue's entry; an unknown code reads as Internal.
func (c Code) Info() Info {
	if int(c) < len(catalogue) && catalogue[c].Name != "" {
		return catalogue[c]
	}
	return catalogue[Internal]
}

// String returns the stable name.
func (c Code) String() string { return c.Info().Name }

// Codes returns all codes except OK in numeric order, for documentation and its test.
func Codes() []Code {
	out := make([]Code, 0, codeCount-1)
	for c := OK + 1; c < codeCount; c++ {
		out = append(out, c)
	}
	return out
}

// ByName finds a code by its stable name.
func ByName(name string) (Code, bool) {
	for c := OK; c < codeCount; c++ {
		if catalogue[c].Name == name {
			return c, true
		}
	}
	return Internal, false
}

// Error is an error of the catalogue. The zero RetryAfter means none is known.
type Error struct {
	Code Code
	// Message says what happened to what; empty means the catalogue's text.
	Message string
	// Hint overrides the catalogue's.
	Hint string
	// RetryAfter is how long the caller should wait before trying again.
	RetryAfter time.Duration
	// Fields are further members of the JSON body (for instance currentInflight).
	Fields map[string]any
	// Cause is logged, never shown to clients.
	Cause error
}

// New makes an Error with a formatted message.
func New(c Code, format string, args ...any) *Error {
	return &Error{Code: c, Message: fmt.Sprintf(format, args...)}
}

// Of makes an Error with the catalogue's text.
func Of(c Code) *Error { return &Error{Code: c} }

// With returns e with a cause.
func (e *Error) With(cause error) *Error { e.Cause = cause; return e }

// Error implements error.
func (e *Error) Error() string {
	text := e.Message
	if text == "" {
		text = e.Code.Info().Text
	}
	if e.Cause != nil {
		return text + ": " + e.Cause.Error()
	}
	return text
}

// Text returns what a client is told: the message without the cause.
func (e *Error) Text() string {
	if e.Message != "" {
		return e.Message
	}
	return e.Code.Info().Text
}

// Outcome returns what the error says of the operation.
func (e *Error) Outcome() Outcome { return e.Code.Info().Outcome }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// Is makes errors.Is match by code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// From returns err as an Error; what is none becomes Internal, whose outcome is unknown.
func From(err error) *Error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Code: Internal, Cause: err}
}

// CodeOf returns the code of err, OK for nil.
func CodeOf(err error) Code {
	if err == nil {
		return OK
	}
	return From(err).Code
}
