package engine

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
	"github.com/cockroachdb/pebble/v2/vfs"

	"tercet.dev/tercet/internal/errs"
)

// TestScenarios runs the files of testdata/scenarios: commands and everything they give.
//
//	open [unsettled=N] [recent=N] [log=BYTES]   a new engine
//	apply [+DURATION] [wall=DURATION] [intake=N lowest=N]
//	    one entry; a line per command, "N:" before it is its number in the intake
//	    publish TOPIC BODY… [retention=D] [delay=D] [key=K] [deployment=X]
//	    receive TOPIC GROUP [max=N] [vis=D] [conc=N] [latest] [park]
//	    byid TOPIC GROUP INDEX.POS [vis=D] [conc=N]
//	    ack|release TOPIC GROUP OFFSET@EPOCH…    extend … vis=D
//	    init ID | intake NODE NONCE | tick | shrink NODE EPOCH | expand NODE EPOCH | advance D | level N
//	config NODE…            a configuration; NODE- is a non-voter
//	checkpoint              restart: lose the memory and replay the log from the last checkpoint
//	crash                   the same, keeping of the disk only what was synced
//	park|due|peek|group|topic|browse|groups|topics|in-sync|state|rows
func TestScenarios(t *testing.T) {
	datadriven.Walk(t, "testdata/scenarios", func(t *testing.T, path string) {
		s := &scenario{}
		defer s.close()
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			s.t = t
			var out strings.Builder
			s.run(d, &out)
			if out.Len() == 0 {
				return "ok\n"
			}
			return out.String()
		})
	})
}

type scenario struct {
	t   *testing.T
	fs  *vfs.MemFS
	log *testLog
}

func (s *scenario) close() {
	if s.log != nil {
		s.log.close()
	}
}

func dur(s string) time.Duration {
	d, err := time.ParseDuration(s)
	if err != nil {
		panic(err)
	}
	return d
}

func num(s string) uint64 {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		panic(err)
	}
	return n
}

func (s *scenario) run(d *datadriven.TestData, out *strings.Builder) {
	if s.log != nil {
		s.log.t = s.t
	}
	arg := func(name string) (string, bool) {
		for _, a := range d.CmdArgs {
			if a.Key == name {
				if len(a.Vals) == 0 {
					return "", true
				}
				return a.Vals[0], true
			}
		}
		return "", false
	}
	words := func(n int) []string {
		var w []string
		for _, a := range d.CmdArgs {
			if len(a.Vals) == 0 {
				w = append(w, a.Key)
			}
		}
		if len(w) < n {
			d.Fatalf(s.t, "%s needs %d arguments", d.Cmd, n)
		}
		return w
	}
	switch d.Cmd {
	case "open":
		s.close()
		s.fs = vfs.NewCrashableMem()
		o := Options{FS: s.fs, Dir: "engine"}
		if v, ok := arg("recent"); ok {
			n, _ := strconv.ParseInt(v, 10, 64)
			o.RecentBytes = n
		}
		if v, ok := arg("log"); ok {
			o.CheckpointLogBytes = int64(num(v))
		}
		s.log = &testLog{t: s.t, o: o, now: testStart}
		if v, ok := arg("unsettled"); ok {
			s.log.unsettledMax = int(num(v))
		}
		s.log.open()
	case "apply":
		s.apply(d, arg, out)
	case "config":
		var members []Member
		for _, w := range words(1) {
			id, nonVoter := strings.CutSuffix(w, "-")
			members = append(members, Member{ID: NodeID(id), Voter: !nonVoter})
		}
		s.log.append(logEntry{members: members})
		s.effects(out)
	case "empty":
		s.log.append(logEntry{})
	case "checkpoint":
		s.log.checkpoint()
	case "needs-checkpoint":
		fmt.Fprintln(out, s.log.e.NeedsCheckpoint())
	case "restart", "crash":
		want := s.log.fullHash()
		if d.Cmd == "crash" {
			clone := s.fs.CrashClone(vfs.CrashCloneCfg{})
			s.log.close()
			s.fs, s.log.o.FS = clone, clone
		} else {
			s.log.close()
		}
		s.log.open()
		if got := s.log.fullHash(); got != want {
			d.Fatalf(s.t, "hash is %x, was %x", got, want)
		}
	case "park":
		w := words(2)
		r := &Receive{Topic: w[0], Group: w[1], Max: 1}
		if v, ok := arg("conc"); ok {
			r.MaxConcurrency = int(num(v))
		}
		now := s.log.now
		if v, ok := arg("at"); ok {
			now.Cluster += dur(v).Milliseconds()
		}
		called := false
		parked, err := s.log.e.Park(r, now, func() { called = true })
		fmt.Fprintf(out, "parked %v\n", parked)
		if err != nil || parked != called {
			d.Fatalf(s.t, "registered %v, error %v", called, err)
		}
	case "due":
		w := words(2)
		if at, ok := s.log.e.NextDue(w[0], w[1]); ok {
			fmt.Fprintf(out, "in %v\n", time.Duration(at-s.log.e.Stamp().Cluster)*time.Millisecond)
		} else {
			fmt.Fprintln(out, "nothing waits")
		}
	case "in-sync":
		set := s.log.e.InSync()
		fmt.Fprintf(out, "epoch %d %v\n", set.Epoch, set.Nodes)
	case "state":
		e := s.log.e
		index, term := e.Applied()
		fmt.Fprintf(out, "applied %d/%d durable %d/%d cluster %q level %d members %v\n", index, term, e.Durable().Index, e.Durable().Term, e.ClusterID(), e.Level(), e.Members())
	case "rows":
		counts := map[string]int{}
		for _, k := range []byte{rowBlock, rowPayload, rowByIndex, rowByStream, rowExpiry, rowTopic, rowGroup, rowChunk, rowIntake, rowState, rowFloor} {
			if err := s.log.e.scan(k, func(_, _ []byte) error { counts[string(k)]++; return nil }); err != nil {
				d.Fatalf(s.t, "%v", err)
			}
		}
		for _, k := range sortedKeys(counts) {
			fmt.Fprintf(out, "%s=%d ", k, counts[k])
		}
		fmt.Fprintln(out)
	default:
		s.query(d, words, arg, out)
	}
}

func (s *scenario) query(d *datadriven.TestData, words func(int) []string, arg func(string) (string, bool), out *strings.Builder) {
	q := Query{Max: 10}
	if v, ok := arg("max"); ok {
		q.Max = int(num(v))
	}
	if v, ok := arg("at"); ok {
		q.Now = s.log.now.Cluster + dur(v).Milliseconds()
	}
	q.After, _ = arg("after")
	switch d.Cmd {
	case "peek":
		w := words(2)
		q.Kind, q.Topic, q.Group = QueryPeek, w[0], w[1]
	case "browse":
		q.Kind, q.Topic = QueryBrowse, words(1)[0]
		if v, ok := arg("from"); ok {
			q.From = num(v)
		}
	case "topic":
		q.Kind, q.Topic = QueryTopic, words(1)[0]
	case "topics":
		q.Kind = QueryTopics
	case "group":
		w := words(2)
		q.Kind, q.Topic, q.Group = QueryGroup, w[0], w[1]
	case "groups":
		q.Kind, q.Topic = QueryGroups, words(1)[0]
	case "message":
		w := words(2)
		q.Kind, q.Topic, q.ID = QueryMessage, w[0], messageID(w[1])
	default:
		d.Fatalf(s.t, "unknown directive %s", d.Cmd)
	}
	_, before := s.log.e.StateHash()
	q, err := DecodeQuery(AppendQuery(nil, &q))
	if err != nil {
		d.Fatalf(s.t, "%v", err)
	}
	a, err := s.log.e.Query(q)
	if err != nil {
		fmt.Fprintf(out, "error %v\n", errs.CodeOf(err))
		return
	}
	if a, err = DecodeAnswer(AppendAnswer(nil, &a)); err != nil {
		d.Fatalf(s.t, "%v", err)
	}
	if _, after := s.log.e.StateHash(); after != before {
		d.Fatalf(s.t, "the query changed the state")
	}
	for i := range a.Messages {
		s.delivery(&a.Messages[i], out)
	}
	for _, t := range a.Topics {
		fmt.Fprintf(out, "topic %s #%d offsets %d..%d last %s published %d groups %d oldest %s\n", t.Name, t.Incarnation, t.First, t.Next, s.stream(t.Last), t.Published, t.Groups, s.at(t.OldestAt))
	}
	for _, g := range a.Groups {
		fmt.Fprintf(out, "group %s/%s #%d at %s (%d) ready %d unsettled %d inflight %d delivered %d redelivered %d acknowledged %d oldest %s\n",
			g.Topic, g.Name, g.Incarnation, s.stream(g.Position), g.Offset, g.Ready, g.Unsettled, g.Inflight, g.Delivered, g.Redelivered, g.Acknowledged, s.at(g.OldestAt))
	}
	if a.More {
		fmt.Fprintf(out, "more at %d\n", a.Next)
	}
}

// at prints a wall time relative to the start of the scenario.
func (s *scenario) at(wall int64) string {
	if wall == 0 {
		return "never"
	}
	return (time.Duration(wall-testStart.Wall) * time.Millisecond).String()
}

func (s *scenario) stream(id StreamID) string {
	if id == (StreamID{}) {
		return "0-0"
	}
	return fmt.Sprintf("%v-%d", time.Duration(int64(id.Ms)-testStart.Wall)*time.Millisecond, id.Seq)
}

func (s *scenario) delivery(d *Delivery, out *strings.Builder) {
	fmt.Fprintf(out, "  %s id %d.%d receipt %d@%d stream %s", d.Body, d.ID.Index, d.ID.Pos, d.Receipt.Offset, d.Receipt.Epoch, s.stream(d.Stream))
	if d.Count > 0 {
		fmt.Fprintf(out, " count %d", d.Count)
	}
	fmt.Fprintf(out, " published %s expires %s", s.at(d.PublishedAt), s.at(d.ExpiresAt))
	if d.LeaseUntil != 0 {
		fmt.Fprintf(out, " leased until %s", s.at(d.LeaseUntil))
	}
	if d.Gone {
		out.WriteString(" gone")
	}
	fmt.Fprintln(out)
}

func messageID(s string) MessageID {
	index, pos, _ := strings.Cut(s, ".")
	return MessageID{Index: num(index), Pos: uint32(num(pos)), Kind: KindPlain}
}

func (s *scenario) apply(d *datadriven.TestData, arg func(string) (string, bool), out *strings.Builder) {
	for _, a := range d.CmdArgs {
		if strings.HasPrefix(a.Key, "+") {
			s.log.pass(dur(a.Key[1:]))
		}
	}
	if v, ok := arg("wall"); ok {
		s.log.now.Wall += dur(v).Milliseconds()
	}
	intake, lowest := uint64(0), uint64(0)
	if v, ok := arg("intake"); ok {
		intake = num(v)
	}
	if v, ok := arg("lowest"); ok {
		lowest = num(v)
	}
	var eb EntryBuilder
	eb.Reset(1, s.log.now, 0)
	var cmds []Command
	for _, line := range strings.Split(d.Input, "\n") {
		number := uint64(0)
		if head, rest, ok := strings.Cut(line, ": "); ok {
			number, line = num(head), rest
		}
		c := s.command(d, line)
		cmds = append(cmds, c)
		raw := c.AppendTo(nil)
		if _, err := Inspect(raw); err != nil {
			d.Fatalf(s.t, "%s: %v", line, err)
		}
		eb.Add(IntakeID(intake), number, lowest, raw)
	}
	en := logEntry{index: s.log.next(), data: eb.Bytes()}
	results, err := en.applyTo(s.log.e, &s.log.fx)
	if err != nil {
		var u *UnknownError
		fmt.Fprintf(out, "halt %v: %v\n", errors.As(err, &u), err)
		return
	}
	s.log.entries = append(s.log.entries, en)
	if len(results) != len(cmds) {
		d.Fatalf(s.t, "%d results for %d commands", len(results), len(cmds))
	}
	for i := range results {
		s.result(d, cmds[i], &results[i], out)
	}
	s.effects(out)
}

func (s *scenario) effects(out *strings.Builder) {
	for _, g := range s.log.fx.Deliverable {
		fmt.Fprintf(out, "deliverable: %s/%s\n", g.Topic, g.Group)
	}
	for _, g := range s.log.fx.Due {
		fmt.Fprintf(out, "due anew: %s/%s\n", g.Topic, g.Group)
	}
	if s.log.fx.InSync {
		set := s.log.e.InSync()
		fmt.Fprintf(out, "in-sync: epoch %d %v\n", set.Epoch, set.Nodes)
	}
}

func (s *scenario) result(d *datadriven.TestData, c Command, r *Result, out *strings.Builder) {
	fmt.Fprintf(out, "%v", r.Code)
	if r.Repeat {
		out.WriteString(" repeat")
	}
	if r.Parked {
		out.WriteString(" parked")
	}
	if r.Intake != 0 {
		fmt.Fprintf(out, " intake %d", r.Intake)
	}
	if r.Published.Count > 0 {
		p := r.Published
		fmt.Fprintf(out, " published %d.%d+%d offset %d stream %s", p.Index, p.Pos, p.Count, p.Offset, s.stream(p.Stream))
	}
	if len(r.Codes) > 0 {
		fmt.Fprintf(out, " %v", r.Codes)
	}
	if r.RetryAfter != 0 {
		fmt.Fprintf(out, " retry after %v", r.RetryAfter)
	}
	if r.Inflight != 0 {
		fmt.Fprintf(out, " inflight %d", r.Inflight)
	}
	if r.ExpiresAt != 0 {
		fmt.Fprintf(out, " expires %s", s.at(r.ExpiresAt))
	}
	fmt.Fprintln(out)
	if len(r.Deliveries) > 0 {
		err := s.log.e.Load(r.Deliveries)
		if err != nil && errs.CodeOf(err) != errs.MessageNotFound {
			d.Fatalf(s.t, "%v", err)
		}
		for i := range r.Deliveries {
			s.delivery(&r.Deliveries[i], out)
		}
	}
	back, err := DecodeResult(AppendResult(nil, r))
	if err != nil || fmt.Sprint(back) != fmt.Sprint(*r) {
		d.Fatalf(s.t, "result %v came back as %v: %v", *r, back, err)
	}
}

func (s *scenario) command(d *datadriven.TestData, line string) Command {
	fields := strings.Fields(line)
	verb, rest := fields[0], fields[1:]
	opts := map[string]string{}
	var w []string
	for _, f := range rest {
		if k, v, ok := strings.Cut(f, "="); ok {
			opts[k] = v
		} else {
			w = append(w, f)
		}
	}
	odur := func(name string, def time.Duration) time.Duration {
		if v, ok := opts[name]; ok {
			return dur(v)
		}
		return def
	}
	onum := func(name string, def uint64) uint64 {
		if v, ok := opts[name]; ok {
			return num(v)
		}
		return def
	}
	switch verb {
	case "init":
		return &Init{ClusterID: w[0], Secret: []byte("secret"), Level: uint32(onum("level", 1)), Refound: slices.Contains(w, "refound")}
	case "intake":
		return &OpenIntake{Node: NodeID(w[0]), Nonce: num(w[1])}
	case "tick":
		return &Tick{}
	case "publish":
		p := &Publish{Topic: w[0]}
		for _, body := range w[1:] {
			p.Messages = append(p.Messages, NewMessage{ContentType: "text/plain", Retention: odur("retention", 24*time.Hour), Delay: odur("delay", 0),
				Key: opts["key"], Deployment: opts["deployment"], Body: []byte(body)})
		}
		return p
	case "receive":
		return &Receive{Topic: w[0], Group: w[1], Max: int(onum("max", 1)), Visibility: odur("vis", time.Minute), MaxConcurrency: int(onum("conc", 0)),
			Latest: slices.Contains(w[2:], "latest"), Park: slices.Contains(w[2:], "park"), Deployment: opts["deployment"]}
	case "byid":
		return &ReceiveID{Topic: w[0], Group: w[1], ID: messageID(w[2]), Visibility: odur("vis", time.Minute), MaxConcurrency: int(onum("conc", 0))}
	case "ack", "release", "extend", "route":
		c := &Settle{Topic: w[0], Group: w[1], Op: Extend, Visibility: odur("vis", 0)}
		if verb == "ack" {
			c.Op = Acknowledge
		}
		if verb == "route" {
			c.Op = Route
		}
		e := s.log.e
		for _, r := range w[2:] {
			off, epoch, _ := strings.Cut(r, "@")
			rc := Receipt{Offset: num(off), Epoch: num(epoch)}
			rc.Topic, rc.Group = onum("topic", 0), onum("group", 0)
			if t := e.topics[w[0]]; t != nil && rc.Topic == 0 {
				rc.Topic = t.inc
				if g := t.groups[w[1]]; g != nil && rc.Group == 0 {
					rc.Group = g.inc
				}
			}
			c.Receipts = append(c.Receipts, rc)
		}
		return c
	case "shrink":
		return &Shrink{Node: NodeID(w[0]), Epoch: num(w[1])}
	case "expand":
		return &Expand{Node: NodeID(w[0]), Epoch: num(w[1])}
	case "advance":
		return &Advance{By: dur(w[0])}
	case "level":
		return &Level{Level: uint32(num(w[0]))}
	}
	d.Fatalf(s.t, "unknown command %q", line)
	return nil
}
