package auth

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tercet.dev/tercet/internal/errs"
)

var errLimits = errors.New("limits: want no negative numbers, and burst only with requests-per-second")

// Token is a bearer token as it is kept: by its hash. What bears it is known to its holder alone.
type Token struct {
	Name string `json:"name" yaml:"name"`
	// SHA256 is the hash of the token's text, 64 hexadecimal digits.
	SHA256 string   `json:"sha256" yaml:"sha256"`
	Scopes []string `json:"scopes" yaml:"scopes"`
	Limits Limits   `json:"limits,omitzero" yaml:"limits"`
	// Expires ends it; the zero time never does.
	Expires time.Time `json:"expiresAt,omitzero" yaml:"expires"`
	// Created is when a stored token was made.
	Created time.Time `json:"createdAt,omitzero" yaml:"-"`
}

// Everything reports whether the token allows an access to everything.
func (t *Token) Everything(access Access) bool {
	scopes, err := ParseScopes(t.Scopes)
	p := &Principal{scopes: scopes}
	return err == nil && p.Allows(access, "")
}

// tokenPrefix makes a token recognisable for scanners of leaked secrets.
const tokenPrefix = "tct_"

// NewSecret returns the text of a new token: 256 random bits.
func NewSecret() string {
	var random [32]byte
	rand.Read(random[:])
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(random[:])
}

// secretBytesMin is the shortest text that may be chosen for a token.
const secretBytesMin = 20

// HashSecret returns what is kept of a token's text.
func HashSecret(secret string) (string, error) {
	if len(secret) < secretBytesMin || len(secret) > credentialBytesMax {
		return "", fmt.Errorf("a token has %d to %d characters", secretBytesMin, credentialBytesMax)
	}
	for i := 0; i < len(secret); i++ {
		if c := secret[i]; c <= ' ' || c >= 0x7f {
			return "", errors.New("a token has visible ASCII characters only")
		}
	}
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:]), nil
}

// Check refuses a token that could not be used.
func (t *Token) Check() error {
	if t.Name == "" || len(t.Name) > 128 {
		return errors.New("a token's name has 1 to 128 characters")
	}
	for _, c := range []byte(t.Name) {
		if c <= ' ' || c >= 0x7f || c == '/' || c == '"' || c == '\\' {
			return fmt.Errorf("token name %q: want visible ASCII characters without / \" \\", t.Name)
		}
	}
	if sum, err := hex.DecodeString(t.SHA256); err != nil || len(sum) != sha256.Size {
		return fmt.Errorf("token %s: sha256 has 64 hexadecimal digits", t.Name)
	}
	if _, err := ParseScopes(t.Scopes); err != nil {
		return fmt.Errorf("token %s: %w", t.Name, err)
	}
	if err := t.Limits.Check(); err != nil {
		return fmt.Errorf("token %s: %w", t.Name, err)
	}
	return nil
}

// Options are what an Authenticator is made with.
type Options struct {
	// Tokens are those of the configuration. They hold besides the stored ones.
	Tokens  []Token
	Issuers []Issuer
	// Stored says that there is a replicated table of tokens as well: until SetStored was called nobody is let in,
	// since a token may have been required all along.
	Stored bool
	// Client fetches issuers' keys; the default has time-outs and follows no redirects to plain http.
	Client *http.Client
	// Now is the time; the default is time.Now.
	Now func() time.Time
}

// Authenticator checks credentials. It is safe for concurrent use.
type Authenticator struct {
	now     func() time.Time
	issuers map[string]*issuer

	mu                 sync.Mutex // guards what the table is built from
	configured, stored []Token
	loaded             bool // stored was set
	table              atomic.Pointer[table]
}

// table is what is known at a time. It never changes.
type table struct {
	// byHash is looked up by a hash that nobody can choose, so the time a look-up takes says nothing of the tokens.
	byHash map[[sha256.Size]byte]*entry
	// required: somebody has to say who they are.
	required bool
	// loaded: the stored tokens are among them.
	loaded bool
}

type entry struct {
	hash      [sha256.Size]byte
	principal *Principal
	expires   time.Time
	limits    Limits
}

// New makes an Authenticator.
func New(o Options) (*Authenticator, error) {
	a := &Authenticator{now: o.Now, configured: o.Tokens, issuers: make(map[string]*issuer), loaded: !o.Stored}
	if a.now == nil {
		a.now = time.Now
	}
	if err := checkTokens(o.Tokens); err != nil {
		return nil, err
	}
	for _, c := range o.Issuers {
		i, err := newIssuer(c, o.Client, a.now)
		if err != nil {
			return nil, err
		}
		if a.issuers[c.Issuer] != nil {
			return nil, fmt.Errorf("issuer %s stands twice", c.Issuer)
		}
		a.issuers[c.Issuer] = i
	}
	return a, a.build()
}

func checkTokens(tokens []Token) error {
	names := make(map[string]bool)
	for i := range tokens {
		t := &tokens[i]
		if err := t.Check(); err != nil {
			return err
		}
		if names[t.Name] {
			return fmt.Errorf("token %s stands twice", t.Name)
		}
		names[t.Name] = true
	}
	return nil
}

// SetConfigured replaces the tokens of the configuration, all of them or, with an error, none. The last one cannot be
// taken away like that.
func (a *Authenticator) SetConfigured(tokens []Token) error {
	if err := checkTokens(tokens); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(tokens) == 0 && len(a.configured) > 0 {
		return errors.New("the last token of the configuration is gone; that needs a restart, since it may open the node to everybody")
	}
	a.configured = tokens
	return a.build()
}

// SetStored replaces the tokens of the replicated table. One that cannot be used is left out, and named in the error.
func (a *Authenticator) SetStored(tokens []Token) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.stored, a.loaded = tokens, true
	return a.build()
}

// build makes the table anew.
func (a *Authenticator) build() error {
	old := a.table.Load()
	t := &table{byHash: make(map[[sha256.Size]byte]*entry), loaded: a.loaded}
	t.required = len(a.configured)+len(a.issuers)+len(a.stored) > 0
	var problems []error
	add := func(token *Token) {
		if err := token.Check(); err != nil {
			problems = append(problems, err)
			return
		}
		scopes, _ := ParseScopes(token.Scopes)
		e := &entry{expires: token.Expires, limits: token.Limits}
		_, _ = hex.Decode(e.hash[:], []byte(token.SHA256))
		e.principal = &Principal{Name: token.Name, scopes: scopes, meter: newMeter(token.Limits)}
		if old != nil {
			// A change to other tokens gives nobody a fresh allowance.
			if before := old.byHash[e.hash]; before != nil && before.limits == e.limits {
				e.principal.meter = before.principal.meter
			}
		}
		t.byHash[e.hash] = e
	}
	for i := range a.stored {
		add(&a.stored[i])
	}
	for i := range a.configured {
		add(&a.configured[i])
	}
	a.table.Store(t)
	return errors.Join(problems...)
}

// Configured returns the tokens of the configuration.
func (a *Authenticator) Configured() []Token {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.configured)
}

// Issuers reports whether JWTs are accepted.
func (a *Authenticator) Issuers() bool { return len(a.issuers) > 0 }

// Required reports whether requests without credentials are refused.
func (a *Authenticator) Required() bool {
	t := a.table.Load()
	return t.required || !t.loaded
}

// Ready returns nil once the stored tokens have been read, if there may be any.
func (a *Authenticator) Ready() error {
	if !a.table.Load().loaded {
		return notLoaded()
	}
	return nil
}

// credentialBytesMax bounds what is looked at as a token.
const credentialBytesMax = 8 << 10

var errCredential = errs.Of(errs.Unauthorized)

// Authenticate returns who makes a request, by its Authorization header.
func (a *Authenticator) Authenticate(r *http.Request) (*Principal, error) {
	values := r.Header["Authorization"]
	switch t := a.table.Load(); {
	case t.loaded && !t.required:
		return nil, nil
	case !t.loaded && len(values) == 0:
		return nil, notLoaded()
	}
	if len(values) != 1 {
		return nil, errCredential
	}
	scheme, credential, _ := strings.Cut(values[0], " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return nil, errCredential
	}
	return a.Check(r.Context(), credential)
}

// Check returns who bears a token, or an *errs.Error of code Unauthorized that says nothing of why.
func (a *Authenticator) Check(ctx context.Context, credential string) (*Principal, error) {
	if len(credential) == 0 || len(credential) > credentialBytesMax {
		return nil, errCredential
	}
	t := a.table.Load()
	hash := sha256.Sum256([]byte(credential))
	if e := t.byHash[hash]; e != nil && subtle.ConstantTimeCompare(e.hash[:], hash[:]) == 1 {
		if !e.expires.IsZero() && !a.now().Before(e.expires) {
			return nil, errCredential
		}
		return e.principal, nil
	}
	if len(a.issuers) > 0 && strings.Count(credential, ".") == 2 {
		if i := a.issuers[claimedIssuer(credential)]; i != nil {
			return i.check(ctx, credential, hash)
		}
	}
	if !t.loaded {
		return nil, notLoaded()
	}
	return nil, errCredential
}

// notLoaded is a refusal that is over in a moment: the credential may be one of the stored ones.
func notLoaded() error {
	return errs.New(errs.NoLeader, "this node has not read the cluster's tokens yet")
}
