package compat

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/compat/acl"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server"
	"tercet.dev/tercet/server/servertest"
)

// serveUsers offers the users of a node over HTTP and returns a function that asks there.
func serveUsers(t *testing.T, node *raft.Node, from string) func(method, path, body string) (int, string) {
	t.Helper()
	s, err := server.New(server.Options{Backend: node, Extensions: []server.Extension{UsersExtension(node, from)}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	web := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return func(method, path, body string) (int, string) {
		t.Helper()
		req, err := http.NewRequest(method, "http://"+l.Addr().String()+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if body != "" {
			req.Header.Set("Content-Type", "application/json")
		}
		res, err := web.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, strings.TrimSpace(string(b))
	}
}

// TestUsersOverHTTP: what /v1 says of users is what the Valkey port goes by, and the other way round.
func TestUsersOverHTTP(t *testing.T) {
	node := servertest.Nodes(t, 1)[0]
	_, addr := start(t, Options{Backend: node})
	ask := serveUsers(t, node, "")
	want := func(method, path, body string, status int, part string) {
		t.Helper()
		if code, text := ask(method, path, body); code != status || !strings.Contains(text, part) {
			t.Errorf("%s %s %s: %d %s, want %d with %s", method, path, body, code, text, status, part)
		}
	}
	want("GET", "/v1/acl/users", "", 200, `{"users":[]}`)
	want("GET", "/v1/acl/users/alice", "", 404, `"not_found"`)
	want("PUT", "/v1/acl/users/alice", `{"rules":["on",">secret","~orders:*","+@stream"]}`, 200, `"name":"alice","rules":["on",`)
	c := dial(t, addr)
	waitFor(t, "alice to be known at the port", func() bool { return c.do("AUTH", "alice", "secret") == "+OK" })
	c.want("XLEN orders:1", ":0")
	c.want("XLEN other", "-NOPERM No permissions to access a key")
	if _, text := ask("GET", "/v1/acl/users/alice", ""); strings.Contains(text, "secret") || !strings.Contains(text, acl.HashPassword("secret")) {
		t.Errorf("the password shows as %s", text)
	}

	// Set once more, nothing of the former rules is left.
	want("PUT", "/v1/acl/users/alice", `{"rules":["on",">other","~*","+xlen"]}`, 200, `"alice"`)
	waitFor(t, "the new rules", func() bool { return c.do("XLEN", "other") == ":0" })
	c.want("XADD orders:1 * a b", "-NOPERM User alice has no permissions to run the 'xadd' command")
	d := dial(t, addr)
	d.want("AUTH alice secret", "-WRONGPASS invalid username-password pair or user is disabled.")
	d.want("ACL SETUSER bob on nopass +ping", "+OK")
	want("GET", "/v1/acl/users", "", 200, `"name":"bob","rules":["on","nopass"`)

	want("PUT", "/v1/acl/users/alice", `{"rules":["+nosuch"]}`, 400, "Unknown command or category name in ACL")
	want("PUT", "/v1/acl/users/alice", `{"rules":["on +@all"]}`, 400, "blanks")
	want("PUT", "/v1/acl/users/a%20b", `{"rules":["on"]}`, 400, "invalid_name")
	want("PUT", "/v1/acl/users/alice", `{"rule":["on"]}`, 400, "invalid_body")
	want("DELETE", "/v1/acl/users/default", "", 412, "default")
	want("DELETE", "/v1/acl/users/alice", "", 204, "")
	want("DELETE", "/v1/acl/users/alice", "", 404, "")
	waitFor(t, "alice to be cut off", func() bool {
		_, err := c.nc.Write(encodeCommand("PING"))
		if err == nil {
			_, err = readReply(c.r)
		}
		return err != nil
	})

	want("PUT", "/v1/acl/users/default", `{"rules":["off"]}`, 200, `"default"`)
	waitFor(t, "the default user to be off", func() bool { return strings.HasPrefix(dial(t, addr).do("PING"), "-NOAUTH") })

	fromFile := serveUsers(t, node, "/etc/users.acl")
	for _, method := range []string{"GET", "PUT", "DELETE"} {
		if code, text := fromFile(method, "/v1/acl/users/bob", `{"rules":[]}`); code != 412 || !strings.Contains(text, "/etc/users.acl") {
			t.Errorf("%s with users of a file: %d %s", method, code, text)
		}
	}
}

// testCA signs certificates.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func (a *testCA) issue(t *testing.T, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: a.cert == nil, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert == nil {
		if a.cert, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		a.key, a.pool = key, x509.NewCertPool()
		a.pool.AddCert(a.cert)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestCertificateUsers: with CertificateUsers a client is the user that its certificate names, if that one is on.
func TestCertificateUsers(t *testing.T) {
	a := &testCA{}
	a.issue(t, "authority")
	users, err := acl.Parse(strings.NewReader("user alice on >secret ~* +@all\nuser bob off ~* +@all\nuser default off\n"))
	if err != nil {
		t.Fatal(err)
	}
	config := &tls.Config{Certificates: []tls.Certificate{a.issue(t, "node")}, ClientCAs: a.pool, ClientAuth: tls.VerifyClientCertIfGiven}
	for _, mapped := range []bool{true, false} {
		_, addr := start(t, Options{Users: users, UsersFrom: "users.acl", TLS: config, CertificateUsers: mapped})
		for name, want := range map[string]string{"alice": "$5|alice", "bob": "-NOAUTH Authentication required.", "nobody": "-NOAUTH Authentication required.", "": "-NOAUTH Authentication required."} {
			if !mapped {
				want = "-NOAUTH Authentication required."
			}
			client0 := &tls.Config{RootCAs: a.pool, ServerName: "127.0.0.1"}
			if name != "" {
				client0.Certificates = []tls.Certificate{a.issue(t, name)}
			}
			nc, err := tls.Dial("tcp", addr, client0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { nc.Close() })
			nc.SetDeadline(time.Now().Add(2 * time.Minute))
			c := &client{t, nc, bufio.NewReader(nc)}
			if got := c.do("ACL", "WHOAMI"); got != want {
				t.Errorf("a certificate for %q, mapped %v: ACL WHOAMI is %s, want %s", name, mapped, got, want)
			}
			c.want("AUTH alice secret", "+OK")
			c.want("ACL WHOAMI", "$5|alice")
		}
	}
	// Who says nothing at all does not keep a place.
	_, addr := start(t, Options{Users: users, UsersFrom: "users.acl", TLS: config, CertificateUsers: true, Limits: Limits{LoginTimeout: 100 * time.Millisecond}})
	silent := dial(t, addr)
	if b, err := io.ReadAll(silent.r); len(b) > 7 || err != nil && strings.Contains(err.Error(), "timeout") {
		t.Errorf("a client without a handshake: %q, %v", b, err)
	}
}
