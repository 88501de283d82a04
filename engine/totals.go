package engine

// totalsTopics bounds the topics that are looked at in one go, while Apply waits.
const totalsTopics = 256

// Totals returns figures of all topics and groups together. It visits every group, and reads at most one block
// header a topic, which is kept. Apply is let in between so many topics: the figures are those of no one moment.
func (e *Engine) Totals() Totals {
	e.dbMu.RLock()
	defer e.dbMu.RUnlock()
	e.mu.RLock()
	incs := sortedKeys(e.byInc)
	out := Totals{Topics: len(e.topics), Uploads: len(e.uploads)}
	e.mu.RUnlock()
	for len(incs) > 0 {
		n := min(len(incs), totalsTopics)
		e.addTotals(&out, incs[:n])
		incs = incs[n:]
	}
	return out
}

// addTotals adds the figures of some topics.
func (e *Engine) addTotals(out *Totals, incs []uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.stamp.Cluster
	for _, inc := range incs {
		t := e.byInc[inc]
		if t == nil {
			continue // deleted meanwhile
		}
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
}
