package e2e

import (
	"bytes"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/test/harness"
	"tercet.dev/tercet/test/workload"
)

// TestQueue walks through the protocol in plain HTTP. Each message is published through one node, received through
// the next and settled through the third, in all three rotations, so that leader and followers play each part.
func TestQueue(t *testing.T) {
	t.Parallel()
	c := harness.Start(t, harness.Options{})
	for i := range c.Nodes {
		pub, rec, set := c.Nodes[i], c.Nodes[(i+1)%3], c.Nodes[(i+2)%3]
		t.Run(fmt.Sprintf("publish %s receive %s settle %s", pub.ID, rec.ID, set.ID), func(t *testing.T) {
			topic := fmt.Sprintf("walk-%d", i)
			t.Run("life of a message", func(t *testing.T) { life(t, topic, client(t, pub), client(t, rec), client(t, set)) })
			t.Run("forms of an answer", func(t *testing.T) { forms(t, topic+"-forms", client(t, pub), client(t, rec)) })
			t.Run("by id", func(t *testing.T) { byID(t, topic+"-id", client(t, pub), client(t, rec), client(t, set)) })
			t.Run("waiting", func(t *testing.T) { waiting(t, topic+"-wait", client(t, pub), client(t, rec)) })
			t.Run("batch", func(t *testing.T) { batch(t, topic+"-batch", client(t, pub), client(t, rec)) })
		})
	}
	c.EqualHashes()
}

// life follows a message through lease, extension, release, redelivery and acknowledgement, in two groups.
func life(t *testing.T, topic string, pub, rec, set *harness.Client) {
	ctx := t.Context()
	body := workload.Body("life", 2000)
	p := pub.Publish(ctx, topic, body, map[string]string{"Content-Type": "text/x-life; charset=utf-8"})
	want(t, "publish", p.Answer, http.StatusCreated, "")
	if p.Zones != 3 || p.Header.Get("Vqs-Message-Id") != p.ID || p.Header.Get("Tercet-Term") == "" || p.Header.Get("Tercet-Position") == "" {
		t.Errorf("publish answered %d zones and headers %v, want 3 zones, the message id, term and position", p.Zones, p.Header)
	}
	receive := func(group string, visibility time.Duration) []harness.Delivery {
		t.Helper()
		ds, a := rec.Receive(ctx, harness.Receive{Topic: topic, Group: group, Max: 10, Visibility: visibility})
		if a.Outcome != harness.OK {
			t.Fatalf("receive: %v", a)
		}
		return ds
	}
	one := func(group string, count int) harness.Delivery {
		t.Helper()
		ds := receive(group, lease)
		if len(ds) != 1 || ds[0].ID != p.ID || ds[0].Count != count || !bytes.Equal(ds[0].Body, body) || ds[0].ContentType != "text/x-life; charset=utf-8" {
			t.Fatalf("group %s received %+v, want message %s with count %d", group, ds, p.ID, count)
		}
		if life := ds[0].Expires.Sub(ds[0].Timestamp); life != 24*time.Hour {
			t.Errorf("the message lives %v, want 24h", life)
		}
		return ds[0]
	}
	none := func(group string) {
		t.Helper()
		if ds := receive(group, lease); len(ds) != 0 {
			t.Errorf("group %s received %+v, want nothing", group, ds)
		}
	}
	// A peek shows it and changes nothing.
	for range 2 {
		if ds := receive("a", 0); len(ds) != 1 || ds[0].ID != p.ID || ds[0].Count != 1 {
			t.Errorf("peek shows %+v, want message %s as if it were delivered for the first time", ds, p.ID)
		}
	}
	first := one("a", 1)
	none("a")
	other := one("b", 1) // groups know nothing of each other
	want(t, "extend", set.Extend(ctx, topic, "a", first.Receipt, lease), http.StatusOK, "")
	none("a")
	want(t, "release", set.Extend(ctx, topic, "a", first.Receipt, 0), http.StatusOK, "")
	want(t, "acknowledge a released message", set.Ack(ctx, topic, "a", first.Receipt), http.StatusConflict, "not_in_flight")
	second := one("a", 2)
	want(t, "acknowledge with the older receipt", set.Ack(ctx, topic, "a", first.Receipt), http.StatusConflict, "not_holder")
	want(t, "extend with the older receipt", set.Extend(ctx, topic, "a", first.Receipt, time.Second), http.StatusConflict, "not_holder")
	if a := set.Ack(ctx, topic, "b", second.Receipt); a.Outcome != harness.No || a.Status < 400 || a.Status > 409 {
		t.Errorf("acknowledge with another group's receipt: %v", a)
	}
	want(t, "acknowledge", set.Ack(ctx, topic, "a", second.Receipt), http.StatusNoContent, "")
	want(t, "acknowledge again", set.Ack(ctx, topic, "a", second.Receipt), http.StatusNotFound, "message_not_found")
	none("a")
	want(t, "acknowledge in the other group", set.Ack(ctx, topic, "b", other.Receipt), http.StatusNoContent, "")
	one("late", 1) // a new group starts at the beginning, whoever acknowledged
}

// forms receives several messages in both forms of an answer, and checks headers kept and bodies that look like
// delimiters.
func forms(t *testing.T, topic string, pub, rec *harness.Client) {
	ctx := t.Context()
	const trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	bodies := [][]byte{
		{},
		[]byte("--boundary\r\n\r\n--boundary--\r\n"),
		[]byte("\r\n\r\n"),
		bytes.Repeat([]byte{0, 0xff, '\n'}, 100),
		workload.Body("large", 300<<10),
	}
	for i, b := range bodies {
		p := pub.Publish(ctx, topic, b, map[string]string{"X-Order": strconv.Itoa(i), "traceparent": trace})
		want(t, "publish", p.Answer, http.StatusCreated, "")
	}
	for _, multipart := range []bool{true, false} {
		var got []harness.Delivery
		group := fmt.Sprintf("multipart-%v", multipart)
		for len(got) < len(bodies) {
			ds, a := rec.Receive(ctx, harness.Receive{Topic: topic, Group: group, Max: 3, Visibility: -1, Multipart: multipart})
			if a.Outcome != harness.OK || len(ds) == 0 || len(ds) > 3 {
				t.Fatalf("%s: %d messages, %v", group, len(ds), a)
			}
			got = append(got, ds...)
		}
		if len(got) != len(bodies) {
			t.Fatalf("%s: %d messages, want %d", group, len(got), len(bodies))
		}
		for i, d := range got {
			if !bytes.Equal(d.Body, bodies[i]) || d.ContentType != "application/octet-stream" {
				t.Errorf("%s: message %d has %q and a body of %d bytes, want %d bytes as sent, in order", group, i, d.ContentType, len(d.Body), len(bodies[i]))
			}
			if multipart && (d.Header.Get("Traceparent") != trace || d.Header.Get("X-Order") != strconv.Itoa(i)) {
				t.Errorf("%s: message %d came with headers %v, want those that were sent", group, i, d.Header)
			}
		}
		ds, a := rec.Receive(ctx, harness.Receive{Topic: topic, Group: group, Max: 3, Visibility: -1, Multipart: multipart})
		if len(ds) != 0 || a.Status != http.StatusNoContent {
			t.Errorf("%s: the group has seen all and still gets %v, %v", group, ds, a)
		}
	}
	if _, a := rec.Receive(ctx, harness.Receive{Topic: "never-written-" + topic, Group: "g", Visibility: -1}); a.Status != http.StatusNoContent {
		t.Errorf("receive from a topic never written to: %v, want 204", a)
	}
}

// byID receives messages by their ids, in every state that has an answer of its own.
func byID(t *testing.T, topic string, pub, rec, set *harness.Client) {
	ctx := t.Context()
	p := pub.Publish(ctx, topic, []byte("one"), nil)
	want(t, "publish", p.Answer, http.StatusCreated, "")
	get := func(id string) ([]harness.Delivery, harness.Answer) {
		return rec.Receive(ctx, harness.Receive{Topic: topic, Group: "g", ID: id, Visibility: lease})
	}
	ds, a := get(p.ID)
	if len(ds) != 1 || ds[0].ID != p.ID || string(ds[0].Body) != "one" {
		t.Fatalf("by id: %+v, %v", ds, a)
	}
	_, a = get(p.ID)
	want(t, "by id under a lease", a, http.StatusConflict, "leased_elsewhere")
	if r := a.RetryAfter(); r < time.Second || r > lease {
		t.Errorf("Retry-After is %v, want what is left of %v", r, lease)
	}
	want(t, "acknowledge", set.Ack(ctx, topic, "g", ds[0].Receipt), http.StatusNoContent, "")
	_, a = get(p.ID)
	want(t, "by id after the acknowledgement", a, http.StatusGone, "already_acknowledged")
	// Nobody sent it: the id of another topic's message.
	other := pub.Publish(ctx, topic+"-other", []byte("two"), nil)
	want(t, "publish", other.Answer, http.StatusCreated, "")
	_, a = get(other.ID)
	want(t, "by another topic's id", a, http.StatusNotFound, "message_not_found")
	_, a = get(p.ID[:len(p.ID)-1])
	if a.Status != http.StatusNotFound && a.Status != http.StatusBadRequest {
		t.Errorf("by an id that was cut: %v", a)
	}
}

// waiting parks a receive and publishes behind it.
func waiting(t *testing.T, topic string, pub, rec *harness.Client) {
	ctx := t.Context()
	type result struct {
		ds []harness.Delivery
		a  harness.Answer
	}
	results := make(chan result)
	go func() {
		ds, a := rec.Receive(ctx, harness.Receive{Topic: topic, Group: "g", Visibility: lease, Wait: time.Minute})
		results <- result{ds, a}
	}()
	// There is no way to see from outside that the receive is parked; both orders must work.
	p := pub.Publish(ctx, topic, []byte("wake"), nil)
	want(t, "publish", p.Answer, http.StatusCreated, "")
	r := <-results
	if len(r.ds) != 1 || r.ds[0].ID != p.ID {
		t.Errorf("the waiting receive got %+v, %v, want message %s", r.ds, r.a, p.ID)
	}
	if _, a := rec.Receive(ctx, harness.Receive{Topic: topic, Group: "g", Visibility: lease, Wait: time.Second}); a.Status != http.StatusNoContent {
		t.Errorf("a receive that waits in vain: %v, want 204", a)
	}
}

// batch sends several messages at once, one of them bad, and a full batch of 100.
func batch(t *testing.T, topic string, pub, rec *harness.Client) {
	ctx := t.Context()
	var bodies [][]byte
	for i := range 100 {
		bodies = append(bodies, []byte(strconv.Itoa(i)))
	}
	results, a := pub.Batch(ctx, topic, bodies, nil)
	if a.Outcome != harness.OK || len(results) != len(bodies) {
		t.Fatalf("batch: %d results, %v", len(results), a)
	}
	var ids []string
	for i, r := range results {
		if r.Status != "sent" || r.MessageID == "" {
			t.Fatalf("message %d: %+v", i, r)
		}
		ids = append(ids, r.MessageID)
	}
	if slices.Sort(ids); len(slices.Compact(ids)) != len(bodies) {
		t.Errorf("message ids repeat in %v", ids)
	}
	// A bad part fails alone.
	keys := []string{"", "", strings.Repeat("k", 257)}
	results, a = pub.Batch(ctx, topic+"-bad", [][]byte{[]byte("x"), []byte("y"), []byte("z")}, keys)
	if a.Outcome != harness.OK || len(results) != 3 {
		t.Fatalf("batch with a bad part: %d results, %v", len(results), a)
	}
	if r := results[2]; r.Status != "failed" || r.StatusCode != http.StatusBadRequest || r.Retryable {
		t.Errorf("the bad part: %+v, want failed, 400, not retryable", r)
	}
	if got := len(receiveAll(t, rec, topic, "g")); got != len(bodies) {
		t.Errorf("%d messages came out, want %d", got, len(bodies))
	}
	for _, r := range results[:2] {
		if r.Status != "sent" {
			t.Errorf("a good part beside a bad one: %+v", r)
		}
	}
}
