package push

import (
	"fmt"
	"slices"
	"testing"

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
	r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "h", URL: green.URL})
	for range 10 {
		p := green.next()
		r.ack(p)
		p.reply(200)
	}
}

// A subscription without a deployment beside ones that name one gets what no other claims, nothing else, and what was
// claimed once the claim is gone.
func TestDeploymentsRest(t *testing.T) {
	r, blue, rest := newRig(t), newEndpointServer(t), newEndpointServer(t)
	take := func(e *testEndpointServer, body string) {
		t.Helper()
		p := e.next()
		if string(p.body) != body {
			t.Errorf("pushed %q, want %q", p.body, body)
		}
		r.ack(p)
		p.reply(200)
	}
	r.create(wire.Subscription{Topic: "order*", ConsumerGroup: "g", URL: rest.URL})
	r.publish("orders", "first for red", "Vqs-Deployment-Id", "red")
	take(rest, "first for red")
	r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: blue.URL, DeploymentID: "blue"})
	// Its endpoint answers nothing good: what is claimed stays.
	dead := newEndpointServer(t)
	claim := r.create(wire.Subscription{Topic: "orders", ConsumerGroup: "g", URL: dead.URL, DeploymentID: "red", Paused: true})
	for i := range 3 {
		r.publish("orders", fmt.Sprint("for red ", i), "Vqs-Deployment-Id", "red")
		r.publish("orders", "for blue", "Vqs-Deployment-Id", "blue")
		r.publish("orders", "for anybody")
		r.publish("orders", "for green", "Vqs-Deployment-Id", "green")
		take(blue, "for blue")
		take(rest, "for anybody")
		take(rest, "for green")
	}
	r.settled()
	blue.none()
	rest.none()
	// What is another deployment's does not count.
	r.publish("orders", "for blue", "Vqs-Deployment-Id", "blue")
	p := blue.next()
	for _, d := range []struct {
		name             string
		ready, unsettled uint64
	}{{"red", 3, 0}, {"blue", 0, 1}} {
		got, err := r.DrainDeployment(t.Context(), d.name)
		if err != nil || got.Drained || len(got.Groups) != 1 || got.Groups[0].Ready != d.ready || got.Groups[0].Unsettled != d.unsettled {
			t.Errorf("drain of %s: %+v, %v", d.name, got, err)
		}
	}
	r.ack(p)
	p.reply(200)
	if got, err := r.DrainDeployment(t.Context(), "blue"); err != nil || !got.Drained {
		t.Errorf("drain of blue: %+v, %v", got, err)
	}
	if err := r.DeleteSubscription(t.Context(), claim.ID); err != nil {
		t.Fatal(err)
	}
	// They are pushed beside each other, in any order.
	waiting := map[string]bool{"for red 0": true, "for red 1": true, "for red 2": true}
	for range 3 {
		p := rest.next()
		if !waiting[string(p.body)] {
			t.Errorf("pushed %q", p.body)
		}
		delete(waiting, string(p.body))
		r.ack(p)
		p.reply(200)
	}
	r.publish("orders", "for red", "Vqs-Deployment-Id", "red")
	take(rest, "for red")
	r.settled()
	blue.none()
	dead.none()
	if got := r.group("orders", "g").Settings.ExcludeDeployments; !slices.Equal(got, []string{"blue"}) {
		t.Errorf("excluded: %v", got)
	}
}
