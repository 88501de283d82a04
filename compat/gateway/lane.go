package gateway

import (
	"context"
	"sync"
	"time"

	"github.com/valkey-io/valkey-go"

	"tercet.dev/tercet/internal/errs"
)

// laneIdle ends a lane that has had nothing to do.
const laneIdle = 10 * time.Second

// laneBatch bounds the jobs that share one wait.
const laneBatch = 512

// lanes carry publishes that wait for replicas. WAIT is about what its own connection wrote, and holds that connection
// up; so the publishes of a topic go through one connection in batches, each batch followed by one wait for all of it.
// The batch that gathers meanwhile is the next one: group commit, with the round trip to the replicas as the clock.
type lanes struct {
	g       *Gateway
	mu      sync.Mutex
	byTopic map[string]*lane
	closed  bool
	running sync.WaitGroup
}

type lane struct {
	topic string
	jobs  chan *laneJob
}

// laneJob is a publish in a lane. done is closed when its fields are set.
type laneJob struct {
	*publishJob
	ctx    context.Context
	client valkey.Client
	copies int64
	err    error
	done   chan struct{}
}

func (l *lanes) init(g *Gateway) { l.g, l.byTopic = g, make(map[string]*lane) }

// close ends the lanes; jobs that are in them fail.
func (l *lanes) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.running.Wait()
}

// run carries a job out and returns how many replicas confirmed it.
func (l *lanes) run(ctx context.Context, c valkey.Client, job *publishJob) (int64, error) {
	j := &laneJob{publishJob: job, ctx: ctx, client: c, done: make(chan struct{})}
	if err := l.enter(j); err != nil {
		return 0, err
	}
	// Once in the lane, the job is carried out whether or not somebody waits; so waiting is over when it is.
	<-j.done
	return j.copies, j.err
}

// enter puts a job into its topic's lane, which it starts if need be.
func (l *lanes) enter(j *laneJob) error {
	for {
		l.mu.Lock()
		if l.closed {
			l.mu.Unlock()
			return errs.Of(errs.Draining)
		}
		a := l.byTopic[j.topic]
		if a == nil {
			a = &lane{topic: j.topic, jobs: make(chan *laneJob, laneBatch)}
			l.byTopic[j.topic] = a
			l.running.Add(1)
			go func() {
				defer l.running.Done()
				l.serve(a)
			}()
		}
		// The lane is left only with the lock held and nothing in it.
		select {
		case a.jobs <- j:
			l.mu.Unlock()
			return nil
		default:
		}
		l.mu.Unlock()
		timer := time.NewTimer(time.Millisecond)
		select {
		case <-timer.C:
		case <-j.ctx.Done():
			timer.Stop()
			return errs.New(errs.Overloaded, "too many publishes to topic %s wait for replicas", j.topic)
		}
	}
}

// serve runs a lane until it has been idle.
func (l *lanes) serve(a *lane) {
	var conn dedicated
	defer conn.release()
	batch := make([]*laneJob, 0, laneBatch)
	for {
		batch = batch[:0]
		idle := time.NewTimer(laneIdle)
		select {
		case j := <-a.jobs:
			batch = append(batch, j)
		case <-l.g.ctx.Done():
		case <-idle.C:
		}
		idle.Stop()
		if len(batch) == 0 {
			l.mu.Lock()
			if len(a.jobs) == 0 {
				delete(l.byTopic, a.topic)
				l.mu.Unlock()
				return
			}
			l.mu.Unlock()
			continue
		}
		for len(batch) < laneBatch && len(a.jobs) > 0 {
			batch = append(batch, <-a.jobs)
		}
		for len(batch) > 0 {
			// Jobs that entered before the client was replaced go through the client they came with.
			n := 1
			for n < len(batch) && batch[n].client == batch[0].client {
				n++
			}
			l.carry(&conn, batch[:n])
			batch = batch[n:]
		}
	}
}

// dedicated is a connection of a lane's own.
type dedicated struct {
	of     valkey.Client
	conn   valkey.DedicatedClient
	giveUp func()
}

func (d *dedicated) get(c valkey.Client) valkey.DedicatedClient {
	if d.of != c {
		d.release()
		d.of = c
		d.conn, d.giveUp = c.Dedicate()
	}
	return d.conn
}

func (d *dedicated) release() {
	if d.of != nil {
		d.giveUp()
		d.of, d.conn, d.giveUp = nil, nil, nil
	}
}

// carry sends a batch and its wait in one pipeline and hands each job its answers.
func (l *lanes) carry(conn *dedicated, batch []*laneJob) {
	worth := Worth{Timeout: l.g.o.Worth.Timeout}
	var cmds []valkey.Completed
	c := conn.get(batch[0].client)
	spans := make([]int, len(batch))
	for i, j := range batch {
		worth.Replicas = max(worth.Replicas, j.worth.Replicas)
		worth.Fsync = worth.Fsync || j.worth.Fsync
		if j.adds == nil {
			cmds = append(cmds, c.B().Eval().Script(luaCommon+luaPublish).Numkeys(int64(len(j.keys))).Key(j.keys...).Arg(j.args...).Build())
			spans[i] = 1
			continue
		}
		add := j.commands(batch[0].client)
		cmds = append(cmds, add...)
		spans[i] = len(add)
	}
	ms := worth.Timeout.Milliseconds()
	cmds = append(cmds, c.B().Wait().Numreplicas(int64(worth.Replicas)).Timeout(ms).Build())
	if worth.Fsync {
		// The wait comes first: a replica answers a question about its disk at once if it has been asked about its
		// memory before, and otherwise with its next report, up to a second later.
		cmds = append(cmds, c.B().Waitaof().Numlocal(1).Numreplicas(int64(worth.Replicas)).Timeout(ms).Build())
	}
	// The batch belongs to many callers; none of them ends it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(batch[0].ctx), 2*worth.Timeout+time.Second)
	defer cancel()
	answers := c.DoMulti(ctx, cmds...)
	last := len(answers) - 1
	var copies int64
	var waitErr error
	if worth.Fsync {
		counts, err := answers[last].AsIntSlice()
		waitErr = err
		if err == nil && len(counts) == 2 {
			if copies = counts[1]; counts[0] < 1 {
				copies = -1
			}
		}
	} else {
		copies, waitErr = answers[last].AsInt64()
	}
	at, broken := 0, false
	for i, j := range batch {
		span := answers[at : at+spans[i]]
		at += spans[i]
		if j.adds == nil {
			j.err = j.judge(span[0])
		} else {
			j.err = j.added(span)
		}
		j.copies = copies
		if j.err == nil && waitErr != nil {
			j.err = errs.New(errs.OutcomeUnknown, "the message is on the primary, and the wait for replicas failed: %v", waitErr)
		}
		broken = broken || j.err != nil && !isServerError(j.err)
		close(j.done)
	}
	if broken || waitErr != nil {
		conn.release()
	}
}
