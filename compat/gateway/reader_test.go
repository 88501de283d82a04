package gateway

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/compat/internal/redistest"
)

// zoned is a server as a service with availability zones runs it: INFO tells the zone. It counts the looks it is asked for.
type zoned struct {
	l      net.Listener
	behind string
	zone   string
	looks  atomic.Int64
	mu     sync.Mutex
	conns  []net.Conn
	group  sync.WaitGroup
}

func newZoned(t *testing.T, behind *redistest.Server, zone string) *zoned {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	z := &zoned{l: l, behind: behind.Addr(), zone: zone}
	z.group.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			z.group.Go(func() { z.serve(c) })
		}
	})
	t.Cleanup(z.close)
	return z
}

func (z *zoned) addr() string { return z.l.Addr().String() }

func (z *zoned) close() {
	z.l.Close()
	z.mu.Lock()
	for _, c := range z.conns {
		c.Close()
	}
	z.mu.Unlock()
	z.group.Wait()
}

// serve passes commands on one at a time, so that the answer of INFO can be told from others.
func (z *zoned) serve(c net.Conn) {
	defer c.Close()
	back, err := net.Dial("tcp", z.behind)
	if err != nil {
		return
	}
	defer back.Close()
	z.mu.Lock()
	z.conns = append(z.conns, c, back)
	z.mu.Unlock()
	answers := make(chan bool, 1024) // whether the next answer is INFO's
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer c.Close()
		r := bufio.NewReader(back)
		for isInfo := range answers {
			if !isInfo {
				if err := copyReply(c, r); err != nil {
					return
				}
				continue
			}
			var b strings.Builder
			if err := copyReply(&b, r); err != nil {
				return
			}
			_, text, _ := strings.Cut(b.String(), "\r\n")
			text = "availability_zone:" + z.zone + "\r\n" + strings.TrimSuffix(text, "\r\n")
			fmt.Fprintf(c, "$%d\r\n%s\r\n", len(text), text)
		}
	}()
	defer func() {
		close(answers)
		back.Close()
		<-done
	}()
	for r := bufio.NewReader(c); ; {
		args, err := readCommand(r)
		if err != nil {
			return
		}
		if strings.HasPrefix(strings.ToUpper(args[0]), "EVAL") {
			z.looks.Add(1)
		}
		answers <- strings.EqualFold(args[0], "INFO")
		fmt.Fprintf(back, "*%d\r\n", len(args))
		for _, a := range args {
			fmt.Fprintf(back, "$%d\r\n%s\r\n", len(a), a)
		}
	}
}

// copyReply copies one reply.
func copyReply(w io.Writer, r *bufio.Reader) error {
	for need := 1; need > 0; need-- {
		line, err := r.ReadString('\n')
		if err != nil {
			return err
		}
		io.WriteString(w, line)
		n := 0
		fmt.Sscanf(line[1:], "%d", &n)
		switch line[0] {
		case '$', '=':
			if n >= 0 {
				if _, err := io.CopyN(w, r, int64(n)+2); err != nil {
					return err
				}
			}
		case '*', '~', '>':
			need += max(n, 0)
		case '%':
			need += 2 * n
		}
	}
	return nil
}

// TestReaders has peeks answered by the replica in the gateway's zone, by another while it is away, and by the primary
// while all are; what leases are judged by always comes from the primary.
func TestReaders(t *testing.T) {
	primary := redistest.Start(t)
	zones := []*zoned{newZoned(t, redistest.Replica(t, primary), "use1-az1"), newZoned(t, redistest.Replica(t, primary), "use1-az2")}
	near, far := zones[1], zones[0]
	front := newZoned(t, primary, "use1-az3")
	reading, err := ParseReading(far.addr()+","+near.addr(), "use1-az2")
	if err != nil {
		t.Fatal(err)
	}
	a := open(t, Options{Target: Target{Addr: front.addr(), Mode: Single}, Reading: reading})
	report := a.g.Report()
	if len(report.Readers) != 2 || report.Readers[0].Zone != "use1-az1" || report.Readers[1].Zone != "use1-az2" || report.Readers[1].Role != "slave" || !report.Readers[1].Linked {
		t.Fatalf("the report says of readers: %+v", report.Readers)
	}
	a.send("orders", "x")
	peeked := func(body string) func() error {
		return func() error {
			r := a.call("POST", "/api/v3/topic/orders/consumer/g", "", "Vqs-Visibility-Timeout-Seconds", "0", "Accept", "application/x-ndjson")
			if ms := parse(t, r); len(ms) != 1 || string(ms[0].Body) != body {
				return fmt.Errorf("peeked %v", ms)
			}
			return nil
		}
	}
	redistest.Until(t, 30*time.Second, "the message at the replica", peeked("x"))
	primaryLooks := front.looks.Load()
	for range 5 {
		if err := peeked("x")(); err != nil {
			t.Error(err)
		}
	}
	if n := near.looks.Load(); n < 5 || far.looks.Load() != 0 || front.looks.Load() != primaryLooks {
		t.Errorf("the replica in the zone was asked %d times, the other %d, the primary %d", n, far.looks.Load(), front.looks.Load()-primaryLooks)
	}
	before := near.looks.Load() + far.looks.Load()
	m := a.one("orders", "g", "x")
	a.extend(200, "orders", "g", m.Receipt, 60)
	a.ack(204, "orders", "g", m.Receipt)
	if n := near.looks.Load() + far.looks.Load() - before; n != 0 {
		t.Errorf("a replica was asked %d times about a lease", n)
	}
	a.send("orders", "y")
	near.close()
	redistest.Until(t, 60*time.Second, "an answer without the nearest replica", peeked("y"))
	far.close()
	redistest.Until(t, 60*time.Second, "an answer without replicas", peeked("y"))
}

// TestReadersOfACluster reads from the replicas that the cluster names.
func TestReadersOfACluster(t *testing.T) {
	shards := redistest.Cluster(t, 3)
	_, owner, _ := shards.Owner("orders")
	replica := shards.Replica(t, owner)
	a := open(t, Options{Target: Target{Addr: shards[0].Addr()}, Reading: Reading{Zone: "nowhere"}})
	a.send("orders", "x")
	calls := func(s *redistest.Server) string {
		for line := range strings.Lines(s.Do("INFO", "commandstats")) {
			if strings.HasPrefix(line, "cmdstat_evalsha_ro:") || strings.HasPrefix(line, "cmdstat_eval_ro:") {
				return line
			}
		}
		return ""
	}
	redistest.Until(t, 60*time.Second, "a peek at the replica", func() error {
		r := a.call("POST", "/api/v3/topic/orders/consumer/g", "", "Vqs-Visibility-Timeout-Seconds", "0", "Accept", "application/x-ndjson")
		if ms := parse(t, r); len(ms) != 1 {
			return fmt.Errorf("peeked %v", ms)
		}
		if calls(replica) == "" {
			return fmt.Errorf("the primary answered")
		}
		return nil
	})
	m := a.one("orders", "g", "x")
	a.ack(204, "orders", "g", m.Receipt)
}

func TestParseReading(t *testing.T) {
	r, err := ParseReading("a,b:6380", "z")
	if err != nil || !slices.Equal(r.Addrs, []string{"a:6379", "b:6380"}) || r.Zone != "z" {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := ParseReading("rediss://a:6379", ""); err == nil {
		t.Error("a URL was taken")
	}
	report := Report{Mode: Single}
	report.probeReaders(t.Context(), Target{}, Reading{Zone: "z"})
	if len(report.Problems) != 1 {
		t.Errorf("a zone without readers: %v", report.Problems)
	}
}
