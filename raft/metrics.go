package raft

import (
	"github.com/prometheus/client_golang/prometheus"
)

// metrics are what a node exports. Gauges that can be read when asked for are.
type metrics struct {
	registry      *prometheus.Registry
	registerer    prometheus.Registerer
	collectors    []prometheus.Collector
	inSync        prometheus.Gauge
	isLeader      prometheus.Gauge
	leaderChanges prometheus.Counter
	fsync         prometheus.Histogram
	synced        prometheus.Counter
	checkpoint    prometheus.Histogram
}

func newMetrics(n *Node) *metrics {
	m := &metrics{registry: prometheus.NewRegistry(), registerer: n.cfg.Registerer}
	if m.registerer == nil {
		m.registerer = m.registry
	}
	m.inSync = prometheus.NewGauge(prometheus.GaugeOpts{Name: "tercet_insync_zones",
		Help: "Zones in the replicated in-sync set."})
	m.isLeader = prometheus.NewGauge(prometheus.GaugeOpts{Name: "tercet_raft_is_leader",
		Help: "1 while this node leads."})
	m.leaderChanges = prometheus.NewCounter(prometheus.CounterOpts{Name: "tercet_raft_leader_changes_total",
		Help: "Times this node began or ceased to lead."})
	m.fsync = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "tercet_wal_fsync_duration_seconds",
		Help:    "Time to write and sync one batch of the write-ahead log.",
		Buckets: []float64{.00005, .0001, .0002, .0004, .0008, .0016, .0032, .0064, .0128, .0256, .0512, .1, .2, .4, .8, 1.6, 3.2}})
	m.synced = prometheus.NewCounter(prometheus.CounterOpts{Name: "tercet_wal_synced_bytes_total",
		Help: "Bytes written by the synced batches of the write-ahead log."})
	m.checkpoint = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "tercet_checkpoint_duration_seconds",
		Help:    "Time to make the engine's state durable.",
		Buckets: prometheus.ExponentialBuckets(.001, 2, 14)})
	gauge := func(name, help string, f func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			if !n.running() {
				return 0
			}
			return f()
		})
	}
	m.collectors = []prometheus.Collector{m.inSync, m.isLeader, m.leaderChanges, m.fsync, m.synced, m.checkpoint,
		gauge("tercet_raft_term", "The term this node is in.", func() float64 { return float64(n.raft.CurrentTerm()) }),
		gauge("tercet_raft_last_index", "The last entry of this node's log.", func() float64 { return float64(n.logs.Last()) }),
		gauge("tercet_raft_durable_index", "The last entry this node's disk holds.", func() float64 { return float64(n.logs.Durable()) }),
		gauge("tercet_raft_applied_index", "The last entry in the engine's state.", func() float64 {
			index, _ := n.eng.Applied()
			return float64(index)
		}),
		gauge("tercet_raft_commit_lag_entries", "Entries of the log that are not applied yet.", func() float64 {
			index, _ := n.eng.Applied()
			return float64(n.logs.Last()) - float64(index)
		}),
		gauge("tercet_raft_leader_contact_seconds", "Time since this node heard of a leader.", func() float64 { return n.lag().Seconds() }),
		gauge("tercet_checkpoint_index", "The last entry covered by the durable checkpoint.", func() float64 { return float64(n.eng.Durable().Index) }),
		gauge("tercet_wal_unsynced_bytes", "Bytes of the log that wait for the disk.", func() float64 {
			bytes, _ := n.wal.Unsynced()
			return float64(bytes)
		}),
		gauge("tercet_disk_free_bytes", "Free bytes of the data directory's file system.", func() float64 {
			free, _ := n.space()
			return float64(free)
		}),
		gauge("tercet_disk_reserve_bytes", "Free bytes below which publishes are refused.", func() float64 {
			_, reserve := n.space()
			return float64(reserve)
		}),
		gauge("tercet_requests_outstanding", "Commands of this node without an outcome.", func() float64 { return float64(n.intake.outstanding()) }),
		gauge("tercet_receives_parked", "Receives that wait on this node as leader.", func() float64 { return float64(n.coal.lot.len()) }),
		gauge("tercet_publishes_awaiting_zones", "Applied publishes that wait for the disks of the zones they require.", func() float64 { return float64(n.acks.waiting()) }),
		gauge("tercet_raft_stalled", "1 while this node's disk is stalled.", func() float64 {
			if n.stalled.Load() {
				return 1
			}
			return 0
		}),
	}
	for _, c := range m.collectors {
		if err := m.registerer.Register(c); err != nil {
			n.log.Warn("metric is not exported", "error", err)
		}
	}
	return m
}

// unregister takes the metrics out of a registry that outlives the node.
func (m *metrics) unregister() {
	for _, c := range m.collectors {
		m.registerer.Unregister(c)
	}
}
