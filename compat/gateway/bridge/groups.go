package bridge

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/valkey-io/valkey-go"
)

// copyGroups makes the receiving side's consumer groups what the source's are: position, consumers, pending entries with
// their owners, idle times and delivery counts. Entries that are not pending at the source any more are acknowledged.
// Groups that exist on the receiving side alone are left as they are.
func (b *Bridge) copyGroups(ctx context.Context) error {
	groups, err := b.groups(ctx)
	if err != nil {
		return err
	}
	for _, g := range groups {
		if err := b.copyGroup(ctx, g); err != nil {
			return fmt.Errorf("group %s: %w", g.name, err)
		}
	}
	return nil
}

// groupInfo is a line of XINFO GROUPS.
type groupInfo struct{ name, position, read string }

func (b *Bridge) groups(ctx context.Context) ([]groupInfo, error) {
	rows, err := b.ask(ctx, b.from, "XINFO GROUPS", b.o.Stream).ToArray()
	if err != nil {
		if strings.Contains(err.Error(), "no such key") {
			return nil, nil
		}
		return nil, err
	}
	var out []groupInfo
	for _, row := range rows {
		m, err := row.ToMap()
		if err != nil {
			return nil, err
		}
		var g groupInfo
		text := func(name string) string {
			v, ok := m[name]
			if !ok {
				return ""
			}
			if n, err := v.ToInt64(); err == nil {
				return strconv.FormatInt(n, 10)
			}
			s, _ := v.ToString()
			return s
		}
		g.name, g.position, g.read = text("name"), text("last-delivered-id"), text("entries-read")
		out = append(out, g)
	}
	return out, nil
}

// pending is a line of the long form of XPENDING.
type pending struct {
	id, consumer string
	idle, count  int64
}

// pageSize bounds one answer about pending entries.
const pageSize = 1000

func (b *Bridge) copyGroup(ctx context.Context, g groupInfo) error {
	position := g.position
	if less(b.position, position) {
		position = b.position // what is not copied yet was not passed
	}
	start := []string{g.name, position}
	if g.read != "" && position == g.position {
		start = append(start, "ENTRIESREAD", g.read)
	}
	err := b.ask(ctx, b.to, "XGROUP SETID", b.o.Copy, start...).Error()
	if err != nil && strings.HasPrefix(err.Error(), "NOGROUP") || err != nil && strings.Contains(err.Error(), "requires the key to exist") {
		create := append([]string{start[0], start[1], "MKSTREAM"}, start[2:]...)
		err = b.ask(ctx, b.to, "XGROUP CREATE", b.o.Copy, create...).Error()
	}
	if err != nil {
		return err
	}
	here, err := newPages(ctx, b, true, g.name)
	if err != nil {
		return err
	}
	there, err := newPages(ctx, b, false, g.name)
	if err != nil {
		return err
	}
	// Both lists are in the order of IDs: one walk over the two finds what differs.
	for here.ok || there.ok {
		switch {
		case !here.ok || there.ok && less(there.at.id, here.at.id):
			if err := b.ask(ctx, b.to, "XACK", b.o.Copy, g.name, there.at.id).Error(); err != nil {
				return err
			}
			err = there.advance(ctx)
		default:
			same := there.ok && there.at.id == here.at.id
			if !less(b.position, here.at.id) && (!same || there.at.consumer != here.at.consumer || there.at.count != here.at.count) {
				p := here.at
				err := b.ask(ctx, b.to, "XCLAIM", b.o.Copy, g.name, p.consumer, "0", p.id, "IDLE", strconv.FormatInt(p.idle, 10),
					"RETRYCOUNT", strconv.FormatInt(p.count, 10), "FORCE", "JUSTID").Error()
				if err != nil {
					return err
				}
			}
			if same {
				if err := there.advance(ctx); err != nil {
					return err
				}
			}
			err = here.advance(ctx)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// pages walks a pending entries list.
type pages struct {
	b      *Bridge
	source bool
	group  string
	list   []pending
	more   bool
	at     pending
	ok     bool
}

func newPages(ctx context.Context, b *Bridge, source bool, group string) (*pages, error) {
	p := &pages{b: b, source: source, group: group, more: true}
	return p, p.fetch(ctx, "-")
}

func (p *pages) fetch(ctx context.Context, from string) error {
	side, key := p.b.to, p.b.o.Copy
	if p.source {
		side, key = p.b.from, p.b.o.Stream
	}
	rows, err := p.b.ask(ctx, side, "XPENDING", key, p.group, from, "+", strconv.Itoa(pageSize)).ToArray()
	if err != nil {
		return err
	}
	p.list = p.list[:0]
	for _, row := range rows {
		parts, err := row.ToArray()
		if err != nil || len(parts) != 4 {
			return fmt.Errorf("XPENDING answered a line of %d parts: %w", len(parts), err)
		}
		var e pending
		if e.id, err = parts[0].ToString(); err == nil {
			e.consumer, err = parts[1].ToString()
		}
		if err == nil {
			e.idle, err = parts[2].AsInt64()
		}
		if err == nil {
			e.count, err = parts[3].AsInt64()
		}
		if err != nil {
			return err
		}
		p.list = append(p.list, e)
	}
	p.more = len(rows) == pageSize
	return p.advance(ctx)
}

func (p *pages) advance(ctx context.Context) error {
	if len(p.list) == 0 {
		last := p.at.id
		if p.more && p.ok {
			p.more = false
			return p.fetch(ctx, "("+last)
		}
		p.ok = false
		return nil
	}
	p.at, p.list, p.ok = p.list[0], p.list[1:], true
	return nil
}

// less compares IDs.
func less(a, b string) bool {
	ams, aseq := split(a)
	bms, bseq := split(b)
	return ams < bms || ams == bms && aseq < bseq
}

func split(id string) (ms, seq uint64) {
	a, s, _ := strings.Cut(id, "-")
	ms, _ = strconv.ParseUint(a, 10, 64)
	seq, _ = strconv.ParseUint(s, 10, 64)
	return ms, seq
}

// Comparison is what Verify found.
type Comparison struct {
	// Source and Copy count the entries up to Position; Missing, Foreign and Different say how they differ.
	Source, Copy                int64
	Missing, Foreign, Different int64
	// FirstDifference is the ID of the first entry that differs, empty if none does.
	FirstDifference string
	// Sum is the checksum over the source's entries up to Position, equal on both sides if nothing differs.
	Sum      uint64
	Position string
}

// Equal reports whether the copy is the source up to the position.
func (c Comparison) Equal() bool { return c.Missing == 0 && c.Foreign == 0 && c.Different == 0 }

// Verify reads both streams up to the bridge's position and compares every entry. progress is told the number of
// entries read; nil is nobody.
func (b *Bridge) Verify(ctx context.Context, progress func(int64)) (Comparison, error) {
	c := Comparison{Position: b.position}
	source := &ranges{b: b, side: true}
	copied := &ranges{b: b}
	for {
		s, okS, err := source.next(ctx)
		if err != nil {
			return c, fmt.Errorf("source: %w", err)
		}
		d, okD, err := copied.next(ctx)
		if err != nil {
			return c, fmt.Errorf("receiving side: %w", err)
		}
		if !okS && !okD {
			return c, nil
		}
		note := func(id string) {
			if c.FirstDifference == "" {
				c.FirstDifference = id
			}
		}
		switch {
		case okS && okD && s.id == d.id:
			c.Source++
			c.Copy++
			h, g := chain(c.Sum, []entry{s}), chain(c.Sum, []entry{d})
			if h != g {
				c.Different++
				note(s.id)
			}
			c.Sum = h
		case okS && (!okD || less(s.id, d.id)):
			c.Source++
			c.Missing++
			note(s.id)
			copied.back(d, okD)
		default:
			c.Copy++
			c.Foreign++
			note(d.id)
			source.back(s, okS)
		}
		if n := c.Source + c.Foreign; progress != nil && n%pageSize == 0 {
			progress(n)
		}
	}
}

// ranges walks a stream up to the bridge's position.
type ranges struct {
	b    *Bridge
	side bool // the source's
	list []entry
	last string
	end  bool
}

func (r *ranges) back(e entry, ok bool) {
	if ok {
		r.list = append([]entry{e}, r.list...)
	}
}

func (r *ranges) next(ctx context.Context) (entry, bool, error) {
	if len(r.list) == 0 && !r.end {
		side, key, from := r.b.to, r.b.o.Copy, "-"
		if r.side {
			side, key = r.b.from, r.b.o.Stream
		}
		if r.last != "" {
			from = "(" + r.last
		}
		err := r.b.retry(ctx, "verify", func() error {
			var list []valkey.ValkeyMessage
			list, err := r.b.ask(ctx, side, "XRANGE", key, from, r.b.position, "COUNT", strconv.Itoa(pageSize)).ToArray()
			if err != nil {
				return err
			}
			r.list, err = entriesOf(list)
			return err
		})
		if err != nil {
			return entry{}, false, err
		}
		r.end = len(r.list) < pageSize
		if len(r.list) > 0 {
			r.last = r.list[len(r.list)-1].id
		}
	}
	if len(r.list) == 0 {
		return entry{}, false, nil
	}
	e := r.list[0]
	r.list = r.list[1:]
	return e, true, nil
}
