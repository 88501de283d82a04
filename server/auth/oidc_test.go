package auth

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"tercet.dev/tercet/internal/errs"
)

// localIssuer is an OpenID Connect issuer on this machine.
type localIssuer struct {
	*httptest.Server
	rsa     *rsa.PrivateKey
	ec      *ecdsa.PrivateKey
	ed      ed25519.PrivateKey
	fetches atomic.Int64
	down    atomic.Bool

	mu   sync.Mutex
	keys []jose.JSONWebKey
}

func newLocalIssuer(t *testing.T) *localIssuer {
	t.Helper()
	i := &localIssuer{}
	var err error
	if i.rsa, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		t.Fatal(err)
	}
	if i.ec, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	if _, i.ed, err = ed25519.GenerateKey(rand.Reader); err != nil {
		t.Fatal(err)
	}
	i.keys = []jose.JSONWebKey{
		{KeyID: "r1", Key: &i.rsa.PublicKey, Use: "sig", Algorithm: "RS256"}, {KeyID: "e1", Key: &i.ec.PublicKey, Use: "sig"}, {KeyID: "d1", Key: i.ed.Public(), Use: "sig"},
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, i.URL, i.URL+"/keys")
	})
	mux.HandleFunc("/keys", func(w http.ResponseWriter, r *http.Request) {
		i.fetches.Add(1)
		if i.down.Load() {
			http.Error(w, "down", http.StatusBadGateway)
			return
		}
		i.mu.Lock()
		defer i.mu.Unlock()
		json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: i.keys})
	})
	i.Server = httptest.NewTLSServer(mux)
	t.Cleanup(i.Close)
	return i
}

func (i *localIssuer) sign(t *testing.T, alg jose.SignatureAlgorithm, kid string, key any, claims map[string]any) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, (&jose.SignerOptions{}).WithHeader("kid", kid).WithType("JWT"))
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	jws, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	text, err := jws.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func TestOIDC(t *testing.T) {
	i := newLocalIssuer(t)
	var clock atomic.Int64
	clock.Store(1_800_000_000)
	now := func() time.Time { return time.Unix(clock.Load(), 0) }
	a, err := New(Options{
		Issuers: []Issuer{{
			Issuer: i.URL, Audience: "tercet", Scopes: []string{"receive:all-*"}, ScopesClaim: "tercet", Claims: map[string][]string{"project": {"p1", "p2"}},
			Limits: Limits{RequestsPerSecond: 1},
		}},
		Client: i.Client(), Now: now,
	})
	if err != nil {
		t.Fatal(err)
	}
	claims := func(change func(map[string]any)) map[string]any {
		c := map[string]any{
			"iss": i.URL, "aud": []string{"other", "tercet"}, "sub": "user-1", "exp": clock.Load() + 600, "nbf": clock.Load(), "iat": clock.Load(), "project": "p1",
			"tercet": "publish:orders-* write:nothing",
		}
		if change != nil {
			change(c)
		}
		return c
	}
	check := func(name, token string, want bool) *Principal {
		t.Helper()
		p, err := a.Check(context.Background(), token)
		if (err == nil) != want || err != nil && errs.CodeOf(err) != errs.Unauthorized {
			t.Errorf("%s: %v, want success %v", name, err, want)
		}
		return p
	}
	p := check("RS256", i.sign(t, jose.RS256, "r1", i.rsa, claims(nil)), true)
	if !p.Allows(Publish, "orders-1") || p.Allows(Publish, "bills") || !p.Allows(Receive, "all-1") || p.Allows(Receive, "orders-1") || p.Allows(Admin, "") {
		t.Errorf("scopes %v", p.scopes)
	}
	if p.Name != i.URL+" user-1" {
		t.Errorf("name %q", p.Name)
	}
	check("ES256", i.sign(t, jose.ES256, "e1", i.ec, claims(nil)), true)
	check("EdDSA", i.sign(t, jose.EdDSA, "d1", i.ed, claims(nil)), true)
	if n := i.fetches.Load(); n != 1 {
		t.Errorf("the keys were fetched %d times", n)
	}
	if wait := p.Request(now()); wait != 0 {
		t.Errorf("the first request waits %s", wait)
	}
	if check("the same subject", i.sign(t, jose.EdDSA, "d1", i.ed, claims(func(c map[string]any) { c["jti"] = "2" })), true).Request(now()) == 0 {
		t.Error("a new token of the same subject has a fresh allowance")
	}

	for name, change := range map[string]func(map[string]any){
		"expired":          func(c map[string]any) { c["exp"] = clock.Load() - 60 },
		"no expiry":        func(c map[string]any) { delete(c, "exp") },
		"not yet valid":    func(c map[string]any) { c["nbf"] = clock.Load() + 61 },
		"nbf is a text":    func(c map[string]any) { c["nbf"] = "now" },
		"other audience":   func(c map[string]any) { c["aud"] = "other" },
		"no audience":      func(c map[string]any) { delete(c, "aud") },
		"other issuer":     func(c map[string]any) { c["iss"] = i.URL + "/" },
		"no issuer":        func(c map[string]any) { delete(c, "iss") },
		"other project":    func(c map[string]any) { c["project"] = "p3" },
		"no project":       func(c map[string]any) { delete(c, "project") },
		"project is a map": func(c map[string]any) { c["project"] = map[string]any{"p1": "p1"} },
	} {
		check(name, i.sign(t, jose.RS256, "r1", i.rsa, claims(change)), false)
	}
	for name, change := range map[string]func(map[string]any){
		"expired within the leeway":   func(c map[string]any) { c["exp"] = clock.Load() - 59 },
		"valid within the leeway":     func(c map[string]any) { c["nbf"] = clock.Load() + 60 },
		"audience alone":              func(c map[string]any) { c["aud"] = "tercet" },
		"second project":              func(c map[string]any) { c["project"] = []string{"x", "p2"} },
		"no scopes but the issuer's":  func(c map[string]any) { delete(c, "tercet") },
		"scopes of an unknown spirit": func(c map[string]any) { c["tercet"] = []any{1, "root"} },
	} {
		check(name, i.sign(t, jose.RS256, "r1", i.rsa, claims(change)), true)
	}

	stranger, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: mustPKIX(t, &i.rsa.PublicKey)})
	check("stranger's key under a known kid", i.sign(t, jose.RS256, "r1", stranger, claims(nil)), false)
	check("HS256 with the public key", i.sign(t, jose.HS256, "r1", public, claims(nil)), false)
	check("RS512", i.sign(t, jose.RS512, "r1", i.rsa, claims(nil)), false)
	check("PS256", i.sign(t, jose.PS256, "r1", i.rsa, claims(nil)), false)
	check("kid of a path", i.sign(t, jose.RS256, "../../etc/passwd", stranger, claims(nil)), false)
	payload, _ := json.Marshal(claims(nil))
	for _, header := range []string{`{"alg":"none"}`, `{"alg":"None","typ":"JWT"}`, `{"alg":""}`, `{}`} {
		for _, signature := range []string{"", "x", base64.RawURLEncoding.EncodeToString(make([]byte, 256))} {
			check(header, base64.RawURLEncoding.EncodeToString([]byte(header))+"."+base64.RawURLEncoding.EncodeToString(payload)+"."+signature, false)
		}
	}
	good := i.sign(t, jose.RS256, "r1", i.rsa, claims(nil))
	head, rest, _ := strings.Cut(good, ".")
	body, signature, _ := strings.Cut(rest, ".")
	check("tampered payload", head+"."+base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(string(payload), "orders", "ordera", 1)))+"."+signature, false)
	check("cut signature", head+"."+body+"."+signature[:len(signature)-4], false)
	check("two tokens", good+good, false)
	check("1 MB", strings.Repeat("a", 1<<20), false)

	// A thousand unknown keys cost one fetch a minute; a new key is found after that.
	before := i.fetches.Load()
	clock.Add(int64(2 * keysEvery / time.Second))
	for n := range 1000 {
		check("unknown kid", fakeKid(good, fmt.Sprint("k", n)), false)
	}
	if n := i.fetches.Load() - before; n != 1 {
		t.Errorf("1000 unknown keys made %d fetches", n)
	}
	i.mu.Lock()
	i.keys = append(i.keys, jose.JSONWebKey{KeyID: "r2", Key: &stranger.PublicKey, Use: "sig"})
	i.mu.Unlock()
	rotated := i.sign(t, jose.RS256, "r2", stranger, claims(nil))
	check("a new key within the minute", rotated, false)
	clock.Add(int64(2 * keysEvery / time.Second))
	check("a new key", rotated, true)

	// While the issuer is away its keys still hold, and it is asked once a minute.
	i.down.Store(true)
	clock.Add(int64(2 * keysFresh / time.Second))
	before = i.fetches.Load()
	for range 5 {
		check("issuer away", i.sign(t, jose.ES256, "e1", i.ec, claims(nil)), true)
	}
	if n := i.fetches.Load() - before; n != 1 {
		t.Errorf("an issuer that is away was asked %d times", n)
	}
	// A signature is remembered no longer than its token is good.
	short := i.sign(t, jose.ES256, "e1", i.ec, claims(func(c map[string]any) { c["exp"] = clock.Load() + 10 }))
	check("short", short, true)
	clock.Add(10 + int64(leeway/time.Second))
	check("short, remembered", short, false)
}

// fakeKid replaces the key id in a token's head.
func fakeKid(jwt, kid string) string {
	_, rest, _ := strings.Cut(jwt, ".")
	return base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"alg":"RS256","kid":%q,"typ":"JWT"}`, kid)) + "." + rest
}

func mustPKIX(t *testing.T, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// TestIssuerOfAnotherName: keys are not taken from a discovery document that is somebody else's.
func TestIssuerOfAnotherName(t *testing.T) {
	i := newLocalIssuer(t)
	a, err := New(Options{Issuers: []Issuer{{Issuer: i.URL + "/", Audience: "tercet", Scopes: []string{"publish"}}}, Client: i.Client()})
	if err != nil {
		t.Fatal(err)
	}
	token := i.sign(t, jose.RS256, "r1", i.rsa, map[string]any{"iss": i.URL + "/", "aud": "tercet", "sub": "s", "exp": time.Now().Unix() + 600})
	if _, err := a.Check(context.Background(), token); errs.CodeOf(err) != errs.Unauthorized {
		t.Errorf("accepted: %v", err)
	}
}

func TestIssuerConfig(t *testing.T) {
	good := Issuer{Issuer: "https://issuer.example", Audience: "tercet", Scopes: []string{"publish"}}
	for what, change := range map[string]func(*Issuer){
		"plain http":        func(i *Issuer) { i.Issuer = "http://issuer.example" },
		"no URL":            func(i *Issuer) { i.Issuer = "issuer" },
		"keys over http":    func(i *Issuer) { i.JWKSURL = "http://issuer.example/keys" },
		"no audience":       func(i *Issuer) { i.Audience = "" },
		"no scopes":         func(i *Issuer) { i.Scopes = nil },
		"unknown scope":     func(i *Issuer) { i.Scopes = []string{"root"} },
		"unreasonable rate": func(i *Issuer) { i.Limits.RequestsPerSecond = -1 },
	} {
		bad := good
		change(&bad)
		if _, err := New(Options{Issuers: []Issuer{bad}}); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	if _, err := New(Options{Issuers: []Issuer{good, good}}); err == nil {
		t.Error("one issuer twice: accepted")
	}
	local := good
	local.Issuer = "http://127.0.0.1:1"
	if _, err := New(Options{Issuers: []Issuer{good, local}}); err != nil {
		t.Error(err)
	}
}

// FuzzCheck: whatever stands behind Bearer, it is refused without a panic.
func FuzzCheck(f *testing.F) {
	a, err := New(Options{
		Tokens:  []Token{{Name: "t", SHA256: hashOf("the token"), Scopes: []string{"publish"}}},
		Issuers: []Issuer{{Issuer: "http://127.0.0.1:1", Audience: "tercet", Scopes: []string{"publish"}}},
	})
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{"", "a.b.c", "..", "eyJhbGciOiJub25lIn0.eyJpc3MiOiJodHRwOi8vMTI3LjAuMC4xOjEifQ."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, credential string) {
		if sum := sha256.Sum256([]byte(credential)); sum == sha256.Sum256([]byte("the token")) {
			return
		}
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if p, err := a.Check(ctx, credential); err == nil {
			t.Errorf("%q is %s", credential, p.Name)
		}
	})
}
