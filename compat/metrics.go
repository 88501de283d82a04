package compat

import (
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the front end's own series. Labels take few values; names that clients make up are bounded in number.
type metrics struct {
	unsupported *prometheus.CounterVec
	closed      *prometheus.CounterVec
	refused     *prometheus.CounterVec
	commands    *prometheus.CounterVec
	upstream    *prometheus.CounterVec
	passed      prometheus.Counter // of upstream: the one that is counted with every command

	mu    sync.Mutex
	names map[string]bool
}

// unsupportedNamesMax bounds the distinct unknown commands that are counted by name; further ones are counted as "other".
const unsupportedNamesMax = 200

func newMetrics(reg prometheus.Registerer, s *Server) (*metrics, error) {
	m := &metrics{names: map[string]bool{}}
	m.unsupported = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tercet_compat_unsupported_total",
		Help: "Commands that clients of the Valkey port asked for and that do not exist here, by name.",
	}, []string{"command"})
	m.closed = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tercet_compat_closed_total",
		Help: "Connections to the Valkey port that this node closed, by reason.",
	}, []string{"reason"})
	m.refused = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tercet_compat_denied_total",
		Help: "Commands of the Valkey port that were refused for want of authentication or permission.",
	}, []string{"reason"})
	m.commands = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tercet_compat_commands_total",
		Help: "Commands of the Valkey port by name.",
	}, []string{"command"})
	m.upstream = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tercet_compat_upstream_commands_total",
		Help: "Commands of the Valkey port that were the upstream's, by what became of them: passed, or refused because it could not be reached.",
	}, []string{"result"})
	m.passed = m.upstream.WithLabelValues("passed")
	gauge := func(name, help string, v func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, v)
	}
	for _, c := range []prometheus.Collector{
		m.unsupported, m.closed, m.refused, m.commands, m.upstream,
		gauge("tercet_compat_connections", "Open connections to the Valkey port.", func() float64 { return float64(s.clients.count()) }),
		gauge("tercet_compat_blocked_clients", "Clients of the Valkey port that wait in XREAD or XREADGROUP.", func() float64 { return float64(s.blocked.Load()) }),
		gauge("tercet_compat_buffer_bytes", "Bytes of input and output in memory for clients of the Valkey port.", func() float64 { return float64(s.memory.used.Load()) }),
	} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// unknown counts a command that does not exist.
func (m *metrics) unknown(name string) {
	name = strings.ToLower(name)
	if len(name) > 40 || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		name = "other"
	}
	m.mu.Lock()
	if !m.names[name] {
		if len(m.names) >= unsupportedNamesMax {
			name = "other"
		}
		m.names[name] = true
	}
	m.mu.Unlock()
	m.unsupported.WithLabelValues(name).Inc()
}
