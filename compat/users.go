package compat

import (
	"context"
	"fmt"
	"strings"
	"time"

	"tercet.dev/tercet/compat/acl"
	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// usersTable is the table of documents that holds the users, by name; a value is the user's rules.
const usersTable = "acl"

// loadUsersPatience bounds how long the start waits for the users as the cluster knows them. A node whose state is old, or
// empty because it is new, must not let clients in by rules that do not hold any more.
const loadUsersPatience = 10 * time.Second

// fetchUsers reads the users of the cluster.
func (s *Server) fetchUsers(query func(q engine.Query) (engine.Answer, error)) ([]*acl.User, error) {
	var users []*acl.User
	q := engine.Query{Kind: engine.QueryDocuments, Table: usersTable, Max: 1000}
	for {
		a, err := query(q)
		if err != nil {
			return nil, err
		}
		for _, d := range a.Documents {
			u, err := acl.NewUser(d.Key).Set(strings.Fields(string(d.Value))...)
			if err != nil {
				// A rule of a newer release: the user can do nothing here.
				s.log.Error("a user's rules cannot be read: the user is off on this node", "user", d.Key, "error", err)
				u = acl.NewUser(d.Key)
			}
			users = append(users, u)
		}
		if !a.More || len(a.Documents) == 0 {
			return users, nil
		}
		q.After = a.Documents[len(a.Documents)-1].Key
	}
}

// loadUsers brings the users up to date. Loads are one after the other, so that an older one never replaces a newer one.
func (s *Server) loadUsers(ctx context.Context) error {
	s.usersMu.Lock()
	defer s.usersMu.Unlock()
	users, err := s.fetchUsers(func(q engine.Query) (engine.Answer, error) { return s.backend.Query(ctx, q) })
	if err != nil {
		return err
	}
	s.setUsers(users)
	return nil
}

// freshUsersEvery is how often failed logins may have the users read anew.
const freshUsersEvery = 50 * time.Millisecond

// freshUsers reads the users anew, unless they come from a file or were read a moment ago.
func (s *Server) freshUsers() bool {
	now := time.Now().UnixNano()
	last := s.usersFresh.Load()
	if s.opts.UsersFrom != "" || now-last < int64(freshUsersEvery) || !s.usersFresh.CompareAndSwap(last, now) {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return s.loadUsers(ctx) == nil
}

// setUsers puts users in force. A file that names users and not the default one closes that; ACL SETUSER does not, as in
// Valkey, since it would lock out whoever is at it, and every client that runs.
func (s *Server) setUsers(users []*acl.User) {
	s.users.Replace(users, s.opts.UsersFrom != "")
	s.usersRev.Add(1)
	if u := s.users.Default(); len(users) > 0 && u.Enabled && u.NoPassword {
		s.log.Warn("there are users, and clients without a password are still let in: ACL SETUSER default off, once yours can log in")
	}
}

// firstUsers loads the users before the first client is let in.
func (s *Server) firstUsers() {
	if s.opts.UsersFrom != "" {
		return
	}
	ctx, cancel := s.untilClosing(loadUsersPatience)
	defer cancel()
	for {
		err := s.loadUsers(ctx)
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
	}
	select {
	case <-s.closing:
		return
	default:
	}
	users, err := s.fetchUsers(s.backend.StaleQuery)
	if err != nil {
		s.log.Error("cannot read the users", "error", err)
		return
	}
	s.log.Warn("no leader yet: the users are those this node knows")
	s.usersMu.Lock()
	s.setUsers(users)
	s.usersMu.Unlock()
}

// untilClosing returns a context that ends with the server or after d.
func (s *Server) untilClosing(d time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	stop := make(chan struct{})
	go func() {
		select {
		case <-s.closing:
			cancel()
		case <-stop:
		}
	}()
	return ctx, func() {
		close(stop)
		cancel()
	}
}

// watchUsers follows changes of the users until the server closes.
func (s *Server) watchUsers() {
	changed, end := s.backend.Watch(raft.WatchDocuments, usersTable)
	defer end()
	var again <-chan time.Time
	for {
		select {
		case <-changed:
		case <-again:
		case <-s.closing:
			return
		}
		again = nil
		ctx, cancel := s.untilClosing(s.limits.RequestTimeout)
		if err := s.loadUsers(ctx); err != nil {
			again = time.After(100 * time.Millisecond)
		}
		cancel()
	}
}

// errUsersFile is the answer to changes while the users come from a file.
func (s *Server) errUsersFile() string {
	return "ERR the users of this node come from the file " + s.opts.UsersFrom + ": change it on every node and run ACL LOAD"
}

// changeUser replaces a user's document by what change makes of the user. It returns what to answer, empty for success.
func (s *Server) changeUser(ctx context.Context, name string, change func(u *acl.User) (*acl.User, error)) string {
	if _, err := changeUser(ctx, s.backend, name, change); err != nil {
		return errorText(err)
	}
	if err := s.loadUsers(ctx); err != nil {
		return errorText(err)
	}
	return ""
}

// UserDocuments is what keeping users needs of a node. *raft.Node is one.
type UserDocuments interface {
	Propose(ctx context.Context, p raft.Proposal) (raft.Reply, error)
	Query(ctx context.Context, q engine.Query) (engine.Answer, error)
}

// changeUser replaces a user's document by what change makes of the user, which it returns.
func changeUser(ctx context.Context, b UserDocuments, name string, change func(u *acl.User) (*acl.User, error)) (*acl.User, error) {
	for attempt := 0; ; attempt++ {
		a, err := b.Query(ctx, engine.Query{Kind: engine.QueryDocuments, Table: usersTable, Key: name})
		if err != nil {
			return nil, err
		}
		u := acl.NewUser(name)
		if name == acl.DefaultName {
			u = acl.Open()
		}
		doc := engine.Document{Table: usersTable, Key: name, IfAbsent: true}
		if len(a.Documents) > 0 {
			doc.IfAbsent, doc.IfRevision = false, a.Documents[0].Revision
			if u, err = acl.NewUser(name).Set(strings.Fields(string(a.Documents[0].Value))...); err != nil {
				return nil, errs.New(errs.Internal, "the user's stored rules cannot be read: %s", err.Error())
			}
		}
		next, err := change(u)
		if err != nil {
			return nil, errs.New(errs.InvalidBody, "%s", err.Error())
		}
		doc.Value = []byte(next.Rules())
		reply, err := b.Propose(ctx, raft.Proposal{Command: doc.AppendTo(nil)})
		switch {
		case err != nil:
			return nil, err
		case reply.Code == errs.Conflict && attempt < 10:
			continue
		case reply.Code != errs.OK:
			return nil, errs.Of(reply.Code)
		}
		return next, nil
	}
}

// deleteUser removes a user's document and reports whether there was one.
func (s *Server) deleteUser(ctx context.Context, name string) (bool, string) {
	gone, err := deleteUser(ctx, s.backend, name)
	if err != nil {
		return false, errorText(err)
	}
	if !gone {
		return false, ""
	}
	if err := s.loadUsers(ctx); err != nil {
		return false, errorText(err)
	}
	return true, ""
}

// deleteUser removes a user's document and reports whether there was one.
func deleteUser(ctx context.Context, b UserDocuments, name string) (bool, error) {
	doc := engine.Document{Table: usersTable, Key: name, Delete: true}
	reply, err := b.Propose(ctx, raft.Proposal{Command: doc.AppendTo(nil)})
	switch {
	case err != nil:
		return false, err
	case reply.Code == errs.NotFound:
		return false, nil
	case reply.Code != errs.OK:
		return false, errs.Of(reply.Code)
	}
	return true, nil
}

// LoadUsersFile reads a file of users for Options.Users.
func LoadUsersFile(name string) ([]*acl.User, error) {
	f, err := openFile(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	users, err := acl.Parse(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return users, nil
}
