package nodecert

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/client"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server"
	"tercet.dev/tercet/server/servertest"
	"tercet.dev/tercet/server/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds what tests wait for; it says nothing of how long things take.
const patience = 2 * time.Minute

// clock is a wall clock that tests move.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

// member is a keeper that serves newcomers at an address, above a cluster of one.
type member struct {
	t       *testing.T
	backend Backend
	keeper  *Keeper
	clock   *clock
	address string
	tokens  tokens
}

// found makes a cluster with an authority.
func found(t *testing.T, ahead time.Duration) *member {
	t.Helper()
	m := &member{t: t, backend: servertest.Nodes(t, 1)[0], clock: new(clock)}
	m.clock.advance(ahead)
	m.tokens = tokens{b: m.backend, now: m.clock.now}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var err error
	m.keeper, err = Open(ctx, Options{Dir: t.TempDir(), Name: "n1", Token: NewFounding(m.clock.now()), now: m.clock.now})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.keeper.handOver(ctx, m.backend); err != nil {
		t.Fatal(err)
	}
	m.keeper.backend.Store(&m.backend)
	m.address = serve(t, m.keeper)
	return m
}

// serve accepts connections as the peer address does: those that negotiated a protocol are the keeper's.
func serve(t *testing.T, k *Keeper) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer nc.Close()
				tc := tls.Server(nc, k.TLS())
				if tc.HandshakeContext(ctx) != nil {
					return
				}
				if tc.ConnectionState().NegotiatedProtocol != "" {
					k.Enrol(ctx, tc)
					return
				}
				_, _ = io.WriteString(tc, "welcome")
			})
		}
	})
	t.Cleanup(func() { cancel(); l.Close(); wg.Wait() })
	return l.Addr().String()
}

// token makes a join token.
func (m *member) token(node string, life time.Duration) joining {
	m.t.Helper()
	text := m.create(node, life).Token
	_, j, err := parseToken(text)
	if err != nil {
		m.t.Fatal(err)
	}
	return *j
}

// create makes one through the route.
func (m *member) create(node string, life time.Duration) wire.CreatedJoinToken {
	m.t.Helper()
	s, err := server.New(server.Options{Backend: m.backend.(server.Backend), Extensions: []server.Extension{m.tokens.extension()}})
	if err != nil {
		m.t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		m.t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	cl, err := client.New(client.Options{Servers: []string{"http://" + l.Addr().String()}})
	if err != nil {
		m.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	out, err := cl.CreateJoinToken(ctx, wire.NewJoinToken{Node: node, TTLSeconds: int64(life / time.Second)})
	cl.Close()
	if e := s.Shutdown(ctx); e != nil {
		m.t.Error(e)
	}
	<-served
	if err != nil {
		m.t.Fatal(err)
	}
	return out
}

// join has a node ask for its certificate.
func (m *member) join(dir, name, token string) (*Keeper, error) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return Open(ctx, Options{Dir: dir, Name: name, Token: token, Join: []string{m.address}, now: m.clock.now})
}

// greet connects with a configuration as nodes do, and returns whether it was welcome.
func greet(address string, c *tls.Config) error {
	conn, err := tls.Dial("tcp", address, c)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	said, err := io.ReadAll(conn)
	if err == nil && string(said) != "welcome" {
		err = errors.New("not welcome")
	}
	return err
}

// TestJoin: a node with a token obtains a certificate that the others take, and with everything that is not exactly that
// token it does not, whoever it asks.
func TestJoin(t *testing.T) {
	m := found(t, 0)
	good := m.token("n4", time.Hour)
	dir := t.TempDir()
	k, err := m.join(dir, "n4", good.text())
	if err != nil {
		t.Fatal(err)
	}
	if names := k.current.Load().pair.Leaf.DNSNames; len(names) != 1 || names[0] != "n4" {
		t.Errorf("the certificate is for %q", names)
	}
	if err := greet(m.address, k.TLS()); err != nil {
		t.Errorf("the new node is not taken: %v", err)
	}
	if err := greet(serve(t, k), m.keeper.TLS()); err != nil {
		t.Errorf("the new node is not believed: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, dirName, pendingFile)); !os.IsNotExist(err) {
		t.Errorf("the pending key is still there: %v", err)
	}
	// From now on it needs no token.
	if _, err := m.join(dir, "n4", ""); err != nil {
		t.Errorf("started again: %v", err)
	}

	other := found(t, 0)
	wrongSecret, wrongID, expired, elsewhere := m.token("n5", time.Hour), m.token("n5", time.Hour), m.token("n5", time.Minute), m.token("n5", time.Hour)
	wrongSecret.secret[3] ^= 1
	wrongID.id[3] ^= 1
	elsewhere.fingerprint = fingerprint(other.keeper.current.Load().authority)
	revoked := m.create("n5", time.Hour)
	if err := m.tokens.command(context.Background(), &engine.Document{Table: tokenTable, Key: revoked.ID, Delete: true}); err != nil {
		t.Fatal(err)
	}
	fresh := m.token("n5", time.Hour)
	m.clock.advance(2 * time.Minute)
	for _, c := range []struct{ what, name, token, want string }{
		{"a used token", "n4", good.text(), "has been used"},
		{"a token with another secret", "n5", wrongSecret.text(), "does not know this token"},
		{"a token with another id", "n5", wrongID.text(), "does not know this token"},
		{"an expired token", "n5", expired.text(), "expired at"},
		{"a revoked token", "n5", revoked.Token, "does not know this token"},
		{"another node's token", "n6", fresh.text(), "is for node n5"},
		{"the address of another cluster", "n5", elsewhere.text(), "not of the cluster"},
		{"a token that was cut", "n5", fresh.text()[:60], "damaged"},
		{"a token with a wrong letter", "n5", fresh.text()[:40] + string(fresh.text()[40]^1) + fresh.text()[41:], "damaged"},
		{"no token", "n5", "", "want a token"},
	} {
		_, err := m.join(t.TempDir(), c.name, c.token)
		if _, ok := errors.AsType[*raft.StartError](err); !ok || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.what, err, c.want)
		}
	}
	if _, err := m.join(t.TempDir(), "n5", fresh.text()); err != nil {
		t.Errorf("the token that others were refused with: %v", err)
	}
}

// TestJoinOnce: of many nodes that use the same token at the same time, one obtains a certificate. It may ask again with
// the same key, since an answer can be lost.
func TestJoinOnce(t *testing.T) {
	m := found(t, 0)
	token := m.token("n4", time.Hour)
	var wg sync.WaitGroup
	var mu sync.Mutex
	obtained := ""
	for range 6 {
		dir := t.TempDir()
		wg.Go(func() {
			k, err := m.join(dir, "n4", token.text())
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil && strings.Contains(err.Error(), "has been used"):
			case err != nil:
				t.Error(err)
			case obtained != "":
				t.Error("two nodes obtained a certificate with one token")
			default:
				obtained = k.o.Dir
			}
		})
	}
	wg.Wait()
	if obtained == "" {
		t.Fatal("nobody obtained a certificate")
	}
	// The answer was lost: the key is there, the certificate is not.
	key, err := os.ReadFile(filepath.Join(obtained, dirName, nodeFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(obtained, dirName, nodeFile), filepath.Join(obtained, dirName, pendingFile)); err != nil {
		t.Fatal(err)
	}
	k, err := m.join(obtained, "n4", token.text())
	if err != nil {
		t.Fatalf("asking again with the same key: %v", err)
	}
	again, err := parseCredentials(key)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again.pair.Leaf.RawSubjectPublicKeyInfo, k.current.Load().pair.Leaf.RawSubjectPublicKeyInfo) {
		t.Error("the second certificate is for another key")
	}
}

// TestFounding: founding nodes that share nothing but the token believe each other, and nobody else.
func TestFounding(t *testing.T) {
	token := NewFounding(time.Now())
	open := func(name, token string) *Keeper {
		k, err := Open(context.Background(), Options{Dir: t.TempDir(), Name: name, Token: token})
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	n1, n2, stranger := open("n1", token), open("n2", token), open("n2", NewFounding(time.Now()))
	address := serve(t, n1)
	if err := greet(address, n2.TLS()); err != nil {
		t.Errorf("a founding node is not taken: %v", err)
	}
	if err := greet(address, stranger.TLS()); err == nil {
		t.Error("a node with another founding token was taken")
	}
	none := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13}
	if err := greet(address, none); err == nil {
		t.Error("a node without a certificate was taken")
	}
	// The way in for those without a certificate leads nowhere else.
	newcomer := none.Clone()
	newcomer.NextProtos = []string{Protocol}
	if err := greet(address, newcomer); err == nil {
		t.Error("a newcomer got further than to the asking")
	}
	both := none.Clone()
	both.NextProtos = []string{Protocol, "h2"}
	if err := greet(address, both); err == nil {
		t.Error("a node without a certificate that offers several protocols was taken")
	}
}

// TestHandOver: the authority moves from the founding nodes' directories into the replicated state, whichever of them
// comes first and however often they start before.
func TestHandOver(t *testing.T) {
	backend := Backend(servertest.Nodes(t, 1)[0])
	token := NewFounding(time.Now())
	ctx := context.Background()
	for _, name := range []string{"n1", "n2"} {
		o := Options{Dir: t.TempDir(), Name: name, Token: token}
		if _, err := Open(ctx, o); err != nil {
			t.Fatal(err)
		}
		o.Token = "" // started again, and the token was deleted meanwhile
		k, err := Open(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		if k.founded == nil {
			t.Fatal("the authority was forgotten before the cluster had it")
		}
		if err := k.handOver(ctx, backend); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(o.Dir, dirName, authorityFile)); !os.IsNotExist(err) {
			t.Errorf("%s still has the authority's key: %v", name, err)
		}
	}
	a, err := storedOf(ctx, backend)
	if err != nil || a == nil {
		t.Fatalf("the cluster holds %v, %v", a, err)
	}
}

// TestRenew: a certificate is renewed when a third of its life is left, from the cluster's state alone, and connections
// use the new one at once. One that expired while the node was away is replaced with a token, not by itself.
func TestRenew(t *testing.T) {
	m := found(t, -leafLife*3/4) // so that the renewed certificates are good by the clock that TLS knows
	dir := t.TempDir()
	k, err := m.join(dir, "n4", m.create("n4", time.Hour).Token)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	config, before := k.TLS(), k.NotAfter()
	if err := k.renew(ctx, m.backend); err != nil || !k.NotAfter().Equal(before) {
		t.Fatalf("a new certificate was renewed: %v, %v", k.NotAfter(), err)
	}
	m.clock.advance(leafLife * 3 / 4)
	if err := k.renew(ctx, m.backend); err != nil || !k.NotAfter().After(before) {
		t.Fatalf("the certificate still ends at %v, %v", k.NotAfter(), err)
	}
	presented, err := config.GetCertificate(nil)
	if err != nil || !presented.Leaf.NotAfter.Equal(k.NotAfter()) {
		t.Errorf("connections present another certificate: %v", err)
	}
	if err := greet(m.address, config); err != nil {
		t.Errorf("the renewed certificate is not taken: %v", err)
	}
	if again, err := m.join(dir, "n4", ""); err != nil || !again.NotAfter().Equal(k.NotAfter()) {
		t.Errorf("the renewed certificate is not the one on disk: %v", err)
	}
	m.clock.advance(leafLife + time.Minute)
	if _, err := m.join(dir, "n4", ""); err == nil || !strings.Contains(err.Error(), "tercet cluster token create n4") {
		t.Errorf("an expired certificate: %v", err)
	}
	if err := m.keeper.renew(ctx, m.backend); err != nil {
		t.Fatal(err)
	}
}

// TestTokensOfFiles: where the certificates are the operator's, there is nothing to make tokens for.
func TestTokensOfFiles(t *testing.T) {
	node := servertest.Nodes(t, 1)[0]
	s, err := server.New(server.Options{Backend: node, Extensions: []server.Extension{Extension(node)}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	defer func() {
		_ = s.Close()
		<-served
	}()
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	hc := &http.Client{Transport: tr}
	for _, c := range []struct {
		method, path, body string
		status             int
	}{
		{"POST", "/v1/cluster/tokens", `{"node":"n4"}`, 412},
		{"POST", "/v1/cluster/tokens", `{"node":"../n4"}`, 400},
		{"POST", "/v1/cluster/tokens", `{"node":"n4","ttlSeconds":604801}`, 400},
		{"POST", "/v1/cluster/tokens", `{"node":"n4","ttlSeconds":-1}`, 400},
		{"POST", "/v1/cluster/tokens", `{"node":"n4","more":1}`, 400},
		{"GET", "/v1/cluster/tokens", "", 200},
		{"DELETE", "/v1/cluster/tokens/0011223344556677", "", 404},
		{"GET", "/v1/openapi.yaml", "", 200},
	} {
		req, err := http.NewRequest(c.method, "http://"+l.Addr().String()+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		if c.body != "" {
			req.Header.Set("Content-Type", "application/json")
		}
		res, err := hc.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(res.Body)
		res.Body.Close()
		if res.StatusCode != c.status {
			t.Errorf("%s %s %s: %s %s, want %d", c.method, c.path, c.body, res.Status, body, c.status)
		}
	}
}

// FuzzToken: no text crashes the reader of tokens, and what it reads it would write.
func FuzzToken(f *testing.F) {
	f.Add(NewFounding(time.Unix(1_700_000_000, 0)))
	f.Add(joining{id: [8]byte{1}}.text())
	f.Add("tercet-join-")
	f.Fuzz(func(t *testing.T, text string) {
		found, join, err := parseToken(text)
		switch {
		case err != nil:
		case found != nil:
			if found.text() != text {
				t.Errorf("%q became %q", text, found.text())
			}
		case join.text() != text:
			t.Errorf("%q became %q", text, join.text())
		}
	})
}

// FuzzAuthority: no document crashes the reader of the authority.
func FuzzAuthority(f *testing.F) {
	a, err := foundAuthority([32]byte{7}, time.Unix(1_700_000_000, 0))
	if err != nil {
		f.Fatal(err)
	}
	raw, err := a.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte(`{"key":"","certificate":""}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if a, err := decodeAuthority(raw); err == nil {
			again, err := a.encode()
			if err != nil || !json.Valid(again) {
				t.Error(err)
			}
		}
	})
}

// TestAuthorityIsOne: founding nodes make the same authority to the byte, and another one from another token.
func TestAuthorityIsOne(t *testing.T) {
	made := time.Unix(1_700_000_000, 0)
	make := func(secret byte) *x509.Certificate {
		a, err := foundAuthority([32]byte{secret}, made)
		if err != nil {
			t.Fatal(err)
		}
		return a.cert
	}
	if !bytes.Equal(make(1).Raw, make(1).Raw) {
		t.Error("the same token makes two authorities")
	}
	if make(1).Equal(make(2)) {
		t.Error("two tokens make the same authority")
	}
}
