package gateway

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/valkey-io/valkey-go"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server"
)

// Contact is the contact-form template's stream on the upstream, as the template itself uses it: plain entries, one
// consumer group, pending entries that another consumer takes over after a time-out. A server.ContactStore.
type Contact struct {
	g *Gateway
	o server.ContactOptions
}

// Contact returns the template's store on this gateway.
func (g *Gateway) Contact(o server.ContactOptions) *Contact {
	o.SetDefaults()
	return &Contact{g: g, o: o}
}

// Topic implements server.ContactStore.
func (c *Contact) Topic() string { return c.o.Stream }

// Produce implements server.ContactStore.
func (c *Contact) Produce(ctx context.Context, m server.ContactMessage) (id string, err error) {
	err = c.g.up.call(ctx, false, func(v valkey.Client) error {
		id, err = v.Do(ctx, v.B().Xadd().Key(c.o.Stream).Maxlen().Almost().Threshold(strconv.FormatUint(c.o.Keep, 10)).Id("*").
			FieldValue().FieldValue("name", m.Name).FieldValue("email", m.Email).FieldValue("message", m.Message).
			FieldValue("timestamp", m.Timestamp).Build()).ToString()
		return err
	})
	return id, err
}

// Consume implements server.ContactStore.
func (c *Contact) Consume(ctx context.Context, consumer string) (d *server.ContactDelivery, err error) {
	err = c.g.up.call(ctx, false, func(v valkey.Client) error {
		d, err = c.consume(ctx, v, consumer)
		if err != nil && strings.HasPrefix(err.Error(), "NOGROUP") {
			err = v.Do(ctx, v.B().XgroupCreate().Key(c.o.Stream).Group(c.o.Group).Id("0").Mkstream().Build()).Error()
			if err == nil || strings.HasPrefix(err.Error(), "BUSYGROUP") {
				d, err = c.consume(ctx, v, consumer)
			}
		}
		return err
	})
	return d, err
}

// consume looks at the consumer's own pending entries, then at those held too long by others, then at new ones.
func (c *Contact) consume(ctx context.Context, v valkey.Client, consumer string) (*server.ContactDelivery, error) {
	// Reading one's own entries with XREADGROUP would count as deliveries and renew them for ever; looking does not.
	for {
		rows, err := v.Do(ctx, v.B().Xpending().Key(c.o.Stream).Group(c.o.Group).Start("-").End("+").Count(1).Consumer(consumer).Build()).ToArray()
		if err != nil {
			return nil, err
		}
		if len(rows) == 0 {
			break
		}
		own, err := pendingOf(rows[0])
		if err != nil {
			return nil, err
		}
		if own.idle >= c.o.Timeout {
			break // like everybody's that was held too long
		}
		entries, err := v.Do(ctx, v.B().Xrange().Key(c.o.Stream).Start(own.id).End(own.id).Build()).AsXRange()
		if err != nil {
			return nil, err
		}
		if len(entries) > 0 {
			return contactDelivery(entries[0], own.count), nil
		}
		// Trimmed or deleted since: nothing is left to show.
		if err := v.Do(ctx, v.B().Xack().Key(c.o.Stream).Group(c.o.Group).Id(own.id).Build()).Error(); err != nil {
			return nil, err
		}
	}
	claimed, err := v.Do(ctx, v.B().Xautoclaim().Key(c.o.Stream).Group(c.o.Group).Consumer(consumer).
		MinIdleTime(strconv.FormatInt(c.o.Timeout.Milliseconds(), 10)).Start("0-0").Count(1).Build()).ToArray()
	if err != nil {
		return nil, err
	}
	if len(claimed) >= 2 {
		entries, err := claimed[1].AsXRange()
		if err != nil {
			return nil, err
		}
		if len(entries) > 0 && len(entries[0].FieldValues) > 0 {
			id := entries[0].ID
			rows, err := v.Do(ctx, v.B().Xpending().Key(c.o.Stream).Group(c.o.Group).Start(id).End(id).Count(1).Build()).ToArray()
			if err != nil {
				return nil, err
			}
			count := int64(1)
			if len(rows) > 0 {
				own, err := pendingOf(rows[0])
				if err != nil {
					return nil, err
				}
				count = own.count
			}
			return contactDelivery(entries[0], count), nil
		}
	}
	fresh, err := v.Do(ctx, v.B().Xreadgroup().Group(c.o.Group, consumer).Count(1).Streams().Key(c.o.Stream).Id(">").Build()).AsXRead()
	switch {
	case valkey.IsValkeyNil(err):
		return nil, nil
	case err != nil:
		return nil, err
	case len(fresh[c.o.Stream]) == 0:
		return nil, nil
	}
	return contactDelivery(fresh[c.o.Stream][0], 1), nil
}

// pendingEntry is a line of the long form of XPENDING.
type pendingEntry struct {
	id    string
	idle  time.Duration
	count int64
}

func pendingOf(row valkey.ValkeyMessage) (p pendingEntry, err error) {
	parts, err := row.ToArray()
	if err != nil || len(parts) != 4 {
		return p, errs.New(errs.Internal, "the upstream answered XPENDING with a line of %d parts: %v", len(parts), err)
	}
	if p.id, err = parts[0].ToString(); err != nil {
		return p, err
	}
	idle, err := parts[2].AsInt64()
	if err != nil {
		return p, err
	}
	p.idle = time.Duration(idle) * time.Millisecond
	p.count, err = parts[3].AsInt64()
	return p, err
}

func contactDelivery(e valkey.XRangeEntry, count int64) *server.ContactDelivery {
	return &server.ContactDelivery{ID: e.ID, ContactMessage: server.ContactMessage{
		Name: e.FieldValues["name"], Email: e.FieldValues["email"], Message: e.FieldValues["message"], Timestamp: e.FieldValues["timestamp"],
	}, DeliveryCount: count}
}

// Acknowledge implements server.ContactStore.
func (c *Contact) Acknowledge(ctx context.Context, id string) (int, error) {
	if _, ok := parseID(id); !ok {
		return 0, nil // no message was ever called that
	}
	var n int64
	err := c.g.up.call(ctx, true, func(v valkey.Client) error {
		var err error
		n, err = v.Do(ctx, v.B().Xack().Key(c.o.Stream).Group(c.o.Group).Id(id).Build()).AsInt64()
		return err
	})
	if e, ok := errors.AsType[*errs.Error](err); ok && strings.Contains(e.Error(), "NOGROUP") {
		return 0, nil
	}
	return int(n), err
}
