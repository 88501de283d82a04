package bridge

import (
	"context"
	"fmt"
	"strconv"

	"github.com/valkey-io/valkey-go"
)

// Comparison is what Verify found.
type Comparison struct {
	// Source and Copy count the entries up to Position; Missing, Foreign and Different say how they differ.
	Source, Copy                int64
	Missing, Foreign, Different int64
	// Deleted counts the entries of the copy that the source had and has deleted or trimmed since: no difference.
	Deleted int64
	// FirstDifference is the ID of the first entry that differs, empty if none does.
	FirstDifference string
	// Sum is the chained checksum over the entries of the source, equal on both sides if nothing differs.
	Sum      uint64
	Position string
}

// Equal reports whether the copy is the source up to the position.
func (c Comparison) Equal() bool { return c.Missing == 0 && c.Foreign == 0 && c.Different == 0 }

// deletions is what the source says about entries that it has no more.
type deletions struct{ first, newest string }

func (b *Bridge) deletions(ctx context.Context) (d deletions, err error) {
	err = b.retry(ctx, "source", func() error {
		info, err := b.ask(ctx, b.from, "XINFO STREAM", b.o.Stream).ToMap()
		if err != nil {
			return err
		}
		if m, ok := info["max-deleted-entry-id"]; ok {
			if d.newest, err = m.ToString(); err != nil {
				return err
			}
		}
		if m, ok := info["first-entry"]; ok && !m.IsNil() {
			es, err := entriesOf([]valkey.ValkeyMessage{m})
			if err != nil {
				return err
			}
			d.first = es[0].id
		}
		return nil
	})
	return d, err
}

// deleted reports whether the source may have had an entry that it has no more.
func (d deletions) deleted(id string) bool {
	return d.first != "" && less(id, d.first) || d.newest != "" && !less(d.newest, id)
}

// Verify reads both streams up to the bridge's position and compares every entry. With since, an earlier comparison, it goes
// on from where that one ended. progress is told the number of entries read; nil is nobody.
func (b *Bridge) Verify(ctx context.Context, since Comparison, progress func(int64)) (Comparison, error) {
	c := since
	source := &ranges{b: b, side: true, last: c.Position}
	copied := &ranges{b: b, last: c.Position}
	c.Position = b.Place
	var gone deletions
	known := false
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
			copied.back(okD)
		default:
			if !known || !gone.deleted(d.id) {
				// It may have been deleted since the last look.
				if gone, err = b.deletions(ctx); err != nil {
					return c, fmt.Errorf("source: %w", err)
				}
				known = true
			}
			c.Copy++
			if gone.deleted(d.id) {
				c.Deleted++
			} else {
				c.Foreign++
				note(d.id)
			}
			source.back(okS)
		}
		if n := c.Source + c.Foreign + c.Deleted; progress != nil && n%pageSize == 0 {
			progress(n)
		}
	}
}

// ranges walks a stream up to the bridge's position.
type ranges struct {
	b    *Bridge
	side bool // the source's
	list []entry
	at   int
	last string
	end  bool
}

// back undoes one next that found something.
func (r *ranges) back(ok bool) {
	if ok {
		r.at--
	}
}

func (r *ranges) next(ctx context.Context) (entry, bool, error) {
	if r.at == len(r.list) && !r.end {
		side, key, from := r.b.to, r.b.o.Copy, "-"
		if r.side {
			side, key = r.b.from, r.b.o.Stream
		}
		if r.last != "" {
			from = "(" + r.last
		}
		err := r.b.retry(ctx, "verify", func() error {
			list, err := r.b.ask(ctx, side, "XRANGE", key, from, r.b.Place, "COUNT", strconv.Itoa(pageSize)).ToArray()
			if err != nil {
				return err
			}
			r.list, err = entriesOf(list)
			return err
		})
		if err != nil {
			return entry{}, false, err
		}
		r.at = 0
		r.end = len(r.list) < pageSize
		if len(r.list) > 0 {
			r.last = r.list[len(r.list)-1].id
		}
	}
	if r.at == len(r.list) {
		return entry{}, false, nil
	}
	r.at++
	return r.list[r.at-1], true, nil
}
