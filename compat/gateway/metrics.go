package gateway

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"tercet.dev/tercet/internal/errs"
)

// metrics are the gateway's, beside those of the HTTP server in front of it.
type metrics struct {
	operations *prometheus.HistogramVec
}

func newMetrics(r prometheus.Registerer, g *Gateway) (*metrics, error) {
	m := &metrics{operations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name:    "tercet_gateway_operation_duration_seconds",
		Help:    "Time of one operation on the upstream, by operation and outcome (ok, or the error's code).",
		Buckets: prometheus.ExponentialBuckets(0.0001, 2, 18),
	}, []string{"op", "outcome"})}
	if r == nil {
		return m, nil
	}
	worth := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "tercet_gateway_info", Help: "Always 1; the label says what a publish is worth.",
		ConstLabels: prometheus.Labels{"durability": g.o.Worth.Level().String()},
	}, func() float64 { return 1 })
	for _, c := range []prometheus.Collector{m.operations, worth} {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) observe(op string, start time.Time, err error) {
	outcome := "ok"
	if err != nil {
		outcome = errs.From(err).Code.String()
	}
	m.operations.WithLabelValues(op, outcome).Observe(time.Since(start).Seconds())
}
