package client

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"tercet.dev/tercet/server/wire"
)

// Node returns what the server in use says of itself. It is never forwarded, and no other server is asked.
func (c *Client) Node(ctx context.Context) (n wire.Node, err error) {
	err = c.json(ctx, request{method: http.MethodGet, path: "/v1/node", only: true}, &n)
	return n, err
}

// Ready returns nil when the server in use takes requests.
func (c *Client) Ready(ctx context.Context) error {
	return c.json(ctx, request{method: http.MethodGet, path: "/readyz", only: true}, nil)
}

// Live returns nil when the server in use runs.
func (c *Client) Live(ctx context.Context) error {
	return c.json(ctx, request{method: http.MethodGet, path: "/livez", only: true}, nil)
}

// Cluster returns the cluster as the server in use sees it.
func (c *Client) Cluster(ctx context.Context) (s wire.Cluster, err error) {
	err = c.json(ctx, request{method: http.MethodGet, path: "/v1/cluster"}, &s)
	return s, err
}

// post sends a JSON document. Membership changes are not repeated once their outcome is unknown.
func (c *Client) post(ctx context.Context, path string, document, answer any) error {
	body, err := json.Marshal(document)
	if err != nil {
		return err
	}
	return c.json(ctx, request{method: http.MethodPost, path: path, header: http.Header{"Content-Type": {wire.MediaJSON}}, body: body}, answer)
}

// AddMember admits the node that waits under this id and returns once it votes.
func (c *Client) AddMember(ctx context.Context, id string) (s wire.Cluster, err error) {
	err = c.post(ctx, "/v1/cluster/members", wire.Member{ID: id}, &s)
	return s, err
}

// RemoveMember takes a member out of the cluster.
func (c *Client) RemoveMember(ctx context.Context, id string) (s wire.Cluster, err error) {
	err = c.json(ctx, request{method: http.MethodDelete, path: "/v1/cluster/members/" + url.PathEscape(id)}, &s)
	return s, err
}

// ReplaceMember removes a member's present incarnation and admits the next one of the same id.
func (c *Client) ReplaceMember(ctx context.Context, id string) (s wire.Cluster, err error) {
	err = c.json(ctx, request{method: http.MethodPost, path: "/v1/cluster/members/" + url.PathEscape(id) + "/replace"}, &s)
	return s, err
}

// Transfer hands leadership to a member, or to the most advanced one when id is empty.
func (c *Client) Transfer(ctx context.Context, id string) (s wire.Cluster, err error) {
	err = c.post(ctx, "/v1/cluster/transfer", wire.Member{ID: id}, &s)
	return s, err
}

// AdvanceClock moves the virtual clock.
func (c *Client) AdvanceClock(ctx context.Context, by time.Duration) error {
	return c.post(ctx, "/v1/clock/advance", wire.Advance{Seconds: int64(by / time.Second)}, nil)
}

func page(path, key, value string, limit int) string {
	q := url.Values{}
	if value != "" {
		q.Set(key, value)
	}
	if limit > 0 {
		q.Set("limit", strconv.Itoa(limit))
	}
	if len(q) > 0 {
		path += "?" + q.Encode()
	}
	return path
}

// Topics lists topics by name after a name.
func (c *Client) Topics(ctx context.Context, after string, limit int) (t wire.Topics, err error) {
	err = c.json(ctx, request{method: http.MethodGet, path: page("/v1/topics", "after", after, limit)}, &t)
	return t, err
}

// Topic describes one topic.
func (c *Client) Topic(ctx context.Context, topic string) (t wire.Topic, err error) {
	err = c.json(ctx, request{method: http.MethodGet, path: "/v1/topics/" + url.PathEscape(topic)}, &t)
	return t, err
}

// Groups lists a topic's groups by name after a name.
func (c *Client) Groups(ctx context.Context, topic, after string, limit int) (g wire.Groups, err error) {
	err = c.json(ctx, request{method: http.MethodGet, path: page("/v1/topics/"+url.PathEscape(topic)+"/groups", "after", after, limit)}, &g)
	return g, err
}

// Group describes one group.
func (c *Client) Group(ctx context.Context, topic, group string) (g wire.Group, err error) {
	err = c.json(ctx, request{method: http.MethodGet, path: "/v1/topics/" + url.PathEscape(topic) + "/groups/" + url.PathEscape(group)}, &g)
	return g, err
}

// Browse returns stored messages from an offset on, whatever any group did with them.
func (c *Client) Browse(ctx context.Context, topic string, from uint64, limit int) (m wire.Messages, err error) {
	err = c.json(ctx, request{method: http.MethodGet, path: page("/v1/topics/"+url.PathEscape(topic)+"/messages", "from", strconv.FormatUint(from, 10), limit)}, &m)
	return m, err
}

// Tokens lists the cluster's tokens and those of the configuration of the server in use.
func (c *Client) Tokens(ctx context.Context) (t wire.Tokens, err error) {
	err = c.json(ctx, request{method: http.MethodGet, path: "/v1/tokens"}, &t)
	return t, err
}

// CreateToken makes a token.
func (c *Client) CreateToken(ctx context.Context, t wire.NewToken) (out wire.CreatedToken, err error) {
	err = c.post(ctx, "/v1/tokens", t, &out)
	return out, err
}

// RevokeToken ends a token. open allows that it is the last one, after which requests need none.
func (c *Client) RevokeToken(ctx context.Context, name string, open bool) error {
	path := "/v1/tokens/" + url.PathEscape(name)
	if open {
		path += "?open=true"
	}
	return c.json(ctx, request{method: http.MethodDelete, path: path}, nil)
}
