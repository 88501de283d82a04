// Package command is the catalogue of commands: which names exist, how many arguments they take, which of them are keys,
// and which categories of access rules hold them. COMMAND answers from it, the front end checks against it, and package acl
// gives permissions over it.
//
// It knows two kinds of names. Those of Specs are answered by this front end. Those of foreign.go are Valkey's as well and
// are only known so that access rules written for Valkey can be read.
package command

import (
	"slices"
	"strings"
)

// Spec describes one command, or one subcommand as "xgroup|create". The values are those that Valkey's COMMAND INFO gives.
type Spec struct {
	Name string
	// Arity is the number of arguments, the name included; a negative one is the least number.
	Arity int
	// Flags are separated by blanks.
	Flags string
	// First, Last and Step say which arguments are keys; First 0 for none, or for keys found another way (see Keys).
	First, Last, Step int
	// Access says what is done to the keys: r, w or rw; with a | each key has its own.
	Access string
	// Categories and Tips are separated by blanks.
	Categories, Tips string
	// Since is the release of Redis or Valkey that brought the command, Group its chapter in the documentation.
	Since, Group string

	// ID is the command's number among all names, Parent the command of a subcommand.
	ID     ID
	Parent *Spec
	// Subcommands are sorted by name.
	Subcommands []*Spec

	flags Flag
}

// ID numbers a name of the catalogue. Subcommands have numbers of their own. Numbers are not stable over releases.
type ID uint16

// Flag is a property of a command that the front end acts upon.
type Flag uint16

// The flags.
const (
	Write Flag = 1 << iota
	ReadOnly
	// NoAuth commands are served before authentication.
	NoAuth
	// NoMulti commands are refused inside a transaction.
	NoMulti
	PubSub
	Admin
)

// Is reports whether the command has all of the given flags.
func (s *Spec) Is(f Flag) bool { return s.flags&f == f }

var (
	byName     = map[string]*Spec{}
	ids        = map[string]ID{}
	names      []string
	categories []string
	byCategory = map[string][]ID{}
	top        []*Spec
)

func init() {
	add := func(name, cats string) ID {
		id := ID(len(names))
		ids[name] = id
		names = append(names, name)
		for c := range strings.FieldsSeq(cats) {
			byCategory[c] = append(byCategory[c], id)
		}
		return id
	}
	for i := range specs {
		s := &specs[i]
		s.ID = add(s.Name, s.Categories)
		byName[s.Name] = s
		for f := range strings.FieldsSeq(s.Flags) {
			s.flags |= map[string]Flag{"write": Write, "readonly": ReadOnly, "no_auth": NoAuth, "no_multi": NoMulti, "pubsub": PubSub, "admin": Admin}[f]
		}
		if parent, _, ok := strings.Cut(s.Name, "|"); ok {
			p := byName[parent]
			s.Parent = p
			p.Subcommands = append(p.Subcommands, s)
		} else {
			top = append(top, s)
		}
	}
	for _, f := range foreign {
		for name := range strings.FieldsSeq(f.names) {
			if _, ok := ids[name]; !ok {
				add(name, f.categories)
			}
		}
	}
	categories = strings.Fields("keyspace read write set sortedset list hash string bitmap hyperloglog geo stream pubsub admin fast slow blocking dangerous connection transaction scripting")
}

// Specs returns the commands without subcommands, by name.
func Specs() []*Spec { return top }

// Lookup finds a command by its name in lower case.
func Lookup(name string) *Spec { return byName[name] }

// AnyID returns the number of a name of the catalogue, in lower case, whether this front end answers it or not.
func AnyID(name string) (ID, bool) {
	id, ok := ids[name]
	return id, ok
}

// Find finds the command that args, in any case, ask for: nil for an unknown name. unknown is set when the name is known and
// wants a subcommand that args name and that does not exist.
func Find(args [][]byte) (s *Spec, unknown bool) {
	var low [64]byte
	if len(args[0]) > len(low) {
		return nil, false
	}
	s = byName[string(lower(low[:0], args[0]))]
	if s == nil || len(s.Subcommands) == 0 || len(args) < 2 {
		return s, false
	}
	for _, sub := range s.Subcommands {
		if equalFold(args[1], sub.Name[len(s.Name)+1:]) {
			return sub, false
		}
	}
	return s, true
}

func lower(dst, b []byte) []byte {
	for _, c := range b {
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		dst = append(dst, c)
	}
	return dst
}

// equalFold compares b with a name in lower case.
func equalFold(b []byte, name string) bool {
	if len(b) != len(name) {
		return false
	}
	for i, c := range b {
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != name[i] {
			return false
		}
	}
	return true
}

// Arguments reports whether the command takes n arguments, its name included.
func (s *Spec) Arguments(n int) bool {
	if s.Arity < 0 {
		return n >= -s.Arity
	}
	return n == s.Arity
}

// Number returns the ID of a name, foreign ones included.
func Number(name string) (ID, bool) {
	id, ok := ids[name]
	return id, ok
}

// Name returns the name of an ID.
func Name(id ID) string { return names[id] }

// Count is the number of names.
func Count() int { return len(names) }

// WithSubcommands returns the IDs of a command and of all its subcommands.
func WithSubcommands(name string) []ID {
	var out []ID
	for i, n := range names {
		if n == name || strings.HasPrefix(n, name) && n[len(name)] == '|' {
			out = append(out, ID(i))
		}
	}
	return out
}

// Categories lists the categories in Valkey's order.
func Categories() []string { return categories }

// InCategory returns the commands of a category, false when there is no such category.
func InCategory(name string) ([]ID, bool) {
	return byCategory[name], slices.Contains(categories, name)
}

// KeyUse is a key among a command's arguments and what is done to it.
type KeyUse struct {
	// Index is its place among the arguments.
	Index       int
	Read, Write bool
}

// Keys appends the keys among args, which satisfy the command's arity. Malformed arguments have the keys that could be found.
func (s *Spec) Keys(dst []KeyUse, args [][]byte) []KeyUse {
	switch s.Name {
	case "xread", "xreadgroup":
		for i := 1; i < len(args); i++ {
			if equalFold(args[i], "streams") {
				for k := i + 1; k < i+1+(len(args)-i-1)/2; k++ {
					dst = append(dst, KeyUse{k, true, false})
				}
				break
			}
			if equalFold(args[i], "group") {
				i += 2
			} else if !equalFold(args[i], "noack") {
				i++
			}
		}
		return dst
	}
	if s.First == 0 {
		return dst
	}
	last := s.Last
	if last < 0 {
		last += len(args)
	}
	access, rest, _ := strings.Cut(s.Access, "|")
	for i := s.First; i <= last && i < len(args); i += s.Step {
		dst = append(dst, KeyUse{i, strings.Contains(access, "r"), strings.Contains(access, "w")})
		if rest != "" {
			access = rest
		}
	}
	return dst
}
