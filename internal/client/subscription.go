package client

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"

	"tercet.dev/tercet/server/wire"
)

// CreateSubscription creates or replaces the subscription of a topic, group and deployment. With dryRun it is only said
// what would be done (Change). Doing it twice does what doing it once does, so it is repeated where the outcome is not
// known; the secret of a new subscription may then be shown to nobody, and has to be rotated.
func (c *Client) CreateSubscription(ctx context.Context, s wire.Subscription, dryRun bool) (out wire.Subscription, err error) {
	path := "/v1/subscriptions"
	if dryRun {
		path += "?dryRun=true"
	}
	body, err := json.Marshal(s)
	if err != nil {
		return out, err
	}
	err = c.json(ctx, request{method: http.MethodPost, path: path, header: http.Header{"Content-Type": {wire.MediaJSON}}, body: body, repeatable: true}, &out)
	return out, err
}

// Subscriptions returns all subscriptions by ID.
func (c *Client) Subscriptions(ctx context.Context) ([]wire.Subscription, error) {
	var all []wire.Subscription
	after := ""
	for {
		var p wire.Subscriptions
		if err := c.json(ctx, request{method: http.MethodGet, path: page("/v1/subscriptions", "after", after, 500)}, &p); err != nil {
			return nil, err
		}
		all = append(all, p.Subscriptions...)
		if after = p.Next; after == "" {
			return all, nil
		}
	}
}

// Subscription returns one subscription with its state.
func (c *Client) Subscription(ctx context.Context, id string) (s wire.Subscription, err error) {
	err = c.json(ctx, request{method: http.MethodGet, path: "/v1/subscriptions/" + url.PathEscape(id)}, &s)
	return s, err
}

// DeleteSubscription deletes a subscription.
func (c *Client) DeleteSubscription(ctx context.Context, id string) error {
	return c.json(ctx, request{method: http.MethodDelete, path: "/v1/subscriptions/" + url.PathEscape(id)}, nil)
}

// RotateSecret gives a subscription a new signing secret.
func (c *Client) RotateSecret(ctx context.Context, id string, r wire.RotateSecret) (s wire.Subscription, err error) {
	err = c.post(ctx, "/v1/subscriptions/"+url.PathEscape(id)+"/secret", r, &s)
	return s, err
}

// DrainDeployment says what a deployment's subscriptions have left to do.
func (c *Client) DrainDeployment(ctx context.Context, deployment string) (d wire.DeploymentDrain, err error) {
	err = c.json(ctx, request{method: http.MethodGet, path: "/v1/deployments/" + url.PathEscape(deployment) + "/drain"}, &d)
	return d, err
}
