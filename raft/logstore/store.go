package logstore

import (
	"errors"
	"fmt"
	"sort"
	"sync"

	hclog "github.com/hashicorp/go-hclog"
	hraft "github.com/hashicorp/raft"

	"tercet.dev/tercet/wal"
)

// WAL is what a Store asks of the stream its shard lives in. *wal.WAL is one.
type WAL interface {
	// Written returns the position after everything appended so far.
	Written() wal.LSN
	// Durable returns the position up to which everything is on disk.
	Durable() wal.LSN
	// WaitDurable waits until everything before lsn is on disk.
	WaitDurable(lsn wal.LSN, cancel <-chan struct{}) error
}

// Options configure a Store.
type Options struct {
	// WAL is the stream, Shard this shard's log in it.
	WAL   WAL
	Shard *wal.Shard
	// Base is the configuration of the state the log continues (the engine's checkpoint, the snapshot) and
	// BaseIndex the index of the entry that established it; zero when there is none.
	Base      hraft.Configuration
	BaseIndex uint64
	// OnConfiguration, if not nil, is called with the latest configuration whenever it changes: when an entry
	// with one is stored, when such an entry is truncated, and once by Open if there is one. Raft acts on a
	// configuration right after the store has it, so that this comes in time for the transport's table. It is
	// called on raft's main goroutine and must not block.
	OnConfiguration func(index uint64, c hraft.Configuration)
	// OnTerm, if not nil, is called when raft has durably entered a term, before raft acts in it.
	OnTerm func(term uint64)
	// OnDurable, if not nil, is called after Durable has advanced, from one goroutine of the store.
	OnDurable func()
	// RetainFrom, if not nil, returns the lowest index that must stay in the log though a snapshot covers it (a
	// node is catching up from there). A prefix deletion stops below it.
	RetainFrom func() uint64
	// Logger is the parent of the store's logger.
	Logger hclog.Logger
}

// Store is one shard's log as raft wants to see it. Raft's goroutines and the transport's may use it at once.
type Store struct {
	o   Options
	log hclog.Logger

	stop chan struct{}
	done chan struct{}

	mu struct {
		sync.Mutex
		// pending are the appends that may not be durable yet, oldest first: both fields rise. It is empty when
		// everything is durable.
		pending []mark
		// durable is the newest index known to be on disk together with all before it.
		durable uint64
		grown   chan struct{} // cap 1: pending is not empty
		// configs are the configurations in the log and the one the log continues, oldest first.
		configs []configuration
		// unsure is set by a reset until the configuration is known again; resetAt is where the log began then.
		unsure  bool
		resetAt uint64
		scratch []wal.Entry
	}

	stable struct {
		sync.Mutex
		// held is the term of a vote whose candidate has not been named yet.
		held   uint64
		isHeld bool
	}
}

// mark says that everything up to index is durable once lsn is.
type mark struct {
	index uint64
	lsn   wal.LSN
}

type configuration struct {
	index  uint64
	config hraft.Configuration
}

// Open makes a Store of a shard whose log has been recovered. It reads every entry above the base once, for the
// configurations among them.
func Open(o Options) (*Store, error) {
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	s := &Store{o: o, log: o.Logger.Named("logstore"), stop: make(chan struct{}), done: make(chan struct{})}
	s.mu.grown = make(chan struct{}, 1)
	if o.BaseIndex > 0 || len(o.Base.Servers) > 0 {
		s.mu.configs = append(s.mu.configs, configuration{o.BaseIndex, o.Base})
	}
	first, last := o.Shard.Range()
	s.mu.durable = last // Open of the WAL returns only what is on disk
	for i := max(first, o.BaseIndex+1); i <= last && first > 0; i++ {
		var e wal.Entry
		if err := o.Shard.Get(i, &e); err != nil {
			return nil, fmt.Errorf("read entry %d: %w", i, err)
		}
		if hraft.LogType(e.Type) == hraft.LogConfiguration {
			c, err := decodeConfiguration(e.Index, e.Data)
			if err != nil {
				return nil, err
			}
			s.mu.configs = append(s.mu.configs, c)
		}
	}
	if n := len(s.mu.configs); n > 0 && o.OnConfiguration != nil {
		o.OnConfiguration(s.mu.configs[n-1].index, s.mu.configs[n-1].config)
	}
	go s.follow()
	return s, nil
}

// Close ends the store's goroutine. It leaves the WAL open. Raft must have stopped.
func (s *Store) Close() error {
	select {
	case <-s.stop:
	default:
		close(s.stop)
	}
	<-s.done
	return nil
}

// decodeConfiguration turns the library's panic over a malformed entry into an error.
func decodeConfiguration(index uint64, data []byte) (c configuration, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("configuration in entry %d: %v", index, r)
		}
	}()
	return configuration{index, hraft.DecodeConfiguration(data)}, nil
}

// FirstIndex implements hraft.LogStore.
func (s *Store) FirstIndex() (uint64, error) { return s.o.Shard.First(), nil }

// LastIndex implements hraft.LogStore.
func (s *Store) LastIndex() (uint64, error) { return s.o.Shard.Last(), nil }

// IsMonotonic implements hraft.MonotonicLogStore: the log has no gaps, so after an installed snapshot raft removes
// the whole log.
func (s *Store) IsMonotonic() bool { return true }

// GetLog implements hraft.LogStore. It also returns entries that are not durable yet: otherwise raft would take an
// entry that is still in the buffer for one that was compacted, and send a snapshot.
func (s *Store) GetLog(index uint64, l *hraft.Log) error {
	var e wal.Entry
	if err := s.o.Shard.Get(index, &e); err != nil {
		if errors.Is(err, wal.ErrNotFound) {
			return hraft.ErrLogNotFound
		}
		return err
	}
	l.Index, l.Term, l.Type, l.AppendedAt = e.Index, e.Term, hraft.LogType(e.Type), e.AppendedAt
	l.Data, l.Extensions = e.Data, e.Extensions
	return nil
}

// StoreLog implements hraft.LogStore.
func (s *Store) StoreLog(l *hraft.Log) error { return s.StoreLogs([]*hraft.Log{l}) }

// StoreLogs implements hraft.LogStore. The entries can be read when it returns, and are on disk only if one of them is
// a configuration, or if the latest configuration has a single voter or is not known: then nobody else's gated
// answer stands between raft's early count of this node and a commit (decision 3a).
func (s *Store) StoreLogs(logs []*hraft.Log) error {
	if len(logs) == 0 {
		return nil
	}
	var changed []configuration
	for _, l := range logs {
		if l.Type == hraft.LogConfiguration {
			c, err := decodeConfiguration(l.Index, l.Data)
			if err != nil {
				return err
			}
			changed = append(changed, c)
		}
	}
	s.mu.Lock()
	entries := s.mu.scratch[:0]
	for _, l := range logs {
		entries = append(entries, wal.Entry{Index: l.Index, Term: l.Term, Type: uint8(l.Type), AppendedAt: l.AppendedAt,
			Data: l.Data, Extensions: l.Extensions})
	}
	lsn, err := s.o.Shard.Append(entries)
	clear(entries)
	s.mu.scratch = entries[:0]
	if err != nil {
		s.mu.Unlock()
		return err
	}
	if s.mu.unsure && (len(changed) > 0 || logs[0].Index == s.mu.resetAt) {
		// Either the entries name the configuration, or they replace the ones that were deleted: then the log
		// was not reset for a snapshot, and the configuration before it still holds.
		s.mu.unsure = false
	}
	s.mu.configs = append(s.mu.configs, changed...)
	wait := len(changed) > 0 || s.mu.unsure || soleVoter(s.latest().config)
	s.pushLocked(logs[len(logs)-1].Index, lsn)
	s.mu.Unlock()
	if wait {
		if err := s.o.WAL.WaitDurable(lsn, nil); err != nil {
			return err
		}
	}
	if n := len(changed); n > 0 && s.o.OnConfiguration != nil {
		s.o.OnConfiguration(changed[n-1].index, changed[n-1].config)
	}
	return nil
}

// soleVoter tells whether nobody's answer is needed for a commit. A configuration without voters is one that is not
// known.
func soleVoter(c hraft.Configuration) bool {
	voters := 0
	for _, server := range c.Servers {
		if server.Suffrage == hraft.Voter {
			voters++
		}
	}
	return voters <= 1
}

// latest returns the newest configuration. s.mu is held.
func (s *Store) latest() configuration {
	if n := len(s.mu.configs); n > 0 {
		return s.mu.configs[n-1]
	}
	return configuration{}
}

// pushLocked notes an append. s.mu is held.
func (s *Store) pushLocked(index uint64, lsn wal.LSN) {
	s.mu.pending = append(s.mu.pending, mark{index, lsn})
	select {
	case s.mu.grown <- struct{}{}:
	default:
	}
}

// DeleteRange implements hraft.LogStore. Raft deletes a suffix that contradicts the leader, a prefix that a snapshot
// covers, or, after an installed snapshot, everything. What reaches the last index is always obeyed; only a
// shorter prefix may be kept for others (Options.RetainFrom).
func (s *Store) DeleteRange(from, through uint64) error {
	s.mu.Lock()
	before := s.latest()
	err := s.deleteLocked(from, through)
	after := s.latest()
	s.mu.Unlock()
	if err == nil && before.index != after.index && s.o.OnConfiguration != nil {
		s.o.OnConfiguration(after.index, after.config)
	}
	return err
}

func (s *Store) deleteLocked(from, through uint64) error {
	first, last := s.o.Shard.Range()
	switch {
	case first == 0 || from > last || through < first || from > through:
		return nil
	case from <= first && through >= last:
		if _, err := s.o.Shard.Reset(through + 1); err != nil {
			return err
		}
		s.cutLocked(first)
		s.mu.durable = 0
		s.mu.unsure, s.mu.resetAt = true, first
		return nil
	case through >= last:
		if _, err := s.o.Shard.TruncateSuffix(from); err != nil {
			return err
		}
		s.cutLocked(from)
		return nil
	case from <= first:
		if s.o.RetainFrom != nil {
			if retain := s.o.RetainFrom(); retain <= through {
				if retain <= first {
					return nil
				}
				through = retain - 1
			}
		}
		// Of the configurations below, the newest still says who is a member.
		n := sort.Search(len(s.mu.configs), func(i int) bool { return s.mu.configs[i].index > through })
		if n > 1 {
			s.mu.configs = append([]configuration(nil), s.mu.configs[n-1:]...)
		}
		return s.o.Shard.TruncatePrefix(through)
	default:
		return fmt.Errorf("cannot delete %d to %d from the middle of a log from %d to %d", from, through, first, last)
	}
}

// cutLocked forgets what was known of the entries from an index on. s.mu is held.
func (s *Store) cutLocked(from uint64) {
	for i := range s.mu.pending {
		if s.mu.pending[i].index >= from {
			// This append began below the cut only if the one before it ends below from-1.
			if i == 0 && s.mu.durable < from-1 || i > 0 && s.mu.pending[i-1].index < from-1 {
				s.mu.pending[i].index = from - 1
				i++
			}
			s.mu.pending = s.mu.pending[:i]
			break
		}
	}
	s.mu.durable = min(s.mu.durable, from-1)
	n := sort.Search(len(s.mu.configs), func(i int) bool { return s.mu.configs[i].index >= from })
	s.mu.configs = s.mu.configs[:n:n]
}

// SetBase tells the store the configuration of a snapshot that has been installed. It has to be called before raft
// goes on, by the state machine's Restore; until then the store cannot know who votes, and waits for every sync.
func (s *Store) SetBase(index uint64, c hraft.Configuration) {
	s.mu.Lock()
	n := sort.Search(len(s.mu.configs), func(i int) bool { return s.mu.configs[i].index > index })
	s.mu.configs = append([]configuration{{index, c}}, s.mu.configs[n:]...)
	s.mu.unsure = false
	latest := s.latest()
	s.mu.Unlock()
	if s.o.OnConfiguration != nil {
		s.o.OnConfiguration(latest.index, latest.config)
	}
}

// Configuration returns the latest configuration in the log (or the one it continues), committed or not, and the
// index of its entry; 0 when there is none.
func (s *Store) Configuration() (uint64, hraft.Configuration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.latest()
	return c.index, c.config.Clone()
}

// Position returns the place of the stream that has to be durable before this node may say that it holds the log up
// to index: the end of the append that brought the present entry there. 0 means that it is durable already.
func (s *Store) Position(index uint64) wal.LSN {
	s.mu.Lock()
	defer s.mu.Unlock()
	if index <= s.mu.durable {
		return 0
	}
	i := sort.Search(len(s.mu.pending), func(i int) bool { return s.mu.pending[i].index >= index })
	if i < len(s.mu.pending) {
		return s.mu.pending[i].lsn
	}
	// Not in the log: truncated, or covered by a snapshot. Whatever was done last decides.
	return s.o.WAL.Written()
}

// Durable returns the newest index that is on disk together with everything before it.
func (s *Store) Durable() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.durable
}

// WaitDurable waits until the log up to index is on this node's disk. The state machine calls it before it applies:
// then what is applied is never ahead of the log after a crash.
func (s *Store) WaitDurable(index uint64, cancel <-chan struct{}) error {
	lsn := s.Position(index)
	if lsn == 0 {
		return nil
	}
	return s.o.WAL.WaitDurable(lsn, cancel)
}

// follow moves durable along behind the disk.
func (s *Store) follow() {
	defer close(s.done)
	for {
		s.mu.Lock()
		var head wal.LSN
		if len(s.mu.pending) > 0 {
			head = s.mu.pending[0].lsn
		}
		s.mu.Unlock()
		if head == 0 {
			select {
			case <-s.mu.grown:
				continue
			case <-s.stop:
				return
			}
		}
		if err := s.o.WAL.WaitDurable(head, s.stop); err != nil {
			// Stopped, closed, or poisoned: nothing becomes durable any more. A poisoned log ends the process.
			return
		}
		durable := s.o.WAL.Durable()
		s.mu.Lock()
		n, advanced := 0, false
		for n < len(s.mu.pending) && s.mu.pending[n].lsn <= durable {
			if s.mu.pending[n].index > s.mu.durable {
				s.mu.durable = s.mu.pending[n].index
				advanced = true
			}
			n++
		}
		s.mu.pending = append(s.mu.pending[:0], s.mu.pending[n:]...)
		s.mu.Unlock()
		if advanced && s.o.OnDurable != nil {
			s.o.OnDurable()
		}
	}
}

// StageCommit notes that the entries up to index are committed. The WAL writes it with the next batch; it never
// causes a sync of its own. The state machine calls it after it applied.
func (s *Store) StageCommit(index uint64) { s.o.Shard.StageCommit(index) }

// ReplayCommitted hands every entry above applied that is known to be committed to fn, in order, of every type. It is
// called before raft starts, with the index the engine's durable state has reached. Raft may hand the same entries
// over again later; the engine skips what it has. It returns the last index handed over, applied if none was.
//
// The log's Data must not be modified and may be kept.
func (s *Store) ReplayCommitted(applied uint64, fn func(l *hraft.Log) error) (uint64, error) {
	first, last := s.o.Shard.Range()
	through := min(s.o.Shard.Committed(), last)
	if through <= applied {
		return applied, nil
	}
	if first > applied+1 {
		return applied, fmt.Errorf("the state ends at entry %d and the log begins at %d: what lies between is missing; replace this node", applied, first)
	}
	for i := applied + 1; i <= through; i++ {
		l := new(hraft.Log)
		if err := s.GetLog(i, l); err != nil {
			return i - 1, fmt.Errorf("replay entry %d: %w", i, err)
		}
		if err := fn(l); err != nil {
			return i - 1, fmt.Errorf("replay entry %d: %w", i, err)
		}
	}
	return through, nil
}

// Reconcile makes the log fit the state it continues, at start: a log that ends below the snapshot, or holds another
// term at its index, is one that a crash during an install left behind, and is dropped (decision 2). A log that
// begins above the snapshot has lost entries, which is an error. It reports whether it dropped the log.
func (s *Store) Reconcile(index, term uint64) (reset bool, err error) {
	first, last := s.o.Shard.Range()
	switch {
	case first == 0:
		return false, nil
	case first > index+1:
		return false, fmt.Errorf("the state ends at entry %d and the log begins at %d: what lies between is missing; replace this node", index, first)
	case index == 0:
		return false, nil
	case last >= index:
		if first == index+1 {
			return false, nil
		}
		var e wal.Entry
		if err := s.o.Shard.Get(index, &e); err != nil {
			return false, fmt.Errorf("read entry %d: %w", index, err)
		}
		if e.Term == term {
			return false, nil
		}
	}
	s.log.Warn("log does not reach the installed state and is dropped", "log_first", first, "log_last", last,
		"state_index", index, "state_term", term)
	s.mu.Lock()
	lsn, err := s.o.Shard.Reset(index + 1)
	if err == nil {
		s.cutLocked(first)
		s.mu.durable = 0
	}
	s.mu.Unlock()
	if err != nil {
		return false, err
	}
	return true, s.o.WAL.WaitDurable(lsn, nil)
}
