package gateway

import (
	"bufio"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/credentials"

	"tercet.dev/tercet/compat/internal/redistest"
)

// sign computes a SigV4 query signature by the algorithm's published steps, with nothing of the SDK: the canonical
// request, the string to sign, the derived key (AWS Signature Version 4, "Signing AWS API requests").
func sign(host string, query url.Values, secret, region string) string {
	date := query.Get("X-Amz-Date")
	scope := date[:8] + "/" + region + "/elasticache/aws4_request"
	empty := sha256.Sum256(nil)
	canonical := strings.Join([]string{
		"GET", "/", strings.ReplaceAll(query.Encode(), "+", "%20"), "host:" + host, "", "host", hex.EncodeToString(empty[:]),
	}, "\n")
	hashed := sha256.Sum256([]byte(canonical))
	text := strings.Join([]string{"AWS4-HMAC-SHA256", date, scope, hex.EncodeToString(hashed[:])}, "\n")
	mac := func(key []byte, s string) []byte {
		h := hmac.New(sha256.New, key)
		h.Write([]byte(s))
		return h.Sum(nil)
	}
	key := mac(mac(mac(mac([]byte("AWS4"+secret), date[:8]), region), "elasticache"), "aws4_request")
	return hex.EncodeToString(mac(key, text))
}

const (
	accessKey = "AKIDEXAMPLE"
	secretKid = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
)

// TestIAMWithoutCredentials says where they could come from.
func TestIAMWithoutCredentials(t *testing.T) {
	i := &IAM{Cache: "orders", User: "app", Region: "eu-central-1", Credentials: credentials.NewStaticCredentialsProvider("", "", "")}
	if _, err := i.Token(t.Context()); err == nil || !strings.Contains(err.Error(), "set AWS_ACCESS_KEY_ID") {
		t.Errorf("a token without credentials: %v", err)
	}
}

func TestIAMToken(t *testing.T) {
	at := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	for _, session := range []string{"", "session/token+with=signs"} {
		for _, serverless := range []bool{false, true} {
			i := &IAM{Cache: "My-Cache", User: "app", Region: "eu-central-1", Serverless: serverless, Now: func() time.Time { return at },
				Credentials: credentials.NewStaticCredentialsProvider(accessKey, secretKid, session)}
			token, err := i.Token(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(token, "://") || !strings.HasPrefix(token, "my-cache/?") {
				t.Fatalf("token %q: want it to begin with the cache's name in lower case", token)
			}
			query, err := url.ParseQuery(strings.TrimPrefix(token, "my-cache/?"))
			if err != nil {
				t.Fatal(err)
			}
			got := query.Get("X-Amz-Signature")
			query.Del("X-Amz-Signature")
			want := url.Values{
				"Action": {"connect"}, "User": {"app"}, "X-Amz-Expires": {"900"}, "X-Amz-Algorithm": {"AWS4-HMAC-SHA256"},
				"X-Amz-Credential": {accessKey + "/20260304/eu-central-1/elasticache/aws4_request"}, "X-Amz-Date": {"20260304T050607Z"},
				"X-Amz-SignedHeaders": {"host"},
			}
			if serverless {
				want.Set("ResourceType", "ServerlessCache")
			}
			if session != "" {
				want.Set("X-Amz-Security-Token", session)
			}
			if query.Encode() != want.Encode() {
				t.Errorf("query %s\nwant  %s", query.Encode(), want.Encode())
			}
			if signature := sign("my-cache", want, secretKid, "eu-central-1"); got != signature {
				t.Errorf("serverless %v, session %q: signature %s, want %s", serverless, session, got, signature)
			}
		}
	}
}

// iamServer stands before a real server, checks each login as the service does, and passes everything else on.
type iamServer struct {
	t      *testing.T
	l      net.Listener
	behind string
	now    atomic.Int64 // Unix seconds
	logins atomic.Int64
	mu     sync.Mutex
	conns  []net.Conn
	group  sync.WaitGroup
}

func newIAMServer(t *testing.T, behind string) *iamServer {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &iamServer{t: t, l: l, behind: behind}
	s.now.Store(time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC).Unix())
	s.group.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.group.Go(func() { s.serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		s.cut()
		s.group.Wait()
	})
	return s
}

func (s *iamServer) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		c.Close()
	}
	s.conns = nil
}

// check verifies a token, its age included.
func (s *iamServer) check(user, token string) bool {
	s.logins.Add(1)
	host, query, ok := strings.Cut(token, "/?")
	q, err := url.ParseQuery(query)
	if !ok || err != nil || user != "app" || q.Get("User") != user || q.Get("Action") != "connect" || host != "my-cache" {
		return false
	}
	signature := q.Get("X-Amz-Signature")
	q.Del("X-Amz-Signature")
	at, err := time.Parse("20060102T150405Z", q.Get("X-Amz-Date"))
	age := s.now.Load() - at.Unix()
	if err != nil || age < -300 || age > 900 {
		return false
	}
	return subtle.ConstantTimeCompare([]byte(signature), []byte(sign(host, q, secretKid, "eu-central-1"))) == 1
}

func (s *iamServer) serve(c net.Conn) {
	back, err := net.Dial("tcp", s.behind)
	if err != nil {
		c.Close()
		return
	}
	s.mu.Lock()
	s.conns = append(s.conns, c, back)
	s.mu.Unlock()
	s.group.Go(func() {
		io.Copy(c, back)
		c.Close()
	})
	defer back.Close()
	r := bufio.NewReader(c)
	for {
		args, err := readCommand(r)
		if err != nil {
			return
		}
		switch {
		case strings.EqualFold(args[0], "HELLO") && len(args) >= 5 && strings.EqualFold(args[2], "AUTH"):
			if !s.check(args[3], args[4]) {
				args = []string{"AUTH", "nobody", "wrong"} // WRONGPASS in the server's own words
				break
			}
			args = append([]string{"HELLO", args[1]}, args[5:]...)
		case strings.EqualFold(args[0], "AUTH"):
			if len(args) == 3 && s.check(args[1], args[2]) {
				args = []string{"SELECT", "0"} // +OK
			}
		}
		var b strings.Builder
		fmt.Fprintf(&b, "*%d\r\n", len(args))
		for _, a := range args {
			fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(a), a)
		}
		if _, err := io.WriteString(back, b.String()); err != nil {
			return
		}
	}
}

// readCommand reads an array of bulk strings.
func readCommand(r *bufio.Reader) ([]string, error) {
	number := func(kind byte) (int, error) {
		line, err := r.ReadString('\n')
		if err != nil || len(line) < 4 || line[0] != kind {
			return 0, fmt.Errorf("line %q: %w", line, err)
		}
		return strconv.Atoi(strings.TrimSpace(line[1:]))
	}
	n, err := number('*')
	if err != nil {
		return nil, err
	}
	args := make([]string, n)
	for i := range args {
		size, err := number('$')
		if err != nil {
			return nil, err
		}
		b := make([]byte, size+2)
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, err
		}
		args[i] = string(b[:size])
	}
	return args, nil
}

// TestIAMLogin logs in with tokens, anew on live connections, and after the service refused one that was too old.
func TestIAMLogin(t *testing.T) {
	s := newIAMServer(t, redistest.Start(t).Addr())
	clock := func() time.Time { return time.Unix(s.now.Load(), 0) }
	iam := &IAM{Cache: "my-cache", User: "app", Region: "eu-central-1", Now: clock, relogin: 50 * time.Millisecond,
		Credentials: credentials.NewStaticCredentialsProvider(accessKey, secretKid, "")}
	a := open(t, Options{Target: Target{Addr: s.l.Addr().String(), Mode: Single, IAM: iam}})
	a.send("t", "one")
	before := s.logins.Load()
	if before == 0 {
		t.Fatal("nobody logged in")
	}
	redistest.Until(t, 20*time.Second, "a login on a live connection", func() error {
		a.send("t", "more")
		if s.logins.Load() == before {
			return fmt.Errorf("still %d logins", before)
		}
		return nil
	})
	// Hours later, everything is cut: new connections need new tokens, and get them.
	s.now.Add(13 * 3600)
	s.cut()
	redistest.Until(t, 20*time.Second, "a publish on new connections", func() error {
		if r := a.call("POST", "/api/v3/topic/t", "later"); r.status != 201 {
			return fmt.Errorf("%d %s", r.status, r.body)
		}
		return nil
	})
	// A wrong secret is refused, in words that do not show it.
	bad := *iam
	bad.Credentials = credentials.NewStaticCredentialsProvider(accessKey, "wrong", "")
	_, err := Open(t.Context(), Options{Target: Target{Addr: s.l.Addr().String(), Mode: Single, IAM: &bad}})
	if err == nil || !strings.Contains(err.Error(), "WRONGPASS") || strings.Contains(err.Error(), "X-Amz") {
		t.Errorf("a wrong secret: %v", err)
	}
}
