package nodecert

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/wal/disk"
)

// What the data directory holds of it, in a folder of its own:
//
//	node.pem        the node's private key, its certificate, and that of the authority
//	authority.json  the authority with its key, on a founding node until the cluster's state holds it
//	pending.pem     the private key of a certificate that was asked for
const (
	dirName       = "tls"
	nodeFile      = "node.pem"
	authorityFile = "authority.json"
	pendingFile   = "pending.pem"
)

// fileMax bounds the files that are read.
const fileMax = 64 << 10

// Options are what a Keeper is opened with.
type Options struct {
	// Dir is the node's data directory and Name its id.
	Dir, Name string
	// Token is what a node without a certificate obtains its first one with: a founding token, or one to join with.
	Token string
	// Join are the addresses of members that a node with a token of the second kind asks.
	Join   []string
	Logger hclog.Logger

	// fs and now are replaced by tests.
	fs  disk.FS
	now func() time.Time
}

// Backend is what the keeper needs of a node. *raft.Node is one.
type Backend interface {
	Propose(ctx context.Context, p raft.Proposal) (raft.Reply, error)
	Query(ctx context.Context, q engine.Query) (engine.Answer, error)
}

// Keeper holds the certificate that a node presents to the others, and keeps it good.
type Keeper struct {
	o       Options
	current atomic.Pointer[credentials]
	// founded is the authority until the cluster holds it; nil on nodes that did not found.
	founded *authority
	backend atomic.Pointer[Backend]
	// newcomers bounds the nodes that are served at the same time.
	newcomers chan struct{}
}

// credentials are what node.pem holds.
type credentials struct {
	pair      *tls.Certificate // the leaf, then the authority
	authority *x509.Certificate
}

// Has reports whether a data directory holds a certificate of Tercet's own making.
func Has(dir string) bool {
	f, err := disk.OS().Open(filepath.Join(dir, dirName, nodeFile), disk.ReadOnly)
	if err != nil {
		return false
	}
	_ = f.Close()
	return true
}

// Open loads the node's certificate. A node without one obtains it with its token: the founding token makes the authority
// that signs it; with any other the members are asked until one of them signs it or refuses, or ctx ends. Refusals are
// *raft.StartError.
func Open(ctx context.Context, o Options) (*Keeper, error) {
	if o.fs == nil {
		o.fs = disk.OS()
	}
	if o.now == nil {
		o.now = time.Now
	}
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	k := &Keeper{o: o, newcomers: make(chan struct{}, newcomersMax)}
	if err := o.fs.MkdirAll(k.path("")); err != nil {
		return nil, err
	}
	if raw, err := k.read(authorityFile); err == nil {
		if k.founded, err = decodeAuthority(raw); err != nil {
			return nil, damaged(k.path(authorityFile), err)
		}
	} else if !errors.Is(err, disk.ErrNotExist) {
		return nil, err
	}
	raw, err := k.read(nodeFile)
	switch {
	case errors.Is(err, disk.ErrNotExist):
		return k, k.first(ctx)
	case err != nil:
		return nil, err
	}
	c, err := parseCredentials(raw)
	if err != nil {
		return nil, damaged(k.path(nodeFile), err)
	}
	if o.now().After(c.pair.Leaf.NotAfter) {
		if k.founded != nil {
			return k, k.selfIssue(k.founded)
		}
		if _, join, err := parseToken(o.Token); err == nil && join != nil {
			return k, k.join(ctx, join)
		}
		return nil, &raft.StartError{Kind: raft.ErrRefused,
			Message: fmt.Sprintf("the node's certificate expired on %s while the node was away", c.pair.Leaf.NotAfter.UTC().Format(time.DateOnly)),
			Remedy:  fmt.Sprintf("tercet cluster token create %s --server URL; then start this node once with --peer-token TOKEN --join H:P[,H:P]", o.Name)}
	}
	k.current.Store(c)
	return k, nil
}

func damaged(path string, err error) error {
	return &raft.StartError{Kind: raft.ErrDamaged, Message: path + " cannot be read", Remedy: "remove the file and start this node with a new --peer-token and --join", Cause: err}
}

// first obtains the node's first certificate.
func (k *Keeper) first(ctx context.Context) error {
	found, join, err := parseToken(k.o.Token)
	switch {
	case err != nil:
		return &raft.StartError{Kind: raft.ErrRefused, Message: "--peer-token: " + err.Error(), Remedy: "tercet cluster token create"}
	case found != nil:
		if k.founded, err = foundAuthority(found.secret, found.created); err != nil {
			return err
		}
		raw, err := k.founded.encode()
		if err != nil {
			return err
		}
		if err := k.write(authorityFile, raw); err != nil {
			return err
		}
		return k.selfIssue(k.founded)
	case len(k.o.Join) == 0:
		return &raft.StartError{Kind: raft.ErrRefused, Message: "the token is one to join with, and --join names no member to ask", Remedy: "add --join H:P[,H:P]"}
	}
	return k.join(ctx, join)
}

// selfIssue makes a certificate where the authority's key is at hand.
func (k *Keeper) selfIssue(a *authority) error {
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	leaf, err := a.issue(k.o.Name, public, k.o.now())
	if err != nil {
		return err
	}
	return k.use(key, leaf, a.cert.Raw)
}

// use takes a certificate into use, on disk first.
func (k *Keeper) use(key ed25519.PrivateKey, leaf, authority []byte) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	for _, block := range []*pem.Block{{Type: "PRIVATE KEY", Bytes: der}, {Type: "CERTIFICATE", Bytes: leaf}, {Type: "CERTIFICATE", Bytes: authority}} {
		if err := pem.Encode(&b, block); err != nil {
			return err
		}
	}
	c, err := parseCredentials(b.Bytes())
	if err != nil {
		return err
	}
	if err := k.write(nodeFile, b.Bytes()); err != nil {
		return err
	}
	k.current.Store(c)
	return nil
}

func parseCredentials(raw []byte) (*credentials, error) {
	pair, err := tls.X509KeyPair(raw, raw)
	if err != nil {
		return nil, err
	}
	if len(pair.Certificate) != 2 {
		return nil, fmt.Errorf("%d certificates instead of the node's and the authority's", len(pair.Certificate))
	}
	authority, err := x509.ParseCertificate(pair.Certificate[1])
	if err != nil {
		return nil, err
	}
	if err := pair.Leaf.CheckSignatureFrom(authority); err != nil {
		return nil, err
	}
	return &credentials{&pair, authority}, nil
}

// TLS secures the connections between nodes in both directions, always with the newest certificate. Newcomers that speak
// Protocol are let through without one: they must not reach anything but Enrol.
func (k *Keeper) TLS() *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(k.current.Load().authority)
	present := func() (*tls.Certificate, error) { return k.current.Load().pair, nil }
	newcomer := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{Protocol}, SessionTicketsDisabled: true,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return present() },
	}
	c := raft.PeerTLSOf(pool, present)
	c.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if len(h.SupportedProtos) == 1 && h.SupportedProtos[0] == Protocol {
			return newcomer, nil
		}
		return nil, nil //nolint:nilnil // what the standard library asks for: the configuration stays
	}
	return c
}

// NotAfter is when the certificate in use expires.
func (k *Keeper) NotAfter() time.Time { return k.current.Load().pair.Leaf.NotAfter }

// How often what could not be done is tried again, and how often the certificate's age is looked at.
const (
	storeRetry = 500 * time.Millisecond
	lookEvery  = time.Hour
)

// Follow does what needs the cluster until ctx ends: a founding node hands the authority over to the replicated state,
// newcomers are served, and the certificate is renewed in time.
func (k *Keeper) Follow(ctx context.Context, b Backend) {
	k.backend.Store(&b)
	for {
		wait := lookEvery
		err := k.handOver(ctx, b)
		if err == nil {
			err = k.renew(ctx, b)
		}
		if err != nil {
			wait = storeRetry
			if c := errs.CodeOf(err); ctx.Err() == nil && c != errs.NoLeader && c != errs.NotLeader && c != errs.Draining {
				k.o.Logger.Warn("the cluster's authority cannot be used; trying again", "error", err)
			}
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// handOver puts the authority into the replicated state. All founding nodes try; the first one does it.
func (k *Keeper) handOver(ctx context.Context, b Backend) error {
	if k.founded == nil {
		return nil
	}
	stored, err := storedOf(ctx, b)
	if err != nil {
		return err
	}
	if stored == nil {
		value, err := k.founded.encode()
		if err != nil {
			return err
		}
		c := &engine.Document{Table: authorityTable, Key: authorityKey, Value: value, IfAbsent: true}
		reply, err := b.Propose(ctx, raft.Proposal{Command: c.AppendTo(nil)})
		if err != nil {
			return err
		}
		if reply.Code != errs.OK && reply.Code != errs.Conflict {
			return errs.Of(reply.Code)
		}
		k.o.Logger.Info("the cluster keeps its authority itself from now on; the founding token is of no further use and should be deleted")
	}
	if err := k.o.fs.Remove(k.path(authorityFile)); err != nil && !errors.Is(err, disk.ErrNotExist) {
		return err
	}
	k.founded = nil
	return nil
}

// renew replaces a certificate of which little life is left. A member signs for itself: it holds the replicated state,
// and with it the authority.
func (k *Keeper) renew(ctx context.Context, b Backend) error {
	if k.NotAfter().Sub(k.o.now()) > renewBefore {
		return nil
	}
	a, err := storedOf(ctx, b)
	if err != nil {
		return err
	}
	if a == nil {
		return errors.New("the cluster holds no authority")
	}
	if err := k.selfIssue(a); err != nil {
		return err
	}
	k.o.Logger.Info("the node's certificate was renewed", "expires", k.NotAfter().UTC())
	return nil
}

// The document that holds the authority.
const (
	authorityTable = "node-authority"
	authorityKey   = "current"
)

// storedOf reads the cluster's authority; nil if it has none.
func storedOf(ctx context.Context, b Backend) (*authority, error) {
	d, err := document(ctx, b, authorityTable, authorityKey)
	if err != nil || d == nil {
		return nil, err
	}
	return decodeAuthority(d.Value)
}

// document reads one document; nil if there is none.
func document(ctx context.Context, b Backend, table, key string) (*engine.StoredDocument, error) {
	answer, err := b.Query(ctx, engine.Query{Kind: engine.QueryDocuments, Table: table, Key: key, Max: 1})
	if err != nil {
		return nil, err
	}
	for i := range answer.Documents {
		if d := &answer.Documents[i]; d.Key == key {
			return d, nil
		}
	}
	return nil, nil //nolint:nilnil // no document is no error
}

// pendingKey is the key that a certificate is asked for with: the same one until it was obtained, so that an answer that
// was lost can be asked for again.
func (k *Keeper) pendingKey() (ed25519.PrivateKey, error) {
	raw, err := k.read(pendingFile)
	if err == nil {
		block, _ := pem.Decode(raw)
		if block != nil {
			if key, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
				if key, ok := key.(ed25519.PrivateKey); ok {
					return key, nil
				}
			}
		}
		return nil, damaged(k.path(pendingFile), errors.New("it holds no key"))
	}
	if !errors.Is(err, disk.ErrNotExist) {
		return nil, err
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, k.write(pendingFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func (k *Keeper) path(name string) string { return filepath.Join(k.o.Dir, dirName, name) }

func (k *Keeper) read(name string) ([]byte, error) {
	f, err := k.o.fs.Open(k.path(name), disk.ReadOnly)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > fileMax {
		return nil, fmt.Errorf("%s: %d bytes are too many", k.path(name), size)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil && !(errors.Is(err, io.EOF) && size == 0) {
		return nil, err
	}
	return b, nil
}

// write replaces a file: its new content is on disk before its name leads to it.
func (k *Keeper) write(name string, content []byte) error {
	tmp := k.path(name + ".tmp")
	if err := k.o.fs.Remove(tmp); err != nil && !errors.Is(err, disk.ErrNotExist) {
		return err
	}
	f, err := k.o.fs.Create(tmp, disk.Buffered)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt(content, 0); err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	if err := k.o.fs.Rename(tmp, k.path(name)); err != nil {
		return err
	}
	return k.o.fs.SyncDir(k.path(""))
}

// storedToken is a join token as a document.
type storedToken struct {
	Node    string    `json:"node"`
	SHA256  []byte    `json:"sha256"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires"`
	// Used is the hash of the public key that was certified. The same key may be certified again, as long as the token is
	// good: an answer can be lost.
	Used []byte `json:"used,omitempty"`
}

func decodeToken(b []byte) (t storedToken, err error) { return t, json.Unmarshal(b, &t) }
