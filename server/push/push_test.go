package push

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/wire"
)

// An inline push is a CloudEvent in binary mode under a lease; acknowledged, it never comes again.
func TestInline(t *testing.T) {
	r, app := newRig(t), newEndpointServer(t)
	r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "billing", URL: app.URL + "/hook?x=1", BearerToken: "t0ken"})
	begun := time.Now().Add(-time.Second)
	id := r.publish("orders", `{"id":7}`, "Content-Type", "application/json; charset=utf-8", "traceparent", "00-a-b-01", "tracestate", "k=v", "X-App", "one")
	p := app.next()
	for name, want := range map[string]string{
		"ce-specversion": "1.0", "ce-type": "com.vercel.queue.v2beta", "ce-source": "/topic/orders/consumer/billing", "ce-id": id,
		"ce-vqsqueuename": "orders", "ce-vqsconsumergroup": "billing", "ce-vqsmessageid": id, "ce-vqsregion": "iad1", "ce-vqsdeliverycount": "1",
		"Content-Type": "application/json; charset=utf-8", "Authorization": "Bearer t0ken", "User-Agent": "tercet/test",
		"x-vercel-queue-traceparent": "00-a-b-01", "x-vercel-queue-tracestate": "k=v", "tercet-header-x-app": "one", "webhook-id": id,
	} {
		if got := p.Header.Values(name); len(got) != 1 || got[0] != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if p.Method != http.MethodPost || p.URL.String() != "/hook?x=1" || string(p.body) != `{"id":7}` {
		t.Errorf("%s %s %q", p.Method, p.URL, p.body)
	}
	at := func(name string) time.Time {
		v, err := time.Parse(time.RFC3339, p.Header.Get(name))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		return v
	}
	if c := at("ce-vqscreatedat"); c.Before(begun) || c.After(time.Now()) || !at("ce-time").Equal(c) {
		t.Errorf("created at %v, time %v", c, at("ce-time"))
	}
	if life := at("ce-vqsexpiresat").Sub(at("ce-vqscreatedat")); life != 24*time.Hour {
		t.Errorf("expires after %v", life)
	}
	if ends := at("ce-vqsvisibilitydeadline"); ends.Before(begun.Add(time.Minute-time.Second)) || ends.After(time.Now().Add(time.Minute+time.Second)) {
		t.Errorf("the lease ends at %v", ends)
	}
	r.ack(p)
	p.reply(200)
	r.acknowledged("orders", "billing", 1)
	r.advance(2 * time.Hour)
	r.settled()
	app.none()
}

// A 2xx is no acknowledgement: what nobody acknowledged comes again when its lease is over, and not before.
func TestAnswerWithoutAcknowledgement(t *testing.T) {
	r, app := newRig(t), newEndpointServer(t)
	r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: app.URL, RetryAfterSeconds: n64(1), LeaseSeconds: n64(100)})
	r.publish("orders", "m")
	app.next().reply(200)
	r.settled()
	r.advance(90 * time.Second)
	r.hidden("orders", "g")
	app.none()
	r.advance(11 * time.Second)
	p := app.next()
	if got := p.Header.Get("ce-vqsdeliverycount"); got != "2" {
		t.Errorf("delivery count %s", got)
	}
	r.ack(p)
	p.reply(200)
}

// A failed delivery comes again retryAfterSeconds later, whatever the lease; a 500 does not touch the breaker.
func TestFailedDelivery(t *testing.T) {
	r, app := newRig(t), newEndpointServer(t)
	s := r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: app.URL, RetryAfterSeconds: n64(300)})
	r.publish("orders", "m")
	for i, status := range []int{500, 400, 404, 410, 501, 302, 500, 500} {
		p := app.next()
		if got := p.Header.Get("ce-vqsdeliverycount"); got != fmt.Sprint(i+1) {
			t.Errorf("delivery count %s, want %d", got, i+1)
		}
		p.reply(status, "Location", app.URL+"/elsewhere")
		r.settled()
		r.advance(290 * time.Second)
		r.hidden("orders", "g")
		app.none()
		r.advance(11 * time.Second)
	}
	p := app.next()
	if p.URL.Path != "/" {
		t.Errorf("a redirect was followed to %s", p.URL)
	}
	show, err := r.Subscription(t.Context(), s.ID)
	if err != nil || show.State == nil {
		t.Fatal(show, err)
	}
	if st := show.State; st.State != "active" || st.Breaker != "closed" || st.Failed != 8 || st.Inflight != 1 || !strings.HasPrefix(st.LastError, "HTTP 500") {
		t.Errorf("state %+v", st)
	}
	r.ack(p)
	p.reply(200)
	r.acknowledged("orders", "g", 1)
}

// The lease decides: what the handler has said to the queue holds against a failed answer.
func TestHandlerDecides(t *testing.T) {
	r, app := newRig(t), newEndpointServer(t)
	r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: app.URL, RetryAfterSeconds: n64(10)})
	r.publish("orders", "acknowledged, then failed")
	p := app.next()
	r.ack(p)
	p.reply(500)
	r.settled()
	r.publish("orders", "rescheduled, then answered")
	p = app.next()
	if status := r.lease(p, http.MethodPatch, `{"visibilityTimeoutSeconds":600}`); status != 200 {
		t.Fatalf("PATCH: %d", status)
	}
	p.reply(200)
	r.settled()
	r.advance(590 * time.Second)
	r.hidden("orders", "g")
	app.none()
	r.advance(11 * time.Second)
	p = app.next()
	if string(p.body) != "rescheduled, then answered" {
		t.Errorf("pushed %q", p.body)
	}
	// A push whose lease ran out while its handler worked does not undo what came after it.
	r.advance(61 * time.Second)
	q := app.next()
	p.reply(500)
	if status := r.lease(q, http.MethodPatch, `{"visibilityTimeoutSeconds":3000}`); status != 200 {
		t.Errorf("the newer lease is gone: %d", status)
	}
	r.ack(q)
	q.reply(200)
	r.acknowledged("orders", "g", 2)
}

// What does not travel with its push is not leased to anybody who could be in the way, is given to nobody else, and
// counts one delivery.
func TestRoutingOnly(t *testing.T) {
	large := strings.Repeat("x", 300<<10)
	for _, c := range []struct {
		name, body string
		s          wire.Subscription
	}{
		{"large", large, wire.Subscription{}},
		{"empty", "", wire.Subscription{}},
		{"configured", "seven..", wire.Subscription{InlineBytesMax: n64(6)}},
		{"v1beta", "small", wire.Subscription{Type: wire.PushV1Beta}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, app := newRig(t), newEndpointServer(t)
			c.s.Topic, c.s.ConsumerGroup, c.s.URL, c.s.RetryAfterSeconds, c.s.MaxConcurrency = "orders", "g", app.URL, n64(50), n64(1)
			r.create(c.s)
			id := r.publish("orders", c.body)
			p := app.next()
			if c.s.Type == wire.PushV1Beta {
				var event struct {
					Type string
					Data struct{ QueueName, ConsumerGroup, MessageID string }
				}
				if err := json.Unmarshal(p.body, &event); err != nil || event.Type != "com.vercel.queue.v1beta" || event.Data.QueueName != "orders" ||
					event.Data.ConsumerGroup != "g" || event.Data.MessageID != id || p.Header.Get("Content-Type") != "application/cloudevents+json" {
					t.Errorf("%v %s, %v", p.Header, p.body, err)
				}
			} else {
				if len(p.body) != 0 || p.ContentLength != 0 || p.receipt() != "" || p.Header.Get("ce-vqsdeliverycount") != "" || p.id() != id {
					t.Errorf("not routing only: %v, %d bytes", p.Header, len(p.body))
				}
			}
			// It counts towards maxConcurrency, and nobody else is given it.
			r.publish("orders", "the next")
			if g := r.group("orders", "g"); g.Inflight != 1 {
				t.Errorf("%d in flight", g.Inflight)
			}
			d, code := r.receiveID("orders", "g", id)
			if code != errs.OK || d.Count != 1 || string(d.Body) != c.body {
				t.Fatalf("receive by id: %v, count %d, %d bytes", code, d.Count, len(d.Body))
			}
			if _, code := r.receiveID("orders", "g", id); code != errs.LeasedElsewhere {
				t.Errorf("a second receive by id: %v", code)
			}
			app.none()
			if ok := r.d.settle("orders", &Subscription{Group: "g"}, d.Receipt, engine.Settle{Op: engine.Acknowledge}); !ok {
				t.Error("the acknowledgement was refused")
			}
			p.reply(200)
			second := app.next()
			// Nobody asks for this one: that is a failed delivery. (A small one travels with its push and has to fail.)
			if second.receipt() == "" {
				second.reply(200)
			} else {
				second.reply(500)
			}
			r.settled()
			r.hidden("orders", "g")
			r.advance(51 * time.Second)
			app.next().reply(500)
			r.settled()
			if g := r.group("orders", "g"); g.Inflight != 0 || g.Acknowledged != 1 {
				t.Errorf("%+v", g)
			}
		})
	}
}

// A routing-only push is not made a second time while its request runs, however long that is.
func TestRoutingOnlyKeepsItsLease(t *testing.T) {
	r, app := newRig(t), newEndpointServer(t)
	r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: app.URL, InlineBytesMax: n64(0), LeaseSeconds: n64(60)})
	r.publish("orders", "m")
	p := app.next()
	push := &push{d: r.d, feed: r.d.feeds[SubscriptionID("orders", "g", "")], topic: "orders"}
	sealer := engine.NewSealer(r.node.Secret())
	id, err := sealer.ParseMessageID(p.id())
	if err != nil {
		t.Fatal(err)
	}
	// What the timer does every third of a lease: with the virtual clock that is here and now.
	a, err := r.node.Query(t.Context(), engine.Query{Kind: engine.QueryGroup, Topic: "orders", Group: "g", Max: 1})
	if err != nil {
		t.Fatal(err)
	}
	push.delivery = engine.Delivery{ID: id, Receipt: engine.Receipt{Topic: topicIncarnation(t, r, "orders"), Group: a.Groups[0].Incarnation, Epoch: 1}}
	for range 5 {
		r.advance(50 * time.Second)
		if !push.settle(engine.Settle{Op: engine.Extend, Visibility: push.lease()}) {
			t.Fatal("the lease is gone")
		}
	}
	app.none()
	if d, code := r.receiveID("orders", "g", p.id()); code != errs.OK || d.Count != 1 {
		t.Errorf("receive by id after four minutes: %v, count %d", code, d.Count)
	}
	if push.settle(engine.Settle{Op: engine.Extend, Visibility: push.lease()}) {
		t.Error("the lease is still the push's after it was taken over")
	}
	p.reply(200)
}

func topicIncarnation(t *testing.T, r *rig, topic string) uint64 {
	t.Helper()
	a, err := r.node.Query(t.Context(), engine.Query{Kind: engine.QueryTopic, Topic: topic, Max: 1})
	if err != nil || len(a.Topics) != 1 {
		t.Fatal(a, err)
	}
	return a.Topics[0].Incarnation
}

// A poisoned message blocks nobody, at concurrency 1 too, and is given up after maxDeliveries.
func TestPoison(t *testing.T) {
	r, app := newRig(t), newEndpointServer(t)
	r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: app.URL, RetryAfterSeconds: n64(1), MaxConcurrency: n64(1), MaxDeliveries: n64(3)})
	r.publish("orders", "poison")
	for i := range 4 {
		r.publish("orders", fmt.Sprint("good ", i))
	}
	good, poison := 0, 0
	for good < 4 || poison < 3 {
		p := app.next()
		app.none() // one at a time
		if string(p.body) == "poison" {
			poison++
			p.reply(500)
			r.settled()
			r.advance(2 * time.Second)
			continue
		}
		good++
		r.ack(p)
		p.reply(200)
	}
	r.settled()
	until(t, "the poisoned message to be given up", func() error {
		r.advance(time.Minute)
		if g := r.group("orders", "g"); g.Acknowledged != 5 && g.Unsettled != 0 {
			return fmt.Errorf("%+v", g)
		}
		return nil
	})
	app.none()
}

// Nothing is pushed before its initial delay, nor anything before that of the subscription.
func TestInitialDelay(t *testing.T) {
	r, app := newRig(t), newEndpointServer(t)
	r.publish("orders", "old")
	r.advance(time.Hour)
	r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: app.URL, InitialDelaySeconds: n64(100)})
	r.advance(90 * time.Second)
	r.publish("orders", "new")
	r.hidden("orders", "g")
	app.none()
	r.advance(11 * time.Second)
	p := app.next()
	if string(p.body) != "old" {
		t.Errorf("pushed %q", p.body)
	}
	r.ack(p)
	p.reply(200)
	r.settled()
	r.advance(80 * time.Second)
	app.none()
	r.advance(11 * time.Second)
	if p = app.next(); string(p.body) != "new" {
		t.Errorf("pushed %q", p.body)
	}
	r.ack(p)
	p.reply(200)
}

// A prefix has one group in each topic, finds topics that come later, and leaves those that a name claims.
func TestWildcard(t *testing.T) {
	r, app, other := newRig(t), newEndpointServer(t), newEndpointServer(t)
	r.publish("order-old", "before")
	r.publish("orde", "no")
	r.publish("orders", "no")
	r.create(wire.Subscription{Topic: "order-*", ConsumerGroup: "g", URL: app.URL})
	r.create(wire.Subscription{Topic: "order-own", ConsumerGroup: "g", URL: other.URL})
	take := func(e *testEndpointServer, topic, body string) {
		t.Helper()
		p := e.next()
		if p.topic() != topic || string(p.body) != body {
			t.Errorf("pushed %q of %s, want %q of %s", p.body, p.topic(), body, topic)
		}
		r.ack(p)
		p.reply(200)
	}
	take(app, "order-old", "before")
	r.publish("order-", "1")
	take(app, "order-", "1")
	r.publish("order-new", "2")
	take(app, "order-new", "2")
	r.publish("order-own", "3")
	take(other, "order-own", "3")
	r.create(wire.Subscription{Topic: "*", ConsumerGroup: "all", URL: other.URL})
	want := []string{"order-old before", "orde no", "orders no", "order- 1", "order-new 2", "order-own 3"}
	for range len(want) {
		p := other.next()
		line := p.topic() + " " + string(p.body)
		if i := slices.Index(want, line); i < 0 {
			t.Errorf("pushed %q", line)
		} else {
			want = slices.Delete(want, i, i+1)
		}
		r.ack(p)
		p.reply(200)
	}
	r.settled()
	app.none()
	other.none()
}
