package clients

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// killLeader kills the leading node with SIGKILL and returns its address. It is started again a second later.
func killLeader(t *testing.T) string {
	t.Helper()
	resp, err := http.Post(os.Getenv("TERCET_CONTROL")+"/kill-leader", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("kill the leader: %s %s, %v", resp.Status, b, err)
	}
	return string(b)
}

// until polls a condition that nothing announces. The deadline is against hanging.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(2 * time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

var idForm = regexp.MustCompile(`\d{10,}-\d+`)

// held are the refusals that an election may cause on a connection that stays: one says that it does not know, the others
// that nothing was done.
var held = regexp.MustCompile(`^(ERR outcome unknown|CLUSTERDOWN|TRYAGAIN)`)

// survivor is a client under which the leader is killed: one that writes and one that waits.
type survivor struct {
	name, addr, stream string
	c, waiting         client

	mu           sync.Mutex
	acknowledged []string
	errors       []error
	got          string // by the one that waits
}

func (k *survivor) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.acknowledged)
}

// TestLeaderKilled kills the leader under every client on every node. Those of other nodes notice nothing: no connection
// breaks, no command fails unless its outcome is unknown, a blocked read goes on. Those of the node itself come back by
// their own means. Nothing that was acknowledged is lost by either.
func TestLeaderKilled(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	var all []*survivor
	for name, connect := range connectors() {
		for i, addr := range nodes(t) {
			k := &survivor{name: fmt.Sprintf("%s node %d", name, i+1), addr: addr}
			k.stream = fmt.Sprintf("{killed-%s-%d-%d}", strings.ReplaceAll(name, " ", "-"), i, time.Now().UnixNano())
			for _, c := range []*client{&k.c, &k.waiting} {
				var err error
				if *c, err = connect(addr); err != nil {
					t.Fatal(err)
				}
				defer (*c).close()
			}
			for _, s := range []string{k.stream, k.stream + ":wait"} {
				if _, err := k.c.do(ctx, "XGROUP", "CREATE", s, "g", "$", "MKSTREAM"); err != nil {
					t.Fatal(k.name, err)
				}
			}
			all = append(all, k)
		}
	}
	stop := make(chan struct{})
	var load, waits sync.WaitGroup
	for _, k := range all {
		load.Go(func() {
			pace := time.NewTicker(20 * time.Millisecond)
			defer pace.Stop()
			for n := 0; ; n++ {
				id, err := k.c.do(ctx, "XADD", k.stream, "*", "n", fmt.Sprint(n))
				k.mu.Lock()
				if err != nil {
					k.errors = append(k.errors, err)
				} else {
					k.acknowledged = append(k.acknowledged, id)
				}
				k.mu.Unlock()
				select {
				case <-pace.C:
				case <-stop:
					return
				}
			}
		})
		waits.Go(func() {
			for ctx.Err() == nil {
				r, err := k.waiting.do(ctx, "XREADGROUP", "GROUP", "g", "c", "BLOCK", "50000", "STREAMS", k.stream+":wait", ">")
				k.mu.Lock()
				if err == nil && r != "nil" {
					k.got = r
				} else {
					k.errors = append(k.errors, fmt.Errorf("XREADGROUP: %s, %w", r, err))
				}
				done := k.got != ""
				k.mu.Unlock()
				if done {
					return
				}
			}
		})
	}
	for _, k := range all {
		until(t, k.name+" to write", func() bool { return k.count() >= 10 })
	}
	killed := killLeader(t)
	for _, k := range all {
		before := k.count()
		until(t, k.name+" to go on", func() bool { return k.count() >= before+20 })
	}
	close(stop)
	load.Wait()
	for _, k := range all {
		id, err := k.c.do(ctx, "XADD", k.stream+":wait", "*", "after", "election")
		if err != nil {
			t.Fatal(k.name, err)
		}
		until(t, k.name+"'s blocked read", func() bool {
			k.mu.Lock()
			defer k.mu.Unlock()
			return k.got != ""
		})
		if !strings.Contains(k.got, id) {
			t.Errorf("%s: the blocked read got %s, not %s", k.name, k.got, id)
		}
	}
	waits.Wait()
	for _, k := range all {
		r, err := k.c.do(ctx, "XRANGE", k.stream, "-", "+")
		if err != nil {
			t.Fatal(k.name, err)
		}
		stored := map[string]bool{}
		for _, id := range idForm.FindAllString(r, -1) {
			stored[id] = true
		}
		for _, id := range k.acknowledged {
			if !stored[id] {
				t.Errorf("%s: %s was acknowledged and is gone", k.name, id)
			}
		}
		if inCluster || k.addr == killed {
			continue // its connection broke, and some clients repeat by themselves what may have happened
		}
		for _, err := range k.errors {
			if !held.MatchString(err.Error()) {
				t.Errorf("%s: %v", k.name, err)
			}
		}
		if len(stored) > len(k.acknowledged)+len(k.errors) {
			t.Errorf("%s: %d stored, %d acknowledged, %d unknown", k.name, len(stored), len(k.acknowledged), len(k.errors))
		}
	}
}
