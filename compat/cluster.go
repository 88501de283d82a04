package compat

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"strconv"
	"strings"

	"tercet.dev/tercet/compat/command"
	"tercet.dev/tercet/compat/resp"
	"tercet.dev/tercet/engine"
	"tercet.dev/tercet/raft"
)

// slotCount is the number of hash slots of a cluster. All of them belong to the one shard.
const slotCount = 16384

var crc16Table = func() (t [256]uint16) {
	for i := range t {
		crc := uint16(i) << 8
		for range 8 {
			if crc&0x8000 != 0 {
				crc = crc<<1 ^ 0x1021
			} else {
				crc <<= 1
			}
		}
		t[i] = crc
	}
	return t
}()

// keySlot is the hash slot of a key: of what stands between its first { and the next }, if anything does.
func keySlot(key []byte) int {
	if open := strings.IndexByte(string(key), '{'); open >= 0 {
		if n := strings.IndexByte(string(key[open+1:]), '}'); n > 0 {
			key = key[open+1 : open+1+n]
		}
	}
	var crc uint16
	for _, b := range key {
		crc = crc<<8 ^ crc16Table[byte(crc>>8)^b]
	}
	return int(crc) % slotCount
}

// hexID makes forty hexadecimal digits, as Valkey names nodes, out of a name.
func hexID(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:20])
}

// splitAddr splits a node's announced address. One without a host is where the client has come to.
func splitAddr(addr string, c *conn) (host, port string) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", "0"
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host, _, _ = net.SplitHostPort(c.nc.LocalAddr().String())
	}
	return host, port
}

// redirect sends a client of cluster mode to the node that leads, when the command has keys and that is another one. While
// nobody leads the command is passed on as in standalone mode, which holds it through the election.
func (c *conn) redirect(spec *command.Spec, args [][]byte) bool {
	c.keyUses = spec.Keys(c.keyUses[:0], args)
	if len(c.keyUses) == 0 {
		return false
	}
	if _, ok := c.s.backend.Leading(); ok {
		return false
	}
	if c.readOnly && spec.Is(command.ReadOnly) && c.multi == nil {
		return false
	}
	st := c.s.backend.Status()
	for _, n := range st.Nodes {
		if n.ID == st.Leader && n.ID != st.ID && n.Valkey != "" {
			host, port := splitAddr(n.Valkey, c)
			c.reject(spec, fmt.Sprintf("MOVED %d %s:%s", keySlot(args[c.keyUses[0].Index]), host, port))
			return true
		}
	}
	return false
}

// shardNode is one node as cluster clients see it.
type shardNode struct {
	raft.NodeStatus
	host, port, id string
	leader, online bool
	offset         uint64
}

// shard lists the nodes that clients can use, the leader first.
func (c *conn) shard() []shardNode {
	st := c.s.backend.Status()
	var out []shardNode
	for _, n := range st.Nodes {
		if n.Valkey == "" {
			continue
		}
		host, port := splitAddr(n.Valkey, c)
		k := shardNode{NodeStatus: n, host: host, port: port, id: hexID(n.ID + "." + n.Incarnation), leader: n.ID == st.Leader,
			online: n.InSync || n.ID == st.ID, offset: max(n.MatchIndex, 0)}
		if k.leader {
			out = append([]shardNode{k}, out...)
		} else {
			out = append(out, k)
		}
	}
	return out
}

// clustered wraps the CLUSTER subcommands.
func clustered(f func(c *conn, a [][]byte)) func(c *conn, a [][]byte) {
	return func(c *conn, a [][]byte) {
		if !c.s.opts.Cluster {
			c.w.Error("ERR This instance has cluster support disabled")
			return
		}
		f(c, a)
	}
}

func cmdClusterSlots(c *conn, _ [][]byte) {
	nodes := c.shard()
	if len(nodes) == 0 || !nodes[0].leader {
		// Nobody leads: the slots are nobody's for the moment.
		c.w.Array(0)
		return
	}
	c.w.Array(1)
	c.w.Array(2 + len(nodes))
	c.w.Int(0)
	c.w.Int(slotCount - 1)
	for _, n := range nodes {
		port, _ := strconv.ParseInt(n.port, 10, 64)
		c.w.Array(4)
		c.w.String(n.host)
		c.w.Int(port)
		c.w.String(n.id)
		c.w.Map(0)
	}
}

func cmdClusterShards(c *conn, _ [][]byte) {
	nodes := c.shard()
	if len(nodes) == 0 {
		c.w.Array(0)
		return
	}
	c.w.Array(1)
	c.w.Map(2)
	c.w.String("slots")
	c.w.Array(2)
	c.w.Int(0)
	c.w.Int(slotCount - 1)
	c.w.String("nodes")
	c.w.Array(len(nodes))
	for _, n := range nodes {
		port, _ := strconv.ParseInt(n.port, 10, 64)
		portName := "port"
		if c.s.opts.TLS != nil {
			portName = "tls-port"
		}
		c.w.Map(7)
		c.w.String("id")
		c.w.String(n.id)
		c.w.String(portName)
		c.w.Int(port)
		c.w.String("ip")
		c.w.String(n.host)
		c.w.String("endpoint")
		c.w.String(n.host)
		c.w.String("role")
		if n.leader {
			c.w.String("master")
		} else {
			c.w.String("replica")
		}
		c.w.String("replication-offset")
		c.w.Int(int64(n.offset))
		c.w.String("health")
		if n.online {
			c.w.String("online")
		} else {
			c.w.String("fail")
		}
	}
}

// nodeLine is a node's line of CLUSTER NODES.
func (c *conn) nodeLine(n *shardNode, leader string, term uint64) string {
	flags, of, slots := "slave", leader, ""
	if n.leader {
		flags, of, slots = "master", "-", fmt.Sprintf(" 0-%d", slotCount-1)
	}
	if n.ID == c.s.backend.Status().ID {
		flags = "myself," + flags
	}
	link := "connected"
	if !n.online {
		flags, link = flags+",fail?", "disconnected"
	}
	return fmt.Sprintf("%s %s:%s@%s %s %s 0 0 %d %s%s", n.id, n.host, n.port, n.port, flags, of, term, link, slots)
}

func cmdClusterNodes(c *conn, _ [][]byte) {
	nodes := c.shard()
	leader := "-"
	if len(nodes) > 0 && nodes[0].leader {
		leader = nodes[0].id
	}
	term := c.s.backend.Status().Term
	var b strings.Builder
	for i := range nodes {
		b.WriteString(c.nodeLine(&nodes[i], leader, term) + "\n")
	}
	c.w.Verbatim(b.String())
}

func cmdClusterReplicas(c *conn, a [][]byte) {
	nodes := c.shard()
	if len(nodes) == 0 || nodes[0].id != string(a[2]) {
		for _, n := range nodes {
			if n.id == string(a[2]) {
				c.w.Error("ERR The specified node is not a master")
				return
			}
		}
		c.w.Error("ERR Unknown node " + string(a[2]))
		return
	}
	term := c.s.backend.Status().Term
	c.w.Array(len(nodes) - 1)
	for i := range nodes[1:] {
		c.w.String(c.nodeLine(&nodes[i+1], nodes[0].id, term))
	}
}

func cmdClusterInfo(c *conn, _ [][]byte) {
	st := c.s.backend.Status()
	state := "ok"
	if st.Leader == "" {
		state = "fail"
	}
	c.w.Verbatim(fmt.Sprintf("cluster_state:%s\r\ncluster_slots_assigned:%d\r\ncluster_slots_ok:%d\r\ncluster_slots_pfail:0\r\ncluster_slots_fail:0\r\n"+
		"cluster_known_nodes:%d\r\ncluster_size:1\r\ncluster_current_epoch:%d\r\ncluster_my_epoch:%d\r\ncluster_stats_messages_sent:0\r\n"+
		"cluster_stats_messages_received:0\r\ntotal_cluster_links_buffer_limit_exceeded:0\r\n",
		state, slotCount, slotCount, len(st.Nodes), st.Term, st.Term))
}

func (s *Server) myID() string {
	st := s.backend.Status()
	return hexID(st.ID + "." + st.Incarnation)
}

func cmdClusterMyID(c *conn, _ [][]byte) { c.w.String(c.s.myID()) }

func cmdClusterMyShardID(c *conn, _ [][]byte) { c.w.String(hexID(c.s.backend.Status().ClusterID)) }

func cmdClusterKeySlot(c *conn, a [][]byte) { c.w.Int(int64(keySlot(a[2]))) }

// slotKeys calls f with the keys of a slot until f reports false.
func (c *conn) slotKeys(slot int, f func(key string) bool) error {
	q := engine.Query{Kind: engine.QueryScan, Stream: &engine.StreamQuery{Count: scanCountMax}}
	for {
		a, err := c.read(&q)
		if err != nil {
			return err
		}
		for _, k := range a.Stream.Keys {
			if keySlot([]byte(k.Name)) == slot && !f(k.Name) {
				return nil
			}
		}
		if a.Stream.Next == 0 {
			return nil
		}
		q.Stream.Cursor = a.Stream.Next
	}
}

func (c *conn) slotArgument(b []byte) (int, bool) {
	n, ok := resp.ParseInt(b)
	if !ok || n < 0 || n >= slotCount {
		c.w.Error("ERR Invalid slot")
		return 0, false
	}
	return int(n), true
}

func cmdClusterCountKeys(c *conn, a [][]byte) {
	slot, ok := c.slotArgument(a[2])
	if !ok {
		return
	}
	n := int64(0)
	if err := c.slotKeys(slot, func(string) bool { n++; return true }); err != nil {
		c.w.Error(errorText(err))
		return
	}
	c.w.Int(n)
}

func cmdClusterGetKeys(c *conn, a [][]byte) {
	slot, ok := c.slotArgument(a[2])
	if !ok {
		return
	}
	limit, ok := resp.ParseInt(a[3])
	if !ok || limit < 0 {
		c.w.Error("ERR Invalid number of keys")
		return
	}
	var keys []string
	if limit > 0 {
		if err := c.slotKeys(slot, func(k string) bool { keys = append(keys, k); return int64(len(keys)) < limit }); err != nil {
			c.w.Error(errorText(err))
			return
		}
	}
	c.w.Array(len(keys))
	for _, k := range keys {
		c.w.String(k)
	}
}

func cmdClusterRefused(c *conn, a [][]byte) {
	c.w.Error("ERR CLUSTER " + strings.ToUpper(string(a[1])) + " is not supported: membership is changed with tercet cluster")
}
