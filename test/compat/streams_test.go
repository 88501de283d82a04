package compat

import (
	"bytes"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
)

var (
	streamID  = regexp.MustCompile(`\d{10,}-\d+`)
	nameField = regexp.MustCompile(`\[n (\d+-\d+)\]`)
)

// TestTransactionsThroughKills: transactions that add to two streams, through every node, while the leader and then all nodes
// are killed with SIGKILL. Both streams hold the same, each transaction at most once, and all that were confirmed (S14).
func TestTransactionsThroughKills(t *testing.T) {
	c := harness.Start(t, harness.Options{})
	var mu sync.Mutex
	confirmed := map[string]bool{}
	stop := make(chan struct{})
	var clients sync.WaitGroup
	for client := range 6 {
		clients.Go(func() {
			var k *conn
			for n := 0; ; n++ {
				select {
				case <-stop:
					if k != nil {
						k.nc.Close()
					}
					return
				default:
				}
				var err error
				if k == nil {
					if k, err = connect(c.Nodes[(client+n)%3].Valkey); err != nil {
						k = nil
						<-time.After(5 * time.Millisecond) // that node is not there: not as fast as possible
						continue
					}
				}
				name := fmt.Sprintf("%d-%d", client, n)
				err = k.send("MULTI", "XADD left * n "+name, "XADD right * n "+name, "EXEC")
				var last string
				for i := 0; i < 4 && err == nil; i++ {
					last, err = k.reply()
				}
				if err != nil {
					k.nc.Close()
					k = nil // its outcome is unknown, and it is not repeated
					continue
				}
				if len(streamID.FindAllString(last, -1)) == 2 {
					mu.Lock()
					confirmed[name] = true
					mu.Unlock()
				}
			}
		})
	}
	more := func() {
		t.Helper()
		mu.Lock()
		before := len(confirmed)
		mu.Unlock()
		harness.Until(t, time.Minute, "more transactions", func() error {
			mu.Lock()
			defer mu.Unlock()
			if len(confirmed) < before+60 {
				return errNotYet
			}
			return nil
		})
	}
	for round := range harness.Scale(2, 50) {
		more()
		victims := []*harness.Node{c.Leader()}
		if round%2 == 1 {
			victims = c.Nodes
		}
		for _, n := range victims {
			n.Kill()
		}
		for _, n := range victims {
			n.Start()
		}
		c.WaitInSync(c.Zones()...)
	}
	more()
	close(stop)
	clients.Wait()
	c.EqualHashes()
	for _, n := range c.Nodes {
		found := map[string]map[string]int{}
		for _, key := range []string{"left", "right"} {
			found[key] = map[string]int{}
			for _, m := range nameField.FindAllStringSubmatch(dial(t, n.Valkey).must(t, "XRANGE "+key+" - +"), -1) {
				found[key][m[1]]++
			}
		}
		for name := range confirmed {
			if found["left"][name] != 1 || found["right"][name] != 1 {
				t.Errorf("%s: transaction %s was confirmed and is there %d and %d times", n.ID, name, found["left"][name], found["right"][name])
			}
		}
		for name, times := range found["left"] {
			if times != 1 || found["right"][name] != 1 {
				t.Errorf("%s: transaction %s is on the left %d times, on the right %d times", n.ID, name, times, found["right"][name])
			}
		}
		if len(found["left"]) != len(found["right"]) {
			t.Errorf("%s: %d entries on the left, %d on the right", n.ID, len(found["left"]), len(found["right"]))
		}
	}
	t.Logf("%d transactions were confirmed", len(confirmed))
}

// TestPendingList: a hundred thousand pending entries in one group, through the death of the leader, claimed and acknowledged
// by another consumer.
func TestPendingList(t *testing.T) {
	const n, step = 100_000, 1_000
	c := harness.Start(t, harness.Options{})
	followers, leader := c.Followers()
	k := dial(t, followers[0].Valkey)
	k.must(t, "XGROUP CREATE s g $ MKSTREAM")
	// A machine that stands still for seconds leaves outcomes unknown: what can be repeated is.
	unknown := func(got string) bool {
		return strings.Contains(got, "outcome unknown") || strings.HasPrefix(got, "-CLUSTERDOWN") || strings.HasPrefix(got, "-TRYAGAIN")
	}
	again := func(line string) (got string, repeated bool) {
		for deadline := time.Now().Add(patience); ; repeated = true {
			got, err := k.do(line)
			if err == nil && !strings.HasPrefix(got, "-") {
				return got, repeated
			}
			if err != nil || time.Now().After(deadline) || !unknown(got) {
				t.Fatalf("%.80s: %s, %v", line, got, err)
			}
		}
	}
	for i := range n / step {
		lines := make([]string, step)
		for j := range lines {
			lines[j] = fmt.Sprintf("XADD s IDMP p %d * f v", i*step+j)
		}
		for len(lines) > 0 {
			if err := k.nc.SetDeadline(time.Now().Add(patience)); err != nil {
				t.Fatal(err)
			}
			if err := k.send(lines...); err != nil {
				t.Fatal(err)
			}
			var rest []string
			for _, line := range lines {
				got, err := k.reply()
				switch {
				case err == nil && streamID.MatchString(got):
				case err == nil && unknown(got):
					rest = append(rest, line)
				default:
					t.Fatalf("XADD: %s, %v", got, err)
				}
			}
			lines = rest
		}
	}
	for got := ""; got != "nil"; {
		got, _ = again("XREADGROUP GROUP g c1 COUNT 10000 STREAMS s >") // what is given in an unknown outcome is pending as well
		if ids := len(streamID.FindAllString(got, -1)); ids > 10_000 {
			t.Fatalf("a read gave %d entries", ids)
		}
	}
	summary := func(addr string) string {
		got := settled(t, addr, "XPENDING s g")
		return streamID.ReplaceAllString(got, "ID")
	}
	want := fmt.Sprintf("[%d ID ID [[c1 %d]]]", n, n)
	if got := summary(leader.Valkey); got != want {
		t.Fatalf("XPENDING: %s", got)
	}
	leader.Kill()
	if got := summary(followers[1].Valkey); got != want {
		t.Fatalf("XPENDING after the leader's death: %s", got)
	}
	leader.Start()
	c.WaitInSync(c.Zones()...)

	k = dial(t, followers[1].Valkey)
	// What cannot be told is how many an XACK of unknown outcome has acknowledged.
	claimed, acknowledged, unsure := 0, 0, 0
	for cursor := "0-0"; ; {
		got, _ := again("XAUTOCLAIM s g c2 0 " + cursor + " COUNT 5000 JUSTID")
		next, list, _ := strings.Cut(strings.TrimPrefix(got, "["), " ")
		ids := streamID.FindAllString(list, -1)
		claimed += len(ids)
		if len(ids) > 0 {
			told, repeated := again("XACK s g " + strings.Join(ids, " "))
			count, err := strconv.Atoi(told)
			if err != nil {
				t.Fatal(err)
			}
			acknowledged += count
			if repeated {
				unsure += len(ids) - count
			}
		}
		if cursor = next; cursor == "0-0" {
			break
		}
	}
	if claimed != n || acknowledged+unsure != n {
		t.Errorf("%d claimed, %d acknowledged and perhaps %d more, want %d", claimed, acknowledged, unsure, n)
	}
	if got, _ := again("XPENDING s g"); got != "[0 nil nil nil]" {
		t.Errorf("XPENDING at the end: %s", got)
	}
	c.EqualHashes()
}

// TestBothProtocols: one topic and one group over HTTP and the Valkey port, the one through the leader, the other through a
// follower, and the other way round.
func TestBothProtocols(t *testing.T) {
	c := harness.Start(t, harness.Options{})
	followers, leader := c.Followers()
	for i, pair := range [][2]*harness.Node{{leader, followers[0]}, {followers[0], leader}, {followers[1], followers[0]}} {
		h := pair[0].NewClient()
		defer h.Close()
		k := dial(t, pair[1].Valkey)
		topic := fmt.Sprint("orders-", i)
		ctx := t.Context()
		body := []byte("h\x00\xff\r\n") // any bytes

		// Published over HTTP, read by XREADGROUP, which waits for it.
		k.must(t, "XGROUP CREATE "+topic+" g 0 MKSTREAM")
		if err := k.send("XREADGROUP GROUP g c1 COUNT 1 BLOCK 60000 STREAMS " + topic + " >"); err != nil {
			t.Fatal(err)
		}
		p := h.Publish(ctx, topic, body, nil)
		if p.Outcome != harness.OK || p.Zones != 3 {
			t.Fatalf("publish: %v", p)
		}
		got, err := k.reply()
		if err != nil || !strings.Contains(got, "body "+string(body)) || !strings.Contains(got, "content-type application/octet-stream") {
			t.Fatalf("XREADGROUP: %q, %v", got, err)
		}
		id := streamID.FindString(got)
		// Pending for the one protocol is leased for the other.
		receive := func() []harness.Delivery {
			t.Helper()
			ds, a := h.Receive(ctx, harness.Receive{Topic: topic, Group: "g", Max: 10, Visibility: time.Minute})
			if a.Outcome != harness.OK {
				t.Fatalf("receive: %v", a)
			}
			return ds
		}
		if ds := receive(); len(ds) != 0 {
			t.Errorf("what is pending was received: %+v", ds)
		}
		if got := k.must(t, "XACK "+topic+" g "+id); got != "1" {
			t.Errorf("XACK: %s", got)
		}

		// XADD, received over HTTP: pending under the reserved consumer, which nobody claims from.
		id = k.must(t, "XADD "+topic+" * body hello content-type text/plain")
		ds := receive()
		if len(ds) != 1 || !bytes.Contains(ds[0].Body, []byte("hello")) || ds[0].Count != 1 {
			t.Fatalf("receive: %+v", ds)
		}
		if got := k.must(t, "XPENDING "+topic+" g - + 10"); !strings.Contains(got, "["+id+" tercet:http ") || !strings.HasSuffix(got, " 1]]") {
			t.Errorf("XPENDING: %s", got)
		}
		if got := k.must(t, "XCLAIM "+topic+" g c1 0 "+id); got != "[]" {
			t.Errorf("XCLAIM of a lease: %s", got)
		}
		if got, err := k.do("XGROUP DELCONSUMER " + topic + " g tercet:http"); err != nil || !strings.HasPrefix(got, "-") {
			t.Errorf("DELCONSUMER of the reserved consumer: %s, %v", got, err)
		}
		if a := h.Ack(ctx, topic, "g", ds[0].Receipt); a.Outcome != harness.OK {
			t.Errorf("acknowledge: %v", a)
		}
		if got := k.must(t, "XACK "+topic+" g "+id); got != "0" {
			t.Errorf("XACK of what was acknowledged over HTTP: %s", got)
		}

		// Both take from one group: each message goes to one of them. XACK of a lease fences its receipt out.
		for n := range 20 {
			if p := h.Publish(ctx, topic, fmt.Append(nil, n), nil); p.Outcome != harness.OK {
				t.Fatalf("publish: %v", p)
			}
		}
		read := streamID.FindAllString(k.must(t, "XREADGROUP GROUP g c2 COUNT 12 STREAMS "+topic+" >"), -1)
		ds = receive()
		if len(read) != 12 || len(ds) != 8 {
			t.Fatalf("one was given %d, the other %d", len(read), len(ds))
		}
		leased := streamID.FindAllString(k.must(t, "XPENDING "+topic+" g - + 100 tercet:http"), -1)
		if len(leased) != 8 {
			t.Fatalf("leases: %v", leased)
		}
		if got := k.must(t, "XACK "+topic+" g "+strings.Join(append(leased, read...), " ")); got != "20" {
			t.Errorf("XACK: %s", got)
		}
		if a := h.Ack(ctx, topic, "g", ds[0].Receipt); a.Status != 404 {
			t.Errorf("a receipt whose message was acknowledged by XACK: %v", a)
		}
		if got := k.must(t, "XPENDING "+topic+" g"); got != "[0 nil nil nil]" {
			t.Errorf("XPENDING at the end: %s", got)
		}
	}
	c.EqualHashes()
}
