package engine

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// packFiles returns the sizes of the packs in the engine's directory.
func packFiles(t *testing.T, l *testLog) map[uint64]int64 {
	t.Helper()
	out := map[uint64]int64{}
	dir := l.o.FS.PathJoin(l.o.Dir, generationName(1))
	names, err := l.o.FS.List(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		n, ok := packNumber(name)
		if !ok {
			continue
		}
		st, err := l.o.FS.Stat(l.o.FS.PathJoin(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		out[n] = st.Size()
	}
	return out
}

func packTotal(t *testing.T, l *testLog) (n int64) {
	t.Helper()
	for _, size := range packFiles(t, l) {
		n += size
	}
	return n
}

// drain receives and returns the bodies that a new group is given.
func drain(t *testing.T, l *testLog, topic, group string) map[string]int {
	t.Helper()
	out := map[string]int{}
	for {
		ds := l.apply(&Receive{Topic: topic, Group: group, Max: 10, Visibility: time.Hour})[0].Deliveries
		if len(ds) == 0 {
			return out
		}
		if err := l.e.Load(ds); err != nil {
			t.Fatal(err)
		}
		for i := range ds {
			out[string(ds[i].Body)]++
		}
	}
}

// TestBlocksAreRewritten: a pack of which less than a quarter is alive is rewritten at a checkpoint, and nobody
// notices but for the room it took: what lives is given, and every hash is that of a node that rewrites nothing.
func TestBlocksAreRewritten(t *testing.T) {
	l := openTest(t, Options{FS: vfs.NewMem(), RecentBytes: -1, packBytes: 16 << 10, Spawn: beside})
	twin := openTest(t, Options{FS: vfs.NewMem(), RecentBytes: -1, packBytes: 1 << 30})
	both := func(f func(l *testLog)) {
		f(l)
		f(twin)
		if a, b := l.fullHash(), twin.fullHash(); a != b {
			t.Fatalf("hash is %x, that of the node that rewrites nothing %x", a, b)
		}
	}
	want := map[string]int{}
	entry := func(i int) []NewMessage {
		var ms []NewMessage
		for k := range 10 {
			body := fmt.Sprintf("%04d-%d-%s", i, k, strings.Repeat("x", 1000))
			m := messages(10*time.Second, body)[0]
			if k == i%10 {
				m.Retention = time.Hour
				want[body] = 1
			}
			ms = append(ms, m)
		}
		return ms
	}
	for i := range 30 {
		both(func(l *testLog) { l.apply(&Publish{Topic: "t", Messages: entry(i)}) })
	}
	both(func(l *testLog) { l.checkpoint() })
	before, untouched := packTotal(t, l), packTotal(t, twin)
	both(func(l *testLog) { l.pass(20 * time.Second); l.apply(&Tick{}) })
	// What lives may be rewritten now: enough was appended.
	both(func(l *testLog) { l.checkpoint() })
	after := packTotal(t, l)
	if alive := int64(30 * 1010); after > 2*alive+l.o.packBytes { // the current pack stays
		t.Fatalf("%d bytes in packs before, %d after the checkpoint, %d of messages live", before, after, alive)
	}
	if n := packTotal(t, twin); n < untouched {
		t.Fatalf("the twin rewrote as well: %d bytes", n)
	}
	both(func(l *testLog) {
		for body, n := range drain(t, l, "t", "g") {
			if n != 1 || want[body] != 1 {
				t.Fatalf("%.12q came %d times", body, n)
			}
		}
	})
	if n := l.e.groups[0].live; n != 30 {
		t.Fatalf("%d messages were given", n)
	}
	l.close()
	twin.close()
	l.open()
	if got := drain(t, l, "t", "i"); len(got) != 30 {
		t.Fatalf("%d messages came after a restart", len(got))
	}
	l.close()
}

// TestPacksGo: packs are removed when everything in them has expired, and also when something removed what would have
// lived on.
func TestPacksGo(t *testing.T) {
	l := openTest(t, Options{FS: vfs.NewMem(), RecentBytes: -1, packBytes: 16 << 10, Spawn: beside})
	fill := func(topic string, retention time.Duration) {
		for range 90 {
			l.apply(&Publish{Topic: topic, Messages: messages(retention, strings.Repeat("x", 1000))})
		}
		l.checkpoint()
	}
	fill("expiring", time.Minute)
	if n := len(packFiles(t, l)); n < 5 {
		t.Fatalf("%d packs", n)
	}
	l.pass(2 * time.Minute)
	l.apply(&Tick{})
	l.checkpoint()
	if n := packTotal(t, l); n != 0 {
		t.Fatalf("%d bytes are left of what has expired", n)
	}
	fill("deleted", 0)
	fill("kept", 0)
	l.apply(&TopicDelete{Topic: "deleted"})
	l.checkpoint()
	l.pass(2 * time.Minute)
	l.apply(&Tick{})
	l.checkpoint()
	if n := packTotal(t, l); n < 90_000 || n > 120_000 {
		t.Fatalf("%d bytes are left, 90 000 of them live", n)
	}
	if got := drain(t, l, "kept", "g"); len(got) != 1 || got[strings.Repeat("x", 1000)] != 90 {
		t.Fatalf("%d bodies came", len(got))
	}
	l.close()
}

// TestPackMoved: a payload is found by a place that was read before the pack was rewritten.
func TestPackMoved(t *testing.T) {
	l := openTest(t, Options{FS: vfs.NewMem(), RecentBytes: -1, packBytes: 4 << 10})
	long := strings.Repeat("l", 300)
	for i := range 20 {
		short := strings.Repeat("s", 500)
		ms := messages(10*time.Second, short, short, short, short)
		if i == 0 {
			ms = append(ms, messages(time.Hour, long)...)
		}
		l.apply(&Publish{Topic: "t", Messages: ms})
	}
	inc := l.e.topics["t"].inc
	where := func() place {
		v, closer, err := l.e.db.Get(l.e.keys.key(rowBlock, inc, 0))
		if err != nil {
			t.Fatal(err)
		}
		b, err := parseBlock(inc, 0, v)
		if err = errors.Join(err, closer.Close()); err != nil {
			t.Fatal(err)
		}
		return b.at
	}
	old := where()
	l.checkpoint()
	l.pass(time.Minute)
	l.apply(&Tick{})
	l.checkpoint()
	if where() == old {
		t.Fatal("nothing was rewritten")
	}
	b, err := l.e.payload(inc, 0, old)
	if err != nil || !strings.Contains(string(b), long) || strings.Contains(string(b), "sss") {
		t.Fatalf("payload of %d bytes, %v", len(b), err)
	}
	// Of a block that is gone for good there is nothing, and that is no error.
	if b, err := l.e.payload(inc, 3, old); b != nil || err != nil {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	// A place that nothing explains is damage.
	l.e.payloads.reset(0)
	if err := l.o.FS.Remove(l.e.packs.path(where().pack)); err != nil {
		t.Fatal(err)
	}
	l.e.packs.mu.Lock()
	for n, f := range l.e.packs.open {
		_ = f.Close()
		delete(l.e.packs.open, n)
	}
	l.e.packs.mu.Unlock()
	if _, err := l.e.payload(inc, 0, where()); !errors.As(err, new(*CorruptError)) {
		t.Fatalf("a missing pack gave %v", err)
	}
	if l.e.Err() == nil {
		t.Error("the engine goes on")
	}
	l.close()
}

// TestNothingAliveInBlock: a block of which some messages have expired and the others were removed keeps its header until
// the last would have expired, but not its payload.
func TestNothingAliveInBlock(t *testing.T) {
	l := openTest(t, Options{FS: vfs.NewMem(), RecentBytes: -1, packBytes: 1 << 10})
	body := strings.Repeat("x", 1000)
	res := l.apply(&Publish{Topic: "t", Messages: append(messages(time.Second, body), messages(time.Hour, body)...)})
	l.apply(&Publish{Topic: "t", Messages: messages(time.Hour, "kept")})
	l.checkpoint()
	id := res[0].Published.Stream
	id.Seq++
	if n := l.apply(&StreamDelete{Key: "t", IDs: []StreamID{id}})[0].Count; n != 1 {
		t.Fatalf("%d removed", n)
	}
	l.pass(2 * time.Minute)
	l.apply(&Tick{})
	before := l.fullHash()
	l.checkpoint()
	if packFiles(t, l)[1] != 0 {
		t.Fatal("the pack is still there")
	}
	if after := l.fullHash(); after != before {
		t.Errorf("hash is %x, was %x", after, before)
	}
	if b, err := l.e.payload(l.e.topics["t"].inc, 0, place{}); b != nil || err != nil {
		t.Errorf("payload of %d bytes, %v", len(b), err)
	}
	if got := drain(t, l, "t", "g"); len(got) != 1 || got["kept"] != 1 {
		t.Errorf("%d bodies came", len(got))
	}
	l.close()
}

// TestPacksAreListed: a pack that the checkpoint lists and that is missing or too short is damage, found at the start.
func TestPacksAreListed(t *testing.T) {
	l := openTest(t, Options{FS: vfs.NewMem()})
	l.apply(&Publish{Topic: "t", Messages: messages(time.Hour, strings.Repeat("x", 1000))})
	l.checkpoint()
	path := l.e.packs.path(1)
	l.close()
	f, err := l.o.FS.Create(path, vfs.WriteCategoryUnspecified) // empty
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for _, how := range []string{"short", "missing"} {
		c := (*CorruptError)(nil)
		if _, err := Open(l.o); !errors.As(err, &c) || c.File != path {
			t.Fatalf("%s: %v", how, err)
		}
		if how == "short" {
			if err := l.o.FS.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	}
}
