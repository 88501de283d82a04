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

// Finalize raises the feature level to what every member knows.
func (c *Client) Finalize(ctx context.Context) (s wire.Cluster, err error) {
	err = c.json(ctx, request{method: http.MethodPost, path: "/v1/cluster/finalize"}, &s)
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
	err = c.json(ctx, request{method: http.MethodGet, path: adminGroup(topic, group) + "?rates=false"}, &g)
	return g, err
}

// BrowseOptions say which stored messages are meant. The zero value means all of them.
type BrowseOptions struct {
	From  uint64
	Limit int
	// Group and State: messages that are in this state for the group; "delayed" needs no group.
	Group, State string
	// Since and Until bound the time of publishing, Header and Value what was sent with it.
	Since, Until  time.Time
	Header, Value string
	// After goes on with delayed messages.
	After string
	// NoBody leaves the bodies out.
	NoBody bool
}

func (o *BrowseOptions) query() url.Values {
	q := url.Values{}
	set := func(name, value string) {
		if value != "" {
			q.Set(name, value)
		}
	}
	if o.From > 0 {
		q.Set("from", strconv.FormatUint(o.From, 10))
	}
	if o.Limit > 0 {
		q.Set("limit", strconv.Itoa(o.Limit))
	}
	set("group", o.Group)
	set("state", o.State)
	set("header", o.Header)
	set("value", o.Value)
	set("after", o.After)
	set("since", timeText(o.Since))
	set("until", timeText(o.Until))
	if o.NoBody {
		q.Set("body", "false")
	}
	return q
}

func timeText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

func withQuery(path string, q url.Values) string {
	if len(q) == 0 {
		return path
	}
	return path + "?" + q.Encode()
}

// Browse returns stored messages from an offset on, whatever any group did with them.
func (c *Client) Browse(ctx context.Context, topic string, from uint64, limit int) (m wire.Messages, err error) {
	return c.Find(ctx, topic, BrowseOptions{From: from, Limit: limit})
}

// Find returns a page of stored messages.
func (c *Client) Find(ctx context.Context, topic string, o BrowseOptions) (m wire.Messages, err error) {
	err = c.json(ctx, request{method: http.MethodGet, path: withQuery(adminTopic(topic)+"/messages", o.query())}, &m)
	return m, err
}

func adminTopic(topic string) string { return "/v1/topics/" + url.PathEscape(topic) }

func adminGroup(topic, group string) string {
	return adminTopic(topic) + "/groups/" + url.PathEscape(group)
}

func adminMessage(topic, id string) string {
	return adminTopic(topic) + "/messages/" + url.PathEscape(id)
}

// change sends a JSON document whose effect is the same however often it arrives.
func (c *Client) change(ctx context.Context, method, path string, document, answer any) error {
	q := request{method: method, path: path, repeatable: true}
	if document != nil {
		body, err := json.Marshal(document)
		if err != nil {
			return err
		}
		q.header, q.body = http.Header{"Content-Type": {wire.MediaJSON}}, body
	}
	return c.json(ctx, q, answer)
}

// Settings are a topic's or a group's by the names they have in JSON; those that are absent stay as they are.
type Settings map[string]any

// CreateTopic makes a topic if need be and sets what settings name.
func (c *Client) CreateTopic(ctx context.Context, topic string, s Settings) (t wire.Topic, err error) {
	err = c.change(ctx, http.MethodPut, adminTopic(topic), s, &t)
	return t, err
}

// ChangeTopic sets what settings name.
func (c *Client) ChangeTopic(ctx context.Context, topic string, s Settings) (t wire.Topic, err error) {
	err = c.change(ctx, http.MethodPatch, adminTopic(topic), s, &t)
	return t, err
}

// PurgeTopic drops every message of a topic.
func (c *Client) PurgeTopic(ctx context.Context, topic string) (t wire.Topic, err error) {
	err = c.json(ctx, request{method: http.MethodPost, path: adminTopic(topic) + "/purge"}, &t)
	return t, err
}

// DeleteTopic deletes a topic with all that belongs to it.
func (c *Client) DeleteTopic(ctx context.Context, topic string) error {
	return c.json(ctx, request{method: http.MethodDelete, path: adminTopic(topic)}, nil)
}

// GroupRates describes one group with its rates, which the first look takes a moment for.
func (c *Client) GroupRates(ctx context.Context, topic, group string) (g wire.Group, err error) {
	err = c.json(ctx, request{method: http.MethodGet, path: adminGroup(topic, group)}, &g)
	return g, err
}

// CreateGroup makes topic and group if need be, at a place, and sets what settings name.
func (c *Client) CreateGroup(ctx context.Context, topic, group string, at wire.Start, s Settings) (g wire.Group, err error) {
	in := wire.NewGroup{Start: at}
	if len(s) > 0 {
		if in.Settings, err = json.Marshal(s); err != nil {
			return g, err
		}
	}
	err = c.change(ctx, http.MethodPut, adminGroup(topic, group), in, &g)
	return g, err
}

// ChangeGroup sets what settings name.
func (c *Client) ChangeGroup(ctx context.Context, topic, group string, s Settings) (g wire.Group, err error) {
	err = c.change(ctx, http.MethodPatch, adminGroup(topic, group), s, &g)
	return g, err
}

// SeekGroup moves a group.
func (c *Client) SeekGroup(ctx context.Context, topic, group string, to wire.Start) (g wire.Group, err error) {
	err = c.post(ctx, adminGroup(topic, group)+"/seek", to, &g)
	return g, err
}

// DeleteGroup deletes a group with its leases and parked messages.
func (c *Client) DeleteGroup(ctx context.Context, topic, group string) error {
	return c.json(ctx, request{method: http.MethodDelete, path: adminGroup(topic, group)}, nil)
}

// Story returns what became of a message; with verify every node reads it from its own disk.
func (c *Client) Story(ctx context.Context, topic, id string, verify bool) (s wire.Story, err error) {
	path := adminMessage(topic, id)
	if verify {
		path += "?verify=true"
	}
	err = c.json(ctx, request{method: http.MethodGet, path: path}, &s)
	return s, err
}

// CancelDelayed cancels a delayed message.
func (c *Client) CancelDelayed(ctx context.Context, topic, id string) error {
	return c.json(ctx, request{method: http.MethodDelete, path: adminMessage(topic, id)}, nil)
}

// MoveDelayed makes a delayed message visible after a delay from now.
func (c *Client) MoveDelayed(ctx context.Context, topic, id string, delay time.Duration) error {
	seconds := int64(delay / time.Second)
	return c.change(ctx, http.MethodPatch, adminMessage(topic, id), wire.Move{DelaySeconds: &seconds}, nil)
}

// Parked returns a page of what a group gave up. Of the options From, Limit, Since, Until and NoBody count; reason is a
// part of the last error.
func (c *Client) Parked(ctx context.Context, topic, group, reason string, o BrowseOptions) (p wire.Parked, err error) {
	q := o.query()
	if reason != "" {
		q.Set("error", reason)
	}
	err = c.json(ctx, request{method: http.MethodGet, path: withQuery(adminGroup(topic, group)+"/parked", q)}, &p)
	return p, err
}

// Redrive makes parked messages deliverable again.
func (c *Client) Redrive(ctx context.Context, topic, group string, what wire.ParkedChange) (n wire.ParkedChanged, err error) {
	err = c.post(ctx, adminGroup(topic, group)+"/parked/redrive", what, &n)
	return n, err
}

// DropParked ends parked messages for the group.
func (c *Client) DropParked(ctx context.Context, topic, group string, what wire.ParkedChange) (n wire.ParkedChanged, err error) {
	err = c.post(ctx, adminGroup(topic, group)+"/parked/drop", what, &n)
	return n, err
}

// JoinTokens lists the tokens that let nodes into the cluster.
func (c *Client) JoinTokens(ctx context.Context) (t wire.JoinTokens, err error) {
	err = c.json(ctx, request{method: http.MethodGet, path: "/v1/cluster/tokens"}, &t)
	return t, err
}

// CreateJoinToken makes a token that lets one node into the cluster, once.
func (c *Client) CreateJoinToken(ctx context.Context, t wire.NewJoinToken) (out wire.CreatedJoinToken, err error) {
	err = c.post(ctx, "/v1/cluster/tokens", t, &out)
	return out, err
}

// RevokeJoinToken ends a token that no node has used.
func (c *Client) RevokeJoinToken(ctx context.Context, id string) error {
	return c.json(ctx, request{method: http.MethodDelete, path: "/v1/cluster/tokens/" + url.PathEscape(id)}, nil)
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
