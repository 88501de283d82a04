package raft

import (
	"bytes"
	"reflect"
	"slices"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
)

func TestForwardedCommandRoundTrip(t *testing.T) {
	now := time.Now()
	for _, o := range []*op{
		{intake: 7, number: 9, lowest: 3, request: request{cmd: publishCommand("t", "x", "y"), require: AllZones}},
		{intake: 1 << 60, number: 1 << 50, lowest: 1, request: request{cmd: receiveCommand("t", "g", 10), since: now.Add(-3 * time.Second)}, repeat: true, parkUntil: now.Add(time.Second)},
		{request: request{cmd: (&engine.OpenIntake{Node: "n1.x", Nonce: 5}).AppendTo(nil), require: Majority}},
	} {
		if err := o.inspect(); err != nil {
			t.Fatal(err)
		}
		got, err := decodeForwarded(append(appendCommand(nil, o, now), o.cmd...), now)
		if err != nil {
			t.Fatal(err)
		}
		if got.intake != o.intake || got.number != o.number || got.lowest != o.lowest || got.require != o.require || got.repeat != o.repeat ||
			!bytes.Equal(got.cmd, o.cmd) || got.kind != o.kind || !slices.Equal(got.refs, o.refs) || got.count != o.count || string(got.topic) != string(o.topic) ||
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
		{&op{reply: Reply{Index: 5, Term: 2, Result: engine.Result{Published: engine.Published{Index: 5, Count: 2}}}}, outcome{kind: replied, zones: 3}},
		{&op{reply: Reply{Result: engine.Result{Codes: []errs.Code{errs.OK, errs.NotHolder}, Repeat: true}}}, outcome{kind: replied}},
		{&op{}, outcome{kind: refused, err: &errs.Error{Code: errs.DiskFull, Message: "n2", RetryAfter: 5 * time.Second}}},
		{&op{}, outcome{kind: again, proposed: true}},
		{&op{}, outcome{kind: again}},
		{&op{reply: Reply{Result: engine.Result{Code: errs.ConcurrencyLimit}}}, outcome{kind: stillWaiting}},
	} {
		b := appendOutcome(nil, c.o, c.out)
		var o op
		out, err := decodeOutcome(b, &o)
		if err != nil || !reflect.DeepEqual(out, c.out) || o.reply.Index != c.o.reply.Index || o.reply.Term != c.o.reply.Term || !reflect.DeepEqual(o.reply.Result, c.o.reply.Result) {
			t.Errorf("sent %+v %+v\ngot  %+v %+v, %v", c.out, c.o.reply.Result, out, o.reply.Result, err)
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
	o := &op{intake: 7, number: 9, lowest: 3, request: request{cmd: publishCommand("t", "x")}}
	f.Add(append(appendCommand(nil, o, now), o.cmd...))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := decodeForwarded(b, now)
		if err == nil && (o.kind == 0 || o.require > AllZones) {
			t.Fatalf("accepted %+v", o)
		}
	})
}

func FuzzOutcome(f *testing.F) {
	f.Add(appendOutcome(nil, &op{reply: Reply{Index: 5}}, outcome{kind: replied, zones: 3}))
	f.Add(appendOutcome(nil, &op{}, outcome{kind: refused, err: errs.New(errs.DiskFull, "n2")}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var o op
		if out, err := decodeOutcome(b, &o); err == nil && out.kind == refused && out.err == nil {
			t.Fatal("a refusal without a reason")
		}
	})
}
