package bridge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/valkey-io/valkey-go"

	"tercet.dev/tercet/compat/gateway"
	"tercet.dev/tercet/compat/internal/redistest"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/test/harness"
)

// nodes is the address of a whole cluster.
func nodes(c *harness.Cluster) string {
	var all []string
	for _, n := range c.Nodes {
		all = append(all, n.Valkey)
	}
	return strings.Join(all, ",")
}

// reach connects to an address and finds whoever serves there from then on.
func reach(t *testing.T, addr string) *gateway.Upstream {
	t.Helper()
	target, err := gateway.ParseTarget(addr, "")
	if err != nil {
		t.Fatal(err)
	}
	target.Mode = gateway.Single
	u, err := gateway.Connect(target, hclog.NewNullLogger())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(u.Close)
	return u
}

// producer appends numbered entries and notes which of them were confirmed. Those without an answer may be there or not.
type producer struct {
	to       *gateway.Upstream
	replicas int // that have to confirm
	done     chan struct{}

	mu        sync.Mutex
	enough    bool
	copied    int // so long was the copy when somebody last looked
	confirmed map[string]bool
}

// produce appends until it is enough and so many entries are confirmed.
func produce(t *testing.T, addr string, replicas, total int) *producer {
	p := &producer{to: reach(t, addr), replicas: replicas, done: make(chan struct{}), confirmed: make(map[string]bool)}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() {
		cancel()
		<-p.done
	})
	go func() {
		defer close(p.done)
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for from := 0; !p.over(total) && ctx.Err() == nil; from += 100 {
			for p.ahead(total/4) && ctx.Err() == nil { // it does not leave the bridge behind for good
				<-tick.C
			}
			_ = p.append(ctx, from, 100) // those numbers are not used again
		}
	}()
	return p
}

func (p *producer) over(total int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.enough && len(p.confirmed) >= total
}

func (p *producer) ahead(by int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.enough && len(p.confirmed) > p.copied+by
}

func (p *producer) saw(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.copied = n
}

// finish waits until the producer has done its part.
func (p *producer) finish() {
	p.mu.Lock()
	p.enough = true
	p.mu.Unlock()
	<-p.done
}

func (p *producer) append(ctx context.Context, from, n int) error {
	return p.to.Use(func(client valkey.Client) error {
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		c, release := client.Dedicate()
		defer release()
		cmds := make([]valkey.Completed, 0, n+1)
		for i := range n {
			cmds = append(cmds, c.B().Xadd().Key("orders").Id("*").FieldValue().FieldValue("n", strconv.Itoa(from+i)).FieldValue("text", "some more").Build())
		}
		if p.replicas > 0 {
			cmds = append(cmds, c.B().Wait().Numreplicas(int64(p.replicas)).Timeout(2000).Build())
		}
		answers := c.DoMulti(ctx, cmds...)
		if p.replicas > 0 {
			if got, err := answers[n].AsInt64(); err != nil || got < int64(p.replicas) {
				return errors.Join(err, fmt.Errorf("%d replicas", got))
			}
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		for i, a := range answers[:n] {
			if err := a.Error(); err != nil {
				return err
			}
			p.confirmed[strconv.Itoa(from+i)] = true
		}
		return nil
	})
}

// consume reads with a group and acknowledges most of what it gets, until ctx ends.
func consume(ctx context.Context, u *gateway.Upstream, rnd *rand.Rand) {
	for ctx.Err() == nil {
		_ = u.Use(func(c valkey.Client) error {
			err := c.Do(ctx, c.B().XgroupCreate().Key("orders").Group("billing").Id("0").Mkstream().Build()).Error()
			if err != nil && !strings.HasPrefix(err.Error(), "BUSYGROUP") {
				return err
			}
			got, err := c.Do(ctx, c.B().Xreadgroup().Group("billing", "alice").Count(50).Block(100).Streams().Key("orders").Id(">").Build()).AsXRead()
			if err != nil {
				return err
			}
			var ids []string
			for _, e := range got["orders"] {
				if rnd.IntN(10) > 0 {
					ids = append(ids, e.ID)
				}
			}
			if len(ids) == 0 {
				return nil
			}
			return c.Do(ctx, c.B().Xack().Key("orders").Group("billing").Id(ids...).Build()).Error()
		})
	}
}

// ask runs a command, again and again until it is answered.
func ask(t *testing.T, u *gateway.Upstream, words ...string) (r valkey.ValkeyResult) {
	t.Helper()
	redistest.Until(t, 60*time.Second, strings.Join(words, " "), func() error {
		return u.Use(func(c valkey.Client) error {
			r = c.Do(t.Context(), c.B().Arbitrary(words...).Build())
			return r.Error()
		})
	})
	return r
}

// length is the length of the stream.
func length(t *testing.T, u *gateway.Upstream) int {
	t.Helper()
	n, err := ask(t, u, "XLEN", "orders").AsInt64()
	if err != nil {
		t.Fatal(err)
	}
	return int(n)
}

// numbers reads the whole stream and counts each number.
func numbers(t *testing.T, u *gateway.Upstream) map[string]int {
	t.Helper()
	all := make(map[string]int)
	from := "-"
	for {
		es, err := ask(t, u, "XRANGE", "orders", from, "+", "COUNT", "2000").AsXRange()
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range es {
			all[e.FieldValues["n"]]++
			from = "(" + e.ID
		}
		if len(es) == 0 {
			return all
		}
	}
}

// group is all that is known about the group: position and pending entries with owners and counts.
func group(t *testing.T, u *gateway.Upstream) string {
	t.Helper()
	var b strings.Builder
	rows, err := ask(t, u, "XINFO", "GROUPS", "orders").ToArray()
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range rows {
		m, err := row.ToMap()
		if err != nil {
			t.Fatal(err)
		}
		name, position := m["name"], m["last-delivered-id"]
		fmt.Fprintln(&b, name.String(), position.String())
	}
	from := "-"
	for {
		rows, err := ask(t, u, "XPENDING", "orders", "billing", from, "+", "1000").ToArray()
		if err != nil {
			t.Fatal(err)
		}
		for _, row := range rows {
			parts, err := row.ToArray()
			if err != nil {
				t.Fatal(err)
			}
			id, _ := parts[0].ToString()
			consumer, _ := parts[1].ToString()
			count, _ := parts[3].AsInt64()
			fmt.Fprintln(&b, id, consumer, count)
			from = "(" + id
		}
		if len(rows) == 0 {
			return b.String()
		}
	}
}

// process runs `tercet bridge` until it is killed, and starts it again.
type process struct {
	t    *testing.T
	args []string
	p    *harness.Process
	dir  string
}

func (b *process) start(args ...string) {
	b.t.Helper()
	b.p = harness.StartProcess(b.t, filepath.Join(b.dir, "bridge.log"), b.dir, nil,
		append(append([]string{harness.Binary(b.t), "bridge", "--log-level", "info"}, b.args...), args...)...)
}

func (b *process) kill() {
	b.t.Helper()
	if !b.p.Alive() {
		b.t.Fatalf("the bridge ended by itself:\n%s", b.p.Log())
	}
	b.p.Kill()
}

// finish lets a bridge copy what is left.
func (b *process) finish() {
	b.t.Helper()
	b.kill()
	b.start("--once")
	if code, err := b.p.WaitExit(5 * time.Minute); err != nil || code != 0 {
		b.t.Fatalf("the last bridge: %d %v\n%s", code, err, b.p.Log())
	}
}

// disturb carries out events one after the other, evenly spread over the growth of the copy.
func disturb(t *testing.T, p *producer, copied *gateway.Upstream, bridge *process, rnd *rand.Rand, total int, events ...func()) {
	t.Helper()
	step := total / (len(events) + 1)
	for i, event := range events {
		goal := i*step + step/2 + rnd.IntN(step)
		redistest.Until(t, 10*time.Minute, "the copy to grow", func() error {
			if !bridge.p.Alive() {
				t.Fatalf("the bridge ended by itself:\n%s", bridge.p.Log())
			}
			n := 0
			err := copied.Use(func(c valkey.Client) error {
				got, err := c.Do(t.Context(), c.B().Xlen().Key("orders").Build()).AsInt64()
				n = int(got)
				return err
			})
			if err == nil {
				p.saw(n)
			}
			if err != nil || n < goal {
				return fmt.Errorf("%d of %d: %w", n, goal, err)
			}
			return nil
		})
		event()
	}
}

// once checks that the copy has every confirmed entry, and none twice.
func once(t *testing.T, confirmed map[string]bool, found map[string]int) {
	t.Helper()
	lost, doubled := 0, 0
	for n := range confirmed {
		if found[n] == 0 {
			lost++
		}
	}
	for _, k := range found {
		if k > 1 {
			doubled++
		}
	}
	if lost+doubled > 0 {
		t.Errorf("of %d confirmed entries %d are lost; %d are there twice", len(confirmed), lost, doubled)
	}
	t.Logf("%d entries confirmed, %d in the copy", len(confirmed), len(found))
}

// TestRedisToCluster copies from a real server to three Tercet processes while the bridge, the leader and the source's
// primary are killed: what the source confirmed is there once, and the group is where it is at the source.
func TestRedisToCluster(t *testing.T) {
	rnd := seed(t)
	total := harness.Scale(20_000, 1_000_000)
	cluster := harness.Start(t, harness.Options{})
	primary := redistest.Start(t)
	replica := redistest.Replica(t, primary)
	name := redistest.NewEndpoint(t, primary.Addr())
	copied := reach(t, nodes(cluster))

	p := produce(t, name.Addr(), 1, total)
	ctx, stop := context.WithCancel(t.Context())
	var consumer sync.WaitGroup
	reading := reach(t, name.Addr())
	consumer.Go(func() { consume(ctx, reading, rand.New(rand.NewPCG(1, 2))) })
	t.Cleanup(consumer.Wait)
	t.Cleanup(stop)

	b := &process{t: t, dir: t.TempDir(), args: []string{"--from", name.Addr(), "--to", nodes(cluster), "--stream", "orders"}}
	b.start()
	again := func() {
		b.kill()
		b.start()
	}
	var killed *harness.Node
	killLeader := func() {
		_, killed = cluster.Followers()
		killed.Kill()
	}
	revive := func() {
		killed.Start()
		cluster.WaitInSync(cluster.Zones()...)
	}
	failover := func() { primary, replica = replica, redistest.Promote(t, name, primary, replica) }
	disturb(t, p, copied, b, rnd, total, again, killLeader, revive, again, failover, again, killLeader, again, revive, failover, again)
	p.finish()
	stop()
	consumer.Wait()
	b.finish()
	once(t, p.confirmed, numbers(t, copied))
	sameGroup(t, reach(t, name.Addr()), copied)
	cluster.EqualHashes()
}

// TestClusterToRedis copies from three Tercet processes to a real server while the bridge, the leader and the receiving
// primary are killed. The replica that is promoted may lack the end of the copy: the bridge copies it again.
func TestClusterToRedis(t *testing.T) {
	rnd := seed(t)
	total := harness.Scale(20_000, 1_000_000)
	cluster := harness.Start(t, harness.Options{})
	primary := redistest.Start(t)
	replica := redistest.Replica(t, primary)
	name := redistest.NewEndpoint(t, primary.Addr())
	copied := reach(t, name.Addr())

	p := produce(t, nodes(cluster), 0, total)
	ctx, stop := context.WithCancel(t.Context())
	var consumer sync.WaitGroup
	reading := reach(t, nodes(cluster))
	consumer.Go(func() { consume(ctx, reading, rand.New(rand.NewPCG(1, 2))) })
	t.Cleanup(consumer.Wait)
	t.Cleanup(stop)

	b := &process{t: t, dir: t.TempDir(), args: []string{"--from", nodes(cluster), "--to", name.Addr(), "--stream", "orders"}}
	b.start()
	again := func() {
		b.kill()
		b.start()
	}
	var killed *harness.Node
	killLeader := func() {
		_, killed = cluster.Followers()
		killed.Kill()
	}
	revive := func() {
		killed.Start()
		cluster.WaitInSync(cluster.Zones()...)
	}
	// The replica is cut off for a while first, so that it is certain to be behind.
	behind := func() {
		replica.Do("REPLICAOF", "127.0.0.1", "1")
		from := length(t, copied)
		redistest.Until(t, time.Minute, "the copy to grow without its replica", func() error {
			n := length(t, copied)
			p.saw(n)
			if n == from {
				return fmt.Errorf("still %d", n)
			}
			return nil
		})
		primary, replica = replica, redistest.Promote(t, name, primary, replica)
	}
	disturb(t, p, copied, b, rnd, total, again, killLeader, revive, behind, again, killLeader, again, revive, again)
	p.finish()
	stop()
	consumer.Wait()
	b.finish()
	if !strings.Contains(b.p.Log(), "lost the end of the copy") {
		t.Error("no bridge met a copy that had gone back: the test shows nothing")
	}
	source := numbers(t, reach(t, nodes(cluster)))
	found := numbers(t, copied)
	once(t, p.confirmed, found)
	if len(source) != len(found) {
		t.Errorf("the source has %d entries, the copy %d", len(source), len(found))
	}
	sameGroup(t, reach(t, nodes(cluster)), copied)
}

// sameGroup compares the group on both sides.
func sameGroup(t *testing.T, source, copied *gateway.Upstream) {
	t.Helper()
	here, there := strings.Split(group(t, source), "\n"), strings.Split(group(t, copied), "\n")
	if len(here) < 10 {
		t.Errorf("the group shows nothing: %q", here)
	}
	for i := range max(len(here), len(there)) {
		a, b := "nothing", "nothing"
		if i < len(here) {
			a = here[i]
		}
		if i < len(there) {
			b = there[i]
		}
		if a != b {
			t.Errorf("of %d lines about the group, %d in the copy, line %d is %q at the source and %q in the copy", len(here), len(there), i, a, b)
			return
		}
	}
}

// migration runs `tercet bridge migrate` until it says that the clients may be switched, lets f stop them, and lets it end.
func migration(t *testing.T, from, to string, f func()) (sums []migratedLine) {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command(harness.Binary(t), "bridge", "migrate", "--from", from, "--to", to, "--stream", "orders", "-o", "json")
	cmd.Env = harness.Environment()
	cmd.Dir = dir
	var said lockedBuffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	read := make(chan error, 1)
	go func() {
		dec := json.NewDecoder(out)
		for {
			var m migratedLine
			if err := dec.Decode(&m); err != nil {
				read <- err
				return
			}
			sums = append(sums, m)
		}
	}()
	redistest.Until(t, 5*time.Minute, "the migration to say when to switch", func() error {
		if s := said.String(); !strings.Contains(s, "To switch: stop the clients") {
			return errors.New(s)
		}
		return nil
	})
	f()
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	<-read // its output has ended, and so has it
	if err := cmd.Wait(); err != nil || !strings.Contains(said.String(), "Done: start the clients at") {
		t.Fatalf("the migration ended with %v:\n%s", err, said.String())
	}
	return sums
}

type migratedLine struct {
	SourceEntries, CopyEntries int
	Equal                      bool
}

// lockedBuffer is written by one goroutine and read by another.
type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestMigrateAndBack moves a stream under load to three Tercet processes, and back, and forth once more: at each switch all
// entries are on the other side, and the group goes on where it was.
func TestMigrateAndBack(t *testing.T) {
	cluster := harness.Start(t, harness.Options{})
	server := redistest.Start(t)
	sides := []string{server.Addr(), nodes(cluster)}
	confirmed := make(map[string]bool)
	start := 0
	for round := range 3 {
		from, to := sides[round%2], sides[(round+1)%2]
		source := reach(t, from)
		p := &producer{to: source, confirmed: confirmed}
		ctx, stop := context.WithCancel(t.Context())
		var clients sync.WaitGroup
		clients.Go(func() {
			for ctx.Err() == nil {
				if err := p.append(context.WithoutCancel(ctx), start, 20); err != nil {
					t.Error(err)
				}
				start += 20
			}
		})
		clients.Go(func() { consume(ctx, source, rand.New(rand.NewPCG(1, uint64(round)))) })
		t.Cleanup(stop)
		sums := migration(t, from, to, func() {
			stop()
			clients.Wait()
		})
		if len(sums) != 2 || !sums[0].Equal || !sums[1].Equal || sums[1].SourceEntries != len(confirmed) || sums[1].CopyEntries != len(confirmed) {
			t.Fatalf("round %d: compared %+v, want %d entries", round, sums, len(confirmed))
		}
		once(t, confirmed, numbers(t, reach(t, to)))
		sameGroup(t, source, reach(t, to))
	}
}

// TestTooLarge copies an entry that the cluster does not take: the copy ends right before it, and says so each time.
func TestTooLarge(t *testing.T) {
	cluster := harness.Start(t, harness.Options{})
	server := redistest.Start(t)
	c := server.Client()
	fill(t, c, "orders", 0, 50)
	if err := c.Do(t.Context(), c.B().Xadd().Key("orders").Id("*").FieldValue().FieldValue("large", strings.Repeat("x", limits.FieldsBytesMax)).Build()).Error(); err != nil {
		t.Fatal(err)
	}
	fill(t, c, "orders", 50, 50)
	copied := reach(t, nodes(cluster))
	for range 2 {
		to, err := gateway.ParseTarget(nodes(cluster), "")
		if err != nil {
			t.Fatal(err)
		}
		b, err := Open(t.Context(), Options{From: target(server), To: to, Stream: "orders"})
		if err != nil {
			t.Fatal(err)
		}
		err = b.Run(t.Context(), false)
		b.Close()
		if err == nil || !strings.Contains(err.Error(), "the copy ends before it") && !strings.Contains(err.Error(), "receiving side: ") {
			t.Fatalf("the bridge ended with %v", err)
		}
		t.Log(err)
		if n := length(t, copied); n != 50 {
			t.Fatalf("the copy has %d entries, want the 50 before the large one", n)
		}
	}
}

// TestUnchangedPosition carries a change of a group out although nothing else in the record changes and the connection is
// new: the record of the transaction before must not be taken for its own.
func TestUnchangedPosition(t *testing.T) {
	from, to := redistest.Start(t), redistest.Start(t)
	fill(t, from.Client(), "orders", 0, 10)
	from.Do("XGROUP", "CREATE", "orders", "billing", "0")
	from.Do("XREADGROUP", "GROUP", "billing", "alice", "COUNT", "5", "STREAMS", "orders", ">")
	b, err := Open(t.Context(), Options{From: target(from), To: target(to), Stream: "orders", Groups: true})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	from.Do("XACK", "orders", "billing", strings.Fields(from.Do("XPENDING", "orders", "billing", "-", "+", "1"))[0])
	b.writer.release()
	if err := b.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if here, there := from.Do("XPENDING", "orders", "billing"), to.Do("XPENDING", "orders", "billing"); here != there {
		t.Errorf("pending at the source %q, in the copy %q", here, there)
	}
}

// TestGroupTakenOver lets a consumer at the receiving side read from a group: the bridge leaves it alone from then on.
func TestGroupTakenOver(t *testing.T) {
	from, to := redistest.Start(t), redistest.Start(t)
	fill(t, from.Client(), "orders", 0, 10)
	from.Do("XGROUP", "CREATE", "orders", "billing", "0")
	from.Do("XREADGROUP", "GROUP", "billing", "alice", "COUNT", "2", "STREAMS", "orders", ">")
	for range 3 { // the second and third bridge know it from the record
		b, err := Open(t.Context(), Options{From: target(from), To: target(to), Stream: "orders", Groups: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Run(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		b.Close()
		if to.Do("XPENDING", "orders", "billing", "-", "+", "10", "carol") == "" {
			to.Do("XREADGROUP", "GROUP", "billing", "carol", "COUNT", "3", "STREAMS", "orders", ">")
		}
		from.Do("XREADGROUP", "GROUP", "billing", "alice", "COUNT", "1", "STREAMS", "orders", ">")
	}
	if got := to.Do("XPENDING", "orders", "billing"); !strings.HasPrefix(got, "5\n") || !strings.Contains(got, "carol\n3") || !strings.Contains(got, "alice\n2") {
		t.Errorf("pending in the copy: %q, want alice's two that were carried along and carol's three", got)
	}
}

// TestSourceWentBack loses entries at the source that had been copied: they stay, and what comes after them is copied. An
// entry that the source puts before them cannot be, and is not passed over.
func TestSourceWentBack(t *testing.T) {
	from, to := redistest.Start(t), redistest.Start(t)
	for i := range 5 {
		from.Do("XADD", "orders", fmt.Sprintf("%d-1", 10*(i+1)), "n", strconv.Itoa(i))
	}
	b, err := Open(t.Context(), Options{From: target(from), To: target(to), Stream: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	from.Do("DEL", "orders")
	from.Do("XADD", "orders", "30-1", "n", "2")
	if err := b.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if !b.shorter {
		t.Error("nobody noticed")
	}
	from.Do("XADD", "orders", "60-1", "n", "6")
	if err := b.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if n := to.Do("XLEN", "orders"); n != "6" || b.shorter {
		t.Errorf("%s entries are in the copy, want the five and the new one; %v", n, b.shorter)
	}
	from.Do("DEL", "orders")
	from.Do("XADD", "orders", "45-1", "n", "other")
	if err := b.Run(t.Context(), false); err == nil || !strings.Contains(err.Error(), "entry 45-1 cannot follow 60-1") {
		t.Errorf("an entry in the copy's past: %v", err)
	}
}

// TestNothingThere copies a stream that does not exist: it is said, and is no difference.
func TestNothingThere(t *testing.T) {
	from, to := redistest.Start(t), redistest.Start(t)
	var log strings.Builder
	b, err := Open(t.Context(), Options{From: target(from), To: target(to), Stream: "ordres", Logger: hclog.New(&hclog.LoggerOptions{Output: &log})})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "the source has no entries under this name: stream=ordres") || strings.Contains(log.String(), "ends before") {
		t.Errorf("the log: %q", log.String())
	}
}

// TestRefusedInTheMiddle lets an entry be refused while those around it are taken: what follows it is taken back.
func TestRefusedInTheMiddle(t *testing.T) {
	from, to := redistest.Start(t), redistest.Start(t)
	fill(t, from.Client(), "orders", 0, 100)
	b, err := Open(t.Context(), Options{From: target(from), To: target(to), Stream: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.Run(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	at := b.Place
	es := []entry{{"99999999999999-1", []string{"a", "1"}}, {"99999999999998-1", []string{"refused", "2"}}, {"99999999999999-2", []string{"b", "3"}}}
	if err := b.store(t.Context(), es); err == nil || !strings.Contains(err.Error(), "the copy ends before it") {
		t.Fatalf("stored: %v", err)
	}
	if got := to.Do("XREVRANGE", "orders", "+", "-", "COUNT", "1"); !strings.HasPrefix(got, at) && !strings.HasPrefix(got, "99999999999999-1") || strings.Contains(got, "b") {
		t.Errorf("the newest entry is %s", got)
	}
	rec, err := parseRecord(to.Do("GET", b.place))
	if err != nil || rec.Place != "99999999999999-1" || rec.Copied != 101 {
		t.Errorf("the record says %+v %v", rec, err)
	}
	if got := strings.Count(to.Do("XRANGE", "orders", rec.Place, "+"), "99999999999999-"); got != 1 {
		t.Errorf("%d entries are left of the transaction, want the one before the refused", got)
	}
}
