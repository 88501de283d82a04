package nodecert

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// How long certificates are good. The authority outlives what it signs by far; a node's certificate is renewed by the
// node itself when a third of its life is left.
const (
	authorityLife = 20 * 365 * 24 * time.Hour
	leafLife      = 90 * 24 * time.Hour
	renewBefore   = leafLife / 3
	// skew is how much the clocks of two nodes may differ.
	skew = time.Hour
)

// authority is the cluster's: it signs the certificates of its nodes and nothing else.
type authority struct {
	cert *x509.Certificate
	key  ed25519.PrivateKey
}

// foundAuthority makes the authority that a founding secret stands for. It is the same wherever it is made: the key comes
// from the secret, and an Ed25519 signature from key and content alone.
func foundAuthority(secret [32]byte, created time.Time) (*authority, error) {
	seed, err := hkdf.Key(sha256.New, secret[:], nil, "tercet cluster authority 1", ed25519.SeedSize)
	if err != nil {
		return nil, err
	}
	key := ed25519.NewKeyFromSeed(seed)
	public := key.Public().(ed25519.PublicKey)
	id := sha256.Sum256(public)
	template := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(append([]byte{1}, id[:15]...)), Subject: pkix.Name{CommonName: "Tercet cluster"}, SubjectKeyId: id[:20],
		NotBefore: created.Add(-skew), NotAfter: created.Add(authorityLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(nil, template, template, public, key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{cert, key}, nil
}

// issue signs a certificate for the node of this name.
func (a *authority) issue(name string, public crypto.PublicKey, now time.Time) ([]byte, error) {
	var serial [16]byte
	_, _ = rand.Read(serial[:]) // never fails, by its contract
	serial[0] &= 0x7f
	until := now.Add(leafLife)
	if until.After(a.cert.NotAfter) {
		until = a.cert.NotAfter
	}
	return x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial[:]), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: now.Add(-skew), NotAfter: until, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a.cert, public, a.key)
}

// storedAuthority is the authority as a document.
type storedAuthority struct {
	Certificate []byte `json:"certificate"`
	Key         []byte `json:"key"`
}

func (a *authority) encode() ([]byte, error) {
	return json.Marshal(storedAuthority{a.cert.Raw, a.key.Seed()})
}

func decodeAuthority(b []byte) (*authority, error) {
	var s storedAuthority
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, err
	}
	if len(s.Key) != ed25519.SeedSize {
		return nil, errors.New("the key has another length")
	}
	cert, err := x509.ParseCertificate(s.Certificate)
	if err != nil {
		return nil, err
	}
	key := ed25519.NewKeyFromSeed(s.Key)
	if public, ok := cert.PublicKey.(ed25519.PublicKey); !ok || !public.Equal(key.Public()) {
		return nil, errors.New("key and certificate do not belong together")
	}
	return &authority{cert, key}, nil
}

// fingerprint names an authority in a join token.
func fingerprint(cert *x509.Certificate) [32]byte { return sha256.Sum256(cert.Raw) }

// readRequest checks a certificate request: whoever sent it has the key, which is of a kind that costs little to verify.
func readRequest(der []byte, name string) (crypto.PublicKey, error) {
	r, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, err
	}
	switch r.PublicKey.(type) {
	case ed25519.PublicKey, *ecdsa.PublicKey:
	default:
		return nil, fmt.Errorf("a key of type %T", r.PublicKey)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, err
	}
	if r.Subject.CommonName != name {
		return nil, fmt.Errorf("it is for %q", r.Subject.CommonName)
	}
	return r.PublicKey, nil
}
