package engine

import (
	"bytes"
	"testing"
	"time"

	"tercet.dev/tercet/internal/errs"
)

// TestOutcome: what an intake keeps of a result is all of it but for contents, in whichever form it is kept.
func TestOutcome(t *testing.T) {
	grants := []Delivery{{ID: MessageID{Index: 7, Pos: 3}, Receipt: Receipt{Topic: 1, Group: 2, Offset: 9, Epoch: 4}, Stream: StreamID{5, 6}, Count: 2, PublishedAt: 10, ExpiresAt: 11, LeaseUntil: 12}}
	for name, r := range map[string]Result{
		"nothing":                  {},
		"refused":                  {Code: errs.InvalidName},
		"published":                {Published: Published{Index: 3, Pos: 1, Count: 2, Offset: 8, Stream: StreamID{1, 2}}},
		"given":                    {Deliveries: grants},
		"acknowledged":             {Codes: make([]errs.Code, 10)},
		"acknowledged in part":     {Codes: []errs.Code{errs.OK, errs.NotHolder, errs.OK}},
		"extended too far":         {Codes: make([]errs.Code, 2), ExpiresAt: 99},
		"too many under way":       {Code: errs.ConcurrencyLimit, RetryAfter: time.Second, Inflight: 5},
		"given and something more": {Deliveries: grants, RetryAfter: time.Second},
	} {
		var o outcome
		o.set(&r)
		back := o.result()
		if want, got := AppendResult(nil, &r), AppendResult(nil, &back); !bytes.Equal(want, got) {
			t.Errorf("%s: %+v came back as %+v", name, r, back)
		}
		if len(back.Codes) > 0 {
			back.Codes[0] = errs.Paused
			if again := o.result(); again.Codes[0] == errs.Paused {
				t.Errorf("%s: the codes are shared", name)
			}
		}
	}
}
