// Package clients runs unmodified Go clients against running Tercet nodes. It is a module of its own, so that the clients are no
// dependencies of the product; `go test ./test/compat` of the parent module starts the nodes and runs it.
package clients

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gomodule/redigo/redis"
	goredis "github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"
	"github.com/valkey-io/valkey-go"
)

// nodes are the addresses; the first one leads when the tests begin.
func nodes(t *testing.T) []string {
	v := os.Getenv("TERCET_VALKEY")
	if v == "" {
		t.Fatal("TERCET_VALKEY is not set: run go test ./test/compat in the module above")
	}
	return strings.Split(v, ",")
}

// client is what the scenario needs: a command with its reply as text (lists in brackets), a pipeline, a transaction.
type client interface {
	do(ctx context.Context, args ...string) (string, error)
	pipeline(ctx context.Context, cmds [][]string) ([]string, error)
	transaction(ctx context.Context, cmds [][]string) ([]string, error)
	close()
}

// show writes a reply of any client as text.
func show(v any) string {
	switch v := v.(type) {
	case nil:
		return "nil"
	case []byte:
		return string(v)
	case []any:
		parts := make([]string, len(v))
		for i := range v {
			parts[i] = show(v[i])
		}
		return "[" + strings.Join(parts, " ") + "]"
	case map[any]any:
		var parts []string
		for k, e := range v {
			parts = append(parts, show(k)+" "+show(e))
		}
		return "[" + strings.Join(parts, " ") + "]"
	case map[string]any:
		var parts []string
		for k, e := range v {
			parts = append(parts, k+" "+show(e))
		}
		return "[" + strings.Join(parts, " ") + "]"
	}
	return fmt.Sprint(v)
}

type valkeyClient struct{ c valkey.Client }

func (k valkeyClient) text(r valkey.ValkeyResult) (string, error) {
	v, err := r.ToAny()
	if valkey.IsValkeyNil(err) {
		return "nil", nil
	}
	return show(v), err
}

func (k valkeyClient) build(args []string) valkey.Completed {
	b := k.c.B().Arbitrary(args[0]).Args(args[1:]...)
	if slices.Contains(args, "BLOCK") {
		return b.Blocking() // on a connection of its own
	}
	return b.Build()
}

func (k valkeyClient) do(ctx context.Context, args ...string) (string, error) {
	return k.text(k.c.Do(ctx, k.build(args)))
}

func (k valkeyClient) pipeline(ctx context.Context, cmds [][]string) (out []string, err error) {
	var list valkey.Commands
	for _, c := range cmds {
		list = append(list, k.build(c))
	}
	for _, r := range k.c.DoMulti(ctx, list...) {
		s, e := k.text(r)
		out, err = append(out, s), errors.Join(err, e)
	}
	return out, err
}

func (k valkeyClient) transaction(ctx context.Context, cmds [][]string) (out []string, err error) {
	err = k.c.Dedicated(func(d valkey.DedicatedClient) error {
		list := valkey.Commands{d.B().Multi().Build()}
		for _, c := range cmds {
			// The key tells a cluster client which node the transaction is for.
			list = append(list, d.B().Arbitrary(c[0]).Keys(c[1]).Args(c[2:]...).Build())
		}
		list = append(list, d.B().Exec().Build())
		results := d.DoMulti(ctx, list...)
		replies, err := results[len(results)-1].ToArray()
		for _, m := range replies {
			v, _ := m.ToAny()
			out = append(out, show(v))
		}
		return err
	})
	return out, err
}

func (k valkeyClient) close() { k.c.Close() }

type rueidisClient struct{ c rueidis.Client }

func (k rueidisClient) text(r rueidis.RedisResult) (string, error) {
	v, err := r.ToAny()
	if rueidis.IsRedisNil(err) {
		return "nil", nil
	}
	return show(v), err
}

func (k rueidisClient) build(args []string) rueidis.Completed {
	b := k.c.B().Arbitrary(args[0]).Args(args[1:]...)
	if slices.Contains(args, "BLOCK") {
		return b.Blocking() // on a connection of its own
	}
	return b.Build()
}

func (k rueidisClient) do(ctx context.Context, args ...string) (string, error) {
	return k.text(k.c.Do(ctx, k.build(args)))
}

func (k rueidisClient) pipeline(ctx context.Context, cmds [][]string) (out []string, err error) {
	var list rueidis.Commands
	for _, c := range cmds {
		list = append(list, k.build(c))
	}
	for _, r := range k.c.DoMulti(ctx, list...) {
		s, e := k.text(r)
		out, err = append(out, s), errors.Join(err, e)
	}
	return out, err
}

func (k rueidisClient) transaction(ctx context.Context, cmds [][]string) (out []string, err error) {
	err = k.c.Dedicated(func(d rueidis.DedicatedClient) error {
		list := rueidis.Commands{d.B().Multi().Build()}
		for _, c := range cmds {
			// The key tells a cluster client which node the transaction is for.
			list = append(list, d.B().Arbitrary(c[0]).Keys(c[1]).Args(c[2:]...).Build())
		}
		list = append(list, d.B().Exec().Build())
		results := d.DoMulti(ctx, list...)
		replies, err := results[len(results)-1].ToArray()
		for _, m := range replies {
			v, _ := m.ToAny()
			out = append(out, show(v))
		}
		return err
	})
	return out, err
}

func (k rueidisClient) close() { k.c.Close() }

type goRedisClient struct{ c goredis.UniversalClient }

func anys(args []string) []any {
	out := make([]any, len(args))
	for i, a := range args {
		out[i] = a
	}
	return out
}

func (k goRedisClient) text(c *goredis.Cmd) (string, error) {
	v, err := c.Result()
	if errors.Is(err, goredis.Nil) {
		return "nil", nil
	}
	return show(v), err
}

func (k goRedisClient) do(ctx context.Context, args ...string) (string, error) {
	return k.text(k.c.Do(ctx, anys(args)...))
}

func (k goRedisClient) run(ctx context.Context, p goredis.Pipeliner, cmds [][]string) (out []string, err error) {
	var list []*goredis.Cmd
	for _, c := range cmds {
		list = append(list, p.Do(ctx, anys(c)...))
	}
	if _, err := p.Exec(ctx); err != nil {
		return nil, err
	}
	for _, c := range list {
		s, e := k.text(c)
		out, err = append(out, s), errors.Join(err, e)
	}
	return out, err
}

func (k goRedisClient) pipeline(ctx context.Context, cmds [][]string) ([]string, error) {
	return k.run(ctx, k.c.Pipeline(), cmds)
}

func (k goRedisClient) transaction(ctx context.Context, cmds [][]string) ([]string, error) {
	return k.run(ctx, k.c.TxPipeline(), cmds)
}

func (k goRedisClient) close() { k.c.Close() }

// redigoClient is a connection, and another one once it is broken: redigo leaves that to the application.
type redigoClient struct {
	addr string
	c    redis.Conn
}

func (k *redigoClient) again() error {
	if k.c.Err() == nil {
		return nil
	}
	k.c.Close()
	c, err := dialRedigo(k.addr)
	if err == nil {
		k.c = c
	}
	return err
}

func (k *redigoClient) do(_ context.Context, args ...string) (string, error) {
	if err := k.again(); err != nil {
		return "", err
	}
	v, err := k.c.Do(args[0], anys(args[1:])...)
	return show(v), err
}

func (k *redigoClient) pipeline(_ context.Context, cmds [][]string) (out []string, err error) {
	for _, c := range cmds {
		if err := k.c.Send(c[0], anys(c[1:])...); err != nil {
			return nil, err
		}
	}
	if err := k.c.Flush(); err != nil {
		return nil, err
	}
	for range cmds {
		v, e := k.c.Receive()
		out, err = append(out, show(v)), errors.Join(err, e)
	}
	return out, err
}

func (k *redigoClient) transaction(ctx context.Context, cmds [][]string) ([]string, error) {
	out, err := k.pipeline(ctx, append(append([][]string{{"MULTI"}}, cmds...), []string{"EXEC"}))
	if err != nil {
		return nil, err
	}
	return strings.Fields(strings.Trim(out[len(out)-1], "[]")), nil
}

func (k *redigoClient) close() { k.c.Close() }

// Who the clients are: a user with a password, or nobody, over TLS with a certificate, or without.
var user, password = os.Getenv("TERCET_VALKEY_USER"), os.Getenv("TERCET_VALKEY_PASSWORD")

var secure = func() *tls.Config {
	path := os.Getenv("TERCET_VALKEY_CA")
	if path == "" {
		return nil
	}
	ca, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	cert, err := tls.LoadX509KeyPair(os.Getenv("TERCET_VALKEY_CERT"), os.Getenv("TERCET_VALKEY_KEY"))
	if err != nil {
		panic(err)
	}
	c := &tls.Config{RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	c.RootCAs.AppendCertsFromPEM(ca)
	return c
}()

func valkeyOption(addr string) valkey.ClientOption {
	return valkey.ClientOption{InitAddress: []string{addr}, Username: user, Password: password, TLSConfig: secure}
}

func rueidisOption(addr string) rueidis.ClientOption {
	return rueidis.ClientOption{InitAddress: []string{addr}, Username: user, Password: password, TLSConfig: secure}
}

// goRedisOption leaves time for blocking reads, which the client does not know from others when they are sent by Do.
func goRedisOption(addr string) *goredis.UniversalOptions {
	return &goredis.UniversalOptions{Addrs: []string{addr}, Username: user, Password: password, TLSConfig: secure, ReadTimeout: time.Minute}
}

func dialRedigo(addr string) (redis.Conn, error) {
	options := []redis.DialOption{redis.DialUsername(user), redis.DialPassword(password)}
	if secure != nil {
		options = append(options, redis.DialUseTLS(true), redis.DialTLSConfig(secure))
	}
	return redis.Dial("tcp", addr, options...)
}

var clients = map[string]func(addr string) (client, error){
	"valkey-go": func(addr string) (client, error) {
		c, err := valkey.NewClient(valkeyOption(addr))
		return valkeyClient{c}, err
	},
	"valkey-go RESP2": func(addr string) (client, error) {
		o := valkeyOption(addr)
		o.AlwaysRESP2, o.DisableCache = true, true
		c, err := valkey.NewClient(o)
		return valkeyClient{c}, err
	},
	"rueidis": func(addr string) (client, error) {
		c, err := rueidis.NewClient(rueidisOption(addr))
		return rueidisClient{c}, err
	},
	"rueidis RESP2": func(addr string) (client, error) {
		o := rueidisOption(addr)
		o.AlwaysRESP2, o.DisableCache = true, true
		c, err := rueidis.NewClient(o)
		return rueidisClient{c}, err
	},
	"go-redis": func(addr string) (client, error) {
		return goRedisClient{goredis.NewClient(goRedisOption(addr).Simple())}, nil
	},
	"go-redis RESP2": func(addr string) (client, error) {
		o := goRedisOption(addr)
		o.Protocol = 2
		return goRedisClient{goredis.NewClient(o.Simple())}, nil
	},
	"redigo": func(addr string) (client, error) {
		c, err := dialRedigo(addr)
		if err != nil {
			return nil, err
		}
		return &redigoClient{addr: addr, c: c}, nil
	},
}

// clusterClients follow CLUSTER SLOTS and MOVED.
var clusterClients = map[string]func(addr string) (client, error){
	"valkey-go":       clients["valkey-go"],
	"valkey-go RESP2": clients["valkey-go RESP2"],
	"rueidis":         clients["rueidis"],
	"rueidis RESP2":   clients["rueidis RESP2"],
	"go-redis cluster": func(addr string) (client, error) {
		return goRedisClient{goredis.NewClusterClient(goRedisOption(addr).Cluster())}, nil
	},
	"go-redis cluster RESP2": func(addr string) (client, error) {
		o := goRedisOption(addr)
		o.Protocol = 2
		return goRedisClient{goredis.NewClusterClient(o.Cluster())}, nil
	},
}

// inCluster says that the nodes run with --valkey-mode cluster.
var inCluster = os.Getenv("TERCET_VALKEY_MODE") == "cluster"

func connectors() map[string]func(addr string) (client, error) {
	if inCluster {
		return clusterClients
	}
	return clients
}

// TestClients does the same work with every client through every node.
func TestClients(t *testing.T) {
	for name, connect := range connectors() {
		for i, addr := range nodes(t) {
			t.Run(fmt.Sprintf("%s node %d", name, i+1), func(t *testing.T) {
				t.Parallel()
				c, err := connect(addr)
				if err != nil {
					t.Fatal(err)
				}
				defer c.close()
				blocked, err := connect(addr)
				if err != nil {
					t.Fatal(err)
				}
				defer blocked.close()
				work(t, c, blocked, fmt.Sprintf("{orders-%s-%d-%d}", strings.ReplaceAll(name, " ", "-"), i, time.Now().UnixNano()))
			})
		}
	}
}

func work(t *testing.T, c, blocked client, s string) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	do := func(args ...string) string {
		t.Helper()
		got, err := c.do(ctx, args...)
		if err != nil {
			t.Fatalf("%q: %v", args, err)
		}
		return got
	}
	want := func(want string, args ...string) {
		t.Helper()
		if got := do(args...); got != want {
			t.Fatalf("%q: %s, want %s", args, got, want)
		}
	}
	want("PONG", "PING")
	want("OK", "XGROUP", "CREATE", s, "g", "$", "MKSTREAM")
	if _, err := c.do(ctx, "XGROUP", "CREATE", s, "g", "$"); err == nil || !strings.HasPrefix(err.Error(), "BUSYGROUP") {
		t.Fatalf("a second XGROUP CREATE: %v", err)
	}

	got := make(chan string, 1)
	go func() {
		r, err := blocked.do(ctx, "XREADGROUP", "GROUP", "g", "c1", "COUNT", "1", "BLOCK", "4000", "STREAMS", s, ">")
		got <- fmt.Sprint(r, err)
	}()
	first := do("XADD", s, "*", "n", "first")
	if r := <-got; !strings.Contains(r, first) {
		t.Fatalf("the blocked consumer got %s, not %s", r, first)
	}

	var cmds [][]string
	for i := range 50 {
		cmds = append(cmds, []string{"XADD", s, "*", "n", fmt.Sprint(i)})
	}
	ids, err := c.pipeline(ctx, cmds)
	if err != nil {
		t.Fatal(err)
	}
	if all := do("XRANGE", s, ids[0], "+"); strings.Count(all, " [n ") != 50 || !strings.HasPrefix(all, "[["+ids[0]) || !strings.Contains(all, ids[49]) {
		t.Fatalf("after a pipeline of 50: %s", all)
	}
	if r := do("XREADGROUP", "GROUP", "g", "c2", "COUNT", "3", "STREAMS", s, ">"); strings.Count(r, " [n ") != 3 || !strings.Contains(r, ids[2]) {
		t.Fatalf("XREADGROUP: %s", r)
	}
	want("2", "XACK", s, "g", first, ids[0])
	want(fmt.Sprintf("[2 %s %s [[c2 2]]]", ids[1], ids[2]), "XPENDING", s, "g")
	want(fmt.Sprintf("[%s]", ids[1]), "XCLAIM", s, "g", "c3", "0", ids[1], "JUSTID")
	want(fmt.Sprintf("[0-0 [%s %s] []]", ids[1], ids[2]), "XAUTOCLAIM", s, "g", "c4", "0", "0", "JUSTID")
	want("41", "XTRIM", s, "MAXLEN", "10")
	out, err := c.transaction(ctx, [][]string{{"XADD", s, "9999999999999-1", "n", "tx"}, {"XLEN", s}, {"XACK", s, "g", ids[1]}})
	if err != nil || fmt.Sprint(out) != "[9999999999999-1 11 1]" {
		t.Fatalf("transaction: %v, %v", out, err)
	}
	want("nil", "XREAD", "BLOCK", "10", "STREAMS", s, "$")
	want("1", "DEL", s)
}

// TestPubSub: what is published on one node is heard on the others.
func TestPubSub(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	addrs := nodes(t)
	var subs []*goredis.PubSub
	for _, addr := range addrs {
		c := goredis.NewClient(goRedisOption(addr).Simple())
		defer c.Close()
		p := c.Subscribe(ctx, "news")
		defer p.Close()
		if _, err := p.Receive(ctx); err != nil {
			t.Fatal(err)
		}
		subs = append(subs, p)
	}
	c := goredis.NewClient(goRedisOption(addrs[0]).Simple())
	defer c.Close()
	n, err := c.Publish(ctx, "news", "hello").Result()
	if err != nil || int(n) != len(addrs) {
		t.Fatalf("published to %d, %v", n, err)
	}
	for i, p := range subs {
		m, err := p.ReceiveMessage(ctx)
		if err != nil || m.Payload != "hello" {
			t.Errorf("node %d heard %v, %v", i+1, m, err)
		}
	}
}
