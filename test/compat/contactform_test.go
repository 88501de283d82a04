package compat

import (
	"bytes"
	"encoding/json"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

const contactForm = "../../examples/contact-form"

// buildContactForm installs and builds the example unless it is built from what is there.
func buildContactForm(t *testing.T) {
	t.Helper()
	npmInstallIn(t, contactForm)
	built, err := os.Stat(filepath.Join(contactForm, ".next/BUILD_ID"))
	if err == nil {
		err = filepath.WalkDir(contactForm, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case d.IsDir() && (d.Name() == "node_modules" || d.Name() == ".next" || d.Name() == "e2e"):
				return fs.SkipDir
			case d.IsDir():
				return nil
			}
			info, err := d.Info()
			if err == nil && info.ModTime().After(built.ModTime()) {
				err = fs.ErrNotExist // as if it had not been built
			}
			return err
		})
	}
	if err == nil {
		return
	}
	run(t, contactForm, []string{"NEXT_TELEMETRY_DISABLED=1"}, "npm", "run", "build")
}

// serveContactForm starts the example's server with this node as its endpoint and returns its address.
func serveContactForm(t *testing.T, endpoint string, env ...string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	env = append(env, "PORT="+port, "VALKEY_ENDPOINT="+endpoint, "NODE_ENV=production", "NEXT_TELEMETRY_DISABLED=1")
	p := harness.StartProcess(t, filepath.Join(t.TempDir(), "app.log"), contactForm, env, "node", "node_modules/next/dist/bin/next", "start")
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the application says:\n%s", p.Log())
		}
	})
	harness.Until(t, 60*time.Second, "the application", func() error {
		if !p.Alive() {
			t.Fatalf("the application ended:\n%s", p.Log())
		}
		c, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err == nil {
			c.Close()
		}
		return err
	})
	return "http://127.0.0.1:" + port
}

// TestContactForm builds the example, clicks it through in a headless browser while the leader is killed under it, and
// holds its three routes against what they promise.
func TestContactForm(t *testing.T) {
	browser, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("this test needs Debian's chromium: %v; see `make deps`", err)
	}
	c := harness.Start(t, harness.Options{})
	buildContactForm(t)
	followers, _ := c.Followers()
	app := serveContactForm(t, followers[0].Valkey, "REVIEW_TIMEOUT_MS=1000000")
	env := []string{"APP_URL=" + app, "CHROMIUM=" + browser, "DURING=" + control(t, c) + "/kill-leader", "SCREENSHOTS=" + os.Getenv("TERCET_TEST_SCREENSHOTS")}
	out := run(t, contactForm, env, "node", "e2e/click.mjs")
	if !strings.Contains(out, "clicked through: ") {
		t.Fatalf("the script did not come to its end:\n%s", out)
	}

	// The same by hand, with what the pages never send; the leader has been killed and has come back meanwhile.
	c.WaitInSync(c.Zones()...)
	defer http.DefaultClient.CloseIdleConnections()
	call := func(base, method, path, body string, want int) string {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, base+"/api/messages/"+path, bytes.NewBufferString(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != want {
			t.Fatalf("%s %s: %s %s, %v", method, path, resp.Status, text, err)
		}
		return string(text)
	}
	type delivery struct {
		Message *struct {
			ID            string `json:"messageId"`
			Name          string `json:"name"`
			DeliveryCount int    `json:"deliveryCount"`
		} `json:"message"`
	}
	consume := func(base, consumer string) (d delivery) {
		t.Helper()
		if err := json.Unmarshal([]byte(call(base, "GET", "consume?consumer="+consumer, "", 200)), &d); err != nil {
			t.Fatal(err)
		}
		return d
	}
	for _, body := range []string{`{"name":"Ada","email":"ada@example.com"}`, `{"name":"","email":"e","message":"m"}`, `{"name":1,"email":"e","message":"m"}`, `no JSON`, `null`} {
		if text := call(app, "POST", "produce", body, 400); !strings.Contains(text, `"error"`) {
			t.Errorf("produce %s: %s", body, text)
		}
	}
	if text := call(app, "POST", "acknowledge", `{}`, 400); !strings.Contains(text, `"error"`) {
		t.Errorf("acknowledge nothing: %s", text)
	}
	if text := call(app, "POST", "acknowledge", `{"messageId":"5-5"}`, 200); text != `{"success":true,"acknowledged":0}` {
		t.Errorf("acknowledge an unknown ID: %s", text)
	}
	call(app, "POST", "produce", `{"name":"Dan","email":"dan@example.com","message":"m"}`, 201)
	held := consume(app, "one")
	if held.Message == nil || held.Message.Name != "Dan" || held.Message.DeliveryCount != 1 {
		t.Fatalf("consume: %+v", held.Message)
	}
	if d := consume(app, "two"); d.Message != nil {
		t.Errorf("two reviewers have %+v", d.Message)
	}

	// A second process of the application, which waits for nobody: it takes over what another reviewer holds.
	hasty := serveContactForm(t, followers[1].Valkey, "REVIEW_TIMEOUT_MS=1")
	harness.Until(t, 20*time.Second, "the second reviewer to take over", func() error {
		d := consume(hasty, "two")
		if d.Message == nil || d.Message.ID != held.Message.ID || d.Message.DeliveryCount < 2 {
			return errNotYet
		}
		return nil
	})
	if d := consume(app, "one"); d.Message != nil {
		t.Errorf("the first reviewer still has %+v", d.Message)
	}
	if text := call(app, "POST", "acknowledge", `{"messageId":"`+held.Message.ID+`"}`, 200); text != `{"success":true,"acknowledged":1}` {
		t.Errorf("acknowledge: %s", text)
	}

	// Somebody deletes the stream: the group is made again, and without a queue nothing is claimed.
	run(t, "", nil, "redis-cli", "-u", "redis://"+followers[0].Valkey, "DEL", "contact-messages")
	if d := consume(app, "one"); d.Message != nil {
		t.Errorf("after DEL: %+v", d.Message)
	}
	for _, n := range c.Nodes {
		n.Kill()
	}
	if text := call(app, "POST", "produce", `{"name":"n","email":"e","message":"m"}`, 503); !strings.Contains(text, `"error"`) {
		t.Errorf("produce without a queue: %s", text)
	}
}
