package engine

import (
	"fmt"
	"testing"
	"time"
)

// twoWorlds is a topic with one message that both protocols work on.
type twoWorlds struct {
	*testLog
	rc Receipt // of the message under an HTTP lease
	id MessageID
}

func leaseHTTP(w *twoWorlds) {
	w.rc = w.do(&Receive{Topic: "s", Group: "g", Max: 1, Visibility: time.Minute}).Deliveries[0].Receipt
}

func leaseByID(w *twoWorlds) {
	w.rc = w.do(&ReceiveID{Topic: "s", Group: "g", ID: w.id, Visibility: time.Minute}).Deliveries[0].Receipt
}

func pendValkey(w *twoWorlds) {
	w.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"})
	w.readGroup("s", "g", "c", 0)
}

// TestTwoProtocols has a row for each pair of verbs of decision 25: one protocol acts on a message that the other
// one holds, has acknowledged, or is about to be given.
func TestTwoProtocols(t *testing.T) {
	one := StreamID{Ms: uint64(testStart.Wall)}
	receive := func(w *twoWorlds) string {
		r := w.do(&Receive{Topic: "s", Group: "g", Max: 10, Visibility: time.Minute})
		s := r.Code.String()
		for _, d := range r.Deliveries {
			s += fmt.Sprintf(" %s(%d) %s", d.Body, d.Count, d.ContentType)
		}
		return s
	}
	settle := func(op SettleOp, vis time.Duration) func(w *twoWorlds) string {
		return func(w *twoWorlds) string {
			return w.do(&Settle{Topic: "s", Group: "g", Op: op, Visibility: vis, Receipts: []Receipt{w.rc}}).Codes[0].String()
		}
	}
	ack, release, extend := settle(Acknowledge, 0), settle(Release, 0), settle(Extend, time.Minute)
	byID := func(w *twoWorlds) string {
		return w.do(&ReceiveID{Topic: "s", Group: "g", ID: w.id, Visibility: time.Minute}).Code.String()
	}
	read := func(w *twoWorlds) string { return w.readGroup("s", "g", "c", 0) }
	xack := func(w *twoWorlds) string {
		return fmt.Sprint(w.do(&StreamAck{Key: "s", Group: "g", IDs: []StreamID{one}}).Count)
	}
	claim := func(w *twoWorlds) string {
		return showEntries(w.do(&StreamClaim{Key: "s", Group: "g", Consumer: "c", IDs: []StreamID{one}, Idle: -1, Time: -1, RetryCount: -1, Force: true}).Stream.Entries)
	}
	autoclaim := func(w *twoWorlds) string {
		return showEntries(w.do(&StreamAutoClaim{Key: "s", Group: "g", Consumer: "c", Count: 10}).Stream.Entries)
	}
	nack := func(w *twoWorlds) string {
		return fmt.Sprint(w.do(&StreamNack{Key: "s", Group: "g", Mode: NackFail, IDs: []StreamID{one}, RetryCount: -1}).Count)
	}
	xdel := func(w *twoWorlds) string {
		return fmt.Sprint(w.do(&StreamDelete{Key: "s", IDs: []StreamID{one}}).Count)
	}
	xtrim := func(w *twoWorlds) string {
		return fmt.Sprint(w.do(&StreamTrim{Key: "s", Trim: Trim{By: TrimMaxLen}}).Count)
	}
	setid := func(w *twoWorlds) string {
		return w.group(&StreamGroup{Op: GroupSetID, Key: "s", Group: "g"}).Code.String()
	}
	delconsumer := func(name string) func(w *twoWorlds) string {
		return func(w *twoWorlds) string {
			r := w.group(&StreamGroup{Op: GroupDelConsumer, Key: "s", Group: "g", Consumer: name})
			return fmt.Sprint(r.Code, r.Count)
		}
	}
	del := func(w *twoWorlds) string { return fmt.Sprint(w.do(&KeyDelete{Keys: []string{"s"}}).Count) }
	rename := func(w *twoWorlds) string {
		w.do(&StreamAdd{Key: "other", Fields: fieldsOf("a", "b")})
		return fmt.Sprint(w.do(&KeyRename{From: "other", To: "s"}).Count)
	}
	flush := func(w *twoWorlds) string { return w.do(&Flush{}).Code.String() }
	expire := func(w *twoWorlds) string {
		return fmt.Sprint(w.do(&KeyExpire{Key: "s", By: Deadline{Set: true, Ms: -1}}).Count)
	}
	lapse := func(w *twoWorlds) string { w.pass(2 * time.Minute); return "" }
	pending := func(w *twoWorlds) string { return w.pendings("s", "g") }

	const body, fields = "ok m(%d) text/plain", "s: 1700000000000-0[body m content-type text/plain]"
	again := func(n int) string { return fmt.Sprintf(body, n) }
	type step struct {
		do   func(w *twoWorlds) string
		want string
	}
	for _, row := range []struct {
		name  string
		first func(w *twoWorlds) // what holds the message
		steps []step
	}{
		{"HTTP lease, XREADGROUP", leaseHTTP, []step{{read, "nil"}, {pending, "1700000000000-0 " + HTTPConsumer + " 0 1"}, {ack, "ok"}}},
		{"HTTP lease, XACK, settle", leaseHTTP, []step{{xack, "1"}, {ack, "message_not_found"}, {receive, "ok"}}},
		{"HTTP lease, XACK, extend", leaseHTTP, []step{{xack, "1"}, {extend, "message_not_found"}, {byID, "already_acknowledged"}}},
		{"HTTP lease, XCLAIM", leaseHTTP, []step{{claim, ""}, {autoclaim, ""}, {ack, "ok"}, {claim, "1700000000000-0[body m content-type text/plain]"}}},
		{"HTTP lease over, XCLAIM", leaseHTTP, []step{{lapse, ""}, {claim, "1700000000000-0[body m content-type text/plain]"}, {ack, "not_holder"}, {receive, "ok"}, {xack, "1"}}},
		{"HTTP lease over, XAUTOCLAIM", leaseHTTP, []step{{lapse, ""}, {autoclaim, "1700000000000-0[body m content-type text/plain]"}, {extend, "not_holder"}, {pending, "1700000000000-0 c 0 2"}}},
		{"HTTP lease over, XREADGROUP", leaseHTTP, []step{{lapse, ""}, {read, fields}, {ack, "not_holder"}, {receive, "ok"}}},
		{"HTTP release, XREADGROUP", leaseHTTP, []step{{release, "ok"}, {read, fields}, {ack, "not_holder"}}},
		{"HTTP lease, XNACK", leaseHTTP, []step{{nack, "0"}, {ack, "ok"}}},
		{"HTTP lease, XDEL", leaseHTTP, []step{{xdel, "1"}, {byID, "message_not_found"}, {ack, "ok"}, {receive, "ok"}}},
		{"HTTP lease, XDEL, lapse", leaseHTTP, []step{{xdel, "1"}, {lapse, ""}, {receive, "ok"}, {read, "nil"}}},
		{"HTTP lease, XTRIM", leaseHTTP, []step{{xtrim, "1"}, {lapse, ""}, {receive, "ok"}, {ack, "message_not_found"}}},
		{"HTTP lease, XGROUP SETID", leaseHTTP, []step{{setid, "ok"}, {read, "nil"}, {receive, "ok"}, {ack, "ok"}, {receive, "ok"}}},
		{"HTTP ack, XGROUP SETID", leaseHTTP, []step{{ack, "ok"}, {read, "nil"}, {setid, "ok"}, {read, fields}}},
		{"HTTP lease, DELCONSUMER", leaseHTTP, []step{{delconsumer(HTTPConsumer), "reserved_consumer 0"}, {ack, "ok"}}},
		{"HTTP lease, DEL", leaseHTTP, []step{{del, "1"}, {ack, "message_not_found"}, {byID, "message_not_found"}}},
		{"HTTP lease, RENAME onto", leaseHTTP, []step{{rename, "1"}, {ack, "message_not_found"}}},
		{"HTTP lease, FLUSHALL", leaseHTTP, []step{{flush, "ok"}, {extend, "message_not_found"}}},
		{"HTTP lease, EXPIRE", leaseHTTP, []step{{expire, "1"}, {ack, "message_not_found"}}},
		{"HTTP by ID ahead, XREADGROUP", leaseByID, []step{{read, "nil"}, {ack, "ok"}, {read, "nil"}}},
		{"HTTP by ID ahead, XACK", leaseByID, []step{{xack, "1"}, {ack, "message_not_found"}, {read, "nil"}}},
		{"pending, receive", pendValkey, []step{{receive, "ok"}, {byID, "leased_elsewhere"}, {xack, "1"}, {byID, "already_acknowledged"}}},
		{"pending, receive after a day", pendValkey, []step{{func(w *twoWorlds) string { w.pass(24 * time.Hour); return "" }, ""}, {receive, "ok"}, {pending, "1700000000000-0 c 86400000 1"}}},
		{"pending, XNACK, receive", pendValkey, []step{{nack, "1"}, {receive, again(2)}, {xack, "1"}}},
		{"pending, DELCONSUMER, receive", pendValkey, []step{{delconsumer("c"), "ok 1"}, {receive, "ok"}, {byID, "already_acknowledged"}}},
		{"pending, XGROUP SETID, receive", pendValkey, []step{{setid, "ok"}, {receive, "ok"}, {read, "nil"}, {autoclaim, "1700000000000-0[body m content-type text/plain]"}}},
		{"pending, XDEL, by ID", pendValkey, []step{{xdel, "1"}, {byID, "message_not_found"}, {xack, "1"}}},
	} {
		t.Run(row.name, func(t *testing.T) {
			l := openTest(t, Options{})
			defer l.close()
			w := &twoWorlds{testLog: l}
			p := l.do(&Publish{Topic: "s", Messages: messages(0, "m")}).Published
			w.id = p.ID(0)
			row.first(w)
			for i, s := range row.steps {
				if got := s.do(w); got != s.want {
					t.Errorf("step %d: %q, want %q", i+1, got, s.want)
				}
			}
		})
	}
}

// TestStoryNamesTheHolder: a story says which consumer has a message, or had it last.
func TestStoryNamesTheHolder(t *testing.T) {
	restarts(t, func(t *testing.T, l *testLog, again func()) {
		add := func(ms uint64) MessageID {
			r := l.do(&StreamAdd{Key: "s", By: AddExplicit, ID: sid(ms, 0), Fields: fieldsOf("v", "x")})
			return r.Published.ID(0)
		}
		id := add(1)
		holder := func() string {
			t.Helper()
			again()
			a, err := l.e.Query(Query{Kind: QueryStory, Topic: "s", ID: id})
			if err != nil {
				t.Fatal(err)
			}
			g := a.Story.Groups[0]
			return fmt.Sprint(g.State, " ", g.Count, " ", g.Consumer)
		}
		l.group(&StreamGroup{Op: GroupCreate, Key: "s", Group: "g"})
		want(t, "never given", holder(), "ready 0 ")
		l.readGroup("s", "g", "alice", 1)
		want(t, "read", holder(), "leased 1 alice")
		l.do(&StreamClaim{Key: "s", Group: "g", Consumer: "bob", IDs: []StreamID{sid(1, 0)}, RetryCount: -1})
		want(t, "claimed", holder(), "leased 2 bob")
		l.do(&StreamAck{Key: "s", Group: "g", IDs: []StreamID{sid(1, 0)}})
		want(t, "acknowledged", holder(), "acknowledged 0 ")
		id = add(2)
		l.do(&Receive{Topic: "s", Group: "g", Max: 1, Visibility: time.Second})
		want(t, "received", holder(), "leased 1 "+HTTPConsumer)
		l.pass(time.Minute)
		l.do(&Tick{})
		want(t, "lease over", holder(), "ready 1 "+HTTPConsumer)
	})
}
