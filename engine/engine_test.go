package engine

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"tercet.dev/tercet/internal/errs"
)

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
			now, entries := l.now, l.entries
			l = openTest(t, Options{FS: fs, RecentBytes: recent})
			l.now, l.entries = now, entries
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
