package redistest

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

// slotCount is the number of hash slots of a cluster.
const slotCount = 16384

// Shards are the primaries of a real cluster.
type Shards []*Server

// Cluster starts a cluster of so many primaries, each with its part of the slots.
func Cluster(t *testing.T, count int, args ...string) Shards {
	t.Helper()
	var c Shards
	for i := range count {
		n := Start(t, append([]string{"--cluster-enabled", "yes", "--cluster-node-timeout", "2000"}, args...)...)
		n.Do("CLUSTER", "ADDSLOTSRANGE", strconv.Itoa(slotCount*i/count), strconv.Itoa(slotCount*(i+1)/count-1))
		n.Do("CLUSTER", "SET-CONFIG-EPOCH", strconv.Itoa(i+1))
		if i > 0 {
			n.Do("CLUSTER", "MEET", "127.0.0.1", strconv.Itoa(c[0].Port))
		}
		c = append(c, n)
	}
	known := fmt.Sprintf("cluster_known_nodes:%d", count)
	Until(t, 60*time.Second, "the cluster", func() error {
		for _, n := range c {
			if info := n.Do("CLUSTER", "INFO"); !strings.Contains(info, "cluster_state:ok") || !strings.Contains(info, known) {
				return fmt.Errorf("%s", info)
			}
		}
		return nil
	})
	return c
}

// Owner returns the slot of a key, the shard that has it, and another one.
func (c Shards) Owner(key string) (slot string, owner, other *Server) {
	slot = c[0].Do("CLUSTER", "KEYSLOT", key)
	n, _ := strconv.Atoi(slot)
	for i := range c {
		if n < slotCount*(i+1)/len(c) {
			return slot, c[i], c[(i+1)%len(c)]
		}
	}
	return slot, nil, nil
}

// Migration is a slot on its way from one shard to another.
type Migration struct {
	slot     string
	from, to *Server
	fromID   string
	toID     string
}

// Migrate begins to move a slot: from now on new keys of it are the other shard's.
func Migrate(slot string, from, to *Server) *Migration {
	m := &Migration{slot: slot, from: from, to: to, fromID: from.Do("CLUSTER", "MYID"), toID: to.Do("CLUSTER", "MYID")}
	to.Do("CLUSTER", "SETSLOT", slot, "IMPORTING", m.fromID)
	from.Do("CLUSTER", "SETSLOT", slot, "MIGRATING", m.toID)
	return m
}

// Move moves at most so many keys, and returns how many.
func (m *Migration) Move(count int) int {
	keys := strings.Fields(m.from.Do("CLUSTER", "GETKEYSINSLOT", m.slot, strconv.Itoa(count)))
	for _, k := range keys {
		m.from.Do("MIGRATE", "127.0.0.1", strconv.Itoa(m.to.Port), k, "0", "5000")
	}
	return len(keys)
}

// Finish moves what is left and gives the slot to the other shard.
func (m *Migration) Finish() {
	for m.Move(100) > 0 {
	}
	for _, node := range []*Server{m.to, m.from} {
		node.Do("CLUSTER", "SETSLOT", m.slot, "NODE", m.toID)
	}
}

// Replica starts a replica of a shard and waits until it is connected.
func (c Shards) Replica(t *testing.T, of *Server) *Server {
	t.Helper()
	r := Start(t, "--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
	r.Do("CLUSTER", "MEET", "127.0.0.1", strconv.Itoa(c[0].Port))
	id := of.Do("CLUSTER", "MYID")
	Until(t, 60*time.Second, "the shard's replica", func() error {
		if !strings.Contains(r.Do("CLUSTER", "NODES"), id) {
			return fmt.Errorf("the primary is not known yet")
		}
		if out := r.Do("CLUSTER", "REPLICATE", id); out != "OK" {
			return fmt.Errorf("%s", out)
		}
		if !strings.Contains(r.Do("INFO", "replication"), "master_link_status:up") {
			return fmt.Errorf("not connected")
		}
		for _, n := range c {
			if !strings.Contains(n.Do("CLUSTER", "SLOTS"), strconv.Itoa(r.Port)) {
				return fmt.Errorf("%s does not know it yet", n.Addr())
			}
		}
		return nil
	})
	return r
}
