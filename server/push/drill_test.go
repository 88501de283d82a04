package push

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/server/servertest"
	"tercet.dev/tercet/server/wire"
)

// state waits until a subscription's state is as asked for, and returns it.
func (r *rig) state(id string, ok func(*wire.SubscriptionState) bool) wire.SubscriptionState {
	r.t.Helper()
	var last wire.SubscriptionState
	until(r.t, "the state of "+id, func() error {
		s, err := r.Subscription(r.t.Context(), id)
		if err != nil {
			return err
		}
		if s.State == nil {
			return errors.New("there is no state")
		}
		if last = *s.State; !ok(s.State) {
			return fmt.Errorf("%+v", last)
		}
		return nil
	})
	return last
}

// deadURL is one that refuses connections.
func deadURL(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return "http://" + l.Addr().String()
}

// An endpoint that is down opens the breaker; messages wait, and are pushed once it is up. Others do not notice.
func TestEndpointDown(t *testing.T) {
	r, other := newRig(t), newEndpointServer(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	s := r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: "http://" + address, RetryAfterSeconds: n64(1)})
	r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "other", URL: other.URL})
	const messages = 20
	for i := range messages {
		r.publish("orders", fmt.Sprint(i))
	}
	for range messages {
		p := other.next()
		r.ack(p)
		p.reply(200)
	}
	st := r.state(s.ID, func(s *wire.SubscriptionState) bool { return s.Breaker != "closed" })
	if st.State != "failing" || st.OpenSince == "" || st.NextProbe == "" || !strings.Contains(st.LastError, "refused") {
		t.Errorf("%+v", st)
	}
	app := &testEndpointServer{t: t, requests: make(chan *pushed, messages), closing: make(chan struct{})}
	app.Server = httptest.NewUnstartedServer(app)
	app.Listener.Close()
	if app.Listener, err = net.Listen("tcp", address); err != nil {
		t.Fatal(err)
	}
	app.Start()
	t.Cleanup(app.stop)
	for n := 0; n < messages; {
		select {
		case p := <-app.requests:
			r.ack(p)
			p.reply(200)
			n++
		case <-time.After(patience):
			t.Fatalf("only %d messages arrived after the endpoint came up: %+v", n, r.state(s.ID, func(*wire.SubscriptionState) bool { return true }))
		}
	}
	r.acknowledged("orders", "g", messages)
	r.state(s.ID, func(s *wire.SubscriptionState) bool { return s.Breaker == "closed" && s.State == "active" })
}

// An endpoint that hangs holds its own places and nobody else's; no answer in time is a failed delivery.
func TestEndpointHangs(t *testing.T) {
	r, slow, quick := newRig(t), newEndpointServer(t), newEndpointServer(t)
	hung := r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "slow", URL: slow.URL, RetryAfterSeconds: n64(600), TimeoutSeconds: n64(1)})
	r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "quick", URL: quick.URL})
	const messages = 40
	for i := range messages {
		r.publish("orders", fmt.Sprint(i))
	}
	for range messages {
		p := quick.next()
		r.ack(p)
		p.reply(200)
	}
	r.acknowledged("orders", "quick", messages)
	st := r.state(hung.ID, func(s *wire.SubscriptionState) bool { return s.Breaker != "closed" && s.Inflight == 0 })
	if !strings.Contains(st.LastError, "no answer in time") || st.Limit != 1 {
		t.Errorf("%+v", st)
	}
	if n := len(slow.requests); n > startLimit+2 {
		t.Errorf("%d requests to an endpoint that hangs, want %d at most", n, startLimit+2)
	}
}

// 429 with Retry-After stops pushes for as long, and the message comes again no sooner.
func TestEndpointThrottles(t *testing.T) {
	r, app := newRig(t), newEndpointServer(t)
	s := r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: app.URL, RetryAfterSeconds: n64(1)})
	r.publish("orders", "m")
	begun := time.Now()
	app.next().reply(429, "Retry-After", "2")
	r.settled()
	if st := r.state(s.ID, func(s *wire.SubscriptionState) bool { return s.Requests == 1 }); st.State != "throttled" || st.Breaker != "closed" {
		t.Errorf("%+v", st)
	}
	r.publish("orders", "another")
	// By the cluster's clock both are due; the endpoint's word is about its own time.
	r.advance(10 * time.Second)
	for range 2 {
		p := app.next()
		if waited := time.Since(begun); waited < 2*time.Second {
			t.Errorf("pushed %v after a Retry-After of 2 s", waited)
		}
		r.ack(p)
		p.reply(200)
	}
}

// A redirect is not followed, a name that leads to a private address is not dialled, and neither are the cluster's own.
func TestForbiddenTargets(t *testing.T) {
	node := servertest.Nodes(t, 1)[0]
	r := newRigOf(t, node, nil)
	var reached atomic.Int32
	internal := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached.Add(1) }))
	t.Cleanup(internal.Close)
	_, port, _ := net.SplitHostPort(internal.Listener.Addr().String())
	for _, url := range []string{
		"http://app.example.com/x", "https://127.0.0.1:" + port, "https://[::1]:" + port, "https://10.0.0.1/x", "https://169.254.169.254/latest", "https://[fe80::1]/",
		"https://0.0.0.0/", "https://100.64.1.1/", "https://[::ffff:127.0.0.1]/", "https://[64:ff9b::7f00:1]/", "https://[fd00::1]/", "https://224.0.0.1/", "https://8.8.8.8:22/",
		"ftp://example.com/", "https://user:pass@example.com/", "https:///x", "https://example.com/#f", "//example.com", "https://example.com:0/", "https://example.com:99999/", "javascript:alert(1)",
	} {
		if _, err := r.CreateSubscription(t.Context(), wire.Subscription{Topic: "t", ConsumerGroup: "g", URL: url}, false); err == nil {
			t.Errorf("%s was accepted", url)
		}
	}
	// A name is looked at when it is dialled.
	s := r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: "https://localhost:" + port})
	r.publish("orders", "m")
	st := r.state(s.ID, func(s *wire.SubscriptionState) bool { return s.Failed > 0 })
	if !strings.Contains(st.LastError, "a loopback address that --push-allow does not name") {
		t.Errorf("%+v", st)
	}
	if reached.Load() != 0 {
		t.Error("a request got through")
	}

	// The node itself is out of bounds even where its network is allowed.
	allowed := newRigOf(t, node, loopback)
	peer := node.Status().Nodes[0].Peer
	if _, err := allowed.CreateSubscription(t.Context(), wire.Subscription{Topic: "own", ConsumerGroup: "g", URL: "http://" + peer}, false); err == nil || !strings.Contains(err.Error(), "a node of this cluster") {
		t.Errorf("a push to the node's own port: %v", err)
	}
}

// pair makes a certificate and its key in PEM, signed by the parent or by itself.
func pair(t *testing.T, name string, parent *x509.Certificate, signer *ecdsa.PrivateKey) (certPEM, keyPEM string, cert *x509.Certificate, key *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: parent == nil, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	keyPEM = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}))
	return certPEM, keyPEM, cert, key
}

// A push presents its certificate, and goes only to an endpoint whose own is the right authority's.
func TestClientCertificate(t *testing.T) {
	r := newRig(t)
	caPEM, _, ca, caKey := pair(t, "authority", nil, nil)
	serverCert, serverKey, _, _ := pair(t, "endpoint", ca, caKey)
	clientCert, clientKey, _, _ := pair(t, "tercet", ca, caKey)
	serverPair, err := tls.X509KeyPair([]byte(serverCert), []byte(serverKey))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	app := &testEndpointServer{t: t, requests: make(chan *pushed, 10), closing: make(chan struct{})}
	app.Server = httptest.NewUnstartedServer(app)
	app.TLS = &tls.Config{Certificates: []tls.Certificate{serverPair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}
	app.Config.ErrorLog = r.d.log.StandardLogger(nil)
	app.StartTLS()
	t.Cleanup(app.stop)
	base := wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: app.URL, RetryAfterSeconds: n64(1)}

	without := base
	s := r.create(without)
	r.publish("orders", "m")
	if st := r.state(s.ID, func(s *wire.SubscriptionState) bool { return s.Failed > 0 }); !strings.Contains(st.LastError, "certificate") {
		t.Errorf("%+v", st)
	}
	with := base
	with.ClientCertificate, with.ClientKey, with.CACertificate = clientCert, clientKey, caPEM
	s = r.create(with)
	if s.ClientKey != "" || s.BearerToken != "" {
		t.Error("a secret is shown")
	}
	r.advance(5 * time.Second)
	p := app.next()
	if p.TLS == nil || len(p.TLS.PeerCertificates) == 0 || p.TLS.PeerCertificates[0].Subject.CommonName != "tercet" {
		t.Errorf("presented %+v", p.TLS)
	}
	r.ack(p)
	p.reply(200)
	with.ClientKey = ""
	if _, err := r.CreateSubscription(t.Context(), with, false); err == nil {
		t.Error("a certificate without its key was accepted")
	}
}

// A rotated secret signs beside the old one until the overlap is over.
func TestRotation(t *testing.T) {
	r, app := newRig(t), newEndpointServer(t)
	s := r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: app.URL})
	verify := func(p *pushed, secrets ...string) {
		t.Helper()
		var keys [][]byte
		for _, text := range secrets {
			key, err := secretKey(text)
			if err != nil {
				t.Fatal(err)
			}
			keys = append(keys, key)
		}
		var at int64
		if _, err := fmt.Sscan(p.Header.Get("webhook-timestamp"), &at); err != nil || time.Since(time.Unix(at, 0)) > time.Hour {
			t.Errorf("timestamp %q: %v", p.Header.Get("webhook-timestamp"), err)
		}
		if got, want := p.Header.Get("webhook-signature"), sign(keys, p.Header.Get("webhook-id"), at, p.body); got != want {
			t.Errorf("signature %q, want %q", got, want)
		}
		r.ack(p)
		p.reply(200)
	}
	r.publish("orders", "one")
	verify(app.next(), s.Secret)
	rotated, err := r.RotateSecret(t.Context(), s.ID, wire.RotateSecret{})
	if err != nil || rotated.Secret == "" || rotated.Secret == s.Secret {
		t.Fatal(rotated, err)
	}
	until(t, "pushes with both secrets", func() error {
		r.publish("orders", "two")
		p := app.next()
		if n := strings.Count(p.Header.Get("webhook-signature"), "v1,"); n != 2 {
			r.ack(p)
			p.reply(200)
			return fmt.Errorf("%d signatures", n)
		}
		verify(p, rotated.Secret, s.Secret)
		return nil
	})
	// Applying the subscription again, without a secret, changes none.
	again := r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: app.URL})
	if again.Secret != "" || again.Change != "unchanged" {
		t.Errorf("%+v", again)
	}
	last, err := r.RotateSecret(t.Context(), s.ID, wire.RotateSecret{OverlapSeconds: n64(0)})
	if err != nil {
		t.Fatal(err)
	}
	// The node that pushes learns of it a moment later.
	until(t, "pushes without the old secrets", func() error {
		r.publish("orders", "three")
		p := app.next()
		if n := strings.Count(p.Header.Get("webhook-signature"), "v1,"); n != 1 {
			r.ack(p)
			p.reply(200)
			return fmt.Errorf("%d signatures", n)
		}
		verify(p, last.Secret)
		return nil
	})
	if _, err := r.RotateSecret(t.Context(), s.ID, wire.RotateSecret{Secret: "whsec_short"}); err == nil {
		t.Error("a short secret was accepted")
	}
	shown, err := r.Subscription(t.Context(), s.ID)
	if err != nil || shown.Secret != "" {
		t.Errorf("a secret is shown: %+v, %v", shown, err)
	}
}

// Another node that leads pushes; the one that led stops, and its requests in progress still count.
func TestLeadershipMoves(t *testing.T) {
	nodes := servertest.Nodes(t, 3)
	app := newEndpointServer(t)
	var rigs []*rig
	for _, n := range nodes {
		rigs = append(rigs, newRigOf(t, n, loopback))
	}
	leads := func() (*rig, int) {
		for i, n := range nodes {
			if _, ok := n.Leading(); ok {
				return rigs[i], i
			}
		}
		return nil, -1
	}
	first, at := leads()
	follower := rigs[(at+1)%3]
	s := follower.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: app.URL, RetryAfterSeconds: n64(1)})
	follower.publish("orders", "one")
	before := app.next()
	if err := nodes[at].TransferLeadership(t.Context(), nodes[(at+2)%3].Status().ID); err != nil {
		t.Fatal(err)
	}
	until(t, "a new leader", func() error {
		if now, _ := leads(); now == nil || now == first {
			return errors.New("none")
		}
		return nil
	})
	follower.publish("orders", "two")
	after := app.next()
	if string(after.body) != "two" {
		t.Fatalf("pushed %q again", after.body)
	}
	first.ack(after)
	after.reply(200)
	// The old leader's request fails, and its message is released through the new one.
	before.reply(500)
	first.settled()
	until(t, "the state of the old leader to go", func() error {
		if first.d.State(s.ID, s.Revision) != nil {
			return errors.New("it still pushes")
		}
		return nil
	})
	follower.advance(2 * time.Second)
	again := app.next()
	if string(again.body) != "one" || again.Header.Get("ce-vqsdeliverycount") != "2" {
		t.Errorf("pushed %q, delivery %s", again.body, again.Header.Get("ce-vqsdeliverycount"))
	}
	follower.ack(again)
	again.reply(200)
}

// A subscription's documents: idempotent, replaced as a whole, listed, paused, deleted; groups stay.
func TestSubscriptions(t *testing.T) {
	r, app := newRig(t), newEndpointServer(t)
	base := wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: app.URL, Paused: true, Source: "test", MaxDeliveries: n64(7), MaxConcurrency: n64(2)}
	s := r.create(base)
	if s.Change != "created" || s.ID != SubscriptionID("orders", "g", "") || s.Secret == "" || *s.RetryAfterSeconds != 60 || *s.TimeoutSeconds != 1800 || *s.LeaseSeconds != 60 {
		t.Errorf("%+v", s)
	}
	if g := r.group("orders", "g"); g.Settings.MaxDeliveries != 7 || g.Settings.MaxConcurrency != 2 {
		t.Errorf("the group's settings are %+v", g.Settings)
	}
	r.publish("orders", "m")
	if st := r.state(s.ID, func(*wire.SubscriptionState) bool { return true }); st.State != "paused" {
		t.Errorf("%+v", st)
	}
	if again := r.create(base); again.Change != "unchanged" || again.Revision != s.Revision {
		t.Errorf("%+v", again)
	}
	base.Paused, base.MaxDeliveries = false, nil
	dry, err := r.CreateSubscription(t.Context(), base, true)
	if err != nil || dry.Change != "changed" || dry.Revision != 0 {
		t.Errorf("%+v, %v", dry, err)
	}
	app.none()
	changed := r.create(base)
	if changed.Change != "changed" || changed.CreatedAt != s.CreatedAt || changed.Secret != "" || changed.MaxDeliveries != nil {
		t.Errorf("%+v", changed)
	}
	if g := r.group("orders", "g"); g.Settings.MaxDeliveries != 0 || g.Settings.MaxConcurrency != 2 {
		t.Errorf("the group's settings are %+v", g.Settings)
	}
	p := app.next()
	r.ack(p)
	p.reply(200)
	all, err := r.Subscriptions(t.Context())
	if err != nil || len(all) != 1 || all[0].ID != s.ID || all[0].State == nil {
		t.Errorf("%+v, %v", all, err)
	}
	if err := r.DeleteSubscription(t.Context(), s.ID); err != nil {
		t.Error(err)
	}
	if err := r.DeleteSubscription(t.Context(), s.ID); err == nil {
		t.Error("deleted twice")
	}
	if _, err := r.Subscription(t.Context(), s.ID); err == nil {
		t.Error("still there")
	}
	until(t, "the feed to end", func() error {
		if r.d.State(s.ID, changed.Revision) != nil {
			return errors.New("still there")
		}
		return nil
	})
	r.publish("orders", "after")
	r.acknowledged("orders", "g", 1)
	app.none()
	for _, bad := range []wire.Subscription{
		{}, {Topic: "a*b", ConsumerGroup: "g", URL: app.URL}, {Topic: "t", ConsumerGroup: "g/h", URL: app.URL}, {Topic: "t", ConsumerGroup: "g", URL: app.URL, Type: "queue/v3"},
		{Topic: "t", ConsumerGroup: "g", URL: app.URL, MaxConcurrency: n64(0)}, {Topic: "t", ConsumerGroup: "g", URL: app.URL, RetryAfterSeconds: n64(0)},
		{Topic: "t", ConsumerGroup: "g", URL: app.URL, LeaseSeconds: n64(29)}, {Topic: "t", ConsumerGroup: "g", URL: app.URL, InlineBytesMax: n64(1 << 20)},
		{Topic: "t", ConsumerGroup: "g", URL: app.URL, BearerToken: "a\nb"}, {Topic: "t", ConsumerGroup: "g", URL: app.URL, Secret: "guess"},
		{Topic: "t", ConsumerGroup: "g", URL: app.URL, DeploymentID: "a b"}, {Topic: "t", ConsumerGroup: "g", URL: deadURL(t) + "/\x7f"},
	} {
		if _, err := r.CreateSubscription(t.Context(), bad, false); err == nil {
			t.Errorf("%+v was accepted", bad)
		}
	}
}
