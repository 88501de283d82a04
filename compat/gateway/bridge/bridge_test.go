package bridge

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/valkey-io/valkey-go"

	"tercet.dev/tercet/compat/gateway"
	"tercet.dev/tercet/compat/internal/redistest"
	"tercet.dev/tercet/test/harness"
)

// The test binary is also the bridge process that tests kill.
const childEnv = "TERCET_TEST_BRIDGE"

func TestMain(m *testing.M) {
	if args := os.Getenv(childEnv); args != "" {
		from, to, _ := strings.Cut(args, ",")
		b, err := Open(context.Background(), Options{
			From: gateway.Target{Addr: from, Mode: gateway.Single}, To: gateway.Target{Addr: to, Mode: gateway.Single},
			Stream: "orders", BatchEntries: 100, Groups: true,
		})
		if err == nil {
			err = b.Run(context.Background(), true)
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	harness.Main(m)
}

func target(s *redistest.Server) gateway.Target {
	return gateway.Target{Addr: s.Addr(), Mode: gateway.Single}
}

func seed(t *testing.T) *rand.Rand {
	n := uint64(time.Now().UnixNano())
	if s := os.Getenv("TERCET_SEED"); s != "" {
		n, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Logf("seed: TERCET_SEED=%d", n)
	return rand.New(rand.NewPCG(n, 0))
}

// fill appends entries in pipelines.
func fill(t *testing.T, c valkey.Client, stream string, from, n int) {
	t.Helper()
	for n > 0 {
		k := min(n, 1000)
		cmds := make([]valkey.Completed, k)
		for i := range cmds {
			cmds[i] = c.B().Xadd().Key(stream).Id("*").FieldValue().FieldValue("n", strconv.Itoa(from+i)).FieldValue("text", "entry "+strconv.Itoa(from+i)).Build()
		}
		for _, r := range c.DoMulti(t.Context(), cmds...) {
			if err := r.Error(); err != nil {
				t.Error(err)
				return
			}
		}
		from, n = from+k, n-k
	}
}

func equal(t *testing.T, b *Bridge, entries int64) {
	t.Helper()
	c, err := b.Verify(t.Context(), Comparison{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !c.Equal() || c.Source != entries || c.Copy != entries {
		t.Fatalf("compared: %+v, want %d equal entries", c, entries)
	}
}

func TestBackfillAndWayBack(t *testing.T) {
	from, to := redistest.Start(t), redistest.Start(t)
	source, copied := from.Client(), to.Client()
	fill(t, source, "orders", 0, 12345)
	from.Do("XADD", "orders", "*", "binary", "\x01\xfe", "twice", "1", "twice", "2")
	from.Do("XGROUP", "CREATE", "orders", "billing", "0")
	from.Do("XGROUP", "CREATE", "orders", "idle", "$")
	from.Do("XREADGROUP", "GROUP", "billing", "alice", "COUNT", "1500", "STREAMS", "orders", ">")
	from.Do("XREADGROUP", "GROUP", "billing", "bob", "COUNT", "10", "STREAMS", "orders", ">")

	b, err := Open(t.Context(), Options{From: target(from), To: target(to), Stream: "orders", Groups: true})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	var told Progress
	b.o.Progress = func(p Progress) { told = p }
	if err := b.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if told.Copied != 12346 || told.Lag != 0 || !told.Following {
		t.Errorf("progress %+v", told)
	}
	equal(t, b, 12346)
	same := func(args ...string) {
		t.Helper()
		a, b := from.Do(args...), to.Do(args...)
		if a != b {
			t.Errorf("%v: source %q, copy %q", args, a, b)
		}
	}
	same("XPENDING", "orders", "billing")
	same("XINFO", "GROUPS", "orders")

	// An acknowledgement and a claim at the source are carried along by the next run.
	first := strings.Fields(from.Do("XPENDING", "orders", "billing", "-", "+", "1"))[0]
	from.Do("XACK", "orders", "billing", first)
	second := strings.Fields(from.Do("XPENDING", "orders", "billing", "-", "+", "1"))[0]
	from.Do("XCLAIM", "orders", "billing", "carol", "0", second)
	fill(t, source, "orders", 12345, 100)
	if err := b.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	equal(t, b, 12446)
	same("XPENDING", "orders", "billing")

	// The way back: the clients have switched, the copy goes on, and the source becomes its copy.
	b.Close()
	fill(t, copied, "orders", 12445, 50)
	back, err := Open(t.Context(), Options{From: target(to), To: target(from), Stream: "orders", Groups: true})
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	if err := back.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	equal(t, back, 12496)

	// A stream of something else is not overwritten.
	to.Do("XADD", "other", "1-1", "a", "b")
	from.Do("XADD", "other", "2-1", "a", "b")
	if b, err := Open(t.Context(), Options{From: target(from), To: target(to), Stream: "other"}); err == nil {
		b.Close()
		t.Error("a stream with foreign entries was taken for a copy")
	}
}

// TestVerifyFinds shows that the comparison sees what differs.
func TestVerifyFinds(t *testing.T) {
	from, to := redistest.Start(t), redistest.Start(t)
	fill(t, from.Client(), "orders", 0, 3000)
	b, err := Open(t.Context(), Options{From: target(from), To: target(to), Stream: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	equal(t, b, 3000)
	ids := strings.Fields(to.Do("XRANGE", "orders", "-", "+", "COUNT", "2500"))
	id := ids[0]
	for _, s := range ids { // an ID in the middle
		if strings.Count(s, "-") == 1 && strings.Trim(s, "0123456789-") == "" {
			id = s
		}
	}
	to.Do("XDEL", "orders", id)
	if c, err := b.Verify(t.Context(), Comparison{}, nil); err != nil || c.Missing != 1 || c.FirstDifference != id {
		t.Errorf("a missing entry %s: %+v %v", id, c, err)
	}
	from.Do("XDEL", "orders", id)
	equal(t, b, 2999)
	// What the source deleted and trimmed since it was copied is no difference.
	from.Do("XDEL", "orders", strings.Fields(from.Do("XRANGE", "orders", "-", "+", "COUNT", "1"))[0])
	from.Do("XTRIM", "orders", "MAXLEN", "2900")
	before, err := b.Verify(t.Context(), Comparison{}, nil)
	if err != nil || !before.Equal() || before.Deleted != 99 || before.Source != 2900 {
		t.Errorf("deletions: %+v %v", before, err)
	}
	// The comparison goes on where it was.
	fill(t, from.Client(), "orders", 3000, 10)
	if err := b.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	after, err := b.Verify(t.Context(), before, nil)
	if err != nil || !after.Equal() || after.Source != 2910 || after.Deleted != 99 || after.Position == before.Position {
		t.Errorf("the comparison went on: %+v %v", after, err)
	}
	last := strings.Fields(from.Do("XREVRANGE", "orders", "+", "-", "COUNT", "1"))[0]
	to.Do("DEL", "orders")
	to.Do("XADD", "orders", last, "n", "other")
	if c, err := b.Verify(t.Context(), after, nil); err != nil || c.Different+c.Missing != 0 {
		t.Errorf("entries that were compared before are compared again: %+v %v", c, err)
	}
	if c, err := b.Verify(t.Context(), before, nil); err != nil || c.Different != 1 || c.Missing != 9 {
		t.Errorf("a different entry: %+v %v", c, err)
	}
}

// TestForeign shows that an entry of the copy that the source never had is a difference.
func TestForeign(t *testing.T) {
	from, to := redistest.Start(t), redistest.Start(t)
	from.Do("XADD", "orders", "10-1", "n", "1")
	from.Do("XADD", "orders", "20-1", "n", "2")
	to.Do("XADD", "orders", "10-1", "n", "1")
	to.Do("XADD", "orders", "15-1", "n", "1.5")
	to.Do("XADD", "orders", "20-1", "n", "2")
	b, err := Open(t.Context(), Options{From: target(from), To: target(to), Stream: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if c, err := b.Verify(t.Context(), Comparison{}, nil); err != nil || c.Foreign != 1 || c.FirstDifference != "15-1" {
		t.Errorf("a foreign entry: %+v %v", c, err)
	}
}

// TestKilled kills the bridge process again and again while the source grows: the copy has every entry once.
func TestKilled(t *testing.T) {
	rnd := seed(t)
	total, kills := harness.Scale(20_000, 1_000_000), harness.Scale(8, 40)
	from, to := redistest.Start(t), redistest.Start(t)
	source, copied := from.Client(), to.Client()
	fill(t, source, "orders", 0, total/2)
	from.Do("XGROUP", "CREATE", "orders", "billing", "0")
	filled := make(chan struct{})
	go func() {
		defer close(filled)
		for n := total / 2; n < total; n += 500 {
			fill(t, source, "orders", n, min(500, total-n))
		}
	}()
	length := func() int64 {
		n, err := copied.Do(t.Context(), copied.B().Xlen().Key("orders").Build()).AsInt64()
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for range kills {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+from.Addr()+","+to.Addr())
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// It is killed in the middle of its work: after a random number of entries more.
		goal := min(length()+1+rnd.Int64N(int64(total/kills)), int64(total))
		redistest.Until(t, 60*time.Second, "the bridge to go on", func() error {
			if n := length(); n < goal {
				return fmt.Errorf("%d of %d", n, goal)
			}
			return nil
		})
		cmd.Process.Kill()
		cmd.Wait()
	}
	<-filled
	b, err := Open(t.Context(), Options{From: target(from), To: target(to), Stream: "orders", Groups: true})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	before := b.Copied
	if err := b.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	equal(t, b, int64(total))
	if b.Copied != int64(total) {
		t.Errorf("the record counts %d entries, %d were copied", b.Copied, total)
	}
	t.Logf("%d entries, %d kills, %d of them copied by the last bridge", total, kills, b.Copied-before)
}

// TestTwoBridges lets two bridges write one copy: one of them gives up, and the copy is right.
func TestTwoBridges(t *testing.T) {
	from, to := redistest.Start(t), redistest.Start(t)
	fill(t, from.Client(), "orders", 0, 20_000)
	results := make(chan error, 2)
	var bridges []*Bridge
	for range 2 {
		b, err := Open(t.Context(), Options{From: target(from), To: target(to), Stream: "orders", BatchEntries: 50})
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		bridges = append(bridges, b)
	}
	for _, b := range bridges {
		go func() { results <- b.Run(t.Context(), false) }()
	}
	elsewhere := 0
	for range bridges {
		if err := <-results; errors.Is(err, errElsewhere) {
			elsewhere++
		} else if err != nil {
			t.Error(err)
		}
	}
	if elsewhere > 1 {
		t.Error("both bridges gave up")
	}
	last, err := Open(t.Context(), Options{From: target(from), To: target(to), Stream: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	defer last.Close()
	if err := last.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	equal(t, last, 20_000)
}

// cutting stands before a server and breaks a connection after every third EXEC, when the server has carried it out and
// before its answer is passed on.
type cutting struct {
	l      net.Listener
	behind string
	execs  atomic.Int64
	cuts   atomic.Int64
	group  sync.WaitGroup
	// cut is called when an answer was lost.
	cut func()
}

func (c *cutting) serve(front net.Conn) {
	defer front.Close()
	back, err := net.Dial("tcp", c.behind)
	if err != nil {
		return
	}
	defer back.Close()
	var cut atomic.Bool
	c.group.Go(func() {
		defer front.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := back.Read(buf)
			if err != nil {
				return
			}
			if cut.Load() && bytes.Contains(buf[:n], []byte("*")) {
				c.cut()
				return
			}
			if _, err := front.Write(buf[:n]); err != nil {
				return
			}
		}
	})
	buf := make([]byte, 64<<10)
	for {
		n, err := front.Read(buf)
		if err != nil {
			return
		}
		if bytes.Contains(buf[:n], []byte("EXEC\r\n")) && c.execs.Add(1)%3 == 0 {
			cut.Store(true)
			c.cuts.Add(1)
		}
		if _, err := back.Write(buf[:n]); err != nil {
			return
		}
	}
}

// startCutting puts a cutting before a server.
func startCutting(t *testing.T, server *redistest.Server, cut func()) (*cutting, gateway.Target) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutting{l: l, behind: server.Addr(), cut: cut}
	c.group.Go(func() {
		for {
			front, err := l.Accept()
			if err != nil {
				return
			}
			c.group.Go(func() { c.serve(front) })
		}
	})
	return c, gateway.Target{Addr: l.Addr().String(), Mode: gateway.Single}
}

// ended closes a bridge that copied 3000 entries, unless err says otherwise, and the cutting before its server.
func (c *cutting) ended(t *testing.T, b *Bridge, err error) {
	if err == nil {
		equal(t, b, 3000)
	}
	if b.Copied != 3000 {
		t.Errorf("%d entries are recorded", b.Copied)
	}
	b.Close()
	c.l.Close()
	c.group.Wait()
}

// TestLostAnswers loses the answers of transactions that happened: the record tells, and nothing is copied twice.
func TestLostAnswers(t *testing.T) {
	from, to := redistest.Start(t), redistest.Start(t)
	fill(t, from.Client(), "orders", 0, 3000)
	c, front := startCutting(t, to, func() {})
	b, err := Open(t.Context(), Options{From: target(from), To: front, Stream: "orders", BatchEntries: 300})
	if err != nil {
		t.Fatal(err)
	}
	err = b.Run(t.Context(), false)
	c.ended(t, b, err)
	if err != nil || c.cuts.Load() == 0 {
		t.Fatalf("%v; %d answers were lost", err, c.cuts.Load())
	}
	t.Logf("%d of %d answers were lost", c.cuts.Load(), c.execs.Load())
}

// TestInterrupted ends a run in the middle of a transaction that happens, as a migration that is told to finish does. The
// next run goes on behind it: it is not taken for another bridge's.
func TestInterrupted(t *testing.T) {
	from, to := redistest.Start(t), redistest.Start(t)
	fill(t, from.Client(), "orders", 0, 3000)
	var stop atomic.Pointer[context.CancelFunc]
	c, front := startCutting(t, to, func() { (*stop.Load())() })
	b, err := Open(t.Context(), Options{From: target(from), To: front, Stream: "orders", BatchEntries: 300})
	if err != nil {
		t.Fatal(err)
	}
	interrupted := 0
	for {
		ctx, cancel := context.WithCancel(t.Context())
		stop.Store(&cancel)
		err = b.Run(ctx, false)
		cancel()
		if !errors.Is(err, context.Canceled) {
			break
		}
		interrupted++
		b.o.BatchEntries = 300 + interrupted // the next transaction is not the same one
	}
	c.ended(t, b, err)
	if err != nil || interrupted == 0 {
		t.Fatalf("%v; %d runs were interrupted", err, interrupted)
	}
}
