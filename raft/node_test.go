package raft

import (
	"fmt"
	"testing"

	"tercet.dev/tercet/engine"
)

// A message published through any node is delivered and acknowledged through any other.
func TestPublishReceiveAcknowledgeThroughEachNode(t *testing.T) {
	c := newCluster(t, nil)
	c.start(founders...)
	c.leader()
	c.inSync(3)
	for i, from := range founders {
		for j, to := range founders {
			topic, group := fmt.Sprintf("t%d%d", i, j), "g"
			body := "through " + from
			r := must(t, c.node(from), Proposal{Command: publishCommand(topic, body)})
			if r.Zones != 3 || r.Index == 0 || r.Term == 0 {
				t.Fatalf("publish through %s: %+v", from, r)
			}
			got := must(t, c.node(to), Proposal{Command: receiveCommand(topic, group, 1)})
			if len(got.Deliveries) != 1 || string(got.Deliveries[0].Body) != body || got.Deliveries[0].ID != r.Published.ID(0) {
				t.Fatalf("receive through %s: %+v", to, got)
			}
			again := must(t, c.node(from), Proposal{Command: receiveCommand(topic, group, 1)})
			if len(again.Deliveries) != 0 {
				t.Fatalf("leased message given again: %+v", again)
			}
			acked := must(t, c.node(from), Proposal{Command: ackCommand(topic, group, got.Deliveries...)})
			if len(acked.Codes) != 1 || acked.Codes[0] != 0 {
				t.Fatalf("acknowledge: %+v", acked)
			}
			a, err := c.node(to).Query(testContext(t), engine.Query{Kind: engine.QueryGroup, Topic: topic, Group: group})
			if err != nil || len(a.Groups) != 1 || a.Groups[0].Acknowledged != 1 {
				t.Fatalf("query through %s: %+v, %v", to, a, err)
			}
		}
	}
	c.agree()
}
