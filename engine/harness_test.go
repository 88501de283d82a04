package engine

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(m.Run())
	}
	goleak.VerifyTestMain(m)
}

// testLog is a replicated log of one's own: it keeps what it has applied, so that an engine that lost its
// memory can be brought up to date again.
type testLog struct {
	t       failer
	o       Options
	e       *Engine
	now     Stamp
	fx      Effects
	entries []logEntry
	// unsettledMax, if set, replaces the limit of the unsettled set.
	unsettledMax int
}

// failer is what a test log needs of a test, whatever drives it.
type failer interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// logEntry is an entry of any kind: data is nil for an empty one, members are set for a configuration.
type logEntry struct {
	index   uint64
	data    []byte
	members []Member
}

var testStart = Stamp{Cluster: 1_000_000, Wall: 1_700_000_000_000}

func openTest(t testing.TB, o Options) *testLog {
	t.Helper()
	if o.FS == nil {
		o.FS = vfs.NewMem()
	}
	if o.Dir == "" {
		o.Dir = "engine"
	}
	l := &testLog{t: t, o: o, now: testStart}
	l.open()
	return l
}

// open opens the engine and replays what it does not have.
func (l *testLog) open() {
	l.t.Helper()
	e, err := Open(l.o)
	if err != nil {
		l.t.Fatal(err)
	}
	if l.unsettledMax > 0 {
		e.unsettledMax = l.unsettledMax
	}
	l.e = e
	for _, en := range l.entries {
		if _, err := en.applyTo(e, nil); err != nil {
			l.t.Fatal(err)
		}
	}
}

func (en logEntry) applyTo(e *Engine, fx *Effects) ([]Result, error) {
	switch {
	case en.members != nil:
		return nil, e.ApplyConfiguration(en.index, 1, fmt.Append(nil, en.members), en.members, fx)
	case en.data == nil:
		return nil, e.ApplyEmpty(en.index, 1)
	}
	return e.Apply(en.index, 1, en.data, nil, fx)
}

func (l *testLog) close() {
	l.t.Helper()
	if err := l.e.Close(); err != nil {
		l.t.Fatal(err)
	}
}

func (l *testLog) next() uint64 { return uint64(len(l.entries)) + 1 }

func (l *testLog) append(en logEntry) []Result {
	l.t.Helper()
	en.index = l.next()
	l.entries = append(l.entries, en)
	res, err := en.applyTo(l.e, &l.fx)
	if err != nil {
		l.t.Fatal(err)
	}
	return res
}

// apply applies the commands as one entry, outside any intake.
func (l *testLog) apply(cmds ...Command) []Result {
	l.t.Helper()
	var eb EntryBuilder
	eb.Reset(1, l.now, 0)
	for _, c := range cmds {
		eb.Add(0, 0, 0, c.AppendTo(nil))
	}
	return l.append(logEntry{data: eb.Bytes()})
}

func (l *testLog) pass(d time.Duration) {
	l.now.Cluster += d.Milliseconds()
	l.now.Wall += d.Milliseconds()
}

func (l *testLog) fullHash() uint64 {
	l.t.Helper()
	_, h, err := l.e.FullHash()
	if err != nil {
		l.t.Fatal(err)
	}
	return h
}

func (l *testLog) checkpoint() {
	l.t.Helper()
	if _, err := l.e.Checkpoint(); err != nil {
		l.t.Fatal(err)
	}
}

func messages(retention time.Duration, bodies ...string) []NewMessage {
	var out []NewMessage
	for _, b := range bodies {
		out = append(out, NewMessage{ContentType: "text/plain", Retention: retention, Body: []byte(b)})
	}
	return out
}
