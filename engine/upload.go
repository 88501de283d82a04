package engine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// Large messages. An upload is state of the shard; its parts stand in packs, each with a row (L) that says where, and become a
// message's body by the commit, whose record names the upload in place of a body. They pass through none of the caches,
// so that the memory a node takes does not depend on how much of them there is. Parts of an upload that ends without
// a commit, or whose commit turned out to be a duplicate, go with the next checkpoint; those of a message go when it
// expires (rows H), or with its topic.

// upload is a large message under way.
type upload struct {
	id    uint64
	topic uint64
	// intake is where it was begun: it ends with that.
	intake   IntakeID
	parts    uint32
	bytes    int64
	crc      uint32
	deadline int64
	// ended is set when a part was shorter than the others: there can be no further one.
	ended bool
	dirty bool
}

// part is one that the entry being applied has brought.
type part struct {
	topic, upload uint64
	number        uint32
	data          []byte
}

// deadParts are parts to be removed: of uploads from from to before to.
type deadParts struct{ topic, from, to uint64 }

// largeEnd says when the parts of a message may go.
type largeEnd struct {
	topic, upload uint64
	expiry        int64
}

func (e *Engine) applyUploadOpen(r *reader, res *Result) error {
	topic, key, deployment := r.bytes(), r.bytes(), r.bytes()
	if r.err() != nil || len(key) > limits.IdempotencyKeyBytesMax || len(deployment) > limits.NameBytesMax {
		res.Code = errs.BadRequest
		return nil
	}
	var node NodeID
	if in := e.intakes[e.intake]; in != nil {
		node = in.node
	}
	count := 0
	for _, u := range e.uploads {
		if in := e.intakes[u.intake]; in == nil && node == "" || in != nil && in.node == node {
			count++
		}
	}
	if count >= limits.UploadsPerNodeMax {
		res.Code, res.RetryAfter = errs.TooManyUploads, time.Second
		return nil
	}
	t, code := e.topicNamed(topic)
	if code != errs.OK {
		res.Code = code
		return nil
	}
	now := e.stamp.Cluster
	if len(key) > 0 {
		original, held, err := e.findKey(e.hashKey(t, deployment, key), now)
		if err != nil {
			return err
		}
		if held {
			res.Published = Published{Shard: e.o.Shard, Index: e.index, Pos: e.pos, Count: 1, Kinds: []MessageKind{KindDuplicate}, Originals: []MessageID{original}}
			e.pos++
			return nil
		}
	}
	e.incarnations++
	u := &upload{id: e.incarnations, topic: t.inc, intake: e.intake, deadline: now + limits.UploadIdleMax.Milliseconds(), dirty: true}
	e.uploads[u.id] = u
	res.Upload = u.id
	e.dirtRough.Add(64)
	return nil
}

func (e *Engine) applyUploadPart(r *reader, res *Result) {
	id, number, data := r.uvarint(), uint32(r.upTo(math.MaxUint32)), r.bytes()
	u := e.uploads[id]
	switch {
	case r.err() != nil || len(data) == 0 || len(data) > limits.PartBytes:
		res.Code = errs.BadRequest
		return
	case u == nil:
		res.Code = errs.UploadNotFound
		return
	case number < u.parts:
		return
	case number > u.parts || u.ended:
		res.Code = errs.Conflict
		return
	}
	most := int64(limits.LargeMessageBytesMax)
	if t := e.byInc[u.topic]; t.settings.MessageBytesMax > 0 {
		most = min(most, t.settings.MessageBytesMax)
	}
	if u.bytes+int64(len(data)) > most {
		res.Code = errs.MessageTooLarge
		return
	}
	e.newParts = append(e.newParts, part{u.topic, u.id, number, data})
	u.parts++
	u.bytes += int64(len(data))
	u.crc = crc32.Update(u.crc, castagnoli, data)
	u.ended = len(data) < limits.PartBytes
	u.deadline = e.stamp.Cluster + limits.UploadIdleMax.Milliseconds()
	u.dirty = true
}

// applyUploadCommit makes the message visible. end is where the command ends in the entry.
func (e *Engine) applyUploadCommit(r *reader, end uint32, res *Result) error {
	id := r.uvarint()
	start, size := end-uint32(len(r.b)), uint32(len(r.b))
	var rec record
	parseRecord(r, &rec)
	l, ok := parseLarge(rec.body)
	u := e.uploads[id]
	switch {
	case r.err() != nil || !ok || rec.flags&recordLarge == 0 || l.Upload != id:
		res.Code = errs.BadRequest
		return nil
	case u == nil:
		res.Code = errs.UploadNotFound
		return nil
	case l.Parts != u.parts || l.Bytes != u.bytes || l.CRC != u.crc:
		res.Code = errs.Conflict
		return nil
	}
	e.beginPublish()
	if res.Code = e.noteRecord(&rec, start, size); res.Code != errs.OK {
		return nil
	}
	if err := e.publish(e.byInc[u.topic], res); err != nil || res.Code != errs.OK {
		return err
	}
	duplicate := res.Published.ID(0).Kind == KindDuplicate
	e.endUpload(u, duplicate)
	if retention := e.heads[0].retention; !duplicate && retention != 0 {
		e.newLarge = append(e.newLarge, largeEnd{u.topic, u.id, e.stamp.Cluster + int64(retention)*1000})
	}
	return nil
}

func (e *Engine) applyUploadAbort(r *reader, res *Result) {
	id := r.uvarint()
	u := e.uploads[id]
	switch {
	case r.err() != nil:
		res.Code = errs.BadRequest
	case u == nil:
		res.Code = errs.UploadNotFound
	default:
		e.endUpload(u, true)
	}
}

// endUpload forgets an upload, and its parts unless they have become a message.
func (e *Engine) endUpload(u *upload, dead bool) {
	delete(e.uploads, u.id)
	e.removedUploads = append(e.removedUploads, u.id)
	if dead {
		e.deadParts = append(e.deadParts, deadParts{u.topic, u.id, u.id + 1})
	}
	e.dirtRough.Add(32)
}

// endUploads ends those that have been silent for too long, or that whether tells.
func (e *Engine) endUploads(which func(u *upload) bool) {
	for _, u := range e.uploads { // ending one has no effect on another
		if which(u) {
			e.endUpload(u, true)
		}
	}
}

// purgeParts drops the parts of all messages of a topic.
func (e *Engine) purgeParts(t *topic) {
	from := uint64(0)
	for _, id := range sortedKeys(e.uploads) {
		if e.uploads[id].topic == t.inc {
			e.deadParts = append(e.deadParts, deadParts{t.inc, from, id})
			from = id + 1
		}
	}
	e.deadParts = append(e.deadParts, deadParts{t.inc, from, e.incarnations + 1})
}

// putParts writes the parts that the entry has brought, and the rows of what it has brought of large messages.
func (e *Engine) putParts(batch *pebble.Batch) error {
	if len(e.newParts) > 0 {
		if err := e.packs.begin(&e.packs.parts, true); err != nil {
			return err
		}
		w := e.packs.parts
		before := w.size
		for i := range e.newParts {
			p := &e.newParts[i]
			at := w.append(p.topic, p.upload, len(p.data), func(dst []byte) []byte {
				return append(binary.AppendUvarint(dst, uint64(p.number)), p.data...)
			})
			e.rowBuf = appendPart(e.rowBuf[:0], e.index, at)
			e.put(batch, e.rowBuf, rowPart, p.topic, p.upload, uint64(p.number))
		}
		e.packs.partsGrown.appended += w.size - before
		if err := e.packs.endParts(); err != nil {
			return err
		}
	}
	for _, l := range e.newLarge {
		e.put(batch, nil, rowLargeExpiry, expiryTick(l.expiry), l.topic, l.upload)
	}
	return nil
}

// LoadPart returns one part of a large message's body; number is from 0 to Parts-1, and all parts but the last have
// limits.PartBytes. A message that expired meanwhile is errs.MessageNotFound. It may be called from any goroutine, on
// any node that has applied the message's entry.
func (e *Engine) LoadPart(l Large, number uint32) (data []byte, err error) {
	if err := e.Err(); err != nil {
		return nil, err
	}
	e.dbMu.RLock()
	defer e.dbMu.RUnlock()
	defer e.damaged(&err)
	if number >= l.Parts {
		return nil, errs.New(errs.BadRequest, "part %d of %d", number, l.Parts)
	}
	data, err = e.readPart(l.Topic, l.Upload, number)
	if err != nil {
		return nil, err
	}
	if data == nil {
		return nil, errs.New(errs.MessageNotFound, "the message expired while it was being delivered")
	}
	want := int64(limits.PartBytes)
	if number == l.Parts-1 {
		want = l.Bytes - int64(number)*limits.PartBytes
	}
	if int64(len(data)) != want {
		return nil, fmt.Errorf("engine: part %d of upload %d has %d bytes instead of %d: %w", number, l.Upload, len(data), want, errMalformed)
	}
	return data, nil
}

// readPart reads a stored part; it returns nil if there is none.
func (e *Engine) readPart(topic, upload uint64, number uint32) ([]byte, error) {
	lookup := func() (place, error) {
		v, closer, err := e.db.Get(e.keys.key(rowPart, topic, upload, uint64(number)))
		if errors.Is(err, pebble.ErrNotFound) {
			return place{}, nil
		}
		if err != nil {
			return place{}, fmt.Errorf("engine: reading part %d of upload %d: %w", number, upload, err)
		}
		_, at, err := parsePart(v)
		return at, errors.Join(err, closer.Close())
	}
	at, err := lookup()
	if err != nil || at.length == 0 {
		return nil, err
	}
	stored, err := e.readPack(topic, upload, at, lookup)
	if stored == nil || err != nil {
		return nil, err
	}
	r := reader{b: stored}
	if n := r.uvarint(); r.bad || n != uint64(number) {
		return nil, fmt.Errorf("engine: part %d of upload %d is part %d: %w", number, upload, n, errMalformed)
	}
	return r.b, nil
}

// appendPart appends the row of a part: by which entry it came and where it stands.
func appendPart(b []byte, index uint64, at place) []byte {
	b = append(b, rowVersion)
	b = binary.AppendUvarint(b, index)
	return at.append(b)
}

func parsePart(row []byte) (index uint64, at place, err error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return 0, place{}, rowError(rowPart, v)
	}
	index = r.uvarint()
	at = r.place()
	return index, at, r.err()
}

func (u *upload) appendRow(b []byte) []byte {
	b = append(b, rowVersion, flags(u.ended))
	for _, v := range []uint64{u.topic, uint64(u.intake), uint64(u.parts), uint64(u.bytes), uint64(u.crc), uint64(u.deadline)} {
		b = binary.AppendUvarint(b, v)
	}
	return b
}

func parseUpload(id uint64, row []byte) (*upload, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return nil, rowError(rowUpload, v)
	}
	u := &upload{id: id, ended: r.flags(1) != 0, topic: r.uvarint(), intake: IntakeID(r.uvarint()), parts: uint32(r.upTo(math.MaxUint32)),
		bytes: int64(r.upTo(1 << 50)), crc: uint32(r.upTo(math.MaxUint32)), deadline: int64(r.upTo(1 << 61))}
	return u, r.err()
}

func (e *Engine) encodeUploads(batch *pebble.Batch) {
	for _, id := range e.removedUploads {
		_ = batch.Delete(e.keys.key(rowUpload, id), nil)
	}
	if len(e.deadParts) > 0 {
		e.packs.partsGrown.loosened = true
	}
	for _, d := range e.deadParts {
		_ = batch.DeleteRange(e.keys.key(rowPart, d.topic, d.from), e.keys.key(rowPart, d.topic, d.to), nil)
	}
	e.removedUploads, e.deadParts = nil, nil
	for _, id := range sortedKeys(e.uploads) {
		if u := e.uploads[id]; u.dirty {
			u.dirty = false
			e.put(batch, u.appendRow(e.rowBuf[:0]), rowUpload, id)
		}
	}
}

func (e *Engine) canonicalUploads(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(e.uploads)))
	for _, id := range sortedKeys(e.uploads) {
		b = binary.AppendUvarint(b, id)
		b = appendBytes(b, e.uploads[id].appendRow(nil))
	}
	return b
}

// sweepLarge removes the parts of messages that have expired.
func (e *Engine) sweepLarge(batch *pebble.Batch, upto int64) error {
	from, to := e.keys.key(rowLargeExpiry, uint64(e.swept)), e.keys.key(rowLargeExpiry, uint64(upto)+1)
	it, err := e.db.NewIter(&pebble.IterOptions{LowerBound: from, UpperBound: to})
	if err != nil {
		return fmt.Errorf("engine: reading the expiry index: %w", err)
	}
	defer func() { _ = it.Close() }()
	any := false
	for it.First(); it.Valid(); it.Next() {
		topic, _ := keyPart(it.Key(), 1)
		upload, ok := keyPart(it.Key(), 2)
		if !ok {
			return fmt.Errorf("engine: expiry row %x: %w", it.Key(), errMalformed)
		}
		any = true
		e.mu.RLock()
		kept := e.keptUploads[upload]
		e.mu.RUnlock()
		if kept {
			e.put(batch, nil, rowLargeExpiry, keptAgain(upto), topic, upload)
			continue
		}
		_ = batch.DeleteRange(e.keys.key(rowPart, topic, upload), e.keys.key(rowPart, topic, upload+1), nil)
	}
	if err := it.Error(); err != nil {
		return fmt.Errorf("engine: reading the expiry index: %w", err)
	}
	if any {
		e.mu.Lock()
		e.packs.partsGrown.loosened = true
		e.mu.Unlock()
		_ = batch.DeleteRange(from, to, nil)
	}
	return nil
}
