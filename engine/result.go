package engine

import (
	"encoding/binary"
	"math"
	"time"

	"tercet.dev/tercet/internal/errs"
)

const resultVersion = 1

// Which fields of a Result follow.
const (
	resultRepeat = 1 << iota
	resultParked
	resultIntake
	resultPublished
	resultDeliveries
	resultCodes
	resultRetryAfter
	resultInflight
	resultExpiresAt
	resultOriginal
	resultCount
	resultRevision
	resultNext
	resultUpload
	resultKinds // of Published
	resultStream
	resultFlagsEnd
)

// AppendResult appends the encoded result, contents of deliveries included, for the way between nodes.
func AppendResult(b []byte, r *Result) []byte {
	var flags uint64
	set := func(f uint64, on bool) {
		if on {
			flags |= f
		}
	}
	set(resultRepeat, r.Repeat)
	set(resultParked, r.Parked)
	set(resultIntake, r.Intake != 0)
	set(resultPublished, !r.Published.isZero())
	set(resultKinds, len(r.Published.Kinds) > 0)
	set(resultDeliveries, len(r.Deliveries) > 0)
	set(resultCodes, len(r.Codes) > 0)
	set(resultRetryAfter, r.RetryAfter != 0)
	set(resultInflight, r.Inflight != 0)
	set(resultExpiresAt, r.ExpiresAt != 0)
	set(resultOriginal, r.Original != MessageID{})
	set(resultCount, r.Count != 0)
	set(resultRevision, r.Revision != 0)
	set(resultNext, r.Next != 0)
	set(resultUpload, r.Upload != 0)
	set(resultStream, r.Stream != nil)
	b = append(b, resultVersion)
	b = binary.AppendUvarint(b, uint64(r.Code))
	b = binary.AppendUvarint(b, flags)
	if flags&resultIntake != 0 {
		b = binary.AppendUvarint(b, uint64(r.Intake))
	}
	if flags&resultPublished != 0 {
		p := &r.Published
		b = binary.AppendUvarint(b, uint64(p.Shard))
		b = binary.AppendUvarint(b, p.Index)
		b = binary.AppendUvarint(b, uint64(p.Pos))
		b = binary.AppendUvarint(b, uint64(p.Count))
		b = binary.AppendUvarint(b, p.Offset)
		b = p.Stream.append(b)
	}
	if flags&resultDeliveries != 0 {
		b = appendDeliveries(b, r.Deliveries)
	}
	if flags&resultCodes != 0 {
		b = binary.AppendUvarint(b, uint64(len(r.Codes)))
		for _, c := range r.Codes {
			b = binary.AppendUvarint(b, uint64(c))
		}
	}
	if flags&resultRetryAfter != 0 {
		b = appendVarint(b, int64(r.RetryAfter/time.Millisecond))
	}
	if flags&resultInflight != 0 {
		b = binary.AppendUvarint(b, uint64(max(r.Inflight, 0)))
	}
	if flags&resultExpiresAt != 0 {
		b = appendVarint(b, r.ExpiresAt)
	}
	if flags&resultOriginal != 0 {
		b = r.Original.append(b)
	}
	if flags&resultCount != 0 {
		b = appendVarint(b, r.Count)
	}
	if flags&resultRevision != 0 {
		b = binary.AppendUvarint(b, r.Revision)
	}
	if flags&resultNext != 0 {
		b = binary.AppendUvarint(b, r.Next)
	}
	if flags&resultUpload != 0 {
		b = binary.AppendUvarint(b, r.Upload)
	}
	if flags&resultKinds != 0 {
		b = binary.AppendUvarint(b, uint64(len(r.Published.Kinds)))
		for _, k := range r.Published.Kinds {
			b = append(b, byte(k))
		}
		b = appendIDs(b, r.Published.Originals)
	}
	if flags&resultStream != 0 {
		b = r.Stream.append(b)
	}
	return b
}

// DecodeResult decodes what AppendResult wrote. Bodies point into b.
func DecodeResult(b []byte) (Result, error) {
	r := reader{b: b}
	out := r.result(0)
	if err := r.err(); err != nil {
		return Result{}, err
	}
	return out, nil
}

// result reads a Result; depth counts the transactions around it, of which there is one at most.
func (r *reader) result(depth int) Result {
	var out Result
	if r.u8() != resultVersion {
		r.fail()
	}
	out.Code = errs.Code(r.upTo(1<<16 - 1))
	flags := r.upTo(resultFlagsEnd - 1)
	out.Repeat = flags&resultRepeat != 0
	out.Parked = flags&resultParked != 0
	if flags&resultIntake != 0 {
		out.Intake = IntakeID(r.uvarint())
	}
	if flags&resultPublished != 0 {
		out.Published = Published{Shard: uint16(r.upTo(1<<16 - 1)), Index: r.uvarint(), Pos: uint32(r.upTo(1<<32 - 1)), Count: uint32(r.upTo(1<<32 - 1)), Offset: r.uvarint(), Stream: r.streamID()}
	}
	if flags&resultDeliveries != 0 {
		out.Deliveries = r.deliveries()
	}
	if flags&resultCodes != 0 {
		n := r.count(1)
		for range n {
			out.Codes = append(out.Codes, errs.Code(r.upTo(1<<16-1)))
		}
	}
	if flags&resultRetryAfter != 0 {
		out.RetryAfter = r.millis()
	}
	if flags&resultInflight != 0 {
		out.Inflight = int(r.upTo(1 << 40))
	}
	if flags&resultExpiresAt != 0 {
		out.ExpiresAt = r.varint()
	}
	if flags&resultOriginal != 0 {
		out.Original = r.messageID()
	}
	if flags&resultCount != 0 {
		out.Count = r.varint()
	}
	if flags&resultRevision != 0 {
		out.Revision = r.uvarint()
	}
	if flags&resultNext != 0 {
		out.Next = r.uvarint()
	}
	if flags&resultUpload != 0 {
		out.Upload = r.uvarint()
	}
	if flags&resultKinds != 0 {
		duplicates := 0
		for range r.count(1) {
			k := MessageKind(r.u8())
			if k == KindDuplicate {
				duplicates++
			}
			out.Published.Kinds = append(out.Published.Kinds, k)
		}
		out.Published.Originals = r.ids()
		if uint64(len(out.Published.Kinds)) != uint64(out.Published.Count) || len(out.Published.Originals) != duplicates {
			r.fail()
		}
	}
	if flags&resultStream != 0 {
		out.Stream = r.streamResult(depth)
	}
	return out
}

// millis reads a duration in milliseconds that cannot overflow.
func (r *reader) millis() time.Duration {
	ms := r.varint()
	if ms > advanceLimit || ms < -advanceLimit {
		r.fail()
		return 0
	}
	return time.Duration(ms) * time.Millisecond
}

func (id StreamID) append(b []byte) []byte {
	b = binary.AppendUvarint(b, id.Ms)
	return binary.AppendUvarint(b, id.Seq)
}

// next is the lowest ID above id; the highest has none and stays.
func (id StreamID) next() StreamID {
	switch {
	case id.Seq != math.MaxUint64:
		return StreamID{Ms: id.Ms, Seq: id.Seq + 1}
	case id.Ms != math.MaxUint64:
		return StreamID{Ms: id.Ms + 1}
	}
	return id
}

func (r *reader) streamID() StreamID { return StreamID{Ms: r.uvarint(), Seq: r.uvarint()} }

func appendDeliveries(b []byte, ds []Delivery) []byte {
	b = binary.AppendUvarint(b, uint64(len(ds)))
	for i := range ds {
		d := &ds[i]
		b = d.ID.append(b)
		b = d.Receipt.append(b)
		b = d.Stream.append(b)
		b = binary.AppendUvarint(b, uint64(d.Count))
		b = appendVarint(b, d.PublishedAt)
		b = appendVarint(b, d.ExpiresAt)
		b = appendVarint(b, d.LeaseUntil)
		b = appendBool(b, d.Gone)
		b = appendBytes(b, d.ContentType)
		b = binary.AppendUvarint(b, uint64(len(d.Headers)))
		for _, h := range d.Headers {
			b = appendBytes(b, h.Name)
			b = appendBytes(b, h.Value)
		}
		b = appendBytes(b, d.Deployment)
		b = appendBytes(b, d.Body)
		b = appendBool(b, d.Large != nil)
		if d.Large != nil {
			b = binary.AppendUvarint(b, d.Large.Topic)
			b = d.Large.append(b)
		}
	}
	return b
}

// deliveryBytesMin is the size of the smallest encoded delivery.
const deliveryBytesMin = 4 + 5 + 2 + 1 + 3 + 1 + 5

func (r *reader) deliveries() []Delivery {
	n := r.count(deliveryBytesMin)
	var out []Delivery
	for range n {
		d := Delivery{ID: r.messageID(), Receipt: r.receipt(), Stream: r.streamID(), Count: uint32(r.upTo(1<<32 - 1)),
			PublishedAt: r.varint(), ExpiresAt: r.varint(), LeaseUntil: r.varint(), Gone: r.bool(), ContentType: r.str()}
		if hs := r.count(2); hs > 0 {
			for range hs {
				d.Headers = append(d.Headers, Header{Name: r.str(), Value: r.str()})
			}
		}
		d.Deployment = r.str()
		if body := r.bytes(); len(body) > 0 {
			d.Body = body
		}
		if r.bool() {
			d.Large = &Large{Topic: r.uvarint(), Upload: r.uvarint(), Parts: uint32(r.upTo(1<<32 - 1)), Bytes: int64(r.upTo(1 << 50)), CRC: uint32(r.upTo(1<<32 - 1))}
		}
		if r.bad {
			return nil
		}
		out = append(out, d)
	}
	return out
}
