package push

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/server/wire"
)

// Defaults and bounds of a subscription's numbers, in the unit of their field.
const (
	retryAfterDefault = 60
	retryAfterMax     = int64(limits.RetentionMax / time.Second)
	initialDelayMax   = int64(limits.DelayMax / time.Second)
	concurrencyMax    = 1<<31 - 1
	deliveriesMax     = 1<<31 - 1
	inlineBytesMax    = 256 << 10
	// The lease has to outlast the SDK's first extension, after 10 s at the soonest, with room to spare.
	leaseDefault   = 60
	leaseMin       = 30
	leaseMax       = int64(limits.VisibilityMax / time.Second)
	timeoutDefault = 1800
	timeoutMax     = 3600

	urlBytesMax    = 4 << 10
	tokenBytesMax  = 8 << 10
	pemBytesMax    = 16 << 10
	sourceBytesMax = 256
	// overlapDefault is how long an old secret is used beside a new one, overlapMax the longest choice.
	overlapDefault = int64(24 * time.Hour / time.Second)
	overlapMax     = int64(30 * 24 * time.Hour / time.Second)
	secretsMax     = 4
)

// Subscription is a subscription as it is stored: with all numbers set and all secrets inside. Stored ones are never
// changed in place.
type Subscription struct {
	ID                string   `json:"id"`
	Topic             string   `json:"topic"`
	Group             string   `json:"group"`
	URL               string   `json:"url"`
	Deployment        string   `json:"deployment,omitempty"`
	Type              string   `json:"type"`
	RetryAfter        int64    `json:"retryAfter"`
	InitialDelay      int64    `json:"initialDelay,omitempty"`
	MaxConcurrency    int64    `json:"maxConcurrency,omitempty"`
	MaxDeliveries     int64    `json:"maxDeliveries,omitempty"`
	InlineMax         int64    `json:"inlineMax"`
	Lease             int64    `json:"lease"`
	Timeout           int64    `json:"timeout"`
	Paused            bool     `json:"paused,omitempty"`
	Source            string   `json:"source,omitempty"`
	Secrets           []Secret `json:"secrets"`
	BearerToken       string   `json:"bearerToken,omitempty"`
	ClientCertificate string   `json:"clientCertificate,omitempty"`
	ClientKey         string   `json:"clientKey,omitempty"`
	CACertificate     string   `json:"caCertificate,omitempty"`
	// CreatedAt and ChangedAt are Unix ms.
	CreatedAt int64 `json:"createdAt"`
	ChangedAt int64 `json:"changedAt"`

	// Revision is the document's.
	Revision uint64 `json:"-"`
}

// Secret is one of a subscription's signing secrets, the newest first.
type Secret struct {
	Text string `json:"text"`
	// Until is when it stops being used, Unix ms; 0 for the newest.
	Until int64 `json:"until,omitempty"`
}

// SubscriptionID names the subscription of a topic or prefix, a group and a deployment.
func SubscriptionID(topic, group, deployment string) string {
	sum := sha256.Sum256([]byte(topic + "\x00" + group + "\x00" + deployment))
	return "sub_" + strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(sum[:15]))
}

// validName reports whether s is a topic, group or deployment name of the queue protocol.
func validName(s string) bool {
	if len(s) == 0 || len(s) > limits.NameBytesMax {
		return false
	}
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}

// validPattern reports whether s is a name, or a prefix of one followed by *.
func validPattern(s string) bool {
	prefix, wild := strings.CutSuffix(s, "*")
	return wild && prefix == "" || validName(prefix)
}

// Matches reports whether a topic is one of those the pattern stands for.
func Matches(pattern, topic string) bool {
	if prefix, wild := strings.CutSuffix(pattern, "*"); wild {
		return strings.HasPrefix(topic, prefix) && validName(topic)
	}
	return pattern == topic
}

// visible reports whether s can stand in a header.
func visible(s string) bool {
	for i := 0; i < len(s); i++ {
		if s[i] < ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return true
}

// number reads an optional number of a document.
func number(problems *[]string, name string, v *int64, def, least, most int64) int64 {
	switch {
	case v == nil:
		return def
	case *v < least || *v > most:
		*problems = append(*problems, fmt.Sprintf("%s must be from %d to %d", name, least, most))
	}
	return *v
}

// fromWire checks a document and makes it a subscription without a secret of its own.
func fromWire(w *wire.Subscription, guard *Guard) (*Subscription, error) {
	var problems []string
	problem := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	s := &Subscription{
		Topic: w.Topic, Group: w.ConsumerGroup, URL: w.URL, Deployment: w.DeploymentID, Type: w.Type, Paused: w.Paused, Source: w.Source,
		BearerToken: w.BearerToken, ClientCertificate: w.ClientCertificate, ClientKey: w.ClientKey, CACertificate: w.CACertificate,
	}
	if !validPattern(s.Topic) {
		problem("topic must be a name of 1 to %d characters out of A-Z a-z 0-9 _ -, or a prefix of names followed by one *", limits.NameBytesMax)
	}
	if !validName(s.Group) {
		problem("consumerGroup must be a name of 1 to %d characters out of A-Z a-z 0-9 _ -", limits.NameBytesMax)
	}
	if s.Deployment != "" && !validName(s.Deployment) {
		problem("deploymentId must be a name of 1 to %d characters out of A-Z a-z 0-9 _ -", limits.NameBytesMax)
	}
	switch {
	case s.Type == "":
		s.Type = wire.PushV2Beta
	case s.Type != wire.PushV2Beta && s.Type != wire.PushV1Beta:
		problem("type must be %s or %s", wire.PushV2Beta, wire.PushV1Beta)
	}
	if len(s.URL) > urlBytesMax {
		problem("url is longer than %d bytes", urlBytesMax)
	} else if _, err := guard.CheckURL(s.URL); err != nil {
		problem("url: %v", err)
	}
	s.RetryAfter = number(&problems, "retryAfterSeconds", w.RetryAfterSeconds, retryAfterDefault, 1, retryAfterMax)
	s.InitialDelay = number(&problems, "initialDelaySeconds", w.InitialDelaySeconds, 0, 0, initialDelayMax)
	s.MaxConcurrency = number(&problems, "maxConcurrency", w.MaxConcurrency, 0, 1, concurrencyMax)
	s.MaxDeliveries = number(&problems, "maxDeliveries", w.MaxDeliveries, 0, 1, deliveriesMax)
	s.InlineMax = number(&problems, "inlineBytesMax", w.InlineBytesMax, inlineBytesMax, 0, inlineBytesMax)
	s.Lease = number(&problems, "leaseSeconds", w.LeaseSeconds, leaseDefault, leaseMin, leaseMax)
	s.Timeout = number(&problems, "timeoutSeconds", w.TimeoutSeconds, timeoutDefault, 1, timeoutMax)
	if len(s.Source) > sourceBytesMax {
		problem("source is longer than %d bytes", sourceBytesMax)
	}
	if len(s.BearerToken) > tokenBytesMax || !visible(s.BearerToken) {
		problem("bearerToken must be at most %d visible characters", tokenBytesMax)
	}
	if w.Secret != "" {
		if _, err := secretKey(w.Secret); err != nil {
			problem("secret: %v", err)
		}
		s.Secrets = []Secret{{Text: w.Secret}}
	}
	if len(s.ClientCertificate)+len(s.ClientKey)+len(s.CACertificate) > pemBytesMax {
		problem("certificates and key are longer than %d bytes together", pemBytesMax)
	} else if _, err := s.tlsConfig(); err != nil {
		problem("%v", err)
	}
	if len(problems) > 0 {
		return nil, errs.New(errs.InvalidBody, "%s", strings.Join(problems, "; "))
	}
	s.ID = SubscriptionID(s.Topic, s.Group, s.Deployment)
	return s, nil
}

// toWire makes the document that is shown: without secrets.
func (s *Subscription) toWire() wire.Subscription {
	some := func(v int64) *int64 { return &v }
	w := wire.Subscription{
		ID: s.ID, Topic: s.Topic, ConsumerGroup: s.Group, URL: s.URL, DeploymentID: s.Deployment, Type: s.Type,
		RetryAfterSeconds: some(s.RetryAfter), InitialDelaySeconds: some(s.InitialDelay), InlineBytesMax: some(s.InlineMax),
		LeaseSeconds: some(s.Lease), TimeoutSeconds: some(s.Timeout), Paused: s.Paused, Source: s.Source,
		ClientCertificate: s.ClientCertificate, CACertificate: s.CACertificate, HasBearerToken: s.BearerToken != "",
		CreatedAt: timeText(s.CreatedAt), ChangedAt: timeText(s.ChangedAt), Revision: s.Revision,
	}
	if s.MaxConcurrency > 0 {
		w.MaxConcurrency = some(s.MaxConcurrency)
	}
	if s.MaxDeliveries > 0 {
		w.MaxDeliveries = some(s.MaxDeliveries)
	}
	return w
}

// same reports whether s asks for what t asks for, whatever they were made from.
func (s *Subscription) same(t *Subscription) bool {
	a, b := *s, *t
	a.CreatedAt, a.ChangedAt, a.Revision = b.CreatedAt, b.ChangedAt, b.Revision
	x, errX := json.Marshal(&a)
	y, errY := json.Marshal(&b)
	return errX == nil && errY == nil && string(x) == string(y)
}

func timeText(ms int64) string {
	if ms <= 0 {
		return ""
	}
	return string(wire.AppendTime(nil, ms))
}

// keys returns the keys to sign with at a time.
func (s *Subscription) keys(nowMs int64) [][]byte {
	var keys [][]byte
	for _, secret := range s.Secrets {
		if secret.Until != 0 && secret.Until <= nowMs {
			continue
		}
		if key, err := secretKey(secret.Text); err == nil {
			keys = append(keys, key)
		}
	}
	return keys
}

// tlsConfig is what the subscription's certificates ask for.
func (s *Subscription) tlsConfig() (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if (s.ClientCertificate == "") != (s.ClientKey == "") {
		return nil, errors.New("clientCertificate and clientKey belong together")
	}
	if s.ClientCertificate != "" {
		pair, err := tls.X509KeyPair([]byte(s.ClientCertificate), []byte(s.ClientKey))
		if err != nil {
			// The key itself never shows in an error.
			return nil, errors.New("clientCertificate and clientKey are not a PEM certificate and its key")
		}
		c.Certificates = []tls.Certificate{pair}
	}
	if s.CACertificate != "" {
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM([]byte(s.CACertificate)) {
			return nil, errors.New("caCertificate holds no PEM certificate")
		}
	}
	return c, nil
}

// client makes what carries the subscription's pushes: connections of its own, so that nothing of one endpoint can
// hold another up.
func (s *Subscription) client(guard *Guard, connections int) (*http.Client, *url.URL, error) {
	u, err := guard.CheckURL(s.URL)
	if err != nil {
		return nil, nil, err
	}
	config, err := s.tlsConfig()
	if err != nil {
		return nil, nil, err
	}
	secure := u.Scheme == "https"
	t := &http.Transport{
		// No proxy: it would see the requests and resolve the names.
		DialContext:            guard.dialer(secure),
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    tlsTimeout,
		ForceAttemptHTTP2:      secure,
		MaxIdleConns:           connections,
		MaxIdleConnsPerHost:    connections,
		IdleConnTimeout:        idleConnTimeout,
		MaxResponseHeaderBytes: answerHeaderBytesMax,
		DisableCompression:     true,
	}
	return &http.Client{Transport: t, CheckRedirect: noRedirects}, u, nil
}

// groupKey is what the subscriptions of one group's deployments have in common.
type groupKey struct{ topic, group string }
