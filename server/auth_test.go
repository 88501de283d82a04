package server

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/server/auth"
	"tercet.dev/tercet/server/wire"
)

func hashOf(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// authenticator lets the token "NAME-secret" do what the scopes of NAME allow.
func authenticator(t testing.TB, scopes map[string]string, limits auth.Limits) *auth.Authenticator {
	t.Helper()
	var o auth.Options
	for name, list := range scopes {
		o.Tokens = append(o.Tokens, auth.Token{Name: name, SHA256: hashOf(name + "-secret"), Scopes: strings.Fields(list), Limits: limits})
	}
	a, err := auth.New(o)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// TestScopes asks for every kind of path with every kind of token.
func TestScopes(t *testing.T) {
	a := authenticator(t, map[string]string{
		"all": "publish,receive,admin", "pub": "publish:orders-*", "rec": "receive:orders-*", "one": "publish,receive:orders-1", "adm": "admin:orders-*",
	}, auth.Limits{})
	backend := &fakeBackend{status: fakeStatus}
	_, base := start(t, Options{Backend: backend, Authorizer: a})
	receipt := engine.NewSealer(fakeSecret).Receipt(engine.Receipt{Topic: 1, Group: 1, Epoch: 1})
	for _, c := range []struct {
		method, path, body string
		allowed            string
	}{
		{"POST", "/api/v3/topic/orders-1", "x", "all pub one"},
		{"POST", "/api/v3/topic/orders-2", "x", "all pub"},
		{"POST", "/api/v3/topic/order", "x", "all"},
		{"POST", "/api/v3/topic/orders-1/consumer/g", "", "all rec one"},
		{"POST", "/api/v3/topic/bills/consumer/g", "", "all"},
		{"DELETE", "/api/v3/topic/orders-1/consumer/g/lease/" + receipt, "", "all rec one"},
		{"PATCH", "/api/v3/topic/orders-2/consumer/g/lease/" + receipt, `{"visibilityTimeoutSeconds":1}`, "all rec"},
		{"GET", "/v1/topics", "", "all rec one adm"},
		{"GET", "/v1/topics/orders-2/groups", "", "all rec adm"},
		{"GET", "/v1/topics/orders-2/messages", "", "all rec"},
		{"GET", "/v1/cluster", "", "all"},
		{"POST", "/v1/cluster/transfer", "{}", "all"},
		{"GET", "/metrics", "", "all"},
		{"GET", "/metrics/topics?match=*", "", "all rec one adm"},
		{"GET", "/", "", "all"},
	} {
		for _, name := range []string{"all", "pub", "rec", "one", "adm"} {
			r := call(t, c.method, base+c.path, []byte(c.body), "Authorization", "Bearer "+name+"-secret", "Accept", wire.MediaMultipart)
			may := strings.Contains(" "+c.allowed+" ", " "+name+" ")
			if may != (r.status < 300) || !may && (r.status != 403 || r.code() != "forbidden") {
				t.Errorf("%s %s with token %s: %v", c.method, c.path, name, r)
			}
		}
		r := call(t, c.method, base+c.path, []byte(c.body), "Accept", wire.MediaMultipart)
		expect(t, r, 401, "unauthorized")
		if r.header.Get("Www-Authenticate") != "Bearer" {
			t.Error("401 without WWW-Authenticate")
		}
	}
	for _, path := range []string{"/livez", "/readyz", "/healthz", "/v1/openapi.json"} {
		expect(t, call(t, "GET", base+path, nil), 200, "")
	}
}

// TestBadTokens presents credentials that are none.
func TestBadTokens(t *testing.T) {
	a := authenticator(t, map[string]string{"good": "publish"}, auth.Limits{})
	_, base := start(t, Options{Backend: &fakeBackend{}, Authorizer: a})
	badTokens(t, base)
}

// badTokens presents to a server that accepts good-secret what it must not accept.
func badTokens(t *testing.T, base string) {
	t.Helper()
	for _, value := range []string{"", "Bearer", "Bearer ", "good-secret", "Basic Z29vZDpzZWNyZXQ=", "Bearer Bearer good-secret", "Bearer  good-secret", "Bearer good-secret,", "Bearer " + strings.Repeat("a", 50<<10),
		"Bearer " + hashOf("good-secret"), "Bearer good-secre", "Bearer good-secrets", "Bearer a.b.c"} {
		expect(t, call(t, "POST", base+"/api/v3/topic/t", []byte("x"), "Authorization", value), 401, "unauthorized")
	}
	expect(t, call(t, "POST", base+"/api/v3/topic/t", []byte("x"), "Authorization", "Bearer good-secret", "Authorization", "Bearer good-secret"), 401, "unauthorized")
	expect(t, call(t, "POST", base+"/api/v3/topic/t?token=good-secret", []byte("x")), 401, "unauthorized")
	for _, scheme := range []string{"Bearer", "bearer", "BEARER"} {
		expect(t, call(t, "POST", base+"/api/v3/topic/t", []byte("x"), "Authorization", scheme+" good-secret"), 201, "")
	}
}

// TestTopicsOfAToken: a token sees no topic that its scopes do not name, on no page.
func TestTopicsOfAToken(t *testing.T) {
	a := authenticator(t, map[string]string{"all": "publish,receive,admin", "rec": "receive:b*"}, auth.Limits{})
	_, base := start(t, Options{Backend: newNode(t), Authorizer: a})
	for _, topic := range []string{"a", "b1", "b2", "c"} {
		expect(t, call(t, "POST", base+"/api/v3/topic/"+topic, []byte("x"), "Authorization", "Bearer all-secret"), 201, "")
	}
	list := func(token string) (names []string) {
		for after, more := "", true; more; {
			r := call(t, "GET", base+"/v1/topics?limit=1&after="+after, nil, "Authorization", "Bearer "+token)
			expect(t, r, 200, "")
			var page wire.Topics
			if err := json.Unmarshal(r.body, &page); err != nil {
				t.Fatal(err)
			}
			for _, topic := range page.Topics {
				names = append(names, topic.Name)
			}
			after, more = page.Next, page.Next != ""
		}
		return names
	}
	if got := strings.Join(list("rec-secret"), " "); got != "b1 b2" {
		t.Errorf("the token of b* sees %s", got)
	}
	if got := strings.Join(list("all-secret"), " "); got != "a b1 b2 c" {
		t.Errorf("the token of everything sees %s", got)
	}
	r := call(t, "GET", base+"/metrics/topics?match=*", nil, "Authorization", "Bearer rec-secret")
	expect(t, r, 200, "")
	if text := string(r.body); strings.Contains(text, `topic="a"`) || !strings.Contains(text, `topic="b1"`) {
		t.Errorf("series of a token of b*:\n%s", text)
	}
}

// TestRateLimits: one request too many is told when to come back, and so are bytes and the quota of the day.
func TestRateLimits(t *testing.T) {
	send := func(base, topic string, n int) reply {
		return call(t, "POST", base+"/api/v3/topic/"+topic, make([]byte, n), "Authorization", "Bearer t-secret")
	}
	scopes := map[string]string{"t": "publish"}
	for name, c := range map[string]struct {
		limits auth.Limits
		code   string
		// wait bounds Retry-After.
		low, high int
	}{
		"requests": {auth.Limits{RequestsPerSecond: 0.1, Burst: 3}, "rate_limited", 1, 10},
		"bytes":    {auth.Limits{BytesPerSecond: 100}, "rate_limited", 1, 3},
		"quota":    {auth.Limits{BytesPerDay: 300}, "quota_exceeded", 1, 24 * 60 * 60},
	} {
		t.Run(name, func(t *testing.T) {
			_, base := start(t, Options{Backend: &fakeBackend{}, Authorizer: authenticator(t, scopes, c.limits)})
			sent := 0
			for range 10 {
				r := send(base, "t", 100)
				if r.status == 201 {
					sent++
					continue
				}
				expect(t, r, 429, c.code)
				after := r.header.Get("Retry-After")
				if n, ok := decimal(after); !ok || int(n) < c.low || int(n) > c.high {
					t.Errorf("Retry-After: %q", after)
				}
				break
			}
			if sent < 1 || sent > 3 {
				t.Errorf("%d of 10 requests went through", sent)
			}
		})
	}
}

// TestNotLoaded: a node that has not read the cluster's tokens lets nobody in, since one may be required.
func TestNotLoaded(t *testing.T) {
	a, err := auth.New(auth.Options{Stored: true})
	if err != nil {
		t.Fatal(err)
	}
	_, base := start(t, Options{Backend: &fakeBackend{}, Authorizer: a})
	send := func(headers ...string) reply { return call(t, "POST", base+"/api/v3/topic/t", []byte("x"), headers...) }
	expect(t, send("Authorization", "Bearer x"), 429, "no_leader")
	if r := call(t, "GET", base+"/readyz", nil); r.status != 503 {
		t.Errorf("such a node is ready: %v", r)
	}
	expect(t, send(), 429, "no_leader")
	if err := a.SetStored(nil); err != nil {
		t.Fatal(err)
	}
	expect(t, send(), 201, "")
	if err := a.SetStored([]auth.Token{{Name: "n", SHA256: hashOf("n-secret"), Scopes: []string{"publish"}}}); err != nil {
		t.Fatal(err)
	}
	expect(t, send(), 401, "unauthorized")
	expect(t, send("Authorization", "Bearer n-secret"), 201, "")
	expired := auth.Token{Name: "n", SHA256: hashOf("n-secret"), Scopes: []string{"publish"}, Expires: time.Now().Add(-time.Second)}
	if err := a.SetStored([]auth.Token{expired}); err != nil {
		t.Fatal(err)
	}
	expect(t, send("Authorization", "Bearer n-secret"), 401, "unauthorized")
}
