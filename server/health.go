package server

import (
	"io"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/server/wire"
)

var plainType = []string{"text/plain; charset=utf-8"}

// check is one line of a health report.
type check struct {
	name string
	err  error
}

// checks are what readiness is made of.
func (s *Server) checks() []check {
	var draining error
	if s.Draining() {
		draining = errs.Of(errs.Draining)
	}
	checks := []check{{"live", s.backend.Live()}, {"ready", s.backend.Ready()}, {"draining", draining}}
	if s.authorizer != nil {
		checks = append(checks, check{"tokens", s.authorizer.Ready()})
	}
	return checks
}

// livez answers whether the process should be left running. It does not depend on other nodes.
func (x *exchange) livez() { x.report(check{"live", x.s.backend.Live()}) }

// readyz answers whether requests should be sent here.
func (x *exchange) readyz() { x.report(x.s.checks()...) }

// healthz is readyz, and with ?verbose a line per check.
func (x *exchange) healthz() {
	if _, verbose := x.r.URL.Query()["verbose"]; !verbose {
		x.readyz()
		return
	}
	var b strings.Builder
	st := http.StatusOK
	for _, c := range x.s.checks() {
		if c.err == nil {
			b.WriteString("[+]" + c.name + " ok\n")
			continue
		}
		st = http.StatusServiceUnavailable
		b.WriteString("[-]" + c.name + " " + errs.From(c.err).Text() + "\n")
	}
	x.plain(st, b.String())
}

// report answers ok, or what the first failed check says.
func (x *exchange) report(checks ...check) {
	for _, c := range checks {
		if c.err != nil {
			x.plain(http.StatusServiceUnavailable, errs.From(c.err).Text()+"\n")
			return
		}
	}
	x.plain(http.StatusOK, "ok\n")
}

func (x *exchange) plain(status int, text string) {
	if status != http.StatusOK {
		x.outcome = outcomeUnavailable
	}
	h := x.w.Header()
	h["Content-Type"] = plainType
	h["Cache-Control"] = noStore
	h["X-Content-Type-Options"] = noSniff
	h[wire.HeaderRequestID] = []string{x.requestID()}
	x.w.WriteHeader(status)
	io.WriteString(x.w, text)
}

// showMetrics answers /metrics.
func (x *exchange) showMetrics() {
	promhttp.HandlerFor(x.s.gatherer, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}).ServeHTTP(x.w, x.r)
}

// topicMetricsMax bounds the topics of one scrape of /metrics/topics.
const topicMetricsMax = 1000

// topicMetrics answers /metrics/topics?match=PATTERN: series per topic and group, which /metrics never has. The
// pattern is a name, or a prefix followed by an asterisk.
func (x *exchange) topicMetrics() {
	pattern := x.r.URL.Query().Get("match")
	if pattern == "" {
		x.fail(errs.New(errs.BadRequest, "name the topics: ?match=orders or ?match=order-*"))
		return
	}
	prefix, wild := strings.CutSuffix(pattern, "*")
	ctx, cancel := x.commandContext()
	defer cancel()
	q := engine.Query{Kind: engine.QueryTopic, Topic: pattern, Max: 1}
	if wild {
		q = engine.Query{Kind: engine.QueryTopics, After: before(prefix), Max: topicMetricsMax}
	}
	answer, err := x.s.backend.Query(ctx, q)
	if err != nil {
		x.fail(errs.From(err))
		return
	}
	registry := prometheus.NewRegistry()
	c := &topicCollector{}
	for _, t := range answer.Topics {
		if wild && !strings.HasPrefix(t.Name, prefix) || !wild && t.Name != pattern || !x.principal.Allows(Look, t.Name) {
			continue
		}
		groups, err := x.s.backend.Query(ctx, engine.Query{Kind: engine.QueryGroups, Topic: t.Name, Max: topicMetricsMax})
		if err != nil {
			x.fail(errs.From(err))
			return
		}
		c.topics = append(c.topics, t)
		c.groups = append(c.groups, groups.Groups...)
	}
	if err := registry.Register(c); err != nil {
		x.fail(errs.Of(errs.Internal).With(err))
		return
	}
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(x.w, x.r)
}

// before returns a name behind which every name with the prefix comes, and few others.
func before(prefix string) string {
	if prefix == "" {
		return ""
	}
	last := len(prefix) - 1
	if prefix[last] == 0 {
		return prefix[:last]
	}
	return prefix[:last] + string([]byte{prefix[last] - 1, 0xff})
}

// topicCollector shows one answer of the engine.
type topicCollector struct {
	topics []engine.TopicInfo
	groups []engine.GroupInfo
}

var (
	topicPublished = prometheus.NewDesc("tercet_topic_published_total", "Messages published to the topic.", []string{"topic"}, nil)
	topicBytes     = prometheus.NewDesc("tercet_topic_published_bytes_total", "Bytes published to the topic, as stored.", []string{"topic"}, nil)
	topicOldest    = prometheus.NewDesc("tercet_topic_oldest_message_timestamp_seconds", "When the oldest message of the topic was published; 0 without any.", []string{"topic"}, nil)
	groupMessages  = prometheus.NewDesc("tercet_group_messages", "Messages of the group by state.", []string{"topic", "group", "state"}, nil)
	groupDelivered = prometheus.NewDesc("tercet_group_delivered_total", "Deliveries to the group.", []string{"topic", "group"}, nil)
	groupAgain     = prometheus.NewDesc("tercet_group_redelivered_total", "Deliveries to the group that were not the first of their message.", []string{"topic", "group"}, nil)
	groupAcked     = prometheus.NewDesc("tercet_group_acknowledged_total", "Messages the group acknowledged.", []string{"topic", "group"}, nil)
	groupOldest    = prometheus.NewDesc("tercet_group_oldest_message_timestamp_seconds", "When the oldest message the group has not settled was published; 0 without any.", []string{"topic", "group"}, nil)
)

// Describe implements prometheus.Collector.
func (c *topicCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{topicPublished, topicBytes, topicOldest, groupMessages, groupDelivered, groupAgain, groupAcked, groupOldest} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *topicCollector) Collect(ch chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, kind prometheus.ValueType, v float64, labels ...string) {
		for i := range labels {
			labels[i] = strings.ToValidUTF8(labels[i], "\ufffd")
		}
		ch <- prometheus.MustNewConstMetric(d, kind, v, labels...)
	}
	for _, t := range c.topics {
		send(topicPublished, prometheus.CounterValue, float64(t.Published), t.Name)
		send(topicBytes, prometheus.CounterValue, float64(t.Bytes), t.Name)
		send(topicOldest, prometheus.GaugeValue, float64(t.OldestAt)/1000, t.Name)
	}
	for _, g := range c.groups {
		send(groupMessages, prometheus.GaugeValue, float64(g.Ready), g.Topic, g.Name, "ready")
		send(groupMessages, prometheus.GaugeValue, float64(g.Inflight), g.Topic, g.Name, "inflight")
		send(groupMessages, prometheus.GaugeValue, float64(g.Unsettled-g.Inflight), g.Topic, g.Name, "returned")
		send(groupDelivered, prometheus.CounterValue, float64(g.Delivered), g.Topic, g.Name)
		send(groupAgain, prometheus.CounterValue, float64(g.Redelivered), g.Topic, g.Name)
		send(groupAcked, prometheus.CounterValue, float64(g.Acknowledged), g.Topic, g.Name)
		send(groupOldest, prometheus.GaugeValue, float64(g.OldestAt)/1000, g.Topic, g.Name)
	}
}
