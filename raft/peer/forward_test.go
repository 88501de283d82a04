package peer

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"sync"
	"testing"
	"time"
)

type tlsState = *tls.ConnectionState

func forwarder(h ForwardHandler, more ...func(*Options)) func(*Options) {
	return func(o *Options) {
		o.Forward = h
		for _, m := range more {
			m(o)
		}
	}
}

// TestForwardManyAtOnce: requests do not wait for each other.
func TestForwardManyAtOnce(t *testing.T) {
	const count = 300
	var inside sync.WaitGroup
	inside.Add(count)
	a, b := pair(t, nil, forwarder(func(ctx context.Context, from Remote, kind Kind, body []byte) ([]byte, error) {
		inside.Done()
		inside.Wait() // all of them are here
		if from.ID != "n1.aa" || kind != KindUser+9 {
			return nil, fmt.Errorf("from %s, kind %d", from.ID, kind)
		}
		if string(body) == "7" {
			return nil, errors.New("seven")
		}
		return append([]byte("re "), body...), nil
	}))
	var wg sync.WaitGroup
	for i := range count {
		wg.Go(func() {
			reply, err := a.Call(patient(t), b.ID(), KindUser+9, fmt.Append(nil, i))
			var remote *RemoteError
			switch {
			case i == 7:
				if !errors.As(err, &remote) || remote.Code != CodeFailed || remote.Text != "seven" {
					t.Errorf("request 7: %q, %v", reply, err)
				}
			case err != nil || string(reply) != fmt.Sprintf("re %d", i):
				t.Errorf("request %d: %q, %v", i, reply, err)
			}
		})
	}
	wg.Wait()
}

// TestForwardCancel: when the asker gives up, the handler learns so, for that request only.
func TestForwardCancel(t *testing.T) {
	entered := make(chan string, 2)
	ended := make(chan string, 2)
	a, b := pair(t, nil, forwarder(func(ctx context.Context, _ Remote, _ Kind, body []byte) ([]byte, error) {
		entered <- string(body)
		<-ctx.Done()
		ended <- string(body)
		return nil, ctx.Err()
	}, func(o *Options) { o.ForwardConns = 1 }))
	ctx1, cancel1 := context.WithCancel(context.Background())
	ctx2, cancel2 := context.WithCancel(context.Background())
	defer cancel2()
	results := make(chan error, 2)
	for name, ctx := range map[string]context.Context{"first": ctx1, "second": ctx2} {
		go func() {
			_, err := a.Call(ctx, b.ID(), KindUser, []byte(name))
			results <- err
		}()
	}
	<-entered
	<-entered
	cancel1()
	if got := <-ended; got != "first" {
		t.Errorf("%s ended", got)
	}
	var lost *ConnError
	if err := <-results; !errors.As(err, &lost) || !lost.Sent || !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	// The connection's end ends what runs on its behalf.
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if got := <-ended; got != "second" {
		t.Errorf("%s ended", got)
	}
	if err := <-results; err == nil {
		t.Error("an answer after the end")
	}
}

func TestForwardIsBounded(t *testing.T) {
	entered, leave := make(chan struct{}, 2), make(chan struct{})
	handler := func(ctx context.Context, _ Remote, _ Kind, _ []byte) ([]byte, error) {
		entered <- struct{}{}
		<-leave
		return nil, nil
	}
	for name, bound := range map[string]func(*Options){
		"count": func(o *Options) { o.ForwardMax = 2 },
		"bytes": func(o *Options) { o.ForwardBytesMax = 2 << 10 },
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t, nil, forwarder(handler, bound))
			var wg sync.WaitGroup
			for range 2 {
				wg.Go(func() {
					if _, err := a.Call(patient(t), b.ID(), KindUser, make([]byte, 1<<10)); err != nil {
						t.Error(err)
					}
				})
			}
			<-entered
			<-entered
			var remote *RemoteError
			if _, err := a.Call(patient(t), b.ID(), KindUser, make([]byte, 1<<10)); !errors.As(err, &remote) || remote.Code != CodeBusy {
				t.Errorf("third: %v", err)
			}
			leave <- struct{}{}
			leave <- struct{}{}
			wg.Wait()
			if n, bytes := b.forwarding.Load(), b.forwardBytes.Load(); n != 0 || bytes != 0 {
				t.Errorf("%d requests, %d bytes remain on the books", n, bytes)
			}
		})
	}
}

func TestForwardNotServed(t *testing.T) {
	a, b := pair(t, nil)
	var remote *RemoteError
	if _, err := a.Call(patient(t), b.ID(), KindUser); !errors.As(err, &remote) || remote.Code != CodeUnbound {
		t.Errorf("got %v", err)
	}
	if _, err := a.Call(patient(t), "n9.zz", KindUser); !errors.Is(err, ErrUnknownPeer) {
		t.Errorf("got %v", err)
	}
}

// TestIntroduction: any two nodes may exchange one question and one answer, whatever their clusters.
func TestIntroduction(t *testing.T) {
	b := start(t, "n2.bb", func(o *Options) {
		o.Cluster = ""
		o.Introduce = func(_ context.Context, from Remote, body []byte) ([]byte, error) {
			if string(body) == "no" {
				return nil, errors.New("never")
			}
			return fmt.Appendf(nil, "%s of %s in %s says %s", from.ID, from.Cluster, from.Zone, body), nil
		}
	})
	a := start(t, "n1.aa")
	remote, reply, err := a.Introduce(patient(t), b.Addr().String(), KindUser, []byte("hello"))
	if err != nil || string(reply) != "n1.aa of c1 in zone-n1 says hello" || remote.ID != b.ID() || remote.Cluster != "" || remote.Zone != "zone-n2" {
		t.Errorf("%+v, %q, %v", remote, reply, err)
	}
	var failed *RemoteError
	if _, _, err := a.Introduce(patient(t), b.Addr().String(), KindUser, []byte("no")); !errors.As(err, &failed) || failed.Text != "never" {
		t.Errorf("got %v", err)
	}
	if _, _, err := b.Introduce(patient(t), a.Addr().String(), KindUser, nil); !errors.As(err, &failed) || failed.Code != CodeUnbound {
		t.Errorf("got %v", err)
	}
	if _, _, err := a.Introduce(patient(t), b.Addr().String(), KindUser, make([]byte, introduceMax+1)); err == nil {
		t.Error("an introduction without end")
	}
	// It is good for nothing else.
	c, err := a.dial(patient(t), "", b.Addr().String(), Introduction)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.send(KindUser, 0, 7, 1, [][]byte{make([]byte, introduceMax+1)}); err != nil {
		t.Fatal(err)
	}
	<-c.Done()
	if _, err := a.dial(patient(t), "", b.Addr().String(), Data); err == nil {
		t.Error("data without a target")
	}
}

// certificates makes a small authority and a configuration for both ends of a connection with a certificate of it.
func certificates(t *testing.T) (good, foreign *tls.Config) {
	t.Helper()
	authority := func() (*x509.Certificate, *ecdsa.PrivateKey, *x509.CertPool) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, IsCA: true,
			NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true}
		der, err := x509.CreateCertificate(crand.Reader, template, template, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AddCert(cert)
		return cert, key, pool
	}
	ca, caKey, pool := authority()
	leaf := func(parent *x509.Certificate, parentKey *ecdsa.PrivateKey) tls.Certificate {
		key, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour),
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
		der, err := x509.CreateCertificate(crand.Reader, template, parent, &key.PublicKey, parentKey)
		if err != nil {
			t.Fatal(err)
		}
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	config := func(c tls.Certificate) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{c}, RootCAs: pool, ClientCAs: pool,
			ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13}
	}
	other, otherKey, _ := authority()
	return config(leaf(ca, caKey)), config(leaf(other, otherKey))
}

func TestTLS(t *testing.T) {
	good, foreign := certificates(t)
	seen := make(chan int, 16)
	a, b := pair(t, handlerFunc(func(r *Request) { r.Reply(r.Body) }), func(o *Options) {
		o.TLS = good
		o.Admit = func(_ Hello, state *tls.ConnectionState) error {
			if state == nil || len(state.PeerCertificates) != 1 {
				return errors.New("no certificate")
			}
			select {
			case seen <- 1:
			default:
			}
			return nil
		}
	})
	body := make([]byte, 3<<20)
	for i := range body {
		body[i] = byte(i * 7)
	}
	reply, err := a.conn(t, b.ID(), Data).Call(patient(t), KindUser, 7, []byte("head"), body)
	if err != nil || len(reply) != 4+len(body) || string(reply[4:]) != string(body) {
		t.Fatalf("%d bytes, %v", len(reply), err)
	}
	<-seen
	c := start(t, "n3.cc", func(o *Options) { o.TLS = foreign })
	if _, err := c.dial(patient(t), b.ID(), b.Addr().String(), Data); err == nil {
		t.Error("a foreign certificate was accepted")
	}
	b.log.await(t, "without a valid certificate")
	d := start(t, "n4.dd")
	if _, err := d.dial(patient(t), b.ID(), b.Addr().String(), Data); err == nil {
		t.Error("plain text was accepted")
	}
}
