package wal

// recent is an entry kept in memory, by reference to the caller's bytes.
type recent struct {
	Entry
	lsn LSN
}

func (r *recent) bytes() int64 { return int64(len(r.Data)+len(r.Extensions)) + recentOverhead }

// recentOverhead is about what the bookkeeping of one recent entry takes.
const recentOverhead = 160

// fifo is a queue whose front is dropped and whose back is cut, over one slice that is moved seldom.
type fifo[T any] struct {
	items []T
	head  int
}

func (f *fifo[T]) len() int { return len(f.items) - f.head }

func (f *fifo[T]) at(i int) *T { return &f.items[f.head+i] }

func (f *fifo[T]) push(v T) { f.items = append(f.items, v) }

// dropFront forgets the first n items.
func (f *fifo[T]) dropFront(n int) {
	clear(f.items[f.head : f.head+n])
	f.head += n
	if f.head == len(f.items) {
		f.items, f.head = f.items[:0], 0
	} else if f.head > 64 && f.head > len(f.items)/2 {
		kept := copy(f.items, f.items[f.head:])
		clear(f.items[kept:])
		f.items, f.head = f.items[:kept], 0
	}
}

// cutBack forgets all but the first n items.
func (f *fifo[T]) cutBack(n int) {
	clear(f.items[f.head+n:])
	f.items = f.items[:f.head+n]
}

// ringRef names a recent entry in the order of appending over all shards. It is stale when the shard no longer
// keeps an entry with that LSN in front.
type ringRef struct {
	shard *Shard
	lsn   LSN
}

// ring bounds the bytes of recent entries over all shards. Guarded by WAL.mu.
type ring struct {
	refs  fifo[ringRef]
	bytes int64
	max   int64
}

// evict drops the oldest recent entries while there are too many bytes of them. Entries that are not durable stay,
// since they cannot be read from anywhere else. Called with WAL.mu and without any Shard.mu.
func (r *ring) evict(durable LSN) {
	n := 0
	for n < r.refs.len() {
		ref := r.refs.at(n)
		sh := ref.shard
		sh.mu.Lock()
		stale := sh.recent.len() == 0 || sh.recent.at(0).lsn != ref.lsn
		if !stale {
			if r.bytes <= r.max || ref.lsn > durable {
				sh.mu.Unlock()
				break
			}
			r.bytes -= sh.recent.at(0).bytes()
			sh.recent.dropFront(1)
			sh.recentFirst++
		}
		sh.mu.Unlock()
		n++
	}
	if n > 0 {
		r.refs.dropFront(n)
	}
}
