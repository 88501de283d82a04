package nodecert

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// Protocol is the application protocol (ALPN) of a node that asks for its first certificate, at the address where nodes
// speak with each other. One JSON document goes each way.
const Protocol = "tercet-enrol/1"

const (
	// newcomersMax bounds the newcomers that are served at the same time.
	newcomersMax = 8
	// enrolBytesMax bounds each of the two documents.
	enrolBytesMax = 16 << 10
	// enrolTimeout bounds the whole exchange.
	enrolTimeout = 10 * time.Second
	// enrolEvery is how often members are asked again.
	enrolEvery = 500 * time.Millisecond
)

// enrolRequest is what a newcomer says.
type enrolRequest struct {
	// Token is the id of its token, and Secret what only who has the token knows.
	Token  string `json:"token"`
	Secret []byte `json:"secret"`
	Node   string `json:"node"`
	// Request is a certificate request (PKCS #10).
	Request []byte `json:"request"`
}

// enrolReply is the answer: a certificate, or why there is none.
type enrolReply struct {
	Certificate []byte `json:"certificate,omitempty"`
	Error       string `json:"error,omitempty"`
	// Final says that asking again is of no use.
	Final bool `json:"final,omitempty"`
}

// refusal is an error that stays.
type refusal struct{ reason string }

func (r *refusal) Error() string { return r.reason }

func refuse(format string, args ...any) error { return &refusal{fmt.Sprintf(format, args...)} }

// Enrol serves one newcomer, whom nothing is known of yet, and closes the connection.
func (k *Keeper) Enrol(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	select {
	case k.newcomers <- struct{}{}:
		defer func() { <-k.newcomers }()
	default:
		return
	}
	ctx, cancel := context.WithTimeout(ctx, enrolTimeout)
	defer cancel()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	var q enrolRequest
	if err := json.NewDecoder(io.LimitReader(conn, enrolBytesMax)).Decode(&q); err != nil {
		return
	}
	var reply enrolReply
	certificate, err := k.admit(ctx, &q)
	var final *refusal
	switch {
	case err == nil:
		reply.Certificate = certificate
		k.o.Logger.Info("a node obtained its certificate", "node", q.Node, "token", q.Token, "from", conn.RemoteAddr().String())
	case errors.As(err, &final):
		reply.Error, reply.Final = final.reason, true
		k.o.Logger.Warn("a node was refused a certificate", "from", conn.RemoteAddr().String(), "reason", final.reason)
	default:
		reply.Error = errs.From(err).Error()
	}
	_ = json.NewEncoder(conn).Encode(&reply) // a newcomer that has gone asks again
}

// admit uses a token up and signs.
func (k *Keeper) admit(ctx context.Context, q *enrolRequest) ([]byte, error) {
	backend := k.backend.Load()
	if backend == nil {
		return nil, errs.Of(errs.NoLeader)
	}
	a, err := storedOf(ctx, *backend)
	if err != nil {
		return nil, err
	}
	if a == nil {
		return nil, errs.New(errs.NoLeader, "the cluster has no authority yet")
	}
	for {
		public, again, err := k.useToken(ctx, *backend, q)
		switch {
		case again:
			continue
		case err != nil:
			return nil, err
		}
		return a.issue(q.Node, public, k.o.now())
	}
}

// useToken checks a token and marks it as used, or says that it has changed meanwhile.
func (k *Keeper) useToken(ctx context.Context, b Backend, q *enrolRequest) (public crypto.PublicKey, again bool, err error) {
	if id, err := hex.DecodeString(q.Token); err != nil || len(id) != 8 {
		return nil, false, refuse("the cluster does not know this token")
	}
	d, err := document(ctx, b, tokenTable, q.Token)
	if err != nil {
		return nil, false, err
	}
	if d == nil {
		return nil, false, refuse("the cluster does not know this token")
	}
	t, err := decodeToken(d.Value)
	if err != nil {
		return nil, false, err
	}
	hash := sha256.Sum256(q.Secret)
	if subtle.ConstantTimeCompare(hash[:], t.SHA256) != 1 {
		return nil, false, refuse("the cluster does not know this token")
	}
	if t.Node != q.Node {
		return nil, false, refuse("the token is for node %s, not for %s", t.Node, q.Node)
	}
	public, err = readRequest(q.Request, q.Node)
	if err != nil {
		return nil, false, refuse("the certificate request is not valid: %s", err)
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, false, err
	}
	used := sha256.Sum256(der)
	switch {
	case len(t.Used) > 0 && !bytes.Equal(t.Used, used[:]):
		return nil, false, refuse("the token has been used")
	case k.o.now().After(t.Expires):
		return nil, false, refuse("the token expired at %s", t.Expires.UTC().Format(time.RFC3339))
	case len(t.Used) > 0:
		return public, false, nil
	}
	t.Used = used[:]
	value, err := json.Marshal(&t)
	if err != nil {
		return nil, false, err
	}
	c := &engine.Document{Table: tokenTable, Key: q.Token, Value: value, IfRevision: d.Revision}
	reply, err := b.Propose(ctx, raft.Proposal{Command: c.AppendTo(nil)})
	switch {
	case err != nil:
		return nil, false, err
	case reply.Code == errs.Conflict:
		return nil, true, nil
	case reply.Code != errs.OK:
		return nil, false, errs.Of(reply.Code)
	}
	return public, false, nil
}

// join asks members for a certificate until one signs it or refuses.
func (k *Keeper) join(ctx context.Context, token *joining) error {
	key, err := k.pendingKey()
	if err != nil {
		return err
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: k.o.Name}}, key)
	if err != nil {
		return err
	}
	q := &enrolRequest{Token: token.key(), Secret: token.secret[:], Node: k.o.Name, Request: request}
	t := time.NewTicker(enrolEvery)
	defer t.Stop()
	said := ""
	for {
		var last error
		for _, address := range k.o.Join {
			leaf, authority, err := ask(ctx, address, token, q)
			var final *refusal
			switch {
			case err == nil:
				if err := k.use(key, leaf, authority.Raw); err != nil {
					return err
				}
				k.o.Logger.Info("obtained the node's certificate", "from", address, "expires", k.NotAfter().UTC())
				return k.o.fs.Remove(k.path(pendingFile))
			case errors.As(err, &final):
				return &raft.StartError{Kind: raft.ErrRefused, Message: fmt.Sprintf("%s: %s", address, final.reason),
					Remedy: fmt.Sprintf("tercet cluster token create %s --server URL", k.o.Name)}
			}
			last = fmt.Errorf("%s: %w", address, err)
		}
		if last != nil && last.Error() != said {
			said = last.Error()
			k.o.Logger.Warn("waiting for a member to sign the node's certificate", "why", last)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the node's certificate: %w", context.Cause(ctx))
		}
	}
}

// ask asks one member. It is not told anything before it has shown to be of the cluster that the token names.
func ask(ctx context.Context, address string, token *joining, q *enrolRequest) (leaf []byte, authority *x509.Certificate, err error) {
	ctx, cancel := context.WithTimeout(ctx, enrolTimeout)
	defer cancel()
	dialer := tls.Dialer{Config: &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{Protocol},
		// Verified below, against the one authority that the token names. Which member answers does not matter.
		InsecureSkipVerify: true, //nolint:gosec // see above
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) < 2 || fingerprint(s.PeerCertificates[len(s.PeerCertificates)-1]) != token.fingerprint {
				return refuse("the node there is not of the cluster that the token is from")
			}
			authority = s.PeerCertificates[len(s.PeerCertificates)-1]
			roots := x509.NewCertPool()
			roots.AddCert(authority)
			_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
			return err
		},
	}}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := json.NewEncoder(conn).Encode(q); err != nil {
		return nil, nil, err
	}
	var reply enrolReply
	if err := json.NewDecoder(io.LimitReader(conn, enrolBytesMax)).Decode(&reply); err != nil {
		return nil, nil, err
	}
	switch {
	case reply.Final:
		return nil, nil, refuse("%s", reply.Error)
	case reply.Error != "":
		return nil, nil, errors.New(reply.Error)
	}
	cert, err := x509.ParseCertificate(reply.Certificate)
	if err != nil {
		return nil, nil, err
	}
	if err := cert.CheckSignatureFrom(authority); err != nil {
		return nil, nil, err
	}
	return cert.Raw, authority, nil
}
