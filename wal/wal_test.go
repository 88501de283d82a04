package wal

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func payload(index uint64, n int) []byte {
	b := bytes.Repeat([]byte{byte(index)}, n)
	copy(b, fmt.Sprint(index))
	return b
}

func TestReopenFindsEverything(t *testing.T) {
	for _, mode := range []DirectMode{Off, Auto} {
		dir := t.TempDir()
		open := func() *WAL {
			w, err := Open(Options{Dir: dir, SegmentSize: 64 << 10, Prefill: 1, Direct: mode})
			if err != nil {
				t.Fatal(err)
			}
			return w
		}
		w := open()
		s := w.Shard(3)
		if err := s.SetStable("vote", []byte("x")); err != nil {
			t.Fatal(err)
		}
		for i := uint64(1); i <= 200; i++ {
			s.StageCommit(i - 1)
			lsn, err := s.Append([]Entry{{Index: i, Term: 2, Type: 1, Data: payload(i, int(i*7%3000)), Extensions: []byte("e")}})
			if err != nil {
				t.Fatal(err)
			}
			if i%10 == 0 {
				if err := w.WaitDurable(lsn, nil); err != nil {
					t.Fatal(err)
				}
			}
		}
		if _, err := s.TruncateSuffix(190); err != nil {
			t.Fatal(err)
		}
		if err := s.TruncatePrefix(20); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			w = open()
			s = w.Shard(3)
			if first, last := s.Range(); last != 189 || first > 21 || first == 0 {
				t.Fatalf("the log holds [%d, %d]", first, last)
			}
			if got := s.Committed(); got != 199 {
				t.Fatalf("committed %d", got)
			}
			if string(s.Stable("vote")) != "x" {
				t.Fatal("the stable value is gone")
			}
			for i := s.First(); i <= 189; i++ {
				var e Entry
				if err := s.Get(i, &e); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(e.Data, payload(i, int(i*7%3000))) || string(e.Extensions) != "e" || e.Term != 2 || e.Type != 1 || e.Index != i {
					t.Fatalf("entry %d came back as %+v", i, e)
				}
			}
			var e Entry
			if err := s.Get(190, &e); !errors.Is(err, ErrNotFound) {
				t.Fatalf("a truncated entry gives %v", err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
		}
		rep, err := Verify(nil, dir)
		if err != nil || rep.Corruption != nil {
			t.Fatalf("verify: %v, %v", err, rep.Corruption)
		}
		n := 0
		if err := Dump(nil, dir, func(*Record) error { n++; return nil }); err != nil || n == 0 {
			t.Fatalf("dump: %d records, %v", n, err)
		}
	}
}
