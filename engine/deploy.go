package engine

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// Deployment partitions. One log holds all messages of a topic; a block's header says which deployments its messages
// are of, and a posting row per deployment and block (B) lets a receive for one deployment pass over the others
// without looking at them. A group has the cursor that all messages pass, and one per deployment it was read with; a
// message is new if it lies at or above both. Receives without a deployment leave those that the group excludes alone:
// what the group's cursor goes over meanwhile stays open in spans of its own. Deployments are known by 64 bits of SHA-256
// of their names, 0 for none.

// depRun says that the messages of a block from from on are of a deployment.
type depRun struct {
	dep  uint64
	from uint32
}

// partition is what a group keeps for a deployment it was read with.
type partition struct {
	// next is the first offset that was not looked at for this deployment.
	next uint64
	// open are the offsets whose messages of this deployment are new wherever the group's cursor and next stand: what the
	// group's cursor went over while the deployment was excluded. They are in order and apart from each other. The last
	// one has no end while the deployment is excluded.
	open []span
	// ready orders the deployment's deliverable messages, as the group's heap does those of all.
	ready timers
}

// span is a range of offsets, and the position that the group had when it began: what lies at or below that is not given.
type span struct {
	from, to uint64
	after    StreamID
}

// endless is the end of the span of an excluded deployment.
const endless = math.MaxUint64

// excluded reports that the deployment's messages are left alone by receives that name none.
func (p *partition) excluded() bool {
	return len(p.open) > 0 && p.open[len(p.open)-1].to == endless
}

// behind reports that a receive without a deployment finds messages below the group's cursor here.
func (p *partition) behind() bool { return len(p.open) > 0 && !p.excluded() }

// keeps reports that a message is new whatever the cursors say.
func (p *partition) keeps(off uint64) bool {
	for i := range p.open {
		if s := &p.open[i]; off < s.to {
			return off >= s.from
		}
	}
	return false
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
	if dep == 0 || g.parts == nil {
		return off < g.next
	}
	p := g.parts[dep]
	switch {
	case p == nil:
		return off < g.next
	case p.keeps(off):
		return false
	}
	return off < g.next || off < p.next || p.excluded()
}

// unread returns the first offset at or behind off that no cursor of a deployment has passed, where what is said of it
// ends, and the position that messages have to be behind.
func (g *group) unread(dep, off uint64) (from, to uint64, after StreamID) {
	if p := g.parts[dep]; p != nil {
		for i := range p.open {
			if s := &p.open[i]; off < s.to {
				return max(off, s.from), s.to, s.after
			}
		}
		off = max(off, p.next)
	}
	return max(off, g.next), endless, g.pos
}

// unreadOf returns the first message of a deployment at or behind off that lives and that no cursor has passed, nil
// without one, and the position that it has to be behind to be given. The group may hold it already.
func (e *Engine) unreadOf(g *group, dep, off uint64, now int64) (*block, uint32, StreamID, error) {
	for {
		from, to, after := g.unread(dep, off)
		b, i, err := e.nextOf(g.topic, dep, from, now)
		if err != nil || b == nil {
			return nil, 0, after, err
		}
		if off = b.base + uint64(i); off < to {
			return b, i, after, nil
		}
	}
}

// end is where what the group's cursor has left behind ends.
func (p *partition) end() uint64 { return p.open[len(p.open)-1].to }

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
		if err := e.forgetParts(g); err != nil {
			return nil, errs.OK, err
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

// pass moves a partition's cursors to next, over messages that were given out, that are gone, or that were settled ahead.
func (g *group) pass(dep uint64, p *partition, next uint64) {
	first, _, _ := g.unread(dep, 0)
	if first >= next {
		return
	}
	visit := func(off uint64, l *lease) {
		if l.dep != dep || g.passed(off, dep) {
			return
		}
		if l.state == settledAhead {
			g.remove(off, l)
		} else {
			g.ahead--
		}
	}
	if g.ahead > 0 && next-first <= 2*chunkMask {
		for off := first; off < next && g.ahead > 0; off++ {
			if l := g.find(off); l != nil {
				visit(off, l)
			}
		}
	} else if g.ahead > 0 {
		var offs []uint64
		g.each(func(off uint64, _ *lease) {
			if off >= first && off < next {
				offs = append(offs, off)
			}
		})
		slices.Sort(offs)
		for _, off := range offs {
			visit(off, g.find(off))
		}
	}
	was := p.behind()
	for len(p.open) > 0 && p.open[0].to <= next {
		p.open = p.open[1:]
	}
	if len(p.open) > 0 {
		p.open[0].from = max(p.open[0].from, next)
	} else {
		p.open = nil
		p.next = max(p.next, next)
	}
	if was && !p.behind() {
		g.behind--
	}
	g.dirty = true
}

// spansMax is how often a deployment may have been excluded and not with messages left from each time.
const spansMax = 64

// exclude puts the excluded deployments of settings in force, which are not the group's yet: each has an endless span
// from here on, and the span of one that is excluded no longer ends here.
func (e *Engine) exclude(g *group, s *GroupSettings) (errs.Code, error) {
	wanted := make(map[uint64]bool, len(s.ExcludeDeployments))
	for _, name := range s.ExcludeDeployments {
		wanted[deployment(name)] = true
	}
	if len(wanted) == 0 && g.excludes == nil {
		return errs.OK, nil
	}
	// What says nothing goes first, so that the bounds count only what does.
	for _, dep := range sortedKeys(g.parts) {
		p := g.parts[dep]
		if len(p.open) == 0 {
			continue
		}
		b, i, _, err := e.unreadOf(g, dep, 0, e.stamp.Cluster)
		if err != nil {
			return errs.OK, err
		}
		switch {
		case b != nil:
			g.pass(dep, p, b.base+uint64(i))
		case p.behind():
			g.pass(dep, p, p.end())
		default:
			g.pass(dep, p, g.topic.next)
		}
	}
	if err := e.forgetParts(g); err != nil {
		return errs.OK, err
	}
	added := 0
	for dep := range wanted {
		switch p := g.parts[dep]; {
		case p == nil:
			added++
		case !p.excluded() && len(p.open) >= spansMax:
			return errs.Overloaded, nil
		}
	}
	if len(g.parts)+added > limits.DeploymentsPerGroupMax {
		return errs.TooManyGroups, nil
	}
	if g.parts == nil {
		g.parts = make(map[uint64]*partition)
	}
	for dep := range wanted {
		p := g.parts[dep]
		if p == nil {
			p = &partition{}
			g.parts[dep] = p
		}
		if p.excluded() {
			continue
		}
		p.open = append(p.open, span{from: max(g.next, p.next), to: endless, after: g.pos})
		p.next = 0
	}
	for dep, p := range g.parts {
		if wanted[dep] || !p.excluded() {
			continue
		}
		last := &p.open[len(p.open)-1]
		if last.from < g.next {
			last.to = g.next
			continue
		}
		p.next = last.from
		if p.open = p.open[:len(p.open)-1]; len(p.open) == 0 {
			p.open = nil
		}
	}
	g.countBehind()
	return errs.OK, nil
}

// reopen forgets all cursors of deployments, since the group's has been put elsewhere. What is excluded stays so.
func (g *group) reopen() {
	g.parts, g.behind = nil, 0
	for dep := range g.excludes {
		if g.parts == nil {
			g.parts = make(map[uint64]*partition)
		}
		g.parts[dep] = &partition{open: []span{{from: g.next, to: endless, after: g.pos}}}
	}
}

func (g *group) countBehind() {
	g.behind = 0
	for _, p := range g.parts {
		if p.behind() {
			g.behind++
		}
	}
}

// forgetParts drops the cursors that say nothing: nothing lives between the group's and themselves.
func (e *Engine) forgetParts(g *group) error {
	if len(g.parts) == 0 {
		return nil
	}
	b, i, err := e.firstLive(g.topic, nil, g.next, e.stamp.Cluster, false)
	if err != nil {
		return err
	}
	first := g.topic.next
	if b != nil {
		first = b.base + uint64(i)
	}
	for d, p := range g.parts {
		if len(p.open) == 0 && p.next <= first {
			delete(g.parts, d)
		}
	}
	return nil
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
		p := g.parts[d]
		b = binary.LittleEndian.AppendUint64(b, d)
		b = binary.AppendUvarint(b, p.next)
		b = binary.AppendUvarint(b, uint64(len(p.open)))
		for _, s := range p.open {
			b = binary.AppendUvarint(b, s.from)
			b = binary.AppendUvarint(b, s.to)
			b = s.after.append(b)
		}
	}
	return b
}

func (g *group) parseParts(r *reader) {
	n := r.count(10)
	if n > 0 {
		g.parts = make(map[uint64]*partition, n)
	}
	for range n {
		d := r.u64()
		p := &partition{next: r.uvarint()}
		for range r.count(4) {
			s := span{from: r.uvarint(), to: r.uvarint(), after: r.streamID()}
			if k := len(p.open); s.from > s.to || k > 0 && s.from < p.open[k-1].to {
				r.fail()
				return
			}
			p.open = append(p.open, s)
		}
		g.parts[d] = p
	}
	if len(g.parts) != n {
		r.fail()
	}
	g.countBehind()
}

// readyOf counts the messages of a deployment that the group was never given.
func (e *Engine) readyOf(g *group, dep uint64, now int64) (count uint64, err error) {
	off := uint64(0)
	for range 2 * looksMax {
		b, i, after, err := e.unreadOf(g, dep, off, now)
		if err != nil || b == nil {
			return count, err
		}
		for ; i < b.count; i++ {
			at := b.base + uint64(i)
			if b.dep(i) == dep && b.expiry(i) > now && !g.topic.removed(at) && !g.passed(at, dep) && g.find(at) == nil && after.less(b.streamOf(i)) {
				count++
			}
		}
		off = b.end()
	}
	return count, nil
}

// readyOfAll counts the messages that the group was never given, whatever their deployment, and finds the first one.
// Where deployments have cursors of their own it looks at so many blocks of each and takes the rest for ready; some may
// have expired in either case.
func (e *Engine) readyOfAll(g *group, now int64) (count, first uint64, err error) {
	t := g.topic
	first = endless
	note := func(off uint64, n uint64) {
		count += n
		first = min(first, off)
	}
	for _, dep := range sortedKeys(g.parts) {
		p := g.parts[dep]
		for off, looks := uint64(0), 2*looksMax; len(p.open) > 0 && looks > 0; looks-- {
			b, i, after, err := e.unreadOf(g, dep, off, now)
			if err != nil {
				return 0, 0, err
			}
			if b == nil || b.base+uint64(i) >= g.next {
				break
			}
			for off = b.base + uint64(i); off < min(b.end(), g.next); off++ {
				i := uint32(off - b.base)
				if b.dep(i) == dep && b.expiry(i) > now && !t.removed(off) && p.keeps(off) && g.find(off) == nil && after.less(b.streamOf(i)) {
					note(off, 1)
				}
			}
		}
	}
	b, i, err := e.firstLive(t, nil, g.next, now, false)
	if err != nil || b == nil {
		return count, first, err
	}
	off := b.base + uint64(i)
	if len(g.parts) == 0 {
		if n := t.next - off; n > uint64(g.ahead) {
			note(off, n-uint64(g.ahead))
		}
		return count, first, nil
	}
	for looks := 2 * looksMax; b != nil; looks-- {
		if looks == 0 {
			note(off, t.next-off)
			break
		}
		for ; off < b.end(); off++ {
			if !g.passed(off, b.dep(uint32(off-b.base))) && (g.ahead == 0 || g.find(off) == nil) {
				note(off, 1)
			}
		}
		if b, i, err = e.firstLive(t, b, b.end(), now, false); err != nil {
			return count, first, err
		}
		if b != nil {
			off = b.base + uint64(i)
		}
	}
	return count, first, nil
}
