package engine

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

func TestDocuments(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	one := func(key string) *StoredDocument {
		t.Helper()
		a, err := l.e.Query(Query{Kind: QueryDocuments, Table: "tokens", Key: key})
		if err != nil {
			t.Fatal(err)
		}
		if len(a.Documents) == 0 {
			return nil
		}
		return &a.Documents[0]
	}
	expect := func(c *Document, want errs.Code) uint64 {
		t.Helper()
		before := l.fullHash()
		r := l.apply(c)[0]
		if r.Code != want {
			t.Fatalf("%+v gave %v, want %v", c, r.Code, want)
		}
		if changed := len(l.fx.Documents) > 0; changed != (want == errs.OK) || changed && l.fx.Documents[0] != c.Table {
			t.Fatalf("%+v: effects %v", c, l.fx.Documents)
		}
		_ = before
		return r.Revision
	}
	first := expect(&Document{Table: "tokens", Key: "a", Value: []byte("1"), IfAbsent: true}, errs.OK)
	expect(&Document{Table: "tokens", Key: "a", Value: []byte("2"), IfAbsent: true}, errs.Conflict)
	expect(&Document{Table: "tokens", Key: "a", Value: []byte("2"), IfRevision: first + 1}, errs.Conflict)
	second := expect(&Document{Table: "tokens", Key: "a", Value: []byte("2"), IfRevision: first}, errs.OK)
	if d := one("a"); d == nil || string(d.Value) != "2" || d.Revision != second || second <= first {
		t.Fatalf("stored %+v, revisions %d, %d", d, first, second)
	}
	expect(&Document{Table: "tokens", Key: "b", Delete: true}, errs.NotFound)
	expect(&Document{Table: "tokens", Key: "b", IfRevision: 1}, errs.Conflict)
	expect(&Document{Table: "tokens", Key: "a", Delete: true, IfRevision: first}, errs.Conflict)
	expect(&Document{Table: "tokens", Key: "", Value: []byte("2")}, errs.InvalidName)
	expect(&Document{Table: "to\x00kens", Key: "a"}, errs.InvalidName)
	expect(&Document{Table: "tokens", Key: "a", Value: make([]byte, limits.DocumentBytesMax+1)}, errs.MessageTooLarge)
	expect(&Document{Table: "tokens", Key: strings.Repeat("k", limits.DocumentKeyBytesMax+1)}, errs.InvalidName)
	expect(&Document{Table: "tokens", Key: "a", Delete: true, IfAbsent: true}, errs.BadRequest)
	expect(&Document{Table: "tokens", Key: "a", Delete: true, IfRevision: second}, errs.OK)
	if d := one("a"); d != nil {
		t.Fatalf("deleted, and still %+v", d)
	}
	for i := range 5 {
		expect(&Document{Table: "tokens", Key: fmt.Sprint("k", i), Value: bytes.Repeat([]byte("v"), i)}, errs.OK)
	}
	var keys []string
	after := ""
	for {
		a, err := l.e.Query(Query{Kind: QueryDocuments, Table: "tokens", Max: 2, After: after})
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range a.Documents {
			keys = append(keys, d.Key)
			after = d.Key
		}
		if !a.More {
			break
		}
	}
	if !slices.Equal(keys, []string{"k0", "k1", "k2", "k3", "k4"}) {
		t.Fatalf("listed %v", keys)
	}
}

func TestDocumentLimits(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	var cmds []Command
	for i := range limits.DocumentsPerTableMax + 1 {
		cmds = append(cmds, &Document{Table: "t", Key: fmt.Sprint(i)})
	}
	res := l.apply(cmds...)
	if n := len(res); res[n-1].Code != errs.Overloaded || res[n-2].Code != errs.OK {
		t.Fatalf("the last were %v, %v", res[n-2].Code, res[n-1].Code)
	}
	// Tables that were emptied take no room.
	for i := range limits.DocumentTablesMax * 2 {
		name := fmt.Sprint("table", i)
		if r := l.apply(&Document{Table: name, Key: "k"}, &Document{Table: name, Key: "k", Delete: true}); r[0].Code != errs.OK || r[1].Code != errs.OK {
			t.Fatalf("%s: %v, %v", name, r[0].Code, r[1].Code)
		}
	}
	for i := range limits.DocumentTablesMax {
		want := errs.OK
		if i == limits.DocumentTablesMax-1 {
			want = errs.Overloaded
		}
		if r := l.apply(&Document{Table: fmt.Sprint("kept", i), Key: "k"}); r[0].Code != want {
			t.Fatalf("table %d: %v", i, r[0].Code)
		}
	}
}

// TestDocumentCrash: a document deleted and made again, a table emptied, values changed between checkpoints are
// what they were after a power loss.
func TestDocumentCrash(t *testing.T) {
	fs := vfs.NewCrashableMem()
	l := openTest(t, Options{FS: fs})
	set := func(key, value string) Command { return &Document{Table: "t", Key: key, Value: []byte(value)} }
	remove := func(key string) Command { return &Document{Table: "t", Key: key, Delete: true} }
	steps := [][]Command{
		{set("a", "1"), set("b", "1"), &Document{Table: "u", Key: "x"}},
		{remove("a"), set("a", "2"), remove("b"), &Document{Table: "u", Key: "x", Delete: true}},
		{set("b", "3"), remove("b"), set("a", "4")},
		{set("b", "5")},
	}
	for i, cmds := range steps {
		l.apply(cmds...)
		if i%2 == 0 {
			l.checkpoint()
		}
		want := l.fullHash()
		clone := fs.CrashClone(vfs.CrashCloneCfg{})
		l.close()
		fs, l.o.FS = clone, clone
		l.open()
		if got := l.fullHash(); got != want {
			t.Fatalf("step %d: hash %x, was %x", i, got, want)
		}
		l.checkpoint()
		l.close()
		l.entries, l.o.FS = l.entries[:0:0], fs
		e, err := Open(l.o)
		if err != nil {
			t.Fatal(err)
		}
		if _, got, err := e.FullHash(); err != nil || got != want {
			t.Fatalf("step %d: from the checkpoint alone %x, want %x: %v", i, got, want, err)
		}
		index, _ := e.Applied()
		l.e = e
		l.entries = make([]logEntry, index) // applied; never replayed
		for k := range l.entries {
			l.entries[k].index = uint64(k) + 1
		}
	}
	l.close()
}
