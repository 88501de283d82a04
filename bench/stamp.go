package bench

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"sync"
	"time"
)

// A time mark is the beginning of the body of a Timed workload: a word to know it by, and the nanoseconds since
// epoch at which the message was due.
const (
	timeMarkWord = "due:at: "
	timeMarkSize = len(timeMarkWord) + 8
)

// epoch is what time marks count from. Its monotonic reading keeps them apart from changes of the clock, which is why
// publishers and consumers have to be in one process.
var epoch = time.Now()

// putTimeMark writes a mark over the beginning of a body.
func putTimeMark(body []byte, due time.Time) {
	copy(body, timeMarkWord)
	binary.BigEndian.PutUint64(body[len(timeMarkWord):], uint64(due.Sub(epoch)))
}

// readTimeMark reads what putTimeMark wrote.
func readTimeMark(body []byte) (time.Time, bool) {
	if len(body) < timeMarkSize || !bytes.HasPrefix(body, []byte(timeMarkWord)) {
		return time.Time{}, false
	}
	return epoch.Add(time.Duration(binary.BigEndian.Uint64(body[len(timeMarkWord):]))), true
}

// Stamp names one message of a run: its publisher and that publisher's number for it, from 1.
type Stamp struct {
	Publisher uint32
	Number    uint64
}

// StampSize is the length of an encoded stamp.
const StampSize = 8 + 1 + 16

// put writes the stamp over the beginning of a body.
func (s Stamp) put(body []byte) {
	b := [12]byte{
		byte(s.Publisher >> 24), byte(s.Publisher >> 16), byte(s.Publisher >> 8), byte(s.Publisher),
		byte(s.Number >> 56), byte(s.Number >> 48), byte(s.Number >> 40), byte(s.Number >> 32),
		byte(s.Number >> 24), byte(s.Number >> 16), byte(s.Number >> 8), byte(s.Number),
	}
	hex.Encode(body[:8], b[:4])
	body[8] = '-'
	hex.Encode(body[9:StampSize], b[4:])
}

// parseStamp reads what put wrote.
func parseStamp(body []byte) (Stamp, error) {
	var b [12]byte
	if len(body) < StampSize || body[8] != '-' {
		return Stamp{}, fmt.Errorf("the body %.40q has no stamp", body)
	}
	if _, err := hex.Decode(b[:4], body[:8]); err != nil {
		return Stamp{}, err
	}
	if _, err := hex.Decode(b[4:], body[9:StampSize]); err != nil {
		return Stamp{}, err
	}
	var s Stamp
	for _, x := range b[:4] {
		s.Publisher = s.Publisher<<8 | uint32(x)
	}
	for _, x := range b[4:] {
		s.Number = s.Number<<8 | uint64(x)
	}
	return s, nil
}

// Ledger holds what was acknowledged, and what was found, of the stamped messages of a run.
type Ledger struct {
	mu                  sync.Mutex
	acknowledged, found map[Stamp]uint32
	// missing counts the stamps of acknowledged that are not in found.
	missing int64
}

// NewLedger returns an empty ledger.
func NewLedger() *Ledger {
	return &Ledger{acknowledged: map[Stamp]uint32{}, found: map[Stamp]uint32{}}
}

// Acknowledged enters a message that the cluster said it has.
func (l *Ledger) Acknowledged(s Stamp) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.acknowledged[s]++; l.acknowledged[s] == 1 && l.found[s] == 0 {
		l.missing++
	}
}

// Found enters a message that a consumer was given.
func (l *Ledger) Found(s Stamp) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.found[s]++; l.found[s] == 1 && l.acknowledged[s] > 0 {
		l.missing--
	}
}

// Missing is the number of acknowledged messages that have not been found yet.
func (l *Ledger) Missing() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.missing
}

// onlyAcknowledged returns a ledger of the same acknowledgements in which nothing has been found yet.
func (l *Ledger) onlyAcknowledged() *Ledger {
	l.mu.Lock()
	defer l.mu.Unlock()
	return &Ledger{acknowledged: maps.Clone(l.acknowledged), found: map[Stamp]uint32{}, missing: int64(len(l.acknowledged))}
}

// Balance is the proof at a run's end.
type Balance struct {
	// Acknowledged messages, and those of them that no consumer ever saw.
	Acknowledged int64 `json:"acknowledged"`
	Lost         int64 `json:"lost"`
	// Unacknowledged messages were found although their publisher had got no answer or an error.
	Unacknowledged int64 `json:"unacknowledged"`
	// Duplicates are messages found more often than once.
	Duplicates int64 `json:"duplicates"`
}

// Balance closes the account.
func (l *Ledger) Balance() Balance {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := Balance{Acknowledged: int64(len(l.acknowledged)), Lost: l.missing}
	for s, n := range l.found {
		if l.acknowledged[s] == 0 {
			b.Unacknowledged++
		}
		b.Duplicates += int64(n - 1)
	}
	return b
}
