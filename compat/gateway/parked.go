package gateway

import (
	"context"
	"strconv"

	"github.com/valkey-io/valkey-go"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/raft"
)

// changeParked makes dead letters deliverable again, or ends them.
func (g *Gateway) changeParked(ctx context.Context, c *engine.Parked) (reply raft.Reply, err error) {
	operation := "drop"
	if c.Op == engine.Redrive {
		operation = "redrive"
	}
	reply.Count, reply.Next, _, err = g.parked(ctx, c, operation, "")
	if err == nil && reply.Count > 0 {
		g.waits.wake(c.Topic)
	}
	return reply, err
}

// parked runs one operation on the dead letters of a group. From and next are ranks, one too high: 0 is the beginning and
// the end.
func (g *Gateway) parked(ctx context.Context, c *engine.Parked, operation, deployment string) (count int64, next uint64, rows []engine.ParkedMessage, err error) {
	rank, dry := uint64(0), "0"
	if c.From > 0 {
		rank = c.From - 1
	}
	if c.DryRun {
		dry = "1"
	}
	args := []string{c.Group, operation, strconv.Itoa(c.Max), strconv.FormatUint(rank, 10), dry, c.Filter.Error, itoa(c.Filter.Since), itoa(c.Filter.Until), deployment}
	for _, id := range c.Filter.IDs {
		if id.Kind == engine.KindDelayed {
			args = append(args, "d"+strconv.FormatUint(id.Index, 10))
		} else {
			args = append(args, "p"+entryID(id))
		}
	}
	err = g.up.call(ctx, operation != "redrive", func(client valkey.Client) error {
		answer, err := scriptParked.Exec(ctx, client, keysOf(c.Topic, c.Group), args).ToArray()
		if err != nil {
			return err
		}
		if len(answer) != 3 {
			return errs.New(errs.Internal, "the upstream answered the script of dead letters with %d parts", len(answer))
		}
		if count, err = answer[0].AsInt64(); err != nil {
			return err
		}
		if next, err = answer[1].AsUint64(); err != nil {
			return err
		}
		list, err := answer[2].ToArray()
		if err != nil {
			return err
		}
		rows = make([]engine.ParkedMessage, 0, len(list))
		for _, row := range list {
			parts, err := row.ToArray()
			if err != nil || len(parts) != 5 {
				return errs.New(errs.Internal, "the upstream answered with a dead letter that is none: %v", err)
			}
			p := engine.ParkedMessage{}
			if p.Delivery, err = g.delivery(c.Topic, c.Group, parts[:4], false); err != nil {
				return err
			}
			p.ParkedAt, p.Delivery.LeaseUntil = p.Delivery.LeaseUntil, 0
			if p.Error, err = parts[4].ToString(); err != nil {
				return err
			}
			rows = append(rows, p)
		}
		return nil
	})
	return count, next, rows, err
}
