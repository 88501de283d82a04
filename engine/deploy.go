package engine

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// Deployment partitions. One log holds all messages of a topic; a block's header says which deployments its messages
// are of, and a posting row per deployment and block (B) lets a receive for one deployment pass over the others
// without looking at them. A group has the cursor that all messages pass, and one per deployment it was read with; a
// message is new if it lies at or above both. Deployments are known by 64 bits of SHA-256 of their names, 0 for none.

// depRun says that the messages of a block from from on are of a deployment.
type depRun struct {
	dep  uint64
	from uint32
}

// partition is what a group keeps for a deployment it was read with.
type partition struct {
	// next is the first offset that was not looked at for this deployment.
	next uint64
	// ready orders the deployment's deliverable messages, as the group's heap does those of all.
	ready timers
}

// deployment returns the number of a name.
func deployment[T ~string | ~[]byte](name T) uint64 {
	if len(name) == 0 {
		return 0
	}
	sum := sha256.Sum256([]byte(name))
	return max(binary.BigEndian.Uint64(sum[:]), 1)
}

// dep is the deployment of the i-th message.
func (b *block) dep(i uint32) uint64 {
	if b.refs != nil {
		return b.ref(i).dep
	}
	if b.deps == nil {
		return 0
	}
	return b.deps[b.depRun(i)].dep
}

func (b *block) depRun(i uint32) int {
	k := len(b.deps) - 1
	for b.deps[k].from > i {
		k--
	}
	return k
}

// depEnd is where the run of messages of one deployment that holds the i-th ends.
func (b *block) depEnd(i uint32) uint32 {
	switch {
	case b.refs != nil:
		r := b.ref(i)
		return r.from + r.count
	case b.deps != nil:
		if k := b.depRun(i) + 1; k < len(b.deps) {
			return b.deps[k].from
		}
	}
	return b.count
}

// addDep says of which deployment the last message of a block under construction is.
func (b *block) addDep(dep uint64) {
	i := b.count - 1
	if b.deps == nil {
		if dep == 0 {
			return
		}
		if i > 0 {
			b.deps = append(b.deps, depRun{})
		}
	}
	if k := len(b.deps); k == 0 || b.deps[k-1].dep != dep {
		b.deps = append(b.deps, depRun{dep, i})
	}
}

// deployments lists those of a block, each once, in ascending order.
func (b *block) deployments() []uint64 {
	var out []uint64
	for _, d := range b.deps {
		out = append(out, d.dep)
	}
	for i := range b.refs {
		out = append(out, b.refs[i].dep)
	}
	slices.Sort(out)
	out = slices.Compact(out)
	if len(out) > 0 && out[0] == 0 {
		out = out[1:]
	}
	return out
}

func (b *block) appendDeps(dst []byte) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(b.deps)))
	for _, d := range b.deps {
		dst = binary.LittleEndian.AppendUint64(dst, d.dep)
		dst = binary.AppendUvarint(dst, uint64(d.from))
	}
	return dst
}

func (b *block) parseDeps(r *reader) {
	for k := range r.count(9) {
		d := depRun{r.u64(), uint32(r.upTo(uint64(b.count) - 1))}
		if k == 0 && d.from != 0 || k > 0 && d.from <= b.deps[k-1].from {
			r.fail()
			return
		}
		b.deps = append(b.deps, d)
	}
	if len(b.deps) == 0 {
		r.fail()
	}
}

// putPostings writes the rows that lead to a block by deployment.
func (e *Engine) putPostings(batch *pebble.Batch, b *block, deps []uint64) {
	last := uint64(0)
	if b.lastExpiry != never {
		last = uint64(b.lastExpiry)
	}
	for _, d := range deps {
		row := append(e.rowBuf[:0], rowVersion)
		row = binary.AppendUvarint(row, b.index)
		e.put(batch, binary.AppendUvarint(row, last), rowPosting, b.topic, d, b.base)
	}
}

// parseExpiry reads a row of the expiry index: the deployments whose postings go with the block.
func parseExpiry(row []byte) (deps []uint64, err error) {
	r := reader{b: row}
	r.uvarint()
	for len(r.b) > 0 {
		deps = append(deps, r.u64())
	}
	return deps, r.err()
}

// nextOf returns the first message of a deployment at or behind off that has not expired at now, nil without one.
func (e *Engine) nextOf(t *topic, dep, off uint64, now int64) (found *block, at uint32, err error) {
	defer e.damaged(&err)
	off = max(off, t.gone, t.first)
	bound := t.next
	if t.open != nil {
		bound = t.open.base
	}
	within := func(b *block) (uint32, bool) {
		for i := uint32(max(off, b.base) - b.base); i < b.count; {
			if b.dep(i) != dep {
				i = b.depEnd(i)
				continue
			}
			if b.expiry(i) > now && !t.removed(b.base+uint64(i)) {
				return i, true
			}
			i++
		}
		return 0, false
	}
	if off < bound {
		it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: e.keys.key(rowPosting, t.inc, dep), UpperBound: e.keys.key(rowPosting, t.inc, dep, bound)})
		if err != nil {
			return nil, 0, fmt.Errorf("reading postings: %w", err)
		}
		defer func() { _ = it.Close() }()
		valid := it.SeekLT(e.keys.key(rowPosting, t.inc, dep, off+1))
		if !valid && it.Error() == nil {
			valid = it.First()
		}
		for ; valid; valid = it.Next() {
			base, _ := keyPart(it.Key(), 2)
			v, err := it.ValueAndErr()
			if err != nil {
				return nil, 0, fmt.Errorf("reading postings: %w", err)
			}
			r := reader{b: v}
			if ver := r.u8(); ver != rowVersion {
				return nil, 0, rowError(rowPosting, ver)
			}
			r.uvarint()
			last := int64(r.upTo(1 << 61))
			if err := r.err(); err != nil {
				return nil, 0, err
			}
			if last != 0 && last <= now {
				continue
			}
			b, err := e.blockFor(t, base)
			if err != nil {
				return nil, 0, err
			}
			if b == nil || b.base != base {
				continue // removed with what was around it
			}
			if i, ok := within(b); ok {
				return b, i, nil
			}
		}
		if err := it.Error(); err != nil {
			return nil, 0, fmt.Errorf("reading postings: %w", err)
		}
	}
	if t.open != nil && off < t.open.end() {
		if i, ok := within(t.open); ok {
			return t.open, i, nil
		}
	}
	return nil, 0, nil
}

// passed reports that one of the cursors a message passes has passed it.
func (g *group) passed(off, dep uint64) bool {
	if off < g.next {
		return true
	}
	if dep == 0 {
		return false
	}
	p := g.parts[dep]
	return p != nil && off < p.next
}

// excluded reports that receives without a deployment do not see messages of this one.
func (g *group) excluded(dep uint64) bool {
	return dep != 0 && g.excludes != nil && g.excludes[dep]
}

// compile makes of the settings what is looked up often.
func (g *group) compile() {
	g.excludes = nil
	for _, name := range g.settings.ExcludeDeployments {
		if g.excludes == nil {
			g.excludes = make(map[uint64]bool)
		}
		g.excludes[deployment(name)] = true
	}
}

// skips returns how many messages from the i-th on a receive without a deployment passes over: those that are
// another's, or that the cursor of their own deployment has passed.
func (g *group) skips(b *block, i uint32) uint32 {
	if g.excludes == nil && g.parts == nil {
		return 0
	}
	dep := b.dep(i)
	if dep == 0 {
		return 0
	}
	end := b.depEnd(i)
	if g.excluded(dep) {
		return end - i
	}
	if p := g.parts[dep]; p != nil && b.base+uint64(i) < p.next {
		return uint32(min(uint64(end), p.next-b.base)) - i
	}
	return 0
}

// looksMax bounds the runs of messages of other deployments that one receive without a deployment passes over; the
// next one goes on.
const looksMax = 1000

// partition returns the group's cursor for a deployment, beginning it if need be, or says why not. The group is
// folded.
func (e *Engine) partition(g *group, dep uint64) (*partition, errs.Code, error) {
	if p := g.parts[dep]; p != nil {
		return p, errs.OK, nil
	}
	if len(g.parts) >= 64 {
		// A cursor with nothing living between the group's and itself says nothing.
		b, i, err := e.firstLive(g.topic, nil, g.next, e.stamp.Cluster, false)
		if err != nil {
			return nil, errs.OK, err
		}
		first := g.topic.next
		if b != nil {
			first = b.base + uint64(i)
		}
		for d, p := range g.parts {
			if p.next <= first {
				delete(g.parts, d)
			}
		}
	}
	if len(g.parts) >= limits.DeploymentsPerGroupMax {
		return nil, errs.TooManyGroups, nil
	}
	if g.parts == nil {
		g.parts = make(map[uint64]*partition)
	}
	p := &partition{}
	g.parts[dep] = p
	g.dirty = true
	g.rebuild()
	return p, errs.OK, nil
}

// pass moves a partition's cursor to next. If that is directly behind a message, known says whether the set has an
// entry of it.
func (g *group) pass(p *partition, off uint64) (known bool) {
	l := g.find(off)
	if known = l != nil; known && off >= g.next && off >= p.next {
		if l.state == settledAhead {
			g.remove(off, l)
		} else {
			g.ahead--
		}
	}
	p.next = off + 1
	g.dirty = true
	return known
}

// retryOf returns the retried message of a partition that is first in order, nil without one. The group is folded.
func (g *group) retryOf(p *partition) (uint64, *lease) {
	for len(p.ready) > 0 {
		t := p.ready[0]
		if l := g.find(t.off); l != nil && l.flags&flagReady != 0 && l.due() == t.at {
			return t.off, l
		}
		p.ready.pop()
	}
	return 0, nil
}

// pushReady puts a deliverable entry into the heaps it is looked for in.
func (g *group) pushReady(off uint64, l *lease) {
	t := timer{l.due(), off}
	if !g.excluded(l.dep) {
		g.ready.push(t)
	}
	if l.dep != 0 {
		if p := g.parts[l.dep]; p != nil {
			p.ready.push(t)
		}
	}
}

// overgrown reports that a heap of ready messages holds mostly what is obsolete.
func (g *group) overgrown() bool {
	most := 2*g.live + 64
	if len(g.ready) > most {
		return true
	}
	for _, p := range g.parts {
		if len(p.ready) > most {
			return true
		}
	}
	return false
}

func (g *group) appendParts(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(g.parts)))
	for _, d := range sortedKeys(g.parts) {
		b = binary.LittleEndian.AppendUint64(b, d)
		b = binary.AppendUvarint(b, g.parts[d].next)
	}
	return b
}

func (g *group) parseParts(r *reader) {
	n := r.count(9)
	if n > 0 {
		g.parts = make(map[uint64]*partition, n)
	}
	for range n {
		d := r.u64()
		g.parts[d] = &partition{next: r.uvarint()}
	}
	if len(g.parts) != n {
		r.fail()
	}
}

// readyOf counts the messages of a deployment that the group was never given.
func (e *Engine) readyOf(g *group, dep uint64, now int64) (count uint64, err error) {
	off := g.next
	if p := g.parts[dep]; p != nil {
		off = max(off, p.next)
	}
	for range 2 * looksMax {
		b, i, err := e.nextOf(g.topic, dep, off, now)
		if err != nil || b == nil {
			return count, err
		}
		for ; i < b.count; i++ {
			at := b.base + uint64(i)
			if b.dep(i) == dep && b.expiry(i) > now && !g.topic.removed(at) && g.find(at) == nil {
				count++
			}
		}
		off = b.end()
	}
	return count, nil
}
