package server

import (
	"context"
	"strconv"
	"strings"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// ContactOptions name the stream behind the contact-form template's routes. Zero values are the template's.
type ContactOptions struct {
	// Stream and Group (default contact-messages and contact-processors).
	Stream, Group string
	// Timeout is how long a consumer may hold a message before another one gets it (default 60 s).
	Timeout time.Duration
	// Keep bounds the stream's length, about (default 10 000).
	Keep uint64
}

// SetDefaults fills what is not set with the template's values.
func (o *ContactOptions) SetDefaults() {
	if o.Stream == "" {
		o.Stream = "contact-messages"
	}
	if o.Group == "" {
		o.Group = "contact-processors"
	}
	if o.Timeout <= 0 {
		o.Timeout = 60 * time.Second
	}
	if o.Keep == 0 {
		o.Keep = 10_000
	}
}

// NodeContact keeps the contact form's messages in a stream of the cluster, as the template would through the Valkey
// port: plain entries, one group, takeover after a time-out. A ContactStore.
type NodeContact struct {
	backend Backend
	o       ContactOptions
}

// NewNodeContact returns the store on a node.
func NewNodeContact(backend Backend, o ContactOptions) *NodeContact {
	o.SetDefaults()
	return &NodeContact{backend: backend, o: o}
}

// Topic implements ContactStore.
func (c *NodeContact) Topic() string { return c.o.Stream }

// do has a stream command applied.
func (c *NodeContact) do(ctx context.Context, command engine.Command) (raft.Reply, error) {
	reply, err := c.backend.Propose(ctx, raft.Proposal{Command: command.AppendTo(nil)})
	if err == nil && reply.Code != errs.OK {
		err = errs.Of(reply.Code)
	}
	return reply, err
}

// Produce implements ContactStore.
func (c *NodeContact) Produce(ctx context.Context, m ContactMessage) (string, error) {
	add := engine.StreamAdd{Key: c.o.Stream, Trim: engine.Trim{By: engine.TrimMaxLen, MaxLen: c.o.Keep, Approx: true}}
	for _, s := range []string{"name", m.Name, "email", m.Email, "message", m.Message, "timestamp", m.Timestamp} {
		add.Fields = append(add.Fields, []byte(s))
	}
	reply, err := c.do(ctx, &add)
	if err != nil {
		return "", err
	}
	return streamIDText(reply.Published.Stream), nil
}

// Consume implements ContactStore.
func (c *NodeContact) Consume(ctx context.Context, consumer string) (*ContactDelivery, error) {
	d, err := c.consume(ctx, consumer)
	if err == nil {
		return d, nil
	}
	if code := errs.From(err).Code; code == errs.GroupNotFound || code == errs.TopicNotFound {
		create := engine.StreamGroup{Op: engine.GroupCreate, Key: c.o.Stream, Group: c.o.Group, Create: true, EntriesRead: -1}
		if _, err := c.do(ctx, &create); err != nil && errs.From(err).Code != errs.GroupExists {
			return nil, err
		}
		return c.consume(ctx, consumer)
	}
	return d, err
}

// consume looks at the consumer's own pending entries, then at those held too long by others, then at new ones. The
// first is a query: reading one's own entries as XREADGROUP does would renew them for ever.
func (c *NodeContact) consume(ctx context.Context, consumer string) (*ContactDelivery, error) {
	for {
		held, err := c.pending(ctx, engine.StreamQuery{End: engine.StreamIDMax, Count: 1, Consumer: consumer})
		if err != nil {
			return nil, err
		}
		if len(held) == 0 {
			break
		}
		own := held[0]
		if own.Idle >= c.o.Timeout.Milliseconds() {
			break // like everybody's that was held too long
		}
		answer, err := c.backend.Query(ctx, engine.Query{Kind: engine.QueryStreamRange, Topic: c.o.Stream,
			Stream: &engine.StreamQuery{Start: own.ID, End: own.ID, Count: 1}})
		if err != nil {
			return nil, err
		}
		if answer.Stream != nil && len(answer.Stream.Reads) > 0 && len(answer.Stream.Reads[0].Entries) > 0 {
			return contactOf(&answer.Stream.Reads[0].Entries[0], own.Count), nil
		}
		// Trimmed or deleted since: nothing is left to show.
		if _, err := c.do(ctx, &engine.StreamAck{Key: c.o.Stream, Group: c.o.Group, IDs: []engine.StreamID{own.ID}}); err != nil {
			return nil, err
		}
	}
	claimed, err := c.do(ctx, &engine.StreamAutoClaim{Key: c.o.Stream, Group: c.o.Group, Consumer: consumer,
		MinIdle: c.o.Timeout.Milliseconds(), Count: 1})
	if err != nil {
		return nil, err
	}
	if claimed.Stream != nil {
		for i := range claimed.Stream.Entries {
			e := &claimed.Stream.Entries[i]
			if e.Deleted {
				continue
			}
			own, err := c.pending(ctx, engine.StreamQuery{Start: e.ID, End: e.ID, Count: 1})
			if err != nil {
				return nil, err
			}
			if len(own) == 0 {
				return contactOf(e, 1), nil
			}
			return contactOf(e, own[0].Count), nil
		}
	}
	read, err := c.do(ctx, &engine.StreamReadGroup{Group: c.o.Group, Consumer: consumer, Count: 1,
		Streams: []engine.StreamPosition{{Key: c.o.Stream, New: true}}})
	if err != nil || read.Stream == nil {
		return nil, err
	}
	for i := range read.Stream.Reads {
		for k := range read.Stream.Reads[i].Entries {
			return contactOf(&read.Stream.Reads[i].Entries[k], 1), nil
		}
	}
	return nil, nil
}

// pending lists pending entries of the group.
func (c *NodeContact) pending(ctx context.Context, q engine.StreamQuery) ([]engine.PendingEntry, error) {
	answer, err := c.backend.Query(ctx, engine.Query{Kind: engine.QueryPendingRange, Topic: c.o.Stream, Group: c.o.Group, Stream: &q})
	if err != nil || answer.Stream == nil || answer.Stream.Pending == nil {
		return nil, err
	}
	return answer.Stream.Pending.Entries, nil
}

// contactOf reads an entry's fields.
func contactOf(e *engine.StreamEntry, count uint64) *ContactDelivery {
	d := &ContactDelivery{ID: streamIDText(e.ID), DeliveryCount: int64(max(count, 1))}
	for i := 0; i+1 < len(e.Fields); i += 2 {
		value := string(e.Fields[i+1])
		switch string(e.Fields[i]) {
		case "name":
			d.Name = value
		case "email":
			d.Email = value
		case "message":
			d.Message = value
		case "timestamp":
			d.Timestamp = value
		}
	}
	return d
}

// Acknowledge implements ContactStore.
func (c *NodeContact) Acknowledge(ctx context.Context, id string) (int, error) {
	ms, seq, ok := strings.Cut(id, "-")
	a, err := strconv.ParseUint(ms, 10, 64)
	b, err2 := strconv.ParseUint(seq, 10, 64)
	if !ok || err != nil || err2 != nil {
		return 0, nil // no message was ever called that
	}
	reply, err := c.do(ctx, &engine.StreamAck{Key: c.o.Stream, Group: c.o.Group, IDs: []engine.StreamID{{Ms: a, Seq: b}}})
	if err != nil {
		return 0, err
	}
	return int(reply.Count), nil
}

func streamIDText(id engine.StreamID) string {
	return strconv.FormatUint(id.Ms, 10) + "-" + strconv.FormatUint(id.Seq, 10)
}
