package bridge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/valkey-io/valkey-go"
)

// record is what lies beside the copy and moves with it: each transaction that appends entries writes it too. It is a
// string, which every receiving side has.
type record struct {
	// Source is the stream that is copied, not its address: that is another after a failover.
	Source string `json:"source"`
	// Place is the ID of the last entry copied.
	Place string `json:"position"`
	// Copied counts the entries, Sum chains their checksums.
	Copied int64  `json:"copied"`
	Sum    uint64 `json:"sum,string"`
	// Turn counts the transactions, so that each record is another than the one before.
	Turn uint64 `json:"turn"`
	// Groups are the positions that the bridge gave the copy's groups, by name in ASCII. Own are the groups that
	// consumers at the receiving side have taken over.
	Groups map[string]string `json:"groups,omitempty"`
	Own    map[string]bool   `json:"own,omitempty"`

	was string // as it stands on the receiving side
}

func parseRecord(text string) (record, error) {
	r := record{was: text}
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		return r, err
	}
	if ms, _, ok := strings.Cut(r.Place, "-"); !ok || ms == "" {
		return r, fmt.Errorf("position %q", r.Place)
	}
	return r, nil
}

// text is the record as it is stored.
func (r *record) text() string {
	b, err := json.Marshal(r)
	if err != nil {
		panic(err) // strings and numbers
	}
	return string(b)
}

// recordKey is the record's key. It lies in the copy's slot.
func recordKey(stream string) string {
	if _, rest, ok := strings.Cut(stream, "{"); ok && strings.Index(rest, "}") > 0 {
		return stream + ":tercet:bridge"
	}
	return "{" + stream + "}:tercet:bridge"
}

var (
	// errElsewhere says that another bridge has moved the copy on.
	errElsewhere = errors.New("another bridge writes to the same copy: stop one of them")
	// errBehind says that the receiving side has lost what this bridge had stored.
	errBehind = errors.New("the receiving side lost the end of the copy")
	// errOurs says that a transaction happened which this bridge did not wait for.
	errOurs = errors.New("a transaction that was interrupted did happen")
	// errRaced says that the record changed between the look at it and the transaction.
	errRaced = errors.New("the record changed under the transaction")
)

// writer is the connection that carries out transactions. It watches the record from the end of one to the next, so that
// each takes one round trip.
type writer struct {
	of       valkey.Client
	conn     valkey.DedicatedClient
	giveUp   func()
	watching bool // and the record is as it was last written
}

func (w *writer) get(c valkey.Client) valkey.DedicatedClient {
	if w.of != c {
		w.release()
		w.of = c
		w.conn, w.giveUp = c.Dedicate()
	}
	return w.conn
}

func (w *writer) release() {
	if w.of != nil {
		w.giveUp()
		*w = writer{}
	}
}

// transact carries commands out together with the record next, if the record is still what this bridge knows. build is
// asked for the commands each time. When the outcome of an attempt is not known, the record tells. It returns the answers of
// the commands, nil if an earlier attempt was the one that succeeded.
func (b *Bridge) transact(ctx context.Context, next record, build func(valkey.Client) []valkey.Completed) (answers []valkey.ValkeyMessage, err error) {
	next.Turn = b.Turn + 1
	text := next.text()
	err = b.retry(ctx, "receiving side", func() error {
		return b.to.Use(func(client valkey.Client) error {
			answers, err = b.attempt(ctx, client, text, build)
			if err != nil {
				b.writer.release()
			}
			return err
		})
	})
	next.was = text
	if err != nil {
		b.interrupted = next // it may happen yet
		return nil, err
	}
	b.record = next
	return answers, nil
}

func (b *Bridge) attempt(ctx context.Context, client valkey.Client, text string, build func(valkey.Client) []valkey.Completed) ([]valkey.ValkeyMessage, error) {
	w := &b.writer
	c := w.get(client)
	look := func() []valkey.Completed {
		return []valkey.Completed{c.B().Watch().Key(b.place).Build(), c.B().Get().Key(b.place).Build()}
	}
	seen := func(watched, got valkey.ValkeyResult) (string, error) {
		if err := watched.Error(); err != nil {
			return "", err
		}
		at, err := got.ToString()
		if valkey.IsValkeyNil(err) {
			err = nil
		}
		return at, err
	}
	if !w.watching {
		first := c.DoMulti(ctx, look()...)
		at, err := seen(first[0], first[1])
		if err != nil {
			return nil, err
		}
		switch {
		case at == text:
			w.watching = true
			return nil, nil // a transaction whose answer was lost did happen
		case at != b.was:
			return nil, b.judge(at)
		}
		w.watching = true
	}
	own := build(client)
	cmds := make([]valkey.Completed, 0, len(own)+5)
	cmds = append(cmds, c.B().Multi().Build())
	cmds = append(cmds, own...)
	cmds = append(cmds, c.B().Set().Key(b.place).Value(text).Build(), c.B().Exec().Build())
	cmds = append(cmds, look()...)
	answers := c.DoMulti(ctx, cmds...)
	w.watching = false
	exec := len(own) + 2
	for _, a := range answers[:exec] {
		if err := a.Error(); err != nil {
			return nil, err
		}
	}
	results, err := answers[exec].ToArray()
	switch {
	case valkey.IsValkeyNil(err):
		return nil, errRaced
	case err != nil:
		return nil, err
	}
	if at, err := seen(answers[exec+1], answers[exec+2]); err == nil && at == text {
		w.watching = true
	} else {
		w.release()
	}
	return results[:len(own)], nil
}

// judge says what it means that the record is not what this bridge wrote.
func (b *Bridge) judge(at string) error {
	switch at {
	case "":
		return fatal{errBehind}
	case b.interrupted.was:
		return fatal{errOurs}
	}
	rec, err := parseRecord(at)
	switch {
	case err != nil:
		return fatal{fmt.Errorf("the record %s on the receiving side cannot be read: %w", b.place, err)}
	case rec.Source == b.Source && less(rec.Place, b.Place):
		return fatal{errBehind}
	}
	return fatal{fmt.Errorf("%w (the record says %s, this one is at %s)", errElsewhere, rec.Place, b.Place)}
}

// store appends entries to the copy.
func (b *Bridge) store(ctx context.Context, es []entry) error {
	next := b.record
	next.Place, next.Copied, next.Sum = es[len(es)-1].id, b.Copied+int64(len(es)), chain(b.Sum, es)
	before := b.record
	results, err := b.transact(ctx, next, func(c valkey.Client) []valkey.Completed {
		cmds := make([]valkey.Completed, len(es))
		for i := range es {
			cmds[i] = c.B().Arbitrary("XADD").Keys(b.o.Copy).Args(es[i].id).Args(es[i].pairs...).Build()
		}
		return cmds
	})
	if err != nil {
		return err
	}
	for i, r := range results {
		if refusal := r.Error(); refusal != nil {
			return b.takeBack(ctx, before, es, i, refusal)
		}
	}
	b.ours += int64(len(es))
	return nil
}

// takeBack undoes a transaction of which an entry was refused: a gap must not be followed by anything. The copy ends before
// that entry afterwards, so that the next run meets it again.
func (b *Bridge) takeBack(ctx context.Context, before record, es []entry, refused int, refusal error) error {
	next := before
	if refused > 0 {
		good := es[:refused]
		next.Place, next.Copied, next.Sum = good[refused-1].id, before.Copied+int64(refused), chain(before.Sum, good)
	}
	_, err := b.transact(ctx, next, func(c valkey.Client) []valkey.Completed {
		ids := make([]string, 0, len(es)-refused)
		for _, e := range es[refused:] {
			ids = append(ids, e.id)
		}
		return []valkey.Completed{
			c.B().Xdel().Key(b.o.Copy).Id(ids...).Build(),
			c.B().Arbitrary("XSETID").Keys(b.o.Copy).Args(next.Place).Build(),
		}
	})
	if err != nil {
		return fmt.Errorf("entry %s was refused (%w), and what follows it could not be taken back: %w", es[refused].id, refusal, err)
	}
	return fmt.Errorf("the receiving side refuses entry %s of %d bytes: %w; the copy ends before it. Run the bridge again when the reason is gone, or the entry deleted at the source", es[refused].id, es[refused].bytes(), refusal)
}

// groupName makes a group's name fit for the record, whatever its bytes.
func groupName(name string) string { return strconv.QuoteToASCII(name) }
