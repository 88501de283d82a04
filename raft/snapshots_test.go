package raft

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/engine"
)

// snapshotPair is an engine with a checkpoint, and an empty one to receive it.
func snapshotPair(t *testing.T) (from, to *engine.Engine, source, target *snapshots) {
	t.Helper()
	open := func() *engine.Engine {
		e, err := engine.Open(engine.Options{Dir: "/s", FS: vfs.NewMem(), MemTableBytes: 1 << 20, CacheBytes: 1 << 20})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := e.Close(); err != nil {
				t.Error(err)
			}
		})
		return e
	}
	from, to = open(), open()
	config := hraft.EncodeConfiguration(hraft.Configuration{Servers: []hraft.Server{{ID: "n1.x", Address: "a:1"}}})
	var fx engine.Effects
	if err := from.ApplyConfiguration(1, 1, config, []engine.Member{{ID: "n1.x", Voter: true}}, &fx); err != nil {
		t.Fatal(err)
	}
	var eb engine.EntryBuilder
	cmd := publishCommand("t", strings.Repeat("a", 100_000), "b")
	eb.Reset(1, engine.Stamp{Cluster: 1, Wall: 1}, len(cmd)+engine.EntryOverhead)
	eb.Add(0, 0, 0, cmd)
	if _, err := from.Apply(2, 1, eb.Bytes(), nil, &fx); err != nil {
		t.Fatal(err)
	}
	if _, err := from.Checkpoint(); err != nil {
		t.Fatal(err)
	}
	room := func() (int64, error) { return 1 << 40, nil }
	return from, to, newSnapshots(from, room, hclog.NewNullLogger()), newSnapshots(to, room, hclog.NewNullLogger())
}

// stream reads the one snapshot of a store.
func stream(t *testing.T, s *snapshots) (*hraft.SnapshotMeta, []byte) {
	t.Helper()
	list, err := s.List()
	if err != nil || len(list) != 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	meta, r, err := s.Open(list[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Open(list[0].ID); err == nil {
		t.Fatal("two snapshots are sent at a time")
	}
	if floor, ok := s.floor(); !ok || floor != meta.Index {
		t.Fatalf("the log from %d on is not kept (%d, %v)", meta.Index, floor, ok)
	}
	b, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close(), r.Close()); err != nil {
		t.Fatal(err)
	}
	if int64(len(b)) != meta.Size {
		t.Fatalf("%d bytes, announced %d", len(b), meta.Size)
	}
	return meta, b
}

// install hands a stream to a store as raft does.
func install(s *snapshots, meta *hraft.SnapshotMeta, b []byte) (string, error) {
	sink, err := s.Create(1, meta.Index, meta.Term, meta.Configuration, meta.ConfigurationIndex, nil)
	if err != nil {
		return "", err
	}
	if _, err := io.Copy(sink, bytes.NewReader(b)); err != nil {
		return "", errors.Join(err, sink.Cancel())
	}
	return sink.ID(), sink.Close()
}

func TestSnapshotRoundTrip(t *testing.T) {
	from, to, source, target := snapshotPair(t)
	if list, err := target.List(); err != nil || len(list) != 0 {
		t.Fatalf("an empty store lists %+v, %v", list, err)
	}
	meta, b := stream(t, source)
	id, err := install(target, meta, b)
	if err != nil {
		t.Fatal(err)
	}
	// The installed state is the snapshot the moment the sink is closed, before anything is restored.
	if m := to.Durable(); m.Index != meta.Index || m.Term != meta.Term {
		t.Fatalf("durable: %+v", m)
	}
	got, r, err := target.Open(id)
	if err != nil || got.Index != meta.Index || got.ConfigurationIndex != meta.ConfigurationIndex || len(got.Configuration.Servers) != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	_ = r.Close()
	if err := to.Reopen(); err != nil {
		t.Fatal(err)
	}
	fi, fh, err := from.FullHash()
	if err != nil {
		t.Fatal(err)
	}
	ti, th, err := to.FullHash()
	if err != nil || fi != ti || fh != th {
		t.Fatalf("entry %d hash %x, installed: entry %d hash %x, %v", fi, fh, ti, th, err)
	}
}

// Whatever is wrong with a stream, it is not installed.
func TestSnapshotDamage(t *testing.T) {
	_, to, source, target := snapshotPair(t)
	meta, b := stream(t, source)
	try := func(what string, meta *hraft.SnapshotMeta, b []byte) {
		t.Helper()
		if _, err := install(target, meta, b); err == nil {
			t.Fatalf("%s: installed", what)
		}
		if m := to.Durable(); m.Index != 0 {
			t.Fatalf("%s: the state is now that of entry %d", what, m.Index)
		}
	}
	step := max(1, len(b)/300)
	if campaign() {
		step = 1
	}
	for i := 0; i < len(b); i += step {
		bad := bytes.Clone(b)
		bad[i] ^= 1 << (i % 8)
		try("flipped bit in byte "+string(rune('0'+i%10)), meta, bad)
		try("cut short", meta, b[:i])
	}
	try("longer", meta, append(bytes.Clone(b), 0))
	other := *meta
	other.Index++
	try("of another entry", &other, b)
	full := newSnapshots(to, func() (int64, error) { return int64(len(b)) / 2, nil }, hclog.NewNullLogger())
	if _, err := install(full, meta, b); err == nil || !strings.Contains(err.Error(), "free") {
		t.Fatalf("no room: %v", err)
	}
	// A transfer that was given up leaves room for the next.
	sink, err := target.Create(1, meta.Index, meta.Term, meta.Configuration, meta.ConfigurationIndex, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sink.Write(b[:len(b)/2]); err != nil {
		t.Fatal(err)
	}
	if err := sink.Cancel(); err != nil {
		t.Fatal(err)
	}
	if _, err := install(target, meta, b); err != nil {
		t.Fatalf("the undamaged stream: %v", err)
	}
}

// A snapshot whose receiver does not come is given up, and holds neither files nor log; the next one is fresh.
func TestSnapshotThatNobodyReads(t *testing.T) {
	_, _, source, _ := snapshotPair(t)
	list, err := source.List()
	if err != nil {
		t.Fatal(err)
	}
	_, r, err := source.Open(list[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	source.mu.Lock()
	for e := range source.exports {
		e.openedAt = e.openedAt.Add(-2 * unreadMax)
	}
	source.grace = 0
	source.mu.Unlock()
	poll(t, "the log to be free", func() bool { _, kept := source.floor(); return !kept })
	if _, err := r.Read(make([]byte, 10)); !errors.Is(err, errUnread) {
		t.Fatalf("reading it: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	stream(t, source)
}

func FuzzSnapshotHeader(f *testing.F) {
	f.Add([]byte{snapshotVersion, 1, 1, 1, 0, 0})
	f.Add([]byte{snapshotVersion, 1, 1, 1, 1, 'c', 1, 1, 'f', 5})
	f.Fuzz(func(t *testing.T, b []byte) {
		_, files, err := decodeSnapshotHeader(b)
		for _, file := range files {
			if err == nil && (file.Size < 0 || strings.ContainsAny(file.Name, "/\\") || file.Name == "..") {
				t.Fatalf("accepted %+v", file)
			}
		}
	})
}
