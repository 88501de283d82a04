package engine

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"tercet.dev/tercet/internal/limits"
)

var (
	delayedCount  = flag.Int("delayed", 100_000, "messages of BenchmarkDelayedMass; decision 20 speaks of a million")
	deployedCount = flag.Int("deployed", 200_000, "messages of BenchmarkDeploymentBehind; decision 23 speaks of ten million")
)

// TestKeyFilterMemory: ten million keys of retentions from a minute to a week take at most 32 MiB, and few of those
// that are not there cost a look at the store. The default run is a tenth of that.
func TestKeyFilterMemory(t *testing.T) {
	n := 1_000_000
	if campaign() {
		n = 10_000_000
	}
	rng := rand.New(rand.NewPCG(1, 2))
	filters := map[keyBucket]*keyFilter{}
	now := int64(1_000_000_000)
	for range n {
		// As many of each order of magnitude.
		window := int64(60_000) << rng.IntN(14)
		window = min(window+rng.Int64N(window), limits.RetentionMax.Milliseconds())
		b := bucketOf(window, now+window)
		f := filters[b]
		if f == nil {
			f = newKeyFilter(0)
			filters[b] = f
		}
		f.add(keyHash{rng.Uint64(), rng.Uint64()})
	}
	total, wrong, looks := 0, 0, 100_000
	for _, f := range filters {
		total += f.bytes()
	}
	for range looks {
		h := keyHash{rng.Uint64(), rng.Uint64()}
		for _, f := range filters {
			if f.has(h) {
				wrong++
			}
		}
	}
	t.Logf("%d keys in %d buckets take %d KiB; a key that is not there costs %.3f reads", n, len(filters), total>>10, float64(wrong)/float64(looks))
	if total > 32<<20*n/10_000_000+len(filters)*2*64*filterFirst {
		t.Errorf("%d bytes for %d keys", total, n)
	}
	if wrong > looks {
		t.Errorf("%d reads for %d keys that are not there", wrong, looks)
	}
}

// TestKeyFilter: what was added is found, whatever the layers.
func TestKeyFilter(t *testing.T) {
	f := newKeyFilter(0)
	rng := rand.New(rand.NewPCG(3, 4))
	var list []keyHash
	for range 200_000 {
		h := keyHash{rng.Uint64(), rng.Uint64()}
		f.add(h)
		list = append(list, h)
	}
	if len(f.layers) < 3 {
		t.Fatalf("%d layers: nothing has grown", len(f.layers))
	}
	for _, h := range list {
		if !f.has(h) {
			t.Fatal("a key was lost")
		}
	}
	wrong := 0
	for range 100_000 {
		if f.has(keyHash{rng.Uint64(), rng.Uint64()}) {
			wrong++
		}
	}
	if wrong > 10_000 {
		t.Errorf("%d of 100000 keys that are not there were found", wrong)
	}
}

// TestKeyBuckets: a key that has expired and comes again never writes the row it had.
func TestKeyBuckets(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 6))
	for range 100_000 {
		window := 1000 + rng.Int64N(8*86_400_000)
		again := 1000 + rng.Int64N(8*86_400_000)
		now := rng.Int64N(1 << 40)
		first := bucketOf(window, now+window)
		later := now + window + rng.Int64N(1000)
		if second := bucketOf(again, later+again); second == first {
			t.Fatalf("windows of %d and, from %d on, %d share a bucket", window, later-now, again)
		}
		if first.over(now + window - 1) {
			t.Fatalf("a window of %d outlives its bucket", window)
		}
	}
}

// TestDelayedMass: many messages fall due within a minute. No entry makes more of them visible than it may, and they
// come in the order of their due times.
func TestDelayedMass(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	const count = 20_000
	for i := 0; i < count; i += 100 {
		p := &Publish{Topic: fmt.Sprint("t", i/100%3)}
		for k := range 100 {
			p.Messages = append(p.Messages, NewMessage{Body: []byte("x"), Retention: time.Hour, Delay: time.Duration(60+(i+k*601)%60) * time.Second})
		}
		l.apply(p)
	}
	l.checkpoint()
	seen, entries := uint64(0), 0
	for l.now.Cluster < testStart.Cluster+121_000 {
		l.pass(time.Second)
		for {
			at, ok := l.e.NextTick()
			if !ok || at > l.now.Cluster {
				break
			}
			before := visible(l.e)
			l.apply(&Tick{})
			entries++
			n := visible(l.e) - before
			if n > limits.MaturePerEntryMax+100 {
				t.Fatalf("one entry made %d visible", n)
			}
			seen += n
		}
	}
	if seen != count {
		t.Errorf("%d of %d are visible", seen, count)
	}
	t.Logf("%d entries", entries)
	last := int64(0)
	for _, name := range sortedKeys(l.e.topics) {
		last = 0
		for off := uint64(0); off < l.e.topics[name].next; {
			b, _, err := l.e.blockAt(l.e.topics[name], nil, off)
			if err != nil {
				t.Fatal(err)
			}
			for i := range b.refs {
				if b.refs[i].due < last {
					t.Fatalf("%d stands behind %d", b.refs[i].due, last)
				}
				last = b.refs[i].due
			}
			off = b.end()
		}
	}
}

func visible(e *Engine) uint64 {
	n := uint64(0)
	for _, t := range e.topics {
		n += t.next
	}
	return n
}

// BenchmarkDelayedMass measures the entries that make delayed messages visible, all of them due within one minute.
func BenchmarkDelayedMass(b *testing.B) {
	for range b.N {
		l := openTest(b, Options{FS: vfs.Default, Dir: b.TempDir()})
		for i := 0; i < *delayedCount; i += 100 {
			p := &Publish{Topic: "t"}
			for k := range 100 {
				p.Messages = append(p.Messages, NewMessage{Body: make([]byte, 100), Retention: time.Hour, Delay: time.Duration(60+(i/100+k)%60) * time.Second})
			}
			l.apply(p)
			l.entries = l.entries[:len(l.entries):len(l.entries)]
		}
		l.checkpoint()
		var took []time.Duration
		var total time.Duration
		for {
			at, ok := l.e.NextTick()
			if !ok {
				break
			}
			if at > l.now.Cluster {
				l.pass(time.Duration(at-l.now.Cluster) * time.Millisecond)
			}
			start := time.Now()
			l.apply(&Tick{})
			took = append(took, time.Since(start))
			total += took[len(took)-1]
		}
		slices.Sort(took)
		n := len(took)
		for name, t := range map[string]time.Duration{"p50-ms/entry": took[n/2], "p99-ms/entry": took[n*99/100], "worst-ms/entry": took[n-1]} {
			b.ReportMetric(float64(t.Microseconds())/1000, name)
		}
		b.ReportMetric(float64(total.Microseconds())/float64(*delayedCount), "µs/message")
		b.ReportMetric(float64(n), "entries")
		l.close()
	}
}

// BenchmarkPublishKeys measures what an idempotency key costs, single and in batches.
func BenchmarkPublishKeys(b *testing.B) {
	for _, batch := range []int{1, 100} {
		for _, keyed := range []bool{false, true} {
			b.Run(fmt.Sprintf("batch=%d/key=%v", batch, keyed), func(b *testing.B) {
				l := openTest(b, Options{FS: vfs.Default, Dir: b.TempDir()})
				defer l.close()
				body := make([]byte, 1024)
				serial := 0
				for b.Loop() {
					p := &Publish{Topic: "t"}
					for range batch {
						serial++
						m := NewMessage{Body: body, Retention: 24 * time.Hour}
						if keyed {
							m.Key = fmt.Sprint("key-", serial)
						}
						p.Messages = append(p.Messages, m)
					}
					l.apply(p)
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/message")
			})
		}
	}
}

// BenchmarkDeploymentBehind measures a receive for a deployment behind many messages of another.
func BenchmarkDeploymentBehind(b *testing.B) {
	for _, before := range []int{0, *deployedCount} {
		b.Run(fmt.Sprintf("before=%d", before), func(b *testing.B) {
			l := openTest(b, Options{FS: vfs.Default, Dir: b.TempDir()})
			defer l.close()
			for i := 0; i < before; i += 100 {
				l.apply(&Publish{Topic: "t", Messages: deployed("x", 100)})
			}
			l.checkpoint()
			for b.Loop() {
				r := l.apply(&Publish{Topic: "t", Messages: deployed("y", 1)}, &Receive{Topic: "t", Group: "g", Max: 1, Visibility: time.Minute, Deployment: "y"})[1]
				if len(r.Deliveries) != 1 {
					b.Fatalf("received %+v", r)
				}
				l.apply(&Settle{Topic: "t", Group: "g", Op: Acknowledge, Receipts: []Receipt{r.Deliveries[0].Receipt}})
			}
		})
	}
}
