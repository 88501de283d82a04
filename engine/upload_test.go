package engine

import (
	"bytes"
	"hash/crc32"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// largeBody is a body of n bytes that differs from place to place.
func largeBody(n int, seed byte) []byte {
	b := make([]byte, n)
	x := uint32(seed) + 1
	for i := range b {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	return b
}

// crash replaces the engine by one that has of the disk only what was synced.
func (l *testLog) crash(fs *vfs.MemFS) *vfs.MemFS {
	l.t.Helper()
	clone := fs.CrashClone(vfs.CrashCloneCfg{})
	l.close()
	l.o.FS = clone
	l.open()
	return clone
}

func rowCount(t *testing.T, e *Engine, kinds ...byte) int {
	t.Helper()
	n := 0
	for _, k := range kinds {
		if err := e.scan(k, func(_, _ []byte) error { n++; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

func parts(body []byte) [][]byte {
	var out [][]byte
	for len(body) > 0 {
		n := min(len(body), limits.PartBytes)
		out = append(out, body[:n])
		body = body[n:]
	}
	return out
}

func commitOf(id uint64, body []byte, m NewMessage) *UploadCommit {
	return &UploadCommit{Upload: id, Message: m, Parts: uint32(len(parts(body))), Bytes: int64(len(body)), CRC: crc32.Checksum(body, castagnoli)}
}

// checkLarge receives one message for a group and compares its body.
func checkLarge(t *testing.T, l *testLog, group string, body []byte) Delivery {
	t.Helper()
	r := l.apply(&Receive{Topic: "t", Group: group, Max: 1, Visibility: time.Minute})[0]
	if len(r.Deliveries) != 1 {
		t.Fatalf("received %+v", r)
	}
	if err := l.e.Load(r.Deliveries); err != nil {
		t.Fatal(err)
	}
	d := r.Deliveries[0]
	if d.Large == nil || len(d.Body) != 0 || d.Large.Bytes != int64(len(body)) {
		t.Fatalf("delivered %+v", d)
	}
	var got []byte
	for n := range d.Large.Parts {
		p, err := l.e.LoadPart(*d.Large, n)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, p...)
	}
	if !bytes.Equal(got, body) || crc32.Checksum(got, castagnoli) != d.Large.CRC {
		t.Fatal("the body came back as another")
	}
	if _, err := l.e.LoadPart(*d.Large, d.Large.Parts); errs.CodeOf(err) != errs.BadRequest {
		t.Fatalf("a part behind the last: %v", err)
	}
	return d
}

// TestUpload sends messages of several sizes in parts, with a crash behind every command and a checkpoint
// somewhere.
func TestUpload(t *testing.T) {
	for _, size := range []int{1, limits.PartBytes - 1, limits.PartBytes, limits.PartBytes + 1, 3*limits.PartBytes + 7} {
		body := largeBody(size, byte(size))
		steps := len(parts(body)) + 2
		for checkpointAt := -1; checkpointAt < steps; checkpointAt++ {
			fs := vfs.NewCrashableMem()
			l := openTest(t, Options{FS: fs, RecentBytes: -1, MemTableBytes: 1 << 20})
			step := 0
			do := func(c Command) Result {
				t.Helper()
				r := l.apply(c)[0]
				if r.Code != errs.OK {
					t.Fatalf("size %d: %T gave %v", size, c, r.Code)
				}
				if step == checkpointAt {
					l.checkpoint()
				}
				step++
				want := l.fullHash()
				fs = l.crash(fs)
				if got := l.fullHash(); got != want {
					t.Fatalf("size %d, checkpoint at %d, step %d: hash %x, was %x", size, checkpointAt, step, got, want)
				}
				return r
			}
			id := do(&UploadOpen{Topic: "t"}).Upload
			for i, p := range parts(body) {
				do(&UploadPart{Upload: id, Number: uint32(i), Data: p})
			}
			r := do(commitOf(id, body, NewMessage{ContentType: "video/mp4", Retention: time.Hour}))
			if r.Published.Count != 1 || r.Published.ID(0).Kind != KindPlain {
				t.Fatalf("published %+v", r.Published)
			}
			if d := checkLarge(t, l, "g", body); d.ContentType != "video/mp4" || d.ID != r.Published.ID(0) {
				t.Fatalf("delivered %+v", d)
			}
			l.pass(2 * time.Hour)
			l.apply(&Tick{})
			l.checkpoint()
			if n := rowCount(t, l.e, rowPart, rowUpload, rowLargeExpiry, rowBlock); n != 0 {
				t.Errorf("size %d: %d rows are left after the message has expired", size, n)
			}
			l.close()
		}
	}
}

// TestUploadRefusals: what does not fit is refused and changes nothing; what is broken off leaves nothing.
func TestUploadRefusals(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	expect := func(want errs.Code, c Command) Result {
		t.Helper()
		r := l.apply(c)[0]
		if r.Code != want {
			t.Fatalf("%T gave %v, want %v", c, r.Code, want)
		}
		return r
	}
	full, short := largeBody(limits.PartBytes, 1), []byte("short")
	body := append(append([]byte(nil), full...), short...)
	expect(errs.UploadNotFound, &UploadPart{Upload: 99, Data: short})
	expect(errs.UploadNotFound, commitOf(99, short, NewMessage{}))
	expect(errs.UploadNotFound, &UploadAbort{Upload: 99})
	id := expect(errs.OK, &UploadOpen{Topic: "t"}).Upload
	expect(errs.Conflict, &UploadPart{Upload: id, Number: 1, Data: short})
	expect(errs.BadRequest, &UploadPart{Upload: id})
	expect(errs.BadRequest, &UploadPart{Upload: id, Data: make([]byte, limits.PartBytes+1)})
	expect(errs.OK, &UploadPart{Upload: id, Data: full})
	expect(errs.OK, &UploadPart{Upload: id, Data: full}) // again
	expect(errs.OK, &UploadPart{Upload: id, Number: 1, Data: short})
	expect(errs.Conflict, &UploadPart{Upload: id, Number: 2, Data: short})
	expect(errs.Conflict, commitOf(id, short, NewMessage{}))
	wrong := commitOf(id, body, NewMessage{})
	wrong.CRC++
	expect(errs.Conflict, wrong)
	expect(errs.BadRequest, commitOf(id, body, NewMessage{Delay: 2 * time.Hour, Retention: time.Hour}))
	expect(errs.BadRequest, &Publish{Topic: "t", Messages: []NewMessage{{Large: &Large{Upload: id, Parts: 2, Bytes: int64(len(body))}}}})
	expect(errs.OK, &UploadAbort{Upload: id})
	expect(errs.UploadNotFound, commitOf(id, body, NewMessage{}))

	// Deadlines count from the last part; NextTick tells of them.
	id = expect(errs.OK, &UploadOpen{Topic: "t"}).Upload
	l.pass(50 * time.Second)
	expect(errs.OK, &UploadPart{Upload: id, Data: short})
	if at, ok := l.e.NextTick(); !ok || at != l.now.Cluster+60_000 {
		t.Fatalf("next tick at %d, %v", at, ok)
	}
	l.pass(59 * time.Second)
	expect(errs.Conflict, &UploadPart{Upload: id, Number: 1, Data: short})
	l.pass(time.Second)
	expect(errs.UploadNotFound, commitOf(id, short, NewMessage{}))
	if at, ok := l.e.NextTick(); ok {
		t.Fatalf("next tick at %d with nothing to wait for", at)
	}

	// The topic's and the cluster's bounds.
	l.apply(&TopicSet{Topic: "t", Settings: &TopicSettings{MessageBytesMax: 10, DepthMax: 1}})
	id = expect(errs.OK, &UploadOpen{Topic: "t"}).Upload
	expect(errs.MessageTooLarge, &UploadPart{Upload: id, Data: []byte("eleven bytes")})
	expect(errs.OK, &UploadPart{Upload: id, Data: short})
	expect(errs.OK, &Publish{Topic: "t", Messages: messages(time.Minute, "x")})
	expect(errs.TopicFull, commitOf(id, short, NewMessage{}))
	l.pass(30 * time.Second)
	l.apply(&TopicSet{Topic: "t", Settings: &TopicSettings{}})
	expect(errs.OK, commitOf(id, short, NewMessage{Retention: time.Minute, Delay: 10 * time.Second}))
	l.pass(10 * time.Second)
	l.apply(&Tick{})
	l.apply(&Receive{Topic: "t", Group: "g", Max: 1, Visibility: time.Minute})
	if d := checkLarge(t, l, "g", short); d.ID.Kind != KindDelayed {
		t.Fatalf("delivered %+v", d)
	}
	for range limits.UploadsPerNodeMax {
		expect(errs.OK, &UploadOpen{Topic: "t"})
	}
	expect(errs.TooManyUploads, &UploadOpen{Topic: "t"})
	l.pass(time.Minute)
	id = expect(errs.OK, &UploadOpen{Topic: "t"}).Upload
	l.apply(&TopicDelete{Topic: "t"})
	expect(errs.UploadNotFound, &UploadPart{Upload: id, Data: short})
	l.pass(time.Hour)
	l.apply(&Tick{})
	l.checkpoint()
	if n := rowCount(t, l.e, rowPart, rowUpload, rowLargeExpiry); n != 0 {
		t.Errorf("%d rows are left", n)
	}
}

// TestUploadKeys: the key is looked up when the upload begins and decided when it is committed.
func TestUploadKeys(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	body := largeBody(limits.PartBytes+1, 3)
	send := func(id uint64) Result {
		t.Helper()
		for i, p := range parts(body) {
			l.apply(&UploadPart{Upload: id, Number: uint32(i), Data: p})
		}
		r := l.apply(commitOf(id, body, NewMessage{Key: "k", Retention: time.Hour}))[0]
		if r.Code != errs.OK {
			t.Fatalf("commit gave %v", r.Code)
		}
		return r
	}
	a := l.apply(&UploadOpen{Topic: "t", Key: "k"})[0].Upload
	b := l.apply(&UploadOpen{Topic: "t", Key: "k"})[0].Upload
	if a == 0 || b == 0 {
		t.Fatal("two uploads of one key did not both begin")
	}
	first, second := send(b), send(a)
	if id := second.Published.ID(0); id.Kind != KindDuplicate || id.Original() != first.Published.ID(0) {
		t.Fatalf("the second is %+v", id)
	}
	r := l.apply(&UploadOpen{Topic: "t", Key: "k"})[0]
	if r.Upload != 0 || r.Code != errs.OK || r.Published.ID(0).Original() != first.Published.ID(0) {
		t.Fatalf("the third began: %+v", r)
	}
	checkLarge(t, l, "g", body)
	l.checkpoint()
	if n := rowCount(t, l.e, rowPart); n != 2 {
		t.Errorf("%d parts are stored, want those of one message", n)
	}
	// A purge takes the message's parts and leaves those of an upload under way.
	c := l.apply(&UploadOpen{Topic: "t"})[0].Upload
	l.apply(&UploadPart{Upload: c, Data: body[:limits.PartBytes]})
	l.apply(&Purge{Topic: "t"})
	l.checkpoint()
	if n := rowCount(t, l.e, rowPart); n != 1 {
		t.Errorf("%d parts are stored after the purge, want that of the upload", n)
	}
	l.apply(&UploadPart{Upload: c, Number: 1, Data: body[limits.PartBytes:]})
	if r := l.apply(commitOf(c, body, NewMessage{Key: "k"})); r[0].Code != errs.OK || r[0].Published.Kinds != nil {
		t.Fatalf("commit after the purge: %+v", r[0])
	}
	checkLarge(t, l, "g", body)
}

// TestUploadIntake: an upload ends with the intake it was begun in.
func TestUploadIntake(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	in := l.apply(&OpenIntake{Node: "n1", Nonce: 1})[0].Intake
	var eb EntryBuilder
	eb.Reset(1, l.now, 0)
	eb.Add(in, 1, 1, (&UploadOpen{Topic: "t"}).AppendTo(nil))
	id := l.append(logEntry{data: eb.Bytes()})[0].Upload
	if r := l.apply(&UploadPart{Upload: id, Data: []byte("x")}); r[0].Code != errs.OK {
		t.Fatal(r[0].Code)
	}
	l.apply(&OpenIntake{Node: "n1", Nonce: 2}) // the node has started anew
	if r := l.apply(&UploadPart{Upload: id, Number: 1, Data: []byte("x")}); r[0].Code != errs.UploadNotFound {
		t.Fatalf("the upload of a closed intake took a part: %v", r[0].Code)
	}
	l.checkpoint()
	if n := rowCount(t, l.e, rowPart, rowUpload); n != 0 {
		t.Errorf("%d rows are left", n)
	}
}

// TestPartsAreNotKept: small messages that come in one entry with parts are kept in memory, and the parts are not.
func TestPartsAreNotKept(t *testing.T) {
	l := openTest(t, Options{})
	defer l.close()
	id := l.apply(&UploadOpen{Topic: "t"})[0].Upload
	var eb EntryBuilder
	eb.Reset(1, l.now, 0)
	for _, c := range []Command{
		&Publish{Topic: "t", Messages: messages(time.Hour, "a", "b")}, &UploadPart{Upload: id, Data: largeBody(limits.PartBytes, 1)},
		&Publish{Topic: "u", Messages: messages(time.Hour, "c")}, &UploadPart{Upload: id, Number: 1, Data: []byte("end")},
		&Publish{Topic: "t", Messages: messages(time.Hour, "d", "e")},
	} {
		eb.Add(0, 0, 0, c.AppendTo(nil))
	}
	entry := eb.Bytes()
	l.append(logEntry{data: entry})
	if n := l.e.recentBytes; n == 0 || n > 1<<10 {
		t.Errorf("%d bytes are kept of an entry of %d", n, len(entry))
	}
	// Without the files only what is in memory can be read.
	l.e.packs.mu.Lock()
	open := l.e.packs.open
	l.e.packs.open = nil
	l.e.packs.mu.Unlock()
	for topic, want := range map[string]string{"t": "abde", "u": "c"} {
		got := drain(t, l, topic, "g")
		for _, body := range strings.Split(want, "") {
			if got[body] != 1 {
				t.Errorf("%s: %v", topic, got)
			}
		}
	}
	l.e.packs.mu.Lock()
	l.e.packs.open = open
	l.e.packs.mu.Unlock()
}

// TestPartPacks: what the parts of large messages took is given back when the messages are gone, also where others of
// the same pack live on, and those are read as before.
func TestPartPacks(t *testing.T) {
	fs := vfs.NewCrashableMem()
	l := openTest(t, Options{FS: fs, RecentBytes: -1, packBytes: 1 << 20})
	send := func(retention time.Duration, body []byte) {
		t.Helper()
		id := l.apply(&UploadOpen{Topic: "t"})[0].Upload
		for i, p := range parts(body) {
			l.apply(&UploadPart{Upload: id, Number: uint32(i), Data: p})
		}
		if r := l.apply(commitOf(id, body, NewMessage{Retention: retention}))[0]; r.Code != errs.OK {
			t.Fatal(r.Code)
		}
	}
	kept := largeBody(limits.PartBytes+1, 9)
	for i := range 6 {
		send(time.Minute, largeBody(3*limits.PartBytes, byte(i)))
		if i == 2 {
			send(24*time.Hour, kept)
		}
	}
	aborted := l.apply(&UploadOpen{Topic: "t"})[0].Upload
	l.apply(&UploadPart{Upload: aborted, Data: largeBody(limits.PartBytes, 8)})
	l.checkpoint()
	before := packTotal(t, l)
	if before < 20*limits.PartBytes {
		t.Fatalf("%d bytes are stored", before)
	}
	look := func() { l.pass(2 * time.Minute); l.apply(&Tick{}); l.checkpoint() }
	look() // removes the rows
	look() // finds what they leave
	if after := packTotal(t, l); after > 3*limits.PartBytes {
		t.Errorf("%d bytes are left of %d, %d of them live", after, before, len(kept))
	}
	l.crash(fs)
	checkLarge(t, l, "g", kept)
	l.pass(25 * time.Hour)
	look()
	look()
	if after := packTotal(t, l); after != 0 {
		t.Errorf("%d bytes are left of what has expired", after)
	}
	send(time.Hour, kept)
	checkLarge(t, l, "g", kept)
	l.close()
}
