package acl

import (
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/compat/command"
)

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"", "", true}, {"", "a", false}, {"*", "", true}, {"*", "abc", true}, {"a*c", "abbc", true}, {"a*c", "abbd", false},
		{"a?c", "abc", true}, {"a?c", "ac", false}, {"[abc]", "b", true}, {"[^abc]", "b", false}, {"[^abc]", "d", true}, {"[a-c]x", "bx", true},
		{"[c-a]", "b", true}, {`\*`, "*", true}, {`\*`, "a", false}, {`[\]]`, "]", true}, {"h**llo", "hello", true}, {"*a*b*", "xaxbx", true},
		{"[a", "a", true}, {"a\\", "a\\", true}, {"orders:*", "orders:", true}, {"orders:*", "order:", false}, {"*\xff", "a\xff", true},
		{"[-]", "-", true}, {"[a-]", "-", false}, {"[]", "a", false},
	} {
		if got := Match(c.pattern, c.s); got != c.want {
			t.Errorf("Match(%q, %q) = %v", c.pattern, c.s, got)
		}
	}
}

// TestMatchIsBounded: patterns that are made to cost time are given up, a hundred thousand stars are nothing.
func TestMatchIsBounded(t *testing.T) {
	done := make(chan bool)
	go func() {
		if Match(strings.Repeat("a*", 5000)+"b", strings.Repeat("a", 100000)) {
			t.Error("a pattern that ends in b matches")
		}
		done <- Match(strings.Repeat("*", 100000)+"b", strings.Repeat("a", 100000)+"b")
	}()
	select {
	case ok := <-done:
		if !ok {
			t.Error("many stars match nothing")
		}
	case <-time.After(2 * time.Minute):
		t.Fatal("matching does not end")
	}
}

func FuzzMatch(f *testing.F) {
	f.Add("a*[b-c]?", "axbz")
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if Match(pattern, s) && !Match(pattern+"*", s) && !strings.ContainsAny(pattern, "[\\") {
			t.Errorf("%q matches %q, and with a star does not", pattern, s)
		}
		if !Match("*", s) || !Match("*"+escape(s)+"*", "x"+s+"y") && len(s) < 100 {
			t.Errorf("%q", s)
		}
	})
}

func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		b.WriteByte('\\')
		b.WriteByte(s[i])
	}
	return b.String()
}

// allowed asks whether the user may run a line on its keys.
func allowed(t *testing.T, u *User, line string) Verdict {
	t.Helper()
	var args [][]byte
	for w := range strings.FieldsSeq(line) {
		args = append(args, []byte(w))
	}
	spec, bad := command.Find(args)
	if spec == nil || bad || !spec.Arguments(len(args)) {
		t.Fatalf("%s is no command", line)
	}
	a := Access{Command: spec.ID, Args: args, Keys: spec.Keys(nil, args)}
	switch spec.Name {
	case "publish":
		a.ChannelsFrom, a.ChannelsTo = 1, 2
	case "psubscribe":
		a.ChannelsFrom, a.ChannelsTo, a.Literal = 1, 2, true
	}
	v, _ := u.Check(&a)
	return v
}

func TestRules(t *testing.T) {
	for _, c := range []struct {
		rules string
		want  string // as Rules writes them
		may   []string
		not   []string // a verdict before each
	}{
		{"", "off resetchannels -@all", nil, []string{"command ping"}},
		{"on nopass ~* &* +@all", "on nopass ~* &* +@all", []string{"xadd k * a b", "flushall", "publish c m"}, nil},
		{"on +@read +xadd ~orders:*", "on ~orders:* resetchannels -@all +@read +xadd", []string{"xadd orders:1 * a b", "xlen orders:1", "xinfo stream orders:1"},
			[]string{"key xadd other * a b", "command xdel orders:1 1-1", "command flushall"}},
		{"on +@all -@dangerous ~*", "on ~* resetchannels +@all -@dangerous", []string{"xadd k * a b"}, []string{"command flushall", "command keys *", "channel publish c m"}},
		{"on %R~in %W~out +@all", "on %R~in %W~out resetchannels +@all", []string{"xlen in", "copy in out"}, []string{"key xadd in * a b", "key xrange out - +", "key copy out in"}},
		{"on +@all -xgroup|destroy ~*", "on ~* resetchannels +@all -xgroup|destroy", []string{"xgroup create k g 0"}, []string{"command xgroup destroy k g"}},
		{"on +xgroup|create +client|id ~*", "on ~* resetchannels -@all +xgroup|create +client|id", []string{"xgroup create k g 0", "client id"}, []string{"command xgroup destroy k g", "command client list"}},
		{"on +@all (~b +xlen) ~a", "on ~a resetchannels +@all (~b resetchannels -@all +xlen)", []string{"xlen a", "xlen b", "xadd a * f v"}, []string{"key xadd b * f v"}},
		{"on ~a ~b resetkeys ~c +xread +xreadgroup", "on ~c resetchannels -@all +xread +xreadgroup", []string{"xread streams c 0"}, []string{"key xread streams c a 0 0", "key xreadgroup group g c streams d >"}},
		{"on &ch* +@all allkeys", "on ~* resetchannels &ch* +@all", []string{"publish ch1 m", "psubscribe ch*"}, []string{"channel publish x m", "channel psubscribe c*"}},
		{"on +@all reset", "off resetchannels -@all", nil, []string{"command ping"}},
		{"on +xadd -xadd", "on resetchannels -@all -xadd", nil, []string{"command xadd k * a b"}},
	} {
		u, err := NewUser("u").Set(strings.Fields(c.rules)...)
		if err != nil {
			t.Errorf("%s: %v", c.rules, err)
			continue
		}
		if got := u.Rules(); got != c.want {
			t.Errorf("%s: is %s, want %s", c.rules, got, c.want)
		}
		again, err := NewUser("u").Set(strings.Fields(u.Rules())...)
		if err != nil || again.Rules() != u.Rules() {
			t.Errorf("%s: reads back as %v, %v", u.Rules(), again, err)
			continue
		}
		for _, u := range []*User{u, again} {
			for _, line := range c.may {
				if v := allowed(t, u, line); v != Allowed {
					t.Errorf("%s: %s is denied for its %v", c.rules, line, v)
				}
			}
			for _, line := range c.not {
				why, line, _ := strings.Cut(line, " ")
				if v := allowed(t, u, line); v.String() != why {
					t.Errorf("%s: %s is %v, want denied for its %s", c.rules, line, v, why)
				}
			}
		}
	}
}

func TestRefusedRules(t *testing.T) {
	const user = "Error in ACL SETUSER modifier "
	for rule, want := range map[string]string{
		"foo": user + "'foo': Syntax error", "+nosuch": user + "'+nosuch': Unknown command or category name in ACL",
		"+@nosuch": user + "'+@nosuch': Unknown command or category name in ACL",
		"<x":       user + "'<x': The password you are trying to remove from the user does not exist",
		"#zz":      user + "'#zz': The password hash must be exactly 64 characters and contain only lowercase hexadecimal characters",
		"(+get":    "Unmatched parenthesis in acl selector starting at '(+get'.", "+xinfo|nosuch": user + "'+xinfo|nosuch': Unknown command or category name in ACL",
		"%X~a": user + "'%X~a': Syntax error", "%~a": user + "'%~a': Syntax error", "": user + "'': Syntax error", "+": user + "'+': Syntax error",
		"(foo)": user + "'(foo)': Syntax error",
	} {
		if _, err := NewUser("u").Set(rule); err == nil || err.Error() != want {
			t.Errorf("%q: %v", rule, err)
		}
	}
	if _, err := Open().Set("~x"); err == nil || !strings.Contains(err.Error(), "Adding a pattern after the *") {
		t.Errorf("pattern after allkeys: %v", err)
	}
	// Names of Valkey that do not exist here are accepted.
	if _, err := NewUser("u").Set("+zadd", "+@sortedset", "-debug", "+eval"); err != nil {
		t.Error(err)
	}
}

func TestPasswords(t *testing.T) {
	u, err := NewUser("u").Set("on", ">one", ">two")
	if err != nil {
		t.Fatal(err)
	}
	check := func(u *User, want map[string]bool) {
		t.Helper()
		for p, ok := range want {
			if u.Authenticate(p) != ok {
				t.Errorf("%q: %v", p, !ok)
			}
		}
	}
	check(u, map[string]bool{"one": true, "two": true, "": false, "three": false})
	less, err := u.Set("<one")
	if err != nil {
		t.Fatal(err)
	}
	check(less, map[string]bool{"one": false, "two": true})
	check(u, map[string]bool{"one": true}) // unchanged
	off, _ := u.Set("off")
	check(off, map[string]bool{"one": false})
	open, _ := u.Set("nopass")
	check(open, map[string]bool{"anything": true})
	closed, _ := open.Set("resetpass")
	check(closed, map[string]bool{"": false, "one": false})
	if strings.Contains(u.Rules(), "one") {
		t.Errorf("a password in clear: %s", u.Rules())
	}
}

// TestDefaultUser: open while nobody is configured, and off if that is wanted as soon as somebody is.
func TestDefaultUser(t *testing.T) {
	s := NewStore()
	if u := s.Default(); !u.Enabled || !u.NoPassword {
		t.Error("not open at first")
	}
	alice, _ := NewUser("alice").Set("on", ">pw")
	s.Replace([]*User{alice}, false)
	if u := s.Default(); !u.Enabled || !u.NoPassword {
		t.Error("not open although nobody closed it")
	}
	s.Replace([]*User{alice}, true)
	if s.Default().Enabled {
		t.Error("open although there is a user")
	}
	def, _ := NewUser(DefaultName).Set("on", ">pw")
	s.Replace([]*User{alice, def}, true)
	if u := s.Default(); !u.Enabled || u.NoPassword {
		t.Error("not as configured")
	}
}

func TestParse(t *testing.T) {
	users, err := Parse(strings.NewReader("# users\n\nuser default off\nuser alice on >pw ~* +@all (+get ~x)\n"))
	if err != nil {
		t.Fatal(err)
	}
	if len(users) != 2 || users[1].Name != "alice" || !users[1].Authenticate("pw") {
		t.Errorf("%+v", users)
	}
	for in, want := range map[string]string{
		"alice on":                "line 1: want user NAME and rules",
		"user":                    "line 1: want user NAME and rules",
		"user a on\nuser a off":   "line 2: user a stands twice",
		"user a on\nuser b bogus": "line 2: Error in ACL SETUSER modifier 'bogus': Syntax error",
	} {
		if _, err := Parse(strings.NewReader(in)); err == nil || err.Error() != want {
			t.Errorf("%q: %v", in, err)
		}
	}
}

// FuzzRules: what is accepted reads back as the same user.
func FuzzRules(f *testing.F) {
	for _, s := range []string{"on >pw ~* &* +@all", "on +@read -xlen %R~a (+get ~b)", "off #30c952fab122c3f9759f02a6d95c3758b246b4fee239957b2d4fee46e26170c4", "allkeys (", "reset nopass"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, rules string) {
		u, err := NewUser("u").Set(strings.Fields(rules)...)
		if err != nil {
			return
		}
		again, err := NewUser("u").Set(strings.Fields(u.Rules())...)
		if err != nil || again.Rules() != u.Rules() {
			t.Errorf("%q makes %q, which does not read back: %v", rules, u.Rules(), err)
		}
	})
}
