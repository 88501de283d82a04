package engine

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"tercet.dev/tercet/internal/errs"
)

// log is a replicated log of one's own: it builds entries and applies them.
type testLog struct {
	t     testing.TB
	e     *Engine
	index uint64
	now   Stamp
	fx    Effects
}

func openTest(t testing.TB, o Options) *testLog {
	t.Helper()
	if o.FS == nil {
		o.FS = vfs.NewMem()
	}
	if o.Dir == "" {
		o.Dir = "engine"
	}
	e, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	l := &testLog{t: t, e: e, now: Stamp{Cluster: 1_000_000, Wall: 1_700_000_000_000}}
	l.index, _ = e.Applied()
	return l
}

func (l *testLog) apply(cmds ...Command) []Result {
	l.t.Helper()
	var eb EntryBuilder
	eb.Reset(1, l.now, 0)
	for _, c := range cmds {
		eb.Add(0, 0, 0, c.AppendTo(nil))
	}
	l.index++
	res, err := l.e.Apply(l.index, 1, eb.Bytes(), nil, &l.fx)
	if err != nil {
		l.t.Fatal(err)
	}
	return res
}

func (l *testLog) pass(d time.Duration) {
	l.now.Cluster += d.Milliseconds()
	l.now.Wall += d.Milliseconds()
}

func TestPublishReceiveAcknowledge(t *testing.T) {
	for _, recent := range []int64{0, -1} {
		t.Run(fmt.Sprint(recent), func(t *testing.T) {
			fs := vfs.NewMem()
			l := openTest(t, Options{FS: fs, RecentBytes: recent})
			var msgs []NewMessage
			for i := range 5 {
				msgs = append(msgs, NewMessage{ContentType: "text/plain", Retention: time.Hour, Body: fmt.Appendf(nil, "m%d", i), Headers: []Header{{"a", "b"}}})
			}
			l.apply(&Publish{Topic: "t", Messages: msgs})
			res := l.apply(&Receive{Topic: "t", Group: "g", Max: 3, Visibility: time.Minute})
			ds := res[0].Deliveries
			if len(ds) != 3 {
				t.Fatalf("got %d deliveries", len(ds))
			}
			if err := l.e.Load(ds); err != nil {
				t.Fatal(err)
			}
			for i, d := range ds {
				if !bytes.Equal(d.Body, msgs[i].Body) || d.Headers[0].Value != "b" || d.ContentType != "text/plain" {
					t.Fatalf("delivery %d is %+v", i, d)
				}
			}
			var rcs []Receipt
			for _, d := range ds {
				rcs = append(rcs, d.Receipt)
			}
			res = l.apply(&Settle{Topic: "t", Group: "g", Op: Acknowledge, Receipts: rcs}, &Settle{Topic: "t", Group: "g", Op: Acknowledge, Receipts: rcs[:1]})
			if res[0].Codes[2] != errs.OK || res[1].Codes[0] != errs.MessageNotFound {
				t.Fatalf("settled %v", res)
			}
			_, want, err := l.e.FullHash()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := l.e.Checkpoint(); err != nil {
				t.Fatal(err)
			}
			if err := l.e.Close(); err != nil {
				t.Fatal(err)
			}
			l = openTest(t, Options{FS: fs, RecentBytes: recent})
			_, got, err := l.e.FullHash()
			if err != nil || got != want {
				t.Fatalf("hash %x, want %x: %v", got, want, err)
			}
			l.pass(time.Second)
			res = l.apply(&Receive{Topic: "t", Group: "g", Max: 10, Visibility: time.Minute})
			if ds = res[0].Deliveries; len(ds) != 2 {
				t.Fatalf("got %d deliveries", len(ds))
			}
			if err := l.e.Load(ds); err != nil || string(ds[1].Body) != "m4" {
				t.Fatalf("loaded %q: %v", ds[1].Body, err)
			}
			if err := l.e.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}
