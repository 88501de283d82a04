package bench

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"tercet.dev/tercet/compat/resp"
	"tercet.dev/tercet/internal/errs"
)

// streamServer is as much of a RESP server as the driver uses.
type streamServer struct {
	t  *testing.T
	mu sync.Mutex
	// entries are the bodies by stream, given the number of them handed out by stream and group.
	entries map[string][][]byte
	given   map[string]int
	acked   map[string]bool
	// replicas is what WAIT answers; refuse makes XADD fail.
	replicas int
	refuse   string
	// hangUpAfter ends each connection after so many commands.
	hangUpAfter int
}

func serveStreams(t *testing.T) (*streamServer, string) {
	t.Helper()
	s := &streamServer{t: t, entries: map[string][][]byte{}, given: map[string]int{}, acked: map[string]bool{}, replicas: 2}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			served.Go(func() { defer c.Close(); s.serve(c) })
		}
	})
	t.Cleanup(func() { l.Close(); served.Wait() })
	return s, l.Addr().String()
}

func (s *streamServer) serve(c net.Conn) {
	r := bufio.NewReader(c)
	var scratch []byte
	for n := 0; ; n++ {
		v, err := readRESP(r, &scratch)
		if err != nil {
			return
		}
		var args []string
		for _, a := range v.items {
			args = append(args, string(a.data))
		}
		s.mu.Lock()
		reply, last := s.answer(args), s.hangUpAfter
		s.mu.Unlock()
		if last > 0 && n >= last {
			return
		}
		if _, err := io.WriteString(c, reply); err != nil {
			return
		}
	}
}

func bulk(s string) string { return fmt.Sprintf("$%d\r\n%s\r\n", len(s), s) }

func (s *streamServer) answer(args []string) string {
	switch args[0] {
	case "XADD":
		if s.refuse != "" {
			return "-" + s.refuse + "\r\n"
		}
		s.entries[args[1]] = append(s.entries[args[1]], []byte(args[4]))
		return bulk(strconv.Itoa(len(s.entries[args[1]])) + "-0")
	case "WAIT":
		return fmt.Sprintf(":%d\r\n", s.replicas)
	case "XGROUP":
		if _, ok := s.given[args[2]+"/"+args[3]]; ok {
			return "-BUSYGROUP Consumer Group name already exists\r\n"
		}
		s.given[args[2]+"/"+args[3]] = 0
		return "+OK\r\n"
	case "XREADGROUP":
		key, group := args[9], args[2]
		from := s.given[key+"/"+group]
		count, err := strconv.Atoi(args[5])
		to := min(len(s.entries[key]), from+count)
		if err != nil || from == to {
			return "*-1\r\n"
		}
		s.given[key+"/"+group] = to
		out := fmt.Sprintf("*1\r\n*2\r\n%s*%d\r\n", bulk(key), to-from)
		for i := from; i < to; i++ {
			out += "*2\r\n" + bulk(strconv.Itoa(i+1)+"-0") + "*2\r\n" + bulk(args[1]) + bulk(string(s.entries[key][i]))
		}
		return out
	case "XACK":
		for _, id := range args[3:] {
			s.acked[args[1]+"/"+args[2]+"/"+id] = true
		}
		return fmt.Sprintf(":%d\r\n", len(args)-3)
	}
	s.t.Errorf("command %q", args)
	return "-ERR unknown\r\n"
}

func respWorkload() Workload {
	return Workload{
		Topic: "s", Publishers: 2, Size: 64, Batch: 1, Messages: 300, Retention: time.Minute,
		Consumers: 2, Group: "g", Groups: 2, ReceiveMax: 10,
	}
}

func TestRESPRoundTrip(t *testing.T) {
	for name, change := range map[string]func(w *Workload){
		"single": func(*Workload) {}, "batch": func(w *Workload) { w.Batch, w.Timed = 5, true },
		"window": func(w *Workload) { w.Window = 20 },
		"window-batch": func(w *Workload) {
			w.Window, w.Batch, w.Timed, w.Topics, w.Consumers = 20, 3, true, 2, 4
		},
	} {
		for _, wait := range []int{0, 2} {
			t.Run(fmt.Sprint(name, wait), func(t *testing.T) {
				s, addr := serveStreams(t)
				w := respWorkload()
				change(&w)
				d := &RESPDriver{Addrs: []string{addr}, Workload: w, WaitReplicas: wait}
				if err := d.Prepare(); err != nil {
					t.Fatal(err)
				}
				seen := map[string]int{}
				var mu sync.Mutex
				r, err := Run(t.Context(), w, d, Hooks{Received: func(_ int, body []byte) {
					mu.Lock()
					defer mu.Unlock()
					seen[string(body)]++
				}})
				if err != nil {
					t.Fatal(err)
				}
				if len(r.Failed) > 0 || r.Messages < 300 || r.Received != 2*r.Messages || r.Acknowledged != 2*r.Messages {
					t.Errorf("%+v", r)
				}
				zones := -1
				if wait > 0 {
					zones = 3
				}
				if r.Zones[zones] != r.Requests || r.Bytes != 64*r.Messages {
					t.Errorf("zones %v of %d requests, %d bytes", r.Zones, r.Requests, r.Bytes)
				}
				if w.Timed && r.EndToEnd.Count() != r.Received {
					t.Errorf("%d times", r.EndToEnd.Count())
				}
				stored := 0
				for key, entries := range s.entries {
					stored += len(entries)
					for _, e := range entries {
						if seen[string(e)] < 2 || len(e) != 64 {
							t.Errorf("%s: %.40q came %d times", key, e, seen[string(e)])
						}
					}
				}
				if int64(stored) != r.Messages || int64(len(s.acked)) != r.Acknowledged {
					t.Errorf("%d stored, %d published; %d acknowledged", stored, r.Messages, len(s.acked))
				}
			})
		}
	}
}

func TestRESPFailures(t *testing.T) {
	s, addr := serveStreams(t)
	w := respWorkload()
	d := &RESPDriver{Addrs: []string{addr}, Workload: w, WaitReplicas: 2}
	if err := d.Prepare(); err != nil {
		t.Fatal(err)
	}
	p, err := d.Publisher(0)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	try := func(want errs.Code) {
		t.Helper()
		if _, err := p.Publish(t.Context(), time.Now()); errs.CodeOf(err) != want {
			t.Errorf("got %v, want %v", err, want)
		}
	}
	set := func(f func()) { s.mu.Lock(); defer s.mu.Unlock(); f() }
	set(func() { s.replicas = 1 })
	try(errs.OutcomeUnknown)
	set(func() { s.replicas, s.refuse = 2, "OOM command not allowed" })
	try(errs.Overloaded)
	set(func() { s.refuse = "" })
	if ack, err := p.Publish(t.Context(), time.Now()); err != nil || ack.Zones != 3 || ack.Messages != 1 {
		t.Errorf("afterwards: %+v, %v", ack, err)
	}
	set(func() { s.hangUpAfter = 1 })
	try(errs.OutcomeUnknown)

	// What a broken connection leaves unanswered ends with an error, and the next requests have a new one.
	set(func() { s.hangUpAfter = 7 })
	q, err := d.Publisher(1)
	if err != nil {
		t.Fatal(err)
	}
	outcomes := make(chan error, 100)
	for range 20 {
		if err := q.(Pipeline).Send(t.Context(), time.Now(), func(_ Ack, err error) { outcomes <- err }); err != nil {
			outcomes <- err
		}
	}
	ok, bad := 0, 0
	for range 20 {
		if err := <-outcomes; err == nil {
			ok++
		} else {
			bad++
		}
	}
	if ok < 3 || bad < 1 {
		t.Errorf("%d answered, %d not", ok, bad)
	}
	q.Close()
}

func TestReadRESP(t *testing.T) {
	var scratch []byte
	read := func(text string) (respValue, error) {
		return readRESP(bufio.NewReader(strings.NewReader(text)), &scratch)
	}
	v, err := read("*4\r\n$3\r\nabc\r\n:-5\r\n$-1\r\n*2\r\n+OK\r\n$0\r\n\r\n")
	if err != nil {
		t.Fatal(err)
	}
	if string(v.items[0].data) != "abc" || v.items[1].n != -5 || !v.items[2].null || string(v.items[3].items[0].data) != "OK" || len(v.items[3].items[1].data) != 0 {
		t.Errorf("%+v", v)
	}
	for _, bad := range []string{
		"", "x\r\n", "+OK\n", "$5\r\nabc\r\n", "$3\r\nabcd\r\n", "*-2\r\n", ":x\r\n", "$99999999999\r\n", "*99999999\r\n",
		strings.Repeat("*1\r\n", 100) + ":1\r\n",
	} {
		if v, err := read(bad); err == nil {
			t.Errorf("%q was read as %+v", bad, v)
		}
	}
	if v, err := read("-ERR no\r\n"); err != nil || !strings.Contains(v.failure().Error(), "ERR no") {
		t.Errorf("%+v, %v", v, err)
	}
	if err := (&RESPDriver{}).Prepare(); err == nil {
		t.Error("a driver without addresses")
	}
	if err := (&RESPDriver{Addrs: []string{"x"}, Workload: Workload{AllZones: true}}).Prepare(); err == nil {
		t.Error("a durability that the protocol does not have was accepted")
	}
}

func FuzzReadRESP(f *testing.F) {
	f.Add([]byte("*2\r\n$3\r\nabc\r\n:5\r\n"))
	f.Add([]byte("-ERR x\r\n"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		var scratch []byte
		_, _ = readRESP(bufio.NewReader(bytes.NewReader(b)), &scratch) // must not panic
	})
}

// BenchmarkReadRESP reads the replies to a window of XADDs, as the load generator does.
func BenchmarkReadRESP(b *testing.B) {
	var replies []byte
	for range 64 {
		replies = append(replies, "$15\r\n1700000000000-0\r\n"...)
	}
	source := bytes.NewReader(replies)
	r := bufio.NewReaderSize(source, 64<<10)
	var scratch []byte
	b.ReportAllocs()
	b.SetBytes(int64(len(replies)))
	for b.Loop() {
		source.Reset(replies)
		r.Reset(source)
		for range 64 {
			if _, err := readRESP(r, &scratch); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// BenchmarkParseCommand parses a pipeline of XADDs of 1 KiB, as the front end does.
func BenchmarkParseCommand(b *testing.B) {
	const commands = 64
	body := newBodies(1).next(1024)
	var pipeline []byte
	for range commands {
		pipeline = appendBulk(appendCommand(pipeline, "XADD", "stream", "*", respField), body)
	}
	source := bytes.NewReader(pipeline)
	b.ReportAllocs()
	b.SetBytes(int64(len(pipeline)))
	r := resp.NewReader(source, nil)
	for b.Loop() {
		source.Reset(pipeline)
		for range commands {
			if args, err := r.Next(); err != nil || len(args) != 5 {
				b.Fatal(args, err)
			}
		}
	}
}
