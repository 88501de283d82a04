package raft

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

// everyCommand returns a sample of each command of the engine, of which the golden vectors hold at least one, by name.
func everyCommand(t *testing.T) (names []string, commands map[string][]byte) {
	t.Helper()
	f, err := os.Open("../engine/testdata/golden.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	commands = make(map[string][]byte)
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), " = ")
		if name, command := strings.CutPrefix(name, "command "); ok && command {
			raw, err := hex.DecodeString(value)
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, name)
			commands[name] = raw
		}
	}
	if err := lines.Err(); err != nil || len(names) < 40 {
		t.Fatalf("%d commands: %v", len(names), err)
	}
	return names, commands
}

// Decision 15: two releases run side by side, while one node after the other is brought to the newer one, and back again.
// In each mixture every command goes through every node and is carried out as in any other, the cluster stays at the older
// one's level, and all states agree. The newer release is played by nodes that claim to know a level more; there is no
// older one to run.
func TestMixedReleases(t *testing.T) {
	names, commands := everyCommand(t)
	older, newer := engine.LevelMax(), engine.LevelMax()+1
	var mu sync.Mutex
	claims := map[string]uint32{"n1": older, "n2": older, "n3": older}
	c := newCluster(t, func(cfg *Config) {
		mu.Lock()
		defer mu.Unlock()
		claim := claims[cfg.Name]
		cfg.test.levelMax = &claim
		cfg.VirtualClock = true // a command of its own
	})
	c.start(founders...)
	c.inSync(3)
	codes := make(map[string]errs.Code)
	mixtures := 0
	everything := func() {
		t.Helper()
		mixtures++
		lead := c.leader()
		for _, via := range founders {
			for _, name := range names {
				r, err := c.node(via).Propose(testContext(t), Proposal{Command: commands[name]})
				code := r.Code
				if err != nil {
					code = errs.CodeOf(err)
					if errs.From(err).Outcome() != errs.None {
						t.Fatalf("mixture %d, %s through %s: %v", mixtures, name, via, err)
					}
				}
				if code == errs.Unsupported {
					t.Errorf("mixture %d, led by %s: %s through %s is not supported", mixtures, lead, name, via)
				}
				// What is proposed by an older and by a newer node, to an older and to a newer leader, comes to the same, as
				// far as it does not hang on what was there before.
				key := name + " through " + via
				if first, known := codes[key]; known && first == errs.BadRequest != (code == errs.BadRequest) {
					t.Errorf("mixture %d: %s: %v, and %v before", mixtures, key, code, first)
				}
				codes[key] = code
			}
			must(t, c.node(via), Proposal{Command: publishCommand(fmt.Sprint("mixture-", mixtures), "through "+via)})
		}
		for _, n := range c.all() {
			if level := n.Status().Level; level != older {
				t.Fatalf("mixture %d: %s is at level %d", mixtures, n.cfg.Name, level)
			}
		}
		c.agree()
	}
	restart := func(name string, level uint32) {
		t.Helper()
		if err := c.node(name).Drain(testContext(t)); err != nil {
			t.Fatal(err)
		}
		c.stop(name)
		mu.Lock()
		claims[name] = level
		mu.Unlock()
		c.start(name)
		c.inSync(3)
	}
	everything()
	for _, name := range []string{"n1", "n2"} {
		restart(name, newer)
		everything()
	}
	for _, lead := range []string{"n1", "n3"} { // a newer leader, and an older one
		if err := c.node("n2").TransferLeadership(testContext(t), lead); err != nil {
			t.Fatal(err)
		}
		everything()
	}
	// While one node runs the older release there is nothing to finalize, and nothing breaks by trying.
	if err := c.node("n1").Finalize(testContext(t)); err != nil && errs.CodeOf(err) != errs.Precondition {
		t.Fatal(err)
	}
	for _, name := range []string{"n1", "n2"} {
		restart(name, older)
		everything()
	}
	got := must(t, c.node("n3"), Proposal{Command: receiveCommand(fmt.Sprint("mixture-", mixtures), "g", 10)})
	if len(got.Deliveries) == 0 { // a flush is one of the commands, so that only the last publish is certain to be there
		t.Error("the last publish is not there")
	}
}
