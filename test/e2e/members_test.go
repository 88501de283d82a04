package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
	"tercet.dev/tercet/test/workload"
)

// The exit code of the command line for what cannot be done as things are.
const exitPrecondition = 4

// A result is what a command printed, and how it ended.
type result struct {
	out, errs string
	code      int
	err       error
}

// command runs the command line to its end.
func command(ctx context.Context, binary string, args ...string) result {
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env = harness.Environment()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); ok && ctx.Err() == nil {
		err = nil
	}
	r := result{out: out.String(), errs: errs.String(), code: -1, err: err}
	if cmd.ProcessState != nil {
		r.code = cmd.ProcessState.ExitCode()
	}
	return r
}

// tercet runs the command line, which has to end within the deadline.
func tercet(t *testing.T, deadline time.Duration, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	r := command(ctx, harness.Binary(t), args...)
	if r.err != nil {
		t.Fatalf("tercet %s: %v\n%s%s", strings.Join(args, " "), r.err, r.out, r.errs)
	}
	return r.out, r.errs, r.code
}

// fill publishes messages of 64 KiB in batches until the topic has been sent this many bytes. header goes on each. A batch
// of unknown outcome is sent again: some messages may be there twice.
func fill(t *testing.T, c *harness.Cluster, topic string, total int64, header map[string]string) {
	t.Helper()
	fillCounting(t, c, topic, total, header, new(atomic.Int64))
}

// fillCounting is fill, and adds the bytes to a counter before they are sent.
func fillCounting(t *testing.T, c *harness.Cluster, topic string, total int64, header map[string]string, sent *atomic.Int64) {
	t.Helper()
	const (
		size = 64 << 10
		per  = 32
	)
	start := time.Now()
	var (
		next   atomic.Int64
		failed atomic.Int64
		wg     sync.WaitGroup
	)
	var alive []*harness.Node
	for _, n := range c.Nodes {
		if n.Alive() {
			alive = append(alive, n)
		}
	}
	for i := range 4 {
		cl := client(t, alive[i%len(alive)])
		wg.Go(func() {
			for {
				n := next.Add(per)
				if (n-per)*size >= total || failed.Load() > 100 || t.Context().Err() != nil {
					return
				}
				var bodies [][]byte
				for j := range int64(per) {
					bodies = append(bodies, workload.Body(fmt.Sprintf("%s-%d", topic, n-per+j), size))
				}
				sent.Add(per * size)
				for {
					_, a := cl.BatchWith(t.Context(), topic, bodies, func(int) map[string]string { return header })
					if a.Outcome == harness.OK {
						break
					}
					if failed.Add(1) > 100 || t.Context().Err() != nil {
						t.Errorf("fill %s, after 100 batches that were not taken: %v", topic, a)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	t.Logf("published %d MiB in %v", total>>20, time.Since(start).Round(time.Millisecond))
}

// TestReplaceNode wipes a node and replaces it under load. The wiped node under its old identity is refused, with
// the way out; the new one gets a snapshot, and in the end the three states are one.
func TestReplaceNode(t *testing.T) {
	seed := harness.Seed(t)
	c := harness.Start(t, harness.Options{})
	size := harness.Scale(int64(256<<20), 1200<<20)
	fill(t, c, "ballast", size, nil)
	load := workload.Start(t, c, workload.Options{Seed: seed})
	load.WaitPublished(100)
	for round, leads := range []bool{false, true} {
		followers, victim := c.Followers()
		if !leads {
			victim = followers[int(seed%2)]
		}
		before, err := victim.Status()
		if err != nil {
			t.Fatal(err)
		}
		load.Recorder.Mark("kill and wipe %s", victim.ID)
		victim.Kill()
		victim.Wipe()
		c.WaitInSync(zonesWithout(c, victim)...)

		// Under its old identity it does not get in.
		victim.Start()
		code, err := victim.Process().WaitExit(15 * time.Second)
		if err != nil {
			t.Fatalf("a wiped node under its old identity: %v", err)
		}
		if code != exitPrecondition {
			t.Errorf("a wiped node under its old identity exits with %d, want %d", code, exitPrecondition)
		}
		if log := victim.Process().Log(); !strings.Contains(log, "cluster replace "+victim.ID) {
			t.Errorf("the refusal does not name the remedy, `tercet cluster replace %s …`", victim.ID)
		}
		victim.Wipe() // whatever the refused start has left
		load.WaitPublished(100)

		// As the refusal says.
		took := replace(t, c, victim)
		after, err := victim.Status()
		if err != nil {
			t.Fatal(err)
		}
		if after.Incarnation == before.Incarnation {
			t.Errorf("the replaced %s has its old incarnation %s", victim.ID, after.Incarnation)
		}
		load.WaitPublished(100)
		t.Logf("round %d: %s replaced and in sync after %v, with %d MiB on its disk", round, victim.ID, took.Round(time.Millisecond), victim.DataBytes()>>20)
		if got := victim.DataBytes(); got < size/2 {
			t.Errorf("the replaced node holds %d MiB of a state of %d MiB", got>>20, size>>20)
		}
	}
	_, r := load.Finish()
	c.EqualHashes()
	valid(t, r, 400)

	// The state that came by snapshot is also the one that a restart finds.
	for _, n := range c.Nodes {
		n.Kill()
		n.Start()
	}
	c.WaitInSync(c.Zones()...)
	c.EqualHashes()
}
