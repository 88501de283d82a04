package e2e

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// authority signs certificates, as an operator's does.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	next int64
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, dir: t.TempDir(), key: key, next: 2, cert: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "an operator's"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.write("ca.pem", "CERTIFICATE", der)
	return a
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

func (a *authority) write(name, kind string, der []byte) {
	a.t.Helper()
	// In one step, as whoever replaces a file in use does.
	tmp := a.path(name + ".new")
	if err := os.WriteFile(tmp, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	if err := os.Rename(tmp, a.path(name)); err != nil {
		a.t.Fatal(err)
	}
}

// issue writes FILE.pem and FILE.key for these names and 127.0.0.1, and returns the certificate's serial number.
func (a *authority) issue(file string, names ...string) int64 {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.next++
	cert, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(a.next), Subject: pkix.Name{CommonName: file}, DNSNames: names,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(12 * time.Hour)}, a.cert, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	a.write(file+".key", "EC PRIVATE KEY", der)
	a.write(file+".pem", "CERTIFICATE", cert)
	return a.next
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

// peerArgs are a node's certificate for the other nodes, by files.
func (a *authority) peerArgs(id string) []string {
	return []string{"--peer-tls-cert", a.path(id + ".pem"), "--peer-tls-key", a.path(id + ".key"), "--peer-tls-ca", a.path("ca.pem")}
}

// refusesStrangers fails the test unless a node's peer address is closed to everybody without a certificate, however they
// try.
func refusesStrangers(t *testing.T, n *harness.Node) {
	t.Helper()
	hello := []byte("\x00\x00\x00\x20 anything that is no handshake of TLS")
	plain, err := net.Dial("tcp", n.Peer)
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	_ = plain.SetDeadline(time.Now().Add(time.Minute))
	_, _ = plain.Write(hello)
	// A TLS alert says that this is TLS; nothing else comes.
	if got, _ := io.ReadAll(plain); len(got) > 7 || len(got) > 0 && got[0] != 21 {
		t.Errorf("%s answers in clear text: %q", n.ID, got)
	}
	for _, protocols := range [][]string{nil, {"tercet-enrol/1"}, {"tercet-enrol/1", "h2"}, {"h2"}} {
		conn, err := tls.Dial("tcp", n.Peer, &tls.Config{InsecureSkipVerify: true, NextProtos: protocols})
		if err != nil {
			continue
		}
		_ = conn.SetDeadline(time.Now().Add(time.Minute))
		_, _ = conn.Write(hello)
		if got, _ := io.ReadAll(conn); len(got) > 0 {
			t.Errorf("%s answers somebody without a certificate (%q): %q", n.ID, protocols, got)
		}
		conn.Close()
	}
}

// worksThrough fails the test unless a message that one node takes can be received through another one.
func worksThrough(t *testing.T, from, to *harness.Node, topic string) {
	t.Helper()
	publish(t, client(t, from), topic, []byte("through "+from.ID))
	if got := receiveAll(t, client(t, to), topic, "g"); len(got) != 1 {
		t.Errorf("%d messages from %s arrived through %s, want 1", len(got), from.ID, to.ID)
	}
}

// TestJoinToken: three nodes that share a founding token form a cluster whose nodes show each other certificates; a fourth
// one gets in with a one-time token; nobody else does.
func TestJoinToken(t *testing.T) {
	beside(t)
	c := harness.New(t, harness.Options{Nodes: 4})
	var peers []string
	for _, n := range c.Nodes[:3] {
		peers = append(peers, n.ID+"="+n.Peer)
	}
	made, _, code := tercet(t, time.Minute, "cluster", "token", "create", "--founding")
	if code != 0 {
		t.Fatalf("make a founding token: exit %d", code)
	}
	founding := strings.TrimSpace(made)
	for _, n := range c.Nodes[:3] {
		n.StartWith("--peers", strings.Join(peers, ","), "--peer-token", founding)
	}
	c.WaitInSync("a", "b", "c")
	n1, n4 := c.Nodes[0], c.Nodes[3]
	for _, n := range c.Nodes[:3] {
		refusesStrangers(t, n)
	}
	worksThrough(t, n1, c.Nodes[1], "before")

	// A certificate once obtained is all that a node needs, and the founders give the authority's key away.
	for _, n := range c.Nodes[:3] {
		harness.Until(t, time.Minute, n.ID+" to give the authority's key away", func() error {
			if _, err := os.Stat(filepath.Join(n.Data, "tls", "authority.json")); !os.IsNotExist(err) {
				return errors.Join(errNotYet, err)
			}
			return nil
		})
		if info, err := os.Stat(filepath.Join(n.Data, "tls", "node.pem")); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: node.pem: %v, %v", n.ID, info, err)
		}
	}
	c.Nodes[2].Stop()
	c.Nodes[2].StartWith()
	c.WaitInSync("a", "b", "c")

	// Without a token, or with another cluster's, a node does not get in even if it was invited.
	stranger, _, _ := tercet(t, time.Minute, "cluster", "token", "create", "--founding")
	n4.StartWith("--join", n1.Peer, "--peer-token", strings.TrimSpace(stranger))
	if _, errs, code := tercet(t, time.Minute, "cluster", "add", "n4", "--server", n1.URL()); code != 0 {
		t.Fatalf("add n4: exit %d: %s", code, errs)
	}
	harness.Until(t, time.Minute, "n1 to refuse a certificate of another authority", func() error {
		log, err := os.ReadFile(n1.Log)
		if err != nil || !bytes.Contains(log, []byte("connection without a valid certificate")) {
			return errors.Join(errNotYet, err)
		}
		return nil
	})
	n4.Kill()
	n4.Wipe()

	token, errs, code := tercet(t, time.Minute, "cluster", "token", "create", "n4", "--server", n1.URL())
	token = strings.TrimSpace(token)
	if code != 0 || !strings.HasPrefix(token, "tercet-join-") {
		t.Fatalf("make a join token: exit %d: %s%s", code, token, errs)
	}
	// As another node it is refused, and stays good for the one it is for.
	_, errs, code = tercet(t, time.Minute, "server", "--node-id", "n5", "--data", filepath.Join(c.Dir, "n5"), "--http", harness.FreeAddr(t), "--peer", harness.FreeAddr(t),
		"--join", n1.Peer, "--peer-token", token)
	if code != exitPrecondition || !strings.Contains(errs, "is for node n4") {
		t.Errorf("another node with n4's token: exit %d: %s", code, errs)
	}
	n4.StartWith("--join", n1.Peer+","+c.Nodes[1].Peer, "--peer-token", token)
	if _, errs, code := tercet(t, time.Minute, "cluster", "add", "n4", "--server", n1.URL()); code != 0 {
		t.Fatalf("add n4: exit %d: %s", code, errs)
	}
	c.WaitInSync("a", "b", "c", "d")
	worksThrough(t, n4, n1, "after")
	refusesStrangers(t, n4)

	_, errs, code = tercet(t, time.Minute, "server", "--node-id", "n4", "--data", filepath.Join(c.Dir, "again"), "--http", harness.FreeAddr(t), "--peer", harness.FreeAddr(t),
		"--join", n1.Peer, "--peer-token", token)
	if code != exitPrecondition || !strings.Contains(errs, "has been used") {
		t.Errorf("a second node with the token: exit %d: %s", code, errs)
	}
	if list, _, code := tercet(t, time.Minute, "cluster", "token", "list", "--server", n1.URL()); code != 0 || !strings.Contains(list, "used") {
		t.Errorf("list: exit %d: %s", code, list)
	}
	c.EqualHashes()
}

// TestPeerCertificateFiles: the same with an operator's own certificates. A replaced file is used without a restart, and a
// node whose certificate names another one is refused.
func TestPeerCertificateFiles(t *testing.T) {
	beside(t)
	ours := newAuthority(t)
	for _, id := range []string{"n1", "n2", "n3", "n4"} {
		ours.issue(id, id)
	}
	c := harness.New(t, harness.Options{Nodes: 4})
	var peers []string
	for _, n := range c.Nodes[:3] {
		peers = append(peers, n.ID+"="+n.Peer)
	}
	for _, n := range c.Nodes[:3] {
		n.StartWith(append(ours.peerArgs(n.ID), "--peers", strings.Join(peers, ","))...)
	}
	c.WaitInSync("a", "b", "c")
	n1, n4 := c.Nodes[0], c.Nodes[3]
	refusesStrangers(t, n1)
	worksThrough(t, n1, c.Nodes[1], "files")
	if _, errs, code := tercet(t, time.Minute, "cluster", "token", "create", "n4", "--server", n1.URL()); code != exitPrecondition {
		t.Errorf("a join token where certificates are files: exit %d: %s", code, errs)
	}

	serial := ours.issue("n1", "n1")
	shown := int64(0)
	conn, err := tls.Dial("tcp", n1.Peer, &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(s tls.ConnectionState) error {
		shown = s.PeerCertificates[0].SerialNumber.Int64()
		return nil
	}})
	if err == nil {
		conn.Close()
	}
	if shown != serial {
		t.Errorf("n1 shows certificate %d after its file was replaced by %d", shown, serial)
	}

	if _, errs, code := tercet(t, time.Minute, "cluster", "add", "n4", "--server", n1.URL()); code != 0 {
		t.Fatalf("add n4: exit %d: %s", code, errs)
	}
	n4.StartWith(append(ours.peerArgs("n3"), "--join", n1.Peer)...)
	harness.Until(t, time.Minute, "n4 to be refused with n3's certificate", func() error {
		log, err := os.ReadFile(n1.Log)
		if err != nil || !bytes.Contains(log, []byte("not for node n4")) {
			return errors.Join(errNotYet, err)
		}
		return nil
	})
	n4.Kill()
	n4.Wipe()
	n4.StartWith(append(ours.peerArgs("n4"), "--join", n1.Peer)...)
	c.WaitInSync("a", "b", "c", "d")
	worksThrough(t, n4, n1, "after")
	c.EqualHashes()
}

// TestHTTPS: everything clients do works behind TLS, over HTTP/2 and HTTP/1.1: sending, receiving, waiting for messages,
// 4 MiB streams, the state of pushes through every node. A replaced certificate is used without a restart.
func TestHTTPS(t *testing.T) {
	beside(t)
	ours := newAuthority(t)
	ours.issue("http", "localhost")
	secure := &tls.Config{RootCAs: ours.pool()}
	c := harness.Start(t, harness.Options{Args: pushArgs,
		TLS: &harness.Certificates{CA: ours.path("ca.pem"), ServerCert: ours.path("http.pem"), ServerKey: ours.path("http.key"), Client: secure}})
	followers, leader := c.Followers()

	for _, n := range []*harness.Node{leader, followers[0]} {
		cl := client(t, n)
		p := publish(t, cl, "tls-"+n.ID, []byte("hello"))
		if p.Answer.Proto != "HTTP/2.0" {
			t.Errorf("%s answers in %s", n.ID, p.Answer.Proto)
		}
		// A receive that waits is woken by a message that comes later, through another node.
		topic := "wait-" + n.ID
		publish(t, cl, topic, []byte("first"))
		receiveAll(t, cl, topic, "g")
		got := make(chan string, 1)
		go func() {
			ds, a := cl.Receive(t.Context(), harness.Receive{Topic: topic, Group: "g", Max: 1, Visibility: 30 * time.Second, Wait: 50 * time.Second})
			if len(ds) != 1 {
				got <- fmt.Sprint(a)
				return
			}
			got <- string(ds[0].Body)
		}()
		publish(t, client(t, followers[1]), topic, []byte("later"))
		if body := <-got; body != "later" {
			t.Errorf("a receive waiting at %s got %s", n.ID, body)
		}
		big := bytes.Repeat([]byte("0123456789abcdef"), 4<<16)
		publish(t, cl, "big-"+n.ID, big)
		for _, d := range receiveAll(t, cl, "big-"+n.ID, "g") {
			if !bytes.Equal(d.Body, big) {
				t.Errorf("%d bytes came back of %d through %s", len(d.Body), len(big), n.ID)
			}
		}
		// Many at the same time share a connection.
		results := make(chan harness.Answer, 50)
		for i := range cap(results) {
			go func() { results <- cl.Publish(t.Context(), "many", fmt.Appendf(nil, "%d", i), nil).Answer }()
		}
		for range cap(results) {
			if a := <-results; a.Status != http.StatusCreated {
				t.Errorf("one of many: %v", a)
			}
		}
		// Clients of HTTP/1.1 are served as before.
		one := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: ours.pool(), NextProtos: []string{"http/1.1"}}}}
		res, err := one.Post(n.URL()+"/api/v3/topic/one", "text/plain", strings.NewReader("x"))
		if err != nil || res.StatusCode != http.StatusCreated || res.ProtoMajor != 1 {
			t.Errorf("HTTP/1.1: %v, %v", res, err)
		}
		if err == nil {
			res.Body.Close()
		}
		one.CloseIdleConnections()
	}
	if got := receiveAll(t, client(t, leader), "many", "g"); len(got) != 100 {
		t.Errorf("%d of 100 messages arrived", len(got))
	}

	// The pushes' state is the leader's; it is asked for by node, not by the address that clients use.
	called := make(chan struct{}, 16)
	endpoint := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		called <- struct{}{}
		w.WriteHeader(http.StatusInternalServerError)
	}))
	defer endpoint.Close()
	s := subscribe(t, client(t, followers[0]), map[string]any{"topic": "pushed", "consumerGroup": "g", "url": endpoint.URL})
	publish(t, client(t, followers[1]), "pushed", []byte("x"))
	<-called
	for _, n := range c.Nodes {
		harness.Until(t, time.Minute, "the state of pushes through "+n.ID, func() error {
			a := client(t, n).Do(t.Context(), http.MethodGet, "/v1/subscriptions/"+s.ID, nil, nil)
			if a.Status != http.StatusOK || !bytes.Contains(a.Body, []byte(`"requests":`)) {
				return fmt.Errorf("%v", a)
			}
			return nil
		})
	}

	// The command line trusts the authority that it is given, and no other.
	if out, errs, code := tercet(t, time.Minute, "cluster", "status", "--server", leader.URL(), "--ca", ours.path("ca.pem")); code != 0 {
		t.Errorf("the command line over TLS: exit %d: %s%s", code, out, errs)
	}
	if _, errs, code := tercet(t, time.Minute, "cluster", "status", "--server", leader.URL()); code == 0 {
		t.Errorf("the command line trusts an unknown authority: %s", errs)
	}

	serial := ours.issue("http", "localhost")
	if err := leader.Process().Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	harness.Until(t, time.Minute, "the replaced certificate to be used", func() error {
		conn, err := tls.Dial("tcp", leader.HTTP, secure)
		if err != nil {
			return err
		}
		defer conn.Close()
		if shown := conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64(); shown != serial {
			return fmt.Errorf("certificate %d is shown, want %d", shown, serial)
		}
		return nil
	})
}

// TestLoopbackOnly: without any security a node is reachable from its own machine only and says so; other addresses are
// refused with what they need.
func TestLoopbackOnly(t *testing.T) {
	beside(t)
	c := harness.Start(t, harness.Options{Nodes: 1})
	log, err := os.ReadFile(c.Nodes[0].Log)
	if err != nil || !bytes.Contains(log, []byte("HTTP is bound to the loopback interface only")) {
		t.Errorf("the log does not say that the node is bound to loopback only: %v", err)
	}
	for flag, remedy := range map[string]string{"--http": "--insecure", "--peer": "--insecure"} {
		args := []string{"server", "--node-id", "n1", "--data", filepath.Join(c.Dir, "open")}
		_, errs, code := tercet(t, time.Minute, append(args, flag, "0.0.0.0:0")...)
		if code != 2 || !strings.Contains(errs, flag) || !strings.Contains(errs, remedy) {
			t.Errorf("%s on all interfaces: exit %d: %s", flag, code, errs)
		}
	}
}
