package engine

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// workload is a log with what a node that never crashed made of it.
type workload struct {
	entries []logEntry
	results []string // of each entry
	hashes  []uint64 // StateHash after each entry
	full    uint64   // FullHash at the end
	// done counts the commands that were not refused, by their types.
	done map[string]int
}

// makeWorkload builds n random entries of both protocols. Time passes so that leases run out and blocks expire,
// commands are repeated under their numbers, and messages are asked for by IDs that do not exist yet.
func makeWorkload(t testing.TB, seed uint64, n int) *workload {
	rng := rand.New(rand.NewPCG(seed, 1))
	l := openTest(t, Options{})
	w := &workload{done: map[string]int{}}
	var receipts []Receipt
	var owner []GroupRef
	var ids []MessageID
	var intake IntakeID
	number, lowest, heard := uint64(1), uint64(1), int64(0)
	var sent [][]byte
	topics, groups := []string{"a", "b", "c"}, []string{"g", "h"}
	pick := func(s []string) string { return s[rng.IntN(len(s))] }
	command := func() Command {
		topic, group := pick(topics), pick(groups)
		switch rng.IntN(10) {
		case 0, 1, 2:
			p := &Publish{Topic: topic}
			for range 1 + rng.IntN(6) {
				body := make([]byte, rng.IntN(300))
				if rng.IntN(20) == 0 {
					body = make([]byte, 3000)
				}
				for i := range body {
					body[i] = byte(rng.Uint32())
				}
				m := NewMessage{Body: body, ContentType: "x/y", Retention: []time.Duration{0, 60, 60, 60, 120, 3600}[rng.IntN(6)] * time.Second}
				switch rng.IntN(8) {
				case 0:
					m.Delay = time.Duration(1+rng.IntN(40)) * time.Second
				case 1:
					m.Key = fmt.Sprint("k", rng.IntN(6))
				case 2:
					m.Deployment = []string{"x", "y"}[rng.IntN(2)]
				case 3:
					m.Delay, m.Key, m.Deployment = time.Duration(1+rng.IntN(10))*time.Second, fmt.Sprint("k", rng.IntN(6)), "x"
				}
				p.Messages = append(p.Messages, m)
			}
			return p
		case 3, 4, 5:
			return &Receive{Topic: topic, Group: group, Max: 1 + rng.IntN(10), Visibility: time.Duration(1+rng.IntN(40)) * time.Second, Park: rng.IntN(4) == 0, MaxConcurrency: rng.IntN(3) * 8,
				Deployment: []string{"", "", "", "x", "y"}[rng.IntN(5)]}
		case 6:
			c := &ReceiveID{Topic: topic, Group: group, Visibility: 10 * time.Second}
			if len(ids) > 0 && rng.IntN(2) == 0 {
				c.ID = ids[len(ids)-1-rng.IntN(min(len(ids), 40))]
			} else {
				c.ID = MessageID{Index: l.next() + uint64(rng.IntN(4)), Pos: uint32(rng.IntN(3)), Kind: KindPlain}
			}
			return c
		}
		if len(receipts) == 0 {
			return &Tick{}
		}
		i := max(0, len(receipts)-1-rng.IntN(60))
		c := &Settle{Topic: owner[i].Topic, Group: owner[i].Group, Op: Acknowledge}
		if rng.IntN(3) == 0 {
			c.Op, c.Visibility = Extend, time.Duration(rng.IntN(20))*time.Second
		}
		for j := i; j < len(receipts) && len(c.Receipts) < 8; j++ {
			if owner[j] == owner[i] {
				c.Receipts = append(c.Receipts, receipts[j])
			}
		}
		return c
	}
	queue, streams := queueCommands{rng: rng}, streamCommands{rng: rng}
	for len(w.entries) < n {
		switch rng.IntN(6) {
		case 0:
			l.pass(time.Duration(rng.IntN(3000)) * time.Millisecond)
		case 1:
			l.pass(time.Duration(rng.IntN(30)) * time.Second)
		}
		en := logEntry{index: l.next()}
		var cmds []Command
		switch {
		case rng.IntN(60) == 0:
			for _, id := range []NodeID{"n1", "n2", "n3"} {
				en.members = append(en.members, Member{ID: id, Voter: rng.IntN(4) > 0})
			}
			en.members[0].Voter = true
		case rng.IntN(60) == 0:
		default:
			var eb EntryBuilder
			eb.Reset(1, l.now, 0)
			if intake == 0 || l.now.Cluster-heard > 600_000 {
				c := &OpenIntake{Node: "n1", Nonce: rng.Uint64()}
				cmds = append(cmds, c)
				eb.Add(0, 0, 0, c.AppendTo(nil))
				intake = 0
			} else {
				heard = l.now.Cluster
			}
			for range rng.IntN(6) {
				if len(sent) > 0 && intake != 0 && rng.IntN(8) == 0 {
					k := rng.IntN(len(sent))
					cmds = append(cmds, nil)
					eb.Add(intake, number-uint64(len(sent)-k), lowest, sent[k])
					continue
				}
				c := command()
				switch rng.IntN(14) {
				case 0, 1:
					c = queue.draw(ids)
				case 2, 3, 4, 5, 6:
					c = streams.drawAny()
				}
				raw := c.AppendTo(nil)
				cmds = append(cmds, c)
				if intake != 0 && rng.IntN(2) == 0 {
					eb.Add(intake, number, lowest, raw)
					number++
					sent = append(sent, raw)
				} else {
					eb.Add(0, 0, 0, raw)
				}
			}
			if rng.IntN(10) == 0 && number > lowest {
				lowest += uint64(rng.IntN(int(number - lowest)))
			}
			en.data = eb.Bytes()
		}
		res := l.append(en)
		for i := range res {
			if i >= len(cmds) || cmds[i] == nil || res[i].Repeat {
				continue
			}
			if res[i].Intake != 0 {
				intake, number, lowest, heard, sent = res[i].Intake, 1, 1, l.now.Cluster, nil
			}
			if res[i].Code == errs.OK {
				w.done[fmt.Sprintf("%T", cmds[i])]++
			}
			streams.answered(&res[i])
			if res[i].Upload != 0 {
				queue.began(res[i].Upload)
			}
			for _, d := range res[i].Deliveries {
				receipts = append(receipts, d.Receipt)
				switch c := cmds[i].(type) {
				case *Receive:
					owner = append(owner, GroupRef{Topic: c.Topic, Group: c.Group})
				case *ReceiveID:
					owner = append(owner, GroupRef{Topic: c.Topic, Group: c.Group})
				}
			}
			for k := range res[i].Published.Count {
				ids = append(ids, res[i].Published.ID(int(k)))
			}
		}
		_, h := l.e.StateHash()
		w.entries = append(w.entries, l.entries[len(l.entries)-1])
		w.results = append(w.results, showResults(res))
		w.hashes = append(w.hashes, h)
	}
	w.full = l.fullHash()
	l.close()
	return w
}

// follow applies the entries after the engine's applied one up to end and compares everything with the
// workload.
func (w *workload) follow(e *Engine, end int) error {
	applied, _ := e.Applied()
	for _, en := range w.entries[applied:end] {
		res, err := en.applyTo(e, nil)
		if err != nil {
			return err
		}
		if err := w.compare(e, en.index, res); err != nil {
			return err
		}
	}
	return nil
}

func (w *workload) compare(e *Engine, index uint64, res []Result) error {
	if got := showResults(res); got != w.results[index-1] {
		return fmt.Errorf("entry %d gave\n%s, want\n%s", index, got, w.results[index-1])
	}
	if _, h := e.StateHash(); h != w.hashes[index-1] {
		return fmt.Errorf("state hash after entry %d is %x, want %x", index, h, w.hashes[index-1])
	}
	return nil
}

// finish follows to the end and compares every row.
func (w *workload) finish(e *Engine) error {
	if err := w.follow(e, len(w.entries)); err != nil {
		return err
	}
	_, full, err := e.FullHash()
	if err == nil && full != w.full {
		err = fmt.Errorf("full hash is %x, want %x", full, w.full)
	}
	return err
}

// crashPoint is what the disk held at one moment.
type crashPoint struct {
	fs      *vfs.MemFS
	durable uint64
}

// crasher takes crash clones of a file system before chosen operations.
type crasher struct {
	mu      sync.Mutex
	fs      *vfs.MemFS
	rng     *rand.Rand
	every   int
	count   int
	next    int
	durable func() uint64
	points  []crashPoint
}

func newCrasher(fs *vfs.MemFS, rng *rand.Rand, every int) *crasher {
	// Of its own, since the store's goroutines use it.
	own := rand.New(rand.NewPCG(rng.Uint64(), 5))
	return &crasher{fs: fs, rng: own, every: every, next: own.IntN(every)}
}

// MaybeError implements errorfs.Injector: it never fails an operation, it only looks at it.
func (c *crasher) MaybeError(op errorfs.Op) error {
	if op.Kind.ReadOrWrite() == errorfs.OpIsRead {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.count++
	if c.count > c.next && c.durable != nil {
		c.next = c.count + 1 + c.rng.IntN(2*c.every)
		d := c.durable()
		c.points = append(c.points, crashPoint{fs: c.fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: c.rng.IntN(3) * 50, RNG: rand.New(rand.NewPCG(c.rng.Uint64(), 2))}), durable: d})
	}
	return nil
}

// String implements errorfs.Injector.
func (c *crasher) String() string { return "crasher" }

// breakRules makes an engine break one of the rules of decision 16.
type breakRules struct{ visibility, mutable, removal bool }

func (b breakRules) set(e *Engine) {
	e.seeLaterRows = b.visibility
	switch {
	case b.mutable:
		e.beforeStore = storeMutableNow
	case b.removal:
		e.beforeStore = removeNow
	}
}

// storeMutableNow breaks rule 16(b) for a test: groups are written when they change.
func storeMutableNow(e *Engine) error {
	if e.durable.Load() == nil {
		return nil
	}
	batch := e.db.NewBatch()
	defer func() { _ = batch.Close() }()
	for _, g := range e.groups {
		if g == nil {
			continue
		}
		e.put(batch, g.appendRow(nil), rowGroup, g.topic.inc, g.inc)
	}
	return batch.Commit(pebble.NoSync)
}

// removeNow breaks rule 16(c) for a test: blocks are removed when they have expired.
func removeNow(e *Engine) error {
	var dead []*block
	for _, name := range sortedKeys(e.topics) {
		t := e.topics[name]
		for off := t.gone; off < t.next; {
			b, err := e.blockFor(t, off)
			if err != nil {
				return err
			}
			if b == nil {
				break
			}
			if b != t.open && b.lastExpiry <= e.stamp.Cluster {
				dead = append(dead, b)
			}
			off = b.end()
		}
	}
	for _, b := range dead {
		for _, kind := range []byte{rowBlock} {
			if err := e.db.Delete(e.keys.key(kind, b.topic, b.base), pebble.NoSync); err != nil {
				return err
			}
		}
	}
	return nil
}

// crashRun runs a workload on a disk that loses power at random moments and returns what went wrong, and how
// many crashes it survived.
func crashRun(t testing.TB, seed uint64, entries, every int, broken breakRules) (int, error) {
	w := makeWorkload(t, seed, entries)
	rng := rand.New(rand.NewPCG(seed, 3))
	fs := vfs.NewCrashableMem()
	c := newCrasher(fs, rng, every)
	o := Options{FS: errorfs.Wrap(fs, c), Dir: "engine", RecentBytes: []int64{-1, 2000, 1 << 20}[rng.IntN(3)], MemTableBytes: 256 << 10, CacheBytes: 1 << 20, packBytes: []int64{1, 4 << 10, 1 << 20}[rng.IntN(3)]}
	e, err := Open(o)
	if err != nil {
		return 0, err
	}
	broken.set(e)
	durable := func() uint64 { return e.Durable().Index }
	c.mu.Lock()
	c.durable = durable
	c.mu.Unlock()
	flushAlways := rng.IntN(3) > 0
	for i := range w.entries {
		if err := w.follow(e, i+1); err != nil {
			return 0, fmt.Errorf("without a crash: %w", err)
		}
		if flushAlways || rng.IntN(8) == 0 {
			if err := e.db.Flush(); err != nil {
				return 0, err
			}
		}
		if rng.IntN(12) == 0 {
			if _, err := e.Checkpoint(); err != nil {
				return 0, err
			}
		}
	}
	c.mu.Lock()
	points := c.points
	c.durable = nil
	c.mu.Unlock()
	if err := e.Close(); err != nil {
		return 0, err
	}
	survived := 0
	for len(points) > 0 {
		p := points[0]
		points = points[1:]
		// Recovery itself loses power as well, now and then.
		rc := newCrasher(p.fs, rng, 4*every)
		if survived%4 == 0 {
			rc.durable = func() uint64 { return p.durable }
		}
		o := o
		o.FS = errorfs.Wrap(p.fs, rc)
		o.RecentBytes = []int64{-1, 2000, 1 << 20}[rng.IntN(3)]
		e, err := Open(o)
		if err != nil {
			return survived, fmt.Errorf("crash %d: %w", survived, err)
		}
		broken.set(e)
		rc.mu.Lock()
		rc.durable = nil
		points = append(points, rc.points...)
		rc.mu.Unlock()
		if got := e.Durable().Index; got < p.durable {
			err = fmt.Errorf("checkpoint of entry %d was durable, %d is there", p.durable, got)
		} else {
			err = w.finish(e)
		}
		if err != nil {
			return survived, fmt.Errorf("crash %d, recovered at %d: %w", survived, e.Durable().Index, closing(e, err))
		}
		if err := e.Close(); err != nil {
			return survived, err
		}
		survived++
	}
	return survived, nil
}

func closing(e *Engine, err error) error {
	_ = e.Close()
	return err
}

// TestCrashReplay: after a crash at any file operation, checkpoint and replay give, byte for byte, the results
// and the rows of a node that never crashed (S12, S13, decision 16).
func TestCrashReplay(t *testing.T) {
	seeds, entries := 20, 160
	if campaign() {
		seeds, entries = 1500, 400
	} else if testing.Short() {
		seeds = 3
	}
	// A cursor was moved in a group that had not been folded to that time.
	if _, err := crashRun(t, 1795348996249164643, 160, 40, breakRules{}); err != nil {
		t.Errorf("seed 1795348996249164643: %v", err)
	}
	start := uint64(time.Now().UnixNano())
	t.Logf("first seed %d", start)
	total := 0
	for i := range seeds {
		n, err := crashRun(t, start+uint64(i), entries, 40, breakRules{})
		if err != nil {
			t.Fatalf("seed %d: %v", start+uint64(i), err)
		}
		total += n
	}
	t.Logf("%d crashes survived", total)
	if total < 20*seeds {
		t.Errorf("only %d crashes in %d runs: nothing was tested", total, seeds)
	}
}

// TestCrashReplayControls breaks each rule of decision 16 in turn: the test above must notice.
func TestCrashReplayControls(t *testing.T) {
	for name, broken := range map[string]breakRules{
		"16a rows of later entries are seen":        {visibility: true},
		"16b state is written when it changes":      {mutable: true},
		"16c rows are removed outside a checkpoint": {removal: true},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range uint64(40) {
				if _, err := crashRun(t, 1000+seed, 160, 40, broken); err != nil {
					t.Logf("noticed with seed %d: %.300v", 1000+seed, err)
					return
				}
			}
			t.Fatal("nothing was noticed")
		})
	}
}

// TestWorkloadDoesEverything: the logs that crashes are tried on hold every command of both protocols that changes
// messages, and not only refusals of them.
func TestWorkloadDoesEverything(t *testing.T) {
	done := map[string]int{}
	for seed := range uint64(8) {
		for name, n := range makeWorkload(t, seed, 200).done {
			done[name] += n
		}
	}
	for _, c := range []Command{
		&Publish{}, &Receive{}, &ReceiveID{}, &Settle{}, &GroupSet{}, &GroupDelete{}, &TopicDelete{}, &Purge{}, &Parked{}, &Delayed{},
		&StreamAdd{}, &StreamReadGroup{}, &StreamAck{}, &StreamClaim{}, &StreamAutoClaim{}, &StreamNack{}, &StreamDelete{}, &StreamTrim{},
		&StreamGroup{}, &StreamSetID{}, &KeyDelete{}, &KeyRename{}, &KeyExpire{}, &KeyCopy{}, &StringSet{}, &StringGetDel{}, &Flush{}, &Exec{},
	} {
		if name := fmt.Sprintf("%T", c); done[name] == 0 {
			t.Errorf("no %s was done; there were %v", name, done)
		}
	}
}

// TestMetamorphic: one log gives the same results and hashes whatever the sizes of caches and memtables,
// whenever checkpoints are made, and wherever the node restarts (S12).
func TestMetamorphic(t *testing.T) {
	seeds := 10
	if campaign() {
		seeds = 2000
	} else if testing.Short() {
		seeds = 2
	}
	start := uint64(time.Now().UnixNano())
	t.Logf("first seed %d", start)
	for i := range seeds {
		seed := start + uint64(i)
		w := makeWorkload(t, seed, 300)
		rng := rand.New(rand.NewPCG(seed, 4))
		for variant := range 3 {
			o := Options{FS: vfs.NewMem(), Dir: "engine", RecentBytes: []int64{-1, 500, 20000, 0}[rng.IntN(4)],
				CacheBytes: int64(1<<16) << rng.IntN(8), MemTableBytes: int64(64<<10) << rng.IntN(6)}
			checkpointEvery, restartEvery := 1+rng.IntN(60), 1+rng.IntN(100)
			what := fmt.Sprintf("seed %d variant %d: %+v, checkpoint about every %d, restart about every %d", seed, variant, o, checkpointEvery, restartEvery)
			e, err := Open(o)
			if err != nil {
				t.Fatal(err)
			}
			for end := 1; end <= len(w.entries); end++ {
				if err := w.follow(e, end); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				if rng.IntN(checkpointEvery) == 0 {
					if _, err := e.Checkpoint(); err != nil {
						t.Fatalf("%s: %v", what, err)
					}
				}
				if rng.IntN(restartEvery) == 0 {
					if err := e.Close(); err != nil {
						t.Fatal(err)
					}
					if e, err = Open(o); err != nil {
						t.Fatalf("%s: %v", what, err)
					}
				}
			}
			if err := w.finish(e); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if err := e.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// queueCommands draws the commands of the queue's management.
type queueCommands struct {
	rng     *rand.Rand
	uploads []testUpload
}

type testUpload struct {
	id   uint64
	body []byte
	sent int
}

func (q *queueCommands) began(id uint64) {
	q.uploads = append(q.uploads, testUpload{id: id, body: largeBody(1+q.rng.IntN(2*limits.PartBytes), byte(id))})
}

func (q *queueCommands) draw(ids []MessageID) Command {
	rng := q.rng
	topic, group := []string{"a", "b", "c"}[rng.IntN(3)], []string{"g", "h"}[rng.IntN(2)]
	id := MessageID{Index: 1, Kind: KindDelayed}
	if len(ids) > 0 {
		id = ids[len(ids)-1-rng.IntN(min(len(ids), 30))]
	}
	switch rng.IntN(14) {
	case 0, 1:
		s := &GroupSettings{Paused: rng.IntN(8) == 0, MaxDeliveries: uint32(rng.IntN(3)), Park: rng.IntN(3) > 0, MaxConcurrency: rng.IntN(2) * 9,
			ParkedRetention: time.Duration(rng.IntN(2)*5) * time.Minute, InitialDelay: time.Duration(rng.IntN(2)*3) * time.Second}
		if rng.IntN(3) == 0 {
			s.ExcludeDeployments = []string{"x"}
		}
		return &GroupSet{Topic: topic, Group: group, Create: true, Settings: s}
	case 2:
		return &GroupSet{Topic: topic, Group: group, Create: true, Seek: rng.IntN(2) == 0, Start: Start{Kind: StartKind(rng.IntN(3)), Time: testStart.Wall + rng.Int64N(300_000)}}
	case 3:
		if rng.IntN(4) > 0 {
			return &GroupDelete{Topic: topic, Group: group}
		}
		return &TopicDelete{Topic: topic}
	case 4:
		return &Purge{Topic: topic}
	case 5:
		return &TopicSet{Topic: topic, Settings: &TopicSettings{Paused: rng.IntN(8) == 0, RetentionMax: time.Duration(rng.IntN(2)*100) * time.Second, DropAcknowledged: rng.IntN(2) == 0}}
	case 6, 7:
		return &Parked{Topic: topic, Group: group, Op: ParkedOp(1 + rng.IntN(2)), Max: 1 + rng.IntN(5)}
	case 8, 9:
		for i := len(ids) - 1; i >= 0 && i >= len(ids)-200; i-- {
			if ids[i].Kind == KindDelayed { // one that may still be due
				id = ids[i]
				break
			}
		}
		return &Delayed{Topic: topic, ID: id, Cancel: rng.IntN(2) == 0, Delay: time.Duration(rng.IntN(20)) * time.Second}
	case 10:
		return &Document{Table: "d", Key: fmt.Sprint(rng.IntN(4)), Value: []byte{byte(rng.Uint32())}}
	case 11:
		return &UploadOpen{Topic: topic, Key: []string{"", "k1"}[rng.IntN(2)]}
	}
	if len(q.uploads) == 0 {
		return &Document{Table: "d", Key: fmt.Sprint(rng.IntN(4)), Delete: true}
	}
	u := &q.uploads[rng.IntN(len(q.uploads))]
	list := parts(u.body)
	if u.sent == len(list) {
		c := commitOf(u.id, u.body, NewMessage{Retention: 100 * time.Second, Key: []string{"", "k1"}[rng.IntN(2)], Deployment: "x"})
		u.sent = 0 // what follows finds it gone
		return c
	}
	u.sent++
	return &UploadPart{Upload: u.id, Number: uint32(u.sent - 1), Data: list[u.sent-1]}
}
