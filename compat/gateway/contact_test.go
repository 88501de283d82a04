package gateway

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/compat/internal/redistest"
	"tercet.dev/tercet/server"
)

// TestContact sends the template's three requests as they stand in its README.
func TestContact(t *testing.T) {
	r := redistest.Start(t)
	a := openContact(t, Options{Target: Target{Addr: r.Addr()}}, server.ContactOptions{Timeout: time.Hour})

	produce := func(body string) answer {
		return a.call("POST", "/api/messages/produce", body, "Content-Type", "application/json")
	}
	var made struct{ MessageID, Timestamp string }
	got := a.status(201, produce(`{"name": "John Doe", "email": "john@example.com", "message": "Hello!"}`))
	if err := json.Unmarshal([]byte(got.body), &made); err != nil || made.MessageID == "" || made.Timestamp == "" {
		t.Fatalf("%s %v", got.body, err)
	}
	a.status(201, produce(`{"name": "Jane", "email": "j@example.com", "message": "Two", "extra": 1}`))
	for _, bad := range []string{`{"name": "x", "email": "y"}`, `{"name": "x", "email": "y", "message": ""}`, `{`, ``, `{"name": 1, "email": "y", "message": "z"}`} {
		if got := a.status(400, produce(bad)); !strings.Contains(got.body, `"error"`) {
			t.Errorf("%s: %s", bad, got.body)
		}
	}
	consumeFrom := func(a *api, query string) string {
		return a.status(200, a.call("GET", "/api/messages/consume"+query, "")).body
	}
	consume := func(query string) string { return consumeFrom(a, query) }
	want := fmt.Sprintf(`{"message":{"messageId":%q,"name":"John Doe","email":"john@example.com","message":"Hello!","timestamp":%q,"deliveryCount":1}}`, made.MessageID, made.Timestamp)
	for range 3 {
		if got := consume(""); got != want {
			t.Errorf("consumed %s\nwant     %s", got, want)
		}
	}
	if got := consume("?consumer=second"); !strings.Contains(got, "Jane") {
		t.Errorf("another reviewer sees %s", got)
	}
	if got := consume("?consumer=third"); got != `{"message":null}` {
		t.Errorf("a third reviewer sees %s", got)
	}
	// What was held too long, which for this gateway is no time at all, goes to whoever asks next.
	hasty := openContact(t, Options{Target: Target{Addr: r.Addr()}}, server.ContactOptions{Timeout: time.Millisecond})
	redistest.Until(t, 10*time.Second, "the time-out", func() error {
		if got := consumeFrom(hasty, "?consumer=fourth"); !strings.Contains(got, `"deliveryCount":2`) {
			return fmt.Errorf("%s", got)
		}
		return nil
	})
	acknowledge := func(id string) string {
		return a.status(200, a.call("POST", "/api/messages/acknowledge", `{"messageId": "`+id+`"}`, "Content-Type", "application/json")).body
	}
	if got := acknowledge(made.MessageID); got != `{"success":true,"acknowledged":1}` {
		t.Errorf("acknowledged: %s", got)
	}
	for _, id := range []string{made.MessageID, "1234567890123-0", "nonsense"} {
		if got := acknowledge(id); got != `{"success":true,"acknowledged":0}` {
			t.Errorf("acknowledged %s: %s", id, got)
		}
	}
	a.status(400, a.call("POST", "/api/messages/acknowledge", `{}`))
	a.status(405, a.call("GET", "/api/messages/produce", ""))
	a.status(404, a.call("GET", "/api/messages/other", ""))
	a.status(400, a.call("GET", "/api/messages/consume?consumer=a%20b", ""))
}
