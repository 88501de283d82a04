package gateway

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"go.uber.org/goleak"

	"tercet.dev/tercet/server"
)

func TestMain(m *testing.M) {
	// The client refreshes its view of a cluster at most once a second, and sleeps through Close.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/valkey-io/valkey-go.(*call).DelayDo.func1"))
}

// open opens a gateway on the target with an HTTP server in front of it.
func open(t *testing.T, o Options) *api {
	t.Helper()
	return openContact(t, o, server.ContactOptions{})
}

func openContact(t *testing.T, o Options, contact server.ContactOptions) *api {
	t.Helper()
	o.Logger = hclog.New(&hclog.LoggerOptions{Output: testWriter{t}, Level: hclog.Info})
	g, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	s, err := server.New(server.Options{Backend: g, Contact: g.Contact(contact), Worth: g.Report().Level.String()})
	if err != nil {
		t.Fatal(err)
	}
	h := httptest.NewServer(s)
	a := &api{t: t, g: g, url: h.URL, client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}}
	t.Cleanup(func() {
		s.Drain()
		g.Close()
		h.Close()
		s.Close()
		a.client.CloseIdleConnections()
	})
	return a
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimRight(string(b), "\n"))
	return len(b), nil
}

// api calls the queue protocol.
type api struct {
	t      *testing.T
	g      *Gateway
	url    string
	client *http.Client
}

// answer is an HTTP answer.
type answer struct {
	status int
	head   http.Header
	body   string
}

func (a *api) try(ctx context.Context, method, path, body string, headers ...string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, method, a.url+path, bytes.NewReader([]byte(body)))
	if err != nil {
		return answer{}, err
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	res, err := a.client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header, string(b)}, err
}

func (a *api) call(method, path, body string, headers ...string) answer {
	a.t.Helper()
	r, err := a.try(a.t.Context(), method, path, body, headers...)
	if err != nil {
		a.t.Fatal(err)
	}
	return r
}
