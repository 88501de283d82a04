package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// scripted is a server whose answers are written down in advance; "hang up" closes the connection instead.
type scripted struct {
	*httptest.Server
	mu      sync.Mutex
	answers []string
	asked   []string
}

func script(t *testing.T, answers ...string) *scripted {
	t.Helper()
	s := &scripted{answers: answers}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		s.mu.Lock()
		s.asked = append(s.asked, fmt.Sprintf("%s %s %s", r.Method, r.URL.EscapedPath(), body))
		answer := "500 internal unknown"
		if len(s.answers) > 0 {
			answer, s.answers = s.answers[0], s.answers[1:]
		}
		s.mu.Unlock()
		if answer == "hang up" {
			panic(http.ErrAbortHandler)
		}
		var status int
		var code, outcome string
		fmt.Sscan(answer, &status, &code, &outcome)
		if status == 429 || status == 503 {
			w.Header().Set("Retry-After", "0")
		}
		w.WriteHeader(status)
		if status >= 400 {
			json.NewEncoder(w).Encode(wire.Error{Error: "because", Code: code, Outcome: outcome, RequestID: "r1", CurrentInflight: 7})
		} else {
			json.NewEncoder(w).Encode(wire.Sent{MessageID: code})
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *scripted) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.asked)
}

func newClient(t *testing.T, patience time.Duration, servers ...*scripted) *Client {
	t.Helper()
	o := Options{Patience: patience}
	for _, s := range servers {
		o.Servers = append(o.Servers, s.URL)
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// TestRetryRules: what did nothing is tried again, what may have happened only where that is safe.
func TestRetryRules(t *testing.T) {
	for _, c := range []struct {
		name    string
		answers []string
		message Message
		id      string
		outcome errs.Outcome
		status  int
		asked   int
	}{
		{"first time", []string{"201 m1"}, Message{}, "m1", "", 0, 1},
		{"refused, then taken", []string{"429 no_leader none", "429 not_leader none", "429 draining none", "429 overloaded none", "201 m1"}, Message{}, "m1", "", 0, 5},
		{"refused for good", []string{"400 invalid_header none"}, Message{}, "", errs.None, 400, 1},
		{"refused until a zone returns", []string{"429 zones_unavailable none"}, Message{}, "", errs.None, 429, 1},
		{"disk full", []string{"429 disk_full none"}, Message{}, "", errs.None, 429, 1},
		{"unknown without a key", []string{"500 outcome_unknown unknown"}, Message{}, "", errs.Unknown, 500, 1},
		{"unknown with a key", []string{"500 outcome_unknown unknown", "504 outcome_unknown unknown", "201 m2"}, Message{Key: "k"}, "m2", "", 0, 3},
		{"hung up without a key", []string{"hang up"}, Message{}, "", errs.Unknown, 0, 1},
		{"hung up with a key", []string{"hang up", "201 m2"}, Message{Key: "k"}, "m2", "", 0, 2},
		{"unknown with a key, then refused for good", []string{"500 outcome_unknown unknown", "400 invalid_header none"}, Message{Key: "k"}, "", errs.None, 400, 2},
		{"a proxy that knows no codes", []string{"503", "201 m1"}, Message{}, "m1", "", 0, 2},
		{"a proxy without a server", []string{"502"}, Message{}, "", errs.Unknown, 502, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := script(t, c.answers...)
			client := newClient(t, time.Minute, s)
			id, _, err := client.Send(t.Context(), "t", c.message, Default)
			if id != c.id || s.count() != c.asked {
				t.Errorf("id %q after %d requests, want %q after %d", id, s.count(), c.id, c.asked)
			}
			e, _ := errors.AsType[*Error](err)
			if c.outcome == "" {
				if err != nil {
					t.Errorf("error %v", err)
				}
				return
			}
			if e == nil || e.Outcome != c.outcome || e.Status != c.status {
				t.Errorf("error %+v", e)
			}
		})
	}
}

// TestHandshake: when TLS comes to nothing then nothing was done, trying again does not help, and the hint names the way out.
func TestHandshake(t *testing.T) {
	handler := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a request came through") })
	quiet := func(s *httptest.Server) *httptest.Server {
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		t.Cleanup(s.Close)
		return s
	}
	plain, secure := quiet(httptest.NewUnstartedServer(handler)), quiet(httptest.NewUnstartedServer(handler))
	plain.Start()
	// By TLS 1.3 the refusal may come when the request is on its way, and be lost with the connection.
	secure.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: x509.NewCertPool(), MaxVersion: tls.VersionTLS12}
	secure.StartTLS()
	trusting := secure.Client().Transport.(*http.Transport).TLSClientConfig
	trusting.Certificates = secure.TLS.Certificates // which nobody signed that the server trusts
	for _, c := range []struct {
		url, hint string
		tls       *tls.Config
	}{
		{secure.URL, "--ca", nil},
		{secure.URL, "--cert", trusting},
		{strings.Replace(plain.URL, "http:", "https:", 1), "http://", nil},
	} {
		client, err := New(Options{Servers: []string{c.url, c.url}, Patience: time.Second, TLS: c.tls})
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = client.Send(t.Context(), "t", Message{Key: "k"}, Default)
		client.Close()
		if e, ok := errors.AsType[*Error](err); !ok || e.Outcome != errs.None || !strings.Contains(e.Hint, c.hint) {
			t.Errorf("%s: %v, %+v", c.hint, err, e)
		}
	}
}

// Once an attempt may have been carried out, a later refusal does not undo that.
func TestUnknownStaysUnknown(t *testing.T) {
	s := script(t, "500 outcome_unknown unknown", "429 no_leader none")
	client := newClient(t, time.Nanosecond, s)
	// The patience is over after the first pause, so a second server is what gets the second attempt.
	s2 := script(t, "429 no_leader none")
	client.bases = append(client.bases, newClient(t, 0, s2).bases...)
	_, _, err := client.Send(t.Context(), "t", Message{Key: "k"}, Default)
	e, ok := errors.AsType[*Error](err)
	if !ok || e.Outcome != errs.Unknown || s.count() != 1 || s2.count() != 1 {
		t.Errorf("error %+v after %d and %d requests", e, s.count(), s2.count())
	}
}

// TestFollowsServers: a server that cannot be reached, or that sends its clients away, is left for the next one.
func TestFollowsServers(t *testing.T) {
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	draining := script(t, "503 draining none")
	good := script(t, "201 m1", "201 m2")
	c, err := New(Options{Servers: []string{dead.Addr().String(), draining.URL, good.URL + "/"}, Patience: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, want := range []string{"m1", "m2"} {
		if id, _, err := c.Send(t.Context(), "t", Message{}, Default); id != want || err != nil {
			t.Errorf("%q %v", id, err)
		}
	}
	if draining.count() != 1 || good.count() != 2 || c.Server() != good.URL {
		t.Errorf("%d and %d requests, now at %s", draining.count(), good.count(), c.Server())
	}
}

// An acknowledgement may be repeated: that the message is gone then is what was wanted.
func TestAcknowledgeTwice(t *testing.T) {
	s := script(t, "hang up", "404 message_not_found none")
	if err := newClient(t, time.Minute, s).Acknowledge(t.Context(), "t", "g", "a/b"); err != nil {
		t.Errorf("after a lost answer: %v", err)
	}
	if want := "DELETE /api/v3/topic/t/consumer/g/lease/a%2Fb "; s.asked[0] != want {
		t.Errorf("asked %q", s.asked[0])
	}
	s = script(t, "404 message_not_found none")
	err := newClient(t, time.Minute, s).Acknowledge(t.Context(), "t", "g", "r")
	if !errors.Is(err, errs.Of(errs.MessageNotFound)) {
		t.Errorf("the first time: %v", err)
	}
}

func TestErrorFields(t *testing.T) {
	s := script(t, "429 concurrency_limit none")
	_, err := newClient(t, time.Minute, s).Receive(t.Context(), "t", "g", ReceiveOptions{})
	e, ok := errors.AsType[*Error](err)
	if !ok || e.Code != "concurrency_limit" || e.Message != "because" || e.RequestID != "r1" || e.Body.CurrentInflight != 7 || e.Server != s.URL {
		t.Errorf("%+v", e)
	}
	if s.count() != 1 {
		t.Errorf("%d requests", s.count())
	}
}

func TestContextEnds(t *testing.T) {
	s := script(t, "429 no_leader none")
	s.mu.Lock()
	for range 1000 {
		s.answers = append(s.answers, "429 no_leader none")
	}
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, _, err := newClient(t, time.Hour, s).Send(ctx, "t", Message{}, Default)
	if e, ok := errors.AsType[*Error](err); !ok || e.Outcome != errs.None && e.Outcome != errs.Unknown {
		t.Errorf("%v", err)
	}
	if err == nil {
		t.Error("a send that nobody took succeeded")
	}
}

func TestServerAddresses(t *testing.T) {
	for _, bad := range []string{"", "ftp://a", "http://", ":::", "unix:///x"} {
		if _, err := New(Options{Servers: []string{bad}}); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
	c, err := New(Options{Servers: []string{"https://queue.example.com/prefix/"}})
	if err != nil || c.Server() != "https://queue.example.com/prefix" {
		t.Errorf("%v %v", c.Server(), err)
	}
	if _, err := New(Options{}); err == nil {
		t.Error("no server was accepted")
	}
}
