package raft

import (
	"sync"
	"sync/atomic"
)

// WatchKind says what a Watch is about.
type WatchKind uint8

const (
	// WatchTopic: entries were appended to the named topic.
	WatchTopic WatchKind = 1 + iota
	// WatchTopics: a topic came or went.
	WatchTopics
	// WatchDocuments: the named table of documents changed.
	WatchDocuments
	// WatchLeader: another node leads, or this node opened or closed for service as leader. It has no name.
	WatchLeader
)

// watches are those who wait for a change of what this node has applied.
type watches struct {
	// count lets what nobody watches cost one load.
	count atomic.Int64

	mu sync.Mutex
	by map[watchKey]map[chan struct{}]struct{}

	// keys is told of the keys that an entry changed.
	keys atomic.Pointer[func(keys []string)]
}

type watchKey struct {
	kind WatchKind
	name string
}

func (w *watches) add(key watchKey) (<-chan struct{}, func()) {
	return w.addChannel(key, make(chan struct{}, 1))
}

// addChannel is add with a channel that several watches may share.
func (w *watches) addChannel(key watchKey, ch chan struct{}) (<-chan struct{}, func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.by == nil {
		w.by = make(map[watchKey]map[chan struct{}]struct{})
	}
	if w.by[key] == nil {
		w.by[key] = make(map[chan struct{}]struct{})
	}
	w.by[key][ch] = struct{}{}
	w.count.Add(1)
	return ch, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if _, there := w.by[key][ch]; !there {
			return
		}
		w.count.Add(-1)
		delete(w.by[key], ch)
		if len(w.by[key]) == 0 {
			delete(w.by, key)
		}
	}
}

// signal tells those who watch the key.
func (w *watches) signal(kind WatchKind, name string) {
	if w.count.Load() == 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for ch := range w.by[watchKey{kind, name}] {
		tell(ch)
	}
}

// signalAll tells everybody: the state was replaced as a whole.
func (w *watches) signalAll() {
	w.keysChanged(nil)
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, set := range w.by {
		for ch := range set {
			tell(ch)
		}
	}
}

// keysChanged tells of the keys that an entry changed; nil stands for all.
func (w *watches) keysChanged(keys []string) {
	if f := w.keys.Load(); f != nil {
		(*f)(keys)
	}
}

// OnKeys has changed called with the keys that each entry changed as this node has applied it, with nil after the whole
// state was replaced. It is called while applying: it must be short, and must not keep the slice. nil ends it.
func (n *Node) OnKeys(changed func(keys []string)) {
	if changed == nil {
		n.watches.keys.Store(nil)
		return
	}
	n.watches.keys.Store(&changed)
}

func tell(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default: // it has not looked since the last one
	}
}

// Watch returns a channel that is signalled after this node has applied a change of the kind, and a function that ends
// the watch. Signals are not counted: one stands for all changes since the channel was last read. Whoever looks at the
// state after reading the channel, and before waiting for it again, misses nothing. name is the topic or table, empty
// for the other kinds.
func (n *Node) Watch(kind WatchKind, name string) (<-chan struct{}, func()) {
	return n.watches.add(watchKey{kind, name})
}

// Leading reports whether this node is the leader and open for service, and in which term.
func (n *Node) Leading() (term uint64, ok bool) {
	term = n.openTerm.Load()
	return term, term != 0
}
