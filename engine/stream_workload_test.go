package engine

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// streamCommands draws stream and key commands on the keys that queueCommands and the queue's own commands work on too, so
// that both protocols meet in the same groups.
type streamCommands struct {
	rng *rand.Rand
	// seen are IDs that entries have, or had.
	seen []StreamID
}

// answered takes note of the IDs in a result.
func (s *streamCommands) answered(r *Result) {
	if r.Published.Stream != (StreamID{}) {
		s.seen = append(s.seen, r.Published.Stream)
	}
	if r.Stream != nil {
		for i := range r.Stream.Exec {
			s.answered(&r.Stream.Exec[i].Result)
		}
	}
}

func (s *streamCommands) id() StreamID {
	if len(s.seen) > 0 && s.rng.IntN(8) > 0 {
		return s.seen[max(0, len(s.seen)-1-s.rng.IntN(40))]
	}
	return StreamID{Ms: uint64(testStart.Wall) + uint64(s.rng.IntN(2_000_000)), Seq: uint64(s.rng.IntN(3))}
}

func (s *streamCommands) ids() (all []StreamID) {
	for range 1 + s.rng.IntN(5) {
		all = append(all, s.id())
	}
	return all
}

func (s *streamCommands) trim() Trim {
	t := Trim{By: TrimMaxLen, MaxLen: uint64(s.rng.IntN(60)), Approx: s.rng.IntN(4) == 0}
	if s.rng.IntN(2) == 0 {
		t = Trim{By: TrimMinID, MinID: s.id()}
	}
	return t
}

// drawAny is draw, or now and then a transaction.
func (s *streamCommands) drawAny() Command {
	if s.rng.IntN(8) > 0 {
		return s.draw()
	}
	x := &Exec{}
	for range 2 + s.rng.IntN(4) {
		x.Ops = append(x.Ops, ExecOp{Command: s.draw()})
	}
	return x
}

func (s *streamCommands) draw() Command {
	rng := s.rng
	key, group := []string{"a", "b", "c"}[rng.IntN(3)], []string{"g", "h"}[rng.IntN(2)]
	consumer := []string{"c1", "c2"}[rng.IntN(2)]
	switch rng.IntN(40) {
	case 0, 1, 2, 3, 4, 5, 6, 7:
		c := &StreamAdd{Key: key, NoCreate: rng.IntN(9) == 0, Fields: fieldsOf("n", fmt.Sprint(rng.IntN(1000)), "body", strings.Repeat("x", rng.IntN(400)))}
		switch rng.IntN(10) {
		case 0:
			c.Trim = s.trim()
		case 1:
			c.By, c.ID = AddExplicit, s.id()
		case 2:
			c.By, c.ID = AddAutoSeq, StreamID{Ms: s.id().Ms}
		case 3:
			c.Token, c.Retention = fmt.Sprint("t", rng.IntN(5)), time.Minute
		case 4:
			c.Delay, c.Retention = time.Duration(1+rng.IntN(30))*time.Second, time.Hour
		}
		return c
	case 8, 9, 10, 11, 12, 13:
		return &StreamReadGroup{Group: group, Consumer: consumer, Count: uint64(rng.IntN(8)), NoAck: rng.IntN(10) == 0, Park: rng.IntN(4) == 0,
			Claim: rng.IntN(4) == 0, ClaimIdle: int64(rng.IntN(20_000)), Streams: []StreamPosition{{Key: key, New: true}}}
	case 14:
		return &StreamReadGroup{Group: group, Consumer: consumer, Count: uint64(rng.IntN(8)), Streams: []StreamPosition{{Key: key, ID: s.id()}}}
	case 15, 16, 17:
		return &StreamAck{Key: key, Group: group, IDs: s.ids()}
	case 18:
		return &StreamAck{Key: key, Group: group, IDs: s.ids(), Delete: true, Refs: RefPolicy(rng.IntN(3))}
	case 19, 20:
		c := &StreamClaim{Key: key, Group: group, Consumer: consumer, MinIdle: int64(rng.IntN(9000)), IDs: s.ids(), Idle: -1, Time: -1, RetryCount: -1,
			Force: rng.IntN(3) == 0, JustID: rng.IntN(3) == 0}
		if rng.IntN(4) == 0 {
			c.Idle, c.RetryCount = int64(rng.IntN(20_000)), int64(rng.IntN(4))
		}
		return c
	case 21:
		return &StreamAutoClaim{Key: key, Group: group, Consumer: consumer, MinIdle: int64(rng.IntN(9000)), Start: s.id(), Count: 1 + uint64(rng.IntN(4)), JustID: rng.IntN(2) == 0}
	case 22, 23:
		return &StreamNack{Key: key, Group: group, Mode: NackMode(rng.IntN(3)), IDs: s.ids(), RetryCount: -1, Force: rng.IntN(4) == 0}
	case 24, 25:
		return &StreamDelete{Key: key, IDs: s.ids(), Each: rng.IntN(3) == 0, Refs: RefPolicy(rng.IntN(3))}
	case 26:
		return &StreamTrim{Key: key, Trim: s.trim()}
	case 27, 28, 29:
		return &StreamGroup{Op: GroupCreate, Key: key, Group: group, ID: s.id(), Last: rng.IntN(3) == 0, Create: rng.IntN(2) == 0, EntriesRead: -1}
	case 30:
		return &StreamGroup{Op: GroupSetID, Key: key, Group: group, ID: s.id(), EntriesRead: -1}
	case 31:
		return &StreamGroup{Op: GroupOp(3 + rng.IntN(3)), Key: key, Group: group, Consumer: consumer}
	case 32:
		return &StreamSetID{Key: key, ID: s.id(), EntriesAdded: -1}
	case 33:
		return &KeyExpire{Key: key, By: Deadline{Set: rng.IntN(4) > 0, Ms: int64(1 + rng.IntN(60_000))}, When: When(rng.IntN(5))}
	case 34:
		if rng.IntN(5) == 0 {
			return &Flush{}
		}
		return &KeyDelete{Keys: []string{key, "string"}}
	case 35:
		return &KeyRename{From: key, To: []string{"a", "b", "c"}[rng.IntN(3)], KeepTarget: rng.IntN(2) == 0}
	case 36, 37:
		return &StringSet{Key: "string", Value: []byte{byte(rng.Uint32())}, By: Deadline{Set: rng.IntN(2) == 0, Ms: int64(1 + rng.IntN(30_000))}, Get: rng.IntN(2) == 0}
	case 38:
		if rng.IntN(2) == 0 {
			return &KeyCopy{From: key, To: []string{"a", "b", "c"}[rng.IntN(3)], Replace: rng.IntN(3) > 0}
		}
		return &KeyCopy{From: "string", To: "copy", Replace: rng.IntN(2) == 0}
	default:
		return &StringGetDel{Key: "copy"}
	}
}

// showResults writes results as text that is equal for equal results: what is behind pointers in words, and of entries
// everything but their contents, which come from memory or from the disk.
func showResults(all []Result) string {
	var b strings.Builder
	for _, r := range all {
		s := r.Stream
		r.Stream = nil
		fmt.Fprint(&b, r)
		if s == nil {
			continue
		}
		for _, read := range s.Reads {
			fmt.Fprintf(&b, " read %s from %v cut %t", read.Key, read.From, read.Cut)
			showContents(&b, read.Entries)
		}
		b.WriteString(" entries")
		showContents(&b, s.Entries)
		fmt.Fprintf(&b, " deleted %v next %v statuses %v value %q", s.Deleted, s.Next, s.Statuses, s.Value)
		for _, x := range s.Exec {
			fmt.Fprintf(&b, " {%s}", showResults([]Result{x.Result}))
		}
	}
	return b.String()
}

func showContents(b *strings.Builder, entries []StreamEntry) {
	for _, e := range entries {
		fmt.Fprintf(b, " %v %t %t %d %d at %d+%d/%d+%d", e.ID, e.Deleted, e.Claimed, e.Idle, e.Count, e.topic, e.offset, e.stagedIndex, e.stagedPos)
	}
}
