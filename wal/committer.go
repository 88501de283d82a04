package wal

import (
	"fmt"
	"time"

	"tercet.dev/tercet/wal/disk"
)

// signal tells the committer that something is buffered.
func (w *WAL) signal() {
	select {
	case w.kick <- struct{}{}:
	default:
	}
}

// commitLoop writes and syncs one batch after the other. While a batch is being synced the next one fills: under load
// batches form by themselves, and nothing ever waits to make them larger.
func (w *WAL) commitLoop() {
	defer w.done.Done()
	idle := time.NewTimer(time.Hour)
	idle.Stop()
	defer idle.Stop()
	for {
		did, err := w.commitOnce(false)
		if err != nil {
			<-w.stop
			return
		}
		if did {
			continue
		}
		var marker <-chan time.Time
		if w.opts.MarkerDelay > 0 && w.markerPending() {
			idle.Reset(w.opts.MarkerDelay)
			marker = idle.C
		}
		select {
		case <-w.kick:
			idle.Stop()
		case <-marker:
			if _, err := w.commitOnce(true); err != nil {
				<-w.stop
				return
			}
		case <-w.stop:
			w.flush()
			return
		}
	}
}

// flush writes all that is buffered, and a marker. Errors have poisoned the log.
func (w *WAL) flush() {
	for {
		did, err := w.commitOnce(false)
		if err != nil {
			return
		}
		if !did {
			break
		}
	}
	if w.opts.MarkerDelay > 0 {
		_, _ = w.commitOnce(true)
	}
}

func (w *WAL) markerPending() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.markerDue
}

// commitOnce writes and syncs the oldest batch, if there is one; with marker set and nothing buffered, a marker, if
// the last batch has none behind it yet.
func (w *WAL) commitOnce(marker bool) (did bool, err error) {
	w.commitMu.Lock()
	defer w.commitMu.Unlock()
	if err := w.Err(); err != nil {
		return false, err
	}
	w.mu.Lock()
	if w.sealed.len() == 0 {
		switch {
		case w.cur != nil:
			w.seal()
		case marker && w.markerDue:
			w.newMarker()
		default:
			w.mu.Unlock()
			return false, nil
		}
	}
	b := *w.sealed.at(0)
	w.sealed.dropFront(1)
	w.mu.Unlock()
	if err := w.write(b); err != nil {
		return false, w.fail(err)
	}
	w.landed(b)
	return true, nil
}

// write brings a batch to disk. Its error is final: what a second attempt reported would prove nothing.
func (w *WAL) write(b *batch) error {
	if b.seg.file == nil {
		f, err := w.keeper.take(b.seg)
		if err != nil {
			return err
		}
		b.seg.file = f
	}
	if at := b.seg.synced.Load(); b.off != at {
		// Invariants 1 and 2: behind what is durable, and nowhere else.
		return fmt.Errorf("batch for %d of %s, which is written up to %d", b.off, b.seg.path, at)
	}
	n := disk.AlignUp(b.n)
	clear(b.buf[b.n:n])
	h := batchHeader{
		stream: w.stream, segment: b.seg.id, offset: uint64(b.off), size: uint64(b.seg.size), used: uint32(b.n), count: b.count,
		prevSeg: b.prevSeg, prevEnd: b.prevEnd, time: time.Now().UnixNano(), flags: b.flags,
	}
	h.encode(b.buf)
	start := time.Now()
	if _, err := b.seg.file.WriteAt(b.buf[:n], b.off); err != nil {
		return fmt.Errorf("write %s at %d: %w", b.seg.path, b.off, err)
	}
	if err := b.seg.file.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", b.seg.path, err)
	}
	w.syncs.Add(1)
	w.syncedBytes.Add(n)
	if b.flags&flagMarker != 0 {
		w.markers.Add(1)
	}
	if w.opts.ObserveSync != nil {
		w.opts.ObserveSync(time.Since(start), int(n))
	}
	return nil
}

// landed makes it known that a batch is durable.
func (w *WAL) landed(b *batch) {
	b.seg.synced.Store(b.off + disk.AlignUp(b.n))
	w.durable.Store(uint64(b.end()))
	w.mu.Lock()
	var oldest int64
	switch {
	case w.sealed.len() > 0:
		oldest = (*w.sealed.at(0)).began
	case w.cur != nil:
		oldest = w.cur.began
	}
	w.oldestUnsynced.Store(oldest)
	w.markerDue = b.flags&flagMarker == 0
	for _, m := range b.moves {
		m.shard.relocate(m)
	}
	w.moving -= len(b.moves)
	if len(b.moves) > 0 {
		w.releaseOld()
	}
	var freed []*segment
	if b.oldest != 0 {
		n := 0
		for n < len(w.segs)-1 && w.segs[n].id < b.oldest {
			n++
		}
		freed = append(freed, w.segs[:n]...)
		w.segs = append(w.segs[:0], w.segs[n:]...)
	}
	w.giveBuffer(b.buf)
	w.mu.Unlock()
	b.buf = nil
	w.wake()
	if len(b.moves) > 0 {
		w.keeper.poke() // the next segment may be nearly empty as well
	}
	if len(freed) > 0 {
		w.freed.Add(int64(len(freed)))
		w.keeper.free(freed)
	}
}

// relocate makes a rewritten entry be read from its new place, unless it has gone meanwhile. Called with WAL.mu.
func (s *Shard) relocate(m move) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if m.index < s.first || m.index >= s.next {
		return
	}
	loc := s.locs.at(int(m.index - s.first))
	if *loc != m.from {
		return
	}
	*loc = m.to
	s.w.rewritten.Add(1)
	m.from.seg.live--
	m.from.seg.liveBytes -= int64(m.from.size)
	m.to.seg.live++
	m.to.seg.liveBytes += int64(m.to.size)
}
