package raft

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// authority signs certificates of nodes for a test.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	next int64
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir(), next: 2}
	a.cert = &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "nodes"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	a.key = a.makeKey()
	a.write("ca.pem", "CERTIFICATE", a.sign(a.cert, a.cert, &a.key.PublicKey))
	return a
}

func (a *authority) makeKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	return key
}

func (a *authority) sign(c, by *x509.Certificate, key *ecdsa.PublicKey) []byte {
	der, err := x509.CreateCertificate(rand.Reader, c, by, key, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

func (a *authority) write(name, kind string, der []byte) string {
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// node makes the files of a node.
func (a *authority) node(name string) PeerFiles {
	key := a.makeKey()
	cert := &x509.Certificate{SerialNumber: big.NewInt(a.next), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	a.next++
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	return PeerFiles{CA: filepath.Join(a.dir, "ca.pem"), Cert: a.write(name+".pem", "CERTIFICATE", a.sign(cert, a.cert, &key.PublicKey)),
		Key: a.write(name+".key", "EC PRIVATE KEY", der)}
}

func (a *authority) tls(f PeerFiles) *tls.Config {
	cfg, err := PeerTLS(f)
	if err != nil {
		a.t.Fatal(err)
	}
	return cfg
}

// A cluster whose nodes have certificates does its work, and takes none of those who have another node's certificate,
// one of another authority, or none.
func TestPeerTLS(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	secured := make(map[string]*tls.Config)
	for _, name := range founders {
		secured[name] = ours.tls(ours.node(name))
	}
	c := newCluster(t, func(cfg *Config) { cfg.PeerTLS = secured[cfg.Name] })
	c.start(founders...)
	c.inSync(3)
	for _, name := range founders {
		if r := must(t, c.node(name), Proposal{Command: publishCommand("t", name)}); r.Zones != 3 {
			t.Errorf("through %s: %d zones", name, r.Zones)
		}
	}
	if err := c.node("n1").AddMember(testContext(t), "n4"); err != nil {
		t.Fatal(err)
	}
	for what, wrong := range map[string]*tls.Config{
		"another node's certificate":      secured["n3"],
		"another authority's certificate": theirs.tls(theirs.node("n4")),
		"no certificate":                  nil,
	} {
		cfg := c.configOf("n3")
		cfg.Name, cfg.Dir, cfg.PeerAddr, cfg.Peers = "n4", t.TempDir(), freeAddr(t), nil
		cfg.Join, cfg.PeerTLS = []string{c.addrs["n1"], c.addrs["n2"], c.addrs["n3"]}, wrong
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		n, err := Start(ctx, cfg)
		cancel()
		if err == nil {
			_ = n.Close()
			t.Errorf("a node with %s joined", what)
		}
	}
	cfg := c.configOf("n3")
	cfg.Name, cfg.Dir, cfg.PeerAddr, cfg.Peers = "n4", t.TempDir(), freeAddr(t), nil
	cfg.Join, cfg.PeerTLS = []string{c.addrs["n1"], c.addrs["n2"], c.addrs["n3"]}, ours.tls(ours.node("n4"))
	if err := c.startWith(cfg); err != nil {
		t.Fatalf("a node with its own certificate: %v", err)
	}
	c.agree()
}
