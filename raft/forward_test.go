package raft

import (
	"bytes"
	"reflect"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

func TestForwardedCommandRoundTrip(t *testing.T) {
	now := time.Now()
	for _, o := range []*op{
		{intake: 7, number: 9, lowest: 3, cmd: publishCommand("t", "x", "y"), require: AllZones},
		{intake: 1 << 60, number: 1 << 50, lowest: 1, cmd: receiveCommand("t", "g", 10), repeat: true, since: now.Add(-3 * time.Second), parkUntil: now.Add(time.Second)},
		{cmd: (&engine.OpenIntake{Node: "n1.x", Nonce: 5}).AppendTo(nil), require: Majority},
	} {
		if err := o.inspect(); err != nil {
			t.Fatal(err)
		}
		got, err := decodeForwarded(append(appendCommand(nil, o, now), o.cmd...), now)
		if err != nil {
			t.Fatal(err)
		}
		if got.intake != o.intake || got.number != o.number || got.lowest != o.lowest || got.require != o.require || got.repeat != o.repeat ||
			!bytes.Equal(got.cmd, o.cmd) || got.kind != o.kind || got.ref != o.ref || got.count != o.count || string(got.topic) != string(o.topic) ||
			!got.since.Equal(o.since) || !got.parkUntil.Equal(o.parkUntil) {
			t.Errorf("sent %+v\ngot  %+v", o, got)
		}
	}
}

func TestOutcomeRoundTrip(t *testing.T) {
	for _, c := range []struct {
		o   *op
		out outcome
	}{
		{&op{index: 5, term: 2, result: engine.Result{Published: engine.Published{Index: 5, Count: 2}}}, outcome{kind: replied, zones: 3}},
		{&op{result: engine.Result{Codes: []errs.Code{errs.OK, errs.NotHolder}, Repeat: true}}, outcome{kind: replied}},
		{&op{}, outcome{kind: refused, err: &errs.Error{Code: errs.DiskFull, Message: "n2", RetryAfter: 5 * time.Second}}},
		{&op{}, outcome{kind: again, proposed: true}},
		{&op{}, outcome{kind: again}},
		{&op{result: engine.Result{Code: errs.ConcurrencyLimit}}, outcome{kind: stillWaiting}},
	} {
		b := appendOutcome(nil, c.o, c.out)
		var o op
		out, err := decodeOutcome(b, &o)
		if err != nil || !reflect.DeepEqual(out, c.out) || o.index != c.o.index || o.term != c.o.term || !reflect.DeepEqual(o.result, c.o.result) {
			t.Errorf("sent %+v %+v\ngot  %+v %+v, %v", c.out, c.o.result, out, o.result, err)
		}
		for i := range b {
			if out, err := decodeOutcome(b[:i], &o); err == nil && out.kind != replied {
				t.Errorf("%+v cut to %d bytes: accepted as %+v", c.out, i, out)
			}
		}
	}
}

func FuzzForwardedCommand(f *testing.F) {
	now := time.Now()
	o := &op{intake: 7, number: 9, lowest: 3, cmd: publishCommand("t", "x")}
	f.Add(append(appendCommand(nil, o, now), o.cmd...))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := decodeForwarded(b, now)
		if err == nil && (o.kind == 0 || o.require > AllZones) {
			t.Fatalf("accepted %+v", o)
		}
	})
}

func FuzzOutcome(f *testing.F) {
	f.Add(appendOutcome(nil, &op{index: 5}, outcome{kind: replied, zones: 3}))
	f.Add(appendOutcome(nil, &op{}, outcome{kind: refused, err: errs.New(errs.DiskFull, "n2")}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var o op
		if out, err := decodeOutcome(b, &o); err == nil && out.kind == refused && out.err == nil {
			t.Fatal("a refusal without a reason")
		}
	})
}
