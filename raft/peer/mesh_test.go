package peer

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// pair starts two nodes that know each other; b serves shard 7 with h.
func pair(t *testing.T, h Handler, change ...func(*Options)) (a, b *node) {
	a, b = prepare(t, "n1.aa", change...), prepare(t, "n2.bb", change...)
	if h != nil {
		b.Bind(7, h)
	}
	a.Start()
	b.Start()
	a.SetPeers(table(a, b))
	b.SetPeers(table(a, b))
	return a, b
}

func (n *node) conn(t *testing.T, id ID, p Purpose) *Conn {
	t.Helper()
	l, err := n.Link(id, p)
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.Conn(patient(t))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestRequestsArriveInOrderAndAnswersInAny(t *testing.T) {
	const count = 500
	var held []*Request
	a, b := pair(t, handlerFunc(func(r *Request) {
		held = append(held, r)
		if want := fmt.Sprint(len(held) - 1); string(r.Body) != want {
			r.Fail(CodeFailed, fmt.Sprintf("request %s came as number %s", r.Body, want))
			return
		}
		if len(held) == count {
			for _, i := range rand.Perm(count) {
				held[i].Reply([]byte("re "), held[i].Body)
			}
		}
	}))
	c := a.conn(t, b.ID(), Data)
	if r := c.Remote(); r.ID != b.ID() || r.Zone != "zone-n2" || r.Cluster != "c1" || r.Version != VersionNewest {
		t.Errorf("remote %+v", r)
	}
	var wg sync.WaitGroup
	for i := range count {
		wg.Add(1)
		c.Go(KindUser, 7, [][]byte{fmt.Append(nil, i)}, func(reply []byte, err error) {
			defer wg.Done()
			if err != nil || string(reply) != fmt.Sprintf("re %d", i) {
				t.Errorf("request %d: %q, %v", i, reply, err)
			}
		})
	}
	wg.Wait()
}

func TestUnboundShardAndErrorsReachTheAsker(t *testing.T) {
	a, b := pair(t, handlerFunc(func(r *Request) {
		r.Fail(CodeFailed, "no such thing")
		r.Reply([]byte("too late"))
	}))
	c := a.conn(t, b.ID(), Control)
	var remote *RemoteError
	if _, err := c.Call(patient(t), KindUser, 8); !errors.As(err, &remote) || remote.Code != CodeUnbound {
		t.Errorf("unbound shard: %v", err)
	}
	if _, err := c.Call(patient(t), KindUser, 7); !errors.As(err, &remote) || remote.Code != CodeFailed || remote.Text != "no such thing" {
		t.Errorf("failed request: %v", err)
	}
}

func TestReplyTooLargeIsAnError(t *testing.T) {
	a, b := pair(t, handlerFunc(func(r *Request) { r.Reply(make([]byte, bodyMax+1)) }))
	var remote *RemoteError
	if _, err := a.conn(t, b.ID(), Data).Call(patient(t), KindUser, 7); !errors.As(err, &remote) {
		t.Errorf("got %v", err)
	}
}

// TestHandshakeRefusals goes through every mismatch in both directions: who may not be talked to is told why, and both
// sides have it in their logs.
func TestHandshakeRefusals(t *testing.T) {
	tests := []struct {
		name string
		// a dials b. knows is what b's table has, dials the identity a believes b to have.
		a, b     func(*Options)
		dials    ID
		knows    ID
		want     RefusedCode
		byRemote bool
	}{
		{"another cluster", nil, func(o *Options) { o.Cluster = "c2" }, "n2.bb", "n1.aa", RefusedCluster, true},
		{"another node at the address", nil, nil, "n2.cc", "n1.aa", RefusedTarget, true},
		{"wiped node under its old name", nil, nil, "n2.bb", "n1.old", RefusedIdentity, true},
		{"stranger before formation", func(o *Options) { o.Cluster = "" }, func(o *Options) { o.Cluster = "" }, "n2.bb", "n3.cc", RefusedIdentity, true},
		{"stranger without a cluster", func(o *Options) { o.Cluster = "" }, nil, "n2.bb", "n3.cc", RefusedIdentity, true},
		{"not wanted by policy", nil, func(o *Options) {
			o.Admit = func(h Hello, _ tlsState) error { return fmt.Errorf("certificate is not %s's", h.ID) }
		}, "n2.bb", "n1.aa", RefusedPolicy, true},
		{"answer not wanted by policy", func(o *Options) {
			o.Admit = func(h Hello, _ tlsState) error { return fmt.Errorf("certificate is not %s's", h.ID) }
		}, nil, "n2.bb", "n1.aa", RefusedPolicy, false},
		{"this node itself", func(o *Options) { o.ID = "n2.bb" }, nil, "n2.bb", "n3.cc", RefusedIdentity, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			change := func(f func(*Options)) func(*Options) {
				if f == nil {
					return func(*Options) {}
				}
				return f
			}
			a, b := start(t, "n1.aa", change(tt.a)), start(t, "n2.bb", change(tt.b))
			b.SetPeers(map[ID]string{tt.knows: "127.0.0.1:1"})
			_, err := a.dial(patient(t), tt.dials, b.Addr().String(), Data)
			var refused *RefusedError
			if !errors.As(err, &refused) || refused.Code != tt.want || refused.ByRemote != tt.byRemote {
				t.Fatalf("got %v", err)
			}
			b.log.await(t, "("+tt.want.String()+")")
			if classify(err) != Rejected {
				t.Errorf("classified as %s", classify(err))
			}
		})
	}
}

// TestRefusalBecomesEvidence: a link that is refused says so, with the other side's reason, and logs it once.
func TestRefusalBecomesEvidence(t *testing.T) {
	a := start(t, "n1.aa")
	b := start(t, "n2.bb", func(o *Options) { o.Cluster = "c2" })
	a.SetPeers(table(b))
	for range 3 {
		e := a.awaitEvent(t, Rejected, Data)
		var refused *RefusedError
		if !errors.As(e.Err, &refused) || refused.Code != RefusedCluster {
			t.Fatalf("event %+v", e)
		}
	}
	if n := strings.Count(a.log.text.String(), "purpose=data evidence=rejected"); n > 1 {
		t.Errorf("logged %d times", n)
	}
}

// TestClusterBecomesKnown: nodes that know each other talk while one of them has not learnt the cluster's id.
func TestClusterBecomesKnown(t *testing.T) {
	a := start(t, "n1.aa")
	b := start(t, "n2.bb", func(o *Options) { o.Cluster = "" })
	a.SetPeers(table(a, b))
	b.SetPeers(table(a, b))
	a.conn(t, b.ID(), Data)
	b.conn(t, a.ID(), Data)
	b.SetCluster("c2")
	if _, err := a.dial(patient(t), b.ID(), b.Addr().String(), Data); err == nil {
		t.Error("connected across clusters")
	}
	b.SetCluster("c1")
	b.SetPeers(nil) // a member the other one does not know yet, of the same cluster
	if _, err := a.dial(patient(t), b.ID(), b.Addr().String(), Data); err != nil {
		t.Error(err)
	}
}

// tamper answers a handshake as a node that is not what was dialled, which only the dialling side can notice.
func tamper(t *testing.T, answer Hello) (address string, refusal <-chan *RefusedError) {
	l := listen(t)
	t.Cleanup(func() { _ = l.Close() })
	got := make(chan *RefusedError, 1)
	done := make(chan struct{})
	t.Cleanup(func() { <-done })
	go func() {
		defer close(done)
		nc, err := l.Accept()
		if err != nil {
			return
		}
		defer func() { _ = nc.Close() }()
		r := bufio.NewReader(nc)
		if _, err := readFrame(r, helloMax); err != nil {
			return
		}
		if err := writeFrame(nc, kindHello, answer.encode()); err != nil {
			return
		}
		f, err := readFrame(r, helloMax)
		if err != nil || f.kind != kindRefuse {
			got <- nil
			return
		}
		e, _ := decodeRefusal(f.body)
		got <- e
	}()
	return l.Addr().String(), got
}

func TestDiallerRefusesToo(t *testing.T) {
	good := Hello{Newest: 1, Oldest: 1, Purpose: Data, Cluster: "c1", ID: "n2.bb", Zone: "b", Target: "n1.aa"}
	for name, tt := range map[string]struct {
		change func(*Hello)
		want   RefusedCode
	}{
		"identity": {func(h *Hello) { h.ID = "n2.cc" }, RefusedTarget},
		"cluster":  {func(h *Hello) { h.Cluster = "c2" }, RefusedCluster},
		"version":  {func(h *Hello) { h.Newest, h.Oldest = 9, 9 }, RefusedVersion},
	} {
		t.Run(name, func(t *testing.T) {
			h := good
			tt.change(&h)
			address, refusal := tamper(t, h)
			a := start(t, "n1.aa")
			_, err := a.dial(patient(t), "n2.bb", address, Data)
			var refused *RefusedError
			if !errors.As(err, &refused) || refused.Code != tt.want || refused.ByRemote {
				t.Fatalf("got %v", err)
			}
			if got := <-refusal; got == nil || got.Code != tt.want || !got.ByRemote {
				t.Errorf("the other side was told %v", got)
			}
		})
	}
}

func TestVersionIsNegotiated(t *testing.T) {
	for _, tt := range []struct {
		newest, oldest uint16
		want           uint16
		ok             bool
	}{
		{VersionNewest, VersionOldest, VersionNewest, true},
		{VersionNewest + 1, VersionOldest, VersionNewest, true},
		{VersionNewest + 2, VersionNewest + 1, 0, false},
		{VersionOldest - 1, 0, 0, false},
		{VersionOldest, VersionOldest + 1, 0, false},
	} {
		v, refused := negotiate(tt.newest, tt.oldest)
		if v != tt.want || (refused == nil) != tt.ok {
			t.Errorf("%d to %d: %d, %v", tt.oldest, tt.newest, v, refused)
		}
	}
}

// raw connects as n1.aa to a node, behind the handshake, and returns the naked connection.
func raw(t *testing.T, n *node, p Purpose) net.Conn {
	t.Helper()
	nc, err := net.Dial("tcp", n.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nc.Close() })
	h := Hello{Newest: 1, Oldest: 1, Purpose: p, Cluster: "c1", ID: "n1.aa", Zone: "a", Target: n.ID()}
	if err := writeFrame(nc, kindHello, h.encode()); err != nil {
		t.Fatal(err)
	}
	if f, err := readFrame(bufio.NewReader(nc), helloMax); err != nil || f.kind != kindHello {
		t.Fatalf("handshake: %+v, %v", f, err)
	}
	return nc
}

// closedBy waits until the other side has hung up.
func closedBy(t *testing.T, nc net.Conn) {
	t.Helper()
	_ = nc.SetReadDeadline(time.Now().Add(patience))
	for b := make([]byte, 4096); ; {
		if _, err := nc.Read(b); err != nil {
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				t.Fatal("the connection stays open")
			}
			return
		}
	}
}

// TestBadFramesCloseOneConnection: garbage ends the connection it came on; the node and its other connections go on.
func TestBadFramesCloseOneConnection(t *testing.T) {
	served := make(chan string, 64)
	a, b := pair(t, handlerFunc(func(r *Request) {
		served <- string(r.Body)
		r.Reply(r.Body)
	}))
	good := encodeFrame(t, KindUser, 0, 7, 1, []byte("good"))
	damaged := bytes.Clone(good)
	damaged[len(damaged)-1] ^= 1
	oversize := bytes.Clone(good)
	binary.LittleEndian.PutUint32(oversize, bodyMax+1)
	for name, bad := range map[string][]byte{
		"damaged body":     damaged,
		"oversize":         oversize,
		"answer to nobody": encodeFrame(t, KindUser, flagReply, 7, 1, []byte("bad")),
		"unknown flags":    encodeFrame(t, KindUser, 0x80, 7, 1, []byte("bad")),
		"reserved kind":    encodeFrame(t, 9, 0, 7, 1, []byte("bad")),
		"second handshake": encodeFrame(t, kindHello, 0, 0, 0, []byte("bad")),
		"http":             []byte("GET / HTTP/1.1\r\nHost: example.com\r\n\r\n"),
		"bad refusal":      encodeFrame(t, kindRefuse, 0, 0, 0),
	} {
		t.Run(name, func(t *testing.T) {
			nc := raw(t, b, Data)
			if _, err := nc.Write(append(bytes.Clone(good), bad...)); err != nil {
				t.Fatal(err)
			}
			closedBy(t, nc)
			if got := <-served; got != "good" {
				t.Errorf("served %q", got)
			}
			if reply, err := a.conn(t, b.ID(), Data).Call(patient(t), KindUser, 7, []byte("good")); err != nil || string(reply) != "good" {
				t.Errorf("other connection: %q, %v", reply, err)
			}
			if got := <-served; got != "good" {
				t.Errorf("served %q", got)
			}
		})
	}
	if len(served) != 0 {
		t.Errorf("served %q", <-served)
	}
}

// TestGarbageBeforeTheHandshake: who does not begin with a handshake is told so and gets nothing else.
func TestGarbageBeforeTheHandshake(t *testing.T) {
	b := start(t, "n2.bb")
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 1))
	for i := range 50 {
		nc, err := net.Dial("tcp", b.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		junk := make([]byte, headerSize+rng.IntN(2*helloMax))
		for i := range junk {
			junk[i] = byte(rng.Uint32())
		}
		if i%2 == 0 {
			// A well-formed frame with garbage in it.
			junk = encodeFrame(t, kindHello, 0, 0, 0, junk[:rng.IntN(len(junk))])
		}
		_, _ = nc.Write(junk)
		closedBy(t, nc)
		_ = nc.Close()
	}
	b.log.await(t, "(protocol)")
}

func TestSessionsAreBounded(t *testing.T) {
	b := start(t, "n2.bb", func(o *Options) { o.SessionsMax = 2 })
	first, second := raw(t, b, Data), raw(t, b, Control)
	third, err := net.Dial("tcp", b.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = third.Close() }()
	closedBy(t, third)
	_ = first.Close()
	_ = second.Close()
	a := start(t, "n1.aa")
	a.SetPeers(table(b))
	a.conn(t, b.ID(), Control) // room again
}

// TestEvidence: what a link reports when the process dies, and when it returns.
func TestEvidence(t *testing.T) {
	a, b := prepare(t, "n1.aa"), prepare(t, "n2.bb")
	address := b.Addr().String()
	a.Start()
	b.Start()
	a.SetPeers(table(b))
	if e := a.awaitEvent(t, Up, Control); e.Redial || e.Peer != b.ID() || e.Address != address {
		t.Errorf("event %+v", e)
	}
	if !a.Connected(b.ID()) {
		t.Error("not connected")
	}
	heard := a.LastHeard(b.ID())
	if heard.IsZero() || time.Since(heard) > patience {
		t.Errorf("last heard %s", heard)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	a.awaitEvent(t, Lost, Control)
	if e := a.awaitEvent(t, PortRefused, Control); !e.Redial {
		t.Errorf("event %+v", e)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	c := start(t, "n2.bb", func(o *Options) { o.Listener = l })
	if e := a.awaitEvent(t, Up, Control); !e.Redial || e.Peer != c.ID() {
		t.Errorf("event %+v", e)
	}
	if !a.LastHeard(b.ID()).After(heard) {
		t.Error("not heard again")
	}
}

// TestSilenceIsATimeout: a machine that takes connections and says nothing, and a process that stops in the middle.
func TestSilenceIsATimeout(t *testing.T) {
	mute := listen(t)
	defer func() { _ = mute.Close() }()
	a := start(t, "n1.aa", func(o *Options) { o.HandshakeTimeout = 20 * time.Millisecond })
	a.SetPeers(map[ID]string{"n2.bb": mute.Addr().String()})
	a.awaitEvent(t, TimedOut, Data)

	b := start(t, "n3.cc", func(o *Options) { o.Silence, o.KeepAlive = 50*time.Millisecond, 10*time.Millisecond })
	nc := raw(t, b, Data) // never answers, never asks
	closedBy(t, nc)
	b.log.await(t, errSilent.Error())
}

// TestKeepAlive: an idle connection whose other end lives is kept.
func TestKeepAlive(t *testing.T) {
	a, b := pair(t, handlerFunc(func(r *Request) { r.Reply() }), func(o *Options) {
		o.Silence, o.KeepAlive = patience, 5*time.Millisecond
	})
	c := a.conn(t, b.ID(), Data)
	at := a.LastHeard(b.ID())
	for range 3 { // three signs of life without any request
		deadline := time.Now().Add(patience)
		for !a.LastHeard(b.ID()).After(at) {
			if time.Now().After(deadline) {
				t.Fatal("no sign of life")
			}
			select {
			case <-c.Done():
				t.Fatal(c.Err())
			case <-time.After(time.Millisecond):
			}
		}
		at = a.LastHeard(b.ID())
	}
	if _, err := c.Call(patient(t), KindUser, 7); err != nil {
		t.Error(err)
	}
}

// TestLostConnectionFailsItsRequests: whoever waits learns that the request may have arrived.
func TestLostConnectionFailsItsRequests(t *testing.T) {
	arrived := make(chan *Request, 1)
	a, b := pair(t, handlerFunc(func(r *Request) { arrived <- r }))
	c := a.conn(t, b.ID(), Data)
	got := make(chan error, 1)
	c.Go(KindUser, 7, nil, func(_ []byte, err error) { got <- err })
	r := <-arrived
	r.Session.Close(errors.New("for the test"))
	var lost *ConnError
	if err := <-got; !errors.As(err, &lost) || !lost.Sent || lost.Peer != b.ID() {
		t.Errorf("got %v", err)
	}
	r.Reply([]byte("into the void"))
	c.Go(KindUser, 7, nil, func(_ []byte, err error) { got <- err })
	if err := <-got; !errors.As(err, &lost) || lost.Sent {
		t.Errorf("after the end: %v", err)
	}
	a.conn(t, b.ID(), Data) // the link has a new one
}

func TestRemovedPeer(t *testing.T) {
	a, b := pair(t, nil)
	l, err := a.Link(b.ID(), Data)
	if err != nil {
		t.Fatal(err)
	}
	c := a.conn(t, b.ID(), Data)
	a.SetPeers(nil)
	<-c.Done()
	for err == nil {
		_, err = l.Conn(patient(t))
	}
	if !errors.Is(err, ErrRemoved) {
		t.Errorf("link: %v", err)
	}
	if _, err := a.Link("n9.zz", Data); !errors.Is(err, ErrUnknownPeer) {
		t.Errorf("unknown: %v", err)
	}
	a.SetPeers(table(b))
	a.conn(t, b.ID(), Data)
	if peers := a.Peers(); len(peers) != 1 || peers[b.ID()] != b.Addr().String() {
		t.Errorf("table %v", peers)
	}
}

func TestNoConnectionNothingSent(t *testing.T) {
	l := listen(t)
	address := l.Addr().String()
	_ = l.Close()
	a := start(t, "n1.aa")
	a.SetPeers(map[ID]string{"n2.bb": address})
	a.awaitEvent(t, PortRefused, Data)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := a.Call(ctx, "n2.bb", KindUser)
	var lost *ConnError
	if !errors.As(err, &lost) || lost.Sent {
		t.Errorf("got %v", err)
	}
}

// TestSnapshotHoldsTheSenderBack: a handler that blocks on a snapshot connection stops its sender, not the node.
func TestSnapshotHoldsTheSenderBack(t *testing.T) {
	gate := make(chan struct{})
	got := 0
	finished := make(chan int, 1)
	a, b := pair(t, handlerFunc(func(r *Request) {
		switch {
		case r.Session.Purpose() != Snapshot:
			r.Reply()
		case len(r.Body) == 0:
			finished <- got
			r.Reply()
		default:
			<-gate
			got += len(r.Body)
		}
	}), func(o *Options) { o.Silence, o.KeepAlive = time.Second, 10*time.Millisecond })
	c, err := a.Dial(patient(t), b.ID(), Snapshot)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const parts, size = 256, 64 << 10
	sent := make(chan error, 1)
	go func() {
		for range parts {
			if err := c.Stream(KindUser, 7, 1, [][]byte{make([]byte, size)}, 2*size); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	if _, err := a.conn(t, b.ID(), Control).Call(patient(t), KindUser, 7); err != nil {
		t.Errorf("control beside a blocked snapshot: %v", err)
	}
	select {
	case err := <-sent:
		t.Fatalf("16 MiB went through a closed gate: %v", err)
	default:
	}
	close(gate)
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if _, err := c.Call(patient(t), KindUser, 7); err != nil {
		t.Fatal(err)
	}
	if n := <-finished; n != parts*size {
		t.Errorf("%d bytes of %d arrived", n, parts*size)
	}
}

func TestCloseEndsEverything(t *testing.T) {
	a, b := pair(t, handlerFunc(func(*Request) {}))
	c := a.conn(t, b.ID(), Data)
	got := make(chan error, 2)
	c.Go(KindUser, 7, nil, func(_ []byte, err error) { got <- err })
	go func() {
		l, err := a.Link(b.ID(), Forward)
		if err == nil {
			_, err = l.Conn(context.Background())
			for err == nil {
				_, err = l.Conn(context.Background())
			}
		}
		got <- err
	}()
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	<-got
	<-got
	if _, err := a.Link(b.ID(), Data); !errors.Is(err, ErrClosed) {
		t.Errorf("got %v", err)
	}
	if err := a.Close(); err != nil {
		t.Errorf("again: %v", err)
	}
}

// A node that is gone is warned of once, however many connections there were to it, and once again when it is gone a
// second time.
func TestOutageIsWarnedOfOnce(t *testing.T) {
	a, b := pair(t, nil)
	address := b.Addr().String()
	both := func(kind EventKind) {
		t.Helper()
		seen := make(map[Purpose]bool)
		for timeout := time.After(patience); !seen[Control] || !seen[Data]; {
			select {
			case e := <-a.events:
				seen[e.Purpose] = seen[e.Purpose] || e.Kind == kind
			case <-timeout:
				t.Fatalf("not %s on both connections:\n%s", kind, a.log.String())
			}
		}
	}
	warnings := func() int { return strings.Count(a.log.String(), "[WARN]") }
	for round := 1; round <= 2; round++ {
		both(Up)
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		both(PortRefused)
		if n := warnings(); n != round {
			t.Fatalf("outage %d: %d warnings:\n%s", round, n, a.log.String())
		}
		if round == 1 {
			b = start(t, b.ID(), func(o *Options) {
				var err error
				if o.Listener, err = net.Listen("tcp", address); err != nil {
					t.Fatal(err)
				}
			})
			b.SetPeers(table(a, b))
		}
	}
}
