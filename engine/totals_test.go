package engine

import (
	"fmt"
	"testing"
	"time"
)

// TestTotals: figures of more topics than are looked at in one go.
func TestTotals(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	const topics = 2*totalsTopics + 10
	for i := range topics {
		topic := fmt.Sprint("t", i)
		l.apply(&Publish{Topic: topic, Messages: []NewMessage{{Body: []byte("a"), Retention: time.Hour}, {Body: []byte("b"), Retention: time.Hour},
			{Body: []byte("c"), Retention: time.Hour, Delay: time.Minute}}}, &Receive{Topic: topic, Group: "g", Max: 1, Visibility: time.Minute}, &Receive{Topic: topic, Group: "h", Max: 2, Visibility: time.Second})
	}
	l.pass(time.Second)
	l.apply(&Tick{})
	got := l.e.Totals()
	want := Totals{Topics: topics, Groups: 2 * topics, Ready: topics, Inflight: topics, Waiting: 2 * topics, Delayed: topics, OldestAt: testStart.Wall}
	if got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
