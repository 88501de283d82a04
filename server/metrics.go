package server

import (
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tercet.dev/tercet/engine"
)

// metrics are the server's own series. Labels take few values, all known here; topics never are one.
type metrics struct {
	durations *prometheus.HistogramVec
	// observers remembers the histogram of each pair, so that a request looks nothing up.
	observers [opCount][outcomeCount]atomic.Pointer[prometheus.Observer]
	publishes *prometheus.CounterVec
	zones     [8]atomic.Pointer[prometheus.Counter]
	refused   struct{ connections, requests, bytes prometheus.Counter }
	conns     prometheus.Gauge
}

// durationBuckets span a cached read and a request that sat through an election.
var durationBuckets = []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .25, .5, 1, 2.5, 5, 15}

func newMetrics(reg prometheus.Registerer, s *Server) (*metrics, error) {
	m := &metrics{
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "tercet_request_duration_seconds",
			Help:    "Time from the head of a request to the end of its answer, by operation and outcome. Waits for messages are not observed.",
			Buckets: durationBuckets,
		}, []string{"op", "outcome"}),
		publishes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tercet_publish_total",
			Help: "Messages acknowledged to HTTP publishers, by the number of zones that held them.",
		}, []string{"zones"}),
		conns: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tercet_http_connections",
			Help: "Open HTTP connections.",
		}),
	}
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tercet_http_overload_total",
		Help: "Connections and requests refused because a bound of this node was reached.",
	}, []string{"bound"})
	m.refused.connections = refused.WithLabelValues("connections")
	m.refused.requests = refused.WithLabelValues("requests")
	m.refused.bytes = refused.WithLabelValues("bytes")
	gauge := func(name, help string, v *atomic.Int64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return float64(v.Load()) })
	}
	for _, c := range []prometheus.Collector{
		m.durations, m.publishes, m.conns, refused,
		gauge("tercet_http_inflight_bytes", "Bytes of request bodies and answers in memory.", &s.load.bytes),
		gauge("tercet_http_inflight_requests", "Requests whose command is being carried out.", &s.load.requests),
		gauge("tercet_http_waiting_receives", "Receives that may wait for messages.", &s.load.waits),
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	if t, ok := s.backend.(totaler); ok {
		if err := reg.Register(&totalsCollector{backend: t}); err != nil {
			return nil, err
		}
	}
	for o := range opCount {
		if o != opReceiveWait {
			m.observer(o, outcomeOK)
		}
	}
	for zones := 1; zones <= 3; zones++ {
		m.published(zones, 0)
	}
	return m, nil
}

func (m *metrics) observer(o op, out outcome) prometheus.Observer {
	slot := &m.observers[o][out]
	if p := slot.Load(); p != nil {
		return *p
	}
	obs := m.durations.WithLabelValues(opNames[o], outcomeNames[out])
	slot.Store(&obs)
	return obs
}

// observe records a request that is over.
func (m *metrics) observe(x *exchange) {
	if x.waits && x.outcome == outcomeOK {
		return
	}
	m.observer(x.op, x.outcome).Observe(time.Since(x.start).Seconds())
}

// published counts n messages that zones zones held when they were acknowledged.
func (m *metrics) published(zones, n int) {
	if zones < 0 || zones >= len(m.zones) {
		m.publishes.WithLabelValues(strconv.Itoa(zones)).Add(float64(n))
		return
	}
	slot := &m.zones[zones]
	p := slot.Load()
	if p == nil {
		c := m.publishes.WithLabelValues(strconv.Itoa(zones))
		p = &c
		slot.Store(p)
	}
	(*p).Add(float64(n))
}

// totaler is a Backend that counts its messages.
type totaler interface{ Totals() engine.Totals }

// totalsCollector shows the figures of all topics and groups together. Every node counts for itself what it has applied, so
// the series of one node are those of the cluster. Counting visits every group, so it is not done more often than that.
type totalsCollector struct {
	backend totaler

	mu   sync.Mutex
	at   time.Time
	last engine.Totals
}

// totalsEvery is how long a count is good.
const totalsEvery = 5 * time.Second

var (
	totalMessages = prometheus.NewDesc("tercet_messages", "Messages by state, added up over all groups (delayed: over all topics). A message that was returned is ready.", []string{"state"}, nil)
	totalOldest   = prometheus.NewDesc("tercet_oldest_message_age_seconds", "Age of the oldest message that some group has not been given; 0 without any.", nil, nil)
	totalTopics   = prometheus.NewDesc("tercet_topics", "Topics.", nil, nil)
	totalGroups   = prometheus.NewDesc("tercet_groups", "Consumer groups.", nil, nil)
	totalUploads  = prometheus.NewDesc("tercet_uploads", "Large messages under way.", nil, nil)
)

// Describe implements prometheus.Collector.
func (c *totalsCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{totalMessages, totalOldest, totalTopics, totalGroups, totalUploads} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *totalsCollector) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := time.Now(); c.at.IsZero() || now.Sub(c.at) >= totalsEvery {
		c.at, c.last = now, c.backend.Totals()
	}
	send := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	t := &c.last
	send(totalMessages, float64(t.Ready+t.Waiting), "ready")
	send(totalMessages, float64(t.Inflight), "inflight")
	send(totalMessages, float64(t.Delayed), "delayed")
	send(totalMessages, float64(t.Parked), "parked")
	age := 0.0
	if t.OldestAt > 0 {
		age = max(0, float64(time.Now().UnixMilli()-t.OldestAt)/1000)
	}
	send(totalOldest, age)
	send(totalTopics, float64(t.Topics))
	send(totalGroups, float64(t.Groups))
	send(totalUploads, float64(t.Uploads))
}
