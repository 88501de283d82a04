package certs

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
	"strings"
	"testing"
	"time"
)

// authority signs certificates for tests.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
	next int64
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t: t, cert: cert, key: key, pem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), next: 2}
}

// issue returns a certificate for 127.0.0.1 with its key, in PEM.
func (a *authority) issue(end time.Time) (cert, key []byte) {
	a.t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.next++
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(a.next), NotBefore: time.Now().Add(-time.Hour), NotAfter: end, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.cert, &private.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	k, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		a.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k})
}

func write(t *testing.T, file string, data []byte) {
	t.Helper()
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// serial makes a handshake over a pipe and returns the serial number of the server's certificate.
func serial(t *testing.T, r *Reloader, a *authority, client []tls.Certificate) (int64, error) {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	near, far := net.Pipe()
	defer near.Close()
	served := make(chan error, 1)
	go func() {
		server := tls.Server(far, r.Config())
		err := server.Handshake()
		if err == nil {
			_, err = server.Write([]byte("x"))
		}
		far.Close()
		served <- err
	}()
	conn := tls.Client(near, &tls.Config{RootCAs: pool, ServerName: "127.0.0.1", Certificates: client})
	if _, err := conn.Read(make([]byte, 1)); err != nil {
		near.Close()
		<-served
		return 0, err
	}
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64(), nil
}

func TestReload(t *testing.T) {
	a := newAuthority(t)
	dir := t.TempDir()
	files := Files{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem")}
	place := func(cert, key []byte) { write(t, files.Cert, cert); write(t, files.Key, key) }
	end := time.Now().Add(time.Hour)
	place(a.issue(end))
	r, err := New(files, nil)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	r.now = func() time.Time { return now }
	expect := func(want int64) {
		t.Helper()
		if got, err := serial(t, r, a, nil); err != nil || got != want {
			t.Fatalf("the certificate of serial %d, %v; want %d", got, err, want)
		}
	}
	expect(3)
	place(a.issue(end))
	expect(3) // looked at a moment ago
	now = now.Add(2 * checkEvery)
	expect(4)
	// Half of a pair: the old one stays in use until the other half is there.
	cert, key := a.issue(end)
	write(t, files.Cert, cert)
	now = now.Add(2 * checkEvery)
	expect(4)
	write(t, files.Key, key)
	now = now.Add(2 * checkEvery)
	expect(5)
	if err := os.Remove(files.Cert); err != nil {
		t.Fatal(err)
	}
	now = now.Add(2 * checkEvery)
	expect(5)
	if err := r.Reload(); err == nil {
		t.Error("a missing file is loaded")
	}
	place(a.issue(end))
	if err := r.Reload(); err != nil {
		t.Fatal(err)
	}
	expect(6)
	place(a.issue(time.Now().Add(-time.Minute)))
	if err := r.Reload(); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("an expired certificate: %v", err)
	}
	expect(6)
}

func TestClientCA(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	files := Files{Cert: filepath.Join(dir, "cert.pem"), Key: filepath.Join(dir, "key.pem"), ClientCA: filepath.Join(dir, "ca.pem")}
	cert, key := a.issue(time.Now().Add(time.Hour))
	write(t, files.Cert, cert)
	write(t, files.Key, key)
	write(t, files.ClientCA, []byte("no certificate"))
	if _, err := New(files, nil); err == nil {
		t.Error("a file without certificates is loaded")
	}
	write(t, files.ClientCA, a.pem)
	r, err := New(files, nil)
	if err != nil {
		t.Fatal(err)
	}
	pair := func(a *authority) []tls.Certificate {
		p, err := tls.X509KeyPair(a.issue(time.Now().Add(time.Hour)))
		if err != nil {
			t.Fatal(err)
		}
		return []tls.Certificate{p}
	}
	if _, err := serial(t, r, a, pair(a)); err != nil {
		t.Errorf("a client of the authority: %v", err)
	}
	if _, err := serial(t, r, a, nil); err == nil {
		t.Error("a client without a certificate is let in")
	}
	if _, err := serial(t, r, a, pair(other)); err == nil {
		t.Error("a client of another authority is let in")
	}
}
