package bench

import (
	"bytes"
	"context"
	"time"

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

// submitter is a Node that takes commands without waiting for their results.
type submitter interface {
	Submit(p raft.Proposal, done func(raft.Reply, error))
}

// NodeDriver drives a node from inside its process: the replicated queue without HTTP. Commands are encoded
// beforehand, so that a publish costs what the node makes of it and next to nothing before that.
type NodeDriver struct {
	Node     Node
	Workload Workload

	requests *requests
}

// Prepare encodes the commands that publishers propose. It is called once, before the driver is used.
func (d *NodeDriver) Prepare() {
	if d.Workload.Publishers > 0 {
		d.requests = prepare(d.Workload, d.command)
	}
}

func (d *NodeDriver) command(topic string, bodies [][]byte) request {
	publish := engine.Publish{Topic: topic, Messages: make([]engine.NewMessage, len(bodies))}
	room := 64 + len(topic)
	for i, body := range bodies {
		publish.Messages[i] = engine.NewMessage{ContentType: wire.MediaOctets, Retention: d.Workload.Retention, Delay: d.Workload.Delay, Body: body}
		if d.Workload.Keyed {
			publish.Messages[i].Key = keyPlace
		}
		room += len(body) + 64
	}
	return request{body: publish.AppendTo(make([]byte, 0, room))}
}

// Publisher implements Driver.
func (d *NodeDriver) Publisher(i int) (Publisher, error) {
	p := &nodePublisher{d: d, feed: d.requests.feed(i)}
	if d.Workload.AllZones {
		p.require = raft.AllZones
	}
	return p, nil
}

type nodePublisher struct {
	d *NodeDriver
	*feed
	require raft.Require
}

// proposal makes the next one. The node keeps it, so that a marked body has to be one of its own.
func (p *nodePublisher) proposal(due time.Time) (request, raft.Proposal) {
	req := p.take(due)
	command := req.body
	if len(req.marks)+len(req.keys) > 0 {
		command = bytes.Clone(command)
	}
	return req, raft.Proposal{Command: command, Require: p.require}
}

// Publish implements Publisher.
func (p *nodePublisher) Publish(ctx context.Context, due time.Time) (Ack, error) {
	req, proposal := p.proposal(due)
	reply, err := p.d.Node.Propose(ctx, proposal)
	if err = failed(reply, err); err != nil {
		return Ack{Stamp: p.stamp}, err
	}
	return p.ack(req, reply.Zones), nil
}

// Send implements Pipeline.
func (p *nodePublisher) Send(ctx context.Context, due time.Time, done func(Ack, error)) error {
	req, proposal := p.proposal(due)
	ack := p.ack(req, 0)
	ended := func(reply raft.Reply, err error) {
		if err = failed(reply, err); err != nil {
			done(Ack{}, err)
			return
		}
		ack.Zones = reply.Zones
		done(ack, nil)
	}
	if node, ok := p.d.Node.(submitter); ok {
		node.Submit(proposal, ended)
		return nil
	}
	go func() { ended(p.d.Node.Propose(ctx, proposal)) }()
	return nil
}

// failed is the error of a reply that is no success.
func failed(reply raft.Reply, err error) error {
	if err == nil && reply.Code != errs.OK {
		return errs.Of(reply.Code)
	}
	return err
}

// Close implements Publisher.
func (p *nodePublisher) Close() error { return nil }

// Consumer implements Driver.
func (d *NodeDriver) Consumer(i int, found func(body []byte)) (Consumer, error) {
	topic, group := d.Workload.Consumes(i)
	receive := engine.Receive{
		Topic: topic, Group: group, Max: min(d.Workload.ReceiveMax, limits.ReceiveMessagesMax), Visibility: limits.VisibilityDefault,
	}
	return &nodeConsumer{d: d, topic: topic, group: group, found: found, receive: receive.AppendTo(nil)}, nil
}

type nodeConsumer struct {
	d        *NodeDriver
	topic    string
	group    string
	found    func(body []byte)
	receive  []byte
	receipts []engine.Receipt
}

// Receive implements Consumer.
func (c *nodeConsumer) Receive(ctx context.Context) (int, error) {
	c.receipts = c.receipts[:0]
	reply, err := c.d.Node.Propose(ctx, raft.Proposal{Command: bytes.Clone(c.receive), Wait: receiveWait})
	if err = failed(reply, err); err != nil {
		return 0, err
	}
	for i := range reply.Deliveries {
		c.receipts = append(c.receipts, reply.Deliveries[i].Receipt)
		if c.found != nil {
			c.found(reply.Deliveries[i].Body)
		}
	}
	return len(c.receipts), nil
}

// Settle implements Consumer.
func (c *nodeConsumer) Settle(ctx context.Context) (int, error) { return c.settle(ctx, c.receipts) }

// Overlap implements Overlapper.
func (c *nodeConsumer) Overlap() func(ctx context.Context) (int, error) {
	receipts := c.receipts
	c.receipts = nil
	return func(ctx context.Context) (int, error) { return c.settle(ctx, receipts) }
}

func (c *nodeConsumer) settle(ctx context.Context, receipts []engine.Receipt) (int, error) {
	settle := engine.Settle{
		Topic: c.topic, Group: c.group, Op: engine.Acknowledge, Receipts: receipts,
	}
	reply, err := c.d.Node.Propose(ctx, raft.Proposal{Command: settle.AppendTo(nil)})
	if err = failed(reply, err); err != nil {
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
