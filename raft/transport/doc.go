// Package transport is hashicorp/raft's Transport over the connections of package peer, together with the two things
// that only a transport can see: when an answer may count, and who holds what.
//
// The response gate. The log store returns before the disk has synced. What makes that safe happens here: a follower's
// answer to an append is written to the wire only when its own disk holds what the answer claims, and the leader hands
// an answer to raft only when its own disk holds what the request carried. Since a commit needs an answer of
// somebody, everybody who counts towards it has synced, and the syncs ran at the same time instead of one after the
// other.
//
// The watermark. From the same answers the transport keeps, for each node, up to which index its disk is known to hold
// this term's log (Watermark). A publish is acknowledged when every zone of the in-sync set has reached its entry. The
// table also keeps what a leader has to know about time: since when a node makes no progress, and which reads a
// majority has confirmed.
//
// A Transport serves one shard. All transports of a node share one peer.Mesh.
//
// Order of shutdown: Raft.Shutdown, then Transport.Close, then wait for the future that Raft.Shutdown returned. The
// other way round raft waits for its replication goroutines, and these for a connection that never comes.
//
// DESIGN.md beside this file has the byte layouts, the numbered invariants and the crash arguments.
package transport
