package push

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"tercet.dev/tercet/server/wire"
)

// The example of the Standard Webhooks libraries.
func TestSignature(t *testing.T) {
	key, err := secretKey("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
	if err != nil {
		t.Fatal(err)
	}
	const want = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
	if got := sign([][]byte{key}, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, []byte(`{"test": 2432232314}`)); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if _, err := secretKey(newSecret()); err != nil {
		t.Error(err)
	}
}

func TestGuard(t *testing.T) {
	allow, err := ParseAllow([]string{"10.1.0.0/16", "fd00:1::/32", "127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	g := &Guard{Allow: allow, Own: func() []netip.AddrPort {
		return []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:7301"), netip.MustParseAddrPort("10.1.0.9:7400")}
	}}
	for _, c := range []struct {
		addr  string
		plain bool // allowed without TLS
		tls   bool
	}{
		{"93.184.216.34:443", false, true}, {"93.184.216.34:80", false, true}, {"93.184.216.34:8443", false, true}, {"93.184.216.34:25", false, false},
		{"[2606:2800:220:1::1]:443", false, true}, {"10.1.2.3:3000", true, true}, {"10.1.2.3:22", false, false}, {"10.2.0.1:443", false, false},
		{"127.0.0.1:3000", true, true}, {"127.0.0.2:3000", false, false}, {"127.0.0.1:7301", false, false}, {"[::1]:7301", false, false}, {"10.1.0.9:7400", false, false},
		{"192.168.1.1:443", false, false}, {"172.16.0.1:443", false, false}, {"169.254.169.254:80", false, false}, {"100.64.0.1:443", false, false},
		{"0.0.0.0:443", false, false}, {"0.1.2.3:443", false, false}, {"224.0.0.1:443", false, false}, {"255.255.255.255:443", false, false}, {"240.0.0.1:443", false, false},
		{"198.18.0.1:443", false, false}, {"192.0.2.1:443", false, false}, {"[::]:443", false, false}, {"[::1]:443", false, false}, {"[fe80::1]:443", false, false},
		{"[fe80::1%eth0]:443", false, false}, {"[fd00::1]:443", false, false}, {"[fd00:1::1]:443", true, true}, {"[fc00::1]:443", false, false}, {"[ff02::1]:443", false, false},
		{"[::ffff:10.0.0.1]:443", false, false}, {"[::ffff:10.1.0.1]:443", true, true}, {"[::10.0.0.1]:443", false, false}, {"[64:ff9b::a00:1]:443", false, false},
		{"[2002:a00:1::1]:443", false, false}, {"[2001:0:1::1]:443", false, false}, {"[2001:db8::1]:443", false, false}, {"[fec0::1]:443", false, false},
	} {
		addr := netip.MustParseAddrPort(c.addr)
		if err := g.Check(addr, true); (err == nil) != c.tls {
			t.Errorf("%s with TLS: %v", c.addr, err)
		}
		if err := g.Check(addr, false); (err == nil) != c.plain {
			t.Errorf("%s without TLS: %v", c.addr, err)
		}
	}
	if _, err := ParseAllow([]string{"10.0.0.0/40"}); err == nil {
		t.Error("10.0.0.0/40 is a network")
	}
}

func FuzzCheckURL(f *testing.F) {
	for _, s := range []string{"https://example.com/a?b=c", "http://[::1%25eth0]:80/", "https://0x7f.1/", "https://2130706433/", "https://127.1/", "https://①②⑦.0.0.1/"} {
		f.Add(s)
	}
	g := &Guard{}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := g.CheckURL(s)
		if err != nil {
			return
		}
		if u.Scheme != "https" || u.Hostname() == "" || u.User != nil {
			t.Errorf("%q was accepted as %v", s, u)
		}
		if a, err := netip.ParseAddr(u.Hostname()); err == nil && private(a.WithZone("").Unmap()) != "" {
			t.Errorf("%q was accepted", s)
		}
	})
}

func TestRetryAfterHeader(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"": 0, "7": 7 * time.Second, "0": 0, "-1": 0, "1.5": 0, "Fri, 02 Jan 2026 03:05:05 GMT": time.Minute, "Fri, 02 Jan 2026 03:00:00 GMT": 0, "soon": 0,
	} {
		if got := retryAfter(value, now); got != want {
			t.Errorf("%q: %v, want %v", value, got, want)
		}
	}
}

// TestJudge: 429 and 502 to 504 say that the endpoint has too much, and so does no answer. Every other answer, 500 above
// all, is a word on the message and no reason to stop pushing.
func TestJudge(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for status := 200; status < 600; status++ {
		a := judge(&http.Response{StatusCode: status, Header: http.Header{"Retry-After": {"7"}}, Body: io.NopCloser(strings.NewReader("text"))}, nil, now)
		want, pause := served, time.Duration(0)
		switch status {
		case 429, 502, 503, 504:
			want, pause = overloaded, 7*time.Second
		}
		if a.verdict != want || a.pause != pause || (a.reason == "") != (status < 300) {
			t.Errorf("%d is judged %+v", status, a)
		}
	}
	for kind, err := range map[string]error{
		"timeout":    &url.Error{Op: "Post", URL: "http://x", Err: context.DeadlineExceeded},
		"connection": &url.Error{Op: "Post", URL: "http://x", Err: &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}},
	} {
		if a := judge(nil, err, now); a.verdict != overloaded || a.kind != kind || a.reason == "" {
			t.Errorf("%v is judged %+v", err, a)
		}
	}
	if a := judge(nil, os.ErrDeadlineExceeded, now); a.verdict != overloaded || a.kind != "timeout" {
		t.Errorf("a deadline of the connection is judged %+v", a)
	}
}

func TestReasonIsOneCleanLine(t *testing.T) {
	for in, want := range map[string]string{
		" a\r\nb\tc\x00\x1b[31m ": "a  b c[31m", strings.Repeat("é", 200): strings.Repeat("é", 100) + "…", "\xff\xfe": "",
	} {
		if got := clean([]byte(in)); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	if a := judgeError(&BlockedError{Reason: "x"}); a.kind != "blocked" || a.verdict != overloaded {
		t.Errorf("%+v", a)
	}
	if a := judgeError(errors.New("connection reset")); a.kind != "connection" || a.reason != "connection reset" {
		t.Errorf("%+v", a)
	}
}

// Names come before prefixes, longer prefixes before shorter; several deployments share a group's bounds.
func TestPlan(t *testing.T) {
	sub := func(topic, group, deployment string, deliveries, concurrency int64) *Subscription {
		return &Subscription{ID: SubscriptionID(topic, group, deployment), Topic: topic, Group: group, Deployment: deployment, MaxDeliveries: deliveries, MaxConcurrency: concurrency}
	}
	all, orders, own := sub("*", "g", "", 0, 0), sub("order-*", "g", "", 3, 5), sub("order-1", "g", "", 2, 1)
	blue, other := sub("order-1", "g", "blue", 9, 4), sub("order-1", "h", "", 0, 0)
	p := makePlan([]*Subscription{all, orders, own, blue, other}, map[string][]string{"": {"order-1", "order-2", "x"}, "order-": {"order-1", "order-2"}})
	for s, want := range map[*Subscription][]string{all: {"x"}, orders: {"order-2"}, own: {"order-1"}, blue: {"order-1"}, other: {"order-1"}} {
		if got := p.topics[s.ID]; !reflect.DeepEqual(got, want) {
			t.Errorf("%s of %q has %v, want %v", s.Topic, s.Deployment, got, want)
		}
	}
	if g := p.settings[groupKey{"order-1", "g"}]; g.maxDeliveries != 9 || g.maxConcurrency != 5 {
		t.Errorf("%+v", g)
	}
	if g := p.settings[groupKey{"x", "g"}]; g.maxDeliveries != 0 || g.maxConcurrency != 0 {
		t.Errorf("%+v", g)
	}
}

// The OpenAPI document has the members of the documents, and no others.
func TestOpenAPI(t *testing.T) {
	var doc struct {
		Components struct {
			Schemas map[string]struct{ Properties map[string]any }
		}
	}
	if err := yaml.Unmarshal(openAPI, &doc); err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string]any{
		"Subscription": wire.Subscription{}, "SubscriptionState": wire.SubscriptionState{}, "Subscriptions": wire.Subscriptions{},
		"RotateSecret": wire.RotateSecret{}, "DeploymentDrain": wire.DeploymentDrain{}, "DrainGroup": wire.DrainGroup{},
	} {
		have := doc.Components.Schemas[name].Properties
		typ := reflect.TypeOf(v)
		for i := range typ.NumField() {
			member, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			if _, ok := have[member]; !ok {
				t.Errorf("%s lacks %s", name, member)
			}
			delete(have, member)
		}
		for member := range have {
			t.Errorf("%s has %s, which the program has not", name, member)
		}
	}
}
