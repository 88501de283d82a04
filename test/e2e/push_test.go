package e2e

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

// pushArgs let a node push to endpoints on this machine.
var pushArgs = []string{"--push-allow", "127.0.0.0/8,::1/128", "--virtual-clock"}

// pushSecret signs the pushes of these tests.
var pushSecret = "whsec_" + base64.StdEncoding.EncodeToString([]byte("a secret of thirty-two bytes....."[:32]))

// subscription is what tests look at of the document.
type subscription struct {
	ID     string `json:"id"`
	Topic  string `json:"topic"`
	Group  string `json:"consumerGroup"`
	URL    string `json:"url"`
	Change string `json:"change"`
	State  *struct {
		State     string `json:"state"`
		Breaker   string `json:"breaker"`
		Inflight  int    `json:"inflight"`
		Requests  uint64 `json:"requests"`
		LastError string `json:"lastError"`
	} `json:"state"`
}

// subscribe creates a subscription and fails the test unless it is there then.
func subscribe(t *testing.T, c *harness.Client, members map[string]any) subscription {
	t.Helper()
	body, err := json.Marshal(members)
	if err != nil {
		t.Fatal(err)
	}
	var s subscription
	a := c.Do(t.Context(), http.MethodPost, "/v1/subscriptions", map[string]string{"Content-Type": "application/json"}, bytes.NewReader(body))
	if a.Status != http.StatusCreated || json.Unmarshal(a.Body, &s) != nil || s.ID == "" {
		t.Fatalf("create a subscription: %v", a)
	}
	return s
}

// advance moves the cluster's clock.
func advance(t *testing.T, c *harness.Client, by time.Duration) {
	t.Helper()
	a := c.Do(t.Context(), http.MethodPost, "/v1/clock/advance", map[string]string{"Content-Type": "application/json"},
		strings.NewReader(fmt.Sprintf(`{"seconds":%d}`, int64(by.Seconds()))))
	if a.Status != http.StatusOK {
		t.Fatalf("advance the clock: %v", a)
	}
}

// groupFigures are a group's, as /v1 shows them.
type groupFigures struct {
	Inflight     int    `json:"inflight"`
	Acknowledged uint64 `json:"acknowledged"`
}

func figures(t *testing.T, c *harness.Client, topic, group string) groupFigures {
	t.Helper()
	var g groupFigures
	if a := c.Do(t.Context(), http.MethodGet, "/v1/topics/"+topic+"/groups/"+group, nil, nil); a.Status == http.StatusOK {
		if err := json.Unmarshal(a.Body, &g); err != nil {
			t.Fatal(err)
		}
	}
	return g
}

// An order is what the applications are sent, a report what their handlers tell the test.
type order struct {
	ID      int    `json:"id"`
	FailOn  []int  `json:"failOn,omitempty"`
	Padding string `json:"padding,omitempty"`
}

type report struct {
	Order    order
	Metadata struct {
		MessageID     string
		DeliveryCount int
		TopicName     string
		ConsumerGroup string
		CreatedAt     time.Time
		ExpiresAt     time.Time
	}
}

// reports starts what the handlers report to.
func reports(t *testing.T) (url string, got <-chan report) {
	ch := make(chan report, 1024)
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var rep report
		if err := json.NewDecoder(r.Body).Decode(&rep); err != nil {
			t.Errorf("report: %v", err)
		}
		ch <- rep
	}))
	t.Cleanup(s.Close)
	return s.URL, ch
}

func nextReport(t *testing.T, ch <-chan report) report {
	t.Helper()
	select {
	case r := <-ch:
		return r
	case <-time.After(60 * time.Second):
		t.Fatal("no handler ran")
		return report{}
	}
}

// application copies an example and what the test puts in its place into a folder beside the installed packages.
func application(t *testing.T, name string) string {
	t.Helper()
	for _, program := range []string{"node", "npm"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("this test needs Node.js >= 20.9 with npm: %v; see `make deps`", err)
		}
	}
	check := exec.Command("npm", "ls", "--omit=optional", "@vercel/queue@0.6.0", "next", "express")
	check.Dir = "push"
	if check.Run() != nil {
		install := exec.Command("npm", "install", "--no-save", "--no-audit", "--no-fund", "--loglevel=error")
		install.Dir = "push"
		if text, err := install.CombinedOutput(); err != nil {
			t.Fatalf("npm install: %v\n%s", err, text)
		}
	}
	if err := os.MkdirAll("push/.app", 0o777); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("push/.app", name+"-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	for _, from := range []string{filepath.Join("../../examples", name), filepath.Join("push", name)} {
		err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(from, path)
			if err != nil {
				return err
			}
			if d.IsDir() {
				if d.Name() == "node_modules" || d.Name() == ".next" {
					return fs.SkipDir
				}
				return os.MkdirAll(filepath.Join(dir, rel), 0o777)
			}
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(dir, rel), data, 0o666)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if dir, err = filepath.Abs(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// freePort returns a port nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// serveApplication starts an application and waits until it answers.
func serveApplication(t *testing.T, dir string, env []string, argv ...string) string {
	t.Helper()
	port := freePort(t)
	env = append(env, "PORT="+port, "NODE_ENV=production", "NEXT_TELEMETRY_DISABLED=1")
	p := harness.StartProcess(t, filepath.Join(t.TempDir(), "app.log"), dir, env, argv...)
	base := "http://127.0.0.1:" + port
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
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the application says:\n%s", p.Log())
		}
	})
	return base
}

// TestPushSDK pushes to real applications, Next.js with handleCallback and Express with handleNodeCallback, each with
// the unmodified client in its newest and its oldest release.
func TestPushSDK(t *testing.T) {
	c := harness.Start(t, harness.Options{Args: pushArgs})
	followers, leader := c.Followers()
	reportURL, got := reports(t)
	// The environment of nodes is without TERCET_ variables, which are the applications' here.
	env := []string{"WEBHOOK_SECRET=" + pushSecret, "TEST_REPORT=" + reportURL, "TERCET_URL=" + followers[0].URL()}
	for _, app := range []struct {
		name         string
		build, serve []string
	}{
		{"express", nil, []string{"node", "server.js"}},
		{"nextjs", []string{"node", "../../node_modules/next/dist/bin/next", "build"}, []string{"node", "../../node_modules/next/dist/bin/next", "start", "-H", "127.0.0.1"}},
	} {
		t.Run(app.name, func(t *testing.T) {
			dir := application(t, app.name)
			if app.build != nil {
				build := exec.CommandContext(t.Context(), app.build[0], app.build[1:]...)
				build.Dir = dir
				build.Env = append(append(harness.Environment(), env...), "NODE_ENV=production", "NEXT_TELEMETRY_DISABLED=1")
				if text, err := build.CombinedOutput(); err != nil {
					t.Fatalf("build: %v\n%s", err, text)
				}
			}
			base := serveApplication(t, dir, env, app.serve...)
			for _, route := range []string{"process-order", "oldest"} {
				t.Run(route, func(t *testing.T) {
					pushRoute(t, leader, followers[1], app.name+"-"+route, base+"/api/queues/"+route, got)
				})
			}
			t.Run("retry", func(t *testing.T) {
				pushRetry(t, client(t, leader), app.name+"-retry", base+"/api/queues/retry", got)
			})
			t.Run("unsigned", func(t *testing.T) {
				key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(pushSecret, "whsec_"))
				if err != nil {
					t.Fatal(err)
				}
				signature := func(at time.Time, body string) map[string]string {
					m := hmac.New(sha256.New, key)
					fmt.Fprintf(m, "msg_1.%d.%s", at.Unix(), body)
					return map[string]string{"webhook-id": "msg_1", "webhook-timestamp": fmt.Sprint(at.Unix()), "webhook-signature": "v1," + base64.StdEncoding.EncodeToString(m.Sum(nil))}
				}
				for _, headers := range []map[string]string{
					nil,
					{"webhook-id": "msg_1", "webhook-timestamp": fmt.Sprint(time.Now().Unix()), "webhook-signature": "v1,AAAA"},
					{"webhook-id": "msg_1", "webhook-timestamp": "0", "webhook-signature": ""},
					signature(time.Now(), `{"id":2}`),                 // of another body
					signature(time.Now().Add(-time.Hour), `{"id":1}`), // heard an hour ago and sent again
				} {
					req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, base+"/api/queues/process-order", strings.NewReader(`{"id":1}`))
					if err != nil {
						t.Fatal(err)
					}
					for name, v := range headers {
						req.Header.Set(name, v)
					}
					for name, v := range map[string]string{"ce-type": "com.vercel.queue.v2beta", "ce-vqsqueuename": "t", "ce-vqsconsumergroup": "g", "ce-vqsmessageid": "m",
						"ce-vqsreceipthandle": "r", "content-type": "application/json"} {
						req.Header.Set(name, v)
					}
					res, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
					if err != nil {
						t.Fatal(err)
					}
					res.Body.Close()
					if res.StatusCode != http.StatusUnauthorized {
						t.Errorf("with %v: %s", headers, res.Status)
					}
				}
				select {
				case r := <-got:
					t.Errorf("a handler ran: %+v", r)
				default:
				}
			})
		})
	}
	c.EqualHashes()
}

// pushRoute takes one route through a message's life.
func pushRoute(t *testing.T, leader, other *harness.Node, topic, url string, got <-chan report) {
	via, lead := client(t, other), client(t, leader)
	const group = "process-order"
	subscribe(t, via, map[string]any{"topic": topic, "consumerGroup": group, "url": url, "secret": pushSecret, "retryAfterSeconds": 300})
	acknowledged := uint64(0)
	send := func(o order) string {
		body, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		p := via.Publish(t.Context(), topic, body, map[string]string{"Content-Type": "application/json"})
		if p.Outcome != harness.OK {
			t.Fatalf("publish: %v", p.Answer)
		}
		return p.ID
	}
	done := func() {
		t.Helper()
		acknowledged++
		harness.Until(t, 20*time.Second, "the acknowledgement", func() error {
			if g := figures(t, lead, topic, group); g.Acknowledged != acknowledged || g.Inflight != 0 {
				return fmt.Errorf("%+v, want %d", g, acknowledged)
			}
			return nil
		})
	}
	expect := func(id string, o order, count int) {
		t.Helper()
		r := nextReport(t, got)
		m := r.Metadata
		if r.Order.ID != o.ID || r.Order.Padding != o.Padding || m.MessageID != id || m.DeliveryCount != count || m.TopicName != topic || m.ConsumerGroup != group {
			t.Errorf("the handler got order %d, %d bytes, %+v; want order %d, message %s, delivery %d", r.Order.ID, len(r.Order.Padding), m, o.ID, id, count)
		}
		// The oldest release does not tell its handlers.
		if life := m.ExpiresAt.Sub(m.CreatedAt); !m.ExpiresAt.IsZero() && life != 24*time.Hour {
			t.Errorf("the message lives for %v", life)
		}
	}

	small := order{ID: 1}
	expect(send(small), small, 1)
	done()
	// Too large to travel with its push: the client asks for it by its ID.
	large := order{ID: 2, Padding: strings.Repeat("x", 400<<10)}
	expect(send(large), large, 1)
	done()
	for i, o := range []order{{ID: 3, FailOn: []int{1, 2}}, {ID: 4, FailOn: []int{1, 2}, Padding: large.Padding}} {
		id := send(o)
		for count := 1; count <= 3; count++ {
			expect(id, o, count)
			if count == 3 {
				break
			}
			// Inline, the failed delivery is over at once; asked for by ID, its lease is the client's and runs out (300 s).
			if i == 0 {
				harness.Until(t, 20*time.Second, "the release", func() error {
					if g := figures(t, lead, topic, group); g.Inflight != 0 {
						return fmt.Errorf("%+v", g)
					}
					return nil
				})
			}
			advance(t, lead, 301*time.Second)
		}
		done()
	}
}

// pushRetry has a handler say itself when its message comes again.
func pushRetry(t *testing.T, lead *harness.Client, topic, url string, got <-chan report) {
	subscribe(t, lead, map[string]any{"topic": topic, "consumerGroup": "g", "url": url, "secret": pushSecret, "retryAfterSeconds": 10})
	body := `{"id":9,"failOn":[1]}`
	p := lead.Publish(t.Context(), topic, []byte(body), map[string]string{"Content-Type": "application/json"})
	if p.Outcome != harness.OK {
		t.Fatal(p.Answer)
	}
	if r := nextReport(t, got); r.Metadata.DeliveryCount != 1 {
		t.Errorf("%+v", r)
	}
	// The answer is 200, and the lease now ends in 600 s: nothing is due before.
	harness.Until(t, 20*time.Second, "the answer", func() error {
		var l struct{ Subscriptions []subscription }
		a := lead.Do(t.Context(), http.MethodGet, "/v1/subscriptions?limit=1000", nil, nil)
		if err := json.Unmarshal(a.Body, &l); err != nil {
			return err
		}
		for _, s := range l.Subscriptions {
			if s.Topic == topic && s.State != nil && s.State.Requests == 1 && s.State.Inflight == 0 {
				return nil
			}
		}
		return errors.New("not answered")
	})
	advance(t, lead, 590*time.Second)
	if g := figures(t, lead, topic, "g"); g.Inflight != 1 {
		t.Errorf("after 590 s: %+v", g)
	}
	advance(t, lead, 11*time.Second)
	if r := nextReport(t, got); r.Metadata.DeliveryCount != 2 {
		t.Errorf("%+v", r)
	}
}

// pushes is an endpoint that acknowledges what it is sent, except for what the test holds on to.
type pushes struct {
	*httptest.Server
	mu sync.Mutex
	// seen counts requests by message, at their times.
	seen map[string][]time.Time
	// hold keeps requests waiting while it is set.
	hold    bool
	held    map[string]bool
	release chan struct{}
	ack     *harness.Client
}

func newPushes(t *testing.T, ack *harness.Client) *pushes {
	p := &pushes{seen: map[string][]time.Time{}, held: map[string]bool{}, release: make(chan struct{}), ack: ack}
	p.Server = httptest.NewServer(p)
	t.Cleanup(func() { close(p.release); p.Close() })
	return p
}

// ServeHTTP implements http.Handler.
func (p *pushes) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	id := r.Header.Get("ce-vqsmessageid")
	p.mu.Lock()
	p.seen[id] = append(p.seen[id], time.Now())
	hold := p.hold
	if hold {
		p.held[id] = true
	}
	p.mu.Unlock()
	if hold {
		select {
		case <-p.release:
		case <-r.Context().Done():
		}
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if a := p.ack.Ack(ctx, r.Header.Get("ce-vqsqueuename"), r.Header.Get("ce-vqsconsumergroup"), r.Header.Get("ce-vqsreceipthandle")); a.Outcome != harness.OK {
		w.WriteHeader(http.StatusInternalServerError)
	}
}

func (p *pushes) count(id string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.seen[id])
}

// TestPushFailover kills the leader in the middle of pushing: the next one goes on at once, and what was in flight,
// and only that, comes again when its lease is over.
func TestPushFailover(t *testing.T) {
	c := harness.Start(t, harness.Options{Args: pushArgs})
	followers, leader := c.Followers()
	via := client(t, followers[0])
	app := newPushes(t, via)
	subscribe(t, via, map[string]any{"topic": "orders", "consumerGroup": "g", "url": app.URL})
	const each = 50
	var acked, inflight, after []string
	for i := range each {
		acked = append(acked, publish(t, via, "orders", fmt.Appendf(nil, "%d", i)).ID)
	}
	wait := func(what string, ids []string, n int) {
		t.Helper()
		harness.Until(t, 30*time.Second, what, func() error {
			for _, id := range ids {
				if app.count(id) < n {
					return fmt.Errorf("%s was pushed %d times, want %d", id, app.count(id), n)
				}
			}
			return nil
		})
	}
	wait("the first messages", acked, 1)
	harness.Until(t, 20*time.Second, "acknowledgements", func() error {
		if g := figures(t, via, "orders", "g"); g.Acknowledged != each {
			return fmt.Errorf("%+v", g)
		}
		return nil
	})
	app.mu.Lock()
	app.hold = true
	app.mu.Unlock()
	for i := range 8 {
		inflight = append(inflight, publish(t, via, "orders", fmt.Appendf(nil, "in flight %d", i)).ID)
	}
	wait("the messages in flight", inflight, 1)
	app.mu.Lock()
	app.hold = false
	app.mu.Unlock()

	killed := time.Now()
	leader.Kill()
	for i := range each {
		after = append(after, publish(t, via, "orders", fmt.Appendf(nil, "after %d", i)).ID)
	}
	wait("the messages after the leader was killed", after, 1)
	// Pushed is not acknowledged: the clock must not pass the end of their leases before they are.
	harness.Until(t, 20*time.Second, "their acknowledgements", func() error {
		if g := figures(t, via, "orders", "g"); g.Acknowledged != 2*each {
			return fmt.Errorf("%+v", g)
		}
		return nil
	})
	app.mu.Lock()
	first := time.Time{}
	for _, id := range after {
		if at := app.seen[id][0]; first.IsZero() || at.Before(first) {
			first = at
		}
	}
	app.mu.Unlock()
	t.Logf("the first push after the kill came after %v", first.Sub(killed).Round(time.Millisecond))

	for _, id := range inflight {
		if n := app.count(id); n != 1 {
			t.Errorf("%s was pushed %d times while its lease ran", id, n)
		}
	}
	advance(t, via, 61*time.Second)
	wait("what was in flight", inflight, 2)
	harness.Until(t, 20*time.Second, "acknowledgements", func() error {
		if g := figures(t, via, "orders", "g"); g.Inflight != 0 {
			return fmt.Errorf("%+v", g)
		}
		return nil
	})
	for _, id := range append(acked, after...) {
		if n := app.count(id); n != 1 {
			t.Errorf("%s, which was not in flight, was pushed %d times", id, n)
		}
	}
	leader.Start()
	c.WaitInSync(c.Zones()...)
	c.EqualHashes()
}

// A follower that is killed costs pushes nothing, and a leader that is stopped hands them over.
func TestPushRollingRestart(t *testing.T) {
	c := harness.Start(t, harness.Options{Args: pushArgs})
	_, leader := c.Followers()
	var via []*harness.Client
	for _, n := range c.Nodes {
		via = append(via, client(t, n))
	}
	other := c.Nodes[0]
	if other == leader {
		other = c.Nodes[1]
	}
	app := newPushes(t, client(t, other))
	subscribe(t, via[0], map[string]any{"topic": "order-*", "consumerGroup": "g", "url": app.URL})
	var ids []string
	for i := range 20 {
		ids = append(ids, publish(t, via[0], fmt.Sprintf("order-%d", i%5), []byte("m")).ID)
	}
	leader.Stop()
	up := client(t, other)
	for i := range 20 {
		ids = append(ids, publish(t, up, fmt.Sprintf("order-%d", i%7), []byte("m")).ID)
	}
	harness.Until(t, 30*time.Second, "all messages", func() error {
		for _, id := range ids {
			if app.count(id) == 0 {
				return fmt.Errorf("%s was not pushed", id)
			}
		}
		return nil
	})
	for _, id := range ids {
		if n := app.count(id); n != 1 {
			t.Errorf("%s was pushed %d times", id, n)
		}
	}
}

// TestPushDev has `tercet dev` push to an application as its vercel.json says, and follow the file.
func TestPushDev(t *testing.T) {
	project := t.TempDir()
	file := filepath.Join(project, "vercel.json")
	write := func(route, topic string) {
		t.Helper()
		text := fmt.Sprintf(`{"functions": {"app/(jobs)/api/queues/%s/route.ts": {"experimentalTriggers": [{"type": "queue/v2beta", "topic": %q}]}}}`, route, topic)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("first", "order-*")
	got := make(chan string, 64)
	app := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		got <- r.URL.Path + " " + r.Header.Get("ce-vqsqueuename") + " " + r.Header.Get("ce-vqsconsumergroup")
	}))
	t.Cleanup(app.Close)
	args, httpPort := devArguments(t, filepath.Join(t.TempDir(), "dev"), "-o", "json", "--app", strings.Replace(app.URL, "127.0.0.1", "localhost", 1), "--vercel-json", file)
	dev := startDev(t, args)
	document(t, dev)
	cl := harness.NewClient(fmt.Sprintf("http://127.0.0.1:%d", httpPort))
	t.Cleanup(cl.Close)
	expect := func(want string) {
		t.Helper()
		select {
		case line := <-got:
			if line != want {
				t.Errorf("pushed %q, want %q", line, want)
			}
		case <-time.After(60 * time.Second):
			t.Fatalf("nothing was pushed:\n%s", dev.Log())
		}
	}
	said := func(text string) {
		t.Helper()
		harness.Until(t, 30*time.Second, text, func() error {
			if !strings.Contains(dev.Log(), text) {
				return errNotYet
			}
			return nil
		})
	}
	publish(t, cl, "order-1", []byte("m"))
	expect("/api/queues/first order-1 app_S_28jobs_29_Sapi_Squeues_Sfirst_Sroute_Dts")
	// A mistake leaves things as they are.
	if err := os.WriteFile(file, []byte(`{"functions"`), 0o600); err != nil {
		t.Fatal(err)
	}
	said("the subscriptions stay as they are")
	publish(t, cl, "order-2", []byte("m"))
	expect("/api/queues/first order-2 app_S_28jobs_29_Sapi_Squeues_Sfirst_Sroute_Dts")
	write("second", "jobs")
	said("no longer pushing order-*")
	publish(t, cl, "jobs", []byte("m"))
	expect("/api/queues/second jobs app_S_28jobs_29_Sapi_Squeues_Ssecond_Sroute_Dts")
	if err := dev.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code, err := dev.WaitExit(30 * time.Second); err != nil || code != 0 {
		t.Errorf("tercet dev ended with %d, %v", code, err)
	}
}
