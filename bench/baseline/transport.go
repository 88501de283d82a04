package main

import (
	"sync"

	hraft "github.com/hashicorp/raft"
)

// watermark knows up to which entry each follower has acknowledged this leader's log. The stock transport tells
// nobody, so that its results are watched on their way to raft.
type watermark struct {
	mu     sync.Mutex
	moved  sync.Cond
	term   uint64
	match  map[hraft.ServerID]uint64
	others int
	closed bool
}

func newWatermark(others int) *watermark {
	w := &watermark{match: map[hraft.ServerID]uint64{}, others: others}
	w.moved.L = &w.mu
	return w
}

// observe takes note of an answered request. What counts is the last index sent, in this term.
func (w *watermark) observe(id hraft.ServerID, req *hraft.AppendEntriesRequest, resp *hraft.AppendEntriesResponse) {
	if !resp.Success || len(req.Entries) == 0 {
		return
	}
	last := req.Entries[len(req.Entries)-1].Index
	w.mu.Lock()
	defer w.mu.Unlock()
	if req.Term > w.term {
		w.term = req.Term
		clear(w.match)
	}
	if req.Term == w.term && last > w.match[id] {
		w.match[id] = last
		w.moved.Broadcast()
	}
}

// reached returns how many followers have index.
func (w *watermark) reached(index uint64) (n int) {
	for _, m := range w.match {
		if m >= index {
			n++
		}
	}
	return n
}

// wait returns once all followers have index, or false when the node closes.
func (w *watermark) wait(index uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for !w.closed && w.reached(index) < w.others {
		w.moved.Wait()
	}
	return !w.closed
}

func (w *watermark) matched() map[hraft.ServerID]uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := make(map[hraft.ServerID]uint64, len(w.match))
	for id, m := range w.match {
		all[id] = m
	}
	return all
}

func (w *watermark) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.moved.Broadcast()
}

// watchedTransport is the stock transport with its results observed. Everything else, pre-vote above all, is
// promoted unchanged.
type watchedTransport struct {
	*hraft.NetworkTransport
	w *watermark
}

// AppendEntries implements hraft.Transport.
func (t *watchedTransport) AppendEntries(id hraft.ServerID, target hraft.ServerAddress, req *hraft.AppendEntriesRequest, resp *hraft.AppendEntriesResponse) error {
	err := t.NetworkTransport.AppendEntries(id, target, req, resp)
	if err == nil {
		t.w.observe(id, req, resp)
	}
	return err
}

// AppendEntriesPipeline implements hraft.Transport.
func (t *watchedTransport) AppendEntriesPipeline(id hraft.ServerID, target hraft.ServerAddress) (hraft.AppendPipeline, error) {
	inner, err := t.NetworkTransport.AppendEntriesPipeline(id, target)
	if err != nil {
		return nil, err
	}
	p := &watchedPipeline{AppendPipeline: inner, out: make(chan hraft.AppendFuture), done: make(chan struct{})}
	go func() {
		for {
			select {
			case f := <-inner.Consumer():
				if f.Error() == nil {
					t.w.observe(id, f.Request(), f.Response())
				}
				select {
				case p.out <- f:
				case <-p.done:
					return
				}
			case <-p.done:
				return
			}
		}
	}()
	return p, nil
}

type watchedPipeline struct {
	hraft.AppendPipeline
	out  chan hraft.AppendFuture
	done chan struct{}
	once sync.Once
}

// Consumer implements hraft.AppendPipeline.
func (p *watchedPipeline) Consumer() <-chan hraft.AppendFuture { return p.out }

// Close implements hraft.AppendPipeline.
func (p *watchedPipeline) Close() error {
	p.once.Do(func() { close(p.done) })
	return p.AppendPipeline.Close()
}
