// Package peer connects the nodes of a cluster: one listener a node, and between each two nodes a few
// long-lived connections over which numbered frames travel.
//
// A Mesh is one node's side of all of this. It dials every node in its table and keeps those connections up
// (Link), accepts the others' (Request, answered in any order), and carries four kinds of traffic on separate
// connections, so that a large one never stands in front of a small one:
//
//	Control       heartbeats, votes: small, answered at once
//	Data          log entries: large, answered when the disk is done
//	Snapshot      one connection for each running transfer
//	Forward       requests that a node passes to another (Mesh.Call), many at a time
//	Introduction  before two nodes share a cluster: one request, one answer, closed
//
// A connection has a direction: who dialled it asks, who accepted it answers. Two nodes therefore hold two
// connections per purpose, and neither side's answers can block its own questions.
//
// Every connection begins with a handshake in which both ends say who they are (name.incarnation), which
// cluster they belong to and what they speak. A mismatch is refused with a reason that both sides log.
// DESIGN.md beside this file has the byte layouts and the argument.
package peer
