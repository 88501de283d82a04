package compat

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// fakeBackend is a node that does what a test says.
type fakeBackend struct {
	mu       sync.Mutex
	submit   func(cmd engine.Command, done func(raft.Reply, error))
	query    func(q engine.Query) (engine.Answer, error)
	status   raft.Status
	leading  bool
	docs     map[string]engine.StoredDocument
	revision uint64
	watches  map[string][]chan struct{}
	commands []engine.Command
}

func newFake() *fakeBackend {
	return &fakeBackend{
		leading: true, docs: map[string]engine.StoredDocument{}, watches: map[string][]chan struct{}{},
		status: raft.Status{ID: "n1", Zone: "a", Incarnation: "i1", ClusterID: "c", Term: 3, Leader: "n1", InSync: []string{"a", "b", "c"}, Nodes: []raft.NodeStatus{
			{ID: "n1", Zone: "a", Incarnation: "i1", Valkey: "127.0.0.1:6379", InSync: true, Role: raft.Leader},
			{ID: "n2", Zone: "b", Incarnation: "i2", Valkey: "127.0.0.1:6380", InSync: true, Role: raft.Follower},
			{ID: "n3", Zone: "c", Incarnation: "i3", Valkey: "127.0.0.1:6381", InSync: true, Role: raft.Follower},
		}},
	}
}

func (f *fakeBackend) Submit(p raft.Proposal, done func(raft.Reply, error)) {
	cmd, err := engine.DecodeCommand(p.Command)
	if err != nil {
		done(raft.Reply{}, errs.Of(errs.BadRequest).With(err))
		return
	}
	f.mu.Lock()
	f.commands = append(f.commands, cmd)
	submit := f.submit
	f.mu.Unlock()
	if doc, ok := cmd.(*engine.Document); ok {
		done(f.document(doc), nil)
		return
	}
	if submit == nil {
		done(raft.Reply{Zones: 3}, nil)
		return
	}
	submit(cmd, done)
}

func (f *fakeBackend) document(d *engine.Document) (r raft.Reply) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r.Zones = 3
	have, ok := f.docs[d.Key]
	switch {
	case d.IfAbsent && ok, d.IfRevision != 0 && d.IfRevision != have.Revision:
		r.Code = errs.Conflict
	case d.Delete && !ok:
		r.Code = errs.NotFound
	case d.Delete:
		delete(f.docs, d.Key)
	default:
		f.revision++
		f.docs[d.Key] = engine.StoredDocument{Table: d.Table, Key: d.Key, Value: bytes.Clone(d.Value), Revision: f.revision}
	}
	for _, ch := range f.watches[usersTable] {
		signal(ch)
	}
	return r
}

func (f *fakeBackend) Propose(ctx context.Context, p raft.Proposal) (raft.Reply, error) {
	type outcome struct {
		r   raft.Reply
		err error
	}
	ch := make(chan outcome, 1)
	f.Submit(p, func(r raft.Reply, err error) { ch <- outcome{r, err} })
	select {
	case o := <-ch:
		return o.r, o.err
	case <-ctx.Done():
		return raft.Reply{}, errs.Of(errs.OutcomeUnknown)
	}
}

func (f *fakeBackend) Query(ctx context.Context, q engine.Query) (engine.Answer, error) {
	if q.Wait > 0 {
		ctx, cancel := context.WithTimeout(ctx, q.Wait)
		defer cancel()
		<-ctx.Done()
		return engine.Answer{Stream: &engine.StreamAnswer{}}, nil
	}
	if q.Kind == engine.QueryDocuments {
		f.mu.Lock()
		defer f.mu.Unlock()
		var a engine.Answer
		for k, d := range f.docs {
			if q.Key == "" || q.Key == k {
				a.Documents = append(a.Documents, d)
			}
		}
		return a, nil
	}
	f.mu.Lock()
	query := f.query
	f.mu.Unlock()
	if query == nil {
		return engine.Answer{Stream: &engine.StreamAnswer{}}, nil
	}
	return query(q)
}

func (f *fakeBackend) StaleQuery(q engine.Query) (engine.Answer, error) {
	return f.Query(context.Background(), q)
}

func (f *fakeBackend) Secret() []byte { return []byte("a secret of tests") }

func (f *fakeBackend) Watch(_ raft.WatchKind, name string) (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.watches[name] = append(f.watches[name], ch)
	return ch, func() {}
}

func (f *fakeBackend) Leading() (uint64, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return 3, f.leading
}

func (f *fakeBackend) Status() raft.Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

// logWriter hands a server's log to its test.
type logWriter struct{ t testing.TB }

func (w logWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", bytes.TrimRight(p, "\n"))
	return len(p), nil
}

// start runs a server on a free port of 127.0.0.1 until the test ends.
func start(t testing.TB, o Options) (*Server, string) {
	t.Helper()
	if o.Backend == nil {
		o.Backend = newFake()
	}
	if o.Logger == nil {
		o.Logger = hclog.New(&hclog.LoggerOptions{Output: logWriter{t}, Level: hclog.Error})
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return s, l.Addr().String()
}

// client is a connection of a test.
type client struct {
	t  testing.TB
	nc net.Conn
	r  *bufio.Reader
}

func dial(t testing.TB, addr string) *client {
	t.Helper()
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	// No test waits for ever.
	nc.SetDeadline(time.Now().Add(2 * time.Minute))
	return &client{t, nc, bufio.NewReader(nc)}
}

func encodeCommand(words ...string) []byte {
	var b []byte
	b = fmt.Appendf(b, "*%d\r\n", len(words))
	for _, w := range words {
		b = fmt.Appendf(b, "$%d\r\n%s\r\n", len(w), w)
	}
	return b
}

func (c *client) send(words ...string) {
	c.t.Helper()
	c.raw(string(encodeCommand(words...)))
}

func (c *client) raw(s string) {
	c.t.Helper()
	if _, err := io.WriteString(c.nc, s); err != nil {
		c.t.Fatalf("write: %v", err)
	}
}

// reply reads one reply as it is on the wire, with a | for each CR LF.
func (c *client) reply() string {
	c.t.Helper()
	s, err := readReply(c.r)
	if err != nil {
		c.t.Fatalf("reading a reply: %v (so far %q)", err, s)
	}
	return strings.TrimSuffix(strings.ReplaceAll(s, "\r\n", "|"), "|")
}

func readReply(r *bufio.Reader) (string, error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return line, err
	}
	n, _ := strconv.Atoi(strings.TrimSpace(line[1:]))
	switch line[0] {
	case '$', '=':
		if n < 0 {
			return line, nil
		}
		b := make([]byte, n+2)
		_, err := io.ReadFull(r, b)
		return line + string(b), err
	case '%', '|':
		n *= 2
		fallthrough
	case '*', '~', '>':
		all := line
		if line[0] == '|' {
			n++
		}
		for range n {
			s, err := readReply(r)
			all += s
			if err != nil {
				return all, err
			}
		}
		return all, nil
	}
	return line, nil
}

// do sends a command and returns its reply.
func (c *client) do(words ...string) string {
	c.t.Helper()
	c.send(words...)
	return c.reply()
}

// want sends a line of words and checks the reply.
func (c *client) want(line, want string) {
	c.t.Helper()
	if got := c.do(strings.Fields(line)...); got != want {
		c.t.Errorf("%s\n got %s\nwant %s", line, got, want)
	}
}

// closed checks that the server closes the connection, after the given rest of output.
func (c *client) closed(rest string) {
	c.t.Helper()
	got, err := io.ReadAll(c.r)
	if s := strings.ReplaceAll(string(got), "\r\n", "|"); err != nil || s != rest {
		c.t.Errorf("until the end: %q, %v; want %q", s, err, rest)
	}
}
