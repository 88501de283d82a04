package auth

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
)

// Issuer is an OpenID Connect issuer whose JWTs are accepted.
type Issuer struct {
	// Issuer is the URL that tokens carry as iss, and where the discovery document is found.
	Issuer string `yaml:"issuer"`
	// Audience has to be among a token's aud.
	Audience string `yaml:"audience"`
	// JWKSURL is where the keys are; the default is what the discovery document says.
	JWKSURL string `yaml:"jwks-url"`
	// Claims have to be in a token, each with one of the values.
	Claims map[string][]string `yaml:"claims"`
	// Scopes are what every accepted token may do. ScopesClaim names a claim that holds further scopes, as a list or
	// separated by spaces; what is no scope of ours there is passed over.
	Scopes      []string `yaml:"scopes"`
	ScopesClaim string   `yaml:"scopes-claim"`
	// Limits hold for each subject by itself.
	Limits Limits `yaml:"limits"`
}

// The rules for JWTs.
const (
	// leeway is how far clocks may differ.
	leeway = time.Minute
	// keysEvery is how often keys are fetched at most, whatever tokens arrive and whether or not it works.
	keysEvery = time.Minute
	// keysFresh is how long keys are used without asking whether one was withdrawn.
	keysFresh = time.Hour
	// fetchTimeout and fetchBytesMax bound one document of an issuer.
	fetchTimeout  = 5 * time.Second
	fetchBytesMax = 256 << 10
	// verifiedMax bounds the remembered tokens and subjects, verifiedFor how long a signature is not checked again.
	verifiedMax = 4096
	verifiedFor = time.Minute
)

// algorithms are the signatures that are accepted: with public keys only, so that no public key is ever taken for a
// shared secret.
var algorithms = []jose.SignatureAlgorithm{jose.RS256, jose.ES256, jose.EdDSA}

// issuer checks the tokens of one issuer.
type issuer struct {
	config   Issuer
	scopes   []Scope
	verifier *oidc.IDTokenVerifier
	now      func() time.Time

	mu       sync.Mutex
	verified map[[sha256.Size]byte]verified
	meters   map[string]*meter
}

type verified struct {
	principal *Principal
	until     time.Time
}

func newIssuer(c Issuer, client *http.Client, now func() time.Time) (*issuer, error) {
	if err := checkURL(c.Issuer); err != nil {
		return nil, fmt.Errorf("issuer %q: %w", c.Issuer, err)
	}
	if c.JWKSURL != "" {
		if err := checkURL(c.JWKSURL); err != nil {
			return nil, fmt.Errorf("issuer %s: jwks-url %q: %w", c.Issuer, c.JWKSURL, err)
		}
	}
	if c.Audience == "" {
		return nil, fmt.Errorf("issuer %s: no audience: any token of the issuer, made for whomever, would be accepted", c.Issuer)
	}
	i := &issuer{config: c, now: now, verified: make(map[[sha256.Size]byte]verified), meters: make(map[string]*meter)}
	if len(c.Scopes) > 0 || c.ScopesClaim == "" {
		var err error
		if i.scopes, err = ParseScopes(c.Scopes); err != nil {
			return nil, fmt.Errorf("issuer %s: %w", c.Issuer, err)
		}
	}
	if err := c.Limits.Check(); err != nil {
		return nil, fmt.Errorf("issuer %s: %w", c.Issuer, err)
	}
	if client == nil {
		client = &http.Client{Timeout: fetchTimeout, CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) > 3 {
				return errors.New("too many redirects")
			}
			return checkURL(r.URL.String())
		}}
	}
	names := make([]string, len(algorithms))
	for n, alg := range algorithms {
		names[n] = string(alg)
	}
	keys := &keySet{issuer: c.Issuer, url: c.JWKSURL, client: client, now: now, gate: make(chan struct{}, 1)}
	i.verifier = oidc.NewVerifier(c.Issuer, keys, &oidc.Config{
		ClientID: c.Audience, SupportedSigningAlgs: names,
		SkipExpiryCheck: true, // checked here, with a leeway in both directions
	})
	return i, nil
}

// checkURL refuses addresses whose content anybody on the way could replace.
func checkURL(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" {
		return errors.New("want an https URL")
	}
	if u.Scheme == "http" {
		host := u.Hostname()
		if ip, err := netip.ParseAddr(host); host == "localhost" || err == nil && ip.IsLoopback() {
			return nil
		}
	}
	if u.Scheme != "https" {
		return errors.New("want an https URL")
	}
	return nil
}

// claimedIssuer reads iss without believing it.
func claimedIssuer(jwt string) string {
	_, rest, _ := strings.Cut(jwt, ".")
	payload, _, _ := strings.Cut(rest, ".")
	data, err := base64.RawURLEncoding.DecodeString(payload)
	if err != nil {
		return ""
	}
	var claims struct {
		Issuer string `json:"iss"`
	}
	if json.Unmarshal(data, &claims) != nil {
		return ""
	}
	return claims.Issuer
}

// check returns whose token it is.
func (i *issuer) check(ctx context.Context, jwt string, hash [sha256.Size]byte) (*Principal, error) {
	now := i.now()
	i.mu.Lock()
	known, ok := i.verified[hash]
	i.mu.Unlock()
	if ok && now.Before(known.until) {
		return known.principal, nil
	}
	token, err := i.verifier.Verify(ctx, jwt)
	if err != nil {
		return nil, errCredential
	}
	claims := make(map[string]any)
	if err := token.Claims(&claims); err != nil {
		return nil, errCredential
	}
	if token.Expiry.IsZero() || !now.Before(token.Expiry.Add(leeway)) {
		return nil, errCredential
	}
	if value, present := claims["nbf"]; present {
		begin, ok := value.(float64)
		if !ok || now.Add(leeway).Before(time.Unix(int64(begin), 0)) {
			return nil, errCredential
		}
	}
	for name, allowed := range i.config.Claims {
		if !slices.ContainsFunc(texts(claims[name]), func(v string) bool { return slices.Contains(allowed, v) }) {
			return nil, errCredential
		}
	}
	scopes := i.scopes
	if i.config.ScopesClaim != "" {
		scopes = slices.Clone(scopes)
		for _, text := range texts(claims[i.config.ScopesClaim]) {
			for word := range strings.FieldsSeq(text) {
				if s, err := ParseScope(word); err == nil {
					scopes = append(scopes, s)
				}
			}
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	p := &Principal{Name: i.config.Issuer + " " + token.Subject, scopes: scopes}
	if i.config.Limits != (Limits{}) {
		if p.meter = i.meters[token.Subject]; p.meter == nil {
			if len(i.meters) >= verifiedMax {
				clear(i.meters)
			}
			p.meter = newMeter(i.config.Limits)
			i.meters[token.Subject] = p.meter
		}
	}
	until := now.Add(verifiedFor)
	if end := token.Expiry.Add(leeway); end.Before(until) {
		until = end
	}
	if len(i.verified) >= verifiedMax {
		clear(i.verified)
	}
	i.verified[hash] = verified{p, until}
	return p, nil
}

// texts returns a claim's value as the texts in it.
func texts(v any) (out []string) {
	switch v := v.(type) {
	case string:
		return []string{v}
	case bool:
		return []string{fmt.Sprint(v)}
	case []any:
		for _, item := range v {
			if s, ok := item.(string); ok {
				out = append(out, s)
			}
		}
	}
	return out
}

// keySet holds an issuer's keys. In contrast to go-oidc's it fetches at most once a minute, whatever key ids arrive, and
// goes on with the keys it has while the issuer does not answer.
type keySet struct {
	issuer, url string
	client      *http.Client
	now         func() time.Time
	// gate is held by whoever fetches; the others wait for the result.
	gate chan struct{}

	mu      sync.Mutex
	keys    []jose.JSONWebKey
	fetched time.Time // successfully
	tried   time.Time
}

// VerifySignature implements oidc.KeySet.
func (k *keySet) VerifySignature(ctx context.Context, jwt string) ([]byte, error) {
	jws, err := jose.ParseSignedCompact(jwt, algorithms)
	if err != nil {
		return nil, err
	}
	header := jws.Signatures[0].Header
	try := func() ([]byte, bool) {
		k.mu.Lock()
		keys := k.keys
		k.mu.Unlock()
		for i := range keys {
			key := &keys[i]
			if header.KeyID != "" && key.KeyID != header.KeyID || key.Algorithm != "" && key.Algorithm != header.Algorithm {
				continue
			}
			if payload, err := jws.Verify(key); err == nil {
				return payload, true
			}
		}
		return nil, false
	}
	if k.stale(keysFresh) {
		k.refresh(ctx)
	}
	payload, ok := try()
	if !ok {
		if !k.refresh(ctx) {
			return nil, errors.New("no key of the issuer made the signature")
		}
		if payload, ok = try(); !ok {
			return nil, errors.New("no key of the issuer made the signature")
		}
	}
	return payload, nil
}

// stale reports whether the keys were fetched longer ago than age.
func (k *keySet) stale(age time.Duration) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.fetched.IsZero() || k.now().Sub(k.fetched) > age
}

// refresh fetches the keys unless that was tried a moment ago, and reports whether there are other keys to try.
func (k *keySet) refresh(ctx context.Context) bool {
	asked := k.now()
	select {
	case k.gate <- struct{}{}:
		defer func() { <-k.gate }()
	case <-ctx.Done():
		return false
	}
	k.mu.Lock()
	tried, fetched := k.tried, k.fetched
	recent := !tried.IsZero() && k.now().Sub(tried) < keysEvery
	if !recent {
		k.tried = k.now()
	}
	k.mu.Unlock()
	if recent {
		return !fetched.Before(asked) // somebody fetched them while this one waited
	}
	// The fetch serves all who wait and outlives the request that began it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
	defer cancel()
	keys, err := k.fetch(ctx)
	if err != nil {
		return false
	}
	k.mu.Lock()
	k.keys, k.fetched = keys, k.now()
	k.mu.Unlock()
	return true
}

// fetch reads the keys from the issuer.
func (k *keySet) fetch(ctx context.Context) ([]jose.JSONWebKey, error) {
	address := k.url
	if address == "" {
		var discovery struct {
			Issuer  string `json:"issuer"`
			JWKSURL string `json:"jwks_uri"`
		}
		if err := k.get(ctx, strings.TrimSuffix(k.issuer, "/")+"/.well-known/openid-configuration", &discovery); err != nil {
			return nil, err
		}
		if discovery.Issuer != k.issuer {
			return nil, fmt.Errorf("the discovery document is of issuer %q", discovery.Issuer)
		}
		if err := checkURL(discovery.JWKSURL); err != nil {
			return nil, err
		}
		address = discovery.JWKSURL
	}
	var raw struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := k.get(ctx, address, &raw); err != nil {
		return nil, err
	}
	var keys []jose.JSONWebKey
	for _, text := range raw.Keys {
		// A key of a kind that is not known here does not spoil the others.
		var key jose.JSONWebKey
		if json.Unmarshal(text, &key) == nil && key.Valid() && key.IsPublic() && (key.Use == "" || key.Use == "sig") {
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return nil, errors.New("the issuer has no keys that can be used")
	}
	return keys, nil
}

// get fetches one JSON document.
func (k *keySet) get(ctx context.Context, address string, document any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	res, err := k.client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", address, res.Status)
	}
	data, err := io.ReadAll(io.LimitReader(res.Body, fetchBytesMax+1))
	if err != nil {
		return err
	}
	if len(data) > fetchBytesMax {
		return fmt.Errorf("%s: the document has more than %d bytes", address, fetchBytesMax)
	}
	return json.Unmarshal(data, document)
}
