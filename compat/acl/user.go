package acl

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"slices"
	"strings"

	"tercet.dev/tercet/compat/command"
)

// DefaultName is the user of connections that have not named one.
const DefaultName = "default"

// A User is immutable.
type User struct {
	Name    string
	Enabled bool
	// NoPassword lets any password in.
	NoPassword bool
	// passwords are SHA-256 in hex.
	passwords []string
	// selectors begin with the user's own permissions; the others were given in parentheses.
	selectors []selector
}

// selector is one set of permissions.
type selector struct {
	commands []uint64
	// future is set when commands that do not exist yet are allowed: the base of the rules is +@all.
	future bool
	// rules are the command rules on top of the base, in order.
	rules                []string
	allKeys, allChannels bool
	keys                 []keyPattern
	channels             []string
}

type keyPattern struct {
	pattern     string
	read, write bool
}

// String returns the pattern as a rule.
func (k keyPattern) String() string {
	switch {
	case k.read && k.write:
		return "~" + k.pattern
	case k.read:
		return "%R~" + k.pattern
	}
	return "%W~" + k.pattern
}

// NewUser returns a user that is off and may do nothing.
func NewUser(name string) *User {
	return &User{Name: name, selectors: []selector{newSelector()}}
}

// Open returns the default user of a server without any configuration: on, without password, allowed everything.
func Open() *User {
	u, err := NewUser(DefaultName).Set("on", "nopass", "allkeys", "allchannels", "allcommands")
	if err != nil {
		panic(err)
	}
	return u
}

func newSelector() selector {
	return selector{commands: make([]uint64, (command.Count()+63)/64)}
}

func (s *selector) clone() selector {
	c := *s
	c.commands = slices.Clone(s.commands)
	c.rules = slices.Clone(s.rules)
	c.keys = slices.Clone(s.keys)
	c.channels = slices.Clone(s.channels)
	return c
}

func (u *User) clone() *User {
	c := *u
	c.passwords = slices.Clone(u.passwords)
	c.selectors = make([]selector, len(u.selectors))
	for i := range u.selectors {
		c.selectors[i] = u.selectors[i].clone()
	}
	return &c
}

// RuleError is a rule that was refused, in Valkey's words.
type RuleError struct{ Rule, Text string }

// Error implements error.
func (e *RuleError) Error() string {
	return "Error in ACL SETUSER modifier '" + e.Rule + "': " + e.Text
}

// UnmatchedError is a selector whose parenthesis is not closed.
type UnmatchedError struct{ Rule string }

// Error implements error.
func (e *UnmatchedError) Error() string {
	return "Unmatched parenthesis in acl selector starting at '" + e.Rule + "'."
}

// ruleText is why a rule is refused, in Valkey's words.
type ruleText string

func (t ruleText) Error() string { return string(t) }

const (
	errSyntax   ruleText = "Syntax error"
	errUnknown  ruleText = "Unknown command or category name in ACL"
	errPassword ruleText = "The password you are trying to remove from the user does not exist"
	errHash     ruleText = "The password hash must be exactly 64 characters and contain only lowercase hexadecimal characters"
	errAllKeys  ruleText = "Adding a pattern after the * pattern (or the 'allkeys' flag) is not valid and does not have any effect. Try 'resetkeys' to start with an empty list of patterns"
	errAllChans ruleText = "Adding a pattern after the * pattern (or the 'allchannels' flag) is not valid and does not have any effect. Try 'resetchannels' to start with an empty list of channels"
)

// Set returns the user with rules applied in order, or the first rule that is refused as *RuleError or *UnmatchedError.
// A rule in parentheses may be cut into several words.
func (u *User) Set(rules ...string) (*User, error) {
	c := u.clone()
	merged, err := mergeSelectors(rules)
	if err != nil {
		return nil, err
	}
	for _, rule := range merged {
		if err := c.set(rule); err != nil {
			return nil, &RuleError{rule, err.Error()}
		}
	}
	return c, nil
}

// mergeSelectors puts rules in parentheses together that were cut at their blanks.
func mergeSelectors(rules []string) ([]string, error) {
	var out []string
	for i := 0; i < len(rules); i++ {
		rule := rules[i]
		if !strings.HasPrefix(rule, "(") || strings.HasSuffix(rule, ")") {
			out = append(out, rule)
			continue
		}
		begin := i
		for i++; ; i++ {
			if i == len(rules) {
				return nil, &UnmatchedError{rules[begin]}
			}
			rule += " " + rules[i]
			if strings.HasSuffix(rules[i], ")") {
				break
			}
		}
		out = append(out, rule)
	}
	return out, nil
}

// HashPassword returns a password as it is stored.
func HashPassword(password string) string {
	sum := sha256.Sum256([]byte(password))
	return hex.EncodeToString(sum[:])
}

func validHash(s string) bool {
	if len(s) != 64 {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

func (u *User) set(rule string) error {
	low := strings.ToLower(rule)
	switch low {
	case "on":
		u.Enabled = true
		return nil
	case "off":
		u.Enabled = false
		return nil
	case "nopass":
		u.NoPassword, u.passwords = true, nil
		return nil
	case "resetpass":
		u.NoPassword, u.passwords = false, nil
		return nil
	case "sanitize-payload", "skip-sanitize-payload":
		return nil // about RESTORE, which does not exist here
	case "clearselectors":
		u.selectors = u.selectors[:1]
		return nil
	case "reset":
		*u = *NewUser(u.Name)
		return nil
	}
	if rule == "" {
		return errSyntax
	}
	switch rule[0] {
	case '>':
		u.addPassword(HashPassword(rule[1:]))
		return nil
	case '#':
		if !validHash(rule[1:]) {
			return errHash
		}
		u.addPassword(rule[1:])
		return nil
	case '<', '!':
		hash := rule[1:]
		if rule[0] == '<' {
			hash = HashPassword(hash)
		} else if !validHash(hash) {
			return errHash
		}
		i := slices.Index(u.passwords, hash)
		if i < 0 {
			return errPassword
		}
		u.passwords = slices.Delete(u.passwords, i, i+1)
		return nil
	case '(':
		s := newSelector()
		for word := range strings.FieldsSeq(strings.TrimSuffix(rule[1:], ")")) {
			if strings.ContainsAny(word, "()") {
				return errSyntax // could not be told from the end of the selector
			}
			if err := s.set(word); err != nil {
				return err
			}
		}
		u.selectors = append(u.selectors, s)
		return nil
	}
	return u.selectors[0].set(rule)
}

func (u *User) addPassword(hash string) {
	u.NoPassword = false
	if !slices.Contains(u.passwords, hash) {
		u.passwords = append(u.passwords, hash)
	}
}

func (s *selector) set(rule string) error {
	switch strings.ToLower(rule) {
	case "allkeys", "~*":
		s.allKeys, s.keys = true, nil
		return nil
	case "resetkeys":
		s.allKeys, s.keys = false, nil
		return nil
	case "allchannels", "&*":
		s.allChannels, s.channels = true, nil
		return nil
	case "resetchannels":
		s.allChannels, s.channels = false, nil
		return nil
	case "allcommands", "+@all":
		s.future, s.rules = true, nil
		for i := range s.commands {
			s.commands[i] = ^uint64(0)
		}
		return nil
	case "nocommands", "-@all":
		s.future, s.rules = false, nil
		clear(s.commands)
		return nil
	}
	switch {
	case rule == "":
		return errSyntax
	case rule[0] == '~' || rule[0] == '%':
		return s.addKeys(rule)
	case rule[0] == '&':
		if s.allChannels {
			return errAllChans
		}
		if !slices.Contains(s.channels, rule[1:]) {
			s.channels = append(s.channels, rule[1:])
		}
		return nil
	case (rule[0] == '+' || rule[0] == '-') && len(rule) > 1:
		return s.setCommands(rule[0] == '+', strings.ToLower(rule[1:]))
	}
	return errSyntax
}

// addKeys takes ~pattern and %RW~pattern.
func (s *selector) addKeys(rule string) error {
	k := keyPattern{pattern: rule[1:], read: true, write: true}
	if rule[0] == '%' {
		flags, pattern, ok := strings.Cut(rule[1:], "~")
		if !ok || flags == "" || strings.Trim(flags, "rRwW") != "" {
			return errSyntax
		}
		k = keyPattern{pattern: pattern, read: strings.ContainsAny(flags, "rR"), write: strings.ContainsAny(flags, "wW")}
	}
	if s.allKeys {
		return errAllKeys
	}
	if k.pattern == "*" && k.read && k.write {
		s.allKeys, s.keys = true, nil
		return nil
	}
	for i := range s.keys {
		if s.keys[i].pattern == k.pattern {
			s.keys[i].read = s.keys[i].read || k.read
			s.keys[i].write = s.keys[i].write || k.write
			return nil
		}
	}
	s.keys = append(s.keys, k)
	return nil
}

// setCommands takes what follows + or -: a command, command|subcommand, or @category.
func (s *selector) setCommands(allow bool, what string) error {
	var list []command.ID
	if name, ok := strings.CutPrefix(what, "@"); ok {
		if list, ok = command.InCategory(name); !ok {
			return errUnknown
		}
	} else if list = command.WithSubcommands(what); list == nil {
		// Valkey's old form, a first argument behind a command without subcommands, cannot be promised.
		return errUnknown
	}
	for _, id := range list {
		if allow {
			s.commands[id/64] |= 1 << (id % 64)
		} else {
			s.commands[id/64] &^= 1 << (id % 64)
		}
	}
	// A rule replaces the earlier ones about the same name and its subcommands.
	s.rules = slices.DeleteFunc(s.rules, func(old string) bool {
		return old[1:] == what || strings.HasPrefix(old[1:], what+"|")
	})
	sign := "-"
	if allow {
		sign = "+"
	}
	s.rules = append(s.rules, sign+what)
	return nil
}

// Authenticate reports whether the password opens the user.
func (u *User) Authenticate(password string) bool {
	if !u.Enabled {
		return false
	}
	if u.NoPassword {
		return true
	}
	hash, ok := []byte(HashPassword(password)), 0
	for _, p := range u.passwords {
		ok |= subtle.ConstantTimeCompare(hash, []byte(p))
	}
	return ok == 1
}

// Verdict says what a user lacks.
type Verdict uint8

// The verdicts.
const (
	Allowed Verdict = iota
	DeniedCommand
	DeniedKey
	DeniedChannel
)

// String returns the word of ACL LOG.
func (v Verdict) String() string {
	return [...]string{"allowed", "command", "key", "channel"}[v]
}

// Access is what a command wants.
type Access struct {
	Command command.ID
	Args    [][]byte
	Keys    []command.KeyUse
	// Channels are arguments [from, to) that name channels, patterns when Literal is set.
	ChannelsFrom, ChannelsTo int
	Literal                  bool
}

// Check decides whether the user may do what a describes. object is the index of the argument that is in the way.
func (u *User) Check(a *Access) (v Verdict, object int) {
	v = DeniedCommand
	for i := range u.selectors {
		got, at := u.selectors[i].check(a)
		if got == Allowed {
			return Allowed, 0
		}
		if got > v || i == 0 {
			v, object = got, at
		}
	}
	return v, object
}

func (s *selector) check(a *Access) (Verdict, int) {
	if s.commands[a.Command/64]&(1<<(a.Command%64)) == 0 {
		return DeniedCommand, 0
	}
	if !s.allKeys {
		for _, k := range a.Keys {
			if !s.key(string(a.Args[k.Index]), k.Read, k.Write) {
				return DeniedKey, k.Index
			}
		}
	}
	if !s.allChannels {
		for i := a.ChannelsFrom; i < a.ChannelsTo; i++ {
			if !s.channel(string(a.Args[i]), a.Literal) {
				return DeniedChannel, i
			}
		}
	}
	return Allowed, 0
}

func (s *selector) key(key string, read, write bool) bool {
	for i := range s.keys {
		k := &s.keys[i]
		if (!read || k.read) && (!write || k.write) && Match(k.pattern, key) {
			return true
		}
	}
	return false
}

// channel matches a channel with the patterns; a pattern to subscribe to must be one of them.
func (s *selector) channel(name string, literal bool) bool {
	for _, p := range s.channels {
		if literal && p == name || !literal && Match(p, name) {
			return true
		}
	}
	return false
}

// AllKeys reports whether the user may use any key, as commands need that have no keys and look at all.
func (u *User) AllKeys() bool { return u.selectors[0].allKeys }

// MayRead reports whether the user may read the key, as SCAN and KEYS never show others.
func (u *User) MayRead(key string) bool {
	for i := range u.selectors {
		if s := &u.selectors[i]; s.allKeys || s.key(key, true, false) {
			return true
		}
	}
	return false
}

// MayReceive reports whether the user may hear the channel, or with literal subscribe to that pattern.
func (u *User) MayReceive(channel string, literal bool) bool {
	for i := range u.selectors {
		if s := &u.selectors[i]; s.allChannels || s.channel(channel, literal) {
			return true
		}
	}
	return false
}

// Permissions of one selector in Valkey's words.
type Permissions struct{ Commands, Keys, Channels string }

func (s *selector) permissions() Permissions {
	var p Permissions
	p.Commands = "-@all"
	if s.future {
		p.Commands = "+@all"
	}
	if len(s.rules) > 0 {
		p.Commands += " " + strings.Join(s.rules, " ")
	}
	if s.allKeys {
		p.Keys = "~*"
	} else {
		words := make([]string, len(s.keys))
		for i, k := range s.keys {
			words[i] = k.String()
		}
		p.Keys = strings.Join(words, " ")
	}
	if s.allChannels {
		p.Channels = "&*"
	} else if len(s.channels) > 0 {
		p.Channels = "&" + strings.Join(s.channels, " &")
	}
	return p
}

func (p Permissions) rules() string {
	words := make([]string, 0, 4)
	if p.Keys != "" {
		words = append(words, p.Keys)
	}
	if p.Channels != "&*" {
		words = append(words, "resetchannels")
	}
	if p.Channels != "" {
		words = append(words, p.Channels)
	}
	return strings.Join(append(words, p.Commands), " ")
}

// Flags lists on or off and nopass.
func (u *User) Flags() []string {
	flags := []string{"off"}
	if u.Enabled {
		flags[0] = "on"
	}
	if u.NoPassword {
		flags = append(flags, "nopass")
	}
	return flags
}

// Passwords lists the hashes of the passwords.
func (u *User) Passwords() []string { return u.passwords }

// Permissions returns the user's own permissions and those of the further selectors.
func (u *User) Permissions() (own Permissions, selectors []Permissions) {
	for i := range u.selectors[1:] {
		selectors = append(selectors, u.selectors[i+1].permissions())
	}
	return u.selectors[0].permissions(), selectors
}

// Rules returns the rules that make this user out of a new one, on one line. Set reads them.
func (u *User) Rules() string {
	words := u.Flags()
	for _, p := range u.passwords {
		words = append(words, "#"+p)
	}
	own, selectors := u.Permissions()
	words = append(words, own.rules())
	for _, s := range selectors {
		words = append(words, "("+s.rules()+")")
	}
	return strings.Join(words, " ")
}
