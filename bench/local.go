package bench

import (
	"bytes"
	"context"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
	"tercet.dev/tercet/raft"
	"tercet.dev/tercet/server/wire"
)

// Node is what a load inside a node's own process needs of it. *raft.Node is one.
type Node interface {
	Propose(ctx context.Context, p raft.Proposal) (raft.Reply, error)
}

var _ Node = (*raft.Node)(nil)

// NodeDriver drives a node from inside its process: the replicated queue without HTTP. Commands are encoded
// beforehand, so that a publish costs what the node makes of it and next to nothing before that.
type NodeDriver struct {
	Node     Node
	Workload Workload

	commands [][]byte
}

// Prepare encodes the commands that publishers propose. It is called once, before the driver is used.
func (d *NodeDriver) Prepare() {
	w := d.Workload
	if w.Publishers == 0 || w.Stamped {
		return
	}
	source := newBodies(w.Seed)
	d.commands = make([][]byte, poolSize(w.Size*w.Batch))
	for i := range d.commands {
		d.commands[i] = d.command(func() []byte { return source.next(w.Size) })
	}
}

func (d *NodeDriver) command(body func() []byte) []byte {
	w := d.Workload
	publish := engine.Publish{Topic: w.Topic, Messages: make([]engine.NewMessage, w.Batch)}
	for i := range publish.Messages {
		publish.Messages[i] = engine.NewMessage{ContentType: wire.MediaOctets, Retention: w.Retention, Body: body()}
	}
	return publish.AppendTo(make([]byte, 0, 64+len(w.Topic)+w.Batch*(w.Size+64)))
}

// Publisher implements Driver.
func (d *NodeDriver) Publisher(i int) (Publisher, error) {
	p := &nodePublisher{d: d, next: i * len(d.commands) / d.Workload.Publishers, stamp: Stamp{Publisher: uint32(i)}}
	if d.Workload.AllZones {
		p.require = raft.AllZones
	}
	if d.Workload.Stamped {
		p.body = newBodies(d.Workload.Seed + uint64(i)).next(d.Workload.Size)
	}
	return p, nil
}

type nodePublisher struct {
	d       *NodeDriver
	require raft.Require
	next    int
	stamp   Stamp
	body    []byte // of a stamped workload
}

// Publish implements Publisher.
func (p *nodePublisher) Publish(ctx context.Context) (Ack, error) {
	var command []byte
	if p.body != nil {
		p.stamp.Number++
		p.stamp.put(p.body)
		command = p.d.command(func() []byte { return p.body })
	} else {
		command = p.d.commands[p.next%len(p.d.commands)]
		p.next++
	}
	reply, err := p.d.Node.Propose(ctx, raft.Proposal{Command: command, Require: p.require})
	if err == nil && reply.Code != errs.OK {
		err = errs.Of(reply.Code)
	}
	if err != nil {
		return Ack{Stamp: p.stamp}, err
	}
	return Ack{Messages: p.d.Workload.Batch, Zones: reply.Zones, Stamp: p.stamp}, nil
}

// Close implements Publisher.
func (p *nodePublisher) Close() error { return nil }

// Consumer implements Driver.
func (d *NodeDriver) Consumer(int) (Consumer, error) {
	receive := engine.Receive{
		Topic: d.Workload.Topic, Group: d.Workload.Group, Max: d.Workload.ReceiveMax, Visibility: limits.VisibilityDefault,
	}
	return &nodeConsumer{d: d, receive: receive.AppendTo(nil)}, nil
}

type nodeConsumer struct {
	d        *NodeDriver
	receive  []byte
	receipts []engine.Receipt
}

// Receive implements Consumer.
func (c *nodeConsumer) Receive(ctx context.Context) (int, error) {
	c.receipts = c.receipts[:0]
	reply, err := c.d.Node.Propose(ctx, raft.Proposal{Command: bytes.Clone(c.receive), Wait: receiveWait})
	if err == nil && reply.Code != errs.OK {
		err = errs.Of(reply.Code)
	}
	if err != nil {
		return 0, err
	}
	for i := range reply.Deliveries {
		c.receipts = append(c.receipts, reply.Deliveries[i].Receipt)
	}
	return len(c.receipts), nil
}

// Settle implements Consumer.
func (c *nodeConsumer) Settle(ctx context.Context) (int, error) {
	settle := engine.Settle{
		Topic: c.d.Workload.Topic, Group: c.d.Workload.Group, Op: engine.Acknowledge, Receipts: c.receipts,
	}
	reply, err := c.d.Node.Propose(ctx, raft.Proposal{Command: settle.AppendTo(nil)})
	if err == nil && reply.Code != errs.OK {
		err = errs.Of(reply.Code)
	}
	if err != nil {
		return 0, err
	}
	done := 0
	for _, code := range reply.Codes {
		if code == errs.OK {
			done++
		} else {
			err = errs.Of(code)
		}
	}
	return done, err
}

// Close implements Consumer.
func (c *nodeConsumer) Close() error { return nil }
