package logstore

import (
	"encoding/binary"
	"fmt"
)

// The keys raft uses. It calls them by these names since its first release.
const (
	raftTerm     = "CurrentTerm"
	raftVoteTerm = "LastVoteTerm"
	raftVoteCand = "LastVoteCand"
)

// The keys of the shard's stable values that belong to this package.
const (
	keyTerm   = "raft.term"
	keyVote   = "raft.vote" // term u64, then the candidate
	keyPrefix = "raft.kv."  // whatever else raft may store
)

// SetUint64 implements hraft.StableStore. It returns when the value is durable, with one exception: the term of a vote
// is held back until the candidate is named, so that both are one record (decision 4). Raft's two calls would
// otherwise leave, after a crash between them, the new term beside the candidate of the old vote, and raft grants
// that candidate a "repeated" vote without comparing logs.
func (s *Store) SetUint64(key []byte, v uint64) error {
	s.stable.Lock()
	defer s.stable.Unlock()
	switch string(key) {
	case raftVoteTerm:
		s.stable.held, s.stable.isHeld = v, true
		return nil
	case raftTerm:
		// Raft writes its term at every start. The lock is held while a write waits for the disk, so that an equal
		// value seen here is a durable one.
		if have, err := s.uint64(keyTerm); err == nil && have == v && v != 0 {
			return nil
		}
		if err := s.o.Shard.SetStable(keyTerm, binary.LittleEndian.AppendUint64(nil, v)); err != nil {
			return err
		}
		if s.o.OnTerm != nil {
			s.o.OnTerm(v)
		}
		return nil
	default:
		return s.o.Shard.SetStable(keyPrefix+string(key), binary.LittleEndian.AppendUint64(nil, v))
	}
}

// GetUint64 implements hraft.StableStore. For the term of a vote it returns the durable record's, never one that is
// held back: beside it raft reads the candidate, and the two must belong together.
func (s *Store) GetUint64(key []byte) (uint64, error) {
	switch string(key) {
	case raftVoteTerm:
		term, _, err := s.vote()
		return term, err
	case raftTerm:
		return s.uint64(keyTerm)
	default:
		return s.uint64(keyPrefix + string(key))
	}
}

// Set implements hraft.StableStore. It returns when the value is durable.
func (s *Store) Set(key, val []byte) error {
	s.stable.Lock()
	defer s.stable.Unlock()
	if string(key) != raftVoteCand {
		return s.o.Shard.SetStable(keyPrefix+string(key), append([]byte{}, val...))
	}
	term := s.stable.held
	if !s.stable.isHeld {
		var err error
		if term, _, err = s.vote(); err != nil {
			return err
		}
	}
	b := binary.LittleEndian.AppendUint64(make([]byte, 0, 8+len(val)), term)
	if err := s.o.Shard.SetStable(keyVote, append(b, val...)); err != nil {
		return err
	}
	s.stable.isHeld = false
	return nil
}

// Get implements hraft.StableStore: nil when there is no value.
func (s *Store) Get(key []byte) ([]byte, error) {
	if string(key) == raftVoteCand {
		_, candidate, err := s.vote()
		return candidate, err
	}
	return s.o.Shard.Stable(keyPrefix + string(key)), nil
}

func (s *Store) uint64(key string) (uint64, error) {
	b := s.o.Shard.Stable(key)
	switch len(b) {
	case 0:
		return 0, nil
	case 8:
		return binary.LittleEndian.Uint64(b), nil
	default:
		return 0, fmt.Errorf("stable value %s has %d bytes instead of 8", key, len(b))
	}
}

func (s *Store) vote() (term uint64, candidate []byte, err error) {
	b := s.o.Shard.Stable(keyVote)
	if b == nil {
		return 0, nil, nil
	}
	if len(b) < 8 {
		return 0, nil, fmt.Errorf("stable value %s has %d bytes", keyVote, len(b))
	}
	return binary.LittleEndian.Uint64(b), b[8:], nil
}
