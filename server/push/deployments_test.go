package push

import (
	"errors"
	"testing"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/wire"
)

// Each deployment's messages go to its own subscription, and draining says what is left of them.
func TestDeployments(t *testing.T) {
	r, blue, green := newRig(t), newEndpointServer(t), newEndpointServer(t)
	r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: blue.URL, DeploymentID: "blue"})
	r.create(wire.Subscription{Topic: "order*", ConsumerGroup: "g", URL: green.URL, DeploymentID: "green"})
	take := func(e *testEndpointServer, body string) {
		t.Helper()
		p := e.next()
		if string(p.body) != body {
			t.Errorf("pushed %q, want %q", p.body, body)
		}
		r.ack(p)
		p.reply(200)
	}
	for range 3 {
		r.publish("orders", "for blue", "Vqs-Deployment-Id", "blue")
		r.publish("orders", "for nobody")
		r.publish("orders", "for green", "Vqs-Deployment-Id", "green")
		take(blue, "for blue")
		take(green, "for green")
	}
	r.settled()
	blue.none()
	green.none()

	d, err := r.DrainDeployment(t.Context(), "blue")
	if err != nil || !d.Drained {
		t.Errorf("drain: %+v, %v", d, err)
	}
	r.publish("orders", "more for blue", "Vqs-Deployment-Id", "blue")
	p := blue.next()
	d, err = r.DrainDeployment(t.Context(), "blue")
	if err != nil || d.Drained || len(d.Groups) != 1 || d.Groups[0].Unsettled != 1 {
		t.Errorf("drain: %+v, %v", d, err)
	}
	r.ack(p)
	p.reply(200)
	if _, err := r.DrainDeployment(t.Context(), "red"); err == nil {
		t.Error("a deployment without subscriptions can be drained")
	}
	for _, topic := range []string{"orders", "*", "order-*", "ord*", "order-1"} {
		_, err := r.CreateSubscription(t.Context(), wire.Subscription{Topic: topic, ConsumerGroup: "g", URL: blue.URL}, false)
		if !errors.Is(err, errs.Of(errs.Unsupported)) {
			t.Errorf("a subscription of %s without a deployment beside those with one: %v", topic, err)
		}
	}
	r.create(wire.Subscription{Topic: "other", ConsumerGroup: "g", URL: blue.URL})
	r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "h", URL: green.URL})
	for range 10 {
		p := green.next()
		r.ack(p)
		p.reply(200)
	}
}
