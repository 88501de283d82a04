// Package bridge keeps a stream on one server in step with a stream on another, over the Valkey protocol on both sides:
// a real ElastiCache and a Tercet cluster's compat port, in either direction.
//
// Entries keep their IDs. The place up to which the copy is complete is stored on the receiving side in the same
// transaction as the entries, so that a bridge that died goes on exactly where the copy ends.
package bridge

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"strconv"
	"strings"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/hashicorp/go-hclog"
	"github.com/valkey-io/valkey-go"

	"tercet.dev/tercet/compat/gateway"
)

// Options are what a Bridge is made with. From, To and Stream are required.
type Options struct {
	From, To gateway.Target
	// Stream is the source's key, Copy the receiving one (default: the same name).
	Stream, Copy string
	// Groups says whether the state of consumer groups is carried along: positions, consumers, pending entries.
	Groups bool
	// BatchEntries and BatchBytes bound one transaction (defaults 1000 and 1 MiB).
	BatchEntries int
	BatchBytes   int
	// Progress is told what has happened, about ten times a second; nil is nobody.
	Progress func(Progress)
	Logger   hclog.Logger
}

// Progress is a bridge's state.
type Progress struct {
	// Copied counts the entries of all runs, Total the source's length when this run began plus what came since.
	Copied, Total int64
	// Position is the ID of the last entry copied.
	Position string
	// Lag is the number of entries known to be missing on the receiving side, -1 where the source does not say.
	Lag int64
	// Rate is entries per second in this run.
	Rate float64
	// Following is set once the bridge has caught up for the first time.
	Following bool
}

// Bridge copies one stream. It is not safe for concurrent use; two processes on one stream take turns without harm,
// since each transaction is conditional on the place it continues from.
type Bridge struct {
	o        Options
	from, to *gateway.Upstream
	log      hclog.Logger

	place  string // key of the record beside the copy
	record        // as it was last written, or as the copy was found
	writer writer
	// interrupted is the record of the last transaction whose outcome was not awaited.
	interrupted record

	started  time.Time
	ours     int64 // copied in this run
	told     time.Time
	pastHead bool
	shorter  bool // the source ended before the copy when it was looked at
}

const (
	readBlock   = 2 * time.Second
	groupsEvery = 5 * time.Second
	// connectPatience is how long a bridge that starts waits for somebody to listen.
	connectPatience = 15 * time.Second
	retryMin        = 50 * time.Millisecond
	retryMax        = 5 * time.Second
)

// Open connects to both sides and finds the place to go on from. A receiving stream that holds something else than a
// copy's beginning is refused.
func Open(ctx context.Context, o Options) (*Bridge, error) {
	if o.Copy == "" {
		o.Copy = o.Stream
	}
	if o.BatchEntries <= 0 {
		o.BatchEntries = 1000
	}
	if o.BatchBytes <= 0 {
		o.BatchBytes = 1 << 20
	}
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	if o.From.Addr == o.To.Addr && o.Stream == o.Copy {
		return nil, errors.New("source and copy are one stream")
	}
	b := &Bridge{o: o, log: o.Logger, place: recordKey(o.Copy)}
	var err error
	if b.from, err = b.connect(ctx, "source", o.From); err != nil {
		return nil, err
	}
	if b.to, err = b.connect(ctx, "receiving side", o.To); err != nil {
		b.from.Close()
		return nil, err
	}
	if err := b.retry(ctx, "copy", func() error { return b.locate(ctx) }); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// connect dials one side. A bridge may be started in the middle of a failover: nobody listening is waited out for a while.
func (b *Bridge) connect(ctx context.Context, what string, t gateway.Target) (u *gateway.Upstream, err error) {
	patience, cancel := context.WithTimeout(ctx, connectPatience)
	defer cancel()
	var last error
	err = b.retry(patience, what, func() error {
		u, last = gateway.Connect(t, b.o.Logger)
		if last != nil && !gateway.Unreachable(last) {
			return fatal{last}
		}
		return last
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, last)
	}
	return u, nil
}

// Close disconnects.
func (b *Bridge) Close() {
	b.writer.release()
	b.from.Close()
	b.to.Close()
}

// Position is the ID of the last entry copied.
func (b *Bridge) Position() string { return b.Place }

// locate finds out how far the copy goes.
func (b *Bridge) locate(ctx context.Context) error {
	b.record = record{Source: b.o.Stream, Place: "0-0"}
	text, err := b.ask(ctx, b.to, "GET", b.place).ToString()
	if err != nil && !valkey.IsValkeyNil(err) {
		return fmt.Errorf("receiving side: %w", err)
	}
	last, err := b.ask(ctx, b.to, "XREVRANGE", b.o.Copy, "+", "-", "COUNT", "1").ToArray()
	if err != nil {
		return fmt.Errorf("receiving side: %w", err)
	}
	mine, err := entriesOf(last)
	if err != nil {
		return fmt.Errorf("receiving side: %w", err)
	}
	if text != "" {
		rec, err := parseRecord(text)
		switch {
		case err != nil:
			return fatal{fmt.Errorf("the record %s on the receiving side cannot be read: %w", b.place, err)}
		case rec.Source != b.o.Stream:
			return fatal{fmt.Errorf("stream %s on the receiving side is a copy of stream %q, not of %q: copy into another stream (--copy NAME)",
				b.o.Copy, rec.Source, b.o.Stream)}
		case len(mine) == 0 || !less(rec.Place, mine[0].id):
			b.record = rec
			return nil
		}
	}
	if len(mine) == 0 {
		return nil
	}
	// The copy holds entries that no bridge in this direction brought: the way back after a switch, or the way forth
	// after that. It can go on if the newest of them is the source's too.
	same, err := b.ask(ctx, b.from, "XRANGE", b.o.Stream, mine[0].id, mine[0].id).ToArray()
	if err != nil {
		return fmt.Errorf("source: %w", err)
	}
	theirs, err := entriesOf(same)
	if err != nil {
		return fmt.Errorf("source: %w", err)
	}
	if len(theirs) != 1 || chain(0, theirs) != chain(0, mine) {
		return fatal{fmt.Errorf("stream %s on the receiving side holds entries that are not the source's (the newest is %s): copy into another "+
			"stream (--copy NAME), or delete it first", b.o.Copy, mine[0].id)}
	}
	b.Place = mine[0].id
	b.Copied, err = b.ask(ctx, b.to, "XLEN", b.o.Copy).AsInt64()
	b.was = text
	return err
}

// ask runs one command on a key of one side.
func (b *Bridge) ask(ctx context.Context, side *gateway.Upstream, command, key string, args ...string) (r valkey.ValkeyResult) {
	_ = side.Use(func(c valkey.Client) error {
		r = c.Do(ctx, c.B().Arbitrary(strings.Fields(command)...).Keys(key).Args(args...).Build())
		return r.Error()
	})
	return r
}

// entry is one entry of a stream, its fields in order.
type entry struct {
	id    string
	pairs []string
}

func entriesOf(list []valkey.ValkeyMessage) ([]entry, error) {
	es := make([]entry, 0, len(list))
	for _, m := range list {
		parts, err := m.ToArray()
		if err != nil || len(parts) != 2 {
			return nil, fmt.Errorf("an entry of %d parts: %w", len(parts), err)
		}
		id, err := parts[0].ToString()
		if err != nil {
			return nil, err
		}
		pairs, err := parts[1].AsStrSlice()
		if err != nil {
			return nil, err
		}
		es = append(es, entry{id, pairs})
	}
	return es, nil
}

func (e *entry) bytes() int {
	n := len(e.id) + 64
	for _, p := range e.pairs {
		n += len(p) + 16
	}
	return n
}

// hashInto adds the entry, self-delimiting, to a checksum.
func (e *entry) hashInto(h hash.Hash) {
	var n [8]byte
	for i := -1; i < len(e.pairs); i++ {
		s := e.id
		if i >= 0 {
			s = e.pairs[i]
		}
		binary.LittleEndian.PutUint64(n[:], uint64(len(s)))
		h.Write(n[:])
		h.Write([]byte(s))
	}
}

// chain adds entries to a chained checksum.
func chain(sum uint64, es []entry) uint64 {
	h := xxhash.New()
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], sum)
	_, _ = h.Write(n[:])
	for i := range es {
		es[i].hashInto(h)
	}
	return h.Sum64()
}

// Run copies until ctx ends, or, without follow, until nothing is missing. Trouble on either side is waited out.
func (b *Bridge) Run(ctx context.Context, follow bool) error {
	b.started, b.ours = time.Now(), 0
	for {
		err := b.run(ctx, follow)
		if errors.Is(err, errOurs) {
			// An earlier Run ended in the middle of it.
			b.record = b.interrupted
			continue
		}
		if !errors.Is(err, errBehind) {
			return err
		}
		// A failover of the receiving side took the last transactions back, record and entries together.
		b.log.Warn("the receiving side lost the end of the copy; going on from what it has", "position", b.Place)
		if err := b.retry(ctx, "receiving side", func() error { return b.locate(ctx) }); err != nil {
			return err
		}
	}
}

func (b *Bridge) run(ctx context.Context, follow bool) error {
	read := b.reader(ctx)
	defer read.stop()
	checked := time.Time{}
	for ctx.Err() == nil {
		batch, err := read.next(ctx)
		if err != nil {
			return err
		}
		if len(batch) > 0 {
			if err := b.store(ctx, batch); err != nil {
				return err
			}
		}
		caught := read.caughtUp()
		b.pastHead = b.pastHead || caught
		last := caught && !follow
		if caught && (last || time.Since(checked) >= groupsEvery) {
			if err := b.retry(ctx, "source", func() error { return b.checkSource(ctx) }); err != nil {
				return err
			}
			if b.o.Groups {
				if err := b.retry(ctx, "groups", func() error { return b.copyGroups(ctx) }); err != nil {
					return err
				}
			}
			checked = time.Now()
		}
		b.tell(ctx, caught)
		if last {
			return nil
		}
	}
	return ctx.Err()
}

// checkSource watches for a source that lost entries which had been copied: a failover to a replica that was behind. They
// stay in the copy. What the source appends from then on is newer than they are, unless its clock is behind as well; that
// cannot be brought into the order of the copy, and is not passed over in silence. Looking at one entry is enough: nothing
// can have been appended below one that both sides have.
func (b *Bridge) checkSource(ctx context.Context) error {
	list, err := b.ask(ctx, b.from, "XREVRANGE", b.o.Stream, "+", "-", "COUNT", "1").ToArray()
	if err != nil {
		return err
	}
	newest, err := entriesOf(list)
	if err != nil {
		return err
	}
	shorter := len(newest) == 0 || less(newest[0].id, b.Place)
	switch {
	case !shorter || b.shorter:
	case b.Place == "0-0":
		b.log.Warn("the source has no entries under this name", "stream", b.o.Stream)
	default:
		b.log.Warn("the source ends before the copy does; what it lost or deleted stays in the copy", "copy", b.Place)
	}
	b.shorter = shorter
	if len(newest) == 0 {
		return nil
	}
	if list, err = b.ask(ctx, b.from, "XREVRANGE", b.o.Stream, b.Place, "-", "COUNT", "1").ToArray(); err != nil {
		return err
	}
	theirs, err := entriesOf(list)
	if err != nil || len(theirs) == 0 {
		return err
	}
	// The copy's entry at that place, or the one behind it.
	if list, err = b.ask(ctx, b.to, "XRANGE", b.o.Copy, theirs[0].id, "+", "COUNT", "1").ToArray(); err != nil {
		return err
	}
	mine, err := entriesOf(list)
	if err != nil || len(mine) == 1 && chain(0, mine) == chain(0, theirs) {
		return err
	}
	if list, err = b.ask(ctx, b.to, "XREVRANGE", b.o.Copy, theirs[0].id, "-", "COUNT", "1").ToArray(); err != nil || len(list) == 0 {
		return err // the copy was trimmed
	}
	return fatal{fmt.Errorf("the source lost entries and went on before them: entry %s cannot follow %s in the copy; copy into another "+
		"stream (--copy NAME)", theirs[0].id, b.Place)}
}

// tell reports progress.
func (b *Bridge) tell(ctx context.Context, caught bool) {
	if b.o.Progress == nil || time.Since(b.told) < 100*time.Millisecond && !caught {
		return
	}
	b.told = time.Now()
	p := Progress{Copied: b.Copied, Position: b.Place, Lag: -1, Following: b.pastHead}
	if n, err := b.ask(ctx, b.from, "XLEN", b.o.Stream).AsInt64(); err == nil {
		p.Total = max(n, b.Copied)
		p.Lag = max(n-b.Copied, 0)
	}
	if caught {
		p.Lag = 0
	}
	if s := time.Since(b.started).Seconds(); s > 0 {
		p.Rate = float64(b.ours) / s
	}
	b.o.Progress(p)
}

// reader fetches batches ahead of their being stored.
type reader struct {
	b      *Bridge
	got    chan batch
	cancel context.CancelFunc
	done   chan struct{}
	behind bool // the last batch said that there is more
	rest   []entry
}

type batch struct {
	entries []entry
	caught  bool
	err     error
}

func (b *Bridge) reader(ctx context.Context) *reader {
	ctx, cancel := context.WithCancel(ctx)
	r := &reader{b: b, got: make(chan batch, 2), cancel: cancel, done: make(chan struct{}), behind: true}
	go r.run(ctx, b.Place)
	return r
}

func (r *reader) stop() {
	r.cancel()
	for range r.got { // until the goroutine has gone
	}
	<-r.done
}

// run reads from the source, from a place on.
func (r *reader) run(ctx context.Context, place string) {
	defer close(r.done)
	defer close(r.got)
	block := false
	for ctx.Err() == nil {
		var es []entry
		err := r.b.retry(ctx, "source", func() error {
			return r.b.from.Use(func(c valkey.Client) error {
				cmd := c.B().Arbitrary("XREAD", "COUNT", strconv.Itoa(r.b.o.BatchEntries))
				if block {
					cmd = cmd.Args("BLOCK", strconv.FormatInt(readBlock.Milliseconds(), 10))
				}
				cmd = cmd.Args("STREAMS").Keys(r.b.o.Stream).Args(place)
				var built valkey.Completed
				if block {
					built = cmd.Blocking()
				} else {
					built = cmd.ReadOnly()
				}
				answer, err := c.Do(ctx, built).ToAny()
				if valkey.IsValkeyNil(err) {
					es = nil
					return nil
				}
				if err != nil {
					return err
				}
				es, err = fromXRead(answer)
				return err
			})
		})
		if err != nil {
			select {
			case r.got <- batch{err: err}:
			case <-ctx.Done():
			}
			return
		}
		if len(es) > 0 {
			place = es[len(es)-1].id
		}
		block = len(es) < r.b.o.BatchEntries
		select {
		case r.got <- batch{entries: es, caught: block}:
		case <-ctx.Done():
			return
		}
	}
}

// fromXRead takes the entries out of the answer of an XREAD of one stream, in either protocol version.
func fromXRead(answer any) ([]entry, error) {
	var list any
	switch a := answer.(type) {
	case map[string]any:
		for _, v := range a {
			list = v
		}
	case []any:
		if len(a) == 1 {
			if pair, ok := a[0].([]any); ok && len(pair) == 2 {
				list = pair[1]
			}
		}
	}
	rows, ok := list.([]any)
	if !ok {
		return nil, fmt.Errorf("the source answered XREAD with %T", answer)
	}
	es := make([]entry, 0, len(rows))
	for _, row := range rows {
		parts, ok := row.([]any)
		if !ok || len(parts) != 2 {
			return nil, fmt.Errorf("the source answered XREAD with an entry that is none")
		}
		id, _ := parts[0].(string)
		fields, ok := parts[1].([]any)
		if id == "" || !ok {
			return nil, fmt.Errorf("the source answered XREAD with an entry that is none")
		}
		pairs := make([]string, len(fields))
		for i, f := range fields {
			if pairs[i], ok = f.(string); !ok {
				return nil, fmt.Errorf("the source answered XREAD with a field that is no string")
			}
		}
		es = append(es, entry{id, pairs})
	}
	return es, nil
}

// next returns what is to be stored in one transaction. An empty batch means that nothing came for a while.
func (r *reader) next(ctx context.Context) ([]entry, error) {
	if len(r.rest) == 0 {
		select {
		case b, ok := <-r.got:
			if !ok {
				return nil, ctx.Err()
			}
			if b.err != nil {
				return nil, b.err
			}
			r.rest, r.behind = b.entries, !b.caught
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	n, size := 0, 0
	for n < len(r.rest) && (n == 0 || size+r.rest[n].bytes() <= r.b.o.BatchBytes) {
		size += r.rest[n].bytes()
		n++
	}
	out := r.rest[:n]
	r.rest = r.rest[n:]
	return out, nil
}

// caughtUp reports whether everything that was read is stored and the source had nothing more.
func (r *reader) caughtUp() bool { return !r.behind && len(r.rest) == 0 && len(r.got) == 0 }

// fatal is an error that repeating does not help.
type fatal struct{ error }

func (f fatal) Unwrap() error { return f.error }

// retry repeats f until it succeeds, fails for good, or ctx ends.
func (b *Bridge) retry(ctx context.Context, what string, f func() error) error {
	delay := retryMin
	for {
		err := f()
		var final fatal
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.As(err, &final):
			return final.error
		case refused(err):
			return fmt.Errorf("%s: %w", what, err)
		}
		b.log.Warn("waiting", "side", what, "error", err, "retry", delay)
		timer := time.NewTimer(delay)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
		delay = min(2*delay, retryMax)
	}
}

// refused reports whether the server's answer is about the request and not about the moment.
func refused(err error) bool {
	ve, ok := valkey.IsValkeyErr(err)
	if !ok || ve.IsNil() {
		return false
	}
	for _, passing := range []string{"READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "UNBLOCKED", "WRONGPASS", "OOM", "NOREPLICAS", "MISCONF", "BUSY ", "ERR outcome unknown", "EXECABORT", "MOVED", "ASK"} {
		if strings.HasPrefix(ve.Error(), passing) {
			return false
		}
	}
	return true
}
