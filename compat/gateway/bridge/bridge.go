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

	record   string // key of the record beside the copy
	position string
	copied   int64
	sum      uint64 // chained checksum of all entries copied

	started  time.Time
	ours     int64 // copied in this run
	told     time.Time
	pastHead bool
}

const (
	readBlock   = 2 * time.Second
	groupsEvery = 5 * time.Second
	retryMin    = 50 * time.Millisecond
	retryMax    = 5 * time.Second
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
	b := &Bridge{o: o, log: o.Logger, record: "{" + o.Copy + "}:tercet:bridge", position: "0-0"}
	var err error
	if b.from, err = gateway.Connect(o.From, o.Logger); err != nil {
		return nil, fmt.Errorf("source: %w", err)
	}
	if b.to, err = gateway.Connect(o.To, o.Logger); err != nil {
		b.from.Close()
		return nil, fmt.Errorf("receiving side: %w", err)
	}
	if err := b.locate(ctx); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// Close disconnects.
func (b *Bridge) Close() {
	b.from.Close()
	b.to.Close()
}

// Position is the ID of the last entry copied.
func (b *Bridge) Position() string { return b.position }

// source is how the record names the source: the stream, not the address, which is another after a failover.
func (b *Bridge) source() string { return b.o.Stream }

// locate reads the record on the receiving side.
func (b *Bridge) locate(ctx context.Context) error {
	rec, err := b.ask(ctx, b.to, "HGETALL", b.record).AsStrMap()
	if err != nil && !valkey.IsValkeyNil(err) && !unknownCommand(err) {
		return fmt.Errorf("receiving side: %w", err)
	}
	if len(rec) > 0 {
		return b.restore(rec)
	}
	last, err := b.ask(ctx, b.to, "XREVRANGE", b.o.Copy, "+", "-", "COUNT", "1").AsXRange()
	if err != nil {
		return fmt.Errorf("receiving side: %w", err)
	}
	if len(last) == 0 {
		return nil
	}
	// A copy without a record: the way back after a migration. It can go on if its newest entry is the source's too.
	same, err := b.ask(ctx, b.from, "XRANGE", b.o.Stream, last[0].ID, last[0].ID).ToArray()
	if err != nil {
		return fmt.Errorf("source: %w", err)
	}
	mine, err := b.ask(ctx, b.to, "XRANGE", b.o.Copy, last[0].ID, last[0].ID).ToArray()
	if err != nil {
		return fmt.Errorf("receiving side: %w", err)
	}
	if len(same) != 1 || len(mine) != 1 || digest(same[0]) != digest(mine[0]) {
		return fmt.Errorf("stream %s on the receiving side holds entries that are not the source's (the newest is %s): copy into another "+
			"stream (--copy NAME), or delete it first", b.o.Copy, last[0].ID)
	}
	b.position = last[0].ID
	n, err := b.ask(ctx, b.to, "XLEN", b.o.Copy).AsInt64()
	b.copied = n
	return err
}

// restore takes a record over.
func (b *Bridge) restore(rec map[string]string) error {
	if rec["source"] != b.source() {
		return fmt.Errorf("stream %s on the receiving side is a copy of stream %q, not of %q: copy into another stream (--copy NAME)",
			b.o.Copy, rec["source"], b.source())
	}
	n, err := strconv.ParseInt(rec["copied"], 10, 64)
	sum, err2 := strconv.ParseUint(rec["sum"], 16, 64)
	if err != nil || err2 != nil || !strings.Contains(rec["position"], "-") {
		return fmt.Errorf("the record %s on the receiving side cannot be read: %v", b.record, rec)
	}
	b.position, b.copied, b.sum = rec["position"], n, sum
	return nil
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

// digest is the checksum of one entry as the server tells it.
func digest(m valkey.ValkeyMessage) uint64 {
	es, err := entriesOf([]valkey.ValkeyMessage{m})
	if err != nil {
		return 0
	}
	h := xxhash.New()
	es[0].hashInto(h)
	return h.Sum64()
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
	b.started = time.Now()
	read := b.reader(ctx)
	defer read.stop()
	groups := time.Time{}
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
		if caught && !b.pastHead {
			b.pastHead = true
		}
		if b.o.Groups && caught && time.Since(groups) >= groupsEvery {
			if err := b.retry(ctx, "groups", func() error { return b.copyGroups(ctx) }); err != nil {
				return err
			}
			groups = time.Now()
		}
		b.tell(ctx, caught)
		if caught && !follow {
			if b.o.Groups {
				if err := b.retry(ctx, "groups", func() error { return b.copyGroups(ctx) }); err != nil {
					return err
				}
			}
			return nil
		}
	}
	return ctx.Err()
}

// tell reports progress.
func (b *Bridge) tell(ctx context.Context, caught bool) {
	if b.o.Progress == nil || time.Since(b.told) < 100*time.Millisecond && !caught {
		return
	}
	b.told = time.Now()
	p := Progress{Copied: b.copied, Position: b.position, Lag: -1, Following: b.pastHead}
	if n, err := b.ask(ctx, b.from, "XLEN", b.o.Stream).AsInt64(); err == nil {
		p.Total = max(n, b.copied)
		p.Lag = max(n-b.copied, 0)
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
	go r.run(ctx, b.position)
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

// errElsewhere says that another bridge has moved the copy on.
var errElsewhere = errors.New("another bridge writes to the same copy: stop one of them")

// store appends entries to the copy and moves its record, in one transaction that is conditional on the record. When
// the outcome is not known, the record tells.
func (b *Bridge) store(ctx context.Context, es []entry) error {
	sum := chain(b.sum, es)
	position, copied := es[len(es)-1].id, b.copied+int64(len(es))
	return b.retry(ctx, "receiving side", func() error {
		return b.to.Use(func(client valkey.Client) error {
			c, release := client.Dedicate()
			defer release()
			first := c.DoMulti(ctx, c.B().Watch().Key(b.record).Build(), c.B().Hget().Key(b.record).Field("position").Build())
			if err := first[0].Error(); err != nil {
				return err
			}
			at, err := first[1].ToString()
			if err != nil && !valkey.IsValkeyNil(err) {
				return err
			}
			switch {
			case at == position:
				// A transaction whose answer was lost did happen.
				b.advance(position, copied, sum, len(es))
				return c.Do(ctx, c.B().Unwatch().Build()).Error()
			case at != "" && at != b.position:
				return fatal{fmt.Errorf("%w (the record says %s, this one is at %s)", errElsewhere, at, b.position)}
			}
			cmds := make([]valkey.Completed, 0, len(es)+3)
			cmds = append(cmds, c.B().Multi().Build())
			for i := range es {
				cmds = append(cmds, c.B().Arbitrary("XADD").Keys(b.o.Copy).Args(es[i].id).Args(es[i].pairs...).Build())
			}
			cmds = append(cmds, c.B().Hset().Key(b.record).FieldValue().
				FieldValue("source", b.source()).FieldValue("position", position).
				FieldValue("copied", strconv.FormatInt(copied, 10)).FieldValue("sum", strconv.FormatUint(sum, 16)).Build(),
				c.B().Exec().Build())
			answers := c.DoMulti(ctx, cmds...)
			for _, a := range answers[:len(answers)-1] {
				if err := a.Error(); err != nil {
					return err
				}
			}
			results, err := answers[len(answers)-1].ToArray()
			switch {
			case valkey.IsValkeyNil(err):
				return errors.New("the record changed under the transaction")
			case err != nil:
				return err
			}
			for i, r := range results {
				if err := r.Error(); err != nil {
					return fatal{fmt.Errorf("entry %s was refused, and the copy now has a gap: %w", es[min(i, len(es)-1)].id, err)}
				}
			}
			b.advance(position, copied, sum, len(es))
			return nil
		})
	})
}

func (b *Bridge) advance(position string, copied int64, sum uint64, n int) {
	b.position, b.copied, b.sum = position, copied, sum
	b.ours += int64(n)
}

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

func unknownCommand(err error) bool {
	ve, ok := valkey.IsValkeyErr(err)
	return ok && strings.Contains(ve.Error(), "unknown command")
}
