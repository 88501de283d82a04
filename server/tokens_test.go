package server

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"

	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/auth"
	"tercet.dev/tercet/server/servertest"
	"tercet.dev/tercet/server/wire"
)

// follow has an authenticator follow a node's tokens until the test ends.
func follow(t *testing.T, n *raft.Node) *auth.Authenticator {
	t.Helper()
	a, err := auth.New(auth.Options{Stored: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { a.Follow(ctx, n, hclog.NewNullLogger()) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	return a
}

// TestTokens makes, uses, rotates and revokes tokens over two nodes.
func TestTokens(t *testing.T) {
	nodes := servertest.Nodes(t, 3)
	var log bytes.Buffer
	var mu sync.Mutex
	logger := hclog.New(&hclog.LoggerOptions{Output: &log, Mutex: &mu})
	_, base := start(t, Options{Backend: nodes[0], Authorizer: follow(t, nodes[0]), Logger: logger})
	_, other := start(t, Options{Backend: nodes[1], Authorizer: follow(t, nodes[1])})
	bearer := func(secret string) []string { return []string{"Authorization", "Bearer " + secret} }
	create := func(base, body string, headers ...string) (reply, wire.CreatedToken) {
		t.Helper()
		r := call(t, "POST", base+"/v1/tokens", []byte(body), headers...)
		var c wire.CreatedToken
		json.Unmarshal(r.body, &c)
		return r, c
	}
	send := func(base string, headers ...string) reply {
		return call(t, "POST", base+"/api/v3/topic/orders", []byte("x"), headers...)
	}
	for _, b := range []string{base, other} {
		waitFor(t, func() bool { return send(b).status == 201 })
	}
	r, _ := create(base, `{"name":"first","scopes":["publish"]}`)
	expect(t, r, 412, "precondition")
	r, _ = create(base, `{"name":"first","scopes":["admin:orders"]}`)
	expect(t, r, 412, "precondition")
	r, root := create(base, `{"name":"root","scopes":["admin"]}`)
	expect(t, r, 201, "")
	if root.Secret == "" || root.Source != "cluster" || root.CreatedAt.IsZero() {
		t.Errorf("created %+v", root)
	}
	// Every node asks for tokens from here on.
	for _, b := range []string{base, other} {
		waitFor(t, func() bool { return send(b).status == 401 })
		expect(t, send(b, bearer(root.Secret)...), 403, "forbidden")
	}
	chosen, err := auth.HashSecret("a-text-that-the-client-chose")
	if err != nil {
		t.Fatal(err)
	}
	r, ci := create(other, `{"name":"ci","scopes":["publish,receive:orders"],"sha256":"`+strings.ToUpper(chosen)+`","limits":{"requestsPerSecond":100}}`, bearer(root.Secret)...)
	expect(t, r, 201, "")
	if ci.Secret != "" || ci.Limits.RequestsPerSecond != 100 {
		t.Errorf("created %+v", ci)
	}
	r, next := create(base, `{"name":"ci-2","scopes":["publish:orders"]}`, bearer(root.Secret)...)
	expect(t, r, 201, "")
	r, _ = create(base, `{"name":"ci","scopes":["publish"]}`, bearer(root.Secret)...)
	expect(t, r, 409, "conflict")
	for _, body := range []string{`{}`, `{"name":"x"}`, `{"name":"x","scopes":[]}`, `{"name":"x","scopes":["root"]}`, `{"name":"a b","scopes":["publish"]}`, `{"name":"x","scopes":["publish"],"sha256":"12"}`,
		`{"name":"x","scopes":["publish"],"expiresAt":"2020-01-01T00:00:00Z"}`, `{"name":"x","scopes":["publish"],"expiresAt":"tomorrow"}`, `{"name":"x","scopes":["publish"],"limits":{"burst":-1}}`, `{"name":"x","scopes":["publish"],"secret":"y"}`} {
		r, _ := create(base, body, bearer(root.Secret)...)
		expect(t, r, 400, "invalid_body")
	}
	for _, b := range []string{base, other} {
		waitFor(t, func() bool { return send(b, bearer("a-text-that-the-client-chose")...).status == 201 })
		waitFor(t, func() bool { return send(b, bearer(next.Secret)...).status == 201 })
	}
	revoke := func(name string) reply {
		return call(t, "DELETE", base+"/v1/tokens/"+name, nil, bearer(root.Secret)...)
	}
	expect(t, revoke("none"), 404, "not_found")
	expect(t, revoke("root"), 412, "precondition")
	expect(t, revoke("ci"), 204, "")
	for _, b := range []string{base, other} {
		waitFor(t, func() bool { return send(b, bearer("a-text-that-the-client-chose")...).status == 401 })
		expect(t, send(b, bearer(next.Secret)...), 201, "")
	}
	r = call(t, "GET", other+"/v1/tokens", nil, bearer(root.Secret)...)
	expect(t, r, 200, "")
	for _, secret := range []string{root.Secret, next.Secret, chosen} {
		if strings.Contains(string(r.body), secret) {
			t.Errorf("the list shows a secret: %s", r.body)
		}
	}
	var list wire.Tokens
	if json.Unmarshal(r.body, &list) != nil || len(list.Tokens) != 2 || list.Tokens[0].Name != "ci-2" || list.Tokens[1].Name != "root" {
		t.Errorf("tokens %s", r.body)
	}
	expect(t, revoke("ci-2"), 204, "")
	expect(t, revoke("root"), 412, "precondition")
	expect(t, revoke("root?open=true"), 204, "")
	waitFor(t, func() bool { return send(other).status == 201 })

	mu.Lock()
	defer mu.Unlock()
	text := log.String()
	for _, want := range []string{`who="\"anybody\"" did="POST /v1/tokens" outcome=ok`, `did="DELETE /v1/tokens/{name}" outcome=ok`, `name="\"ci\""`, `outcome=refused`} {
		if !strings.Contains(text, want) {
			t.Errorf("the audit log lacks %s:\n%s", want, text)
		}
	}
	for _, secret := range []string{root.Secret, next.Secret} {
		if strings.Contains(text, secret) {
			t.Error("a token stands in the log")
		}
	}
}
