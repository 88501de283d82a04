package bench

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// poolBytes bounds the memory of a pool of prepared requests. It is large beside the window of the store's block
// compression, so that no two equal bodies meet there.
const poolBytes = 8 << 20

// poolSize is how many different requests of this size are prepared.
func poolSize(bytes int) int { return max(8, min(8192, poolBytes/max(1, bytes))) }

// bodies makes incompressible message bodies; equal seeds give equal bodies.
type bodies struct{ r *rand.ChaCha8 }

func newBodies(seed uint64) *bodies {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	return &bodies{r: rand.NewChaCha8(key)}
}

func (b *bodies) next(size int) []byte {
	body := make([]byte, size)
	_, _ = b.r.Read(body) // never fails
	return body
}

// request is a prepared publish.
type request struct {
	// head comes before the body, if the driver sends two pieces. No publisher changes it.
	head []byte
	body []byte
	// marks are where in body the message bodies begin; bytes is their length together, messages their number.
	marks []int
	// keys are where in body the idempotency keys stand.
	keys     []int
	bytes    int
	messages int
}

// keyPlace is where a key is put in a prepared request.
const keyPlace = "key:seed:publisher:number......."

// putKey writes a key that no other message has.
func putKey(b []byte, seed uint64, publisher uint32, number uint64) {
	copy(b[:len(keyPlace)], fmt.Sprintf("%08x%08x%016x", uint32(seed), publisher, number)) //nolint:gosec // a seed is small
}

// requests are the prepared publishes of a workload, shared by its publishers.
type requests struct {
	w    Workload
	pool []request
}

// prepare makes the pool. encode makes a request out of bodies; what it makes holds each of them in one piece.
func prepare(w Workload, encode func(topic string, bodies [][]byte) request) *requests {
	source := newBodies(w.Seed)
	sizes := w.sizes()
	n := max(poolSize(int(w.MeanSize())*w.Batch), len(sizes), w.topics())
	n = (n + w.topics() - 1) / w.topics() * w.topics() // all topics equally often
	rs := &requests{w: w, pool: make([]request, n)}
	for i := range rs.pool {
		bodies := make([][]byte, w.Batch)
		for j := range bodies {
			bodies[j] = source.next(sizes[i%len(sizes)])
		}
		r := encode(w.TopicName(i), bodies)
		r.messages = len(bodies)
		for _, b := range bodies {
			r.bytes += len(b)
			if !w.Timed && !w.Stamped {
				continue
			}
			from := 0
			if len(r.marks) > 0 {
				from = r.marks[len(r.marks)-1] + 1
			}
			// The bodies are random and not short, so that they stand nowhere else by chance.
			r.marks = append(r.marks, from+bytes.Index(r.body[from:], b))
		}
		if w.Keyed {
			for from := 0; ; {
				at := bytes.Index(r.body[from:], []byte(keyPlace))
				if at < 0 {
					break
				}
				r.keys = append(r.keys, from+at)
				from += at + len(keyPlace)
			}
		}
		rs.pool[i] = r
	}
	return rs
}

// feed hands one publisher its requests.
type feed struct {
	rs    *requests
	next  int
	stamp Stamp
	own   []byte // the body of a marked request, used again for the next one
	keys  uint64 // that were given
}

// feed returns the feed of publisher i.
func (rs *requests) feed(i int) *feed {
	// Far from what the others send at the moment.
	return &feed{rs: rs, next: i * len(rs.pool) / max(1, rs.w.Publishers), stamp: Stamp{Publisher: uint32(i)}}
}

// take returns the next request. Its body is valid until the next call, and the caller must not change it.
func (f *feed) take(due time.Time) request {
	r := f.rs.pool[f.next%len(f.rs.pool)]
	f.next++
	if len(r.marks)+len(r.keys) == 0 {
		return r
	}
	f.own = append(f.own[:0], r.body...)
	r.body = f.own
	f.stamp.Number++
	for _, at := range r.marks {
		if f.rs.w.Stamped {
			f.stamp.put(r.body[at:])
		} else {
			putTimeMark(r.body[at:], due.Add(f.rs.w.Delay))
		}
	}
	for _, at := range r.keys {
		f.keys++
		putKey(r.body[at:], f.rs.w.Seed, f.stamp.Publisher, f.keys)
	}
	return r
}

// ack is the acknowledgement of a whole request that take returned last.
func (f *feed) ack(r request, zones int) Ack {
	return Ack{Messages: r.messages, Bytes: r.bytes, Zones: zones, Stamp: f.stamp}
}

// Bodies hands the messages of one publisher to drivers that do not prepare requests: of other systems, by clients
// made for them.
type Bodies struct{ feed *feed }

// NewBodies returns those of publisher i. Publishers of equal workloads share what they hand out.
func NewBodies(w Workload, i int) *Bodies {
	sharedBodies.Lock()
	defer sharedBodies.Unlock()
	key := fmt.Sprintf("%+v", w)
	if sharedBodies.key != key {
		sharedBodies.key = key
		sharedBodies.rs = prepare(w, func(topic string, bodies [][]byte) request {
			return request{head: []byte(topic), body: bytes.Join(bodies, nil)}
		})
	}
	return &Bodies{sharedBodies.rs.feed(i)}
}

// sharedBodies are those of the last workload that was asked for.
var sharedBodies struct {
	sync.Mutex
	key string
	rs  *requests
}

// Next returns the topic and the bodies of the next request. The caller must not change them; unless the workload is
// marked they stay as they are, otherwise they are the caller's.
func (b *Bodies) Next(due time.Time) (topic string, bodies [][]byte) {
	b.feed.own = nil
	r := b.feed.take(due)
	size := r.bytes / r.messages
	for rest := r.body; len(bodies) < r.messages; rest = rest[size:] {
		bodies = append(bodies, rest[:size:size])
	}
	return string(r.head), bodies
}

// Ack acknowledges what Next returned last.
func (b *Bodies) Ack(zones int) Ack {
	last := b.feed.rs.pool[(b.feed.next-1)%len(b.feed.rs.pool)]
	return b.feed.ack(last, zones)
}
