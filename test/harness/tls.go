package harness

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Certificates are an authority and what it has signed, as files and for this process.
type Certificates struct {
	// CA is the authority; ServerCert and ServerKey are for 127.0.0.1 and localhost, ClientCert and ClientKey for clients.
	CA, ServerCert, ServerKey, ClientCert, ClientKey string
	// Client is the configuration of a client that trusts the authority and has the client's certificate.
	Client *tls.Config
}

// NewCertificates makes an authority and certificates in dir.
func NewCertificates(tb testing.TB, dir string) *Certificates {
	tb.Helper()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			tb.Fatal(err)
		}
		return path
	}
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			tb.Fatal(err)
		}
		return key
	}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	authorityKey := newKey()
	sign := func(leaf *x509.Certificate, key *ecdsa.PrivateKey) []byte {
		der, err := x509.CreateCertificate(rand.Reader, leaf, authority, &key.PublicKey, authorityKey)
		if err != nil {
			tb.Fatal(err)
		}
		return der
	}
	root := sign(authority, authorityKey)
	c := &Certificates{CA: write("ca.pem", "CERTIFICATE", root)}
	pair := func(serial int64, name string, usage x509.ExtKeyUsage) (cert, key string) {
		k := newKey()
		leaf := sign(&x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
			NotBefore: authority.NotBefore, NotAfter: authority.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{usage}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		}, k)
		der, err := x509.MarshalECPrivateKey(k)
		if err != nil {
			tb.Fatal(err)
		}
		return write(name+".pem", "CERTIFICATE", leaf), write(name+".key", "EC PRIVATE KEY", der)
	}
	c.ServerCert, c.ServerKey = pair(2, "server", x509.ExtKeyUsageServerAuth)
	c.ClientCert, c.ClientKey = pair(3, "client", x509.ExtKeyUsageClientAuth)
	own, err := tls.LoadX509KeyPair(c.ClientCert, c.ClientKey)
	if err != nil {
		tb.Fatal(err)
	}
	ca, err := x509.ParseCertificate(root)
	if err != nil {
		tb.Fatal(err)
	}
	c.Client = &tls.Config{RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{own}, MinVersion: tls.VersionTLS12}
	c.Client.RootCAs.AddCert(ca)
	return c
}
