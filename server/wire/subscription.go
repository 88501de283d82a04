package wire

// Types of subscriptions: what a push looks like.
const (
	// PushV2Beta is a CloudEvent in binary mode that carries the message where it fits.
	PushV2Beta = "queue/v2beta"
	// PushV1Beta is a CloudEvent in structured mode that names the message and never carries it.
	PushV1Beta = "queue/v1beta"
)

// Subscription is the document of /v1/subscriptions: who is sent which messages by HTTP. A number that is not given
// means its default; answers have them all.
type Subscription struct {
	// ID is made from topic, group and deployment; it is not sent.
	ID string `json:"id,omitempty"`
	// Topic is a topic's name, or a prefix of names followed by one *.
	Topic         string `json:"topic"`
	ConsumerGroup string `json:"consumerGroup"`
	URL           string `json:"url"`
	// DeploymentID restricts the subscription to one deployment's messages. A group has subscriptions with a
	// deployment or without, not both for one topic.
	DeploymentID string `json:"deploymentId,omitempty"`
	// Type is queue/v2beta (default) or queue/v1beta.
	Type string `json:"type,omitempty"`
	// RetryAfterSeconds is how long after a failed delivery the next one comes (default 60).
	RetryAfterSeconds *int64 `json:"retryAfterSeconds,omitempty"`
	// InitialDelaySeconds holds messages back after they were published, and all of them after the subscription
	// was created or changed (default 0).
	InitialDelaySeconds *int64 `json:"initialDelaySeconds,omitempty"`
	// MaxConcurrency bounds the messages in flight in each topic (default: no bound).
	MaxConcurrency *int64 `json:"maxConcurrency,omitempty"`
	// MaxDeliveries bounds the deliveries of a message (default: no bound).
	MaxDeliveries *int64 `json:"maxDeliveries,omitempty"`
	// InlineBytesMax is the size up to which a message travels with its push (default 262144; 0: never).
	InlineBytesMax *int64 `json:"inlineBytesMax,omitempty"`
	// LeaseSeconds is the lease that a push begins with (default 60).
	LeaseSeconds *int64 `json:"leaseSeconds,omitempty"`
	// TimeoutSeconds is how long an answer is waited for (default 1800).
	TimeoutSeconds *int64 `json:"timeoutSeconds,omitempty"`
	// Paused holds all pushes back.
	Paused bool `json:"paused,omitempty"`
	// Source names what manages the subscription; `tercet apply --prune` deletes only what has its own.
	Source string `json:"source,omitempty"`

	// Secret signs the pushes ("whsec_…"). Without one, a new subscription gets a random secret and a changed one
	// keeps its own. It is shown in the answer that made it and never again.
	Secret string `json:"secret,omitempty"`
	// BearerToken is sent in the Authorization header. Never shown.
	BearerToken string `json:"bearerToken,omitempty"`
	// ClientCertificate and ClientKey (PEM) are presented to the endpoint. The key is never shown.
	ClientCertificate string `json:"clientCertificate,omitempty"`
	ClientKey         string `json:"clientKey,omitempty"`
	// CACertificate (PEM) is whom the endpoint's certificate is checked against instead of the system's.
	CACertificate string `json:"caCertificate,omitempty"`

	// Change is what a POST has done, or with ?dryRun=true would do: created, changed or unchanged.
	Change string `json:"change,omitempty"`
	// HasBearerToken, CreatedAt, ChangedAt, Revision and State are set in answers only.
	HasBearerToken bool   `json:"hasBearerToken,omitempty"`
	CreatedAt      string `json:"createdAt,omitempty"`
	ChangedAt      string `json:"changedAt,omitempty"`
	Revision       uint64 `json:"revision,omitempty"`
	// State is missing where the leader could not be asked.
	State *SubscriptionState `json:"state,omitempty"`
}

// SubscriptionState is what the leader knows of a subscription since it leads.
type SubscriptionState struct {
	// State is active, paused, throttled (the endpoint asked for a pause) or failing (the breaker is open).
	State string `json:"state"`
	// Breaker is closed, open or probing; OpenSince and NextProbe belong to one that is not closed.
	Breaker   string `json:"breaker"`
	OpenSince string `json:"openSince,omitempty"`
	NextProbe string `json:"nextProbe,omitempty"`
	// Inflight counts requests that run, Limit is how many may at the moment.
	Inflight int `json:"inflight"`
	Limit    int `json:"limit"`
	// Topics are the topics the subscription is sent messages of.
	Topics int `json:"topics"`
	// Requests counts answers and failures: Succeeded 2xx, Failed the others.
	Requests  uint64 `json:"requests"`
	Succeeded uint64 `json:"succeeded"`
	Failed    uint64 `json:"failed"`
	// LastError is the newest failure.
	LastError   string `json:"lastError,omitempty"`
	LastErrorAt string `json:"lastErrorAt,omitempty"`
	LastPushAt  string `json:"lastPushAt,omitempty"`
}

// Subscriptions is the answer to GET /v1/subscriptions.
type Subscriptions struct {
	Subscriptions []Subscription `json:"subscriptions"`
	// Next is the id to ask on after; empty at the end.
	Next string `json:"next,omitempty"`
}

// RotateSecret is the request of POST /v1/subscriptions/{id}/secret.
type RotateSecret struct {
	// Secret is the new one; a random one is made when it is empty.
	Secret string `json:"secret,omitempty"`
	// OverlapSeconds is how long pushes are signed with the old secret as well (default 86400).
	OverlapSeconds *int64 `json:"overlapSeconds,omitempty"`
}

// DeploymentDrain is the answer to GET /v1/deployments/{deployment}/drain: what of a deployment is left.
type DeploymentDrain struct {
	DeploymentID string `json:"deploymentId"`
	// Drained is set when nothing is left.
	Drained bool         `json:"drained"`
	Groups  []DrainGroup `json:"groups"`
}

// DrainGroup is what one group has not done of a deployment's messages.
type DrainGroup struct {
	SubscriptionID string `json:"subscriptionId"`
	Topic          string `json:"topic"`
	ConsumerGroup  string `json:"consumerGroup"`
	// Ready counts messages never delivered, Unsettled those delivered and not acknowledged.
	Ready     uint64 `json:"ready"`
	Unsettled uint64 `json:"unsettled"`
}
