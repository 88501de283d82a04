package main

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"

	"tercet.dev/tercet/server"
	"tercet.dev/tercet/server/wire"
)

// A node that has not started answers: it lives, is not ready, and has done nothing. Then the same listeners serve on.
func TestForming(t *testing.T) {
	listeners, err := server.Listen(t.Context(), ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll(listeners)
	stop := serveForming(listeners, nil, hclog.NewNullLogger())
	defer stop()
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	get := func(method, url string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	for _, l := range listeners {
		base := "http://" + l.Addr().String()
		if code, body := get(http.MethodGet, base+"/livez"); code != 200 || body != "ok\n" {
			t.Errorf("/livez: %d %q", code, body)
		}
		if code, _ := get(http.MethodGet, base+"/readyz"); code != 503 {
			t.Errorf("/readyz: %d", code)
		}
		code, body := get(http.MethodPost, base+"/api/v3/topic/orders")
		var e wire.Error
		if err := json.Unmarshal([]byte(body), &e); err != nil || code != 429 || e.Code != "no_leader" || e.Outcome != "none" {
			t.Errorf("send: %d %q, %v", code, body, err)
		}
	}
	stop()
	next := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "started") })}
	for _, l := range listeners {
		go func() { _ = next.Serve(l) }()
		if code, body := get(http.MethodGet, "http://"+l.Addr().String()+"/readyz"); code != 200 || body != "started" {
			t.Errorf("after the start: %d %q", code, body)
		}
	}
	_ = next.Close()
}
