package gateway

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/valkey-io/valkey-go"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// foreverMs stands for the expiry of an entry that another program wrote: 9999-12-31.
const foreverMs = 253402300799999

// delivery makes a delivery of {id, count, deadline, pairs}.
func (g *Gateway) delivery(topic, group string, row []valkey.ValkeyMessage, leased bool) (engine.Delivery, error) {
	var d engine.Delivery
	bad := func(err error) (engine.Delivery, error) {
		return d, errs.New(errs.Internal, "the upstream answered with a message that is none: %v", err)
	}
	if len(row) != 4 {
		return bad(nil)
	}
	text, err := row[0].ToString()
	if err != nil {
		return bad(err)
	}
	id, ok := parseID(text)
	if !ok || id.seq >= 1<<32 {
		return bad(nil)
	}
	var count uint64
	if text, err = row[1].ToString(); err == nil {
		count, err = strconv.ParseUint(text, 10, 32)
	}
	if err != nil {
		return bad(err)
	}
	if text, err = row[2].ToString(); err == nil {
		d.LeaseUntil, err = strconv.ParseInt(text, 10, 64)
	}
	if err != nil {
		return bad(err)
	}
	pairs, err := row[3].AsStrSlice()
	if err != nil {
		return bad(err)
	}
	d.ID, d.Stream, d.Count = id.message(), engine.StreamID{Ms: id.ms, Seq: id.seq}, uint32(count)
	d.PublishedAt, d.ExpiresAt = int64(min(id.ms, foreverMs)), foreverMs
	d.Receipt = engine.Receipt{Topic: groupHash(topic, group), Group: id.seq, Offset: id.ms}
	if leased {
		d.Receipt.Epoch = count
	}
	fill(&d, pairs)
	return d, nil
}

// fill takes the content out of an entry's fields.
func fill(d *engine.Delivery, pairs []string) {
	if len(pairs) < 4 || pairs[0] != fieldBody || pairs[2] != fieldType {
		d.ContentType, d.Body = bodyOf(pairs)
		return
	}
	d.Body, d.ContentType = []byte(pairs[1]), pairs[3]
	for i := 4; i+1 < len(pairs); i += 2 {
		name, value := pairs[i], pairs[i+1]
		if !strings.HasPrefix(name, fieldReserved) {
			d.Headers = append(d.Headers, engine.Header{Name: name, Value: value})
			continue
		}
		n, err := strconv.ParseInt(value, 10, 64)
		switch {
		case name == fieldDeployment:
			d.Deployment = value
		case err != nil:
		case name == fieldExpires:
			d.ExpiresAt = n
		case name == fieldPublished:
			d.PublishedAt = n
		case name == fieldID:
			d.ID = engine.MessageID{Index: uint64(n), Kind: engine.KindDelayed}
		}
	}
}

// receive leases messages, waiting for them if asked to.
func (g *Gateway) receive(ctx context.Context, c *engine.Receive, wait time.Duration) (raft.Reply, error) {
	if wait <= 0 {
		reply, _, err := g.tryReceive(ctx, c)
		return reply, err
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	w := g.waits.join(c.Topic)
	defer w.leave()
	// Whatever arrives once the watcher knows its place wakes this wait; what was there before, the first attempt finds.
	w.armed(ctx)
	for {
		reply, due, err := g.tryReceive(context.WithoutCancel(ctx), c)
		if err != nil || len(reply.Deliveries) > 0 {
			return reply, err
		}
		if !w.wait(ctx, due) {
			return reply, nil
		}
	}
}

// tryReceive leases what is there, and tells when something may become due.
func (g *Gateway) tryReceive(ctx context.Context, c *engine.Receive) (raft.Reply, time.Duration, error) {
	start := "0"
	if c.Latest {
		start = "$"
	}
	park := "0"
	if g.o.Park {
		park = "1"
	}
	args := []string{
		c.Group, g.o.Consumer, strconv.Itoa(c.Max), itoa(c.Visibility.Milliseconds()), strconv.Itoa(c.MaxConcurrency),
		start, c.Deployment, strconv.Itoa(g.o.MaxDeliveries), park,
	}
	var reply raft.Reply
	due := time.Duration(-1)
	err := g.up.call(ctx, false, func(client valkey.Client) error {
		answer, err := scriptReceive.Exec(ctx, client, keysOf(c.Topic, c.Group), args).ToArray()
		if err != nil {
			return err
		}
		if len(answer) != 4 {
			return errs.New(errs.Internal, "the upstream answered the receive script with %d parts", len(answer))
		}
		rows, err := answer[0].ToArray()
		if err != nil {
			return err
		}
		for _, row := range rows {
			parts, err := row.ToArray()
			if err != nil {
				return err
			}
			d, err := g.delivery(c.Topic, c.Group, parts, true)
			if err != nil {
				return err
			}
			reply.Deliveries = append(reply.Deliveries, d)
		}
		left, err := answer[1].ToInt64()
		if err != nil {
			return err
		}
		if left >= 0 {
			due = time.Duration(left) * time.Millisecond
		}
		busy, _ := answer[2].ToInt64()
		if limited, _ := answer[3].ToInt64(); limited == 1 {
			reply.Code, reply.Inflight = errs.ConcurrencyLimit, int(busy)
		}
		return nil
	})
	return reply, due, err
}

// receiveID leases one message by its ID.
func (g *Gateway) receiveID(ctx context.Context, c *engine.ReceiveID) (raft.Reply, error) {
	return g.byID(ctx, c, false, false)
}

// byID leases a message, or with peek looks at it. stale allows a look at a reader, which is believed only if it finds the
// message.
func (g *Gateway) byID(ctx context.Context, c *engine.ReceiveID, peek, stale bool) (raft.Reply, error) {
	var reply raft.Reply
	id := c.ID
	if id.Kind == engine.KindDuplicate {
		// A duplicate is judged by whether its original lives.
		original := id.Original()
		look := *c
		look.ID = original
		found, err := g.byID(ctx, &look, true, false)
		if err != nil {
			return reply, err
		}
		if reply.Code = errs.Duplicate; found.Code == errs.MessageNotFound {
			reply.Code = errs.MessageNotFound
		}
		reply.Original = original
		return reply, nil
	}
	kind, text := "p", entryID(id)
	if id.Kind == engine.KindDelayed {
		kind, text = "d", strconv.FormatUint(id.Index, 10)
	}
	args := []string{c.Group, g.o.Consumer, kind, text, itoa(c.Visibility.Milliseconds()), strconv.Itoa(c.MaxConcurrency), c.Deployment, "0"}
	if peek {
		args[7] = "1"
	}
	script := scriptReceiveID
	run := func(client valkey.Client) error {
		reply = raft.Reply{}
		answer, err := script.Exec(ctx, client, keysOf(c.Topic, c.Group), args).ToArray()
		if err != nil {
			return err
		}
		if len(answer) == 0 {
			return errs.New(errs.Internal, "the upstream answered the script of a receive by ID with nothing")
		}
		status, err := answer[0].ToString()
		if err != nil {
			return err
		}
		var n int64
		if len(answer) == 2 && status != "ok" {
			text, err := answer[1].ToString()
			if err != nil {
				return err
			}
			if n, err = strconv.ParseInt(text, 10, 64); err != nil {
				return err
			}
		}
		switch status {
		case "ok":
			parts, err := answer[1].ToArray()
			if err != nil {
				return err
			}
			d, err := g.delivery(c.Topic, c.Group, parts, !peek)
			if err != nil {
				return err
			}
			reply.Deliveries = []engine.Delivery{d}
		case "gone":
			reply.Code = errs.MessageNotFound
		case "acknowledged":
			reply.Code = errs.AlreadyAcknowledged
		case "leased":
			reply.Code, reply.RetryAfter = errs.LeasedElsewhere, time.Duration(n)*time.Millisecond
		case "delayed":
			reply.Code, reply.RetryAfter = errs.NotYetVisible, time.Duration(n)*time.Millisecond
		case "limited":
			reply.Code, reply.Inflight = errs.ConcurrencyLimit, int(n)
		default:
			return errs.New(errs.Internal, "the upstream answered a receive by ID with %q", status)
		}
		return nil
	}
	if peek {
		script = scriptLookID
		if stale && g.reader.use(ctx, run) && reply.Code == errs.OK {
			return reply, nil
		}
	}
	err := g.up.call(ctx, peek, run)
	return reply, err
}

// settle ends or changes leases.
func (g *Gateway) settle(ctx context.Context, c *engine.Settle) (raft.Reply, error) {
	var reply raft.Reply
	reply.Codes = make([]errs.Code, len(c.Receipts))
	hash := groupHash(c.Topic, c.Group)
	operation := "extend"
	switch {
	case c.Op == engine.Acknowledge:
		operation = "ack"
	case c.Visibility == 0:
		operation = "release"
	}
	args := []string{c.Group, operation, itoa(c.Visibility.Milliseconds()), "", c.Deployment}
	var asked []int
	for i, r := range c.Receipts {
		if r.Topic != hash {
			reply.Codes[i] = errs.MessageNotFound
			continue
		}
		asked = append(asked, i)
		args = append(args, streamID{r.Offset, r.Group}.String(), strconv.FormatUint(r.Epoch, 10))
	}
	if len(asked) == 0 {
		return reply, nil
	}
	err := g.up.call(ctx, false, func(client valkey.Client) error {
		answer, err := scriptSettle.Exec(ctx, client, keysOf(c.Topic, c.Group), args).ToArray()
		if err != nil {
			return err
		}
		if len(answer) != 2 {
			return errs.New(errs.Internal, "the upstream answered the settle script with %d parts", len(answer))
		}
		codes, err := answer[0].AsStrSlice()
		if err != nil || len(codes) != len(asked) {
			return errs.New(errs.Internal, "the upstream answered the settle script with %d codes for %d leases: %v", len(codes), len(asked), err)
		}
		for i, code := range codes {
			reply.Codes[asked[i]] = settled[code]
		}
		limit, err := answer[1].ToString()
		if err == nil {
			reply.ExpiresAt, err = strconv.ParseInt(limit, 10, 64)
		}
		return err
	})
	if err == nil && operation == "release" {
		g.waits.wake(c.Topic)
	}
	return reply, err
}

// settled translates the settle script's codes.
var settled = map[string]errs.Code{
	"ok": errs.OK, "gone": errs.MessageNotFound, "stale": errs.NotHolder, "released": errs.NotInFlight,
	"over": errs.LeaseExpired, "expiry": errs.ExtendPastExpiry,
}

// peek shows what a receive would be given.
func (g *Gateway) peek(ctx context.Context, q engine.Query) ([]engine.Delivery, error) {
	var ds []engine.Delivery
	args := []string{q.Group, strconv.Itoa(max(q.Max, 1)), q.Deployment}
	run := func(client valkey.Client) error {
		ds = ds[:0]
		rows, err := scriptLook.Exec(ctx, client, keysOf(q.Topic, q.Group), args).ToArray()
		if err != nil {
			return err
		}
		for _, row := range rows {
			parts, err := row.ToArray()
			if err != nil {
				return err
			}
			d, err := g.delivery(q.Topic, q.Group, parts, false)
			if err != nil {
				return err
			}
			ds = append(ds, d)
		}
		return nil
	}
	if g.reader.use(ctx, run) {
		return ds, nil
	}
	err := g.up.call(ctx, true, run)
	return ds, err
}

// message shows one message.
func (g *Gateway) message(ctx context.Context, q engine.Query) ([]engine.Delivery, error) {
	reply, err := g.byID(ctx, &engine.ReceiveID{Topic: q.Topic, Group: q.Group, ID: q.ID, Deployment: q.Deployment}, true, true)
	if err != nil {
		return nil, err
	}
	if reply.Code != errs.OK {
		e := errs.Of(reply.Code)
		e.RetryAfter = reply.RetryAfter
		return nil, e
	}
	return reply.Deliveries, nil
}
