package main

import (
	"context"
	"encoding/json"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"

	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server"
	"tercet.dev/tercet/server/auth"
	"tercet.dev/tercet/server/wire"
)

// startSecured runs a cluster of one that checks tokens and returns its URL.
func startSecured(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	node, err := raft.Start(t.Context(), raft.Config{
		Name: "n1", Zone: "a", Dir: t.TempDir(), PeerAddr: l.Addr().String(), PeerListeners: []net.Listener{l}, WALSegmentSize: 4 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { node.Close() })
	tokens, err := auth.New(auth.Options{Stored: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { tokens.Follow(ctx, node, hclog.NewNullLogger()) })
	t.Cleanup(func() { cancel(); wg.Wait() })
	srv, err := server.New(server.Options{Backend: node, Authorizer: tokens})
	if err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(srv)
	t.Cleanup(web.Close)
	await(t, "the tokens", func() bool { return node.Ready() == nil && !tokens.Required() })
	return web.URL
}

func TestTokenCommands(t *testing.T) {
	c := cli{t, startSecured(t)}
	file := func(name, content string) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	expect := func(want int, args ...string) string {
		t.Helper()
		code, out, stderr := c.run(args...)
		if code != want {
			t.Fatalf("%q: exit %d, want %d: %s%s", args, code, want, out, stderr)
		}
		return out
	}
	expect(exitUsage, "token", "create", "x")
	expect(exitUsage, "token", "create", "x", "--scope", "write")
	expect(exitUsage, "token", "create", "x", "--scope", "admin", "--value-file", file("short", "short"))
	expect(exitPrecondition, "token", "create", "x", "--scope", "publish")
	var root wire.CreatedToken
	if err := json.Unmarshal([]byte(expect(exitOK, "token", "create", "root", "--scope", "admin", "-o", "json")), &root); err != nil || root.Secret == "" {
		t.Fatalf("%+v, %v", root, err)
	}
	as := file("root", root.Secret+"\n")
	await(t, "tokens to be required", func() bool { code, _, _ := c.run("token", "list"); return code != exitOK })
	expect(exitFailure, "send", "orders", "x")
	expect(exitUsage, "send", "orders", "x", "--token-file", as+"-none")
	shop := strings.TrimSpace(expect(exitOK, "token", "create", "shop", "--scope", "publish:orders", "--token-file", as))
	chosen := file("chosen", "a-text-that-was-chosen-by-me")
	if out := expect(exitOK, "token", "create", "mine", "--scope", "publish", "--value-file", chosen, "--ttl", "1h", "--token-file", as); out != "" {
		t.Errorf("a chosen token is shown: %q", out)
	}
	await(t, "the new tokens", func() bool { code, _, _ := c.run("send", "orders", "x", "--token-file", chosen); return code == exitOK })
	expect(exitOK, "send", "orders", "x", "--token-file", file("shop", shop))
	expect(exitFailure, "send", "bills", "x", "--token-file", file("shop", shop))
	list := expect(exitOK, "token", "list", "--token-file", as)
	for _, want := range []string{"root", "shop", "mine", "publish:orders"} {
		if !strings.Contains(list, want) {
			t.Errorf("the list lacks %s:\n%s", want, list)
		}
	}
	expect(exitNotFound, "token", "revoke", "none", "--token-file", as)
	expect(exitPrecondition, "token", "revoke", "root", "--token-file", as)
	expect(exitOK, "token", "revoke", "shop", "mine", "--token-file", as)
	expect(exitPrecondition, "token", "revoke", "root", "--token-file", as)
	expect(exitOK, "token", "revoke", "root", "--open", "--token-file", as)
	await(t, "no token to be required", func() bool { code, _, _ := c.run("send", "orders", "x"); return code == exitOK })
}

// TestAuthSettings reads what the configuration file says of tokens, and names mistakes.
func TestAuthSettings(t *testing.T) {
	write := func(text string) string {
		path := filepath.Join(t.TempDir(), "tercet.yaml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	hash := strings.Repeat("ab", 32)
	o := securityOptions{config: write("zone: a\nauth:\n  tokens:\n    - {name: ci, sha256: " + hash + ", scopes: [\"publish:a*\"], limits: {bytes-per-day: 5}, expires: 2030-01-01T00:00:00Z}\n" +
		"  oidc:\n    - {issuer: \"https://i.example\", audience: tercet, scopes: [receive], claims: {project: [p1]}}\n")}
	if err := o.check(); err != nil {
		t.Fatal(err)
	}
	if tok := o.from.Tokens; len(tok) != 1 || tok[0].Limits.BytesPerDay != 5 || tok[0].Expires.Year() != 2030 || len(o.from.OIDC) != 1 || o.from.OIDC[0].Claims["project"][0] != "p1" {
		t.Errorf("%+v", o.from)
	}
	if !o.authenticated() {
		t.Error("tokens are no authentication")
	}
	for text, want := range map[string]string{
		"auth:\n  token: []\n":                                                       "tercet.yaml",
		"auth:\n  tokens:\n    - {name: x, hash: y}\n":                               "line 3",
		"auth:\n  tokens:\n    - {name: x, sha256: " + hash + ", scopes: [write]}\n": "write",
		"auth:\n  oidc:\n    - {issuer: \"https://i.example\", scopes: [admin]}\n":   "audience",
	} {
		bad := securityOptions{config: write(text)}
		if err := bad.check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	for _, files := range [][3]string{{"c", "", ""}, {"", "k", ""}, {"", "", "ca"}} {
		bad := securityOptions{}
		bad.files.Cert, bad.files.Key, bad.files.ClientCA = files[0], files[1], files[2]
		if bad.check() == nil {
			t.Errorf("%v: accepted", files)
		}
	}
}
