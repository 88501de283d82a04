// Package certs serves TLS with certificates that are replaced while the process runs: by cert-manager, certbot, or a
// person with cp.
package certs

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
)

// Files name what a server presents and whom it believes.
type Files struct {
	// Cert and Key are PEM files: the chain, leaf first, and its private key.
	Cert, Key string
	// ClientCA is a PEM file of authorities. With one, clients have to present a certificate that one of them signed.
	ClientCA string
}

// checkEvery is how often a handshake looks whether the files have changed.
const checkEvery = time.Second

// Reloader holds the certificates in use. It has no goroutine: handshakes look after the files.
type Reloader struct {
	files Files
	log   hclog.Logger
	now   func() time.Time

	current atomic.Pointer[tls.Config]
	// checked is when the files were last looked at, in nanoseconds.
	checked atomic.Int64

	mu    sync.Mutex
	stamp string // of the files as they were last tried
}

// New loads the files.
func New(files Files, log hclog.Logger) (*Reloader, error) {
	if log == nil {
		log = hclog.NewNullLogger()
	}
	r := &Reloader{files: files, log: log, now: time.Now}
	if err := r.Reload(); err != nil {
		return nil, err
	}
	return r, nil
}

// Config returns the configuration of a listener. It always uses the newest certificates.
func (r *Reloader) Config() *tls.Config {
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { r.check(); return r.current.Load(), nil },
	}
}

// Reload loads the files again, whether or not they have changed. What cannot be used leaves everything as it was.
func (r *Reloader) Reload() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.checked.Store(r.now().UnixNano())
	r.stamp = r.stamps()
	return r.load()
}

func (r *Reloader) load() error {
	pair, err := tls.LoadX509KeyPair(r.files.Cert, r.files.Key)
	if err != nil {
		return fmt.Errorf("certificate %s, key %s: %w", r.files.Cert, r.files.Key, err)
	}
	if err := expired(&pair, r.now()); err != nil {
		return fmt.Errorf("certificate %s: %w", r.files.Cert, err)
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2", "http/1.1"}}
	if r.files.ClientCA != "" {
		pool, err := Pool(r.files.ClientCA)
		if err != nil {
			return err
		}
		c.ClientAuth, c.ClientCAs = tls.RequireAndVerifyClientCert, pool
	}
	r.current.Store(c)
	return nil
}

func expired(pair *tls.Certificate, now time.Time) error {
	if now.After(pair.Leaf.NotAfter) {
		return fmt.Errorf("expired on %s", pair.Leaf.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}

// Pool reads a PEM file of certificates.
func Pool(file string) (*x509.CertPool, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s: %w", file, errors.New("no certificate in it"))
	}
	return pool, nil
}

// check loads the files again when they have changed.
func (r *Reloader) check() {
	now := r.now().UnixNano()
	last := r.checked.Load()
	if now-last < int64(checkEvery) && now >= last || !r.checked.CompareAndSwap(last, now) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	stamp := r.stamps()
	if stamp == r.stamp {
		return
	}
	// Files are replaced one after the other; a pair that does not fit yet is tried again when the next one changes.
	r.stamp = stamp
	if err := r.load(); err != nil {
		r.log.Warn("the changed certificate files cannot be used; the certificates in use stay", "error", err)
		return
	}
	r.log.Info("certificates loaded again", "expires", r.NotAfter().UTC().Format(time.RFC3339))
}

// stamps tells versions of the files apart. A missing file is a version too.
func (r *Reloader) stamps() (s string) {
	for _, name := range []string{r.files.Cert, r.files.Key, r.files.ClientCA} {
		if name == "" {
			continue
		}
		info, err := os.Stat(name)
		if err != nil {
			s += "-;"
			continue
		}
		s += fmt.Sprintf("%d %d;", info.ModTime().UnixNano(), info.Size())
	}
	return s
}

// NotAfter is when the certificate in use expires.
func (r *Reloader) NotAfter() time.Time { return r.current.Load().Certificates[0].Leaf.NotAfter }
