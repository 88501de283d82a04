package auth

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"tercet.dev/tercet/internal/errs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func hashOf(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

func TestParseScope(t *testing.T) {
	for _, s := range []string{"publish", "receive", "admin", "publish,receive", "publish,receive,admin", "publish:orders", "publish:orders-*", "receive,admin:a*", "publish:a:b*"} {
		scope, err := ParseScope(s)
		if err != nil || scope.String() != s {
			t.Errorf("%q reads as %q, %v", s, scope, err)
		}
	}
	if s, err := ParseScope("publish:*"); err != nil || s.String() != "publish" {
		t.Errorf("publish:* reads as %q, %v", s, err)
	}
	for _, s := range []string{"", "*", "write", "publish:", ":orders", "publish,", "publish:a*b", "publish:**", "Publish", "publish receive"} {
		if scope, err := ParseScope(s); err == nil {
			t.Errorf("%q reads as %q", s, scope)
		}
	}
	if _, err := ParseScopes(nil); err == nil {
		t.Error("no scopes at all are accepted")
	}
}

func TestAllows(t *testing.T) {
	for _, c := range []struct {
		scopes, access, pattern string
		want                    bool
	}{
		{"publish:orders", "publish", "orders", true},
		{"publish:orders", "publish", "orders-1", false},
		{"publish:orders", "publish", "order", false},
		{"publish:orders", "publish", "orders*", false},
		{"publish:orders", "receive", "orders", false},
		{"publish:orders*", "publish", "orders", true},
		{"publish:orders*", "publish", "orders-1*", true},
		{"publish:orders*", "publish", "order*", false},
		{"publish:orders*", "publish", "", false},
		{"publish:orders*", "publish", "*", false},
		{"publish", "publish", "", true},
		{"publish", "publish", "*", true},
		{"publish", "publish", "any", true},
		{"publish receive:a", "receive", "a", true},
		{"publish receive:a", "receive", "b", false},
	} {
		scopes, err := ParseScopes(strings.Fields(c.scopes))
		if err != nil {
			t.Fatal(err)
		}
		access, err := ParseScope(c.access)
		if err != nil {
			t.Fatal(err)
		}
		p := &Principal{scopes: scopes}
		if got := p.AllowsPattern(access.Access, c.pattern); got != c.want {
			t.Errorf("%s: %s to %q: %v", c.scopes, c.access, c.pattern, got)
		}
		if !strings.HasSuffix(c.pattern, "*") {
			if got := p.Allows(access.Access, c.pattern); got != c.want {
				t.Errorf("%s: %s to the topic %q: %v", c.scopes, c.access, c.pattern, got)
			}
		}
	}
	var nobody *Principal
	if !nobody.Allows(Admin, "") || !nobody.AllowsPattern(Publish, "*") || !nobody.AllowsSome(Receive) {
		t.Error("while nothing is configured everything is allowed")
	}
}

func TestTokenCheck(t *testing.T) {
	good := Token{Name: "ci", SHA256: hashOf("x"), Scopes: []string{"publish"}}
	if err := good.Check(); err != nil {
		t.Error(err)
	}
	for what, change := range map[string]func(*Token){
		"no name":            func(t *Token) { t.Name = "" },
		"name with a line":   func(t *Token) { t.Name = "a\nb" },
		"name with a slash":  func(t *Token) { t.Name = "a/b" },
		"long name":          func(t *Token) { t.Name = strings.Repeat("a", 129) },
		"short hash":         func(t *Token) { t.SHA256 = t.SHA256[2:] },
		"the token itself":   func(t *Token) { t.SHA256 = NewSecret() },
		"no scope":           func(t *Token) { t.Scopes = nil },
		"unknown scope":      func(t *Token) { t.Scopes = []string{"write"} },
		"negative limit":     func(t *Token) { t.Limits.BytesPerDay = -1 },
		"burst without rate": func(t *Token) { t.Limits.Burst = 1 },
	} {
		bad := good
		change(&bad)
		if bad.Check() == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	a, b := NewSecret(), NewSecret()
	if a == b || len(a) < 40 {
		t.Errorf("secrets %s, %s", a, b)
	}
	for _, secret := range []string{"", "short", "with a space in between it", "with\na line in between it", strings.Repeat("a", 9000), "umläut-umläut-umläut-umläut"} {
		if _, err := HashSecret(secret); err == nil {
			t.Errorf("%.30q may be a token", secret)
		}
	}
	if h, err := HashSecret(a); err != nil || h != hashOf(a) {
		t.Errorf("hash %s, %v", h, err)
	}
}

// TestRotation: of two tokens of one holder both are good until one is taken away, and what one has used up stays used
// up while others come and go.
func TestRotation(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	a, err := New(Options{Stored: true, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	check := func(secret string, want bool) *Principal {
		t.Helper()
		p, err := a.Check(context.Background(), secret)
		if (err == nil) != want || err != nil && errs.CodeOf(err) != errs.Unauthorized {
			t.Errorf("%s: %v, want %v", secret, err, want)
		}
		return p
	}
	old := Token{Name: "ci", SHA256: hashOf("old"), Scopes: []string{"publish"}, Limits: Limits{RequestsPerSecond: 1, Burst: 2}}
	fresh := Token{Name: "ci-2", SHA256: hashOf("new"), Scopes: []string{"publish"}, Expires: now.Add(time.Hour)}
	if err := a.SetStored([]Token{old}); err != nil {
		t.Fatal(err)
	}
	p := check("old", true)
	for i, want := range []time.Duration{0, 0, time.Second} {
		if wait := p.Request(now); wait != want {
			t.Errorf("request %d: wait %s, want %s", i, wait, want)
		}
	}
	if err := a.SetStored([]Token{old, fresh}); err != nil {
		t.Fatal(err)
	}
	if wait := check("old", true).Request(now); wait == 0 {
		t.Error("another token's coming gave this one a fresh allowance")
	}
	check("new", true)
	bad := Token{Name: "broken"}
	if err := a.SetStored([]Token{bad, fresh}); err == nil {
		t.Error("a token that cannot be used is not reported")
	}
	check("old", false)
	check("new", true)
	now = now.Add(time.Hour)
	check("new", false)
	if !a.Required() {
		t.Error("an expired token leaves the door open")
	}
	if err := a.SetStored(nil); err != nil || a.Required() {
		t.Errorf("no token at all: required %v, %v", a.Required(), err)
	}
}

func TestMeter(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	p := &Principal{meter: newMeter(Limits{BytesPerSecond: 100, BytesPerDay: 2000})}
	publish := func(n int64, wantWait time.Duration, wantQuota bool) {
		t.Helper()
		wait, quota := p.Publish(now, n)
		if wait != wantWait || quota != wantQuota {
			t.Errorf("%d bytes: wait %s, quota %v; want %s, %v", n, wait, quota, wantWait, wantQuota)
		}
	}
	publish(1099, 0, false) // larger than a second's worth: the debt is paid by waiting
	publish(1, 10*time.Second, false)
	now = now.Add(10 * time.Second)
	publish(100, 0, false)
	midnight := time.Unix((now.Unix()/86400+1)*86400, 0)
	now = now.Add(time.Minute)
	publish(802, midnight.Sub(now), true)
	publish(801, 0, false)
	now = midnight
	publish(2000, 0, false)
	var unlimited *Principal
	if wait, quota := unlimited.Publish(now, 1<<40); wait != 0 || quota || unlimited.Request(now) != 0 {
		t.Error("nobody is not limited")
	}
}
