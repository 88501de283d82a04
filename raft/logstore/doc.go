// Package logstore fits one shard of the write-ahead log (package wal) to what hashicorp/raft asks of its log and of
// its stable store.
//
// A Store is hraft.LogStore, hraft.MonotonicLogStore and hraft.StableStore in one. It differs from a plain adapter
// in what it knows about time:
//
//   - StoreLogs returns before the disk has synced, except where nobody else's answer could carry the proof
//     (configuration entries, and a cluster whose latest configuration has one voter).
//   - Position tells which place of the stream must be durable before an index may be called stored, and Durable
//     up to where that is so. The transport's response gate and the watermark stand on these two.
//   - A vote is one record, so that no crash can leave a new term beside an old candidate.
//   - The commit index rides along with the log (StageCommit) and is replayed at start (ReplayCommitted), since
//     raft's own way of doing so loses the member list.
//
// DESIGN.md beside this file has the argument and what was rejected.
package logstore
