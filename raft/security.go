package raft

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"

	"tercet.dev/tercet/raft/peer"
)

// PeerFiles name the PEM files that secure the connections between nodes: this node's certificate with its key, and the
// authorities that sign the nodes' certificates. A certificate is for one node: its DNS names hold the node's id.
type PeerFiles struct{ Cert, Key, CA string }

// PeerTLS reads the files and returns what secures connections in both directions. Certificate and key are read again
// for each connection, so that a renewed one is used without a restart; the authorities are not.
//
// Nodes are dialled by addresses, and who answers is not known before: so a certificate is verified against the
// authorities alone, and then compared with the identity its holder claims (see admitPeer).
func PeerTLS(f PeerFiles) (*tls.Config, error) {
	pem, err := os.ReadFile(f.CA)
	if err != nil {
		return nil, err
	}
	authorities := x509.NewCertPool()
	if !authorities.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", f.CA)
	}
	load := func() (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		if err != nil {
			return nil, err
		}
		return &pair, nil
	}
	if _, err := load(); err != nil {
		return nil, err
	}
	return PeerTLSOf(authorities, load), nil
}

// PeerTLSOf is PeerTLS for authorities and a certificate that are at hand: load is called for each connection.
func PeerTLSOf(authorities *x509.CertPool, load func() (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return load() },
		GetClientCertificate:   func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() },
		ClientAuth:             tls.RequireAnyClientCert,
		// Both ends verify in VerifyConnection, which runs for every handshake, resumed ones included.
		InsecureSkipVerify: true, //nolint:gosec // see above: the name to expect is not that of the address
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errors.New("no certificate was presented")
			}
			chain := x509.NewCertPool()
			for _, c := range s.PeerCertificates[1:] {
				chain.AddCert(c)
			}
			_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: authorities, Intermediates: chain,
				KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
			return err
		},
	}
}

// admitPeer compares a node's certificate with the name it goes by. Without TLS everybody is who they say.
func admitPeer(h peer.Hello, state *tls.ConnectionState) error {
	if state == nil {
		return nil
	}
	if len(state.PeerCertificates) == 0 {
		return errors.New("no certificate was presented")
	}
	if names := state.PeerCertificates[0].DNSNames; !slices.Contains(names, h.ID.Name()) {
		return fmt.Errorf("the certificate is for %q, not for node %s", names, h.ID.Name())
	}
	return nil
}
