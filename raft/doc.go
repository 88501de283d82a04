// Package raft makes one replicated queue out of three nodes. A Node owns everything a process has of the
// cluster: the write-ahead log, the engine's store, the connections to the other nodes, and the
// hashicorp/raft instance between them. Programs talk to it in two verbs, which work on every node:
//
//   - [Node.Propose] has a command applied once by the replicated engine and returns its result when the
//     durability asked for has been reached;
//   - [Node.Query] reads the applied state linearizably.
//
// DESIGN.md beside this file draws the goroutines, the flow of a publish, and numbers the invariants that
// comments here refer to as R1, R2 and so on.
//
// The package is named after what it does. The library under it, hashicorp/raft, is imported everywhere as
// hraft.
package raft
