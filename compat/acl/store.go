package acl

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
)

// Store holds the users by name. There is always one named default.
type Store struct {
	users atomic.Pointer[map[string]*User]
}

// NewStore returns a Store with the open default user alone.
func NewStore() *Store {
	s := new(Store)
	s.Replace(nil, false)
	return s
}

// Get returns the user of that name, nil for none.
func (s *Store) Get(name string) *User { return (*s.users.Load())[name] }

// Default returns the user of connections that have not named one.
func (s *Store) Default() *User { return s.Get(DefaultName) }

// All returns the users by name.
func (s *Store) All() []*User {
	m := *s.users.Load()
	out := make([]*User, 0, len(m))
	for _, name := range slices.Sorted(maps.Keys(m)) {
		out = append(out, m[name])
	}
	return out
}

// Replace sets all users. When users does not say what the default user is, that one is open, or off when closed is set and
// there is another user.
func (s *Store) Replace(users []*User, closed bool) {
	m := make(map[string]*User, len(users)+1)
	for _, u := range users {
		m[u.Name] = u
	}
	if m[DefaultName] == nil {
		if closed && len(m) > 0 {
			m[DefaultName] = NewUser(DefaultName)
		} else {
			m[DefaultName] = Open()
		}
	}
	s.users.Store(&m)
}

// ValidName reports whether a user may have that name.
func ValidName(name string) bool { return name != "" && !strings.ContainsAny(name, " \x00\r\n") }

// Parse reads users in the form of Valkey's file: `user NAME rule rule …`, one a line; empty lines and those that begin with #
// are passed over.
func Parse(r io.Reader) ([]*User, error) {
	var users []*User
	seen := map[string]bool{}
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		words := strings.Fields(line)
		if words[0] != "user" || len(words) < 2 {
			return nil, fmt.Errorf("line %d: want user NAME and rules", n)
		}
		name := words[1]
		if !ValidName(name) {
			return nil, fmt.Errorf("line %d: %q is no user name", n, name)
		}
		if seen[name] {
			return nil, fmt.Errorf("line %d: user %s stands twice", n, name)
		}
		seen[name] = true
		u, err := NewUser(name).Set(words[2:]...)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		users = append(users, u)
	}
	return users, lines.Err()
}
