package compat

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"tercet.dev/tercet/compat/acl"
	"tercet.dev/tercet/compat/command"
	"tercet.dev/tercet/compat/resp"
)

func openFile(name string) (io.ReadCloser, error) { return os.Open(name) }

// aclLogMax is the number of entries that ACL LOG keeps; aclLogMerge is how long equal ones are counted together.
const (
	aclLogMax   = 128
	aclLogMerge = 60 * time.Second
)

// aclLog remembers refusals, newest first.
type aclLog struct {
	mu      sync.Mutex
	next    int64
	entries []*aclEntry
}

type aclEntry struct {
	id                                    int64
	count                                 int
	reason, context, object, user, client string
	created, updated                      time.Time
}

func (l *aclLog) add(reason, context, object, user string, c *conn) {
	if len(object) > 256 {
		object = object[:256]
	}
	if len(user) > 256 {
		user = user[:256]
	}
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, e := range l.entries {
		if e.reason == reason && e.context == context && e.object == object && e.user == user && now.Sub(e.created) < aclLogMerge {
			e.count++
			e.updated = now
			copy(l.entries[1:i+1], l.entries[:i])
			l.entries[0] = e
			return
		}
	}
	e := &aclEntry{id: l.next, count: 1, reason: reason, context: context, object: object, user: user, client: c.line(), created: now, updated: now}
	l.next++
	l.entries = append([]*aclEntry{e}, l.entries...)
	if len(l.entries) > aclLogMax {
		l.entries = l.entries[:aclLogMax]
	}
}

func cmdACLLog(c *conn, a [][]byte) {
	l := &c.s.aclLog
	limit := int64(10)
	if len(a) == 3 {
		if is(a[2], "reset") {
			l.mu.Lock()
			l.entries = nil
			l.mu.Unlock()
			c.w.OK()
			return
		}
		n, ok := resp.ParseInt(a[2])
		if !ok {
			c.w.Error("ERR value is not an integer or out of range")
			return
		}
		limit = max(n, 0)
	} else if len(a) > 3 {
		c.w.Error("ERR syntax error")
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	n := min(int(min(limit, aclLogMax)), len(l.entries))
	w := &c.w
	w.Array(n)
	now := time.Now()
	for _, e := range l.entries[:n] {
		w.Map(10)
		w.String("count")
		w.Int(int64(e.count))
		w.String("reason")
		w.String(e.reason)
		w.String("context")
		w.String(e.context)
		w.String("object")
		w.String(e.object)
		w.String("username")
		w.String(e.user)
		w.String("age-seconds")
		w.Double(now.Sub(e.created).Seconds())
		w.String("client-info")
		w.String(e.client)
		w.String("entry-id")
		w.Int(e.id)
		w.String("timestamp-created")
		w.Int(e.created.UnixMilli())
		w.String("timestamp-last-updated")
		w.Int(e.updated.UnixMilli())
	}
}

func cmdACLWhoami(c *conn, _ [][]byte) { c.w.String(c.user.Name) }

func cmdACLUsers(c *conn, _ [][]byte) {
	users := c.s.users.All()
	c.w.Array(len(users))
	for _, u := range users {
		c.w.String(u.Name)
	}
}

func cmdACLList(c *conn, _ [][]byte) {
	users := c.s.users.All()
	c.w.Array(len(users))
	for _, u := range users {
		c.w.String("user " + u.Name + " " + u.Rules())
	}
}

func cmdACLGetUser(c *conn, a [][]byte) {
	u := c.s.users.Get(string(a[2]))
	w := &c.w
	if u == nil {
		w.NullArray()
		return
	}
	own, selectors := u.Permissions()
	w.Map(6)
	w.String("flags")
	flags := u.Flags()
	w.Set(len(flags))
	for _, f := range flags {
		w.String(f)
	}
	w.String("passwords")
	w.Array(len(u.Passwords()))
	for _, p := range u.Passwords() {
		w.String(p)
	}
	permissions := func(p acl.Permissions) {
		w.String("commands")
		w.String(p.Commands)
		w.String("keys")
		w.String(p.Keys)
		w.String("channels")
		w.String(p.Channels)
	}
	permissions(own)
	w.String("selectors")
	w.Array(len(selectors))
	for _, s := range selectors {
		w.Map(3)
		permissions(s)
	}
}

// requestContext bounds an administrative request.
func (c *conn) requestContext() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), c.s.limits.RequestTimeout)
}

// validUser reports whether a user may have that name.
func validUser(name string) bool { return acl.ValidName(name) && len(name) <= 1024 }

// validRule reports whether a rule can be told from others where users are kept: rules stand there with blanks between them.
func validRule(rule string) bool {
	return !strings.ContainsAny(rule, " \t\r\n\x00") || strings.HasPrefix(rule, ">") || strings.HasPrefix(rule, "<") || strings.HasPrefix(rule, "(")
}

func cmdACLSetUser(c *conn, a [][]byte) {
	name := string(a[2])
	if !validUser(name) {
		c.w.Error("ERR Usernames can't contain spaces or null characters")
		return
	}
	rules := make([]string, len(a)-3)
	for i, r := range a[3:] {
		rules[i] = string(r)
		if !validRule(rules[i]) {
			c.w.Error("ERR Error in ACL SETUSER modifier '" + rules[i] + "': Syntax error")
			return
		}
	}
	if c.s.opts.UsersFrom != "" {
		c.w.Error(c.s.errUsersFile())
		return
	}
	ctx, cancel := c.requestContext()
	defer cancel()
	text := c.s.changeUser(ctx, name, func(u *acl.User) (*acl.User, error) { return u.Set(rules...) })
	if text != "" {
		c.w.Error(text)
		return
	}
	c.s.log.Info("audit: ACL SETUSER", "user", name, "by", c.user.Name, "client", c.nc.RemoteAddr().String())
	c.w.OK()
}

func cmdACLDelUser(c *conn, a [][]byte) {
	for _, name := range a[2:] {
		if string(name) == acl.DefaultName {
			c.w.Error("ERR The 'default' user cannot be removed")
			return
		}
	}
	if c.s.opts.UsersFrom != "" {
		c.w.Error(c.s.errUsersFile())
		return
	}
	ctx, cancel := c.requestContext()
	defer cancel()
	n := 0
	self := c.user.Name
	for _, name := range a[2:] {
		gone, text := c.s.deleteUser(ctx, string(name))
		if text != "" {
			c.w.Error(text)
			return
		}
		if !gone {
			continue
		}
		n++
		c.s.log.Info("audit: ACL DELUSER", "user", string(name), "by", self, "client", c.nc.RemoteAddr().String())
		c.s.cutOff(string(name), c)
	}
	c.w.Int(int64(n))
	if c.s.users.Get(self) == nil {
		c.emit()
		c.finish("user deleted")
	}
}

// cutOff closes the connections of a user that is gone; those that are idle would not notice.
func (s *Server) cutOff(name string, except *conn) {
	for _, k := range s.clients.list() {
		k.desc.mu.Lock()
		user := k.desc.user
		k.desc.mu.Unlock()
		if user == name && k != except {
			k.kill("user deleted")
		}
	}
}

func cmdACLCat(c *conn, a [][]byte) {
	if len(a) > 3 {
		c.w.Error("ERR unknown subcommand or wrong number of arguments for 'CAT'. Try ACL HELP.")
		return
	}
	if len(a) == 2 {
		names := command.Categories()
		c.w.Array(len(names))
		for _, n := range names {
			c.w.String(n)
		}
		return
	}
	ids, ok := command.InCategory(lower(a[2]))
	if !ok {
		c.w.Error("ERR Unknown category '" + string(a[2]) + "'")
		return
	}
	c.w.Array(len(ids))
	for _, id := range ids {
		c.w.String(command.Name(id))
	}
}

func cmdACLGenPass(c *conn, a [][]byte) {
	bits := int64(256)
	if len(a) == 3 {
		n, ok := resp.ParseInt(a[2])
		if !ok || n < 1 || n > 4096 {
			c.w.Error("ERR ACL GENPASS argument must be the number of bits for the output password, a positive number up to 4096")
			return
		}
		bits = n
	} else if len(a) > 3 {
		c.w.Error("ERR unknown subcommand or wrong number of arguments for 'GENPASS'. Try ACL HELP.")
		return
	}
	digits := int(bits+3) / 4
	b := make([]byte, (digits+1)/2)
	rand.Read(b)
	c.w.String(hex.EncodeToString(b)[:digits])
}

func cmdACLLoad(c *conn, _ [][]byte) {
	if c.s.opts.UsersFrom == "" {
		c.w.Error("ERR This Redis instance is not configured to use an ACL file. You may want to specify users via the ACL SETUSER command and then issue a CONFIG REWRITE (assuming you have a Redis configuration file set) in order to store users in the Redis configuration.")
		return
	}
	users, err := LoadUsersFile(c.s.opts.UsersFrom)
	if err != nil {
		c.w.Error("ERR " + err.Error())
		return
	}
	c.s.usersMu.Lock()
	c.s.setUsers(users)
	c.s.usersMu.Unlock()
	c.w.OK()
}

func cmdACLSave(c *conn, _ [][]byte) {
	if c.s.opts.UsersFrom != "" {
		c.w.Error(c.s.errUsersFile())
		return
	}
	// Users are replicated and durable as soon as they are set.
	c.w.OK()
}

func cmdACLDryRun(c *conn, a [][]byte) {
	u := c.s.users.Get(string(a[2]))
	if u == nil {
		c.w.Error("ERR User '" + string(a[2]) + "' not found")
		return
	}
	spec, bad := command.Find(a[3:])
	if spec == nil || bad {
		c.w.Error("ERR Command '" + string(a[3]) + "' not found")
		return
	}
	if !spec.Arguments(len(a) - 3) {
		c.w.Error(wrongArguments(spec))
		return
	}
	v, object := u.Check(&acl.Access{Command: spec.ID, Args: a[3:], Keys: spec.Keys(nil, a[3:])})
	switch v {
	case acl.Allowed:
		c.w.OK()
	case acl.DeniedCommand:
		c.w.String("User " + u.Name + " has no permissions to run the '" + spec.Name + "' command")
	default:
		c.w.String("User " + u.Name + " has no permissions to access the '" + string(a[3+object]) + "' " + v.String())
	}
}
