package bridge

import (
	"context"
	"fmt"
	"maps"
	"strconv"
	"strings"

	"github.com/valkey-io/valkey-go"

	"tercet.dev/tercet/compat/gateway"
)

// copyGroups makes the receiving side's consumer groups what the source's are: position, pending entries with their
// owners, idle times and delivery counts. Entries that are not pending at the source any more are acknowledged. Groups that
// exist on the receiving side alone are left as they are, and so is a group from which somebody there has read: its state
// is theirs from then on.
func (b *Bridge) copyGroups(ctx context.Context) error {
	groups, err := b.groups(ctx, b.from, b.o.Stream)
	if err != nil || len(groups) == 0 {
		return err
	}
	list, err := b.groups(ctx, b.to, b.o.Copy)
	if err != nil {
		return err
	}
	there := make(map[string]groupInfo, len(list))
	for _, g := range list {
		there[g.name] = g
	}
	for _, g := range groups {
		if err := b.copyGroup(ctx, g, there); err != nil {
			return fmt.Errorf("group %s: %w", g.name, err)
		}
	}
	return nil
}

// groupInfo is a line of XINFO GROUPS.
type groupInfo struct{ name, position, read string }

func (b *Bridge) groups(ctx context.Context, side *gateway.Upstream, stream string) ([]groupInfo, error) {
	rows, err := b.ask(ctx, side, "XINFO GROUPS", stream).ToArray()
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

// pageSize bounds one answer about pending entries, and one transaction that changes them.
const pageSize = 1000

// command is one change of a group.
type command struct {
	words []string // the command's own
	args  []string // behind the key
}

func (b *Bridge) copyGroup(ctx context.Context, g groupInfo, theirs map[string]groupInfo) error {
	name := groupName(g.name)
	if b.Own[name] {
		return nil
	}
	old, exists := theirs[g.name]
	if given, ok := b.Groups[name]; ok && exists && less(given, old.position) {
		b.log.Warn("consumers at the receiving side read from the group: its state is not carried along any more", "group", g.name)
		next := b.record
		next.Own = maps.Clone(b.Own)
		if next.Own == nil {
			next.Own = make(map[string]bool)
		}
		next.Own[name] = true
		_, err := b.transact(ctx, next, func(valkey.Client) []valkey.Completed { return nil })
		return err
	}
	position, read := g.position, g.read
	if less(b.Place, position) {
		position, read = b.Place, "" // what is not copied yet was not passed
	}
	var changes []command
	if !exists || old.position != position || read != "" && old.read != read {
		args := []string{g.name, position}
		words := []string{"XGROUP", "SETID"}
		if !exists {
			words[1] = "CREATE"
			args = append(args, "MKSTREAM")
		}
		if read != "" {
			args = append(args, "ENTRIESREAD", read)
		}
		changes = append(changes, command{words, args})
	}
	flush := func(least int) error {
		if len(changes) <= least && (least > 0 || b.Groups[name] == position && len(changes) == 0) {
			return nil
		}
		next := b.record
		if next.Groups = maps.Clone(b.Groups); next.Groups == nil {
			next.Groups = make(map[string]string)
		}
		next.Groups[name] = position
		results, err := b.transact(ctx, next, func(c valkey.Client) []valkey.Completed {
			cmds := make([]valkey.Completed, len(changes))
			for i, k := range changes {
				cmds[i] = c.B().Arbitrary(k.words...).Keys(b.o.Copy).Args(k.args...).Build()
			}
			return cmds
		})
		if err != nil {
			return err
		}
		for _, r := range results {
			if err := r.Error(); err != nil {
				return err
			}
		}
		changes = changes[:0]
		return nil
	}
	here, err := newPages(ctx, b, true, g.name)
	if err != nil {
		return err
	}
	there := &pages{}
	if exists {
		if there, err = newPages(ctx, b, false, g.name); err != nil {
			return err
		}
	}
	// Both lists are in the order of IDs: one walk over the two finds what differs.
	for here.ok || there.ok {
		switch {
		case !here.ok || there.ok && less(there.at.id, here.at.id):
			changes = append(changes, command{[]string{"XACK"}, []string{g.name, there.at.id}})
			err = there.advance(ctx)
		default:
			same := there.ok && there.at.id == here.at.id
			if !less(b.Place, here.at.id) && (!same || there.at.consumer != here.at.consumer || there.at.count != here.at.count) {
				p := here.at
				changes = append(changes, command{[]string{"XCLAIM"}, []string{g.name, p.consumer, "0", p.id, "IDLE", strconv.FormatInt(p.idle, 10),
					"RETRYCOUNT", strconv.FormatInt(p.count, 10), "FORCE", "JUSTID"}})
			}
			if same {
				if err := there.advance(ctx); err != nil {
					return err
				}
			}
			err = here.advance(ctx)
		}
		if err == nil {
			err = flush(pageSize)
		}
		if err != nil {
			return err
		}
	}
	return flush(0)
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
