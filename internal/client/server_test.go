package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"testing"
	"time"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server"
	"tercet.dev/tercet/server/servertest"
	"tercet.dev/tercet/server/wire"
)

// serve runs a node and its HTTP server and returns a client of it.
func serve(t *testing.T) *Client {
	t.Helper()
	s, err := server.New(server.Options{Backend: servertest.Nodes(t, 1)[0], VirtualClock: true})
	if err != nil {
		t.Fatal(err)
	}
	listeners, err := server.Listen(context.Background(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(listeners[0]) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	c, err := New(Options{Servers: []string{listeners[0].Addr().String()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// TestAgainstServer goes through every call once, against a real node.
func TestAgainstServer(t *testing.T) {
	c, ctx := serve(t), t.Context()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(c.Live(ctx))
	check(c.Ready(ctx))
	node, err := c.Node(ctx)
	check(err)
	cluster, err := c.Cluster(ctx)
	check(err)
	if node.ID != "n1" || node.Role != "leader" || cluster.Leader != "n1" || len(cluster.Nodes) != 1 || cluster.ClusterID == "" {
		t.Errorf("node %+v, cluster %+v", node, cluster)
	}

	body := []byte("\x00\r\n--\xff")
	id, at, err := c.Send(ctx, "orders", Message{Body: body, ContentType: "application/x-thing", Retention: time.Hour, Header: http.Header{"X-Order": {"7"}}}, InSync)
	check(err)
	if id == "" || at.Zones != 1 || at.Position == 0 || at.Term == 0 {
		t.Errorf("sent %q, %+v", id, at)
	}
	batch := make([]Message, 20)
	for i := range batch {
		batch[i] = Message{Body: bytes.Repeat([]byte{byte(i)}, i*1000)}
	}
	batch[3].Retention = time.Second // refused, alone
	results, at, err := c.SendBatch(ctx, "orders", batch, Default)
	check(err)
	if len(results) != 20 || results[3].Err == nil || results[3].Err.Code != "invalid_header" || results[3].Err.Status != 400 || results[4].ID == "" || at.Zones != 1 {
		t.Errorf("batch %+v, %+v", results, at)
	}

	peeked, err := c.Receive(ctx, "orders", "g", ReceiveOptions{Peek: true})
	check(err)
	if all, err := peeked.All(); err != nil || len(all) != 1 || all[0].ID != id {
		t.Errorf("peek %+v %v", all, err)
	}
	ds, err := c.Receive(ctx, "orders", "g", ReceiveOptions{Max: 10, Visibility: time.Minute})
	check(err)
	all, err := ds.All()
	check(err)
	if len(all) != 10 || all[0].ID != id || !bytes.Equal(all[0].Body, body) || all[0].ContentType != "application/x-thing" || all[0].Header.Get("X-Order") != "7" || all[0].Count != 1 {
		t.Fatalf("received %+v", all[0])
	}
	if d := all[0].ExpiresAt.Sub(all[0].Timestamp); d != time.Hour {
		t.Errorf("expires %v after it was published", d)
	}
	check(c.Extend(ctx, "orders", "g", all[0].Receipt, 2*time.Minute))
	check(c.Acknowledge(ctx, "orders", "g", all[0].Receipt))
	if err := c.Acknowledge(ctx, "orders", "g", all[0].Receipt); !errors.Is(err, errs.Of(errs.MessageNotFound)) {
		t.Errorf("acknowledged again: %v", err)
	}
	check(c.Extend(ctx, "orders", "g", all[1].Receipt, 0))
	again, err := c.ReceiveID(ctx, "orders", "g", all[1].ID, ReceiveOptions{})
	check(err)
	if again.Count != 2 || again.ID != all[1].ID {
		t.Errorf("again %+v", again)
	}
	if _, err := c.ReceiveID(ctx, "orders", "g", all[2].ID, ReceiveOptions{}); !errors.Is(err, errs.Of(errs.LeasedElsewhere)) {
		t.Errorf("leased: %v", err)
	}
	// The virtual clock ends leases.
	check(c.AdvanceClock(ctx, 2*time.Minute))
	if d, err := c.ReceiveID(ctx, "orders", "g", all[2].ID, ReceiveOptions{}); err != nil || d.Count != 2 {
		t.Errorf("after two minutes: %+v %v", d, err)
	}

	empty, err := c.Receive(ctx, "nothing", "g", ReceiveOptions{})
	check(err)
	if _, err := empty.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("nothing: %v", err)
	}
	topics, err := c.Topics(ctx, "", 10)
	check(err)
	if !slices.ContainsFunc(topics.Topics, func(topic wire.Topic) bool { return topic.Name == "orders" && topic.Published == 20 }) {
		t.Errorf("topics %+v", topics)
	}
	topic, err := c.Topic(ctx, "orders")
	check(err)
	groups, err := c.Groups(ctx, "orders", "", 0)
	check(err)
	group, err := c.Group(ctx, "orders", "g")
	check(err)
	if topic.Groups != 1 || len(groups.Groups) != 1 || group.Acknowledged != 1 {
		t.Errorf("topic %+v, groups %+v, group %+v", topic, groups, group)
	}
	seen := 0
	for from := uint64(0); ; {
		page, err := c.Browse(ctx, "orders", from, 7)
		check(err)
		seen += len(page.Messages)
		if from = page.Next; from == 0 {
			break
		}
	}
	if seen != 20 {
		t.Errorf("browsed %d messages", seen)
	}
	if _, err := c.Transfer(ctx, "n9"); err == nil {
		t.Error("leadership went to a node that does not exist")
	}
}

// A wait is answered by what is published meanwhile.
func TestWait(t *testing.T) {
	c, ctx := serve(t), t.Context()
	got := make(chan string, 1)
	go func() {
		ds, err := c.Receive(ctx, "t", "g", ReceiveOptions{Wait: 60 * time.Second})
		if err != nil {
			got <- err.Error()
			return
		}
		all, err := ds.All()
		got <- fmt.Sprintf("%d messages, %v", len(all), err)
	}()
	if _, _, err := c.Send(ctx, "t", Message{}, Default); err != nil {
		t.Fatal(err)
	}
	if s := <-got; s != "1 messages, <nil>" {
		t.Error(s)
	}
}
