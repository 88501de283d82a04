package compat

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/compat/internal/redistest"
)

// twoShards is an upstream of two shards whose answers a test gives: first the one called a:1 has all slots.
type twoShards struct {
	asked chan shardCommand
	over  <-chan struct{} // closed when the test ends
	mu    sync.Mutex
	owner string
}

// shardCommand is a command that arrived at a shard. Nothing else arrives over its connection before it is answered.
type shardCommand struct {
	shard, words string
	answer       chan string
}

func (u *twoShards) Session(_ context.Context, addr string, _ int) (net.Conn, error) {
	near, far := net.Pipe()
	go func() {
		defer far.Close()
		r := bufio.NewReader(far)
		for {
			words, err := readReply(r)
			if err != nil {
				return
			}
			c := shardCommand{addr, strings.ReplaceAll(words, "\r\n", " "), make(chan string, 1)}
			u.asked <- c
			select {
			case answer := <-c.answer:
				if _, err := io.WriteString(far, answer+"\r\n"); err != nil {
					return
				}
			case <-u.over:
				return
			}
		}
	}()
	return near, nil
}

func (u *twoShards) Login(context.Context) ([]string, time.Duration, error) { return nil, 0, nil }

func (u *twoShards) KeyTable(context.Context) (map[string]UpstreamCommand, error) {
	return map[string]UpstreamCommand{"set": {Arity: -3, First: 1, Last: 1, Step: 1}}, nil
}

func (u *twoShards) Shards(context.Context, []string) ([]UpstreamShard, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return []UpstreamShard{{Addr: u.owner, Slots: [][2]int{{0, slotCount - 1}}}}, nil
}

func (u *twoShards) String() string { return "two shards" }

// TestPassThroughOrder redirects a client's command after the client has sent another one on the same key, which another
// client's redirection would send to the new shard right away: there the first one comes first (U1).
func TestPassThroughOrder(t *testing.T) {
	up := &twoShards{owner: "a:1", asked: make(chan shardCommand, 16), over: t.Context().Done()}
	s, addr := start(t, Options{Upstream: up, UpstreamKeep: []string{"order*"}})
	arrives := func(shard, value string) shardCommand {
		t.Helper()
		var c shardCommand
		select {
		case c = <-up.asked:
		case <-time.After(2 * time.Minute):
			t.Fatalf("%q does not arrive at %s", value, shard)
		}
		if c.shard != shard || !strings.HasSuffix(c.words, " "+value+" ") {
			t.Fatalf("at %s arrives %q, want the one with %q at %s", c.shard, c.words, value, shard)
		}
		return c
	}
	one, two := dial(t, addr), dial(t, addr)
	one.send("SET", "k", "first")
	first := arrives("a:1", "first")
	two.send("SET", "k", "other")
	moved := fmt.Sprintf("-MOVED %d b:2", keySlot([]byte("k")))
	up.mu.Lock()
	up.owner = "b:2"
	up.mu.Unlock()
	arrives("a:1", "other").answer <- moved
	arrives("b:2", "other").answer <- "+OK"
	if got := two.reply(); got != "+OK" {
		t.Fatalf("the other client's answer: %s", got)
	}
	// From here on every client knows of the new shard. The second command either waits for the first one's answer, or is
	// there already.
	one.send("SET", "k", "second")
	redistest.Until(t, 30*time.Second, "the second command", func() error {
		if len(up.asked) > 0 {
			return nil
		}
		s.clients.mu.Lock()
		defer s.clients.mu.Unlock()
		for _, c := range s.clients.byID {
			c.mu.Lock()
			waits := c.waiting
			c.mu.Unlock()
			if waits {
				return nil
			}
		}
		return fmt.Errorf("is not seen")
	})
	first.answer <- moved
	arrives("b:2", "first").answer <- "+OK"
	arrives("b:2", "second").answer <- "+OK"
	for range 2 {
		if got := one.reply(); got != "+OK" {
			t.Errorf("the client's answer: %s", got)
		}
	}
}
