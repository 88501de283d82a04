package e2e

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// TestContactRoutes sends the requests of the contact-form template's README to the nodes of a cluster, each to another
// one, through the death of the leader.
func TestContactRoutes(t *testing.T) {
	// How long a message may be held is up to the node that is asked: the last one has no patience.
	c := harness.Start(t, harness.Options{NodeArgs: func(id string) []string {
		return []string{"--contact-timeout", map[bool]string{true: "1s", false: "1h"}[id == "n3"]}
	}})
	hasty := c.Node("n3")
	defer http.DefaultClient.CloseIdleConnections()
	call := func(n *harness.Node, method, path, body string) (int, string) {
		t.Helper()
		var status int
		var text string
		harness.Until(t, 20*time.Second, method+" "+path, func() error {
			req, err := http.NewRequestWithContext(t.Context(), method, n.URL()+path, strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-type", "application/json")
			r, err := http.DefaultClient.Do(req)
			if err != nil {
				return err
			}
			defer r.Body.Close()
			b, err := io.ReadAll(r.Body)
			if r.StatusCode == http.StatusServiceUnavailable || r.StatusCode == http.StatusTooManyRequests {
				return errNotYet
			}
			status, text = r.StatusCode, string(b)
			return err
		})
		return status, text
	}
	type delivery struct {
		Message *struct {
			ID            string `json:"messageId"`
			Name          string `json:"name"`
			DeliveryCount int    `json:"deliveryCount"`
		} `json:"message"`
	}
	consume := func(n *harness.Node, query string) delivery {
		t.Helper()
		status, text := call(n, "GET", "/api/messages/consume"+query, "")
		var d delivery
		if err := json.Unmarshal([]byte(text), &d); err != nil || status != http.StatusOK {
			t.Fatalf("consume: %d %s", status, text)
		}
		return d
	}
	if d := consume(c.Nodes[0], ""); d.Message != nil {
		t.Fatalf("an empty stream gives %+v", d.Message)
	}
	status, text := call(c.Nodes[1], "POST", "/api/messages/produce", `{"name": "John Doe", "email": "john@example.com", "message": "Hello!"}`)
	var made struct{ MessageID, Timestamp string }
	if err := json.Unmarshal([]byte(text), &made); err != nil || status != http.StatusCreated || made.MessageID == "" || made.Timestamp == "" {
		t.Fatalf("produce: %d %s", status, text)
	}
	if status, text := call(c.Nodes[1], "POST", "/api/messages/produce", `{"name": "John Doe"}`); status != http.StatusBadRequest || !strings.Contains(text, `"error"`) {
		t.Errorf("produce without fields: %d %s", status, text)
	}
	for i, n := range []*harness.Node{c.Nodes[0], c.Nodes[1], c.Nodes[0]} {
		d := consume(n, "")
		if d.Message == nil || d.Message.ID != made.MessageID || d.Message.DeliveryCount != 1 {
			t.Fatalf("look %d: %+v", i, d.Message)
		}
	}
	if d := consume(c.Nodes[1], "?consumer=second"); d.Message != nil {
		t.Errorf("a second reviewer has %+v", d.Message)
	}
	leader := c.Leader()
	leader.Kill()
	followers, _ := c.Followers()
	if hasty == leader {
		hasty.Start()
	}
	harness.Until(t, 20*time.Second, "the time-out", func() error {
		d := consume(hasty, "?consumer=third")
		if d.Message == nil || d.Message.ID != made.MessageID || d.Message.DeliveryCount < 2 {
			return errNotYet
		}
		return nil
	})
	ack := `{"messageId": "` + made.MessageID + `"}`
	if _, text := call(followers[0], "POST", "/api/messages/acknowledge", ack); text != `{"success":true,"acknowledged":1}` {
		t.Errorf("acknowledge: %s", text)
	}
	for _, body := range []string{ack, `{"messageId": "1234567890123-0"}`} {
		if _, text := call(followers[0], "POST", "/api/messages/acknowledge", body); text != `{"success":true,"acknowledged":0}` {
			t.Errorf("acknowledge again: %s", text)
		}
	}
}
