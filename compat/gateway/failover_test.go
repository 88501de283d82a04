package gateway

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/compat/internal/redistest"
)

// TestFailover publishes and consumes while a replica is promoted: with WAIT for the replica nothing that was
// acknowledged is lost, and the gateway finds the new primary behind the same name.
func TestFailover(t *testing.T) {
	for _, how := range []string{"the primary dies", "the primary becomes a replica", "the network is cut"} {
		t.Run(how, func(t *testing.T) {
			first := redistest.Start(t)
			second := redistest.Start(t, "--replicaof", "127.0.0.1 "+strconv.Itoa(first.Port))
			redistest.Until(t, 20*time.Second, "the replica", func() error {
				if !strings.Contains(first.Do("INFO", "replication"), "connected_slaves:1") {
					return fmt.Errorf("not connected")
				}
				return nil
			})
			e := redistest.NewEndpoint(t, first.Addr())
			a := open(t, Options{Target: Target{Addr: e.Addr(), Mode: Single}, Worth: Worth{Replicas: 1, Timeout: time.Second}, Require: Level{rankReplicas, 1}})

			ctx, stop := context.WithCancel(t.Context())
			var mu sync.Mutex
			acked := make(map[string]bool)
			outcomes := make(map[int]int)
			var confirmed atomic.Int64
			var wg sync.WaitGroup
			for p := range 4 {
				wg.Go(func() {
					for i := 0; ctx.Err() == nil; i++ {
						body := fmt.Sprintf("%d-%d", p, i)
						r, err := a.try(ctx, "POST", "/api/v3/topic/t", body)
						if err != nil {
							continue
						}
						mu.Lock()
						if outcomes[r.status]++; r.status == 201 {
							acked[body] = true
							confirmed.Add(1)
						}
						mu.Unlock()
					}
				})
			}
			more := func(n int64) {
				t.Helper()
				from := confirmed.Load()
				redistest.Until(t, 30*time.Second, "more publishes", func() error {
					if got := confirmed.Load() - from; got < n {
						return fmt.Errorf("%d so far; outcomes %v", got, func() map[int]int {
							mu.Lock()
							defer mu.Unlock()
							m := map[int]int{}
							for k, v := range outcomes {
								m[k] = v
							}
							return m
						}())
					}
					return nil
				})
			}
			more(200)
			addr := second.Addr()
			switch how {
			case "the primary dies":
				first.Kill()
				second.Do("REPLICAOF", "NO", "ONE")
				e.Lead(addr)
				// A third server takes the replica's place, or WAIT would never be satisfied again.
				redistest.Start(t, "--replicaof", "127.0.0.1 "+strconv.Itoa(second.Port))
			case "the primary becomes a replica":
				first.Do("CLIENT", "PAUSE", "300", "WRITE")
				time300 := time.NewTimer(50 * time.Millisecond) // what was written before is on its way
				<-time300.C
				second.Do("REPLICAOF", "NO", "ONE")
				e.Lead(addr)
				first.Do("REPLICAOF", "127.0.0.1", strconv.Itoa(second.Port))
			case "the network is cut":
				e.Cut()
			}
			more(200)
			stop()
			wg.Wait()
			t.Logf("outcomes by status: %v", outcomes)

			found := make(map[string]int)
			empty := 0
			for empty < 3 {
				ms := a.receive("t", "g", "Vqs-Max-Messages", "10")
				if len(ms) == 0 {
					empty++
				}
				for _, m := range ms {
					found[string(m.Body)]++
					a.ack(204, "t", "g", m.Receipt)
				}
			}
			for body := range acked {
				if found[body] == 0 {
					t.Errorf("message %s was acknowledged and is lost", body)
				}
			}
			for body, n := range found {
				if n > 1 {
					t.Errorf("message %s is there %d times", body, n)
				}
			}
			t.Logf("%d acknowledged, %d found", len(acked), len(found))
		})
	}
}

// TestCluster runs on three shards and moves a slot while messages pass.
func TestCluster(t *testing.T) {
	nodes := redistest.Cluster(t, 3)
	a := open(t, Options{Target: Target{Addr: nodes[0].Addr()}})
	if got := a.g.Report().Mode; got != Cluster {
		t.Fatalf("mode %s", got)
	}
	for i := range 30 {
		topic := "t" + strconv.Itoa(i)
		a.send(topic, "x", "Vqs-Idempotency-Key", "k")
		a.ack(204, topic, "g", a.one(topic, "g", "x").Receipt)
	}

	slot, from, to := nodes.Owner("t")
	sent := 0
	send := func(count int) {
		for range count {
			a.send("t", strconv.Itoa(sent))
			sent++
		}
	}
	send(50)
	migration := redistest.Migrate(slot, from, to)
	send(20)
	// While the topic's keys are on their way, some here and some there, scripts have to wait for the rest.
	held := make(chan message, 1)
	go func() { held <- a.one("t", "g", "0") }()
	migration.Finish()
	send(30)
	a.ack(204, "t", "g", (<-held).Receipt)
	found := map[string]bool{"0": true}
	for {
		ms := a.receive("t", "g", "Vqs-Max-Messages", "10")
		if len(ms) == 0 {
			break
		}
		for _, m := range ms {
			found[string(m.Body)] = true
			a.ack(204, "t", "g", m.Receipt)
		}
	}
	if len(found) != sent {
		t.Errorf("%d of %d messages arrived", len(found), sent)
	}
}

// TestTLSAndUsers connects by TLS with a CA of its own as an ACL user, whose password then changes.
func TestTLSAndUsers(t *testing.T) {
	ca, cert, key := certificates(t)
	r := redistest.New(t, "--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", ca, "--tls-auth-clients", "no",
		"--user", "default", "off", "--user", "app", "on", ">secret", "~*", "&*", "+@all")
	r.TLS = true
	r.Run()
	t.Cleanup(r.Kill)
	url := fmt.Sprintf("rediss://app:secret@localhost:%d", r.Port)
	target, err := ParseTarget(url, ca)
	if err != nil {
		t.Fatal(err)
	}
	a := open(t, Options{Target: target})
	a.send("t", "x")
	a.one("t", "g", "x")
	if s := target.String(); strings.Contains(s, "secret") {
		t.Errorf("the password is shown: %s", s)
	}
	// Without the CA, and with another name than the certificate's, nothing is sent.
	for _, bad := range []struct{ url, ca, says string }{
		{url, "", "with --upstream-ca"}, {strings.Replace(url, "localhost", "127.0.0.1", 1), ca, "use the endpoint's name"},
		{strings.Replace(url, "secret", "wrong", 1), ca, "see that user and password"},
		{strings.Replace(url, "rediss", "redis", 1), "", "write rediss://"}, {"redis://localhost:1", "", "see that address and port"},
	} {
		target, err := ParseTarget(bad.url, bad.ca)
		if err != nil {
			t.Fatal(err)
		}
		if g, err := Open(t.Context(), Options{Target: target}); err == nil {
			g.Close()
			t.Errorf("connected to %s", bad.url)
		} else if !strings.Contains(err.Error(), bad.says) {
			t.Errorf("%s: %v, which does not say %q", bad.url, err, bad.says)
		}
	}
}

// certificates makes a CA and a server certificate for localhost, and returns the files.
func certificates(t *testing.T) (ca, cert, key string) {
	t.Helper()
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	parent := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, parent, parent, &caKey.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, parent, &own.PublicKey, caKey)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(own)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tls.X509KeyPair(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})); err != nil {
		t.Fatal(err)
	}
	return write("ca.pem", "CERTIFICATE", caDER), write("cert.pem", "CERTIFICATE", der), write("key.pem", "PRIVATE KEY", keyDER)
}

// TestRights looks at a server as users who lack something: the report names it, and how to get it.
func TestRights(t *testing.T) {
	r := redistest.Start(t, "--user", "whole", "on", ">secret", "~*", "&*", "+@all", "--user", "reader", "on", ">secret", "~*", "+@read", "+@connection", "+info", "+time",
		"--user", "narrow", "on", ">secret", "~orders", "&*", "+@all", "--user", "mute", "on", ">secret", "~*", "+@stream", "+ping")
	probe := func(user string) Report {
		t.Helper()
		report, err := Probe(t.Context(), Target{Addr: r.Addr(), Mode: Single, Username: user, Password: "secret"}, Worth{}, Reading{})
		if err != nil {
			t.Fatal(err)
		}
		return report
	}
	if got := probe("whole"); len(got.Refused) > 0 || len(got.Problems) > 0 || got.User != "whole" {
		t.Errorf("a user who may do everything: %+v", got)
	}
	// Without INFO nothing can be said, but what to add.
	if _, err := Probe(t.Context(), Target{Addr: r.Addr(), Mode: Single, Username: "mute", Password: "secret"}, Worth{}, Reading{}); err == nil ||
		!strings.Contains(err.Error(), "the user may not call INFO") || !strings.HasSuffix(err.Error(), " +wait") {
		t.Errorf("a user who may not look: %v", err)
	}
	// What is told to be added is what this server takes.
	r.Do(append([]string{"ACL", "SETUSER", "told", "on", ">secret", "~*"}, strings.Fields(rightsFor(Worth{}))...)...)
	if got := probe("told"); len(got.Refused) > 0 || len(got.Problems) > 0 {
		t.Errorf("a user with the rights that are told: %+v", got)
	}
	got := probe("reader")
	if err := got.Allows(Level{}); err == nil || !strings.Contains(strings.Join(got.Refused, " "), "XADD XDEL XACK XCLAIM XGROUP SET") || !strings.Contains(err.Error(), "+@stream") {
		t.Errorf("a user who may only read: %v; %v", got.Refused, err)
	}
	got = probe("narrow")
	if err := got.Allows(Level{}); err == nil || len(got.Refused) > 0 || !strings.Contains(err.Error(), "~tercet:gateway:*") {
		t.Errorf("a user who may touch one key: %+v", got)
	}
	if keys := r.Do("DBSIZE"); keys != "0" {
		t.Errorf("looking left %s keys behind", keys)
	}
}
