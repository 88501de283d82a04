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
//	    ack|release TOPIC GROUP OFFSET@EPOCH…    extend … vis=D    nack … [delay=D] [reason=X]
//	    topicset|topicdelete|purge TOPIC …    group|groupdelete|redrive|drop TOPIC GROUP …
//	    cancel|move TOPIC ID [delay=D]
//	    init ID | intake NODE NONCE | tick | shrink NODE EPOCH | expand NODE EPOCH | advance D | level N
//	config NODE…            a configuration; NODE- is a non-voter
//	checkpoint              restart: lose the memory and replay the log from the last checkpoint
//	crash                   the same, keeping of the disk only what was synced
//	park|due|peek|group|topic|browse|groups|topics|parked|delayed|story|totals|in-sync|state|rows
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
	t    *testing.T
	fs   *vfs.MemFS
	log  *testLog
	last string // Answer.Last of the last query that had one
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
		r := &Receive{Topic: w[0], Group: w[1], Max: 1, Park: true}
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
		for _, k := range []byte{rowBlock, rowByIndex, rowByStream, rowExpiry, rowTopic, rowGroup, rowChunk, rowIntake, rowState, rowFloor, rowKey, rowDue, rowStaged, rowStagedIndex, rowStagedExpiry, rowPlace, rowChange, rowKept, rowPosting} {
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
	if q.After == "last" {
		q.After = s.last
	}
	q.Deployment, _ = arg("deployment")
	if v, ok := arg("state"); ok {
		if q.Filter.State, ok = ParseMessageState(v); !ok {
			d.Fatalf(s.t, "no state %q", v)
		}
	}
	q.Filter.Header, _ = arg("header")
	q.Filter.Value, _ = arg("value")
	q.Parked.Error, _ = arg("error")
	if v, ok := arg("since"); ok {
		q.Filter.Since = testStart.Wall + dur(v).Milliseconds()
	}
	if v, ok := arg("until"); ok {
		q.Filter.Until = testStart.Wall + dur(v).Milliseconds()
	}
	if v, ok := arg("rate"); ok && v == "none" {
		q.DrainRate = DrainNone
	} else if ok {
		q.DrainRate = num(v)
	}
	switch d.Cmd {
	case "peek":
		w := words(2)
		q.Kind, q.Topic, q.Group = QueryPeek, w[0], w[1]
	case "browse":
		w := words(1)
		q.Kind, q.Topic = QueryBrowse, w[0]
		if len(w) > 1 {
			q.Group = w[1]
		}
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
	case "delayed":
		q.Kind, q.Topic = QueryDelayed, words(1)[0]
	case "parked":
		w := words(2)
		q.Kind, q.Topic, q.Group = QueryParked, w[0], w[1]
		if v, ok := arg("from"); ok {
			q.From = num(v)
		}
	case "story":
		w := words(2)
		q.Kind, q.Topic, q.ID = QueryStory, w[0], messageID(w[1])
	case "totals":
		fmt.Fprintf(out, "%+v\n", s.log.e.Totals())
		return
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
		fmt.Fprintf(out, "topic %s #%d offsets %d..%d last %s published %d groups %d oldest %s", t.Name, t.Incarnation, t.First, t.Next, s.stream(t.Last), t.Published, t.Groups, s.at(t.OldestAt))
		if t.Delayed > 0 {
			fmt.Fprintf(out, " delayed %d", t.Delayed)
		}
		if t.Settings != (TopicSettings{}) {
			fmt.Fprintf(out, " settings %+v", t.Settings)
		}
		fmt.Fprintln(out)
	}
	for _, g := range a.Groups {
		fmt.Fprintf(out, "group %s/%s #%d at %s (%d) ready %d unsettled %d inflight %d delivered %d redelivered %d acknowledged %d oldest %s",
			g.Topic, g.Name, g.Incarnation, s.stream(g.Position), g.Offset, g.Ready, g.Unsettled, g.Inflight, g.Delivered, g.Redelivered, g.Acknowledged, s.at(g.OldestAt))
		if g.Parked > 0 {
			fmt.Fprintf(out, " parked %d", g.Parked)
		}
		if g.Expiring > 0 {
			fmt.Fprintf(out, " expiring %d", g.Expiring)
		}
		if !g.Settings.isZero() {
			fmt.Fprintf(out, " settings %+v", g.Settings)
		}
		fmt.Fprintln(out)
	}
	for i := range a.Parked {
		p := &a.Parked[i]
		fmt.Fprintf(out, "parked at %s error %q\n", s.at(p.ParkedAt), p.Error)
		s.delivery(&p.Delivery, out)
	}
	if st := a.Story; st != nil {
		fmt.Fprintf(out, "%v visible at %s, %d bytes %08x\n", st.State, s.at(st.VisibleAt), st.Bytes, st.CRC)
		s.delivery(&st.Message, out)
		for _, g := range st.Groups {
			fmt.Fprintf(out, "  %s: %v count %d", g.Group, g.State, g.Count)
			if g.Consumer != "" {
				fmt.Fprintf(out, " of %s", g.Consumer)
			}
			for _, x := range []struct {
				name string
				at   int64
			}{{"leased at", g.LeasedAt}, {"until", g.LeasedUntil}, {"next", g.NextAt}, {"parked", g.ParkedAt}} {
				if x.at != 0 {
					fmt.Fprintf(out, " %s %s", x.name, s.at(x.at))
				}
			}
			if g.Error != "" {
				fmt.Fprintf(out, " error %q", g.Error)
			}
			fmt.Fprintln(out)
		}
	}
	if a.Last != "" {
		s.last = a.Last
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
	fmt.Fprintf(out, "  %s id %s receipt %d@%d stream %s", d.Body, showID(d.ID), d.Receipt.Offset, d.Receipt.Epoch, s.stream(d.Stream))
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

// messageID reads "INDEX.POS", "dINDEX.POS" for a delayed message, and "INDEX.POS>ORIGINAL" for a duplicate.
func messageID(s string) MessageID {
	s, original, duplicate := strings.Cut(s, ">")
	id := MessageID{Kind: KindPlain}
	if rest, ok := strings.CutPrefix(s, "d"); ok {
		s, id.Kind = rest, KindDelayed
	}
	index, pos, _ := strings.Cut(s, ".")
	id.Index, id.Pos = num(index), uint32(num(pos))
	if duplicate {
		o := messageID(original)
		id.Kind, id.OriginalIndex, id.OriginalPos, id.OriginalKind = KindDuplicate, o.Index, o.Pos, o.Kind
	}
	return id
}

func showID(id MessageID) string {
	switch id.Kind {
	case KindDelayed:
		return fmt.Sprintf("d%d.%d", id.Index, id.Pos)
	case KindDuplicate:
		return fmt.Sprintf("%d.%d>%s", id.Index, id.Pos, showID(id.Original()))
	}
	return fmt.Sprintf("%d.%d", id.Index, id.Pos)
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
		fmt.Fprintf(out, "deliverable: %s/%s%s\n", g.Topic, g.Group, s.deployment(g.Deployment))
	}
	for _, g := range s.log.fx.Due {
		fmt.Fprintf(out, "due anew: %s/%s%s\n", g.Topic, g.Group, s.deployment(g.Deployment))
	}
	if s.log.fx.InSync {
		set := s.log.e.InSync()
		fmt.Fprintf(out, "in-sync: epoch %d %v\n", set.Epoch, set.Nodes)
	}
}

func (s *scenario) deployment(name string) string {
	if name == "" {
		return ""
	}
	return " of " + name
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
		for i := range p.Kinds {
			fmt.Fprintf(out, " %s", showID(p.ID(i)))
		}
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
	if r.Count != 0 || r.Next != 0 {
		fmt.Fprintf(out, " count %d next %d", r.Count, r.Next)
	}
	if r.Upload != 0 {
		fmt.Fprintf(out, " upload %d", r.Upload)
	}
	if r.Original != (MessageID{}) {
		fmt.Fprintf(out, " original %s", showID(r.Original))
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
	has := func(word string) bool { return slices.Contains(w, word) }
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
		return &ReceiveID{Topic: w[0], Group: w[1], ID: messageID(w[2]), Visibility: odur("vis", time.Minute), MaxConcurrency: int(onum("conc", 0)), Deployment: opts["deployment"]}
	case "topicset":
		return &TopicSet{Topic: w[0], Create: has("create"), Settings: &TopicSettings{Paused: has("paused"), DepthMax: onum("depth", 0), MessageBytesMax: int64(onum("bytes", 0)),
			RetentionDefault: odur("default", 0), RetentionMax: odur("longest", 0), DropAcknowledged: has("drop")}}
	case "topicdelete":
		return &TopicDelete{Topic: w[0]}
	case "purge":
		return &Purge{Topic: w[0]}
	case "group":
		c := &GroupSet{Topic: w[0], Group: w[1], Create: has("create"), Seek: has("seek")}
		switch v := opts["start"]; {
		case v == "end":
			c.Start.Kind = StartEnd
		case strings.Contains(v, "-"):
			ms, seq, _ := strings.Cut(v, "-")
			c.Start = Start{Kind: StartID, ID: StreamID{Ms: uint64(testStart.Wall + dur(ms).Milliseconds()), Seq: num(seq)}}
		case v != "":
			c.Start = Start{Kind: StartTime, Time: testStart.Wall + dur(v).Milliseconds()}
		}
		if has("settings") {
			c.Settings = &GroupSettings{Paused: has("paused"), Park: has("park"), MaxDeliveries: uint32(onum("deliveries", 0)), ParkedRetention: odur("keep", 0),
				InitialDelay: odur("initial", 0), StartDelay: odur("startdelay", 0), MaxConcurrency: int(onum("conc", 0)), Deployment: opts["deployment"]}
			if v, ok := opts["exclude"]; ok {
				c.Settings.ExcludeDeployments = strings.Split(v, ",")
			}
		}
		return c
	case "groupdelete":
		return &GroupDelete{Topic: w[0], Group: w[1]}
	case "redrive", "drop":
		c := &Parked{Topic: w[0], Group: w[1], Op: Redrive, Max: int(onum("max", 100)), From: onum("from", 0), DryRun: has("dry"), Filter: ParkedFilter{Error: opts["error"]}}
		if verb == "drop" {
			c.Op = Drop
		}
		if v, ok := opts["id"]; ok {
			c.Filter.IDs = []MessageID{messageID(v)}
		}
		return c
	case "cancel":
		return &Delayed{Topic: w[0], ID: messageID(w[1]), Cancel: true}
	case "move":
		return &Delayed{Topic: w[0], ID: messageID(w[1]), Delay: odur("delay", 0)}
	case "ack", "release", "extend", "nack", "route":
		c := &Settle{Topic: w[0], Group: w[1], Op: Extend, Visibility: odur("vis", 0), Deployment: opts["deployment"]}
		switch verb {
		case "ack":
			c.Op = Acknowledge
		case "nack":
			c.Op, c.Visibility, c.Reason = Release, odur("delay", 0), opts["reason"]
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
