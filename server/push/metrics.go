package push

import (
	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the dispatcher's series. None has a label that users choose; what one subscription does is shown by
// GET /v1/subscriptions/{id}.
type metrics struct {
	requests *prometheus.CounterVec
	duration prometheus.Histogram
	inflight prometheus.Gauge
}

// kinds are the values of the label "answer".
var kinds = []string{"1xx", "2xx", "3xx", "4xx", "5xx", "429", "timeout", "connection", "blocked"}

func newMetrics(reg prometheus.Registerer, d *Dispatcher) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tercet_push_requests_total",
			Help: "Requests to the endpoints of subscriptions, by what was answered.",
		}, []string{"answer"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "tercet_push_request_duration_seconds",
			Help:    "Time from the beginning of a push to its answer: what the handlers take, for the most part.",
			Buckets: []float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 60, 300, 1800},
		}),
		inflight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tercet_push_requests_inflight",
			Help: "Requests to the endpoints of subscriptions that wait for their answer.",
		}),
	}
	for _, k := range kinds {
		m.requests.WithLabelValues(k)
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.requests, m.duration, m.inflight, &stateCollector{d}} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) observe(a answer) { m.requests.WithLabelValues(a.kind).Inc() }

var (
	subscriptionsDesc = prometheus.NewDesc("tercet_push_subscriptions", "Subscriptions that this node pushes, by the state of their endpoint.", []string{"state"}, nil)
	lanesDesc         = prometheus.NewDesc("tercet_push_topics", "Topics that this node pushes, counted once for each subscription.", nil, nil)
)

// stateCollector counts when it is asked.
type stateCollector struct{ d *Dispatcher }

// Describe implements prometheus.Collector.
func (c *stateCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- subscriptionsDesc
	ch <- lanesDesc
}

// Collect implements prometheus.Collector.
func (c *stateCollector) Collect(ch chan<- prometheus.Metric) {
	count := map[string]int{"active": 0, "paused": 0, "throttled": 0, "failing": 0}
	c.d.mu.Lock()
	lanes := c.d.lanes
	eps := make([]*endpoint, 0, len(c.d.feeds))
	for _, f := range c.d.feeds {
		eps = append(eps, f.ep)
	}
	c.d.mu.Unlock()
	for _, e := range eps {
		count[e.snapshot().state]++
	}
	for state, n := range count {
		ch <- prometheus.MustNewConstMetric(subscriptionsDesc, prometheus.GaugeValue, float64(n), state)
	}
	ch <- prometheus.MustNewConstMetric(lanesDesc, prometheus.GaugeValue, float64(lanes))
}
