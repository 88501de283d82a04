package engine

import "encoding/binary"

// entryVersion is the first byte of every entry this release writes.
const entryVersion = 1

// Tags of the items of an entry.
const (
	tagIntake  = 1 // intake id u64, lowest uvarint: the commands that follow are that intake's
	tagCommand = 2 // number uvarint, length-prefixed command
)

// EntryBuilder assembles the commands of several intakes into one raft entry.
//
//	version u8 | level uvarint | cluster ms uvarint | wall ms uvarint
//	{ 1 | intake u64 | lowest uvarint    the commands behind are this intake's; its results below lowest are dropped
//	| 2 | number uvarint | length uvarint | command }*
type EntryBuilder struct {
	buf     []byte
	count   int
	intake  IntakeID
	lowest  uint64
	section bool
}

const entryHeadMax = 1 + 5 + 10 + 10

// Reset begins an entry. The bytes of an earlier one stay its own: raft, the log and the engine keep them.
// sizeHint is what the caller expects to add (the commands and EntryOverhead for each), so that the entry is
// allocated once and holds on to no more than it needs.
func (eb *EntryBuilder) Reset(level uint32, s Stamp, sizeHint int) {
	*eb = EntryBuilder{buf: make([]byte, 0, entryHeadMax+sizeHint)}
	eb.buf = append(eb.buf, entryVersion)
	eb.buf = binary.AppendUvarint(eb.buf, uint64(level))
	eb.buf = binary.AppendUvarint(eb.buf, uint64(max(s.Cluster, 0)))
	eb.buf = binary.AppendUvarint(eb.buf, uint64(max(s.Wall, 0)))
}

// Add appends a command that is number of an intake, whose lowest number still waited for is lowest. Intake
// zero is none.
func (eb *EntryBuilder) Add(intake IntakeID, number, lowest uint64, cmd []byte) {
	if !eb.section || eb.intake != intake || eb.lowest != lowest {
		eb.buf = append(eb.buf, tagIntake)
		eb.buf = binary.LittleEndian.AppendUint64(eb.buf, uint64(intake))
		eb.buf = binary.AppendUvarint(eb.buf, lowest)
		eb.section, eb.intake, eb.lowest = true, intake, lowest
	}
	eb.buf = append(eb.buf, tagCommand)
	eb.buf = binary.AppendUvarint(eb.buf, number)
	eb.buf = appendBytes(eb.buf, cmd)
	eb.count++
}

// EntryOverhead bounds what Add adds to the bytes of a command.
const EntryOverhead = 1 + 8 + 10 + 1 + 10 + 10

// Len returns the size of the entry so far.
func (eb *EntryBuilder) Len() int { return len(eb.buf) }

// Count returns the number of commands so far.
func (eb *EntryBuilder) Count() int { return eb.count }

// Bytes returns the entry. It must not be changed afterwards.
func (eb *EntryBuilder) Bytes() []byte { return eb.buf }

// entryHead is the fixed part of an entry.
type entryHead struct {
	level uint32
	stamp Stamp
}

func parseEntryHead(r *reader) (entryHead, error) {
	var h entryHead
	v := r.u8()
	if r.bad {
		return h, errMalformed
	}
	if v != entryVersion {
		return h, &UnknownError{What: "entry version", Value: uint64(v)}
	}
	level := r.upTo(1<<32 - 1)
	if !r.bad && level > levelMax {
		return h, &UnknownError{What: "feature level", Value: level}
	}
	h.level = uint32(level)
	h.stamp.Cluster = int64(r.upTo(1 << 60))
	h.stamp.Wall = int64(r.upTo(1 << 60))
	if r.bad {
		return h, errMalformed
	}
	return h, nil
}

// entryItem is one command of an entry with its place in an intake.
type entryItem struct {
	intake  IntakeID
	lowest  uint64
	opened  bool // the first command of its section
	number  uint64
	command []byte
}

// nextItem reads the next command; ok is false at the end. it carries the section from call to call.
func nextItem(r *reader, it *entryItem) (ok bool, err error) {
	it.opened = false
	for len(r.b) > 0 {
		switch r.u8() {
		case tagIntake:
			it.intake = IntakeID(r.u64())
			it.lowest = r.uvarint()
			it.opened = true
			if r.bad {
				return false, errMalformed
			}
		case tagCommand:
			it.number = r.uvarint()
			it.command = r.bytes()
			if r.bad {
				return false, errMalformed
			}
			return true, nil
		default:
			return false, errMalformed
		}
	}
	if r.bad {
		return false, errMalformed
	}
	return false, nil
}

// EntryInfo is the head of an entry, for tools that print a log.
type EntryInfo struct {
	Level    uint32
	Stamp    Stamp
	Commands int
}

// EntryStamp returns the stamp of an entry from its head alone.
func EntryStamp(entry []byte) (Stamp, error) {
	r := reader{b: entry}
	h, err := parseEntryHead(&r)
	return h.stamp, err
}

// InspectEntry reads an entry without applying it.
func InspectEntry(entry []byte) (EntryInfo, error) {
	r := reader{b: entry}
	h, err := parseEntryHead(&r)
	if err != nil {
		return EntryInfo{}, err
	}
	info := EntryInfo{Level: h.level, Stamp: h.stamp}
	var it entryItem
	for {
		ok, err := nextItem(&r, &it)
		if err != nil || !ok {
			return info, err
		}
		info.Commands++
	}
}
