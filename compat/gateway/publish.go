package gateway

import (
	"context"
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/valkey-io/valkey-go"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
)

// Fields of an entry that the gateway wrote. The application's headers stand between fieldType and the reserved ones.
const (
	fieldBody       = "body"
	fieldType       = "content-type"
	fieldReserved   = "tercet-"
	fieldDeployment = "tercet-deployment"
	fieldExpires    = "tercet-expires"
	fieldID         = "tercet-id"
	fieldPublished  = "tercet-published"
)

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

// publish stores messages. Without keys and delays each is one XADD; otherwise a script decides.
func (g *Gateway) publish(ctx context.Context, c *engine.Publish, require raft.Require) (raft.Reply, error) {
	for i := range c.Messages {
		if c.Messages[i].RetentionDefault { // there are no settings of topics here
			c.Messages[i].Retention = limits.RetentionDefault
		}
	}
	special := slices.ContainsFunc(c.Messages, func(m engine.NewMessage) bool { return m.Key != "" || m.Delay > 0 })
	for i := range c.Messages {
		for _, h := range c.Messages[i].Headers {
			if strings.HasPrefix(h.Name, fieldReserved) {
				return raft.Reply{}, errs.New(errs.InvalidHeader, "headers named %s… are the gateway's own", fieldReserved)
			}
		}
	}
	worth := g.o.Worth
	if require == raft.AllZones {
		worth.Replicas = max(worth.Replicas, g.found.Replicas)
	}
	job := &publishJob{topic: c.Topic, worth: worth}
	if special {
		job.script(c)
	} else {
		job.plain(c, g.serverNow())
	}
	// A publish under keys can be repeated: what was stored is recognised.
	repeatable := special && !slices.ContainsFunc(c.Messages, func(m engine.NewMessage) bool { return m.Key == "" })
	var copies int64
	err := g.up.call(ctx, repeatable, func(client valkey.Client) error {
		var err error
		if worth.Replicas == 0 && !worth.Fsync {
			err = job.run(ctx, client)
		} else {
			copies, err = g.lanes.run(ctx, client, job)
		}
		return err
	})
	if err != nil {
		return raft.Reply{}, err
	}
	if copies < int64(worth.Replicas) {
		return raft.Reply{}, errs.New(errs.OutcomeUnknown, "the message is on the primary, and only %d of %d replicas confirmed it within %s",
			copies, worth.Replicas, worth.Timeout)
	}
	reply := raft.Reply{Zones: 1 + int(copies)}
	reply.Published.Count = uint32(len(c.Messages))
	reply.Published.IDs = job.ids
	g.waits.wake(c.Topic)
	return reply, nil
}

// publishJob is one publish as commands, and what came of it.
type publishJob struct {
	topic string
	worth Worth
	adds  [][]string // arguments of XADD behind the key
	keys  []string   // of the script, when adds is nil
	args  []string
	ids   []engine.MessageID
}

// plain makes an XADD of each message.
func (j *publishJob) plain(c *engine.Publish, now int64) {
	j.adds = make([][]string, len(c.Messages))
	for i := range c.Messages {
		m := &c.Messages[i]
		pairs := entryOf(m)
		j.adds[i] = append(pairs, fieldExpires, itoa(now+m.Retention.Milliseconds()))
	}
}

// script makes one script call of all messages.
func (j *publishJob) script(c *engine.Publish) {
	j.keys = keysOf(c.Topic, "")
	for i := range c.Messages {
		m := &c.Messages[i]
		key := 0
		if m.Key != "" {
			j.keys = append(j.keys, idempotencyKey(c.Topic, m.Deployment, m.Key))
			key = len(j.keys)
		}
		pairs := entryOf(m)
		j.args = append(j.args, strconv.Itoa(key), itoa(m.Retention.Milliseconds()), itoa(m.Delay.Milliseconds()), strconv.Itoa(len(pairs)))
		j.args = append(j.args, pairs...)
	}
}

// entryOf is a message as field-value pairs.
func entryOf(m *engine.NewMessage) []string {
	pairs := make([]string, 0, 4+2*len(m.Headers)+4)
	pairs = append(pairs, fieldBody, valkey.BinaryString(m.Body), fieldType, m.ContentType)
	for _, h := range m.Headers {
		pairs = append(pairs, h.Name, h.Value)
	}
	if m.Deployment != "" {
		pairs = append(pairs, fieldDeployment, m.Deployment)
	}
	return pairs
}

// commands are the job's XADDs.
func (j *publishJob) commands(c valkey.Client) []valkey.Completed {
	cmds := make([]valkey.Completed, len(j.adds))
	for i, pairs := range j.adds {
		cmds[i] = c.B().Arbitrary("XADD").Keys(j.topic).Args("*").Args(pairs...).Build()
	}
	return cmds
}

// run carries the job out on a client that pipelines by itself.
func (j *publishJob) run(ctx context.Context, c valkey.Client) error {
	if j.adds == nil {
		return j.judge(scriptPublish.Exec(ctx, c, j.keys, j.args))
	}
	return j.added(c.DoMulti(ctx, j.commands(c)...))
}

// added reads the answers of the XADDs.
func (j *publishJob) added(answers []valkey.ValkeyResult) error {
	j.ids = make([]engine.MessageID, len(answers))
	for i, a := range answers {
		text, err := a.ToString()
		if err != nil {
			if i > 0 && (moved(err) || neverSent(err)) {
				// Some of the messages are stored: the publish as a whole must not be repeated.
				return errs.New(errs.OutcomeUnknown, "%d of %d messages were stored before the upstream failed: %v", i, len(answers), err)
			}
			return err
		}
		id, ok := parseID(text)
		if !ok {
			return errs.New(errs.Internal, "the upstream answered XADD with %q", text)
		}
		j.ids[i] = id.message()
	}
	return nil
}

// judge reads the answer of the script.
func (j *publishJob) judge(a valkey.ValkeyResult) error {
	rows, err := a.ToArray()
	if err != nil {
		return err
	}
	j.ids = make([]engine.MessageID, len(rows))
	for i, row := range rows {
		texts, err := row.AsStrSlice()
		if err != nil || len(texts) < 2 {
			return errs.New(errs.Internal, "the upstream answered the publish script with row %d that is none: %v", i, err)
		}
		if j.ids[i], err = publishedID(texts); err != nil {
			return err
		}
	}
	return nil
}

// publishedID reads {kind, id[, original]}.
func publishedID(row []string) (engine.MessageID, error) {
	switch row[0] {
	case "p":
		if id, ok := parseID(row[1]); ok {
			return id.message(), nil
		}
	case "d":
		if n, err := strconv.ParseUint(row[1], 10, 64); err == nil {
			return engine.MessageID{Index: n, Kind: engine.KindDelayed}, nil
		}
	case "x":
		if len(row) == 3 && row[2] != "" {
			original, err := publishedID([]string{row[2][:1], row[2][1:]})
			n, err2 := strconv.ParseUint(row[1], 10, 64)
			if err == nil && err2 == nil {
				return engine.MessageID{
					Index: n, Kind: engine.KindDuplicate,
					OriginalIndex: original.Index, OriginalPos: original.Pos, OriginalKind: original.Kind,
				}, nil
			}
		}
	}
	return engine.MessageID{}, errs.New(errs.Internal, "the upstream answered the publish script with %q", row)
}

// streamID is the ID of an entry.
type streamID struct{ ms, seq uint64 }

func parseID(s string) (streamID, bool) {
	ms, seq, ok := strings.Cut(s, "-")
	if !ok {
		return streamID{}, false
	}
	a, err := strconv.ParseUint(ms, 10, 64)
	b, err2 := strconv.ParseUint(seq, 10, 64)
	return streamID{a, b}, err == nil && err2 == nil
}

// message is the entry's ID as one of the queue protocol. Only entries with a sequence below 2^32 have one; entries
// that other programs gave higher numbers stay theirs.
func (id streamID) message() engine.MessageID {
	return engine.MessageID{Index: id.ms, Pos: uint32(id.seq), Kind: engine.KindPlain}
}

func (id streamID) String() string {
	return strconv.FormatUint(id.ms, 10) + "-" + strconv.FormatUint(id.seq, 10)
}

// entryID is the text of a plain message's entry ID.
func entryID(id engine.MessageID) string { return streamID{id.Index, uint64(id.Pos)}.String() }

// bodyOf turns fields that were not written by the gateway into a body: a JSON object where names are unique and
// everything is UTF-8, else a list of pairs in base64.
func bodyOf(pairs []string) (contentType string, body []byte) {
	unique := make(map[string]bool, len(pairs)/2)
	object := true
	for i := 0; i+1 < len(pairs); i += 2 {
		if unique[pairs[i]] || !utf8.ValidString(pairs[i]) || !utf8.ValidString(pairs[i+1]) {
			object = false
			break
		}
		unique[pairs[i]] = true
	}
	if !object {
		list := make([][2][]byte, 0, len(pairs)/2)
		for i := 0; i+1 < len(pairs); i += 2 {
			list = append(list, [2][]byte{[]byte(pairs[i]), []byte(pairs[i+1])})
		}
		body, _ = json.Marshal(list) // []byte marshals as base64
		return "application/json", body
	}
	body = []byte{'{'}
	for i := 0; i+1 < len(pairs); i += 2 {
		if i > 0 {
			body = append(body, ',')
		}
		name, _ := json.Marshal(pairs[i])
		value, _ := json.Marshal(pairs[i+1])
		body = append(append(append(body, name...), ':'), value...)
	}
	return "application/json", append(body, '}')
}

// serverNow is the upstream's time in Unix milliseconds, as far as this process knows it.
func (g *Gateway) serverNow() int64 {
	return time.Now().UnixMilli() + g.found.clockAhead.Milliseconds()
}
