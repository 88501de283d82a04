package engine

// Totals returns figures of all topics and groups together. It visits every group, and reads at most one block
// header a topic, which is kept.
func (e *Engine) Totals() Totals {
	e.dbMu.RLock()
	defer e.dbMu.RUnlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.stamp.Cluster
	out := Totals{Topics: len(e.topics), Uploads: len(e.uploads)}
	for _, t := range e.byInc {
		out.Groups += len(t.groups)
		out.Delayed += t.delayed
		lowest := t.next
		for _, g := range t.byInc {
			g.fold(now, foldAll)
			from := max(g.next, t.first, t.gone)
			lowest = min(lowest, from)
			out.Ready += t.next - from - min(uint64(g.ahead), t.next-from)
			out.Inflight += uint64(g.inflight)
			out.Parked += uint64(g.parkedCount)
			out.Waiting += uint64(max(g.unsettled()-g.ahead-g.inflight, 0))
		}
		if lowest == t.next || e.db == nil {
			continue
		}
		b, i, err := e.firstLive(t, nil, lowest, now, false)
		if err != nil || b == nil {
			continue
		}
		if at := b.publishedWall(i); out.OldestAt == 0 || at < out.OldestAt {
			out.OldestAt = at
		}
	}
	return out
}
