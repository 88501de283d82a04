package server

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden compares text with a golden file. A difference is one that users see.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (go test -update rewrites it). Got:\n%s", path, got)
	}
}

// dump writes an answer the way it looks on the wire, with sorted headers.
func dump(b *bytes.Buffer, res *httptest.ResponseRecorder) {
	fmt.Fprintf(b, "%d %s\n", res.Code, http.StatusText(res.Code))
	var lines []string
	for name, values := range res.Header() {
		for _, v := range values {
			lines = append(lines, name+": "+v)
		}
	}
	slices.Sort(lines)
	fmt.Fprintf(b, "%s\n\n%s\n", strings.Join(lines, "\n"), res.Body)
}

// record has a server handle a request without a network.
func record(t *testing.T, backend Backend, method, path string, body []byte, headers ...string) *httptest.ResponseRecorder {
	t.Helper()
	s, err := New(Options{Backend: backend})
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest(method, "http://127.0.0.1:7301"+path, bytes.NewReader(body))
	r.Header.Set(wire.HeaderRequestID, "golden")
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	s.ServeHTTP(w, r)
	return w
}

// TestErrorBodies shows every error of the catalogue as an answer to a send, which must not be 502 or 503, and to a
// receive.
func TestErrorBodies(t *testing.T) {
	var b bytes.Buffer
	for _, code := range errs.Codes() {
		failing := &fakeBackend{propose: func(ctx context.Context, p raft.Proposal) (raft.Reply, error) {
			return raft.Reply{}, errs.Of(code)
		}}
		sent := record(t, failing, "POST", "/api/v3/topic/orders", []byte("x"))
		if sent.Code == 502 || sent.Code == 503 || sent.Code < 400 {
			t.Errorf("%s: a send is answered %d", code, sent.Code)
		}
		if unknown := code.Info().Outcome == errs.Unknown; unknown != (sent.Code >= 500 && code != errs.Unsupported) {
			t.Errorf("%s: a send with outcome %s is answered %d", code, code.Info().Outcome, sent.Code)
		}
		fmt.Fprintf(&b, "=== send: %s\n", code)
		dump(&b, sent)
		received := record(t, failing, "POST", "/api/v3/topic/orders/consumer/g", nil, "Accept", wire.MediaMultipart)
		if received.Code == sent.Code && bytes.Equal(received.Body.Bytes(), sent.Body.Bytes()) {
			continue
		}
		fmt.Fprintf(&b, "=== receive: %s\n", code)
		dump(&b, received)
	}
	golden(t, "errors.golden", b.Bytes())
}

// TestRefusalBodies shows the refusals of the engine that carry more than their code.
func TestRefusalBodies(t *testing.T) {
	var b bytes.Buffer
	for _, r := range []struct {
		method, path, body string
		result             engine.Result
	}{
		{"POST", "/consumer/g", "", engine.Result{Code: errs.ConcurrencyLimit, Inflight: 7}},
		{"POST", "/consumer/g", "", engine.Result{Code: errs.UnsettledLimit, Inflight: 100000, RetryAfter: 1500 * time.Millisecond}},
		{"POST", "/consumer/g/id/ID", "", engine.Result{Code: errs.Duplicate, Original: engine.MessageID{Index: 9, Pos: 2, Kind: engine.KindPlain}}},
		{"POST", "/consumer/g/id/ID", "", engine.Result{Code: errs.LeasedElsewhere, RetryAfter: 41001 * time.Millisecond}},
		{"POST", "/consumer/g/id/ID", "", engine.Result{Code: errs.NotYetVisible, RetryAfter: time.Hour}},
		{"DELETE", "/consumer/g/lease/RECEIPT", "", engine.Result{Codes: []errs.Code{errs.NotHolder}}},
		{"PATCH", "/consumer/g/lease/RECEIPT", `{"visibilityTimeoutSeconds":60}`, engine.Result{Codes: []errs.Code{errs.ExtendPastExpiry}, ExpiresAt: 1767225600123}},
	} {
		backend := &fakeBackend{propose: func(ctx context.Context, p raft.Proposal) (raft.Reply, error) {
			return raft.Reply{Result: r.result}, nil
		}}
		sealer := engine.NewSealer(fakeSecret)
		path := strings.NewReplacer("ID", sealer.MessageID(engine.MessageID{Index: 8, Kind: engine.KindPlain}), "RECEIPT", sealer.Receipt(engine.Receipt{Topic: 1, Group: 1, Epoch: 1})).Replace(r.path)
		res := record(t, backend, r.method, "/api/v3/topic/orders"+path, []byte(r.body), "Accept", wire.MediaMultipart, wire.HeaderMaxConcurrency, "7")
		text := regexp.MustCompile(`"requestedExpiresAt":"[^"]*"`).ReplaceAll(res.Body.Bytes(), []byte(`"requestedExpiresAt":"NOW + 60 s"`))
		res.Body = bytes.NewBuffer(text)
		res.Header().Del("Content-Length")
		fmt.Fprintf(&b, "=== %s %s\n", r.method, r.path)
		dump(&b, res)
	}
	golden(t, "refusals.golden", b.Bytes())
}

// TestAnswerForms shows one answer in each of the three forms.
func TestAnswerForms(t *testing.T) {
	deliveries := []engine.Delivery{
		{
			ID: engine.MessageID{Index: 8, Pos: 1, Kind: engine.KindPlain}, Receipt: engine.Receipt{Topic: 1, Group: 2, Offset: 3, Epoch: 4}, Count: 1,
			PublishedAt: 1767225600123, ExpiresAt: 1767312000123, ContentType: "application/json",
			Headers: []engine.Header{{Name: "traceparent", Value: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}, {Name: "x-order", Value: `"quoted" \ back`}},
			Body:    []byte(`{"order":1}`),
		},
		{
			ID: engine.MessageID{Index: 8, Pos: 2, Kind: engine.KindPlain}, Receipt: engine.Receipt{Topic: 1, Group: 2, Offset: 4, Epoch: 5}, Count: 1,
			Gone: true, Body: []byte("expired meanwhile: must not be shown"),
		},
		{
			ID: engine.MessageID{Index: 1 << 40, Pos: 99, Kind: engine.KindPlain}, Receipt: engine.Receipt{Topic: 1, Group: 2, Offset: 5, Epoch: 6}, Count: 12,
			PublishedAt: 1767225600000, ContentType: "bad\r\nX-Injected: yes",
			Headers: []engine.Header{{Name: "bad name", Value: "x"}, {Name: "x-bad-value", Value: "a\r\nb: c"}},
		},
	}
	backend := &fakeBackend{propose: func(ctx context.Context, p raft.Proposal) (raft.Reply, error) {
		return raft.Reply{Result: engine.Result{Deliveries: deliveries}}, nil
	}}
	var b bytes.Buffer
	for _, accept := range []string{wire.MediaMultipart, wire.MediaNDJSON, wire.MediaBatch} {
		res := record(t, backend, "POST", "/api/v3/topic/orders/consumer/g", nil, "Accept", accept)
		if _, boundary, ok := strings.Cut(res.Header().Get("Content-Type"), "boundary="); ok {
			res.Header().Set("Content-Type", strings.ReplaceAll(res.Header().Get("Content-Type"), boundary, "BOUNDARY"))
			res.Body = bytes.NewBuffer(bytes.ReplaceAll(res.Body.Bytes(), []byte(boundary), []byte("BOUNDARY")))
		}
		if accept == wire.MediaBatch {
			res.Body = bytes.NewBufferString(fmt.Sprintf("%q", res.Body.String()))
		}
		fmt.Fprintf(&b, "=== %s\n", accept)
		dump(&b, res)
	}
	golden(t, "answers.golden", bytes.ReplaceAll(b.Bytes(), []byte("\r\n"), []byte("␍\n")))
}
