package engine

import (
	"slices"
	"testing"
	"time"

	"tercet.dev/tercet/internal/errs"
)

// TestRefound founds a cluster anew from a node that lacks the last entries of the old one. Receipts of the lost
// leases fit nothing in the new one, though it gives out messages at the same places; receipts of what it has stay good.
func TestRefound(t *testing.T) {
	receive := func(l *testLog, topic, group string, n int) []Receipt {
		t.Helper()
		var rs []Receipt
		for _, d := range l.apply(&Receive{Topic: topic, Group: group, Max: n, Visibility: time.Minute})[0].Deliveries {
			rs = append(rs, d.Receipt)
		}
		if len(rs) != n {
			t.Fatalf("%d deliveries from %s to %s, want %d", len(rs), topic, group, n)
		}
		return rs
	}
	send := func(l *testLog, topic string, n int) {
		t.Helper()
		p := &Publish{Topic: topic}
		for range n {
			p.Messages = append(p.Messages, NewMessage{ContentType: "text/plain", Body: []byte("x"), Retention: time.Hour})
		}
		if r := l.apply(p)[0]; r.Code != errs.OK {
			t.Fatalf("publish: %v", r.Code)
		}
	}
	old := openTest(t, Options{})
	defer old.close()
	old.apply(&Init{ClusterID: "old", Secret: []byte("secret"), Level: 1})
	send(old, "t", 2)
	kept := receive(old, "t", "g", 1)
	have := slices.Clone(old.entries)

	// What the survivor never sees: more of the known group, a new group, a new topic.
	send(old, "t", 2)
	lost := receive(old, "t", "g", 3)
	lost = append(lost, receive(old, "t", "h", 1)...)
	send(old, "u", 1)
	lost = append(lost, receive(old, "u", "g", 1)...)

	survivor := openTest(t, Options{})
	defer survivor.close()
	for _, en := range have {
		survivor.append(en)
	}
	survivor.now = old.now
	survivor.apply(&Init{ClusterID: "new", Level: 1, Refound: true})
	send(survivor, "t", 2)
	given := receive(survivor, "t", "g", 3)
	given = append(given, receive(survivor, "t", "h", 1)...)
	send(survivor, "u", 1)
	given = append(given, receive(survivor, "u", "g", 1)...)
	for i, r := range given {
		if slices.Contains(lost, r) {
			t.Errorf("lease %d has receipt %+v, which was given out before", i, r)
		}
	}
	settle := func(topic, group string, r Receipt) errs.Code {
		return survivor.apply(&Settle{Topic: topic, Group: group, Op: Acknowledge, Receipts: []Receipt{r}})[0].Codes[0]
	}
	for _, r := range lost[:3] {
		if code := settle("t", "g", r); code == errs.OK {
			t.Errorf("the lost receipt %+v settles a message", r)
		}
	}
	if code := settle("t", "g", kept[0]); code != errs.OK {
		t.Errorf("the receipt of a lease that was kept: %v", code)
	}
	hash := survivor.fullHash()
	survivor.checkpoint()
	survivor.close()
	survivor.open()
	if got := survivor.fullHash(); got != hash {
		t.Errorf("the state is %x after a restart, was %x", got, hash)
	}
}
